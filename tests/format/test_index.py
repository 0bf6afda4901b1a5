"""The compact index: the same catalog as the metadata's, and never a stale or damaged one."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reshard
from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.comm import Communicator
from reshard.format.digest import digest_of
from reshard.format.index import INDEX_FILE, decode_index, encode_index
from reshard.format.metadata import decode_metadata
from reshard.format.names import tensor_name
from reshard.geometry import Mesh, Region
from reshard.geometry.cover import cover_fault
from reshard.geometry.dtypes import by_name
from reshard.sources.native import open_catalog, open_stored
from reshard.state import model_key, slot_key
from reshard.storage.posix import PosixStorage
from reshard.testing import every_placement, run_ranks, split, state_on_rank
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
    assert decode_index(open_stored(PosixStorage(), directory).encode_index(), directory) == catalog


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


_EXTENTS = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    """Tensors whole and cut, alike and not, with several places, without any where they are empty."""
    mesh = Mesh((2, 2), ("a", "b"), tuple(draw(st.permutations(range(4)))))
    tensors = {}
    for number in range(draw(st.integers(0, 6))):
        shape = draw(_EXTENTS)
        layout = split(mesh, *draw(st.sampled_from(every_placement(len(shape), mesh.axes))))
        regions = list(dict.fromkeys(layout.regions(shape).regions()))
        pieces = []
        for region in (region for region in regions if not region.is_empty or draw(st.booleans())):
            fewest = 0 if region.is_empty else 1
            ranks = draw(st.lists(st.sampled_from([0, 1, 300, 70_000, 2**31 - 1]), min_size=fewest, max_size=3, unique=True))
            sites = tuple(Site(f"file-{rank}", rank, draw(st.sampled_from(["", "@1"]))) for rank in ranks)
            pieces.append(Piece(region, sites, tuple(sorted(ranks))))
        kept = layout if draw(st.booleans()) else None
        arrangement = Arrangement(by_name(draw(st.sampled_from(["float32", "bfloat16"]))), shape, kept, tuple(pieces))
        for copy in range(draw(st.integers(1, 2))):
            key = draw(st.sampled_from([model_key, partial(slot_key, "adam_m")]))(f"w.{number}.{copy}")
            tensors[key] = StoredTensor(key, tensor_name(key), arrangement)
    return Catalog("/checkpoint", tensors, tuple(draw(st.lists(st.text(), max_size=2))), draw(st.sampled_from([None, 1])))


@given(catalogs())
def test_an_index_says_what_it_was_made_from(catalog: Catalog) -> None:
    index = encode_index(catalog, b"m")
    found = decode_index(index, "/checkpoint", b"m")
    assert found == catalog
    assert list(found.tensors) == list(catalog.tensors)
    assert found.format_version == catalog.format_version
    assert encode_index(found, b"m") == index
    whole = {key: [piece.region for piece in tensor.arrangement.pieces] for key, tensor in catalog.tensors.items()}
    for key, tensor in found.tensors.items():
        arrangement = tensor.arrangement
        assert hash(arrangement) == hash(catalog.tensors[key].arrangement)
        for wanted in (Region.whole(tensor.global_shape), *whole[key]):
            touching = [number for number, region in enumerate(whole[key]) if region.intersect(wanted) is not None]
            assert list(arrangement.touching(wanted)) == touching == list(catalog.tensors[key].arrangement.touching(wanted))
            assert [arrangement.pieces[number].region for number in touching] == [whole[key][number] for number in touching]


@given(catalogs(), st.randoms(use_true_random=False), st.integers(1, 4))
def test_an_index_that_lies_about_itself_says_nothing_wrong(catalog: Catalog, random: Random, flips: int) -> None:
    """Bytes changed and the digest made anew: whoever does so may say something else, but nothing that a reader would trip over."""
    body = bytearray(encode_index(catalog, b"m")[16:])
    for _ in range(flips):
        body[random.randrange(len(body))] = random.randrange(256)
    found = decode_index(digest_of(bytes(body)) + bytes(body), "/checkpoint")
    for tensor in found.tensors.values() if found is not None else ():
        assert cover_fault([piece.region for piece in tensor.arrangement.pieces], tensor.global_shape) is None
        assert all(piece.sites or piece.region.is_empty for piece in tensor.arrangement.pieces)


def test_a_million_pieces_are_no_objects_before_they_are_asked_for() -> None:
    count = 1000
    shape = (count * 2, 3)
    regions = split(Mesh((count,), ("a",), tuple(range(count))), "a", None).regions(shape).regions()
    pieces = tuple(Piece(region, (Site(f"file-{rank}", rank),), (rank,)) for rank, region in enumerate(regions))
    keys = [model_key(name) for name in "abcd"]
    made = {key: StoredTensor(key, key.parameter, Arrangement(by_name("float32"), shape, None, pieces)) for key in keys}
    index = encode_index(Catalog("/c", made), b"")
    before = _pieces_alive()
    found = decode_index(index, "/c")
    assert found is not None
    arrangement = found.tensors[model_key("b")].arrangement
    assert list(arrangement.touching(Region((4, 0), (5, 1)))) == [2, 3, 4]
    assert _pieces_alive() == before
    assert arrangement.pieces[-1] == pieces[-1]
    assert arrangement.pieces[1:3] == pieces[1:3]
    with pytest.raises(IndexError):
        arrangement.pieces[count]


def _pieces_alive() -> int:
    gc.collect()  # what other tests left
    return sum(type(thing) is Piece for thing in gc.get_objects())
