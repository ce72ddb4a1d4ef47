"""`make demo`: notebook 00 through papermill on one image, then where the results lie.

python -m gsv3d_lib demo [--image my.png] [--elevation auto] [--out FOLDER]

Every run has a folder of its own: runs/demo/my, then runs/demo/my-2, ...
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..system.command import ELEVATION_HELP, check_writable, degrees, exit_code, results_folder
from ..system.errors import UserError
from ..system.paths import BEST, ROOT, folder_name, resolve
from .run import run_notebook

NOTEBOOK = ROOT / "notebooks" / "00_from_one_image_to_3d.ipynb"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gsv3d_lib demo", description=__doc__)
    parser.add_argument("--image", default="data/images/demo.png")
    parser.add_argument("--elevation", type=degrees, default=15.0, metavar="DEGREES", help=ELEVATION_HELP)
    parser.add_argument("--out", help="folder (default: runs/demo/ and the image's name)")
    return exit_code(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    from ..elevation import estimate
    from ..export import FILES
    from ..images import prepare_condition
    from ..weights.checkpoint import load_config

    image = Path(args.image).resolve() if Path(args.image).is_file() else resolve(args.image)
    wanted = resolve(args.out or Path("runs/demo") / folder_name(image))
    config = load_config(resolve(BEST))
    check_text(image)
    check_text(wanted)
    check_writable(wanted / "run.json")
    prepare_condition(image, config.image_size)  # fails here, in one sentence, and not inside a notebook
    elevation = estimate(image, resolve(BEST)) if args.elevation is None else args.elevation
    started = time.perf_counter()
    with results_folder(wanted, ["run.json", NOTEBOOK.name, *FILES.values()]) as out:
        execute(image, elevation, config.sampling_steps, out)
    seconds = time.perf_counter() - started
    print(f"\nDone in {seconds:.0f} s. The results lie in {out}:")
    for path in sorted(p for p in out.iterdir() if p.is_file()):
        print(f"  {path.name:<32}{path.stat().st_size / 1e6:6.1f} MB")
    print(f"Open {out / 'viewer.html'} in a browser to turn the object.")


def check_text(path: Path) -> None:
    """Raises ValueError where the name is no text: a notebook is, and could not hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{ascii(str(path))} is not valid UTF-8: rename it.") from error


def execute(image: Path, elevation: float, steps: int, out: Path) -> None:
    """Notebook 00 with the weights of the demo. What a user can mend is raised as such."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    parameters = {
        "weights": BEST,
        "steps": steps,
        "elevation": elevation,
        "image_path": str(image),
        "out_dir": str(out),
    }
    try:
        run_notebook(NOTEBOOK, parameters, out)
    except PapermillExecutionError as error:
        if error.ename not in ("UserError", "MissingFile"):
            raise
        raise UserError(error.evalue) from error
    except DeadKernelError as error:
        raise UserError(f"{out / NOTEBOOK.name}: the kernel was killed, most likely for want of memory.") from error


if __name__ == "__main__":
    sys.exit(main())
