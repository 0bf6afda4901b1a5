"""MindSpore optimizers as slots, step counts and hyper-parameters by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from reshard.errors import CaptureError, UsageError
from reshard.format.names import parse_tensor_name
from reshard.frameworks.mindspore.cells import OPTIMIZERS, NamedTensors
from reshard.state import Kind, ParameterGroup, TensorKey

# AdamW's moments have these names whatever an optimizer calls them, so that a run can move between frameworks with its optimizer.
_ADAM_SLOTS = {"moment1": "adam_m", "moment2": "adam_v", "exp_avg": "adam_m", "exp_avg_sq": "adam_v"}

# Parameters of an optimizer that hold hyper-parameters, or follow from the step count and them: `capture_groups` keeps what they say.
_RATE = "learning_rate"
_DERIVED = ("beta1_power", "beta2_power", "momentum")


@dataclass(frozen=True)
class Counter:
    """Where an optimizer counts its steps.

    Attributes:
        tensor: of one element.
        ahead: what the step count is more than the tensor says.
    """

    tensor: Parameter
    ahead: int

    @property
    def value(self) -> int:
        """The step count."""
        return int(self.tensor.asnumpy().reshape(()).item()) + self.ahead

    def set(self, steps: int) -> None:
        """Count from here."""
        self.tensor.assign_value(Tensor(np.full(self.tensor.shape, steps - self.ahead, self.tensor.asnumpy().dtype)))


@dataclass
class CapturedOptimizer:
    """An optimizer taken apart.

    Attributes:
        optimizer: the optimizer.
        parameters: the global names of its parameters, in its order.
        slots: what it keeps, by key.
        owners: the parameter of each slot that belongs to one, by key.
        scalars: its hyper-parameters that are parameters themselves, by MindSpore's name.
        counters: where it counts its steps.
    """

    optimizer: nn.Cell
    parameters: list[str]
    slots: dict[TensorKey, Parameter] = field(default_factory=dict)
    owners: dict[TensorKey, Parameter] = field(default_factory=dict)
    scalars: dict[str, Parameter] = field(default_factory=dict)
    counters: list[Counter] = field(default_factory=list)


def list_optimizers(optimizer: Any) -> list[nn.Cell]:
    """The optimizers of one, a list or a dictionary of them (its keys mean nothing).

    Raises:
        UsageError: something else than optimizers.
    """
    if optimizer is None:
        return []
    given = list(optimizer.values()) if isinstance(optimizer, Mapping) else optimizer
    given = list(given) if isinstance(given, list | tuple) else [given]
    for one in given:
        if not isinstance(one, OPTIMIZERS):
            raise UsageError(
                "not an optimizer",
                field="optimizer",
                found=type(one).__name__,
                expected="MindSpore optimizers, a list or dictionary of them",
            )
    return given


def take_apart(optimizer: nn.Cell, model: NamedTensors) -> CapturedOptimizer:
    """An optimizer's parameters, slots, counters and hyper-parameters.

    Raises:
        CaptureError: a parameter that isn't the model's, or two slots under one name.
    """
    own: dict[str, Parameter] = {}
    renamed: dict[str, str] = {}
    for parameter in optimizer.parameters:
        name = model.names.get(id(parameter))
        if name is None:
            raise CaptureError(
                "an optimizer has a parameter that isn't the model's",
                tensor=parameter.name,
                found=f"in {type(optimizer).__name__}",
                fix="give the network together with the optimizer",
            )
        own[name] = parameter
        renamed[parameter.name] = name
    result = CapturedOptimizer(optimizer, list(own))
    is_own = {id(parameter) for parameter in own.values()}
    for parameter in optimizer.get_parameters():
        if id(parameter) not in is_own:
            _sort_in(result, parameter, own, renamed)
    return result


def _sort_in(result: CapturedOptimizer, parameter: Parameter, own: Mapping[str, Parameter], renamed: Mapping[str, str]) -> None:
    name = str(parameter.name)
    if name in ("global_step", "state_step"):
        result.counters.append(Counter(parameter, 1 if _counts_from_minus_one(result.optimizer) else 0))
        return
    if name.startswith(_RATE) or name in _DERIVED:
        result.scalars[name] = parameter
        return
    slot, _, owner = name.partition(".")
    if is_adam(result.optimizer):
        slot = _ADAM_SLOTS.get(slot, slot)
    owner = renamed.get(owner, owner)
    key = parse_tensor_name(f"{slot}.{owner}" if owner else slot, Kind.OPTIMIZER)
    if key in result.slots:
        raise CaptureError("two slots of an optimizer have the same name", tensor=name, found=f"in {type(result.optimizer).__name__}")
    result.slots[key] = parameter
    if owner in own:
        result.owners[key] = own[owner]


def is_adam(optimizer: nn.Cell) -> bool:
    """Whether an optimizer's first two moments are Adam's, by the names of its class and their bases."""
    names = [base.__name__.lower() for base in type(optimizer).__mro__]
    return any("adam" in name for name in names) and not any("adamax" in name for name in names)


def _counts_from_minus_one(optimizer: nn.Cell) -> bool:
    """Whether the count is -1 before the first step: that of AdamW and FusedAdamW of `mint`, for their kernel's sake."""
    return any(base.__module__.startswith("mindspore.mint.optim") and "AdamW" in base.__name__ for base in type(optimizer).__mro__)


def step_count(captured: Sequence[CapturedOptimizer], global_step: int | None) -> int | None:
    """The step count to be saved: the one stated, else the largest of the optimizers'; None when none counts.

    Raises:
        CaptureError: optimizers that count differently: what MindSpore has no place for can't come back.
    """
    counts = {counter.value for one in captured for counter in one.counters}
    if global_step is not None:
        return global_step
    if len(counts) > 1:
        raise CaptureError(
            "optimizers of one run have counted different steps",
            tensor="global_step",
            found=sorted(counts),
            fix="say which count is the run's: common=reshard.CommonInfo(global_step=...)",
        )
    return counts.pop() if counts else None


