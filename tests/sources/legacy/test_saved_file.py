"""Files of `mindspore.save_checkpoint`: opened without MindSpore, loaded like any checkpoint, or refused with a reason."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor, nn
from mindspore.train import serialization
from mindspore.train.checkpoint_pb2 import Checkpoint as Message

import reshard
from reshard.conversion import convert
from reshard.errors import CheckpointNotFoundError, DataFileError, ReshardError, UsageError
from reshard.geometry import Region
from reshard.sources.legacy.ckpt import read_ckpt
from reshard.sources.legacy.saved_file import boxes_in_order
from reshard.storage.memory import MemoryStorage
from reshard.verification import verify
from tests.frameworks.mindspore.networks import Network, losses, optimizer_of

TYPES = ["bool_", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
TYPES += ["float16", "bfloat16", "float32", "float64"]
FORMATS = ("ckpt", "safetensors")


def tensor_of(kind: str, *shape: int) -> Tensor:
    draw = np.random.default_rng(len(kind))
    if kind == "bfloat16":
        return Tensor(draw.standard_normal(shape).astype(np.float32), mindspore.bfloat16)
    kind = kind.rstrip("_")
    return Tensor(draw.integers(0, 2 if kind == "bool" else 100, shape).astype(kind))


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.get_bytes())


def written(path: Path, tensors: dict[str, Tensor], **how: Any) -> Path:
    mindspore.save_checkpoint(
        [{"name": name, "data": tensor} for name, tensor in tensors.items()], str(path), format=path.suffix[1:], **how
    )
    return path


@pytest.fixture(params=[False, True], ids=["bytes", "rows"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Tensors of more than 1 KiB are several messages, as those of more than 512 MiB are: cut anywhere, or asynchronously between rows."""
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    monkeypatch.setattr(serialization, "_wait_async_thread_save_ckpt", wait)  # its own asks for names in a way that warns
    yield {"async_save": True} if request.param else {}
    wait()


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "asyn_save_ckpt":
            thread.join()


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_types_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    tensors = {kind: tensor_of(kind, 3, 5) for kind in TYPES}
    tensors |= {"scalar": Tensor(np.float32(-0.0)), "one": tensor_of("int32", 1), "cube": tensor_of("bfloat16", 2, 3, 4)}
    checkpoint = reshard.Checkpoint(written(tmp_path / f"net.{suffix}", tensors))
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        values = checkpoint[name][...]
        assert (values.shape, checkpoint[name].dtype.mindspore) == (tuple(tensor.shape), str(tensor.dtype)), name
        assert values.tobytes() == bytes_of(tensor), name
    assert checkpoint["bfloat16"][...].dtype == ml_dtypes.bfloat16
    assert checkpoint["cube"][1, :, 2:].tobytes() == np.ascontiguousarray(checkpoint["cube"].read()[1, :, 2:]).tobytes()


def test_a_large_tensor_is_several_messages(tmp_path: Path, slices: dict[str, Any]) -> None:
    shapes = {"rows": (100, 7), "cube": (9, 11, 13), "flat": (3001,), "wide": (2, 2500), "small": (2, 2), "scalar": ()}
    tensors = {name: tensor_of("bfloat16" if name == "cube" else "float32", *shape) for name, shape in shapes.items()}
    path = written(tmp_path / "net.ckpt", tensors, **slices)
    wait()
    checkpoint = reshard.Checkpoint(path)
    assert len(checkpoint["rows"].chunks) > 2
    draw = random.Random(5)
    for name, tensor in tensors.items():
        whole = np.frombuffer(bytes_of(tensor), checkpoint[name].dtype.numpy).reshape(tuple(tensor.shape))
        assert checkpoint[name].read().tobytes() == whole.tobytes(), name
        for _ in range(10):
            offset = tuple(draw.randrange(size) for size in whole.shape)
            shape = tuple(draw.randint(1, size - begin) for size, begin in zip(whole.shape, offset, strict=True))
            region = Region(offset, shape)
            assert checkpoint[name].read(region).tobytes() == whole[region.slices].tobytes(), (name, region)


@pytest.mark.sweep  # a file of half a gigabyte
def test_half_a_gigabyte_is_cut_where_mindspore_cuts(tmp_path: Path) -> None:
    array = np.arange(20011 * 7000, dtype=np.int32).reshape(20011, 7000)
    view = reshard.Checkpoint(written(tmp_path / "net.ckpt", {"w": Tensor(array)}))["w"]
    # 512 MiB end within a row.
    assert [chunk.region.shape for chunk in view.chunks] == [(19173, 7000), (1, 6728), (1, 272), (837, 7000)]
    for begin in range(0, 20011, 4000):
        assert np.array_equal(view[begin : begin + 4000], array[begin : begin + 4000])
    assert np.array_equal(view[:, 6990:], array[:, 6990:])
    (tmp_path / "net.ckpt").unlink()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_run_of_elements_is_boxes_in_order(shape: list[int], data: st.DataObject) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    first = data.draw(st.integers(0, numbers.size - 1))
    count = data.draw(st.integers(1, numbers.size - first))
    boxes = boxes_in_order(tuple(shape), first, count)
    assert np.concatenate([numbers[box.slices].reshape(-1) for box in boxes]).tolist() == list(range(first, first + count))
    assert len(boxes) < 2 * len(shape)


