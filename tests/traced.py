"""Processes whose system calls strace records, and one of which it kills or fails."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The calls that change a file system, or take its locks; one that this machine doesn't have is left out.
CALLS = (
    *("open", "openat", "creat", "write", "pwrite64", "pwritev", "truncate", "ftruncate", "fallocate", "fsync", "fdatasync"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "link", "linkat", "symlink", "symlinkat"),
    *("flock", "fchmod", "chmod", "fchmodat"),
)

_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, -1

_LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")


@dataclass(frozen=True)
class Call:
    """One system call of a recording.

    Attributes:
        name: of the call.
        number: how often its thread had called it since the recording began, this time included.
        text: what strace says of it.
    """

    name: str
    number: int
    text: str


@dataclass(frozen=True)
class Trace:
    """What strace is to do with a process.

    Attributes:
        log: the file into which it writes the calls.
        inject: what happens to which of them, as its option `--inject` says it; None to record only.
    """

    log: Path
    inject: str | None = None

    def attach(self, process: int) -> subprocess.Popen[str]:
        """Begin with a process that has stopped itself, and let it go on."""
        options = ["--follow-forks", "--decode-fds=path", "--string-limit=0", f"--output={self.log}"]
        options += [f"--trace={','.join(f'?{name}' for name in CALLS)}", *([] if self.inject is None else [f"--inject={self.inject}"])]
        strace = subprocess.Popen(["strace", *options, f"--attach={process}"], stderr=subprocess.PIPE, text=True)
        assert strace.stderr is not None
        said = strace.stderr.readline()
        os.kill(process, signal.SIGCONT if "attached" in said else signal.SIGKILL)
        assert "attached" in said, said
        return strace


def let_all_trace() -> None:
    """Any process of this user may attach to this one, or write into it, also where only parents are allowed to."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY))


def stop_to_be_traced() -> None:
    """Stop this process until somebody has attached to it; any process of this user may."""
    let_all_trace()
    os.kill(os.getpid(), signal.SIGSTOP)


def calls_below(log: Path, root: Path) -> list[Call]:
    """The calls of a recording that name something in a directory, by path or by an open file, in their order.

    Of two threads that call the same equally often the first one counts: strace counts the calls of each thread.
    """
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, int], Call] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:  # the end of a call, a signal, the end of a process
            continue
        thread, name, arguments = match.groups()
        counts[thread, name] += 1
        call = Call(name, counts[thread, name], f"{name}({arguments}")
        first = found.setdefault((name, call.number), call)
        if first is call and str(root) not in arguments:
            del found[name, call.number]
    return list(found.values())


@cache
def why_not() -> str | None:
    """Why nothing can be traced here; None when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "--output=/dev/null", "true"], capture_output=True, text=True, check=False)
    return f"strace can trace nothing here: {tried.stderr.strip()}" if tried.returncode else None
