"""`reshard export CHECKPOINT FOLDER`: a checkpoint becomes a folder that transformers opens, or one that MindSpore Transformers loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from reshard.cli.output import console, print_lines
from reshard.conversion import convert
from reshard.errors import UsageError
from reshard.export.job import Progress as ExportProgress
from reshard.export.job import export_checkpoint


class Format(str, Enum):
    """What an export makes."""

    HF = "hf"
    MINDSPORE = "mindspore"


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint root (its tracker is obeyed), one iteration, or a folder of weights.", show_default=False)
    ],
    folder: Annotated[str, typer.Argument(help="The folder to make.", show_default=False)],
    kind: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf: what transformers' from_pretrained opens. mindspore: a checkpoint root with the names of MindSpore Transformers, the "
            "optimizer's tensors included.",
        ),
    ] = Format.HF,
    family: Annotated[
        str | None, typer.Option("--family", help="The model's family, such as qwen3.", show_default="recognised by its config.json")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Convert floating tensors, as in --dtype bfloat16.", show_default="as stored")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="The most that a file may hold.")] = "5GB",
    config: Annotated[
        str | None,
        typer.Option("--config", help="The model's config.json, or a folder that has it.", show_default="what was saved with the run"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder of weights that is there.")] = False,
) -> None:
    """Write the model of a checkpoint as a folder of Hugging Face weights, whatever strategy it was saved under.

    Under torchrun the ranks share the files out between them. With --format mindspore one process writes an iteration of a checkpoint root,
    which is never overwritten: of Hugging Face weights number 0.
    """
    if kind is Format.MINDSPORE:
        _export_mindspore(checkpoint, folder, family=family, dtype=dtype, config=config, force=force)
        return
    with _ranks() as rank, _progress(shown=rank == 0) as progress:
        report = export_checkpoint(
            checkpoint, folder, dtype=dtype, max_shard_size=max_shard_size, config=config, force=force, progress=progress, family=family
        )
    if rank == 0:
        print_lines(console(), [str(report), *(f"  note: {note}" for note in report.notes)])


def _export_mindspore(checkpoint: str, folder: str, *, family: str | None, dtype: str | None, config: str | None, force: bool) -> None:
    if force:
        raise UsageError("a checkpoint root is never replaced", field="--force", file=folder, fix="give another folder")
    if _world_size() > 1:
        raise UsageError("this export is the work of one process", field="--format", found="mindspore", fix="start it without torchrun")
    with _progress(shown=True) as progress:
        done = convert(checkpoint, folder, naming="mindspore", model_family=family, config=config, dtype=dtype, progress=progress)
    print_lines(console(), [f"{done.directory}: {done.tensors} tensors, {done.nbytes / 1e6:.1f} MB", *(f"  note: {n}" for n in done.notes)])


def _world_size() -> int:
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isascii() or not given.isdigit() or not int(given):
        raise UsageError("not a number of ranks", field="WORLD_SIZE", found=repr(given), fix="unset it, or start with torchrun")
    return int(given)


@contextmanager
def _ranks() -> Iterator[int]:
    """This process's rank; of those that torchrun or a scheduler started together, else the only one, which needs no framework."""
    if _world_size() == 1 or "RANK" not in os.environ:
        yield 0
        return
    from reshard.frameworks.torch.launched import launched_ranks

    with launched_ranks() as rank:
        yield rank


@contextmanager
def _progress(*, shown: bool) -> Iterator[ExportProgress | None]:
    """A bar on the error stream where that is a terminal; it goes when the work is done."""
    out = console(error=True)
    if not shown or not out.is_terminal:
        yield None
        return
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
