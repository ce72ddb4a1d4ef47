"""What this machine has, what falls back to something slower, and how to fix it.

    python -m gsv3d_lib doctor

Nothing is compiled or downloaded. Exits with 1 only where something is missing that the
library cannot do without; a missing GPU is not.
"""

import argparse
import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from .command import command_parser
from .paths import BEST, ROOT, TINY, has_repository

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
GOOD, FALLBACK, BROKEN = "ok  ", "note", "FAIL"


class Finding(NamedTuple):
    """One sentence on one subject, with its mark; FALLBACK works, with a limit."""

    mark: str
    sentence: str


def build_parser() -> argparse.ArgumentParser:
    return command_parser("doctor", __doc__)


def run(_: argparse.Namespace) -> int:
    """Print every finding; returns 1 if any is broken, else 0."""
    try:
        findings = package_findings([Requirement(line) for line in requires("gsv3d-lib")])
    except PackageNotFoundError:
        findings = [Finding(BROKEN, "gsv3d-lib is not installed; run `make install`.")]
    if all(finding.mark != BROKEN for finding in findings):  # else imports would fail
        import torch

        findings += [device_finding(), kernels_finding(), *optional_findings()]
        findings += [gsplat_finding(torch.cuda.is_available(), has_nvcc(), has_compiled_kernels())]
        findings += [checkpoint_finding(ROOT / name) for name in (TINY, BEST) if has_repository()]
    print(f"{GOOD}  Python {platform.python_version()} on {platform.platform(terse=True)}.")
    for finding in findings:
        print(f"{finding.mark}  {finding.sentence}")
    broken = sum(finding.mark == BROKEN for finding in findings)
    here = "Everything that GSV3D needs is here."
    print(f"\n{broken} of these must be fixed first." if broken else f"\n{here}")
    return 1 if broken else 0


def package_findings(wanted: list[Requirement]) -> list[Finding]:
    """One finding for each package that is missing or does not fit, or one for all."""
    findings = []
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            sentence = f"{requirement} is needed, {found} is installed"
            findings.append(Finding(BROKEN, f"{sentence}; run `pip install -U '{requirement}'`."))
    return findings or [Finding(GOOD, f"All {len(wanted)} required packages fit.")]


def device_finding() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding(GOOD, f"torch {torch.__version__} uses {torch.cuda.get_device_name()}.")
    cpu = f"torch {torch.__version__} has {usable_cores()} CPU core(s) and no CUDA GPU"
    return Finding(FALLBACK, f"{cpu}: enough for the notebooks and to train `tiny`.")


def usable_cores() -> int:
    """CPU cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def has_nvcc() -> bool:
    """Whether there is a CUDA compiler where gsplat looks for one."""
    homes = [os.environ.get(name, "/usr/local/cuda") for name in ("CUDA_HOME", "CUDA_PATH")]
    return any(map(shutil.which, ["nvcc", *(f"{home}/bin/nvcc" for home in homes)]))


def has_compiled_kernels() -> bool:
    """Whether this gsplat came with its kernels compiled, as some of its wheels do."""
    return any(Path(importlib.util.find_spec("gsplat").origin).parent.glob("csrc*.so"))


def gsplat_finding(cuda: bool, nvcc: bool, compiled: bool) -> Finding:
    """Which rasteriser `render` will choose, given what the machine has."""
    if not cuda:
        return Finding(FALLBACK, "Without CUDA, render() uses the numba rasteriser.")
    if compiled:
        return Finding(GOOD, "render() uses gsplat's CUDA kernels, which are compiled already.")
    if nvcc:
        return Finding(GOOD, "render() uses gsplat, which compiles for minutes when first used.")
    advice = "install the CUDA toolkit, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
    return Finding(BROKEN, f"There is a GPU but no nvcc, so gsplat cannot compile; {advice}.")


def kernels_finding() -> Finding:
    """Whether the numba rasteriser is compiled once, or at every start."""
    from ..rendering import kernels

    if kernels.CACHE:
        folder = kernels.project_gaussians.stats.cache_path
        return Finding(GOOD, f"The numba rasteriser's compiled kernels are kept in {folder}.")
    advice = "set NUMBA_CACHE_DIR to a folder of yours"
    return Finding(FALLBACK, f"The numba rasteriser compiles at every start; {advice}.")


def optional_findings() -> list[Finding]:
    """What is absent and can be done without; and a torchvision that harms."""
    absent = []
    if not (importlib.util.find_spec("rembg") and importlib.util.find_spec("onnxruntime")):
        absent.append("photos need a plain background (`pip install -e '.[rembg]'` lifts that)")
    if not any(map(shutil.which, BROWSERS)):
        absent.append("no browser tests and no static plotly pictures (install Chromium)")
    findings = [Finding(FALLBACK, f"Optional: {sentence}.") for sentence in absent]
    try:  # not needed, but transformers and diffusers import it where it is installed
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except Exception as error:  # a build for another torch fails in many ways
        sentence = f"torchvision does not fit this torch ({type(error).__name__})"
        findings.append(Finding(BROKEN, f"{sentence}; run `pip uninstall torchvision`."))
    return findings


def checkpoint_finding(folder: Path) -> Finding:
    """Whether the shipped weights in `folder` are whole."""
    name = os.path.relpath(folder, ROOT)
    parts = ("gsv3d.json", "vae", "clip", "dino", "unet", "decoder", "lora")
    lacking = [part for part in parts if not (folder / part).exists()]
    if not lacking:
        return Finding(GOOD, f"The shipped weights are in {name}.")
    advice = "fetch the whole repository, or train your own with `make train-tiny`"
    return Finding(FALLBACK, f"{name} lacks {', '.join(lacking)}; {advice}.")
