"""What every subcommand shares: how errors end it, how tables look, how sizes and times are said."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.control import strip_control_codes
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from reshard.errors import ReshardError

# Wrong input and damaged checkpoints; what nobody foresaw ends with Python's 1 and a traceback.
EXIT_ERROR = 2

# Into a file or a pipe a line is never broken: whoever reads it there greps it.
_NO_LINE_END = 100_000

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="On an error show where it comes from.", envvar="RESHARD_DEBUG")]


def reporting(command: Callable[..., None]) -> Callable[..., None]:
    """A subcommand that ends in a message and exit code 2 on every error of this package; with `--debug` in a traceback instead."""
    signature = inspect.signature(command, eval_str=True)
    debug_parameter = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG)
    parameters = [*signature.parameters.values(), debug_parameter]

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ReshardError as error:
            if debug:
                raise
            print_error(error)
            raise typer.Exit(EXIT_ERROR) from None

    # What typer reads the command line's arguments from.
    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def console(*, error: bool = False) -> Console:
    """Where to print: as wide as the terminal, or without line ends in a file or a pipe."""
    made = Console(stderr=error, highlight=False, emoji=False, markup=False)
    if not made.is_terminal:
        made.width = _NO_LINE_END
    return made


def print_error(error: ReshardError) -> None:
    """The error's parts, on the error stream."""
    first, _, rest = str(error).partition("\n")
    message = Text("error: ", style="bold red").append(first, style="bold")
    if rest:
        message.append(f"\n{rest}", style="default not bold")
    console(error=True).print(message, soft_wrap=True)


def is_output_lost() -> bool:
    """Whether the output can't be written (a full disk, a closed pipe). Then what is left of it goes nowhere, so that Python's own attempt
    at its end doesn't fail too.
    """
    try:
        # An empty line: an output without a buffer fails only when it is given something.
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def print_json(document: Any) -> None:
    """A JSON document on the output; NaN and infinities, which JSON lacks, can't be in it."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> Table:
    """A table without frames.

    Args:
        columns: the header of each, and `left` or `right`, the side on which it is flush.
        rows: the cells, as plain text.
    """
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for header, side in columns:
        made.add_column(header, justify="right" if side == "right" else "left", overflow="fold", no_wrap=side == "right")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def aligned(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of many rows: measuring and wrapping tens of thousands of cells takes rich many seconds.

    Args:
        columns: as in `table`.
        rows: likewise.
    """
    cells = [[header for header, _ in columns], *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    forms = [f"{{:{'>' if side == 'right' else '<'}{width}}}" for (_, side), width in zip(columns, widths, strict=True)]
    form = "  ".join(forms).format
    return [form(*row).rstrip() for row in cells]


def print_lines(out: Console, lines: Iterable[str]) -> None:
    """Print lines as they are; as in everything that rich prints, without the characters that move the cursor."""
    out.file.writelines(f"{strip_control_codes(line)}\n" for line in lines)


def fits(out: Console, printed: Table) -> bool:
    """Whether a table has room without a broken cell."""
    return Measurement.get(out, out.options.update(max_width=_NO_LINE_END), printed).maximum <= out.width


def count_words(number: int, word: str) -> str:
    """So many of something: `1 tensor`, `2 tensors`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def size_words(nbytes: int) -> str:
    """A size in bytes as a person says it: `512 B`, `1.5 MiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        # 1023.96 would be shown as "1024.0".
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} PiB"


def age_words(modified: float, now: float | None = None) -> str:
    """How long ago a time (seconds since the epoch) was: `5 s`, `3 min`, `2 h`, `4 d`."""
    seconds = max(0.0, (time.time() if now is None else now) - modified)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        # A unit takes over at twice its length: "90 min" says more than "1 h".
        if seconds >= 2 * length:
            return f"{int(seconds / length)} {unit}"
    return f"{int(seconds)} s"


def timestamp(modified: float) -> str:
    """A time (seconds since the epoch) in ISO 8601, UTC."""
    return datetime.fromtimestamp(modified, timezone.utc).isoformat(timespec="seconds")


def rank_words(ranks: Iterable[int], most: int = 6) -> str:
    """Ranks as ranges: `0-3`, `0,2,4-7`; after `most` ranges the number of ranks that are left out."""
    ranges: list[tuple[int, int]] = []
    for rank in sorted(set(ranks)):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], rank)
        else:
            ranges.append((rank, rank))
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    left_out = sum(last - first + 1 for first, last in ranges[most:])
    return ",".join(words) + (f" and {left_out} more" if left_out else "")


def shape_words(shape: Sequence[int]) -> str:
    """A shape as it is written everywhere: `[128, 32]`, `[]` for a scalar."""
    return f"[{', '.join(map(str, shape))}]"
