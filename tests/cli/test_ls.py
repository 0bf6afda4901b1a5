"""`reshard ls`: every state that a root can be in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import reshard
from reshard.cli.listing import DAMAGED, TORN, list_root
from reshard.cli.ls import ls
from reshard.errors import CheckpointNotFoundError, DamagedCheckpointError, StorageError
from reshard.storage import Entry, PosixStorage
from tests import saving_runs as runs
from tests.golden import GOLDEN

TRACKER = "latest_checkpointed_iteration.txt"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the iterations 1 (4 ranks) and 12 (8 ranks), the tracker on 12."""
    root = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "dp2_tp2" / "checkpoint", root)
    shutil.copytree(GOLDEN / "dp2_tp2_pp2_rr" / "checkpoint" / "iteration_00000001", root / "iteration_00000012")
    (root / TRACKER).write_text("12")
    return root


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def test_it_lists_iterations_with_size_files_ranks_and_the_tracker(root: Path, call_reshard: Run) -> None:
    os.utime(root / "iteration_00000012" / "common.json", (2e9, 2e9))
    done = call_reshard("ls", root, "--json")
    assert done.returncode == 0, done.stderr
    listing = json.loads(done.stdout)
    assert listing["root"] == str(root)
    assert (listing["tracker"], listing["tracker_problem"]) == (12, None)
    first, second = listing["iterations"]
    assert first["iteration"] == 1
    assert first["directory"] == "iteration_00000001"
    assert (first["state"], first["problem"], first["tracked"]) == ("committed", None, False)
    assert first["nbytes"] == size_of(root / "iteration_00000001")
    assert (first["files"], first["world_size"], first["global_step"]) == (10, 4, 1)
    assert (second["iteration"], second["tracked"], second["world_size"]) == (12, True, 8)
    assert second["modified"] == "2033-05-18T03:33:20+00:00"


def test_the_text_has_one_line_per_iteration_and_marks_the_tracked_one(root: Path, call_reshard: Run) -> None:
    done = call_reshard("ls", root)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(root)
    assert lines[1].split() == ["iteration", "global", "step", "size", "files", "ranks", "age", "state"]
    assert lines[3].split()[:2] == ["1", "1"]
    assert lines[4].split()[:2] == ["*", "12"]
    assert lines[4].split()[-1] == "committed"
    assert lines[-1] == "* the tracker: a run resumes from iteration 12"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (".saving-iteration_00000013-0123abcd-0", "its save didn't finish, or still goes on"),
        (".deleting-iteration_00000013-0123abcd-0", "its removal didn't finish, or still goes on"),
    ],
)
def test_what_a_dead_run_left_is_torn(root: Path, name: str, problem: str) -> None:
    left = root / name
    left.mkdir()
    (left / "CKP-model-0000000-0000001.safetensors").write_bytes(b"half")
    listing = list_root(PosixStorage(), str(root))
    line = listing.iterations[-1]
    assert (line.iteration, line.directory, line.state, line.problem) == (13, name, TORN, problem)
    assert (line.nbytes, line.files, line.world_size, line.tracked) == (4, 1, None, False)


def test_the_old_one_of_an_interrupted_second_save_counts_unless_the_new_one_is_there(root: Path) -> None:
    (root / "iteration_00000012").rename(root / ".replaced-iteration_00000012")
    line = list_root(PosixStorage(), str(root)).iterations[-1]
    assert (line.iteration, line.state, line.tracked) == (12, "committed", True)
    shutil.copytree(root / "iteration_00000001", root / "iteration_00000012")
    _, new, old = list_root(PosixStorage(), str(root)).iterations
    assert (new.directory, new.state, new.tracked) == ("iteration_00000012", "committed", True)
    assert (old.directory, old.state, old.tracked) == (".replaced-iteration_00000012", TORN, False)


def test_what_vanishes_while_it_looks_is_left_out(root: Path) -> None:
    class Vanishing(PosixStorage):
        def list(self, path: str) -> Sequence[Entry]:
            if path.endswith("iteration_00000001"):
                shutil.rmtree(path, ignore_errors=True)
            return super().list(path)

    assert [line.iteration for line in list_root(Vanishing(), str(root)).iterations] == [12]


def test_an_iteration_without_metadata_is_torn(root: Path) -> None:
    (root / "iteration_00000012" / "metadata.json").unlink()
    line = list_root(PosixStorage(), str(root)).iterations[-1]
    assert (line.iteration, line.state) == (12, TORN)
    assert line.problem is not None
    assert "metadata.json" in line.problem


