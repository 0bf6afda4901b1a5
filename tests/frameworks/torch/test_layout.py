"""What DTensors hold on each rank, against slices of the whole by numpy."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from reshard.errors import CaptureError
from reshard.frameworks.torch import TorchAdapter
from reshard.frameworks.torch.layout import Meshes
from reshard.geometry import Region
from reshard.state import model_key, slot_key
from tests.frameworks.torch.simulated import Coverage, distribute, fake_rank, make_mesh, numbered

KEY = model_key("w")


def sharded(tensor: torch.Tensor):
    return Meshes([tensor]).sharded(KEY, tensor, "w")


PAIRS = list(itertools.product([Replicate(), Shard(0), Shard(1), Shard(-1)], repeat=2))
PAIRS += [(_StridedShard(d, split_factor=2), Shard(d)) for d in (0, 1)]
PAIRS += [(_StridedShard(0, split_factor=2), p) for p in (Replicate(), Shard(1))]
PAIRS += [(p, _StridedShard(0, split_factor=2)) for p in (Replicate(), Shard(0), Shard(1))]
PAIRS += [(_StridedShard(0, split_factor=4), Shard(0)), (_StridedShard(0, split_factor=3), _StridedShard(1, split_factor=2))]


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (3, 1), (1, 2), (0, 4)], ids=str)
@pytest.mark.parametrize("placements", PAIRS, ids=str)
def test_every_pair_of_placements(shape, placements) -> None:
    whole = numbered(shape)
    coverage = Coverage(whole.numpy())
    layouts = set()
    for rank in range(6):
        with fake_rank(rank, 6):
            tensor = sharded(distribute(whole, make_mesh((2, 3), ("dp", "tp")), placements))
        coverage.add(tensor)
        layouts.add(tensor.layout)
        if tensor.layout is not None:
            region = tensor.layout.rank_region(rank, shape)
            assert [shard.region for shard in tensor.shards] == ([region] if not region.is_empty or 0 in shape else [])
    coverage.check()
    assert len(layouts) == 1


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("names", [("a", "b", "c"), None])
@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), Shard(1), Shard(2)),
        (Shard(0), Shard(0), Shard(0)),
        (Shard(2), Replicate(), Shard(0)),
        (_StridedShard(0, split_factor=4), _StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(0, split_factor=2), Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2), Shard(0)),
    ],
    ids=str,
)
def test_three_axes(size, names, placements) -> None:
    whole = numbered((size, 4, 5))
    coverage = Coverage(whole.numpy())
    for rank in range(8):
        with fake_rank(rank, 8):
            tensor = sharded(distribute(whole, make_mesh((2, 2, 2), names), placements))
        coverage.add(tensor)
        if size == 8:  # where `_StridedShard` doesn't divide evenly, torch fills it in an order that no layout says
            assert tensor.layout is not None
            assert tensor.layout.mesh.axes == (names or ("axis0", "axis1", "axis2"))
    coverage.check()


def test_the_order_of_fsdp_over_tensor_parallel() -> None:
    with fake_rank(1, 4):
        tensor = sharded(distribute(numbered((8, 2)), make_mesh((2, 2), ("dp", "tp")), (_StridedShard(0, split_factor=2), Shard(0))))
    assert tensor.layout is not None
    assert tensor.layout.split == ((1, 0), ())
    assert tensor.shards[0].region == Region((4, 0), (2, 2))


def test_interleaved_pieces_have_no_layout() -> None:
    with fake_rank(0, 2):
        tensor = sharded(distribute(numbered((8,)), make_mesh((2,), ("tp",)), (_StridedShard(0, split_factor=2),)))
    assert tensor.layout is None
    assert [shard.region for shard in tensor.shards] == [Region((0,), (2,)), Region((4,), (2,))]


def test_pieces_are_views_of_the_local_tensor() -> None:
    with fake_rank(1, 2):
        dtensor = distribute(numbered((8, 3)), make_mesh((2,), ("tp",)), (_StridedShard(0, split_factor=4),))
        tensor = sharded(dtensor)
        for shard in tensor.shards:
            shard.memory.write(Region((0, 0), shard.region.shape), np.full(shard.region.shape, shard.region.offset[0], np.float32))
        assert dtensor.to_local()[:, 0].tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("sizes", [(8, 6), (7, 4), (5, 3), (1, 1), (10, 10)], ids=str)
@pytest.mark.parametrize("mesh_shape", [(2, 2), (4, 2), (2, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("dimension", [0, 1])
def test_fully_shard_over_tensor_parallel_by_what_it_really_holds(sizes, mesh_shape, dimension) -> None:
    """FSDP2 cuts the tensor-parallel part; uneven sizes show whether that order was understood."""
    whole = numbered(sizes)
    ranks = mesh_shape[0] * mesh_shape[1]
    coverage = Coverage(whole.numpy())
    for rank in range(ranks):
        with fake_rank(rank, ranks):
            mesh = make_mesh(mesh_shape, ("dp", "tp"))
            module = nn.Linear(1, 1, bias=False)
            module.weight = nn.Parameter(distribute(whole, mesh["tp"], [Shard(dimension)]))
            fully_shard(module, mesh=mesh["dp"])
            tensor = TorchAdapter().capture(module, None, global_step=None).tensors[model_key("weight")]
        coverage.add(tensor)
        assert tensor.layout is not None
        assert tensor.layout.split == (((1, 0), ()) if dimension == 0 else ((0,), (1,)))
    coverage.check()
    assert coverage.holders.max() == 1


def test_fsdp2_order_where_the_placements_read_otherwise() -> None:
    """7 rows over tp 2 and dp 3: FSDP2 and `distribute_tensor` give some ranks different rows under the same placements."""
    whole = numbered((7, 2))
    managed, distributed = Coverage(whole.numpy()), Coverage(whole.numpy())
    differ = 0
    for rank in range(6):
        with fake_rank(rank, 6):
            mesh = make_mesh((3, 2), ("dp", "tp"))
            module = nn.Linear(1, 1, bias=False)
            module.weight = nn.Parameter(distribute(whole, mesh["tp"], [Shard(0)]))
            fully_shard(module, mesh=mesh["dp"])
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
            optimizer.state[module.weight]["momentum_buffer"] = module.weight.detach().clone()
            mine = TorchAdapter().capture(module, optimizer, global_step=None).tensors
            other = sharded(distribute(whole, mesh, module.weight.placements))
        assert mine[model_key("weight")].layout is not None
        assert other.layout is None
        managed.add(mine[model_key("weight")])
        distributed.add(other)
        slot = mine[slot_key("momentum_buffer", "weight")]
        regions = [shard.region for shard in mine[model_key("weight")].shards]
        assert [shard.region for shard in slot.shards] == regions
        differ += regions != [shard.region for shard in other.shards]
    managed.check()
    distributed.check()
    assert differ > 0


@pytest.mark.parametrize(
    ("sizes", "dimension"), [((8, 6), 0), ((16, 3), 0), ((40, 2), 0), ((6, 8), 1), ((3, 16), 1), ((2, 40), 1)], ids=str
)
@pytest.mark.parametrize("mesh_shape", [(2, 2), (3, 2), (2, 4)], ids=str)
def test_fully_shard_over_a_fused_projection_by_what_it_really_holds(sizes, dimension, mesh_shape) -> None:
    """Tensor parallelism takes a part of each of two matrices that lie one after the other; FSDP2 cuts what that leaves."""
    whole = numbered(sizes)
    ranks = mesh_shape[0] * mesh_shape[1]
    coverage = Coverage(whole.numpy())
    for rank in range(ranks):
        with fake_rank(rank, ranks):
            mesh = make_mesh(mesh_shape, ("dp", "tp"))
            module = nn.Linear(1, 1, bias=False)
            module.weight = nn.Parameter(distribute(whole, mesh["tp"], [_StridedShard(dimension, split_factor=2)]))
            fully_shard(module, mesh=mesh["dp"])
            coverage.add(TorchAdapter().capture(module, None, global_step=None).tensors[model_key("weight")])
    coverage.check()
    assert coverage.holders.max() == 1


@pytest.mark.parametrize("experts", [4, 6, 8])
@pytest.mark.parametrize("over_width", [Shard(1), _StridedShard(1, split_factor=2)], ids=str)
def test_stacked_experts_over_three_axes_by_what_they_really_hold(experts, over_width) -> None:
    """Experts over ep, their width over tp, FSDP2 over the ranks that have the same ones: 6 of them don't divide evenly."""
    whole = numbered((experts, 8, 2))
    coverage = Coverage(whole.numpy())
    for rank in range(8):
        with fake_rank(rank, 8):
            mesh = make_mesh((2, 2, 2), ("edp", "ep", "tp"))
            module = nn.Module()
            module.weight = nn.Parameter(distribute(whole, mesh["ep", "tp"], [Shard(0), over_width]))
            fully_shard(module, mesh=mesh["edp"])
            tensor = TorchAdapter().capture(module, None, global_step=None).tensors[model_key("weight")]
        coverage.add(tensor)
        if over_width == Shard(1):
            assert tensor.layout is not None
            assert tensor.layout.split == ((1, 0), (2,), ())
    coverage.check()
    assert coverage.holders.max() == 1


