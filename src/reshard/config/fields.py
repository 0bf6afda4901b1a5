"""Every field of a training configuration: its name, type, default and meaning.

The names are those of MindSpore Transformers, so that a user of Checkpoint 2.0 writes what they know. `describe_fields` lists them all with
what is allowed; the documentation is made from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Framework = Literal["torch", "mindspore"]
ResumeMode = Literal["never", "auto"]
ScheduleType = Literal["ConstantWarmUpLR", "LinearWithWarmUpLR", "CosineWithWarmUpLR"]

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A mapping of the YAML: no unknown fields, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ParallelConfig(Section):
    """`parallel_config`: how many ranks share the work, and how."""

    data_parallel: Positive | None = Field(
        default=None, description="replicas of the model that see different samples; null: all ranks that the other two leave"
    )
    model_parallel: Positive = Field(default=1, description="ranks that split every matrix of a layer between them (tensor parallelism)")
    pipeline_stage: Positive = Field(default=1, description="ranks that have different layers")
    expert_parallel: Positive = Field(
        default=1,
        description="data-parallel ranks that have different experts of a layer and send each other tokens; divides data_parallel",
    )
    micro_batch_num: Positive | None = Field(
        default=None,
        description="micro-batches of one step with pipeline stages; null: what the global batch needs; at least pipeline_stage",
    )


class ParallelContext(Section):
    """`parallel`: what data-parallel replicas do with the optimizer."""

    enable_parallel_optimizer: bool = Field(
        default=False,
        description="whether data-parallel ranks split parameters, gradients and optimizer between them (FSDP) or each keeps all of them",
    )
    optimizer_weight_shard_size: Annotated[int, Field(ge=-1)] = Field(
        default=-1,
        description="with the parallel optimizer: data-parallel ranks that share one copy; -1: all of them; fewer: hybrid sharding (HSDP)",
    )


class RunnerConfig(Section):
    """`runner_config`: how long, and how large a step."""

    max_steps: Positive | None = Field(
        default=None, description="optimizer steps of the whole run, resumed parts included; null: what epochs make"
    )
    epochs: Positive = Field(default=1, description="passes over the data, where max_steps is null")
    batch_size: Positive = Field(default=1, description="samples of one micro-batch on one data-parallel rank")
    gradient_accumulation_steps: Positive | None = Field(
        default=None,
        description="micro-batches (with stages: of micro_batch_num each) added up for a step; null: what the global batch needs, else 1",
    )
    global_batch_size: Positive | None = Field(
        default=None,
        description="samples of one step over all ranks, which then stay the same under any strategy; null: the product of the others",
    )


class ModelSettings(Section):
    """`model`: a Qwen3, dense or with experts, with the names of its Hugging Face configuration."""

    model_type: Literal["qwen3", "qwen3_moe"] = Field(default="qwen3", description="the model family: dense, or with experts")
    vocab_size: Positive = Field(default=256, description="tokens; at least 256, the data are bytes")
    hidden_size: Positive = Field(default=64, description="width of the residual stream")
    intermediate_size: Positive = Field(default=192, description="width of the feed-forward layers")
    num_hidden_layers: Positive = Field(default=4, description="decoder layers")
    num_attention_heads: Positive = Field(default=8, description="query heads")
    num_key_value_heads: Positive | None = Field(default=None, description="key and value heads; null: as many as query heads")
    head_dim: Positive | None = Field(default=None, description="width of a head, even; null: hidden_size / num_attention_heads")
    hidden_act: Literal["silu", "gelu", "relu"] = Field(default="silu", description="activation of the feed-forward layers")
    max_position_embeddings: Positive = Field(default=4096, description="longest sequence; at least train_dataset.seq_length")
    initializer_range: Annotated[float, Field(gt=0)] = Field(default=0.02, description="standard deviation of the initial matrices")
    rms_norm_eps: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="epsilon of the norms")
    rope_theta: Annotated[float, Field(gt=0)] = Field(default=1_000_000.0, description="base of the rotary embedding")
    attention_bias: bool = Field(default=False, description="whether the attention's projections have a bias")
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="dropout on attention weights")
    tie_word_embeddings: bool = Field(default=False, description="whether embedding and output layer are one parameter")
    num_experts: Positive | None = Field(default=None, description="experts of a layer; only, and always, with qwen3_moe")
    num_experts_per_tok: Positive | None = Field(default=None, description="experts that a token goes to; as num_experts")
    moe_intermediate_size: Positive | None = Field(default=None, description="width of an expert; as num_experts")
    norm_topk_prob: bool = Field(
        default=True, description="whether the weights of a token's experts are made to add up to 1, as in the published models"
    )
    decoder_sparse_step: Positive = Field(default=1, description="every how many layers one has experts")
    mlp_only_layers: list[NotNegative] = Field(default=[], description="layers (from 0) that have no experts all the same")

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) has experts in the place of one feed-forward network: transformers' rule."""
        return self.num_experts is not None and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class OptimizerSettings(Section):
    """`optimizer`."""

    type: Literal["AdamW"] = Field(default="AdamW", description="the algorithm")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.95], description="decay of the two moments"
    )
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="epsilon of the denominator")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="decoupled weight decay of matrices; norms and biases have none"
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="peak learning rate, where lr_schedule doesn't give one"
    )


