"""What the tensors of Checkpoint 1.0 are: a file has the model's, the optimizer's and a run's counters under one set of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reshard.format.common import CommonInfo
from reshard.format.names import parse_tensor_name
from reshard.geometry.dtypes import by_name
from reshard.sources.legacy.saved_file import FileTensor
from reshard.state import GLOBAL_STEP, Kind, TensorKey, model_key, slot_key

# What MindSpore's optimizers put before the name of a parameter, with a dot (`mindspore.nn`, `mindspore.mint`, MindSpore Transformers).
_SLOTS = frozenset(
    (
        *("accum", "accum_update", "adam_m", "adam_v", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "lamb_m", "lamb_v", "linear"),
        *("max_exp_avg_sq", "mean_grad", "mean_square", "moment", "moment1", "moment2", "moments", "momentum_buf", "muon_m"),
        *("prev", "stat", "step_size", "vhat"),
    )
)
# These nobody takes for a part of a model's name, even where the parameter isn't in the file.
_CERTAIN_SLOTS = ("adam_m", "adam_v")
# Optimizer's tensors that belong to no parameter.
_SCALARS = frozenset(("beta1_power", "beta2_power", "momentum", "global_step", "afactor_step", "cov_step"))
_RATE = "learning_rate"

# Sums of gradients between two steps: MindSpore itself leaves them out when it merges ranks.
_SUMS = "accu_grads"

# `ModelCheckpoint` and MindSpore Transformers write these beside the tensors, and the optimizers of `mindspore.mint` count so; they belong
# into `common.json`.
_COUNTERS = ("epoch_num", "step_num", "loss_scale", "state_step")


@dataclass(frozen=True)
class Named:
    """The names of a checkpoint, understood.

    Attributes:
        keys: of the tensors, by name.
        counters: names of values that are the run's progress; those that are no tensors of the checkpoint besides aren't in `keys`.
        notes: what the reader should know.
    """

    keys: Mapping[str, TensorKey]
    counters: tuple[str, ...]
    notes: tuple[str, ...]


def understand(tensors: Mapping[str, FileTensor]) -> Named:
    """What each name is.

    Args:
        tensors: one rank's part of each, by name.
    """
    adam = _adam_names(tensors)
    keys: dict[str, TensorKey] = {}
    notes: list[str] = []
    sums = [name for name in tensors if name.startswith(_SUMS)]
    if sums:
        notes.append(f"sums of gradients between two steps were left out: {sums[0]} and {len(sums)} in all")
    counters = tuple(name for name in (*_COUNTERS, "global_step", "scale_sense") if _is_number(tensors.get(name)))
    for name, tensor in tensors.items():
        if name in sums or (name in counters and name in _COUNTERS):
            continue
        key = _key_of(name, tensors, adam)
        if key == GLOBAL_STEP and not (tensor.shape == (1,) and tensor.dtype == by_name("int32")):
            continue  # in another form: `common` has it
        keys[name] = key
    return Named(keys, counters, tuple(notes))


def common_of(values: Mapping[str, np.ndarray], named_step: int | None) -> tuple[CommonInfo, tuple[str, ...]]:
    """A run's progress.

    Args:
        values: of the counters, by name.
        named_step: the step in the files' names; None where they have none.

    Returns:
        The progress, and notes about what it can't say.
    """
    numbers = {name: value.reshape(-1)[0].item() for name, value in values.items()}
    step = _count(numbers.get("global_step"))
    notes: tuple[str, ...] = ()
    if step is None and "state_step" in numbers:
        if values["state_step"].dtype == np.int32:
            step = _count(numbers["state_step"])
        else:
            told = f"state_step {numbers['state_step']:g} doesn't tell the step count: AdamW of mindspore.mint begins with -1, Adam with 0"
            notes = (f"{told}; load_checkpoint takes global_step",)
    scale = numbers.get("loss_scale", numbers.get("scale_sense"))
    steps = _count(numbers.get("step_num"))
    info = CommonInfo(
        epoch_num=_count(numbers.get("epoch_num")),
        step_num=steps if steps is not None else step if step is not None else named_step,
        global_step=step,
        loss_scale=None if scale is None or not np.isfinite(scale) else float(scale),
    )
    return info, notes


def _adam_names(names: Collection[str]) -> Mapping[str, str]:
    """What Adam's moments are called in this file, where it is Adam that they are of."""
    has = {slot: any(name.startswith(f"{slot}.") for name in names) for slot in ("moment1", "moment2", "exp_avg", "exp_avg_sq", "exp_inf")}
    adam: dict[str, str] = {}
    # AdaMax has moments of these names too, and the power of one beta only.
    if has["moment1"] and has["moment2"] and "beta2_power" in names:
        adam.update(moment1="adam_m", moment2="adam_v")
    if has["exp_avg"] and has["exp_avg_sq"] and not has["exp_inf"] and not any(name.startswith("exp_avg_sq_") for name in names):
        adam.update(exp_avg="adam_m", exp_avg_sq="adam_v")
    return adam


def _key_of(name: str, names: Collection[str], adam: Mapping[str, str]) -> TensorKey:
    if name in _SCALARS or (name.startswith(_RATE) and "." not in name):
        return parse_tensor_name(name, Kind.OPTIMIZER)
    slot, _, parameter = name.partition(".")
    if slot in _SLOTS and (parameter in names or (slot in _CERTAIN_SLOTS and parameter)):
        return slot_key(adam.get(slot, slot), parameter)
    return model_key(name)


def _is_number(tensor: FileTensor | None) -> bool:
    return tensor is not None and tensor.shape in ((), (1,))


def _count(value: float | bool | None) -> int | None:
    """A number as a count; None where it is none."""
    return int(value) if value is not None and np.isfinite(value) and 0 <= value < 2**63 and int(value) == value else None


def some(items: Sequence[object], most: int = 4) -> str:
    """Some of a list, for a message, and how many there are besides."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")
