"""A strategy as text: what it means, and what is refused."""

from __future__ import annotations

import pytest

from reshard.errors import UsageError
from reshard.planning.strategy import Strategy, parse_split, parse_strategy


def test_a_strategy_is_sizes_by_axis() -> None:
    strategy = parse_strategy(" pp=2, tp=4 ,dp=2", shard_optimizer=True, splits=["*.w=tp:0"])
    assert strategy == Strategy(dp=2, tp=4, pp=2, shard_optimizer=True, splits=(parse_split("*.w=tp:0"),))
    assert strategy.world_size == 16
    assert str(strategy) == "dp=2,tp=4,pp=2"
    assert str(parse_strategy("tp=1")) == "dp=1"


def test_experts_are_spread_over_ranks_that_are_there_already() -> None:
    assert parse_strategy("dp=8,ep=4").world_size == 8
    assert parse_strategy("dp=8,ep=4").expert_sizes == (2, 1, 4)
    assert parse_strategy("dp=2,fsdp=8,ep=4").expert_sizes == (2, 2, 4)
    assert parse_strategy("dp=6,fsdp=2,ep=4").expert_sizes == (3, 1, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dp=2,mp=4", ["axis that doesn't exist", "'mp=4'", "tp: ranks that split", "fsdp: "]),
        ("dp", ["not a whole number", "strategy, dp"]),
        ("", ["sizes by axis", "dp=2,tp=4,pp=2"]),
        ("dp=2;tp=4", ["not a whole number", "'2;tp=4'"]),
        ("dp=2,,tp=2", ["sizes by axis"]),
        ("dp=two", ["not a whole number", "strategy, dp"]),
        ("dp=0", ["a size that can't be", "strategy, dp", "1 or more"]),
        ("dp=-2", ["not a whole number"]),
        ("dp=2,dp=4", ["twice", "strategy, dp"]),
        ("dp=9999999,tp=9999999", ["too many ranks"]),
        ("ep=8", ["ep=8 of dp=1", "dp=8"]),
        ("fsdp=6,ep=4", ["ep=4 of dp=1 × fsdp=6"]),
    ],
)
def test_what_a_strategy_is_not(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        parse_strategy(text)
    for word in words:
        assert word in str(raised.value)


def test_a_rule_says_which_dimensions_are_split() -> None:
    rule = parse_split("*.experts.w=ep:0, tp:-1,fsdp:none")
    assert rule.pattern == "*.experts.w"
    assert dict(rule.dimensions) == {"ep": 0, "tp": -1, "fsdp": None}
    assert dict(parse_split("a=b=none").dimensions) == {}
    assert parse_split("a=b=none").pattern == "a=b"
    assert rule.means("layers.0.mlp.experts.w")
    assert not rule.means("layers.0.mlp.experts.w1")


@pytest.mark.parametrize("text", ["", "tp:0", "=tp:0", "w=", "w=tp", "w=tp:", "w=tp:x", "w=pp:0", "w=tp:0,tp:1", "w=tp:1e9", "w=none,tp:0"])
def test_what_a_rule_is_not(text: str) -> None:
    with pytest.raises(UsageError, match="PATTERN=AXIS:DIMENSION"):
        parse_split(text)


def test_of_several_rules_the_last_counts() -> None:
    strategy = parse_strategy("tp=2", splits=["*=tp:0", "a.*=tp:1"])
    assert strategy.rule("b.w") == parse_split("*=tp:0")
    assert strategy.rule("a.w") == parse_split("a.*=tp:1")
    assert parse_strategy("tp=2").rule("a.w") is None
