"""MindSpore on one card: cells and optimizers as states, and back into fresh ones."""

from __future__ import annotations

from pathlib import Path

import mindspore
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import reshard
from reshard.comm import SingleProcess
from reshard.errors import CaptureError, MismatchError, UsageError
from reshard.format.names import tensor_name
from reshard.frameworks.mindspore import MindSporeAdapter, lay_out
from reshard.frameworks.mindspore.memory import DeviceMemory, array_of, dtype_of, to_tensor
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from tests.frameworks.mindspore.networks import Network, losses, optimizer_of

OPTIMIZERS = ["nn.Adam", "nn.AdamWeightDecay", "nn.Momentum", "nn.SGD", "nn.Adagrad", "experimental.AdamW", "experimental.SGD", "mint.Adam"]


# RMSProp is not among them: its kernel's last bits depend on where in memory a tensor begins.


def names(model, optimizer=None) -> set[str]:
    return {tensor_name(key) for key in MindSporeAdapter().capture(model, optimizer, global_step=None).tensors}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_fresh_run_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of(kind, network)
    losses(network, optimizer, range(3))
    reshard.save(tmp_path, 3, model=network, optimizer=optimizer)
    other = Network(seed=2)
    fresh = optimizer_of(kind, other)
    report = reshard.load(tmp_path, model=other, optimizer=fresh)
    assert not report.missing
    assert not report.unexpected
    assert losses(other, fresh, range(3, 6)) == losses(network, optimizer, range(3, 6))
    for mine, theirs in zip(optimizer.get_parameters(), fresh.get_parameters(), strict=True):
        assert mine.asnumpy().tobytes() == theirs.asnumpy().tobytes(), mine.name


@pytest.mark.parametrize("kind", ["nn.AdamWeightDecay", "nn.Adam", "experimental.AdamW"])
def test_adam_has_the_names_of_the_contract(kind: str) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of(kind, network)
    losses(network, optimizer, range(2))
    state = MindSporeAdapter().capture(network, optimizer, global_step=None)
    parameters = [parameter.name for parameter in network.trainable_params()]
    opt = {tensor_name(key) for key in state.tensors if key.kind.value == "opt"}
    wanted = {"global_step", *(f"{slot}.{name}" for slot in ("adam_m", "adam_v") for name in parameters)}
    assert opt - {f"max_exp_avg_sq.{name}" for name in parameters} == wanted
    step = next(tensor for key, tensor in state.tensors.items() if key.slot == "global_step")
    assert (step.dtype.name, step.global_shape, step.shards[0].memory.read().tolist()) == ("int32", (1,), [2])


def test_a_count_that_begins_before_zero(tmp_path: Path) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of("mint.AdamW", network)
    assert optimizer.state_step.asnumpy().tolist() == [-1], "no kernel steps it on the CPU"
    optimizer.state_step.assign_value(Tensor(np.array([4], np.float32)))
    reshard.save(tmp_path, 5, model=network, optimizer=optimizer)
    assert reshard.Checkpoint(tmp_path)["global_step"][:].tolist() == [5]
    fresh = optimizer_of("mint.AdamW", network)
    reshard.load(tmp_path, model=network, optimizer=fresh)
    assert fresh.state_step.asnumpy().tolist() == [4]


def test_momentum_keeps_the_frameworks_names() -> None:
    network = Network(seed=1)
    optimizer = nn.Momentum(network.trainable_params(), learning_rate=0.1, momentum=0.9)
    parameters = [parameter.name for parameter in network.trainable_params()]
    assert names(network, optimizer) - names(network) == {"global_step", *(f"moments.{name}" for name in parameters)}


