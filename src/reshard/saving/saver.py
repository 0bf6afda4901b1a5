"""The saver: every rank's part of a save, and what they tell each other."""

from __future__ import annotations

import logging
import operator
import os
import posixpath
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, SupportsIndex

import msgspec

from reshard.comm import Communicator
from reshard.comm.heartbeat import lost_ranks_named
from reshard.comm.together import attempt, settle
from reshard.errors import ReshardError, UsageError
from reshard.format.common import CommonInfo, with_health
from reshard.format.extra import global_tree, write_extra
from reshard.format.index import INDEX_FILE
from reshard.format.metrics import METRICS_FILE, encode_metrics
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE, METADATA_FILE, iteration_name
from reshard.format.seal import SEAL_FILE, SealedFile, encode_seal
from reshard.saving.changing import change_together, check_none_changes
from reshard.saving.commit import Undo, check_presence, publish
from reshard.saving.given import check_step, counted_steps, encode_checked
from reshard.saving.groups import GroupOptions, encode_options, merge_groups
from reshard.saving.opening import Opening, agree_on_opening
from reshard.saving.options import SaveOptions
from reshard.saving.outcome import UNCHANGED, Failure, Outcome, Verdict, describe_failure, failure_of_ranks
from reshard.saving.policies import policy_of
from reshard.saving.progress import ProgressNotices
from reshard.saving.rank_files import check_space, write_rank
from reshard.saving.replicas import Replicas, compare
from reshard.saving.report import SaveReport
from reshard.saving.retention import retire
from reshard.saving.root import check_lock, discard, is_leftover_of, open_root, saving_name
from reshard.saving.sharing import SHARED_PATHS, check_shared, is_declared_shared, this_host
from reshard.saving.structure import RankPlan, Structures
from reshard.state import State
from reshard.storage import Lock, Storage
from reshard.storage.storage import join

_logger = logging.getLogger("reshard")


@dataclass(frozen=True)
class _Prepared:
    """A rank's part of a save before anything is written."""

    step: int
    plan: RankPlan
    options: list[GroupOptions]
    common: bytes
    global_step: int | None
    metrics: bytes | None


