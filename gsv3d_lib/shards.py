"""Training data for many objects: pixels, depth, VAE latents and DINO features, computed once and read lazily.

    python -m gsv3d_lib.shards --weights data/checkpoints/tiny --data FOLDER [FOLDER ...] --out FOLDER

`load_views` and `load_orbits` keep every object in memory, which ends at some thousands. `open_orbits` returns an `Orbits`
whose tensors stay on disk, so the stages train from it unchanged. A folder of shards holds

    00000.safetensors  the first `shard_size` objects, and so on; an object's tensors are named "<place in the shard>.<name>"
    index.json         ids, counts, sizes, fingerprints of the encoders; written last, so only a whole folder has one

and each object

    rgba, rgba_ends      V lossless WebP pictures, colour on white and alpha, one after the other, and where each ends
    depth, depth_ends    V compressed depth maps, likewise (`pack_depth`); both read back bit for bit
    azimuths, elevations [V] degrees
    latents              [copies, 16, 4, h, w] float32, unscaled, of the ring of each variant
    features             [copies, 16, T, D] float16, DINO's of each ring view; only if asked for
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .cameras import orbit_cameras
from .dataset import RING, UNREADABLE, Scene, ViewTensors, list_objects, read_object, resize_views
from .encoders import dino_features
from .orbits import Orbits, Variant, encode_rings, make_variants
from .paths import atomic_path
from .training import Stage, example_generator

FORMAT = 1
SHARD_SIZE = 64  # objects in a file: 10 MB at 64 px, about a gigabyte at 576 px
OPEN_SHARDS = 32  # files kept open by a reader
WINDOW = 8  # shards that are shuffled together: so many are read at random at a time, and the rest not at all


# ---------------------------------------------------------------- lazy tensors


class Rows:
    """A tensor [V, ...] of which only the rows that an index asks for are read: by number, slice, list, tensor or mask."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[list[int]], Tensor]):
        self.shape, self._read = torch.Size(shape), read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> Tensor:
        first, *rest = key if isinstance(key, tuple) else (key,)
        chosen = torch.arange(len(self))[first]
        rows = self._read(chosen.reshape(-1).tolist())
        return rows[(0 if chosen.ndim == 0 else slice(None), *rest)]

    def through(self, order: Tensor, change: Callable[[Tensor], Tensor]) -> Rows:
        """The rows in another order, each changed (without changing its shape) after it was read."""
        return Rows(self.shape, lambda chosen: change(self._read(order[chosen].tolist())))


class Column:
    """A tensor [M, V, ...] of which nothing is in memory: one number gives `Rows`, anything more a tensor."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[int, list[int]], Tensor]):
        self.shape, self._read = torch.Size(shape), read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> Rows | Tensor:
        first, *rest = key if isinstance(key, tuple) else (key,)
        chosen = torch.arange(len(self))[first]
        if chosen.ndim:
            return torch.stack([self._rows(i)[tuple(rest) or slice(None)] for i in chosen.tolist()])
        rows = self._rows(int(chosen))
        return rows[tuple(rest)] if rest else rows

    def _rows(self, item: int) -> Rows:
        return Rows(self.shape[1:], lambda chosen: self._read(item, chosen))


class ShardViews(ViewTensors):
    """`ViewTensors` whose columns are read from shards. A `scene` holds `Rows` where that of `ViewTensors` holds tensors."""

    def scene(self, index: int, mirror: bool = False, palette: tuple[int, int, int] = (0, 1, 2)) -> Scene:
        azimuths, elevations = self.azimuths[index][:], self.elevations[index][:]
        order = torch.arange(len(azimuths))
        if mirror:  # as in `ViewTensors.scene`
            order = torch.cat([-torch.arange(RING) % RING, torch.arange(RING, len(azimuths))])
            azimuths, elevations = -azimuths[order] % 360, elevations[order]
        cameras = orbit_cameras(azimuths, elevations, self.rgb.shape[-2])

        def side(images: Tensor) -> Tensor:
            return images.flip(-2) if mirror else images

        rgb = self.rgb[index].through(order, lambda t: side(t)[..., list(palette)].float() / 255)
        alpha = self.alpha[index].through(order, lambda t: side(t).float() / 255)
        return Scene(rgb, alpha, self.depth[index].through(order, side), cameras, azimuths, elevations)


class ShardOrbits(Orbits):
    """`Orbits` read from shards. With `features`, an orbit has also DINO's of its condition view: features [T, D]."""

    def __init__(
        self,
        views: ShardViews,
        variants: list[Variant],
        latents: Column,
        latent_scale: float,
        shards: list[list[int]],
        features: Column | None = None,
    ):
        super().__init__(views, variants, latents, latent_scale)
        self.shards, self.features = shards, features  # shards: the items of each file

    def orbit(self, item: int, start: int, num_frames: int) -> dict[str, Tensor]:
        orbit = super().orbit(item, start, num_frames)
        return orbit if self.features is None else orbit | {"features": self.features[item, start].float()}


