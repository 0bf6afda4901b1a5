"""The demo: a Qwen3 is trained on 8 ranks, killed, and resumed on 8, on 4 and on 1, with the same losses. `make demo` runs it.

Real processes, real text, real SIGKILLs. It takes some minutes on 2 cores, and ends with a table and a picture. The exit code is 0 when
every comparison came out as promised.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare import compare, differing_tensors, losses_of, segments_of
from picture import LIMIT, draw
from runs import REPOSITORY, Run, continued, finish, fresh, kill_at_random_moment, kill_while_saving
from table import compared_row, reference_row, show

ON_4_RANKS = {"parallel_config.data_parallel": 1, "parallel_config.model_parallel": 4, "parallel_config.pipeline_stage": 1}
ON_1_RANK = {"parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1, "parallel_config.pipeline_stage": 1}
# Fewer, larger micro-batches where one rank holds the whole batch; the global batch is the same.
WHOLE_BATCH = {"runner_config.batch_size": 8}
DROPOUT = {"model.attention_dropout": 0.1}

# The first kill comes after several checkpoints (one every 4 steps), the second in a save some steps later.
FIRST_KILL = range(13, 20)
SECOND_KILL = 24

PROMISED_FALL = 1 / 3


def main() -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "output" / "demo", help="where all files go (default: output/demo)")
    parser.add_argument("--seed", type=int, default=None, help="repeats the random moments of an earlier demo")
    parser.add_argument("--without-dropout", action="store_true", help="leave out (e), which takes half of the time")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10_000)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"\n[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    say(f"a Qwen3 learns the source code of Python's standard library; all files go to {options.output}; --seed {seed} repeats the kills")
    plain = _plain_chain(options.output, random.Random(seed), say)
    dropout = [] if options.without_dropout else _dropout_chain(options.output, random.Random(seed + 1), say)
    say("comparing every loss of every run with its reference, and the last checkpoints byte by byte")
    summary = _report(plain, dropout, options.output)
    summary |= {"seed": seed, "seconds": time.monotonic() - started}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1))
    say("done: " + ("everything is as promised" if summary["kept"] else "NOT as promised, see above"))
    return 0 if summary["kept"] else 1


def _plain_chain(output: Path, choice: random.Random, say: Any) -> list[Run]:
    """Without dropout: reference, killed twice, then resumed on 4 ranks and on 1."""
    reference = fresh(Run("(a) reference", output / "reference"))
    say("(a) the reference, uninterrupted: 8 ranks, 2 data × 2 tensor × 2 pipeline parallel, no dropout")
    finish(reference)
    killed = fresh(Run("(b) killed", output / "killed"))
    say("(b) the same run, all ranks killed by SIGKILL at a random moment")
    kill_at_random_moment(killed, choice, FIRST_KILL)
    say("(b) resumed, and killed again during a save")
    kill_while_saving(killed, SECOND_KILL)
    say("(c) its checkpoints, resumed on 4 ranks as tensor parallel 4")
    on_4 = continued(killed, Run("(c) resumed", output / "resumed-tp4", {**ON_4_RANKS, **WHOLE_BATCH}))
    finish(on_4)
    say("(d) its checkpoints, resumed on 1 rank")
    on_1 = continued(killed, Run("(d) resumed", output / "resumed-one-rank", {**ON_1_RANK, **WHOLE_BATCH}))
    finish(on_1)
    return [reference, killed, on_4, on_1]


def _dropout_chain(output: Path, choice: random.Random, say: Any) -> list[Run]:
    """With dropout, so that random states matter: reference, killed twice, resumed under the same strategy."""
    reference = fresh(Run("(a) reference", output / "reference-dropout", DROPOUT))
    say("(a) the reference with dropout 0.1")
    finish(reference)
    run = fresh(Run("(e) killed, resumed", output / "resumed-dropout", DROPOUT))
    say("(b) the same run with dropout, killed at a random moment")
    kill_at_random_moment(run, choice, FIRST_KILL)
    say("(b) resumed, and killed again during a save")
    kill_while_saving(run, SECOND_KILL)
    say("(e) resumed under the first strategy")
    finish(run)
    return [reference, run]


def _report(plain: list[Run], dropout: list[Run], output: Path) -> dict[str, Any]:
    """Print the table, draw the picture; what was found."""
    reference, killed, on_4, on_1 = plain
    losses = losses_of(reference)
    fall = 1 - losses[max(losses)] / losses[1]
    ended = f"loss {losses[1]:.3f} → {losses[max(losses)]:.3f}, {fall:.0%} less"
    references = [reference_row(reference, segments_of(reference)[0].start, ended=ended)]
    columns = [("without dropout: resumed under other strategies", reference, plain[1:])]
    compared = [(run, "0", compare(run, losses)) for run in plain[1:]]
    if dropout:
        exact_reference, exact = dropout
        references.append(reference_row(exact_reference, segments_of(exact_reference)[0].start, dropout="0.1"))
        columns.append(("with dropout 0.1: resumed under the same strategy", exact_reference, [exact]))
        compared.append((exact, "0.1", compare(exact, losses_of(exact_reference))))
    picture = output / "losses.png"
    draw(columns, picture)
    show([*references, *(compared_row(run, found, rate) for run, rate, found in compared)])

    deviation = {run.folder.name: found.largest for run, _, found in compared}
    promises = {
        "the loss falls by at least a third": fall >= PROMISED_FALL,
        "(b) every loss before and between the kills is the reference's": deviation[killed.folder.name] == 0,
        f"(c) every loss within {LIMIT:g}": deviation[on_4.folder.name] <= LIMIT,
        f"(d) every loss within {LIMIT:g}": deviation[on_1.folder.name] <= LIMIT,
    }
    count, differing = 0, []
    if dropout:
        exact_reference, exact = dropout
        count, differing = differing_tensors(exact, exact_reference)
        same = f"all {count} tensors of weights and moments are equal in every byte"
        if differing:
            same = f"{len(differing)} of {count} tensors differ: {', '.join(differing[:5])}"
        print(f"(e) last checkpoint against the reference's, step {max(losses)}: {same}")
        promises |= {
            "(e) every loss is the reference's, bit for bit": deviation[exact.folder.name] == 0,
            "(e) every byte of weights and moments is the reference's": not differing,
        }
    print(f"metrics and checkpoints: {output}")
    print(f"picture:                 {picture}")
    for promise, kept in promises.items():
        if not kept:
            print(f"BROKEN: {promise}")
    return {
        "kept": all(promises.values()),
        "promises": promises,
        "fall": fall,
        "deviations": deviation,
        "tensors": count,
        "differing": differing,
        "runs": [{**asdict(run), "folder": str(run.folder), "config": str(run.config)} for run in (*plain, *dropout)],
        "picture": str(picture),
    }


if __name__ == "__main__":
    sys.exit(main())
