"""Dataset folders in one file that is small enough to travel to a GPU machine.

    python tools/pack.py data/cache/mine ... --out unet.safetensors --ring
    python tools/pack.py data/cache/mine ... --out stage1.safetensors --depth-bits 8

Views travel as the WebP sheets that a dataset folder has anyway: as they are where they
fit the given size, else encoded again at the best quality that does. --ring leaves the
free views away, which the diffusion stage does not look at. Depth is added for stage 1,
at 64 pixels a side and 8 or 16 bits a pixel. `read_pack` gives `ViewTensors` as
`data.dataset.load_views` does.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import multiprocessing
import os
import sys
from bisect import bisect_left
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gsv3d_lib.data.dataset import (
    COLUMNS,
    RING,
    ObjectViews,
    ViewTensors,
    join_sheet,
    list_all,
    object_files,
    read_object,
    resize_views,
    split_sheet,
)
from gsv3d_lib.system import command
from gsv3d_lib.system.command import input_path, output_path
from gsv3d_lib.system.errors import MissingFile, UserError
from gsv3d_lib.system.files import UNREADABLE
from gsv3d_lib.system.paths import atomic_path, check_readable, reason

QUALITIES = (85, 75, 65, 55, 45, 35, 25)
SAMPLE = 30  # objects by whose sheets the quality is chosen
DEPTH_SIDE = 64
SPARE = 0.97  # of the allowed size, because a sample is not the whole


# ---------------------------------------------------------------- writing


def sheet_bytes(rgba: np.ndarray, quality: int) -> bytes:
    """Views uint8 [V, S, S, 4] as one WebP, as `data.dataset.write_object` does."""
    buffer = io.BytesIO()
    Image.fromarray(join_sheet(rgba), "RGBA").save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def depth_bytes(depth: np.ndarray, bits: int) -> tuple[bytes, float, float]:
    """z-depth float32 [V, S, S] -> a lossless WebP, the least depth, the range.

    0 stands for nothing.
    """
    step = max(1, depth.shape[1] // DEPTH_SIDE)
    small = depth[:, step // 2 :: step, step // 2 :: step]
    hit = small > 0
    low, high = (float(small[hit].min()), float(small[hit].max())) if hit.any() else (0.0, 1.0)
    span, levels = max(high - low, 1e-6), 2**bits - 2
    codes = np.where(hit, 1 + np.round((small - low) / span * levels), 0).astype("u2")
    channels = np.zeros((*codes.shape, 4), "u1")
    channels[..., 0] = codes >> 8
    channels[..., 1] = codes & 255
    channels[..., 3] = 255
    buffer = io.BytesIO()
    sheet = Image.fromarray(join_sheet(channels)[..., :3], "RGB")
    sheet.save(buffer, format="WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue(), low, span


def packed(row: tuple[Path, str], views: int | None, quality: int | None, bits: int) -> dict:
    """What a pack holds of one object. quality: None takes the sheet as it is."""
    seen = read_object(*row)
    rgba, depth = seen.rgba[:views], seen.depth[:views]
    sheet = object_files(*row)[0].read_bytes() if quality is None else sheet_bytes(rgba, quality)
    found = {"sheet": sheet, "depth": b"", "low": 0.0, "span": 1.0, "side": rgba.shape[1]}
    if bits:
        found["depth"], found["low"], found["span"] = depth_bytes(depth, bits)
    return found | {"azimuths": seen.azimuths[:views], "elevations": seen.elevations[:views]}


def size_of(objects: list[dict]) -> int:
    return sum(len(one["sheet"]) + len(one["depth"]) for one in objects)


def fitting_qualities(
    rows: list, views: int | None, bits: int, limit: float, pool
) -> tuple[int | None, ...]:
    """The qualities at which all objects should fit, by a sample, best first.

    None stands for the sheets as they are.
    """
    sample = rows[:: max(1, len(rows) // SAMPLE)]

    def too_large(quality: int | None) -> bool:
        make = partial(packed, views=views, quality=quality, bits=bits)
        size = size_of(list(pool.map(make, sample, chunksize=4))) / len(sample) * len(rows)
        return size > SPARE * limit

    choices = QUALITIES if views else (None, *QUALITIES)  # from large to small
    best = bisect_left(choices, True, key=lambda quality: not too_large(quality))
    return choices[best:]


def write_pack(
    folders: list,
    out: Path,
    megabytes: float,
    ring: bool = False,
    bits: int = 0,
    limit: int | None = None,
) -> dict:
    """All objects of some dataset folders in one file -> its facts.

    Raises UserError where they do not fit.
    """
    if bits not in (0, 8, 16):
        raise UserError(f"Depth is packed in 8 or 16 bits, or not at all (0); got {bits}.")
    rows, views = list_all(folders, limit), RING if ring else None
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for quality in fitting_qualities(rows, views, bits, 1e6 * megabytes, pool):
            work = partial(packed, views=views, quality=quality, bits=bits)
            objects = list(pool.map(work, rows, chunksize=8))
            if size_of(objects) <= SPARE * 1e6 * megabytes:
                break
        else:
            raise UserError(
                f"{len(rows)} objects do not fit {megabytes:g} MB even at quality "
                f"{QUALITIES[-1]}: take fewer (--limit)."
            )
    if len({(len(one["azimuths"]), one["side"]) for one in objects}) > 1:
        raise UserError(
            "Objects of one pack have equally many views of one size; pack these folders apart."
        )
    parts = [part for one in objects for part in (one["sheet"], one["depth"])]
    tensors = {
        "bytes": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8),
        "ends": torch.tensor(np.cumsum([len(part) for part in parts])),
        "depth": torch.tensor([[one["low"], one["span"]] for one in objects], dtype=torch.float64),
    }
    for name in ("azimuths", "elevations"):
        tensors[name] = torch.tensor(np.stack([one[name] for one in objects]), dtype=torch.float32)
    facts = {"side": objects[0]["side"], "bits": bits, "quality": quality, "objects": len(rows)}
    with atomic_path(out) as path:
        save_file(tensors, path, {"pack": json.dumps(facts | {"ids": [id for _, id in rows]})})
    return facts | {"views": tensors["azimuths"].shape[1], "bytes": out.stat().st_size}


# ---------------------------------------------------------------- reading


def read_pack(
    path: str | Path, size: int, processes: int = 1, limit: int | None = None
) -> ViewTensors:
    """The objects of a pack at `size` pixels.

    processes: that decode; they must not be asked for once this process has used its
        GPU. Without packed depth, `depth` is 0 everywhere and takes no memory.
    Raises MissingFile, and UserError where the file is damaged or of another size.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"There is no pack at {path}; tools/pack.py makes one.")
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            facts = json.loads(file.metadata()["pack"])
        ids, count = facts["ids"][:limit], len(facts["ids"][:limit])
        views = tensors["azimuths"].shape[1]
        columns = {
            "rgb": shared(count, views, size, size, 3),
            "alpha": shared(count, views, size, size, 1),
        }
        if facts["bits"]:
            bytes_of_depth = shared(count, views, size, size, 4)
            columns["depth"] = bytes_of_depth.view(torch.float32)
        shares = [range(k, count, processes) for k in range(processes)]
        work = partial(unpack, facts=facts, tensors=tensors, columns=columns, size=size)
        in_processes(work, shares)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from error
    columns.setdefault("depth", torch.zeros(1).expand(count, views, size, size, 1))
    angles = (tensors[name][:count] for name in ("azimuths", "elevations"))
    return ViewTensors(ids, columns["rgb"], columns["alpha"], columns["depth"], *angles)


