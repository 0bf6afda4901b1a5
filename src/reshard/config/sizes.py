"""Parallel sizes and batch sizes, worked out for a number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from reshard.config.fields import ModelSettings, RunConfig
from reshard.errors import ConfigError


@dataclass(frozen=True)
class ParallelSizes:
    """How the ranks of a run are arranged: pipeline stages outermost, tensor parallelism innermost.

    Attributes:
        pipeline: stages.
        replicate: data-parallel groups that keep copies of each other's shards.
        shard: data-parallel ranks that share one copy of parameters and optimizer.
        tensor: ranks that split a layer's matrices.
        expert: data-parallel ranks, next to each other, that have different experts.
    """

    pipeline: int
    replicate: int
    shard: int
    tensor: int
    expert: int = 1

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.pipeline * self.data * self.tensor

    @property
    def expert_shard(self) -> int:
        """Of the ranks that have the same experts, those that share one copy of them: what expert parallelism leaves of `shard`."""
        return max(1, self.shard // self.expert)

    @property
    def expert_replicate(self) -> int:
        """Copies of the experts."""
        return self.data // (self.expert * self.expert_shard)

    def __str__(self) -> str:
        hybrid = [f"{self.replicate} × {self.shard} sharded"] if min(self.replicate, self.shard) > 1 else []
        inside = ", ".join(hybrid + [f"ep{self.expert}"] * (self.expert > 1))
        parts = [f"dp{self.data}" + (f" ({inside})" if inside else ""), f"tp{self.tensor}", f"pp{self.pipeline}"]
        return " × ".join(part for part, size in zip(parts, (self.data, self.tensor, self.pipeline), strict=True) if size > 1) or "one rank"


@dataclass(frozen=True)
class BatchSizes:
    """How the samples of a step are spread.

    Attributes:
        micro: samples of a micro-batch on one data-parallel rank.
        count: micro-batches of a step on one data-parallel rank.
        total: samples of a step over all ranks.
    """

    micro: int
    count: int
    total: int


def expected_ranks(run: RunConfig) -> int:
    """The number of ranks that a configuration asks for by itself."""
    parallel = run.parallel_config
    return (parallel.data_parallel or 1) * parallel.model_parallel * parallel.pipeline_stage


def parallel_sizes(run: RunConfig, ranks: int) -> ParallelSizes:
    """Arrange a number of ranks.

    Raises:
        ConfigError: the sizes' product is not the number of ranks, or the model can't be split so.
    """
    parallel = run.parallel_config
    tensor, pipeline = parallel.model_parallel, parallel.pipeline_stage
    data = parallel.data_parallel or max(1, ranks // (tensor * pipeline))
    if data * tensor * pipeline != ranks:
        given = "null" if parallel.data_parallel is None else data
        raise ConfigError(
            "the parallel sizes don't make up the number of ranks",
            field="parallel_config",
            found=f"data_parallel {given} × model_parallel {tensor} × pipeline_stage {pipeline}, {ranks} rank{'s' if ranks > 1 else ''}",
            expected=f"a product of {ranks}",
            fix=f"change the sizes, or start {(parallel.data_parallel or 1) * tensor * pipeline} ranks (--nproc)",
        )
    shard = 1
    if run.parallel.enable_parallel_optimizer:
        shard = data if run.parallel.optimizer_weight_shard_size == -1 else run.parallel.optimizer_weight_shard_size
        if shard == 0 or data % shard:
            raise ConfigError(
                "the data-parallel ranks can't be divided into groups that share one copy of the optimizer",
                field="parallel.optimizer_weight_shard_size",
                found=f"{shard} of {data} data-parallel ranks",
                expected=f"-1 or a divisor of {data}",
            )
    _check_model_fits(run.model, tensor, pipeline)
    _check_experts_fit(run.model, parallel.expert_parallel, data, shard)
    return ParallelSizes(pipeline, data // shard, shard, tensor, parallel.expert_parallel)


def _check_model_fits(model: ModelSettings, tensor: int, pipeline: int) -> None:
    with_experts = [model.has_experts(layer) for layer in range(model.num_hidden_layers)]
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "vocab_size": model.vocab_size,
    }
    if not all(with_experts):
        sizes["intermediate_size"] = model.intermediate_size
    if any(with_experts) and model.moe_intermediate_size is not None:
        sizes["moe_intermediate_size"] = model.moe_intermediate_size
    for name, size in sizes.items():
        if size % tensor:
            raise ConfigError(
                "tensor parallelism can't split the model evenly",
                field=f"model.{name}",
                found=f"{size}, with parallel_config.model_parallel {tensor}",
                expected=f"a multiple of {tensor}",
                fix=f"choose a model_parallel that divides {size}, or another {name}",
            )
    if pipeline > model.num_hidden_layers:
        raise ConfigError(
            "there are more pipeline stages than layers",
            field="parallel_config.pipeline_stage",
            found=pipeline,
            expected=f"at most model.num_hidden_layers, {model.num_hidden_layers}",
        )


def _check_experts_fit(model: ModelSettings, expert: int, data: int, shard: int) -> None:
    if expert == 1:
        return
    if model.num_experts is None:
        raise ConfigError(
            "expert parallelism shares out the experts of a layer, and the model has none",
            field="parallel_config.expert_parallel",
            found=f"{expert}, with model.model_type {model.model_type}",
            expected="1",
            fix="leave it out, or choose model_type qwen3_moe",
        )
    if data % expert:
        raise ConfigError(
            "the data-parallel ranks can't be divided into groups that share the experts",
            field="parallel_config.expert_parallel",
            found=f"{expert}, of {data} data-parallel rank{'s' if data > 1 else ''}",
            expected=f"a divisor of {data}",
            fix="expert parallelism takes its ranks from data_parallel and adds none of its own",
        )
    if model.num_experts % expert:
        raise ConfigError(
            "expert parallelism can't share the experts out evenly",
            field="parallel_config.expert_parallel",
            found=f"{expert}, with model.num_experts {model.num_experts}",
            expected=f"a divisor of {model.num_experts}",
        )
    if shard % expert and expert % shard:
        raise ConfigError(
            "expert parallelism crosses the groups that share one copy of the optimizer",
            field="parallel_config.expert_parallel",
            found=f"{expert}, with {shard} data-parallel ranks that share one copy",
            expected=f"a divisor or a multiple of {shard}",
            fix="change expert_parallel or parallel.optimizer_weight_shard_size",
        )


def batch_sizes(run: RunConfig, sizes: ParallelSizes) -> BatchSizes:
    """Spread the samples of a step over ranks and micro-batches.

    With a `global_batch_size` the number of micro-batches follows from it, so that the same configuration has the same global batches under
    any strategy; without, the global batch is the product of the others, as in MindSpore Transformers.

    Raises:
        ConfigError: a global batch that can't be spread, or fewer micro-batches than pipeline stages.
    """
    runner, parallel = run.runner_config, run.parallel_config
    given = [
        size for size in (runner.gradient_accumulation_steps, parallel.micro_batch_num if sizes.pipeline > 1 else None) if size is not None
    ]
    product = 1
    for size in given:
        product *= size
    if runner.global_batch_size is None:
        count = product
        if not given and sizes.pipeline > 1:
            count = sizes.pipeline
        total = runner.batch_size * sizes.data * count
    else:
        total = runner.global_batch_size
        count, remainder = divmod(total, runner.batch_size * sizes.data)
        if remainder:
            raise ConfigError(
                "the global batch can't be spread over the data-parallel ranks",
                field="runner_config.global_batch_size",
                found=f"{total}, with batch_size {runner.batch_size} and {sizes.data} data-parallel ranks",
                expected=f"a multiple of {runner.batch_size * sizes.data}",
            )
        if given and product != count:
            raise ConfigError(
                "the batch sizes contradict each other",
                field="runner_config.global_batch_size",
                found=f"{total} = batch_size {runner.batch_size} × {sizes.data} data-parallel ranks × {count} micro-batches",
                expected=f"{product} micro-batches, by gradient_accumulation_steps and micro_batch_num",
                fix="leave gradient_accumulation_steps and micro_batch_num out: they follow from the global batch",
            )
    if count < sizes.pipeline:
        raise ConfigError(
            "a pipeline needs at least as many micro-batches as stages",
            field="parallel_config.micro_batch_num" if runner.global_batch_size is None else "runner_config.batch_size",
            found=f"{count} micro-batch{'es' if count > 1 else ''} a step, {sizes.pipeline} stages",
            expected=f"at least {sizes.pipeline}",
            fix="set micro_batch_num higher"
            if runner.global_batch_size is None
            else "choose a smaller batch_size or a larger global_batch_size",
        )
    return BatchSizes(runner.batch_size, count, total)
