"""Where results go: a folder for every run, nothing overwritten, whatever a picture is
called.
"""

import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path

import nbformat
import pytest
from command_world import call
from PIL import Image

from gsv3d_lib import __main__ as command
from gsv3d_lib import export, pipeline
from gsv3d_lib.course import demo, notebook
from gsv3d_lib.system.errors import machine_fault
from gsv3d_lib.system.paths import ROOT, atomic_path, folder_name, own_folder

NAMES = ["object.ply", "viewer.html"]


def fill(wanted, text: str) -> Path:
    with own_folder(wanted, NAMES) as folder:
        (folder / "object.ply").write_text(text)
    return folder


def test_every_run_gets_a_folder_of_its_own(tmp_path):
    wanted = tmp_path / "deep" / "my.1"
    folders = [fill(wanted, text) for text in "abc"]
    assert [folder.name for folder in folders] == ["my.1", "my.1-2", "my.1-3"]
    assert [(folder / "object.ply").read_text() for folder in folders] == ["a", "b", "c"]
    assert os.listdir(folders[0]) == ["object.ply"]  # no trace of how it was claimed


def test_folders_that_are_there(tmp_path):
    """Empty, or with other files only: used. A link that leads nowhere counts as a
    file.
    """
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "viewer.html").symlink_to("nowhere")
    assert fill(tmp_path / "empty", "a") == tmp_path / "empty"
    assert fill(tmp_path / "linked", "a") == tmp_path / "linked-2"
    assert fill(tmp_path, "a") == tmp_path and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("a", "mine"):
        with pytest.raises(KeyboardInterrupt), own_folder(tmp_path / name, NAMES):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["mine"] and not os.listdir(tmp_path / "mine")


def test_runs_at_the_same_time_do_not_share(tmp_path):
    barrier, folders = threading.Barrier(4), []

    def run():
        with own_folder(tmp_path / "a", NAMES) as folder:
            folders.append(folder.name)
            barrier.wait()  # nobody has written yet, all are at work

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folders) == ["a", "a-2", "a-3", "a-4"]


def test_a_file_where_the_folder_belongs_is_the_machines_sentence(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError) as raised, own_folder(tmp_path / "a", NAMES):
        pass
    assert (
        machine_fault(raised.value)
        == f"{tmp_path / 'a'} is a file where a folder belongs: move it, or name another place."
    )


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        ("my.png", "my"),
        ("con.png", "con_"),
        ("LPT1.jpeg", "LPT1_"),
        ("console.png", "console"),
        ("Grüße aus Köln.png", "Grüße_aus_Köln"),
        ("椅子.webp", "椅子"),
        ("-rf ~.png", "rf"),
        ('a:b\\c*?"<>|.png', "a_b_c"),
        ("....png", "picture"),
        (".png", "png"),
        ("\udcff.png", "picture"),
        ("\n\t.png", "picture"),
        ("v1.2.final.png", "v1.2.final"),
        ("x" * 251 + ".png", "x" * 40),
    ],
)
def test_names_of_pictures_become_names_of_folders(picture, name):
    assert folder_name(Path("some") / picture) == name


