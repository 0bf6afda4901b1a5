"""The metrics file: whatever happened, it can be read and goes on."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

from reshard.training.metrics import MetricsFile, StepMetrics, read_metrics
from reshard.training.progress import Progress


def step(number: int, loss: float = 2.5) -> StepMetrics:
    return StepMetrics(number, loss, 1e-3, 0.5, 1024, 0.25, number * 8)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    file = MetricsFile(path)
    file.event("start", ranks=8, strategy="dp2", resumed_from=None)
    file.step(step(1))
    file.event("save", step=1)
    file.step(step(2))
    file.close()
    file = MetricsFile(path)
    file.event("start", ranks=1, strategy="one rank", resumed_from=1)
    file.step(step(2))
    file.close()
    first, second = read_metrics(path)
    assert (first.start["ranks"], second.start["resumed_from"]) == (8, 1)
    assert first.steps == [step(1), step(2)]
    assert first.events == [{"event": "save", "step": 1}]
    assert second.steps == [step(2)]


def test_every_prefix_of_the_file_can_be_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.event("start", ranks=8)
    file.step(step(1))
    file.close()
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        again = MetricsFile(path)
        again.event("start", ranks=2)
        again.step(step(1))
        again.close()
        segments = read_metrics(path)
        assert segments[-1].start == {"ranks": 2}
        assert segments[-1].steps == [step(1)]


def test_a_loss_that_is_no_number_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.event("start")
    file.step(step(1, math.nan))
    file.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(path.read_text().splitlines()[1], parse_constant=refuse)["loss"] is None
    assert math.isnan(read_metrics(path)[0].steps[0].loss)


def test_plain_lines_every_so_many_steps() -> None:
    stream = io.StringIO()
    with Progress(7, every=3, stream=stream) as progress:
        progress.note("begin")
        for number in range(1, 8):
            progress.step(step(number))
            if number == 4:
                progress.saving(4)
                progress.saved(4, 0.5, 2_000_000)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "begin"
    assert lines[1] == "step 1/7  loss 2.5000  lr 1.00e-03  norm 0.50  4,096 tokens/s  no checkpoint yet"
    assert [line.split()[1] for line in lines[1:] if line.startswith("step")] == ["1/7", "3/7", "6/7", "7/7"]
    assert "saved step 4 in 0.50 s (rank 0 wrote 2.0 MB)" in lines
    assert lines[-1].endswith("saved 4")


def test_a_terminal_shows_one_line_that_renews_itself() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(2, stream=stream) as progress:
        progress.note("begin")
        progress.step(step(1))
        progress.saving(1)
        progress.saved(1, 0.5, 2_000_000)
        progress.step(step(2))
    shown = stream.getvalue()
    assert "begin" in shown
    assert "\x1b[" in shown
    assert "saving 1" in shown
    assert "step 2/2" in shown


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    with Progress(2, shown=False, stream=stream) as progress:
        progress.note("begin")
        progress.step(step(1))
        progress.saved(1, 0.5, 1)
    assert stream.getvalue() == ""
