"""EDM against closed forms: the one distribution whose denoiser and whose ODE are known
exactly is a Gaussian.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from tiny_world import randn, tiny_config
from torch import Tensor

from gsv3d_lib.config import preset
from gsv3d_lib.diffusion import (
    Condition,
    build_scheduler,
    denoise,
    diffusion_draws,
    diffusion_loss,
    draw_sigma,
    frames_like,
    predict_v,
    sample,
    scalings,
    triangular_guidance,
    v_target,
)
from gsv3d_lib.unet import angle_features

BATCH, FRAMES, SIDE = 2, 3, 4
SHAPE = (BATCH, FRAMES, 4, SIDE, SIDE)
SIGMAS = torch.tensor([0.05, 1.0, 30.0])


def condition(batch: int = BATCH, frames: int = FRAMES) -> Condition:
    polar, azimuth = torch.full((batch, frames), 1.3), torch.arange(frames).expand(batch, -1) * 0.5
    return Condition(
        randn(batch, 1, 8, seed=1), randn(batch, 4, SIDE, SIDE, seed=2) * 5, polar, azimuth
    )


@dataclass
class GaussianUNet:
    """The exact network for data ~ N(mean, std^2): v of the posterior mean E[z0 | z,
    sigma].
    """

    mean: float = 0.4
    std: float = 0.5
    calls: list = field(default_factory=list)

    def __call__(self, sample, c_noise, token, polar, azimuth, cond_aug) -> Tensor:
        self.calls.append((sample, c_noise, token, polar, azimuth))
        sigma = (4 * c_noise).exp()
        c_skip, c_out, c_in, _ = (frames_like(c, sample) for c in scalings(sigma))
        noisy, sigma = sample[:, :, :4] / c_in, frames_like(sigma, sample)
        posterior = (self.std**2 * noisy + sigma**2 * self.mean) / (self.std**2 + sigma**2)
        return (posterior - c_skip * noisy) / c_out

    def ode(self, start: Tensor, from_sigma: float, to_sigma: float) -> Tensor:
        """The exact solution of dz/dsigma = (z - D) / sigma."""
        shrink = math.sqrt((self.std**2 + to_sigma**2) / (self.std**2 + from_sigma**2))
        return self.mean + (start - self.mean) * shrink


# ---------------------------------------------------------------- preconditioning


def test_preconditioning_identities():
    sigma = torch.logspace(-3, 3, 50, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = scalings(sigma)
    one = torch.ones_like(sigma)
    # the input of the network has unit variance
    assert torch.allclose(c_in**2 * (sigma**2 + 1), one)
    target_variance = (1 - c_skip) ** 2 / c_out**2 + c_skip**2 * sigma**2 / c_out**2
    assert torch.allclose(target_variance, one)  # and so has its target, for unit data
    assert torch.allclose(c_out**2 * (sigma**2 + 1) / sigma**2, one)  # EDM's weight cancels c_out^2
    assert (c_out < 0).all() and torch.allclose(c_noise, sigma.log() / 4)
    assert torch.allclose(c_skip, c_in**2) and torch.allclose(c_out, -sigma * c_in)


def test_v_target_makes_denoise_exact():
    clean, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    for sigma in SIGMAS.expand(BATCH, -1).T:
        noisy = clean + frames_like(sigma, clean) * noise
        perfect = lambda *_, noisy=noisy, sigma=sigma: v_target(clean, noisy, sigma)  # noqa: E731
        # c_out v cancels c_skip z: float32 rounding grows with sigma
        tolerance = 1e-5 * max(1, float(sigma[0]))
        assert torch.allclose(denoise(perfect, noisy, sigma, condition()), clean, atol=tolerance)


def test_v_target_is_the_velocity_of_the_angle():
    """With z = cos(t) z0 + sin(t) n after scaling by c_in, v = cos(t) n - sin(t) z0,
    the classic definition.
    """
    clean, noise, sigma = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0.7, 3.0])
    angle = frames_like(sigma.atan(), clean)
    noisy = clean + frames_like(sigma, clean) * noise
    expected = angle.cos() * noise - angle.sin() * clean
    assert torch.allclose(v_target(clean, noisy, sigma), expected, atol=1e-5)


def test_the_loss_is_edm_weighted_denoising():
    clean, noise, sigma = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0.3, 4.0])
    loss, z_hat = diffusion_loss(GaussianUNet(), clean, noise, sigma, condition())
    noisy = clean + frames_like(sigma, clean) * noise
    denoised = denoise(GaussianUNet(), noisy, sigma, condition())
    weight = frames_like((sigma**2 + 1) / sigma**2, clean)
    assert torch.allclose(loss, (weight * (denoised - clean) ** 2).mean(), rtol=1e-5)
    assert torch.equal(z_hat, denoised)


def test_small_sigma_returns_the_input():
    clean = randn(*SHAPE)
    sigma = torch.full((BATCH,), 1e-6)
    _, z_hat = diffusion_loss(
        lambda *_: randn(*SHAPE, seed=5), clean, randn(*SHAPE, seed=1), sigma, condition()
    )
    assert torch.allclose(z_hat, clean, atol=1e-4)


def test_wrong_shapes_are_refused_with_the_shape():
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 4\), \(2,\)"):
        predict_v(None, randn(2, 4, 4, 4), torch.ones(2), condition())
    with pytest.raises(ValueError, match=r"\(3,\)"):
        predict_v(None, randn(*SHAPE), torch.ones(3), condition())


# ---------------------------------------------------------------- conditioning


def test_the_concatenated_latent_is_unscaled_and_on_every_frame():
    unet, given, noisy, sigma = (
        GaussianUNet(),
        condition(),
        randn(*SHAPE),
        torch.tensor([0.5, 20.0]),
    )
    predict_v(unet, noisy, sigma, given)
    network_input, c_noise, token, polar, azimuth = unet.calls[0]
    assert network_input.shape == (BATCH, FRAMES, 8, SIDE, SIDE)
    for frame in range(FRAMES):  # not times 0.18215, and not times c_in
        assert torch.equal(network_input[:, frame, 4:], given.latent)
    assert torch.allclose(
        network_input[:, :, :4], noisy / frames_like((sigma**2 + 1).sqrt(), noisy)
    )
    assert torch.allclose(c_noise, sigma.log() / 4)
    assert token is given.token and polar is given.polar and azimuth is given.azimuth


def test_the_null_condition_keeps_the_angles():
    given = condition()
    null = given.dropped()
    assert (null.token == 0).all() and (null.latent == 0).all()
    assert torch.equal(null.polar, given.polar) and torch.equal(null.azimuth, given.azimuth)
    assert null.cond_aug == given.cond_aug and (given.token != 0).any()
    half = given.dropped(torch.tensor([1.0, 0.0]))  # jointly, per orbit
    assert torch.equal(half.token[0], given.token[0]) and torch.equal(
        half.latent[0], given.latent[0]
    )
    assert (half.token[1] == 0).all() and (half.latent[1] == 0).all()


def test_the_paper_preset_has_sv3d_s_noise_and_guidance():
    paper = preset("paper")
    assert (paper.sigma_min, paper.sigma_max, paper.guidance, paper.sampling_steps) == (
        0.002,
        700.0,
        2.5,
        50,
    )
    assert (paper.log_sigma_mean, paper.log_sigma_std, paper.cond_aug) == (0.7, 1.6, 1e-5)
    assert (paper.latent_scale, paper.cond_dropout, paper.num_frames) == (0.18215, 0.1, 16)


def test_dropout_and_noise_follow_their_distributions():
    config = tiny_config()
    generator = torch.Generator().manual_seed(0)
    draws = [diffusion_draws(torch.empty(1, 4, 1, 1), generator, config) for _ in range(3000)]
    keep = torch.stack([d["keep"] for d in draws])
    assert set(keep.tolist()) == {0.0, 1.0} and 0.88 < keep.mean() < 0.92
    log_sigma = torch.stack([d["sigma"] for d in draws]).log()
    assert log_sigma.mean() == pytest.approx(0.7, abs=0.1) and log_sigma.std() == pytest.approx(
        1.6, abs=0.08
    )
    noise = torch.stack([d["noise"] for d in draws])
    assert noise.mean() == pytest.approx(0, abs=0.03) and noise.std() == pytest.approx(1, abs=0.03)
    assert draw_sigma(torch.Generator().manual_seed(4), config).ndim == 0  # one per clip


def test_angles_are_embedded_as_cosines_then_sines():
    polar, azimuth = torch.tensor([[1.2, 1.2]]), torch.tensor([[0.5, 6.0]])
    features = angle_features(polar, azimuth, 1e-5)
    assert features.shape == (1, 2, 1280)

    def closed_form(value: float, width: int) -> Tensor:
        frequencies = torch.tensor([10000.0 ** (-k / (width // 2)) for k in range(width // 2)])
        return torch.cat([(value * frequencies).cos(), (value * frequencies).sin()])

    for frame in range(2):
        expected = [
            closed_form(1e-5, 256),
            closed_form(float(polar[0, frame]), 512),
            closed_form(float(azimuth[0, frame]), 512),
        ]
        assert torch.allclose(features[0, frame], torch.cat(expected), atol=1e-5)


# ---------------------------------------------------------------- guidance


def test_guidance_is_a_triangle_with_its_peak_at_the_back():
    """The numbers of Stability's `TrianglePredictionGuider`: a triangle wave of period
    1 over linspace(0, 1, N).
    """
    wave = 2 * (torch.linspace(0, 1, 21) - (torch.linspace(0, 1, 21) + 0.5).floor()).abs()
    assert torch.allclose(triangular_guidance(21, 2.5), 1.5 * wave + 1)
    weights = triangular_guidance(16, 2.5)
    assert weights[0] == weights[-1] == 1 and weights.max() == pytest.approx(2.4)
    assert torch.allclose(weights, weights.flip(0))
    assert torch.allclose(triangular_guidance(5, 3.0), torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]))
    assert torch.equal(triangular_guidance(8, 1.0), torch.ones(8))


def test_guidance_extrapolates_from_the_null_condition():
    """A network that says 1 for an orbit with a token and 0 without: the guided v is
    the weight of the frame.
    """
    seen = []

    def unet(network_input, c_noise, token, *_):
        return torch.ones_like(network_input[:, :, :4]) * frames_like(
            (token != 0).any(-1), network_input
        )

    config = tiny_config()
    sample(
        unet,
        condition(frames=4),
        config,
        steps=1,
        guidance=3.0,
        generator=torch.Generator().manual_seed(0),
        progress=False,
        callback=lambda i, z, z_hat: seen.append(z_hat),
    )
    sigma = torch.tensor(config.sigma_max)
    start = randn(BATCH, 4, 4, SIDE, SIDE) * (sigma**2 + 1).sqrt()
    c_skip, c_out, _, _ = scalings(sigma)
    v = triangular_guidance(4, 3.0)[:, None, None, None]
    assert torch.allclose(seen[0], c_skip * start + c_out * v, atol=1e-4)


def test_guidance_1_asks_the_network_without_the_null_condition():
    for guidance, orbits in ((1.0, BATCH), (2.0, 2 * BATCH)):
        unet = GaussianUNet()
        sample(unet, condition(), tiny_config(), steps=5, guidance=guidance, progress=False)
        assert [len(token) for _, _, token, *_ in unet.calls] == 5 * [orbits]


# ---------------------------------------------------------------- the sampler


def karras(steps: int, low: float, high: float) -> Tensor:
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def run(steps: int, unet=None, **options) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return sample(
        unet or GaussianUNet(),
        condition(),
        tiny_config().replace(sigma_max=700.0),
        steps=steps,
        guidance=1.0,
        generator=generator,
        progress=False,
        **options,
    )


def test_the_scheduler_has_svd_sigmas():
    scheduler = build_scheduler(tiny_config().replace(sigma_max=700.0))
    scheduler.set_timesteps(20)
    assert torch.allclose(scheduler.sigmas.double(), karras(20, 0.002, 700.0), rtol=1e-4)
    assert torch.allclose(
        scheduler.timesteps.double(), scheduler.sigmas[:-1].double().log() / 4, atol=1e-5
    )


def test_sampling_is_euler_by_hand():
    """z <- z + (sigma' - sigma) (z - D) / sigma, written out in float64, from the same
    noise.
    """
    steps, exact = 12, GaussianUNet()
    sigmas = karras(steps, 0.002, 700.0)
    z = randn(*SHAPE, seed=3).double() * (700.0**2 + 1) ** 0.5
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        denoised = (exact.std**2 * z + now**2 * exact.mean) / (exact.std**2 + now**2)
        z = z + (then - now) * (z - denoised) / now
    assert torch.allclose(run(steps).double(), z, atol=2e-3)


def test_sampling_is_the_loop_of_diffusers():
    """The loop of StableVideoDiffusionPipeline around EulerDiscreteScheduler, without
    guidance.
    """
    steps, unet, given = 9, GaussianUNet(), condition()
    scheduler = build_scheduler(tiny_config())
    scheduler.set_timesteps(steps)
    z = randn(*SHAPE, seed=3) * scheduler.init_noise_sigma
    image = given.latent[:, None].expand(-1, FRAMES, -1, -1, -1)
    for timestep in scheduler.timesteps:
        network_input = torch.cat([scheduler.scale_model_input(z, timestep), image], dim=2)
        v = unet(
            network_input, timestep.expand(BATCH), given.token, given.polar, given.azimuth, 1e-5
        )
        z = scheduler.step(v, timestep, z).prev_sample
    assert torch.allclose(run(steps), z, atol=1e-3)


def test_more_steps_come_closer_to_the_exact_solution():
    """At sigma = 0 it is mean + (z - mean) std / sqrt(std^2 + sigma_max^2)."""
    exact = GaussianUNet()
    start = randn(*SHAPE, seed=3) * (700.0**2 + 1) ** 0.5
    truth = exact.ode(start, 700.0, 0.0)
    errors = [float((run(steps) - truth).abs().mean()) for steps in (10, 40, 160)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02


def test_sampling_is_deterministic_and_reports_every_step():
    seen = []
    first = run(6, callback=lambda i, z, z_hat: seen.append((i, z)))
    assert torch.equal(first, run(6)) and torch.equal(seen[-1][1], first)
    assert [i for i, _ in seen] == list(range(6))
    assert not first.requires_grad
