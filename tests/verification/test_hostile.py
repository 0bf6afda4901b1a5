"""A checkpoint that an enemy made: it is refused, whoever looks at it, with little memory, and nothing outside of it is opened."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import reshard
from benchmarks.load_ranks import memory_of
from reshard.errors import ReshardError
from tests import saving_runs as runs
from tests.faults import HOSTILE, Tried
from tests.forked import SAVED, SocketCommunicator, run_job
from tests.seals import unseal

# Anonymous memory (bytes) that looking at such a checkpoint may take: some interpreter's heaps, but nothing of a size that the enemy chose.
MOST = 48 << 20
HUGE = 1 << 43  # the largest file of common file systems is of 2^44 bytes

MODEL, OTHER = "CKP-model-0000000-0000002.safetensors", "CKP-model-0000001-0000002.safetensors"
GLOBAL = "extra/global.safetensors"


@dataclass(frozen=True)
class Looked:
    """What became of looking at a checkpoint: what was said of it, what was opened, and by how many bytes the process grew at most."""

    said: str
    opened: list[str]
    growth: int


def load(directory: Path) -> str:
    reshard.load(directory, model={"embed": np.zeros((4, 3), np.float32), "norm": np.zeros(3, np.float32)})
    return ""


def read(directory: Path) -> str:
    checkpoint = reshard.Checkpoint(directory)
    for name in checkpoint:
        checkpoint[name].read()
    assert checkpoint.values is not None
    return ""


def verify(directory: Path) -> str:
    return "\n".join(map(str, reshard.verify(directory).faults))


def look(directory: Path, how: Callable[[Path], str], report: Path) -> Looked:
    """Look at a checkpoint in a process of its own."""

    def work(comm: SocketCommunicator) -> None:
        opened: list[str] = []
        sys.addaudithook(lambda event, arguments: opened.append(os.path.realpath(str(arguments[0]))) if event == "open" else None)
        before = memory_of("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")
        try:
            said = how(directory)
        except ReshardError as error:
            said = str(error)
        growth = memory_of("VmHWM") - before
        report.write_text(json.dumps([said, [path for path in opened if not path.startswith(("/proc/", sys.prefix))], growth]))

    assert run_job(1, work) == [SAVED], "an error that is none of the tree, or a crash"
    return Looked(*json.loads(report.read_text()))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of two ranks that claims to have no seal."""
    from reshard.storage import PosixStorage

    root = tmp_path / "root"
    runs.save(PosixStorage(), [(1, 10)], root=str(root), world_size=2)
    made = root / "iteration_00000001"
    unseal(made)
    (made / "extra/metadata.index").unlink()
    return made


def outside(directory: Path) -> Path:
    """What the enemy would like to have read."""
    path = directory.parent.parent / "outside"
    path.mkdir(exist_ok=True)
    return path


