"""`reshard prune`: what no rule keeps goes, and never what a run needs."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import reshard
from reshard.cli.app import app
from reshard.cli.output import size_words
from reshard.cli.prune import prune
from reshard.cli.pruning import carry_out, plan_prune
from reshard.errors import StorageError, UsageError
from reshard.saving.policies import KeepNewest
from reshard.storage import PosixStorage
from reshard.testing import FaultyStorage
from reshard.verification import verify_all

TRACKER = "latest_checkpointed_iteration.txt"
LEFTOVERS = (".saving-iteration_00000009-0123abcd-1", ".deleting-iteration_00000002-0123abcd-2")


def command(*arguments: str | Path, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)


def made(root: Path, losses: Sequence[float], status: dict[int, int] | None = None) -> Path:
    with reshard.CheckpointManager(root, keep_checkpoint_max=None) as manager:
        for step, loss in enumerate(losses, start=1):
            common = reshard.CommonInfo(global_step=step, ckpt_status=(status or {}).get(step))
            manager.save(step, model={"w": np.full(100, step)}, metrics={"loss": loss}, common=common)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The iterations 1 to 6, the best is 2; the tracker on 6."""
    return made(tmp_path / "root", [5.0, 1.0, 4.0, 2.0, 3.0, 3.5])


def steps(root: Path) -> list[int]:
    return [int(path.name.removeprefix("iteration_")) for path in sorted(root.glob("iteration_*"))]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def leave(root: Path) -> int:
    """What dead runs leave; its bytes."""
    for name in LEFTOVERS:
        (root / name).mkdir()
        (root / name / "CKP-model-0000000-0000001.safetensors").write_bytes(b"half" * 100)
    return 800


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (["--keep", "2"], [5, 6]),
        (["--keep", "1"], [6]),
        (["--keep-every", "3"], [3, 6]),
        (["--keep-best", "loss:2:min"], [2, 4, 6]),
        (["--keep-best", "loss"], [2, 6]),
        (["--keep-best", "loss:max", "--keep-best", "loss:1"], [1, 2, 6]),
        (["--keep-best", "accuracy:3"], [6]),
        (["--keep-days", "1"], [1, 2, 3, 4, 5, 6]),
        (["--keep", "1", "--keep-every", "3", "--keep-best", "loss:1:min"], [2, 3, 6]),
        ([], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_any_rule_keeps_stays(root: Path, rules: list[str], left: list[int]) -> None:
    before = size_of(root)
    seen = command("prune", root, *rules, "--dry-run")
    assert seen.exit_code == 0, seen.output
    assert steps(root) == [1, 2, 3, 4, 5, 6], "only looked"
    done = command("prune", root, *rules, "--yes")
    assert done.exit_code == 0, done.output
    assert steps(root) == left
    assert (root / TRACKER).read_text() == "6"
    gone = 6 - len(left)
    if gone:
        freed = size_words(before - size_of(root))
        assert f"{gone} checkpoint{'s' if gone > 1 else ''} would go: {freed}" in seen.output
        assert done.output.splitlines()[-1] == f"removed: {freed} freed"
    else:
        assert done.output.splitlines()[-1] == "nothing goes"
    assert verify_all(root).is_intact
    assert [line.split()[0] for line in seen.output.splitlines()[3:9]] == ["stays" if step in left else "goes" for step in range(1, 7)]


def test_by_age(root: Path) -> None:
    for step in (1, 3):
        for name in ("metadata.json", "common.json"):
            os.utime(root / f"iteration_{step:08d}" / name, (1, time.time() - 3 * 86400))
    assert command("prune", root, "--keep-days", "2", "-y").exit_code == 0
    assert steps(root) == [2, 4, 5, 6]


def test_it_asks_and_takes_no_for_an_answer(root: Path) -> None:
    for answer, code, words in (("n\n", 1, "nothing was removed"), ("\n", 1, "nothing was removed"), ("", 2, "nobody said")):
        done = command("prune", root, "--keep", "1", answer=answer)
        assert done.exit_code == code
        assert words in done.output
        assert steps(root) == [1, 2, 3, 4, 5, 6]
    done = command("prune", root, "--keep", "1", answer="y\n")
    assert done.exit_code == 0
    assert steps(root) == [6]
    done = command("prune", root, "--keep", "1")
    assert done.exit_code == 0, "nothing goes, so nothing is asked"


def test_the_trackers_checkpoint_stays_and_what_was_given_up_goes_first(root: Path) -> None:
    (root / TRACKER).write_text("2")
    assert command("prune", root, "--keep", "2", "--yes").exit_code == 0
    assert steps(root) == [1, 2], "3 to 6 are of a continuation that was given up"


def test_without_a_tracker_the_newest_stays(root: Path) -> None:
    (root / TRACKER).unlink()
    assert command("prune", root, "--keep-every", "100", "--yes").exit_code == 0
    assert steps(root) == [6]


@pytest.mark.parametrize("text", ["", "six", "7"])
def test_with_a_damaged_tracker_nothing_goes(root: Path, text: str) -> None:
    leave(root)
    (root / TRACKER).write_text(text)
    for options in (["--yes"], ["--dry-run"]):
        done = command("prune", root, "--keep", "1", *options)
        assert done.exit_code == 2
        assert "the tracker" in done.output
    assert steps(root) == [1, 2, 3, 4, 5, 6]
    assert (root / LEFTOVERS[0]).exists()


def test_while_a_run_holds_the_root_it_refuses(root: Path) -> None:
    leave(root)
    with reshard.CheckpointManager(root):
        for name in LEFTOVERS:
            (root / name).mkdir(exist_ok=True)
        done = command("prune", root, "--keep", "1", "--yes")
        assert done.exit_code == 2
        assert "another run writes this checkpoint root" in done.output
        seen = command("prune", root, "--keep", "1", "--dry-run")
        assert seen.exit_code == 0
        assert "5 checkpoints would go" in seen.output
        assert "the run that holds the root may need it" in seen.output
        assert f"a run holds this root, so that only --dry-run can look at it: process {os.getpid()} on host" in seen.output
        assert all((root / name).exists() for name in LEFTOVERS)
    assert steps(root) == [1, 2, 3, 4, 5, 6]


def test_what_dead_runs_left_goes_and_what_is_not_recognised_stays(root: Path) -> None:
    leave(root)
    (root / ".saving-tracker-0123abcd-3").write_text("6")
    for name in ("best", "iteration_7", ".saving-mine", "iteration_00000008"):
        (root / name).mkdir()
        (root / name / "file").write_text("mine")
    done = command("prune", root, "--yes")
    assert done.exit_code == 0, done.output
    assert "2 leftovers of dead runs go: 800 B" in done.output
    assert f"{LEFTOVERS[0]}: a run died while it saved it" in done.output
    assert f"{LEFTOVERS[1]}: a run died while it removed it" in done.output
    assert "iteration_00000008: not recognised" in done.output
    assert sorted(path.name for path in root.iterdir() if not re.fullmatch(r"iteration_0000000[1-6]", path.name)) == [
        ".reshard.lock",
        ".saving-mine",
        "best",
        "iteration_00000008",
        "iteration_7",
        TRACKER,
    ]
    assert steps(root)[:6] == [1, 2, 3, 4, 5, 6]


def test_the_old_one_of_an_interrupted_replacement(root: Path) -> None:
    os.rename(root / "iteration_00000003", root / ".replaced-iteration_00000003")
    done = command("prune", root, "--keep-every", "3", "--yes")
    assert done.exit_code == 0, done.output
    assert steps(root) == [3, 6], "it gets its name back"
    os.rename(root / "iteration_00000003", root / ".replaced-iteration_00000006")
    done = command("prune", root, "--yes")
    assert "a newer save of the same step has taken its place" in done.output
    assert [path.name for path in root.glob(".replaced*")] == []


def test_what_a_run_can_go_back_to_stays(tmp_path: Path) -> None:
    unhealthy = made(tmp_path / "unhealthy", [1.0] * 5, status={4: 1, 5: 1})
    assert command("prune", unhealthy, "--keep", "1", "--yes").exit_code == 0
    assert steps(unhealthy) == [3, 5]
    damaged = made(tmp_path / "damaged", [1.0] * 5)
    for step in (4, 5):
        (path,) = (damaged / f"iteration_{step:08d}").glob("*-model-*")
        os.truncate(path, 10)
    assert command("prune", damaged, "--keep", "1", "--yes").exit_code == 0
    assert steps(damaged) == [3, 5]


@pytest.mark.parametrize("rule", ["", ":3", "loss:0", ":min"])
def test_a_rule_that_is_none_is_refused(root: Path, rule: str) -> None:
    done = command("prune", root, "--keep-best", rule, "--yes")
    assert done.exit_code == 2
    assert steps(root) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("rules", [["--keep", "0"], ["--keep-every", "-1"], ["--keep-days", "0"], ["--keep-days", "nan"], ["--json"]])
def test_options_that_can_not_be_are_refused(root: Path, rules: list[str]) -> None:
    assert command("prune", root, *rules).exit_code == 2
    assert steps(root) == [1, 2, 3, 4, 5, 6]


def test_nothing_there_is_an_error_and_nothing_is_made(tmp_path: Path, root: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", root / "iteration_00000001"):
        for option in ("--yes", "--dry-run"):
            done = command("prune", path, "--keep", "1", option)
            assert done.exit_code == 2, done.output
    assert not (tmp_path / "nowhere").exists()
    assert (root / "iteration_00000001" / "metadata.json").exists()


def test_the_plan_as_data(root: Path) -> None:
    leave(root)
    expected = sum(size_of(root / f"iteration_{step:08d}") for step in range(1, 6)) + 800
    for option in ("--dry-run", "--yes"):
        done = command("prune", root, "--keep", "1", "--json", option)
        assert done.exit_code == 0, done.output
        plan = json.loads(done.output)
        assert (plan["tracked"], plan["freed"], plan["dry_run"]) == (6, expected, option == "--dry-run")
        assert [(line["iteration"], line["kind"], line["goes"]) for line in plan["lines"]] == [
            (1, "checkpoint", True),
            (2, "checkpoint", True),
            (2, "leftover", True),
            (3, "checkpoint", True),
            (4, "checkpoint", True),
            (5, "checkpoint", True),
            (6, "checkpoint", False),
            (9, "leftover", True),
        ]
    assert steps(root) == [6]


def test_a_root_that_changes_meanwhile_is_left_alone(root: Path) -> None:
    storage, policy, now = PosixStorage(), KeepNewest(1), time.time()
    plan = plan_prune(storage, str(root), policy, now)
    with reshard.CheckpointManager(root, keep_checkpoint_max=None) as manager:
        manager.save(7, model={"w": np.zeros(3)})
    with pytest.raises(UsageError, match="has changed"):
        carry_out(storage, plan, policy, now)
    assert steps(root) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("operation", "found"), [("rename", "iteration_00000001"), ("remove_tree", ".deleting-iteration_00000001-")])
def test_what_can_not_be_removed_is_an_error(root: Path, operation: str, found: str, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_prune(PosixStorage(), str(root), KeepNewest(2), 0.0)
    stuck = FaultyStorage(PosixStorage(), fail_at=1, operations={operation})
    with pytest.raises(StorageError, match="not all of it could be removed") as caught:
        carry_out(stuck, plan, KeepNewest(2), 0.0)
    assert found in str(caught.value)
    assert steps(root) == ([1, 5, 6] if operation == "rename" else [5, 6])
    assert "can't remove" in caplog.text
    assert command("prune", root, "--keep", "2", "--yes").exit_code == 0
    assert steps(root) == [5, 6]
    assert not list(root.glob(".deleting-*"))


def test_a_narrow_terminal_cuts_nothing_off(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def narrow() -> Console:
        return Console(width=30, force_terminal=True, color_system=None, highlight=False, legacy_windows=False)

    monkeypatch.setattr("reshard.cli.prune.console", narrow)
    prune(str(root), keep=1, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "goes 1  nothing keeps it"
    assert re.fullmatch(r"    [0-9.]+ KiB, 8 files, \d+ s old", lines[2])
    assert lines[-2] == "    " + lines[-2].strip()
