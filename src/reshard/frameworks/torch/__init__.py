"""PyTorch: the adapter, its communicator, and the declaration of tied tensors."""

from reshard.frameworks.torch.adapter import TorchAdapter
from reshard.frameworks.torch.communicator import TorchCommunicator, connect
from reshard.frameworks.torch.modules import tie

__all__ = ["TorchAdapter", "TorchCommunicator", "connect", "tie"]
