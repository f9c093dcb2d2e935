"""Argument checks of this package."""

from __future__ import annotations


class ArgumentError(ValueError, AssertionError, RuntimeError):
    """A bad argument; also what vector_quantize_pytorch raises in its place: AssertionError, or for shapes RuntimeError."""


def require(condition, message: str) -> None:
    """Raise ArgumentError with `message` unless `condition` holds."""
    if not condition:
        raise ArgumentError(message)
