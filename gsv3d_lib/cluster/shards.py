"""Training data for many objects, computed once and read lazily.

    python -m gsv3d_lib shards --weights runs/tiny/weights --data FOLDER --out SHARDS
    python -m gsv3d_lib train --shards SHARDS ...

`load_views` and `load_orbits` keep every object in memory, which ends at some
thousands. `open_shards` returns views that stay on disk, and their `orbits()` train the
stages unchanged. A folder of shards holds

    00000.safetensors  the first `shard_size` objects, and so on; an object's tensors
                       are named "<place in the shard>.<name>"
    index.json         ids, counts, sizes, fingerprints of the encoders; written last,
                       so only a whole folder has one

and each object

    rgba.0, ...   V lossless WebP pictures, colour on white and alpha
    depth.0, ...  V compressed depth maps (`pack_depth`), exact too
    azimuths      [V] degrees, and elevations
    latents       [copies, 16, 4, h, w] float32, unscaled, of the ring of each variant
    features      [copies, 16, T, D] float32, DINO's; only if asked for
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..cameras import orbit_cameras
from ..data.dataset import (
    COLUMNS,
    RING,
    SHEET_SIDE,
    VIEWS,
    Scene,
    ViewTensors,
    check_once,
    list_all,
    load_object,
    object_files,
    read_object,
)
from ..data.examples import (
    Orbits,
    ShuffledOrder,
    Variant,
    digest,
    encode_rings,
    make_variants,
    vae_fingerprint,
)
from ..encoders import dino_features
from ..system.command import check_writable, command_parser, output_path, positive, whole
from ..system.errors import MissingFile, UserError
from ..system.files import (
    UNREADABLE,
    Field,
    check_shape,
    check_values,
    explained,
    read_json,
    webp_facts,
)
from ..system.paths import atomic_path, check_id, check_readable, remove_leftovers

FORMAT = 2
SHARD_SIZE = 64  # objects in a file: 10 MB at 64 px, about a gigabyte at 576 px
MAX_SIDE = SHEET_SIDE // COLUMNS  # pixels of a view
OPEN_SHARDS = 32  # files kept open by a reader
OPEN_PICTURES = 64  # decoded ones kept by a reader: an example asks for each several times
MAKE = "make the shards with this one"
AGAIN = "run `python -m gsv3d_lib shards` again, which makes only what is missing"


# ---------------------------------------------------------------- reading


class Lazy:
    """A tensor on disk; an index reads what it asks for, `row` by row."""

    def __init__(self, shape: tuple[int, ...], row: Callable[[int], Tensor | Lazy]):
        self.shape = torch.Size(shape)
        self.row = row

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> Tensor | Lazy:
        first, *rest = key if isinstance(key, tuple) else (key,)
        # by number, slice, list, tensor or mask, as of a tensor
        chosen = torch.arange(len(self))[first]
        if chosen.ndim == 0:
            row = self.row(int(chosen))
            return row[tuple(rest)] if rest else row
        return torch.stack([self.row(k)[tuple(rest) or ...] for k in chosen.tolist()])


def lazy_images(shape: tuple[int, ...], view: Callable[[int, int], Tensor]) -> Lazy:
    """`Lazy` [M, V, ...] whose image k of item i is view(i, k)."""
    return Lazy(shape, lambda item: Lazy(shape[1:], lambda k: view(item, k)))


@dataclass
class ShardViews(ViewTensors):
    """`ViewTensors` whose columns are read from shards, as are those of its scenes."""

    files: ShardFiles

    def fingerprint(self) -> str:
        marks = [shard["mark"] for shard in self.files.index["shards"]]
        return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:12]

    def scene(
        self, index: int, mirror: bool = False, palette: tuple[int, int, int] = (0, 1, 2)
    ) -> Scene:
        order, azimuths, elevations = self.places(index, mirror)

        def lazy(column: Lazy, change: Callable[[Tensor], Tensor]) -> Lazy:
            def view(k: int) -> Tensor:
                image = column[index, int(order[k])]
                return change(image.flip(-2) if mirror else image)

            return Lazy(column.shape[1:], view)

        rgb = lazy(self.rgb, lambda image: image[..., list(palette)].float() / 255)
        alpha = lazy(self.alpha, lambda image: image.float() / 255)
        depth = lazy(self.depth, lambda image: image)
        cameras = orbit_cameras(azimuths, elevations, self.rgb.shape[-2])
        return Scene(rgb, alpha, depth, cameras, azimuths, elevations)

    def orbits(self, vae=None, dino=None, seed: int = 0) -> Orbits:
        """`Orbits` that a training sees once per epoch, shuffled by `seed`.

        vae: if given, it must be the one that made the latents.
        dino: if given, and features are stored, it must be the one that made them, and
            every orbit has them.
        """
        index, objects = self.files.index, len(self)
        copies = index["copies"]
        place = self.files.folder
        if vae is not None and vae_fingerprint(vae) != index["vae"]:
            raise UserError(f"The latents in {place} were made by another VAE; {MAKE}.")
        stored = dino is not None and index["dino"] is not None
        if stored and digest(dino.state_dict()) != index["dino"]:
            raise UserError(f"The features in {place} are another DINO's; {MAKE}.")
        groups = [
            [copy * objects + k for copy in range(copies) for k in range(*ends)]
            for ends in itertools.pairwise(self.files.firsts)
        ]
        return Orbits(
            self,
            make_variants(objects, copies, index["seed"]),
            self.rings("latents"),
            index["latent_scale"],
            ShuffledOrder(groups, seed),
            self.rings("features") if stored else None,
            index["vae"],
        )

    def rings(self, name: str) -> Lazy:
        """Latents or features of every variant's ring: [copies * O, 16, ...]."""
        shape = self.files.index[name]
        objects = len(self)

        def view(item: int, k: int) -> Tensor:
            copy, which = divmod(item, objects)  # as in `make_variants`

            def one(file, name: str) -> Tensor:
                return file.get_slice(name)[copy : copy + 1, k : k + 1]

            return self.files.read(which, name, Field((1, 1, *shape), "f"), one)[0, 0]

        return lazy_images((objects * self.files.index["copies"], RING, *shape), view)


