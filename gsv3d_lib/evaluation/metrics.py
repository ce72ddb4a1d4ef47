"""How far a result is from the truth: in pictures, and in shape.

The paper names its metrics but not their formulas, so each is stated here; numbers
compare only between runs that use the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import trimesh

NUM_POINTS = 4096  # per surface, as in the paper
GRID_RESOLUTION = 64
F_SCORE_THRESHOLD = 0.05

Array = np.ndarray | Tensor


# ---------------------------------------------------------------- pictures


def psnr(predicted: Array, truth: Array) -> float:
    """Peak signal-to-noise ratio in dB, the mean over the images.

    Of one image it is -10 log10(mean squared error); infinite where equal.
    predicted, truth: [..., H, W, 3] in [0, 1], the whole frame with its background.
    """
    a, b = _image_batches(predicted, truth)
    error = ((a - b) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.mean(-10 * np.log10(error)))


def ssim(predicted: Array, truth: Array) -> float:
    """Structural similarity, the mean over the images.

    Wang et al. 2004 with their Gaussian window: 11 x 11 pixels, sigma 1.5, population
    covariance, data range 1, the mean over the three channels. scikit-image's own
    defaults are another, box-shaped window.
    predicted, truth: [..., H, W, 3] in [0, 1], at least 11 pixels a side.
    """
    from skimage.metrics import structural_similarity

    a, b = _image_batches(predicted, truth)
    if min(a.shape[1:3]) < 11:
        size = f"{a.shape[1]} x {a.shape[2]}"
        raise ValueError(f"SSIM's window is 11 pixels wide, got images of {size} pixels.")
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    window |= {"channel_axis": -1, "data_range": 1.0}
    return float(np.mean([structural_similarity(x, y, **window) for x, y in zip(a, b)]))


def depth_l1(predicted: Array, truth: Array, missing: float = 1.0) -> float:
    """Mean |z - z_true| over the pixels where the truth has a surface; NaN without.

    A pixel in which the prediction has no surface costs `missing` (the object's
    radius), so that predicting nothing does not pay.
    predicted, truth: z-depth [..., H, W] or [..., H, W, 1], 0 = no surface, in world
        units.
    """
    a, b = _as_numpy(predicted), _as_numpy(truth)
    if a.shape != b.shape:
        raise ValueError(f"Depths to compare need one shape, got {a.shape} and {b.shape}.")
    foreground = b > 0
    if not foreground.any():
        return float("nan")
    error = np.where(a > 0, np.abs(a - b), missing)
    return float(error[foreground].mean())


def _image_batches(predicted: Array, truth: Array) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 arrays [B, H, W, 3] from [..., H, W, 3]."""
    a, b = _as_numpy(predicted), _as_numpy(truth)
    if a.shape != b.shape or a.ndim < 3 or a.shape[-1] != 3 or a.size == 0:
        given = f"{a.shape} and {b.shape}"
        raise ValueError(f"Images to compare need one shape [..., H, W, 3], got {given}.")
    return a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:])


def _as_numpy(array: Array) -> np.ndarray:
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    return array.astype(np.float64)


# ---------------------------------------------------------------- shapes


def surface_points(mesh: trimesh.Trimesh, count: int = NUM_POINTS, seed: int = 0) -> np.ndarray:
    """Points [count, 3], evenly at random on the mesh's surface, by the seed."""
    import trimesh

    if len(mesh.faces) == 0:
        raise ValueError("A mesh without faces has no surface to sample points from.")
    return np.asarray(trimesh.sample.sample_surface(mesh, count, seed=seed)[0])


def chamfer_distance(predicted: Array, truth: Array) -> float:
    """CD = 1/2 (mean over p of min over q |p - q| + mean over q of min over p |q - p|).

    p are predicted points, q true ones. Distances, not their squares; averaged, not
    summed (papers that sum the two directions print twice this number). World units:
    the object's radius is 1. Two samples of one surface do not reach 0: 4,096 points
    each on the unit sphere give about 0.028.
    predicted, truth: points [N, 3] and [M, 3]; 4,096 each in this project.
    """
    forward, backward = _nearest_distances(predicted, truth)
    return float((forward.mean() + backward.mean()) / 2)


