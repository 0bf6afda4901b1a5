"""Deferred saves of real training: with the copy slowed down, what is saved is byte for byte what a synchronous save at the call writes."""

from __future__ import annotations

import copy
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import reshard
from reshard.errors import CaptureError, UsageError
from reshard.frameworks.torch import TorchAdapter
from reshard.saving import async_saver, snapshot
from reshard.saving.background import Background
from reshard.saving.latch import Latch


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies in the background take their time; the list says in which threads tensors were copied."""
    threads: list[str] = []
    quick = snapshot._copy

    def slow(*arguments: Any) -> Any:
        name = threading.current_thread().name.partition("_")[0]
        threads.append(name)
        if name == "reshard-save":
            time.sleep(0.03)
        return quick(*arguments)

    monkeypatch.setattr(snapshot, "_copy", slow)
    return threads


def contents(root: Path, step: int) -> dict[str, bytes]:
    directory = root / f"iteration_{step:08d}"
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.safetensors")}


class Run:
    """A training run and its optimizers.

    Args:
        model: what is trained.
        make: makes the optimizers of its parameters.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[nn.Parameter]], Any]) -> None:
        self.model = model
        self.optimizer = make(list(model.parameters()))
        first = self.optimizer[0] if isinstance(self.optimizer, list) else self.optimizer
        self.scheduler = None if isinstance(first, dict) else ExponentialLR(first, 0.5)
        self.others: dict[str, nn.Module] = {}

    def backward(self) -> None:
        self.model(torch.randn(8, 6)).square().sum().backward()

    def step(self) -> None:
        for optimizer in self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]:
            optimizer.step()
            optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def parts(self) -> Mapping[str, Any]:
        model = {"model": self.model, **self.others} if self.others else self.model
        return {"model": model, "optimizer": self.optimizer, "scheduler": self.scheduler}


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(), spectral_norm(nn.Linear(16, 4)))


def two(parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
    half = len(parameters) // 2
    return [optim.AdamW(parameters[:half]), optim.SGD(parameters[half:], momentum=0.9)]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[list[nn.Parameter]], Any]]] = {
    "plain": (plain, lambda p: optim.AdamW(p, foreach=False)),
    "foreach": (plain, lambda p: optim.AdamW(p, foreach=True)),
    "fused": (plain, lambda p: optim.AdamW(p, fused=True)),
    "batch norm, dropout and spectral norm": (normalized, optim.AdamW),
    "two optimizers": (plain, two),
    "a learning rate that is a tensor": (plain, lambda p: optim.Adam(p, lr=torch.tensor(0.1), foreach=False)),
    "sgd": (plain, lambda p: optim.SGD(p, lr=0.1, momentum=0.9)),
}


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_and_the_saved_state_is_that_of_the_call(tmp_path: Path, slowly: list[str], case: str, accumulated: int) -> None:
    torch.manual_seed(3)
    make_model, make = CASES[case]
    run = Run(make_model(), make)
    with reshard.CheckpointManager(tmp_path / "deferred", async_save="deferred", keep_checkpoint_max=None) as manager:
        for step in range(1, 4):
            for micro in range(accumulated):
                run.backward()
                if micro == accumulated // 2:
                    reshard.save(tmp_path / "now", step, **run.parts())
                    manager.save(step, **run.parts())
            run.step()
        manager.wait()
    for step in range(1, 4):
        assert contents(tmp_path / "deferred", step) == contents(tmp_path / "now", step)


def test_without_the_wait_before_steps_it_would_be_another_state(
    tmp_path: Path, slowly: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchAdapter, "before_steps", lambda self, call: lambda: None)
    torch.manual_seed(3)
    run = Run(plain(), optim.AdamW)
    run.backward()
    run.step()
    with reshard.CheckpointManager(tmp_path / "deferred", async_save="deferred") as manager:
        run.backward()
        reshard.save(tmp_path / "now", 1, **run.parts())
        manager.save(1, **run.parts())
        run.step()
        manager.wait()
    assert contents(tmp_path / "deferred", 1) != contents(tmp_path / "now", 1)


