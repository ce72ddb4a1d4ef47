"""Numbers that a user gives, checked before anything heavy runs: one sentence each."""

import math
import operator

from .errors import UserError


def whole(name: str, value, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`, both included; raises UserError."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise refusal(name, "a whole number", value)
    if number < low:
        raise refusal(name, f"{low} or more", value)
    if number > high:
        raise refusal(name, f"{high} or less", value)
    return number


def real(name: str, value, low: float, high: float, ends: bool = True) -> float:
    """`value` as a float in the range, with or without its `ends`; raises UserError."""
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
        number = math.nan
    if not (low <= number <= high if ends else low < number < high):  # NaN is in no range
        bounds = f"from {low:g} to {high:g}" if ends else f"between {low:g} and {high:g}"
        raise refusal(name, f"a number {bounds}", value)
    return number


def refusal(name: str, wanted: str, value) -> UserError:
    return UserError(f"{name} must be {wanted}, got {shown(value)}.".strip())


def shown(value) -> str:
    """A refused value as a sentence names it: on one line, and not endless."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
