"""A damaged checkpoint: its error names an intact one, or the load falls back, on all ranks together, and fills everything again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DataFileError,
    MetadataError,
    MismatchError,
    ShortFileError,
    StorageError,
    TrackerError,
    UsageError,
)
from reshard.format.safetensors import read_header
from reshard.state import ShardedTensor, model_key, slot_key
from reshard.storage.posix import PosixStorage
from reshard.testing import FaultyStorage, mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank
from tests.seals import seal_again

NAMES = ("a.weight", "b.weight", "c.weight")
SHAPE = (16, 8)
TRACKER = "latest_checkpointed_iteration.txt"

WORLDS = pytest.mark.parametrize("world", [1, 4])
WAYS = pytest.mark.parametrize("balanced", [False, True], ids=["direct", "balanced"])


def whole(name: str, step: int) -> np.ndarray:
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) + 1000 * step + len(name)).astype(np.float32)


def parts(comm: Communicator, step: int, *, blank: bool = False) -> tuple[dict[str, ShardedTensor], dict[str, ShardedTensor]]:
    """A rank's weights and moments in the version of a step."""
    model, moments = {}, {}
    layout = split(mesh_of(dp=comm.world_size), "dp", None)
    for name in NAMES:
        for made, key, stored in ((model, model_key(name), name), (moments, slot_key("adam_m", name), f"adam_m.{name}")):
            tensor = tensor_on_rank(key, whole(stored, step), layout, comm.rank, blank=blank)
            assert tensor is not None
            made[stored] = tensor
    return model, moments


