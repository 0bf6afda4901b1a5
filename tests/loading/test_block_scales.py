"""Weights that are quantised by block are dequantised on the way, of each scale only what a rank's own elements need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import reshard
from reshard.conversion import convert
from reshard.errors import MismatchError, UsageError
from reshard.families import Rule, RuleMapping, concatenate, family
from reshard.geometry import Mesh
from reshard.state import HostMemory, Shard, ShardedTensor, model_key
from reshard.storage.memory import MemoryStorage
from reshard.testing import run_ranks, split, tensor_on_rank
from tests.mappings import evaluate
from tests.planning.mapping.test_random_rules import blank, placements, rules
from tests.quantised import E4M3, as_torch, dequantised, described, quantise_folder

BLOCK = (3, 4)


def folder_in(storage: MemoryStorage, arrays: Mapping[str, np.ndarray], block: tuple[int, int] | None = BLOCK) -> None:
    """A folder of weights at /hf."""
    storage.make_directory("/hf")
    storage.write_bytes("/hf/model.safetensors", save({name: as_torch(array) for name, array in arrays.items()}, {"format": "pt"}))
    config: dict[str, Any] = {"model_type": "tiny"}
    storage.write_bytes("/hf/config.json", json.dumps(config if block is None else described(config, block)).encode())


def quantised(shape: tuple[int, int], seed: int, block: tuple[int, int] = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Any numbers that float8 has, and a scale."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 256, shape, np.uint8)
    values[(values & 127) == 127] = 0  # NaN
    scale = draw.uniform(0.01, 3, tuple(-(-extent // b) for extent, b in zip(shape, block, strict=True))).astype(np.float32)
    return values.view(E4M3), scale


@given(st.data())
def test_every_rank_of_random_rules_and_layouts_gets_what_numpy_makes(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.sampled_from(((4, 6), (6, 4), (2, 12), (7, 9))), min_size=1, max_size=4))
    meant: dict[str, np.ndarray] = {}
    stored: dict[str, np.ndarray] = {}
    for number, shape in enumerate(shapes):
        name = f"atom{number}"
        values, scale = quantised(shape, number)
        if data.draw(st.booleans()):
            stored |= {name: values, f"{name}_scale_inv": scale}
            meant[name] = dequantised(values, scale, BLOCK)
        else:
            stored[name] = meant[name] = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
    mine = data.draw(rules(meant, "run", pads=False))
    run = {rule.name: evaluate(rule.of, meant, {}) for rule in mine}
    if data.draw(st.booleans()):
        run = {name: array.astype(ml_dtypes.bfloat16) for name, array in run.items()}
    storage, world = MemoryStorage(), data.draw(st.sampled_from((1, 2, 3)))
    folder_in(storage, stored)
    held = data.draw(placements(run, world))
    wanted = [blank(tensors) for tensors in held]
    balanced = data.draw(st.booleans())

    def load(comm: Any) -> reshard.RestoreReport:
        return reshard.load(
            "/hf", model=wanted[comm.rank], communicator=comm, storage=storage, mapping=RuleMapping(run=mine), balanced=balanced
        )

    report = run_ranks(world, load)[0]
    assert not report.missing
    assert not report.unexpected
    for tensors, expected in zip(wanted, held, strict=True):
        for name, tensor in tensors.items():
            for got, right in zip(tensor.shards, expected[name].shards, strict=True):
                np.testing.assert_array_equal(got.memory.read(), right.memory.read(), name)
    view = reshard.Checkpoint("/hf", storage, mapping=RuleMapping(run=mine), dequantise="float32")
    assert set(view) == set(run)
    for rule in mine:
        array = evaluate(rule.of, meant, {})
        np.testing.assert_array_equal(view[rule.name][...], array)
        np.testing.assert_array_equal(view[rule.name][1:], array[1:])


def sharded(name: str, array: np.ndarray, ranks: int, rank: int, dimension: int = 0) -> ShardedTensor:
    """A blank tensor, split along a dimension."""
    layout = split(Mesh((ranks,), ("tp",), tuple(range(ranks))), *[["tp"] if d == dimension else [] for d in range(array.ndim)])
    tensor = tensor_on_rank(model_key(name), array, layout, rank)
    assert tensor is not None
    return tensor._replace(shards=tuple(Shard(s.region, HostMemory(np.zeros(s.region.shape, array.dtype))) for s in tensor.shards))


@pytest.mark.parametrize("balanced", [False, True])
def test_a_rank_reads_its_own_elements_and_the_numbers_of_their_blocks(balanced: bool) -> None:
    block, shape = (8, 8), (64, 20)
    parts = {f"{part}.weight": quantised(shape, seed, block) for seed, part in enumerate("qkv")}
    storage = MemoryStorage()
    arrays = {name: values for name, (values, _) in parts.items()} | {f"{name}_scale_inv": scale for name, (_, scale) in parts.items()}
    folder_in(storage, arrays, block)
    whole = np.concatenate([dequantised(values, scale, block) for values, scale in parts.values()]).astype(ml_dtypes.bfloat16)
    mapping = RuleMapping(run=(Rule("fused", concatenate(*parts)),))

    def load(comm: Any) -> tuple[reshard.RestoreReport, np.ndarray]:
        tensor = sharded("fused", whole, 8, comm.rank)
        report = reshard.load("/hf", model={"fused": tensor}, communicator=comm, storage=storage, mapping=mapping, balanced=balanced)
        return report, tensor.shards[0].memory.read()

    loaded = run_ranks(8, load)
    np.testing.assert_array_equal(np.concatenate([values for _, values in loaded]), whole)
    for rank, one in enumerate(loaded[0][0].ranks):
        first, last = 24 * rank, 24 * rank + 23
        blocks = {(row // 64, row % 64 // 8) for row in range(first, last + 1)}
        assert one.bytes_needed == 24 * 20 + 4 * 3 * len(blocks)
    if balanced:
        assert sum(one.bytes_read for one in loaded[0][0].ranks) == 3 * 64 * 20 + 4 * 3 * 24
    assert "3 tensors were dequantised by block" in loaded[0][0].notes
    assert loaded[0][0].restored == tuple(parts)


def test_a_run_that_holds_quantised_tensors_itself_gets_them_as_they_are() -> None:
    values, scale = quantised((7, 9), 1)
    storage = MemoryStorage()
    folder_in(storage, {"w": values, "w_scale_inv": scale}, block=None)
    model = {"w": np.zeros((7, 9), E4M3), "w_scale_inv": np.zeros_like(scale)}
    report = reshard.load("/hf", model=model, storage=storage)
    np.testing.assert_array_equal(model["w"].view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(model["w_scale_inv"], scale)
    assert (report.cast, report.unexpected) == ((), ())


def test_a_selection_takes_the_scale_along() -> None:
    values, scale = quantised((7, 9), 1)
    storage = MemoryStorage()
    folder_in(storage, {"w": values, "w_scale_inv": scale, "other": values.copy()})
    model = {"w": np.zeros((7, 9), np.float32)}
    report = reshard.load("/hf", model=model, storage=storage, only="w")
    np.testing.assert_array_equal(model["w"], dequantised(values, scale, BLOCK))
    assert report.cast == ("w: float8_e4m3fn -> float32",)


def test_numbers_that_are_scaled_in_another_way_are_not_loaded_as_they_are() -> None:
    storage = MemoryStorage()
    values, _ = quantised((6, 8), 1)
    folder_in(storage, {"w": values, "w_scale": np.full((6, 1), 0.5, np.float32)}, block=None)
    model = {"w": np.zeros((6, 8), np.float32)}
    with pytest.raises(UsageError, match=r"can't be dequantised here(.|\n)*w_scale of shape \[6, 1\]"):
        reshard.load("/hf", model=model, storage=storage)
    assert not model["w"].any()
    with pytest.raises(UsageError, match="can't be dequantised here"):
        reshard.Checkpoint("/hf", storage=storage, dequantise="float32")


@pytest.mark.parametrize(("block", "error", "words"), [(None, UsageError, "weight_block_size"), ((2, 4), MismatchError, r"\[4, 3\]")])
def test_blocks_that_nobody_knows_or_that_make_another_scale_are_errors(block: Any, error: type[Exception], words: str) -> None:
    values, scale = quantised((7, 9), 1)
    storage = MemoryStorage()
    folder_in(storage, {"w": values, "w_scale_inv": scale}, block)
    model = {"w": np.zeros((7, 9), np.float32)}
    with pytest.raises(error, match=words):
        reshard.load("/hf", model=model, storage=storage)
    assert not model["w"].any()


def weights_of(tmp_path: Path, kind: str) -> tuple[Any, Path, dict[str, np.ndarray]]:
    """A fresh model of transformers, its weights quantised in a folder of several files, and what these stand for."""
    import transformers

    if kind == "qwen3":
        config: Any = transformers.Qwen3Config(
            hidden_size=160, intermediate_size=272, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=40,
            vocab_size=64, tie_word_embeddings=False,
        )  # fmt: skip
        build: Any = transformers.Qwen3ForCausalLM
    else:
        config = transformers.DeepseekV3Config(
            hidden_size=160, intermediate_size=272, moe_intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
            q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, vocab_size=64,
            tie_word_embeddings=False,
        )  # fmt: skip
        build = transformers.DeepseekV3ForCausalLM
    torch.manual_seed(0)
    build(config).to(torch.bfloat16).save_pretrained(tmp_path / kind, max_shard_size="300KB")
    meant = quantise_folder(tmp_path / kind)
    torch.manual_seed(1)
    return build(config).to(torch.bfloat16), tmp_path / kind, meant


@pytest.mark.parametrize("kind", ["qwen3", "deepseek_v3"])
def test_a_published_models_form_is_loaded_into_transformers(tmp_path: Path, kind: str) -> None:
    model, folder, meant = weights_of(tmp_path, kind)
    report = reshard.load(folder, model=model, mapping=kind)
    assert not report.unexpected
    expected = {name: array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array for name, array in meant.items()}
    if kind == "deepseek_v3":
        layer = "model.layers.1.mlp.experts."
        matrices = {part: [expected[f"{layer}{e}.{part}_proj.weight"] for e in range(4)] for part in ("gate", "up", "down")}
        expected = {name: array for name, array in expected.items() if ".experts." not in name}
        expected[layer + "gate_up_proj"] = np.concatenate([np.stack(matrices["gate"]), np.stack(matrices["up"])], 1)
        expected[layer + "down_proj"] = np.stack(matrices["down"])
    got = model.state_dict()
    assert set(expected) <= set(got)
    for name, array in expected.items():
        if got[name].dtype == torch.bfloat16:
            np.testing.assert_array_equal(got[name].view(torch.int16).numpy(), array.view(np.int16), name)


def test_slices_of_tensor_parallel_ranks_cut_blocks_of_fused_parameters(tmp_path: Path) -> None:
    _, folder, meant = weights_of(tmp_path, "qwen3")
    layer = "model.layers.1."
    q, k, v = (meant[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv")
    qkv = np.concatenate([q.reshape(2, -1, 160), k.reshape(2, -1, 160), v.reshape(2, -1, 160)], 1).reshape(-1, 160)
    fc1 = np.stack([meant[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")], 1).reshape(-1, 160)
    whole = {
        "decoder.layers.1.self_attention.linear_qkv.weight": (qkv, 0),
        "decoder.layers.1.mlp.linear_fc1.weight": (fc1, 0),
        "decoder.layers.1.mlp.linear_fc2.weight": (meant[f"{layer}mlp.down_proj.weight"], 1),
    }

    def load(comm: Any) -> dict[str, np.ndarray]:
        model = {name: sharded(name, array.astype(ml_dtypes.bfloat16), 4, comm.rank, d) for name, (array, d) in whole.items()}
        reshard.load(folder, model=model, communicator=comm, mapping="qwen3", only=list(whole), balanced=True)
        return {name: tensor.shards[0].memory.read() for name, tensor in model.items()}

    ranks = run_ranks(4, load)
    for name, (array, dimension) in whole.items():
        got = np.concatenate([rank[name] for rank in ranks], dimension)
        np.testing.assert_array_equal(got.view(np.int16), array.astype(ml_dtypes.bfloat16).view(np.int16), name)


def test_exports_and_conversions_dequantise(tmp_path: Path) -> None:
    model, folder, meant = weights_of(tmp_path, "qwen3")
    reshard.export_checkpoint(folder, tmp_path / "plain", dtype="bfloat16", max_shard_size="300KB")
    plain = reshard.Checkpoint(tmp_path / "plain")
    assert set(plain) == set(meant)
    assert plain.config is not None
    assert "quantization_config" not in plain.config
    assert plain.config["dtype"] == "bfloat16"
    for name, array in meant.items():
        np.testing.assert_array_equal(plain[name][...].view(np.int16), array.astype(ml_dtypes.bfloat16).view(np.int16), name)
    done = convert(folder, tmp_path / "root", naming="mindspore")
    assert "dequantised by block: 14 tensors" in done.notes
    direct = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in _tensors(reshard.Checkpoint(tmp_path / "root"))}
    reshard.load(folder, model=direct, mapping=family("qwen3"))
    for name, tensor in _tensors(reshard.Checkpoint(tmp_path / "root")):
        np.testing.assert_array_equal(tensor[...].view(np.int16), direct[name].view(np.int16), name)
    # As it is, with its scales, and still known for what it is.
    convert(folder, tmp_path / "raw")
    reshard.load(tmp_path / "raw", model=model, strict=reshard.Strictness(dtype="cast"))
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"].view(torch.int16).numpy()
    np.testing.assert_array_equal(weight, meant["model.layers.0.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16).view(np.int16))


def _tensors(checkpoint: reshard.Checkpoint) -> list[tuple[str, Any]]:
    return [(name, checkpoint[name]) for name in checkpoint]
