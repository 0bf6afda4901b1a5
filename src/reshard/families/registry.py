"""Which families there are: those that come with this package, and those of entry points in the group `reshard.families`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from reshard.errors import UsageError
from reshard.families import deepseek_v3, llama, mixtral, qwen3, qwen3_moe
from reshard.planning.mapping.mappers import Family, Mapper, RuleMapping, composition
from reshard.state import State

GROUP = "reshard.families"
"""The group of entry points whose objects are families: `[project.entry-points."reshard.families"] mine = "my_package:FAMILY"`."""

BUILT_IN: tuple[Family, ...] = (
    qwen3.QWEN3,
    qwen3_moe.QWEN3_MOE,
    llama.LLAMA,
    llama.QWEN2,
    llama.MISTRAL,
    mixtral.MIXTRAL,
    deepseek_v3.DEEPSEEK_V3,
)


def known_families() -> Iterator[Family]:
    """All families; those of entry points first, so that they may take the place of others.

    Raises:
        UsageError: an entry point that leads to no family.
    """
    for point in entry_points(group=GROUP):
        found = point.load()
        if not isinstance(found, Family):
            raise UsageError(
                "an entry point for a family of models leads to something else",
                field=f"{GROUP}: {point.name}",
                found=f"{type(found).__name__} at {point.value}",
                expected="a reshard.Family",
            )
        yield found
    yield from BUILT_IN


def family(name: str, **sizes: int) -> Family:
    """A family by its name.

    Args:
        name: of the family.
        sizes: numbers and options of one model, where its configuration isn't at hand: `num_key_value_heads=8`.

    Raises:
        UsageError: one that isn't known.
    """
    families = {one.name: one for one in reversed(list(known_families()))}
    found = families.get(name)
    if found is None:
        near = difflib.get_close_matches(name, families, n=2, cutoff=0.5)
        raise UsageError(
            "a family of models that isn't known",
            field="mapping",
            found=repr(name),
            expected=f"one of {', '.join(sorted(families))}" + (f"; {' or '.join(near)}?" if near else ""),
            fix=f"give a mapping of rules, or add the family by an entry point of the group {GROUP}",
        )
    return found.with_sizes(**sizes) if sizes else found


def recognise(config: Mapping[str, Any], file: object = None) -> Family:
    """The family of a model by its config.json.

    Args:
        config: its content.
        file: where it lies, for the error.

    Raises:
        UsageError: none is known.
    """
    kind, architectures = config.get("model_type"), config.get("architectures")
    classes = [one for one in architectures if isinstance(one, str)] if isinstance(architectures, list) else []
    for one in known_families():
        if kind in one.model_types or set(classes) & set(one.architectures):
            return one
    raise UsageError(
        "the family of a model isn't known",
        file=file,
        field="model_type, architectures",
        found=f"{kind!r}, {classes}",
        expected=f"a model of {', '.join(sorted({one.name for one in known_families()}))}",
        fix=f"name the family, give a mapping of rules, or add the family by an entry point of the group {GROUP}",
    )


def select_mapper(mapping: Any) -> Mapper | None:
    """What a caller's `mapping=` means: a family's name, a family, or a mapping of rules; None for none.

    Raises:
        UsageError: something else, or a family that isn't known.
    """
    if mapping is None:
        return None
    if isinstance(mapping, str):
        return family(mapping)
    if isinstance(mapping, Family | RuleMapping):
        return mapping
    raise UsageError(
        "not a mapping", field="mapping", found=type(mapping).__name__, expected="the name of a family, a Family, or a RuleMapping"
    )


def change_of(mapping: Any, model: Any) -> Callable[[State, bool], State] | None:
    """What makes of a run's state what is saved through a caller's `mapping=`; None for none.

    Args:
        mapping: as `select_mapper` takes it.
        model: the run's, for its configuration.

    Raises:
        UsageError: as `select_mapper`.
    """
    return composition(select_mapper(mapping), model)
