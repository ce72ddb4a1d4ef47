"""Photographs of one object with known cameras -> one object of a dataset folder, in
the layout of `data/dataset.py`.

    python -m gsv3d_lib photos FOLDER --out data/cache/mine [--id NAME] [--size 128]

FOLDER holds `transforms.json`, as NeRF's Blender scenes and nerfstudio write it: per
frame `file_path` and `transform_matrix` (camera to world, OpenGL camera axes), and a
pinhole lens, `camera_angle_x` or `fl_x` with `fl_y`, `cx`, `cy`, `w`, `h`, for all
frames or per frame. nerfstudio's `mask_path` is used where given; lens distortion is
refused.

Every photograph is cut out and warped into the standard camera of this project. A
camera that only turns or zooms sees the same rays, so that is a homography and exact.
What remains of the real camera is its distance: it stands where it stood, while the
dataset says 3.509 radii for all. The lens makes up for the size, not for the
perspective (`displacement`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..cameras import DISTANCE, intrinsics, look_at, opengl_to_opencv, orbit_cameras
from ..images import MAX_SIDE, cut_out, load_image
from ..system.command import (
    check_writable,
    command_parser,
    exit_code,
    input_path,
    number,
    output_path,
    pixels,
    whole,
)
from ..system.errors import Doubt, MissingFile, UserError
from ..system.files import UNREADABLE, read_json
from ..system.paths import named_file, plain_id, reason, remove_leftovers, resolve
from .dataset import FRONT, MAX_GAP, RING, ObjectViews, check_size, write_index, write_object
from .make_dataset import RANDOM_VIEWS, check_alike, existing_rows

# of a camera from the origin, in whatever units: beyond, nothing is left of the
# object's own size
FARTHEST = 1e9
# the visual hull's cube: half its side, in first guesses of the radius, and cells a
# side
EXTENT, GRID = 1.3, 64
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
PINHOLE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")


@dataclass
class Photo:
    """One cut-out photograph, cropped to its object.

    rgba: uint8 [h, w, 4], straight alpha.  K: [3, 3] in pixels of the crop.  c2w: [4, 4], OpenCV axes. Both float64.
    """

    name: str
    rgba: np.ndarray
    K: Tensor
    c2w: Tensor

    @property
    def position(self) -> Tensor:
        return self.c2w[:3, 3]

    def rays(self, pixels: Tensor) -> Tensor:
        """Unit directions [P, 3] in the world through pixels [P, 2], (u, v)."""
        return F.normalize(
            _homogeneous(pixels) @ torch.linalg.inv(self.K).T @ self.c2w[:3, :3].T, dim=-1
        )


# ---------------------------------------------------------------- reading


def read_photos(
    source: str | Path, max_side: int = 512, background: str = "auto"
) -> tuple[list[Photo], list[str]]:
    """The photographs that a folder's transforms.json (or another JSON of that kind)
    names, and why others were left out.

    max_side: of the crops, in pixels.  background: how objects are cut out, see `images.cut_out`.
    Raises FileNotFoundError or ValueError, in one sentence, where the file or a camera
    in it is unusable.
    """
    path = Path(source) / "transforms.json" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise MissingFile(
            f"There is no {path}: photographs need their cameras, in a transforms.json beside them."
        )
    try:
        scene = read_json(path)
        # a frame's own lens wins over the common one
        frames = [{**scene, **frame} for frame in scene["frames"]]
    except UNREADABLE as error:
        raise UserError(
            f"{path} is no transforms.json with a list of frames ({reason(error)})."
        ) from error
    photos, left_out = [], []
    for frame in frames:
        try:
            photos.append(_read_photo(path.parent, frame, max_side, background))
        except LeftOut as why:
            left_out.append(str(why))
    return photos, left_out


class LeftOut(ValueError):
    """A photograph that shows no usable object. The others may."""


def _read_photo(folder: Path, frame: dict, max_side: int, background: str) -> Photo:
    name = frame.get("file_path")
    if not isinstance(name, str):
        raise UserError(
            f"Every frame of transforms.json names its photograph as file_path; one has {name!r}."
        )
    image = load_image(_with_suffix(_photo_path(folder, name)))
    K, c2w = frame_intrinsics(frame, *image.size), _pose(frame)
    mask = _photo_path(folder, frame["mask_path"]) if frame.get("mask_path") else None
    try:
        rgba = np.array(_masked(image, mask, background, name))
    except ValueError as error:
        raise LeftOut(f"{name}: {error}") from error
    return _cropped(Photo(name, rgba, K, c2w), max_side)


def _photo_path(folder: Path, name) -> Path:
    """Where a picture lies that a transforms.json in `folder` names: there, or in a
    folder beside it.
    """
    try:
        return named_file(folder, name)
    except (UserError, TypeError) as error:
        raise UserError(
            f"transforms.json names {str(name)[:200]!r}, which is no file in its folder or one beside it: "
            "copy the photographs there."
        ) from error


def _with_suffix(path: Path) -> Path:
    """NeRF's Blender scenes name pictures without their suffix."""
    candidates = [
        path,
        *(path.with_name(path.name + suffix) for suffix in (".png", ".jpg", ".jpeg", ".webp")),
    ]
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def _masked(image: Image.Image, mask: Path | None, background: str, name: str) -> Image.Image:
    """The picture with the object in its alpha channel."""
    if mask is not None:
        image.putalpha(load_image(mask).convert("L").resize(image.size, Image.Resampling.BILINEAR))
        return image
    with warnings.catch_warnings():
        # of every photograph
        warnings.filterwarnings("ignore", message=".* removed by colour", category=Doubt)
        return cut_out(image, background, name)


