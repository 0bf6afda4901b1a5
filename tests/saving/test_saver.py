"""What a save writes, what it says, and what ranks tell each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize, safe_open

from reshard.comm import SingleProcess
from reshard.errors import CaptureError, CommunicationError, NoSpaceError, ReshardError, SaveError, UsageError
from reshard.format.common import CommonInfo
from reshard.format.digest import digest_of
from reshard.format.extra import read_extra
from reshard.geometry import Region
from reshard.geometry.dtypes import ALL, by_numpy
from reshard.planning.agreement import describe, place_of
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.state import HostMemory, ParameterGroup, Shard, ShardedTensor, State, model_key, slot_key, state_of, whole_tensor
from reshard.storage import MemoryStorage, PosixStorage
from reshard.testing import FaultyStorage, mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank
from tests import saving_runs as runs


def save_one(root: Path | str, state: State, step: int = 1, **options: object):
    with Saver(PosixStorage(), SingleProcess(), str(root), SaveOptions(**options)) as saver:
        return saver.save(step, state, CommonInfo(global_step=step))


def stored(path: Path | str) -> dict[str, np.ndarray]:
    """A file as the official library reads it."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def test_the_files_of_a_checkpoint(tmp_path):
    reports = runs.save(PosixStorage(), [(3, 30)], root=f"{tmp_path}/a/root", world_size=2)
    directory = tmp_path / "a/root/iteration_00000003"
    assert sorted(os.listdir(directory)) == [
        "CKP-model-0000000-0000002.safetensors",
        "CKP-model-0000001-0000002.safetensors",
        "CKP-opt-0000000-0000002.safetensors",
        "CKP-opt-0000001-0000002.safetensors",
        "common.json",
        "extra",
        "metadata.json",
        "seal.json",
    ]
    assert sorted(os.listdir(directory / "extra")) == [
        "global.safetensors",
        "metadata.index",
        "rank-0000000.safetensors",
        "rank-0000001.safetensors",
    ]
    assert (tmp_path / "a/root/latest_checkpointed_iteration.txt").read_bytes() == b"3"
    assert json.loads((directory / "common.json").read_text())["global_step"] == 3
    for rank in range(2):
        model = stored(directory / f"CKP-model-000000{rank}-0000002.safetensors")
        assert sorted(model) == ["embed", "norm"]
        assert np.array_equal(model["embed"], runs.whole(model_key("embed"), 30)[2 * rank : 2 * rank + 2])
        assert sorted(stored(directory / f"CKP-opt-000000{rank}-0000002.safetensors")) == ["adam_m.embed", "global_step"]
        with safe_open(directory / f"CKP-opt-000000{rank}-0000002.safetensors", "np") as file:
            metadata = file.metadata()
            assert metadata.pop("xxh3_128") == "".join(digest_of(file.get_tensor(name)).hex() for name in ("adam_m.embed", "global_step"))
            assert metadata == {"format": "ms"}
        tree = read_extra(PosixStorage(), str(directory / f"extra/rank-000000{rank}.safetensors"))
        assert tree["rank_values"]["random"].tolist() == list(range(30 + rank))
        assert tree["world_size"] == 2
        assert tree["place"] == place_of(describe(runs.state(rank, 2, 30), rank))
        (report,) = reports[rank]
        files = [directory / f"CKP-{kind}-000000{rank}-0000002.safetensors" for kind in ("model", "opt")]
        files.append(directory / f"extra/rank-000000{rank}.safetensors")
        assert report.nbytes == sum(file.stat().st_size for file in files)
        assert (report.step, report.directory, report.removed) == (3, str(directory), ())
        assert report.seconds > 0


def test_every_dtype_and_any_strides(tmp_path):
    random = np.random.default_rng(3)
    tensors = []
    wanted = {}
    for dtype in ALL:
        base = random.integers(0, 2 if dtype.name == "bool" else 100, (6, 10)).astype(dtype.numpy)
        for name, array in (
            ("plain", base),
            ("transposed", base.T),
            ("stepped", base[::2, 1::3]),
            ("reversed", base[::-1, ::-1]),
            ("broadcast", np.broadcast_to(base[0], (3, 10))),
            ("zero", base[:0]),
            ("scalar", base[1, 1].reshape(())),
        ):
            tensors.append(whole_tensor(model_key(f"{name}.{dtype}"), array))
            wanted[f"{name}.{dtype}"] = array
    save_one(tmp_path / "root", state_of(*tensors))
    from reshard.checkpoint import Checkpoint

    checkpoint = Checkpoint(tmp_path / "root")
    assert set(checkpoint) == set(wanted)
    for name, array in wanted.items():
        read = checkpoint[name].read()
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
    official = dict(deserialize((tmp_path / "root/iteration_00000001/CKP-model-0000000-0000001.safetensors").read_bytes()))
    assert set(official) == set(wanted)
    for name, array in wanted.items():
        found = official[name]
        assert (found["dtype"], found["shape"], bytes(found["data"])) == (
            by_numpy(array.dtype).safetensors,
            list(array.shape),
            array.tobytes(),
        )


