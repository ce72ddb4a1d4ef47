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
    return _by_ring(image, truth, _radius(len(truth)), torch.linspace(0, 0.5, bands + 1))


def _radius(size: int) -> Tensor:
    """Frequencies of `fft2` in cycles a pixel [size, size]."""
    line = torch.fft.fftfreq(size)
    return (line[:, None] ** 2 + line[None] ** 2).sqrt()


def _rings(radius: Tensor, edges: Tensor) -> list[Tensor]:
    """Masks [S, S] of the frequencies between each two edges."""
    return [(radius > a) & (radius <= b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _by_ring(image: Tensor, truth: Tensor, radius: Tensor, edges: Tensor) -> Tensor:
    """Power of the image over that of the truth, between each two edges."""
    powers = [torch.fft.fft2(x).abs() ** 2 for x in (image, truth)]
    rings = _rings(radius, edges)
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
        "That turns the picture by half a turn: mirror left and right, the second dimension "
        "only.": psnr(back.flip(0, 1), front) - psnr(true_back.flip(0, 1), true_front),
        "That swaps the colours: mirror the second dimension, not the third.": psnr(
            back.flip(2), front
        )
        - psnr(true_back.flip(2), true_front),
        "You mirror the result's back alone: mirror the true one too.": psnr(back.flip(1), front)
        - psnr(true_back, true_front),
        "You mirror the true back alone: mirror the result's too.": psnr(back, front) - truth,
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
    noise = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    answer = ask(solution, *noise, 5)
    expect_shape(answer, (5,), "with bands=5, the answer")
    expect_not(answer, other_rings(*noise), rtol=1e-4, atol=1e-5)
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
    answer = ask(solution, *noise, 5)
    expect_close(answer, kept_power(*noise, 5), "Five rings of noise have other shares.", 1e-3)


def other_rings(image: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Shares in five rings as typical mistakes have them, by what to say."""
    line, radius = torch.fft.fftfreq(len(truth)), _radius(len(truth))
    square = torch.maximum(line[:, None].abs(), line[None].abs()).expand_as(radius)
    edges = torch.linspace(0, 0.5, 6)
    corners = torch.cat([edges[:-1], torch.ones(1)])
    below = torch.cat([edges[:1], edges[1:] - 1e-6])
    ratio = (torch.fft.fft2(image).abs() / torch.fft.fft2(truth).abs()) ** 2
    return {
        "Your rings are squares: the length of a frequency is the root of fx² + fy².": _by_ring(
            image, truth, square, edges
        ),
        "The corners lie beyond 0.5 cycles a pixel: they belong to no ring.": _by_ring(
            image, truth, radius, corners
        ),
        "Your rings go up to 0.707, the corner; the last one ends at 0.5.": _by_ring(
            image, truth, radius, edges * math.sqrt(2)
        ),
        "A ring holds its upper end, not its lower one: (low, high].": _by_ring(
            image, truth, radius, below
        ),
        "`fftshift` moved the frequencies of one side only: `fft2` and `fftfreq` agree "
        "without it.": _by_ring(image, truth, torch.fft.fftshift(radius), edges),
        "That is the mean of the ratios; divide the sum of the image's power by the sum of the "
        "truth's.": torch.stack([ratio[ring].mean() for ring in _rings(radius, edges)]),
    }


@checker
def check_spread_of_ray(solution) -> None:
    """(weights [..., K], depths [..., K]) -> spread [...]."""
    weights = torch.tensor([[0.3, 0.3, 0.0], [0.5, 0.0, 0.5], [0.3, 0.3, 0.0]])
    depths = torch.tensor([[2.0, 2.0, 9.0], [2.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
    answer = ask(solution, weights, depths)
    expect_shape(answer, (3,))
    expect(torch.isfinite(answer).all(), "The answer holds inf or nan.")
    expect(
        float(answer[0]) < 1e-3,
        f"Two faint Gaussians at one depth are one surface: spread 0, and yours is "
        f"{float(answer[0]):.2f}. The weights of a ray need not add up to 1.",
    )
    expect_close(
        answer[1], 0.5, "Half the weight at depth 2 and half at 3: the spread is 0.5.", 1e-3
    )
    expect_close(
        answer[2],
        0.5,
        "Weights 0.3 and 0.3 at depths 2 and 3 spread by 0.5 too: divide by the sum of the "
        "weights in the mean and in the squares.",
        1e-3,
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