def test_an_iteration_that_lost_its_metadata_is_damaged_and_still_the_one_that_a_run_would_load(tmp_path: Path) -> None:
    runs.save(PosixStorage(), [(1, 1), (2, 2)], root=str(tmp_path), world_size=2)
    (tmp_path / "iteration_00000002" / "metadata.json").unlink()
    listing = list_root(PosixStorage(), str(tmp_path))
    line = listing.iterations[-1]
    assert (line.iteration, line.state, line.tracked) == (2, DAMAGED, True)
    assert line.problem == "a file of the checkpoint is missing (metadata.json)"
    assert listing.tracker_problem is None
    with pytest.raises(DamagedCheckpointError, match=r"metadata\.json"):
        reshard.Checkpoint(tmp_path)


def test_damage_of_one_iteration_does_not_hide_the_others(root: Path) -> None:
    (root / "iteration_00000001" / "metadata.json").write_text("{")
    first, second = list_root(PosixStorage(), str(root)).iterations
    assert first.state == DAMAGED
    assert first.problem is not None
    assert "metadata.json" in first.problem
    assert second.state == "committed"


def test_a_single_card_checkpoint_is_committed_without_metadata(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "single_real_train" / "checkpoint", tmp_path / "root")
    (line,) = list_root(PosixStorage(), str(tmp_path / "root")).iterations
    assert (line.state, line.world_size, line.tracked) == ("committed", 1, True)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "the tracker is empty"), (b"latest", "the tracker holds no iteration number"), (b"7", "it names iteration 7, which isn't here")],
)
def test_a_bad_tracker_is_said_and_the_rest_listed(root: Path, content: bytes, problem: str, call_reshard: Run) -> None:
    (root / TRACKER).write_bytes(content)
    listing = list_root(PosixStorage(), str(root))
    assert listing.tracker_problem == problem
    assert len(listing.iterations) == 2
    done = call_reshard("ls", root)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"tracker: {problem}"


def test_without_a_tracker_the_newest_is_what_a_run_resumes_from(root: Path, call_reshard: Run) -> None:
    (root / TRACKER).unlink()
    done = call_reshard("ls", root)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].endswith("a run resumes from the newest committed iteration")


def test_other_directories_are_not_listed(root: Path) -> None:
    (root / "notes").mkdir()
    (root / "iteration_1").mkdir()
    assert [line.iteration for line in list_root(PosixStorage(), str(root)).iterations] == [1, 12]


def test_nothing_there_is_an_error(tmp_path: Path, call_reshard: Run) -> None:
    for path, words in ((tmp_path, "there is no checkpoint in this directory"), (tmp_path / "nowhere", "there is no such directory")):
        done = call_reshard("ls", path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"error: {words}\n  file:     {path}\n")


def test_one_iteration_is_not_a_root(root: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="reshard show"):
        list_root(PosixStorage(), str(root / "iteration_00000001"))


class Unreadable(PosixStorage):
    """A storage that refuses one file, whoever asks."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def read_bytes(self, path: str) -> bytes:
        if path == self.path:
            raise StorageError("can't open the file", file=path, found="Permission denied")
        return super().read_bytes(path)


def test_an_iteration_that_can_not_be_read_does_not_hide_the_others(root: Path) -> None:
    first, second = list_root(Unreadable(root / "iteration_00000001" / "common.json"), str(root)).iterations
    assert (first.state, first.problem) == (DAMAGED, "can't open the file (common.json): Permission denied")
    assert (second.state, second.tracked) == ("committed", True)


class Private(PosixStorage):
    """A storage on which a directory can't be listed, and perhaps not even looked into, whoever runs the test."""

    def __init__(self, path: Path, *, may_look: bool) -> None:
        self._path = str(path)
        self._may_look = may_look

    def stat(self, path: str) -> Entry | None:
        if path.startswith(f"{self._path}/") and not self._may_look:
            raise StorageError("can't look at the path", file=path, found="Permission denied")
        return super().stat(path)

    def list(self, path: str) -> Sequence[Entry]:
        if f"{path}/".startswith(f"{self._path}/"):
            raise StorageError("can't list the directory", file=path, found="Permission denied")
        return super().list(path)


