"""All ranks stop after the same step, whoever was told to, wherever they are; or none saves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import reshard
from reshard.comm import Communicator
from reshard.comm.single import LocalBoard
from reshard.errors import CommunicationError, NoAgreementError, UsageError
from reshard.stopping.agreement import Agreement
from reshard.stopping.limits import Limits
from reshard.stopping.notices import Wish
from reshard.testing import run_ranks, run_ranks_settled

URGENT = Wish("SIGTERM", urgent=True)
CALM = Wish("time limit", urgent=False)


class Ranks:
    """The agreements of some ranks over one board, each looked at by hand, with a clock that stands still."""

    def __init__(self, world_size: int, timeout: float = 12.0) -> None:
        self.now = 0.0
        self.notices: dict[tuple[str, int | None], bytes] = {}
        limits = Limits(timeout, world_size)
        self.each = [Agreement(LocalBoard(rank, self.notices), rank, limits, lambda: self.now) for rank in range(world_size)]
        self.answers: dict[int, bool | BaseException] = {}
        self.dead: set[int] = set()

    def look(self, *ranks: int, times: int = 3) -> None:
        for _ in range(times):
            for rank in ranks or range(len(self.each)):
                self.each[rank].look()

    def step_done(self, rank: int, step: int) -> threading.Thread:
        """A rank comes to the end of a step, and may have to wait there."""

        def work() -> None:
            try:
                self.answers[rank] = self.each[rank].step_done(step)
            except NoAgreementError as error:
                self.answers[rank] = error

        self.answers.pop(rank, None)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        turn: Any = self.each[rank]._turn
        deadline = time.monotonic() + 30
        while thread.is_alive() and not turn._waiters:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return thread

    def settled(self, *threads: threading.Thread) -> dict[int, bool | BaseException]:
        """What the ranks that wait are told in the end, while those that live look on."""
        deadline = time.monotonic() + 30
        while any(thread.is_alive() for thread in threads):
            assert time.monotonic() < deadline
            self.look(*(rank for rank in range(len(self.each)) if rank not in self.dead))
            threads[0].join(0.01)
        return self.answers


def test_who_is_behind_comes_up_to_who_is_ahead() -> None:
    ranks = Ranks(3)
    for rank, step in ((0, 4), (1, 5), (2, 4)):
        ranks.step_done(rank, step)
    assert ranks.answers == {0: False, 1: False, 2: False}
    ranks.each[2].want(URGENT)
    ranks.look()
    # Rank 1 is in step 6: the others may not stop after 5.
    for rank in (0, 2):
        assert not ranks.step_done(rank, 5).is_alive()
    assert ranks.answers == {0: False, 1: False, 2: False}
    threads = [ranks.step_done(rank, 6) for rank in range(3)]
    assert all(thread.is_alive() for thread in threads), "none goes on before all are there"
    ranks.look()
    assert ranks.settled(*threads) == {0: True, 1: True, 2: True}


def test_a_rank_that_is_held_goes_on_when_another_needs_it() -> None:
    ranks = Ranks(2)
    ranks.step_done(0, 7)
    ranks.each[0].want(URGENT)
    ranks.look(0)
    held = ranks.step_done(0, 8)
    assert held.is_alive(), "it doesn't know yet where rank 1 is"
    # Rank 1 has not heard of it, and is in step 9 before it looks: that step needs rank 0.
    ranks.step_done(1, 8)
    ranks.look()
    assert ranks.settled(held) == {0: False, 1: False}
    threads = [ranks.step_done(rank, 9) for rank in range(2)]
    ranks.look()
    assert ranks.settled(*threads) == {0: True, 1: True}


def test_a_wish_in_the_first_step() -> None:
    ranks = Ranks(2)
    ranks.each[1].want(URGENT)
    ranks.look()
    threads = [ranks.step_done(rank, 1) for rank in range(2)]
    ranks.look()
    assert ranks.settled(*threads) == {0: True, 1: True}


def test_steps_that_are_counted_in_strides() -> None:
    ranks = Ranks(2)
    for rank in range(2):
        ranks.step_done(rank, 10)
    ranks.each[0].want(CALM)
    ranks.look()
    threads = [ranks.step_done(rank, 20) for rank in range(2)]
    ranks.look()
    assert ranks.settled(*threads) == {0: True, 1: True}


def test_ranks_that_count_differently_do_not_save() -> None:
    ranks = Ranks(2)
    for rank in range(2):
        ranks.step_done(rank, 10)
    ranks.each[0].want(URGENT)
    ranks.look()
    threads = [ranks.step_done(0, 11), ranks.step_done(1, 12)]
    ranks.look()
    answers = ranks.settled(*threads)
    assert all("after different steps: 11, 12" in str(answer) for answer in answers.values())


def test_a_rank_that_never_says_where_it_is() -> None:
    ranks = Ranks(3)
    for rank in range(3):
        ranks.step_done(rank, 4)
    ranks.each[0].want(URGENT)
    ranks.dead = {1}
    ranks.look(0, 2)
    threads = [ranks.step_done(rank, 5) for rank in (0, 2)]
    ranks.now = 3.9
    ranks.look(0, 2)
    assert all(thread.is_alive() for thread in threads)
    ranks.now = 4.1
    ranks.look(0, 2)
    answers = ranks.settled(*threads)
    assert all(isinstance(answers[rank], NoAgreementError) for rank in (0, 2))
    assert "rank 1 did not say within 4 s in which step it is" in str(answers[2])
    # When it comes after all, it hears so too.
    ranks.dead = set()
    ranks.look(1)
    assert isinstance(ranks.settled(ranks.step_done(1, 5))[1], NoAgreementError)


@pytest.mark.parametrize(("wish", "limit"), [(URGENT, 12.0), (CALM, 1800.0)])
def test_a_rank_that_never_comes_to_the_step(wish: Wish, limit: float) -> None:
    ranks = Ranks(3)
    for rank in range(3):
        ranks.step_done(rank, 4)
    ranks.each[0].want(wish)
    ranks.look()
    threads = [ranks.step_done(rank, 5) for rank in (0, 1)]
    ranks.now = limit - 0.1
    ranks.look()
    assert all(thread.is_alive() for thread in threads)
    ranks.now = limit + 0.1
    ranks.look()
    answers = ranks.settled(*threads)
    assert "rank 2 did not come to the end of step 5" in str(answers[0])
    assert isinstance(answers[1], NoAgreementError)


def test_a_signal_shortens_the_patience_of_a_time_limit() -> None:
    ranks = Ranks(2)
    for rank in range(2):
        ranks.step_done(rank, 4)
    ranks.each[0].want(CALM)
    ranks.look()
    thread = ranks.step_done(0, 5)
    ranks.now = 100.0
    ranks.look()
    assert thread.is_alive()
    ranks.each[1].want(URGENT)
    ranks.look()
    ranks.now = 111.0
    ranks.look()
    assert thread.is_alive()
    ranks.now = 112.5
    ranks.look()
    assert isinstance(ranks.settled(thread)[0], NoAgreementError)


def test_rank_0_is_dead() -> None:
    ranks = Ranks(2)
    ranks.dead = {0}
    ranks.step_done(1, 4)
    ranks.each[1].want(URGENT)
    ranks.look(1)
    thread = ranks.step_done(1, 5)
    ranks.now = 14.9
    ranks.look(1)
    assert thread.is_alive()
    ranks.now = 15.1
    ranks.look(1)
    assert "rank 0 decided nothing" in str(ranks.settled(thread)[1])


def test_the_board_is_gone() -> None:
    ranks = Ranks(2)
    ranks.step_done(1, 4)
    ranks.each[1].give_up(CommunicationError("the job's store can't be reached"))
    ranks.step_done(1, 5)
    assert ranks.answers[1] is False, "nobody wanted it to stop"
    ranks.each[1].want(URGENT)
    assert "store can't be reached" in str(ranks.settled(ranks.step_done(1, 6))[1])


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_whose_loop_is_over_holds_nobody(leaving: int) -> None:
    ranks = Ranks(2)
    for rank in range(2):
        ranks.step_done(rank, 4)
    other = 1 - leaving
    ranks.each[leaving].leave()
    ranks.dead = {leaving}
    ranks.each[other].want(URGENT)
    ranks.look(other)
    thread = ranks.step_done(other, 5)
    ranks.look(other)
    assert ranks.settled(thread)[other] is False
    assert not ranks.step_done(other, 6).is_alive()
    assert ranks.answers[other] is False


def loop(comm: Communicator, before: Callable[[reshard.GracefulStop, int], None], steps: int = 2000) -> int | None:
    """A training loop whose ranks need each other in every step; the step after which it was stopped."""
    with reshard.GracefulStop(comm, signals=()) as stop:
        for step in range(1, steps + 1):
            before(stop, step)
            comm.barrier()
            if stop.should_stop(step):
                comm.barrier()  # a save would begin here
                return step
            time.sleep(0.001 * (comm.rank % 3))
    return None


@pytest.mark.parametrize("who", [{0}, {2}, {0, 1, 2, 3}])
def test_a_wish_at_one_rank_or_at_all_stops_all_after_the_same_step(who: set[int]) -> None:
    def work(comm: Communicator) -> int | None:
        def before(stop: reshard.GracefulStop, step: int) -> None:
            if comm.rank in who and step >= 5:  # again and again
                stop.request("enough", urgent=True)

        return loop(comm, before)

    steps = run_ranks(4, work)
    assert len(set(steps)) == 1
    assert steps[0] is not None
    assert steps[0] >= 5


def test_each_loop_of_a_job_has_its_own_agreement() -> None:
    def work(comm: Communicator) -> list[int | None]:
        first = loop(comm, lambda stop, step: stop.request("enough") if step == 3 and comm.rank == 1 else None)
        second = loop(comm, lambda stop, step: None, steps=4)
        third = loop(comm, lambda stop, step: stop.request("enough") if step == 2 else None)
        return [first, second, third]

    found = run_ranks(2, work)
    assert found[0] == found[1]
    first, second, third = found[0]
    assert first is not None
    assert second is None
    assert third is not None


def test_a_time_limit_stops_all() -> None:
    def work(comm: Communicator) -> tuple[int, str | None]:
        with reshard.GracefulStop(comm, after_minutes=0.005, signals=()) as stop:
            step = 0
            while True:
                step += 1
                comm.barrier()
                time.sleep(0.01)
                if stop.should_stop(step):
                    return step, stop.reason

    found = run_ranks(3, work)
    assert set(found) == {(found[0][0], "time limit")}


def test_a_rank_that_hangs_lets_the_others_go_without_a_save() -> None:
    release = threading.Event()

    def work(comm: Communicator) -> str:
        with reshard.GracefulStop(comm, timeout=5, signals=()) as stop:
            for step in range(1, 1000):
                if comm.rank == 1 and step == 3:
                    stop.request("enough", urgent=True)
                    release.wait(60)
                try:
                    if stop.should_stop(step):
                        return "saves"
                except NoAgreementError as error:
                    if comm.rank != 1:
                        release.set()
                    return str(error)
                time.sleep(0.01)
        return "was never told"

    assert all("rank 1 did not come to the end of step" in text for text in run_ranks(3, work))


def test_what_can_not_be() -> None:
    for arguments in ({"after_minutes": 0}, {"timeout": -1}):
        with pytest.raises(UsageError, match=next(iter(arguments))):
            reshard.GracefulStop(**arguments)
    with pytest.raises(UsageError, match="entered"):
        reshard.GracefulStop().should_stop(1)

    def work(comm: Communicator) -> None:
        with reshard.GracefulStop(comm):
            pass

    outcomes = run_ranks_settled(2, work)
    assert all(isinstance(outcome, UsageError) and "main thread" in str(outcome) for outcome in outcomes)
