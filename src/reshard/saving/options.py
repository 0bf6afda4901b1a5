"""How checkpoints are saved."""

from __future__ import annotations

from dataclasses import dataclass

from reshard.errors import UsageError
from reshard.format.names import data_file_name
from reshard.saving.policies import KeepPolicy
from reshard.saving.report import AsyncSave, WhenBusy
from reshard.state import Kind


@dataclass(frozen=True)
class SaveOptions:
    """How checkpoints are saved; the same on every rank.

    Attributes:
        prefix: the first part of data files' names; None for none.
        keep_checkpoint_max: how many committed checkpoints stay on disk, whoever wrote them; None for no such rule.
        keep: a policy of retention; what it keeps stays besides. Without it and `keep_checkpoint_max` all stay.
        save_optimizer: whether optimizer tensors are saved.
        remove_redundancy: whether of equal regions on several ranks only one is written.
        check_replicas: whether equal regions on several ranks are compared, by their digests, before a save commits.
        lock_timeout: seconds to wait for a root that another process holds.
        async_save: how much training waits for; None: until the checkpoint is committed.
        when_busy: what an asynchronous save does while the one before is under way.

    Raises:
        UsageError: an option that can't be.
    """

    prefix: str | None = "CKP"
    keep_checkpoint_max: int | None = 5
    keep: KeepPolicy | None = None
    save_optimizer: bool = True
    remove_redundancy: bool = False
    check_replicas: bool = False
    lock_timeout: float = 10.0
    async_save: AsyncSave | None = None
    when_busy: WhenBusy = "wait"

    def __post_init__(self) -> None:
        data_file_name(self.prefix, Kind.MODEL, 0, 1)
        keep = self.keep_checkpoint_max
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
            raise UsageError(
                "at least one checkpoint must be kept", field="keep_checkpoint_max", found=keep, expected="1 or more, or None to keep all"
            )
        if self.keep is not None and not isinstance(self.keep, KeepPolicy):
            raise UsageError("not a policy of retention", field="keep", found=repr(self.keep), expected="such as reshard.KeepEvery(1000)")
        if not self.lock_timeout >= 0:
            raise UsageError("a waiting time is not negative", field="lock_timeout", found=self.lock_timeout, expected="seconds, 0 or more")


def mode_of(async_save: bool | str, when_busy: str) -> AsyncSave | None:
    """How much training waits for, of a manager's arguments.

    Raises:
        UsageError: arguments that can't be.
    """
    if when_busy not in ("wait", "skip"):
        raise UsageError(
            "not a thing to do while a save is under way", field="when_busy", found=repr(when_busy), expected='"wait" or "skip"'
        )
    if async_save is True or async_save == "copy":
        return "copy"
    if async_save == "deferred":
        return "deferred"
    if async_save is False:
        return None
    raise UsageError("not a way to save", field="async_save", found=repr(async_save), expected='True, False, "copy" or "deferred"')
