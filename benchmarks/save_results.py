"""From samples of saves to results: medians, what they are held against, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.judging import check, conclusion, rounds_text, seconds_text, spread, verdict
from benchmarks.save_cases import COPY, DCP, DCP_ASYNC, DEFERRED, IDLE, MEMCPY, MOST_GROWTH, NO_SAVE, RESHARD, WRITE, SaveCase
from benchmarks.save_ranks import SaveSample
from benchmarks.save_stalls import Residue
from benchmarks.states import TensorSpec

Saves = list[list[SaveSample]]
"""Saves one after the other, each as all ranks saw it."""

NAMES = {
    DCP: "DCP",
    RESHARD: "reshard",
    WRITE: "plain write",
    DCP_ASYNC: "DCP, async_save",
    COPY: "copy",
    DEFERRED: "deferred, step at once",
    IDLE: "deferred, idle step",
    MEMCPY: "copy in memory",
}

IN_TRAINING = {NO_SAVE: "no checkpoint", DEFERRED: "deferred", COPY: "copy", DCP_ASYNC: "DCP, async_save"}


def summarize(
    case: SaveCase, tensors: Sequence[TensorSpec], nbytes: int, *, judged: bool, first: Saves, repeated: Saves, where: str
) -> dict[str, Any]:
    """The results of whole saves or of stalls, as they go into the JSON.

    Args:
        case: what was measured.
        tensors: of its state.
        nbytes: the state's, each element once.
        judged: whether the targets hold.
        first: the first save of each contender.
        repeated: those that follow, by turns.
        where: the directory.
    """
    taken = _held if case.kind == "stall" else _lasted
    times, cpu = _times(repeated, taken), _times(repeated, _cpu)
    checks = [
        check(f"{NAMES[ours]} ÷ {NAMES[limit]}", times[ours]["median"] / times[limit]["median"], "<=", target, judged)
        for ours, limit, target in case.targets
    ]
    return {
        "name": case.name,
        "title": case.title.format(tensors=f"{len(tensors):,}"),
        "kind": case.kind,
        "directory": where,
        "tensors": len(tensors),
        "unique_bytes": nbytes,
        "repeated": times,
        "first": _times(first, taken),
        "cpu": {name: entry["median"] for name, entry in cpu.items()},
        "checks": checks,
    }


def summarize_endless(
    case: SaveCase, tensors: Sequence[TensorSpec], nbytes: int, by_rank: Sequence[Sequence[Residue]], before: int, *, judged: bool
) -> dict[str, Any]:
    """The results of saves without end.

    Args:
        case: what was measured.
        tensors: of its state.
        nbytes: the state's, each element once.
        by_rank: what each rank held after each save.
        before: the number of the save from which on growth counts.
        judged: whether the targets hold.
    """
    counted = [[residue for residue in rank if residue.save >= before] for rank in by_rank]
    saves = max(1, counted[0][-1].save - counted[0][0].save)
    growth = [(rank[-1].anonymous - rank[0].anonymous) / saves for rank in counted]
    files = [max(residue.files for residue in rank) - min(residue.files for residue in rank) for rank in counted]
    threads = [max(residue.threads for residue in rank) - min(residue.threads for residue in rank) for rank in counted]
    return {
        "name": case.name,
        "title": case.title,
        "kind": case.kind,
        "tensors": len(tensors),
        "unique_bytes": nbytes,
        "saves": [counted[0][0].save, counted[0][-1].save],
        "anonymous": [[residue.anonymous for residue in rank] for rank in by_rank],
        "files": [rank[-1].files for rank in by_rank],
        "threads": [rank[-1].threads for rank in by_rank],
        "checks": [
            check("growth per save (bytes)", max(growth), "<=", MOST_GROWTH, judged),
            check("change of open files", max(files), "<=", 0, judged),
            check("change of threads", max(threads), "<=", 0, judged),
        ],
    }


def summarize_training(case: SaveCase, width: int, saves: Saves, tokens: int, where: str) -> dict[str, Any]:
    """The results of training.

    Args:
        case: what was measured.
        width: of the model.
        saves: the samples, by turns; the first ones left out.
        tokens: of a sample.
        where: the directory.
    """
    times = _times(saves, _lasted)
    rates = {name: tokens / entry["median"] for name, entry in times.items()}
    return {
        "name": case.name,
        "title": case.title,
        "kind": case.kind,
        "directory": where,
        "width": width,
        "tokens": tokens,
        "repeated": times,
        "tokens_per_second": rates,
        "cpu": {name: entry["median"] for name, entry in _times(saves, _cpu).items()},
        "checks": [
            check(f"{IN_TRAINING[name]} ÷ {IN_TRAINING[limit]}, tokens per second", rates[name] / rates[limit], ">=", target, False)
            for name, limit, target in case.targets
        ],
    }


def _lasted(save: Sequence[SaveSample]) -> float:
    """From the first rank's begin to the last one's end."""
    return max(sample.end for sample in save) - min(sample.begin for sample in save)


def _held(save: Sequence[SaveSample]) -> float:
    """What the slowest rank waited."""
    return max(sample.held for sample in save)


def _cpu(save: Sequence[SaveSample]) -> float:
    return sum(sample.cpu for sample in save)


def _times(saves: Saves, taken: Any) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {}
    for save in saves:
        seconds.setdefault(save[0].contender, []).append(taken(save))
    return {name: spread(found) for name, found in seconds.items()}


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    for case in results["cases"]:
        if case["kind"] == "endless":
            _show_endless(case, console)
            continue
        if case["kind"] == "training":
            _show_training(case, console)
            continue
        rounds = rounds_text(results["settings"]["rounds"])
        table = Table(title=f"{case['title']} ({case['directory']}): medians of {rounds}", title_justify="left")
        for column in ("", "seconds", "least", "most", "first", "CPU seconds of all ranks"):
            table.add_column(column, justify="right" if column else "left")
        for name, label in NAMES.items():
            times = case["repeated"].get(name)
            if times is not None:
                least, most = f"{times['least']:.3f} s", f"{times['most']:.3f} s"
                table.add_row(label, seconds_text(times), least, most, seconds_text(case["first"].get(name)), f"{case['cpu'][name]:.3f}")
        console.print(table)
        for found in case["checks"]:
            console.print(f"  {found['what']}: {verdict(found, '{:.3f}')}")
    console.print(conclusion(results))


def _show_training(case: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{case['title']} ({case['directory']})", title_justify="left")
    for column in ("", "tokens per second", "of no checkpoint's", "CPU seconds of all ranks"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in IN_TRAINING.items():
        rate = case["tokens_per_second"][name]
        part = rate / case["tokens_per_second"][NO_SAVE]
        table.add_row(label, f"{rate:,.0f}", f"{part:.1%}", f"{case['cpu'][name]:.3f}")
    console.print(table)


def _show_endless(case: Mapping[str, Any], console: Console) -> None:
    first, last = case["saves"]
    console.print(f"{case['title']}: saves {first} to {last}, asynchronous, redundancy removed")
    for found in case["checks"]:
        console.print(f"  {found['what']}: {verdict(found, '{:.0f}')}")
