"""What ranks tell each other about a load before they read, and what follows from all of it together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import numpy as np

from reshard.catalog import Catalog
from reshard.comm.neighbours import Notice
from reshard.format.names import tensor_name
from reshard.loading.strictness import Misfits
from reshard.planning.read_plan import Mismatch, ReadPlan
from reshard.sources.stored import Headers
from reshard.state import Kind, TensorKey

# A note names so many tensors.
NAMES_SHOWN = 8


class Findings(msgspec.Struct, array_like=True):
    """What a rank tells the others before it reads. Sets of the checkpoint's tensors are bits, in the order of its catalog.

    Attributes:
        restored: the tensors that the checkpoint has for the rank.
        missing: those that it doesn't have.
        mismatched: those that differ in shape or dtype: the tensor, the field, what is stored, what is wanted.
        has_random: whether the rank found the random states of its place.
        installs: whether the rank has anything to install when its tensors are filled.
        unlisted: some tensors of files that metadata doesn't list.
        kinds: the kinds of tensors that the rank loads.
        cast: the tensors that are converted, by the new type.
        left_out: the run's tensors that the selection leaves out.
        idle: the patterns that mean no tensor that this rank knows.
        scales: the tensors that are the scales of others that the rank dequantises.
        door: where other ranks of its machine find its memory, if they may fill any of it.
    """

    restored: bytes = b""
    missing: list[tuple[str, str | None, str]] = []
    mismatched: list[tuple[tuple[str, str | None, str], str, str, str]] = []
    has_random: bool = False
    installs: bool = True
    unlisted: list[str] = []
    kinds: list[str] = []
    cast: dict[str, bytes] = {}
    left_out: list[tuple[str, str | None, str]] = []
    idle: list[str] = []
    scales: bytes = b""
    door: Notice | None = None


def findings_of(
    plan: ReadPlan,
    filled: tuple[TensorKey, ...],
    keys: Sequence[TensorKey],
    *,
    has_random: bool,
    installs: bool,
    unlisted: list[str],
    kinds: frozenset[Kind],
) -> Findings:
    """What a rank's plan has to tell the others.

    Args:
        plan: the plan.
        filled: the tensors that have a value without being in the checkpoint.
        keys: the checkpoint's tensors, in order.
        has_random: whether the rank found the random states of its place.
        installs: whether it has anything to install when its tensors are filled.
        unlisted: tensors of its files that metadata doesn't list.
        kinds: the kinds of tensors that it loads.
    """
    # What is restored is in the checkpoint, each tensor once: as many as that has are all, as nearly always.
    has_all = len(plan.restored) == len(keys)
    present = () if has_all else {*plan.restored, *(mismatch.key for mismatch in plan.mismatched)}
    return Findings(
        np.packbits(np.ones(len(keys), bool)).tobytes() if has_all else bits_of(keys, present),
        [key_out(key) for key in plan.missing if key not in filled],
        [(key_out(mismatch.key), mismatch.field, mismatch.stored, mismatch.wanted) for mismatch in plan.mismatched],
        has_random,
        installs,
        unlisted,
        [kind.value for kind in kinds],
        {wanted: bits_of(keys, {m.key for m in plan.cast if m.wanted == wanted}) for wanted in {m.wanted for m in plan.cast}},
    )


def unlisted_of(files: Sequence[str], headers: Headers, catalog: Catalog) -> list[str]:
    """Tensors of these files that the catalog doesn't have; the first few."""
    known = {tensor.name for tensor in catalog.tensors.values()}
    found: list[str] = []
    for file in files:
        held = headers.get(file).entries
        # A rank's further parts of a tensor have names of their own: `w@1`.
        found += [] if held.keys() <= known else [name for name in held if name not in known and name.rpartition("@")[0] not in known]
        if len(found) >= NAMES_SHOWN:
            break
    return found[:NAMES_SHOWN]


def bits_of(keys: Sequence[TensorKey], chosen: Collection[TensorKey]) -> bytes:
    """Some of a catalog's tensors as bits, in the order of its keys."""
    return np.packbits(np.fromiter(map(chosen.__contains__, keys), bool, len(keys))).tobytes()


def _are_set(bits: bytes, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool)


def cast_words(findings: Sequence[Findings], keys: Sequence[TensorKey], catalog: Catalog) -> tuple[str, ...]:
    """What was converted, in words, in the order of the checkpoint."""
    wanted: dict[int, str] = {}
    for finding in findings:
        for dtype, bits in finding.cast.items():
            wanted |= dict.fromkeys(np.flatnonzero(_are_set(bits, len(keys))).tolist(), dtype)
    tensors = {index: catalog.tensors[keys[index]] for index in sorted(wanted)}
    return tuple(f"{tensor.name}: {tensor.dtype} -> {wanted[index]}" for index, tensor in tensors.items())


def scale_keys(findings: Sequence[Findings], keys: Sequence[TensorKey]) -> set[TensorKey]:
    """The tensors that are the scales of others that some rank dequantises."""
    told = [_are_set(finding.scales, len(keys)) for finding in findings if finding.scales]
    return {keys[index] for index in np.flatnonzero(np.logical_or.reduce(told)).tolist()} if told else set()


def idle_patterns(findings: Sequence[Findings]) -> list[str]:
    """The patterns that mean no tensor of the checkpoint, nor one of any rank."""
    return [pattern for pattern in findings[0].idle if all(pattern in finding.idle for finding in findings)]


def skipped_names(findings: Sequence[Findings], catalog: Catalog, chosen: Catalog, kinds: frozenset[Kind]) -> tuple[str, ...]:
    """What the selection leaves out, of the checkpoint and of the run."""
    left_out = () if chosen is catalog else [key for key in catalog.tensors if key not in chosen.tensors]
    stored = [catalog.tensors[key].name for key in left_out if key.kind in kinds]
    own = sorted({_key_in(key) for finding in findings for key in finding.left_out}, key=_order)
    return (*stored, *(tensor_name(key) for key in own))


def merge_findings(findings: Sequence[Findings], keys: Sequence[TensorKey], kinds: frozenset[Kind]) -> tuple[Misfits, list[TensorKey]]:
    """What doesn't fit on any rank, and the checkpoint's tensors that some rank takes.

    Args:
        findings: of all ranks.
        keys: the checkpoint's tensors, in order.
        kinds: the kinds of tensors that any rank loads.
    """
    found = np.zeros(len(keys), bool)
    for finding in findings:
        found |= _are_set(finding.restored, len(keys))
    scales = scale_keys(findings, keys)
    missing = sorted({_key_in(key) for finding in findings for key in finding.missing}, key=_order)
    mismatched = {
        _key_in(key): Mismatch(_key_in(key), field, stored, wanted)
        for finding in findings
        for key, field, stored, wanted in finding.mismatched
    }
    present = list(keys) if found.all() else [keys[index] for index in np.flatnonzero(found).tolist()]
    others = [keys[index] for index in np.flatnonzero(~found).tolist()]
    unexpected = sorted((key for key in others if key.kind in kinds and key not in scales), key=_order)
    return Misfits(tuple(missing), tuple(unexpected), tuple(mismatched[key] for key in sorted(mismatched, key=_order))), present


def _order(key: TensorKey) -> tuple[str, str]:
    return key.kind.value, tensor_name(key)


def key_out(key: TensorKey) -> tuple[str, str | None, str]:
    """A key as plain data."""
    return key.kind.value, key.slot, key.parameter


def _key_in(key: tuple[str, str | None, str]) -> TensorKey:
    return TensorKey(Kind(key[0]), key[1], key[2])
