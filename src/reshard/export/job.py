"""An export from its begin to its end: all ranks plan alike, each writes its files, rank 0 makes the folder of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import numpy as np

from reshard.checkpoint import Checkpoint
from reshard.comm import Communicator
from reshard.comm.together import attempt, from_first, settle
from reshard.errors import MismatchError, UsageError
from reshard.export.folder import ExportFolder, temporary_of
from reshard.export.model_config import check_config, mapper_of, read_given_config, tied_output, written_config
from reshard.export.sharding import ExportTensor, Shard, parse_size, plan_shards, share_out
from reshard.export.values import cut, write_shard
from reshard.families import Family
from reshard.format.names import tensor_name
from reshard.format.safetensors import plan_header
from reshard.format.seal import SealedFile
from reshard.frameworks.select import default_communicator
from reshard.geometry import DType
from reshard.geometry.casts import can_cast
from reshard.geometry.dtypes import by_name
from reshard.loading.budget import MEMORY_BUDGET, check_budget
from reshard.saving.commit import check_presence
from reshard.sources.huggingface import CONFIG_FILE, WEIGHTS_INDEX_FILE, encode_model_config
from reshard.sources.resolve import resolve
from reshard.state import Kind
from reshard.storage import Storage
from reshard.storage.posix import PosixStorage
from reshard.storage.storage import join

Progress = Callable[[int, int], None]
"""Is told of the bytes that this rank has written and of all that it will write."""

# What transformers looks for in a file's header before it reads it.
_HEADER_METADATA = {"format": "pt"}

_NOTHING = "nothing was exported"


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        folder: what it made.
        source: the directory of the checkpoint.
        files: the names of its files of weights.
        tensors: how many they hold.
        nbytes: their bytes, without headers.
        cast: the tensors that were converted, as `name: float32 -> bfloat16`.
        notes: what else there is to know.
        seconds: how long it took on this rank.
    """

    folder: str
    source: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    cast: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        files = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        converted = f", {len(self.cast)} converted" if self.cast else ""
        return f"{self.folder}: {self.tensors} tensors in {files}, {self.nbytes / 1e6:.1f} MB{converted}, in {self.seconds:.1f} s"


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported; the same on every rank.

    Attributes:
        dtype: the floating type that floating tensors are converted into; None leaves each as it is.
        max_shard_size: the bytes of tensors that a file may hold, or words such as `5GB`.
        config: the model's `config.json` (path, folder, or contents); None: what the source says.
        force: whether a folder of weights that is there is replaced.
        memory_budget: bytes that are held at a time, on each rank.
        progress: is told how far this rank is; each rank may have another.
        family: of the model, where it isn't to be recognised by its configuration.
    """

    dtype: str | None = None
    max_shard_size: str | int = "5GB"
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None
    force: bool = False
    memory_budget: int = MEMORY_BUDGET
    progress: Progress | None = None
    family: str | Family | None = None

    def check(self) -> tuple[DType | None, int]:
        """The type and the size that they mean.

        Raises:
            UsageError: they mean none.
        """
        check_budget(self.memory_budget)
        dtype = None if self.dtype is None else by_name(self.dtype)
        if dtype is not None and not can_cast("float32", dtype.name):
            raise UsageError(
                "tensors can be converted into floating types only", field="dtype", found=self.dtype, expected="such as bfloat16"
            )
        return dtype, parse_size(self.max_shard_size)


class ExportHow(TypedDict, total=False):
    """The arguments of a call that become `ExportOptions`."""

    dtype: str | None
    max_shard_size: str | int
    config: str | os.PathLike[str] | Mapping[str, Any] | None
    force: bool
    memory_budget: int
    progress: Progress | None
    family: str | Family | None


class _Start(msgspec.Struct, array_like=True):
    """What rank 0 found, for all ranks: another one may look when a run has saved meanwhile."""

    source: str
    config: bytes


@dataclass(frozen=True)
class _Plan:
    checkpoint: Checkpoint
    tensors: tuple[ExportTensor, ...]
    shards: tuple[Shard, ...]
    config: bytes
    tied: tuple[str, str] | None


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    force: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
    family: str | Family | None = None,
    communicator: Communicator | None = None,
    storage: Storage | None = None,
) -> ExportReport:
    """Write the model of a checkpoint as a folder that transformers' `from_pretrained` opens. Collective; one process is enough.

    The folder has the same bytes whatever strategy the checkpoint was saved under, and however many ranks export it.

    Args:
        checkpoint: a checkpoint root (its tracker is obeyed), an iteration, or a folder of weights.
        folder: the folder to make. It must not exist, or be empty.
        dtype: the type that floating tensors are converted into (`bfloat16`); None leaves each as it is.
        max_shard_size: the bytes of tensors that a file may hold, or words such as `5GB`. A larger model becomes several files
            and an index.
        config: the model's `config.json`: its path, a folder that has it, or its contents. Not given, it is what was saved with the run
            (`extra={"config": model.config.to_dict()}`), or the folder's own.
        force: replace a folder of weights that is there; files in it that are no weights stay.
        memory_budget: bytes that are held at a time, on each rank.
        progress: is told how far this rank is.
        family: of the model, by name: its names in the checkpoint become those of Hugging Face files. Not given, it is recognised by the
            configuration; tensors of a model that isn't known keep their names.
        communicator: the ranks that share the work; that of the framework in use when it isn't given.
        storage: where all of it lies; the file system when it isn't given.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        DamagedCheckpointError: it isn't what it promises.
        UsageError: the folder isn't empty, an argument that can't be, or nothing says what `config.json` is to say.
        MismatchError: the configuration ties tensors that differ.
    """
    options = ExportOptions(dtype, max_shard_size, config, force, memory_budget, progress, family)
    with ExitStack() as closing:
        comm = communicator if communicator is not None else default_communicator()
        if communicator is None:
            closing.callback(comm.close)
        where = storage if storage is not None else PosixStorage()
        return run_export(where, comm, os.path.abspath(os.fspath(checkpoint)), os.path.abspath(os.fspath(folder)), options)


def run_export(storage: Storage, comm: Communicator, path: str, folder: str, options: ExportOptions) -> ExportReport:
    """The work of `export_checkpoint`, with all that it needs. Collective.

    Raises:
        ReshardError: as `export_checkpoint`, on every rank the same.
    """
    started = time.perf_counter()
    with ExitStack() as closing:

        def begin() -> _Start:
            options.check()
            source = resolve(storage, path).directory
            given = Checkpoint(source, storage).config if options.config is None else read_given_config(storage, options.config)
            config = check_config(given, source)
            encode_model_config(config)
            nonlocal target
            target = ExportFolder(storage, folder, source, force=options.force)
            closing.callback(target.close)
            return _Start(source, json.dumps(dict(config)).encode())

        target: ExportFolder | None = None
        start = from_first(comm, begin, _Start, what=_NOTHING)
        planned, error = attempt(lambda: _plan(storage, start, options))
        settle(comm, error, what=_NOTHING)
        assert planned is not None  # settle raises when any rank has no plan
        sizes, error = attempt(lambda: _write(storage, comm, temporary_of(folder), planned, options))
        written = settle(comm, error, msgspec.msgpack.encode(sizes), what=_NOTHING)

        def publish() -> bool:
            assert target is not None  # rank 0 has it
            files = {
                rank: {name: SealedFile(size, 0, b"") for name, size in msgspec.msgpack.decode(data, type=dict[str, int]).items()}
                for rank, data in enumerate(written)
            }
            check_presence(storage, target.temporary, files)
            _write_index(storage, target.temporary, planned)
            target.publish()
            return True

        from_first(comm, publish, bool, what=_NOTHING)
        return _report(folder, planned, time.perf_counter() - started)


def _plan(storage: Storage, start: _Start, options: ExportOptions) -> _Plan:
    dtype, most_bytes = options.check()
    checkpoint = Checkpoint(start.source, storage)
    config: Mapping[str, Any] = json.loads(start.config)
    mapper = mapper_of(options.family, config, [key.parameter for key in checkpoint.catalog.tensors if key.kind is Kind.MODEL])
    if mapper is not None or dtype is not None:
        checkpoint = Checkpoint(start.source, storage, mapping=mapper, dequantise=options.dtype)
    keys = [key for key in checkpoint.catalog.tensors if key.kind is Kind.MODEL]
    tied = tied_output(config, keys)
    tensors = []
    for key in keys:
        name = tensor_name(key)
        if tied is None or name != tied[0]:
            view = checkpoint[name]
            wanted = dtype if dtype is not None and can_cast(view.dtype.name, dtype.name) else view.dtype
            tensors.append(ExportTensor(name, view.dtype, wanted, view.shape))
    if not tensors:
        raise UsageError("the checkpoint has no tensor of a model", file=start.source, fix="give one that was saved with model=")
    return _Plan(
        checkpoint, tuple(tensors), plan_shards(tensors, most_bytes), encode_model_config(written_config(config, tensors, checkpoint)), tied
    )


def _write(storage: Storage, comm: Communicator, directory: str, plan: _Plan, options: ExportOptions) -> dict[str, int]:
    """Write this rank's files: their names and sizes."""
    if comm.rank == comm.world_size - 1 and plan.tied is not None:
        # The last rank, since the first ones have the largest files.
        _check_tied(plan.checkpoint, *plan.tied, options.memory_budget)
    mine = share_out(plan.shards, comm.world_size)[comm.rank]
    total = sum(shard.nbytes for shard in mine)
    done = 0

    def tell(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress is not None:
            options.progress(done, total)

    sizes = {}
    for shard in mine:
        header = plan_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors], _HEADER_METADATA, digests=False)
        tensors = [(plan.checkpoint[entry.name], entry.dtype) for entry in header.entries.values()]
        write_shard(storage, join(directory, shard.file), header, tensors, memory_budget=options.memory_budget, written=tell)
        sizes[shard.file] = header.file_size
    if mine:
        storage.sync_directory(directory)
    return sizes


