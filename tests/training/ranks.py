"""What the ranks of a pool do for the trainer's tests, and the small configuration that they train."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reshard.config.document import Document
from reshard.config.sizes import BatchSizes, batch_sizes, parallel_sizes
from reshard.config.validation import Configuration, validate
from reshard.frameworks.torch.layout import Meshes
from reshard.frameworks.torch.modules import name_tensors
from reshard.state import model_key
from reshard.training.mesh import Place, make_place
from reshard.training.parallelize import build_model
from reshard.training.step import TrainStep, clip_gradients
from reshard.training.torch_learner import TorchLearner
from reshard.training.trainer import Trainer

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}

# A layer without experts among those that have some.
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [1],
}

# A global batch of token ids.
SAMPLES = torch.randint(0, 256, (8, 17), generator=torch.Generator().manual_seed(1))


def settings(data: int = 1, tensor: int = 1, pipeline: int = 1, shard: int | None = -1, expert: int = 1, **more: Any) -> Configuration:
    """A small run: 8 samples a step under every strategy; `shard` None: data-parallel ranks repeat the optimizer."""
    fields: dict[str, Any] = {
        "seed": 3,
        "use_legacy_format": False,
        "model": MODEL,
        "train_dataset": {"seq_length": 16},
        "runner_config": {"max_steps": 6, "batch_size": 1, "global_batch_size": 8},
        "parallel_config": {"data_parallel": data, "model_parallel": tensor, "pipeline_stage": pipeline, "expert_parallel": expert},
        "parallel": {"enable_parallel_optimizer": shard is not None, "optimizer_weight_shard_size": shard or -1},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.05},
        "lr_schedule": {"warmup_steps": 2, "total_steps": 6},
    }
    for name, value in more.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    return validate(Document("test", fields))


def trainer_of(configuration: Configuration) -> Trainer:
    """This rank's trainer."""
    return Trainer(configuration, TorchLearner(configuration.run, rank_place(configuration)[0]))


def rank_place(configuration: Configuration) -> tuple[Place, BatchSizes]:
    """This rank's place, alone or in its pool."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    sizes = parallel_sizes(configuration.run, ranks)
    return make_place(sizes), batch_sizes(configuration.run, sizes)


Parts = dict[str, list[tuple[tuple[slice, ...], tuple[int, ...], np.ndarray]]]
"""Of each tensor what one rank holds: where it lies in the whole, the whole's shape, the values."""


def gradients(configuration: Configuration) -> dict[str, Any]:
    """Loss and norm of one step, and this rank's parts of every weight and gradient, before and after clipping to a fifth."""
    run = configuration.run
    place, batch = rank_place(configuration)
    model = build_model(run.model, run.seed, place)
    step = TrainStep(model, run.model, place, batch, run.train_dataset.seq_length)
    samples = SAMPLES[:, : run.train_dataset.seq_length + 1]
    share = batch.total // place.sizes.data
    loss, norm = step.run(samples[place.data_index * share : (place.data_index + 1) * share])
    names = name_tensors(model)
    meshes = Meshes(names.all_tensors(), names.fsdp2)
    parameters = dict(model.named_parameters())
    weights = _parts(meshes, parameters)
    found = _parts(meshes, {name: parameter.grad for name, parameter in parameters.items()})
    clip_gradients(model.parameters(), norm, norm / 5)
    clipped = _parts(meshes, {name: parameter.grad for name, parameter in parameters.items()})
    return {"loss": loss, "norm": norm, "gradients": found, "clipped": clipped, "weights": weights, "stage": place.stage}


def _parts(meshes: Meshes, tensors: Mapping[str, Any]) -> Parts:
    held = {name: meshes.sharded(model_key(name), tensor, name) for name, tensor in tensors.items()}
    return {
        name: [(shard.region.slices, tensor.global_shape, shard.memory.read().copy()) for shard in tensor.shards]
        for name, tensor in held.items()
    }


def whole(parts: Sequence[Parts]) -> dict[str, np.ndarray]:
    """The tensors that the parts of all ranks make up. Ranks that hold the same elements hold the same values."""
    result: dict[str, np.ndarray] = {}
    for name, (slices, shape, values) in ((name, held) for rank in parts for name, all_held in rank.items() for held in all_held):
        tensor = result.setdefault(name, np.full(shape, np.nan, np.float32))
        there = tensor[slices]
        np.testing.assert_array_equal(np.where(np.isnan(there), values, there), values, err_msg=name)
        tensor[slices] = values
    assert not any(np.isnan(tensor).any() for tensor in result.values())
    return result


def train(configuration: Configuration, output: Path, steps: int) -> tuple[list[float], str]:
    """Train on from the newest checkpoint below `output`, up to a step; every loss, and what was shown."""
    more = {
        "output_dir": str(output),
        "resume": "auto",
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}],
        "runner_config": {**configuration.run.runner_config.model_dump(), "max_steps": steps},
    }
    fields = {**configuration.run.model_dump(), **more}
    configuration = validate(Document("test", fields))
    trainer = trainer_of(configuration)
    losses: list[float] = []
    one_step = trainer.step

    def noted() -> Any:
        metrics = one_step()
        losses.append(metrics.loss)
        return metrics

    trainer.step = noted  # type: ignore[method-assign]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        trainer.train()
    return losses, shown.getvalue()
