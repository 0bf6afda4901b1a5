"""What real ranks do in `test_dcp.py`: train, save by torch.distributed.checkpoint, resume under another strategy by reshard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import reshard
from tests.frameworks.torch.ranks import Model, train, whole_tensors

STEPS = range(3)
MORE_STEPS = range(3, 5)


class Outcome(NamedTuple):
    """What a rank saw: whole tensors by name, the losses of the steps after, and what the report said."""

    whole: dict[str, np.ndarray]
    losses: list[float]
    said: dict[str, Any]


def build(kind: str, seed: int) -> nn.Module:
    model = Model(seed, 6)
    world = dist.get_world_size()
    if kind == "fsdp over tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return model


def optimizer_of(model: nn.Module, learning_rate: float) -> optim.Optimizer:
    """AdamW with weight decay on matrices only, as everyone has it."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=learning_rate)


class Flat(dcp.stateful.Stateful):
    """A state dictionary that is an object's, as applications keep model and optimizer."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer) -> None:
        self.held = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.held)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def dictionary(form: str, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    schedule = {"last_epoch": len(STEPS), "_last_lr": [0.05, 0.05]}
    if form == "app":
        return {"app": Flat(model, optimizer)}
    flat = StateDictOptions(flatten_optimizer_state_dict=form == "titan")
    weights, state = get_state_dict(model, optimizer, options=flat)
    if form == "titan":
        # torchtitan: the model's tensors lie at the top, everything else has a key.
        step = torch.tensor(len(STEPS), dtype=torch.int32)
        return {**weights, "optimizer": state, "train_state": {"step": step}, "lr_scheduler": schedule}
    return {"model": weights, "optim": state, "lr_scheduler": schedule}


def save(directory: Path, kind: str, form: str) -> Outcome:
    model = build(kind, seed=1)
    optimizer = optimizer_of(model, 0.05)
    train(model, optimizer, STEPS)
    dcp.save(dictionary(form, model, optimizer), checkpoint_id=directory)
    whole = {str(key): array for key, array in whole_tensors(model, optimizer).items()}
    return Outcome(whole, train(model, optimizer, MORE_STEPS), {})


def resume(directory: Path, kind: str, balanced: bool) -> Outcome:
    model = build(kind, seed=2)
    optimizer = optimizer_of(model, 0.9)
    report = reshard.load(directory, model=model, optimizer=optimizer, balanced=balanced)
    whole = {str(key): array for key, array in whole_tensors(model, optimizer).items()}
    said = {
        "common": report.common,
        "extra": report.extra,
        "notes": report.notes,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "read": sum(rank.bytes_read for rank in report.ranks),
        "decay": [group["weight_decay"] for group in optimizer.param_groups],
        "steps": {int(state["step"]) for state in optimizer.state.values()},
    }
    return Outcome(whole, train(model, optimizer, MORE_STEPS), said)


def save_weights(directory: Path, kind: str) -> dict[str, np.ndarray]:
    """Save a model's weights as safetensors files, each rank its own parts: the whole tensors."""
    model = build(kind, seed=1)
    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    dcp.save(get_state_dict(model, ())[0], storage_writer=writer)
    return weights_of(model)


def load_weights(directory: Path, kind: str, balanced: bool) -> dict[str, np.ndarray]:
    """Load them under another strategy: the whole tensors."""
    model = build(kind, seed=2)
    reshard.load(directory, model=model, balanced=balanced)
    return weights_of(model)


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    held = get_state_dict(model, ())[0]
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).numpy().copy() for name, value in held.items()}
