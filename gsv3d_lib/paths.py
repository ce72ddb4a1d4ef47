"""Where things lie, whatever the working directory (papermill keeps the caller's, nbval and JupyterLab the notebook's),
and how they are written: in full or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEST = "data/checkpoints/small"  # turns a user's picture into 3D; notebooks and experiments take the quicker `tiny`
RESERVED = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"  # no names of files on Windows


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
    """Context manager: yields a temporary path beside `path` and renames it over `path`
    only on success. An OSError inside names `path`, which the user knows."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        start = self.path.name[:50]  # a name may be as long as the file system allows
        self.temporary = self.path.with_name(f".{start}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                os.replace(self.temporary, self.path)
        except OSError as fault:
            self._name(fault)
            raise
        finally:
            self.temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                self._name(error)

    def _name(self, fault: OSError) -> None:
        if fault.errno and fault.filename in (None, str(self.temporary)):
            fault.filename = str(self.path)
            fault.filename2 = None


@contextmanager
def own_folder(wanted: str | Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder in which one run writes files called `names`: `wanted`, or wanted-2,
    wanted-3, ..., the first that holds none of them and that no other run is filling.

    So nothing is overwritten. A folder that stays empty is removed at the end.
    """
    wanted, names = Path(wanted).absolute(), list(names)
    for number in count(1):
        ending = f"-{number}" if number > 1 else ""
        folder = wanted.parent / f"{wanted.name}{ending}"
        folder.mkdir(parents=True, exist_ok=True)
        claim = folder / f".{names[0]}.claim"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        if not any(os.path.lexists(folder / name) for name in names):
            break
        claim.unlink()
    try:
        yield folder
    finally:
        claim.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, as it should be
            folder.rmdir()


def folder_name(path: str | Path) -> str:
    """The name of a file without its suffix, as a name of a folder on any system."""
    name = re.sub(r"[^\w.-]+", "_", Path(path).stem)[:40].strip("._-") or "picture"
    return f"{name}_" if re.fullmatch(RESERVED, name, re.IGNORECASE) else name
