"""Rules: how a tensor of one naming is made of others, as an expression of concatenations, stacks, transpositions and the like.

An expression says where elements lie, never what they are. So it works in both directions: from the shapes of its parts to that of the
whole, and back, with the shares that concatenations declare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from reshard.errors import UsageError
from reshard.planning.mapping.compositions import (
    Composition,
    Fill,
    LeafKey,
    Shape,
    concatenate,
    merge,
    replaced,
    split,
    with_axis,
    with_range,
)
from reshard.planning.mapping.lattice import Face, Lattice, clip, identity, part_of
from reshard.planning.mapping.sizes import Size, Sizes, quotient, size_of


class Expression(Protocol):
    """A part of a rule."""

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        """What it is made of."""
        ...

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        """Its shape, as far as those of some leaves say it."""
        ...

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        """Find the shapes of its leaves from its own. Raises UsageError when it can't have this shape."""
        ...

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        """How it is made of leaves of these shapes. Raises UsageError when they don't fit together."""
        ...

    def patterns(self) -> list[str]:
        """The patterns of its leaves' names, whatever the sizes are."""
        return [pattern for part in self.parts() for pattern in part.patterns()]

    def parts(self) -> Sequence[Expression]:
        """The expressions that it consists of."""
        return ()


@dataclass(frozen=True)
class Leaf(Expression):
    """A tensor itself, by the pattern of its name (`model.layers.{layer}.mlp.up_proj.weight`)."""

    pattern: str

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        return [(self.pattern, ())]

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        return known.get((self.pattern, ()))

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        found[self.pattern, ()] = shape

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        shape = shapes[self.pattern, ()]
        return Composition(shape, (((self.pattern, ()), identity(shape)),))

    def patterns(self) -> list[str]:
        return [self.pattern]


def renamed(expression: Expression, change: Callable[[str], str]) -> Expression:
    """The same expression of tensors with other names."""
    match expression:
        case Leaf(pattern):
            return Leaf(change(pattern))
        case Concatenation():
            return replace(expression, of=tuple(renamed(part, change) for part in expression.of))
        case Choice():
            return replace(expression, then=renamed(expression.then, change), otherwise=renamed(expression.otherwise, change))
        case Stack() | Transposition() | Flattening() | Window():
            return replace(expression, of=renamed(expression.of, change))
        case _:
            raise UsageError("an expression that can't be renamed", found=type(expression).__name__)


@dataclass(frozen=True)
class Concatenation(Expression):
    """Parts one after the other along a dimension; with groups, group after group: of each part its first group, then of each its second.

    Attributes:
        of: the parts.
        axis: along which they lie.
        shares: how many times a common unit each part has along the axis.
        groups: the number of groups; None for as many as the parts have elements there (then they alternate element by element).
    """

    of: tuple[Expression, ...]
    axis: int
    shares: tuple[Size, ...]
    groups: Size | None = 1

    def parts(self) -> Sequence[Expression]:
        return self.of

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        return [leaf for part in self.of for leaf in part.leaves(sizes)]

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        for part, share in zip(self.of, self._shares(sizes), strict=True):
            shape = part.infer(known, sizes)
            if shape is not None:
                unit = quotient(shape[self.axis], share, "a part of a concatenation", shape)
                return replaced(shape, self.axis, unit * sum(self._shares(sizes)))
        return None

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        shares = self._shares(sizes)
        if self.axis >= len(shape):
            raise UsageError("a concatenation along a dimension that the tensor doesn't have", found=list(shape), expected=self.axis)
        unit = quotient(shape[self.axis], sum(shares), f"a concatenation of {len(shares)} parts with shares {list(shares)}", shape)
        for part, share in zip(self.of, shares, strict=True):
            part.spread(replaced(shape, self.axis, unit * share), sizes, found)

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        made = [part.compose(shapes, sizes) for part in self.of]
        first = made[0].shape
        if self.axis >= len(first):
            raise UsageError("a concatenation along a dimension that the tensors don't have", found=list(first), expected=self.axis)
        if any(replaced(one.shape, self.axis, 0) != replaced(first, self.axis, 0) for one in made if len(one.shape) == len(first)) or any(
            len(one.shape) != len(first) for one in made
        ):
            raise UsageError("the parts of a concatenation don't fit together", found=[list(one.shape) for one in made])
        groups = first[self.axis] if self.groups is None else size_of(self.groups, sizes)
        if groups != 1:
            made = [split(one, self.axis, quotient(one.shape[self.axis], groups, f"{groups} groups", one.shape)) for one in made]
            return merge(concatenate(made, self.axis + 1), self.axis)
        return concatenate(made, self.axis)

    def _shares(self, sizes: Sizes) -> list[int]:
        return [size_of(share, sizes) for share in self.shares]


