"""The callback under `Model.train` and in a loop of one's own, and the calls with the published names."""

from __future__ import annotations

import logging
from pathlib import Path

import mindspore
import numpy as np
import pytest
from mindspore import nn
from mindspore.train import Model

import reshard
from reshard.errors import DataFileError, MismatchError, UsageError
from reshard.mindspore import CheckpointMonitor, load_checkpoint, save_checkpoint
from reshard.sources.resolve import list_iterations
from reshard.storage.posix import PosixStorage
from tests.frameworks.mindspore.networks import Network, losses, optimizer_of


def iterations(root: Path) -> list[int]:
    return [number for number, _ in list_iterations(PosixStorage(), str(root))]


def train(network: Network, optimizer: nn.Optimizer, monitor: CheckpointMonitor, steps: int = 5) -> None:
    rows = [(np.full(3, i, np.float32), np.zeros(3, np.float32)) for i in range(steps)]
    data = mindspore.dataset.GeneratorDataset(rows, ["data", "label"], shuffle=False).batch(1)
    Model(network, nn.MSELoss(), optimizer).train(1, data, callbacks=[monitor], dataset_sink_mode=False)


@pytest.mark.parametrize("is_async", [False, True])
def test_model_train_saves_when_due_and_at_the_end(is_async: bool, tmp_path: Path) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of("nn.AdamWeightDecay", network)
    monitor = CheckpointMonitor(prefix="net", directory=str(tmp_path), save_checkpoint_steps=2, keep_checkpoint_max=2, async_save=is_async)
    train(network, optimizer, monitor)
    assert iterations(tmp_path) == [4, 5]
    checkpoint = reshard.Checkpoint(tmp_path)
    assert set(checkpoint) >= {"up.weight", "adam_m.up.weight", "global_step", "calls"}
    assert not any(name.startswith(("network.", "_backbone")) for name in checkpoint)
    common = checkpoint.common
    assert common is not None
    assert (common.step_num, common.global_step, common.ckpt_status) == (5, 5, 0)
    assert sorted(path.name for path in (tmp_path / "iteration_00000005").glob("net-*")) == [
        "net-model-0000000-0000001.safetensors",
        "net-opt-0000000-0000001.safetensors",
    ]
    other = Network(seed=2)
    fresh = optimizer_of("nn.AdamWeightDecay", other)
    assert load_checkpoint(tmp_path, other, fresh).iteration == 5
    assert other.up.weight.asnumpy().tobytes() == network.up.weight.asnumpy().tobytes()


def test_a_run_goes_on_counting(tmp_path: Path) -> None:
    network = Network(seed=1)
    monitor = CheckpointMonitor(directory=str(tmp_path), save_checkpoint_steps=None, initial_step=10)
    train(network, optimizer_of("nn.Momentum", network), monitor, 2)
    assert iterations(tmp_path) == []
    monitor = CheckpointMonitor(directory=str(tmp_path), save_checkpoint_steps=100, save_optimizer=False, initial_step=10)
    train(network, optimizer_of("nn.Momentum", network), monitor, 2)
    assert iterations(tmp_path) == [12]
    assert set(reshard.Checkpoint(tmp_path)) == {"up.weight", "up.bias", "down.weight", "norm.gamma", "norm.beta", "frozen", "calls"}
    with pytest.raises(MismatchError, match="no optimizer state"):
        load_checkpoint(tmp_path, network, optimizer_of("nn.Momentum", network))
    assert load_checkpoint(tmp_path, network, optimizer_of("nn.Momentum", network), no_load_optim=True).iteration == 12


def test_a_loop_of_ones_own_with_the_newer_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of("nn.Momentum", network)
    with caplog.at_level(logging.WARNING):
        monitor = CheckpointMonitor(
            directory="elsewhere",
            save_path=str(tmp_path),
            save_max=1,
            save_interleaved_steps=2,
            no_save_optim=True,
            checkpoint_format="ckpt",
        )
    assert "'ckpt' was converted" in caplog.text
    for step in range(1, 6):
        losses(network, optimizer, [step])
        report = monitor.save(step, network, optimizer)
        assert (report is not None) == (step % 2 == 0)
    monitor.close()
    assert iterations(tmp_path) == [4]
    assert not any(name.startswith("moments") for name in reshard.Checkpoint(tmp_path))


def test_the_published_calls(tmp_path: Path) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of("nn.Momentum", network)
    losses(network, optimizer, range(2))
    for step in (1, 2, 3):
        save_checkpoint(
            step, network, optimizer, keep_max_num=2, user_prefix="p", save_checkpoint_path=str(tmp_path), remove_redundancy=True
        )
    assert iterations(tmp_path) == [2, 3]
    load_checkpoint(tmp_path / "iteration_00000002", [network], optimizer, balanced_load=True, global_step=40, reshard_worker_num=2)
    assert optimizer.global_step.asnumpy().tolist() == [40]


@pytest.mark.parametrize("leaves_out", [None, True, False])
def test_a_run_begins_with_a_checkpoint_that_the_newer_names_name(leaves_out: bool | None, tmp_path: Path) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of("nn.AdamWeightDecay", network)
    train(
        network, optimizer, CheckpointMonitor(directory=str(tmp_path / "first"), save_checkpoint_steps=3, no_save_optim=bool(leaves_out)), 3
    )
    other = Network(seed=2)
    fresh = optimizer_of("nn.AdamWeightDecay", other)
    how = {} if leaves_out is None else {"no_load_optim": leaves_out}
    monitor = CheckpointMonitor(save_path=str(tmp_path / "second"), load_path=str(tmp_path / "first"), load_balanced=True, **how)
    train(other, fresh, monitor, 2)
    # Weights only, unless the optimizer is asked for: then the run goes on, and counts on.
    assert iterations(tmp_path / "second") == ([4, 5] if leaves_out is False else [1, 2])
    assert fresh.global_step.asnumpy().tolist() == ([5] if leaves_out is False else [2])
    train(network, optimizer, CheckpointMonitor(directory=str(tmp_path / "straight"), initial_step=3), 2)
    same = other.up.weight.asnumpy().tobytes() == network.up.weight.asnumpy().tobytes()
    assert same == (leaves_out is False)
    assert CheckpointMonitor(directory=str(tmp_path / "third"), load_path="").load(other, fresh) is None


def test_weights_alone_need_no_file_of_the_optimizer(tmp_path: Path) -> None:
    network = Network(seed=1)
    save_checkpoint(1, network, optimizer_of("nn.AdamWeightDecay", network), save_checkpoint_path=str(tmp_path))
    for file in tmp_path.glob("iteration_*/opt-*"):
        file.unlink()
    other = Network(seed=2)
    load_checkpoint(tmp_path, other, optimizer_of("nn.AdamWeightDecay", other), no_load_optim=True)
    assert other.up.weight.asnumpy().tobytes() == network.up.weight.asnumpy().tobytes()
    with pytest.raises(DataFileError, match="missing"):
        load_checkpoint(tmp_path, other, optimizer_of("nn.AdamWeightDecay", other))


def test_wrong_fields() -> None:
    with pytest.raises(UsageError, match=r"(?s)no such field.*save_every"):
        CheckpointMonitor(save_every=3)
    with pytest.raises(UsageError, match="save_checkpoint_steps"):
        CheckpointMonitor(save_checkpoint_steps=0)
    with pytest.raises(UsageError, match="reshard_worker_num"):
        load_checkpoint("nowhere", Network(seed=1), reshard_worker_num=0)
