"""A document becomes a configuration, or an error that says which field is wrong and what is allowed."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from reshard.config.document import Document, FieldPath, apply_overrides, dotted, read_document
from reshard.config.fields import CheckpointMonitor, LossMonitor, RunConfig, sections_in
from reshard.config.framework_check import check_framework
from reshard.config.model_check import check_model
from reshard.config.spellings import unified
from reshard.errors import ConfigError

_logger = logging.getLogger("reshard")

_CALLBACKS: dict[str, type[BaseModel]] = {"CheckpointMonitor": CheckpointMonitor, "MFLossMonitor": LossMonitor}

# pydantic's names of what is wrong, in the words of a YAML file.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "True or False",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a section with fields of its own",
    "model_attributes_type": "a section with fields of its own",
    "dict_type": "a section with fields of its own",
    "union_tag_not_found": "an entry with a `type`",
    "finite_number": "a finite number",
    "invalid_key": "a name, as text",
}


@dataclass(frozen=True)
class Configuration:
    """What was read.

    Attributes:
        run: the validated fields.
        notes: what the user should hear: what an absent field means, what was converted.
        file: where it was read.
    """

    run: RunConfig
    notes: tuple[str, ...]
    file: str


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Configuration:
    """Read and validate a training configuration.

    Args:
        path: a YAML file.
        overrides: `dotted.name=value`, applied after reading.

    Raises:
        ConfigError: naming the field, what was given and what is allowed.
    """
    return validate(apply_overrides(read_document(path), overrides))


def from_yaml(path: str | Path) -> RunConfig:
    """The fields of a configuration file, in either spelling; what the user should hear is logged as warnings.

    Args:
        path: a YAML file.

    Raises:
        ConfigError: as `read_config`.
    """
    configuration = read_config(path)
    for note in configuration.notes:
        _logger.warning("%s: %s", configuration.file, note)
    return configuration.run


def validate(document: Document) -> Configuration:
    """Check every field of a document.

    Raises:
        ConfigError: as `read_config`.
    """
    try:
        run = RunConfig.model_validate(document.data)
    except ValidationError as error:
        raise _config_error(error, document) from error
    run, notes = unified(run)
    _check_versions(run, document, notes)
    _check_sources(run, document, notes)
    check_model(run, document)
    check_framework(run, document)
    _check_schedule(run, document)
    _check_callbacks(run, document)
    return Configuration(run, tuple(notes), document.file)


def _config_error(error: ValidationError, document: Document) -> ConfigError:
    problems = error.errors()
    # An unknown field first: the field it was meant to be is often "missing" further down.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first, rest = problems[0], problems[1:]
    path, section = _place(first["loc"])
    others = sorted({dotted(_place(problem["loc"])[0]) for problem in rest} - {dotted(path)})
    fix = f"then look at {', '.join(others)}, which {'is' if len(others) == 1 else 'are'} wrong too" if others else None
    kind, given, context = first["type"], first["input"], first.get("ctx", {})
    name = dotted(path)
    if kind == "extra_forbidden":
        known = sorted(section.model_fields)
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        elsewhere = [] if near else _same_name_elsewhere(str(path[-1]))
        nearest = f"did you mean {dotted((*path[:-1], near[0]))}?" if near else f"did you mean {elsewhere[0]}?" if elsewhere else None
        return ConfigError(
            f"{name} is not a field of the configuration" + (f"; {nearest}" if nearest else ""),
            file=document.where(path),
            field=name,
            found=given,
            expected=f"one of: {', '.join(known)}",
            fix=fix,
        )
    if kind == "missing":
        return ConfigError(f"{name} is missing", file=document.where(path), field=name, expected=_meaning(section, path), fix=fix)
    if kind == "union_tag_invalid":
        name = f"{name}.type"
        given = context.get("tag", given)
        near = difflib.get_close_matches(str(given), _CALLBACKS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return ConfigError(
            f"there is no callback {given!r}{hint}",
            file=document.where(path),
            field=name,
            found=given,
            expected=f"one of: {', '.join(_CALLBACKS)}",
            fix=fix,
        )
    wrong_type = kind in _EXPECTED
    what = f"{name} has the wrong type" if wrong_type else f"{name} has a value that is not allowed"
    found = f"{given!r} ({_yaml_type(given)})" if wrong_type else repr(given)
    return ConfigError(
        what, file=document.where(path), field=name, found=found, expected=_allowed(kind, context, first["msg"], section, path), fix=fix
    )


def _place(location: Sequence[int | str]) -> tuple[FieldPath, type[BaseModel]]:
    """The path of a field without pydantic's own parts, and the section that it stands in."""
    path: list[Any] = []
    section: type[BaseModel] = RunConfig
    for depth, part in enumerate(location):
        if len(path) == 2 and path[0] == "callbacks" and part in _CALLBACKS and depth == 2:
            section = _CALLBACKS[str(part)]
            continue
        path.append(part)
        if depth < len(location) - 1 and part in section.model_fields:
            # Of several kinds, as callbacks are, the next part says which.
            nested = list(sections_in(section.model_fields[str(part)].annotation))
            section = nested[0] if len(nested) == 1 else section
    return tuple(path), section


