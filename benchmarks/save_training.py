"""What the ranks of the saving benchmark do for training: steps with a checkpoint after each, or without any."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.save_cases import COPY, DCP_ASYNC, DEFERRED
from benchmarks.save_ranks import SaveSample

# A sample is so many steps: enough that a save goes on beside the next ones.
STEPS = 5

# What a rank sees in a step.
BATCH, LENGTH = 2, 128

_VOCABULARY, _LAYERS, _HEADS = 1024, 4, 4


def tokens(ranks: int) -> int:
    """What all ranks see in a sample."""
    return STEPS * BATCH * LENGTH * ranks


def width_of(scale: float) -> int:
    """The model's width, for a part of its full size."""
    return max(_HEADS, 256 * round(scale**0.5 * 64) // 64 // _HEADS * _HEADS)


def train(directory: Path, contenders: Sequence[str], width: int) -> list[SaveSample]:
    """Train as often as there are contenders in the list, in that order, `STEPS` steps each, saving after every step.

    A sample ends when its last checkpoint is there. That is then loaded over a spoiled run, and compared, not timed.

    Args:
        directory: where checkpoints lie.
        contenders: who saves, or that nobody does.
        width: of the model.

    Raises:
        ValueError: a checkpoint isn't what was trained.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import reshard

    rank = dist.get_rank()
    model, optimizer = _build(width)
    # Its thread talks beside training: in the same group their messages would meet.
    group = dist.new_group(backend="gloo")
    generator = torch.Generator().manual_seed(rank)
    samples = []
    step = 0
    with ExitStack() as stack:
        managers = {
            mode: stack.enter_context(reshard.CheckpointManager(directory / mode, keep_checkpoint_max=None, async_save=mode))
            for mode in (COPY, DEFERRED)
        }
        for contender in contenders:
            manager = managers.get(contender)
            under_way: Any = None
            written: list[Path] = []
            gc.collect()
            dist.barrier()
            used, begin = time.process_time(), time.perf_counter()
            for _ in range(STEPS):
                step += 1
                batch = torch.randint(_VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
                scores = model(batch[:, :-1])
                torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
                if manager is not None:
                    manager.save(step, model=model, optimizer=optimizer)
                    written.append(directory / contender / f"iteration_{step:08d}")
                elif contender == DCP_ASYNC:
                    if under_way is not None:
                        under_way.result()  # one at a time, as ours
                    written.append(directory / f"{contender}-{step}")
                    under_way = dcp.async_save(_state(model, optimizer), checkpoint_id=written[-1], process_group=group)
            if manager is not None:
                manager.wait()
            elif under_way is not None:
                under_way.result()
            samples.append(SaveSample(contender, begin, time.perf_counter(), 0.0, time.process_time() - used))
            dist.barrier()
            if written:
                _compare(contender, manager, model, optimizer, written[-1])
            dist.barrier()
            if rank == 0:
                for path in written:
                    shutil.rmtree(path)
            dist.barrier()
    return samples


def _build(width: int) -> tuple[Any, Any]:
    """A decoder over all ranks by FSDP2, and an AdamW that has stepped."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(_VOCABULARY, width)
            layers = [nn.TransformerEncoderLayer(width, _HEADS, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(_LAYERS)]
            self.layers = nn.ModuleList(layers)
            self.head = nn.Linear(width, _VOCABULARY, bias=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(numbers)
            for layer in self.layers:
                hidden = layer(hidden, src_mask=self.mask, is_causal=True)
            return self.head(hidden)

    torch.manual_seed(0)
    model = Decoder()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _memory(model: Any, optimizer: Any) -> list[Any]:
    """This rank's part of every weight and moment."""
    found = [parameter.detach() for parameter in model.parameters()]
    found += [values[slot] for values in optimizer.state.values() for slot in ("exp_avg", "exp_avg_sq")]
    return [tensor.to_local() for tensor in found]


def _compare(contender: str, manager: Any, model: Any, optimizer: Any, path: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    memory = _memory(model, optimizer)
    expected = [local.clone() for local in memory]
    for local in memory:
        local.fill_(torch.nan)
    if manager is not None:
        manager.load(model=model, optimizer=optimizer)
    else:
        dcp.load(_state(model, optimizer), checkpoint_id=path)
    if not all(map(torch.equal, _memory(model, optimizer), expected)):
        raise ValueError(f"{contender}: {path} is not what was trained")
