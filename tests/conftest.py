"""What all tests share: hypothesis profiles, the budget of a sweep, and ways to run this package in a process of its own."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from reshard.cli.app import main
from tests import faults
from tests.processes import RankPool

REPOSITORY = Path(__file__).resolve().parent.parent

# `make test` tries the same few examples each time: a red run is red again. A sweep tries many, other ones each time, and prints how to
# come back to a failure. No deadlines: the machine may be busy.
_CALM = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
settings.register_profile("fast", max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=_CALM)
settings.register_profile("sweep", max_examples=1000, deadline=None, database=None, print_blob=True, suppress_health_check=_CALM)
settings.load_profile("fast")

# Files of tests that take minutes.
_LONGEST = ("test_demo.py", "test_real_ranks.py")

# `make sweep` gives a budget in seconds; 0 is no budget.
_SWEEP_SECONDS = float(os.environ.get("SWEEP_SECONDS") or 0)
_STARTED = time.monotonic()
# Where the counts of faults are kept.
_FAULTS_FILE = os.environ.get("FAULTS_FILE")
_SEED = int(os.environ.get("SWEEP_SEED") or time.time())


def _is_sweep(config: pytest.Config) -> bool:
    return "sweep or property" in config.option.markexpr


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not _is_sweep(config):
        return []
    budget = f"{_SWEEP_SECONDS:.0f} s" if _SWEEP_SECONDS else "none"
    return [f"sweep: budget {budget}, order SWEEP_SEED={_SEED}"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.property)
        if "tried" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.fault)
    # First what takes longest: whatever else there is runs beside it.
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    if _is_sweep(config):
        # With a budget the last files might never have their turn; in another order each time, all of them do. The tests of a file stay
        # together: they share what takes minutes to make.
        chance = random.Random(_SEED)
        place = {path: chance.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: place[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _SWEEP_SECONDS and _is_sweep(item.config) and time.monotonic() - _STARTED > _SWEEP_SECONDS:
        pytest.skip(f"the sweep's {_SWEEP_SECONDS:.0f} seconds are spent")


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> faults.Tried:
    """Says how many faults a test has tried: `tried(kind, points, is_part=False)`."""

    def tried(kind: str, points: int, *, is_part: bool = False) -> None:
        assert kind in faults.KINDS
        record_property(faults.PROPERTY, (kind, points, is_part))

    return tried


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = faults.tried(terminalreporter.getreports("passed"))
    failed = [report.nodeid for report in terminalreporter.getreports("failed") if "fault" in getattr(report, "keywords", ())]
    if found or failed:
        terminalreporter.section("faults that were tried")
        for kind, count in faults.totals((kind, points) for kind, points, _ in found.values()).items():
            tests = sum(other == kind for other, _, _ in found.values())
            terminalreporter.write_line(f"{count:>8,}  {faults.KINDS[kind][0]} ({tests} tests)")
        terminalreporter.write_line(f"{len(failed):>8,}  of these tests failed")
    if _FAULTS_FILE:
        faults.keep(Path(_FAULTS_FILE), found, failed, time.strftime("%Y-%m-%d"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def process_environment() -> dict[str, str]:
    """The environment for processes that a test starts: this source tree, one thread, plain output."""
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY / "src"),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "160",
        "PYTHONWARNINGS": "default",
    }


@pytest.fixture(scope="session")
def run_python(process_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a new process: `run_python(code, *arguments, check=True, cwd=None, timeout=120)`."""

    def run(
        code: str, *arguments: str, check: bool = True, cwd: Path | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=process_environment,
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def run_reshard(process_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in a new process, as a user would: `run_reshard("ls", root)`. It checks no exit code."""

    def run(*arguments: str | Path, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "reshard", *map(str, arguments)],
            env=process_environment,
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """Real ranks: `rank_pool(4).run(function, *arguments)`; one pool per world size for all tests of a module.

    Not for the whole run: every group that a test makes (a mesh makes many) leaves threads behind that wake all the time, and slow down
    what follows.
    """
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture
def call_reshard(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `run_reshard`, in this process: one of its own takes a second to begin."""

    def call(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = ["reshard", *map(str, arguments)]
        code: object = 0
        with monkeypatch.context() as patch, redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
            patch.setattr(sys, "argv", command)
            patch.setenv("NO_COLOR", "1")
            patch.setenv("COLUMNS", "160")
            if cwd is not None:
                patch.chdir(cwd)
            try:
                main()
            except SystemExit as ended:
                code = ended.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())

    return call
