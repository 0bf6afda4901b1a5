"""What the loading benchmark measures, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.states import FSDP, TENSOR_PARALLEL, TRANSPOSED, Strategy, TensorSpec, small_tensors, transformer

# Of what the plan's runs cover, gaps included, so many times what is needed.
MOST_COVERED = 1.02

# Peak memory above the loaded state: the budget, and what no budget rules: code, buffers of messages, and what is known of each tensor.
BUDGET_BYTES = 256 << 20
FIXED_BYTES = 64 << 20
TENSOR_BYTES = 2000

# A load of DCP that takes longer than this is not waited for.
DCP_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Case:
    """One pair of strategies.

    Attributes:
        name: for the command line and the JSON.
        title: for people; `{tensors}` in it is their number.
        state: the name of the state; cases of one state load the same checkpoint.
        tensors: the state, of a scale.
        saved: the strategy that it was saved under.
        loaded: the strategy that it is loaded under.
        least_over_dcp: DCP's time ÷ ours must be at least this; None: it is only reported.
        most_over_copy: our time ÷ the plain copy's must be at most this; None: it is only reported.
        is_large: measured only when asked for; DCP loads once, and for a limited time.
    """

    name: str
    title: str
    state: str
    tensors: Callable[[float], tuple[TensorSpec, ...]]
    saved: Strategy
    loaded: Strategy
    least_over_dcp: float | None = None
    most_over_copy: float | None = None
    is_large: bool = False

    def title_of(self, tensors: Sequence[TensorSpec]) -> str:
        """The title, for a state."""
        return self.title.format(tensors=f"{len(tensors):,}")


def _small(number: int) -> Callable[[float], tuple[TensorSpec, ...]]:
    return lambda scale: small_tensors(max(4, round(number * scale)))


CASES = (
    Case("same", "the same layout", "transformer", transformer, TENSOR_PARALLEL, TENSOR_PARALLEL, 2.0, 1.3),
    Case("fsdp", "tensor parallel → FSDP", "transformer", transformer, TENSOR_PARALLEL, FSDP, 3.3, 1.5),
    Case("transposed", "rows → columns", "transformer", transformer, TENSOR_PARALLEL, TRANSPOSED, 3.5, 1.5),
    Case("small", "{tensors} tensors of 4 KB", "small", _small(10_000), FSDP, FSDP, 40.0),
    Case("large", "{tensors} tensors of 4 KB", "large", _small(100_000), FSDP, FSDP, is_large=True),
)


def memory_limit(tensors: int) -> int:
    """The most bytes above the loaded state that a rank may take, for a job of so many tensors."""
    return BUDGET_BYTES + FIXED_BYTES + TENSOR_BYTES * tensors
