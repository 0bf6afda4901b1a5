"""What the tensors of a run have of those of a checkpoint: both are taken apart into atoms, and joined through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from reshard.catalog import Catalog, StoredTensor
from reshard.errors import MismatchError
from reshard.planning.mapping.compositions import Shape
from reshard.planning.mapping.lattice import Lattice, identity, join
from reshard.planning.mapping.names import Named, Naming
from reshard.planning.mapping.rules import Sizes
from reshard.state import Kind, TensorKey, model_key


@dataclass(frozen=True)
class Sides:
    """A mapping between a run and a checkpoint: how either names its tensors.

    Attributes:
        run: the run's naming.
        checkpoint: the checkpoint's.
        sizes: of the model's configuration.
        ties: of atoms that are equal where the model ties them: the one that may be left out, and the one that stands for it.
    """

    run: Naming
    checkpoint: Naming
    sizes: Sizes = field(default_factory=dict)
    ties: tuple[tuple[str, str], ...] = ()

    def turned(self) -> Sides:
        """The same mapping the other way round."""
        return Sides(self.checkpoint, self.run, self.sizes, self.ties)


@dataclass(frozen=True, slots=True)
class Strand:
    """What a tensor of the run has of one of the checkpoint: planned, and read, as if it were a tensor of its own.

    Attributes:
        key: under which it is planned.
        stored: the checkpoint's tensor.
        lattice: the run's tensor on the left, the checkpoint's on the right.
    """

    key: TensorKey
    stored: TensorKey
    lattice: Lattice


@dataclass(frozen=True, slots=True)
class Linked:
    """A tensor of the run, and what it consists of.

    Attributes:
        shape: of the tensor.
        strands: disjoint; together with what is filled they are all of it.
        fills: values that rules declare, each with a lattice on whose left the tensor is.
    """

    shape: Shape
    strands: tuple[Strand, ...]
    fills: tuple[tuple[float, Lattice], ...] = ()

    @property
    def only(self) -> Strand | None:
        """The strand of a tensor that is a stored one under another name; None for any other."""
        strand = self.strands[0]
        return strand if len(self.strands) == 1 and strand.lattice.is_identity else None


@dataclass(frozen=True)
class Links:
    """All that a checkpoint holds, as a run names it. The same on every rank.

    Attributes:
        tensors: by the run's keys.
        incomplete: of those of which the checkpoint has some atoms and lacks others, the names of what it lacks.
        unused: the checkpoint's tensors of which nothing is in any of these.
        ignored: those of them that a tie makes superfluous.
        repeated: the run's tensors that only repeat another one, as a tie says: for a run that has them all the same.
    """

    tensors: Mapping[TensorKey, Linked]
    incomplete: Mapping[TensorKey, tuple[str, ...]]
    unused: tuple[TensorKey, ...]
    ignored: frozenset[TensorKey]
    repeated: frozenset[TensorKey] = frozenset()


def link(catalog: Catalog, sides: Sides) -> Links:
    """Link what a checkpoint holds with what a run wants. Pure, and the same on every rank that has the same catalog.

    A tensor that no rule is about has the same name on both sides. Slots of a parameter's shape follow the parameter; a slot of one number
    (a step count) is that of the first tensor that the parameter is made of; slots of other shapes come along where the parameter is only
    renamed.

    Raises:
        MismatchError: rules that leave elements of a tensor uncovered, or cover some twice.
        UsageError: shapes that contradict the configuration, or a size that isn't known.
    """
    linker = _Linker(sides)
    model = {key: tensor for key, tensor in catalog.tensors.items() if key.kind is Kind.MODEL}
    for key, tensor in model.items():
        linker.add(key, tensor.global_shape)
    linked, incomplete = linker.link()
    slots = _slots(catalog, linked)
    linked.update(slots)
    for key, tensor in catalog.tensors.items():
        if key.kind is Kind.OPTIMIZER and not key.parameter:
            linked[key] = Linked(tensor.global_shape, (Strand(key, key, identity(tensor.global_shape)),))
    used = {strand.stored for one in linked.values() for strand in one.strands}
    unused = tuple(key for key in catalog.tensors if key not in used)
    ignored = {key for key in unused if key.kind is Kind.MODEL and linker.is_tied(key.parameter)}
    ignored |= {key for key in unused if key.kind is Kind.OPTIMIZER and _is_shared_number(catalog, key, used, linked)}
    return Links(linked, {model_key(name): atoms for name, atoms in incomplete.items()}, unused, frozenset(ignored), linker.repeated)


class _Linker:
    """Joins model tensors through atoms."""

    def __init__(self, sides: Sides) -> None:
        self._sides = sides
        self._atoms: dict[str, Shape] = {}
        # Of each atom the tensors that have some of it, with what: the tensor on the left, the atom on the right.
        self._providers: dict[str, list[tuple[TensorKey, Lattice]]] = {}
        self._joined: dict[tuple[int, int], list[Lattice]] = {}
        self._kept: list[Lattice] = []
        self._repeated: set[str] = set()
        self._repeating: list[str] = []

    def add(self, key: TensorKey, shape: Shape) -> None:
        """A tensor of the checkpoint."""
        named, atoms = self._sides.checkpoint.take_apart(key.parameter, shape, self._sides.sizes)
        for atom, own in atoms.items():
            if self._atoms.setdefault(atom, own) != own:
                raise MismatchError(
                    "two tensors of the checkpoint have parts of one, and give it different shapes",
                    tensor=atom,
                    found=f"{list(own)} by {key.parameter}",
                    expected=list(self._atoms[atom]),
                )
        for atom, lattice in named.parts:
            self._providers.setdefault(atom, []).append((key, lattice))

    def is_tied(self, name: str) -> bool:
        """Whether a name is one that the model's ties make superfluous."""
        return bool(self._sides.sizes.get("tie_word_embeddings")) and any(name == tied for tied, _ in self._sides.ties)

    def link(self) -> tuple[dict[TensorKey, Linked], dict[str, tuple[str, ...]]]:
        """The run's model tensors, and what is missing of the incomplete ones."""
        sides = self._sides
        if sides.sizes.get("tie_word_embeddings"):
            for tied, first in sides.ties:
                if first in self._atoms and tied not in self._atoms:
                    self._repeated.add(tied)
                    self._atoms[tied], self._providers[tied] = self._atoms[first], self._providers[first]
        assembled = sides.run.assemble(self._atoms, sides.sizes)
        self._repeating += [name for name, named in assembled.tensors.items() if any(atom in self._repeated for atom, _ in named.parts)]
        return {model_key(name): self._tensor(named) for name, named in assembled.tensors.items()}, dict(assembled.incomplete)

    @property
    def repeated(self) -> frozenset[TensorKey]:
        """The run's model tensors that only repeat others; known once they are linked."""
        return frozenset(model_key(name) for name in self._repeating)

    def _tensor(self, named: Named) -> Linked:
        found: list[tuple[TensorKey, Lattice]] = []
        for atom, lattice in named.parts:
            for stored, other in self._providers[atom]:
                alike = (id(lattice), id(other))
                joined = self._joined.get(alike)
                if joined is None:
                    joined = self._joined[alike] = join(lattice, other)
                    self._kept += (lattice, other)  # identities are of no use when their objects are gone
                found += [(stored, common) for common in joined]
        covered = sum(lattice.size for _, lattice in found) + sum(lattice.size for _, lattice in named.fills)
        if covered != prod(named.shape):
            raise MismatchError(
                f"rules {'leave elements of a tensor uncovered' if covered < prod(named.shape) else 'cover elements of a tensor twice'}",
                tensor=named.name,
                found=f"{covered} elements in {', '.join(dict.fromkeys(key.parameter for key, _ in found)) or 'no tensor'}",
                expected=f"{prod(named.shape)}, each once",
            )
        return Linked(named.shape, _strands(model_key(named.name), found), named.fills)


