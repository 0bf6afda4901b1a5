"""Under which strategy a checkpoint was saved: what strategy files say, or a table of layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from reshard.errors import LayoutError, UsageError
from reshard.geometry import Layout, Mesh
from reshard.geometry.layout import INTERLEAVED_AXIS
from reshard.sources.legacy.cuts import MOST_RANKS, Cut

_EXAMPLE = '{"*.weight": {"device_matrix": [2, 2], "tensor_map": [0, -1]}, "*": null}'

_FIELDS = ("device_matrix", "tensor_map", "alias_name", "rank_list", "interleaved_parallel", "opt_weight_shard_size")

Entry = tuple[Cut, "tuple[int, ...] | None"] | Layout | None
"""What a table has for a pattern: a cut, over these ranks or those of its stage; a layout; or None: every rank holds the whole."""


@dataclass(frozen=True)
class Strategy:
    """Which part of each tensor a rank held.

    Attributes:
        cuts: of each name, the cut in each pipeline stage that has the parameter.
        table: patterns of names and what they stand for; the first that fits counts, and counts before `cuts`.
        origin: where it was read, for errors.
    """

    cuts: Mapping[str, Mapping[int, Cut]] = field(default_factory=dict)
    table: Sequence[tuple[str, Entry]] = ()
    origin: str = "the table of layouts"

    def layouts(self, name: str, holders: Sequence[int], dimensions: int) -> list[Layout] | None:
        """How a tensor lay: a layout for each stage that had it; None when nothing is said about it.

        Args:
            name: of the tensor.
            holders: the ranks whose files have it.
            dimensions: of the tensor.

        Raises:
            LayoutError: what is said contradicts itself, or the tensor.
        """
        try:
            for pattern, entry in self.table:
                if fnmatchcase(name, pattern):
                    return _of_entry(entry, holders, dimensions)
            stages = self.cuts.get(name)
            if stages is None:
                return None
            return [cut.layout(range(stage * cut.size, (stage + 1) * cut.size), dimensions) for stage, cut in sorted(stages.items())]
        except LayoutError as error:
            raise LayoutError(
                error.what,
                file=self.origin,
                tensor=name,
                rank=error.rank,
                field=error.field,
                found=error.found,
                expected=error.expected,
                fix="give the strategy of the run that saved the checkpoint",
            ) from error


def strategy_of_table(table: Mapping[str, Any], origin: str = "the table of layouts") -> Strategy:
    """The strategy that a table of layouts says.

    Args:
        table: for each pattern of names (globs; the first that fits counts) how the tensors lay: a `reshard.geometry.Layout`; a
            `mindspore.Layout` that was called with a tensor map; an entry of `get_strategy_metadata`, which starts with one; a mapping with
            `device_matrix` and `tensor_map`, and perhaps `rank_list` and `opt_weight_shard_size`, whose ranks are those of the stage where
            they aren't given; or None: every rank holds the whole.
        origin: where it comes from, for errors.

    Raises:
        UsageError: something else than that.
    """
    return Strategy(table=tuple((str(pattern), _entry(value, str(pattern), origin)) for pattern, value in table.items()), origin=origin)


def _of_entry(entry: Entry, holders: Sequence[int], dimensions: int) -> list[Layout]:
    if entry is None:
        return [Layout.replicated(Mesh((len(holders),), ("ranks",), tuple(holders)), dimensions)]
    if isinstance(entry, Layout):
        return [entry]
    cut, ranks = entry
    if ranks is not None:
        return [cut.layout(ranks, dimensions)]
    stages = sorted({rank // cut.size for rank in holders})
    return [cut.layout(range(stage * cut.size, (stage + 1) * cut.size), dimensions) for stage in stages]


def _entry(value: Any, pattern: str, origin: str) -> Entry:
    if value is None or isinstance(value, Layout):
        return value
    if isinstance(value, list | tuple) and len(value) == 3 and not isinstance(value[0], int):
        value = value[0]
        if isinstance(value, Layout):
            return value
    as_mapping: Any = getattr(value, "to_dict", None)
    if callable(as_mapping):
        value = as_mapping()
    if not isinstance(value, Mapping) or not {"device_matrix", "tensor_map"} <= value.keys() or not value.keys() <= set(_FIELDS):
        raise UsageError(
            "not a layout",
            file=origin,
            field=pattern,
            found=f"{type(value).__name__} {value!r}"[:200],
            expected=f"such as {_EXAMPLE}",
        )
    ranks, names = value.get("rank_list"), value.get("alias_name")
    try:
        axes = _names(names)
        tensor_map = tuple(_axes(entry) for entry in value["tensor_map"])
        matrix = tuple(_whole(size) for size in value["device_matrix"])
        shard = _whole(value.get("opt_weight_shard_size", 0))
        listed = None if ranks is None else tuple(_whole(rank) for rank in ranks)
    except TypeError as cause:
        raise UsageError("not a layout", file=origin, field=pattern, found=str(cause), expected=f"such as {_EXAMPLE}") from cause
    if value.get("interleaved_parallel") or INTERLEAVED_AXIS in axes:
        raise UsageError(
            "a layout with micro-slices on one card is one of activations, not of parameters", file=origin, field=pattern, found=axes
        )
    if listed is not None and (len(set(listed)) < len(listed) or min(listed, default=0) < 0 or max(listed, default=0) >= MOST_RANKS):
        raise UsageError("not a list of ranks", file=origin, field=f"{pattern}: rank_list", found=list(listed), expected="each rank once")
    if not matrix or min(matrix) < 1:
        raise UsageError("not a device matrix", file=origin, field=pattern, found=list(matrix), expected="sizes of at least 1")
    return Cut(matrix, tensor_map, shard, axes=axes), listed


def _axes(entry: Any) -> tuple[int, ...]:
    return tuple(_whole(axis) for axis in entry) if isinstance(entry, list | tuple) else (_whole(entry),)


def _names(value: Any) -> tuple[str, ...]:
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
        raise TypeError(f"{value!r} in the place of the axes' names")
    return tuple(value or ())


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} in the place of a whole number")
    return value
