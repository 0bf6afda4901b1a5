"""What a caller gives as a mapping: rules of his own, or a family of models, which becomes rules when both sides are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from reshard.catalog import Catalog
from reshard.errors import UsageError
from reshard.planning.mapping.composed import compose
from reshard.planning.mapping.linking import Sides
from reshard.planning.mapping.names import Naming, Rule
from reshard.planning.mapping.rules import Sizes
from reshard.state import Kind, State, TensorKey, model_key

# An error names so many tensors.
_SHOWN = 3

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

ATOMS = "huggingface"
"""The naming of a family whose names are the atoms' own."""

# Of atoms that are equal where a model ties them: the one that may be left out, and the one that stands for it.
_TIES = (("lm_head.weight", "model.embed_tokens.weight"),)


class Mapper(Protocol):
    """A mapping as a caller gives it."""

    def count(self, names: Iterable[str]) -> dict[str, int]:
        """Of each naming that it knows, how many of some names are of it."""
        ...

    def sides(self, run: Mapping[str, int], stored: Sequence[str], sizes: Sizes) -> Sides:
        """The mapping between a run and a checkpoint.

        Args:
            run: what `count` says of the run's names, all ranks together.
            stored: the names of the checkpoint's model tensors.
            sizes: of the model's configuration.

        Raises:
            UsageError: names that it doesn't know.
        """
        ...

    def saving(self, names: Sequence[str], sizes: Sizes) -> Sides:
        """The mapping with which a run of these names is saved: between it and what is stored.

        Raises:
            UsageError: names that it doesn't know.
        """
        ...

    def named(self, stored: Sequence[str], naming: str, sizes: Sizes) -> Sides:
        """The mapping between one naming and a checkpoint with model tensors of these names.

        Raises:
            UsageError: names, or a naming, that it doesn't know.
        """
        ...


@dataclass(frozen=True)
class RuleMapping:
    """A mapping of a caller's own rules.

    Each rule says how a tensor of one side is made of atoms. What no rule is about is an atom: it has the same name on both sides.

    Attributes:
        run: how the run's tensors are made.
        checkpoint: how the checkpoint's are.
        sizes: numbers that the rules name.
    """

    run: tuple[Rule, ...] = ()
    checkpoint: tuple[Rule, ...] = ()
    sizes: Sizes = field(default_factory=dict)

    def count(self, names: Iterable[str]) -> dict[str, int]:
        return {}

    def sides(self, run: Mapping[str, int], stored: Sequence[str], sizes: Sizes) -> Sides:
        return Sides(Naming(self.run), Naming(self.checkpoint), {**sizes, **self.sizes})

    def saving(self, names: Sequence[str], sizes: Sizes) -> Sides:
        return self.sides({}, (), sizes)

    def named(self, stored: Sequence[str], naming: str, sizes: Sizes) -> Sides:
        return self.sides({}, stored, sizes)


@dataclass(frozen=True)
class Family:
    """A family of models, and the ways in which its tensors are named.

    The names in Hugging Face files are the atoms; every other naming says how its tensors are made of them.

    Attributes:
        name: of the family.
        model_types: the `model_type` of a config.json that it is recognised by.
        namings: by their names, the rules of each.
        ties: of atoms that are equal where the model ties them: the one that may be left out, and the one that stands for it.
        architectures: the `architectures` of a config.json that it is recognised by.
        sizes: numbers that count more than those of a configuration.
        saves_as: the naming of what a run saves with this mapping.
        further: what a model's sizes add to the rules of each naming; None when they add nothing.
    """

    name: str
    model_types: tuple[str, ...]
    namings: Mapping[str, tuple[Rule, ...]]
    ties: tuple[tuple[str, str], ...] = _TIES
    architectures: tuple[str, ...] = ()
    sizes: Sizes = field(default_factory=dict)
    saves_as: str = "mindspore"
    # Not told apart by it: where a function lies differs from process to process.
    further: Callable[[Sizes], Mapping[str, tuple[Rule, ...]]] | None = field(default=None, repr=False, compare=False)

    def with_sizes(self, **sizes: int) -> Family:
        """The same family with numbers (or options) of one model, which count more than those of its configuration."""
        return replace(self, sizes={**self.sizes, **_with_synonyms({name: int(number) for name, number in sizes.items()})})

    def saving_as(self, naming: str) -> Family:
        """The same family, whose runs save under another naming.

        Raises:
            UsageError: one that it doesn't know.
        """
        self.naming(naming)
        return replace(self, saves_as=naming)

    def naming(self, name: str) -> Naming:
        """One of its namings.

        Raises:
            UsageError: one that it doesn't know.
        """
        naming = self._namings.get(name)
        if naming is None:
            raise UsageError(
                f"the family {self.name} has no naming of this name", field="naming", found=name, expected=", ".join(self._namings)
            )
        return naming

    @cached_property
    def _namings(self) -> dict[str, Naming]:
        return {ATOMS: Naming(), **{name: Naming(rules) for name, rules in self.namings.items()}}

    def count(self, names: Iterable[str]) -> dict[str, int]:
        names = list(names)
        atoms = [name for name in names if any(naming.is_atom(name) for naming in self._namings.values())]
        # An atom under a naming that makes something else of it is not of that naming.
        return {
            label: naming.count(names) + sum(1 for name in atoms if not naming.is_atom(name) or naming.is_renamed(name))
            for label, naming in self._namings.items()
        }

    def sides(self, run: Mapping[str, int], stored: Sequence[str], sizes: Sizes) -> Sides:
        mine, theirs = self._best(run, "run", ()), self._best(self.count(stored), "checkpoint", stored)
        return self._between(mine, theirs, sizes)

    def saving(self, names: Sequence[str], sizes: Sizes) -> Sides:
        mine = self._best(self.count(names), "run", names)
        return self._between(mine, self.saves_as, sizes)

    def named(self, stored: Sequence[str], naming: str, sizes: Sizes) -> Sides:
        theirs = self._best(self.count(stored), "checkpoint", stored)
        return self._between(naming, theirs, sizes)

    def _between(self, run: str, checkpoint: str, sizes: Sizes) -> Sides:
        known = {**sizes, **self.sizes}
        more = {} if self.further is None else self.further(known)
        mine, theirs = (
            Naming((*self.naming(name).rules, *more[name])) if more.get(name) else self.naming(name) for name in (run, checkpoint)
        )
        return Sides(mine, theirs, known, self.ties)

    def _best(self, counts: Mapping[str, int], what: str, names: Sequence[str]) -> str:
        if not any(counts.values()):
            raise UsageError(
                f"the family {self.name} knows none of the tensors of the {what}",
                field="mapping",
                found=", ".join(names[:_SHOWN]) or "names of no naming",
                expected=f"names as in {', '.join(self._namings)}",
                fix="give the family of this model, or a mapping of your own",
            )
        return max(self._namings, key=lambda label: counts.get(label, 0))


