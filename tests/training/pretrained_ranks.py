"""What the ranks of a pool do with Hugging Face weights: load, compute, train, export; and what must come of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import reshard
from reshard.config.validation import Configuration
from reshard.manager import CheckpointManager
from reshard.planning.naming import stage_layers
from reshard.shortcuts import load
from reshard.training.mesh import Place
from reshard.training.model import _Elsewhere
from reshard.training.parallelize import _lay_out, layer_plan, outer_plan
from reshard.training.progress import Progress
from reshard.training.step import TrainStep
from reshard.training.torch_learner import TorchLearner
from reshard.training.trainer import Trainer
from tests.training import ranks

STEPS = 2

_KINDS: Mapping[str, tuple[type[Any], type[Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers")

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: Any, place: Place) -> np.ndarray:
    """What a model says to `TOKENS`, on every rank; its stages hand hidden states on."""
    stages = place.sizes.pipeline
    group = place.mesh.get_group("pp") if stages > 1 and place.mesh is not None else None
    with torch.no_grad():
        value = TOKENS
        if place.stage > 0:
            value = torch.empty(*TOKENS.shape, model.config.hidden_size)
            dist.recv(value, group=group, group_src=place.stage - 1)
        out = model(value)
        if group is not None:
            if not place.is_last_stage:
                dist.send(out.contiguous(), group=group, group_dst=place.stage + 1)
                out = torch.empty(*TOKENS.shape, model.config.vocab_size)
            dist.broadcast(out, group=group, group_src=stages - 1)
    return out.float().numpy()


def begin_and_train(configuration: Configuration, exported: Path, steps: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Begin with pretrained weights, train, export: the logits before and after, and what was shown."""
    place, _ = ranks.rank_place(configuration)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        trainer = Trainer(configuration, TorchLearner(configuration.run, place))
        assert trainer._resume(None, Progress(steps)) is None
        before = logits(trainer.model, place)
        for _ in range(steps):
            trainer.step()
    after = logits(trainer.model, place)
    with CheckpointManager(exported.parent / "root") as manager:
        manager.save(steps, model=trainer.model)
        manager.export(exported, model=trainer.model, max_shard_size="20KB")
    return before, after, shown.getvalue()


def load_and_compute(folder: Path, model: Any, balanced: bool) -> np.ndarray:
    """Fill a model of transformers, sharded by FSDP over all ranks, and compute."""
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    load(folder, model=model, balanced=balanced)
    with torch.no_grad():
        return model(TOKENS).logits.float().numpy()


def written(path: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, kind: str = "qwen3") -> PreTrainedModel:
    """A folder by `save_pretrained`, of several files."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {**ranks.MODEL, "vocab_size": 256, "max_position_embeddings": 64, "tie_word_embeddings": tied}
    if kind == "qwen3_moe":
        fields |= {"norm_topk_prob": True, **{name: ranks.EXPERTS[name] for name in _EXPERTS}}
    config, model_of = _KINDS[kind]
    model = model_of(config(**fields)).to(dtype)
    # Norms of ones alone would hide a norm that isn't loaded.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return model


def logits_of(path: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def check_both_ways(
    path: Path,
    run: Callable[..., list[tuple[np.ndarray, np.ndarray, str]]],
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    kind: str = "qwen3",
    **strategy: Any,
) -> str:
    """Load a folder, compute, train, export, open: what was shown on rank 0."""
    source, exported = path / "source", path / "exported"
    written(source, tied=tied, dtype=dtype, kind=kind)
    model: Mapping[str, Any] = {
        **(ranks.EXPERTS if kind == "qwen3_moe" else {}),
        "tie_word_embeddings": tied,
        "rope_theta": 10_000.0,
    }
    configuration = ranks.settings(**strategy, model=model, pretrained_model_dir=str(source), output_dir=str(path / "output"))
    before = logits_of(source)
    found = run(begin_and_train, configuration, exported, STEPS)
    after = logits_of(exported)
    for first, second, _ in found:
        np.testing.assert_allclose(first, before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(second, after, rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3, "it has learned something"
    reshard.export_checkpoint(path / "root", path / "again", config=exported, max_shard_size="20KB")
    assert contents(exported) == contents(path / "again")
    assert ("lm_head.weight" in reshard.Checkpoint(exported)) is not tied
    # One rank that begins with what several have exported exports the same.
    begin_and_train(ranks.settings(model=model, pretrained_model_dir=str(exported)), path / "alone" / "exported", 0)
    assert contents(path / "alone" / "exported") == contents(exported)
    return found[0][2]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stage_of(folder: Path, place: Place) -> Any:
    """This rank's stage of a model without any norm of queries and keys, laid out as the trainer lays its own out. Its weights are zero."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    plan = {name: style for name, style in layer_plan().items() if "norm" not in name}
    layers, stages = model.model.layers, place.sizes.pipeline
    mine = stage_layers(len(layers), stages, place.stage)
    for index in range(len(layers)):
        if index in mine:
            _lay_out(layers[index], plan, place)
        else:
            layers[index] = _Elsewhere()
    if not place.is_first_stage:
        model.model.embed_tokens = None
    if not place.is_last_stage:
        model.model.norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
    name = "input_ids" if place.is_first_stage else "inputs_embeds"
    plain = type(model).forward
    model.forward = lambda inputs: plain(model, **{name: inputs}, use_cache=False).logits
    _lay_out(model, outer_plan(model), place)
    return model


def load_train_export(folder: Path, output: Path, strategy: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Load a folder into a model of transformers, export it, train a step, and export it again: the logits before and after."""
    configuration = ranks.settings(**strategy)
    place, batch = ranks.rank_place(configuration)
    model = stage_of(folder, place)
    load(folder, model=model)
    before = logits(model, place)
    with CheckpointManager(output / "root") as manager:
        manager.export(output / "begun", model=model, max_shard_size="20KB")
        step = TrainStep(model, configuration.run.model, place, batch, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        share = batch.total // place.sizes.data
        step.run(ranks.SAMPLES[place.data_index * share : (place.data_index + 1) * share])
        optimizer.step()
        manager.save(1, model=model, optimizer=optimizer)
        manager.export(output / "trained", model=model, max_shard_size="20KB")
    return before, logits(model, place)
