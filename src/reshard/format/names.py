"""Every name of the contract, made and understood in one place: directories, files, tensors, storage keys."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

from reshard.errors import CaptureError, MetadataError, UsageError
from reshard.rows import rows
from reshard.state import Kind, TensorKey

TRACKER_FILE = "latest_checkpointed_iteration.txt"
METADATA_FILE = "metadata.json"
COMMON_FILE = "common.json"
EXTRA_DIRECTORY = "extra"
GLOBAL_EXTRA_FILE = "global.safetensors"
DATA_SUFFIX = ".safetensors"

# Saving an iteration again without an atomic exchange moves the old directory here for a moment; a reader takes it for the iteration
# when the real name is missing.
REPLACED_PREFIX = ".replaced-"

# Digits of an iteration's number: they hold every step of any run, fit into 63 bits, and keep a hostile file's number small.
MAX_STEP_DIGITS = 18

_ITERATION = re.compile(rf"iteration_(\d{{8,{MAX_STEP_DIGITS}}})", re.ASCII)
_DATA_FILE = re.compile(r"(?:.+-)?(model|opt)-(\d+)-(\d+)\.safetensors", re.ASCII | re.DOTALL)
_RANK_FILE = re.compile(r"rank-(\d{7,18})\.safetensors", re.ASCII)
# What Python's `str((name, (number,)))` looks like: the name is one string literal, in single quotes unless it holds a single quote only,
# with no other escapes than those that `repr` writes.
_ESCAPE = r"""\\(?:[\\'"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"""
_STORAGE_KEY = re.compile(rf"""\(('(?:[^'\\\n]|{_ESCAPE})*'|"(?:[^"\\\n]|{_ESCAPE})*"), \((\d{{1,18}}),\)\)""", re.ASCII)


def iteration_name(step: int) -> str:
    """The directory of an iteration: `iteration_00000001`; wider numbers just grow.

    Raises:
        UsageError: a negative step, or one that no reader would take for a number.
    """
    if step < 0:
        raise UsageError("an iteration has no negative number", field="step", found=step, expected="0 or more")
    if step >= 10**MAX_STEP_DIGITS:
        raise UsageError("an iteration's number is too large", field="step", found=step, expected=f"at most {MAX_STEP_DIGITS} digits")
    return f"iteration_{step:08d}"


def parse_iteration_name(name: str) -> int | None:
    """The number of an iteration's directory; None when the name is none."""
    match = _ITERATION.fullmatch(name)
    if match is None:
        return None
    step = int(match[1])
    return step if iteration_name(step) == name else None


def data_file_name(prefix: str | None, kind: Kind, index: int, total: int) -> str:
    """The name of a data file: `{prefix}-{model|opt}-{index:07d}-{total:07d}.safetensors`.

    Args:
        prefix: what comes first; None for nothing.
        kind: what the file holds.
        index: the writing rank when redundancy is kept; else the ordinal among the ranks that write such a file.
        total: the world size when redundancy is kept; else the number of ranks that write such a file.

    Raises:
        UsageError: a prefix that isn't a plain part of a file name.
    """
    if prefix is not None and (not isinstance(prefix, str) or not prefix or not is_plain_file_name(prefix) or prefix.startswith(".")):
        raise UsageError(
            "the prefix of data files can't be part of a file name",
            field="prefix",
            found=repr(prefix),
            expected="a name without '/', '\\' and without '.' in front; or no prefix",
        )
    start = "" if prefix is None else f"{prefix}-"
    return f"{start}{kind.value}-{index:07d}-{total:07d}{DATA_SUFFIX}"


def kind_of_file(name: str) -> Kind | None:
    """What a data file holds, by its name; None when the name is none of a data file."""
    match = _DATA_FILE.fullmatch(name)
    return None if match is None else Kind(match[1])


def total_of_file(name: str) -> int | None:
    """The number of files that a data file's name says there are; None when the name is none of a data file."""
    match = _DATA_FILE.fullmatch(name)
    return None if match is None or len(match[3]) > 18 else int(match[3])


def rank_extra_file(rank: int) -> str:
    """The name of a rank's file in the directory of extras: `rank-0000003.safetensors`."""
    return f"rank-{rank:07d}{DATA_SUFFIX}"


def parse_rank_extra_file(name: str) -> int | None:
    """The rank of a file in the directory of extras; None when the name is none."""
    match = _RANK_FILE.fullmatch(name)
    if match is None:
        return None
    rank = int(match[1])
    return rank if rank_extra_file(rank) == name else None


def is_plain_file_name(name: str) -> bool:
    """Whether a name, read from a file that nobody vouches for, names something directly inside a directory: no path, no way out."""
    return name not in ("", ".", "..") and not any(c in "/\\" or c < " " or c == "\x7f" for c in name)


def tensor_names(keys: Iterable[TensorKey]) -> list[str]:
    """What `tensor_name` gives for each of many keys.

    Raises:
        CaptureError: likewise.
    """
    model = Kind.MODEL  # to look it up for each takes longer than all else
    return [key[2] if key[0] is model and key[1] is None and key[2] else tensor_name(key) for key in keys]


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that has stood before; None when each stands once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def tensor_name(key: TensorKey) -> str:
    """The name of a tensor in files: the parameter, `{slot}.{parameter}`, or `{slot}` for a slot of no parameter.

    Raises:
        CaptureError: a key whose name could not be understood again.
    """
    if key.kind is Kind.MODEL:
        if key.slot is None and key.parameter:
            return key.parameter
    elif key.slot and "." not in key.slot:
        return f"{key.slot}.{key.parameter}" if key.parameter else key.slot
    raise CaptureError(
        "a tensor can't be named in files",
        tensor=repr(tuple(key)),
        expected="a model tensor has a parameter name and no slot; an optimizer tensor has a slot without '.'",
        fix="rename the parameter or the optimizer's slot",
    )


def parse_tensor_name(name: str, kind: Kind) -> TensorKey:
    """The key of a tensor's name in files; of an optimizer tensor the slot is what stands before the first dot."""
    if kind is Kind.MODEL:
        return TensorKey(kind, None, name)
    slot, _, parameter = name.partition(".")
    # A name like ".x" or "x." is no slot and parameter; keep it whole, so that two such names stay two.
    if not slot or (not parameter and slot != name):
        return TensorKey(kind, name, "")
    return TensorKey(kind, slot, parameter)


def parse_tensor_names(names: Sequence[str], kind: Kind) -> Iterator[TensorKey]:
    """What `parse_tensor_name` gives for each of many names."""
    if kind is Kind.MODEL:
        return rows(TensorKey, repeat(kind), repeat(None), names)
    return (parse_tensor_name(name, kind) for name in names)


def is_tensor_name(name: str, kind: Kind) -> bool:
    """Whether a name in a file is one that `tensor_name` gives: not empty, and of an optimizer tensor nothing like `.x` or `x.`."""
    if kind is Kind.MODEL:
        return bool(name)
    slot, dot, parameter = name.partition(".")
    return bool(slot) and bool(parameter or not dot)


def storage_key(name: str, slice_id: int) -> str:
    """The key of a slice in the contract's `storage_data`: Python's `str((name, (slice_id,)))`."""
    return f"({name!r}, ({slice_id},))"


def parse_storage_key(text: str) -> tuple[str, int]:
    """The inverse of `storage_key`, for names with quotes, commas and parentheses too.

    Raises:
        MetadataError: it isn't one.
    """
    match = _STORAGE_KEY.fullmatch(text)
    if match is not None:
        literal = match[1]
        if "\\" not in literal:
            return literal[1:-1], int(match[2])
        try:
            return ast.literal_eval(literal), int(match[2])
        except (SyntaxError, ValueError):
            pass
    raise MetadataError(
        "a key of storage_data can't be understood", field="storage_data", found=repr(text[:200]), expected="('name', (0,))"
    )
