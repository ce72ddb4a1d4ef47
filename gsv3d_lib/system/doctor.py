"""What this machine has, what falls back to something slower, and how to fix it, in
plain sentences.

    python -m gsv3d_lib doctor

Exits with 1 only where something is missing that the library cannot do without; a
missing GPU is not.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from .command import command_parser, exit_code
from .paths import BEST, ROOT, has_repository

CHECKPOINTS = (ROOT / "data/checkpoints/tiny", ROOT / BEST)  # of the notebooks, and of the demo
SCANS = ROOT.parent / "shared" / "objects"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MARKS = {"good": "ok  ", "fallback": "note", "broken": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One sentence on one subject; state is "good", "fallback" (works, with a limit) or
    "broken".
    """

    state: str
    sentence: str


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = command_parser("doctor", __doc__)
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(_: argparse.Namespace) -> int:
    """Print every finding; returns 1 if any is broken, else 0."""
    findings = examine()
    for finding in findings:
        print(f"{MARKS[finding.state]}  {finding.sentence}")
    broken = sum(finding.state == "broken" for finding in findings)
    print(
        f"\n{broken} of these must be fixed first."
        if broken
        else "\nEverything that GSV3D needs is here."
    )
    return 1 if broken else 0


def examine() -> list[Finding]:
    """All findings about this interpreter and machine. Nothing is compiled or
    downloaded.
    """
    packages = package_findings(requirements())
    if any(finding.state == "broken" for finding in packages):
        return [python_finding(), *packages]  # the checks below would import what is missing
    return [
        python_finding(),
        *packages,
        torchvision_finding(),
        device_finding(),
        gsplat_finding(has_cuda(), has_nvcc(), has_compiled_kernels()),
        kernels_finding(),
        *optional_findings(),
        *map(checkpoint_finding, CHECKPOINTS if has_repository() else CHECKPOINTS[:1]),
        scans_finding(SCANS),
    ]


def python_finding() -> Finding:
    return Finding(
        "good", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}."
    )


# ---------------------------------------------------------------- packages


def requirements() -> list[Requirement]:
    """The core dependencies of pyproject.toml, as the installed package states them;
    empty if it is not installed.
    """
    try:
        stated = [Requirement(line) for line in requires("gsv3d-lib") or []]
    except PackageNotFoundError:
        return []
    return [r for r in stated if r.marker is None or r.marker.evaluate({"extra": ""})]


def package_findings(wanted: list[Requirement]) -> list[Finding]:
    """One finding per package that is missing or too old; one for all others together."""
    if not wanted:
        return [
            Finding(
                "broken",
                "gsv3d-lib itself is not installed; run `make install` or `pip install -e .`.",
            )
        ]
    problems = [finding for finding in map(package_finding, wanted) if finding is not None]
    good = len(wanted) - len(problems)
    return [
        Finding(
            "good", f"{good} of {len(wanted)} required packages are installed in a fitting version."
        ),
        *problems,
    ]


def package_finding(wanted: Requirement) -> Finding | None:
    """None when the package is there in a version that fits."""
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return Finding("broken", f"{wanted.name} is not installed; run `pip install '{wanted}'`.")
    if wanted.specifier.contains(Version(found), prereleases=True):
        return None
    return Finding(
        "broken",
        f"{wanted.name} {found} is outside {wanted.specifier}; run `pip install -U '{wanted}'`.",
    )


def torchvision_finding() -> Finding:
    """torchvision is not needed, but transformers and diffusers import it when it is
    there.
    """
    if not has_module("torchvision"):
        return Finding("good", "torchvision is not installed, and nothing here needs it.")
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a build for another torch fails in many ways
        return Finding(
            "broken",
            f"torchvision does not fit this torch ({type(error).__name__}), which breaks transformers and diffusers; "
            "run `pip uninstall torchvision`.",
        )
    return Finding(
        "good", f"torchvision {version('torchvision')} fits this torch; it is not needed here."
    )


