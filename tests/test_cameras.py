"""The conventions of cameras.py, each as a statement about where a point of the world
lands in the image.
"""

import math

import pytest
import torch

from gsv3d_lib.cameras import (
    AZIMUTH_SIGN,
    DISTANCE,
    FOV_DEG,
    Cameras,
    batch_cameras,
    from_blender,
    from_c2w,
    from_opengl_view,
    intrinsics,
    invert_rigid,
    opencv_to_opengl,
    opengl_to_opencv,
    orbit_cameras,
    pluecker_rays,
    ray_grid,
    read_at,
    sphere_cameras,
    sv3d_azimuths,
    to_blender,
    to_opengl_view,
)
from gsv3d_lib.data.dataset import list_objects, read_object

SIZE = 64


@pytest.fixture
def cameras() -> Cameras:
    return orbit_cameras([0.0, 33.0, 170.0, 291.0], [0.0, 20.0, -35.0, 80.0], SIZE)


def project(cameras: Cameras, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """World points [..., 3] -> pixel coordinates (u, v) [V, ..., 2] and z-depth [V,
    ...].
    """
    rotation, shift = cameras.viewmats[:, :3, :3], cameras.viewmats[:, :3, 3]
    local = torch.einsum("vij,...j->v...i", rotation, points)
    local = local + shift.reshape(len(cameras), *[1] * (points.ndim - 1), 3)
    homogeneous = torch.einsum("vij,v...j->v...i", cameras.Ks, local)
    return homogeneous[..., :2] / homogeneous[..., 2:], local[..., 2]


# ------------------------------------------------ where cameras stand and what they see


def test_azimuth_0_is_on_plus_x_and_elevation_lifts():
    positions = orbit_cameras([0, 0, 180], [0, 30, 0], SIZE).positions()
    assert torch.allclose(positions[0], torch.tensor([DISTANCE, 0, 0]), atol=1e-5)
    expected = DISTANCE * torch.tensor([math.cos(math.pi / 6), 0, 0.5])
    assert torch.allclose(positions[1], expected, atol=1e-5)
    assert torch.allclose(positions[2], torch.tensor([-DISTANCE, 0, 0]), atol=1e-5)


def test_the_sign_of_the_azimuth_is_one_constant():
    """As in SV3D: the camera moves counter-clockwise seen from above, from +x to +y."""
    assert AZIMUTH_SIGN == 1.0
    position = orbit_cameras([90], 0.0, SIZE).positions()[0]
    assert torch.allclose(position, torch.tensor([0, AZIMUTH_SIGN * DISTANCE, 0]), atol=1e-5)


def test_up_is_up_and_right_is_right():
    front = orbit_cameras([0], 0.0, SIZE)
    (pixels,), (depth,) = project(
        front, torch.tensor([[0.0, 0, 0.5], [0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]])
    )
    assert pixels[0, 1] < SIZE / 2 and pixels[0, 0] == pytest.approx(SIZE / 2)  # +z: upper half
    # +y: right half, seen from +x
    assert pixels[1, 0] > SIZE / 2 and pixels[1, 1] == pytest.approx(SIZE / 2)
    assert depth[2] == pytest.approx(DISTANCE - 0.5) and depth[3] == pytest.approx(DISTANCE)


def test_every_camera_looks_at_the_origin(cameras):
    pixels, depth = project(cameras, torch.zeros(3))
    assert torch.allclose(pixels, torch.full((4, 2), SIZE / 2), atol=1e-4)
    assert torch.allclose(depth, torch.full((4,), DISTANCE), atol=1e-5)
    rotation = cameras.viewmats[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(4, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(4))  # a rotation, not a mirror


def test_the_unit_ball_just_fits():
    outline = math.tan(math.asin(1 / DISTANCE))  # of the ball, at depth 1
    frame = math.tan(math.radians(FOV_DEG / 2))
    assert 0.97 < outline / frame < 1


def test_a_camera_straight_above_is_refused():
    for elevation in (90.0, -90.0, 100.0, torch.tensor([95.0])):
        with pytest.raises(ValueError, match="Elevations lie between -90 and 90 degrees"):
            orbit_cameras([0], elevation, SIZE)


def test_intrinsics_are_the_field_of_view():
    K = intrinsics(100, 90.0)
    assert torch.allclose(K, torch.tensor([[50.0, 0, 50], [0, 50, 50], [0, 0, 1]]), atol=1e-5)


# ---------------------------------------------------------------- SV3D's orbit


def test_sv3d_order_ends_with_the_condition_view():
    assert sv3d_azimuths(4).tolist() == [90, 180, 270, 0]
    for frames in (1, 5, 16, 21):
        azimuths = sv3d_azimuths(frames)
        assert len(azimuths) == frames and azimuths[-1] == 0
        assert torch.allclose(torch.diff(azimuths[:-1]), torch.tensor(360 / frames), atol=1e-3)


# ---------------------------------------------------------------- rays


def test_rays_go_through_pixel_centres(cameras):
    origins, directions = ray_grid(cameras, SIZE, SIZE)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(4, SIZE, SIZE), atol=1e-5)
    assert torch.allclose(origins[:, 5, 7], cameras.positions())
    for v in range(len(cameras)):
        pixels, depth = project(cameras[v], origins[v] + 2.5 * directions[v])
        rows, columns = torch.meshgrid(
            torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij"
        )
        assert torch.allclose(pixels[0], torch.stack([columns, rows], -1), atol=1e-3)
        assert (depth > 0).all()


def test_pluecker_is_the_closed_form(cameras):
    origins, directions = ray_grid(cameras, 6, 9)
    rays = pluecker_rays(cameras, 6, 9)
    moment, direction = rays[..., :3], rays[..., 3:]
    assert rays.shape == (4, 6, 9, 6) and torch.equal(direction, directions)
    assert (moment * direction).sum(-1).abs().max() < 1e-5  # (o x d) is orthogonal to d
    for t in (-1.3, 0.7, 4.0):  # a ray is a line: any origin on it has the same moment
        slid = torch.linalg.cross(origins + t * directions, directions)
        assert torch.allclose(slid, moment, atol=1e-5)
    along = (origins * directions).sum(-1, keepdim=True)
    gap = (origins - along * directions).norm(dim=-1)  # from the world's origin to the ray
    assert torch.allclose(moment.norm(dim=-1), gap, atol=1e-5)


def test_a_camera_further_back_has_the_same_central_ray():
    near, far = (orbit_cameras([40], 10.0, SIZE, distance=d) for d in (2.0, 5.0))
    assert torch.allclose(pluecker_rays(near, 1, 1), pluecker_rays(far, 1, 1), atol=1e-6)


def test_latent_rays_agree_with_full_resolution(cameras):
    """Every third pixel centre of 72 x 72 is a pixel centre of 24 x 24; an even factor
    lies between four pixels.
    """
    at_72 = cameras.resized(72, 72)
    _, full = ray_grid(at_72, 72, 72)
    _, third = ray_grid(at_72, 24, 24)
    assert torch.allclose(third, full[:, 1::3, 1::3], atol=1e-6)
    _, eighth = ray_grid(at_72, 9, 9)
    forward = at_72.c2w()[:, None, None, :3, 2]
    # depth 1, where positions average linearly
    on_plane = full / (full * forward).sum(-1, keepdim=True)
    corners = [on_plane[:, i::8, j::8] for i in (3, 4) for j in (3, 4)]
    middle = torch.nn.functional.normalize(sum(corners), dim=-1)
    assert torch.allclose(eighth, middle, atol=1e-6)


# ---------------------------------------------------------------- the container


def test_resized_cameras_scale_the_projection(cameras):
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 0.4
    small = cameras.resized(16, 32)
    (before, depth), (after, same) = project(cameras, points), project(small, points)
    assert torch.allclose(after, before * torch.tensor([16 / SIZE, 32 / SIZE]), atol=1e-4)
    assert torch.equal(depth, same) and (small.width, small.height) == (16, 32)
    back = small.resized(SIZE, SIZE)
    assert torch.allclose(back.Ks, cameras.Ks)


def test_points_on_the_ray_of_a_pixel_read_that_pixel(cameras):
    camera, picture = cameras[1], torch.arange(24.0 * 32).reshape(24, 32, 1) + 1
    camera = camera.resized(32, 24)
    origins, directions = ray_grid(camera, 24, 32)
    points = (origins + 3.0 * directions).reshape(-1, 3)
    z, values = read_at(points, picture, camera)
    assert torch.equal(values, picture.flatten())
    expected = (points @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3])[:, 2]
    assert torch.allclose(z, expected)
    # outside of the picture
    assert read_at(torch.tensor([[0.0, 0.0, 50.0]]), picture, camera)[1] == 0


