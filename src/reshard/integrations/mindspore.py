"""MindSpore's callback, and loading and saving in one call, with the argument names of MindSpore Transformers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from mindspore.train import Callback

from reshard import shortcuts
from reshard.errors import UsageError
from reshard.format.common import CommonInfo
from reshard.loading.report import RestoreReport
from reshard.loading.strictness import Strictness
from reshard.manager import CheckpointManager
from reshard.saving.report import SaveReport

_logger = logging.getLogger("reshard")

# What the newer `checkpoint:` section calls the same things.
_NEWER_NAMES = {
    "save_path": "directory",
    "save_max": "keep_checkpoint_max",
    "save_interleaved_steps": "save_checkpoint_steps",
    "save_remove_redundancy": "remove_redundancy",
}

# What of that section is about loading, and what it is when it isn't given: weights only, unless a run asks for more.
_LOADING: Mapping[str, Any] = MappingProxyType({"load_path": "", "load_balanced": False, "no_load_optim": True})

DEFAULT_DIRECTORY = "./output/checkpoint"


class CheckpointMonitor(Callback):
    """Saves a MindSpore run while it trains: a callback of `Model.train`, or called by a loop of one's own (`save`, `close`).

    It saves every `save_checkpoint_steps` steps, and at the end of training the last step, if that wasn't saved. The fields are those of
    MindSpore Transformers' Checkpoint 2.0 with its defaults. Those of the newer `checkpoint:` section are taken too
    (`save_path`, `save_max`, `save_interleaved_steps`, `no_save_optim`, `save_remove_redundancy`); one that is given counts more than the
    older one. With `load_path` it loads that checkpoint when training begins: the weights, and with `no_load_optim=False` the optimizer,
    and counts on from there; `load_balanced=True` reads every byte once in the whole job. Making one is collective, and so is everything
    that it does.

    Args:
        prefix: the first part of data files' names.
        directory: the checkpoint root; None for ./output/checkpoint.
        save_checkpoint_steps: steps between two saves; None: nothing is ever saved.
        keep_checkpoint_max: how many of the newest checkpoints stay.
        async_save: save while training goes on.
        checkpoint_format: anything but `safetensors` is taken for it, with a warning: Checkpoint 2.0 has no other.
        remove_redundancy: write once what several ranks hold.
        save_optimizer: save the optimizer too.
        network: what to save; None: the network of `Model.train`. An optimizer inside it isn't part of it.
        optimizer: None: the optimizer of `Model.train`.
        initial_step: the step that the run goes on after: what it counts begins there.
        global_batch_size: samples of a step over all ranks, for the record.
        newer: the fields of the `checkpoint:` section.

    Raises:
        UsageError: a field that there isn't, or a value that can't be.
        RootLockedError: another run writes this root.
    """

    def __init__(
        self,
        prefix: str = "CKP",
        directory: str | None = None,
        save_checkpoint_steps: int | None = 1,
        keep_checkpoint_max: int = 5,
        async_save: bool = False,
        checkpoint_format: str = "safetensors",
        remove_redundancy: bool = False,
        save_optimizer: bool = True,
        *,
        network: nn.Cell | list[nn.Cell] | None = None,
        optimizer: Any = None,
        initial_step: int = 0,
        global_batch_size: int | None = None,
        **newer: Any,
    ) -> None:
        super().__init__()
        fields: dict[str, Any] = {
            "directory": directory,
            "keep_checkpoint_max": keep_checkpoint_max,
            "save_checkpoint_steps": save_checkpoint_steps,
            "remove_redundancy": remove_redundancy,
            "save_optimizer": save_optimizer,
        }
        self._loading = {name: newer.pop(name, default) for name, default in _LOADING.items()}
        fields.update(_older_fields(newer))
        if checkpoint_format != "safetensors":
            _logger.warning("checkpoint_format %r was converted to 'safetensors', the only format of Checkpoint 2.0", checkpoint_format)
        self._every: int | None = fields.pop("save_checkpoint_steps")
        if self._every is not None and (not isinstance(self._every, int) or self._every < 1):
            raise UsageError("steps between two saves", field="save_checkpoint_steps", found=self._every, expected="1 or more, or None")
        self._network, self._optimizer = network, optimizer
        self._step = initial_step
        self._initial_step = initial_step
        self._global_batch_size = global_batch_size
        self._saved: int | None = None
        self._last_loss: float | None = None
        self.manager = CheckpointManager(
            fields.pop("directory") or DEFAULT_DIRECTORY,
            prefix=prefix,
            async_save=async_save,
            read_only=self._every is None,
            **fields,
        )

    def on_train_begin(self, run_context: Any) -> None:
        """Load what `load_path` names."""
        if self._loading["load_path"]:
            self._take(run_context.original_args())
            self.load()

    def load(self, network: Any = None, optimizer: Any = None) -> RestoreReport | None:
        """For a loop of one's own: load what `load_path` names, before the first step.

        Args:
            network: the cell; None: the one that the callback was made with.
            optimizer: likewise.

        Returns:
            The report; None when there is no `load_path`. Where the optimizer was loaded, steps are counted from its iteration on.

        Raises:
            ReshardError: as `CheckpointManager.load`.
        """
        path = self._loading["load_path"]
        if not path:
            return None
        network = self._network if network is None else network
        optimizer = self._optimizer if optimizer is None else optimizer
        only_weights = self._loading["no_load_optim"]
        report = load_checkpoint(path, network, optimizer, balanced_load=self._loading["load_balanced"], no_load_optim=only_weights)
        if not only_weights and report.iteration is not None:
            self._step = self._initial_step = report.iteration
        return report

    def on_train_step_end(self, run_context: Any) -> None:
        """Count the step, and save when it is due."""
        parameters = run_context.original_args()
        self._take(parameters)
        self._step = self._initial_step + int(parameters.cur_step_num)
        self._last_loss = _number(parameters.net_outputs)
        if self._every is not None and self._step % self._every == 0:
            self._save(parameters)

    def on_train_end(self, run_context: Any) -> None:
        """Save the last step, if it wasn't, wait until all is on disk, and let go of the root."""
        parameters = run_context.original_args()
        self._take(parameters)
        try:
            if self._every is not None and self._saved != self._step and self._step > self._initial_step:
                self._save(parameters)
        finally:
            self.close()

    def save(self, step: int, network: Any = None, optimizer: Any = None, common_info: CommonInfo | None = None) -> SaveReport | None:
        """For a loop of one's own: call it after every step; it saves when one is due.

        Args:
            step: the step that is done, from 1.
            network: the cell; None: the one that the callback was made with.
            optimizer: likewise.
            common_info: the training information; by default only the step counts.

        Returns:
            The report; None when no save was due.

        Raises:
            ReshardError: as `CheckpointManager.save`.
        """
        self._step = step
        if self._every is None or step % self._every:
            return None
        network = self._network if network is None else network
        optimizer = self._optimizer if optimizer is None else optimizer
        self._saved = step
        return self.manager.save(step, model=network, optimizer=optimizer, common=common_info)

    def close(self) -> None:
        """Wait until all is on disk, and let go of the root."""
        self.manager.close()

    def _take(self, parameters: Any) -> None:
        """The network and the optimizer that `Model.train` has, where none were given."""
        if self._network is None:
            self._network = parameters.network if parameters.train_network is None else parameters.train_network
        if self._optimizer is None:
            self._optimizer = parameters.optimizer

    def _save(self, parameters: Any) -> None:
        step = self._step
        scale = getattr(getattr(parameters.train_network, "scale_sense", None), "asnumpy", lambda: None)()
        common = CommonInfo(
            epoch_num=int(parameters.cur_epoch_num),
            step_num=step,
            global_step=_steps_of(self._optimizer, step),
            loss_scale=None if scale is None else float(np.asarray(scale).reshape(-1)[0]),
            global_batch_size=self._global_batch_size,
            consumed_samples=None if self._global_batch_size is None else step * self._global_batch_size,
        )
        metrics = None if self._last_loss is None else {"loss": self._last_loss}
        self.manager.save(step, model=self._network, optimizer=self._optimizer, common=common, metrics=metrics)
        self._saved = step


