"""Who holds what of each tensor: the descriptions of all ranks turned round, once for all tensors that are held alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

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
    classes: dict[int, tuple[tuple[int, ...], list[int], list[np.ndarray]]] = {}
    rows: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}  # by the identity of a rank's tensors, which replicas share
    for description in descriptions:
        row = rows.get(id(description.tensors))
        if row is None:
            row = rows[id(description.tensors)] = numbering.row(description)
        numbers, own = row
        _, ranks, held = classes.setdefault(id(numbers), (numbers, [], []))
        ranks.append(description.rank)
        held.append(own)
    # Of each tensor the classes that have it, each with the tensor's column. Alike columns of a class have one number.
    found: dict[int, tuple[int, ...]] = {}
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    for numbers, ranks, held in classes.values():
        matrix = np.ascontiguousarray(np.array(held).reshape(len(held), len(numbers)).T)
        data, width = matrix.tobytes(), matrix.itemsize * len(held)
        texts = [data[begin : begin + width] for begin in range(0, len(data), width)]
        known: dict[bytes, tuple[int]] = {}
        of = np.array(ranks)
        for text in dict.fromkeys(texts):
            known[text] = (len(columns),)
            columns.append((of, np.frombuffer(text, matrix.dtype)))
        indices = map(known.__getitem__, texts)
        if not found:
            found = dict(zip(numbers, indices, strict=True))
            continue
        for number, index in zip(numbers, indices, strict=True):
            found[number] = found.get(number, ()) + index
    made = {indices: _holders(indices, columns, numbering.holdings) for indices in dict.fromkeys(found.values())}
    return dict(zip(map(numbering.keys.__getitem__, found), map(made.__getitem__, found.values()), strict=True))


def _holders(indices: tuple[int, ...], columns: Sequence[tuple[np.ndarray, np.ndarray]], holdings: Sequence[Holding]) -> Holders:
    ranks = np.concatenate([columns[index][0] for index in indices])
    numbers = np.concatenate([columns[index][1] for index in indices])
    order = np.argsort(ranks, kind="stable")
    return Holders(ranks[order], numbers[order], holdings)


class _Numbering:
    """Numbers for keys and holdings; equal ones have one number, whatever objects they are."""

    def __init__(self) -> None:
        self.keys: list[TensorKey] = []
        self.holdings: list[Holding] = []
        # By the identities of keys, and of tuples of them, which the descriptions keep alive; equal rows are one object.
        self._rows: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._rows_of_tables: dict[int, tuple[int, ...]] = {}
        self._equal_rows: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._known_keys: dict[TensorKey, int] = {}
        # By identity first, which costs less than a hash over regions and meshes. The descriptions keep the objects alive.
        self._by_identity: dict[int, int] = {}
        self._by_value: dict[tuple[object, ...], int] = {}
        self._layouts: dict[object, int] = {}
        self._layouts_by_identity: dict[int, int] = {}

    def row(self, description: RankDescription) -> tuple[tuple[int, ...], np.ndarray]:
        """The numbers of a rank's keys, and of what it holds of each."""
        tensors = description.tensors
        if not isinstance(tensors, TensorTable):
            keys = [tensor.key for tensor in tensors]
            return self._keys(keys), np.array([self._holding(tensor.holding) for tensor in tensors], np.int64)
        numbers = self._rows_of_tables.get(id(tensors.keys))
        if numbers is None:
            numbers = self._rows_of_tables[id(tensors.keys)] = self._keys(tensors.keys)
        return numbers, np.array([self._holding(holding) for holding in tensors.holdings], np.int64)[tensors.numbers]

    def _keys(self, keys: Sequence[TensorKey]) -> tuple[int, ...]:
        alike = tuple(map(id, keys))
        numbers = self._rows.get(alike)
        if numbers is None:
            known = self._known_keys
            numbers = tuple([known.setdefault(key, len(known)) for key in keys])
            numbers = self._rows[alike] = self._equal_rows.setdefault(numbers, numbers)
            self.keys += islice(known, len(self.keys), None)
        return numbers

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
