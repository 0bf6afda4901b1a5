"""YAML as people write it: numbers, lines, overrides, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from reshard.config.document import apply_overrides, dotted, read_document
from reshard.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1.e-8", 1e-8),
        (".5e1", 5.0),
        ("-2e+2", -200.0),
        ("10", 10),
        ("e5", "e5"),
        ("'1e-3'", "1e-3"),
        ("False", False),
        ("null", None),
    ],
)
def test_numbers_are_what_they_look_like(tmp_path: Path, text: str, value: object) -> None:
    found = read_document(written(tmp_path, f"x: {text}")).data["x"]
    assert found == value
    assert type(found) is type(value)


def test_every_field_knows_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\nmodel:\n  hidden_size: 8\ncallbacks:\n  - type: A\n    prefix: b\n")
    document = read_document(path)
    assert document.where(("model", "hidden_size")) == f"{path}:3"
    assert document.where(("callbacks", 0, "prefix")) == f"{path}:6"
    assert document.where(("model", "not_there")) == f"{path}:2"
    assert document.where(("nothing",)) == str(path)


def test_an_anchor_is_no_second_field(tmp_path: Path) -> None:
    text = "a: &base\n  x: 1\n  y: 2\nb:\n  <<: *base\n  y: 3\nc: *base\n"
    assert read_document(written(tmp_path, text)).data == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "given twice", 3),
        ("m:\n  a: 1\n  a: 2\n", "given twice", 3),
        ("a: [1, 2\nb: 3\n", "not YAML", 2),
        ("- 1\n- 2\n", "not a mapping", 1),
        ("a: b: c\n", "not YAML", 1),
        ("? [1]\n: 2\n", "name of a field is text", 1),
        ("a: &a\n  b: *a\n", "nested too deeply", 1),
        ("a: !!python/object/apply:os.system ['true']\n", "not YAML", 1),
    ],
)
def test_what_is_no_configuration_is_said_with_its_line(tmp_path: Path, text: str, what: str, line: int) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=what) as caught:
        read_document(path)
    assert caught.value.file == f"{path}:{line}"


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_document(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_document(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "--- {}\n---\n"])
def test_an_empty_file_is_no_run_of_defaults(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        read_document(written(tmp_path, text))
    assert read_document(written(tmp_path, "{}")).data == {}


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    document = read_document(written(tmp_path, "seed: 1\nmodel:\n  hidden_size: 8\ncallbacks:\n  - prefix: a\n"))
    changed = apply_overrides(document, ["seed=2", "model.head_dim=4", "callbacks.0.prefix=b", "runner_config.max_steps=1e2", "x="])
    assert changed.data == {
        "seed": 2,
        "model": {"hidden_size": 8, "head_dim": 4},
        "callbacks": [{"prefix": "b"}],
        "runner_config": {"max_steps": 100.0},
        "x": None,
    }
    assert document.data["seed"] == 1
    assert changed.where(("callbacks", 0, "prefix")) == "--set callbacks.0.prefix"
    assert changed.where(("model", "hidden_size")).endswith(":3")


@pytest.mark.parametrize("override", ["seed", "=1", "seed.x=1", "callbacks.3.prefix=a", "seed=[1", "callbacks.first=1"])
def test_an_override_that_leads_nowhere(tmp_path: Path, override: str) -> None:
    document = read_document(written(tmp_path, "seed: 1\ncallbacks: []\n"))
    with pytest.raises(ConfigError):
        apply_overrides(document, [override])


def test_dotted() -> None:
    assert dotted(("callbacks", 0, "prefix")) == "callbacks[0].prefix"
