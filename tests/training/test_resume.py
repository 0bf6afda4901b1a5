"""A resumed run is the run that was never stopped, and each part of the state is needed for that."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.config.document import Document
from reshard.config.validation import validate
from reshard.errors import CheckpointNotFoundError, DataFileError, MismatchError, RootLockedError
from reshard.training.metrics import StepMetrics, read_metrics
from reshard.training.trainer import Trainer
from tests.training import ranks

STEPS, KEPT = 8, 4
# Enough dropout that a few steps with other random numbers show.
DROPOUT = {"attention_dropout": 0.3}


def trainer(output: Path, *, steps: int = STEPS, monitor: dict[str, Any] | None = None, **fields: Any) -> Trainer:
    runner = {"max_steps": steps, "batch_size": 4, "global_batch_size": 4}
    given = {
        "output_dir": str(output),
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": KEPT, **(monitor or {})}],
        "lr_schedule": {"type": "LinearWithWarmUpLR", "warmup_steps": 2, "total_steps": STEPS},
        "runner_config": runner,
        "model": DROPOUT,
        **fields,
    }
    configuration = ranks.settings(**given)
    return ranks.trainer_of(configuration)


def run(output: Path, **fields: Any) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown):
        trainer(output, **fields).train()
    return shown.getvalue()


def losses(output: Path) -> dict[int, float]:
    return {step.step: step.loss for step in read_metrics(output / "metrics.jsonl")[-1].steps}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped; its root has the iterations 4 and 8."""
    output = tmp_path_factory.mktemp("straight")
    run(output)
    return output


def test_resuming_is_exact(straight: Path, tmp_path: Path) -> None:
    run(tmp_path, steps=KEPT)
    shown = run(tmp_path, resume="auto")
    assert "resume: auto: continuing from iteration 4" in shown
    assert "random states restored" in shown
    expected = losses(straight)
    assert losses(tmp_path) == {step: expected[step] for step in range(KEPT + 1, STEPS + 1)}
    first, second = reshard.Checkpoint(str(straight / "checkpoint")), reshard.Checkpoint(str(tmp_path / "checkpoint"))
    assert list(first) == list(second)
    assert any(name.startswith("adam_m.") for name in first)
    for name in first:
        assert first[name][...].tobytes() == second[name][...].tobytes(), name
    assert first.common == second.common


def _whole_state(_: Trainer) -> None:
    """The positive control."""


def _without_moments(resumed: Trainer) -> None:
    for state in resumed.optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def _without_step_count(resumed: Trainer) -> None:
    for state in resumed.optimizer.state.values():
        state["step"].zero_()


def _without_data_position(resumed: Trainer) -> None:
    resumed.stream.consumed_samples = 0


def _without_schedule(resumed: Trainer) -> None:
    fresh = trainer(Path("unused"), resume="never")
    resumed.scheduler.load_state_dict(fresh.scheduler.state_dict())


def _without_random_states(resumed: Trainer) -> None:
    resumed._learner.seed(0)


@pytest.mark.parametrize(
    ("leave_out", "is_exact"),
    [
        (_whole_state, True),
        (_without_moments, False),
        (_without_step_count, False),
        (_without_data_position, False),
        (_without_schedule, False),
        (_without_random_states, False),
    ],
)
def test_every_part_of_the_state_is_needed(straight: Path, leave_out: Callable[[Trainer], None], is_exact: bool) -> None:
    expected = losses(straight)
    resumed = trainer(straight, resume="never")
    report = reshard.load(straight / "checkpoint" / "iteration_00000004", **resumed.parts())
    assert report.random == "restored"
    leave_out(resumed)
    found = {step: resumed.step().loss for step in range(KEPT + 1, STEPS + 1)}
    assert (found == {step: expected[step] for step in found}) is is_exact


def test_a_fresh_start_is_said_in_one_line(tmp_path: Path) -> None:
    shown = run(tmp_path, steps=1, resume="auto")
    assert [line for line in shown.splitlines() if "resume" in line] == [
        f"resume: auto: no checkpoint in {tmp_path}/checkpoint, a fresh start"
    ]


