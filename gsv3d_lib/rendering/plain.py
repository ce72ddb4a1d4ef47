"""A differentiable Gaussian rasteriser in plain PyTorch, to be read in one sitting.

3D Gaussian Splatting (Kerbl et al. 2023) with gsplat's conventions, in four steps:

1. `project`: a 3D Gaussian becomes a 2D Gaussian on the image;
2. sort by depth;
3. `splat_alphas`: how opaque is Gaussian i at pixel p?  alpha_i = o_i exp(-sigma_i(p));
4. `composite`, front to back: pixel = sum_i w_i c_i with w_i = alpha_i T_i and
   T_i = prod_{j < i} (1 - alpha_j).

Autograd does the backward pass. A tile of the image meets only the Gaussians near it,
but each pixel of the tile meets all of those, and autograd remembers every meeting. So
this is for small scenes and for teaching, and it is the yardstick of
`rendering/rasterizer.py`, which gives the same images and gradients much faster.
"""

import torch
from torch import Tensor

from ..rotations import rotation_matrices
from .constants import (
    ALPHA_MAX,
    ALPHA_MIN,
    EPS2D,
    FAR_PLANE,
    FRUSTUM_MARGIN,
    MAX_EXTENT,
    NEAR_PLANE,
    TILE,
    TRANSMITTANCE_MIN,
)


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    """G Gaussians, one camera -> centres [G, 2] in pixels, 2D covariances [G, 2, 2].

    Sigma_2D = J W Sigma W^T J^T + eps I (EWA splatting, Zwicker et al. 2001): W rotates
    the world into the camera, J is the derivative of the perspective division at the
    Gaussian's centre. With Sigma = (R S)(R S)^T that is A A^T for A = J W R S, whose
    columns are the ellipsoid's half axes as the image shows them.
    """
    rotation = viewmat[:3, :3]
    translation = viewmat[:3, 3]
    x, y, z = (means @ rotation.T + translation).unbind(-1)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    centres = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)

    margin_x, margin_y = FRUSTUM_MARGIN * width, FRUSTUM_MARGIN * height
    slope_x = (x / z).clamp((-margin_x - cx) / fx, (width + margin_x - cx) / fx)
    slope_y = (y / z).clamp((-margin_y - cy) / fy, (height + margin_y - cy) / fy)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * slope_x / z, zero, fy / z, -fy * slope_y / z], -1)
    J = J.reshape(-1, 2, 3)
    half_axes = rotation_matrices(quats) * scales[:, None, :]  # R S, [G, 3, 3]
    projected_axes = J @ rotation @ half_axes  # A, [G, 2, 3]
    return centres, projected_axes @ projected_axes.mT + EPS2D * torch.eye(2).to(z)


def splat_alphas(
    centres: Tensor, covariances: Tensor, opacities: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """o_i exp(-(p - c_i)^T Sigma_i^-1 (p - c_i) / 2) at rows x columns -> [h, w, G]."""
    dx = columns[None, :, None] + 0.5 - centres[:, 0]  # a pixel's centre lies at +0.5
    dy = rows[:, None, None] + 0.5 - centres[:, 1]
    conics = torch.linalg.inv(covariances)
    sigma = 0.5 * (conics[:, 0, 0] * dx**2 + conics[:, 1, 1] * dy**2) + conics[:, 0, 1] * dx * dy
    alphas = (opacities * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
    return torch.where(alphas >= ALPHA_MIN, alphas, 0)


def composite(alphas: Tensor, features: Tensor) -> Tensor:
    """Blend G Gaussians front to back -> [h, w, F].

    alphas [h, w, G] and features [G, F], both near to far.
    """
    behind = torch.cumprod(1 - alphas, -1)  # transmittance after each Gaussian
    before = torch.cat([torch.ones_like(alphas[..., :1]), behind[..., :-1]], -1)
    weights = torch.where(behind > TRANSMITTANCE_MIN, alphas * before, 0)
    return weights @ features


def rasterize_view(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor,
    viewmat: Tensor, K: Tensor, width: int, height: int,
) -> Tensor:  # fmt: skip
    """One view of `rasterize`: sums [H, W, 5] of w times (r, g, b, z, 1)."""
    z = means @ viewmat[2, :3] + viewmat[2, 3]
    order = torch.argsort(z, stable=True)
    order = order[(z[order] > NEAR_PLANE) & (z[order] < FAR_PLANE)]
    shapes = means[order], quats[order], scales[order]
    centres, covariances = project(*shapes, viewmat, K, width, height)
    extents = MAX_EXTENT * covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    features = torch.cat([colors, z[:, None], torch.ones_like(z[:, None])], -1)[order]

    def tile(rows: Tensor, columns: Tensor) -> Tensor:
        first = torch.stack([columns[0], rows[0]])
        last = torch.stack([columns[-1], rows[-1]]) + 1
        near = ((centres + extents > first) & (centres - extents < last)).all(-1)
        splats = centres[near], covariances[near], opacities[order][near]
        alphas = splat_alphas(*splats, rows, columns)
        return composite(alphas, features[near])

    all_rows, all_columns = torch.arange(height).to(z), torch.arange(width).to(z)
    strips = [
        torch.cat([tile(rows, columns) for columns in all_columns.split(TILE)], 1)
        for rows in all_rows.split(TILE)
    ]
    return torch.cat(strips, 0)


def rasterize(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor,
    viewmats: Tensor, Ks: Tensor, width: int, height: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Render G Gaussians from V cameras, before any background.

    Shapes: means [G, 3], quats [G, 4] (w, x, y, z), scales [G, 3], opacities [G],
        colors [G, 3], viewmats [V, 4, 4] (world to camera), Ks [V, 3, 3] in pixels.
    Returns sums [V, H, W, 4] of w (r, g, b, z) and alpha [V, H, W, 1], the sum of w.
    """
    gaussians = means, quats, scales, opacities, colors
    cameras = zip(viewmats, Ks, strict=True)
    views = [rasterize_view(*gaussians, viewmat, K, width, height) for viewmat, K in cameras]
    sums, alpha = torch.stack(views).split([4, 1], -1)
    return sums, alpha
