"""The protocol: what is measured, on which views, against which truth.

Input: view 12, the front. Targets: all other views, at the preset's resolution, on
white, without alignment. The decoder alone gets the 16 true ring views, encoded by the
VAE, and is scored on the 8 free views that it never saw. docs/protocol.md is its card.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import FRONT, RING, Scene
from ..data.examples import relative_cameras, ring_frames
from ..export.mesh import NoSurface, fuse_mesh
from ..gaussians import Gaussians
from ..pipeline import Generation, GSV3DPipeline
from ..rendering import Rendering, render
from ..system.errors import UserError
from ..system.files import Field, Table, explained, read_npz
from ..vae import encode_scaled
from .baselines import AverageObject, flat_card
from .consistency import detail, ghosting, reprojection_error, split_agreement, view_depths
from .lpips import LPIPS
from .metrics import (
    GRID_RESOLUTION,
    NUM_POINTS,
    chamfer_distance,
    depth_l1,
    f_score,
    occupancy_grid,
    psnr,
    ssim,
    surface_points,
    volume_iou,
)

if TYPE_CHECKING:
    import trimesh


def other_views(scene: Scene) -> Tensor:
    """Indices of all views but the input."""
    return torch.tensor([k for k in range(len(scene.rgb)) if k != FRONT])


def free_views(scene: Scene) -> Tensor:
    """Indices of the views that are not on the ring."""
    return torch.arange(RING, len(scene.rgb))


# What <id>.geometry.npz must hold; float16 rounds a little beyond the unit ball.
GEOMETRY: Table = {
    "points": Field(("P", 3), "f", -1.01, 1.01),
    "occupancy": Field((GRID_RESOLUTION**3 // 8,), "u1", needed=False),
    "occupancy_resolution": Field((), "i u", GRID_RESOLUTION, GRID_RESOLUTION, needed=False),
}


@dataclass(frozen=True)
class Truth:
    """The true shape of an object, in the world of the dataset."""

    points: np.ndarray  # [4096, 3]
    occupancy: np.ndarray | None  # bool [64, 64, 64]


def load_truth(folder: Path, id: str) -> Truth | None:
    """`<id>.geometry.npz` of a dataset folder; None where there is none.

    Raises UserError where it is damaged, or holds points that are not finite or not in
    the unit ball, too few of them, or another grid.
    """
    path = Path(folder) / f"{id}.geometry.npz"
    if not os.path.lexists(path):
        return None
    advice = "without the file its object gets no mesh scores"
    with explained(f"{path} cannot be read", advice, path):
        arrays = read_npz(path, GEOMETRY)
        points = arrays["points"].astype("f4")
        if len(points) < NUM_POINTS:
            raise UserError(f"it holds {len(points)} points, fewer than {NUM_POINTS}")
    chosen = np.random.default_rng(0).choice(len(points), NUM_POINTS, replace=False)
    grid = None
    if "occupancy" in arrays:
        bits = np.unpackbits(arrays["occupancy"])
        grid = bits.reshape((GRID_RESOLUTION,) * 3).astype(bool)
    return Truth(points[chosen], grid)


def mesh_scores(
    gaussians: Gaussians, truth: Truth | None, azimuth: float = 0.0
) -> dict[str, float]:
    """Chamfer distance, F-score and volume IoU of the fused mesh.

    NaN, 0 and 0 where the Gaussians have no surface.
    azimuth: of the input view, by whose degrees the result is turned to stand in the
        world of the truth.
    """
    if truth is None:
        return {}
    try:
        mesh = fuse_mesh(gaussians, resolution=64, num_views=24, size=64, colors=False)
    except NoSurface:
        worst = {"chamfer": float("nan"), "f_score": 0.0}
        return worst if truth.occupancy is None else worst | {"iou": 0.0}
    mesh.vertices = mesh.vertices @ turn_about_z(azimuth).T
    return shape_scores(surface_points(mesh), mesh, truth)


def shape_scores(
    points: np.ndarray, mesh: trimesh.Trimesh | None, truth: Truth
) -> dict[str, float]:
    """Points [N, 3], and the closed mesh they lie on if any, against the truth.

    All stand in the world of the truth.
    """
    scores = {"chamfer": chamfer_distance(points, truth.points)}
    scores["f_score"] = f_score(points, truth.points)
    if mesh is not None and truth.occupancy is not None:
        scores["iou"] = volume_iou(occupancy_grid(mesh), truth.occupancy)
    return scores


@torch.no_grad()
def evaluate_vae(pipe: GSV3DPipeline, scene: Scene) -> dict[str, float]:
    """The VAE that everything is seen through, on the true ring views."""
    ring = scene.rgb[ring_frames(FRONT, RING)]
    return {"vae_psnr": psnr(pipe.views_from(encode_scaled(pipe.vae, ring)).cpu(), ring)}


def generate(pipe: GSV3DPipeline, scene: Scene, seed: int, **options) -> Generation:
    """The front view -> 3D, its elevation and mask given; on the CPU for measuring."""
    given = {"elevation": float(scene.elevations[FRONT]), "mask": scene.alpha[FRONT]}
    made = pipe.generate(scene.rgb[FRONT], seed=seed, progress=False, **given, **options)
    return replace(made, gaussians=made.gaussians.to("cpu"))


def view_scores(pipe: GSV3DPipeline, made: Generation) -> dict[str, float]:
    """What needs no truth: reprojection error, and odd against even views."""

    def decode(latents, cameras):
        return pipe.gaussians_from(latents, cameras, made.image).to("cpu")

    own = made.gaussians.select(slice(made.decoded))
    depth, alpha = view_depths(own, made.cameras)
    scores = {"reprojection": reprojection_error(depth, alpha, made.cameras)}
    return scores | split_agreement(decode, made.latents, made.cameras)


def failure_scores(gaussians: Gaussians, seen: Rendering, scene: Scene) -> dict[str, float]:
    """Ghosting and lost texture, on the free views, which `seen` shows."""
    free = free_views(scene)
    return {
        "ghosting": ghosting(gaussians, relative_cameras(scene, FRONT, free), scene.alpha[free]),
        "detail": detail(seen.rgb.clamp(0, 1), scene.rgb[free], scene.alpha[free]),
    }


def turn_about_z(degrees: float) -> np.ndarray:
    """Rotation about z [3, 3]."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], "f4")


