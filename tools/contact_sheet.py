"""All objects of a dataset folder as a checkpoint makes them, on one picture.

    python tools/contact_sheet.py --weights data/checkpoints/small --objects FOLDER \
        --out docs/images/scans.webp

Four views of each result, three objects in a row, in the order of the folder's index:
the input's own view, then 45, 90 and 180 degrees from it. Only results are shown, no
picture of the objects themselves.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gsv3d_lib.data.dataset import FRONT, Scene, load_views
from gsv3d_lib.data.examples import relative_cameras, views_from_front
from gsv3d_lib.evaluation.protocol import generate
from gsv3d_lib.pipeline import GSV3DPipeline
from gsv3d_lib.rendering import render
from gsv3d_lib.system.command import check_writable, command_parser, exit_code, output_path
from gsv3d_lib.system.paths import atomic_path

ANGLES = (0, 45, 90, 180)  # degrees from the input view
COLUMNS = 3  # objects in a row
GAP = 6  # pixels between objects


def row_of(pipe: GSV3DPipeline, scene: Scene, **options) -> Tensor:
    """The result of one object from four sides [S, 4 S, 3]."""
    sides = views_from_front(*ANGLES)
    made = generate(pipe, scene, **options)
    views = render(made.gaussians, relative_cameras(scene, FRONT, sides)).rgb.clamp(0, 1)
    return torch.cat([*views], dim=1)


def arranged(rows: list[Tensor]) -> Tensor:
    """Pictures [S, W, 3] of one size, COLUMNS beside each other, on white."""
    height, width, _ = rows[0].shape
    lines = -(-len(rows) // COLUMNS)
    sheet = torch.ones(lines * (height + GAP) - GAP, COLUMNS * (width + GAP) - GAP, 3)
    for k, row in enumerate(rows):
        top, left = k // COLUMNS * (height + GAP), k % COLUMNS * (width + GAP)
        sheet[top : top + height, left : left + width] = row
    return sheet


def build_parser() -> argparse.ArgumentParser:
    common = ("--weights", "--objects", "--limit", "--steps", "--guidance", "--seed")
    parser = command_parser("contact_sheet", __doc__, *common)
    parser.prog = "python tools/contact_sheet.py"
    parser.add_argument("--out", type=output_path, required=True, help="a .webp or .png file")
    return parser


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)
    pipe = GSV3DPipeline.from_pretrained(args.weights)
    views = load_views([args.objects], pipe.config.image_size, limit=args.limit)
    options = {"seed": args.seed, "steps": args.steps, "guidance": args.guidance}
    rows = [row_of(pipe, views.scene(k), **options) for k in tqdm(range(len(views)), mininterval=5)]
    pixels = (arranged(rows) * 255).round().to(torch.uint8).numpy()
    with atomic_path(args.out) as temporary:
        Image.fromarray(pixels).save(temporary, format=Path(args.out).suffix[1:], quality=80)
    print(f"{args.out}: {len(rows)} objects")
    print("\n".join(views.ids))


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
