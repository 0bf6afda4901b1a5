"""The older fields and the newer `checkpoint:` section mean the same configuration."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from reshard.config import from_yaml
from reshard.config.validation import read_config
from reshard.errors import ConfigError

OLDER = """
load_checkpoint: there
balanced_load: True
no_load_optim: True
use_legacy_format: False
callbacks:
  - type: CheckpointMonitor
    prefix: net
    directory: here
    save_checkpoint_steps: 7
    keep_checkpoint_max: 3
    async_save: True
    remove_redundancy: True
    save_optimizer: False
"""

NEWER = """
checkpoint:
  load_path: there
  load_balanced: True
  no_load_optim: True
  prefix: net
  save_path: here
  save_interleaved_steps: 7
  save_max: 3
  async_save: True
  save_remove_redundancy: True
  no_save_optim: True
"""


def written(directory: Path, text: str) -> Path:
    file = directory / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_both_spellings_are_one_configuration(tmp_path: Path) -> None:
    older, newer = from_yaml(written(tmp_path, OLDER)), read_config(written(tmp_path, NEWER))
    assert newer.run.model_copy(update={"checkpoint": None}) == older
    assert newer.notes == ()


def test_when_both_are_given_the_newer_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = from_yaml(written(tmp_path, OLDER + "checkpoint: {save_max: 9, prefix: net, load_path: elsewhere, remove_redundancy: False}"))
    assert run.monitor is not None
    assert (run.monitor.keep_checkpoint_max, run.monitor.directory, run.monitor.remove_redundancy) == (9, "here", False)
    assert run.load_checkpoint == "elsewhere"
    assert len(run.callbacks) == 1
    said = [line for line in caplog.messages if "both given" in line]
    assert len(said) == 3
    assert any(
        "CheckpointMonitor.keep_checkpoint_max and checkpoint.save_max are both given: checkpoint.save_max counts (9)" in s for s in said
    )


@pytest.mark.parametrize(
    ("text", "resumes", "leaves_out"),
    [
        ("checkpoint: {load_path: there}", False, False),
        ("checkpoint: {load_path: there, no_load_optim: True}", False, True),
        ("checkpoint: {load_path: there, no_load_optim: False}", True, False),
        ("checkpoint: {no_load_optim: False}\nload_checkpoint: there", True, False),
        ("checkpoint: {no_load_optim: False}", False, False),
        ("resume_training: False\ncheckpoint: {load_path: there, no_load_optim: False}", True, False),
        ("resume_training: True\ncheckpoint: {load_path: there}", True, False),
        ("resume_training: True\ncheckpoint: {load_path: there, no_load_optim: True}", True, True),
    ],
)
def test_whether_the_optimizer_is_loaded_is_whether_the_run_goes_on(tmp_path: Path, text: str, resumes: bool, leaves_out: bool) -> None:
    """As MindSpore Transformers' graph mode has it: not given, it is the opposite of resume_training."""
    found = read_config(written(tmp_path, text))
    assert (found.run.resume_training, found.run.no_load_optim) == (resumes, leaves_out)
    assert any("continues the run" in note for note in found.notes) == (resumes and "resume_training: True" not in text)


def test_the_section_alone_saves(tmp_path: Path) -> None:
    run = from_yaml(written(tmp_path, "checkpoint: {}"))
    assert run.monitor is not None
    assert (run.monitor.save_checkpoint_steps, run.monitor.keep_checkpoint_max, run.use_legacy_format) == (1, 5, False)
    off = from_yaml(written(tmp_path, "checkpoint: {enable_save: False}"))
    assert off.monitor is not None
    assert off.monitor.save_checkpoint_steps is None


def test_what_is_not_needed_is_taken_with_a_line(tmp_path: Path) -> None:
    text = "use_legacy_format: True\nauto_trans_ckpt: True\nsrc_strategy_path_or_dir: there\ncheckpoint: {reshard_worker_num: 4}"
    notes = read_config(written(tmp_path, text)).notes
    assert notes == (
        "auto_trans_ckpt is not needed: every load reshards",
        "src_strategy_path_or_dir is not needed: a checkpoint knows its own strategy",
        "checkpoint.reshard_worker_num is not needed: reads are spread over threads by themselves",
        "use_legacy_format: True is turned off by the section checkpoint, as in MindSpore Transformers",
    )


@pytest.mark.parametrize("field", ["save_max: 0", "save_interleaved_steps: 0", "reshard_worker_num: 0", "save_mx: 1", "load_balanced: 1"])
def test_wrong_values_are_named_as_they_were_written(field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, f"checkpoint:\n  {field}\n"))
    assert caught.value.field == f"checkpoint.{field.partition(':')[0]}"
    assert str(caught.value.file).endswith("run.yaml:2")
