"""A checkpoint becomes a folder that other programs open: the same bytes, whoever saved and whoever exports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

import reshard
from reshard.comm import Communicator
from reshard.errors import DamagedCheckpointError, MismatchError, ReshardError, UsageError
from reshard.export.sharding import ExportTensor, parse_size, plan_shards, share_out
from reshard.export.values import cut
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.state import model_key
from reshard.testing import mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank

CONFIG = {"model_type": "tiny", "tie_word_embeddings": False}
SHAPES = {
    "model.embed_tokens.weight": (24, 8),
    **{f"model.layers.{n}.mlp.weight": (8, 12) for n in range(12)},
    "model.norm.weight": (8,),
    "lm_head.weight": (24, 8),
}
SPLITS: Mapping[str, tuple[str | None, ...]] = {"embed": ("tp", "dp"), "mlp": ("dp", "tp"), "norm": (None,), "lm_head": ("tp", None)}


def whole(name: str) -> np.ndarray:
    generator = np.random.default_rng(list(name.encode()))
    return generator.standard_normal(SHAPES[name]).astype(np.float32)


def save(root: Path, dp: int = 1, tp: int = 1, extra: Any = {"config": CONFIG}, **other: np.ndarray) -> Path:  # noqa: B006 - never changed
    """A root with one iteration of the model, saved by dp × tp ranks."""
    mesh = mesh_of(dp=dp, tp=tp)

    def rank(communicator: Communicator) -> None:
        model: dict[str, Any] = {}
        for name in SHAPES:
            key, array = model_key(name), other.get(name.partition(".")[0], whole(name))
            placed = next(axes for part, axes in SPLITS.items() if part in name)
            model[name] = tensor_on_rank(key, array, split(mesh, *placed), communicator.rank)
        reshard.save(root, 3, model=model, extra=extra, communicator=communicator)

    run_ranks(dp * tp, rank)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def export(ranks: int, source: Path, folder: Path, **options: Any) -> list[reshard.ExportReport]:
    return run_ranks(ranks, lambda comm: reshard.export_checkpoint(source, folder, communicator=comm, **options))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def expected(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of what one rank saved."""
    folder = tmp_path_factory.mktemp("expected") / "folder"
    export(1, root, folder, max_shard_size="1KB")
    return contents(folder)


def test_the_official_library_finds_every_value(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    report = export(1, root, folder, max_shard_size="1KB")[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == SHAPES.keys()
    assert index["metadata"]["total_size"] == report.nbytes == sum(whole(name).nbytes for name in SHAPES)
    assert set(report.files) == set(index["weight_map"].values()) == {n.name for n in folder.glob("*.safetensors")}
    found = {}
    for file in report.files:
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                assert index["weight_map"][name] == file
                found[name] = opened.get_tensor(name).numpy()
            assert sum(found[name].nbytes for name in opened.keys()) <= 1000  # noqa: SIM118
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], whole(name))
    assert json.loads((folder / "config.json").read_text()) == {**CONFIG, "dtype": "float32"}


