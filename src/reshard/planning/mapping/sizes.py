"""Sizes of a model that rules name."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TypeAlias

from reshard.errors import UsageError

Size: TypeAlias = int | str
"""A number, or the name of one in a model's configuration (`num_key_value_heads`)."""

Sizes: TypeAlias = Mapping[str, int]
"""The numbers of a model's configuration; truth values are 0 and 1."""


def size_of(size: Size, sizes: Sizes) -> int:
    """A size as a number; `a*b` is a product.

    Raises:
        UsageError: one that the configuration doesn't have.
    """
    if isinstance(size, int):
        return size
    numbers = []
    for name in size.split("*"):
        number = int(name) if name.isdecimal() else sizes.get(name)
        if number is None:
            raise UsageError(
                "a size of the model isn't known",
                field=name,
                found=", ".join(sorted(sizes)) or "no configuration",
                fix=f"give it to the family: reshard.families.family('…', {name}=…), or load from a folder with a config.json",
            )
        numbers.append(number)
    return prod(numbers)


def quotient(extent: int, parts: int, what: str, shape: tuple[int, ...]) -> int:
    """An extent by a number of parts.

    Args:
        extent: of a dimension.
        parts: how many.
        what: they are, for the error.
        shape: of the tensor, likewise.

    Raises:
        UsageError: it isn't divisible.
    """
    if parts < 1 or extent % parts:
        raise UsageError(
            "a tensor's shape contradicts the configuration of the model",
            found=list(shape),
            expected=f"{extent} divisible by {parts}: {what}",
        )
    return extent // parts