class ScheduleSettings(Section):
    """`lr_schedule`: warm-up and decay of the learning rate."""

    type: ScheduleType = Field(default="CosineWithWarmUpLR", description="what follows the warm-up: constant, linear decay or cosine decay")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(default=None, description="peak learning rate; null: that of the optimizer")
    warmup_steps: NotNegative = Field(default=0, description="steps over which the rate rises linearly from 0")
    total_steps: Annotated[int, Field(ge=-1)] = Field(default=-1, description="step at which the decay ends; -1: the run's last")
    lr_end: Annotated[float, Field(ge=0)] = Field(default=0.0, description="learning rate at the end of the decay")


class DatasetSettings(Section):
    """`train_dataset`: bytes of text in windows of a fixed length."""

    path: str = Field(
        default="",
        description="a file, or a folder all of whose files are read; empty: the source of the running Python's standard library",
    )
    seq_length: Positive = Field(default=128, description="tokens of a sample")


class KeepBestSettings(Section):
    """`keep_checkpoint_best`: which checkpoints are kept for a metric."""

    metric: Literal["loss", "grad_norm"] = Field(default="loss", description="the metric: of the step that was saved")
    count: Positive = Field(default=1, description="how many are kept")
    mode: Literal["min", "max"] = Field(default="min", description="whether the least values are the best, or the greatest")


class CheckpointMonitor(Section):
    """`callbacks: - type: CheckpointMonitor`: saves while training."""

    type: Literal["CheckpointMonitor"] = Field(description="this callback")
    prefix: str = Field(default="CKP", description="begin of the names of data files; the model's name, best")
    directory: str | None = Field(default=None, description="the checkpoint root; null: {output_dir}/checkpoint")
    save_checkpoint_steps: Positive | None = Field(default=1, description="steps between two saves; null: nothing is ever saved")
    keep_checkpoint_max: Positive = Field(
        default=5, description="newest checkpoints that are kept; the oldest is removed after a newer one was committed"
    )
    keep_checkpoint_every: Positive | None = Field(
        default=None, description="besides, every checkpoint whose step is a multiple of this is kept"
    )
    keep_checkpoint_days: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="besides, every checkpoint is kept that is no older than so many days"
    )
    keep_checkpoint_best: KeepBestSettings | None = Field(default=None, description="besides, the best by a metric are kept")
    async_save: Literal[True, False, "copy", "deferred"] = Field(
        default=False,
        description="whether saving runs in the background: copy (or True) copies the state before training goes on, deferred while the "
        "next step runs up to its optimizer",
    )
    checkpoint_format: str = Field(default="safetensors", description="the only format of Checkpoint 2.0; others are converted to it")
    remove_redundancy: bool = Field(
        default=False, description="whether what several ranks hold is written once, by one of them, evenly by bytes"
    )
    check_replicas: bool = Field(
        default=False,
        description="whether what several ranks hold is hashed and compared before a save commits; replicas that differ are an error",
    )
    save_optimizer: bool = Field(default=True, description="whether the optimizer is saved too; without it a run can't be resumed exactly")


class LossMonitor(Section):
    """`callbacks: - type: MFLossMonitor`: how often progress is printed."""

    type: Literal["MFLossMonitor"] = Field(description="this callback")
    per_print_times: Positive = Field(default=1, description="steps between two lines of progress, where the output is no terminal")


class CheckpointSection(Section):
    """`checkpoint`: the newer spelling of saving and loading; what is given here counts more than the older fields."""

    load_path: str | None = Field(default=None, description="load_checkpoint")
    load_balanced: bool | None = Field(default=None, description="balanced_load")
    no_load_optim: bool | None = Field(
        default=None,
        description="True: no_load_optim; False: continue the run of the checkpoint, as resume_training: True does; absent: as "
        "resume_training says",
    )
    enable_save: bool | None = Field(default=None, description="False: nothing is ever saved")
    save_path: str | None = Field(default=None, description="the monitor's directory")
    save_max: Positive | None = Field(default=None, description="the monitor's keep_checkpoint_max")
    save_interleaved_steps: Positive | None = Field(default=None, description="the monitor's save_checkpoint_steps")
    no_save_optim: bool | None = Field(default=None, description="the opposite of the monitor's save_optimizer")
    save_remove_redundancy: bool | None = Field(default=None, description="the monitor's remove_redundancy")
    remove_redundancy: bool | None = Field(default=None, description="the same, as PyNative configurations spell it")
    async_save: Literal[True, False, "copy", "deferred"] | None = Field(default=None, description="the monitor's async_save")
    prefix: str | None = Field(default=None, description="the monitor's prefix")
    reshard_worker_num: Positive | None = Field(default=None, description="not needed: reads are spread over threads by themselves")
    load_worker_number: Positive | None = Field(default=None, description="not needed, as reshard_worker_num")
    save_global_layout_cache: bool | None = Field(default=None, description="not needed: ranks tell each other their layouts once")


