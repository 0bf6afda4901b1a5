"""What the trainer needs of a framework: something that holds the model and learns from one global batch after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from reshard.config.sizes import ParallelSizes


@dataclass(frozen=True)
class Learned:
    """What an optimizer step did, the same on every rank.

    Attributes:
        loss: the mean loss over the global batch, before the step.
        grad_norm: the global norm of the gradient before clipping.
        lr: the learning rate that it used.
    """

    loss: float
    grad_norm: float
    lr: float


class Learner(Protocol):
    """One rank's side of a run in its framework: model, optimizer and schedule."""

    @property
    def rank(self) -> int:
        """The global rank."""
        ...

    @property
    def sizes(self) -> ParallelSizes:
        """How the ranks are arranged."""
        ...

    @property
    def data_index(self) -> int:
        """Which part of every global batch this rank sees."""
        ...

    @property
    def model(self) -> Any:
        """This rank's part of the model."""
        ...

    @property
    def optimizer(self) -> Any:
        """Its optimizer."""
        ...

    @property
    def scheduler(self) -> Any:
        """What a checkpoint keeps of the schedule; None where it follows from the number of the step alone."""
        ...

    def plan(self, max_steps: int) -> None:
        """Make the schedule of a run of so many steps. Called once, before any step."""
        ...

    def learn(self, samples: np.ndarray) -> Learned:
        """One optimizer step.

        Args:
            samples: this data-parallel rank's token ids, int64 of shape (samples, seq_length + 1).
        """
        ...

    def go_to_step(self, step: int) -> bool:
        """Go on after a step of a checkpoint that was loaded; whether the schedule had to be moved for that."""
        ...

    def seed(self, step: int) -> None:
        """Seed this rank's generators for what follows a step."""
        ...

    def config(self) -> dict[str, Any]:
        """What a `config.json` says of the whole model."""
        ...
