"""Meshes to images by exact ray casting on the CPU.

trimesh reads the file, embree finds the first hit of each ray. A rendering is RGBA plus
the z-depth of the first surface. The light is fixed to the object and never to the
camera. So one surface point has one colour in all views, which is what multi-view
training needs. Everything is deterministic: the same mesh and cameras give the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..cameras import Y_UP_TO_Z_UP, Cameras, ray_grid
from ..system.errors import MissingFile, UserError
from .meshfiles import BESIDE_MATERIAL, read_scene, srgb, texture_of, unit_rgb

if TYPE_CHECKING:
    import trimesh

    Mesh = trimesh.Trimesh | trimesh.Scene

# The glTF specification fixes +y as up; the other formats do not say.
Y_UP_SUFFIXES = (".glb", ".gltf")
# Rays per embree call, to bound its memory; 2,000 to 1,000,000 are equally fast.
RAY_BLOCK = 16_000
UNPAINTED = (0.7, 0.7, 0.7)  # albedo of a mesh that carries no colour

# Brightness of a surface with unit normal n = AMBIENT + SKY * (1 + n_z) / 2 + SUN *
# max(0, n . SUN_DIRECTION). The numbers are a fit to the renderings in
# ../shared/objects, so that both kinds of data may be mixed in training.
AMBIENT, SKY, SUN = 0.74, 0.20, 0.17
SUN_DIRECTION = np.array([0.60, -0.73, 0.32])

Pictures = tuple[np.ndarray, np.ndarray]  # rgba [..., H, W, 4], depth [..., H, W]
# (triangle index [P], barycentric weights [P, 3]) -> albedo [P, 3]
ColorLookup = Callable[[np.ndarray, np.ndarray], np.ndarray]


def load_mesh(path: str | Path, up: str | None = None) -> trimesh.Scene:
    """Read a mesh file as a scene of parts, z up, just inside the unit ball.

    path: .glb, .gltf, .obj, .ply, .stl or .off; its textures and colours are kept.
    up: the axis that points up in the file, "y" or "z"; None: "y" for glTF, else "z".
    A y-up file is turned about x: its +z (glTF's front) becomes -y (the front here).
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"There is no mesh file at {path}.")
    up = up or ("y" if path.suffix.lower() in Y_UP_SUFFIXES else "z")
    if up not in ("y", "z"):
        raise UserError(f"up must be 'y' or 'z', but is {up!r}.")
    return normalized(read_scene(path), Y_UP_TO_Z_UP.numpy() if up == "y" else np.eye(4))


def normalized(mesh: Mesh, turn: np.ndarray | None = None) -> trimesh.Scene:
    """A copy, turned by `turn` [4, 4], then centred and scaled into the unit ball.

    The middle of the bounding box becomes the origin; the farthest vertex has radius 1.
    """
    import trimesh

    parts = [part.copy() for part in _parts(mesh)]
    for part in parts:
        part.apply_transform(np.eye(4) if turn is None else turn)
    points = np.concatenate([part.triangles.reshape(-1, 3) for part in parts])
    center = (points.min(0) + points.max(0)) / 2
    with np.errstate(over="ignore", invalid="ignore"):  # said below
        radius = np.linalg.norm(points - center, axis=1).max()
    if not radius > 0 or not np.isfinite(radius):
        raise UserError(f"The mesh cannot be scaled into the unit ball: its radius is {radius}.")
    for part in parts:  # not by trimesh's own moves, which take a move by less than 1e-8 for none
        part.vertices = (part.vertices - center) / radius
    return trimesh.Scene(parts)


def render_mesh(mesh: Mesh, cameras: Cameras, supersample: int = 2) -> Pictures:
    """Render a mesh from V cameras -> rgba [V, H, W, 4], depth [V, H, W], both float32.

    rgba: in 0..1, straight alpha, averaged over supersample^2 rays per pixel.
    depth: z-depth of the first hit of the ray through the pixel's centre, 0 where there
        is none; never averaged across an edge.
    Surfaces are seen from both sides. Transparency and transforms of textures (glTF's
    KHR_texture_transform) are ignored.
    """
    if supersample < 1:
        raise UserError(f"supersample must be at least 1, but is {supersample}.")
    target, cameras = Target(mesh), cameras.to("cpu")
    views = [_render_view(target, cameras[v : v + 1], supersample) for v in range(len(cameras))]
    rgba, depth = zip(*views)
    return np.stack(rgba), np.stack(depth)


