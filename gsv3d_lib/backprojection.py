"""Back-projection: what the input shows need not be invented. Ours, not the paper's.

The U-Net carries the input's texture to the other views as well as it can, and the
decoder fuses views that do not quite agree. So even the front of the object is blurred.
But the front is known. Where the input shows background, no Gaussian can stand
(`carve`). The Gaussians that the input shows take its colours (`paint`). They are
larger than a pixel, so the finest texture comes on Gaussians of its own (`cover`),
which also close holes in the front.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from .cameras import Cameras, ray_grid, read_at
from .gaussians import Gaussians
from .images import VISIBLE_ALPHA
from .rendering import render

SHOWS = 0.01  # a Gaussian is seen where its weights sum to this many pixels or more
# Where `cover` trusts the depth; chosen, as its Gaussians are, on held-out objects.
SOLID = 0.7  # at least so much of the pixel is covered
HOLE = 0.4  # so much or less, where the input shows the object, and there is a hole
FACING = 0.3  # cosine between the surface's normal and the ray, or more
COVER_SCALE = 0.35  # standard deviation of its Gaussians, in pixels
COVER_OPACITY = 0.95


def back_project(
    gaussians: Gaussians, camera: Cameras, image: Tensor, mask: Tensor | None = None
) -> Gaussians:
    """`carve`, `paint`, then `cover`. Without a mask nothing is carved, no hole known.

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
        masked = mask is not None
        mask = mask.to(image, copy=True) if masked else torch.ones_like(image[..., :1])
        if masked:
            gaussians = carve(gaussians, camera, mask)
        return cover(paint(gaussians, camera, image, mask), camera, image, mask, holes=masked)


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


def paint(gaussians: Gaussians, camera: Cameras, image: Tensor, mask: Tensor) -> Gaussians:
    """Colours from the image [H, W, 3] for the Gaussians that the camera sees.

    A rendered picture is linear in the colours: C(p) = sum_g w_g(p) c_g + background.
    So one backward pass of sum_p C(p) X(p) to the colours gives sum_p w_g(p) X(p) for
    every Gaussian at once: a picture X summed over its footprint, with occlusion. The
    new colour is the sum of alpha times colour over the sum of alpha (mask [H, W, 1]).
    What only shines through a half-transparent front is painted too: it is mixed into
    every picture of that front, from other sides as well.
    """
    with torch.enable_grad():
        colors = gaussians.colors.detach().requires_grad_()
        rgb = render(replace(gaussians, colors=colors), camera).rgb

    def footprint_sums(picture: Tensor) -> Tensor:  # [H, W, 3] -> [G, 3]
        return torch.autograd.grad(rgb, colors, picture[None], retain_graph=True)[0]

    light = footprint_sums(image - (1 - mask))  # premultiplied: off white, alpha times colour
    weight = footprint_sums(mask.expand_as(image).contiguous())
    painted = (light / weight.clamp(min=SHOWS)).clamp(0, 1)
    return replace(gaussians, colors=torch.where(weight >= SHOWS, painted, gaussians.colors))


def cover(
    gaussians: Gaussians, camera: Cameras, image: Tensor, mask: Tensor, holes: bool = True
) -> Gaussians:
    """The same scene, and a small Gaussian for every pixel of the image [H, W, 3].

    It stands on the rendered surface and has the pixel's colour. Other pixels than
    those of a solid surface that faces the camera get none, nor do those on the rim of
    the mask [H, W, 1]: a wrong depth there would be seen from the side.
    holes: where the mask shows the object and next to nothing was rendered, a Gaussian
        stands as far away as the nearest solid surface in the picture.
    """
    _, depth, alpha = (picture[0, ..., 0] for picture in render(gaussians, camera))
    inside = mask[..., 0] >= SOLID
    solid = inside & (alpha >= SOLID)
    hole = inside & (alpha <= HOLE) & (holes and bool(solid.any()))
    if hole.any():  # row and column of the nearest solid pixel
        nearest = distance_transform_edt(~solid.cpu(), return_distances=False, return_indices=True)
        row, column = torch.as_tensor(nearest, device=depth.device)
        depth = torch.where(hole, depth[row, column], depth)
    origins, rays = ray_grid(camera, camera.height, camera.width)
    distance = depth / (rays[0] @ camera.viewmats[0, 2, :3])  # from z-depth
    points = origins[0] + distance[..., None] * rays[0]
    down, right = torch.gradient(points, dim=(0, 1))
    normals = F.normalize(torch.linalg.cross(right, down), dim=-1)
    facing = (normals * F.normalize(rays[0], dim=-1)).sum(-1).abs()
    chosen = hole | (solid & (facing >= FACING))
    means = points[chosen]
    pixels = depth[chosen][:, None] / camera.Ks[0, 0, 0]  # the side of one, where it stands
    layer = Gaussians(
        means=means,
        quats=means.new_tensor([1.0, 0, 0, 0]).expand(len(means), 4),
        scales=(COVER_SCALE * pixels).expand(len(means), 3),
        opacities=means.new_full((len(means),), COVER_OPACITY),
        colors=image[chosen],
    )
    return Gaussians.concatenate([gaussians, layer])
