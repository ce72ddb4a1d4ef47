"""Every metric against a closed form."""

import math

import numpy as np
import pytest
import torch
import trimesh

from gsv3d_lib.evaluation.metrics import (
    bootstrap_interval,
    chamfer_distance,
    depth_l1,
    f_score,
    occupancy_grid,
    psnr,
    ssim,
    surface_points,
    volume_iou,
)


def random_images(*shape, seed=0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- pictures


def test_psnr_of_known_errors():
    truth = torch.zeros(2, 4, 4, 3)
    assert psnr(truth + 0.1, truth) == pytest.approx(20)
    two_errors = torch.stack([truth[0] + 0.1, truth[1] + 0.01])
    # the mean of 20 and 40 dB, not the dB of the mean
    assert psnr(two_errors, truth) == pytest.approx(30)
    assert psnr(truth[0] + 1, truth[0]) == pytest.approx(0)
    assert psnr(truth, truth) == math.inf
    assert psnr(truth.numpy() + 0.1, truth) == pytest.approx(20)


def test_ssim_bounds_and_order():
    truth = random_images(2, 32, 32, 3)
    assert ssim(truth, truth) == pytest.approx(1)
    noise = random_images(2, 32, 32, 3, seed=1) - 0.5
    values = [ssim((truth + scale * noise).clamp(0, 1), truth) for scale in (0.05, 0.2, 1.0)]
    assert values == sorted(values, reverse=True) and values[0] < 1


def test_ssim_of_two_flat_images_has_a_closed_form():
    # No variance: only the luminance term (2ab + C1) / (a^2 + b^2 + C1) with C1 =
    # 0.01^2 is left.
    a, b = 0.3, 0.7
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(torch.full((16, 16, 3), a), torch.full((16, 16, 3), b)) == pytest.approx(
        expected, abs=1e-6
    )


def test_ssim_matches_the_formula_at_one_pixel():
    # An 11 x 11 image has one full window; Wang's SSIM there, written out.
    a, b = (
        random_images(11, 11, 3).double().numpy(),
        random_images(11, 11, 3, seed=1).double().numpy(),
    )
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line)[..., None] / np.outer(line, line).sum()
    mean_a, mean_b = (weight * a).sum((0, 1)), (weight * b).sum((0, 1))
    var_a, var_b = (
        (weight * a * a).sum((0, 1)) - mean_a**2,
        (weight * b * b).sum((0, 1)) - mean_b**2,
    )
    cov = (weight * a * b).sum((0, 1)) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top, bottom = (
        (2 * mean_a * mean_b + c1) * (2 * cov + c2),
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2),
    )
    assert ssim(a, b) == pytest.approx(float((top / bottom).mean()), abs=1e-6)


def test_depth_l1_is_over_the_true_foreground():
    truth = torch.tensor([[3.0, 3.5], [0.0, 4.0]])[None, ..., None]
    predicted = torch.tensor([[3.1, 3.2], [2.0, 0.0]])[None, ..., None]
    assert depth_l1(predicted, truth) == pytest.approx((0.1 + 0.3 + 1.0) / 3)
    assert depth_l1(predicted, truth, missing=0.0) == pytest.approx(0.4 / 3)
    assert math.isnan(depth_l1(predicted, torch.zeros_like(truth)))


def test_shapes_of_images_are_checked():
    image = torch.zeros(16, 16, 3)
    for metric in (psnr, ssim):
        with pytest.raises(
            ValueError, match=r"\[..., H, W, 3\], got \(16, 16, 3\) and \(8, 16, 3\)"
        ):
            metric(image, image[:8])
    with pytest.raises(ValueError, match="one shape"):
        psnr(image.movedim(-1, 0), image.movedim(-1, 0))
    with pytest.raises(ValueError, match="11 pixels wide, got images of 8 x 8"):
        ssim(image[:8, :8], image[:8, :8])
    with pytest.raises(ValueError, match="one shape"):
        depth_l1(image, image[:4])


# ---------------------------------------------------------------- shapes


def test_chamfer_of_known_points():
    a = np.array([[0.0, 0, 0], [1, 0, 0]])
    b = np.array([[0.0, 0.2, 0]])
    forward = (0.2 + math.hypot(1, 0.2)) / 2
    assert chamfer_distance(a, b) == pytest.approx((forward + 0.2) / 2)
    assert chamfer_distance(a, b) == chamfer_distance(b, a)
    assert chamfer_distance(a, a) == 0


