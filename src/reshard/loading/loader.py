"""The load of one job: every rank plans, all agree, each reads its part, all hear how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass, replace
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from reshard.catalog import Catalog, StoredTensor
from reshard.comm import Communicator
from reshard.comm.together import attempt, settle
from reshard.errors import MismatchError, extended
from reshard.format.common import CommonInfo
from reshard.format.names import tensor_name
from reshard.format.safetensors import TensorEntry
from reshard.geometry import Region
from reshard.loading.budget import MEMORY_BUDGET, check_budget
from reshard.loading.exchange import PreparedExchange, agree_on_exchange
from reshard.loading.findings import (
    NAMES_SHOWN,
    Findings,
    bits_of,
    cast_words,
    findings_of,
    idle_patterns,
    key_out,
    merge_findings,
    scale_keys,
    skipped_names,
    unlisted_of,
)
from reshard.loading.handing import Handing, Offer, agree_on_handing, offer_columns
from reshard.loading.handover import read_direct
from reshard.loading.lanes import Traffic, run_exchange
from reshard.loading.mapped import casts_of, known_misfits, words_of_missing
from reshard.loading.reader import locate, read_plan
from reshard.loading.report import RankReport
from reshard.loading.scales import PlannedScales, converting, plan_scales
from reshard.loading.selection import Selection
from reshard.loading.spare import Spare
from reshard.loading.strictness import Misfits, Strictness, apply_strictness
from reshard.planning.agreement import RankDescription, describe
from reshard.planning.mapping.wanted import Asked, Told, ask
from reshard.planning.read_plan import ReadPlan, plan_reads
from reshard.sources.stored import Headers
from reshard.state import GLOBAL_STEP, Kind, Shard, State, TensorKey
from reshard.storage import Storage

_NAME_OF: Callable[[StoredTensor], str] = attrgetter("name")
_KIND_OF: Callable[[TensorKey], Kind] = attrgetter("kind")


class _Outcome(msgspec.Struct, array_like=True):
    """What a rank tells the others after it has read."""

    bytes_needed: int = 0
    bytes_read: int = 0
    bytes_verified: int = 0
    seconds: dict[str, float] = {}
    bytes_sent: int = 0
    bytes_received: int = 0
    whole: float = 0.0
    bytes_of_pages: int = 0


@dataclass(frozen=True)
class TensorsLoaded:
    """What became of the tensors of a job.

    Attributes:
        restored: as in `RestoreReport`.
        cast: likewise.
        filled: likewise.
        skipped: likewise.
        misfits: likewise, keys instead of names.
        ranks: likewise.
        all_have_random: whether every rank found the random states of its own place in the same strategy.
        any_installs: whether any rank has something to install.
        notes: what else there is to know.
        seconds: until the last rank's tensors were filled, from the begin of the load on.
    """

    restored: tuple[str, ...]
    cast: tuple[str, ...]
    filled: tuple[str, ...]
    skipped: tuple[str, ...]
    misfits: Misfits
    ranks: tuple[RankReport, ...]
    all_have_random: bool
    any_installs: bool
    notes: tuple[str, ...]
    seconds: float


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


def load_tensors(planned: PlannedLoad, told: Sequence[bytes], comm: Communicator, storage: Storage, *, started: float) -> TensorsLoaded:
    """Fill the states of a job from a checkpoint. Collective.

    Args:
        planned: by this rank.
        told: the findings of every rank's plan.
        comm: the ranks.
        storage: where the checkpoint lies.
        started: when the load began, by `time.perf_counter`.

    Raises:
        UsageError: a pattern that chooses nothing.
        MismatchError: checkpoint and run don't fit; nothing was written to memory.
        DamagedCheckpointError: the checkpoint is not what it promises.
        ReshardError: whatever a rank met, the same on every rank.
    """
    entered = time.perf_counter()
    catalog, chosen, read = planned.catalog, planned.chosen, planned.plan
    keys = list(chosen.tensors)
    findings = [msgspec.msgpack.decode(data, type=Findings) for data in told]

    # A rank may have nothing of a kind that the others load; whether a tensor is unexpected must be the same everywhere.
    all_kinds = frozenset(Kind(kind) for finding in findings for kind in finding.kinds)
    misfits, present = merge_findings(findings, keys, all_kinds)
    told_words: list[tuple[str, str]] = []
    if planned.told is not None:
        misfits = known_misfits(misfits, present, planned.told)
        told_words = words_of_missing(misfits, planned.told)
    misfits, dispensable = planned.spare.sift(misfits, () if planned.told is None else planned.told.links.ignored)
    idle = idle_patterns(findings)
    planned.selection.check(idle, catalog.directory)
    has_optimizer = Kind.OPTIMIZER in set(map(_KIND_OF, catalog.tensors))
    try:
        apply_strictness(planned.strictness, misfits, directory=catalog.directory, has_optimizer=has_optimizer)
    except MismatchError as error:
        raise (extended(error, *told_words) if told_words else error) from None

    unlisted_names = {name for finding in findings for name in finding.unlisted}
    with ExitStack() as opened:
        prepared = handing = None
        if planned.balanced:
            prepared, others = agree_on_exchange(planned.wanted, read, chosen, planned.headers, comm, planned.memory_budget, catalog)
            unlisted_names |= others
        else:
            handing = agree_on_handing(planned.offer, [finding.door for finding in findings], chosen, planned.headers, comm)
            if handing is not None:
                opened.enter_context(closing(handing))
        planning = planned.seconds["plan"] + time.perf_counter() - entered
        entered = time.perf_counter()
        scaling = _read_scales(planned, comm, storage)
        traffic, error = attempt(lambda: _read(planned, prepared, handing, comm, storage))
    moved = traffic if traffic is not None else Traffic()
    seconds = {"open": planned.seconds["open"], "plan": planning, "read": time.perf_counter() - entered}
    moved = Traffic(*(a + b for a, b in zip(astuple(moved), astuple(scaling), strict=True)))
    needed = read.nbytes + (planned.scales.plan.nbytes if planned.scales is not None else 0)
    whole = time.perf_counter() - started
    outcome = _Outcome(needed, moved.read, moved.verified, seconds, moved.sent, moved.received, whole, moved.pages)
    payloads = settle(comm, error, msgspec.msgpack.encode(outcome), what="the load broke off; tensors of the run are partly overwritten")
    outcomes = [msgspec.msgpack.decode(data, type=_Outcome) for data in payloads]
    ranks = tuple(
        RankReport(rank, o.bytes_needed, o.bytes_read, o.seconds, o.bytes_sent, o.bytes_received, o.bytes_verified, o.bytes_of_pages)
        for rank, o in enumerate(outcomes)
    )
    mismatched = {m.key for m in misfits.mismatched}
    if mismatched:
        present = [key for key, run_key in zip(present, planned.run_keys(present), strict=True) if run_key not in mismatched]
    # Several strands may be of one tensor.
    restored = tuple(dict.fromkeys(map(_NAME_OF, map(catalog.tensors.__getitem__, present))))
    names = sorted(unlisted_names)
    notes = (f"the files hold tensors that the metadata doesn't list; ignored: {', '.join(names[:NAMES_SHOWN])}",) if names else ()
    scaled = len(scale_keys(findings, keys))
    notes += dispensable
    notes += (f"{scaled} tensor{' was' if scaled == 1 else 's were'} dequantised by block",) if scaled else ()
    notes += tuple(f"exclude: {pattern!r} means no tensor of the checkpoint or the run" for pattern in idle)
    return TensorsLoaded(
        restored,
        tuple(dict.fromkeys(cast_words(findings, keys, chosen))),
        tuple(tensor_name(key) for key in planned.filled),
        tuple(dict.fromkeys(skipped_names(findings, catalog, chosen, all_kinds))),
        misfits,
        ranks,
        all(f.has_random for f in findings),
        any(f.installs for f in findings),
        notes,
        max(outcome.whole for outcome in outcomes),
    )


def _read(
    planned: PlannedLoad, prepared: PreparedExchange | None, handing: Handing | None, comm: Communicator, storage: Storage
) -> Traffic:
    """Fill this rank's memory, balanced or by itself."""
    plan, directory, budget, verify = planned.plan, planned.catalog.directory, planned.memory_budget, planned.verify
    for shard, value in planned.fills:
        _fill(shard, value)
    memory = converting(planned.state, plan.cast, planned.scales)
    if prepared is None:
        traffic = read_direct(plan, planned.entries, handing, memory, storage, directory, memory_budget=budget, verify=verify)
    else:
        traffic = run_exchange(prepared, memory, comm, storage, directory, verify=verify)
    for key in planned.filled:
        for shard in planned.state.tensors[key].shards:
            _fill(shard, planned.common.global_step if planned.common is not None else 0)
    return traffic


def _read_scales(planned: PlannedLoad, comm: Communicator, storage: Storage) -> Traffic:
    """Collective, where the load is about quantised tensors: read what every rank needs of their scales."""
    scales, directory, budget, verify = planned.scales, planned.catalog.directory, planned.memory_budget, planned.verify
    if scales is None:
        return Traffic()
    prepared = None
    if planned.balanced:
        prepared, _ = agree_on_exchange(scales.wanted, scales.plan, scales.catalog, planned.headers, comm, budget, planned.catalog)

    def execute() -> Traffic:
        if prepared is None:
            return Traffic(*read_plan(scales.plan, scales.entries, scales.state, storage, directory, memory_budget=budget, verify=verify))
        return run_exchange(prepared, scales.state, comm, storage, directory, verify=verify)

    traffic, error = attempt(execute)
    settle(comm, error, what="the load failed; nothing was changed")
    assert traffic is not None  # settle raises when any rank has failed
    return traffic


def _fill(shard: Shard, value: float | None) -> None:
    memory = shard.memory.read()
    shard.memory.write(Region.whole(memory.shape), np.full(memory.shape, value, memory.dtype))
