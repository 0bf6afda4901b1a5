"""The adapter for what the caller gave, chosen by type. Imports no framework that the caller hasn't imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from reshard.comm import Communicator, SingleProcess
from reshard.errors import UsageError
from reshard.frameworks.adapter import Adapter
from reshard.frameworks.arrays import ArrayAdapter, holds_arrays


def select_adapter(model: Any, optimizer: Any) -> Adapter:
    """The adapter for a model and an optimizer.

    Args:
        model: a torch module, a list or dictionary of modules, a dictionary of arrays (or a list of such), or None.
        optimizer: a torch optimizer, a list or dictionary of optimizers, a dictionary of arrays, or None.

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
    framework = named.pop() if named else ("torch" if "torch" in sys.modules else "numpy")
    return _torch_adapter() if framework == "torch" else ArrayAdapter()


def default_communicator(timeout: float | None = None) -> Communicator:
    """The communicator of the framework that this process runs: over torch.distributed where it is initialised, else of one process.

    Collective.

    Args:
        timeout: seconds that a collective or a message may take; None for the framework's default.
    """
    if "torch" in sys.modules:
        return _torch_adapter(timeout).communicator()
    return SingleProcess()


def _is_nothing(part: Any) -> bool:
    return part is None or (isinstance(part, Mapping | list | tuple) and not part)


def _framework_of(part: Any, field: str) -> str:
    torch: Any = sys.modules.get("torch")
    items = list(_items(part))
    if torch is not None and items and all(isinstance(item, torch.nn.Module | torch.optim.Optimizer) for item in items):
        return "torch"
    if holds_arrays(part):
        return "numpy"
    raise UsageError(
        f"a {field} of a kind that no adapter knows",
        field=field,
        found=_kinds(part, items),
        expected=f"a torch {'module' if field == 'model' else 'optimizer'}, a list or dictionary of such, or a dictionary of numpy arrays",
    )


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


def _torch_adapter(timeout: float | None = None) -> Adapter:
    from reshard.frameworks.torch import TorchAdapter

    return TorchAdapter() if timeout is None else TorchAdapter(timeout)
