"""The files of one rank: which tensors each holds, and where in the rank's state they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from reshard.catalog import Catalog, Site
from reshard.errors import CaptureError
from reshard.format.names import data_file_name, tensor_names
from reshard.geometry import DType, Region
from reshard.planning.agreement import Holding, RankDescription, TensorDescription
from reshard.state import Kind, TensorKey


class WriteEntry(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: its name in the file.
        key: the tensor of the state that it is a part of.
        shard: which of the state's shards; for a tensor without elements it doesn't matter, there may be none.
        dtype: the element type.
        shape: the shape in the file: the shard's.
    """

    name: str
    key: TensorKey
    shard: int
    dtype: DType
    shape: tuple[int, ...]


class WrittenPart(NamedTuple):
    """What is written of each tensor that lies like others, without its name.

    Attributes:
        suffix: what follows the tensor's name in the file.
        shard: as in `WriteEntry`.
        dtype: likewise.
        shape: likewise.
    """

    suffix: str
    shard: int
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FilePlan:
    """A data file of one rank. Its tensors are columns: states have 100,000 of them, and few ways in which they lie.

    Attributes:
        file_name: its name in the checkpoint's directory.
        kind: what it holds.
        names: of its tensors, in the order of the state; there may be none.
        keys: of each the tensor of the state that it is a part of.
        parts: of each what is written; tensors that lie alike share one.
    """

    file_name: str
    kind: Kind
    names: Sequence[str]
    keys: Sequence[TensorKey]
    parts: Sequence[WrittenPart]

    @property
    def entries(self) -> tuple[WriteEntry, ...]:
        """The tensors one by one, made anew at each call."""
        columns = zip(self.names, self.keys, self.parts, strict=True)
        return tuple(WriteEntry(name, key, part.shard, part.dtype, part.shape) for name, key, part in columns)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(part.dtype.itemsize * prod(part.shape) for part in self.parts)

    def in_order(self, names: Sequence[str]) -> FilePlan:
        """The same file with its tensors in the order of these names, which are theirs."""
        if names == self.names:
            return self
        numbers = {name: number for number, name in enumerate(self.names)}
        order = [numbers[name] for name in names]
        return replace(self, names=names, keys=[self.keys[n] for n in order], parts=[self.parts[n] for n in order])


def plan_rank_files(description: RankDescription, world_size: int, prefix: str | None, save_optimizer: bool) -> tuple[FilePlan, ...]:
    """The files of one rank: all that it holds, replicas included.

    Every rank writes a model file, and an optimizer file when `save_optimizer` says so, be it empty: the contract counts the files by rank.

    Args:
        description: what the rank holds.
        world_size: the number of ranks.
        prefix: the first part of the files' names.
        save_optimizer: whether there are optimizer files.

    Raises:
        CaptureError: two tensors of one file have the same name, or a key has no name in files.
        UsageError: the prefix can't be part of a file name.
    """
    plans = []
    kinds = {tensor.key.kind for tensor in description.tensors}
    for kind in Kind:
        if kind is Kind.OPTIMIZER and not save_optimizer:
            continue
        own = description.tensors if kinds == {kind} else [tensor for tensor in description.tensors if tensor.key.kind is kind]
        names, keys, parts = _written(own)
        if len(set(names)) < len(names):
            raise _name_taken(names, keys, description.rank)
        plans.append(FilePlan(data_file_name(prefix, kind, description.rank, world_size), kind, names, keys, parts))
    return tuple(plans)


def _written(tensors: Sequence[TensorDescription]) -> tuple[Sequence[str], Sequence[TensorKey], Sequence[WrittenPart]]:
    """All that is written of tensors, as the columns of a plan."""
    if not tensors:
        return [], [], []
    keys, held = zip(*tensors, strict=True)
    names, alike = tensor_names(keys), list(map(id, held))
    # By the identity of what says how a tensor lies.
    known = {
        identity: [WrittenPart(suffix, index, holding.dtype, region.shape) for suffix, index, region in stored_parts(holding, "")]
        for identity, holding in dict(zip(alike, held, strict=True)).items()
    }
    if all(len(parts) == 1 for parts in known.values()):
        # As nearly always. The first part of a tensor has its name.
        first = {identity: part for identity, (part,) in known.items()}
        return names, keys, list(map(first.__getitem__, alike))
    every = [(name + part.suffix, key, part) for name, key, identity in zip(names, keys, alike, strict=True) for part in known[identity]]
    return [name for name, _, _ in every], [key for _, key, _ in every], [part for _, _, part in every]


def plan_sole_files(description: RankDescription, catalog: Catalog) -> tuple[FilePlan, ...]:
    """The files of one rank when redundancy is removed: what the catalog says that it writes. There may be none.

    Args:
        description: what the rank holds.
        catalog: of the whole job, planned with `remove_redundancy`.
    """
    rank = description.rank
    own: dict[int, dict[Region, Site]] = {}  # by arrangement
    files: dict[Kind, str] = {}
    written: dict[Kind, list[tuple[str, TensorKey, WrittenPart]]] = {}
    parts: dict[tuple[int, int], WrittenPart] = {}  # by holding and shard
    for tensor in description.tensors:
        stored = catalog.tensors.get(tensor.key)
        if stored is None:
            continue
        arrangement = stored.arrangement
        sites = own.get(id(arrangement))
        if sites is None:
            sites = own[id(arrangement)] = {piece.region: site for piece in arrangement.pieces for site in piece.sites if site.rank == rank}
        if not sites:
            continue
        kind = tensor.key.kind
        for name, index, region in stored_parts(tensor, stored.name):
            site = sites.get(region)
            if site is not None and name == stored.name + site.suffix:
                files[kind] = site.file
                part = parts.get((id(tensor.holding), index))
                if part is None:
                    part = parts[id(tensor.holding), index] = WrittenPart(site.suffix, index, tensor.dtype, region.shape)
                written.setdefault(kind, []).append((name, tensor.key, part))
    return tuple(FilePlan(files[kind], kind, *map(list, zip(*written[kind], strict=True))) for kind in Kind if kind in written)


def stored_parts(tensor: TensorDescription | Holding, name: str) -> Iterator[tuple[str, int, Region]]:
    """What a rank writes of a tensor: the name in the file, the index of the shard, its region.

    Parts without elements are not written. A tensor without elements is, whole, by every rank that has it: it must come back.
    """
    if 0 in tensor.global_shape:
        yield name, 0, Region.whole(tensor.global_shape)
        return
    written = 0
    for index, region in enumerate(tensor.regions):
        if not region.is_empty:
            yield (f"{name}@{written}" if written else name), index, region
            written += 1


def _name_taken(names: Sequence[str], keys: Sequence[TensorKey], rank: int) -> CaptureError:
    name = Counter(names).most_common(1)[0][0]
    return CaptureError(
        "two tensors of one rank have the same name in files",
        tensor=name,
        rank=rank,
        found=", ".join(str(tuple(key)) for own, key in zip(names, keys, strict=True) if own == name),
        fix="rename one of them; of a tensor with several parts on a rank the further ones are named with @1, @2, …",
    )
