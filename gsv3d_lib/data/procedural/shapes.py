"""Shapes: painted triangle meshes made from a few closed primitives.

Every function returns a `trimesh.Trimesh` in the world of `cameras.py` (z up, front
-y). `paint` gives it vertex colours, `place` turns and moves it, `put` does both, and
`join` makes one object of many. Lengths are world units; an object is about 2 units
large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .textures import Paint, apply, fractal_noise

if TYPE_CHECKING:
    import trimesh

TEXTURE_EDGE = 0.03  # longest edge under a texture: about two pixels of a 128 px view
# Turns (degrees about x, y, z) that lay z along an axis.
AXES = {"x": (0, 90, 0), "y": (90, 0, 0), "z": (0, 0, 0)}


# ---------------------------------------------------------------- primitives, centred


def box(size) -> trimesh.Trimesh:
    """size: three edge lengths."""
    import trimesh

    return trimesh.creation.box(extents=size)


def ball(radii=1.0, detail: int = 3) -> trimesh.Trimesh:
    """An ellipsoid; radii: a number or three."""
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions=detail)
    mesh.vertices *= np.broadcast_to(radii, 3)
    return mesh


def superellipsoid(radii, roundness: float = 0.3, resolution: int = 48) -> trimesh.Trimesh:
    """A box (roundness near 0), an ellipsoid (1) or a star (above 1); radii: three."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, resolution // 2 + 1)[:, None]
    longitude = _circle(resolution)[None]
    c, s = _power(np.cos(latitude), roundness), _power(np.sin(latitude), roundness)
    x, y = c * _power(np.cos(longitude), roundness), c * _power(np.sin(longitude), roundness)
    return grid(np.stack([x, y, np.broadcast_to(s, x.shape)], axis=-1) * np.asarray(radii))


def lathe(profile, resolution: int = 48) -> trimesh.Trimesh:
    """Turn a profile [(radius, z), ...], bottom to top, around the z axis.

    Open ends are closed by flat caps.
    """
    profile = np.asarray(profile, float)
    angle = _circle(resolution)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    xy = profile[:, :1, None] * ring[None]
    z = np.broadcast_to(profile[:, 1, None, None], (*xy.shape[:2], 1))
    return grid(np.concatenate([xy, z], axis=-1))


def cylinder(radius: float, height: float, top: float | None = None) -> trimesh.Trimesh:
    """Along z; another `top` radius makes a cone."""
    top = radius if top is None else top
    return lathe([(radius, -height / 2), (top, height / 2)], resolution=40)


def torus(radius: float, thickness: float, arc: float = 360) -> trimesh.Trimesh:
    """Around z, from +x; an arc (degrees) below 360 makes a handle with closed ends."""
    turns = np.radians(np.linspace(0, arc, 33))
    path = radius * np.stack([np.cos(turns), np.sin(turns), 0 * turns], axis=-1)
    return tube(path, thickness)


def tube(path, radius) -> trimesh.Trimesh:
    """A round bar along a path [N, 3]; radius: a number or one per point."""
    path = np.asarray(path, float)
    radius = np.broadcast_to(radius, len(path))[:, None, None]
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    # least parallel to the path, so the frame never flips
    helper = np.eye(3)[np.abs(tangent).mean(0).argmin()]
    u = np.cross(tangent, helper)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v = np.cross(tangent, u)
    angle = _circle(16)[None, :, None]
    return grid(path[:, None] + radius * (np.cos(angle) * u[:, None] + np.sin(angle) * v[:, None]))


def loft(sections, roundness: float = 0.5, resolution: int = 40) -> trimesh.Trimesh:
    """A skin over sections [(y, center x, half width, bottom z, top z), ...].

    Car bodies, shoes, fuselages. Each section is a superellipse, roundness as in
    `superellipsoid`; straight lines join the sections.
    """
    y, x, width, bottom, top = np.asarray(sections, float).T[:, :, None]
    angle = _circle(resolution)[None]
    across = x + width * _power(np.cos(angle), roundness)
    up = (bottom + top) / 2 + (top - bottom) / 2 * _power(np.sin(angle), roundness)
    return grid(np.stack([across, np.broadcast_to(y, across.shape), up], axis=-1))


def prism(outline, height: float) -> trimesh.Trimesh:
    """A convex outline [(x, z), ...], `height` long in y: roofs, wedges, signs."""
    outline = np.asarray(outline, float)
    layers = [np.insert(outline, 1, y, axis=1) for y in (-height / 2, height / 2)]
    return grid(np.stack(layers))


