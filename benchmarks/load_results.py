"""From samples to results: medians, what they are held against, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.judging import check, conclusion, rounds_text, seconds_text, spread, verdict
from benchmarks.load_cases import MOST_COVERED, Case, memory_limit
from benchmarks.load_ranks import DCP, RESHARD, VERIFIED, Sample
from benchmarks.states import moved_bytes, unique_bytes

Loads = list[list[Sample]]
"""Loads one after the other, each as all ranks saw it."""

COPY_NAMES = {"copy_read": "read", "copy_mapped": "mapped", "copy_buffered": "buffered"}

# The limit is the fastest of these; the copy through a buffer is reported beside it.
LIMITS = ("copy_read", "copy_mapped")


def summarize(
    case: Case, *, scale: float, judged: bool, first: Loads, repeated: Loads, unfinished: float | None = None, estimate: float | None = None
) -> dict[str, Any]:
    """The results of a case, as they go into the JSON.

    Args:
        case: what was measured.
        scale: of its state.
        judged: whether the targets hold.
        first: loads of DCP and reshard, each in fresh ranks.
        repeated: loads by turns, all in the same ranks.
        unfinished: the seconds after which DCP was stopped, None when it came to an end.
        estimate: what it would take by proportion, when it was stopped.
    """
    tensors = case.tensors(scale)
    times = _times(repeated)
    first_times = _times(first)
    limit = min((name for name in LIMITS if name in times), key=lambda name: times[name]["median"])
    read = [sample.report for load in repeated for sample in load if sample.contender == RESHARD]
    memory = {name: _peak(first, name) for name in (DCP, RESHARD)}
    checks = [
        check("DCP's time ÷ ours", _over_dcp(times, first_times, estimate), ">=", case.least_over_dcp, judged),
        check("our time ÷ plain copy", times[RESHARD]["median"] / times[limit]["median"], "<=", case.most_over_copy, judged),
        check("bytes read ÷ bytes needed", read[0]["bytes_read"] / max(1, read[0]["bytes_needed"]), "<=", MOST_COVERED, judged),
        check("peak memory above the state", memory[RESHARD], "<=", memory_limit(len(tensors)), judged),
    ]
    return {
        "name": case.name,
        "title": case.title_of(tensors),
        "saved": case.saved.title,
        "loaded": case.loaded.title,
        "tensors": len(tensors),
        "unique_bytes": unique_bytes(tensors),
        "moved_bytes": moved_bytes(tensors, case.loaded),
        "repeated": times,
        "first": first_times,
        "copy": {"fastest": limit, "median": times[limit]["median"]},
        "dcp": {"stopped_after": unfinished, "estimate": estimate},
        "reshard": {
            "bytes_needed": read[0]["bytes_needed"],
            "bytes_read": read[0]["bytes_read"],
            "bytes_verified": _verified(repeated),
            "bytes_of_pages": read[0]["bytes_of_pages"],
            "phases": _phases([facts["phases"] for facts in read]),
        },
        "peak_memory": {**memory, "limit": memory_limit(len(tensors))},
        "checks": checks,
    }


def _verified(loads: Loads) -> int | None:
    """The bytes that a verifying load held against digests."""
    return next((load[0].report["bytes_verified"] for load in loads if load[0].contender == VERIFIED), None)


def _over_dcp(repeated: Mapping[str, Any], first: Mapping[str, Any], estimate: float | None) -> float | None:
    """DCP's time ÷ ours, of repeated loads; where DCP is too slow for those, of first loads, and in the end of what it would take."""
    for times in (repeated, first):
        if DCP in times:
            return times[DCP]["median"] / times[RESHARD]["median"]
    return None if estimate is None else estimate / first[RESHARD]["median"]


def _times(loads: Loads) -> dict[str, dict[str, Any]]:
    """By contender: the seconds from the first rank's begin to the last one's end, in the order of the loads."""
    seconds: dict[str, list[float]] = {}
    for load in loads:
        seconds.setdefault(load[0].contender, []).append(max(s.end for s in load) - min(s.begin for s in load))
    return {name: spread(taken) for name, taken in seconds.items()}


def _peak(loads: Loads, contender: str) -> int | None:
    peaks = [sample.peak for load in loads for sample in load if sample.contender == contender and sample.peak is not None]
    return max(peaks, default=None)


def _phases(loads: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """For each phase the median over the loads of its slowest rank."""
    names = {name: None for load in loads for rank in load for name in rank}
    return {name: median(max(rank.get(name, 0.0) for rank in load) for load in loads) for name in names}


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    repeated = Table(title="Repeated loads: medians of " + rounds_text(results["settings"]["rounds"]), title_justify="left")
    for column in ("case", "DCP", "reshard", "verifying", "plain copy", "buffered copy", "DCP ÷ ours", "ours ÷ copy", "read ÷ needed"):
        repeated.add_column(column, justify="left" if column == "case" else "right")
    first = Table(title="First loads in fresh ranks, and the most memory that a rank took above the loaded state", title_justify="left")
    for column in ("case", "DCP", "reshard", "DCP ÷ ours", "memory of DCP", "memory of reshard", "at most"):
        first.add_column(column, justify="left" if column == "case" else "right")
    for case in results["cases"]:
        over_dcp, over_copy, covered, memory = case["checks"]
        times, starts = case["repeated"], case["first"]
        buffered = times.get("copy_buffered")
        repeated.add_row(
            case["title"],
            seconds_text(times.get(DCP)),
            seconds_text(times[RESHARD]),
            _verifying(times, case["reshard"]),
            f"{seconds_text(times[case['copy']['fastest']])} ({COPY_NAMES[case['copy']['fastest']]})",
            seconds_text(buffered),
            verdict(over_dcp, "{:.2f}"),
            verdict(over_copy, "{:.2f}"),
            verdict(covered, "{:.3f}") + _pages(case["reshard"]),
        )
        dcp = case["dcp"]
        stopped = f"over {dcp['stopped_after']:.0f} s" if dcp["stopped_after"] is not None else seconds_text(starts.get(DCP))
        if dcp["stopped_after"] is not None and dcp["estimate"] is not None:
            stopped += f", some {dcp['estimate']:.0f} s by proportion"
        ratio = starts[DCP]["median"] / starts[RESHARD]["median"] if DCP in starts else None
        peaks = case["peak_memory"]
        first.add_row(
            case["title"],
            stopped,
            seconds_text(starts[RESHARD]),
            "–" if ratio is None else f"{ratio:.2f}",
            _mebibytes(peaks[DCP]),
            verdict({**memory, "target": None}, "{}", _mebibytes(memory["value"])),
            _mebibytes(peaks["limit"]),
        )
    console.print(repeated)
    console.print(first)
    console.print(conclusion(results))


def _verifying(times: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The time of a load that verifies, against that of one that doesn't, and the part of the bytes that it verifies."""
    if VERIFIED not in times:
        return "–"
    ratio = times[VERIFIED]["median"] / times[RESHARD]["median"]
    return f"{seconds_text(times[VERIFIED])} (× {ratio:.2f}; {facts['bytes_verified'] / max(1, facts['bytes_read']):.0%} verified)"


def _pages(facts: Mapping[str, Any]) -> str:
    """What of the bytes was copied out of mapped files lies on pages, which were touched whole."""
    return f"; mapped pages {facts['bytes_of_pages'] / 1e9:.2f} GB" if facts["bytes_of_pages"] else ""


def _mebibytes(nbytes: int | None) -> str:
    return "–" if nbytes is None else f"{nbytes / 2**20:.0f} MiB"
