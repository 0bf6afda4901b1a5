"""What a caller gives to a save, checked before anything is written."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from reshard.errors import MetadataError, UsageError
from reshard.format.common import CommonInfo, decode_common, encode_common
from reshard.format.names import COMMON_FILE, iteration_name
from reshard.state import GLOBAL_STEP, State


def check_step(step: SupportsIndex) -> int:
    """The number of an iteration.

    Raises:
        UsageError: it is no integer, or none that an iteration can have.
    """
    try:
        number = operator.index(step)
    except TypeError as cause:
        raise UsageError("the number of an iteration is an integer", field="step", found=repr(step)) from cause
    iteration_name(number)
    return number


def encode_checked(common: CommonInfo) -> bytes:
    """The encoded training information, seen to be readable again.

    Raises:
        UsageError: it isn't.
    """
    try:
        encoded = encode_common(common)
        decode_common(encoded, COMMON_FILE)
    except (TypeError, ValueError, MetadataError) as cause:
        raise UsageError("training information that common.json can't hold", field="common", found=str(cause)) from cause
    return encoded


def counted_steps(state: State) -> int | None:
    """The step count that a rank's optimizers have; None when it holds none."""
    tensor = state.tensors.get(GLOBAL_STEP)
    held = [] if tensor is None else [shard for shard in tensor.shards if not shard.region.is_empty]
    return int(held[0].memory.read().reshape(-1)[0]) if held else None
