"""The command itself: `reshard [--version] SUBCOMMAND …`."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from reshard.cli.convert import convert
from reshard.cli.export import export
from reshard.cli.ls import ls
from reshard.cli.output import EXIT_ERROR, is_output_lost, print_error, reporting
from reshard.cli.plan import plan
from reshard.cli.prune import prune
from reshard.cli.show import show
from reshard.cli.train import train
from reshard.cli.verify import verify
from reshard.errors import ReshardError
from reshard.version import __version__

app = typer.Typer(
    help="Save a training run under any parallel strategy, resume it under any other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reshard {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Save a training run under any parallel strategy, resume it under any other."""


app.command()(reporting(export))
app.command()(reporting(ls))
app.command()(reporting(show))
app.command()(reporting(plan))
app.command()(reporting(convert))
app.command()(reporting(prune))
app.command()(reporting(train))
app.command()(reporting(verify))


def main() -> None:
    """What the script `reshard` calls."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character, or a path that is no text, is no reason to end in a traceback.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(prog_name="reshard")
        finally:
            # What is in the buffer still can fail: here, while it can be said.
            sys.stdout.flush()
    except OSError as error:
        if not is_output_lost():
            raise
        if not isinstance(error, BrokenPipeError):
            print_error(ReshardError("the output can't be written", found=error.strerror or str(error), fix="free some space there"))
        sys.exit(EXIT_ERROR)