@torch.no_grad()
def recognised(made: Tensor, true: Tensor, net: LPIPS) -> list[float]:
    """How often a made side looks most like its own true one, among those of all.

    Per object the share of its two sides to which, by the net, its own truth is
    nearest; 1 / O by chance.
    made, true: [O, 2, S, S, 3], the sides of the results and of the truth.
    """
    hits = []
    for side in range(made.shape[1]):
        distances = torch.cdist(net.embed(made[:, side]), net.embed(true[:, side]))
        hits.append(distances.argmin(dim=1) == torch.arange(len(made)))
    return torch.stack(hits).float().mean(0).tolist()


def some_views(seen: Rendering, views: Tensor) -> Rendering:
    """A rendering of some of its views."""
    return Rendering(*(image[views] for image in seen))


@dataclass(frozen=True)
class Judge:
    """Scores pictures and objects; what it measures with is said once, here."""

    # nets by the name of their score, {"lpips": alex, "lpips_vgg": vgg}; one that a
    # model was trained with proves little about it
    lpips: dict[str, LPIPS] = field(default_factory=dict)
    average: AverageObject | None = None  # a baseline

    def colors(self, pictures: Tensor, truth: Tensor) -> dict[str, float]:
        """PSNR, SSIM and every LPIPS, means over the views [V, S, S, 3]."""
        scores = {"psnr": psnr(pictures, truth), "ssim": ssim(pictures, truth)}
        for name, net in self.lpips.items():
            scores[name] = float(net(pictures, truth).mean())
        return scores

    def pictures(self, seen: Rendering, scene: Scene, chosen: Tensor) -> dict[str, float]:
        """`colors` and depth L1 of rendered views against the true views `chosen`."""
        rgb, depth, alpha = seen
        depth = torch.where(alpha > 0.5, depth, 0)
        truth = scene.depth[chosen]
        return self.colors(rgb, scene.rgb[chosen]) | {"depth_l1": depth_l1(depth, truth)}

    @torch.no_grad()
    def images(
        self, gaussians: Gaussians, scene: Scene, start: int, chosen: Tensor
    ) -> dict[str, float]:
        """`pictures` of Gaussians, in whose world view `start` stands at azimuth 0."""
        seen = render(gaussians, relative_cameras(scene, start, chosen))
        return self.pictures(seen, scene, chosen)

    @torch.no_grad()
    def decoder(
        self, pipe: GSV3DPipeline, scene: Scene, num_frames: int = RING
    ) -> dict[str, float]:
        """The decoder on N true views, scored on the views that are not on the ring."""
        frames = ring_frames(FRONT, num_frames)
        free = free_views(scene)
        latents = encode_scaled(pipe.vae, scene.rgb[frames])
        cameras = relative_cameras(scene, FRONT, frames)
        gaussians = pipe.gaussians_from(latents, cameras, scene.rgb[FRONT]).to("cpu")
        seen = render(gaussians, relative_cameras(scene, FRONT, free))
        return self.pictures(seen, scene, free) | failure_scores(gaussians, seen, scene)

    @torch.no_grad()
    def generation(
        self, pipe: GSV3DPipeline, scene: Scene, truth: Truth | None, made: Generation
    ) -> dict[str, float]:
        """A generated object on all other views, by its mesh, and its own views."""
        every = torch.arange(len(scene.rgb))
        others = other_views(scene)
        seen = render(made.gaussians, relative_cameras(scene, FRONT, every))
        scores = self.pictures(some_views(seen, others), scene, others)
        scores |= mesh_scores(made.gaussians, truth, float(scene.azimuths[FRONT]))
        scores |= view_scores(pipe, made)
        scores |= failure_scores(made.gaussians, some_views(seen, free_views(scene)), scene)
        return scores | {"front_psnr": psnr(seen.rgb[FRONT], scene.rgb[FRONT])}

    def baselines(self, scene: Scene, truth: Truth | None) -> dict[str, dict[str, float]]:
        """The flat card and the average object, on the views of `generation`."""
        others = other_views(scene)
        azimuth = float(scene.azimuths[FRONT])
        front = relative_cameras(scene, FRONT, torch.tensor([FRONT]))
        card = flat_card(scene.rgb[FRONT], scene.alpha[FRONT], front)
        results = {"card": self.images(card, scene, FRONT, others)}
        if truth is not None:  # a card has no volume, so it has no IoU
            step = math.ceil(len(card) / NUM_POINTS) or 1
            points = card.means.numpy()[::step] @ turn_about_z(azimuth).T
            results["card"] |= shape_scores(points, None, truth)
        if self.average is not None:
            pictures = self.average.nearest_views(scene.azimuths[others])
            results["average"] = self.colors(pictures, scene.rgb[others])
            if truth is not None:
                results["average"] |= shape_scores(self.average.points, self.average.mesh, truth)
        return results


def image_scores(
    gaussians: Gaussians, scene: Scene, start: int, chosen: Tensor
) -> dict[str, float]:
    """PSNR, SSIM and depth L1 of Gaussians against the true views `chosen`."""
    return Judge().images(gaussians, scene, start, chosen)
