"""Which tensors a load is about: patterns of names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import cache

from reshard.catalog import Catalog
from reshard.errors import UsageError
from reshard.format.names import tensor_name
from reshard.planning.agreement import RankDescription
from reshard.state import ParameterGroup, TensorKey


def matches(pattern: str, key: TensorKey) -> bool:
    """Whether a pattern means a tensor.

    A pattern is a glob (`*`, `?`, `[abc]`; `*` goes over dots, too), held against the whole name in files, and of an optimizer's tensor
    also against the name of its parameter: `layers.0.*` means the weights and their moments, `adam_m.layers.0.*` moments only.
    """
    return _means((pattern,), key)


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all patterns: there are states with 100,000 tensors."""
    return re.compile("|".join(map(translate, patterns)))


def _means(patterns: tuple[str, ...], key: TensorKey) -> bool:
    match = _any_of(patterns).match
    return match(tensor_name(key)) is not None or (key.slot is not None and bool(key.parameter) and match(key.parameter) is not None)


@dataclass(frozen=True)
class Selection:
    """The tensors that a load is about. All others are left alone: they are neither missing nor unexpected, and nothing of them is read.

    Attributes:
        only: patterns, one of which a tensor must match; None for every tensor. What an optimizer has for no single parameter
            (`global_step`) comes along unless it is excluded: moments without their step count are of no use.
        exclude: patterns, none of which a tensor may match.
    """

    only: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self.only is None and not self.exclude

    def takes(self, key: TensorKey) -> bool:
        """Whether a tensor is chosen."""
        if self.only is not None and key.parameter and not _means(self.only, key):
            return False
        return not (self.exclude and _means(self.exclude, key))

    def catalog(self, catalog: Catalog) -> Catalog:
        """The part of a catalog that is chosen."""
        if self.is_all:
            return catalog
        return replace(catalog, tensors={key: tensor for key, tensor in catalog.tensors.items() if self.takes(key)})

    def description(self, description: RankDescription) -> RankDescription:
        """The part of a description that is chosen."""
        if self.is_all:
            return description
        return replace(description, tensors=tuple(tensor for tensor in description.tensors if self.takes(tensor.key)))

    def groups(self, groups: Sequence[ParameterGroup]) -> tuple[ParameterGroup, ...]:
        """Hyper-parameters of the chosen parameters only."""
        if self.is_all:
            return tuple(groups)
        return tuple(
            replace(
                group,
                parameters=tuple(name for name in group.parameters if self._takes_parameter(name)),
                unstepped=tuple(name for name in group.unstepped if self._takes_parameter(name)),
            )
            for group in groups
        )

    def idle(self, keys: Iterable[TensorKey]) -> tuple[str, ...]:
        """The patterns, of `only` and `exclude`, that mean none of these tensors."""
        left = dict.fromkeys((*(self.only or ()), *self.exclude))
        for key in keys:
            for pattern in [pattern for pattern in left if matches(pattern, key)]:
                del left[pattern]
            if not left:
                break
        return tuple(left)

    def check(self, idle: Collection[str], directory: str) -> None:
        """Refuse an `only` that asks for what isn't there.

        Args:
            idle: the patterns that mean no tensor of the checkpoint, nor one of any rank.
            directory: the checkpoint.

        Raises:
            UsageError: one of them is in `only`.
        """
        missed = [pattern for pattern in self.only or () if pattern in idle]
        if missed:
            raise UsageError(
                "a pattern that means no tensor of the checkpoint or the run",
                file=directory,
                field="only",
                found=", ".join(map(repr, missed)),
                fix="reshard show prints the names that the checkpoint has",
            )

    def _takes_parameter(self, name: str) -> bool:
        if self.only is not None and _any_of(self.only).match(name) is None:
            return False
        return not (self.exclude and _any_of(self.exclude).match(name) is not None)


def select(only: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> Selection:
    """The selection that a caller's patterns make.

    Args:
        only: a pattern or several; None for every tensor.
        exclude: likewise; None for none.

    Raises:
        UsageError: something that is no pattern, or an empty `only`, which would load nothing.
    """
    chosen = None if only is None else _patterns("only", only)
    if chosen == ():
        raise UsageError("a load of no tensor at all", field="only", found=only, expected="patterns of names; None for every tensor")
    return Selection(chosen, () if exclude is None else _patterns("exclude", exclude))


def _patterns(field: str, given: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise UsageError("not a pattern of names", field=field, found=repr(pattern), expected="a text such as 'layers.0.*'")
    return patterns
