"""Back-projection: what the input shows need not be invented. Ours, not in the paper.

The U-Net hands the input's texture on to the other views as well as it can, and the
decoder fuses views that do not quite agree, so even the front of the object is blurred.
But the front is known: no Gaussian stands where the input shows background (`carve`),
and those that it shows take its colours (`paint`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Cameras, read_at
from .gaussians import Gaussians
from .images import VISIBLE_ALPHA
from .rendering import SURFACE_ALPHA, render

SHOWS = 0.01  # a Gaussian is seen where its weights sum to this many pixels or more
# and it is no further than this behind the surface, in world units; chosen on unseen
# procedural objects
BEHIND = 0.05


def back_project(
    gaussians: Gaussians, camera: Cameras, image: Tensor, mask: Tensor | None = None
) -> Gaussians:
    """The Gaussians after both steps. Without a mask nothing is carved, and white is
    taken for the object's colour.

    camera: one, that took the input.  image: the input [H, W, 3] in [0, 1] on white.  mask: its alpha [H, W, 1] in [0, 1].
    Raises ValueError for more cameras than one and for pictures of another size than
    the camera's.
    """
    shape = (camera.height, camera.width)
    if (
        len(camera) != 1
        or image.shape != (*shape, 3)
        or (mask is not None and mask.shape != (*shape, 1))
    ):
        raise ValueError(
            f"Back-projection takes one camera, its image {[*shape, 3]} and mask {[*shape, 1]}; got {len(camera)} cameras, "
            f"{list(image.shape)} and {None if mask is None else list(mask.shape)}."
        )
    with torch.inference_mode(False):  # whose tensors autograd refuses, so all are copied
        gaussians = Gaussians(
            *(part.detach().clone() for part in gaussians.tensors())
        ).check_finite("the object")
        camera, image = camera.to(gaussians.means, copy=True), image.to(gaussians.means, copy=True)
        if mask is None:
            return paint(gaussians, camera, image, torch.ones_like(image[..., :1]))
        mask = mask.to(gaussians.means, copy=True)
        return paint(carve(gaussians, camera, mask), camera, image, mask)


def carve(gaussians: Gaussians, camera: Cameras, mask: Tensor) -> Gaussians:
    """Opacity 0 for the Gaussians whose centre falls on background: a pixel that is not
    of the object, with neighbours that are not, or outside of the picture, which shows
    all of it. What is left is the visual hull of one silhouette.

    The pixel of margin and the low threshold (mask [H, W, 1] in [0, 1]) spare glass and
    parts as thin as a pixel.
    """
    # the largest alpha of 3 x 3 pixels
    near = F.max_pool2d(mask[None, ..., 0], 3, stride=1, padding=1)[0, ..., None]
    _, inside = read_at(gaussians.means, (near >= VISIBLE_ALPHA).to(mask), camera)
    return replace(gaussians, opacities=gaussians.opacities * inside)


def paint(
    gaussians: Gaussians, camera: Cameras, image: Tensor, mask: Tensor, behind: float = BEHIND
) -> Gaussians:
    """Colours from the image [H, W, 3] on white, of alpha mask [H, W, 1], for the
    Gaussians that the camera sees.

    A rendered picture is linear in the colours, C(p) = sum_g w_g(p) c_g + background.
    So one backward pass of sum_p C(p) X(p) to the colours gives, for every Gaussian at
    once, sum_p w_g(p) X(p): a picture X summed over its footprint, with occlusion. The
    object's colour there is the sum of alpha times colour over the sum of alpha.
    behind: what lies further behind the rendered depth shines through the surface by
        accident, and keeps its colour.
    """
    with torch.enable_grad():
        colors = gaussians.colors.detach().requires_grad_()
        rgb, depth, alpha = render(replace(gaussians, colors=colors), camera)

    def footprint_sums(picture: Tensor) -> Tensor:  # [H, W, 3] -> [G, 3]
        return torch.autograd.grad(rgb, colors, picture[None], retain_graph=True)[0]

    light, weight = (
        footprint_sums(image - (1 - mask)),
        footprint_sums(mask.expand_as(image).contiguous()),
    )
    z, surface = read_at(
        gaussians.means, torch.where(alpha[0] >= SURFACE_ALPHA, depth[0], 0), camera
    )
    seen = (z <= surface + behind)[:, None] & (weight >= SHOWS)
    return replace(
        gaussians,
        colors=torch.where(seen, (light / weight.clamp(min=SHOWS)).clamp(0, 1), gaussians.colors),
    )