def test_memory_that_has_no_host_view_is_read_once(tmp_path):
    class Device:
        host = None
        address = None

        def __init__(self) -> None:
            self.reads = 0

        def read(self) -> np.ndarray:
            self.reads += 1
            return np.array([[1, 2], [3, 4]], ml_dtypes.bfloat16)

        def write(self, region: Region, values: np.ndarray) -> None:
            raise AssertionError("a save writes no memory")

    device = Device()
    tensor = ShardedTensor(model_key("w"), by_numpy(np.dtype(ml_dtypes.bfloat16)), (2, 2), None, (Shard(Region.whole((2, 2)), device),))
    save_one(tmp_path / "root", state_of(tensor))
    assert device.reads == 1


def test_memory_that_is_not_what_the_state_says(tmp_path):
    memory = HostMemory(np.zeros(2, np.int32))
    tensor = ShardedTensor(model_key("w"), by_numpy(np.dtype(np.float32)), (2,), None, (Shard(Region.whole((2,)), memory),))
    with pytest.raises(CaptureError, match="memory doesn't fit") as caught:
        save_one(tmp_path / "root", state_of(tensor))
    assert "float32" in str(caught.value)
    assert runs.names(PosixStorage(), str(tmp_path / "root")) == [".reshard.lock"]


def test_options(tmp_path):
    state = state_of(whole_tensor(model_key("w"), np.ones(2, np.float32)), whole_tensor(slot_key("adam_m", "w"), np.ones(2, np.float32)))
    save_one(tmp_path / "a", state, prefix=None, save_optimizer=False)
    directory = tmp_path / "a/iteration_00000001"
    assert sorted(os.listdir(directory)) == ["common.json", "extra", "metadata.json", "model-0000000-0000001.safetensors", "seal.json"]
    assert list(json.loads((directory / "metadata.json").read_text())["state_dict_metadata"]) == ["w"]


def test_a_run_without_optimizer_writes_no_optimizer_files(tmp_path):
    def run(comm):
        with Saver(PosixStorage(), comm, f"{tmp_path}/root") as saver:
            saver.save(1, state_of(whole_tensor(model_key(f"w{comm.rank}"), np.ones(2, np.float32))), CommonInfo())
            late = [whole_tensor(slot_key("adam_m", "w1"), np.ones(2, np.float32))] if comm.rank else []
            saver.save(2, state_of(whole_tensor(model_key(f"w{comm.rank}"), np.ones(2, np.float32)), *late), CommonInfo())
            saver.save(3, state_of(whole_tensor(model_key(f"w{comm.rank}"), np.ones(2, np.float32)), *late), CommonInfo())

    run_ranks(2, run)
    found = {step: [n for n in os.listdir(tmp_path / f"root/iteration_0000000{step}") if "opt" in n] for step in (1, 2, 3)}
    assert found[1] == []
    assert "CKP-opt-0000001-0000002.safetensors" in found[2]
    # Every rank has one, also the one without a tensor in it.
    assert sorted(found[3]) == ["CKP-opt-0000000-0000002.safetensors", "CKP-opt-0000001-0000002.safetensors"]
    assert stored(tmp_path / "root/iteration_00000003/CKP-opt-0000000-0000002.safetensors") == {}


@pytest.mark.parametrize(
    "options",
    [
        {"keep_checkpoint_max": 0},
        {"keep_checkpoint_max": -1},
        {"keep_checkpoint_max": True},
        {"keep_checkpoint_max": 1.5},
        {"prefix": "a/b"},
        {"prefix": ""},
        {"lock_timeout": -1},
        {"lock_timeout": float("nan")},
    ],
)
def test_options_that_can_not_be(options):
    with pytest.raises(UsageError) as caught:
        SaveOptions(**options)
    assert caught.value.field == next(iter(options))


@pytest.mark.parametrize("step", [-1, "3", 1.0, None])
def test_a_step_that_can_not_be(step):
    def run(comm):
        with Saver(storage, comm, runs.ROOT) as saver:
            saver.save(step, runs.state(comm.rank, 2, 1), CommonInfo())

    storage = MemoryStorage()
    for result in run_ranks_settled(2, run):
        assert isinstance(result, UsageError)
        assert repr(step) in str(result)
    assert runs.names(storage) == [".reshard.lock"]


