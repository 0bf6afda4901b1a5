"""The benchmark of saving runs, checks what was saved, and says what came out; saves without end leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plain_write import PlainCopy, PlainFile, PlainWrite, files_of
from benchmarks.save import main
from benchmarks.save_cases import CASES, COPY, DCP, DCP_ASYNC, DEFERRED, IDLE, MEMCPY, NO_SAVE, RESHARD, SAVES, WRITE
from benchmarks.save_ranks import SaveSample
from benchmarks.save_results import summarize, summarize_endless, summarize_training
from benchmarks.save_stalls import Residue, lasting
from benchmarks.states import transformer

SYNC, STALL = CASES[0], next(case for case in CASES if case.kind == "stall")
TRAINING = next(case for case in CASES if case.kind == "training")
ENDLESS = next(case for case in CASES if case.kind == "endless")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    path = directory / "results" / "save.json"
    arguments = ["--rounds", "1", "--scale", "0.001", "--saves", "4", "--directory", str(directory), "--disk", str(directory)]
    assert main([*arguments, "--cases", "memory", "stall", "training", "endless", "--output", str(path)]) == 0
    assert [entry.name for entry in directory.iterdir()] == ["results"], "checkpoints were left behind"
    return path


@pytest.mark.sweep
def test_the_results_have_every_number(output: Path) -> None:
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["judged"] is False
    assert {"processor", "cores", "commit", "load_average", "load_average_after"} <= set(results["machine"])
    sync, stall, training, endless = results["cases"]
    assert set(sync["repeated"]) == set(sync["first"]) == {DCP, RESHARD, WRITE}
    assert set(stall["repeated"]) == set(stall["first"]) == {DCP_ASYNC, COPY, DEFERRED, IDLE, MEMCPY}
    for case in (sync, stall):
        for name, times in case["repeated"].items():
            assert len(times["seconds"]) == 1
            assert times["least"] == times["median"] == times["most"] > 0
            assert case["cpu"][name] >= 0
    ours, _ = sync["checks"]
    assert ours["value"] == pytest.approx(sync["repeated"][RESHARD]["median"] / sync["repeated"][WRITE]["median"])
    assert set(training["repeated"]) == set(training["tokens_per_second"]) == {NO_SAVE, DEFERRED, COPY, DCP_ASYNC}
    assert endless["saves"] == [1, 4]
    assert [len(rank) for rank in endless["anonymous"]] == [4] * 4
    assert all(found["met"] is None for case in results["cases"] for found in case["checks"])


@pytest.mark.sweep
def test_the_picture_is_a_picture(output: Path) -> None:
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_plain_write_writes_as_many_bytes_in_as_many_files(tmp_path: Path) -> None:
    sizes = {"CKP-model-0000000-0000002.safetensors": 50, "CKP-model-0000001-0000002.safetensors": 70, "common.json": 9}
    sizes |= {"extra/rank-0000000.safetensors": 3, "extra/rank-0000001.safetensors": 4, "extra/global.safetensors": 5}
    for name, size in sizes.items():
        path = tmp_path / "ours" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    memory = [np.arange(8, dtype=np.uint32).reshape(2, 4), np.full(3, 7, np.uint32)]
    for rank in (1, 0):
        PlainWrite(files_of(tmp_path / "ours", memory, rank), rank == 0)(tmp_path / "plain")
    found = {str(path.relative_to(tmp_path / "plain")): path.read_bytes() for path in (tmp_path / "plain").rglob("*") if path.is_file()}
    assert {name: len(data) for name, data in found.items()} == sizes
    values = b"".join(local.tobytes() for local in memory)
    assert [data[-len(values) :] == values for name, data in sorted(found.items()) if "model" in name] == [True, True]


def test_the_plain_write_makes_no_file_twice(tmp_path: Path) -> None:
    write = PlainWrite([PlainFile("common.json", b"x")], True)
    write(tmp_path / "plain")
    with pytest.raises(FileExistsError):
        write(tmp_path / "plain")


def test_the_plain_copy_copies_everything() -> None:
    memory = [np.arange(8, dtype=np.uint32).reshape(2, 4), np.full(3, 7, np.uint32)]
    copy = PlainCopy(memory)
    assert not copy.copied.tobytes().endswith(memory[1].tobytes())
    copy()
    assert copy.copied.tobytes() == b"".join(local.tobytes() for local in memory)


@pytest.mark.parametrize(("ours", "met"), [(1.25, True), (1.4, False)])
def test_whole_saves_last_from_the_first_begin_to_the_last_end(ours: float, met: bool) -> None:
    def save(contender: str, seconds: float) -> list[SaveSample]:
        return [SaveSample(contender, 5.0, 5.0 + seconds / 2, seconds / 2, 0.25), SaveSample(contender, 5.1, 5.0 + seconds, 0.1, 0.5)]

    saves = [save(DCP, 2.0), save(RESHARD, ours), save(WRITE, 1.0)]
    results = summarize(SYNC, transformer(0.001), 10, judged=True, first=saves, repeated=saves, where="/dev/shm")
    assert [found["met"] for found in results["checks"]] == [met, None]
    assert [found["value"] for found in results["checks"]] == [pytest.approx(ours), pytest.approx(2.0)]
    assert results["cpu"][RESHARD] == pytest.approx(0.75)


@pytest.mark.parametrize(("held", "met"), [(0.09, True), (0.11, False)])
def test_training_waits_as_long_as_the_slowest_rank_is_held(held: float, met: bool) -> None:
    def save(contender: str, seconds: float) -> list[SaveSample]:
        # What lies between the call and the next step is no wait.
        return [SaveSample(contender, 5.0, 25.0, seconds / 2, 0.1), SaveSample(contender, 5.0, 25.0, seconds, 0.1)]

    saves = [save(DCP_ASYNC, 3.0), save(COPY, 1.1), save(DEFERRED, 1.1), save(IDLE, held), save(MEMCPY, 1.0)]
    results = summarize(STALL, transformer(0.001), 10, judged=True, first=saves, repeated=saves, where="/dev/shm")
    assert [found["met"] for found in results["checks"]] == [True, True, met, None]


def test_tokens_per_second_count_until_the_last_checkpoint_is_there() -> None:
    def turn(contender: str, seconds: float) -> list[SaveSample]:
        return [SaveSample(contender, 5.0, 5.0 + seconds / 2, 0.0, 0.1), SaveSample(contender, 5.0, 5.0 + seconds, 0.0, 0.1)]

    saves = [turn(NO_SAVE, 2.0), turn(DEFERRED, 2.5), turn(COPY, 4.0), turn(DCP_ASYNC, 8.0)]
    results = summarize_training(TRAINING, 16, saves, 1000, "/dev/shm")
    assert results["tokens_per_second"] == {NO_SAVE: 500, DEFERRED: 400, COPY: 250, DCP_ASYNC: 125}
    assert [found["value"] for found in results["checks"]] == [0.8, 0.5, 0.25]


@pytest.mark.parametrize(("growth", "files", "met"), [(9_000, 12, True), (11_000, 13, False)])
def test_what_saves_without_end_leave_is_held_against_the_targets(growth: int, files: int, met: bool) -> None:
    rank = [Residue(save, 10**8 + growth * save, 12 if save < 100 else files, 5) for save in range(1, SAVES + 1)]
    results = summarize_endless(ENDLESS, transformer(0.001), 10, [rank, rank], 50, judged=True)
    assert [found["met"] for found in results["checks"]] == [met, met, True]
    assert results["checks"][0]["value"] == growth
    assert results["saves"] == [50, SAVES]


def test_what_is_just_ending_is_no_residue(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([["1", "2", "3"], ["1", "2"], ["1", "2", "4"]])
    monkeypatch.setattr("benchmarks.save_stalls.os.listdir", lambda directory: next(readings))
    assert lasting("/proc/self/task") == 2
    assert next(readings, None) is None


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_saves_without_end_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "save.json"
    assert main(["--cases", "endless", "--directory", str(tmp_path), "--output", str(path)]) == 0
    (case,) = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert case["saves"] == [50, SAVES]
    assert [found["met"] for found in case["checks"]] == [True, True, True], case["checks"]
