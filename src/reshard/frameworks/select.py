"""The adapter for what the caller gave, chosen by type. Imports no framework that the caller hasn't imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reshard.comm import Communicator, SingleProcess
from reshard.errors import UsageError
from reshard.frameworks.adapter import Adapter
from reshard.frameworks.arrays import ArrayAdapter, holds_arrays


def select_adapter(model: Any, optimizer: Any, before: Adapter | None = None) -> Adapter:
    """The adapter for a model and an optimizer.

    Args:
        model: a torch module or a MindSpore cell, a list or dictionary of them, a dictionary of arrays (or a list of such), or None.
        optimizer: an optimizer, a list or dictionary of optimizers, a dictionary of arrays, or None.
        before: one to go on with where it is of the right framework: it may know what it captured before.

    Returns:
        The adapter; when both are None or empty that of the framework in use, whose random states are part of the run.

    Raises:
        UsageError: something else, or a model and an optimizer of two frameworks.
    """
    parts = [("model", model), ("optimizer", optimizer)]
    frameworks = {field: _framework_of(part, field) for field, part in parts if not _is_nothing(part)}
    named = set(frameworks.values())
    if len(named) > 1:
        raise UsageError(
            "model and optimizer are of different frameworks",
            field="optimizer",
            found=frameworks["optimizer"],
            expected=f"{frameworks['model']}, as the model",
        )
    framework = named.pop() if named else _framework_in_use()
    return before if before is not None and before.framework == framework else _ADAPTERS[framework](None)


def default_communicator(timeout: float | None = None) -> Communicator:
    """The communicator of the framework that this process runs: over its ranks where they have found each other, else of one process.

    Collective.

    Args:
        timeout: seconds that a collective or a message may take; None for the framework's default.
    """
    framework = _framework_in_use()
    return SingleProcess() if framework == "numpy" else _ADAPTERS[framework](timeout).communicator()


def _framework_in_use() -> str:
    """The framework that this process runs: of two that are imported the one whose ranks have found each other."""
    mindspore_ranks: Any = sys.modules.get("mindspore.communication")
    torch_ranks: Any = sys.modules.get("torch.distributed")
    if mindspore_ranks is not None and mindspore_ranks.GlobalComm.INITED:
        return "mindspore"
    if torch_ranks is not None and torch_ranks.is_available() and torch_ranks.is_initialized():
        return "torch"
    return next((framework for framework in ("torch", "mindspore") if framework in sys.modules), "numpy")


def _is_nothing(part: Any) -> bool:
    return part is None or (isinstance(part, Mapping | list | tuple) and not part)


def _framework_of(part: Any, field: str) -> str:
    items = list(_items(part))
    for framework, kinds in _kinds_of_parts().items():
        if items and all(isinstance(item, kinds) for item in items):
            return framework
    if holds_arrays(part):
        return "numpy"
    raise UsageError(
        f"a {field} of a kind that no adapter knows",
        field=field,
        found=_kinds(part, items),
        expected=f"a torch {'module' if field == 'model' else 'optimizer'}, a MindSpore {'cell' if field == 'model' else 'optimizer'}, "
        "a list or dictionary of such, or a dictionary of numpy arrays",
    )


def _kinds_of_parts() -> dict[str, tuple[type, ...]]:
    """The classes of models and optimizers of the frameworks that are imported."""
    torch: Any = sys.modules.get("torch")
    mindspore: Any = sys.modules.get("mindspore")
    kinds: dict[str, tuple[type, ...]] = {}
    if torch is not None:
        kinds["torch"] = (torch.nn.Module, torch.optim.Optimizer)
    if mindspore is not None:
        kinds["mindspore"] = (mindspore.nn.Cell,)  # its optimizers are cells too
    return kinds


def _items(part: Any) -> Iterator[Any]:
    if isinstance(part, Mapping):
        yield from part.values()
    elif isinstance(part, list | tuple):
        yield from part
    else:
        # A wrapper of an optimizer (of a mixed-precision or a launching library) counts as what it wraps.
        torch: Any = sys.modules.get("torch")
        inner = getattr(part, "optimizer", None)
        yield inner if torch is not None and isinstance(inner, torch.optim.Optimizer) else part


def _kinds(part: Any, items: list[Any]) -> str:
    kinds = sorted({f"{type(item).__module__}.{type(item).__qualname__}" for item in items})
    where = f"{type(part).__name__} of " if isinstance(part, Mapping | list | tuple) else ""
    return where + (", ".join(kinds) or "nothing")


def _torch_adapter(timeout: float | None) -> Adapter:
    from reshard.frameworks.torch import TorchAdapter

    return TorchAdapter() if timeout is None else TorchAdapter(timeout)


def _mindspore_adapter(timeout: float | None) -> Adapter:
    from reshard.frameworks.mindspore import MindSporeAdapter

    return MindSporeAdapter() if timeout is None else MindSporeAdapter(timeout)


def _array_adapter(timeout: float | None) -> Adapter:
    return ArrayAdapter()


_ADAPTERS: Mapping[str, Callable[[float | None], Adapter]] = {
    "torch": _torch_adapter,
    "mindspore": _mindspore_adapter,
    "numpy": _array_adapter,
}
