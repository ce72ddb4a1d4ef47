"""Fit a checkpoint's estimator of elevations (`data/elevation.py`) on datasets.

    python tools/fit_elevation.py --weights data/checkpoints/tiny \\
        --data ../shared/objects/train data/cache/orbits

It is ridge regression in closed form, and writes `elevation/elevation.safetensors`, a
few kB, into the checkpoint folder.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from gsv3d_lib.data.dataset import RING, ViewTensors, load_views
from gsv3d_lib.data.elevation import SIZE, Elevation, both_sides, estimator_path
from gsv3d_lib.system.command import check_writable, exit_code, input_path
from gsv3d_lib.system.errors import MissingFile, UserError
from gsv3d_lib.system.paths import from_repository

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the squared weights, per example
# Of a ring, beside all free views: more would only say its one elevation again.
RING_VIEWS = (0, 5, 10)

# Of one object: features [V', 2, 576] of some of its views, their elevations [V'].
Examples = tuple[Tensor, Tensor]


def fit_ridge(features: Tensor, elevations: Tensor, penalty: float) -> Elevation:
    """Ridge regression of elevations [E] on features [E, D].

    It minimises mean squared error + penalty |weights|^2, the weights being those of
    features scaled to unit deviation.
    """
    mean, deviation, bias = features.mean(0), features.std(0) + 1e-3, elevations.mean()
    scaled = ((features - mean) / deviation).double()
    normal = scaled.T @ scaled / len(scaled) + penalty * torch.eye(scaled.shape[1])
    weights = torch.linalg.solve(normal, scaled.T @ (elevations - bias).double() / len(scaled))
    return Elevation((weights.float() / deviation).contiguous(), mean, bias)


def view_features(views: ViewTensors, ring: tuple[int, ...] = RING_VIEWS) -> list[Examples]:
    """Per object: its free views and some of its ring, those that show something."""
    chosen = [*ring, *range(RING, views.rgb.shape[1])]
    objects = []
    for rgb, alpha, elevations in zip(views.rgb, views.alpha, views.elevations, strict=True):
        there = [k for k in chosen if (alpha[k] > 127).float().mean() > 0.005]
        if there:
            objects.append((both_sides(rgb[there].float() / 255), elevations[there]))
    return objects


def fit(views: ViewTensors) -> tuple[Elevation, dict[str, float]]:
    """The estimator, and what its kind scored on objects that were held out.

    The penalty is chosen on every sixth object; then all objects are fitted.
    """
    objects = view_features(views)
    held = objects[::6]
    kept = [item for k, item in enumerate(objects) if k % 6]
    if not held or not kept:
        raise UserError(
            "An estimator needs some objects to learn from and some to be tried on; "
            f"got {len(objects)}."
        )
    tried = {penalty: fit_ridge(*_stacked(kept), penalty) for penalty in PENALTIES}
    errors = {penalty: mean_error(estimator, held) for penalty, estimator in tried.items()}
    best = min(errors, key=errors.get)
    constant = constant_error(_stacked(kept)[1].mean(), held)
    scores = {"penalty": best, "error": errors[best], "constant": constant}
    return fit_ridge(*_stacked(objects), best), scores


def mean_error(estimator: Elevation, objects: list[Examples]) -> float:
    """Mean absolute error in degrees."""
    features, elevations = _joined(objects)
    return float((estimator.from_features(features) - elevations).abs().mean())


def constant_error(answer: Tensor, objects: list[Examples]) -> float:
    """The same of one answer for all pictures."""
    return float((_joined(objects)[1] - answer).abs().mean())


def _joined(objects: list[Examples]) -> Examples:
    """The pictures of all objects: [P, 2, 576], [P]."""
    features, elevations = (torch.cat(column) for column in zip(*objects, strict=True))
    return features, elevations


def _stacked(objects: list[Examples]) -> Examples:
    """Every picture and its mirror image as an example: [E, 576], [E]."""
    features, elevations = _joined(objects)
    return features.flatten(0, 1), elevations.repeat_interleave(2)


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/fit_elevation.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, folders = parser.add_argument, dict(nargs="+", type=input_path)
    shipped = "data/checkpoints/tiny"
    add("--weights", type=input_path, default=shipped, help="checkpoint folder to write into")
    add("--data", required=True, help="dataset folders to learn from", **folders)
    add("--test", default=[], help="dataset folders to be measured on", **folders)
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    if not (args.weights / "gsv3d.json").is_file():
        raise MissingFile(
            f"{args.weights} is no GSV3D checkpoint: gsv3d.json is missing."
            f"{from_repository(args.weights)}"
        )
    check_writable(estimator_path(args.weights))
    tests = {folder: view_features(load_views([folder], SIZE), ring=()) for folder in args.test}
    for folder, objects in tests.items():
        if not objects:
            raise UserError(
                f"{folder} cannot be measured on: its objects have no views "
                f"beside the {RING} of the ring."
            )
    estimator, scores = fit(load_views(args.data, SIZE))
    answers = "{error:.2f} degrees off; the mean elevation {constant:.2f}"
    print(f"held-out objects: {answers}; penalty {{penalty:g}}".format(**scores))
    for folder, objects in tests.items():
        error = mean_error(estimator, objects)
        constant = constant_error(estimator.bias, objects)
        print(f"{folder}, free views: {answers.format(error=error, constant=constant)}")
    estimator.save(args.weights)
    print(f"wrote {estimator_path(args.weights)}")


if __name__ == "__main__":
    sys.exit(main())
