"""The load of one job: every rank plans, all agree, each reads its part, all hear how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import msgspec

from reshard.catalog import StoredTensor
from reshard.comm import Communicator
from reshard.errors import MismatchError, extended
from reshard.format.names import tensor_name
from reshard.loading.filling import fill_together
from reshard.loading.findings import NAMES_SHOWN, Findings, cast_words, idle_patterns, merge_findings, scale_keys, skipped_names
from reshard.loading.mapped import known_misfits, words_of_missing
from reshard.loading.planned import PlannedLoad
from reshard.loading.report import RankReport
from reshard.loading.strictness import Misfits, apply_strictness
from reshard.state import Kind, TensorKey
from reshard.storage import Storage

_NAME_OF: Callable[[StoredTensor], str] = attrgetter("name")
_KIND_OF: Callable[[TensorKey], Kind] = attrgetter("kind")


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
    catalog, chosen = planned.catalog, planned.chosen
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

    notices = [finding.door for finding in findings]
    ranks, seconds, unlisted = fill_together(planned, notices, comm, storage, started=started, entered=entered)
    unlisted |= {name for finding in findings for name in finding.unlisted}
    mismatched = {m.key for m in misfits.mismatched}
    if mismatched:
        present = [key for key, run_key in zip(present, planned.run_keys(present), strict=True) if run_key not in mismatched]
    # Several strands may be of one tensor.
    restored = tuple(dict.fromkeys(map(_NAME_OF, map(catalog.tensors.__getitem__, present))))
    names = sorted(unlisted)
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
        seconds,
    )
