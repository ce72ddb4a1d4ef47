"""Checkers for notebook 01: the EDM scalings, one guided Euler step, and guidance by
azimuth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...diffusion import clean_estimate, scalings, triangular_guidance
from . import ask, checker, expect, expect_close, expect_not, expect_shape, same


def scalings_for(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The library's scalings, for data of deviation sigma_data: divide data and noise
    by it, and nothing else changes.
    """
    c_skip, c_out, c_in, _ = scalings(sigma / sigma_data)
    return c_skip, sigma_data * c_out, c_in / sigma_data, sigma.log() / 4


@checker
def check_scalings(solution) -> None:
    """sigma [B], sigma_data -> (c_skip, c_out, c_in, c_noise), each [B]."""
    sigma = torch.tensor([0.05, 0.7, 1.0, 3.0, 40.0])
    for sigma_data in (1.0, 0.5, 2.0):
        answer = ask(solution, sigma, sigma_data)
        four = isinstance(answer, (tuple, list)) and len(answer) == 4
        expect(four, "Return the four tensors (c_skip, c_out, c_in, c_noise), in this order.")
        for value, name in zip(answer, ("c_skip", "c_out", "c_in", "c_noise")):
            expect_shape(value, sigma.shape, name)
        _check_four(answer, sigma, sigma_data)


def _check_four(answer, sigma: Tensor, sigma_data: float) -> None:
    c_skip, c_out, c_in, c_noise = answer
    truth = scalings_for(sigma, sigma_data)
    if sigma_data != 1:
        ignored = all(same(value, plain) for value, plain in zip(answer, scalings(sigma)))
        expect(
            not ignored,
            f"Right for sigma_data = 1, but nothing changes with sigma_data = {sigma_data}.",
        )
    total = sigma**2 + sigma_data**2
    expect_not(
        c_in,
        {
            "c_in divides z by its variance; divide by its standard deviation, the square root.": 1
            / total
        },
    )
    expect_close(
        c_in,
        truth[2],
        "c_in z should have variance 1, where z has the variance sigma^2 + sigma_data^2.",
    )
    expect_not(
        c_skip,
        {
            "c_skip weighs z by the noise's share of its variance; it is the data's share.": sigma
            ** 2
            / total
        },
    )
    expect_close(
        c_skip, truth[0], "c_skip should minimise (1 - c_skip)^2 sigma_data^2 + c_skip^2 sigma^2."
    )
    expect_not(
        c_out,
        {
            (
                "c_out has the wrong sign: v holds -sigma z0 in this project, so c_out is negative."
            ): -truth[1]
        },
    )
    expect_close(
        c_out, truth[1], "c_out^2 is that minimum, sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2)."
    )
    expect_not(c_noise, {"c_noise is a quarter of the logarithm: ln(sigma) / 4.": sigma.log()})
    expect_close(
        c_noise,
        truth[3],
        "c_noise is ln(sigma) / 4, the natural logarithm, whatever sigma_data is.",
    )


def guided_step(
    z: Tensor, v: Tensor, v_null: Tensor, weight: Tensor, sigma: Tensor, sigma_next: Tensor
) -> Tensor:
    """What a turn of the loop in `diffusion.sample` does to one orbit [N, 4, h, w]."""
    guided = v_null + weight[:, None, None, None] * (v - v_null)
    denoised = clean_estimate(guided[None], z[None], sigma[None])[0]
    return z + (sigma_next - sigma) * (z - denoised) / sigma


