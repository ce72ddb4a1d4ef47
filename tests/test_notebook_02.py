"""Notebook 02: what its cells define equals the library, and its checkers know right
from wrong.
"""

import pytest
import torch
from notebook_world import accepts, definitions, rejects

from gsv3d_lib import cameras as cam
from gsv3d_lib.course.exercises import cameras as checks
from gsv3d_lib.rendering import plain

SIZE = 32
FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
AZIMUTHS, ELEVATIONS = [0.0, 33.0, 170.0, 291.0], [0.0, 20.0, -35.0, 70.0]


@pytest.fixture(scope="module")
def cells():
    return definitions("02")


@pytest.fixture
def cameras():
    return cam.orbit_cameras(AZIMUTHS, ELEVATIONS, SIZE)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------ the notebook's functions


def test_cameras_are_the_library_s(cells, cameras):
    places = [cells["place_on_sphere"](a, e, cam.DISTANCE) for a, e in zip(AZIMUTHS, ELEVATIONS)]
    mine = torch.stack([cells["look_at_origin"](place) for place in places])
    assert torch.allclose(mine, cameras.viewmats, atol=1e-5)
    assert torch.allclose(cells["pinhole"](SIZE, cam.FOV_DEG), cameras.Ks[0], atol=1e-5)
    assert torch.allclose(
        cells["flip_camera_axes"](cameras.c2w()), cam.opencv_to_opengl(cameras.c2w()), atol=1e-5
    )


def test_projection_is_where_the_rasteriser_puts_a_splat(cells, cameras):
    points = 0.4 * randn(20, 3)
    quats, scales = torch.tensor([[1.0, 0, 0, 0]]).expand(20, 4), torch.full((20, 3), 0.01)
    for viewmat, K in zip(cameras.viewmats, cameras.Ks):
        centres, _ = plain.project(points, quats, scales, viewmat, K, SIZE, SIZE)
        pixels, z = cells["project"](points, viewmat, K)
        assert torch.allclose(pixels, centres, atol=1e-5, rtol=1e-5)
        assert torch.allclose(z, points @ viewmat[2, :3] + viewmat[2, 3], atol=1e-5)


def test_lifting_follows_the_library_s_rays(cells, cameras):
    origins, directions = cam.ray_grid(cameras, SIZE, SIZE)
    for v, (viewmat, K) in enumerate(zip(cameras.viewmats, cameras.Ks)):
        depth = 3 + 0.3 * torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(v))
        along = origins[v] + directions[v] * (depth / (directions[v] @ viewmat[2, :3]))[..., None]
        assert torch.allclose(cells["lift"](depth, viewmat, K), along.reshape(-1, 3), atol=1e-5)


def test_painted_points_fall_in_their_pixels_and_near_ones_win(cells, cameras):
    camera = cameras[1]
    depth = torch.tensor([3.0, 2.5])[:, None, None].expand(2, SIZE, SIZE)
    sheets = [cells["lift"](d, camera.viewmats[0], camera.Ks[0]) for d in depth]
    colors = torch.rand(SIZE * SIZE, 3, generator=torch.Generator().manual_seed(0))
    points = torch.cat([sheets[1], sheets[0]])
    picture = cells["paint_points"](
        points, torch.cat([colors, 0 * colors]), camera.viewmats[0], camera.Ks[0], SIZE
    )
    assert torch.equal(picture.reshape(-1, 3), colors)


def test_the_picture_plane_is_part_of_the_camera_s_frame(cells, cameras):
    """Points project to the same pixels from the plane on which they were drawn."""
    camera, points = cameras[2], 0.4 * randn(20, 3)
    plane = cells["picture_plane"](points, camera, 1.2)
    there, z = cells["project"](plane, camera.viewmats[0], camera.Ks[0])
    expected, _ = cells["project"](points, camera.viewmats[0], camera.Ks[0])
    assert torch.allclose(there, expected, atol=1e-3) and torch.allclose(z, torch.full_like(z, 1.2))
    line = cells["frame"](camera, 1.2)
    corners, _ = cells["project"](line[[1, 2, 4, 5]], camera.viewmats[0], camera.Ks[0])
    assert torch.allclose(line[0], camera.positions()[0], atol=1e-5)
    assert torch.allclose(corners.amax(0), torch.full((2,), float(SIZE)), atol=1e-3)
    assert torch.allclose(corners.amin(0), torch.zeros(2), atol=1e-3)


