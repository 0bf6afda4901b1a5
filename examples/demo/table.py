"""The table of all runs, each beside its reference."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby

from compare import Comparison
from rich.console import Console
from rich.table import Table
from runs import Run

_COLUMNS = ("run", "ranks", "strategy", "dropout", "killed after step", "resumed at", "largest relative deviation of the loss")


def reference_row(run: Run, start: dict[str, object], dropout: str = "0", ended: str = "") -> tuple[str, ...]:
    """The line of a run that nothing stopped."""
    return run.name, str(start["ranks"]), _strategy(start), dropout, "", "", ended


def compared_row(run: Run, found: Comparison, dropout: str = "0") -> tuple[str, ...]:
    """The line of a run that was killed, or goes on from one that was."""
    last = found.segments[-1].start
    strategies = " → ".join(strategy for strategy, _ in groupby(_strategy(segment.start) for segment in found.segments))
    kills = ", ".join(f"{kill['step']} (in a save)" if kill["saving"] else str(kill["step"]) for kill in run.kills)
    resumes = ", ".join(str(segment.start["resumed_from"]) for segment in found.segments if segment.start["resumed_from"] is not None)
    deviation = "0: identical" if found.largest == 0 else f"{found.largest:.1e}"
    return run.name, str(last["ranks"]), strategies, dropout, kills, resumes, f"{deviation} ({found.steps} steps)"


def _strategy(start: dict[str, object]) -> str:
    framework = " in MindSpore" if start["framework"] == "mindspore" else ""
    return f"{start['strategy']}{framework}"


def show(rows: Sequence[tuple[str, ...]]) -> None:
    """Print it."""
    table = Table(title="Every loss, against the uninterrupted run", title_justify="left", title_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in ("ranks", "dropout") else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print()
    console.print(table)