class Saver:
    """Saves the states of a run's ranks as iterations of one checkpoint root.

    Making one is collective, and so is `save`: every rank calls it, in the same order. One saver at a time writes a root.

    Args:
        storage: where the root lies; one that all ranks share.
        comm: the ranks.
        root: the absolute path of the root; made if needed.
        options: the same on every rank.
        protect: as in the method of this name.

    Raises:
        RootLockedError: another run writes this root (on every rank).
        UsageError: the root is no absolute path, or the ranks were given different options (on every rank).
        StorageError: the root can't be made (on every rank).
    """

    def __init__(
        self, storage: Storage, comm: Communicator, root: str, options: SaveOptions | None = None, protect: int | None = None
    ) -> None:
        if not root.startswith("/"):
            raise UsageError("the checkpoint root must be an absolute path", field="directory", found=root)
        self.root = posixpath.normpath(root)
        self.options = options if options is not None else SaveOptions()
        self._storage = storage
        self._comm = comm
        self._protected = protect
        self._sequence = 0
        self._notices = ProgressNotices(comm.board(), comm.rank)
        given = self.options
        self._structures = Structures(
            comm.rank, comm.world_size, given.prefix, given.save_optimizer, given.remove_redundancy, given.check_replicas
        )
        self._replicas: Replicas | None = None
        self._lock: Lock | None = None
        self._is_open = True
        self._was_broken_off = False

        def open_here() -> str:
            self._lock = open_root(storage, self.root, self.options.lock_timeout)
            return secrets.token_hex(4)

        try:
            token, error = attempt(open_here) if comm.rank == 0 else ("", None)
            mine = Opening(
                token or "",
                given.prefix,
                given.save_optimizer,
                given.remove_redundancy,
                given.check_replicas,
                given.async_save,
                given.when_busy,
                this_host(),
                is_declared_shared(self.root, os.environ.get(SHARED_PATHS)),
            )
            told = settle(comm, error, msgspec.msgpack.encode(mine), what="this run can't save there")
            openings = [msgspec.msgpack.decode(data, type=Opening) for data in told]
            self._token = agree_on_opening(openings).token
            declared = all(opening.is_declared_shared for opening in openings)
            check_shared(storage, comm, self.root, [opening.host for opening in openings], self._token, is_declared=declared)
        except BaseException:
            self.close()
            raise

    def protect(self, step: int | None) -> None:
        """Keep an iteration (the one that the run was loaded from) until a newer one is committed. Not collective."""
        self._protected = step

    def announce(self, step: SupportsIndex, nbytes: int) -> None:
        """Leave a notice that this rank begins a save: it copies so many bytes. Not collective."""
        self._notices.begin(operator.index(step), nbytes)

    def save(
        self,
        step: SupportsIndex,
        state: State,
        common: CommonInfo,
        error: ReshardError | None = None,
        metrics: Mapping[str, Any] | None = None,
        change: Callable[[State, bool], State] | None = None,
    ) -> SaveReport:
        """Save the states of all ranks as an iteration. Collective.

        When it returns, the checkpoint is committed and durable. When it raises, on every rank the same, nothing was committed and what
        existed is as it was.

        Args:
            step: the number of the iteration; one that exists is replaced in one step.
            state: what this rank holds.
            common: the training information of the iteration; rank 0's is stored.
            error: what already failed on this rank (it couldn't capture its state): then nothing is saved, and every rank hears of it.
            metrics: numbers by name; rank 0's are stored.
            change: makes of the state what is saved, as a mapping does, and is told whether all ranks hold the same; None when it is
                saved as it is.

        Raises:
            SaveError: names each rank that failed, and why.
            NoSpaceError: likewise, when a rank found no room.
            CaptureError: likewise, when all that failed had something that can't be saved.
            UsageError: likewise; or the saver is closed.
            CommunicationError: a rank is gone. Whether the checkpoint was committed can be seen on disk.
        """
        if not self._is_open:
            raise UsageError("this saver is closed", field="step", found=step)
        # Whatever is no number fails below, on every rank.
        attempt(lambda: self._notices.turn_to(operator.index(step)))
        try:
            with lost_ranks_named(self._comm):
                report = self._save(step, state, common, error, metrics, change)
        except BaseException:
            self._notices.enter("failed")
            raise
        self._notices.enter("done")
        return report

    def _save(
        self,
        step: SupportsIndex,
        state: State,
        common: CommonInfo,
        error: ReshardError | None,
        metrics: Mapping[str, Any] | None,
        change: Callable[[State, bool], State] | None,
    ) -> SaveReport:
        started = time.perf_counter()
        self._clear()
        self._sequence += 1
        self._was_broken_off = True
        prepared: _Prepared | None = None
        if change is not None:
            state, error = change_together(self._comm, state, change, error)
        if error is None:
            prepared, error = attempt(lambda: self._prepare(step, state, common, metrics))
        agreed = self._agree(prepared, error)
        files, error = self._write_part(prepared, state, error) if agreed else ({}, error)
        self._notices.enter("committing")
        outcomes, is_outdated = self._tell(prepared, error, files)
        if is_outdated and all(outcome.failure is None for outcome in outcomes):
            # A rank holds something else than at the save before, and others wrote their shares of what was. Now all know of it.
            self._discard(outcomes)
            self._sequence += 1
            files, error = self._write_part(prepared, state, error)
            outcomes, _ = self._tell(prepared, error, files)
        difference = compare(self._comm, self._replicas, [outcome.replicas for outcome in outcomes])
        mine: Verdict | None = None
        if self._comm.rank == 0:
            # Whatever happens here, the others hear a verdict.
            mine, problem = attempt(lambda: self._judge(prepared, state, outcomes, difference))
            if problem is not None:
                mine = Verdict(describe_failure(None, {0: Failure.of(problem)}, len(outcomes)), [])
        verdict = msgspec.msgpack.decode(self._comm.broadcast(msgspec.msgpack.encode(mine)), type=Verdict)
        self._was_broken_off = False
        if verdict.failure is not None:
            raise verdict.failure.error_class(verdict.failure.text) from error
        assert prepared is not None  # else its failure would have been in the verdict
        if self._protected is not None and prepared.step > self._protected:
            self._protected = None
        return SaveReport(
            prepared.step,
            join(self.root, iteration_name(prepared.step)),
            sum(file.size for file in files.values()),
            time.perf_counter() - started,
            tuple(verdict.removed),
        )

    def close(self) -> None:
        """Let go of the root. Not collective."""
        self._is_open = False
        self._clear()
        lock, self._lock = self._lock, None
        if lock is not None:
            _, error = attempt(lock.release)
            if error is not None:
                _logger.warning("can't release the lock of %s: %s", self.root, error)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _clear(self) -> None:
        """Rank 0: remove what a save left that an interrupt or a lost rank broke off, in a process that lives on."""
        if not self._was_broken_off:
            return
        self._was_broken_off = False
        _, error = attempt(self._remove_leftovers)
        if error is not None:
            _logger.warning("can't look for what the save before left in %s: %s", self.root, error)

    def _remove_leftovers(self) -> None:
        if self._lock is not None and self._lock.is_held():
            for entry in self._storage.list(self.root):
                if is_leftover_of(entry.name, self._token):
                    discard(self._storage, join(self.root, entry.name))

    @property
    def _mark(self) -> str:
        return f"{self._token}-{self._sequence}"

    def _temporary(self, step: int) -> str:
        return join(self.root, saving_name(step, self._mark))

    def _prepare(self, step: SupportsIndex, state: State, common: CommonInfo, metrics: Mapping[str, Any] | None) -> _Prepared:
        number = check_step(step)
        numbers = None if metrics is None else encode_metrics(metrics)
        encoded = encode_checked(with_health(common, metrics))
        return _Prepared(number, self._structures.plan(state), encode_options(state.groups), encoded, counted_steps(state), numbers)

    def _agree(self, prepared: _Prepared | None, error: ReshardError | None) -> bool:
        """The first time, tell each other the structures; whether every rank has one, so that writing makes sense."""
        if self._structures.is_agreed:
            return True
        told = self._comm.all_gather(b"" if prepared is None else prepared.plan.structure)
        check_none_changes(told, self._comm.rank, error)
        if not all(told):
            return False
        self._structures.learn(told)
        return True

    def _write_part(
        self, prepared: _Prepared | None, state: State, error: ReshardError | None
    ) -> tuple[dict[str, SealedFile], ReshardError | None]:
        """Write this rank's files, if it can: what the seal says of them, and what kept it from it."""
        self._replicas = None
        if prepared is None or not self._structures.is_known(prepared.plan):
            return {}, error
        files, error = attempt(lambda: self._write(prepared, state))
        return files or {}, error

    def _write(self, prepared: _Prepared, state: State) -> dict[str, SealedFile]:
        temporary = self._temporary(prepared.step)
        files = self._structures.files_to_write(prepared.plan)
        if self._comm.rank == 0:
            check_lock(self._lock, self.root)
            # Whether the states fit together shows here, before rank 0 writes, unless another rank's has changed since the last save.
            self._structures.metadata()
        check_space(self._storage, self.root, temporary, self._structures.nbytes)
        self._notices.begin(prepared.step, sum(header.file_size for _, header in files), "writing")
        written = write_rank(
            self._storage,
            temporary,
            files,
            state,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            place=prepared.plan.place,
            written=self._notices.written,
        )
        self._replicas = Replicas(self._comm.rank, self._structures.shared_regions, state)
        return written

    def _tell(self, prepared: _Prepared | None, error: ReshardError | None, files: dict[str, SealedFile]) -> tuple[list[Outcome], bool]:
        """Collective: the outcomes of all ranks, and whether their files were planned from what some of them no longer hold."""
        outcome = Outcome(
            None if prepared is None else prepared.step,
            None if error is None else Failure.of(error),
            files,
            None if prepared is None or not self._structures.is_agreed else self._structures.news(prepared.plan),
            [] if prepared is None else prepared.options,
            None if prepared is None else prepared.global_step,
            {} if self._replicas is None else self._replicas.folded,
        )
        gathered = self._comm.all_gather(msgspec.msgpack.encode(outcome))
        check_none_changes(gathered, self._comm.rank, error)
        outcomes = [msgspec.msgpack.decode(data, type=Outcome) for data in gathered]
        is_outdated = self._structures.is_agreed and self._structures.learn([outcome.news for outcome in outcomes])
        return outcomes, is_outdated

    def _judge(self, prepared: _Prepared | None, state: State, outcomes: list[Outcome], difference: Failure | None) -> Verdict:
        """Rank 0: commit, or clean up."""
        failure = failure_of_ranks(outcomes) or difference
        if failure is None and prepared is not None:
            part = prepared
            undo = Undo()
            _, error = attempt(lambda: self._commit(part, state, outcomes, undo))
            if error is None:
                return Verdict(None, list(self._retire(prepared.step)))
            consequence = UNCHANGED if undo.failure is None else f"The commit could not be taken back either ({undo.failure})"
            failure = describe_failure(prepared.step, {0: Failure.of(error)}, len(outcomes), consequence)
        else:
            self._discard(outcomes)
        return Verdict(failure, [])

    def _discard(self, outcomes: list[Outcome]) -> None:
        """Rank 0: remove what the ranks wrote."""
        if self._comm.rank == 0:
            for step in {outcome.step for outcome in outcomes if outcome.step is not None}:
                discard(self._storage, self._temporary(step))

    def _commit(self, prepared: _Prepared, state: State, outcomes: list[Outcome], undo: Undo) -> None:
        temporary = self._temporary(prepared.step)
        try:
            self._complete(temporary, prepared, state, outcomes)
        except Exception:
            discard(self._storage, temporary)
            raise
        check_lock(self._lock, self.root)
        publish(self._storage, self.root, prepared.step, temporary, self._mark, undo)

    def _complete(self, temporary: str, prepared: _Prepared, state: State, outcomes: list[Outcome]) -> None:
        """Add to the ranks' files what is of the whole checkpoint, seal it, and make all names durable."""
        storage = self._storage
        check_presence(storage, temporary, {rank: outcome.files for rank, outcome in enumerate(outcomes)})
        metadata, index = self._structures.metadata()
        groups = merge_groups([outcome.options for outcome in outcomes], self._structures.members)
        files = {name: file for outcome in outcomes for name, file in outcome.files.items()}
        name = join(EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)
        files[name] = write_extra(storage, join(temporary, name), global_tree(state.values, groups))
        small = {COMMON_FILE: prepared.common, METADATA_FILE: metadata, join(EXTRA_DIRECTORY, INDEX_FILE): index}
        if prepared.metrics is not None:
            small[join(EXTRA_DIRECTORY, METRICS_FILE)] = prepared.metrics
        for name, data in small.items():
            storage.write_bytes(join(temporary, name), data)
            files[name] = SealedFile.whole(data)
        storage.write_bytes(join(temporary, SEAL_FILE), encode_seal(files))
        storage.sync_directory(join(temporary, EXTRA_DIRECTORY))
        storage.sync_directory(temporary)

    def _retire(self, step: int) -> tuple[int, ...]:
        policy = policy_of(self.options.keep_checkpoint_max, self.options.keep)
        if policy is None:
            return ()
        spare = {self._protected} if self._protected is not None and self._protected >= step else set()
        removed, error = attempt(lambda: retire(self._storage, self.root, policy, step, spare, self._mark))
        if error is not None:
            _logger.warning("can't tell which old checkpoints of %s may go; all stay: %s", self.root, error)
        return removed or ()