def frame_intrinsics(frame: dict, width: int, height: int) -> Tensor:
    """K [3, 3], float64, of a frame whose picture has width x height pixels. Raises
    ValueError for what is no pinhole.

    A lens that was given for another size (a smaller copy of the pictures) is scaled to
    this one.
    """
    name = frame.get("file_path")
    model = frame.get("camera_model", "PINHOLE")
    distorted = [key for key in DISTORTION if frame.get(key)]
    if distorted or model not in PINHOLE:
        what = f"{distorted[0]} = {frame[distorted[0]]}" if distorted else f"camera_model {model}"
        raise UserError(
            f"{name} has a lens with distortion ({what}): undistort the photographs first."
        )
    # `load_image` may have shrunk it
    if "fl_x" in frame and "w" not in frame and max(width, height) == MAX_SIDE:
        raise UserError(
            f"{name} is a large picture: transforms.json says with w and h for which size its fl_x is meant."
        )
    try:
        w, h = float(frame.get("w", width)), float(frame.get("h", height))
        fx = (
            float(frame["fl_x"])
            if "fl_x" in frame
            else w / 2 / np.tan(float(frame["camera_angle_x"]) / 2)
        )
        fy, cx, cy = (
            float(frame.get(key, value))
            for key, value in (("fl_y", fx), ("cx", w / 2), ("cy", h / 2))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} has no lens: transforms.json gives camera_angle_x or fl_x, in numbers."
        ) from error
    if not (np.isfinite([fx, fy, cx, cy, w, h]).all() and min(fx, fy, w, h) > 0):
        raise UserError(
            f"{name} has an impossible lens: fl_x {fx:g}, fl_y {fy:g}, {w:g} x {h:g} pixels."
        )
    if abs(width / w * h / height - 1) > 0.02:
        raise UserError(
            f"{name} has {width} x {height} pixels, but its lens is given for {w:g} x {h:g}."
        )
    K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    return K * torch.tensor([[width / w], [height / h], [1.0]], dtype=torch.float64)


def _pose(frame: dict) -> Tensor:
    """transform_matrix -> c2w [4, 4] with OpenCV axes, float64."""
    try:
        matrix = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        # some writers leave the last row out
        matrix = torch.cat([matrix[:3], matrix.new_tensor([[0, 0, 0, 1]])])
        rotation = matrix[:3, :3]
        error = (rotation @ rotation.T - torch.eye(3)).abs().max() + (
            torch.linalg.det(rotation) - 1
        ).abs()
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as why:
        raise UserError(f"{frame['file_path']} has no transform_matrix of 4 x 4 numbers.") from why
    if not (error < 1e-2 and matrix.isfinite().all() and matrix.abs().max() < FARTHEST):
        raise UserError(
            f"The transform_matrix of {frame['file_path']} is no camera pose: it does not only turn and move."
        )
    return opengl_to_opencv(matrix)


