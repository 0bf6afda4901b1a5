"""Ranks of one machine over sockets of their own: what they tell each other, who joins, and ranks that go, are late or interrupted."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from reshard.comm import Communicator, meeting
from reshard.comm import star as module
from reshard.comm.star import Star
from reshard.errors import CommunicationError
from reshard.testing import run_ranks

# Far beyond what a test may take: who ends earlier has heard of the loss, not waited for the limit.
LONG = 3000.0

SIZES = (0, 1, 300_000, 5, 3_000_000)


def data(of: int, length: int) -> bytes:
    return bytes([of + 1]) * length


def run(world_size: int, work: Callable[[Star], Any], timeout: float = LONG) -> list[Any]:
    """Each rank in a thread: what the work gives, or the error's text."""

    def rank(comm: Communicator) -> Any:
        star = Star.connect(comm, timeout)
        assert star is not None
        try:
            return work(star)
        except CommunicationError as error:
            return str(error)
        finally:
            star.close()

    return run_ranks(world_size, rank)


@pytest.mark.parametrize("world_size", [2, 3, 5, 17, 64])
def test_all_hear_what_all_tell(world_size: int) -> None:
    def work(star: Star) -> None:
        for turn in range(4):
            lengths = [SIZES[(rank + turn) % len(SIZES)] // (1 if world_size < 9 else 100) for rank in range(world_size)]
            mine = data(star.rank, lengths[star.rank])
            assert star.all_gather(mine) == [data(rank, length) for rank, length in enumerate(lengths)]
            star.barrier()
            for source in {0, 1, world_size - 1}:
                assert star.broadcast(mine, source) == data(source, lengths[source])

    assert run(world_size, work) == [None] * world_size


@pytest.mark.parametrize("source", [0, 2])
def test_nobody_leaves_a_barrier_before_all_have_come(source: int) -> None:
    come: list[int] = []

    def work(star: Star) -> int:
        time.sleep(0.05 * ((star.rank - source) % 3))
        come.append(star.rank)
        star.barrier()
        return len(come)

    assert run(3, work) == [3] * 3


def opened() -> set[str]:
    """What this process has open."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # what lists them is one of them
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    return links


def refuse(*_: object) -> Any:
    raise OSError(24, "too many open files")


def fails_on(rank: int, work: Callable[..., Any]) -> Callable[..., Any]:
    def call(first: Any, number: int) -> Any:
        return refuse() if number == rank else work(first, number)

    return call


@pytest.mark.parametrize("way", ["other machines", "no machine", "cannot listen", "cannot call", "cannot accept", "too many"])
def test_where_one_cannot_join_nobody_does(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    here = threading.local()
    ways: dict[str, tuple[str, Any]] = {
        "other machines": ("find_host", lambda _: f"machine {here.rank // 2}"),
        "no machine": ("find_host", lambda _: None),
        "cannot listen": ("_listen", refuse),
        "cannot call": ("_call", fails_on(2, meeting._call)),
        "cannot accept": ("_accept", refuse),
        "too many": ("_MOST_RANKS", 2),
    }
    monkeypatch.setattr(module if way == "too many" else meeting, *ways[way])

    def work(comm: Communicator) -> tuple[Star | None, list[bytes]]:
        here.rank = comm.rank
        return Star.connect(comm, LONG), comm.all_gather(b"and on")

    before = opened()
    assert run_ranks(3, work) == [(None, [b"and on"] * 3)] * 3
    assert opened() <= before


@pytest.mark.parametrize("says", [b"", b"short", b"x" * 36], ids=["nothing", "too little", "another key"])
@pytest.mark.parametrize("goes", [True, False])
def test_strangers_are_sent_away(monkeypatch: pytest.MonkeyPatch, says: bytes, goes: bool) -> None:
    listen, strangers = meeting._listen, []

    def listen_and_be_called(name: str, backlog: int) -> socket.socket:
        listener = listen(name, backlog)
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect(name)
        stranger.sendall(says)
        if goes:
            stranger.close()
        strangers.append(stranger)
        return listener

    monkeypatch.setattr(meeting, "_listen", listen_and_be_called)
    assert run(3, lambda star: star.all_gather(bytes([star.rank]))) == [[b"\0", b"\1", b"\2"]] * 3
    for stranger in strangers:
        if not goes:
            stranger.settimeout(10)
            with suppress(ConnectionResetError):  # what it said wasn't read to its end
                assert stranger.recv(1) == b""
            stranger.close()


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("collective", ["all_gather", "broadcast", "barrier"])
def test_who_is_gone_is_named_at_once(gone: int, collective: str) -> None:
    """Also while another is late."""

    def work(star: Star) -> str:
        if star.rank == gone:
            return "gone"
        if star.rank == (gone + 1) % 3 and star.rank:
            time.sleep(0.2)
        {
            "all_gather": lambda: star.all_gather(b"x"),
            "broadcast": lambda: star.broadcast(b"x", gone),
            "barrier": star.barrier,
        }[collective]()
        return "not missed"

    words = run(3, work)
    for rank in set(range(3)) - {gone}:
        assert f"rank:     {rank}" in words[rank]
        assert f"found:    rank {gone}: its connection has ended" in words[rank]
        assert "next:" in words[rank]


def test_a_rank_that_goes_after_it_has_told_is_missed_while_others_are_awaited() -> None:
    is_missed = threading.Event()

    def work(star: Star) -> list[bytes] | str:
        if star.rank == 1:
            star._lines[0].sendall(module._message(b"x"))
            return "gone"
        if star.rank == 2:
            is_missed.wait(60)
        try:
            return star.all_gather(b"x")
        finally:
            is_missed.set()

    words = run(3, work)
    assert "found:    rank 1: its connection has ended" in words[0]
    assert "found:    rank 1: its connection has ended" in words[2]


def signalling(monkeypatch: pytest.MonkeyPatch, rank: int) -> threading.Event:
    """Set when a rank has told something."""
    told, tell = threading.Event(), Star._tell

    def telling(star: Star, *arguments: Any) -> None:
        tell(star, *arguments)
        if star.rank == rank:
            told.set()

    monkeypatch.setattr(Star, "_tell", telling)
    return told


@pytest.mark.parametrize("first", ["rank 0", "rank 2"])
def test_who_is_late_is_named(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Whichever of the others came first: rank 2 waits for rank 0 to say who it is, if that comes in time for it."""
    monkeypatch.setattr(module, "_GRACE", 1000.0)
    has_come, over = signalling(monkeypatch, 2), threading.Event()

    def work(star: Star) -> None:
        if star.rank == 1:
            over.wait(60)
            return
        if first == "rank 2" and star.rank == 0:
            has_come.wait(60)
        try:
            star.all_gather(b"x")
        finally:
            if star.rank == 0:
                over.set()

    words = run(3, work, timeout=1)
    # Where rank 2 hasn't even begun when rank 0 gives up, it hears who is late, and may be late itself.
    late = "rank 1" if first == "rank 2" else "ranks? 1(, 2)?"
    for rank in (0, 2):
        assert re.search(f"found:    {late}: no answer within 1 s", words[rank])


def test_who_waits_for_rank_0_beyond_its_limit_says_so() -> None:
    over, gone = threading.Event(), threading.Event()

    def work(star: Star) -> None:
        if star.rank == 1:
            over.wait(60)
        elif star.rank == 0:
            gone.wait(60)
            star._limit = 60
            try:
                star.all_gather(b"x")
            finally:
                over.set()
        else:
            try:
                star.all_gather(b"x")
            finally:
                star.close()
                gone.set()

    words = run(3, work, timeout=1)
    assert "found:    rank 2: its connection has ended; rank 1 had not come either" in words[0]
    assert "found:    rank 0: no answer within 1 s, nor of a rank that it waits for" in words[2]


def test_who_has_come_is_not_late_however_late_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 was stopped, and goes on when its limit is over."""
    has_come = signalling(monkeypatch, 1)

    def work(star: Star) -> list[bytes]:
        if star.rank == 0:
            has_come.wait(60)
            star._limit = 0.0
        return star.all_gather(bytes([star.rank]))

    assert run(2, work) == [[b"\0", b"\1"]] * 2


def test_who_takes_nothing_is_late_and_no_other_is_kept_waiting() -> None:
    """Nor told that rank 0 had ended: that one tells all of a long message to whoever takes it."""
    over = threading.Event()

    def work(star: Star) -> bytes:
        if star.rank == 1:
            over.wait(60)
            return b"took nothing"
        star._limit = 60 if star.rank else 3
        try:
            told = star.broadcast(b"x" * 2_000_000)
            star.barrier()
        finally:
            if star.rank == 0:
                over.set()
        return told

    words = run(4, work, timeout=1)
    for rank in (0, 2, 3):
        assert "found:    rank 1: no answer within 1 s" in words[rank]


def test_who_has_much_to_hear_hears_why_it_is_the_last() -> None:
    """The system calls a connection full that has room for so short a message."""
    lines, others = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    star = Star(0, 3, {1: lines[0], 2: lines[1]}, LONG)
    long = b"x" * 80_000
    assert star.broadcast(long) == long
    others[0].close()
    with pytest.raises(CommunicationError, match="rank 1: its connection has ended"):
        star.barrier()
    others[1].settimeout(10)
    with others[1].makefile("rb") as heard:
        assert heard.read(len(module._message(long))) == module._message(long)
        assert b"rank 1: its connection has ended" in heard.read()
    others[1].close()


@pytest.mark.parametrize("way", ["says nothing", "takes nothing"])
def test_the_limit_is_one_for_all_of_a_collective(way: str) -> None:
    """A rank that stops within a message holds nobody for longer, however much has come of it."""
    here, there = socket.socketpair()
    star = Star(0, 2, {1: here}, 0.5)
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            there.sendall(module._HEAD.pack(module._ANSWER, 1000 if way == "says nothing" else 0))
            while not stop.wait(0.1) and way == "says nothing":
                there.sendall(b"x")

    other = threading.Thread(target=drip, daemon=True)
    other.start()
    began = time.monotonic()
    try:
        with pytest.raises(CommunicationError, match=r"rank 1: no answer within 0\.5 s"):
            star.all_gather(b"x" * (5_000_000 if way == "takes nothing" else 1))
    finally:
        took = time.monotonic() - began
        stop.set()
        other.join(60)
        there.close()
    # All that it would say takes 100 s.
    assert took < 60, "the limit began anew with every byte"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("way", ["_exactly", "_tell"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(1, 5))
def test_an_interrupt_breaks_it_off_for_all_and_for_good(
    monkeypatch: pytest.MonkeyPatch, victim: int, way: str, after: bool, call: int
) -> None:
    """Before or after the k-th thing that it says or hears: nobody takes what was meant for another collective."""
    here, original = threading.local(), getattr(Star, way)

    def interrupted(star: Star, *arguments: Any) -> Any:
        here.calls = getattr(here, "calls", 0) + 1
        strikes = star.rank == victim and here.calls == call
        if strikes and not after:
            raise KeyboardInterrupt
        result = original(star, *arguments)
        if strikes:
            raise KeyboardInterrupt
        return result

    def work(star: Star) -> list[list[bytes]]:
        heard: list[list[bytes]] = []
        expected = pytest.raises(KeyboardInterrupt) if star.rank == victim else pytest.raises(CommunicationError, match=f"rank {victim}")
        with expected:
            heard.extend(star.all_gather(bytes([number]) * 8_000) for number in range(5))
        for collective in (star.barrier, lambda: star.broadcast(b"")):
            with pytest.raises(CommunicationError, match=f"an earlier one failed: rank {victim}"):
                collective()
        return heard

    monkeypatch.setattr(Star, way, interrupted)
    for heard in run(3, work):
        assert len(heard) < 5
        assert heard == [[bytes([number]) * 8_000] * 3 for number in range(len(heard))]


def test_a_rank_s_own_mistake_is_told_as_such() -> None:
    text: Any = "no bytes"

    def work(star: Star) -> str:
        with pytest.raises(CommunicationError, match=r"found: +rank 3\n +expected: +one of 3"):
            star.broadcast(b"", 3)
        if star.rank == 0:
            with pytest.raises(TypeError):
                star._gather("gather", text)
            return "told"
        star.all_gather(b"")
        return "not told"

    words = run(3, work)
    assert words[0] == "told"
    for rank in (1, 2):
        assert "found:    rank 0: TypeError" in words[rank]


def test_memory_that_changes_or_has_wide_items_is_told_as_bytes() -> None:
    wide: Any = memoryview(np.arange(3))

    def work(star: Star) -> None:
        mine = bytearray(b"first")
        heard, told = star.all_gather(mine), star.broadcast(mine, star.rank and 0)
        mine[:] = b"other"
        assert heard == [b"first"] * 3
        assert told == b"first"
        assert star.all_gather(wide) == [np.arange(3).tobytes()] * 3

    assert run(3, work) == [None] * 3


def test_one_that_is_closed_says_so() -> None:
    lines = socket.socketpair()
    star = Star(1, 2, {0: lines[0]}, LONG)
    star.close()
    with pytest.raises(CommunicationError, match=r"found: +this one is closed"):
        star.barrier()
    lines[1].close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["before", "while it waits", "between shutdown and close"])
def test_one_that_another_thread_closes_within_a_collective_blames_nobody(monkeypatch: pytest.MonkeyPatch, rank: int, when: str) -> None:
    here, there = socket.socketpair()
    star = Star(rank, 2, {1 - rank: here}, LONG)
    waits, is_over = threading.Event(), threading.Event()
    wait, close = Star._wait, here.close

    def waiting(*arguments: Any) -> Any:
        waits.set()
        if when == "before":
            closing.join()
        return wait(*arguments)

    class Waiting:
        def poll(self, limit: float) -> Any:
            waits.set()
            if when == "before":
                closing.join()
            return poll.poll(limit)

    class Held:
        """Its end is seen before it is closed."""

        def close(self) -> None:
            if threading.current_thread() is closing:
                is_over.wait(60)
            close()

        def __getattr__(self, name: str) -> Any:
            return getattr(here, name)

    def closes() -> None:
        waits.wait(60)
        star.close()

    poll: Any = star._poll
    monkeypatch.setattr(star, "_poll", Waiting())
    monkeypatch.setattr(Star, "_wait", waiting)
    if when == "between shutdown and close":
        held: Any = Held()
        star._lines[1 - rank] = held
    closing = threading.Thread(target=closes, daemon=True)
    closing.start()
    try:
        with pytest.raises(CommunicationError, match="this one was closed meanwhile"):
            star.barrier()
    finally:
        is_over.set()
        closing.join(60)
        there.close()


def test_one_that_is_closed_within_a_collective_has_no_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections may be other files by then."""
    lines = socket.socketpair()
    star = Star(0, 2, {1: lines[0]}, LONG)
    tell = star._tell

    def tell_and_close(*arguments: Any) -> None:
        tell(*arguments)
        star.close()

    monkeypatch.setattr(star, "_tell", tell_and_close)
    lines[1].sendall(module._message(b"there"))
    assert star.all_gather(b"here") == [b"here", b"there"]
    with pytest.raises(CommunicationError, match=r"found: +this one is closed"):
        star.barrier()
    lines[1].close()


def test_what_is_half_told_is_never_made_whole_by_why_it_broke_off() -> None:
    """Rank 0 is interrupted within a message: what it says then isn't taken for its end."""
    head = module._HEAD.pack(module._ANSWER, 40)

    def work(star: Star) -> str:
        if star.rank:
            return star.broadcast(b"").decode()
        half = star._lines[1]

        class Half:
            def send(self, _: bytes, flags: int) -> None:
                half.send(head, flags)
                raise KeyboardInterrupt

            def __getattr__(self, name: str) -> Any:
                return getattr(half, name)

        lines: dict[int, Any] = star._lines
        lines[1] = Half()
        with pytest.raises(KeyboardInterrupt):
            star.broadcast(b"x" * 40)
        star._lines[1] = half
        return "interrupted"

    words = run(3, work)
    assert words[0] == "interrupted"
    assert "rank 0: its connection has ended" in words[1]
    assert "rank 0 was interrupted" in words[2]


def test_an_interrupt_while_it_gives_up_leaves_it_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C keeps it from telling the others: they hear it with what comes next, and mix nothing up."""

    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    def work(star: Star) -> list[bytes] | str:
        if star.rank:
            return star.all_gather(b"first")
        with monkeypatch.context() as patch:
            patch.setattr(star, "_tell", interrupt)
            patch.setattr(star, "_give_up", interrupt)
            with pytest.raises(KeyboardInterrupt):
                star.all_gather(b"first")
        return star.all_gather(b"second")

    words = run(3, work)
    assert "another was under way, or was interrupted" in words[0]
    for rank in (1, 2):
        assert "rank 0: its connection has ended" in words[rank]


def test_a_forked_process_lets_go_and_ends_nothing() -> None:
    """As one that loads data, and lives on when its parent is killed."""
    lines = socket.socketpair()
    stars = [Star(0, 2, {1: lines[0]}, LONG), Star(1, 2, {0: lines[1]}, LONG)]
    says, ends = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ends[1])
            for star in stars:
                with suppress(CommunicationError):
                    star.barrier()
                star.__del__()
            os.write(says[1], b"x")
            os.read(ends[0], 1)  # until the test closes its end
        finally:
            os._exit(0)
    try:
        assert os.read(says[0], 1) == b"x"
        heard: list[list[bytes]] = []
        other = threading.Thread(target=lambda: heard.append(stars[1].all_gather(b"there")))
        other.start()
        assert stars[0].all_gather(b"here") == [b"here", b"there"]
        other.join(60)
        assert heard == [[b"here", b"there"]]
        lines[1].close()  # as the system does it for who is killed
        with pytest.raises(CommunicationError, match="rank 1: its connection has ended"):
            stars[0].barrier()
    finally:
        for end in (*says, *ends):
            os.close(end)
        os.waitpid(child, 0)


def test_one_that_could_not_be_made_says_nothing_at_its_end() -> None:
    Star.__new__(Star).__del__()


def test_a_closed_one_lets_go_of_everything() -> None:
    before = opened()
    run(4, lambda star: star.barrier())
    assert opened() <= before
