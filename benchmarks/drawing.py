"""What the pictures of benchmarks share: bars of times with a dot per measurement, ratios, and what was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.judging import rounds_text

INK, FAINT, GRID = "#1f2430", "#8a90a0", "#e6e8ee"
MET, MISSED = "#14674c", "#d1334a"
DCP_COLOUR = "#c9cdd8"
OUR_COLOUR, FAINTER_COLOUR = "#4f7fe0", "#9db7ee"
COPY_COLOUR, FAINTER_COPY = "#f2a154", "#f6c793"


def figure_of(height: float) -> Figure:
    """A figure of this height (inches)."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK})
    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.03, wspace=0.01)
    return Figure(figsize=(12.5, height), layout=spacing, facecolor="white")


def finish(figure: Figure, results: Mapping[str, Any], title: str, path: Path) -> None:
    """Say what it is and what it was measured on, and write it as a PNG."""
    machine, settings = results["machine"], results["settings"]
    figure.suptitle(title, fontsize=16, fontweight="bold", x=0.02, ha="left")
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


def bars(axis: Axes, drawn: Sequence[tuple[Mapping[str, Any], str, str]], title: str, what: str) -> None:
    """A bar for each median, and a dot for each measurement.

    Args:
        axis: where.
        drawn: from top to bottom: times, as `judging.spread` gives them, a label, a colour.
        title: of the panel.
        what: what was measured.
    """
    longest = max(entry["most"] for entry, _, _ in drawn)
    for place, (entry, _, colour) in enumerate(drawn):
        axis.barh(-place, entry["median"], height=0.66, color=colour, zorder=2)
        dots = [-place] * len(entry["seconds"])
        axis.plot(entry["seconds"], dots, "o", color=INK, markersize=2.8, alpha=0.45, markeredgewidth=0, zorder=3)
        axis.text(max(entry["most"], entry["median"]) + 0.012 * longest, -place, duration_text(entry["median"]), va="center", fontsize=9.5)
    axis.set_yticks([-place for place in range(len(drawn))], [label for _, label, _ in drawn])
    axis.set_xlim(0, longest * 1.1)
    axis.set_ylim(-len(drawn) + 0.4, 0.6)
    head(axis, title, what)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def head(axis: Axes, title: str, what: str) -> None:
    """Title a panel."""
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axis.set_title(what, loc="right", fontsize=9, color=FAINT)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def facts_axis(axis: Axes) -> None:
    """Make a panel one for text; both its sides are 1 long."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)


def ratio(axis: Axes, height: float, check: Mapping[str, Any], text: str, apart: float = 0.065) -> None:
    """A number in large, what it is, and what it must be, in two lines that are so far `apart` from the height of the number."""
    if check["value"] is None:
        return
    colour = {True: MET, False: MISSED, None: INK}[check["met"]]
    shown = f"{check['value']:.3g}" if check["value"] < 1 else f"{check['value']:.2f}" if check["value"] < 100 else f"{check['value']:.0f}"
    axis.text(0.23, height, shown, ha="right", va="center", fontsize=15, color=colour)
    if check["target"] is None:
        target = "no target"
    else:
        target = f"target: at {'least' if check['relation'] == '>=' else 'most'} {check['target']:g}"
        target += {True: ", met", False: ", missed", None: ""}[check["met"]]
    axis.text(0.27, height + apart, text, va="center", fontsize=9.5)
    axis.text(0.27, height - apart, target, va="center", fontsize=8.5, color=colour if check["met"] is not None else FAINT)


def notes(axis: Axes, height: float, lines: Sequence[str]) -> None:
    """What else there is to know, from a height downwards."""
    axis.text(0.0, height, "\n".join(lines), va="top", fontsize=8.5, color=FAINT, linespacing=1.5)


def duration_text(value: float) -> str:
    """Seconds in words."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def bytes_text(number: float) -> str:
    """Bytes in words."""
    return f"{number / 1e9:.3g} GB" if number >= 1e8 else f"{number / 1e6:.3g} MB"
