"""A Qwen3 is trained under MindSpore on 2 ranks, killed, resumed on 1, and goes on in PyTorch: one run, the same losses.

As the demo: real processes under msrun, real text, real SIGKILLs, a table and a picture at the end. The exit code is 0 when every
comparison came out as promised. `make demo-mindspore` runs it; it takes some minutes on 2 cores.
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

CONFIG = HERE / "qwen3.yaml"

ON_1_RANK = {"parallel_config.data_parallel": 1}
IN_PYTORCH = {**ON_1_RANK, "framework": "torch"}

PROMISED_FALL = 1 / 3


def main() -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "output" / "mindspore", help="where all files go (default: output/mindspore)"
    )
    parser.add_argument("--seed", type=int, default=None, help="repeats the random moment of an earlier run")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10_000)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"\n[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    say(f"a Qwen3 learns the source code of Python's standard library; all files go to {options.output}; --seed {seed} repeats the kill")
    runs = _runs(options.output, random.Random(seed), say)
    say("comparing every loss of every run with the reference")
    summary = _report(runs, options.output)
    summary |= {"seed": seed, "seconds": time.monotonic() - started}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1))
    say("done: " + ("everything is as promised" if summary["kept"] else "NOT as promised, see above"))
    return 0 if summary["kept"] else 1


def _runs(output: Path, choice: random.Random, say: Any) -> list[Run]:
    reference = fresh(Run("(a) reference", output / "reference", config=CONFIG))
    say("(a) the reference, uninterrupted: MindSpore, 2 data-parallel ranks under msrun")
    finish(reference)
    killed = fresh(Run("(b) killed", output / "killed", config=CONFIG))
    say("(b) the same run, both ranks killed by SIGKILL at a random moment")
    # After some checkpoints, one every 4 steps, and well before the frameworks change.
    kill_at_random_moment(killed, choice, range(9, 16))
    say("(c) its checkpoints, resumed on 1 rank under MindSpore, up to step 28")
    moved = continued(
        killed, Run("(c) 1 rank,\nthen PyTorch", output / "moved", {**ON_1_RANK, "runner_config.max_steps": 28}, config=CONFIG)
    )
    finish(moved)
    say("(c) the same run goes on in PyTorch, as transformers' Qwen3, with its optimizer")
    moved.fields = IN_PYTORCH
    finish(moved)
    say("(d) the killed run's checkpoints, resumed on 2 ranks under msrun")
    exact = continued(killed, Run("(d) resumed", output / "resumed", config=CONFIG))
    finish(exact)
    return [reference, killed, moved, exact]


def _report(runs: list[Run], output: Path) -> dict[str, Any]:
    """Print the table, draw the picture; what was found."""
    reference, killed, moved, exact = runs
    losses = losses_of(reference)
    fall = 1 - losses[max(losses)] / losses[1]
    compared = [(run, compare(run, losses)) for run in runs[1:]]
    count, differing = differing_tensors(exact, reference)
    picture = output / "losses.png"
    draw([("2 ranks under MindSpore, 1 rank, PyTorch", reference, runs[1:])], picture, "One training run in two frameworks")
    ended = f"loss {losses[1]:.3f} → {losses[max(losses)]:.3f}, {fall:.0%} less"
    show([reference_row(reference, segments_of(reference)[0].start, ended=ended), *(compared_row(run, found) for run, found in compared)])
    print(f"(d) last checkpoint against the reference's: {count - len(differing)} of {count} tensors are equal in every byte")
    print(f"metrics and checkpoints: {output}")
    print(f"picture:                 {picture}")
    deviation = {run.folder.name: found.largest for run, found in compared}
    promises = {
        "the loss falls by at least a third": fall >= PROMISED_FALL,
        "(c) the run went on in PyTorch": [segment.start["framework"] for segment in segments_of(moved)] == ["mindspore", "torch"],
        "(b) every loss before the kill is the reference's": deviation[killed.folder.name] == 0,
        f"(c) every loss within {LIMIT:g}": deviation[moved.folder.name] <= LIMIT,
        "(d) every loss is the reference's, bit for bit": deviation[exact.folder.name] == 0,
        "(d) every byte of weights and moments is the reference's": not differing,
    }
    for promise, kept in promises.items():
        if not kept:
            print(f"BROKEN: {promise}")
    return {
        "kept": all(promises.values()),
        "promises": promises,
        "deviations": deviation,
        "kills": killed.kills,
        "tensors": count,
        "picture": str(picture),
    }


if __name__ == "__main__":
    sys.exit(main())
