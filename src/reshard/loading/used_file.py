"""Open files: of a checkpoint of thousands only a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from reshard.loading.scattered import Amount
from reshard.storage import ReadableFile


class UsedFile:
    """A file that is closed when the last of the work with it is done.

    It is used once more until `let_go` says that there is no further work.

    Args:
        source: the file, open.
    """

    def __init__(self, source: ReadableFile) -> None:
        self._source = source
        self._users = 1
        self._turn = Lock()

    def during(self, work: Callable[[], Amount]) -> Callable[[], Amount]:
        """The same work, that uses the file until it is done.

        Work that fails goes on using it: whoever opened the file closes it with the error, and the file may say why.
        """
        with self._turn:
            self._users += 1

        def using() -> Amount:
            amount = work()
            self.let_go()
            return amount

        return using

    def let_go(self) -> None:
        """One use less. Raises ShortFileError as closing the file does, where it was the last."""
        with self._turn:
            self._users -= 1
            is_last = not self._users
        if is_last:
            self._source.close()