def open_shards(folder: str | Path, size: int | None = None) -> ShardViews:
    """The objects of a folder of shards; only its index is kept in memory.

    size: if given, the pictures must have so many pixels.
    Raises UserError where the folder is unfinished, or a file of it is missing or has
    another length; a file that is damaged inside raises it when read.
    """
    files = ShardFiles(folder)
    index = files.index
    count, views, side = index["objects"], index["views"], index["size"]
    if size not in (None, side):
        raise UserError(f"The shards in {folder} are of {side} px, not of {size} px; make others.")
    picture = Field((side, side, 4), "u1")
    depths = Field((side, side, 1), "f4", low=0)

    @lru_cache(OPEN_PICTURES)
    def rgba(item: int, k: int) -> Tensor:
        return files.read(item, f"rgba.{k}", picture, unpacked(unpack_picture))

    def depth(item: int, k: int) -> Tensor:
        return files.read(item, f"depth.{k}", depths, unpacked(unpack_depth))

    def unpacked(unpack: Callable[[Tensor], Tensor]):
        return lambda file, name: unpack(file.get_tensor(name))

    def angles(name: str) -> Lazy:
        field = replace(VIEWS[name], shape=(views,))
        row = partial(files.read, name=name, field=field, how=safe_open.get_tensor)
        return Lazy((count, views), row)

    shape = (count, views, side, side)
    rgb = lazy_images((*shape, 3), lambda item, k: rgba(item, k)[..., :3])
    alpha = lazy_images((*shape, 1), lambda item, k: rgba(item, k)[..., 3:])
    ids = [id for shard in index["shards"] for id in shard["ids"]]
    columns = (rgb, alpha, lazy_images((*shape, 1), depth))
    return ShardViews(ids, *columns, angles("azimuths"), angles("elevations"), files)


def is_shards(folder: str | Path) -> bool:
    """Whether a folder holds finished shards."""
    return "shards" in (_any_index(folder) or ())


def is_dataset(folder: str | Path) -> bool:
    """Whether a folder is one of `data/dataset.py`, whose index is a list."""
    return isinstance(_any_index(folder), list)


def _any_index(folder: str | Path) -> dict | list | None:
    check_readable(Path(folder) / "index.json")
    try:
        return read_json(Path(folder) / "index.json")
    except UNREADABLE:
        return None


