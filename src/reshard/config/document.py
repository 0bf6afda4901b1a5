"""A YAML file as plain data, with the line of every field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reshard.errors import ConfigError

FieldPath = tuple[Any, ...]

# No field lies deeper; a section that contains itself does.
_DEEPEST = 20


@dataclass(frozen=True)
class Document:
    """A configuration as it was written.

    Attributes:
        file: where it was read.
        data: the top-level mapping.
        lines: the line (from 1) of the field at a path of keys and list indices.
        overridden: the paths of fields that were replaced from outside.
    """

    file: str
    data: dict[str, Any]
    lines: Mapping[FieldPath, int] = field(default_factory=dict)
    overridden: frozenset[FieldPath] = frozenset()

    def where(self, path: FieldPath) -> str:
        """Where a field was given: by an override, or on a line of the file (that of the nearest section around it)."""
        if any(path[: len(given)] == given for given in self.overridden):
            return f"--set {'.'.join(map(str, path))}"
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines[path]}" if path in self.lines else self.file


class _Loader(yaml.SafeLoader):
    """YAML's plain types, with the numbers that people write."""


# YAML 1.1 takes `1e-3` for a string since it has no point; everybody else takes it for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_document(path: str | Path) -> Document:
    """Read a YAML file.

    Raises:
        ConfigError: no such file, no YAML, a field given twice, or something else than a mapping at the top.
    """
    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the configuration can't be read: {reason}", file=file, fix="give the path of a YAML file") from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            # A file that was cut off, not a wish for a run of defaults: that is `{}`.
            raise ConfigError(
                "the configuration is empty", file=file, found=f"{len(text)} characters, no field", expected="lines like `seed: 1`"
            )
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                "the configuration is not a mapping of fields",
                file=f"{file}:{node.start_mark.line + 1}",
                found=type(node.value).__name__,
                expected="lines like `seed: 1`",
            )
        lines: dict[FieldPath, int] = {}
        _note_lines(node, (), lines, file)
        return Document(file, loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = file if mark is None else f"{file}:{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            "the configuration is not YAML", file=place, found=problem, fix="mind the indentation, and quote text that has a colon"
        ) from error
    finally:
        loader.dispose()


def _note_lines(node: yaml.Node, path: FieldPath, lines: dict[FieldPath, int], file: str) -> None:
    if len(path) > _DEEPEST:
        raise ConfigError(
            "the configuration is nested too deeply",
            file=f"{file}:{node.start_mark.line + 1}",
            fix="is an alias (*name) inside of its anchor (&name)?",
        )
    if isinstance(node, yaml.MappingNode):
        own: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("the name of a field is text", file=f"{file}:{line}", found="a list or a section")
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in own:
                raise ConfigError(
                    "a field is given twice",
                    file=f"{file}:{line}",
                    field=dotted((*path, key.value)),
                    found=f"also on line {own[key.value]}",
                    fix="keep one of them",
                )
            own[key.value] = lines[(*path, key.value)] = line
            _note_lines(value, (*path, key.value), lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _note_lines(value, (*path, index), lines, file)


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The same document with fields replaced.

    Args:
        document: what was read.
        overrides: `dotted.name=value`, the value in YAML; list entries by index (`callbacks.0.prefix=run`).

    Raises:
        ConfigError: no `=`, a value that isn't YAML, or a way through something that has no fields.
    """
    data = _copied(document.data)
    overridden: set[FieldPath] = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(
                "an override can't be understood",
                field="--set",
                found=override,
                expected="dotted.name=value, as in --set runner_config.max_steps=40",
            )
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number format
        except yaml.YAMLError as error:
            raise ConfigError("the value of an override is not YAML", field=name, found=text, fix="quote it") from error
        place: Any = data
        keys = name.split(".")
        path: list[Any] = []
        for depth, key in enumerate(keys):
            path.append(int(key) if isinstance(place, list) and key.isdigit() else key)
            last = depth == len(keys) - 1
            if isinstance(place, list) and key.isdigit() and int(key) < len(place):
                if last:
                    place[int(key)] = value
                else:
                    place = place[int(key)]
            elif isinstance(place, dict):
                if last:
                    place[key] = value
                else:
                    if place.get(key) is None:
                        place[key] = {}
                    place = place[key]
            else:
                found = f"a list of {len(place)}" if isinstance(place, list) else repr(place)
                raise ConfigError(
                    "an override leads through something that has no such field", field=name, found=f"{'.'.join(keys[:depth])} is {found}"
                )
        overridden.add(tuple(path))
    return Document(document.file, data, document.lines, frozenset(overridden))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def dotted(path: FieldPath) -> str:
    """A path of keys and indices as a user writes it: `callbacks[0].prefix`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
