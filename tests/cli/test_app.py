"""The command as a whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reshard.version import __version__
from tests.golden import GOLDEN

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_version(run_reshard: Run) -> None:
    done = run_reshard("--version")
    assert (done.returncode, done.stdout) == (0, f"reshard {__version__}\n")


def test_help_lists_the_subcommands(run_reshard: Run) -> None:
    done = run_reshard("--help")
    assert done.returncode == 0
    for name in ("ls", "show", "train"):
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("arguments", [("nothing",), ("ls",), ("ls", "--nothing", "x"), ("show",)])
def test_a_wrong_command_line_ends_with_code_2(arguments: tuple[str, ...], run_reshard: Run) -> None:
    done = run_reshard(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_listing_loads_no_framework(run_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path) -> None:
    code = (
        "import sys\nfrom reshard.cli.app import app\ntry:\n    app(['ls', sys.argv[1]])\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, sep='\\n')"
    )
    loaded = run_python(code, str(tmp_path)).stdout.split()
    assert "reshard.cli.ls" in loaded
    assert not {"torch", "mindspore", "transformers", "reshard.training"} & set(loaded)


def test_a_terminal_that_lacks_a_character_gets_no_traceback(
    run_reshard: Run, monkeypatch: pytest.MonkeyPatch, process_environment: dict[str, str]
) -> None:
    monkeypatch.setitem(process_environment, "PYTHONIOENCODING", "ascii")
    done = run_reshard("show", GOLDEN / "dp2_tp2" / "checkpoint", "embedding.word_embeddings.weight")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2502" in done.stdout


def test_a_path_that_is_no_text_gets_no_traceback(
    run_reshard: Run, monkeypatch: pytest.MonkeyPatch, process_environment: dict[str, str], tmp_path: Path
) -> None:
    monkeypatch.setitem(process_environment, "PYTHONIOENCODING", "utf-8:strict")
    root = tmp_path / os.fsdecode(b"root\xff")
    shutil.copytree(GOLDEN / "dp2_tp2" / "checkpoint", root)
    done = run_reshard("ls", root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "root\\udcff" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("--version",), ("ls",), ("show",), ("show", "--json")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing_is_said_in_one_error(
    arguments: tuple[str, ...], unbuffered: str, process_environment: dict[str, str]
) -> None:
    paths = [] if arguments == ("--version",) else [str(GOLDEN / "dp2_tp2" / "checkpoint")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "reshard", *arguments, *paths],
            env=process_environment | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[:2] == ["error: the output can't be written", "  found:    No space left on device"]
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


def test_a_reader_that_goes_away_is_no_error_to_tell(process_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "reshard", "show", "--json", str(GOLDEN / "dp2_tp2" / "checkpoint")]
    with subprocess.Popen(command, env=process_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) != 0
