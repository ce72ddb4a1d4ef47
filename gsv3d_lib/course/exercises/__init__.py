"""Checkers for the exercises: they run the learner's function and say what is wrong.

One module per notebook. A checker is a function `check_NAME(solution)` under
`@checker`, made of `ask` and `expect_*`:

    @checker
    def check_transmittance(transmittance):
        "alphas [K] -> transmittance in front of each [K]."
        alphas = torch.tensor([0.5, 0.5])
        result = ask(transmittance, alphas)
        expect_shape(result, (2,))
        expect_close(result, [1.0, 0.5], "The first has nothing in front: start at 1.")

A stub returns None or `...`, and the checker then says that it is not written yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor


class Wrong(AssertionError):
    """What is wrong with a solution, in one sentence."""


class Verdict:
    """True or False with its sentence, which it prints when it is made.

    As a cell's last value it shows nothing. It never stops a run: a notebook may hold a
    function that is wrong on purpose.
    """

    def __init__(self, right: bool, sentence: str):
        self.right = right
        self.sentence = sentence
        print(sentence)

    def __bool__(self) -> bool:
        return self.right

    def _ipython_display_(self) -> None:
        """Nothing."""


class _NotWritten(Exception):
    """The stub returned nothing."""


def checker(check: Callable) -> Callable:
    """Turns a function that raises `Wrong` into one that returns a Verdict."""

    @wraps(check)
    def run(solution: Callable, **options) -> Verdict:
        name = _name(solution)
        try:
            check(solution, **options)
        except _NotWritten:
            todo = "not written yet: it returns nothing. Replace the `...`, or add the `return`."
            return Verdict(False, f"○ {name}: {todo}")
        except Wrong as wrong:
            return Verdict(False, f"✗ {wrong}")
        # of another kind than what was asked for, so that comparing it fails
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            return Verdict(False, f"✗ {name} returned what cannot be compared ({said}).")
        return Verdict(True, f"✓ {name}: right.")

    return run


def ask(solution: Callable, *arguments, **options):
    """The learner's answer. An error is a sentence; None or `...` is `_NotWritten`."""
    try:
        answer = solution(*arguments, **options)
    except Exception as error:
        given = ", ".join(_described(a) for a in (*arguments, *options.values()))
        raise Wrong(
            f"{_name(solution)}({given}) stops with {type(error).__name__}: {error}"
        ) from error
    if answer is None or answer is ...:
        raise _NotWritten
    return answer


def expect(condition: bool, hint: str) -> None:
    """Raises Wrong(hint) unless the condition holds."""
    if not bool(condition):
        raise Wrong(hint)


def expect_shape(answer: Tensor, shape: Sequence[int], what: str = "the answer") -> None:
    """The answer is a tensor of this shape."""
    expect(
        isinstance(answer, Tensor),
        f"{what} should be a tensor of shape {tuple(shape)}; got {_described(answer)}.",
    )
    expect(
        answer.shape == tuple(shape),
        f"{what} should have shape {tuple(shape)}; got {tuple(answer.shape)}.",
    )


def expect_close(answer, truth, hint: str, tolerance: float = 1e-4) -> None:
    """The answer equals the truth within `tolerance`; the hint says what is off.

    The tolerance is absolute, and relative to the truth.
    """
    answer, truth = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (answer, truth))
    expect_shape(answer, truth.shape)
    expect(torch.isfinite(answer).all(), "The answer holds inf or nan.")
    off = ((answer - truth).abs() - tolerance * truth.abs()).max().item() if truth.numel() else 0.0
    expect(off <= tolerance, f"{hint} (largest error {(answer - truth).abs().max():.3g})")


def same(answer: Tensor, other: Tensor, rtol: float = 1e-3, atol: float = 1e-4) -> bool:
    """Equal in shape and, within the tolerances, in value."""
    equal_shapes = answer.shape == other.shape
    return equal_shapes and torch.allclose(
        answer.detach().double(), other.detach().double(), rtol=rtol, atol=atol
    )


def expect_not(answer: Tensor, mistakes: dict[str, Tensor], **tolerances: float) -> None:
    """The answer is none of the typical wrong ones; the hint says which it is."""
    for hint, wrong in mistakes.items():
        expect(not same(answer, wrong, **tolerances), hint)


def _name(solution) -> str:
    return getattr(solution, "__name__", "your function")


def _described(value) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    text = repr(value)
    return text if len(text) < 40 else type(value).__name__
