"""How much memory a load may take beyond the run's own state."""

from __future__ import annotations

from reshard.errors import UsageError

MEMORY_BUDGET = 256 << 20
"""Bytes for staging buffers, mapped windows and messages, unless the load is told otherwise."""

# With less there is no block that would be worth a call, and a message holds less than what it costs.
_LEAST_BUDGET = 1 << 20


def check_budget(memory_budget: int) -> None:
    """See that a load can work with so many bytes.

    Raises:
        UsageError: it can't.
    """
    if memory_budget < _LEAST_BUDGET:
        raise UsageError(
            "too little memory to load with", field="memory_budget", found=memory_budget, expected=f"at least {_LEAST_BUDGET} bytes"
        )
