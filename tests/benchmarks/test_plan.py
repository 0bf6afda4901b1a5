"""The planning benchmark at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plan
from benchmarks.deepseek import DeepSeek


@pytest.mark.sweep
def test_it_measures_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    assert plan.main(["--small", "--rounds", "1", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["facts"]["ranks"] == 64
    names = [figure["name"] for figure in results["figures"]]
    assert len(names) == len(set(names))
    assert all(figure["seconds"] > 0 for figure in results["figures"])
    assert sum(figure["at_most"] is not None for figure in results["figures"]) == 4
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_the_model_is_of_the_published_size() -> None:
    total = 0
    experts = 0
    for name, shape in DeepSeek().parameters():
        size = 1
        for extent in shape:
            size *= extent
        total += size
        experts += ".mlp.experts." in name
    assert experts == 58 * 256 * 3
    assert round(total / 1e9) == 671
