"""Sizes, times and ranks in words; how errors end a command."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from reshard.cli.output import age_words, rank_words, reporting, shape_words, size_words, timestamp
from reshard.errors import MetadataError


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (3 * 1024**4, "3.0 TiB"),
        (2 * 1024**5, "2.0 PiB"),
    ],
)
def test_sizes(nbytes: int, words: str) -> None:
    assert size_words(nbytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (172799, "47 h"), (172800, "2 d")],
)
def test_ages(seconds: float, words: str) -> None:
    assert age_words(1000.0, now=1000.0 + seconds) == words


def test_times_are_utc() -> None:
    assert timestamp(0.0) == "1970-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([], ""),
        ([0], "0"),
        ([2, 0, 1], "0-2"),
        ([0, 2, 4, 5, 6], "0,2,4-6"),
        (range(0, 20, 2), "0,2,4,6,8,10 and 4 more"),
    ],
)
def test_ranks(ranks: list[int], words: str) -> None:
    assert rank_words(ranks) == words


def test_shapes() -> None:
    assert shape_words((128, 32)) == "[128, 32]"
    assert shape_words(()) == "[]"


def failing(kind: Annotated[str, typer.Argument(help="What goes wrong.")]) -> None:
    """Fail."""
    if kind == "foreseen":
        raise MetadataError("metadata.json is not JSON", file="/x/[bold]/metadata.json", found="'{'", fix="restore the file")
    raise RuntimeError("nobody foresaw this")


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(reporting(failing))
    return app


def test_an_error_of_the_tree_ends_with_its_parts_and_code_2(command: typer.Typer) -> None:
    result = CliRunner().invoke(command, ["foreseen"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines() == [
        "error: metadata.json is not JSON",
        "  file:     /x/[bold]/metadata.json",
        "  found:    '{'",
        "  next:     restore the file",
    ]


@pytest.mark.parametrize(("arguments", "environment"), [(["foreseen", "--debug"], {}), (["foreseen"], {"RESHARD_DEBUG": "1"})])
def test_debug_lets_the_traceback_through(command: typer.Typer, arguments: list[str], environment: dict[str, str]) -> None:
    result = CliRunner().invoke(command, arguments, env=environment)
    assert isinstance(result.exception, MetadataError)


def test_an_error_that_nobody_foresaw_is_not_hidden(command: typer.Typer) -> None:
    result = CliRunner().invoke(command, ["other"])
    assert isinstance(result.exception, RuntimeError)
    assert result.exit_code == 1
