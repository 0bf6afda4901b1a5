"""After a load the next optimizer step does what the uninterrupted run's does, to the last bit."""

from __future__ import annotations

import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.distributed.fsdp import fully_shard

from reshard.frameworks.torch import TorchAdapter
from reshard.frameworks.torch.recipes import recipe_of
from reshard.state import GLOBAL_STEP
from tests.frameworks.torch.simulated import fake_rank, make_mesh
from tests.frameworks.torch.transfer import catalog_of, frozen, resume

LR = 0.05

OPTIMIZERS = {
    "adamw": lambda p, **k: optim.AdamW(p, lr=LR, **k),
    "adam": lambda p, **k: optim.Adam(p, lr=LR, weight_decay=0.1, **k),
    "amsgrad": lambda p, **k: optim.AdamW(p, lr=LR, amsgrad=True, **k),
    "sgd": lambda p, **k: optim.SGD(p, lr=LR, **k),
    "momentum": lambda p, **k: optim.SGD(p, lr=LR, momentum=0.9, dampening=0.1, **k),
    "nesterov": lambda p, **k: optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, **k),
    "adagrad": lambda p, **k: optim.Adagrad(p, lr=LR, lr_decay=0.1, initial_accumulator_value=0.3, **k),
    "rmsprop": lambda p, **k: optim.RMSprop(p, lr=LR, **k),
    "rmsprop all": lambda p, **k: optim.RMSprop(p, lr=LR, momentum=0.9, centered=True, **k),
    "adafactor": lambda p, **k: optim.Adafactor(p, lr=LR, **k),
    "nadam": lambda p, **k: optim.NAdam(p, lr=LR, **k),
    "radam": lambda p, **k: optim.RAdam(p, lr=LR, **k),
    "adamax": lambda p, **k: optim.Adamax(p, lr=LR, **k),
    "adadelta": lambda p, **k: optim.Adadelta(p, lr=LR, **k),
    "asgd": lambda p, **k: optim.ASGD(p, lr=LR, t0=1, **k),
    "rprop": lambda p, **k: optim.Rprop(p, lr=LR, **k),
}
IMPLEMENTATIONS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FUSED = ("adamw", "adam", "amsgrad", "sgd", "momentum", "nesterov", "adagrad")
CASES = [(name, how) for name in OPTIMIZERS for how in IMPLEMENTATIONS if how != "fused" or name in FUSED]


class Model(nn.Module):
    """Some of each: a matrix, a vector, a number, a frozen parameter, and one that gets its first gradient late."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("matrix", (4, 3)), ("vector", (5,)), ("number", ()), ("late", (2, 2)), ("never", (3,)), ("frozen", (3,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.frozen.requires_grad_(False)


def gradients(model: nn.Module, step: int, late: int = 2) -> None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        given = name not in ("frozen", "never") and (name != "late" or step >= late)
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
        parameter.grad = gradient.to(parameter.dtype) if given else None


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().flatten().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def train(model: nn.Module, optimizer: optim.Optimizer, steps: range, late: int = 2) -> None:
    for step in steps:
        gradients(model, step, late)
        optimizer.step()


def same_state(one: optim.Optimizer, other: optim.Optimizer) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first["state"].keys() == second["state"].keys()
    for index, slots in first["state"].items():
        assert list(slots) == list(second["state"][index])
        for slot, value in slots.items():
            mine = second["state"][index][slot]
            assert type(mine) is type(value)
            if isinstance(value, torch.Tensor):
                assert (mine.dtype, mine.device, mine.stride()) == (value.dtype, value.device, value.stride())
                assert torch.equal(mine, value), (index, slot)
            else:
                assert mine == value
    assert first["param_groups"] == second["param_groups"]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_next_step_is_bit_identical(name, how) -> None:
    model = Model(0)
    optimizer = OPTIMIZERS[name](model.parameters(), **IMPLEMENTATIONS[how])
    # torch's fused SGD can't take a parameter's first gradient later than the others'.
    late = 0 if (name, how) in (("momentum", "fused"), ("nesterov", "fused")) else 2
    train(model, optimizer, range(3), late)
    state = TorchAdapter().capture(model, optimizer, global_step=3)
    copies = frozen(state)

    other = Model(1)
    fresh = OPTIMIZERS[name](other.parameters(), **IMPLEMENTATIONS[how])
    fresh.param_groups[0]["lr"] = 1.0
    assert resume(state, copies, other, fresh) == set()
    same_state(optimizer, fresh)
    train(model, optimizer, range(3, 6))
    train(other, fresh, range(3, 6))
    assert weights(model) == weights(other)
    same_state(optimizer, fresh)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_slots_are_made_as_torch_makes_them(name, how) -> None:
    """torch's own `_init_group` makes the state of a first step without taking it; each slot must be the same, strides and all."""
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for tensor in (torch.randn(3, 4).t(), images, torch.randn(())):
        parameter = nn.Parameter(tensor)
        parameter.grad = torch.zeros_like(parameter)
        optimizer = OPTIMIZERS[name]([parameter], **IMPLEMENTATIONS[how])
        recipe = recipe_of(optimizer, optimizer.param_groups[0], parameter)
        assert recipe is not None
        made = {slot: maker() for slot, maker in recipe.items()}
        arguments = len(inspect.signature(optimizer._init_group).parameters) - 1
        optimizer._init_group(optimizer.param_groups[0], *([] for _ in range(arguments)))
        expected = optimizer.state[parameter]
        if "momentum_buffer" in made and "step" not in made:
            expected["momentum_buffer"] = torch.zeros_like(parameter)  # SGD makes it in the step itself
        assert list(made) == list(expected)
        for slot, mine in made.items():
            theirs = expected[slot]
            assert (mine.dtype, mine.device, mine.stride()) == (theirs.dtype, theirs.device, theirs.stride()), slot
            assert torch.equal(mine, theirs), slot


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_has_stepped_is_filled_in_place(name) -> None:
    model, other = Model(0), Model(1)
    optimizer, used = (OPTIMIZERS[name](m.parameters()) for m in (model, other))
    train(model, optimizer, range(3))
    state = TorchAdapter().capture(model, optimizer, global_step=3)
    copies = frozen(state)
    for step in range(2):
        gradients(other, step + 10)
        other.never.grad = torch.ones(3)
        used.step()
    before = {(id(p), slot): value for p, slots in used.state.items() for slot, value in slots.items()}
    assert resume(state, copies, other, used) == set()
    for parameter, slots in used.state.items():
        for slot, value in slots.items():
            assert before[id(parameter), slot] is value
    same_state(optimizer, used)
    train(model, optimizer, range(3, 5))
    train(other, used, range(3, 5))
    assert weights(model) == weights(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype) -> None:
    model, other = Model(0).to(dtype), Model(1).to(dtype)
    optimizer, fresh = (optim.AdamW(m.parameters(), lr=LR, foreach=False) for m in (model, other))
    train(model, optimizer, range(3))
    state = TorchAdapter().capture(model, optimizer, global_step=3)
    assert resume(state, frozen(state), other, fresh) == set()
    train(model, optimizer, range(3, 4))
    train(other, fresh, range(3, 4))
    assert weights(model) == weights(other)
    same_state(optimizer, fresh)


