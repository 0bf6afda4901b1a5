"""What a benchmark's numbers are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

# What the targets hold for: 1.0 GB, and medians of so many rounds.
FULL_SCALE, FEWEST_ROUNDS = 1.0, 9


def is_judged(scale: float, rounds: int) -> bool:
    """Whether the targets hold for a run: they are for the whole state and enough rounds."""
    return scale == FULL_SCALE and rounds >= FEWEST_ROUNDS


def check(what: str, value: float | None, relation: str, target: float | None, judged: bool) -> dict[str, Any]:
    """A number and what must hold for it, as they go into the JSON.

    Args:
        what: names it.
        value: the number; None where there is none.
        relation: `>=` or `<=`.
        target: None where there is no target.
        judged: whether the target holds for this run.
    """
    met = None
    if judged and value is not None and target is not None:
        met = value >= target if relation == ">=" else value <= target
    return {"what": what, "value": value, "relation": relation, "target": target, "met": met}


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Times of one contender, as they go into the JSON."""
    return {"median": median(seconds), "least": min(seconds), "most": max(seconds), "seconds": list(seconds)}


def verdict(found: Mapping[str, Any], form: str, text: str | None = None) -> str:
    """A cell of a table: the number, its target, and whether it is met."""
    if found["value"] is None:
        return "–"
    shown = text if text is not None else form.format(found["value"])
    if found["target"] is not None:
        shown += f" ({'≥' if found['relation'] == '>=' else '≤'} {found['target']:g})"
    return shown + {True: " [green]met[/]", False: " [red]missed[/]", None: ""}[found["met"]]


def seconds_text(times: Mapping[str, Any] | None) -> str:
    """A cell of a table: the median."""
    return "–" if times is None else f"{times['median']:.3f} s"


def rounds_text(number: int) -> str:
    """So many rounds, in words."""
    return f"{number} round{'' if number == 1 else 's'}"


def conclusion(results: Mapping[str, Any]) -> str:
    """Which targets are missed, in a sentence."""
    if not results["judged"]:
        return f"The targets are for --scale {FULL_SCALE:g} and at least {FEWEST_ROUNDS} rounds; this run is held against none."
    missed = [f"{case['title']}: {found['what']}" for case in results["cases"] for found in case["checks"] if found["met"] is False]
    return "Every target is met." if not missed else "Missed: " + "; ".join(missed) + "."
