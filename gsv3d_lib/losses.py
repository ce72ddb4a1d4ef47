"""What is minimised in 3D: one function per term, each with its equation.

    L_3D = sum over terms of lambda_TERM * TERM(what is rendered, what is true)      (1)

A term whose weight in the configuration is 0 is not computed. The paper has two, RGB
and depth (docs/method.md); all others are this project's and off in the preset `paper`.
To add one, write a function of `Seen` and `Truth` and name it in `TERMS`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import full_precision
from .cameras import Cameras, batch_cameras
from .config import Config
from .data.examples import Example
from .gaussians import Gaussians
from .rendering import render
from .system.paths import find


class Truth(NamedTuple):
    """Q views: rgb [Q, H, W, 3] on white, depth [Q, H, W, 1] (0 = nothing), alpha."""

    rgb: Tensor
    depth: Tensor
    alpha: Tensor


class Seen(NamedTuple):
    """The same views of the Gaussians, and the Gaussians themselves."""

    rgb: Tensor
    depth: Tensor
    alpha: Tensor
    gaussians: Gaussians
    config: Config


# ---------------------------------------------------------------- the terms


def rgb(seen: Seen, true: Truth) -> Tensor:
    """mean |I - I*|^2 over the whole frame [paper: mean squared error]."""
    return (seen.rgb - true.rgb).pow(2).mean()


def depth(seen: Seen, true: Truth) -> Tensor:
    """mean |D - D*| over the object [paper: a depth term; ours: its form]."""
    return foreground_l1(seen.depth, true.depth, true.alpha)


def alpha(seen: Seen, true: Truth) -> Tensor:
    """mean |A - A*|^2 [ours]. In stage 1 only: notebook 10 says why."""
    return (seen.alpha - true.alpha).pow(2).mean()


def dssim(seen: Seen, true: Truth) -> Tensor:
    """1 - SSIM(I, I*) [ours; 3D Gaussian Splatting, eq. 7]: structure, not means."""
    with full_precision(true.rgb.device):
        return 1 - structural_similarity(seen.rgb, true.rgb)


def lpips(seen: Seen, true: Truth) -> Tensor:
    """LPIPS(I, I*) [ours]: distance in the feature maps of a classifier.

    Needs weights that do not ship, at `lpips_weights`. The first layer of their net
    looks at every fourth pixel only, so both pictures are moved by 0 to 3 pixels
    together. Else a grid of four pixels would be invisible to the loss and appear in
    the pictures.
    """
    net = perceptual_net(seen.config.lpips_weights, true.rgb.device)
    return net(shift(seen.rgb), shift(true.rgb)).mean()


def solid(seen: Seen, true: Truth) -> Tensor:
    """mean H(A), the binary entropy of what is covered [ours]: surfaces, not fog.

    H(a) = -a ln a - (1 - a) ln(1 - a) is 0 where a pixel is covered wholly or not at
    all.
    """
    a = seen.alpha.clamp(1e-4, 1 - 1e-4)
    return -(a * a.log() + (1 - a) * (1 - a).log()).mean()


TERMS: dict[str, Callable[[Seen, Truth], Tensor]] = {
    "rgb": rgb,
    "depth": depth,
    "alpha": alpha,
    "ssim": dssim,
    "lpips": lpips,
    "solid": solid,
}
LOSS_FIELDS = (*(f"lambda_{name}" for name in TERMS), "lpips_weights")  # of `Config`


# ---------------------------------------------------------------- their sum


def rendering_loss(
    gaussians: Gaussians,
    cameras: Cameras,
    rgb: Tensor,
    depth: Tensor,
    alpha: Tensor,
    config: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_3D of one object on Q target views, input and novel alike, by equation (1).

    rgb [Q, H, W, 3] on white, depth and alpha [Q, H, W, 1]: the truth. Returns the
    loss, and the terms for the log: always PSNR in dB, depth and alpha.
    """
    expected = (len(cameras), cameras.height, cameras.width)
    if rgb.shape != (*expected, 3) or not depth.shape == alpha.shape == (*expected, 1):
        raise ValueError(
            f"The targets are [Q, H, W, 3], [Q, H, W, 1], [Q, H, W, 1] with Q, H, W = {expected}; "
            f"got {tuple(rgb.shape)}, {tuple(depth.shape)}, {tuple(alpha.shape)}."
        )
    true = Truth(rgb, depth, alpha)
    drawn = render(gaussians, cameras)
    seen = Seen(drawn.rgb, drawn.depth, drawn.alpha, gaussians, config)
    weights = {name: getattr(config, f"lambda_{name}") for name in TERMS}
    always = ("rgb", "depth", "alpha")
    values = {name: TERMS[name](seen, true) for name in TERMS if weights[name] or name in always}
    loss = sum(weights[name] * value for name, value in values.items() if weights[name])
    metrics = {name: value.detach() for name, value in values.items()}
    log = {"psnr": -10 * torch.log10(metrics.pop("rgb"))}
    log |= {"depth_l1": metrics.pop("depth"), "alpha_mse": metrics.pop("alpha")}
    return torch.as_tensor(loss), log | metrics


