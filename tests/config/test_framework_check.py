"""What the trainer can't do under MindSpore is said before anything starts, and so is the launcher of another framework."""

from __future__ import annotations

from typing import Any

import pytest

from reshard.config.document import Document
from reshard.config.validation import Configuration, validate
from reshard.errors import ConfigError
from reshard.training import launcher

EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def configuration(framework: str, **fields: Any) -> Configuration:
    return validate(Document("run.yaml", {"framework": framework, "use_legacy_format": False, **fields}))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": EXPERTS}, "model.model_type"),
        ({"model": {"attention_bias": True}}, "model.attention_bias"),
        ({"model": {"attention_dropout": 0.1}}, "model.attention_dropout"),
        ({"parallel_config": {"model_parallel": 2}}, "parallel_config.model_parallel"),
        ({"parallel_config": {"pipeline_stage": 2}}, "parallel_config.pipeline_stage"),
        ({"parallel": {"enable_parallel_optimizer": True}}, "parallel.enable_parallel_optimizer"),
    ],
)
def test_what_it_cant_do(fields: dict[str, Any], field: str) -> None:
    assert configuration("torch", **fields).run.framework == "torch"
    with pytest.raises(ConfigError, match="under MindSpore") as caught:
        configuration("mindspore", **fields)
    assert caught.value.field == field


def test_without_a_word_it_is_torch() -> None:
    assert validate(Document("run.yaml", {})).run.framework == "torch"
    with pytest.raises(ConfigError, match="framework"):
        configuration("jax")


@pytest.mark.parametrize(
    ("framework", "environment"),
    [("mindspore", {"RANK": "0", "WORLD_SIZE": "2"}), ("torch", {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2"})],
)
def test_the_launcher_of_another_framework(monkeypatch: pytest.MonkeyPatch, framework: str, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the launcher of another framework") as caught:
        launcher.launch(configuration(framework))
    assert caught.value.field == "framework"