# ---------------------------------------------------------------- reading


def open_orbits(folder: str | Path, vae=None, features: bool = False) -> ShardOrbits:
    """The orbits of a folder of shards: opens at once, reads what is asked for, and keeps nothing but the index in memory.

    vae: if given, it must be the one that made the latents.  features: add the stored DINO features to every orbit.
    Raises FileNotFoundError or ValueError where the folder is unfinished, a file of it is missing or has another length,
    the encoder is another one, or there are no features; a file that is damaged inside raises ValueError when it is read.
    """
    index = read_index(folder)
    if vae is not None and vae_fingerprint(vae) != index["vae"]:
        raise ValueError(f"The latents in {folder} were made by another VAE; make the shards again with this one.")
    if features and index["features"] is None:
        raise ValueError(f"The shards in {folder} hold no DINO features; make them with --features.")
    files = ShardFiles(folder, index)
    ids = [id for shard in index["shards"] for id in shard["ids"]]
    objects, views, size, copies = len(ids), index["views"], index["size"], index["copies"]
    shapes = [(size, size, 3), (size, size, 1), (size, size, 1), (), ()]
    readers = [files.rgb, files.alpha, files.depth, files.rows("azimuths"), files.rows("elevations")]
    columns = [Column((objects, views, *shape), read) for shape, read in zip(shapes, readers)]

    def of_variants(name: str, shape: list[int]) -> Column:
        return Column((copies * objects, RING, *shape), files.variant_rows(name, objects))

    starts = np.cumsum([0] + [len(shard["ids"]) for shard in index["shards"]]).tolist()
    shards = [
        [copy * objects + k for copy in range(copies) for k in range(a, b)] for a, b in zip(starts[:-1], starts[1:])
    ]
    return ShardOrbits(
        ShardViews(ids, *columns),
        make_variants(objects, copies, index["seed"]),
        of_variants("latents", [4, size // 8, size // 8]),
        index["latent_scale"],
        shards,
        of_variants("features", index["features"]) if features else None,
    )


def read_index(folder: str | Path) -> dict:
    """The index of a folder of shards, after a look at the length of every file that it names."""
    path = Path(folder) / "index.json"
    again = "run `python -m gsv3d_lib.shards` again, which makes only what is missing"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no finished shards: index.json is missing; {again}.")
    try:
        index = json.loads(path.read_text())
        files = [(Path(folder) / shard["file"], shard["bytes"]) for shard in index["shards"]]
        known = index["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and {again}.") from error
    if not known:
        raise ValueError(f"{path} is not one of shards of format {FORMAT}; give the folder that --out named.")
    for file, size in files:
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            have = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"Shard {file} {have}; delete it and {again}.")
    return index


class ShardFiles:
    """The files of a folder of shards, the last `OPEN_SHARDS` of them kept open. Objects are numbered through all files."""

    def __init__(self, folder: str | Path, index: dict):
        self.paths = [Path(folder) / shard["file"] for shard in index["shards"]]
        self.firsts = np.cumsum([0] + [len(shard["ids"]) for shard in index["shards"]])
        self._open: OrderedDict[int, safe_open] = OrderedDict()
        self._decoded: tuple[int, dict[int, Tensor]] = (-1, {})  # pictures of the last object: one example asks twice

    def rgb(self, item: int, chosen: list[int]) -> Tensor:
        """uint8 [n, S, S, 3], colour on white."""
        return self._rgba(item, chosen)[..., :3]

    def alpha(self, item: int, chosen: list[int]) -> Tensor:
        """uint8 [n, S, S, 1]"""
        return self._rgba(item, chosen)[..., 3:]

    def depth(self, item: int, chosen: list[int]) -> Tensor:
        """float32 [n, S, S, 1]"""
        return torch.stack([unpack_depth(blob)[..., None] for blob in self._blobs(item, "depth", chosen)])

    def rows(self, name: str) -> Callable[[int, list[int]], Tensor]:
        """A reader of the rows of a small tensor [V]."""
        return lambda item, chosen: self._named(item, lambda file, key: file.get_tensor(key(name)))[chosen]

    def variant_rows(self, name: str, objects: int) -> Callable[[int, list[int]], Tensor]:
        """A reader of rows of [copies, 16, ...], where item = copy * objects + object as in `make_variants`."""

        def read(item: int, chosen: list[int]) -> Tensor:
            copy, which = divmod(item, objects)

            def rows(file, key) -> Tensor:
                part = file.get_slice(key(name))
                return torch.cat([part[copy : copy + 1, k : k + 1] for k in chosen], dim=1)[0]

            return self._named(which, rows)

        return read

    def _rgba(self, item: int, chosen: list[int]) -> Tensor:
        if self._decoded[0] != item:
            self._decoded = item, {}
        decoded = self._decoded[1]
        missing = [k for k in dict.fromkeys(chosen) if k not in decoded]
        decoded.update(zip(missing, map(unpack_picture, self._blobs(item, "rgba", missing))))
        return torch.stack([decoded[k] for k in chosen])

    def _blobs(self, item: int, name: str, chosen: list[int]) -> list[_Blob]:
        def read(file, key) -> list[_Blob]:
            ends, data = [0, *file.get_tensor(key(f"{name}_ends")).tolist()], file.get_slice(key(name))
            return [_Blob(data[ends[k] : ends[k + 1]].numpy().tobytes(), self._path(item)) for k in chosen]

        return self._named(item, read)

    def _named(self, item: int, read):
        """`read(file, key)` of the shard that holds an object, where key(name) is the full name of its tensor."""
        shard = int(np.searchsorted(self.firsts, item, side="right")) - 1
        place = item - int(self.firsts[shard])
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.paths[shard], "pt")
            self._open.move_to_end(shard)
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            return read(self._open[shard], lambda name: f"{place}.{name}")
        except (SafetensorError, OSError) as error:
            raise ValueError(_damaged(self.paths[shard], error)) from error

    def _path(self, item: int) -> Path:
        return self.paths[int(np.searchsorted(self.firsts, item, side="right")) - 1]


