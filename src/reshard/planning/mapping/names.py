"""Namings: which tensors a model has under one way of naming it, and how each is made of atoms, the finest parts that namings share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

from reshard.errors import ReshardError, UsageError, extended
from reshard.planning.mapping.compositions import Composition, Fill, LeafKey, Shape
from reshard.planning.mapping.lattice import Lattice, identity
from reshard.planning.mapping.rules import Expression, Sizes, Stack

# What a pattern has in braces stands for a number: of a layer, of an expert.
_NUMBER = re.compile(r"\\\{(\w+)\\\}")

_Binding = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Rule:
    """How a tensor of a naming is made of atoms.

    Attributes:
        name: the pattern of its name; what is in braces stands for a number (`decoder.layers.{layer}.mlp.linear_fc1.weight`).
        of: what it is made of.
    """

    name: str
    of: Expression


class Named(NamedTuple):
    """A tensor of a naming.

    Attributes:
        name: its name.
        shape: its shape.
        parts: what it has of each atom: the atom's name, and the tensor on the left, the atom on the right.
        fills: what it has of values that rules declare: the value, and the tensor on the left.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, Lattice], ...]
    fills: tuple[tuple[float, Lattice], ...] = ()


@dataclass(frozen=True)
class Assembled:
    """The tensors that atoms make under a naming.

    Attributes:
        tensors: by name.
        incomplete: of those for which atoms are missing, these atoms.
    """

    tensors: Mapping[str, Named]
    incomplete: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Naming:
    """One way of naming a model. What no rule is about has the same name as its atom.

    Attributes:
        rules: about the tensors that aren't atoms themselves.

    Raises:
        UsageError: two rules about one name, or a pattern whose numbers don't say which tensor it is of.
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for rule in self.rules:
            shown = re.sub(r"\{\w+\}", "{}", rule.name)
            if shown in seen:
                raise UsageError("two rules say what one tensor is made of: its elements would be covered twice", tensor=rule.name)
            seen.add(shown)
            bound, over = set(re.findall(r"\{(\w+)\}", rule.name)), set(_stacked(rule.of))
            for pattern in rule.of.patterns():
                if set(re.findall(r"\{(\w+)\}", pattern)) - over != bound:
                    raise UsageError(
                        "the numbers in a rule's names don't say which tensors belong together",
                        tensor=rule.name,
                        found=pattern,
                        expected=f"in braces the same as in the name{' and ' + ', '.join(sorted(over)) if over else ''}",
                    )

    @cached_property
    def _by_name(self) -> _Patterns:
        return _Patterns([(rule.name, index) for index, rule in enumerate(self.rules)])

    @cached_property
    def _by_leaf(self) -> _Patterns:
        return _Patterns([(pattern, index) for index, rule in enumerate(self.rules) for pattern in rule.of.patterns()])

    @cached_property
    def _stacked(self) -> list[frozenset[str]]:
        """Of each rule the numbers that its stacks count."""
        return [frozenset(_stacked(rule.of)) for rule in self.rules]

    @cached_property
    def _known(self) -> dict[tuple[int, tuple[Shape, ...], tuple[tuple[str, int], ...]], Composition]:
        return {}

    def count(self, names: Iterable[str]) -> int:
        """How many of some names rules of this naming are about."""
        return sum(1 for name in names if self._by_name.has(name))

    def is_atom(self, name: str) -> bool:
        """Whether rules of this naming are made of the tensor of this name."""
        return self._by_leaf.has(name)

    def is_renamed(self, name: str) -> bool:
        """Whether a name is that of an atom and of a tensor of a rule, too."""
        return self._by_name.has(name)

    def take_apart(self, name: str, shape: Shape, sizes: Sizes) -> tuple[Named, Mapping[str, Shape]]:
        """What a tensor under this naming is made of, and the shapes of these atoms.

        Raises:
            UsageError: it can't have this shape, or a size that is needed isn't known.
        """
        found = self._by_name.find(name)
        if found is None:
            return Named(name, shape, ((name, _identity(shape)),)), {name: shape}
        index, binding = found
        rule = self.rules[index]
        shapes: dict[LeafKey, Shape] = {}
        try:
            rule.of.spread(shape, sizes, shapes)
            named = self._compose(index, name, binding, shapes, sizes)
        except ReshardError as error:
            raise extended(error, ("of", name)) from error
        return named, {_atom(leaf, binding): own for leaf, own in shapes.items()}

    def assemble(self, atoms: Mapping[str, Shape], sizes: Sizes) -> Assembled:
        """The tensors that atoms of these shapes make under this naming.

        Raises:
            UsageError: atoms of a tensor don't fit together, or a size that is needed isn't known.
        """
        tensors: dict[str, Named] = {}
        incomplete: dict[str, tuple[str, ...]] = {}
        done: set[tuple[int, _Binding]] = set()
        for atom, shape in atoms.items():
            matches = self._by_leaf.find_all(atom)
            if not matches:
                tensors[atom] = Named(atom, shape, ((atom, _identity(shape)),))
            for index, numbers in matches:
                rule, over = self.rules[index], self._stacked[index]
                binding = tuple((key, number) for key, number in numbers if key not in over) if over else numbers
                if (index, binding) in done:
                    continue
                done.add((index, binding))
                name = rule.name.format(**dict(binding))
                try:
                    leaves = {leaf: _atom(leaf, binding) for leaf in rule.of.leaves(sizes)}
                    missing = tuple(own for own in leaves.values() if own not in atoms)
                    if missing:
                        incomplete[name] = missing
                    else:
                        tensors[name] = self._compose(index, name, binding, {leaf: atoms[own] for leaf, own in leaves.items()}, sizes)
                except ReshardError as error:
                    raise extended(error, ("of", name)) from error
        return Assembled(tensors, incomplete)

    def completed(self, atoms: Mapping[str, Shape], sizes: Sizes) -> dict[str, Shape]:
        """Atoms with those that belong to the same tensors, whose shapes follow from theirs."""
        found = dict(atoms)
        for index, binding in {
            (index, tuple((key, number) for key, number in numbers if key not in self._stacked[index]))
            for atom in atoms
            for index, numbers in self._by_leaf.find_all(atom)
        }:
            rule = self.rules[index]
            leaves = {leaf: _atom(leaf, binding) for leaf in rule.of.leaves(sizes)}
            known = {leaf: atoms[own] for leaf, own in leaves.items() if own in atoms}
            shape = rule.of.infer(known, sizes)
            if shape is not None and len(known) < len(leaves):
                shapes: dict[LeafKey, Shape] = {}
                rule.of.spread(shape, sizes, shapes)
                for leaf, own in leaves.items():
                    found.setdefault(own, shapes[leaf])
        return found

    def _compose(self, index: int, name: str, binding: _Binding, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Named:
        # Layers are alike: one composition for all of them.
        alike = (index, tuple(shapes.values()), tuple(sorted(sizes.items())))
        composition = self._known.get(alike)
        if composition is None:
            composition = self._known[alike] = self.rules[index].of.compose(shapes, sizes)
        parts = tuple((_atom(leaf, binding), lattice) for leaf, lattice in composition.parts if not isinstance(leaf, Fill))
        fills = tuple((leaf.value, lattice) for leaf, lattice in composition.parts if isinstance(leaf, Fill))
        return Named(name, composition.shape, parts, fills)


class _Patterns:
    """Patterns of names, each with a number of its own."""

    def __init__(self, patterns: Iterable[tuple[str, int]]) -> None:
        self._plain: dict[str, list[int]] = {}
        self._others: list[tuple[re.Pattern[str], int]] = []
        self._by_shape: dict[str, list[tuple[re.Pattern[str], int]]] = {}
        for pattern, index in patterns:
            if "{" not in pattern:
                self._plain.setdefault(pattern, []).append(index)
            else:
                compiled = re.compile(_NUMBER.sub(r"(?P<\1>[0-9]+)", re.escape(pattern)))
                # By the name with all numbers left out, of which each pattern has one.
                self._by_shape.setdefault(_without_numbers(re.sub(r"\{\w+\}", "0", pattern)), []).append((compiled, index))

    def find_all(self, name: str) -> list[tuple[int, _Binding]]:
        """The numbers of the patterns that a name matches, each with what its braces stand for.

        A pattern that has a number itself counts more than those that have braces there: of one layer something else may hold.
        """
        found: list[tuple[int, _Binding]] = [(index, ()) for index in self._plain.get(name, ())]
        for pattern, index in self._by_shape.get(_without_numbers(name), ()):
            match = pattern.fullmatch(name)
            if match is not None:
                found.append((index, tuple((key, int(number)) for key, number in match.groupdict().items())))
        if len(found) > 1:
            fewest = min(len(binding) for _, binding in found)
            found = [one for one in found if len(one[1]) == fewest]
        return found

    def find(self, name: str) -> tuple[int, _Binding] | None:
        """The first of them."""
        return next(iter(self.find_all(name)), None)

    def has(self, name: str) -> bool:
        """Whether a name matches any."""
        return name in self._plain or any(pattern.fullmatch(name) for pattern, _ in self._by_shape.get(_without_numbers(name), ()))


_DIGITS = re.compile(r"[0-9]+")

# The names of the largest models, which are asked for once for each naming of a family, and more often.
_NAMES_KEPT = 1 << 18


@lru_cache(_NAMES_KEPT)
def _without_numbers(name: str) -> str:
    return _DIGITS.sub("#", name)


def _stacked(expression: Expression) -> list[str]:
    """The numbers that stacks of an expression count."""
    own = [expression.over] if isinstance(expression, Stack) else []
    return own + [name for part in expression.parts() for name in _stacked(part)]


def _atom(leaf: LeafKey, binding: _Binding) -> str:
    pattern, numbers = leaf
    return pattern.format(**dict(binding), **dict(numbers)) if "{" in pattern else pattern


@cache
def _identity(shape: Shape) -> Lattice:
    """One object for each shape: what follows from a lattice is made once."""
    return identity(shape)