# ---------------------------------------------------------------- device and renderer


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def has_nvcc() -> bool:
    """Whether there is a CUDA compiler where gsplat looks for one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") is not None or any(
        Path(home, "bin", "nvcc").is_file() for home in homes if home
    )


def has_compiled_kernels() -> bool:
    """Whether this gsplat came with its kernels compiled, as some wheels of its authors
    do.
    """
    return any(Path(importlib.util.find_spec("gsplat").origin).parent.glob("csrc*.so"))


def usable_cores() -> int:
    """CPU cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device_finding() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "fallback",
            f"torch {torch.__version__} sees no CUDA GPU, so everything runs on {usable_cores()} CPU core(s): enough for "
            "the shipped weights and to train tiny; small takes hours, paper a cluster.",
        )
    device = torch.cuda.get_device_properties(0)
    memory = device.total_memory / 2**30
    return Finding("good", f"torch {torch.__version__} uses {device.name} with {memory:.0f} GiB.")


def gsplat_finding(cuda: bool, nvcc: bool, compiled: bool) -> Finding:
    """Which rasteriser `render` will choose, given what the machine has."""
    if not cuda:
        return Finding(
            "fallback",
            "Without CUDA, render() uses the numba rasteriser; it compiles for a while once.",
        )
    if compiled:
        return Finding("good", "render() uses gsplat's CUDA kernels, which are compiled already.")
    if nvcc:
        return Finding(
            "good",
            "render() uses gsplat, which compiles its CUDA kernels for some minutes when first used.",
        )
    return Finding(
        "broken",
        "There is a GPU but no nvcc, so gsplat cannot compile its kernels; install the CUDA toolkit of torch's CUDA "
        "version and `pip install -e '.[gpu]'`, or hide the GPU with CUDA_VISIBLE_DEVICES= to run on the CPU.",
    )


def kernels_finding() -> Finding:
    """Whether the numba rasteriser is compiled once, or at every start."""
    from ..rendering import kernels

    if not kernels.CACHE:
        return Finding(
            "fallback",
            "No folder can be written to keep the numba rasteriser's compiled kernels, so every start compiles them again, "
            "about half a minute; set NUMBA_CACHE_DIR to a folder of yours.",
        )
    folder = kernels.project_gaussians.stats.cache_path
    return Finding("good", f"The numba rasteriser's compiled kernels are kept in {folder}.")


# ---------------------------------------------------------------- what may be absent


def optional_findings() -> list[Finding]:
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    return [
        choose(
            has_module("rembg") and has_module("onnxruntime"),
            "rembg cuts objects out of photos.",
            "Without rembg, a photo needs a plain or transparent background; `pip install -e '.[rembg]'` lifts that.",
        ),
        choose(
            has_module("DracoPy"),
            "DracoPy reads Draco-compressed glTF.",
            "Without DracoPy, Draco-compressed glTF cannot be read; `pip install -e '.[render]'` lifts that.",
        ),
        choose(
            browser is not None,
            f"{browser} draws static plotly pictures and runs the browser tests.",
            "Without Chrome or Chromium, plotly figures have no static picture and browser tests are skipped; install "
            "one, for example with `apt-get install chromium`.",
        ),
    ]


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def checkpoint_finding(folder: Path) -> Finding:
    name = os.path.relpath(folder, ROOT)
    advice = "fetch the whole repository, or train your own with `make train-tiny`"
    if not has_repository():
        return Finding(
            "fallback",
            "The shipped weights are not part of an installed package; clone the repository for them.",
        )
    parts = [
        part
        for part in ("vae", "clip", "dino", "unet", "decoder", "lora")
        if not (folder / part).is_dir()
    ]
    if not (folder / "gsv3d.json").is_file():
        return Finding("fallback", f"The shipped weights are not in {name}; {advice}.")
    return choose(
        not parts,
        f"The shipped weights are in {name}.",
        f"{name} lacks {', '.join(parts)}; {advice}.",
    )


def scans_finding(folder: Path) -> Finding:
    name = os.path.relpath(folder, ROOT)
    return choose(
        folder.is_dir(),
        f"The real objects are in {name}.",
        f"There are no real objects in {name}: their tests are skipped, and procedural objects take their place.",
    )


def choose(condition: bool, good: str, fallback: str) -> Finding:
    return Finding("good", good) if condition else Finding("fallback", fallback)


if __name__ == "__main__":
    sys.exit(main())
