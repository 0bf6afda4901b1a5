"""`reshard plan CHECKPOINT --strategy dp=2,tp=4`: what a load would do, before it is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from reshard.checkpoint import Checkpoint
from reshard.cli.layouts import mesh_words
from reshard.cli.output import JsonOption, aligned, console, count_words, fits, print_json, print_lines, shape_words, size_words, table
from reshard.errors import ReshardError, UsageError
from reshard.format.names import tensor_name
from reshard.geometry import Mesh
from reshard.geometry.dtypes import by_name
from reshard.loading.outlook import Outlook, foresee
from reshard.loading.selection import select
from reshard.loading.strictness import Strictness
from reshard.planning.strategy import AXES, SPLIT_AXES, parse_strategy
from reshard.state import Kind
from reshard.storage.posix import PosixStorage

EXIT_WOULD_FAIL = 1
"""The forecast could be made, and says that the load would fail."""

# Up to so many ranks each has a row; of more only the least, the mean and the most are shown unless rows are asked for.
_MOST_RANKS = 16

# Longer tables are plain lines: rich takes half a millisecond a row.
_MOST_ROWS = 500

_SIZE = re.compile(r"(\d{1,15}) ?([KMGT]?)(i?B)?", re.ASCII | re.IGNORECASE)
_POWERS = ("", "K", "M", "G", "T")

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

_AXES_HELP = "; ".join(f"{axis}: {meaning}" for axis, meaning in AXES.items())


def plan(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint root (its tracker is obeyed) or one iteration.", show_default=False)],
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            "-s",
            metavar="AXIS=SIZE,…",
            help=f"Of the run that would load it, as dp=2,tp=4,pp=2. {_AXES_HELP}.",
            show_default=False,
        ),
    ],
    shard_optimizer: Annotated[
        bool, typer.Option("--shard-optimizer", help="Optimizer tensors are split over dp too, in dimension 0 (ZeRO-1).")
    ] = False,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            metavar="PATTERN=AXIS:DIM,…",
            help="How tensors lie whose names don't say it, or say it wrongly, as '*.in_proj.weight=tp:0' or '*.router.*=none'; "
            f"the axes are {', '.join(SPLIT_AXES)}. May be repeated; of several that mean a parameter the last counts.",
            show_default=False,
        ),
    ] = None,
    balanced: Annotated[bool, typer.Option("--balanced", help="Each byte is read once in the whole job, and sent on.")] = False,
    memory_budget: Annotated[
        str | None,
        typer.Option("--memory-budget", metavar="SIZE", help="Of a balanced load, as 64MiB. Else the usual 256MiB.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", help="Only these tensors, as 'layers.0.*'; may be repeated.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="All but these tensors; may be repeated.", show_default=False)
    ] = None,
    optimizer: Annotated[bool, typer.Option("--optimizer/--no-optimizer", help="Whether the optimizer is loaded, or weights only.")] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="TYPE", help="The type of the run's floating weights; else as they are stored.", show_default=False
        ),
    ] = None,
    cast: Annotated[bool, typer.Option("--cast", help="The run casts tensors of another floating type (strictness dtype: cast).")] = False,
    model_of: Annotated[
        str | None,
        typer.Option(
            "--model-of",
            metavar="CHECKPOINT",
            help="The run holds the tensors of this other checkpoint; else those of CHECKPOINT itself.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=0, metavar="N", help="Show the first N ranks one by one.", show_default=False)
    ] = None,
    layouts: Annotated[bool, typer.Option("--layouts", help="Show how the tensors would lie on the ranks.")] = False,
    json: JsonOption = False,
) -> None:
    """Say what a load would do under a strategy: bytes per rank, files, what would fail. No rank is started, no tensor is read.

    The exit code is 0 if the load would work, as far as names, types, sizes and headers tell; 1 if it would fail; 2 if the question has a
    mistake or the checkpoint can't be opened.
    """
    wanted = parse_strategy(strategy, shard_optimizer=shard_optimizer, splits=split or ())
    if memory_budget is not None and not balanced:
        raise UsageError("a memory budget is for balanced loads", field="--memory-budget", found=memory_budget, fix="add --balanced")
    storage = PosixStorage()
    outlook = foresee(
        Checkpoint(checkpoint, storage),
        storage,
        wanted,
        selection=select(only or None, exclude),
        optimizer=optimizer,
        model_of=None if model_of is None else Checkpoint(model_of, storage).catalog,
        dtype=None if dtype is None else by_name(dtype),
        strictness=Strictness(dtype="cast" if cast else "error"),
        balanced=balanced,
        memory_budget=None if memory_budget is None else parse_size(memory_budget),
    )
    if json:
        print_json(_document(outlook, balanced=balanced, ranks=ranks))
    else:
        _print(console(), outlook, balanced=balanced, ranks=ranks, layouts=layouts)
    if outlook.failures:
        raise typer.Exit(EXIT_WOULD_FAIL)


def parse_size(text: str) -> int:
    """A size in bytes as a person writes it: `1048576`, `64MiB` or `64M` (powers of 1024), `64MB` (powers of 1000).

    Raises:
        UsageError: another text.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError("not a size", field="--memory-budget", found=repr(text), expected="bytes, or a size such as 64MiB")
    base = 1000 if (match[3] or "").upper() == "B" else 1024
    return int(match[1]) * base ** _POWERS.index(match[2].upper())


