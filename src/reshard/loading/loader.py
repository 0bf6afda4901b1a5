"""The load of one job: every rank plans, all agree, each reads its part, all hear how it went."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.comm.together import attempt, settle
from reshard.format.common import CommonInfo
from reshard.format.names import tensor_name
from reshard.format.safetensors import TensorEntry
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.loading.casting import CastMemory
from reshard.loading.exchange import MEMORY_BUDGET, PreparedExchange, prepare_exchange
from reshard.loading.lanes import Traffic, run_exchange
from reshard.loading.reader import locate, read_plan
from reshard.loading.report import RankReport
from reshard.loading.selection import Selection
from reshard.loading.strictness import Misfits, Strictness, apply_strictness
from reshard.planning.agreement import RankDescription
from reshard.planning.read_plan import Mismatch, ReadPlan, plan_reads
from reshard.planning.telling import decode_all, encode
from reshard.sources.native import Headers
from reshard.state import GLOBAL_STEP, Kind, Shard, State, TensorKey
from reshard.storage import Storage

# A note names so many tensors.
_NAMES_SHOWN = 8


class _Findings(msgspec.Struct, array_like=True):
    """What a rank tells the others before it reads."""

    restored: bytes = b""
    missing: list[tuple[str, str | None, str]] = []
    mismatched: list[tuple[tuple[str, str | None, str], str, str, str]] = []
    has_random: bool = False
    unlisted: list[str] = []
    kinds: list[str] = []
    cast: dict[str, bytes] = {}
    left_out: list[tuple[str, str | None, str]] = []
    idle: list[str] = []


class _Outcome(msgspec.Struct, array_like=True):
    """What a rank tells the others after it has read."""

    bytes_needed: int = 0
    bytes_read: int = 0
    seconds: dict[str, float] = {}
    bytes_sent: int = 0
    bytes_received: int = 0


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
        notes: what else there is to know.
    """

    restored: tuple[str, ...]
    cast: tuple[str, ...]
    filled: tuple[str, ...]
    skipped: tuple[str, ...]
    misfits: Misfits
    ranks: tuple[RankReport, ...]
    all_have_random: bool
    notes: tuple[str, ...]


