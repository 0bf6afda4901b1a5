"""Text as one long row of bytes."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from reshard.errors import ConfigError

_FIELD = "train_dataset.path"

# Not the library's own source: what was installed beside it differs from machine to machine.
_NOT_STANDARD = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Files one after the other. Only what is asked for is read.

    Attributes:
        name: what to call it.
        files: the paths, in order.
        sizes: the bytes of each.
        names: what the files are called relative to the corpus, for the fingerprint.
    """

    name: str
    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    names: tuple[str, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.fromiter(accumulate(self.sizes), dtype=np.int64, count=len(self.sizes))

    @property
    def size(self) -> int:
        """Bytes in all files together."""
        return int(self._ends[-1])

    @cached_property
    def fingerprint(self) -> str:
        """A digest of names and sizes: another corpus has another one."""
        digest = hashlib.blake2b(digest_size=16)
        for name, size in zip(self.names, self.sizes, strict=True):
            digest.update(f"{name}\x1f{size}\n".encode())
        return digest.hexdigest()

    def read(self, offset: int, count: int) -> np.ndarray:
        """Bytes from an offset on, as uint8 of shape (count,).

        Raises:
            ConfigError: a file ends before the size that it had when the run began.
        """
        pieces: list[bytes] = []
        index = int(np.searchsorted(self._ends, offset, side="right"))
        while count > 0:
            begin = offset - (int(self._ends[index]) - self.sizes[index])
            wanted = min(count, self.sizes[index] - begin)
            with open(self.files[index], "rb") as file:
                file.seek(begin)
                piece = file.read(wanted)
            if len(piece) < wanted:
                raise ConfigError("a file of the training data became shorter while the run reads it", file=self.files[index], field=_FIELD)
            pieces.append(piece)
            offset, count, index = offset + wanted, count - wanted, index + 1
        return np.frombuffer(b"".join(pieces), dtype=np.uint8)


def open_corpus(path: str) -> Corpus:
    """The text that a configuration names.

    Args:
        path: a file, a folder (all files in it and below, hidden ones apart, in the order of their names), or empty for the source code of
            the running Python's standard library.

    Raises:
        ConfigError: there is no text.
    """
    if not path:
        root = Path(sysconfig.get_path("stdlib"))
        found = sorted(file for file in _below(root, _NOT_STANDARD) if file.suffix == ".py")
        name = "the source of Python's standard library"
    else:
        root = Path(path)
        if not root.exists():
            raise ConfigError(
                "there is no such file or folder",
                file=path,
                field=_FIELD,
                fix="name one, or leave train_dataset.path out to train on Python's standard library",
            )
        found = [root] if root.is_file() else sorted(_below(root, frozenset()))
        name = path
    base = root.parent if root.is_file() else root
    try:
        sized = [(file, file.stat().st_size) for file in found]
    except OSError as error:
        raise ConfigError("the training data can't be read", file=error.filename, field=_FIELD, found=error.strerror) from error
    kept = [(file, size) for file, size in sized if size > 0]
    if not kept:
        raise ConfigError("there is no text", file=root, field=_FIELD, found=f"{len(found)} files without content")
    files, sizes = zip(*kept, strict=True)
    return Corpus(name, files, sizes, tuple(file.relative_to(base).as_posix() for file in files))


def _below(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        yield from (Path(folder, name) for name in files if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)))
