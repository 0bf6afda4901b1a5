"""Optimizer and learning rate."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from reshard.config.fields import OptimizerSettings, RunConfig
from reshard.training.schedule import learning_rate_factor


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


def go_to_step(scheduler: LambdaLR, step: int) -> None:
    """Put a schedule after a number of steps, for a checkpoint that doesn't say where its schedule was."""
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
