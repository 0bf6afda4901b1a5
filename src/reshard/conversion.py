"""Another program's checkpoint becomes an iteration of a checkpoint root, tensor by tensor, without a framework."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reshard.checkpoint import Checkpoint
from reshard.comm.single import SingleProcess
from reshard.errors import CheckpointNotFoundError, UsageError
from reshard.export.model_config import read_given_config, unquantised
from reshard.families import Family, family, recognise
from reshard.format.common import CommonInfo
from reshard.geometry import DType, Region
from reshard.geometry.casts import can_cast, cast_values
from reshard.geometry.dtypes import by_name
from reshard.loading.budget import MEMORY_BUDGET, check_budget
from reshard.planning.mapping.mappers import sizes_in
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.saving.streamed import StreamedMemory
from reshard.sources.huggingface import CONFIG_FILE
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.resolve import list_iterations
from reshard.state import GLOBAL_STEP, Kind, Shard, ShardedTensor, State, TensorKey, whole_tensor
from reshard.storage import Storage
from reshard.storage.posix import PosixStorage
from reshard.views import TensorView

# `step-1000`, `checkpoint_1000`: how training loops name what they save.
_NUMBERED = re.compile(r"(?:step|checkpoint|ckpt|iter|global_step|epoch)[-_]?(\d{1,15})", re.ASCII)

ConversionProgress = Callable[[int, int], None]
"""Is told how many bytes of tensors were read, and how many there are."""


@dataclass(frozen=True)
class Conversion:
    """What became of a conversion.

    Attributes:
        directory: the iteration that was written.
        iteration: its number.
        tensors: how many it holds.
        nbytes: their bytes.
        notes: what the reader should know of the source: what was left out, and why.
    """

    directory: str
    iteration: int
    tensors: int
    nbytes: int
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    iteration: int | None = None,
    prefix: str | None = "CKP",
    model_prefix: str | None = None,
    optimizer_prefix: str | None = None,
    naming: str | None = None,
    model_family: str | Family | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: ConversionProgress | None = None,
    storage: Storage | None = None,
) -> Conversion:
    """Write a stored checkpoint of any kind that can be opened as an iteration of a root, in the format of this project.

    The model's configuration comes along, as the value `config` of the extras.

    Args:
        source: a checkpoint of torch.distributed.checkpoint, a file of torch.save or mindspore.save_checkpoint, a `SavedUnder`, a folder of
            weights, or one of this project's.
        target: a checkpoint root; made if needed. What it holds is never overwritten.
        iteration: the number of the iteration; by default the source's step count, else the number in its name, else 0.
        prefix: the first part of data files' names; None for none.
        model_prefix: what the keys of the model begin with in a source of PyTorch, where that can't be recognised.
        optimizer_prefix: likewise, the optimizer's: what stands before `state.` and `param_groups.`.
        naming: of the model's family, the names that the tensors get, with their optimizer's: `mindspore` for those of MindSpore
            Transformers. Tensors that are quantised by block are dequantised then. Not given, everything is as it is in the source.
        model_family: of the model, for `naming`; recognised by its configuration when it isn't given.
        config: the model's `config.json`: its path, a folder that has it, or its contents; not given, what the source says.
        dtype: the type that the model's floating tensors are converted into (`bfloat16`); None leaves each as it is.
        memory_budget: bytes that are held at a time.
        progress: is told how far it is.
        storage: where both lie; the file system when it isn't given.

    Raises:
        UsageError: the target has this iteration, or a newer one; the source's parts can't be told apart; or the model's family isn't
            known.
        CheckpointNotFoundError: there is no source.
        DamagedCheckpointError: the source is not what it promises.
        SaveError: writing failed; nothing was committed.
    """
    check_budget(memory_budget)
    storage = PosixStorage() if storage is None else storage
    wanted = None if dtype is None else by_name(dtype)
    if wanted is not None and not can_cast("float32", wanted.name):
        raise UsageError("tensors can be converted into floating types only", field="dtype", found=dtype, expected="such as bfloat16")
    prefixes = Prefixes(model_prefix, optimizer_prefix)
    checkpoint = Checkpoint(source, storage, prefixes=prefixes, dequantise=dtype)
    known = checkpoint.config if config is None else read_given_config(storage, config)
    if naming is not None:
        mapping = _family_of(model_family, known, checkpoint)
        checkpoint = Checkpoint(source, storage, prefixes=prefixes, mapping=mapping, naming=naming, dequantise=dtype)
    if not len(checkpoint):
        raise CheckpointNotFoundError("there is no tensor to convert", file=checkpoint.directory)
    root = os.path.abspath(os.fspath(target))
    number = _number_of(checkpoint) if iteration is None else iteration
    _check_target(storage, root, number)
    reader = _Reader(checkpoint, memory_budget, progress, wanted)
    state = State(tensors=reader.tensors(), groups=checkpoint.groups, values=_values_of(checkpoint, known))
    has_optimizer = any(key.kind is Kind.OPTIMIZER for key in state.tensors)
    options = SaveOptions(prefix=prefix, keep_checkpoint_max=None, save_optimizer=has_optimizer)
    common = checkpoint.common if checkpoint.common is not None else CommonInfo(step_num=number)
    metrics: Mapping[str, Any] = checkpoint.metrics
    with Saver(storage, SingleProcess(), root, options) as saver:
        report = saver.save(number, state, common, metrics=metrics or None)
    notes = (*checkpoint.notes, *checkpoint.check(), *_notes_of(checkpoint))
    return Conversion(report.directory, number, len(state.tensors), reader.total, notes)


def _family_of(given: str | Family | None, config: Mapping[str, Any] | None, checkpoint: Checkpoint) -> Family:
    """The family of the model, with the sizes of its configuration."""
    if given is None and config is None:
        raise UsageError(
            "the family of the model isn't known, and nothing describes the model",
            file=checkpoint.directory,
            field="family, config",
            expected=f"a {CONFIG_FILE} in the folder, or the run's saved configuration (extra={{'config': …}})",
            fix="give the model's configuration (--config PATH), or its family (--family NAME) where that is enough",
        )
    found = recognise(config or {}, checkpoint.directory) if given is None else family(given) if isinstance(given, str) else given
    # What was given with the family counts more than a configuration.
    return found.with_sizes(**{**sizes_in(config), **found.sizes})


def _values_of(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The source's values, with the model's configuration among the extras."""
    values = dict(checkpoint.values)
    extra = values.get("extra", {})
    if config is not None and isinstance(extra, Mapping):
        values["extra"] = {**extra, "config": dict(unquantised(config) if checkpoint.dequantised else config)}
    return values


