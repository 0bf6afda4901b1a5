"""The object that a training loop holds: it saves, and it loads."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from reshard.collector import collector_paused
from reshard.comm import Communicator
from reshard.comm.heartbeat import lost_ranks_named
from reshard.comm.together import attempt
from reshard.errors import UsageError
from reshard.export.job import ExportHow, ExportOptions, ExportReport, run_export
from reshard.export.live import export_model
from reshard.families import change_of, select_mapper
from reshard.format.common import CommonInfo
from reshard.format.metrics import numbers_of
from reshard.frameworks.adapter import Adapter
from reshard.frameworks.select import default_communicator, select_adapter
from reshard.loading.budget import MEMORY_BUDGET
from reshard.loading.choice import OnCorrupt, Rules
from reshard.loading.job import How, Run, load_run
from reshard.loading.report import RestoreReport
from reshard.loading.selection import select
from reshard.loading.strictness import Strictness
from reshard.saving.async_saver import AsyncSaver
from reshard.saving.options import SaveOptions, mode_of
from reshard.saving.policies import KeepPolicy
from reshard.saving.progress import SaveStatus, read_status
from reshard.saving.report import AsyncSave, SaveReport, WhenBusy
from reshard.saving.root import is_same_directory
from reshard.saving.saver import Saver
from reshard.sources.legacy.saved_under import given_with
from reshard.sources.pytorch.naming import Prefixes
from reshard.state import State
from reshard.stateful import values_of_parts
from reshard.storage import PosixStorage, Storage

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

_logger = logging.getLogger("reshard")


class CheckpointManager:
    """Saves checkpoints under a root and loads them, under whatever strategy. Every method is collective.

    Args:
        directory: the checkpoint root: it holds the iterations and the tracker.
        prefix: the first part of data files' names; None for none.
        keep_checkpoint_max: how many of the newest committed checkpoints stay on disk, counted over restarts; None for no such rule. Not
            given it is 5, or None where `keep` is given.
        keep: a policy, such as `KeepNewest(5) | KeepEvery(1000)`; what it or `keep_checkpoint_max` keeps stays, without both everything.
        async_save: save while training goes on. True or "copy": `save` returns when the state is copied. "deferred": when what a forward
            pass changes is copied; the next step of any optimizer waits for the rest. What else changes parameters in place (averaging
            weights, `load_state_dict`) must call `before_update` first. The same on every rank.
        when_busy: what an asynchronous save does while another is under way: "wait" for its end, or "skip" this one; on every rank alike.
        remove_redundancy: whether of equal regions that several ranks hold only one is written, by one of them: evenly by bytes, model and
            optimizer together. A checkpoint is then as large as the state itself, however many replicas there are.
        check_replicas: whether what several ranks hold is compared before a save commits. Each rank hashes its part of it, which takes
            about as long as copying it in memory; a difference is a SaveError on every rank, and nothing is committed.
        save_optimizer: whether optimizer state is saved.
        communicator: how the ranks talk; chosen by the framework that is in use when it isn't given.
        storage: where the root lies; the file system when it isn't given.
        read_only: only load. Nothing is created or locked, so that any number of jobs can read a root, also a read-only one.
        lock_timeout: seconds to wait for the run before, which may be just dying, to let go of the root.
        timeout: seconds after which a rank that doesn't answer is taken for gone, in a save or a load; one that has died is noticed at
            once. None: half an hour. Only where the communicator isn't given.

    Raises:
        RootLockedError: another run writes this root.
        UsageError: an argument that can't be.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        prefix: str | None = "CKP",
        keep_checkpoint_max: int | EllipsisType | None = ...,
        keep: KeepPolicy | None = None,
        async_save: bool | AsyncSave = False,
        when_busy: WhenBusy = "wait",
        remove_redundancy: bool = False,
        check_replicas: bool = False,
        save_optimizer: bool = True,
        communicator: Communicator | None = None,
        storage: Storage | None = None,
        read_only: bool = False,
        lock_timeout: float = 10.0,
        timeout: float | None = None,
    ) -> None:
        mode = mode_of(async_save, when_busy)
        # Before anything that would have to be given back.
        most = keep_checkpoint_max if not isinstance(keep_checkpoint_max, EllipsisType) else 5 if keep is None else None
        options = SaveOptions(
            prefix=prefix,
            keep_checkpoint_max=most,
            keep=keep,
            save_optimizer=save_optimizer,
            remove_redundancy=remove_redundancy,
            check_replicas=check_replicas,
            lock_timeout=lock_timeout,
            async_save=mode,
            when_busy=when_busy,
        )
        self.directory = os.path.abspath(os.fspath(directory))
        self._storage: Storage = storage if storage is not None else PosixStorage()
        self._owns_communicator = communicator is None
        self._comm = communicator if communicator is not None else default_communicator(timeout)
        self._saving_comm = self._comm
        self._saver: Saver | None = None
        self._async: AsyncSaver | None = None
        self._adapter: Adapter | None = None  # of the save before
        self._is_open = True
        if not read_only:
            try:
                if mode is not None:
                    self._saving_comm = self._comm.duplicate()
                self._saver = Saver(self._storage, self._saving_comm, self.directory, options)
                if mode is not None:
                    self._async = AsyncSaver(self._saver, self._comm, mode)
            except BaseException:
                if self._saver is not None:
                    self._saver.close()
                self._close_communicators()
                raise

    def save(
        self,
        step: int,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        common: CommonInfo | None = None,
        metrics: Mapping[str, Any] | None = None,
        mapping: Any = None,
    ) -> SaveReport:
        """Save the run as an iteration. When it returns, the checkpoint is committed and durable; when it raises, nothing was.

        With `async_save` it returns when the run may go on; the report says `under way`. What becomes of the save the next call says, of
        whatever method, on every rank: it raises the error of a save that failed.

        Args:
            step: the number of the iteration. Saving it again replaces it in one step.
            model: a module, a list or dictionary of modules, or a dictionary of arrays.
            optimizer: an optimizer, a list or dictionary of them.
            scheduler: has `state_dict`, or is a value; the same on every rank.
            dataloader: has `state_dict`, or is a value; the same on every rank.
            extra: values of JSON with arrays, and objects that have `state_dict`; the same on every rank.
            common: the training information of the iteration; by default only the step counts.
            metrics: numbers by name, such as `{"loss": 1.2}`, for `KeepBest` and `reshard ls`; rank 0's are stored. Where `common` says
                nothing of the checkpoint's health, a `loss` does: one that is not finite makes it unhealthy.
            mapping: as in `load`; the checkpoint gets the names of its other side (of a family those of `saves_as`).

        Raises:
            SaveError: on every rank the same, naming each failed rank and its cause.
            CaptureError: something that can't be saved.
        """
        self._check_open()
        if self._saver is None:
            raise UsageError("this manager is read-only", field="read_only", found=True, fix="make another one without read_only to save")
        started = time.perf_counter()
        if self._async is not None and not self._async.has_room():
            return SaveReport(step, self.directory, 0, time.perf_counter() - started, (), "skipped")
        saver, later = self._saver, self._async
        # What a single rank can't take, the others must hear of.
        change, wrong = attempt(lambda: change_of(mapping, model))
        numbers, bad = attempt(lambda: None if metrics is None else numbers_of(metrics))

        def capture() -> State:
            adapter = self._adapter = select_adapter(model, optimizer, self._adapter)
            # A step count that the caller doesn't state is the optimizer's own, not the number of the iteration.
            captured = adapter.capture(model, optimizer, global_step=None if common is None else common.global_step)
            values = values_of_parts({"scheduler": scheduler, "dataloader": dataloader, "extra": extra}, adapter.to_value)
            return replace(captured, values=values, rank_values={"random": adapter.to_value(adapter.random_states())})

        @collector_paused()  # when the collector looks again, what is captured in here is gone
        def capture_and_save() -> SaveReport:
            captured, error = (None, wrong or bad) if wrong or bad else attempt(capture)
            told = captured or State(), common or CommonInfo(step_num=step, global_step=step), error, numbers
            return saver.save(step, *told, change) if later is None else later.save(step, self._adapter, *told, started, change)

        return capture_and_save()

    def before_update(self) -> None:
        """Call it before changing parameters or optimizer state otherwise than by an optimizer's step, with `async_save="deferred"`.
        It returns when what is being saved is copied; at once, where nothing is. Not collective.
        """
        if self._async is not None:
            self._async.before_update()

    def status(self) -> SaveStatus:
        """How far each rank has come with the newest save, and which one is behind. Not collective, and from any thread.

        Raises:
            CommunicationError: the job's store can't be reached.
        """
        return read_status(self._comm.board(), self._comm.world_size)

    @overload
    def load(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        strict: Strictness | None = None,
        only: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        missing_ok: Literal[False] = False,
        on_corrupt: OnCorrupt = "error",
        skip_unhealthy: bool = False,
        restore_random: bool = True,
        reseed: int | None = None,
        balanced: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        verify: bool = True,
        neighbours: bool = True,
        mapping: Any = None,
        prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    ) -> RestoreReport: ...

    @overload
    def load(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        strict: Strictness | None = None,
        only: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        missing_ok: bool,
        on_corrupt: OnCorrupt = "error",
        skip_unhealthy: bool = False,
        restore_random: bool = True,
        reseed: int | None = None,
        balanced: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        verify: bool = True,
        neighbours: bool = True,
        mapping: Any = None,
        prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    ) -> RestoreReport | None: ...

    def load(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        strict: Strictness | None = None,
        only: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        missing_ok: bool = False,
        on_corrupt: OnCorrupt = "error",
        skip_unhealthy: bool = False,
        restore_random: bool = True,
        reseed: int | None = None,
        balanced: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        verify: bool = True,
        neighbours: bool = True,
        mapping: Any = None,
        prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    ) -> RestoreReport | None:
        """Load a checkpoint into the run, resharded to its strategy.

        Args:
            path: a root (the iteration of its tracker), one iteration, a folder of Hugging Face weights, or a `SavedUnder`; by default this
                manager's root.
            model: as in `save`; its parameters and buffers are filled in place.
            optimizer: as in `save`; a fresh one gets its slots. None loads weights only.
            scheduler: has `load_state_dict`, or None.
            dataloader: has `load_state_dict`, or None.
            extra: an object or a dictionary of objects with `load_state_dict`, or None; all values come back in the report.
            strict: what to do about misfits; the same on every rank. By default `Strictness()`, of a folder of weights with `dtype="cast"`.
            only: patterns of names (`layers.0.*`): nothing but what matches one is loaded. They are globs (`*` goes over dots, too) of the
                names in files (with a mapping, of the run's), and of an optimizer's tensors also of their parameters' names. What is left
                out is neither missing nor unexpected, is not read, and keeps the run's values. The same on every rank.
            exclude: patterns, likewise: what matches one is left out.
            missing_ok: no checkpoint at all is not an error but gives None (a fresh start).
            on_corrupt: about a damaged one: `error` names the newest intact one, `fallback` loads it and warns. The same on every rank.
            skip_unhealthy: whether an unhealthy one (`ckpt_status`) gives way, with a warning, to the newest older one that isn't.
            restore_random: give the random generators their states, where this rank has the same place in the same strategy.
            reseed: the seed of this rank's generators where it hasn't: one for all that must draw alike. None leaves them alone.
            balanced: ranks read every byte once in the whole job, evenly, and send it on: for slow storage. The same on every rank.
            memory_budget: bytes that the load may take beyond the run's own state, on each rank. The same on every rank.
            verify: hold every block of rows that is read whole against its digest; the report says how much. The same on every rank.
            neighbours: ranks of one machine read rows for each other where each needs columns, if Linux lets them. The same on every rank.
            mapping: how the run's names lie in the checkpoint's: a family's name (`"qwen3"`), a `Family`, or a `RuleMapping`.
            prefixes: where model and optimizer begin in the keys of a checkpoint of PyTorch, when that can't be recognised.

        Returns:
            The report, or None when there was none to load and that is fine.

        Raises:
            CheckpointNotFoundError: there is no checkpoint, or `skip_unhealthy` leaves none.
            DamagedCheckpointError: it isn't what it promises, or not as it was saved; nor, with `fallback`, is any older one.
            MismatchError: it doesn't fit the run.
            UsageError: the ranks were given different options of how to load, or a pattern in `only` means no tensor at all.
        """
        self._check_open()
        self.wait()
        run = Run(model, optimizer, {"scheduler": scheduler, "dataloader": dataloader, "extra": extra}, restore_random, reseed)
        how = How(strict, select(only, exclude), balanced, memory_budget, verify, neighbours, select_mapper(mapping))
        root = self.directory if path is None else os.path.abspath(os.fspath(path))
        with collector_paused(), lost_ranks_named(self._comm):
            rules = Rules(missing_ok, on_corrupt, skip_unhealthy, prefixes, given_with(path))
            loaded = load_run(self._storage, self._comm, root, run, rules, how)
        if loaded is None:
            return None
        resolved, report = loaded
        if self._saver is not None and resolved.iteration is not None and is_same_directory(resolved.root, self.directory):
            self._saver.protect(resolved.iteration)
        return report

    def export(
        self, folder: str | os.PathLike[str], *, model: Any = None, path: str | os.PathLike[str] | None = None, **options: Unpack[ExportHow]
    ) -> ExportReport:
        """Write a model as a folder that transformers' `from_pretrained` opens, all ranks together.

        Args:
            folder: the folder to make, on a file system that all ranks share.
            model: as in `save`: exported as it is now. While that happens the disk holds it twice.
            path: without a model: a root or one iteration; by default this manager's root.
            options: those of `export_checkpoint` from `dtype` to `progress`; of a model of transformers `config` need not be given.

        Raises:
            ReshardError: as `export_checkpoint` and `save`.
        """
        self._check_open()
        self.wait()
        target, how = os.path.abspath(os.fspath(folder)), ExportOptions(**options)
        if model is not None:
            return export_model(self._storage, self._comm, target, model, how)
        return run_export(self._storage, self._comm, self.directory if path is None else os.path.abspath(os.fspath(path)), target, how)

    def wait(self) -> SaveReport | None:
        """Return when no save is under way, with what became of the last asynchronous one; None when there was none.

        Raises:
            ReshardError: it failed; on every rank the same, and once.
        """
        return None if self._async is None else self._async.wait()

    def close(self) -> None:
        """Wait, then let go of the root and of the communicators.

        Raises:
            ReshardError: the save that was under way failed; all is closed in any case.
        """
        try:
            self.wait()
        finally:
            if self._async is not None:
                self._async.close()
                self._async = None
            self._is_open = False
            if self._saver is not None:
                self._saver.close()
                self._saver = None
            self._close_communicators()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif (failed := attempt(self.close)[1]) is not None:  # what ended the run matters more
            _logger.error("the last save failed, too: %s", failed)

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError("this manager is closed", field="directory", found=self.directory, fix="make another one")

    def _close_communicators(self) -> None:
        if self._saving_comm is not self._comm:
            self._saving_comm.close()
        if self._owns_communicator:
            self._comm.close()
