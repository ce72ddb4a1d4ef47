"""Lists of meshes: scans with their textures, Objaverse by licence.

Everything is written here; nothing is downloaded.
"""

import gzip
import json
import shutil
import sys
from functools import partial

import fetch_objaverse
import numpy as np
import pytest
import trimesh
from command_world import call
from PIL import Image

from gsv3d_lib.data import make_dataset as md
from gsv3d_lib.data import sources
from gsv3d_lib.data.dataset import list_objects, read_object

make = partial(call, "make_dataset")
RED = (200, 30, 20)


@pytest.fixture
def scans(tmp_path):
    """Two scans: the texture beside the mesh, and in materials/textures."""
    for name, place in (("Mug", "meshes"), ("Toy Bus", "materials/textures")):
        folder = tmp_path / "scans" / name
        (folder / "meshes").mkdir(parents=True)
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), RED).save(folder / place / "texture.png")
        (folder / "meshes" / "model.mtl").write_text("newmtl m\nKd 1 1 1\nmap_Kd texture.png\n")
        corners = ["v 0 0 0", "v 1 0 0", "v 0 1 0", "v 0 0 1", "vt 0 0", "vt 1 0", "vt 0 1"]
        faces = ["f 1/1 3/2 2/3", "f 1/1 2/2 4/3", "f 1/1 4/2 3/3", "f 2/1 3/2 4/3"]
        lines = ["mtllib model.mtl", "usemtl m", *corners, *faces]
        (folder / "meshes" / "model.obj").write_text("\n".join(lines) + "\n")
    return tmp_path / "scans"


def test_scans_are_rendered_with_their_textures_wherever_these_lie(scans, tmp_path):
    assert [job.id for job in sources.scan_jobs(scans)] == ["Mug", "Toy_Bus"]
    make(["--scans", str(scans), "--size", "32", "--out", str(tmp_path / "set")])
    rows = list_objects(tmp_path / "set")
    assert {row["licence"] for row in rows} == {"CC-BY-4.0"} and rows[0][
        "source"
    ] == "Google Scanned Objects"
    for row in rows:
        rgba = read_object(tmp_path / "set", row["id"]).rgba.astype(float)
        red, green, _ = rgba[..., :3][rgba[..., 3] == 255].mean(0)
        assert red > 4 * green  # grey, as mesh readers make it without the texture, has both alike


def test_a_scan_without_its_texture_is_left_out_not_grey(scans, tmp_path):
    (scans / "Mug" / "meshes" / "texture.png").unlink()
    md.make_dataset(sources.scan_jobs(scans), tmp_path / "set", size=16, progress=False)
    (noted,) = md.skipped_rows(tmp_path / "set")
    assert (
        noted["id"] == "Mug"
        and "model.obj names texture.png, which is not there" in noted["reason"]
    )


def test_listed_scans_only(scans, tmp_path):
    (tmp_path / "ids.txt").write_text("# validation\nToy Bus\n\n")
    ids = sources.read_ids(tmp_path / "ids.txt")
    assert [job.id for job in sources.scan_jobs(scans, ids)] == ["Toy_Bus"]
    with pytest.raises(FileNotFoundError, match="lacks 1 of the listed scans, for example Car"):
        sources.scan_jobs(scans, ["Car"])
    with pytest.raises(FileNotFoundError, match="holds no Google Scanned Object"):
        sources.scan_jobs(tmp_path)
    (tmp_path / "ids.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no id"):
        sources.read_ids(tmp_path / "ids.txt")


def test_a_real_scan_keeps_its_look_when_its_texture_moves(shared_objects, tmp_path):
    original = shared_objects / "meshes" / "Dino_4"
    folder = tmp_path / "Dino_4"
    (folder / "meshes").mkdir(parents=True)
    (folder / "materials" / "textures").mkdir(parents=True)
    for name, place in (
        ("model.obj", "meshes"),
        ("model.mtl", "meshes"),
        ("texture.png", "materials/textures"),
    ):
        shutil.copy(original / name, folder / place / name)
    moved, _ = md.render_object(sources.scan_jobs(tmp_path)[0], size=32, views=16)
    job = next(job for job in sources.mesh_jobs(original.parent, up="z") if job.id == "Dino_4")
    beside, _ = md.render_object(job, size=32, views=16)
    assert np.array_equal(moved.rgba, beside.rgba)


