"""Notebook 12: a rank correlation, the coverage of samples, an object that is turned,
and a mask that is cleaned. Solutions first, then checkers.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ...gaussians import Gaussians
from ...rotations import rotation_matrices
from . import ask, checker, expect, expect_close, expect_not

MASK_IOU = 0.95  # to reach on masks that start near 0.7


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Two lists of numbers [P] -> Spearman's correlation. Equal numbers share the mean
    of their ranks.
    """
    ranks = []
    for x in (a, b):
        below, equal = x[:, None] > x, x[:, None] == x  # [P, P]
        ranks.append(below.double().sum(dim=1) + equal.double().sum(dim=1) / 2)
    centred = [r - r.mean() for r in ranks]
    return float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()))


def coverage(samples: Tensor, truth: Tensor) -> tuple[float, float]:
    """Samples [K, P] of P numbers and their truth [P] -> the share of truths between
    the smallest and the largest sample, and the share of a perfect sampler.
    """
    low, high = samples.min(dim=0).values, samples.max(dim=0).values
    measured = ((truth >= low) & (truth <= high)).double().mean()
    return float(measured), (len(samples) - 1) / (len(samples) + 1)


def turned(gaussians: Gaussians, degrees: float) -> Gaussians:
    """The object turned about the vertical (z), its centre in place."""
    half = math.radians(degrees) / 2
    w, z = math.cos(half), math.sin(half)
    turn = rotation_matrices(torch.tensor([[w, 0.0, 0.0, z]]))[0]
    a, b, c, d = gaussians.quats.unbind(-1)
    # the Hamilton product (w, 0, 0, z) (a, b, c, d): first the Gaussian's own turn
    quats = torch.stack([w * a - z * d, w * b - z * c, w * c + z * b, w * d + z * a], dim=-1)
    return dataclasses.replace(gaussians, means=gaussians.means @ turn.T, quats=quats)


def clean_mask(mask: np.ndarray) -> np.ndarray:
    """A boolean mask [S, S] with holes and specks -> its largest piece, filled."""
    opened = ndimage.binary_opening(ndimage.binary_closing(mask, iterations=2), iterations=2)
    pieces, count = ndimage.label(opened)
    if count == 0:
        return mask
    sizes = ndimage.sum(opened, pieces, range(1, count + 1))
    return ndimage.binary_fill_holes(pieces == 1 + int(np.argmax(sizes)))


@checker
def check_rank_correlation(solution) -> None:
    """(a [P], b [P]) -> correlation of the ranks."""
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    answer = float(ask(solution, a, a**5))
    expect(
        abs(answer - 1) < 1e-4,
        "x and x^5 have the same order, so the correlation is 1: correlate ranks, not values.",
    )
    expect_close(float(ask(solution, a, -a)), -1.0, "The opposite order has correlation -1.")
    b, c = torch.tensor([3.0, 1.0, 4.0, 2.0]), torch.tensor([10.0, 40.0, 20.0, 30.0])
    answer, right = float(ask(solution, b, c)), rank_correlation(b, c)
    once = float(torch.corrcoef(torch.stack([b.argsort(), c.argsort()]).double())[0, 1])
    expect(
        abs(answer - once) > 1e-3,
        "argsort gives the places of the sorted numbers; the ranks are the argsort of that.",
    )
    expect_close(answer, right, "3, 1, 4, 2 against 10, 40, 20, 30.", 1e-3)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(200, generator=generator), torch.rand(200, generator=generator)
    expect_close(
        float(ask(solution, x, x + y)),
        rank_correlation(x, x + y),
        "200 random numbers have another correlation.",
        1e-3,
    )
    tied, plain = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 4.0, 3.0])
    for x, y in ((tied, plain), (plain, tied), (tied.flip(0), plain)):
        expect_close(
            float(ask(solution, x, y)),
            rank_correlation(x, y),
            "Equal numbers share the mean of their ranks: 3, 1, 2, 1 have 3, 0.5, 2, 0.5.",
            1e-3,
        )


