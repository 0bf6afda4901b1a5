"""`reshard prune ROOT`: remove the checkpoints of a root that no rule keeps, and what dead runs left."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from reshard.cli.output import JsonOption, age_words, console, count_words, fits, print_json, size_words, table, timestamp
from reshard.cli.pruning import PruneLine, PrunePlan, carry_out, check_unlocked, holder_of, plan_prune
from reshard.errors import CheckpointNotFoundError, UsageError
from reshard.saving.policies import KeepAny, KeepBest, KeepEvery, KeepFor, KeepNewest, KeepPolicy
from reshard.storage import PosixStorage

EXIT_DECLINED = 1
"""Somebody was asked and said no. A root that a run holds, or any other error, ends with 2 as everywhere."""


def prune(
    root: Annotated[str, typer.Argument(help="The checkpoint root: the directory that holds the iterations.", show_default=False)],
    keep: Annotated[int | None, typer.Option("--keep", min=1, metavar="N", help="Keep the newest N.")] = None,
    keep_every: Annotated[int | None, typer.Option("--keep-every", min=1, metavar="STEPS", help="Keep every multiple of STEPS.")] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option("--keep-best", metavar="METRIC[:N[:MODE]]", help="Keep the best N (1) by a metric, `min` (the default) or `max`."),
    ] = None,
    keep_days: Annotated[float | None, typer.Option("--keep-days", metavar="DAYS", help="Keep those of the last DAYS days.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove the checkpoints that no rule keeps, and what dead runs left. The one that a run resumes from always stays.

    What any of the --keep rules keeps stays. Without such a rule no checkpoint is removed.
    """
    if json and not dry_run and not yes:
        raise UsageError("a JSON document leaves no room for a question", field="--json", fix="add --yes or --dry-run")
    policy = _policy(keep, keep_every, keep_best or (), keep_days)
    storage, path, now = PosixStorage(), os.path.abspath(root), time.time()
    holder = holder_of(storage, path) if dry_run else None
    if not dry_run:
        there = storage.stat(path)
        if there is None or not there.is_directory:
            raise CheckpointNotFoundError(
                "there is no such directory", file=path, fix="give the directory that holds iteration_… and the tracker"
            )
        check_unlocked(storage, path)
    plan = plan_prune(storage, path, policy, now, holder)
    if not json:
        _print(plan, dry_run=dry_run)
    if plan.going and not dry_run:
        if not yes and not _ask():
            console().print("nothing was removed")
            raise typer.Exit(EXIT_DECLINED)
        carry_out(storage, plan, policy, now)
    if json:
        print_json(_document(plan, dry_run=dry_run))
    elif plan.going and not dry_run:
        console().print(f"removed: {size_words(plan.freed)} freed")


def _policy(keep: int | None, every: int | None, best: list[str] | tuple[str, ...], days: float | None) -> KeepPolicy | None:
    policies: list[KeepPolicy] = [_best(text) for text in best]
    if keep is not None:
        policies.append(KeepNewest(keep))
    if every is not None:
        policies.append(KeepEvery(every))
    if days is not None:
        policies.append(KeepFor(days=days))
    return KeepAny(tuple(policies)) if policies else None


def _best(text: str) -> KeepBest:
    """`loss`, `loss:3`, `accuracy:3:max`; the metric's own name may have colons in it."""
    parts = text.split(":")
    mode = parts.pop() if len(parts) > 1 and parts[-1] in ("min", "max") else "min"
    count = int(parts.pop()) if len(parts) > 1 and parts[-1].isascii() and parts[-1].isdigit() else 1
    name = ":".join(parts)
    if not name or count < 1:
        raise UsageError("not a metric to keep the best by", field="--keep-best", found=repr(text), expected="such as loss:3:min")
    return KeepBest(name, count, "max" if mode == "max" else "min")


def _ask() -> bool:
    try:
        return typer.confirm("remove them?")
    except typer.Abort:
        raise UsageError(
            "nobody said whether to remove them; nothing was removed", field="--yes", fix="give --yes, or --dry-run to only look"
        ) from None


def _print(plan: PrunePlan, *, dry_run: bool) -> None:
    columns = [("", "left"), ("iteration", "right"), ("size", "right"), ("files", "right"), ("age", "right"), ("why", "left")]
    rows = [
        (
            "goes" if line.goes else "stays",
            str(line.iteration),
            size_words(line.nbytes),
            str(line.files),
            age_words(line.modified),
            _reason(line),
        )
        for line in plan.lines
    ]
    out = console()
    out.print(plan.root, soft_wrap=True)
    listed = table(columns, rows)
    if rows and fits(out, listed):
        out.print(listed)
    else:
        for what, iteration, size, files, age, why in rows:
            out.print(f"{what} {iteration}  {why}", soft_wrap=True)
            out.print(f"    {size}, {files} files, {age} old", soft_wrap=True)
    if plan.holder is not None:
        out.print(f"a run holds this root, so that only --dry-run can look at it: {plan.holder}", soft_wrap=True)
    if not plan.going:
        out.print("nothing goes")
        return
    checkpoints = sum(line.kind == "checkpoint" for line in plan.going)
    leftovers = len(plan.going) - checkpoints
    parts = [count_words(checkpoints, "checkpoint")] if checkpoints else []
    parts += [f"{count_words(leftovers, 'leftover')} of dead runs"] if leftovers else []
    would = "would go" if dry_run else "go" if len(plan.going) > 1 else "goes"
    out.print(f"{' and '.join(parts)} {would}: {size_words(plan.freed)}", soft_wrap=True)


def _reason(line: PruneLine) -> str:
    return line.reason if line.kind == "checkpoint" else f"{line.directory}: {line.reason}"


def _document(plan: PrunePlan, *, dry_run: bool) -> dict[str, Any]:
    return {
        "root": plan.root,
        "dry_run": dry_run,
        "tracked": plan.tracked,
        "holder": plan.holder,
        "freed": plan.freed,
        "lines": [{**asdict(line), "modified": timestamp(line.modified)} for line in plan.lines],
    }
