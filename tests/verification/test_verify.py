"""Verifying names every fault: each flipped bit of any file, and whatever else can happen to files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.checkpoint import Checkpoint
from reshard.errors import CheckpointNotFoundError, DamagedCheckpointError, ReshardError, StorageError, TrackerError
from reshard.format.safetensors import read_header
from reshard.saving.options import SaveOptions
from reshard.state import model_key
from reshard.storage import MemoryStorage, PosixStorage, ReadableFile
from reshard.testing import FaultyStorage
from reshard.verification import Fault, verify, verify_all
from tests import golden
from tests import saving_runs as runs
from tests.faults import BIT, Tried
from tests.seals import seal_again, unseal

FIRST, SECOND = "iteration_00000001", "iteration_00000002"
MODEL, OTHER_MODEL = "CKP-model-0000000-0000002.safetensors", "CKP-model-0000001-0000002.safetensors"
OPTIMIZER = "CKP-opt-0000001-0000002.safetensors"
RANK, OTHER_RANK = "extra/rank-0000000.safetensors", "extra/rank-0000001.safetensors"
GLOBAL, INDEX = "extra/global.safetensors", "extra/metadata.index"
ALL = ["CKP-opt-0000000-0000002.safetensors", MODEL, OTHER_MODEL, OPTIMIZER, RANK, OTHER_RANK, GLOBAL, INDEX]
ALL += ["common.json", "metadata.json", "seal.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the iterations 1 and 2 of two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "root"
    runs.save(PosixStorage(), [(1, 10), (2, 20)], root=str(folder), world_size=2)
    return folder


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of that root."""
    return shutil.copytree(saved, tmp_path / "root")


@pytest.fixture
def directory(root: Path) -> Path:
    return root / FIRST


def faults_of(directory: Path) -> list[tuple[str, str | None]]:
    """The files and tensors of the faults."""
    return [(fault.file, fault.tensor) for fault in verify(directory).faults]


def files_of(storage: MemoryStorage, directory: str) -> Iterator[str]:
    for entry in storage.list(directory):
        if entry.is_directory:
            yield from (f"{entry.name}/{child.name}" for child in storage.list(f"{directory}/{entry.name}"))
        else:
            yield entry.name


def test_what_was_saved_is_intact(root: Path) -> None:
    told: list[tuple[int, int]] = []
    found = reshard.verify(root, progress=lambda done, total: told.append((done, total)))
    assert (found.directory, found.iteration) == (str(root / SECOND), 2)
    assert found.is_intact
    assert found.is_sealed
    assert (found.faults, found.notes) == ((), ())
    paths = [path for path in (root / SECOND).rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(root / SECOND)) for path in paths) == sorted(ALL)
    assert found.files == len(paths)
    assert found.nbytes == sum(path.stat().st_size for path in paths), "every byte"
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == found.nbytes - (root / SECOND / "seal.json").stat().st_size


def flips(name: str, length: int, every: int) -> Iterator[tuple[int, int]]:
    """Positions and bits: each `every`-th of all bits of a file, begun at another place in each file."""
    return (divmod(at, 8) for at in range(sum(name.encode()) % every, 8 * length, every))


def check_flips(names: Sequence[str], every: int) -> tuple[int, int]:
    """Flip one bit of these files after the other. Each is found by verifying, in the right file; reading finds it, or gives the same.

    Returns:
        How many bits were flipped, and how many of them reading found: it needs neither a replica's second copy nor what is of one rank.
    """
    storage = MemoryStorage()
    runs.save(storage, [(1, 10)], world_size=2)
    directory = f"{runs.ROOT}/{FIRST}"
    assert sorted(files_of(storage, directory)) == sorted(ALL)
    count = read = 0
    for name in names:
        data = storage.read_bytes(f"{directory}/{name}")
        header = read_header(storage, f"{directory}/{name}") if name.endswith(".safetensors") else None
        for position, bit in flips(name, len(data), every):
            count += 1
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            replace(storage, f"{directory}/{name}", bytes(flipped))
            found = verify(directory, storage=storage, readers=1)
            where = f"bit {bit} of byte {position} of {name}"
            # A damaged seal says nothing of the other files; any other damage is that of one file.
            assert name in {fault.file for fault in found.faults}, where
            assert {fault.file for fault in found.faults} == {name} or name == "seal.json", where
            hit = None if header is None else next((e.name for e in header.entries.values() if e.begin <= position < e.end), None)
            if hit is not None:
                assert [fault.tensor for fault in found.faults] == [hit], where
            error = read_error(storage, directory)
            if error is not None:
                assert error.file == f"{directory}/{name}", where
                assert name not in (INDEX, RANK, OTHER_RANK), where
                read += 1
        replace(storage, f"{directory}/{name}", data)
    assert verify(directory, storage=storage).is_intact
    return count, read