RUNS = [(kind, "ckpt") for kind in ("nn.Adam", "nn.AdamWeightDecay", "nn.Momentum", "experimental.AdamW")]


@pytest.mark.parametrize(("kind", "suffix"), [*RUNS, ("nn.Adam", "safetensors")])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, kind: str, suffix: str) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of(kind, network)
    losses(network, optimizer, range(3))
    own = {parameter.name: parameter for parameter in (*network.get_parameters(), *optimizer.get_parameters())}
    path = written(tmp_path / f"net.{suffix}", own | {"calls": network.calls})
    for source in (path, Path(convert(path, tmp_path / "root").directory)):
        other = Network(seed=2)
        fresh = optimizer_of(kind, other)
        report = reshard.load(source, model=other, optimizer=fresh)
        assert (report.missing, report.unexpected) == ((), ())
        assert report.common is not None
        assert report.common.global_step == 3
        mine, theirs = [losses(*run, range(3, 6)) for run in ((other, fresh), (_copy(network, optimizer, kind)))]
        assert mine == theirs
    assert verify(tmp_path / "root").is_intact
    assert (tmp_path / "root" / "iteration_00000003").is_dir()


def _copy(network: nn.Cell, optimizer: Any, kind: str) -> tuple[nn.Cell, Any]:
    """A run with the same values, which may go on in its place."""
    other = Network(seed=3)
    fresh = optimizer_of(kind, other)
    for own, copied in ((network, other), (optimizer, fresh)):
        for source, target in zip(own.get_parameters(), copied.get_parameters(), strict=True):
            target.assign_value(Tensor(source.asnumpy().copy()))
    return other, fresh


def test_the_counters_and_texts_of_a_run(tmp_path: Path) -> None:
    beside = {"epoch_num": 2, "step_num": 40, "loss_scale": 1024.0, "global_step": 39, "run": "größer als 1"}
    mindspore.save_checkpoint(Network(seed=1), str(tmp_path / "net.ckpt"), append_dict=beside)
    checkpoint = reshard.Checkpoint(tmp_path / "net.ckpt")
    assert checkpoint.common == reshard.CommonInfo(epoch_num=2, step_num=40, global_step=39, loss_scale=1024.0)
    assert checkpoint.values == {"extra": {"run": "größer als 1"}}
    assert not {"epoch_num", "step_num", "loss_scale", "global_step", "run"} & set(checkpoint)
    done = convert(tmp_path / "net.ckpt", tmp_path / "root")
    assert (done.iteration, reshard.Checkpoint(tmp_path / "root").values) == (39, checkpoint.values)


def test_the_number_in_a_name(tmp_path: Path) -> None:
    path = written(tmp_path / "CKP-3_12.ckpt", {"w": tensor_of("float32", 2)})
    assert convert(path, tmp_path / "root").iteration == 12


def test_what_checkpoints_do_not_hold_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "net.ckpt"
    path.write_bytes(message("w", [2], "Float32", bytes(8)) + message("q", [2], "HiFloat8", bytes(2)))
    checkpoint = reshard.Checkpoint(path)
    assert list(checkpoint) == ["w"]
    assert any("q (HiFloat8)" in note for note in checkpoint.notes)


def test_a_crc_is_told_of(tmp_path: Path) -> None:
    path = written(tmp_path / "net.ckpt", {"w": tensor_of("float32", 2, 3)}, crc_check=True)
    checkpoint = reshard.Checkpoint(path)
    assert checkpoint["w"].read().tobytes() == bytes_of(tensor_of("float32", 2, 3))
    assert any("CRC32" in note for note in checkpoint.notes)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_an_encrypted_file_is_named_as_one(tmp_path: Path, mode: str) -> None:
    path = written(tmp_path / "net.ckpt", {"w": tensor_of("float32", 2, 3)}, enc_key=b"0123456789abcdef", enc_mode=mode)
    with pytest.raises(DataFileError, match=rf"encrypted(.|\n)*{mode}"):
        reshard.Checkpoint(path)


