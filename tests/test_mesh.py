"""Depth maps of known shapes must come back as those shapes."""

import json
import math
import struct

import numpy as np
import pytest
import torch
import trimesh

from gsv3d_lib.cameras import orbit_cameras, ray_grid
from gsv3d_lib.evaluation.metrics import (
    chamfer_distance,
    occupancy_grid,
    surface_points,
    volume_iou,
)
from gsv3d_lib.export.mesh import (
    front_depth,
    fuse_depth_maps,
    fuse_mesh,
    save_mesh,
    surrounding_cameras,
)
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rendering import render

VIEWS, SIZE = 32, 128  # the defaults of fuse_mesh
COARSE = 48  # grid points per axis where the exact shape does not matter


def ball(origins, directions, radius=0.8, centre=(0.0, 0.0, 0.0)):
    """Distance along unit rays [V, H, W, 3] to a sphere; infinite where they miss."""
    to_centre = torch.tensor(centre) - origins
    along = (to_centre * directions).sum(-1)
    inside = radius**2 - (to_centre**2).sum(-1) + along**2
    return torch.where(inside > 0, along - inside.clamp(min=0).sqrt(), torch.inf)


def box(origins, directions, half=(0.6, 0.45, 0.3)):
    sides = torch.stack([(sign * torch.tensor(half) - origins) / directions for sign in (-1, 1)])
    enter, leave = sides.amin(0).amax(-1), sides.amax(0).amin(-1)
    return torch.where(leave > enter, enter, torch.inf)


def views_of(distance, color=(0.8, 0.3, 0.1), cameras=None):
    """Exact RGB-D of a shape given by its ray distance: rgb, depth, alpha, cameras."""
    cameras = cameras or surrounding_cameras(VIEWS, SIZE)
    origins, directions = ray_grid(cameras, cameras.height, cameras.width)
    length = distance(origins, directions)[..., None]
    alpha = torch.isfinite(length).float()
    forward = cameras.c2w()[:, None, None, :3, 2]
    depth = torch.where(alpha > 0, length * (directions * forward).sum(-1, keepdim=True), 0)
    points = origins + directions * torch.where(alpha > 0, length, 0)
    shade = torch.tensor(color).expand_as(points) if not callable(color) else color(points)
    return shade * alpha + 1 - alpha, depth, alpha, cameras


def dense_points(mesh) -> np.ndarray:
    return surface_points(mesh, 40_000, seed=9)


@pytest.mark.parametrize(
    ("shape", "truth"),
    [
        (ball, trimesh.creation.icosphere(subdivisions=5, radius=0.8)),
        (box, trimesh.creation.box(extents=(1.2, 0.9, 0.6))),
    ],
    ids=["sphere", "box"],
)
def test_exact_depth_maps_come_back_as_the_shape(shape, truth):
    mesh = fuse_depth_maps(*views_of(shape))
    # Two samples of the truth itself differ by the sampling's own floor; the mesh may
    # add at most 0.01 to it.
    points = surface_points(truth, seed=1)
    floor = chamfer_distance(surface_points(truth, seed=2), points)
    assert chamfer_distance(surface_points(mesh), points) - floor < 0.002
    assert chamfer_distance(dense_points(mesh), dense_points(truth)) < 0.01 + 0.002
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(truth.volume, rel=0.03)  # positive: the faces look outwards
    assert volume_iou(occupancy_grid(mesh), occupancy_grid(truth)) > 0.95


def test_sphere_vertices_lie_on_the_sphere_wherever_it_is():
    centre = (0.15, -0.2, 0.1)
    mesh = fuse_depth_maps(*views_of(lambda o, d: ball(o, d, 0.5, centre)), 64)
    radii = np.linalg.norm(mesh.vertices - centre, axis=1)
    assert np.abs(radii - 0.5).mean() < 0.005 and np.abs(radii - 0.5).max() < 0.02


def test_thin_plate_and_rod_survive():
    plate = fuse_depth_maps(*views_of(lambda o, d: box(o, d, (0.6, 0.5, 0.015))))
    rod = fuse_depth_maps(*views_of(lambda o, d: box(o, d, (0.03, 0.03, 0.8))))
    assert plate.volume == pytest.approx(1.2 * 1.0 * 0.03, rel=0.2)
    assert rod.volume == pytest.approx(0.06 * 0.06 * 1.6, rel=0.2)
    assert np.allclose(rod.bounds[:, 2], (-0.8, 0.8), atol=0.03)


