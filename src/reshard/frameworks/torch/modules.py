"""Modules as named tensors: names without the wrappers' parts, each tied tensor once, nothing that `state_dict` would leave out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from reshard.errors import CaptureError, UsageError

# Children under these names are what a wrapper wraps: `torch.compile`, activation checkpointing and offloading, FSDP1.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# What a module has that doesn't override it.
_NO_EXTRA_STATE = nn.Module.get_extra_state

# Where `tie` keeps its declarations on a module.
_TIES = "_reshard_ties"


@dataclass
class NamedTensors:
    """What a model holds on this rank, in the order of its modules.

    Attributes:
        tensors: the parameters and buffers by global name; several where a tied one exists more than once on this rank.
        names: the global name of each parameter and buffer by identity, also of each occurrence of a tied one.
        tied: the global names of which a declaration says that they may exist more than once.
        fsdp2: the identities of the parameters that FSDP2 manages.
        extra_states: the modules that override `get_extra_state`, by the name that `state_dict` would give their extra state.
    """

    tensors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    fsdp2: set[int] = field(default_factory=set)
    extra_states: dict[str, nn.Module] = field(default_factory=dict)

    def all_tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, each occurrence of a tied one."""
        return chain.from_iterable(self.tensors.values())


def tie(module: nn.Module, names: Mapping[str, str]) -> None:
    """Declare that parameters or buffers of a module are the same tensor as others, which may lie on another pipeline stage.

    A declared tensor is saved and loaded under the other's name; on a rank that holds both, as tensors of two stages, a load fills both.
    Models of transformers need no declaration: theirs is read from `_tied_weights_keys`, where the configuration says
    `tie_word_embeddings`. Declaring again adds to what was declared.

    Args:
        module: a pipeline stage or a whole model.
        names: for each tied tensor's name in the module the name under which it is stored: `{"lm_head.weight": "embed.weight"}`. A name
            that stands for itself says that the same tensor exists on other stages too.

    Raises:
        UsageError: not a module.
    """
    if not isinstance(module, nn.Module):
        raise UsageError("only modules have tied tensors to declare", field="module", found=type(module).__name__)
    setattr(module, _TIES, {**getattr(module, _TIES, {}), **names})


def name_tensors(model: Any) -> NamedTensors:
    """The tensors of a model under their global names.

    FSDP2 modules whose parameters are gathered are resharded first (as `state_dict` does; it communicates nothing).

    Args:
        model: None, a module, a list of modules (the pipeline stages of this rank: their names are global, nothing is put before them), or
            a dictionary of modules (each key and a dot are put before the names).

    Raises:
        CaptureError: two tensors under one name; tensors that are declared tied and aren't; a model whose parameters aren't its own
            tensors (FSDP1).
        UsageError: something else than modules.
    """
    result = NamedTensors()
    for prefix, module in _roots(model):
        _add_module(result, module, prefix)
    return result


def _roots(model: Any) -> list[tuple[str, nn.Module]]:
    if model is None:
        return []
    if isinstance(model, nn.Module):
        return [("", model)]
    roots = [(f"{key}.", module) for key, module in model.items()] if isinstance(model, Mapping) else [("", module) for module in model]
    for _, module in roots:
        if not isinstance(module, nn.Module):
            raise UsageError("not a module", field="model", found=type(module).__name__, expected="modules, a list or dictionary of them")
    return roots


def _add_module(result: NamedTensors, root: nn.Module, prefix: str) -> None:
    # Modules by way of `_modules`, `_parameters` and `_buffers`, as `state_dict` itself goes: what is public goes through generators in
    # generators, and a deep model has hundreds of modules.
    paths = list(_walk(root, prefix))
    _see_to_fsdp(result, [module for _, module in paths])
    ties: dict[str, str] = {}
    # Each tensor with all names that this tree has for it; of most there is one, and they are many.
    found: dict[int, torch.Tensor] = {}
    names: dict[int, str | list[str]] = {}
    for path, module in paths:
        for name, target in _declared_ties(module).items():
            ties.setdefault(path + name, path + target)  # an outer module knows better than its parts
        for name, tensor in _own_tensors(module):
            identity = id(tensor)
            if identity in found:
                names[identity] = [*_as_list(names[identity]), path + name]
            else:
                found[identity] = tensor
                names[identity] = path + name
        if type(module).get_extra_state is not _NO_EXTRA_STATE and module not in result.extra_states.values():
            result.extra_states[f"{path}_extra_state"] = module
    here: dict[str, str] = {}
    tensors, known = result.tensors, result.names
    for (identity, tensor), own in zip(found.items(), names.values(), strict=True):
        if identity in known:
            continue  # it belongs to a module before this one too
        if not ties and type(own) is str and own not in here and own not in tensors:
            here[own] = known[identity] = own
            tensors[own] = [tensor]
        else:
            _add_tensor(result, tensor, _as_list(own), ties, here)


