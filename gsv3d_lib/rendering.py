"""`render`: the one door to the three rasterisers.

gsplat (CUDA), numba (`rasterizer.py`) and plain PyTorch (`reference.py`) share one contract: given Gaussians and
cameras they return weighted sums [V, H, W, 4] of (r, g, b, z) and alpha [V, H, W, 1], the sum of the weights. What the
sums mean for a picture, background and expected depth, is decided here, once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussians import Gaussians

BACKENDS = ("auto", "gsplat", "numba", "torch")


@dataclass
class Rendering:
    """What V cameras see; unpacks as `rgb, depth, alpha`.

    rgb: [V, H, W, 3] over the background, in [0, 1] when colours and background are.
    depth: [V, H, W, 1] expected z-depth, sum w z / sum w in world units, and 0 where alpha is 0.
    alpha: [V, H, W, 1] in [0, 1].
    """

    rgb: Tensor
    depth: Tensor
    alpha: Tensor

    def __iter__(self):
        return iter((self.rgb, self.depth, self.alpha))


def render(gaussians: Gaussians, cameras, background=(1.0, 1.0, 1.0), backend: str = "auto") -> Rendering:
    """Render one scene from V cameras, differentiable with respect to the five tensors of `gaussians`.

    background: RGB as three numbers, a tensor [3], or one per view [V, 3].
    backend: "gsplat" (CUDA), "numba" (CPU), "torch" (anywhere, slow); "auto" picks gsplat for CUDA tensors, else numba.

    Raises ValueError for an unknown backend, a background of another shape, or cameras that require gradients.
    """
    if cameras.viewmats.requires_grad or cameras.Ks.requires_grad:
        raise ValueError("render() has no gradients for cameras: pass viewmats and Ks that do not require grad.")
    viewmats, Ks = cameras.viewmats.to(gaussians.means), cameras.Ks.to(gaussians.means)
    rasterize = _rasterizer(backend, gaussians)
    sums, alpha = rasterize(*gaussians.tensors(), viewmats, Ks, cameras.width, cameras.height)
    rgb = torch.addcmul(sums[..., :3], 1 - alpha, _background(background, viewmats))
    seen = alpha > 0
    depth = torch.where(seen, sums[..., 3:] / torch.where(seen, alpha, 1), 0)
    return Rendering(rgb, depth, alpha)


def _background(background, viewmats: Tensor) -> Tensor:
    """The background as [1 or V, 1, 1, 3]."""
    color = torch.as_tensor(background, dtype=viewmats.dtype, device=viewmats.device)
    if color.shape not in ((3,), (len(viewmats), 3)):
        raise ValueError(f"background must have shape [3] or [{len(viewmats)}, 3], but has {list(color.shape)}.")
    return color.reshape(-1, 1, 1, 3)


def _rasterizer(backend: str, gaussians: Gaussians):
    """The function behind a backend's name. Imported late: numba takes a second, gsplat needs CUDA."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, but is {backend!r}.")
    on_cuda = gaussians.means.is_cuda
    if backend == "gsplat" or (backend == "auto" and on_cuda):
        return rasterize_gsplat
    if backend == "torch":
        from .reference import rasterize
    elif on_cuda:
        raise ValueError("backend 'numba' renders CPU tensors: call gaussians.to('cpu') first, or use 'gsplat'.")
    else:
        from .rasterizer import rasterize
    return rasterize


def rasterize_gsplat(
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
    """`reference.rasterize` by gsplat's CUDA kernels. Raises ValueError without CUDA tensors or without its kernels."""
    if not means.is_cuda:
        raise ValueError("backend 'gsplat' needs CUDA tensors: call gaussians.to('cuda'), or use 'numba' on a CPU.")
    import gsplat
    from gsplat.cuda._backend import _C

    if _C is None:
        raise ValueError("gsplat has no CUDA kernels here: install nvcc and reinstall gsplat, or use backend 'torch'.")
    sums, alpha, _ = gsplat.rasterization(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, packed=False, render_mode="RGB+D"
    )
    return sums, alpha