@dataclasses.dataclass(frozen=True)
class _Blob:
    data: bytes
    path: Path  # of its shard, for the error message


def _damaged(path: Path, error: Exception | str) -> str:
    reason = " ".join(str(error).split())
    return f"Shard {path} is damaged ({reason}); delete it and run `python -m gsv3d_lib.shards` again."


# ---------------------------------------------------------------- pictures and depth as bytes


def pack_picture(rgb: Tensor, alpha: Tensor) -> bytes:
    """uint8 [S, S, 3] and [S, S, 1] -> a lossless WebP. More effort than method 1 makes it 5 % smaller in twice the time."""
    buffer, rgba = io.BytesIO(), torch.cat([rgb, alpha], dim=-1).numpy()
    Image.fromarray(rgba, "RGBA").save(buffer, format="WEBP", lossless=True, exact=True, quality=50, method=1)
    return buffer.getvalue()


def unpack_picture(blob: _Blob) -> Tensor:
    """The inverse -> uint8 [S, S, 4]."""
    try:
        with Image.open(io.BytesIO(blob.data)) as picture:
            return torch.from_numpy(np.array(picture.convert("RGBA")))
    except UNREADABLE as error:
        raise ValueError(_damaged(blob.path, error)) from error


def pack_depth(depth: Tensor) -> bytes:
    """float32 [S, S] -> bytes, without loss: the side S, the number L of different depths, those, and 16-bit indices into
    them, deflated. Depth from dataset folders has at most 4,097 values. With more than 65,535 the floats follow, and L is 0.
    """
    values = depth.numpy().astype("<f4")
    levels, codes = np.unique(values.view("<u4"), return_inverse=True)  # as bits: exact, and faster to sort
    if len(levels) > 65_535:
        levels, codes = levels[:0], values
    else:
        codes = codes.astype("<u2")
    header = np.array([len(values), len(levels)], "<u4")
    return zlib.compress(header.tobytes() + levels.tobytes() + codes.tobytes(), 1)


