"""Files of several ranks, under the strategy that cut them: the whole tensors are those that were cut, and those that MindSpore merges."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.comm import Communicator
from reshard.conversion import convert
from reshard.errors import DataFileError, MetadataError, ReshardError, UsageError
from reshard.format.names import tensor_name
from reshard.geometry import Layout, Mesh
from reshard.state import Kind, TensorKey
from reshard.testing import differences, mesh_of, run_ranks, split, state_on_rank
from tests.sources.legacy.runs import Cut, arrays_of, strategy_bytes, write_ranks, write_strategy

BOTH = {"dp": 2, "tp": 2}
# A data-parallel axis and a tensor-parallel one: columns, rows, whole, and moments of them.
PLAIN = {
    "up.weight": Cut((8, 6), (2, 2), (0, -1)),
    "down.weight": Cut((6, 8), (2, 2), (-1, 0)),
    "norm.weight": Cut((6,), (2, 2), (-1,), dtype="float16"),
    "adam_m.up.weight": Cut((8, 6), (2, 2), (0, -1)),
    "adam_v.up.weight": Cut((8, 6), (2, 2), (0, -1)),
}
# The optimizer cuts what data parallelism would repeat: all of it, or over pairs of ranks.
SHARDED = {
    "up.weight": Cut((16, 6), (2, 2), (0, -1), -1),
    "down.weight": Cut((8, 8), (2, 2), (-1, 0), -1),
    "norm.weight": Cut((8,), (2, 2), (-1,), -1),
    "bias": Cut((6,), (2, 2), (-1,)),
}
PAIRS = {
    "up.weight": Cut((16, 6), (4, 2), (0, -1), 2),
    "norm.weight": Cut((8,), (4, 2), (-1,), 4),
    "down.weight": Cut((8, 8), (4, 2), (-1, 0), 4),
}
# Three axes, one dimension split by two of them, in either order; and the optimizer's cut over an axis in between.
NESTED = {
    "a": Cut((16, 3), (2, 2, 2), ((2, 0), (-1,))),
    "b": Cut((2, 16), (2, 2, 2), ((-1,), (0, 1))),
    "c": Cut((16, 4), (2, 2, 2), ((2,), (0,)), -1),
    "d": Cut((8, 2), (2, 2, 2), ((1, 2), (-1,)), 2),
}
PIPELINE = {
    "first.weight": Cut((8, 6), (2, 2), (0, -1)),
    "second.weight": Cut((4, 6), (2, 2), (-1, -1), 2, (1,)),
    "shared.weight": Cut((4, 4), (2, 2), (1, -1), 0, (0, 1)),
}
ONE_EACH = {"a": Cut((4, 3), (1,), (-1, -1)), "b": Cut((2,), (1,), (-1,), stages=(1,))}
CASES = {"plain": PLAIN, "sharded": SHARDED, "pairs": PAIRS, "nested": NESTED, "pipeline": PIPELINE, "one rank a stage": ONE_EACH}
each_case = pytest.mark.parametrize("cuts", CASES.values(), ids=CASES.keys())

STEP = {"global_step": np.array([3], np.int32), "learning_rate": np.float32(0.5)}


class Run:
    """A checkpoint of all ranks and its strategy files."""

    def __init__(self, directory: Path, cuts: dict[str, Cut], **how: Any) -> None:
        self.cuts = cuts
        self.directory = directory / "checkpoint"
        self.arrays = arrays_of(cuts)
        self.ranks = write_ranks(self.directory, cuts, self.arrays, beside=STEP, **how)
        self.strategy = write_strategy(directory / "strategy", cuts)
        self.source = reshard.SavedUnder(self.directory, self.strategy)


@pytest.mark.parametrize("redundant", [True, False])
@each_case
def test_the_whole_is_what_was_cut(tmp_path: Path, cuts: dict[str, Cut], redundant: bool) -> None:
    run = Run(tmp_path, cuts, redundant=redundant)
    checkpoint = reshard.Checkpoint(run.source)
    assert set(checkpoint) == {*cuts, *STEP}
    for name, array in run.arrays.items():
        assert checkpoint[name].read().tobytes() == array.tobytes(), name
        if array.ndim == 2:
            assert checkpoint[name][1:-1, ::2].tobytes() == np.ascontiguousarray(array[1:-1, ::2]).tobytes(), name
    assert checkpoint["global_step"].read().tolist() == [3]
    assert checkpoint.common == reshard.CommonInfo(step_num=3, global_step=3)
    assert checkpoint.check() == ()
    assert any("global_step" in note and "learning_rate" in note for note in checkpoint.notes)


@pytest.mark.parametrize("suffix", ["ckpt", "json"])
@each_case
def test_strategy_files_of_either_kind_and_merged(tmp_path: Path, cuts: dict[str, Cut], suffix: str) -> None:
    run = Run(tmp_path, cuts, suffix="ckpt")
    files = write_strategy(tmp_path / "other", cuts, suffix=suffix)
    sources = [files]
    if suffix == "ckpt":
        mindspore.merge_pipeline_strategys(str(files), str(tmp_path / "merged.ckpt"))
        sources.append(tmp_path / "merged.ckpt")
    for source in sources:
        checkpoint = reshard.Checkpoint(reshard.SavedUnder(run.directory, source))
        for name, array in run.arrays.items():
            assert checkpoint[name].read().tobytes() == array.tobytes(), name


@each_case
def test_mindspore_merges_the_same(tmp_path: Path, cuts: dict[str, Cut], monkeypatch: pytest.MonkeyPatch) -> None:
    # It binds the process to all cores, and prints a bar.
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    run = Run(tmp_path, cuts)
    mindspore.merge_pipeline_strategys(str(run.strategy), str(tmp_path / "merged.ckpt"))
    mindspore.unified_safetensors(str(run.directory), str(tmp_path / "merged.ckpt"), str(tmp_path / "whole"))
    merged = {name: array for file in (tmp_path / "whole").glob("part*.safetensors") for name, array in load_file(file).items()}
    checkpoint = reshard.Checkpoint(run.source)
    assert set(merged) == set(cuts)
    for name, array in merged.items():
        assert checkpoint[name].shape == array.shape
        assert checkpoint[name].read().tobytes() == array.tobytes(), name


def test_columns_and_rows_that_the_optimizer_cut(tmp_path: Path) -> None:
    """Both dimensions are split, the first by the inner axis. MindSpore 2.10 merges this one in another order than it reads the same cut
    without the optimizer's: the mesh says where a part lies.
    """
    run = Run(tmp_path, {"w": Cut((16, 8), (2, 2, 2), (0, 1), -1)})
    assert reshard.Checkpoint(run.source)["w"].read().tobytes() == run.arrays["w"].tobytes()


TARGETS: dict[str, Callable[[int], Layout]] = {
    "one rank": lambda dimensions: split(mesh_of(dp=1), *[None] * dimensions),
    "rows over three": lambda dimensions: split(mesh_of(dp=3), *["dp", None, None][:dimensions]),
    "columns over four": lambda dimensions: split(mesh_of(tp=4), *[None, "tp"][:dimensions] if dimensions > 1 else ["tp"] * dimensions),
}


@pytest.mark.parametrize("balanced", [False, True])
@each_case
def test_ranks_of_another_strategy_load_it(tmp_path: Path, cuts: dict[str, Cut], balanced: bool) -> None:
    run = Run(tmp_path, cuts, suffix="ckpt")
    stored = reshard.Checkpoint(run.source)
    arrays = {stored[name].key: run.arrays.get(name, np.asarray(STEP.get(name))) for name in stored}
    for what, layout in TARGETS.items():
        placed = {key: layout(array.ndim) for key, array in arrays.items()}

        def load(comm: Communicator, placed: dict[TensorKey, Layout] = placed) -> list[str]:
            state = state_on_rank(arrays, placed, comm.rank, blank=True)
            kinds = {kind: {tensor_name(k): t for k, t in state.tensors.items() if k.kind is kind} for kind in Kind}
            report = reshard.load(
                run.source, communicator=comm, model=kinds[Kind.MODEL], optimizer=kinds[Kind.OPTIMIZER], balanced=balanced
            )
            assert (report.missing, report.unexpected) == ((), ())
            return differences(arrays, state)

        ranks = len(layout(1).mesh.ranks)
        assert run_ranks(ranks, load) == [[]] * ranks, what


def test_moments_are_the_optimizers(tmp_path: Path) -> None:
    checkpoint = reshard.Checkpoint(Run(tmp_path, PLAIN).source)
    keys = {name: checkpoint[name].key for name in checkpoint}
    assert keys["adam_m.up.weight"] == TensorKey(Kind.OPTIMIZER, "adam_m", "up.weight")
    assert keys["up.weight"] == TensorKey(Kind.MODEL, None, "up.weight")
    assert keys["global_step"].kind is Kind.OPTIMIZER


def test_converted_it_needs_no_strategy(tmp_path: Path) -> None:
    run = Run(tmp_path, PIPELINE, redundant=False)
    done = convert(run.source, tmp_path / "root")
    assert done.iteration == 3
    assert reshard.verify(tmp_path / "root").is_intact
    checkpoint = reshard.Checkpoint(tmp_path / "root")
    for name, array in run.arrays.items():
        assert checkpoint[name].read().tobytes() == array.tobytes(), name


TABLES: dict[str, dict[str, Any]] = {
    "mappings": {
        "*up.weight": {"device_matrix": [2, 2], "tensor_map": [0, -1]},
        "down.*": {"device_matrix": [2, 2], "tensor_map": [-1, 0], "alias_name": ["dp", "tp"], "rank_list": [0, 1, 2, 3]},
        "*norm*": None,
    },
    "layouts": {
        "*up.weight": split(mesh_of(dp=2, tp=2), "tp", None),
        "down.weight": [split(mesh_of(dp=2, tp=2), None, "tp"), "Float32", (6, 8)],
        "norm.weight": Layout.replicated(Mesh((4,), ("dp",), (0, 1, 2, 3)), 1),
    },
    "layouts of MindSpore": {
        "*up.weight": mindspore.Layout((2, 2), ("dp", "tp"))("tp", "None"),
        "down.weight": mindspore.Layout((2, 2), ("dp", "tp"))("None", "tp"),
        "*": None,
    },
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_table_of_layouts(tmp_path: Path, table: dict[str, Any]) -> None:
    run = Run(tmp_path, PLAIN)
    sources: list[Any] = [table]
    if table is TABLES["mappings"]:
        (tmp_path / "table.json").write_text(json.dumps(table))
        sources.append(tmp_path / "table.json")
    for source in sources:
        checkpoint = reshard.Checkpoint(reshard.SavedUnder(run.directory, source))
        for name, array in run.arrays.items():
            assert checkpoint[name].read().tobytes() == array.tobytes(), name


def test_a_table_knows_stages_and_the_optimizers_cut(tmp_path: Path) -> None:
    run = Run(tmp_path, PIPELINE)
    table = {
        "second.*": {"device_matrix": [2, 2], "tensor_map": [-1, -1], "opt_weight_shard_size": 2},
        "shared.*": {"device_matrix": [2, 2], "tensor_map": [1, -1]},
        "first.*": {"device_matrix": [2, 2], "tensor_map": [0, -1]},
    }
    checkpoint = reshard.Checkpoint(reshard.SavedUnder(run.directory, table))
    for name, array in run.arrays.items():
        assert checkpoint[name].read().tobytes() == array.tobytes(), name


def test_the_newest_save_of_all_ranks_is_taken_or_the_one_that_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    newer = arrays_of(PLAIN, seed=1)
    write_ranks(run.directory, PLAIN, newer, save="1_20")
    torn = run.directory / "rank_2" / "net_rank_2-2_1.safetensors"
    shutil.copy(run.directory / "rank_2" / "net_rank_2-1_20.safetensors", torn)
    checkpoint = reshard.Checkpoint(run.source)
    assert checkpoint["up.weight"].read().tobytes() == newer["up.weight"].tobytes()
    assert any("newest of 2 saves" in note for note in checkpoint.notes)
    assert any("epoch 2, step 1" in note for note in checkpoint.notes)
    named = reshard.SavedUnder(run.directory / "rank_1" / "net_rank_1-1_3.safetensors", run.strategy)
    assert reshard.Checkpoint(named)["up.weight"].read().tobytes() == run.arrays["up.weight"].tobytes()
    with pytest.raises(DataFileError, match="ranks 0, 1, 3"):
        reshard.Checkpoint(reshard.SavedUnder(torn, run.strategy))


def test_one_rank_needs_no_strategy(tmp_path: Path) -> None:
    cuts = {"w": Cut((4, 3), (1,), (-1, -1))}
    arrays = arrays_of(cuts)
    write_ranks(tmp_path / "ckpt", cuts, arrays)
    for path in (tmp_path / "ckpt", tmp_path / "ckpt" / "rank_0", tmp_path / "ckpt" / "rank_0" / "net_rank_0-1_3.safetensors"):
        assert reshard.Checkpoint(path)["w"].read().tobytes() == arrays["w"].tobytes()


def test_several_ranks_without_a_strategy(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    for path in (run.directory, run.directory / "rank_1"):
        with pytest.raises(UsageError, match=r"4 ranks(.|\n)*strategy(.|\n)*SavedUnder") as caught:
            reshard.Checkpoint(path)
        assert str(run.strategy) in str(caught.value)


def refused(run: Run, strategy: Any = None) -> str:
    with pytest.raises(ReshardError) as caught:
        reshard.Checkpoint(reshard.SavedUnder(run.directory, run.strategy if strategy is None else strategy))
    error = caught.value
    assert type(error) is not ReshardError
    assert error.fix is not None
    return str(error)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, SHARDED)
    shutil.rmtree(run.directory / "rank_2")
    words = refused(run)
    assert "down.weight" in words
    assert "in the file of rank 2" in words
    assert "1 of 4 parts missing; the first at [4, 0] of [8, 8]" in words


def test_the_strategy_of_another_run(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    assert "part of a tensor is in no file" in refused(run, write_strategy(tmp_path / "a", PAIRS))
    other = {name: Cut(cut.shape, (2, 2), cut.tensor_map, stages=(1,)) for name, cut in PLAIN.items()}
    (tmp_path / "stage1.ckpt").write_bytes(strategy_bytes(other, 1))
    assert "on other ranks" in refused(run, tmp_path / "stage1.ckpt")
    flat = {name: Cut((6,), (2, 2), (-1,)) for name in PLAIN}
    assert "another number of dimensions" in refused(run, write_strategy(tmp_path / "b", flat))


def test_what_the_strategy_lacks_is_not_guessed(tmp_path: Path) -> None:
    cuts = {"big": Cut((512, 128), (2, 1), (1, -1)), "small": Cut((4,), (2, 1), (1,))}
    run = Run(tmp_path, cuts)
    only_small = {name: cut for name, cut in cuts.items() if name == "small"}
    only_big = {name: cut for name, cut in cuts.items() if name == "big"}
    assert "says nothing of a tensor that several ranks have" in refused(run, write_strategy(tmp_path / "a", only_small))
    words = refused(run, write_strategy(tmp_path / "b", only_big))
    assert "different values" in words
    assert "rank_1" in words
    assert "small" in words


def test_ranks_whose_parts_do_not_fit_together(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    shutil.rmtree(run.directory / "rank_3")
    other = Run(tmp_path / "other", PLAIN | {"up.weight": Cut((4, 6), (2, 2), (0, -1))})
    shutil.copytree(other.directory / "rank_3", run.directory / "rank_3")
    words = refused(run)
    assert "don't fit together" in words
    assert "rank_3" in words


def test_strategy_files_that_contradict_each_other(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    other = PLAIN | {"up.weight": Cut((8, 6), (2, 2), (1, -1))}
    (run.strategy / "ckpt_strategy_rank_9.ckpt").write_bytes(strategy_bytes(other, 0))
    words = refused(run)
    assert "contradict" in words
    assert "ckpt_strategy_rank_9.ckpt" in words


def test_files_of_different_runs_are_not_one_save(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    for path in run.directory.glob("rank_1/*"):
        path.rename(path.with_name(f"other{path.name[path.name.rindex('-') :]}"))
    with pytest.raises(UsageError, match=r"those of different runs(.|\n)*rank_1(.|\n)*as of rank 0"):
        reshard.Checkpoint(run.source)


def test_a_rank_s_folder_of_weights_is_one_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "rank_0"
    folder.mkdir()
    for number in (1, 2):
        save_file({f"w{number}": np.full(3, number, np.float32)}, folder / f"model-0000{number}-of-00002.safetensors")
    places = {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert reshard.Checkpoint(folder)["w2"][:].tolist() == [2, 2, 2]


def test_names_that_do_not_say_which_save_is_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    for rank in range(run.ranks):
        directory = run.directory / f"rank_{rank}"
        for name in ("best", "last"):
            shutil.copy(directory / f"net_rank_{rank}-1_3.safetensors", directory / f"{name}_rank_{rank}.safetensors")
        (directory / f"net_rank_{rank}-1_3.safetensors").unlink()
    assert "best_rank_*.safetensors" in refused(run)
    named = reshard.SavedUnder(run.directory / "rank_0" / "best_rank_0.safetensors", run.strategy)
    assert reshard.Checkpoint(named)["up.weight"].read().tobytes() == run.arrays["up.weight"].tobytes()


def test_a_rank_that_has_more_than_its_own_is_told_of(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    extra = run.directory / "rank_4"
    extra.mkdir()
    shutil.copy(run.directory / "rank_3" / "net_rank_3-1_3.safetensors", extra / "net_rank_4-1_3.safetensors")
    checkpoint = reshard.Checkpoint(run.source)
    assert any("up.weight on 4" in note for note in checkpoint.notes)
    assert checkpoint["up.weight"].read().tobytes() == run.arrays["up.weight"].tobytes()


@pytest.mark.parametrize(
    "entry",
    [
        3,
        [1, 2, 3],
        {"tensor_map": [0]},
        {"device_matrix": [2.5], "tensor_map": [0]},
        {"device_matrix": [2], "tensor_map": [0], "alias_name": 5},
        {"device_matrix": [2], "tensor_map": [0], "alias_name": "dp"},
        {"device_matrix": [2], "tensor_map": [0], "rank_list": [0, 0]},
        {"device_matrix": [2], "tensor_map": [0], "rank_list": [-1, 0]},
    ],
)
def test_a_table_of_something_else(tmp_path: Path, entry: Any) -> None:
    run = Run(tmp_path, ONE_EACH)
    with pytest.raises(UsageError, match=r"not a (layout|list of ranks)"):
        reshard.Checkpoint(reshard.SavedUnder(run.directory, {"*": entry}))


def test_metadata_errors_come_from_strategy_files(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAIN)
    (run.strategy / "ckpt_strategy_rank_0.ckpt").write_bytes(b"")
    with pytest.raises(MetadataError, match=r"ckpt_strategy_rank_0\.ckpt"):
        reshard.Checkpoint(run.source)
