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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import reshard
from reshard.config.validation import Configuration
from reshard.manager import CheckpointManager
from reshard.shortcuts import load
from reshard.training.mesh import Place
from reshard.training.progress import Progress
from reshard.training.trainer import Trainer
from tests.training import ranks

STEPS = 2

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
        trainer = Trainer(configuration, place)
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
    model = (LlamaForCausalLM(LlamaConfig(**fields)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**fields))).to(dtype)
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
    **strategy: Any,
) -> str:
    """Load a folder, compute, train, export, open: what was shown on rank 0."""
    source, exported = path / "source", path / "exported"
    written(source, tied=tied, dtype=dtype)
    model: Mapping[str, Any] = {"tie_word_embeddings": tied, "rope_theta": 10_000.0}
    configuration = ranks.settings(**strategy, model=model, pretrained_model_dir=str(source), output_dir=str(path / "output"))
    before = logits_of(source)
    found = run(begin_and_train, configuration, exported, STEPS)
    after = logits_of(exported)
    for first, second, _ in found:
        np.testing.assert_allclose(first, before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(second, after, rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3, "it has learned something"
    reshard.export_checkpoint(path / "root", path / "again", config=exported, max_shard_size="20KB")
    assert {f.name: f.read_bytes() for f in exported.iterdir()} == {f.name: f.read_bytes() for f in (path / "again").iterdir()}
    assert ("lm_head.weight" in reshard.Checkpoint(exported)) is not tied
    return found[0][2]
