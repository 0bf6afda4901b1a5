"""A load from its begin to its end: choose a checkpoint, fill the run, and fall back to an older one when it turns out to be damaged.

Rank 0 chooses, and all ranks hear the same: of the choice, and of every error. So they fall back together, or not at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import msgspec

from reshard.comm import Communicator
from reshard.comm.together import attempt, from_first, settle
from reshard.errors import DAMAGE, CommunicationError, MismatchError, ReshardError, extended
from reshard.format.names import tensor_name
from reshard.frameworks.adapter import Adapter, Prepared
from reshard.frameworks.select import select_adapter
from reshard.loading.choice import Choice, PassedOver, Rules, choose, words_of_refuge
from reshard.loading.loader import load_tensors
from reshard.loading.mapped import agree
from reshard.loading.opened import Opened, open_checkpoint, report_of, restore_parts
from reshard.loading.options import tell_options
from reshard.loading.planned import PlannedLoad, plan_load
from reshard.loading.report import RestoreReport
from reshard.loading.selection import Selection
from reshard.loading.strictness import Strictness
from reshard.planning.agreement import digest
from reshard.planning.mapping.mappers import Mapper
from reshard.sources.resolve import Resolved
from reshard.state import Kind, TensorKey
from reshard.storage import Storage

# What became of the run when a load fails before it reads.
_UNTOUCHED = "nothing was loaded; the run is as it was"

# Made here, since msgspec prepares a type when it first meets it: threads that first meet one together can end the process.
_CHOICES: msgspec.msgpack.Decoder[list[Choice]] = msgspec.msgpack.Decoder(list[Choice])

_logger = logging.getLogger("reshard")

_Error = TypeVar("_Error", bound=ReshardError)


@dataclass(frozen=True)
class Run:
    """What is to be filled.

    Attributes:
        model: as in `CheckpointManager.load`, and so are the others.
        optimizer: see there.
        parts: scheduler, data loader and extras, by name; None for those that aren't.
        restore_random: see there.
        reseed: see there.
    """

    model: Any
    optimizer: Any
    parts: Mapping[str, Any]
    restore_random: bool
    reseed: int | None


@dataclass(frozen=True)
class How:
    """How it is filled; the same on every rank.

    Attributes:
        strictness: what is done about misfits; None: what is usual for the kind of checkpoint.
        selection: which tensors it is about.
        balanced: whether ranks read for each other.
        memory_budget: bytes beyond the run's own state, on each rank.
        verify: whether what is read is held against digests.
        neighbours: whether ranks of one machine may read rows for each other.
        mapping: between the run's names and the checkpoint's; None when they are the same.
    """

    strictness: Strictness | None
    selection: Selection
    balanced: bool
    memory_budget: int
    verify: bool
    neighbours: bool
    mapping: Mapper | None = None


def load_run(storage: Storage, comm: Communicator, path: str, run: Run, rules: Rules, how: How) -> tuple[Resolved, RestoreReport] | None:
    """Load a checkpoint into a run. Collective.

    Args:
        storage: where it lies.
        comm: the ranks.
        path: a root or one iteration.
        run: what is filled.
        rules: which checkpoints may be taken.
        how: how it is filled.

    Returns:
        Where it was found, and what was done; None when there is none and that is fine.

    Raises:
        ReshardError: as `CheckpointManager.load`, on every rank the same.
    """
    started = time.perf_counter()
    passed: tuple[PassedOver, ...] = ()
    # What a checkpoint that turned out to be damaged has perhaps overwritten on this rank: the next one must fill all of it again.
    written: set[TensorKey] = set()
    look = cache(lambda: _look(run))
    if comm.rank:
        attempt(look)  # while rank 0 chooses

    def chosen(passed: tuple[PassedOver, ...]) -> list[Choice]:
        try:
            return from_first(
                comm,
                lambda: [one for one in (choose(storage, path, rules, balanced=how.balanced, passed_over=passed),) if one],
                list[Choice],
                what=_UNTOUCHED if not passed else "no older checkpoint was loaded",
            )
        finally:
            # Rank 0, too, and also where nothing is loaded: modules may change by it, which they must do on all ranks or on none.
            attempt(look)

    while True:
        choice: Choice | None = None
        try:
            found = chosen(passed)
            if not found:
                return None
            choice = found[0]
            _warn(comm, choice.passed_over[len(passed) :])
            if choice.passed_over and comm.rank == 0:
                _logger.warning("loading the older iteration %s instead: %s", choice.resolved.iteration, choice.resolved.directory)
            return choice.resolved, _fill(storage, comm, choice, run, look, rules, how, started, written)
        except CommunicationError:
            raise
        except DAMAGE as error:
            if choice is not None and choice.falls_back:
                passed = (*choice.passed_over, PassedOver(choice.resolved.iteration, choice.resolved.directory, "damaged", str(error)))
                _warn(comm, passed[-1:])
                continue
            raise _explained(storage, comm, path, error, passed, written) from error
        except ReshardError as error:
            if not passed:
                raise
            raise _with_damage(error, written) from error


def _look(run: Run) -> tuple[Adapter, Prepared]:
    """The run, to be filled from whatever checkpoint."""
    adapter = select_adapter(run.model, run.optimizer)
    return adapter, adapter.prepare(run.model, run.optimizer)


def _warn(comm: Communicator, passed: Sequence[PassedOver]) -> None:
    """Rank 0: say loudly what was not taken."""
    if comm.rank == 0:
        for one in passed:
            _logger.warning("%s was passed over: %s\n%s", one, one.path, one.details)


def _explained(
    storage: Storage, comm: Communicator, path: str, error: _Error, passed: Sequence[PassedOver], written: set[TensorKey]
) -> _Error:
    """Collective: the error of a damaged checkpoint, with what can be done about it."""
    if passed:
        return _with_damage(error, written)

    def words() -> str:
        told, problem = attempt(lambda: words_of_refuge(storage, path))
        return told if told is not None else f"can't be looked for: {problem}"

    told = from_first(comm, words, str, what=_UNTOUCHED)
    return extended(error, ("intact", told)) if told else error


def _with_damage(error: _Error, written: set[TensorKey]) -> _Error:
    if not written:
        return error
    return extended(error, ("besides", "a damaged checkpoint was read before; the run's values may be partly overwritten"))


def _fill(
    storage: Storage,
    comm: Communicator,
    choice: Choice,
    run: Run,
    look: Callable[[], tuple[Adapter, Prepared]],
    rules: Rules,
    how: How,
    started: float,
    written: set[TensorKey],
) -> RestoreReport:
    """Collective: fill the run from one checkpoint. What may have been overwritten is added to `written`, if another one may follow."""
    model, optimizer = run.model, run.optimizer
    strictness = how.strictness if how.strictness is not None else Strictness.default(is_weights=choice.relayed.is_weights)
    options = (
        f"{how.strictness}, {how.selection}, balanced={how.balanced}, memory_budget={how.memory_budget}, "
        f"verify={how.verify}, neighbours={how.neighbours}, on_corrupt={rules.on_corrupt}, skip_unhealthy={rules.skip_unhealthy}, "
        f"mapping={_short(how.mapping)}, {rules.prefixes}"
    )
    through = None if how.mapping is None else agree(how.mapping, model, comm, options, what=_UNTOUCHED)
    kinds = frozenset(kind for kind, given in ((Kind.MODEL, model), (Kind.OPTIMIZER, optimizer)) if given is not None)

    def prepare() -> tuple[Opened, PlannedLoad]:
        directory, relayed = choice.resolved.directory, choice.relayed
        opened = open_checkpoint(
            storage, comm, directory, relayed, *look(), how.selection, restore_random=run.restore_random, through=through
        )
        has_random = opened.rank_values is not None and "random" in opened.rank_values
        planned = plan_load(
            opened.destination.state,
            opened.description,
            opened.catalog,
            common=opened.common,
            headers=choice.relayed.headers(storage, opened.catalog, digests=how.verify),
            strictness=strictness,
            kinds=kinds,
            has_random=has_random,
            installs=opened.destination.installs or bool(opened.values) or has_random or run.reseed is not None,
            selection=opened.selection,
            opening=time.perf_counter() - started,
            balanced=how.balanced,
            memory_budget=how.memory_budget,
            verify=how.verify,
            neighbours=how.neighbours and comm.world_size > 1,
            told=opened.told,
            config=opened.config,
        )
        doors.callback(planned.close)
        if written:
            _check_refilled(written, _filled_by(planned), directory)
        return opened, planned

    with ExitStack() as doors:
        prepared, error = attempt(prepare)
        told = tell_options(comm, options, error, b"" if prepared is None else prepared[1].findings, what=_UNTOUCHED)
        assert prepared is not None  # whoever couldn't plan has raised
        opened, planned = prepared
        adapter = opened.adapter
        if choice.falls_back:
            written.update(_filled_by(planned))
        loaded = load_tensors(planned, told, comm, storage, started=started)
    began = time.perf_counter()

    def install() -> tuple[str, Any, tuple[str, ...]]:
        opened.destination.install(opened.selection.groups(opened.groups))
        values = {name: adapter.from_value(value) for name, value in opened.values.items()}
        notes = restore_parts(values, run.parts)
        random = "untouched"
        if loaded.all_have_random and opened.rank_values is not None and "random" in opened.rank_values:
            adapter.restore_random_states(adapter.from_value(opened.rank_values["random"]))
            random = "restored"
        elif run.reseed is not None:
            adapter.reseed(run.reseed)
            random = "reseeded"
        return random, values.get("extra"), notes

    if loaded.any_installs:
        installed, error = attempt(install)
        ended = time.perf_counter()
        mine = msgspec.msgpack.encode((ended - began, ended - started))
        payloads = settle(comm, error, mine, what="tensors are loaded, but the rest of the run's state is not")
        took = [msgspec.msgpack.decode(payload, type=tuple[float, float]) for payload in payloads]
        assert installed is not None  # settle raises when any rank has not installed it
    else:
        # All have told each other already that all went well; no rank has to be waited for once more.
        installed = install()
        took = [(0.0, loaded.seconds)] * comm.world_size
    random, extra_values, notes = installed
    for note in notes:
        _logger.warning("%s", note)
    report = report_of(choice.resolved, opened, loaded, took)
    return replace(report, random=random, extra=extra_values, notes=(*report.notes, *notes), passed_over=choice.passed_over)


def _short(mapping: Mapper | None) -> str:
    """A mapping in a few characters, different for different ones."""
    return "None" if mapping is None else f"{type(mapping).__name__} {digest(repr(mapping).encode()).hex()}"


def _filled_by(planned: PlannedLoad) -> set[TensorKey]:
    """What a load gives values to on this rank."""
    return set(planned.run_keys((*planned.plan.restored, *planned.filled)))


def _check_refilled(written: set[TensorKey], filled: set[TensorKey], directory: str) -> None:
    """See that nothing of a damaged checkpoint stays in the run."""
    left = sorted(tensor_name(key) for key in written - filled)
    if left:
        raise MismatchError(
            "an older checkpoint doesn't fill all that a damaged newer one may have overwritten",
            file=directory,
            tensor=", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else ""),
            fix="build the run anew, and load this checkpoint by its path",
        )