def read_error(storage: MemoryStorage, directory: str) -> DamagedCheckpointError | None:
    """Why a checkpoint can't be read; None when all of it is as it was saved."""
    try:
        version = runs.version_of(storage, directory)
    except DamagedCheckpointError as error:
        return error
    assert version == 10
    return None


def replace(storage: MemoryStorage, path: str, data: bytes) -> None:
    storage.remove(path)
    storage.write_bytes(path, data)


def test_a_flipped_bit_is_found_wherever_it_is(tried: Tried) -> None:
    flipped, read = check_flips(ALL, every=101)
    assert flipped > 500
    assert read > flipped // 2
    tried(BIT, flipped, is_part=True)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ALL)
def test_every_flipped_bit_is_found(tried: Tried, name: str) -> None:
    flipped, read = check_flips([name], every=1)
    assert flipped > 1000
    assert read <= flipped
    tried(BIT, flipped)


def test_a_flipped_tracker_is_an_error_or_names_another_whole_checkpoint(tried: Tried) -> None:
    steps = (1, 2, 3, 10, 12)
    storage = MemoryStorage()
    runs.save(storage, [(step, 10 * step) for step in steps], options=SaveOptions(keep_checkpoint_max=None, lock_timeout=0))
    path = f"{runs.ROOT}/latest_checkpointed_iteration.txt"
    data = storage.read_bytes(path)
    flipped = refused = 0
    for position, bit in flips(path, len(data), 1):
        wrong = bytearray(data)
        wrong[position] ^= 1 << bit
        replace(storage, path, bytes(wrong))
        flipped += 1
        try:
            checkpoint = Checkpoint(runs.ROOT, storage)
        except ReshardError as error:
            assert str(error.file).startswith(runs.ROOT)  # noqa: PT017 - no error is fine too
            refused += 1
            continue
        assert checkpoint.iteration in steps
        assert runs.version_of(storage, checkpoint.directory) == 10 * checkpoint.iteration
    assert flipped == 8 * len(data)
    assert 0 < refused < flipped
    tried(BIT, flipped)


@pytest.mark.parametrize("name", [name for name in ALL if name != INDEX])
def test_a_missing_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    (fault,) = verify(directory).faults
    assert (fault.file, fault.what, fault.tensor) == (name, "a file of the checkpoint is missing", None)


def test_the_index_may_be_removed(directory: Path) -> None:
    (directory / INDEX).unlink()
    found = verify(directory)
    assert found.is_intact
    assert "metadata.index" in found.notes[0]
    assert runs.version_of(PosixStorage(), str(directory)) == 10


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("change", [-1, 1, None])
def test_a_file_of_another_length(directory: Path, name: str, change: int | None) -> None:
    path = directory / name
    os.truncate(path, 0 if change is None else path.stat().st_size + change)
    assert name in {file for file, _ in faults_of(directory)}
    assert {file for file, _ in faults_of(directory)} == {name} or name == "seal.json"


def test_of_a_truncated_file_each_lost_tensor_is_named(directory: Path) -> None:
    header = read_header(PosixStorage(), str(directory / MODEL))
    first, second = header.entries.values()
    os.truncate(directory / MODEL, second.begin + 1)
    assert faults_of(directory) == [(MODEL, None), (MODEL, second.name)]
    os.truncate(directory / MODEL, first.begin + 1)
    assert faults_of(directory) == [(MODEL, None), (MODEL, first.name), (MODEL, second.name)]


