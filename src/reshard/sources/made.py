"""The small files of a checkpoint of ours, made of what a foreign one says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reshard.format.common import CommonInfo, encode_common
from reshard.format.extra import global_tree, write_extra
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE
from reshard.state import ParameterGroup
from reshard.storage.memory import MemoryStorage
from reshard.storage.storage import join


def made_files(common: CommonInfo, values: Mapping[str, Any], groups: Sequence[ParameterGroup] = ()) -> dict[str, bytes]:
    """The bytes of `common.json` and of the global extras, by their names in a checkpoint.

    Args:
        common: the run's progress.
        values: its global values, by name.
        groups: its optimizer's hyper-parameters.

    Raises:
        CaptureError: a value that can't be saved.
    """
    name = join(EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)
    held = MemoryStorage()
    held.make_directory(f"/{EXTRA_DIRECTORY}")
    write_extra(held, f"/{name}", global_tree(values, groups))
    return {COMMON_FILE: encode_common(common), name: held.read_bytes(f"/{name}")}
