"""Learning rates step by step, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from reshard.config.fields import OptimizerSettings, RunConfig
from reshard.training.optimization import build_optimizer, build_scheduler, go_to_step
from reshard.training.schedule import learning_rate_factor


def config(**schedule: Any) -> RunConfig:
    return RunConfig.model_validate({"optimizer": {"learning_rate": 2e-3}, "lr_schedule": schedule})


def factors(max_steps: int = 10, **schedule: Any) -> list[float]:
    factor = learning_rate_factor(config(**schedule), max_steps)
    return [factor(done) for done in range(max_steps + 2)]


def test_warm_up_rises_to_the_peak_and_stays() -> None:
    assert factors(type="ConstantWarmUpLR", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 9


def test_linear_decay_ends_at_its_floor() -> None:
    found = factors(type="LinearWithWarmUpLR", warmup_steps=2, lr_end=2e-4)
    assert found[2] == 1.0
    assert found[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert found[10] == pytest.approx(0.1)
    assert found[11] == pytest.approx(0.1)


def test_cosine_decay() -> None:
    found = factors(type="CosineWithWarmUpLR", warmup_steps=0, total_steps=8)
    assert found[0] == 1.0
    assert found[2] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert found[4] == pytest.approx(0.5)
    assert found[8] == pytest.approx(0.0)
    assert found[10] == pytest.approx(0.0)


def test_the_schedules_rate_goes_before_the_optimizers() -> None:
    assert config().learning_rate == 2e-3
    assert config(learning_rate=5e-4).learning_rate == 5e-4
    assert RunConfig().learning_rate == 1e-3


class Small(nn.Module):
    """A matrix with a bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)


def test_only_matrices_decay() -> None:
    model = Small()
    optimizer = build_optimizer(model, OptimizerSettings(weight_decay=0.1, betas=[0.8, 0.9], eps=1e-6), 1e-3)
    matrices, vectors = optimizer.param_groups
    assert matrices["params"] == [model.linear.weight]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert len(vectors["params"]) == 3
    assert (matrices["betas"], matrices["eps"], matrices["lr"]) == ((0.8, 0.9), 1e-6, 1e-3)


def test_a_schedule_can_be_put_after_a_step() -> None:
    run = config(type="LinearWithWarmUpLR", warmup_steps=2)
    walked, put = (build_optimizer(Small(), run.optimizer, run.learning_rate) for _ in range(2))
    schedule, other = build_scheduler(walked, run, 10), build_scheduler(put, run, 10)
    for _ in range(5):
        walked.step()
        schedule.step()
    go_to_step(other, 5)
    put.step()
    for _ in range(3):
        assert other.get_last_lr() == schedule.get_last_lr()
        assert [group["lr"] for group in put.param_groups] == [group["lr"] for group in walked.param_groups]
        for one, optimizer in ((schedule, walked), (other, put)):
            optimizer.step()
            one.step()
    assert torch.optim.AdamW is type(put)
