"""Two spellings of saving and loading, the older fields and the newer `checkpoint:` section, become one configuration."""

from __future__ import annotations

from typing import Any

from reshard.config.fields import CheckpointMonitor, CheckpointSection, RunConfig

# The newer name of each field, and the older one that it stands for.
_OF_THE_RUN = {"load_path": "load_checkpoint", "load_balanced": "balanced_load", "no_load_optim": "no_load_optim"}
_OF_THE_MONITOR = {
    "save_path": "directory",
    "save_max": "keep_checkpoint_max",
    "save_interleaved_steps": "save_checkpoint_steps",
    "no_save_optim": "save_optimizer",
    "remove_redundancy": "remove_redundancy",
    "save_remove_redundancy": "remove_redundancy",
    "async_save": "async_save",
    "prefix": "prefix",
}

# Taken, so that a configuration can stay as it is, and without an effect: why.
_NOT_NEEDED = {
    "auto_trans_ckpt": "every load reshards",
    "src_strategy_path_or_dir": "a checkpoint knows its own strategy",
    "checkpoint.reshard_worker_num": "reads are spread over threads by themselves",
    "checkpoint.load_worker_number": "reads are spread over threads by themselves",
    "checkpoint.save_global_layout_cache": "ranks tell each other their layouts once, and again when they change",
}


def unified(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """The same configuration in the older fields, and what the user should hear.

    The rule: what the `checkpoint:` section gives counts; what it leaves out is as the older fields say, or their defaults.
    """
    given = [name for name in _NOT_NEEDED if _given(run, name) is not None and not _is_read(run, name)]
    notes = [f"{name} is not needed: {_NOT_NEEDED[name]}" for name in given]
    section = run.checkpoint
    if section is None:
        return run, notes
    monitor = run.monitor
    changed, told = _taken_over(section, run, _OF_THE_RUN, "")
    notes += told
    if section.no_load_optim is False and not run.resume_training and changed.get("load_checkpoint", run.load_checkpoint):
        # There, whether the optimizer is loaded is whether the run is resumed; left out, it is as resume_training says.
        changed["resume_training"] = True
        notes.append("checkpoint.no_load_optim: False continues the run of the checkpoint, as resume_training: True does")
    saved, told = _taken_over(section, monitor, _OF_THE_MONITOR, "CheckpointMonitor.")
    notes += told
    if section.enable_save is False:
        saved["save_checkpoint_steps"] = None
    base = monitor if monitor is not None else CheckpointMonitor(type="CheckpointMonitor")
    others = [callback for callback in run.callbacks if not isinstance(callback, CheckpointMonitor)]
    changed["callbacks"] = [*others, base.model_copy(update=saved)]
    if run.use_legacy_format:
        notes.append("use_legacy_format: True is turned off by the section checkpoint, as in MindSpore Transformers")
        changed["use_legacy_format"] = False
    elif run.use_legacy_format is None:
        changed["use_legacy_format"] = False
    return run.model_copy(update=changed), notes


def _is_read(run: RunConfig, name: str) -> bool:
    """Whether a field is needed all the same: Checkpoint 1.0 doesn't say how its ranks shared the work."""
    return name == "src_strategy_path_or_dir" and bool(run.use_legacy_format) and run.checkpoint is None and bool(run.load_checkpoint)


def _taken_over(section: CheckpointSection, older: Any, names: dict[str, str], where: str) -> tuple[dict[str, Any], list[str]]:
    """What the section gives under the older names, and a warning for each of which the older field says something else."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    for newer, name in names.items():
        value = getattr(section, newer)
        if value is None:
            continue
        if newer == "no_save_optim":
            value = not value
        if newer == "save_path":
            value = value or None
        if older is not None and name in older.model_fields_set and getattr(older, name) != value:
            notes.append(f"{where}{name} and checkpoint.{newer} are both given: checkpoint.{newer} counts ({value!r})")
        values[name] = value
    return values, notes


def _given(run: RunConfig, name: str) -> Any:
    place: Any = run
    for part in name.split("."):
        place = getattr(place, part) if place is not None else None
    return place
