"""A storage that loses its power: what was not made durable may be lost, torn or reordered, as on a real disk.

Contents and names are kept twice: as processes see them, and as they are on the disk. `sync` of a file makes its contents durable, and
nothing else; `sync_directory` the names in a directory. What lies between, the disk may have written or not, each change by itself and in
any order; only a rename or an exchange is done or not done as a whole (every journal gives that). This is weaker than what file systems
do, and about what POSIX promises.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from reshard.storage.memory import DirectoryNode, FileNode, MemoryStorage, MemoryWritable, parts_of
from reshard.storage.storage import WritableFile

_Node = FileNode | DirectoryNode


@dataclass(frozen=True)
class _Change:
    """Names that change together: each directory and name with what it means from then on, None for nothing; and who changed them."""

    entries: tuple[tuple[DirectoryNode, str, _Node | None], ...]
    client: str


@dataclass(frozen=True)
class Moment:
    """What is on the disk, and what may be, at one moment.

    Attributes:
        operation: the one that was just done: its name and path.
        names: by identity of each directory, its durable names.
        pending: the changes of names that may be on the disk or not.
        contents: by identity of each file, its durable bytes and those that processes see.
        can_exchange: as in `MemoryStorage`.
    """

    operation: tuple[str, str]
    top: DirectoryNode
    names: Mapping[int, Mapping[str, _Node]]
    pending: tuple[_Change, ...]
    contents: Mapping[int, tuple[bytes, bytes]]
    can_exchange: bool

    def outcomes(self, limit: int, seed: int = 0) -> Iterator[MemoryStorage]:
        """What may be found after the power is back: different storages.

        Args:
            limit: the most of them. When there are more, they are those with nothing, with all, with all but one, and with only one
                of what is pending, and then others by chance.
            seed: of chance.
        """
        dirty = [identity for identity, (durable, seen) in self.contents.items() if durable != seen]
        choices: list[Sequence[int]] = [*[(0, 1)] * len(self.pending), *[(0, 1, 2)] * len(dirty)]
        seen: set[bytes] = set()
        for chosen in _chosen(choices, limit, seed):
            done, written = chosen[: len(self.pending)], dict(zip(dirty, chosen[len(self.pending) :], strict=True))
            storage = self._storage(done, written)
            found = repr(sorted(_listing(storage._root))).encode()
            if found not in seen:
                seen.add(found)
                yield storage

    def _storage(self, done: Sequence[int], written: Mapping[int, int]) -> MemoryStorage:
        names = {identity: dict(entries) for identity, entries in self.names.items()}
        for change, is_done in zip(self.pending, done, strict=True):
            if is_done:
                for directory, name, node in change.entries:
                    entries = names.setdefault(id(directory), {})
                    if node is None:
                        entries.pop(name, None)
                    else:
                        entries[name] = node

        def build(node: _Node) -> _Node:
            if isinstance(node, FileNode):
                durable, latest = self.contents[id(node)]
                # What was there, all that was written, or the first half of it.
                half = latest[: len(latest) // 2] + bytes(len(latest) - len(latest) // 2)
                return FileNode(bytearray((durable, latest, half)[written.get(id(node), 0)]))
            return DirectoryNode({name: build(child) for name, child in names.get(id(node), {}).items()})

        storage = MemoryStorage(can_exchange=self.can_exchange)
        built = build(self.top)
        assert isinstance(built, DirectoryNode)
        storage._root = built
        return storage


def _chosen(choices: list[Sequence[int]], limit: int, seed: int) -> Iterator[tuple[int, ...]]:
    count = 1
    for choice in choices:
        count *= len(choice)
    if count <= limit:
        yield from itertools.product(*choices)
        return
    nothing, everything = (0,) * len(choices), (1,) * len(choices)
    ones = [tuple(value if at == i else 0 for i in range(len(choices))) for at, choice in enumerate(choices) for value in choice[1:]]
    others = [
        tuple(value if at == i else 1 for i in range(len(choices))) for at, choice in enumerate(choices) for value in choice if value != 1
    ]
    first = [nothing, everything, *ones, *others]
    yield from first[:limit]
    chance = random.Random(seed)  # noqa: S311 - no secret
    for _ in range(limit - len(first)):
        yield tuple(chance.choice(choice) for choice in choices)


def _listing(node: _Node, path: str = "") -> Iterator[tuple[str, bytes | None]]:
    if isinstance(node, FileNode):
        yield path, bytes(node.data)
        return
    yield path, None
    for name, child in node.children.items():
        yield from _listing(child, f"{path}/{name}")


class PowerLossStorage(MemoryStorage):
    """Files in this process's memory, with what of them would outlive a loss of power.

    Args:
        start: another storage whose files are here, and durable, from the beginning; it isn't used any more.
        ignores: of every call that makes something durable, the place in the code from which it was made (`module:function:line`): whether
            it does nothing, as if it weren't there.
        watch: is given the moment after each operation.
        client: names the machine that uses the storage now. On a network file system a machine makes only those names durable that it has
            changed itself. By default there is one machine.

    Attributes:
        places: the places from which something was made durable, so far.
    """

    def __init__(
        self,
        start: MemoryStorage | None = None,
        *,
        ignores: Callable[[str], bool] | None = None,
        watch: Callable[[Moment], None] | None = None,
        client: Callable[[], str] = lambda: "",
    ) -> None:
        super().__init__(can_exchange=True if start is None else start.can_exchange)
        if start is not None:
            self._root = start._root
        self.places: dict[str, int] = {}
        self._ignores = ignores
        self._watch = watch
        self._client = client
        self._names: dict[int, dict[str, _Node]] = {}
        self._contents: dict[int, bytes] = {}
        self._pending: list[_Change] = []
        self._alive: list[_Node] = []  # identities are of nodes that live
        self._keep(self._root)

    def moment(self, operation: tuple[str, str]) -> Moment:
        """What is on the disk now, and what may be.

        Args:
            operation: what was just done.
        """
        files = [node for node in self._alive if isinstance(node, FileNode)]
        contents = {id(file): (self._contents.get(id(file), b""), bytes(file.data)) for file in files}
        names = {identity: dict(entries) for identity, entries in self._names.items()}
        return Moment(operation, self._root, names, tuple(self._pending), contents, self.can_exchange)

    def create(self, path: str, size: int) -> WritableFile:
        with self._guard:
            super().create(path, size)
            parent, name = self._parent(path, "")
            file = parent.children[name]
            assert isinstance(file, FileNode)
            self._alive.append(file)
            self._change("create", path, (parent, name, file))
            return _Watched(self, path, file)

    def make_directory(self, path: str) -> None:
        with self._guard:
            node: _Node | None = self._root
            for part in parts_of(path):
                if not isinstance(node, DirectoryNode):
                    break
                child = node.children.get(part)
                if child is None:
                    child = node.children[part] = DirectoryNode()
                    self._alive.append(child)
                    self._names[id(child)] = {}
                    self._change("make_directory", path, (node, part, child))
                node = child
            super().make_directory(path)  # it is there, or a file is in the way

    def sync_directory(self, path: str) -> None:
        with self._guard:
            super().sync_directory(path)
            if self._is_ignored(_place(sys._getframe(1))):
                return
            directory = self._find(path)
            client = self._client()
            for change in list(self._pending):
                if change.client == client and any(entry[0] is directory for entry in change.entries):
                    self._settle(change)
            self._done("sync_directory", path)

    def exchange(self, first: str, second: str) -> bool:
        with self._guard:
            if not super().exchange(first, second):
                return False
            (one_parent, one), (two_parent, two) = self._parent(first, ""), self._parent(second, "")
            self._change("exchange", first, (one_parent, one, one_parent.children[one]), (two_parent, two, two_parent.children[two]))
            return True

    def remove(self, path: str) -> None:
        with self._guard:
            parent, name = self._parent(path, "can't remove the file")
            super().remove(path)
            self._change("remove", path, (parent, name, None))

    def remove_tree(self, path: str) -> None:
        with self._guard:
            node = self._find(path)
            if isinstance(node, DirectoryNode):
                for name in list(node.children):
                    child = f"{path}/{name}"
                    if isinstance(node.children[name], DirectoryNode):
                        self.remove_tree(child)
                    else:
                        self.remove(child)
            parent, name = self._parent(path, "can't remove the directory")
            super().remove_tree(path)
            if node is not None:
                self._change("remove_tree", path, (parent, name, None))

    def _move(self, source: str, target: str, what: str, *, replace: bool) -> None:
        super()._move(source, target, what, replace=replace)
        (old_parent, old_name), (new_parent, new_name) = self._parent(source, what), self._parent(target, what)
        node = new_parent.children[new_name]
        self._change("replace" if replace else "rename", source, (old_parent, old_name, None), (new_parent, new_name, node))

    def _keep(self, node: _Node) -> None:
        """All that is here is durable."""
        self._alive.append(node)
        if isinstance(node, FileNode):
            self._contents[id(node)] = bytes(node.data)
            return
        self._names[id(node)] = dict(node.children)
        for child in node.children.values():
            self._keep(child)

    def _change(self, operation: str, path: str, *entries: tuple[DirectoryNode, str, _Node | None]) -> None:
        self._pending.append(_Change(entries, self._client()))
        self._done(operation, path)

    def _settle(self, change: _Change) -> None:
        self._pending = [other for other in self._pending if other is not change]
        for directory, name, node in change.entries:
            entries = self._names.setdefault(id(directory), {})
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node

    def _is_ignored(self, place: str) -> bool:
        self.places[place] = self.places.get(place, 0) + 1
        return self._ignores is not None and self._ignores(place)

    def _done(self, operation: str, path: str) -> None:
        if self._watch is not None:
            self._watch(self.moment((operation, path)))


class _Watched(MemoryWritable):
    """A file whose contents are durable when they have been synced."""

    def __init__(self, storage: PowerLossStorage, path: str, file: FileNode) -> None:
        super().__init__(storage, path, file)
        self._watched = storage

    def write_at(self, offset: int, data: memoryview) -> None:
        super().write_at(offset, data)
        with self._watched._guard:
            self._watched._done("write_at", self.path)

    def sync(self) -> None:
        with self._watched._guard:
            if not self._watched._is_ignored(_place(sys._getframe(1))):
                self._watched._contents[id(self._file)] = bytes(self._file.data)
                self._watched._done("sync", self.path)

    def __enter__(self) -> _Watched:
        return self


def _place(frame: FrameType | None) -> str:
    """The place in the code that made a call, past what passes it on."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("reshard.storage", "reshard.testing")):
            return f"{module}:{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
