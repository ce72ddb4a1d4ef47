"""Notebook 09: a Janus number, power by frequency, the spread of depths along a ray,
and a picture that PSNR likes too well. Solutions first, then checkers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.consistency import detail
from ...evaluation.metrics import psnr
from . import ask, checker, expect, expect_close, expect_not, expect_shape

DECIBELS, KEPT = 25.0, 0.3  # PSNR to reach, and detail to stay below


def janus_excess(front: Tensor, back: Tensor, true_front: Tensor, true_back: Tensor) -> float:
    """Four views [H, W, 3] -> decibels by which the back resembles the front more than
    the true back resembles the true front.
    """
    return psnr(back.flip(1), front) - psnr(true_back.flip(1), true_front)


def kept_power(image: Tensor, truth: Tensor, bands: int = 4) -> Tensor:
    """Grey pictures [S, S] -> the share of the truth's power that the image has in
    each of `bands` equal ranges of frequency, from 0 to half a cycle a pixel [bands].
    """
    line = torch.fft.fftfreq(len(truth))
    radius = (line[:, None] ** 2 + line[None] ** 2).sqrt()
    powers = [torch.fft.fft2(x).abs() ** 2 for x in (image, truth)]
    edges = torch.linspace(0, 0.5, bands + 1)
    rings = [(radius > a) & (radius <= b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return torch.stack([powers[0][ring].sum() / powers[1][ring].sum() for ring in rings])


def spread_of_ray(weights: Tensor, depths: Tensor) -> Tensor:
    """Blending weights and depths [..., K] of the Gaussians along rays -> the standard
    deviation of the depth [...].
    """
    share = weights / weights.sum(dim=-1, keepdim=True)
    mean = (share * depths).sum(dim=-1, keepdim=True)
    return (share * (depths - mean) ** 2).sum(dim=-1).sqrt()


def smooth(images: Tensor) -> Tensor:
    """Pictures [V, S, S, 3] -> the same, every pixel the mean of 7 x 7."""
    padded = F.pad(images.movedim(-1, 1), (3, 3, 3, 3), mode="replicate")
    return F.avg_pool2d(padded, 7, stride=1).movedim(1, -1)


@checker
def check_janus_excess(solution) -> None:
    """(front, back, true front, true back), each [H, W, 3] -> dB."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.rand(12, 12, 3, generator=generator) for _ in range(4)]
    front, back, true_front, true_back = views
    answer = torch.tensor(float(ask(solution, *views)))
    right = torch.tensor(janus_excess(*views))
    truth = psnr(true_back.flip(1), true_front)
    mistakes = {
        "Seen from behind, left and right change places: mirror the back view first.": psnr(
            back, front
        )
        - psnr(true_back, true_front),
        "That turns the picture upside down: mirror left and right, the second dimension.": psnr(
            back.flip(0), front
        )
        - psnr(true_back.flip(0), true_front),
        "Some objects have equal sides in truth: subtract the truth's own similarity.": psnr(
            back.flip(1), front
        ),
        "The sign is turned: a back that repeats the front has an excess above 0.": -float(right),
        "Decibels are logarithms already: take the difference, not the ratio.": float(right + truth)
        / truth,
    }
    wrong = {hint: torch.tensor(float(value)) for hint, value in mistakes.items()}
    expect_not(answer, wrong, rtol=1e-4, atol=1e-4)
    expect_close(answer, right, "Four random pictures give another number.", 1e-3)


@checker
def check_kept_power(solution) -> None:
    """(image [S, S], truth [S, S], bands) -> shares [bands]."""
    x = torch.arange(32.0)
    waves = [torch.cos(2 * math.pi * k * x / 32)[None].expand(32, 32) for k in (2, 6, 10, 14)]
    truth = sum(waves)
    shares = torch.tensor([1.0, 0.5, 0.0, 2.0])
    image = sum(share * wave for share, wave in zip(shares, waves, strict=True))
    answer = ask(solution, image, truth, 4)
    expect_shape(answer, (4,))
    expect(
        not torch.allclose(answer, shares, atol=1e-3),
        "That is the share of the amplitude; power is its square.",
    )
    expect(
        not torch.allclose(answer.flip(0), shares**2, atol=1e-3),
        "The bands are turned round: low frequencies come first.",
    )
    expect_close(
        answer, shares**2, "Four cosines, one in each band, kept by 1, 1/2, 0 and 2.", 1e-3
    )
    expect_close(
        ask(solution, image + 0.7, truth, 4),
        shares**2,
        "The mean of the picture is no texture: leave frequency 0 out.",
        1e-3,
    )


@checker
def check_spread_of_ray(solution) -> None:
    """(weights [..., K], depths [..., K]) -> spread [...]."""
    weights = torch.tensor([[0.3, 0.3, 0.0], [0.5, 0.0, 0.5]])
    depths = torch.tensor([[2.0, 2.0, 9.0], [2.0, 9.0, 3.0]])
    answer = ask(solution, weights, depths)
    expect_shape(answer, (2,))
    expect(torch.isfinite(answer).all(), "The answer holds inf or nan.")
    expect(
        float(answer[0]) < 1e-3,
        f"Two faint Gaussians at one depth are one surface: spread 0, and yours is "
        f"{float(answer[0]):.2f}. The weights of a ray need not add up to 1.",
    )
    expect_close(
        answer[1], 0.5, "Half the weight at depth 2 and half at 3: the spread is 0.5.", 1e-3
    )


@checker
def check_smooth(solution) -> None:
    """(pictures [V, S, S, 3]) -> pictures of the same shape."""
    truth, mask = textured()
    answer = ask(solution, truth.clone())
    expect_shape(answer, truth.shape)
    decibels, kept = psnr(answer, truth), detail(answer, truth, mask)
    measured = f"PSNR {decibels:.1f} dB, detail {kept:.2f}"
    expect(decibels >= DECIBELS, f"{measured}: PSNR should be {DECIBELS:.0f} dB or more.")
    expect(kept <= KEPT, f"{measured}: detail should be {KEPT} or less.")


def textured() -> tuple[Tensor, Tensor]:
    """Two pictures [2, 64, 64, 3], slow colours and a fine pattern; a full mask."""
    line = torch.arange(64.0)
    slow = 0.5 + 0.25 * torch.sin(line / 12)[:, None, None] * torch.tensor([1.0, 0.6, -0.8])
    pattern = 0.05 * torch.sign(torch.sin(1.1 * line[:, None]) * torch.sin(1.3 * line[None]))
    first = (slow + pattern[..., None]).clamp(0, 1)
    return torch.stack([first, first.transpose(0, 1)]), torch.ones(2, 64, 64, 1)
