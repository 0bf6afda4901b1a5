"""The golden checkpoints: what the published implementation wrote, and the whole tensors that must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import reshard

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


def typed(case: str) -> dict[str, np.ndarray]:
    """The whole tensors by name, in the types that they have in files."""
    checkpoint = reshard.Checkpoint(root(case))
    return {name: array.astype(checkpoint[name].dtype.numpy) for name, array in expected(case).items() if name in checkpoint}


def told(iteration: Path) -> dict[str, Any]:
    """What the `metadata.json` of a checkpoint says, without what this project adds and in the order of names."""
    metadata = json.loads((iteration / "metadata.json").read_text(encoding="utf-8"))
    for entry in metadata["state_dict_metadata"].values():
        for chunk in entry["chunk"]:
            chunk.pop("offset", None)
    return {part: dict(sorted(metadata[part].items())) for part in ("state_dict_metadata", "storage_data")}
