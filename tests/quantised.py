"""Weights quantised by block, and what they stand for: made with numpy, one block after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The same bytes as a tensor."""
    if array.dtype == E4M3:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).view(torch.float8_e4m3fn)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def dequantised(values: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """What quantised values of two dimensions stand for: float32."""
    out = np.empty(values.shape, np.float32)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            there = np.s_[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            out[there] = values[there].astype(np.float32) * np.float32(scale[row, column])
    return out


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8, and its scale, so that the largest number of each block is the largest of the type."""
    rows, columns = (-(-extent // b) for extent, b in zip(weight.shape, block, strict=True))
    scale = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            there = (slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
            part = weight[there].float()
            scale[row, column] = part.abs().max() / 448
            values[there] = (part / scale[row, column]).to(torch.float8_e4m3fn)
    return values, scale


def quantise_folder(folder: Path, block: tuple[int, int] = (128, 128)) -> dict[str, np.ndarray]:
    """Quantise the projections of a folder of weights in its files, as DeepSeek-V3 and Qwen3-FP8 are published.

    Returns:
        What every tensor stands for then: float32 of the quantised ones, the others as they are.
    """
    meant: dict[str, np.ndarray] = {}
    places: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        made: dict[str, torch.Tensor] = {}
        for name, weight in load_file(file).items():
            if name.endswith("_proj.weight") or "_proj_with_mqa" in name or ".eh_proj." in name:
                values, scale = quantise(weight, block)
                made |= {name: values, f"{name}_scale_inv": scale}
                meant[name] = dequantised(values.view(torch.uint8).numpy().view(E4M3), scale.numpy(), block)
            else:
                made[name] = weight
                meant[name] = (
                    weight.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if weight.dtype == torch.bfloat16 else weight.numpy()
                )
        save_file(made, file, {"format": "pt"})
        places |= dict.fromkeys(made, file.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described(config, block)))
    return meant


def described(config: Mapping[str, Any], block: tuple[int, int]) -> dict[str, Any]:
    """A configuration of quantised weights."""
    return {**config, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}}
