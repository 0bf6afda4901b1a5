"""From a path to one checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from reshard.errors import CheckpointNotFoundError, MetadataError, StorageError, TrackerError
from reshard.format.names import TRACKER_FILE, iteration_name
from reshard.sources.native import open_catalog
from reshard.sources.resolve import is_committed, latest, list_iterations, resolve
from reshard.storage import Entry, PosixStorage
from tests.golden import CASES, iteration
from tests.golden import root as golden_root

STORAGE = PosixStorage()


@pytest.fixture
def root(tmp_path) -> Path:
    """A root with iterations 1, 2 and 10 and a tracker that names 10."""
    for step in (1, 2, 10):
        shutil.copytree(iteration("dp2_tp2_noopt"), tmp_path / iteration_name(step))
    (tmp_path / TRACKER_FILE).write_text("10")
    return tmp_path


def found(path):
    resolved = resolve(STORAGE, str(path))
    return resolved.iteration, Path(resolved.directory).name, resolved.notes


@pytest.mark.parametrize("case", CASES)
def test_golden_roots(case):
    resolved = resolve(STORAGE, str(golden_root(case)))
    assert (resolved.directory, resolved.iteration, resolved.root) == (str(iteration(case)), 1, str(golden_root(case)))
    assert resolved.notes == ()
    assert resolve(STORAGE, str(iteration(case))) == resolved
    assert latest(STORAGE, str(golden_root(case))) == resolved
    assert list_iterations(STORAGE, str(golden_root(case))) == [(1, str(iteration(case)))]


def test_the_tracker_is_obeyed(root):
    assert found(root) == (10, "iteration_00000010", ())
    (root / TRACKER_FILE).write_text("2\n")
    step, name, notes = found(root)
    assert (step, name) == (2, "iteration_00000002")
    assert any("10" in note and "newer" in note for note in notes)


@pytest.mark.parametrize("suffix", ["", "/", "/.", "/iteration_00000001/.."])
def test_a_path_in_any_spelling(root, suffix):
    assert found(f"{root}{suffix}")[0] == 10


def test_an_iteration_itself(root):
    resolved = resolve(STORAGE, f"{root / 'iteration_00000002'}/")
    assert (resolved.iteration, resolved.root, resolved.notes) == (2, str(root), ())


def test_a_checkpoint_under_another_name(root):
    (root / "iteration_00000002").rename(root / "best")
    resolved = resolve(STORAGE, str(root / "best"))
    assert (resolved.directory, resolved.iteration, resolved.root) == (str(root / "best"), None, None)


def test_a_link_to_an_iteration(root):
    (root / "best").symlink_to(root / "iteration_00000002")
    assert resolve(STORAGE, str(root / "best")).directory == str(root / "best")


def test_without_a_tracker_the_newest_and_a_note(root):
    (root / TRACKER_FILE).unlink()
    step, _, notes = found(root)
    assert step == 10
    assert any("no tracker" in note for note in notes)


def test_without_a_tracker_what_is_not_whole_does_not_count(root):
    (root / TRACKER_FILE).unlink()
    (root / "iteration_00000010" / "metadata.json").unlink()
    (root / "iteration_00000011").mkdir()
    shutil.copytree(root / "iteration_00000001", root / ".tmp-iteration_00000099")
    (root / "iteration_00000098").write_text("a file")
    assert found(root)[0] == 2
    assert [step for step, _ in list_iterations(STORAGE, str(root))] == [1, 2]


@pytest.mark.parametrize("content", ["", " \n", "ten", "-1", "1.5", "iteration_00000010"])
def test_a_tracker_that_is_no_number(root, content):
    (root / TRACKER_FILE).write_text(content)
    for ask in (resolve, latest):
        with pytest.raises(TrackerError) as caught:
            ask(STORAGE, str(root))
        assert caught.value.file == str(root / TRACKER_FILE)


def test_a_tracker_that_names_a_missing_iteration(root):
    (root / TRACKER_FILE).write_text("3")
    for ask in (resolve, latest):
        with pytest.raises(TrackerError, match="isn't there") as caught:
            ask(STORAGE, str(root))
        assert "iteration_00000003" in str(caught.value.found)
        assert "1, 2, 10" in str(caught.value.expected)
        assert "write 10" in str(caught.value.fix)


def test_a_tracker_in_an_empty_root(tmp_path):
    (tmp_path / TRACKER_FILE).write_text("3")
    with pytest.raises(TrackerError, match="there is none"):
        resolve(STORAGE, str(tmp_path))


def test_a_tracker_that_names_an_incomplete_iteration(root):
    """As the published implementation leaves it when its background writer fails."""
    incomplete = root / "iteration_00000010"
    for path in incomplete.iterdir():
        if path.name != "common.json":
            path.unlink()
    directory = resolve(STORAGE, str(root)).directory
    assert directory == str(incomplete)
    with pytest.raises(MetadataError, match="neither") as caught:
        open_catalog(STORAGE, directory)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["nothing", "iteration_00000077"])
def test_no_such_path(root, name):
    with pytest.raises(CheckpointNotFoundError, match=name):
        resolve(STORAGE, str(root / name))
    assert latest(STORAGE, str(root / name)) is None


def test_a_directory_without_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "logs").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"logs, notes\.txt"):
        resolve(STORAGE, str(tmp_path))
    assert latest(STORAGE, str(tmp_path)) is None
    assert list_iterations(STORAGE, str(tmp_path)) == []
    assert list_iterations(STORAGE, str(tmp_path / "none")) == []


def test_a_root_in_the_directory_is_pointed_at(tmp_path, root):
    above = tmp_path / "above"
    above.mkdir()
    root.joinpath("iteration_00000001").rename(above / "iteration_00000001")
    shutil.copytree(golden_root("dp2_tp2_noopt"), above / "deep" / "checkpoint")
    with pytest.raises(CheckpointNotFoundError, match=r"did you mean .*/deep/checkpoint\?"):
        resolve(STORAGE, str(above / "deep"))


def test_a_file_is_no_checkpoint(root):
    for ask in (resolve, latest):
        with pytest.raises(CheckpointNotFoundError, match="is a file"):
            ask(STORAGE, str(root / TRACKER_FILE))


class TestReplaced:
    """A save that was to replace an iteration died after it had moved the old one aside."""

    @pytest.fixture(autouse=True)
    def aside(self, root):
        (root / "iteration_00000010").rename(root / ".replaced-iteration_00000010")

    def test_it_counts_as_the_iteration(self, root):
        step, name, notes = found(root)
        assert (step, name) == (10, ".replaced-iteration_00000010")
        assert any("interrupted" in note for note in notes)
        assert list_iterations(STORAGE, str(root))[-1] == (10, str(root / ".replaced-iteration_00000010"))

    def test_by_its_own_path(self, root):
        assert found(root / "iteration_00000010")[:2] == (10, ".replaced-iteration_00000010")

    def test_without_a_tracker(self, root):
        (root / TRACKER_FILE).unlink()
        assert found(root)[:2] == (10, ".replaced-iteration_00000010")

    def test_the_real_one_wins(self, root):
        shutil.copytree(root / "iteration_00000002", root / "iteration_00000010")
        assert found(root) == (10, "iteration_00000010", ())
        assert [step for step, _ in list_iterations(STORAGE, str(root))] == [1, 2, 10]


def test_what_is_committed(root, tmp_path):
    assert is_committed(STORAGE, str(root / "iteration_00000001"))
    assert is_committed(STORAGE, str(iteration("single_real_train")))
    (root / "iteration_00000001" / "metadata.json").unlink()
    assert not is_committed(STORAGE, str(root / "iteration_00000001")), "files of several ranks say nothing without metadata"
    single = shutil.copytree(iteration("single_real_train"), tmp_path / "single")
    (single / "common.json").unlink()
    assert not is_committed(STORAGE, str(single))


class Retiring(PosixStorage):
    """A storage on which another run removes an iteration right after the root was listed."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = str(root)
        self._name = name

    def list(self, path: str) -> Sequence[Entry]:
        entries = super().list(path)
        if path == self._root:
            shutil.rmtree(f"{path}/{self._name}")
        return entries


