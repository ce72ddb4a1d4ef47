"""Write every generated block of README and docs again: what `make tables` does.

    python tools/tables.py            # write them
    python tools/tables.py --check    # only say which files would change

A block stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. It is made of
what the repository holds: the package's docstring, and the results files that
evaluations, experiments and benchmarks left. Nothing is measured here. The README's
times of the notebooks are those that the notebooks' own headers state.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

import nbformat
from refresh import MEASURED, with_measured

import gsv3d_lib
from gsv3d_lib.course.parameters import find_notebooks
from gsv3d_lib.system.command import exit_code
from gsv3d_lib.system.paths import ROOT, atomic_path

RESULTS = ROOT / "data" / "results"
MARK = re.compile(r"<!-- ([\w-]+): begin -->")


def module_map() -> str:
    """The package's map of modules as a table."""
    rows = re.findall(r"^    ([\w/]+\.py) +(.+)$", gsv3d_lib.__doc__, re.M)
    lines = ["| module | what it is |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in rows)])


def results() -> str:
    from gsv3d_lib.evaluation.report import comparison

    return comparison(*(RESULTS / f"{name}-gso.json" for name in ("small", "tiny")))


def claims() -> str:
    from gsv3d_lib.evaluation.experiments import claims

    return claims(RESULTS)


def sweep() -> str:
    from gsv3d_lib.evaluation.experiments import table

    metrics = ["chamfer", "iou", "f_score", "psnr", "ssim", "ghosting"]
    return table(record("distillation_sweep"), "lambda_0", metrics)


def benchmark(name: str):
    """The module of a benchmark, which makes tables of its results file itself."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return import_module(name)


def record(name: str) -> dict:
    """What a benchmark left."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def performance(section: str) -> str:
    return benchmark("chain").tables(record("performance"))[section]


def memory() -> str:
    return benchmark("memory").markdown(record("memory")["rows"])


def data_cost() -> str:
    return benchmark("data_cost").report(record("data-cost")["scales"])


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {},
    "docs/map.md": {"map": module_map},
    "docs/results.md": {"results": results, "claims": claims, "sweep": sweep},
    "docs/performance.md": {
        section: partial(performance, section)
        for section in ("steps", "generation", "products", "comparisons")
    }
    | {"memory": memory},
    "docs/data.md": {"data-cost": data_cost},
}


def with_block(text: str, name: str, block: str) -> str:
    """The text with `block` between the two marks of a name."""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"There is not one block {name}.")
    before, rest = text.split(begin)
    return before + begin + block + end + rest.split(end)[1]


def with_times(text: str) -> str:
    """The README with the time and memory that each notebook's header states."""
    for path in find_notebooks([]):
        cells = nbformat.read(path, as_version=4).cells
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        if stated := MEASURED.search(prose):
            text = with_measured(text, path.stem, stated[0])
    return text


def rewritten(file: str) -> str:
    """A document with all its blocks made anew."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for name, make in BLOCKS[file].items():
        text = with_block(text, name, make())
    return with_times(text) if file == "README.md" else text


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/tables.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file differs")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> int:
    """1 where --check found a difference, else 0."""
    differ = 0
    for file in BLOCKS:
        text = rewritten(file)
        if text == (ROOT / file).read_text(encoding="utf-8"):
            continue
        differ = 1
        print(f"{file} {'differs' if args.check else 'was written'}")
        if not args.check:
            with atomic_path(ROOT / file) as path:
                path.write_text(text, encoding="utf-8")
    return differ if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
