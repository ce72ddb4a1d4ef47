"""The README's small picture of every notebook: one of the figures that it stores.

    python tools/thumbnails.py --out docs/images/course

The figure is the one with the most colour in it. Run it after `make notebooks`.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image, ImageOps

from gsv3d_lib.system.command import command_parser, exit_code, output_path
from gsv3d_lib.system.paths import ROOT, atomic_path

SIZE = (240, 135)  # pixels; shown at half of it
NOTEBOOKS = ROOT / "notebooks"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("thumbnails", __doc__)
    parser.add_argument("--out", type=output_path, default=ROOT / "docs/images/course")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        figures = pictures(path)
        if figures:
            save(max(figures, key=colourfulness), args.out / f"{path.stem[:2]}.webp")


def pictures(path: Path) -> list[Image.Image]:
    """The figures that a notebook stores, on white."""
    cells = nbformat.read(path, as_version=4).cells
    stored = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    found = [base64.b64decode(data["image/png"]) for data in stored if "image/png" in data]
    opened = [Image.open(io.BytesIO(data)).convert("RGBA") for data in found]
    return [Image.alpha_composite(Image.new("RGBA", im.size, "white"), im) for im in opened]


def colourfulness(picture: Image.Image) -> float:
    """How much of the thumbnail is neither white nor grey."""
    pixels = np.asarray(thumbnail(picture)).astype(float)
    return float((pixels.max(-1) - pixels.min(-1)).mean())


def thumbnail(picture: Image.Image) -> Image.Image:
    """The upper part of a tall figure, all of a wide one."""
    return ImageOps.fit(picture.convert("RGB"), SIZE, centering=(0.5, 0.1))


def save(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        thumbnail(picture).save(temporary, "WEBP", quality=80)


if __name__ == "__main__":
    sys.exit(main())
