"""`seal.json`: which files a checkpoint consists of, and the digests that cover every byte of them.

Of a safetensors file the seal has the digest of the header, and the header has those of the tensors; of any other file it has the digest of
the whole. The seal's own digest is the last thing in it, over all that stands before. So a flipped bit, a missing file or one of another
checkpoint is found, and by reading headers alone it is known which bytes every tensor must have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring

import msgspec

from reshard.errors import DamagedCheckpointError, DataFileError, MetadataError
from reshard.format import json_text
from reshard.format.digest import DIGEST_BYTES, DIGEST_DIGITS, DIGEST_NAME, digest_of, parse_digests
from reshard.format.names import DATA_SUFFIX, EXTRA_DIRECTORY, is_plain_file_name
from reshard.format.small_file import read_small
from reshard.storage import Storage
from reshard.storage.storage import join
from reshard.version import __version__

SEAL_FILE = "seal.json"

# A reader refuses a newer one: files may be covered in another way.
SEAL_VERSION = 1

# Above what any job needs: a file takes some 150 bytes, and a rank has three files, so that 500,000 ranks fit.
_MOST_BYTES = 256 << 20

_TAIL = re.compile(rf'"{DIGEST_NAME}":"([0-9a-f]{{{DIGEST_DIGITS}}})"}}\n'.encode())
_TAIL_BYTES = len(DIGEST_NAME) + DIGEST_DIGITS + 7

_RESTORE = "restore the file from a copy, or resume from another iteration"


@dataclass(frozen=True, slots=True)
class SealedFile:
    """What the seal says of a file.

    Attributes:
        size: the bytes of the file.
        covered: of how many bytes, from its begin, the digest is: the header of a safetensors file, else all.
        digest: of these.
    """

    size: int
    covered: int
    digest: bytes

    @classmethod
    def whole(cls, data: bytes) -> SealedFile:
        """A file that the digest covers whole."""
        return cls(len(data), len(data), digest_of(data))

    def check_size(self, size: int, path: str) -> None:
        """See that a file has the size that it had when it was sealed.

        Raises:
            DamagedCheckpointError: it hasn't; of the kind that the file's name says.
        """
        if size != self.size:
            what = "the file is truncated" if size < self.size else "the file is longer than when it was saved"
            raise _error_of(path)(what, file=path, found=f"{size} bytes", expected=f"{self.size} bytes, as the seal says", fix=_RESTORE)

    def check(self, data: bytes | bytearray, path: str) -> None:
        """See that the bytes that the digest covers are those that were sealed.

        Args:
            data: the header of a safetensors file, or the whole of another.
            path: the file, for the error.

        Raises:
            DamagedCheckpointError: they aren't; of the kind that the file's name says.
        """
        self.check_digest(len(data), digest_of(data), path)

    def check_digest(self, nbytes: int, digest: bytes, path: str) -> None:
        """What `check` does, of bytes that are no more at hand.

        Args:
            nbytes: how many they were.
            digest: their digest.
            path: as in `check`.

        Raises:
            DamagedCheckpointError: as `check`.
        """
        if nbytes == self.covered and digest == self.digest:
            return
        part = "the header of the file is" if path.endswith(DATA_SUFFIX) else "the file is"
        raise _error_of(path)(
            f"{part} not as it was saved",
            file=path,
            found=f"{nbytes} bytes with the digest {digest.hex()}",
            expected=f"{self.covered} bytes with the digest {self.digest.hex()}, as the seal says",
            fix=_RESTORE,
        )


@dataclass(frozen=True)
class Seal:
    """What a checkpoint consists of.

    Attributes:
        files: by path inside the checkpoint's directory (`extra/global.safetensors`); all but the seal itself.
    """

    files: Mapping[str, SealedFile]

    def file(self, name: str, path: str) -> SealedFile:
        """What the seal says of a file that something in the checkpoint refers to.

        Args:
            name: the path inside the checkpoint's directory.
            path: the file, for the error.

        Raises:
            DamagedCheckpointError: the file doesn't belong to the checkpoint.
        """
        found = self.files.get(name)
        if found is None:
            raise _error_of(path)("a file that the seal doesn't list: it is none of this checkpoint's", file=path, fix=_RESTORE)
        return found


def _error_of(path: str) -> type[DamagedCheckpointError]:
    return DataFileError if path.endswith(DATA_SUFFIX) else MetadataError


class _File(msgspec.Struct, gc=False):
    size: int
    xxh3_128: str
    header: int | None = None


class _Wire(msgspec.Struct):
    seal_version: int
    writer: str
    files: dict[str, _File]
    xxh3_128: str


class _Version(msgspec.Struct):
    seal_version: int
    writer: str = ""


_VERSION = msgspec.json.Decoder(_Version)
_DECODER = msgspec.json.Decoder(_Wire)


def encode_seal(files: Mapping[str, SealedFile]) -> bytes:
    """The file's bytes: JSON, a line for every file.

    Args:
        files: as in `Seal`.
    """
    lines = []
    for name, file in sorted(files.items()):
        header = f'"header":{file.covered},' if name.endswith(DATA_SUFFIX) else ""
        lines.append(f'{encode_basestring(name)}:{{"size":{file.size},{header}"{DIGEST_NAME}":"{file.digest.hex()}"}}')
    listed = ",\n".join(lines)
    body = f'{{"seal_version":{SEAL_VERSION},"writer":"reshard {__version__}","files":{{\n{listed}\n}},\n'.encode()
    return body + f'"{DIGEST_NAME}":"{digest_of(body).hex()}"}}\n'.encode()


def decode_seal(data: bytes, path: str) -> Seal:
    """The seal that a file holds.

    Raises:
        MetadataError: it isn't one, isn't as it was written, or is of a newer version.
    """
    tail = _TAIL.fullmatch(data[-_TAIL_BYTES:])
    body = data[:-_TAIL_BYTES]
    if tail is None:
        raise MetadataError(
            "the seal has no digest of its own at its end",
            file=path,
            found=f"{len(data)} bytes that end with {data[-20:]!r}",
            expected=f'"{DIGEST_NAME}", {DIGEST_DIGITS} hexadecimal digits, and a line end',
            fix=_RESTORE,
        )
    if digest_of(body).hex().encode() != tail[1]:
        raise MetadataError(
            "the seal is not as it was saved",
            file=path,
            found=f"the digest {digest_of(body).hex()}",
            expected=f"{tail[1].decode()}, as it says itself",
            fix=_RESTORE,
        )
    version = json_text.decode(data, _VERSION, path)
    if version.seal_version != SEAL_VERSION:
        raise MetadataError(
            "the seal was written by another version of reshard",
            file=path,
            field="seal_version",
            found=f"{version.seal_version}, written by {version.writer}",
            expected=SEAL_VERSION,
            fix="install that version",
        )
    wire = json_text.decode(data, _DECODER, path)
    json_text.check_duplicate_keys(data, 4 + sum(3 + (file.header is not None) for file in wire.files.values()), path)
    return Seal({name: _sealed(name, file, path) for name, file in wire.files.items()})


def read_seal(storage: Storage, directory: str) -> Seal | None:
    """The seal of a checkpoint; None when it has none.

    Raises:
        MetadataError: it is damaged, or of a newer version.
        StorageError: the storage refuses.
    """
    path = join(directory, SEAL_FILE)
    return None if storage.stat(path) is None else decode_seal(read_small(storage, path, _MOST_BYTES, error=MetadataError), path)


def _sealed(name: str, file: _File, path: str) -> SealedFile:
    plain = name.removeprefix(f"{EXTRA_DIRECTORY}/")
    covered = file.size if file.header is None else file.header
    digest = parse_digests(file.xxh3_128)
    is_possible = is_plain_file_name(plain) and 0 <= covered <= file.size and (file.header is not None) == name.endswith(DATA_SUFFIX)
    if not is_possible or digest is None or len(digest) != DIGEST_BYTES:
        raise MetadataError(
            "the seal lists a file that can't be",
            file=path,
            field="files",
            found=f"{name!r} of {file.size} bytes, of which {covered} have the digest {file.xxh3_128!r}"[:400],
            expected="a file in the checkpoint's directory, with its digest",
            fix=_RESTORE,
        )
    return SealedFile(file.size, covered, digest)
