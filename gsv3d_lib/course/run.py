"""Run a notebook with other parameters, through papermill, and keep a record of the run.

    python -m gsv3d_lib run 05 --params paper                     notebooks/params/05_paper.yaml
    python -m gsv3d_lib run 05 --set steps=200 --set seed=1 --out runs/05-again

Before anything runs, all is checked that can be (`course/parameters.py`): names, types and ranges, pictures and checkpoints, and a
training that the notebook would start against its data and weights. `--check` stops after that.

The executed notebook is written after every cell, and during long ones twice a minute, so a killed run keeps what it had.
Given again, the same command executes the notebook from its first cell: what the stopped run had written is kept beside the
new one, rendered objects and finished stages are not made again, and the training of the section "Full run" goes on from its
last checkpoint. A cell's own short training starts afresh.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
from nbformat.reader import NotJSONError

from ..config import parse_setting, preset
from ..system.command import check_writable, exit_code, fault, input_path, output_path
from ..system.errors import UserError
from ..system.paths import ROOT, atomic_path
from .parameters import PARAMS, check_files, check_parameters, declared_parameters, read_parameters
from .refresh import find_notebooks

METRICS = "application/vnd.gsv3d.metrics+json"  # an output of this type carries numbers for the run record
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numba", "gsplat", "numpy")
AUTOSAVE_SECONDS = 30


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a cluster's scheduler sends before it kills: the run ends as by Ctrl-C."""


def check_training(parameters: dict) -> None:
    """What the notebook's section "Full run" would refuse at its end, found before its beginning.

    parameters: all of the notebook, given or default. Raises UserError or MissingFile with what to do.
    """
    if "scale" not in parameters:
        return
    preset(parameters["scale"])
    if "full_stages" in parameters:
        from ..cluster.launch import check, check_request, run_folder

        scale, stages, data = (parameters[name] for name in ("scale", "full_stages", "full_data"))
        processes = parameters["full_processes"] if "full_processes" in parameters else parameters["gpus"]
        check_request(scale, stages, data, processes)  # it is planned in any case
        if parameters["full_run"]:
            check(scale, stages, data, processes, run_folder(scale, parameters["full_steps"]))


def check_all(notebook: Path, given: dict) -> None:
    """All that can be known of a run without running it. Raises UserError or MissingFile with what to do."""
    declared = declared_parameters(notebook)
    everything = declared | check_parameters(given, declared)
    check_files(everything)
    check_training(everything)


