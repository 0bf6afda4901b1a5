"""Which tensors of an export lie in which file, and which rank writes it: pure functions, the same on every rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from reshard.errors import UsageError
from reshard.geometry import DType
from reshard.sources.huggingface import WEIGHTS_FILE, shard_name

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", re.ASCII)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

_DIGITS = re.compile(r"(\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to export.

    Attributes:
        name: under which it is written, and found in the source.
        stored: the element type that the source has.
        dtype: the element type that is written.
        shape: of the whole tensor.
    """

    name: str
    stored: DType
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the file."""
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A file to write.

    Attributes:
        file: its name.
        tensors: what it holds.
    """

    file: str
    tensors: tuple[ExportTensor, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def parse_size(text: str | int) -> int:
    """Bytes, from a number or words such as `5GB`: `KB`, `MB`, `GB` are powers of 1000, `KiB`, `MiB`, `GiB` of 1024.

    Raises:
        UsageError: no size, or less than a byte.
    """
    match = _SIZE.fullmatch(str(text).upper())
    nbytes = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]])
    if nbytes < 1:
        raise UsageError("not a size", field="max_shard_size", found=repr(text), expected="bytes, or a size such as 5GB or 500MiB")
    return nbytes


def plan_shards(tensors: Iterable[ExportTensor], most_bytes: int) -> tuple[Shard, ...]:
    """Share tensors out to files, in the order of their names (numbers in names by value), each file filled before the next begins.

    A tensor is never cut: one that is larger than a file may be has a file of its own. All in one file, it is `model.safetensors`.

    Args:
        tensors: in any order: the result depends on nothing but what they are.
        most_bytes: the bytes of tensors that a file may hold.
    """
    groups: list[list[ExportTensor]] = []
    room = 0
    for tensor in sorted(tensors, key=lambda tensor: _in_order(tensor.name)):
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    names = [WEIGHTS_FILE] if len(groups) == 1 else [shard_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    return tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def _in_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key by which layer 2 comes before layer 10."""
    parts = _DIGITS.split(name)
    return tuple((0, int(part), part) if index % 2 else (1, 0, part) for index, part in enumerate(parts) if part or index % 2)


def share_out(shards: Sequence[Shard], ranks: int) -> list[list[Shard]]:
    """The files of each rank, evenly by bytes: the largest first, each to the rank that has least."""
    shares: list[list[Shard]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for shard in sorted(shards, key=lambda shard: (-shard.nbytes, shard.file)):
        least = loads.index(min(loads))
        shares[least].append(shard)
        loads[least] += shard.nbytes
    return shares
