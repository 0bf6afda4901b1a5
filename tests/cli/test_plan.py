"""`reshard plan`: the forecast equals what loads do, and what would fail fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

import reshard
from reshard.cli.app import app
from reshard.cli.plan import parse_size
from reshard.comm import Communicator
from reshard.errors import DamagedCheckpointError, MismatchError, UsageError
from reshard.planning.placement import lay_out
from reshard.planning.strategy import Strategy, parse_strategy
from reshard.state import GLOBAL_STEP, Kind, TensorKey
from reshard.storage import ReadableFile
from reshard.storage.posix import PosixStorage
from reshard.testing import differences, run_ranks, state_on_rank
from tests.golden import GOLDEN
from tests.loading.test_matrix import parts
from tests.planning.test_placement import tensors
from tests.seals import seal_again

Run = Callable[..., Any]


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan(root: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = command("plan", root, *arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refused(root: Path, *arguments: str) -> str:
    """The message of a plan that can't be made."""
    result = command("plan", root, *arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def arrays(**kind: bool) -> dict[TensorKey, np.ndarray]:
    random = np.random.default_rng(5)
    found = {tensor.key: random.standard_normal(tensor.global_shape).astype(np.float32) for tensor in tensors(**kind)}
    return {**found, GLOBAL_STEP: np.array([3], np.int32)}


def states(strategy: Strategy, whole: dict[TensorKey, np.ndarray], rank: int, *, blank: bool) -> Any:
    placement = lay_out(strategy, tensors_of(whole))
    layouts = {tensor.key: layout for tensor, layout in zip(placement.tensors, placement.layouts, strict=True)}
    return state_on_rank(whole, layouts, rank, blank=blank)


def tensors_of(whole: dict[TensorKey, np.ndarray]) -> list[Any]:
    stacked = any(key.parameter.endswith("experts.down_proj") for key in whole)
    return [tensor for tensor in tensors(stacked=stacked) if tensor.key in whole]


def saved(root: Path, text: str, *, sharded: bool = False, stacked: bool = False) -> Path:
    whole, strategy = arrays(stacked=stacked), parse_strategy(text, shard_optimizer=sharded)

    def work(comm: Communicator) -> None:
        state = states(strategy, whole, comm.rank, blank=False)
        model, optimizer = parts(state, Kind.MODEL), parts(state, Kind.OPTIMIZER)
        reshard.save(str(root), 3, communicator=comm, model=model, optimizer=optimizer, common=reshard.CommonInfo(global_step=3))

    run_ranks(strategy.world_size, work)
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of some strategies, with numbered and with stacked experts."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "one": saved(folder / "one", "dp=1"),
        "mixed": saved(folder / "mixed", "dp=2,tp=2,pp=2", sharded=True),
        "stacked": saved(folder / "stacked", "fsdp=4,ep=2", stacked=True),
    }


