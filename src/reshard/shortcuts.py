"""A manager's life in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from reshard.comm import Communicator
from reshard.format.common import CommonInfo
from reshard.loading.budget import MEMORY_BUDGET
from reshard.loading.choice import OnCorrupt
from reshard.loading.report import RestoreReport
from reshard.loading.strictness import Strictness
from reshard.manager import CheckpointManager
from reshard.saving.report import SaveReport
from reshard.sources.pytorch.naming import Prefixes
from reshard.storage import Storage


def save(
    directory: str | os.PathLike[str],
    step: int,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    dataloader: Any = None,
    extra: Any = None,
    common: CommonInfo | None = None,
    metrics: Mapping[str, Any] | None = None,
    mapping: Any = None,
    prefix: str | None = "CKP",
    remove_redundancy: bool = False,
    check_replicas: bool = False,
    save_optimizer: bool = True,
    communicator: Communicator | None = None,
    storage: Storage | None = None,
) -> SaveReport:
    """Save one checkpoint: a manager's life in one call. Collective. It keeps every checkpoint that is there.

    Args:
        directory: the checkpoint root.
        step: as in `CheckpointManager.save`, and so are `model` to `mapping`.
        model: see there.
        optimizer: see there.
        scheduler: see there.
        dataloader: see there.
        extra: see there.
        common: see there.
        metrics: see there.
        mapping: see there.
        prefix: as in `CheckpointManager`, and so are the others.
        remove_redundancy: see there.
        check_replicas: see there.
        save_optimizer: see there.
        communicator: see there.
        storage: see there.

    Raises:
        ReshardError: as `CheckpointManager` and its `save`.
    """
    with CheckpointManager(
        directory,
        prefix=prefix,
        keep_checkpoint_max=None,
        remove_redundancy=remove_redundancy,
        check_replicas=check_replicas,
        save_optimizer=save_optimizer,
        communicator=communicator,
        storage=storage,
    ) as manager:
        return manager.save(
            step,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            dataloader=dataloader,
            extra=extra,
            common=common,
            metrics=metrics,
            mapping=mapping,
        )


@overload
def load(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    dataloader: Any = None,
    extra: Any = None,
    strict: Strictness | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    missing_ok: Literal[False] = False,
    on_corrupt: OnCorrupt = "error",
    skip_unhealthy: bool = False,
    restore_random: bool = True,
    reseed: int | None = None,
    balanced: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    verify: bool = True,
    neighbours: bool = True,
    mapping: Any = None,
    prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    communicator: Communicator | None = None,
    storage: Storage | None = None,
) -> RestoreReport: ...


@overload
def load(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    dataloader: Any = None,
    extra: Any = None,
    strict: Strictness | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    missing_ok: bool,
    on_corrupt: OnCorrupt = "error",
    skip_unhealthy: bool = False,
    restore_random: bool = True,
    reseed: int | None = None,
    balanced: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    verify: bool = True,
    neighbours: bool = True,
    mapping: Any = None,
    prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    communicator: Communicator | None = None,
    storage: Storage | None = None,
) -> RestoreReport | None: ...


def load(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    dataloader: Any = None,
    extra: Any = None,
    strict: Strictness | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    missing_ok: bool = False,
    on_corrupt: OnCorrupt = "error",
    skip_unhealthy: bool = False,
    restore_random: bool = True,
    reseed: int | None = None,
    balanced: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    verify: bool = True,
    neighbours: bool = True,
    mapping: Any = None,
    prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    communicator: Communicator | None = None,
    storage: Storage | None = None,
) -> RestoreReport | None:
    """Load one checkpoint: a root, an iteration, or a folder of Hugging Face weights. Collective. Nothing there is changed or locked.

    Args:
        path: as in `CheckpointManager.load`, and so are `model` to `prefixes`.
        model: see there.
        optimizer: see there.
        scheduler: see there.
        dataloader: see there.
        extra: see there.
        strict: see there.
        only: see there.
        exclude: see there.
        missing_ok: see there.
        on_corrupt: see there.
        skip_unhealthy: see there.
        restore_random: see there.
        reseed: see there.
        balanced: see there.
        memory_budget: see there.
        verify: see there.
        neighbours: see there.
        mapping: see there.
        prefixes: see there.
        communicator: as in `CheckpointManager`.
        storage: likewise.

    Raises:
        ReshardError: as `CheckpointManager.load`.
    """
    with CheckpointManager(path, communicator=communicator, storage=storage, read_only=True) as manager:
        return manager.load(
            path,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            dataloader=dataloader,
            extra=extra,
            strict=strict,
            only=only,
            exclude=exclude,
            missing_ok=missing_ok,
            on_corrupt=on_corrupt,
            skip_unhealthy=skip_unhealthy,
            restore_random=restore_random,
            reseed=reseed,
            balanced=balanced,
            memory_budget=memory_budget,
            verify=verify,
            neighbours=neighbours,
            mapping=mapping,
            prefixes=prefixes,
        )