def read_index(folder: str | Path) -> dict:
    """The index of a folder of shards, whose files have the lengths that it states."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise MissingFile(f"{folder} holds no finished shards: index.json is missing; {AGAIN}.")
    if is_dataset(folder):
        raise UserError(
            f"{folder} is a dataset folder, which `train --data` reads; "
            "make shards of it with `python -m gsv3d_lib shards`."
        )
    with explained(f"{path} cannot be read as shards", f"delete it and {AGAIN}"):
        index = read_json(path)
        check_index(index)
    for shard in index["shards"]:
        file = path.with_name(shard["file"])
        found = file.stat().st_size if file.is_file() else None
        if found != shard["bytes"]:
            short = f"has {found} bytes instead of {shard['bytes']}"
            have = "is missing" if found is None else short
            raise UserError(f"Shard {file} {have}; delete it and {AGAIN}.")
    return index


def check_index(index: dict) -> None:
    """Raises an error of `UNREADABLE` for what `write_shards` does not write."""
    if index["format"] != FORMAT:
        raise UserError(f"its format is not {FORMAT}")
    numbers = [index[name] for name in ("objects", "views", "size", "copies")] + index["latents"]
    numbers += index["features"] if index["dino"] is not None else []
    counts = all(type(number) is int and number > 0 for number in numbers)
    if not counts or type(index["seed"]) is not int:
        raise UserError("its numbers are no whole numbers above 0")
    scale, views = index["latent_scale"], index["views"]
    if not 0 < scale < math.inf or views < RING:
        raise UserError(f"its latent_scale is {scale}, its number of views {views}")
    for number, shard in enumerate(index["shards"]):
        if shard["file"] != shard_name(number):
            raise UserError(f"its file {number} is called {str(shard['file'])[:100]!r}")
    ids = [id for shard in index["shards"] for id in shard["ids"]]
    for id in ids:
        check_id(id)
    check_once(ids)
    if len(ids) != index["objects"]:
        raise UserError(f"it names {len(ids)} objects of {index['objects']}")


def shard_name(number: int) -> str:
    return f"{number:05d}.safetensors"


class ShardFiles:
    """The files of a folder of shards; objects are numbered through all of them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(folder)
        counts = (len(shard["ids"]) for shard in self.index["shards"])
        self.firsts = [0, *itertools.accumulate(counts)]
        self._open = lru_cache(OPEN_SHARDS)(lambda path: safe_open(path, "pt"))

    def read(
        self, item: int, name: str, field: Field, how: Callable[[safe_open, str], Tensor]
    ) -> Tensor:
        """`how(file, full name)` with the shard that holds an object.

        Raises UserError where it is damaged, or the result is not as `field` says.
        """
        shard = bisect_right(self.firsts, item) - 1
        path = self.folder / self.index["shards"][shard]["file"]
        with explained(f"Shard {path} is damaged", f"delete it and {AGAIN}", path):
            found = how(self._open(path), f"{item - self.firsts[shard]}.{name}")
            check_shape(name, found.numpy().dtype.str[1:], found.shape, field)
            check_values(name, found, field)
            return found


# ---------------------------------------------------------------- pictures and depth


def pack_picture(rgb: Tensor, alpha: Tensor) -> bytes:
    """uint8 [S, S, 3] and [S, S, 1] -> a lossless WebP."""
    buffer, rgba = io.BytesIO(), torch.cat([rgb, alpha], dim=-1).numpy()
    # more effort than method 1 makes it 5 % smaller in twice the time
    how = dict(format="WEBP", lossless=True, exact=True, quality=50, method=1)
    Image.fromarray(rgba, "RGBA").save(buffer, **how)
    return buffer.getvalue()


def unpack_picture(data: Tensor) -> Tensor:
    """The inverse, of the bytes as a tensor -> uint8 [S, S, 4]."""
    packed = data.numpy().tobytes()
    if max(webp_facts(packed[:30])[:2]) > MAX_SIDE:  # PIL would take memory first
        raise UserError(f"a picture has more than {MAX_SIDE} pixels a side")
    with Image.open(io.BytesIO(packed), formats=["WEBP"]) as picture:
        return torch.from_numpy(np.array(picture.convert("RGBA")))


def pack_depth(depth: Tensor) -> bytes:
    """float32 [S, S] -> bytes, without loss.

    They are the number of different depths, those, and 16-bit indices into them,
    deflated. Depth from dataset folders was stored in 16 bits, so 16 suffice.
    """
    # as bits: exact, and fast
    levels, codes = np.unique(depth.numpy().astype("<f4").view("<u4"), return_inverse=True)
    plain = np.uint32(len(levels)).tobytes() + levels.tobytes() + codes.astype("<u2").tobytes()
    return zlib.compress(plain, 1)


