"""A state dictionary becomes a checkpoint's catalog, and what lies beside tensors becomes the small files that a checkpoint of ours has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reshard.catalog import Arrangement, Catalog, StoredTensor
from reshard.errors import CaptureError, MetadataError
from reshard.format.common import CommonInfo
from reshard.format.extra import encode_tree
from reshard.format.names import tensor_name
from reshard.sources.made import made_files
from reshard.sources.pytorch.naming import Keys, Path, Prefixes, Understood, understand
from reshard.sources.pytorch.optimizer import STEP, ModelTensor, OptimizerState, read_optimizer
from reshard.sources.pytorch.values import MOST_TENSOR_BYTES
from reshard.state import TensorKey, model_key, slot_key

# Under these names runs keep what a load gives back to a scheduler or to a data loader.
_PARTS = {"scheduler": "scheduler", "lr_scheduler": "scheduler", "dataloader": "dataloader"}

_NAMES_SHOWN = 4


@dataclass(frozen=True)
class StateDictionary:
    """A stored state dictionary.

    Attributes:
        directory: where its files lie.
        path: what it is called in errors.
        arrangements: of its tensors, by key.
        others: the keys of what is no tensor, and of tensors that are only read as values.
        paths: as in `Keys`.
        read: gives the values of keys, and why others have none.
        storages: what tensors share with those that they are tied to; empty where that isn't known.
        notes: what is known about it before it is understood.
    """

    directory: str
    path: str
    arrangements: Mapping[str, Arrangement]
    others: Sequence[str]
    paths: Mapping[str, Path]
    read: Callable[[Sequence[str]], tuple[Mapping[str, Any], Mapping[str, str]]]
    storages: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assembled:
    """A checkpoint.

    Attributes:
        catalog: what it holds.
        keys: the state dictionary's key of each tensor of the catalog, in order.
        files: small files as this project writes them, by their names in a checkpoint.
        is_weights: whether there is nothing of a run but a model's weights.
    """

    catalog: Catalog
    keys: tuple[str, ...]
    files: Mapping[str, bytes]
    is_weights: bool


def assemble(state: StateDictionary, given: Prefixes) -> Assembled:
    """Give every tensor its key, and every value its place.

    Args:
        state: the state dictionary.
        given: where model and optimizer begin in it, as far as the caller says.

    Raises:
        UsageError: it can't be told which part is the model's.
        MetadataError: two tensors have one name, or hyper-parameters can't be kept.
        StorageError: the storage refuses.
    """
    understood = understand(Keys(list(state.arrangements), state.others, state.paths), given, state.path)
    rest = [key for key in understood.others if key not in state.arrangements or _is_value(state.arrangements[key])]
    wanted = [*understood.options, *rest]
    for key, (_, slot) in understood.slots.items():
        if key not in state.arrangements or (slot == STEP and state.arrangements[key].global_shape in ((), (1,))):
            wanted.append(key)
    values, problems = state.read(wanted)
    options = {key: what for key, what in understood.options.items() if key in values}
    shapes = {key: arrangement.global_shape for key, arrangement in state.arrangements.items()}
    optimizer = read_optimizer(
        Understood(understood.model, understood.slots, options, understood.others, understood.prefix),
        shapes,
        values,
        [ModelTensor(name, shapes[key], state.storages.get(key)) for key, name in understood.model.items()],
        state.path,
    )
    tree, lost = _tree_of({key: values[key] for key in rest if key in values}, state.paths)
    lost = {**problems, **lost}
    apart = [key for key in understood.others if key in state.arrangements and key not in values]
    named = _named(state, understood, optimizer, apart)
    notes = [*state.notes, *optimizer.notes]
    if apart:
        notes.append(f"tensors that are neither the model's nor the optimizer's keep their own names: {_some(apart)}")
    notes += [f"left out: {key}: {problem}" for key, problem in list(lost.items())[:_NAMES_SHOWN]]
    if len(lost) > _NAMES_SHOWN:
        notes.append(f"left out besides: {_some(list(lost)[_NAMES_SHOWN:])}")
    tensors = {key: StoredTensor(key, tensor_name(key), state.arrangements[own]) for key, own in named.items()}
    is_weights = not optimizer.groups and not optimizer.slots and optimizer.global_step is None and not tree
    files = {} if is_weights else _files(optimizer, tree)
    return Assembled(Catalog(state.directory, tensors, tuple(notes)), tuple(named.values()), files, is_weights)


def _is_value(arrangement: Arrangement) -> bool:
    """Whether a tensor that belongs to nothing is a value: small, and in one part."""
    small = MOST_TENSOR_BYTES // arrangement.dtype.itemsize
    size = 1
    for extent in arrangement.global_shape:
        size *= extent
    return size <= small and len(arrangement.pieces) == 1


def _named(state: StateDictionary, understood: Understood, optimizer: OptimizerState, apart: Sequence[str]) -> dict[TensorKey, str]:
    named: dict[TensorKey, str] = {}
    pairs = [(model_key(name), key) for key, name in understood.model.items()]
    pairs += [(slot_key(slot, parameter), key) for key, (slot, parameter) in optimizer.slots.items()]
    for tensor, key in [*pairs, *((model_key(key), key) for key in apart)]:
        try:
            name = tensor_name(tensor)
        except CaptureError as cause:
            raise MetadataError("a key that no tensor can have", file=state.path, tensor=repr(key), found=str(cause.tensor)) from None
        if tensor in named:
            raise MetadataError("two tensors would have the same name", file=state.path, tensor=name, found=f"{named[tensor]} and {key}")
        named[tensor] = key
    return named


def _tree_of(values: Mapping[str, Any], paths: Mapping[str, Path]) -> tuple[dict[Any, Any], dict[str, str]]:
    """Values as the nested dictionary that they were in, and why some are in none."""
    tree: dict[Any, Any] = {}
    problems: dict[str, str] = {}
    for key, value in values.items():
        try:
            encode_tree(value)
        except CaptureError as error:
            problems[key] = f"{error.what} ({error.found})"
            continue
        *above, last = paths.get(key, (key,))
        place = tree
        for part in above:
            place = place.setdefault(part, {})
            if type(place) is not dict:
                break
        if type(place) is dict and last not in place:
            place[last] = value
        else:
            problems[key] = "another value lies in its place"
    return tree, problems


def _files(optimizer: OptimizerState, tree: Mapping[Any, Any]) -> dict[str, bytes]:
    values: dict[str, Any] = {"extra": dict(tree)} if tree else {}
    for name, part in _PARTS.items():
        if name in tree:
            values.setdefault(part, tree[name])
    step = optimizer.global_step
    return made_files(CommonInfo(step_num=step, global_step=step), values, optimizer.groups)


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - _NAMES_SHOWN
    return ", ".join(keys[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
