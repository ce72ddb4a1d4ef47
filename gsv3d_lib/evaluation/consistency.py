"""Do the views agree on one object? Notebook 09 derives the measures.

Four numbers that show a failure where PSNR hardly moves, one failure each.
`reprojection_error` and `split_agreement` need no ground truth. `ghosting` and `detail`
ask the truth only for where the object is and how much texture it has. All are this
project's own definitions (docs/protocol.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras import Cameras, read_at
from ..export.mesh import MIXED_DEPTH, front_and_spread
from ..gaussians import Gaussians
from ..rendering import SURFACE_ALPHA, render
from .metrics import psnr

# A point this far behind what the neighbour sees is hidden from it: no disagreement.
OCCLUDED = 0.1
OPAQUE = 0.9  # a surface lets less than a tenth of the light pass


# ---------------------------------------------------------------- without ground truth


def view_depths(gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Depth and alpha [N, H, W, 1] of each view's *own* Gaussians alone.

    gaussians: the decoder's, N equal shares in the order of the views.
    cameras: those N views.
    """
    views = len(cameras)
    share = len(gaussians) // views
    if share * views != len(gaussians):
        raise ValueError(f"{len(gaussians)} Gaussians are not {views} equal shares of the views.")
    parts = [gaussians.select(slice(k * share, (k + 1) * share)) for k in range(views)]
    with torch.no_grad():
        rendered = [render(part, cameras[k]) for k, part in enumerate(parts)]
    return torch.cat([r.depth for r in rendered]), torch.cat([r.alpha for r in rendered])


def reprojection_error(depth: Tensor, alpha: Tensor, cameras: Cameras) -> float:
    """Mean |z - z'|: z of view i's points in view i + 1, z' what that view sees there.

    World units. Points that land outside the neighbour's silhouette, or more than 0.1
    behind its surface, are not visible there and do not count. NaN when no point is
    visible in its neighbour.
    depth: z-depth [N, H, W, 1].
    alpha: [N, H, W, 1]; a pixel shows a surface from 0.5.
    cameras: a closed ring of N views.
    """
    expected = (len(cameras), cameras.height, cameras.width, 1)
    if depth.shape != expected or alpha.shape != expected:
        given = f"{tuple(depth.shape)} and {tuple(alpha.shape)}"
        raise ValueError(f"depth and alpha are {expected} here; got {given}.")
    surface = torch.where(alpha >= SURFACE_ALPHA, depth, 0)
    errors = []
    for view in range(len(cameras)):
        other = (view + 1) % len(cameras)
        points = _surface_points(surface[view], cameras[view])
        z, seen = read_at(points, surface[other], cameras[other])
        errors.append((z - seen)[(seen > 0) & (z < seen + OCCLUDED)].abs())
    return float(torch.cat(errors).mean())


def _surface_points(depth: Tensor, camera: Cameras) -> Tensor:
    """World points [P, 3] of the pixels [H, W, 1] with a depth."""
    rows, columns = torch.nonzero(depth[..., 0] > 0, as_tuple=True)
    pixels = F.pad(torch.stack([columns, rows], dim=-1) + 0.5, (0, 1), value=1.0)
    local = depth[rows, columns] * (pixels @ torch.linalg.inv(camera.Ks[0]).T)
    rotation, shift = camera.viewmats[0, :3, :3], camera.viewmats[0, :3, 3]
    return (local - shift) @ rotation  # R^T (x - t)


@torch.no_grad()
def split_agreement(decode, latents: Tensor, cameras: Cameras) -> dict[str, float]:
    """How alike are the objects that the odd and the even views give by themselves?

    decode(latents [M, 4, h, w], cameras) -> Gaussians.
    latents: [N, 4, h, w] with N even. cameras: those N views.
    "split_psnr": PSNR between their renderings at all N cameras.
    "split_depth": mean difference of depth where both show a surface, NaN where they
        never do.
    """
    if len(latents) % 2 or len(latents) != len(cameras):
        given = f"{len(latents)} and {len(cameras)} cameras"
        raise ValueError(f"An even number of views can be split in two; got {given}.")
    odd, even = (render(decode(latents[k::2], cameras[k::2]), cameras) for k in (0, 1))
    both = (odd.alpha >= SURFACE_ALPHA) & (even.alpha >= SURFACE_ALPHA)
    difference = (odd.depth - even.depth).abs()[both].mean()
    similar = psnr(odd.rgb.clamp(0, 1), even.rgb.clamp(0, 1))
    return {"split_psnr": similar, "split_depth": float(difference)}


# ---------------------------------------------------------------- with the truth


def ghosting(gaussians: Gaussians, cameras: Cameras, true_alpha: Tensor) -> float:
    """Share of the object's pixels that are not one opaque surface.

    These have an alpha below 0.9, or depths that spread over 0.1. 0 is a solid; NaN
    where no pixel is the object's.
    true_alpha: [V, H, W, 1]; pixels above 0.99 are the object's.
    """
    object_pixels = true_alpha[..., 0] > 0.99
    ghosts = ghost_map(gaussians, cameras) & object_pixels
    return float(ghosts.sum() / object_pixels.sum())


@torch.no_grad()
def ghost_map(gaussians: Gaussians, cameras: Cameras) -> Tensor:
    """True [V, H, W] where a pixel is not one opaque surface."""
    views = [front_and_spread(gaussians, cameras[k])[1:] for k in range(len(cameras))]
    spread, alpha = (torch.cat(parts) for parts in zip(*views, strict=True))
    return ((spread > MIXED_DEPTH) | (alpha < OPAQUE))[..., 0]


def detail(images: Tensor, truth: Tensor, true_alpha: Tensor) -> float:
    """Texture kept: mean gradient length inside the object, divided by the truth's.

    1 keeps all, 0 is flat. Counts gradients, right or wrong, two pixels inside the
    object. NaN where it has no such pixel or no gradient.
    images, truth: [V, H, W, 3] in [0, 1]. true_alpha: [V, H, W, 1].
    """
    inner = -F.max_pool2d(-true_alpha[..., 0], 5, stride=1, padding=2)[:, 1:, 1:] > 0.99
    found = gradient_length(images)[inner].mean()
    wanted = gradient_length(truth)[inner].mean()
    return float(found / wanted) if wanted > 0 else float("nan")


def gradient_length(images: Tensor) -> Tensor:
    """Of images [V, H, W, 3], by differences to the left and upper pixel.

    [V, H - 1, W - 1]
    """
    dx = images[:, 1:, 1:] - images[:, 1:, :-1]
    dy = images[:, 1:, 1:] - images[:, :-1, 1:]
    return (dx**2 + dy**2).sum(-1).sqrt()
