"""Every wrong field is named, with what was given and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from reshard.config.fields import CheckpointMonitor, RunConfig, describe_fields
from reshard.config.validation import Configuration, read_config
from reshard.errors import ConfigError

MONITOR: dict[str, Any] = {"type": "CheckpointMonitor"}
EXPERTS: dict[str, Any] = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def read(folder: Path, **fields: Any) -> Configuration:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return read_config(path)


def refused(folder: Path, **fields: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(folder, **fields)
    return caught.value


def test_an_empty_configuration_has_the_seed_documents_defaults(tmp_path: Path) -> None:
    run = read(tmp_path).run
    assert (run.load_checkpoint, run.pretrained_model_dir, run.balanced_load) == ("", "", False)
    assert run.output_dir == "./output"
    monitor = CheckpointMonitor(type="CheckpointMonitor")
    assert monitor.model_dump() == {
        "type": "CheckpointMonitor",
        "prefix": "CKP",
        "directory": None,
        "save_checkpoint_steps": 1,
        "keep_checkpoint_max": 5,
        "keep_checkpoint_every": None,
        "keep_checkpoint_days": None,
        "keep_checkpoint_best": None,
        "async_save": False,
        "checkpoint_format": "safetensors",
        "remove_redundancy": False,
        "check_replicas": False,
        "save_optimizer": True,
    }


def test_the_seed_documents_example(tmp_path: Path) -> None:
    text = """
load_checkpoint: "output/checkpoint"
use_legacy_format: False
load_ckpt_format: "safetensors"
callbacks:
  - type: CheckpointMonitor
    prefix: "qwen3"
    save_checkpoint_steps: 1000
    keep_checkpoint_max: 5
    async_save: False
    checkpoint_format: "safetensors"
    save_optimizer: True
