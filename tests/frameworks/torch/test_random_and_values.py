"""Random states, and tensors in trees of values, through the files that hold them."""

from __future__ import annotations

import random as python_random
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate

from reshard.errors import CaptureError, MetadataError
from reshard.format.extra import FrameworkArray, decode_tree, encode_tree
from reshard.frameworks.torch import TorchAdapter
from reshard.frameworks.torch import random as torch_random
from tests.frameworks.torch.simulated import distribute, fake_rank, make_mesh

ADAPTER = TorchAdapter()


def through_files(tree):
    return ADAPTER.from_value(decode_tree(*encode_tree(ADAPTER.to_value(tree))))


def draw() -> list:
    numpy = np.random
    return [
        python_random.random(),
        python_random.gauss(0, 1),
        numpy.rand(),
        numpy.standard_normal(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(10).tolist(),
    ]


@pytest.fixture(autouse=True)
def _generators():
    before = ADAPTER.random_states()
    yield
    ADAPTER.restore_random_states(before)


def test_generators_go_on_where_they_were() -> None:
    ADAPTER.reseed(1)
    draw()  # an odd number of normal numbers: the second of a pair waits in Python's and numpy's generator
    states = through_files(ADAPTER.random_states())
    expected = draw()
    ADAPTER.reseed(2)
    assert draw() != expected
    ADAPTER.restore_random_states(states)
    assert draw() == expected


def test_taking_the_states_draws_nothing() -> None:
    ADAPTER.reseed(1)
    expected = draw()
    ADAPTER.reseed(1)
    ADAPTER.random_states()
    assert draw() == expected


def test_states_are_copies() -> None:
    ADAPTER.reseed(1)
    states = ADAPTER.random_states()
    expected = draw()
    ADAPTER.restore_random_states(states)
    assert draw() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed) -> None:
    ADAPTER.reseed(seed)
    first = draw()
    ADAPTER.reseed(seed ^ (1 << 40))
    second = draw()
    assert all(a != b for a, b in zip(first, second, strict=True))
    ADAPTER.reseed(seed)
    assert draw() == first


@pytest.mark.parametrize(
    "break_", [lambda s: s.pop("torch"), lambda s: s.update(python=3), lambda s: s.update(torch=np.zeros(4, np.uint8))]
)
def test_states_that_cannot_be_understood(break_) -> None:
    states = dict(ADAPTER.random_states())
    break_(states)
    with pytest.raises(MetadataError, match="random"):
        ADAPTER.restore_random_states(states)


class Devices:
    """What torch's module of an accelerator does, without one."""

    def __init__(self, current: int, states: list[int]) -> None:
        self._current = current
        self.states = [torch.tensor([state], dtype=torch.uint8) for state in states]

    def current_device(self) -> int:
        return self._current

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self, index: int) -> torch.Tensor:
        return self.states[index]

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        self.states[index] = state


def test_accelerators(monkeypatch) -> None:
    """The device in use takes the state of the one that was in use, whatever its number."""
    saved, now = Devices(1, [10, 11, 12]), Devices(0, [0, 1])
    kind = ["cuda"]
    monkeypatch.setattr(torch_random, "_accelerator", lambda: (kind[0], saved))
    states = through_files(ADAPTER.random_states())
    monkeypatch.setattr(torch_random, "_accelerator", lambda: (kind[0], now))
    ADAPTER.restore_random_states(states)
    assert [state.item() for state in now.states] == [11, 1]
    kind[0] = "xpu"
    now.states[0].zero_()
    ADAPTER.restore_random_states(states)
    assert now.states[0].item() == 0


def test_states_that_dtensor_keeps_apart(monkeypatch) -> None:
    tracker = SimpleNamespace(rng_states={"parallel-rng": torch.tensor([3], dtype=torch.uint8)})
    monkeypatch.setattr("torch.distributed.tensor._random._rng_tracker", tracker)
    monkeypatch.setattr(torch_random, "_accelerator", lambda: ("cuda", Devices(0, [1])))
    states = through_files(ADAPTER.random_states())
    tracker.rng_states["parallel-rng"] = torch.tensor([4], dtype=torch.uint8)
    ADAPTER.restore_random_states(states)
    assert tracker.rng_states["parallel-rng"].item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
def test_tensors_come_back_with_their_type(dtype) -> None:
    tensor = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    tree = {"a": [tensor.t(), (torch.tensor(1).to(dtype), None)], "b": OrderedDict(c=torch.zeros(0).to(dtype)), "size": tensor.shape}
    back = through_files(tree)
    assert back["a"][0].dtype == dtype
    assert torch.equal(back["a"][0].to(torch.float32), tensor.t().to(torch.float32))
    assert isinstance(back["a"][1], tuple)
    assert back["a"][1][0].shape == ()
    assert isinstance(back["b"], OrderedDict)
    assert back["b"]["c"].shape == (0,)
    assert back["size"] == (2, 2)


def test_values_are_copies_and_plain_things_pass() -> None:
    tensor, array = torch.zeros(2), np.ones(2)
    value = ADAPTER.to_value({"t": tensor, "n": array, "x": 3, 4: "y"})
    tensor.fill_(5)
    assert value["t"].array.tolist() == [0, 0]
    assert value["n"] is array
    assert (value["x"], value[4]) == (3, "y")
    back = ADAPTER.from_value(value)
    back["t"].fill_(7)
    assert value["t"].array.tolist() == [0, 0]


def test_an_array_of_another_framework_becomes_a_tensor() -> None:
    back = ADAPTER.from_value(FrameworkArray("mindspore", "float32", np.ones(2, np.float32)))
    assert torch.equal(back, torch.ones(2))


def test_tensors_that_values_cannot_hold_are_named_by_path() -> None:
    with pytest.raises(CaptureError, match=r"scheduler\[1\]"):
        ADAPTER.to_value({"scheduler": [1, torch.zeros(2, dtype=torch.complex128)]})
    with fake_rank(0, 1):
        tensor = distribute(torch.ones(2), make_mesh((1,), ("dp",)), [Replicate()])
        with pytest.raises(CaptureError, match=r"(?s)DTensor.*x\['y'\]"):
            ADAPTER.to_value({"x": {"y": tensor}})