def test_faults_of_a_write_name_the_file_and_leave_nothing(tmp_path):
    (tmp_path / "object.ply").mkdir()
    with pytest.raises(IsADirectoryError) as raised, atomic_path(tmp_path / "object.ply") as path:
        path.write_text("a")
    assert f"{tmp_path / 'object.ply'} is a folder" in machine_fault(raised.value)
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "b.ply") as path:
        path.write_text("a")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert f"{tmp_path / 'b.ply'} could not be written" in machine_fault(raised.value)
    with pytest.raises(OSError, match="^why$"), atomic_path(tmp_path / "b.ply"):
        raise OSError("why")
    assert [path.name for path in tmp_path.iterdir()] == ["object.ply"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    name = "ü" * 125 + ".html"
    with atomic_path(tmp_path / name) as path:
        path.write_text("a")
    assert os.listdir(tmp_path) == [name]


# ---------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command without its models: every object is the name of its picture's first
    colour.
    """
    monkeypatch.chdir(tmp_path)

    class Pipeline:
        def generate(self, rgb, **_):
            self.gaussians, self.elevation = [str(rgb.mean().item())], 15.0
            self.image = rgb
            return self

    def save_object(gaussians, folder, image, elevation):
        for name in export.FILES.values():
            (folder / name).write_text(gaussians[0])
        return {kind: folder / name for kind, name in export.FILES.items()}

    monkeypatch.setattr(pipeline.GSV3DPipeline, "from_pretrained", lambda *_, **__: Pipeline())
    monkeypatch.setattr(export, "save_object", save_object)
    for name in ("mug", "car"):
        shutil.copy(ROOT / f"data/images/{name}.png", tmp_path)


def test_the_command_overwrites_nothing_and_says_where_things_lie(quick, tmp_path, capsys):
    assert command.main(["mug.png", "--out", "mine"]) == 0
    first = (tmp_path / "mine/object.ply").read_text()
    assert "holds another run's" not in capsys.readouterr().out
    assert command.main(["car.png", "--out", "mine"]) == 0
    said = capsys.readouterr().out
    assert (
        f"mine holds another run's results, which stay; these go to {tmp_path / 'mine-2'}." in said
    )
    assert str(tmp_path / "mine-2/viewer.html") in said
    assert (
        (tmp_path / "mine/object.ply").read_text()
        == first
        != (tmp_path / "mine-2/object.ply").read_text()
    )


def test_without_a_folder_every_picture_has_its_own(quick, tmp_path):
    assert [command.main([name]) for name in ("mug.png", "car.png", "mug.png")] == [0, 0, 0]
    assert sorted(os.listdir("runs/object")) == ["car", "mug", "mug-2"]


# ------------------------------------------------------------ the demo and its notebook


@pytest.fixture
def instant(monkeypatch, tmp_path):
    """The demo without its notebook; what it was asked for, run by run."""
    asked = []

    def run_notebook(path, parameters, out):
        asked.append(parameters)
        (out / "run.json").write_text(parameters["image_path"])
        return {}

    monkeypatch.setattr(notebook, "run_notebook", run_notebook)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    return asked


def test_every_picture_of_the_demo_has_a_folder(instant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture = Image.open(ROOT / "data/images/mug.png")
    for name in ("my.png", "-a b 'ü'.png", "con.png", "x" * 251 + ".png"):
        picture.save(tmp_path / name)
        assert call("demo", [f"--image={name}"]) == 0
    (tmp_path / "other").mkdir()
    picture.save(tmp_path / "other/my.jpg".replace("jpg", "png"))
    assert call("demo", ["--image=other/my.png"]) == 0
    assert call("demo", ["--image=my.png"]) == 0
    assert f"The results lie in {tmp_path / 'runs/demo/my-3'}" in capsys.readouterr().out
    written = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/demo/*/run.json")}
    assert written["my"] == written["my-3"] == str(tmp_path / "my.png")
    assert written["my-2"] == str(tmp_path / "other/my.png")
    assert set(written) == {"my", "my-2", "my-3", "a_b_ü", "con_", "x" * 40}


def test_a_name_that_is_no_text_is_one_sentence(instant, tmp_path, capsys):
    picture = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(ROOT / "data/images/mug.png", picture)
    assert call("demo", ["--image", os.fsdecode(picture)]) == 2
    assert "is not valid UTF-8: rename it" in capsys.readouterr().err and not instant


def test_what_stops_the_notebook_is_a_sentence_if_it_can_be_mended(tmp_path, monkeypatch, capsys):
    notebook = nbformat.v4.new_notebook()
    names = ("image_path", "out_dir", "weights")
    parameters = "".join(f"{name} = ''\n" for name in names) + "elevation = 1.0\nsteps = 1"
    notebook.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "from gsv3d_lib.system.errors import UserError\n"
            "raise UserError('turntable.mp4 is not there.')"
        ),
    ]
    nbformat.write(notebook, tmp_path / "a.ipynb")
    monkeypatch.setattr(demo, "NOTEBOOK", tmp_path / "a.ipynb")
    out = tmp_path / "{out} %d"
    assert call("demo", ["--image", str(ROOT / "data/images/mug.png"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "gsv3d: turntable.mp4 is not there."
    assert sorted(os.listdir(out)) == ["a.ipynb", "run.json"]


def test_notebook_00_does_not_write_where_results_lie():
    """Run with its defaults, by `make test` or by hand, it fills a temporary folder."""
    notebook = nbformat.read(demo.NOTEBOOK, as_version=4)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    assert 'out_dir = ""' in parameters.source
    (saving,) = (cell.source for cell in notebook.cells if "save_object(" in cell.source)
    assert "tempfile.mkdtemp" in saving and "own_folder(" in saving


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(
    "name", ["-my pic.png", 'it\'s $HOME `x` "$(y)".png', "a;b #1 (2) & ü.png"]
)
def test_make_hands_any_name_on(name, tmp_path):
    """To a stand-in for Python that writes down what it was given."""
    listener = tmp_path / "listen"
    listener.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    listener.chmod(0o755)
    asked = [
        "make",
        "--silent",
        "demo",
        "INSTALLED=",
        f"PY={listener}",
        f"IMAGE={name}",
        "ELEVATION=-5",
    ]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "-m",
        "gsv3d_lib",
        "demo",
        f"--image={name}",
        "--elevation=-5",
    ], done.stderr