def test_chamfer_of_concentric_spheres_is_their_gap():
    sphere = trimesh.creation.icosphere(subdivisions=4)
    points = surface_points(sphere, 4096)
    assert chamfer_distance(points, 0.5 * points) == pytest.approx(0.5, abs=5e-3)
    floor = chamfer_distance(points, surface_points(sphere, 4096, seed=1))
    assert 0.024 < floor < 0.032  # what the docstring says about sampling


def test_f_score_counts_both_ways():
    truth = np.array([[float(i), 0, 0] for i in range(4)])
    # one of two is near; it covers one of four
    predicted = np.array([[0.0, 0.04, 0], [1, 0.06, 0]])
    assert f_score(predicted, truth, 0.05) == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert f_score(truth, truth, 0.0) == 1
    assert f_score(truth + 10, truth) == 0


def test_volume_iou_of_overlapping_boxes():
    a, b = np.zeros((2, 8, 8, 8), dtype=bool)
    a[:4], b[2:6] = True, True
    assert volume_iou(a, b) == pytest.approx(2 / 6)
    assert volume_iou(torch.from_numpy(a), a) == 1
    assert volume_iou(np.zeros_like(a), np.zeros_like(a)) == 1
    assert volume_iou(a, np.zeros_like(a)) == 0
    with pytest.raises(ValueError, match="one shape"):
        volume_iou(a, b[:4])


def test_occupancy_of_a_box_is_exact_and_axes_are_in_order():
    box = trimesh.creation.box(bounds=[[-0.5, -0.25, -0.75], [0.25, 0.5, 0.0]])
    grid = occupancy_grid(box, 16)
    centres = (np.arange(16) + 0.5) / 8 - 1
    x, y, z = np.meshgrid(centres, centres, centres, indexing="ij")
    expected = (x > -0.5) & (x < 0.25) & (y > -0.25) & (y < 0.5) & (z > -0.75) & (z < 0)
    assert (grid == expected).all()


def test_occupancy_of_a_sphere_and_of_overlapping_parts():
    sphere = trimesh.creation.icosphere(subdivisions=4, radius=0.8)
    cell = (2 / 64) ** 3
    assert occupancy_grid(sphere).sum() * cell == pytest.approx(4 / 3 * math.pi * 0.8**3, rel=0.01)
    box = trimesh.creation.box(extents=(0.4, 0.4, 1.8))
    both = trimesh.util.concatenate([sphere, box])  # inside of both parts the winding number is 2
    assert (occupancy_grid(both) == (occupancy_grid(sphere) | occupancy_grid(box))).all()


def test_occupancy_survives_a_small_hole():
    sphere = trimesh.creation.icosphere(subdivisions=4, radius=0.8)
    holed = sphere.copy()
    holed.update_faces(np.arange(len(sphere.faces)) > 3)
    assert volume_iou(occupancy_grid(holed), occupancy_grid(sphere)) > 0.995


def test_surface_points_repeat_and_lie_on_the_surface():
    box = trimesh.creation.box(extents=(2, 2, 2))
    points = surface_points(box, 1000, seed=3)
    assert points.shape == (1000, 3) and np.allclose(np.abs(points).max(axis=1), 1)
    assert (points == surface_points(box, 1000, seed=3)).all()
    with pytest.raises(ValueError, match="without faces"):
        surface_points(trimesh.Trimesh(vertices=np.zeros((3, 3)), faces=np.zeros((0, 3), int)))


@pytest.mark.parametrize("points", [np.zeros((0, 3)), np.zeros((4, 2)), np.full((4, 3), np.nan)])
def test_point_sets_are_checked(points):
    with pytest.raises(ValueError, match=r"\[N, 3\] with N >= 1"):
        chamfer_distance(points, np.zeros((4, 3)))


# ---------------------------------------------------------------- comparisons


def test_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(1.0, 2.0, 400)
    half = 1.96 * values.std() / math.sqrt(400)
    assert bootstrap_interval(values) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.03
    )
    assert bootstrap_interval(values) == bootstrap_interval(np.append(values, np.nan))
    assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([np.nan])))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [
        low < 0 < high
        for low, high in (bootstrap_interval(rng.normal(size=40), 300) for _ in range(300))
    ]
    assert 0.90 < np.mean(inside) < 0.98
