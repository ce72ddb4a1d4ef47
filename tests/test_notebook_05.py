"""Notebook 05: its U-Net and its loop are the library's, its checkers know right from
wrong.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from notebook_world import accepts, definitions, rejects
from torch import nn

from gsv3d_lib.config import Schedule, preset
from gsv3d_lib.course.exercises import unet as checks
from gsv3d_lib.diffusion import Condition, diffusion_loss
from gsv3d_lib.training import Stage, learning_rate, train
from gsv3d_lib.unet import build_unet


@pytest.fixture(scope="module")
def cells():
    cells = definitions("05")
    cells["config"] = small()
    cells["VIEWS"] = 4
    cells["azimuth"] = torch.tensor([1.6, 3.1, 4.7, 0.0])
    cells["polar"] = torch.full((4,), 1.3)
    return cells


def small():
    return preset("tiny", num_frames=4, unet_channels=(32, 64), unet_heads=(1, 2))


# ---------------------------------------------------------------- the notebook's U-Net


@torch.no_grad()
def test_the_u_net_is_the_library_s(cells):
    torch.manual_seed(0)
    library, mine = build_unet(small()).eval(), cells["UNet"](small())
    mine.load_state_dict(library.state_dict())
    question = torch.randn(2, 5, 8, 8, 8), torch.randn(2), torch.randn(2, 1, 128)
    angles = torch.rand(2, 5), 6 * torch.rand(2, 5)
    assert torch.allclose(mine(*question, *angles), library(*question, *angles), atol=1e-5)


@torch.no_grad()
def test_cut_views_do_not_hear_each_other(cells):
    torch.manual_seed(0)
    net = cells["UNet"](small())
    cells["close"](net, cells["ResidualPair"])
    cut = cells["cut_attention"](net)
    sample, angles = torch.randn(1, 4, 8, 8, 8), (torch.rand(1, 4), torch.rand(1, 4))
    other = sample.clone()
    other[:, 3] += 1
    rest = torch.zeros(1), torch.zeros(1, 1, 128), *angles
    heard = [(u(other, *rest) - u(sample, *rest))[:, :3].abs().max() for u in (net, cut)]
    assert heard[0] > 1e-4 and heard[1] < 1e-6


def test_attention_mixes_what_it_should(cells):
    torch.manual_seed(0)
    within = cells["hears"](cells["WithinView"](64, 2, 128))
    block = cells["OverViews"](64, 2, 128)
    over = cells["hears"](lambda x, token: block(x, token, views=3))
    assert torch.equal(within, torch.block_diag(*[torch.ones(4, 4)] * 3))
    assert torch.equal(over, torch.eye(4).repeat(3, 3))


# ---------------------------------------------------------------- the notebook's loop


class Orbits:
    """Four orbits of noise."""

    latents = torch.randn(4, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 4

    def orbit(self, item, start, frames):
        return {"latents": self.latents[item]}


def test_the_loss_is_the_library_s(cells):
    torch.manual_seed(0)
    unet, clean, noise = build_unet(small()), *torch.randn(2, 2, 4, 4, 8, 8)
    sigma, picture = torch.tensor([0.5, 6.0]), torch.randn(2, 4, 8, 8)
    angles = (cells[name].expand(2, -1) for name in ("polar", "azimuth"))
    known = Condition(torch.zeros(2, 1, 128), picture, *angles)
    everywhere = picture[:, None].expand_as(clean)
    mine = cells["loss_on_v"](unet, clean, noise, sigma, everywhere)
    assert torch.allclose(mine, diffusion_loss(unet, clean, noise, sigma, known)[0], rtol=1e-4)


def test_the_loop_is_the_library_s(cells, tmp_path):
    cells["orbits"] = Orbits()
    torch.manual_seed(0)
    start = cells["UNet"](small())
    by_hand, stage = copy.deepcopy(start), cells["Handful"](copy.deepcopy(start))
    assert isinstance(stage, Stage)
    losses = cells["fit"](by_hand, steps=3, top=0.003, count=2, warmup=1)
    schedule = Schedule(steps=3, batch=2, lr=0.003, warmup=1, weight_decay=0.01, ema=0.95)
    history = train(stage, schedule, tmp_path / "run", log_every=1, progress=False)
    assert losses == pytest.approx([row["loss"] for row in history], rel=1e-5)
    assert cells["distance"](by_hand, stage.unet) < 1e-5 < cells["distance"](by_hand, start)


def test_the_rate_is_the_library_s(cells):
    schedule = Schedule(steps=60, batch=1, lr=0.01, warmup=10)
    for step in (0, 5, 10, 40, 59):
        mine = cells["rate"](step, 60, 0.01, 10)
        assert mine == pytest.approx(learning_rate(step, schedule))


@torch.no_grad()
def test_euler_returns_the_clean_orbit_of_a_perfect_network(cells):
    clean = torch.randn(2, 4, 4, 8, 8)

    def perfect(sample, c_noise, token, polar, azimuth):
        sigma = (4 * c_noise).exp()[:, None, None, None, None]
        root = (sigma**2 + 1).sqrt()
        noisy = sample[:, :, :4] * root
        return ((noisy - clean) / sigma - sigma * clean) / root

    result = cells["euler"](perfect, 0 * clean, [80.0, 5.0, 1.0], torch.Generator())
    assert torch.allclose(result, clean, atol=1e-3)


# ---------------------------------------------------------------- checkers


def masked(mask, scale=1.0):
    def attend_to_neighbours(q, k, v, reach):
        seen = mask(q.shape[1], reach)
        return F.scaled_dot_product_attention(scale * q, k, v, attn_mask=seen)

    return attend_to_neighbours


def test_neighbours_checker():
    check = checks.check_neighbours
    assert accepts(check, masked(lambda n, reach: checks.ring_steps(n) <= reach))
    assert accepts(check, checks.neighbours)

    def open_ring(n, reach):
        return (torch.arange(n)[:, None] - torch.arange(n)).abs() <= reach

    assert rejects(check, masked(open_ring), "ring is open")
    assert rejects(check, masked(lambda n, r: checks.ring_steps(n) < r), "One step too few")
    assert rejects(check, masked(lambda n, r: checks.ring_steps(n) >= 0), "sees everybody")
    right = masked(lambda n, reach: checks.ring_steps(n) <= reach, scale=4.0)
    assert rejects(check, right, "sqrt")

    def behind(q, k, v, reach):
        return ((q @ k.mT / 4).softmax(-1) * (checks.ring_steps(8) <= reach)) @ v

    assert rejects(check, behind, "behind the softmax")

    def by_hand(mask, axis=-1):
        """The softmax over one axis of scores that `mask` has changed."""

        def attend(q, k, v, reach):
            return mask(q @ k.mT / 4, checks.ring_steps(8) <= reach).softmax(axis) @ v

        return attend

    def minus_inf(scores, seen):
        return scores.masked_fill(~seen, -torch.inf)

    assert accepts(check, by_hand(minus_inf))
    assert rejects(check, by_hand(minus_inf, axis=-2), "wrong axis")
    assert rejects(check, by_hand(lambda scores, seen: scores * seen), "gets -inf")
    assert rejects(check, masked(lambda n, r: checks.ring_steps(n) > r), "mask is inverted")

    def ahead(n, reach):
        return (torch.arange(n) - torch.arange(n)[:, None]) % n <= reach

    assert rejects(check, masked(ahead), "both sides")
    assert rejects(check, masked(lambda n, r: ahead(n, r).mT), "both sides")


def test_average_checker():
    check = checks.check_average
    assert accepts(check, checks.average_of)
    assert rejects(check, lambda w, d: w[-1], "nothing is averaged")
    assert rejects(check, lambda w, d: w.mean(0), "plain mean")
    assert rejects(check, lambda w, d: checks.average_of(w, d, first=1), "number 0")

    def constant(weights, decay):
        mean = weights[0]
        for row in weights[1:]:
            mean = decay * mean + (1 - decay) * row
        return mean

    assert rejects(check, constant, "constant")
    assert rejects(check, lambda w, d: checks.average_of(w, 1.0), "without a bound")

    def from_zeros(weights, decay):
        return checks.average_of(torch.cat([0 * weights[:1], weights[1:]]), decay)

    def in_place(weights, decay):
        return weights[0].copy_(checks.average_of(weights, decay))

    assert rejects(check, from_zeros, "not as zeros")
    assert rejects(check, in_place, "clone of row 0")


def test_bug_checker(cells):
    check = checks.check_group_by_place
    assert accepts(check, cells["to_places"])
    assert rejects(check, cells["group_by_place"], "several orbits")
    assert rejects(check, lambda x, n: x.reshape(-1, n, x.shape[-1]), "places are mixed")
    assert rejects(check, lambda x, n: x, "shape")

    def half_mended(x, views):
        return x.unflatten(0, (-1, views)).permute(1, 2, 0, 3).flatten(0, 1)

    assert rejects(check, half_mended, "order of the axes")


def trainer(lr=0.03, decay=0.98, zero=True, steps=True):
    def train_denoiser(net, draw, count):
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        average = [p.detach().clone() for p in net.parameters()]
        for step in range(count):
            optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * step / count if decay else 1)
            x, v = draw(step)
            if zero:
                optimizer.zero_grad()
            (net(x) - v).pow(2).mean().backward()
            if steps:
                optimizer.step()
            keep = min(decay, (1 + step) / (10 + step))
            for mean, p in zip(average, net.parameters()):
                mean.lerp_(p.detach(), 1 - keep)
        with torch.no_grad():
            for mean, p in zip(average, net.parameters()):
                p.copy_(mean)
        return net

    return train_denoiser


def test_training_checker():
    check = checks.check_training
    assert checks.plane_floor() < checks.GOAL - 0.02
    assert accepts(check, trainer())
    assert rejects(check, trainer(decay=0.0), "average the weights")
    assert rejects(check, trainer(steps=False), "have not moved")
    assert rejects(check, trainer(lr=0.01, zero=False), "set to zero")
    assert rejects(check, trainer(lr=1.0), "is the rate small enough|larger rate")
    one_batch = lambda net, draw, count: trainer()(net, lambda step: draw(0), count)  # noqa: E731
    assert rejects(check, one_batch, "the same batch every time")
    assert rejects(check, lambda net, draw, steps: 3, "Return the network")


@pytest.mark.parametrize(
    ("checker", "stub"),
    [
        (checks.check_neighbours, "attend_to_neighbours"),
        (checks.check_average, "moving_average"),
        (checks.check_training, "train_denoiser"),
    ],
)
def test_stubs_are_not_written_yet(cells, checker, stub, capsys):
    assert not checker(cells[stub])
    assert "not written yet" in capsys.readouterr().out


def test_the_best_answer_in_the_plane_is_a_mean():
    """No network is below the floor: a large one, trained long, stays above it."""
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))
    assert checks.plane_loss(net) > checks.plane_floor()