def _cropped(photo: Photo, max_side: int) -> Photo:
    """The photograph cut down to its object and, where larger, to `max_side` pixels: K
    moves and scales with it, exactly.
    """
    alpha = photo.rgba[..., 3] > 127
    if not alpha.any():
        raise LeftOut(f"{photo.name}: it shows no object.")
    if any(edge.any() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])):
        raise LeftOut(f"{photo.name}: its frame cuts the object off.")
    rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
    top, left = rows[0] - 1, columns[0] - 1  # one more pixel on all sides: soft edges
    crop = Image.fromarray(photo.rgba[top : rows[-1] + 2, left : columns[-1] + 2], "RGBA")
    scale = min(1, max_side / max(crop.size))
    small = crop.resize([max(1, round(scale * side)) for side in crop.size], Image.Resampling.BOX)
    shift = torch.tensor([[0, 0, left], [0, 0, top], [0, 0, 0]], dtype=torch.float64)
    factor = torch.tensor(
        [[small.width / crop.width], [small.height / crop.height], [1]], dtype=torch.float64
    )
    return dataclasses.replace(photo, rgba=np.array(small), K=(photo.K - shift) * factor)


# ---------------------------------------------------------------- the world of the object


@dataclass
class World:
    """Where the object is in the world of the cameras: centre [3], radius, and the
    rotation [3, 3] that puts z up.
    """

    center: Tensor
    radius: float
    turn: Tensor

    def positions(self, photos: list[Photo]) -> Tensor:
        """Camera centres [P, 3] in units of the object: centred, radius 1, z up."""
        return (torch.stack([p.position for p in photos]) - self.center) @ self.turn.T / self.radius


def upright(photos: list[Photo]) -> Tensor:
    """The rotation [3, 3] to a world whose z axis is up, from cameras that were held
    level, whichever way they looked.

    Up is then the direction that is at right angles to the x axes of all cameras: the
    least singular vector.
    """
    right, up = (
        torch.stack([sign * p.c2w[:3, axis] for p in photos]) for axis, sign in ((0, 1), (1, -1))
    )
    z = torch.linalg.svd(right).Vh[-1]
    z = z * torch.sign(up.mean(0) @ z)
    x = F.normalize(right[0] - right[0] @ z * z, dim=0)
    return torch.stack([x, torch.linalg.cross(z, x), z])


def nearest_point(origins: Tensor, directions: Tensor) -> Tensor:
    """The point [3] nearest to lines with origins and unit directions [P, 3]: least
    squares of the distances.
    """
    # [P, 3, 3]
    across = torch.eye(3, dtype=origins.dtype) - directions[:, :, None] * directions[:, None]
    return torch.linalg.lstsq(across.sum(0), (across @ origins[..., None]).sum(0)).solution[:, 0]


def find_world(photos: list[Photo], turn: Tensor) -> World:
    """Centre and radius of the object from its silhouettes: those of their visual hull,
    by the rule that meshes follow.

    The rays through the middles of the silhouettes give a first centre, their half
    widths a first radius; from a cube around them the points are kept that lie inside
    all silhouettes but the few that a bad cut-out may spoil.
    """
    middles = torch.cat(
        [
            p.rays(torch.tensor([[p.rgba.shape[1] / 2, p.rgba.shape[0] / 2]]).double())
            for p in photos
        ]
    )
    center = nearest_point(torch.stack([p.position for p in photos]), middles)
    radius = max(_half_width(p, center) for p in photos)
    axis = torch.linspace(-EXTENT * radius, EXTENT * radius, GRID, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis, axis) @ turn + center  # the grid stands upright
    inside = sum(silhouette(p, points).int() for p in photos) >= 0.9 * len(photos)
    if not inside.any():
        raise UserError(
            "The silhouettes of the photographs do not meet in one object: check cameras and cut-outs."
        )
    hull = points[inside] @ turn.T
    middle = (hull.amin(0) + hull.amax(0)) / 2
    return World(middle @ turn, float((hull - middle).norm(dim=-1).max()), turn)


