"""Checkers of notebook 02: cameras from OpenGL, Plücker rays of a latent grid, the
camera of a crop, points drawn into a picture, and an object carved out of silhouettes.
"""

from __future__ import annotations

from functools import cache, partial

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
    read_at,
)
from . import ask, checker, expect, expect_close, expect_not, expect_shape

_expect_not = partial(expect_not, rtol=1e-5, atol=1e-3)

GRID = 8  # latent pixels per side
SIZE = 64  # image pixels per side


# ------------------------------ exercise 1: cameras from OpenGL


@checker
def check_from_opengl(solution) -> None:
    """OpenGL c2w [V, 4, 4] -> OpenCV world-to-camera viewmats [V, 4, 4], in the same
    world.
    """
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
            (
                "That is still camera to world: the axes are right, now invert the matrix."
            ): opengl_to_opencv(opengl),
            "You inverted but did not flip: y still points up and z backward.": inverse(opengl),
            (
                "You flipped rows of c2w, which turns the WORLD; the camera's "
                "axes are the columns: c2w @ flip."
            ): (inverse(flip @ opengl)),
            (
                "Only y is flipped: that is a mirror, not a rotation (its "
                "determinant is -1). z changes too."
            ): (inverse(opengl @ only_y)),
            (
                "Only z is flipped: that is a mirror, not a rotation (its "
                "determinant is -1). y changes too."
            ): (inverse(opengl @ only_z)),
            "You flipped x and z: x points right in both conventions; y and z change.": (
                inverse(opengl @ torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])))
            ),
            (
                "Transposing the 4 x 4 matrix does not invert it: the "
                "rotation is R^T, the translation -R^T t."
            ): ((opengl @ flip).mT),
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


# ------------------------------ exercise 2: Plücker rays of a latent grid


