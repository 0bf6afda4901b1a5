"""Balanced loads between real processes: a Qwen3 and its AdamW under other strategies, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import reshard
from reshard.config.fields import ModelSettings
from reshard.config.sizes import ParallelSizes
from reshard.errors import StorageError
from reshard.storage.posix import PosixStorage
from reshard.testing import FaultyStorage
from tests.loading.test_real_ranks import ONE, SETTINGS, TIED, build, save, sizes, wrong_tensors
from tests.processes import RankPool

PAIRS = [
    (SETTINGS, sizes(shard=2, tensor=2), sizes(shard=4)),
    (SETTINGS, sizes(shard=2, tensor=2), sizes(replicate=4)),
    (SETTINGS, sizes(shard=2, tensor=2), sizes(pipeline=2, tensor=2)),
    (SETTINGS, sizes(shard=2, tensor=2), sizes(replicate=2, shard=2)),
    (SETTINGS, sizes(pipeline=2), sizes(shard=2, tensor=2)),
    (SETTINGS, sizes(pipeline=2), sizes(tensor=2)),
    (SETTINGS, ONE, sizes(replicate=2)),
    (TIED, ONE, sizes(pipeline=2, shard=2)),
]


def load(jobs: list[tuple[Path, ModelSettings, ParallelSizes]]) -> list[tuple[list[str], reshard.RestoreReport]]:
    found = []
    for root, settings, arranged in jobs:
        model, optimizer = build(settings, arranged, seed=2)
        report = reshard.load(root, model=model, optimizer=optimizer, balanced=True, memory_budget=1 << 20)
        found.append((wrong_tensors(root, model, optimizer), report))
    return found


def test_every_pair_bit_for_bit(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    sources = {(settings.tie_word_embeddings, source): settings for settings, source, _ in PAIRS}
    roots = {key: tmp_path / f"root-{number}" for number, key in enumerate(sources)}
    for world in (1, 2, 4):
        jobs = [(roots[key], sources[key], key[1]) for key in sources if key[1].ranks == world]
        assert rank_pool(world).run(save, jobs) == [[[]] * len(jobs)] * world
    for world in (2, 4):
        pairs = [(s, source, target) for s, source, target in PAIRS if target.ranks == world]
        jobs = [(roots[s.tie_word_embeddings, source], s, target) for s, source, target in pairs]
        results = rank_pool(world).run(load, jobs)
        for (root, _, _), *outcomes in zip(jobs, *results, strict=True):
            assert all(wrong == [] for wrong, _ in outcomes), root
            report = outcomes[0][1]
            checkpoint = reshard.Checkpoint(root)
            total = sum(checkpoint[name].nbytes for name in checkpoint)
            assert report.bytes_read == total
            assert max(rank.bytes_read for rank in report.ranks) <= 1.05 * total / world
            assert report.bytes_sent == sum(rank.bytes_received for rank in report.ranks) > 0


def whole(rank: int, megabytes: int) -> dict[str, Any]:
    return {f"w{number}": np.full((1 << 20,), rank + number, np.uint8) for number in range(megabytes)}


def save_big(root: Path) -> None:
    reshard.save(root, 1, model=whole(1, 24))


def load_big(root: Path, failing: int | None) -> tuple[list[str], str]:
    import torch.distributed as dist

    rank = dist.get_rank()
    storage: Any = PosixStorage()
    if rank == failing:
        storage = FaultyStorage(storage, fail_at=20, operations=["read_into"])
    model = whole(0, 24)
    error = ""
    try:
        reshard.load(root, model=model, storage=storage, balanced=True, memory_budget=4 << 20)
    except StorageError as raised:
        error = str(raised)
    expected = whole(1, 24)
    return [name for name, array in model.items() if not np.array_equal(array, expected[name])], error


def test_many_messages_and_a_rank_that_fails_among_them(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    rank_pool(4).run(save_big, tmp_path)
    assert rank_pool(4).run(load_big, tmp_path, None) == [([], "")] * 4
    outcomes = rank_pool(4).run(load_big, tmp_path, 2)
    assert len({error for _, error in outcomes}) == 1
    assert "simulated failure" in outcomes[0][1]
    assert "rank 2" in outcomes[0][1]
    # The group is whole, and of use.
    assert rank_pool(4).run(load_big, tmp_path, None) == [([], "")] * 4
