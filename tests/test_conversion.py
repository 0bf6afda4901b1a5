"""Checkpoints of other programs become iterations of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import optim

import reshard
from reshard.cli.export import Format, export
from reshard.comm import Communicator
from reshard.conversion import convert
from reshard.errors import UsageError
from reshard.families import family
from reshard.planning.mapping.mappers import sizes_in
from reshard.state import model_key
from reshard.testing import mesh_of, run_ranks, split, tensor_on_rank
from reshard.verification import verify
from tests.sources.pytorch.test_dcp import save
from tests.sources.pytorch.test_saved_file import run, train

GOLDEN_HF = Path(__file__).resolve().parent / "data" / "golden_hf"


@pytest.fixture
def trained(tmp_path: Path) -> tuple[torch.nn.Module, optim.Optimizer, Path]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = run()
    train(model, optimizer, 3)
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optim": state, "lr_scheduler": {"last_epoch": 3}}, tmp_path / "step-3")
    return model, optimizer, tmp_path / "step-3"


def test_a_run_goes_on_from_what_was_converted(trained: Any, tmp_path: Path) -> None:
    model, optimizer, source = trained
    seen: list[tuple[int, int]] = []
    done = convert(source, tmp_path / "root", progress=lambda read, total: seen.append((read, total)))
    assert (done.iteration, done.notes) == (3, ())
    assert seen[-1][0] == seen[-1][1] == done.nbytes
    assert verify(tmp_path / "root").is_intact
    other, fresh = run(seed=1)
    report = reshard.load(tmp_path / "root", model=other, optimizer=fresh)
    assert report.iteration == 3
    assert report.extra == {"lr_scheduler": {"last_epoch": 3}}
    assert "global_step" in report.restored
    assert train(other, fresh, 2) == train(model, optimizer, 2)


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN_HF.iterdir()))
def test_weights_of_hugging_face_become_what_mindspore_transformers_makes_of_them(case: str, run_reshard: Any, tmp_path: Path) -> None:
    if case == "hf_qwen3_tied":
        done = run_reshard("export", GOLDEN_HF / case / "hf", tmp_path / "root", "--format", "mindspore")
        assert done.returncode == 0, done.stderr
        assert "iteration_00000000" in done.stdout
    else:
        convert(GOLDEN_HF / case / "hf", tmp_path / "root", naming="mindspore")
    checkpoint = reshard.Checkpoint(tmp_path / "root")
    with np.load(GOLDEN_HF / case / "expected_mf.npz") as expected:
        assert set(checkpoint) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(checkpoint[name][...], expected[name], name)
    assert verify(tmp_path / "root").is_intact
    # And from there back, by the configuration that came along.
    reshard.export_checkpoint(tmp_path / "root", tmp_path / "back")
    before, back = reshard.Checkpoint(GOLDEN_HF / case / "hf"), reshard.Checkpoint(tmp_path / "back")
    for name in back:
        np.testing.assert_array_equal(back[name][...], before[name][...], name)
    with pytest.raises(UsageError, match="not overwritten"):
        convert(GOLDEN_HF / case / "hf", tmp_path / "root", naming="mindspore")
    with pytest.raises(UsageError, match="never replaced"):
        export("root", "folder", Format.MINDSPORE, force=True)


def test_a_run_under_the_names_of_hugging_face_keeps_its_optimizer_under_those_of_mindspore(tmp_path: Path) -> None:
    case = min(GOLDEN_HF.iterdir())
    folder = reshard.Checkpoint(case / "hf")
    weights = {name: torch.nn.Parameter(torch.from_numpy(folder[name][...].copy())) for name in folder}
    module = torch.nn.Module()
    for name, weight in weights.items():
        *path, last = name.split(".")
        holder = module
        for part in path:
            if part not in dict(holder.named_children()):
                holder.add_module(part, torch.nn.Module())
            holder = holder.get_submodule(part)
        holder.register_parameter(last, weight)
    optimizer = optim.AdamW(module.parameters())
    torch.stack([weight.square().sum() for weight in weights.values()]).sum().backward()
    optimizer.step()
    reshard.save(tmp_path / "run", 5, model=module, optimizer=optimizer, extra={"config": folder.config})
    done = convert(tmp_path / "run", tmp_path / "direct", naming="mindspore", dtype="bfloat16")
    assert (done.iteration, len(done.notes)) == (5, 1)
    assert "random generators" in done.notes[0]
    reshard.save(tmp_path / "saved", 5, model=module, optimizer=optimizer, mapping=family("qwen3", **sizes_in(folder.config)))
    direct, saved = reshard.Checkpoint(tmp_path / "direct"), reshard.Checkpoint(tmp_path / "saved")
    assert set(direct) == set(saved)
    assert "adam_m.decoder.layers.0.self_attention.linear_qkv.weight" in direct
    for name in saved:
        expected = saved[name][...]
        if not name.startswith("adam") and expected.dtype == np.float32:
            expected = expected.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(direct[name][...].view(np.uint8), expected.view(np.uint8), name)
    with pytest.raises(UsageError, match="nothing describes the model"):
        convert(tmp_path / "saved", tmp_path / "other", naming="mindspore")
    with pytest.raises(UsageError, match="floating types only"):
        convert(tmp_path / "saved", tmp_path / "other", dtype="int8")


def test_nothing_is_overwritten(trained: Any, tmp_path: Path) -> None:
    _, _, source = trained
    convert(source, tmp_path / "root")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "root").rglob("*"))
    with pytest.raises(UsageError, match="not overwritten"):
        convert(source, tmp_path / "root")
    with pytest.raises(UsageError, match="newer"):
        convert(source, tmp_path / "root", iteration=2)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "root").rglob("*")) == before
    assert convert(source, tmp_path / "root", iteration=4).iteration == 4
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        convert(source, tmp_path / "file")


def test_parts_that_no_layout_can_say_become_whole_tensors(tmp_path: Path) -> None:
    """A checkpoint that MindSpore Transformers would refuse becomes one that it reads."""
    array = np.arange(21.0, dtype=np.float32).reshape(7, 3)

    def save_part(comm: Communicator) -> None:
        tensor = tensor_on_rank(model_key("w"), array, split(mesh_of(dp=4), "dp", None), comm.rank)
        reshard.save(tmp_path / "uneven", 1, model={"w": tensor}, communicator=comm)

    run_ranks(4, save_part)
    assert reshard.Checkpoint(tmp_path / "uneven")["w"].layout is None
    convert(tmp_path / "uneven", tmp_path / "whole")
    metadata = json.loads((tmp_path / "whole" / "iteration_00000001" / "metadata.json").read_text())
    assert metadata["state_dict_metadata"]["w"]["chunk"] == [{"global_offset": [0], "local_shape": [7, 3], "offset": [0, 0]}]
    np.testing.assert_array_equal(reshard.Checkpoint(tmp_path / "whole")["w"][...], array)


def test_large_tensors_are_read_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        "wide": torch.randn(3, 1 << 17),
        "long": torch.randn(1 << 17, 3),
        "cube": torch.randn(2, 1, 3, 1 << 16),
        "small": torch.ones(3),
    }
    torch.save(state, tmp_path / "weights.pt")
    largest = 0
    read = reshard.checkpoint.TensorView.read

    def counted(self: Any, region: Any = None) -> np.ndarray:
        nonlocal largest
        values = read(self, region)
        largest = max(largest, values.nbytes)
        return values

    monkeypatch.setattr(reshard.checkpoint.TensorView, "read", counted)
    budget = 1 << 20
    done = convert(tmp_path / "weights.pt", tmp_path / "root", memory_budget=budget)
    assert done.iteration == 0
    assert 0 < largest <= budget // 4
    checkpoint = reshard.Checkpoint(tmp_path / "root")
    for name, tensor in state.items():
        np.testing.assert_array_equal(checkpoint[name][...], tensor.numpy(), name)
    assert verify(tmp_path / "root").is_intact


def test_prefixes_are_named(tmp_path: Path) -> None:
    save({"teacher": {"w": torch.ones(2)}, "student": {"w": torch.zeros(2)}}, tmp_path / "both")
    convert(tmp_path / "both", tmp_path / "root", model_prefix="student.")
    assert reshard.Checkpoint(tmp_path / "root")["w"][...].tolist() == [0, 0]
    with pytest.raises(UsageError, match="prefix"):
        convert(tmp_path / "both", tmp_path / "other", model_prefix="nobody.")


def test_the_command(trained: Any, tmp_path: Path, run_reshard: Any) -> None:
    _, _, source = trained
    done = run_reshard("convert", str(source), str(tmp_path / "root"), "--json")
    assert json.loads(done.stdout)["iteration"] == 3
    assert "iteration 3" in run_reshard("show", str(tmp_path / "root")).stdout
