"""Loading, measured: torch's distributed checkpoints (DCP), reshard, and a plain copy of the same bytes, by turns.

`make bench-load` runs it. Four gloo ranks; states of float32; checkpoints in memory (tmpfs), so that no disk hides what the libraries do.
Every loaded byte is checked, outside the measured time. `docs/benchmarks.md` says how to read what comes out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import load_ranks
from benchmarks.judging import FEWEST_ROUNDS, FULL_SCALE, is_judged, rounds_text
from benchmarks.load_cases import CASES, DCP_LIMIT_SECONDS, Case
from benchmarks.load_picture import draw
from benchmarks.load_ranks import COPIES, DCP, RESHARD, VERIFIED
from benchmarks.load_results import Loads, show, summarize
from benchmarks.machine import describe_machine
from benchmarks.running import PATIENCE_SECONDS, Say, clock, conclude, fresh_ranks, positive, scratch, turned, within
from benchmarks.states import WORLD_SIZE, TensorSpec

# First loads of each library, each in ranks of their own.
MOST_FIRST_LOADS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code, 0 whatever the times are."""
    options = _parser().parse_args(arguments)
    say = clock()
    chosen = [case for case in CASES if case.name in options.cases or (case.is_large and options.large)]
    judged = is_judged(options.scale, options.rounds)
    results: dict[str, Any] = {
        "benchmark": "load",
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "rounds": options.rounds,
            "scale": options.scale,
            "ranks": WORLD_SIZE,
            "directory": str(options.directory),
            "dcp_limit": options.dcp_limit,
        },
        "judged": judged,
        "machine": describe_machine(),
        "cases": [],
    }
    with scratch(options.directory) as directory:
        bench = _Bench(directory, options.rounds, options.scale, options.dcp_limit, say)
        for number, case in enumerate(chosen):
            results["cases"].append(bench.measure(case, judged=judged, results=results["cases"]))
            if all(later.state != case.state for later in chosen[number + 1 :]):
                shutil.rmtree(directory / case.state)
    conclude(results, options.output, draw, show, say, width=190)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    usual = [case.name for case in CASES if not case.is_large]
    parser.add_argument("--rounds", type=positive(int), default=FEWEST_ROUNDS, help="repeated loads of each (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=usual, help=f"default: {' '.join(usual)}")
    parser.add_argument("--large", action="store_true", help="the case of 100,000 tensors, too; it takes long")
    parser.add_argument("--scale", type=positive(float), default=FULL_SCALE, help="the states' sizes, as a part of the full ones")
    parser.add_argument("--output", type=Path, default=Path("output/bench/load.json"), help="the JSON; the picture goes beside it")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where checkpoints lie meanwhile (default: %(default)s)")
    parser.add_argument(
        "--dcp-limit", type=positive(float), default=DCP_LIMIT_SECONDS, help="seconds after which DCP's load of the large case is stopped"
    )
    return parser


class _Bench:
    """Saves what cases need, and measures them."""

    def __init__(self, directory: Path, rounds: int, scale: float, dcp_limit: float, say: Say) -> None:
        self._directory = directory
        self._rounds = rounds
        self._scale = scale
        self._dcp_limit = dcp_limit
        self._say = say

    def measure(self, case: Case, *, judged: bool, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Measure a case; `results` are those of the cases before."""
        tensors = case.tensors(self._scale)
        self._say(f"{case.title_of(tensors)}: saved as {case.saved.title}, loaded as {case.loaded.title}")
        has_dcp, expected = self._prepare(case, tensors)
        first: Loads = []
        for number in range(1 if case.is_large else min(MOST_FIRST_LOADS, self._rounds)):
            for name in (DCP, RESHARD) if has_dcp else (RESHARD,):
                self._say(f"first load {number + 1} of {name}")
                loads = self._load(case, tensors, [name], expected, self._limit(case, name))
                has_dcp = has_dcp and loads is not None
                first += loads or []
        contenders = [*(() if case.is_large else (DCP,)), RESHARD, VERIFIED, *COPIES]
        self._say(f"{rounds_text(self._rounds)} of {', '.join(contenders)}")
        # One round before, which isn't counted: nobody's first load is among the repeated ones.
        order = [name for number in range(self._rounds + 1) for name in turned(contenders, number)]
        repeated = self._load(case, tensors, order, expected, PATIENCE_SECONDS)
        assert repeated is not None  # patience doesn't end in None
        return summarize(
            case,
            scale=self._scale,
            judged=judged,
            first=first,
            repeated=repeated[len(contenders) :],
            unfinished=None if has_dcp else self._dcp_limit,
            estimate=None if has_dcp else _by_proportion(len(tensors), results),
        )

    def _prepare(self, case: Case, tensors: Sequence[TensorSpec]) -> tuple[bool, list[list[bytes]]]:
        """Save a state with both libraries, unless an earlier case did; whether DCP came to an end, and what shards must hash to."""
        directory = self._directory / case.state
        directory.mkdir(exist_ok=True)
        has_dcp = True
        with fresh_ranks() as pool:
            for name in (RESHARD, DCP):
                if (directory / name).exists():
                    continue
                limit = self._limit(case, name)
                seconds = within(limit, pool, load_ranks.save, directory, name, tensors, case.saved)
                has_dcp = seconds is not None
                self._say(
                    f"{name}'s save was stopped after {limit:.0f} s" if seconds is None else f"saved by {name} in {max(seconds):.1f} s"
                )
            return has_dcp, pool.run(load_ranks.digests, tensors, case.loaded, timeout=PATIENCE_SECONDS)

    def _load(
        self, case: Case, tensors: Sequence[TensorSpec], order: Sequence[str], expected: Sequence[Sequence[bytes]], limit: float
    ) -> Loads | None:
        """Loads in fresh ranks, each as all ranks saw it; None when the limit is over."""
        with fresh_ranks() as pool:
            by_rank = within(limit, pool, load_ranks.load, self._directory / case.state, order, tensors, case.loaded, expected)
        return None if by_rank is None else [list(load) for load in zip(*by_rank, strict=True)]

    def _limit(self, case: Case, name: str) -> float:
        return self._dcp_limit if case.is_large and name == DCP else PATIENCE_SECONDS


def _by_proportion(tensors: int, results: Sequence[dict[str, Any]]) -> float | None:
    """What DCP would take for so many small tensors, if its time grew with their number only."""
    for case in results:
        if case["name"] == "small" and DCP in case["repeated"]:
            return case["repeated"][DCP]["median"] * tensors / case["tensors"]
    return None


if __name__ == "__main__":
    sys.exit(main())