def run_notebook(notebook: Path, parameters: dict, out: Path) -> dict:
    """Execute `notebook` into the folder `out`, with its prints on this terminal -> the run record, also in run.json.

    The record is written when the run starts and again when it ends, well or not; one that says "running" long after was
    killed. Raises what stopped the run.
    """
    import papermill

    from ..evaluation.evaluate import commit, hardware

    check_all(notebook, parameters)
    check_writable(out / "run.json")
    out.mkdir(parents=True, exist_ok=True)
    keep_stopped(notebook, out)
    started = time.perf_counter()
    record = {
        "notebook": notebook.stem,
        "parameters": parameters,
        "commit": commit(),
        "changed_since_commit": changed_files(),
        "hardware": hardware(),
        "environment": environment(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "state": "running",
    }
    write_record(out, record)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("traitlets", "asyncio", "blib2to3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with termination_raises():
            papermill.execute_notebook(
                literal(notebook),
                literal(out / notebook.name),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                progress_bar=True,
                log_output=True,
                autosave_cell_every=AUTOSAVE_SECONDS,
                coalesce_streams=True,
                store_widget_state=False,
            )
        record["state"] = "finished"
    except BaseException as error:  # also Ctrl-C: the record says how the run ended
        record["state"] = f"stopped by {type(error).__name__}"
        raise
    finally:
        record |= {"seconds": round(time.perf_counter() - started, 1), "peak_gb": peak_memory()}
        record["metrics"] = collected_metrics(out / notebook.name)
        write_record(out, record)
    return record


def literal(path: Path) -> str:
    """For papermill, which puts parameters between the braces of a path."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside, so that the kernel and a training below it are ended and the record is written."""

    def stop(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_stopped(notebook: Path, out: Path) -> None:
    """Move what an unfinished run left in `out` aside, as NAME.stopped.ipynb, before a new one writes there."""
    written = out / notebook.name
    if written.is_file() and recorded_state(out) != "finished":
        os.replace(written, written.with_suffix(".stopped.ipynb"))


def recorded_state(out: Path) -> str | None:
    """How the run in a folder ended, as its run.json says; None where that is missing or damaged."""
    try:
        return json.loads((out / "run.json").read_text(encoding="utf-8"))["state"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def environment() -> dict:
    """Python, the packages that numbers depend on, and the GPUs."""
    import torch

    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "packages": installed, "cuda": torch.version.cuda, "gpus": gpus}


def changed_files() -> list[str] | None:
    """Tracked files that differ from the commit; None outside a git checkout."""
    command = ["git", "diff", "--name-only", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return None


def record(**metrics) -> None:
    """Show numbers in a notebook, and hand them to the record of the run: floats, scalar tensors, or dicts of them."""
    from IPython.display import display

    metrics = {name: plain(value) for name, value in metrics.items()}
    display({METRICS: metrics, "text/plain": f"for the run record: {metrics}"}, raw=True)


def plain(value):
    """A number rounded to six digits, text as it is, a dict of such."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value if isinstance(value, str | bool | int) else float(f"{float(value):.6g}")


def collected_metrics(executed: Path) -> dict:
    """What `record` showed in an executed notebook, so far as it went."""
    try:
        cells = nbformat.read(executed, as_version=4).cells
    except (OSError, NotJSONError):  # nothing was executed, or the disk was full before it was written in full
        return {}
    shown = [
        out["data"][METRICS] for cell in cells for out in cell.get("outputs", []) if METRICS in out.get("data", {})
    ]
    return {name: value for metrics in shown for name, value in metrics.items()}


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
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def execute(notebook: Path, parameters: dict, out: Path) -> int:
    """`run_notebook`, and the exit status of a command: 1 where a cell failed or the kernel died, said in one sentence."""
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    written = out / notebook.name
    try:
        run_notebook(notebook, parameters, out)
    except PapermillExecutionError as error:
        fault(f"cell {error.exec_count} of {written} stopped: {error.evalue}")
        return 1
    except DeadKernelError:
        sentence = "the kernel was killed, most likely for want of memory; the same command resumes its trainings."
        fault(f"{written}: {sentence}")
        return 1
    except NoSuchKernel as error:
        raise UserError("There is no Jupyter kernel python3; `python -m ipykernel install --user` adds it.") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"stopped; {written} holds what was done. Run the same to resume.") from error
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gsv3d_lib run", description=__doc__.split("\n")[0])
    parser.add_argument("number", help="of the notebook, such as 05")
    parser.add_argument("--params", help="a YAML file, or the name of a set in notebooks/params, such as tiny or paper")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one parameter; repeatable")
    parser.add_argument("--out", type=output_path, help="folder for the executed notebook (default runs/NN-PARAMS)")
    parser.add_argument("--check", action="store_true", help="only check what can be checked without running")
    return exit_code(run, parser, arguments)


def run(args: argparse.Namespace) -> int:
    notebook, *others = find_notebooks([args.number])
    if others:
        raise UserError(f"{args.number} begins the names of {1 + len(others)} notebooks; give both digits, such as 05.")
    number, name = notebook.name[:2], args.params or "default"
    named = PARAMS / f"{number}_{name}.yaml"
    given = {} if args.params is None else read_parameters(named if named.is_file() else input_path(name))
    given |= dict(parse_setting(text) for text in args.set)
    out = args.out or Path("runs") / f"{number}-{Path(name).stem}"
    check_all(notebook, given)
    check_writable(out / "run.json")
    if args.check:
        print(f"{notebook.stem}: {len(given)} parameters fit.")
        return 0
    status = execute(notebook, given, out)
    if status == 0:
        print(f"Done: {out / notebook.name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
