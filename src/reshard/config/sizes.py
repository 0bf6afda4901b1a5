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
    """

    pipeline: int
    replicate: int
    shard: int
    tensor: int

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.pipeline * self.data * self.tensor

    def __str__(self) -> str:
        parts = [f"dp{self.data}", f"tp{self.tensor}", f"pp{self.pipeline}"]
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
    return ParallelSizes(pipeline, data // shard, shard, tensor)


def _check_model_fits(model: ModelSettings, tensor: int, pipeline: int) -> None:
    for name, size in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_key_value_heads", model.num_key_value_heads or model.num_attention_heads),
        ("intermediate_size", model.intermediate_size),
        ("vocab_size", model.vocab_size),
    ):
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