# ---------------------------------------------------------------- Objaverse


def row(licence: str, size: int = 1000, **more) -> dict:
    return {
        "licence": licence,
        "author": "A",
        "name": "N",
        "address": "there",
        "bytes": size,
        **more,
    }


CATALOGUE = {
    "a": row("CC-BY-4.0"),
    "b": row("CC0", 500),
    "c": row("CC-BY-NC-4.0"),
    "d": row("CC-BY-4.0"),
}


def test_objects_are_chosen_by_licence_uid_and_number():
    assert list(sources.choose(CATALOGUE)) == ["a", "b", "c", "d"]
    assert list(sources.choose(CATALOGUE, ["by", "CC0"])) == ["a", "b", "d"]
    assert list(sources.choose(CATALOGUE, ["by"], ["d", "c"])) == ["d"]
    with pytest.raises(ValueError, match="'MIT' is no licence of Objaverse; they are cc0, by,"):
        sources.choose(CATALOGUE, ["MIT"])
    with pytest.raises(ValueError, match="lacks 1 of the listed objects, such as z"):
        sources.choose(CATALOGUE, None, ["a", "z"])
    with pytest.raises(ValueError, match="None of the 4 objects"):
        sources.choose(CATALOGUE, ["by-nd"])


def test_licences_and_sizes_are_stated_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    # so that any use of the network's package would fail
    monkeypatch.setitem(sys.modules, "objaverse", None)
    path = tmp_path / "objaverse.json"
    fetch_objaverse.write_catalogue(path, CATALOGUE)
    fetch_objaverse.main(["--catalogue", str(path), "--licences", "by", "cc0"])
    said = capsys.readouterr().out
    assert "CC-BY-4.0                   2     0.000" in said and "CC-BY-NC" not in said
    assert "downloaded: 0" in said and "Nothing was downloaded" in said
    fetch_objaverse.main(["--catalogue", str(path), "--limit", "2"])
    assert "all                         2     0.000" in capsys.readouterr().out
    assert fetch_objaverse.main(["--catalogue", str(path), "--download"]) == 2
    assert 'not installed: pip install -e ".[data]".' in capsys.readouterr().err
    assert fetch_objaverse.main(["--catalogue", str(tmp_path / "none.json")]) == 2
    assert "There is no catalogue" in capsys.readouterr().err
    path.write_text('{"a": {"name": 3}}')
    with pytest.raises(ValueError, match="is no catalogue"):
        sources.read_catalogue(path)


@pytest.mark.parametrize("key", ["../../escape", "/tmp/escape", "a/b", ".."])
def test_a_catalogue_does_not_choose_where_is_written(tmp_path, key):
    trimesh.creation.box().export(tmp_path / "b.glb")
    catalogue = {key: row("CC0", path=str(tmp_path / "b.glb"))}
    fetch_objaverse.write_catalogue(tmp_path / "c.json", catalogue)
    out = tmp_path / "a" / "b" / "set"
    assert make(["--objaverse", str(tmp_path / "c.json"), "--size", "16", "--out", str(out)]) == 0
    (made,) = list_objects(out)
    assert made["id"] == sources.plain_id(key)
    written = {path for path in tmp_path.rglob("*") if path.suffix in (".webp", ".npz")}
    assert written == {out / f"{made['id']}.webp", out / f"{made['id']}.npz"}


@pytest.mark.parametrize(
    "change",
    [
        {"author": 5},
        {"bytes": "5"},
        {"bytes": float("nan")},
        {"bytes": -1},
        {"path": 5},
        {"licence": None},
    ],
)
def test_a_row_that_is_none_is_one_sentence(tmp_path, change):
    fetch_objaverse.write_catalogue(tmp_path / "c.json", {"u": row("CC0") | change})
    with pytest.raises(ValueError, match="c.json is no catalogue .the row 'u'.*make it again"):
        sources.read_catalogue(tmp_path / "c.json")


