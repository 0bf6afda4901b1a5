"""The results of the loading benchmark as a picture: one panel per case, one bar per contender, one dot per load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.drawing import (
    COPY_COLOUR,
    DCP_COLOUR,
    FAINTER_COLOUR,
    FAINTER_COPY,
    OUR_COLOUR,
    bars,
    bytes_text,
    duration_text,
    facts_axis,
    figure_of,
    finish,
    notes,
    ratio,
)
from benchmarks.load_ranks import DCP, RESHARD, VERIFIED

# Contenders from top to bottom, their names and colours.
CONTENDERS = (
    (DCP, "DCP", DCP_COLOUR),
    (RESHARD, "reshard", OUR_COLOUR),
    (VERIFIED, "reshard, verifying", FAINTER_COLOUR),
    ("copy_read", "plain copy, read", COPY_COLOUR),
    ("copy_mapped", "plain copy, mapped", COPY_COLOUR),
    ("copy_buffered", "plain copy, through a buffer", FAINTER_COPY),
)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results to a PNG."""
    cases = results["cases"]
    figure = figure_of(1.4 + 2.25 * len(cases))
    axes = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(3.3, 1))
    for (times, facts), case in zip(axes, cases, strict=True):
        _bars(times, case)
        _facts(facts, case)
    axes[-1][0].set_xlabel("seconds: less is better. Bars are medians of repeated loads, dots the loads; each panel has its own scale")
    finish(figure, results, "Loading a checkpoint into four ranks", path)


def _bars(axis: Axes, case: Mapping[str, Any]) -> None:
    times = case["repeated"]
    drawn = [(times[name], label, colour) for name, label, colour in CONTENDERS if name in times]
    if DCP not in times and DCP in case["first"]:
        drawn.insert(0, (case["first"][DCP], "DCP, first load", CONTENDERS[0][2]))
    what = f"{case['saved']} → {case['loaded']}, {case['tensors']:,} tensors, {bytes_text(case['moved_bytes'])} move"
    bars(axis, drawn, case["title"], what)


def _facts(axis: Axes, case: Mapping[str, Any]) -> None:
    """The two ratios that count, and below them what else there is to know."""
    facts_axis(axis)
    over_dcp, over_copy = case["checks"][:2]
    ratio(axis, 0.86, over_dcp, "× as fast as DCP")
    ratio(axis, 0.55, over_copy, "× the plain copy's time")
    first, memory = case["first"], case["peak_memory"]
    lines = [
        "first load: " + ", ".join(f"{label} {duration_text(first[name]['median'])}" for name, label, _ in CONTENDERS if name in first)
    ]
    if case["dcp"]["stopped_after"] is not None:
        lines.append(f"DCP was stopped after {case['dcp']['stopped_after']:.0f} s")
    if memory[RESHARD] is not None:
        lines.append(f"memory above the state: {memory[RESHARD] / 2**20:.0f} MiB of {memory['limit'] / 2**20:.0f}")
    notes(axis, 0.27, lines)
