"""`reshard convert SOURCE TARGET`: another program's checkpoint becomes an iteration of a root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from reshard.cli.output import JsonOption, console, count_words, print_json, size_words
from reshard.cli.strategy_option import StrategyOption, source_of
from reshard.conversion import ConversionProgress
from reshard.conversion import convert as convert_checkpoint


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A directory of torch.distributed.checkpoint, a file of torch.save or mindspore.save_checkpoint, a directory of "
            "rank_0, rank_1, …, a folder of weights.",
            show_default=False,
        ),
    ],
    target: Annotated[str, typer.Argument(help="The checkpoint root to write into; made if needed.", show_default=False)],
    iteration: Annotated[
        int | None,
        typer.Option("--iteration", min=0, help="The number of the iteration; by default the source's step, else 0.", show_default=False),
    ] = None,
    model_prefix: Annotated[
        str | None,
        typer.Option("--model-prefix", help="What the keys of the model begin with, where that isn't recognised.", show_default=False),
    ] = None,
    optimizer_prefix: Annotated[
        str | None,
        typer.Option("--optimizer-prefix", help="What stands before the optimizer's `state.` and `param_groups.`.", show_default=False),
    ] = None,
    strategy: StrategyOption = None,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint of another kind as an iteration of a checkpoint root. Nothing there is overwritten.

    It isn't needed for a load, which takes such checkpoints as they are.
    """
    with _progress() as progress:
        done = convert_checkpoint(
            source_of(source, strategy),
            os.path.abspath(target),
            iteration=iteration,
            model_prefix=model_prefix,
            optimizer_prefix=optimizer_prefix,
            progress=progress,
        )
    if json:
        print_json(asdict(done))
        return
    out = console()
    out.print(done.directory, soft_wrap=True)
    out.print(f"iteration {done.iteration}: {count_words(done.tensors, 'tensor')}, {size_words(done.nbytes)}", soft_wrap=True)
    for note in done.notes:
        out.print(f"note: {note}", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[ConversionProgress | None]:
    """A bar on the error stream where that is a terminal; it goes when the work is done."""
    out = console(error=True)
    if not out.is_terminal:
        yield None
        return
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
