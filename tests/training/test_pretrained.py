"""Models that transformers wrote are loaded, trained and given back: it computes the same with them before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import reshard
from reshard.errors import MismatchError
from tests.processes import RankPool
from tests.training import pretrained_ranks, ranks
from tests.training.pretrained_ranks import TOKENS, check_both_ways, contents, load_train_export, logits_of, written

Pools = Callable[[int], RankPool]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.mark.parametrize("tied", [False, True])
def test_one_rank(tmp_path: Path, tied: bool) -> None:
    shown = check_both_ways(tmp_path, lambda function, *arguments: [function(*arguments)], tied=tied, dtype=torch.bfloat16)
    assert "pretrained_model_dir: weights of" in shown
    assert "cast" in shown
    assert "computes something else" not in shown


def test_fsdp_ranks(rank_pool: Pools, tmp_path: Path) -> None:
    check_both_ways(tmp_path, rank_pool(2).run, tied=True, data=2)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_models_of_transformers_sharded_by_fsdp(rank_pool: Pools, tmp_path: Path, kind: str, balanced: bool) -> None:
    model = written(tmp_path / "source", kind=kind)
    with torch.no_grad():
        expected = model(TOKENS).logits.numpy()
        for parameter in model.parameters():
            parameter.zero_()
    for found in rank_pool(2).run(pretrained_ranks.load_and_compute, tmp_path / "source", model, balanced):
        np.testing.assert_array_equal(found, expected)


# Rank counts and strategies; `expert` where the model has experts.
ALL: dict[str, Any] = {"data": 2, "tensor": 2, "pipeline": 2}
STRATEGIES: list[tuple[int, dict[str, Any]]] = [(2, {"data": 2}), (4, {"data": 2, "tensor": 2}), (8, ALL)]


@pytest.mark.sweep
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("world", "strategy"), [*STRATEGIES, (8, {**ALL, "expert": 2})])
def test_experts_of_transformers_go_both_ways(rank_pool: Pools, tmp_path: Path, world: int, strategy: dict[str, Any], tied: bool) -> None:
    check_both_ways(tmp_path, rank_pool(world).run, tied=tied, kind="qwen3_moe", **strategy)


@pytest.mark.parametrize(("world", "strategy"), [(1, {}), *(pytest.param(*one, marks=pytest.mark.sweep) for one in STRATEGIES)])
def test_llama_goes_both_ways(rank_pool: Pools, tmp_path: Path, world: int, strategy: dict[str, Any]) -> None:
    source = tmp_path / "source"
    written(source, kind="llama")
    before = logits_of(source)
    run = rank_pool(world).run if world > 1 else lambda function, *arguments: [function(*arguments)]
    found = run(load_train_export, source, tmp_path, strategy)
    after = logits_of(tmp_path / "trained")
    for first, second in found:
        np.testing.assert_allclose(first, before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(second, after, rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3, "it has learned something"
    # A sharded run exports what an unsharded one does that holds the same, and a checkpoint what the run does that saved it.
    load_train_export(source, tmp_path / "alone", {})
    assert contents(tmp_path / "begun") == contents(tmp_path / "alone" / "begun")
    reshard.export_checkpoint(tmp_path / "root", tmp_path / "again", config=tmp_path / "trained", max_shard_size="20KB")
    assert contents(tmp_path / "again") == contents(tmp_path / "trained")


def test_what_shapes_do_not_show_is_said(tmp_path: Path) -> None:
    written(tmp_path / "source")
    configuration = ranks.settings(pretrained_model_dir=str(tmp_path / "source"))
    _, _, shown = pretrained_ranks.begin_and_train(configuration, tmp_path / "exported", 0)
    assert "its config.json says rope_theta 10000.0, this configuration 1000000.0" in shown


def test_an_untied_run_needs_the_output_layer(tmp_path: Path) -> None:
    written(tmp_path / "source", tied=True)
    configuration = ranks.settings(pretrained_model_dir=str(tmp_path / "source"))
    with pytest.raises(MismatchError, match=r"lm_head\.weight"):
        pretrained_ranks.begin_and_train(configuration, tmp_path / "exported", 0)


def test_a_stray_output_layer_of_a_tied_model_is_let_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path / "source")
    configuration = ranks.settings(model={"tie_word_embeddings": True}, pretrained_model_dir=str(tmp_path / "source"))
    pretrained_ranks.begin_and_train(configuration, tmp_path / "exported", 0)
    assert "lm_head.weight" in caplog.text
    assert "lm_head.weight" not in reshard.Checkpoint(tmp_path / "exported")


def test_experts_go_in_and_out(tmp_path: Path) -> None:
    torch.manual_seed(2)
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers")
    experts = {name: ranks.EXPERTS[name] for name in names}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**ranks.MODEL, **experts, "norm_topk_prob": True, "vocab_size": 256}))
    model.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    with torch.no_grad():
        expected = model(TOKENS).logits.numpy()
        for parameter in model.parameters():
            parameter.zero_()
        reshard.load(tmp_path / "source", model=model, mapping="qwen3_moe")
        np.testing.assert_array_equal(model(TOKENS).logits.numpy(), expected)
    with reshard.CheckpointManager(tmp_path / "root") as manager:
        manager.export(tmp_path / "exported", model=model)
    source, exported = reshard.Checkpoint(tmp_path / "source"), reshard.Checkpoint(tmp_path / "exported")
    assert set(exported) == set(source)
    for name in source:
        np.testing.assert_array_equal(exported[name][...], source[name][...])
    configuration = ranks.settings(model={**ranks.EXPERTS, "rope_theta": 10_000.0}, pretrained_model_dir=str(tmp_path / "source"))
    before, _, _ = pretrained_ranks.begin_and_train(configuration, tmp_path / "trained", 0)
    np.testing.assert_allclose(before, expected, rtol=1e-4, atol=1e-5)
    assert set(reshard.Checkpoint(tmp_path / "trained")) == set(source)
