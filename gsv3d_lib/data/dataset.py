"""Multi-view objects on disk: a folder that holds, per object, a sheet of RGBA views, depth and cameras.

    index.json        a list of rows, each with at least "id"
    <id>.webp         a sheet of 6 columns of square RGBA views (straight alpha)
    <id>.npz          depth, K, c2w, az, el, dist (see `write_object`)

The layout is that of `../shared/objects`, so one reader serves scans, meshes rendered here, and procedural objects.
Views 0-15 are a ring of constant elevation, azimuth 22.5 k degrees; views 16-23 are free.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..cameras import Cameras, from_c2w, orbit_cameras
from ..system.errors import MissingFile, UserError
from ..system.paths import atomic_path, check_readable, reason

COLUMNS = 6
RING = 16  # the first views of an object form a ring of constant elevation
RING_ELEVATION = 15.0  # degrees
FRONT = 12  # of the ring, azimuth 270 degrees: the input of the evaluation
# what PIL and numpy raise for files that are missing, damaged, or not what their names say, and torch for other shapes
UNREADABLE = (OSError, LookupError, ValueError, TypeError, RuntimeError, EOFError, TokenError, BadZipFile, zlib.error)


@dataclass
class ObjectViews:
    """V views of one object. rgba: uint8 [V, H, W, 4], straight alpha; depth: float32 [V, H, W], z-depth, 0 = nothing;
    azimuths, elevations: float32 [V], degrees."""

    id: str
    rgba: np.ndarray
    depth: np.ndarray
    cameras: Cameras
    azimuths: np.ndarray
    elevations: np.ndarray


def list_objects(folder: str | Path) -> list[dict]:
    """The rows of a dataset folder's index, sorted by id. Raises FileNotFoundError or ValueError with what to do."""
    index = Path(folder) / "index.json"
    if not index.is_file():
        raise MissingFile(
            f"No dataset at {folder}: index.json is missing. Make one with "
            f"`python -m gsv3d_lib make_dataset --procedural 200 --out {folder}`."
        )
    try:
        rows = json.loads(index.read_text())
        if "shards" not in rows:
            return sorted(rows, key=lambda row: row["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} cannot be read ({error}); delete it and make the dataset again.") from error
    raise UserError(
        f"{folder} holds shards, which `train --shards` reads; give the dataset folder they were made from."
    )


def read_object(folder: str | Path, id: str) -> ObjectViews:
    """One object with all its views, exactly as stored."""
    sheet_path, arrays_path = Path(folder) / f"{id}.webp", Path(folder) / f"{id}.npz"
    check_readable(sheet_path, arrays_path)
    try:
        with Image.open(sheet_path) as sheet, np.load(arrays_path, allow_pickle=False) as arrays:
            arrays = dict(arrays)
            depth = decode_depth(arrays["depth"], float(arrays["depth_min"]), float(arrays["depth_range"]))
            rgba = split_sheet(np.asarray(sheet.convert("RGBA")), *depth.shape)
        views, height, width = depth.shape
        c2w, K = (torch.from_numpy(arrays[name]).float() for name in ("c2w", "K"))
        cameras = from_c2w(c2w, K.expand(views, 3, 3), width, height)
        azimuths, elevations = (arrays[name].astype("f4").reshape(views) for name in ("az", "el"))
    except UNREADABLE as error:
        raise UserError(
            f"Object {id!r} in {folder} cannot be read ({reason(error)}); delete its files and render it again."
        ) from error
    return ObjectViews(id, rgba, depth, cameras, azimuths, elevations)


def write_object(folder: str | Path, views: ObjectViews) -> None:
    """Write `<id>.webp` and `<id>.npz` atomically, in the layout described above."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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
    with atomic_path(folder / f"{views.id}.webp") as path:
        sheet.save(path, format="WEBP", quality=85, method=4, exact=False)
    with atomic_path(folder / f"{views.id}.npz") as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def write_index(folder: str | Path, rows: list[dict]) -> None:
    """Write index.json atomically; every row needs an "id"."""
    with atomic_path(Path(folder) / "index.json") as path:
        path.write_text(json.dumps(rows, indent=1))


# ---------------------------------------------------------------- encodings


def encode_depth(depth: np.ndarray) -> tuple[np.ndarray, float, float]:
    """float32 z-depth (0 = nothing) -> uint16 with 0 for nothing, and (depth_min, depth_range)."""
    hit = depth > 0
    low, high = (float(depth[hit].min()), float(depth[hit].max())) if hit.any() else (0.0, 1.0)
    span = max(high - low, 1e-6)
    codes = 1 + np.round(((depth - low) / span * 65534 - 8) / 16).clip(0, 4095)
    return np.where(hit, codes, 0).astype(np.uint16), low, span


def decode_depth(codes: np.ndarray, depth_min: float, depth_range: float) -> np.ndarray:
    """The inverse: z = depth_min + (16 (d - 1) + 8) / 65534 * depth_range, good to depth_range / 8191."""
    depth = depth_min + (16.0 * (codes.astype("f4") - 1) + 8) / 65534 * depth_range
    return np.where(codes > 0, depth, 0).astype("f4")


def split_sheet(sheet: np.ndarray, views: int, height: int, width: int) -> np.ndarray:
    """[rows * H, COLUMNS * W, 4] -> [V, H, W, 4]"""
    rows = -(-views // COLUMNS)
    if sheet.shape[:2] != (rows * height, COLUMNS * width):
        raise UserError(f"the sheet is {sheet.shape[:2]}, not {(rows * height, COLUMNS * width)}")
    tiles = sheet.reshape(rows, height, COLUMNS, width, 4).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(-1, height, width, 4)[:views])


def join_sheet(rgba: np.ndarray) -> np.ndarray:
    """[V, H, W, 4] -> [rows * H, COLUMNS * W, 4], empty tiles transparent."""
    views, height, width, _ = rgba.shape
    rows = -(-views // COLUMNS)
    tiles = np.zeros((rows * COLUMNS, height, width, 4), np.uint8)
    tiles[:views] = rgba
    return tiles.reshape(rows, COLUMNS, height, width, 4).swapaxes(1, 2).reshape(rows * height, COLUMNS * width, 4)


# ---------------------------------------------------------------- tensors for training


@dataclass
class Scene:
    """One object as training sees it. rgb [V, S, S, 3] on white, alpha and depth [V, S, S, 1], all float32;
    cameras: V of them; azimuths, elevations [V] degrees. View k < 16 has azimuth 22.5 k."""

    rgb: Tensor
    alpha: Tensor
    depth: Tensor
    cameras: Cameras
    azimuths: Tensor
    elevations: Tensor


@dataclass
class ViewTensors:
    """All objects of some dataset folders at one size: rgb uint8 [O, V, S, S, 3] on white, alpha uint8 and depth float32
    [O, V, S, S, 1], azimuths and elevations float32 [O, V] in degrees. Bytes keep thousands of views in memory."""

    ids: list[str]
    rgb: Tensor
    alpha: Tensor
    depth: Tensor
    azimuths: Tensor
    elevations: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Twelve characters that change with the objects, by their names, angles and every 8th picture and pixel."""
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

    def scene(self, index: int, mirror: bool = False, palette: tuple[int, int, int] = (0, 1, 2)) -> Scene:
        """Object `index`, optionally mirrored (y -> -y, another object with the same statistics) and with its colour
        channels permuted. Cameras are rebuilt from the angles, so that they fit the mirrored world too."""
        rgb, alpha, depth = (t[index] for t in (self.rgb, self.alpha, self.depth))
        order, azimuths, elevations = self.places(index, mirror)
        if mirror:
            rgb, alpha, depth = (t[order].flip(-2) for t in (rgb, alpha, depth))
        cameras = orbit_cameras(azimuths, elevations, rgb.shape[-2])
        rgb, alpha = rgb[..., list(palette)].float() / 255, alpha.float() / 255
        return Scene(rgb, alpha, depth, cameras, azimuths, elevations)

    def places(self, index: int, mirror: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Which stored view makes view k of a scene, and the scene's azimuths and elevations, all [V].

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
    """Read dataset folders into tensors of `size` pixels. Colours are averaged over areas (alpha-weighted); depth takes
    the nearest stored sample, because a mean across an edge lies on no surface.

    cache: a folder where the tensors are kept, so that the next call with the same files takes a second; the last ones of
    each size stay, and a damaged file is made again.
    """
    rows = [(folder, row["id"]) for folder in folders for row in list_objects(folder)][:limit]
    if not rows:
        raise UserError(f"The dataset folders {[str(f) for f in folders]} hold no objects.")
    ids = [id for _, id in rows]
    stored = None if cache is None else Path(cache) / f"views-{size}px-{files_digest(rows)}.safetensors"
    columns = {} if stored is None else read_cache(stored)
    if not columns:
        objects = tqdm(rows, desc="reading objects", disable=not progress, mininterval=5)
        for index, (folder, id) in enumerate(objects):
            parts = dict(zip(COLUMN_NAMES, resize_views(read_object(folder, id), size)))
            if not columns:  # filled in place: thousands of small tensors beside large temporaries tear memory apart
                columns = {name: part.new_empty(len(rows), *part.shape) for name, part in parts.items()}
            views, expected = len(parts["rgb"]), columns["rgb"].shape[1]
            if views != expected:
                raise UserError(f"{id} in {folder} has {views} views, those before it {expected}; read them apart.")
            for name, part in parts.items():
                columns[name][index] = part
        if stored is not None:
            with atomic_path(stored) as path:
                save_file(columns, path)
            for other in stored.parent.glob(f"views-{size}px-*.safetensors"):  # gigabytes of what is no more
                if other != stored:
                    other.unlink()
    return ViewTensors(ids, **columns)


def files_digest(rows: list[tuple[str | Path, str]]) -> str:
    """Twelve characters that change when an object of `rows` (folder, id) is another, or was written anew."""
    sheets = ((id, Path(folder) / f"{id}.webp") for folder, id in rows)
    stamps = [[id, path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [id] for id, path in sheets]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12]


def read_cache(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; none where it is missing or damaged, so that the caller makes it again."""
    check_readable(Path(path))
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return {}


COLUMN_NAMES = ("rgb", "alpha", "depth", "azimuths", "elevations")


def resize_views(views: ObjectViews, size: int) -> tuple[Tensor, ...]:
    """One object -> (rgb uint8 on white, alpha uint8, depth, azimuths, elevations), the columns of `ViewTensors`."""
    stored = views.rgba.shape[1]
    if stored % size:
        raise UserError(f"Views of {stored} px can be averaged to a divisor of {stored}, not to {size} px.")
    block = stored // size
    rgba = torch.from_numpy(views.rgba).float() / 255
    alpha = rgba[..., 3:]
    stacked = torch.cat([rgba[..., :3] * alpha + (1 - alpha), alpha], dim=-1)
    small = stacked.reshape(len(rgba), size, block, size, block, 4).mean((2, 4))
    depth = torch.from_numpy(views.depth)[:, block // 2 :: block, block // 2 :: block, None]
    quantised = (small * 255).round().to(torch.uint8)
    angles = torch.from_numpy(views.azimuths), torch.from_numpy(views.elevations)
    return quantised[..., :3], quantised[..., 3:], depth, *angles
