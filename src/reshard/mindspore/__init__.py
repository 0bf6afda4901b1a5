"""reshard for MindSpore: change an import, keep the names. See docs/mindspore.md."""

from reshard.frameworks.mindspore import lay_out
from reshard.integrations.mindspore import CheckpointMonitor, load_checkpoint, save_checkpoint

__all__ = ["CheckpointMonitor", "lay_out", "load_checkpoint", "save_checkpoint"]