class Recording(PosixStorage):
    """The file system, and which data files are opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: set[str] = set()

    def open_read(self, path: str) -> ReadableFile:
        if path.endswith(".safetensors") and "/extra/" not in path:
            self.opened.add(os.path.basename(path))
        return super().open_read(path)


TARGETS = [
    "dp=1",
    "dp=3",
    "fsdp=4",
    "tp=4",
    "pp=4",
    "tp=5",
    "tp=2,pp=2",
    "dp=4,ep=2",
    "dp=2,fsdp=2,tp=2",
    "fsdp=4,tp=2,ep=2",
    "dp=2,tp=2,pp=2",
]


@pytest.mark.parametrize(("sharded", "balanced"), [(False, False), (True, True)], ids=["direct", "zero, balanced"])
@pytest.mark.parametrize(
    ("source", "text"),
    [*((source, text) for source in ("one", "mixed") for text in TARGETS), *(("stacked", text) for text in TARGETS if "ep" in text)],
)
def test_the_forecast_is_what_a_load_does(source: str, text: str, sharded: bool, balanced: bool, sources: dict[str, Path]) -> None:
    options = [*(["--shard-optimizer"] if sharded else []), *(["--balanced"] if balanced else [])]
    foretold = plan(sources[source], "--strategy", text, *options)
    whole, strategy = arrays(stacked=source == "stacked"), parse_strategy(text, shard_optimizer=sharded)

    def work(comm: Communicator) -> tuple[list[str], reshard.RestoreReport, set[str]]:
        state, storage = states(strategy, whole, comm.rank, blank=True), Recording()
        model, optimizer = parts(state, Kind.MODEL), parts(state, Kind.OPTIMIZER)
        report = reshard.load(str(sources[source]), communicator=comm, storage=storage, model=model, optimizer=optimizer, balanced=balanced)
        return differences(whole, state), report, storage.opened

    results = run_ranks(strategy.world_size, work)
    assert all(wrong == [] for wrong, _, _ in results)
    report = results[0][1]
    assert foretold["world_size"] == strategy.world_size == len(foretold["ranks"])
    assert foretold["tensors"]["restored"] == len(report.restored)
    for mine, real, (_, _, opened) in zip(foretold["ranks"], report.ranks, results, strict=True):
        assert mine["needed"] == real.bytes_needed
        assert (mine["sent"], mine["received"]) == (real.bytes_sent, real.bytes_received)
        assert mine["files"] == len(opened)
        if balanced:
            assert mine["read"] == real.bytes_read
        else:
            # A read goes over small gaps, and these tensors are small.
            assert mine["read"] == mine["needed"] <= real.bytes_read
    assert set(foretold["files"]) == set().union(*(opened for _, _, opened in results))
    assert not foretold["would_fail"]


def test_a_part_of_the_tensors(sources: dict[str, Path]) -> None:
    root = sources["mixed"]
    whole = plan(root, "-s", "tp=2,pp=2")
    weights = plan(root, "-s", "tp=2,pp=2", "--no-optimizer")
    model = {key: array for key, array in arrays().items() if key.kind is Kind.MODEL}
    assert weights["tensors"]["restored"] == len(model)
    assert weights["tensors"]["restored_bytes"] == sum(array.nbytes for array in model.values())
    assert all("-model-" in file for file in weights["files"])
    layer = plan(root, "-s", "tp=2,pp=2", "--only", "model.layers.4.*", "--exclude", "global_step", "--exclude", "*.gate.*")
    chosen = [key for key in arrays() if key.parameter.startswith("model.layers.4.") and ".gate." not in key.parameter]
    assert layer["tensors"]["restored"] == len(chosen)
    assert layer["tensors"]["skipped"] == whole["tensors"]["restored"] - len(chosen)
    assert [rank["needed"] > 0 for rank in layer["ranks"]] == [False, False, True, True], "layers lie where they lie in the whole model"


def test_types(sources: dict[str, Path]) -> None:
    root = sources["one"]
    model = [key for key in arrays() if key.kind is Kind.MODEL]
    refused_cast = plan(root, "-s", "dp=2", "--dtype", "bfloat16", code=1)
    assert refused_cast["would_fail"]
    assert len(refused_cast["tensors"]["mismatched"]) == len(model)
    assert "another dtype" in refused_cast["failures"][0]["what"]
    done = plan(root, "-s", "dp=2", "--dtype", "bfloat16", "--cast")
    assert len(done["tensors"]["cast"]) == len(model)
    assert done["tensors"]["cast"][0] == "model.embed_tokens.weight: float32 -> bfloat16"
    assert done["ranks"][0]["needed"] == plan(root, "-s", "dp=2")["ranks"][0]["needed"], "what is read is what is stored"


def test_splits_of_the_user(sources: dict[str, Path]) -> None:
    name = "model.layers.*.self_attn.o_proj.weight"

    def layout(*options: str) -> str:
        (found,) = [g["layout"] for g in plan(sources["one"], "-s", "tp=2", *options)["layouts"] if g["name"] == name]
        return found

    assert layout() == "dim 1 over tp(2)"
    assert layout("--split", "*.o_proj.weight=tp:0") == "dim 0 over tp(2)"
    assert layout("--split", "*.o_proj.weight=none") == "replicated over tp(2)"


def test_names_that_say_nothing_are_noted(tmp_path: Path) -> None:
    model = {"encoder.mixer.weight": np.zeros((8, 8), np.float32)}
    reshard.save(str(tmp_path), 1, model=model)
    document = plan(tmp_path, "-s", "tp=2,pp=2,dp=2,ep=2", "--no-optimizer")
    assert any("tp splits none of 1 tensor " in note and "encoder.mixer.weight" in note for note in document["notes"])
    assert any("2 pipeline stages share 0 layers" in note for note in document["notes"])
    assert any("ep splits nothing" in note for note in document["notes"])
    told = plan(tmp_path, "-s", "tp=2", "--no-optimizer", "--split", "*.mixer.weight=tp:1")
    assert told["notes"] == []
    assert told["ranks"][0]["needed"] == 128


@pytest.fixture
def root(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint that may be damaged."""
    return shutil.copytree(sources["mixed"], tmp_path / "root")


def data_file(root: Path) -> Path:
    return min((root / "iteration_00000003").glob("*model*.safetensors"))


def lose(root: Path) -> None:
    data_file(root).unlink()