def _half_width(photo: Photo, center: Tensor) -> float:
    """Radius of the ball at `center` that reaches to the farthest edge of the
    silhouette.
    """
    rows, columns = np.nonzero(photo.rgba[..., 3] > 127)
    rays = photo.rays(torch.from_numpy(np.stack([columns, rows], axis=-1) + 0.5))
    to_center = center - photo.position
    return float(torch.linalg.cross(rays, to_center.expand_as(rays)).norm(dim=-1).max())


def silhouette(photo: Photo, points: Tensor) -> Tensor:
    """Which of the world points [P, 3] a photograph shows as object, bool [P]."""
    local = (points - photo.position) @ photo.c2w[:3, :3]
    u, v, z = (local @ photo.K.T).unbind(-1)
    height, width = photo.rgba.shape[:2]
    column, row = (u / z).nan_to_num(-1).floor().long(), (v / z).nan_to_num(-1).floor().long()
    seen = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    alpha = torch.from_numpy(photo.rgba[..., 3] > 127)
    return seen & alpha[row.clamp(0, height - 1), column.clamp(0, width - 1)]


# ---------------------------------------------------------------- the standard camera


def standard_intrinsics(distance: float, size: int) -> Tensor:
    """K [3, 3] of a lens through which the unit ball, seen from `distance`, looks as
    large as the dataset's from 3.509.
    """
    # the ball's outline has radius f / sqrt(d^2 - 1)
    zoom = ((distance**2 - 1) / (DISTANCE**2 - 1)) ** 0.5
    K = intrinsics(size).double()
    K[:2, :2] *= zoom
    return K


def warp(photo: Photo, rotation: Tensor, K: Tensor, size: int, samples: int = 4) -> np.ndarray:
    """The photograph as a camera in the same place sees it that is turned and zoomed:
    uint8 [size, size, 4].

    rotation: [3, 3], world to camera.  K: [3, 3].  samples: per pixel and axis, which are averaged.
    """
    grid = (torch.arange(size * samples, dtype=torch.float64) + 0.5) / samples
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    # pixels here -> pixels there
    homography = photo.K @ photo.c2w[:3, :3].T @ rotation.T @ torch.linalg.inv(K)
    x, y, z = (_homogeneous(torch.stack([u, v], dim=-1)) @ homography.T).unbind(-1)
    height, width = photo.rgba.shape[:2]
    # pixel centres at +0.5
    places = torch.stack([2 * x / z / width - 1, 2 * y / z / height - 1], dim=-1)
    places = torch.where(z[..., None] > 0, places, 9.0)  # what is behind the camera is outside
    rgba = torch.from_numpy(photo.rgba).float() / 255
    rgba[..., :3] *= rgba[..., 3:]  # premultiplied: invisible colours must not bleed in
    fine = F.grid_sample(rgba.movedim(-1, 0)[None], places[None].float(), align_corners=False)
    rgba = F.avg_pool2d(fine, samples)[0].movedim(0, -1)
    rgba[..., :3] /= rgba[..., 3:].clamp(min=1e-6)
    return (rgba * 255).round().to(torch.uint8).numpy()


def displacement(distance: float) -> float:
    """How far perspective from `distance` radii, not 3.509, moves a point of the object
    at most: a share of the frame.

    Both lenses show the ball equally large, so this is 0 on its outline and in the
    middle, and most between.
    """
    angle = torch.linspace(0, torch.pi, 721, dtype=torch.float64)
    here, there = (
        angle.sin() / (d - angle.cos()) * (d**2 - 1) ** 0.5 for d in (distance, DISTANCE)
    )
    seen = angle.cos() * min(distance, DISTANCE) >= 1  # by both cameras
    focal = float(intrinsics(1)[0, 0]) / (DISTANCE**2 - 1) ** 0.5
    return float(focal * (here - there)[seen].abs().max())


# ---------------------------------------------------------------- the object


