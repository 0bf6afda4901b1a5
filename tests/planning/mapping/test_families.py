"""Families against the published converter: the golden folders, in both directions, from one to eight ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard import families
from reshard.catalog import Catalog
from reshard.errors import MismatchError, UsageError
from reshard.families import Family, Rule, RuleMapping, family, known_families, recognise, rename, stack
from reshard.geometry import Layout, Mesh
from reshard.planning.agreement import describe
from reshard.planning.mapping.linking import link
from reshard.planning.mapping.mappers import sizes_in
from reshard.planning.mapping.wanted import ask, tell
from reshard.planning.naming import understand
from reshard.planning.read_plan import plan_reads
from reshard.sources.opening import open_source
from reshard.state import HostMemory, Shard, ShardedTensor, model_key, state_of
from reshard.storage.memory import MemoryStorage
from reshard.storage.posix import PosixStorage
from reshard.testing import run_ranks, split, tensor_on_rank

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden_hf"
CASES = sorted(path.name for path in GOLDEN.iterdir())


def folder(case: str) -> Path:
    return GOLDEN / case / "hf"


def mindspore(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "expected_mf.npz") as arrays:
        return dict(arrays)


def huggingface(case: str) -> dict[str, np.ndarray]:
    checkpoint = reshard.Checkpoint(folder(case))
    return {name: checkpoint[name][...] for name in checkpoint}


def laid_out(arrays: dict[str, np.ndarray], ranks: int, rank: int) -> dict[str, ShardedTensor]:
    """Tensor parallel as the names say it."""
    mesh = Mesh((ranks,), ("tp",), tuple(range(ranks)))

    def layout(name: str, array: np.ndarray) -> Layout:
        dimension = understand(name).tensor_dimension(array.ndim)
        return split(mesh, *[["tp"] if d == dimension else [] for d in range(array.ndim)])

    held = {name: tensor_on_rank(model_key(name), array, layout(name, array), rank) for name, array in arrays.items()}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def blank(tensors: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    return {
        name: tensor._replace(
            shards=tuple(Shard(s.region, HostMemory(np.full(s.region.shape, np.nan, tensor.dtype.numpy))) for s in tensor.shards)
        )
        for name, tensor in tensors.items()
    }


def assert_equal(got: dict[str, ShardedTensor], expected: dict[str, ShardedTensor]) -> None:
    for name, tensor in expected.items():
        for mine, right in zip(got[name].shards, tensor.shards, strict=True):
            np.testing.assert_array_equal(mine.memory.read(), right.memory.read(), name)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("case", CASES)
def test_the_golden_folders_become_what_the_published_converter_makes_of_them_and_come_back(case: str, ranks: int) -> None:
    ours, theirs = mindspore(case), huggingface(case)
    storage, model = MemoryStorage(), sizes_in(reshard.Checkpoint(folder(case)).config)
    qwen3 = family("qwen3", **model)

    def work(comm: Any) -> None:
        expected = laid_out(ours, ranks, comm.rank)
        got = blank(expected)
        report = reshard.load(folder(case), model=got, mapping="qwen3", communicator=comm, balanced=ranks == 2)
        assert_equal(got, expected)
        assert not report.unexpected
        # Saved under the names of Hugging Face files, and loaded into such a run.
        reshard.save("/c", 1, model=got, communicator=comm, storage=storage, mapping=qwen3.saving_as("huggingface"))
        plain = laid_out({name: theirs[name] for name in reshard.Checkpoint("/c", storage)}, ranks, comm.rank)
        back = blank(plain)
        reshard.load("/c", model=back, communicator=comm, storage=storage)
        assert_equal(back, plain)
        # And from there under the names of MindSpore Transformers.
        reshard.save("/d", 1, model=back, communicator=comm, storage=storage, mapping=qwen3)

    run_ranks(ranks, work)
    for name, array in ours.items():
        np.testing.assert_array_equal(reshard.Checkpoint("/d", storage)[name][...], array, name)


def test_a_contiguous_feed_forward_layer_is_an_option_of_the_family() -> None:
    theirs, ours = huggingface(CASES[0]), mindspore(CASES[0])
    got = {name: np.zeros_like(array) for name, array in ours.items()}
    reshard.load(folder(CASES[0]), model=got, mapping=family("qwen3", use_interleaved_weight_layout_mlp=0))
    parts = [theirs[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(got["decoder.layers.1.mlp.linear_fc1.weight"], np.concatenate(parts))


def test_an_even_split_of_fused_parameters_has_a_layout_that_the_published_reader_takes() -> None:
    theirs, storage = huggingface(CASES[0]), MemoryStorage()
    qwen3 = family("qwen3", **sizes_in(reshard.Checkpoint(folder(CASES[0])).config))

    def work(comm: Any) -> None:
        reshard.save("/c", 1, model=laid_out(theirs, 2, comm.rank), communicator=comm, storage=storage, mapping=qwen3)

    run_ranks(2, work)
    checkpoint = reshard.Checkpoint("/c", storage)
    for name in checkpoint:
        view = checkpoint[name]
        assert view.layout is not None, name
        assert len(view.chunks) == (1 if view.layout.fragments == (1,) * len(view.shape) else 2), name


def test_a_rank_of_a_fused_qkv_reads_what_it_needs_and_nothing_else() -> None:
    stored = open_source(PosixStorage(), str(folder(CASES[0]))).catalog
    expected = laid_out(mindspore(CASES[0]), 2, 1)
    covered, needed = covered_bytes(stored, expected)
    assert covered == needed


def covered_bytes(stored: Catalog, tensors: dict[str, ShardedTensor]) -> tuple[int, int]:
    """The bytes that a rank's plan covers, and those that it needs."""
    config = sizes_in(json.loads((folder(CASES[0]) / "config.json").read_text()))
    qwen3 = family("qwen3")
    names = [key.parameter for key in stored.tensors]
    links = link(stored, qwen3.sides(qwen3.count(tensors), names, config))
    asked = ask(state_of(*tensors.values()), links, lambda key: True)
    plan = plan_reads(describe(asked.state, 1), tell(stored, links).catalog)
    assert not plan.missing
    return plan.nbytes, sum(tensor.nbytes for tensor in tensors.values())


