"""Cycles, where an environment with bpy is named: the pictures of the ray caster's
cameras, depth to the last digits.
"""

import os
import shutil
import sys

import numpy as np
import pytest
import trimesh

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.data.blender import check_python, render_cycles
from gsv3d_lib.data.dataset import read_object
from gsv3d_lib.data.make_dataset import main
from gsv3d_lib.data.raycast import normalized, render_mesh


@pytest.fixture
def blender() -> str:
    python = os.environ.get("GSV3D_BLENDER")
    if not python:
        pytest.skip("GSV3D_BLENDER names no Python with bpy (docs/data.md)")
    return python


def test_a_python_without_bpy_is_one_sentence(tmp_path, capsys):
    with pytest.raises(ValueError, match="cannot import bpy.*No module named 'bpy'"):
        check_python(sys.executable)
    assert (
        main(["--procedural", "1", "--out", str(tmp_path), "--blender", str(tmp_path / "python")])
        == 2
    )
    assert "cannot import bpy" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_cycles_sees_what_the_ray_caster_sees(blender):
    """A ball with one red and one green half: same outline, same depth, same sides."""
    ball = trimesh.creation.icosphere(subdivisions=3)
    red = ball.triangles_center[:, 1] < 0
    ball.visual.face_colors = np.where(red[:, None], [200, 30, 30, 255], [30, 200, 30, 255]).astype(
        np.uint8
    )
    mesh, cameras = normalized(ball), orbit_cameras([0.0, 130.0], [10.0, -5.0], 64)
    (expected, z), (rgba, depth) = (
        render_mesh(mesh, cameras),
        render_cycles(mesh, cameras, blender, samples=4),
    )
    assert (
        rgba.shape == expected.shape
        and depth.shape == z.shape
        and rgba.dtype == depth.dtype == np.float32
    )
    assert ((depth > 0) == (z > 0)).mean() > 0.999
    both = (depth > 0) & (z > 0)
    assert np.median(np.abs(depth - z)[both]) < 1e-4
    assert np.abs(rgba[..., 3] - expected[..., 3]).mean() < 0.01
    solid = (rgba[..., 3] == 1) & (expected[..., 3] == 1)
    same_side = (rgba[..., 0] > rgba[..., 1]) == (expected[..., 0] > expected[..., 1])
    assert same_side[solid].mean() > 0.99 and np.abs(rgba - expected)[solid].mean() < 0.1


def test_a_textured_mesh_becomes_a_dataset_by_cycles(blender, shared_objects, tmp_path):
    meshes, (mesh, *_) = (
        tmp_path / "meshes",
        sorted((shared_objects / "meshes").glob("*/model.obj")),
    )
    shutil.copytree(mesh.parent, meshes / "one")
    for name, options in (("cycles", ["--blender", blender]), ("rays", [])):
        common = [
            "--meshes",
            str(meshes),
            "--up",
            "z",
            "--size",
            "32",
            "--views",
            "16",
            "--out",
            str(tmp_path / name),
        ]
        main([*common, *options])
    cycles, rays = (read_object(tmp_path / name, "one") for name in ("cycles", "rays"))
    assert np.array_equal(cycles.azimuths, rays.azimuths)
    assert np.array_equal(cycles.cameras.viewmats, rays.cameras.viewmats)
    seen = (cycles.depth > 0) & (rays.depth > 0)
    assert seen.sum() > 0.98 * max((cycles.depth > 0).sum(), (rays.depth > 0).sum())
    # of the 12 bits they are stored in
    assert np.median(np.abs(cycles.depth - rays.depth)[seen]) < 1e-3
    assert np.abs(cycles.rgba[seen].astype(float) - rays.rgba[seen]).mean() < 40
