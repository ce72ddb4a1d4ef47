"""The fast CPU rasteriser: hand-written forward and backward passes, compiled by numba.

It draws what `rendering/plain.py` draws, about as fast as a CPU can. The kernels are in
`rendering/kernels.py`; their plan:

1. Project. Every Gaussian is projected into every view and becomes a splat of 16
   numbers, one cache line.
2. List. Each view's visible splats are sorted by depth once (a radix sort of ids), then
   dealt out, near to far, to the 16 x 16 pixel tiles that their boxes touch. A (splat,
   tile) is a pair.
3. Blend. Each tile walks its list until every pixel is opaque. A tile is sixteen 4 x 4
   blocks; the 16 pixels of a block are the 16 lanes of a SIMD register, so everything
   about them is done at once and without branches.
4. Blend backward. Front to back again, which needs no stored list per pixel: what the
   splats behind contribute to the loss is known for the whole list from the rendered
   pixel, and shrinks as splats are passed. Ten sums per pair go to a row of their own,
   so threads never write to the same place and the result does not depend on their
   number.
5. Project backward. Each Gaussian adds up its rows and carries them through the
   projection to its parameters.

The kernels are serial and release the GIL; ordinary Python threads share out the views,
tiles and Gaussians. That keeps compilation short and, unlike numba's own thread pool,
survives `fork` and being called from several threads.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels

NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")


def rasterize(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor,
    viewmats: Tensor, Ks: Tensor, width: int, height: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`plain.rasterize` of CPU tensors, all float32 or all float64.

    It is differentiable with respect to the first five. Raises ValueError for NaN or
    infinite inputs and for other dtypes.
    """
    inputs = means, quats, scales, opacities, colors, viewmats, Ks
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the numba backend renders float32 or float64; got {means.dtype}: "
            "use gaussians.to(torch.float32)."
        )
    for name, tensor in zip(NAMES, inputs, strict=True):
        if not torch.isfinite(tensor.detach().sum()):  # the sum is finite only if every number is
            raise ValueError(
                f"{name} contains NaN or infinity: look for the step that produced it."
            )
    _announce_compilation()
    return _Rasterize.apply(*inputs, width, height)  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=1)
def _announce_compilation() -> None:
    """Says why the first picture of an installation takes its time."""
    place = kernels.blend_tiles.stats.cache_path
    if place is None or not any(Path(place).glob("kernels.blend_tiles-*.nbi")):
        kept = "once" if place else "and cannot keep them"
        print(f"gsv3d: compiling the renderer's kernels, {kept}: about 20 s.", file=sys.stderr)


def num_threads() -> int:
    """`torch.set_num_threads`, at most the environment's NUMBA_NUM_THREADS."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore


def _run(kernel, *args) -> None:
    """kernel(part, parts, *args) for every part, each in a thread of its own."""
    parts = num_threads()
    if parts == 1:
        kernel(0, 1, *args)
    else:
        list(_pool(parts, os.getpid()).map(lambda part: kernel(part, parts, *args), range(parts)))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept from call to call; one a process, as threads do not survive `fork`."""
    return ThreadPoolExecutor(threads)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmats, Ks, width, height):
        inputs = [
            t.detach().contiguous() for t in (means, quats, scales, opacities, colors, viewmats, Ks)
        ]
        arrays = [t.numpy() for t in inputs]
        splats, boxes = _project(*arrays, width=width, height=height)
        lists = _list_pairs(splats, boxes, width, height)
        _, tiles_x, tiles_y, tile_starts, pair_splats, _ = lists
        image = means.new_empty(len(boxes), height, width, 4)
        alpha = means.new_empty(len(boxes), height, width, 1)
        outputs = image.numpy(), alpha.numpy()
        _run(kernels.blend_tiles, splats, tiles_x, tiles_y, tile_starts, pair_splats, *outputs)
        ctx.save_for_backward(*inputs, image, alpha)
        ctx.geometry = splats, boxes, lists
        return image, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, v_image, v_alpha):
        saved = [t.numpy() for t in ctx.saved_tensors]
        means, quats, scales, opacities, colors, viewmats, Ks, image, alpha = saved
        splats, boxes, lists = ctx.geometry
        view_starts, tiles_x, tiles_y, tile_starts, pair_splats, pair_rows = lists
        gradients = np.zeros((len(pair_splats), kernels.NUM_GRADIENTS), image.dtype)
        _run(
            kernels.blend_tiles_backward, splats, tiles_x, tiles_y, tile_starts, pair_splats,
            pair_rows, image, alpha, v_image.contiguous().numpy(), v_alpha.contiguous().numpy(),
            gradients,
        )  # fmt: skip
        outputs = [np.zeros_like(x) for x in (means, quats, scales, opacities, colors)]
        _, height, width, _ = image.shape
        _run(
            kernels.project_gaussians_backward, means, quats, scales, viewmats, Ks, width, height,
            splats, boxes, view_starts, gradients, *outputs,
        )  # fmt: skip
        return (*map(torch.from_numpy, outputs), None, None, None, None)


def _project(means, quats, scales, opacities, colors, viewmats, Ks, width, height):
    """Splats and boxes, both [V, G]."""
    num_views, num_gaussians = len(viewmats), len(means)
    dtype = kernels.splat_dtype(means.dtype)
    # torch aligns memory to 64 bytes, numpy does not: a splat fills one cache line.
    memory = torch.empty(num_views * num_gaussians * dtype.itemsize, dtype=torch.uint8)
    splats = memory.numpy().view(dtype).reshape(num_views, num_gaussians)
    boxes = np.empty((num_views, num_gaussians), kernels.BOX)
    gaussians = means, quats, scales, opacities, colors
    cameras = viewmats, Ks, width, height
    _run(kernels.project_gaussians, *gaussians, *cameras, splats, boxes)
    return splats, boxes


def _list_pairs(splats, boxes, width, height):
    """view_starts [V + 1], tiles in x and y, tile_starts, pair_splats, pair_rows."""
    tiles_x, tiles_y = -(-width // kernels.TILE), -(-height // kernels.TILE)
    view_starts = np.zeros(len(boxes) + 1, np.int64)
    _run(kernels.number_pairs, boxes, view_starts[1:])
    np.cumsum(view_starts, out=view_starts)
    tile_starts = np.full(len(boxes) * tiles_x * tiles_y + 1, view_starts[-1])
    pair_splats, pair_rows = np.empty((2, view_starts[-1]), np.int32)
    # The bits of positive floats, read as integers, sort like the floats.
    with np.errstate(all="ignore"):  # splats that are not visible hold arbitrary numbers
        depth_keys = splats["depth"].astype(np.float32).view(np.uint32)
    lists = tile_starts, pair_splats, pair_rows
    _run(kernels.list_pairs, depth_keys, boxes, view_starts, tiles_x, tiles_y, *lists)
    return view_starts, tiles_x, tiles_y, *lists
