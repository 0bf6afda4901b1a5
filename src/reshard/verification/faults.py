"""What verifying gives: faults, as data."""

from __future__ import annotations

from dataclasses import dataclass

from reshard.errors import ReshardError


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in a checkpoint that is not as it should be.

    Attributes:
        file: the file concerned: its path inside the checkpoint's directory.
        what: what is wrong, in words.
        tensor: the tensor concerned, under its name in the file; None when the whole file is.
        found: what was found.
        expected: what should have been there.
    """

    file: str
    what: str
    tensor: str | None = None
    found: str | None = None
    expected: str | None = None

    @classmethod
    def of(cls, file: str, error: ReshardError) -> Fault:
        """The fault that an error means."""
        found, expected = (None if value is None else str(value) for value in (error.found, error.expected))
        return cls(file, error.what, error.tensor, found, expected)

    def __str__(self) -> str:
        facts = ", ".join(f"{word} {value}" for word, value in (("found", self.found), ("expected", self.expected)) if value is not None)
        subject = "" if self.tensor is None else f"{self.tensor}: "
        return f"{subject}{self.what}" + (f" ({facts})" if facts else "")


@dataclass(frozen=True)
class Verification:
    """What came of verifying a checkpoint.

    Attributes:
        directory: where its files lie.
        iteration: its number; None when the directory's name has none.
        is_sealed: whether a seal says which files belong to it, and which bytes they must have.
        files: how many files were looked at.
        nbytes: how many bytes were held against digests.
        faults: all that is wrong, file by file.
        notes: what else there is to know.
        seconds: how long it took.
    """

    directory: str
    iteration: int | None
    is_sealed: bool
    files: int
    nbytes: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def is_intact(self) -> bool:
        """Whether nothing is wrong, as far as it can be known."""
        return not self.faults


@dataclass(frozen=True)
class RootVerification:
    """What came of verifying all checkpoints of a root.

    Attributes:
        root: its path.
        tracker: what is wrong with the tracker; None when nothing is.
        iterations: of each checkpoint, by number.
    """

    root: str
    tracker: Fault | None
    iterations: tuple[Verification, ...]

    @property
    def is_intact(self) -> bool:
        """Whether nothing is wrong anywhere."""
        return self.tracker is None and all(iteration.is_intact for iteration in self.iterations)