def _strands(key: TensorKey, found: Iterable[tuple[TensorKey, Lattice]]) -> tuple[Strand, ...]:
    """Strands under keys that say which tensors they join; where there is only one, the run's own."""
    found = list(found)
    if len(found) == 1:
        return (Strand(key, *found[0]),)
    seen: dict[str, int] = {}
    strands = []
    for stored, lattice in found:
        number = seen[stored.parameter] = seen.get(stored.parameter, 0) + 1
        name = f"{key.parameter} < {stored.parameter}{f' #{number}' if number > 1 else ''}"
        strands.append(Strand(key._replace(parameter=name), stored, lattice))
    return tuple(strands)


def _slots(catalog: Catalog, linked: Mapping[TensorKey, Linked]) -> dict[TensorKey, Linked]:
    """The slots of the run's parameters."""
    names: dict[str, None] = {}
    for key in catalog.tensors:
        if key.kind is Kind.OPTIMIZER and key.slot is not None and key.parameter:
            names.setdefault(key.slot)
    found: dict[TensorKey, Linked] = {}
    if not names:
        return found
    for key, one in linked.items():
        for slot in names:
            own = key._replace(kind=Kind.OPTIMIZER, slot=slot)
            stored = [strand.stored._replace(kind=Kind.OPTIMIZER, slot=slot) for strand in one.strands]
            tensors = [catalog.tensors.get(other) for other in stored]
            present = [tensor for tensor in tensors if tensor is not None]
            if len(present) < len(tensors):
                continue
            made = _slot(own, one, present)
            if made is not None:
                found[own] = made
    return found


def _slot(key: TensorKey, one: Linked, stored: list[StoredTensor]) -> Linked | None:
    first = stored[0]
    if all(tensor.global_shape == strand.lattice.right.shape for tensor, strand in zip(stored, one.strands, strict=True)):
        pairs = [(tensor.key, strand.lattice) for tensor, strand in zip(stored, one.strands, strict=True)]
        return Linked(one.shape, _strands(key, pairs), one.fills)
    if prod(first.global_shape) == 1 or one.only is not None:
        return Linked(first.global_shape, (Strand(key, first.key, identity(first.global_shape)),))
    return None


def _is_shared_number(catalog: Catalog, key: TensorKey, used: set[TensorKey], linked: Mapping[TensorKey, Linked]) -> bool:
    """Whether it is one number of several that one tensor of the run has for all of its parts."""
    if prod(catalog.tensors[key].global_shape) != 1:
        return False
    parameter = model_key(key.parameter)
    return any(
        strand.stored == parameter and any(other.stored._replace(kind=Kind.OPTIMIZER, slot=key.slot) in used for other in one.strands)
        for one in linked.values()
        for strand in one.strands
    )