def test_colors_are_those_of_the_nearest_surface():
    def half_and_half(points):
        return torch.where(
            points[..., :1] > 0, torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.8])
        )

    rgb, depth, alpha, cameras = views_of(ball, half_and_half)
    mesh = fuse_depth_maps(rgb, depth, alpha, cameras, COARSE)
    colors = mesh.visual.vertex_colors[:, :3] / 255
    for side, expected in (
        (mesh.vertices[:, 0] > 0.05, (0.9, 0.1, 0.1)),
        (mesh.vertices[:, 0] < -0.05, (0.1, 0.2, 0.8)),
    ):
        assert np.abs(colors[side] - expected).max() < 0.02


def test_white_background_is_taken_out_of_soft_pixels():
    rgb, depth, alpha, cameras = views_of(ball, (0.2, 0.4, 0.6))
    soft = 0.7 * alpha
    mesh = fuse_depth_maps(soft * rgb + 1 - soft, depth, soft, cameras, COARSE)
    assert np.abs(mesh.visual.vertex_colors[:, :3] / 255 - (0.2, 0.4, 0.6)).max() < 0.01


def test_small_floaters_are_removed_and_equal_parts_kept():
    def pair(radius):
        return lambda o, d: torch.minimum(
            ball(o, d, 0.5, (-0.3, 0.0, 0.0)), ball(o, d, radius, (0.7, 0.0, 0.0))
        )

    with_floater = fuse_depth_maps(*views_of(pair(0.1)), COARSE)
    assert with_floater.bounds[1, 0] < 0.25 and with_floater.body_count == 1
    with_part = fuse_depth_maps(*views_of(pair(0.25)), COARSE)
    assert with_part.bounds[1, 0] == pytest.approx(0.95, abs=0.03) and with_part.body_count == 2


def test_no_camera_stands_lower_than_asked():
    heights = surrounding_cameras(64, 32, lowest=-10.0).positions()[:, 2] / 3.509
    assert heights.min() > math.sin(math.radians(-10))
    # evenly over what is left: a third of the cameras above a third of its height
    top = 1 - (1 + math.sin(math.radians(10))) / 4
    assert (heights > top).sum() == 16


def test_cameras_surround_the_object_at_its_distance():
    positions = surrounding_cameras(64, 32).positions()
    assert torch.allclose(positions.norm(dim=-1), torch.tensor(3.509))
    assert positions.mean(0).norm() < 0.1
    nearest = torch.cdist(positions, positions).fill_diagonal_(9).amin(1)
    assert nearest.min() > 0.6 * nearest.max()


# ---------------------------------------------------------------- from Gaussians


def gaussian_ball(count=4000, radius=0.6, color=(0.1, 0.5, 0.9)) -> Gaussians:
    points = surface_points(trimesh.creation.icosphere(subdivisions=4, radius=radius), count)
    means = torch.from_numpy(points).float()
    quats, scales = torch.tensor([1.0, 0, 0, 0]).repeat(count, 1), torch.full((count, 3), 0.02)
    return Gaussians(
        means, quats, scales, torch.full((count,), 0.95), torch.tensor(color).repeat(count, 1)
    )


def test_gaussians_on_a_sphere_become_a_sphere():
    mesh = fuse_mesh(gaussian_ball(3000), num_views=24)  # its gaps let 15 % of the light through
    radii = np.linalg.norm(mesh.vertices, axis=1)
    # The surface of a shell of Gaussians lies about one standard deviation (0.02) in
    # front of their centres.
    assert mesh.is_watertight and np.abs(radii - 0.61).mean() < 0.02
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.61**3, rel=0.08)
    assert np.abs(mesh.visual.vertex_colors[:, :3] / 255 - (0.1, 0.5, 0.9)).max() < 0.05


