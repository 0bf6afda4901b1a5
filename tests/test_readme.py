"""The documents keep their word: their code runs, their versions are those of the test environment, their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import faults

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
WITH_CODE = [REPOSITORY / "README.md", *(REPOSITORY / "docs" / f"{name}.md" for name in ("quickstart", "mindspore", "pytorch"))]

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def blocks(document: Path, language: str) -> list[str]:
    return [code for kind, code in _BLOCK.findall(document.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.timeout(900)  # whole programs, some of which import two frameworks
@pytest.mark.parametrize("document", WITH_CODE, ids=lambda path: path.name)
def test_the_code_of_the_documents_runs(
    document: Path,
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    run_reshard: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    python = blocks(document, "python")
    assert python
    # One program, as a reader would type it; twice, since the second run resumes from the first.
    for _ in range(2):
        run_python("\n".join(python), cwd=tmp_path, timeout=400)
    shown = [session for block in blocks(document, "console") for session in sessions(block)]
    assert shown
    for command, output in shown:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "reshard"
        done = run_reshard(*arguments, cwd=tmp_path, timeout=400)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip()
        if output:
            assert plain(done.stdout.splitlines()) == plain(output)


def sessions(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a block, each with the lines that the document shows as its output."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def plain(lines: list[str]) -> list[str]:
    """Lines without what differs from run to run: sizes and ages, where it lies, the width of columns."""
    text = "\n".join(re.sub(r"─+", "─", re.sub(r"\s+", " ", line).strip()) for line in lines)
    text = re.sub(r"/\S*/output/", "/output/", text)
    return re.sub(r"[\d.]+ (B|KiB|s|min)\b", r"0 \1", text).splitlines()


def test_the_versions_in_the_readme_are_those_of_the_test_environment() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for row, package in (("PyTorch", "torch"), ("transformers", "transformers"), ("MindSpore", "mindspore"), ("numpy", "numpy")):
        match = re.search(rf"^\| {row} \| ([\d.]+\d)", readme, re.MULTILINE)
        assert match is not None, f"the README doesn't say which {row} was tested"
        assert match[1] == pins[package]


def test_the_changelog_knows_the_version() -> None:
    from reshard.version import __version__

    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{__version__}]" in changelog


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in _LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{document.name} links to {target}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in (REPOSITORY / "docs").glob("*.md") if page.name != "index.md" and f"({page.name})" not in index]
    assert missing == []


def test_the_page_of_the_configuration_has_every_field(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "import runpy, sys; sys.stdout.write(runpy.run_path(sys.argv[1])['render']())"
    page = run_python(code, str(REPOSITORY / "docs" / "make_configuration.py")).stdout
    assert page == (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8"), "run: python docs/make_configuration.py"


def test_the_counts_of_faults_are_those_of_the_last_run() -> None:
    from docs import make_faults

    assert (REPOSITORY / "README.md").read_text(encoding="utf-8") == make_faults.render(), "run: python -m docs.make_faults"
    counted = json.loads(make_faults.COUNTS.read_text(encoding="utf-8"))["tests"]
    assert {test["kind"] for test in counted.values()} == set(faults.KINDS)
    for name in counted:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{name} isn't there any more"


def test_a_table_of_faults_has_what_was_counted(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    cases: dict[str, tuple[str, int, bool]] = {f"b[{n}]": (faults.KILL, 500, False) for n in range(2)}
    faults.keep(file, {"a": (faults.KILL, 3, False), "c": (faults.BIT, 7, True), **cases}, [], "2026-01-01")
    faults.keep(file, {"a": (faults.KILL, 4, False), "d": (faults.BIT, 5, False)}, [], "2026-01-02")
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in faults.table(file).splitlines()[2:]]
    assert rows == [[faults.KINDS[faults.KILL][0], "1,004"], [faults.KINDS[faults.BIT][0], "5"]]
    faults.keep(file, {}, ["b[1]"], "2026-01-03")
    with pytest.raises(ValueError, match="tests failed: b"):
        faults.table(file)


@each_document
def test_the_configurations_of_the_documents_are_valid(document: Path, tmp_path: Path) -> None:
    from reshard.config.validation import read_config

    for number, block in enumerate(blocks(document, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        assert read_config(file).run.callbacks