def test_hsdp() -> None:
    whole = numbered((5, 2))
    coverage = Coverage(whole.numpy())
    for rank in range(4):
        with fake_rank(rank, 4):
            module = nn.Linear(1, 1, bias=False)
            module.weight = nn.Parameter(whole.clone())
            fully_shard(module, mesh=make_mesh((2, 2), ("replicate", "shard")))
            tensor = TorchAdapter().capture(module, None, global_step=None).tensors[model_key("weight")]
        coverage.add(tensor)
        assert tensor.layout is not None
        assert tensor.layout.split == ((1,), ())
        assert tensor.layout.mesh.ranks == (0, 1, 2, 3)
    assert (coverage.holders == 2).all()


def test_a_tensor_on_a_slice_of_the_mesh_lies_on_the_whole() -> None:
    """FSDP2 shards what tensor parallelism leaves alone over dp only: each rank sees one slice of the mesh, and all give one layout."""
    layouts = set()
    for rank in range(4):
        with fake_rank(rank, 4):
            mesh = make_mesh((2, 2), ("dp", "tp"))
            module = nn.Sequential(OrderedDict(a=nn.Linear(4, 4, bias=False), norm=nn.LayerNorm(4)))
            module.a.weight = nn.Parameter(distribute(numbered((4, 4)), mesh["tp"], [Shard(0)]))
            module.register_buffer("count", torch.zeros(3))
            fully_shard(module, mesh=mesh["dp"])
            tensors = TorchAdapter().capture(module, None, global_step=None).tensors
        norm, count = tensors[model_key("norm.weight")], tensors[model_key("count")]
        layouts.add((norm.layout, count.layout))
        assert norm.shards[0].region == Region((2 * (rank // 2),), (2,))
    assert len(layouts) == 1
    norm, count = layouts.pop()
    assert (norm.mesh.axes, norm.mesh.ranks, norm.split) == (("dp", "tp"), (0, 1, 2, 3), ((0,),))
    assert count.split == ((),)


def test_meshes_over_the_same_ranks_are_each_home_to_their_slices() -> None:
    """Experts see the ranks with other axes than the rest of the model, some of which is on a slice of its own mesh."""
    layouts = set()
    for rank in range(8):
        with fake_rank(rank, 8):
            mesh, expert_mesh = make_mesh((4, 2), ("dp", "tp")), make_mesh((2, 2, 2), ("edp", "ep", "tp"))
            module = nn.Sequential(OrderedDict(a=nn.Linear(8, 4, bias=False), norm=nn.LayerNorm(8), experts=nn.Linear(1, 1, bias=False)))
            module.a.weight = nn.Parameter(distribute(numbered((4, 8)), mesh["tp"], [Shard(0)]))
            module.experts.weight = nn.Parameter(distribute(numbered((4, 6)), expert_mesh["ep", "tp"], [Shard(0), Shard(1)]))
            fully_shard(module.experts, mesh=expert_mesh["edp"])
            fully_shard(module, mesh=mesh["dp"])
            tensors = TorchAdapter().capture(module, None, global_step=None).tensors
        names = ("a.weight", "norm.weight", "experts.weight")
        layouts.add(tuple(tensors[model_key(name)].layout for name in names))
    assert len(layouts) == 1, "every rank gives one tensor the same layout"
    assert [layout.mesh.axes for layout in layouts.pop()] == [("dp", "tp"), ("dp", "tp"), ("edp", "ep", "tp")]


def test_pipeline_stages_have_meshes_of_their_own_ranks() -> None:
    for rank in range(4):
        with fake_rank(rank, 4):
            mesh = make_mesh((2, 2), ("pp", "tp"))
            module = nn.Linear(1, 1, bias=False)
            module.weight = nn.Parameter(distribute(numbered((4, 4)), mesh["tp"], [Shard(0)]))
            tensor = TorchAdapter().capture(module, None, global_step=None).tensors[model_key("weight")]
        assert tensor.layout is not None
        assert tensor.layout.mesh.ranks == ((0, 1) if rank < 2 else (2, 3))


def test_meshes_that_do_not_lie_inside_one_give_plain_tensors_no_layout() -> None:
    with fake_rank(0, 4):
        mesh = make_mesh((2, 2), ("a", "b"))
        one, other = distribute(numbered((4,)), mesh["a"], [Shard(0)]), distribute(numbered((4,)), mesh["b"], [Shard(0)])
        assert Meshes([one, other]).replicated(1) is None
        assert Meshes([one]).replicated(1) is not None


def test_without_dtensors_there_is_no_layout() -> None:
    with fake_rank(1, 2):
        tensor = sharded(numbered((2, 2)))
    assert tensor.layout is None
    assert [shard.region for shard in tensor.shards] == [Region((0, 0), (2, 2))]


def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    for rank in range(4):
        with fake_rank(rank, 4):
            from torch.distributed.device_mesh import DeviceMesh

            mesh = DeviceMesh("cpu", [2, 1], mesh_dim_names=("dp",))
            tensor = sharded(DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False))
        regions = {1: Region((2,), (2,)), 2: Region((0,), (2,))}
        assert tensor.layout is not None
        assert tensor.layout.mesh.ranks == (2, 1)
        assert [shard.region for shard in tensor.shards] == ([regions[rank]] if rank in regions else [])


def test_partial_is_an_error_that_names_the_tensor() -> None:
    with fake_rank(0, 2):
        mesh = make_mesh((2,), ("tp",))
        tensor = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
        with pytest.raises(CaptureError, match=r"(?s)Partial.*tensor: *w\b"):
            sharded(tensor)


def test_a_local_part_of_another_shape_is_an_error() -> None:
    """`from_local` takes an even split for granted: five and three rows become six or ten, and the ranks' shapes disagree."""
    with fake_rank(0, 2):
        mesh = make_mesh((2,), ("tp",))
        tensor = DTensor.from_local(torch.ones(5), mesh, [Shard(0)], run_check=False, shape=torch.Size([8]), stride=(1,))
        with pytest.raises(CaptureError, match=r"(?s)tensor: *w\n.*\(5,\).*\(4,\) of \(8,\)"):
            sharded(tensor)


def test_a_plain_slot_beside_a_dtensor_lies_like_it_or_is_an_error() -> None:
    with fake_rank(1, 2):
        mesh = make_mesh((2,), ("tp",))
        parameter = distribute(numbered((6, 2)), mesh, [Shard(0)])
        meshes = Meshes([parameter])
        alike = meshes.sharded(KEY, torch.zeros(3, 2), "m.w", like=parameter)
        assert (alike.global_shape, alike.shards[0].region) == ((6, 2), Region((3, 0), (3, 2)))
        scalar = meshes.sharded(KEY, torch.zeros(()), "step.w", like=parameter)
        assert scalar.layout is not None
        assert scalar.layout.split == ()
        with pytest.raises(CaptureError, match=r"(?s)can't be known.*m\.w"):
            meshes.sharded(KEY, torch.zeros(6, 1), "m.w", like=parameter)
