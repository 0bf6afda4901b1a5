"""Writes the README's table of the faults that were tried, which `make faults` counts: `python -m docs.make_faults`."""

from __future__ import annotations

from pathlib import Path

from tests import faults

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
COUNTS = DOCS / "faults.json"
BEGIN = "<!-- made by docs/make_faults.py from docs/faults.json -->\n"
END = "<!-- end -->\n"


def render() -> str:
    """The README with its table made anew.

    Raises:
        ValueError: a test failed in the run that was counted.
    """
    head, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}{faults.table(COUNTS)}{END}{tail}"


if __name__ == "__main__":
    README.write_text(render(), encoding="utf-8")
