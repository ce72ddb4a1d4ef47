"""One rule for paths; files are written in full or not at all; a kernel cache is found
where nothing can be written.
"""

import errno
import os
import shutil
import stat
import subprocess
import sys
from argparse import ArgumentParser

import pytest
from safetensors import SafetensorError

from gsv3d_lib.cluster import job
from gsv3d_lib.rendering import kernels as rasterizer_kernels
from gsv3d_lib.system import doctor, paths
from gsv3d_lib.system.command import exit_code
from gsv3d_lib.system.paths import ROOT, atomic_path, find, from_repository, output, resolve
from gsv3d_lib.weights.checkpoint import load_config

TINY = "data/checkpoints/tiny"


def test_what_is_read_is_as_given_else_in_the_repository_else_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(TINY) == ROOT / TINY and find("nowhere/x") == output("nowhere/x")
    (tmp_path / TINY).mkdir(parents=True)
    assert find(TINY).absolute() == tmp_path / TINY  # what lies here goes before the repository's
    assert find(tmp_path / "none") == tmp_path / "none"


def test_what_a_notebook_makes_lies_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/never/made") == ROOT / "runs/never/made"
    (tmp_path / "mine.png").touch()
    assert resolve("mine.png") == tmp_path / "mine.png" and resolve(tmp_path) == tmp_path


def test_home_is_known_or_left_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(output("~/x")) == "/somewhere/x"
    assert str(output("~nobody-of-that-name/x")) == "~nobody-of-that-name/x"


@pytest.mark.parametrize("path", ["a" * 5000, "x/" * 3000, "a\0b", ""])
def test_a_path_that_cannot_be_is_not_there(path):
    find(path), resolve(path)


def test_an_installed_package_looks_only_where_it_is_told(tmp_path, monkeypatch):
    """A wheel lies in site-packages, where any `data` would be another's."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert find("data").absolute() != tmp_path / "data"
    assert "not in the installed package" in from_repository(TINY) and from_repository("mine") == ""


def test_checkpoints_open_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(TINY).name == "tiny"
    assert job.from_root(TINY) == TINY  # the training starts in the repository's root
    (tmp_path / "mine").mkdir()
    assert job.from_root("mine") == str(tmp_path / "mine")


@pytest.mark.parametrize("place", ["folder", "file/x", "n" * 300])
def test_what_cannot_be_written_names_the_path_that_the_user_gave(place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / place) as temporary:
        temporary.write_text("x")
    assert place.split("/")[0] in str(raised.value.filename) and ".tmp" not in str(
        raised.value.filename
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_leaves_nothing_and_names_the_path(tmp_path):
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "x") and not list(tmp_path.iterdir())


def test_other_libraries_errors_name_the_path_too(tmp_path, capsys):
    def run(_):
        with atomic_path(tmp_path / "x.safetensors"):
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )

    assert exit_code(run, ArgumentParser(), []) == 2
    assert f"the disk is full: {tmp_path / 'x.safetensors'} could" in capsys.readouterr().err


# ---------------------------------------------------------------- compiled kernels

DRAW = """
import torch
from gsv3d_lib.rendering import kernels
print(kernels.CACHE, kernels.project_gaussians.stats.cache_path if kernels.CACHE else None)
"""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="a temporary folder is the user's own there")
def test_a_read_only_installation_without_a_home_keeps_kernels_in_a_temporary_folder(tmp_path):
    package = tmp_path / "package"
    ignore = shutil.ignore_patterns("__pycache__", "exercises")
    shutil.copytree(ROOT / "gsv3d_lib", package / "gsv3d_lib", ignore=ignore)
    (tmp_path / "temporary").mkdir()
    # a file, so that no user, not even root, can write below it
    (package / "gsv3d_lib/rendering/__pycache__").touch()
    (tmp_path / "home").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA", "XDG"))}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    environment |= {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    said = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert said[0] == "True" and said[1].startswith(str(tmp_path / "temporary"))


def test_without_any_place_kernels_are_not_kept(monkeypatch):
    monkeypatch.setattr(rasterizer_kernels, "keeps_kernels", lambda: False)
    monkeypatch.setattr(rasterizer_kernels, "private_folder", lambda: None)
    assert rasterizer_kernels.choose_cache() is False


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="a temporary folder is the user's own there")
def test_a_folder_that_others_may_write_to_is_not_taken(tmp_path, monkeypatch):
    """numba unpickles what it finds in it."""
    monkeypatch.setattr(rasterizer_kernels.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = rasterizer_kernels.private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert rasterizer_kernels.private_folder() is None
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert rasterizer_kernels.private_folder() is None


def test_doctor_says_where_kernels_are_kept(monkeypatch):
    assert "compiled kernels are kept in" in doctor.kernels_finding().sentence
    monkeypatch.setattr(rasterizer_kernels, "CACHE", False)
    assert "set NUMBA_CACHE_DIR" in doctor.kernels_finding().sentence
