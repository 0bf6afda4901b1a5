"""Where bytes lie: one small protocol, and the file system behind it."""

from reshard.storage.memory import MemoryStorage
from reshard.storage.posix import PosixStorage
from reshard.storage.storage import Entry, Lock, ReadableFile, Storage, WritableFile

__all__ = ["Entry", "Lock", "MemoryStorage", "PosixStorage", "ReadableFile", "Storage", "WritableFile"]