# ---------------------------------------------------------------- rays


@dataclass
class Hits:
    """Where rays first meet a mesh; one row per ray that meets it."""

    ray: np.ndarray  # [P'] index of the ray among all P that were cast
    face: np.ndarray  # [P'] index of the triangle
    weights: np.ndarray  # [P', 3] barycentric weights of the triangle's corners


class Target:
    """A mesh prepared for rays: embree's search tree, normals, colours of each part."""

    def __init__(self, mesh: Mesh) -> None:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        parts = _parts(mesh)
        # [F, 3, 3]
        self.triangles = np.concatenate([part.triangles for part in parts]).astype(np.float32)
        self.normals = _unit_normals(self.triangles)  # [F, 3]
        self.lookups = [_color_lookup(part) for part in parts]
        self.first_faces = np.cumsum([0] + [len(part.faces) for part in parts])
        self._tree = EmbreeScene()
        TriangleMesh(self._tree, self.triangles)

    def cast(self, origins: np.ndarray, directions: np.ndarray) -> Hits:
        """Rays from origins [P, 3] in unit directions [P, 3], both float32."""
        blocks = []
        for first in range(0, len(origins), RAY_BLOCK):
            rays = (
                np.ascontiguousarray(a[first : first + RAY_BLOCK]) for a in (origins, directions)
            )
            found = self._tree.run(*rays, output=1)
            blocks.append([found[name] for name in ("primID", "u", "v")])
        face, u, v = (np.concatenate(column) for column in zip(*blocks, strict=True))
        ray = np.flatnonzero(face >= 0)
        u, v = u[ray], v[ray]
        return Hits(ray, face[ray], np.stack([1 - u - v, u, v], axis=1))

    def points(self, hits: Hits) -> np.ndarray:
        """[P', 3] where the rays hit."""
        return _at_hits(self.triangles, hits.face, hits.weights)

    def colors(self, hits: Hits, directions: np.ndarray) -> np.ndarray:
        """[P', 3] albedo times brightness of the sides that rays [P, 3] see."""
        normals = self.normals[hits.face]
        away = np.einsum("px,px->p", normals, directions[hits.ray]) > 0
        normals = np.where(away[:, None], -normals, normals)
        return np.clip(self._albedo(hits) * brightness(normals)[:, None], 0, 1)

    def _albedo(self, hits: Hits) -> np.ndarray:
        albedo = np.empty((len(hits.face), 3), np.float32)
        for k, lookup in enumerate(self.lookups):
            first, end = self.first_faces[k : k + 2]
            here = (hits.face >= first) & (hits.face < end)
            if here.any():
                albedo[here] = lookup(hits.face[here] - first, hits.weights[here])
        return albedo


def brightness(normals: np.ndarray) -> np.ndarray:
    """Light on surfaces with unit normals [P, 3], the same for every camera -> [P]."""
    return AMBIENT + SKY * (1 + normals[:, 2]) / 2 + SUN * np.maximum(normals @ SUN_DIRECTION, 0)


def _render_view(target: Target, camera: Cameras, supersample: int) -> Pictures:
    """One camera -> rgba [H, W, 4], depth [H, W]."""
    height, width = camera.height, camera.width
    directions, hits = _cast_grid(target, camera, 1)
    depth = np.zeros(height * width, np.float32)
    z_row = camera.viewmats[0, 2].numpy()
    depth[hits.ray] = target.points(hits) @ z_row[:3] + z_row[3]
    if supersample > 1:
        directions, hits = _cast_grid(target, camera, supersample)
    premultiplied = np.zeros((height * supersample * width * supersample, 4), np.float32)
    premultiplied[hits.ray, :3] = target.colors(hits, directions)
    premultiplied[hits.ray, 3] = 1
    mean = premultiplied.reshape(height, supersample, width, supersample, 4).mean(axis=(1, 3))
    mean[..., :3] /= np.maximum(mean[..., 3:], 1e-6)  # straight alpha
    return mean, depth.reshape(height, width)


