"""Run a notebook with other parameters, through papermill, and keep a record of the run.

    python -m gsv3d_lib.run 05 --params long                      notebooks/params/05_long.yaml
    python -m gsv3d_lib.run 05 --set steps=200 --set seed=1 --out runs/05-again

papermill only warns of a parameter that does not exist and takes a string for a number. Here names and types are checked
against the notebook's parameters cell before anything runs. The executed notebook is written after every cell, so a killed
run keeps what it had; training inside resumes from its own checkpoints when the same command is given again.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import yaml

from .config import parse_setting
from .paths import ROOT, atomic_path
from .refresh import NOTEBOOKS, find_notebooks

PARAMS = NOTEBOOKS / "params"


def declared_parameters(notebook: Path) -> dict:
    """Names and default values of the cell tagged `parameters`. Raises ValueError where there is none."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            nodes = ast.parse(cell.source).body
            return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes if isinstance(node, ast.Assign)}
    raise ValueError(f"{notebook.name} has no cell with the tag `parameters`.")


def check_parameters(given: dict, declared: dict) -> dict:
    """The given parameters, each known and of its default's type (a whole number may stand for a float).

    Raises ValueError with all that is wrong, in one sentence each.
    """
    faults = []
    for name, value in given.items():
        if name not in declared:
            faults.append(f"There is no parameter {name!r}; the notebook has {', '.join(declared)}.")
            continue
        wanted = type(declared[name])
        number = wanted is float and type(value) is int
        if type(value) is not wanted and not number:
            hint = " Write 1.0e-3, not 1e-3: YAML reads that as text." if "e-" in str(value) else ""
            faults.append(f"{name} is a {wanted.__name__}; got {value!r} ({type(value).__name__}).{hint}")
    if faults:
        raise ValueError(" ".join(faults))
    return given


def read_parameters(path: str | Path) -> dict:
    """A YAML file of `name: value` lines. Raises FileNotFoundError, or ValueError where it is no such file."""
    path = Path(path)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in PARAMS.glob("*.yaml")))
        raise FileNotFoundError(f"There is no parameter file {path}; notebooks/params holds {there}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path.name} should hold lines such as `steps: 200`; it holds a {type(values).__name__}.")
    return values


def run_notebook(notebook: Path, parameters: dict, out: Path) -> dict:
    """Execute `notebook` into the folder `out`, with its prints on this terminal -> the run record, also in run.json.

    The record is written when the run starts and again when it ends, well or not.
    """
    import papermill

    from .evaluate import commit, hardware

    check_parameters(parameters, declared_parameters(notebook))
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    record = {
        "notebook": notebook.stem,
        "parameters": parameters,
        "commit": commit(),
        "hardware": hardware(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "state": "running",
    }
    write_record(out, record)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("traitlets", "asyncio", "blib2to3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(out / notebook.name),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            progress_bar=True,
            log_output=True,
            coalesce_streams=True,
            store_widget_state=False,
        )
        record["state"] = "finished"
    except BaseException as error:  # also Ctrl-C: the record says how the run ended
        record["state"] = f"stopped by {type(error).__name__}"
        raise
    finally:
        write_record(out, record | {"seconds": round(time.perf_counter() - started, 1), "peak_gb": peak_memory()})
    return record


def peak_memory() -> float | None:
    """Largest memory of any process that this one has started and seen end, in GB; None where the system cannot say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit, 2)


def write_record(out: Path, record: dict) -> None:
    with atomic_path(out / "run.json") as path:
        path.write_text(json.dumps(record, indent=1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gsv3d_lib.run", description=__doc__.split("\n")[0])
    parser.add_argument("number", help="of the notebook, such as 05")
    parser.add_argument("--params", help="a YAML file, or the name of a set in notebooks/params, such as long")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one parameter; repeatable")
    parser.add_argument("--out", type=Path, help="folder for the executed notebook (default runs/NN-PARAMS)")
    parser.add_argument("--check", action="store_true", help="only check the parameters")
    args = parser.parse_args(arguments)
    try:
        (notebook,) = find_notebooks([args.number])
        named = PARAMS / f"{args.number}_{args.params}.yaml"
        given = {} if args.params is None else read_parameters(named if named.is_file() else args.params)
        given |= dict(parse_setting(text) for text in args.set)
        check_parameters(given, declared_parameters(notebook))
    except (ValueError, FileNotFoundError) as error:
        print(f"gsv3d: {error}", file=sys.stderr)
        return 2
    if args.check:
        print(f"{notebook.stem}: {len(given)} parameters fit.")
        return 0
    from papermill.exceptions import PapermillExecutionError

    out = args.out or ROOT / "runs" / f"{args.number}-{Path(args.params or 'default').stem}"
    try:
        run_notebook(notebook, given, out)
    except PapermillExecutionError as error:
        print(f"gsv3d: cell {error.exec_count} of {out / notebook.name} stopped: {error.evalue}", file=sys.stderr)
        return 1
    print(f"Done: {out / notebook.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