def test_pluecker_and_meeting(cells, cameras):
    rays = cells["pluecker"](*cam.ray_grid(cameras, 5, 7))
    assert torch.allclose(rays, cam.pluecker_rays(cameras, 5, 7), atol=1e-5)
    point, origins = randn(3), randn(2, 3, seed=1)
    directions = torch.nn.functional.normalize(point - origins, dim=-1)
    first, second = cells["pluecker"](origins, directions)
    assert cells["meeting"](first, second).abs() < 1e-5
    # two lines at a distance of 0.3 and at right angles
    first = cells["pluecker"](torch.zeros(3), torch.tensor([1.0, 0, 0]))
    second = cells["pluecker"](torch.tensor([0.7, 0.2, 0.3]), torch.tensor([0.0, 1, 0]))
    assert torch.isclose(cells["meeting"](first, second).abs(), torch.tensor(0.3))


# ---------------------------------------------------------------- stubs


@pytest.mark.parametrize(
    ("checker", "stub"),
    [
        (checks.check_from_opengl, "from_opengl"),
        (checks.check_latent_rays, "latent_rays"),
        (checks.check_crop, "crop_camera"),
        (checks.check_carve, "carve"),
    ],
)
def test_stubs_are_not_written_yet(cells, checker, stub, capsys):
    assert not checker(cells[stub])
    assert "not written yet" in capsys.readouterr().out


# ---------------------------------------------------------------- exercise 1


def test_from_opengl_checker():
    def diagonal(*values):
        return torch.diag(torch.tensor([*values, 1.0]))

    inverse = torch.linalg.inv
    assert accepts(
        checks.check_from_opengl, lambda c2w: cam.invert_rigid(cam.opengl_to_opencv(c2w))
    )
    wrong = {
        "still camera to world": lambda c2w: c2w @ FLIP,
        "did not flip": lambda c2w: inverse(c2w),
        "turns the WORLD": lambda c2w: inverse(FLIP @ c2w),
        "Only y is flipped": lambda c2w: inverse(c2w @ diagonal(1.0, -1.0, 1.0)),
        "Only z is flipped": lambda c2w: inverse(c2w @ diagonal(1.0, 1.0, -1.0)),
        "x and z": lambda c2w: inverse(c2w @ diagonal(-1.0, 1.0, -1.0)),
        "does not invert": lambda c2w: (c2w @ FLIP).mT,
    }
    for sentence, solution in wrong.items():
        assert rejects(checks.check_from_opengl, solution, sentence)


# ---------------------------------------------------------------- exercise 2


def rays_with(
    half=0.5,
    unit=True,
    world=True,
    transpose=False,
    scaled=True,
    order="right",
    indexing="ij",
    late=0.0,
):
    def latent_rays(K, c2w, size, grid):
        at = (torch.arange(grid) + half) * (size / grid if scaled else 1) + late
        v, u = torch.meshgrid(at, at, indexing=indexing)
        d = torch.stack([u, v, torch.ones_like(u)], -1) @ torch.linalg.inv(K).T
        if world:
            d = d @ (c2w[:3, :3] if transpose else c2w[:3, :3].T)
        d = torch.nn.functional.normalize(d, dim=-1) if unit else d
        o = c2w[:3, 3].expand_as(d)
        m = torch.linalg.cross(o, d)
        parts = {"right": (m, d), "d x o": (-m, d), "d first": (d, m), "origin": (o, d)}
        return torch.cat(parts[order], -1)

    return latent_rays


def test_latent_rays_checker():
    assert accepts(checks.check_latent_rays, rays_with())
    wrong = {
        "d x o": dict(order="d x o"),
        "moment first": dict(order="d first"),
        "origin itself": dict(order="origin"),
        "half pixel": dict(half=0.0),
        "half a pixel of the IMAGE": dict(half=0.0, late=0.5),
        "grid indices": dict(scaled=False),
        "unit length": dict(unit=False),
        "camera's frame": dict(world=False),
        "transpose": dict(transpose=True),
        "Rows and columns": dict(indexing="xy"),
    }
    for sentence, options in wrong.items():
        assert rejects(checks.check_latent_rays, rays_with(**options), sentence)


# ---------------------------------------------------------------- exercise 3


def crop_with(before=1.0, after=0.0, focal=True, swap=False, offset=0.0, last=False):
    def crop_camera(K, left, top, scale):
        corner = torch.tensor([top, left] if swap else [left, top])
        answer = K.clone()
        answer[:2, 2] = scale * (K[:2, 2] - before * corner) - after * corner + offset
        answer[:2, :2] *= scale if focal else 1
        answer[2, 2] *= scale if last else 1
        return answer

    return crop_camera


