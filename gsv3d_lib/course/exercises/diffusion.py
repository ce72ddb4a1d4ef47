"""Checkers for notebook 01: the EDM scalings, one guided Euler step, samples all
alike, and a sampler of second order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...diffusion import clean_estimate, scalings
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
    given = z.clone()
    answer = ask(
        solution, given, v.clone(), v_null.clone(), weight.clone(), sigma.clone(), then.clone()
    )
    expect_shape(answer, z.shape)
    expect(torch.equal(given, z), "You changed the z that was given; make a new tensor.")

    column, row = weight[:, None, None, None], weight
    guided = v_null + column * (v - v_null)
    swapped = guided_step(z, v_null, v, weight, sigma, then)
    across = v_null + row * (v - v_null)
    one = torch.ones_like(weight)
    expect_not(
        answer,
        {
            (
                "That is v + w (v - v_null), where w = 0 means no guidance. Here w = 1 does: "
                "v_null + w (v - v_null)."
            ): guided_step(z, v, v_null, weight + 1, sigma, then),
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


# ------------------------------------------------- data of one dimension: one normal

MEAN, SPREAD = 0.4, 0.5
HIGHEST = 80.0


def levels_down(steps: int, highest: float = HIGHEST) -> Tensor:
    """Karras' noise levels [steps + 1] from the highest to 0.002, then 0; float64."""
    ends = torch.tensor([highest, 0.002], dtype=torch.float64) ** (1 / 7)
    ramp = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps, dtype=torch.float64))
    return torch.cat([ramp**7, torch.zeros(1, dtype=torch.float64)])


def denoise_normal(z: Tensor, sigma) -> Tensor:
    """E[z0 | z] where the data are N(MEAN, SPREAD^2)."""
    return (SPREAD**2 * z + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def end_of_path(z: Tensor) -> Tensor:
    """Where the exact path through z at HIGHEST ends; it keeps its quantile."""
    return MEAN + (z - MEAN) * SPREAD / math.hypot(SPREAD, HIGHEST)


@checker
def check_draw_samples(solution) -> None:
    """denoise, levels [steps + 1], count -> samples [count] of the data."""
    _expect_samples(solution, HIGHEST)
    _expect_samples(solution, HIGHEST / 4, " Here the levels begin at 20, not at 80.")


def _expect_samples(solution, highest: float, told: str = "") -> None:
    torch.manual_seed(0)
    samples = ask(solution, denoise_normal, levels_down(100, highest), 4000)
    expect_shape(samples, (4000,), "the samples")
    expect(torch.isfinite(samples).all(), "The samples hold inf or nan.")
    mean, spread = samples.mean().item(), samples.std().item()
    expect(
        abs(spread - SPREAD) < 0.04,
        f"The samples have deviation {spread:.3f}, the data have {SPREAD}.{told}",
    )
    expect(abs(mean - MEAN) < 0.04, f"The samples have mean {mean:.2f}, the data {MEAN}.{told}")


@checker
def check_heun_sample(solution) -> None:
    """denoise, z [M], levels [steps + 1] -> z at noise level 0 [M], second order."""
    calls, errors = [], []

    def denoise(z: Tensor, sigma) -> Tensor:
        calls.append(float(sigma))
        return denoise_normal(z, sigma)

    start = MEAN + math.hypot(SPREAD, HIGHEST) * torch.linspace(-2, 2, 9, dtype=torch.float64)
    for steps in (32, 128):
        calls.clear()
        answer = ask(solution, denoise, start.clone(), levels_down(steps))
        expect_shape(answer, start.shape, "z at noise level 0")
        expect(
            torch.isfinite(answer).all(),
            "nan: at noise level 0 there is no second slope; the last step is Euler's.",
        )
        expect(
            len(calls) <= 2 * steps,
            f"{len(calls)} calls for {steps} steps; two per step are enough.",
        )
        errors.append((answer - end_of_path(start)).abs().mean().item())
    slope = math.log(max(errors[1], 1e-15) / errors[0]) / math.log(4)
    expect(
        errors[0] < 0.5,
        (
            f"The samples are {errors[0]:.2g} away from the exact ones "
            f"with 32 steps: not a solver of (1.11) yet."
        ),
    )
    euler = (
        "That is Euler's method."
        if len(calls) < 200
        else "At which point, and at which noise level, is the second slope?"
    )
    expect(slope <= -1.8, f"slope {slope:.2f}; reach -1.8. {euler}")
    print(f"slope {slope:.2f}; the goal was -1.8. Error with 128 steps: {errors[1]:.1e}.")
