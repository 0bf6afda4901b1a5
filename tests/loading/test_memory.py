"""A load keeps its memory budget: measured in real processes, as what is resident at most beyond the state that is filled."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import reshard
from reshard.geometry import Layout
from reshard.state import model_key
from reshard.testing import mesh_of, split, tensor_on_rank
from tests.processes import RankPool

RANKS = 2
BUDGET = 1 << 20

# What no budget rules: code, threads, buffers of the ranks' connections. A copy of what a rank holds of LARGE would take more.
ELSE = 20 << 20
PER_TENSOR = 2 << 10

LARGE = (16 << 10, 1024)  # 64 MiB of float32
SMALL = 1000

SPLITS: Mapping[str, tuple[str | None, str | None]] = {"rows": ("tp", None), "columns": (None, "tp"), "whole": (None, None)}


def values() -> dict[str, np.ndarray]:
    """The whole tensors: one large, and many small."""
    large = np.arange(LARGE[0] * LARGE[1], dtype=np.uint32).view(np.float32).reshape(LARGE)
    return {"large": large} | {f"small.{number}": np.full((8, 4), number, np.float32) for number in range(SMALL)}


def layout(how: str) -> Layout:
    return split(mesh_of(tp=RANKS), *SPLITS[how])


def save(root: Path, how: str) -> None:
    import torch.distributed as dist

    from reshard.frameworks.torch.communicator import connect

    comm = connect()
    model = {name: tensor_on_rank(model_key(name), array, layout(how), dist.get_rank()) for name, array in values().items()}
    reshard.save(root, 1, model=model, communicator=comm)
    comm.close()


def load(root: Path, how: str, dtype: Any, options: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The bytes that were resident beyond the state at most, and the tensors that are wrong."""
    import torch.distributed as dist

    from reshard.frameworks.torch.communicator import connect

    comm = connect()
    wanted = {name: array.astype(dtype, copy=False) for name, array in values().items()}
    model = {name: tensor_on_rank(model_key(name), array, layout(how), dist.get_rank(), blank=True) for name, array in wanted.items()}
    gc.collect()
    # What earlier work left for reuse would hide what the load takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    reshard.load(root, model=model, communicator=comm, memory_budget=BUDGET, **options)
    peak = resident("VmHWM") - before
    comm.close()
    wrong = []
    for name, tensor in model.items():
        assert tensor is not None
        expected = tensor_on_rank(model_key(name), wanted[name], layout(how), dist.get_rank())
        assert expected is not None
        if tensor.shards[0].memory.read().tobytes() != expected.shards[0].memory.read().tobytes():
            wrong.append(name)
    return peak, wrong


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


CASES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("rows", "rows", np.float32, {}),
    ("rows", "columns", np.float32, {}),
    ("columns", "whole", np.float32, {}),
    ("columns", "whole", np.float32, {"balanced": True}),
    ("rows", "columns", ml_dtypes.bfloat16, {"strict": reshard.Strictness(dtype="cast")}),
    ("rows", "columns", ml_dtypes.bfloat16, {"strict": reshard.Strictness(dtype="cast"), "balanced": True}),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system doesn't tell the peak of memory")
def test_the_budget_is_kept(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    pool = rank_pool(RANKS)
    for how in ("rows", "columns"):
        pool.run(save, tmp_path / how, how)
    limit = BUDGET + ELSE + PER_TENSOR * (SMALL + 1)
    assert limit < 4 * LARGE[0] * LARGE[1] / RANKS
    for stored, wanted, dtype, options in CASES:
        for rank, (peak, wrong) in enumerate(pool.run(load, tmp_path / stored, wanted, dtype, options)):
            where = f"{stored} to {wanted}, {np.dtype(dtype)}, {options}, rank {rank}"
            print(f"{where}: {peak / 2**20:.1f} MiB of at most {limit / 2**20:.1f}")
            assert peak <= limit, where
            assert wrong == [], where
