"""The experts of a layer: transformers' parameters, of which a rank may hold some experts, or a part of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.functional import linear
from transformers import Qwen3MoeConfig
from transformers.activations import ACT2FN


class RoutedExperts(nn.Module):
    """The experts of a layer, in the place of transformers' `Qwen3MoeExperts`: the same parameters, the same values, wherever they are.

    The stacked parameters are `gate_up_proj` of shape (experts, 2 × width, hidden_size) and `down_proj` of shape (experts, hidden_size,
    width). After `split` a rank sends each token to the ranks that have its experts and gets the outputs back; the ranks of a
    tensor-parallel group compute a part of the width each, and add up.

    A token's experts are added up in one order, whoever computed them, and nothing is added up in an order that a device leaves to chance.

    Args:
        config: the model's.
    """

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]
        self._among: dist.ProcessGroup | None = None
        self._parts: DeviceMesh | None = None

    def split(self, mesh: DeviceMesh) -> None:
        """Keep this rank's part of the parameters, which have been whole, as DTensors.

        Args:
            mesh: its axis `ep`, if it has one, shares the experts out; its axis `tp`, if it has one, splits the width of each.
        """
        axes = mesh.mesh_dim_names or ()
        # The gate's rows come before the others in one tensor: a rank takes its part of each.
        for name, by_width in (("gate_up_proj", _StridedShard(1, split_factor=2)), ("down_proj", Shard(2))):
            whole = self.get_parameter(name).detach()
            part = _own_part(whole, mesh, [Shard(0) if axis == "ep" else by_width for axis in axes])
            self.register_parameter(name, nn.Parameter(part))
        self._among = mesh.get_group("ep") if "ep" in axes else None
        self._parts = mesh["tp"] if "tp" in axes else None

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, of shape (tokens, hidden_size).

        Args:
            hidden_states: of shape (tokens, hidden_size).
            top_k_index: the experts of each token, of shape (tokens, experts of a token).
            top_k_weights: their weights, of the same shape.
        """
        if self._parts is not None:
            hidden_states, top_k_weights = (_summing_gradients(tensor, self._parts) for tensor in (hidden_states, top_k_weights))
        tokens, choices = top_k_index.shape
        # One row per choice, those of one expert together.
        order = top_k_index.flatten().argsort(stable=True)
        rows = hidden_states.unsqueeze(1).expand(tokens, choices, -1).reshape(tokens * choices, -1)[order]
        counts = top_k_index.flatten().bincount(minlength=self.num_experts)
        outputs = self._compute(rows, counts) if self._among is None else self._compute_elsewhere(rows, counts, self._among)
        outputs = outputs[order.argsort()].view(tokens, choices, -1)
        result = (outputs * top_k_weights.unsqueeze(-1)).sum(1)
        return result if self._parts is None else _summed(result, self._parts)

    def _compute(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What this rank's experts make of rows that lie expert by expert, `counts` for each."""
        # Also those without a row: that their gradient is zero must be known where it is added up.
        weights = zip(rows.split(counts.tolist()), _local(self.gate_up_proj).unbind(), _local(self.down_proj).unbind(), strict=True)
        outputs = []
        for part, gate_up, down in weights:
            gate, up = linear(part, gate_up).chunk(2, dim=-1)
            outputs.append(linear(self.act_fn(gate) * up, down))
        return torch.cat(outputs)

    def _compute_elsewhere(self, rows: torch.Tensor, counts: torch.Tensor, among: dist.ProcessGroup) -> torch.Tensor:
        """The same where the ranks of a group have an equal part of the experts each, in the group's order. Collective."""
        sent = counts.view(among.size(), -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=among)
        out, back = sent.sum(1).tolist(), received.sum(1).tolist()
        arrived = _Exchange.apply(rows, out, back, among)
        # They come rank by rank, and of each rank expert by expert.
        experts = torch.arange(received.shape[1], device=rows.device).repeat(among.size())
        order = experts.repeat_interleave(received.flatten()).argsort(stable=True)
        outputs = self._compute(arrived[order], received.sum(0))
        return _Exchange.apply(outputs[order.argsort()], back, out, among)


class _Exchange(torch.autograd.Function):
    """Send rows to the ranks of a group and receive theirs; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, out: list[int], back: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.ways = out, back, group
        received = rows.new_empty(sum(back), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), back, out, group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = gradients
        out, back, group = ctx.ways
        returned = gradient.new_empty(sum(out), gradient.shape[1])
        dist.all_to_all_single(returned, gradient.contiguous(), out, back, group)
        return returned, None, None, None


def _own_part(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's part of a tensor that every rank has made whole: nothing is sent."""
    part = whole
    for axis, placement in enumerate(placements):
        size, index = mesh.size(axis), mesh.get_local_rank(axis)
        dimension: int = placement.dim  # type: ignore[attr-defined]
        blocks = part.chunk(getattr(placement, "split_factor", 1), dimension)
        part = torch.cat([block.chunk(size, dimension)[index] for block in blocks], dimension)
    return DTensor.from_local(part.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _summing_gradients(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The same values, whose gradients, a part on each rank of the mesh, are added up on the way back."""
    return DTensor.from_local(tensor, mesh, (Replicate(),), run_check=False).to_local(grad_placements=(Partial(),))


def _summed(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum over the ranks of the mesh, the same on each."""
    return DTensor.from_local(tensor, mesh, (Partial(),), run_check=False).full_tensor(grad_placements=(Replicate(),))