def _as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _add_tensor(result: NamedTensors, tensor: torch.Tensor, own: list[str], ties: Mapping[str, str], here: dict[str, str]) -> None:
    """Add one tensor of a module tree.

    Args:
        result: what it is added to.
        tensor: the tensor.
        own: its names in the tree.
        ties: what is declared as tied.
        here: the names that the tree itself has used, each with the first name of the tensor that it stood for.
    """
    targets = [ties[name] for name in own if name in ties]
    name = targets[0] if targets else own[0]
    if name in here and (targets or here[name] != name):
        raise CaptureError(
            "tensors that are declared as tied are two different tensors",
            tensor=name,
            found=" and ".join(sorted({own[0], here[name]})),
            expected="one tensor under both names",
            fix="tie them again after parallelize_module, fully_shard or whatever replaced one of them (model.lm_head.weight = "
            "model.model.embed_tokens.weight); or take the declaration back (config.tie_word_embeddings = False)",
        )
    if name in here:
        raise CaptureError("two tensors have the same name once the wrappers' parts are gone", tensor=name, fix="rename one of them")
    here[name] = own[0]
    result.names[id(tensor)] = name
    occurrences = result.tensors.setdefault(name, [])
    if occurrences and not (targets or name in result.tied):
        raise CaptureError(
            "two modules have a tensor of the same name",
            tensor=name,
            fix="give the modules as a dictionary, so that its keys come before the names; if they are pipeline stages that hold the same "
            "tensor, declare it: reshard.frameworks.torch.tie(module, {name: name})",
        )
    occurrences.append(tensor)
    if targets:
        result.tied.add(name)


def _walk(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a tree under every path that leads to them, parents first; a wrapper's path is that of what it wraps."""
    # Each with the identities of those above it: a module that has one of them for a child leads in a circle.
    left: list[tuple[str, nn.Module, tuple[int, ...]]] = [(prefix, root, ())]
    while left:
        path, module, above = left.pop()
        yield path, module
        if not module._modules:
            continue
        above = (*above, id(module))
        is_data_parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
        # `named_children` leaves out a child's second name.
        for name, child in reversed(module._modules.items()):
            if child is not None and id(child) not in above:
                is_wrapped = name in _WRAPPED or (is_data_parallel and name == "module")
                left.append((path if is_wrapped else f"{path}{name}.", child, above))


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and persistent buffers of one module, not of its children."""
    own: list[tuple[str, torch.Tensor]] = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    if module._buffers:
        transient = module._non_persistent_buffers_set  # torch has no public way to ask
        own += [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None and name not in transient]
    return own


def _declared_ties(module: nn.Module) -> dict[str, str]:
    """What a module declares as tied, by `tie` or as a model of transformers; names relative to it."""
    # Looked for where they are: `getattr` takes a module of most of its time to say that it has no such attribute. A wrapper hands on what
    # the module in it has, which is asked itself.
    own = module.__dict__
    ties = own.get(_TIES, {})
    declared = own.get("_tied_weights_keys", getattr(type(module), "_tied_weights_keys", None))
    if declared is None:
        return ties
    if isinstance(declared, Mapping) and getattr(getattr(module, "config", None), "tie_word_embeddings", False):
        # The class may declare patterns and whole modules; the instance has what they came to, from when the model was whole.
        expanded = getattr(module, "all_tied_weights_keys", None)
        ties = {**(expanded if isinstance(expanded, Mapping) else declared), **ties}
    return ties


def _see_to_fsdp(result: NamedTensors, modules: Sequence[nn.Module]) -> None:
    """Put the sharded parameters of FSDP2 modules in the place of gathered ones (after a forward pass without a backward pass), and note
    which these are.

    Raises:
        CaptureError: a module of FSDP1 that keeps its parameters in flat pieces.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        if isinstance(module, fsdp.FSDPModule):
            sharded: Any = module
            sharded.reshard()
            result.fsdp2.update(id(parameter) for parameter in module.parameters())
        elif isinstance(module, fsdp.FullyShardedDataParallel):
            _refuse_flat(module, fsdp)


def _refuse_flat(module: Any, fsdp: Any) -> None:
    whole = module.sharding_strategy is fsdp.ShardingStrategy.NO_SHARD and module._use_orig_params
    if not whole:
        raise CaptureError(
            "FullyShardedDataParallel (FSDP1) keeps parameters in flat pieces without names or shapes of their own",
            found=f"{type(module).__name__} with {module.sharding_strategy}",
            expected="FSDP2: torch.distributed.fsdp.fully_shard",
            fix="replace FullyShardedDataParallel(module) by fully_shard(module)",
        )
