"""Notebook 07: what its cells define equals the library, and its checkers know right
from wrong.
"""

import copy

import pytest
import torch
from notebook_world import accepts, definitions, rejects
from tiny_world import randn, tiny_config

from gsv3d_lib import diffusion
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.config import preset
from gsv3d_lib.course.exercises import distillation as checks
from gsv3d_lib.distillation import sigma_weight
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.lora import add_lora, lora_parameters
from gsv3d_lib.losses import rendering_loss
from gsv3d_lib.rendering import render
from gsv3d_lib.unet import build_unet


@pytest.fixture(scope="module")
def cells():
    return definitions("07")


SIGMA = torch.tensor([0.3, 5.0])
CLEAN, NOISE, V = (randn(2, 3, 4, 2, 2, seed=k) for k in range(3))


# ------------------------------------------------------------- the notebook's functions


@torch.no_grad()
def test_lora_by_hand_is_peft_s(cells):
    unet = add_lora(build_unet(tiny_config()), rank=3)
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight.normal_()
    x = randn(5, A.shape[1])
    assert torch.allclose(
        cells["lora_linear"](x, layer.base_layer.weight, A, B, 3.0), layer(x), atol=1e-5
    )
    scaled = cells["lora_linear"](x, layer.base_layer.weight, A, B, 6.0) - layer.base_layer(x)
    assert torch.allclose(scaled, 2 * (layer(x) - layer.base_layer(x)), atol=1e-4)


def test_lora_is_counted_as_it_is(cells):
    with torch.device("meta"):
        plain, paper = build_unet(tiny_config()), build_unet(preset("paper"))
    adapted = lora_parameters(add_lora(build_unet(tiny_config()), rank=3))
    count = sum("lora_A" in name for name in adapted), sum(p.numel() for p in adapted.values())
    assert cells["count_lora"](plain, 3) == count
    assert cells["count_lora"](paper, 16) == (256, 6_639_616)


def test_noise_and_estimate(cells):
    noisy = cells["add_noise"](CLEAN, NOISE, SIGMA)
    assert torch.allclose(noisy, CLEAN + diffusion.frames_like(SIGMA, CLEAN) * NOISE)
    assert torch.allclose(
        cells["one_step_estimate"](V, noisy, SIGMA),
        diffusion.clean_estimate(V, noisy, SIGMA),
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["none", "snr"])
def test_weight(cells, kind):
    assert torch.allclose(
        cells["weight_by_hand"](SIGMA, kind), sigma_weight(SIGMA, kind), atol=1e-6
    )


def test_3d_loss(cells):
    config = tiny_config(lambda_alpha=0.7)
    cameras = orbit_cameras(torch.tensor([0.0, 80.0]), 15.0, 24)
    logits = randn(50, 4, seed=3).sigmoid()
    scene = Gaussians(
        0.3 * randn(50, 3),
        randn(50, 4, seed=1),
        torch.full((50, 3), 0.1),
        logits[:, 0],
        logits[:, 1:],
    )
    alpha = (randn(2, 24, 24, 1, seed=4) > 0).float()
    truth = randn(2, 24, 24, 3, seed=5).sigmoid(), 3.4 * alpha, alpha
    by_hand = cells["loss_3d_by_hand"](
        render(scene, cameras), *truth, config.lambda_depth, config.lambda_alpha
    )
    assert torch.allclose(by_hand, rendering_loss(scene, cameras, *truth, config)[0], atol=1e-5)


def test_paired_interval(cells):
    interval = cells["paired_interval"]
    assert interval(torch.full((5, 3), 0.25)) == pytest.approx((0.25, 0.25, 0.25))
    mean, low, high = interval(randn(40, 2) + 0.5)
    assert low < mean < high and mean == pytest.approx((randn(40, 2) + 0.5).mean().item(), abs=1e-5)
    one = torch.zeros(8, 2)
    one[0] = 8.0  # one object alone: its draws stand or fall together
    assert interval(one)[1] == 0 and interval(one)[2] > 2


# ---------------------------------------------------------------- the exercises


def test_stubs_are_not_written_yet(cells, capsys):
    assert not checks.check_merge_lora(cells["merge_lora"])
    assert not checks.check_stage2_loss(cells["stage2_loss"])
    assert not checks.check_latent_gradient(cells["latent_gradient"])
    assert capsys.readouterr().out.count("not written yet") == 3


def merged(weight, A, B, alpha):
    return weight + alpha / A.shape[0] * B @ A


