"""Random numbers that depend on nothing but counters: a resumed run draws what an unbroken one draws."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """The splitmix64 finalizer: a bijection of 64-bit integers that scatters neighbours.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014), figure 16.
    """
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(*counters: int) -> int:
    """One 64-bit key from several counters; order matters."""
    state = 0
    for counter in counters:
        state = mix(state ^ mix(counter & _MASK))
    return state


class Draws:
    """A short stream of random integers for one sample, the same for the same counters on every machine."""

    def __init__(self, *counters: int):
        self._state = key(*counters)

    def integer(self, below: int) -> int:
        """Uniform in [0, below); the bias of the multiplication is under below / 2**64."""
        self._state = mix(self._state)
        return (self._state * below) >> 64


def permutation(size: int, *counters: int) -> np.ndarray:
    """The order of `size` items that the counters name: int64, each of 0 to size - 1 once."""
    values = np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key(*counters))
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return np.argsort(values, kind="stable")
