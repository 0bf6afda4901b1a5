"""Hyper-parameters by parameter name become the options of a run's own groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reshard.errors import MismatchError
from reshard.frameworks.torch.optimizers import OptimizedParameter
from reshard.frameworks.torch.values import from_value
from reshard.state import ParameterGroup

RunGroups = Sequence[tuple[dict[str, Any], Sequence[OptimizedParameter]]]

# How a step is computed, not what it computes: the run has chosen, for its own devices.
_OF_THE_RUN = frozenset({"foreach", "fused", "capturable", "differentiable"})

# What torch's schedulers keep in groups: it comes back also when the scheduler is made after the load.
_OF_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})


def check_groups(run: RunGroups, stored: Sequence[ParameterGroup]) -> None:
    """See that each of the run's groups can take the hyper-parameters of its parameters.

    Raises:
        MismatchError: two parameters of one group have different ones in the checkpoint.
    """
    for _ in _matched(run, stored):
        pass


def install_groups(run: RunGroups, stored: Sequence[ParameterGroup]) -> None:
    """Give the run's groups the hyper-parameters that the checkpoint has for their parameters.

    Options that the run's optimizer doesn't know are left out, and those that say how a step is computed stay the run's own, as does
    whether an option is a tensor: a tensor is filled in place, so that schedulers and compiled steps keep it. A group without a parameter
    that the checkpoint knows stays as it is.

    Raises:
        MismatchError: as `check_groups`.
    """
    for group, options in _matched(run, stored):
        for name, value in options.items():
            group[name] = _converted(from_value(value), group[name]) if name in group else from_value(value)


def _matched(run: RunGroups, stored: Sequence[ParameterGroup]) -> list[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Each of the run's groups with the options that the checkpoint has for it."""
    owner = {name: index for index, group in enumerate(stored) for name in group.parameters}
    result = []
    for group, members in run:
        wanted = (set(group) | _OF_SCHEDULERS) - _OF_THE_RUN - {"params", "param_names"}
        # One parameter for each of the checkpoint's groups that this group meets: there are many parameters and few groups.
        met = {owner[one.name]: one.name for one in reversed(members) if one.name in owner}
        offers = [(name, {key: value for key, value in stored[index].options.items() if key in wanted}) for index, name in met.items()]
        for name, options in offers[1:]:
            if options != offers[0][1]:
                _refuse(name, options, *offers[0])
        if offers:
            result.append((group, offers[0][1]))
    return result


def _refuse(name: str, options: Mapping[str, Any], first_name: str, first: Mapping[str, Any]) -> None:
    for option in sorted(set(options) | set(first)):
        mine, theirs = options.get(option), first.get(option)
        if mine == theirs or (isinstance(mine, float) and isinstance(theirs, float) and math.isnan(mine) and math.isnan(theirs)):
            continue
        raise MismatchError(
            "parameters of one optimizer group have different hyper-parameters in the checkpoint",
            field=option,
            found=f"{mine!r} for {name}",
            expected=f"{theirs!r}, as for {first_name}",
            fix="give them groups of their own, as in the run that saved the checkpoint",
        )


def _converted(value: Any, present: Any) -> Any:
    """An option's new value, as the run keeps it: in its own tensor, or as a number where it has a number."""
    if isinstance(present, torch.Tensor):
        if isinstance(value, torch.Tensor):
            return present.copy_(value)
        return present.fill_(value) if isinstance(value, bool | int | float) else value
    if isinstance(value, torch.Tensor) and isinstance(present, bool | int | float) and value.numel() == 1:
        return value.item()
    if isinstance(present, list | tuple) and isinstance(value, list | tuple) and len(present) == len(value):
        return type(present)(_converted(new, old) for new, old in zip(value, present, strict=True))
    return value
