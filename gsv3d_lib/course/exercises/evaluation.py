"""Checkers of notebook 08: PSNR of the object, Chamfer loss, a paired interval.

Solutions first, then checkers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...evaluation.metrics import chamfer_distance
from . import ask, checker, expect, expect_close


def object_psnr(predicted: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """[V, H, W, 3] twice, mask [V, H, W, 1] -> mean PSNR in dB inside the mask."""
    squared = ((predicted - truth) ** 2 * mask).sum(dim=(1, 2, 3))  # [V]
    return (-10 * (squared / (3 * mask.sum(dim=(1, 2, 3)))).log10()).mean()


def chamfer_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Points [N, 3] and [M, 3] -> Chamfer distance, differentiable in `predicted`."""
    distances = torch.cdist(predicted, truth)  # [N, M]
    return (distances.min(dim=1).values.mean() + distances.min(dim=0).values.mean()) / 2


def ratio_interval(
    ours: np.ndarray, theirs: np.ndarray, draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of mean(ours) / mean(theirs), objects kept paired.

    One number per object twice, [O].
    """
    chosen = np.random.default_rng(seed).integers(len(ours), size=(draws, len(ours)))
    low, high = np.quantile(ours[chosen].mean(axis=1) / theirs[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


@checker
def check_object_psnr(solution) -> None:
    """(predicted [V, H, W, 3], truth, mask [V, H, W, 1]) -> dB."""
    truth = torch.full((2, 8, 8, 3), 0.5)
    mask = torch.zeros(2, 8, 8, 1)
    mask[:, 2:6, 2:6] = 1
    predicted = truth + 0.1 * mask  # 20 dB on the object, nothing elsewhere
    answer = number(ask(solution, predicted, truth, mask))
    expect(
        math.isfinite(answer),
        "The answer is inf or nan; here the error inside the mask is 0.1 everywhere.",
    )
    hints = {
        -20.0: "The sign is turned: PSNR is minus 10 log10 of the error.",
        20 * math.log(10): "You used the natural logarithm; decibels take log10.",
        40.0: "You took 20 log10 of the squared error: with squares the factor is 10.",
        20 + 10 * math.log10(4): "You divided by all pixels; divide by those inside the mask only.",
        20
        - 10
        * math.log10(
            3
        ): "You forgot the three channels: a mask pixel holds three squared errors to average.",
        10.0: "Square the error: 0.1 everywhere is 20 dB, not 10.",
    }
    for value, hint in hints.items():
        expect(abs(answer - value) > 1e-2, hint)
    expect_close(answer, 20.0, "An error of 0.1 inside the mask, and none outside, is 20 dB.")
    predicted = truth + torch.tensor([0.1, 0.01])[:, None, None, None] * mask  # 20 and 40 dB
    answer = number(ask(solution, predicted, truth, mask))
    pooled = -10 * math.log10((0.1**2 + 0.01**2) / 2)
    expect(
        abs(answer - pooled) > 1e-2,
        "You took the dB of the mean error over all views; take dB per view first, then the mean "
        "over the views.",
    )
    expect_close(answer, 30.0, "Two views at 20 and 40 dB have a mean of 30 dB.")
    mask[1, 4:] = 0  # the object covers fewer pixels in the second view
    answer = ask(solution, predicted + 0.3 * (1 - mask), truth, mask)
    expect_close(
        number(answer),
        30.0,
        "Errors outside the mask, and the mask's size in another view, must not matter.",
    )
    generator = torch.Generator().manual_seed(0)
    predicted, truth = (torch.rand(3, 8, 8, 3, generator=generator) for _ in range(2))
    mask = (torch.rand(3, 8, 8, 1, generator=generator) > 0.5).float()
    expect_close(
        number(ask(solution, predicted, truth, mask)),
        object_psnr(predicted, truth, mask).item(),
        "Random images differ.",
    )


@checker
def check_chamfer_loss(solution) -> None:
    """(points [N, 3], points [M, 3]) -> scalar tensor with a gradient."""
    a = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    b = torch.tensor([[0.0, 0.2, 0]])
    there, back = (0.2 + math.hypot(1, 0.2)) / 2, 0.2
    answer = ask(solution, a, b)
    expect(
        isinstance(answer, Tensor), "Return a tensor: a plain number has no gradient to minimise."
    )
    value = number(answer)
    squared = ((0.04 + 1.04) / 2 + 0.04) / 2
    half = there / 2
    hints = {
        there: "You only went from the prediction to the truth; add the way back, from the truth "
        "to the prediction.",
        back: "You only went from the truth to the prediction; add the other direction.",
        half: "You halved one direction without adding the other: half a prediction would score "
        "as well as a whole.",
        squared: "These are squared distances: take the root before the mean.",
        2
        * squared: "These are squared distances: take the root before the mean, and halve the sum.",
        there + back: "You added the two directions; equation (8.4) takes half of their sum.",
        there + back / 2: "You summed over the points; take the mean over the points of each set.",
    }
    for wrong, hint in hints.items():
        expect(abs(value - wrong) > 1e-4, hint)
    expect_close(value, (there + back) / 2, "Two points against one give another value.")
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(64, 3, generator=generator).requires_grad_(),
        torch.randn(40, 3, generator=generator),
    )
    answer = ask(solution, a, b)
    expect_close(
        number(answer),
        chamfer_distance(a, b),
        "64 points against 40 differ from metrics.chamfer_distance.",
    )
    expect(
        isinstance(answer, Tensor) and answer.requires_grad,
        "The answer has no gradient: stay in torch, without numpy, detach or item.",
    )
    gradient = torch.autograd.grad(answer, a)[0]
    expect(
        (gradient.norm(dim=1) > 0).all(),
        "Some predicted points receive no gradient: each needs its own nearest truth.",
    )


@checker
def check_ratio_interval(solution) -> None:
    """(ours [O], theirs [O], draws, seed) -> (low, high)."""
    rng = np.random.default_rng(0)
    theirs = rng.uniform(1.0, 3.0, 40)
    low, high = pair(ask(solution, 0.5 * theirs, theirs))
    expect(low <= high, "The first number should be the lower end.")
    expect(
        high - low < 1e-6,
        "Ours is exactly half of theirs on every object, so the ratio cannot move; you resampled "
        "the two arrays separately, which breaks the pairs.",
    )
    expect_close(low, 0.5, "Ours is half of theirs on every object: the ratio is 0.5.")
    theirs = np.exp(rng.normal(size=40))
    ours = 0.3 * theirs + rng.uniform(0.0, 1.0, 40)
    low, high = pair(ask(solution, ours, theirs))
    right_low, right_high = ratio_interval(ours, theirs)
    expect(high - low > 1e-6, "The interval has no width: draw the objects with replacement.")
    expect(
        right_low - 0.2 < (low + high) / 2 < right_high + 0.2,
        "That is the mean of the ratios per object; divide the mean of ours by the mean of theirs.",
    )
    width, right_width = high - low, right_high - right_low
    expect(
        width > 0.91 * right_width,
        "The interval is too narrow: take the 2.5 % and 97.5 % quantiles.",
    )
    expect(
        width < 1.12 * right_width,
        "The interval is too wide: take the 2.5 % and 97.5 % quantiles, all objects drawn.",
    )
    expect_close(
        [low, high], [right_low, right_high], "The ends are elsewhere.", tolerance=0.04 * right_high
    )


def number(answer) -> float:
    """A number or a tensor of one number."""
    expect(
        isinstance(answer, int | float | np.floating)
        or (isinstance(answer, Tensor) and answer.numel() == 1),
        "Return a single number (a tensor without dimensions).",
    )
    return float(answer.detach() if isinstance(answer, Tensor) else answer)


def pair(answer) -> tuple[float, float]:
    """Two numbers."""
    answer = np.asarray(answer, dtype=float)
    expect(answer.shape == (2,), f"Return the pair (low, high); got shape {answer.shape}.")
    return float(answer[0]), float(answer[1])