"""
    (tmp_path / "run.yaml").write_text(text)
    configuration = read_config(tmp_path / "run.yaml")
    assert configuration.notes == ()
    monitor = configuration.run.monitor
    assert monitor is not None
    assert (monitor.prefix, monitor.save_checkpoint_steps) == ("qwen3", 1000)


@pytest.mark.parametrize(
    ("fields", "name", "nearest"),
    [
        ({"sed": 1}, "sed", "seed"),
        ({"load_chekpoint": "x"}, "load_chekpoint", "load_checkpoint"),
        ({"runner_config": {"batchsize": 1}}, "runner_config.batchsize", "runner_config.batch_size"),
        ({"max_steps": 4}, "max_steps", "runner_config.max_steps"),
        ({"callbacks": [MONITOR | {"prefx": "a"}]}, "callbacks[0].prefx", "callbacks[0].prefix"),
        (
            {"callbacks": [MONITOR | {"keep_checkpoint_best": {"metrc": "loss"}}]},
            "callbacks[0].keep_checkpoint_best.metrc",
            "callbacks[0].keep_checkpoint_best.metric",
        ),
        ({"callbacks": [{"type": "CheckpointMonitr"}]}, "callbacks[0].type", "CheckpointMonitor"),
        ({"model": {"hiden_size": 8}}, "model.hiden_size", "model.hidden_size"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_known_one(tmp_path: Path, fields: dict[str, Any], name: str, nearest: str) -> None:
    error = refused(tmp_path, **fields)
    assert error.field == name
    assert f"did you mean {nearest}?" in str(error)
    assert "one of: " in str(error.expected)


def test_a_field_like_no_other_gets_no_guess(tmp_path: Path) -> None:
    error = refused(tmp_path, zzzzzz=1)
    assert "did you mean" not in str(error)
    assert "zzzzzz" in error.what


@pytest.mark.parametrize(
    ("fields", "name", "found", "expected"),
    [
        ({"seed": "one"}, "seed", "'one' (text)", "a whole number"),
        ({"seed": 1.5}, "seed", "1.5 (a number)", "a whole number"),
        ({"seed": True}, "seed", "True (True or False)", "a whole number"),
        ({"seed": -1}, "seed", "-1", "at least 0"),
        ({"resume_training": "yes"}, "resume_training", "'yes' (text)", "True or False"),
        ({"load_checkpoint": 3}, "load_checkpoint", "3 (a whole number)", "text"),
        ({"model": 5}, "model", "5 (a whole number)", "a section with fields of its own"),
        ({"callbacks": {"type": "CheckpointMonitor"}}, "callbacks", "{'type': 'CheckpointMonitor'} (a section)", "a list"),
        ({"callbacks": [MONITOR | {"save_checkpoint_steps": 0}]}, "callbacks[0].save_checkpoint_steps", "0", "at least 1"),
        ({"callbacks": [MONITOR | {"keep_checkpoint_max": "5"}]}, "callbacks[0].keep_checkpoint_max", "'5' (text)", "a whole number"),
        ({"callbacks": [MONITOR | {"keep_checkpoint_every": 0}]}, "callbacks[0].keep_checkpoint_every", "0", "at least 1"),
        ({"callbacks": [MONITOR | {"keep_checkpoint_days": 0}]}, "callbacks[0].keep_checkpoint_days", "0", "more than 0"),
        ({"callbacks": [MONITOR | {"keep_checkpoint_best": 3}]}, "callbacks[0].keep_checkpoint_best", "3", "a section"),
        (
            {"callbacks": [MONITOR | {"keep_checkpoint_best": {"mode": "least"}}]},
            "callbacks[0].keep_checkpoint_best.mode",
            "'least'",
            "one of: 'min' or 'max'",
        ),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas", "[0.9]", "2 entries"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas[1]", "1.5", "less than 1"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate", "'fast' (text)", "a number or null"),
        ({"optimizer": {"eps": 0}}, "optimizer.eps", "0", "more than 0"),
        ({"optimizer": {"eps": float("inf")}}, "optimizer.eps", "inf (a number)", "a finite number"),
        ({"resume": "always"}, "resume", "'always'", "one of: 'never' or 'auto'"),
        ({"lr_schedule": {"total_steps": 0}}, "lr_schedule.total_steps", "0", "-1 (the run's last step) or at least 1"),
        ({"model": {"vocab_size": 128}}, "model.vocab_size", "128", "at least 256"),
        ({"model": {"hidden_size": 65}}, "model.hidden_size", "hidden_size 65, num_attention_heads 8", "a multiple"),
        ({"model": {"head_dim": 7}}, "model.head_dim", "7", "an even number"),
        ({"model": {"num_key_value_heads": 3}}, "model.num_key_value_heads", "num_key_value_heads 3", "a divisor"),
        ({"train_dataset": {"seq_length": 8192}}, "model.max_position_embeddings", "4096", "at least train_dataset.seq_length, 8192"),
        ({"callbacks": [MONITOR | {"prefix": "a/b"}]}, "callbacks[0].prefix", "a/b", "no slash"),
        ({"model": {"model_type": "qwen4"}}, "model.model_type", "'qwen4'", "one of: 'qwen3' or 'qwen3_moe'"),
        ({"model": {"num_experts": 8}}, "model.num_experts", "8", "no such field"),
        ({"model": {"norm_topk_prob": False}}, "model.norm_topk_prob", "False", "no such field"),
        ({"model": {"mlp_only_layers": [0]}}, "model.mlp_only_layers", "[0]", "no such field"),
        ({"model": EXPERTS | {"num_experts": None}}, "model.num_experts", "nothing", "the number of experts of a layer"),
        ({"model": {"model_type": "qwen3_moe", "num_experts": 4}}, "model.num_experts_per_tok", "nothing", "the number of experts that"),
        ({"model": EXPERTS | {"num_experts_per_tok": 9}}, "model.num_experts_per_tok", "9", "at most model.num_experts, 8"),
        ({"model": EXPERTS | {"mlp_only_layers": [1, 4]}}, "model.mlp_only_layers", "4", "0 to 3"),
        ({"model": EXPERTS | {"mlp_only_layers": ["1"]}}, "model.mlp_only_layers[0]", "'1' (text)", "a whole number"),
        ({"model": EXPERTS | {"decoder_sparse_step": 5}}, "model.decoder_sparse_step", "decoder_sparse_step 5", "at least one layer"),
        ({"model": EXPERTS | {"mlp_only_layers": [0, 1, 2, 3]}}, "model.mlp_only_layers", "4 layers", "at least one layer"),
        ({"parallel_config": {"expert_parallel": 0}}, "parallel_config.expert_parallel", "0", "at least 1"),
    ],
)
def test_a_wrong_value_is_said_with_what_is_allowed(tmp_path: Path, fields: dict[str, Any], name: str, found: str, expected: str) -> None:
    error = refused(tmp_path, **fields)
    assert error.field == name
    assert found in str(error.found)
    assert expected in str(error.expected)
    assert error.file is not None
    assert error.file.startswith(str(tmp_path / "run.yaml"))


def test_the_error_counts_the_others(tmp_path: Path) -> None:
    error = refused(tmp_path, seed="x", model={"hidden_size": "y"})
    assert error.field == "seed"
    assert error.fix == "then look at model.hidden_size, which is wrong too"


def test_pretrained_weights_give_way_to_a_checkpoint_with_a_line(tmp_path: Path) -> None:
    assert read(tmp_path, use_legacy_format=False, pretrained_model_dir="qwen3").notes == ()
    configuration = read(tmp_path, use_legacy_format=False, pretrained_model_dir="qwen3", load_checkpoint="run")
    assert configuration.notes == ("pretrained_model_dir is ignored: load_checkpoint is set (run)",)


def test_pretrained_weights_are_no_run_to_resume(tmp_path: Path) -> None:
    error = refused(tmp_path, pretrained_model_dir="qwen3", resume_training=True)
    assert error.field == "resume_training"
    assert "qwen3, has weights only" in error.what


def test_absent_legacy_format_means_two_with_a_line(tmp_path: Path) -> None:
    assert read(tmp_path).notes == ("use_legacy_format is not given: checkpoints are Checkpoint 2.0",)
    assert read(tmp_path, use_legacy_format=False).notes == ()


def test_legacy_format_is_one_of_reading(tmp_path: Path) -> None:
    assert read(tmp_path, use_legacy_format=True).notes == (
        "use_legacy_format: True: load_checkpoint may name files of Checkpoint 1.0; what is saved is Checkpoint 2.0",
    )


def test_other_formats_are_converted_with_a_line(tmp_path: Path) -> None:
    configuration = read(tmp_path, use_legacy_format=False, load_ckpt_format="ckpt", callbacks=[MONITOR | {"checkpoint_format": "ckpt"}])
    assert configuration.notes == (
        "load_ckpt_format 'ckpt' was converted to 'safetensors', the only format of Checkpoint 2.0",
        "callbacks[0].checkpoint_format 'ckpt' was converted to 'safetensors', the only format of Checkpoint 2.0",
    )


def test_null_saves_never_and_absence_saves_every_step(tmp_path: Path) -> None:
    never = read(tmp_path, callbacks=[MONITOR | {"save_checkpoint_steps": None}]).run.monitor
    absent = read(tmp_path, callbacks=[MONITOR]).run.monitor
    assert never is not None
    assert never.save_checkpoint_steps is None
    assert absent is not None
    assert absent.save_checkpoint_steps == 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"resume_training": True}, "resume_training"),
        ({"resume": "auto"}, "resume"),
        ({"callbacks": [MONITOR, MONITOR]}, "callbacks[1]"),
        ({"lr_schedule": {"total_steps": 5, "warmup_steps": 6}}, "lr_schedule.warmup_steps"),
    ],
)
def test_fields_that_contradict_each_other(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    assert refused(tmp_path, **fields).field == name


def test_which_layers_have_experts(tmp_path: Path) -> None:
    """As transformers decides it."""
    sparse = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = read(tmp_path, model=EXPERTS | sparse | {"num_hidden_layers": 6}).run.model
    assert [model.has_experts(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert not any(read(tmp_path).run.model.has_experts(layer) for layer in range(4))


def test_every_field_has_a_meaning() -> None:
    described = list(describe_fields())
    assert len(described) > 50
    assert [name for name, _, _, meaning in described if not meaning] == []
    rows = {name: (kind, default) for name, kind, default, _ in described}
    assert rows["runner_config.max_steps"] == ("int or null", "None")


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3  # type: ignore[misc]
