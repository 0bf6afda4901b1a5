"""What a load does beside the tensors: a checkpoint opened as one rank sees it, its values given back, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.errors import MetadataError
from reshard.format.common import CommonInfo, read_common
from reshard.format.extra import groups_of, rank_values_in, values_in
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE, rank_extra_file, tensor_name
from reshard.frameworks.adapter import Adapter, Destination, Prepared
from reshard.loading.loader import TensorsLoaded
from reshard.loading.mapped import Through
from reshard.loading.report import RestoreReport
from reshard.loading.selection import Selection
from reshard.planning.agreement import RankDescription, describe, place_of
from reshard.planning.mapping.wanted import Told, run_groups
from reshard.sources.huggingface import CONFIG_FILE, decode_model_config
from reshard.sources.native import read_own_extra
from reshard.sources.relay import Relayed
from reshard.sources.resolve import Resolved
from reshard.state import ParameterGroup
from reshard.stateful import restore_values
from reshard.storage import Storage
from reshard.storage.storage import join


@dataclass(frozen=True)
class Opened:
    """A checkpoint as one rank sees it before it loads.

    Attributes:
        adapter: of the run's framework.
        catalog: what the checkpoint holds.
        common: its training information, None when it has none.
        values: its global values.
        groups: its hyper-parameters.
        destination: this rank's state, prepared to be filled.
        description: of that state.
        rank_values: the values of this rank's own place; None when there are none, or when they are of another place.
        selection: which tensors are loaded.
        told: the catalog in strands, where the load goes through a mapping; then `groups` are the run's.
        config: the model's description, that of the folder or what the run saved as `config` among its extras; None when there is none.
    """

    adapter: Adapter
    catalog: Catalog
    common: CommonInfo | None
    values: Mapping[str, Any]
    groups: tuple[ParameterGroup, ...]
    destination: Destination
    description: RankDescription
    rank_values: Mapping[str, Any] | None
    selection: Selection
    told: Told | None = None
    config: Mapping[str, Any] | None = None


def open_checkpoint(
    storage: Storage,
    comm: Communicator,
    directory: str,
    relayed: Relayed,
    adapter: Adapter,
    prepared: Prepared,
    selection: Selection,
    *,
    restore_random: bool,
    through: Through | None = None,
) -> Opened:
    """Read all of a checkpoint but its tensors, and prepare the run to be filled. Local.

    Args:
        storage: where it lies.
        comm: gives this rank's number and the number of ranks.
        directory: of the checkpoint.
        relayed: what one rank read for all.
        adapter: of the run's framework.
        prepared: the run.
        selection: which tensors are loaded.
        restore_random: whether this rank's random states are wanted.
        through: the mapping; None when run and checkpoint have the same names.

    Raises:
        DamagedCheckpointError: the checkpoint isn't what it promises.
        ReshardError: as `Prepared.destination`.
    """
    catalog = relayed.catalog
    if catalog is None:
        raise MetadataError("rank 0's index can't be understood", file=directory, fix="run the same version of reshard on every rank")
    small = relayed.storage(storage)
    common = read_common(small, join(directory, COMMON_FILE))
    global_file = join(directory, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)
    tree = read_own_extra(small, directory, GLOBAL_EXTRA_FILE, relayed.seal)
    values = values_in(tree, global_file)
    config = _config_of(relayed, values)
    groups = groups_of(tree, global_file)
    through = None if through is None else through.with_stored(config)
    told = None if through is None else through.tell(catalog)
    named = catalog if told is None else told.as_run(catalog)
    groups = groups if told is None else run_groups(groups, told)
    destination = prepared.destination(selection.catalog(named), selection.groups(groups))
    description = describe(destination.state, comm.rank)
    mine = None
    if restore_random:
        name = rank_extra_file(comm.rank)
        saved = read_own_extra(storage, directory, name, relayed.seal)
        file = join(directory, EXTRA_DIRECTORY, name)
        mine = rank_values_in(saved, comm.world_size, place_of(description), file)
        if mine is None and saved is not None and through is not None:
            # Saved through the same mapping, the place has the checkpoint's names.
            for same in (True, False):
                place = place_of(through.describe(destination.state, catalog, comm.rank, is_same_everywhere=same))
                mine = mine or rank_values_in(saved, comm.world_size, place, file)
        mine = None if mine is None else _without_foreign_generators(mine, adapter.framework)
    return Opened(adapter, catalog, common, values, groups, destination, description, mine, selection, told, config)


def _config_of(relayed: Relayed, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if relayed.config is not None:
        return decode_model_config(relayed.config, join(relayed.directory, CONFIG_FILE))
    extra = values.get("extra")
    config = extra.get("config") if isinstance(extra, Mapping) else None
    return config if isinstance(config, Mapping) else None


def _without_foreign_generators(values: Mapping[str, Any], framework: str) -> Mapping[str, Any]:
    """A rank's values without the random states of a run in another framework, which has other generators."""
    states = values.get("random")
    # Without a framework the host's generators are all that there are, and every run has those.
    if framework == "numpy" or not isinstance(states, Mapping) or framework in states:
        return values
    return {name: value for name, value in values.items() if name != "random"}


def restore_parts(values: Mapping[str, Any], parts: Mapping[str, Any]) -> tuple[str, ...]:
    """Give each part the values that were saved for it; the notes say what was not saved."""
    notes = []
    for name, part in parts.items():
        if part is None:
            continue
        if name in values:
            restore_values(part, values[name], name)
        else:
            notes.append(f"the checkpoint has no values for the {name}; it stays as it is")
    return tuple(notes)


def report_of(resolved: Resolved, opened: Opened, loaded: TensorsLoaded, took: Sequence[tuple[float, float]]) -> RestoreReport:
    """The report; `took` has every rank's seconds for the installation and for all."""
    misfits = loaded.misfits
    return RestoreReport(
        directory=resolved.directory,
        iteration=resolved.iteration,
        restored=loaded.restored,
        filled=loaded.filled,
        missing=tuple(tensor_name(key) for key in misfits.missing),
        unexpected=tuple(tensor_name(key) for key in misfits.unexpected),
        mismatched=tuple(tensor_name(mismatch.key) for mismatch in misfits.mismatched),
        random="untouched",
        ranks=tuple(
            replace(rank, seconds={**rank.seconds, "install": seconds}) for rank, (seconds, _) in zip(loaded.ranks, took, strict=True)
        ),
        common=opened.common,
        notes=(*resolved.notes, *opened.catalog.notes, *loaded.notes),
        seconds=max(whole for _, whole in took),
        cast=loaded.cast,
        skipped=loaded.skipped,
    )
