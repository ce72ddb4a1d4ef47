"""Mesh files with something wrong in them.

They are left out with a sentence, never drawn grey or with holes.
"""

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.data.make_dataset import make_dataset, skipped_rows
from gsv3d_lib.data.raycast import brightness, load_mesh, render_mesh
from gsv3d_lib.data.sources import mesh_jobs
from gsv3d_lib.system.errors import UserError

RED = (200, 30, 20)
VERTICES = ["v 0 0 0", "v 1 0 0", "v 0 1 0", "v 0 0 1", "vt 0 0", "vt 1 0", "vt 0 1"]
FACES = ["f 1/1 3/2 2/3", "f 1/1 2/2 4/3", "f 1/1 4/2 3/3", "f 2/1 3/2 4/3"]
TEXTURED = "newmtl m\nKd 1 1 1\nmap_Kd red.png\n"


def picture(kind: str = "PNG", size: int = 8, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), RED).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_obj(
    folder: Path, material=TEXTURED, texture=None, vertices=VERTICES, faces=FACES, head=None
) -> Path:
    """A tetrahedron with the material m."""
    folder.mkdir(parents=True, exist_ok=True)
    head = ["mtllib t.mtl", "usemtl m"] if head is None else head
    (folder / "t.obj").write_text("\n".join([*head, *vertices, *faces]) + "\n")
    (folder / "t.mtl").write_text(material)
    if texture is not None:
        (folder / "red.png").write_bytes(texture)
    return folder / "t.obj"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_mesh(path, up="z")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def first_color(path: Path) -> np.ndarray:
    """The colour of the middle of the front, without light."""
    rgba, _ = render_mesh(load_mesh(path, up="z"), orbit_cameras([-90.0], [0.0], 17))
    assert rgba[0, 8, 8, 3] == 1
    return rgba[0, 8, 8, :3] / brightness(np.array([[0.0, -1.0, 0.0]]))[0] * 255


# ---------------------------------------------------------------- OBJ


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TGA", "TIFF", "GIF", "JPEG"])
def test_textures_of_the_kinds_that_are_named_are_drawn(tmp_path, kind):
    rgba, _ = render_mesh(
        load_mesh(write_obj(tmp_path, texture=picture(kind))), orbit_cameras([-90.0], [0.0], 9)
    )
    red, green, blue, _ = rgba[0][rgba[0, ..., 3] == 1].mean(0)
    assert red / green == pytest.approx(RED[0] / RED[1], rel=0.1) and green > blue


@pytest.mark.parametrize(
    "texture",
    [
        picture(size=64)[:90],
        picture("JPEG", 256)[:1000],
        b"",
        b"<html>404</html>",
        picture("EPS"),
        picture("ICO"),
        picture(mode="I;16"),
    ],
    ids=["cut PNG", "cut JPEG", "empty", "text", "EPS", "ICO", "16 bits"],
)
def test_a_texture_that_cannot_be_decoded_is_refused_not_grey(tmp_path, texture):
    sentence = refusal(write_obj(tmp_path, texture=texture))
    assert "t.obj names red.png, which is not there or cannot be read" in sentence


@pytest.mark.parametrize(
    ("material", "sentence"),
    [
        ("", "no material file of it describes the material 'm'"),
        ("<html>404</html>", "no material file of it describes the material 'm'"),
        ("newmtl other\nKd 1 0 0\n", "no material file of it describes the material 'm'"),
        ("newmtl m\n", "Kd of the material 'm' is not 3 numbers"),
        ("newmtl m\nKd red\n", "Kd of the material 'm' is not 3 numbers"),
        ("newmtl m\nKd nan nan nan\n", r"Kd of the material 'm' is \[nan, nan, nan\]"),
        ("newmtl m\nKd 255 0 0\n", r"Kd of the material 'm' is \[255.0, 0.0, 0.0\]"),
    ],
)
def test_a_material_that_says_nothing_is_refused_not_grey(tmp_path, material, sentence):
    with pytest.raises(UserError, match=sentence):
        load_mesh(write_obj(tmp_path, material))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_texts_of_windows_are_read(tmp_path, mark):
    path = write_obj(tmp_path, mark + TEXTURED.replace("\n", "\r\n"), picture())
    path.write_bytes((mark + path.read_text().replace("\n", "\r\n")).encode())
    rgba, _ = render_mesh(load_mesh(path), orbit_cameras([-90.0], [0.0], 9))
    red, green, _, _ = rgba[0][rgba[0, ..., 3] == 1].mean(0)
    assert red / green == pytest.approx(RED[0] / RED[1], rel=0.01)