@dataclass(frozen=True)
class Stack(Expression):
    """The same expression for every number from 0 on, along a new dimension.

    Attributes:
        of: the expression; its patterns have the number's name in braces.
        over: the name of the number.
        count: how many there are.
        axis: the new dimension.
    """

    of: Expression
    over: str
    count: Size
    axis: int = 0

    def parts(self) -> Sequence[Expression]:
        return (self.of,)

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        inner = self.of.leaves(sizes)
        return [self._numbered(leaf, number) for number in range(size_of(self.count, sizes)) for leaf in inner]

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        count = size_of(self.count, sizes)
        for number in range(count):
            shape = self.of.infer(_Numbered(self, known, number), sizes)
            if shape is not None:
                return (*shape[: self.axis], count, *shape[self.axis :])
        return None

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        count = size_of(self.count, sizes)
        if len(shape) <= self.axis or shape[self.axis] != count:
            raise UsageError("a stack of another number of tensors", found=list(shape), expected=f"{count} along dimension {self.axis}")
        inner: dict[LeafKey, Shape] = {}
        self.of.spread((*shape[: self.axis], *shape[self.axis + 1 :]), sizes, inner)
        for number in range(count):
            for leaf, own in inner.items():
                found[self._numbered(leaf, number)] = own

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        count = size_of(self.count, sizes)
        made = []
        alike: dict[tuple[Shape, ...], Composition] = {}
        inner = self.of.leaves(sizes)
        for number in range(count):
            own = tuple(shapes[self._numbered(leaf, number)] for leaf in inner)
            if own not in alike:
                alike[own] = with_axis(self.of.compose(dict(zip(inner, own, strict=True)), sizes), self.axis)
            one = alike[own]
            parts = ((leaf if isinstance(leaf, Fill) else self._numbered(leaf, number), lattice) for leaf, lattice in one.parts)
            made.append(replace(one, parts=tuple(parts)))
        if len({one.shape for one in made}) > 1:
            raise UsageError("the tensors of a stack have different shapes", found=sorted({one.shape for one in made}))
        return concatenate(made, self.axis)

    def _numbered(self, leaf: LeafKey, number: int) -> LeafKey:
        return leaf[0], ((self.over, number), *leaf[1])


class _Numbered(Mapping[LeafKey, Shape]):
    """What is known of the leaves of one place of a stack."""

    def __init__(self, stack: Stack, known: Mapping[LeafKey, Shape], number: int) -> None:
        self._stack, self._known, self._number = stack, known, number

    def __getitem__(self, leaf: LeafKey) -> Shape:
        return self._known[leaf[0], ((self._stack.over, self._number), *leaf[1])]

    def __iter__(self) -> Iterator[LeafKey]:
        place = (self._stack.over, self._number)
        return ((pattern, numbers[1:]) for pattern, numbers in self._known if numbers[:1] == (place,))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Transposition(Expression):
    """The dimensions in another order: dimension d is dimension `axes[d]` of what it is of, as numpy's `transpose` counts."""

    of: Expression
    axes: tuple[int, ...]

    def parts(self) -> Sequence[Expression]:
        return (self.of,)

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        return self.of.leaves(sizes)

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        shape = self.of.infer(known, sizes)
        return None if shape is None else tuple(shape[axis] for axis in self._order(len(shape)))

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        order = self._order(len(shape))
        self.of.spread(tuple(shape[order.index(d)] for d in range(len(shape))), sizes, found)

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        made = self.of.compose(shapes, sizes)
        order = self._order(len(made.shape))
        shape = tuple(made.shape[axis] for axis in order)

        def faced(face: Face) -> Face:
            return Face(shape, tuple(face.offset[axis] for axis in order), tuple(order.index(d) for d in face.dims), face.steps)

        return made.placed(shape, [replace(lattice, left=faced(lattice.left)) for _, lattice in made.parts])

    def _order(self, dimensions: int) -> tuple[int, ...]:
        if sorted(self.axes) != list(range(dimensions)):
            raise UsageError("a transposition of other dimensions", found=list(self.axes), expected=f"an order of {dimensions}")
        return self.axes