def values(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors' values; a load adds the step count to an optimizer's dictionary."""
    return {name: tensor.shards[0].memory.read() for name, tensor in tensors.items() if isinstance(tensor, ShardedTensor)}


class Counter:
    def __init__(self) -> None:
        self.value = -1

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def save(root: Path, steps: tuple[int, ...] = (1, 2, 3), world: int = 4, status: dict[int, int] | None = None) -> None:
    def work(comm: Communicator) -> None:
        with reshard.CheckpointManager(root, communicator=comm) as manager:
            for step in steps:
                model, moments = parts(comm, step)
                common = reshard.CommonInfo(step_num=step, global_step=step, ckpt_status=(status or {}).get(step))
                manager.save(step, model=model, optimizer=moments, scheduler={"value": step}, extra={"step": step}, common=common)

    run_ranks(world, work)


def load(comm: Communicator, root: Path, **options: Any) -> reshard.RestoreReport:
    """Load, and see that all of the run is of the one iteration that the report says."""
    storage = options.pop("storage", None)
    model, moments = parts(comm, 0, blank=True)
    counter = Counter()
    with reshard.CheckpointManager(root, communicator=comm, storage=storage, read_only=True) as manager:
        report = manager.load(model=model, optimizer=moments, scheduler=counter, **options)
    assert report is not None
    assert report.iteration is not None
    wanted = parts(comm, report.iteration)
    for mine, expected in ((model, wanted[0]), (moments, wanted[1])):
        for name, array in values(mine).items():
            np.testing.assert_array_equal(array, values(expected)[name], err_msg=name)
    assert counter.value == report.iteration
    assert report.extra == {"step": report.iteration}
    return report


def directory(root: Path, step: int) -> Path:
    return root / f"iteration_{step:08d}"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def flip_tensor(root: Path, step: int, name: str = "b.weight", file: str = "*-model-0000002-*") -> None:
    (path,) = directory(root, step).glob(file)
    flip(path, read_header(PosixStorage(), str(path)).entries[name].begin + 5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "metadata.json is flipped": lambda where: flip(where / "metadata.json", 40),
    "metadata.json is gone": lambda where: (where / "metadata.json").unlink(),
    "common.json is flipped": lambda where: flip(where / "common.json", 40),
    "the seal is flipped": lambda where: flip(where / "seal.json", 40),
    "the seal is gone": lambda where: (where / "seal.json").unlink(),
    "the extras are flipped": lambda where: flip(where / "extra" / "global.safetensors", 60),
    "the extras are gone": lambda where: (where / "extra" / "global.safetensors").unlink(),
    "a header is flipped": lambda where: flip(next(where.glob("*-model-0000002-*")), 30),
    "a data file is gone": lambda where: next(where.glob("*-opt-0000001-*")).unlink(),
    "a data file is cut": lambda where: cut(next(where.glob("*-opt-0000001-*"))),
    "random states are cut": lambda where: cut(where / "extra" / "rank-0000000.safetensors"),
}


@WORLDS
@WAYS
@pytest.mark.parametrize("damage", DAMAGES)
def test_it_falls_back_from_every_damage_and_says_so(
    tmp_path: Path, damage: str, world: int, balanced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path)
    DAMAGES[damage](directory(tmp_path, 3))
    reports = run_ranks(world, lambda comm: load(comm, tmp_path, balanced=balanced, on_corrupt="fallback"))
    for report in reports:
        assert report.iteration == 2
        (one,) = report.passed_over
        assert (one.iteration, one.reason, one.path) == (3, "damaged", str(directory(tmp_path, 3)))
        assert one.details
        assert "; passed over iteration 3 (damaged); random states" in str(report)
        assert "passed over iteration 3 (damaged): " in report.table()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if text.startswith("iteration 3 (damaged) was passed over: ")]) == 1, "rank 0 says it once"
    assert len([text for text in warnings if text.startswith("loading the older iteration 2 instead")]) == 1


@WORLDS
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_error_names_the_newest_intact_one(tmp_path: Path, damage: str, world: int) -> None:
    save(tmp_path)
    for step in (2, 3):
        DAMAGES[damage](directory(tmp_path, step))
    outcomes = run_ranks_settled(world, lambda comm: load(comm, tmp_path))
    assert all(isinstance(outcome, DamagedCheckpointError) for outcome in outcomes), outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1
    text = str(outcomes[0])
    assert "intact:   iteration 1 is the newest intact one before it, as far as seal, metadata, headers and sizes tell (data not" in text
    assert f"load it by its path, {directory(tmp_path, 1)}, or with on_corrupt='fallback'" in text
    assert run_ranks(world, lambda comm: load(comm, directory(tmp_path, 1)).iteration) == [1] * world


@WORLDS
def test_damage_that_shows_while_data_is_read(tmp_path: Path, world: int) -> None:
    """One rank finds the flipped bit; the others have filled their parts by then, and fill them anew."""
    save(tmp_path)
    flip_tensor(tmp_path, 3)
    (error, *_) = run_ranks_settled(world, lambda comm: load(comm, tmp_path, balanced=True))
    assert isinstance(error, DataFileError)
    assert "b.weight" in str(error)
    assert "iteration 2 is the newest intact one" in str(error)
    for report in run_ranks(world, lambda comm: load(comm, tmp_path, balanced=True, on_corrupt="fallback")):
        assert report.iteration == 2
        assert "b.weight" in report.passed_over[0].details
    flip_tensor(tmp_path, 2, "adam_m.c.weight", "*-opt-0000003-*")
    for report in run_ranks(world, lambda comm: load(comm, tmp_path, balanced=True, on_corrupt="fallback")):
        assert report.iteration == 1
        assert [(one.iteration, one.reason) for one in report.passed_over] == [(3, "damaged"), (2, "damaged")]


class Shrinking(FaultyStorage):
    """One rank's: a data file of an iteration ends early once its header was read; `reads` says how often that was seen."""

    def __init__(self, step: int) -> None:
        super().__init__(PosixStorage())
        self._part = f"iteration_{step:08d}/"
        self.reads = 0

    def _do(self, name: str, path: str, work: Any, torn: Any = None) -> Any:
        if name in ("read_into", "scatter", "map") and self._part in path and "-model-" in path:
            self._opened = getattr(self, "_opened", 0) + 1
            if self._opened > HEADER_READS:
                self.reads += 1
                raise ShortFileError("the file ends before the bytes that should be in it", file=path)
        return work()


# What a rank reads of a data file before its data: the header's length, and the header.
HEADER_READS = 2


@WAYS
def test_a_file_that_is_cut_short_on_one_rank_only_while_data_is_read(tmp_path: Path, balanced: bool) -> None:
    save(tmp_path)
    shrinking = Shrinking(3)

    def work(comm: Communicator) -> reshard.RestoreReport:
        storage = shrinking if comm.rank == 2 else PosixStorage()
        return load(comm, tmp_path, storage=storage, balanced=balanced, on_corrupt="fallback")

    for report in run_ranks(4, work):
        assert report.iteration == 2
        assert "ends before" in report.passed_over[0].details
        assert "rank 2 (of 4)" in report.passed_over[0].details
    assert shrinking.reads


@WORLDS
def test_when_nothing_intact_is_left_it_says_what_may_be_overwritten(tmp_path: Path, world: int) -> None:
    save(tmp_path, (1, 2))
    flip_tensor(tmp_path, 1)
    flip_tensor(tmp_path, 2)
    outcomes = run_ranks_settled(world, lambda comm: load(comm, tmp_path, balanced=True, on_corrupt="fallback"))
    assert [type(outcome) for outcome in outcomes] == [DamagedCheckpointError] * world
    for text in map(str, outcomes):
        assert "no intact checkpoint is left; passed over:" in text
        assert "iteration 2 (damaged)" in text
        assert "iteration 1 (damaged)" in text
        assert "the run's values may be partly overwritten" in text
    # What shows before anything is read leaves the run alone, and the error doesn't say otherwise.
    for step in (1, 2):
        (directory(tmp_path, step) / "seal.json").unlink()
    for outcome in run_ranks_settled(world, lambda comm: load(comm, tmp_path, balanced=True, on_corrupt="fallback")):
        assert isinstance(outcome, DamagedCheckpointError)
        assert "overwritten" not in str(outcome)


@WORLDS
@pytest.mark.parametrize("text", ["", "three", "-1", "7", "9" * 600])
def test_a_damaged_tracker(tmp_path: Path, world: int, text: str) -> None:
    save(tmp_path)
    (tmp_path / TRACKER).write_text(text)
    for outcome in run_ranks_settled(world, lambda comm: load(comm, tmp_path)):
        assert isinstance(outcome, TrackerError)
        assert "iteration 3 is the newest intact one" in str(outcome)
    for report in run_ranks(world, lambda comm: load(comm, tmp_path, on_corrupt="fallback", missing_ok=True)):
        assert report.iteration == 3
        (one,) = report.passed_over
        assert (one.iteration, str(one)) == (7 if text == "7" else None, "the tracker (damaged)")
        assert "tracker" in one.details
    # Newer ones than the tracker names were given up: they are no candidates.
    (tmp_path / TRACKER).write_text("2")
    shutil.rmtree(directory(tmp_path, 2))
    assert [report.iteration for report in run_ranks(world, lambda comm: load(comm, tmp_path, on_corrupt="fallback"))] == [1] * world


def test_only_older_ones_are_candidates_also_of_an_iteration_by_its_path(tmp_path: Path) -> None:
    save(tmp_path, (1, 2, 3))
    flip(directory(tmp_path, 2) / "metadata.json", 40)
    (tmp_path / TRACKER).write_text("2")
    for path in (tmp_path, directory(tmp_path, 2)):
        assert run_ranks(1, lambda comm, path=path: load(comm, path, on_corrupt="fallback").iteration) == [1]
    flip(directory(tmp_path, 1) / "metadata.json", 40)
    for path in (tmp_path, directory(tmp_path, 2)):
        (error,) = run_ranks_settled(1, lambda comm, path=path: load(comm, path))
        assert "intact:   no older iteration in its root" in str(error)


def test_a_checkpoint_outside_of_a_root_has_no_other(tmp_path: Path) -> None:
    save(tmp_path / "root", (1, 2))
    shutil.copytree(directory(tmp_path / "root", 2), tmp_path / "root" / "best")
    flip(tmp_path / "root" / "best" / "metadata.json", 40)
    (error,) = run_ranks_settled(1, lambda comm: load(comm, tmp_path / "root" / "best"))
    assert isinstance(error, MetadataError)
    assert "intact:" not in str(error)
    (error,) = run_ranks_settled(1, lambda comm: load(comm, tmp_path / "root" / "best", on_corrupt="fallback"))
    assert "no intact checkpoint is left" in str(error)


def test_what_the_older_one_lacks_must_not_keep_values_of_the_damaged_one(tmp_path: Path) -> None:
    more = np.ones(3, np.float32)
    with reshard.CheckpointManager(tmp_path) as manager:
        manager.save(1, model={"a": more})
        manager.save(2, model={"a": more * 2, "b": more * 2})
    flip_tensor(tmp_path, 2, "a", "*-model-*")
    lenient = reshard.Strictness(missing="ignore")
    with pytest.raises(MismatchError, match="partly overwritten") as caught:
        reshard.load(tmp_path, model={"a": more * 0, "b": more * 0}, balanced=True, on_corrupt="fallback", strict=lenient)
    assert "tensor:   b" in str(caught.value)
    # By default the missing tensor is an error by itself, and it says what became of the run.
    with pytest.raises(MismatchError, match="partly overwritten"):
        reshard.load(tmp_path, model={"a": more * 0, "b": more * 0}, balanced=True, on_corrupt="fallback")
    # A selection without it is the same selection again.
    run = {"a": more * 0, "b": more * 0}
    assert reshard.load(tmp_path, model=run, balanced=True, on_corrupt="fallback", exclude=["b"]).iteration == 1
    assert run["a"].tolist() == [1, 1, 1]
    assert run["b"].tolist() == [0, 0, 0]


@WORLDS
def test_a_misfit_or_a_refusing_storage_is_no_damage(tmp_path: Path, world: int) -> None:
    save(tmp_path)

    def misfit(comm: Communicator) -> None:
        reshard.load(tmp_path, model={"other": np.zeros(3)}, communicator=comm, on_corrupt="fallback")

    assert [type(outcome) for outcome in run_ranks_settled(world, misfit)] == [MismatchError] * world

    def refused(comm: Communicator) -> None:
        load(comm, tmp_path, on_corrupt="fallback", storage=FaultyStorage(PosixStorage(), fail_at=1, operations={"open_read"}))

    assert all(isinstance(outcome, StorageError) for outcome in run_ranks_settled(world, refused))


def test_the_run_is_told_which_one_it_goes_on_from(tmp_path: Path) -> None:
    """The next save of the run must not remove the one that it was loaded from before it is committed."""
    save(tmp_path, (1, 2, 3), world=1)
    flip(directory(tmp_path, 3) / "metadata.json", 40)

    def work(comm: Communicator) -> None:
        model, moments = parts(comm, 0, blank=True)
        with reshard.CheckpointManager(tmp_path, keep_checkpoint_max=1, communicator=comm) as manager:
            report = manager.load(model=model, optimizer=moments, on_corrupt="fallback")
            assert report.iteration == 2
            manager.save(1, model=model, optimizer=moments)
            assert directory(tmp_path, 2).exists()
            assert not directory(tmp_path, 3).exists()
            manager.save(3, model=model, optimizer=moments)
            assert not directory(tmp_path, 2).exists()

    run_ranks(1, work)
    assert reshard.Checkpoint(tmp_path).iteration == 3


@pytest.mark.parametrize("ranks", [{0: "ignore"}, {1: "ignore"}, {1: "fallback"}])
def test_rules_that_can_not_be_or_differ_are_everyones_error(tmp_path: Path, ranks: dict[int, Any]) -> None:
    save(tmp_path, (1,), world=2)
    for outcome in run_ranks_settled(2, lambda comm: load(comm, tmp_path, on_corrupt=ranks.get(comm.rank, "error")), timeout=20):
        assert isinstance(outcome, UsageError)
        assert "on_corrupt" in str(outcome)


@WORLDS
@WAYS
def test_an_unhealthy_one_is_taken_unless_it_is_to_be_skipped(
    tmp_path: Path, world: int, balanced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, (1, 2, 3, 4), status={1: 0, 2: 0, 3: 1, 4: 2})
    assert [report.iteration for report in run_ranks(world, lambda comm: load(comm, tmp_path, balanced=balanced))] == [4] * world
    assert "passed over" not in caplog.text
    for report in run_ranks(world, lambda comm: load(comm, tmp_path, balanced=balanced, skip_unhealthy=True)):
        assert report.iteration == 2
        assert [(one.iteration, one.reason) for one in report.passed_over] == [(4, "unhealthy"), (3, "unhealthy")]
        assert "passed over iteration 4 (unhealthy), iteration 3 (unhealthy)" in str(report)
    assert "iteration 4 (unhealthy) was passed over" in caplog.text
    flip(directory(tmp_path, 2) / "seal.json", 40)
    for outcome in run_ranks_settled(world, lambda comm: load(comm, tmp_path, balanced=balanced, skip_unhealthy=True)):
        assert isinstance(outcome, MetadataError)
    for report in run_ranks(world, lambda comm: load(comm, tmp_path, balanced=balanced, skip_unhealthy=True, on_corrupt="fallback")):
        assert [(one.iteration, one.reason) for one in report.passed_over] == [(4, "unhealthy"), (3, "unhealthy"), (2, "damaged")]


@WORLDS
def test_without_a_healthy_one_nothing_is_loaded_nor_begun_afresh(tmp_path: Path, world: int) -> None:
    save(tmp_path, (1, 2), status={1: 1, 2: 1})
    for outcome in run_ranks_settled(world, lambda comm: load(comm, tmp_path, skip_unhealthy=True, missing_ok=True)):
        assert isinstance(outcome, CheckpointNotFoundError)
        assert "no healthy checkpoint is left" in str(outcome)


def test_one_of_which_nothing_is_known_is_not_unhealthy(tmp_path: Path) -> None:
    save(tmp_path, (1, 2), world=1)
    assert run_ranks(1, lambda comm: load(comm, tmp_path, skip_unhealthy=True).iteration) == [2]
    common = directory(tmp_path, 2) / "common.json"
    common.write_text(json.dumps({**json.loads(common.read_text()), "ckpt_status": 1}))
    seal_again(directory(tmp_path, 2))
    assert run_ranks(1, lambda comm: load(comm, tmp_path, skip_unhealthy=True).iteration) == [1]
