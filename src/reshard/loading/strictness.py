"""What a load does about tensors that don't fit."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from reshard.errors import MismatchError, ReshardError, UsageError
from reshard.format.names import tensor_name
from reshard.planning.read_plan import Mismatch
from reshard.state import Kind, TensorKey

Action = Literal["error", "warn", "ignore"]
_ACTIONS = ("error", "warn", "ignore")

# A message names so many tensors; the report has them all.
_NAMES_SHOWN = 8

_logger = logging.getLogger("reshard")


@dataclass(frozen=True)
class Strictness:
    """What to do about each kind of misfit. A tensor that is let pass keeps the run's own values, and the report names it.

    Attributes:
        missing: the run has it, the checkpoint doesn't.
        unexpected: the checkpoint has it, the run doesn't.
        shape: both have it, with different global shapes.
        dtype: both have it, with different element types.
    """

    missing: Action = "error"
    unexpected: Action = "warn"
    shape: Action = "error"
    dtype: Action = "error"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in _ACTIONS:
                raise UsageError("a strictness that doesn't exist", field=field.name, found=value, expected=", ".join(_ACTIONS))


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
    lacks_optimizer = not has_optimizer and any(key.kind is Kind.OPTIMIZER for key in misfits.missing)
    if lacks_optimizer:
        _act(
            strictness.missing,
            MismatchError(
                "the checkpoint has no optimizer state, and the run wants to load one",
                file=directory,
                found="model tensors only (it was saved with save_optimizer: False)",
                expected=f"{sum(k.kind is Kind.OPTIMIZER for k in misfits.missing)} optimizer tensors",
                fix="to load the weights only, pass optimizer=None (in YAML: no_load_optim: True); "
                "to go on with a fresh optimizer, pass strict=Strictness(missing='warn')",
            ),
        )
    missing = [key for key in misfits.missing if not (lacks_optimizer and key.kind is Kind.OPTIMIZER)]
    if missing:
        _act(
            strictness.missing,
            MismatchError(
                f"{_count(missing)} of the run {_are(missing)} not in the checkpoint",
                file=directory,
                tensor=_some(missing),
                fix="load a checkpoint of this model, or pass strict=Strictness(missing='warn') to leave them as they are",
            ),
        )
    for field in ("shape", "dtype"):
        wrong = [m for m in misfits.mismatched if m.field == field]
        if wrong:
            _act(
                getattr(strictness, field),
                MismatchError(
                    f"{_count(wrong)} {'has' if len(wrong) == 1 else 'have'} another {field} in the checkpoint than in the run",
                    file=directory,
                    tensor=_some([m.key for m in wrong]),
                    field=field,
                    found=f"{wrong[0].stored} in the checkpoint" + _first(wrong),
                    expected=f"{wrong[0].wanted} in the run" + _first(wrong),
                    fix=f"build the model as it was saved, or pass strict=Strictness({field}='warn') to leave such tensors as they are",
                ),
            )
    if misfits.unexpected:
        _act(
            strictness.unexpected,
            MismatchError(
                f"{_count(misfits.unexpected)} of the checkpoint {_are(misfits.unexpected)} not in the run",
                file=directory,
                tensor=_some(misfits.unexpected),
                fix="load them into the model that has them, or pass strict=Strictness(unexpected='ignore')",
            ),
        )


def _act(action: Action, error: ReshardError) -> None:
    if action == "error":
        raise error
    if action == "warn":
        _logger.warning("%s", error)


def _some(keys: Iterable[TensorKey]) -> str:
    names = [tensor_name(key) for key in keys]
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f", … ({len(names)} in all)" if len(names) > _NAMES_SHOWN else "")


def _count(items: Iterable[object]) -> str:
    number = len(list(items))
    return f"{number} tensor{'' if number == 1 else 's'}"


def _are(items: Iterable[object]) -> str:
    return "is" if len(list(items)) == 1 else "are"


def _first(items: list[Mismatch]) -> str:
    return "" if len(items) == 1 else " (the first of them)"
