"""Notebook 01: what its cells define equals the library, and its checkers know right
from wrong.
"""

import math

import pytest
import torch
from notebook_world import accepts, definitions, rejects
from tiny_world import tiny_config

from gsv3d_lib import diffusion, vae
from gsv3d_lib.course.exercises import diffusion as checks


@pytest.fixture(scope="module")
def cells():
    return definitions("01")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIGMA = torch.tensor([0.2, 6.0])
CLEAN, NOISE = randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2, seed=1)
NOISY = CLEAN + diffusion.frames_like(SIGMA, CLEAN) * NOISE
CONDITION = diffusion.Condition(
    randn(2, 1, 8), randn(2, 4, 2, 2), torch.ones(2, 3), torch.ones(2, 3)
)


def network(sample, c_noise, token, *_):
    """A stand-in for the U-Net: some function of what it is given, each orbit for
    itself.
    """
    return sample[:, :, :4].tanh() + 0.1 * diffusion.frames_like(
        token.mean((1, 2)) + c_noise, sample
    )


# ------------------------------------------------------------- the notebook's functions


def test_scaled_latents(cells):
    torch.manual_seed(0)
    autoencoder = vae.build_vae(tiny_config()).requires_grad_(False)
    images = torch.rand(2, 64, 64, 3)
    assert torch.allclose(
        cells["scaled_latents"](autoencoder, images),
        vae.encode_scaled(autoencoder, images),
        atol=1e-5,
    )


def test_scalings_and_both_directions(cells):
    levels = torch.logspace(-3, 3, 50)
    for ours, library in zip(cells["edm_scalings"](levels), diffusion.scalings(levels)):
        assert torch.allclose(ours, library, atol=1e-5)
    v = cells["v_from_clean"](CLEAN, NOISY, SIGMA)
    assert torch.allclose(v, diffusion.v_target(CLEAN, NOISY, SIGMA), atol=1e-5)
    assert torch.allclose(
        cells["clean_from_v"](NOISE, NOISY, SIGMA),
        diffusion.clean_estimate(NOISE, NOISY, SIGMA),
        atol=1e-5,
    )


def test_the_weighted_loss_is_the_library_s(cells):
    loss, estimate = diffusion.diffusion_loss(network, CLEAN, NOISE, SIGMA, CONDITION)
    assert torch.allclose(cells["weighted_loss"](estimate, CLEAN, SIGMA), loss, rtol=1e-5)


def test_estimate_at_one_level(cells):
    one = diffusion.Condition(
        *(x[:1] for x in (CONDITION.token, CONDITION.latent, CONDITION.polar, CONDITION.azimuth))
    )
    z, estimate = cells["estimate_at"](network, CLEAN[0], NOISE[0], 6.0, one)
    assert torch.allclose(z, CLEAN[0] + 6 * NOISE[0])
    assert torch.allclose(
        estimate, diffusion.denoise(network, z[None], torch.tensor([6.0]), one)[0], atol=1e-5
    )


def test_the_mixture_denoiser_is_the_score(cells):
    """Tweedie's formula: E[z0 | z] = z + sigma^2 d/dz ln p(z; sigma)."""
    weights, means = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 0.5]).double()
    z = torch.linspace(-3, 3, 9).double().requires_grad_()
    for sigma in (0.1, 1.0, 30.0):
        normal = torch.distributions.Normal(means, math.hypot(0.2, sigma))
        log_density = (normal.log_prob(z[:, None]) + weights.log()).logsumexp(-1)
        (score,) = torch.autograd.grad(log_density.sum(), z)
        found = cells["mixture_denoiser"](z.detach(), sigma, weights, means, 0.2)
        assert torch.allclose(found, (z + sigma**2 * score).detach(), atol=1e-6)


def test_the_exact_path_of_one_normal(cells):
    """A single component: quantiles only shrink with the deviation."""
    one, mean = torch.ones(1).double(), torch.tensor([0.4]).double()
    quantiles = torch.tensor([0.1, 0.5, 0.9]).double()
    for sigma in (0.0, 1.0, 80.0):
        expected = 0.4 + math.hypot(0.3, sigma) * torch.special.ndtri(quantiles)
        assert torch.allclose(
            cells["exact_path"](quantiles, sigma, one, mean, 0.3), expected, atol=1e-6
        )


def test_many_euler_steps_follow_the_exact_path(cells):
    mixture = dict(
        weights=torch.tensor([0.4, 0.6]).double(),
        means=torch.tensor([-1.0, 1.0]).double(),
        spread=0.3,
    )
    quantiles = torch.tensor([0.1, 0.3, 0.6, 0.9]).double()
    start, truth = (cells["exact_path"](quantiles, sigma, **mixture) for sigma in (80.0, 0.0))
    errors = []
    for steps in (50, 200):
        points = cells["euler_mixture"](
            start, cells["karras_sigmas"](steps, 0.002, 80.0), **mixture
        )
        errors.append((points[-1] - truth).abs().mean())
    assert points.shape == (201, 4) and errors[1] < 0.4 * errors[0] and errors[1] < 0.02


