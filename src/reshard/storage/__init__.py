"""Where bytes lie: one small protocol, and the file system behind it."""

from reshard.storage.storage import Entry, Lock, ReadableFile, Storage, WritableFile

__all__ = ["Entry", "Lock", "ReadableFile", "Storage", "WritableFile"]