def load_tensors(
    state: State,
    description: RankDescription,
    catalog: Catalog,
    *,
    common: CommonInfo | None,
    comm: Communicator,
    storage: Storage,
    strictness: Strictness,
    kinds: frozenset[Kind],
    has_random: bool,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    opening: float = 0.0,
    balanced: bool = False,
    memory_budget: int = MEMORY_BUDGET,
) -> TensorsLoaded:
    """Fill the states of a job from a checkpoint. Collective.

    Nothing is written to memory before every rank has planned, checked the headers of its files, and agreed.

    Args:
        state: what this rank wants to fill.
        description: of the state.
        catalog: what the checkpoint holds, the same on every rank.
        common: the checkpoint's training information; gives the step count when there is no tensor for it.
        comm: the ranks.
        storage: where the checkpoint lies.
        strictness: what to do about misfits.
        kinds: the kinds of tensors that this rank loads; those that no rank loads are not unexpected in the checkpoint.
        has_random: whether this rank found the random states of its place.
        selection: the tensors that the load is about, the same on every rank.
        opening: the seconds that it took to open the checkpoint, for the report.
        balanced: whether ranks read for each other, so that each byte is read once in the whole job; the same on every rank.
        memory_budget: bytes for staging and messages of a balanced load; the same on every rank.

    Raises:
        UsageError: a pattern that chooses nothing.
        MismatchError: checkpoint and run don't fit.
        DamagedCheckpointError: the checkpoint is not what it promises.
        ReshardError: whatever a rank met, the same on every rank.
    """
    started = time.perf_counter()
    chosen, wanted = selection.catalog(catalog), selection.description(description)
    keys = list(chosen.tensors)
    headers = Headers(storage, catalog.directory)

    def plan() -> tuple[ReadPlan, list[TensorEntry], tuple[TensorKey, ...]]:
        planned = plan_reads(wanted, chosen, strictness.casts)
        entries = [] if balanced else locate(planned, headers)
        filled = (GLOBAL_STEP,) if GLOBAL_STEP in planned.missing and common is not None and common.global_step is not None else ()
        return planned, entries, filled

    planned, error = attempt(plan)
    payload = b""
    if planned is not None:
        unlisted = [] if balanced else _unlisted(planned[0].files, headers, catalog)
        found = _findings(planned[0], planned[2], keys, has_random=has_random, unlisted=unlisted, kinds=kinds)
        if not selection.is_all:
            mine = [tensor.key for tensor in description.tensors if tensor.key not in catalog.tensors]
            found.left_out = [_key_out(key) for key in mine if not selection.takes(key)]
            found.idle = list(selection.idle([*catalog.tensors, *mine]))
        payload = msgspec.msgpack.encode(found)
    payloads = settle(comm, error, payload, what="the load failed; nothing was changed")
    assert planned is not None  # settle raises when any rank has no plan
    read, entries, filled = planned
    findings = [msgspec.msgpack.decode(data, type=_Findings) for data in payloads]

    # A rank may have nothing of a kind that the others load; whether a tensor is unexpected must be the same everywhere.
    all_kinds = frozenset(Kind(kind) for finding in findings for kind in finding.kinds)
    misfits, present = _merge(findings, keys, all_kinds)
    idle = _idle(findings)
    selection.check(idle, catalog.directory)
    has_optimizer = any(key.kind is Kind.OPTIMIZER for key in catalog.tensors)
    apply_strictness(strictness, misfits, directory=catalog.directory, has_optimizer=has_optimizer)

    unlisted_names = {name for finding in findings for name in finding.unlisted}
    prepared = None
    if balanced:
        prepared, others = _agree(wanted, read, chosen, headers, comm, memory_budget, catalog)
        unlisted_names |= others
    planning = time.perf_counter() - started

    def execute() -> Traffic:
        memory = _casting(state, read.cast)
        if prepared is None:
            traffic = Traffic(read_plan(read, entries, memory, storage, catalog.directory), 0, 0)
        else:
            traffic = run_exchange(prepared, memory, comm, storage, catalog.directory)
        for key in filled:
            for shard in state.tensors[key].shards:
                _fill(shard, common.global_step if common is not None else 0)
        return traffic

    started = time.perf_counter()
    traffic, error = attempt(execute)
    moved = traffic if traffic is not None else Traffic(0, 0, 0)
    seconds = {"open": opening, "plan": planning, "read": time.perf_counter() - started}
    outcome = _Outcome(read.nbytes, moved.read, seconds, moved.sent, moved.received)
    payloads = settle(comm, error, msgspec.msgpack.encode(outcome), what="the load broke off; tensors of the run are partly overwritten")
    outcomes = [msgspec.msgpack.decode(data, type=_Outcome) for data in payloads]
    ranks = tuple(
        RankReport(rank, o.bytes_needed, o.bytes_read, o.seconds, o.bytes_sent, o.bytes_received) for rank, o in enumerate(outcomes)
    )
    mismatched = {m.key for m in misfits.mismatched}
    restored = tuple(catalog.tensors[key].name for key in present if key not in mismatched)
    names = sorted(unlisted_names)
    notes = (f"the files hold tensors that the metadata doesn't list; ignored: {', '.join(names[:_NAMES_SHOWN])}",) if names else ()
    notes += tuple(f"exclude: {pattern!r} means no tensor of the checkpoint or the run" for pattern in idle)
    return TensorsLoaded(
        restored,
        _cast_words(findings, keys, chosen),
        tuple(tensor_name(key) for key in filled),
        _skipped(findings, catalog, chosen, all_kinds),
        misfits,
        ranks,
        all(f.has_random for f in findings),
        notes,
    )


def _agree(
    wanted: RankDescription,
    plan: ReadPlan,
    chosen: Catalog,
    headers: Headers,
    comm: Communicator,
    memory_budget: int,
    catalog: Catalog,
) -> tuple[PreparedExchange, set[str]]:
    """Collective: every rank's part of one exchange, and the tensors of the files that the metadata doesn't list."""
    restored = set(plan.restored)
    mine = replace(wanted, tensors=tuple(tensor for tensor in wanted.tensors if tensor.key in restored))
    texts = comm.all_gather(encode(mine))

    def prepare() -> tuple[PreparedExchange, list[str]]:
        prepared = prepare_exchange(decode_all(texts), chosen, headers, comm.rank, memory_budget)
        return prepared, _unlisted(prepared.files, headers, catalog)

    made, error = attempt(prepare)
    names = settle(comm, error, b"" if made is None else msgspec.msgpack.encode(made[1]), what="the load failed; nothing was changed")
    assert made is not None  # settle raises when any rank has no part
    return made[0], {name for text in names for name in msgspec.msgpack.decode(text, type=list[str])}


def _casting(state: State, casts: Sequence[Mismatch]) -> State:
    """The state with memory that converts what is written into it, where a tensor is to be cast."""
    if not casts:
        return state
    tensors = dict(state.tensors)
    for misfit in casts:
        tensor = tensors[misfit.key]
        stored = by_name(misfit.stored)
        shards = tuple(shard._replace(memory=CastMemory(shard.memory, stored, tensor.dtype)) for shard in tensor.shards)
        tensors[misfit.key] = tensor._replace(shards=shards)
    return replace(state, tensors=tensors)


