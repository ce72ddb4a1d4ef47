"""The dataset command: layout, angles, going on after a stop, broken meshes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trimesh
from command_world import call

from gsv3d_lib.data import make_dataset as md
from gsv3d_lib.data.dataset import list_objects, load_views, read_object
from gsv3d_lib.system.paths import WRITER

make = partial(call, "make_dataset")


@pytest.fixture
def meshes(tmp_path) -> Path:
    """A folder with a box, a ball in its own folder, and a file that is no mesh."""
    folder = tmp_path / "meshes"
    (folder / "ball").mkdir(parents=True)
    trimesh.creation.box(extents=(1, 2, 3)).export(folder / "a box.ply")
    trimesh.creation.icosphere(subdivisions=2).export(folder / "ball" / "model.obj")
    (folder / "broken.glb").write_bytes(b"no mesh at all")
    return folder


def test_angles_are_a_ring_and_random_views():
    azimuths, elevations = md.dataset_angles(3)
    assert azimuths[:16] == pytest.approx(np.arange(16) * 22.5) and (elevations[:16] == 15).all()
    assert len(azimuths) == 24 and (elevations[16:] >= -10).all() and (elevations[16:] <= 40).all()
    assert not np.array_equal(azimuths[16:], md.dataset_angles(4)[0][16:])


def test_the_ring_is_the_one_of_the_shared_objects(shared_objects):
    views = read_object(shared_objects / "gso", "Dino_4")
    azimuths, elevations = md.dataset_angles(0)
    assert views.azimuths[:16] == pytest.approx(azimuths[:16]) and views.elevations[
        :16
    ] == pytest.approx(elevations[:16])


def test_a_procedural_dataset_reads_back(tmp_path):
    make(
        [
            "--procedural",
            "2",
            "--seed",
            "5",
            "--family",
            "carton",
            "--size",
            "32",
            "--out",
            str(tmp_path / "set"),
        ]
    )
    rows = list_objects(tmp_path / "set")
    assert [row["seed"] for row in rows] == [5, 6] and rows[0]["family"] == "carton"
    stored = read_object(tmp_path / "set", rows[0]["id"])
    drawn, _ = md.render_object(md.procedural_jobs(1, 5, "carton")[0], size=32)
    assert stored.rgba.shape == (24, 32, 32, 4) and stored.depth.shape == (24, 32, 32)
    assert np.abs(stored.depth - drawn.depth).max() < 1e-3
    assert np.array_equal(stored.depth > 0, drawn.depth > 0)
    solid = drawn.rgba[..., 3] == 255
    assert np.abs(stored.rgba[..., :3].astype(int) - drawn.rgba[..., :3])[solid].mean() < 16


def test_mesh_folders_are_rendered_and_broken_files_reported(meshes, tmp_path, capsys):
    rows = md.make_dataset(md.mesh_jobs(meshes), tmp_path / "set", size=16, progress=False)
    assert [row["id"] for row in rows] == ["a_box", "ball"]
    report = capsys.readouterr().out.strip()
    assert report.startswith("skipped broken: Cannot read broken.glb") and "\n" not in report
    assert read_object(tmp_path / "set", "a_box").rgba[..., 3].max() == 255


def test_two_processes_make_the_same_dataset(meshes, tmp_path):
    for workers in (1, 2):
        md.make_dataset(
            md.mesh_jobs(meshes), tmp_path / str(workers), size=16, workers=workers, progress=False
        )
    for name in ("ball.webp", "ball.npz", "index.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_second_run_renders_only_what_is_missing(meshes, tmp_path, monkeypatch):
    out, rendered = tmp_path / "set", []
    run_job = md.run_job
    monkeypatch.setattr(
        md, "run_job", lambda job, **options: rendered.append(job.id) or run_job(job, **options)
    )
    jobs = [job for job in md.mesh_jobs(meshes) if job.id != "broken"]
    md.make_dataset(jobs, out, size=16, progress=False)
    (out / "ball.npz").unlink()
    assert len(md.make_dataset(jobs, out, size=16, progress=False)) == 2
    assert rendered == ["a_box", "ball", "ball"]


def test_a_stopped_run_keeps_its_index(meshes, tmp_path, monkeypatch):
    monkeypatch.setattr(md, "INDEX_EVERY", 1)
    jobs = [job for job in md.mesh_jobs(meshes) if job.id != "broken"]
    run_job = md.run_job

    def stop_at_ball(job, **options):
        if job.id == "ball":
            raise KeyboardInterrupt
        return run_job(job, **options)

    monkeypatch.setattr(md, "run_job", stop_at_ball)
    with pytest.raises(KeyboardInterrupt):
        md.make_dataset(jobs, tmp_path / "set", size=16, progress=False)
    assert [row["id"] for row in json.loads((tmp_path / "set" / "index.json").read_text())] == [
        "a_box"
    ]


def test_84_views_are_a_ring_and_68_others(tmp_path):
    jobs = md.procedural_jobs(1, 5, "carton")
    rows = md.make_dataset(jobs, tmp_path / "set", size=16, progress=False, views=84)
    stored = read_object(tmp_path / "set", rows[0]["id"])
    assert stored.rgba.shape == (84, 16, 16, 4) and len(set(stored.azimuths.tolist())) == 84
    assert (
        stored.azimuths[:16] == pytest.approx(np.arange(16) * 22.5)
        and (stored.elevations[:16] == 15).all()
    )
    assert load_views([tmp_path / "set"], 16, progress=False).rgb.shape == (1, 84, 16, 16, 3)
    with pytest.raises(ValueError, match="at least the 16 views"):
        md.dataset_angles(0, 12)
    with pytest.raises(
        ValueError, match="holds objects of 84 views of 16 px, not 24 of 16 px; give another --out"
    ):
        md.make_dataset(jobs, tmp_path / "set", size=16, progress=False)


def test_left_out_meshes_are_noted_and_tried_again_only_when_asked(meshes, tmp_path, capsys):
    command = ["--meshes", str(meshes), "--size", "16", "--out", str(tmp_path / "set")]
    make(command)
    assert "1 were left out; skipped.jsonl says why" in capsys.readouterr().out
    (noted,) = md.skipped_rows(tmp_path / "set")
    assert noted["id"] == "broken" and noted["reason"].startswith("Cannot read broken.glb")
    trimesh.creation.box().export(meshes / "broken.glb")  # mended
    make(command)
    assert len(list_objects(tmp_path / "set")) == 2
    make([*command, "--retry"])
    assert len(list_objects(tmp_path / "set")) == 3 and not (tmp_path / "set" / md.SKIPPED).exists()


def test_a_job_that_kills_its_process_is_left_out_and_the_others_go_on():
    """As embree, or the kernel when memory runs out, may do to `run_job`.

    Signal 9 is deadly and signal 0 is nothing.
    """
    results = list(md._run_all(signal.raise_signal, [0, signal.SIGKILL, 0, 0], workers=2))
    assert results[0] is None and results[2:] == [None, None] and "killed the process" in results[1]


def left_of(pids: list[int], seconds: float) -> list[int]:
    """Which processes still run after at most so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.1)
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