def sizes_in(config: Any) -> dict[str, int]:
    """The numbers and options of a model's configuration: a mapping (of a config.json), or an object with `to_dict`.

    What another library wrote is taken as it is: everything that is no whole number is left out. A null counts as absent.
    """
    if config is not None and not isinstance(config, Mapping):
        to_dict = getattr(config, "to_dict", None)
        config = to_dict() if callable(to_dict) else None
    if not isinstance(config, Mapping):
        return {}
    found = {str(name): int(value) for name, value in config.items() if isinstance(value, int)}
    if "num_key_value_heads" not in found and "num_attention_heads" in found:
        # Whoever doesn't say has a key and a value for every query.
        found["num_key_value_heads"] = found["num_attention_heads"]
    return _with_synonyms(found)


def _with_synonyms(sizes: Sizes) -> dict[str, int]:
    """The number of experts under each of the names that releases of models' code give it."""
    experts = next((sizes[name] for name in _EXPERTS if name in sizes), None)
    return dict(sizes) if experts is None else {**dict.fromkeys(_EXPERTS, experts), **sizes}


def tied_in(config: Mapping[str, Any] | None, catalog: Catalog) -> dict[TensorKey, TensorKey]:
    """The tensors under the names of Hugging Face files that only repeat others, as a model's configuration says, with these."""
    if config is None:
        return {}
    ties = list(_TIES) if config.get("tie_word_embeddings") is True else []
    for layer in further_layers(sizes_in(config)):
        ties.append((f"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight"))
        ties.append((f"model.layers.{layer}.shared_head.head.weight", "lm_head.weight"))
    found = {}
    for tied, first in ties:
        one, other = catalog.tensors.get(model_key(tied)), catalog.tensors.get(model_key(first))
        if one is not None and other is not None and one.global_shape == other.global_shape:
            found[one.key] = other.key
    return found


def further_layers(sizes: Sizes) -> range:
    """The numbers of the layers behind a model's own, which predict further tokens; published weights have them, few runs do."""
    own = sizes.get("num_hidden_layers", 0)
    return range(own, own + (sizes.get("num_nextn_predict_layers", 0) if own else 0))


def config_of(model: Any) -> dict[str, int]:
    """The sizes of a model that carries its configuration (`model.config`), also inside wrappers, lists and dictionaries."""
    if isinstance(model, Mapping):
        items = list(model.values())
    elif isinstance(model, list | tuple):
        items = list(model)
    else:
        items = [model]
    for item in items:
        inner = item
        while inner is not None:
            sizes = sizes_in(getattr(inner, "config", None))
            if sizes:
                return sizes
            inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return {}


def composition(mapper: Mapper | None, model: Any) -> Callable[[State, bool], State] | None:
    """What makes of a run's state what is saved through a mapping; None when there is none.

    Args:
        mapper: the mapping.
        model: the run's, for its configuration.

    Returns:
        As the saver wants it: its second argument is `is_same_everywhere` of `compose`.
    """
    if mapper is None:
        return None

    def change(state: State, is_same_everywhere: bool) -> State:
        names = [key.parameter for key in state.tensors if key.kind is Kind.MODEL]
        if not names:
            return state
        return compose(state, mapper.saving(names, config_of(model)), is_same_everywhere=is_same_everywhere)

    return change
