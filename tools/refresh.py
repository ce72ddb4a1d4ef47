"""Run notebooks in place and write what a reader sees: outputs, times and memory.

    python tools/refresh.py [02 05 ...] [--out FOLDER]
    python tools/refresh.py --hero docs/images/hero.webp    # the README's picture

Every notebook runs on a fresh kernel in the notebooks' folder. What was measured goes
between `<!-- measured -->` and `<!-- /measured -->`, in its first cells and in its row
of the README's table. What GitHub cannot show is left out: widgets and their state (an
explorer keeps its page of frames), and cell timings. A notebook that fails is left as
it was.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
from tqdm import tqdm

from gsv3d_lib.course.parameters import NOTEBOOKS, find_notebooks
from gsv3d_lib.system.command import check_writable, exit_code, output_path
from gsv3d_lib.system.doctor import usable_cores
from gsv3d_lib.system.paths import BEST, ROOT, atomic_path, find

MEASURED = re.compile(r"<!-- measured -->.*?<!-- /measured -->")
WIDGET = "application/vnd.jupyter.widget-view+json"
HERO = ("house", "car", "chair", "face", "mug")  # the README's picture
# What a kernel is asked at its end; GB on Linux.
PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"


def run_notebook(path: Path, cell_timeout: int = 900) -> tuple[nbformat.NotebookNode, float, float]:
    """Execute a notebook -> (it with outputs, seconds, peak GB of its kernel)."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
    client = NotebookClient(
        notebook,
        timeout=cell_timeout,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    bar = tqdm(total=len(notebook.cells), desc=path.stem, unit="cell")
    client.on_cell_complete = lambda **_: bar.update()
    started = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - started
    bar.close()
    peak = float(notebook.cells.pop().outputs[0].text)
    return notebook, seconds, peak


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep what shows without a kernel; number the cells as a reader counts them."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for out in cell.outputs:  # an explorer has a page of frames beside its widget
                if out.get("data", {}).pop(WIDGET, None) is not None:
                    out.data.pop("text/plain", None)
            cell.outputs = [out for out in cell.outputs if out.get("data", True)]
    return notebook


def stated(seconds: float, gigabytes: float, cores: int) -> str:
    """The sentence of the header: "41 s, 1.2 GB on 2 CPU cores"."""
    return f"{seconds:.0f} s, {gigabytes:.1f} GB on {cores} CPU core{'s' if cores > 1 else ''}"


def marked(sentence: str) -> str:
    """The sentence between its marks."""
    return f"<!-- measured -->{sentence}<!-- /measured -->"


def refresh(path: Path, out: Path) -> str:
    """Run one notebook and write it to `out`; returns what was measured."""
    notebook, seconds, peak = run_notebook(path)
    sentence = stated(seconds, peak, usable_cores())
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = MEASURED.sub(lambda _: marked(sentence), cell.source)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / path.name) as temporary:
        nbformat.write(tidy(notebook), temporary)
    return sentence


def with_measured(readme: str, name: str, measured: str) -> str:
    """The README's text with the marked sentence in the row of a notebook."""
    lines = readme.split("\n")
    for k, line in enumerate(lines):
        if line.startswith("|") and f"notebooks/{name}" in line:
            lines[k] = MEASURED.sub(lambda _: measured, line)
    return "\n".join(lines)


def update_readme(name: str, sentence: str, readme: Path = ROOT / "README.md") -> None:
    """Write the notebook's row of the README's table."""
    text = with_measured(readme.read_text(encoding="utf-8"), name, marked(sentence))
    with atomic_path(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


def draw_hero(path: Path, weights: Path, names: tuple[str, ...] = HERO, size: int = 160) -> None:
    """Bundled pictures, and what `weights` make of them from eight sides."""
    import torch

    from gsv3d_lib.cameras import orbit_cameras
    from gsv3d_lib.course.figures import image_grid
    from gsv3d_lib.images import prepare_condition
    from gsv3d_lib.pipeline import GSV3DPipeline
    from gsv3d_lib.rendering import render

    pipe = GSV3DPipeline.from_pretrained(weights, device="cpu")
    angles, pictures = torch.arange(8) * 45.0, []
    for name in tqdm(names, unit="picture"):
        image = ROOT / "data" / "images" / f"{name}.png"
        made = pipe(image, seed=0, progress=False)
        seen = render(made, orbit_cameras(angles, 15.0, size)).rgb.clamp(0, 1)
        pictures += [prepare_condition(image, size)[0], *seen]
    titles = ["input", *(f"{angle:.0f}°" for angle in angles)]
    figure = image_grid(pictures, titles=titles, columns=9, width=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format=path.suffix[1:])


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/refresh.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("numbers", nargs="*", help="such as 02; all notebooks by default")
    parser.add_argument("--out", type=output_path, help="folder to write to (default: in place)")
    parser.add_argument(
        "--hero", type=output_path, metavar="PICTURE", help="only draw the README's picture"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> int:
    """1 if a notebook failed, else 0: the others still run."""
    from nbclient.exceptions import CellControlSignal, DeadKernelError

    if args.hero is not None:
        check_writable(args.hero)
        draw_hero(args.hero, find(BEST))
        return 0
    failed, out = 0, args.out or NOTEBOOKS
    for path in find_notebooks(args.numbers):
        check_writable(out / path.name)
        try:
            sentence = refresh(path, out)
        # a failing cell: its message is the news
        except (CellControlSignal, DeadKernelError) as error:
            print(f"{path.stem} failed and was left as it was.\n{error}", file=sys.stderr)
            failed = 1
            continue
        size = (out / path.name).stat().st_size / 1e6
        print(f"{path.stem}: {sentence}, {size:.2f} MB")
        if out.absolute() == NOTEBOOKS:
            update_readme(path.stem, sentence)
    return failed


if __name__ == "__main__":
    sys.exit(main())
