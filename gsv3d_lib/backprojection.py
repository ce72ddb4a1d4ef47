"""Back-projection: the Gaussians that the input shows take the input's own colours. Ours, not in the paper.

The U-Net hands the input's texture on to the other views as well as it can, and the decoder fuses views that do not quite
agree, so even the front of the object is blurred. But the front is known. A rendered picture is linear in the colours,

    C(p) = sum_g w_g(p) c_g + background,

so one backward pass of sum_p C(p) X(p) to the colours gives, for every Gaussian at once, sum_p w_g(p) X(p): any picture X
summed over its footprint, with occlusion. With X = input and X = 1 that is the mean of the input where the Gaussian shows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .cameras import Cameras
from .consistency import depth_behind
from .gaussians import Gaussians
from .rendering import render

SHOWS = 0.01  # a Gaussian is seen where its weights sum to this many pixels or more
BEHIND = 0.05  # and it is no further than this behind the surface, in world units; chosen on unseen procedural objects


def back_project(gaussians: Gaussians, camera: Cameras, image: Tensor, behind: float = BEHIND) -> Gaussians:
    """The same Gaussians, with colours from `image` where `camera` sees them.

    camera: one, of the size of `image` [H, W, 3] in [0, 1] on white.
    behind: what lies further behind the rendered depth shines through the surface by accident, and keeps its colour.
    Raises ValueError for more cameras than one and for an image of another size.
    """
    if len(camera) != 1 or image.shape != (camera.height, camera.width, 3):
        raise ValueError(
            f"Back-projection takes one camera and its image [{camera.height}, {camera.width}, 3]; got {len(camera)} "
            f"cameras and {list(image.shape)}."
        )
    camera = camera.to(gaussians.means)
    with torch.enable_grad():
        colors = gaussians.colors.detach().requires_grad_()
        rgb, depth, alpha = render(replace(gaussians, colors=colors), camera)

    def footprint_sums(picture: Tensor) -> Tensor:  # [H, W, 3] -> [G, 3]
        return torch.autograd.grad(rgb, colors, picture[None], retain_graph=True)[0]

    light, weight = footprint_sums(image.to(rgb)), footprint_sums(torch.ones_like(rgb[0]))
    z, surface = depth_behind(gaussians.means, depth[0], alpha[0], camera)
    seen = (z <= surface + behind)[:, None] & (weight >= SHOWS)
    painted = (light / weight.clamp(min=SHOWS)).clamp(0, 1)
    return replace(gaussians, colors=torch.where(seen, painted, gaussians.colors))
