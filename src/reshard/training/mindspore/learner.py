"""Learning under MindSpore: each rank computes a part of every global batch, and gradients are added up over all ranks."""

from __future__ import annotations

from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, ops
from mindspore.mint import distributed

from reshard.config.fields import RunConfig
from reshard.config.sizes import ParallelSizes, batch_sizes
from reshard.frameworks.mindspore import MindSporeAdapter
from reshard.training.learner import Learned
from reshard.training.mindspore.adamw import AdamW
from reshard.training.mindspore.qwen3 import Qwen3
from reshard.training.schedule import learning_rate_factor
from reshard.training.seeds import derived_seed

# As in torch's own clipping.
_NORM_EPSILON = 1e-6


class MindSporeLearner:
    """One rank's copy of the model, and its optimizer.

    Args:
        run: the configuration.
        rank: this rank.
        sizes: how the ranks are arranged: data parallel.

    Raises:
        ConfigError: sizes that don't fit.
    """

    def __init__(self, run: RunConfig, rank: int, sizes: ParallelSizes) -> None:
        self._run = run
        self.rank = rank
        self.sizes = sizes
        self._batch = batch_sizes(run, sizes)
        self.model = Qwen3(run.model, run.seed)
        self.optimizer = AdamW(self.model.trainable_params(), run.optimizer, run.learning_rate)
        # The rate follows from the number of the step: a checkpoint needs to keep nothing of it.
        self.scheduler = None
        self._done = 0
        self._factor = learning_rate_factor(run, 1)
        # Every sample weighs the same: losses and gradients of all micro-batches and ranks are added up to the mean over the global batch.
        self._scale = 1.0 / (self._batch.total * run.train_dataset.seq_length)
        # Typed as if a function's own arguments were always meant.
        differentiate: Any = mindspore.value_and_grad
        self._gradient = differentiate(self._loss, None, self.optimizer.parameters)

    @property
    def data_index(self) -> int:
        return self.rank

    def plan(self, max_steps: int) -> None:
        self._factor = learning_rate_factor(self._run, max_steps)

    def learn(self, samples: np.ndarray) -> Learned:
        # All gradients and the loss in one row: one sum over the ranks.
        row = self._row(samples[: self._batch.micro])
        for begin in range(self._batch.micro, len(samples), self._batch.micro):
            row = row + self._row(samples[begin : begin + self._batch.micro])
        if self.sizes.ranks > 1:
            distributed.all_reduce(row)
        values = row.asnumpy()
        loss, norm = float(values[-1]), float(np.sqrt(np.square(values[:-1], dtype=np.float64).sum()))
        limit = self._run.max_grad_norm
        if limit is not None and norm > limit:
            row = row * (limit / (norm + _NORM_EPSILON))
        rate = self._run.learning_rate * self._factor(self._done)
        self.optimizer.learning_rate.assign_value(Tensor(rate, mindspore.float32))
        self.optimizer(self._gradients_in(row))
        self._done += 1
        return Learned(loss, norm, rate)

    def go_to_step(self, step: int) -> bool:
        self._done = step
        return False

    def seed(self, step: int) -> None:
        MindSporeAdapter().reseed(derived_seed(self._run.seed, "random", step, 0, self.rank))

    def config(self) -> dict[str, Any]:
        return self.model.config

    def _loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return ops.cross_entropy(self.model(tokens), labels, reduction="sum") * self._scale

    def _row(self, samples: np.ndarray) -> Tensor:
        tokens, labels = samples[:, :-1].astype(np.int32), samples[:, 1:].astype(np.int32)
        loss, gradients = self._gradient(Tensor(tokens), Tensor(labels.reshape(-1)))
        return ops.concat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1)])

    def _gradients_in(self, row: Tensor) -> list[Tensor]:
        gradients, begin = [], 0
        for parameter in self.optimizer.parameters:
            gradients.append(row[begin : begin + parameter.size].reshape(parameter.shape))
            begin += parameter.size
        return gradients
