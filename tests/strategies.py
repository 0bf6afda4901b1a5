"""A small transformer's tensors, and the strategies that tests lay them out under."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from reshard.geometry import Layout, Mesh
from reshard.state import GLOBAL_STEP, TensorKey, model_key, slot_key
from reshard.testing import split

LAYERS = 4
HIDDEN, VOCABULARY, FFN = 12, 50, 22  # few of them divide by 4 or 8: uneven and empty parts are the rule here


@dataclass(frozen=True)
class Strategy:
    """Sizes of the axes; `fsdp`: parameters and moments are split over dp too, as FSDP2 does it (after tp)."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    fsdp: bool = False

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        named = (("fsdp" if self.fsdp else "dp", self.dp), ("tp", self.tp), ("pp", self.pp))
        return "x".join(f"{name}{size}" for name, size in named if size > 1) or "one"

    def mesh(self, stage: int) -> Mesh:
        per_stage = self.dp * self.tp
        return Mesh((self.dp, self.tp), ("dp", "tp"), tuple(range(stage * per_stage, (stage + 1) * per_stage)))

    def stage(self, layer: int) -> int:
        return layer * self.pp // LAYERS

    def layout(self, key: TensorKey, dimensions: int) -> Layout:
        """Column-parallel, row-parallel or replicated by name; then the first dimension over dp under fsdp."""
        name = key.parameter
        if name.startswith("layers."):
            stage = self.stage(int(name.split(".")[1]))
        else:
            stage = self.pp - 1 if name in ("head.weight", "final.norm") else 0
        axes: list[list[str]] = [[] for _ in range(dimensions)]
        if dimensions == 2:
            axes[1 if name.endswith("proj.weight") else 0].append("tp")
        if self.fsdp and dimensions:
            axes[0].append("dp")
        return split(self.mesh(stage), *axes)


STRATEGIES = (
    Strategy(),
    Strategy(dp=2),
    Strategy(tp=2),
    Strategy(pp=2),
    Strategy(dp=2, fsdp=True),
    Strategy(dp=4),
    Strategy(tp=4),
    Strategy(pp=4),
    Strategy(dp=4, fsdp=True),
    Strategy(dp=2, tp=2),
    Strategy(dp=2, tp=2, fsdp=True),
    Strategy(dp=2, pp=2),
    Strategy(tp=2, pp=2),
    Strategy(dp=8, fsdp=True),
    Strategy(tp=8),
    Strategy(dp=2, tp=4),
    Strategy(dp=4, tp=2, fsdp=True),
    Strategy(dp=2, tp=2, pp=2),
    Strategy(dp=2, tp=2, pp=2, fsdp=True),
    Strategy(tp=2, pp=4),
)

# What `make test` tries of them; a sweep tries all.
FEW = (
    STRATEGIES[0],
    Strategy(dp=2, fsdp=True),
    Strategy(tp=4),
    Strategy(tp=2, pp=2),
    Strategy(dp=4, tp=2, fsdp=True),
    Strategy(tp=2, pp=4),
)
MOSTLY_SWEPT = [pytest.param(strategy, id=str(strategy), marks=() if strategy in FEW else pytest.mark.sweep) for strategy in STRATEGIES]


def arrays() -> dict[TensorKey, np.ndarray]:
    """Whole tensors of the model and of AdamW: several dtypes, 0-d and empty ones, NaN payloads and -0.0."""
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.norm": (HIDDEN,),
            f"layers.{layer}.qkv.weight": (3 * HIDDEN, HIDDEN),
            f"layers.{layer}.proj.weight": (HIDDEN, HIDDEN),
            f"layers.{layer}.up.weight": (FFN, HIDDEN),
            f"layers.{layer}.down_proj.weight": (HIDDEN, FFN),
        }
    shapes |= {"final.norm": (HIDDEN,), "head.weight": (VOCABULARY, HIDDEN)}
    found: dict[TensorKey, np.ndarray] = {}
    for name, shape in shapes.items():
        found[model_key(name)] = random.standard_normal(shape).astype(ml_dtypes.bfloat16 if "up" in name else np.float32)
    found[model_key("layers.0.steps")] = np.array(12, np.int64)
    found[model_key("layers.1.mask")] = random.random((5, 3)) > 0.5
    found[model_key("layers.2.none")] = np.zeros((0, 4), np.float16)
    found[model_key("layers.3.scale")] = random.standard_normal((9,)).astype(ml_dtypes.float8_e4m3fn)
    found[model_key("embed.weight")][0, :3] = np.array([0x7FC00001, 0xFFC0DEAD, 0x80000000], np.uint32).view(np.float32)
    for name, shape in shapes.items():
        found[slot_key("adam_m", name)] = random.standard_normal(shape).astype(np.float32)
        found[slot_key("adam_v", name)] = random.random(shape).astype(np.float32)
    found[GLOBAL_STEP] = np.array([12], np.int32)
    return found


def layouts(strategy: Strategy) -> dict[TensorKey, Layout]:
    """The layout of every tensor."""
    return {key: strategy.layout(key, array.ndim) for key, array in arrays().items()}