def test_indexing_always_gives_a_batch(cameras):
    for index, rows in (
        (2, [2]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        ([3, 0], [3, 0]),
        (torch.tensor([1]), [1]),
        (torch.tensor(1), [1]),
    ):
        part = cameras[index]
        assert len(part) == len(rows) and torch.equal(part.viewmats, cameras.viewmats[rows])


def test_wrong_shapes_are_refused_with_the_shape(cameras):
    with pytest.raises(ValueError, match=r"\(4, 3, 4\)"):
        Cameras(cameras.viewmats[:, :3], cameras.Ks, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        Cameras(cameras.viewmats, cameras.Ks[0], SIZE, SIZE)


# ---------------------------------------------------------------- converters


def test_invert_rigid_is_the_inverse(cameras):
    product = invert_rigid(cameras.viewmats) @ cameras.viewmats
    assert torch.allclose(product, torch.eye(4).expand(4, 4, 4), atol=1e-6)


def test_opengl_cameras_look_along_minus_z(cameras):
    c2w = cameras.c2w()
    opengl = opencv_to_opengl(c2w)
    assert torch.equal(opengl_to_opencv(opengl), c2w)
    forward = -torch.nn.functional.normalize(cameras.positions(), dim=-1)
    assert torch.allclose(opengl[:, :3, 2], -forward, atol=1e-6)
    assert (opengl[:, 2, 1] > 0).all()  # its y axis points up
    assert torch.equal(opengl[:, :3, 3], c2w[:, :3, 3])


def test_blender_round_trip_and_its_default_camera(cameras):
    back = from_blender(to_blender(cameras), cameras.Ks, SIZE, SIZE)
    assert torch.allclose(back.viewmats, cameras.viewmats, atol=1e-6)
    above = torch.eye(4)[None].clone()
    above[0, 2, 3] = 5.0  # an unrotated Blender camera looks down -z, its top towards +y
    camera = from_blender(above, cameras.Ks[:1], SIZE, SIZE)
    (pixels,), (depth,) = project(camera, torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 0, 0]]))
    assert depth[0] == 5 and pixels[1, 1] < SIZE / 2 and pixels[2, 0] > SIZE / 2