def shared(*shape: int) -> Tensor:
    """Bytes that processes forked from this one fill for it."""
    return torch.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=torch.uint8).reshape(shape)


def in_processes(work, shares: list[range]) -> None:
    """`work(share)` for each share, in as many processes."""
    if len(shares) == 1:
        return work(shares[0])
    # the others start anew and would import torch again
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=alone, args=(work, share)) for share in shares]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise UserError("a process that unpacks it failed, see above")


def alone(work, share: range) -> None:
    """The work of a forked process: it has none of its parent's threads."""
    torch.set_num_threads(1)
    work(share)


def unpack(share: range, facts: dict, tensors: dict, columns: dict, size: int) -> None:
    """Decode some objects into their rows of `columns`."""
    data, ends = tensors["bytes"].numpy(), [0, *tensors["ends"].tolist()]
    views, side = tensors["azimuths"].shape[1], facts["side"]
    angles = tensors["azimuths"][0].numpy(), tensors["elevations"][0].numpy()
    for k in share:
        sheet, depth = (data[ends[2 * k + j] : ends[2 * k + j + 1]].tobytes() for j in (0, 1))
        rgba = split_sheet(picture(sheet, "RGBA"), views, side, side)
        deep = np.zeros((views, side, side), "f4")
        if depth:
            low, span = tensors["depth"][k].tolist()
            deep[:] = depth_of(depth, views, side, facts["bits"], low, span)
        seen = ObjectViews("", rgba, deep, None, *angles)
        parts = dict(zip(("rgb", "alpha", "depth"), resize_views(seen, size)))
        for name, column in columns.items():
            column[k] = parts[name]


def picture(data: bytes, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
        return np.array(image.convert(mode))


def depth_of(data: bytes, views: int, side: int, bits: int, low: float, span: float) -> np.ndarray:
    """The inverse of `depth_bytes`: float32 [V, side, side].

    Each packed value is repeated over its block.
    """
    sheet = picture(data, "RGBA").astype("u2")
    packed_side = sheet.shape[1] // COLUMNS
    tiles = split_sheet(sheet, views, packed_side, packed_side)
    codes = tiles[..., 0] * np.uint16(256) + tiles[..., 1]
    level = np.float32(span / (2**bits - 2))
    depth = np.where(codes > 0, low + (codes.astype("f4") - 1) * level, 0)
    block = side // packed_side
    return depth.repeat(block, 1).repeat(block, 2)


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="+", type=input_path, help="dataset folders")
    add("--out", type=output_path, required=True, metavar="FILE")
    size = command.number(0.01, 1000)
    add("--megabytes", type=size, default=28.0, help="what the file may have (default 28)")
    add("--ring", action="store_true", help="the 16 views of the ring only")
    add("--depth-bits", type=int, choices=(0, 8, 16), default=0, help="0: no depth")
    add("--limit", type=command.positive, help="only the first objects")
    return parser


def run(options: argparse.Namespace) -> None:
    command.check_writable(options.out)
    settings = dict(ring=options.ring, bits=options.depth_bits, limit=options.limit)
    facts = write_pack(options.folders, options.out, options.megabytes, **settings)
    quality = "sheets as they were" if facts["quality"] is None else f"quality {facts['quality']}"
    print(
        f"{options.out}: {facts['objects']} objects, {facts['views']} views of "
        f"{facts['side']} px, {quality}, depth in {facts['bits']} bits, "
        f"{facts['bytes'] / 1e6:.1f} MB."
    )


def main(arguments: list[str] | None = None) -> int:
    return command.exit_code(run, build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