def test_sampler_by_hand(cells):
    config = tiny_config()
    scheduler = diffusion.build_scheduler(config)
    scheduler.set_timesteps(6)
    levels = cells["karras_sigmas"](6, config.sigma_min, config.sigma_max)
    assert torch.allclose(levels, scheduler.sigmas.double(), rtol=1e-5)
    step = cells["euler_step"](NOISY, CLEAN, torch.tensor(4.0), torch.tensor(1.0))
    assert torch.allclose(step, 0.25 * NOISY + 0.75 * CLEAN, atol=1e-5)

    start = randn(2, 3, 4, 2, 2) * scheduler.init_noise_sigma
    options = dict(steps=6, progress=False)
    library = diffusion.sample(
        network,
        CONDITION,
        config,
        guidance=1.0,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    seen = []
    ours = cells["euler_sample"](
        network, CONDITION, levels.float(), start, lambda *step: seen.append(step)
    )
    assert torch.allclose(ours, library, atol=1e-4) and len(seen) == 6


def test_guidance_by_hand(cells):
    config = tiny_config()
    for frames, peak in ((16, 2.5), (5, 4.0)):
        assert torch.allclose(
            cells["triangle"](frames, peak), diffusion.triangular_guidance(frames, peak), atol=1e-5
        )
    weight = torch.tensor([0.0, 1.0, 3.0])
    guided = cells["guide"](CLEAN, NOISE, weight)
    assert torch.allclose(guided[:, 0], NOISE[:, 0]) and torch.allclose(guided[:, 1], CLEAN[:, 1])
    assert torch.allclose(guided[:, 2], 3 * CLEAN[:, 2] - 2 * NOISE[:, 2], atol=1e-5)

    one = diffusion.Condition(
        *(x[:1] for x in (CONDITION.token, CONDITION.latent, CONDITION.polar, CONDITION.azimuth))
    )
    levels = cells["karras_sigmas"](5, config.sigma_min, config.sigma_max).float()
    start = randn(1, 3, 4, 2, 2) * (levels[0] ** 2 + 1).sqrt()
    ours = cells["guided_sample"](
        network, one, diffusion.triangular_guidance(3, 3.0), levels, start
    )
    library = diffusion.sample(
        network,
        one,
        config,
        guidance=3.0,
        steps=5,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    assert torch.allclose(ours, library[0], atol=1e-4)


# ---------------------------------------------------------------- the checkers


def right_scalings(sigma, sigma_data):
    """The library's, in units in which the data has deviation 1."""
    c_skip, c_out, c_in, _ = diffusion.scalings(sigma / sigma_data)
    return c_skip, c_out * sigma_data, c_in / sigma_data, sigma.log() / 4


WRONG_SCALINGS = {
    "wrong sign": lambda s, d: (lambda a, b, c, e: (a, -b, c, e))(*right_scalings(s, d)),
    "divide by its standard deviation": lambda s, d: (lambda a, b, c, e: (a, b, c**2, e))(
        *right_scalings(s, d)
    ),
    "nothing changes with sigma_data = 0.5": lambda s, d: diffusion.scalings(s),
    "quarter of the logarithm": lambda s, d: (*right_scalings(s, d)[:3], s.log()),
    "the data's share": lambda s, d: (1 - right_scalings(s, d)[0], *right_scalings(s, d)[1:]),
    "natural logarithm": lambda s, d: (*right_scalings(s, d)[:3], s.log10() / 4),
    "four tensors": lambda s, d: right_scalings(s, d)[:3],
}


def test_check_scalings():
    assert accepts(checks.check_scalings, right_scalings)
    for sentence, wrong in WRONG_SCALINGS.items():
        assert rejects(checks.check_scalings, wrong, sentence)


def right_step(z, v, v_null, weight, sigma, sigma_next):
    """diffusers' scheduler, given the library's guidance."""
    scheduler = diffusion.build_scheduler(tiny_config())
    scheduler.set_timesteps(2)
    scheduler.is_scale_input_called = True
    scheduler.sigmas = torch.stack([sigma, sigma_next])
    guided = v_null + weight[:, None, None, None] * (v - v_null)
    return scheduler.step(guided, scheduler.timesteps[0], z).prev_sample


def column(weight):
    return weight[:, None, None, None]


WRONG_STEPS = {
    "where w = 0 means no guidance": lambda z, v, n, w, s, t: right_step(z, v, n, w + 1, s, t),
    "swapped": lambda z, v, n, w, s, t: right_step(z, n, v, w, s, t),
    "columns of the latents": lambda z, v, n, w, s, t: right_step(
        z, n + w * (v - n), n, torch.ones_like(w), s, t
    ),
    "You followed v itself": lambda z, v, n, w, s, t: z + (t - s) * (n + column(w) * (v - n)),
    "You took v for the clean estimate": lambda z, v, n, w, s, t: (
        z + (t - s) * (z - (n + column(w) * (v - n))) / s
    ),
    "up in noise": lambda z, v, n, w, s, t: 2 * z - right_step(z, v, n, w, s, t),
    "division by sigma": lambda z, v, n, w, s, t: z + s * (right_step(z, v, n, w, s, t) - z),
    "guidance is missing": lambda z, v, n, w, s, t: right_step(z, v, n, torch.ones_like(w), s, t),
    "should have shape": lambda z, v, n, w, s, t: right_step(z, v, n, w, s, t)[None],
}


def test_check_guided_step():
    assert accepts(checks.check_guided_step, right_step)
    for sentence, wrong in WRONG_STEPS.items():
        assert rejects(checks.check_guided_step, wrong, sentence)

    def in_place(z, *rest):
        return z.copy_(right_step(z, *rest))

    assert rejects(checks.check_guided_step, in_place, "changed the z")


def draw_with(first=None, last=0, slope=lambda z, d, s, t: (z - d) / s):
    def draw_samples(denoise, levels, count):
        z = (first or levels[0]) * torch.randn(count, dtype=torch.float64)
        for s, t in zip(levels[: -1 - last], levels[1:]):
            z = z + (t - s) * slope(z, denoise(z, s), s, t)
        return z

    return draw_samples


def test_the_seeded_bug_is_told_and_found(cells, capsys):
    assert not checks.check_draw_samples(cells["draw_samples"])
    assert "samples have deviation 0.006, the data have 0.5" in capsys.readouterr().out
    assert accepts(checks.check_draw_samples, draw_with())
    assert rejects(checks.check_draw_samples, draw_with(first=40.0), "have deviation 0.24")
    assert rejects(checks.check_draw_samples, draw_with(first=80.0), "begin at 20, not at 80")
    assert rejects(checks.check_draw_samples, draw_with(last=60), "have deviation")
    assert rejects(
        checks.check_draw_samples, draw_with(slope=lambda z, d, s, t: (z - d) / t), "inf or nan"
    )


def heun_with(second="mean", at="end", last="euler", calls=1):
    def heun_sample(denoise, z, levels):
        for s, t in zip(levels[:-1], levels[1:]):
            slope = (z - denoise(z, s)) / s
            end = z + (t - s) * slope
            if t > 0 or last == "heun":
                for _ in range(calls):
                    there = (end - denoise(end if at == "end" else z, t)) / t
                slope = {"mean": (slope + there) / 2, "end": there, "none": slope}[second]
            z = z + (t - s) * slope
        return z

    return heun_sample


def euler_alone(denoise, z, levels):
    for s, t in zip(levels[:-1], levels[1:]):
        z = z + (t - s) * (z - denoise(z, s)) / s
    return z


def test_check_heun_sample():
    assert accepts(checks.check_heun_sample, heun_with())
    wrong = {
        "That is Euler": euler_alone,
        "At which point, and at which noise level": heun_with(second="end"),
        "nan: at noise level 0": heun_with(last="heun"),
        "two per step": heun_with(calls=2),
        "not a solver": lambda denoise, z, levels: z,
    }
    for sentence, solution in wrong.items():
        assert rejects(checks.check_heun_sample, solution, sentence)


def test_the_exact_path_solves_the_equation(cells):
    mixture = dict(
        weights=torch.tensor([0.2, 0.5, 0.3]).double(),
        means=torch.tensor([-1.4, 0.2, 1.6]).double(),
        spread=0.15,
    )
    quantiles = (torch.arange(24, dtype=torch.float64) + 0.5) / 24
    for sigma in (0.2, 0.7, 5.0):
        z, up, down = (
            cells["exact_path"](quantiles, sigma + d, **mixture) for d in (0, 1e-4, -1e-4)
        )
        slope = (z - cells["mixture_denoiser"](z, sigma, **mixture)) / sigma
        assert torch.allclose((up - down) / 2e-4, slope, atol=1e-4)


def test_batches_are_of_the_mixture(cells):
    torch.manual_seed(0)
    mixture = dict(
        weights=torch.tensor([0.25, 0.75]).double(), means=torch.tensor([-2.0, 2.0]), spread=0.1
    )
    data, sigma, noise = cells["draw_batch"](20_000, **mixture)
    assert abs((data > 0).float().mean() - 0.75) < 0.02 and abs(data[data > 0].std() - 0.1) < 0.01
    assert abs(sigma.log().mean() + 0.5) < 0.05 and abs(sigma.log().std() - 1.5) < 0.05
    assert abs(noise.std() - 1) < 0.02


def test_sharpness_is_of_edges(cells):
    flat, edge = torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 3)
    edge[:, :, 4:] = 1
    assert cells["sharpness"](flat) == 0
    assert cells["sharpness"](edge) == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        ("check_scalings", "scalings_for"),
        ("check_guided_step", "guided_step"),
        ("check_heun_sample", "heun_sample"),
    ],
)
def test_stubs_are_not_written_yet(cells, check, stub, capsys):
    assert not getattr(checks, check)(cells[stub])
    assert "not written yet" in capsys.readouterr().out
