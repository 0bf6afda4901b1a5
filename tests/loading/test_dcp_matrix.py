"""Beside PyTorch's distributed checkpoint: one state, saved by both, loaded by each under another placement, must be the same bytes.

The pairs are those of PyTorch's own tests of resharding (`test_dtensor_resharding.py`): placements on a 2 × 2 mesh, and between meshes
of one and two dimensions; and then others: splits of the second dimension, shapes that don't divide, parts of nothing, another number of
ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import reshard
from tests.processes import RankPool


@dataclass(frozen=True)
class Placed:
    """A mesh, and on each of its axes what it does: `S0`, `S1` split a dimension, `R` replicates."""

    mesh: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def world(self) -> int:
        return 4 if len(self.mesh) == 2 else self.mesh[0]

    def __str__(self) -> str:
        return "x".join(map(str, self.mesh)) + "-" + "".join(self.axes)


def on(*mesh: int) -> Callable[..., list[Placed]]:
    return lambda *placements: [Placed(mesh, tuple(placement.split())) for placement in placements]


# The four of PyTorch's tests, whose ordered pairs are twelve.
TWO_D = on(2, 2)("R R", "R S0", "S0 R", "S0 S0")
MIXED = on(2, 2)("S0 S1", "S1 S0", "S1 S1", "R S1", "S1 R")
FOUR = on(4)("S0", "R", "S1")
TWO = on(2)("S0", "R", "S1")

PAIRS = [
    *itertools.permutations(TWO_D, 2),
    *itertools.product(on(4)("S0", "R"), TWO_D),
    *itertools.product(TWO_D, on(4)("S0", "R")),
]
MORE_PAIRS = [
    *itertools.permutations(MIXED, 2),
    *itertools.product(MIXED, [*TWO_D, *FOUR, *TWO]),
    *itertools.product([*TWO_D, *FOUR, *TWO], MIXED),
    *itertools.product(TWO_D, TWO),
    *itertools.product(TWO, TWO_D),
    *itertools.product(FOUR, TWO),
    *itertools.product(TWO, FOUR),
    *((placed, placed) for placed in (*TWO_D, *MIXED, *FOUR, *TWO)),
]
# One of each sort in every test run; all of them in a sweep.
SOME_OF_MORE = MORE_PAIRS[::11]


def pairs(chosen: Sequence[tuple[Placed, Placed]]) -> list[Any]:
    return [pytest.param(source, target, id=f"{source}-to-{target}") for source, target in chosen]


@cache
def mesh_of(shape: tuple[int, ...]) -> Any:
    """One mesh of a shape in a process: its groups are costly to make."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def tensors() -> dict[str, Any]:
    """The tensor of PyTorch's tests; others that divide by nothing, and leave ranks without a part; -0.0 and NaNs with a payload."""
    import torch

    odd = torch.randn(5, 7, generator=torch.Generator().manual_seed(5))
    odd.view(torch.int32)[::2, 1] = torch.tensor([0x7FC00001, -0x3F2153, -0x80000000], dtype=torch.int32)
    return {
        "even": torch.arange(16, dtype=torch.float).view(4, 4),
        "odd": odd,
        "narrow": torch.randn(9, 3, generator=torch.Generator().manual_seed(9)).bfloat16(),
        "low": torch.arange(6, dtype=torch.float16).view(1, 6),
        "whole_numbers": torch.arange(6).view(3, 2) - 3,
    }


def module(placed: Placed, *, blank: bool) -> Any:
    import torch
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    known = {"R": Replicate(), "S0": Shard(0), "S1": Shard(1)}
    made = torch.nn.Module()
    for name, tensor in tensors().items():
        if blank:
            tensor = torch.full_like(tensor, 77)
        placements = [known[axis] for axis in placed.axes]
        spread = distribute_tensor(tensor, mesh_of(placed.mesh), placements, src_data_rank=None)
        made.register_parameter(name, torch.nn.Parameter(spread, requires_grad=False))
    return made


def local_bytes(model: Any) -> dict[str, tuple[tuple[int, ...], bytes]]:
    import torch

    found = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local().contiguous()
        found[name] = tuple(local.shape), local.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def save(jobs: list[tuple[Path, Placed]]) -> None:
    import torch.distributed.checkpoint as dcp

    for root, placed in jobs:
        model = module(placed, blank=False)
        dcp.save(model.state_dict(), checkpoint_id=root / "dcp")
        reshard.save(root / "reshard", 1, model=model)


def load(root: Path, placed: Placed) -> list[dict[str, tuple[tuple[int, ...], bytes]]]:
    """What a rank holds after a load by DCP, a direct and a balanced one of our checkpoint and of DCP's; and what it must hold."""
    import torch.distributed.checkpoint as dcp

    def loaded(by: Callable[[Any], Any]) -> dict[str, tuple[tuple[int, ...], bytes]]:
        model = module(placed, blank=True)
        by(model)
        return local_bytes(model)

    return [
        loaded(lambda model: dcp.load(model.state_dict(), checkpoint_id=root / "dcp")),
        loaded(lambda model: reshard.load(root / "reshard", model=model)),
        loaded(lambda model: reshard.load(root / "reshard", model=model, balanced=True)),
        loaded(lambda model: reshard.load(root / "dcp", model=model)),
        loaded(lambda model: reshard.load(root / "dcp", model=model, balanced=True)),
        local_bytes(module(placed, blank=False)),
    ]


@pytest.fixture(scope="module")
def roots(rank_pool: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> dict[Placed, Path]:
    """A checkpoint of each library for every placement."""
    found = {placed: tmp_path_factory.mktemp(str(placed)) for placed in (*TWO_D, *MIXED, *FOUR, *TWO)}
    for world in (2, 4):
        rank_pool(world).run(save, [(root, placed) for placed, root in found.items() if placed.world == world])
    return found


def check(pool: RankPool, root: Path, target: Placed) -> None:
    for rank, (dcp, direct, balanced, foreign, foreign_balanced, expected) in enumerate(pool.run(load, root, target)):
        assert direct == dcp, f"direct, rank {rank}"
        assert balanced == dcp, f"balanced, rank {rank}"
        assert foreign == dcp, f"direct of DCP's own checkpoint, rank {rank}"
        assert foreign_balanced == dcp, f"balanced of DCP's own checkpoint, rank {rank}"
        assert dcp == expected, f"rank {rank}"


@pytest.mark.parametrize(("source", "target"), pairs(PAIRS + SOME_OF_MORE))
def test_the_same_bytes_as_dcp(rank_pool: Callable[[int], RankPool], roots: dict[Placed, Path], source: Placed, target: Placed) -> None:
    check(rank_pool(target.world), roots[source], target)


@pytest.mark.sweep
@pytest.mark.parametrize(("source", "target"), pairs(MORE_PAIRS))
def test_the_same_bytes_as_dcp_for_many_more(
    rank_pool: Callable[[int], RankPool], roots: dict[Placed, Path], source: Placed, target: Placed
) -> None:
    check(rank_pool(target.world), roots[source], target)
