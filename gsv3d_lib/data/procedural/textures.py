"""Solid textures: functions of 3D points, so no shape needs texture coordinates.

A texture maps points [P, 3] to colours [P, 3] in 0..1. Textures nest:
`checkers(noise(...), RED, 0.2)`.
"""

import colorsys
from collections.abc import Callable

import numpy as np

Texture = Callable[[np.ndarray], np.ndarray]
Mask = Callable[[np.ndarray], np.ndarray]  # points [P, 3] -> bool [P]
Color = tuple[float, float, float]
Paint = Texture | Color  # what the functions below accept wherever a colour is wanted

WHITE, BLACK, GREY = (0.95, 0.95, 0.95), (0.08, 0.08, 0.09), (0.5, 0.5, 0.52)
RED, YELLOW, METAL, GLASS = (0.8, 0.1, 0.1), (0.95, 0.85, 0.3), (0.68, 0.7, 0.73), (0.22, 0.3, 0.38)


def apply(paint: Paint, points: np.ndarray) -> np.ndarray:
    """Colours [P, 3] of a paint at points [P, 3]."""
    if callable(paint):
        return paint(points)
    return np.broadcast_to(np.asarray(paint, float), points.shape)


def where(mask: Mask, inside: Paint, outside: Paint) -> Texture:
    """`inside` where the mask holds, else `outside`; all sharp patterns are made so."""
    return lambda p: np.where(mask(p)[:, None], apply(inside, p), apply(outside, p))