def test_c2w_round_trip(cameras):
    back = from_c2w(cameras.c2w(), cameras.Ks, SIZE, SIZE)
    assert torch.allclose(back.viewmats, cameras.viewmats, atol=1e-6)
    assert torch.equal(back.Ks, cameras.Ks)


def test_opengl_view_round_trip_and_meaning(cameras):
    view = to_opengl_view(cameras)
    back = from_opengl_view(view, cameras.Ks, SIZE, SIZE)
    assert torch.allclose(back.viewmats, cameras.viewmats, atol=1e-6)
    x, y, z = point = torch.tensor([0.3, -0.2, 0.6])
    # the same point in the y-up world
    seen = (view @ torch.stack([x, z, -y, torch.tensor(1.0)]))[:, :3]
    ours = (cameras.viewmats @ torch.cat([point, torch.ones(1)]))[:, :3]
    assert torch.allclose(seen, ours * torch.tensor([1.0, -1, -1]), atol=1e-6)


def test_our_orbit_is_the_one_of_the_shared_scans(shared_objects):
    scans = shared_objects / "gso"
    for row in list_objects(scans)[:3]:
        views = read_object(scans, row["id"])
        ours = orbit_cameras(
            views.azimuths, torch.from_numpy(views.elevations), views.rgba.shape[1]
        )
        # they stand at 3.5088, not 3.509
        assert torch.allclose(ours.c2w(), views.cameras.c2w(), atol=1e-3)
        assert torch.allclose(ours.Ks, views.cameras.Ks, atol=1e-2)


def test_checked_and_unchecked_orbits_are_the_same():
    azimuths, elevations = (
        torch.tensor([0.0, 22.5, 180.0, 337.5]),
        torch.tensor([-80.0, 0.0, 15.0, 89.0]),
    )
    checked = orbit_cameras(azimuths, elevations, 48, distance=2.5, fov_deg=40.0)
    unchecked = sphere_cameras(azimuths, elevations, 48, distance=2.5, fov_deg=40.0)
    assert torch.equal(checked.viewmats, unchecked.viewmats) and torch.equal(
        checked.Ks, unchecked.Ks
    )
    assert (checked.width, checked.height) == (unchecked.width, unchecked.height) == (48, 48)
    one = orbit_cameras(azimuths, 15.0, 48)  # one elevation for all
    assert torch.equal(one.viewmats, sphere_cameras(azimuths, torch.full((4,), 15.0), 48).viewmats)
    batched = batch_cameras(azimuths[None], elevations[None], 48)[0]
    assert torch.equal(batched.viewmats, orbit_cameras(azimuths, elevations, 48).viewmats)