def generators() -> list[bytes]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    key = numpy["state"]["key"].tobytes()
    return [torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode(), repr(numpy).encode(), key]


def test_preparing_changes_nothing() -> None:
    model = Model(0)
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    state = TorchAdapter().capture(model, optimizer, global_step=2)

    for name, make in OPTIMIZERS.items():
        other = Model(1)
        fresh = make(other.parameters())
        before = weights(other), repr(fresh.state_dict()), generators()
        for parameter in other.parameters():
            parameter.grad = torch.ones_like(parameter)
        TorchAdapter().prepare(other, fresh).destination(catalog_of(state), state.groups)
        after = weights(other), repr(fresh.state_dict()), generators()
        assert before == after, name
        if name != "adagrad":
            assert len(fresh.state) == 0


def local_weights(model: nn.Module) -> dict[str, bytes]:
    return {name: p.to_local().detach().numpy().tobytes() for name, p in model.named_parameters()}


# torch's own Rprop and Adafactor can't step such DTensors.
@pytest.mark.parametrize("how", ["plain", "foreach"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adafactor", "rprop")])
def test_fully_sharded(name, how) -> None:
    """One rank of two, whose part of the vector is the shorter one; what it holds comes back, and the step goes on alike."""
    with fake_rank(1, 2):
        mesh = make_mesh((2,), ("dp",))
        runs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
            fully_shard(model, mesh=mesh)
            runs.append((model, OPTIMIZERS[name](model.parameters(), **IMPLEMENTATIONS[how])))
        (model, optimizer), (other, fresh) = runs

        def step(module: nn.Module, run: optim.Optimizer, number: int) -> None:
            for index, parameter in enumerate(module.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1) + index)
            run.step()

        for number in range(3):
            step(model, optimizer, number)
        state = TorchAdapter().capture(model, optimizer, global_step=3)
        assert resume(state, frozen(state), other, fresh) == set()
        assert local_weights(model) == local_weights(other)
        for number in (3, 4):
            step(model, optimizer, number)
            step(other, fresh, number)
        assert local_weights(model) == local_weights(other)


def test_another_number_of_ranks() -> None:
    """Four ranks' parts of weights and moments make two ranks' parts."""
    copies: dict = {}
    for rank in range(4):
        with fake_rank(rank, 4):
            torch.manual_seed(0)
            model = nn.Linear(3, 7)
            fully_shard(model, mesh=make_mesh((4,), ("dp",)))
            optimizer = optim.AdamW(model.parameters(), lr=LR)
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            optimizer.step()
            state = TorchAdapter().capture(model, optimizer, global_step=1)
            for key, shards in frozen(state).items():
                copies.setdefault(key, []).extend(shards if key != GLOBAL_STEP or rank == 0 else [])
    torch.manual_seed(0)
    whole = nn.Linear(3, 7)
    reference = optim.AdamW(whole.parameters(), lr=LR)
    for parameter in whole.parameters():
        parameter.grad = parameter.detach().clone()
    reference.step()
    for rank in range(2):
        with fake_rank(rank, 2):
            model = nn.Linear(3, 7)
            fully_shard(model, mesh=make_mesh((2,), ("dp",)))
            optimizer = optim.AdamW(model.parameters(), lr=LR)
            assert resume(state, copies, model, optimizer) == set()
            for (_, mine), (_, theirs) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
                rows = slice(0, 4) if rank == 0 else slice(4, 7)
                assert torch.equal(mine.to_local(), theirs[rows])
                for slot in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(optimizer.state[mine][slot].to_local(), reference.state[theirs][slot][rows])
                assert optimizer.state[mine]["step"].item() == 1
