"""Saving, measured: torch's distributed checkpoints (DCP), reshard, and the limits, which are a plain write and a copy in memory, by turns.

`make bench-save` runs it. Four gloo ranks; states of float32. Checkpoints are loaded and compared, outside the measured time.
`docs/benchmarks.md` says how to read what comes out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import save_ranks, save_stalls, save_training
from benchmarks.judging import FEWEST_ROUNDS, FULL_SCALE, is_judged, rounds_text
from benchmarks.machine import REPOSITORY, describe_machine
from benchmarks.running import PATIENCE_SECONDS, Say, clock, conclude, fresh_ranks, positive, scratch, turned
from benchmarks.save_cases import CASES, MOMENTS, SAVES, SAVES_BEFORE, SaveCase
from benchmarks.save_picture import draw
from benchmarks.save_results import show, summarize, summarize_endless, summarize_training
from benchmarks.states import WORLD_SIZE, unique_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code, 0 whatever the times are."""
    options = _parser().parse_args(arguments)
    say = clock()
    results: dict[str, Any] = {
        "benchmark": "save",
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "rounds": options.rounds,
            "scale": options.scale,
            "saves": options.saves,
            "ranks": WORLD_SIZE,
            "directory": str(options.directory),
            "disk": str(options.disk),
        },
        "judged": is_judged(options.scale, options.rounds),
        "machine": describe_machine(),
        "cases": [],
    }
    for case in CASES:
        if case.name in options.cases:
            results["cases"].append(_measure(case, options, say))
    conclude(results, options.output, draw, show, say, width=160)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save", description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--rounds", type=positive(int), default=FEWEST_ROUNDS, help="repeated saves of each (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help=f"default: {' '.join(names)}")
    parser.add_argument("--scale", type=positive(float), default=FULL_SCALE, help="the states' sizes, as a part of the full ones")
    parser.add_argument("--saves", type=positive(int), default=SAVES, help="saves of the case `endless` (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/bench/save.json"), help="the JSON; the picture goes beside it")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where checkpoints lie in memory (default: %(default)s)")
    parser.add_argument("--disk", type=Path, default=REPOSITORY, help="where those of the case `disk` do (default: %(default)s)")
    return parser


def _measure(case: SaveCase, options: argparse.Namespace, say: Say) -> dict[str, Any]:
    parent = options.disk if case.on_disk else options.directory
    tensors = case.tensors(options.scale)
    nbytes = unique_bytes(tensors) * (1 if case.kind == "sync" else MOMENTS)
    judged = is_judged(options.scale, options.rounds)
    with scratch(parent) as directory, fresh_ranks() as pool:
        if case.kind == "endless":
            say(f"{case.title}: {options.saves}")
            by_rank = pool.run(save_stalls.endless, directory, options.saves, tensors, timeout=PATIENCE_SECONDS)
            # The first saves bring what stays: the same part of fewer saves, where there are fewer.
            before = max(1, options.saves * SAVES_BEFORE // SAVES)
            return summarize_endless(case, tensors, nbytes, by_rank, before, judged=judged and options.saves >= SAVES)
        # One round before: everybody's first save, which is reported apart.
        order = [name for number in range(options.rounds + 1) for name in turned(case.contenders, number)]
        if case.kind == "training":
            say(f"{case.title}: {rounds_text(options.rounds)} of {', '.join(case.contenders)}")
            width = save_training.width_of(options.scale)
            by_rank = pool.run(save_training.train, directory, order, width, timeout=PATIENCE_SECONDS)
            saves = [list(save) for save in zip(*by_rank, strict=True)]
            return summarize_training(case, width, saves[len(case.contenders) :], save_training.tokens(WORLD_SIZE), str(parent))
        say(f"{case.title.format(tensors=f'{len(tensors):,}')}: {rounds_text(options.rounds)} of {', '.join(case.contenders)}")
        if case.kind == "stall":
            by_rank = pool.run(save_stalls.stall, directory, order, tensors, timeout=PATIENCE_SECONDS)
        else:
            by_rank = pool.run(save_ranks.save, directory, order, tensors, case.is_fresh, timeout=PATIENCE_SECONDS)
    saves = [list(save) for save in zip(*by_rank, strict=True)]
    count = len(case.contenders)
    return summarize(case, tensors, nbytes, judged=judged, first=saves[:count], repeated=saves[count:], where=str(parent))


if __name__ == "__main__":
    sys.exit(main())
