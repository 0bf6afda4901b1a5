"""`reshard show`: what a checkpoint holds, as text and as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from reshard.cli.show import matching, show
from reshard.errors import UsageError
from tests.golden import GOLDEN

Run = Callable[..., subprocess.CompletedProcess[str]]


def show_json(call_reshard: Run, *arguments: str | Path) -> dict:
    done = call_reshard("show", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_has_every_tensor_with_its_chunks(call_reshard: Run) -> None:
    case = GOLDEN / "dp2_tp2_optshard_rr"
    document = show_json(call_reshard, case / "checkpoint")
    expected = np.load(case / "expected.npz")
    tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert set(tensors) == set(expected.files)
    for name, tensor in tensors.items():
        assert tensor["shape"] == list(expected[name].shape)
        assert tensor["nbytes"] == expected[name].nbytes
        assert sum(np.prod(chunk["shape"]) for chunk in tensor["chunks"]) == expected[name].size
    assert document["iteration"] == 1
    assert document["world_size"] == 4
    assert document["common"]["global_step"] == 1
    model = sum(expected[name].nbytes for name, tensor in tensors.items() if tensor["kind"] == "model")
    assert document["totals"]["model"] == {"tensors": 19, "nbytes": model}
    assert document["totals"]["optimizer"]["tensors"] == 39


def test_json_says_how_a_tensor_lies(call_reshard: Run) -> None:
    document = show_json(call_reshard, GOLDEN / "dp2_tp2_optshard_rr" / "checkpoint", "adam_m.embedding.word_embeddings.weight")
    (tensor,) = document["tensors"]
    assert (tensor["kind"], tensor["slot"], tensor["parameter"]) == ("optimizer", "adam_m", "embedding.word_embeddings.weight")
    assert tensor["layout"] == {
        "words": "dim 0 over c(2) then a(2)",
        "mesh": {"shape": [2, 1, 2], "axes": ["a", "b", "c"], "ranks": [0, 1, 2, 3]},
        "split": [["c", "a", "b"], []],
    }
    rows = {tuple(chunk["ranks"]): chunk["offset"][0] for chunk in tensor["chunks"]}
    assert rows == {(0,): 0, (2,): 32, (1,): 64, (3,): 96}
    assert [place["rank"] for chunk in tensor["chunks"] for place in chunk["places"]] == [0, 1, 2, 3]
    assert len(tensor["files"]) == 4


def test_a_single_tensor_is_drawn(call_reshard: Run) -> None:
    done = call_reshard("show", GOLDEN / "dp2_tp2" / "checkpoint", "decoder.layers.0.mlp.linear_fc2.weight")
    assert done.returncode == 0, done.stderr
    assert "  layout: dim 1 over c(2), replicated over a(2)\n" in done.stdout
    assert "  ┌──────┬───────┐\n  │ 0,2  │  1,3  │\n  └──────┴───────┘\n" in done.stdout
    assert "qwen3-model-0000000-0000004.safetensors, qwen3-model-0000002-0000004.safetensors" in done.stdout


def test_the_list_has_a_line_per_tensor(call_reshard: Run) -> None:
    done = call_reshard("show", GOLDEN / "dp2_tp2_pp2_rr" / "checkpoint", "*.linear_proj.weight")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if ".linear_proj.weight" in line]
    assert len(lines) == 4 * 3
    first = next(line for line in lines if line[0] == "decoder.layers.0.self_attention.linear_proj.weight")
    assert " ".join(first[1:]) == "[32, 32] float32 4.0 KiB 2 0-3 dim 1 over c(2), replicated over a(2)"
    last = next(line for line in lines if line[0] == "adam_v.decoder.layers.3.self_attention.linear_proj.weight")
    assert "4-7" in last


@pytest.mark.parametrize("width", [40, 400])
def test_a_long_list_says_the_same_without_a_table(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """rich's table of 20,000 rows took nine seconds."""

    def shown() -> list[list[str]]:
        show(str(GOLDEN / "dp2_tp2_pp2_rr" / "checkpoint"))
        return [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("─") and line.strip(" ─━")]

    monkeypatch.setattr("reshard.cli.show.console", lambda: Console(width=width, highlight=False, emoji=False, markup=False))
    short = shown()
    monkeypatch.setattr("reshard.cli.show._MOST_ROWS", 5)
    monkeypatch.setattr("reshard.cli.show.table", None)
    assert shown() == short
    assert len(short) > 100


def test_a_checkpoint_of_a_single_card(call_reshard: Run) -> None:
    done = call_reshard("show", GOLDEN / "single_real_train" / "checkpoint" / "iteration_00000001", "learning_rate")
    assert done.returncode == 0, done.stderr
    assert "note: no metadata.json" in done.stdout
    assert "shape:  []" in done.stdout


def test_without_an_optimizer(call_reshard: Run) -> None:
    done = call_reshard("show", GOLDEN / "dp2_tp2_noopt" / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "optimizer: none" in done.stdout


def test_damage_is_an_error_without_traceback_unless_asked_for(tmp_path: Path, run_reshard: Run) -> None:
    shutil.copytree(GOLDEN / "dp2_tp2" / "checkpoint", tmp_path / "root")
    (tmp_path / "root" / "iteration_00000001" / "metadata.json").write_text("{")
    done = run_reshard("show", tmp_path / "root")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "metadata.json" in done.stderr
    assert "Traceback" not in done.stderr
    debugged = run_reshard("show", tmp_path / "root", "--debug")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr


NAMES = ["w", "adam_m.w", "adam_m.layers.0.w", "layers.0.w", "layers.10.w"]


@pytest.mark.parametrize(
    ("pattern", "regex", "found"),
    [
        ("w", False, ["w"]),
        ("layers.0", False, ["adam_m.layers.0.w", "layers.0.w"]),
        ("layers.*", False, ["layers.0.w", "layers.10.w"]),
        ("layers.[0-9].w", False, ["layers.0.w"]),
        ("??????.?.w", False, ["layers.0.w"]),
        (r"^layers\.\d+", True, ["layers.0.w", "layers.10.w"]),
    ],
)
def test_patterns(pattern: str, regex: bool, found: list[str]) -> None:
    assert matching(NAMES, pattern, regex=regex) == found


def test_a_name_with_a_glob_s_characters_is_found_as_it_is() -> None:
    assert matching(["a[0]", "a0"], "a[0]") == ["a[0]"]


def test_a_pattern_that_means_nothing_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"layers\.10\.w"):
        matching(NAMES, "layer.10.w")
    with pytest.raises(UsageError, match="holds no tensor"):
        matching([], "w")
    with pytest.raises(UsageError, match="no regular expression"):
        matching(NAMES, "(", regex=True)


@pytest.mark.parametrize(("damage", "words"), [(Path.unlink, "a data file is missing"), (lambda file: os.truncate(file, 100), "truncated")])
def test_files_that_do_not_hold_what_is_shown_are_an_error(tmp_path: Path, call_reshard: Run, damage: Any, words: str) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "dp2_tp2" / "checkpoint", root)
    file = min((root / "iteration_00000001").glob("*-opt-*"))
    damage(file)
    done = call_reshard("show", root, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert str(file) in done.stderr
    # What lies in other files can be shown.
    assert call_reshard("show", root, "embedding.word_embeddings.weight").returncode == 0
