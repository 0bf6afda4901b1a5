"""The compact index: the same catalog as the metadata's, and never a stale or damaged one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.format.index import INDEX_FILE, decode_index, digest_of, encode_index
from reshard.format.metadata import decode_metadata
from reshard.sources.native import open_catalog, open_index
from reshard.storage.posix import PosixStorage
from reshard.testing import run_ranks, state_on_rank
from tests import golden
from tests.strategies import Strategy, arrays, layouts

STRATEGY = Strategy(dp=2, tp=2, fsdp=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four ranks: even, uneven, replicated, empty and 0-d tensors."""
    root = tmp_path_factory.mktemp("root")
    whole, placed = arrays(), layouts(STRATEGY)

    def save(comm: Communicator) -> None:
        tensors = state_on_rank(whole, placed, comm.rank).tensors
        model = {key.parameter: tensor for key, tensor in tensors.items() if key.slot is None}
        reshard.save(root, 1, model=model, communicator=comm)

    run_ranks(STRATEGY.world_size, save)
    return root / "iteration_00000001"


def test_what_a_save_writes_is_the_metadata_said_shorter(checkpoint: Path) -> None:
    metadata = (checkpoint / "metadata.json").read_bytes()
    index = (checkpoint / "extra" / INDEX_FILE).read_bytes()
    assert decode_index(index, str(checkpoint), digest_of(metadata)) == decode_metadata(metadata, str(checkpoint / "metadata.json"))


@pytest.mark.parametrize("case", golden.CASES)
def test_an_index_carries_every_catalog(case: str) -> None:
    directory = str(golden.iteration(case))
    catalog = open_catalog(PosixStorage(), directory)
    assert decode_index(encode_index(catalog, b"m"), directory, b"m") == catalog
    assert decode_index(open_index(PosixStorage(), directory), directory) == catalog


def test_other_metadata_makes_an_index_stale(checkpoint: Path) -> None:
    index = (checkpoint / "extra" / INDEX_FILE).read_bytes()
    assert decode_index(index, str(checkpoint), digest_of(b"other")) is None


def test_no_flipped_bit_of_an_index_is_believed(checkpoint: Path) -> None:
    index = (checkpoint / "extra" / INDEX_FILE).read_bytes()
    expected = decode_index(index, str(checkpoint))
    assert expected is not None
    random = np.random.default_rng(3)
    for at in random.integers(0, 8 * len(index), 300):
        flipped = bytearray(index)
        flipped[at // 8] ^= 1 << (at % 8)
        assert decode_index(bytes(flipped), str(checkpoint)) is None


@pytest.mark.parametrize("damage", [b"", b"x" * 40, digest_of(b"\x80") + b"\x80"])
def test_a_damaged_or_missing_index_is_made_up_for(checkpoint: Path, damage: bytes) -> None:
    path = checkpoint / "extra" / INDEX_FILE
    index, expected = path.read_bytes(), open_catalog(PosixStorage(), str(checkpoint))
    try:
        path.write_bytes(damage)
        assert open_catalog(PosixStorage(), str(checkpoint)) == expected
        path.unlink()
        assert open_catalog(PosixStorage(), str(checkpoint)) == expected
    finally:
        path.write_bytes(index)
