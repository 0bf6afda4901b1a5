"""The golden checkpoints: what the published implementation wrote, and the whole tensors that must come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
WITH_METADATA = [case for case in CASES if case != "single_real_train"]


def root(case: str) -> Path:
    """The checkpoint root of a case."""
    return GOLDEN / case / "checkpoint"


def iteration(case: str) -> Path:
    """The only iteration of a case."""
    return root(case) / "iteration_00000001"


def expected(case: str) -> dict[str, np.ndarray]:
    """The whole tensors by name; bfloat16 as float32 of the same values."""
    with np.load(GOLDEN / case / "expected.npz") as arrays:
        return dict(arrays)
