"""A dataset card for a folder of `make_dataset`, in the format of the Hugging Face Hub.

    python tools/card.py data/cache/mine --name "My chairs"

It counts what the folder's index and its first object say, and writes README.md into
the folder, from where `hf upload --repo-type dataset` takes it along. A README.md that
is there already stays.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import yaml

from gsv3d_lib.data.dataset import list_objects, read_object
from gsv3d_lib.system.command import command_parser, exit_code, input_path
from gsv3d_lib.system.errors import UserError
from gsv3d_lib.system.paths import atomic_path

HUB_LICENCES = {  # what the index says, and what the Hub calls it
    "MIT": "mit",
    "MIT-0": "mit-0",
    "CC0-1.0": "cc0-1.0",
    "CC-BY-3.0": "cc-by-3.0",
    "CC-BY-4.0": "cc-by-4.0",
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("card", __doc__)
    parser.prog = "python tools/card.py"
    parser.add_argument("folder", type=input_path)
    parser.add_argument("--name", default="Multi-view renderings of objects")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    path = args.folder / "README.md"
    if path.exists():
        raise UserError(f"{path} is there already: move it away to have another one written.")
    text = card(args.folder, args.name)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {path}")


def card(folder: Path, name: str) -> str:
    """The card's text: metadata for the Hub, then what the objects are."""
    rows = list_objects(folder)
    first = read_object(folder, rows[0]["id"])
    views, side = first.rgba.shape[:2]
    licences = Counter(row.get("licence", "not stated") for row in rows)
    known = {HUB_LICENCES.get(licence, "other") for licence in licences}
    front = {
        "license": known.pop() if len(known) == 1 else "other",
        "pretty_name": name,
        "task_categories": ["image-to-3d"],
        "tags": ["multi-view", "depth", "3d"],
        "size_categories": [size_category(len(rows))],
    }
    table = [f"| {licence} | {count} |" for licence, count in licences.most_common()]
    makers = Counter(row.get("creator") or row.get("source") or "not stated" for row in rows)
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {name}",
            "",
            f"{len(rows)} objects, {views} views of {side} pixels each, with depth and cameras.",
            "Made by `python -m gsv3d_lib make_dataset`.",
            "",
            "Each object is `ID.webp`, a sheet of RGBA views, and `ID.npz`, depth and cameras.",
            "`index.json` has a row for each. Cameras follow OpenCV: x right, y down, z forward;",
            "the world is z up, and the object lies in the unit ball.",
            "",
            "| licence | objects |",
            "|---|---|",
            *table,
            "",
            "Made by: " + ", ".join(f"{maker} ({count})" for maker, count in makers.most_common()),
            "",
        ]
    )


def size_category(objects: int) -> str:
    """The Hub's name for a number of rows."""
    limits = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K"}
    return next((name for limit, name in limits.items() if objects < limit), "100K<n<1M")


if __name__ == "__main__":
    sys.exit(main())
