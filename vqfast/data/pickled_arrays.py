"""Reads float32 arrays out of a pickle without unpickling: nothing in the file is ever called.

LPIPS' weights reach us only as a pickle of nested dicts of numpy arrays. `pickletools` splits such a file
into its instructions; the few that it needs are carried out here on plain containers, every other one is refused.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import DataFileError

_MARK = object()
_PUSHED = frozenset(("BINUNICODE", "BININT", "BININT1", "BININT2", "BINBYTES", "SHORT_BINBYTES"))
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}


@dataclass
class _Call:
    """A call that the file asks for: kept as a note, never made."""

    name: str
    arguments: tuple = ()
    state: Any = None


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a pickle of nested dicts, under names like "a.b.c".

    Args:
        content: protocol 2 or 3.

    Returns:
        float32 arrays.

    Raises:
        DataFileError: the bytes are no such pickle.
    """
    try:
        return dict(_flatten(_run(content), ""))
    except DataFileError:
        raise
    except Exception as error:  # Damaged instructions fail in as many ways as there are instructions.
        raise DataFileError(
            f"this is no pickle of float32 arrays ({error or type(error).__name__})"
        ) from None


def _run(content: bytes) -> Any:
    """Carries the instructions out; arrays and dtypes come back as `_Call`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    for instruction, argument, _ in pickletools.genops(content):
        name = instruction.name
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "BINPUT":
            memo[argument] = stack[-1]
        elif name == "BINGET":
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Call(argument))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_Call(called.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise DataFileError(f"the pickle has the instruction {name}, which no file of arrays needs")
    raise DataFileError("the pickle is cut")


def _flatten(tree: Any, name: str):
    """(name, array) for every leaf."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, _array(tree)


def _array(call: Any) -> np.ndarray:
    """The array that numpy's own reconstruction would make of the same state."""
    if not isinstance(call, _Call) or not call.name.endswith("multiarray _reconstruct"):
        raise DataFileError(
            f"the pickle holds {getattr(call, 'name', type(call).__name__)} where an array should be"
        )
    _, shape, dtype, fortran, values = call.state
    if (dtype.name, dtype.arguments[0], dtype.state[1], fortran) != ("numpy dtype", "f4", "<", False):
        raise DataFileError("the pickle holds an array of another kind than float32")
    return np.frombuffer(values, "<f4").reshape(shape)
