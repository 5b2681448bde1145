"""Times as text."""

from __future__ import annotations

from collections.abc import Callable


def duration(seconds: float) -> str:
    """A time by itself, in the unit that suits it."""
    if seconds >= 1 or not seconds:
        return f"{seconds:.4g} s"
    return f"{1e3 * seconds:.4g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.4g} us"


def milliseconds(seconds: float) -> str:
    """A time in a column of milliseconds, without the unit."""
    return f"{1e3 * seconds:,.2f}" if seconds >= 1e-3 or not seconds else f"{1e3 * seconds:.3f}"


def axis(length_s: float) -> Callable[[float], str]:
    """How times on an axis of this length are written."""
    unit, scale = ("s", 1.0) if length_s >= 1 else ("ms", 1e3)
    return lambda at: f"{at * scale:.5g} {unit}"
