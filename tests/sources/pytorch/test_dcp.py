"""Checkpoints of torch.distributed.checkpoint, written by real ranks, resume under other strategies."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import reshard
from reshard.errors import DataFileError, MetadataError
from tests.processes import RankPool
from tests.sources.pytorch import dcp_ranks
from tests.sources.pytorch.test_pickles import Runs

WRITTEN = {"fsdp over tp": (4, "titan"), "tp": (2, "nested"), "fsdp": (4, "app"), "whole": (1, "nested")}
READERS = {"whole": 1, "tp": 2, "fsdp": 2, "ddp": 2, "fsdp over tp": 4}


@pytest.fixture(scope="module")
def written(rank_pool: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    found = {}
    for kind, (world, form) in WRITTEN.items():
        directory = tmp_path_factory.mktemp("dcp") / "step-3"
        found[kind] = directory, rank_pool(world).run(dcp_ranks.save, directory, kind, form)[0]
    return found


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITTEN)
def test_a_run_resumes_under_another_strategy(
    rank_pool: Callable[[int], RankPool], written: dict[str, tuple[Path, Any]], writer: str, reader: str
) -> None:
    directory, before = written[writer]
    for outcome in rank_pool(READERS[reader]).run(dcp_ranks.resume, directory, reader, len(writer + reader) % 2 == 0):
        assert outcome.whole.keys() == before.whole.keys()
        for name, array in before.whole.items():
            np.testing.assert_array_equal(outcome.whole[name], array, name)
        np.testing.assert_allclose(outcome.losses, before.losses, rtol=2e-6)
        if reader == writer:
            assert outcome.losses == before.losses
        said = outcome.said
        assert said["steps"] == {3}
        assert said["decay"] == [0.1, 0.0]
        assert said["common"].global_step == 3
        assert (said["missing"], said["unexpected"], said["notes"]) == ((), (), ())
        # Balanced, what several ranks need is read once.
        assert said["read"] > 0
        form = WRITTEN[writer][1]
        schedule = {"last_epoch": 3, "_last_lr": [0.05, 0.05]}
        if form == "titan":
            assert said["extra"]["lr_scheduler"] == schedule
            assert said["extra"]["train_state"]["step"].tolist() == 3
        else:
            assert said["extra"] == (None if form == "app" else {"lr_scheduler": schedule})


@pytest.mark.parametrize(("kind", "world"), [("fsdp over tp", 4), ("tp", 2)])
def test_what_ranks_wrote_by_the_hugging_face_writer_is_loaded(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, kind: str, world: int
) -> None:
    whole = rank_pool(world).run(dcp_ranks.save_weights, tmp_path / "parts", kind)[0]
    assert len(list((tmp_path / "parts").glob("shard-*.safetensors"))) == world
    checkpoint = reshard.Checkpoint(tmp_path / "parts")
    assert set(checkpoint) == set(whole)
    assert any(len(checkpoint[name].chunks) == world for name in whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(checkpoint[name][...], array, name)
    for reader in ("fsdp", "tp"):
        for found in rank_pool(2).run(dcp_ranks.load_weights, tmp_path / "parts", reader, reader == "tp"):
            for name, array in whole.items():
                np.testing.assert_array_equal(found[name], array, name)


def test_a_checkpoint_is_looked_into_without_a_framework(written: dict[str, tuple[Path, Any]]) -> None:
    directory, before = written["fsdp over tp"]
    checkpoint = reshard.Checkpoint(directory)
    assert checkpoint.common is not None
    assert checkpoint.common.global_step == 3
    assert {"up.weight", "adam_m.up.weight", "adam_v.norm.bias"} <= set(checkpoint)
    for name in ("up.weight", "adam_m.down.weight"):
        whole = next(array for key, array in before.whole.items() if str(checkpoint[name].key) == key)
        np.testing.assert_array_equal(checkpoint[name][...], whole)
        np.testing.assert_array_equal(checkpoint[name][1:3, ::2], whole[1:3, ::2])
    assert len(checkpoint["up.weight"].chunks) > 1
    assert {group.options["weight_decay"] for group in checkpoint.groups} == {0.1, 0.0}
    assert checkpoint.check() == ()


def save(state: dict[str, Any], directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(state, checkpoint_id=directory)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    directory = tmp_path / "small"
    state = {"model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5, dtype=torch.bfloat16)}, "train": {"step": 7}}
    save(state, directory)
    return directory


def test_a_hostile_metadata_runs_nothing(small: Path, tmp_path: Path) -> None:
    import os

    sign = tmp_path / "ran"
    (small / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Runs(os.system, f"touch {sign}")}))
    with pytest.raises(MetadataError, match="nothing of it was run"):
        reshard.Checkpoint(small)
    assert not sign.exists()


def change(small: Path, edit: Callable[[Any], None]) -> None:
    metadata = pickle.loads((small / ".metadata").read_bytes())
    edit(metadata)
    (small / ".metadata").write_bytes(pickle.dumps(metadata))


def info_of(metadata: Any, name: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def test_places_are_checked(small: Path) -> None:
    def set_fields(**fields: Any) -> Callable[[Any], None]:
        return lambda metadata: vars(info_of(metadata, "model.a")).update(fields)

    size = (small / "__0_0.distcp").stat().st_size
    before = (small / ".metadata").read_bytes()
    cases: list[tuple[Callable[[Any], None], type[Exception], str]] = [
        (set_fields(relative_path="../../etc/passwd"), MetadataError, "leads out"),
        (set_fields(relative_path="/etc/passwd"), MetadataError, "leads out"),
        (set_fields(relative_path="__9_0.distcp"), DataFileError, "missing"),
        (set_fields(offset=size), DataFileError, "not what torch.save writes"),
        (set_fields(offset=1), DataFileError, "not what torch.save writes"),
        (set_fields(length=2**62), MetadataError, "can't be understood"),
        (set_fields(length=2**40), DataFileError, "not what torch.save writes"),
        (set_fields(offset=-1), MetadataError, "can't be understood"),
        (set_fields(transform_descriptors=["zstd"]), MetadataError, "transformed"),
        (lambda m: vars(m.state_dict_metadata["model.a"]).update(size=torch.Size([3, 5])), MetadataError, "cover"),
        (lambda m: vars(m.state_dict_metadata["model.a"]).update(size=torch.Size([2**61, 4])), MetadataError, "no tensor has"),
        (lambda m: m.state_dict_metadata["model.a"].chunks.clear(), MetadataError, "cover"),
        (lambda m: m.storage_data.pop(next(i for i in m.storage_data if i.fqn == "model.a")), MetadataError, "stored nowhere"),
        (lambda m: vars(info_of(m, "model.a")).update(vars(info_of(m, "model.b"))), DataFileError, "not what the metadata promises"),
        (lambda m: setattr(m, "storage_data", [1]), MetadataError, "can't be understood"),
    ]
    for edit, kind, words in cases:
        (small / ".metadata").write_bytes(before)
        change(small, edit)
        with pytest.raises(kind, match=words):
            reshard.Checkpoint(small)["a"][...]
        with pytest.raises(kind, match=words):
            reshard.load(small, model={"a": np.zeros((3, 4), np.float32), "b": np.zeros(5)}, strict=reshard.Strictness(dtype="ignore"))


def test_a_truncated_file_is_an_error(small: Path) -> None:
    file = small / "__0_0.distcp"
    data = file.read_bytes()
    for end in (0, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises((DataFileError, MetadataError)):
            reshard.Checkpoint(small).check()
    file.unlink()
    with pytest.raises(DataFileError, match="missing"):
        reshard.Checkpoint(small)


def test_what_is_no_tensor_comes_back_or_is_named(tmp_path: Path) -> None:
    rest = {"rng": torch.arange(5, dtype=torch.uint8), "odd": 1 + 2j, "nested": [1, {"a": (2, None)}]}
    directory = tmp_path / "more"
    save({"model": {"w": torch.ones(2)}, "state": rest}, directory)
    checkpoint = reshard.Checkpoint(directory)
    extra = checkpoint.values["extra"]["state"]
    assert extra["rng"].array.tolist() == [0, 1, 2, 3, 4]
    assert list(checkpoint) == ["w"]
    assert any("state.odd" in note and "builtins.complex" in note for note in checkpoint.notes)


def test_prefixes_that_no_one_knows_are_asked_for(tmp_path: Path) -> None:
    one, two = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    save({"teacher": one, "student": two}, tmp_path / "both")
    with pytest.raises(reshard.errors.UsageError, match="several dictionaries"):
        reshard.Checkpoint(tmp_path / "both")
    save({"net": one}, tmp_path / "one")
    assert list(reshard.Checkpoint(tmp_path / "one")) == ["w"]


def test_a_folder_of_that_name_is_resolved(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "root" / "step-7")
    with pytest.raises(reshard.errors.CheckpointNotFoundError, match=r"step-7"):
        reshard.Checkpoint(tmp_path / "root")


def test_there_is_nothing_to_verify(small: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    for path in (small, tmp_path / "w.pt"):
        with pytest.raises(reshard.errors.UsageError, match="can't be verified"):
            reshard.verify(path)
