"""Checkers of notebook 04: SV3D's orbit, Plücker rays, and cameras from OpenGL."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...cameras import (
    DISTANCE,
    Cameras,
    intrinsics,
    opencv_to_opengl,
    opengl_to_opencv,
    orbit_cameras,
    pluecker_rays,
    ray_grid,
    sv3d_azimuths,
)
from . import ask, checker, expect_close, expect_not, expect_shape

_expect_not = partial(expect_not, rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------- exercise 1


def orbit_angles(num_frames: int, elevation_deg: float) -> Tensor:
    """Polar and azimuth [N, 2] in degrees, from the library's parts."""
    azimuth = sv3d_azimuths(num_frames)
    return torch.stack([torch.full_like(azimuth, 90.0 - elevation_deg), azimuth], dim=-1)


@checker
def check_orbit(solution) -> None:
    """num_frames, elevation in degrees -> polar and azimuth [N, 2], in SV3D's order."""
    for frames, elevation in ((4, 15.0), (16, 15.0), (21, -5.0)):
        truth = orbit_angles(frames, elevation)
        answer = ask(solution, frames, elevation)
        expect_shape(answer, (frames, 2), "polar and azimuth")
        answer = answer.detach().to(truth)
        mistakes = {
            "The columns are exchanged: polar comes first, azimuth second.": truth.flip(-1),
            "Those are radians; this project passes degrees at every function's "
            "door.": truth.deg2rad(),
        }
        _expect_not(answer, mistakes)
        _expect_polar(answer[:, 0], elevation)
        _expect_azimuths(answer[:, 1], truth[:, 1])


def _expect_polar(polar: Tensor, elevation: float) -> None:
    mistakes = {
        "That is the elevation. SV3D's polar angle is measured from straight above: 90 - "
        "elevation.": elevation,
        "The sign of the elevation is wrong: a camera above the object has a polar angle below "
        "90.": 90 + elevation,
    }
    _expect_not(polar, {hint: torch.full_like(polar, value) for hint, value in mistakes.items()})
    expect_close(
        polar,
        torch.full_like(polar, 90 - elevation),
        "polar should be 90 - elevation in every frame.",
    )


def _expect_azimuths(azimuth: Tensor, truth: Tensor) -> None:
    frames = len(truth)
    unwrapped = torch.linspace(0, 360, frames + 1)[1:]
    both_ends = torch.linspace(0, 360, frames)
    mistakes = {
        "The condition view is first; in SV3D it is the LAST frame: drop the 0 at the start, not "
        "the 360 at the end.": (torch.linspace(0, 360, frames + 1)[:-1]),
        "The last azimuth is 360; the condition view stands at 0. The sinusoids of the two "
        "differ: take it modulo 360.": (unwrapped),
        "N points from 0 to 360 contain one place twice: take N + 1 points and drop the "
        "first.": both_ends,
        "N points from 0 to 360 have one place twice: take N + 1 points and drop the "
        "first.": both_ends % 360,
        "The orbit runs the other way: the azimuth grows from frame to frame, 360 / N, 2 * 360 / "
        "N, ...": -truth % 360,
    }
    _expect_not(azimuth, mistakes)
    expect_close(
        azimuth,
        truth,
        "The azimuths should be 360 k / N for k = 1 ... N, modulo 360.",
        tolerance=1e-3,
    )


# ---------------------------------------------------------------- exercise 2

GRID = 8  # latent pixels per side
SIZE = 64  # image pixels per side


@checker
def check_latent_rays(solution) -> None:
    """K [3, 3], c2w [4, 4], size in pixels, grid -> Plücker [grid, grid, 6]."""
    camera = orbit_cameras([40.0], [25.0], SIZE)
    K, c2w = camera.Ks[0], camera.c2w()[0]
    answer = ask(solution, K.clone(), c2w.clone(), SIZE, GRID)
    expect_shape(answer, (GRID, GRID, 6), "the Plücker coordinates")
    answer, truth = answer.detach().float(), pluecker_rays(camera, GRID, GRID)[0]
    origins, directions = (t[0] for t in ray_grid(camera, GRID, GRID))
    moments = torch.linalg.cross(origins, directions)
    _expect_not(
        answer,
        {
            "You computed d x o; the moment is o x d, and the cross product changes its sign with "
            "the order.": (torch.cat([-moments, directions], -1)),
            "The order is moment first, direction last: cat(o x d, d).": torch.cat(
                [directions, moments], -1
            ),
            "You concatenated the origin itself; the moment o x d is the same for every point of "
            "the ray.": (torch.cat([origins, directions], -1)),
            "Rows and columns are exchanged: row i gives v (down), column j gives u "
            "(right).": truth.transpose(0, 1),
        },
    )
    _expect_grid(answer[..., 3:], camera, directions)
    expect_close(
        answer,
        truth,
        "The directions are right, the moments are not: o x d with the camera's centre as o.",
    )
    back = ask(
        solution,
        K.clone(),
        orbit_cameras([40.0], [25.0], SIZE, distance=2 * DISTANCE).c2w()[0],
        SIZE,
        1,
    )
    expect_shape(back, (1, 1, 6), "the Plücker coordinates of a grid of 1")
    centre = pluecker_rays(camera, 1, 1)[0]
    expect_close(
        back, centre, "The central ray of a camera further back is the same line: same six numbers."
    )


