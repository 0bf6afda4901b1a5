"""`reshard show CHECKPOINT [PATTERN]`: what a checkpoint holds, and how each tensor lay on its ranks."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer
from rich.console import Console

from reshard.catalog import StoredTensor
from reshard.checkpoint import Checkpoint
from reshard.cli.layouts import draw, layout_words, ranks_of, tensor_ranks
from reshard.cli.output import (
    JsonOption,
    aligned,
    console,
    count_words,
    fits,
    print_json,
    print_lines,
    rank_words,
    shape_words,
    size_words,
    table,
)
from reshard.cli.strategy_option import StrategyOption, source_of
from reshard.errors import UsageError
from reshard.format.names import tensor_name
from reshard.state import Kind

# Longer lists are plain lines: rich takes half a millisecond a row, and nobody looks at so many for their beauty.
_MOST_ROWS = 500

# Of a tensor in more chunks than this the table shows the first ones; JSON has them all.
_MOST_CHUNKS = 64

_KIND_WORDS = {Kind.MODEL: "model", Kind.OPTIMIZER: "optimizer"}


def show(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint root (its tracker is obeyed) or one iteration.", show_default=False)],
    pattern: Annotated[
        str | None,
        typer.Argument(help="Only these tensors: a name, a part of names, or a glob such as 'adam_m.*layers.0.*'.", show_default=False),
    ] = None,
    regex: Annotated[bool, typer.Option("--regex", "-E", help="Take PATTERN as a regular expression, found anywhere in a name.")] = False,
    strategy: StrategyOption = None,
    json: JsonOption = False,
) -> None:
    """Show a checkpoint's tensors and how they lie on ranks.

    If PATTERN means a single tensor, a drawing shows which ranks hold which part of it.
    """
    opened = Checkpoint(source_of(checkpoint, strategy))
    names = {tensor_name(key): tensor for key, tensor in opened.catalog.tensors.items()}
    chosen = names if pattern is None else {name: names[name] for name in matching(names, pattern, regex=regex)}
    # What is shown can be loaded, as far as headers and sizes tell.
    notes = (*opened.notes, *opened.check(chosen))
    if json:
        print_json(_document(opened, chosen, notes))
        return
    out = console()
    _print_head(out, opened, notes)
    if len(chosen) == 1 and pattern is not None:
        ((name, tensor),) = chosen.items()
        _print_one(out, name, tensor)
    else:
        _print_list(out, chosen)


def matching(names: Iterable[str], pattern: str, *, regex: bool = False) -> list[str]:
    """The names that a pattern means: the one that it is, else those that it matches as a glob, else those that it is part of.

    Args:
        names: all names.
        pattern: what to look for.
        regex: it is a regular expression, found anywhere in a name.

    Raises:
        UsageError: it means none, or it is no regular expression.
    """
    names = list(names)
    if regex:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UsageError("the pattern is no regular expression", field="PATTERN", found=pattern, expected=str(error)) from error
        found = [name for name in names if expression.search(name)]
    elif pattern in names:
        found = [pattern]
    elif any(character in pattern for character in "*?["):
        found = [name for name in names if fnmatchcase(name, pattern)]
    else:
        found = [name for name in names if pattern in name]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or names[:3]
        raise UsageError(
            "no tensor of this checkpoint has such a name",
            field="PATTERN",
            found=pattern,
            expected=f"one of {len(names)} names, such as {', '.join(near)}" if near else "nothing: the checkpoint holds no tensor",
        )
    return found


def _totals(tensors: Iterable[StoredTensor], kind: Kind) -> tuple[int, int]:
    """Tensors of this kind and their bytes, each counted once."""
    sizes = [tensor.nbytes for tensor in tensors if tensor.key.kind is kind]
    return len(sizes), sum(sizes)


def _files(tensor: StoredTensor) -> list[str]:
    return sorted({place.file for chunk in tensor.chunks for place in chunk.places})


def _all_ranks(opened: Checkpoint) -> set[int]:
    return set().union(*(tensor_ranks(tensor) for tensor in opened.catalog.tensors.values()))


def _print_head(out: Console, opened: Checkpoint, notes: Sequence[str]) -> None:
    ranks = _all_ranks(opened)
    words = ["a checkpoint"] if opened.iteration is None else [f"iteration {opened.iteration}"]
    if opened.common is not None and opened.common.global_step is not None:
        words.append(f"global step {opened.common.global_step}")
    if ranks:
        words.append(f"saved by {len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'}")
    out.print(opened.directory, soft_wrap=True)
    out.print(", ".join(words), soft_wrap=True)
    tensors = opened.catalog.tensors.values()
    for kind, word in _KIND_WORDS.items():
        count, nbytes = _totals(tensors, kind)
        out.print(
            f"{word + ':':<11}{count_words(count, 'tensor')}, {size_words(nbytes)}" if count else f"{word + ':':<11}none", soft_wrap=True
        )
    if opened.values:
        out.print(f"{'values:':<11}{', '.join(opened.values)}", soft_wrap=True)
    for note in notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print()


def _print_list(out: Console, chosen: dict[str, StoredTensor]) -> None:
    columns = [
        ("name", "left"),
        ("shape", "left"),
        ("dtype", "left"),
        ("size", "right"),
        ("parts", "right"),
        ("ranks", "left"),
        ("layout", "left"),
    ]
    rows = [
        (
            name,
            shape_words(tensor.global_shape),
            tensor.dtype.name,
            size_words(tensor.nbytes),
            str(len(tensor.chunks)),
            rank_words(tensor_ranks(tensor)),
            layout_words(tensor),
        )
        for name, tensor in chosen.items()
    ]
    if len(rows) > _MOST_ROWS:
        lines = aligned(columns, rows)
        is_wide_enough = max(map(len, lines)) <= out.width
        print_lines(out, lines if is_wide_enough else (line for row in rows for line in _two_lines(*row)))
        return
    wide = table(columns, rows)
    if fits(out, wide):
        out.print(wide)
        return
    for row in rows:
        name, facts = _two_lines(*row)
        out.print(name, style="bold", soft_wrap=True)
        out.print(facts, soft_wrap=True)


def _two_lines(name: str, shape: str, dtype: str, size: str, parts: str, ranks: str, layout: str) -> tuple[str, str]:
    """A row of the list for a narrow terminal, where a broken name helps nobody."""
    where = f"rank {ranks}" if ranks.isdigit() else f"ranks {ranks}"
    return name, f"    {shape} {dtype}, {size}, {count_words(int(parts), 'part')} on {where}: {layout}"


def _print_one(out: Console, name: str, tensor: StoredTensor) -> None:
    out.print(name, style="bold", soft_wrap=True)
    facts = (
        ("kind", _KIND_WORDS[tensor.key.kind]),
        ("shape", shape_words(tensor.global_shape)),
        ("dtype", tensor.dtype.name),
        ("size", size_words(tensor.nbytes)),
        ("layout", layout_words(tensor)),
        ("ranks", rank_words(tensor_ranks(tensor))),
    )
    for word, value in facts:
        out.print(f"  {word + ':':<8}{value}", soft_wrap=True)
    lines = draw(tensor)
    if lines is not None:
        out.print("\nThe ranks that hold each part:", soft_wrap=True)
        out.print("\n".join(f"  {line}" for line in lines), soft_wrap=True)
    out.print()
    _print_chunks(out, tensor)


def _print_chunks(out: Console, tensor: StoredTensor) -> None:
    columns = [("offset", "left"), ("shape", "left"), ("held by ranks", "left"), ("stored in", "left")]
    rows = [
        (
            shape_words(chunk.region.offset),
            shape_words(chunk.region.shape),
            rank_words(ranks_of(chunk)),
            _file_words([place.file for place in chunk.places]),
        )
        for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.region.offset)[:_MOST_CHUNKS]
    ]
    out.print(table(columns, rows))
    if len(tensor.chunks) > _MOST_CHUNKS:
        out.print(f"and {len(tensor.chunks) - _MOST_CHUNKS} more parts; --json has them all", soft_wrap=True)


def _file_words(files: Sequence[str], most: int = 2) -> str:
    left_out = len(files) - most
    return ", ".join(files[:most]) + (f" and {count_words(left_out, 'copy').replace('copys', 'copies')} more" if left_out > 0 else "")


def _document(opened: Checkpoint, chosen: dict[str, StoredTensor], notes: Sequence[str]) -> dict[str, Any]:
    totals = {}
    for kind, word in _KIND_WORDS.items():
        count, nbytes = _totals(opened.catalog.tensors.values(), kind)
        totals[word] = {"tensors": count, "nbytes": nbytes}
    return {
        "directory": os.fspath(opened.directory),
        "iteration": opened.iteration,
        "common": None if opened.common is None else asdict(opened.common),
        "world_size": len(_all_ranks(opened)) or None,
        "totals": totals,
        "values": list(opened.values),
        "notes": list(notes),
        "tensors": [_tensor_document(name, tensor) for name, tensor in chosen.items()],
    }


def _tensor_document(name: str, tensor: StoredTensor) -> dict[str, Any]:
    layout = tensor.layout
    return {
        "name": name,
        "kind": _KIND_WORDS[tensor.key.kind],
        "slot": tensor.key.slot,
        "parameter": tensor.key.parameter or None,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.global_shape),
        "nbytes": tensor.nbytes,
        "layout": None
        if layout is None
        else {
            "words": layout_words(tensor),
            "mesh": {"shape": list(layout.mesh.shape), "axes": list(layout.mesh.axes), "ranks": list(layout.mesh.ranks)},
            "split": [[layout.mesh.axes[axis] for axis in axes] for axes in layout.split],
        },
        "files": _files(tensor),
        "chunks": [
            {
                "offset": list(chunk.region.offset),
                "shape": list(chunk.region.shape),
                "ranks": list(ranks_of(chunk)),
                "places": [{"file": place.file, "name": place.name, "rank": place.rank} for place in chunk.places],
            }
            for chunk in tensor.chunks
        ],
    }
