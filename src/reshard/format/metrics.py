"""`extra/metrics.json`: the numbers that were saved with an iteration, a file of our own that the seal covers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from reshard.errors import MetadataError, UsageError
from reshard.format import json_text
from reshard.format.names import EXTRA_DIRECTORY
from reshard.format.seal import Seal
from reshard.format.small_file import read_small
from reshard.storage import Storage
from reshard.storage.storage import join

METRICS_FILE = "metrics.json"

# Some hundred metrics with long names; whoever has more to say has a log.
_MOST_BYTES = 1 << 16

# JSON has no word for these.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_DECODER = msgspec.json.Decoder(dict[str, float | str])


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers, which no longer change with what they were taken from.

    Args:
        metrics: numbers by name: Python's, numpy's, or whatever `float` takes, such as a tensor of one element.

    Raises:
        UsageError: a name that is no text, or a value that is no number.
    """
    if not isinstance(metrics, Mapping):
        raise UsageError("metrics are numbers by name", field="metrics", found=type(metrics).__name__, expected='such as {"loss": 1.2}')
    for name in metrics:
        if not isinstance(name, str) or not name:
            raise UsageError("a metric's name is text", field="metrics", found=repr(name))
    return {name: _number(name, value) for name, value in metrics.items()}


def encode_metrics(metrics: Mapping[str, Any]) -> bytes:
    """The file's bytes: a JSON object of numbers; what is not finite is the text `nan`, `inf` or `-inf`.

    Args:
        metrics: as in `numbers_of`.

    Raises:
        UsageError: likewise; or too many of them.
    """
    numbers = {name: number if math.isfinite(number) else str(number) for name, number in numbers_of(metrics).items()}
    encoded = (json.dumps(numbers, indent=4) + "\n").encode("ascii")
    if len(encoded) > _MOST_BYTES:
        raise UsageError("too many metrics", field="metrics", found=f"{len(encoded)} bytes", expected=f"at most {_MOST_BYTES}")
    return encoded


def _number(name: str, value: Any) -> float:
    try:
        # `float` would make numbers of texts and of truth values.
        if not isinstance(value, str | bytes | bytearray | bool):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise UsageError("a metric is a number", field=f"metrics[{name!r}]", found=f"{type(value).__name__}: {value!r:.80}")


def decode_metrics(data: bytes, file: str) -> dict[str, float]:
    """What the file says.

    Raises:
        MetadataError: it isn't JSON, or a value is no number.
    """
    metrics: dict[str, float] = {}
    for name, value in json_text.decode(data, _DECODER, file, error=MetadataError).items():
        number = _NOT_FINITE.get(value) if isinstance(value, str) else value
        if number is None:
            raise MetadataError("a metric is no number", file=file, field=name, found=repr(value), expected="a number, or nan, inf, -inf")
        metrics[name] = number
    return metrics


def read_metrics(storage: Storage, directory: str, seal: Seal | None) -> dict[str, float]:
    """The metrics of an iteration; empty when none were saved with it.

    Args:
        storage: where it lies.
        directory: of the iteration.
        seal: the iteration's. What has none was not written by this project, or by a version without metrics.

    Raises:
        MetadataError: the file is missing or damaged, or isn't the one that was sealed.
        StorageError: the storage refuses.
    """
    name = join(EXTRA_DIRECTORY, METRICS_FILE)
    sealed = None if seal is None else seal.files.get(name)
    if sealed is None:
        return {}
    path = join(directory, name)
    if storage.stat(path) is None:
        raise MetadataError("a file of the checkpoint is missing", file=path, found="nothing", expected="the file that the seal lists")
    data = read_small(storage, path, _MOST_BYTES, error=MetadataError)
    sealed.check(data, path)
    return decode_metrics(data, path)
