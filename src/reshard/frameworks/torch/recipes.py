"""How torch's own optimizers make the state of a parameter at its first step: the same slots without a step.

Source: `_init_group` of each class in `torch.optim` (2.8 to 2.13). No recipe draws random numbers or communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import optim

Group = Mapping[str, Any]
Slots = dict[str, Callable[[], Any]]
"""For each slot, in torch's order, what makes its first value: a tensor, or a number for what the optimizer keeps as a number."""


def recipe_of(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots | None:
    """The slots that an optimizer gives a parameter at its first step; None for an optimizer that torch doesn't come with.

    Args:
        optimizer: without wrappers around it.
        group: the parameter's group.
        parameter: the parameter.
    """
    recipe = _recipe_of_class(type(optimizer))
    return None if recipe is None else recipe(optimizer, group, parameter)


def has_recipe(optimizer: optim.Optimizer) -> bool:
    """Whether torch comes with the optimizer, so that `recipe_of` knows its slots."""
    return _recipe_of_class(type(optimizer)) is not None


@cache
def is_adam(kind: type[optim.Optimizer]) -> bool:
    """Whether the `exp_avg` and `exp_avg_sq` of a class of optimizers are Adam's moments, by the names of the class and its bases."""
    names = [base.__name__.lower() for base in kind.__mro__]
    return any("adam" in name for name in names) and not any("adamax" in name for name in names)


@cache
def _recipe_of_class(kind: type) -> Callable[[optim.Optimizer, Group, torch.Tensor], Slots] | None:
    for base in kind.__mro__:
        recipe = _RECIPES.get(base.__name__) if base.__module__.startswith("torch.optim") else None
        if recipe is not None:
            # A subclass that makes its state in its own way is an optimizer that torch doesn't come with.
            maker = "_init_group" if hasattr(base, "_init_group") else "step"
            return recipe if getattr(kind, maker) is getattr(base, maker) else None
    return None


def makes_state_at_once(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer gives every parameter its state when it is made, and misses it when it is gone (Adagrad)."""
    return isinstance(optimizer, optim.Adagrad)


def _scalar_dtype(*, fused: bool = False) -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32


def _number(value: float, device: torch.device | str = "cpu", *, fused: bool = False) -> Callable[[], torch.Tensor]:
    return lambda: torch.full((), value, dtype=_scalar_dtype(fused=fused), device=device)


def _like(parameter: torch.Tensor, value: float = 0.0) -> Callable[[], torch.Tensor]:
    if value == 0.0:
        return lambda: torch.zeros_like(parameter, memory_format=torch.preserve_format)
    filled = complex(value, value) if parameter.is_complex() else value
    return lambda: torch.full_like(parameter, filled, memory_format=torch.preserve_format)


def _step(group: Group, parameter: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A step count: on the host, unless the step runs in one kernel or in a graph."""
    fused = bool(group.get("fused"))
    return _number(0.0, parameter.device if fused or group.get("capturable") else "cpu", fused=fused)


def _adam(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    slots: Slots = {"step": _step(group, parameter), "exp_avg": _like(parameter), "exp_avg_sq": _like(parameter)}
    if group.get("amsgrad"):
        slots["max_exp_avg_sq"] = _like(parameter)
    return slots


def _nadam(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    device = parameter.device if group["capturable"] else "cpu"
    return {
        "step": _step(group, parameter),
        "mu_product": _number(1.0, device),
        "exp_avg": _like(parameter),
        "exp_avg_sq": _like(parameter),
    }


def _adamax(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    return {"step": _step(group, parameter), "exp_avg": _like(parameter), "exp_inf": _like(parameter)}


def _sparse_adam(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    return {"step": lambda: 0, "exp_avg": _like(parameter), "exp_avg_sq": _like(parameter)}


def _adadelta(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    return {"step": _step(group, parameter), "square_avg": _like(parameter), "acc_delta": _like(parameter)}


def _adagrad(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    return {"step": _step(group, parameter), "sum": _like(parameter, optimizer.defaults["initial_accumulator_value"])}


def _asgd(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    device = parameter.device
    return {
        "step": _number(0.0, device),
        "eta": _number(float(group["lr"]), device),
        "mu": _number(1.0, device),
        "ax": _like(parameter),
    }


def _rmsprop(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    slots: Slots = {"step": _step(group, parameter), "square_avg": _like(parameter)}
    if group["momentum"] > 0:
        slots["momentum_buffer"] = _like(parameter)
    if group["centered"]:
        slots["grad_avg"] = _like(parameter)
    return slots


def _rprop(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    return {"step": _step(group, parameter), "prev": _like(parameter), "step_size": _like(parameter, float(group["lr"]))}


def _sgd(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    return {"momentum_buffer": _like(parameter)} if group["momentum"] != 0 else {}


def _muon(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    return {"momentum_buffer": _like(parameter)}


def _adafactor(optimizer: optim.Optimizer, group: Group, parameter: torch.Tensor) -> Slots:
    if parameter.dim() <= 1:
        return {"step": _number(0.0), "variance": _like(parameter)}
    row, column = list(parameter.shape), list(parameter.shape)
    row[-1], column[-2] = 1, 1
    return {
        "step": _number(0.0),
        "row_var": lambda: parameter.new_zeros(row),
        "col_var": lambda: parameter.new_zeros(column),
    }


_RECIPES: Mapping[str, Callable[[optim.Optimizer, Group, torch.Tensor], Slots]] = {
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _nadam,
    "RAdam": _adam,
    "Adamax": _adamax,
    "SparseAdam": _sparse_adam,
    "Adadelta": _adadelta,
    "Adagrad": _adagrad,
    "Adafactor": _adafactor,
    "ASGD": _asgd,
    "RMSprop": _rmsprop,
    "Rprop": _rprop,
    "SGD": _sgd,
    "Muon": _muon,
}
