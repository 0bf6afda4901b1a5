"""A mapping on some ranks only, names of parts, and what a load through a mapping leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reshard
from reshard.errors import ReshardError, UsageError
from reshard.families import RuleMapping, family, rename
from reshard.state import model_key
from reshard.storage.memory import MemoryStorage
from reshard.testing import mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank

MAPPING = RuleMapping(run=(rename("mine", "theirs"),))


def held(rank: int, name: str = "mine") -> dict[str, Any]:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    return {name: tensor_on_rank(model_key(name), array, split(mesh_of(tp=3), "tp", None), rank)}


@pytest.mark.parametrize("without", [(0,), (2,), (1, 2)])
def test_ranks_without_the_mapping_of_the_others_are_named_on_every_rank(without: tuple[int, ...]) -> None:
    storage = MemoryStorage()

    def mapping(comm: Any) -> RuleMapping | None:
        return None if comm.rank in without else MAPPING

    def save(comm: Any) -> None:
        with reshard.CheckpointManager("/c", communicator=comm, storage=storage) as manager:
            with pytest.raises(UsageError, match="some ranks save through a mapping"):
                manager.save(1, model=held(comm.rank), mapping=mapping(comm))
            manager.save(2, model=held(comm.rank), mapping=MAPPING)
            with pytest.raises(UsageError, match="some ranks save through a mapping"):
                manager.save(3, model=held(comm.rank), mapping=mapping(comm))
            manager.save(4, model=held(comm.rank), mapping=MAPPING)

    run_ranks(3, save)
    assert list(reshard.Checkpoint("/c", storage)) == ["theirs"]
    assert reshard.Checkpoint("/c", storage).iteration == 4
    for outcome in run_ranks_settled(
        3, lambda comm: reshard.load("/c", model=held(comm.rank), communicator=comm, storage=storage, mapping=mapping(comm))
    ):
        assert isinstance(outcome, UsageError)
        assert "different options" in str(outcome)


def test_a_mapping_that_is_none_is_told_to_every_rank() -> None:
    storage = MemoryStorage()

    def save(comm: Any) -> None:
        reshard.save("/c", 1, model=held(comm.rank), communicator=comm, storage=storage, mapping="qwen33" if comm.rank else MAPPING)

    first, *others = run_ranks_settled(3, save)
    assert isinstance(first, UsageError)
    for other in others:
        assert isinstance(other, ReshardError)
        assert "qwen33" in str(other)
    assert not storage.stat("/c/latest_checkpointed_iteration.txt")


def test_prefixes_say_where_a_model_begins(tmp_path: Path) -> None:
    torch.save({"policy": {"w": torch.ones(3)}, "reference": {"w": torch.zeros(3)}}, tmp_path / "both.pt")
    model = {"w": np.full(3, 7, np.float32)}
    reshard.load(tmp_path / "both.pt", model=model, prefixes=reshard.Prefixes("policy."), strict=reshard.Strictness(unexpected="ignore"))
    np.testing.assert_array_equal(model["w"], 1)
    model = {"weight": np.full(3, 7, np.float32)}
    mapping = RuleMapping(run=(rename("weight", "w"),))
    reshard.load(tmp_path / "both.pt", model=model, prefixes=reshard.Prefixes("reference."), mapping=mapping)
    np.testing.assert_array_equal(model["weight"], 0)


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def test_sizes_come_from_the_configuration_that_the_run_saved() -> None:
    storage = MemoryStorage()
    rng = np.random.default_rng(0)
    theirs = {
        f"model.layers.0.self_attn.{part}_proj.weight": rng.standard_normal((rows, 6), np.float32)
        for part, rows in (("q", 16), ("k", 8), ("v", 8))
    }
    reshard.save("/c", 1, model=theirs, storage=storage, extra={"config": CONFIG})
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    model = {name: np.zeros((32, 6), np.float32)}
    report = reshard.load("/c", model=model, storage=storage, mapping="qwen3")
    q, k, v = (array.reshape(2, -1, 6) for array in theirs.values())
    np.testing.assert_array_equal(model[name], np.concatenate([q, k, v], 1).reshape(32, 6))
    assert report.unexpected == ()
    # And a part of them, by the run's names.
    model[name] = np.zeros_like(model[name])
    model["other"] = np.zeros(2)
    report = reshard.load("/c", model=model, storage=storage, mapping="qwen3", only="*.linear_qkv.*")
    assert model[name].any()
    assert report.skipped == ("other",)


@pytest.mark.parametrize("mapping", [None, "qwen3"])
def test_an_output_layer_that_repeats_the_embedding_is_told_as_such(mapping: str | None) -> None:
    storage = MemoryStorage()
    table = np.ones((4, 3), np.float32)
    theirs = {"model.embed_tokens.weight": table, "lm_head.weight": table.copy()}
    reshard.save("/c", 1, model=theirs, storage=storage, extra={"config": CONFIG})
    ours = family("qwen3").saves_as if mapping else None
    name = "embedding.word_embeddings.weight" if ours else "model.embed_tokens.weight"
    report = reshard.load("/c", model={name: np.zeros((4, 3), np.float32)}, storage=storage, mapping=mapping)
    assert report.unexpected == ()
    assert any(note.startswith("lm_head.weight was not read: it is model.embed_tokens.weight") for note in report.notes)