@pytest.mark.parametrize("option", ["--limit", "--workers"])
@pytest.mark.parametrize("value", ["-1", "0", "x"])
def test_options_that_count_are_1_or_more(tmp_path, capsys, option, value):
    fetch_objaverse.write_catalogue(tmp_path / "c.json", CATALOGUE)
    with pytest.raises(SystemExit, match="2"):
        fetch_objaverse.main(["--catalogue", str(tmp_path / "c.json"), option, value])
    assert option in capsys.readouterr().err


def test_a_list_of_ids_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="ids.txt is no list of ids"):
        sources.read_ids(tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")  # as Windows' editor saves it
    assert sources.read_ids(tmp_path / "ids.txt") == ["one", "two"]


def test_downloaded_objects_become_jobs_with_their_licence(tmp_path):
    trimesh.creation.box(extents=(1, 3, 1)).export(tmp_path / "b.glb")
    path = tmp_path / "objaverse.json"
    fetch_objaverse.write_catalogue(path, CATALOGUE)
    with pytest.raises(ValueError, match="is on this machine"):
        sources.objaverse_jobs(path)
    fetched = {"b": row("CC0", path=str(tmp_path / "b.glb"))}
    fetch_objaverse.write_catalogue(path, CATALOGUE | fetched)
    make(
        [
            "--objaverse",
            str(path),
            "--licences",
            "cc0",
            "--size",
            "16",
            "--out",
            str(tmp_path / "set"),
        ]
    )
    (made,) = list_objects(tmp_path / "set")
    assert (made["id"], made["source"], made["licence"], made["author"]) == (
        "b",
        "Objaverse",
        "CC0",
        "A",
    )
    alpha = read_object(tmp_path / "set", "b").rgba[0, ..., 3] > 127
    assert alpha.any(1).sum() > 2 * alpha.any(0).sum()  # 3 along y, which is up in glTF: it stands


def test_the_package_itself_on_a_cache_written_here(tmp_path, monkeypatch, capsys):
    """Objaverse's own client; all that it would download lies in its cache."""
    package = pytest.importorskip(
        "objaverse", reason='pip install -e ".[data]" to test Objaverse\'s own client'
    )
    monkeypatch.setattr(package, "_VERSIONED_PATH", str(tmp_path / "cache"))
    places = {uid: f"glbs/000-000/{uid}.glb" for uid in ("u1", "u2")}
    licences = {"u1": "by", "u2": "by-nc"}
    annotations = {
        uid: {
            "uid": uid,
            "name": f"thing {uid}",
            "license": licences[uid],
            "user": {"displayName": "Ann"},
            "viewerUrl": f"there/{uid}",
            "archives": {"glb": {"size": 2_000_000_000}},
        }
        for uid in places
    }
    (tmp_path / "cache" / "metadata").mkdir(parents=True)
    for name, content in (("object-paths", places), ("metadata/000-000", annotations)):
        with gzip.open(tmp_path / "cache" / f"{name}.json.gz", "wt") as file:
            json.dump(content, file)
    for place in places.values():
        (tmp_path / "cache" / place).parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box().export(tmp_path / "cache" / place)

    catalogue, uids = tmp_path / "c.json", tmp_path / "uids.txt"
    uids.write_text("u1\nu2\n")
    fetch_objaverse.main(["--catalogue", str(catalogue), "--uids", str(uids), "--annotations"])
    assert "CC-BY-4.0                   1     2.000" in capsys.readouterr().out
    fetch_objaverse.main(["--catalogue", str(catalogue), "--licences", "by", "--download"])
    assert "downloaded: 1" in capsys.readouterr().out
    (job,) = sources.objaverse_jobs(catalogue)
    assert job.id == "u1" and job.path.is_file() and job.facts["address"] == "there/u1"
    assert sources.read_catalogue(catalogue)["u2"]["licence"] == "CC-BY-NC-4.0"
    with pytest.raises(ValueError, match="knows no object zz"):
        fetch_objaverse.fetch_annotations(["zz"])
