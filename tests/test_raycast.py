"""Ray casting against closed forms: spheres, boxes, textured quads, camera axes."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from gsv3d_lib.cameras import DISTANCE, orbit_cameras, ray_grid
from gsv3d_lib.data.dataset import read_object
from gsv3d_lib.data.raycast import (
    AMBIENT,
    SKY,
    Target,
    brightness,
    load_mesh,
    normalized,
    render_mesh,
)


def colored_box(size=(1.0, 1.0, 1.0)) -> trimesh.Trimesh:
    """Red at +x, green at +y, blue at +z, the opposite sides dark grey."""
    mesh = trimesh.creation.box(extents=size)
    rgb = np.where(mesh.face_normals > 0.5, 255, 0)
    rgb[(mesh.face_normals < -0.5).any(1)] = 40
    mesh.visual.face_colors = np.column_stack([rgb, np.full(len(rgb), 255)]).astype(np.uint8)
    return mesh


def textured_quad(image: Image.Image) -> trimesh.Trimesh:
    """A unit square in the plane y = 0.

    u runs along +x, v along +z, as its front (-y) shows the picture upright.
    """
    corners = [(-0.5, 0, -0.5), (0.5, 0, -0.5), (0.5, 0, 0.5), (-0.5, 0, 0.5)]
    uv = [(0, 0), (1, 0), (1, 1), (0, 1)]
    visual = trimesh.visual.TextureVisuals(
        uv=uv, material=trimesh.visual.material.SimpleMaterial(image=image)
    )
    return trimesh.Trimesh(corners, [(0, 1, 2), (0, 2, 3)], visual=visual, process=False)


def test_depth_of_a_sphere_matches_the_closed_form():
    radius, cameras = 0.8, orbit_cameras([20.0, 200.0], [10.0, -35.0], 48)
    rgba, depth = render_mesh(trimesh.creation.icosphere(subdivisions=5, radius=radius), cameras)
    origins, directions = (rays.double().numpy() for rays in ray_grid(cameras, 48, 48))
    along = -(origins * directions).sum(-1)  # |o + t d| = radius
    inside = along**2 - (origins**2).sum(-1) + radius**2
    z_per_t = np.einsum("vhwx,vx->vhw", directions, cameras.viewmats[:, 2, :3].numpy())
    expected = (along - np.sqrt(np.maximum(inside, 0))) * z_per_t
    safe = inside > 0.05  # away from the rim, where the triangles' chords matter
    assert np.abs(depth - expected)[safe].max() < 1e-3
    assert (rgba[..., 3][safe] == 1).all(), "no ray slips through between two triangles"
    assert (depth[inside < -0.01] == 0).all() and (rgba[..., 3][inside < -0.05] == 0).all()


def test_depth_of_a_box_is_exact():
    cameras = orbit_cameras([0.0], [0.0], 32)
    _, depth = render_mesh(colored_box((0.6, 1.0, 1.0)), cameras, supersample=1)
    assert depth[0, 12:20, 12:20] == pytest.approx(DISTANCE - 0.3, abs=2e-6), (
        "z-depth, not the length of the ray"
    )


def test_depth_is_not_averaged_across_edges():
    _, depth = render_mesh(colored_box(), orbit_cameras([0.0], [0.0], 33), supersample=4)
    assert set(np.round(np.unique(depth), 4)) == {0.0, np.float32(round(DISTANCE - 0.5, 4))}


def test_alpha_is_the_covered_share_of_a_pixel():
    rgba, _ = render_mesh(colored_box(), orbit_cameras([0.0], [0.0], 33), supersample=4)
    alpha, half = rgba[0, ..., 3], 16.5 / np.tan(np.radians(33.8 / 2)) * 0.5 / (DISTANCE - 0.5)
    assert alpha[16].sum() == pytest.approx(2 * half, abs=0.5), (
        "width of the middle row, to a quarter pixel per side"
    )
    assert ((alpha > 0) & (alpha < 1)).any()
    assert np.allclose(rgba[0, ..., 0][(alpha > 0) & (alpha < 1)], rgba[0, 16, 16, 0]), (
        "straight alpha"
    )


@pytest.mark.parametrize(
    "azimuth, elevation, channel", [(0, 0, 0), (90, 0, 1), (0, 80, 2), (90, 80, 2)]
)
def test_each_side_is_seen_from_its_own_direction(azimuth, elevation, channel):
    rgba, _ = render_mesh(colored_box(), orbit_cameras([float(azimuth)], [float(elevation)], 17))
    assert rgba[0, 8, 8, channel] > 0.6 and np.delete(rgba[0, 8, 8, :3], channel).max() < 0.05


def test_up_is_up_and_right_is_right():
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.15)
    above, right = (
        ball.copy().apply_translation([0, 0, 0.7]),
        ball.copy().apply_translation([0.7, 0, 0]),
    )
    cameras = orbit_cameras([270.0], [0.0], 33)  # stands at -y and looks at the front
    rows, columns = np.nonzero(render_mesh(above, cameras)[1][0])
    assert rows.mean() < 10 and columns.mean() == pytest.approx(16)
    rows, columns = np.nonzero(render_mesh(right, cameras)[1][0])
    assert columns.mean() > 22 and rows.mean() == pytest.approx(16)


def test_texture_colours_and_orientation():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0], pixels[1, 1] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
    )
    quad = textured_quad(Image.fromarray(np.kron(pixels, np.ones((32, 32, 1), np.uint8))))
    rgba, _ = render_mesh(quad, orbit_cameras([270.0], [0.0], 64))
    light = brightness(np.array([[0.0, -1.0, 0.0]]))[0]
    for row, column, color in [
        (24, 24, (1, 0, 0)),
        (24, 40, (0, 1, 0)),
        (40, 24, (0, 0, 1)),
        (40, 40, (1, 1, 0)),
    ]:
        assert rgba[0, row, column, :3] == pytest.approx(light * np.array(color), abs=1e-3)


def test_texture_lookup_is_bilinear_and_wraps():
    ramp = Image.fromarray(np.array([[0, 100, 200, 100]], np.uint8).repeat(4, 0)).convert("RGB")
    lookup = Target(textured_quad(ramp)).lookups[0]
    # texel centre, half way, texel centre, across the seam
    u = np.array([1 / 8, 2 / 8, 3 / 8, 0.0])
    weights = np.stack([1 - u, u, 0 * u], axis=1)
    red = lookup(np.zeros(4, int), weights)[:, 0] * 255
    assert red == pytest.approx([0, 50, 100, 50], abs=0.01)


def test_vertex_colours_are_interpolated():
    mesh = trimesh.Trimesh([(0, 0, 0), (1, 0, 0), (0, 0, 1)], [(0, 1, 2)], process=False)
    mesh.visual.vertex_colors = np.uint8([(255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)])
    rgb = Target(mesh).lookups[0](np.array([0]), np.float32([[0.2, 0.3, 0.5]]))
    assert rgb[0] == pytest.approx([0.2, 0.3, 0.5], abs=1e-6)


def test_light_depends_on_the_surface_and_not_on_the_camera():
    floor = trimesh.creation.box(extents=(1, 1, 0.1))
    floor.visual.vertex_colors = np.uint8([128, 128, 128, 255])
    rgba, _ = render_mesh(floor, orbit_cameras([0.0, 77.0, 200.0], 80.0, 17))
    assert np.ptp(rgba[:, 8, 8, 0]) < 1e-6
    assert brightness(np.array([[0.0, 0.0, -1.0]]))[0] == pytest.approx(AMBIENT)
    assert brightness(np.array([[0.0, 0.0, 1.0]]))[0] > AMBIENT + SKY


def test_rendering_is_bit_repeatable():
    mesh, cameras = colored_box(), orbit_cameras([30.0, 120.0], 20.0, 40)
    first, second = render_mesh(mesh, cameras), render_mesh(mesh, cameras)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


def test_scenes_keep_the_colours_of_their_parts():
    low, high = trimesh.creation.box(extents=(1, 1, 0.5)), trimesh.creation.box(extents=(1, 1, 0.5))
    low.visual.vertex_colors, high.visual.vertex_colors = (
        np.uint8([255, 0, 0, 255]),
        np.uint8([0, 255, 0, 255]),
    )
    scene = trimesh.Scene(low)
    scene.add_geometry(high, transform=trimesh.transformations.translation_matrix([0, 0, 0.5]))
    rgba, _ = render_mesh(normalized(scene), orbit_cameras([0.0], [0.0], 32))
    assert rgba[0, 10, 16, :3].argmax() == 1 and rgba[0, 22, 16, :3].argmax() == 0


def test_normalized_touches_the_unit_ball():
    scene = normalized(trimesh.creation.box(extents=(2, 4, 6)).apply_translation([5, 6, 7]))
    points = np.concatenate([part.vertices for part in scene.dump()])
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
    assert np.allclose(scene.bounds.mean(0), 0)


def test_glb_is_read_as_y_up_and_its_front_turns_to_minus_y(tmp_path):
    spike = trimesh.creation.box(extents=(0.2, 2, 0.2))  # up, in a y-up file
    # the glTF front is +z
    nose = trimesh.creation.box(extents=(0.1, 0.1, 0.5)).apply_translation([0, 0, 0.5])
    trimesh.Scene([spike, nose]).export(tmp_path / "thing.glb")
    bounds = load_mesh(tmp_path / "thing.glb").bounds
    assert np.ptp(bounds, axis=0).argmax() == 2
    parts = sorted(load_mesh(tmp_path / "thing.glb").dump(), key=lambda part: part.volume)
    assert parts[0].centroid[1] < 0
    assert np.ptp(load_mesh(tmp_path / "thing.glb", up="z").bounds, axis=0).argmax() == 1


@pytest.mark.parametrize("suffix", ["glb", "ply", "obj"])
def test_vertex_colours_survive_a_file(tmp_path, suffix):
    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.visual.vertex_colors = np.uint8([200, 50, 100, 255])
    mesh.export(tmp_path / f"ball.{suffix}")
    rgba, _ = render_mesh(load_mesh(tmp_path / f"ball.{suffix}"), orbit_cameras([0.0], [0.0], 9))
    assert rgba[0, 4, 4, 0] / rgba[0, 4, 4, 2] == pytest.approx(2, rel=0.05)


def test_a_gltf_material_multiplies_vertex_colours(tmp_path):
    """Base colour factor, texture and linear vertex colours, as glTF 2.0 has it."""
    mesh = textured_quad(Image.new("RGB", (4, 4), (255, 255, 128)))
    linear = 55  # of 255, which is 128 of 255 in sRGB
    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=[linear, 255, 255, 255],
        baseColorTexture=mesh.visual.material.image,
        alphaMode="OPAQUE",
    )
    mesh.visual = trimesh.visual.TextureVisuals(uv=mesh.visual.uv, material=material)
    mesh.visual.vertex_attributes["color"] = np.full((4, 4), [255, linear, 255, 255], np.uint8)
    mesh.export(tmp_path / "quad.glb")
    rgba, _ = render_mesh(
        load_mesh(tmp_path / "quad.glb", up="z"), orbit_cameras([-90.0], [0.0], 9)
    )
    assert rgba[0, 4, 4, :3] / rgba[0, 4, 4, 0] == pytest.approx([1, 1, 1], abs=0.03)


def textured_obj(folder: Path, stated: str) -> Path:
    """A square whose material names its picture as `stated`."""
    folder.mkdir(parents=True)
    corners = ["v 0 0 0", "v 1 0 0", "v 1 0 1", "v 0 0 1", "vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1"]
    lines = ["mtllib square.mtl", "usemtl m", *corners, "f 1/1 2/2 3/3 4/4"]
    (folder / "square.obj").write_text("\n".join(lines) + "\n")
    (folder / "square.mtl").write_text(f"newmtl m\nKd 0.5 0.5 0.5\nmap_Kd {stated}\n")
    return folder / "square.obj"


@pytest.mark.parametrize(
    ("stated", "place"),
    [
        ("red.png", "red.png"),
        ("../textures/red.png", "../textures/red.png"),
        ("maps\\red one.png", "maps/red one.png"),
        ("C:\\Users\\me\\red.png", "red.png"),
    ],
)
def test_a_texture_is_found_where_the_file_says_or_beside_it(tmp_path, stated, place):
    path = textured_obj(tmp_path / "square", stated)
    (path.parent / place).parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), (200, 20, 20)).save(path.parent / place)
    rgba, _ = render_mesh(load_mesh(path), orbit_cameras([-90.0], [0.0], 9))
    assert rgba[0, 4, 4, 0] > 5 * rgba[0, 4, 4, 1]


def test_a_gltf_names_its_picture_by_an_address(tmp_path):
    mesh = textured_quad(Image.new("RGB", (4, 4), (200, 20, 20)))
    files = trimesh.Scene(mesh).export(file_type="gltf")
    tree = json.loads(files.pop("model.gltf"))
    tree["images"] = [{"uri": "red%20one.png"}]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "model.gltf").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="model.gltf names red%20one.png, which is not there"):
        load_mesh(tmp_path / "model.gltf")
    Image.new("RGB", (4, 4), (200, 20, 20)).save(tmp_path / "red one.png")
    rgba, _ = render_mesh(
        load_mesh(tmp_path / "model.gltf", up="z"), orbit_cameras([-90.0], [0.0], 9)
    )
    assert rgba[0, 4, 4, 0] > 5 * rgba[0, 4, 4, 1]


@pytest.mark.parametrize("gone", ["red.png", "square.mtl"])
def test_a_mesh_without_its_picture_or_material_is_refused_not_grey(tmp_path, gone):
    path = textured_obj(tmp_path / "square", "red.png")
    Image.new("RGB", (4, 4)).save(path.parent / "red.png")
    (path.parent / gone).unlink()
    with pytest.raises(ValueError, match=f"square.obj names {gone}, which is not there"):
        load_mesh(path)


def test_a_mesh_with_a_picture_of_an_unknown_kind_is_refused_not_grey(tmp_path):
    path = textured_obj(tmp_path / "square", "red.exr")
    (path.parent / "red.exr").write_bytes(b"v/1\x01 what PIL does not read")
    with pytest.raises(
        ValueError, match="square.obj names red.exr, which is not there or cannot be read"
    ):
        load_mesh(path)


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no mesh file"):
        load_mesh(tmp_path / "none.obj")
    (tmp_path / "broken.glb").write_bytes(b"not a mesh")
    with pytest.raises(ValueError, match="Cannot read broken.glb"):
        load_mesh(tmp_path / "broken.glb")
    (tmp_path / "point.obj").write_text("v 0 0 0\n")
    with pytest.raises(ValueError, match="no triangles|Cannot read point.obj"):
        load_mesh(tmp_path / "point.obj")
    colored_box().export(tmp_path / "box.ply")
    with pytest.raises(ValueError, match="up must be"):
        load_mesh(tmp_path / "box.ply", up="x")
    with pytest.raises(ValueError, match="supersample"):
        render_mesh(colored_box(), orbit_cameras([0.0], [0.0], 8), supersample=0)


def test_agrees_with_the_shared_rendering_of_a_scan(shared_objects):
    id = "Android_Figure_Chrome"
    views = read_object(shared_objects / "gso", id)
    pick = [0, 5, 12, 17, 20]
    rgba, depth = render_mesh(
        load_mesh(shared_objects / "meshes" / id / "model.obj"), views.cameras[pick]
    )
    ours, theirs = rgba[..., 3] > 0.5, views.rgba[pick, ..., 3] > 127
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97
    both = (depth > 0) & (views.depth[pick] > 0)
    assert np.median(np.abs(depth - views.depth[pick])[both]) < 5e-4
    error = np.abs(rgba[..., :3] - views.rgba[pick, ..., :3] / 255)[ours & theirs]
    assert np.median(error) < 0.06