def _findings(
    plan: ReadPlan,
    filled: tuple[TensorKey, ...],
    keys: Sequence[TensorKey],
    *,
    has_random: bool,
    unlisted: list[str],
    kinds: frozenset[Kind],
) -> _Findings:
    present = set(plan.restored) | {mismatch.key for mismatch in plan.mismatched}
    return _Findings(
        _bits(keys, present),
        [_key_out(key) for key in plan.missing if key not in filled],
        [(_key_out(mismatch.key), mismatch.field, mismatch.stored, mismatch.wanted) for mismatch in plan.mismatched],
        has_random,
        unlisted,
        [kind.value for kind in kinds],
        {wanted: _bits(keys, {m.key for m in plan.cast if m.wanted == wanted}) for wanted in {m.wanted for m in plan.cast}},
    )


def _bits(keys: Sequence[TensorKey], chosen: Collection[TensorKey]) -> bytes:
    return np.packbits(np.array([key in chosen for key in keys], bool)).tobytes()


def _are_set(bits: bytes, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool)


def _cast_words(findings: Sequence[_Findings], keys: Sequence[TensorKey], catalog: Catalog) -> tuple[str, ...]:
    """What was converted, in words, in the order of the checkpoint."""
    wanted: dict[int, str] = {}
    for finding in findings:
        for dtype, bits in finding.cast.items():
            wanted |= dict.fromkeys(np.flatnonzero(_are_set(bits, len(keys))).tolist(), dtype)
    tensors = {index: catalog.tensors[keys[index]] for index in sorted(wanted)}
    return tuple(f"{tensor.name}: {tensor.dtype} -> {wanted[index]}" for index, tensor in tensors.items())


def _idle(findings: Sequence[_Findings]) -> list[str]:
    """The patterns that mean no tensor of the checkpoint, nor one of any rank."""
    return [pattern for pattern in findings[0].idle if all(pattern in finding.idle for finding in findings)]


def _skipped(findings: Sequence[_Findings], catalog: Catalog, chosen: Catalog, kinds: frozenset[Kind]) -> tuple[str, ...]:
    """What the selection leaves out, of the checkpoint and of the run."""
    stored = [tensor.name for key, tensor in catalog.tensors.items() if key.kind in kinds and key not in chosen.tensors]
    own = sorted({_key_in(key) for finding in findings for key in finding.left_out}, key=_order)
    return (*stored, *(tensor_name(key) for key in own))


def _unlisted(files: Sequence[str], headers: Headers, catalog: Catalog) -> list[str]:
    """Tensors of these files that the catalog doesn't have; the first few."""
    known = {tensor.name for tensor in catalog.tensors.values()}
    found: list[str] = []
    for file in files:
        # A rank's further parts of a tensor have names of their own: `w@1`.
        found += [name for name in headers.get(file).entries if name not in known and name.rpartition("@")[0] not in known]
        if len(found) >= _NAMES_SHOWN:
            break
    return found[:_NAMES_SHOWN]


def _fill(shard: Shard, value: int | None) -> None:
    memory = shard.memory.read()
    shard.memory.write(Region.whole(memory.shape), np.full(memory.shape, value, memory.dtype))


def _merge(findings: Sequence[_Findings], keys: Sequence[TensorKey], kinds: frozenset[Kind]) -> tuple[Misfits, list[TensorKey]]:
    found = np.zeros(len(keys), bool)
    for finding in findings:
        found |= _are_set(finding.restored, len(keys))
    missing = sorted({_key_in(key) for finding in findings for key in finding.missing}, key=_order)
    mismatched = {
        _key_in(key): Mismatch(_key_in(key), field, stored, wanted)
        for finding in findings
        for key, field, stored, wanted in finding.mismatched
    }
    present = [key for key, is_found in zip(keys, found, strict=True) if is_found]
    unexpected = sorted((key for key, is_found in zip(keys, found, strict=True) if not is_found and key.kind in kinds), key=_order)
    return Misfits(tuple(missing), tuple(unexpected), tuple(mismatched[key] for key in sorted(mismatched, key=_order))), present


def _order(key: TensorKey) -> tuple[str, str]:
    return key.kind.value, tensor_name(key)


def _key_out(key: TensorKey) -> tuple[str, str | None, str]:
    return key.kind.value, key.slot, key.parameter


def _key_in(key: tuple[str, str | None, str]) -> TensorKey:
    return TensorKey(Kind(key[0]), key[1], key[2])