@pytest.mark.parametrize(("dp", "tp", "ranks"), [(1, 1, 3), (2, 2, 1), (2, 3, 4), (4, 1, 2)])
def test_strategy_and_ranks_change_no_byte(expected: dict[str, bytes], tmp_path: Path, dp: int, tp: int, ranks: int) -> None:
    source = save(tmp_path / "root", dp, tp)
    reports = export(ranks, source, tmp_path / "folder", max_shard_size="1KB")
    assert contents(tmp_path / "folder") == expected
    assert {(report.files, report.nbytes) for report in reports} == {(reports[0].files, reports[0].nbytes)}
    assert sorted(os.listdir(tmp_path)) == ["folder", "root"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_running_model_gives_the_same_bytes(expected: dict[str, bytes], tmp_path: Path, ranks: int) -> None:
    mesh = mesh_of(dp=ranks, tp=1)

    def rank(communicator: Communicator) -> None:
        model = {
            name: tensor_on_rank(model_key(name), whole(name), split(mesh, *(["dp", None][: len(shape)])), communicator.rank)
            for name, shape in SHAPES.items()
            if len(shape) > 1
        }
        model["model.norm.weight"] = tensor_on_rank(
            model_key("model.norm.weight"), whole("model.norm.weight"), split(mesh, None), communicator.rank
        )
        with reshard.CheckpointManager(tmp_path / "root", communicator=communicator) as manager:
            manager.export(tmp_path / "folder", model=model, config=CONFIG, max_shard_size="1KB")
            with pytest.raises(ReshardError, match="no checkpoint"):
                manager.export(tmp_path / "other")

    run_ranks(ranks, rank)
    assert contents(tmp_path / "folder") == expected
    assert not list(tmp_path.glob(".exporting*"))


def test_conversion_rounds_as_torch_does(root: Path, tmp_path: Path) -> None:
    report = export(2, root, tmp_path / "folder", dtype="bfloat16")[0]
    assert report.files == ("model.safetensors",)
    assert len(report.cast) == len(SHAPES)
    checkpoint = reshard.Checkpoint(tmp_path / "folder")
    assert checkpoint.config == {**CONFIG, "dtype": "bfloat16"}
    for name in SHAPES:
        wanted = torch.from_numpy(whole(name)).to(torch.bfloat16).view(torch.int16).numpy()
        np.testing.assert_array_equal(checkpoint[name][...].view(np.int16), wanted)


def test_tied_output_is_not_written_again(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    source = save(tmp_path / "root", extra={"config": tied}, lm_head=whole("model.embed_tokens.weight"))
    report = export(2, source, tmp_path / "folder")[0]
    assert set(reshard.Checkpoint(tmp_path / "folder")) == SHAPES.keys() - {"lm_head.weight"}
    assert any("lm_head.weight is model.embed_tokens.weight" in note for note in report.notes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_tied_output_that_differs_is_not_lost_in_silence(root: Path, tmp_path: Path, ranks: int) -> None:
    with pytest.raises(MismatchError, match=r"lm_head\.weight"):
        export(ranks, root, tmp_path / "folder", config={**CONFIG, "tie_word_embeddings": True})
    assert os.listdir(tmp_path) == []


def test_no_configuration(tmp_path: Path) -> None:
    source = save(tmp_path / "root", extra=None)
    with pytest.raises(UsageError, match=r"--config PATH"):
        export(2, source, tmp_path / "folder")
    for wrong in ({}, {"model_type": 3}, tmp_path / "nowhere.json"):
        with pytest.raises(UsageError):
            export(1, source, tmp_path / "folder", config=wrong)
    (tmp_path / "my.json").write_text(json.dumps(CONFIG))
    export(1, source, tmp_path / "folder", config=tmp_path / "my.json")
    export(1, source, tmp_path / "again", config=tmp_path / "folder")
    assert contents(tmp_path / "folder") == contents(tmp_path / "again")


def test_what_is_there_is_replaced_only_when_it_is_weights_and_that_is_wished(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    export(1, root, folder, max_shard_size="1KB")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="not empty"):
        export(1, root, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    export(2, root, folder, force=True)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    for path in (tmp_path / "letters", root, root / "iteration_00000003", root.parent):
        with pytest.raises(UsageError):
            export(1, root, path, force=True)
    with pytest.raises(UsageError, match="take the place"):
        export(1, folder, folder, force=True)
    (tmp_path / "empty").mkdir()
    export(1, folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("ranks", [1, 3])
def test_damage_leaves_nothing_behind(tmp_path: Path, ranks: int) -> None:
    source = save(tmp_path / "root", 2, 2)
    file = min((source / "iteration_00000003").glob("*model*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    outcomes = run_ranks_settled(ranks, lambda comm: reshard.export_checkpoint(source, tmp_path / "folder", communicator=comm))
    for outcome in outcomes:
        assert isinstance(outcome, DamagedCheckpointError)
        assert file.name in str(outcome)
    assert os.listdir(tmp_path) == ["root"]


def test_an_export_that_was_killed_is_no_obstacle_and_one_that_lives_is(root: Path, tmp_path: Path) -> None:
    (tmp_path / ".exporting-folder").mkdir()
    (tmp_path / ".exporting-folder" / "model.safetensors").write_text("half")

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(UsageError, match="another export"):
            export(1, root, tmp_path / "folder")

    report = export(1, root, tmp_path / "folder", progress=meanwhile)[0]
    assert report.tensors == len(SHAPES)
    assert os.listdir(tmp_path) == ["folder"]


def test_progress_ends_with_all_bytes(root: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = export(1, root, tmp_path / "folder", max_shard_size="1KB", progress=lambda *parts: told.append(parts))[0]
    assert told[-1] == (report.nbytes, report.nbytes)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"dtype": "int8"}, "dtype"), ({"dtype": "x"}, "x"), ({"max_shard_size": "0GB"}, "max_shard_size"), ({"memory_budget": 1}, "memory")],
)
def test_arguments_that_can_not_be(root: Path, tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=field):
        export(2, root, tmp_path / "folder", **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("500 mib", 500 << 20), (7, 7), ("1.5K", 1500), ("2TiB", 2 << 40), ("12B", 12), ("3g", 3 * 10**9)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1XB", "1 2GB", "five", 0, -3])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_files_are_filled_in_the_order_of_layers_and_shared_out_evenly() -> None:
    tensors = [ExportTensor(f"layers.{n}.w", by_name("float32"), by_name("bfloat16"), (10 * (n % 3) + 1,)) for n in (10, 2, 9, 0, 1, 11, 3)]
    shards = plan_shards(tensors, 50)
    assert [tensor.name for shard in shards for tensor in shard.tensors] == [f"layers.{n}.w" for n in (0, 1, 2, 3, 9, 10, 11)]
    assert all(shard.nbytes <= 50 for shard in shards)
    assert plan_shards(reversed(tensors), 50) == shards
    assert len(plan_shards(tensors, 1)) == len(tensors), "a tensor is never cut"
    shares = share_out(shards, 3)
    assert sorted(shard.file for share in shares for shard in share) == [shard.file for shard in shards]
    loads = [sum(shard.nbytes for shard in share) for share in shares]
    assert max(loads) - min(loads) <= max(shard.nbytes for shard in shards)


class _View:
    """As much of a stored tensor as `cut` looks at."""

    def __init__(self, shape: tuple[int, ...], chunks: list[Region]) -> None:
        self.shape, self.dtype = shape, by_name("float32")
        self.chunks = [type("Chunk", (), {"region": chunk})() for chunk in chunks]


@pytest.mark.parametrize(
    ("shape", "parts", "budget"),
    [
        ((), 1, 8 << 20),
        ((0, 5), 1, 8 << 20),
        ((1000, 3000), 4, 8 << 20),
        ((1, 1000, 3000), 1, 8 << 20),
        ((3, 700, 700), 3, 1 << 20),
        ((2, 3, 2000, 60), 2, 1 << 20),
        ((5, 2_000_000), 5, 8 << 20),
    ],
)
def test_pieces_are_the_tensor_in_order(shape: tuple[int, ...], parts: int, budget: int) -> None:
    rows = shape[0] // parts if shape else 0
    chunks = [Region((n * rows, *[0] * (len(shape) - 1)), (rows, *shape[1:])) for n in range(parts)] if shape else [Region((), ())]
    values = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    pieces = list(cut(_View(shape, chunks), budget))  # type: ignore[arg-type]
    joined = np.concatenate([values[piece.slices].reshape(-1) for piece in pieces]) if pieces else np.empty(0, np.int32)
    np.testing.assert_array_equal(joined, values.reshape(-1))
    assert all(0 < piece.size * 4 <= budget // 8 for piece in pieces)


def test_pieces_end_where_digests_do(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((7001, 33)).astype(np.float32)
    mesh = mesh_of(dp=2)
    run_ranks(
        2,
        lambda comm: reshard.save(
            tmp_path / "root", 1, model={"w": tensor_on_rank(model_key("w"), array, split(mesh, "dp", None), comm.rank)}, communicator=comm
        ),
    )
    view = reshard.Checkpoint(tmp_path / "root")["w"]
    pieces = list(cut(view, 1 << 20))
    assert len(pieces) > 4
    file = next((tmp_path / "root" / "iteration_00000001").glob("*model-0000000*"))
    data = bytearray(file.read_bytes())
    for at in range(len(data) - 400_000, len(data), 50_000):
        changed = bytearray(data)
        changed[at] ^= 1
        file.write_bytes(changed)
        damaged = reshard.Checkpoint(tmp_path / "root")["w"]
        with pytest.raises(DamagedCheckpointError):
            [damaged.read(piece) for piece in pieces]


def test_the_command(run_reshard: Callable[..., CompletedProcess[str]], root: Path, tmp_path: Path) -> None:
    done = run_reshard("export", root, tmp_path / "folder", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path / 'folder'}: {len(SHAPES)} tensors in 1 file" in done.stdout
    assert reshard.Checkpoint(tmp_path / "folder")["model.norm.weight"].dtype.numpy == ml_dtypes.bfloat16
    again = run_reshard("export", root, tmp_path / "folder")
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_command_needs_no_framework(run_python: Callable[..., CompletedProcess[str]], root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from reshard.cli.app import app\n"
        f"app(['export', {str(root)!r}, {str(tmp_path / 'folder')!r}], standalone_mode=False)\n"
        "assert not {'torch', 'mindspore', 'transformers', 'safetensors'} & set(sys.modules)\n"
    )
    run_python(code)
    assert (tmp_path / "folder" / "model.safetensors").is_file()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", ["hf_qwen3_interleaved", "hf_qwen3_tied"])
def test_names_of_another_framework_become_those_of_hugging_face(tmp_path: Path, case: str, ranks: int) -> None:
    golden = Path(__file__).resolve().parents[1] / "data" / "golden_hf" / case
    with np.load(golden / "expected_mf.npz") as arrays:
        reshard.save(tmp_path / "root", 1, model=dict(arrays))
    report = export(ranks, tmp_path / "root", tmp_path / "folder", config=golden / "hf", max_shard_size="20KB")[0]
    assert len(report.files) > 1
    published, exported = reshard.Checkpoint(golden / "hf"), reshard.Checkpoint(tmp_path / "folder")
    assert set(exported) == set(published)
    for name in published:
        np.testing.assert_array_equal(exported[name][...], published[name][...].astype(exported[name].dtype.numpy))
    assert contents(tmp_path / "folder").keys() - {"config.json"} == set(report.files) | {"model.safetensors.index.json"}
    with pytest.raises(UsageError, match=r"qwen4"):
        export(ranks, tmp_path / "root", tmp_path / "other", config=golden / "hf", family="qwen4")


def test_a_model_that_no_family_knows_keeps_its_names(root: Path, tmp_path: Path) -> None:
    export(1, root, tmp_path / "folder")
    assert set(reshard.Checkpoint(tmp_path / "folder")) == SHAPES.keys()
