"""Objects on disk: per object a sheet of RGBA views, depth and cameras.

    index.json        a list of rows, each with at least "id"
    <id>.webp         a sheet of 6 columns of square RGBA views (straight alpha)
    <id>.npz          depth, K, c2w, az, el, dist (see `write_object`)

The layout is that of `../shared/objects`, so one reader serves scans, meshes rendered
here, and procedural objects. Views 0-15 are a ring of constant elevation, view k at
azimuth 22.5 k degrees; views 16-23 are free.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..cameras import Cameras, from_c2w, intrinsics, orbit_cameras
from ..system import files
from ..system.errors import MissingFile, UserError
from ..system.files import UNREADABLE, Field, Table, explained
from ..system.paths import atomic_path, check_id, check_readable, remove_leftovers

COLUMNS = 6
RING = 16  # the first views of an object form a ring of constant elevation
RING_ELEVATION = 15.0  # degrees
RANDOM_ELEVATIONS = (-10.0, 40.0)  # degrees, of the free views that follow the ring
FRONT = 12  # of the ring, azimuth 270 degrees: the input of the evaluation
# Degrees between a ring view and azimuth 22.5 k: 0 but for photographs. Beyond, the
# views of an orbit are no longer in order.
MAX_GAP = 45.0
SHEET_SIDE = 16383  # pixels: WebP has no larger pictures
MAX_SHEET = 1 << 28  # bytes of a sheet's file
TOLERANCE = 0.01  # of the entries of c2w; of K, the same share of the picture's side
# What <id>.npz must hold, for V views of S pixels a side.
OBJECT: Table = {
    "depth": Field(("V", "S", "S"), "u2", 0, 4096),
    "depth_min": Field((), low=0, high=1000),
    "depth_range": Field((), low=0, high=1000),
    "K": Field((3, 3)),
    "c2w": Field(("V", 4, 4)),
    "az": Field(("V",), low=-36000, high=36000),
    "el": Field(("V",), low=-90, high=90),
}
# What the columns of `ViewTensors` are, for O objects.
VIEWS: Table = {
    "rgb": Field(("O", "V", "S", "S", 3), "u1"),
    "alpha": Field(("O", "V", "S", "S", 1), "u1"),
    "depth": Field(("O", "V", "S", "S", 1), "f4", low=0),
    "azimuths": Field(("O", "V"), "f4"),
    "elevations": Field(("O", "V"), "f4", -90, 90),
}
COLUMN_NAMES = tuple(VIEWS)


@dataclass
class ObjectViews:
    """V views of one object."""

    id: str
    rgba: np.ndarray  # uint8 [V, H, W, 4], straight alpha
    depth: np.ndarray  # float32 [V, H, W], z-depth, 0 = nothing
    cameras: Cameras
    azimuths: np.ndarray  # float32 [V], degrees
    elevations: np.ndarray  # float32 [V], degrees


# ---------------------------------------------------------------- the index


def list_objects(folder: str | Path) -> list[dict]:
    """The rows of a dataset folder's index, sorted by id."""
    index = Path(folder) / "index.json"
    if not index.is_file():
        raise MissingFile(
            f"No dataset at {folder}: index.json is missing. Make one with "
            f"`python -m gsv3d_lib make_dataset --procedural 200 --out {folder}`."
        )
    with explained(f"{index} cannot be read", "delete it and make the dataset again", index):
        rows = files.read_json(index)
        if not (isinstance(rows, dict) and "shards" in rows):
            return checked_rows(rows)
    raise UserError(
        f"{folder} holds shards, which `train --shards` reads; "
        "give the dataset folder they were made from."
    )


