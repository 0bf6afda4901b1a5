"""Small runs that save, and what must be true of their root at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from reshard.checkpoint import Checkpoint
from reshard.comm import Communicator
from reshard.format.common import CommonInfo
from reshard.format.names import TRACKER_FILE
from reshard.format.tracker import decode_tracker
from reshard.geometry import Layout
from reshard.saving.options import SaveOptions
from reshard.saving.report import SaveReport
from reshard.saving.saver import Saver
from reshard.sources.resolve import list_iterations
from reshard.state import GLOBAL_STEP, ParameterGroup, State, TensorKey, model_key, slot_key
from reshard.storage import MemoryStorage, Storage
from reshard.testing import mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank

ROOT = "/runs/checkpoint"
KEYS = (model_key("embed"), model_key("norm"), slot_key("adam_m", "embed"), GLOBAL_STEP)


def whole(key: TensorKey, version: int) -> np.ndarray:
    """The whole tensor in some version of its values."""
    if key == GLOBAL_STEP:
        return np.array([version], np.int32)
    shape = (3,) if key.parameter == "norm" else (4, 3)
    return (np.arange(np.prod(shape)).reshape(shape) + 100 * version + len(key.slot or "")).astype(np.float32)


def layout(key: TensorKey, world_size: int) -> Layout:
    return split(mesh_of(dp=world_size), *(["dp", None] if key.parameter == "embed" else [None]))


def state(rank: int, world_size: int, version: int) -> State:
    """A rank's state in some version."""
    tensors = {}
    for key in KEYS:
        tensor = tensor_on_rank(key, whole(key, version), layout(key, world_size), rank)
        assert tensor is not None
        tensors[key] = tensor
    groups = (ParameterGroup({"lr": version / 10, "betas": (0.9, 0.95)}, ("embed", "norm")),)
    return State(tensors, groups, {"version": version}, {"random": np.arange(version + rank)})


def save(
    storages: Storage | list[Storage],
    steps: Sequence[tuple[int, int]],
    *,
    root: str = ROOT,
    options: SaveOptions | None = None,
    world_size: int | None = None,
    settled: bool = False,
) -> list[list[SaveReport] | BaseException]:
    """Every rank makes a saver and saves (step, version) after (step, version).

    Args:
        storages: one of each rank, or one for all.
        steps: what to save.
        root: where.
        options: of the saver.
        world_size: the number of ranks, when there is one storage for all.
        settled: errors stand in the place of results instead of being raised.
    """
    each = storages if isinstance(storages, list) else [storages] * (world_size or 1)

    def run(comm: Communicator) -> list[SaveReport]:
        with Saver(each[comm.rank], comm, root, options or SaveOptions(lock_timeout=0)) as saver:
            return [saver.save(step, state(comm.rank, comm.world_size, version), CommonInfo(global_step=step)) for step, version in steps]

    return run_ranks_settled(len(each), run, timeout=20) if settled else list(run_ranks(len(each), run, timeout=20))


def version_of(storage: Storage, directory: str) -> int:
    """Read a checkpoint whole; the version that all of it has."""
    checkpoint = Checkpoint(directory, storage)
    checkpoint.check()
    (version,) = checkpoint["global_step"][...]
    assert sorted(checkpoint) == ["adam_m.embed", "embed", "global_step", "norm"]
    for name in checkpoint:
        view = checkpoint[name]
        assert view.read().tobytes() == whole(view.key, int(version)).tobytes()
        for chunk in view.chunks:
            assert len(chunk.places) == len(chunk.holders)
    assert checkpoint.values == {"version": int(version)}
    assert [(group.options["lr"], group.parameters) for group in checkpoint.groups] == [(version / 10, ("embed", "norm"))]
    assert checkpoint.common is not None
    return int(version)


def committed(storage: Storage, root: str = ROOT) -> dict[int, int]:
    """The committed iterations, each read whole, and their versions."""
    return {step: version_of(storage, directory) for step, directory in list_iterations(storage, root)}


def tracked(storage: Storage, root: str = ROOT) -> int | None:
    """What the tracker says; it names a committed iteration if it is there."""
    path = f"{root}/{TRACKER_FILE}"
    if storage.stat(path) is None:
        return None
    step = decode_tracker(storage.read_bytes(path), path)
    assert step in dict(list_iterations(storage, root))
    return step


def names(storage: Storage, root: str = ROOT) -> list[str]:
    """All that lies in the root, hidden names too."""
    return [entry.name for entry in storage.list(root)]


def copy_of(storage: MemoryStorage) -> MemoryStorage:
    """Another storage with the same files."""
    other = MemoryStorage(capacity=storage.capacity, can_exchange=storage.can_exchange)

    def copy(path: str) -> None:
        other.make_directory(path)
        for entry in storage.list(path):
            child = f"{path.rstrip('/')}/{entry.name}"
            if entry.is_directory:
                copy(child)
            else:
                other.write_bytes(child, storage.read_bytes(child))

    copy("/")
    return other


def count_operations(run: Callable[[Storage], object], storage: Storage) -> int:
    """How many operations a run does on a storage."""
    from reshard.testing import FaultyStorage

    counted = FaultyStorage(storage)
    run(counted)
    return counted.count
