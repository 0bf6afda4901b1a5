"""What a load does about tensors that don't fit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, TypeVar

from reshard.errors import MismatchError, UsageError
from reshard.format.names import tensor_name
from reshard.geometry.casts import can_cast
from reshard.loading.selection import matches
from reshard.planning.read_plan import Mismatch
from reshard.state import Kind, TensorKey

Action = Literal["error", "warn", "ignore"]
DTypeAction = Literal["error", "warn", "ignore", "cast"]

_ACTIONS = ("error", "warn", "ignore")
_ALLOWED: Mapping[str, tuple[str, ...]] = {"missing": _ACTIONS, "unexpected": _ACTIONS, "shape": _ACTIONS, "dtype": (*_ACTIONS, "cast")}

# A message names so many tensors; the report has them all.
_NAMES_SHOWN = 8

_logger = logging.getLogger("reshard")


class Actions(TypedDict, total=False):
    """What a rule says; the kinds that it leaves out are as they are without it."""

    missing: Action
    unexpected: Action
    shape: Action
    dtype: DTypeAction


@dataclass(frozen=True)
class Strictness:
    """What to do about each kind of misfit. A tensor that is let pass keeps the run's own values, and the report names it.

    Each is `error`, `warn` or `ignore`; `dtype` may also be `cast`: then floating types are converted into the run's, by rounding to the
    nearest, and the report lists what was. Integers and truth values never are: for them `cast` is `error`.

    Attributes:
        missing: the run has it, the checkpoint doesn't.
        unexpected: the checkpoint has it, the run doesn't.
        shape: both have it, with different global shapes.
        dtype: both have it, with different element types.
        rules: what else holds for some tensors, by pattern of their names: `{"lm_head.*": {"missing": "ignore"}}`. A pattern is a glob
            (`*` goes over dots, too), held against the name in files and, of an optimizer's tensor, also against its parameter's. Of
            several that match a tensor and say something about a kind, the last counts.

    Raises:
        UsageError: a kind or an action that doesn't exist.
    """

    missing: Action = "error"
    unexpected: Action = "warn"
    shape: Action = "error"
    dtype: DTypeAction = "error"
    rules: Mapping[str, Actions] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for kind in _ALLOWED:
            _check_action(kind, getattr(self, kind), kind)
        if not isinstance(self.rules, Mapping):
            raise UsageError(
                "the rules of a strictness are no mapping",
                field="rules",
                found=type(self.rules).__name__,
                expected="patterns with what holds for them: {'lm_head.*': {'missing': 'ignore'}}",
            )
        for pattern, actions in self.rules.items():
            where = f"rules[{pattern!r}]"
            if not isinstance(pattern, str) or not isinstance(actions, Mapping):
                raise UsageError("a rule is no pattern with a mapping", field=where, found=repr(actions), expected="{'missing': 'ignore'}")
            for kind, action in actions.items():
                _check_action(kind, action, where)
        # A copy: what was checked stays.
        object.__setattr__(self, "rules", {pattern: Actions(**actions) for pattern, actions in self.rules.items()})

    @classmethod
    def default(cls, *, is_weights: bool) -> Strictness:
        """What holds where the caller says nothing: a model's weights alone are published in whatever type their authors had, so they are
        converted into the run's; a run's own checkpoint has the run's types.
        """
        return cls(dtype="cast" if is_weights else "error")

    def action(self, kind: Literal["missing", "unexpected", "shape", "dtype"], key: TensorKey) -> DTypeAction:
        """What to do about a kind of misfit of a tensor."""
        found: DTypeAction = getattr(self, kind)
        for pattern, actions in self.rules.items():
            if kind in actions and matches(pattern, key):
                found = actions.get(kind, found)
        return found

    def casts(self, misfit: Mismatch) -> bool:
        """Whether a load converts this tensor instead of leaving it alone."""
        return misfit.field == "dtype" and can_cast(misfit.stored, misfit.wanted) and self.action("dtype", misfit.key) == "cast"


def _check_action(kind: object, action: object, where: str) -> None:
    if not isinstance(kind, str) or kind not in _ALLOWED:
        raise UsageError("a rule about a kind of misfit that doesn't exist", field=where, found=repr(kind), expected=", ".join(_ALLOWED))
    if action not in _ALLOWED[kind]:
        place = where if where == kind else f"{where}, {kind}"
        raise UsageError("a strictness that doesn't exist", field=place, found=repr(action), expected=", ".join(_ALLOWED[kind]))


@dataclass(frozen=True)
class Misfits:
    """The tensors of the whole job that don't fit, each kind sorted by name."""

    missing: tuple[TensorKey, ...]
    unexpected: tuple[TensorKey, ...]
    mismatched: tuple[Mismatch, ...]