def ring_and_free(
    azimuths: np.ndarray, elevations: np.ndarray, views: int, front: int | None = None
) -> np.ndarray:
    """Which photographs [P] become the views of the object, [views]: 16 for the ring,
    then the free ones.

    Ring view k gets the photograph that is nearest to azimuth 22.5 k and to the median
    elevation, all 16 chosen together; view 12 gets photograph `front`, if given, at any
    elevation. Of the other photographs those that fit are taken evenly; where there are
    too few, they and then the ring are repeated.
    Raises ValueError where there are fewer than 16, or where they do not go around the
    object.
    """
    if len(azimuths) < RING:
        raise UserError(f"A ring takes {RING} photographs; {len(azimuths)} can be used.")
    # [16, P]
    gaps = np.abs((azimuths[None] - np.arange(RING)[:, None] * 360 / RING + 180) % 360 - 180)
    costs = gaps**2 + (elevations - np.median(elevations))[None] ** 2
    if front is not None:
        costs[FRONT, front] = -1e9
    ring = linear_sum_assignment(costs)[1]
    worst = int(gaps[np.arange(RING), ring].argmax())
    if gaps[worst, ring[worst]] > MAX_GAP:
        raise UserError(
            f"The photographs do not go around the object: at azimuth {worst * 360 / RING:g} degrees the nearest is "
            f"{gaps[worst, ring[worst]]:.0f} degrees away, more than {MAX_GAP:g}."
        )
    rest, free = np.setdiff1d(np.arange(len(azimuths)), ring), views - RING
    if len(rest) >= free:
        return np.concatenate([ring, rest[np.linspace(0, len(rest) - 1, free).round().astype(int)]])
    # of the ring, so that the repeated ones lie far apart
    spread = np.argsort(np.arange(RING) * 5 % RING)
    return np.concatenate([ring, np.resize(np.concatenate([rest, ring[spread]]), free)])


def object_from(
    photos: list[Photo],
    id: str,
    size: int = 128,
    views: int = RING + RANDOM_VIEWS,
    world: World | None = None,
    front: str | None = None,
) -> tuple[ObjectViews, dict]:
    """Photographs -> (views of one object, its row of the index). Depth is not known: 0
    everywhere.

    world: None finds it from the silhouettes.  front: name of the photograph that shows the front, azimuth 270 degrees.
    """
    world = world or find_world(photos, torch.eye(3, dtype=torch.float64))
    positions = world.positions(photos)
    distances = positions.norm(dim=-1)
    if distances.min() <= 1.01:
        raise UserError(
            f"The camera of {photos[int(distances.argmin())].name} stands inside the object's unit ball."
        )
    azimuths = torch.rad2deg(torch.atan2(positions[:, 1], positions[:, 0])).numpy()
    elevations = torch.rad2deg(torch.asin(positions[:, 2] / distances)).numpy()
    first = _index_of(front, photos) if front else None
    azimuths = (azimuths if first is None else azimuths + 270 - azimuths[first]) % 360
    chosen = ring_and_free(azimuths, elevations, views, first)
    rotations = look_at(positions[chosen])[:, :3, :3] @ world.turn
    lenses = [standard_intrinsics(float(distances[k]), size) for k in chosen]
    rgba = np.stack(
        [warp(photos[k], R, K, size) for k, R, K in zip(chosen, rotations, lenses, strict=True)]
    )
    angles = azimuths[chosen].astype("f4"), elevations[chosen].astype("f4")
    cameras = orbit_cameras(*(torch.from_numpy(a) for a in angles), size)
    pictures = ObjectViews(id, rgba, np.zeros(rgba.shape[:3], "f4"), cameras, *angles)
    facts = {
        "distances": [
            round(float(d), 3) for d in (distances[chosen].min(), distances[chosen].max())
        ]
    }
    facts |= {"photographs": len(photos), "repeated": views - len(set(chosen.tolist()))}
    row = {"id": id, "source": "photographs", "views": views, "size": size, **facts}
    return pictures, row | {"coverage": round(float(rgba[..., 3].mean() / 255), 4)}


def _index_of(name: str, photos: list[Photo]) -> int:
    names = [Path(p.name).stem for p in photos]
    if Path(name).stem not in names:
        raise UserError(f"There is no photograph {name}; there are {', '.join(names[:3])}, ...")
    return names.index(Path(name).stem)


