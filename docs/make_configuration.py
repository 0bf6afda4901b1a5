"""Writes the table of `docs/configuration.md` from the fields themselves: `python docs/make_configuration.py`."""

from __future__ import annotations

from pathlib import Path

from reshard.config.fields import describe_fields

PAGE = Path(__file__).resolve().parent / "configuration.md"
MARK = "<!-- made by docs/make_configuration.py from here on -->\n"


def render() -> str:
    """The page with its table made anew."""
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    rows = [f"| `{name}` | {kind} | {_value(default)} | {meaning} |\n" for name, kind, default, meaning in describe_fields()]
    return f"{head}{mark or MARK}\n| field | type | default | meaning |\n|---|---|---|---|\n{''.join(rows)}"


def _value(default: str) -> str:
    """A default as YAML writes it."""
    if default in ("", "required"):
        return default
    words = {"None": "null", "True": "true", "False": "false", "''": '""'}
    return f"`{words.get(default, default.strip(chr(39)))}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
