"""Where things lie, and how they are written: in full or not at all.

One rule for paths, in every command and notebook:

- What is read (`find`): as given if it is there, seen from the working directory; else
  in the repository, if it is there. So `--weights data/checkpoints/tiny` means the
  shipped weights from every folder that has no such folder itself.
- What a command writes (`output`): as given, from the working directory, and nowhere
  else.
- What a notebook writes (`resolve`): in the repository, because the working directory
  depends on who runs it (papermill keeps the caller's, nbval and JupyterLab the
  notebook's); what it reads follows the first rule.

An installed package without the repository has no `data` and no `notebooks`
(`from_repository` says so), and the working directory stands for the repository.
"""

import errno
import os
import platform
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from .errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# Names this machine in temporary files: machines that share a folder have equal process
# numbers now and then.
WRITER = f"{zlib.crc32(platform.node().encode()):08x}"
LEFTOVER = re.compile(r"\..+\.((?P<writer>[0-9a-f]{8})-)?(?P<pid>\d+)\.tmp")
# what some network file systems answer to fsync
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF, errno.EACCES}
TINY = "data/checkpoints/tiny"  # the quick one, for notebooks and experiments
BEST = "data/checkpoints/small"  # turns a user's picture into 3D
RESERVED = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"  # no names of files on Windows
LONGEST_ID = 150  # bytes: a file system takes 255, and suffixes are added


def has_repository() -> bool:
    """Whether this package lies in its repository; a wheel is installed without."""
    return (ROOT / "pyproject.toml").is_file()


def base() -> Path:
    """The repository, below which notebooks write; else the working directory."""
    return ROOT if has_repository() else Path.cwd()


def output(path: str | Path) -> Path:
    """A path that a command writes to: as given; ~ is the home folder."""
    return Path(os.path.expanduser(path))


def find(path: str | Path) -> Path:
    """A path to read from: as given, or in the repository if it is only there."""
    path = output(path)
    if os.path.exists(path) or not has_repository():
        return path
    return ROOT / path if os.path.exists(ROOT / path) else path


def resolve(path: str | Path) -> Path:
    """The absolute path that a notebook means; what is not there is to be made."""
    path = find(path)
    return path.absolute() if os.path.exists(path) else base() / path


def from_repository(path: str | Path) -> str:
    """One more sentence where something is missing that only the repository brings."""
    if has_repository() or not str(path).startswith(("data", "notebooks")):
        return ""
    return (
        " What ships with GSV3D lies in its repository and not in the installed package: "
        "clone that and give the command in its folder, or name another place."
    )


def reason(error: Exception) -> str:
    """The first line of an error; libraries like to explain themselves in many."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def check_readable(*files: Path) -> None:
    """Raises the OSError of a file that is there and may not be opened.

    That is the machine's fault and no damage. safetensors' reader says "No such file"
    of it, and other libraries hide the reason in sentences of their own.
    """
    for file in files:
        if os.path.lexists(file) and not Path(file).is_fifo():  # which would wait for ever
            with open(file, "rb"):
                pass


# ---------------------------------------------------------------- writing


class atomic_path:
    """Context manager: yields a temporary path and renames it to `path` on success.

    The file is on the disk before it gets its name, and has the permissions of any new
    file, whoever wrote it. An OSError inside (a full disk) names `path`, which the user
    knows, and not the temporary one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        start = self.path.name[:50]  # a name may be as long as the file system allows
        self.temporary = self.path.with_name(f".{start}.{WRITER}-{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.temporary.unlink(missing_ok=True)
            raise_fault_of(error, self.path, self.temporary)
            return
        try:
            settle(self.temporary)  # a network file system may say only now that it is full
            os.replace(self.temporary, self.path)
        except OSError as fault:
            self.temporary.unlink(missing_ok=True)
            raise_fault_of(fault, self.path, self.temporary)
            raise
        sync(self.path.parent)


def place_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Make the folder `target` by `write(folder)`, in full or not at all.

    It takes the place of a folder that is there.
    """
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    for left in (temporary, old):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        write(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise_fault_of(error, target, temporary)
        raise
    for path in [*temporary.rglob("*"), temporary]:
        settle(path)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def raise_fault_of(error: BaseException, path: Path, temporary: Path) -> None:
    """Raises the OSError behind an error of a library that writes.

    An OSError itself learns the name that users know.
    """
    if isinstance(error, OSError):
        if error.errno is not None and error.filename in (None, str(temporary), temporary):
            error.filename = str(path)
            error.filename2 = None
    elif found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors is written in Rust
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def settle(path: Path) -> None:
    """Put a written file or folder on the disk, with the usual permissions.

    safetensors writes for the owner alone, which would keep a cluster's other users and
    containers out.
    """
    found = path.lstat()
    if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600:
        # asking for the umask would change it, for all threads
        probe = path.with_name(f".{path.name}.mode")
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        path.chmod(mode)
    if not stat.S_ISLNK(found.st_mode):
        sync(path)


def sync(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    if os.name != "posix":  # Windows opens no folders, and files for syncing only to write
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(handle)


def remove_leftovers(folder: str | Path, name: str = "*", alone: bool = False) -> None:
    """Remove what killed writers of `atomic_path` left of the files `name`.

    alone: also those of other machines; only for who holds the folder's lock.
    """
    for path in Path(folder).glob(f".{name}.*.tmp"):
        found = LEFTOVER.fullmatch(path.name)
        if found is None or not path.is_file():
            continue
        ours = found["writer"] == WRITER
        if alone or (ours and not is_running(int(found["pid"]))):
            path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether this machine has such a process."""
    if os.name != "posix":  # there is no signal that only asks
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def own_folder(wanted: str | Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder in which one run writes files called `names`: nothing is overwritten.

    It is `wanted`, or wanted-2, wanted-3, ..., the first that holds none of them and
    that no other run is filling. A new folder that stays empty is removed at the end.
    """
    wanted = Path(wanted).absolute()
    names = list(names)
    for number in count(1):
        ending = f"-{number}" if number > 1 else ""
        folder = wanted.parent / f"{wanted.name}{ending}"
        is_new = not os.path.lexists(folder)
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
        if is_new:
            with suppress(OSError):  # not empty, as it should be
                folder.rmdir()


# ---------------------------------------------------------------- names of files


def folder_name(path: str | Path) -> str:
    """The name of a file without its suffix, as a name of a folder on any system."""
    name = re.sub(r"[^\w.-]+", "_", Path(path).stem)[:40].strip("._-") or "picture"
    return f"{name}_" if re.fullmatch(RESERVED, name, re.IGNORECASE) else name


def plain_id(name: str) -> str:
    """A name that is also a file name: letters, digits, _ and -, and not too long."""
    id = re.sub(r"[^\w-]+", "_", name) or "_"
    return id.encode()[-LONGEST_ID:].decode(errors="ignore")


def check_id(id) -> None:
    """Raises UserError where an id could lead out of its folder, as a path."""
    if not isinstance(id, str) or plain_id(id) != id:
        raise UserError(f"{str(id)[:100]!r} is no id: ids are letters, digits, _ and -")


def named_file(folder: str | Path, name: str) -> Path:
    """The path of a file that another file, in `folder`, names.

    It lies below that folder or the one above it. Whatever leads elsewhere raises
    UserError: a downloaded file must not choose what is read.
    """
    root = os.path.abspath(folder)
    above = os.path.dirname(root)
    path = os.path.normpath(os.path.join(root, name))
    if "\0" in name or os.path.commonpath([above, path]) != above:
        raise UserError(f"{name!r} leads out of {folder}")
    return Path(path)
