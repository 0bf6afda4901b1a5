"""The rules of the house: who may import whom, how long a module is, what is documented, what never occurs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY / "src" / "reshard"
MODULES = sorted(SOURCE.rglob("*.py"))
BIN = Path(sys.executable).parent

# A module that is longer holds two ideas.
LONGEST_MODULE = 400

# What `import reshard` may not load: a process that only reads a checkpoint pays for numpy, not for these.
NOT_AT_IMPORT = ("torch", "mindspore", "transformers", "pydantic", "typer", "click", "rich", "yaml", "matplotlib")

# What runs code when it reads data; torch's collectives of objects among it.
UNPICKLING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNPICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "allow_pickle",
}


def _label(path: Path) -> str:
    return str(path.relative_to(SOURCE))


each_module = pytest.mark.parametrize("path", MODULES, ids=_label)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _run(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    _run(str(BIN / "ruff"), "check", "--no-cache", "--output-format=concise", ".")


def test_the_code_is_formatted() -> None:
    _run(str(BIN / "ruff"), "format", "--no-cache", "--check", ".")


@pytest.mark.timeout(600)  # it takes a minute of two cores, and they may be busy
def test_pyright_finds_nothing() -> None:
    _run(str(BIN / "pyright"), "--pythonpath", sys.executable)


def test_imports_only_go_down() -> None:
    _run(str(BIN / "lint-imports"), "--no-cache", "--no-logo")


def test_python_3_10_can_run_it() -> None:
    _run(str(BIN / "vermin"), "--target=3.10-", "--no-tips", "--eval-annotations", "--violations", str(SOURCE))


def test_importing_the_package_loads_no_framework_and_no_command(run_python) -> None:
    loaded = run_python("import sys, reshard; print(*sys.modules, sep='\\n')").stdout.split()
    assert "reshard" in loaded
    assert not sorted(set(NOT_AT_IMPORT) & set(loaded))


def test_the_command_starts_without_a_framework(run_python) -> None:
    code = "import sys, reshard.cli.app; print(*sys.modules, sep='\\n')"
    loaded = run_python(code).stdout.split()
    assert not sorted({"torch", "mindspore", "transformers", "matplotlib", "reshard.training"} & set(loaded))


@each_module
def test_a_module_has_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE, f"{_label(path)} has {lines} lines: two ideas that want separate rooms?"


def _imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _unpickling(tree: ast.Module) -> Iterator[str]:
    for name, line in _imported(tree):
        if name.split(".")[0] in UNPICKLING_MODULES or name in UNPICKLING_CALLS or name.split(".")[-1] in UNPICKLING_CALLS:
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted in UNPICKLING_CALLS or node.attr in UNPICKLING_CALLS:
                yield f"line {node.lineno}: {dotted}"
        elif isinstance(node, ast.keyword) and node.arg in UNPICKLING_CALLS:
            yield f"line {node.value.lineno}: {node.arg}"


@each_module
def test_nothing_is_unpickled(path: Path) -> None:
    assert list(_unpickling(_tree(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "import torch\ntorch.distributed.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_the_search_for_pickles_finds_them(code: str) -> None:
    assert list(_unpickling(ast.parse(code)))


def _public(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def _bound(tree: ast.Module) -> tuple[set[str], set[str]]:
    """What a module defines, and what it imports from this package."""
    defined, imported = set(), set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reshard"):
            imported |= {alias.asname or alias.name for alias in node.names}
    return defined, imported


def _declared(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return None


@each_module
def test_all_is_complete(path: Path) -> None:
    tree = _tree(path)
    declared = _declared(tree)
    defined, imported = _bound(tree)
    if path.name == "__init__.py" and (defined | imported) - {"annotations"}:
        assert declared is not None, f"{_label(path)} gives names and has no __all__"
    if declared is None:
        return
    assert declared == sorted(set(declared)), f"the __all__ of {_label(path)} is not sorted, or has a name twice"
    given = defined | imported if path.name == "__init__.py" else defined
    assert _public(set(declared)) == _public(given), f"the __all__ of {_label(path)} is not what it gives"


def test_the_package_gives_what_it_names() -> None:
    import reshard

    missing = [name for name in reshard.__all__ if not hasattr(reshard, name)]
    assert missing == []


@each_module
def test_private_names_stay_in_their_module(path: Path) -> None:
    found = [
        f"line {node.lineno}: {node.module}.{alias.name}"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reshard")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert found == []


def _functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (child for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in tree.body if isinstance(node, ast.ClassDef))


def _is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A signature only: the implementation has the docstring."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def _is_protocol(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) in ("Protocol", "typing.Protocol") for base in node.bases)


@cache
def _protocol_methods() -> frozenset[str]:
    """Methods that a protocol documents; what implements it need not say it again."""
    return frozenset(
        function.name
        for path in MODULES
        for node in _classes(_tree(path))
        if _is_protocol(node)
        for function in _functions(node)
        if ast.get_docstring(function)
    )


@each_module
def test_what_is_public_has_a_docstring(path: Path) -> None:
    tree = _tree(path)
    bare = [] if ast.get_docstring(tree) else ["the module"]
    bare += [f.name for f in _functions(tree) if not f.name.startswith("_") and not ast.get_docstring(f) and not _is_overload(f)]
    for node in _classes(tree):
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            bare.append(node.name)
        for function in _functions(node):
            documented = ast.get_docstring(function) or _is_overload(function)
            documented = documented or (function.name in _protocol_methods() and not _is_protocol(node))
            if not function.name.startswith("_") and not documented:
                bare.append(f"{node.name}.{function.name}")
    assert bare == []
