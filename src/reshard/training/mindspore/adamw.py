"""AdamW as PyTorch defines it, as a MindSpore optimizer, so that a run goes on with the same steps in either framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from reshard.config.fields import OptimizerSettings

# MindSpore declares that a cell's `construct` never returns.
_Optimizer: Any = nn.Optimizer


class AdamW(_Optimizer):
    """AdamW with bias correction, and with weight decay on matrices only.

    MindSpore's `nn.AdamWeightDecay` corrects no bias, and its experimental AdamW keeps a third moment that nothing reads. The kernel of
    the first makes this one's step too, where the correction is put into its rate, its epsilon and its decay.

    Args:
        parameters: the model's.
        settings: betas, epsilon and decay.
        learning_rate: the first steps'; `learning_rate` is a parameter that may be set before every step.
    """

    def __init__(self, parameters: Sequence[Parameter], settings: OptimizerSettings, learning_rate: float) -> None:
        groups = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        super().__init__(learning_rate, groups)
        first, second = settings.betas
        self._betas, self._epsilon = (first, second), settings.eps
        self._decays = [settings.weight_decay if one.ndim > 1 else 0.0 for one in self.parameters]
        # Where others look for them.
        self.beta1, self.beta2, self.eps = (Tensor(value, self.learning_rate.dtype) for value in (first, second, settings.eps))
        self.adam_m = self.parameters.clone(prefix="adam_m", init="zeros")
        self.adam_v = self.parameters.clone(prefix="adam_v", init="zeros")
        self._update = ops.AdamWeightDecay()

    def construct(self, gradients: Sequence[Tensor]) -> None:
        """One step; the gradients are in the order of `parameters`."""
        step = int(self.global_step.asnumpy()[0]) + 1
        first, second = self._betas
        rate = float(self.learning_rate.asnumpy())
        corrected, root = 1.0 - first**step, math.sqrt(1.0 - second**step)
        rate, epsilon, share = rate * root / corrected, self._epsilon * root, corrected / root
        for parameter, first_moment, second_moment, decay, gradient in zip(
            self.parameters, self.adam_m, self.adam_v, self._decays, gradients, strict=True
        ):
            self._update(parameter, first_moment, second_moment, rate, first, second, epsilon, decay * share, gradient)
        self.global_step.assign_value(Tensor(np.array([step], np.int32)))