def capture_groups(captured: Sequence[CapturedOptimizer]) -> tuple[ParameterGroup, ...]:
    """The hyper-parameters by parameter name, under the names that other frameworks have for them (`lr`, `betas`, …)."""
    result = []
    for one in captured:
        common = _common_options(one.optimizer)
        groups: dict[tuple[tuple[str, float], ...], list[str]] = {}
        for index, name in enumerate(one.parameters):
            groups.setdefault(tuple(_options_of(one, index).items()), []).append(name)
        result += [ParameterGroup({**dict(options), **common}, tuple(names)) for options, names in groups.items()]
    return tuple(result)


def install_groups(captured: Sequence[CapturedOptimizer], stored: Sequence[ParameterGroup], filled: frozenset[TensorKey]) -> None:
    """Give optimizers the learning rates and the momentum that the checkpoint has for their parameters.

    Only what MindSpore keeps in parameters: the rest is built into its compiled steps. A schedule (a cell, or a row of rates) is the
    run's own, and so is a rate that the checkpoint's own tensor has filled.

    Args:
        captured: the run's optimizers.
        stored: the checkpoint's hyper-parameters.
        filled: the keys of scalars that were loaded as tensors.
    """
    options = {name: group.options for group in stored for name in group.parameters}
    for one in captured:
        for index, name in enumerate(one.parameters):
            rate = _rate_of(one.optimizer, index)
            given = options.get(name, {})
            if isinstance(rate, Parameter) and scalar_key(rate.name) not in filled and _is_number(given.get("lr")):
                _fill(rate, given["lr"])
        momentum = one.scalars.get("momentum")
        known = [options[name]["momentum"] for name in one.parameters if "momentum" in options.get(name, {})]
        if momentum is not None and scalar_key("momentum") not in filled and known and _is_number(known[0]):
            _fill(momentum, known[0])


def set_step_count(captured: Sequence[CapturedOptimizer], steps: int, filled: frozenset[TensorKey]) -> None:
    """Have all optimizers count from here; what follows from the count (Adam's powers of its betas) is computed as their steps do."""
    for one in captured:
        for counter in one.counters:
            counter.set(steps)
        for number in (1, 2):
            power, beta = one.scalars.get(f"beta{number}_power"), getattr(one.optimizer, f"beta{number}", None)
            if power is not None and isinstance(beta, Tensor) and scalar_key(power.name) not in filled:
                _fill(power, _power(np.float32(beta.asnumpy().reshape(()).item()), steps))


def scalar_key(name: str) -> TensorKey:
    """The key of an optimizer's tensor that belongs to no parameter."""
    return TensorKey(Kind.OPTIMIZER, name, "")


def _power(base: np.float32, exponent: int) -> np.float32:
    """A power as the optimizer's steps make it: one rounding for each."""
    result = np.float32(1)
    for _ in range(exponent):
        following = np.float32(result * base)
        if following == result:
            break
        result = following
    return result


def _fill(parameter: Parameter, value: Any) -> None:
    parameter.assign_value(Tensor(np.full(parameter.shape, value, parameter.asnumpy().dtype)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _options_of(one: CapturedOptimizer, index: int) -> dict[str, float]:
    """What one parameter's hyper-parameters are; without a rate that a schedule gives."""
    options: dict[str, float] = {}
    if isinstance(one.optimizer, nn.Optimizer):
        rate = _rate_of(one.optimizer, index)
        if isinstance(rate, Parameter) and rate.ndim == 0:
            options["lr"] = _shortest(rate)
        decay = one.optimizer.weight_decay
        decay = decay[index] if isinstance(decay, list | tuple) else decay
        if isinstance(decay, Tensor):
            options["weight_decay"] = _shortest(decay)
    else:
        group = _group_of(one.optimizer, index)
        for key, value in group.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                options[key] = _shortest(value)
            elif _is_number(value):
                options[key] = value
    return options


def _rate_of(optimizer: nn.Cell, index: int) -> Any:
    if not isinstance(optimizer, nn.Optimizer):
        return _group_of(optimizer, index).get("lr")
    rate = optimizer.learning_rate
    return rate[index] if optimizer.is_group_lr else rate


def _group_of(optimizer: Any, index: int) -> Mapping[str, Any]:
    for number, group in enumerate(optimizer.param_groups):
        if index < optimizer.group_start_id[number + 1]:
            return group
    return {}


def _common_options(optimizer: Any) -> dict[str, Any]:
    """The hyper-parameters that all parameters of an optimizer share."""
    options: dict[str, Any] = {}
    betas = [beta for beta in (getattr(optimizer, name, None) for name in ("beta1", "beta2")) if isinstance(beta, Tensor)]
    if len(betas) == 2:
        options["betas"] = tuple(_shortest(beta) for beta in betas)
    for name in ("eps", "momentum"):
        value = getattr(optimizer, name, None)
        if isinstance(value, Tensor):
            options[name] = _shortest(value)
    groups = getattr(optimizer, "param_groups", None)
    if groups and isinstance(groups[0].get("betas"), list | tuple):
        options["betas"] = tuple(float(beta) for beta in groups[0]["betas"])
    return options


def _shortest(tensor: Tensor) -> float:
    """A number as it was written: 0.9, not the float32 beside it."""
    return float(
        str(tensor.asnumpy().reshape(()).item() if str(tensor.dtype) == "Float64" else np.float32(tensor.asnumpy().reshape(()).item()))
    )