def test_the_last_step_is_saved_once(tmp_path: Path) -> None:
    run(tmp_path, steps=5)
    saves = [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl")[0].events if event["event"] == "save"]
    assert saves == [4, 5]
    run(tmp_path / "even", steps=4)
    saves = [event["step"] for event in read_metrics(tmp_path / "even" / "metrics.jsonl")[0].events if event["event"] == "save"]
    assert saves == [4]


def test_what_is_kept_besides_the_newest(tmp_path: Path) -> None:
    keep = {"keep_checkpoint_max": 1, "keep_checkpoint_every": 4, "keep_checkpoint_best": {"metric": "loss"}}
    run(tmp_path, steps=7, monitor={"save_checkpoint_steps": 1, **keep})
    losses_of = losses(tmp_path)
    best = min(losses_of, key=lambda step: (losses_of[step], -step))
    left = {int(path.name.removeprefix("iteration_")) for path in (tmp_path / "checkpoint").glob("iteration_*")}
    assert left == {4, best, 7}
    metrics = reshard.Checkpoint(tmp_path / "checkpoint" / f"iteration_{best:08d}").metrics
    assert metrics["loss"] == losses_of[best]
    assert metrics.keys() == {"loss", "grad_norm"}
    run(tmp_path, steps=8, resume="auto", monitor={"save_checkpoint_steps": 1, "keep_checkpoint_max": 1, "keep_checkpoint_days": 1})
    assert len(list((tmp_path / "checkpoint").glob("iteration_*"))) == len(left) + 1, "all are of today"


def test_null_never_saves(tmp_path: Path) -> None:
    run(tmp_path, steps=2, monitor={"save_checkpoint_steps": None})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_never_saves_still_resumes(straight: Path, tmp_path: Path) -> None:
    root = {"directory": str(straight / "checkpoint"), "save_checkpoint_steps": None}
    shown = run(tmp_path, steps=9, resume="auto", monitor=root)
    assert "resume: auto: continuing from iteration 8" in shown
    assert not (straight / "checkpoint" / "iteration_00000009").exists()
    none = {"directory": str(tmp_path / "none"), "save_checkpoint_steps": None}
    assert "a fresh start" in run(tmp_path, steps=1, resume="auto", monitor=none)
    assert not (tmp_path / "none").exists()


def test_a_fresh_start_over_an_earlier_run_is_said(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    shown = run(tmp_path, steps=1)
    assert f"{tmp_path}/checkpoint holds iterations 2 to 2 of an earlier run" in shown


def test_the_directory_is_the_root(tmp_path: Path) -> None:
    run(tmp_path / "out", steps=1, monitor={"directory": str(tmp_path / "elsewhere"), "prefix": "qwen3"})
    assert (tmp_path / "elsewhere" / "iteration_00000001" / "qwen3-model-0000000-0000001.safetensors").exists()


def test_common_information_is_filled(straight: Path) -> None:
    common = reshard.Checkpoint(str(straight / "checkpoint")).common
    assert common == reshard.CommonInfo(epoch_num=0, step_num=8, global_step=8, global_batch_size=4, consumed_samples=32, ckpt_status=0)


def test_a_finished_run_has_nothing_to_do(straight: Path, tmp_path: Path) -> None:
    shown = run(tmp_path, load_checkpoint=str(straight / "checkpoint"), resume_training=True)
    assert "nothing to do: the run is at step 8 of 8" in shown
    assert not (tmp_path / "checkpoint").exists() or not list((tmp_path / "checkpoint").glob("iteration_*"))


def test_load_checkpoint_takes_an_iteration_and_continues_it(straight: Path, tmp_path: Path) -> None:
    iteration = straight / "checkpoint" / "iteration_00000004"
    shown = run(tmp_path, load_checkpoint=str(iteration), resume_training=True)
    assert "resume_training: continuing from iteration 4" in shown
    expected = losses(straight)
    assert losses(tmp_path) == {step: expected[step] for step in range(5, 9)}


def test_load_checkpoint_obeys_an_edited_tracker(straight: Path, tmp_path: Path) -> None:
    tracker = straight / "checkpoint" / "latest_checkpointed_iteration.txt"
    before = tracker.read_text()
    tracker.write_text("4\n")
    try:
        shown = run(tmp_path, load_checkpoint=str(straight / "checkpoint"), resume_training=True, callbacks=[])
    finally:
        tracker.write_text(before)
    assert "continuing from iteration 4" in shown
    assert losses(tmp_path)[8] == losses(straight)[8]


def test_load_checkpoint_alone_takes_the_weights_only(straight: Path, tmp_path: Path) -> None:
    shown = run(tmp_path, steps=1, load_checkpoint=str(straight / "checkpoint"))
    assert "weights of iteration 8" in shown
    (segment,) = read_metrics(tmp_path / "metrics.jsonl")
    assert segment.start["resumed_from"] is None
    assert segment.steps[0].step == 1
    assert segment.steps[0].consumed_samples == 4
    # It has learned what the fresh run had not.
    assert segment.steps[0].loss < losses(straight)[1] - 0.2


def test_resume_auto_prefers_its_own_root(straight: Path, tmp_path: Path) -> None:
    begin = {"load_checkpoint": str(straight / "checkpoint"), "resume": "auto"}
    first = run(tmp_path, steps=2, **begin)
    assert "a fresh start" in first
    assert "weights of iteration 8" in first
    second = run(tmp_path, steps=3, **begin)
    assert "resume: auto: continuing from iteration 2" in second
    assert "weights of" not in second


def test_no_load_optim_begins_with_fresh_moments(straight: Path, tmp_path: Path) -> None:
    iteration = str(straight / "checkpoint" / "iteration_00000004")
    run(tmp_path, load_checkpoint=iteration, resume_training=True, no_load_optim=True)
    found, expected = losses(tmp_path), losses(straight)
    assert found[5] == expected[5]
    assert found[7] != expected[7]


def test_a_checkpoint_without_optimizer_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    run(tmp_path, steps=2, monitor={"save_optimizer": False})
    with pytest.raises(MismatchError, match="no_load_optim"):
        run(tmp_path, steps=3, resume="auto")
    shown = run(tmp_path, steps=3, resume="auto", no_load_optim=True)
    assert "continuing from iteration 2" in shown


def test_a_checkpoint_of_weights_and_progress_only_gets_schedule_and_position_by_its_step(straight: Path, tmp_path: Path) -> None:
    bare = trainer(tmp_path / "bare")
    source = reshard.load(straight / "checkpoint" / "iteration_00000004", **bare.parts())
    assert source is not None
    reshard.save(tmp_path / "root", 4, model=bare.model, optimizer=bare.optimizer, common=source.common)
    shown = run(tmp_path / "out", load_checkpoint=str(tmp_path / "root"), resume_training=True)
    assert "the schedule was put after step 4" in shown
    assert "the data were put after 16 samples" in shown
    (segment,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    expected = read_metrics(straight / "metrics.jsonl")[-1].steps[4]
    assert (segment.steps[0].lr, segment.steps[0].consumed_samples) == (expected.lr, expected.consumed_samples)


def test_no_checkpoint_where_one_was_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        run(tmp_path / "out", load_checkpoint=str(tmp_path / "none"), resume_training=True)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_another_run_in_the_same_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.training.trainer.CheckpointManager", partial(reshard.CheckpointManager, lock_timeout=0.1))
    with reshard.CheckpointManager(tmp_path / "checkpoint"), pytest.raises(RootLockedError):
        run(tmp_path, steps=1)


def test_an_unhealthy_step_marks_its_checkpoint(tmp_path: Path) -> None:
    broken = trainer(tmp_path, steps=1)
    broken.model.lm_head.weight.data.fill_(float("nan"))
    shown = io.StringIO()
    with redirect_stdout(shown):
        broken.train()
    assert "the loss is nan" in shown.getvalue()
    common = reshard.Checkpoint(str(tmp_path / "checkpoint")).common
    assert common is not None
    assert common.ckpt_status == 1


def test_a_damaged_checkpoint_is_passed_over_when_the_configuration_says_so(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoint", tmp_path / "checkpoint")
    (path,) = (tmp_path / "checkpoint" / "iteration_00000008").glob("*-model-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataFileError, match="iteration 4 is the newest intact one"):
        run(tmp_path, steps=9, resume="auto")
    shown = run(tmp_path, steps=9, resume="auto", on_corrupt="fallback")
    assert "continuing from iteration 4: " in shown
    assert "passed over iteration 8 (damaged): " in shown
    # Steps 5 to 8 are those of the run that nothing stopped.
    again, first = losses(tmp_path), losses(straight)
    assert {step: again[step] for step in range(5, 9)} == {step: first[step] for step in range(5, 9)}


def test_an_unhealthy_checkpoint_is_skipped_when_the_configuration_says_so(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoint", tmp_path / "checkpoint")
    broken = trainer(tmp_path, steps=9, resume="auto")
    real_step = broken.step

    def step() -> StepMetrics:
        return replace(real_step(), loss=math.nan)

    broken.step = step
    with redirect_stdout(io.StringIO()):
        broken.train()
    assert "continuing from iteration 9: " in run(tmp_path, steps=9, resume="auto")
    shown = run(tmp_path, steps=9, resume="auto", skip_unhealthy=True)
    assert "continuing from iteration 8: " in shown
    assert "passed over iteration 9 (unhealthy): " in shown
    assert losses(tmp_path).keys() == {9}
    assert reshard.Checkpoint(tmp_path / "checkpoint").common.ckpt_status == 0, "saved again, and healthy"


def test_notes_of_the_configuration_are_shown(tmp_path: Path) -> None:
    fields = ranks.settings().run.model_dump()
    fields |= {"use_legacy_format": None, "output_dir": str(tmp_path), "runner_config": {"max_steps": 1}}
    configuration = validate(Document("test", fields))
    shown = io.StringIO()
    with redirect_stdout(shown):
        ranks.trainer_of(configuration).train()
    assert shown.getvalue().startswith("use_legacy_format is not given: checkpoints are Checkpoint 2.0\n")
