"""Loads through a mapping: what ranks agree on before they plan, and names that the user knows in what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.comm.together import attempt
from reshard.format.names import tensor_name
from reshard.frameworks.select import select_adapter
from reshard.loading.options import tell_options
from reshard.loading.strictness import Misfits, Strictness
from reshard.planning.agreement import RankDescription, describe
from reshard.planning.mapping.composed import compose
from reshard.planning.mapping.linking import Sides, link
from reshard.planning.mapping.mappers import Mapper, config_of, sizes_in
from reshard.planning.mapping.wanted import Told, tell
from reshard.planning.read_plan import Mismatch
from reshard.state import Kind, State, TensorKey

# A message names so many tensors.
_NAMES_SHOWN = 4


class _Own(msgspec.Struct, array_like=True):
    """What a rank tells the others of its run.

    Attributes:
        counts: how many of its names are of each naming.
        sizes: of its model's configuration.
    """

    counts: dict[str, int]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Through:
    """A mapping that all ranks have agreed on.

    Attributes:
        mapper: as it was given.
        run: how many names of the run are of each naming.
        sizes: of the model's configuration: the checkpoint's where it has one, else the run's.
    """

    mapper: Mapper
    run: Mapping[str, int]
    sizes: Mapping[str, int]

    def with_stored(self, config: Mapping[str, Any] | None) -> Through:
        """The same with the numbers of the checkpoint's configuration, which count more than the run's. The same on every rank."""
        return replace(self, sizes={**self.sizes, **sizes_in(config)})

    def tell(self, catalog: Catalog) -> Told:
        """A checkpoint's catalog in strands of the run's tensors: the same on every rank.

        Raises:
            UsageError: names, shapes or sizes that the mapping can't do with.
            MismatchError: rules that leave elements uncovered, or cover some twice.
        """
        stored = [key.parameter for key in catalog.tensors if key.kind is Kind.MODEL]
        return tell(catalog, link(catalog, self.sides(stored)))

    def describe(self, state: State, catalog: Catalog, rank: int, *, is_same_everywhere: bool) -> RankDescription:
        """What a rank would save of its model tensors through this mapping."""
        tensors = {key: tensor for key, tensor in state.tensors.items() if key.kind is Kind.MODEL}
        stored = [key.parameter for key in catalog.tensors if key.kind is Kind.MODEL]
        return describe(compose(State(tensors), self.sides(stored), is_same_everywhere=is_same_everywhere), rank)

    def sides(self, stored: Sequence[str]) -> Sides:
        """The mapping between the run and a checkpoint with model tensors of these names."""
        return self.mapper.sides(self.run, stored, self.sizes)


def agree(mapper: Mapper, model: Any, comm: Communicator, options: str, *, what: str) -> Through:
    """Collective: a rank may have no tensor, or no configuration, but all must link alike.

    Args:
        mapper: as the caller gave it.
        model: the run's.
        comm: the ranks.
        options: how this rank loads, in words: what the ranks tell each other first, with a mapping or without.
        what: became of the run when a rank fails here.

    Raises:
        UsageError: the ranks load in different ways: some without this mapping.
    """

    def own() -> _Own:
        captured = select_adapter(model, None).capture(model, None, global_step=None)
        return _Own(mapper.count(key.parameter for key in captured.tensors), config_of(model))

    mine, error = attempt(own)
    told = tell_options(comm, options, error, b"" if mine is None else msgspec.msgpack.encode(mine), what=what)
    ranks = [msgspec.msgpack.decode(data, type=_Own) for data in told]
    counts: Counter[str] = Counter()
    for rank in ranks:
        counts.update(rank.counts)
    sizes = next((rank.sizes for rank in ranks if rank.sizes), {})
    return Through(mapper, counts, sizes)


def casts_of(strictness: Strictness, told: Told | None) -> Callable[[Mismatch], bool]:
    """Whether a tensor of another type is converted; strands follow the run's tensors that they are of."""
    if told is None:
        return strictness.casts
    return lambda misfit: strictness.casts(replace(misfit, key=told.run_key(misfit.key)))


def known_misfits(misfits: Misfits, present: Sequence[TensorKey], told: Told) -> Misfits:
    """Misfits under the run's names where the run has the tensor, under the checkpoint's where it hasn't."""
    mismatched: dict[TensorKey, Mismatch] = {}
    for misfit in misfits.mismatched:
        mismatched.setdefault(told.run_key(misfit.key), replace(misfit, key=told.run_key(misfit.key)))
    used = {told.stored[key] for key in present if key in told.stored}
    used |= {strand.stored for key in mismatched for strand in _strands(told, key)}
    unexpected = dict.fromkeys(told.stored[key] for key in misfits.unexpected if told.stored[key] not in used)
    missing = dict.fromkeys(told.run_key(key) for key in misfits.missing)
    return Misfits(tuple(missing), tuple(unexpected), tuple(mismatched.values()))


def _strands(told: Told, key: TensorKey) -> Sequence[Any]:
    one = told.links.tensors.get(key)
    return () if one is None else one.strands


def words_of_missing(misfits: Misfits, told: Told) -> list[tuple[str, str]]:
    """What the mapping looked for in the checkpoint and didn't find, as lines of a message."""
    lines = []
    for key in misfits.missing:
        lacking = told.links.incomplete.get(key._replace(kind=Kind.MODEL, slot=None))
        if lacking:
            more = f" and {len(lacking) - _NAMES_SHOWN} more" if len(lacking) > _NAMES_SHOWN else ""
            lines.append(
                ("mapping", f"{tensor_name(key)} is also made of {', '.join(lacking[:_NAMES_SHOWN])}{more}: not in the checkpoint")
            )
    return lines[:_NAMES_SHOWN]
