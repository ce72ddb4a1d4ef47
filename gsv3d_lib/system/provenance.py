"""What made a result: the commit, the machine, and the versions that numbers depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from .paths import ROOT, has_repository

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numba", "gsplat", "numpy")


def commit() -> str:
    """Of the checkout that runs; "unknown" in an installed package, or without git."""
    if not has_repository():
        return "unknown"
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return (
            subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
            or "unknown"
        )
    except OSError:
        return "unknown"


def hardware() -> str:
    """What ran this, without names of machines."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
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
    return {
        "python": platform.python_version(),
        "packages": installed,
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def changed_files() -> list[str] | None:
    """Tracked files that differ from the commit; None outside a git checkout."""
    command = ["git", "diff", "--name-only", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return None