@pytest.mark.parametrize(
    "common",
    [CommonInfo(loss_scale=float("nan")), CommonInfo(global_step=-1), CommonInfo(epoch_num=1.5), CommonInfo(loss_scale=np.float32(1))],
)
def test_training_information_that_the_file_can_not_hold(tmp_path, common):
    with Saver(PosixStorage(), SingleProcess(), f"{tmp_path}/root") as saver, pytest.raises(UsageError, match=r"common\.json"):
        saver.save(1, State(), common)


def test_a_numpy_integer_is_a_step(tmp_path):
    with Saver(PosixStorage(), SingleProcess(), f"{tmp_path}/root") as saver:
        assert saver.save(np.int64(5), State(), CommonInfo()).step == 5


def test_a_relative_root_is_refused():
    with pytest.raises(UsageError, match="absolute"):
        Saver(MemoryStorage(), SingleProcess(), "output/checkpoint")


def test_a_closed_saver_is_closed():
    saver = Saver(MemoryStorage(), SingleProcess(), runs.ROOT)
    saver.close()
    saver.close()
    with pytest.raises(UsageError, match="closed"):
        saver.save(1, State(), CommonInfo())


def test_a_changed_structure_is_in_the_metadata():
    storage = MemoryStorage()

    def run(comm):
        with Saver(storage, comm, runs.ROOT, SaveOptions(keep_checkpoint_max=None)) as saver:
            for step, part in ((1, 2), (2, 3), (3, 3)):
                regions = (Region((0,), (part,)), Region((part,), (6 - part,)))
                region = regions[comm.rank]
                memory = HostMemory(np.arange(6, dtype=np.float32)[region.slices] + step)
                tensor = ShardedTensor(model_key("w"), by_numpy(np.dtype(np.float32)), (6,), None, (Shard(region, memory),))
                saver.save(step, state_of(tensor), CommonInfo())

    run_ranks(2, run)
    from reshard.checkpoint import Checkpoint

    for step, part in ((1, 2), (2, 3), (3, 3)):
        view = Checkpoint(f"{runs.ROOT}/iteration_0000000{step}", storage)["w"]
        assert view.read().tolist() == [i + step for i in range(6)]
        assert [chunk.region.shape[0] for chunk in view.chunks] == [part, 6 - part]


def failing(world_size, error_of):
    storage = MemoryStorage()

    def run(comm):
        with Saver(storage, comm, runs.ROOT) as saver:
            saver.save(4, runs.state(comm.rank, comm.world_size, 4), CommonInfo(), error_of(comm.rank))

    results = run_ranks_settled(world_size, run)
    assert runs.names(storage) == [".reshard.lock"]
    assert len({(type(result), str(result)) for result in results}) == 1
    return results


def test_an_error_before_the_save_is_everybodys():
    results = failing(4, lambda rank: CaptureError("no such thing", tensor=f"w{rank // 3}") if rank else None)
    assert isinstance(results[0], CaptureError)
    text = str(results[0])
    assert "3 of 4 ranks failed" in text
    assert "on ranks 1-2: CaptureError: no such thing" in text
    assert "on rank 3: CaptureError: no such thing" in text
    assert results[0].__cause__ is None
    assert isinstance(results[1].__cause__, CaptureError)


def test_the_kind_of_a_failure():
    space, capture, other = NoSpaceError("full"), CaptureError("what"), ReshardError("defect")
    cases = (([space, capture], NoSpaceError), ([capture, other], SaveError), ([capture, None], CaptureError), ([None, other], SaveError))
    for given, kind in cases:
        assert type(failing(2, lambda rank, given=given: given[rank])[0]) is kind


def test_ranks_that_disagree_over_the_step():
    storage = MemoryStorage()

    def run(comm):
        with Saver(storage, comm, runs.ROOT) as saver:
            saver.save(4 if comm.rank == 1 else 5, runs.state(comm.rank, 3, 1), CommonInfo())

    for result in run_ranks_settled(3, run):
        assert type(result) is SaveError
        assert "5 on ranks 0, 2; 4 on rank 1" in str(result)
    assert runs.names(storage) == [".reshard.lock"]


def test_ranks_that_disagree_over_a_shape():
    storage = MemoryStorage()

    def run(comm):
        with Saver(storage, comm, runs.ROOT) as saver:
            saver.save(1, state_of(whole_tensor(model_key("w"), np.zeros(2 + comm.rank, np.float32))), CommonInfo())

    for result in run_ranks_settled(2, run):
        assert type(result) is CaptureError
        assert "different shapes" in str(result)
        assert "w" in str(result)
    assert runs.names(storage) == [".reshard.lock"]


def test_parts_that_are_missing_are_found_at_the_save():
    def run(comm):
        layout = split(mesh_of(dp=3), "dp")
        with Saver(storage, comm, runs.ROOT) as saver:
            tensor = tensor_on_rank(model_key("w"), np.arange(6.0), layout, comm.rank)
            saver.save(1, state_of(tensor), CommonInfo())

    storage = MemoryStorage()
    for result in run_ranks_settled(2, run):
        assert "4 of 6 elements" in str(result)