def test_a_material_that_no_file_describes_is_refused(tmp_path):
    assert "the material 'm'" in refusal(write_obj(tmp_path, head=["usemtl m"]))
    load_mesh(write_obj(tmp_path, head=[]))  # it claims none


@pytest.mark.parametrize(
    "stated",
    [
        "/etc/passwd",
        "../../../../../../../../../../etc/passwd",
        "{elsewhere}/red.png",
        "../../elsewhere/red.png",
    ],
)
def test_a_material_does_not_choose_what_is_read(tmp_path, stated):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "red.png").write_bytes(picture())
    path = write_obj(
        tmp_path / "a" / "b",
        f"newmtl m\nmap_Kd {stated.format(elsewhere=tmp_path / 'elsewhere')}\n",
    )
    assert "which is not there or cannot be read" in refusal(path)


def test_pipes_and_devices_are_no_textures(tmp_path):
    os.mkfifo(tmp_path / "red.png")
    assert "names red.png" in refusal(write_obj(tmp_path))
    (tmp_path / "red.png").unlink()
    (tmp_path / "red.png").symlink_to("/dev/zero")
    assert "names red.png" in refusal(write_obj(tmp_path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vertices": ["v 0 0 nan", *VERTICES[1:]]}, "it holds 'v 0 0 nan'"),
        ({"vertices": ["v 0 -inf 0", *VERTICES[1:]]}, "it holds 'v 0 -inf 0'"),
        ({"vertices": ["v 0 0 1e400", *VERTICES[1:]]}, "coordinates that are not finite"),
        ({"vertices": [*VERTICES[:-1], "vt nan 1"]}, "it holds 'vt nan 1'"),
        (
            {"vertices": [*VERTICES[:-1], "vt 1e30 1"]},
            "texture coordinates are not finite, too large",
        ),
        ({"vertices": ["v 0 0 0 nan 0 0", *VERTICES[1:]]}, "it holds 'v 0 0 0 nan 0 0'"),
        ({"faces": [*FACES, "f 1/1 2/2 99/3"]}, "out of bounds"),
        ({"faces": [*FACES, "f 0/1 2/2 3/3"]}, "a face has the index 0"),
        ({"faces": ["f 1 3 2", "f 1 2 4"]}, "it has a texture, and no coordinates"),
        ({"faces": ["f 1/1 3/2 2/99"]}, "it has a texture, and no coordinates"),
        (
            {"vertices": VERTICES[:3], "faces": ["f -3 -2 -1", "v 9 9 9"]},
            "count backwards from vertices amid the file",
        ),
    ],
)
def test_numbers_that_are_none_are_refused(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        load_mesh(write_obj(tmp_path, texture=picture(), **change))


@pytest.mark.parametrize("scale", ["1e-9", "1e30"])
def test_a_mesh_of_any_scale_is_drawn(tmp_path, scale):
    small = [line.replace(" 1", f" {scale}") if line[:2] == "v " else line for line in VERTICES]
    views = [
        render_mesh(
            load_mesh(write_obj(tmp_path, texture=picture(), vertices=v)),
            orbit_cameras([-90.0], [0.0], 17),
        )
        for v in (VERTICES, small)
    ]
    assert np.allclose(views[0][0], views[1][0], atol=1e-3) and views[0][0][..., 3].any()


# ---------------------------------------------------------------- glTF


def cube() -> tuple[dict, bytearray]:
    """The tree and the data of a textured cube, no vertex shared."""
    box = trimesh.creation.box()
    corners = trimesh.Trimesh(
        box.vertices[box.faces].reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False
    )
    material = PBRMaterial(baseColorTexture=Image.open(io.BytesIO(picture())))
    uv = np.tile([[0, 0], [1, 0], [1, 1]], (12, 1))
    corners.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    data = trimesh.Scene(corners).export(file_type="glb")
    size = struct.unpack("<I", data[12:16])[0]
    return json.loads(data[20 : 20 + size]), bytearray(data[28 + size :])


def write_glb(path: Path, tree, data: bytes, **lies) -> Path:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    text, data = text + b" " * (-len(text) % 4), bytes(data)
    length = lies.get("length", 28 + len(text) + len(data))
    head = struct.pack("<4sII", b"glTF", 2, length) + struct.pack(
        "<I4s", lies.get("json", len(text)), b"JSON"
    )
    path.write_bytes(
        head + text + struct.pack("<I4s", lies.get("blob", len(data)), b"BIN\0") + data
    )
    return path


def accessor(tree: dict, name: str) -> dict:
    primitive = tree["meshes"][0]["primitives"][0]
    return tree["accessors"][
        primitive["indices"] if name == "indices" else primitive["attributes"][name]
    ]


def poke(tree: dict, data: bytearray, name: str, value) -> None:
    """Another first value of an accessor."""
    found = accessor(tree, name)
    start = tree["bufferViews"][found["bufferView"]].get("byteOffset", 0) + found.get(
        "byteOffset", 0
    )
    kind = {5121: "<B", 5123: "<H", 5125: "<I", 5126: "<f"}[found["componentType"]]
    struct.pack_into(kind, data, start, value)


def with_picture(tree: dict, data: bytearray, content: bytes) -> None:
    """Other bytes as the texture."""
    tree["bufferViews"].append({"buffer": 0, "byteOffset": len(data), "byteLength": len(content)})
    data += content + bytes(-len(content) % 4)
    tree["buffers"][0]["byteLength"] = len(data)
    tree["images"][0]["bufferView"] = len(tree["bufferViews"]) - 1


def test_a_good_cube_is_drawn_in_its_colour(tmp_path):
    assert first_color(write_glb(tmp_path / "t.glb", *cube())) == pytest.approx(RED, abs=2)
    tree, data = cube()
    with_picture(tree, data, picture("WEBP"))
    tree["textures"][0] = {"extensions": {"EXT_texture_webp": {"source": 0}}}
    assert first_color(write_glb(tmp_path / "t.glb", tree, data)) == pytest.approx(RED, abs=4)
    tree, data = cube()  # what cannot be read and colours nothing is no fault
    tree["images"].append({"uri": "normals.ktx2"})
    tree["textures"][0]["extensions"] = {"KHR_texture_basisu": {"source": 1}}
    assert first_color(write_glb(tmp_path / "t.glb", tree, data)) == pytest.approx(RED, abs=2)


@pytest.mark.parametrize(
    "content",
    [
        picture(size=64)[:90],
        b"no picture",
        b"",
        b"\xabKTX 20\xbb\r\n\x1a\n" + bytes(90),
        picture("EPS"),
    ],
    ids=["cut", "text", "empty", "KTX2", "EPS"],
)
def test_a_texture_inside_that_cannot_be_decoded_is_left_out_not_grey(tmp_path, content):
    (tmp_path / "meshes").mkdir()
    tree, data = cube()
    with_picture(tree, data, content)
    write_glb(tmp_path / "meshes" / "t.glb", tree, data)
    assert (
        make_dataset(mesh_jobs(tmp_path / "meshes"), tmp_path / "set", size=16, progress=False)
        == []
    )
    (noted,) = skipped_rows(tmp_path / "set")
    assert "baseColorTexture cannot be decoded" in noted["reason"]


def test_a_texture_that_would_be_huge_is_not_decoded(tmp_path, monkeypatch):
    blank = bytearray(picture())
    blank[16:24] = struct.pack(">II", 30_000, 30_000)
    chunk = bytes(blank[12:29])
    blank[29:33] = struct.pack(">I", zlib.crc32(chunk))
    tree, data = cube()
    with_picture(tree, data, bytes(blank))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    assert "cannot be decoded" in refusal(write_glb(tmp_path / "t.glb", tree, data))


def change(path: str, value):
    """A change of the tree at a path such as "materials.0.name"; None takes it away."""

    def apply(tree: dict, data: bytearray) -> None:
        *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in way:
            tree = tree[step]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda tree, data: poke(tree, data, "POSITION", np.nan),
            "coordinates that are not finite",
        ),
        (
            lambda tree, data: poke(tree, data, "TEXCOORD_0", np.inf),
            "texture coordinates are not finite",
        ),
        (lambda tree, data: poke(tree, data, "indices", 200), "a triangle names vertex 200 of 36"),
        (
            lambda tree, data: accessor(tree, "POSITION").update(count=10**9),
            "is longer than its data",
        ),
        (
            lambda tree, data: accessor(tree, "POSITION").pop("bufferView"),
            "POSITION are sparse or packed",
        ),
        (
            lambda tree, data: accessor(tree, "POSITION").update(sparse={}),
            "POSITION are sparse or packed",
        ),
        (
            lambda tree, data: tree["accessors"].append(
                {"componentType": 5126, "type": "VEC3", "count": 10**9}
            ),
            "its arrays claim 12,000,00",
        ),
        (change("bufferViews.0.byteLength", 10**7), "a view is longer than its buffer"),
        (change("bufferViews.0.byteOffset", -4), "it gives -4 where a whole number belongs"),
        (change("textures.0.source", None), "is of a kind that is not known here"),
        (
            change("images.0", {"uri": "../../../../../../../etc/passwd"}),
            "which is not there or cannot be read",
        ),
        (
            change("images.0", {"uri": "http://example.com/a.png"}),
            "which is not there or cannot be read",
        ),
        (change("images.0", {"uri": "data:image/png;base64,AAAA"}), "cannot be decoded"),
        (change("images.0.mimeType", "image/ktx2"), "is said to be KTX2"),
        (
            change("materials.0.pbrMetallicRoughness.baseColorTexture.texCoord", 1),
            "on a second set of coordinates",
        ),
        (
            change("materials.0.pbrMetallicRoughness.baseColorFactor", [2, 1, 1, 1]),
            "baseColorFactor is",
        ),
        (
            change("materials.0.pbrMetallicRoughness.baseColorFactor", [float("nan")] * 4),
            "it holds NaN",
        ),
        (
            change("extensionsRequired", ["KHR_draco_mesh_compression"]),
            "requires the extension KHR_draco",
        ),
        (
            change("extensionsRequired", ["EXT_meshopt_compression"]),
            "requires the extension EXT_meshopt",
        ),
        (change("meshes.0.primitives.0.mode", 6), "it draws in mode 6"),
        (change("nodes.0.children", [0]), "one has two parents"),
        (lambda tree, data: tree["nodes"].extend([{"mesh": 0}] * 10_001), "nodes, above 10,000"),
    ],
)
def test_a_gltf_that_would_be_drawn_otherwise_is_refused(tmp_path, damage, sentence):
    tree, data = cube()
    damage(tree, data)
    with pytest.raises(UserError, match=sentence):
        load_mesh(write_glb(tmp_path / "t.glb", tree, data))


