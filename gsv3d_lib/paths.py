"""Where things lie, whatever the working directory (papermill keeps the caller's, nbval and JupyterLab the notebook's),
and how they are written: in full or not at all."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEST = "data/checkpoints/small"  # turns a user's picture into 3D; notebooks and experiments take the quicker `tiny`


def resolve(path: str | Path) -> Path:
    """An absolute path: as given if absolute, else relative to the repository's root, else to the working directory."""
    path = Path(path).expanduser()
    inside = ROOT / path
    if path.is_absolute() or inside.exists() or not path.exists():
        return path if path.is_absolute() else inside
    return path.resolve()


def reason(error: Exception) -> str:
    """The first line of what a reader of files says; libraries like to explain themselves in many.

    numpy takes any other file for a pickle and advises to run it: nobody should.
    """
    text = str(error).strip()
    return "it is no array file" if "allow_pickle" in text else text.split("\n")[0] or type(error).__name__


class atomic_path:
    """Context manager: yields a temporary path beside `path` and renames it over `path` only on success."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, error, *_):
        if error is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
