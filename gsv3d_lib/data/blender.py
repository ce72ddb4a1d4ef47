"""Views rendered by Blender's Cycles instead of `data/raycast.py`: soft light, shadows,
the same cameras, albedo and depth.

    python3.11 -m venv ../bpy-env && ../bpy-env/bin/pip install bpy        # about 1 GB, with a numpy of its own
    python -m gsv3d_lib make_dataset --meshes FOLDER --out FOLDER --blender ../bpy-env/bin/python

`bpy` wants another numpy than this library (below 2) and often another Python, so it
lives in its own environment. This file is run by both: `render_cycles` is called here,
and starts it as a script there, where only `bpy` and numpy are at hand. Arrays go to
and fro in .npz files: triangles in our z-up world, and per part of the mesh colours and
a texture.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

SAMPLES = 16  # of light per pixel
# strength of the white world and of the sun, whose direction is that of `raycast`
AMBIENT, SUN = 0.7, 1.0


# ---------------------------------------------------------------- in our environment


def check_python(python: str | Path) -> None:
    """Raises UserError unless `python` has bpy."""
    # not at the top: Blender's Python runs this file as a script
    from ..system.errors import UserError

    try:
        done = subprocess.run([python, "-c", "import bpy"], capture_output=True, text=True)
        reason = (
            (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if done.returncode
            else ""
        )
    except OSError as error:
        reason = str(error)
    if reason:
        raise UserError(
            f"{python} cannot import bpy ({reason}); docs/data.md says how to make an environment for it."
        )


def render_cycles(
    mesh, cameras, python: str | Path, samples: int = SAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """What `raycast.render_mesh` returns, by Cycles: rgba float32 [V, H, W, 4],
    straight alpha, and depth [V, H, W].

    python: of an environment with bpy. Raises ValueError where Blender fails.
    """
    from .raycast import SUN_DIRECTION, Target

    target = Target(mesh)
    arrays = {
        "triangles": target.triangles,
        "first_faces": target.first_faces,
        "sun": SUN_DIRECTION,
    }
    # colours of corners, and where there is one a texture before them
    for number, lookup in enumerate(target.lookups):
        names = ("image", "uv", "colors")[-len(lookup.args) :]
        arrays |= {f"{name}{number}": value for name, value in zip(names, lookup.args)}
    arrays |= {
        "c2w": cameras.c2w().numpy(),
        "focal": cameras.Ks[0, 0, 0].numpy(),
        "samples": samples,
    }
    arrays |= {"size": [cameras.width, cameras.height]}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "job.npz", **arrays)
        done = subprocess.run([python, __file__, folder], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"Blender ended with code {done.returncode} ({reason}).")
        with np.load(Path(folder) / "views.npz") as views:
            return views["rgba"], views["depth"]


# ---------------------------------------------------------------- in Blender's


def render_job(folder: Path) -> None:
    """Render FOLDER/job.npz into FOLDER/views.npz."""
    import bpy

    job = dict(np.load(folder / "job.npz"))
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.render.engine, scene.cycles.device = "CYCLES", "CPU"
    # `make_dataset --workers` says how many
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.resolution_x, scene.render.resolution_y = (int(side) for side in job["size"])
    scene.render.film_transparent = True
    scene.view_settings.view_transform = "Standard"  # plain sRGB
    scene.cycles.use_denoising = False
    scene.cycles.pixel_filter_type = "BOX"
    for part in range(len(job["first_faces"]) - 1):
        add_part(bpy, job, part)
    add_light(bpy, scene, job["sun"])
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.angle = 2 * np.arctan(job["size"][0] / 2 / float(job["focal"]))
    scene.collection.objects.link(camera)
    scene.camera = camera
    depth_material = emission_of_depth(bpy)

    rgba, depth = [], []
    for c2w in job["c2w"]:
        opengl = c2w @ np.diag([1, -1, -1, 1])
        camera.matrix_world = opengl.T.tolist()  # columns, as bpy wants
        scene.cycles.samples, scene.cycles.filter_width = int(job["samples"]), 1.0
        scene.view_layers[0].material_override = None
        rgba.append(rendered(bpy, folder / "view.png", "PNG", "8"))
        # one ray through the pixel's centre
        scene.cycles.samples, scene.cycles.filter_width = 1, 0.01
        scene.view_layers[0].material_override = depth_material
        z = rendered(bpy, folder / "depth.exr", "OPEN_EXR", "32")
        depth.append(np.where(z[..., 3] > 0.5, z[..., 0], 0))
    np.savez(folder / "views.npz", rgba=np.stack(rgba), depth=np.stack(depth))


def add_part(bpy, job: dict, part: int) -> None:
    """One part of the mesh, with a material of its albedo."""
    triangles = job["triangles"][job["first_faces"][part] : job["first_faces"][part + 1]]
    mesh = bpy.data.meshes.new(f"part{part}")
    mesh.from_pydata(triangles.reshape(-1, 3), [], np.arange(3 * len(triangles)).reshape(-1, 3))
    material = bpy.data.materials.new(f"part{part}")
    material.use_nodes = True
    nodes, link = material.node_tree.nodes, material.node_tree.links.new
    nodes.clear()
    output, diffuse = nodes.new("ShaderNodeOutputMaterial"), nodes.new("ShaderNodeBsdfDiffuse")
    link(diffuse.outputs[0], output.inputs["Surface"])
    colors = linear(job[f"colors{part}"].reshape(-1, 3))
    layer = mesh.attributes.new("colors", "FLOAT_COLOR", "CORNER")
    layer.data.foreach_set(
        "color", np.column_stack([colors, np.ones(len(colors))]).astype(np.float32).ravel()
    )
    source = nodes.new("ShaderNodeAttribute")
    source.attribute_name = "colors"
    albedo = source.outputs["Color"]
    if f"image{part}" in job:
        image = job[f"image{part}"]
        height, width = image.shape[:2]
        pixels = np.concatenate([image[::-1], np.ones((height, width, 1))], axis=-1)
        texture, product = nodes.new("ShaderNodeTexImage"), nodes.new("ShaderNodeVectorMath")
        texture.image = bpy.data.images.new(mesh.name, width, height)  # 8 bits, sRGB
        texture.image.pixels.foreach_set(pixels.astype(np.float32).ravel())
        mesh.uv_layers.new().uv.foreach_set("vector", job[f"uv{part}"].astype(np.float32).ravel())
        product.operation = "MULTIPLY"
        link(albedo, product.inputs[0])
        link(texture.outputs["Color"], product.inputs[1])
        albedo = product.outputs[0]
    link(albedo, diffuse.inputs["Color"])
    mesh.materials.append(material)
    bpy.context.scene.collection.objects.link(bpy.data.objects.new(mesh.name, mesh))


def linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..1 -> linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def add_light(bpy, scene, sun: np.ndarray) -> None:
    """A white world and a soft sun; fixed to the object, as in `raycast`."""
    from mathutils import Vector

    scene.world = bpy.data.worlds.new("world")
    scene.world.use_nodes = True
    background = scene.world.node_tree.nodes["Background"]
    background.inputs["Color"].default_value, background.inputs["Strength"].default_value = (
        (1, 1, 1, 1),
        AMBIENT,
    )
    light = bpy.data.lights.new("sun", "SUN")
    light.energy, light.angle = SUN, np.radians(20)
    lamp = bpy.data.objects.new("sun", light)
    # it shines along -z
    lamp.rotation_euler = Vector(sun.tolist()).to_track_quat("Z", "Y").to_euler()
    scene.collection.objects.link(lamp)


def emission_of_depth(bpy):
    """A material that shines with its distance along the camera's axis."""
    material = bpy.data.materials.new("depth")
    material.use_nodes = True
    nodes, link = material.node_tree.nodes, material.node_tree.links.new
    nodes.clear()
    camera, emission = nodes.new("ShaderNodeCameraData"), nodes.new("ShaderNodeEmission")
    link(camera.outputs["View Z Depth"], emission.inputs["Color"])
    link(emission.outputs[0], nodes.new("ShaderNodeOutputMaterial").inputs["Surface"])
    return material


def rendered(bpy, path: Path, kind: str, bits: str) -> np.ndarray:
    """The scene from its camera, through a file, whose numbers Blender hands out ->
    float32 [H, W, 4].
    """
    render = bpy.context.scene.render
    settings = render.image_settings
    settings.file_format, settings.color_mode, settings.color_depth = kind, "RGBA", bits
    render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    image = bpy.data.images.load(str(path))
    width, height = image.size
    pixels = np.empty(width * height * 4, np.float32)
    image.pixels.foreach_get(pixels)
    bpy.data.images.remove(image)
    return pixels.reshape(height, width, 4)[::-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="What `make_dataset --blender` starts in Blender's own Python."
    )
    parser.add_argument("folder", type=Path, help="with job.npz; views.npz is written beside it")
    given = parser.parse_args().folder
    if not (given / "job.npz").is_file():
        parser.error(f"there is no {given / 'job.npz'}")
    render_job(given)
