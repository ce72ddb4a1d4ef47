"""One page for many objects: pictures, splats, or what was evaluated; two side by side.

    python -m gsv3d_lib gallery data/images --out gallery.html
    python -m gsv3d_lib gallery runs/demo mine.ply --out gallery.html
    python -m gsv3d_lib gallery mug.png --lora-scales 0 1
    python -m gsv3d_lib gallery mug.png \
        --weights data/checkpoints/tiny data/checkpoints/small
    python -m gsv3d_lib gallery data/results/small-gso.json \
        --objects ../shared/objects/gso

A PLY is shown as it is. A picture becomes an object first, once for every folder of
weights and every scale of the LoRA. A folder stands for the PLYs in it and below it, or
else for its pictures. A results file of `evaluate` stands for its objects: the true
views beside what is made of them now.
"""

import argparse
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from tqdm import tqdm

from ..gaussians import Gaussians
from ..system import command
from ..system.command import check_writable, input_path, output_path
from ..system.errors import MissingFile, UserError
from ..system.files import read_json
from ..system.paths import BEST
from .page import Item, save_page

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIEWS = 16  # pictures of a turn
SIZE = 128  # their side in pixels


def build_parser() -> argparse.ArgumentParser:
    parser = command.command_parser("gallery", __doc__, "--limit", limit=12)
    add = parser.add_argument
    add("things", type=input_path, nargs="+", help="PLYs, pictures, folders, results files")
    add("--out", type=output_path, default="gallery.html")
    add("--weights", type=input_path, nargs="+", default=[input_path(BEST)], help="for pictures")
    scale = command.number(-10, 10)
    add("--lora-scales", type=scale, nargs="+", default=[1.0], help="for pictures")
    add("--objects", type=input_path, help="dataset folder of a results file")
    return parser


def run(args: argparse.Namespace) -> None:
    out = output_path(args.out)
    check_writable(out)
    if out.exists():
        raise UserError(f"{out} is there already: name another file with --out.")
    things = [found for thing in args.things for found in expand(thing)]
    items = []
    for thing in tqdm(things, desc="objects", mininterval=5):
        items += items_of(thing, args)
    save_page(items, out, "GSV3D")
    print(
        f"{len(items)} objects in {out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser"
    )


def expand(thing: Path) -> list[Path]:
    """A file as it is; a folder as its PLYs, or else its pictures."""
    if not thing.exists():
        raise MissingFile(f"There is no {thing}: check the path.")
    if not thing.is_dir():
        return [thing]
    found = sorted(thing.rglob("*.ply"))
    found = found or sorted(p for p in thing.iterdir() if p.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{thing} holds neither a PLY nor a picture.")
    return found


def items_of(thing: Path, args: argparse.Namespace) -> Iterator[Item]:
    """What one file gives to the page."""
    kind = thing.suffix.lower()
    if kind == ".ply":
        yield item_of_ply(thing)
    elif kind == ".json":
        yield from items_of_results(thing, args)
    else:
        yield from items_of_picture(thing, args)


def item_of_ply(path: Path) -> Item:
    # a demo's folder has the object's name, and its PLY has everyone's
    name = path.parent.name if path.stem == "object" else path.stem
    return with_views(Item(name, Gaussians.load_ply(path)))


def items_of_picture(path: Path, args: argparse.Namespace) -> Iterator[Item]:
    from ..images import prepare_condition

    for weights, scale in product(args.weights, args.lora_scales):
        pipe = pipeline(weights)
        rgb, mask = prepare_condition(path, pipe.config.image_size)
        made = pipe.generate(rgb, mask=mask, lora_scale=scale, progress=False)
        name = path.stem
        name += f" · {weights.name}" if len(args.weights) > 1 else ""
        name += f" · λ = {scale:g}" if len(args.lora_scales) > 1 else ""
        yield with_views(Item(name, made.gaussians, rgb, elevation=made.elevation))


def items_of_results(path: Path, args: argparse.Namespace) -> Iterator[Item]:
    """The true views of each object, and what is made of its front now."""
    from ..data.dataset import load_object
    from ..evaluation.protocol import generate

    rows = read_json(path)
    rows = rows.get("rows") if isinstance(rows, dict) else None
    if args.objects is None or not rows or not all(isinstance(row.get("id"), str) for row in rows):
        raise UserError(f"{path} needs --objects, and rows with ids: `evaluate` writes such files.")
    pipe = pipeline(args.weights[0])
    for row in tqdm(rows[: args.limit], desc=path.stem, mininterval=5):
        scene = load_object(args.objects, row["id"], pipe.config.image_size).scene(0)
        made = generate(pipe, scene, seed=0)
        yield true_item(row["id"], scene)
        yield with_views(
            Item(f"{row['id']} · made", made.gaussians, made.image, elevation=made.elevation)
        )


def true_item(id: str, scene) -> Item:
    """The ring of views from the front on, where results have azimuth 0."""
    from ..data.dataset import FRONT, RING

    ring = scene.rgb[:RING].roll(-FRONT, dims=0)
    views = (255 * ring).round().byte().numpy()
    elevation = float(scene.elevations[FRONT])
    return Item(f"{id} · truth", None, scene.rgb[FRONT], views, elevation, "true views")


@cache
def pipeline(weights: Path):
    """A checkpoint, opened once."""
    from ..pipeline import GSV3DPipeline

    return GSV3DPipeline.from_pretrained(weights)


def with_views(item: Item) -> Item:
    """The item with a turn around it."""
    from . import turntable_frames

    item.views = turntable_frames(item.gaussians, SIZE, VIEWS, item.elevation)
    item.caption = item.caption or f"{len(item.gaussians.prune()):,} Gaussians"
    return item