def test_a_model_is_its_parameters_and_persistent_buffers() -> None:
    network = Network(seed=1)
    wanted = {"up.weight", "up.bias", "down.weight", "norm.gamma", "norm.beta", "frozen", "calls"}
    assert names(network) == wanted
    assert names({"a": network}) == {f"a.{name}" for name in wanted}
    assert names([network]) == wanted
    assert names(nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), optimizer_of("nn.Adam", network))) == wanted
    with pytest.raises(CaptureError, match="same name"):
        names([network, Network(seed=2)])


TYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", [*TYPES, "complex64"])
def test_every_type_of_element(dtype: str, tmp_path: Path) -> None:
    found = by_name(dtype)
    values = np.arange(6).reshape(2, 3).astype(found.numpy)
    cell = nn.Cell()
    cell.w = Parameter(to_tensor(values, found), name="w")
    assert dtype_of(cell.w.dtype) is found
    reshard.save(tmp_path, 1, model=cell)
    cell.w.set_data(to_tensor(np.zeros_like(values), found))
    reshard.load(tmp_path, model=cell)
    assert array_of(cell.w).dtype == found.numpy
    np.testing.assert_array_equal(array_of(cell.w), values)
    np.testing.assert_array_equal(reshard.Checkpoint(tmp_path)["w"][:], values)


def test_a_type_that_checkpoints_dont_hold() -> None:
    cell = nn.Cell()
    cell.w = Parameter(Tensor(np.ones(2, np.complex128)), name="w")
    with pytest.raises(CaptureError, match=r"(?s)w.*Complex128"):
        names(cell)


def test_memory_of_a_device_is_copied() -> None:
    tensor = Parameter(to_tensor(np.arange(6).reshape(2, 3).astype(by_name("bfloat16").numpy), by_name("bfloat16")), name="w")
    memory = DeviceMemory(tensor)
    assert memory.host is None
    assert memory.address is None
    memory.write(Region((1, 0), (1, 3)), np.array([[7, 8, 9]], by_name("bfloat16").numpy))
    assert memory.hold().read().tolist() == [[0, 1, 2], [7, 8, 9]]
    memory.write(Region((0, 0), (2, 3)), np.ones((2, 3), by_name("bfloat16").numpy))
    target = np.zeros((2, 3), by_name("bfloat16").numpy)
    assert memory.begin_copy(target) is None
    assert target.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_hyper_parameters_are_kept_by_parameter_name(tmp_path: Path) -> None:
    network = Network(seed=1)
    groups = [{"params": [network.up.weight], "lr": 0.5, "weight_decay": 0.125}, {"params": [network.down.weight]}]
    optimizer = nn.AdamWeightDecay(groups, learning_rate=0.1, beta1=0.8, beta2=0.95)
    state = MindSporeAdapter().capture(network, optimizer, global_step=None)
    found = {group.parameters: group.options for group in state.groups}
    shared = {"betas": (0.8, 0.95), "eps": 1e-6}
    assert found == {
        ("up.weight",): {"lr": 0.5, "weight_decay": 0.125, **shared},
        ("down.weight",): {"lr": 0.1, "weight_decay": 0.0, **shared},
    }
    reshard.save(tmp_path, 1, model=network, optimizer=optimizer)
    other = Network(seed=2)
    fresh = nn.AdamWeightDecay([{"params": [other.up.weight], "lr": 9.0}, {"params": [other.down.weight]}], learning_rate=9.0)
    reshard.load(tmp_path, model=other, optimizer=fresh)
    assert [rate.asnumpy().item() for rate in fresh.learning_rate] == [0.5, np.float32(0.1)]


def test_a_schedule_stays_the_runs_own(tmp_path: Path) -> None:
    network = Network(seed=1)
    schedule = [0.1, 0.2, 0.3, 0.4]
    optimizer = nn.Momentum(network.trainable_params(), learning_rate=schedule, momentum=0.9)
    losses(network, optimizer, range(2))
    assert all("lr" not in group.options for group in MindSporeAdapter().capture(network, optimizer, global_step=None).groups)
    reshard.save(tmp_path, 2, model=network, optimizer=optimizer)
    other = Network(seed=2)
    fresh = nn.Momentum(other.trainable_params(), learning_rate=schedule, momentum=0.9)
    reshard.load(tmp_path, model=other, optimizer=fresh)
    assert fresh.get_lr().asnumpy() == np.float32(0.3)
    assert losses(other, fresh, range(2, 4)) == losses(network, optimizer, range(2, 4))