def test_what_lacks_a_part_is_missing_and_the_message_names_the_part() -> None:
    arrays, storage = huggingface(CASES[0]), MemoryStorage()
    del arrays["model.layers.1.self_attn.v_proj.weight"]
    reshard.save("/c", 1, model=arrays, storage=storage)
    ours = {name: np.zeros_like(array) for name, array in mindspore(CASES[0]).items()}
    sizes = family("qwen3", num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(MismatchError) as caught:
        reshard.load("/c", model=ours, storage=storage, mapping=sizes)
    assert "decoder.layers.1.self_attention.linear_qkv.weight is also made of model.layers.1.self_attn.v_proj.weight" in str(caught.value)
    assert not any(array.any() for array in ours.values())


def test_a_tensor_that_the_run_lacks_is_unexpected_under_the_checkpoints_name() -> None:
    ours = {name: np.zeros_like(array) for name, array in mindspore(CASES[0]).items() if "linear_qkv" not in name}
    report = reshard.load(folder(CASES[0]), model=ours, mapping="qwen3", strict=reshard.Strictness(unexpected="ignore"))
    assert set(report.unexpected) == {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qkv"}


def test_a_configuration_that_contradicts_shapes_is_an_error() -> None:
    ours = {name: np.zeros_like(array) for name, array in mindspore(CASES[0]).items()}
    with pytest.raises(UsageError, match="contradicts the configuration"):
        reshard.load(folder(CASES[0]), model=ours, mapping=family("qwen3", num_key_value_heads=3))


def test_a_size_that_nobody_knows_is_asked_for() -> None:
    arrays, storage = huggingface(CASES[0]), MemoryStorage()
    reshard.save("/c", 1, model=arrays, storage=storage)
    with pytest.raises(UsageError, match="num_key_value_heads"):
        reshard.load("/c", model=mindspore(CASES[0]), storage=storage, mapping="qwen3")


def test_families_are_known_by_name_and_by_configuration() -> None:
    assert {one.name for one in known_families()} >= {"qwen3", "qwen3_moe", "llama", "qwen2", "mistral", "mixtral", "deepseek_v3"}
    assert recognise({"model_type": "qwen3_moe"}).name == "qwen3_moe"
    assert recognise({"architectures": ["MistralForCausalLM"]}).name == "mistral"
    with pytest.raises(UsageError, match=r"'qwen4'[^\n]*\n[^\n]*qwen3"):
        family("qwen4")
    with pytest.raises(UsageError, match="'gpt_oss'"):
        recognise({"model_type": "gpt_oss"})
    with pytest.raises(UsageError, match="knows none of the tensors"):
        reshard.Checkpoint(folder(CASES[0]), mapping=Family("other", ("other",), {"mindspore": (rename("a", "b"),)}))


def test_a_familys_config_counts_less_than_what_the_caller_says() -> None:
    assert sizes_in({"num_attention_heads": 8, "num_key_value_heads": None, "hidden_act": "silu"}) == {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }


def test_the_number_of_experts_has_several_names() -> None:
    assert sizes_in({"num_local_experts": 4})["num_experts"] == 4


def test_rules_that_cover_something_twice_or_not_are_refused() -> None:
    with pytest.raises(UsageError, match="covered twice"):
        RuleMapping(run=(rename("a", "b"), rename("a", "c"))).saving((), {})
    with pytest.raises(UsageError, match="don't say which tensors belong together"):
        RuleMapping(run=(Rule("all.{layer}", stack("x.{expert}", "expert", 2)),)).saving((), {})


def test_a_family_is_declarations_of_at_most_150_lines() -> None:
    for path in Path(families.__file__).parent.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path.name
