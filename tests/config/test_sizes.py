"""Ranks and batches: what fits together, and what is said when it doesn't."""

from __future__ import annotations

from typing import Any

import pytest

from reshard.config.fields import RunConfig
from reshard.config.sizes import BatchSizes, ParallelSizes, batch_sizes, expected_ranks, parallel_sizes
from reshard.errors import ConfigError

EXPERTS = {
    "model": {"model_type": "qwen3_moe", "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 3}
}


def config(**fields: Any) -> RunConfig:
    return RunConfig.model_validate(fields)


def parallel(data: int | None = None, tensor: int = 1, pipeline: int = 1, **more: Any) -> dict[str, Any]:
    return {"parallel_config": {"data_parallel": data, "model_parallel": tensor, "pipeline_stage": pipeline, **more}}


@pytest.mark.parametrize(
    ("fields", "ranks", "sizes"),
    [
        ({}, 1, ParallelSizes(1, 1, 1, 1)),
        (parallel(2, 2, 2), 8, ParallelSizes(2, 2, 1, 2)),
        (parallel(None, 2, 2), 8, ParallelSizes(2, 2, 1, 2)),
        (parallel(4) | {"parallel": {"enable_parallel_optimizer": True}}, 4, ParallelSizes(1, 1, 4, 1)),
        (parallel(4) | {"parallel": {"enable_parallel_optimizer": True, "optimizer_weight_shard_size": 2}}, 4, ParallelSizes(1, 2, 2, 1)),
    ],
)
def test_ranks_are_arranged(fields: dict[str, Any], ranks: int, sizes: ParallelSizes) -> None:
    assert parallel_sizes(config(**fields), ranks) == sizes
    assert sizes.ranks == ranks


def test_words_for_a_strategy() -> None:
    assert str(ParallelSizes(2, 1, 2, 2)) == "dp2 × tp2 × pp2"
    assert str(ParallelSizes(1, 1, 1, 4)) == "tp4"
    assert str(ParallelSizes(1, 1, 1, 1)) == "one rank"
    assert str(ParallelSizes(1, 2, 2, 1)) == "dp4 (2 × 2 sharded)"
    assert str(ParallelSizes(2, 4, 1, 1, 2)) == "dp4 (ep2) × pp2"
    assert str(ParallelSizes(1, 2, 2, 2, 4)) == "dp4 (2 × 2 sharded, ep4) × tp2"


@pytest.mark.parametrize(
    ("data", "shard", "expert", "replicas", "shards"),
    [
        (8, 8, 1, 1, 8),
        (8, 8, 2, 1, 4),
        (8, 8, 4, 1, 2),
        (8, 4, 2, 2, 2),
        (8, 4, 4, 2, 1),
        # More ranks share the experts out than share a copy of the rest: what is left are copies.
        (8, 2, 4, 2, 1),
        (8, None, 4, 2, 1),
        (6, 6, 6, 1, 1),
    ],
)
def test_experts_take_their_ranks_from_the_data_parallel_ones(
    data: int, shard: int | None, expert: int, replicas: int, shards: int
) -> None:
    context = {"enable_parallel_optimizer": shard is not None, "optimizer_weight_shard_size": shard or -1}
    sizes = parallel_sizes(config(**EXPERTS, **parallel(data, expert_parallel=expert), parallel=context), data)
    assert sizes == ParallelSizes(1, data // (shard or 1), shard or 1, 1, expert)
    assert (sizes.ranks, sizes.expert_replicate, sizes.expert_shard) == (data, replicas, shards)
    assert replicas * shards * expert == data


def test_ranks_follow_from_the_sizes() -> None:
    assert expected_ranks(config(**parallel(2, 2, 2))) == 8
    assert expected_ranks(config(**parallel(None, 4))) == 4


@pytest.mark.parametrize(
    ("fields", "ranks", "name"),
    [
        (parallel(2, 2, 2), 4, "parallel_config"),
        (parallel(None, 4, 1), 6, "parallel_config"),
        (parallel(None, 8, 1), 4, "parallel_config"),
        (parallel(1, 3), 3, "model.num_attention_heads"),
        (parallel(1, 4) | {"model": {"num_key_value_heads": 2}}, 4, "model.num_key_value_heads"),
        (parallel(1, 4) | {"model": {"intermediate_size": 190}}, 4, "model.intermediate_size"),
        (parallel(1, 2) | {"model": {"vocab_size": 257}}, 2, "model.vocab_size"),
        (parallel(1, 1, 5), 5, "parallel_config.pipeline_stage"),
        (
            parallel(4) | {"parallel": {"enable_parallel_optimizer": True, "optimizer_weight_shard_size": 3}},
            4,
            "parallel.optimizer_weight_shard_size",
        ),
        (
            parallel(4) | {"parallel": {"enable_parallel_optimizer": True, "optimizer_weight_shard_size": 0}},
            4,
            "parallel.optimizer_weight_shard_size",
        ),
        (parallel(2, expert_parallel=2), 2, "parallel_config.expert_parallel"),
        (EXPERTS | parallel(4, expert_parallel=3), 4, "parallel_config.expert_parallel"),
        (EXPERTS | parallel(1, 4, expert_parallel=4), 4, "parallel_config.expert_parallel"),
        (EXPERTS | parallel(8, expert_parallel=8), 8, "parallel_config.expert_parallel"),
        (
            EXPERTS | parallel(12, expert_parallel=3) | {"parallel": {"enable_parallel_optimizer": True, "optimizer_weight_shard_size": 4}},
            12,
            "parallel_config.expert_parallel",
        ),
        ({"model": EXPERTS["model"] | {"moe_intermediate_size": 15}} | parallel(1, 2), 2, "model.moe_intermediate_size"),
        # Layers without experts have the width of a dense model's.
        ({"model": EXPERTS["model"] | {"decoder_sparse_step": 2}} | parallel(1, 2), 2, "model.intermediate_size"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], ranks: int, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_sizes(config(**fields), ranks)
    assert caught.value.field == name


def test_unused_widths_may_be_anything() -> None:
    assert parallel_sizes(config(**EXPERTS, **parallel(1, 2)), 2).tensor == 2
    assert parallel_sizes(config(**parallel(1, 2)), 2).tensor == 2


@pytest.mark.parametrize(
    ("fields", "ranks", "found", "expected"),
    [
        (parallel(2, expert_parallel=2), 2, "2, with model.model_type qwen3", "1"),
        (EXPERTS | parallel(4, expert_parallel=3), 4, "3, of 4 data-parallel ranks", "a divisor of 4"),
        (EXPERTS | parallel(8, expert_parallel=8), 8, "8, with model.num_experts 12", "a divisor of 12"),
    ],
)
def test_what_is_wrong_with_expert_parallelism_is_said(fields: dict[str, Any], ranks: int, found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_sizes(config(**fields), ranks)
    assert (caught.value.found, caught.value.expected) == (found, expected)


def test_a_wrong_product_says_all_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_sizes(config(**parallel(2, 2, 2)), 4)
    assert caught.value.found == "data_parallel 2 × model_parallel 2 × pipeline_stage 2, 4 ranks"
    assert caught.value.expected == "a product of 4"
    assert "start 8 ranks" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("fields", "sizes", "batch"),
    [
        ({}, ParallelSizes(1, 1, 1, 1), BatchSizes(1, 1, 1)),
        ({"runner_config": {"batch_size": 2, "gradient_accumulation_steps": 3}}, ParallelSizes(1, 1, 4, 1), BatchSizes(2, 3, 24)),
        (
            {"runner_config": {"batch_size": 2, "gradient_accumulation_steps": 3}} | parallel(micro_batch_num=4),
            ParallelSizes(2, 1, 2, 1),
            BatchSizes(2, 12, 48),
        ),
        # Without stages there are no pipeline micro-batches, as in MindSpore Transformers.
        ({"runner_config": {"batch_size": 2}} | parallel(micro_batch_num=4), ParallelSizes(1, 1, 2, 1), BatchSizes(2, 1, 4)),
        ({"runner_config": {"batch_size": 1}}, ParallelSizes(3, 1, 1, 1), BatchSizes(1, 3, 3)),
        ({"runner_config": {"batch_size": 2, "global_batch_size": 8}}, ParallelSizes(2, 1, 2, 2), BatchSizes(2, 2, 8)),
        ({"runner_config": {"batch_size": 2, "global_batch_size": 8}}, ParallelSizes(1, 1, 1, 1), BatchSizes(2, 4, 8)),
    ],
)
def test_batches_are_spread(fields: dict[str, Any], sizes: ParallelSizes, batch: BatchSizes) -> None:
    assert batch_sizes(config(**fields), sizes) == batch
    assert batch.micro * batch.count * sizes.data == batch.total


@pytest.mark.parametrize(
    ("fields", "sizes", "name"),
    [
        ({"runner_config": {"batch_size": 3, "global_batch_size": 8}}, ParallelSizes(1, 1, 1, 1), "runner_config.global_batch_size"),
        (
            {"runner_config": {"batch_size": 2, "global_batch_size": 8, "gradient_accumulation_steps": 3}},
            ParallelSizes(1, 1, 1, 1),
            "runner_config.global_batch_size",
        ),
        (parallel(micro_batch_num=1), ParallelSizes(2, 1, 1, 1), "parallel_config.micro_batch_num"),
        ({"runner_config": {"batch_size": 8, "global_batch_size": 8}}, ParallelSizes(2, 1, 1, 1), "runner_config.batch_size"),
    ],
)
def test_batches_that_can_not_be_spread(fields: dict[str, Any], sizes: ParallelSizes, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        batch_sizes(config(**fields), sizes)
    assert caught.value.field == name
