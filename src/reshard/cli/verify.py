"""`reshard verify CHECKPOINT`: whether every byte of a checkpoint is as it was saved, and what isn't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from reshard.cli.output import JsonOption, console, print_error, print_json, print_lines, size_words
from reshard.errors import DamagedCheckpointError
from reshard.verification import RootVerification, Verification, verify_all
from reshard.verification import verify as verify_one
from reshard.verification.checkpoint import READERS
from reshard.verification.checkpoint import Progress as VerifyProgress

EXIT_DAMAGED = 1
"""Something is not as it was saved. A mistake of the caller's, or a storage that refuses, ends with 2 as everywhere."""


def verify(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint root (its tracker is obeyed), or one iteration.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="Verify every iteration of the root, and its tracker.")] = False,
    readers: Annotated[int, typer.Option("--readers", min=1, help="How many files to read at a time.")] = READERS,
    json: JsonOption = False,
) -> None:
    """Read a checkpoint whole and name every fault in it. Ends with 0 when it is intact, with 1 when it is damaged."""
    try:
        with _progress() as progress:
            found = (verify_all if every else verify_one)(checkpoint, readers=readers, progress=progress)
    except DamagedCheckpointError as error:
        # The root's tracker: which checkpoint is meant can't be known.
        print_error(error)
        raise typer.Exit(EXIT_DAMAGED) from None
    if json:
        print_json(_document(found))
    else:
        _print(console(), found)
    if not found.is_intact:
        raise typer.Exit(EXIT_DAMAGED)


@contextmanager
def _progress() -> Iterator[VerifyProgress | None]:
    """A bar on the error stream where that is a terminal; it goes when the work is done."""
    out = console(error=True)
    if not out.is_terminal:
        yield None
        return
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(out: Console, found: Verification | RootVerification) -> None:
    if isinstance(found, Verification):
        out.print(found.directory, soft_wrap=True)
        print_lines(out, [_state_words(found), *_details(found)])
        return
    out.print(found.root, soft_wrap=True)
    for one in found.iterations:
        print_lines(out, [f"iteration {one.iteration}: {_state_words(one)}", *_details(one)])
    if found.tracker is not None:
        print_lines(out, [f"tracker: {found.tracker}"])


def _state_words(found: Verification) -> str:
    """In one line how it is."""
    looked = f"{found.files} file{'' if found.files == 1 else 's'}"
    if found.faults:
        damaged = len({fault.file for fault in found.faults})
        return f"damaged: {_count(len(found.faults), 'fault')} in {_count(damaged, 'file')}, {looked} looked at"
    if found.is_sealed:
        return f"intact: {looked}, {size_words(found.nbytes)}, every byte as it was saved"
    return f"no fault found: {looked}; their names, sizes and headers fit"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _details(found: Verification) -> list[str]:
    """The faults file by file, then the notes."""
    lines = []
    file = None
    for fault in found.faults:
        if fault.file != file:
            file = fault.file
            lines.append(f"  {file}")
        lines.append(f"    {fault}")
    return [*lines, *(f"  note: {note}" for note in found.notes)]


def _document(found: Verification | RootVerification) -> dict[str, Any]:
    if isinstance(found, Verification):
        return {"is_intact": found.is_intact, **asdict(found)}
    return {
        "root": found.root,
        "is_intact": found.is_intact,
        "tracker": None if found.tracker is None else asdict(found.tracker),
        "iterations": [_document(one) for one in found.iterations],
    }
