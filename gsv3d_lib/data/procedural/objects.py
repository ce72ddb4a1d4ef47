"""Procedural objects: as many textured meshes as wanted, each one a function of its
seed.

Families of everyday things have a clear front, which faces -y (azimuth 270 degrees).
`composed` glues random primitives with random textures together: a reconstruction model
trained on such shapes alone generalises to real ones (LRM-Zero, Xie et al. 2024),
because it has to learn geometry instead of categories.
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
    roughened,
    superellipsoid,
    torus,
    tube,
    twisted,
)

if TYPE_CHECKING:
    import trimesh

COMPOSED_SHARE = 0.4  # of the objects that `procedural_object` draws when no family is asked for


def procedural_object(seed: int, family: str | None = None) -> trimesh.Trimesh:
    """A mesh with vertex colours, z up, front -y, centred, inside the unit ball and
    touching it.

    The same seed and family give the same mesh. family: one of FAMILIES; None lets the
    seed choose, `composed` in 40 % of the cases. Raises ValueError for an unknown
    family.
    """
    family = family or family_of(seed)
    if family not in FAMILIES:
        raise UserError(f"Unknown family {family!r}; choose one of {', '.join(FAMILIES)}.")
    rng = np.random.default_rng([seed, zlib.crc32(family.encode())])
    mesh = join(FAMILIES[family](rng))
    mesh.metadata["family"] = family
    return mesh


def family_of(seed: int) -> str:
    """The family that `procedural_object(seed)` draws."""
    rng = np.random.default_rng(seed)
    things = [name for name in FAMILIES if name != "composed"]
    return "composed" if rng.random() < COMPOSED_SHARE else things[rng.integers(len(things))]


# ---------------------------------------------------------------- things with a front; each returns painted parts


def car(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """Sedan, hatchback, van or pickup: a lofted body, a cabin with windows, wheels and
    lights.
    """
    color, roof = tx.random_color(rng), rng.uniform(0.66, 0.8)
    front, back, roof = [
        (-0.45, 0.55, roof),
        (-0.5, 0.9, roof),
        (-0.8, 0.95, 1.0),
        (-0.45, 0.15, roof),
    ][rng.integers(4)]
    width = rng.uniform(0.38, 0.45)
    body = [
        (-1, 0, 0.9 * width, 0.17, 0.36),
        (-0.93, 0, width, 0.13, 0.42),
        (front, 0, width, 0.13, 0.47),
    ]
    body += [(0.9, 0, width, 0.13, 0.47), (1, 0, 0.9 * width, 0.17, 0.4)]
    livery = tx.stripes(tx.WHITE, color, 2.0, (1, 0, 0), 0.1) if rng.random() < 0.3 else color
    parts = [paint(loft(body, 0.3), livery), car_cabin(color, width, front, back, roof)]
    parts += car_wheels(rng, width) + car_lights(width)
    parts.append(
        paint(
            place(box((0.9 * width, 0.04, 0.1)), (0, -0.99, 0.27)),
            tx.stripes(tx.METAL, tx.BLACK, 0.04),
        )
    )
    return parts


def car_cabin(
    color: tx.Color, width: float, front: float, back: float, roof: float
) -> trimesh.Trimesh:
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


def car_wheels(rng: np.random.Generator, width: float) -> list[trimesh.Trimesh]:
    radius, parts = rng.uniform(0.16, 0.21), []
    for y in (-0.62, 0.6):
        tyre = place(cylinder(radius, 0.14), (width - 0.03, y, radius), along="x")
        hub = place(cylinder(0.55 * radius, 0.16), (width - 0.03, y, radius), along="x")
        parts += mirrored(paint(tyre, tx.BLACK)) + mirrored(paint(hub, tx.METAL))
    return parts


def car_lights(width: float) -> list[trimesh.Trimesh]:
    lamps = [(-0.97, tx.YELLOW, (0.08, 0.05, 0.06)), (0.98, tx.RED, (0.07, 0.04, 0.07))]
    return [
        twin
        for y, color, radii in lamps
        for twin in mirrored(paint(place(ball(radii, 2), (0.72 * width, y, 0.36)), color))
    ]


def chair(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """Four legs or a star base, a seat, a back with or without slats, perhaps arms."""
    frame = tx.wood_color(rng) if rng.random() < 0.6 else tx.random_color(rng)
    cover = tx.planks(frame, 0.12) if rng.random() < 0.4 else tx.random_paint(rng)
    half, height, rise = rng.uniform(0.38, 0.5), rng.uniform(0.5, 0.8), rng.uniform(0.6, 1.0)
    seat = (
        superellipsoid((half, half, 0.06), 0.25)
        if rng.random() < 0.5
        else box((2 * half, 2 * half, 0.09))
    )
    parts = [paint(place(seat, (0, 0, height)), cover)]
    parts += chair_base(rng, frame, half, height) + chair_back(
        rng, frame, cover, half, height, rise
    )
    if rng.random() < 0.4:
        arm = [
            (half, half - 0.05, height + 0.3),
            (half, -0.6 * half, height + 0.3),
            (half, -0.7 * half, height),
        ]
        parts += mirrored(paint(tube(arm, 0.04), frame))
    return parts


def chair_base(
    rng: np.random.Generator, color: tx.Color, half: float, height: float
) -> list[trimesh.Trimesh]:
    if rng.random() < 0.3:
        parts = [paint(place(cylinder(0.05, height), (0, 0, height / 2)), tx.METAL)]
        for angle in np.radians(np.arange(5) * 72 + 90):
            tip = (0.9 * half * np.cos(angle), 0.9 * half * np.sin(angle), 0.06)
            parts += [
                paint(tube([(0, 0, 0.14), tip], 0.04), tx.METAL),
                paint(place(ball(0.06, 2), tip), tx.BLACK),
            ]
        return parts
    spread, thick = rng.uniform(0.8, 1.05), rng.uniform(0.035, 0.065)
    legs = []
    for y in (-1, 1):
        foot, top = (spread * half, spread * half * y, 0), (0.85 * half, 0.85 * half * y, height)
        legs += mirrored(paint(tube([foot, top], [0.7 * thick, thick]), color))
    return legs


def chair_back(rng, frame: tx.Color, cover: tx.Paint, half: float, height: float, rise: float):
    lean, top = rng.uniform(0, 0.2), height + rise
    if rng.random() < 0.5:
        rest = (
            box((1.9 * half, 0.07, 0.75 * rise))
            if rng.random() < 0.5
            else ball((0.95 * half, 0.06, 0.4 * rise))
        )
        place(
            rest,
            (0, half - 0.05 + 0.6 * lean, height + 0.6 * rise),
            (-np.degrees(np.arctan2(lean, rise)), 0, 0),
        )
        parts = [paint(rest, cover)]
    else:
        slats = np.linspace(-0.6, 0.6, rng.integers(2, 6)) * half
        parts = [
            paint(tube([(x, half - 0.05, height), (x, half + lean, top)], 0.03), frame)
            for x in slats
        ]
        parts.append(paint(place(box((1.9 * half, 0.06, 0.14)), (0, half + lean, top)), frame))
    post = tube([(0.9 * half, half - 0.05, height), (0.9 * half, half + lean, top)], 0.04)
    return parts + mirrored(paint(post, frame))


def lamp(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """A table or floor lamp with a shade, or a desk lamp whose arm reaches towards the
    front.
    """
    metal = tx.METAL if rng.random() < 0.4 else tx.random_color(rng)
    foot = lathe(
        [(0.42, 0), (0.42, 0.04), (rng.uniform(0.08, 0.3), rng.uniform(0.08, 0.16)), (0.04, 0.18)]
    )
    parts = [paint(foot, metal)]
    if rng.random() < 0.35:
        elbow, head = np.array([0, 0.45, 0.8]), np.array([0, -0.35, 1.25])
        parts += [
            paint(tube([(0, 0, 0.1), elbow], 0.035), metal),
            paint(tube([elbow, head], 0.035), metal),
        ]
        parts.append(paint(place(ball(0.07, 2), elbow), tx.BLACK))
        bell = lathe([(0.26, -0.3), (0.2, -0.1), (0.09, 0.06), (0.05, 0.1)])
        parts.append(paint(place(bell, head, (-35, 0, 0)), tx.random_color(rng)))
        parts.append(paint(place(ball(0.14, 2), head + [0, -0.13, -0.2]), tx.YELLOW))
        return parts
    height = rng.uniform(0.7, 1.7)
    parts.append(
        paint(lamp_stem(rng, height), metal if rng.random() < 0.5 else tx.random_paint(rng))
    )
    low, high, tall = rng.uniform(0.35, 0.6), rng.uniform(0.15, 0.4), rng.uniform(0.35, 0.6)
    shade = lathe([(low - 0.02, 0.02), (low, 0), (high, tall), (high - 0.02, tall - 0.02)])
    parts.append(paint(place(shade, (0, 0, height - 0.1)), tx.random_paint(rng)))
    parts.append(
        paint(place(cylinder(0.012, 0.3), (0, -0.7 * low, height - 0.2)), tx.YELLOW)
    )  # the cord marks the front
    return parts


def lamp_stem(rng: np.random.Generator, height: float) -> trimesh.Trimesh:
    """A plain pole, or a turned vase."""
    if rng.random() < 0.5:
        return place(cylinder(0.04, height), (0, 0, height / 2 + 0.05))
    knots = np.linspace(0.1, height, 7)
    radii = np.append(rng.uniform(0.06, 0.28, 6), 0.05)
    heights = np.linspace(0.1, height, 40)
    return lathe(np.stack([np.interp(heights, knots, radii), heights], axis=-1))


def face(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """A toy head on shoulders: eyes, brows, nose, mouth, ears, hair and perhaps a hat,
    glasses or a beard.
    """
    skin, hair, shirt = tx.skin_color(rng), tx.wood_color(rng), tx.random_paint(rng)
    if rng.random() < 0.3:
        skin, hair = tx.random_color(rng), tx.random_color(rng)  # trolls and robots
    wide, tall = rng.uniform(0.46, 0.58), rng.uniform(0.56, 0.7)
    head = superellipsoid((wide, 0.52, tall), rng.uniform(0.7, 1.0), resolution=64)
    parts = [paint(head, skin), paint(place(cylinder(0.2, 0.5), (0, 0.05, -tall)), skin)]
    parts.append(
        paint(place(superellipsoid((0.75, 0.36, 0.32), 0.6), (0, 0.05, -tall - 0.38)), shirt)
    )
    parts += face_features(rng, skin, wide, tall)
    cap = tx.noise(hair, tx.shade(hair, 0.6), 0.15, int(rng.integers(99)))
    fringe = tall * rng.uniform(0.25, 0.6)
    parts.append(paint(hair_cap(head, fringe, rng.uniform(-0.6, 0.1) * tall), cap))
    if rng.random() < 0.4:
        parts += hat(rng, wide, tall)
    return parts


def face_features(
    rng: np.random.Generator, skin: tx.Color, wide: float, tall: float
) -> list[trimesh.Trimesh]:
    x, z, y = rng.uniform(0.17, 0.23), 0.1 * tall, -0.45
    iris = tx.random_color(rng)
    gaze = tx.where(
        tx.near((x, y - 0.12, z), 0.075),
        tx.where(tx.near((x, y - 0.13, z), 0.05), tx.BLACK, iris),
        tx.WHITE,
    )
    parts = mirrored(paint(place(ball(0.12), (x, y, z)), gaze))
    parts += mirrored(
        paint(
            place(box((0.2, 0.05, 0.04)), (x, y - 0.04, z + 0.18), (0, rng.uniform(-15, 15), 0)),
            tx.BLACK,
        )
    )
    parts += mirrored(
        paint(place(ball((0.07, 0.12, 0.16), 2), (wide, 0.02, 0.02)), tx.shade(skin, 0.9))
    )
    nose = rng.uniform(0.07, 0.13)
    parts.append(
        paint(
            place(ball((0.8 * nose, nose, 1.2 * nose), 2), (0, -0.54, -0.08 * tall)),
            tx.shade(skin, 0.85),
        )
    )
    smile = [
        (0.17 * np.sin(t), -0.45 + 0.05 * t * t, -0.42 * tall - 0.06 * np.cos(t))
        for t in np.linspace(-1.4, 1.4, 9)
    ]
    parts.append(paint(tube(smile, 0.035), (0.7, 0.2, 0.2)))
    if rng.random() < 0.35:
        rim = place(torus(0.15, 0.02), (x, y - 0.12, z), along="y")
        parts += mirrored(paint(rim, tx.BLACK)) + [
            paint(place(box((0.1, 0.03, 0.03)), (0, y - 0.14, z)), tx.BLACK)
        ]
    if rng.random() < 0.25:
        beard = roughened(
            place(ball((0.75 * wide, 0.3, 0.3 * tall)), (0, -0.22, -0.68 * tall)), 0.05, 0.15, 3
        )
        parts.append(paint(beard, tx.shade(tx.wood_color(rng), 0.7)))
    return parts


def hair_cap(head: trimesh.Trimesh, fringe: float, nape: float) -> trimesh.Trimesh:
    """A slightly larger head that dives below the skin under a line from the fringe
    (front) to the nape (back).
    """
    cap = head.copy()
    cap.apply_scale(1.08)
    _, y, z = cap.vertices.T
    line = fringe + (nape - fringe) * np.clip((y + 0.35) / 0.5, 0, 1)
    hidden = np.clip((line - z) / 0.08, 0, 1)[:, None]
    cap.vertices = cap.vertices * (1 - 0.25 * hidden)
    return cap


def hat(rng: np.random.Generator, wide: float, tall: float) -> list[trimesh.Trimesh]:
    color, crown = tx.random_paint(rng), rng.uniform(0.3, 0.9)
    top = rng.uniform(0, 1) * wide
    brim = place(cylinder(1.5 * wide, 0.05), (0, 0, 0.68 * tall))
    return [
        paint(brim, color),
        paint(place(cylinder(0.98 * wide, crown, top), (0, 0, 0.68 * tall + crown / 2)), color),
    ]


def house(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """Walls, a gable roof, a door and windows in front, windows on the sides, perhaps a
    chimney and a porch.
    """
    x, y, z = rng.uniform(0.55, 0.85), rng.uniform(0.5, 0.8), rng.uniform(0.6, 1.1)
    roof = rng.uniform(0.35, 0.75)
    color, accent = tx.random_color(rng), tx.random_color(rng)
    wall = [color, tx.bricks(color, tx.shade(color, 1.5)), tx.planks(color, 0.12)][rng.integers(3)]
    parts = [paint(place(box((2 * x, 2 * y, z)), (0, 0, z / 2)), wall)]
    tiles = tx.checkers(accent, tx.shade(accent, 0.7), 0.12) if rng.random() < 0.7 else accent
    gable = prism([(-x - 0.1, z), (x + 0.1, z), (0, z + roof)], 2 * y + 0.16)
    parts.append(
        paint(gable, tiles) if rng.random() < 0.5 else paint(place(gable, turn=(0, 0, 90)), tiles)
    )
    door = place(box((0.3, 0.06, 0.5)), (rng.uniform(-0.2, 0.2), -y, 0.25))
    parts += [
        paint(door, accent),
        paint(place(ball(0.03, 1), (door.bounds[1, 0] - 0.06, -y - 0.05, 0.25)), tx.YELLOW),
    ]
    for side in (-0.68 * x, 0.68 * x):
        parts += window((side, -y, 0.6 * z), 0) + window((side, y, 0.6 * z), 0)
    parts += window((x, 0, 0.6 * z), 90) + window((-x, 0, 0.6 * z), 90)
    if rng.random() < 0.6:
        chimney = place(box((0.2, 0.2, roof + 0.2)), (0.5 * x, 0.3 * y, z + roof / 2 + 0.1))
        parts.append(paint(chimney, tx.bricks((0.6, 0.25, 0.2), tx.GREY, 0.12, 0.07)))
    if rng.random() < 0.4:
        parts.append(
            paint(
                place(box((2.6 * x, 2.6 * y, 0.06)), (0, 0, -0.02)),
                tx.noise((0.2, 0.5, 0.2), (0.4, 0.6, 0.2), 0.2),
            )
        )
    return parts


def window(at, turn: float, size: float = 0.26) -> list[trimesh.Trimesh]:
    """A pane with a white frame and cross."""
    frame = 0.08 * size

    def is_pane(points):
        x, z = np.abs(points[:, 0]), np.abs(points[:, 2])
        return (x > frame) & (z > frame) & (x < size / 2 - frame) & (z < size / 2 - frame)

    pane = paint(box((size, 0.05, size)), tx.where(is_pane, (0.35, 0.5, 0.65), tx.WHITE))
    return [place(pane, at, (0, 0, turn))]


def mug(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """A turned cup, hollow, with a handle at +x and a print that faces the front."""
    low, high, tall = rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.65), rng.uniform(0.9, 1.5)
    heights = np.linspace(0, tall, 24)
    belly = np.interp(heights, [0, tall], [low, high]) + rng.uniform(-0.06, 0.12) * np.sin(
        np.pi * heights / tall
    )
    outside = np.stack([belly, heights], axis=-1)
    inside = np.stack([belly - 0.05, np.maximum(heights, 0.06)], axis=-1)[::-1]
    color, inner = tx.random_color(rng), tx.WHITE if rng.random() < 0.6 else tx.random_color(rng)
    decor = mug_decor(rng, color, tall)

    def is_inside(points):
        return (
            np.linalg.norm(points[:, :2], axis=1) < np.interp(points[:, 2], heights, belly) - 0.03
        )

    body = lathe(np.concatenate([outside, inside]), 64)
    handle = tube(handle_path(belly.mean(), tall), 0.06)
    parts = [paint(body, tx.where(is_inside, inner, decor)), paint(handle, color)]
    if rng.random() < 0.4:
        parts.append(
            paint(place(cylinder(0.88 * high, 0.02), (0, 0, 0.85 * tall)), (0.25, 0.14, 0.07))
        )
    return parts


def handle_path(radius: float, tall: float) -> np.ndarray:
    """A half ellipse at +x in the plane y = 0, both ends inside the wall."""
    turn = np.linspace(-np.pi / 2, np.pi / 2, 17)
    return np.stack(
        [0.94 * radius + 0.36 * np.cos(turn), 0 * turn, 0.52 * tall + 0.32 * tall * np.sin(turn)],
        -1,
    )


def mug_decor(rng: np.random.Generator, color: tx.Color, tall: float) -> tx.Paint:
    """A pattern all around, a band, or a printed field on the front."""
    ink, kind = tx.random_color(rng), rng.integers(3)
    if kind == 0:
        return tx.random_paint(rng)
    if kind == 1:
        return tx.where(tx.within(z=(0.25 * tall, 0.75 * tall)), tx.random_paint(rng), color)
    field = tx.within(x=(-0.35, 0.35), y=(-9, 0), z=(0.25 * tall, 0.8 * tall))
    return tx.where(field, tx.label(ink, tx.WHITE, int(rng.integers(99)), 0.08), color)


def animal(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """Four legs, a body along y, a head in front, ears, a tail; spots, stripes or plain
    fur.
    """
    fur, second = (
        (tx.wood_color(rng), tx.WHITE)
        if rng.random() < 0.6
        else (tx.random_color(rng), tx.random_color(rng))
    )
    coats = [
        fur,
        tx.spots(second, fur, 0.4, int(rng.integers(99))),
        tx.stripes(fur, tx.shade(fur, 0.4), 0.22, (0, 1, 0.2)),
    ]
    coat = coats[rng.integers(3)]
    legs, girth, neck = rng.uniform(0.3, 0.8), rng.uniform(0.25, 0.4), rng.uniform(0.1, 0.6)
    body = superellipsoid((girth, 0.75, 1.05 * girth), 0.85)
    parts = [paint(place(body, (0, 0, legs + 0.7 * girth)), coat)]
    for y in (-0.45, 0.48):
        hip, hoof = (0.6 * girth, y, legs + 0.4 * girth), (0.65 * girth, y, 0)
        parts += mirrored(paint(tube([hip, hoof], [0.13, 0.08]), coat))
        parts += mirrored(
            paint(
                place(ball((0.1, 0.13, 0.07), 2), (0.65 * girth, y - 0.03, 0.04)),
                tx.shade(fur, 0.4),
            )
        )
    shoulder, head = (
        np.array([0, -0.55, legs + girth]),
        np.array([0, -0.85, legs + 1.3 * girth + neck]),
    )
    parts.append(paint(tube([shoulder, head], [0.8 * girth, 0.17]), coat))
    parts += animal_head(rng, fur, head)
    tail = np.array(
        [
            (0, 0.7, legs + girth),
            (0, 0.92, legs + 0.9 * girth),
            (0, 1.02, legs + rng.uniform(-0.2, 1.6) * girth),
        ]
    )
    return parts + [paint(tube(tail, [0.07, 0.06, 0.04]), tx.shade(fur, 0.8))]


def animal_head(rng: np.random.Generator, fur: tx.Color, at: np.ndarray) -> list[trimesh.Trimesh]:
    size, snout = rng.uniform(0.24, 0.34), rng.uniform(0.1, 0.4)
    parts = [paint(place(ball((0.85 * size, size, 0.9 * size)), at), fur)]
    muzzle = [at + [0, -0.5 * size, -0.15 * size], at + [0, -size - snout, -0.35 * size]]
    parts.append(paint(tube(muzzle, [0.6 * size, 0.4 * size]), tx.shade(fur, 1.25)))
    parts.append(paint(place(ball(0.3 * size, 2), muzzle[1] + [0, 0, 0.1 * size]), tx.BLACK))
    eye = at + [0.5 * size, -0.72 * size, 0.35 * size]
    parts += mirrored(paint(place(ball(0.2 * size, 2), eye), tx.WHITE))
    parts += mirrored(paint(place(ball(0.13 * size, 2), eye + [0.02, -0.11 * size, 0]), tx.BLACK))
    if rng.random() < 0.3:
        horn = [
            at + [0.4 * size, 0, 0.7 * size],
            at + [0.8 * size, 0, 1.2 * size],
            at + [0.7 * size, -0.2 * size, 1.7 * size],
        ]
        parts += mirrored(paint(tube(horn, [0.07, 0.05, 0.01]), (0.9, 0.85, 0.7)))
    ear = place(
        ball((0.3 * size, 0.12 * size, rng.uniform(0.4, 1.2) * size), 2),
        turn=(0, rng.uniform(0, 60), 0),
    )
    return parts + mirrored(
        paint(place(ear, at + [0.6 * size, 0.1 * size, 0.8 * size]), tx.shade(fur, 0.7))
    )


def bottle(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """A bottle, jar or can with a cap and a printed label around it; the print proper
    faces the front.
    """
    body, neck = rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.22)
    tall, shoulder = rng.uniform(0.9, 1.5), rng.uniform(0.1, 0.4)
    color, ink, paper = (tx.random_color(rng) for _ in range(3))
    profile = [
        (0.9 * body, 0),
        (body, 0.06),
        (body, tall),
        (0.8 * body, tall + 0.45 * shoulder),
        (neck, tall + shoulder),
    ]
    profile.append((neck, tall + shoulder + 0.25))
    low, high = 0.15 * tall, rng.uniform(0.6, 0.95) * tall
    front = tx.within(x=(-0.7 * body, 0.7 * body), y=(-9, 0), z=(low + 0.08, high - 0.08))
    band = tx.where(
        front,
        tx.label(ink, paper, int(rng.integers(99)), rng.uniform(0.05, 0.1)),
        tx.random_paint(rng),
    )
    parts = [paint(lathe(profile, 56), tx.where(tx.within(z=(low, high)), band, color))]
    cap = place(cylinder(1.2 * neck, 0.2), (0, 0, tall + shoulder + 0.2))
    return parts + [paint(cap, tx.random_color(rng))]


def carton(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """A box with print: a title field and a picture on the front, patterns on the
    sides.
    """
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


def shoe(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """One or two shoes, toes to the front: a sole, an upper lofted along the foot,
    laces, a stripe on the side.
    """
    color, sole, accent = tx.random_paint(rng), tx.random_color(rng), tx.random_color(rng)
    if rng.random() < 0.5:
        sole = tx.WHITE
    ankle, toe, heel = rng.uniform(0.55, 1.0), rng.uniform(0.22, 0.32), rng.uniform(0.0, 0.12)
    upper = [
        (-0.98, 0, 0.12, 0.1, 0.16),
        (-0.92, 0, 0.24, 0.1, toe),
        (-0.6, 0, 0.33, 0.1, toe + 0.06),
    ]
    upper += [(-0.2, 0, 0.3, 0.1, 0.5), (0.15, 0, 0.25, 0.1, ankle), (0.75, 0, 0.27, 0.1, ankle)]
    upper += [(0.92, 0, 0.2, 0.1, 0.8 * ankle)]
    side = tx.within(y=(0.05, 0.35), z=(0.2, 0.5))
    parts = [paint(loft(upper, 0.75), tx.where(side, accent, color))]
    flat = [
        (-1, 0, 0.15, 0.02, 0.13),
        (-0.9, 0, 0.28, 0, 0.14),
        (-0.55, 0, 0.36, 0, 0.14),
        (0.1, 0, 0.27, 0, 0.15),
    ]
    flat += [(0.8, 0, 0.3, -heel, 0.15), (0.96, 0, 0.2, -heel, 0.15)]
    parts.append(paint(loft(flat, 0.4), sole))
    parts.append(
        paint(place(cylinder(0.17, 0.04), (0, 0.45, ankle - 0.01)), tx.shade(tx.GREY, 0.4))
    )
    for y, z in zip(
        np.linspace(-0.45, 0.0, 4), np.linspace(toe + 0.16, 0.62 * ankle + 0.22, 4), strict=True
    ):
        parts.append(
            paint(
                place(superellipsoid((0.2, 0.035, 0.03), 0.5, 12), (0, y, min(z, ankle))), tx.WHITE
            )
        )
    return parts


# ---------------------------------------------------------------- shapes without a name


def composed(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """Two to nine random primitives, each turned, stretched, perhaps roughened or
    twisted, and painted at random.
    """
    parts: list[trimesh.Trimesh] = []
    for _ in range(rng.integers(2, 10)):
        mesh = random_primitive(rng)
        if rng.random() < 0.25:
            mesh = roughened(
                mesh, rng.uniform(0.03, 0.12), rng.uniform(0.2, 0.5), int(rng.integers(1 << 30))
            )
        elif rng.random() < 0.15:
            mesh = twisted(mesh, rng.uniform(-90, 90))
        # before it is placed: the pattern moves with the part
        painted = paint(mesh, tx.random_paint(rng))
        place(painted, touching_point(rng, parts), rng.uniform(0, 360, 3) * (rng.random() < 0.6))
        parts.append(painted)
    return parts


def touching_point(rng: np.random.Generator, parts: list[trimesh.Trimesh]) -> np.ndarray:
    """Just below a vertex [3] of one of the parts, the origin where there is none yet:
    none drifts away, few float.
    """
    if not parts:
        return np.zeros(3)
    vertices = parts[rng.integers(len(parts))].vertices
    return 0.9 * vertices[rng.integers(len(vertices))]


def random_primitive(rng: np.random.Generator) -> trimesh.Trimesh:
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


FAMILIES: dict[str, Callable[[np.random.Generator], list]] = {
    "car": car,
    "chair": chair,
    "lamp": lamp,
    "face": face,
    "house": house,
    "mug": mug,
    "animal": animal,
    "bottle": bottle,
    "carton": carton,
    "shoe": shoe,
    "composed": composed,
}
