"""One optimizer step: forward and backward over the micro-batches, the global gradient norm, clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy

from reshard.config.fields import ModelSettings
from reshard.config.sizes import BatchSizes
from reshard.training.mesh import Place
from reshard.training.model import ModelStage
from reshard.training.parallelize import local_part, sum_gradients_over_data

# As in torch's own clipping.
_NORM_EPSILON = 1e-6


class TrainStep:
    """Computes loss and gradients of a global batch, whatever the strategy.

    Args:
        model: this rank's stage, laid out.
        settings: the model's.
        place: this rank's.
        batch: the sizes of the global batch.
        seq_length: tokens of a sample.
    """

    def __init__(self, model: ModelStage, settings: ModelSettings, place: Place, batch: BatchSizes, seq_length: int) -> None:
        self._model = model
        self._place = place
        self._batch = batch
        # Every sample weighs the same: losses and gradients of all micro-batches and ranks are added up to the mean over the global batch.
        self._scale = 1.0 / (batch.total * seq_length)
        self._tied = _tied_over_stages(model, settings, place)
        self._tied_group = self._make_tied_group() if settings.tie_word_embeddings and place.sizes.pipeline > 1 else None
        self._schedule: Schedule1F1B | None = None
        sum_gradients_over_data(model)
        if place.sizes.pipeline > 1:
            self._schedule = self._make_schedule(settings, seq_length)

    def run(self, samples: torch.Tensor) -> tuple[float, float]:
        """Leave the gradients of a global batch in the parameters.

        Args:
            samples: this data-parallel rank's token ids, of shape (micro-batches × samples of each, seq_length + 1).

        Returns:
            The mean loss over the global batch and the global norm of its gradient, the same on every rank.
        """
        tokens, labels = samples[:, :-1], samples[:, 1:]
        loss = self._run_whole(tokens, labels) if self._schedule is None else self._run_pipeline(tokens, labels)
        self._add_tied_gradients()
        return self._over_all_ranks(loss, _sum_of_squares(self._model.parameters(), self._place, skip=self._counted_elsewhere()))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") * self._scale

    def _run_whole(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        total = 0.0
        model = self._model
        for index in range(self._batch.count):
            part = slice(index * self._batch.micro, (index + 1) * self._batch.micro)
            if isinstance(model, FSDPModule):
                last = index == self._batch.count - 1
                model.set_is_last_backward(last)
                model.set_reshard_after_backward(last)
                model.set_requires_gradient_sync(last)
            loss = self._loss(model(tokens[part]), labels[part])
            loss.backward()
            total += loss.item()
        return total

    def _run_pipeline(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        assert self._schedule is not None
        losses: list[torch.Tensor] = []
        given = (tokens,) if self._place.is_first_stage else ()
        if self._place.is_last_stage:
            self._schedule.step(*given, target=labels, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*given, return_outputs=False)
        return sum(loss.item() for loss in losses)

    def _make_schedule(self, settings: ModelSettings, seq_length: int) -> Schedule1F1B:
        assert self._place.mesh is not None
        shape = (self._batch.micro, seq_length)
        # The shapes are given, so that torch need not find them out by a pass of its own.
        tokens = torch.empty(shape, dtype=torch.long, device="meta")
        hidden = torch.empty((*shape, settings.hidden_size), device="meta", requires_grad=True)
        logits = torch.empty((*shape, settings.vocab_size), device="meta", requires_grad=True)
        stage = PipelineStage(
            self._model,
            self._place.stage,
            self._place.sizes.pipeline,
            self._place.device,
            input_args=tokens if self._place.is_first_stage else hidden,
            output_args=logits if self._place.is_last_stage else hidden,
            group=self._place.mesh.get_group("pp"),
        )
        return Schedule1F1B(stage, self._batch.count, loss_fn=self._loss, scale_grads=False)

    def _make_tied_group(self) -> dist.ProcessGroup | None:
        """The first and the last stage of this rank's pipeline, which both have the tied embedding. Collective."""
        assert self._place.mesh is not None
        columns = self._place.mesh.mesh.reshape(self._place.sizes.pipeline, -1)
        mine: Any = None
        for first, last in zip(columns[0].tolist(), columns[-1].tolist(), strict=True):
            group: Any = dist.new_group([first, last])
            if self._place.rank in (first, last):
                mine = group
        return mine

    def _add_tied_gradients(self) -> None:
        if self._tied is not None and self._tied_group is not None and self._tied.grad is not None:
            dist.all_reduce(local_part(self._tied.grad), group=self._tied_group)

    def _counted_elsewhere(self) -> nn.Parameter | None:
        """The tied parameter on the last stage: the first one counts it."""
        return self._tied if self._tied is not None and not self._place.is_first_stage else None

    def _over_all_ranks(self, loss: float, squares: float) -> tuple[float, float]:
        place = self._place
        # The ranks of a tensor-parallel group have computed the same loss.
        sums = torch.tensor([loss if place.tensor_index == 0 else 0.0, squares], dtype=torch.float64, device=place.device)
        if place.mesh is not None:
            dist.all_reduce(sums)
        mean, squared = sums.tolist()
        return mean, squared**0.5


def _tied_over_stages(model: ModelStage, settings: ModelSettings, place: Place) -> nn.Parameter | None:
    """The tied embedding's parameter on the first and on the last of several stages."""
    if not settings.tie_word_embeddings or place.sizes.pipeline == 1 or not (place.is_first_stage or place.is_last_stage):
        return None
    tied: Any = model.model.embed_tokens.weight
    return tied


def _sum_of_squares(parameters: Iterable[nn.Parameter], place: Place, skip: nn.Parameter | None = None) -> float:
    """This rank's share of the squared norm: over all ranks the shares add up to the sum over every element of the model once."""
    total = 0.0
    for parameter in parameters:
        if parameter.grad is None or parameter is skip:
            continue
        total += local_part(parameter.grad).double().square().sum().item() / _copies(parameter, place)
    return total


def _copies(parameter: nn.Parameter, place: Place) -> int:
    """How many ranks of the pipeline stage hold each element of a parameter."""
    ranks = place.sizes.data * place.sizes.tensor
    if ranks == 1:
        return 1
    shards = 1
    # On more than one rank every parameter is a DTensor.
    for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):  # type: ignore[attr-defined]
        # Not `is_shard`: it doesn't know the strided shards that FSDP makes of tensor-parallel ones.
        shards *= 1 if placement.is_replicate() else size
    return ranks // shards


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float | None) -> None:
    """Scale the gradients down, in place, where their global norm is over the limit."""
    if limit is None or norm <= limit:
        return
    # On local parts: torch's own clipping can't take gradients over different meshes in one call.
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).mul_(limit / (norm + _NORM_EPSILON))