def truncate(root: Path) -> None:
    os.truncate(data_file(root), data_file(root).stat().st_size - 1)


def empty(root: Path) -> None:
    os.truncate(data_file(root), 0)


def break_promise(root: Path) -> None:
    tensors_of_file = load_file(data_file(root))
    tensors_of_file.popitem()
    save_file(tensors_of_file, data_file(root))
    seal_again(data_file(root).parent)


def lengthen(root: Path) -> None:
    with data_file(root).open("ab") as file:
        file.write(b"x")


def garble_header(root: Path) -> None:
    """Another digest of a tensor: a header that makes sense, but is not the one that was sealed."""
    data = bytearray(data_file(root).read_bytes())
    digit = data.index(b'"xxh3_128":"') + len(b'"xxh3_128":"')
    data[digit] = ord("1" if data[digit] == ord("0") else "0")
    data_file(root).write_bytes(data)


def lose_random_states(root: Path) -> None:
    (data_file(root).parent / "extra" / "rank-0000000.safetensors").unlink()


def garble_extra(root: Path) -> None:
    (root / "iteration_00000003" / "extra" / "global.safetensors").write_bytes(b"x" * 100)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, "data files is missing"),
        (empty, "data files is truncated"),
        (truncate, "another size than when saved"),
        (lengthen, "another size than when saved"),
        (garble_header, "not as it was saved"),
        (lose_random_states, "extra/rank-0000000.safetensors"),
        (break_promise, "promises a tensor that the file doesn't hold"),
        (garble_extra, "global.safetensors"),
    ],
)
def test_damage_that_would_make_a_load_fail(damage: Callable[[Path], None], words: str, root: Path) -> None:
    damage(root)
    result = command("plan", root, "--strategy", "dp=1")
    assert result.exit_code == 1
    assert "the load would fail: " in result.stdout
    assert words in result.stdout
    assert "the load would work" not in result.stdout
    (failure,) = plan(root, "--strategy", "dp=1", code=1)["failures"]
    assert failure["next"]
    state = states(parse_strategy("dp=1"), arrays(), 0, blank=True)
    with pytest.raises(DamagedCheckpointError):
        reshard.load(str(root), model=parts(state, Kind.MODEL), optimizer=parts(state, Kind.OPTIMIZER))


def test_damage_that_a_load_would_not_meet(root: Path) -> None:
    for file in (root / "iteration_00000003").glob("*opt*.safetensors"):
        file.unlink()
    assert plan(root, "-s", "tp=2", code=1)["would_fail"]
    assert not plan(root, "-s", "tp=2", "--no-optimizer")["would_fail"]


def test_many_files_are_looked_at_by_their_sizes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.loading.outlook._MOST_HEADERS", 3)
    garble_header(root)
    assert any("by their sizes only" in note for note in plan(root, "-s", "tp=2")["notes"])
    lose(root)
    assert plan(root, "-s", "tp=2", code=1)["failures"][0]["what"].endswith("data files is missing")


def test_no_optimizer_in_the_checkpoint() -> None:
    root = GOLDEN / "dp2_tp2_noopt" / "checkpoint"
    (failure,) = plan(root, "-s", "tp=2", code=1)["failures"]
    assert "no optimizer state" in failure["what"]
    assert "--no-optimizer" in failure["next"]
    assert not plan(root, "-s", "tp=2", "--no-optimizer")["would_fail"]


