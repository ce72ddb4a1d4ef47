"""Notebook 09: its numbers equal the library, and its checkers find typical errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from notebook_world import accepts, definitions, rejects

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.course.exercises import failures as exercises
from gsv3d_lib.evaluation import baselines, consistency, protocol
from gsv3d_lib.evaluation.metrics import psnr
from gsv3d_lib.export import mesh
from gsv3d_lib.gaussians import Gaussians


@pytest.fixture(scope="module")
def notebook() -> dict:
    return definitions("09")


def random_images(*shape, seed=0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_gaussians(count=40, seed=0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=0.5 * torch.randn(count, 3, generator=generator).clamp(-1, 1),
        quats=torch.randn(count, 4, generator=generator),
        scales=torch.full((count, 3), 0.1),
        opacities=torch.full((count,), 0.6),
        colors=torch.rand(count, 3, generator=generator),
    )


# ---------------------------------------------------------------- derivations


def test_depth_spread_equals_the_library(notebook):
    gaussians, views = random_gaussians(), orbit_cameras(torch.tensor([0.0, 70.0]), 15.0, 32)
    for view in range(2):
        spread, alpha = notebook["depth_spread"](gaussians, views[view])
        library = mesh.front_and_spread(gaussians, views[view])[1][0, ..., 0]
        assert torch.allclose(spread, library, atol=1e-5)
        assert alpha.shape == (32, 32)


def test_ghosting_knows_a_solid_from_a_double(notebook):
    views = orbit_cameras(torch.tensor([0.0]), 0.0, 32)
    line = torch.linspace(-0.5, 0.5, 24)
    y, z = (t.reshape(-1) for t in torch.meshgrid(line, line, indexing="ij"))

    def sheet(x: float, opacity: float) -> Gaussians:
        count = len(y)
        means = torch.stack([torch.full_like(y, x), y, z], dim=-1)
        quats = torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
        return Gaussians(
            means, quats, torch.full((count, 3), 0.03), torch.full((count,), opacity), means * 0
        )

    mask = torch.zeros(1, 32, 32, 1)
    mask[:, 13:19, 13:19] = 1
    one, near, far = sheet(0.0, 0.99), sheet(0.4, 0.3), sheet(-0.4, 0.99)
    both = Gaussians(*(torch.cat([getattr(s, f) for s in (near, far)]) for f in vars(near)))
    assert notebook["ghosting"](one, views, mask) == 0
    assert notebook["ghosting"](both, views, mask) == 1
    assert notebook["ghosting"](sheet(0.0, 0.1), views, mask) > 0.9  # background shines through


def test_ghosting_and_detail_equal_the_library(notebook):
    gaussians, views = random_gaussians(), orbit_cameras(torch.tensor([0.0, 70.0]), 15.0, 32)
    mask = torch.zeros(2, 32, 32, 1)
    mask[:, 8:24, 8:24] = 1
    expected = consistency.ghosting(gaussians, views, mask)
    assert (
        notebook["ghosting"](gaussians, views, mask) == pytest.approx(expected)
        and 0 < expected <= 1
    )
    made, truth = random_images(2, 32, 32, 3), random_images(2, 32, 32, 3, seed=1)
    assert notebook["detail"](made, truth, mask) == pytest.approx(
        consistency.detail(made, truth, mask)
    )


def test_failure_numbers_have_their_closed_forms(notebook):
    views = random_images(2, 16, 16, 3)
    ones = torch.ones(2, 16, 16, 1)
    assert notebook["detail"](views, views, ones) == pytest.approx(1)
    assert notebook["detail"](0.5 * views, views, ones) == pytest.approx(0.5)
    assert notebook["front_back_similarity"](views[0], views[0].flip(-2)) == math.inf
    camera = orbit_cameras(torch.tensor([0.0]), 15.0, 32)
    card = baselines.flat_card(random_images(32, 32, 3), torch.ones(32, 32, 1), camera)
    moved = notebook["corrugated"](card, camera, 0.3)

    def project(g: Gaussians) -> torch.Tensor:
        local = g.means @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]
        return torch.cat([local[:, :2] / local[:, 2:], g.scales / local[:, 2:]], dim=1)

    # same place and size in the picture
    assert torch.allclose(project(moved), project(card), atol=1e-5)
    assert (moved.means - card.means).norm(dim=1).mean() > 0.2


def test_a_two_faced_ring_repeats_its_front(notebook):
    ring = random_images(16, 8, 8, 3)
    made = notebook["two_faced"](ring)
    front = [(protocol.FRONT + step) % 16 for step in range(-4, 5)]
    assert torch.equal(made[front], ring[front])
    assert (
        notebook["front_back_similarity"](made[protocol.FRONT], made[(protocol.FRONT + 8) % 16])
        == math.inf
    )


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize("name", ["janus_excess", "kept_power", "smooth"])
def test_stubs_are_not_written_and_solutions_are_right(notebook, name, capsys):
    check = getattr(exercises, f"check_{name}")
    assert not check(notebook[name])
    assert "not written yet" in capsys.readouterr().out
    assert accepts(check, getattr(exercises, name))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda f, b, tf, tb: psnr(b, f) - psnr(tb, tf), "mirror the back view"),
        (lambda f, b, tf, tb: psnr(b.flip(0), f) - psnr(tb.flip(0), tf), "upside down"),
        (lambda f, b, tf, tb: psnr(b.flip(2), f) - psnr(tb.flip(2), tf), "swaps the colours"),
        (lambda f, b, tf, tb: psnr(b.flip(0, 1), f) - psnr(tb.flip(0, 1), tf), "half a turn"),
        (lambda f, b, tf, tb: psnr(b.flip(1), f) - psnr(tb, tf), "mirror the true one too"),
        (lambda f, b, tf, tb: psnr(b, f) - psnr(tb.flip(1), tf), "mirror the result's too"),
        (lambda f, b, tf, tb: psnr(b.flip(1), f), "subtract the truth's own"),
        (lambda *v: -exercises.janus_excess(*v), "sign is turned"),
        (lambda f, b, tf, tb: psnr(b.flip(1), f) / psnr(tb.flip(1), tf), "not the ratio"),
    ],
)
def test_janus_excess_rejects(wrong, hint):
    assert rejects(exercises.check_janus_excess, wrong, hint)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda a, b, n: exercises.kept_power(a, b, n).sqrt(), "power is its square"),
        (lambda a, b, n: exercises.kept_power(a, b, n).flip(0), "low frequencies come first"),
        (lambda a, b, n: exercises.kept_power(a, b, n) * torch.ones(n, 1), "shape"),
        (lambda a, b, n: exercises.kept_power(a, b, n) + (a.mean() > 0.1), "leave frequency 0"),
    ],
)
def test_kept_power_rejects(wrong, hint):
    assert rejects(exercises.check_kept_power, wrong, hint)


def by_rings(length=torch.hypot, last=0.5, holds_upper=True, shift=False, ratios=False, count=None):
    """Written anew, with one thing as a learner may have it."""

    def kept(image, truth, bands=4):
        line = torch.fft.fftfreq(len(truth))
        radius = length(line[:, None].expand(len(line), -1), line[None].expand(len(line), -1))
        radius = torch.fft.fftshift(radius) if shift else radius
        made, true = (torch.fft.fft2(x).abs() ** 2 for x in (image, truth))
        edges = torch.linspace(0, last, (count or bands) + 1)
        shares = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            upper = (radius > low) & (radius <= high)
            lower = (radius >= low) & (radius < high) & (radius > 0)
            ring = upper if holds_upper else lower
            share = made[ring].sum() / true[ring].sum()
            shares.append((made[ring] / true[ring]).mean() if ratios else share)
        return torch.stack(shares)

    return kept


def with_corners(image, truth, bands=4):
    def inside(x, y):
        return torch.hypot(x, y).clamp(max=0.5)

    return by_rings(inside)(image, truth, bands)


def test_kept_power_accepts_one_written_anew():
    assert accepts(exercises.check_kept_power, by_rings())


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (by_rings(lambda x, y: torch.maximum(x.abs(), y.abs())), "rings are squares"),
        (with_corners, "belong to no ring"),
        (by_rings(last=math.sqrt(0.5)), "up to 0.707"),
        (by_rings(holds_upper=False), "holds its upper end"),
        (by_rings(shift=True), "fftshift"),
        (by_rings(ratios=True), "mean of the ratios"),
        (by_rings(count=4), "with bands=5"),
    ],
)
def test_kept_power_rejects_other_rings(wrong, hint):
    assert rejects(exercises.check_kept_power, wrong, hint)


def test_the_seeded_bug_is_told_and_its_repair_accepted(notebook, capsys):
    check = exercises.check_spread_of_ray
    assert not check(notebook["spread_of_ray"])
    assert "need not add up to 1" in capsys.readouterr().out
    assert accepts(check, exercises.spread_of_ray)


def normalises_the_mean_alone(weights, depths):
    mean = (weights * depths).sum(-1) / weights.sum(-1)
    return ((weights * depths**2).sum(-1) - mean**2).clamp(min=0).sqrt()


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda w, z: (w * (z - z.mean(-1, keepdim=True)) ** 2).sum(-1).sqrt(), "spread 0"),
        (lambda w, z: exercises.spread_of_ray(w, z) ** 2, "the spread is 0.5"),
        (lambda w, z: exercises.spread_of_ray(w, z) * w.sum(-1).sqrt(), "and in the squares"),
        (normalises_the_mean_alone, "and in the squares"),
        (lambda w, z: exercises.spread_of_ray(w, z) / 0, "inf or nan"),
    ],
)
def test_spread_of_ray_rejects(wrong, hint):
    assert rejects(exercises.check_spread_of_ray, wrong, hint)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda x: x, "detail should be"),
        (lambda x: torch.ones_like(x), "PSNR should be"),
        (lambda x: (x + 0.05 * torch.randn_like(x)).clamp(0, 1), "detail should be"),
        (lambda x: F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1), "shape"),
    ],
)
def test_smooth_rejects(wrong, hint):
    assert rejects(exercises.check_smooth, wrong, hint)
