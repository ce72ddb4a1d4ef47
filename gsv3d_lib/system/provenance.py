"""What made a result: the commit, the machine, the versions that numbers depend on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from .paths import ROOT, has_repository

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numba", "gsplat", "numpy")


def commit() -> str:
    """Of the checkout that runs; "unknown" in an installed package, or without git."""
    said = git("rev-parse", "--short", "HEAD") if has_repository() else None
    return (said or "").strip() or "unknown"


def changed_files() -> list[str] | None:
    """Tracked files that differ from the commit; None outside a git checkout."""
    said = git("diff", "--name-only", "HEAD")
    return None if said is None else said.split("\n")[:-1]


def git(*words: str) -> str | None:
    """What git says of this repository; None where it cannot say."""
    command = ["git", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def hardware() -> str:
    """What ran this, without names of machines."""
    device = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{device}, {platform.machine()}, torch {torch.__version__.split('+')[0]}"


def environment() -> dict:
    """Python, the packages that numbers depend on, and the GPUs."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version(), "packages": installed}
    return versions | {"cuda": torch.version.cuda, "gpus": gpus}