def f_score(predicted: Array, truth: Array, threshold: float = F_SCORE_THRESHOLD) -> float:
    """Harmonic mean of precision and recall.

    Precision is the share of predicted points within `threshold` of the truth, recall
    the reverse. 0.05 is 2.5 % of the object's diameter and lies above the spacing of
    4,096 points on a unit sphere (about 0.03); less would measure the sampling.
    predicted, truth: points [N, 3] and [M, 3].
    """
    forward, backward = _nearest_distances(predicted, truth)
    precision, recall = (forward <= threshold).mean(), (backward <= threshold).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def _nearest_distances(predicted: Array, truth: Array) -> tuple[np.ndarray, np.ndarray]:
    from scipy.spatial import cKDTree

    a, b = _as_numpy(predicted), _as_numpy(truth)
    for points in (a, b):
        is_set = points.ndim == 2 and points.shape[1] == 3 and len(points) > 0
        if not is_set or not np.isfinite(points).all():
            given = f"{a.shape} and {b.shape}"
            raise ValueError(f"Points must be finite and [N, 3] with N >= 1, got shapes {given}.")
    return cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]


def volume_iou(predicted: Array, truth: Array) -> float:
    """|A and B| / |A or B| of two grids of `occupancy_grid`; 1 when both are empty."""
    a, b = _as_numpy(predicted) > 0.5, _as_numpy(truth) > 0.5
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"Occupancy grids need one shape [R, R, R], got {a.shape} and {b.shape}.")
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def occupancy_grid(mesh: trimesh.Trimesh, resolution: int = GRID_RESOLUTION) -> np.ndarray:
    """bool [R, R, R], axes x, y, z over [-1, 1]^3: is the centre of a cell inside?

    Cell i has its centre at (i + 0.5) / R * 2 - 1. It is inside when the winding number
    along at least two of the three axis directions says so, which survives overlapping
    parts and small holes. The faces must be oriented outwards; thin open sheets have no
    inside.
    """
    votes = sum(_inside_along(mesh, axis, resolution).astype(int) for axis in range(3))
    return votes >= 2


def _inside_along(mesh: trimesh.Trimesh, axis: int, resolution: int) -> np.ndarray:
    """By one ray per column along `axis`, which counts surfaces: bool [R, R, R]."""
    centres = (np.arange(resolution) + 0.5) / resolution * 2 - 1
    others = [i for i in range(3) if i != axis]
    # A ray through an edge of an axis-aligned face would hit it twice or never: step
    # aside by a hair.
    origins = np.full((resolution, resolution, 3), -4.0)
    origins[..., others[0]] = centres[:, None] + 1.1e-5
    origins[..., others[1]] = centres[None, :] + 1.7e-5
    directions = np.zeros((resolution**2, 3))
    directions[:, axis] = 1.0
    faces, rays, points = mesh.ray.intersects_id(
        origins.reshape(-1, 3), directions, multiple_hits=True, return_locations=True
    )
    crossings = np.zeros((resolution**2, resolution + 1))
    if len(faces):
        # the first centre behind the surface
        first_cell = np.searchsorted(centres, points[:, axis])
        np.add.at(crossings, (rays, first_cell), -np.sign(mesh.face_normals[faces, axis]))
    winding = crossings.cumsum(axis=1)[:, :-1].reshape(resolution, resolution, resolution)
    return np.moveaxis(winding > 0.5, -1, axis)


# ---------------------------------------------------------------- comparisons


def bootstrap_interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the mean over resamplings of the objects.

    For two methods, pass their differences object by object: the paired interval (Efron
    1979). Values that are not finite are left out; (nan, nan) where none is left.
    values: one per object, [O].
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
