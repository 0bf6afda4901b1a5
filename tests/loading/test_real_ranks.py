"""Real processes: a Qwen3 under FSDP2, tensor and pipeline parallelism is saved under one strategy and loaded under another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.config.fields import ModelSettings
from reshard.config.sizes import ParallelSizes
from reshard.errors import CheckpointNotFoundError
from reshard.state import GLOBAL_STEP, Kind, slot_key
from tests.processes import RankPool

# Vocabulary and feed-forward width divide by no number of ranks: uneven shards everywhere, empty ones on some ranks (norms over 8).
SETTINGS = ModelSettings(
    vocab_size=257, hidden_size=20, intermediate_size=45, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8, head_dim=4
)
TIED = SETTINGS.model_copy(update={"tie_word_embeddings": True})


def sizes(pipeline: int = 1, replicate: int = 1, shard: int = 1, tensor: int = 1) -> ParallelSizes:
    return ParallelSizes(pipeline, replicate, shard, tensor)


ONE = sizes()
Pair = tuple[ModelSettings, ParallelSizes, ParallelSizes]
PAIRS: list[Pair] = [
    (SETTINGS, ONE, sizes(shard=2, tensor=2, pipeline=2)),
    (SETTINGS, sizes(shard=2, tensor=2, pipeline=2), sizes(tensor=4)),
    (SETTINGS, sizes(tensor=4), sizes(shard=4)),
    (SETTINGS, sizes(shard=4), sizes(pipeline=2)),
    (TIED, sizes(pipeline=2, tensor=2), ONE),
]
MORE_PAIRS: list[Pair] = [
    (SETTINGS, sizes(shard=2, tensor=2, pipeline=2), ONE),
    (SETTINGS, sizes(shard=4), sizes(tensor=2)),
    (SETTINGS, sizes(shard=8), sizes(pipeline=2)),
    (SETTINGS, sizes(pipeline=2), sizes(shard=8)),
    (SETTINGS, sizes(replicate=2, shard=2), sizes(shard=2, tensor=2)),
    (SETTINGS, sizes(replicate=2, shard=2, tensor=2), sizes(shard=4, pipeline=2)),
    (SETTINGS, sizes(tensor=2), sizes(replicate=2)),
    (SETTINGS, sizes(shard=2), sizes(tensor=8)),
    (SETTINGS, sizes(tensor=2, pipeline=2), sizes(shard=2, tensor=4)),
    (TIED, ONE, sizes(pipeline=2, shard=2)),
]


def build(settings: ModelSettings, arranged: ParallelSizes, seed: int) -> tuple[Any, Any]:
    import torch

    from reshard.training.mesh import make_place
    from reshard.training.parallelize import build_model

    model = build_model(settings, seed, make_place(arranged))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def wrong_tensors(root: Path, model: Any, optimizer: Any) -> list[str]:
    """What this rank holds against the whole tensors, as read without a framework and sliced by numpy."""
    from reshard.frameworks.select import select_adapter
    from reshard.testing import differences

    checkpoint = reshard.Checkpoint(root)
    whole = {checkpoint[name].key: checkpoint[name].read() for name in checkpoint}
    state = select_adapter(model, optimizer).capture(model, optimizer, global_step=2)
    expected = [slot_key(slot, key.parameter) for key in state.tensors if key.kind is Kind.MODEL for slot in ("adam_m", "adam_v")]
    missing = [str(key) for key in (*expected, GLOBAL_STEP) if key not in state.tensors]
    assert state.tensors.keys() <= whole.keys()
    return missing + differences(whole, state)


def save(jobs: list[tuple[Path, ModelSettings, ParallelSizes]]) -> list[list[str]]:
    found = []
    for root, settings, arranged in jobs:
        model, optimizer = build(settings, arranged, seed=1)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone().mul_(0.5)
            optimizer.step()
        reshard.save(root, 2, model=model, optimizer=optimizer)
        found.append(wrong_tensors(root, model, optimizer))
    return found


def load(jobs: list[tuple[Path, ModelSettings, ParallelSizes]]) -> list[list[str]]:
    found = []
    for root, settings, arranged in jobs:
        model, optimizer = build(settings, arranged, seed=2)
        report = reshard.load(root, model=model, optimizer=optimizer)
        assert not report.missing
        assert not report.unexpected
        assert not report.notes
        found.append(wrong_tensors(root, model, optimizer))
    return found


@pytest.mark.parametrize("pairs", [pytest.param(PAIRS, id="some"), pytest.param(MORE_PAIRS, id="more", marks=pytest.mark.sweep)])
def test_every_pair_bit_for_bit(rank_pool: Callable[[int], RankPool], tmp_path: Path, pairs: list[Pair]) -> None:
    sources = {(settings.tie_word_embeddings, source): settings for settings, source, _ in pairs}
    roots = {key: tmp_path / f"root-{number}" for number, key in enumerate(sources)}
    for world in (1, 2, 4, 8):
        jobs = [(roots[key], sources[key], key[1]) for key in sources if key[1].ranks == world]
        assert rank_pool(world).run(save, jobs) == [[[]] * len(jobs)] * world
    for world in (1, 2, 4, 8):
        jobs = [(roots[s.tie_word_embeddings, source], s, target) for s, source, target in pairs if target.ranks == world]
        assert rank_pool(world).run(load, jobs) == [[[]] * len(jobs)] * world


def test_a_tied_embedding_is_stored_once(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    rank_pool(2).run(save, [(tmp_path, TIED, sizes(pipeline=2))])
    names = list(reshard.Checkpoint(tmp_path))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def locked(root: Path) -> str:
    try:
        reshard.CheckpointManager(root, lock_timeout=0.0).close()
    except reshard.ReshardError as error:
        return type(error).__name__ + str(error)
    return ""


def test_a_locked_root_is_refused_on_every_rank(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    with reshard.CheckpointManager(tmp_path):
        found = rank_pool(2).run(locked, tmp_path)
    assert len(set(found)) == 1
    assert found[0].startswith("RootLockedError")
    assert rank_pool(2).run(locked, tmp_path) == ["", ""]
    with pytest.raises(reshard.ReshardError, match="no such checkpoint"):
        reshard.load(tmp_path / "none")


def look_for_none(root: Path, missing_ok: bool) -> tuple[list[str], bool]:
    """Evaluate, find nothing to load, evaluate again: the kinds of the parameters in between, and whether the outcome is the same."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    values = torch.ones(2, 8)
    with torch.no_grad():
        before = model(values)
        with reshard.CheckpointManager(root) as manager:
            if missing_ok:
                assert manager.load(model=model, missing_ok=True) is None
            else:
                with pytest.raises(CheckpointNotFoundError):
                    manager.load(model=model)
        kinds = [type(parameter).__name__ for parameter in model.parameters()]
        return kinds, torch.equal(before, model(values))


@pytest.mark.parametrize("missing_ok", [True, False], ids=["fine", "error"])
def test_gathered_parameters_are_given_up_by_all_ranks_or_none(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, missing_ok: bool
) -> None:
    """Ranks that disagree about that would wait for each other in their next forward pass."""
    (first, same), other = rank_pool(2).run(look_for_none, tmp_path, missing_ok, timeout=60)
    assert same
    assert other == (first, same)
