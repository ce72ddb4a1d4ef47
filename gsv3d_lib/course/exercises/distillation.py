"""Checkers of notebook 07: the merged LoRA, stage 2's loss, the latents' gradient."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...cameras import Cameras, orbit_cameras, sv3d_azimuths
from ...config import Config, preset
from ...decoder import GaussianDecoder, build_decoder
from ...distillation import sigma_weight
from ...losses import rendering_loss
from . import Wrong, ask, checker, expect, expect_close, expect_not, expect_shape


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- exercise 1


@checker
def check_merge_lora(solution) -> None:
    """merge_lora(weight [out, in], A [r, in], B [out, r], alpha) -> merged weight."""
    weight, A, B, alpha = _randn(6, 4), _randn(2, 4, seed=1), _randn(6, 2, seed=2), 8.0
    given = weight.clone()
    answer = ask(solution, weight, A, B, alpha)
    expect(
        torch.equal(weight, given),
        "Your function changed the frozen weight in place: return a new tensor.",
    )
    expect_shape(answer, (6, 4))
    update = B @ A
    mistakes = {
        "That is the update alone: the frozen weight has to be added.": alpha / 2 * update,
        "The scale alpha / r is missing: r is the number of rows of A.": weight + update,
        "You scaled by alpha; LoRA scales by alpha / r.": weight + alpha * update,
        "The scale is upside down: it is alpha / r, not r / alpha.": weight + 2 / alpha * update,
        "You divided by the inputs: r is the number of rows of A.": weight + alpha / 4 * update,
    }
    expect_not(answer, mistakes)
    expect_close(answer, weight + alpha / 2 * update, "The merged weight is W + (alpha / r) B A.")
    untouched = ask(solution, weight, A, torch.zeros(6, 2), alpha)
    expect_close(untouched, weight, "With B = 0 the merged weight is W itself.")


# ---------------------------------------------------------------- exercise 2


@checker
def check_stage2_loss(solution) -> None:
    """stage2_loss(loss_2d, losses_3d [B], sigma [B], lambda_3d, weighting) -> []."""
    loss_2d, losses, sigma = (
        torch.tensor(0.3),
        torch.tensor([0.1, 0.5, 0.2]),
        torch.tensor([0.0, 1.0, 3.0]),
    )
    plain = ask(solution, loss_2d, losses, sigma, 2.0, "none")
    expect_shape(plain, (), "the loss")
    truth, weight = loss_2d + 2 * losses.mean(), sigma_weight(sigma, "snr")
    weighted = loss_2d + 2 * (weight * losses).mean()
    mistakes = {
        "You summed over the objects: L_3D is their mean.": loss_2d + 2 * losses.sum(),
        "lambda_3D is missing: it multiplies the 3D term.": loss_2d + losses.mean(),
        'With weighting "none" every object counts alike: w = 1.': weighted,
    }
    expect_not(plain, mistakes)
    expect_close(plain, truth, "Without a weighting the loss is L_2D + lambda_3D mean(L_3D).")

    answer = ask(solution, loss_2d, losses, sigma, 2.0, "snr")
    expect_shape(answer, (), "the loss")
    mistakes = {
        'With weighting "snr" each object is weighted by its own noise level: '
        "w = 1 / (1 + sigma^2).": truth,
        "You averaged the weights before multiplying: each object's loss gets the weight of its "
        "own sigma.": (loss_2d + 2 * weight.mean() * losses.mean()),
        "You divided by the sum of the weights; then a noisy batch would count as much as a clean "
        "one. Take the mean.": (loss_2d + 2 * (weight * losses).sum() / weight.sum()),
        "You weighted L_2D too: w belongs to the 3D term alone.": (
            weight * (loss_2d + 2 * losses)
        ).mean(),
        "You used 1 / (1 + sigma): the weight has sigma squared.": loss_2d
        + 2 * (losses / (1 + sigma)).mean(),
        "You summed over the objects: L_3D is their mean.": loss_2d + 2 * (weight * losses).sum(),
    }
    expect_not(answer, mistakes)
    expect_close(
        answer, weighted, "L = L_2D + lambda_3D mean(w(sigma) L_3D), with w = 1 / (1 + sigma^2)."
    )
    leaf = losses.clone().requires_grad_()
    carried = ask(solution, loss_2d, leaf, sigma, 2.0, "snr")
    expect(
        carried.requires_grad,
        "Your loss has no gradient: do not detach or convert to numbers on the way.",
    )


# ---------------------------------------------------------------- exercise 3


@cache
def _world() -> tuple[Config, list[Cameras], list[tuple[Cameras, Tensor, Tensor, Tensor]], Tensor]:
    """Two objects of two views at 32 pixels.

    -> configuration, input cameras, targets, and latents [2, 2, 4, 4, 4].
    """
    smallest = dict(
        decoder_width=16, decoder_layers=1, decoder_heads=2, decoder_upsample=2, decoder_planes=2
    )
    config = preset("tiny", image_size=32, dino="none", lambda_alpha=0.0, **smallest)
    cameras = [orbit_cameras(sv3d_azimuths(2), 15.0, 32) for _ in range(2)]
    targets = []
    for k in range(2):
        disk = (
            torch.linspace(-1, 1, 32)[:, None] ** 2 + torch.linspace(-1, 1, 32) ** 2 < 0.4 + 0.2 * k
        ).float()
        alpha = disk[None, ..., None]
        color = torch.tensor([0.8, 0.3, 0.2 + 0.5 * k])
        view = orbit_cameras(torch.tensor([40.0 + 90 * k]), 20.0, 32)
        targets.append((view, 1 - alpha * (1 - color), 3.2 * alpha, alpha))
    return config, cameras, targets, _randn(2, 2, 4, 4, 4, seed=3)


def _decoder(config: Config) -> GaussianDecoder:
    """A real decoder of a few thousand weights, moved off its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = build_decoder(config).eval()
    with torch.no_grad():
        for i, p in enumerate(decoder.parameters()):
            p.add_(0.05 * _randn(*p.shape, seed=i))
    return decoder