def unpack_depth(blob: _Blob) -> Tensor:
    """The inverse -> float32 [S, S]."""
    try:
        data = zlib.decompress(blob.data)
        side, count = np.frombuffer(data, "<u4", 2).tolist()
        levels = np.frombuffer(data, "<f4", count, offset=8)
        codes = np.frombuffer(data, "<u2" if count else "<f4", side * side, offset=8 + 4 * count)
        values = levels[codes] if count else codes
    except (zlib.error, ValueError, IndexError) as error:
        raise ValueError(_damaged(blob.path, error)) from error
    return torch.from_numpy(values.reshape(side, side).astype("f4"))


# ---------------------------------------------------------------- writing


@torch.no_grad()
def write_shards(
    folders: list[str | Path],
    vae,
    out: str | Path,
    size: int,
    copies: int = 1,
    seed: int = 0,
    dino=None,
    shard_size: int = SHARD_SIZE,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> dict | None:
    """Encode the objects of some dataset folders into `out`, one file after the other; finished files are left alone.

    size: pixels.  copies, seed: as for `load_orbits`.  dino: store its features too.  share (k, n): write only every n-th
    file from the k-th on, so that n processes or machines write one folder together.
    Returns the index, or None where other processes have files left to write. Raises ValueError for a share that is none,
    for an object that cannot be read, and for objects with different numbers of views.
    """
    if not 0 <= share[0] < share[1] or shard_size < 1:
        raise ValueError(f"The share is K/N with 0 <= K < N, and a shard holds objects; got {share} and {shard_size}.")
    out = Path(out)
    rows = [(Path(folder), row["id"]) for folder in folders for row in list_objects(folder)]
    if not rows:
        raise ValueError(f"The dataset folders {[str(f) for f in folders]} hold no objects.")
    variants = make_variants(len(rows), copies, seed)
    dino_mark = None if dino is None else weights_fingerprint(dino)
    facts = {
        "format": FORMAT,
        "size": size,
        "copies": copies,
        "seed": seed,
        "vae": vae_fingerprint(vae),
        "dino": dino_mark,
    }
    groups = [range(a, min(a + shard_size, len(rows))) for a in range(0, len(rows), shard_size)]
    marks = [_shard_mark(facts, [(*rows[k], variants[k :: len(rows)]) for k in group]) for group in groups]
    paths = [out / f"{number:05d}.safetensors" for number in range(len(groups))]
    _forget_other_index(out, marks)
    bar = tqdm(range(share[0], len(groups), share[1]), desc="shards", disable=not progress)
    for number in bar:
        if shard_metadata(paths[number]).get("mark") == marks[number]:
            continue
        tensors: dict[str, Tensor] = {}
        for place, k in enumerate(groups[number]):
            encoded = encode_object(*rows[k], size, variants[k :: len(rows)], vae, dino)
            tensors |= {f"{place}.{name}": tensor for name, tensor in encoded.items()}
        views = {len(tensors[f"{place}.azimuths"]) for place in range(len(groups[number]))}
        if len(views) > 1:
            raise ValueError(
                f"Objects of one training have equally many views; those of {paths[number]} have {sorted(views)}."
            )
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(paths[number]) as path:
            notes = {"mark": marks[number], "digest": digest(tensors), "views": views.pop()}
            save_file(tensors, path, metadata={"shard": json.dumps(notes)})  # one entry: their order would be random
    return _write_index(out, facts, vae, marks, paths, [[rows[k][1] for k in group] for group in groups])


def encode_object(folder: Path, id: str, size: int, variants: list[Variant], vae, dino=None) -> dict[str, Tensor]:
    """What a shard holds of one object, by name. variants: of this object."""
    columns = resize_views(read_object(folder, id), size)
    views = ViewTensors([id], *(column[None] for column in columns))
    alone = [dataclasses.replace(variant, index=0) for variant in variants]
    rgb, alpha, depth, azimuths, elevations = columns
    tensors = {"azimuths": azimuths, "elevations": elevations}
    tensors |= _join("rgba", [pack_picture(*picture) for picture in zip(rgb, alpha)])
    tensors |= _join("depth", [pack_depth(image[..., 0]) for image in depth])
    tensors["latents"] = encode_rings(views, alone, vae, progress=False)
    if dino is not None:
        rings = [views.scene(0, v.mirror, v.palette).rgb[:RING].to(dino.device) for v in alone]
        tensors["features"] = torch.stack([dino_features(dino, ring).half().cpu() for ring in rings])
    return tensors


def _join(name: str, blobs: list[bytes]) -> dict[str, Tensor]:
    ends = torch.tensor(np.cumsum([len(blob) for blob in blobs]))
    return {name: torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8), f"{name}_ends": ends}


