"""An optimizer's state out of a state dictionary: slots and hyper-parameters by parameter name, and the step count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reshard.errors import MetadataError
from reshard.format.extra import encode_tree
from reshard.sources.pytorch.naming import Understood, plain_name
from reshard.state import ParameterGroup

STEP = "step"

# AdamW's moments have these names whatever the framework calls them. Who has both is of Adam's kind; Adamax has `exp_inf` instead.
_MOMENTS = {"exp_avg": "adam_m", "exp_avg_sq": "adam_v"}

# What torch keeps in a group besides hyper-parameters.
_PARAMETERS, _NAMES = "params", "param_names"

# torch's names of what a state dictionary has besides parameters: statistics of normalisation layers.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_NAMES_SHOWN = 4

_NAMELESS = (
    "the optimizer's state is numbered, and which parameter has which number can't be told from the order and the shapes of the model's "
    "tensors: it was left out; save it with get_optimizer_state_dict, or with an optimizer made of named_parameters()"
)


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer holds.

    Attributes:
        slots: by key, the slot's name here and its parameter; without the step counts that `global_step` says.
        groups: the hyper-parameters.
        global_step: the highest step count of all parameters; None where none is counted.
        notes: what could not be understood, and what became of it.
        left_out: keys of tensors that have no name here.
    """

    slots: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    groups: tuple[ParameterGroup, ...] = ()
    global_step: int | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelTensor:
    """What is asked of the model's tensors, to give numbers their names.

    Attributes:
        name: of the parameter or buffer.
        shape: its shape.
        storage: what it shares with a tensor that it is tied to; None where that isn't known.
    """

    name: str
    shape: tuple[int, ...]
    storage: object = None


def read_optimizer(
    understood: Understood, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any], model: Sequence[ModelTensor], path: str
) -> OptimizerState:
    """The optimizer of a state dictionary.

    Args:
        understood: what the keys mean.
        shapes: of the tensors, by key.
        values: of the hyper-parameters, of step counts (also those that are tensors), and of slots that are no tensors, by key.
        model: the model's tensors, in the order of its dictionary.
        path: the checkpoint, for errors.

    Raises:
        MetadataError: hyper-parameters that are no values of a checkpoint.
    """
    groups, members = _groups_of(understood, values)
    numbered = any(type(member) is int for listed in members for member in listed) or (
        bool(understood.slots) and not groups and all(name.isdigit() for name, _ in understood.slots.values())
    )
    names: Mapping[str, str] | None = None
    if numbered:
        names = _named_by(groups, members) or _match(members, _shapes_by_number(understood, shapes), model)
        if names is None:
            return OptimizerState(notes=(_NAMELESS,), left_out=tuple(understood.slots))
    slots, steps, notes, left_out = _slots_of(understood, names, shapes, values)
    counts = {parameter: count for parameter, (_, count) in steps.items()}
    step = int(max(counts.values())) if counts else None
    for parameter, (key, count) in steps.items():
        if count != step and key in shapes:
            slots[key] = (STEP, parameter)
    stepped = {parameter for _, parameter in slots.values()} | set(steps)
    return OptimizerState(slots, _parameter_groups(groups, members, names, stepped, path), step, tuple(notes), tuple(left_out))


def _groups_of(understood: Understood, values: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """The options of each group, and its members: names or numbers."""
    by_group: dict[str, dict[str, Any]] = {}
    for key, (group, option) in understood.options.items():
        by_group.setdefault(group, {})[option] = values[key]
    groups, members = [], []
    for group, options in by_group.items():
        # Flattened, every parameter has its own options.
        listed = options.pop(_PARAMETERS, None)
        groups.append(options)
        members.append(list(listed) if isinstance(listed, (list, tuple)) else [group])
    return groups, members


def _named_by(groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Any]]) -> dict[str, str] | None:
    """The names that an optimizer made of named parameters says itself."""
    names: dict[str, str] = {}
    for options, listed in zip(groups, members, strict=True):
        said = options.get(_NAMES)
        if not isinstance(said, (list, tuple)) or len(said) != len(listed) or not all(type(name) is str for name in said):
            return None
        names |= {str(number): plain_name(name) for number, name in zip(listed, said, strict=True)}
    return names


