"""Notebook 08: PSNR of the object alone, Chamfer distance as a loss, reading a depth
map, and eight cameras for a surface. Solutions first, then checkers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...cameras import Cameras, orbit_cameras
from ...data.raycast import render_mesh
from ...evaluation.metrics import chamfer_distance, surface_points
from ...export.mesh import NoSurface, fuse_depth_maps
from . import ask, checker, expect, expect_close

VIEWS = 8  # depth maps that the build may take
GOAL = 0.021  # Chamfer distance to reach with them; two samples of the truth lie 0.019 apart


def object_psnr(predicted: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """[V, H, W, 3] twice, mask [V, H, W, 1] -> mean PSNR in dB inside the mask."""
    squared = ((predicted - truth) ** 2 * mask).sum(dim=(1, 2, 3))  # [V]
    return (-10 * (squared / (3 * mask.sum(dim=(1, 2, 3)))).log10()).mean()


def chamfer_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Points [N, 3] and [M, 3] -> Chamfer distance, differentiable in `predicted`."""
    distances = torch.cdist(predicted, truth)  # [N, M]
    return (distances.min(dim=1).values.mean() + distances.min(dim=0).values.mean()) / 2


def depth_seen(points: Tensor, depth: Tensor, camera: Cameras) -> Tensor:
    """World points [P, 3] and one view's z-depth [H, W] -> the depth that the view
    saw in the pixel onto which each point falls [P]; 0 outside the picture.
    """
    local = points @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]
    u, v, z = (local @ camera.Ks[0].T).unbind(-1)
    column, row = (u / z).floor().long(), (v / z).floor().long()
    height, width = depth.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, depth[row.clamp(0, height - 1), column.clamp(0, width - 1)], 0)


def eight_cameras() -> list[tuple[float, float]]:
    """Azimuth and elevation in degrees: every second camera looks from below."""
    return [(45.0 * k, 35.0 if k % 2 else -35.0) for k in range(VIEWS)]


@checker
def check_object_psnr(solution) -> None:
    """(predicted [V, H, W, 3], truth, mask [V, H, W, 1]) -> dB."""
    truth = torch.full((2, 8, 8, 3), 0.5)
    mask = torch.zeros(2, 8, 8, 1)
    mask[:, 2:6, 2:6] = 1
    predicted = truth + 0.1 * mask  # 20 dB on the object, nothing elsewhere
    answer = number(ask(solution, predicted, truth, mask))
    expect(
        math.isfinite(answer),
        "The answer is inf or nan; here the error inside the mask is 0.1 everywhere.",
    )
    hints = {
        -20.0: "The sign is turned: PSNR is minus 10 log10 of the error.",
        20 * math.log(10): "You used the natural logarithm; decibels take log10.",
        40.0: "You took 20 log10 of the squared error: with squares the factor is 10.",
        20 + 10 * math.log10(4): "You divided by all pixels; divide by those inside the mask only.",
        20
        - 10
        * math.log10(
            3
        ): "You forgot the three channels: a mask pixel holds three squared errors to average.",
        10.0: "Square the error: 0.1 everywhere is 20 dB, not 10.",
    }
    for value, hint in hints.items():
        expect(abs(answer - value) > 1e-2, hint)
    expect_close(answer, 20.0, "An error of 0.1 inside the mask, and none outside, is 20 dB.")
    predicted = truth + torch.tensor([0.1, 0.01])[:, None, None, None] * mask  # 20 and 40 dB
    answer = number(ask(solution, predicted, truth, mask))
    pooled = -10 * math.log10((0.1**2 + 0.01**2) / 2)
    expect(
        abs(answer - pooled) > 1e-2,
        "You took the dB of the mean error over all views; take dB per view first, then the mean.",
    )
    expect_close(answer, 30.0, "Two views at 20 and 40 dB have a mean of 30 dB.")
    mask[1, 4:] = 0  # the object covers fewer pixels in the second view
    answer = ask(solution, predicted + 0.3 * (1 - mask), truth, mask)
    expect_close(
        number(answer),
        30.0,
        "Errors outside the mask, and the mask's size in another view, must not matter.",
    )
    generator = torch.Generator().manual_seed(0)
    predicted, truth = (torch.rand(3, 8, 8, 3, generator=generator) for _ in range(2))
    mask = (torch.rand(3, 8, 8, 1, generator=generator) > 0.5).float()
    expect_close(
        number(ask(solution, predicted, truth, mask)),
        object_psnr(predicted, truth, mask).item(),
        "Random images differ.",
    )


