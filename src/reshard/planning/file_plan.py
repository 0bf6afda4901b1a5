"""The files of one rank: which tensors each holds, and where in the rank's state they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reshard.catalog import Catalog, Site
from reshard.errors import CaptureError
from reshard.format.names import data_file_name, tensor_names
from reshard.geometry import DType, Region
from reshard.planning.agreement import Holding, RankDescription, TensorDescription
from reshard.rows import rows
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


@dataclass(frozen=True)
class FilePlan:
    """A data file of one rank.

    Attributes:
        file_name: its name in the checkpoint's directory.
        kind: what it holds.
        entries: its tensors, in the order of the state; there may be none.
    """

    file_name: str
    kind: Kind
    entries: tuple[WriteEntry, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(entry.dtype.itemsize * Region.whole(entry.shape).size for entry in self.entries)


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
        entries = _entries(own)
        if len({entry.name for entry in entries}) < len(entries):
            raise _name_taken(entries, description.rank)
        plans.append(FilePlan(data_file_name(prefix, kind, description.rank, world_size), kind, entries))
    return tuple(plans)


def _entries(tensors: Sequence[TensorDescription]) -> tuple[WriteEntry, ...]:
    """All that is written of tensors."""
    if not tensors:
        return ()
    keys, held = zip(*tensors, strict=True)
    names, alike = tensor_names(keys), list(map(id, held))
    # Of tensors that lie alike what is written of each, by the identity of what says so: the name's end, the shard, its type and shape.
    known = {
        identity: [(suffix, index, holding.dtype, region.shape) for suffix, index, region in stored_parts(holding, "")]
        for identity, holding in dict(zip(alike, held, strict=True)).items()
    }
    if all(len(parts) == 1 for parts in known.values()):
        # As nearly always. A tensor's first part has its name.
        _, shards, dtypes, shapes = zip(*[known[identity][0] for identity in alike], strict=True)
        return tuple(rows(WriteEntry, names, keys, shards, dtypes, shapes))
    return tuple(
        WriteEntry(name + suffix, key, index, dtype, shape)
        for name, key, identity in zip(names, keys, alike, strict=True)
        for suffix, index, dtype, shape in known[identity]
    )


def plan_sole_files(description: RankDescription, catalog: Catalog) -> tuple[FilePlan, ...]:
    """The files of one rank when redundancy is removed: what the catalog says that it writes. There may be none.

    Args:
        description: what the rank holds.
        catalog: of the whole job, planned with `remove_redundancy`.
    """
    rank = description.rank
    own: dict[int, dict[Region, Site]] = {}  # by arrangement
    names: dict[Kind, str] = {}
    entries: dict[Kind, list[WriteEntry]] = {}
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
                names[kind] = site.file
                entries.setdefault(kind, []).append(WriteEntry(name, tensor.key, index, tensor.dtype, region.shape))
    return tuple(FilePlan(names[kind], kind, tuple(entries[kind])) for kind in Kind if kind in entries)


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


def _name_taken(entries: Sequence[WriteEntry], rank: int) -> CaptureError:
    count = Counter(entry.name for entry in entries)
    name = count.most_common(1)[0][0]
    return CaptureError(
        "two tensors of one rank have the same name in files",
        tensor=name,
        rank=rank,
        found=", ".join(str(tuple(entry.key)) for entry in entries if entry.name == name),
        fix="rename one of them; of a tensor with several parts on a rank the further ones are named with @1, @2, …",
    )
