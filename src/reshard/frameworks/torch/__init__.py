"""PyTorch: the adapter, its communicator, and the declaration of tied tensors.

What is saved of a model: every parameter (frozen ones too) and persistent buffer, once, under its global name.

* Names are torch's own without the parts of wrappers (`torch.compile`, DistributedDataParallel, activation checkpointing). The modules of a
  list are pipeline stages with global names; those of a dictionary have their key and a dot in front.
* A tied tensor is stored under its first name, or under the one that `tie` or the configuration of a transformers model declares.
* A DTensor lies as its placements say; a plain tensor of a model with DTensors is replicated over the largest of their meshes, one of a
  model without DTensors is held whole by whoever has it.
* A module's extra state (`get_extra_state`) is kept when it is a tensor; anything else belongs into `extra=`.

What is saved of an optimizer: every tensor and number in its state, by slot and parameter name, and its groups' options by parameter name.
A run's group takes the options of its parameters; how a step is computed (`foreach`, `fused`, `capturable`, `differentiable`) and whether a
learning rate is a tensor stay as the run has them.
"""

from reshard.frameworks.torch.adapter import TorchAdapter
from reshard.frameworks.torch.communicator import TorchCommunicator, connect
from reshard.frameworks.torch.modules import tie

__all__ = ["TorchAdapter", "TorchCommunicator", "connect", "tie"]
