"""Notebook 04: what its cells define equals the library, and its checkers know right
from wrong.
"""

import pytest
import torch
from notebook_world import accepts, definitions, rejects

from gsv3d_lib import cameras as cam
from gsv3d_lib import unet
from gsv3d_lib.course.exercises import multiview as checks
from gsv3d_lib.rendering import plain as reference

SIZE = 32
FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


@pytest.fixture(scope="module")
def cells():
    return definitions("04")


@pytest.fixture
def cameras():
    return cam.orbit_cameras([0.0, 33.0, 170.0, 291.0], [0.0, 20.0, -35.0, 70.0], SIZE)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------- the notebook's functions


def test_cameras_are_the_library_s(cells, cameras):
    angles = zip([0.0, 33.0, 170.0, 291.0], [0.0, 20.0, -35.0, 70.0])
    mine = torch.stack([cells["view_matrix"](a, e, cam.DISTANCE) for a, e in angles])
    assert torch.allclose(mine, cameras.viewmats, atol=1e-5)
    assert torch.allclose(cells["pinhole"](SIZE, cam.FOV_DEG), cameras.Ks[0], atol=1e-5)
    assert torch.allclose(
        cells["flip_camera_axes"](cameras.c2w()), cam.opencv_to_opengl(cameras.c2w()), atol=1e-5
    )


def test_projection_is_where_the_rasteriser_puts_a_splat(cells, cameras):
    points = 0.4 * randn(20, 3)
    quats, scales = torch.tensor([[1.0, 0, 0, 0]]).expand(20, 4), torch.full((20, 3), 0.01)
    for viewmat, K in zip(cameras.viewmats, cameras.Ks):
        centres, _ = reference.project(points, quats, scales, viewmat, K, SIZE, SIZE)
        pixels, z = cells["project"](points, viewmat, K)
        assert torch.allclose(pixels, centres, atol=1e-5, rtol=1e-5)
        assert torch.allclose(z, points @ viewmat[2, :3] + viewmat[2, 3], atol=1e-5)


def test_lifting_follows_the_library_s_rays(cells, cameras):
    origins, directions = cam.ray_grid(cameras, SIZE, SIZE)
    for v, (viewmat, K) in enumerate(zip(cameras.viewmats, cameras.Ks)):
        depth = 3 + 0.3 * torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(v))
        along = origins[v] + directions[v] * (depth / (directions[v] @ viewmat[2, :3]))[..., None]
        assert torch.allclose(cells["lift"](depth, viewmat, K), along.reshape(-1, 3), atol=1e-5)


def test_pluecker_and_sinusoids(cells, cameras):
    rays = cells["pluecker"](*cam.ray_grid(cameras, 5, 7))
    assert torch.allclose(rays, cam.pluecker_rays(cameras, 5, 7), atol=1e-5)
    polar, azimuth = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) * 6
    library = unet.angle_features(polar[None], azimuth[None], 1e-5)[0]
    assert torch.allclose(cells["camera_features"](polar, azimuth, 1e-5), library, atol=1e-5)


def sphere_views(cameras, radius=0.8):
    """A ball coloured by position: rgb [V, H, W, 3] and z-depth [V, H, W]."""
    origins, directions = cam.ray_grid(cameras, SIZE, SIZE)
    along = -(origins * directions).sum(-1)
    gap = radius**2 - (origins.square().sum(-1) - along**2)
    points = origins + (along - gap.clamp(min=0).sqrt())[..., None] * directions
    z = (
        torch.einsum("vhwi,vi->vhw", points, cameras.viewmats[:, 2, :3])
        + cameras.viewmats[:, 2, 3, None, None]
    )
    return torch.where((gap > 0)[..., None], 0.5 + 0.5 * points, 1.0), torch.where(gap > 0, z, 0)


def test_consistency_tells_one_object_from_two(cells):
    ring = cam.orbit_cameras(torch.arange(8) * 45.0, 15.0, SIZE)
    rgb, depth = sphere_views(ring)
    painted, seen = cells["carry"](rgb, depth, ring, 0, 1)
    inside = seen & (painted.amax(-1) < 0.95)  # without pixels that interpolate with the background
    assert (
        seen.sum() > 0.4 * (depth[0] > 0).sum() and (painted - rgb[0])[inside].abs().mean() < 0.02
    )
    other = rgb.clone()
    other[1::2] = 1 - other[1::2]
    same, different = (cells["consistency"](x, depth, ring) for x in (rgb, other))
    assert same > 20 and different < same - 8


def test_one_orbit_keeps_each_azimuth_with_its_latent(cells):
    class Rings:
        """Orbits whose latents are their azimuth."""

        def orbit(self, item, start, frames):
            azimuth = cam.sv3d_azimuths(frames)
            return {
                "latents": azimuth[:, None, None, None].expand(-1, 4, 2, 2),
                "azimuth": azimuth,
                "elevation": torch.full((frames,), 15.0),
            }

    from gsv3d_lib.config import preset

    stage = cells["OneOrbit"](None, None, Rings(), preset("tiny"))
    seen = set()
    for k in range(4):
        generator = torch.Generator().manual_seed(k)
        example = stage.example(generator, generator, 0)
        assert torch.equal(example["latents"][:, 0, 0, 0], example["azimuth"])
        assert torch.equal(example["azimuth"].sort().values, cam.sv3d_azimuths(16).sort().values)
        seen.add(tuple(example["azimuth"].tolist()))
    assert len(seen) == 4


