"""Tensors of which ranks need columns: each a part of every row, and so of every page, that lies in a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod

from reshard.catalog import Catalog
from reshard.geometry.cover import find_overlap
from reshard.planning.agreement import RankDescription
from reshard.planning.byte_runs import run_bytes
from reshard.planning.exchange_plan import ExchangePlan, plan_held
from reshard.planning.holders import Holders, find_holders
from reshard.planning.read_plan import ReadPlan
from reshard.state import TensorKey

# Of a run this long nearly all lies on pages of which nobody else needs a part.
_SHORT_RUN_BYTES = 8 << 10

# Each tensor costs a rank some calls more when it is read for others, too.
_LEAST_BYTES = 256 << 10


def columns_in(plan: ReadPlan) -> dict[TensorKey, int]:
    """The tensors of which a rank needs columns, with how many bytes of such: those of some size, and not converted on the way."""
    found: dict[TensorKey, int] = {}
    for movement, keys, _ in plan.batches:
        if movement.is_run or movement.nbytes < _LEAST_BYTES:
            continue
        if run_bytes(movement.source.shape, movement.strides, movement.dtype.itemsize) < _SHORT_RUN_BYTES:
            for key in keys:
                found[key] = found.get(key, 0) + movement.nbytes
    for misfit in plan.cast:
        found.pop(misfit.key, None)
    return found


def plan_together(descriptions: Sequence[RankDescription], catalog: Catalog) -> ExchangePlan:
    """Who of some ranks reads which rows for whom: of the tensors that these ranks need whole together, each a part.

    Args:
        descriptions: of these ranks: the tensors of which each needs columns.
        catalog: what the checkpoint holds; it has all of these tensors.
    """
    holders = find_holders(descriptions)
    # Tensors that are held alike share what says so.
    whole = {identity: _is_whole(one) for identity, one in {id(one): one for one in holders.values()}.items()}
    together = {key: one for key, one in holders.items() if whole[id(one)]}
    return plan_held(together, catalog, [description.rank for description in descriptions])


def of_tensors(description: RankDescription, keys: Collection[TensorKey]) -> RankDescription:
    """The part of a description that is about some tensors."""
    return replace(description, tensors=tuple(tensor for tensor in description.tensors if tensor.key in keys))


def _is_whole(holders: Holders) -> bool:
    """Whether what ranks hold of a tensor are parts that don't overlap, and together all of it: then no gap has to be read over."""
    held = [holding for holding, _ in holders.different()]
    parts = list(dict.fromkeys(region for holding in held for region in holding.regions if not region.is_empty))
    return len(parts) > 1 and sum(part.size for part in parts) == prod(held[0].global_shape) and find_overlap(parts) is None
