"""The parts that ranks hold of one tensor become its pieces: where each lies in the whole, and in which files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reshard.catalog import Arrangement, Piece, Site
from reshard.errors import DataFileError, MetadataError
from reshard.geometry import Layout, Region
from reshard.geometry.cover import cover_fault
from reshard.sources.legacy.naming import some
from reshard.sources.legacy.saved_file import FileTensor

_OTHER_STRATEGY = "give the strategy of the run that saved these files"


class Held(NamedTuple):
    """What one rank's file has of a tensor.

    Attributes:
        file: relative to the checkpoint's directory.
        tensor: the part.
    """

    file: str
    tensor: FileTensor


class Storing(NamedTuple):
    """Where a piece is stored.

    Attributes:
        piece: its number.
        rank: in whose file.
        part: which part of the rank's tensor it is.
    """

    piece: int
    rank: int
    part: int


@dataclass(frozen=True)
class Laid:
    """How a tensor lies in the files.

    Attributes:
        arrangement: its pieces.
        stored: where each is, replicas too.
        ignored: ranks that have the tensor, and shouldn't by the strategy.
    """

    arrangement: Arrangement
    stored: tuple[Storing, ...]
    ignored: tuple[int, ...] = ()

    def rows(self, held: Mapping[int, Held]) -> list[tuple[str, int, int, int]]:
        """Of each place the file, the piece's number, and where its bytes begin and how many they are.

        Args:
            held: this tensor's own parts, by rank: those of a tensor that lies like the one that was laid.
        """
        itemsize = self.arrangement.dtype.itemsize
        found: list[tuple[str, int, int, int]] = []
        for piece, rank, number in self.stored:
            part = held[rank].tensor.parts[number]
            found.append((held[rank].file, piece, part.begin, part.region.size * itemsize))
        return found


class _Slices(NamedTuple):
    """What the ranks of one layout hold."""

    layout: Layout
    whole: tuple[int, ...]
    ranks: Mapping[Region, list[int]]


def arrange(name: str, held: Mapping[int, Held], layouts: Sequence[Layout], directory: str) -> Laid:
    """The pieces of a tensor.

    Several layouts are those of pipeline stages that all have the tensor; any of them has all of it.

    Args:
        name: of the tensor.
        held: its parts by rank.
        layouts: how they lay on the ranks.
        directory: of the checkpoint, for errors.

    Raises:
        DataFileError: a part is in no file.
        MetadataError: the parts aren't what the layouts say.
    """
    placed = [_slices(name, held, layout, directory) for layout in layouts if any(rank in held for rank in layout.mesh.ranks)]
    if not placed:
        raise MetadataError(
            "the strategy places a tensor on other ranks than those whose files have it",
            file=directory,
            tensor=name,
            found=f"in files of ranks {some(sorted(held))}",
            expected=f"ranks {some(sorted({rank for layout in layouts for rank in layout.mesh.ranks}))}",
            fix=_OTHER_STRATEGY,
        )
    whole = placed[0].whole
    for slices in placed[1:]:
        if slices.whole != whole:
            raise MetadataError(
                "a tensor has another shape in another pipeline stage",
                file=directory,
                tensor=name,
                found=list(slices.whole),
                expected=list(whole),
                fix=_OTHER_STRATEGY,
            )
    complete = next((slices for slices in placed if cover_fault(list(slices.ranks), whole) is None), None)
    if complete is None:
        raise _incomplete(name, placed[0], directory)
    pieces: list[Piece] = []
    stored: list[Storing] = []
    for region, own in complete.ranks.items():
        ranks = own + [rank for slices in placed if slices is not complete for rank in slices.ranks.get(region, ())]
        parts = held[ranks[0]].tensor.parts
        same = [rank for rank in ranks if _boxes(held[rank]) == _boxes(held[ranks[0]])]
        for number, part in enumerate(parts):
            stored += [Storing(len(pieces), rank, number) for rank in same]
            sites = tuple(Site(held[rank].file, rank, f"@{number}" if number else "") for rank in same)
            offset = tuple(a + b for a, b in zip(region.offset, part.region.offset, strict=True))
            pieces.append(Piece(Region(offset, part.region.shape), sites, tuple(sorted(ranks))))
    meshed = {rank for layout in layouts for rank in layout.mesh.ranks}
    ignored = tuple(rank for rank in held if rank not in meshed)
    layout = complete.layout if len(placed) == 1 else None
    return Laid(Arrangement(held[stored[0].rank].tensor.dtype, whole, layout, tuple(pieces)), tuple(stored), ignored)


def likeness(held: Mapping[int, Held], layouts: Sequence[Layout]) -> tuple[object, ...]:
    """What tensors have in common that lie alike."""
    parts = tuple((rank, own.file, own.tensor.dtype.name, own.tensor.shape, _boxes(own)) for rank, own in held.items())
    return parts, tuple(layouts)


def _boxes(held: Held) -> tuple[Region, ...] | None:
    """The boxes of a rank's parts; None for the usual single one."""
    parts = held.tensor.parts
    return None if len(parts) == 1 else tuple(part.region for part in parts)


def _slices(name: str, held: Mapping[int, Held], layout: Layout, directory: str) -> _Slices:
    ranks = [rank for rank in layout.mesh.ranks if rank in held]
    first = held[ranks[0]].tensor
    if len(layout.split) != len(first.shape):
        raise MetadataError(
            "a layout for another number of dimensions",
            file=directory,
            tensor=name,
            rank=ranks[0],
            found=f"shape {list(first.shape)}",
            expected=f"{len(layout.split)} dimensions",
            fix=_OTHER_STRATEGY,
        )
    for rank in ranks:
        other = held[rank].tensor
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            raise MetadataError(
                "ranks hold parts of a tensor that don't fit together",
                file=held[rank].file,
                tensor=name,
                rank=rank,
                found=f"{other.dtype} of shape {list(other.shape)}",
                expected=f"{first.dtype} of shape {list(first.shape)}, as of rank {ranks[0]}",
                fix=_OTHER_STRATEGY,
            )
    whole = tuple(size * parts for size, parts in zip(first.shape, layout.fragments, strict=True))
    by_region: dict[Region, list[int]] = {}
    for rank in ranks:
        by_region.setdefault(layout.rank_region(rank, whole), []).append(rank)
    return _Slices(layout, whole, by_region)


def _incomplete(name: str, slices: _Slices, directory: str) -> DataFileError:
    lacking: dict[Region, list[int]] = {}
    for rank in slices.layout.mesh.ranks:
        region = slices.layout.rank_region(rank, slices.whole)
        if region not in slices.ranks:
            lacking.setdefault(region, []).append(rank)
    region, ranks = next(iter(lacking.items()))
    return DataFileError(
        "a part of a tensor is in no file",
        file=directory,
        tensor=name,
        found=f"{len(lacking)} of {len(lacking) + len(slices.ranks)} parts missing; the first at {list(region.offset)} of "
        f"{list(slices.whole)}, of shape {list(region.shape)}",
        expected=f"in the file of rank {some(ranks)}" if len(ranks) == 1 else f"in the file of one of ranks {some(ranks)}",
        fix="fetch the files of all ranks of the run; or give its own strategy",
    )
