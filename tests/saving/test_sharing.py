"""Ranks on several hosts: they must share the checkpoint root, and are told so at once when they don't."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import UsageError
from reshard.saving import saver, sharing
from reshard.saving.sharing import check_shared, is_declared_shared, this_host
from reshard.storage.posix import PosixStorage
from reshard.testing import run_ranks, run_ranks_settled


class Host(PosixStorage):
    """The file system of one host: what lies below the mount point of every host is its own."""

    def __init__(self, mount: Path, own: Path) -> None:
        super().__init__()
        self._mount, self._own = str(mount), str(own)

    def stat(self, path: str):
        return super().stat(path.replace(self._mount, self._own))

    def list(self, path: str):
        return super().list(path.replace(self._mount, self._own))

    def write_bytes(self, path: str, data: bytes) -> None:
        super().write_bytes(path.replace(self._mount, self._own), data)

    def remove(self, path: str) -> None:
        super().remove(path.replace(self._mount, self._own))


HOSTS = ["north a", "north a", "south b", "south b"]


def check(directories: list[Path], root: Path, *, is_declared: bool = False) -> list:
    def work(comm: Communicator) -> None:
        storage = Host(root, directories[comm.rank])
        check_shared(storage, comm, str(root), HOSTS, "0123abcd", is_declared=is_declared, patience=0.3)

    return run_ranks_settled(4, work)


def test_hosts_that_share_the_root(tmp_path: Path) -> None:
    assert check([tmp_path] * 4, tmp_path) == [None] * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_hosts_that_dont(exists: bool, tmp_path: Path) -> None:
    north, south = tmp_path / "north", tmp_path / "south"
    north.mkdir()
    if exists:
        south.mkdir()
    outcomes = check([north, north, south, south], tmp_path / "root")
    for outcome in outcomes:
        assert isinstance(outcome, UsageError)
        assert "don't share the checkpoint root" in str(outcome)
        assert "doesn't see what" in str(outcome)
        assert "export SHARED_PATHS=/data01" in str(outcome)
    assert list(north.iterdir()) == []
    assert check([north, north, south, south], tmp_path / "root", is_declared=True) == [None] * 4


def test_shared_paths_are_whole_directories(tmp_path: Path) -> None:
    assert is_declared_shared("/data01/run/checkpoint", "/data01")
    assert is_declared_shared("/data01", "/elsewhere, /data01/")
    assert not is_declared_shared("/data011/run", "/data01")
    assert not is_declared_shared("/data01", "/data01/run")
    for nothing in (None, "", " , "):
        assert not is_declared_shared("/data01", nothing)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert is_declared_shared(str(tmp_path / "link" / "run"), str(tmp_path / "real"))


def test_a_save_from_several_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.local()
    monkeypatch.setattr(saver, "this_host", lambda: here.name)
    names: list[list[str]] = []
    await_files = sharing._await_files

    def watched(storage, rank, root, *others) -> None:
        names.append([path.name for path in Path(root).iterdir()])
        await_files(storage, rank, root, *others)

    monkeypatch.setattr(sharing, "_await_files", watched)

    def save(comm: Communicator) -> str:
        here.name = HOSTS[comm.rank]
        return reshard.save(tmp_path / "root", 1, model={"w": np.ones(3)}, communicator=comm).state

    assert run_ranks(4, save) == ["committed"] * 4
    assert len(names) == 2, "one rank of each host looks"
    assert all(sum("probe" in name for name in found) >= 1 for found in names)
    assert not [path for path in (tmp_path / "root").iterdir() if "probe" in path.name]
    monkeypatch.setenv("SHARED_PATHS", str(tmp_path))
    assert run_ranks(4, save) == ["committed"] * 4
    assert len(names) == 2, "what is declared is not tried"


def test_a_host_is_itself() -> None:
    assert this_host() == this_host() != ""