def mix(a: Paint, b: Paint, t: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Colours between a (t = 0) and b (t = 1), t [P]."""
    return (1 - t)[:, None] * apply(a, points) + t[:, None] * apply(b, points)


# ---------------------------------------------------------------- colours


def random_color(rng: np.random.Generator) -> Color:
    """Any hue; two thirds saturated, one third muted, from dark to bright."""
    saturation = rng.uniform(0.55, 1.0) if rng.random() < 0.65 else rng.uniform(0.0, 0.35)
    return colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.25, 1.0))


def wood_color(rng: np.random.Generator) -> Color:
    hue, saturation = rng.uniform(0.05, 0.11), rng.uniform(0.35, 0.75)
    return colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.3, 0.85))


def skin_color(rng: np.random.Generator) -> Color:
    hue, saturation = rng.uniform(0.03, 0.1), rng.uniform(0.25, 0.6)
    return colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.4, 0.98))


def shade(color: Color, factor: float) -> Color:
    """Darker (factor < 1) or brighter (factor > 1) by multiplication, kept in 0..1."""
    return tuple(float(np.clip(channel * factor, 0, 1)) for channel in color)


# ---------------------------------------------------------------- patterns


def checkers(a: Paint, b: Paint, cell: float) -> Texture:
    """Cubes of side `cell`, alternating."""
    return where(lambda p: np.floor(p / cell + 1e-4).sum(1) % 2 == 0, a, b)


def stripes(a: Paint, b: Paint, period: float, direction=(0, 0, 1), share: float = 0.5) -> Texture:
    """Layers across `direction`; `share` of each period is `a`."""
    direction = np.asarray(direction, float) / np.linalg.norm(direction)
    return where(lambda p: (p @ direction / period) % 1 < share, a, b)


def gradient(a: Paint, b: Paint, direction=(0, 0, 1), start: float = -1, end: float = 1) -> Texture:
    """From `a` at `start` to `b` at `end` along `direction`."""
    direction = np.asarray(direction, float) / np.linalg.norm(direction)

    def texture(points):
        t = np.clip((points @ direction - start) / (end - start), 0, 1)
        return mix(a, b, t, points)

    return texture


def dots(a: Paint, b: Paint, cell: float) -> Texture:
    """Balls of `a`, one per cube of side `cell`."""
    return where(lambda p: np.linalg.norm(p / cell % 1 - 0.5, axis=1) < 0.35, a, b)


def noise(a: Paint, b: Paint, scale: float, seed: int = 0) -> Texture:
    """A cloudy mix of two paints; `scale` is the size of the largest blobs."""

    def texture(points):
        return mix(a, b, np.clip(0.5 + 0.9 * fractal_noise(points / scale, seed), 0, 1), points)

    return texture


def spots(a: Paint, b: Paint, scale: float, seed: int) -> Texture:
    """Irregular spots of `a` with sharp edges, like a cow's."""
    return where(lambda p: fractal_noise(p / scale, seed, 2) > 0.12, a, b)


def patches(paints: list[Paint], cell: float, seed: int = 0) -> Texture:
    """A patchwork of cells around random points: a Voronoi diagram."""
    rng = np.random.default_rng(seed)
    count = int(np.clip((2.4 / cell) ** 3, 8, 400))
    centers, owners = rng.uniform(-1.2, 1.2, (count, 3)), rng.integers(len(paints), size=count)

    def texture(points):
        from scipy.spatial import cKDTree

        owner = owners[cKDTree(centers).query(points)[1]]
        return np.choose(owner[:, None], [apply(paint, points) for paint in paints])

    return texture


def bricks(brick: Paint, mortar: Paint, length: float = 0.22, height: float = 0.1) -> Texture:
    """Courses of bricks, each shifted by half a brick, on walls that face x or y."""
    gap = 0.015

    def is_mortar(points):
        row = np.floor(points[:, 2] / height)
        along = points[:, :2].sum(1) + row % 2 * length / 2
        return (points[:, 2] % height < gap) | (along % length < gap)

    return where(is_mortar, mortar, brick)


def planks(color: Color, width: float) -> Texture:
    """Wooden boards along x: noise drawn out along the grain, one shade per board."""

    def texture(points):
        board = np.floor(points[:, 2] / width)
        drawn_out = points - 0.85 * points * (1, 0, 0)
        grain = fractal_noise(drawn_out * 12 + board[:, None] * 7.3, 0, 2)
        tone = 1 + 0.25 * grain + 0.12 * np.sin(board * 12.9)
        return np.clip(np.outer(tone, color), 0, 1)

    return texture


def label(ink: Paint, paper: Paint, seed: int, cell: float = 0.06, fill: float = 0.5) -> Texture:
    """Pseudo-print on surfaces that face y: random blocks, every third row empty."""
    bits = np.random.default_rng(seed).random((64, 64)) < fill

    def is_ink(points):
        column, row = (np.floor(points[:, axis] / cell + 32).astype(int) % 64 for axis in (0, 2))
        return bits[column, row] & (row % 3 != 0)

    return where(is_ink, ink, paper)


# ---------------------------------------------------------------- masks


def within(x=(-9, 9), y=(-9, 9), z=(-9, 9)) -> Mask:
    """A box: bounds per axis."""
    low, high = np.array([x, y, z], float).T
    return lambda p: ((p >= low) & (p <= high)).all(1)


def near(center, radius: float) -> Mask:
    """A ball."""
    return lambda p: np.linalg.norm(p - np.asarray(center, float), axis=1) < radius


# ---------------------------------------------------------------- noise and chance


def fractal_noise(points: np.ndarray, seed: int, octaves: int = 3) -> np.ndarray:
    """Smooth noise [P], mostly within -0.5..0.5.

    Octaves of value noise are added, each half as large and half as strong.
    """
    values = np.random.default_rng(seed).uniform(-1, 1, (32, 32, 32))
    total = sum(0.5**k * _value_noise(points * 2**k + 5.7 * k, values) for k in range(octaves))
    return total / sum(0.5**k for k in range(octaves))


def _value_noise(points: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Random values on the integer grid, interpolated smoothly; the grid repeats."""
    cell = np.floor(points).astype(int)
    t = points - cell
    t = t * t * (3 - 2 * t)
    total = np.zeros(len(points))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, t, 1 - t), axis=1)
        total += weight * values[tuple((cell + corner).T % 32)]
    return total


def random_paint(rng: np.random.Generator, depth: int = 1) -> Paint:
    """A plain colour (one time in five) or a random pattern.

    The pattern's colours may be patterns themselves, `depth` levels deep.
    """
    a, b, c, d = (_random_ingredient(rng, depth) for _ in range(4))
    direction, seed = rng.normal(size=3), int(rng.integers(1 << 30))
    cell = 0.08 * 6 ** rng.random()  # 0.08 to 0.48, small cells as often as large ones
    choices = [
        lambda: a,
        lambda: a,
        lambda: checkers(a, b, cell),
        lambda: stripes(a, b, cell, direction, rng.uniform(0.25, 0.75)),
        lambda: stripes(a, b, cell, np.eye(3)[seed % 3], rng.uniform(0.1, 0.5)),
        lambda: gradient(a, b, direction, -0.6, 0.6),
        lambda: noise(a, b, 2 * cell, seed),
        lambda: spots(a, b, 1.5 * cell, seed),
        lambda: dots(a, b, cell),
        lambda: patches([a, b, c, d], 1.5 * cell, seed),
    ]
    return choices[rng.integers(len(choices))]()


def _random_ingredient(rng: np.random.Generator, depth: int) -> Paint:
    return random_paint(rng, depth - 1) if depth and rng.random() < 0.15 else random_color(rng)
