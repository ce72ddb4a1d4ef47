"""`render`: the one door to the three rasterisers.

gsplat (CUDA), numba (`rendering/rasterizer.py`) and plain PyTorch
(`rendering/plain.py`) keep one contract: from Gaussians and cameras they make weighted
sums [V, H, W, 4] of (r, g, b, z) and alpha [V, H, W, 1], the sum of the weights. The
background and the expected depth are decided here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..system.errors import UserError

if TYPE_CHECKING:
    from ..cameras import Cameras
    from ..gaussians import Gaussians

BACKENDS = ("auto", "gsplat", "numba", "torch")
SURFACE_ALPHA = 0.5  # a pixel shows the object when at least this much of it is covered
_given: ContextVar[Callable | None] = ContextVar("rasterizer", default=None)


@contextmanager
def rendering_with(rasterize: Callable) -> Iterator[None]:
    """Within the block `render` draws with this function, like `plain.rasterize`."""
    token = _given.set(rasterize)
    try:
        yield
    finally:
        _given.reset(token)


@dataclass(eq=False)
class Rendering:
    """What V cameras see; unpacks as `rgb, depth, alpha`.

    rgb: [V, H, W, 3] over the background.
    depth: [V, H, W, 1] expected z-depth, sum w z / sum w; 0 where alpha is 0.
    alpha: [V, H, W, 1] in [0, 1].
    """

    rgb: Tensor
    depth: Tensor
    alpha: Tensor

    def __iter__(self):
        return iter((self.rgb, self.depth, self.alpha))


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    background: Tensor | Sequence[float] = (1.0, 1.0, 1.0),
    backend: str = "auto",
) -> Rendering:
    """Render one scene from V cameras; gradients flow to the five tensors.

    background: RGB in [0, 1] as three numbers, a tensor [3], or one per view [V, 3].
    backend: "gsplat" (CUDA), "numba" (CPU) or "torch" (anywhere, slow); "auto" is
        gsplat for CUDA tensors, else numba.
    Raises UserError for a backend that is unknown or not there, ValueError for another
    background and for cameras that require gradients, which no backend computes.
    """
    if cameras.viewmats.requires_grad or cameras.Ks.requires_grad:
        raise ValueError(
            "render() has no gradients for cameras: pass viewmats and Ks that do not require them."
        )
    viewmats = cameras.viewmats.to(gaussians.means)
    Ks = cameras.Ks.to(gaussians.means)
    rasterize = _given.get() or _rasterizer(backend, gaussians.means.is_cuda)
    sums, alpha = rasterize(*gaussians.tensors(), viewmats, Ks, cameras.width, cameras.height)
    rgb = torch.addcmul(sums[..., :3], 1 - alpha, _background(background, viewmats))
    covered = alpha > 0
    depth = torch.where(covered, sums[..., 3:] / torch.where(covered, alpha, 1), 0)
    return Rendering(rgb, depth, alpha)


def _background(background: Tensor | Sequence[float], viewmats: Tensor) -> Tensor:
    """The background as [1 or V, 1, 1, 3]."""
    color = torch.as_tensor(background, dtype=viewmats.dtype, device=viewmats.device)
    if color.shape not in ((3,), (len(viewmats), 3)):
        raise ValueError(
            f"background must have shape [3] or [{len(viewmats)}, 3]; got {list(color.shape)}."
        )
    return color.reshape(-1, 1, 1, 3)


def _rasterizer(backend: str, on_cuda: bool) -> Callable:
    """The function behind a backend's name; imported late: numba takes a second."""
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    if backend == "auto":
        backend = "gsplat" if on_cuda else "numba"
    if backend == "gsplat":
        return rasterize_gsplat
    if backend == "torch":
        from .plain import rasterize
    elif on_cuda:
        raise UserError("backend 'numba' renders CPU tensors: use 'gsplat' or gaussians.to('cpu').")
    else:
        from .rasterizer import rasterize
    return rasterize


def rasterize_gsplat(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor,
    viewmats: Tensor, Ks: Tensor, width: int, height: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`plain.rasterize` with gsplat's CUDA kernels, in float32."""
    if not means.is_cuda:
        raise UserError(
            "backend 'gsplat' renders CUDA tensors: use 'numba' or gaussians.to('cuda')."
        )
    import gsplat
    from gsplat.cuda import _backend

    if getattr(_backend, "_C", None) is None:
        raise UserError(
            "gsplat has no CUDA kernels here: "
            "install the CUDA toolkit (nvcc), or use backend 'torch'."
        )
    inputs = [t.float() for t in (means, quats, scales, opacities, colors, viewmats, Ks)]
    options = dict(packed=False, render_mode="RGB+D")
    sums, alpha, _ = gsplat.rasterization(*inputs, width=width, height=height, **options)
    return sums.to(means), alpha.to(means)
