"""Plain dictionaries of arrays as a run."""

from __future__ import annotations

import numpy as np
import pytest

from reshard.catalog import Catalog
from reshard.errors import CaptureError, UsageError
from reshard.frameworks.arrays import ArrayAdapter
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.state import GLOBAL_STEP, HostMemory, Shard, ShardedTensor, model_key, slot_key
from tests.catalogs import stored_tensor

ADAPTER = ArrayAdapter()


def test_names_and_memory() -> None:
    weight, moment = np.zeros((2, 3), np.float32), np.ones(3)
    state = ADAPTER.capture({"layer.w": weight}, {"adam_m.layer.w": moment, "global_step": np.array([1], np.int32)}, global_step=7)
    assert list(state.tensors) == [model_key("layer.w"), slot_key("adam_m", "layer.w"), GLOBAL_STEP]
    assert state.tensors[model_key("layer.w")].shards[0].memory.read() is weight
    assert state.tensors[GLOBAL_STEP].shards[0].memory.read().tolist() == [7]
    assert state.groups == ()


def test_sharded_tensors_keep_their_layout_and_take_the_dictionarys_name() -> None:
    layout = Layout(Mesh((2,), ("dp",), (0, 1)), ((0,),))
    memory = HostMemory(np.zeros(2, np.float32))
    given = ShardedTensor(model_key("other"), by_name("float32"), (4,), layout, (Shard(Region((2,), (2,)), memory),))
    tensor = ADAPTER.capture({"w": given}, None, global_step=3).tensors[model_key("w")]
    assert (tensor.layout, tensor.shards) == (layout, given.shards)


def test_a_list_of_dictionaries_is_one() -> None:
    assert len(ADAPTER.capture([{"a": np.ones(1)}, {"b": np.ones(1)}], None, global_step=None).tensors) == 2
    with pytest.raises(CaptureError, match="same name"):
        ADAPTER.capture([{"a": np.ones(1)}, {"a": np.ones(1)}], None, global_step=None)


def test_loading_fills_in_place_and_gives_the_step_count_a_place() -> None:
    model, optimizer = {"w": np.zeros(2)}, {"adam_m.w": np.zeros(2)}
    catalog = Catalog("", {GLOBAL_STEP: stored_tensor(GLOBAL_STEP, by_name("int32"), (1,), None, ())})
    destination = ADAPTER.prepare(model, optimizer).destination(catalog, ())
    destination.state.tensors[model_key("w")].shards[0].memory.write(Region((0,), (2,)), np.ones(2))
    destination.state.tensors[GLOBAL_STEP].shards[0].memory.write(Region((0,), (1,)), np.array([5], np.int32))
    assert "global_step" not in optimizer
    destination.install(())
    assert model["w"].tolist() == [1, 1]
    assert optimizer["global_step"].tolist() == [5]
    assert GLOBAL_STEP not in ADAPTER.prepare(model, None).destination(catalog, ()).state.tensors
    assert GLOBAL_STEP not in ADAPTER.prepare(model, {"adam_m.w": np.zeros(2)}).destination(Catalog("", {}), ()).state.tensors


def test_what_it_cannot_take() -> None:
    fixed = np.ones(1)
    fixed.flags.writeable = False
    with pytest.raises(CaptureError, match=r"(?s)read-only.*w"):
        ADAPTER.prepare({"w": fixed}, None).destination(Catalog("", {}), ())
    with pytest.raises(CaptureError, match=r"(?s)float128|element type.*w"):
        ADAPTER.capture({"w": np.ones(1, ">f4")}, None, global_step=None)
    with pytest.raises(CaptureError, match=r"(?s)not an array.*w.*int"):
        ADAPTER.capture({"w": 3}, None, global_step=None)
    with pytest.raises(UsageError, match="dictionary"):
        ADAPTER.capture(3, None, global_step=None)


def test_random_states() -> None:
    ADAPTER.reseed(2**40 + 1)
    states = ADAPTER.random_states()
    first = np.random.rand()  # noqa: NPY002
    ADAPTER.restore_random_states(states)
    assert np.random.rand() == first  # noqa: NPY002
    assert ADAPTER.from_value(ADAPTER.to_value({"a": 1})) == {"a": 1}


@pytest.mark.parametrize(
    "array", [np.zeros(2, np.float32), np.zeros(8, np.float32), np.zeros((2, 2), np.float32), np.zeros(4), np.zeros(4, np.float16)]
)
def test_memory_that_is_not_what_the_tensor_says(array: np.ndarray) -> None:
    tensor = ShardedTensor(model_key("w"), by_name("float32"), (8,), None, (Shard(Region((4,), (4,)), HostMemory(array)),))
    for use in (
        lambda: ADAPTER.capture({"w": tensor}, None, global_step=None),
        lambda: ADAPTER.prepare({"w": tensor}, None).destination(Catalog("/", {}), ()),
    ):
        with pytest.raises(CaptureError, match="not what the tensor says"):
            use()


def test_a_part_outside_its_tensor() -> None:
    tensor = ShardedTensor(
        model_key("w"), by_name("float32"), (4,), None, (Shard(Region((2,), (3,)), HostMemory(np.zeros(3, np.float32))),)
    )
    with pytest.raises(CaptureError, match="not what the tensor says"):
        ADAPTER.capture({"w": tensor}, None, global_step=None)
