"""Numbers that a user gives, checked before anything heavy runs: one sentence for each."""

from __future__ import annotations

import math
import operator

from .errors import UserError


def whole(name: str, value, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`, both included; raises UserError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if isinstance(value, bool) or number is None or not low <= number <= high:
        raise UserError(f"{name} is a whole number from {low} to {high}; got {shown(value)}.")
    return number


def real(name: str, value, low: float, high: float, ends: bool = True) -> float:
    """`value` as a float from `low` to `high`, with or without the `ends`; raises
    UserError.
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
        number = math.nan
    if not (low <= number <= high if ends else low < number < high):
        bounds = f"from {low:g} to {high:g}" if ends else f"between {low:g} and {high:g}"
        raise UserError(f"{name} is a number {bounds}; got {shown(value)}.")
    return number


def shown(value) -> str:
    """How a value that is refused is named in a sentence: on one line, and not endless."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