def unpack_depth(data: Tensor) -> Tensor:
    """The inverse, of the bytes as a tensor -> float32 [S, S, 1]."""
    longest = 4 + 6 * MAX_SIDE**2  # as many levels as pixels
    plain = zlib.decompressobj().decompress(data.numpy().tobytes(), longest + 1)
    if len(plain) > longest:
        raise UserError(f"a depth map has more than {MAX_SIDE} pixels a side")
    count = int(np.frombuffer(plain, "<u4", 1)[0])
    levels = np.frombuffer(plain, "<f4", count, 4)
    codes = np.frombuffer(plain, "<u2", -1, 4 + 4 * count)
    side = int(len(codes) ** 0.5)
    return torch.from_numpy(levels[codes].reshape(side, side, 1).astype("f4"))


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
    """Encode the objects of some dataset folders into `out`, file by file.

    Finished files are left alone.
    size: pixels.
    copies, seed: as for `load_orbits`.
    dino: store its features too.
    share: (k, n) writes only every n-th file from the k-th on, so that n processes or
        machines write one folder together.
    Returns the index, or None where other processes have files left to write. Raises
    UserError for an `out` that is a dataset folder, an object that cannot be read, and
    objects with different numbers of views.
    """
    if not 0 <= share[0] < share[1]:
        raise UserError(f"A share is K/N with 0 <= K < N; got {share[0]}/{share[1]}.")
    if is_dataset(out):
        lost = "whose index would be lost: shards need a folder of their own"
        raise UserError(f"{out} is a dataset folder, {lost}.")
    out = Path(out)
    rows = list_all(folders)
    variants = make_variants(len(rows), copies, seed)
    views = len(read_object(*rows[0]).azimuths)
    facts = {"format": FORMAT, "objects": len(rows), "views": views, "size": size}
    facts |= {"copies": copies, "seed": seed} | encoder_facts(vae, dino, size)
    shards = []
    for first in range(0, len(rows), shard_size):
        places = range(first, min(first + shard_size, len(rows)))
        group = [(*rows[k], variants[k :: len(rows)]) for k in places]
        mark = _shard_mark(facts, group)
        shards.append({"file": shard_name(len(shards)), "mark": mark, "objects": group})
    remove_leftovers(out)
    # files may change: until all are checked the folder is unfinished
    (out / "index.json").unlink(missing_ok=True)
    for shard in tqdm(shards[share[0] :: share[1]], desc="shards", disable=not progress):
        path = out / shard["file"]
        if shard_notes(path).get("mark") != shard["mark"]:
            encoded = [encode_object(*one, size, views, vae, dino) for one in shard["objects"]]
            save_shard(path, encoded, shard["mark"])
    for shard in shards:
        path = out / shard["file"]
        if shard_notes(path).get("mark") != shard["mark"]:
            return None
        shard["ids"] = [id for _, id, _ in shard.pop("objects")]
        shard["bytes"] = path.stat().st_size
    index = facts | {"shards": shards}
    with atomic_path(out / "index.json") as path:
        path.write_text(json.dumps(index, indent=1))
    return index


