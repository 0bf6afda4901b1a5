"""What every benchmark of ranks needs to run: ranks, a directory, a clock, and contenders by turns."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe_machine
from benchmarks.states import WORLD_SIZE
from tests.processes import RankFailedError, RankPool

# Ranks that are slower than this hang.
PATIENCE_SECONDS = 1800.0

Say = Callable[[str], None]


def clock() -> Say:
    """Says things with the seconds since now."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    return say


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of a command-line option whose values are above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new directory that is removed in the end."""
    directory = Path(tempfile.mkdtemp(prefix="reshard-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def fresh_ranks() -> Iterator[RankPool]:
    """Ranks that have done nothing yet."""
    pool = RankPool(WORLD_SIZE)
    try:
        yield pool
    finally:
        pool.close()


def within(limit: float, pool: RankPool, function: Callable[..., Any], *arguments: Any) -> list[Any] | None:
    """What ranks give; None when they need longer than a limit that is less than patience."""
    began = time.monotonic()
    try:
        return pool.run(function, *arguments, timeout=limit)
    except RankFailedError:
        if limit == PATIENCE_SECONDS or time.monotonic() - began < limit:
            raise
        return None


def turned(contenders: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins in its turn, so that nobody always comes after the same one."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def conclude(
    results: dict[str, Any],
    output: Path,
    draw: Callable[[dict[str, Any], Path], None],
    show: Callable[[dict[str, Any], Console], None],
    say: Say,
    *,
    width: int,
) -> None:
    """Write the results as JSON, draw them beside it, and show them as tables.

    Args:
        results: of all cases.
        output: the JSON.
        draw: makes the picture.
        show: prints the tables.
        say: is told where everything is.
        width: of the tables, in columns, where no terminal has one.
    """
    results["machine"]["load_average_after"] = describe_machine()["load_average"]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    picture = output.with_suffix(".png")
    draw(results, picture)
    print()
    show(results, Console(width=None if sys.stdout.isatty() else width))
    say(f"the numbers are in {output}, the picture in {picture}")
