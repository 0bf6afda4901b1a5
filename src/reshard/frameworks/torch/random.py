"""The random generators of a torch process: the host's, torch's own, and those of its accelerators."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from reshard.frameworks.host_random import host_random_states, misunderstood, reseed_host, restore_host_random_states
from reshard.frameworks.torch.memory import to_numpy, to_tensor


def random_states() -> dict[str, Any]:
    """The states of all generators, as values of JSON and arrays."""
    states: dict[str, Any] = {**host_random_states(), "torch": to_numpy(torch.get_rng_state(), "random state")}
    accelerator = _accelerator()
    if accelerator is not None:
        states["accelerator"] = _device_states(*accelerator)
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Give the generators these states. Those of accelerators that this process doesn't have are left out.

    Raises:
        MetadataError: values that `random_states` didn't make.
    """
    restore_host_random_states(states)
    try:
        torch.set_rng_state(_tensor(states["torch"]))
        accelerator = _accelerator()
        stored = states.get("accelerator")
        if accelerator is not None and stored is not None and stored["type"] == accelerator[0]:
            _restore_device_states(accelerator[1], stored)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise misunderstood(error) from error


def reseed(seed: int) -> None:
    """Seed all generators.

    Args:
        seed: 64 bits.
    """
    reseed_host(seed)
    if seed >= 2**32:
        # The generator of torch's CPU takes the low 32 bits only: all of the seed must show in them.
        seed = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest(), "little")
    torch.manual_seed(seed)


def _accelerator() -> tuple[str, Any] | None:
    """The kind of accelerator in use and torch's module for it (`torch.cuda`, …)."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else (device.type, torch.get_device_module(device))


def _device_states(kind: str, module: Any) -> dict[str, Any]:
    current = module.current_device()
    others = [index for index in range(module.device_count()) if index != current]
    states: dict[str, Any] = {
        "type": kind,
        "current": to_numpy(module.get_rng_state(current), "random state"),
        "others": {str(index): to_numpy(module.get_rng_state(index), "random state") for index in others},
    }
    tracked = _tracked()
    if tracked is not None:
        states["dtensor"] = {name: to_numpy(state, "random state") for name, state in tracked.items()}
    return states


def _restore_device_states(module: Any, stored: Mapping[str, Any]) -> None:
    # The device that this process works on takes the state of the one that it worked on, whatever their numbers.
    for index, state in stored["others"].items():
        if int(index) < module.device_count():
            module.set_rng_state(_tensor(state), int(index))
    module.set_rng_state(_tensor(stored["current"]), module.current_device())
    tracked = _tracked()
    if tracked is not None:
        tracked.update({name: _tensor(state) for name, state in stored.get("dtensor", {}).items()})


def _tracked() -> dict[str, torch.Tensor] | None:
    """The states that DTensor's operators keep apart from the device's generator, in releases where they do (2.8)."""
    module = sys.modules.get("torch.distributed.tensor._random")
    return getattr(getattr(module, "_rng_tracker", None), "rng_states", None)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return to_tensor(array, torch.uint8)
