"""Photographs of one object with known cameras -> one object of a dataset folder.

    python tools/photos.py FOLDER --out data/cache/mine [--id NAME] [--size 128]

FOLDER holds `transforms.json`, as NeRF's Blender scenes and nerfstudio write it: per
frame `file_path` and `transform_matrix` (camera to world, OpenGL camera axes), and a
pinhole lens, `camera_angle_x` or `fl_x` with `fl_y`, `cx`, `cy`, `w`, `h`, for all
frames or per frame. nerfstudio's `mask_path` is used where given; lens distortion is
refused. The layout of the dataset is that of `data/dataset.py`.

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

from gsv3d_lib.cameras import DISTANCE, intrinsics, look_at, opengl_to_opencv, orbit_cameras
from gsv3d_lib.data import dataset
from gsv3d_lib.data.dataset import FRONT, MAX_GAP, RING, ObjectViews
from gsv3d_lib.data.make_dataset import RANDOM_VIEWS, check_alike, existing_rows
from gsv3d_lib.images import MAX_SIDE, cut_out, load_image
from gsv3d_lib.system import command
from gsv3d_lib.system.errors import Doubt, MissingFile, UserError
from gsv3d_lib.system.files import UNREADABLE, read_json
from gsv3d_lib.system.paths import named_file, plain_id, reason, remove_leftovers, resolve

# Of a camera from the origin, in whatever units: beyond, float64 leaves nothing of the
# object's own size.
FARTHEST = 1e9
EXTENT = 1.3  # half the side of the visual hull's cube, in first guesses of the radius
GRID = 64  # cells a side of that cube
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
PINHOLE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")


@dataclass
class Photo:
    """One cut-out photograph, cropped to its object."""

    name: str
    rgba: np.ndarray  # uint8 [h, w, 4], straight alpha
    K: Tensor  # float64 [3, 3], in pixels of the crop
    c2w: Tensor  # float64 [4, 4], OpenCV axes

    @property
    def position(self) -> Tensor:
        return self.c2w[:3, 3]

    @property
    def middle(self) -> Tensor:
        """The pixel [1, 2] in the middle of the crop."""
        height, width = self.rgba.shape[:2]
        return torch.tensor([[width / 2, height / 2]], dtype=torch.float64)

    def rays(self, pixels: Tensor) -> Tensor:
        """Unit directions [P, 3] in the world through pixels [P, 2], (u, v)."""
        local = _homogeneous(pixels) @ torch.linalg.inv(self.K).T
        return F.normalize(local @ self.c2w[:3, :3].T, dim=-1)


# ---------------------------------------------------------------- reading


def read_photos(
    source: str | Path, max_side: int = 512, background: str = "auto"
) -> tuple[list[Photo], list[str]]:
    """The photographs that a transforms.json names, and why others were left out.

    source: its folder, or such a file.
    max_side: of the crops, in pixels.
    background: how objects are cut out, see `images.cut_out`.
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
    """A picture that a transforms.json names: in its `folder` or one beside it."""
    try:
        return named_file(folder, name)
    except (UserError, TypeError) as error:
        raise UserError(
            f"transforms.json names {str(name)[:200]!r}, which is no file in its folder "
            "or one beside it: copy the photographs there."
        ) from error


def _with_suffix(path: Path) -> Path:
    """NeRF's Blender scenes name pictures without their suffix."""
    for suffix in ("", ".png", ".jpg", ".jpeg", ".webp"):
        candidate = path.with_name(path.name + suffix)
        if candidate.is_file():
            return candidate
    return path


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
    """K [3, 3], float64, of a frame whose picture has width x height pixels.

    A lens that was given for another size (a smaller copy of the pictures) is scaled to
    this one.
    """
    name = frame.get("file_path")
    _check_pinhole(frame, name)
    # `load_image` may have shrunk it
    if "fl_x" in frame and "w" not in frame and max(width, height) == MAX_SIDE:
        raise UserError(
            f"{name} is a large picture: transforms.json says with w and h "
            "for which size its fl_x is meant."
        )
    try:
        w, h = float(frame.get("w", width)), float(frame.get("h", height))
        if "fl_x" in frame:
            fx = float(frame["fl_x"])
        else:
            fx = w / 2 / np.tan(float(frame["camera_angle_x"]) / 2)
        fy = float(frame.get("fl_y", fx))
        cx, cy = float(frame.get("cx", w / 2)), float(frame.get("cy", h / 2))
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


def _check_pinhole(frame: dict, name) -> None:
    model = frame.get("camera_model", "PINHOLE")
    distorted = [key for key in DISTORTION if frame.get(key)]
    if distorted or model not in PINHOLE:
        what = f"{distorted[0]} = {frame[distorted[0]]}" if distorted else f"camera_model {model}"
        raise UserError(
            f"{name} has a lens with distortion ({what}): undistort the photographs first."
        )


