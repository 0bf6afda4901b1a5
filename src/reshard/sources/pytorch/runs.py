"""A tensor of a `torch.save` file as runs of bytes: views of a storage (transposed, sliced, expanded) are stored with their strides."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

from reshard.errors import DataFileError
from reshard.geometry import Region
from reshard.sources.pytorch.objects import TensorRef

# A tensor in more runs than this would make a plan that is slower than to load and save it again.
MOST_RUNS = 1 << 16


class Run(NamedTuple):
    """A box of a tensor whose elements lie one after the other.

    Attributes:
        region: the box.
        begin: where its bytes begin, from the tensor's first one.
        nbytes: their number.
    """

    region: Region
    begin: int
    nbytes: int


def runs_of(tensor: TensorRef, name: str, path: str) -> tuple[Run, ...]:
    """The runs that a tensor consists of: one, if its elements are stored in row-major order.

    Args:
        tensor: the tensor.
        name: for the error.
        path: likewise.

    Raises:
        DataFileError: too many.
    """
    shape, strides, itemsize = tensor.shape, tensor.strides, tensor.dtype.itemsize
    if tensor.is_contiguous:
        return (Run(Region.whole(shape), 0, tensor.nbytes),)
    inside: set[int] = set()
    expected, last = 1, len(shape)
    for d in sorted((d for d, extent in enumerate(shape) if extent > 1 and strides[d]), key=lambda d: strides[d]):
        if strides[d] != expected or d > last:
            break
        inside.add(d)
        expected, last = expected * shape[d], d
    outside = [d for d, extent in enumerate(shape) if extent > 1 and d not in inside]
    if prod(shape[d] for d in outside) > MOST_RUNS:
        raise DataFileError(
            "a tensor whose elements are stored in another order than row-major can't be read in so many pieces",
            file=path,
            tensor=name,
            found=f"strides {list(strides)} for the shape {list(shape)}",
            expected=f"at most {MOST_RUNS} runs of elements",
            fix="load it with PyTorch and save its .contiguous()",
        )
    extents = tuple(extent if d in inside else 1 for d, extent in enumerate(shape))
    nbytes = itemsize * prod(extents)
    found = []
    for place in product(*(range(shape[d]) for d in outside)):
        at = dict(zip(outside, place, strict=True))
        offset = tuple(at.get(d, 0) for d in range(len(shape)))
        found.append(Run(Region(offset, extents), itemsize * sum(strides[d] * x for d, x in at.items()), nbytes))
    return tuple(found)
