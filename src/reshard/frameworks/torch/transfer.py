"""From an accelerator to the host beside what the accelerator does: pinned buffers, and a stream of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch


def pinned_buffer(nbytes: int) -> np.ndarray:
    """Memory of the host that an accelerator can copy to while the host does something else; ordinary memory where there is none."""
    if not torch.accelerator.is_available():
        return np.empty(nbytes, np.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def copy_to_host(tensor: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    """Begin to copy a tensor off an accelerator, behind what its present stream has been given and beside what comes later.

    Args:
        tensor: on the accelerator. It must live until the copy is done.
        target: on the host; in pinned memory, or the copy isn't beside anything.

    Returns:
        Waits until the target has the values.
    """
    stream = _side_stream(tensor.device)
    stream.wait_stream(torch.accelerator.current_stream(tensor.device))
    with stream, torch.no_grad():
        target.copy_(tensor, non_blocking=True)
    # Nobody may be given the tensor's memory before that.
    tensor.record_stream(stream)
    return stream.record_event().synchronize


@cache
def _side_stream(device: torch.device) -> torch.Stream:
    """The stream of all copies from a device: they share its way to the host in any case."""
    return torch.Stream(device)
