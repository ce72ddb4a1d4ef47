"""One notebook executed by papermill, with a record of the run beside it.

The executed notebook is written after every cell, and during long ones twice a minute,
so a killed run keeps what it had. What a stopped run had written is kept beside the new
one.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import nbformat
from nbformat.reader import NotJSONError

from ..system.command import check_writable, fault
from ..system.errors import MissingFile, UserError
from ..system.paths import atomic_path

# an output of this type carries numbers for the run record
METRICS = "application/vnd.gsv3d.metrics+json"
AUTOSAVE_SECONDS = 30


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills; the run ends as by Ctrl-C."""


def execute(notebook: Path, parameters: dict, out: Path) -> int:
    """`run_notebook` -> exit status: 1 where a cell failed or the kernel died."""
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    written = out / notebook.name
    try:
        run_notebook(notebook, parameters, out)
    except PapermillExecutionError as error:
        if error.ename in (UserError.__name__, MissingFile.__name__):  # what the user can mend
            raise UserError(error.evalue) from error
        fault(f"cell {error.exec_count} of {written} stopped: {error.evalue}")
        return 1
    except DeadKernelError:
        cause = "the kernel was killed, most likely for want of memory"
        fault(f"{written}: {cause}; the same command resumes its trainings.")
        return 1
    except NoSuchKernel as error:
        advice = "`python -m ipykernel install --user` adds it"
        raise UserError(f"There is no Jupyter kernel python3; {advice}.") from error
    except KeyboardInterrupt as error:
        sentence = f"stopped; {written} holds what was done. Run the same to resume."
        raise KeyboardInterrupt(sentence) from error
    return 0


def run_notebook(notebook: Path, parameters: dict, out: Path) -> dict:
    """Execute `notebook` into the folder `out` -> the run record, also in run.json.

    The record is written when the run starts and again when it ends, well or not; one
    that says "running" long after was killed. Raises what stopped the run.
    """
    import papermill

    check_writable(out / "run.json")
    out.mkdir(parents=True, exist_ok=True)
    keep_stopped(notebook, out)
    started = time.perf_counter()
    record = first_record(notebook, parameters)
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
    """SIGTERM raises `Terminated` inside, so kernel and training are ended too."""

    def stop(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_stopped(notebook: Path, out: Path) -> None:
    """Move what an unfinished run left in `out` aside, as NAME.stopped.ipynb."""
    written = out / notebook.name
    if written.is_file() and recorded_state(out) != "finished":
        os.replace(written, written.with_suffix(".stopped.ipynb"))


# ---------------------------------------------------------------- the record


def first_record(notebook: Path, parameters: dict) -> dict:
    """What is known of a run when it starts."""
    from ..system.provenance import changed_files, commit, environment, hardware

    return {
        "notebook": notebook.stem,
        "parameters": parameters,
        "commit": commit(),
        "changed_since_commit": changed_files(),
        "hardware": hardware(),
        "environment": environment(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "state": "running",
    }


def write_record(out: Path, record: dict) -> None:
    with atomic_path(out / "run.json") as path:
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def recorded_state(out: Path) -> str | None:
    """How the run in a folder ended; None where run.json is missing or damaged."""
    try:
        return json.loads((out / "run.json").read_text(encoding="utf-8"))["state"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def record(**metrics) -> None:
    """Show numbers in a notebook, and hand them to the record of its run.

    metrics: floats, scalar tensors, texts, or dicts of them.
    """
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
    except (OSError, NotJSONError):  # nothing was executed, or the disk was full before
        return {}
    metrics = {}
    for out in (out for cell in cells for out in cell.get("outputs", [])):
        metrics |= out.get("data", {}).get(METRICS, {})
    return metrics


def peak_memory() -> float | None:
    """Largest memory in GB of any ended process that this one started, if known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit, 2)
