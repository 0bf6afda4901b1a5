"""What the keys of a state dictionary mean: which are a model's, which an optimizer's, and what is left.

Source of the conventions: `torch.distributed.checkpoint.state_dict` (`get_model_state_dict`, `get_optimizer_state_dict`, nested and
flattened), PyTorch's tutorials on distributed checkpoints, and torchtitan. A key is the path of a value in a nested dictionary, joined by
dots; a model's and an optimizer's own dictionary may lie anywhere in it:

    {model}{parameter}
    {optimizer}state.{parameter}.{slot}
    {optimizer}param_groups.{parameter}.{option}      flattened, or
    {optimizer}param_groups.{number}.{option}         with the parameters' names, or numbers, in `params`
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from reshard.errors import UsageError

Path = tuple[str | int, ...]

# Where the dictionaries of a model lie when nothing else tells, the likeliest first.
_USUAL_MODELS = ("app.model.", "model.", "model_state_dict.", "app.state_dict.", "state_dict.", "module.", "")

# Parts of names that wrappers of torch add; names in checkpoints are without them.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

_STATE, _GROUPS = "state.", "param_groups."


@dataclass(frozen=True)
class Prefixes:
    """Where a model's and an optimizer's own dictionaries begin in the keys; None for what is to be recognised.

    Attributes:
        model: what stands before the parameters' names.
        optimizer: what stands before `state.` and `param_groups.`.
    """

    model: str | None = None
    optimizer: str | None = None


@dataclass(frozen=True)
class Understood:
    """The keys of a state dictionary, sorted by what they are.

    Attributes:
        model: by key, the parameter's name; in the order of the keys.
        slots: by key, the parameter's name (or number) and the slot.
        options: by key, the group (a parameter's name, or a number) and the option.
        others: what is neither.
        prefix: of the model; None when there is none.
    """

    model: Mapping[str, str]
    slots: Mapping[str, tuple[str, str]]
    options: Mapping[str, tuple[str, str]]
    others: tuple[str, ...]
    prefix: str | None = None


@dataclass(frozen=True)
class Keys:
    """The keys of a state dictionary.

    Attributes:
        tensors: those of tensors.
        values: those of anything else.
        paths: of each key, where it lies in the nested dictionary; empty when that isn't known.
    """

    tensors: Collection[str]
    values: Collection[str]
    paths: Mapping[str, Path] = field(default_factory=dict)


def understand(keys: Keys, given: Prefixes, path: str) -> Understood:
    """What the keys mean.

    Args:
        keys: all keys.
        given: where model and optimizer begin, as far as the caller says.
        path: the checkpoint, for errors.

    Raises:
        UsageError: several dictionaries could be the model's, or what the caller named isn't there.
    """
    every = [*keys.tensors, *keys.values]
    prefixes = _optimizer_prefixes(every, given.optimizer, path)
    slots: dict[str, tuple[str, str]] = {}
    options: dict[str, tuple[str, str]] = {}
    for prefix in prefixes:
        for key in every:
            if key.startswith(prefix):
                rest = key[len(prefix) :]
                if rest.startswith(_STATE):
                    parameter, _, slot = rest[len(_STATE) :].rpartition(".")
                    slots[key] = (plain_name(parameter), slot)
                elif rest.startswith(_GROUPS):
                    group, _, option = rest[len(_GROUPS) :].rpartition(".")
                    options[key] = (plain_name(group), option)
    left = [key for key in keys.tensors if key not in slots and key not in options]
    named = {name for name, _ in slots.values() if not name.isdigit()} | {name for name, _ in options.values() if not name.isdigit()}
    model = _model_prefix(left, {plain_name(key): key for key in left}, named, keys.paths, given.model, path)
    mine = {} if model is None else {key: plain_name(key[len(model) :]) for key in left if _is_under(key, model, keys.paths)}
    known = {*mine, *slots, *options}
    return Understood(mine, slots, options, tuple(key for key in every if key not in known), model)


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _optimizer_prefixes(keys: Collection[str], given: str | None, path: str) -> list[str]:
    if given is not None:
        if not any(key.startswith((given + _STATE, given + _GROUPS)) for key in keys):
            raise _not_there("optimizer", given, f"{given}{_STATE}… or {given}{_GROUPS}…", keys, path)
        return [given]
    with_groups = {prefix for key in keys for prefix in _before(key, _GROUPS)}
    # An optimizer without options is none; one without state has not stepped, or needs none.
    return sorted(with_groups, key=len)


def _before(key: str, word: str) -> Iterator[str]:
    """What stands before a word that begins at a dot, the first time."""
    if key.startswith(word):
        yield ""
    else:
        place = key.find(f".{word}")
        if place >= 0:
            yield key[: place + 1]


def _model_prefix(
    keys: list[str], plain: Mapping[str, str], named: Collection[str], paths: Mapping[str, Path], given: str | None, path: str
) -> str | None:
    """Where the model's own dictionary begins; None when there is none."""
    if given is not None:
        if not any(key.startswith(given) for key in keys):
            raise _not_there("model", given, f"{given}…", keys, path)
        return given
    if not keys:
        return None
    if named:
        # The optimizer names the parameters: the model's dictionary is the one that has all of them.
        first = min(named)
        ends = [name[: -len(first)] for name in plain if name.endswith(first)]
        found = [prefix for prefix in ends if (not prefix or prefix.endswith(".")) and all(prefix + name in plain for name in named)]
        if len(found) > 1:
            usual = [prefix for prefix in _USUAL_MODELS if prefix in found]
            if not usual:
                raise _several(found, path)
            return usual[0]
        if found:
            return found[0]
    usual = next((prefix for prefix in _USUAL_MODELS if prefix and any(_lies_inside(key, prefix, paths) for key in keys)), None)
    if usual is not None:
        return usual
    above = {paths[key][:-1] if key in paths else () for key in keys}
    if () in above:
        return ""
    if len(above) > 1:
        raise _several({".".join(map(str, parts)) + "." for parts in above}, path)
    return ".".join(map(str, above.pop())) + "."


def _several(found: Collection[str], path: str) -> UsageError:
    return UsageError(
        "several dictionaries in the checkpoint could be the model's",
        file=path,
        field="model_prefix",
        found=", ".join(map(repr, sorted(found)[:8])),
        fix="say which, by what its keys begin with",
    )


def _lies_inside(key: str, prefix: str, paths: Mapping[str, Path]) -> bool:
    where = paths.get(key)
    parts = prefix.rstrip(".").split(".")
    return where is not None and len(where) > len(parts) and [str(part) for part in where[: len(parts)]] == parts


def _is_under(key: str, model: str, paths: Mapping[str, Path]) -> bool:
    """Whether a tensor is one of the model: a state dictionary of a model has no others in it."""
    if not key.startswith(model):
        return False
    where = paths.get(key)
    # At the top of the dictionary, what lies deeper belongs to something else (`train_state.step`).
    return bool(model) or where is None or len(where) == 1


def _not_there(what: str, given: str, expected: str, keys: Collection[str], path: str) -> UsageError:
    some = ", ".join(sorted(keys)[:4])
    return UsageError(
        f"no key of the checkpoint begins with the {what}'s prefix",
        file=path,
        field=f"{what}_prefix",
        found=f"{given!r}; keys are {some}" + (" and others" if len(keys) > 4 else ""),
        expected=expected,
    )
