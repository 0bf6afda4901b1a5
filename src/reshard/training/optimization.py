"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from reshard.config.fields import OptimizerSettings, RunConfig


def build_optimizer(model: nn.Module, settings: OptimizerSettings, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only. A pipeline stage has its own parameters in the same two groups."""
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    first, second = settings.betas
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=(first, second), eps=settings.eps)


def build_scheduler(optimizer: torch.optim.Optimizer, run: RunConfig, max_steps: int) -> LambdaLR:
    """The schedule of the configuration. One step of it follows every step of the optimizer."""
    return LambdaLR(optimizer, learning_rate_factor(run, max_steps))


def learning_rate_factor(run: RunConfig, max_steps: int) -> Callable[[int], float]:
    """What the peak learning rate is multiplied by, by the number of steps done before."""
    schedule = run.lr_schedule
    warmup = schedule.warmup_steps
    total = max_steps if schedule.total_steps == -1 else schedule.total_steps
    floor = schedule.lr_end / run.learning_rate

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        if schedule.type == "ConstantWarmUpLR":
            return 1.0
        progress = min(1.0, (done - warmup) / max(1, total - warmup))
        remaining = 1.0 - progress if schedule.type == "LinearWithWarmUpLR" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return floor + (1.0 - floor) * remaining

    return factor


def go_to_step(scheduler: LambdaLR, step: int) -> None:
    """Put a schedule after a number of steps, for a checkpoint that doesn't say where its schedule was."""
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