def save_checkpoint(
    iteration: int,
    network: nn.Cell | list[nn.Cell],
    optimizer: Any = None,
    *,
    common_info: CommonInfo | None = None,
    keep_max_num: int | None = 5,
    user_prefix: str | None = None,
    save_checkpoint_path: str | None = None,
    remove_redundancy: bool = False,
) -> SaveReport:
    """Save one checkpoint. Collective.

    Args:
        iteration: the step.
        network: the cell, or a list of this rank's pipeline stages.
        optimizer: the optimizer, or None.
        common_info: the training information.
        keep_max_num: how many of the newest checkpoints stay; None: all.
        user_prefix: the first part of data files' names; None for none.
        save_checkpoint_path: the checkpoint root; None for ./output/checkpoint.
        remove_redundancy: write once what several ranks hold.

    Raises:
        ReshardError: as `CheckpointManager.save`.
    """
    with CheckpointManager(
        save_checkpoint_path or DEFAULT_DIRECTORY, prefix=user_prefix, keep_checkpoint_max=keep_max_num, remove_redundancy=remove_redundancy
    ) as manager:
        return manager.save(iteration, model=network, optimizer=optimizer, common=common_info)


def load_checkpoint(
    checkpoint: str | os.PathLike[str],
    network: nn.Cell | list[nn.Cell],
    optimizer: Any = None,
    *,
    balanced_load: bool = False,
    global_step: int | None = None,
    reshard_worker_num: int = 1,
    no_load_optim: bool = False,
    strict: Strictness | None = None,
) -> RestoreReport:
    """Load a checkpoint into a network and its optimizer, under whatever strategy. Collective.

    Args:
        checkpoint: a root (then the iteration in its tracker is loaded) or one iteration.
        network: the cell, or a list of this rank's pipeline stages; filled in place.
        optimizer: the optimizer; None loads the weights only.
        balanced_load: read every byte once in the whole job, and send it on.
        global_step: the step count that the optimizer goes on from; None: the checkpoint's.
        reshard_worker_num: taken and not needed: reads are spread over threads as it is best.
        no_load_optim: leave the optimizer out, as if it weren't given.
        strict: what to do about tensors that don't fit; by default what the run misses is an error.

    Raises:
        ReshardError: as `CheckpointManager.load`.
    """
    if reshard_worker_num < 1:
        raise UsageError("not a number of workers", field="reshard_worker_num", found=reshard_worker_num, expected="1 or more")
    loaded = None if no_load_optim else optimizer
    report = shortcuts.load(checkpoint, model=network, optimizer=loaded, balanced=balanced_load, strict=strict)
    if global_step is not None and loaded is not None:
        given: Sequence[Any] = list(loaded.values()) if isinstance(loaded, Mapping) else loaded if isinstance(loaded, list) else [loaded]
        for one in given:
            one.global_step.assign_value(Tensor(np.array([global_step], np.int32)))
    return report


def _older_fields(newer: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in newer.items():
        if name in _NEWER_NAMES:
            fields[_NEWER_NAMES[name]] = value
        elif name == "no_save_optim":
            fields["save_optimizer"] = not value
        else:
            raise UsageError(
                "CheckpointMonitor has no such field",
                field=name,
                found=value,
                expected=f"one of the eight of Checkpoint 2.0, or {', '.join([*_NEWER_NAMES, 'no_save_optim', *_LOADING])}",
            )
    return fields


def _steps_of(optimizer: Any, otherwise: int) -> int:
    """How often an optimizer has stepped: a step with overflow leaves it as it was."""
    count = getattr(optimizer, "global_step", None)
    return otherwise if count is None else int(count.asnumpy().reshape(-1)[0])


def _number(outputs: Any) -> float | None:
    """The loss among what a training step gives, as far as it is one."""
    first = outputs[0] if isinstance(outputs, list | tuple) and outputs else outputs
    if isinstance(first, Tensor) and first.size == 1:
        return float(first.asnumpy().reshape(()).item())
    return None
