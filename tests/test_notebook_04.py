"""Notebook 04: what its cells define equals the library, and its checkers know right
from wrong.
"""

import pytest
import torch
from notebook_world import accepts, definitions, rejects

from gsv3d_lib import cameras as cam
from gsv3d_lib import unet
from gsv3d_lib.config import preset
from gsv3d_lib.course.exercises import multiview as checks
from gsv3d_lib.pretraining import rolled

SIZE = 32


@pytest.fixture(scope="module")
def cells():
    return definitions("04")


@pytest.fixture
def cameras():
    return cam.orbit_cameras([0.0, 33.0, 170.0, 291.0], [0.0, 20.0, -35.0, 70.0], SIZE)


# ------------------------------------------------------------- the notebook's functions


def test_points_and_pixels_are_inverse(cells, cameras):
    for v in range(4):
        depth = 3 + 0.3 * torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(v))
        points = cells["points_of"](depth, cameras[v])
        pixels, z = cells["pixels_of"](points, cameras[v])
        rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        centres = torch.stack([columns, rows], -1).reshape(-1, 2) + 0.5
        assert torch.allclose(pixels, centres, atol=1e-3)
        assert torch.allclose(z, depth.flatten(), atol=1e-5)


def test_sinusoids_are_the_library_s(cells):
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

    stage = cells["OneOrbit"](None, None, Rings(), preset("tiny"))
    seen = set()
    for k in range(4):
        generator = torch.Generator().manual_seed(k)
        example = stage.example(generator, generator, 0)
        assert torch.equal(example["latents"][:, 0, 0, 0], example["azimuth"])
        assert torch.equal(example["azimuth"].sort().values, cam.sv3d_azimuths(16).sort().values)
        seen.add(tuple(example["azimuth"].tolist()))
    assert len(seen) == 4


# ---------------------------------------------------------------- checkers


@pytest.mark.parametrize(
    ("checker", "stub"),
    [
        (checks.check_orbit, "sv3d_orbit"),
        (checks.check_roll, "roll_orbit"),
        (checks.check_strangers, "strangers"),
    ],
)
def test_stubs_are_not_written_yet(cells, checker, stub, capsys):
    assert not checker(cells[stub])
    assert "not written yet" in capsys.readouterr().out


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


def test_roll_checker():
    check = checks.check_roll
    assert accepts(check, rolled)

    def only(*names, step=1):
        return lambda orbit, k: orbit | {n: orbit[n].roll(step * k, 0) for n in names}

    every = ("latents", "azimuth", "elevation")
    assert rejects(check, lambda orbit, k: orbit, "do not move")
    assert rejects(check, only("latents", "elevation"), "takes its own along")
    assert rejects(check, only(*every, step=-1), "other way")
    assert rejects(check, only("latents", "azimuth"), "elevation")
    flat = lambda orbit, k: orbit | {n: orbit[n].roll(k) for n in every}  # noqa: E731
    assert rejects(check, flat, "roll along dimension 0")
    assert rejects(check, only(*every, "image"), "condition view and stays")

    def anew(orbit, k):
        orbit = rolled(orbit, k)
        return orbit | {"azimuth": (orbit["azimuth"] - orbit["azimuth"][-1]) % 360}

    assert rejects(check, anew, "counted anew")


def test_input_checker(cells):
    check = checks.check_input

    def right(noisy, image, sigma):
        return torch.cat([noisy / (sigma**2 + 1) ** 0.5, image.expand_as(noisy)], 1)

    assert accepts(check, right)
    assert rejects(check, cells["unet_input"], "0.12 times its strength")
    assert rejects(check, lambda n, i, s: right(n, 0.18215 * i, s), "0.18215 is not applied again")
    assert rejects(check, lambda n, i, s: right(n * 2, i, s), "multiplied by c_in")
    assert rejects(check, lambda n, i, s: right(n, i, s).roll(4, 1), "image comes last")


def test_strangers_checker(cells):
    check = checks.check_strangers

    def error(rgb, depth, cameras, k, to):
        painted, seen = cells["carry"](rgb, depth, cameras, k, to)
        return ((painted - rgb[k]).abs().mean(-1) * seen).sum() / seen.sum()

    def errors(rgb, depth, cameras):
        return torch.stack([error(rgb, depth, cameras, k, (k + 1) % 16) for k in range(16)])

    def right(rgb, depth, cameras):
        to_next = errors(rgb, depth, cameras)
        return torch.minimum(to_next, to_next.roll(1)).topk(2).indices.tolist()

    assert accepts(check, right)
    assert rejects(check, lambda *ring: errors(*ring).topk(2).indices.tolist(), "36 are wanted")
    assert rejects(check, lambda *ring: [0, 8], "36 are wanted")

    def without_depth(rgb, depth, cameras):
        to_next = (rgb - rgb.roll(-1, 0)).pow(2).mean((1, 2, 3))
        return torch.minimum(to_next, to_next.roll(1)).topk(2).indices.tolist()

    assert rejects(check, without_depth, "36 are wanted")
    assert rejects(check, lambda *ring: [3, 3], "two different views")
    assert rejects(check, lambda *ring: [3, 16], "0 to 15")
