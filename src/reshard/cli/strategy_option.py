"""The option that says under which strategy a checkpoint was saved that doesn't say it itself."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from reshard.sources.legacy.saved_under import SavedUnder

StrategyOption = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        help="Of MindSpore's Checkpoint 1.0 of several ranks: the strategy files of the run that saved it (a file or their directory), "
        "or a table of layouts in JSON.",
        show_default=False,
    ),
]


def source_of(path: str, strategy: str | None) -> str | SavedUnder:
    """A path of the command line, with the strategy where one is given."""
    return path if strategy is None else SavedUnder(path, os.path.abspath(strategy))
