"""Faults that tests tried: counted by kind, told at the end of a run, and kept in a file of which the README's table is made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

KILL, KILL_AT_CALL, POWER = "kill", "kill at a system call", "power"
FAILURE, FAILURE_OF_CALL, DEATH = "failure", "failure of a system call", "death"
BIT, HOSTILE, LOST_RANK = "bit", "hostile", "lost rank"

KINDS: Mapping[str, tuple[str, str]] = {
    KILL: ("a process is killed at an operation of a save", "the committed checkpoint is whole, bit for bit; the next save works"),
    KILL_AT_CALL: ("a process is killed at a system call of a save (strace)", "the same"),
    DEATH: ("a rank or a job dies at an operation of a save (simulated ranks)", "the same"),
    POWER: ("the power fails after an operation of a save: states of the disk", "the same; without any one fsync something is lost"),
    FAILURE: (
        "an operation of a save fails, once or for good: `ENOSPC`, `EIO`",
        "all ranks agree on how it ended; the old checkpoint stays or the new one is whole; the next save leaves nothing of it",
    ),
    FAILURE_OF_CALL: ("a system call of a save fails (strace): `ENOSPC`, `EIO`", "the same"),
    BIT: ("a bit of a checkpoint, or of the tracker, is flipped", "`verify` names the file; no load takes it for good"),
    HOSTILE: ("a file is made by an enemy", "an error that says what is wrong; of whole checkpoints also: little memory, no read outside"),
    LOST_RANK: (
        "a rank is killed, or hangs, during a save or a load",
        "the others end with an error; of a killed rank it says who is gone",
    ),
}
"""Of each kind what happens, and what held every time."""

PROPERTY = "faults"
"""The name of a report's property that has a kind and the number of points."""


class Tried(Protocol):
    """Notes that a test tried so many points of a kind of fault, and that all of them went well."""

    def __call__(self, kind: str, points: int, *, is_part: bool = False) -> None:
        """Note it.

        Args:
            kind: one of `KINDS`.
            points: how many.
            is_part: whether another test tries all of these points, and more.
        """
        ...


def tried(reports: Iterable[Any]) -> dict[str, tuple[str, int, bool]]:
    """By the name of each test of faults: the kind, the points, and whether they are a part of another test's."""
    return {report.nodeid: value for report in reports for name, value in report.user_properties if name == PROPERTY}


def totals(points: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The points of each kind that has any, in the order of `KINDS`."""
    counts: Counter[str] = Counter()
    for kind, number in points:
        counts[kind] += number
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def keep(file: Path, found: Mapping[str, tuple[str, int, bool]], failed: Iterable[str], date: str) -> None:
    """Note the tests of a run in a file, each with all its cases, beside tests of earlier runs that this one had not.

    Args:
        file: JSON; made if there is none.
        found: what `tried` gave.
        failed: the tests that failed.
        date: of the run.
    """
    tests = json.loads(file.read_text(encoding="utf-8"))["tests"] if file.exists() else {}
    run: dict[str, dict[str, Any]] = {}
    for name, (kind, points, is_part) in found.items():
        if not is_part:
            test = run.setdefault(_function(name), {"kind": kind, "cases": 0, "points": 0, "date": date})
            test["cases"] += 1
            test["points"] += points
    run |= {_function(name): {"kind": "failed", "cases": 0, "points": 0, "date": date} for name in failed}
    file.write_text(json.dumps({"tests": dict(sorted((tests | run).items()))}, indent=1) + "\n", encoding="utf-8")


def _function(name: str) -> str:
    """A test without its parameters, of which some are whole files."""
    return name.partition("[")[0]


def table(file: Path) -> str:
    """The README's table of what such a file has.

    Raises:
        ValueError: a test failed.
    """
    tests = json.loads(file.read_text(encoding="utf-8"))["tests"]
    failed = [name for name, test in tests.items() if test["kind"] not in KINDS]
    if failed:
        raise ValueError(f"these tests failed: {', '.join(failed)}")
    counts = totals((test["kind"], test["points"]) for test in tests.values())
    rows = [f"| {KINDS[kind][0]} | {count:,} | {KINDS[kind][1]} |" for kind, count in counts.items()]
    return "\n".join(["| fault | points | what held every time |", "|---|---:|---|", *rows]) + "\n"
