"""The configurations that are shipped are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from reshard.config.sizes import batch_sizes, expected_ranks, parallel_sizes
from reshard.config.validation import read_config

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_valid(path: Path) -> None:
    configuration = read_config(path)
    assert configuration.notes == ()
    sizes = parallel_sizes(configuration.run, expected_ranks(configuration.run))
    assert batch_sizes(configuration.run, sizes).total == configuration.run.runner_config.global_batch_size


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
