"""reshard: save a training run under any parallel strategy, resume it under any other."""

from reshard import families
from reshard.checkpoint import Checkpoint
from reshard.errors import ReshardError
from reshard.export.job import ExportReport, export_checkpoint
from reshard.format.common import CommonInfo
from reshard.loading.choice import PassedOver
from reshard.loading.report import RestoreReport
from reshard.loading.strictness import Strictness
from reshard.manager import CheckpointManager
from reshard.saving.policies import Committed, KeepAny, KeepBest, KeepEvery, KeepFor, KeepNewest, KeepPolicy
from reshard.saving.report import SaveReport
from reshard.shortcuts import load, save
from reshard.sources.legacy.saved_under import SavedUnder
from reshard.sources.pytorch.naming import Prefixes
from reshard.stopping.graceful import GracefulStop
from reshard.verification import Fault, Verification, verify
from reshard.version import __version__

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "Committed",
    "CommonInfo",
    "ExportReport",
    "Fault",
    "GracefulStop",
    "KeepAny",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepNewest",
    "KeepPolicy",
    "PassedOver",
    "Prefixes",
    "ReshardError",
    "RestoreReport",
    "SaveReport",
    "SavedUnder",
    "Strictness",
    "Verification",
    "__version__",
    "export_checkpoint",
    "families",
    "load",
    "save",
    "verify",
]
