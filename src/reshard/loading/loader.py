"""The load of one job: every rank plans, all agree, each reads its part, all hear how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from reshard import errors
from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.errors import CommunicationError, ReshardError
from reshard.format.common import CommonInfo
from reshard.format.names import tensor_name
from reshard.geometry import Region
from reshard.loading.reader import check_plan, read_plan
from reshard.loading.report import RankReport
from reshard.loading.strictness import Misfits, Strictness, apply_strictness
from reshard.planning.agreement import describe
from reshard.planning.read_plan import Mismatch, ReadPlan, plan_reads
from reshard.sources.native import Headers
from reshard.state import GLOBAL_STEP, Kind, Shard, State, TensorKey
from reshard.storage import Storage

T = TypeVar("T")


class _Plan(msgspec.Struct, array_like=True):
    """What a rank tells the others before it reads."""

    failure: tuple[str, str] | None
    restored: bytes = b""
    missing: list[tuple[str, str | None, str]] = []
    mismatched: list[tuple[tuple[str, str | None, str], str, str, str]] = []
    has_random: bool = False


class _Outcome(msgspec.Struct, array_like=True):
    """What a rank tells the others after it has read."""

    failure: tuple[str, str] | None
    bytes_needed: int = 0
    bytes_read: int = 0
    seconds: dict[str, float] = {}


@dataclass(frozen=True)
class TensorsLoaded:
    """What became of the tensors of a job.

    Attributes:
        restored: as in `RestoreReport`, keys instead of names.
        filled: likewise.
        misfits: likewise.
        ranks: likewise.
        all_have_random: whether every rank found the random states of its own place in the same strategy.
    """

    restored: tuple[TensorKey, ...]
    filled: tuple[TensorKey, ...]
    misfits: Misfits
    ranks: tuple[RankReport, ...]
    all_have_random: bool


def load_tensors(
    state: State,
    catalog: Catalog,
    *,
    common: CommonInfo | None,
    comm: Communicator,
    storage: Storage,
    strictness: Strictness,
    kinds: frozenset[Kind],
    has_random: bool,
) -> TensorsLoaded:
    """Fill the states of a job from a checkpoint. Collective.

    Nothing is written to memory before every rank has planned, checked the headers of its files, and agreed.

    Args:
        state: what this rank wants to fill.
        catalog: what the checkpoint holds, the same on every rank.
        common: the checkpoint's training information; gives the step count when there is no tensor for it.
        comm: the ranks.
        storage: where the checkpoint lies.
        strictness: what to do about misfits.
        kinds: the kinds of tensors that the job loads; others in the checkpoint are not unexpected.
        has_random: whether this rank found the random states of its place.

    Raises:
        MismatchError: checkpoint and run don't fit.
        DamagedCheckpointError: the checkpoint is not what it promises.
        ReshardError: whatever a rank met, the same on every rank.
    """
    started = time.perf_counter()
    keys = sorted(catalog.tensors, key=_order)
    headers = Headers(storage, catalog.directory)

    def plan() -> tuple[ReadPlan, tuple[TensorKey, ...]]:
        planned = plan_reads(describe(state, comm.rank), catalog)
        check_plan(planned, headers)
        filled = (GLOBAL_STEP,) if GLOBAL_STEP in planned.missing and common is not None and common.global_step is not None else ()
        return planned, filled

    planned, failure = _attempt(plan, comm.rank)
    mine = _Plan(failure)
    if planned is not None:
        found = np.zeros(len(keys), bool)
        wanted = set(planned[0].restored) | {m.key for m in planned[0].mismatched}
        found[[i for i, key in enumerate(keys) if key in wanted]] = True
        mine = _Plan(
            None,
            np.packbits(found).tobytes(),
            [_key_out(key) for key in planned[0].missing if key not in planned[1]],
            [(_key_out(m.key), m.field, m.stored, m.wanted) for m in planned[0].mismatched],
            has_random,
        )
    plans = [msgspec.msgpack.decode(data, type=_Plan) for data in comm.all_gather(msgspec.msgpack.encode(mine))]
    raise_failures([p.failure for p in plans], "the load failed before anything was changed", catalog.directory)
    assert planned is not None
    read, filled = planned

    misfits, present = _merge(plans, keys, kinds)
    apply_strictness(strictness, misfits, directory=catalog.directory, has_optimizer=any(k.kind is Kind.OPTIMIZER for k in keys))

    planning = time.perf_counter() - started

    def execute() -> int:
        nbytes = read_plan(read, state, headers, storage, catalog.directory)
        for key in filled:
            for shard in state.tensors[key].shards:
                _fill(shard, common.global_step if common is not None else 0)
        return nbytes

    started = time.perf_counter()
    nbytes, failure = _attempt(execute, comm.rank)
    seconds = {"plan": planning, "read": time.perf_counter() - started}
    outcome = _Outcome(failure, read.nbytes, nbytes or 0, seconds)
    outcomes = [msgspec.msgpack.decode(data, type=_Outcome) for data in comm.all_gather(msgspec.msgpack.encode(outcome))]
    raise_failures(
        [o.failure for o in outcomes], "the load failed while it was reading; the run's tensors are partly overwritten", catalog.directory
    )
    ranks = tuple(RankReport(rank, o.bytes_needed, o.bytes_read, o.seconds) for rank, o in enumerate(outcomes))
    mismatched = {m.key for m in misfits.mismatched}
    restored = tuple(key for key in present if key not in mismatched)
    return TensorsLoaded(restored, filled, misfits, ranks, all(p.has_random for p in plans))


def raise_failures(failures: Sequence[tuple[str, str] | None], what: str, directory: str) -> None:
    """Raise the same error on every rank when any of them failed.

    Args:
        failures: for each rank None, or the name of its error's class and its text.
        what: what failed, for when the ranks' errors differ.
        directory: the checkpoint.

    Raises:
        ReshardError: of the class that the first failed rank met.
    """
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    if not failed:
        return
    (rank, (name, text)), *others = failed
    kind = getattr(errors, name, ReshardError)
    if not (isinstance(kind, type) and issubclass(kind, ReshardError)):
        kind = ReshardError
    also = f"{what}: on rank {rank}" + (f", and on {len(others)} more ({', '.join(str(r) for r, _ in others[:8])})" if others else "")
    raise kind(f"{text}\n  ({also})" if len(failures) > 1 else text, file=None if directory in text else directory)


def _attempt(work: Callable[[], T], rank: int) -> tuple[T | None, tuple[str, str] | None]:
    """The result of some work, or its failure as data for the other ranks. A failure must not keep a rank from the next collective."""
    try:
        return work(), None
    except CommunicationError:
        raise
    except ReshardError as error:
        return None, (type(error).__name__, str(error))
    except Exception as error:  # noqa: BLE001 - the other ranks must hear of it, whatever it is
        return None, ("ReshardError", f"{type(error).__name__}: {error}")


def _fill(shard: Shard, value: int | None) -> None:
    memory = shard.memory.read()
    shard.memory.write(Region.whole(memory.shape), np.full(memory.shape, value, memory.dtype))


def _merge(plans: Sequence[_Plan], keys: Sequence[TensorKey], kinds: frozenset[Kind]) -> tuple[Misfits, list[TensorKey]]:
    found = np.zeros(len(keys), bool)
    for plan in plans:
        found |= np.unpackbits(np.frombuffer(plan.restored, np.uint8), count=len(keys)).astype(bool)
    missing = sorted({_key_in(key) for plan in plans for key in plan.missing}, key=_order)
    mismatched = {_key_in(key): Mismatch(_key_in(key), field, stored, wanted) for p in plans for key, field, stored, wanted in p.mismatched}
    present = [key for key, is_found in zip(keys, found, strict=True) if is_found]
    unexpected = [key for key, is_found in zip(keys, found, strict=True) if not is_found and key.kind in kinds]
    return Misfits(tuple(missing), tuple(unexpected), tuple(mismatched[key] for key in sorted(mismatched, key=_order))), present


def _order(key: TensorKey) -> tuple[str, str]:
    return key.kind.value, tensor_name(key)


def _key_out(key: TensorKey) -> tuple[str, str | None, str]:
    return key.kind.value, key.slot, key.parameter


def _key_in(key: tuple[str, str | None, str]) -> TensorKey:
    return TensorKey(Kind(key[0]), key[1], key[2])
