"""A differentiable Gaussian rasteriser in plain PyTorch, short enough to be read in one sitting.

3D Gaussian Splatting (Kerbl et al. 2023), with the conventions of gsplat, in four steps per camera:

1. `project`: every 3D Gaussian becomes a 2D Gaussian on the image (EWA splatting);
2. sort by depth;
3. `splat_alphas`: how opaque is Gaussian i at pixel p,  alpha_i = o_i exp(-sigma_i(p));
4. `composite`: front to back,  pixel = sum_i c_i alpha_i T_i  with  T_i = prod_{j<i} (1 - alpha_j).

The backward pass is autograd's. Every pixel meets every Gaussian, so time and memory grow with H x W x G: for small
scenes, for teaching, and as the yardstick of `rasterizer.py`, which gives the same images and gradients much faster.
"""

import torch
from torch import Tensor

# gsplat's conventions, shared with the fast kernels.
EPS2D = 0.3  # pixels^2, added to the diagonal of the 2D covariance: no splat is thinner than a pixel
NEAR_PLANE, FAR_PLANE = 0.01, 1e10  # z-depth outside this range is not drawn
ALPHA_MIN = 1 / 255  # a fainter contribution is skipped
ALPHA_MAX = 0.999  # so that 1 - alpha never reaches zero
TRANSMITTANCE_MIN = 1e-4  # a pixel is finished before the Gaussian that would take it to this or below
FRUSTUM_MARGIN = 0.15  # the linearisation is clamped this fraction of the image outside its borders


def rotation_matrices(quats: Tensor) -> Tensor:
    """Quaternions [..., 4] (w, x, y, z; any non-zero length) to rotation matrices [..., 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def project(
    means: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor]:
    """3D Gaussians [G] seen by one camera -> centres [G, 2] in pixels, 2D covariances [G, 2, 2], z-depths [G].

    Sigma_2D = J W Sigma W^T J^T + eps I (Zwicker et al. 2001): W rotates the world into the camera, and J is the
    derivative of the perspective division at the centre. Far outside the image J explodes, so it is taken at a
    point clamped to a margin around the image.
    """
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    x, y, z = (means @ rotation.T + translation).unbind(-1)
    focal_x, focal_y, centre_x, centre_y = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    centres = torch.stack([focal_x * x / z + centre_x, focal_y * y / z + centre_y], -1)

    margin_x, margin_y = FRUSTUM_MARGIN * width, FRUSTUM_MARGIN * height
    slope_x = (x / z).clamp((-margin_x - centre_x) / focal_x, (width + margin_x - centre_x) / focal_x)
    slope_y = (y / z).clamp((-margin_y - centre_y) / focal_y, (height + margin_y - centre_y) / focal_y)
    zero = torch.zeros_like(z)
    J = torch.stack([focal_x / z, zero, -focal_x * slope_x / z, zero, focal_y / z, -focal_y * slope_y / z], -1)
    half_axes = rotation_matrices(quats) * scales[:, None, :]  # R S: column k is the k-th half axis, [G, 3, 3]
    projected_axes = J.reshape(-1, 2, 3) @ rotation @ half_axes  # [G, 2, 3]
    covariances = projected_axes @ projected_axes.mT + EPS2D * torch.eye(2, dtype=z.dtype, device=z.device)
    return centres, covariances, z


def splat_alphas(centres: Tensor, covariances: Tensor, opacities: Tensor, width: int, height: int) -> Tensor:
    """alpha_i(p) = o_i exp(-(p - c_i)^T Sigma_i^-1 (p - c_i) / 2) for every pixel centre -> [H, W, G]."""
    like = dict(dtype=centres.dtype, device=centres.device)
    rows, columns = torch.arange(height, **like) + 0.5, torch.arange(width, **like) + 0.5
    dx = columns[None, :, None] - centres[:, 0]
    dy = rows[:, None, None] - centres[:, 1]
    conics = torch.linalg.inv(covariances)
    sigma = 0.5 * (conics[:, 0, 0] * dx**2 + conics[:, 1, 1] * dy**2) + conics[:, 0, 1] * dx * dy
    alphas = (opacities * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
    return torch.where(alphas >= ALPHA_MIN, alphas, 0)


def composite(alphas: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Blend front to back. alphas [H, W, G], features [G, F], both sorted near to far -> [H, W, F], [H, W, 1]."""
    after = torch.cumprod(1 - alphas, -1)  # transmittance behind each Gaussian
    before = torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], -1)
    weights = torch.where(after > TRANSMITTANCE_MIN, alphas * before, 0)
    return weights @ features, weights.sum(-1, keepdim=True)


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    """Render G Gaussians from V cameras, before any background.

    Shapes: means [G, 3], quats [G, 4], scales [G, 3], opacities [G], colors [G, 3], viewmats [V, 4, 4], Ks [V, 3, 3].
    Returns sums [V, H, W, 4] (sum w r, sum w g, sum w b, sum w z) and alpha [V, H, W, 1] = sum w.
    """
    images = []
    for viewmat, K in zip(viewmats, Ks):
        centres, covariances, z = project(means, quats, scales, viewmat, K, width, height)
        near_to_far = torch.argsort(z, stable=True)
        visible = near_to_far[(z[near_to_far] > NEAR_PLANE) & (z[near_to_far] < FAR_PLANE)]
        alphas = splat_alphas(centres[visible], covariances[visible], opacities[visible], width, height)
        images.append(composite(alphas, torch.cat([colors, z[:, None]], -1)[visible]))
    sums, alpha = zip(*images)
    return torch.stack(sums), torch.stack(alpha)