def test_shiny_materials_are_checked_too(tmp_path):
    tree, data = cube()
    shiny = {"diffuseTexture": {"index": 0}, "specularFactor": [0, 0, 0]}
    tree["materials"] = [{"extensions": {"KHR_materials_pbrSpecularGlossiness": shiny}}]
    assert first_color(write_glb(tmp_path / "t.glb", tree, data)) == pytest.approx(RED, abs=12)
    with_picture(tree, data, picture(mode="P"))  # trimesh would take its indices for colours
    assert "diffuseTexture cannot be decoded" in refusal(write_glb(tmp_path / "t.glb", tree, data))


@pytest.mark.parametrize(
    ("lies", "sentence"),
    [
        ({"length": 10**9}, "it is cut off"),
        ({"json": 2**32 - 1}, "a chunk of 4294967295 bytes is longer than the file"),
        ({"blob": 2**32 - 1}, "a chunk of 4294967295 bytes is longer than the file"),
    ],
)
def test_a_glb_that_lies_about_its_lengths_is_refused(tmp_path, lies, sentence):
    with pytest.raises(UserError, match=sentence):
        load_mesh(write_glb(tmp_path / "t.glb", *cube(), **lies))


def test_copies_are_counted_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("gsv3d_lib.data.meshfiles.MAX_TRIANGLES", 100)
    tree, data = cube()
    tree["nodes"] += [{"mesh": 0, "name": f"copy {k}"} for k in range(9)]
    tree["scenes"][0]["nodes"] = list(range(len(tree["nodes"])))
    tree["nodes"][0].pop("children", None)
    assert "triangles, above 10,000 and 100" in refusal(write_glb(tmp_path / "t.glb", tree, data))