@pytest.mark.parametrize(("one", "other"), [(MODEL, OTHER_MODEL), (RANK, OTHER_RANK)])
def test_two_files_that_took_each_others_place(directory: Path, one: str, other: str) -> None:
    (directory / one).rename(directory / "aside")
    (directory / other).rename(directory / one)
    (directory / "aside").rename(directory / other)
    assert {one, other} == {file for file, _ in faults_of(directory)}


@pytest.mark.parametrize("name", [name for name in ALL if name not in (INDEX, "metadata.json")])
def test_a_file_of_another_iteration(root: Path, name: str) -> None:
    """Such a file is sound in itself, and of the right size; only the index and the metadata are the same in both."""
    shutil.copy(root / SECOND / name, root / FIRST / name)
    found = {file for file, _ in faults_of(root / FIRST)}
    if name == "seal.json":
        assert found >= set(ALL) - {"seal.json", "metadata.json", INDEX, "common.json"}
    else:
        assert found == {name}


def test_a_tensor_that_was_changed_together_with_its_digest(directory: Path) -> None:
    path = directory / MODEL
    tensors = load_file(path)
    tensors["norm"][0] += 1
    header = read_header(PosixStorage(), str(path))
    path.unlink()
    from reshard.format.safetensors import plan_header, write_tensors

    planned = plan_header([(e.name, e.dtype, e.shape) for e in header.entries.values()], header.metadata)
    write_tensors(PosixStorage(), str(path), planned, ((name, tensors[name]) for name in planned.entries))
    read_header(PosixStorage(), str(path))
    (fault,) = verify(directory).faults
    assert (fault.file, fault.tensor, fault.what) == (MODEL, None, "the header of the file is not as it was saved")
    with pytest.raises(DamagedCheckpointError, match="header of the file is not as it was saved"):
        Checkpoint(directory)["norm"].read()


def test_all_faults_are_named(directory: Path) -> None:
    for name, where in ((MODEL, "embed"), (MODEL, "norm"), (OPTIMIZER, "adam_m.embed")):
        entry = read_header(PosixStorage(), str(directory / name)).entries[where]
        with (directory / name).open("r+b") as file:
            file.seek(entry.begin)
            byte = file.read(1)[0]
            file.seek(entry.begin)
            file.write(bytes([byte ^ 1]))
    (directory / OTHER_RANK).unlink()
    (directory / "common.json").write_text("{}")
    assert faults_of(directory) == [
        (MODEL, "embed"),
        (MODEL, "norm"),
        (OPTIMIZER, "adam_m.embed"),
        ("common.json", None),
        (OTHER_RANK, None),
    ]


def test_of_a_large_tensor_the_rows_are_named(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model={"w": np.zeros((1000, 100), np.float32)})  # 40 rows a block
    directory = tmp_path / FIRST
    (path,) = directory.glob("*-model-*")
    begin = read_header(PosixStorage(), str(path)).entries["w"].begin
    with path.open("r+b") as file:
        for row in (0, 130, 170, 999):
            file.seek(begin + 400 * row)
            file.write(b"x")
    (fault,) = verify(directory).faults
    assert (fault.file, fault.tensor) == (path.name, "w")
    assert fault.found == ", ".join(
        f"rows {first} to {end} of dimension 0 (bytes {begin + 400 * first} to {begin + 400 * end} of the file)"
        for first, end in ((0, 40), (120, 200), (960, 1000))
    )


def test_what_the_seal_does_not_list_is_noted(directory: Path) -> None:
    (directory / "readme.txt").write_text("mine")
    (directory / "extra/rank-0000007.safetensors").write_bytes(b"")
    found = verify(directory)
    assert found.is_intact
    assert "extra/rank-0000007.safetensors, readme.txt" in found.notes[0]


