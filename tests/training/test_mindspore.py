"""The trainer under MindSpore, on one card: the published model, the steps of the trainer under PyTorch, and one run in both frameworks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import Qwen3ForCausalLM

import reshard
from reshard.config.fields import ModelSettings
from reshard.config.sizes import parallel_sizes
from reshard.training.metrics import read_metrics
from reshard.training.mindspore.learner import MindSporeLearner
from reshard.training.mindspore.qwen3 import Qwen3
from reshard.training.model import model_config
from reshard.training.trainer import Trainer
from tests.training import ranks

# Losses of the same run in two frameworks: float32, summed up in another order.
LIMIT = 1e-5

# Two layers: MindSpore's steps on the CPU are of many small kernels.
SMALL = {"num_hidden_layers": 2}


def trainer(output: Path, framework: str, *, steps: int, **fields: Any) -> Trainer:
    """8 samples a step, checkpoints every second one."""
    given = {
        "output_dir": str(output),
        "resume": "auto",
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}],
        "runner_config": {"max_steps": steps, "batch_size": 8},
        "lr_schedule": {"type": "CosineWithWarmUpLR", "warmup_steps": 2, "total_steps": 8},
        "optimizer": {"learning_rate": 1e-2},
        "model": SMALL,
        **fields,
    }
    configuration = ranks.settings(shard=None, framework=framework, **given)
    if framework == "torch":
        return ranks.trainer_of(configuration)
    run = configuration.run
    return Trainer(configuration, MindSporeLearner(run, 0, parallel_sizes(run, 1)))


def run(output: Path, framework: str, *, steps: int, **fields: Any) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown):
        trainer(output, framework, steps=steps, **fields).train()
    return shown.getvalue()


def losses(output: Path) -> dict[int, float]:
    return {step.step: step.loss for segment in read_metrics(output / "metrics.jsonl") for step in segment.steps}


def close(found: Mapping[int, float], expected: Mapping[int, float], limit: float = LIMIT) -> bool:
    return found.keys() == expected.keys() and all(abs(loss - expected[step]) <= limit * expected[step] for step, loss in found.items())


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": True, "hidden_act": "gelu", "num_key_value_heads": None}], ids=["groups", "tied"]
)
def test_it_computes_what_transformers_computes(fields: dict[str, Any], tmp_path: Path) -> None:
    settings = ModelSettings(**{**ranks.MODEL, **SMALL, **fields})
    model = Qwen3(settings, seed=3)
    published = Qwen3ForCausalLM(model_config(settings))
    reshard.save(tmp_path, 1, model=model)
    report = reshard.load(tmp_path, model=published, mapping="qwen3")
    assert not report.unexpected
    # Uneven norms, too, which begin as ones.
    for parameter in published.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(parameter.numel()))
    reshard.save(tmp_path, 2, model=published)
    reshard.load(tmp_path, model=model, mapping="qwen3")
    tokens = ranks.SAMPLES[:2]
    expected = published(tokens).logits.detach().numpy().reshape(-1, settings.vocab_size)
    found = model(Tensor(tokens.numpy().astype(np.int32))).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)


def test_its_names_are_the_published_ones() -> None:
    names = {parameter.name for parameter in Qwen3(ModelSettings(**{**ranks.MODEL, "num_hidden_layers": 1}), seed=3).get_parameters()}
    layer = ["input_layernorm", "pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"]
    layer += [f"self_attention.{part}" for part in ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")]
    assert names == {
        *(f"decoder.layers.0.{part}.weight" for part in layer),
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps under MindSpore that nothing stopped."""
    output = tmp_path_factory.mktemp("straight")
    run(output, "mindspore", steps=6)
    return output


@pytest.mark.sweep
def test_a_step_is_the_step_of_the_trainer_under_pytorch(straight: Path, tmp_path: Path) -> None:
    """From the same weights, with clipping, weight decay and bias correction, and other micro-batches."""
    expected = read_metrics(straight / "metrics.jsonl")[0].steps
    assert max(step.grad_norm for step in expected) > 1.0, "nothing was clipped"
    begun = trainer(tmp_path / "begin", "mindspore", steps=6)
    reshard.save(tmp_path / "root", 1, model=begun.model)
    begin = {"load_checkpoint": str(tmp_path / "root"), "resume": "never"}
    shown = run(tmp_path / "torch", "torch", steps=6, runner_config={"max_steps": 6, "batch_size": 2}, **begin)
    assert "load_checkpoint: weights of" in shown
    found = read_metrics(tmp_path / "torch" / "metrics.jsonl")[0].steps
    assert [step.lr for step in found] == [step.lr for step in expected]
    assert close({step.step: step.loss for step in found}, {step.step: step.loss for step in expected})
    for one, other in zip(found, expected, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def test_resuming_is_exact(straight: Path, tmp_path: Path) -> None:
    run(tmp_path, "mindspore", steps=4)
    shown = run(tmp_path, "mindspore", steps=6)
    assert "resume: auto: continuing from iteration 4" in shown
    assert "random states restored" in shown
    assert losses(tmp_path) == losses(straight)
    first, second = (reshard.Checkpoint(root / "checkpoint") for root in (straight, tmp_path))
    assert set(first) == set(second)
    assert {"global_step", "adam_m.output_layer.weight", "adam_v.output_layer.weight"} <= set(first)
    for name in first:
        assert first[name][...].tobytes() == second[name][...].tobytes(), name
    assert first.common == second.common


def test_one_run_in_both_frameworks(straight: Path, tmp_path: Path) -> None:
    run(tmp_path, "mindspore", steps=2)
    shown = run(tmp_path, "torch", steps=4)
    assert "resume: auto: continuing from iteration 2" in shown
    assert "random numbers go on from the seed" in shown
    assert "the schedule was put after step 2" in shown
    shown = run(tmp_path, "mindspore", steps=6)
    assert "resume: auto: continuing from iteration 4" in shown
    assert [segment.start["framework"] for segment in read_metrics(tmp_path / "metrics.jsonl")] == ["mindspore", "torch", "mindspore"]
    found, expected = losses(tmp_path), losses(straight)
    assert close(found, expected)
    # The optimizer went along: without its moments this run is another one.
    cut = {"load_checkpoint": str(tmp_path / "checkpoint" / "iteration_00000004"), "resume_training": True, "no_load_optim": True}
    shown = run(tmp_path / "cut", "torch", steps=6, resume="never", **cut)
    assert "continuing from iteration 4" in shown
    assert not close(losses(tmp_path / "cut"), {step: expected[step] for step in (5, 6)}, limit=100 * LIMIT)


@pytest.mark.sweep
def test_it_begins_with_weights_of_hugging_face_and_gives_them_back(tmp_path: Path) -> None:
    published = Qwen3ForCausalLM(model_config(ModelSettings(**{**ranks.MODEL, **SMALL})))
    published.save_pretrained(tmp_path / "hf")
    slow = {"learning_rate": 1e-6}
    shown = run(tmp_path / "out", "mindspore", steps=1, pretrained_model_dir=str(tmp_path / "hf"), optimizer=slow)
    assert "pretrained_model_dir: weights of" in shown
    reshard.export_checkpoint(tmp_path / "out" / "checkpoint", tmp_path / "given")
    back = Qwen3ForCausalLM.from_pretrained(tmp_path / "given")
    tokens = ranks.SAMPLES[:1]
    torch.testing.assert_close(back(tokens).logits, published(tokens).logits, rtol=0, atol=1e-3)
    assert not torch.equal(back(tokens).logits, published(tokens).logits), "nothing was learned"