def test_a_compiled_step_sees_what_was_loaded(tmp_path: Path) -> None:
    network = Network(seed=1)
    optimizer = optimizer_of("nn.AdamWeightDecay", network)
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), optimizer)
    step.compile_cache.clear()
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        x, y = Tensor(np.ones((2, 3), np.float32)), Tensor(np.zeros((2, 3), np.float32))
        before = [step(x, y).asnumpy().item() for _ in range(2)]
        reshard.save(tmp_path, 2, model=network, optimizer=optimizer)
        after = [step(x, y).asnumpy().item() for _ in range(2)]
        reshard.load(tmp_path, model=network, optimizer=optimizer)
        assert [step(x, y).asnumpy().item() for _ in range(2)] == after != before
    finally:
        mindspore.set_context(mode=mindspore.PYNATIVE_MODE)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    adapter = MindSporeAdapter()
    adapter.reseed(2**40 + 7)
    mindspore.ops.standard_normal((2,))
    state = adapter.random_states()
    drawn = [mindspore.ops.standard_normal((2,)).asnumpy().tolist(), np.random.rand()]  # noqa: NPY002
    adapter.reseed(3)
    assert [mindspore.ops.standard_normal((2,)).asnumpy().tolist(), np.random.rand()] != drawn  # noqa: NPY002
    adapter.restore_random_states(state)
    assert mindspore.get_seed() == 7 + 2**40 % 2**31
    assert [mindspore.ops.standard_normal((2,)).asnumpy().tolist(), np.random.rand()] == drawn  # noqa: NPY002


def test_tensors_among_values(tmp_path: Path) -> None:
    extra = {"average": Tensor(np.ones(2, np.float32)).astype(mindspore.bfloat16), "list": [Tensor(3), (1, "a")]}
    reshard.save(tmp_path, 1, model=Network(seed=1), extra=extra)
    found = reshard.load(tmp_path, model=Network(seed=2)).extra
    assert str(found["average"].dtype) == "BFloat16"
    assert array_of(found["average"]).tolist() == [1, 1]
    assert found["list"][0].asnumpy() == 3
    assert found["list"][1] == (1, "a")


def test_what_cant_be_captured() -> None:
    network, other = Network(seed=1), Network(seed=2)
    with pytest.raises(CaptureError, match=r"(?s)isn't the model's.*up.weight"):
        names(network, nn.SGD(other.trainable_params()))
    with pytest.raises(UsageError, match="different frameworks"):
        reshard.frameworks.select.select_adapter(network, {"w": np.ones(1)})
    with pytest.raises(UsageError, match="not a layout"):
        lay_out(network, {"*": 3})
    with pytest.raises(UsageError, match="interleaved_parallel"):
        lay_out(network, {"*": mindspore.Layout((2, 2), ("a", "interleaved_parallel"))("a")})
    lay_out(network, {"up.weight": mindspore.Layout((2,), ("tp",), [1, 2])("tp", "None")})
    with pytest.raises(CaptureError, match=r"(?s)up.weight.*rank"):
        names(network)


def test_a_checkpoint_without_the_optimizer_is_an_error(tmp_path: Path) -> None:
    network = Network(seed=1)
    reshard.save(tmp_path, 1, model=network)
    with pytest.raises(MismatchError, match="no optimizer state"):
        reshard.load(tmp_path, model=network, optimizer=optimizer_of("nn.AdamWeightDecay", network))


def test_without_ranks_it_talks_to_itself() -> None:
    assert isinstance(MindSporeAdapter().communicator(), SingleProcess)
