"""Every exception that reshard raises, in one tree.

```
ReshardError
├── UsageError                 the caller's input is wrong; nothing was read or written
│   ├── ConfigError            a field of the YAML configuration
│   ├── LayoutError            a mesh, layout or region that can't exist
│   └── CaptureError           a tensor, optimizer or value that can't be captured
├── CheckpointNotFoundError    no checkpoint where one was expected
├── DamagedCheckpointError     a checkpoint is there and is not what it promises
│   ├── TrackerError           `latest_checkpointed_iteration.txt`
│   ├── MetadataError          `metadata.json`, `common.json`, extras
│   └── DataFileError          a safetensors file
├── MismatchError              checkpoint and run don't fit (missing, shape, dtype)
├── SaveError                  a save failed; nothing was committed
│   ├── NoSpaceError           the file system can't take it
│   └── RootLockedError        another run writes the same root
├── StorageError               the storage refused an operation
│   └── ShortFileError         a file ended before the bytes that should be in it
└── CommunicationError         ranks could not reach or understand each other
    └── NoAgreementError       a run that was to stop: its ranks agreed on no last step
```

A message is built from named parts, so that none is forgotten: what happened, where (file, tensor, rank, field), what was found,
what was expected, and what to do next.
"""

from __future__ import annotations

import copy
from typing import TypeVar


class ReshardError(Exception):
    """The root of the tree.

    Args:
        what: one sentence: what went wrong.
        file: the file or directory concerned.
        tensor: the tensor concerned, under its name in files.
        rank: the global rank concerned.
        field: the field of a configuration, of metadata or of an argument.
        found: what was found.
        expected: what should have been there.
        fix: what to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        tensor: object = None,
        rank: int | None = None,
        field: str | None = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor = None if tensor is None else str(tensor)
        self.rank = rank
        self.field = field
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.what]
        parts = (
            ("file", self.file),
            ("tensor", self.tensor),
            ("rank", self.rank),
            ("field", self.field),
            ("found", self.found),
            ("expected", self.expected),
            ("next", self.fix),
        )
        lines += [f"  {label + ':':<10}{value}" for label, value in parts if value is not None]
        return "\n".join(lines)


class UsageError(ReshardError):
    """The caller's input is wrong; nothing was read or written."""


class ConfigError(UsageError):
    """A field of the YAML configuration is wrong."""


class LayoutError(UsageError):
    """A mesh, layout or region that can't exist."""


class CaptureError(UsageError):
    """A tensor, an optimizer or a value that can't be captured."""


class CheckpointNotFoundError(ReshardError):
    """There is no checkpoint where one was expected."""


class DamagedCheckpointError(ReshardError):
    """A checkpoint is there and is not what it promises."""


class TrackerError(DamagedCheckpointError):
    """The tracker is empty, not a number, or names a missing iteration."""


class MetadataError(DamagedCheckpointError):
    """`metadata.json`, `common.json` or the extras are missing or can't be understood."""


class DataFileError(DamagedCheckpointError):
    """A safetensors file is missing, truncated or not what metadata promises."""


class MismatchError(ReshardError):
    """Checkpoint and run don't fit: tensors are missing, or shapes or dtypes differ."""


class SaveError(ReshardError):
    """A save failed. Nothing was committed, what existed stays."""


class NoSpaceError(SaveError):
    """The file system has not enough room for the checkpoint."""


class RootLockedError(SaveError):
    """Another run writes the same checkpoint root."""


class StorageError(ReshardError):
    """The storage refused an operation (permission, missing path, input/output error)."""


class ShortFileError(StorageError):
    """A file ended before the bytes that should be in it: it was cut short, perhaps while it was read."""


class CommunicationError(ReshardError):
    """Ranks could not reach or understand each other."""


class NoAgreementError(CommunicationError):
    """A run was to stop, and its ranks did not agree on a last step in time. Nothing more can be saved; what was committed stays."""


# What a checkpoint is that isn't as it was saved: the errors that another checkpoint may be free of.
DAMAGE = (DamagedCheckpointError, ShortFileError)

_Error = TypeVar("_Error", bound=ReshardError)


def extended(error: _Error, *lines: tuple[str, object]) -> _Error:
    """The same error with more to say.

    Args:
        error: of any kind; it stays as it is.
        lines: a label and what is said, each a line at the end of the message.
    """
    more = copy.copy(error)
    more.args = ("\n".join([str(error), *(f"  {label + ':':<10}{text}" for label, text in lines)]),)
    return more


def naming(error: _Error, tensor: str) -> _Error:
    """The same error with the tensor concerned, unless it has one: memory doesn't know whose it is.

    Args:
        error: of any kind; it stays as it is.
        tensor: the tensor's name in files.
    """
    more = copy.copy(error)
    if more.tensor is None:
        more.tensor = tensor
        more.args = (more._message(),)
    return more
