"""Names of parameters and buffers: wrappers, ties, several modules, what is left out."""

from __future__ import annotations

import warnings
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from reshard.catalog import Catalog
from reshard.errors import CaptureError, UsageError
from reshard.frameworks.torch import TorchAdapter, tie
from reshard.frameworks.torch.modules import name_tensors
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.state import model_key
from tests.catalogs import stored_tensor
from tests.frameworks.torch.simulated import fake_rank


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)


NAMES = ["mask", "module.weight", "module.bias"]
NAMES += [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def names(model) -> list[str]:
    return list(name_tensors(model).tensors)


def test_names_are_those_of_the_state_dict() -> None:
    block = Block()
    assert names(block) == NAMES
    assert set(names(block)) == set(block.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        checkpoint_wrapper,
        offload_wrapper,
        nn.DataParallel,
        lambda m: torch.compile(checkpoint_wrapper(m), backend="eager"),
    ],
    ids=["compile", "checkpoint", "offload", "data parallel", "both"],
)
@pytest.mark.filterwarnings("ignore:.*DataParallel.*")
def test_wrappers_leave_no_trace(wrap) -> None:
    """A submodule that happens to be called `module` keeps its name."""
    assert names(wrap(Block())) == NAMES
    assert names(nn.Sequential(wrap(Block()))) == [f"0.{name}" for name in NAMES]


def test_distributed_data_parallel_leaves_no_trace() -> None:
    with fake_rank(0, 1):
        assert names(nn.parallel.DistributedDataParallel(Block())) == NAMES
        assert names(nn.parallel.DistributedDataParallel(torch.compile(Block(), backend="eager"))) == NAMES


def test_parametrizations_keep_their_names() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert set(names(layer)) == set(layer.state_dict())
    assert "parametrizations.weight.original0" in names(layer)


def test_names_that_clash_without_the_wrappers_parts() -> None:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.ones(1)))
    module.add_module("_orig_mod", nn.Linear(1, 1))
    with pytest.raises(CaptureError, match=r"(?s)same name.*tensor: *weight"):
        names(module)


def test_fsdp1_is_refused() -> None:
    with warnings.catch_warnings(), fake_rank(0, 2):
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel

        module = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=True)
        with pytest.raises(CaptureError, match="fully_shard"):
            names(module)


def test_fsdp1_that_shards_nothing_is_a_wrapper() -> None:
    with warnings.catch_warnings(), fake_rank(0, 1):
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        module = FullyShardedDataParallel(
            Block(), device_id=torch.device("cpu"), use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD
        )
        assert set(names(module)) == set(NAMES)


class Tied(nn.Module):
    def __init__(self, *, head_first: bool = False) -> None:
        super().__init__()
        for name in ("head", "embed") if head_first else ("embed", "head"):
            self.add_module(name, nn.Linear(3, 4, bias=False) if name == "head" else nn.Embedding(4, 3))
        self.head.weight = self.embed.weight


def test_a_tied_parameter_is_stored_once_under_its_first_name() -> None:
    assert names(Tied()) == ["embed.weight"]
    assert names(Tied(head_first=True)) == ["head.weight"]
    model = Tied()
    assert set(name_tensors(model).names.values()) == {"embed.weight"}


def test_a_declaration_counts_more_than_the_order() -> None:
    model = Tied(head_first=True)
    tie(model, {"head.weight": "embed.weight"})
    assert names(model) == ["embed.weight"]
    assert names({"lm": model}) == ["lm.embed.weight"]
    assert names(nn.ModuleDict({"inner": model})) == ["inner.embed.weight"]


