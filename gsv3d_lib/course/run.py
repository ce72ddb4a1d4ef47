"""Run a notebook with other parameters, through papermill, and keep a record.

    python -m gsv3d_lib run 07 --params paper        notebooks/params/07_paper.yaml
    python -m gsv3d_lib run 07 --set steps=200 --set seed=1 --out runs/07-again

Before anything runs, all is checked that can be (`course/parameters.py`): names, types
and ranges, pictures and checkpoints, and a training that the notebook would start
against its data and weights. `--check` stops after that.

Given again, the same command executes the notebook from its first cell. Rendered
objects and finished stages are not made again, and the training of the section "Full
run" goes on from its last checkpoint. A cell's own short training starts afresh.
"""

import argparse
from pathlib import Path

from ..config import parse_setting, preset
from ..system.command import check_writable, command_parser, input_path, output_path
from ..system.errors import UserError
from .notebook import execute
from .parameters import (
    PARAMS,
    check_files,
    check_parameters,
    declared_parameters,
    find_notebooks,
    read_parameters,
)


def check_training(parameters: dict) -> None:
    """Refuse at once what the notebook's section "Full run" would refuse at its end.

    parameters: all of the notebook, given or default. Raises UserError.
    """
    if "scale" not in parameters:
        return
    preset(parameters["scale"])
    if "full_stages" in parameters:
        from ..cluster.job import check, check_request, run_folder

        asked = [parameters[name] for name in ("scale", "full_stages", "full_data")]
        gpus = parameters.get("full_processes", parameters.get("gpus"))
        check_request(*asked, gpus)  # it is planned in any case
        if parameters["full_run"]:
            check(*asked, gpus, run_folder(parameters["scale"], parameters["full_steps"]))


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("run", __doc__)
    add = parser.add_argument
    add("number", help="of the notebook, such as 05")
    add("--params", help="a YAML file, or a set in notebooks/params, such as tiny or paper")
    add(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one parameter; repeatable"
    )
    add("--out", type=output_path, help="folder (default: runs/NN-PARAMS)")
    add("--check", action="store_true", help="only check what can be checked without running")
    return parser


def run(args: argparse.Namespace) -> int:
    notebook, *others = find_notebooks([args.number])
    if others:
        raise UserError(
            f"{args.number} begins the names of {1 + len(others)} notebooks; "
            "give both digits, such as 05."
        )
    name = args.params or "default"
    given = {}
    if args.params is not None:
        named = PARAMS / f"{notebook.name[:2]}_{name}.yaml"
        given = read_parameters(named if named.is_file() else input_path(name))
    given |= dict(parse_setting(text) for text in args.set)
    out = args.out or Path("runs") / f"{notebook.name[:2]}-{Path(name).stem}"
    declared = declared_parameters(notebook)
    everything = declared | check_parameters(given, declared)
    check_files(everything)
    check_training(everything)
    check_writable(out / "run.json")
    if args.check:
        print(f"{notebook.stem}: {len(given)} parameters fit.")
        return 0
    status = execute(notebook, given, out)
    if status == 0:
        print(f"Done: {out / notebook.name}")
    return status
