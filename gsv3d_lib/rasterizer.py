"""The fast CPU rasteriser: draft docstring."""

import threading

import numpy as np
import torch
from torch import Tensor

from . import rasterizer_kernels as kernels

# numba's default threading layer aborts the process when two Python threads run parallel kernels at once.
_LOCK = threading.Lock()


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmats, Ks, width, height):
        inputs = [t.detach().contiguous().numpy() for t in (means, quats, scales, opacities, colors, viewmats, Ks)]
        real, num_views, num_gaussians = inputs[0].dtype, len(viewmats), len(means)
        tiles_x, tiles_y = -(-width // kernels.TILE), -(-height // kernels.TILE)
        if True:
            splats = torch.empty(num_views * num_gaussians * 16, dtype=means.dtype).numpy()
            splats = splats.view(kernels.splat_dtype(real)).reshape(num_views, num_gaussians)
            boxes = np.empty((num_views, num_gaussians), kernels.BOX)
            kernels.project_gaussians(0, 1, *inputs, width, height, splats, boxes)
            order = np.empty((num_views, num_gaussians), np.int32)
            num_visible = np.zeros(num_views, np.int64)
            counts = np.zeros((num_views, tiles_x * tiles_y), np.int64)
            kernels.sort_by_depth(0, 1, splats, boxes, tiles_x, order, num_visible, counts)
            tile_starts = np.concatenate([[0], np.cumsum(counts)])
            splat_ids = np.empty(tile_starts[-1], np.int32)
            kernels.fill_tiles(0, 1, boxes, order, num_visible, tiles_x, tile_starts, splat_ids)
            image = np.empty((num_views, height, width, 4), real)
            alpha = np.empty((num_views, height, width, 1), real)
            kernels.blend_tiles(0, 1, splats, tile_starts, splat_ids, tiles_x, tiles_y, image, alpha)
        ctx.state = inputs, splats, boxes, tile_starts, splat_ids, tiles_x, tiles_y, image, alpha
        return torch.from_numpy(image), torch.from_numpy(alpha)

    @staticmethod
    def backward(ctx, v_image, v_alpha):
        inputs, splats, boxes, tile_starts, splat_ids, tiles_x, tiles_y, image, alpha = ctx.state
        means, quats, scales, opacities, colors, viewmats, Ks = inputs
        _, height, width, _ = image.shape
        if True:
            gradients = np.zeros((len(splat_ids), kernels.NUM_GRADIENTS), image.dtype)
            v_image, v_alpha = v_image.contiguous().numpy(), v_alpha.contiguous().numpy()
            kernels.blend_tiles_backward(0, 1, 
                splats, boxes, tile_starts, splat_ids, tiles_x, tiles_y, image, alpha, v_image, v_alpha, gradients
            )
            outputs = [np.zeros_like(x) for x in (means, quats, scales, opacities, colors)]
            view_pairs = tile_starts[:: tiles_x * tiles_y]
            kernels.project_gaussians_backward(0, 1, 
                means, quats, scales, viewmats, Ks, width, height, splats, boxes, view_pairs, gradients, *outputs
            )
        return (*map(torch.from_numpy, outputs), None, None, None, None)


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
    """Same contract as `reference.rasterize`."""
    return _Rasterize.apply(means, quats, scales, opacities, colors, viewmats, Ks, width, height)