def checked_rows(rows) -> list[dict]:
    """The rows of an index sorted by id, each id a file name and there once."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError("it is no list of rows")
    for row in rows:
        check_id(row.get("id"))
    check_once(row["id"] for row in rows)
    return sorted(rows, key=lambda row: row["id"])


def list_all(folders: list[str | Path], limit: int | None = None) -> list[tuple[Path, str]]:
    """Folder and id of the first objects of some dataset folders.

    A folder that is named twice counts twice: its objects weigh more in a training.
    Raises UserError where there is no object, or two folders have the same one.
    """
    found = {Path(folder): [row["id"] for row in list_objects(folder)] for folder in folders}
    rows = [(Path(folder), id) for folder in folders for id in found[Path(folder)]][:limit]
    if not rows:
        raise UserError(f"The dataset folders {[str(f) for f in folders]} hold no objects.")
    try:
        check_once(id for _, id in dict.fromkeys(rows))
    except UserError as error:
        raise UserError(
            f"The dataset folders do not fit together: {error}; leave out one of the two."
        ) from error
    return rows


def check_once(ids) -> None:
    """Raises UserError where an id is there twice: both would share its files."""
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"the id {twice[0]!r} is there twice")


def write_index(folder: str | Path, rows: list[dict]) -> None:
    """Write index.json atomically; every row needs an "id"."""
    with atomic_path(Path(folder) / "index.json") as path:
        path.write_text(json.dumps(rows, indent=1))


# ---------------------------------------------------------------- one object


def object_files(folder: str | Path, id: str) -> list[Path]:
    """The two files of an object."""
    return [Path(folder) / f"{id}{suffix}" for suffix in (".webp", ".npz")]


def read_object(folder: str | Path, id: str) -> ObjectViews:
    """One object with all its views, exactly as stored.

    Raises UserError where a file is missing or damaged, or is no object of a dataset:
    numbers that are not finite, a sheet of another size or without alpha, cameras that
    are not those of its angles, no ring.
    """
    check_id(id)
    sheet_file, array_file = object_files(folder, id)
    fault = f"Object {id!r} in {folder} cannot be read"
    with explained(fault, "delete its files and render it again", sheet_file, array_file):
        data = files.read_plain(sheet_file, MAX_SHEET)
        width, height, alpha, moves = files.webp_facts(data[:30])
        if not alpha or moves:
            raise UserError(f"the sheet {'moves' if moves else 'has no alpha channel'}")
        arrays = files.read_npz(array_file, OBJECT, {"S": width // COLUMNS})
        views, side, _ = arrays["depth"].shape
        wide, high = COLUMNS * side, -(-views // COLUMNS) * side
        if (width, height) != (wide, high):
            raise UserError(f"the sheet is {width} x {height}, not {wide} x {high}")
        check_ring(arrays["az"])
        check_cameras(arrays, side)
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as sheet:
            rgba = split_sheet(np.asarray(sheet.convert("RGBA")), views, side, side)
    depth = decode_depth(arrays["depth"], float(arrays["depth_min"]), float(arrays["depth_range"]))
    c2w, K, az, el = (arrays[name].astype("f4") for name in ("c2w", "K", "az", "el"))
    Ks = torch.from_numpy(K).expand(views, 3, 3)
    cameras = from_c2w(torch.from_numpy(c2w), Ks, side, side)
    return ObjectViews(id, rgba, depth, cameras, az, el)


def check_size(views: int, side: int) -> None:
    """Raises UserError where V views of S pixels fit no sheet."""
    if views < RING:
        raise UserError(f"An object has at least the {RING} views of the ring; got {views}.")
    rows = -(-views // COLUMNS)
    if max(rows, COLUMNS) * side > SHEET_SIDE:
        raise UserError(
            f"{views} views of {side} px take a sheet of {COLUMNS * side} x {rows * side} px; "
            f"WebP's pictures have at most {SHEET_SIDE} px a side: take fewer or smaller ones."
        )


def check_ring(azimuths: np.ndarray) -> None:
    """Raises UserError unless the first 16 azimuths go once around, as 22.5 k."""
    if len(azimuths) < RING:
        raise UserError(f"it has {len(azimuths)} views, fewer than the {RING} of a ring")
    gaps = np.abs((azimuths[:RING] - np.arange(RING) * 360 / RING + 180) % 360 - 180)
    if gaps.max() > MAX_GAP:
        worst = int(gaps.argmax())
        raise UserError(
            f"its first {RING} views are no ring: view {worst} stands at azimuth "
            f"{azimuths[worst]:g}, {gaps[worst]:.0f} degrees from {worst * 360 / RING:g}"
        )


def check_cameras(arrays: dict[str, np.ndarray], side: int) -> None:
    """Raises UserError unless the cameras are ours at the angles given beside them.

    Training knows cameras by their angles alone, so others would be taken for these in
    silence.
    """
    c2w, azimuths, elevations = (arrays[name].astype("f8") for name in ("c2w", "az", "el"))
    rotation = c2w[:, :3, :3]
    bent = np.abs(rotation @ rotation.swapaxes(1, 2) - np.eye(3)).max((1, 2))
    bent += np.abs(np.linalg.det(rotation) - 1) + np.abs(c2w[:, 3] - [0, 0, 0, 1]).max(1)
    if bent.max() > TOLERANCE:
        first = int((bent > TOLERANCE).argmax())
        raise UserError(
            f"c2w of view {first} does not only turn and move: it scales, bends or mirrors"
        )
    expected = orbit_cameras(torch.from_numpy(azimuths), torch.from_numpy(elevations), side)
    off = np.abs(expected.c2w().numpy() - c2w).max((1, 2))
    if off.max() > TOLERANCE:
        first = int((off > TOLERANCE).argmax())
        raise UserError(
            f"c2w of view {first} is not the camera at azimuth {azimuths[first]:g} and elevation "
            f"{elevations[first]:g}: another place, direction, or other axes "
            f"(it is off by {off[first]:.2g})"
        )
    lens = intrinsics(side).numpy()
    if np.abs(lens - arrays["K"]).max() > TOLERANCE * side:
        raise UserError(
            f"K is not the lens of this project for {side} px, {lens[0, 0]:.1f} px of focal length"
        )


def write_object(folder: str | Path, views: ObjectViews) -> None:
    """Write `<id>.webp` and `<id>.npz` atomically, in the layout described above."""
    check_id(views.id)
    sheet_file, array_file = object_files(folder, views.id)
    depth, depth_min, depth_range = encode_depth(views.depth)
    arrays = dict(
        depth=depth,
        depth_min=np.float32(depth_min),
        depth_range=np.float32(depth_range),
        K=views.cameras.Ks[0].numpy(),
        c2w=views.cameras.c2w().numpy(),
        az=views.azimuths.astype("f4"),
        el=views.elevations.astype("f4"),
        dist=views.cameras.positions().norm(dim=-1).numpy(),
    )
    sheet = Image.fromarray(join_sheet(views.rgba), "RGBA")
    with atomic_path(sheet_file) as path:
        sheet.save(path, format="WEBP", quality=85, method=4, exact=False)
    with atomic_path(array_file) as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


# ---------------------------------------------------------------- encodings


def encode_depth(depth: np.ndarray) -> tuple[np.ndarray, float, float]:
    """float32 z-depth -> (uint16, depth_min, depth_range); 0 = nothing in both."""
    hit = depth > 0
    low, high = (float(depth[hit].min()), float(depth[hit].max())) if hit.any() else (0.0, 1.0)
    span = max(high - low, 1e-6)
    codes = 1 + np.round(((depth - low) / span * 65534 - 8) / 16).clip(0, 4095)
    return np.where(hit, codes, 0).astype(np.uint16), low, span


def decode_depth(codes: np.ndarray, depth_min: float, depth_range: float) -> np.ndarray:
    """The inverse of `encode_depth`, good to depth_range / 8191."""
    depth = depth_min + (16.0 * (codes.astype("f4") - 1) + 8) / 65534 * depth_range
    return np.where(codes > 0, depth, 0).astype("f4")


def split_sheet(sheet: np.ndarray, views: int, height: int, width: int) -> np.ndarray:
    """[rows * H, COLUMNS * W, 4] -> [V, H, W, 4]"""
    rows = -(-views // COLUMNS)
    if sheet.shape != (rows * height, COLUMNS * width, 4):
        raise ValueError(f"the sheet is {sheet.shape[:2]}, not {(rows * height, COLUMNS * width)}")
    tiles = sheet.reshape(rows, height, COLUMNS, width, 4).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(-1, height, width, 4)[:views])


def join_sheet(rgba: np.ndarray) -> np.ndarray:
    """[V, H, W, 4] -> [rows * H, COLUMNS * W, 4], empty tiles transparent."""
    views, height, width, _ = rgba.shape
    rows = -(-views // COLUMNS)
    tiles = np.zeros((rows * COLUMNS, height, width, 4), np.uint8)
    tiles[:views] = rgba
    tiles = tiles.reshape(rows, COLUMNS, height, width, 4).swapaxes(1, 2)
    return tiles.reshape(rows * height, COLUMNS * width, 4)


# ---------------------------------------------------------------- tensors for training


@dataclass
class Scene:
    """One object as training sees it: V views; view k < 16 has azimuth 22.5 k."""

    rgb: Tensor  # [V, S, S, 3] on white
    alpha: Tensor  # [V, S, S, 1]
    depth: Tensor  # [V, S, S, 1]
    cameras: Cameras
    azimuths: Tensor  # [V] degrees
    elevations: Tensor  # [V] degrees


@dataclass
class ViewTensors:
    """All objects of some dataset folders at one size.

    Bytes, and not floats, keep thousands of views in memory.
    """

    ids: list[str]
    rgb: Tensor  # uint8 [O, V, S, S, 3] on white
    alpha: Tensor  # uint8 [O, V, S, S, 1]
    depth: Tensor  # float32 [O, V, S, S, 1]
    azimuths: Tensor  # float32 [O, V] degrees
    elevations: Tensor  # float32 [O, V] degrees

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Twelve characters that change with the objects.

        By their names, their angles, and every 8th view, row and column: to read all
        would take minutes.
        """
        total = hashlib.sha256(json.dumps([self.ids, list(self.rgb.shape)]).encode())
        for name in COLUMN_NAMES:
            column = getattr(self, name)
            some = column[:, ::8, ::8, ::8] if column.ndim > 2 else column
            total.update(some.contiguous().numpy().tobytes())
        return total.hexdigest()[:12]

    def subset(self, indices: list[int]) -> ViewTensors:
        """Some of the objects, in this order."""
        columns = (getattr(self, name)[indices] for name in COLUMN_NAMES)
        return ViewTensors([self.ids[k] for k in indices], *columns)

    def scene(
        self, index: int, mirror: bool = False, palette: tuple[int, int, int] = (0, 1, 2)
    ) -> Scene:
        """Object `index`, optionally mirrored and with its colour channels permuted.

        A mirrored object (y -> -y) is another object with the same statistics. Cameras
        are rebuilt from the angles, so that they fit the mirrored world too.
        """
        rgb, alpha, depth = (t[index] for t in (self.rgb, self.alpha, self.depth))
        order, azimuths, elevations = self.places(index, mirror)
        if mirror:
            rgb, alpha, depth = (t[order].flip(-2) for t in (rgb, alpha, depth))
        cameras = orbit_cameras(azimuths, elevations, rgb.shape[-2])
        rgb, alpha = rgb[..., list(palette)].float() / 255, alpha.float() / 255
        return Scene(rgb, alpha, depth, cameras, azimuths, elevations)

    def places(self, index: int, mirror: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Which stored view makes view k of a scene, and its angles: three of [V].

        Mirrored, ring view k is made of view -k, so that the ring keeps its order.
        """
        azimuths, elevations = self.azimuths[index], self.elevations[index]
        order = torch.arange(len(azimuths))
        if mirror:
            order[:RING] = -order[:RING] % RING
            azimuths, elevations = -azimuths[order] % 360, elevations[order]
        return order, azimuths, elevations


def load_views(
    folders: list[str | Path],
    size: int,
    limit: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> ViewTensors:
    """Read dataset folders into tensors of `size` pixels.

    cache: a folder that keeps the tensors, so that the next call with the same files
        takes a second. The last ones of each size stay; a damaged file is made again.
    """
    rows = list_all(folders, limit)
    if cache is None:
        columns = _read_columns(rows, size, progress)
    else:
        stored = Path(cache) / f"views-{size}px-{files_digest(rows)}.safetensors"
        columns = read_cache(stored, VIEWS, {"O": len(rows), "S": size})
        if not columns:
            columns = _read_columns(rows, size, progress)
            remove_leftovers(stored.parent, "views-*")
            with atomic_path(stored) as path:
                save_file(columns, path)
            # gigabytes of what is no more
            for other in stored.parent.glob(f"views-{size}px-*.safetensors"):
                if other != stored:
                    other.unlink()
    return ViewTensors([id for _, id in rows], **columns)


def load_object(folder: str | Path, id: str, size: int) -> ViewTensors:
    """One object of a dataset folder, its views of `size` pixels."""
    return ViewTensors([id], **_read_columns([(Path(folder), id)], size, progress=False))


def _read_columns(rows: list[tuple[Path, str]], size: int, progress: bool) -> dict[str, Tensor]:
    """The columns of `ViewTensors`, filled in place.

    Thousands of small tensors beside large temporaries would tear memory apart.
    """
    columns: dict[str, Tensor] = {}
    objects = tqdm(rows, desc="reading objects", disable=not progress, mininterval=5)
    for index, (folder, id) in enumerate(objects):
        parts = dict(zip(COLUMN_NAMES, resize_views(read_object(folder, id), size)))
        for name, part in parts.items() if not columns else ():
            columns[name] = part.new_empty(len(rows), *part.shape)
        views, expected = len(parts["rgb"]), columns["rgb"].shape[1]
        if views != expected:
            raise UserError(
                f"{id} in {folder} has {views} views, those before it {expected}; read them apart."
            )
        for name, part in parts.items():
            columns[name][index] = part
    return columns


def files_digest(rows: list[tuple[str | Path, str]]) -> str:
    """Twelve characters that change when a file of a (folder, id) is written."""
    stamps = []
    for folder, id in rows:
        found = [path.stat() if path.is_file() else None for path in object_files(folder, id)]
        stamps.append([id, *([stat.st_size, stat.st_mtime_ns] if stat else [] for stat in found)])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12]


def read_cache(
    path: str | Path, table: Table, sizes: dict[str, int] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file that we wrote; none where the caller must make it again."""
    check_readable(Path(path))
    try:
        return files.read_tensors(path, table, sizes)
    except UNREADABLE:
        return {}


def resize_views(views: ObjectViews, size: int) -> tuple[Tensor, ...]:
    """One object -> its rgb, alpha, depth, azimuths, elevations as in `ViewTensors`.

    Colours are averaged over areas, weighted by alpha. Depth takes the nearest stored
    sample, because a mean across an edge lies on no surface.
    """
    stored = views.rgba.shape[1]
    if stored % size:
        raise UserError(
            f"Views of {stored} px can be averaged to a divisor of {stored}, not to {size} px."
        )
    block = stored // size
    rgba = torch.from_numpy(views.rgba).float() / 255
    alpha = rgba[..., 3:]
    stacked = torch.cat([rgba[..., :3] * alpha + (1 - alpha), alpha], dim=-1)
    small = stacked.reshape(len(rgba), size, block, size, block, 4).mean((2, 4))
    depth = torch.from_numpy(views.depth)[:, block // 2 :: block, block // 2 :: block, None]
    quantised = (small * 255).round().to(torch.uint8)
    angles = torch.from_numpy(views.azimuths), torch.from_numpy(views.elevations)
    return quantised[..., :3], quantised[..., 3:], depth, *angles
