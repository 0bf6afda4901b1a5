"""Interrupts (Ctrl-C) at each point of some code at which Python lets one come."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Collection
from types import CodeType, FrameType, ModuleType
from typing import Any


def interrupted_at(point: int, work: Callable[[], object], modules: Collection[ModuleType]) -> bool:
    """Call a function, and raise KeyboardInterrupt in it, in this thread, at a point of what these modules do: whether it came so far.

    The points are counted from 1: the begin of a function, what comes after a call, and the begin of a loop's next turn. No others are seen
    by a signal's handler: not what lies between taking a lock that is C code and the block of its `with`.
    """
    files = {module.__file__ for module in modules}
    instructions: dict[CodeType, dict[int, str]] = {}
    last: dict[FrameType, str] = {}
    passed = 0

    def each_instruction(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if event == "opcode":
            code = frame.f_code
            if code not in instructions:
                instructions[code] = {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}
            name, before = instructions[code][frame.f_lasti], last.get(frame)
            last[frame] = name
            if before is None or name.startswith(("JUMP_BACKWARD", "JUMP_ABSOLUTE")) or before.startswith("CALL"):
                passed += 1
                if passed == point:
                    raise KeyboardInterrupt
        return each_instruction

    def each_call(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return each_instruction

    before = sys.gettrace()
    sys.settrace(each_call)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