def test_a_part_of_several_files_is_not_taken_for_all(tmp_path: Path) -> None:
    for name in ("CKP-model-0000000-0000001.safetensors", "model-00001-of-00002.safetensors"):
        written(tmp_path / name, {"w": tensor_of("float32", 2)})
        with pytest.raises(CheckpointNotFoundError, match="is a file"):
            reshard.Checkpoint(tmp_path / name)


def test_a_directory_of_such_files_says_what_to_give(tmp_path: Path) -> None:
    written(tmp_path / "CKP-1_2.ckpt", {"w": tensor_of("float32", 2)})
    with pytest.raises(CheckpointNotFoundError, match=r"give the path of a file, such as .*CKP-1_2\.ckpt"):
        reshard.Checkpoint(tmp_path)


def test_there_are_no_digests_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Checkpoint 1\.0 can't be verified"):
        verify(written(tmp_path / "net.ckpt", {"w": tensor_of("float32", 2)}))


def message(name: str, dims: list[int], kind: str, content: bytes) -> bytes:
    made = Message()
    value = made.value.add()
    value.tag = name
    value.tensor.dims.extend(dims)
    value.tensor.tensor_type = kind
    value.tensor.tensor_content = content
    return made.SerializeToString()


WHOLE = message("w", [2, 3], "Float32", bytes(range(24)))


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


HOSTILE = {
    "too few bytes": message("w", [2, 4], "Float32", bytes(24)),
    "too many bytes": message("w", [2, 2], "Float32", bytes(24)),
    "a negative dimension": message("w", [-2, -3], "Float32", bytes(24)),
    "a shape of more elements than bytes are counted": message("w", [2**62, 2**62, 0], "Float32", b""),
    "too many dimensions": message("w", [1] * 65, "Float32", bytes(4)),
    "no name": message("", [2], "Float32", bytes(8)),
    "half an element in a message": message("w", [3], "Float32", bytes(6)) * 2,
    "two of a name": WHOLE + message("v", [1], "Float32", bytes(4)) + WHOLE,
    "one more of a name": WHOLE + WHOLE,
    "messages of one name and two shapes": message("w", [4], "Float32", bytes(8)) + message("w", [2, 2], "Float32", bytes(8)),
    "a length beyond the file": b"\x0a\xff\xff\xff\xff\x07" + WHOLE[2:],
    "a length of 64 bits": b"\x0a" + b"\xff" * 9 + b"\x01" + WHOLE[2:],
    "a number without an end": b"\x0a" + b"\xff" * 12,
    "a group": b"\x0b" + WHOLE,
    "field 0": WHOLE + b"\x02\x00",
    "another field": WHOLE + b"\x12\x00",
    "a tensor without bytes": field(1, field(1, b"w") + field(2, b"\x08\x02" + field(2, b"Float32"))),
    "a tensor without a type": field(1, field(1, b"w") + field(2, b"\x08\x02" + field(3, bytes(8)))),
    "a tensor twice": field(1, field(1, b"w") + field(2, field(2, b"Int8") + field(3, b"1")) * 2),
    "a name that is no text": field(1, field(1, b"\xff\xfe") + field(2, b"\x08\x01" + field(2, b"Int8") + field(3, b"1"))),
    "text that is none": message("t", [0], "str", b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_an_error_that_names_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "net.ckpt"
    path.write_bytes(data)
    with pytest.raises(DataFileError, match=r"net\.ckpt") as caught:
        reshard.Checkpoint(path)
    assert caught.value.expected is not None
    assert caught.value.fix is not None


def test_a_truncated_file_is_an_error_or_a_shorter_list(tmp_path: Path) -> None:
    data = WHOLE + message("v", [2], "BFloat16", bytes(4))
    for length in range(1, len(data)):
        storage = MemoryStorage()
        storage.make_directory("/x")
        storage.write_bytes("/x/net.ckpt", data[:length])
        if length == len(WHOLE):
            # Between two tensors nothing shows that there was another: the format counts none.
            assert list(reshard.Checkpoint("/x/net.ckpt", storage)) == ["w"]
        else:
            with pytest.raises(DataFileError):
                reshard.Checkpoint("/x/net.ckpt", storage)


@given(st.binary(max_size=80), st.integers(0, len(WHOLE)), st.integers(0, 8))
def test_whatever_bytes_there_are_no_other_error_comes(noise: bytes, at: int, cut: int) -> None:
    storage = MemoryStorage()
    storage.make_directory("/x")
    storage.write_bytes("/x/net.ckpt", WHOLE[:at] + noise + WHOLE[at + cut :])
    with storage.open_read("/x/net.ckpt") as file:
        try:
            found = read_ckpt(file, "net.ckpt", 0)
        except ReshardError:
            return
        for tensor in found.tensors.values():
            for part in tensor.parts:
                assert 0 <= part.begin <= part.begin + part.region.size * tensor.dtype.itemsize <= file.size