def _check_tied(checkpoint: Checkpoint, output: str, embedding: str, memory_budget: int) -> None:
    """See that nothing is lost with an output layer that isn't written."""
    first, second = checkpoint[output], checkpoint[embedding]
    same = first.shape == second.shape and first.dtype == second.dtype
    if not same or not all(
        np.array_equal(first.read(region).view(np.uint8), second.read(region).view(np.uint8)) for region in cut(first, memory_budget)
    ):
        raise MismatchError(
            "the configuration ties the output layer to the embedding, and the checkpoint has two different ones",
            file=checkpoint.directory,
            tensor=output,
            expected=f"the values of {embedding}",
            fix="set tie_word_embeddings to false in the configuration that you give (--config)",
        )


def _write_index(storage: Storage, directory: str, plan: _Plan) -> None:
    storage.write_bytes(join(directory, CONFIG_FILE), plan.config)
    if len(plan.shards) > 1:
        total = sum(shard.nbytes for shard in plan.shards)
        places = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        storage.write_bytes(join(directory, WEIGHTS_INDEX_FILE), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _report(folder: str, plan: _Plan, seconds: float) -> ExportReport:
    cast = tuple(f"{t.name}: {t.stored} -> {t.dtype}" for t in plan.tensors if t.stored != t.dtype)
    notes = () if plan.tied is None else (f"{plan.tied[0]} is {plan.tied[1]} (tie_word_embeddings) and was not written again",)
    if plan.checkpoint.dequantised:
        notes += (f"dequantised by block: {plan.checkpoint.dequantised} tensors",)
    return ExportReport(
        folder,
        plan.checkpoint.directory,
        tuple(shard.file for shard in plan.shards),
        len(plan.tensors),
        sum(shard.nbytes for shard in plan.shards),
        cast,
        (*plan.checkpoint.notes, *notes),
        seconds,
    )