@checker
def check_guided_step(solution) -> None:
    """z, v, v_null [N, 4, h, w], weight [N], sigma, sigma_next scalars -> z at
    sigma_next [N, 4, h, w].
    """
    generator = torch.Generator().manual_seed(0)
    # N = w: broadcasts silently
    z, v, v_null = (torch.randn(3, 4, 3, 3, generator=generator) for _ in range(3))
    z, weight = 4 * z, torch.tensor([1.0, 2.5, 1.5])
    sigma, then = torch.tensor(4.0), torch.tensor(1.5)
    right = guided_step(z, v, v_null, weight, sigma, then)
    answer = ask(
        solution, z.clone(), v.clone(), v_null.clone(), weight.clone(), sigma.clone(), then.clone()
    )
    expect_shape(answer, z.shape)

    column, row = weight[:, None, None, None], weight
    guided = v_null + column * (v - v_null)
    swapped = guided_step(z, v_null, v, weight, sigma, then)
    across = v_null + row * (v - v_null)
    one = torch.ones_like(weight)
    expect_not(
        answer,
        {
            (
                "The two predictions are swapped: start at v_null and go weight times towards v."
            ): swapped,
            (
                "weight multiplied the columns of the latents: reshape it to "
                "[N, 1, 1, 1], one weight per frame."
            ): guided_step(z, across, across, one, sigma, then),
            "You followed v itself; the slope is (z - D) / sigma, and D is c_skip z + c_out v.": z
            + (then - sigma) * guided,
            "You took v for the clean estimate; the clean estimate is D = c_skip z + c_out v.": z
            + (then - sigma) * (z - guided) / sigma,
            (
                "The step goes up in noise: multiply the slope by sigma_next "
                "- sigma, which is negative."
            ): 2 * z - right,
            "The slope lacks its division by sigma: it is (z - D) / sigma.": z
            + (right - z) * sigma,
            "The guidance is missing: this is the step for v alone.": guided_step(
                z, v, v, weight, sigma, then
            ),
        },
    )
    expect_close(
        answer,
        right,
        "The step is z + (sigma_next - sigma) (z - D) / sigma, with D from the guided v.",
    )

    clean = ask(solution, z, v, v_null, one, sigma, torch.tensor(0.0))
    at_zero = clean_estimate(v[None], z[None], sigma[None])[0]
    expect_close(
        clean, at_zero, "A step to sigma_next = 0 should land on the clean estimate D itself."
    )


def triangle_at(azimuth: Tensor, peak: float) -> Tensor:
    """The triangle over azimuths [N] in radians instead of frame numbers: 1 at the
    front, `peak` at the back.
    """
    turn = (azimuth / (2 * math.pi)) % 1
    return 1 + (peak - 1) * (1 - (2 * turn - 1).abs())


@checker
def check_guidance_at(solution) -> None:
    """azimuth [N] in radians, peak -> guidance weight [N]."""
    # SV3D's order: the condition view is the last
    even = torch.arange(1, 17) * (2 * math.pi / 16) % (2 * math.pi)
    answer = ask(solution, even, 2.5)
    expect_shape(answer, even.shape)
    triangle = triangle_at(even, 2.5)
    expect_not(
        answer,
        {
            (
                "You counted frames; cameras may stand anywhere, so use their azimuths."
            ): triangular_guidance(16, 2.5),
            "The triangle is upside down: 1 at azimuth 0, the peak at the back.": 3.5 - triangle,
            "The triangle starts at 0; weight 1 is no guidance, so it starts at 1.": 2.5
            * (triangle - 1)
            / 1.5,
            "The peak is 1 + peak at the back; it should be peak.": 1 + 2.5 * (triangle - 1) / 1.5,
            "Azimuths are radians here: the back is at pi, not at 180.": triangle_at(
                even * math.pi / 180, 2.5
            ),
            "This is a smooth wave; SV3D's guidance is linear between front and back.": 1
            + 0.75 * (1 - even.cos()),
        },
    )
    expect_close(
        answer, triangle, "Halfway to the back (pi / 2) the weight is halfway to the peak."
    )
    uneven = torch.tensor([0.3, 0.5, 3.0, math.pi, 6.0])
    hint = "The front (0) has 1, the back (pi) the peak, wherever the other cameras stand."
    expect_close(ask(solution, uneven, 3.0), triangle_at(uneven, 3.0), hint)
    # the same direction from both sides of the front
    around = torch.tensor([-0.5, 2 * math.pi + 0.5])
    hint = (
        "Azimuth is an angle: -0.5 and 2 pi + 0.5 are both 0.5 away "
        "from the front. Bring it into one turn first."
    )
    expect_close(ask(solution, around, 3.0), triangle_at(around, 3.0), hint)