def _columns(outlook: Outlook, *, balanced: bool) -> dict[str, np.ndarray]:
    traffic = outlook.traffic
    moved = {"sent": traffic.sent, "received": traffic.received} if balanced else {}
    return {"needed": traffic.needed, "read": traffic.read, **moved, "files": traffic.files}


def _print(out: Console, outlook: Outlook, *, balanced: bool, ranks: int | None, layouts: bool) -> None:
    _print_head(out, outlook, balanced=balanced)
    _print_table(out, ["rank", *_columns(outlook, balanced=balanced)], _rank_rows(outlook, balanced=balanced, ranks=ranks), left=0)
    if layouts:
        out.print()
        header = ["parameter", "shape", "model", "optimizer", "ranks", "layout"]
        numbers = ("model", "optimizer", "ranks")
        rows = [(g["name"], shape_words(g["shape"]), *(str(g[n]) for n in numbers), g["layout"]) for g in _layouts(outlook)]
        _print_table(out, header, rows, left=(0, 1, 5))
    for error in outlook.warnings:
        out.print(f"\nthe load would warn: {error}", soft_wrap=True)
    for error in outlook.failures:
        out.print(f"\nthe load would fail: {error}", soft_wrap=True, style="red")
    if not outlook.failures:
        out.print("\nthe load would work, as far as names, types, sizes and headers tell", soft_wrap=True)


def _print_head(out: Console, outlook: Outlook, *, balanced: bool) -> None:
    checkpoint, strategy, found = outlook.checkpoint, outlook.placement.strategy, outlook.match
    words = ["a checkpoint"] if checkpoint.iteration is None else [f"iteration {checkpoint.iteration}"]
    if checkpoint.common is not None and checkpoint.common.global_step is not None:
        words.append(f"global step {checkpoint.common.global_step}")
    how = "each byte is read once and sent on" if balanced else "each rank reads what it needs"
    sharded = ", its optimizer split over dp" if strategy.shard_optimizer else ""
    out.print(checkpoint.directory, soft_wrap=True)
    out.print(", ".join(words), soft_wrap=True)
    out.print(f"into {strategy}{sharded}: {count_words(strategy.world_size, 'rank')}, {how}", soft_wrap=True)
    kinds = {
        "cast": len(found.cast),
        "missing": len(found.missing),
        "unexpected": len(found.unexpected),
        "mismatched": len(found.mismatched),
        "skipped": outlook.skipped,
    }
    others = "".join(f", {number} {kind}" for kind, number in kinds.items() if number)
    out.print(f"{count_words(found.restored, 'tensor')} restored, {size_words(found.nbytes)}{others}", soft_wrap=True)
    for note in outlook.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print()


