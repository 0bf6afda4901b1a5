"""What a load would do, before it is done and without a run: what each rank would move, and what would make it fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from reshard.catalog import Catalog, Place
from reshard.checkpoint import Checkpoint
from reshard.errors import DataFileError, MismatchError, ReshardError, UsageError
from reshard.format.names import EXTRA_DIRECTORY, rank_extra_file, tensor_name
from reshard.format.seal import Seal
from reshard.geometry import DType
from reshard.geometry.casts import can_cast
from reshard.loading.budget import check_budget
from reshard.loading.selection import Selection
from reshard.loading.strictness import Misfits, Strictness, judge
from reshard.planning.forecast import Fitting, JobTraffic, Match, forecast_balanced, forecast_direct, match_tensors
from reshard.planning.naming import understand
from reshard.planning.placement import GlobalTensor, Placement, WantedTensor, lay_out
from reshard.planning.strategy import Strategy
from reshard.state import Kind
from reshard.storage import Storage
from reshard.storage.storage import join
from reshard.verification.glance import missing_files

# Headers are read one after the other, and so many parts of tensors looked up in them: it takes some seconds. A load has its many ranks for
# more than that; one process would take minutes.
_MOST_HEADERS = 2048
_MOST_PARTS = 1_000_000

# An error or a note names so many.
_NAMES_SHOWN = 3

_RESTORE = "restore the files from a copy, or resume from another iteration"


@dataclass(frozen=True, eq=False)
class Outlook:
    """What a load would do.

    Attributes:
        checkpoint: what would be loaded.
        placement: how the tensors that the load is about would lie on the ranks.
        match: what the run would find of them in the checkpoint.
        traffic: what each rank would move.
        skipped: how many tensors the selection leaves out.
        failures: what would make the load fail; nothing if it would work, as far as this can be seen.
        warnings: what it would warn of.
        notes: what else there is to know.
    """

    checkpoint: Checkpoint
    placement: Placement
    match: Match
    traffic: JobTraffic
    skipped: int
    failures: tuple[ReshardError, ...]
    warnings: tuple[ReshardError, ...]
    notes: tuple[str, ...]


def foresee(
    checkpoint: Checkpoint,
    storage: Storage,
    strategy: Strategy,
    *,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    optimizer: bool = True,
    model_of: Catalog | None = None,
    dtype: DType | None = None,
    strictness: Strictness = Strictness(),  # noqa: B008 - frozen
    balanced: bool = False,
    memory_budget: int | None = None,
) -> Outlook:
    """What a load of a checkpoint under a strategy would do. No tensor's data is read.

    Args:
        checkpoint: what would be loaded.
        storage: where it lies.
        strategy: of the run.
        selection: the tensors that the load is about.
        optimizer: whether the run loads its optimizer too.
        model_of: another checkpoint, whose tensors are the run's; None when the run holds what the checkpoint holds.
        dtype: the type of the run's floating model tensors; None for the type that they are stored in.
        strictness: what to do about tensors that don't fit.
        balanced: whether ranks read for each other.
        memory_budget: bytes for a balanced load; None for the usual ones.

    Raises:
        UsageError: a pattern that means nothing, a rule that a tensor can't follow, or too small a budget.
    """
    if memory_budget is not None:
        check_budget(memory_budget)
    catalog = checkpoint.catalog
    kinds = (Kind.MODEL, Kind.OPTIMIZER) if optimizer else (Kind.MODEL,)
    wanted = [_wanted(tensor, dtype) for key, tensor in (model_of or catalog).tensors.items() if key.kind in kinds]
    _check_rules(strategy, wanted)
    idle = selection.idle([*catalog.tensors, *(tensor.key for tensor in wanted)])
    selection.check(idle, catalog.directory)

    whole = lay_out(strategy, wanted)
    placement = whole if selection.is_all else whole.only(selection.takes)
    stored = {key: tensor for key, tensor in catalog.tensors.items() if key.kind in kinds}
    chosen = stored if selection.is_all else {key: tensor for key, tensor in stored.items() if selection.takes(key)}
    found = match_tensors(placement, Catalog(catalog.directory, chosen), strictness.casts)
    traffic = (forecast_balanced if balanced else forecast_direct)(placement, found.fitting)

    failures, warnings = _judged(found, strictness, catalog, optimizer=optimizer and model_of is None)
    faults, notes = _look_at_files(checkpoint, storage, found.fitting, traffic.file_names, strategy.world_size)
    skipped = {tensor.key for tensor in whole.tensors} | set(stored)
    skipped -= {tensor.key for tensor in placement.tensors} | set(chosen)
    return Outlook(
        checkpoint,
        placement,
        found,
        traffic,
        len(skipped),
        (*failures, *faults),
        tuple(warnings),
        (
            *checkpoint.notes,
            *(f"exclude: {pattern!r} means no tensor of the checkpoint or the run" for pattern in idle),
            *_notes_on_names(strategy, wanted),
            *notes,
        ),
    )


def _wanted(tensor: GlobalTensor, dtype: DType | None) -> WantedTensor:
    is_of_dtype = dtype is not None and tensor.key.kind is Kind.MODEL and can_cast(tensor.dtype.name, dtype.name)
    return WantedTensor(tensor.key, dtype if is_of_dtype and dtype is not None else tensor.dtype, tensor.global_shape)


def _check_rules(strategy: Strategy, wanted: Sequence[GlobalTensor]) -> None:
    parameters = dict.fromkeys(tensor.key.parameter for tensor in wanted)
    for rule in strategy.splits:
        if not any(map(rule.means, parameters)):
            raise UsageError(
                "a rule that means no parameter of the run",
                field="split",
                found=rule.text,
                fix="reshard show prints the names that the checkpoint has",
            )


def _judged(found: Match, strictness: Strictness, catalog: Catalog, *, optimizer: bool) -> tuple[list[ReshardError], list[ReshardError]]:
    has_optimizer = any(key.kind is Kind.OPTIMIZER for key in catalog.tensors)
    failures: list[ReshardError] = []
    warnings: list[ReshardError] = []
    if optimizer and not has_optimizer:
        failures.append(
            MismatchError(
                "the checkpoint has no optimizer state, and the run wants to load one",
                file=catalog.directory,
                found="model tensors only",
                fix="load the weights only (--no-optimizer)",
            )
        )
    misfits = Misfits(found.missing, found.unexpected, found.mismatched)
    for action, error in judge(strictness, misfits, directory=catalog.directory, has_optimizer=has_optimizer):
        if action != "ignore":
            (warnings if action == "warn" else failures).append(error)
    return failures, warnings


def _look_at_files(
    checkpoint: Checkpoint, storage: Storage, fitting: Sequence[Fitting], files: Sequence[str], world_size: int
) -> tuple[list[ReshardError], list[str]]:
    """What is wrong with the files that would be read, and what wasn't looked at."""
    catalog = checkpoint.catalog
    faults: list[ReshardError] = []
    try:
        _ = checkpoint.groups
    except ReshardError as error:
        faults.append(error)
    sizes = {entry.name: entry.size for entry in storage.list(catalog.directory) if not entry.is_directory}
    promised = _promised_bytes(catalog)
    missing = [file for file in files if file not in sizes]
    short = [file for file in files if file in sizes and sizes[file] < promised[file]]
    for wrong, words in ((missing, "missing"), (short, "truncated")):
        if wrong:
            count = f"{len(wrong)} of {len(files)} data files {'is' if len(wrong) == 1 else 'are'} {words}"
            faults.append(DataFileError(count, file=catalog.directory, found=_some(wrong), fix=_RESTORE))
    whole = set(files) - {*missing, *short}
    if checkpoint.seal is not None:
        # Those of tensors that are of another size, too; and each rank reads the extras of its own number.
        extras = (join(EXTRA_DIRECTORY, rank_extra_file(rank)) for rank in range(world_size))
        sealed = {name: file for name in (*whole, *extras) if (file := checkpoint.seal.files.get(name)) is not None}
        if storage.stat(below := join(catalog.directory, EXTRA_DIRECTORY)) is not None:
            sizes |= {join(EXTRA_DIRECTORY, entry.name): entry.size for entry in storage.list(below)}
        problem = missing_files(Seal(sealed), sizes)
        if problem is not None:
            faults.append(DataFileError(problem, file=catalog.directory, fix=_RESTORE))
        whole -= {name for name, file in sealed.items() if sizes.get(name) != file.size}
    parts = sum(len(part.tensors) * len(part.arrangement.pieces) for part in fitting)
    if len(whole) > _MOST_HEADERS or (whole and parts > _MOST_PARTS):
        return faults, [f"{len(whole)} data files were looked at by their sizes only, not by their headers"]
    headers = checkpoint.headers
    broken: set[str] = set()
    for place, dtype, shape in _places(fitting, whole):
        if place.file not in broken:
            try:
                headers.entry(place, dtype, shape)
            except ReshardError as error:
                broken.add(place.file)
                faults.append(error)
    return faults, []


