"""How a save went: what each rank tells the others, and what follows for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from reshard import errors
from reshard.errors import NoSpaceError, ReshardError, SaveError, UsageError
from reshard.format.names import iteration_name
from reshard.format.seal import SealedFile
from reshard.saving.groups import GroupOptions


class Failure(msgspec.Struct, array_like=True):
    """An error on its way to other ranks: the name of its class in `errors`, and its text."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: ReshardError) -> Failure:
        """The failure that an error is."""
        return cls(type(error).__name__, str(error))

    @property
    def error_class(self) -> type[ReshardError]:
        """The class of the error."""
        found = getattr(errors, self.kind, ReshardError)
        return found if isinstance(found, type) and issubclass(found, ReshardError) else ReshardError


class Outcome(msgspec.Struct, array_like=True):
    """What one rank tells the others when its part of a save is done, well or not.

    Attributes:
        step: the iteration that it saves; None when it got none that can be.
        failure: what kept it from writing its part; None when nothing did.
        files: by the paths of its files inside the iteration's directory, what the seal says of them.
        news: its structure, when the others don't know it yet.
        options: the hyper-parameters of its groups.
        global_step: the step count of its optimizers; None when it has none.
        replicas: where replicas are compared, the digests of what it holds with others, by the number of these ranks.
    """

    step: int | None
    failure: Failure | None
    files: dict[str, SealedFile]
    news: bytes | None
    options: list[GroupOptions]
    global_step: int | None = None
    replicas: dict[int, bytes] = {}


class Verdict(msgspec.Struct, array_like=True):
    """What rank 0 tells the others at the end of a save.

    Attributes:
        failure: why nothing was committed; None when the checkpoint is there.
        removed: the iterations that retention removed.
    """

    failure: Failure | None
    removed: list[int]


def failure_of_ranks(outcomes: Sequence[Outcome]) -> Failure | None:
    """What the ranks' outcomes say against a commit; None when nothing does."""
    failed = {rank: outcome.failure for rank, outcome in enumerate(outcomes) if outcome.failure is not None}
    steps: dict[int, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        if outcome.step is not None:
            steps.setdefault(outcome.step, []).append(rank)
    if failed:
        return describe_failure(next(iter(steps), None), failed, len(outcomes))
    if len(steps) > 1:
        error = SaveError(
            "the ranks disagree over the iteration to save; nothing was saved",
            field="step",
            found=_name_values(steps),
            expected="the same on every rank",
        )
        return Failure.of(error)
    counts: dict[int, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        if outcome.global_step is not None:
            counts.setdefault(outcome.global_step, []).append(rank)
    if len(counts) > 1:
        # Every rank stores the count, and a load takes any one: they must be the same.
        error = SaveError(
            "the ranks' optimizers have counted different numbers of steps; nothing was saved",
            field="global_step",
            found=_name_values(counts),
            expected="the same on every rank",
            fix="say which one is the run's: common=CommonInfo(global_step=...); parameters that count otherwise keep their own counts",
        )
        return Failure.of(error)
    return None


def _name_values(values: Mapping[int, Sequence[int]]) -> str:
    return "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in values.items())


# What a failed save means for what is on disk.
UNCHANGED = "Nothing was committed; the checkpoints before it are as they were"


def describe_failure(step: int | None, failed: Mapping[int, Failure], world_size: int, consequence: str = UNCHANGED) -> Failure:
    """One failure for all ranks, that names each one that failed and why.

    It is a NoSpaceError when any is; a UsageError when all are, of the first one's kind; else a SaveError.
    """
    classes = [failure.error_class for failure in failed.values()]
    kind: type[ReshardError] = SaveError
    if any(issubclass(found, NoSpaceError) for found in classes):
        kind = NoSpaceError
    elif all(issubclass(found, UsageError) for found in classes):
        kind = classes[0]
    causes: dict[tuple[str, str], list[int]] = {}
    for rank, failure in failed.items():
        causes.setdefault((failure.kind, failure.text), []).append(rank)
    what = "the checkpoint" if step is None else iteration_name(step)
    count = f"{len(failed)} of {world_size} ranks failed. " if world_size > 1 else ""
    lines = [f"{what} was not saved: {count}{consequence}"]
    for (name, text), ranks in causes.items():
        lines.append(f"  on {name_ranks(ranks)}: {name}: " + text.replace("\n", "\n    "))
    return Failure(kind.__name__, "\n".join(lines))


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks in words, runs of them shortened: `ranks 0-3, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
