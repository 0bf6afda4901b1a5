"""How ranks talk: bytes among all, and bytes from one to one."""

from reshard.comm.communicator import Board, Communicator
from reshard.comm.single import SingleProcess

__all__ = ["Board", "Communicator", "SingleProcess"]