def _shard_mark(facts: dict, objects: list[tuple[Path, str, list[Variant]]]) -> str:
    """Changes when anything that a shard is made of does; re-rendered objects are told by the length of their files."""
    parts = []
    for folder, id, variants in objects:
        files = [folder / f"{id}{suffix}" for suffix in (".webp", ".npz")]
        lengths = [file.stat().st_size if file.is_file() else -1 for file in files]
        parts.append([id, lengths, [dataclasses.astuple(v) for v in variants]])
    return hashlib.sha256(json.dumps([facts, parts]).encode()).hexdigest()


def shard_metadata(path: Path) -> dict:
    """What `write_shards` noted in a file; nothing where it is missing or damaged, so that it is made again."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["shard"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return {}


def _forget_other_index(out: Path, marks: list[str]) -> None:
    """Files are about to change under an index that states others: without it the folder counts as unfinished."""
    path = out / "index.json"
    try:
        stated = [shard["mark"] for shard in json.loads(path.read_text())["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        stated = None
    if stated != marks:
        path.unlink(missing_ok=True)


def _write_index(out: Path, facts: dict, vae, marks: list[str], paths: list[Path], ids: list[list[str]]) -> dict | None:
    found = [shard_metadata(path) for path in paths]
    if [metadata.get("mark") for metadata in found] != marks:
        return None
    views = {metadata["views"] for metadata in found}
    if len(views) > 1:
        raise ValueError(f"Objects of one training have equally many views; those for {out} have {sorted(views)}.")
    with safe_open(paths[0], "pt") as file:
        features = file.get_slice("0.features").get_shape()[2:] if facts["dino"] else None
    shards = [
        {"file": path.name, "bytes": path.stat().st_size, "mark": mark, "ids": group}
        for path, mark, group in zip(paths, marks, ids)
    ]
    index = facts | {"views": int(*views), "latent_scale": vae.config.scaling_factor, "features": features}
    index |= {"objects": sum(map(len, ids)), "shards": shards}
    with atomic_path(out / "index.json") as path:
        path.write_text(json.dumps(index, indent=1))
    return index


# ---------------------------------------------------------------- fingerprints


def weights_fingerprint(*modules) -> str:
    """SHA-256 of every parameter and buffer of some modules, by name."""
    return digest({f"{i}.{k}": v for i, m in enumerate(modules) for k, v in m.state_dict().items()})


def vae_fingerprint(vae) -> str:
    """Of what makes latents: the encoder and the layer behind it."""
    return weights_fingerprint(vae.encoder, vae.quant_conv)


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_shards(folder: str | Path) -> list[str]:
    """Read every byte of every shard -> one sentence for each that is not as it was written; none if all is well."""
    problems = []
    for shard in read_index(folder)["shards"]:
        path = Path(folder) / shard["file"]
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                stated = json.loads(file.metadata()["shard"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            problems.append(_damaged(path, error))
            continue
        if digest(tensors) != stated["digest"] or stated["mark"] != shard["mark"]:
            problems.append(_damaged(path, "its bytes are not those that were written"))
    return problems


# ---------------------------------------------------------------- the order of training


class ShuffledOrder:
    """Every item once per epoch, in an order that depends on the seed and the epoch alone.

    The shards are shuffled, and the items of `window` neighbouring shards among themselves: far-apart examples share a
    batch, while only `window` files are read at random at a time.
    """

    def __init__(self, shards: list[list[int]], seed: int = 0, window: int = WINDOW):
        self.shards, self.seed, self.window = shards, seed, window
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def item(self, position: int) -> int:
        """The item at a position of the training, counted through all steps and epochs."""
        epoch, place = divmod(position, len(self))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.epoch(epoch)
        return self._epoch[1][place]

    def epoch(self, epoch: int) -> list[int]:
        """The order of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shards = [self.shards[k] for k in torch.randperm(len(self.shards), generator=generator).tolist()]
        order: list[int] = []
        for first in range(0, len(shards), self.window):
            pool = [item for shard in shards[first : first + self.window] for item in shard]
            order += [pool[k] for k in torch.randperm(len(pool), generator=generator).tolist()]
        return order


