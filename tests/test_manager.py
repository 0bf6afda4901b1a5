"""The manager on simulated ranks: what it saves comes back, what doesn't fit is said, what is damaged changes nothing."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.cli.listing import list_root
from reshard.comm import Communicator
from reshard.errors import (
    CaptureError,
    CheckpointNotFoundError,
    DataFileError,
    MetadataError,
    MismatchError,
    RootLockedError,
    SaveError,
    TrackerError,
    UsageError,
)
from reshard.families import RuleMapping, rename
from reshard.format.extra import write_extra
from reshard.storage import PosixStorage
from reshard.testing import run_ranks, run_ranks_settled
from tests.seals import seal_again, unseal

WEIGHTS = {"a.weight": np.arange(24, dtype=np.float32).reshape(4, 6), "b.bias": np.arange(6, dtype=np.float64)}
MOMENTS = {f"{slot}.{name}": array.astype(np.float32) / 7 for slot in ("adam_m", "adam_v") for name, array in WEIGHTS.items()}


def blank(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.full_like(array, -7) for name, array in arrays.items()}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


class Counter:
    """Something with a state, as schedulers and loaders are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "pair": (1, 2.5)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["pair"] == (1, 2.5)
        self.value = state["value"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the iterations 10 and 20."""
    root = tmp_path / "root"
    with reshard.CheckpointManager(root) as manager:
        manager.save(10, model=WEIGHTS, optimizer={**MOMENTS, "global_step": np.array([10], np.int32)})
        manager.save(20, model={name: array + 1 for name, array in WEIGHTS.items()}, optimizer=MOMENTS)
    return root


def test_everything_comes_back(tmp_path: Path) -> None:
    counters = Counter(3), Counter(4), Counter(5)
    common = reshard.CommonInfo(epoch_num=2, step_num=10, global_step=10, loss_scale=None, global_batch_size=8, consumed_samples=80)
    with reshard.CheckpointManager(tmp_path, prefix="qwen3") as manager:
        saved = manager.save(
            10,
            model=WEIGHTS,
            optimizer=MOMENTS,
            scheduler=counters[0],
            dataloader=counters[1],
            extra={"ema": counters[2], "note": "hello", "grid": np.eye(2), 3: None},
            common=common,
        )
        assert saved.step == 10
        assert saved.nbytes > sum(array.nbytes for array in (*WEIGHTS.values(), *MOMENTS.values()))
        weights, moments = blank(WEIGHTS), blank(MOMENTS)
        fresh = Counter(0), Counter(0), Counter(0)
        report = manager.load(model=weights, optimizer=moments, scheduler=fresh[0], dataloader=fresh[1], extra={"ema": fresh[2]})
    assert same(weights, WEIGHTS)
    moments.pop("global_step", None)
    assert same(moments, MOMENTS)
    assert [counter.value for counter in fresh] == [3, 4, 5]
    assert report.common == common
    assert report.iteration == 10
    assert report.directory == saved.directory
    assert report.extra["note"] == "hello"
    assert report.extra[3] is None
    assert np.array_equal(report.extra["grid"], np.eye(2))
    assert set(report.restored) == {*WEIGHTS, *MOMENTS, "global_step"}
    assert report.notes == ()
    assert "tensors restored" in str(report)
    assert (Path(saved.directory) / "qwen3-model-0000000-0000001.safetensors").exists()


def test_the_tracker_decides_also_when_it_was_edited(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("10\n")
    weights = blank(WEIGHTS)
    report = reshard.load(root, model=weights)
    assert report.iteration == 10
    assert same(weights, WEIGHTS)
    assert any("20" in note for note in report.notes)


def test_one_iteration_by_its_own_path(root: Path) -> None:
    weights = blank(WEIGHTS)
    reshard.load(root / "iteration_00000010", model=weights)
    assert same(weights, WEIGHTS)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint"):
        reshard.load(tmp_path / "nowhere", model=blank(WEIGHTS))
    assert reshard.load(tmp_path / "nowhere", model=blank(WEIGHTS), missing_ok=True) is None
    assert not (tmp_path / "nowhere").exists(), "a load makes nothing"


@pytest.mark.parametrize("text", ["", "soon", "30"])
def test_a_broken_tracker_is_an_error_also_in_a_restart_loop(root: Path, text: str) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    for missing_ok in (False, True):
        with pytest.raises(TrackerError, match="latest_checkpointed_iteration"):
            reshard.load(root, model=blank(WEIGHTS), missing_ok=missing_ok)


def test_tensors_that_metadata_does_not_list_are_ignored_with_a_note(root: Path) -> None:
    metadata = root / "iteration_00000020/metadata.json"
    content = json.loads(metadata.read_text())
    del content["state_dict_metadata"]["b.bias"]
    del content["storage_data"]["('b.bias', (0,))"]
    metadata.write_text(json.dumps(content))
    seal_again(metadata.parent)
    report = reshard.load(root, model={"a.weight": blank(WEIGHTS)["a.weight"]})
    assert any("b.bias" in note for note in report.notes)
    assert report.unexpected == ()


def test_weights_only_leaves_optimizer_tensors_out_of_the_question(root: Path) -> None:
    report = reshard.load(root, model=blank(WEIGHTS))
    assert report.unexpected == ()
    assert set(report.restored) == set(WEIGHTS)


def test_a_checkpoint_without_optimizer_says_what_allows_it(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model=WEIGHTS, optimizer=MOMENTS, save_optimizer=False)
    weights, moments = blank(WEIGHTS), blank(MOMENTS)
    with pytest.raises(MismatchError, match=r"no optimizer state[\s\S]*optimizer=None[\s\S]*missing='warn'"):
        reshard.load(tmp_path, model=weights, optimizer=moments)
    assert same(weights, blank(WEIGHTS)), "nothing was changed"
    report = reshard.load(tmp_path, model=weights, optimizer=moments, strict=reshard.Strictness(missing="ignore"))
    assert same(weights, WEIGHTS)
    assert set(report.missing) >= set(MOMENTS)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (lambda w: w | {"c.weight": np.zeros(2, np.float32)}, "missing", "c.weight"),
        (lambda w: w | {"a.weight": np.zeros((4, 7), np.float32)}, "shape", r"\[4, 6\][\s\S]*\[4, 7\]"),
        (lambda w: w | {"a.weight": np.zeros((4, 6), np.float16)}, "dtype", r"float32[\s\S]*float16"),
        (lambda w: {"a.weight": w["a.weight"]}, "unexpected", "b.bias"),
    ],
)
def test_each_misfit_is_an_error_or_a_warning_or_let_pass(
    root: Path, change: Any, field: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = change(blank(WEIGHTS))
    before = {name: array.copy() for name, array in weights.items()}
    with pytest.raises(MismatchError, match=words):
        reshard.load(root, model=weights, strict=reshard.Strictness(**{field: "error"}))
    assert same(weights, before), "nothing was changed"
    with caplog.at_level(logging.WARNING, "reshard"):
        report = reshard.load(root, model=weights, strict=reshard.Strictness(**{field: "warn"}))
    assert len(caplog.records) == 1
    names = {"shape": report.mismatched, "dtype": report.mismatched, "missing": report.missing, "unexpected": report.unexpected}[field]
    assert len(names) == 1
    touched = [name for name in weights if name not in names]
    assert all(weights[name].tobytes() != before[name].tobytes() for name in touched)
    assert all(weights[name].tobytes() == before[name].tobytes() for name in names if name in weights)
    caplog.clear()
    reshard.load(root, model=weights, strict=reshard.Strictness(**{field: "ignore"}))
    assert not caplog.records


def test_a_strictness_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="missing"):
        reshard.Strictness(missing="perhaps")  # type: ignore[arg-type]


def data_file(root: Path, kind: str = "model") -> Path:
    return next((root / "iteration_00000020").glob(f"*-{kind}-*.safetensors"))


def truncate(root: Path) -> None:
    path = data_file(root)
    path.write_bytes(path.read_bytes()[:-1])


def swap(root: Path) -> None:
    shutil.copy(data_file(root, "opt"), data_file(root))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (truncate, DataFileError, "safetensors"),
        (swap, DataFileError, "longer than when it was saved"),
        (lambda root: data_file(root).unlink(), DataFileError, "safetensors"),
        (lambda root: (root / "iteration_00000020/metadata.json").write_text("{"), MetadataError, "metadata.json"),
        (lambda root: (root / "iteration_00000020/common.json").write_text("[]"), MetadataError, "common.json"),
        (lambda root: (root / "iteration_00000020/extra/global.safetensors").write_bytes(b"x" * 40), DataFileError, "global.safetensors"),
    ],
)
def test_damage_is_named_and_changes_nothing(root: Path, damage: Any, error: type[Exception], words: str) -> None:
    damage(root)
    weights = blank(WEIGHTS)
    with pytest.raises(error, match=words):
        reshard.load(root, model=weights)
    assert same(weights, blank(WEIGHTS))
    reshard.load(root / "iteration_00000010", model=weights)
    assert same(weights, WEIGHTS)


def test_the_iteration_in_use_stays_also_when_the_root_has_two_paths(root: Path, tmp_path: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    link = tmp_path / "link"
    link.symlink_to(root)
    with reshard.CheckpointManager(link, keep_checkpoint_max=1) as manager:
        manager.load(root, model=blank(WEIGHTS))
        assert manager.save(5, model=WEIGHTS).removed == (20,), "10 stays until a newer one is committed"


def test_old_checkpoints_go_over_restarts_but_not_the_one_in_use(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    with reshard.CheckpointManager(root, keep_checkpoint_max=2) as manager:
        manager.load(model=blank(WEIGHTS))
        assert manager.save(30, model=WEIGHTS).removed == (10,), "a newer one is committed: the one that was loaded may go"
        assert manager.save(40, model=WEIGHTS).removed == (20,)
    with reshard.CheckpointManager(root, keep_checkpoint_max=2) as manager:
        assert manager.save(50, model=WEIGHTS).removed == (30,)
    assert sorted(path.name for path in root.glob("iteration_*")) == ["iteration_00000040", "iteration_00000050"]
    assert (root / "latest_checkpointed_iteration.txt").read_bytes() == b"50"


def test_a_read_only_root_loads_and_does_not_save(root: Path) -> None:
    with reshard.CheckpointManager(root), reshard.CheckpointManager(root, read_only=True) as reader:
        weights = blank(WEIGHTS)
        reader.load(model=weights)
        assert same(weights, {name: array + 1 for name, array in WEIGHTS.items()})
        with pytest.raises(UsageError, match="read-only"):
            reader.save(30, model=WEIGHTS)


def test_two_writers_of_one_root(root: Path) -> None:
    with reshard.CheckpointManager(root), pytest.raises(RootLockedError, match="another run writes"):
        reshard.CheckpointManager(root, lock_timeout=0.0)


def test_random_states_come_back_to_the_same_place_only(tmp_path: Path) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the state that is saved
    reshard.save(tmp_path, 1, model=WEIGHTS)
    expected = random.random(), np.random.random()  # noqa: NPY002
    report = reshard.load(tmp_path, model=blank(WEIGHTS))
    assert report.random == "restored"
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002

    def elsewhere(comm: Communicator) -> str:
        report = reshard.load(tmp_path, model=blank(WEIGHTS), communicator=comm, reseed=None if comm.rank < 0 else 11)
        return report.random

    assert run_ranks(2, elsewhere) == ["reseeded"] * 2
    state = random.getstate()
    report = reshard.load(tmp_path, model=blank(WEIGHTS), restore_random=False)
    assert report.random == "untouched"
    assert random.getstate() == state


def test_one_rank_that_can_not_save_fails_all_and_nothing_is_committed(root: Path) -> None:
    def work(comm: Communicator) -> None:
        with reshard.CheckpointManager(root, communicator=comm) as manager:
            odd = {"odd": np.zeros(3, np.complex128 if comm.rank == 2 else np.complex64)}
            manager.save(30, model=WEIGHTS | odd)

    outcomes = run_ranks_settled(4, work)
    assert all(isinstance(outcome, CaptureError | SaveError) for outcome in outcomes)
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "rank 2" in str(outcomes[0])
    assert "odd" in str(outcomes[0])
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "20"
    assert sorted(path.name for path in root.iterdir() if not path.name.startswith(".reshard")) == [
        "iteration_00000010",
        "iteration_00000020",
        "latest_checkpointed_iteration.txt",
    ]


def test_one_rank_that_can_not_load_fails_all(root: Path) -> None:
    def work(comm: Communicator) -> Any:
        weights = blank(WEIGHTS)
        if comm.rank == 1:
            weights["a.weight"] = np.zeros((5, 6), np.float32)
        return reshard.load(root, model=weights, communicator=comm)

    outcomes = run_ranks_settled(2, work)
    assert [type(outcome) for outcome in outcomes] == [MismatchError] * 2


def test_ranks_that_let_different_things_pass_are_told_so(root: Path) -> None:
    """The one that raised left the other waiting."""

    def work(comm: Communicator) -> None:
        weights = blank(WEIGHTS) | {"c.weight": np.zeros(2, np.float32)}
        reshard.load(root, model=weights, strict=reshard.Strictness(missing="warn") if comm.rank else None, communicator=comm)

    outcomes = run_ranks_settled(2, work, timeout=20)
    assert [type(outcome) for outcome in outcomes] == [UsageError] * 2
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "strict" in str(outcomes[0])


def test_a_rank_cares_for_its_own_place_when_the_world_grows(root: Path) -> None:
    def work(comm: Communicator) -> bool:
        weights = blank(WEIGHTS)
        reshard.load(root / "iteration_00000010", model=weights, communicator=comm)
        return same(weights, WEIGHTS)

    assert run_ranks(3, work) == [True] * 3


def test_ranks_that_counted_different_steps_must_say_which_one_it_is(tmp_path: Path) -> None:
    def work(comm: Communicator, common: reshard.CommonInfo | None) -> Any:
        moments = MOMENTS | {"global_step": np.array([5 + comm.rank // 2], np.int32)}
        return reshard.save(tmp_path, 6, model=WEIGHTS, optimizer=moments, common=common, communicator=comm)

    outcomes = run_ranks_settled(4, lambda comm: work(comm, None))
    assert all(isinstance(outcome, SaveError) for outcome in outcomes)
    assert "5 on ranks 0-1; 6 on ranks 2-3" in str(outcomes[0])
    run_ranks(4, lambda comm: work(comm, reshard.CommonInfo(step_num=6, global_step=6)))
    assert reshard.Checkpoint(tmp_path)["global_step"][0] == 6


def test_what_one_rank_can_not_take_every_rank_hears_of(root: Path) -> None:
    def save(comm: Communicator) -> None:
        with reshard.CheckpointManager(root, communicator=comm) as manager:
            manager.save(30, model=dict(WEIGHTS) if comm.rank == 0 else 5)

    def load(comm: Communicator) -> None:
        reshard.load(root, model=blank(WEIGHTS) if comm.rank == 0 else 5, communicator=comm)

    for run in (save, load):
        for error in run_ranks_settled(2, run, timeout=20):
            assert isinstance(error, UsageError), error
            assert "a model of a kind that no adapter knows" in str(error)
    assert reshard.Checkpoint(root).iteration == 20


def test_a_rank_without_an_optimizer_judges_as_the_others_do(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model=WEIGHTS, optimizer=MOMENTS)
    some = {name: array for name, array in MOMENTS.items() if name.startswith("adam_m")}

    def load(comm: Communicator) -> None:
        strict = reshard.Strictness(unexpected="error")
        reshard.load(tmp_path, model=blank(WEIGHTS), optimizer=blank(some) if comm.rank else None, strict=strict, communicator=comm)

    for error in run_ranks_settled(2, load, timeout=20):
        assert isinstance(error, MismatchError), error
        assert "adam_v.a.weight" in str(error)


def test_a_closed_manager_says_so(tmp_path: Path) -> None:
    manager = reshard.CheckpointManager(tmp_path)
    manager.save(1, model=WEIGHTS)
    manager.close()
    manager.close()
    for use in (lambda: manager.save(2, model=WEIGHTS), lambda: manager.load(model=blank(WEIGHTS))):
        with pytest.raises(UsageError, match="this manager is closed"):
            use()


def test_options_that_can_not_be_leave_no_group_of_ranks_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("reshard.manager.default_communicator", lambda: made.append("a communicator"))
    with pytest.raises(UsageError, match="at least one checkpoint"):
        reshard.CheckpointManager(tmp_path, keep_checkpoint_max=0)
    assert not made


@pytest.mark.parametrize(
    ("file", "tree"),
    [
        ("global.safetensors", {"values": [1]}),
        ("global.safetensors", {"values": {1: 2}}),
        ("rank-0000000.safetensors", [1]),
        ("rank-0000000.safetensors", {"rank_values": 7}),
    ],
)
def test_extras_of_another_shape_are_damage(root: Path, file: str, tree: Any) -> None:
    path = root / "iteration_00000020" / "extra" / file
    path.unlink()
    write_extra(PosixStorage(), str(path), tree)
    seal_again(path.parent.parent)
    model = blank(WEIGHTS)
    with pytest.raises(MetadataError, match="extras can't be understood") as caught:
        reshard.load(root, model=model)
    assert str(path) in str(caught.value)
    assert same(model, blank(WEIGHTS))


def test_a_step_of_numpys_and_one_that_no_tracker_can_name(tmp_path: Path) -> None:
    reshard.save(tmp_path, int(np.int64(10**17)), model=WEIGHTS)
    report = reshard.save(tmp_path, np.int64(7), model=WEIGHTS, common=reshard.CommonInfo(consumed_samples=np.int64(9)))  # type: ignore[arg-type]
    assert report.step == 7
    with pytest.raises(UsageError, match="too large"):
        reshard.save(tmp_path, 10**18, model=WEIGHTS)
    checkpoint = reshard.Checkpoint(tmp_path)
    assert checkpoint.iteration == 7
    assert checkpoint.common == reshard.CommonInfo(consumed_samples=9)


@pytest.mark.parametrize("name", ["common.json", "extra/global.safetensors", "extra"])
def test_what_we_wrote_beside_the_tensors_and_is_gone_is_damage(root: Path, name: str) -> None:
    path = root / "iteration_00000020" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    weights = blank(WEIGHTS)
    with pytest.raises(MetadataError, match="missing") as caught:
        reshard.load(root, model=weights)
    assert caught.value.file is not None
    assert caught.value.file.startswith(str(path))
    assert same(weights, blank(WEIGHTS))
    with pytest.raises(MetadataError, match="missing"):
        reshard.Checkpoint(root)
    line = list_root(PosixStorage(), str(root)).iterations[-1]
    assert (line.iteration, line.state) == (20, "damaged")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("latest_checkpointed_iteration.txt", TrackerError),
        ("iteration_00000020/metadata.json", MetadataError),
        ("iteration_00000020/common.json", MetadataError),
    ],
)
def test_a_file_of_an_impossible_size_is_not_read(root: Path, name: str, error: type[Exception]) -> None:
    """Sparse: it takes no room on the disk, but would all the memory."""
    os.truncate(root / name, 1 << 40)
    with pytest.raises(error, match=r"larger than any of its kind[\s\S]*1099511627776 bytes"):
        reshard.load(root, model=blank(WEIGHTS))
    with pytest.raises(error, match="larger than any"):
        reshard.Checkpoint(root)
    listing = list_root(PosixStorage(), str(root))
    assert "larger than any" in str(listing.tracker_problem or listing.iterations[-1].problem)


@pytest.mark.parametrize("name", [".w", "w.", "."])
@pytest.mark.parametrize("has_metadata", [True, False])
def test_a_name_that_no_optimizer_tensor_has_is_damage(tmp_path: Path, name: str, has_metadata: bool) -> None:
    reshard.save(tmp_path, 1, model=WEIGHTS, optimizer={"m.v": np.zeros(2, np.float32)})
    directory = tmp_path / "iteration_00000001"
    unseal(directory)
    text = (directory / "metadata.json").read_text()
    (directory / "metadata.json").unlink()
    if has_metadata:
        (directory / "metadata.json").write_text(text.replace('"m.v"', f'"{name}"').replace("'m.v'", f"'{name}'"))
    else:
        (path,) = directory.glob("*-opt-*")
        path.unlink()
        save_file({name: np.zeros(2, np.float32)}, path)
    with pytest.raises(MetadataError if has_metadata else DataFileError, match="a name that no tensor has"):
        reshard.Checkpoint(tmp_path)
    with pytest.raises(MetadataError if has_metadata else DataFileError, match="a name that no tensor has"):
        reshard.load(tmp_path, model=blank(WEIGHTS))


def test_a_single_cards_checkpoint_loads_without_metadata_and_what_belongs_to_it(root: Path) -> None:
    directory = root / "iteration_00000020"
    (directory / "metadata.json").unlink()
    weights = blank(WEIGHTS)
    with pytest.raises(MetadataError, match=r"missing[\s\S]*metadata\.json[\s\S]*seal\.json"):
        reshard.load(root, model=weights)
    unseal(directory)
    reshard.load(root, model=weights)
    assert same(weights, {name: array + 1 for name, array in WEIGHTS.items()})
    shutil.rmtree(directory / "extra")
    (directory / "common.json").unlink()
    report = reshard.load(directory, model=weights)
    assert report.common is None


def test_a_checkpoint_of_another_writer_loads_without_common_information(root: Path) -> None:
    metadata = root / "iteration_00000020" / "metadata.json"
    content = json.loads(metadata.read_text())
    del content["format_version"]
    metadata.write_text(json.dumps(content))
    (metadata.parent / "seal.json").unlink()
    shutil.rmtree(metadata.parent / "extra")
    (metadata.parent / "common.json").unlink()
    report = reshard.load(root, model=blank(WEIGHTS))
    assert report.common is None


@pytest.mark.parametrize("async_save", [False, True])
def test_metrics_are_taken_in_the_call(tmp_path: Path, async_save: bool) -> None:
    """What the background reads later, the next step may have changed."""
    threads = []

    class Loss:
        def __float__(self) -> float:
            threads.append(threading.current_thread())
            return 0.5

    def save(manager: reshard.CheckpointManager, step: int, loss: object) -> None:
        manager.save(step, model=WEIGHTS, metrics={"loss": loss})
        manager.wait()

    with reshard.CheckpointManager(tmp_path, async_save=async_save) as manager:
        save(manager, 1, Loss())
        with pytest.raises(UsageError, match="a metric is a number"):
            save(manager, 2, "low")
    assert set(threads) == {threading.main_thread()}
    checkpoint = reshard.Checkpoint(tmp_path)
    assert (checkpoint.iteration, checkpoint.metrics) == (1, {"loss": 0.5})
    assert checkpoint.common is not None
    assert checkpoint.common.ckpt_status == 0


@pytest.mark.parametrize("async_save", [False, True])
def test_metrics_that_one_rank_cant_take_are_the_same_error_on_all(tmp_path: Path, async_save: bool) -> None:
    mapping = RuleMapping(run=(rename("a.weight", "kernel"),))

    def work(comm: Communicator) -> str:
        with reshard.CheckpointManager(tmp_path, communicator=comm, async_save=async_save) as manager:

            def save() -> None:
                manager.save(1, model=WEIGHTS, metrics={"loss": "low" if comm.rank else 0.5}, mapping=mapping)
                manager.wait()

            with pytest.raises(UsageError) as caught:
                save()
            return str(caught.value)

    told = run_ranks(2, work)
    assert told[0] == told[1]
    assert "on rank 1: UsageError: a metric is a number" in told[0]
