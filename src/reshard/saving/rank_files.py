"""What one rank writes: its data files and its extras, durable when this is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from reshard.errors import NoSpaceError, SaveError
from reshard.format.extra import write_extra
from reshard.format.names import EXTRA_DIRECTORY, rank_extra_file
from reshard.format.safetensors import PlannedHeader, StreamedArray, write_tensors
from reshard.format.safetensors.writer import PIECE_BYTES, Values
from reshard.format.seal import SealedFile
from reshard.planning.file_plan import FilePlan
from reshard.planning.mapping.memory import ComposedMemory
from reshard.saving.snapshot import BufferMemory
from reshard.saving.streamed import StreamedMemory
from reshard.state import HostMemory, State
from reshard.storage import Storage
from reshard.storage.storage import join

# Room that a checkpoint leaves: a share of its own size, and as much as a directory and the tracker may take.
_MARGIN_SHARE = 100
_MARGIN_BYTES = 1 << 20


def check_space(storage: Storage, root: str, temporary: str, nbytes: int) -> None:
    """See that a checkpoint fits before a byte of it is written.

    Ranks that came earlier may already be writing: what is in the directory counts as free.

    Args:
        storage: where the root lies.
        root: the root.
        temporary: the directory that the ranks write; it need not exist.
        nbytes: what all ranks will write.

    Raises:
        NoSpaceError: it doesn't fit.
        SaveError: this rank doesn't see the root.
    """
    if storage.stat(root) is None:
        raise SaveError(
            "the checkpoint root, made by rank 0, isn't there for this rank",
            file=root,
            fix="the checkpoint root must lie on a file system that all ranks share",
        )
    free = storage.free_bytes(root)
    needed = nbytes + nbytes // _MARGIN_SHARE + _MARGIN_BYTES
    if free is None or free >= needed:
        return
    if storage.stat(temporary) is not None:
        free += sum(entry.size for entry in storage.list(temporary))
    if free < needed:
        raise NoSpaceError(
            "the checkpoint doesn't fit on the file system",
            file=root,
            found=f"{free} bytes free",
            expected=f"{needed} bytes: {nbytes} of the checkpoint and {needed - nbytes} to spare",
            fix="free some space, keep fewer checkpoints, or choose another directory; nothing was written",
        )


def write_rank(
    storage: Storage,
    directory: str,
    files: Sequence[tuple[FilePlan, PlannedHeader]],
    state: State,
    *,
    rank: int,
    world_size: int,
    place: str,
    written: Callable[[int], None] | None = None,
) -> dict[str, SealedFile]:
    """Write one rank's files into the directory of an iteration, which is made if it isn't there.

    Args:
        storage: where it lies.
        directory: its path.
        files: the data files, their tensors in the order of the file, with headers.
        state: gives the values.
        rank: the rank.
        world_size: the number of ranks.
        place: the rank's place in the strategy; its per-rank values come back to this place only.
        written: is told of every piece of data, how long it was.

    Returns:
        By the paths of the files inside the directory, what the checkpoint's seal says of them.

    Raises:
        CaptureError: a value that can't be saved, or memory that isn't what the state says.
        StorageError: the storage refuses.
        NoSpaceError: the storage is full.
    """
    extra = join(directory, EXTRA_DIRECTORY)
    storage.make_directory(extra)
    sealed = {}
    for file, header in files:
        path = join(directory, file.file_name)
        sealed[file.file_name] = write_tensors(storage, path, header, _values(file, state), written=written)
    name = join(EXTRA_DIRECTORY, rank_extra_file(rank))
    tree = {"rank_values": dict(state.rank_values), "world_size": world_size, "place": place}
    sealed[name] = write_extra(storage, join(directory, name), tree)
    storage.sync_directory(extra)
    storage.sync_directory(directory)
    return sealed


def _values(file: FilePlan, state: State) -> Iterator[tuple[str, Values]]:
    tensors = state.tensors
    for name, key, (_, shard, dtype, shape) in zip(file.names, file.keys, file.parts, strict=True):
        if 0 in shape:
            yield name, np.empty(shape, dtype.numpy)
        else:
            memory = tensors[key].shards[shard].memory
            take = _TAKE.get(type(memory))
            yield name, memory if take is None else take(memory)


def _composed(memory: ComposedMemory) -> Values:
    """Part by part where it is large: it doesn't lie there one beside the other."""
    return memory if memory.nbytes <= PIECE_BYTES else StreamedArray(memory.dtype.numpy, memory.shape, memory.blocks)


# What a shard's values are taken from where the memory itself isn't best asked: an array costs it less than an address, or it is better
# read part by part.
_TAKE: dict[type, Callable[[Any], Values]] = {
    HostMemory: attrgetter("array"),
    BufferMemory: BufferMemory.read,
    StreamedMemory: StreamedMemory.stream,
    ComposedMemory: _composed,
}
