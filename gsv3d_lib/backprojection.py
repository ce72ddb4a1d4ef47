"""Back-projection: what the input shows need not be invented. Ours, not the paper's.

The U-Net carries the input's texture to the other views as well as it can, and the
decoder fuses views that do not quite agree. So even the front of the object is blurred.
But the front is known. Where the input shows background, no Gaussian can stand
(`carve`). The Gaussians that the input shows take its colours (`paint`).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Cameras, read_at
from .gaussians import Gaussians
from .images import VISIBLE_ALPHA
from .rendering import SURFACE_ALPHA, render

SHOWS = 0.01  # a Gaussian is seen where its weights sum to this many pixels or more
BEHIND = 0.05  # and no further behind the surface; chosen on unseen procedural objects


def back_project(
    gaussians: Gaussians, camera: Cameras, image: Tensor, mask: Tensor | None = None
) -> Gaussians:
    """`carve`, then `paint`. Without a mask nothing is carved and all is object.

    camera: the one that took the input.
    image: the input [H, W, 3] in [0, 1] on white.
    mask: its alpha [H, W, 1] in [0, 1].
    """
    shape = (camera.height, camera.width)
    given = (len(camera), image.shape, None if mask is None else mask.shape)
    if given not in ((1, (*shape, 3), (*shape, 1)), (1, (*shape, 3), None)):
        raise ValueError(
            f"Back-projection takes one camera, its image {[*shape, 3]} and mask {[*shape, 1]}; "
            f"got {given[0]} cameras, {list(image.shape)} and {given[2] and list(given[2])}."
        )
    with torch.inference_mode(False):  # autograd refuses tensors of that mode: copy all
        gaussians = gaussians.to(gaussians.means, copy=True).detach().check_finite("the object")
        camera = camera.to(gaussians.means, copy=True)
        image = image.to(gaussians.means, copy=True)
        if mask is None:
            return paint(gaussians, camera, image, torch.ones_like(image[..., :1]))
        mask = mask.to(gaussians.means, copy=True)
        return paint(carve(gaussians, camera, mask), camera, image, mask)


def carve(gaussians: Gaussians, camera: Cameras, mask: Tensor) -> Gaussians:
    """Opacity 0 where the centre of a Gaussian falls on background, or outside.

    What is left is the visual hull of one silhouette. Background is a pixel whose 3 x 3
    neighbours are all empty in the mask [H, W, 1]: this margin spares glass and parts
    as thin as a pixel.
    """
    # the largest alpha of 3 x 3 pixels, against a low threshold
    near = F.max_pool2d(mask[None, ..., 0], 3, stride=1, padding=1)[0, ..., None]
    _, inside = read_at(gaussians.means, (near >= VISIBLE_ALPHA).to(mask), camera)
    return replace(gaussians, opacities=gaussians.opacities * inside)


def paint(
    gaussians: Gaussians, camera: Cameras, image: Tensor, mask: Tensor, behind: float = BEHIND
) -> Gaussians:
    """Colours from the image [H, W, 3] for the Gaussians that the camera sees.

    A rendered picture is linear in the colours: C(p) = sum_g w_g(p) c_g + background.
    So one backward pass of sum_p C(p) X(p) to the colours gives sum_p w_g(p) X(p) for
    every Gaussian at once: a picture X summed over its footprint, with occlusion. The
    new colour is the sum of alpha times colour over the sum of alpha (mask [H, W, 1]).
    behind: what lies this much further back than the rendered depth only shines through
        the surface by accident, and keeps its colour.
    """
    with torch.enable_grad():
        colors = gaussians.colors.detach().requires_grad_()
        rgb, depth, alpha = render(replace(gaussians, colors=colors), camera)

    def footprint_sums(picture: Tensor) -> Tensor:  # [H, W, 3] -> [G, 3]
        return torch.autograd.grad(rgb, colors, picture[None], retain_graph=True)[0]

    light = footprint_sums(image - (1 - mask))  # premultiplied: off white, alpha times colour
    weight = footprint_sums(mask.expand_as(image).contiguous())
    surface_depth = torch.where(alpha[0] >= SURFACE_ALPHA, depth[0], 0)
    z, surface = read_at(gaussians.means, surface_depth, camera)
    seen = (z <= surface + behind)[:, None] & (weight >= SHOWS)
    painted = (light / weight.clamp(min=SHOWS)).clamp(0, 1)
    return replace(gaussians, colors=torch.where(seen, painted, gaussians.colors))
