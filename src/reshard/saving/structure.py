"""What a rank's state looks like without its values, what ranks tell each other of it, and the plans that follow.

A run's structure hardly ever changes, so that all of this is made once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from reshard.catalog import Catalog
from reshard.errors import CommunicationError, SaveError
from reshard.format.digest import digest_of
from reshard.format.index import encode_index
from reshard.format.metadata import FORMAT_VERSION, encode_metadata
from reshard.format.safetensors import PlannedHeader, plan_columns
from reshard.planning.agreement import RankDescription, describe, digest, place_of
from reshard.planning.file_plan import FilePlan, plan_rank_files, plan_sole_files
from reshard.planning.replicas import SharedRegions, find_shared
from reshard.planning.telling import decode_all, encode, is_told_alike
from reshard.planning.write_plan import plan_catalog
from reshard.state import Kind, State

# A data file, its tensors in the order of the file, with its header.
PlannedFile = tuple[FilePlan, PlannedHeader]

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
        description: of the rank's tensors.
        told: the description, as the other ranks are told of it.
        has_optimizer: whether the rank holds optimizer tensors.
        files: the data files with all that the rank holds; empty when redundancy is removed: then they follow from what all ranks hold.
        place: the name of the rank's place in the strategy.
    """

    structure: bytes
    digest: bytes
    description: RankDescription
    told: bytes
    has_optimizer: bool
    files: tuple[PlannedFile, ...]
    place: str

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors that the rank holds; where redundancy is removed it writes some of them."""
        return self.description.nbytes


class Structures:
    """What this rank knows of all ranks' structures.

    Args:
        rank: this rank.
        world_size: the number of ranks.
        prefix: the first part of data files' names; None for none.
        save_optimizer: whether optimizer tensors are saved.
        remove_redundancy: whether each region is written once. One rank has nothing redundant.
        check_replicas: whether it must be known which regions several ranks hold.

    Attributes:
        shared_regions: what this rank holds that others hold too, where replicas are checked; known as soon as `files_to_write` is.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        prefix: str | None,
        save_optimizer: bool,
        remove_redundancy: bool = False,
        check_replicas: bool = False,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._prefix = prefix
        self._save_optimizer = save_optimizer
        self._removes = remove_redundancy and world_size > 1
        self._checks = check_replicas and world_size > 1
        self._plan: RankPlan | None = None
        self._members: list[tuple[list[str], list[str]]] = []
        self._told: bytes | None = None
        self._ranks: list[RankStructure] = []
        self._catalog: Catalog | None = None
        self.shared_regions: list[SharedRegions] = []
        self._is_followed = False
        self._sole: tuple[PlannedFile, ...] = ()
        self._sole_bytes = 0
        self._metadata: tuple[bytes, bytes] | None = None

    @property
    def is_agreed(self) -> bool:
        """Whether every rank has told its structure once. The same on every rank."""
        return bool(self._ranks)

    @property
    def nbytes(self) -> int:
        """The bytes that all ranks write, roughly; where redundancy is removed, known as soon as `files_to_write` is."""
        return self._sole_bytes if self._removes else sum(structure.nbytes for structure in self._ranks)

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
        plan = self._plan
        if plan is not None and members == self._members and is_told_alike(description, plan.description):
            return plan
        encoded = encode(description)
        # All that is not plain data follows from these: what follows is made only when they have changed.
        name = digest(msgspec.msgpack.encode((members, encoded)))
        if plan is None or plan.digest != name:
            plan = self._plan = self._make(description, members, encoded, name)
            self._members = members
        return plan

    def _make(self, description: RankDescription, members: list[tuple[list[str], list[str]]], encoded: bytes, name: bytes) -> RankPlan:
        has_optimizer = Kind.OPTIMIZER in {tensor.key.kind for tensor in description.tensors}
        nbytes = description.nbytes + len(description.tensors) * _BYTES_PER_TENSOR + _BYTES_PER_RANK
        structure = msgspec.msgpack.encode(RankStructure(nbytes, has_optimizer, members, encoded))
        # Whether names can stand beside each other doesn't depend on who writes what.
        files = plan_rank_files(description, self._world_size, self._prefix, self._save_optimizer)
        planned = () if self._removes else _with_headers(files)
        return RankPlan(structure, name, description, encoded, has_optimizer, planned, place_of(description))

    def files_to_write(self, plan: RankPlan) -> tuple[PlannedFile, ...]:
        """The data files of this rank, in a run whose ranks have told each other what they hold.

        Where redundancy is kept these are all files of the plan, without that of the optimizer when no rank of the run has one.

        Raises:
            CaptureError: redundancy is removed or replicas are checked, and the ranks' states don't fit together.
            SaveError: likewise, and a rank's description can't be understood.
        """
        if (self._removes or self._checks) and not self._is_followed:
            self._follow(plan.description)
        if self._removes:
            return self._sole
        has_optimizer = plan.has_optimizer or any(structure.has_optimizer for structure in self._ranks)
        return tuple(file for file in plan.files if file[0].kind is not Kind.OPTIMIZER or has_optimizer)

    def _follow(self, description: RankDescription) -> None:
        """Plan what depends on what the others hold."""
        catalog = self._catalog_of_all()
        if self._removes:
            self._sole = _with_headers(plan_sole_files(description, catalog))
            stored = catalog.tensors.values()
            pieces = sum(len(tensor.arrangement.pieces) for tensor in stored)
            self._sole_bytes = sum(tensor.nbytes for tensor in stored) + pieces * _BYTES_PER_TENSOR + self._world_size * _BYTES_PER_RANK
        if self._checks:
            self.shared_regions = find_shared(description, catalog)
        self._is_followed = True
        if self._rank != 0:
            self._catalog = None

    def is_known(self, plan: RankPlan) -> bool:
        """Whether the other ranks count on what this rank holds; they need not where each writes all that it holds."""
        return not (self._removes or self._checks) or self._ranks[self._rank].description == plan.told

    def news(self, plan: RankPlan) -> bytes | None:
        """What the others don't know yet of this rank, or None."""
        return None if self._told == plan.digest else plan.structure

    def learn(self, told: Sequence[bytes | None]) -> bool:
        """Take in what each rank told (None: nothing new). Every rank must call this with the same.

        Args:
            told: in rank order; the first time from every rank.

        Returns:
            Whether what was planned before is no longer what the ranks must write, or compare: a rank holds something else. The same on
            every rank.
        """
        structures = [None if data is None else msgspec.msgpack.decode(data, type=RankStructure) for data in told]
        before = self._ranks
        if not before:
            self._ranks = [structure for structure in structures if structure is not None]
        else:
            self._ranks = [new or old for new, old in zip(structures, before, strict=True)]
        mine = told[self._rank]
        if mine is not None and self._plan is not None:
            self._told = self._plan.digest
        if before and all(new.description == old.description for new, old in zip(self._ranks, before, strict=True)):
            return False
        self._catalog = self._metadata = None
        self._is_followed = False
        return (self._removes or self._checks) and bool(before)

    def metadata(self) -> tuple[bytes, bytes]:
        """`metadata.json` for what all ranks write, and its index.

        Raises:
            CaptureError: the ranks' states don't fit together.
            SaveError: a rank's description can't be understood.
        """
        if self._metadata is None:
            catalog = self._catalog_of_all()
            metadata = encode_metadata(catalog)
            self._metadata = metadata, encode_index(replace(catalog, format_version=FORMAT_VERSION), digest_of(metadata))
            self._catalog = None
        return self._metadata

    def _catalog_of_all(self) -> Catalog:
        if self._catalog is None:
            try:
                told = [structure.description for structure in self._ranks]
                own = self._plan.description if self._plan is not None and self._plan.told == told[self._rank] else None
                descriptions = decode_all(told, own)
            except CommunicationError as cause:
                # As the error of a collective it would end this rank, and the others would wait for it.
                raise SaveError(cause.what, found=cause.found, fix=cause.fix) from cause
            # The directory is in none of the files that are made of it.
            self._catalog = plan_catalog(descriptions, self._prefix, self._save_optimizer, directory="", remove_redundancy=self._removes)
        return self._catalog


def _with_headers(files: Sequence[FilePlan]) -> tuple[PlannedFile, ...]:
    headers = [plan_columns(file.names, file.parts, _HEADER_METADATA) for file in files]
    return tuple((file.in_order(header.names), header) for file, header in zip(files, headers, strict=True))
