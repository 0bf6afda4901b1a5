"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reshard import __version__

REPOSITORY = Path(__file__).resolve().parent.parent


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, system, versions, the commit, and how busy the machine is."""
    return {
        "processor": _first_of("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first_of("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "reshard": __version__,
        "commit": _commit(),
        "load_average": os.getloadavg(),
    }


def _first_of(file: str, name: str) -> str | None:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def _commit() -> str | None:
    """The commit of this repository, with a plus where files differ from it; None outside of one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
