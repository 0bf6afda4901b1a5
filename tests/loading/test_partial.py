"""A part of a checkpoint: what is chosen is loaded exactly, what is left out is neither read nor touched nor called missing."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch

import reshard
from reshard.comm import Communicator
from reshard.errors import MismatchError, UsageError
from reshard.format.names import tensor_name
from reshard.loading.selection import Selection, matches, select
from reshard.state import GLOBAL_STEP, Kind, State, TensorKey, model_key, slot_key
from reshard.storage.posix import PosixStorage
from reshard.testing import FaultyStorage, run_ranks, run_ranks_settled, slice_of, state_on_rank
from tests.strategies import Strategy, arrays, layouts

ARRAYS = arrays()
SOURCE = Strategy(dp=2, tp=2, pp=2, fsdp=True)
TARGETS = (Strategy(), Strategy(tp=2, pp=2), Strategy(dp=4, fsdp=True), Strategy(dp=2, tp=2, pp=2))


def parts(state: State, kind: Kind) -> dict:
    return {tensor_name(key): tensor for key, tensor in state.tensors.items() if key.kind is kind}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("root")

    def save(comm: Communicator) -> None:
        state = state_on_rank(ARRAYS, layouts(SOURCE), comm.rank)
        reshard.save(directory, 3, communicator=comm, model=parts(state, Kind.MODEL), optimizer=parts(state, Kind.OPTIMIZER))

    run_ranks(SOURCE.world_size, save)
    return directory


def is_chosen(key: TensorKey, only: Sequence[str] | None, exclude: Sequence[str]) -> bool:
    """As the documents say it: by the name in files, or the parameter's; what belongs to no parameter comes along."""
    names = [name for name in (tensor_name(key), key.parameter) if name]
    is_meant = only is None or key == GLOBAL_STEP or any(fnmatchcase(name, pattern) for name in names for pattern in only)
    return is_meant and not any(fnmatchcase(name, pattern) for name in names for pattern in exclude)


@pytest.mark.parametrize("balanced", [False, True], ids=["direct", "balanced"])
@pytest.mark.parametrize(
    ("only", "exclude"),
    [
        (["layers.0.*"], []),
        (["adam_m.layers.?.norm", "*.up.weight"], ["layers.2.*"]),
        (None, ["head.weight", "adam_*"]),
        (["embed.weight", "layers.3.scale"], ["global_step"]),
    ],
    ids=str,
)
def test_what_is_chosen_is_loaded_and_nothing_else_is_touched(
    only: list[str] | None, exclude: list[str], balanced: bool, root: Path
) -> None:
    chosen = {key for key in ARRAYS if is_chosen(key, only, exclude)}
    assert 0 < len(chosen) < len(ARRAYS)
    for target in TARGETS:
        placed = layouts(target)

        def load(comm: Communicator, placed: dict = placed) -> reshard.RestoreReport:
            state = state_on_rank(ARRAYS, placed, comm.rank, blank=True)
            report = reshard.load(
                root,
                communicator=comm,
                model=parts(state, Kind.MODEL),
                optimizer=parts(state, Kind.OPTIMIZER),
                only=only,
                exclude=exclude,
                strict=reshard.Strictness(unexpected="error"),
                balanced=balanced,
            )
            for key, tensor in state.tensors.items():
                for shard in tensor.shards:
                    have = shard.memory.read().tobytes()
                    expected = slice_of(ARRAYS[key], shard.region).tobytes() if key in chosen else b"\xa5" * len(have)
                    assert have == expected, key
            # Nothing of what is left out is needed.
            mine = [tensor for key, tensor in state.tensors.items() if key in chosen]
            # A stage that has no step count gets one.
            step = 4 if GLOBAL_STEP in chosen and GLOBAL_STEP not in state.tensors else 0
            assert report.ranks[comm.rank].bytes_needed == sum(tensor.nbytes for tensor in mine) + step
            return report

        for report in run_ranks(target.world_size, load):
            assert set(report.restored) == {tensor_name(key) for key in chosen}
            assert set(report.skipped) == {tensor_name(key) for key in ARRAYS} - set(report.restored)
            assert len(report.skipped) == len(ARRAYS) - len(chosen)
            assert (report.missing, report.unexpected, report.mismatched, report.filled) == ((), (), (), ())
            assert f"; {len(report.skipped)} skipped" in str(report)


def test_a_model_of_which_only_a_part_is_in_the_checkpoint(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model={"body.weight": np.ones(4), "head.weight": np.ones(10)})
    # A new head of another shape, and one that the checkpoint hasn't at all.
    model = {"body.weight": np.zeros(4), "head.weight": np.zeros(3), "head.bias": np.zeros(3)}
    report = reshard.load(tmp_path, model=model, exclude="head.*", strict=reshard.Strictness(unexpected="error"))
    assert (report.restored, report.skipped) == (("body.weight",), ("head.weight", "head.bias"))
    assert model["body.weight"].all()
    assert not model["head.weight"].any()
    # The other way round: a part of the model, out of the whole checkpoint.
    body = {"body.weight": np.zeros(4)}
    report = reshard.load(tmp_path, model=body, only="body.*", strict=reshard.Strictness(unexpected="error"))
    assert (report.restored, report.skipped) == (("body.weight",), ("head.weight",))


def test_what_is_chosen_must_be_there(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model={"body.weight": np.ones(4), "head.weight": np.ones(10)})
    with pytest.raises(MismatchError, match="not in the checkpoint") as caught:
        reshard.load(tmp_path, model={"body.weight": np.zeros(4), "body.bias": np.zeros(4), "new": np.zeros(1)}, only="body.*")
    assert caught.value.tensor == "body.bias"


