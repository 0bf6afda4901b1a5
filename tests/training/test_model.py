"""The model: transformers' own Qwen3, in stages, with weights that don't depend on how it is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from reshard.config.fields import ModelSettings
from reshard.planning.naming import stage_layers
from reshard.training.model import build_stage, materialize, model_config
from reshard.training.seeds import derived_seed, seed_generators
from tests.training.ranks import EXPERTS, MODEL, SAMPLES, gradients, settings, whole

CPU = torch.device("cpu")


def made(stage: int = 0, stages: int = 1, seed: int = 3, **more: Any) -> Any:
    settings = ModelSettings(**{**MODEL, **more})
    model = build_stage(settings, stage, stages)
    materialize(model, "", settings, seed, CPU)
    return model


def test_layers_are_shared_out_evenly() -> None:
    assert [list(stage_layers(7, 3, stage)) for stage in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    for layers in range(1, 12):
        for stages in range(1, layers + 1):
            parts = [stage_layers(layers, stages, stage) for stage in range(stages)]
            assert [layer for part in parts for layer in part] == list(range(layers))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_it_is_the_published_model() -> None:
    model = made()
    published = Qwen3ForCausalLM(model_config(ModelSettings(**MODEL)))
    published.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(tokens), published(tokens).logits)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in published.named_parameters()]


@pytest.mark.parametrize(
    "fields",
    [{}, {"norm_topk_prob": False, "num_experts_per_tok": 1}, {"num_experts_per_tok": 3, "decoder_sparse_step": 2}],
    ids=["pairs", "one", "three"],
)
def test_with_experts_it_is_the_published_model(fields: dict[str, Any]) -> None:
    """Loss and gradients of a first step, with the same weights, as transformers computes them in one process."""
    model = {**EXPERTS, **fields}
    ours = gradients(settings(model=model))
    published = Qwen3MoeForCausalLM(model_config(ModelSettings(**MODEL, **model))).train()
    weights = {name: torch.from_numpy(weight) for name, weight in whole([ours["weights"]]).items()}
    published.load_state_dict(weights)
    loss = published(SAMPLES, labels=SAMPLES).loss
    loss.backward()
    assert ours["loss"] == pytest.approx(loss.item(), rel=1e-6)
    found = whole([ours["gradients"]])
    assert found.keys() == {name for name, _ in published.named_parameters()}
    for name, parameter in published.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(torch.from_numpy(found[name]), parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}, EXPERTS], ids=["untied", "tied", "experts"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_make_up_the_whole(stages: int, more: dict[str, Any]) -> None:
    tied = "tie_word_embeddings" in more
    whole = made(**more)
    parts = [made(stage, stages, **more) for stage in range(stages)]
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    hidden = tokens
    for part in parts:
        hidden = part(hidden)
    assert torch.equal(hidden, whole(tokens))
    names = [name for part in parts for name, _ in part.named_parameters()]
    expected = [name for name, _ in whole.named_parameters()]
    assert sorted(names) == sorted(expected + ["model.embed_tokens.weight"] * tied)
    last = dict(parts[-1].named_parameters())
    assert ("lm_head.weight" in last) is not tied


def test_weights_depend_on_seed_and_name_only() -> None:
    first, again, other = made(), made(), made(seed=4)
    weights, repeated, others = (dict(model.named_parameters()) for model in (first, again, other))
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)
    assert not torch.equal(weights["lm_head.weight"], others["lm_head.weight"])
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(weights["model.norm.weight"], torch.ones(32))


def test_building_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    made()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_from_the_generators_that_checkpoints_save() -> None:
    tokens = torch.zeros(1, 16, dtype=torch.long)
    plain, dropping = made(), made(attention_dropout=0.5)
    before = torch.get_rng_state()
    plain(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    first = dropping(tokens)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(dropping(tokens), first)
    torch.set_rng_state(before)
    assert torch.equal(dropping(tokens), first)


def test_seeds() -> None:
    # Part of what a resume under another strategy means: never another number.
    assert derived_seed(7, "random", 24, 0, 1) == 6139958978575939908
    assert len({derived_seed(7, "random", step, stage, data) for step in range(9) for stage in range(4) for data in range(4)}) == 144
    seed_generators(5)
    first = torch.rand(3)
    seed_generators(5)
    assert torch.equal(torch.rand(3), first)
