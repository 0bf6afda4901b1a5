"""Folders of Hugging Face weights, good and bad, written by the official library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import reshard
from reshard.comm import Communicator
from reshard.errors import CheckpointNotFoundError, DamagedCheckpointError, DataFileError, MetadataError, MismatchError
from reshard.sources.huggingface import holds_weights
from reshard.testing import run_ranks

WEIGHTS = {"embed.weight": torch.arange(24.0).reshape(6, 4), "norm.weight": torch.ones(4), "head.weight": -torch.arange(8.0).reshape(2, 4)}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PLACES = {"embed.weight": FILES[0], "norm.weight": FILES[0], "head.weight": FILES[1]}


class Model(nn.Module):
    """Has the tensors of `WEIGHTS`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, dtype=dtype)
        self.norm = nn.LayerNorm(4, bias=False, dtype=dtype)
        self.head = nn.Linear(4, 2, bias=False, dtype=dtype)


def folder(path: Path, weights: Mapping[str, torch.Tensor] = WEIGHTS, index: Mapping[str, str] | None = PLACES) -> Path:
    """A folder with these weights, where the index says, or in one file."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    if index is None:
        save_file(dict(weights), path / "model.safetensors", {"format": "pt"})
        return path
    for file in set(index.values()):
        save_file({name: weights[name] for name, place in index.items() if place == file}, path / file, {"format": "pt"})
    write_index(path, index)
    return path


def write_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1.0}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", [None, PLACES], ids=["one file", "shards"])
def test_folder_is_a_checkpoint(tmp_path: Path, index: Mapping[str, str] | None) -> None:
    checkpoint = reshard.Checkpoint(folder(tmp_path / "weights", index=index))
    assert set(checkpoint) == set(WEIGHTS)
    assert (checkpoint.iteration, checkpoint.common, checkpoint.notes, checkpoint.values) == (None, None, (), {})
    assert checkpoint.config == {"model_type": "tiny"}
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(checkpoint[name][...], tensor.numpy())
    np.testing.assert_array_equal(checkpoint["embed.weight"][2:4, 1:], WEIGHTS["embed.weight"][2:4, 1:].numpy())


def test_files_may_be_links_into_a_cache(tmp_path: Path) -> None:
    real = folder(tmp_path / "blobs")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in real.iterdir():
        os.symlink(file, linked / file.name)
    model = Model()
    reshard.load(linked, model=model)
    assert torch.equal(model.embed.weight, WEIGHTS["embed.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64], ids=str)
def test_floating_types_come_as_they_are_or_are_converted_into_the_models(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    path = folder(tmp_path / "weights", stored)
    as_is = reshard.Checkpoint(path)["embed.weight"][...]
    assert as_is.tobytes() == stored["embed.weight"].view(torch.uint8).numpy().tobytes()
    model = Model()
    report = reshard.load(path, model=model)
    assert len(report.cast) == 3
    assert f"embed.weight: {str(dtype).removeprefix('torch.')} -> float32" in report.cast
    assert torch.equal(model.embed.weight, stored["embed.weight"].to(torch.float32))
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        same = Model(dtype)
        assert reshard.load(path, model=same).cast == ()
        assert torch.equal(same.embed.weight, stored["embed.weight"])
    with pytest.raises(MismatchError):
        reshard.load(path, model=Model(), strict=reshard.Strictness())


@pytest.mark.parametrize("balanced", [False, True])
def test_ranks_load_the_weights_and_nothing_else(tmp_path: Path, balanced: bool) -> None:
    path = folder(tmp_path / "weights")

    def rank(communicator: Communicator) -> reshard.RestoreReport:
        model = {
            "embed.weight": np.zeros((6, 4), np.float32),
            "norm.weight": np.zeros(4, np.float32),
            "head.weight": np.zeros((2, 4), np.float32),
        }
        report = reshard.load(path, model=model, balanced=balanced, communicator=communicator)
        for name, array in model.items():
            np.testing.assert_array_equal(array, WEIGHTS[name].numpy())
        return report

    before = torch.get_rng_state()
    for report in run_ranks(3, rank):
        assert (report.iteration, report.common, report.random, len(report.restored)) == (None, None, "untouched", 3)
    assert torch.equal(before, torch.get_rng_state())


def test_an_optimizer_finds_nothing(tmp_path: Path) -> None:
    model = Model()
    with pytest.raises(MismatchError, match="optimizer"):
        reshard.load(folder(tmp_path / "weights"), model=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_all_missing_files_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "weights", index={"embed.weight": "a.safetensors", "norm.weight": "b.safetensors", "head.weight": "c.safetensors"}
    )
    (path / "a.safetensors").unlink()
    (path / "c.safetensors").unlink()
    model = Model()
    before = model.norm.weight.clone()
    with pytest.raises(DataFileError, match=r"2 of 3 files of weights are missing(.|\n)*a\.safetensors, c\.safetensors"):
        reshard.load(path, model=model)
    assert torch.equal(model.norm.weight, before)


def test_files_that_a_name_promises_are_missed_without_an_index(tmp_path: Path) -> None:
    path = folder(tmp_path / "weights")
    (path / "model.safetensors.index.json").unlink()
    assert set(reshard.Checkpoint(path)) == set(WEIGHTS)
    (path / FILES[0]).unlink()
    with pytest.raises(DataFileError, match=FILES[0]):
        reshard.Checkpoint(path)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..", "x.bin", "a\\b.safetensors", ""]
)
def test_paths_in_the_index_lead_nowhere(tmp_path: Path, file: str) -> None:
    path = folder(tmp_path / "weights")
    save_file(dict(WEIGHTS), tmp_path / "secret.safetensors")
    write_index(path, {**PLACES, "norm.weight": file})
    with pytest.raises(MetadataError, match="can't be one of the folder's"):
        reshard.Checkpoint(path)


def test_index_that_names_what_its_files_do_not_hold(tmp_path: Path) -> None:
    path = folder(tmp_path / "weights")
    write_index(path, {**PLACES, "norm.weight": FILES[1], "more.weight": FILES[1]})
    with pytest.raises(MetadataError, match=r"2 tensors that the file doesn't hold(.|\n)*norm\.weight, more\.weight(.|\n)*model-00002"):
        reshard.Checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "x", "a": "x"}}'])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    path = folder(tmp_path / "weights")
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MetadataError):
        reshard.Checkpoint(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "weights")
    with (path / FILES[1]).open("r+b") as file:
        file.truncate(os.path.getsize(path / FILES[1]) - 1)
    model = Model()
    before = model.embed.weight.clone()
    with pytest.raises(DataFileError, match=r"truncated(.|\n)*model-00002(.|\n)*fetch"):
        reshard.load(path, model=model)
    assert torch.equal(model.embed.weight, before)


def test_two_files_with_one_tensor_and_no_index(tmp_path: Path) -> None:
    path = folder(tmp_path / "weights", index=None)
    os.rename(path / "model.safetensors", path / "first.safetensors")
    save_file(dict(WEIGHTS), path / "second.safetensors")
    with pytest.raises(MetadataError, match=r"first\.safetensors and in second\.safetensors"):
        reshard.Checkpoint(path)


def test_what_the_index_leaves_out_is_ignored_with_a_note(tmp_path: Path) -> None:
    path = folder(tmp_path / "weights")
    save_file({"old": torch.ones(1)}, path / "consolidated.safetensors")
    write_index(path, {name: file for name, file in PLACES.items() if name != "norm.weight"})
    checkpoint = reshard.Checkpoint(path)
    assert set(checkpoint) == {"embed.weight", "head.weight"}
    assert "norm.weight" in checkpoint.notes[0]
    assert "consolidated.safetensors" in checkpoint.notes[1]


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    path = folder(tmp_path / "weights")
    save_file({"only": torch.ones(1)}, path / "model.safetensors")
    checkpoint = reshard.Checkpoint(path)
    assert list(checkpoint) == ["only"]
    assert any("index" in note for note in checkpoint.notes)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError):
        reshard.Checkpoint(tmp_path)
    write_index(tmp_path, PLACES)
    with pytest.raises(DataFileError, match=f"{FILES[0]}, {FILES[1]}"):
        reshard.Checkpoint(tmp_path)


def test_config_that_is_no_json(tmp_path: Path) -> None:
    path = folder(tmp_path / "weights")
    (path / "config.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match=r"config\.json"):
        _ = reshard.Checkpoint(path).config


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"model.safetensors"}, True),
        ({"model.safetensors.index.json"}, True),
        ({"config.json", "weights.safetensors"}, True),
        ({"model-00001-of-00009.safetensors"}, True),
        ({"config.json"}, False),
        ({"weights.safetensors"}, False),
        ({"CKP-model-0000000-0000001.safetensors", "config.json"}, False),
        ({"model-00001-of-00009.safetensors", "metadata.json"}, False),
        ({"model.safetensors", "common.json"}, False),
    ],
)
def test_which_directories_are_folders_of_weights(names: set[str], expected: bool) -> None:
    assert holds_weights(names) is expected
