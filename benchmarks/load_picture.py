"""The results of the loading benchmark as a picture: one panel per case, one bar per contender, one dot per load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.load_ranks import DCP, RESHARD, VERIFIED
from benchmarks.load_results import rounds_text

INK, FAINT, GRID = "#1f2430", "#8a90a0", "#e6e8ee"
MET, MISSED = "#14674c", "#d1334a"

# Contenders from top to bottom, their names and colours.
CONTENDERS = (
    (DCP, "DCP", "#c9cdd8"),
    (RESHARD, "reshard", "#4f7fe0"),
    (VERIFIED, "reshard, verifying", "#9db7ee"),
    ("copy_read", "plain copy, read", "#f2a154"),
    ("copy_mapped", "plain copy, mapped", "#f2a154"),
    ("copy_buffered", "plain copy, through a buffer", "#f6c793"),
)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results to a PNG."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK})
    cases = results["cases"]
    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.03, wspace=0.01)
    figure = Figure(figsize=(12.5, 1.4 + 2.25 * len(cases)), layout=spacing, facecolor="white")
    axes = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(3.3, 1))
    for (bars, facts), case in zip(axes, cases, strict=True):
        _bars(bars, case)
        _facts(facts, case)
    axes[-1][0].set_xlabel("seconds: less is better. Bars are medians of repeated loads, dots the loads; each panel has its own scale")
    machine, settings = results["machine"], results["settings"]
    figure.suptitle("Loading a checkpoint into four ranks", fontsize=16, fontweight="bold", x=0.02, ha="left")
    figure.supxlabel(
        f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}, {rounds_text(settings['rounds'])}, "
        f"--scale {settings['scale']:g}, {results['began'][:10]}"
        + ("" if results["judged"] else ". Too small a run to be held against the targets"),
        fontsize=8.5,
        color=FAINT,
        x=0.02,
        ha="left",
    )
    figure.savefig(path, dpi=130)


def _bars(axis: Axes, case: Mapping[str, Any]) -> None:
    times = case["repeated"]
    drawn = [(times[name], label, colour) for name, label, colour in CONTENDERS if name in times]
    if DCP not in times and DCP in case["first"]:
        drawn.insert(0, (case["first"][DCP], "DCP, first load", CONTENDERS[0][2]))
    longest = max(entry["most"] for entry, _, _ in drawn)
    for place, (entry, _, colour) in enumerate(drawn):
        axis.barh(-place, entry["median"], height=0.66, color=colour, zorder=2)
        dots = [-place] * len(entry["seconds"])
        axis.plot(entry["seconds"], dots, "o", color=INK, markersize=2.8, alpha=0.45, markeredgewidth=0, zorder=3)
        axis.text(max(entry["most"], entry["median"]) + 0.012 * longest, -place, _seconds(entry["median"]), va="center", fontsize=9.5)
    axis.set_yticks([-place for place in range(len(drawn))], [label for _, label, _ in drawn])
    axis.set_xlim(0, longest * 1.1)
    axis.set_ylim(-len(drawn) + 0.4, 0.6)
    axis.set_title(case["title"], loc="left", fontsize=12, fontweight="bold")
    what = f"{case['saved']} → {case['loaded']}, {case['tensors']:,} tensors, {_bytes(case['moved_bytes'])} move"
    axis.set_title(what, loc="right", fontsize=9, color=FAINT)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _facts(axis: Axes, case: Mapping[str, Any]) -> None:
    """The two ratios that count, and below them what else there is to know."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    over_dcp, over_copy = case["checks"][:2]
    _ratio(axis, 0.86, over_dcp, "× as fast as DCP")
    _ratio(axis, 0.55, over_copy, "× the plain copy's time")
    first, memory = case["first"], case["peak_memory"]
    lines = ["first load: " + ", ".join(f"{label} {_seconds(first[name]['median'])}" for name, label, _ in CONTENDERS if name in first)]
    if case["dcp"]["stopped_after"] is not None:
        lines.append(f"DCP was stopped after {case['dcp']['stopped_after']:.0f} s")
    if memory[RESHARD] is not None:
        lines.append(f"memory above the state: {memory[RESHARD] / 2**20:.0f} MiB of {memory['limit'] / 2**20:.0f}")
    axis.text(0.0, 0.27, "\n".join(lines), va="top", fontsize=8.5, color=FAINT, linespacing=1.5)


def _ratio(axis: Axes, height: float, check: Mapping[str, Any], text: str) -> None:
    if check["value"] is None:
        return
    colour = {True: MET, False: MISSED, None: INK}[check["met"]]
    shown = f"{check['value']:.2f}" if check["value"] < 100 else f"{check['value']:.0f}"
    axis.text(0.23, height, shown, ha="right", va="center", fontsize=15, color=colour)
    if check["target"] is None:
        target = "no target"
    else:
        target = f"target: at {'least' if check['relation'] == '>=' else 'most'} {check['target']:g}"
        target += {True: ", met", False: ", missed", None: ""}[check["met"]]
    axis.text(0.27, height + 0.065, text, va="center", fontsize=9.5)
    axis.text(0.27, height - 0.065, target, va="center", fontsize=8.5, color=colour if check["met"] is not None else FAINT)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _bytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e8 else f"{number / 1e6:.3g} MB"