def target_loss(
    scenes: list[Gaussians], batch: Example, config: Config, weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_3D averaged over the B objects of a batch, and the averaged metrics.

    weight: [B], a factor for each object's loss: w(sigma) of stage 2.
    """
    cameras = batch_cameras(batch["target_azimuth"], batch["target_elevation"], config.image_size)
    truth = zip(batch["target_rgb"], batch["target_depth"], batch["target_alpha"])
    objects = zip(scenes, cameras, truth)
    losses, metrics = zip(*(rendering_loss(s, c, *t, config) for s, c, t in objects))
    means = {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}
    losses = torch.stack(losses)
    return (losses if weight is None else losses * weight).mean(), means


# ---------------------------------------------------------- what the terms are made of


def foreground_l1(depth: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Mean |D - D*| where D* is known (> 0) and the object covers more than half."""
    inside = (alpha > 0.5) & (target > 0)
    return ((depth - target).abs() * inside).sum() / inside.sum().clamp(min=1)


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of pictures [Q, H, W, 3] in [0, 1] (Wang et al. 2004).

    With their 11 x 11 Gaussian window of deviation 1.5 and constants 0.01^2 and 0.03^2.
    Beyond the border pictures are 0; `metrics.ssim` leaves the border out.
    """
    offsets = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(15, 1, 11)
    x = a.movedim(-1, 1)
    y = b.movedim(-1, 1)
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1)  # [Q, 15, H, W]
    moments = F.conv2d(moments, window[..., None], padding=(5, 0), groups=15)
    moments = F.conv2d(moments, window[:, :, None], padding=(0, 5), groups=15)
    mean_x, mean_y, xx, yy, xy = moments.chunk(5, dim=1)
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    variances = (xx - mean_x**2) + (yy - mean_y**2)
    structure = (2 * (xy - mean_x * mean_y) + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).mean()


def shift(images: Tensor) -> Tensor:
    """[Q, H, W, 3] on white, each moved by 0 to 3 pixels -> [Q, H + 3, W + 3, 3].

    The offset depends on a picture's place alone, so runs repeat; four pictures have
    four.
    """
    moved = []
    for k, image in enumerate(images):
        down = k % 4
        right = (2 * k + k // 2) % 4
        moved.append(F.pad(image, (0, 0, right, 3 - right, down, 3 - down), value=1.0))
    return torch.stack(moved)


@lru_cache(1)
def perceptual_net(path: str, device: torch.device):
    """The LPIPS net of a weights file, opened once."""
    from .evaluation.lpips import load_lpips

    return load_lpips(find(path)).to(device)


def pixel_loss(
    gaussians: Gaussians, cameras: Cameras, rgb: Tensor, depth: Tensor, alpha: Tensor
) -> Tensor:
    """Each Gaussian against the pixel whose ray it sits on; nothing is rendered [ours].

    Gradients are dense from the first step: a warm start for short budgets.
    rgb [N, h, w, 3], depth and alpha [N, h, w, 1] at the decoder's output resolution;
    Gaussians in the order of those pixels. Outside of the object only the opacity
    counts.
    """
    frames, height, width = rgb.shape[:3]
    grid = frames, height, width
    if len(gaussians) != frames * height * width:
        size = " x ".join(map(str, grid))
        raise ValueError(f"{len(gaussians)} Gaussians do not sit on {size} pixels.")
    means, colors = (t.unflatten(0, grid) for t in (gaussians.means, gaussians.colors))
    opacities = gaussians.opacities.reshape(*grid, 1)
    forward = cameras.viewmats[:, 2].to(means)  # [N, 4], the row of z
    z = torch.einsum("vj,vhwj->vhw", forward[:, :3], means)[..., None]
    z = z + forward[:, None, None, 3:]
    inside = ((alpha > 0.5) & (depth > 0)).to(z)
    count = inside.sum().clamp(min=1)
    depth_term = ((z - depth).abs() * inside).sum() / count
    color_term = ((colors - rgb).pow(2) * inside).sum() / (3 * count)
    empty_term = (opacities * (1 - alpha)).mean()
    return depth_term + color_term + empty_term
