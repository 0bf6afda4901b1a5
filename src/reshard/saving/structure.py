"""What a rank's state looks like without its values, what ranks tell each other of it, and the plans that follow.

A run's structure hardly ever changes, so that all of this is made once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from reshard.errors import CommunicationError, SaveError
from reshard.format.digest import digest_of
from reshard.format.index import encode_index
from reshard.format.metadata import FORMAT_VERSION, encode_metadata
from reshard.format.safetensors import PlannedHeader, plan_header
from reshard.planning.agreement import RankDescription, describe, digest, place_of
from reshard.planning.holders import check_agreement
from reshard.planning.telling import decode_all, encode
from reshard.planning.write_plan import FilePlan, WriteEntry, plan_catalog, plan_rank_files
from reshard.state import Kind, State

# The contract's header metadata.
_HEADER_METADATA = {"format": "ms"}

# What a tensor takes beside its data, in a header and in `metadata.json`; and a rank's extras (bytes). Rough, for the free-space check.
_BYTES_PER_TENSOR = 512
_BYTES_PER_RANK = 64 << 10


class RankStructure(msgspec.Struct, array_like=True):
    """What one rank tells the others.

    Attributes:
        nbytes: the bytes that it will write, roughly.
        has_optimizer: whether it holds optimizer tensors.
        members: the parameters and the unstepped parameters of each of its groups.
        description: of its tensors, encoded.
    """

    nbytes: int
    has_optimizer: bool
    members: list[tuple[list[str], list[str]]]
    description: bytes


@dataclass(frozen=True)
class RankPlan:
    """What one rank writes.

    Attributes:
        structure: what it follows from, encoded.
        digest: of the structure.
        has_optimizer: whether the rank holds optimizer tensors.
        files: the data files, each with its header and its entries in the order of the file.
        place: the name of the rank's place in the strategy.
    """

    structure: bytes
    digest: bytes
    has_optimizer: bool
    files: tuple[tuple[FilePlan, PlannedHeader, tuple[WriteEntry, ...]], ...]
    place: str

    @property
    def nbytes(self) -> int:
        """The bytes of the data files."""
        return sum(header.file_size for _, header, _ in self.files)


class Structures:
    """What this rank knows of all ranks' structures."""

    def __init__(self, rank: int, world_size: int, prefix: str | None, save_optimizer: bool) -> None:
        self._rank = rank
        self._world_size = world_size
        self._prefix = prefix
        self._save_optimizer = save_optimizer
        self._plan: RankPlan | None = None
        self._told: bytes | None = None
        self._ranks: list[RankStructure] = []
        self._metadata: tuple[bytes, bytes] | None = None

    @property
    def is_agreed(self) -> bool:
        """Whether every rank has told its structure once. The same on every rank."""
        return bool(self._ranks)

    @property
    def nbytes(self) -> int:
        """The bytes that all ranks write, roughly."""
        return sum(structure.nbytes for structure in self._ranks)

    @property
    def members(self) -> list[list[tuple[list[str], list[str]]]]:
        """Of each rank the parameters and the unstepped parameters of its groups."""
        return [structure.members for structure in self._ranks]

    def plan(self, state: State) -> RankPlan:
        """What this rank writes of a state.

        Raises:
            CaptureError: tensors that files can't hold under their names.
        """
        description = describe(state, self._rank)
        members = [(list(group.parameters), list(group.unstepped)) for group in state.groups]
        encoded = encode(description)
        # All that is not plain data follows from these: what follows is made only when they have changed.
        name = digest(msgspec.msgpack.encode((members, encoded)))
        if self._plan is None or self._plan.digest != name:
            self._plan = self._make(description, members, encoded, name)
        return self._plan

    def _make(self, description: RankDescription, members: list[tuple[list[str], list[str]]], encoded: bytes, name: bytes) -> RankPlan:
        has_optimizer = any(tensor.key.kind is Kind.OPTIMIZER for tensor in description.tensors)
        nbytes = description.nbytes + len(description.tensors) * _BYTES_PER_TENSOR + _BYTES_PER_RANK
        structure = msgspec.msgpack.encode(RankStructure(nbytes, has_optimizer, members, encoded))
        files = []
        for file in plan_rank_files(description, self._world_size, self._prefix, self._save_optimizer):
            header = plan_header([(entry.name, entry.dtype, entry.shape) for entry in file.entries], _HEADER_METADATA)
            by_name = {entry.name: entry for entry in file.entries}
            files.append((file, header, tuple(by_name[entry] for entry in header.entries)))
        return RankPlan(structure, name, has_optimizer, tuple(files), place_of(description))

    def files_to_write(self, plan: RankPlan) -> list[tuple[FilePlan, PlannedHeader, tuple[WriteEntry, ...]]]:
        """The files of a plan, without that of the optimizer when no rank of the run has one."""
        has_optimizer = plan.has_optimizer or any(structure.has_optimizer for structure in self._ranks)
        return [file for file in plan.files if file[0].kind is not Kind.OPTIMIZER or has_optimizer]

    def news(self, plan: RankPlan) -> bytes | None:
        """What the others don't know yet of this rank, or None."""
        return None if self._told == plan.digest else plan.structure

    def learn(self, told: Sequence[bytes | None]) -> None:
        """Take in what each rank told (None: nothing new). Every rank must call this with the same.

        Args:
            told: in rank order; the first time from every rank.
        """
        structures = [None if data is None else msgspec.msgpack.decode(data, type=RankStructure) for data in told]
        if not self._ranks:
            self._ranks = [structure for structure in structures if structure is not None]
        else:
            self._ranks = [new or old for new, old in zip(structures, self._ranks, strict=True)]
        mine = told[self._rank]
        if mine is not None and self._plan is not None:
            self._told = self._plan.digest
        if any(data is not None for data in told):
            self._metadata = None

    def metadata(self, directory: str) -> tuple[bytes, bytes]:
        """`metadata.json` for what all ranks write, and its index.

        Raises:
            CaptureError: the ranks' states don't fit together.
            SaveError: a rank's description can't be understood.
        """
        if self._metadata is None:
            try:
                descriptions = decode_all([structure.description for structure in self._ranks])
            except CommunicationError as cause:
                # Rank 0 alone reads them. As the error of a collective it would end rank 0, and the others would wait for it.
                raise SaveError(cause.what, found=cause.found, fix=cause.fix) from cause
            check_agreement(descriptions)
            catalog = plan_catalog(descriptions, self._prefix, self._save_optimizer, directory)
            metadata = encode_metadata(catalog)
            self._metadata = metadata, encode_index(replace(catalog, format_version=FORMAT_VERSION), digest_of(metadata))
        return self._metadata
