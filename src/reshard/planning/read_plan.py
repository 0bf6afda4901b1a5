"""Which stored regions go into which memory: wanted regions ∩ chunks."""

from __future__ import annotations

from dataclasses import dataclass

from reshard.catalog import Catalog, Place, StoredTensor
from reshard.errors import MetadataError
from reshard.geometry import DType, Region
from reshard.planning.agreement import RankDescription, TensorDescription
from reshard.state import TensorKey


@dataclass(frozen=True, slots=True)
class Transfer:
    """A box that moves from a chunk into a shard.

    Attributes:
        key: the tensor.
        shard: the index of the shard in the wanted tensor.
        target: the box in the shard's own coordinates.
        place: where the chunk is stored.
        chunk_shape: the shape of the chunk, which is the shape of the tensor in the file.
        source: the box in the chunk's own coordinates.
        dtype: the element type, of both.
    """

    key: TensorKey
    shard: int
    target: Region
    place: Place
    chunk_shape: tuple[int, ...]
    source: Region
    dtype: DType

    @property
    def nbytes(self) -> int:
        """The bytes that are needed."""
        return self.dtype.itemsize * self.source.size


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that is in the checkpoint and in the run, but not the same.

    Attributes:
        key: the tensor.
        field: `shape` or `dtype`.
        stored: what the checkpoint has.
        wanted: what the run has.
    """

    key: TensorKey
    field: str
    stored: str
    wanted: str


@dataclass(frozen=True)
class ReadPlan:
    """What one rank reads.

    Attributes:
        rank: the global rank.
        transfers: the boxes to move, by file, and in a file in the order of the checkpoint's tensors.
        restored: the wanted tensors that the checkpoint has (also those of which this rank holds nothing).
        missing: the wanted tensors that it doesn't have.
        mismatched: the wanted tensors that differ in shape or dtype.
    """

    rank: int
    transfers: tuple[Transfer, ...]
    restored: tuple[TensorKey, ...]
    missing: tuple[TensorKey, ...]
    mismatched: tuple[Mismatch, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that are needed."""
        return sum(transfer.nbytes for transfer in self.transfers)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read, in order."""
        return tuple(dict.fromkeys(transfer.place.file for transfer in self.transfers))


def plan_reads(wanted: RankDescription, catalog: Catalog) -> ReadPlan:
    """Plan what one rank reads of a checkpoint.

    Where a chunk is stored several times, the rank reads the copy that it wrote itself, else one chosen by its rank, so that the ranks
    of a job spread over the copies.

    Raises:
        MetadataError: the chunks of a tensor don't cover a wanted region.
    """
    transfers: list[Transfer] = []
    restored: list[TensorKey] = []
    missing: list[TensorKey] = []
    mismatched: list[Mismatch] = []
    for tensor in wanted.tensors:
        stored = catalog.tensors.get(tensor.key)
        if stored is None:
            missing.append(tensor.key)
        elif stored.global_shape != tensor.global_shape:
            mismatched.append(Mismatch(tensor.key, "shape", str(list(stored.global_shape)), str(list(tensor.global_shape))))
        elif stored.dtype != tensor.dtype:
            mismatched.append(Mismatch(tensor.key, "dtype", stored.dtype.name, tensor.dtype.name))
        else:
            restored.append(tensor.key)
            transfers += _transfers(tensor, stored, wanted.rank, catalog.directory)
    transfers.sort(key=lambda transfer: transfer.place.file)
    return ReadPlan(wanted.rank, tuple(transfers), tuple(restored), tuple(missing), tuple(mismatched))


def _transfers(tensor: TensorDescription, stored: StoredTensor, rank: int, directory: str) -> list[Transfer]:
    transfers = []
    for index, region in enumerate(tensor.regions):
        if region.is_empty:
            continue
        covered = 0
        for chunk in stored.chunks:
            common = region.intersect(chunk.region)
            if common is None:
                continue
            covered += common.size
            transfers.append(
                Transfer(
                    tensor.key,
                    index,
                    common.relative_to(region),
                    _choose(chunk.places, rank),
                    chunk.region.shape,
                    common.relative_to(chunk.region),
                    stored.dtype,
                )
            )
        if covered != region.size:
            raise MetadataError(
                "the chunks of a tensor don't cover it",
                file=directory,
                tensor=tensor.key.parameter,
                rank=rank,
                found=f"{covered} of the {region.size} elements at {region}",
                fix="load another iteration; this one can't be whole",
            )
    return transfers


def _choose(places: tuple[Place, ...], rank: int) -> Place:
    for place in places:
        if place.rank == rank:
            return place
    return places[rank % len(places)]