def test_a_stage_without_the_embedding_has_its_name() -> None:
    stage = nn.Sequential()
    stage.add_module("head", nn.Linear(3, 4, bias=False))
    assert names(stage) == ["head.weight"]
    tie(stage, {"head.weight": "embed.weight"})
    assert names(stage) == ["embed.weight"]
    assert names(torch.compile(stage, backend="eager")) == ["embed.weight"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_rank_with_both_ends_saves_one_and_fills_both(order) -> None:
    first, last = nn.Module(), nn.Module()
    first.add_module("embed", nn.Embedding(4, 3))
    last.add_module("head", nn.Linear(3, 4, bias=False))
    tie(last, {"head.weight": "embed.weight"})
    last.head.weight.data.copy_(first.embed.weight.data)
    tensors = TorchAdapter().capture([first, last][::order], None, global_step=None).tensors
    assert list(tensors) == [model_key("embed.weight")]
    (shard,) = tensors[model_key("embed.weight")].shards
    shard.memory.write(Region((0, 0), (4, 3)), np.full((4, 3), 5, np.float32))
    assert (first.embed.weight == 5).all()
    assert (last.head.weight == 5).all()


def test_one_declaration_is_enough_for_three_stages() -> None:
    stages = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    tie(stages[1], {"weight": "weight"})
    assert len(name_tensors(stages).tensors["weight"]) == 3


def test_a_declaration_of_transformers_counts_only_where_the_configuration_says_so() -> None:
    class Head(nn.Linear):
        _tied_weights_keys = MappingProxyType({"weight": "embed.weight"})
        config = SimpleNamespace(tie_word_embeddings=False)

    head = Head(1, 1, bias=False)
    assert names(head) == ["weight"]
    head.config = SimpleNamespace(tie_word_embeddings=True)
    assert names(head) == ["embed.weight"]


def test_ends_of_different_shapes_are_an_error() -> None:
    first, last = nn.Linear(2, 2, bias=False), nn.Linear(3, 2, bias=False)
    tie(last, {"weight": "weight"})
    with pytest.raises(CaptureError, match="tied tensors differ"):
        TorchAdapter().capture([first, last], None, global_step=None)


def test_a_declared_tie_that_broke_is_an_error() -> None:
    """parallelize_module gives both ends parameters of their own; trained on, they would drift apart, and one would be lost."""
    model = Tied()
    tie(model, {"head.weight": "embed.weight"})
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(CaptureError, match=r"(?s)declared as tied.*head\.weight.*tie them again"):
        names(model)


def tiny_qwen3(*, tied: bool):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


def test_transformers_models() -> None:
    tied, untied = tiny_qwen3(tied=True), tiny_qwen3(tied=False)
    assert "lm_head.weight" not in names(tied)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names(untied))
    assert set(names(untied)) == set(untied.state_dict())
    tied.model.embed_tokens = None  # the last stage of a pipeline
    untied.model.embed_tokens = None
    assert "model.embed_tokens.weight" in names(tied)
    assert "lm_head.weight" not in names(tied)
    assert "lm_head.weight" in names(untied)
    assert "inner.model.embed_tokens.weight" in names(nn.ModuleDict({"inner": tied}))


def test_a_transformers_model_whose_tie_broke() -> None:
    model = tiny_qwen3(tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(CaptureError, match="tie_word_embeddings"):
        names(model)


def test_several_modules() -> None:
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    assert names({"a": a, "b": b}) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert names([nn.Sequential(a)]) == ["0.weight", "0.bias"]
    assert names([a, a]) == ["weight", "bias"]
    with pytest.raises(CaptureError, match=r"(?s)same name.*dictionary"):
        names([a, b])


def test_shared_modules_and_cycles() -> None:
    shared = nn.Linear(1, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    model.add_module("again", model)
    assert names(model) == ["0.weight", "0.bias"]


def test_frozen_parameters_and_all_dtypes_are_captured() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    module.register_buffer("steps", torch.tensor(3))
    module.register_buffer("empty", torch.zeros(0, 2, dtype=torch.bfloat16))
    tensors = TorchAdapter().capture(module, None, global_step=None).tensors
    found = {key.parameter: (t.dtype.name, t.global_shape, [s.region.shape for s in t.shards]) for key, t in tensors.items()}
    assert found["steps"] == ("int64", (), [()])
    assert found["empty"] == ("bfloat16", (0, 2), [(0, 2)])
    assert "weight" in found


def test_things_that_are_no_modules() -> None:
    with pytest.raises(UsageError, match="int"):
        names([3])
    with pytest.raises(UsageError):
        tie(3, {})  # pyright: ignore[reportArgumentType]


class WithExtra(nn.Linear):
    def __init__(self, value) -> None:
        super().__init__(1, 1)
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state) -> None:
        self.value = state


def test_extra_state_that_is_a_tensor_is_saved_and_given_back() -> None:
    key = model_key("0._extra_state")
    tensors = TorchAdapter().capture(nn.Sequential(WithExtra(torch.arange(3))), None, global_step=None).tensors
    assert tensors[key].shards[0].memory.read().tolist() == [0, 1, 2]
    catalog = Catalog("", {key: stored_tensor(key, by_name("int32"), (5,), None, ())})
    model = nn.Sequential(WithExtra(torch.arange(3)))
    destination = TorchAdapter().prepare(model, None).destination(catalog, ())
    memory = destination.state.tensors[key].shards[0].memory
    memory.write(Region((0,), (5,)), np.full(5, 9, np.int32))
    assert model[0].value.tolist() == [0, 1, 2]
    destination.install(())
    assert model[0].value.tolist() == [9] * 5


def test_extra_state_that_the_checkpoint_has_not_stays() -> None:
    value = torch.arange(3)
    model = nn.Sequential(WithExtra(value))
    destination = TorchAdapter().prepare(model, None).destination(Catalog("", {}), ())
    assert model_key("0._extra_state") in destination.state.tensors
    destination.install(())
    assert model[0].value is value


def test_other_extra_states() -> None:
    assert model_key("_extra_state") not in TorchAdapter().capture(WithExtra(None), None, global_step=None).tensors
    with pytest.raises(CaptureError, match=r"(?s)_extra_state.*dict from WithExtra"):
        TorchAdapter().capture(WithExtra({"a": 1}), None, global_step=None)
