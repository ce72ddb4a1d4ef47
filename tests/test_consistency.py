"""Agreement of views, ghosting and detail, each on scenes whose number is known."""

import math

import pytest
import torch
from tiny_world import BALLS, ball_pictures

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.evaluation.consistency import (
    detail,
    ghost_map,
    ghosting,
    gradient_length,
    reprojection_error,
    split_agreement,
    view_depths,
)
from gsv3d_lib.gaussians import Gaussians

SIZE = 48


def sheet(x: float, opacity: float = 0.99, width: int = 40) -> Gaussians:
    """A square of Gaussians in the plane at x, in full view from the x axis."""
    line = torch.linspace(-0.6, 0.6, width)
    y, z = (t.reshape(-1) for t in torch.meshgrid(line, line, indexing="ij"))
    means = torch.stack([torch.full_like(y, x), y, z], dim=-1)
    quats = torch.tensor([1.0, 0, 0, 0]).expand(len(y), 4)
    return Gaussians(
        means, quats, torch.full((len(y), 3), 0.02), torch.full((len(y),), opacity), means.abs()
    )


def same_camera(count: int):
    return orbit_cameras(torch.zeros(count), 0.0, SIZE)


# ---------------------------------------------------------------- reprojection


def test_true_depth_maps_of_one_object_agree():
    cameras = orbit_cameras(torch.arange(16) * 22.5, 15.0, 96)
    _, alpha, depth = ball_pictures(cameras, BALLS)
    error = reprojection_error(depth, alpha, cameras)
    assert error < 0.015  # a pixel is 0.022 wide; its depth is read at the centre
    wider = reprojection_error(
        *(t[::2] for t in (depth, alpha)), orbit_cameras(torch.arange(8) * 45.0, 15.0, 96)
    )
    assert error < wider  # the further the neighbour, the fewer points it sees, and at a slant


def test_a_view_that_lies_is_found():
    cameras = orbit_cameras(torch.arange(16) * 22.5, 15.0, 96)
    _, alpha, depth = ball_pictures(cameras, BALLS)
    honest = reprojection_error(depth, alpha, cameras)
    lie = depth.clone()
    lie[3] = torch.where(depth[3] > 0, depth[3] - 0.3, 0)  # one of 16 stands 0.3 nearer
    assert reprojection_error(lie, alpha, cameras) > honest + 0.01


@pytest.mark.parametrize(("gap", "expected"), [(0.05, 0.05), (0.3, 0.3)])
def test_the_error_of_two_parallel_planes_is_their_distance(gap, expected):
    """At 0.05 both views find the other 0.05 off. At 0.3 the far points are hidden from
    the view of the near plane, and only the near points, which the other view sees
    past, count.
    """
    depth = torch.full((2, SIZE, SIZE, 1), 3.0)
    depth[1] += gap
    alpha = torch.ones_like(depth)
    assert reprojection_error(depth, alpha, same_camera(2)) == pytest.approx(expected, abs=1e-5)


def test_no_common_surface_is_no_number():
    depth, alpha = torch.full((2, SIZE, SIZE, 1), 3.0), torch.zeros(2, SIZE, SIZE, 1)
    alpha[0, :, :10] = alpha[1, :, -10:] = 1
    assert math.isnan(reprojection_error(depth, alpha, same_camera(2)))
    with pytest.raises(
        ValueError, match=r"depth and alpha are \(2, 48, 48, 1\) here; got \(2, 48, 48\)"
    ):
        reprojection_error(depth[..., 0], alpha, same_camera(2))


def test_each_view_shows_its_own_gaussians():
    both = Gaussians.concatenate([sheet(0.0), sheet(0.5)])
    depth, alpha = view_depths(both, same_camera(2))
    middle = depth[:, SIZE // 2, SIZE // 2, 0]
    assert (alpha[:, SIZE // 2, SIZE // 2] > 0.9).all()
    assert (middle[0] - middle[1]).item() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="3200 Gaussians are not 3 equal shares"):
        view_depths(both, same_camera(3))


# ---------------------------------------------------------------- odd and even views


def test_odd_and_even_views_are_compared():
    cameras, latents = same_camera(4), torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 4, 2, 2)
    seen = []

    def decode(latents, cameras):
        seen.append((latents[:, 0, 0, 0].tolist(), len(cameras)))
        return sheet(0.1 * float(latents[0, 0, 0, 0]))  # even views say x = 0, odd ones x = 0.1

    scores = split_agreement(decode, latents, cameras)
    assert seen == [([0.0, 2.0], 2), ([1.0, 3.0], 2)]
    assert scores["split_depth"] == pytest.approx(0.1, abs=2e-3)
    same = split_agreement(lambda *_: sheet(0.0), latents, cameras)
    assert same["split_psnr"] == math.inf and same["split_depth"] == 0 and scores["split_psnr"] < 40
    with pytest.raises(ValueError, match="An even number of views"):
        split_agreement(decode, latents[:3], cameras[:3])


# ---------------------------------------------------------------- ghosting, detail


def test_ghosting_knows_a_solid_from_a_double():
    camera, mask = same_camera(1), torch.zeros(1, SIZE, SIZE, 1)
    mask[:, 20:28, 20:28] = 1
    double = Gaussians.concatenate([sheet(0.4, opacity=0.1), sheet(-0.4)])
    assert ghosting(sheet(0.0), camera, mask) == 0
    assert ghosting(double, camera, mask) == 1
    assert ghosting(sheet(0.0, opacity=0.02), camera, mask) > 0.9  # the background shines through
    half = mask.clone()
    half[:, 20:28, 24:] = 0
    assert (
        ghost_map(double, camera).shape == (1, SIZE, SIZE) and ghosting(double, camera, half) == 1
    )
    assert math.isnan(ghosting(double, camera, torch.zeros_like(mask)))


def test_detail_is_the_share_of_the_gradient():
    images, ones = (
        torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 16, 16, 1),
    )
    assert detail(images, images, ones) == pytest.approx(1)
    assert detail(0.25 * images + 0.3, images, ones) == pytest.approx(0.25)
    assert detail(torch.full_like(images, 0.5), images, ones) == 0
    assert math.isnan(detail(images, torch.ones_like(images), ones))


def test_the_edge_of_the_object_is_no_texture():
    white, mask = torch.ones(1, 24, 24, 3), torch.zeros(1, 24, 24, 1)
    mask[:, 6:18, 6:18] = 1
    ramp = torch.linspace(0, 0.5, 24).reshape(1, 1, 24, 1).expand(1, 24, 24, 3)
    truth = torch.where(mask > 0, ramp, white)
    assert gradient_length(ramp).mean() == pytest.approx(math.sqrt(3) * 0.5 / 23, rel=1e-4)
    blunt = torch.where(mask > 0, ramp, 0.6 * white)  # another background moves only the edge
    assert detail(blunt, truth, mask) == pytest.approx(1)
