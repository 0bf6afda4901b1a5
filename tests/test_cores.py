"""Cores are divided among the ranks that a launcher says are on the machine."""

from __future__ import annotations

import os

import pytest

from reshard.cores import cores_per_rank

LAUNCHERS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sixteen cores, and no launcher."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return monkeypatch


def test_a_rank_alone_has_all_cores(machine: pytest.MonkeyPatch) -> None:
    assert cores_per_rank() == 16


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_share_what_there_is(machine: pytest.MonkeyPatch, launcher: str) -> None:
    machine.setenv(launcher, "32")
    assert cores_per_rank() == 0.5


def test_cores_of_its_own_are_not_divided_again(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("LOCAL_WORLD_SIZE", "4")
    machine.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7}, raising=False)
    assert cores_per_rank() == 4


@pytest.mark.parametrize("told", ["", "0", "many", "-3"])
def test_what_is_no_number_of_ranks_is_nothing(machine: pytest.MonkeyPatch, told: str) -> None:
    machine.setenv("LOCAL_WORLD_SIZE", told)
    assert cores_per_rank() == 16