def test_a_file_that_can_not_be_read_is_a_fault(directory: Path) -> None:
    class Broken(PosixStorage):
        def open_read(self, path: str) -> ReadableFile:
            file = super().open_read(path)
            if path.endswith(MODEL):
                end = read_header(PosixStorage(), path).entries["embed"].end
                inner = file.read_into

                def read_into(offset: int, buffer: memoryview) -> None:
                    if offset < end <= offset + len(buffer):
                        raise StorageError("can't read the file", file=path, found="Input/output error")
                    inner(offset, buffer)

                file.read_into = read_into
            return file

    found = verify(directory, storage=Broken())
    assert [(fault.file, fault.tensor, fault.found) for fault in found.faults] == [(MODEL, "embed", "Input/output error")]


def test_any_operation_may_fail_once_and_no_damage_is_invented() -> None:
    storage = MemoryStorage()
    runs.save(storage, [(1, 10)], world_size=2)
    directory = f"{runs.ROOT}/{FIRST}"
    counted = FaultyStorage(storage)
    assert verify(directory, storage=counted, readers=1).is_intact
    for k in range(1, counted.count + 1):
        faulty = FaultyStorage(storage, fail_at=k)
        try:
            found = verify(directory, storage=faulty, readers=1)
        except StorageError:
            continue
        assert faulty.failed is not None
        assert found.is_intact or "simulated failure" in str(found.faults[0]), faulty.failed
        assert len(found.faults) < 3, faulty.failed


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_checkpoints_fit_and_have_no_digests(case: str) -> None:
    found = verify(golden.root(case))
    assert found.is_intact
    assert not found.is_sealed
    assert found.nbytes == 0
    assert found.files == sum(path.is_file() for path in golden.iteration(case).iterdir())
    assert any("no digests" in note for note in found.notes)


def rewritten(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = directory / "qwen3-model-0000002-0000004.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "ms"})


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "file", "tensor", "said"),
    [
        (lambda d: rewritten(d, lambda t: t.pop(NORM)), "qwen3-model-0000002-0000004.safetensors", NORM, "doesn't hold"),
        (lambda d: rewritten(d, lambda t: t.update({NORM: t[NORM][:16]})), "qwen3-model-0000002-0000004.safetensors", NORM, "[16]"),
        (lambda d: (d / "qwen3-model-0000003-0000004.safetensors").unlink(), "qwen3-model-0000003-0000004.safetensors", None, "missing"),
        (
            lambda d: os.truncate(d / "qwen3-model-0000003-0000004.safetensors", 9000),
            "qwen3-model-0000003-0000004.safetensors",
            None,
            "truncated",
        ),
        (lambda d: (d / "metadata.json").unlink(), "metadata.json", None, "several ranks"),
        (lambda d: (d / "metadata.json").write_text("{"), "metadata.json", None, "not JSON"),
        (lambda d: (d / "common.json").write_text("{"), "common.json", None, "not JSON"),
    ],
)
def test_a_golden_checkpoint_that_is_damaged(tmp_path, damage, file, tensor, said) -> None:
    directory = shutil.copytree(golden.iteration("dp2_tp2_noopt"), tmp_path / FIRST)
    damage(directory)
    faults = verify(directory).faults
    assert [(fault.file if "metadata.json is missing" not in fault.what else "metadata.json", fault.tensor) for fault in faults] == [
        (file, tensor)
    ]
    assert said in str(faults[0])


def test_a_golden_single_card_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    directory = shutil.copytree(golden.iteration("single_real_train"), tmp_path / FIRST)
    os.truncate(directory / "qwen3-opt-0000000-0000001.safetensors", 3000)
    assert faults_of(directory) == [("qwen3-opt-0000000-0000001.safetensors", None)]


def test_a_checkpoint_of_a_version_without_seals(directory: Path) -> None:
    unseal(directory)
    found = verify(directory)
    assert found.is_intact
    assert not found.is_sealed
    assert any("no seal.json" in note for note in found.notes)
    assert any("no seal.json" in note for note in Checkpoint(directory).notes)
    entry = read_header(PosixStorage(), str(directory / MODEL)).entries["embed"]
    with (directory / MODEL).open("r+b") as file:
        file.seek(entry.begin)
        file.write(b"\xff")
    (directory / GLOBAL).unlink()
    assert faults_of(directory) == [(MODEL, "embed"), (GLOBAL, None)]


