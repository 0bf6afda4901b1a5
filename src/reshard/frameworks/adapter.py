"""What an adapter does for the rest: capture a state, prepare one to be filled, and install what was loaded. Imports no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.state import ParameterGroup, State


class Destination(Protocol):
    """A state that a load fills.

    Attributes:
        state: the tensors to fill. Their memory is the model's own parameters and buffers, and optimizer slots that may not belong to the
            optimizer yet: nothing is installed before `install`.
    """

    @property
    def state(self) -> State:
        """The tensors to fill."""
        ...

    @property
    def installs(self) -> bool:
        """Whether `install` has anything to do: where it hasn't, all is done when the tensors are filled."""
        ...

    def install(self, groups: Sequence[ParameterGroup]) -> None:
        """Give the filled slots and these hyper-parameters to the optimizers. Called once, after the tensors were filled.

        Args:
            groups: the checkpoint's hyper-parameters for all parameters of the run, as merged over its ranks; empty when it has none.
        """
        ...


class Prepared(Protocol):
    """A run that a load is going to fill, looked at before it is known from what: other ranks are told which checkpoint meanwhile."""

    def destination(self, catalog: Catalog, groups: Sequence[ParameterGroup]) -> Destination:
        """The run's state as memory to be filled; makes the slots that a fresh optimizer lacks, without stepping it, changing a weight or
        drawing a random number. May be called again, for another checkpoint, as long as nothing was installed.

        Args:
            catalog: what the checkpoint holds: which slots, of which shape and dtype.
            groups: the checkpoint's hyper-parameters; a parameter that they call unstepped gets no slot.

        Raises:
            CaptureError: a slot that can't be captured or made.
            MismatchError: hyper-parameters that the run's groups can't take.
        """
        ...


class Adapter(Protocol):
    """What a framework looks like from outside. Every method is local: none communicates (`communicator` apart)."""

    @property
    def framework(self) -> str:
        """`torch`, `mindspore` or `numpy`."""
        ...

    def capture(self, model: Any, optimizer: Any, *, global_step: int | None) -> State:
        """What this rank holds, to be saved.

        Args:
            model: a module, a list or a dictionary of them, or None.
            optimizer: an optimizer, a list or a dictionary of them, or None.
            global_step: the step count that `global_step` is to hold; parameters whose optimizer counts differently get a `step` slot
                besides. None: the largest count of this rank's parameters.

        Raises:
            CaptureError: something that can't be saved (a `Partial` placement, an unknown dtype), naming the tensor.
        """
        ...

    def prepare(self, model: Any, optimizer: Any) -> Prepared:
        """The same state, to be filled. All ranks call it, or none: it may give up what modules have gathered.

        Args:
            model: as in `capture`.
            optimizer: as in `capture`.

        Raises:
            CaptureError: as in `capture`.
        """
        ...

    def random_states(self) -> Mapping[str, Any]:
        """The states of every random generator of this process (Python, numpy, framework): trees that the extras can hold."""
        ...

    def restore_random_states(self, states: Mapping[str, Any]) -> None:
        """Give the generators these states."""
        ...

    def reseed(self, seed: int) -> None:
        """Seed every generator of this process (64 bits)."""
        ...

    def to_value(self, value: Any) -> Any:
        """A tree with the framework's tensors in it, as the extras can hold it (`reshard.format.extra.FrameworkArray`)."""
        ...

    def from_value(self, value: Any) -> Any:
        """The inverse of `to_value`."""
        ...

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Memory of the host, of bytes, to which a device of the framework copies while it goes on."""
        ...

    def before_steps(self, call: Callable[[], None]) -> Callable[[], None] | None:
        """Have something called before every step of every optimizer of this process.

        Returns:
            What ends that; None where the framework has no such place.
        """
        ...

    def communicator(self) -> Communicator:
        """A communicator over the ranks of the run, of its own. Collective."""
        ...
