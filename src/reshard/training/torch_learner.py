"""Learning under PyTorch: transformers' Qwen3 under every strategy that the configuration knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from reshard.config.fields import RunConfig
from reshard.config.sizes import ParallelSizes, batch_sizes
from reshard.training.learner import Learned
from reshard.training.mesh import Place
from reshard.training.model import saved_config
from reshard.training.optimization import build_optimizer, build_scheduler, go_to_step
from reshard.training.parallelize import build_model
from reshard.training.seeds import derived_seed, seed_generators
from reshard.training.step import TrainStep, clip_gradients


class TorchLearner:
    """One rank's model, optimizer and schedule. Making one is collective.

    Args:
        run: the configuration.
        place: this rank's.

    Raises:
        ConfigError: sizes that don't fit.
    """

    def __init__(self, run: RunConfig, place: Place) -> None:
        self._run = run
        self._place = place
        self.model = build_model(run.model, run.seed, place)
        self.optimizer = build_optimizer(self.model, run.optimizer, run.learning_rate)
        self._step = TrainStep(self.model, run.model, place, batch_sizes(run, place.sizes), run.train_dataset.seq_length)
        self.scheduler: Any = None

    @property
    def rank(self) -> int:
        return self._place.rank

    @property
    def sizes(self) -> ParallelSizes:
        return self._place.sizes

    @property
    def data_index(self) -> int:
        return self._place.data_index

    def plan(self, max_steps: int) -> None:
        self.scheduler = build_scheduler(self.optimizer, self._run, max_steps)

    def learn(self, samples: np.ndarray) -> Learned:
        loss, norm = self._step.run(torch.from_numpy(samples).to(self._place.device))
        clip_gradients(self.model.parameters(), norm, self._run.max_grad_norm)
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return Learned(loss, norm, rate)

    def go_to_step(self, step: int) -> bool:
        if self.scheduler.last_epoch == step:
            return False
        go_to_step(self.scheduler, step)
        return True

    def seed(self, step: int) -> None:
        # Ranks of one tensor-parallel group get the same numbers: what they compute in common must agree.
        seed_generators(derived_seed(self._run.seed, "random", step, self._place.stage, self._place.data_index))

    def config(self) -> dict[str, Any]:
        return saved_config(self._run.model)