def _notes_of(checkpoint: Checkpoint) -> list[str]:
    notes = []
    if checkpoint.dequantised:
        notes.append(f"dequantised by block: {checkpoint.dequantised} tensors")
    if checkpoint.has_rank_values:
        notes.append("what each rank has for itself alone (states of random generators) was left out: what is written is one rank's")
    return notes


class _Reader:
    """Reads the tensors of a checkpoint when they are written."""

    def __init__(self, checkpoint: Checkpoint, memory_budget: int, progress: ConversionProgress | None, dtype: DType | None) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        # What is read is written before the next is read; beside it there are the buffers of both. A cast holds values as four bytes each
        # on the way.
        self._part_bytes = memory_budget // (4 if dtype is None else 16)
        self._progress = progress
        self._done = 0
        self.total = sum(tensor.nbytes for tensor in checkpoint.catalog.tensors.values())

    def tensors(self) -> dict[TensorKey, ShardedTensor]:
        """All of them, as a single rank would hold them."""
        found: dict[TensorKey, ShardedTensor] = {}
        for name in self._checkpoint:
            view = self._checkpoint[name]
            dtype = view.dtype
            if self._dtype is not None and view.key.kind is Kind.MODEL and can_cast(dtype.name, self._dtype.name):
                dtype = self._dtype
            memory = StreamedMemory(dtype, view.shape, lambda region, v=view, d=dtype: self._read(v, region, d), self._part_bytes)
            shard = Shard(Region.whole(view.shape), memory)
            found[view.key] = ShardedTensor(view.key, dtype, view.shape, None, (shard,))
        common = self._checkpoint.common
        counted = common.global_step if common is not None else None
        # The contract keeps the step count as a tensor, where there is an optimizer.
        if counted is not None and GLOBAL_STEP not in found and any(key.kind is Kind.OPTIMIZER for key in found):
            found[GLOBAL_STEP] = whole_tensor(GLOBAL_STEP, np.array([counted], np.int32))
        return found

    def _read(self, view: TensorView, region: Region, dtype: DType) -> np.ndarray:
        values = view.read(region)
        self._done += values.nbytes
        if self._progress is not None:
            self._progress(self._done, self.total)
        return values if view.dtype == dtype else cast_values(values, dtype)


def _number_of(checkpoint: Checkpoint) -> int:
    if checkpoint.iteration is not None:
        return checkpoint.iteration
    common = checkpoint.common
    counted = None if common is None else common.global_step if common.global_step is not None else common.step_num
    if counted is not None:
        return counted
    match = _NUMBERED.fullmatch(posixpath.basename(checkpoint.directory).partition(".")[0])
    return 0 if match is None else int(match[1])


def _check_target(storage: Storage, root: str, number: int) -> None:
    """See that nothing is overwritten, and that no run is led back to an older state."""
    there = storage.stat(root)
    if there is not None and not there.is_directory:
        raise UsageError("the target is a file", file=root, expected="a directory, or nothing", fix="give a checkpoint root")
    steps = [step for step, _ in list_iterations(storage, root)]
    if number in steps:
        raise UsageError(
            "the target has this iteration; it was not overwritten",
            file=root,
            field="iteration",
            found=number,
            fix="give another root, or another number",
        )
    if steps and max(steps) > number:
        raise UsageError(
            "the target has a newer iteration; a run that resumes there would go back",
            file=root,
            field="iteration",
            found=f"{number}, beside {max(steps)}",
            fix="give another root, or a higher number",
        )