def latent_gradient(
    decoder, z_hat: Tensor, cameras, features, targets, config: Config, reduce="mean"
) -> Tensor:
    """dL_3D / dz_hat [B, N, 4, h, w] through a decoder frozen in passing."""
    decoder.requires_grad_(False)
    z_hat = z_hat.detach().requires_grad_()
    scenes = decoder(z_hat, cameras, features)
    losses = torch.stack(
        [rendering_loss(scene, *truth, config)[0] for scene, truth in zip(scenes, targets)]
    )
    return torch.autograd.grad(losses.mean() if reduce == "mean" else losses.sum(), z_hat)[0]


@checker
def check_latent_gradient(solution) -> None:
    """Gradient of z_hat [B, N, 4, h, w].

    latent_gradient(decoder, z_hat, cameras, features, targets, config)
    """
    config, cameras, targets, z_hat = _world()
    decoder = _decoder(config)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    try:
        answer = ask(solution, decoder, z_hat.clone(), cameras, None, targets, config)
    except Wrong as error:
        if "does not require grad" not in str(error):
            raise
        raise Wrong(
            "There is no path from the loss back to z_hat: something runs under no_grad or is "
            "detached, or z_hat itself "
            "does not require a gradient."
        ) from error
    expect_shape(answer, z_hat.shape, "the gradient")
    touched = [name for name, p in decoder.named_parameters() if p.grad is not None]
    expect(
        not touched,
        f"{len(touched)} of the decoder's parameters hold a gradient: freeze them with "
        "requires_grad_(False) first.",
    )
    trainable = sum(p.requires_grad for p in decoder.parameters())
    expect(
        not trainable,
        "The decoder's parameters still require gradients: freeze them with requires_grad_(False).",
    )
    same = all(torch.equal(p, before[name]) for name, p in decoder.named_parameters())
    expect(same, "Your function changed the decoder's weights.")
    reference = _decoder(config)
    truth = latent_gradient(reference, z_hat, cameras, None, targets, config)
    summed = latent_gradient(reference, z_hat, cameras, None, targets, config, reduce="sum")
    color_only = latent_gradient(
        reference, z_hat, cameras, None, targets, config.replace(lambda_depth=0.0)
    )
    expect(
        answer.abs().max() > 0,
        "The gradient is zero everywhere: was z_hat detached on the way to the loss?",
    )
    scale = truth.abs().max()
    mistakes = {
        "You summed over the B objects: average.": summed / scale,
        "That is the gradient of the colour term alone: L_3D has a depth term.": color_only / scale,
    }
    expect_not(answer / scale, mistakes)
    expect(
        not (answer[0].abs().max() > 0 and answer[1].abs().max() == 0),
        "Only the first object has a gradient: the decoder returns a list of B scenes, and each "
        "has its own targets.",
    )
    expect_close(
        answer / scale, truth / scale, "This is not dL_3D / dz_hat averaged over the objects.", 1e-3
    )