@checker
def check_latent_rays(solution) -> None:
    """K [3, 3] in image pixels, c2w [4, 4], size (pixels), grid -> Plücker coordinates
    [grid, grid, 6].
    """
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
            (
                "You computed d x o; the moment is o x d, and the cross "
                "product changes its sign with the order."
            ): (torch.cat([-moments, directions], -1)),
            "The order is moment first, direction last: cat(o x d, d).": torch.cat(
                [directions, moments], -1
            ),
            (
                "You concatenated the origin itself; the moment o x d is the "
                "same for every point of the ray."
            ): (torch.cat([origins, directions], -1)),
            (
                "Rows and columns are exchanged: row i gives v (down), column j gives u (right)."
            ): truth.transpose(0, 1),
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
    """The directions [h, w, 3] go through the centres of the grid's cells, in the
    world, with length 1.
    """
    rotation = camera.c2w()[0, :3, :3]
    local = directions @ rotation  # in the camera's frame
    long = local / local[..., 2:]
    corners = _directions(camera, offset=0.0)
    unscaled = _directions(camera, offset=0.5, step=1.0)
    early = _directions(camera, offset=0.5 * GRID / SIZE)
    _expect_not(
        answer,
        {
            (
                "The half pixel is missing: column j of the grid is at u = (j + 0.5) * size / grid."
            ): corners @ rotation.mT,
            (
                "You used grid indices with the K of the image: a cell is size / grid pixels wide."
            ): unscaled @ rotation.mT,
            (
                "You added half a pixel of the IMAGE: add half a cell, (j + 0.5) * size / grid."
            ): early @ rotation.mT,
            (
                "The directions are in the camera's frame; rotate them into "
                "the world with c2w[:3, :3]."
            ): local,
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
    """Unit directions [h, w, 3] in the camera's frame through ((j + offset) step, (i +
    offset) step).
    """
    at = (torch.arange(GRID) + offset) * step
    v, u = torch.meshgrid(at, at, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1)
    return torch.nn.functional.normalize(
        pixels @ torch.linalg.inv(intrinsics(camera.width)).mT, dim=-1
    )


# ------------------------------ exercise 3: the camera of a crop


def cropped(K: Tensor, left: float, top: float, scale: float) -> Tensor:
    """K after `left` columns and `top` rows were cut off and the rest resized."""
    shifted = K.clone()
    shifted[:2, 2] -= K.new_tensor([left, top])
    return shifted * K.new_tensor([scale, scale, 1.0])[:, None]


@checker
def check_crop(solution) -> None:
    """K [3, 3], left, top, scale -> K of the cropped and resized picture [3, 3]."""
    K = torch.tensor([[105.0, 0.0, 64.0], [0.0, 90.0, 60.0], [0.0, 0.0, 1.0]])
    left, top, scale = 16.0, 24.0, 2.0
    given = K.clone()
    answer = ask(solution, given, left, top, scale)
    expect_shape(answer, (3, 3), "K")
    expect(torch.equal(given, K), "Your function changed the K that it was given; copy it first.")
    truth = cropped(K, left, top, scale)
    late = cropped(cropped(K, 0, 0, scale), left, top, 1.0)
    focal = truth.clone()
    focal[:2, :2] = K[:2, :2]
    whole = K * scale
    whole[:2, 2] = truth[:2, 2]
    square, unmoved = truth.clone(), truth.clone()
    square[1, 1] = truth[0, 0]
    unmoved[:2, 2] = truth[:2, 2] / scale
    mistakes = {
        "That is K as it was.": K,
        "The crop is missing: cutting columns off moves the principal point.": cropped(
            K, 0, 0, scale
        ),
        "The resize is missing: K is in pixels, and there are more of them now.": cropped(
            K, left, top, 1.0
        ),
        "The crop comes first, in pixels of the old picture; you took it off after resizing.": late,
        "left belongs to u and top to v; you exchanged them.": cropped(K, top, left, scale),
        "The sign of the crop is wrong: what was at u = left is now at u = 0.": cropped(
            K, -left, -top, scale
        ),
        "f is in pixels too: a picture of twice as many pixels has twice the focal length.": focal,
        "The last row of K is 0, 0, 1 and stays so.": whole,
        "The two focal lengths differ here: K[0, 0] belongs to u, K[1, 1] to v.": square,
        "The principal point is in pixels too: after the crop, resize it like f.": unmoved,
    }
    _expect_not(answer, mistakes)
    half = truth.clone()
    half[:2, 2] += 0.5 * (scale - 1)
    hint = "No half pixel is needed: with centres at +0.5 the picture's edge is at 0 at every size."
    _expect_not(answer, {hint: half, f"{hint} ": 2 * truth - half})
    expect_close(answer, truth, "A point's new pixel should be scale * (u - left, v - top).")


# ------------------------------ the bug: points drawn half a pixel off


@checker
def check_draw_points(solution) -> None:
    """points [P, 3], viewmat [4, 4], K [3, 3], size -> [size, size] bool, True where a
    point falls in the pixel.
    """
    camera = orbit_cameras([40.0], [25.0], SIZE)
    at = torch.tensor([[20.7, 40.2], [50.3, 10.9], [-3.0, 30.0]])  # u, v; the last is outside
    points = _points_at(camera, at)
    for u, v in at[:2].tolist():
        place = points[(at[:, 0] == u)]
        answer = ask(solution, place, camera.viewmats[0], camera.Ks[0], SIZE)
        expect_shape(answer, (SIZE, SIZE), "the mask")
        found = answer.nonzero().tolist()
        expect(
            found == [[int(v), int(u)]],
            f"A point at (u, v) = ({u:.1f}, {v:.1f}) lies in row {int(v)}, column {int(u)}; "
            f"yours is drawn at {found} [row, column].",
        )
    answer = ask(solution, points, camera.viewmats[0], camera.Ks[0], SIZE)
    expect(answer.sum() == 2, "A point outside of the picture should not be drawn.")
    beside = _points_at(camera, torch.tensor([[-0.4, 30.0]]))
    answer = ask(solution, beside, camera.viewmats[0], camera.Ks[0], SIZE)
    expect(
        answer.sum() == 0,
        "A point at u = -0.4 is outside of the picture; yours is drawn in column 0. "
        "`long` cuts towards 0; `floor` goes down.",
    )
    one = camera.c2w()[0]
    behind = one[:3, 3] + one[:3, 2] @ torch.diag(-torch.ones(3))
    answer = ask(solution, behind[None], camera.viewmats[0], camera.Ks[0], SIZE)
    expect(answer.sum() == 0, "A point behind the camera should not be drawn.")


def _points_at(camera: Cameras, at: Tensor) -> Tensor:
    """World points [P, 3] that fall on pixels at [P, 2], (u, v), at z-depth 3."""
    local = torch.cat([at, torch.ones(len(at), 1)], -1) @ torch.linalg.inv(camera.Ks[0]).mT
    return 3.0 * local @ camera.c2w()[0, :3, :3].mT + camera.c2w()[0, :3, 3]


# ------------------------------ build: an object carved out of silhouettes

GOAL = 0.9  # intersection over union
CELLS = 32  # of the grid of points, per side
BALL, RADIUS = (0.1, 0.0, 0.1), 0.5
SLAB, HALF_EDGES = (0.0, -0.1, -0.3), (0.75, 0.3, 0.3)


def inside_solid(points: Tensor) -> Tensor:
    """The truth to be carved, a ball on a slab: [P, 3] -> [P]."""
    ball = (points - points.new_tensor(BALL)).norm(dim=-1) < RADIUS
    slab = (points - points.new_tensor(SLAB)).abs() < points.new_tensor(HALF_EDGES)
    return ball | slab.all(-1)


def hits_solid(origins: Tensor, directions: Tensor) -> Tensor:
    """Whether rays meet it: [..., 3] each -> [...]."""
    to_ball = origins - origins.new_tensor(BALL)
    nearest = torch.linalg.cross(to_ball, directions).norm(dim=-1)
    centre, half = origins.new_tensor(SLAB), origins.new_tensor(HALF_EDGES)
    sides = torch.stack([centre - half - origins, centre + half - origins]) / directions
    return (nearest < RADIUS) | (sides.amin(0).amax(-1) < sides.amax(0).amin(-1))


@cache
def carving_task() -> tuple[Tensor, Cameras, Tensor, Tensor]:
    """Silhouettes [V, H, W], their cameras, a grid of points [P, 3], and which of them
    are inside.
    """
    azimuths = torch.arange(36) * 30.0
    elevations = torch.tensor([-40.0, 0.0, 40.0]).repeat_interleave(12)
    cameras = orbit_cameras(azimuths, elevations, SIZE)
    axis = (torch.arange(CELLS) + 0.5) / CELLS * 2 - 1
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    return hits_solid(*ray_grid(cameras, SIZE, SIZE)), cameras, points, inside_solid(points)


def visible_in(masks: Tensor, cameras: Cameras, points: Tensor) -> Tensor:
    """Whether each point [P] falls inside each silhouette [V]."""
    pictures = masks.float()[..., None]
    seen = [read_at(points, pictures[v], cameras[v])[1] for v in range(len(masks))]
    return torch.stack(seen) > 0


def overlap(answer: Tensor, truth: Tensor) -> float:
    """Intersection over union of two sets."""
    return ((answer & truth).sum() / (answer | truth).sum().clamp(min=1)).item()


@checker
def check_carve(solution) -> None:
    """masks [V, H, W], viewmats [V, 4, 4], Ks [V, 3, 3], points [P, 3] -> [P] bool."""
    masks, cameras, points, truth = carving_task()
    answer = ask(solution, masks, cameras.viewmats, cameras.Ks, points)
    expect_shape(answer, truth.shape, "what is left of the points")
    expect(answer.dtype == torch.bool, "Return True and False, one per point.")
    reached = overlap(answer, truth)
    inside = visible_in(masks, cameras, points)
    across = visible_in(masks.mT, cameras, points)
    count = inside.float().mean(0)
    mistakes = {
        "A point inside ONE silhouette stays in yours; it has to be inside all of them.": count > 0,
        "Rows and columns are exchanged: v picks the row, u the column.": across.all(0),
        "You let the views vote; a single view that sees past a point is proof enough.": count
        > 0.5,
    }
    close = max(mistakes, key=lambda hint: overlap(answer, mistakes[hint]))
    told = close if overlap(answer, mistakes[close]) > 0.97 else ""
    if not answer.any():
        told = "Nothing is left. The matrices go from world to camera: do not invert them."
    expect(reached >= GOAL, f"IoU {reached:.2f}; reach {GOAL}. {told}".strip())
    _expect_pixels(solution)
    print(f"IoU with the true object: {reached:.3f}; the goal was {GOAL}.")


def _expect_pixels(solution) -> None:
    """One view decides: of one pixel, then of the whole picture."""
    camera = orbit_cameras([40.0], [25.0], SIZE)
    view = camera.viewmats, camera.Ks
    one = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    one[0, 40, 20] = True
    kept = ask(solution, one, *view, _points_at(camera, torch.tensor([[20.7, 40.2]])))
    expect(
        kept.all(), "A point at (u, v) = (20.7, 40.2) lies in row 40, column 20: take the floor."
    )
    outside = torch.tensor([[-3.0, 30.0], [30.0, SIZE + 3.0]])
    kept = ask(solution, one | True, *view, _points_at(camera, outside))
    expect(
        not kept.any(),
        "A point outside of a picture is in no silhouette; yours is moved to the edge and kept.",
    )