def grid(rings: np.ndarray) -> trimesh.Trimesh:
    """Points [R, C, 3], R closed rings of C points -> a closed skin.

    Quads join neighbouring rings, and a fan closes either end.
    """
    import trimesh

    rings = _refined(rings)
    count, columns = rings.shape[:2]
    index = np.arange(count * columns).reshape(count, columns)
    a, b = index[:-1], np.roll(index, -1, axis=1)[:-1]
    c, d = index[1:], np.roll(index, -1, axis=1)[1:]
    triangles = [np.stack(corners, -1).reshape(-1, 3) for corners in ((a, b, d), (a, d, c))]
    centers = rings[[0, -1]].mean(1)
    first, last = index.size, index.size + 1
    triangles.append(np.stack([np.full(columns, first), b[0], a[0]], -1))
    triangles.append(np.stack([np.full(columns, last), c[-1], d[-1]], -1))
    vertices = np.concatenate([rings.reshape(-1, 3), centers])
    mesh = trimesh.Trimesh(vertices, np.concatenate(triangles), process=False)
    # a ring of radius 0 (a pole) leaves slivers without area
    mesh.update_faces(mesh.area_faces > 1e-12)
    mesh.remove_unreferenced_vertices()
    # rings that ran the other way round; viewers that hide back faces need outward ones
    if mesh.volume < 0:
        mesh.invert()
    return mesh


# ---------------------------------------------------------------- changing shapes


def place(mesh: trimesh.Trimesh, at=(0, 0, 0), turn=(0, 0, 0), along: str = "z") -> trimesh.Trimesh:
    """Lay the mesh's z along an axis, turn it and move it to `at`, in place.

    turn: degrees about x, then y, then z.
    """
    from trimesh.transformations import euler_matrix

    for angles in (AXES[along], turn):
        mesh.apply_transform(euler_matrix(*np.radians(angles)))
    mesh.apply_translation(at)
    return mesh


def paint(mesh: trimesh.Trimesh, color: Paint, edge: float = TEXTURE_EDGE) -> trimesh.Trimesh:
    """The mesh with vertex colours from a colour or a texture.

    Under a texture the triangles are cut until no edge exceeds `edge`.
    """
    import trimesh

    if callable(color):
        mesh = mesh.subdivide_to_size(edge, max_iter=20)
    rgb = np.round(255 * np.clip(apply(color, mesh.vertices), 0, 1)).astype(np.uint8)
    rgba = np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], axis=1)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=rgba, process=False)


def put(mesh, at, color: Paint, turn=(0, 0, 0), along: str = "z") -> trimesh.Trimesh:
    """Place a mesh, then paint it: a texture belongs to the place."""
    return paint(place(mesh, at, turn, along), color)


def roughened(mesh: trimesh.Trimesh, amount: float, scale: float, seed: int) -> trimesh.Trimesh:
    """The surface as a height field: smooth noise along the normals."""
    mesh = mesh.subdivide_to_size(0.08, max_iter=20)
    mesh.merge_vertices()
    offset = amount * 2 * fractal_noise(mesh.vertices / scale, seed, octaves=2)
    mesh.vertices = mesh.vertices + mesh.vertex_normals * offset[:, None]
    return mesh


def twisted(mesh: trimesh.Trimesh, degrees_per_unit: float) -> trimesh.Trimesh:
    """Twist around z: each height is turned in proportion to it."""
    mesh = mesh.subdivide_to_size(0.12, max_iter=20)
    x, y, z = mesh.vertices.T
    c, s = np.cos(np.radians(degrees_per_unit) * z), np.sin(np.radians(degrees_per_unit) * z)
    mesh.vertices = np.stack([c * x - s * y, s * x + c * y, z], axis=-1)
    return mesh


def mirrored(mesh: trimesh.Trimesh) -> list[trimesh.Trimesh]:
    """The mesh and its copy at -x: wheels, eyes, legs."""
    twin = mesh.copy()
    twin.apply_transform(np.diag([-1.0, 1, 1, 1]))  # trimesh turns the faces round again
    return [mesh, twin]


def join(parts: list[trimesh.Trimesh]) -> trimesh.Trimesh:
    """One mesh of painted parts, centred, inside the unit ball and touching it."""
    import trimesh

    mesh = trimesh.util.concatenate(parts)
    mesh.apply_translation(-mesh.bounds.mean(0))
    mesh.apply_scale(1 / np.linalg.norm(mesh.vertices, axis=1).max())
    return mesh


def _refined(rings: np.ndarray, step: float = 0.12) -> np.ndarray:
    """More rings, between those that are farther apart than `step`.

    `paint` cuts compact triangles into fewer pieces than long ones.
    """
    gaps = np.linalg.norm(np.diff(rings, axis=0), axis=2).max(1)  # [R - 1]
    pieces = np.ceil(gaps / step).clip(1).astype(int)
    at = np.concatenate([r + np.arange(n) / n for r, n in enumerate(pieces)] + [[len(rings) - 1]])
    low = np.minimum(at.astype(int), len(rings) - 2)
    t = (at - low)[:, None, None]
    return (1 - t) * rings[low] + t * rings[low + 1]


def _circle(count: int) -> np.ndarray:
    """`count` angles once around, radians."""
    return np.linspace(0, 2 * np.pi, count, endpoint=False)


def _power(values: np.ndarray, exponent: float) -> np.ndarray:
    """Sign-keeping power: the superellipse's trick."""
    return np.sign(values) * np.abs(values) ** exponent
