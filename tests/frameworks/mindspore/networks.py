"""A small network for MindSpore's tests, and steps of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.experimental import optim
from mindspore.mint import optim as mint


class Network(nn.Cell):
    """Two layers, a norm, a frozen parameter and buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = np.random.default_rng(seed)
        self.up = nn.Dense(3, 4, weight_init=_drawn(draw, 4, 3), bias_init=_drawn(draw, 4))
        self.down = nn.Dense(4, 3, weight_init=_drawn(draw, 3, 4), has_bias=False)
        self.norm = nn.LayerNorm((3,))
        self.frozen = Parameter(_drawn(draw, 3), name="frozen", requires_grad=False)
        self.register_buffer("calls", Tensor(np.full(1, seed, np.float32)))
        self.register_buffer("scratch", Tensor(np.zeros(1, np.float32)), persistent=False)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.down(mindspore.ops.relu(self.up(x)))) + self.frozen


def _drawn(draw: np.random.Generator, *shape: int) -> Tensor:
    return Tensor(draw.standard_normal(shape).astype(np.float32))


def optimizer_of(kind: str, network: nn.Cell) -> Any:
    module, name = kind.split(".")
    parameters = network.trainable_params()
    if module != "nn":
        return getattr(optim if module == "experimental" else mint, name)(parameters, lr=0.05)
    if name == "Momentum":
        return nn.Momentum(parameters, learning_rate=0.05, momentum=0.9)
    return getattr(nn, name)(parameters, learning_rate=0.05)


def losses(network: nn.Cell, optimizer: Any, steps: Iterable[int]) -> list[float]:
    """Steps in PyNative mode; each has data of its own."""

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return ((network(x) - y) ** 2).sum()

    gradient = mindspore.value_and_grad(forward, None, optimizer.parameters)
    result = []
    for step in steps:
        draw = np.random.default_rng(1000 + step)
        loss, gradients = gradient(_drawn(draw, 5, 3), _drawn(draw, 5, 3))
        optimizer(gradients)
        result.append(loss.asnumpy().item())
    return result
