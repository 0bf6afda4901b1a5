"""A save through a mapping gathers fused tensors some MiB at a time, however large they are."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.families import Rule, RuleMapping, concatenate, interleave, transpose
from reshard.geometry import Region
from reshard.state import Shard, model_key, whole_tensor
from reshard.storage.posix import PosixStorage
from reshard.testing import run_ranks

ROWS, COLUMNS = 3000, 2048

FUSED = {
    "interleaved": interleave("a", "b"),
    "transposed": transpose(concatenate("a", "b")),
    "beside": concatenate("a", "b", axis=1),
}


@pytest.mark.parametrize(("kind", "check_replicas"), [("beside", False), ("transposed", False), ("interleaved", True)])
def test_a_fused_tensor_is_never_held_twice(kind: str, check_replicas: bool, tmp_path: Path) -> None:
    parts = {name: np.random.default_rng(seed).standard_normal((ROWS, COLUMNS), np.float32) for seed, name in enumerate("ab")}
    whole = {
        "interleaved": np.stack([parts["a"], parts["b"]], 1).reshape(2 * ROWS, COLUMNS),
        "transposed": np.concatenate([parts["a"], parts["b"]]).T,
        "beside": np.concatenate([parts["a"], parts["b"]], 1),
    }[kind]
    mapping = RuleMapping(checkpoint=(Rule("fused", FUSED[kind]),))
    ranks = 2 if check_replicas else 1

    def save(comm: Any) -> None:
        reshard.save(
            tmp_path, 1, model=dict(parts), communicator=comm, mapping=mapping, check_replicas=check_replicas, remove_redundancy=True
        )

    tracemalloc.start()
    try:
        run_ranks(ranks, save)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < ranks * 14e6 < whole.nbytes
    np.testing.assert_array_equal(reshard.Checkpoint(tmp_path, PosixStorage())["fused"][...], whole)


class Device:
    """Memory that the host can't address."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.reads = 0

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @property
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    def read(self) -> np.ndarray:
        self.reads += 1
        return self.array.copy()

    def write(self, region: Region, values: np.ndarray) -> None:
        self.array[region.slices] = values

    def hold(self) -> Any:
        return self

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.array


def test_what_a_device_holds_is_copied_once(tmp_path: Path) -> None:
    arrays = {name: np.random.default_rng(seed).standard_normal((600, 2048), np.float32) for seed, name in enumerate("ab")}
    devices = {name: Device(array) for name, array in arrays.items()}
    model = {
        name: whole_tensor(model_key(name), array)._replace(shards=(Shard(Region.whole(array.shape), devices[name]),))
        for name, array in arrays.items()
    }
    reshard.save(tmp_path, 1, model=model, mapping=RuleMapping(checkpoint=(Rule("fused", interleave("a", "b")),)))
    assert [device.reads for device in devices.values()] == [1, 1]
    expected = np.stack([arrays["a"], arrays["b"]], 1).reshape(1200, 2048)
    np.testing.assert_array_equal(reshard.Checkpoint(tmp_path)["fused"][...], expected)
