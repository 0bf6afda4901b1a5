"""Python's garbage collector, while many objects are made at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the search for reference cycles.

    A state of 100,000 tensors makes millions of objects, none of them in cycles; the collector would look at all of them, and at all of
    the framework's, again and again, which takes longer than everything else.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
