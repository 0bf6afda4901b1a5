"""The demo runs once, in a sweep once more with all of its runs; what it left is examined here anew, from its files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import reshard
from reshard.training.metrics import Segment, read_metrics

# All of this file waits for a run of the demo.
pytestmark = pytest.mark.timeout(900)

LAST = 40


@dataclass(frozen=True)
class Demo:
    """A demo that has run."""

    output: Path
    printed: str
    summary: dict[str, Any]

    def segments(self, run: str) -> list[Segment]:
        return read_metrics(self.output / run / "metrics.jsonl")

    def losses(self, run: str) -> list[tuple[int, float]]:
        return [(step.step, step.loss) for segment in self.segments(run) for step in segment.steps]

    def kills(self, run: str) -> list[dict[str, Any]]:
        return next(found["kills"] for found in self.summary["runs"] if Path(found["folder"]).name == run)


def run_demo(output: Path, repository: Path, environment: dict[str, str], *options: str) -> Demo:
    command = [sys.executable, str(repository / "examples" / "demo" / "run.py"), "--output", str(output), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    return Demo(output, done.stdout, json.loads((output / "summary.json").read_text()))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, repository: Path, process_environment: dict[str, str]) -> Demo:
    """Without its runs with dropout, which take as long as all others."""
    return run_demo(tmp_path_factory.mktemp("demo"), repository, process_environment, "--without-dropout")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, repository: Path, process_environment: dict[str, str]) -> Demo:
    """As `make demo` runs it."""
    return run_demo(tmp_path_factory.mktemp("whole"), repository, process_environment)


def check_reference(demo: Demo, run: str) -> None:
    (segment,) = demo.segments(run)
    assert (segment.start["ranks"], segment.start["strategy"]) == (8, "dp2 × tp2 × pp2")
    assert [step.step for step in segment.steps] == list(range(1, LAST + 1))
    assert all(step.lr <= 1e-3 for step in segment.steps)
    assert segment.steps[0].lr < segment.steps[4].lr
    assert segment.steps[-1].loss <= segment.steps[0].loss * 2 / 3


def test_the_reference_ran_through_on_8_ranks(demo: Demo) -> None:
    check_reference(demo, "reference")


def check_kills(demo: Demo, run: str) -> None:
    kills = demo.kills(run)
    assert len(kills) >= 2
    assert kills[-1]["saving"]
    # Before the first kill: a step whose save it came into is saved again later.
    saved = [event["step"] for event in demo.segments(run)[0].events if event["event"] == "save"]
    assert len([step for step in saved if step < kills[0]["step"]]) >= 3
    # The next start came back to the newest save before the first kill.
    resumed_from = demo.segments(run)[1].start["resumed_from"]
    assert max(step for step in saved if step <= kills[0]["step"]) <= resumed_from <= kills[0]["step"]
    # What was being written at the last kill was never committed.
    killed = demo.segments(run)[len(kills) - 1]
    assert killed.steps[-1].step == kills[-1]["step"]
    assert kills[-1]["step"] not in [event["step"] for event in killed.events]


def test_every_rank_was_killed_twice_and_once_during_a_save(demo: Demo) -> None:
    check_kills(demo, "killed")


@pytest.mark.parametrize(("run", "ranks", "strategy"), [("resumed-tp4", 4, "tp4"), ("resumed-one-rank", 1, "one rank")])
def test_another_strategy_goes_on_with_the_same_losses(demo: Demo, run: str, ranks: int, strategy: str) -> None:
    reference = dict(demo.losses("reference"))
    (segment,) = demo.segments(run)
    assert (segment.start["ranks"], segment.start["strategy"]) == (ranks, strategy)
    resumed_from = segment.start["resumed_from"]
    assert 12 <= resumed_from < demo.kills("killed")[-1]["step"]
    assert [step.step for step in segment.steps] == list(range(resumed_from + 1, LAST + 1))
    for step in segment.steps:
        assert abs(step.loss - reference[step.step]) <= 1e-4 * reference[step.step]


def test_what_was_done_before_a_kill_is_the_references(demo: Demo) -> None:
    reference = dict(demo.losses("reference"))
    assert all(loss == reference[step] for step, loss in demo.losses("killed"))


@pytest.mark.sweep
def test_the_whole_demo_is_as_promised(whole: Demo) -> None:
    for run in ("reference", "reference-dropout"):
        check_reference(whole, run)
    for run in ("killed", "resumed-dropout"):
        check_kills(whole, run)
    check_tidy(whole, "reference", "resumed-tp4", "resumed-one-rank", "resumed-dropout")
    check_end(whole)
    assert "0: identical" in whole.printed


@pytest.mark.sweep
def test_the_same_strategy_is_exact_with_dropout(whole: Demo) -> None:
    reference = dict(whole.losses("reference-dropout"))
    found = whole.losses("resumed-dropout")
    assert len(found) > LAST
    assert dict(found).keys() == reference.keys()
    assert all(loss == reference[step] for step, loss in found)
    # Dropout did something.
    assert reference != dict(whole.losses("reference"))


@pytest.mark.sweep
def test_every_byte_of_weights_and_moments_is_the_references(whole: Demo) -> None:
    first, second = (reshard.Checkpoint(str(whole.output / run / "checkpoint")) for run in ("reference-dropout", "resumed-dropout"))
    assert (first.iteration, second.iteration) == (LAST, LAST)
    assert set(first) == set(second)
    for slot in ("adam_m.", "adam_v."):
        assert sum(name.startswith(slot) for name in first) == sum("." in name and not name.startswith("adam_") for name in first)
    for name in first:
        assert first[name][...].tobytes() == second[name][...].tobytes(), name


def check_tidy(demo: Demo, *runs: str) -> None:
    for run in runs:
        root = demo.output / run / "checkpoint"
        assert (root / "latest_checkpointed_iteration.txt").read_text() == str(LAST)
        assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [f"iteration_{step:08d}" for step in (32, 36, 40)]


def test_roots_are_tidy(demo: Demo) -> None:
    check_tidy(demo, "reference", "resumed-tp4", "resumed-one-rank")


def test_every_file_opens_with_the_official_library(demo: Demo) -> None:
    files = sorted((demo.output / "reference" / "checkpoint" / "iteration_00000040").rglob("*.safetensors"))
    assert len(files) == 8 + 8 + 8 + 1
    for file in files:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                opened.get_tensor(name)


def test_it_opens_without_torch(demo: Demo, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = """
import sys, reshard
checkpoint = reshard.Checkpoint(sys.argv[1])
print(checkpoint.iteration, checkpoint["model.embed_tokens.weight"][0:4].shape, len(list(checkpoint)))
assert "torch" not in sys.modules
"""
    done = run_python(code, str(demo.output / "reference" / "checkpoint"))
    assert done.stdout == "40 (4, 128) 142\n"


def check_end(demo: Demo) -> None:
    assert "largest relative deviation" in demo.printed
    picture = Path(demo.summary["picture"])
    assert str(picture) in demo.printed
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert len(content) > 50_000
    assert "BROKEN" not in demo.printed
    assert demo.summary["kept"]


def test_it_ends_with_a_table_and_a_picture(demo: Demo) -> None:
    check_end(demo)