@dataclass(frozen=True)
class Flattening(Expression):
    """A dimension and the one after it as one.

    Attributes:
        of: the expression.
        axis: the first of the two.
        outer: how many places the first one has.
    """

    of: Expression
    axis: int
    outer: Size

    def parts(self) -> Sequence[Expression]:
        return (self.of,)

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        return self.of.leaves(sizes)

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        shape = self.of.infer(known, sizes)
        return None if shape is None else (*shape[: self.axis], shape[self.axis] * shape[self.axis + 1], *shape[self.axis + 2 :])

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        outer = size_of(self.outer, sizes)
        inner = quotient(shape[self.axis], outer, f"{outer} tensors in one dimension", shape)
        self.of.spread((*shape[: self.axis], outer, inner, *shape[self.axis + 1 :]), sizes, found)

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        return merge(self.of.compose(shapes, sizes), self.axis)


@dataclass(frozen=True)
class Window(Expression):
    """Another range of a dimension: less of it (a crop), or more, with a declared value in what is added (padding).

    Attributes:
        of: the expression.
        axis: the dimension.
        inside: its extent in what it is of.
        extent: its extent here.
        fill: the value of what is added; None when nothing is.
        begin: where the range begins in what it is of.
    """

    of: Expression
    axis: int
    inside: Size
    extent: Size
    fill: float | None = None
    begin: int = 0

    def parts(self) -> Sequence[Expression]:
        return (self.of,)

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        return self.of.leaves(sizes)

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        shape = self.of.infer(known, sizes)
        return None if shape is None else replaced(shape, self.axis, size_of(self.extent, sizes))

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        extent = size_of(self.extent, sizes)
        if shape[self.axis] != extent:
            raise UsageError("a padded or cropped tensor of another extent", found=list(shape), expected=f"{extent} along {self.axis}")
        self.of.spread(replaced(shape, self.axis, size_of(self.inside, sizes)), sizes, found)

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        made = self.of.compose(shapes, sizes)
        inside, extent = size_of(self.inside, sizes), size_of(self.extent, sizes)
        if made.shape[self.axis] != inside:
            raise UsageError("a tensor to pad or crop of another extent", found=list(made.shape), expected=f"{inside} along {self.axis}")
        if extent > inside - self.begin and self.fill is None:
            raise UsageError("elements that nothing fills", found=f"{extent} of {inside} from {self.begin}", expected="a fill, or less")
        shape = replaced(made.shape, self.axis, extent)
        kept = with_range(made.shape, self.axis, self.begin, min(extent, inside - self.begin))
        parts: list[tuple[LeafKey | Fill, Lattice]] = []
        for leaf, lattice in made.parts:
            for box in clip(lattice.extents, lattice.left, kept):
                part = part_of(lattice, box)
                offset = tuple(o - (self.begin if d == self.axis else 0) for d, o in enumerate(part.left.offset))
                parts.append((leaf, replace(part, left=replace(part.left, shape=shape, offset=offset))))
        added = extent - (inside - self.begin)
        if added > 0 and self.fill is not None:
            lattice = identity(replaced(made.shape, self.axis, added))
            offset = tuple(inside - self.begin if d == self.axis else 0 for d in range(len(shape)))
            parts.append((Fill(self.fill), replace(lattice, left=replace(lattice.left, shape=shape, offset=offset))))
        return Composition(shape, tuple(parts))


@dataclass(frozen=True)
class Choice(Expression):
    """One of two expressions, as an option of the model's configuration says.

    Attributes:
        option: its name.
        then: where it holds.
        otherwise: where it doesn't.
        default: whether it holds where the configuration doesn't say.
    """

    option: str
    then: Expression
    otherwise: Expression
    default: bool

    def parts(self) -> Sequence[Expression]:
        return (self.then, self.otherwise)

    def _chosen(self, sizes: Sizes) -> Expression:
        return self.then if sizes.get(self.option, self.default) else self.otherwise

    def leaves(self, sizes: Sizes) -> list[LeafKey]:
        return self._chosen(sizes).leaves(sizes)

    def infer(self, known: Mapping[LeafKey, Shape], sizes: Sizes) -> Shape | None:
        return self._chosen(sizes).infer(known, sizes)

    def spread(self, shape: Shape, sizes: Sizes, found: dict[LeafKey, Shape]) -> None:
        self._chosen(sizes).spread(shape, sizes, found)

    def compose(self, shapes: Mapping[LeafKey, Shape], sizes: Sizes) -> Composition:
        return self._chosen(sizes).compose(shapes, sizes)
