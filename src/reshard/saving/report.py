"""What a save that is called for says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AsyncSave = Literal["copy", "deferred"]
"""*copy*: training waits while its state is copied. *deferred*: only until what a forward pass changes is copied; the next step of an
optimizer waits for the rest."""

WhenBusy = Literal["wait", "skip"]
"""What becomes of a save while the one before is under way: it waits for that one's end, or it isn't done, on all ranks."""


@dataclass(frozen=True)
class SaveReport:
    """What became of a save.

    Attributes:
        step: the iteration.
        directory: where it lies.
        nbytes: bytes of data that this rank wrote.
        seconds: how long this rank was in the save.
        removed: the iterations that were removed to keep no more than allowed.
        state: `committed`; `under way`: the call was asynchronous, and the checkpoint is still to be written (then `nbytes` are those that
            were copied, `seconds` those that training waited); `skipped`: the save before was still under way.
    """

    step: int
    directory: str
    nbytes: int
    seconds: float
    removed: tuple[int, ...]
    state: Literal["committed", "under way", "skipped"] = "committed"
