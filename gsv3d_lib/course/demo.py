"""`make demo`: notebook 00 through papermill on one image, then where the results lie.

    python -m gsv3d_lib demo [--image my.png] [--elevation auto] [--out FOLDER]

Every run has a folder of its own: runs/demo/my, then runs/demo/my-2, ...
"""

import argparse
import time
from pathlib import Path

from ..system import command
from ..system.command import check_writable, input_path, output_path
from ..system.errors import MissingFile, UserError
from ..system.paths import BEST, ROOT, find, folder_name, from_repository
from .notebook import execute

NOTEBOOK = ROOT / "notebooks" / "00_from_one_image_to_3d.ipynb"


def build_parser() -> argparse.ArgumentParser:
    parser = command.command_parser("demo", __doc__, "--elevation", "--seed")
    parser.add_argument("--image", type=input_path, default="data/images/demo.png")
    parser.add_argument(
        "--out", type=output_path, help="folder (default: runs/demo/ and the image's name)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from ..data.elevation import estimate
    from ..export import FILES
    from ..images import prepare_condition
    from ..weights.checkpoint import load_config

    if not NOTEBOOK.is_file():
        raise MissingFile(f"There is no {NOTEBOOK.name} here.{from_repository('notebooks')}")
    image = args.image.absolute()
    weights = find(BEST).absolute()
    wanted = (args.out or ROOT / "runs/demo" / folder_name(image)).absolute()
    config = load_config(weights)
    check_text(image)
    check_text(wanted)
    check_writable(wanted / "run.json")
    prepare_condition(image, config.image_size)  # fails here, and not inside a notebook
    started = time.perf_counter()
    parameters = {
        "weights": BEST,
        "steps": config.sampling_steps,
        "elevation": estimate(image, weights) if args.elevation is None else args.elevation,
        "seed": args.seed,
        "image_path": str(image),
    }
    with command.results_folder(wanted, ["run.json", NOTEBOOK.name, *FILES.values()]) as out:
        status = execute(NOTEBOOK, parameters | {"out_dir": str(out)}, out)
    if status != 0:
        return status
    seconds = time.perf_counter() - started
    print(f"\nDone in {seconds:.0f} s. The results lie in {out}:")
    for path in sorted(p for p in out.iterdir() if p.is_file()):
        print(f"  {path.name:<32}{path.stat().st_size / 1e6:6.1f} MB")
    print(f"Open {out / 'viewer.html'} in a browser to turn the object.")
    return 0


def check_text(path: Path) -> None:
    """Raises UserError for a name that is no text, which a notebook could not hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        name = ascii(str(path))
        raise UserError(
            f"{name} is not valid UTF-8: rename it, or set a locale of UTF-8."
        ) from error