@pytest.mark.parametrize("may_look", [True, False])
def test_an_iteration_that_can_not_be_looked_into_is_damaged(root: Path, may_look: bool) -> None:
    first, second = list_root(Private(root / "iteration_00000012", may_look=may_look), str(root)).iterations
    assert first.state == "committed"
    assert (second.iteration, second.state, second.tracked) == (12, DAMAGED, True)
    assert second.problem is not None
    assert "Permission denied" in second.problem


def test_of_a_sealed_checkpoint_any_missing_file_is_damage(tmp_path: Path) -> None:
    runs.save(PosixStorage(), [(1, 1), (2, 2), (3, 3)], root=str(tmp_path), world_size=2)
    (tmp_path / "iteration_00000001/extra/rank-0000001.safetensors").unlink()
    with (tmp_path / "iteration_00000002/common.json").open("a") as file:
        file.write(" ")
    os.truncate(tmp_path / "iteration_00000003/extra/rank-0000000.safetensors", 100)
    (tmp_path / "iteration_00000003/extra/metadata.index").unlink()
    problems = [line.problem for line in list_root(PosixStorage(), str(tmp_path)).iterations]
    assert problems == [
        "1 of 9 files is missing (extra/rank-0000001.safetensors)",
        "the file is not as it was saved (common.json)",
        "1 of 9 files has another size than when saved (extra/rank-0000000.safetensors)",
    ]


def test_data_that_is_missing_is_damage(root: Path) -> None:
    """Names and sizes tell, without a look into the files."""
    first, second = (sorted((root / name).glob("*-model-*")) for name in ("iteration_00000001", "iteration_00000012"))
    first[1].unlink()
    os.truncate(second[2], 100)
    lines = list_root(PosixStorage(), str(root)).iterations
    assert [line.state for line in lines] == [DAMAGED, DAMAGED]
    assert lines[0].problem == f"1 of 8 data files is missing ({first[1].name})"
    assert lines[1].problem is not None
    assert "1 of 16 data files is truncated" in lines[1].problem
    assert second[2].name in lines[1].problem


def test_metrics_and_health_are_shown_where_there_are_any(tmp_path: Path, call_reshard: Run) -> None:
    statuses = [None, 0, 1]
    with reshard.CheckpointManager(tmp_path) as manager:
        for step, status in enumerate(statuses, start=1):
            common = reshard.CommonInfo(global_step=step, ckpt_status=status)
            metrics = {"accuracy": step / 8, "many": 1.0, "more": 2.0} if status is not None else None
            if status:
                metrics = {"loss": float("nan"), **(metrics or {}), "fifth": 5}
            manager.save(step, model={"w": np.zeros(3)}, metrics=metrics, common=common)
    done = call_reshard("ls", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert " ".join(lines[1].split()) == "iteration global step size files ranks age accuracy many more loss health state"
    assert lines[3].split()[-1:] == ["committed"]
    assert lines[4].split()[-5:] == ["0.25", "1", "2", "healthy", "committed"]
    assert lines[5].split()[-6:] == ["0.375", "1", "2", "nan", "unhealthy", "committed"]
    assert lines[6] == "(1 more metric: --json shows them)"
    listed = json.loads(call_reshard("ls", tmp_path, "--json").stdout)["iterations"]
    assert [line["health"] for line in listed] == [None, "healthy", "unhealthy"]
    assert [line["metrics"] for line in listed] == [
        {},
        {"accuracy": 0.25, "many": 1.0, "more": 2.0},
        {"loss": "nan", "accuracy": 0.375, "many": 1.0, "more": 2.0, "fifth": 5.0},
    ]
    metrics_file = tmp_path / "iteration_00000002" / "extra" / "metrics.json"
    metrics_file.write_text(metrics_file.read_text().replace("0.25", "0.35"))
    assert list_root(PosixStorage(), str(tmp_path)).iterations[1].problem == "the file is not as it was saved (metrics.json)"


def test_a_narrow_terminal_cuts_nothing_off(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def narrow() -> Console:
        return Console(width=40, force_terminal=True, color_system=None, highlight=False, legacy_windows=False)

    monkeypatch.setattr("reshard.cli.ls.console", narrow)
    ls(str(root))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4:2] == ["  1  committed", "* 12  committed"]
    assert re.fullmatch(r"    step 1, [0-9.]+ KiB, 10 files, ranks: 4, \d+ (s|min|h|d) old", lines[2])
