"""Random rules on both sides, random layouts of both jobs, against numpy: every byte must be right, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import reshard
from reshard.families import Rule, RuleMapping, concatenate, flatten, interleave, pad, stack, transpose
from reshard.geometry import Mesh
from reshard.planning.mapping.rules import Expression, Leaf
from reshard.state import HostMemory, Shard, ShardedTensor, model_key
from reshard.storage.memory import MemoryStorage
from reshard.testing import run_ranks, split, tensor_on_rank
from tests.mappings import evaluate

SHAPES = ((4, 6), (6, 4), (2, 12), (12,), (3, 4, 2), (1, 8))
WORLDS = (1, 1, 2, 3, 4)


@dataclass(frozen=True)
class Node:
    """An expression, and the shape of what it makes."""

    of: Expression
    shape: tuple[int, ...]


@st.composite
def rules(draw: st.DrawFn, atoms: Mapping[str, np.ndarray], side: str, *, pads: bool) -> tuple[Rule, ...]:
    """Rules that put all atoms into tensors of one side."""
    stacked = sorted({name.split(".")[0] for name in atoms if "." in name})
    nodes = [Node(Leaf(name), array.shape) for name, array in atoms.items() if "." not in name]
    for name in stacked:
        members = [array for own, array in atoms.items() if own.startswith(name + ".")]
        axis = draw(st.integers(0, members[0].ndim))
        shape = (*members[0].shape[:axis], len(members), *members[0].shape[axis:])
        nodes.append(Node(stack(name + ".{e}", "e", len(members), axis), shape))
    for _ in range(draw(st.integers(0, 5))):
        index = draw(st.integers(0, len(nodes) - 1))
        node = nodes.pop(index)
        action = draw(st.sampled_from(("join", "join", "transpose", "flatten", *(("pad",) if pads else ()))))
        axis = draw(st.integers(0, len(node.shape) - 1))
        if action == "join":
            mates = [other for other in nodes if _across(other.shape, axis) == _across(node.shape, axis)]
            if not mates:
                nodes.append(node)
                continue
            mate = draw(st.sampled_from(mates))
            nodes.remove(mate)
            extents = (node.shape[axis], mate.shape[axis])
            common = gcd(*extents)
            groups = draw(st.sampled_from([1, *(g for g in (2, 3, 4, common) if common % g == 0)]))
            made = interleave(node.of, mate.of, groups=groups, axis=axis, shares=extents)
            if groups == 1 and draw(st.booleans()):
                made = concatenate(node.of, mate.of, axis=axis, shares=extents)
            nodes.append(Node(made, (*node.shape[:axis], sum(extents), *node.shape[axis + 1 :])))
        elif action == "transpose":
            axes = draw(st.permutations(range(len(node.shape))))
            nodes.append(Node(transpose(node.of, axes), tuple(node.shape[d] for d in axes)))
        elif action == "flatten" and axis + 1 < len(node.shape):
            shape = (*node.shape[:axis], node.shape[axis] * node.shape[axis + 1], *node.shape[axis + 2 :])
            nodes.append(Node(flatten(node.of, node.shape[axis], axis), shape))
        elif action == "pad":
            extent = node.shape[axis]
            to = extent + draw(st.integers(1, 3))
            nodes.append(
                Node(pad(node.of, extent, to, axis, fill=draw(st.integers(-3, 3))), (*node.shape[:axis], to, *node.shape[axis + 1 :]))
            )
        else:
            nodes.append(node)
    return tuple(Rule(f"{side}{number}", node.of) for number, node in enumerate(nodes))


def _across(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    return (*shape[:axis], -1, *shape[axis + 1 :]) if axis < len(shape) else None


@st.composite
def placements(draw: st.DrawFn, arrays: Mapping[str, np.ndarray], world: int) -> list[dict[str, ShardedTensor]]:
    """What each rank of a job holds, blank; uneven and empty parts among it."""
    mesh = Mesh((world,), ("a",), tuple(range(world)))
    ranks: list[dict[str, ShardedTensor]] = [{} for _ in range(world)]
    for name, array in arrays.items():
        axis = draw(st.sampled_from([None, *range(array.ndim)]))
        layout = split(mesh, *[["a"] if d == axis else [] for d in range(array.ndim)])
        for rank in range(world):
            tensor = tensor_on_rank(model_key(name), array, layout, rank)
            assert tensor is not None  # every rank is on the mesh
            ranks[rank][name] = tensor
    return ranks


def blank(tensors: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    return {
        name: tensor._replace(
            shards=tuple(Shard(s.region, HostMemory(np.full(s.region.shape, -77, tensor.dtype.numpy))) for s in tensor.shards)
        )
        for name, tensor in tensors.items()
    }


@given(st.data())
def test_what_is_saved_under_random_rules_comes_back_under_others(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    atoms: dict[str, np.ndarray] = {}
    for number in range(count):
        shape = data.draw(st.sampled_from(SHAPES))
        names = [f"atom{number}"] if data.draw(st.booleans()) else [f"stack{number}.{e}" for e in range(data.draw(st.integers(1, 3)))]
        for name in names:
            base = 1000 * len(atoms) + 1
            atoms[name] = (base + np.arange(prod(shape))).reshape(shape).astype(np.float32)
    mine = data.draw(rules(atoms, "run", pads=False))
    theirs = data.draw(rules(atoms, "stored", pads=True))
    run = {rule.name: evaluate(rule.of, atoms, {}) for rule in mine}
    stored = {rule.name: evaluate(rule.of, atoms, {}) for rule in theirs}
    mapping = RuleMapping(run=mine, checkpoint=theirs)
    storage = MemoryStorage()
    world = data.draw(st.sampled_from(WORLDS))
    held = data.draw(placements(run, world))
    removes = data.draw(st.booleans())

    def save(comm: Any) -> None:
        reshard.save("/c", 1, model=held[comm.rank], communicator=comm, storage=storage, mapping=mapping, remove_redundancy=removes)

    run_ranks(world, save)
    checkpoint = reshard.Checkpoint("/c", storage)
    assert set(checkpoint) == set(stored)
    for name, array in stored.items():
        np.testing.assert_array_equal(checkpoint[name][...], array, name)

    world = data.draw(st.sampled_from(WORLDS))
    held = data.draw(placements(run, world))
    wanted = [blank(tensors) for tensors in held]
    balanced = data.draw(st.booleans())

    def load(comm: Any) -> reshard.RestoreReport:
        return reshard.load("/c", model=wanted[comm.rank], communicator=comm, storage=storage, mapping=mapping, balanced=balanced)

    report = run_ranks(world, load)[0]
    assert not report.missing
    assert not report.unexpected
    for rank in range(world):
        for name, tensor in wanted[rank].items():
            for got, expected in zip(tensor.shards, held[rank][name].shards, strict=True):
                np.testing.assert_array_equal(got.memory.read(), expected.memory.read(), f"{name} on rank {rank}")
    view = reshard.Checkpoint("/c", storage, mapping=mapping)
    for name, array in run.items():
        np.testing.assert_array_equal(view[name][...], array, name)
        np.testing.assert_array_equal(view[name][1:], array[1:], name)
