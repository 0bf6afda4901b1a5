"""`reshard ls ROOT`: which checkpoints a root holds, and in which state they are."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import Annotated, Any

import typer

from reshard.cli.listing import IterationLine, RootListing, list_root
from reshard.cli.output import JsonOption, age_words, console, count_words, fits, print_json, size_words, table, timestamp
from reshard.format.names import TRACKER_FILE
from reshard.storage import PosixStorage

# A table shows so many metrics; JSON has all of them.
_METRICS_SHOWN = 4


def ls(
    root: Annotated[str, typer.Argument(help="The checkpoint root: the directory that holds the iterations.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """List a root's checkpoints, and the one a run resumes from."""
    listing = list_root(PosixStorage(), os.path.abspath(root))
    if json:
        print_json(_document(listing))
    else:
        _print(listing)


def _document(listing: RootListing) -> dict[str, Any]:
    return {
        "root": listing.root,
        "tracker": listing.tracker,
        "tracker_problem": listing.tracker_problem,
        "iterations": [
            {**asdict(line), "modified": timestamp(line.modified), "metrics": plain_metrics(line)} for line in listing.iterations
        ],
    }


def plain_metrics(line: IterationLine) -> dict[str, float | str]:
    """The metrics in words of JSON, which has none for what is not finite."""
    return {name: value if math.isfinite(value) else str(value) for name, value in line.metrics.items()}


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _print(listing: RootListing) -> None:
    lines = listing.iterations
    shows_health = any(line.health is not None for line in lines)
    names = list(dict.fromkeys(name for line in lines for name in line.metrics))
    shown = names[:_METRICS_SHOWN]
    columns = [
        ("", "left"),
        ("checkpoint", "left") if listing.is_foreign else ("iteration", "right"),
        ("global step", "right"),
        ("size", "right"),
        ("files", "right"),
        ("ranks", "right"),
        ("age", "right"),
        *((name, "right") for name in shown),
        *((("health", "left"),) if shows_health else ()),
        ("state", "left"),
    ]
    rows = [
        (
            "*" if line.tracked else "",
            line.directory if listing.is_foreign else str(line.iteration),
            _number(line.global_step),
            size_words(line.nbytes),
            str(line.files),
            _number(line.world_size),
            age_words(line.modified),
            *(f"{line.metrics[name]:.5g}" if name in line.metrics else "" for name in shown),
            *((line.health or "",) if shows_health else ()),
            _state(line),
        )
        for line in lines
    ]
    out = console()
    out.print(listing.root, soft_wrap=True)
    listed = table(columns, rows)
    if rows and fits(out, listed):
        out.print(listed)
    else:
        # A cell that is cut off is a wrong number: each iteration takes two lines.
        for line in lines:
            name = line.directory if listing.is_foreign else line.iteration
            out.print(f"{'*' if line.tracked else ' '} {name}  {_state(line)}", soft_wrap=True)
            step = "" if line.global_step is None else f"step {line.global_step}"
            ranks = "" if line.world_size is None else f"ranks: {line.world_size}"
            numbers = (f"{name} {line.metrics[name]:.5g}" for name in shown if name in line.metrics)
            facts = (step, size_words(line.nbytes), f"{line.files} files", ranks, f"{age_words(line.modified)} old", *numbers, line.health)
            out.print("    " + ", ".join(filter(None, facts)), soft_wrap=True)
    if len(names) > len(shown):
        out.print(f"({count_words(len(names) - len(shown), 'more metric')}: --json shows them)", soft_wrap=True)
    if listing.is_foreign:
        words = "checkpoints of PyTorch, which have no tracker: give the directory of one to a run, to show, or to convert"
    elif listing.tracker_problem is not None:
        words = f"tracker: {listing.tracker_problem}"
    elif listing.tracker is None:
        words = f"tracker: none ({TRACKER_FILE} is missing); a run resumes from the newest committed iteration"
    else:
        words = f"* the tracker: a run resumes from iteration {listing.tracker}"
    out.print(words, soft_wrap=True)


def _state(line: IterationLine) -> str:
    return line.state if line.problem is None else f"{line.state}: {line.problem}"
