"""How a tensor lies on its ranks, in words and as a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reshard.catalog import Chunk, StoredTensor
from reshard.cli.output import rank_words
from reshard.geometry import Layout

# A drawing with more boxes than this is no longer taken in at a glance.
_MOST_ROWS = 16
_MOST_COLUMNS = 8


def ranks_of(chunk: Chunk) -> tuple[int, ...]:
    """The ranks that held a chunk when it was saved, as far as the checkpoint says."""
    return chunk.holders or tuple(sorted({place.rank for place in chunk.places}))


def tensor_ranks(tensor: StoredTensor) -> set[int]:
    """The ranks that held some part of a tensor when it was saved, as far as the checkpoint says."""
    return {rank for chunk in tensor.chunks for rank in ranks_of(chunk)} | set(tensor.layout.mesh.ranks if tensor.layout else ())


def layout_words(tensor: StoredTensor) -> str:
    """How a tensor lies on its mesh: `dim 0 over tp(2), replicated over dp(2)`; mesh axes with one place say nothing."""
    if tensor.layout is not None:
        return mesh_words(tensor.layout)
    return "whole" if len(tensor.chunks) == 1 else f"{len(tensor.chunks)} regions, in no even layout"


def mesh_words(layout: Layout) -> str:
    """As `layout_words`, of a layout."""

    def axis_words(axis: int) -> str:
        return f"{layout.mesh.axes[axis]}({layout.mesh.shape[axis]})"

    words = []
    for dimension, axes in enumerate(layout.split):
        names = [axis_words(axis) for axis in axes if layout.mesh.shape[axis] > 1]
        if names:
            words.append(f"dim {dimension} over {' then '.join(names)}")
    used = {axis for axes in layout.split for axis in axes}
    copies = [axis_words(axis) for axis, size in enumerate(layout.mesh.shape) if axis not in used and size > 1]
    if copies:
        words.append(f"replicated over {', '.join(copies)}")
    return ", ".join(words) or "whole"


@dataclass(frozen=True)
class _Side:
    """One side of a drawing: a split dimension, or none (then one box wide).

    Attributes:
        dimension: the dimension of the tensor, None for none.
        starts: where its parts begin.
        spans: the parts as slices, `0:64`; empty for no dimension.
    """

    dimension: int | None
    starts: tuple[int, ...] = (0,)
    spans: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return "" if self.dimension is None else f"dim {self.dimension}"

    def start_of(self, chunk: Chunk) -> int:
        return 0 if self.dimension is None else chunk.region.offset[self.dimension]


def draw(tensor: StoredTensor) -> list[str] | None:
    """A drawing of which ranks hold which part: one box a chunk, split dimensions as rows and columns.

    Returns:
        Lines of text; None for a tensor that isn't split, that is split in more than two dimensions or in too many parts, or whose chunks
        lie on no grid.
    """
    sides = []
    for dimension, size in enumerate(tensor.global_shape):
        starts = tuple(sorted({chunk.region.offset[dimension] for chunk in tensor.chunks}))
        if len(starts) > 1:
            ends = (*starts[1:], size)
            sides.append(_Side(dimension, starts, tuple(f"{begin}:{end}" for begin, end in zip(starts, ends, strict=True))))
            # On a grid each part ends where the next begins.
            following = dict(zip(starts, ends, strict=True))
            if any(chunk.region.end[dimension] != following[chunk.region.offset[dimension]] for chunk in tensor.chunks):
                return None
    if not 1 <= len(sides) <= 2:
        return None
    if len(sides) == 2:
        rows, columns = sides
    else:
        # A lone split dimension: rows if it is the first, as the rows of a matrix are; else columns.
        rows, columns = (sides[0], _Side(None)) if sides[0].dimension == 0 else (_Side(None), sides[0])
    cells = {(rows.start_of(chunk), columns.start_of(chunk)): rank_words(ranks_of(chunk)) for chunk in tensor.chunks}
    if len(cells) != len(tensor.chunks) or len(cells) != len(rows.starts) * len(columns.starts):
        return None
    if len(rows.starts) > _MOST_ROWS or len(columns.starts) > _MOST_COLUMNS:
        return None
    return _boxes(cells, rows, columns)


def _boxes(cells: Mapping[tuple[int, int], str], rows: _Side, columns: _Side) -> list[str]:
    """The lines of a drawing; `cells` are texts by where their box begins on each side."""
    spans = columns.spans or ("",)
    widths = [max(len(span), *(len(cells[row, column]) for row in rows.starts)) for span, column in zip(spans, columns.starts, strict=True)]
    labels = [f"{span:>{max(map(len, rows.spans))}} " for span in rows.spans] or [""]
    titles = [f"{rows.title} " if rows.title and index == 0 else " " * (len(rows.title) + bool(rows.title)) for index in range(len(labels))]
    indent = " " * (len(titles[0]) + len(labels[0]))

    def frame(left: str, middle: str, right: str) -> str:
        return indent + left + middle.join("─" * (width + 2) for width in widths) + right

    lines = []
    if columns.title:
        lines.append(f"{indent}  {columns.title}")
        lines.append(indent + "".join(f"  {span:<{width}} " for span, width in zip(spans, widths, strict=True)).rstrip())
    lines.append(frame("┌", "┬", "┐"))
    for index, row in enumerate(rows.starts):
        if index:
            lines.append(frame("├", "┼", "┤"))
        boxes = [f" {cells[row, column]:^{width}} " for column, width in zip(columns.starts, widths, strict=True)]
        lines.append(f"{titles[index]}{labels[index]}│{'│'.join(boxes)}│")
    lines.append(frame("└", "┴", "┘"))
    return lines
