"""What the published implementation wrote goes into real cells and optimizers under every strategy, rank by rank."""

from __future__ import annotations

import pytest

import reshard
from reshard.comm import SingleProcess
from reshard.frameworks.mindspore import layouts
from tests import golden
from tests.frameworks.mindspore.qwen3 import Strategy, differences, is_of_model, rank_part

STRATEGIES = [
    Strategy(dp=4),
    Strategy(tp=4),
    Strategy(dp=2, tp=2),
    Strategy(pp=4),
    Strategy(dp=2, tp=2, pp=2),
    Strategy(dp=2, tp=2, pp=2, sharded=True),
]


# The others are in the sweep; ranks under msrun load all of them in every run.
FAST = ("dp2_tp2_bf16", "single_real_train")


@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=pytest.mark.sweep) for case in golden.CASES])
def test_every_rank_gets_its_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = golden.typed(case)
    assert any(name.startswith("adam_m.") for name in whole) == ("noopt" not in case)
    assert ("bf16" in case) == any(array.dtype.name == "bfloat16" for array in whole.values())
    for strategy in STRATEGIES:
        seen: set[str] = set()
        for rank in range(strategy.ranks):
            # One process is each rank in turn.
            monkeypatch.setattr(layouts, "current_rank", lambda rank=rank: rank)
            model, optimizer = rank_part(whole, strategy, rank, blank=True)
            held = [parameter.name for parameter in model.get_parameters()]
            if not held:
                continue  # two layers on four stages
            seen.update(held)
            report = reshard.load(golden.root(case), model=model, optimizer=optimizer, communicator=SingleProcess())
            assert not report.missing
            assert differences(whole, strategy, rank, model, optimizer) == [], f"rank {rank} of {strategy}"
        assert seen == {name for name in whole if is_of_model(name)}
