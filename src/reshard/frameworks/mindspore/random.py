"""The random generators of a MindSpore process: the host's, MindSpore's generator, its global seed and its operators' seeds.

Kernels that keep a generator of their own once they run (dropout on the CPU) give no way to look inside: what they draw after a resume is
what a new process with these seeds draws.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import mindspore
import numpy as np

from reshard.frameworks.host_random import host_random_states, misunderstood, reseed_host, restore_host_random_states

# Global seeds are 32 bits in some releases.
_SEEDS = 2**31


def random_states() -> dict[str, Any]:
    """The states of all generators, as values of JSON and arrays."""
    seeds = [[kernel, number, seed] for (kernel, number), seed in _operator_seeds().items()]
    own = {"generator": mindspore.get_rng_state().asnumpy().copy(), "seed": mindspore.get_seed(), "operators": seeds}
    return {**host_random_states(), "mindspore": own}


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Give the generators these states.

    Raises:
        MetadataError: values that `random_states` didn't make.
    """
    try:
        own = states["mindspore"]
        operators = {(str(kernel), int(number)): int(seed) for kernel, number, seed in own["operators"]}
        if own["seed"] is not None:
            mindspore.set_seed(int(own["seed"]))  # it seeds numpy, too: what follows puts that right
        mindspore.set_rng_state(mindspore.Tensor(np.array(own["generator"], np.uint8)))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise misunderstood(error) from error
    _operator_seeds().clear()
    _operator_seeds().update(operators)
    restore_host_random_states(states)


def reseed(seed: int) -> None:
    """Seed all generators.

    Args:
        seed: 64 bits.
    """
    mindspore.set_seed(seed % _SEEDS)
    mindspore.manual_seed(seed % _SEEDS)
    reseed_host(seed)


def _operator_seeds() -> dict[tuple[str, int], int]:
    """How far the seeds of operators have gone: MindSpore counts them up at every use, and has no public name for them."""
    return sys.modules["mindspore.common.seed"]._KERNEL_SEED