Callback = Annotated[CheckpointMonitor | LossMonitor, Field(discriminator="type")]


class RunConfig(Section):
    """The whole configuration."""

    framework: Framework = Field(
        default="torch",
        description="what trains: torch, or mindspore, under msrun and by data parallelism; a run goes on under either from the other's "
        "checkpoints",
    )
    seed: NotNegative = Field(default=42, description="of initial weights, order of samples and random numbers")
    output_dir: str = Field(default="./output", description="where metrics.jsonl and, by default, the checkpoints go")
    load_checkpoint: str = Field(
        default="", description="a checkpoint root (then its tracker chooses the iteration) or one iteration; empty: none"
    )
    resume_training: bool = Field(
        default=False,
        description="with load_checkpoint: continue that run (step, optimizer, schedule, data, random numbers), or take the weights only",
    )
    resume: ResumeMode = Field(
        default="never",
        description="auto: continue from the newest checkpoint of this run's own root if there is one, else start; never: don't look",
    )
    no_load_optim: bool = Field(
        default=False, description="whether a resumed run leaves the checkpoint's optimizer out and begins with fresh moments"
    )
    pretrained_model_dir: str = Field(
        default="",
        description="a folder of Hugging Face weights that a run begins with, where it doesn't continue another; ignored, with a line that "
        "says so, beside load_checkpoint",
    )
    balanced_load: bool = Field(
        default=False, description="whether ranks share the reading of a checkpoint: each byte is read once in the whole job, and sent on"
    )
    on_corrupt: Literal["error", "fallback"] = Field(
        default="error",
        description="a damaged checkpoint: error, which names the newest intact one, or fallback to it, with a warning",
    )
    skip_unhealthy: bool = Field(
        default=False,
        description="whether a checkpoint marked as unhealthy (its loss was not finite) gives way to the newest older one that is not",
    )
    stop_after_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="the run stops by itself so long after its start: after the step in which it is then, which is saved; null: never",
    )
    stop_timeout: Annotated[float, Field(gt=0, lt=30)] = Field(
        default=15.0,
        description="seconds after a SIGTERM in which all ranks must have come to the same step, or nothing more is saved; torchrun kills "
        "after 30, and the save needs time too",
    )
    use_legacy_format: bool | None = Field(
        default=None,
        description="False: Checkpoint 2.0, which is also what absence means; True: load_checkpoint may name files of Checkpoint 1.0, and "
        "what is saved is 2.0 all the same",
    )
    auto_trans_ckpt: bool | None = Field(default=None, description="not needed: every load reshards")
    src_strategy_path_or_dir: str | None = Field(
        default=None,
        description="with use_legacy_format: True and a checkpoint of several ranks: the strategy files of the run that saved it, or a "
        "table of layouts in JSON; else not needed: checkpoints know their strategy",
    )
    load_ckpt_format: str = Field(default="safetensors", description="the only format of Checkpoint 2.0; others are converted to it")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="largest global norm of the gradient, larger ones are scaled down; null: no clipping"
    )
    parallel_config: ParallelConfig = Field(default_factory=ParallelConfig, description="parallel sizes")
    parallel: ParallelContext = Field(default_factory=ParallelContext, description="the parallel optimizer")
    runner_config: RunnerConfig = Field(default_factory=RunnerConfig, description="steps and batches")
    model: ModelSettings = Field(default_factory=ModelSettings, description="the model")
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, description="the optimizer")
    lr_schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="the learning rate over the steps")
    train_dataset: DatasetSettings = Field(default_factory=DatasetSettings, description="the data")
    callbacks: list[Callback] = Field(default_factory=list, description="what happens beside training")
    checkpoint: CheckpointSection | None = Field(
        default=None, description="the newer spelling of saving and loading; with it, checkpoints are saved without a CheckpointMonitor too"
    )

    @property
    def monitor(self) -> CheckpointMonitor | None:
        """The checkpoint monitor, if there is one."""
        return next((callback for callback in self.callbacks if isinstance(callback, CheckpointMonitor)), None)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.lr_schedule.learning_rate or self.optimizer.learning_rate or 1e-3


def describe_fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, meaning), sections before their fields."""
    for name, field in section.model_fields.items():
        nested = list(sections_in(field.annotation))
        default = "required" if field.is_required() else "" if nested else repr(field.get_default(call_default_factory=True))
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""
        for kind in nested:
            mark = f"[{kind.__name__}]" if len(nested) > 1 else ""
            yield from describe_fields(kind, f"{prefix}{name}{mark}.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The kinds of sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from sections_in(part)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type):
        return "section" if issubclass(annotation, BaseModel) else annotation.__name__
    if getattr(annotation, "__origin__", None) is Literal:
        return " or ".join(str(value) for value in annotation.__args__)
    parts = [_type_name(part) for part in getattr(annotation, "__args__", ()) if part is not None]
    origin = getattr(annotation, "__origin__", None)
    if origin is list:
        return f"list of {parts[0]}"
    return " or ".join(dict.fromkeys("null" if part == "NoneType" else part for part in parts))
