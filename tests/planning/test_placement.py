"""How a strategy lays tensors out: against the published implementation's own checkpoints, against numpy, and by name."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.checkpoint import Checkpoint
from reshard.errors import UsageError
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.planning.agreement import RankDescription
from reshard.planning.holders import check_agreement
from reshard.planning.naming import ROLES, stage_layers, stage_of_layer, understand
from reshard.planning.placement import WantedTensor, describe_rank, lay_out, rank_classes
from reshard.planning.strategy import Strategy, parse_strategy
from reshard.state import GLOBAL_STEP, Kind, model_key, slot_key
from tests import golden

FLOAT = by_name("float32")
HIDDEN, EXPERTS = 12, 5


def shapes(*, stacked: bool = False, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """A mixture of experts with numbered or stacked experts; few of its sizes divide by 2, 4 or 8."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, HIDDEN)}
    for layer in range(5):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{prefix}.self_attn.q_proj.weight"] = (3 * HIDDEN, HIDDEN)
        found[f"{prefix}.self_attn.q_proj.bias"] = (3 * HIDDEN,)
        found[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, 3 * HIDDEN)
        found[f"{prefix}.self_attn.o_proj.bias"] = (HIDDEN,)
        found[f"{prefix}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        if stacked:
            found[f"{prefix}.mlp.experts.gate_up_proj"] = (EXPERTS, 22, HIDDEN)
            found[f"{prefix}.mlp.experts.down_proj"] = (EXPERTS, HIDDEN, 11)
        else:
            for expert in range(EXPERTS):
                found[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = (11, HIDDEN)
                found[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, 11)
    found["model.norm.weight"] = (HIDDEN,)
    if not tied:
        found["lm_head.weight"] = (50, HIDDEN)
    return found


def tensors(**kind: bool) -> list[WantedTensor]:
    """These parameters, their moments, and a step count."""
    model = [WantedTensor(model_key(name), FLOAT, shape) for name, shape in shapes(**kind).items()]
    moments = [WantedTensor(slot_key("adam_m", tensor.key.parameter), FLOAT, tensor.global_shape) for tensor in model]
    return [*model, *moments, WantedTensor(GLOBAL_STEP, by_name("int32"), (1,))]


def held(text: str, rank: int, given: list[WantedTensor] | None = None, **options: object) -> dict[str, Region]:
    """What a rank holds of the model's tensors (`o:` before the name of a moment)."""
    strategy = parse_strategy(text, **options)  # type: ignore[arg-type]
    description = describe_rank(strategy, tensors() if given is None else given, rank)
    return {("o:" if t.key.kind is Kind.OPTIMIZER else "") + t.key.parameter: t.regions[0] for t in description.tensors}


@pytest.mark.parametrize(
    ("case", "text"), [("dp2_tp2", "dp=2,tp=2"), ("dp2_tp2_rr", "dp=2,tp=2"), ("dp1_tp1_pp4", "pp=4"), ("dp2_tp2_pp2_rr", "dp=2,tp=2,pp=2")]
)
def test_the_published_implementation_lays_out_the_same(case: str, text: str) -> None:
    catalog = Checkpoint(golden.root(case)).catalog
    placement = lay_out(parse_strategy(text), catalog.tensors.values())
    for tensor, layout in zip(catalog.tensors.values(), placement.layouts, strict=True):
        mine: dict[Region, list[int]] = {}
        for rank in sorted(layout.mesh.ranks):
            mine.setdefault(layout.rank_region(rank, tensor.global_shape), []).append(rank)
        assert mine == {chunk.region: sorted(chunk.holders) for chunk in tensor.chunks}, tensor.name


def test_the_published_implementation_shards_the_optimizer_the_same() -> None:
    """Its parallel optimizer splits parameters, too; one-dimensional ones over tp besides, which no other implementation does."""
    catalog = Checkpoint(golden.root("dp2_tp2_optshard_rr")).catalog
    placement = lay_out(parse_strategy("fsdp=2,tp=2"), catalog.tensors.values())
    matrices = [pair for pair in zip(catalog.tensors.values(), placement.layouts, strict=True) if len(pair[0].global_shape) == 2]
    assert len(matrices) > 20
    for tensor, layout in matrices:
        mine = {(layout.rank_region(rank, tensor.global_shape), rank) for rank in layout.mesh.ranks}
        assert mine == {(chunk.region, rank) for chunk in tensor.chunks for rank in chunk.holders}, tensor.name


STRATEGIES = [
    parse_strategy(text, shard_optimizer=sharded)
    for text in (
        "dp=1", "dp=4", "fsdp=4", "tp=4", "pp=4", "dp=2,fsdp=2,tp=2,pp=2", "dp=8,ep=4", "fsdp=8,ep=2,tp=2", "dp=2,fsdp=2,ep=4,pp=2", "pp=8"
    )
    for sharded in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("kind", [{}, {"stacked": True}, {"tied": True}], ids=["numbered", "stacked", "tied"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s}{',zero' * s.shard_optimizer}")
def test_every_element_lies_on_as_many_ranks_as_hold_copies(strategy: Strategy, kind: dict[str, bool]) -> None:
    wanted = tensors(**kind)
    descriptions = [describe_rank(strategy, wanted, rank) for rank in range(strategy.world_size)]
    check_agreement(descriptions)
    counts = {tensor.key: np.zeros(tensor.global_shape, int) for tensor in wanted}
    for description in descriptions:
        for tensor in description.tensors:
            assert tensor.layout is not None
            assert tensor.regions == (tensor.layout.rank_region(description.rank, tensor.global_shape),)
            counts[tensor.key][tensor.regions[0].slices] += 1
    for key, count in counts.items():
        stages = 1
        if not key.parameter:
            stages = strategy.pp
        elif kind.get("tied") and "embed" in key.parameter and strategy.pp > 1:
            stages = 2
        is_sharded = key.kind is Kind.OPTIMIZER and strategy.shard_optimizer
        copies = stages * strategy.dp * strategy.fsdp * strategy.tp
        name = understand(key.parameter) if key.parameter else None
        if name is not None:
            dp, fsdp, ep = strategy.expert_sizes if name.is_of_experts else (strategy.dp, strategy.fsdp, 1)
            splits_by_tensor = strategy.tp if name.tensor_dimension(count.ndim) is not None else 1
            copies //= ep * fsdp * splits_by_tensor * (dp if is_sharded else 1)
        assert set(count.reshape(-1)) == {copies}, f"{key} under {strategy}"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s}{',zero' * s.shard_optimizer}")
def test_ranks_of_a_class_hold_the_same_and_others_do_not(strategy: Strategy) -> None:
    classes = rank_classes(strategy, tensors())
    assert sorted(itertools.chain(*classes)) == list(range(strategy.world_size))
    assert [ranks[0] for ranks in classes] == sorted(ranks[0] for ranks in classes)

    def content(description: RankDescription) -> tuple[object, ...]:
        return tuple((tensor.key, tensor.regions) for tensor in description.tensors)

    placement = lay_out(strategy, tensors())
    seen = [{content(placement.describe(rank)) for rank in ranks} for ranks in classes]
    assert all(len(contents) == 1 for contents in seen)
    counted = Counter(next(iter(contents)) for contents in seen)
    for same, number in counted.items():
        # An uneven split leaves several places with nothing: those are places apart, too.
        assert number == 1 or any(region.is_empty for _, regions in same for region in regions)


def test_replicas_are_one_class() -> None:
    assert rank_classes(parse_strategy("dp=4,tp=2"), tensors()) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert len(rank_classes(parse_strategy("dp=4,tp=2", shard_optimizer=True), tensors())) == 8
    assert len(rank_classes(parse_strategy("dp=8,pp=2,ep=4"), tensors())) == 8


def test_names_say_what_is_split() -> None:
    mine = held("tp=2", 1)
    layer = "model.layers.0"
    assert mine["model.embed_tokens.weight"] == Region((25, 0), (25, HIDDEN))
    assert mine[f"{layer}.self_attn.q_proj.weight"] == Region((18, 0), (18, HIDDEN))
    assert mine[f"{layer}.self_attn.q_proj.bias"] == Region((18,), (18,))
    assert mine[f"{layer}.self_attn.o_proj.weight"] == Region((0, 18), (HIDDEN, 18))
    assert mine[f"{layer}.self_attn.o_proj.bias"] == Region((0,), (HIDDEN,))
    assert mine[f"{layer}.mlp.gate.weight"] == Region((0, 0), (EXPERTS, HIDDEN))
    assert mine[f"{layer}.mlp.experts.2.down_proj.weight"] == Region((0, 6), (HIDDEN, 5)), "uneven: the last part is smaller"
    assert mine[f"o:{layer}.mlp.experts.2.down_proj.weight"] == Region((0, 6), (HIDDEN, 5)), "a slot lies as its parameter"


def test_layers_and_what_surrounds_them_lie_on_stages() -> None:
    stages = [{name.removeprefix("o:") for name in held("pp=2", rank)} for rank in (0, 1)]
    assert {name.split(".")[2] for name in stages[0] if ".layers." in name} == {"0", "1", "2"}
    assert {name.split(".")[2] for name in stages[1] if ".layers." in name} == {"3", "4"}
    assert {name for name in stages[0] if name and ".layers." not in name} == {"model.embed_tokens.weight"}
    assert {name for name in stages[1] if name and ".layers." not in name} == {"model.norm.weight", "lm_head.weight"}
    tied = [set(held("pp=2", rank, tensors(tied=True))) for rank in (0, 1)]
    assert all("model.embed_tokens.weight" in names for names in tied)
    small = [WantedTensor(model_key(f"mtp.layers.0.{n}.weight"), FLOAT, (4, 4)) for n in range(2)]
    assert all(t.key.parameter not in held("pp=2", 0, [*tensors(), *small]) for t in small), "a small stack beside the layers"
    assert all(t.key.parameter in held("pp=2", 1, [*tensors(), *small]) for t in small)


def test_experts_are_spread_by_number_or_by_dimension() -> None:
    numbers = [{name.split(".")[5] for name in held("dp=4,ep=2", rank) if ".experts." in name} for rank in range(4)]
    assert numbers == [{"0", "1", "2"}, {"3", "4"}, {"0", "1", "2"}, {"3", "4"}]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stacked = [held("dp=4,ep=2", rank, tensors(stacked=True)) for rank in range(4)]
    assert [mine[name].offset[0] for mine in stacked] == [0, 3, 0, 3]
    assert held("dp=2,tp=2,ep=2", 3, tensors(stacked=True))[name] == Region((3, 11, 0), (2, 11, HIDDEN))
    assert held("dp=2,tp=2,ep=2", 3, tensors(stacked=True))["model.layers.0.mlp.experts.down_proj"] == Region((3, 0, 6), (2, HIDDEN, 5))
    assert held("fsdp=4,ep=2", 2, tensors(stacked=True))[name] == Region((2, 0, 0), (1, 22, HIDDEN)), "by ep, then by what is left of fsdp"


def test_the_optimizer_can_be_split_where_parameters_are_copies() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    mine = held("dp=2,tp=2", 3, shard_optimizer=True)
    assert mine[name] == Region((18, 0), (18, HIDDEN))
    assert mine[f"o:{name}"] == Region((27, 0), (9, HIDDEN))
    expert = "model.layers.0.mlp.experts.4.up_proj.weight"
    assert held("dp=4,ep=2", 3, shard_optimizer=True)[f"o:{expert}"] == Region((6, 0), (5, HIDDEN)), "over the two ranks that hold it"


def test_slots_of_another_shape_and_scalars_are_whole() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    factor = WantedTensor(slot_key("exp_avg_sq_row", name), FLOAT, (3 * HIDDEN,))
    step = WantedTensor(slot_key("step", name), FLOAT, ())
    mine = describe_rank(parse_strategy("fsdp=2,tp=2"), [*tensors(), factor, step], 1)
    regions = {tensor.key: tensor.regions for tensor in mine.tensors}
    assert regions[factor.key] == (Region((0,), (3 * HIDDEN,)),)
    assert regions[step.key] == (Region((), ()),)
    assert regions[GLOBAL_STEP] == (Region((0,), (1,)),)


def test_rules_of_the_user_come_before_names() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    assert held("tp=2", 1, splits=["*.q_proj.weight=tp:1"])[name] == Region((0, 6), (3 * HIDDEN, 6))
    assert held("tp=2", 1, splits=["*.q_proj.*=none"])[name] == Region.whole((3 * HIDDEN, HIDDEN))
    assert held("fsdp=2,tp=2", 3, splits=["*.q_proj.weight=tp:0,fsdp:-1"])[name] == Region((18, 6), (18, 6))
    assert held("fsdp=2", 1, splits=["*.q_proj.weight=fsdp:none"])[name] == Region.whole((3 * HIDDEN, HIDDEN))
    odd = [WantedTensor(model_key("model.layers.0.mixer.w"), FLOAT, (EXPERTS, 4, 6))]
    assert held("dp=2,tp=2,ep=2", 3, odd, splits=["*.mixer.w=ep:0,tp:2"])["model.layers.0.mixer.w"] == Region((3, 0, 3), (2, 4, 3))
    with pytest.raises(UsageError, match=r"a dimension that a tensor doesn't have(.|\n)*q_proj.bias(.|\n)*-1 to 0"):
        held("tp=2", 0, splits=["*.q_proj.*=tp:1"])


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_the_strategy_does_not_have(rank: int) -> None:
    with pytest.raises(UsageError, match="no such rank"):
        describe_rank(parse_strategy("dp=2,tp=2"), tensors(), rank)


@pytest.mark.parametrize(
    ("name", "layer", "expert", "dimension"),
    [
        ("model.layers.3.mlp.experts.255.gate_proj.weight", 3, 255, 0),
        ("model.layers.60.self_attn.kv_b_proj.weight", 60, None, 0),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight", 60, None, None),
        ("model.layers.60.self_attn.q_a_layernorm.weight", 60, None, None),
        ("model.layers.3.mlp.shared_experts.down_proj.weight", 3, None, 1),
        ("model.layers.3.mlp.down_proj.weight_scale_inv", 3, None, 1),
        ("decoder.layers.7.self_attention.linear_qkv.weight", 7, None, 0),
        ("decoder.layers.7.self_attention.linear_qkv.layer_norm_weight", 7, None, None),
        ("decoder.layers.7.mlp.linear_fc2.weight", 7, None, 1),
        ("decoder.layers.7.mlp.experts.linear_fc1.weight12", 7, 12, 0),
        ("decoder.layers.7.mlp.experts.local_experts.4.linear_fc2.weight", 7, 4, 1),
        ("embedding.word_embeddings.weight", None, None, 0),
        ("output_layer.weight", None, None, 0),
        ("transformer.h.11.attn.c_attn.weight", 11, None, 1),
        ("transformer.h.11.attn.c_proj.weight", 11, None, 0),
        ("0.weight", 0, None, None),
        ("model.layers.99999999999999999999.mlp.up_proj.weight", None, None, 0),
        ("weight", None, None, None),
    ],
)
def test_names_are_understood(name: str, layer: int | None, expert: int | None, dimension: int | None) -> None:
    dimensions = 1 if "norm" in name else 2
    found = understand(name)
    assert (found.layer, found.expert, found.tensor_dimension(dimensions)) == (layer, expert, dimension)


def test_stacked_experts_of_other_frameworks_are_understood() -> None:
    names = {"weight1": 2, "weight2": 1, "gate_up_proj": 1, "down_proj": 2, "gate_up_proj_bias": 1, "down_proj_bias": None}
    for leaf, dimension in names.items():
        found = understand(f"model.decoder.layers.3.mlp.experts.{leaf}")
        assert found.is_of_experts
        assert found.expert is None
        assert found.tensor_dimension(2 if leaf.endswith("bias") else 3) == dimension, leaf


def test_no_module_is_in_the_table_twice() -> None:
    from reshard.planning import naming

    named = [module for _, modules in naming._MODULES for module in modules.split()]
    assert len(named) == len(ROLES)


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_layer_is_on_the_stage_that_says_so(layers: int, stages: int) -> None:
    for stage in range(stages):
        assert all(stage_of_layer(layer, layers, stages) == stage for layer in stage_layers(layers, stages, stage))
