"""The commands take Checkpoint 1.0, and say on one screen what is missing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import reshard
from reshard.config.validation import read_config
from tests.sources.legacy.runs import arrays_of, write_ranks, write_strategy
from tests.sources.legacy.test_ranks import PLAIN

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_ranks(tmp_path / "legacy", PLAIN, arrays_of(PLAIN))
    write_strategy(tmp_path / "files", PLAIN)
    return tmp_path


def test_convert_and_show(directory: Path, run_reshard: Run) -> None:
    source, strategy = directory / "legacy", directory / "files"
    done = run_reshard("convert", source, directory / "root", "--strategy", strategy, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["iteration"] == 3
    checkpoint = reshard.Checkpoint(directory / "root")
    for name, array in arrays_of(PLAIN).items():
        assert checkpoint[name].read().tobytes() == array.tobytes()
    shown = run_reshard("show", source, "up.weight", "--strategy", strategy, "--json")
    assert shown.returncode == 0, shown.stderr
    (tensor,) = json.loads(shown.stdout)["tensors"]
    assert tensor["layout"]["split"] == [["b"], []]
    assert [chunk["ranks"] for chunk in tensor["chunks"]] == [[0, 2], [1, 3]]


def test_without_a_strategy(directory: Path, run_reshard: Run) -> None:
    done = run_reshard("show", directory / "legacy")
    assert done.returncode == 2
    assert "--strategy" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("legacy", "needed"), [(True, True), (False, False), (None, False)])
def test_the_strategy_of_the_configuration(tmp_path: Path, legacy: bool | None, needed: bool) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"use_legacy_format: {legacy}\nload_checkpoint: old\nsrc_strategy_path_or_dir: strategy\n".replace("None", "null"))
    notes = read_config(path).notes
    assert any("src_strategy_path_or_dir is not needed" in note for note in notes) is not needed
