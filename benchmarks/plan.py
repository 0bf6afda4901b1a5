"""Planning, measured: what a job of DeepSeek-V3's size costs before a byte of a tensor moves.

`make bench-plan` runs it, in one process and without a checkpoint: a catalog in memory stands for one. 671 billion parameters, every matrix
of an expert a tensor of its own, AdamW's two moments of each; 16,384 ranks. `docs/benchmarks.md` says what the numbers mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.deepseek import DeepSeek
from benchmarks.machine import describe_machine
from reshard.catalog import Catalog
from reshard.format.index import decode_index, digest_of, encode_index
from reshard.format.metadata import decode_metadata, encode_metadata
from reshard.planning.exchange_plan import plan_exchange
from reshard.planning.file_plan import plan_rank_files, plan_sole_files
from reshard.planning.forecast import forecast_balanced, forecast_direct, match_tensors
from reshard.planning.placement import Placement, lay_out
from reshard.planning.read_plan import plan_reads
from reshard.planning.strategy import parse_strategy
from reshard.planning.telling import decode_all, encode
from reshard.planning.write_plan import plan_catalog

T = TypeVar("T")

# Who saved, and who loads: 16,384 ranks each. The second one has other stages, other shares of the experts, and splits its parameters too.
SAVED = "dp=256,tp=4,pp=16,ep=64"
LOADED = "dp=16,fsdp=32,tp=4,pp=8,ep=128"

# What the numbers are held against, in seconds.
MOST_FOR_A_RANK, MOST_FOR_THE_INDEX = 2.0, 3.0

# A rank's plan is made for so many ranks, spread over all.
RANKS_TRIED = 16

MILLION = 10**6


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Attributes:
        name: what it is.
        seconds: the least of all rounds.
        peak: bytes of memory at the highest above what was there before, in the first round; None where the system doesn't tell.
        nbytes: bytes of what came out, where these are bytes.
        at_most: the seconds that it may take; None when it is only reported.
    """

    name: str
    seconds: float
    peak: int | None = None
    nbytes: int | None = None
    at_most: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code, 0 whatever the times are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is done; the least time counts (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a model of 3 layers and 128 ranks: a quick look")
    parser.add_argument("--output", type=Path, default=Path("output/bench/plan.json"), help="the JSON (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = DeepSeek(layers=3, dense=1, experts=8) if options.small else DeepSeek()
    saved, loaded = ("dp=8,tp=4,pp=2,ep=4", "dp=2,fsdp=8,tp=2,pp=2,ep=8") if options.small else (SAVED, LOADED)
    bench = _Bench(options.rounds)
    bench.run(model, saved, loaded, 2_000 if options.small else MILLION)
    results = {
        "benchmark": "plan",
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {"rounds": options.rounds, "saved": saved, "loaded": loaded, "model": asdict(model)},
        "machine": describe_machine(),
        "facts": bench.facts,
        "figures": [asdict(figure) for figure in bench.figures],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _show(bench)
    print(f"the numbers are in {options.output}")
    return 0


class _Bench:
    """Measures one thing after the other."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.figures: list[Figure] = []
        self.facts: dict[str, Any] = {}

    def run(self, model: DeepSeek, saved_as: str, loaded_as: str, chunks: int) -> None:
        tensors = model.tensors()
        saved = lay_out(parse_strategy(saved_as, shard_optimizer=True), tensors)
        loaded = lay_out(parse_strategy(loaded_as, shard_optimizer=True), tensors)
        ranks = saved.strategy.world_size
        self.facts = {"tensors": len(tensors), "ranks": ranks}

        descriptions = self.measure("every rank's description, in one process", lambda: [saved.describe(rank) for rank in range(ranks)])
        told = [encode(description) for description in descriptions]
        self.facts["bytes that a rank tells the others"] = max(map(len, told))
        self.measure("what all ranks tell, understood by one", lambda: decode_all(told))
        catalog = self.measure("the save's catalog", lambda: plan_catalog(descriptions, "CKP", save_optimizer=True, directory="/job"))
        self.measure("the files of a rank that saves", lambda: plan_rank_files(descriptions[ranks // 2], ranks, "CKP", save_optimizer=True))
        once = self.measure(
            "the save's catalog, redundancy removed",
            lambda: plan_catalog(descriptions, "CKP", save_optimizer=True, directory="/job", remove_redundancy=True),
        )
        self.measure("the files of a rank that saves, redundancy removed", lambda: plan_sole_files(descriptions[ranks // 2], once))
        self.facts["chunks"] = sum(len(tensor.arrangement.pieces) for tensor in catalog.tensors.values())
        self._formats("the job's", catalog)

        self._reads("the same strategy", saved, catalog)
        self._reads("another strategy", loaded, catalog)
        match = self.measure("reshard plan: the match", lambda: match_tensors(loaded, catalog))
        self.measure("reshard plan: all ranks, direct", lambda: forecast_direct(loaded, match.fitting))
        self.measure("reshard plan: all ranks, balanced", lambda: forecast_balanced(loaded, match.fitting))
        some = min(1024, ranks)
        # Ranks of one stage each hold it whole or in parts; a balanced load is planned by all for all.
        mine = [loaded.describe(rank) for rank in range(some)]
        self.measure(f"a balanced load's plan, {some:,} ranks", lambda: plan_exchange(mine, catalog))
        self._formats(f"{chunks:,} chunks:", _many_chunks(chunks), most=MOST_FOR_THE_INDEX)

    def _reads(self, what: str, placement: Placement, catalog: Catalog) -> None:
        ranks = placement.strategy.world_size
        slowest = 0.0
        for rank in np.linspace(0, ranks - 1, min(ranks, RANKS_TRIED)).astype(int).tolist():
            wanted = placement.describe(rank)
            times = []
            for _ in range(self._rounds):
                # As in a run of its own: nothing is known of any tensor's pieces.
                fresh = replace(catalog)
                began = time.perf_counter()
                plan_reads(wanted, fresh)
                times.append(time.perf_counter() - began)
            slowest = max(slowest, min(times))
        self.figures.append(Figure(f"a rank's read plan, {what}: the slowest of {RANKS_TRIED}", slowest, at_most=MOST_FOR_A_RANK))

    def _formats(self, what: str, catalog: Catalog, most: float | None = None) -> None:
        text = self.measure(f"{what} metadata.json, written", lambda: encode_metadata(catalog), size=len)
        self.measure(f"{what} metadata.json, read", lambda: decode_metadata(text, "metadata.json"))
        digest = digest_of(text)
        index = self.measure(f"{what} index, written", lambda: encode_index(catalog, digest), size=len, most=most)
        self.measure(f"{what} index, read", lambda: decode_index(index, "/job", digest), most=most)

    def measure(self, name: str, work: Callable[[], T], *, size: Callable[[T], int] | None = None, most: float | None = None) -> T:
        """Do something some times over."""
        gc.collect()
        with _peak() as peak:
            began = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - began
        for _ in range(self._rounds - 1):
            began = time.perf_counter()
            again = work()
            seconds = min(seconds, time.perf_counter() - began)
            del again
        self.figures.append(Figure(name, seconds, peak[0] if peak else None, None if size is None else size(result), most))
        print(f"{seconds:8.3f} s  {name}", flush=True)
        return result


@contextmanager
def _peak() -> Any:
    """Memory at the highest, above what there is at the beginning: looked at some hundred times a second."""
    found: list[int] = []
    before = _resident()
    if before is None:
        yield found
        return
    over = threading.Event()
    found.append(0)

    def look() -> None:
        while not over.wait(0.005):
            found[0] = max(found[0], (_resident() or 0) - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def _resident() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return None


def _many_chunks(number: int) -> Catalog:
    """A checkpoint of so many chunks: a thousand tensors, no two alike, each split over as many ranks as it takes."""
    from benchmarks.deepseek import FLOAT32
    from reshard.planning.placement import WantedTensor
    from reshard.state import model_key

    parts = max(1, number // 1000)
    tensors = [WantedTensor(model_key(f"layers.{index}.weight"), FLOAT32, (parts * (1 + index), 64)) for index in range(number // parts)]
    placement = lay_out(parse_strategy(f"fsdp={parts}"), tensors)
    return plan_catalog([placement.describe(rank) for rank in range(parts)], "CKP", save_optimizer=True, directory="/job")


def _show(bench: _Bench) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print()
    for name, value in bench.facts.items():
        console.print(f"{name}: {value:,}")
    table = Table("what", "seconds", "at most", "peak memory", "bytes")
    for column in table.columns[1:]:
        column.justify = "right"
    for figure in bench.figures:
        table.add_row(
            figure.name,
            f"{figure.seconds:.3f}",
            "" if figure.at_most is None else f"{figure.at_most:g} {'met' if figure.seconds <= figure.at_most else 'missed'}",
            "" if figure.peak is None else f"{figure.peak / 2**20:,.0f} MiB",
            "" if figure.nbytes is None else f"{figure.nbytes:,}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
