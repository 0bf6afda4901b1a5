"""The memory of torch tensors as numpy sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reshard
from reshard.errors import CaptureError
from reshard.frameworks.torch import memory as torch_memory
from reshard.frameworks.torch.memory import DeviceMemory, MirrorMemory, checked_dtype, dtype_of, to_numpy, to_tensor, torch_dtype
from reshard.geometry import Region
from reshard.geometry.dtypes import ALL
from reshard.state import HostMemory


def memory_of(tensor: torch.Tensor, name: str):
    checked_dtype(tensor, name)
    return torch_memory.memory_of(tensor, name)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def some(dtype: torch.dtype, shape=(3, 4)) -> torch.Tensor:
    return (torch.arange(int(np.prod(shape))) % 5).to(torch.float32).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_every_element_type_is_a_view_both_ways(dtype) -> None:
    tensor = some(torch_dtype(dtype))
    assert dtype_of(tensor.dtype) == dtype
    memory = memory_of(tensor, "w")
    host = memory.host
    assert host is not None
    assert host.dtype == dtype.numpy
    assert host.tobytes() == bytes_of(tensor)
    host[1, 2] = host[0, 1]
    assert bytes_of(tensor[1, 2].reshape(1)) == bytes_of(tensor[0, 1].reshape(1))
    assert bytes_of(to_tensor(to_numpy(tensor, "w"), tensor.dtype)) == bytes_of(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "view",
    [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[1:, 1:3], lambda t: t[0, 0], lambda t: t[:0], lambda t: t.view(-1)[5]],
    ids=["transposed", "stepped", "inner", "0-d", "empty", "0-d at an offset"],
)
def test_any_strides(dtype, view) -> None:
    base = some(dtype)
    tensor = view(base)
    host = memory_of(tensor, "w").host
    assert host is not None
    assert host.shape == tuple(tensor.shape)
    assert host.tobytes() == bytes_of(tensor) if tensor.numel() else host.size == 0
    if tensor.numel():
        host[...] = np.zeros((), host.dtype)
        assert not tensor.to(torch.float32).any()
    assert host.base is not None


def test_channels_last() -> None:
    tensor = torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(memory_of(tensor, "w").read(), np.arange(48.0).reshape(1, 3, 4, 4))


def test_parameters_and_inference_tensors() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    host = memory_of(parameter, "w").host
    assert host is not None
    host[0] = 7
    assert parameter[0].item() == 7
    with torch.inference_mode():
        tensor = torch.ones(3)
    host = memory_of(tensor, "w").host
    assert host is not None
    host[0] = 7
    assert tensor[0].item() == 7


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex128], ids=str)
def test_types_that_checkpoints_do_not_hold(dtype) -> None:
    with pytest.raises(CaptureError, match=r"(?s)element type.*tensor: *layer\.w") as caught:
        memory_of(torch.zeros(2).to(dtype), "layer.w")
    assert "float32" in str(caught.value.expected)


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(2, device="meta"), "meta device"),
        (lambda: torch.eye(2).to_sparse(), "dense"),
        (torch.nn.UninitializedParameter, "lazy"),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "conjugated"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8), "element type"),
    ],
    ids=["meta", "sparse", "lazy", "conjugated", "quantized"],
)
def test_tensors_without_plain_memory(make, words) -> None:
    with pytest.raises(CaptureError, match=rf"(?s){words}.*tensor: *layer\.w"):
        memory_of(make(), "layer.w")


def test_subclasses_that_hold_other_tensors() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(CaptureError, match="TwoTensor"):
        memory_of(TwoTensor(torch.ones(2), torch.ones(2)), "w")


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its memory, as FSDP leaves it."""
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.t(), lambda t: t[1:, ::2], lambda t: t[1, 1]])
def test_memory_that_was_freed_has_no_values(dtype, view) -> None:
    tensor = view(some(dtype))
    whole = memory_of(tensor, "w")
    other = DeviceMemory(tensor)
    target = np.zeros(tuple(tensor.shape), dtype_of(dtype).numpy)
    freed(tensor)
    assert whole.address is None
    for use in (
        lambda: whole.host,
        whole.read,
        lambda: whole.write(Region.whole(target.shape), target),
        lambda: whole.begin_copy(target),
        other.read,
        lambda: other.begin_copy(target),
    ):
        with pytest.raises(CaptureError, match="was freed"):
            use()
    with pytest.raises(CaptureError, match=r"(?s)was freed.*tensor: *layer\.w"):
        to_numpy(tensor, "layer.w")


def test_what_has_no_elements_needs_no_memory() -> None:
    host = memory_of(freed(torch.ones(3, 4)[:, :0]), "w").host
    assert host is not None
    assert host.shape == (3, 0)


@pytest.mark.parametrize("size", [3, 300], ids=["small", "large"])
@pytest.mark.parametrize("async_save", [False, "copy", "deferred"])
def test_a_save_of_memory_that_was_freed_fails_and_names_the_tensor(tmp_path, size, async_save) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(size, size)})
    optimizer = torch.optim.SGD(model.parameters())
    freed(model.get_parameter("b.weight").data)
    with (
        pytest.raises(CaptureError, match=r"(?s)was freed.*tensor: *b\.weight"),
        reshard.CheckpointManager(tmp_path, async_save=async_save) as manager,
    ):
        manager.save(1, model=model, optimizer=optimizer)
    assert not list(tmp_path.glob("iteration_*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bool], ids=str)
def test_device_memory_copies_both_ways(dtype) -> None:
    """The same code on the host's memory: there is no accelerator here."""
    tensor = some(dtype)
    memory = DeviceMemory(tensor)
    assert memory.host is None
    assert memory.read().tobytes() == bytes_of(tensor)
    values = to_numpy(some(dtype, (2, 2)), "")
    for given in (values, values[::-1], np.asfortranarray(values)):
        given.flags.writeable = False
        memory.write(Region((1, 2), (2, 2)), given)
        np.testing.assert_array_equal(memory.read()[1:3, 2:4].astype(np.float32), given.astype(np.float32))
    scalar = torch.tensor(1.0)
    DeviceMemory(scalar).write(Region((), ()), np.array(4, np.float32))
    assert scalar.item() == 4


def test_mirrors_take_what_is_written_everywhere() -> None:
    first, second = np.zeros(3), np.zeros(3)
    memory = MirrorMemory([HostMemory(first), HostMemory(second)])
    memory.write(Region((1,), (2,)), np.array([5.0, 6.0]))
    assert memory.host is None
    assert memory.read() is first
    assert first.tolist() == second.tolist() == [0, 5, 6]
