"""Export the model of a run as it is now: it is saved beside the folder, each region once, and exported from there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reshard.comm import Communicator
from reshard.comm.together import attempt
from reshard.export.folder import temporary_of
from reshard.export.job import ExportOptions, ExportReport, run_export
from reshard.export.model_config import config_of_model
from reshard.format.common import CommonInfo
from reshard.frameworks.select import select_adapter
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.state import State
from reshard.storage import Storage


def export_model(storage: Storage, comm: Communicator, folder: str, model: Any, options: ExportOptions) -> ExportReport:
    """Export what the ranks of a run hold. Collective; the disk must have room for the model twice.

    Args:
        storage: where the folder lies.
        comm: the ranks.
        folder: the folder to make.
        model: this rank's.
        options: how; a configuration in them comes before the model's own.

    Raises:
        ReshardError: as `export_checkpoint` and a save, on every rank the same.
    """
    root = f"{temporary_of(folder)}-run"

    def capture() -> State:
        config = config_of_model(model)
        captured = select_adapter(model, None).capture(model, None, global_step=None)
        return replace(captured, values={} if config is None else {"extra": {"config": config}})

    state, error = attempt(capture)
    try:
        with Saver(storage, comm, root, SaveOptions(keep_checkpoint_max=None, save_optimizer=False, remove_redundancy=True)) as saver:
            saver.save(0, state if state is not None else State(), CommonInfo(), error)
            return run_export(storage, comm, root, folder, options)
    finally:
        if comm.rank == 0:
            attempt(lambda: storage.remove_tree(root))
