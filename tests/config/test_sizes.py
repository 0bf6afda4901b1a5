"""Ranks and batches: what fits together, and what is said when it doesn't."""

from __future__ import annotations

from typing import Any

import pytest

from reshard.config.fields import RunConfig
from reshard.config.sizes import BatchSizes, ParallelSizes, batch_sizes, expected_ranks, parallel_sizes
from reshard.errors import ConfigError


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
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], ranks: int, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_sizes(config(**fields), ranks)
    assert caught.value.field == name


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
