"""A file loses its end at the moment in which it is read: the read may give zeros, and no error. Nobody takes them for a tensor's bytes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import ShortFileError
from reshard.state import ShardedTensor, model_key
from reshard.storage.posix import PosixStorage
from reshard.testing import FaultyStorage, mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank

WHOLE = {
    "a": np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32),
    "b": np.random.default_rng(2).standard_normal((512, 512)).astype(np.float32),
}
READS = ("read_into", "scatter")

Axes = tuple[str | None, str | None]


class Zeroing(FaultyStorage):
    """One rank's storage. Cuts a data file in half at one of the reads of tensors, which gives zeros for what is lost. Files can't be
    mapped.

    Args:
        turn: held while something is done, by all ranks: who sees the zeros finds a shorter file.
        at: the number of the read; None for none.
    """

    def __init__(self, turn: threading.Lock, at: int | None = None) -> None:
        super().__init__(PosixStorage())
        self.reads = 0
        self._at = at
        self._opened: dict[str, int] = {}
        self._turn = turn

    def _do(self, name: str, path: str, work: Any, torn: Any = None) -> Any:
        with self._turn:
            if name == "map":
                return None
            if name == "open_read":
                self._opened[path] = self._opened.get(path, 0) + 1
            # Once it is opened for its header, then for the data.
            if name not in READS or "-model-" not in path or self._opened[path] < 2:
                return work()
            number, self.reads = self.reads, self.reads + 1
            if number != self._at:
                return work()
            half = os.path.getsize(path) // 2
            with open(path, "r+b") as file:
                file.seek(half)
                file.write(bytes(half))
            done = work()
            os.truncate(path, half)
            return done


def model_of(comm: Communicator, axes: Axes, *, blank: bool) -> dict[str, ShardedTensor]:
    model = {}
    for name, array in WHOLE.items():
        tensor = tensor_on_rank(model_key(name), array, split(mesh_of(tp=comm.world_size), *axes), comm.rank, blank=blank)
        assert tensor is not None
        model[name] = tensor
    return model


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "direct"])
@pytest.mark.parametrize(("world", "axes"), [(1, (None, None)), (2, ("tp", None)), (2, (None, "tp"))], ids=["alone", "rows", "columns"])
def test_zeros_in_the_place_of_lost_bytes_are_everyones_error(tmp_path: Path, world: int, axes: Axes, balanced: bool, verify: bool) -> None:
    run_ranks(1, lambda comm: reshard.save(tmp_path, 1, model=model_of(comm, (None, None), blank=False), communicator=comm))
    (path,) = tmp_path.glob("iteration_*/*-model-*")
    whole = path.read_bytes()

    def load(comm: Communicator, storage: FaultyStorage) -> None:
        model = model_of(comm, axes, blank=True)
        reshard.load(tmp_path, model=model, communicator=comm, storage=storage, balanced=balanced, verify=verify)

    turn = threading.Lock()
    counting = [Zeroing(turn) for _ in range(world)]
    run_ranks(world, lambda comm: load(comm, counting[comm.rank]))
    last = counting[-1].reads
    assert last
    for at in range(last):
        storages = [*(Zeroing(turn) for _ in range(world - 1)), Zeroing(turn, at)]
        for outcome in run_ranks_settled(world, lambda comm, storages=storages: load(comm, storages[comm.rank])):
            assert isinstance(outcome, ShortFileError), outcome
            assert str(path) in str(outcome)
        path.write_bytes(whole)


def test_a_view_gives_no_zeros_either(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model=WHOLE)
    (path,) = tmp_path.glob("iteration_*/*-model-*")
    storage = Zeroing(threading.Lock(), 0)
    with pytest.raises(ShortFileError, match="cut short") as caught:
        _ = reshard.Checkpoint(tmp_path, storage=storage)["a"][...]
    assert caught.value.file == str(path)
