"""Every strategy to every strategy: each rank's memory must be the numpy oracle's slice of the whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

import reshard
from reshard.comm import Communicator
from reshard.format.names import tensor_name
from reshard.state import Kind, State
from reshard.testing import differences, run_ranks, state_on_rank
from tests.strategies import MOSTLY_SWEPT, STRATEGIES, Strategy, arrays, layouts

ARRAYS = arrays()


def parts(state: State, kind: Kind) -> dict:
    return {tensor_name(key): tensor for key, tensor in state.tensors.items() if key.kind is kind}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[Strategy, Path]:
    """One checkpoint per strategy."""
    found = {}
    for strategy in STRATEGIES:
        root = tmp_path_factory.mktemp("root")
        placed = layouts(strategy)

        def save(comm: Communicator, root: Path = root, placed: dict = placed) -> None:
            state = state_on_rank(ARRAYS, placed, comm.rank)
            with reshard.CheckpointManager(root, communicator=comm) as manager:
                manager.save(12, model=parts(state, Kind.MODEL), optimizer=parts(state, Kind.OPTIMIZER))

        run_ranks(strategy.world_size, save)
        found[strategy] = root
    return found


@pytest.mark.parametrize("target", MOSTLY_SWEPT)
def test_every_rank_holds_the_oracles_slices(target: Strategy, roots: dict[Strategy, Path]) -> None:
    placed = layouts(target)
    for source in STRATEGIES:

        def load(comm: Communicator, root: Path = roots[source]) -> list[str]:
            state = state_on_rank(ARRAYS, placed, comm.rank, blank=True)
            report = reshard.load(root, communicator=comm, model=parts(state, Kind.MODEL), optimizer=parts(state, Kind.OPTIMIZER))
            assert len(report.restored) == len(ARRAYS)
            assert report.iteration == 12
            assert report.bytes_read >= report.bytes_needed > 0
            return differences(ARRAYS, state)

        assert run_ranks(target.world_size, load) == [[]] * target.world_size, f"{source} to {target}"
