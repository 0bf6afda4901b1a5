"""What one rank is going to load, before the ranks have agreed that they all can."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from reshard.catalog import Catalog
from reshard.format.common import CommonInfo
from reshard.format.safetensors import TensorEntry
from reshard.loading.budget import MEMORY_BUDGET, check_budget
from reshard.loading.findings import bits_of, findings_of, key_out, unlisted_of
from reshard.loading.handing import Offer, offer_columns
from reshard.loading.mapped import casts_of
from reshard.loading.reader import locate
from reshard.loading.scales import PlannedScales, plan_scales
from reshard.loading.selection import Selection
from reshard.loading.spare import Spare
from reshard.loading.strictness import Strictness
from reshard.planning.agreement import RankDescription, describe
from reshard.planning.mapping.wanted import Asked, Told, ask
from reshard.planning.read_plan import ReadPlan, plan_reads
from reshard.sources.stored import Headers
from reshard.state import GLOBAL_STEP, Kind, Shard, State, TensorKey


@dataclass(frozen=True)
class PlannedLoad:
    """What one rank is going to load, before the ranks have agreed that they all can.

    Attributes:
        state: what it fills.
        wanted: the part of its description that the load is about.
        catalog: what the checkpoint holds.
        chosen: the part of it that the load is about.
        common: the checkpoint's training information.
        headers: of its files.
        selection: which part that is.
        strictness: what to do about misfits.
        plan: what the rank reads.
        entries: where that lies; of a direct load only.
        filled: the tensors that have a value without being in the checkpoint.
        balanced: whether ranks read for each other.
        memory_budget: bytes for staging, mapped windows and messages.
        verify: whether what is read is held against digests.
        findings: what the rank tells the others.
        told: the checkpoint's catalog in strands, where the load goes through a mapping; then `state`, `wanted`, `catalog` and `chosen` are
            in strands, too.
        fills: memory to be filled before anything is read, and with what.
        scales: what is read of scales before anything else, where the load is about tensors that are quantised by block.
        spare: what of the checkpoint a run may well lack.
        offer: what other ranks of the machine may fill.
        seconds: how long it took to open and to plan.
    """

    state: State
    wanted: RankDescription
    catalog: Catalog
    chosen: Catalog
    common: CommonInfo | None
    headers: Headers
    selection: Selection
    strictness: Strictness
    plan: ReadPlan
    entries: list[list[TensorEntry]]
    filled: tuple[TensorKey, ...]
    balanced: bool
    memory_budget: int
    verify: bool
    findings: bytes
    seconds: Mapping[str, float]
    told: Told | None = None
    fills: tuple[tuple[Shard, float], ...] = ()
    scales: PlannedScales | None = None
    spare: Spare = Spare()  # noqa: RUF009 - frozen
    offer: Offer | None = None

    def close(self) -> None:
        """Let no other rank write into this one's memory any more."""
        if self.offer is not None:
            self.offer.door.close()

    def run_keys(self, keys: Iterable[TensorKey]) -> Iterable[TensorKey]:
        """The run's tensor that each of some keys is about."""
        return keys if self.told is None else map(self.told.run_key, keys)


def plan_load(
    state: State,
    description: RankDescription,
    catalog: Catalog,
    *,
    common: CommonInfo | None,
    headers: Headers,
    strictness: Strictness,
    kinds: frozenset[Kind],
    has_random: bool,
    installs: bool = True,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    opening: float = 0.0,
    balanced: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    verify: bool = True,
    neighbours: bool = False,
    told: Told | None = None,
    config: Mapping[str, Any] | None = None,
) -> PlannedLoad:
    """Plan what one rank loads, and check the headers of the files that it reads. Local; nothing is written to memory.

    Args:
        state: what this rank wants to fill.
        description: of the state.
        catalog: what the checkpoint holds, the same on every rank.
        common: the checkpoint's training information; gives the step count when there is no tensor for it.
        headers: where the tensors lie in its files.
        strictness: what to do about misfits.
        kinds: the kinds of tensors that this rank loads; those that no rank loads are not unexpected in the checkpoint.
        has_random: whether this rank found the random states of its place.
        installs: whether it has anything to install when its tensors are filled.
        selection: the tensors that the load is about, the same on every rank.
        opening: the seconds that it took to open the checkpoint, for the report.
        balanced: whether ranks read for each other, so that each byte is read once in the whole job; the same on every rank.
        memory_budget: bytes for staging, mapped windows and messages; the same on every rank.
        verify: whether what is read is held against digests; the same on every rank.
        neighbours: whether ranks of one machine may read rows for each other; the same on every rank.
        told: the catalog in strands, where the load goes through a mapping.
        config: the model's description (`config.json`), which says by which blocks tensors are quantised, and what is tied; None when
            there is none.

    Raises:
        UsageError: a budget too small to work with, or a tensor is quantised by nobody knows which blocks.
        MismatchError: a scale that doesn't fit its tensor.
        DamagedCheckpointError: the checkpoint is not what it promises.
    """
    started = time.perf_counter()
    check_budget(memory_budget)
    known = catalog.tensors.keys() if told is None else told.links.tensors.keys()
    stored, asked, casts = catalog, Asked(state), casts_of(strictness, told)
    if told is None:
        chosen, wanted = selection.catalog(catalog), selection.description(description)
    else:
        catalog, asked = told.catalog, ask(state, told.links, selection.takes)
        taken = {key: tensor for key, tensor in catalog.tensors.items() if selection.takes(told.run_key(key))}
        chosen, wanted = replace(catalog, tensors=taken), describe(asked.state, description.rank)
    plan = plan_reads(wanted, chosen, casts)
    plan = replace(plan, mismatched=(*plan.mismatched, *asked.mismatched))
    of_direct = None if balanced else headers
    scales = plan_scales(asked.state, stored, chosen, told, config=config, casts=casts, rank=description.rank, headers=of_direct)
    entries = [] if balanced else locate(plan, headers)
    filled = (GLOBAL_STEP,) if GLOBAL_STEP in plan.missing and common is not None and common.global_step is not None else ()
    unlisted = [] if balanced else unlisted_of(plan.files, headers, catalog)
    found = findings_of(plan, filled, list(chosen.tensors), has_random=has_random, installs=installs, unlisted=unlisted, kinds=kinds)
    if scales is not None:
        found.scales = bits_of(list(chosen.tensors), [key for key in chosen.tensors if (told.stored[key] if told else key) in scales.keys])
    if not selection.is_all:
        mine = [tensor.key for tensor in description.tensors if tensor.key not in known]
        found.left_out = [key_out(key) for key in mine if not selection.takes(key)]
        found.idle = list(selection.idle([*known, *mine]))
    spare = Spare.of(config, stored)
    # Last: whoever has made one must close it.
    offer = offer_columns(plan, asked.state, wanted) if neighbours and not balanced else None
    found.door = None if offer is None else offer.door.notice
    seconds = {"open": opening, "plan": time.perf_counter() - started}
    return PlannedLoad(
        asked.state,
        wanted,
        catalog,
        chosen,
        common,
        headers,
        selection,
        strictness,
        plan,
        entries,
        filled,
        balanced,
        memory_budget,
        verify,
        msgspec.msgpack.encode(found),
        seconds,
        told,
        asked.fills,
        scales,
        spare,
        offer,
    )