def _promised_bytes(catalog: Catalog) -> dict[str, int]:
    """The bytes of data that each file must have at least."""
    counts: dict[int, int] = {}
    arrangements = {id(tensor.arrangement): tensor.arrangement for tensor in catalog.tensors.values()}
    for tensor in catalog.tensors.values():
        counts[id(tensor.arrangement)] = counts.get(id(tensor.arrangement), 0) + 1
    found: dict[str, int] = {}
    for identity, arrangement in arrangements.items():
        for piece in arrangement.pieces:
            nbytes = piece.region.size * arrangement.dtype.itemsize * counts[identity]
            for site in piece.sites:
                found[site.file] = found.get(site.file, 0) + nbytes
    return found


def _places(fitting: Iterable[Fitting], files: set[str]) -> Iterator[tuple[Place, DType, tuple[int, ...]]]:
    """What some files must hold of the tensors that would be restored."""
    for arrangement, _, tensors in fitting:
        for piece in arrangement.pieces:
            for site in piece.sites:
                if site.file in files:
                    for tensor in tensors:
                        yield Place(site.file, tensor.name + site.suffix, site.rank), arrangement.dtype, piece.region.shape


def _notes_on_names(strategy: Strategy, wanted: Sequence[GlobalTensor]) -> Iterator[str]:
    """Where names don't say how a strategy lays tensors out."""
    model = [(understand(tensor.key.parameter), tensor) for tensor in wanted if tensor.key.kind is Kind.MODEL]
    if strategy.tp > 1:
        unknown = [t for name, t in model if name.role is None and len(t.global_shape) > 1 and strategy.rule(t.key.parameter) is None]
        if unknown:
            yield (
                f"tp splits none of {len(unknown)} tensor{'' if len(unknown) == 1 else 's'} whose names aren't known "
                f"({_some([tensor_name(tensor.key) for tensor in unknown])}); --split 'PATTERN=tp:DIMENSION' says how it does"
            )
    layers = {(name.stack, name.layer) for name, _ in model if name.layer is not None}
    most = max((sum(stack == other for other, _ in layers) for stack, _ in layers), default=0)
    if most < strategy.pp and strategy.pp > 1:
        yield f"{strategy.pp} pipeline stages share {most} layers: some hold none"
    if strategy.ep > 1 and not any(name.is_of_experts for name, _ in model) and not any("ep" in r.dimensions for r in strategy.splits):
        yield "ep splits nothing: no tensor's name says that it belongs to experts"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _NAMES_SHOWN else "")
