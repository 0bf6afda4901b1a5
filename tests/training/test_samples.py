"""One global sequence of samples, whatever the number of ranks."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import ConfigError
from reshard.training.corpus import Corpus, open_corpus
from reshard.training.samples import Permutation, SampleStream


@given(st.integers(1, 2000), st.integers(0, 2**63 - 1))
def test_a_permutation_has_every_index_once(size: int, key: int) -> None:
    order = Permutation(size, key)
    assert sorted(order[index] for index in range(size)) == list(range(size))


def test_a_permutation_never_changes() -> None:
    # A resumed run must see the same order with any later version of anything: these numbers are part of the checkpoint's meaning.
    assert [Permutation(1000, 7)[index] for index in range(6)] == [190, 248, 27, 282, 962, 380]
    assert Permutation(10**12, 7)[10**11] == 338_880_287_162


def test_a_permutation_is_no_pattern() -> None:
    order = np.array([Permutation(4096, 3)[index] for index in range(4096)])
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert list(order) != [Permutation(4096, 4)[index] for index in range(4096)]


@pytest.mark.parametrize("index", [-1, 5])
def test_a_permutation_ends(index: int) -> None:
    with pytest.raises(IndexError):
        Permutation(5, 1)[index]


def text(folder: Path, **files: bytes) -> Corpus:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return open_corpus(str(folder))


def test_files_lie_one_after_the_other_by_name(tmp_path: Path) -> None:
    corpus = text(tmp_path, b=b"second", a=b"first", c__d=b"third", empty=b"")
    assert corpus.names == ("a", "b", "c/d")
    assert corpus.size == 16
    whole = b"firstsecondthird"
    for offset in range(16):
        for count in range(1, 17 - offset):
            assert corpus.read(offset, count).tobytes() == whole[offset : offset + count]


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"0123456789")
    corpus = open_corpus(str(tmp_path / "one.txt"))
    assert (corpus.names, corpus.read(3, 4).tobytes()) == (("one.txt",), b"3456")


def test_hidden_files_are_no_text(tmp_path: Path) -> None:
    assert text(tmp_path, a=b"x", **{".hidden": b"y", ".git__config": b"z"}).names == ("a",)


def test_the_standard_library_is_text() -> None:
    corpus = open_corpus("")
    assert corpus.size > 2_000_000
    assert "os.py" in corpus.names
    assert not any("site-packages" in name or "dist-packages" in name for name in corpus.names)
    source = Path(sysconfig.get_path("stdlib"), "os.py").read_bytes()
    index = corpus.names.index("os.py")
    assert corpus.read(sum(corpus.sizes[:index]), len(source)).tobytes() == source
    assert open_corpus("").fingerprint == corpus.fingerprint


def test_no_text_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError) as caught:
            open_corpus(str(path))
        assert caught.value.field == "train_dataset.path"
        assert caught.value.file == str(path)


def test_text_shorter_than_a_sample(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        SampleStream(text(tmp_path, a=b"12345"), 5, seed=1)
    assert caught.value.field == "train_dataset.seq_length"


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    corpus = text(tmp_path, a=b"0123456789")
    (tmp_path / "a").write_bytes(b"01")
    with pytest.raises(ConfigError, match="became shorter"):
        corpus.read(0, 10)


def stream(folder: Path, seed: int = 5, length: int = 4) -> SampleStream:
    return SampleStream(text(folder, a=bytes(range(200)), b=bytes(range(255, 155, -1))), length, seed)


@given(parts=st.sampled_from([1, 2, 3, 4, 6, 12]), batches=st.integers(1, 8))
def test_parts_make_up_the_same_batches(tmp_path_factory: pytest.TempPathFactory, parts: int, batches: int) -> None:
    folder = tmp_path_factory.mktemp("text")
    whole = stream(folder)
    ranks = [stream(folder) for _ in range(parts)]
    for _ in range(batches):
        expected = whole.next_batch(12, 0, 1)
        found = np.concatenate([rank.next_batch(12, part, parts) for part, rank in enumerate(ranks)])
        assert np.array_equal(found, expected)
        assert expected.shape == (12, 5)
        assert {rank.consumed_samples for rank in ranks} == {whole.consumed_samples}


def test_an_epoch_has_every_window_once_and_the_next_another_order(tmp_path: Path) -> None:
    samples = stream(tmp_path)
    assert samples.windows == 60
    first, second = ([tuple(samples.sample(60 * epoch + index)) for index in range(60)] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 60
    assert first != second
    samples.consumed_samples = 125
    assert samples.epoch == 2


def test_the_position_is_all_that_a_resume_needs(tmp_path: Path) -> None:
    straight, resumed = stream(tmp_path), stream(tmp_path)
    for _ in range(3):
        straight.next_batch(8, 0, 1)
    resumed.load_state_dict(straight.state_dict())
    assert resumed.notes == []
    # The batch crosses the end of an epoch.
    assert np.array_equal(straight.next_batch(48, 0, 1), resumed.next_batch(48, 0, 1))


def test_what_differs_on_resume_is_said(tmp_path: Path) -> None:
    saved = stream(tmp_path / "one", seed=5)
    saved.next_batch(8, 0, 1)
    state = saved.state_dict()

    other_seed = stream(tmp_path / "one", seed=6)
    other_seed.load_state_dict(state)
    assert len(other_seed.notes) == 1
    assert "seed" in other_seed.notes[0]
    assert np.array_equal(other_seed.next_batch(8, 0, 1), saved.next_batch(8, 0, 1))

    other_length = stream(tmp_path / "one", length=9)
    other_length.load_state_dict(state)
    assert "4 tokens and now have 9" in other_length.notes[0]

    other_text = SampleStream(text(tmp_path / "two", a=bytes(250)), 4, seed=5)
    other_text.load_state_dict(state)
    assert "not those of the checkpoint" in other_text.notes[0]
