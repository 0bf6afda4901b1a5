"""Another program's checkpoint becomes an iteration of a checkpoint root, tensor by tensor, without a framework."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reshard.checkpoint import Checkpoint, TensorView
from reshard.comm.single import SingleProcess
from reshard.errors import CheckpointNotFoundError, UsageError
from reshard.format.common import CommonInfo
from reshard.geometry import Region
from reshard.loading.budget import MEMORY_BUDGET, check_budget
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.saving.streamed import StreamedMemory
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.resolve import list_iterations
from reshard.state import GLOBAL_STEP, Kind, Shard, ShardedTensor, State, TensorKey, whole_tensor
from reshard.storage import Storage
from reshard.storage.posix import PosixStorage

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
    memory_budget: int = MEMORY_BUDGET,
    progress: ConversionProgress | None = None,
    storage: Storage | None = None,
) -> Conversion:
    """Write a stored checkpoint of any kind that can be opened as an iteration of a root, in the format of this project.

    Args:
        source: a checkpoint of torch.distributed.checkpoint, a file of torch.save, a folder of weights, or one of this project's.
        target: a checkpoint root; made if needed. What it holds is never overwritten.
        iteration: the number of the iteration; by default the source's step count, else the number in its name, else 0.
        prefix: the first part of data files' names; None for none.
        model_prefix: what the keys of the model begin with in a source of PyTorch, where that can't be recognised.
        optimizer_prefix: likewise, the optimizer's: what stands before `state.` and `param_groups.`.
        memory_budget: bytes that are held at a time.
        progress: is told how far it is.
        storage: where both lie; the file system when it isn't given.

    Raises:
        UsageError: the target has this iteration, or a newer one; or the source's parts can't be told apart.
        CheckpointNotFoundError: there is no source.
        DamagedCheckpointError: the source is not what it promises.
        SaveError: writing failed; nothing was committed.
    """
    check_budget(memory_budget)
    storage = PosixStorage() if storage is None else storage
    checkpoint = Checkpoint(source, storage, prefixes=Prefixes(model_prefix, optimizer_prefix))
    if not len(checkpoint):
        raise CheckpointNotFoundError("there is no tensor to convert", file=checkpoint.directory)
    root = os.path.abspath(os.fspath(target))
    number = _number_of(checkpoint) if iteration is None else iteration
    _check_target(storage, root, number)
    reader = _Reader(checkpoint, memory_budget, progress)
    state = State(tensors=reader.tensors(), groups=checkpoint.groups, values=dict(checkpoint.values))
    has_optimizer = any(key.kind is Kind.OPTIMIZER for key in state.tensors)
    options = SaveOptions(prefix=prefix, keep_checkpoint_max=None, save_optimizer=has_optimizer)
    common = checkpoint.common if checkpoint.common is not None else CommonInfo(step_num=number)
    metrics: Mapping[str, Any] = checkpoint.metrics
    with Saver(storage, SingleProcess(), root, options) as saver:
        report = saver.save(number, state, common, metrics=metrics or None)
    return Conversion(report.directory, number, len(state.tensors), reader.total, (*checkpoint.notes, *checkpoint.check()))


class _Reader:
    """Reads the tensors of a checkpoint when they are written."""

    def __init__(self, checkpoint: Checkpoint, memory_budget: int, progress: ConversionProgress | None) -> None:
        self._checkpoint = checkpoint
        # What is read is written before the next is read; beside it there are the buffers of both.
        self._part_bytes = memory_budget // 4
        self._progress = progress
        self._done = 0
        self.total = sum(tensor.nbytes for tensor in checkpoint.catalog.tensors.values())

    def tensors(self) -> dict[TensorKey, ShardedTensor]:
        """All of them, as a single rank would hold them."""
        found: dict[TensorKey, ShardedTensor] = {}
        for name in self._checkpoint:
            view = self._checkpoint[name]
            memory = StreamedMemory(view.dtype, view.shape, lambda region, view=view: self._read(view, region), self._part_bytes)
            shard = Shard(Region.whole(view.shape), memory)
            found[view.key] = ShardedTensor(view.key, view.dtype, view.shape, None, (shard,))
        common = self._checkpoint.common
        counted = common.global_step if common is not None else None
        # The contract keeps the step count as a tensor, where there is an optimizer.
        if counted is not None and GLOBAL_STEP not in found and any(key.kind is Kind.OPTIMIZER for key in found):
            found[GLOBAL_STEP] = whole_tensor(GLOBAL_STEP, np.array([counted], np.int32))
        return found

    def _read(self, view: TensorView, region: Region) -> np.ndarray:
        values = view.read(region)
        self._done += values.nbytes
        if self._progress is not None:
            self._progress(self._done, self.total)
        return values


def _number_of(checkpoint: Checkpoint) -> int:
    if checkpoint.iteration is not None:
        return checkpoint.iteration
    if checkpoint.common is not None and checkpoint.common.global_step is not None:
        return checkpoint.common.global_step
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