# ---------------------------------------------------------------- stubs


@pytest.mark.parametrize(
    ("checker", "stub"),
    [
        (checks.check_orbit, "sv3d_orbit"),
        (checks.check_latent_rays, "latent_rays"),
        (checks.check_from_opengl, "from_opengl"),
    ],
)
def test_stubs_are_not_written_yet(cells, checker, stub, capsys):
    assert not checker(cells[stub])
    assert "not written yet" in capsys.readouterr().out


# ---------------------------------------------------------------- exercise 1


def orbit_with(azimuths, polar=lambda e: 90 - e):
    def sv3d_orbit(num_frames, elevation_deg):
        azimuth = azimuths(num_frames)
        return torch.stack([torch.full_like(azimuth, float(polar(elevation_deg))), azimuth], -1)

    return sv3d_orbit


def test_orbit_checker():
    right = cam.sv3d_azimuths
    assert accepts(checks.check_orbit, orbit_with(right))
    assert rejects(
        checks.check_orbit,
        orbit_with(lambda n: torch.linspace(0, 360, n + 1)[:-1]),
        "condition view is first",
    )
    assert rejects(
        checks.check_orbit, orbit_with(right, polar=lambda e: e), "That is the elevation"
    )
    assert rejects(
        checks.check_orbit, orbit_with(right, polar=lambda e: 90 + e), "sign of the elevation"
    )
    assert rejects(
        checks.check_orbit, orbit_with(lambda n: torch.linspace(0, 360, n + 1)[1:]), "modulo 360"
    )
    assert rejects(
        checks.check_orbit, orbit_with(lambda n: torch.linspace(0, 360, n)), "N \\+ 1 points"
    )
    assert rejects(
        checks.check_orbit, orbit_with(lambda n: torch.linspace(0, 360, n) % 360), "N \\+ 1 points"
    )
    assert rejects(checks.check_orbit, orbit_with(lambda n: -right(n) % 360), "the other way")
    assert rejects(
        checks.check_orbit, lambda n, e: orbit_with(right)(n, e).flip(-1), "columns are exchanged"
    )
    assert rejects(checks.check_orbit, lambda n, e: orbit_with(right)(n, e).deg2rad(), "radians")
    assert rejects(checks.check_orbit, lambda n, e: right(n), "shape")


# ---------------------------------------------------------------- exercise 2


def rays_with(
    half=0.5, unit=True, world=True, transpose=False, scaled=True, order="right", indexing="ij"
):
    def latent_rays(K, c2w, size, grid):
        at = (torch.arange(grid) + half) * (size / grid if scaled else 1)
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
    assert rejects(checks.check_latent_rays, rays_with(order="d x o"), "d x o")
    assert rejects(checks.check_latent_rays, rays_with(order="d first"), "moment first")
    assert rejects(checks.check_latent_rays, rays_with(order="origin"), "origin itself")
    assert rejects(checks.check_latent_rays, rays_with(half=0.0), "half pixel")
    assert rejects(checks.check_latent_rays, rays_with(scaled=False), "grid indices")
    assert rejects(checks.check_latent_rays, rays_with(unit=False), "unit length")
    assert rejects(checks.check_latent_rays, rays_with(world=False), "camera's frame")
    assert rejects(checks.check_latent_rays, rays_with(transpose=True), "transpose")
    assert rejects(checks.check_latent_rays, rays_with(indexing="xy"), "Rows and columns")


# ---------------------------------------------------------------- exercise 3


def test_from_opengl_checker():
    def diagonal(*values):
        return torch.diag(torch.tensor([*values, 1.0]))

    inverse = torch.linalg.inv
    assert accepts(
        checks.check_from_opengl, lambda c2w: cam.invert_rigid(cam.opengl_to_opencv(c2w))
    )
    assert rejects(checks.check_from_opengl, lambda c2w: c2w @ FLIP, "still camera to world")
    assert rejects(checks.check_from_opengl, lambda c2w: inverse(c2w), "did not flip")
    assert rejects(checks.check_from_opengl, lambda c2w: inverse(FLIP @ c2w), "turns the WORLD")
    assert rejects(
        checks.check_from_opengl,
        lambda c2w: inverse(c2w @ diagonal(1.0, -1.0, 1.0)),
        "Only y is flipped",
    )
    assert rejects(
        checks.check_from_opengl,
        lambda c2w: inverse(c2w @ diagonal(1.0, 1.0, -1.0)),
        "Only z is flipped",
    )
    assert rejects(
        checks.check_from_opengl, lambda c2w: inverse(c2w @ diagonal(-1.0, 1.0, -1.0)), "x and z"
    )
    assert rejects(checks.check_from_opengl, lambda c2w: (c2w @ FLIP).mT, "does not invert")
