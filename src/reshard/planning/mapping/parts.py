"""Rules in the words that declarations use. Every function gives an expression or a rule; names are patterns, with numbers in braces."""

from __future__ import annotations

from collections.abc import Sequence

from reshard.planning.mapping.names import Rule
from reshard.planning.mapping.rules import Choice, Concatenation, Expression, Flattening, Leaf, Size, Stack, Transposition, Window


def _expression(part: str | Expression) -> Expression:
    return Leaf(part) if isinstance(part, str) else part


def rename(name: str, atom: str) -> Rule:
    """A tensor that is an atom under another name."""
    return Rule(name, Leaf(atom))


def concatenate(*parts: str | Expression, axis: int = 0, shares: Sequence[Size] | None = None) -> Expression:
    """Parts one after the other along an axis.

    Args:
        parts: in their order.
        axis: of all of them.
        shares: how the axis is shared out, in any unit; evenly by default.
    """
    return Concatenation(tuple(map(_expression, parts)), axis, tuple(shares or (1,) * len(parts)))


def interleave(*parts: str | Expression, groups: Size | None = None, axis: int = 0, shares: Sequence[Size] | None = None) -> Expression:
    """Of each part its first group along an axis, then of each its second, and so on.

    Args:
        parts: in their order inside a group.
        groups: how many groups there are (the heads of keys and values); None: each element is one, so that the parts alternate by rows.
        axis: of all parts.
        shares: how a group is shared out, in any unit; evenly by default.
    """
    return Concatenation(tuple(map(_expression, parts)), axis, tuple(shares or (1,) * len(parts)), groups)


def stack(part: str | Expression, over: str, count: Size, axis: int = 0) -> Expression:
    """Tensors alike along a new axis, numbered from 0 on.

    Args:
        part: what each of them is, with the number's name in braces.
        over: the name of the number.
        count: how many there are.
        axis: the new axis.
    """
    return Stack(_expression(part), over, count, axis)


def transpose(part: str | Expression, axes: Sequence[int] = (1, 0)) -> Expression:
    """The axes in another order, as numpy's `transpose` has it."""
    return Transposition(_expression(part), tuple(axes))


def flatten(part: str | Expression, outer: Size, axis: int = 0) -> Expression:
    """An axis, of `outer` places, and the one after it as one."""
    return Flattening(_expression(part), axis, outer)


def pad(part: str | Expression, size: Size, to: Size, axis: int = 0, fill: float = 0.0) -> Expression:
    """More along an axis, with a declared value behind what there is.

    Args:
        part: what is padded.
        size: its extent.
        to: the extent with the padding.
        axis: which.
        fill: the value of the padding.
    """
    return Window(_expression(part), axis, size, to, fill)


def crop(part: str | Expression, size: Size, to: Size, axis: int = 0, begin: int = 0) -> Expression:
    """Less along an axis: `to` of `size`, from `begin` on."""
    return Window(_expression(part), axis, size, to, None, begin)


def either(option: str, then: str | Expression, otherwise: str | Expression, *, default: bool) -> Expression:
    """One of two, as an option of the model's configuration says; `default` where it doesn't."""
    return Choice(option, _expression(then), _expression(otherwise), default)