def test_an_iteration_that_is_removed_meanwhile_is_nobodys_error(root):
    assert [step for step, _ in list_iterations(Retiring(root, "iteration_00000001"), str(root))] == [2, 10]


class Committing(PosixStorage):
    """A storage on which another run commits an iteration right after the root was listed for the first time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._is_done = False

    def list(self, path: str) -> Sequence[Entry]:
        entries = super().list(path)
        if path == str(self._root) and not self._is_done:
            self._is_done = True
            shutil.copytree(self._root / "iteration_00000010", self._root / "iteration_00000011")
            (self._root / TRACKER_FILE).write_text("11")
        return entries


def test_an_iteration_that_is_committed_meanwhile_is_nobodys_error(root):
    assert resolve(Committing(root), str(root)).iteration == 11


class Private(PosixStorage):
    """A storage on which a directory belongs to somebody else, whoever runs the test."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def _check(self, path: str) -> None:
        if path.startswith(f"{self._path}/"):
            raise StorageError("can't look at the path", file=path, found="Permission denied")

    def stat(self, path: str) -> Entry | None:
        self._check(path)
        return super().stat(path)

    def list(self, path: str) -> Sequence[Entry]:
        self._check(f"{path}/")
        return super().list(path)


@pytest.mark.parametrize("step", [1, 11])
def test_an_iteration_that_can_not_be_looked_at_does_not_block_the_tracked_one(root, step):
    other = root / iteration_name(step)
    other.mkdir(exist_ok=True)
    storage = Private(other)
    for ask in (resolve, latest):
        resolved = ask(storage, str(root))
        assert resolved is not None
        assert resolved.iteration == 10
        assert any(iteration_name(step) in note and "Permission denied" in note for note in resolved.notes)
    assert [number for number, _ in list_iterations(storage, str(root))] == [number for number in (1, 2, 10) if number != step]


def test_of_the_tracked_one_itself_opening_says_what_is_wrong(root):
    storage = Private(root / "iteration_00000010")
    with pytest.raises(StorageError, match="Permission denied"):
        open_catalog(storage, resolve(storage, str(root)).directory)


def test_without_a_tracker_one_that_may_be_the_newest_is_not_passed_over(root):
    (root / TRACKER_FILE).unlink()
    for ask in (resolve, latest):
        resolved = ask(Private(root / "iteration_00000002"), str(root))
        assert resolved is not None
        assert resolved.iteration == 10
        with pytest.raises(StorageError, match="Permission denied"):
            ask(Private(root / "iteration_00000010"), str(root))
    for step in (1, 2):
        shutil.rmtree(root / iteration_name(step))
    with pytest.raises(StorageError, match="Permission denied"):
        latest(Private(root / "iteration_00000010"), str(root))


def test_a_link_that_leads_to_itself_blocks_nothing(root):
    (root / "iteration_00000011").symlink_to("iteration_00000011")
    assert found(root)[0] == 10
    (root / TRACKER_FILE).unlink()
    assert found(root)[0] == 10


def test_a_hint_does_not_fail(tmp_path):
    (tmp_path / "private").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
        resolve(Private(tmp_path / "private"), str(tmp_path))
