"""The demo of experts and hybrid sharding runs once; what it left is examined here anew, from its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import reshard
from reshard.training.metrics import Segment, read_metrics

# All of this file waits for the one run.
pytestmark = [pytest.mark.sweep, pytest.mark.timeout(900)]

LAST = 24


def segments(output: Path, run: str) -> list[Segment]:
    return read_metrics(output / run / "metrics.jsonl")


def strategies(output: Path, run: str) -> list[str]:
    return [segment.start["strategy"] for segment in segments(output, run)]


def losses(output: Path, run: str) -> list[tuple[int, float]]:
    return [(step.step, step.loss) for segment in segments(output, run) for step in segment.steps]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, repository: Path, process_environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    command = [sys.executable, str(repository / "examples" / "experts" / "run.py"), "--output", str(folder)]
    done = subprocess.run(command, env=process_environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "BROKEN" not in done.stdout
    assert "0: identical" in done.stdout
    return folder


def test_runs_had_the_strategies_that_they_show(output: Path) -> None:
    hybrid = "dp4 (2 × 2 sharded, ep2)"
    assert strategies(output, "reference") == ["dp4 (ep2) × pp2"]
    assert strategies(output, "killed") == ["dp4 (ep2) × pp2"] * 2
    assert strategies(output, "expert-parallel-4") == ["dp4 (ep4)"]
    assert strategies(output, "tensor-parallel") == ["dp2 (ep2) × tp2"]
    assert strategies(output, "one-rank") == ["one rank"]
    assert strategies(output, "reference-hybrid") == [hybrid]
    assert strategies(output, "hybrid") == [hybrid, "dp4 (ep4)", hybrid]


@pytest.mark.parametrize("run", ["expert-parallel-4", "tensor-parallel", "one-rank"])
def test_experts_on_other_ranks_go_on_with_the_same_losses(output: Path, run: str) -> None:
    reference = dict(losses(output, "reference"))
    (segment,) = segments(output, run)
    assert segment.start["resumed_from"] >= 8
    assert [step.step for step in segment.steps] == list(range(segment.start["resumed_from"] + 1, LAST + 1))
    assert all(abs(step.loss - reference[step.step]) <= 1e-4 * reference[step.step] for step in segment.steps)


def test_hybrid_and_full_sharding_go_on_with_the_same_losses(output: Path) -> None:
    reference, found = dict(losses(output, "reference-hybrid")), losses(output, "hybrid")
    assert dict(found).keys() == reference.keys()
    assert all(abs(loss - reference[step]) <= 1e-4 * reference[step] for step, loss in found)


def test_the_same_strategy_is_exact(output: Path) -> None:
    reference = dict(losses(output, "reference"))
    assert reference[LAST] <= reference[1] * 2 / 3
    assert all(loss == reference[step] for step, loss in losses(output, "killed"))
    first, second = (reshard.Checkpoint(str(output / run / "checkpoint")) for run in ("reference", "killed"))
    assert first.iteration == second.iteration == LAST
    assert set(first) == set(second)
    for name in first:
        assert first[name][...].tobytes() == second[name][...].tobytes(), name


def test_there_is_a_picture(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert summary["kept"]
    assert Path(summary["picture"]).read_bytes().startswith(b"\x89PNG\r\n")