@pytest.mark.parametrize("has_root", [True, False])
def test_ranks_that_do_not_share_the_storage(has_root):
    one, two = MemoryStorage(), MemoryStorage()
    if has_root:
        two.make_directory(runs.ROOT)

    def run(comm):
        with Saver((one, two)[comm.rank], comm, runs.ROOT) as saver:
            saver.save(1, runs.state(comm.rank, 2, 1), CommonInfo())

    for result in run_ranks_settled(2, run):
        assert type(result) is SaveError
        assert "all ranks share" in str(result)
        assert "rank:     1" in str(result) or "on rank 1" in str(result)
    assert runs.names(one) == [".reshard.lock"]


def test_an_extra_that_can_not_be_saved_names_its_path(tmp_path):
    with Saver(PosixStorage(), SingleProcess(), f"{tmp_path}/root") as saver:
        wrong = {"x": [1, object()]}
        for state in (State(values={"extra": wrong}), State(rank_values=wrong), State(groups=(ParameterGroup(wrong, ()),))):
            with pytest.raises(ReshardError, match=r"x\[1\]"):
                saver.save(1, state, CommonInfo())
        assert runs.names(PosixStorage(), f"{tmp_path}/root") == [".reshard.lock"]
        saver.save(1, State(), CommonInfo())


def test_what_is_durable_before_it_gets_its_name():
    """Every file and every directory is synced after its last change and before the rename, the rename before the tracker."""
    storage = MemoryStorage()
    logs = [FaultyStorage(storage), FaultyStorage(storage)]
    runs.save(list(logs), [(1, 10)])
    log = logs[0].log
    rename = next(i for i, (name, path) in enumerate(log) if name == "rename")
    replace = next(i for i, (name, path) in enumerate(log) if name == "replace")
    temporary = log[rename][1]
    for own in logs:
        synced: set[str] = set()
        for name, path in own.log[: rename if own is logs[0] else None]:
            if name in ("create", "write_at"):
                synced.discard(path)
                synced.discard(path.rpartition("/")[0])
            elif name == "write_bytes":
                synced.discard(path.rpartition("/")[0])
            elif name in ("sync", "sync_directory"):
                synced.add(path)
        created = {path for name, path in own.log if name == "create" and path.startswith(temporary)}
        assert len(created) >= 3
        assert created <= synced
        assert {temporary, f"{temporary}/extra"} <= synced
    assert ("sync_directory", runs.ROOT) in log[rename:replace]
    assert ("sync_directory", runs.ROOT) in log[replace:]
    assert [path for name, path in log[:rename] if name == "write_bytes"][-1].startswith(f"{runs.ROOT}/.saving-tracker-")


def test_a_rank_that_is_gone_is_no_hang():
    storage = MemoryStorage()

    def run(comm):
        with Saver(storage, comm, runs.ROOT) as saver:
            if comm.rank == 1:
                raise KeyboardInterrupt
            saver.save(1, runs.state(comm.rank, 2, 1), CommonInfo())

    results = run_ranks_settled(2, run, timeout=20)
    assert isinstance(results[0], CommunicationError)
    assert isinstance(results[1], KeyboardInterrupt)


@pytest.mark.parametrize("broken", ["merge_groups", "failure_of_ranks", "publish", "write_rank", "encode_options"])
def test_a_defect_is_everybodys_error_and_no_hang(monkeypatch, broken):
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("a defect")

    storage = MemoryStorage()
    monkeypatch.setattr(f"reshard.saving.saver.{broken}", fail)
    for result in runs.save(storage, [(1, 10)], world_size=2, settled=True):
        assert type(result) is SaveError
        assert "RuntimeError: a defect" in str(result)
    assert not [name for name in runs.names(storage) if name.startswith("iteration")]
    monkeypatch.undo()
    runs.save(storage, [(1, 10)], world_size=2)
    assert runs.committed(storage) == {1: 10}


def test_nothing_at_all_can_be_saved(tmp_path):
    report = save_one(tmp_path / "root", State())
    assert report.nbytes > 0
    from reshard.checkpoint import Checkpoint

    assert list(Checkpoint(tmp_path / "root")) == []


def test_a_rank_that_another_version_runs_on_leaves_nobody_waiting(monkeypatch):
    storage = MemoryStorage()
    monkeypatch.setattr("reshard.saving.structure.encode", lambda description: b"\x01of another version")
    results = runs.save(storage, [(1, 10)], world_size=2, settled=True)
    assert [type(result) for result in results] == [SaveError] * 2
    assert "the same version of reshard on every rank" in str(results[1])
