"""Where things lie, whatever the working directory: papermill keeps the caller's, nbval and JupyterLab the notebook's."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def resolve(path: str | Path) -> Path:
    """An absolute path: as given if absolute, else relative to the repository's root, else to the working directory."""
    path = Path(path).expanduser()
    inside = ROOT / path
    if path.is_absolute() or inside.exists() or not path.exists():
        return path if path.is_absolute() else inside
    return path.resolve()
