"""`use_legacy_format: True`: a run goes on from files of Checkpoint 1.0, whole or of ranks."""

from __future__ import annotations

from pathlib import Path

import mindspore
import pytest
from mindspore import Tensor

import reshard
from reshard.errors import UsageError
from tests.sources.legacy.runs import Cut, write_ranks, write_strategy
from tests.training.test_resume import losses, run

STEPS = 4


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight")
    run(output, steps=STEPS, monitor={"save_checkpoint_steps": 2}, model={})
    return output


def test_one_file(straight: Path, tmp_path: Path) -> None:
    stored = reshard.Checkpoint(straight / "checkpoint" / "iteration_00000002")
    rows = [{"name": name, "data": Tensor(stored[name].read())} for name in stored]
    mindspore.save_checkpoint(rows, str(tmp_path / "run.ckpt"))
    begin = {"load_checkpoint": str(tmp_path / "run.ckpt"), "resume_training": True}
    shown = run(tmp_path, steps=STEPS, model={}, **begin, use_legacy_format=True)
    assert "resume_training: continuing from" in shown
    assert losses(tmp_path) == {step: loss for step, loss in losses(straight).items() if step > 2}


def test_ranks_beside_iterations(straight: Path, tmp_path: Path) -> None:
    stored = reshard.Checkpoint(straight / "checkpoint" / "iteration_00000002")
    arrays = {name: stored[name].read() for name in stored if name != "global_step"}
    cuts = {
        name: Cut(array.shape, (1, 2), (0, *[-1] * (array.ndim - 1)) if array.shape[0] % 2 == 0 else (-1,) * array.ndim)
        for name, array in arrays.items()
    }
    root = straight / "checkpoint"
    write_ranks(root, cuts, arrays, beside={"global_step": stored["global_step"].read()}, save="1_2")
    write_strategy(tmp_path / "strategy", cuts)
    fields = {"steps": STEPS, "model": {}, "load_checkpoint": str(root), "resume_training": True}
    run(tmp_path, **fields, use_legacy_format=True, src_strategy_path_or_dir=str(tmp_path / "strategy"))
    assert losses(tmp_path) == {step: loss for step, loss in losses(straight).items() if step > 2}
    with pytest.raises(UsageError, match="src_strategy_path_or_dir"):
        run(tmp_path / "other", **fields, use_legacy_format=True)
    assert f"nothing to do: the run is at step {STEPS}" in run(tmp_path / "two", **fields)
