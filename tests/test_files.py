"""Files are whole, on the disk, and open to whom the umask says; one that may not be
read is not called damaged.
"""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_world import ball_views, object_views, tiny_config

from gsv3d_lib.cluster.shards import open_shards, write_shards
from gsv3d_lib.data.dataset import load_views, write_index, write_object
from gsv3d_lib.data.elevation import load_elevation
from gsv3d_lib.data.examples import load_orbits
from gsv3d_lib.evaluation.lpips import load_lpips
from gsv3d_lib.lora import load_lora
from gsv3d_lib.system.errors import machine_fault
from gsv3d_lib.system.paths import WRITER, atomic_path, place_whole, remove_leftovers
from gsv3d_lib.training import load_checkpoint
from gsv3d_lib.unet import build_unet
from gsv3d_lib.vae import build_vae
from gsv3d_lib.weights.checkpoint import load_model, save_model
from gsv3d_lib.weights.sv3d import Weights

TENSORS = {"a": torch.arange(3.0)}
NOBODY = 65534


def write_tensors(folder: Path) -> None:
    folder.mkdir()
    save_file(TENSORS, folder / "a.safetensors")


@pytest.fixture
def umask():
    """Sets the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_tensors_follow_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    with atomic_path(tmp_path / "a.safetensors") as path:
        save_file(TENSORS, path)
    place_whole(tmp_path / "folder", write_tensors)
    for path in tmp_path.rglob("*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert {path.name for path in tmp_path.rglob("*")} == {"a.safetensors", "folder"}


def test_a_copied_file_of_tensors_follows_the_umask(tmp_path, umask):
    """What `--init` takes over may have been written before this was mended."""
    write_tensors(tmp_path / "old")
    place_whole(tmp_path / "new", lambda folder: shutil.copytree(tmp_path / "old", folder))
    assert stat.S_IMODE((tmp_path / "new/a.safetensors").stat().st_mode) == 0o644


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)),
    )
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names)))
    with atomic_path(tmp_path / "file") as path:
        path.write_text("x")
    assert done == [str(path), "rename", str(tmp_path)]
    done.clear()
    place_whole(tmp_path / "folder", write_tensors)
    assert done == [
        str(tmp_path / ".folder.tmp/a.safetensors"),
        str(tmp_path / ".folder.tmp"),
        str(tmp_path),
    ]


def test_a_folder_that_cannot_be_written_leaves_the_one_before(tmp_path):
    place_whole(tmp_path / "folder", write_tensors)

    def fails(folder: Path) -> None:
        write_tensors(folder)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        place_whole(tmp_path / "folder", fails)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "a.safetensors"]


FULL = """
import resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from safetensors.torch import save_file
from gsv3d_lib.system.errors import machine_fault
from gsv3d_lib.system.paths import atomic_path, place_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
large = {{"a": torch.zeros(10**5)}}

def write(folder):
    folder.mkdir()
    save_file(large, folder / "a.safetensors")

def one_file(path):
    with atomic_path(path) as temporary:
        save_file(large, temporary)

for how in (one_file, lambda path: place_whole(path, write)):
    try:
        how(Path(sys.argv[1]) / "name")
    except OSError as error:
        print(machine_fault(error))
"""


def test_a_write_that_the_machine_refuses_is_the_machine_s_sentence(tmp_path):
    """safetensors tells of it in an exception of its own; a limit on file sizes stands
    for a full disk.
    """
    paths = [str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", FULL.format(paths=paths), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == 2 * f"{tmp_path / 'name'} is larger than this file system or your limits allow.\n"
    )
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_machine_names_the_file_that_the_user_knows(tmp_path):
    with pytest.raises(OSError, match="full") as error, atomic_path(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "full")
    assert str(tmp_path / "file") in machine_fault(error.value)


def test_what_dead_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f".a.{WRITER}-{dead.pid}.tmp": False,
        f".a.{WRITER}-{os.getpid()}.tmp": True,
        f".a.0badcafe-{dead.pid}.tmp": True,  # another machine's: who knows
        f".a.{dead.pid}.tmp": True,  # of an earlier version, which did not say whose
        ".weights.tmp": True,
        "a.1.tmp": True,
    }
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {name for name, stays in names.items() if stays} == {
        path.name for path in tmp_path.iterdir()
    }
    remove_leftovers(tmp_path, alone=True)
    assert {".weights.tmp", "a.1.tmp"} == {path.name for path in tmp_path.iterdir()}


# ----------------------------------------------------------- files that may not be read


@pytest.fixture
def place():
    """A folder that others may enter: pytest's own are closed, and the root user has to
    become somebody else.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def closed(folder: Path):
    """Within the block no file in `folder` may be read."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


CONFIG = tiny_config()
# what is written into a folder, and how it is read
READERS = {
    "checkpoint": (
        lambda folder: save_file(TENSORS, folder / "checkpoint-0000001.safetensors"),
        lambda folder: load_checkpoint(folder, torch.nn.Module()),
    ),
    "model": (
        lambda folder: save_model(build_vae(CONFIG), folder / "weights", "vae", CONFIG),
        lambda folder: load_model(folder / "weights", "vae"),
    ),
    "LoRA": (
        lambda folder: save_file(TENSORS, folder / "pytorch_lora_weights.safetensors"),
        lambda folder: load_lora(build_unet(CONFIG), folder),
    ),
    "estimator": (
        lambda folder: (
            (folder / "elevation").mkdir(),
            save_file(TENSORS, folder / "elevation/elevation.safetensors"),
        ),
        load_elevation,
    ),
    "LPIPS": (
        lambda folder: save_file(TENSORS, folder / "alex.safetensors"),
        lambda folder: load_lpips(folder / "alex.safetensors"),
    ),
    "SV3D": (
        lambda folder: save_file(TENSORS, folder / "sv3d_p.safetensors"),
        lambda folder: Weights(folder / "sv3d_p.safetensors"),
    ),
    "cache": (
        lambda folder: save_file(TENSORS, folder / "latents.safetensors"),
        lambda folder: load_orbits(
            ball_views(), build_vae(CONFIG), 1, folder / "latents.safetensors"
        ),
    ),
    "dataset": (
        lambda folder: (
            write_object(folder, object_views("a")),
            write_index(folder, [{"id": "a"}]),
        ),
        lambda folder: load_views([folder], CONFIG.image_size, progress=False),
    ),
}


@pytest.mark.parametrize("what", READERS)
def test_a_file_that_may_not_be_read_is_not_called_damaged(place, what):
    write, read = READERS[what]
    write(place)
    with closed(place), pytest.raises(PermissionError) as error:
        read(place)
    assert "may not be read" in machine_fault(error.value) and str(place) in machine_fault(
        error.value
    )


def test_a_shard_that_may_not_be_read_is_not_called_damaged(place):
    write_object(place / "data", object_views("a"))
    write_index(place / "data", [{"id": "a"}])
    vae = build_vae(CONFIG)
    write_shards([place / "data"], vae, place / "shards", CONFIG.image_size, progress=False)
    views = open_shards(place / "shards")
    with closed(place / "shards"):
        for read in (
            lambda: views.rgb[0, 0],
            lambda: write_shards(
                [place / "data"], vae, place / "shards", CONFIG.image_size, progress=False
            ),
        ):
            with pytest.raises(PermissionError) as error:
                read()
            assert "may not be read" in machine_fault(error.value)
