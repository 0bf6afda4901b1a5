"""Real processes are killed at every system call of a save, or it fails: what was committed is there, and the next save works."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from reshard.saving.report import AsyncSave
from tests.faults import FAILURE_OF_CALL, KILL_AT_CALL, Tried
from tests.forked import REFUSED, SAVED, SocketCommunicator, run_job
from tests.saving.test_kills import AGAIN, FIRST, NEXT, STEPS, VERSION, check, check_root, prepare, save, tracked, versions
from tests.traced import Call, Trace, calls_below, why_not

# Ranks race for the directories that all of them make: a call that only some recordings have is no point, and one that wasn't reached
# is tried again.
RECORDINGS, ATTEMPTS = 3, 5

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Job:
    """The same save, again and again, each time from the same begin.

    Args:
        directory: for all that it needs.
        action: what is saved.
        world_size: the number of ranks.
        mode: how.
    """

    def __init__(self, directory: Path, action: str, world_size: int, mode: AsyncSave | None) -> None:
        self.action, self.world_size, self.mode = action, world_size, mode
        self.start, self.root, self.log = directory / "start", directory / "root", directory / "log"
        prepare(self.start, action, world_size)
        self.existing = versions(self.start) if self.start.exists() else {}

    def run(self, victim: int, inject: str | None = None) -> list[int]:
        """How the ranks end of which one is traced."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, self.root)

        def work(comm: SocketCommunicator) -> None:
            save(self.root, comm, STEPS[self.action], VERSION, None, self.mode)

        return run_job(self.world_size, work, traced=victim, trace=Trace(self.log, inject))

    def calls(self, victim: int) -> list[Call]:
        """The calls of a rank that have to do with the root."""
        found: list[dict[tuple[str, int], Call]] = []
        for _ in range(RECORDINGS):
            assert self.run(victim) == [SAVED] * self.world_size
            found.append({(call.name, call.number): call for call in calls_below(self.log, self.root)})
        return [call for name, call in found[0].items() if all(name in other for other in found)]

    def strike(self, victim: int, call: Call, how: str) -> list[int]:
        """Run until the call is struck."""
        for _ in range(ATTEMPTS):
            codes = self.run(victim, f"{call.name}:{how}:when={call.number}")
            text = self.log.read_text(encoding="utf-8", errors="replace")
            if "(INJECTED)" in text or "killed by SIGKILL" in text:
                return codes
        pytest.fail(f"{call.name} number {call.number} of rank {victim} was never reached again: {call.text}")


def kill_everywhere(directory: Path, action: str, world_size: int, mode: AsyncSave | None, every: int = 1) -> int:
    """Kill each rank at so many of its calls; how many kills that were."""
    job = Job(directory, action, world_size, mode)
    kills = 0
    for victim in range(world_size):
        calls = job.calls(victim)
        assert len(calls) >= (50 if victim == 0 else 12), [call.text for call in calls]
        for call in calls[victim % every :: every]:
            codes = job.strike(victim, call, "signal=KILL")
            check(job.root, action, world_size, codes, victim, f"rank {victim} of {world_size}, {call.number}. {call.text}")
            kills += 1
        assert kills >= len(calls) // every
    return kills


def fail_everywhere(directory: Path, action: str, world_size: int, mode: AsyncSave | None, code: int, every: int = 1) -> int:
    """Let so many calls of each rank fail, each in a run of its own; how many that were."""
    job = Job(directory, action, world_size, mode)
    failures = 0
    for victim in range(world_size):
        calls = job.calls(victim)
        assert len(calls) >= (50 if victim == 0 else 12), [call.text for call in calls]
        for call in calls[victim % every :: every]:
            codes = job.strike(victim, call, f"error={errno.errorcode[code]}")
            where = f"rank {victim} of {world_size}, {call.number}. {call.text}"
            assert codes in ([SAVED] * world_size, [REFUSED] * world_size), f"{where}: {codes}"
            found, now = (versions(job.root), tracked(job.root)) if job.root.exists() else ({}, None)
            if codes[0] == SAVED:
                assert now == STEPS[action], where
                assert found[now] == VERSION, where
            else:
                assert found == job.existing, where
                assert now == (2 if job.existing else None), where
            check_root(job.root, action, world_size, where)
            failures += 1
        assert failures >= len(calls) // every
    return failures


def test_a_process_is_killed_at_a_system_call(tmp_path: Path, tried: Tried) -> None:
    tried(KILL_AT_CALL, kill_everywhere(tmp_path, NEXT, 1, None, every=9), is_part=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_system_call_fails(tmp_path: Path, tried: Tried, code: int) -> None:
    tried(FAILURE_OF_CALL, fail_everywhere(tmp_path, NEXT, 1, None, code, every=13), is_part=True)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", [None, "copy"])
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("action", [FIRST, NEXT, AGAIN])
def test_a_process_is_killed_at_every_system_call(
    tmp_path: Path, tried: Tried, action: str, world_size: int, mode: AsyncSave | None
) -> None:
    tried(KILL_AT_CALL, kill_everywhere(tmp_path, action, world_size, mode))


@pytest.mark.sweep
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("action", [FIRST, NEXT, AGAIN])
def test_every_system_call_fails(tmp_path: Path, tried: Tried, action: str, world_size: int, code: int) -> None:
    tried(FAILURE_OF_CALL, fail_everywhere(tmp_path, action, world_size, None, code))
