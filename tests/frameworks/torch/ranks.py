"""What each of four real ranks does in `test_real_ranks.py`."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from reshard.errors import CommunicationError
from reshard.frameworks.torch import TorchAdapter, TorchCommunicator
from reshard.state import GLOBAL_STEP, State, TensorKey, model_key, slot_key
from tests.frameworks.torch.transfer import frozen, resume


class Model(nn.Module):
    """A small network whose sizes give ranks uneven and empty parts."""

    def __init__(self, seed: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(3, hidden)
        self.down = nn.Linear(hidden, 3, bias=False)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(self.down(torch.relu(self.up(x))))


def build(kind: str, seed: int) -> nn.Module:
    # Tensor parallelism computes with even parts only; FSDP2 then cuts each of its three rows in two.
    model = Model(seed, 6 if kind == "fsdp over tp" else 7)
    if kind == "fsdp over tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model.up, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (4,), mesh_dim_names=("dp",)), reshard_after_forward=False)
    elif kind == "offloaded":
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    else:
        return nn.parallel.DistributedDataParallel(model)
    return model


def train(model: nn.Module, optimizer: optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model(torch.randn(5, 3)).square().sum() + model(torch.ones(2, 3)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole_tensors(model: nn.Module, optimizer: optim.Optimizer) -> dict[TensorKey, np.ndarray]:
    """Weights and moments, gathered by torch."""
    result: dict[TensorKey, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.") if isinstance(model, nn.parallel.DistributedDataParallel) else name
        result[model_key(name)] = parameter.detach()
        for slot, key in (("exp_avg", "adam_m"), ("exp_avg_sq", "adam_v")):
            result[slot_key(key, name)] = optimizer.state[parameter][slot]
    return {key: (t.full_tensor() if isinstance(t, DTensor) else t).numpy().copy() for key, t in result.items()}


def check_against(state: State, whole: dict[TensorKey, np.ndarray]) -> dict[TensorKey, list]:
    """Every shard has the whole's values in its region. Returns the regions."""
    assert set(state.tensors) == {*whole, GLOBAL_STEP, model_key("calls")}
    for key, expected in whole.items():
        tensor = state.tensors[key]
        assert tensor.global_shape == expected.shape, key
        for shard in tensor.shards:
            np.testing.assert_array_equal(shard.memory.read(), expected[shard.region.slices], str(key))
    return {key: [(s.region.offset, s.region.shape) for s in state.tensors[key].shards] for key in whole}


def run(kind: str) -> tuple[dict[TensorKey, list], dict[TensorKey, tuple[int, ...]]]:
    """Train, capture, hold against what torch gathers, resume in a fresh run, and train both on."""
    model = build(kind, seed=1)
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    whole = whole_tensors(model, optimizer)
    if kind == "fsdp":
        with torch.no_grad():
            model(torch.ones(1, 3))
        assert not isinstance(model.up.weight, DTensor), "a forward pass alone leaves the parameters gathered"
    adapter = TorchAdapter()
    state = adapter.capture(model, optimizer, global_step=3)
    regions = check_against(state, whole)
    copies = frozen(state)

    other = build(kind, seed=2)
    fresh = optim.AdamW(other.parameters(), lr=0.9)
    random = torch.get_rng_state()
    assert resume(state, copies, other, fresh) == set()
    assert torch.equal(torch.get_rng_state(), random)
    assert train(other, fresh, range(3, 5)) == train(model, optimizer, range(3, 5))
    mine, theirs = whole_tensors(model, optimizer), whole_tensors(other, fresh)
    for key, expected in mine.items():
        np.testing.assert_array_equal(theirs[key], expected, str(key))
    assert state.tensors[GLOBAL_STEP].shards[0].memory.read().tolist() == [3]
    return regions, {key: tensor.shape for key, tensor in whole.items()}


def data(of: int, length: int) -> bytes:
    return (np.arange(length, dtype=np.uint64) * 7 + of).astype(np.uint8).tobytes()


# Nothing, one byte, around what fits into the first message, and more than a block.
LENGTHS = (0, 1, 4088, 4089, 17_000_000)


def talk(star: bool) -> None:
    """Everything that a communicator does, on four ranks; `star`: over sockets of their own, as on one machine."""
    comm = TorchAdapter(timeout=60).communicator() if star else TorchCommunicator(60, star=False)
    assert isinstance(comm, TorchCommunicator)
    assert (comm._star is not None) == star
    other = comm.duplicate()
    assert (other._star is not None) == star
    other.close()
    assert (comm.rank, comm.world_size) == (dist.get_rank(), 4)
    talk_among_all(comm)
    talk_one_to_one(comm)
    for wrong in (comm.rank, 4, -1):
        with pytest.raises(CommunicationError):
            comm.send(b"", wrong)
    comm.barrier()
    comm.close()
    comm.close()


def talk_among_all(comm: TorchCommunicator) -> None:
    several = [(0, 0, 0, 0), (1, 0, 5, 3), (4088, 4089, 4087, 0), (10, 5_000_000, 0, 7), (20_000_000, 20_000_001, 19_000_000, 20_000_000)]
    for lengths in several:
        assert comm.all_gather(data(comm.rank, lengths[comm.rank])) == [data(of, length) for of, length in enumerate(lengths)]
    for source in range(4):
        for length in LENGTHS:
            given = data(source, length) if comm.rank == source else b"something else"
            assert comm.broadcast(given, source) == data(source, length)


def talk_one_to_one(comm: TorchCommunicator) -> None:
    for length in LENGTHS:
        if comm.rank == 0:
            for target in (1, 2, 3):
                comm.send(memoryview(data(target, length)), target)
            assert [comm.recv(source) for source in (3, 2, 1)] == [data(9, length)] * 3
        else:
            assert comm.recv(0) == data(comm.rank, length)
            comm.send(data(9, length), 0)
    if comm.rank == 1:
        for number in range(20):
            comm.send(bytes([number]), 2)
    elif comm.rank == 3:
        comm.send(memoryview(np.arange(6, dtype=np.int32).reshape(2, 3)), 2)
    elif comm.rank == 2:
        assert b"".join(comm.recv(1) for _ in range(20)) == bytes(range(20))
        assert np.frombuffer(comm.recv(3), np.int32).tolist() == [0, 1, 2, 3, 4, 5]


def be_gone(star: bool) -> str:
    """Rank 3 takes no part; the others must hear so within their time limit, and training's own group goes on."""
    comm = TorchCommunicator(timeout=6, star=star)
    words = ""
    if comm.rank != 3:
        try:
            comm.all_gather(b"x")
        except CommunicationError as error:
            words = str(error)
        else:
            raise AssertionError("nobody missed rank 3")
    dist.barrier()
    comm.close()
    return words


class Interrupted(TorchCommunicator):
    """The second rank is interrupted in the first collective, before it takes the answer."""

    number = 0

    def _tell_all(self, message: torch.Tensor, source: int) -> None:
        self.number += 1
        if self.rank == 1 and self.number == 1:
            raise KeyboardInterrupt
        super()._tell_all(message, source)


def be_interrupted() -> str:
    """One rank doesn't take an answer, and goes on: nothing that it hears then may be what it didn't take."""
    comm = Interrupted(timeout=6, star=False)
    said = ""
    try:
        with suppress(KeyboardInterrupt):
            assert comm.all_gather(b"first") == [b"first"] * 4
        for told in (b"second", b"third"):
            assert comm.all_gather(told) == [told] * 4
    except CommunicationError as error:
        said = str(error)
    comm.close()
    return said
