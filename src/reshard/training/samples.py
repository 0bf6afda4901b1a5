"""The order in which a run sees its samples: one global sequence, the same for every strategy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from reshard.errors import ConfigError
from reshard.training.corpus import Corpus
from reshard.training.seeds import derived_seed

# Rounds of the Feistel network; four make a permutation that looks random.
_ROUNDS = 4


class Permutation:
    """A random order of `range(size)` without a table: the same for the same key on any machine and in any version of any library.

    A Feistel network permutes the next even power of two; what falls outside of the range is permuted again until it is inside.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._key = key.to_bytes(8, "big")

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        while True:
            left, right = index >> self._half, index & self._mask
            for number in range(_ROUNDS):
                left, right = right, left ^ self._scramble(number, right)
            index = (left << self._half) | right
            if index < self.size:
                return index

    def _scramble(self, number: int, value: int) -> int:
        text = number.to_bytes(1, "big") + value.to_bytes(8, "big")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self._key).digest(), "big") & self._mask


class SampleStream:
    """Samples of a corpus: windows of `seq_length + 1` bytes, every window once per epoch, in an order that only the seed decides.

    `consumed_samples` is the position in the one global sequence. A data-parallel rank takes its part of every global batch, so that the
    same batches follow each other whatever the number of ranks.

    Args:
        corpus: the text.
        seq_length: tokens of a sample.
        seed: the run's.

    Raises:
        ConfigError: the text is shorter than one sample.
    """

    def __init__(self, corpus: Corpus, seq_length: int, seed: int) -> None:
        self.corpus = corpus
        self.seq_length = seq_length
        self.seed = seed
        self.windows = corpus.size // (seq_length + 1)
        self.consumed_samples = 0
        self.notes: list[str] = []
        self._permutation: tuple[int, Permutation] | None = None
        if self.windows == 0:
            raise ConfigError(
                "the text is shorter than one sample",
                field="train_dataset.seq_length",
                found=f"{corpus.size} bytes in {corpus.name}",
                expected=f"at least {seq_length + 1}",
            )

    @property
    def epoch(self) -> int:
        """How often every window has been seen."""
        return self.consumed_samples // self.windows

    def sample(self, index: int) -> np.ndarray:
        """The sample at an index of the global sequence: uint8 of shape (seq_length + 1,)."""
        epoch, index = divmod(index, self.windows)
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self.windows, derived_seed(self.seed, "order", epoch)))
        length = self.seq_length + 1
        return self.corpus.read(self._permutation[1][index] * length, length)

    def next_batch(self, total: int, part: int, parts: int) -> np.ndarray:
        """A part of the next global batch: token ids, int64 of shape (total / parts, seq_length + 1). The position moves on by the whole.

        Args:
            total: samples of the global batch.
            part: which part.
            parts: how many there are.
        """
        share = total // parts
        first = self.consumed_samples + part * share
        rows = np.stack([self.sample(first + row) for row in range(share)])
        self.consumed_samples += total
        return rows.astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in. The same on every rank."""
        return {
            "consumed_samples": self.consumed_samples,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "corpus": self.corpus.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position. What else differs is noted in `notes`; the order goes on with the seed that it began with."""
        self.consumed_samples = int(state["consumed_samples"])
        if state.get("corpus") != self.corpus.fingerprint:
            self.notes.append("the training data are not those of the checkpoint: the order of samples is another one from here on")
        elif state.get("seq_length") != self.seq_length:
            self.notes.append(
                f"samples had {state.get('seq_length')} tokens and now have {self.seq_length}: their order is another one from here on"
            )
        if state.get("seed", self.seed) != self.seed:
            self.notes.append(f"the order of samples goes on with the seed that it began with, {state['seed']}, not {self.seed}")
            self.seed = int(state["seed"])
        self._permutation = None
