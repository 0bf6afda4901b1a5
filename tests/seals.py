"""Checkpoints that a test has changed on purpose: without a seal, or with one that fits the change."""

from __future__ import annotations

import json
from pathlib import Path

from reshard.format.safetensors import read_header
from reshard.format.seal import SEAL_FILE, SealedFile, encode_seal
from reshard.storage import PosixStorage


def seal_again(directory: Path) -> None:
    """Seal an iteration as it is now."""
    files = {}
    for path in directory.rglob("*"):
        if path.is_file() and path.name != SEAL_FILE:
            name = str(path.relative_to(directory))
            if path.suffix == ".safetensors":
                header = read_header(PosixStorage(), str(path))
                files[name] = SealedFile(header.file_size, header.nbytes, header.digest)
            else:
                files[name] = SealedFile.whole(path.read_bytes())
    (directory / SEAL_FILE).write_bytes(encode_seal(files))


def unseal(directory: Path) -> None:
    """Make an iteration what a version that knew no seals wrote; digests stay in the headers."""
    (directory / SEAL_FILE).unlink()
    path = directory / "metadata.json"
    if path.exists():
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