def test_what_is_open_from_below_is_closed():
    # no loss has seen the bottom, so a model may leave it out
    scene = gaussian_ball(6000)
    dome = scene.select(scene.means[:, 2] > -0.3)
    solid = fuse_mesh(dome, num_views=24, colors=False)
    cap = math.pi * 0.3**2 * (0.6 - 0.3 / 3)  # of the ball, below z = -0.3
    expected = 4 / 3 * math.pi * 0.6**3 - cap
    assert solid.is_watertight
    assert solid.volume == pytest.approx(expected, rel=0.2)


def test_front_depth_separates_two_surfaces():
    # Two large Gaussians behind one another on the axis of a camera at distance 3.509:
    # z = 3.109 and 4.009.
    camera = orbit_cameras([0.0], 0.0, 33)
    means, quats = (
        torch.tensor([[0.4, 0.0, 0.0], [-0.5, 0.0, 0.0]]),
        torch.tensor([[1.0, 0, 0, 0]] * 2),
    )
    scene = Gaussians(
        means, quats, torch.full((2, 3), 0.3), torch.tensor([0.7, 0.99]), torch.rand(2, 3)
    )
    _, depth, alpha = render(scene, camera)
    centre = (0, 16, 16, 0)
    assert 3.2 < depth[centre] < 3.6 and alpha[centre] > 0.99
    assert front_depth(scene, camera, depth)[centre].item() == pytest.approx(3.109, abs=1e-3)
    opaque = scene.select([0])
    _, depth, _ = render(opaque, camera)
    assert torch.equal(front_depth(opaque, camera, depth), depth)  # one surface: left alone


def test_nothing_to_mesh_is_one_clear_error():
    scene = gaussian_ball(10)
    faint = Gaussians(*scene.tensors()[:3], scene.opacities * 0.01, scene.colors)
    with pytest.raises(ValueError, match="There are no Gaussians"):
        fuse_mesh(scene.select(slice(0, 0)))
    with pytest.raises(ValueError, match="too faint"):
        fuse_mesh(faint, num_views=4, size=32)


def test_wrong_input_is_named():
    rgb, depth, alpha, cameras = views_of(ball, cameras=surrounding_cameras(4, 16))
    with pytest.raises(ValueError, match=r"4 cameras of \(16, 16\) pixels"):
        fuse_depth_maps(rgb[:3], depth[:3], alpha[:3], cameras)
    with pytest.raises(ValueError, match="at least 8 points per axis, got 4"):
        fuse_depth_maps(rgb, depth, alpha, cameras, resolution=4)
    with pytest.raises(ValueError, match="No view shows a surface"):
        fuse_depth_maps(rgb, depth * 0, alpha * 0, cameras)


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def colored_box():
    mesh = trimesh.creation.box(bounds=[[-0.2, -0.9, -0.4], [0.2, 0.1, 0.5]])
    mesh.visual.vertex_colors = np.tile([200, 100, 50, 255], (8, 1)).astype(np.uint8)
    return mesh


@pytest.mark.parametrize("suffix", [".obj", ".ply"])
def test_obj_and_ply_keep_axes_and_colors(colored_box, suffix, tmp_path):
    path = tmp_path / f"new/box{suffix}"
    save_mesh(colored_box, path)
    loaded = trimesh.load(path, process=False)
    assert np.allclose(loaded.bounds, colored_box.bounds, atol=1e-6)
    assert np.abs(loaded.visual.vertex_colors[:, :3].astype(int) - (200, 100, 50)).max() <= 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left


def test_glb_is_y_up_unlit_and_linear(colored_box, tmp_path):
    path = tmp_path / "box.glb"
    save_mesh(colored_box, path)
    loaded = trimesh.load(path, force="mesh", process=False)
    low, high = colored_box.bounds
    assert np.allclose(
        loaded.bounds, [[low[0], low[2], -high[1]], [high[0], high[2], -low[1]]], atol=1e-6
    )
    assert loaded.volume > 0
    tree, arrays = read_glb(path)
    assert "KHR_materials_unlit" in tree["materials"][0]["extensions"]
    linear = ((np.array([200, 100, 50]) / 255 + 0.055) / 1.055) ** 2.4
    assert np.allclose(arrays["COLOR_0"], linear, rtol=1e-6)


