"""Optimizers as slots by parameter name, their step counts and their hyper-parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.distributed.tensor import Replicate, Shard

from reshard.catalog import Catalog
from reshard.errors import CaptureError, MismatchError, UsageError
from reshard.format.extra import FrameworkArray
from reshard.format.names import tensor_name
from reshard.frameworks.torch import TorchAdapter, tie
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.state import GLOBAL_STEP, Kind, ParameterGroup, State, TensorKey, slot_key
from tests.catalogs import stored_tensor
from tests.frameworks.torch.simulated import distribute, fake_rank, make_mesh, numbered
from tests.frameworks.torch.transfer import catalog_of, frozen, load, resume


def stepped(optimizer: optim.Optimizer, parameters, times: int = 1) -> optim.Optimizer:
    parameters = list(parameters)
    for _ in range(times):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def capture(model, optimizer, global_step: int | None = None) -> State:
    return TorchAdapter().capture(model, optimizer, global_step=global_step)


def slots(state: State) -> set[str]:
    return {tensor_name(key) for key in state.tensors if key.kind is Kind.OPTIMIZER}


def value(state: State, key: TensorKey) -> np.ndarray:
    (shard,) = state.tensors[key].shards
    return shard.memory.read()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (optim.AdamW, {"adam_m", "adam_v"}),
        (lambda p: optim.Adam(p, amsgrad=True), {"adam_m", "adam_v", "max_exp_avg_sq"}),
        (optim.NAdam, {"adam_m", "adam_v", "mu_product"}),
        (optim.RAdam, {"adam_m", "adam_v"}),
        (optim.Adamax, {"exp_avg", "exp_inf"}),
        (lambda p: optim.SGD(p, momentum=0.9), {"momentum_buffer"}),
        (optim.SGD, set()),
        (optim.Adagrad, {"sum"}),
        (lambda p: optim.RMSprop(p, momentum=0.9, centered=True), {"square_avg", "momentum_buffer", "grad_avg"}),
        (optim.Adafactor, {"row_var", "col_var"}),
    ],
)
def test_names_of_slots(make, expected) -> None:
    model = nn.Linear(3, 2, bias=False)
    state = capture(model, stepped(make(model.parameters()), model.parameters()), 1)
    assert slots(state) == {f"{slot}.weight" for slot in expected} | {"global_step"}


def test_slots_are_views_of_the_optimizers_memory() -> None:
    model = nn.Linear(3, 2)
    optimizer = stepped(optim.AdamW(model.parameters()), model.parameters())
    state = capture(model, optimizer)
    value(state, slot_key("adam_m", "weight"))[0, 0] = 9
    assert optimizer.state[model.weight]["exp_avg"][0, 0].item() == 9


def test_the_step_count_is_one_tensor_of_the_contract() -> None:
    model = nn.Linear(3, 2)
    optimizer = stepped(optim.AdamW(model.parameters()), model.parameters(), 3)
    for given in (None, 3):
        state = capture(model, optimizer, given)
        step = value(state, GLOBAL_STEP)
        assert (step.dtype, step.tolist()) == (np.int32, [3])
        assert not any(key.slot == "step" for key in state.tensors)


def test_counts_that_differ_are_kept_beside_it() -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.AdamW(model.parameters())
    stepped(optimizer, [model.weight], 2)
    stepped(optimizer, [model.weight, model.bias], 3)
    state = capture(model, optimizer)
    assert value(state, GLOBAL_STEP).tolist() == [5]
    assert {key.parameter: value(state, key).item() for key in state.tensors if key.slot == "step"} == {"bias": 3}
    assert state.tensors[slot_key("step", "bias")].dtype == by_name("float32")
    # Where training counts something else, every parameter differs.
    assert {key.parameter for key in capture(model, optimizer, 100).tensors if key.slot == "step"} == {"weight", "bias"}

    other = nn.Linear(3, 2)
    fresh = optim.AdamW(other.parameters())
    resume(state, frozen(state), other, fresh)
    assert [fresh.state[p]["step"].item() for p in other.parameters()] == [5, 3]


def test_without_counts_there_is_no_step_count_unless_given() -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters())
    assert GLOBAL_STEP not in capture(model, optimizer).tensors
    assert value(capture(model, optimizer, 7), GLOBAL_STEP).tolist() == [7]
    assert GLOBAL_STEP not in capture(model, None, 7).tensors


def test_a_slot_that_is_none_is_no_slot() -> None:
    model, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    optimizer, fresh = (optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    optimizer.state[model.weight]["momentum_buffer"] = None
    assert slots(capture(model, optimizer)) == set()
    assert capture(model, optimizer).groups[0].unstepped == ("weight",)
    optimizer.state.clear()
    state = capture(model, stepped(optimizer, model.parameters()))
    fresh.state[other.weight]["momentum_buffer"] = None
    assert resume(state, frozen(state), other, fresh) == set()
    assert torch.equal(fresh.state[other.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])


def test_groups_are_kept_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    weights, biases = ([p for n, p in model.named_parameters() if n.endswith(end)] for end in ("weight", "bias"))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": torch.tensor(0.5)}]
    optimizer = optim.AdamW(groups, lr=0.1, foreach=False)
    stepped(optimizer, [*weights, model[0].bias])
    first, second = capture(model, optimizer).groups
    assert first.parameters == ("0.weight", "1.weight")
    assert (first.options["lr"], first.options["weight_decay"], first.options["betas"]) == (0.1, 0.1, (0.9, 0.999))
    assert first.unstepped == ()
    assert second.parameters == ("0.bias", "1.bias")
    assert second.unstepped == ("1.bias",)
    assert second.options["lr"] == FrameworkArray("torch", "float32", np.array(0.5, np.float32))
    assert not {"params", "param_names"} & set(first.options)


def test_asking_for_state_makes_none() -> None:
    model = nn.Linear(1, 1)
    optimizer = optim.AdamW(model.parameters())
    assert capture(model, optimizer).groups[0].unstepped == ("weight", "bias")
    assert len(optimizer.state) == 0


def test_named_parameters_in_groups() -> None:
    model = nn.Linear(1, 1)
    optimizer = stepped(optim.AdamW(model.named_parameters()), model.parameters())
    assert "param_names" not in capture(model, optimizer).groups[0].options


def test_several_optimizers_and_wrapped_models() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    compiled = torch.compile(model, backend="eager")
    first = stepped(optim.AdamW(compiled.a.parameters()), model["a"].parameters())
    second = stepped(optim.SGD(model["b"].parameters(), momentum=0.9), model["b"].parameters())
    for given in ([first, second], {"x": first, "y": second}):
        state = capture(compiled, given, 1)
        names = {f"{slot}.a.{name}" for slot in ("adam_m", "adam_v") for name in ("weight", "bias")}
        assert slots(state) == names | {"momentum_buffer.b.weight", "momentum_buffer.b.bias", "global_step"}
    assert len(capture(model, [first, second]).groups) == 2


def test_a_wrapper_around_an_optimizer() -> None:
    class Wrapper:
        def __init__(self, inner: optim.Optimizer) -> None:
            self.optimizer = inner

    model = nn.Linear(1, 1)
    assert "adam_m.weight" in slots(capture(model, Wrapper(stepped(optim.AdamW(model.parameters()), model.parameters()))))


def test_a_parameter_that_is_not_the_models() -> None:
    model, stranger = nn.Linear(1, 1), nn.Parameter(torch.ones(7))
    optimizer = optim.AdamW([{"params": model.parameters()}, {"params": [nn.Parameter(torch.ones(2)), stranger]}])
    for given in (model, None):
        with pytest.raises(CaptureError, match=r"AdamW\.param_groups\[(1|0)\]\['params'\]\[0\]") as caught:
            capture(given, optimizer)
    assert "fully_shard" in str(caught.value.fix)


def test_things_that_cannot_be_captured() -> None:
    model = nn.Linear(1, 1)
    optimizer = stepped(optim.AdamW(model.parameters()), model.parameters())
    with pytest.raises(CaptureError, match=r"(?s)same parameter.*weight"):
        capture(model, [optimizer, optim.SGD(model.parameters())])
    optimizer.state[model.weight]["history"] = [1]
    with pytest.raises(CaptureError, match=r"(?s)history\.weight.*list in AdamW"):
        capture(model, optimizer)
    optimizer.state[model.weight] = {"a.b": torch.ones(1)}
    with pytest.raises(CaptureError, match=r"'a\.b'"):
        capture(model, optimizer)
    optimizer.state.clear()
    optimizer.state["all"] = {"x": 1}  # pyright: ignore[reportArgumentType]
    with pytest.raises(CaptureError, match=r"AdamW\.state\['all'\]"):
        capture(model, optimizer)
    with pytest.raises(UsageError, match="list or dictionary"):
        capture(model, [3])


def test_lbfgs_is_an_error_that_names_the_slot() -> None:
    model = nn.Linear(1, 1)
    optimizer = optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(CaptureError, match="LBFGS"):
        capture(model, optimizer)


@pytest.mark.parametrize("count", [1, 4])
def test_a_mindformers_checkpoint_has_moments_and_a_step_count_only(count) -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    tensors = {
        slot_key("adam_m", "weight"): np.full((2, 3), 0.5, np.float32),
        slot_key("adam_v", "weight"): np.full((2, 3), 0.25, np.float32),
        GLOBAL_STEP: np.array([count], np.int32),
        TensorKey(Kind.OPTIMIZER, "learning_rate", ""): np.array(0.1, np.float32),
    }
    catalog = Catalog("", {k: stored_tensor(k, by_name(a.dtype.name), a.shape, None, ()) for k, a in tensors.items()})
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    copies = {key: [(Region.whole(array.shape), array)] for key, array in tensors.items()}
    missing = load(catalog, (), copies, model, optimizer)
    assert {tensor_name(key) for key in missing} == {"weight", "bias"}
    state = optimizer.state[model.weight]
    assert (state["exp_avg"] == 0.5).all()
    assert (state["exp_avg_sq"] == 0.25).all()
    assert (state["step"].item(), state["step"].dtype, state["step"].shape) == (count, torch.float32, ())
    assert model.bias not in optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("global_step", [5, 6])
def test_another_kind_of_optimizer_lacks_slots_and_stays_fresh(global_step) -> None:
    model, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    state = capture(model, stepped(optim.Adagrad(model.parameters()), model.parameters(), 5), global_step)
    fresh = optim.AdamW(other.parameters())
    missing = resume(state, frozen(state), other, fresh)
    assert {tensor_name(key) for key in missing} == {"adam_m.weight", "adam_v.weight"}
    assert len(fresh.state) == 0


def test_a_checkpoint_without_optimizer_lacks_everything() -> None:
    model, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    state = capture(model, None)
    fresh = optim.AdamW(other.parameters())
    missing = resume(state, frozen(state), other, fresh)
    assert {tensor_name(key) for key in missing} == {"adam_m.weight", "adam_v.weight", "global_step"}
    assert len(fresh.state) == 0
    used = stepped(optim.AdamW(other.parameters()), other.parameters(), 2)
    resume(state, frozen(state), other, used)
    assert used.state[other.weight]["step"].item() == 2


def test_moments_without_any_count_leave_the_counts_alone() -> None:
    model, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    state = capture(model, stepped(optim.AdamW(model.parameters()), model.parameters(), 5), 5)
    catalog = Catalog("", {key: tensor for key, tensor in catalog_of(state).tensors.items() if key != GLOBAL_STEP})
    copies = {key: shards for key, shards in frozen(state).items() if key != GLOBAL_STEP}
    for times in (0, 2):
        optimizer = stepped(optim.AdamW(other.parameters()), other.parameters(), times)
        assert load(catalog, state.groups, copies, other, optimizer) == {GLOBAL_STEP}
        assert optimizer.state[other.weight]["step"].item() == times
        assert (optimizer.state[other.weight]["exp_avg"] != 0).all()


@pytest.mark.parametrize("make", [optim.AdamW, lambda p: optim.SGD(p, lr=0.1, momentum=0.9), optim.Adagrad])
def test_state_of_a_parameter_that_the_checkpoint_calls_unstepped_goes(make) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer, used = make(model.parameters()), make(other.parameters())
    stepped(optimizer, [model.weight])
    stepped(used, other.parameters(), 4)
    state = capture(model, optimizer, 1)
    assert resume(state, frozen(state), other, used) == set()
    mine, theirs = (o.state.get(p, {}) for o, p in ((optimizer, model.bias), (used, other.bias)))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[slot]) for slot, value in mine.items())
    stepped(optimizer, model.parameters())
    stepped(used, other.parameters())
    for slot, value in optimizer.state[model.bias].items():
        assert torch.equal(value, used.state[other.bias][slot])


def test_adagrad_forgets_what_an_unstepped_parameter_had() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    saved = stepped(optim.AdamW(model.parameters()), [model.weight])
    used = stepped(optim.Adagrad(other.parameters(), initial_accumulator_value=0.5), other.parameters(), 4)
    tensor = used.state[other.bias]["sum"]
    state = capture(model, saved, 1)
    resume(state, frozen(state), other, used)
    assert used.state[other.bias]["sum"] is tensor
    assert (tensor == 0.5).all()
    assert used.state[other.bias]["step"].item() == 0


def test_a_parameter_that_the_checkpoint_does_not_know_gets_no_state() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1)})
    state = capture(model, stepped(optim.AdamW(model.parameters()), model.parameters()), 1)
    larger = nn.ModuleDict({"a": nn.Linear(1, 1), "new": nn.Linear(1, 1)})
    optimizer = optim.AdamW(larger.parameters())
    missing = resume(state, frozen(state), larger, optimizer)
    assert {tensor_name(key) for key in missing} == {"new.weight", "new.bias"}
    assert set(optimizer.state) == {larger["a"].weight, larger["a"].bias}


def test_hyper_parameters_come_back_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = optim.AdamW([{"params": model[0].parameters(), "lr": 0.3, "betas": (0.5, 0.6)}, {"params": model[1].parameters()}], lr=0.1)
    optimizer.param_groups[1]["initial_lr"] = 0.7
    state = capture(model, optimizer)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": other[1].parameters()}, {"params": [other[0].weight]}, {"params": [other[0].bias], "foreach": False}]
    fresh = optim.AdamW(groups, lr=0.9, weight_decay=0.9, fused=None)
    resume(state, frozen(state), other, fresh)
    last, first, third = fresh.param_groups
    assert (last["lr"], last["initial_lr"], last["weight_decay"]) == (0.1, 0.7, 0.01)
    assert (first["lr"], first["betas"]) == (third["lr"], third["betas"]) == (0.3, (0.5, 0.6))
    assert third["foreach"] is False
    assert "initial_lr" not in first


def test_options_of_another_optimizer_are_left_out_and_how_to_compute_stays() -> None:
    model = nn.Linear(1, 1)
    state = capture(model, optim.SGD(model.parameters(), lr=0.3, momentum=0.9, foreach=True))
    other = optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    resume(state, frozen(state), model, other)
    assert other.param_groups[0]["lr"] == 0.3
    assert other.param_groups[0]["foreach"] is False
    assert not {"momentum", "nesterov", "dampening"} & set(other.param_groups[0])


@pytest.mark.parametrize("saved", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_a_tensor_learning_rate_is_filled_in_place(saved) -> None:
    model = nn.Linear(1, 1)
    state = capture(model, optim.AdamW(model.parameters(), lr=saved, foreach=False))
    rate = torch.tensor(0.1)
    optimizer = optim.AdamW(model.parameters(), lr=rate, betas=(torch.tensor(0.1), torch.tensor(0.2)), foreach=False, capturable=False)
    second = optimizer.param_groups[0]["betas"][1]
    resume(state, frozen(state), model, optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
    assert optimizer.param_groups[0]["betas"][1] is second
    assert second.item() == pytest.approx(0.999)
    plain = optim.AdamW(model.parameters(), lr=0.1)
    resume(state, frozen(state), model, plain)
    assert plain.param_groups[0]["lr"] == 0.25
    assert isinstance(plain.param_groups[0]["lr"], float)


def test_one_group_cannot_take_two_learning_rates() -> None:
    model = nn.Linear(1, 1)
    state = capture(model, optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]))
    optimizer = optim.SGD(model.parameters(), lr=0.9)
    with pytest.raises(MismatchError, match=r"(?s)lr.*0\.\d for (weight|bias).*0\.\d, as for (weight|bias)"):
        TorchAdapter().prepare(model, optimizer).destination(catalog_of(state), state.groups)
    assert optimizer.param_groups[0]["lr"] == 0.9


def test_groups_that_differ_in_what_the_run_ignores_fit_one_group() -> None:
    model = nn.Linear(1, 1)
    groups = (
        ParameterGroup({"lr": 0.1, "foreach": True, "unknown": 1}, ("weight",)),
        ParameterGroup({"lr": 0.1, "foreach": False, "unknown": 2}, ("bias",)),
    )
    optimizer = optim.SGD(model.parameters(), lr=0.9)
    TorchAdapter().prepare(model, optimizer).destination(Catalog("", {}), groups).install(groups)
    assert optimizer.param_groups[0]["lr"] == 0.1


class Lion(optim.Optimizer):
    """An optimizer that torch doesn't come with."""

    def __init__(self, params, counted: bool = False) -> None:
        super().__init__(params, {"lr": 0.1})
        self.counted = counted

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    if self.counted:
                        state["step"] = 0
                        state["scale"] = 1.0
                state["momentum"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                if self.counted:
                    state["step"] += 1
                    state["scale"] *= 0.5
                parameter.sub_(state["momentum"].sign() * group["lr"])


def test_an_unknown_optimizer_gets_slots_of_the_parameters_shape() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer, fresh = stepped(Lion(model.parameters()), model.parameters()), Lion(other.parameters())
    state = capture(model, optimizer, 1)
    assert resume(state, frozen(state), other, fresh) == set()
    assert torch.equal(fresh.state[other.weight]["momentum"], optimizer.state[model.weight]["momentum"])
    stepped(optimizer, model.parameters())
    stepped(fresh, other.parameters())
    assert torch.equal(model.weight, other.weight)


def test_an_unknown_optimizer_that_counts_must_step_once() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = stepped(Lion(model.parameters(), counted=True), model.parameters(), 3)
    state = capture(model, optimizer, 3)
    assert {"step.weight", "scale.weight", "momentum.weight"} <= slots(state)
    with pytest.raises(CaptureError, match=r"(?s)not known.*weight.*Lion.*one optimizer step"):
        resume(state, frozen(state), other, Lion(other.parameters(), counted=True))
    fresh = stepped(Lion(other.parameters(), counted=True), other.parameters())
    assert resume(state, frozen(state), other, fresh) == set()
    assert (fresh.state[other.weight]["step"], fresh.state[other.weight]["scale"]) == (3, 0.125)
    assert isinstance(fresh.state[other.weight]["step"], int)


def test_a_subclass_that_makes_its_state_like_its_base_is_known() -> None:
    class Logged(optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Other(optim.AdamW):
        def _init_group(self, *arguments):
            return super()._init_group(*arguments)

    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    state = capture(model, stepped(Logged(model.parameters()), model.parameters()), 1)
    fresh = Logged(other.parameters())
    assert resume(state, frozen(state), other, fresh) == set()
    assert fresh.state[other.weight]["step"].item() == 1
    with pytest.raises(CaptureError, match="Other"):
        resume(state, frozen(state), other, Other(other.parameters()))


def test_sparse_adam_counts_in_numbers() -> None:
    def made():
        model = nn.Embedding(4, 2, sparse=True)
        return model, optim.SparseAdam(list(model.parameters()))

    (model, optimizer), (other, fresh) = made(), made()
    for _ in range(2):
        model(torch.tensor([1])).sum().backward()
        optimizer.step()
    state = capture(model, optimizer, 2)
    assert slots(state) == {"adam_m.weight", "adam_v.weight", "global_step"}
    assert resume(state, frozen(state), other, fresh) == set()
    assert fresh.state[other.weight]["step"] == 2


def test_a_tied_parameter_on_two_stages_has_its_moments_once() -> None:
    def stages():
        first, last = nn.Module(), nn.Module()
        first.add_module("embed", nn.Embedding(4, 3))
        last.add_module("head", nn.Linear(3, 4, bias=False))
        tie(last, {"head.weight": "embed.weight"})
        last.head.weight.data.copy_(first.embed.weight.data)
        return [first, last], [first.embed.weight, last.head.weight]

    (model, parameters), (other, others) = stages(), stages()
    state = capture(model, stepped(optim.AdamW(parameters), parameters), 1)
    assert slots(state) == {"adam_m.embed.weight", "adam_v.embed.weight", "global_step"}
    assert state.groups[0].parameters == ("embed.weight",)
    fresh = optim.AdamW(others)
    assert resume(state, frozen(state), other, fresh) == set()
    for parameter in others:
        assert torch.equal(parameter, parameters[0])
        assert (fresh.state[parameter]["exp_avg"] != 0).all()
        assert fresh.state[parameter]["step"].item() == 1


def test_slots_of_a_dtensor_lie_like_it_and_scalars_like_its_mesh() -> None:
    with fake_rank(1, 2):
        mesh = make_mesh((2,), ("tp",))
        model = nn.Linear(1, 1, bias=False)
        model.weight = nn.Parameter(distribute(numbered((4, 3)), mesh, [Shard(0)]))
        state = capture(model, stepped(optim.NAdam(model.parameters()), model.parameters()), 1)
    moment, product, step = (state.tensors[key] for key in (slot_key("adam_m", "weight"), slot_key("mu_product", "weight"), GLOBAL_STEP))
    assert moment.shards[0].region == Region((2, 0), (2, 3))
    assert all(tensor.layout is not None for tensor in (moment, product, step))
    assert moment.layout.split == ((0,), ())
    assert (product.layout.split, step.layout.split) == ((), ((),))
    assert step.layout.mesh.ranks == (0, 1)


def test_adafactor_of_dtensors() -> None:
    """Factors have another shape than the parameter; torch replicates them."""
    with fake_rank(1, 2):
        mesh = make_mesh((2,), ("tp",))
        model, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for module in (model, other):
            module.weight = nn.Parameter(distribute(numbered((4, 3)), mesh, [Replicate()]))
        optimizer, fresh = stepped(optim.Adafactor(model.parameters()), model.parameters()), optim.Adafactor(other.parameters())
        state = capture(model, optimizer, 1)
        assert state.tensors[slot_key("row_var", "weight")].global_shape == (4, 1)
        assert resume(state, frozen(state), other, fresh) == set()
        for slot, mine in optimizer.state[model.weight].items():
            theirs = fresh.state[other.weight][slot]
            assert type(mine) is type(theirs)
            mine, theirs = (tensor.to_local() if slot != "step" else tensor for tensor in (mine, theirs))
            assert torch.equal(mine, theirs)


def test_a_capturable_step_count_keeps_its_type() -> None:
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    state = capture(model, stepped(optim.AdamW(model.parameters(), fused=True), model.parameters(), 2), 2)
    fresh = optim.AdamW(other.parameters(), fused=True)
    assert resume(state, frozen(state), other, fresh) == set()
    assert (fresh.state[other.weight]["step"].dtype, fresh.state[other.weight]["step"].item()) == (torch.float32, 2)


def test_a_scheduler_made_before_the_load_goes_on() -> None:
    def made():
        model = nn.Linear(1, 1)
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        return model, optimizer, optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    (model, optimizer, scheduler), (other, fresh, second) = made(), made()
    for _ in range(3):
        stepped(optimizer, model.parameters())
        scheduler.step()
    state = capture(model, optimizer)
    resume(state, frozen(state), other, fresh)
    second.load_state_dict(scheduler.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.125
    stepped(fresh, other.parameters())
    second.step()
    assert fresh.param_groups[0]["lr"] == 0.0625
