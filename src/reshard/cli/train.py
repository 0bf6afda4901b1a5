"""`reshard train CONFIG.yaml`: the reference trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reshard.config.validation import read_config


def train(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML file.", show_default=False)],
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            help="How many ranks to start on this machine; else as many as the parallel sizes make up.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Another value for a field, as in --set runner_config.max_steps=40; may be repeated.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a Qwen3 under the strategy of a configuration; save, resume and reshard as it says. Under torchrun it is one rank of it.

    The exit code is 0 when the last step is done; 75 when the run stopped before, after SIGTERM or stop_after_minutes, and can be
    started again to go on; 128 and the number of the signal when one stopped it and nothing could be saved.
    """
    configuration = read_config(config, overrides or ())
    # Torch is imported only now: a mistake in the configuration shows at once.
    from reshard.training.launcher import RankFailedError, launch

    try:
        launch(configuration, nproc)
    except RankFailedError as failure:
        # The stack that matters is the rank's, and the message has it.
        typer.echo(str(failure), err=True)
        raise typer.Exit(1) from None
