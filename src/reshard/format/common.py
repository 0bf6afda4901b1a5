"""`common.json`: what a resume needs to know about progress, the same for every framework."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import msgspec

from reshard.errors import MetadataError
from reshard.format import json_text
from reshard.format.seal import SealedFile
from reshard.format.small_file import read_small
from reshard.storage import Storage

# Seven numbers and their names take some hundred bytes; a writer of another version may add to them.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class CommonInfo:
    """Progress of a run. The fields and their order are the contract's; the published reader rejects any other.

    Attributes:
        epoch_num: the epoch.
        step_num: the step that the run resumes after.
        global_step: the optimizer's step count.
        loss_scale: the factor of dynamic loss scaling.
        global_batch_size: samples per step over all ranks.
        consumed_samples: samples seen so far.
        ckpt_status: 0 when the checkpoint is healthy, 1 when not.
    """

    epoch_num: int | None = None
    step_num: int | None = None
    global_step: int | None = None
    loss_scale: float | None = None
    global_batch_size: int | None = None
    consumed_samples: int | None = None
    ckpt_status: int | None = None


def is_unhealthy(info: CommonInfo | None) -> bool:
    """Whether a checkpoint is known to be one that a run better not resumes from. One of which nothing is known isn't."""
    return info is not None and info.ckpt_status is not None and info.ckpt_status != 0


def with_health(info: CommonInfo, metrics: Mapping[str, Any] | None) -> CommonInfo:
    """The training information with its health: where it doesn't say, the metric `loss` does, when there is one. Finite is healthy."""
    loss = None if info.ckpt_status is not None or metrics is None else metrics.get("loss")
    return info if loss is None else replace(info, ckpt_status=0 if math.isfinite(float(loss)) else 1)


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Wire(msgspec.Struct):
    epoch_num: _Count | None = None
    step_num: _Count | None = None
    global_step: _Count | None = None
    loss_scale: float | None = None
    global_batch_size: _Count | None = None
    consumed_samples: _Count | None = None
    ckpt_status: _Count | None = None


_DECODER = msgspec.json.Decoder(_Wire)


def encode_common(info: CommonInfo) -> bytes:
    """The file's bytes: every key, in the contract's order, indented by 4. Counts may be integers of any kind, numpy's too."""
    return json.dumps(asdict(info), indent=4, allow_nan=False, default=operator.index).encode("ascii")


def read_common(storage: Storage, path: str, sealed: SealedFile | None = None) -> CommonInfo | None:
    """What a file says; None when there is no such file.

    Args:
        storage: where it lies.
        path: the file.
        sealed: what the checkpoint's seal says of it: then it is that file, or an error.

    Raises:
        MetadataError: it isn't JSON, a value has the wrong type, it is larger than any such file, or not the one that was sealed.
        StorageError: the storage refuses.
    """
    if storage.stat(path) is None:
        return None
    data = read_small(storage, path, _MOST_BYTES, error=MetadataError)
    if sealed is not None:
        sealed.check(data, path)
    return decode_common(data, path)


def decode_common(data: bytes, file: str) -> CommonInfo:
    """What the file says. Missing keys become None; unknown ones are left out.

    Raises:
        MetadataError: it isn't JSON, or a value has the wrong type.
    """
    wire = json_text.decode(data, _DECODER, file, error=MetadataError)
    return CommonInfo(**{name: getattr(wire, name) for name in _Wire.__struct_fields__})
