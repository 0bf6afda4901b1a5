"""One state, saved by MindSpore and by PyTorch: the same tensors, names and metadata, and the same training information."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.comm import Communicator
from reshard.frameworks.mindspore import MindSporeAdapter, layouts
from reshard.testing import run_ranks
from tests import golden
from tests.frameworks.mindspore.qwen3 import Strategy, rank_part
from tests.processes import RankPool
from tests.training import mapped_ranks

COMMON = reshard.CommonInfo(epoch_num=0, step_num=1, global_step=1, loss_scale=None, global_batch_size=4, consumed_samples=4)


def in_turn(turn: threading.Lock, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with turn:
            return function(*arguments, **options)

    return call


def saved_by_mindspore(root: Path, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real run's state out of real cells; ranks are threads, each with its part."""
    mine = threading.local()
    monkeypatch.setattr(layouts, "current_rank", lambda: mine.rank)
    parts = [rank_part(golden.expected(mapped_ranks.CASE), strategy, rank) for rank in range(strategy.ranks)]
    # MindSpore itself stands still now and then when several threads ask it for values at the same time: one looks after the other.
    turn = threading.Lock()
    for name in ("capture", "random_states"):
        monkeypatch.setattr(MindSporeAdapter, name, in_turn(turn, getattr(MindSporeAdapter, name)))

    def save(comm: Communicator) -> None:
        mine.rank = comm.rank
        model, optimizer = parts[comm.rank]
        reshard.save(root, 1, model=model, optimizer=optimizer, prefix="qwen3", common=COMMON, communicator=comm)

    run_ranks(strategy.ranks, save)


def saved_by_torch(root: Path, strategy: dict[str, Any]) -> None:
    """The same state out of transformers' Qwen3."""
    run = mapped_ranks.begin(strategy)
    reshard.load(golden.root(mapped_ranks.CASE), model=run.model, optimizer=run.optimizer, mapping="qwen3", strict=mapped_ranks.STRICT)
    reshard.save(root, 1, model=run.model, optimizer=run.optimizer, prefix="qwen3", common=COMMON, mapping="qwen3")


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = reshard.Checkpoint(one), reshard.Checkpoint(other)
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name][...].tobytes() == theirs[name][...].tobytes(), name
    assert (one / "iteration_00000001" / "common.json").read_bytes() == (other / "iteration_00000001" / "common.json").read_bytes()


def iteration(root: Path) -> Path:
    return root / "iteration_00000001"


def test_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by_mindspore(tmp_path / "mindspore", Strategy(), monkeypatch)
    saved_by_torch(tmp_path / "torch", {})
    assert_same_tensors(tmp_path / "mindspore", tmp_path / "torch")
    ours, theirs = golden.told(iteration(tmp_path / "torch")), golden.told(iteration(tmp_path / "mindspore"))
    for told in (ours, theirs):
        for entry in told["state_dict_metadata"].values():
            # A mesh of one rank says nothing that no layout doesn't say.
            entry.pop("layout")
            entry["properties"].pop("replica_id")
    assert ours == theirs


def test_cells_are_saved_as_the_published_implementation_saves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by_mindspore(tmp_path / "mindspore", Strategy(dp=2, tp=2), monkeypatch)
    assert golden.told(iteration(tmp_path / "mindspore")) == golden.told(golden.iteration("dp2_tp2"))


@pytest.mark.sweep
def test_on_four_ranks(rank_pool: Callable[[int], RankPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by_mindspore(tmp_path / "mindspore", Strategy(dp=2, tp=2), monkeypatch)
    rank_pool(4).run(saved_by_torch, tmp_path / "torch", {"data": 2, "tensor": 2, "shard": None})
    assert_same_tensors(tmp_path / "mindspore", tmp_path / "torch")
    mapped_ranks.assert_same_metadata(iteration(tmp_path / "torch"), iteration(tmp_path / "mindspore"))