def square_crop(K, left, top, scale):
    answer = crop_with()(K, left, top, scale)
    answer[1, 1] = answer[0, 0]
    return answer


def unmoved_crop(K, left, top, scale):
    answer = crop_with()(K, left, top, scale)
    answer[:2, 2] /= scale
    return answer


def test_crop_checker():
    assert accepts(checks.check_crop, crop_with())
    wrong = {
        "as it was": lambda K, left, top, scale: K,
        "crop is missing": crop_with(before=0),
        "resize is missing": lambda K, left, top, scale: crop_with()(K, left, top, 1.0),
        "crop comes first": crop_with(before=0, after=1.0),
        "exchanged": crop_with(swap=True),
        "sign of the crop": crop_with(before=-1.0),
        "f is in pixels too": crop_with(focal=False),
        "last row": crop_with(last=True),
        "two focal lengths differ": square_crop,
        "principal point is in pixels too": unmoved_crop,
        "No half pixel": crop_with(offset=0.5),
        "new pixel": crop_with(offset=3.0),
        "changed the K": lambda K, left, top, scale: K.mul_(2),
    }
    for sentence, solution in wrong.items():
        assert rejects(checks.check_crop, solution, sentence)


# ---------------------------------------------------------------- the bug


def draw_with(to_pixel=torch.floor, across=False, frame=True, front=True):
    def draw_points(points, viewmat, K, size):
        local = points @ viewmat[:3, :3].T + viewmat[:3, 3]
        uv = (local @ K.T)[:, :2] / local[:, 2:]
        column, row = to_pixel(uv.flip(-1) if across else uv).long().unbind(-1)
        inside = (local[:, 2] > 0) | (not front)
        if frame:
            inside &= (column >= 0) & (column < size) & (row >= 0) & (row < size)
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[row[inside].clamp(0, size - 1), column[inside].clamp(0, size - 1)] = True
        return mask

    return draw_points


def test_the_seeded_bug_is_told_and_found(cells, capsys):
    assert not checks.check_draw_points(cells["draw_points"])
    assert "(20.7, 40.2) lies in row 40, column 20; yours" in capsys.readouterr().out
    assert accepts(checks.check_draw_points, draw_with())
    raising = checks.check_draw_points
    assert rejects(raising, draw_with(torch.ceil), "lies in row 40")
    assert rejects(raising, draw_with(across=True), "lies in row 40")
    assert rejects(raising, draw_with(frame=False), "outside of the picture")
    assert rejects(raising, draw_with(torch.trunc), "u = -0.4 is outside")
    assert rejects(raising, draw_with(front=False), "behind the camera")


# ---------------------------------------------------------------- build


def carve_with(agree="all", across=False, offset=0.0, inside=True, inverted=False):
    def carve(masks, viewmats, Ks, points):
        if across:
            masks = masks.mT
        seen = []
        for mask, viewmat, K in zip(masks, viewmats, Ks):
            viewmat = viewmat.inverse() if inverted else viewmat
            local = points @ viewmat[:3, :3].T + viewmat[:3, 3]
            uv = (local @ K.T)[:, :2] / local[:, 2:] + offset
            pixels = uv.floor().long()
            column, row = pixels.clamp(0, mask.shape[-1] - 1).unbind(-1)
            there = (pixels == torch.stack([column, row], -1)).all(-1) | (not inside)
            seen.append(mask[row, column] & there)
        seen = torch.stack(seen)
        share = seen.float().mean(0)
        return {"all": share == 1, "any": share > 0, "vote": share > 0.5, "share": share}[agree]

    return carve


def test_carve_checker():
    assert accepts(checks.check_carve, carve_with())
    wrong = {
        "ONE silhouette": carve_with("any"),
        "views vote": carve_with("vote"),
        "Rows and columns": carve_with(across=True),
        "IoU 0.8.; reach 0.9": carve_with(offset=1.5),
        "take the floor": carve_with(offset=0.5),
        "moved to the edge": carve_with(inside=False),
        "do not invert them": carve_with(inverted=True),
        "True and False": carve_with("share"),
    }
    for sentence, solution in wrong.items():
        assert rejects(checks.check_carve, solution, sentence)


def test_the_solid_s_rays_meet_what_is_inside():
    """The closed-form silhouettes and the closed-form inside belong to one object."""
    masks, cameras, points, truth = checks.carving_task()
    inside = checks.visible_in(masks, cameras, points)
    assert inside[:, truth].float().mean() > 0.995