def _allowed(kind: str, context: dict[str, Any], message: str, section: type[BaseModel], path: FieldPath) -> str:
    if kind in _EXPECTED:
        allowed = _EXPECTED[kind]
        field = section.model_fields.get(str(path[-1]))
        return f"{allowed} or null" if field is not None and _takes_null(field.annotation) else allowed
    if kind == "literal_error":
        return f"one of: {context.get('expected', message)}"
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for key, word in bounds.items():
        if key in context:
            return f"{word} {context[key]}"
    if kind in ("too_short", "too_long"):
        return f"{context.get('min_length', context.get('max_length'))} entries"
    return message


def _takes_null(annotation: Any) -> bool:
    return type(None) in getattr(annotation, "__args__", ())


def _meaning(section: type[BaseModel], path: FieldPath) -> str | None:
    field = section.model_fields.get(str(path[-1]))
    return None if field is None else field.description


def _same_name_elsewhere(name: str) -> list[str]:
    found = []
    for outer, field in RunConfig.model_fields.items():
        annotation = field.annotation
        if outer == name:
            found.append(outer)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and name in annotation.model_fields:
            found.append(f"{outer}.{name}")
    return found


def _yaml_type(value: Any) -> str:
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a section",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _check_versions(run: RunConfig, document: Document, notes: list[str]) -> None:
    if run.use_legacy_format is None:
        notes.append("use_legacy_format is not given: checkpoints are Checkpoint 2.0")
    elif run.use_legacy_format:
        notes.append("use_legacy_format: True: load_checkpoint may name files of Checkpoint 1.0; what is saved is Checkpoint 2.0")
    # Files of Checkpoint 1.0 say themselves of which kind they are.
    given = [] if run.use_legacy_format else [("load_ckpt_format", run.load_ckpt_format)]
    for index, callback in enumerate(run.callbacks):
        if isinstance(callback, CheckpointMonitor):
            given.append((f"callbacks[{index}].checkpoint_format", callback.checkpoint_format))
    notes += [
        f"{name} {value!r} was converted to 'safetensors', the only format of Checkpoint 2.0"
        for name, value in given
        if value != "safetensors"
    ]


def _check_sources(run: RunConfig, document: Document, notes: list[str]) -> None:
    """What a run begins with."""
    if run.pretrained_model_dir and run.load_checkpoint:
        notes.append(f"pretrained_model_dir is ignored: load_checkpoint is set ({run.load_checkpoint})")
    if run.resume_training and not run.load_checkpoint:
        only_weights = f"; pretrained_model_dir, {run.pretrained_model_dir}, has weights only" if run.pretrained_model_dir else ""
        raise ConfigError(
            f"resume_training needs a checkpoint to continue from{only_weights}",
            file=document.where(("resume_training",)),
            field="resume_training",
            found="True without load_checkpoint",
            fix="set load_checkpoint, or set resume: auto to continue from the newest checkpoint of the run's own root",
        )


def _check_schedule(run: RunConfig, document: Document) -> None:
    schedule = run.lr_schedule
    if schedule.total_steps == 0:
        raise ConfigError(
            "the decay has no steps",
            file=document.where(("lr_schedule", "total_steps")),
            field="lr_schedule.total_steps",
            found=0,
            expected="-1 (the run's last step) or at least 1",
        )
    if schedule.total_steps > 0 and schedule.warmup_steps > schedule.total_steps:
        raise ConfigError(
            "the warm-up is longer than the schedule",
            file=document.where(("lr_schedule", "warmup_steps")),
            field="lr_schedule.warmup_steps",
            found=schedule.warmup_steps,
            expected=f"at most lr_schedule.total_steps, {schedule.total_steps}",
        )


def _check_callbacks(run: RunConfig, document: Document) -> None:
    kinds = [callback.type for callback in run.callbacks]
    for index, kind in enumerate(kinds):
        if kind in kinds[:index]:
            raise ConfigError(
                f"there are two callbacks of type {kind}",
                file=document.where(("callbacks", index)),
                field=f"callbacks[{index}]",
                fix="keep one of them",
            )
    if run.resume == "auto" and run.monitor is None:
        raise ConfigError(
            "resume: auto looks for checkpoints in the root of the CheckpointMonitor, and there is none",
            file=document.where(("resume",)),
            field="resume",
            found="auto",
            fix="add a callback of type CheckpointMonitor",
        )
    for index, callback in enumerate(run.callbacks):
        if isinstance(callback, CheckpointMonitor) and "/" in callback.prefix:
            raise ConfigError(
                "a prefix is part of a file's name",
                file=document.where(("callbacks", index, "prefix")),
                field=f"callbacks[{index}].prefix",
                found=callback.prefix,
                expected="no slash; directory says where files go",
            )
