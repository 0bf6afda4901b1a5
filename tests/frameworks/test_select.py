"""The adapter is chosen by type, and no framework is imported for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from reshard.errors import UsageError
from reshard.frameworks.arrays import ArrayAdapter
from reshard.frameworks.select import default_communicator, select_adapter
from reshard.frameworks.torch import TorchAdapter

MODULE = nn.Linear(1, 1)
OPTIMIZER = torch.optim.SGD(MODULE.parameters())
ARRAYS = {"w": np.ones(1)}


@pytest.mark.parametrize("model", [MODULE, [MODULE], {"a": MODULE}, nn.ModuleDict({"a": MODULE}), None])
@pytest.mark.parametrize("optimizer", [OPTIMIZER, [OPTIMIZER], {"a": OPTIMIZER}, None, []])
def test_torch(model, optimizer) -> None:
    assert isinstance(select_adapter(model, optimizer), TorchAdapter)


@pytest.mark.parametrize("model", [ARRAYS, [ARRAYS]])
@pytest.mark.parametrize("optimizer", [ARRAYS, {}, None])
def test_arrays(model, optimizer) -> None:
    assert isinstance(select_adapter(model, optimizer), ArrayAdapter)


@pytest.mark.parametrize(
    ("model", "optimizer", "words"),
    [
        (3, None, r"(?s)model.*builtins\.int"),
        ({"a": 3}, None, r"dict of builtins\.int"),
        (MODULE, object(), r"(?s)optimizer.*builtins\.object"),
        (MODULE, ARRAYS, r"(?s)different frameworks.*numpy.*torch"),
        ([MODULE, 3], None, r"list of"),
    ],
)
def test_others(model, optimizer, words) -> None:
    with pytest.raises(UsageError, match=words):
        select_adapter(model, optimizer)


def test_a_single_process_talks_to_itself() -> None:
    assert default_communicator().world_size == 1
    assert TorchAdapter().communicator().all_gather(b"x") == [b"x"]


def test_without_torch(run_python) -> None:
    code = """
import sys, numpy
from reshard.frameworks.select import default_communicator, select_adapter
print(select_adapter({"w": numpy.ones(1)}, None).framework, select_adapter(None, None).framework, default_communicator().world_size)
try:
    select_adapter(object(), None)
except Exception as error:
    print(type(error).__name__)
print("torch" in sys.modules)
"""
    assert run_python(code).stdout.split() == ["numpy", "numpy", "1", "UsageError", "False"]
