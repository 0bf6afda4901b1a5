"""Checkpoints of the published implementation, loaded under other strategies: every rank's slices equal the expected arrays'."""

from __future__ import annotations

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.format.names import tensor_name
from reshard.geometry import Layout, Mesh
from reshard.state import Kind, TensorKey
from reshard.testing import differences, run_ranks, split, state_on_rank
from tests import golden

# dp, tp, pp, and whether the optimizer (and with it every parameter) is sharded over dp.
STRATEGIES = [(1, 1, 1, False), (4, 1, 1, False), (1, 4, 1, False), (2, 2, 1, False), (1, 1, 4, False), (2, 2, 2, False), (2, 2, 2, True)]


def layout(name: str, dimensions: int, dp: int, tp: int, pp: int, sharded: bool) -> Layout:
    """How the published Qwen3 lies: dimension 0 or 1 over tp; a sharded optimizer splits dimension 0 over dp too."""
    parameter = name.split(".", 1)[1] if name.startswith(("adam_m.", "adam_v.")) else name
    layer = int(parameter.split(".")[2]) if parameter.startswith("decoder.layers.") else None
    stage = min(layer, pp - 1) if layer is not None else 0 if parameter.startswith("embedding") else pp - 1
    mesh = Mesh((dp, 1, tp), ("a", "b", "c"), tuple(range(stage * dp * tp, (stage + 1) * dp * tp)))
    axes: list[list[str]] = [[] for _ in range(dimensions)]
    if parameter.endswith(("linear_proj.weight", "linear_fc2.weight")):
        axes[1].append("c")
    elif dimensions == 2:
        axes[0].append("c")
    if sharded and dimensions and name != "global_step":
        axes[0].append("a")
    return split(mesh, *axes)


@pytest.mark.parametrize("case", golden.CASES)
def test_every_rank_gets_its_slices(case: str) -> None:
    root = golden.root(case)
    checkpoint = reshard.Checkpoint(root)
    expected = golden.expected(case)
    arrays: dict[TensorKey, np.ndarray] = {}
    for name in checkpoint:
        view = checkpoint[name]
        arrays[view.key] = expected[name].astype(view.read().dtype)
    assert {tensor_name(key) for key in arrays} == set(expected)
    for dp, tp, pp, sharded in STRATEGIES:
        placed = {key: layout(tensor_name(key), array.ndim, dp, tp, pp, sharded) for key, array in arrays.items()}

        def load(comm: Communicator, placed: dict[TensorKey, Layout] = placed) -> list[str]:
            state = state_on_rank(arrays, placed, comm.rank, blank=True)
            model = {tensor_name(key): tensor for key, tensor in state.tensors.items() if key.kind is Kind.MODEL}
            optimizer = {tensor_name(key): tensor for key, tensor in state.tensors.items() if key.kind is Kind.OPTIMIZER}
            report = reshard.load(root, communicator=comm, model=model, optimizer=optimizer)
            assert not report.missing
            assert not report.unexpected
            return differences(arrays, state)

        assert run_ranks(dp * tp * pp, load) == [[]] * (dp * tp * pp), f"dp{dp} tp{tp} pp{pp} sharded {sharded}"
