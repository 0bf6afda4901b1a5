"""Rules evaluated by numpy: what a mapping must give, without a lattice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from reshard.planning.mapping.rules import Choice, Concatenation, Expression, Flattening, Leaf, Sizes, Stack, Transposition, Window, size_of


def evaluate(expression: Expression, atoms: Mapping[str, np.ndarray], sizes: Sizes, numbers: Mapping[str, int] | None = None) -> np.ndarray:
    """The array that an expression makes of atoms."""
    numbers = dict(numbers or {})
    match expression:
        case Leaf(pattern):
            return atoms[pattern.format(**numbers)]
        case Concatenation(of, axis, _, groups):
            parts = [evaluate(part, atoms, sizes, numbers) for part in of]
            count = parts[0].shape[axis] if groups is None else size_of(groups, sizes)
            split = [part.reshape(*part.shape[:axis], count, -1, *part.shape[axis + 1 :]) for part in parts]
            joined = np.concatenate(split, axis + 1)
            return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])
        case Stack(of, over, count, axis):
            every = range(size_of(count, sizes))
            return np.stack([evaluate(of, atoms, sizes, {**numbers, over: number}) for number in every], axis)
        case Transposition(of, axes):
            return evaluate(of, atoms, sizes, numbers).transpose(axes)
        case Flattening(of, axis, _):
            made = evaluate(of, atoms, sizes, numbers)
            return made.reshape(*made.shape[:axis], -1, *made.shape[axis + 2 :])
        case Window(of, axis, inside, extent, fill, begin):
            made = np.moveaxis(evaluate(of, atoms, sizes, numbers), axis, 0)
            kept = made[begin : begin + min(size_of(extent, sizes), size_of(inside, sizes) - begin)]
            out = np.full((size_of(extent, sizes), *made.shape[1:]), 0 if fill is None else fill, made.dtype)
            out[: len(kept)] = kept
            return np.moveaxis(out, 0, axis)
        case Choice(option, then, otherwise, default):
            return evaluate(then if sizes.get(option, default) else otherwise, atoms, sizes, numbers)
        case _:
            raise AssertionError(expression)