def _shapes_by_number(understood: Understood, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for key, (number, slot) in understood.slots.items():
        if slot != STEP and key in shapes and len(shapes[key]) >= len(found.get(number, ())):
            found[number] = shapes[key]
    return found


def _match(members: Sequence[Sequence[Any]], shapes: Mapping[str, tuple[int, ...]], model: Sequence[ModelTensor]) -> dict[str, str] | None:
    """Numbers as names, by the order in which model and optimizer have the parameters; None when that is ambiguous.

    An optimizer numbers its parameters group by group, and in each group they follow the model's order. With one group there is one way to
    match them. With several there is one when no shape occurs in two groups, and all shapes are known.
    """
    seen: set[object] = set()
    parameters: list[ModelTensor] = []
    for tensor in model:
        if tensor.name.rpartition(".")[2] in _BUFFERS or (tensor.storage is not None and tensor.storage in seen):
            continue  # a tied parameter is one
        seen.add(tensor.storage)
        parameters.append(tensor)
    groups = [[str(number) for number in listed] for listed in members]
    if sum(map(len, groups)) != len(parameters):
        return None
    if len(groups) == 1:
        pairs = list(zip(groups[0], parameters, strict=True))
        return None if any(shapes.get(number, p.shape) != p.shape for number, p in pairs) else {number: p.name for number, p in pairs}
    kinds = [{shapes.get(number) for number in listed} for listed in groups]
    if any(None in kind for kind in kinds) or max(Counter(shape for kind in kinds for shape in kind).values(), default=1) > 1:
        return None
    names: dict[str, str] = {}
    for listed, kind in zip(groups, kinds, strict=True):
        mine = [p for p in parameters if p.shape in kind]
        if len(mine) != len(listed) or any(shapes[number] != p.shape for number, p in zip(listed, mine, strict=True)):
            return None
        names |= {number: p.name for number, p in zip(listed, mine, strict=True)}
    return names


def _slots_of(
    understood: Understood, names: Mapping[str, str] | None, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, float]], list[str], list[str]]:
    """The slots by key, the step counts by parameter with their keys, notes, and the keys of tensors without a name."""
    has: dict[str, set[str]] = {}
    for parameter, slot in understood.slots.values():
        has.setdefault(parameter, set()).add(slot)
    slots: dict[str, tuple[str, str]] = {}
    steps: dict[str, tuple[str, float]] = {}
    lost: list[str] = []
    left_out: list[str] = []
    for key, (owner, slot) in understood.slots.items():
        parameter = owner if names is None else names.get(owner)
        if parameter is None:
            left_out.append(key)
        elif slot == STEP and (count := _count(values.get(key))) is not None:
            steps[parameter] = (key, count)
        elif key in shapes:
            is_adam = has[owner].issuperset(_MOMENTS)
            slots[key] = (_MOMENTS.get(slot, slot) if is_adam else slot, parameter)
        elif values.get(key) is not None:
            lost.append(key)
    notes = [f"state of the optimizer that is no tensor was left out: {_some(lost)}"] if lost else []
    if left_out:
        notes.append(f"state of the optimizer that belongs to no parameter of it was left out: {_some(left_out)}")
    return slots, steps, notes, left_out


def _count(value: Any) -> float | None:
    array = getattr(value, "array", value)
    size = getattr(array, "size", 1)
    if isinstance(array, bool) or size != 1:
        return None
    try:
        return float(array)
    except (TypeError, ValueError):
        return None


def _parameter_groups(
    groups: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[Any]],
    names: Mapping[str, str] | None,
    stepped: set[str],
    path: str,
) -> tuple[ParameterGroup, ...]:
    """The groups by parameter name; those with equal options are one."""
    merged: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for options, listed in zip(groups, members, strict=True):
        own = {option: value for option, value in options.items() if option != _NAMES}
        try:
            text, arrays = encode_tree(own)
        except Exception as cause:
            raise MetadataError(
                "a hyper-parameter that is no value of a checkpoint", file=path, field="param_groups", found=str(cause)[:300]
            ) from cause
        alike = text + "".join(f"{array.dtype}{array.tobytes().hex()}" for array in arrays.values())
        called = [
            plain_name(str(member)) if names is None else names[str(member)] for member in listed if names is None or str(member) in names
        ]
        merged.setdefault(alike, (own, []))[1].extend(called)
    return tuple(
        ParameterGroup(options, tuple(called), tuple(name for name in called if stepped and name not in stepped))
        for options, called in merged.values()
    )


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - _NAMES_SHOWN
    return ", ".join(keys[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
