"""The elevation of the camera that took a picture: ridge regression, in closed form, on
histograms of its edges.

    python -m gsv3d_lib elevation --weights data/checkpoints/tiny --data ../shared/objects/train data/cache/orbits

fits it on the views of the datasets and writes `elevation/elevation.safetensors`, a few
kB, into the checkpoint folder.

From above, level edges tilt and tops open into ellipses, so the directions of edges
tell the elevation better than features that were learned to be the same in all views of
an object, as DINO's are here. No network takes part: the estimator stays valid when the
others are trained again. Not in the paper, which takes the elevation as given.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..images import DEFAULT_FILL, prepare_condition
from ..system.command import check_writable, command_parser, exit_code, input_path
from ..system.errors import MissingFile, UserError
from ..system.files import UNREADABLE, Field, Table, read_tensors
from ..system.paths import atomic_path, check_readable, from_repository, reason
from .dataset import RING, ViewTensors, load_views

SIZE, CELLS, BINS = 64, 8, 9  # pixels of the picture, histograms per side, directions of an edge
RANGE = (-10.0, 40.0)  # degrees, of the free views of `make_dataset`: nothing else is ever answered
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the squared weights, per example
INK = 0.05  # a pixel that is darker than white by this belongs to the object
FEATURES = CELLS * CELLS * BINS
# What the file of an estimator holds.
ESTIMATOR: Table = {
    "weights": Field((FEATURES,), "f4"),
    "mean": Field((FEATURES,), "f4"),
    "bias": Field((), "f4"),
}
# of a ring, beside all free views: more would only say its one elevation again
RING_VIEWS = (0, 5, 10)


def framed(images: Tensor) -> Tensor:
    """Pictures on white [B, S, S, 3] -> [B, 64, 64, 3], the object centred, its longer
    side as in conditions.

    So a rendering and a photograph, framed by `images.prepare_condition`, look alike to
    the estimator.
    """
    ink = 1 - images.movedim(-1, 1)
    shown = ink.amax(1) > INK
    places = [_box(mask) for mask in shown]
    grid = F.affine_grid(torch.stack(places), [len(images), 3, SIZE, SIZE], align_corners=False)
    return 1 - F.grid_sample(ink, grid, align_corners=False).movedim(1, -1)  # outside is white


def _box(mask: Tensor) -> Tensor:
    """bool [S, S] -> affine map [2, 3] from the framed picture to this one, in units of
    half the side.
    """
    if not mask.any():
        return torch.eye(2, 3)
    spans = [torch.nonzero(mask.any(axis))[[0, -1], 0].tolist() for axis in (0, 1)]  # columns, rows
    side = max(last - first + 1 for first, last in spans) / DEFAULT_FILL / len(mask)
    x, y = ((first + last + 1) / len(mask) - 1 for first, last in spans)
    return torch.tensor([[side, 0, x], [0, side, y]])


def edge_histograms(images: Tensor) -> Tensor:
    """Framed pictures [B, 64, 64, 3] -> [B, 9 * 8 * 8]: per cell, how much edge runs in
    which direction (as in HOG).

    The direction is that of the structure tensor over the colours, so it has no sign:
    dark on light is light on dark.
    """
    x = images.movedim(-1, 1)
    across, down = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2], x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
    xx, yy, xy = ((a * b).sum(1) for a, b in ((across, across), (down, down), (across, down)))
    # half the angle is the direction
    place = (torch.atan2(2 * xy, xx - yy) / (2 * math.pi) + 0.5) * BINS
    # less than the gradient itself: a faint edge tells as much as a strong one
    strength = (xx + yy).pow(0.25)
    low, share = place.floor(), place.frac()
    bins = [
        torch.where(low % BINS == k, 1 - share, 0) + torch.where((low + 1) % BINS == k, share, 0)
        for k in range(BINS)
    ]
    cells = F.adaptive_avg_pool2d(torch.stack(bins, 1) * strength[:, None], CELLS)
    return (
        cells / cells.pow(2).sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-4) * CELLS
    ).flatten(1)


def both_sides(images: Tensor) -> Tensor:
    """Features [B, 2, 576] of pictures [B, S, S, 3] and of their mirror images, which
    have the same elevation.
    """
    images = framed(images)
    return torch.stack([edge_histograms(images), edge_histograms(images.flip(2))], dim=1)


@dataclass
class Elevation:
    """elevation = bias + weights . (features - mean), in degrees; weights and mean
    [576], bias a scalar tensor.
    """

    weights: Tensor
    mean: Tensor
    bias: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, S, S, 3] in [0, 1] on white -> degrees [B], inside the range
        that was trained on.
        """
        return self.from_features(both_sides(images.cpu().float()))

    def from_features(self, features: Tensor) -> Tensor:
        """[B, 2, 576] -> [B]"""
        return (self.bias + (features - self.mean) @ self.weights).mean(1).clamp(*RANGE)

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint folder."""
        with atomic_path(estimator_path(folder)) as path:
            save_file(vars(self), path)


def estimator_path(folder: str | Path) -> Path:
    return Path(folder) / "elevation" / "elevation.safetensors"


def load_elevation(folder: str | Path) -> Elevation | None:
    """The estimator of a checkpoint folder; None where it has none. Raises ValueError
    where it is damaged.
    """
    path = estimator_path(folder)
    if not os.path.lexists(path):
        return None
    check_readable(path)
    try:
        return Elevation(**read_tensors(path, ESTIMATOR))
    except UNREADABLE as error:
        raise UserError(
            f"The estimator {path} cannot be read ({reason(error)}); copy or fit it again."
        ) from error


def estimate(image, folder: str | Path) -> float:
    """Elevation in degrees of a picture (a path, PIL image, array or condition tensor)
    by a checkpoint's estimator.

    Raises ValueError where the folder has none.
    """
    estimator = load_elevation(folder)
    if estimator is None:
        raise UserError(
            f"{folder} has no estimator of elevations: give one in degrees, or fit it with `python -m gsv3d_lib elevation`."
        )
    rgb = image if isinstance(image, Tensor) else prepare_condition(image, SIZE)[0]
    return float(estimator(rgb[None])[0])


def fit_ridge(features: Tensor, elevations: Tensor, penalty: float) -> Elevation:
    """Features [E, D], elevations [E] -> the minimiser of mean squared error + penalty
    |weights of unit deviation|^2.
    """
    mean, deviation, bias = features.mean(0), features.std(0) + 1e-3, elevations.mean()
    scaled = ((features - mean) / deviation).double()
    normal = scaled.T @ scaled / len(scaled) + penalty * torch.eye(scaled.shape[1])
    weights = torch.linalg.solve(normal, scaled.T @ (elevations - bias).double() / len(scaled))
    return Elevation((weights.float() / deviation).contiguous(), mean, bias)


def view_features(
    views: ViewTensors, ring: tuple[int, ...] = RING_VIEWS
) -> list[tuple[Tensor, Tensor]]:
    """Per object: features [V', 2, 576] and elevations [V'] of its free views and some
    of its ring that show something.
    """
    chosen = [*ring, *range(RING, views.rgb.shape[1])]
    objects = []
    for rgb, alpha, elevations in zip(views.rgb, views.alpha, views.elevations, strict=True):
        there = [k for k in chosen if (alpha[k] > 127).float().mean() > 0.005]
        if there:
            objects.append((both_sides(rgb[there].float() / 255), elevations[there]))
    return objects


def fit(views: ViewTensors) -> tuple[Elevation, dict[str, float]]:
    """The estimator, its penalty chosen on every sixth object, then fitted on all; and
    what it scored on those.
    """
    objects = view_features(views)
    held, kept = objects[::6], [item for k, item in enumerate(objects) if k % 6]
    if not held or not kept:
        raise UserError(
            f"An estimator needs some objects to learn from and some to be tried on; got {len(objects)}."
        )
    errors = {
        penalty: mean_error(fit_ridge(*_stacked(kept), penalty), held) for penalty in PENALTIES
    }
    best = min(errors, key=errors.get)
    features, elevations = _stacked(held)
    constant = float((elevations - _stacked(kept)[1].mean()).abs().mean())
    return fit_ridge(*_stacked(objects), best), {
        "penalty": best,
        "error": errors[best],
        "constant": constant,
    }


def mean_error(estimator: Elevation, objects: list[tuple[Tensor, Tensor]]) -> float:
    """Mean absolute error in degrees."""
    features, elevations = (torch.cat(column) for column in zip(*objects, strict=True))
    return float((estimator.from_features(features) - elevations).abs().mean())


def _stacked(objects: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Every picture and its mirror image as an example: [E, 576], [E]."""
    features, elevations = (torch.cat(column) for column in zip(*objects, strict=True))
    return features.flatten(0, 1), elevations.repeat_interleave(2)


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = command_parser("elevation", __doc__)
    parser.add_argument(
        "--weights",
        type=input_path,
        default="data/checkpoints/tiny",
        help="the checkpoint folder to write into",
    )
    parser.add_argument(
        "--data", nargs="+", type=input_path, required=True, help="dataset folders to learn from"
    )
    parser.add_argument(
        "--test", nargs="+", type=input_path, default=[], help="dataset folders to be measured on"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    if not (args.weights / "gsv3d.json").is_file():
        raise MissingFile(
            f"{args.weights} is no GSV3D checkpoint: gsv3d.json is missing.{from_repository(args.weights)}"
        )
    check_writable(estimator_path(args.weights))
    tests = {folder: view_features(load_views([folder], SIZE), ring=()) for folder in args.test}
    for folder, objects in tests.items():
        if not objects:
            raise UserError(
                f"{folder} cannot be measured on: its objects have no views beside the {RING} of the ring."
            )
    estimator, scores = fit(load_views(args.data, SIZE))
    print(
        "held-out objects: {error:.2f} degrees off; the mean elevation {constant:.2f}; penalty {penalty:g}".format(
            **scores
        )
    )
    for folder, objects in tests.items():
        constant = float((torch.cat([e for _, e in objects]) - estimator.bias).abs().mean())
        print(
            f"{folder}, free views: {mean_error(estimator, objects):.2f} degrees off; the mean elevation {constant:.2f}"
        )
    estimator.save(args.weights)
    print(f"wrote {estimator_path(args.weights)}")


if __name__ == "__main__":
    sys.exit(main())