WIDTHS = {5126: "<f4", 5125: "<u4"}  # glTF's componentType
LENGTHS = {"SCALAR": 1, "VEC3": 3}


def read_glb(path) -> tuple[dict, dict[str, np.ndarray]]:
    """A GLB of one primitive, held to the rules of glTF 2.0: its JSON, and its
    attributes and indices by name.
    """
    data = path.read_bytes()
    magic, version, length, json_length, json_type = struct.unpack("<4sIII4s", data[:20])
    assert (magic, version, length, json_type) == (b"glTF", 2, len(data), b"JSON")
    tree = json.loads(data[20 : 20 + json_length])
    binary_length, binary_type = struct.unpack("<I4s", data[20 + json_length : 28 + json_length])
    binary = data[28 + json_length :]
    assert (
        binary_type == b"BIN\0"
        and binary_length == len(binary)
        and not json_length % 4
        and not len(binary) % 4
    )
    assert tree["asset"]["version"] == "2.0" and tree["buffers"] == [{"byteLength": len(binary)}]
    assert set(tree["extensionsUsed"]) == set(tree["materials"][0]["extensions"])
    (primitive,) = tree["meshes"][tree["nodes"][tree["scenes"][tree["scene"]]["nodes"][0]]["mesh"]][
        "primitives"
    ]
    assert primitive["material"] == 0 and len(tree["materials"]) == 1
    arrays, end = {}, 0
    for name, index in (primitive["attributes"] | {"indices": primitive["indices"]}).items():
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        record = np.dtype((WIDTHS[accessor["componentType"]], LENGTHS[accessor["type"]]))
        start, stop = view["byteOffset"], view["byteOffset"] + view["byteLength"]
        assert start == end and stop <= len(binary) and start % 4 == 0  # aligned, none overlaps
        assert accessor["count"] > 0 and accessor["count"] * record.itemsize == view["byteLength"]
        assert view["target"] == (34963 if name == "indices" else 34962)
        arrays[name], end = np.frombuffer(binary[start:stop], record), stop
        if name == "POSITION":
            assert (
                accessor["min"] == arrays[name].min(0).tolist()
                and accessor["max"] == arrays[name].max(0).tolist()
            )
    assert end == len(binary)
    assert len(arrays["POSITION"]) == len(arrays["COLOR_0"]) > arrays["indices"].max()
    return tree, arrays


def test_every_level_of_dark_survives_in_a_glb(tmp_path):
    """8 bits of linear light would leave 14 of the darkest 64."""
    mesh = trimesh.creation.icosphere(subdivisions=3)
    levels = np.arange(len(mesh.vertices)) % 256
    mesh.visual.vertex_colors = np.column_stack(
        [levels, levels, levels, np.full_like(levels, 255)]
    ).astype(np.uint8)
    save_mesh(mesh, tmp_path / "a.glb")
    stored = read_glb(tmp_path / "a.glb")[1]["COLOR_0"]
    assert stored.min() == 0 and stored.max() == 1
    srgb = np.where(stored <= 0.0031308, 12.92 * stored, 1.055 * stored ** (1 / 2.4) - 0.055)
    assert np.array_equal(np.round(255 * srgb), np.stack([levels] * 3, -1))
    assert len(np.unique(stored[levels < 64], axis=0)) == 64
    # by another reader
    (other,) = trimesh.load_scene(tmp_path / "a.glb", process=False).geometry.values()
    assert np.array_equal(np.asarray(other.visual.vertex_attributes["color"]), stored)


def test_a_mesh_of_nothing_is_not_saved(tmp_path):
    for vertices, faces in (
        (np.zeros((0, 3)), []),
        ([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], [[0, 1, 2]]),
    ):
        with pytest.raises(ValueError, match="no mesh to save as a.glb"):
            save_mesh(trimesh.Trimesh(vertices, faces, process=False), tmp_path / "a.glb")
    assert not list(tmp_path.iterdir())


def test_unknown_suffix(colored_box, tmp_path):
    with pytest.raises(ValueError, match=r"\.glb, \.obj, \.ply, got the file name 'box.fbx'"):
        save_mesh(colored_box, tmp_path / "box.fbx")
    assert not list(tmp_path.iterdir())
