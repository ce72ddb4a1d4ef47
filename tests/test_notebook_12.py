"""Notebook 12: its derivations hold, and its checkers find typical errors."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from notebook_world import accepts, definitions, rejects
from scipy import ndimage
from scipy.spatial import Delaunay
from scipy.stats import spearmanr

from gsv3d_lib.course.exercises import open_problems as exercises
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rotations import multiply_quaternions, rotation_matrices


@pytest.fixture(scope="module")
def notebook() -> dict:
    return definitions("12")


def random_gaussians(count=20, seed=0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=torch.randn(count, 3, generator=generator),
        quats=torch.randn(count, 4, generator=generator),
        scales=0.1 + torch.rand(count, 3, generator=generator),
        opacities=torch.full((count,), 0.6),
        colors=torch.rand(count, 3, generator=generator),
    )


# ---------------------------------------------------------------- derivations


def test_rank_correlation_is_spearmans(notebook):
    a, b = torch.rand(2, 300, generator=torch.Generator().manual_seed(0))
    b = a + 0.3 * b
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert notebook["rank_correlation"](a, b) == pytest.approx(expected)
    assert exercises.rank_correlation(a, b) == pytest.approx(expected)


def test_a_wrong_mask_grows_and_shrinks(notebook):
    mask = np.zeros((20, 20), bool)
    mask[8:12, 8:12] = True
    larger, smaller = (notebook["wrong_mask"](mask, pixels) for pixels in (2, -1))
    assert larger.sum() > mask.sum() > smaller.sum() == 4
    assert larger[mask].all() and not smaller[~mask].any()
    assert np.array_equal(notebook["wrong_mask"](mask, 0), mask)


def test_an_object_is_placed_with_its_gaussians(notebook):
    start = random_gaussians()
    moved = notebook["placed"](start, 0.5, (1.0, 2.0, 3.0))
    assert torch.allclose(moved.means, 0.5 * start.means + torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(moved.covariances(), 0.25 * start.covariances(), atol=1e-6)


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize(
    ("stub", "name"),
    [("spearman", "rank_correlation"), ("coverage", "coverage"), ("clean_mask", "clean_mask")],
)
def test_stubs_are_not_written_and_solutions_are_right(notebook, stub, name, capsys):
    check = getattr(exercises, f"check_{name}")
    assert not check(notebook[stub])
    assert "not written yet" in capsys.readouterr().out
    assert accepts(check, getattr(exercises, name))


def ranked(a, b, ranks):
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]).double())[0, 1]


def test_tied_ranks_are_spearmans():
    a, b = torch.randint(0, 5, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert exercises.rank_correlation(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1], "ranks, not values"),
        (lambda a, b: abs(exercises.rank_correlation(a, b)), "opposite order"),
        (
            lambda a, b: torch.corrcoef(torch.stack([a.argsort(), b.argsort()]).double())[0, 1],
            "argsort of that",
        ),
        (lambda a, b: ranked(a, b, lambda x: x.argsort().argsort()), "share the mean"),
        (lambda a, b: ranked(a, b, lambda x: x.unique(return_inverse=True)[1]), "share the mean"),
        (lambda a, b: ranked(a, b, lambda x: (x[:, None] > x).sum(1)), "share the mean"),
    ],
)
def test_rank_correlation_rejects(wrong, hint):
    assert rejects(exercises.check_rank_correlation, wrong, hint)


def inside(samples, truth):
    return exercises.coverage(samples, truth)[0]


def between_quantiles(samples, truth):
    low, high = samples.quantile(torch.tensor([0.025, 0.975]), dim=0)
    return ((truth >= low) & (truth <= high)).double().mean()


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda s, t: (inside(s, t), 1.0), "Even a perfect sampler misses some"),
        (lambda s, t: (inside(s, t), 1 - 1 / len(s)), "smallest or the largest of 4"),
        (lambda s, t: (1 - inside(s, t) + 0.1, 0.5), "Two of four truths"),
        (lambda s, t: (between_quantiles(s, t), (len(s) - 1) / (len(s) + 1)), "no quantiles"),
        (lambda s, t: inside(s, t), "Return .measured, expected."),
    ],
)
def test_coverage_rejects(wrong, hint):
    assert rejects(exercises.check_coverage, wrong, hint)


def test_the_seeded_bug_is_told_and_its_repair_accepted(notebook, capsys):
    check = exercises.check_turned
    assert not check(notebook["turned_about_z"])
    assert "each Gaussian turns with it" in capsys.readouterr().out
    assert accepts(check, exercises.turned)


def about_z(degrees):
    half = math.radians(degrees) / 2
    return torch.tensor([[math.cos(half), 0.0, 0.0, math.sin(half)]])


def by_quaternion(gaussians, degrees, quats):
    return dataclasses.replace(exercises.turned(gaussians, degrees), quats=quats)


def turned_scales(gaussians, degrees):
    turn = rotation_matrices(about_z(degrees))[0]
    means = exercises.turned(gaussians, degrees).means
    scales = (gaussians.scales @ turn.T).abs()
    return dataclasses.replace(gaussians, means=means, scales=scales)


def backwards(gaussians, degrees):
    """The quaternion of the turn on the wrong side."""
    turned = exercises.turned(gaussians, degrees)
    w, z = math.cos(math.radians(degrees) / 2), math.sin(math.radians(degrees) / 2)
    a, b, c, d = gaussians.quats.unbind(-1)
    quats = torch.stack([w * a - z * d, w * b + z * c, w * c - z * b, w * d + z * a], dim=-1)
    return dataclasses.replace(turned, quats=quats * torch.tensor([1.0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda g, angle: exercises.turned(g, -angle), "takes x to y"),
        (
            lambda g, angle: dataclasses.replace(exercises.turned(g, angle), quats=g.quats),
            "along x",
        ),
        (backwards, "along x|leaning"),
        (
            lambda g, angle: by_quaternion(g, angle, multiply_quaternions(g.quats, about_z(angle))),
            "on the left",
        ),
        (
            lambda g, angle: by_quaternion(
                g, angle, multiply_quaternions(about_z(-angle), g.quats)
            ),
            "the other",
        ),
        (lambda g, angle: by_quaternion(g, angle, about_z(angle)), "do not replace it"),
        (turned_scales, "its scales stay"),
        (lambda g, angle: g.means, "Return Gaussians"),
    ],
)
def test_turned_rejects(wrong, hint):
    assert rejects(exercises.check_turned, wrong, hint)


def convex_hull(mask):
    inside = np.argwhere(mask)
    everywhere = np.argwhere(np.ones_like(mask))
    return (Delaunay(inside).find_simplex(everywhere) >= 0).reshape(mask.shape)


def test_turning_turns_the_covariance():
    start = random_gaussians()
    c, s = math.cos(0.7), math.sin(0.7)
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    made = exercises.turned(start, math.degrees(0.7)).covariances()
    assert torch.allclose(made, turn @ start.covariances() @ turn.T, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda mask: mask, "reach 0.95"),
        (ndimage.binary_fill_holes, "reach 0.95"),
        (ndimage.binary_opening, "reach 0.95"),
        (lambda mask: ndimage.median_filter(mask, 5), "reach 0.95"),
        (lambda mask: convex_hull(exercises.clean_mask(mask)), "reach 0.95"),
        (lambda mask: mask.astype(float), "boolean mask"),
    ],
)
def test_clean_mask_rejects(wrong, hint):
    assert rejects(exercises.check_clean_mask, wrong, hint)
