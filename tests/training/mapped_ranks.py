"""What ranks do with a run of MindSpore that goes on in PyTorch: the trainer's model and step, laid out as the trainer lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import Qwen3ForCausalLM

import reshard
from reshard.training.mesh import Place
from reshard.training.parallelize import build_model
from reshard.training.step import TrainStep
from tests import golden
from tests.training import ranks

CASE = "single_real_train"

# What the real run gave in its steps 2 and 3, and how close the other framework must come.
LOSSES, NEAR = (4.336116, 4.022907), 2e-5

_VOCABULARY = 128
_MODEL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip

# The checkpoint of a single card has the learning rate as a tensor, which PyTorch keeps elsewhere.
STRICT = reshard.Strictness(rules={"learning_rate": {"unexpected": "ignore"}})


class Run(NamedTuple):
    """A rank's part of the run: model, optimizer, step, place."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: TrainStep
    place: Place


def begin(strategy: dict[str, Any]) -> Run:
    """A fresh run of the published model under a strategy of the trainer's."""
    configuration = ranks.settings(**strategy, model=_MODEL, runner_config={"global_batch_size": 4})
    place, batch = ranks.rank_place(configuration)
    # The trainer's own data are bytes; these are not.
    settings = configuration.run.model.model_copy(update={"vocab_size": _VOCABULARY})
    model = build_model(settings, 7, place)
    _see_everything(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return Run(model, optimizer, TrainStep(model, settings, place, batch, 16), place)


def _see_everything(model: Any) -> None:
    """Attention without a mask, as the real run had it."""

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(len(inputs), 1, inputs.shape[1], inputs.shape[1])
        given = {"input_ids" if model.takes_tokens else "inputs_embeds": inputs}
        return Qwen3ForCausalLM.forward(model, **given, attention_mask=mask, use_cache=False).logits

    model.forward = forward


def losses(run: Run, steps: int) -> list[float]:
    """Steps on the real run's batch, whose labels are its tokens."""
    tokens = torch.from_numpy(np.load(golden.GOLDEN / CASE / "input_ids.npy")).long()
    share = len(tokens) // run.place.sizes.data
    mine = tokens[run.place.data_index * share : (run.place.data_index + 1) * share]
    found = []
    for _ in range(steps):
        run.optimizer.zero_grad()
        part = run.step._run_whole(mine, mine) if run.step._schedule is None else run.step._run_pipeline(mine, mine)
        found.append(run.step._over_all_ranks(part, 0.0)[0])
        run.optimizer.step()
    return found


def go_on(strategy: dict[str, Any], output: Path, how: dict[str, Any]) -> tuple[list[float], tuple[str, ...]]:
    """Take the real run up, give it back at once, train on, and give it back again: the losses, and what a load of it missed."""
    run = begin(strategy)
    report = reshard.load(golden.root(CASE), model=run.model, optimizer=run.optimizer, mapping="qwen3", strict=STRICT, **how)
    parts = {"model": run.model, "optimizer": run.optimizer, "mapping": "qwen3"}
    reshard.save(output / "back", 1, prefix="qwen3", **parts)
    found = losses(run, 2)
    reshard.save(output / "on", 3, **parts)
    return found, (*report.missing, *report.filled, *(name for name in report.unexpected if name != "learning_rate"))


def come_back(strategy: dict[str, Any], root: Path) -> list[float]:
    """A step of a fresh run that goes on from what `go_on` has saved last."""
    run = begin(strategy)
    with torch.no_grad():
        for parameter in run.model.parameters():
            nn.init.zeros_(parameter)
    reshard.load(root, model=run.model, optimizer=run.optimizer, mapping="qwen3")
    return losses(run, 1)


def assert_same_metadata(ours: Path, theirs: Path) -> None:
    """Two iterations say the same of the same tensors, but for the names that either framework gives the axes of its mesh."""
    one, other = golden.told(ours), golden.told(theirs)
    assert one["storage_data"] == other["storage_data"]
    assert one["state_dict_metadata"].keys() == other["state_dict_metadata"].keys()
    for name, entry in one["state_dict_metadata"].items():
        wanted = other["state_dict_metadata"][name]
        assert (entry.pop("layout") is None) == (wanted.pop("layout") is None), name
        assert entry == wanted, name
