"""Notebook 07: what its cells define equals the library, and its checkers know right
from wrong.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from notebook_world import accepts, definitions, rejects
from tiny_world import randn, tiny_config

from gsv3d_lib import diffusion
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.course.exercises import distillation as checks
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.lora import add_lora
from gsv3d_lib.losses import rendering_loss
from gsv3d_lib.rendering import render
from gsv3d_lib.unet import build_unet

ROOT = Path(__file__).resolve().parents[1]


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


def test_noise_and_estimate(cells):
    noisy = cells["add_noise"](CLEAN, NOISE, SIGMA)
    assert torch.allclose(noisy, CLEAN + diffusion.frames_like(SIGMA, CLEAN) * NOISE)
    assert torch.allclose(
        cells["one_step_estimate"](V, noisy, SIGMA),
        diffusion.clean_estimate(V, noisy, SIGMA),
        atol=1e-5,
    )


def test_3d_loss(cells):
    config = tiny_config(lambda_alpha=0.0)
    cells["config"] = config
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
    batch = {f"target_{k}": t[None] for k, t in zip(("rgb", "depth", "alpha"), truth)}
    by_hand = cells["losses_3d_by_hand"]([render(scene, cameras)], batch)
    assert torch.allclose(by_hand[0], rendering_loss(scene, cameras, *truth, config)[0], atol=1e-5)


def test_the_toy_s_update_has_the_rank_of_its_rotation(cells):
    turn = cells["rotation"](planes=2)
    assert torch.allclose(turn @ turn.T, torch.eye(32), atol=1e-5)
    assert torch.linalg.matrix_rank(turn - torch.eye(32), atol=1e-4) == 4


def test_degrees_between_gradients(cells):
    a = torch.tensor([1.0, 0.0])
    assert cells["turned"](a, torch.tensor([2.0, 2.0])) == pytest.approx(45, abs=1e-3)
    assert cells["turned"](a, a) == pytest.approx(0, abs=0.1)


def test_the_stored_ladder_is_whole():
    ladder = json.loads((ROOT / "data/results/ladder.json").read_text())
    assert ladder["command"].startswith("python -m gsv3d_lib run 07 --set ladder_steps=")
    sizes = {"one": ({"none", "0", "10", "100"}, 4), "ten": ({"0", "10"}, 20)}
    for rung, (arms, cases) in sizes.items():
        assert set(ladder["rungs"][rung]) >= arms
        for arm in ladder["rungs"][rung].values():
            assert {len(column) for column in arm["scores"].values()} == {cases}


# ---------------------------------------------------------------- the exercises


def test_stubs_are_not_written_yet(cells, capsys):
    assert not checks.check_lambda_for_turn(cells["lambda_for_turn"])
    assert not checks.check_latent_gradient(cells["latent_gradient"])
    nothing = dict(z=CLEAN, truth=CLEAN, gradient=None, scores=None)
    assert not checks.check_heal(cells["heal"], **nothing)
    assert capsys.readouterr().out.count("not written yet") == 3


def test_lambda_for_turn():
    assert accepts(checks.check_lambda_for_turn, checks.lambda_for_turn)

    def ratio(g2d, g3d):
        return float(g2d.norm() / g3d.norm())

    wrong = {
        "radians": lambda a, b, d: ratio(a, b) * math.tan(d),
        "equally long": lambda a, b, d: ratio(a, b),
        "across g_2D": lambda a, b, d: ratio(a, b) * math.tan(math.radians(d)),
        "only at its largest": lambda a, b, d: ratio(a, b) * math.sin(math.radians(d)),
        "upside down": lambda a, b, d: 1 / (ratio(a, b) * math.tan(math.radians(d))),
        r"turns by 30.0\d+ degrees": lambda a, b, d: 1.001 * checks.lambda_for_turn(a, b, d),
        "your weight turns by": lambda a, b, d: 1.5 * checks.lambda_for_turn(a, b, d),
    }
    for match, solution in wrong.items():
        assert rejects(checks.check_lambda_for_turn, solution, match)


def test_train_averaged(cells, capsys):
    assert accepts(checks.check_train_averaged, checks.train_averaged)
    bug = cells["train_averaged"]
    assert rejects(checks.check_train_averaged, bug, "nothing was averaged")

    def raw(weights, gradient, steps, lr, decay):
        checks.train_averaged(weights, gradient, steps, lr, decay)
        return weights

    def swapped(weights, gradient, steps, lr, decay):
        return checks.train_averaged(weights, gradient, steps, lr, 1 - decay)

    def late(weights, gradient, steps, lr, decay):
        checks.train_averaged(weights, gradient, steps, lr, decay)
        return (1 - decay) * weights

    def still(weights, gradient, steps, lr, decay):
        first = weights.clone()
        checks.train_averaged(weights, gradient, steps, lr, decay)
        return first

    def not_in_place(weights, gradient, steps, lr, decay):
        return checks.train_averaged(weights.clone(), gradient, steps, lr, decay)

    def averaging(start=torch.clone, late=True):
        def train_averaged(weights, gradient, steps, lr, decay):
            average = start(weights)
            for _ in range(steps):
                before = weights.clone()
                weights -= lr * gradient(weights)
                average = average.lerp(weights if late else before, 1 - decay)
            return average

        return train_averaged

    assert accepts(checks.check_train_averaged, averaging())
    wrong = {
        "nothing was averaged": raw,
        "begins as zeros": averaging(start=torch.zeros_like),
        "still the parameter itself": averaging(start=lambda weights: weights),
        "average before the step": averaging(late=False),
        "keeps 1 - decay": swapped,
        "moving average of the weights": late,
        "never moves": still,
        "in place": not_in_place,
    }
    for match, solution in wrong.items():
        assert rejects(checks.check_train_averaged, solution, match)


def test_heal():
    """On a toy: depth falls along the gradient, pictures suffer with the distance."""
    z, truth = torch.full((2, 1), 2.0), torch.zeros(2, 1)

    def scores(latents):
        return {
            "depth_l1": 0.05 * float((latents + 1).abs().mean()),
            "vae_3d": 25 - float(latents.abs().mean()),
        }

    def check(solution):
        return checks.check_heal(
            solution, z=z, truth=truth, gradient=lambda w: (w + 1).sign(), scores=scores
        )

    def descend(goal):
        def heal(z, truth, gradient):
            for _ in range(50):
                z = z - 0.1 * gradient(z) if z.mean() > goal else z
            return z

        return heal

    assert check(descend(-0.5))

    def greedy(z, truth, gradient):
        for _ in range(61):
            z = z - 0.1 * gradient(z)
        return z

    def from_truth(z, truth, gradient):
        return truth - 0.1 * gradient(truth)

    wrong = {
        "Begin at z": from_truth,
        "Both are missed": lambda z, truth, gradient: truth + 5,
        "its pictures are not": lambda z, truth, gradient: truth - 1.5,
        "the object is not": lambda z, truth, gradient: truth + 0.9,
        "more than 60 times": greedy,
        "true latents": lambda z, truth, gradient: truth,
        "inf or nan": lambda z, truth, gradient: z / 0,
        "should have shape": lambda z, truth, gradient: z[0],
    }
    for match, solution in wrong.items():
        verdict = check(solution)
        assert not verdict and match in verdict.sentence


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