def test_metadata_that_promises_more_than_the_files_hold(directory: Path) -> None:
    """Sealed as it is: a writer's defect, no accident of the storage."""
    path = directory / "metadata.json"
    path.write_bytes(path.read_bytes().replace(b"'norm'", b"'narm'").replace(b'"norm"', b'"narm"'))
    seal_again(directory)
    found = verify(directory)
    assert {(fault.file, fault.tensor) for fault in found.faults} == {(MODEL, "narm"), (OTHER_MODEL, "narm")}
    assert any("doesn't list; ignored: norm" in note for note in found.notes)


def test_a_root_is_verified_whole(root: Path) -> None:
    found = verify_all(root)
    assert found.is_intact
    assert [one.iteration for one in found.iterations] == [1, 2]
    (root / FIRST / RANK).unlink()
    (root / SECOND / "metadata.json").unlink()
    (root / ".saving-iteration_00000003-0123abcd-0").mkdir()
    found = verify_all(root)
    assert not found.is_intact
    assert [[fault.file for fault in one.faults] for one in found.iterations] == [[RANK], ["metadata.json"]]
    assert verify_all(root).tracker is None, "it names an iteration that is there"
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    tracker = verify_all(root).tracker
    assert tracker is not None
    assert "isn't there" in tracker.what
    with pytest.raises(TrackerError):
        verify(root)


def test_there_is_nothing_to_verify(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for work in (verify, verify_all):
        for path in (tmp_path / "none", tmp_path, tmp_path / "file"):
            with pytest.raises(CheckpointNotFoundError):
                work(path)


def test_an_iteration_that_goes_meanwhile_is_left_out(root: Path) -> None:
    class Going(PosixStorage):
        def open_read(self, path: str) -> ReadableFile:
            if FIRST in path:
                shutil.rmtree(root / FIRST, ignore_errors=True)
            return super().open_read(path)

    found = verify_all(root, storage=Going())
    assert [one.iteration for one in found.iterations] == [2]
    assert found.is_intact


def test_large_tensors_among_small_ones(tmp_path: Path) -> None:
    """Tensors of several blocks, of a part of one, of nothing."""
    random = np.random.default_rng(0)
    sizes = (0, 5, 3 << 20, 9 << 20, 1, 4 << 20, 17)
    model = {f"w{n}": random.integers(0, 256, size, np.uint8) for n, size in enumerate(sizes)}
    reshard.save(tmp_path, 1, model=model)
    directory = tmp_path / FIRST
    assert verify(directory).nbytes > 16 << 20
    path = directory / "CKP-model-0000000-0000001.safetensors"
    entries = read_header(PosixStorage(), str(path)).entries
    wrong = [("w3", 8 << 20), ("w6", 16), ("w2", 0), ("w5", (4 << 20) - 1)]
    with path.open("r+b") as file:
        for name, at in wrong:
            file.seek(entries[name].begin + at)
            file.write(bytes([model[name][at] ^ 255]))
    assert sorted(faults_of(directory)) == sorted((path.name, name) for name, _ in wrong)
    assert model_key("w3") in Checkpoint(directory).catalog.tensors


def test_a_fault_says_what_and_where() -> None:
    assert str(Fault("f", "it is gone")) == "it is gone"
    assert str(Fault("f", "wrong", "w", "this", "that")) == "w: wrong (found this, expected that)"


def test_retention_keeps_what_was_verified(root: Path) -> None:
    runs.save(PosixStorage(), [(3, 30)], root=str(root), world_size=2, options=SaveOptions(keep_checkpoint_max=2, lock_timeout=0))
    assert [one.iteration for one in verify_all(root).iterations] == [2, 3]
    assert verify_all(root).is_intact
