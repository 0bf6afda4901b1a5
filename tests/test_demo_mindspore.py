"""The demo with MindSpore runs once; what it left is examined here anew, from its files."""

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

LAST = 40


def segments(output: Path, run: str) -> list[Segment]:
    return read_metrics(output / run / "metrics.jsonl")


def losses(output: Path, run: str) -> list[tuple[int, float]]:
    return [(step.step, step.loss) for segment in segments(output, run) for step in segment.steps]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, repository: Path, process_environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("mindspore")
    command = [sys.executable, str(repository / "examples" / "mindspore" / "run.py"), "--output", str(folder)]
    done = subprocess.run(command, env=process_environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "BROKEN" not in done.stdout
    return folder


def test_one_run_went_from_two_ranks_to_one_to_pytorch(output: Path) -> None:
    (killed,) = segments(output, "killed")
    on_one, in_torch = segments(output, "moved")
    starts = [(part.start["framework"], part.start["ranks"], part.start["resumed_from"]) for part in (killed, on_one, in_torch)]
    assert starts[0] == ("mindspore", 2, None)
    assert starts[1][:2] == ("mindspore", 1)
    assert 8 <= starts[1][2] <= killed.steps[-1].step
    assert starts[2] == ("torch", 1, 28)
    reference = dict(losses(output, "reference"))
    assert reference.keys() == set(range(1, LAST + 1))
    assert reference[LAST] < reference[1] * 2 / 3
    found = losses(output, "moved")
    assert [step for step, _ in found] == list(range(starts[1][2] + 1, LAST + 1))
    assert all(abs(loss - reference[step]) <= 1e-4 * reference[step] for step, loss in found)


def test_the_same_ranks_go_on_bit_for_bit(output: Path) -> None:
    reference = dict(losses(output, "reference"))
    assert all(loss == reference[step] for run in ("killed", "resumed") for step, loss in losses(output, run))
    first, second = (reshard.Checkpoint(output / run / "checkpoint") for run in ("reference", "resumed"))
    assert (first.iteration, second.iteration) == (LAST, LAST)
    for name in first:
        assert first[name][...].tobytes() == second[name][...].tobytes(), name


def test_the_last_checkpoint_has_pytorchs_names_and_the_one_before_mindspores(output: Path) -> None:
    root = output / "moved" / "checkpoint"
    assert "model.embed_tokens.weight" in set(reshard.Checkpoint(root))
    assert "embedding.word_embeddings.weight" in set(reshard.Checkpoint(output / "reference" / "checkpoint"))


def test_it_ends_with_a_picture(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert summary["kept"]
    assert Path(summary["picture"]).read_bytes().startswith(b"\x89PNG\r\n")
