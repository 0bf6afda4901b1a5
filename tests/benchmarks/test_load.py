"""The benchmark of loading runs, checks what it loads, and says what came out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from benchmarks import states
from benchmarks.load import main
from benchmarks.load_cases import CASES, memory_limit
from benchmarks.load_ranks import COPIES, DCP, RESHARD, VERIFIED, Sample, check
from benchmarks.load_results import summarize
from benchmarks.states import FSDP, TENSOR_PARALLEL, TRANSPOSED, TensorSpec
from reshard.geometry import Region

TENSORS = (TensorSpec("matrix", (8, 12), 0), TensorSpec("other", (4, 600), 1), TensorSpec("vector", (16,)))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    path = directory / "results" / "load.json"
    arguments = ["--cases", "transposed", "--rounds", "1", "--scale", "0.001", "--directory", str(directory), "--output", str(path)]
    assert main(arguments) == 0
    assert [entry.name for entry in directory.iterdir()] == ["results"], "checkpoints were left behind"
    return path


@pytest.mark.sweep
def test_the_results_have_every_number(output: Path) -> None:
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["settings"]["rounds"] == 1
    assert results["settings"]["scale"] == 0.001
    assert results["judged"] is False
    assert {"processor", "cores", "torch", "commit", "load_average", "load_average_after"} <= set(results["machine"])
    (case,) = results["cases"]
    tensors = states.transformer(0.001)
    assert case["name"] == "transposed"
    assert case["tensors"] == len(tensors)
    assert case["unique_bytes"] == states.unique_bytes(tensors)
    assert case["moved_bytes"] > 1.9 * case["unique_bytes"], "each of two replicas is loaded"
    assert case["reshard"]["bytes_needed"] == case["moved_bytes"]
    assert set(case["repeated"]) == {DCP, RESHARD, VERIFIED, *COPIES}
    assert 0 < case["reshard"]["bytes_verified"] < case["reshard"]["bytes_read"], "columns of a row-wise chunk are not verified"
    assert set(case["first"]) == {DCP, RESHARD}
    for times in (*case["repeated"].values(), *case["first"].values()):
        assert len(times["seconds"]) == 1
        assert times["least"] == times["median"] == times["most"] > 0
    over_dcp, over_copy, covered, memory = case["checks"]
    assert over_dcp["value"] == pytest.approx(case["repeated"][DCP]["median"] / case["repeated"][RESHARD]["median"])
    assert over_copy["value"] == pytest.approx(case["repeated"][RESHARD]["median"] / case["copy"]["median"])
    assert covered["value"] >= 1
    assert 0 <= memory["value"] == case["peak_memory"][RESHARD]
    assert all(found["met"] is None for found in case["checks"])


@pytest.mark.sweep
def test_the_picture_is_a_picture(output: Path) -> None:
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("strategy", [TENSOR_PARALLEL, TRANSPOSED, FSDP], ids=lambda strategy: strategy.title)
def test_a_region_has_the_values_that_the_whole_has_there(strategy: states.Strategy) -> None:
    for tensor in TENSORS:
        whole = _values(tensor, Region.whole(tensor.shape))
        assert len(np.unique(whole)) == whole.size
        covered = np.zeros(tensor.shape, bool)
        for rank in range(states.WORLD_SIZE):
            region = strategy.region(tensor, rank)
            covered[region.slices] = True
            assert np.array_equal(_values(tensor, region), whole[region.slices])
        assert covered.all()


def test_a_wrong_bit_is_found() -> None:
    memory = [_values(tensor, FSDP.region(tensor, 2)) for tensor in TENSORS]
    expected = states.digests(TENSORS, FSDP, 2)
    assert expected == [xxhash.xxh3_128_digest(local.data) for local in memory]
    check("somebody", TENSORS, memory, expected, 2)
    memory[1][0, -1] ^= 1
    with pytest.raises(ValueError, match="somebody loaded wrong bytes into other on rank 2"):
        check("somebody", TENSORS, memory, expected, 2)


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.8, False)])
def test_a_run_is_held_against_the_targets(ours: float, met: bool) -> None:
    case = CASES[0]
    facts = {
        "bytes_needed": 100,
        "bytes_read": 102 if met else 103,
        "bytes_of_pages": 0,
        "phases": [{"read": 1.0}, {"read": 2.0, "plan": 0.5}],
    }
    peak = memory_limit(len(case.tensors(0.001))) + (0 if met else 1)

    def load(contender: str, seconds: float) -> list[Sample]:
        # The second rank begins later and ends last: a load takes from the first begin to the last end.
        return [Sample(contender, 5.0, 5.0, peak, facts), Sample(contender, 5.1, 5.0 + seconds, 7, facts)]

    first = [load(DCP, 4.0), load(RESHARD, ours)]
    repeated = [load(DCP, 2.0), load(RESHARD, ours), load("copy_read", 0.9), load("copy_mapped", 0.8), load("copy_buffered", 0.1)]
    results = summarize(case, scale=0.001, judged=True, first=first, repeated=repeated)
    assert [found["met"] for found in results["checks"]] == [met] * 4
    assert results["checks"][0]["value"] == pytest.approx(2.0 / ours)
    assert results["copy"] == {"fastest": "copy_mapped", "median": pytest.approx(0.8)}
    assert results["reshard"]["phases"] == {"read": 2.0, "plan": 0.5}
    assert results["first"][DCP]["seconds"] == [pytest.approx(4.0)]


def test_without_a_load_of_dcp_the_estimate_is_compared() -> None:
    case = CASES[-1]
    facts = {"bytes_needed": 1, "bytes_read": 1, "bytes_of_pages": 0, "phases": []}
    ours = [Sample(RESHARD, 0.0, 2.0, None, facts)]
    copy = [Sample("copy_read", 0.0, 1.0, None)]
    results = summarize(case, scale=0.001, judged=True, first=[ours], repeated=[ours, copy], unfinished=600.0, estimate=1000.0)
    over_dcp, _, _, memory = results["checks"]
    assert (over_dcp["value"], over_dcp["met"]) == (500.0, None)
    assert (memory["value"], memory["met"]) == (None, None)
    assert results["dcp"] == {"stopped_after": 600.0, "estimate": 1000.0}


def _values(tensor: TensorSpec, region: Region) -> np.ndarray:
    return np.concatenate([bits for _, bits in states.values(tensor, region)]).reshape(region.shape)
