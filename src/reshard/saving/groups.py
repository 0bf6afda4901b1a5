"""Hyper-parameters on their way to rank 0: the groups of all ranks become the groups of the run."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from reshard.format.extra import decode_tree, encode_tree
from reshard.geometry.dtypes import by_name, by_numpy
from reshard.state import ParameterGroup


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class GroupOptions(msgspec.Struct, array_like=True):
    """The hyper-parameters of a group, without its parameters: a tree's text and its arrays."""

    text: str
    arrays: dict[str, _Array]


def encode_options(groups: Sequence[ParameterGroup]) -> list[GroupOptions]:
    """The hyper-parameters of one rank's groups.

    Raises:
        CaptureError: one that can't be saved.
    """
    encoded = []
    for group in groups:
        text, arrays = encode_tree(dict(group.options))
        packed = {name: _Array(by_numpy(a.dtype).name, a.shape, np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}
        encoded.append(GroupOptions(text, packed))
    return encoded


def _decode_options(options: GroupOptions) -> dict[str, object]:
    arrays = {name: np.frombuffer(array.data, by_name(array.dtype).numpy).reshape(array.shape) for name, array in options.arrays.items()}
    return decode_tree(options.text, arrays)


def merge_groups(
    options: Sequence[Sequence[GroupOptions]], members: Sequence[Sequence[tuple[Sequence[str], Sequence[str]]]]
) -> list[ParameterGroup]:
    """The groups of the run: parameters with equal hyper-parameters are one group, whichever rank or group they come from.

    Args:
        options: of each rank, the hyper-parameters of each of its groups.
        members: of each rank, the parameters and the unstepped parameters of each of its groups.

    Returns:
        The groups in the order of the ranks. A parameter is in one of them: where ranks differ, the first one counts. It is unstepped when
        every rank that has it says so.
    """
    found: dict[bytes, tuple[GroupOptions, list[str]]] = {}
    placed: set[str] = set()
    stepped: set[str] = set()
    for rank_options, rank_members in zip(options, members, strict=True):
        for option, (parameters, unstepped) in zip(rank_options, rank_members, strict=True):
            _, names = found.setdefault(msgspec.msgpack.encode(option), (option, []))
            new = [parameter for parameter in parameters if parameter not in placed]
            names += new
            placed.update(new)
            stepped.update(set(parameters).difference(unstepped))
    return [
        ParameterGroup(_decode_options(option), tuple(names), tuple(name for name in names if name not in stepped))
        for option, names in found.values()
        if names
    ]
