"""A run begins with the weights of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.config.fields import Framework, ModelSettings
from reshard.loading.report import RestoreReport
from reshard.shortcuts import load
from reshard.sources.huggingface import read_model_config
from reshard.storage.posix import PosixStorage

# What changes a model's numbers without changing the shape of any tensor: nothing else would notice.
_UNSEEN = (
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "num_experts_per_tok",
    "norm_topk_prob",
)


def load_pretrained(
    directory: str, model: Any, settings: ModelSettings, framework: Framework, *, balanced: bool
) -> tuple[RestoreReport, tuple[str, ...]]:
    """Fill a model with the weights of a folder. Collective.

    Types are converted where they differ from the model's. Optimizer, schedule, data and random numbers stay as they are.

    Args:
        directory: the folder.
        model: the run's.
        settings: the model's: what the folder's `config.json` says otherwise is said.
        framework: the run's; under MindSpore a model has other names.
        balanced: whether ranks read for each other.

    Returns:
        The report, and what the user should hear.

    Raises:
        ReshardError: the folder isn't what it promises, or its weights don't fit the model.
    """
    # The folder has each expert's matrices, the model has those of a layer stacked; a dense model has the folder's names.
    mapping = settings.model_type if settings.num_experts is not None or framework == "mindspore" else None
    report = load(directory, model=model, restore_random=False, balanced=balanced, mapping=mapping)
    config = read_model_config(PosixStorage(), directory)
    return report, tuple(_differences(config, settings)) if config is not None else ()


def _differences(config: Mapping[str, Any], settings: ModelSettings) -> Iterator[str]:
    rope = config.get("rope_parameters")
    said = {"rope_theta": rope.get("rope_theta"), **config} if isinstance(rope, Mapping) else config
    for name in _UNSEEN:
        ours, theirs = getattr(settings, name), said.get(name)
        if name == "num_key_value_heads" and ours is None:
            ours = settings.num_attention_heads
        if theirs is not None and ours is not None and theirs != ours:
            yield (
                f"pretrained_model_dir: its config.json says {name} {theirs!r}, this configuration {ours!r}: the model computes "
                "something else with these weights"
            )
