"""Casting on load: the values are torch's, the bytes of what isn't cast are untouched, and nothing is converted that nobody asked for."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import reshard
from reshard.comm import Communicator
from reshard.errors import MismatchError
from reshard.format.names import tensor_name
from reshard.geometry import Region
from reshard.geometry.casts import can_cast, cast_values
from reshard.geometry.dtypes import by_name
from reshard.loading.casting import CastMemory
from reshard.state import HostMemory, Kind, State
from reshard.testing import differences, run_ranks, state_on_rank
from tests.strategies import STRATEGIES, Strategy, arrays, layouts

FLOATING = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")
PAIRS = [(stored, wanted) for stored in FLOATING for wanted in FLOATING if stored != wanted]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
CAST = reshard.Strictness(dtype="cast")


def values_of(name: str) -> np.ndarray:
    """Every value of a small type; of a large one random bits, and what lies on, just below and just above the middle of two neighbours of
    each small type, where rounding is decided.
    """
    dtype = by_name(name).numpy
    if dtype.itemsize <= 2:
        return np.arange(256**dtype.itemsize, dtype=UNSIGNED[dtype.itemsize]).view(dtype)
    random = np.random.default_rng(3)
    parts = [random.integers(0, 2**32, 100_000, np.uint32), np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001], np.uint32)]
    for small in FLOATING[:4]:
        with np.errstate(all="ignore"):
            known = np.unique(values_of(small).astype(np.float64)[np.isfinite(values_of(small).astype(np.float32))])
            middles = ((known[:-1] + known[1:]) / 2).astype(np.float32).view(np.uint32)
        parts += [middles, middles + np.uint32(1), middles - np.uint32(1)]
    bits = np.concatenate(parts).view(np.float32)
    if name == "float32":
        return bits
    with np.errstate(all="ignore"):
        wide = bits.astype(np.float64)
        return np.concatenate([wide, wide * (1 + 2.0**-40), wide * (1 - 2.0**-40), [1e300, -1e300, 5e-324]])


def to_torch(array: np.ndarray) -> torch.Tensor:
    carrier = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize]
    return torch.from_numpy(array.view(carrier).copy()).view(getattr(torch, array.dtype.name))


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(carrier).numpy().view(UNSIGNED[tensor.element_size()])


@pytest.mark.parametrize(("stored", "wanted"), PAIRS, ids=lambda name: name)
def test_the_values_are_those_of_torch(stored: str, wanted: str) -> None:
    source = values_of(stored)
    expected = to_torch(source).to(getattr(torch, wanted))
    found = cast_values(source, by_name(wanted))
    assert found.dtype == by_name(wanted).numpy
    is_nan = expected.isnan().numpy() if expected.element_size() > 1 else expected.float().isnan().numpy()
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32 if wanted != "float64" else np.float64)), is_nan)
    # The bits: 0.0 and -0.0 are told apart. Which payload a NaN has is not said.
    same = found.view(UNSIGNED[found.dtype.itemsize]) == to_bits(expected)
    assert same[~is_nan].all(), source[~same & ~is_nan][:5]


def test_only_floating_types_are_cast() -> None:
    assert all(can_cast(*pair) for pair in PAIRS)
    for name in ("bool", "int8", "int32", "int64", "uint8", "complex64"):
        assert not can_cast(name, "float32")
        assert not can_cast("float32", name)


def test_memory_stays_bounded_whatever_is_written_at_once() -> None:
    source = np.random.default_rng(0).standard_normal((3, 4096, 1000)).astype(np.float32)
    target = np.zeros(source.shape, ml_dtypes.bfloat16)
    memory = CastMemory(HostMemory(target), by_name("float32"), by_name("bfloat16"))
    assert memory.host is None
    tracemalloc.start()
    memory.write(Region.whole(source.shape), source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(target, source.astype(ml_dtypes.bfloat16))
    assert peak < 4 << 20 < target.nbytes
    np.testing.assert_array_equal(memory.read(), target.astype(np.float32))


def parts(state: State, kind: Kind) -> dict:
    return {tensor_name(key): tensor for key, tensor in state.tensors.items() if key.kind is kind}


STORED = arrays()
# What the run has: each floating type another one; integers, truth values and one norm as they are.
OTHER = {
    "float32": ml_dtypes.bfloat16,
    "bfloat16": np.float32,
    "float16": np.float32,
    "float8_e4m3fn": np.float16,
}
WANTED = {
    key: array
    if array.dtype.name not in OTHER or key.parameter == "final.norm"
    else cast_values(array, by_name(np.dtype(OTHER[array.dtype.name]).name))
    for key, array in STORED.items()
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("root")
    strategy = Strategy(dp=2, tp=2, pp=2, fsdp=True)

    def save(comm: Communicator) -> None:
        state = state_on_rank(STORED, layouts(strategy), comm.rank)
        reshard.save(directory, 3, communicator=comm, model=parts(state, Kind.MODEL), optimizer=parts(state, Kind.OPTIMIZER))

    run_ranks(strategy.world_size, save)
    return directory


def load(root: Path, strategy: Strategy, **options: object) -> list[tuple[reshard.RestoreReport, list[str]]]:
    def on_rank(comm: Communicator) -> tuple[reshard.RestoreReport, list[str]]:
        state = state_on_rank(WANTED, layouts(strategy), comm.rank, blank=True)
        report = reshard.load(
            root,
            communicator=comm,
            model=parts(state, Kind.MODEL),
            optimizer=parts(state, Kind.OPTIMIZER),
            **options,  # type: ignore[arg-type]
        )
        assert report is not None
        return report, differences(WANTED, state)

    return run_ranks(strategy.world_size, on_rank)


@pytest.mark.parametrize("balanced", [False, True], ids=["direct", "balanced"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_every_rank_holds_the_cast_slices(strategy: Strategy, balanced: bool, root: Path) -> None:
    loaded = load(root, strategy, strict=CAST, balanced=balanced)
    assert [wrong for _, wrong in loaded] == [[]] * strategy.world_size
    report = loaded[0][0]
    cast = {
        f"{tensor_name(key)}: {array.dtype.name} -> {WANTED[key].dtype.name}"
        for key, array in STORED.items()
        if array.dtype != WANTED[key].dtype
    }
    assert set(report.cast) == cast
    assert len(report.cast) == len(cast) < len(report.restored) == len(STORED)
    assert all(other.cast == report.cast for other, _ in loaded)
    assert not report.mismatched
    assert f"; {len(cast)} cast" in str(report)


def test_without_the_option_it_is_an_error_that_names_it_and_nothing_is_touched(root: Path) -> None:
    state = state_on_rank(WANTED, layouts(Strategy()), 0, blank=True)
    before = {key: tensor.shards[0].memory.read().tobytes() for key, tensor in state.tensors.items()}
    with pytest.raises(MismatchError) as caught:
        reshard.load(root, model=parts(state, Kind.MODEL), optimizer=parts(state, Kind.OPTIMIZER))
    assert caught.value.field == "dtype"
    assert "strict=Strictness(dtype='cast')" in str(caught.value)
    assert {key: tensor.shards[0].memory.read().tobytes() for key, tensor in state.tensors.items()} == before


@pytest.mark.parametrize(("stored", "wanted"), [("int64", "float32"), ("float32", "int32"), ("bool", "uint8"), ("int32", "int64")])
def test_integers_and_truth_values_are_never_cast(stored: str, wanted: str, tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model={"a.counts": np.ones(4, stored), "a.weight": np.ones(4, np.float32)})
    model = {"a.counts": np.zeros(4, wanted), "a.weight": np.zeros(4, np.float16)}
    with pytest.raises(MismatchError, match=r"1 tensor can't be cast") as caught:
        reshard.load(tmp_path, model=model, strict=CAST)
    assert (caught.value.tensor, caught.value.field) == ("a.counts", "dtype")
    assert not model["a.weight"].any()
    # Left alone by a rule, named in the report.
    strict = reshard.Strictness(dtype="cast", rules={"*.counts": {"dtype": "ignore"}})
    report = reshard.load(tmp_path, model=model, strict=strict)
    assert report is not None
    assert (report.mismatched, report.cast) == (("a.counts",), ("a.weight: float32 -> float16",))
    assert not model["a.counts"].any()
    assert model["a.weight"].all()


def test_a_rule_says_which_tensors_are_cast(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model={"a.weight": np.full(4, 1.5, np.float32), "b.weight": np.full(4, 2.5, np.float32)})
    model = {"a.weight": np.zeros(4, np.float16), "b.weight": np.zeros(4, np.float16)}
    with pytest.raises(MismatchError, match=r"1 tensor has another dtype") as caught:
        reshard.load(tmp_path, model=model, strict=reshard.Strictness(rules={"a.*": {"dtype": "cast"}}))
    assert caught.value.tensor == "b.weight"
    strict = reshard.Strictness(dtype="ignore", rules={"a.*": {"dtype": "cast"}})
    report = reshard.load(tmp_path, model=model, strict=strict)
    assert report is not None
    assert (report.restored, report.cast, report.mismatched) == (("a.weight",), ("a.weight: float32 -> float16",), ("b.weight",))
    np.testing.assert_array_equal(model["a.weight"], np.full(4, 1.5, np.float16))
    assert not model["b.weight"].any()


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_torch_module_and_its_optimizer(wanted: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = torch.nn.Linear(300, 200)
    optimizer = torch.optim.AdamW(saved.parameters())
    saved(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    reshard.save(tmp_path, 1, model=saved, optimizer=optimizer)
    model = torch.nn.Linear(300, 200).to(wanted)
    fresh = torch.optim.AdamW(model.parameters())
    report = reshard.load(tmp_path, model=model, optimizer=fresh, strict=CAST)
    assert report is not None
    name = str(wanted).removeprefix("torch.")
    assert set(report.cast) == {
        f"{prefix}{part}: float32 -> {name}" for prefix in ("", "adam_m.", "adam_v.") for part in ("weight", "bias")
    }
    states: Mapping[torch.Tensor, dict] = optimizer.state
    for old, new in zip(saved.parameters(), model.parameters(), strict=True):
        assert torch.equal(old.detach().to(wanted), new.detach())
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(states[old][slot].to(wanted), fresh.state[new][slot])
        assert fresh.state[new]["step"] == 1


def test_large_strided_parts_are_cast_too(tmp_path: Path) -> None:
    whole = np.random.default_rng(1).standard_normal((700, 3000)).astype(np.float32)
    reshard.save(tmp_path, 1, model={"w": whole})
    model = {"w": np.zeros((3000, 700), ml_dtypes.bfloat16).T}
    reshard.load(tmp_path, model=model, strict=CAST)
    np.testing.assert_array_equal(model["w"], whole.astype(ml_dtypes.bfloat16))