class InEpochs(Stage):
    """A stage on orbits whose examples come in a `ShuffledOrder` instead of being drawn with replacement.

    Example `index` of step `step` is the item at position step * batch + index, a pure function of (seed, step, index): a
    resumed training goes on with the item that was next, and the processes of one training share a batch without overlap.
    seed, batch: those that `training.train` is given. Checkpoints are those of the stage itself.
    """

    def __init__(self, stage: Stage, order: ShuffledOrder, seed: int, batch: int):
        super().__init__()
        if not hasattr(stage, "orbits"):
            raise ValueError(f"{type(stage).__name__} draws single views, not orbits; train it without InEpochs.")
        if len(order) != len(stage.orbits):
            raise ValueError(f"The order is one of {len(order)} items, but the stage has {len(stage.orbits)} orbits.")
        self.stage, self.order, self.seed, self.batch, self.orbits = stage, order, seed, batch, stage.orbits

    def example(self, generator, shared):
        step, index = place_in_training(generator, self.seed)
        self.stage.orbits = OneOrbit(self.orbits, self.order.item(step * self.batch + index))
        return self.stage.example(generator, shared)

    def forward(self, batch):
        return self.stage(batch)

    def training_state(self):
        return self.stage.training_state()

    def after_step(self, step, steps):
        self.stage.after_step(step, steps)


class OneOrbit:
    """`Orbits` of which there is one, so that a stage that draws an item at random draws this one."""

    def __init__(self, orbits: Orbits, item: int):
        self.orbits, self.item = orbits, item

    def __len__(self) -> int:
        return 1

    def __getattr__(self, name: str):
        return getattr(self.orbits, name)

    def scene(self, _: int) -> Scene:
        return self.orbits.scene(self.item)

    def orbit(self, _: int, start: int, num_frames: int) -> dict[str, Tensor]:
        return self.orbits.orbit(self.item, start, num_frames)

    def targets(self, _: int, start: int, chosen: Tensor) -> dict[str, Tensor]:
        return self.orbits.targets(self.item, start, chosen)


def place_in_training(generator: torch.Generator, seed: int) -> tuple[int, int]:
    """(step, index) of a generator from `training.example_generator`. Raises ValueError for any other generator."""
    first = generator.initial_seed()
    rest, index = divmod(first, 65_537)
    step = rest - seed * 1_000_003
    if step < 0 or example_generator(seed, step, index).initial_seed() != first:
        raise ValueError(f"InEpochs needs the seed that `train` was given; with {seed} the generators do not fit.")
    return step, index


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gsv3d_lib.shards", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", metavar="FOLDER", help="a checkpoint folder with vae (and dino, for --features)")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="dataset folders")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder of shards")
    parser.add_argument("--copies", type=int, help="variants of each object (default: as configured in the weights)")
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help=f"objects per file (default {SHARD_SIZE})")
    parser.add_argument("--features", action="store_true", help="store DINO's features of every ring view too")
    parser.add_argument("--share", default="0/1", metavar="K/N", help="write every N-th file from the K-th on")
    parser.add_argument("--check", action="store_true", help="only read every byte of --out and name damaged files")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            problems = check_shards(options.out)
            print("\n".join(problems) or f"{options.out} is as it was written.")
            raise SystemExit(1 if problems else 0)
        if not options.weights or not options.data:
            parser.error("--weights and --data are needed to write shards.")
        index = write_from_checkpoint(options)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if index is None:
        print(f"This share of {options.out} is written; the index follows with the last share.")
    else:
        total = sum(shard["bytes"] for shard in index["shards"])
        print(f"{options.out}: {index['objects']} objects, {len(index['shards'])} shards, {total / 1e6:.1f} MB.")


def write_from_checkpoint(options: argparse.Namespace) -> dict | None:
    """`write_shards` with the models and the configuration of a checkpoint folder."""
    from .pipeline import load_config
    from .train import load_dino, load_model

    try:
        share = tuple(int(number) for number in options.share.split("/"))
        first, count = share
    except ValueError:
        raise ValueError(f"--share takes K/N, for example 0/4; got {options.share!r}.") from None
    config = load_config(options.weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_model(options.weights, "vae").to(device)
    dino = load_dino(config, Path(options.weights)) if options.features else None
    if options.features and dino is None:
        raise ValueError(f"The configuration in {options.weights} has no DINO encoder; leave out --features.")
    return write_shards(
        options.data,
        vae,
        options.out,
        config.image_size,
        options.copies or config.copies,
        config.seed,
        None if dino is None else dino.to(device),
        options.shard_size,
        (first, count),
    )


if __name__ == "__main__":
    main()