@checker
def check_chamfer_loss(solution) -> None:
    """(points [N, 3], points [M, 3]) -> scalar tensor with a gradient."""
    a = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    b = torch.tensor([[0.0, 0.2, 0], [0, 0.5, 0], [0, 0.6, 0]])
    distances = torch.cdist(a, b)
    ways = [distances.min(dim=1).values, distances.min(dim=0).values]
    there, back = (float(way.mean()) for way in ways)
    answer = ask(solution, a, b)
    expect(
        isinstance(answer, Tensor), "Return a tensor: a plain number has no gradient to minimise."
    )
    value = number(answer)
    squared = sum(float(way.square().mean()) for way in ways) / 2
    hints = {
        there: "You only went from the prediction to the truth, or took the larger of both ways; "
        "add the way back.",
        back: "You only went from the truth to the prediction; add the other direction.",
        there / 2: "You halved one direction without adding the other.",
        squared: "These are squared distances: take the root before the mean.",
        2
        * squared: "These are squared distances: take the root before the mean, and halve the sum.",
        there + back: "You added the two directions; equation (8.5) takes half of their sum.",
        there
        + 1.5 * back: "You summed over the points; take the mean over the points of each set.",
        (2 * there + 3 * back) / 5: "You took one mean over both sets; take a mean for each set.",
        float(distances.mean()): "You took the mean of all distances; each point needs its "
        "nearest one only.",
    }
    for wrong, hint in hints.items():
        expect(abs(value - wrong) > 1e-4, hint)
    expect_close(value, (there + back) / 2, "Two points against three give another value.")
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(64, 3, generator=generator).requires_grad_(),
        torch.randn(40, 3, generator=generator),
    )
    answer = ask(solution, a, b)
    expect_close(
        number(answer),
        chamfer_distance(a, b),
        "64 points against 40 differ from metrics.chamfer_distance.",
    )
    expect(
        isinstance(answer, Tensor) and answer.requires_grad,
        "The answer has no gradient: stay in torch, without numpy, detach or item.",
    )
    gradient = torch.autograd.grad(answer, a)[0]
    expect(
        (gradient.norm(dim=1) > 0).all(),
        "Some predicted points receive no gradient: each needs its own nearest truth.",
    )
    met = b.clone().requires_grad_()
    gradient = torch.autograd.grad(ask(solution, met, b), met)[0]
    expect(
        torch.isfinite(gradient).all(),
        "Where a predicted point lies on a true one, the gradient is inf or nan: the root has no "
        "slope at 0. `torch.cdist` knows that; a root of your own needs a tiny number inside.",
    )


@checker
def check_depth_seen(solution) -> None:
    """(points [P, 3], depth [H, W], camera) -> depth [P]."""
    camera = orbit_cameras(torch.tensor([30.0]), 20.0, 16)
    numbers = 1 + torch.arange(256.0).reshape(16, 16)  # every pixel has a depth of its own
    places = torch.tensor([[3.5, 7.5], [3.1, 7.1], [3.9, 7.9], [0.2, 15.8]])  # u, v
    pixels = torch.cat([places, torch.ones(4, 1)], dim=1)
    local = 3.0 * pixels @ torch.linalg.inv(camera.Ks[0]).T
    rotation, shift = camera.viewmats[0, :3, :3], camera.viewmats[0, :3, 3]
    points = (local - shift) @ rotation
    answer = ask(solution, points, numbers, camera)
    expect(isinstance(answer, Tensor) and answer.shape == (4,), "Return one depth a point, [P].")
    truth = torch.tensor([numbers[7, 3], numbers[7, 3], numbers[7, 3], numbers[15, 0]])
    swapped = torch.tensor([numbers[3, 7], numbers[3, 7], numbers[3, 7], numbers[0, 15]])
    expect(not torch.equal(answer, swapped), "Rows and columns are swapped: v counts the rows.")
    expect(
        torch.equal(answer, truth),
        "Points at u = 3.1, 3.5 and 3.9 all lie in column 3, whose centre is at 3.5; "
        "some of yours are read half a pixel further on.",
    )
    beside = points[:1] + 5 * rotation[:1]  # far to the right of the picture
    expect(
        float(ask(solution, beside, numbers, camera)) == 0,
        "A point that falls outside the picture was not seen: its depth is 0.",
    )
    left = points[:1] - 3.0 * 3.9 / camera.Ks[0, 0, 0] * rotation[:1]  # at u = -0.4
    expect(
        float(ask(solution, left, numbers, camera)) == 0,
        "A point at u = -0.4 falls outside the picture, so its depth is 0. `long` alone cuts "
        "towards 0: take the floor first.",
    )


def ring_from(directions: list[tuple[float, float]]) -> float:
    """Chamfer distance of a ring (a torus) fused from true depth maps, seen from these
    directions.
    """
    import trimesh

    ring = trimesh.creation.torus(0.6, 0.25)
    azimuths, elevations = torch.tensor(directions, dtype=torch.float32).T
    cameras = orbit_cameras(azimuths, elevations, 64)
    rgba, depth = render_mesh(ring, cameras, 1)
    white, alpha = torch.ones(*depth.shape, 3), torch.from_numpy(rgba[..., 3:]).float()
    depth = torch.from_numpy(depth)[..., None]
    mesh = fuse_depth_maps(white, depth, alpha, cameras, 48, colors=False)
    return chamfer_distance(surface_points(mesh), surface_points(ring, seed=1))


@checker
def check_eight_cameras(solution) -> None:
    """() -> eight pairs (azimuth, elevation) in degrees."""
    directions = ask(solution)
    pairs = isinstance(directions, list) and all(len(pair) == 2 for pair in directions)
    expect(pairs, "Return a list of pairs (azimuth, elevation).")
    expect(len(directions) == VIEWS, f"Take {VIEWS} cameras; you took {len(directions)}.")
    flat = max(abs(elevation) for _, elevation in directions)
    expect(flat <= 85, "Keep elevations within -85 and 85 degrees.")
    azimuths = [azimuth for azimuth, _ in directions]
    expect(
        not 0 < max(azimuths) - min(azimuths) < 7,
        "All azimuths lie within 7 degrees: they are to be in degrees, not in radians.",
    )
    lowest = min(elevation for _, elevation in directions)
    try:
        distance = ring_from(directions)
    except NoSurface:
        distance = math.inf
    hint = "No camera looks from below." if lowest >= 0 else "Some part is seen by no camera."
    expect(
        distance <= GOAL,
        f"The Chamfer distance is {distance:.4f}, and {GOAL} is to be reached. {hint}",
    )


def number(answer) -> float:
    """A number or a tensor of one number."""
    expect(
        isinstance(answer, int | float | np.floating)
        or (isinstance(answer, Tensor) and answer.numel() == 1),
        "Return a single number (a tensor without dimensions).",
    )
    return float(answer.detach() if isinstance(answer, Tensor) else answer)
