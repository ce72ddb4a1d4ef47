"""What is minimised in 3D: L_3D on rendered RGB and depth (docs/method.md), and an optional per-pixel warm start."""

from __future__ import annotations

import torch
from torch import Tensor

from .cameras import Cameras
from .config import Config
from .gaussians import Gaussians
from .rendering import render


def rendering_loss(
    gaussians: Gaussians, cameras: Cameras, rgb: Tensor, depth: Tensor, alpha: Tensor, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_3D of one object on Q target views, input and novel alike.

        L_3D = lambda_rgb * mean |I - I*|^2 + lambda_depth * mean_foreground |D - D*| + lambda_alpha * mean |A - A*|^2

    rgb [Q, H, W, 3] on white, depth and alpha [Q, H, W, 1]: the truth I*, D*, A*. The form of the depth term and the
    weights are this project's choice; the paper states an RGB MSE and a depth term.
    """
    expected = (len(cameras), cameras.height, cameras.width)
    if rgb.shape != (*expected, 3) or depth.shape != (*expected, 1) or alpha.shape != (*expected, 1):
        raise ValueError(
            f"The targets are [Q, H, W, 3], [Q, H, W, 1], [Q, H, W, 1] with Q, H, W = {expected}; "
            f"got {tuple(rgb.shape)}, {tuple(depth.shape)}, {tuple(alpha.shape)}."
        )
    image, z, coverage = render(gaussians, cameras)
    rgb_loss = (image - rgb).pow(2).mean()
    depth_loss = foreground_l1(z, depth, alpha)
    alpha_loss = (coverage - alpha).pow(2).mean()
    loss = config.lambda_rgb * rgb_loss + config.lambda_depth * depth_loss + config.lambda_alpha * alpha_loss
    psnr = -10 * torch.log10(rgb_loss.detach())
    return loss, {"psnr": psnr, "depth_l1": depth_loss.detach(), "alpha_mse": alpha_loss.detach()}


def foreground_l1(depth: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Mean |D - D*| over pixels that the object covers by more than half and whose true depth is known."""
    inside = (alpha > 0.5) & (target > 0)
    return ((depth - target).abs() * inside).sum() / inside.sum().clamp(min=1)


def pixel_loss(gaussians: Gaussians, cameras: Cameras, rgb: Tensor, depth: Tensor, alpha: Tensor) -> Tensor:
    """Each Gaussian against the pixel whose ray it sits on; no rendering, so gradients are dense from the first step.

    Not in the paper: a warm start for short budgets. rgb [N, h, w, 3], depth and alpha [N, h, w, 1] at the decoder's
    output resolution; Gaussians in the order of those pixels. Outside the object only the opacity is asked to vanish.
    """
    frames, height, width = rgb.shape[:3]
    if len(gaussians) != frames * height * width:
        raise ValueError(f"{len(gaussians)} Gaussians do not sit on {frames} x {height} x {width} pixels.")
    means, colors = (t.unflatten(0, (frames, height, width)) for t in (gaussians.means, gaussians.colors))
    opacities = gaussians.opacities.reshape(frames, height, width, 1)
    rotation, shift = cameras.viewmats[:, :3, :3].to(means), cameras.viewmats[:, :3, 3].to(means)
    z = torch.einsum("vj,vhwj->vhw", rotation[:, 2], means)[..., None] + shift[:, None, None, 2:]
    inside = ((alpha > 0.5) & (depth > 0)).to(z)
    count = inside.sum().clamp(min=1)
    depth_term = ((z - depth).abs() * inside).sum() / count
    color_term = ((colors - rgb).pow(2) * inside).sum() / (3 * count)
    empty_term = (opacities * (1 - alpha)).mean()
    return depth_term + color_term + empty_term
