"""Argument checks of this package."""

from __future__ import annotations


class ArgumentError(ValueError, AssertionError):
    """A bad argument; also an AssertionError, which is what vector_quantize_pytorch raises in its place."""


def require(condition, message: str) -> None:
    """Raise ArgumentError with `message` unless `condition` holds."""
    if not condition:
        raise ArgumentError(message)
