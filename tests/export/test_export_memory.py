"""A model of 4 GB is exported within little memory, by a process without a framework."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import reshard
from reshard.format.safetensors import plan_header
from reshard.geometry.dtypes import by_name

HIDDEN, FEED, VOCABULARY, HEADS, GROUPS, HEAD, LAYERS = 4096, 12288, 32000, 32, 8, 128, 10

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FEED,
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
}

# Exports, and prints the most that the process held of memory that no file backs.
PROGRAM = """
import sys, threading
from pathlib import Path
import reshard

def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) << 10

ended, most = threading.Event(), [0]

def watch():
    while not ended.wait(0.005):
        most[0] = max(most[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
dtype = sys.argv[4] if len(sys.argv) > 4 else None
report = reshard.export_checkpoint(sys.argv[1], sys.argv[2], config=sys.argv[3], max_shard_size="1GB", dtype=dtype)
ended.set()
watcher.join()
assert not {"torch", "mindspore", "transformers", "safetensors"} & set(sys.modules)
print(max(most[0], anonymous()), report.nbytes, len(report.files))
"""


def model() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
            prefix + "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD),
            prefix + "self_attention.q_layernorm.weight": (HEAD,),
            prefix + "self_attention.k_layernorm.weight": (HEAD,),
            prefix + "pre_mlp_layernorm.weight": (HIDDEN,),
            prefix + "mlp.linear_fc1.weight": (2 * FEED, HIDDEN),
            prefix + "mlp.linear_fc2.weight": (HIDDEN, FEED),
        }
    return shapes | {"decoder.final_layernorm.weight": (HIDDEN,), "output_layer.weight": (VOCABULARY, HIDDEN)}


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_large_model_takes_little_memory(tmp_path: Path, run_python: Callable[..., CompletedProcess[str]], dtype: str) -> None:
    """Fused and interleaved parameters on the way, and for float16 a conversion. The source is a file with holes, of a single card."""
    iteration = tmp_path / "root" / "iteration_00000001"
    iteration.mkdir(parents=True)
    common: dict[str, Any] = {"step_num": 1, "global_step": 1}
    (iteration / "common.json").write_text(json.dumps(common))
    header = plan_header([(name, by_name("bfloat16"), shape) for name, shape in model().items()], {"format": "ms"}, digests=False)
    with (iteration / "CKP-model-0000000-0000001.safetensors").open("wb") as file:
        file.write(header.encode([]))
        file.truncate(header.file_size)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    try:
        arguments = (str(tmp_path / "root"), str(tmp_path / "folder"), str(tmp_path / "config.json"), dtype)
        printed = run_python(PROGRAM, *arguments, timeout=850).stdout
        most, nbytes, files = map(int, printed.split())
        print(f"{nbytes / 1e9:.2f} GB in {files} files: at most {most / 1e6:.0f} MB of anonymous memory")
        assert nbytes > 4e9
        assert most < 600e6
        assert "model.layers.8.self_attn.q_proj.weight" in reshard.Checkpoint(tmp_path / "folder")
    finally:
        shutil.rmtree(tmp_path)
