"""A load takes only what the seal vouches for: headers, extras and small files are those that were saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import DamagedCheckpointError
from reshard.testing import run_ranks, run_ranks_settled


def save(root: Path, step: int, comm: Communicator) -> None:
    rng = np.random.default_rng(step)
    reshard.save(root, step, model={"w": rng.standard_normal((8, 8))}, extra={"seen": np.arange(step)}, communicator=comm)


def load(root: Path, comm: Communicator, *, balanced: bool) -> None:
    reshard.load(root, model={"w": np.zeros((8, 8))}, communicator=comm, balanced=balanced)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2):
        np.random.seed(step)  # of the random states, which are saved  # noqa: NPY002
        run_ranks(2, lambda comm, step=step: save(tmp_path, step, comm))
    for balanced in (False, True):
        run_ranks(2, lambda comm, balanced=balanced: load(tmp_path, comm, balanced=balanced))
    return tmp_path


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("file", ["CKP-model-0000000-0000002.safetensors", "extra/global.safetensors", "extra/rank-0000001.safetensors"])
def test_a_sound_file_of_another_checkpoint_is_refused(root: Path, balanced: bool, file: str) -> None:
    one, two = root / "iteration_00000001" / file, root / "iteration_00000002" / file
    if one.exists():
        shutil.copy(one, two)
    outcomes = run_ranks_settled(2, lambda comm: load(root, comm, balanced=balanced))
    assert [isinstance(outcome, DamagedCheckpointError) for outcome in outcomes] == [True, True], outcomes
    assert all(str(two) in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("file", ["extra/global.safetensors", "extra/rank-0000001.safetensors"])
def test_missing_extras_are_damage(root: Path, balanced: bool, file: str) -> None:
    (root / "iteration_00000002" / file).unlink()
    outcomes = run_ranks_settled(2, lambda comm: load(root, comm, balanced=balanced))
    assert [isinstance(outcome, DamagedCheckpointError) for outcome in outcomes] == [True, True], outcomes
    assert all(file in str(outcome) and "missing" in str(outcome) for outcome in outcomes)
