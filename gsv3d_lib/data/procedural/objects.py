"""Procedural objects: textured meshes, each a function of its seed.

Families of everyday things have a clear front, which faces -y (azimuth 270 degrees).
`composed` glues random primitives with random textures together. A reconstruction model
trained on such shapes alone generalises to real ones (LRM-Zero, Xie et al. 2024),
because it has to learn geometry instead of categories.

Every random number is drawn in a fixed order: to change it changes all objects.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...system.errors import UserError
from . import textures as tx
from .shapes import (
    ball,
    box,
    cylinder,
    join,
    lathe,
    loft,
    mirrored,
    paint,
    place,
    prism,
    put,
    roughened,
    superellipsoid,
    torus,
    tube,
    twisted,
)

if TYPE_CHECKING:
    import trimesh

    Parts = list[trimesh.Trimesh]  # painted

Rng = np.random.Generator
COMPOSED_SHARE = 0.4  # of the objects that `procedural_object` draws when no family is asked for


def procedural_object(seed: int, family: str | None = None) -> trimesh.Trimesh:
    """A mesh with vertex colours: z up, front -y, centred, touching the unit sphere.

    The same seed and family give the same mesh. family: one of FAMILIES; None lets the
    seed choose, `composed` in 40 % of the cases.
    """
    family = family or family_of(seed)
    if family not in FAMILIES:
        raise UserError(f"Unknown family {family!r}; choose one of {', '.join(FAMILIES)}.")
    # the family joins the seed, so that object 5 is not the same draw in all families
    rng = np.random.default_rng([seed, zlib.crc32(family.encode())])
    mesh = join(FAMILIES[family](rng))
    mesh.metadata["family"] = family
    return mesh


def family_of(seed: int) -> str:
    """The family that `procedural_object(seed)` draws."""
    rng = np.random.default_rng(seed)
    things = [name for name in FAMILIES if name != "composed"]
    return "composed" if rng.random() < COMPOSED_SHARE else things[rng.integers(len(things))]


# ---------------------------------------------------------------- cars


def car(rng: Rng) -> Parts:
    """Sedan, hatchback, van or pickup: a lofted body, a cabin, wheels and lights."""
    color, roof = tx.random_color(rng), rng.uniform(0.66, 0.8)
    kinds = [(-0.45, 0.55, roof), (-0.5, 0.9, roof), (-0.8, 0.95, 1.0), (-0.45, 0.15, roof)]
    front, back, roof = kinds[rng.integers(4)]
    width = rng.uniform(0.38, 0.45)
    body = [(-1, 0, 0.9 * width, 0.17, 0.36), (-0.93, 0, width, 0.13, 0.42)]
    body += [(front, 0, width, 0.13, 0.47), (0.9, 0, width, 0.13, 0.47)]
    body += [(1, 0, 0.9 * width, 0.17, 0.4)]
    livery = tx.stripes(tx.WHITE, color, 2.0, (1, 0, 0), 0.1) if rng.random() < 0.3 else color
    parts = [paint(loft(body, 0.3), livery), car_cabin(color, width, front, back, roof)]
    parts += car_wheels(rng, width) + car_lights(width)
    grille = tx.stripes(tx.METAL, tx.BLACK, 0.04)
    return [*parts, put(box((0.9 * width, 0.04, 0.1)), (0, -0.99, 0.27), grille)]


def car_cabin(color: tx.Color, width: float, front, back, roof) -> trimesh.Trimesh:
    """Windows all around between belt line and roof, cut by pillars."""
    inner, lean = 0.86 * width, 0.6 * (roof - 0.45)
    sections = [(front, 0, 0.95 * width, 0.4, 0.46), (front + lean, 0, inner, 0.4, roof)]
    sections += [(back - 0.5 * lean, 0, inner, 0.4, roof), (back, 0, 0.95 * width, 0.4, 0.46)]
    middle = (front + back) / 2

    def is_glass(points):
        x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
        screen = ((y < front + lean) | (y > back - 0.5 * lean)) & (x < 0.75 * inner)
        side = (x > 0.8 * inner) & (y > front + 0.75 * lean) & (y < back - 0.45 * lean)
        return (z > 0.49) & (z < roof - 0.06) & (screen | side & (np.abs(y - middle) > 0.03))

    return paint(loft(sections, 0.25), tx.where(is_glass, tx.GLASS, color))


def car_wheels(rng: Rng, width: float) -> Parts:
    radius, parts = rng.uniform(0.16, 0.21), []
    for y in (-0.62, 0.6):
        at = (width - 0.03, y, radius)
        parts += mirrored(put(cylinder(radius, 0.14), at, tx.BLACK, along="x"))
        parts += mirrored(put(cylinder(0.55 * radius, 0.16), at, tx.METAL, along="x"))
    return parts


def car_lights(width: float) -> Parts:
    head = put(ball((0.08, 0.05, 0.06), 2), (0.72 * width, -0.97, 0.36), tx.YELLOW)
    tail = put(ball((0.07, 0.04, 0.07), 2), (0.72 * width, 0.98, 0.36), tx.RED)
    return mirrored(head) + mirrored(tail)


# ---------------------------------------------------------------- furniture


def chair(rng: Rng) -> Parts:
    """Four legs or a star base, a seat, a back with or without slats, perhaps arms."""
    frame = tx.wood_color(rng) if rng.random() < 0.6 else tx.random_color(rng)
    cover = tx.planks(frame, 0.12) if rng.random() < 0.4 else tx.random_paint(rng)
    half, height, rise = rng.uniform(0.38, 0.5), rng.uniform(0.5, 0.8), rng.uniform(0.6, 1.0)
    if rng.random() < 0.5:
        seat = superellipsoid((half, half, 0.06), 0.25)
    else:
        seat = box((2 * half, 2 * half, 0.09))
    parts = [put(seat, (0, 0, height), cover)]
    parts += chair_base(rng, frame, half, height)
    parts += chair_back(rng, frame, cover, half, height, rise)
    if rng.random() < 0.4:
        arm = [(half, half - 0.05, height + 0.3), (half, -0.6 * half, height + 0.3)]
        parts += mirrored(paint(tube([*arm, (half, -0.7 * half, height)], 0.04), frame))
    return parts


def chair_base(rng: Rng, color: tx.Color, half: float, height: float) -> Parts:
    if rng.random() < 0.3:
        parts = [put(cylinder(0.05, height), (0, 0, height / 2), tx.METAL)]
        for angle in np.radians(np.arange(5) * 72 + 90):
            tip = (0.9 * half * np.cos(angle), 0.9 * half * np.sin(angle), 0.06)
            parts.append(paint(tube([(0, 0, 0.14), tip], 0.04), tx.METAL))
            parts.append(put(ball(0.06, 2), tip, tx.BLACK))
        return parts
    spread, thick = rng.uniform(0.8, 1.05), rng.uniform(0.035, 0.065)
    legs = []
    for y in (-1, 1):
        foot, top = (spread * half, spread * half * y, 0), (0.85 * half, 0.85 * half * y, height)
        legs += mirrored(paint(tube([foot, top], [0.7 * thick, thick]), color))
    return legs


def chair_back(
    rng: Rng, frame: tx.Color, cover: tx.Paint, half: float, height: float, rise: float
) -> Parts:
    lean, top, seam = rng.uniform(0, 0.2), height + rise, half - 0.05
    if rng.random() < 0.5:
        is_flat = rng.random() < 0.5
        flat, puffed = (1.9 * half, 0.07, 0.75 * rise), (0.95 * half, 0.06, 0.4 * rise)
        rest = box(flat) if is_flat else ball(puffed)
        turn = (-np.degrees(np.arctan2(lean, rise)), 0, 0)
        parts = [put(rest, (0, seam + 0.6 * lean, height + 0.6 * rise), cover, turn)]
    else:
        slats = np.linspace(-0.6, 0.6, rng.integers(2, 6)) * half
        parts = [
            paint(tube([(x, seam, height), (x, half + lean, top)], 0.03), frame) for x in slats
        ]
        parts.append(put(box((1.9 * half, 0.06, 0.14)), (0, half + lean, top), frame))
    post = tube([(0.9 * half, seam, height), (0.9 * half, half + lean, top)], 0.04)
    return parts + mirrored(paint(post, frame))


def lamp(rng: Rng) -> Parts:
    """A table or floor lamp with a shade, or a desk lamp that bows to the front."""
    metal = tx.METAL if rng.random() < 0.4 else tx.random_color(rng)
    step = (rng.uniform(0.08, 0.3), rng.uniform(0.08, 0.16))
    parts = [paint(lathe([(0.42, 0), (0.42, 0.04), step, (0.04, 0.18)]), metal)]
    if rng.random() < 0.35:
        return parts + desk_lamp(rng, metal)
    height = rng.uniform(0.7, 1.7)
    stem = lamp_stem(rng, height)
    parts.append(paint(stem, metal if rng.random() < 0.5 else tx.random_paint(rng)))
    low, high, tall = rng.uniform(0.35, 0.6), rng.uniform(0.15, 0.4), rng.uniform(0.35, 0.6)
    shade = lathe([(low - 0.02, 0.02), (low, 0), (high, tall), (high - 0.02, tall - 0.02)])
    parts.append(put(shade, (0, 0, height - 0.1), tx.random_paint(rng)))
    cord = put(cylinder(0.012, 0.3), (0, -0.7 * low, height - 0.2), tx.YELLOW)
    return [*parts, cord]  # which marks the front


def desk_lamp(rng: Rng, metal: tx.Color) -> Parts:
    elbow, head = np.array([0, 0.45, 0.8]), np.array([0, -0.35, 1.25])
    bell = lathe([(0.26, -0.3), (0.2, -0.1), (0.09, 0.06), (0.05, 0.1)])
    return [
        paint(tube([(0, 0, 0.1), elbow], 0.035), metal),
        paint(tube([elbow, head], 0.035), metal),
        put(ball(0.07, 2), elbow, tx.BLACK),
        put(bell, head, tx.random_color(rng), (-35, 0, 0)),
        put(ball(0.14, 2), head + [0, -0.13, -0.2], tx.YELLOW),
    ]


def lamp_stem(rng: Rng, height: float) -> trimesh.Trimesh:
    """A plain pole, or a turned vase."""
    if rng.random() < 0.5:
        return place(cylinder(0.04, height), (0, 0, height / 2 + 0.05))
    knots = np.linspace(0.1, height, 7)
    radii = np.append(rng.uniform(0.06, 0.28, 6), 0.05)
    heights = np.linspace(0.1, height, 40)
    return lathe(np.stack([np.interp(heights, knots, radii), heights], axis=-1))


# ---------------------------------------------------------------- faces


def face(rng: Rng) -> Parts:
    """A toy head on shoulders with hair, perhaps a hat, glasses or a beard."""
    skin, hair, shirt = tx.skin_color(rng), tx.wood_color(rng), tx.random_paint(rng)
    if rng.random() < 0.3:
        skin, hair = tx.random_color(rng), tx.random_color(rng)  # trolls and robots
    wide, tall = rng.uniform(0.46, 0.58), rng.uniform(0.56, 0.7)
    head = superellipsoid((wide, 0.52, tall), rng.uniform(0.7, 1.0), resolution=64)
    parts = [paint(head, skin), put(cylinder(0.2, 0.5), (0, 0.05, -tall), skin)]
    parts.append(put(superellipsoid((0.75, 0.36, 0.32), 0.6), (0, 0.05, -tall - 0.38), shirt))
    parts += face_features(rng, skin, wide, tall)
    cap = tx.noise(hair, tx.shade(hair, 0.6), 0.15, int(rng.integers(99)))
    fringe = tall * rng.uniform(0.25, 0.6)
    parts.append(paint(hair_cap(head, fringe, rng.uniform(-0.6, 0.1) * tall), cap))
    if rng.random() < 0.4:
        parts += hat(rng, wide, tall)
    return parts


def face_features(rng: Rng, skin: tx.Color, wide: float, tall: float) -> Parts:
    """Eyes, brows, ears, nose and mouth."""
    x, z, y = rng.uniform(0.17, 0.23), 0.1 * tall, -0.45
    iris = tx.random_color(rng)
    pupil = tx.where(tx.near((x, y - 0.13, z), 0.05), tx.BLACK, iris)
    gaze = tx.where(tx.near((x, y - 0.12, z), 0.075), pupil, tx.WHITE)
    parts = mirrored(put(ball(0.12), (x, y, z), gaze))
    frown = (0, rng.uniform(-15, 15), 0)
    parts += mirrored(put(box((0.2, 0.05, 0.04)), (x, y - 0.04, z + 0.18), tx.BLACK, frown))
    parts += mirrored(put(ball((0.07, 0.12, 0.16), 2), (wide, 0.02, 0.02), tx.shade(skin, 0.9)))
    size = rng.uniform(0.07, 0.13)
    nose = ball((0.8 * size, size, 1.2 * size), 2)
    parts.append(put(nose, (0, -0.54, -0.08 * tall), tx.shade(skin, 0.85)))
    t = np.linspace(-1.4, 1.4, 9)
    smile = [0.17 * np.sin(t), -0.45 + 0.05 * t * t, -0.42 * tall - 0.06 * np.cos(t)]
    parts.append(paint(tube(np.stack(smile, axis=-1), 0.035), (0.7, 0.2, 0.2)))
    if rng.random() < 0.35:
        rim = put(torus(0.15, 0.02), (x, y - 0.12, z), tx.BLACK, along="y")
        parts += [*mirrored(rim), put(box((0.1, 0.03, 0.03)), (0, y - 0.14, z), tx.BLACK)]
    if rng.random() < 0.25:
        beard = place(ball((0.75 * wide, 0.3, 0.3 * tall)), (0, -0.22, -0.68 * tall))
        parts.append(paint(roughened(beard, 0.05, 0.15, 3), tx.shade(tx.wood_color(rng), 0.7)))
    return parts


def hair_cap(head: trimesh.Trimesh, fringe: float, nape: float) -> trimesh.Trimesh:
    """A slightly larger head that dives below the skin under the hairline.

    That runs from the fringe (in front) to the nape (behind), both heights.
    """
    cap = head.copy()
    cap.apply_scale(1.08)
    _, y, z = cap.vertices.T
    line = fringe + (nape - fringe) * np.clip((y + 0.35) / 0.5, 0, 1)
    hidden = np.clip((line - z) / 0.08, 0, 1)[:, None]
    cap.vertices = cap.vertices * (1 - 0.25 * hidden)
    return cap


def hat(rng: Rng, wide: float, tall: float) -> Parts:
    color, crown = tx.random_paint(rng), rng.uniform(0.3, 0.9)
    top = rng.uniform(0, 1) * wide
    brim = put(cylinder(1.5 * wide, 0.05), (0, 0, 0.68 * tall), color)
    return [brim, put(cylinder(0.98 * wide, crown, top), (0, 0, 0.68 * tall + crown / 2), color)]


# ---------------------------------------------------------------- houses


def house(rng: Rng) -> Parts:
    """Walls, a gable roof, a door, windows, perhaps a chimney and a lawn."""
    x, y, z = rng.uniform(0.55, 0.85), rng.uniform(0.5, 0.8), rng.uniform(0.6, 1.1)
    roof = rng.uniform(0.35, 0.75)
    color, accent = tx.random_color(rng), tx.random_color(rng)
    wall = [color, tx.bricks(color, tx.shade(color, 1.5)), tx.planks(color, 0.12)][rng.integers(3)]
    parts = [put(box((2 * x, 2 * y, z)), (0, 0, z / 2), wall)]
    tiles = tx.checkers(accent, tx.shade(accent, 0.7), 0.12) if rng.random() < 0.7 else accent
    gable = prism([(-x - 0.1, z), (x + 0.1, z), (0, z + roof)], 2 * y + 0.16)
    parts.append(paint(gable if rng.random() < 0.5 else place(gable, turn=(0, 0, 90)), tiles))
    door = place(box((0.3, 0.06, 0.5)), (rng.uniform(-0.2, 0.2), -y, 0.25))
    parts.append(paint(door, accent))
    parts.append(put(ball(0.03, 1), (door.bounds[1, 0] - 0.06, -y - 0.05, 0.25), tx.YELLOW))
    for side in (-0.68 * x, 0.68 * x):
        parts += [window((side, -y, 0.6 * z), 0), window((side, y, 0.6 * z), 0)]
    parts += [window((x, 0, 0.6 * z), 90), window((-x, 0, 0.6 * z), 90)]
    if rng.random() < 0.6:
        chimney = box((0.2, 0.2, roof + 0.2))
        bricks = tx.bricks((0.6, 0.25, 0.2), tx.GREY, 0.12, 0.07)
        parts.append(put(chimney, (0.5 * x, 0.3 * y, z + roof / 2 + 0.1), bricks))
    if rng.random() < 0.4:
        lawn = tx.noise((0.2, 0.5, 0.2), (0.4, 0.6, 0.2), 0.2)
        parts.append(put(box((2.6 * x, 2.6 * y, 0.06)), (0, 0, -0.02), lawn))
    return parts


def window(at, turn: float, size: float = 0.26) -> trimesh.Trimesh:
    """A pane with a white frame and cross."""
    frame = 0.08 * size

    def is_pane(points):
        x, z = np.abs(points[:, 0]), np.abs(points[:, 2])
        return (x > frame) & (z > frame) & (x < size / 2 - frame) & (z < size / 2 - frame)

    pane = paint(box((size, 0.05, size)), tx.where(is_pane, (0.35, 0.5, 0.65), tx.WHITE))
    return place(pane, at, (0, 0, turn))


# ---------------------------------------------------------------- containers


def mug(rng: Rng) -> Parts:
    """A turned cup, hollow, with a handle at +x and a print that faces the front."""
    low, high, tall = rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.65), rng.uniform(0.9, 1.5)
    heights = np.linspace(0, tall, 24)
    straight = np.interp(heights, [0, tall], [low, high])
    belly = straight + rng.uniform(-0.06, 0.12) * np.sin(np.pi * heights / tall)
    outside = np.stack([belly, heights], axis=-1)
    inside = np.stack([belly - 0.05, np.maximum(heights, 0.06)], axis=-1)[::-1]
    color = tx.random_color(rng)
    inner = tx.WHITE if rng.random() < 0.6 else tx.random_color(rng)
    decor = mug_decor(rng, color, tall)

    def is_inside(points):
        wall = np.interp(points[:, 2], heights, belly)
        return np.linalg.norm(points[:, :2], axis=1) < wall - 0.03

    body = lathe(np.concatenate([outside, inside]), 64)
    handle = tube(handle_path(belly.mean(), tall), 0.06)
    parts = [paint(body, tx.where(is_inside, inner, decor)), paint(handle, color)]
    if rng.random() < 0.4:
        parts.append(put(cylinder(0.88 * high, 0.02), (0, 0, 0.85 * tall), (0.25, 0.14, 0.07)))
    return parts


def handle_path(radius: float, tall: float) -> np.ndarray:
    """A half ellipse at +x in the plane y = 0, both ends inside the wall."""
    turn = np.linspace(-np.pi / 2, np.pi / 2, 17)
    x, z = 0.94 * radius + 0.36 * np.cos(turn), 0.52 * tall + 0.32 * tall * np.sin(turn)
    return np.stack([x, 0 * turn, z], axis=-1)


def mug_decor(rng: Rng, color: tx.Color, tall: float) -> tx.Paint:
    """A pattern all around, a band, or a printed field on the front."""
    ink, kind = tx.random_color(rng), rng.integers(3)
    if kind == 0:
        return tx.random_paint(rng)
    if kind == 1:
        return tx.where(tx.within(z=(0.25 * tall, 0.75 * tall)), tx.random_paint(rng), color)
    field = tx.within(x=(-0.35, 0.35), y=(-9, 0), z=(0.25 * tall, 0.8 * tall))
    return tx.where(field, tx.label(ink, tx.WHITE, int(rng.integers(99)), 0.08), color)


def bottle(rng: Rng) -> Parts:
    """A bottle, jar or can with a cap and a label; its print faces the front."""
    body, neck = rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.22)
    tall, shoulder = rng.uniform(0.9, 1.5), rng.uniform(0.1, 0.4)
    color, ink, paper = (tx.random_color(rng) for _ in range(3))
    profile = [(0.9 * body, 0), (body, 0.06), (body, tall), (0.8 * body, tall + 0.45 * shoulder)]
    profile += [(neck, tall + shoulder), (neck, tall + shoulder + 0.25)]
    low, high = 0.15 * tall, rng.uniform(0.6, 0.95) * tall
    front = tx.within(x=(-0.7 * body, 0.7 * body), y=(-9, 0), z=(low + 0.08, high - 0.08))
    text = tx.label(ink, paper, int(rng.integers(99)), rng.uniform(0.05, 0.1))
    band = tx.where(front, text, tx.random_paint(rng))
    parts = [paint(lathe(profile, 56), tx.where(tx.within(z=(low, high)), band, color))]
    cap = cylinder(1.2 * neck, 0.2)
    return [*parts, put(cap, (0, 0, tall + shoulder + 0.2), tx.random_color(rng))]


def carton(rng: Rng) -> Parts:
    """A box with a title and a picture on the front, patterns on the sides."""
    x, y, z = rng.uniform(0.35, 0.8), rng.uniform(0.12, 0.6), rng.uniform(0.4, 1.0)
    base, ink, paper = tx.random_paint(rng), tx.random_color(rng), tx.random_color(rng)
    picture = tx.within(x=(-0.7 * x, 0.7 * x), y=(-9, -0.99 * y), z=(-0.75 * z, 0.1 * z))
    title = tx.within(x=(-0.85 * x, 0.85 * x), y=(-9, -0.99 * y), z=(0.3 * z, 0.85 * z))
    facts = tx.within(x=(-0.8 * x, 0.8 * x), y=(0.99 * y, 9), z=(-0.8 * z, 0.8 * z))
    seed = int(rng.integers(99))
    skin = tx.where(title, tx.label(ink, paper, seed, rng.uniform(0.06, 0.12), 0.6), base)
    skin = tx.where(picture, tx.random_paint(rng), skin)
    skin = tx.where(facts, tx.label(tx.BLACK, tx.WHITE, seed + 1, 0.05), skin)
    return [paint(box((2 * x, 2 * y, 2 * z)), skin)]


# ---------------------------------------------------------------- animals and shoes


def animal(rng: Rng) -> Parts:
    """Four legs, a body along y, a head, ears, a tail; spots, stripes or fur."""
    if rng.random() < 0.6:
        fur, second = tx.wood_color(rng), tx.WHITE
    else:
        fur, second = tx.random_color(rng), tx.random_color(rng)
    spots = tx.spots(second, fur, 0.4, int(rng.integers(99)))
    stripes = tx.stripes(fur, tx.shade(fur, 0.4), 0.22, (0, 1, 0.2))
    coat = [fur, spots, stripes][rng.integers(3)]
    legs, girth, neck = rng.uniform(0.3, 0.8), rng.uniform(0.25, 0.4), rng.uniform(0.1, 0.6)
    body = superellipsoid((girth, 0.75, 1.05 * girth), 0.85)
    parts = [put(body, (0, 0, legs + 0.7 * girth), coat)]
    for y in (-0.45, 0.48):
        hip, hoof = (0.6 * girth, y, legs + 0.4 * girth), (0.65 * girth, y, 0)
        parts += mirrored(paint(tube([hip, hoof], [0.13, 0.08]), coat))
        paw, at = ball((0.1, 0.13, 0.07), 2), (0.65 * girth, y - 0.03, 0.04)
        parts += mirrored(put(paw, at, tx.shade(fur, 0.4)))
    shoulder = np.array([0, -0.55, legs + girth])
    head = np.array([0, -0.85, legs + 1.3 * girth + neck])
    parts.append(paint(tube([shoulder, head], [0.8 * girth, 0.17]), coat))
    parts += animal_head(rng, fur, head)
    tail = [(0, 0.7, legs + girth), (0, 0.92, legs + 0.9 * girth)]
    tail.append((0, 1.02, legs + rng.uniform(-0.2, 1.6) * girth))
    return [*parts, paint(tube(tail, [0.07, 0.06, 0.04]), tx.shade(fur, 0.8))]


def animal_head(rng: Rng, fur: tx.Color, at: np.ndarray) -> Parts:
    size, snout = rng.uniform(0.24, 0.34), rng.uniform(0.1, 0.4)
    parts = [put(ball((0.85 * size, size, 0.9 * size)), at, fur)]
    muzzle = [at + [0, -0.5 * size, -0.15 * size], at + [0, -size - snout, -0.35 * size]]
    parts.append(paint(tube(muzzle, [0.6 * size, 0.4 * size]), tx.shade(fur, 1.25)))
    parts.append(put(ball(0.3 * size, 2), muzzle[1] + [0, 0, 0.1 * size], tx.BLACK))
    eye = at + [0.5 * size, -0.72 * size, 0.35 * size]
    parts += mirrored(put(ball(0.2 * size, 2), eye, tx.WHITE))
    parts += mirrored(put(ball(0.13 * size, 2), eye + [0.02, -0.11 * size, 0], tx.BLACK))
    if rng.random() < 0.3:
        steps = [(0.4 * size, 0, 0.7 * size), (0.8 * size, 0, 1.2 * size)]
        steps.append((0.7 * size, -0.2 * size, 1.7 * size))
        horn = tube(at + np.array(steps), [0.07, 0.05, 0.01])
        parts += mirrored(paint(horn, (0.9, 0.85, 0.7)))
    ear = ball((0.3 * size, 0.12 * size, rng.uniform(0.4, 1.2) * size), 2)
    place(ear, turn=(0, rng.uniform(0, 60), 0))
    tip = at + [0.6 * size, 0.1 * size, 0.8 * size]
    return parts + mirrored(put(ear, tip, tx.shade(fur, 0.7)))


def shoe(rng: Rng) -> Parts:
    """A shoe, its toe to the front: sole, upper, laces and a stripe on the side."""
    color, sole, accent = tx.random_paint(rng), tx.random_color(rng), tx.random_color(rng)
    if rng.random() < 0.5:
        sole = tx.WHITE
    ankle, toe, heel = rng.uniform(0.55, 1.0), rng.uniform(0.22, 0.32), rng.uniform(0.0, 0.12)
    upper = [(-0.98, 0, 0.12, 0.1, 0.16), (-0.92, 0, 0.24, 0.1, toe)]
    upper += [(-0.6, 0, 0.33, 0.1, toe + 0.06), (-0.2, 0, 0.3, 0.1, 0.5)]
    upper += [(0.15, 0, 0.25, 0.1, ankle), (0.75, 0, 0.27, 0.1, ankle)]
    upper += [(0.92, 0, 0.2, 0.1, 0.8 * ankle)]
    side = tx.within(y=(0.05, 0.35), z=(0.2, 0.5))
    parts = [paint(loft(upper, 0.75), tx.where(side, accent, color))]
    flat = [(-1, 0, 0.15, 0.02, 0.13), (-0.9, 0, 0.28, 0, 0.14), (-0.55, 0, 0.36, 0, 0.14)]
    flat += [(0.1, 0, 0.27, 0, 0.15), (0.8, 0, 0.3, -heel, 0.15), (0.96, 0, 0.2, -heel, 0.15)]
    parts.append(paint(loft(flat, 0.4), sole))
    parts.append(put(cylinder(0.17, 0.04), (0, 0.45, ankle - 0.01), tx.shade(tx.GREY, 0.4)))
    for y, z in np.linspace((-0.45, toe + 0.16), (0.0, 0.62 * ankle + 0.22), 4):
        lace = superellipsoid((0.2, 0.035, 0.03), 0.5, 12)
        parts.append(put(lace, (0, y, min(z, ankle)), tx.WHITE))
    return parts


# ---------------------------------------------------------------- shapes without a name


def composed(rng: Rng) -> Parts:
    """Two to nine random primitives, turned, stretched, roughened or twisted."""
    parts: Parts = []
    for _ in range(rng.integers(2, 10)):
        mesh = random_primitive(rng)
        if rng.random() < 0.25:
            amount, scale = rng.uniform(0.03, 0.12), rng.uniform(0.2, 0.5)
            mesh = roughened(mesh, amount, scale, int(rng.integers(1 << 30)))
        elif rng.random() < 0.15:
            mesh = twisted(mesh, rng.uniform(-90, 90))
        # before it is placed: the pattern moves with the part
        painted = paint(mesh, tx.random_paint(rng))
        place(painted, touching_point(rng, parts), rng.uniform(0, 360, 3) * (rng.random() < 0.6))
        parts.append(painted)
    return parts


def touching_point(rng: Rng, parts: Parts) -> np.ndarray:
    """Just below a vertex [3] of one of the parts: none drifts away, few float."""
    if not parts:
        return np.zeros(3)
    vertices = parts[rng.integers(len(parts))].vertices
    return 0.9 * vertices[rng.integers(len(vertices))]


def random_primitive(rng: Rng) -> trimesh.Trimesh:
    """Some closed shape, 0.3 to 1.8 units large."""
    a, b, c = rng.uniform(0.12, 0.65, 3)
    choices: list[Callable[[], trimesh.Trimesh]] = [
        lambda: box((2 * a, 2 * b, 2 * c)),
        lambda: ball((a, b, c)),
        lambda: superellipsoid((a, b, c), rng.uniform(0.15, 1.8)),
        lambda: cylinder(0.8 * a, 2 * b),
        lambda: cylinder(a, 2 * b, rng.uniform(0, 0.6) * a),
        lambda: torus(max(a, 0.25), rng.uniform(0.2, 0.45) * max(a, 0.25)),
        lambda: torus(max(a, 0.25), 0.25 * a, rng.uniform(90, 300)),
        lambda: lathe(np.stack([rng.uniform(0.08, 0.6, 6), np.linspace(-b, b, 6)], axis=-1)),
        lambda: prism([(-a, -b), (a, -b), (rng.uniform(-a, a), b)], 2 * c),
    ]
    return choices[rng.integers(len(choices))]()


# In this order the seeds choose: to change it changes which family a seed has.
FAMILIES: dict[str, Callable[[Rng], Parts]] = {
    family.__name__: family
    for family in (car, chair, lamp, face, house, mug, animal, bottle, carton, shoe, composed)
}
