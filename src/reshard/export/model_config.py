"""The `config.json` of an export: given, or what the source says of its model."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from reshard.checkpoint import Checkpoint
from reshard.errors import UsageError
from reshard.export.sharding import ExportTensor
from reshard.families import Family, known_families, select_mapper
from reshard.format.names import tensor_name
from reshard.planning.mapping.mappers import ATOMS, Mapper, sizes_in
from reshard.sources.huggingface import CONFIG_FILE, read_model_config
from reshard.state import Kind, TensorKey
from reshard.storage import Storage

# What several families call the parameter whose values a tied output layer has.
_EMBEDDING = "embed_tokens.weight"
_OUTPUT = "lm_head.weight"


def read_given_config(storage: Storage, config: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration that the user gave.

    Args:
        storage: where it lies.
        config: the path of a `config.json` or of a folder that has one, or its contents.

    Raises:
        UsageError: there is no such file.
        MetadataError: it isn't JSON.
    """
    if isinstance(config, Mapping):
        return config
    path = os.path.abspath(os.fspath(config))
    folder, name = posixpath.split(path)
    there = storage.stat(path)
    if there is not None and there.is_directory:
        folder, name = path, CONFIG_FILE
    found = read_model_config(storage, folder, name) if there is not None else None
    if found is None:
        raise UsageError("there is no such configuration", field="config", file=path, expected=f"a {CONFIG_FILE}, or a folder that has one")
    return found


def config_of_model(model: Any) -> Mapping[str, Any] | None:
    """The configuration that a model of transformers carries, as `save_pretrained` writes it; None for another model."""
    parts = list(model.values()) if isinstance(model, Mapping) else list(model) if isinstance(model, list | tuple) else [model]
    for part in parts:
        to_json = getattr(getattr(getattr(part, "module", part), "config", None), "to_json_string", None)
        if to_json is not None:
            return json.loads(to_json())
    return None


def check_config(config: Mapping[str, Any] | None, directory: str) -> Mapping[str, Any]:
    """See that there is a configuration, and that it is a model's.

    Raises:
        UsageError: it isn't.
    """
    if config is None:
        raise UsageError(
            f"nothing says what the {CONFIG_FILE} of the export is to say",
            file=directory,
            field="config",
            found="no configuration was saved with the checkpoint",
            expected=f"a Hugging Face {CONFIG_FILE} of the model",
            fix="give it (--config PATH); or let the run save it: extra={'config': model.config.to_dict()}",
        )
    if not isinstance(config.get("model_type"), str):
        raise UsageError(
            "a configuration without model_type describes no model", field="config", found=", ".join(list(config)[:5]), file=directory
        )
    return config


def mapper_of(family: str | Family | None, config: Mapping[str, Any], names: Sequence[str]) -> Mapper | None:
    """What makes the names of Hugging Face files of a checkpoint's; None where they are those already.

    Args:
        family: what the user gave; None: the family is recognised by the configuration, and where none is known names stay as they are.
        config: of the model.
        names: of the checkpoint's model tensors.

    Raises:
        UsageError: a family that isn't known.
    """
    if family is None:
        recognised = [one for one in known_families() if config.get("model_type") in one.model_types]
        counts = recognised[0].count(names) if recognised else {}
        if counts.get(ATOMS, 0) >= max(counts.values(), default=0):
            return None
        family = recognised[0]
    mapper = select_mapper(family)
    return mapper.with_sizes(**sizes_in(config)) if isinstance(mapper, Family) else mapper


def written_config(config: Mapping[str, Any], tensors: Sequence[ExportTensor], checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The configuration with the element type of what is written, by which transformers chooses that of the model; what was dequantised
    is no longer called quantised.
    """
    if checkpoint.dequantised:
        config = unquantised(config)
    floating = {tensor.dtype.name for tensor in tensors if "float" in tensor.dtype.name}
    if len(floating) != 1:
        return config
    named = dict.fromkeys(("dtype", "torch_dtype") if "torch_dtype" in config else ("dtype",), floating.pop())
    return {**config, **named}


def unquantised(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration without what it says of quantised weights."""
    return {name: value for name, value in config.items() if name != "quantization_config"}


def tied_output(config: Mapping[str, Any], keys: Sequence[TensorKey]) -> tuple[str, str] | None:
    """The output layer's tensor that isn't written since the configuration ties it, and the embedding that it is; None when there is
    none.
    """
    names = {tensor_name(key) for key in keys if key.kind is Kind.MODEL}
    embeddings = [name for name in names if name.endswith(_EMBEDDING)]
    if config.get("tie_word_embeddings") is True and _OUTPUT in names and len(embeddings) == 1:
        return _OUTPUT, embeddings[0]
    return None
