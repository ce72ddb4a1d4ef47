"""Checkers of notebook 07: a loud λ, the latents' gradient, an average, healing."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...cameras import Cameras, orbit_cameras, sv3d_azimuths
from ...config import Config, preset
from ...decoder import GaussianDecoder, build_decoder
from ...losses import rendering_loss
from . import Wrong, ask, checker, expect, expect_close, expect_not, expect_shape, same
from .decoder import average_mistakes


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- exercise 1


def lambda_for_turn(g2d: Tensor, g3d: Tensor, degrees: float) -> float:
    """The solution: "across" over "along" of the sum is the tangent of the turn."""
    direction = g2d / g2d.norm()
    along = g3d @ direction
    across = (g3d - along * direction).norm()
    turn = torch.deg2rad(torch.tensor(degrees))
    return float(g2d.norm() * turn.sin() / (across * turn.cos() - along * turn.sin()))


@checker
def check_lambda_for_turn(solution) -> None:
    """lambda_for_turn(g2d [P], g3d [P], degrees) -> the weight of g3d."""
    g2d = torch.tensor([0.0, 3.0, 4.0, 0.0])
    cases = (
        (torch.tensor([0.2, 0.0, 0.0, 0.0]), 30.0, "perpendicular gradients"),
        (torch.tensor([0.3, 0.3, 0.4, 0.0]), 20.0, "gradients that agree in part"),
        (torch.tensor([0.1, -0.3, -0.4, 0.2]), 120.0, "gradients that disagree in part"),
    )
    for g3d, degrees, name in cases:
        answer = ask(solution, g2d, g3d, degrees)
        answer = torch.as_tensor(answer, dtype=torch.float32).detach()
        expect_shape(answer, (), "the weight")
        turn = torch.deg2rad(torch.tensor(degrees))
        loud = g2d.norm() / g3d.norm()
        mistakes = {
            "You gave tan() or sin() degrees; torch counts in radians.": loud
            * torch.tensor(degrees).tan(),
            "Then the two gradients are equally long, which is no statement on the turn.": loud,
            "That divides by the length of g_3D; only the part of it across g_2D turns.": loud
            * turn.tan(),
            "A sine of the turn equals lambda |g_3D| / |g_2D| only at its largest; "
            "the sum is longer or shorter than g_2D.": loud * turn.sin(),
            "It is upside down: a short g_3D needs a large weight.": 1 / (loud * turn.tan()),
        }
        truth = torch.tensor(lambda_for_turn(g2d, g3d, degrees))
        expect_not(answer, {k: v for k, v in mistakes.items() if not same(v, truth)})
        reached = g2d + answer * g3d
        cosine = (reached @ g2d / (reached.norm() * g2d.norm())).clamp(-1, 1)
        found = torch.rad2deg(torch.acos(cosine)).item()
        hint = f"With {name} your weight turns by {found:.3f} degrees instead of {degrees:g}."
        expect_close(answer, truth, hint)


# ---------------------------------------------------------------- exercise 2


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


# ---------------------------------------------------------------- find the bug


def train_averaged(weights: Tensor, gradient, steps: int, lr: float, decay: float) -> Tensor:
    """The solution: the average has memory of its own."""
    average = weights.detach().clone()
    for _ in range(steps):
        weights -= lr * gradient(weights)
        average.lerp_(weights, 1 - decay)
    return average


@checker
def check_train_averaged(solution) -> None:
    """train_averaged(weights [P], gradient, steps, lr, decay) -> their average [P]."""
    start, goal = _randn(5), _randn(5, seed=1)

    def noisy_gradient():
        noise = torch.Generator().manual_seed(2)
        return lambda w: w - goal + torch.randn(5, generator=noise)

    def run(function, keep: float) -> tuple[Tensor, Tensor]:
        weights = start.clone()
        return ask(function, weights, noisy_gradient(), 20, 0.3, keep), weights

    answer, last = run(solution, 0.9)
    expect_shape(answer, (5,))
    truth, trained = run(train_averaged, 0.9)
    expect(
        torch.allclose(last, trained, atol=1e-5),
        "The weights do not end where 20 steps of gradient descent, in place, end.",
    )
    mistakes = {
        "Those are the last weights, to the bit: in 20 noisy steps nothing was averaged.": trained,
        "You return the first weights: the average never moves.": start,
    }
    expect_not(answer, mistakes | average_mistakes(_path(start, noisy_gradient(), 20, 0.3), 0.9))
    expect_close(answer, truth, "This is not the moving average of the weights after each step.")


def _path(weights: Tensor, gradient, steps: int, lr: float) -> Tensor:
    """The weights before training and after every step, [steps + 1, P]."""
    path = [weights]
    for _ in range(steps):
        path.append(path[-1] - lr * gradient(path[-1]))
    return torch.stack(path)


# ---------------------------------------------------------------- build

HEAL_DEPTH, HEAL_PICTURES, HEAL_CALLS = 0.050, 24.0, 60  # depth L1; dB of VAE against 3D


@checker
def check_heal(solution, z: Tensor, truth: Tensor, gradient, scores) -> None:
    """heal(z, truth, gradient) -> latents like z, which scores(latents) measures."""
    calls = 0

    def counted(latents: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        expect(calls <= HEAL_CALLS, f"You called the gradient more than {HEAL_CALLS} times.")
        began_at_z = (latents - z).norm() <= (latents - truth).norm()
        expect(calls > 1 or began_at_z, "Begin at z: the true latents are the goal, not the start.")
        return gradient(latents)

    answer = ask(solution, z.clone(), truth.clone(), counted)
    expect_shape(answer, z.shape, "the latents")
    answer = answer.detach()
    expect(torch.isfinite(answer).all(), "The latents hold inf or nan: take smaller steps.")
    expect(not same(answer, truth), "Those are the true latents; the decoder can do better.")
    found = scores(answer)
    depth, pictures = found["depth_l1"], found["vae_3d"]
    reached = f"depth L1 {depth:.3f} and VAE against 3D {pictures:.1f} dB with {calls} calls"
    good_depth, good_pictures = depth <= HEAL_DEPTH, pictures >= HEAL_PICTURES
    expect(good_depth or good_pictures, f"Both are missed: {reached}. More steps, or larger ones.")
    expect(
        good_pictures,
        f"The object is there, its pictures are not: {reached}. Hold the latents closer.",
    )
    expect(
        good_depth, f"The pictures are there, the object is not: {reached}. Give L_3D more weight."
    )
    print(f"{reached[0].upper()}{reached[1:]}.")
