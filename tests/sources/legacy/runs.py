"""Checkpoint 1.0 of several ranks: each rank's file by `mindspore.save_checkpoint`, strategy files with MindSpore's own schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

TensorMap = list[Any]


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut: MindSpore's words, and the pipeline stages that have it."""

    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    tensor_map: tuple[Any, ...]
    shard: int = 0
    stages: tuple[int, ...] = (0,)
    dtype: str = "float32"

    @property
    def size(self) -> int:
        return prod(self.matrix)

    @property
    def used(self) -> list[int]:
        entries = [entry if isinstance(entry, tuple) else (entry,) for entry in self.tensor_map]
        return [len(self.matrix) - 1 - axis for entry in entries for axis in entry if axis >= 0]

    def group(self, position: int) -> list[int]:
        """The positions that would hold the same slice, in order."""
        own = np.unravel_index(position, self.matrix)
        everyone = [np.unravel_index(other, self.matrix) for other in range(self.size)]
        return [other for other, place in enumerate(everyone) if all(place[axis] == own[axis] for axis in self.used)]

    @property
    def step(self) -> int:
        group = self.group(0)
        return group[1] - group[0] if self.shard and len(group) > 1 else 0

    def part(self, array: np.ndarray, position: int) -> np.ndarray:
        """What one position of the mesh holds, by numpy alone."""
        place = np.unravel_index(position, self.matrix)
        for dimension, entry in enumerate(self.tensor_map):
            for axis in entry if isinstance(entry, tuple) else (entry,):
                if axis >= 0:
                    axis = len(self.matrix) - 1 - axis
                    array = np.split(array, self.matrix[axis], axis=dimension)[int(place[axis])]
        if self.shard:
            group = self.group(position)
            size = len(group) if self.shard == -1 else self.shard
            array = np.split(array, size, axis=0)[group.index(position) % size]
        return np.ascontiguousarray(array)


def arrays_of(cuts: Mapping[str, Cut], seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.integers(0, 1000, cut.shape).astype(cut.dtype) for name, cut in cuts.items()}


def write_ranks(
    directory: Path,
    cuts: Mapping[str, Cut],
    arrays: Mapping[str, np.ndarray],
    *,
    suffix: str = "safetensors",
    redundant: bool = True,
    beside: Mapping[str, np.ndarray] | None = None,
    save: str = "1_3",
) -> int:
    """Write every rank's file; without redundancy each slice only on one of its ranks. Gives the number of ranks."""
    ranks = max(cut.size * (stage + 1) for cut in cuts.values() for stage in cut.stages)
    written: set[Any] = set()
    for rank in range(ranks):
        rows = []
        for number, (name, cut) in enumerate(cuts.items()):
            stage, position = divmod(rank, cut.size)
            if stage not in cut.stages:
                continue
            part = cut.part(arrays[name], position)
            slot = (name, stage, part.tobytes())
            # Not always the first rank that has a slice.
            is_last = not any(cut.part(arrays[name], other).tobytes() == part.tobytes() for other in range(position + 1, cut.size))
            if redundant or (is_last if number % 2 else slot not in written):
                written.add(slot)
                rows.append({"name": name, "data": Tensor(part)})
        rows += [{"name": name, "data": Tensor(value)} for name, value in (beside or {}).items()]
        (directory / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
        path = directory / f"rank_{rank}" / f"net_rank_{rank}-{save}.{suffix}"
        mindspore.save_checkpoint(rows, str(path), format=suffix)
    return ranks


def strategy_bytes(cuts: Mapping[str, Cut], stage: int) -> bytes:
    """A strategy file of one stage: as the runtime writes it."""
    made = ParallelStrategyMap(current_stage=1)
    item = made.parallel_strategy_item.add(node_name="MatMul-op0")
    item.parallel_strategys.stage = stage
    item.parallel_strategys.parallel_strategy.add().dim.extend([1, 1])
    for name, cut in cuts.items():
        if stage not in cut.stages:
            continue
        layouts = made.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.dev_matrix.add().dim.extend(cut.matrix)
        if any(isinstance(entry, tuple) for entry in cut.tensor_map):
            for entry in cut.tensor_map:
                layouts.tensor_map.add().dim.extend(entry if isinstance(entry, tuple) else [entry])
        else:
            layouts.tensor_map.add().dim.extend(cut.tensor_map)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = 0
        layouts.opt_weight_shard_step = cut.step
        layouts.opt_weight_shard_size = cut.shard
    return made.SerializeToString()


def strategy_json(cuts: Mapping[str, Cut], stage: int) -> bytes:
    layouts = {
        name: {
            "dev_matrix": list(cut.matrix),
            "tensor_map": [list(entry) if isinstance(entry, tuple) else entry for entry in cut.tensor_map],
            "tensor_shape": list(cut.shape),
            "field": 0,
            "opt_weight_shard_step": cut.step,
            "opt_weight_shard_size": cut.shard,
        }
        for name, cut in cuts.items()
        if stage in cut.stages
    }
    nodes = {"MatMul-op0": {"stage": stage, "parallel_strategy": [[1, 1]]}}
    return json.dumps({"current_stage": 1, "parallel_strategy_item": nodes, "parallel_layout_item": layouts}).encode()


def write_strategy(directory: Path, cuts: Mapping[str, Cut], *, suffix: str = "ckpt") -> Path:
    """Each rank's strategy file: those of a stage are equal."""
    directory.mkdir(parents=True)
    size = next(iter(cuts.values())).size
    stages = stages_of(cuts.values())
    for rank in range(size * len(stages)):
        data = (strategy_bytes if suffix == "ckpt" else strategy_json)(cuts, rank // size)
        (directory / f"ckpt_strategy_rank_{rank}.{suffix}").write_bytes(data)
    return directory


def stages_of(cuts: Iterable[Cut]) -> list[int]:
    return sorted({stage for cut in cuts for stage in cut.stages})
