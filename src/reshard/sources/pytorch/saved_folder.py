"""A folder of Hugging Face weights in files of `torch.save` (`pytorch_model.bin`, or several and an index) becomes a catalog.

They are state dictionaries of whole tensors. The index is that of safetensors files, under another name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from reshard.catalog import Arrangement, Catalog, StoredTensor
from reshard.errors import DataFileError
from reshard.format.names import COMMON_FILE, METADATA_FILE
from reshard.sources.huggingface import check_present, read_weight_map
from reshard.sources.items import ItemTable
from reshard.sources.pytorch.saved_file import StoredTensorRef, arrange, item_rows, read_tensors
from reshard.sources.stored import Stored
from reshard.state import TensorKey, model_key
from reshard.storage import Storage
from reshard.storage.storage import join

_FILE = "pytorch_model.bin"
_INDEX_FILE = "pytorch_model.bin.index.json"
_SUFFIX = ".bin"

_NAMES_SHOWN = 5

_FETCH = "fetch the folder again, whole"


def is_saved_folder(names: Collection[str]) -> bool:
    """Whether a directory is such a folder, by the names of its files. One that has safetensors files, too, is loaded from those."""
    if METADATA_FILE in names or COMMON_FILE in names or any(name.endswith(".safetensors") for name in names):
        return False
    return _FILE in names or _INDEX_FILE in names


def open_saved_folder(storage: Storage, directory: str) -> Stored:
    """Open such a folder: what its files describe is read, of the tensors nothing.

    Args:
        storage: where it lies.
        directory: the folder.

    Raises:
        MetadataError: the index is damaged, or leads out of the folder.
        DataFileError: files are missing (all of them are named) or damaged, name what isn't taken from files, or lack a tensor that the
            index names.
        StorageError: the storage refuses.
    """
    there = {entry.name for entry in storage.list(directory) if not entry.is_directory}
    located = None if _FILE in there else read_weight_map(storage, join(directory, _INDEX_FILE), _SUFFIX)
    files = [_FILE] if located is None else list(dict.fromkeys(located.values()))
    check_present(directory, set(files), there, f"{_INDEX_FILE} names")
    tensors: dict[TensorKey, StoredTensor] = {}
    known: dict[tuple[object, ...], Arrangement] = {}
    rows: dict[str, list[tuple[int, int, int, int]]] = {}
    notes: list[str] = []
    for file in files:
        found, others = read_tensors(storage, join(directory, file))
        if others:
            notes.append(f"left out of {file}, since they are no tensors: {_some(others)}")
        for name, (tensor, runs, begin) in _meant(directory, file, found, located).items():
            if not name:
                raise DataFileError("a name that no tensor has", file=join(directory, file), tensor=repr(name), fix=_FETCH)
            key = model_key(name)
            rows.setdefault(file, []).extend(item_rows(len(tensors), runs, begin))
            tensors[key] = StoredTensor(key, name, arrange(tensor, runs, file, known))
    return Stored(Catalog(directory, tensors, tuple(notes)), is_weights=True, items=ItemTable.of("raw", rows))


def _meant(
    directory: str, file: str, found: Mapping[str, StoredTensorRef], located: Mapping[str, str] | None
) -> Mapping[str, StoredTensorRef]:
    """Of a file's tensors those that the index places in it."""
    if located is None:
        return found
    named = [name for name, place in located.items() if place == file]
    lost = [name for name in named if name not in found]
    if lost:
        raise DataFileError(
            f"the index names {len(lost)} tensor{'' if len(lost) == 1 else 's'} that the file doesn't hold",
            file=join(directory, file),
            tensor=_some(lost),
            fix=f"index and files are of different models or versions: {_FETCH}",
        )
    return {name: found[name] for name in named}


def _some(names: Collection[str]) -> str:
    shown = list(names)[:_NAMES_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
