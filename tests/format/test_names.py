from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reshard.errors import CaptureError, MetadataError, UsageError
from reshard.format.names import (
    data_file_name,
    first_repeated,
    is_plain_file_name,
    iteration_name,
    kind_of_file,
    parse_iteration_name,
    parse_rank_extra_file,
    parse_storage_key,
    parse_tensor_name,
    rank_extra_file,
    storage_key,
    tensor_name,
    tensor_names,
    total_of_file,
)
from reshard.state import GLOBAL_STEP, Kind, TensorKey, model_key, slot_key
from tests.golden import WITH_METADATA, iteration


@pytest.mark.parametrize(("step", "name"), [(0, "iteration_00000000"), (1, "iteration_00000001"), (123456789012, "iteration_123456789012")])
def test_an_iteration_name_and_back(step, name):
    assert iteration_name(step) == name
    assert parse_iteration_name(name) == step


@pytest.mark.parametrize(
    "name",
    [
        "iteration_1",
        "iteration_000000001",
        "iteration_0000000x",
        "iteration_-0000001",
        ".iteration_00000001.tmp",
        "iteration_００００００01",
        "",
    ],
)
def test_what_is_no_iteration(name):
    assert parse_iteration_name(name) is None


def test_a_negative_iteration_has_no_name():
    with pytest.raises(UsageError, match="-1"):
        iteration_name(-1)


def test_data_file_names():
    assert data_file_name("qwen3", Kind.MODEL, 3, 8) == "qwen3-model-0000003-0000008.safetensors"
    assert data_file_name(None, Kind.OPTIMIZER, 0, 1) == "opt-0000000-0000001.safetensors"
    assert kind_of_file("qwen3-model-0000003-0000008.safetensors") is Kind.MODEL
    assert kind_of_file("opt-0000000-0000001.safetensors") is Kind.OPTIMIZER
    assert kind_of_file("my-opt-run-model-0000000-0000001.safetensors") is Kind.MODEL
    assert total_of_file("qwen3-model-0000003-0000008.safetensors") == 8


@pytest.mark.parametrize(
    "name", ["model.safetensors", "xmodel-0-1.safetensors", "a-model-0000000-0000001.safetensors.tmp", "-model-0-1.safetensors", "opt-0-1"]
)
def test_what_is_no_data_file(name):
    assert kind_of_file(name) is None
    assert total_of_file(name) is None


@pytest.mark.parametrize("prefix", ["", "a/b", "..", "a\\b", "a\0b", ".hidden", "a\nb"])
def test_a_prefix_is_a_plain_name(prefix):
    with pytest.raises(UsageError, match="prefix"):
        data_file_name(prefix, Kind.MODEL, 0, 1)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "..\\a", "a\0", "../a.safetensors"])
def test_a_name_that_leads_out_of_the_directory(name):
    assert not is_plain_file_name(name)


def test_rank_files_of_extras():
    assert rank_extra_file(3) == "rank-0000003.safetensors"
    assert parse_rank_extra_file("rank-0000003.safetensors") == 3
    assert parse_rank_extra_file("rank-00000030.safetensors") is None
    assert parse_rank_extra_file("global.safetensors") is None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (model_key("decoder.layers.0.mlp.linear_fc1.weight"), "decoder.layers.0.mlp.linear_fc1.weight"),
        (slot_key("adam_m", "decoder.final_layernorm.weight"), "adam_m.decoder.final_layernorm.weight"),
        (GLOBAL_STEP, "global_step"),
        (slot_key("learning_rate", ""), "learning_rate"),
        (slot_key("muon_m", "placeholder.0"), "muon_m.placeholder.0"),
    ],
)
def test_tensor_names(key, name):
    assert tensor_name(key) == name
    assert parse_tensor_name(name, key.kind) == key


@pytest.mark.parametrize(
    "key",
    [
        TensorKey(Kind.MODEL, None, ""),
        TensorKey(Kind.MODEL, "adam_m", "w"),
        TensorKey(Kind.OPTIMIZER, None, "w"),
        slot_key("a.b", "w"),
        slot_key("", "w"),
    ],
)
def test_a_key_that_could_not_be_understood_again(key):
    with pytest.raises(CaptureError, match="can't be named"):
        tensor_name(key)


@given(st.text(min_size=1, max_size=20), st.sampled_from(Kind))
def test_distinct_names_are_distinct_keys(name, kind):
    key = parse_tensor_name(name, kind)
    assert key.kind is kind
    rebuilt = key.parameter if key.slot is None else f"{key.slot}.{key.parameter}" if key.parameter else key.slot
    assert rebuilt == name


@given(st.text(max_size=30), st.integers(0, 2**59))
@example("it's", 0)
@example('say "it\'s"', 1)
@example("a, (0,))", 2)
@example("back\\slash\n\t\x7f", 3)
@example("層.重み\u2028😀", 4)
@example("', (0,))", 5)
def test_a_storage_key_is_what_python_writes_and_comes_back(name, number):
    key = storage_key(name, number)
    assert key == str((name, (number,)))
    assert parse_storage_key(key) == (name, number)


@pytest.mark.parametrize("case", WITH_METADATA)
def test_golden_storage_keys(case):
    import json

    metadata = json.loads((iteration(case) / "metadata.json").read_text())
    for key in metadata["storage_data"]:
        name, number = parse_storage_key(key)
        assert name in metadata["state_dict_metadata"]
        assert storage_key(name, number) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "('w', (0,)",
        "('w', 0)",
        "('w', (0, 1))",
        "('w', (-1,))",
        "('w' 'x', (0,))",
        "(__import__('os').name, (0,))",
        "('w', (0,)) + 1",
        "('w', (" + "9" * 5000 + ",))",
        "('\\N{no such name}', (0,))",
        "('\\d', (0,))",
        "('\\U7fffffff', (0,))",
        "('" + "(" * 100000,
    ],
)
def test_what_is_no_storage_key(text):
    with pytest.raises(MetadataError, match="can't be understood"):
        parse_storage_key(text)


def test_names_of_many_tensors():
    keys = [model_key("w"), slot_key("adam_m", "w"), GLOBAL_STEP, model_key("a.b")]
    assert tensor_names(keys) == [tensor_name(key) for key in keys] == ["w", "adam_m.w", "global_step", "a.b"]
    for key in (TensorKey(Kind.MODEL, None, ""), TensorKey(Kind.MODEL, "adam_m", "w"), TensorKey(Kind.OPTIMIZER, None, "w")):
        with pytest.raises(CaptureError, match="can't be named"):
            tensor_names([*keys, key])


def test_the_first_name_that_stands_again():
    assert first_repeated(["a", "b", "c"]) is None
    assert first_repeated(["a", "b", "b", "a", "a"]) == "b"