@checker
def check_coverage(solution) -> None:
    """(samples [K, P], truth [P]) -> (measured, expected)."""
    samples = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    answer = ask(solution, samples, torch.tensor([0.2, 0.99, 1.5, -0.5]))
    expect(isinstance(answer, tuple) and len(answer) == 2, "Return (measured, expected).")
    expect_close(
        float(answer[0]),
        0.5,
        "Two of four truths lie between the smallest and the largest sample (no quantiles).",
    )
    expected = float(answer[1])
    expect(
        abs(expected - 1) > 1e-6,
        "Even a perfect sampler misses some: the truth is one more draw, and it may be the "
        "largest or the smallest of all K + 1.",
    )
    expect_close(
        expected, 0.5, "With K = 3 the truth is the smallest or the largest of 4 half of the time."
    )
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(9, 4000, generator=generator)
    measured, expected = ask(solution, draws[:8], draws[8])
    expect_close(float(expected), 7 / 9, "With K = 8 it is inside in 7 of 9.")
    expect_close(
        float(measured), 7 / 9, "4,000 truths are draws themselves: 7 of 9 lie inside.", 0.02
    )


@checker
def check_turned(solution) -> None:
    """(gaussians, degrees) -> gaussians, turned about z."""
    needle = Gaussians(
        means=torch.tensor([[1.0, 0.0, 0.0]]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        scales=torch.tensor([[0.5, 0.1, 0.1]]),  # long along x
        opacities=torch.ones(1),
        colors=torch.ones(1, 3),
    )
    answer = ask(solution, needle, 90.0)
    expect(isinstance(answer, Gaussians), "Return Gaussians.")
    expect_close(answer.means[0], [0.0, 1.0, 0.0], "A quarter turn takes x to y.", 1e-4)
    long_axis = answer.covariances()[0].diagonal().argmax().item()
    expect(
        long_axis == 1,
        f"A needle along x lies along y after a quarter turn; yours still lies along "
        f"{'xyz'[long_axis]}. The object turns, and each Gaussian turns with it.",
    )
    leaning = dataclasses.replace(
        needle,
        quats=F.normalize(torch.tensor([[0.8, 0.4, -0.3, 0.2]]), dim=-1),
        scales=torch.tensor([[0.5, 0.1, 0.25]]),
    )
    made = ask(solution, leaning, 30.0).covariances()[0]
    expect_not(made, other_turns(leaning, 30.0))
    right = turned(leaning, 30.0).covariances()[0]
    expect_close(made, right, "Turned by T, a leaning Gaussian has T Σ Tᵀ, and its scales stay.")


def other_turns(gaussians: Gaussians, degrees: float) -> dict[str, Tensor]:
    """Covariances of the first Gaussian as typical mistakes turn it, by what to say."""
    half = math.radians(degrees) / 2
    turn = rotation_matrices(torch.tensor([[math.cos(half), 0.0, 0.0, math.sin(half)]]))[0]
    own = rotation_matrices(gaussians.quats)[0]
    return {
        hint: rotation @ gaussians.scales[0].square().diag() @ rotation.T
        for hint, rotation in {
            "The turn of the object comes last: its quaternion stands on the left.": own @ turn,
            "The centres turn one way and the Gaussians the other.": turn.T @ own,
            "The Gaussian's own turn is lost: multiply its quaternion, do not replace it.": turn,
        }.items()
    }


@checker
def check_clean_mask(solution) -> None:
    """(mask bool [S, S]) -> mask bool [S, S], on masks that were spoilt."""
    before, after = [], []
    for seed in range(6):
        truth, spoilt = spoilt_mask(seed)
        answer = ask(solution, spoilt.copy())
        expect(isinstance(answer, np.ndarray), "Return a NumPy array.")
        expect(
            answer.shape == truth.shape and answer.dtype == bool, "Return a boolean mask [S, S]."
        )
        before.append((spoilt & truth).sum() / (spoilt | truth).sum())
        after.append((answer & truth).sum() / max((answer | truth).sum(), 1))
    measured = f"IoU {np.mean(before):.2f} before, {np.mean(after):.2f} after"
    expect(np.mean(after) >= MASK_IOU, f"{measured}: reach {MASK_IOU}.")


def spoilt_mask(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A blob with three lobes as a mask [S, S], and the same with specks, a piece of
    background and a hole, the last two too large for a filter.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = np.arctan2(y, x)
    radius = 0.27 + 0.08 * np.cos(3 * angle + rng.uniform(0, 6)) + 0.04 * np.cos(2 * angle)
    truth = np.hypot(x, y) < radius
    noise = ndimage.gaussian_filter(rng.normal(size=(size, size)), 1.0)
    wrong = noise > np.quantile(noise, 0.93)
    corner = rng.choice([-0.41, 0.41], 2)
    pieces = [np.hypot(x - a, y - b) < 0.07 for a, b in ((0, 0), corner)]
    return truth, truth ^ (wrong | pieces[0] | pieces[1])
