"""A parallel strategy as a person writes it: `dp=2,tp=4,pp=2`, and rules for the tensors whose names don't say how they are split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from reshard.errors import UsageError

AXES: Mapping[str, str] = MappingProxyType(
    {
        "dp": "data-parallel ranks that hold copies",
        "fsdp": "data-parallel ranks that share one copy of parameters and optimizer (with dp: HSDP)",
        "tp": "ranks that split the matrices of a layer",
        "pp": "pipeline stages",
        "ep": "how many of the data-parallel ranks (dp × fsdp) share the experts",
    }
)
"""What a strategy consists of. The ranks are dp × fsdp × tp × pp; `ep` is among them, not beside them."""

MOST_RANKS = 1 << 20
"""A forecast keeps some numbers per rank; ten times the largest machines there are is no slip of the keyboard yet."""

# Along these axes a rule can say which dimension is split. `dp` splits the optimizer's tensors only, and only when it is asked to.
SPLIT_AXES = ("ep", "tp", "fsdp", "dp")

_SIZE = re.compile(r"[0-9]{1,9}", re.ASCII)
_DIMENSION = re.compile(r"-?[0-9]{1,2}", re.ASCII)
_NONE = "none"


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which dimensions of some tensors are split, instead of what their names say.

    Attributes:
        pattern: a glob for the names of parameters; their optimizer slots follow.
        dimensions: by axis (of `SPLIT_AXES`) the dimension that it splits, negative ones counted from the last; None for none. `tp` and
            `ep` split nothing when they aren't named; `fsdp` and `dp` then split dimension 0.
        text: the rule as it was written.
    """

    pattern: str
    dimensions: Mapping[str, int | None]
    text: str

    def means(self, parameter: str) -> bool:
        """Whether the rule is about a parameter."""
        return fnmatchcase(parameter, self.pattern)


@dataclass(frozen=True)
class Strategy:
    """How the ranks of a job are arranged, and what each axis splits.

    Ranks are numbered with pipeline stages outermost, then dp, fsdp, and tp innermost, as Megatron-LM, MindSpore Transformers and the
    reference trainer do it. With `ep` the data-parallel ranks are arranged anew for the experts: ep innermost of them, what is left of
    fsdp and dp around it.

    Attributes:
        dp: as in `AXES`.
        fsdp: likewise.
        tp: likewise.
        pp: likewise.
        ep: likewise.
        shard_optimizer: whether the optimizer's tensors are split over dp too (ZeRO-1).
        splits: rules for tensors, instead of what their names say; of several that mean a tensor the last counts.

    Raises:
        UsageError: a size below 1, too many ranks, or an `ep` that the data-parallel ranks can't be arranged by.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    shard_optimizer: bool = False
    splits: tuple[SplitRule, ...] = ()

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1:
                raise UsageError("a strategy has a size that can't be", field=f"strategy, {axis}", found=size, expected="1 or more")
        if self.world_size > MOST_RANKS:
            raise UsageError("a strategy of too many ranks", field="strategy", found=self.world_size, expected=f"at most {MOST_RANKS}")
        if self.ep > 1 and self.fsdp % self.ep and (self.ep % self.fsdp or self.dp % (self.ep // self.fsdp)):
            raise UsageError(
                "the experts can't be spread so: their ranks are among the data-parallel ones",
                field="strategy, ep",
                found=f"ep={self.ep} of dp={self.dp} × fsdp={self.fsdp} data-parallel ranks",
                expected="a divisor of fsdp, or fsdp times a divisor of dp",
                fix=f"for {self.ep} × as many ranks as without ep write dp={self.dp * self.ep}, for instance",
            )

    @property
    def sizes(self) -> Mapping[str, int]:
        """The size of every axis, in the order of `AXES`."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.dp * self.fsdp * self.tp * self.pp

    @property
    def expert_sizes(self) -> tuple[int, int, int]:
        """How the data-parallel ranks are arranged for the experts: what is left of dp, of fsdp, and ep."""
        if self.fsdp % self.ep == 0:
            return self.dp, self.fsdp // self.ep, self.ep
        return self.dp * self.fsdp // self.ep, 1, self.ep

    def rule(self, parameter: str) -> SplitRule | None:
        """The user's rule for a parameter."""
        return next((rule for rule in reversed(self.splits) if rule.means(parameter)), None)

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "dp=1"


def parse_strategy(text: str, *, shard_optimizer: bool = False, splits: Sequence[str] = ()) -> Strategy:
    """The strategy of a text such as `dp=2,tp=4,pp=2`; what isn't named has size 1, and the order means nothing.

    Args:
        text: sizes by axis.
        shard_optimizer: as in `Strategy`.
        splits: rules as `parse_split` takes them.

    Raises:
        UsageError: something else than sizes, an axis that doesn't exist or stands there twice, or a strategy that can't be.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, sign, size = (word.strip() for word in part.partition("="))
        if axis not in AXES:
            raise UsageError(
                "a strategy names an axis that doesn't exist" if sign else "a strategy is sizes by axis",
                field="strategy",
                found=repr(part.strip()),
                expected="; ".join(f"{name}: {meaning}" for name, meaning in AXES.items()),
                fix="write sizes by axis, such as dp=2,tp=4,pp=2 (ranks of context parallelism count as dp)",
            )
        if _SIZE.fullmatch(size) is None:
            raise UsageError(
                "a size of a strategy is not a whole number", field=f"strategy, {axis}", found=repr(size), expected="1 or more, as in dp=2"
            )
        if axis in sizes:
            raise UsageError("a strategy names an axis twice", field=f"strategy, {axis}", found=text)
        sizes[axis] = int(size)
    return replace(Strategy(), **sizes, shard_optimizer=shard_optimizer, splits=tuple(parse_split(rule) for rule in splits))


def parse_split(text: str) -> SplitRule:
    """The rule of a text such as `*.mixer.in_proj.weight=tp:0`, `*.experts.w=ep:0,tp:-1` or `*.router.*=none`.

    What stands before the last `=` is a glob for names of parameters. After it come axes with the dimension that each splits (negative
    ones count from the last), `none` instead of a dimension for an axis that splits nothing, or `none` alone for neither `tp` nor `ep`.

    Raises:
        UsageError: another text.
    """
    pattern, _, given = text.rpartition("=")
    dimensions: dict[str, int | None] = {}
    for part in given.split(",") if given.strip() != _NONE else ():
        axis, _, dimension = (word.strip() for word in part.partition(":"))
        if axis not in SPLIT_AXES or axis in dimensions or not (dimension == _NONE or _DIMENSION.fullmatch(dimension)):
            raise _not_a_rule(text)
        dimensions[axis] = None if dimension == _NONE else int(dimension)
    if not pattern.strip():
        raise _not_a_rule(text)
    return SplitRule(pattern.strip(), MappingProxyType(dimensions), text)


def _not_a_rule(text: str) -> UsageError:
    return UsageError(
        "not a rule how tensors are split",
        field="split",
        found=repr(text),
        expected="PATTERN=AXIS:DIMENSION, such as '*.in_proj.weight=tp:0' or '*.experts.w=ep:0,tp:-1', or 'PATTERN=none'; "
        f"the axes are {', '.join(SPLIT_AXES)}",
    )
