"""Ranks that fail, fail together."""

from __future__ import annotations

import pytest

from reshard.comm import Communicator
from reshard.comm.single import SingleProcess
from reshard.comm.together import from_first, together
from reshard.errors import CommunicationError, DataFileError, ReshardError
from reshard.testing import run_ranks, run_ranks_settled


def test_simulated_collectives() -> None:
    def work(comm: Communicator) -> tuple[list[bytes], bytes]:
        comm.barrier()
        if comm.rank == 1:
            comm.send(b"hello", 2)
        heard = comm.recv(1) if comm.rank == 2 else b""
        return comm.all_gather(bytes([comm.rank]) * comm.rank), comm.broadcast(b"from %d" % comm.rank, 2) + heard

    results = run_ranks(3, work)
    assert all(gathered == [b"", b"\1", b"\2\2"] for gathered, _ in results)
    assert [second for _, second in results] == [b"from 2", b"from 2", b"from 2hello"]


def test_a_rank_that_dies_wakes_the_others() -> None:
    def work(comm: Communicator) -> None:
        if comm.rank == 1:
            raise ValueError("dead")
        comm.barrier()

    outcomes = run_ranks_settled(3, work)
    assert isinstance(outcomes[1], ValueError)
    assert all(isinstance(outcomes[rank], CommunicationError) for rank in (0, 2))


def test_a_failure_anywhere_is_the_same_error_everywhere() -> None:
    def work(comm: Communicator) -> int:
        def local() -> int:
            if comm.rank in (1, 3):
                raise DataFileError("truncated", file=f"file-{comm.rank}", rank=comm.rank)
            return comm.rank

        return together(comm, local, what="nothing was loaded")

    outcomes = run_ranks_settled(4, work)
    assert {type(outcome) for outcome in outcomes} == {DataFileError}
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "file-1" in str(outcomes[0])
    assert "rank 1, and ranks 3 (2 of 4)" in str(outcomes[0])
    assert "nothing was loaded" in str(outcomes[0])


def test_an_unforeseen_error_reaches_every_rank_too() -> None:
    def work(comm: Communicator) -> None:
        together(comm, lambda: 1 // (comm.rank - 1), what="stop")

    outcomes = run_ranks_settled(2, work)
    assert all(isinstance(outcome, ReshardError) and "ZeroDivisionError" in str(outcome) for outcome in outcomes)


def test_only_the_first_rank_looks() -> None:
    looked = []

    def work(comm: Communicator) -> list[int]:
        return from_first(comm, lambda: looked.append(comm.rank) or [7], list[int], what="nothing")

    assert run_ranks(3, work) == [[7]] * 3
    assert looked == [0]


def test_the_first_rank_keeps_what_it_made() -> None:
    made = [7]
    found = run_ranks(2, lambda comm: from_first(comm, lambda: made, list[int], what="nothing"))
    assert found[0] is made
    assert found[1] == made


def test_alone_the_error_is_the_original() -> None:
    error = DataFileError("truncated", file="x", found=3)

    def fail() -> None:
        raise error

    with pytest.raises(DataFileError) as caught:
        together(SingleProcess(), fail, what="nothing")
    assert caught.value is error
