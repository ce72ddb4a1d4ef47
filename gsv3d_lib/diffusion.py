"""EDM diffusion as SV3D uses it: noise levels, preconditioning, guidance, sampling.

A noisy latent is z = z0 + sigma n with n ~ N(0, 1). The U-Net F predicts "v"; the
denoiser built from it is

    D(z; sigma) = c_skip z + c_out F(c_in z, c_noise)                             (1)

    c_skip = 1 / (sigma^2 + 1)      c_out   = -sigma / sqrt(sigma^2 + 1)
    c_in   = 1 / sqrt(sigma^2 + 1)  c_noise = ln(sigma) / 4

(Karras et al. 2022, with sigma_data = 1). A loss on D with the weight
(sigma^2 + 1) / sigma^2 is the plain mean squared error on F: `diffusion_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from .config import Config
from .system.arguments import real, whole

if TYPE_CHECKING:
    from diffusers import EulerDiscreteScheduler

    from .data.examples import Example
    from .unet import SV3DUNet

MAX_STEPS = 1000  # of the sampler
MAX_GUIDANCE = 100.0  # far beyond what any picture survives


@dataclass
class Condition:
    """What SV3D_p knows about the input image R and the orbit; B orbits of N views.

    token [B, 1, D]: CLIP embedding of R.
    latent [B, 4, h, w]: VAE mode of R, NOT multiplied by 0.18215.
    polar, azimuth [B, N]: radians; the condition view is the last frame, at azimuth 0.
    """

    token: Tensor
    latent: Tensor
    polar: Tensor
    azimuth: Tensor
    cond_aug: float = 1e-5

    def with_null(self) -> Condition:
        """These B conditions, then their B null conditions."""
        token, latent, polar, azimuth = (
            torch.cat([t, t]) for t in (self.token, self.latent, self.polar, self.azimuth)
        )
        keep = self.token.new_ones(len(token))
        keep[len(self.token) :] = 0
        return Condition(token, latent, polar, azimuth, self.cond_aug).dropped(keep)

    def dropped(self, keep: Tensor | None = None) -> Condition:
        """The null condition where `keep` [B] is 0, everywhere if it is None.

        Its token and latent are zero; the angles stay.
        """
        keep = self.token.new_zeros(len(self.token)) if keep is None else keep.to(self.token)
        return replace(
            self,
            token=self.token * keep[:, None, None],
            latent=self.latent * keep[:, None, None, None],
        )


def scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise of equation (1), each shaped like sigma."""
    root = (sigma**2 + 1).sqrt()
    return 1 / root**2, -sigma / root, 1 / root, sigma.log() / 4


def frames_like(values: Tensor, latents: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1, 1], to multiply with latents [B, N, 4, h, w]."""
    return values.reshape(-1, *[1] * (latents.ndim - 1))


def predict_v(unet: SV3DUNet, noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """F(c_in z, c_noise; condition), shaped as noisy [B, N, 4, h, w]; sigma [B]."""
    if noisy.ndim != 5 or sigma.shape != noisy.shape[:1]:
        raise ValueError(
            "Noisy latents are [B, N, 4, h, w] with sigma [B]; "
            f"got {tuple(noisy.shape)}, {tuple(sigma.shape)}."
        )
    _, _, c_in, c_noise = scalings(sigma)
    image = condition.latent[:, None].expand(-1, noisy.shape[1], -1, -1, -1)
    sample = torch.cat([frames_like(c_in, noisy) * noisy, image], dim=2)
    known = condition.token, condition.polar, condition.azimuth, condition.cond_aug
    return unet(sample, c_noise, *known)


def denoise(unet: SV3DUNet, noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """The one-step clean estimate z_hat = D(z; sigma), equation (1). [B, N, 4, h, w]"""
    return clean_estimate(predict_v(unet, noisy, sigma, condition), noisy, sigma)


def clean_estimate(v: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """D of equation (1) from the network's output: c_skip z + c_out v."""
    c_skip, c_out, _, _ = scalings(sigma)
    return frames_like(c_skip, noisy) * noisy + frames_like(c_out, noisy) * v


