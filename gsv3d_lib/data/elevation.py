"""The elevation of the camera that took a picture, from the directions of its edges.

From above, level edges tilt and tops open into ellipses. So the directions of edges
tell the elevation. DINO's features tell it worse: ours were trained to be the same in
all views of an object. The estimator is ridge regression; `tools/fit_elevation.py` fits
it in closed form. No network takes part, so it stays valid when the networks are
trained again. Not in the paper, which takes the elevation as given.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..images import DEFAULT_FILL, prepare_condition
from ..system.errors import UserError
from ..system.files import Field, Table, explained, read_tensors
from ..system.paths import atomic_path
from .dataset import RANDOM_ELEVATIONS

SIZE = 64  # pixels of the framed picture
CELLS = 8  # histograms per side
BINS = 9  # directions of an edge
FEATURES = CELLS * CELLS * BINS
INK = 0.05  # a pixel that is darker than white by this belongs to the object
# What the file of an estimator holds.
ESTIMATOR: Table = {
    "weights": Field((FEATURES,), "f4"),
    "mean": Field((FEATURES,), "f4"),
    "bias": Field((), "f4"),
}


def framed(images: Tensor) -> Tensor:
    """Pictures on white [B, S, S, 3] -> [B, 64, 64, 3] with the object in the middle.

    Its longer side is that of conditions: a rendering and a photograph, framed by
    `images.prepare_condition`, look alike to the estimator.
    """
    ink = 1 - images.movedim(-1, 1)
    places = torch.stack([_box(mask) for mask in ink.amax(1) > INK])
    grid = F.affine_grid(places, [len(images), 3, SIZE, SIZE], align_corners=False)
    return 1 - F.grid_sample(ink, grid, align_corners=False).movedim(1, -1)  # outside is white


def _box(mask: Tensor) -> Tensor:
    """bool [S, S] -> map [2, 3] from the framed picture to this one."""
    if not mask.any():
        return torch.eye(2, 3)
    spans = [torch.nonzero(mask.any(axis))[[0, -1], 0].tolist() for axis in (0, 1)]  # columns, rows
    side = max(last - first + 1 for first, last in spans) / DEFAULT_FILL / len(mask)
    x, y = ((first + last + 1) / len(mask) - 1 for first, last in spans)
    return torch.tensor([[side, 0, x], [0, side, y]])


def edge_histograms(images: Tensor) -> Tensor:
    """Framed pictures [B, 64, 64, 3] -> [B, 9 * 8 * 8]: how much edge runs which way.

    One histogram per cell, as in HOG. The direction is that of the structure tensor
    over the colours, so it has no sign: dark on light is light on dark.
    """
    x = images.movedim(-1, 1)
    across = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]
    down = x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
    xx, yy, xy = ((a * b).sum(1) for a, b in ((across, across), (down, down), (across, down)))
    # the tensor's angle is twice that of the direction, so a full turn holds all bins
    place = (torch.atan2(2 * xy, xx - yy) / (2 * math.pi) + 0.5) * BINS
    # less than the gradient itself: a faint edge tells as much as a strong one
    strength = (xx + yy).pow(0.25)
    low, share = place.floor(), place.frac()
    bins = [
        torch.where(low % BINS == k, 1 - share, 0) + torch.where((low + 1) % BINS == k, share, 0)
        for k in range(BINS)
    ]
    cells = F.adaptive_avg_pool2d(torch.stack(bins, 1) * strength[:, None], CELLS)
    length = cells.pow(2).sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-4)
    return (cells / length * CELLS).flatten(1)


def both_sides(images: Tensor) -> Tensor:
    """Features [B, 2, 576] of pictures [B, S, S, 3] and of their mirror images.

    Both have the same elevation.
    """
    images = framed(images)
    return torch.stack([edge_histograms(images), edge_histograms(images.flip(2))], dim=1)


@dataclass
class Elevation:
    """elevation = bias + weights . (features - mean), in degrees."""

    weights: Tensor  # [576]
    mean: Tensor  # [576]
    bias: Tensor  # []

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, S, S, 3] on white -> degrees [B], inside the trained range."""
        return self.from_features(both_sides(images.cpu().float()))

    def from_features(self, features: Tensor) -> Tensor:
        """[B, 2, 576] -> degrees [B], never beyond those of the free views."""
        return (self.bias + (features - self.mean) @ self.weights).mean(1).clamp(*RANDOM_ELEVATIONS)

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint folder."""
        with atomic_path(estimator_path(folder)) as path:
            save_file(vars(self), path)


def estimator_path(folder: str | Path) -> Path:
    return Path(folder) / "elevation" / "elevation.safetensors"


def load_elevation(folder: str | Path) -> Elevation | None:
    """The estimator of a checkpoint folder; None where it has none."""
    path = estimator_path(folder)
    if not os.path.lexists(path):
        return None
    with explained(f"The estimator {path} cannot be read", "copy or fit it again", path):
        return Elevation(**read_tensors(path, ESTIMATOR))


def estimate(image, folder: str | Path) -> float:
    """Elevation in degrees of a picture, by the estimator of a checkpoint folder.

    image: a path, PIL image, array, or condition tensor [S, S, 3].
    """
    estimator = load_elevation(folder)
    if estimator is None:
        raise UserError(
            f"{folder} has no estimator of elevations: give one in degrees, "
            "or fit it with `python tools/fit_elevation.py`."
        )
    rgb = image if isinstance(image, Tensor) else prepare_condition(image, SIZE)[0]
    return float(estimator(rgb[None])[0])