def encoder_facts(vae, dino, size: int) -> dict:
    """What the index says of the encoders, and of what they make of `size` pixels."""
    facts = {"latents": [4, size // 8, size // 8], "latent_scale": vae.config.scaling_factor}
    facts |= {"vae": vae_fingerprint(vae), "dino": None}
    if dino is not None:
        blank = torch.zeros(1, size, size, 3, device=dino.device)
        facts["dino"] = digest(dino.state_dict())
        facts["features"] = list(dino_features(dino, blank).shape[1:])
    return facts


def save_shard(path: Path, objects: list[dict[str, Tensor]], mark: str) -> None:
    """Write one file, with a note on what it was made of and on its bytes."""
    tensors = {}
    for place, one in enumerate(objects):
        tensors |= {f"{place}.{name}": value for name, value in one.items()}
    notes = json.dumps({"mark": mark, "digest": digest(tensors)})
    remove_leftovers(path.parent, path.name)
    with atomic_path(path) as temporary:
        # one entry: the order of several is random
        save_file(tensors, temporary, metadata={"shard": notes})


def encode_object(
    folder: Path, id: str, variants: list[Variant], size: int, number: int, vae, dino=None
) -> dict[str, Tensor]:
    """What a shard holds of one object, by name.

    variants: of this object.
    number: of views that it must have.
    """
    views = load_object(folder, id, size)
    rgb, alpha, depth = views.rgb[0], views.alpha[0], views.depth[0]
    if len(rgb) != number:
        counts = f"{id} has {len(rgb)}, others {number}"
        raise UserError(f"Objects of one training have equally many views; {counts}.")
    alone = [replace(variant, index=0) for variant in variants]
    tensors = {"azimuths": views.azimuths[0], "elevations": views.elevations[0]}
    for k in range(len(rgb)):
        packed = {"rgba": pack_picture(rgb[k], alpha[k]), "depth": pack_depth(depth[k, ..., 0])}
        for name, data in packed.items():
            tensors[f"{name}.{k}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    tensors["latents"] = encode_rings(views, alone, vae, progress=False)
    if dino is not None:
        rings = [views.scene(0, v.mirror, v.palette).rgb[:RING].to(dino.device) for v in alone]
        tensors["features"] = torch.stack([dino_features(dino, ring).cpu() for ring in rings])
    return tensors


def _shard_mark(facts: dict, objects: list[tuple[Path, str, list[Variant]]]) -> str:
    """Changes with all that a shard is made of; files are told by their length."""
    files = [file for folder, id, _ in objects for file in object_files(folder, id)]
    lengths = [file.stat().st_size if file.is_file() else -1 for file in files]
    names = [[id, *map(astuple, variants)] for _, id, variants in objects]
    return hashlib.sha256(json.dumps([facts, lengths, names]).encode()).hexdigest()


def shard_notes(path: Path) -> dict:
    """What `save_shard` noted; nothing for a damaged file, which is made again."""
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["shard"])
    except UNREADABLE:
        return {}


def check_shards(folder: str | Path) -> list[str]:
    """Read every byte -> one sentence for each shard that is not as it was written."""
    problems = []
    for shard in read_index(folder)["shards"]:
        path = Path(folder) / shard["file"]
        notes = shard_notes(path)
        if notes.get("mark") == shard["mark"]:
            with safe_open(path, "pt") as file:
                if digest({name: file.get_tensor(name) for name in file.keys()}) == notes["digest"]:
                    continue
        why = "its bytes are not those that were written"
        problems.append(f"Shard {path} is damaged ({why}); delete it and {AGAIN}.")
    return problems


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("shards", __doc__, "--weights", "--data", weights=None)
    add = parser.add_argument
    add("--out", type=output_path, required=True, metavar="FOLDER", help="the folder of shards")
    add("--copies", type=positive, help="variants of each object (default: the weights')")
    add("--seed", type=whole(0, 2**63 - 1), help="of the variants (default: the weights')")
    add("--features", action="store_true", help="store DINO's features of every ring view too")
    add("--share", default="0/1", metavar="K/N", help="write every N-th file from the K-th on")
    add("--check", action="store_true", help="only read every byte of --out, name damaged files")
    return parser


def run(args: argparse.Namespace) -> int | None:
    if args.check:
        problems = check_shards(args.out)
        print("\n".join(problems) or f"{args.out} is as it was written.")
        return 1 if problems else 0
    index = write_from_checkpoint(args)
    if index is None:
        print(f"This share of {args.out} is written; the index follows with the last share.")
        return None
    total = sum(shard["bytes"] for shard in index["shards"])
    counts = f"{index['objects']} objects, {len(index['shards'])} shards"
    print(f"{args.out}: {counts}, {total / 1e6:.1f} MB.")
    return None


def write_from_checkpoint(args: argparse.Namespace) -> dict | None:
    """`write_shards` with the models and the configuration of a checkpoint folder."""
    from ..weights.checkpoint import load_config, load_dino, load_model

    if not (args.weights and args.data):
        raise UserError("--weights and --data are needed to write shards.")
    share = tuple(int(number) for number in args.share.split("/") if number.isdigit())
    if len(share) != 2:
        raise UserError(f"--share takes K/N, for example 0/4; got {args.share!r}.")
    check_writable(args.out / "index.json")
    config = load_config(args.weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dino = load_dino(config, args.weights) if args.features else None
    if args.features and dino is None:
        raise UserError(f"{args.weights} has no DINO encoder; leave out --features.")
    vae, dino = load_model(args.weights, "vae").to(device), dino and dino.to(device)
    numbers = {"copies": args.copies or config.copies, "share": share, "dino": dino}
    numbers["seed"] = config.seed if args.seed is None else args.seed
    return write_shards(args.data, vae, args.out, config.image_size, **numbers)
