"""Two yardsticks without learning: a flat card, and the average training object."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..cameras import Cameras, orbit_cameras, ray_grid
from ..data.dataset import RING, RING_ELEVATION, ViewTensors
from ..gaussians import Gaussians

if TYPE_CHECKING:
    import trimesh


def flat_card(rgb: Tensor, alpha: Tensor, camera: Cameras) -> Gaussians:
    """The input on a card through the object's centre, facing its camera.

    One disc per pixel that is at least half covered.
    rgb [S, S, 3] in [0, 1], alpha [S, S, 1], camera: one.
    """
    origins, directions = ray_grid(camera, *rgb.shape[:2])
    forward = camera.viewmats[0, 2, :3]
    # to the plane through the origin
    distance = camera.positions().norm() / (directions[0] @ forward)
    covered = alpha[..., 0] >= 0.5
    means = (origins[0] + distance[..., None] * directions[0])[covered]
    pixel = camera.positions().norm() / camera.Ks[0, 0, 0]
    count = len(means)
    return Gaussians(
        means=means,
        quats=means.new_tensor([1.0, 0, 0, 0]).expand(count, 4),
        scales=torch.full((count, 3), 0.4 * float(pixel)),
        opacities=torch.full((count,), 0.99),
        colors=rgb[covered],
    )


@dataclass
class AverageObject:
    """The mean over the training objects of each ring view."""

    rgb: Tensor  # [16, S, S, 3]
    alpha: Tensor  # [16, S, S, 1]
    depth: Tensor  # [16, S, S, 1]

    @classmethod
    def of(cls, views: ViewTensors) -> AverageObject:
        """Means over the objects; depth only over those that cover the pixel."""
        alpha = views.alpha[:, :RING].float() / 255
        hit = (views.depth[:, :RING] > 0).float()
        depth = (views.depth[:, :RING] * hit).sum(0) / hit.sum(0).clamp(min=1)
        return cls((views.rgb[:, :RING].float() / 255).mean(0), alpha.mean(0), depth)

    def nearest_views(self, azimuths: Tensor) -> Tensor:
        """The ring view nearest to each azimuth [V] in degrees: [V, S, S, 3]."""
        return self.rgb[(azimuths / (360 / RING)).round().long() % RING]

    @cached_property
    def points(self) -> np.ndarray:
        """Points [4096, 3] on the surface of `mesh`, made once for all comparisons."""
        from .metrics import surface_points

        return surface_points(self.mesh)

    @cached_property
    def mesh(self) -> trimesh.Trimesh:
        """Where at least half of the training objects are: ring depth maps, fused."""
        from ..export.mesh import fuse_depth_maps

        azimuths = torch.arange(RING) * (360 / RING)
        cameras = orbit_cameras(azimuths, RING_ELEVATION, self.rgb.shape[1])
        inside = (self.alpha >= 0.5).float()
        return fuse_depth_maps(self.rgb, self.depth * inside, inside, cameras)
