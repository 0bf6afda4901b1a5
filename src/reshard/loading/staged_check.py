"""Hold what a rank stages in a balanced load against the digests of row blocks."""

from __future__ import annotations

from reshard.format.safetensors import BlockCheck
from reshard.loading.exchange import PreparedExchange
from reshard.planning.exchange_schedule import Staged
from reshard.storage.storage import join


class StagedCheck:
    """What is staged comes tensor after tensor, and of each in the order of its file: one tensor's check is needed at a time.

    Args:
        prepared: this rank's part of the exchange.
        directory: the checkpoint.
    """

    def __init__(self, prepared: PreparedExchange, directory: str) -> None:
        self._prepared = prepared
        self._directory = directory
        self._which: tuple[int, int] | None = None
        self._check: BlockCheck | None = None

    def update(self, item: Staged, data: memoryview) -> int:
        """Look at a staged block, gaps included: they are bytes of the tensor, too.

        Returns:
            How many more bytes were held against digests.

        Raises:
            DataFileError: its bytes are not as they were saved.
        """
        which = (item.share, item.tensor)
        if which != self._which or self._check is None:
            path = join(self._directory, self._prepared.shares[item.share].site.file)
            self._which, self._check = which, BlockCheck(self._prepared.staged[item.share][item.tensor], path)
        before = self._check.verified
        self._check.update(item.block.offset, data)
        self._check.raise_if_wrong()
        return self._check.verified - before
