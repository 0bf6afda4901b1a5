"""What rank 0 shows while it trains: one line that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from reshard.training.metrics import StepMetrics


class Progress:
    """Shows the lines of one run.

    Args:
        max_steps: where the run ends.
        every: steps between two plain lines.
        shown: False for ranks that are silent.
        stream: where to.
    """

    def __init__(self, max_steps: int, every: int = 1, *, shown: bool = True, stream: TextIO | None = None) -> None:
        self._max_steps = max_steps
        self._every = every
        self._shown = shown
        self._stream = stream if stream is not None else sys.stdout
        self._checkpoint = "no checkpoint yet"
        self._metrics: StepMetrics | None = None
        self._live: Live | None = None
        if shown and self._stream.isatty():
            self._live = Live(console=Console(file=self._stream, highlight=False), auto_refresh=False, transient=False)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if not self._shown:
            return
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._print(text)

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""
        self._metrics = metrics
        if self._live is not None:
            self._renew()
        elif self._shown and (metrics.step % self._every == 0 or metrics.step in (1, self._max_steps)):
            self._print(self._line(metrics))

    def resumed(self, step: int) -> None:
        """The run continues after a step of a checkpoint."""
        self._checkpoint = f"resumed from {step}"

    def saving(self, step: int) -> None:
        """A save begins."""
        self._checkpoint = f"saving {step} …"
        self._renew()

    def under_way(self, step: int, stalled: float) -> None:
        """A save goes on in the background; training stood still for so many seconds."""
        if self._live is None and self._shown:
            self._print(f"saving step {step} in the background; training waited {stalled:.3f} s")

    def saved(self, step: int, seconds: float, nbytes: int) -> None:
        """A save is committed; `nbytes` of it are this rank's."""
        self._checkpoint = f"saved {step}"
        if self._live is not None:
            self._renew()
        elif self._shown:
            self._print(f"saved step {step} in {seconds:.2f} s (rank 0 wrote {nbytes / 1e6:.1f} MB)")

    def _renew(self) -> None:
        if self._live is not None and self._metrics is not None:
            self._live.update(Text(self._line(self._metrics)), refresh=True)

    def _line(self, metrics: StepMetrics) -> str:
        done = metrics.step / self._max_steps
        bar = f"{'━' * round(20 * done):<20} " if self._live is not None else ""
        return (
            f"{bar}step {metrics.step}/{self._max_steps}  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  norm {metrics.grad_norm:.2f}  "
            f"{metrics.tokens / max(metrics.seconds, 1e-9):,.0f} tokens/s  {self._checkpoint}"
        )

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
