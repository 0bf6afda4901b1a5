"""A Qwen3 with experts is trained, killed, and resumed with its experts on other ranks, as hybrid, full and again hybrid shards.

As the demo: real processes, real text, real SIGKILLs, a table and a picture at the end. The exit code is 0 when every comparison came
out as promised. `make demo-experts` runs it; it takes some minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# What starts, kills, compares and draws runs is the demo's.
sys.path.insert(0, str(HERE.parent / "demo"))

from compare import compare, differing_tensors, losses_of, segments_of  # noqa: E402
from picture import LIMIT, draw  # noqa: E402
from runs import REPOSITORY, Run, continued, finish, fresh, kill_at_random_moment  # noqa: E402
from table import compared_row, reference_row, show  # noqa: E402

CONFIG = HERE / "qwen3_moe.yaml"

# After some checkpoints, one every 4 steps, and early enough that there is something left to do.
FIRST_KILL = range(9, 13)
SECOND_KILL = range(17, 20)


def strategy(data: int, tensor: int = 1, pipeline: int = 1, *, expert: int = 1, shard: int = -1) -> dict[str, object]:
    """The fields of a strategy; `shard`: data-parallel ranks that share one copy, -1 for all of them."""
    sizes = {"data_parallel": data, "model_parallel": tensor, "pipeline_stage": pipeline, "expert_parallel": expert}
    return {**{f"parallel_config.{name}": size for name, size in sizes.items()}, "parallel.optimizer_weight_shard_size": shard}


HYBRID, FULL = strategy(4, expert=2, shard=2), strategy(4, expert=4)


def main() -> int:
    """Run both chains; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "output" / "experts", help="where all files go (default: output/experts)"
    )
    parser.add_argument("--seed", type=int, default=None, help="repeats the random moments of an earlier run")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10_000)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"\n[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    say(f"a Qwen3 with experts learns the source code of Python's standard library; files go to {options.output}; --seed {seed} repeats it")
    experts = _experts_chain(options.output, random.Random(seed), say)
    hybrid = _hybrid_chain(options.output, random.Random(seed + 1), say)
    say("comparing every loss of every run with its reference")
    summary = _report(experts, hybrid, options.output)
    summary |= {"seed": seed, "seconds": time.monotonic() - started}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1))
    say("done: " + ("everything is as promised" if summary["kept"] else "NOT as promised, see above"))
    return 0 if summary["kept"] else 1


def _experts_chain(output: Path, choice: random.Random, say: Any) -> list[Run]:
    reference = fresh(Run("(a) reference", output / "reference", config=CONFIG))
    say("(a) the reference, uninterrupted: 8 ranks, 4 data × 2 pipeline parallel, the experts over 2 data-parallel ranks")
    finish(reference)
    killed = fresh(Run("(b) killed, resumed", output / "killed", config=CONFIG))
    say("(b) the same run, all ranks killed by SIGKILL at a random moment")
    kill_at_random_moment(killed, choice, FIRST_KILL)
    runs = [
        continued(killed, Run(name, output / folder, fields, config=CONFIG))
        for name, folder, fields in (
            ("(c) resumed", "expert-parallel-4", strategy(4, expert=4)),
            ("(d) resumed", "tensor-parallel", strategy(2, 2, expert=2)),
            ("(e) resumed", "one-rank", strategy(1)),
        )
    ]
    for run, text in zip(runs, ("the experts over 4 ranks", "each expert split over 2 ranks besides", "one rank has all"), strict=True):
        say(f"{run.name[:3]} its checkpoints, resumed: {text}")
        finish(run)
    say("(b) resumed under the first strategy")
    finish(killed)
    return [reference, killed, *runs]


def _hybrid_chain(output: Path, choice: random.Random, say: Any) -> list[Run]:
    reference = fresh(Run("(a) reference", output / "reference-hybrid", HYBRID, config=CONFIG))
    say("(a) the reference of hybrid sharding: 4 ranks, 2 copies of 2 shards each")
    finish(reference)
    run = fresh(Run("(f) hybrid, full, hybrid", output / "hybrid", HYBRID, config=CONFIG))
    say("(f) the same run, killed at a random moment")
    kill_at_random_moment(run, choice, FIRST_KILL)
    say("(f) resumed with 4 shards, and killed again")
    run.fields = FULL
    kill_at_random_moment(run, choice, SECOND_KILL)
    say("(f) resumed with 2 copies of 2 shards")
    run.fields = HYBRID
    finish(run)
    return [reference, run]


def _report(experts: list[Run], hybrid: list[Run], output: Path) -> dict[str, Any]:
    """Print the table, draw the picture; what was found."""
    rows, promises, deviations = [], {}, {}
    for reference, *runs in (experts, hybrid):
        losses = losses_of(reference)
        fall = 1 - losses[max(losses)] / losses[1]
        ended = f"loss {losses[1]:.3f} → {losses[max(losses)]:.3f}, {fall:.0%} less"
        rows.append(reference_row(reference, segments_of(reference)[0].start, ended=ended))
        for run in runs:
            found = compare(run, losses)
            rows.append(compared_row(run, found))
            deviations[run.folder.name] = found.largest
            promises[f"{run.name}: every loss within {LIMIT:g}"] = found.largest <= LIMIT
    reference, exact = experts[:2]
    count, differing = differing_tensors(exact, reference)
    promises["(b) every loss is the reference's, bit for bit"] = deviations[exact.folder.name] == 0
    promises["(b) every byte of weights and moments is the reference's"] = not differing
    picture = output / "losses.png"
    columns = (
        ("experts: resumed on other ranks", experts[0], experts[1:]),
        ("hybrid sharding: resumed as full sharding, and back", hybrid[0], hybrid[1:]),
    )
    draw(columns, picture)
    show(rows)
    print(f"(b) last checkpoint against the reference's: {count - len(differing)} of {count} tensors are equal in every byte")
    print(f"metrics and checkpoints: {output}")
    print(f"picture:                 {picture}")
    for promise, kept in promises.items():
        if not kept:
            print(f"BROKEN: {promise}")
    return {"kept": all(promises.values()), "promises": promises, "deviations": deviations, "tensors": count, "picture": str(picture)}


if __name__ == "__main__":
    sys.exit(main())
