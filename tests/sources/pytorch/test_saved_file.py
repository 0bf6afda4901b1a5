"""Files of `torch.save`: opened without torch's unpickler, loaded like any checkpoint, or refused with a reason."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

import reshard
from reshard.comm import Communicator
from reshard.errors import CheckpointNotFoundError, DataFileError
from reshard.testing import run_ranks
from tests.sources.pytorch.test_pickles import Runs

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES += [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


class Net(nn.Module):
    """Matrices, vectors and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.two = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.norm(self.one(x)))


def run(groups: Callable[[nn.Module], Any] = lambda model: model.parameters(), seed: int = 0) -> tuple[nn.Module, optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, optim.AdamW(groups(model), lr=0.01)


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        loss = model(torch.ones(3, 4) * torch.arange(3.0 + step)[step:, None]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_dimensions(model: nn.Module) -> Any:
    several = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}, {"params": several, "weight_decay": 0.1}]


@pytest.mark.parametrize("groups", [lambda model: model.parameters(), lambda model: model.named_parameters(), by_dimensions])
def test_a_run_resumes_with_its_optimizer(tmp_path: Path, groups: Any) -> None:
    model, optimizer = run(groups)
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}, tmp_path / "run.pt")
    other, fresh = run(groups, seed=1)
    for group in fresh.param_groups:
        group["lr"] = 1.0
    report = reshard.load(tmp_path / "run.pt", model=other, optimizer=fresh)
    assert report.notes == ()
    assert report.extra == {"epoch": 2}
    assert report.common is not None
    assert report.common.global_step == 3
    assert train(other, fresh, 2) == train(model, optimizer, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_numbers_that_could_mean_several_parameters_are_left_out(tmp_path: Path) -> None:
    def mixed(model: Any) -> Any:
        return [{"params": [model.two.weight, model.one.bias, model.norm.bias]}, {"params": [model.one.weight, model.norm.weight]}]

    model, optimizer = run(mixed)
    train(model, optimizer, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    checkpoint = reshard.Checkpoint(tmp_path / "run.pt")
    assert set(checkpoint) == set(model.state_dict())
    assert any("which parameter has which number" in note for note in checkpoint.notes)
    # One group, but not the model's order: shapes tell.
    optimizer = optim.AdamW(list(reversed(list(model.parameters()))), lr=0.1)
    train(model, optimizer, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "other.pt")
    assert any("which parameter has which number" in note for note in reshard.Checkpoint(tmp_path / "other.pt").notes)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 1}, lambda state: {"model": state}])
def test_weights_alone(tmp_path: Path, wrap: Any) -> None:
    model, _ = run()
    torch.save(wrap(model.state_dict()), tmp_path / "weights.bin")
    other, _ = run(seed=1)
    reshard.load(tmp_path / "weights.bin", model=other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_every_type_view_and_shared_storage_comes_back(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state: dict[str, Any] = {f"t{index}": torch.ones(3, 2).to(dtype) for index, dtype in enumerate(DTYPES)}
    state |= {"whole": base, "rows": base[1:3], "tied": base, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    state["parameter"] = nn.Parameter(torch.ones(2))
    torch.save(state, tmp_path / "all.pth")
    checkpoint = reshard.Checkpoint(tmp_path / "all.pth")
    assert set(checkpoint) == set(state)
    for name, tensor in state.items():
        found = checkpoint[name][...]
        assert found.shape == tuple(tensor.shape)
        assert found.tobytes() == tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
    np.testing.assert_array_equal(checkpoint["rows"][1:, 2:4], base[2:3, 2:4].numpy())


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "turned": lambda: torch.arange(40.0).reshape(5, 8).t(),
    "a square, turned": lambda: torch.arange(64.0).reshape(8, 8).t(),
    "channels last": lambda: torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "columns": lambda: torch.arange(42).reshape(6, 7)[:, 2:5],
    "every other": lambda: torch.arange(42, dtype=torch.int16).reshape(6, 7)[::2, ::3],
    "expanded": lambda: torch.arange(4.0)[:, None].expand(4, 6),
    "expanded before": lambda: torch.arange(4.0).expand(3, 4),
    "one number": lambda: torch.tensor(2.0).expand(3, 2),
    "turned around": lambda: torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4).permute(2, 0, 1),
    "with a dimension of one": lambda: torch.arange(12.0).reshape(3, 4).t()[:, None, :],
}


@pytest.mark.parametrize("balanced", [False, True])
def test_views_are_read_as_they_are_stored(tmp_path: Path, balanced: bool) -> None:
    state = {name: make() for name, make in VIEWS.items()}
    torch.save({"model": state}, tmp_path / "views.pt")
    checkpoint = reshard.Checkpoint(tmp_path / "views.pt")
    for name, tensor in state.items():
        assert not tensor.is_contiguous(), name
        np.testing.assert_array_equal(checkpoint[name][...].astype(np.float32), tensor.float().numpy(), name)
        np.testing.assert_array_equal(checkpoint[name][1:].astype(np.float32), tensor[1:].float().numpy(), name)

    def load(comm: Communicator) -> dict[str, np.ndarray]:
        model = {name: np.zeros_like(checkpoint[name][...]) for name in state}
        reshard.load(tmp_path / "views.pt", model=model, balanced=balanced, communicator=comm)
        return model

    for found in run_ranks(2 if balanced else 1, load):
        for name, tensor in state.items():
            np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy(), name)


def test_what_would_be_in_too_many_pieces_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(800, 800)[::8, ::8]}, tmp_path / "few.pt")
    assert reshard.Checkpoint(tmp_path / "few.pt")["w"][...].sum() == 100 * 100
    torch.save({"w": torch.ones(800, 800)[::2, ::2]}, tmp_path / "many.pt")
    with pytest.raises(DataFileError, match="row-major") as caught:
        reshard.Checkpoint(tmp_path / "many.pt")
    assert caught.value.tensor == "w"
    assert "contiguous" in str(caught.value.fix)


def test_objects_are_refused_by_name(tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    for value, name in ((Runs(os.system, f"touch {sign}"), "posix.system"), (argparse.Namespace(a=1), "argparse.Namespace")):
        torch.save({"model": {"w": torch.ones(2)}, "more": value}, tmp_path / "bad.pt")
        with pytest.raises(DataFileError, match="nothing of it was run") as caught:
            reshard.load(tmp_path / "bad.pt", model={"w": np.zeros(2, np.float32)})
        assert caught.value.found == name
    assert not sign.exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(DataFileError, match=r"before PyTorch 1\.6"):
        reshard.Checkpoint(path)
    for data in (b"", b"PK\x03\x04", b"hello, world", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(DataFileError):
            reshard.Checkpoint(path)
    torch.save(torch.ones(2), path)
    with pytest.raises(DataFileError, match="no state dictionary"):
        reshard.Checkpoint(path)
    with pytest.raises(CheckpointNotFoundError):
        reshard.Checkpoint(tmp_path / "none.pt")


def test_every_cut_and_many_flips_are_errors_or_the_same_values(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    path = tmp_path / "some.pt"
    torch.save(state, path)
    data = path.read_bytes()
    for end in range(0, len(data), 37):
        path.write_bytes(data[:end])
        with pytest.raises(DataFileError):
            reshard.Checkpoint(path)
    for place in range(0, len(data), 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            checkpoint = reshard.Checkpoint(path)
            for name in checkpoint:
                assert checkpoint[name][...].nbytes <= 64
        except reshard.ReshardError:
            pass