def v_target(clean: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """The F that makes D exact: (z0 - c_skip z) / c_out."""
    c_skip, c_out, _, _ = scalings(sigma)
    return (clean - frames_like(c_skip, noisy) * noisy) / frames_like(c_out, noisy)


def diffusion_loss(
    unet: SV3DUNet, clean: Tensor, noise: Tensor, sigma: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    """L_2D, the EDM-weighted loss as MSE on v; and z_hat [B, N, 4, h, w]."""
    noisy = clean + frames_like(sigma, clean) * noise
    v = predict_v(unet, noisy, sigma, condition)
    loss = (v - v_target(clean, noisy, sigma)).pow(2).mean()
    return loss, clean_estimate(v, noisy, sigma)


def draw_sigma(generator: torch.Generator, config: Config) -> Tensor:
    """One noise level per clip: ln sigma ~ N(0.7, 1.6^2). A scalar."""
    log_sigma = config.log_sigma_mean + config.log_sigma_std * torch.randn((), generator=generator)
    return log_sigma.exp()


def diffusion_draws(latents: Tensor, generator: torch.Generator, config: Config) -> Example:
    """The random numbers of one example: noise, sigma, and is the condition kept?"""
    return {
        "noise": torch.randn(latents.shape, generator=generator),
        "sigma": draw_sigma(generator, config),
        "keep": (torch.rand((), generator=generator) >= config.cond_dropout).float(),
    }


def triangular_guidance(num_frames: int, peak: float) -> Tensor:
    """Guidance scale per frame [N]: 1 at both ends, up to `peak` between.

    This is the form in Stability's code. Where N is even the peak falls between two
    frames: with N = 16 and peak 2.5 the largest scale is 2.4.
    """
    return 1 + (peak - 1) * (1 - (2 * torch.linspace(0, 1, num_frames) - 1).abs())


def guided_v(
    unet: SV3DUNet, noisy: Tensor, sigma: Tensor, condition: Condition, weight: Tensor
) -> Tensor:
    """v_null + weight (v - v_null).

    noisy [B, N, 4, h, w], sigma [B]; weight broadcasts to noisy. The network gets both
    conditions as one batch: faster than two passes, for twice the memory.
    """
    twice = torch.cat([noisy, noisy])
    v, null = predict_v(unet, twice, torch.cat([sigma, sigma]), condition.with_null()).chunk(2)
    return null + weight * (v - null)


def build_scheduler(config: Config) -> EulerDiscreteScheduler:
    """diffusers' Euler sampler as SVD has it: Karras sigmas, continuous timesteps."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )


def sampler_settings(
    config: Config, steps: int | None, guidance: float | None
) -> tuple[int, float]:
    """Steps and peak of the guidance: what is given, else the configuration's.

    Raises UserError for steps not from 1 to 1000 and for guidance not from 0 to 100.
    """
    steps = whole("steps", config.sampling_steps if steps is None else steps, 1, MAX_STEPS)
    peak = real("guidance", config.guidance if guidance is None else guidance, 0.0, MAX_GUIDANCE)
    return steps, peak


@torch.no_grad()
def sample(
    unet: SV3DUNet,
    condition: Condition,
    config: Config,
    *,
    generator: torch.Generator | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    progress: bool = True,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Latents [B, N, 4, h, w] of orbits, by Euler's method from pure noise.

    guidance: peak of the triangular guidance; 1 switches it off and halves the cost.
    callback(i, z, z_hat): if given, it sees every step.
    Raises UserError as `sampler_settings`.
    """
    steps, peak = sampler_settings(config, steps, guidance)
    scheduler = build_scheduler(config)
    scheduler.set_timesteps(steps, device=condition.token.device)
    scheduler.is_scale_input_called = True  # `predict_v` multiplies by c_in itself
    batch, frames = condition.polar.shape
    noise = torch.randn(batch, frames, *condition.latent.shape[1:], generator=generator)
    z = noise.to(condition.token) * scheduler.init_noise_sigma
    weight = triangular_guidance(frames, peak).to(z)[:, None, None, None]
    bar = tqdm(scheduler.timesteps, desc="sampling", disable=not progress, mininterval=1)
    for i, timestep in enumerate(bar):
        sigma = scheduler.sigmas[i].to(z).expand(batch)
        if peak == 1:
            v = predict_v(unet, z, sigma, condition)
        else:
            v = guided_v(unet, z, sigma, condition, weight)
        output = cast(Any, scheduler.step(v, timestep, z))
        z = output.prev_sample
        if callback is not None:
            callback(i, z, output.pred_original_sample)
    return z