def test_an_optimizer_that_steps_inside_the_backward_pass(tmp_path: Path, slowly: list[str]) -> None:
    torch.manual_seed(3)
    model = plain()
    optimizers: dict[torch.Tensor, optim.Optimizer] = {parameter: optim.AdamW([parameter]) for parameter in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizer = optimizers[parameter]
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    parts = {"model": model, "optimizer": list(optimizers.values())}
    with reshard.CheckpointManager(tmp_path / "deferred", async_save="deferred") as manager:
        for number in range(1, 4):
            model(torch.randn(8, 6)).square().sum().backward()
            reshard.save(tmp_path / "now", number, **parts)
            manager.save(number, **parts)
        model(torch.randn(8, 6)).square().sum().backward()
    for number in range(1, 4):
        assert contents(tmp_path / "deferred", number) == contents(tmp_path / "now", number)


def test_averaged_weights_are_copied_at_once_and_others_wait_when_told(tmp_path: Path, slowly: list[str]) -> None:
    torch.manual_seed(3)
    run = Run(normalized(), optim.AdamW)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    run.others = {"average": average}
    with reshard.CheckpointManager(tmp_path / "deferred", async_save="deferred", keep_checkpoint_max=None) as manager:
        for step in range(1, 4):
            run.backward()
            run.step()
            reshard.save(tmp_path / "now", step, **run.parts())
            manager.save(step, **run.parts())
            average.update_parameters(run.model)  # no optimizer updates them: they were copied at once
            if step == 2:
                manager.before_update()
                run.model.load_state_dict(copy.deepcopy(average.module.state_dict()))
    for step in range(1, 4):
        assert contents(tmp_path / "deferred", step) == contents(tmp_path / "now", step)


def test_a_parameter_that_gets_other_memory_is_saved_as_it_was(tmp_path: Path, slowly: list[str]) -> None:
    run = Run(plain(), optim.AdamW)
    run.backward()
    run.step()
    with reshard.CheckpointManager(tmp_path / "deferred", async_save="deferred") as manager:
        reshard.save(tmp_path / "now", 1, **run.parts())
        manager.save(1, **run.parts())
        for parameter in run.model.parameters():
            parameter.data = torch.zeros_like(parameter)
    assert contents(tmp_path / "deferred", 1) == contents(tmp_path / "now", 1)


def test_copy_needs_no_wait(tmp_path: Path, slowly: list[str]) -> None:
    run = Run(normalized(), optim.AdamW)
    with reshard.CheckpointManager(tmp_path / "copied", async_save=True) as manager:
        for step in (1, 2):
            run.backward()
            run.step()
            reshard.save(tmp_path / "now", step, **run.parts())
            manager.save(step, **run.parts())
            with torch.no_grad():
                for tensor in [*run.model.parameters(), *run.model.buffers()]:
                    tensor.zero_()
    assert set(slowly) == {"MainThread"}
    for step in (1, 2):
        assert contents(tmp_path / "copied", step) == contents(tmp_path / "now", step)


def test_the_hook_goes_with_the_manager(tmp_path: Path) -> None:
    hooks: dict[Any, Any] = vars(import_module("torch.optim.optimizer"))["_global_optimizer_pre_hooks"]
    before = len(hooks)
    run = Run(plain(), optim.AdamW)
    with reshard.CheckpointManager(tmp_path, async_save="deferred") as manager:
        manager.save(1, **run.parts())
        manager.save(2, **run.parts())
        assert len(hooks) == before + 1
    assert len(hooks) == before


def test_arrays_have_no_optimizer_to_wait_in_and_are_copied(tmp_path: Path, slowly: list[str]) -> None:
    model = {"w": np.arange(6.0)}
    with reshard.CheckpointManager(tmp_path, async_save="deferred") as manager:
        manager.save(1, model=model, optimizer={"adam_m.w": np.ones(6)})
        model["w"][...] = 0
    assert np.array_equal(reshard.Checkpoint(tmp_path)["w"][:], np.arange(6.0))
    assert set(slowly) == {"MainThread"}


def test_an_interrupt_while_a_save_is_waited_for_does_not_let_training_change_what_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(plain(), lambda parameters: optim.SGD(parameters, 0.5))
    run.backward()
    begun, may_copy = threading.Event(), threading.Event()
    quick = snapshot._copy

    def held(*arguments: Any) -> Any:
        if threading.current_thread().name.startswith("reshard-save"):
            begun.set()
            assert may_copy.wait(60)
        return quick(*arguments)

    monkeypatch.setattr(snapshot, "_copy", held)
    expected = copy.deepcopy(run.model.state_dict())
    with reshard.CheckpointManager(tmp_path, async_save="deferred") as manager:
        manager.save(1, **run.parts())

        wait = Latch.wait

        def interrupt(latch: Latch, timeout: float | None = None) -> bool:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return wait(latch, timeout)

        with monkeypatch.context() as patched:
            patched.setattr(Latch, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                manager.wait()
        assert begun.wait(60)
        threading.Timer(0.2, may_copy.set).start()
        run.step()
        assert may_copy.is_set()
    found = copy.deepcopy(run.model)
    reshard.load(tmp_path, model=found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_a_save_at_the_end_of_the_process_is_made_at_once_and_holds_nobody(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    program = f"""
        import atexit, torch, reshard

        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters())
        manager = reshard.CheckpointManager({str(tmp_path)!r}, async_save="deferred")

        def at_exit():
            print(manager.save(1, model=model, optimizer=optimizer).state)
            optimizer.step()
            print("stepped")

        atexit.register(at_exit)
    """
    ended = run_python(textwrap.dedent(program))
    assert ended.stdout.split() == ["committed", "stepped"], ended.stderr
    assert reshard.Checkpoint(tmp_path).iteration == 1


def test_a_step_does_not_copy_for_a_save_that_an_interrupt_kept_from_beginning(
    tmp_path: Path, slowly: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(background: Background[Any], work: Callable[[], Any]) -> None:
        raise KeyboardInterrupt

    run = Run(plain(), lambda parameters: optim.SGD(parameters, 0.5))
    run.backward()
    with reshard.CheckpointManager(tmp_path, async_save="deferred") as manager:
        with monkeypatch.context() as patched:
            patched.setattr(Background, "start", interrupt)
            with pytest.raises(KeyboardInterrupt):
                manager.save(1, **run.parts())
        slowly.clear()
        run.step()
        assert slowly == []
        manager.save(2, **run.parts())
    assert reshard.Checkpoint(tmp_path).iteration == 2


@pytest.fixture
def in_a_step(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Functions that the handler of a signal calls, each once, while a step of the main thread copies what was left for later."""
    calls: list[Callable[[], object]] = []
    quick = snapshot._copy

    def interrupted(*arguments: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            while calls:
                calls.pop(0)()
        return quick(*arguments)

    monkeypatch.setattr(snapshot, "_copy", interrupted)
    # Nobody else copies it first.
    monkeypatch.setattr(async_saver, "cores_per_rank", lambda: 0.5)
    monkeypatch.setattr(async_saver, "_PAUSE_COPIES", 1e9)
    monkeypatch.setattr(async_saver, "_LONGEST_PAUSE", 60.0)
    return calls


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_a_handler_that_uses_the_manager_while_its_thread_copies_is_told_what_to_do(
    tmp_path: Path, in_a_step: list[Callable[[], object]], when_busy: Any
) -> None:
    """It would wait for its own thread."""
    run = Run(plain(), lambda parameters: optim.SGD(parameters, 0.5))
    run.backward()
    expected = copy.deepcopy(run.model.state_dict())
    told: list[str] = []
    with reshard.CheckpointManager(tmp_path, async_save="deferred", when_busy=when_busy) as manager:
        calls: list[Callable[[], object]] = [
            lambda: manager.save(2, **run.parts()),
            lambda: manager.load(**run.parts()),
            manager.wait,
            manager.before_update,
            manager.close,
        ]

        def handle() -> None:
            for call in calls:
                with pytest.raises(UsageError, match="GracefulStop") as caught:
                    call()
                told.append(str(caught.value))

        manager.save(1, **run.parts())
        in_a_step.append(handle)
        run.step()
        assert len(told) == len(calls)
        final = manager.wait()
        assert final is not None
        assert final.state == "committed"
        manager.save(2, **run.parts())  # nothing was closed
    found = copy.deepcopy(run.model)
    reshard.load(tmp_path / "iteration_00000001", model=found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_what_a_handler_raises_while_its_thread_copies_comes_out_of_the_step(tmp_path: Path, in_a_step: list[Callable[[], object]]) -> None:
    run = Run(plain(), lambda parameters: optim.SGD(parameters, 0.5))
    run.backward()
    with reshard.CheckpointManager(tmp_path, async_save="deferred") as manager:
        manager.save(1, **run.parts())
        in_a_step.append(manager.wait)
        with pytest.raises(UsageError, match="GracefulStop"):
            run.step()
        run.step()
    assert reshard.Checkpoint(tmp_path).iteration == 1


def test_two_interrupts_of_a_step_hold_nobody_who_waits_for_the_save(
    tmp_path: Path, in_a_step: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(plain(), lambda parameters: optim.SGD(parameters, 0.5))
    run.backward()
    give_back, wait = snapshot.Snapshot.give_back, Background.wait
    given_back: list[bool] = []

    def interrupt(made: snapshot.Snapshot) -> None:
        monkeypatch.setattr(snapshot.Snapshot, "give_back", note)
        raise KeyboardInterrupt

    def note(made: snapshot.Snapshot) -> None:
        give_back(made)
        given_back.append(threading.current_thread() is threading.main_thread())

    def wait_after(background: Background[Any]) -> Any:
        assert given_back == [True]  # else it would wait for ever
        return wait(background)

    def twice() -> None:
        monkeypatch.setattr(snapshot.Snapshot, "give_back", interrupt)
        raise KeyboardInterrupt

    manager = reshard.CheckpointManager(tmp_path, async_save="deferred")
    manager.save(1, **run.parts())
    in_a_step.append(twice)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    with monkeypatch.context() as patched:
        patched.setattr(Background, "wait", wait_after)
        try:
            final = manager.wait()
        finally:
            run.step()  # gives back in any case
    manager.close()
    assert final is not None
    assert final.state == "committed"


def test_memory_that_is_freed_before_it_is_copied_is_an_error_that_names_the_tensor(
    tmp_path: Path, in_a_step: list[Callable[[], object]]
) -> None:
    run = Run(plain(), lambda parameters: optim.SGD(parameters, 0.5))
    with reshard.CheckpointManager(tmp_path, async_save="deferred") as manager:
        manager.save(1, **run.parts())
        run.model.get_parameter("2.weight").data.untyped_storage().resize_(0)
        with pytest.raises(CaptureError, match=r"(?s)memory of a tensor was freed.*2\.weight"):
            manager.wait()
    assert not list(tmp_path.glob("iteration_*"))
