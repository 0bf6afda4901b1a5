"""A directory becomes a catalog, and files are held against it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from reshard.catalog import Place
from reshard.errors import CheckpointNotFoundError, DataFileError, MetadataError
from reshard.format.digest import digest_of
from reshard.format.index import decode_index
from reshard.format.names import rank_extra_file, tensor_name
from reshard.format.seal import read_seal
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.sources.native import check_promises, open_catalog, open_stored, read_own_extra
from reshard.sources.relay import read_for_all
from reshard.sources.stored import Headers
from reshard.state import GLOBAL_STEP, Kind, model_key, slot_key
from reshard.storage import PosixStorage
from tests import saving_runs as runs
from tests.golden import CASES, expected, iteration
from tests.seals import unseal

STORAGE = PosixStorage()
F32 = by_name("float32")


@pytest.fixture
def copy(tmp_path):
    """A writable copy of a golden iteration."""

    def make(case: str) -> Path:
        return shutil.copytree(iteration(case), tmp_path / case)

    return make


def opened(directory):
    return open_catalog(STORAGE, str(directory)), Headers(STORAGE, str(directory))


@pytest.mark.parametrize("case", CASES)
def test_golden_catalogs(case):
    catalog, headers = opened(iteration(case))
    whole = expected(case)
    assert {tensor_name(key) for key in catalog.tensors} == set(whole)
    for key, tensor in catalog.tensors.items():
        assert tensor.global_shape == whole[tensor_name(key)].shape
        assert (key.kind is Kind.OPTIMIZER) == tensor_name(key).startswith(("adam_", "global_step", "learning_rate"))
    notes = check_promises(catalog, headers)
    assert ("learning_rate" in "".join(notes)) == (case == "handmade_layout_null")


def test_a_single_card_has_whole_tensors():
    catalog, _ = opened(iteration("single_real_train"))
    rate = catalog.tensors[slot_key("learning_rate", "")]
    assert (rate.global_shape, rate.dtype, rate.layout) == ((), F32, None)
    assert rate.chunks[0].region == Region((), ())
    assert catalog.tensors[GLOBAL_STEP].global_shape == (1,)
    assert ["as whole" in note for note in catalog.notes] == [True, False]


def test_metadata_missing_from_several_ranks(copy):
    directory = copy("dp2_tp2")
    (directory / "metadata.json").unlink()
    with pytest.raises(MetadataError, match=r"metadata\.json is missing from a checkpoint of several ranks") as caught:
        opened(directory)
    assert "4 ranks" in str(caught.value)
    assert "restore metadata.json" in str(caught.value.fix)
    assert caught.value.file == str(directory)


def test_one_file_of_several_ranks_is_not_taken_for_a_whole(copy):
    directory = copy("dp2_tp2_noopt")
    for path in [directory / "metadata.json", *directory.glob("*000[123]-0000004.safetensors")]:
        path.unlink()
    with pytest.raises(MetadataError, match="several ranks"):
        opened(directory)


def test_two_files_with_one_name(copy):
    directory = copy("single_real_train")
    shutil.copy(directory / "qwen3-model-0000000-0000001.safetensors", directory / "other-model-0000000-0000001.safetensors")
    with pytest.raises(MetadataError, match="two files hold a tensor of one name"):
        opened(directory)


def test_files_of_any_name_are_whole_tensors_without_metadata(tmp_path):
    safetensors.numpy.save_file({"w": np.arange(3)}, tmp_path / "weights.safetensors")
    catalog, _ = opened(tmp_path)
    assert set(catalog.tensors) == {model_key("w")}


def test_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(CheckpointNotFoundError):
            opened(path)


def test_no_files(tmp_path):
    (tmp_path / "common.json").write_text("{}")
    with pytest.raises(MetadataError, match="neither"):
        opened(tmp_path)


def test_damaged_metadata_is_named(copy):
    directory = copy("dp2_tp2")
    (directory / "metadata.json").write_text("{")
    with pytest.raises(MetadataError, match="not JSON") as caught:
        opened(directory)
    assert caught.value.file == str(directory / "metadata.json")


def test_a_promised_file_is_missing(copy):
    directory = copy("dp2_tp2")
    (directory / "qwen3-opt-0000002-0000004.safetensors").unlink()
    catalog, headers = opened(directory)
    with pytest.raises(DataFileError, match=r"missing(.|\n)*qwen3-opt-0000002"):
        check_promises(catalog, headers)
    model_files = [path.name for path in directory.glob("*-model-*")]
    assert check_promises(catalog, headers, model_files) == (), "weights alone need no optimizer file"


def test_a_promised_file_is_truncated(copy):
    directory = copy("dp2_tp2")
    path = directory / "qwen3-model-0000001-0000004.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    catalog, headers = opened(directory)
    with pytest.raises(DataFileError, match=r"truncated(.|\n)*56024 bytes"):
        check_promises(catalog, headers)


def rewrite(path, change):
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    path.unlink()
    safetensors.numpy.save_file(tensors, path, {"format": "ms"})


NAME = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(NAME), "doesn't hold"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:16]}), r"shape \[16\](.|\n)*shape \[32\]"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].reshape(1, 32)}), r"shape \[1, 32\]"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].astype(np.float64)}), "float64(.|\n)*float32"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].view(np.int32)}), "int32(.|\n)*float32"),
    ],
)
def test_a_file_is_not_what_metadata_promises(copy, change, said):
    directory = copy("dp2_tp2_noopt")
    path = directory / "qwen3-model-0000002-0000004.safetensors"
    rewrite(path, change)
    catalog, headers = opened(directory)
    with pytest.raises(DataFileError, match=said) as caught:
        check_promises(catalog, headers)
    assert caught.value.file == str(path)
    assert caught.value.tensor == NAME
    place = Place(path.name, NAME, 2)
    with pytest.raises(DataFileError, match=said):
        headers.entry(place, F32, (32,))


def test_what_files_hold_beyond_metadata_is_noted(copy):
    directory = copy("dp2_tp2_noopt")
    rewrite(directory / "qwen3-model-0000002-0000004.safetensors", lambda tensors: tensors.update({f"x{n}": np.zeros(1) for n in range(7)}))
    catalog, headers = opened(directory)
    (note,) = check_promises(catalog, headers)
    assert "x0, x1, x2, x3, x4 and 2 more" in note


def test_an_unknown_element_type_is_taken_from_the_file(copy):
    directory = copy("dp2_tp2_noopt")
    path = directory / "metadata.json"
    document = json.loads(path.read_text())
    document["state_dict_metadata"][NAME]["properties"]["dtype"] = "HiFloat8"
    path.unlink()
    path.write_text(json.dumps(document))
    assert opened(directory)[0].tensors[model_key(NAME)].dtype == F32


@pytest.fixture
def sealed(tmp_path):
    """An iteration of two ranks that this project wrote."""
    runs.save(STORAGE, [(1, 10)], root=str(tmp_path / "root"), world_size=2)
    return tmp_path / "root" / "iteration_00000001"


MODEL, OTHER = "CKP-model-0000000-0000002.safetensors", "CKP-model-0000001-0000002.safetensors"


def test_headers_are_held_to_the_seal_and_give_the_digests(sealed):
    seal = read_seal(STORAGE, str(sealed))
    headers = Headers(STORAGE, str(sealed), seal)
    for file in (MODEL, OTHER):
        for entry in headers.get(file).entries.values():
            assert entry.digests == digest_of((sealed / file).read_bytes()[entry.begin : entry.end])
    shutil.copy(sealed / MODEL, sealed / OTHER)
    shutil.copy(sealed / MODEL, sealed / "CKP-model-0000002-0000002.safetensors")
    headers = Headers(STORAGE, str(sealed), seal)
    headers.get(MODEL)
    with pytest.raises(DataFileError, match=r"header of the file is not as it was saved(.|\n)*CKP-model-0000001"):
        headers.get(OTHER)
    with pytest.raises(DataFileError, match="doesn't list"):
        headers.get("CKP-model-0000002-0000002.safetensors")


def test_extras_are_held_to_the_seal(sealed):
    seal = read_seal(STORAGE, str(sealed))
    path = sealed / "extra" / rank_extra_file(1)
    tree = read_own_extra(STORAGE, str(sealed), path.name, seal)
    assert tree["rank_values"]["random"].tolist() == list(range(11))
    shutil.copy(path, sealed / "extra" / rank_extra_file(2))
    assert read_own_extra(STORAGE, str(sealed), rank_extra_file(2), seal) is None, "none of this checkpoint's"
    assert read_own_extra(STORAGE, str(sealed), rank_extra_file(2), None) is not None
    path.unlink()
    assert read_own_extra(STORAGE, str(sealed), path.name, None) is None
    with pytest.raises(DataFileError, match=r"missing(.|\n)*rank-0000001"):
        read_own_extra(STORAGE, str(sealed), path.name, seal)
    shutil.copy(sealed / "extra" / rank_extra_file(0), path)
    with pytest.raises(DataFileError, match="as the seal says"):
        read_own_extra(STORAGE, str(sealed), path.name, seal)


def test_opening_holds_what_is_small_to_the_seal(sealed):
    stored = open_stored(STORAGE, str(sealed))
    assert stored.seal is not None
    assert stored.index == (sealed / "extra/metadata.index").read_bytes()
    assert stored.catalog.notes == ()
    assert read_for_all(STORAGE, str(sealed), balanced=False).seal == stored.seal
    for name in ("metadata.json", "common.json", "seal.json"):
        data = (sealed / name).read_bytes()
        (sealed / name).write_bytes(data.replace(b"1", b"2", 1))
        with pytest.raises(MetadataError, match="not as it was saved") as caught:
            open_stored(STORAGE, str(sealed))
        assert caught.value.file == str(sealed / name)
        (sealed / name).unlink()
        with pytest.raises(MetadataError, match="missing") as caught:
            open_stored(STORAGE, str(sealed))
        assert caught.value.file == str(sealed / name)
        (sealed / name).write_bytes(data)
    (sealed / "extra/metadata.index").write_bytes(b"damaged")
    assert open_stored(STORAGE, str(sealed)).index is None


def test_without_a_seal_there_is_a_note_and_every_rank_hears_it(sealed):
    unseal(sealed)
    stored = open_stored(STORAGE, str(sealed))
    assert stored.seal is None
    (note,) = stored.catalog.notes
    assert "no seal.json" in note
    told = decode_index(read_for_all(STORAGE, str(sealed), balanced=True).index, str(sealed))
    assert told is not None
    assert told.notes == (note,)


def test_a_header_is_read_once(copy, monkeypatch):
    from reshard.sources import stored

    directory = copy("dp2_tp2_noopt")
    read = []
    real = stored.read_header
    monkeypatch.setattr(stored, "read_header", lambda storage, path, *rest, **more: read.append(path) or real(storage, path, *rest, **more))
    catalog, headers = opened(directory)
    assert read == [], "metadata alone makes the catalog"
    check_promises(catalog, headers)
    check_promises(catalog, headers)
    assert len(read) == 4
