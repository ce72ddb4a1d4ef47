"""Two answers that need no learning, as yardsticks: the input as a flat card, and the
average training object.
"""

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
    """The input image on a card through the object's centre, facing the camera that
    took it.

    rgb [S, S, 3] in [0, 1], alpha [S, S, 1], camera: one. One disc per pixel that is at
    least half covered.
    """
    origins, directions = ray_grid(camera, *rgb.shape[:2])
    forward = camera.viewmats[0, 2, :3]
    # to the plane through the origin
    distance = camera.positions().norm() / (directions[0] @ forward)
    means = (origins[0] + distance[..., None] * directions[0])[alpha[..., 0] >= 0.5]
    pixel = camera.positions().norm() / camera.Ks[0, 0, 0]
    count = len(means)
    return Gaussians(
        means=means,
        quats=means.new_tensor([1.0, 0, 0, 0]).expand(count, 4),
        scales=torch.full((count, 3), 0.4 * float(pixel)),
        opacities=torch.full((count,), 0.99),
        colors=rgb[alpha[..., 0] >= 0.5],
    )


@dataclass
class AverageObject:
    """The mean over the training objects of each ring view: rgb [16, S, S, 3], alpha
    and depth [16, S, S, 1].
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor

    @classmethod
    def of(cls, views: ViewTensors) -> AverageObject:
        """Means over the objects; depth only over those that cover the pixel."""
        alpha = views.alpha[:, :RING].float() / 255
        hit = (views.depth[:, :RING] > 0).float()
        depth = (views.depth[:, :RING] * hit).sum(0) / hit.sum(0).clamp(min=1)
        return cls((views.rgb[:, :RING].float() / 255).mean(0), alpha.mean(0), depth)

    def nearest_views(self, azimuths: Tensor) -> Tensor:
        """Its picture from the ring view nearest to each absolute azimuth [V] in
        degrees: [V, S, S, 3].
        """
        return self.rgb[(azimuths / (360 / RING)).round().long() % RING]

    @cached_property
    def points(self) -> np.ndarray:
        """Points [4096, 3] on the surface of `mesh`, made once for all comparisons."""
        from .metrics import surface_points

        return surface_points(self.mesh)

    @cached_property
    def mesh(self) -> trimesh.Trimesh:
        """Its surface, where at least half of the training objects are: ring depth maps
        fused, from azimuth 0.
        """
        from ..export.mesh import fuse_depth_maps

        cameras = orbit_cameras(
            torch.arange(RING) * (360 / RING), RING_ELEVATION, self.rgb.shape[1]
        )
        inside = (self.alpha >= 0.5).float()
        return fuse_depth_maps(self.rgb, self.depth * inside, inside, cameras)