def _rank_rows(outlook: Outlook, *, balanced: bool, ranks: int | None) -> list[list[str]]:
    columns = _columns(outlook, balanced=balanced)
    world = outlook.placement.strategy.world_size
    shown = min(world, ranks if ranks is not None else world if world <= _MOST_RANKS else 0)

    def row(title: str, values: Sequence[int], files: int) -> list[str]:
        return [title, *map(size_words, values), str(files)]

    *sizes, files = columns.values()
    rows = [row(str(rank), [int(column[rank]) for column in sizes], int(files[rank])) for rank in range(shown)]
    if shown < world:
        rows.append(row("least", [int(column.min()) for column in sizes], int(files.min())))
    if world > 1:
        rows.append(row("mean", [int(column.sum()) // world for column in sizes], round(float(files.mean()))))
        rows.append(row("most", [int(column.max()) for column in sizes], int(files.max())))
        rows.append(row("all", [int(column.sum()) for column in sizes], len(outlook.traffic.file_names)))
    return rows


def _print_table(out: Console, header: Sequence[str], rows: Sequence[Sequence[str]], left: int | Sequence[int]) -> None:
    flush = (left,) if isinstance(left, int) else left
    columns = [(name, "left" if index in flush else "right") for index, name in enumerate(header)]
    lines = aligned(columns, rows)
    if len(rows) <= _MOST_ROWS and fits(out, wide := table(columns, rows)):
        out.print(wide)
    elif max(map(len, lines)) <= out.width:
        print_lines(out, lines)
    else:
        # A broken cell helps nobody: each row takes two lines.
        print_lines(out, (line for row in rows for line in (row[0], "    " + ", ".join(map(_cell_words, header[1:], row[1:])))))


def _cell_words(name: str, cell: str) -> str:
    return f"{name} {cell}"


def _layouts(outlook: Outlook) -> list[dict[str, Any]]:
    """How the tensors would lie, those together that differ in the numbers in their names only; slots with their parameters."""
    found: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    meshes: dict[tuple[str, tuple[int, ...], str], dict[int, Mesh]] = {}
    words: dict[int, str] = {}
    for tensor, layout in zip(outlook.placement.tensors, outlook.placement.layouts, strict=True):
        if id(layout) not in words:
            words[id(layout)] = mesh_words(layout)
        name = _NUMBER.sub("*", tensor.key.parameter) or tensor_name(tensor.key)
        key = (name, tensor.global_shape, words[id(layout)])
        group = found.setdefault(key, {"name": name, "shape": list(key[1]), "model": 0, "optimizer": 0, "ranks": 0, "layout": key[2]})
        group["model" if tensor.key.kind is Kind.MODEL else "optimizer"] += 1
        meshes.setdefault(key, {})[id(layout.mesh)] = layout.mesh
    for key, group in found.items():
        group["ranks"] = len({rank for mesh in meshes[key].values() for rank in mesh.ranks})
    return list(found.values())


def _document(outlook: Outlook, *, balanced: bool, ranks: int | None) -> dict[str, Any]:
    checkpoint, strategy, found, traffic = outlook.checkpoint, outlook.placement.strategy, outlook.match, outlook.traffic
    columns = _columns(outlook, balanced=True)
    world = strategy.world_size
    shown = world if ranks is None else min(world, ranks)
    numbers = {name: column.tolist() for name, column in columns.items()}
    return {
        "directory": checkpoint.directory,
        "iteration": checkpoint.iteration,
        "strategy": {**strategy.sizes, "shard_optimizer": strategy.shard_optimizer, "split": [rule.text for rule in strategy.splits]},
        "world_size": world,
        "balanced": balanced,
        "would_fail": bool(outlook.failures),
        "failures": [_error_document(error) for error in outlook.failures],
        "warnings": [_error_document(error) for error in outlook.warnings],
        "notes": list(outlook.notes),
        "tensors": {
            "restored": found.restored,
            "restored_bytes": found.nbytes,
            "skipped": outlook.skipped,
            "cast": [f"{tensor_name(m.key)}: {m.stored} -> {m.wanted}" for m in found.cast],
            "missing": [tensor_name(key) for key in found.missing],
            "unexpected": [tensor_name(key) for key in found.unexpected],
            "mismatched": [tensor_name(mismatch.key) for mismatch in found.mismatched],
        },
        "files": list(traffic.file_names),
        "summary": {
            name: {"least": int(column.min()), "mean": float(column.mean()), "most": int(column.max()), "all": int(column.sum())}
            for name, column in columns.items()
        },
        "ranks": [{"rank": rank, **{name: numbers[name][rank] for name in numbers}} for rank in range(shown)],
        "layouts": _layouts(outlook),
    }


def _error_document(error: ReshardError) -> dict[str, Any]:
    parts = {"file": error.file, "tensor": error.tensor, "field": error.field, "found": error.found, "expected": error.expected}
    return {
        "kind": type(error).__name__,
        "what": error.what,
        **{name: str(value) for name, value in parts.items() if value is not None},
        "next": error.fix,
    }
