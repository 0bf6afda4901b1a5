"""Faults that the published implementation of the format has: none may be here. The table in the documentation names a test for each."""

from __future__ import annotations

import ast
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import MismatchError, SaveError, StorageError
from reshard.format.names import TRACKER_FILE
from reshard.format.tracker import read_tracker
from reshard.sources.resolve import list_iterations
from reshard.state import model_key
from reshard.storage import PosixStorage
from reshard.storage.storage import WritableFile
from reshard.testing import mesh_of, run_ranks, split, tensor_on_rank

PAGE = "docs/mindspore.md"


def weights(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full((64, 32), step, np.float32)}


def committed(root: Path) -> list[int]:
    return [step for step, _ in list_iterations(PosixStorage(), str(root))]


class Filling(PosixStorage):
    """A disk that is full as soon as it is told so, and that looks at the root each time a data file is begun."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.full = False
        self.seen: list[tuple[int | None, list[int]]] = []

    def create(self, path: str, size: int) -> WritableFile:
        tracker = self.root / TRACKER_FILE
        self.seen.append((read_tracker(PosixStorage(), str(tracker)) if tracker.exists() else None, committed(self.root)))
        if self.full:
            raise StorageError("can't create the file", file=path, found=os.strerror(errno.ENOSPC))
        return super().create(path, size)


def test_a_full_disk_behind_an_asynchronous_save_moves_no_tracker(tmp_path: Path) -> None:
    storage = Filling(tmp_path)
    with reshard.CheckpointManager(tmp_path, async_save=True, storage=storage) as manager:
        manager.save(1, model=weights(1))
        manager.wait()
        storage.full = True
        manager.save(2, model=weights(2))
        with pytest.raises(SaveError, match="No space left"):
            manager.wait()
        assert read_tracker(PosixStorage(), str(tmp_path / TRACKER_FILE)) == 1
        assert committed(tmp_path) == [1]
        storage.full = False
        manager.save(3, model=weights(3))
    assert read_tracker(PosixStorage(), str(tmp_path / TRACKER_FILE)) == 3, "the last save is tracked, too"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_only_checkpoint_stays_until_the_next_one_is_whole(tmp_path: Path, asynchronous: bool) -> None:
    storage = Filling(tmp_path)
    with reshard.CheckpointManager(tmp_path, async_save=asynchronous, keep_checkpoint_max=1, storage=storage) as manager:
        for step in (1, 2, 3):
            manager.save(step, model=weights(step))
            manager.wait()
            assert committed(tmp_path) == [step]
    # While each was written, the one before was there, and the tracker named it.
    assert {tracked: there for tracked, there in storage.seen if tracked != 3} == {1: [1], 2: [2], None: []}


def test_a_checkpoint_that_vanished_is_no_error(tmp_path: Path) -> None:
    with reshard.CheckpointManager(tmp_path, keep_checkpoint_max=2) as manager:
        for step in (1, 2):
            manager.save(step, model=weights(step))
        shutil.rmtree(tmp_path / "iteration_00000001")
        for step in (3, 4):
            manager.save(step, model=weights(step))
    assert committed(tmp_path) == [3, 4]


def test_nothing_is_cut_off_where_a_split_is_uneven(tmp_path: Path) -> None:
    array = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)

    def save(comm: Communicator) -> None:
        tensor = tensor_on_rank(model_key("w"), array, split(mesh_of(dp=4), "dp", None), comm.rank)
        reshard.save(tmp_path, 1, model={"w": tensor}, communicator=comm)

    run_ranks(4, save)
    found = np.zeros_like(array)
    reshard.load(tmp_path, model={"w": found})
    np.testing.assert_array_equal(found, array)
    for wrong in (np.zeros((6, 3), np.float32), np.zeros((7, 3), np.float64)):
        with pytest.raises(MismatchError, match="w"):
            reshard.load(tmp_path, model={"w": wrong})


def test_a_minus_before_a_zero_survives_a_balanced_load(tmp_path: Path) -> None:
    array = np.array([-0.0, 0.0, -0.0, 1.0], np.float32)
    reshard.save(tmp_path, 1, model={"w": array})

    def load(comm: Communicator) -> bytes:
        found: dict[str, Any] = {"w": np.full(4, 7, np.float32)}
        reshard.load(tmp_path, model=found, balanced=True, communicator=comm)
        return found["w"].tobytes()

    assert run_ranks(3, load) == [array.tobytes()] * 3


@pytest.mark.parametrize("name", ["a,b", "it's", 'say "w"', "a (b, c)", "(0,)", "x', (1,)"])
def test_names_with_commas_quotes_and_brackets(tmp_path: Path, name: str) -> None:
    array = np.arange(8.0).reshape(4, 2)

    def save(comm: Communicator) -> None:
        tensor = tensor_on_rank(model_key(name), array, split(mesh_of(dp=2), "dp", None), comm.rank)
        reshard.save(tmp_path, 1, model={name: tensor}, communicator=comm)

    run_ranks(2, save)
    np.testing.assert_array_equal(reshard.Checkpoint(tmp_path)[name][...], array)


def test_every_fault_has_a_test_or_a_reason(repository: Path) -> None:
    text = (repository / PAGE).read_text(encoding="utf-8").partition("## What does not happen here")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 22))
    named = 0
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[-1])
        assert tests or "can't" in row[-1], f"row {row[0]} names neither a test nor a reason"
        for file, name in tests:
            functions = [
                node.name for node in ast.walk(ast.parse((repository / file).read_text(encoding="utf-8"))) if hasattr(node, "name")
            ]
            assert name in functions, f"row {row[0]}: there is no {name} in {file}"
            named += 1
    assert named >= 21