def test_buffers_of_a_gltf_lie_beside_it_or_inside(tmp_path):
    tree, data = cube()
    tree["buffers"][0]["uri"] = (
        "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    )
    (tmp_path / "t.gltf").write_text(json.dumps(tree))
    assert first_color(tmp_path / "t.gltf") == pytest.approx(RED, abs=2)
    (tmp_path / "data.buffer").write_bytes(data)
    tree["buffers"][0]["uri"] = "data.buffer"
    (tmp_path / "t.gltf").write_text(json.dumps(tree))
    assert first_color(tmp_path / "t.gltf") == pytest.approx(RED, abs=2)
    for uri in ("../../../../../../../../etc/passwd", "/dev/zero", "http://example.com/a.bin"):
        tree["buffers"][0]["uri"] = uri
        (tmp_path / "t.gltf").write_text(json.dumps(tree))
        assert "which is not there" in refusal(tmp_path / "t.gltf")
    (tmp_path / "t.gltf").write_text("[" * 100_000)
    assert "Cannot read t.gltf" in refusal(tmp_path / "t.gltf")


def test_vertex_colours_of_16_bits_are_scaled(tmp_path):
    from gsv3d_lib.data.meshfiles import unit_rgb

    assert unit_rgb(np.uint16([[65535, 0, 32768, 1]]))[0] == pytest.approx([1, 0, 0.5], abs=1e-4)
    assert unit_rgb(np.uint8([[255, 0, 51, 1]]))[0] == pytest.approx([1, 0, 0.2])


# ---------------------------------------------------------------- PLY, STL, OFF


def test_a_cube_with_a_vertex_that_is_no_number_is_not_half_a_cube(tmp_path):
    box = trimesh.creation.box()
    for suffix in ("ply", "stl", "off"):
        path = tmp_path / f"box.{suffix}"
        box.export(path)
        assert sum(len(part.faces) for part in load_mesh(path).dump()) == 12
        data = path.read_bytes()
        if suffix == "off":
            path.write_bytes(data.replace(b"-0.5000000000", b"nan", 1))
        else:
            start = data.index(b"end_header\n") + 11 if suffix == "ply" else 96
            path.write_bytes(data[:start] + struct.pack("<f", np.nan) + data[start + 4 :])
        assert "coordinates that are not finite" in refusal(path)


def test_a_ply_with_indices_that_are_none_is_refused(tmp_path):
    data = trimesh.creation.box().export(file_type="ply")
    for index in (500, -3):
        (tmp_path / "t.ply").write_bytes(data[:-4] + struct.pack("<i", index))
        assert "a triangle names vertex" in refusal(tmp_path / "t.ply")
    (tmp_path / "t.ply").write_bytes(data.replace(b"element vertex 8", b"element vertex 800000000"))
    assert "Cannot read t.ply" in refusal(tmp_path / "t.ply")
    (tmp_path / "t.ply").write_bytes(
        data.replace(b"end_header", b"comment TextureFile no.png\nend_header")
    )
    assert "t.ply names no.png" in refusal(tmp_path / "t.ply")


def test_vertices_that_no_triangle_uses_may_be_anything(tmp_path):
    box = trimesh.creation.box()
    vertices = np.concatenate([box.vertices, [[np.nan] * 3]])
    trimesh.Trimesh(vertices, box.faces, process=False).export(tmp_path / "t.ply")
    assert sum(len(part.faces) for part in load_mesh(tmp_path / "t.ply").dump()) == 12


def test_colours_that_would_be_lost_are_refused(tmp_path):
    text = trimesh.creation.box().export(file_type="off")
    colored = [f"{line} 255 0 0" if line.startswith("3 ") else line for line in text.splitlines()]
    (tmp_path / "t.off").write_text("\n".join(colored))
    assert "save it as PLY" in refusal(tmp_path / "t.off")
    (tmp_path / "t.off").write_text("C" + text)
    assert "save it as PLY" in refusal(tmp_path / "t.off")