SLEEPERS = """
import os, signal, time
from gsv3d_lib.data import make_dataset as md

def work(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    list(md._in_processes(work, [300, 300], 2))
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in /proc")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path, stop):
    """They would sleep for minutes, and a killed parent can do nothing about it."""
    # a file, because workers import what started them
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    command = [sys.executable, str(tmp_path / "sleepers.py")]
    env = os.environ | {"PYTHONPATH": str(Path(md.__file__).parents[2])}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(stop)
    parent.wait(30)
    assert left_of(workers, 30) == []


def test_two_objects_of_one_name_are_refused(tmp_path):
    jobs = [md.Job("a b", seed=1), md.Job("a.b", seed=2)]
    with pytest.raises(
        ValueError, match="Two objects would get one name: the id 'a_b' is there twice; rename one"
    ):
        md.make_dataset(jobs, tmp_path / "set", size=16, progress=False)
    assert not (tmp_path / "set").exists()


def test_leftovers_of_a_killed_run_are_removed(meshes, tmp_path):
    (tmp_path / "set").mkdir()
    left = tmp_path / "set" / f".ball.webp.{WRITER}-{2**22 + 1}.tmp"  # of a process that cannot be
    left.touch()
    md.make_dataset(md.mesh_jobs(meshes), tmp_path / "set", size=16, progress=False)
    assert not left.exists() and len(list_objects(tmp_path / "set")) == 2


@pytest.mark.parametrize(
    "line", ["{}", "[1]", '{"id": "../a", "reason": "x"}', '{"id": "a", "reason": 5}', "{"]
)
def test_notes_that_are_none_are_one_sentence(meshes, tmp_path, capsys, line):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / md.SKIPPED).write_text(line + "\n")
    assert make(["--meshes", str(meshes), "--size", "16", "--out", str(tmp_path / "set")]) == 2
    assert "skipped.jsonl cannot be read" in capsys.readouterr().err


def test_seeds_and_counts_have_bounds(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):  # argparse's own
        make(["--procedural", "1", "--seed", "-5", "--out", str(tmp_path / "set")])
    assert "--seed: must be 0 or more" in capsys.readouterr().err
    assert make(["--procedural", "1000000000", "--out", str(tmp_path / "set")]) == 2
    assert "at most 1,000,000 objects" in capsys.readouterr().err


def test_ids_stay_apart(tmp_path):
    mesh = trimesh.creation.box()
    mesh.export(tmp_path / "thing.obj")
    mesh.export(tmp_path / "thing.ply")
    assert [job.id for job in md.mesh_jobs(tmp_path)] == ["thing", "thing_ply"]
    for name in ("a b", "a.b", "a_b"):
        mesh.export(tmp_path / f"{name}.ply")
    assert len(md.mesh_jobs(tmp_path)) == 5


def test_an_empty_or_missing_folder_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no mesh file"):
        md.mesh_jobs(tmp_path)
    assert make(["--meshes", str(tmp_path / "none"), "--out", str(tmp_path / "set")]) == 2
    assert "There is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--ring", "30", "-5"], "LOW to HIGH"),
        (["--views", "8"], "must be 16 or more"),
        (["--supersample", "0"], "must be 1 or more"),
        (["--size", "0"], "must be 8 or more"),
        (["--size", "100000"], "must be 4096 or less"),
        (["--views", "1000000000"], "must be 1000 or less"),
        (["--supersample", "10000"], "must be 16 or less"),
        (["--ring", "nan", "nan"], "must be a number from -90 to 90"),
        (["--ids", "list.txt"], "--ids chooses among"),
        (["--licences", "cc0"], "--licences among"),
    ],
)
def test_what_fits_no_mesh_is_said_once_and_noted_for_none(
    meshes, tmp_path, capsys, more, sentence
):
    with pytest.raises(SystemExit, match="2"):  # some are argparse's own, which ends by itself
        sys.exit(make(["--meshes", str(meshes), "--out", str(tmp_path / "set"), *more]))
    assert sentence in capsys.readouterr().err and not (tmp_path / "set").exists()


def test_an_out_that_is_a_file_is_one_sentence(meshes, capsys):
    assert make(["--meshes", str(meshes), "--out", str(meshes / "a box.ply")]) == 2
    assert "a box.ply is no folder that you may write to" in capsys.readouterr().err


def test_the_ring_stands_at_an_elevation_of_the_objects_own():
    drawn = [md.dataset_angles(seed, ring=(-5.0, 30.0))[1] for seed in range(40)]
    rings = np.array([elevations[:16] for elevations in drawn])
    assert (rings == rings[:, :1]).all() and (rings >= -5).all() and (rings <= 30).all()
    assert np.ptp(rings[:, 0]) > 20
    # the free views do not depend on the range
    assert np.array_equal(drawn[3][16:], md.dataset_angles(3)[1][16:])
    with pytest.raises(ValueError, match="LOW to HIGH"):
        md.dataset_angles(0, ring=(30.0, -5.0))
