"""`make demo`: notebook 00 through papermill on one image, then where the results lie.

python -m gsv3d_lib.demo [--image my.png] [--elevation auto] [--out runs/demo]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .command import ELEVATION_HELP, check_writable, degrees, exit_code
from .paths import BEST, ROOT, resolve
from .run import run_notebook

NOTEBOOK = ROOT / "notebooks" / "00_from_one_image_to_3d.ipynb"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gsv3d_lib.demo", description=__doc__)
    parser.add_argument("--image", default="data/images/demo.png")
    parser.add_argument("--elevation", type=degrees, default=15.0, metavar="DEGREES", help=ELEVATION_HELP)
    parser.add_argument("--out", default="runs/demo")
    return exit_code(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    from .elevation import estimate
    from .images import prepare_condition
    from .pipeline import load_config

    image = Path(args.image).resolve() if Path(args.image).is_file() else resolve(args.image)
    out, config = resolve(args.out), load_config(resolve(BEST))
    check_writable(out / "run.json")
    prepare_condition(image, config.image_size)  # fails here, in one sentence, and not inside a notebook
    elevation = estimate(image, resolve(BEST)) if args.elevation is None else args.elevation
    started = time.perf_counter()
    parameters = {
        "weights": BEST,
        "steps": config.sampling_steps,
        "elevation": elevation,
        "image_path": str(image),
        "out_dir": str(out),
    }
    run_notebook(NOTEBOOK, parameters, out)
    seconds = time.perf_counter() - started
    print(f"\nDone in {seconds:.0f} s. The results lie in {out}:")
    for path in sorted(p for p in out.iterdir() if p.is_file()):
        print(f"  {path.name:<32}{path.stat().st_size / 1e6:6.1f} MB")
    print(f"Open {out / 'viewer.html'} in a browser to turn the object.")


if __name__ == "__main__":
    sys.exit(main())