def test_a_pattern_that_means_nothing(root: Path) -> None:
    target = Strategy(pp=4)

    def load(comm: Communicator, only: list[str] | None = None, exclude: list[str] | None = None) -> reshard.RestoreReport:
        state = state_on_rank(ARRAYS, layouts(target), comm.rank, blank=True)
        model = parts(state, Kind.MODEL)
        if comm.rank == 3:
            model["extra.weight"] = np.zeros(3)
        return reshard.load(root, communicator=comm, model=model, strict=reshard.Strictness(missing="ignore"), only=only, exclude=exclude)

    for outcome in run_ranks_settled(4, lambda comm: load(comm, only=["layers.0.*", "layer.1.*", "head"])):
        assert isinstance(outcome, UsageError)
        assert "'layer.1.*', 'head'" in str(outcome)
        assert "'layers.0.*'" not in str(outcome)
    # A tensor that one rank has, and nobody else, is meant by a pattern.
    for report in run_ranks(4, lambda comm: load(comm, only=["layers.0.*", "extra.*"])):
        assert report.missing == ("extra.weight",)
    # Nothing to leave out is no error, but is said.
    for report in run_ranks(4, lambda comm: load(comm, exclude=["lora.*", "head.*"])):
        assert any("'lora.*'" in note for note in report.notes)
        assert not any("'head.*'" in note for note in report.notes)


def test_ranks_that_choose_differently_hear_of_it(root: Path) -> None:
    def load(comm: Communicator) -> None:
        state = state_on_rank(ARRAYS, layouts(Strategy(pp=2)), comm.rank, blank=True)
        reshard.load(root, communicator=comm, model=parts(state, Kind.MODEL), only=f"layers.{comm.rank}.*")

    for outcome in run_ranks_settled(2, load):
        assert isinstance(outcome, UsageError)
        assert "only, exclude" in str(outcome)


@pytest.mark.parametrize("options", [{"only": []}, {"only": [3]}, {"exclude": [""]}, {"only": [None]}], ids=str)
def test_what_is_no_pattern(options: dict, root: Path) -> None:
    with pytest.raises(UsageError) as caught:
        reshard.load(root, model={"embed.weight": np.zeros(1)}, **options)
    assert caught.value.field in options


def test_patterns_are_held_against_names_in_files_and_parameters() -> None:
    weight, moment = model_key("layers.1.up.weight"), slot_key("adam_m", "layers.1.up.weight")
    assert [matches("layers.1.*", key) for key in (weight, moment)] == [True, True]
    assert [matches("adam_m.*", key) for key in (weight, moment)] == [False, True]
    assert [matches("*.Weight", key) for key in (weight, moment)] == [False, False]
    assert matches("layers.[0-3].up.weight", weight)
    assert matches("global_step", GLOBAL_STEP)
    assert select(None, None).is_all
    assert select("a", "b") == Selection(("a",), ("b",))
    assert select(["a*"], None).takes(GLOBAL_STEP)
    assert not select(["a*"], ["global*"]).takes(GLOBAL_STEP)


def trained(seed: int, steps: int, rate: float) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    groups = [{"params": model[0].parameters(), "lr": rate}, {"params": model[1].parameters(), "lr": 2 * rate}]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "running"])
def test_a_part_of_a_torch_run_with_its_optimizer(steps: int, tmp_path: Path) -> None:
    saved, saved_optimizer = trained(0, 5, 0.01)
    reshard.save(tmp_path, 5, model=saved, optimizer=saved_optimizer)
    model, optimizer = trained(1, steps, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {p: {slot: value.clone() for slot, value in optimizer.state[p].items()} for p in model[1].parameters() if p in optimizer.state}
    report = reshard.load(tmp_path, model=model, optimizer=optimizer, only="0.*")
    assert {"0.weight", "adam_m.0.weight", "global_step"} < set(report.restored)
    assert {"1.weight", "adam_m.1.weight"} < set(report.skipped)
    for old, new in zip(saved[0].parameters(), model[0].parameters(), strict=True):
        assert torch.equal(old, new)
        assert all(torch.equal(value, optimizer.state[new][slot]) for slot, value in saved_optimizer.state[old].items())
    # The rest is as it was: weights, moments or none, step counts, hyper-parameters.
    for name in ("1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[name], before[name])
    for parameter in model[1].parameters():
        assert (parameter in optimizer.state) == bool(steps)
        for slot, value in state.get(parameter, {}).items():
            assert torch.equal(optimizer.state[parameter][slot], value)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1.0]


@pytest.mark.parametrize("balanced", [False, True], ids=["direct", "balanced"])
@pytest.mark.parametrize("has_files", [True, False])
def test_weights_only_never_touch_the_optimizers_files(has_files: bool, balanced: bool, root: Path, tmp_path: Path) -> None:
    (iteration,) = root.glob("iteration_*")
    path = iteration
    if not has_files:
        path = tmp_path / iteration.name
        for file in (file for file in iteration.rglob("*") if file.is_file() and "-opt-" not in file.name):
            copy = path / file.relative_to(iteration)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    storage = FaultyStorage(PosixStorage())

    def load(comm: Communicator) -> tuple[str, ...]:
        state = state_on_rank(ARRAYS, layouts(Strategy(tp=2)), comm.rank, blank=True)
        report = reshard.load(path, communicator=comm, storage=storage, model=parts(state, Kind.MODEL), balanced=balanced)
        return (*report.missing, *report.unexpected)

    assert run_ranks(2, load) == [(), ()]
    assert any("-model-" in touched for _, touched in storage.log)
    assert not any("-opt-" in touched for _, touched in storage.log)
