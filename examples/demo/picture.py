"""One picture of all runs: losses, what was started and killed when, and how far the losses are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from compare import deviations, losses_of, segments_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from runs import Run

INK, FAINT, GRID = "#1f2430", "#8a90a0", "#e6e8ee"
REFERENCE = "#c9cdd8"
COLOURS = ("#4f7fe0", "#f2a154", "#14674c", "#b05fc4")
# Curves that lie on each other stay visible when each is narrower than the one below.
WIDTHS = (6.0, 4.2, 1.7, 0.8)
REFERENCE_WIDTH = 10.0
SIZES = (6.5, 5.0, 3.0, 1.6)
KILL = "#d1334a"

# Below this a float32 loss can't be told from its neighbour; exact zeros are drawn there.
FLOOR = 1e-8
LIMIT = 1e-4


HEADING = "One training run, killed and resumed under other strategies"


def draw(groups: Sequence[tuple[str, Run, Sequence[Run]]], path: Path, heading: str = HEADING) -> None:
    """Draw the runs.

    Args:
        groups: for each column its title, the reference and the runs beside it.
        path: where the PNG goes.
        heading: of the whole picture.
    """
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK})
    figure = Figure(figsize=(14, 9.4), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.08, hspace=0.04)
    lanes = max(1 + len(runs) for _, _, runs in groups)
    axes = figure.subplots(3, len(groups), sharex="col", squeeze=False, height_ratios=(5, 0.55 * lanes + 0.6, 2.6))
    for column, (title, reference, runs) in enumerate(groups):
        _losses(axes[0][column], title, reference, runs)
        _lanes(axes[1][column], reference, runs)
        _deviations(axes[2][column], reference, runs)
        for row in range(3):
            _dress(axes[row][column], last=max(losses_of(reference)))
    axes[0][0].set_ylabel("loss (nats per byte)")
    axes[2][0].set_ylabel("relative deviation\nfrom the reference")
    figure.suptitle(heading, fontsize=16, fontweight="bold", x=0.02, ha="left")
    marks = [
        Line2D([], [], color=REFERENCE, linewidth=6, label="reference, uninterrupted"),
        Line2D([], [], color=KILL, marker="X", linestyle="none", markersize=9, label="all ranks killed by SIGKILL"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="none", markersize=8, label="resumed from a checkpoint"),
        Line2D([], [], color=INK, marker="|", linestyle="none", markersize=9, label="checkpoint saved"),
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=4, frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)


def _losses(axis: Axes, title: str, reference: Run, runs: Sequence[Run]) -> None:
    losses = losses_of(reference)
    axis.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    axis.plot(list(losses), list(losses.values()), color=REFERENCE, linewidth=REFERENCE_WIDTH, solid_capstyle="round", zorder=1)
    for run, colour, width in zip(runs, COLOURS, WIDTHS if len(runs) > 1 else WIDTHS[1:], strict=False):
        for number, segment in enumerate(segments_of(run)):
            steps = [metrics.step for metrics in segment.steps]
            values = [metrics.loss for metrics in segment.steps]
            axis.plot(steps, values, color=colour, linewidth=width, solid_capstyle="round", zorder=3)
            resumed = segment.start["resumed_from"]
            if resumed is not None:
                axis.plot(resumed, losses[resumed], "o", color=INK, markerfacecolor="white", markersize=8, markeredgewidth=1.6, zorder=5)
            if number < len(run.kills):
                axis.plot(steps[-1], values[-1], "X", color=KILL, markersize=11, markeredgecolor="white", zorder=6)
    fall = 1 - losses[max(losses)] / losses[min(losses)]
    axis.text(0.98, 0.95, f"the loss falls by {fall:.0%}", transform=axis.transAxes, ha="right", va="top", color=FAINT)


def _lanes(axis: Axes, reference: Run, runs: Sequence[Run]) -> None:
    labels = []
    for lane, (run, colour) in enumerate(zip((reference, *runs), (REFERENCE, *COLOURS), strict=False)):
        segments = segments_of(run)
        place = -lane
        start = segments[-1].start
        ranks = start["ranks"]
        labels.append(f"{run.name}\n{ranks} rank{'s' if ranks > 1 else ''}" + (f" · {start['strategy']}" if ranks > 1 else ""))
        for number, segment in enumerate(segments):
            first, last = (segment.start["resumed_from"] or 0), segment.steps[-1].step
            # A part that repeats steps lies a little lower than the one before.
            height = place - 0.18 * (number - (len(segments) - 1) / 2)
            axis.plot([first, last], [height, height], color=colour, linewidth=4, solid_capstyle="butt", zorder=2)
            saves = [event["step"] for event in segment.events if event["event"] == "save"]
            axis.plot(saves, [height] * len(saves), "|", color=INK, markersize=7, markeredgewidth=1, zorder=3)
            if segment.start["resumed_from"] is not None:
                axis.plot(first, height, "o", color=INK, markerfacecolor="white", markersize=6.5, markeredgewidth=1.4, zorder=5)
            if number < len(run.kills):
                axis.plot(last, height, "X", color=KILL, markersize=9, markeredgecolor="white", zorder=6)
                if run.kills[number]["saving"]:
                    axis.annotate(
                        "during a save", (last, height), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=KILL
                    )
    axis.set_ylim(-len(labels) + 0.45, 0.55)
    axis.set_yticks([-lane for lane in range(len(labels))], labels, fontsize=8.5)
    axis.tick_params(axis="y", length=0)


def _deviations(axis: Axes, reference: Run, runs: Sequence[Run]) -> None:
    losses = losses_of(reference)
    for run, colour, size in zip(runs, COLOURS, SIZES, strict=False):
        for segment in segments_of(run):
            points = list(deviations(segment, losses))
            exact = [step for step, deviation in points if deviation == 0]
            other = [(step, deviation) for step, deviation in points if deviation > 0]
            axis.plot(exact, [FLOOR] * len(exact), "s", color=colour, markersize=size, zorder=3, clip_on=False)
            if other:
                axis.plot(*zip(*other, strict=True), "o", color=colour, markersize=size, zorder=4)
    axis.set_yscale("log")
    axis.set_ylim(FLOOR, LIMIT * 3)
    axis.axhline(LIMIT, color=KILL, linewidth=1, linestyle=(0, (4, 3)))
    axis.text(
        0.99,
        LIMIT * 0.75,
        "allowed under another strategy",
        transform=axis.get_yaxis_transform(),
        ha="right",
        va="top",
        fontsize=8.5,
        color=KILL,
    )
    axis.set_yticks([FLOOR, 1e-7, 1e-6, 1e-5, 1e-4], ["identical", r"$10^{-7}$", r"$10^{-6}$", r"$10^{-5}$", r"$10^{-4}$"])
    axis.minorticks_off()
    axis.set_xlabel("step")


def _dress(axis: Axes, last: int) -> None:
    axis.set_xlim(0, last + 1)
    axis.set_facecolor("white")
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=FAINT, labelcolor=INK)