def _cast_grid(target: Target, camera: Cameras, supersample: int) -> tuple[np.ndarray, Hits]:
    """Cast supersample^2 rays per pixel -> unit directions [P, 3], hits.

    P runs over the rows of the finer image.
    """
    rays = ray_grid(camera, camera.height * supersample, camera.width * supersample)
    origins, directions = (ray.reshape(-1, 3).float().numpy() for ray in rays)
    return directions, target.cast(origins, directions)


def _parts(mesh: Mesh) -> list[trimesh.Trimesh]:
    """The triangle meshes of a scene, placed in the world; a lone mesh as it is."""
    import trimesh

    parts = mesh.dump() if isinstance(mesh, trimesh.Scene) else [mesh]
    parts = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not parts:
        raise UserError("The mesh has no triangles.")
    return parts


def _unit_normals(triangles: np.ndarray) -> np.ndarray:
    """[F, 3, 3] -> [F, 3]; without area the zero vector, hence ambient light only."""
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)


# ---------------------------------------------------------------- colours


def _color_lookup(part: trimesh.Trimesh) -> ColorLookup:
    """How the albedo of a part is found: a texture, or colours at the corners."""
    visual = part.visual
    every = (len(part.faces), 3, 3)  # a colour at each corner of each triangle
    if visual.kind == "texture":
        image, tint = _material(visual.material)
        colors = np.broadcast_to(tint, every)
        if BESIDE_MATERIAL in part.vertex_attributes:
            colors = colors * part.vertex_attributes[BESIDE_MATERIAL][part.faces]
        if image is not None and visual.uv is not None:
            corners = visual.uv[part.faces].astype(np.float32)  # [F, 3, 2]
            return partial(_texture_color, _shrunk(image, corners, part.area), corners, colors)
    elif visual.kind == "vertex":
        colors = unit_rgb(visual.vertex_colors)[part.faces]
    elif visual.kind == "face":
        colors = np.broadcast_to(unit_rgb(visual.face_colors)[:, None], every)
    else:
        colors = np.broadcast_to(np.float32(UNPAINTED), every)
    return partial(_at_hits, colors)


def _material(material) -> tuple[object, np.ndarray]:
    """trimesh material -> (PIL image or None, colour factor [3])."""
    image = texture_of(material)
    if hasattr(material, "baseColorTexture"):
        factor = material.baseColorFactor  # linear, as vertex colours beside a material are
        return image, np.ones(3, np.float32) if factor is None else srgb(np.asarray(factor))
    # an OBJ's Kd next to a texture is often black or grey by accident; the texture
    # alone is what artists mean
    return image, np.ones(3, np.float32) if image is not None else unit_rgb(material.main_color)


def _at_hits(corners: np.ndarray, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values at the triangles' corners [F, 3, C], interpolated at hits -> [P, C]."""
    return np.einsum("pc,pcx->px", weights, corners[face])


def _texture_color(
    image: np.ndarray,
    corners: np.ndarray,
    colors: np.ndarray,
    face: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Bilinear texture lookup with wrap-around, times the colours at the corners.

    image [h, w, 3] in 0..1, texture coordinates corners [F, 3, 2], colors [F, 3, 3].
    """
    uv = _at_hits(corners, face, weights)
    height, width = image.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5  # v points up, image rows go down
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - x0).astype(np.float32)[:, None], (y - y0).astype(np.float32)[:, None]
    left, right, top, bottom = x0 % width, (x0 + 1) % width, y0 % height, (y0 + 1) % height
    upper = image[top, left] * (1 - fx) + image[top, right] * fx
    lower = image[bottom, left] * (1 - fx) + image[bottom, right] * fx
    return (upper * (1 - fy) + lower * fy) * _at_hits(colors, face, weights)


def _shrunk(image, corners: np.ndarray, area: float, finest: float = 1 / 256) -> np.ndarray:
    """PIL image -> float32 [h, w, 3], reduced until a texel spans `finest` world units.

    A texture much finer than the pixels would alias; one global level of a mip pyramid
    is enough for a small object.
    """
    edge, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    uv_area = 0.5 * np.abs(edge[:, 0] * other[:, 1] - edge[:, 1] * other[:, 0]).sum()
    texels_per_unit = np.sqrt(uv_area * image.width * image.height / max(area, 1e-12))
    factor = int(np.clip(texels_per_unit * finest, 1, min(image.size)))
    image = image.convert("RGB")
    return np.asarray(image.reduce(factor) if factor > 1 else image, np.float32) / 255
