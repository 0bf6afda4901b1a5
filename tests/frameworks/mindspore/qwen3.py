"""Parameters with the published names and shapes of a small Qwen3: whole with the moments of real steps, or as a rank's parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn

from reshard.frameworks.mindspore import lay_out
from reshard.frameworks.mindspore.memory import array_of, to_tensor
from reshard.geometry import Layout, Mesh
from reshard.geometry.dtypes import by_name
from reshard.testing import split

HIDDEN, FEED, VOCABULARY, HEADS, GROUPS, HEAD, LAYERS = 32, 64, 128, 4, 2, 8, 2


@dataclass(frozen=True)
class Strategy:
    """Ranks that share the work: data, tensor and pipeline parallel; whether what replicas hold is split over dp as well."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    sharded: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp


def shapes() -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        result |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
            prefix + "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD),
            prefix + "self_attention.q_layernorm.weight": (HEAD,),
            prefix + "self_attention.k_layernorm.weight": (HEAD,),
            prefix + "pre_mlp_layernorm.weight": (HIDDEN,),
            prefix + "mlp.linear_fc1.weight": (2 * FEED, HIDDEN),
            prefix + "mlp.linear_fc2.weight": (HIDDEN, FEED),
        }
    return result | {"decoder.final_layernorm.weight": (HIDDEN,), "output_layer.weight": (VOCABULARY, HIDDEN)}


def layers_in(names: Iterable[str]) -> int:
    """How many layers a model of these names has."""
    return 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.layers."))


def stage_of(name: str, strategy: Strategy, layers: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) * strategy.pp // layers
    return 0 if name.startswith("embedding") else strategy.pp - 1


def layout_of(name: str, dimensions: int, strategy: Strategy, layers: int = LAYERS) -> Layout:
    """The published rule: columns over dimension 0, rows over dimension 1; a sharded optimizer splits dimension 0 over dp too."""
    stage, size = stage_of(name, strategy, layers), strategy.dp * strategy.tp
    mesh = Mesh((strategy.dp, 1, strategy.tp), ("a", "b", "c"), tuple(range(stage * size, (stage + 1) * size)))
    axes: list[list[str]] = [[] for _ in range(dimensions)]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        axes[1].append("c")
    elif dimensions == 2:
        axes[0].append("c")
    if strategy.sharded:
        axes[0].append("a")
    return split(mesh, *axes)


class Parameters(nn.Cell):
    """Nothing but parameters; the loss draws each to a target of its own."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(auto_prefix=False)
        self.rows = [Parameter(tensor_of(array), name=name) for name, array in arrays.items()]
        for number, parameter in enumerate(self.rows):
            self.insert_param_to_cell(f"p{number}", parameter)
        for parameter, name in zip(self.rows, arrays, strict=True):
            parameter.name = name

    def construct(self) -> Tensor:
        return sum(((row - 0.5) ** 2).sum() for row in self.rows)


def trained(steps: int, seed: int = 1) -> tuple[Parameters, nn.Optimizer]:
    """The whole model after real steps."""
    draw = np.random.default_rng(seed)
    model = Parameters({name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes().items()})
    optimizer = nn.AdamWeightDecay(model.trainable_params(), learning_rate=0.01)
    gradient = mindspore.value_and_grad(model, None, optimizer.parameters)
    for _ in range(steps):
        optimizer(gradient()[1])
    return model, optimizer


def whole_arrays(model: Parameters, optimizer: nn.Optimizer) -> dict[str, np.ndarray]:
    """Everything under its name in files."""
    return {p.name: p.asnumpy().copy() for p in [*model.get_parameters(), *optimizer.get_parameters()] if p.name != "learning_rate"}


def tensor_of(array: np.ndarray) -> Tensor:
    return to_tensor(array, by_name(array.dtype.name))


class PublishedAdamW(nn.Optimizer):
    """The state of the published AdamW: moments in float32, whatever the type of a parameter."""

    def __init__(self, parameters: list[Parameter]) -> None:
        super().__init__(0.01, parameters)
        for slot in ("adam_m", "adam_v"):
            made = [Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"{slot}.{p.name}") for p in parameters]
            setattr(self, slot, ParameterTuple(made))


def is_of_model(name: str) -> bool:
    return not name.startswith(("adam_m.", "adam_v.")) and name not in ("global_step", "learning_rate")


def rank_part(
    whole: dict[str, np.ndarray], strategy: Strategy, rank: int, *, blank: bool = False
) -> tuple[Parameters, nn.Optimizer | None]:
    """What a rank holds: its stage's parameters, truly cut, and an optimizer over them, if there is anything of one."""
    layers = layers_in(whole)
    layouts = {name: layout_of(name, array.ndim, strategy, layers) for name, array in whole.items() if is_of_model(name)}
    mine = {name: layout for name, layout in layouts.items() if rank in layout.mesh}

    def cut(array: np.ndarray, name: str) -> np.ndarray:
        region = mine[name].rank_region(rank, array.shape)
        values = np.ascontiguousarray(array[region.slices])
        return np.full_like(values, 7) if blank else values

    model = Parameters({name: cut(whole[name], name) for name in mine})
    lay_out(model, mine)
    if not mine or not any(name.startswith("adam_m.") for name in whole):
        return model, None
    optimizer = PublishedAdamW(model.trainable_params())
    for slot in optimizer.get_parameters():
        kind, _, name = slot.name.partition(".")
        if kind in ("adam_m", "adam_v") and name in mine:
            slot.set_data(Tensor(cut(whole[slot.name], name)))
    optimizer.global_step.set_data(Tensor(np.zeros(1, np.int32) if blank else whole["global_step"]))
    return model, optimizer


def tensors_of(model: Parameters, optimizer: nn.Optimizer | None) -> dict[str, Parameter]:
    slots = [] if optimizer is None else optimizer.get_parameters()
    return {p.name: p for p in [*model.get_parameters(), *slots] if p.name != "learning_rate"}


def differences(
    whole: dict[str, np.ndarray], strategy: Strategy, rank: int, model: Parameters, optimizer: nn.Optimizer | None
) -> list[str]:
    """The names of tensors that aren't this rank's parts."""
    found, expected = tensors_of(model, optimizer), tensors_of(*rank_part(whole, strategy, rank))
    return [n for n, p in expected.items() if array_of(p).tobytes() != array_of(found[n]).tobytes()]
