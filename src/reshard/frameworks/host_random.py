"""The random generators that every run on the host has: Python's and numpy's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from reshard.errors import MetadataError


def host_random_states() -> dict[str, Any]:
    """The states of Python's and of numpy's global generator, as values of JSON and arrays."""
    version, internal, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator is what users draw from
    return {
        "python": {"version": version, "state": np.array(internal, np.uint32), "gauss": gauss},
        "numpy": legacy,
    }


def restore_host_random_states(states: Mapping[str, Any]) -> None:
    """Give both generators these states.

    Raises:
        MetadataError: values that `host_random_states` didn't make.
    """
    try:
        python = states["python"]
        random.setstate((int(python["version"]), tuple(python["state"].tolist()), python["gauss"]))
        np.random.set_state(states["numpy"])  # noqa: NPY002 - the generator that users draw from
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise misunderstood(error) from error


def misunderstood(error: Exception) -> MetadataError:
    """The error about random states that a generator doesn't take."""
    return MetadataError("the random states of a checkpoint can't be understood", field="random", found=f"{type(error).__name__}: {error}")


def reseed_host(seed: int) -> None:
    """Seed both generators.

    Args:
        seed: 64 bits.
    """
    random.seed(seed)
    # numpy's seed is 32 bits, or a sequence of such.
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002 - the generator that users draw from