def add_object(folder: str | Path, pictures: ObjectViews, row: dict) -> None:
    """Write the object into a dataset folder, new or not; one of the same id is
    replaced.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    rows = {other["id"]: other for other in existing_rows(folder)}
    check_alike(folder, rows.values(), row["views"], row["size"])
    write_object(folder, pictures)
    rows[row["id"]] = row
    write_index(folder, [rows[id] for id in sorted(rows)])


def _homogeneous(pixels: Tensor) -> Tensor:
    """[..., 2] -> [..., 3]"""
    return torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = command_parser("photos", __doc__)
    parser.add_argument("folder", type=input_path, help="with transforms.json, or such a file")
    parser.add_argument(
        "--out", type=output_path, required=True, help="the dataset folder; it may exist already"
    )
    parser.add_argument("--id", help="of the object (default: the folder's name)")
    parser.add_argument("--size", type=pixels, default=128, help="pixels per side (default 128)")
    parser.add_argument(
        "--views",
        type=whole(RING, 1000),
        default=RING + RANDOM_VIEWS,
        help="per object, 16 of them on the ring",
    )
    parser.add_argument(
        "--up", choices=["z", "auto"], default="z", help="auto: from cameras that were held level"
    )
    parser.add_argument(
        "--front", metavar="NAME", help="the photograph that shows the front; it becomes view 12"
    )
    parser.add_argument(
        "--center",
        nargs=3,
        type=number(-1e9, 1e9),
        metavar=("X", "Y", "Z"),
        help="of the object, in the file's world",
    )
    parser.add_argument(
        "--radius",
        type=number(-1e9, 1e9),
        help="of the object, with --center (default for both: the silhouettes')",
    )
    parser.add_argument(
        "--background",
        choices=["auto", "rembg", "plain"],
        default="auto",
        help="see images.cut_out",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    if (args.center is None) != (args.radius is None) or args.views < RING or args.size < 8:
        raise UserError(
            f"Give --center and --radius together, {RING} views or more and 8 pixels or more."
        )
    check_size(args.views, args.size)
    if args.radius is not None and not 0 < args.radius < FARTHEST:
        raise UserError(f"--radius is the object's, above 0; got {args.radius:g}.")
    if args.center is not None and not np.isfinite(args.center).all():
        raise UserError(f"--center is a place; got {args.center}.")
    check_writable(args.out / "index.json")
    source = resolve(args.folder)
    photos, left_out = read_photos(source, 4 * args.size, args.background)
    for why in left_out:
        print(f"left out {why}")
    if len(photos) < RING:
        raise UserError(
            f"A ring takes {RING} photographs; {len(photos)} of {args.folder} can be used."
        )
    turn = upright(photos) if args.up == "auto" else torch.eye(3, dtype=torch.float64)
    given = args.center and World(torch.tensor(args.center, dtype=torch.float64), args.radius, turn)
    id = plain_id(args.id or (source if source.is_dir() else source.parent).resolve().name)
    pictures, row = object_from(
        photos, id, args.size, args.views, given or find_world(photos, turn), args.front
    )
    add_object(args.out, pictures, row)
    print(summary(pictures, row))
    print(f"{id}.webp shows the cut-outs: look at them.")


def summary(pictures: ObjectViews, row: dict) -> str:
    """What became of the photographs, in three lines."""
    ring = np.arange(RING) * 360 / RING
    gap = np.abs((pictures.azimuths[:RING] - ring + 180) % 360 - 180).max()
    low, high = pictures.elevations[:RING].min(), pictures.elevations[:RING].max()
    near, far = row["distances"]
    moved = 100 * max(displacement(near), displacement(far))
    return (
        f"{row['id']}: {row['photographs']} photographs, {row['repeated']} of {row['views']} views repeated\n"
        f"ring: at most {gap:.1f} degrees from regular, elevations {low:.1f} to {high:.1f} degrees\n"
        f"cameras at {near:.2f} to {far:.2f} radii, taken as {DISTANCE}: perspective off by up to {moved:.1f} % of the frame"
    )


if __name__ == "__main__":
    sys.exit(main())