def with_header(directory: Path, change: Callable[[dict[str, dict[str, object]]], object], name: str = MODEL) -> None:
    """Change a file's header; its data stays."""
    data = (directory / name).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    (directory / name).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def with_text(directory: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    before = (directory / name).read_bytes()
    after = change(before)
    assert after != before
    (directory / name).write_bytes(after)


def move_out(directory: Path, name: str) -> None:
    """What the link leads to is all that the checkpoint needs."""
    target = outside(directory) / name.replace("/", "-")
    (directory / name).rename(target)
    (directory / name).symlink_to(target)


def sparse(directory: Path, name: str) -> None:
    with (directory / name).open("r+b") as file:
        file.truncate(HUGE)


def replace_by_pipe(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)


def set_length(length: int) -> Callable[[bytes], bytes]:
    return lambda data: length.to_bytes(8, "little") + data[8:]


def rename_file(name: str) -> Callable[[Path], None]:
    """Let metadata name another file; what it names is there, and would do."""

    def change(directory: Path) -> None:
        (outside(directory) / "it").write_bytes((directory / MODEL).read_bytes())
        told = name.format(outside=outside(directory)).encode()
        with_text(directory, "metadata.json", lambda data: data.replace(MODEL.encode(), told))

    return change


_ENTRY = b'"norm":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}'
TWICE = (2 * len(_ENTRY) + 3).to_bytes(8, "little") + b"{" + _ENTRY + b"," + _ENTRY + b"}" + bytes(12)
DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"

CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "header longer than the file": (lambda d: with_text(d, MODEL, set_length(10_000)), "truncated inside its header"),
    "header of 2^62 bytes": (lambda d: with_text(d, MODEL, set_length(1 << 62)), "not a safetensors file"),
    "a long header in a sparse file": (lambda d: (with_text(d, MODEL, set_length(1 << 40)), sparse(d, MODEL)), "not a safetensors file"),
    "overlapping offsets": (
        lambda d: with_header(d, lambda h: h["norm"].update(data_offsets=h["embed"]["data_offsets"])),
        "overlap|contradict",
    ),
    "offsets beyond the file": (lambda d: with_header(d, lambda h: h["norm"].update(data_offsets=[HUGE, HUGE + 12])), "hole|truncated"),
    "negative offsets": (lambda d: with_header(d, lambda h: h["norm"].update(data_offsets=[-12, 0])), "impossible"),
    "a huge shape in a header": (lambda d: with_header(d, lambda h: h["norm"].update(shape=[1 << 40, 1 << 20])), "contradict|impossible"),
    "a huge shape everywhere": (
        lambda d: (
            with_header(d, lambda h: h["norm"].update(shape=[1 << 40], data_offsets=[0, 1 << 42])),
            with_text(d, "metadata.json", lambda data: data.replace(b"[3]", b"[1099511627776]")),
        ),
        "overlap|digests",
    ),
    "a huge shape in metadata": (
        lambda d: with_text(d, "metadata.json", lambda data: data.replace(b"[3]", b"[4611686018427387904]")),
        "larger|value",
    ),
    "one name twice in a header": (lambda d: (d / MODEL).write_bytes(TWICE), "twice"),
    "one name twice in metadata": (
        lambda d: with_text(d, "metadata.json", lambda data: data.replace(b'"norm":', b'"embed":')),
        "twice|doesn't have",
    ),
    "deep JSON in metadata": (lambda d: (d / "metadata.json").write_bytes(DEEP), "nested|not JSON|unexpected"),
    "deep JSON in common.json": (lambda d: (d / "common.json").write_bytes(DEEP), "nested|not JSON|unexpected"),
    "deep JSON in the seal": (lambda d: (d / "seal.json").write_bytes(DEEP), "nested|not JSON|understood|seal"),
    "deep JSON in a header": (lambda d: (d / MODEL).write_bytes(len(DEEP).to_bytes(8, "little") + DEEP), "nested|understood"),
    "deep JSON in the extras": (lambda d: (d / GLOBAL).write_bytes(len(DEEP).to_bytes(8, "little") + DEEP), "nested|understood"),
    "a file above": (rename_file("../../outside/it"), "leads out"),
    "an absolute path": (rename_file("{outside}/it"), "leads out"),
    "a path with a null": (rename_file("a\\u0000b"), "leads out"),
    "the directory itself": (rename_file(".."), "leads out"),
    **{
        f"a link out in the place of {name}": (lambda d, name=name: move_out(d, name), "symbolic link leads out")
        for name in (MODEL, "metadata.json", "common.json", GLOBAL, "extra/rank-0000000.safetensors", "extra")
    },
    "a link out in the place of the seal": (
        lambda d: ((d / "seal.json").write_bytes(b"{}"), move_out(d, "seal.json")),
        "symbolic link leads out",
    ),
    **{f"{name} of a petabyte": (lambda d, name=name: sparse(d, name), "") for name in ("metadata.json", "common.json", MODEL, GLOBAL)},
    "a seal of a petabyte": (lambda d: ((d / "seal.json").write_bytes(b"{}"), sparse(d, "seal.json")), ""),
    **{
        f"a pipe in the place of {name}": (lambda d, name=name: replace_by_pipe(d, name), "")
        for name in ("metadata.json", "common.json", MODEL, GLOBAL)
    },
}


def test_the_checkpoint_that_the_enemy_changes_is_good_before(directory: Path, tmp_path: Path) -> None:
    for how in (load, read, verify):
        looked = look(directory, how, tmp_path / "report")
        assert looked.said == ""
        assert looked.growth < MOST
        assert any(path.startswith(str(directory.resolve())) for path in looked.opened)


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_checkpoint(directory: Path, tmp_path: Path, tried: Tried, case: str) -> None:
    change, said = CASES[case]
    change(directory)
    for how in (load, read, verify):
        looked = look(directory, how, tmp_path / "report")
        assert looked.said, f"{how.__name__} found nothing"
        assert any(words in looked.said for words in said.split("|")), f"{how.__name__}: {looked.said}"
        assert str(directory) in looked.said or how is verify, looked.said
        assert looked.growth < MOST, f"{how.__name__} took {looked.growth} bytes"
        away = [
            path
            for path in looked.opened
            if path.startswith(str(tmp_path.resolve())) and not path.startswith(str(directory.parent.resolve()))
        ]
        assert away == [str((tmp_path / "report").resolve())] * len(away), how.__name__
    tried(HOSTILE, 1)


def test_links_inside_a_checkpoint_are_fine(directory: Path, tmp_path: Path) -> None:
    (directory / "kept").mkdir()
    (directory / MODEL).rename(directory / "kept" / MODEL)
    (directory / MODEL).symlink_to(f"kept/{MODEL}")
    for how in (load, read, verify):
        assert look(directory, how, tmp_path / "report").said == ""


def test_a_checkpoint_behind_a_link_is_fine(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(directory)
    for how in (load, read, verify):
        assert look(tmp_path / "best", how, tmp_path / "report").said == ""
