"""The results of the saving benchmark as a picture: one panel per case, one bar per contender, one dot per save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.drawing import (
    COPY_COLOUR,
    DCP_COLOUR,
    GRID,
    OUR_COLOUR,
    bars,
    bytes_text,
    duration_text,
    facts_axis,
    figure_of,
    finish,
    head,
    notes,
    ratio,
)
from benchmarks.save_cases import DCP, DCP_ASYNC, MEMCPY, NO_SAVE, WRITE
from benchmarks.save_results import IN_TRAINING, NAMES

_COLOURS = {DCP: DCP_COLOUR, DCP_ASYNC: DCP_COLOUR, WRITE: COPY_COLOUR, MEMCPY: COPY_COLOUR, NO_SAVE: COPY_COLOUR}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results to a PNG."""
    cases = results["cases"]
    figure = figure_of(1.4 + sum(_height(case) for case in cases))
    axes = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(2.3, 1), height_ratios=[_height(case) for case in cases])
    for (panel, facts), case in zip(axes, cases, strict=True):
        if case["kind"] == "endless":
            _growth(panel, case)
        elif case["kind"] == "training":
            drawn = [(case["repeated"][name], label, _COLOURS.get(name, OUR_COLOUR)) for name, label in IN_TRAINING.items()]
            bars(panel, drawn, case["title"], f"FSDP over the ranks, width {case['width']}, {case['directory']}")
            panel.set_xlabel(f"seconds for {case['tokens']:,} tokens: medians, a dot for each turn")
        else:
            drawn = [(case["repeated"][name], NAMES[name], _COLOURS.get(name, OUR_COLOUR)) for name in NAMES if name in case["repeated"]]
            bars(panel, drawn, case["title"], f"{case['tensors']:,} tensors, {bytes_text(case['unique_bytes'])}, {case['directory']}")
            panel.set_xlabel(
                "seconds: medians of repeated saves, a dot for each" + (" (the slowest rank)" if case["kind"] == "stall" else "")
            )
        _facts(facts, case)
    finish(figure, results, "Saving a checkpoint from four ranks", path)


def _height(case: Mapping[str, Any]) -> float:
    """Inches."""
    return max(2.3, 0.45 * len(case.get("repeated", ())) + 0.6, 0.7 * len(case["checks"]) + 0.5)


def _growth(axis: Axes, case: Mapping[str, Any]) -> None:
    for rank, anonymous in enumerate(case["anonymous"]):
        saves = range(case["saves"][1] - len(anonymous) + 1, case["saves"][1] + 1)
        axis.plot(saves, [nbytes / 1e6 for nbytes in anonymous], color=OUR_COLOUR, alpha=0.35 + 0.15 * rank, linewidth=1.5)
    axis.axvline(case["saves"][0], color=COPY_COLOUR, linewidth=1)
    head(axis, case["title"], f"asynchronous, redundancy removed, {bytes_text(case['unique_bytes'])} each")
    axis.set_xlabel("saves; growth counts from the line on")
    axis.set_ylabel("MB, anonymous")
    axis.grid(axis="y", color=GRID, linewidth=0.8)


def _facts(axis: Axes, case: Mapping[str, Any]) -> None:
    facts_axis(axis)
    step = 0.84 / len(case["checks"])
    for place, found in enumerate(case["checks"]):
        ratio(axis, 0.9 - step * place, found, found["what"], apart=0.15 / _height(case))
    firsts = case.get("first", {})
    if firsts:
        notes(axis, 0.04, ["first: " + ", ".join(duration_text(firsts[name]["median"]) for name in NAMES if name in firsts)])
