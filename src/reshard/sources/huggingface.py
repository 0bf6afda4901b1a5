"""A folder of Hugging Face weights: safetensors files of whole tensors, and an index that says which file has which."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.errors import CheckpointNotFoundError, DataFileError, MetadataError, UsageError
from reshard.format import json_text
from reshard.format.names import COMMON_FILE, DATA_SUFFIX, METADATA_FILE, is_plain_file_name, kind_of_file
from reshard.format.small_file import read_small
from reshard.geometry import DType, Region
from reshard.sources.sharded_weights import is_sharded, sharded_tensors
from reshard.sources.stored import Headers, Stored
from reshard.state import TensorKey, model_key
from reshard.storage import Storage
from reshard.storage.storage import join

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

# A name and a file for each tensor: those of the largest published models have some 10 MB.
_MOST_INDEX_BYTES = 1 << 28
_MOST_CONFIG_BYTES = 1 << 24

_SHARD = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})\.safetensors", re.ASCII | re.DOTALL)

# A message names so many files or tensors, and of missing files, which have to be fetched, all.
_NAMES_SHOWN = 5

_FETCH = "fetch the folder again, whole"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_INDEX_DECODER = msgspec.json.Decoder(_Index)
_CONFIG_DECODER = msgspec.json.Decoder(dict[str, Any])


def shard_name(number: int, total: int) -> str:
    """The name of a file of weights of which there are several: `model-00001-of-00002.safetensors`, counted from 1."""
    return f"model-{number:05d}-of-{total:05d}{DATA_SUFFIX}"


def holds_weights(names: Collection[str]) -> bool:
    """Whether a directory is a folder of Hugging Face weights, by the names of its files."""
    if METADATA_FILE in names or COMMON_FILE in names or any(kind_of_file(name) is not None for name in names):
        return False
    if WEIGHTS_FILE in names or WEIGHTS_INDEX_FILE in names:
        return True
    data = [name for name in names if name.endswith(DATA_SUFFIX)]
    return bool(data) and (CONFIG_FILE in names or any(_SHARD.fullmatch(name) for name in data))


def read_model_config(storage: Storage, directory: str, name: str = CONFIG_FILE) -> Mapping[str, Any] | None:
    """The model's description (`config.json`) in a directory; None when it has none.

    Args:
        storage: where it lies.
        directory: the folder.
        name: of the file.

    Raises:
        MetadataError: it isn't a JSON object.
        StorageError: the storage refuses.
    """
    data = read_config_bytes(storage, directory, name)
    return None if data is None else decode_model_config(data, join(directory, name))


def read_config_bytes(storage: Storage, directory: str, name: str = CONFIG_FILE) -> bytes | None:
    """The same as it lies there.

    Raises:
        MetadataError: it is larger than any model's.
        StorageError: the storage refuses.
    """
    path = join(directory, name)
    return None if storage.stat(path) is None else read_small(storage, path, _MOST_CONFIG_BYTES, error=MetadataError)


def decode_model_config(data: bytes, path: str) -> Mapping[str, Any]:
    """A model's description.

    Args:
        data: of the file.
        path: of the file, for the error.

    Raises:
        MetadataError: it isn't a JSON object.
    """
    return json_text.decode(data, _CONFIG_DECODER, path, error=MetadataError)


def encode_model_config(config: Mapping[str, Any]) -> bytes:
    """The bytes of a `config.json`: sorted and indented as transformers writes it.

    Raises:
        UsageError: a value that JSON lacks.
    """
    try:
        return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
    except (TypeError, ValueError) as cause:
        raise UsageError(
            "a model's configuration is no JSON", field=CONFIG_FILE, found=str(cause), fix="give the path of a file"
        ) from cause


def open_weights(storage: Storage, directory: str) -> Stored:
    """Open a folder of weights. The headers of all its files are read, of their data nothing.

    Of several files the index says which are meant; without one all are, if none is missing and none holds another's tensor, or if they
    hold parts of tensors and say so.

    Args:
        storage: where it lies.
        directory: the folder.

    Raises:
        CheckpointNotFoundError: it has no weights.
        MetadataError: the index is damaged, leads out of the folder, or names tensors that its files don't hold; or two files hold one
            tensor, and there is no index.
        DataFileError: files are missing (all of them are named), or one is damaged.
        StorageError: the storage refuses.
    """
    files = {entry.name for entry in storage.list(directory) if not entry.is_directory and entry.name.endswith(DATA_SUFFIX)}
    index = join(directory, WEIGHTS_INDEX_FILE)
    notes: list[str] = []
    headers = Headers(storage, directory, fix=_FETCH)
    if WEIGHTS_FILE in files:
        # As transformers decides.
        if storage.stat(index) is not None:
            notes.append(f"{WEIGHTS_FILE} and {WEIGHTS_INDEX_FILE} are both there; took the former, as transformers does")
        located = dict.fromkeys(headers.get(WEIGHTS_FILE).entries, WEIGHTS_FILE)
    elif storage.stat(index) is not None:
        located = read_weight_map(storage, index, DATA_SUFFIX)
        check_present(directory, set(located.values()), files, f"{WEIGHTS_INDEX_FILE} names")
        _check_held(located, headers, index)
    elif is_sharded(files):
        note = f"parts of tensors, as the ranks of torch.distributed.checkpoint wrote them; took those of {len(files)} files"
        return Stored(Catalog(directory, sharded_tensors(directory, files, headers), (note,)), None, None, is_weights=True)
    else:
        located = _without_index(directory, sorted(files), headers)
        notes.append(f"no {WEIGHTS_INDEX_FILE}: took every tensor of {len(files)} file{'' if len(files) == 1 else 's'}")
    used = set(located.values())
    notes += _notes_of_rest(located, used, files, headers)
    return Stored(Catalog(directory, _tensors(located, headers, directory), tuple(notes)), None, None, is_weights=True)


def read_weight_map(storage: Storage, path: str, suffix: str) -> dict[str, str]:
    """Which file of a folder has which tensor, as its index says.

    Args:
        storage: where it lies.
        path: of the index.
        suffix: what the files' names end in.

    Raises:
        MetadataError: the index is damaged, names no tensor, or leads out of the folder.
    """
    data = read_small(storage, path, _MOST_INDEX_BYTES, error=MetadataError)
    located = json_text.decode(data, _INDEX_DECODER, path, error=MetadataError).weight_map
    json_text.check_duplicate_keys(data, None, path, error=MetadataError)
    for name, file in located.items():
        if not is_plain_file_name(file) or not file.endswith(suffix):
            raise MetadataError(
                "the index names a file that can't be one of the folder's",
                file=path,
                tensor=name,
                field="weight_map",
                found=repr(file[:200]),
                expected=f"a name that ends in {suffix}, without a path",
                fix="don't load this folder: whoever wrote it wants another file to be read" if "/" in file or "\\" in file else _FETCH,
            )
    if not located:
        raise MetadataError("the index names no tensor", file=path, field="weight_map", fix=_FETCH)
    return located


def check_present(directory: str, needed: set[str], there: set[str], who: str) -> None:
    """See that all files are there, before anything is loaded.

    Args:
        directory: the folder.
        needed: the names of its files.
        there: those that it has.
        who: says that they are needed, for the error.

    Raises:
        DataFileError: some are missing: all of these are named.
    """
    missing = sorted(needed - there)
    if missing:
        raise DataFileError(
            f"{len(missing)} of {len(needed)} files of weights {'is' if len(missing) == 1 else 'are'} missing; nothing was loaded",
            file=directory,
            found=f"no {', '.join(missing)}",
            expected=f"every file that {who}",
            fix="fetch what is missing: a download that was interrupted leaves such folders",
        )


def _check_held(located: Mapping[str, str], headers: Headers, index: str) -> None:
    lost = [name for name, file in located.items() if name not in headers.get(file).entries]
    if lost:
        raise MetadataError(
            f"the index names {len(lost)} tensor{'' if len(lost) == 1 else 's'} that the file doesn't hold",
            file=index,
            tensor=_some(lost),
            found=f"not in {_some(sorted({located[name] for name in lost}))}",
            fix=f"index and files are of different models or versions: {_FETCH}",
        )


def _without_index(directory: str, files: Sequence[str], headers: Headers) -> dict[str, str]:
    if not files:
        raise CheckpointNotFoundError(
            "the folder has no weights",
            file=directory,
            expected=f"{WEIGHTS_FILE}, or {WEIGHTS_INDEX_FILE} with the files that it names",
            fix=_FETCH,
        )
    for name in files:
        match = _SHARD.fullmatch(name)
        if match is not None:
            start, width, total = match[1], len(match[2]), int(match[3])
            if total > 100_000:
                raise DataFileError("a name of more files than a folder has", file=join(directory, name), fix=_FETCH)
            of = f"-of-{match[3]}{DATA_SUFFIX}"
            check_present(
                directory, {f"{start}-{number:0{width}d}{of}" for number in range(1, total + 1)}, set(files), f"the name {name} promises"
            )
    located: dict[str, str] = {}
    for file in files:
        for name in headers.get(file).entries:
            if name in located:
                raise MetadataError(
                    f"two files hold a tensor of one name, and there is no {WEIGHTS_INDEX_FILE} to tell them apart",
                    file=directory,
                    tensor=name,
                    found=f"in {located[name]} and in {file}",
                    fix="leave only one model's files in the folder, or fetch its index",
                )
            located[name] = file
    return located


def _notes_of_rest(located: Mapping[str, str], used: set[str], files: set[str], headers: Headers) -> list[str]:
    notes = []
    rest = sorted(name for file in used for name in headers.get(file).entries if located.get(name) != file)
    if rest:
        notes.append(f"the files hold tensors that the index places elsewhere or doesn't name; ignored: {_some(rest)}")
    if files - used:
        notes.append(f"files of weights that don't belong to the model by its index; ignored: {_some(sorted(files - used))}")
    return notes


def _tensors(located: Mapping[str, str], headers: Headers, directory: str) -> dict[TensorKey, StoredTensor]:
    arrangements: dict[tuple[DType, tuple[int, ...], str], Arrangement] = {}
    tensors: dict[TensorKey, StoredTensor] = {}
    for name, file in located.items():
        if not name:
            raise DataFileError("a name that no tensor has", file=join(directory, file), tensor=repr(name), fix=_FETCH)
        entry = headers.get(file).entries[name]
        alike = entry.dtype, entry.shape, file
        if alike not in arrangements:
            piece = Piece(Region.whole(entry.shape), (Site(file, 0),), (0,))
            arrangements[alike] = Arrangement(entry.dtype, entry.shape, None, (piece,))
        key = model_key(name)
        tensors[key] = StoredTensor(key, name, arrangements[alike])
    return tensors


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
