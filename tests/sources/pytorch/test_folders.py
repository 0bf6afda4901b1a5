"""Folders in the manner of Hugging Face that PyTorch wrote: parts of tensors in safetensors files, state dictionaries in several files."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import reshard
from reshard.cli.listing import list_root
from reshard.errors import CheckpointNotFoundError, DataFileError, MetadataError, UsageError
from reshard.storage import PosixStorage
from tests.sources.pytorch.test_pickles import Runs


@pytest.mark.parametrize("files", [None, {"w": 1, "b": 2}])
def test_what_one_rank_wrote_by_the_hugging_face_writer_is_loaded(tmp_path: Path, files: dict[str, int] | None) -> None:
    state = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.arange(3, dtype=torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "whole"), fqn_to_index_mapping=files))
    checkpoint = reshard.Checkpoint(tmp_path / "whole")
    assert {name: checkpoint[name][...].astype(np.float32).tolist() for name in checkpoint} == {
        name: tensor.float().tolist() for name, tensor in state.items()
    }


def part(path: Path, offsets: Any, rank: int = 1, **tensors: torch.Tensor) -> Path:
    path.mkdir(exist_ok=True)
    metadata = {} if offsets is None else {"DCP_SHARDING_INFO": offsets if isinstance(offsets, str) else json.dumps(offsets)}
    save_file(tensors, path / f"shard-{rank:05d}-model-00001-of-00001.safetensors", metadata)
    return path


def at(*offset: Any) -> dict[str, Any]:
    return {"saved_offsets": list(offset)}


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        (None, "doesn't say where they lie"),
        ("{", "not JSON"),
        ({}, "where a part lies"),
        ({"w": at(0)}, "where a part lies"),
        ({"w": at(-1, 0)}, "unexpected value"),
        ({"w": at(2**63, 0)}, "unexpected value"),
        ({"w": at("0", 0)}, "unexpected value"),
        ({"w": at(1, 0)}, "overlap"),
        ({"w": at(3, 0)}, "hold 16 of 20 elements"),
    ],
)
def test_parts_that_make_up_nothing(tmp_path: Path, offsets: Any, words: str) -> None:
    part(tmp_path / "f", {"w": at(0, 0)}, 1, w=torch.zeros(2, 4))
    part(tmp_path / "f", offsets, 2, w=torch.zeros(2, 4))
    with pytest.raises(MetadataError, match=re.escape(words)):
        reshard.Checkpoint(tmp_path / "f")


def test_parts_of_different_types_and_the_same_part_twice(tmp_path: Path) -> None:
    folder = part(tmp_path / "f", {"w": at(0)}, 1, w=torch.ones(2))
    part(folder, {"w": at(0)}, 2, w=torch.ones(2))
    assert reshard.Checkpoint(folder)["w"][...].tolist() == [1, 1]
    part(folder, {"w": at(2)}, 2, w=torch.ones(2).half())
    with pytest.raises(MetadataError, match="different element types"):
        reshard.Checkpoint(folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two files and an index, as large models of some years ago have them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tensors = {f"layers.{n}.w": torch.arange(6.0).reshape(2, 3) + n for n in range(4)}
    names = {}
    for number in (1, 2):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        mine = {name: tensor for n, (name, tensor) in enumerate(tensors.items()) if n % 2 == number - 1}
        torch.save(mine, folder / file)
        names |= dict.fromkeys(mine, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def test_weights_in_several_files_of_torch_save(saved: Path, tmp_path: Path) -> None:
    model = {f"layers.{n}.w": np.zeros((2, 3), np.float32) for n in range(4)}
    report = reshard.load(saved, model=model)
    assert (report.missing, report.unexpected) == ((), ())
    for n in range(4):
        assert model[f"layers.{n}.w"].tolist() == (np.arange(6).reshape(2, 3) + n).tolist()
    reshard.export_checkpoint(saved, tmp_path / "exported")
    assert set(reshard.Checkpoint(tmp_path / "exported")) == set(model)
    with pytest.raises(UsageError, match="can't be verified"):
        reshard.verify(saved)


def test_weights_in_one_file_of_torch_save(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "note": "text"}, tmp_path / "pytorch_model.bin")
    checkpoint = reshard.Checkpoint(tmp_path)
    assert checkpoint["w"][...].tolist() == [1, 1]
    assert any("note" in note for note in checkpoint.notes)


def test_what_is_wrong_with_several_files(saved: Path, tmp_path: Path) -> None:
    index = saved / "pytorch_model.bin.index.json"
    good = json.loads(index.read_text())
    for wrong in ("../pytorch_model-00001-of-00002.bin", "/etc/passwd", "model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"w": wrong}}))
        with pytest.raises(MetadataError, match="can't be one of the folder's"):
            reshard.Checkpoint(saved)
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "more": "pytorch_model-00002-of-00002.bin"}}))
    with pytest.raises(DataFileError, match="doesn't hold"):
        reshard.Checkpoint(saved)
    index.write_text(json.dumps(good))
    second = saved / "pytorch_model-00002-of-00002.bin"
    sign = tmp_path / "ran"
    torch.save({"w": Runs(__import__("os").system, f"touch {sign}")}, second)
    with pytest.raises(DataFileError, match="nothing of it was run"):
        reshard.Checkpoint(saved)
    assert not sign.exists()
    second.unlink()
    with pytest.raises(DataFileError, match=r"(?s)1 of 2 files of weights is missing.*00002-of-00002"):
        reshard.load(saved, model={"w": np.zeros(1)})


def test_checkpoints_of_pytorch_side_by_side_are_listed(tmp_path: Path, run_reshard: Callable[..., CompletedProcess[str]]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        for step in (9, 10):
            dcp.save({"model": {"w": torch.ones(step)}, "train": {"step": step}}, checkpoint_id=tmp_path / "runs" / f"step-{step}")
        dcp.save({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "runs" / "step-11")
    (tmp_path / "runs" / "logs").mkdir()
    (tmp_path / "runs" / "step-9" / "__0_0.distcp").unlink()
    listing = list_root(PosixStorage(), str(tmp_path / "runs"))
    assert [(line.iteration, line.directory, line.state) for line in listing.iterations] == [
        (9, "step-9", "damaged"),
        (10, "step-10", "committed"),
        (11, "step-11", "committed"),
    ]
    assert "several dictionaries" in (listing.iterations[2].problem or "")
    assert (listing.tracker, listing.is_foreign) == (None, True)
    done = run_reshard("ls", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "step-10" in done.stdout
    assert "have no tracker" in done.stdout
    with pytest.raises(CheckpointNotFoundError, match="this is one checkpoint"):
        list_root(PosixStorage(), str(tmp_path / "runs" / "step-10"))
