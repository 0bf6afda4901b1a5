"""Who holds what of each tensor: the descriptions of all ranks turned round, once for all tensors that are held alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reshard.errors import CaptureError
from reshard.planning.agreement import Holding, RankDescription, TensorTable
from reshard.state import TensorKey


@dataclass(frozen=True, eq=False, slots=True)
class Holders:
    """Who holds a tensor, and what of it.

    Attributes:
        ranks: int64, ascending: those that have the tensor in their states, also where they hold no element of it.
        numbers: int64, of each of these ranks the index of what it holds in `holdings`.
        holdings: the different holdings of the whole job.
    """

    ranks: np.ndarray
    numbers: np.ndarray
    holdings: Sequence[Holding]

    def different(self) -> list[tuple[Holding, tuple[int, ...]]]:
        """The different holdings, each with its ranks, in the order of the ranks that have them first."""
        order = np.argsort(self.numbers, kind="stable")
        numbers, ranks = self.numbers[order], self.ranks[order].tolist()
        begins = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        bounds = pairwise([*begins, len(ranks)])
        found = [(self.holdings[number], tuple(ranks[a:b])) for number, (a, b) in zip(numbers[begins].tolist(), bounds, strict=True)]
        return sorted(found, key=lambda same: same[1][0])


def find_holders(descriptions: Sequence[RankDescription]) -> dict[TensorKey, Holders]:
    """Who holds what of each tensor; tensors that the same ranks hold in the same way share one object.

    The tensors are in the order of the ranks, those of a rank in its order, each where it comes first.

    Args:
        descriptions: of different ranks, ascending.
    """
    numbering = _Numbering()
    # Ranks that have the same tensors in the same order, by the numbers of the keys: a row of holdings for each of them.
    classes: dict[tuple[int, ...], tuple[list[int], list[np.ndarray]]] = {}
    rows: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}  # by the identity of a rank's tensors, which replicas share
    for description in descriptions:
        row = rows.get(id(description.tensors))
        if row is None:
            row = rows[id(description.tensors)] = numbering.row(description)
        ranks, held = classes.setdefault(row[0], ([], []))
        ranks.append(description.rank)
        held.append(row[1])
    # Of each tensor the classes that have it, each with the tensor's column. Alike columns of a class have one number.
    found: dict[int, list[int]] = {}
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    for numbers, (ranks, held) in classes.items():
        matrix = np.ascontiguousarray(np.array(held).reshape(len(held), len(numbers)).T)
        known: dict[bytes, int] = {}
        own = np.array(ranks)
        for number, column in zip(numbers, matrix, strict=True):
            index = known.setdefault(column.tobytes(), len(columns))
            if index == len(columns):
                columns.append((own, column))
            found.setdefault(number, []).append(index)
    made: dict[tuple[int, ...], Holders] = {}
    return {numbering.keys[number]: _holders(tuple(indices), columns, numbering.holdings, made) for number, indices in found.items()}


def _holders(
    indices: tuple[int, ...],
    columns: Sequence[tuple[np.ndarray, np.ndarray]],
    holdings: Sequence[Holding],
    made: dict[tuple[int, ...], Holders],
) -> Holders:
    holders = made.get(indices)
    if holders is None:
        ranks = np.concatenate([columns[index][0] for index in indices])
        numbers = np.concatenate([columns[index][1] for index in indices])
        order = np.argsort(ranks, kind="stable")
        holders = made[indices] = Holders(ranks[order], numbers[order], holdings)
    return holders


class _Numbering:
    """Numbers for keys and holdings; equal ones have one number, whatever objects they are."""

    def __init__(self) -> None:
        self.keys: list[TensorKey] = []
        self.holdings: list[Holding] = []
        self._rows: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._known_keys: dict[TensorKey, int] = {}
        # By identity first, which costs less than a hash over regions and meshes. The descriptions keep the objects alive.
        self._by_identity: dict[int, int] = {}
        self._by_value: dict[tuple[object, ...], int] = {}
        self._layouts: dict[object, int] = {}
        self._layouts_by_identity: dict[int, int] = {}

    def row(self, description: RankDescription) -> tuple[tuple[int, ...], np.ndarray]:
        """The numbers of a rank's keys, and of what it holds of each."""
        tensors = description.tensors
        if isinstance(tensors, TensorTable):
            keys = tensors.keys
            own = np.array([self._holding(holding) for holding in tensors.holdings], np.int64)
            held = own[tensors.numbers]
        else:
            keys = [tensor.key for tensor in tensors]
            held = np.array([self._holding(tensor.holding) for tensor in tensors], np.int64)
        alike = tuple(map(id, keys))
        numbers = self._rows.get(alike)
        if numbers is None:
            numbers = self._rows[alike] = tuple(self._key(key) for key in keys)
        return numbers, held

    def _key(self, key: TensorKey) -> int:
        number = self._known_keys.setdefault(key, len(self.keys))
        if number == len(self.keys):
            self.keys.append(key)
        return number

    def _holding(self, holding: Holding) -> int:
        number = self._by_identity.get(id(holding))
        if number is None:
            value = (holding.dtype.name, holding.global_shape, self._layout(holding.layout), holding.regions)
            number = self._by_value.setdefault(value, len(self.holdings))
            if number == len(self.holdings):
                self.holdings.append(holding)
            self._by_identity[id(holding)] = number
        return number

    def _layout(self, layout: object) -> int:
        number = self._layouts_by_identity.get(id(layout))
        if number is None:
            number = self._layouts_by_identity[id(layout)] = self._layouts.setdefault(layout, len(self._layouts))
        return number


def check_agreement(descriptions: Sequence[RankDescription]) -> None:
    """Hold the ranks' descriptions against each other.

    Raises:
        CaptureError: two ranks give one tensor different shapes or dtypes.
    """
    sound: set[int] = set()
    for key, holders in find_holders(descriptions).items():
        if id(holders) not in sound:
            check_same(key, holders.different())
            sound.add(id(holders))


def check_same(key: TensorKey, different: Sequence[tuple[Holding, tuple[int, ...]]]) -> None:
    """See that all ranks mean the same tensor.

    Args:
        key: the tensor.
        different: its holdings with their ranks.

    Raises:
        CaptureError: two ranks give it different shapes or dtypes.
    """
    expected, first = different[0]
    for holding, ranks in different[1:]:
        for field, mine, theirs in (
            ("shape", holding.global_shape, expected.global_shape),
            ("dtype", holding.dtype.name, expected.dtype.name),
        ):
            if mine != theirs:
                raise CaptureError(
                    f"two ranks give one tensor different {field}s",
                    tensor=f"{key.slot}.{key.parameter}" if key.slot else key.parameter,
                    rank=ranks[0],
                    found=mine,
                    expected=f"{theirs}, as on rank {first[0]}",
                    fix="give different tensors different names, or the same tensor the same shape and dtype on every rank",
                )