def apply_strictness(strictness: Strictness, misfits: Misfits, *, directory: str, has_optimizer: bool) -> None:
    """Raise or warn as the strictness says.

    Args:
        strictness: what to do.
        misfits: of the whole job, so that every rank does the same.
        directory: the checkpoint.
        has_optimizer: whether the checkpoint has any optimizer tensor.

    Raises:
        MismatchError: a misfit that is an error.
    """
    for action, error in judge(strictness, misfits, directory=directory, has_optimizer=has_optimizer):
        # What was to be cast and is a misfit still can't be.
        if action in ("error", "cast"):
            raise error
        if action == "warn":
            _logger.warning("%s", error)


def judge(strictness: Strictness, misfits: Misfits, *, directory: str, has_optimizer: bool) -> Iterator[tuple[DTypeAction, MismatchError]]:
    """What there is to say about misfits, and what the strictness does about it. The arguments are those of `apply_strictness`."""
    for action, keys in _by_action([(strictness.action("missing", key), key) for key in misfits.missing]):
        optimizer = [] if has_optimizer else [key for key in keys if key.kind is Kind.OPTIMIZER]
        if optimizer:
            yield action, _no_optimizer(optimizer, directory)
        missing = [key for key in keys if has_optimizer or key.kind is not Kind.OPTIMIZER]
        if missing:
            what = f"{_count(missing)} of the run {_are(missing)} not in the checkpoint"
            fix = "load a checkpoint of this model, or pass strict=Strictness(missing='warn') to leave them as they are"
            yield action, MismatchError(what, file=directory, tensor=_some(missing), fix=fix)
    fields: tuple[Literal["shape", "dtype"], ...] = ("shape", "dtype")
    for name in fields:
        for action, wrong in _by_action([(strictness.action(name, m.key), m) for m in misfits.mismatched if m.field == name]):
            yield action, _mismatch(wrong, name, directory, is_cast=action == "cast")
    for action, keys in _by_action([(strictness.action("unexpected", key), key) for key in misfits.unexpected]):
        what = f"{_count(keys)} of the checkpoint {_are(keys)} not in the run"
        fix = "load them into the model that has them, or pass strict=Strictness(unexpected='ignore')"
        yield action, MismatchError(what, file=directory, tensor=_some(keys), fix=fix)


T = TypeVar("T")


def _by_action(items: Sequence[tuple[DTypeAction, T]]) -> list[tuple[DTypeAction, list[T]]]:
    """Items by what is to be done about them; errors first, since nothing comes after one."""
    order: tuple[DTypeAction, ...] = ("error", "cast", "warn", "ignore")
    groups: list[tuple[DTypeAction, list[T]]] = [(action, [item for given, item in items if given == action]) for action in order]
    return [pair for pair in groups if pair[1]]


def _no_optimizer(keys: Sequence[TensorKey], directory: str) -> MismatchError:
    return MismatchError(
        "the checkpoint has no optimizer state, and the run wants to load one",
        file=directory,
        found="model tensors only (it was saved with save_optimizer: False)",
        expected=f"{len(keys)} optimizer tensors",
        fix="to load the weights only, pass optimizer=None (in YAML: no_load_optim: True); "
        "to go on with a fresh optimizer, pass strict=Strictness(missing='warn')",
    )


def _mismatch(wrong: Sequence[Mismatch], name: str, directory: str, *, is_cast: bool) -> MismatchError:
    leave = f"strict=Strictness({name}='warn') to leave such tensors as they are"
    if is_cast:
        what = f"{_count(wrong)} can't be cast into the run's types: only floating types are converted into each other"
        fix = f"build the model with the types that were saved, or give such tensors a rule: {{'their.names.*': {{'{name}': 'warn'}}}}"
    else:
        what = f"{_count(wrong)} {'has' if len(wrong) == 1 else 'have'} another {name} in the checkpoint than in the run"
        convert = f"strict=Strictness(dtype='cast') to convert {'it' if len(wrong) == 1 else 'them'}, or "
        able = name == "dtype" and any(can_cast(m.stored, m.wanted) for m in wrong)
        fix = f"build the model as it was saved, or pass {convert if able else ''}{leave}"
    return MismatchError(
        what,
        file=directory,
        tensor=_some([m.key for m in wrong]),
        field=name,
        found=f"{wrong[0].stored} in the checkpoint" + _first(wrong),
        expected=f"{wrong[0].wanted} in the run" + _first(wrong),
        fix=fix,
    )


def _some(keys: Iterable[TensorKey]) -> str:
    names = [tensor_name(key) for key in keys]
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f", … ({len(names)} in all)" if len(names) > _NAMES_SHOWN else "")


def _count(items: Iterable[object]) -> str:
    number = len(list(items))
    return f"{number} tensor{'' if number == 1 else 's'}"


def _are(items: Iterable[object]) -> str:
    return "is" if len(list(items)) == 1 else "are"


def _first(items: Sequence[Mismatch]) -> str:
    return "" if len(items) == 1 else " (the first of them)"