def test_the_model_of_another_checkpoint(sources: dict[str, Path], tmp_path: Path) -> None:
    whole = {key: array for key, array in arrays().items() if key.kind is Kind.MODEL}
    model = {key.parameter: array for key, array in whole.items()}
    del model["lm_head.weight"]
    model |= {"new.weight": np.zeros((3, 3), np.float32), "model.norm.weight": np.zeros(7, np.float32)}
    reshard.save(str(tmp_path), 1, model=model)
    document = plan(sources["one"], "-s", "tp=2", "--no-optimizer", "--model-of", str(tmp_path), code=1)
    found = document["tensors"]
    assert (found["missing"], found["unexpected"], found["mismatched"]) == (["new.weight"], ["lm_head.weight"], ["model.norm.weight"])
    assert [failure["kind"] for failure in document["failures"]] == ["MismatchError", "MismatchError"]
    assert ["not in the run" in warning["what"] for warning in document["warnings"]] == [True]
    with pytest.raises(MismatchError):
        reshard.load(str(sources["one"]), model=model)
    result = command("plan", sources["one"], "-s", "tp=2", "--no-optimizer", "--model-of", tmp_path)
    assert "1 missing, 1 unexpected, 1 mismatched" in result.stdout
    assert "the load would warn: 1 tensor of the checkpoint is not in the run" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-s", "dp=2,mp=2"], ["axis that doesn't exist", "'mp=2'", "tp: ranks that split"]),
        (["-s", "dp=0"], ["a size that can't be", "dp"]),
        (["-s", ""], ["sizes by axis"]),
        (["-s", "ep=4"], ["experts", "dp=4"]),
        (["-s", "dp=2", "--only", "nothing.*"], ["means no tensor", "'nothing.*'"]),
        (["-s", "dp=2", "--only", ""], ["not a pattern"]),
        (["-s", "dp=2", "--split", "nothing.*=tp:0"], ["means no parameter", "nothing.*=tp:0"]),
        (["-s", "dp=2", "--split", "*=qp:0"], ["PATTERN=AXIS:DIMENSION"]),
        (["-s", "dp=2", "--split", "*.weight=tp:5"], ["a dimension that a tensor doesn't have"]),
        (["-s", "dp=2", "--dtype", "float31"], ["float31", "bfloat16"]),
        (["-s", "dp=2", "--balanced", "--memory-budget", "much"], ["not a size", "64MiB"]),
        (["-s", "dp=2", "--balanced", "--memory-budget", "1KiB"], ["too little memory"]),
        (["-s", "dp=2", "--memory-budget", "64MiB"], ["for balanced loads", "--balanced"]),
        (["-s", "dp=2", "--model-of", "/nowhere"], ["no such checkpoint", "/nowhere"]),
    ],
)
def test_what_can_not_be_asked(arguments: list[str], words: list[str], sources: dict[str, Path]) -> None:
    message = refused(sources["one"], *arguments)
    for word in words:
        assert word in message


def test_a_checkpoint_that_can_not_be_opened(root: Path, tmp_path: Path) -> None:
    assert "no such checkpoint" in refused(tmp_path / "nowhere", "-s", "dp=2")
    metadata = root / "iteration_00000003" / "metadata.json"
    metadata.write_bytes(metadata.read_bytes()[:-9])
    assert "metadata.json" in refused(root, "-s", "dp=2")


def test_without_a_strategy() -> None:
    result = command("plan", GOLDEN / "dp2_tp2" / "checkpoint")
    assert result.exit_code == 2
    assert "--strategy" in result.stderr


def test_few_ranks_have_a_row_each_and_many_a_summary(sources: dict[str, Path]) -> None:
    def first_words(*options: str) -> list[str]:
        lines = command("plan", sources["one"], *options).stdout.splitlines()
        begin = next(number for number, line in enumerate(lines) if line.startswith("rank"))
        return [line.split()[0] for line in lines[begin + 2 :] if line[:1].isalnum() and not line.startswith("the load")]

    assert first_words("-s", "dp=1") == ["0"]
    assert first_words("-s", "dp=2") == ["0", "1", "mean", "most", "all"]
    assert first_words("-s", "dp=32") == ["least", "mean", "most", "all"]
    assert first_words("-s", "dp=32", "--ranks", "2") == ["0", "1", "least", "mean", "most", "all"]
    assert first_words("-s", "dp=2", "--ranks", "99") == ["0", "1", "mean", "most", "all"]
    assert len(plan(sources["one"], "-s", "dp=32")["ranks"]) == 32
    assert len(plan(sources["one"], "-s", "dp=32", "--ranks", "2")["ranks"]) == 2


@pytest.mark.parametrize(("width", "is_table"), [(80, True), (36, False)])
def test_the_output_fits_the_terminal(
    width: int, is_table: bool, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def narrow() -> Console:
        return Console(width=width, force_terminal=True, color_system=None, highlight=False, emoji=False, markup=False)

    monkeypatch.setattr("reshard.cli.plan.console", narrow)
    result = command("plan", sources["mixed"], "-s", "dp=32", "--balanced", "--ranks", "2")
    begin = result.stdout.index("rank") if is_table else 0
    table = result.stdout[begin:].split("\n\n")[0] if is_table else ""
    assert ("─" in result.stdout) == is_table
    assert all(len(line) <= width for line in table.splitlines())
    assert is_table or "    needed " in result.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("64MiB", 64 << 20), ("64M", 64 << 20), ("2 GiB", 2 << 30), ("3KB", 3000), ("1gb", 10**9), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5GiB", "1PiB", "9" * 30, "MiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_as_a_command_of_its_own(call_reshard: Run, sources: dict[str, Path]) -> None:
    done = call_reshard("plan", sources["mixed"], "--strategy", "dp=2,tp=4,pp=2", "--balanced")
    assert done.returncode == 0, done.stderr
    assert "into dp=2,tp=4,pp=2: 16 ranks, each byte is read once and sent on" in done.stdout