def _expect_grid(answer: Tensor, camera: Cameras, directions: Tensor) -> None:
    """The directions [h, w, 3] go through the cells' centres, with length 1."""
    rotation = camera.c2w()[0, :3, :3]
    local = directions @ rotation  # in the camera's frame
    long = local / local[..., 2:]
    corners = _directions(camera, offset=0.0)
    unscaled = _directions(camera, offset=0.5, step=1.0)
    _expect_not(
        answer,
        {
            "The half pixel is missing: column j of the grid is at u = (j + 0.5) * size / "
            "grid.": corners @ rotation.mT,
            "You used grid indices with the K of the image: a cell is size / grid pixels "
            "wide.": unscaled @ rotation.mT,
            "The directions are in the camera's frame; rotate them into the world with c2w[:3, "
            ":3].": local,
            "The directions are not of unit length: divide by the norm.": long @ rotation.mT,
            "You rotated with the transpose: c2w[:3, :3] takes camera axes to the world.": local
            @ rotation,
        },
    )
    expect_close(
        answer,
        directions,
        "Directions: rays through the cells' centres, in the world, with unit length.",
    )


def _directions(camera: Cameras, offset: float, step: float = SIZE / GRID) -> Tensor:
    """Unit directions [h, w, 3] through ((j + offset) step, (i + offset) step)."""
    at = (torch.arange(GRID) + offset) * step
    v, u = torch.meshgrid(at, at, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1)
    return torch.nn.functional.normalize(
        pixels @ torch.linalg.inv(intrinsics(camera.width)).mT, dim=-1
    )


# ---------------------------------------------------------------- exercise 3


@checker
def check_from_opengl(solution) -> None:
    """OpenGL c2w [V, 4, 4] -> OpenCV viewmats [V, 4, 4], in the same world."""
    cameras = orbit_cameras([0.0, 70.0, 200.0], [10.0, 25.0, -20.0], SIZE)
    opengl = opencv_to_opengl(cameras.c2w())
    answer = ask(solution, opengl.clone())
    expect_shape(answer, (3, 4, 4), "the view matrices")
    answer = answer.detach().float()
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    only_y, only_z = (
        torch.diag(torch.tensor(d)) for d in ([1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0])
    )
    inverse = torch.linalg.inv
    _expect_not(
        answer,
        {
            "That is still camera to world: the axes are right, now invert the "
            "matrix.": opengl_to_opencv(opengl),
            "You inverted but did not flip: y still points up and z backward.": inverse(opengl),
            "You flipped rows of c2w, which turns the WORLD; the camera's axes are the columns: "
            "c2w @ flip.": (inverse(flip @ opengl)),
            "Only y is flipped: that is a mirror, not a rotation (its determinant is -1). z "
            "changes too.": (inverse(opengl @ only_y)),
            "Only z is flipped: that is a mirror, not a rotation (its determinant is -1). y "
            "changes too.": (inverse(opengl @ only_z)),
            "You flipped x and z: x points right in both conventions; y and z change.": (
                inverse(opengl @ torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])))
            ),
            "Transposing the 4 x 4 matrix does not invert it: the rotation is R^T, the "
            "translation -R^T t.": ((opengl @ flip).mT),
        },
    )
    expect_close(
        torch.linalg.det(answer[:, :3, :3]),
        torch.ones(3),
        "The upper 3 x 3 is not a rotation (det should be 1).",
    )
    expect_close(
        answer, cameras.viewmats, "x_cam = viewmat @ x_world should have y down and z forward."
    )