def test_merge_lora():
    assert accepts(checks.check_merge_lora, merged)

    def in_place(weight, A, B, alpha):
        return weight.add_(alpha / A.shape[0] * B @ A)

    wrong = {
        "alpha / r is missing": lambda w, A, B, alpha: w + B @ A,
        "scaled by alpha; LoRA": lambda w, A, B, alpha: w + alpha * B @ A,
        "upside down": lambda w, A, B, alpha: w + A.shape[0] / alpha * B @ A,
        "rows of A": lambda w, A, B, alpha: w + alpha / A.shape[1] * B @ A,
        "update alone": lambda w, A, B, alpha: alpha / A.shape[0] * B @ A,
        "in place": in_place,
        "stops with RuntimeError": lambda w, A, B, alpha: w + A @ B,
    }
    for match, solution in wrong.items():
        assert rejects(checks.check_merge_lora, solution, match)


def total(loss_2d, losses, sigma, lambda_3d, weighting):
    return loss_2d + lambda_3d * (sigma_weight(sigma, weighting) * losses).mean()


def test_stage2_loss():
    assert accepts(checks.check_stage2_loss, total)

    def w(sigma, kind):
        return sigma_weight(sigma, kind)

    wrong = {
        "averaged the weights": lambda a, b, s, x, k: a + x * w(s, k).mean() * b.mean(),
        "sum of the weights": lambda a, b, s, x, k: a + x * (w(s, k) * b).sum() / w(s, k).sum(),
        "weighted L_2D too": lambda a, b, s, x, k: (w(s, k) * (a + x * b)).mean(),
        "sigma squared": lambda a, b, s, x, k: a + x * (b if k == "none" else b / (1 + s)).mean(),
        "summed over the objects": lambda a, b, s, x, k: a + x * (w(s, k) * b).sum(),
        "lambda_3D is missing": lambda a, b, s, x, k: a + (w(s, k) * b).mean(),
        "its own noise level": lambda a, b, s, x, k: a + x * b.mean(),
        "counts alike": lambda a, b, s, x, k: a + x * (w(s, "snr") * b).mean(),
        "no gradient": lambda a, b, s, x, k: total(a, b.detach(), s, x, k),
        "should have shape": lambda a, b, s, x, k: a + x * w(s, k) * b,
    }
    for match, solution in wrong.items():
        assert rejects(checks.check_stage2_loss, solution, match)


def test_latent_gradient():
    assert accepts(checks.check_latent_gradient, checks.latent_gradient)

    def losses(decoder, z, cameras, features, targets, config):
        scenes = decoder(z, cameras, features)
        return torch.stack(
            [rendering_loss(scene, *truth, config)[0] for scene, truth in zip(scenes, targets)]
        )

    def no_grad(decoder, z_hat, *rest):
        z = z_hat.requires_grad_()
        with torch.no_grad():
            loss = losses(decoder.requires_grad_(False), z, *rest).mean()
        return torch.autograd.grad(loss, z)[0]

    def not_frozen(decoder, z_hat, *rest):
        z = z_hat.requires_grad_()
        losses(decoder, z, *rest).mean().backward()
        return z.grad

    def only_asked(decoder, z_hat, *rest):
        z = z_hat.requires_grad_()
        return torch.autograd.grad(losses(decoder, z, *rest).mean(), z)[0]

    def summed(decoder, z_hat, *rest):
        z = z_hat.requires_grad_()
        return torch.autograd.grad(losses(decoder.requires_grad_(False), z, *rest).sum(), z)[0]

    def first_object(decoder, z_hat, *rest):
        z = z_hat.requires_grad_()
        return torch.autograd.grad(losses(decoder.requires_grad_(False), z, *rest)[0], z)[0]

    def color_only(decoder, z_hat, cameras, features, targets, config):
        config = config.replace(lambda_depth=0.0, lambda_alpha=0.0)
        return checks.latent_gradient(decoder, z_hat, cameras, features, targets, config)

    def a_step(decoder, z_hat, *rest):
        gradient = checks.latent_gradient(copy.deepcopy(decoder), z_hat, *rest)
        with torch.no_grad():
            next(decoder.requires_grad_(False).parameters()).add_(0.01)
        return gradient

    wrong = {
        "no path from the loss": no_grad,
        "hold a gradient": not_frozen,
        "still require gradients": only_asked,
        "summed over the B objects": summed,
        "Only the first object": first_object,
        "colour term alone": color_only,
        "changed the decoder's weights": a_step,
        "zero everywhere": lambda decoder, z_hat, *rest: torch.zeros_like(
            checks.latent_gradient(decoder, z_hat, *rest)
        ),
    }
    for match, solution in wrong.items():
        assert rejects(checks.check_latent_gradient, solution, match)
