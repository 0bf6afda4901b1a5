"""A model stage is laid on the mesh: tensor parallelism by torch's `parallelize_module`, data parallelism by `fully_shard`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from reshard.config.fields import ModelSettings
from reshard.training.experts import RoutedExperts
from reshard.training.mesh import Place
from reshard.training.model import ModelStage, build_stage, materialize


def build_model(settings: ModelSettings, seed: int, place: Place) -> ModelStage:
    """This rank's part of the model, with its initial weights.

    Layer by layer: memory, values, split; so that a rank never holds more than its own shards and one whole layer.
    """
    model = build_stage(settings, place.stage, place.sizes.pipeline)
    embedding = model.model.embed_tokens
    tied = settings.tie_word_embeddings and embedding is not None and isinstance(model.lm_head, nn.Linear)
    for index, layer in enumerate(model.model.layers):
        if any(True for _ in layer.parameters()):
            materialize(layer, f"model.layers.{index}.", settings, seed, place.device)
            experts = next((module for module in layer.modules() if isinstance(module, RoutedExperts)), None)
            if experts is not None:
                _lay_out_experts(experts, place)
            _lay_out(layer, layer_plan(dense=experts is None), place)
    materialize(model, "", settings, seed, place.device)
    if place.mesh is not None:
        _lay_out(model, outer_plan(model), place, tied=tied)
    return model


def layer_plan(*, dense: bool = True) -> dict[str, ParallelStyle]:
    """How tensor parallelism splits a decoder layer.

    One that isn't dense has experts, which split themselves, and a router, which every rank has whole.

    Attention and feed-forward each take a whole input and give a whole output: the first matrices are split by output (heads), the last by
    input, and their partial results are added up. Queries and keys are normed per head, so those norms' one weight collects gradients
    from all ranks: torch calls that style `SequenceParallel` (here along the heads).
    """
    whole = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    whole_keyword = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Replicate()}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    plan: dict[str, ParallelStyle] = {
        "self_attn": whole_keyword,
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "self_attn.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "self_attn.o_proj": RowwiseParallel(),
    }
    if dense:
        plan |= {
            "mlp": whole,
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
    return plan


def outer_plan(model: ModelStage) -> dict[str, ParallelStyle]:
    """How tensor parallelism splits embedding and output layer: both by vocabulary, so that they can be tied."""
    plan: dict[str, ParallelStyle] = {}
    if model.model.embed_tokens is not None:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    if isinstance(model.lm_head, nn.Linear):
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def _lay_out(module: nn.Module, plan: dict[str, ParallelStyle], place: Place, *, tied: bool = False) -> None:
    if place.mesh is None:
        return
    if place.sizes.tensor > 1:
        # Every rank made the same values: each takes its part of its own, nothing is sent.
        parallelize_module(module, place.mesh["tp"], plan, src_data_rank=None)
        if tied:
            # parallelize_module splits module by module, which unties.
            module.get_submodule("lm_head").weight = module.get_submodule("model.embed_tokens").weight
    _share_out(module, data_mesh(place))


def _lay_out_experts(experts: RoutedExperts, place: Place) -> None:
    mesh, sizes = place.expert_mesh, place.sizes
    if mesh is not None:
        experts.split(mesh["ep", "tp"] if sizes.tensor > 1 else mesh["ep"])
        _share_out(experts, mesh["edp_shard"] if sizes.expert_replicate == 1 else mesh["edp_replicate", "edp_shard"])
    elif place.mesh is not None and sizes.tensor > 1:
        # The same data-parallel ranks have all experts as have the layer, which takes them along.
        experts.split(place.mesh["tp"])


def data_mesh(place: Place) -> DeviceMesh:
    """The mesh over which data-parallel ranks split (last axis) and repeat (axis before it) parameters and optimizer."""
    assert place.mesh is not None
    if place.sizes.replicate == 1:
        return place.mesh["dp_shard"]
    return place.mesh["dp_replicate", "dp_shard"]


def _share_out(module: nn.Module, mesh: DeviceMesh) -> None:
    # Kept whole from the first micro-batch's forward pass to the last one's backward pass: one gather and one reduction a step.
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


def sum_gradients_over_data(model: nn.Module) -> None:
    """Make data-parallel ranks add their gradients up: the loss has been divided by the global batch already."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Not every collective library can average.
            module.set_force_sum_reduction_for_comms(enable=True)
            module.set_gradient_divide_factor(1.0)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: its shard of a DTensor, or all of it."""
    sharded: Any = tensor
    return sharded.to_local() if hasattr(sharded, "to_local") else tensor