def _pose(frame: dict) -> Tensor:
    """transform_matrix -> c2w [4, 4] with OpenCV axes, float64."""
    try:
        matrix = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        # some writers leave the last row out
        matrix = torch.cat([matrix[:3], matrix.new_tensor([[0, 0, 0, 1]])])
        rotation = matrix[:3, :3]
        error = (rotation @ rotation.T - torch.eye(3)).abs().max()
        error += (torch.linalg.det(rotation) - 1).abs()
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as why:
        raise UserError(f"{frame['file_path']} has no transform_matrix of 4 x 4 numbers.") from why
    if not (error < 1e-2 and matrix.isfinite().all() and matrix.abs().max() < FARTHEST):
        raise UserError(
            f"The transform_matrix of {frame['file_path']} is no camera pose: "
            "it does not only turn and move."
        )
    return opengl_to_opencv(matrix)


def _cropped(photo: Photo, max_side: int) -> Photo:
    """The photograph cut down to its object and, where larger, to `max_side` pixels.

    K moves and scales with it, exactly.
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
    shares = [[small.width / crop.width], [small.height / crop.height], [1]]
    factor = torch.tensor(shares, dtype=torch.float64)
    return dataclasses.replace(photo, rgba=np.array(small), K=(photo.K - shift) * factor)


# ---------------------------------------------------------------- the object's world


@dataclass
class World:
    """Where the object is in the world of the cameras."""

    center: Tensor  # [3]
    radius: float
    turn: Tensor  # [3, 3], the rotation that puts z up

    def positions(self, photos: list[Photo]) -> Tensor:
        """Camera centres [P, 3] in units of the object: centred, radius 1, z up."""
        return (torch.stack([p.position for p in photos]) - self.center) @ self.turn.T / self.radius


def upright(photos: list[Photo]) -> Tensor:
    """The rotation [3, 3] to a world with z up, from cameras that were held level.

    Up is then the direction at right angles to the x axes of all cameras: the least
    singular vector.
    """
    right = torch.stack([p.c2w[:3, 0] for p in photos])
    up = -torch.stack([p.c2w[:3, 1] for p in photos])
    z = torch.linalg.svd(right).Vh[-1]
    z = z * torch.sign(up.mean(0) @ z)
    x = F.normalize(right[0] - right[0] @ z * z, dim=0)
    return torch.stack([x, torch.linalg.cross(z, x), z])


def nearest_point(origins: Tensor, directions: Tensor) -> Tensor:
    """The point [3] nearest to lines with origins and unit directions [P, 3].

    The sum of its squared distances is least.
    """
    along = directions[:, :, None] * directions[:, None]  # [P, 3, 3]
    across = torch.eye(3, dtype=origins.dtype) - along
    return torch.linalg.lstsq(across.sum(0), (across @ origins[..., None]).sum(0)).solution[:, 0]


def find_world(photos: list[Photo], turn: Tensor) -> World:
    """Centre and radius of the object: those of its silhouettes' visual hull.

    The rule is that of meshes. The rays through the middles of the silhouettes give a
    first centre, their half widths a first radius. From a cube around them the points
    are kept that lie inside nine tenths of the silhouettes: a bad cut-out may spoil a
    few.
    """
    middles = torch.cat([p.rays(p.middle) for p in photos])
    center = nearest_point(torch.stack([p.position for p in photos]), middles)
    radius = max(_half_width(p, center) for p in photos)
    axis = torch.linspace(-EXTENT * radius, EXTENT * radius, GRID, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis, axis) @ turn + center  # the grid stands upright
    inside = sum(silhouette(p, points).int() for p in photos) >= 0.9 * len(photos)
    if not inside.any():
        raise UserError(
            "The silhouettes of the photographs do not meet in one object: "
            "check cameras and cut-outs."
        )
    hull = points[inside] @ turn.T
    middle = (hull.amin(0) + hull.amax(0)) / 2
    return World(middle @ turn, float((hull - middle).norm(dim=-1).max()), turn)


def _half_width(photo: Photo, center: Tensor) -> float:
    """Radius of the ball at `center` that reaches the silhouette's farthest edge."""
    rows, columns = np.nonzero(photo.rgba[..., 3] > 127)
    rays = photo.rays(torch.from_numpy(np.stack([columns, rows], axis=-1) + 0.5))
    to_center = center - photo.position
    return float(torch.linalg.cross(rays, to_center.expand_as(rays)).norm(dim=-1).max())


def silhouette(photo: Photo, points: Tensor) -> Tensor:
    """Which of the world points [P, 3] a photograph shows as object, bool [P]."""
    local = (points - photo.position) @ photo.c2w[:3, :3]
    u, v, z = (local @ photo.K.T).unbind(-1)
    height, width = photo.rgba.shape[:2]
    column, row = ((place / z).nan_to_num(-1).floor().long() for place in (u, v))
    seen = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    alpha = torch.from_numpy(photo.rgba[..., 3] > 127)
    return seen & alpha[row.clamp(0, height - 1), column.clamp(0, width - 1)]


# ---------------------------------------------------------------- the standard camera


def standard_intrinsics(distance: float, size: int) -> Tensor:
    """K [3, 3] of the lens that makes the unit ball as large as the dataset's.

    It looks from `distance`, and the dataset's from 3.509.
    """
    # the ball's outline has radius f / sqrt(d^2 - 1)
    zoom = ((distance**2 - 1) / (DISTANCE**2 - 1)) ** 0.5
    K = intrinsics(size).double()
    K[:2, :2] *= zoom
    return K


def warp(photo: Photo, rotation: Tensor, K: Tensor, size: int, samples: int = 4) -> np.ndarray:
    """The photograph as a turned and zoomed camera sees it: uint8 [size, size, 4].

    rotation: [3, 3], world to camera.
    K: [3, 3], its lens.
    samples: per pixel and axis, which are averaged.
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
    """How far perspective from `distance` radii moves a point, as a share of the frame.

    At most, and against perspective from 3.509 radii. Both lenses show the ball equally
    large, so this is 0 on its outline and in the middle, and most between.
    """
    angle = torch.linspace(0, torch.pi, 721, dtype=torch.float64)

    def shown(d: float) -> Tensor:
        return angle.sin() / (d - angle.cos()) * (d**2 - 1) ** 0.5

    seen = angle.cos() * min(distance, DISTANCE) >= 1  # by both cameras
    focal = float(intrinsics(1)[0, 0]) / (DISTANCE**2 - 1) ** 0.5
    return float(focal * (shown(distance) - shown(DISTANCE))[seen].abs().max())


# ---------------------------------------------------------------- the object


def ring_and_free(
    azimuths: np.ndarray, elevations: np.ndarray, views: int, front: int | None = None
) -> np.ndarray:
    """Which photographs become the object's views [views]: the ring, then free ones.

    Ring view k gets the photograph that is nearest to azimuth 22.5 k and to the median
    elevation, all 16 chosen together; view 12 gets photograph `front`, if given, at any
    elevation. Of the other photographs those that fit are taken evenly; where there are
    too few, they and then the ring are repeated.
    """
    if len(azimuths) < RING:
        raise UserError(f"A ring takes {RING} photographs; {len(azimuths)} can be used.")
    places = np.arange(RING)[:, None] * 360 / RING
    gaps = np.abs((azimuths[None] - places + 180) % 360 - 180)  # [16, P]
    costs = gaps**2 + (elevations - np.median(elevations))[None] ** 2
    if front is not None:
        costs[FRONT, front] = -1e9
    ring = linear_sum_assignment(costs)[1]
    worst = int(gaps[np.arange(RING), ring].argmax())
    if gaps[worst, ring[worst]] > MAX_GAP:
        raise UserError(
            "The photographs do not go around the object: at azimuth "
            f"{worst * 360 / RING:g} degrees the nearest is {gaps[worst, ring[worst]]:.0f} "
            f"degrees away, more than {MAX_GAP:g}."
        )
    rest, free = np.setdiff1d(np.arange(len(azimuths)), ring), views - RING
    if len(rest) >= free:
        evenly = np.linspace(0, len(rest) - 1, free).round().astype(int)
        return np.concatenate([ring, rest[evenly]])
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
    """Photographs -> (views of one object, its row of the index).

    Depth is not known: 0 everywhere.
    world: None finds it from the silhouettes.
    front: name of the photograph that shows the front, azimuth 270 degrees.
    """
    world = world or find_world(photos, torch.eye(3, dtype=torch.float64))
    positions = world.positions(photos)
    distances = positions.norm(dim=-1)
    if distances.min() <= 1.01:
        raise UserError(
            f"The camera of {photos[int(distances.argmin())].name} stands inside "
            "the object's unit ball."
        )
    azimuths = torch.rad2deg(torch.atan2(positions[:, 1], positions[:, 0])).numpy()
    elevations = torch.rad2deg(torch.asin(positions[:, 2] / distances)).numpy()
    first = _index_of(front, photos) if front else None
    azimuths = (azimuths if first is None else azimuths + 270 - azimuths[first]) % 360
    chosen = ring_and_free(azimuths, elevations, views, first)
    rotations = look_at(positions[chosen])[:, :3, :3] @ world.turn
    lenses = [standard_intrinsics(float(distances[k]), size) for k in chosen]
    seen = zip(chosen, rotations, lenses, strict=True)
    rgba = np.stack([warp(photos[k], R, K, size) for k, R, K in seen])
    angles = azimuths[chosen].astype("f4"), elevations[chosen].astype("f4")
    cameras = orbit_cameras(*(torch.from_numpy(a) for a in angles), size)
    pictures = ObjectViews(id, rgba, np.zeros(rgba.shape[:3], "f4"), cameras, *angles)
    near, far = float(distances[chosen].min()), float(distances[chosen].max())
    row = {"id": id, "source": "photographs", "views": views, "size": size}
    row |= {"distances": [round(near, 3), round(far, 3)], "photographs": len(photos)}
    row |= {"repeated": views - len(set(chosen.tolist()))}
    return pictures, row | {"coverage": round(float(rgba[..., 3].mean() / 255), 4)}


def _index_of(name: str, photos: list[Photo]) -> int:
    names = [Path(p.name).stem for p in photos]
    if Path(name).stem not in names:
        raise UserError(f"There is no photograph {name}; there are {', '.join(names[:3])}, ...")
    return names.index(Path(name).stem)


def add_object(folder: str | Path, pictures: ObjectViews, row: dict) -> None:
    """Write the object into a dataset folder; one of the same id is replaced."""
    folder = Path(folder)
    remove_leftovers(folder)
    rows = {other["id"]: other for other in existing_rows(folder)}
    check_alike(folder, rows.values(), row["views"], row["size"])
    dataset.write_object(folder, pictures)
    rows[row["id"]] = row
    dataset.write_index(folder, [rows[id] for id in sorted(rows)])


def _homogeneous(pixels: Tensor) -> Tensor:
    """[..., 2] -> [..., 3]"""
    return torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/photos.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=command.input_path, help="with transforms.json, or such a file")
    out = dict(type=command.output_path, required=True)
    add("--out", **out, help="the dataset folder; it may exist already")
    add("--id", help="of the object (default: the folder's name)")
    add("--size", type=command.pixels, default=128, help="pixels per side (default 128)")
    views = dict(type=command.whole(RING, 1000), default=RING + RANDOM_VIEWS)
    add("--views", **views, help="per object, 16 of them on the ring")
    up = dict(choices=["z", "auto"], default="z")
    add("--up", **up, help="auto: from cameras that were held level")
    add("--front", metavar="NAME", help="the photograph of the front; it becomes view 12")
    length = command.number(-1e9, 1e9)
    center = dict(nargs=3, type=length, metavar=("X", "Y", "Z"))
    add("--center", **center, help="of the object, in the file's world")
    radius = "of the object, with --center (default for both: the silhouettes')"
    add("--radius", type=length, help=radius)
    background = dict(choices=["auto", "rembg", "plain"], default="auto")
    add("--background", **background, help="see images.cut_out")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return command.exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    if (args.center is None) != (args.radius is None):
        raise UserError("Give --center and --radius together.")
    dataset.check_size(args.views, args.size)
    if args.radius is not None and not 0 < args.radius < FARTHEST:
        raise UserError(f"--radius is the object's, above 0; got {args.radius:g}.")
    command.check_writable(args.out / "index.json")
    source = resolve(args.folder)
    photos, left_out = read_photos(source, 4 * args.size, args.background)
    for why in left_out:
        print(f"left out {why}")
    if len(photos) < RING:
        raise UserError(
            f"A ring takes {RING} photographs; {len(photos)} of {args.folder} can be used."
        )
    turn = upright(photos) if args.up == "auto" else torch.eye(3, dtype=torch.float64)
    if args.center is None:
        world = find_world(photos, turn)
    else:
        world = World(torch.tensor(args.center, dtype=torch.float64), args.radius, turn)
    id = plain_id(args.id or (source if source.is_dir() else source.parent).resolve().name)
    pictures, row = object_from(photos, id, args.size, args.views, world, args.front)
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
        f"{row['id']}: {row['photographs']} photographs, "
        f"{row['repeated']} of {row['views']} views repeated\n"
        f"ring: at most {gap:.1f} degrees from regular, "
        f"elevations {low:.1f} to {high:.1f} degrees\n"
        f"cameras at {near:.2f} to {far:.2f} radii, taken as {DISTANCE}: "
        f"perspective off by up to {moved:.1f} % of the frame"
    )


if __name__ == "__main__":
    sys.exit(main())
