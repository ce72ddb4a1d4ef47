"""Procedural objects: deterministic, normalised, painted, with a front.

And the primitives and textures they are made of.
"""

import numpy as np
import pytest

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.data.procedural import textures as tx
from gsv3d_lib.data.procedural.objects import (
    FAMILIES,
    car,
    family_of,
    lamp,
    mug,
    procedural_object,
    touching_point,
)
from gsv3d_lib.data.procedural.shapes import (
    TEXTURE_EDGE,
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
    twisted,
)
from gsv3d_lib.data.raycast import render_mesh

POINTS = np.random.default_rng(0).uniform(-1, 1, (2000, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fills_the_unit_ball_and_is_painted(family):
    mesh = procedural_object(7, family)
    assert np.isfinite(mesh.vertices).all() and len(mesh.faces) < 400_000
    assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(1)
    assert np.allclose(mesh.bounds.mean(0), 0, atol=1e-9)
    colors = mesh.visual.vertex_colors
    assert colors.shape == (len(mesh.vertices), 4) and (colors[:, 3] == 255).all()
    assert len(np.unique(colors, axis=0)) >= 2


@pytest.mark.parametrize("family", ["chair", "composed"])
def test_the_seed_decides_everything(family):
    first, second, other = (procedural_object(seed, family) for seed in (5, 5, 6))
    assert np.array_equal(first.vertices, second.vertices)
    assert np.array_equal(first.visual.vertex_colors, second.visual.vertex_colors)
    assert len(first.vertices) != len(other.vertices) or not np.allclose(
        first.vertices, other.vertices
    )


def test_without_a_family_the_seed_chooses_and_two_fifths_are_composed():
    drawn = [family_of(seed) for seed in range(1500)]
    assert set(drawn) == set(FAMILIES)
    assert drawn.count("composed") / len(drawn) == pytest.approx(0.4, abs=0.04)
    assert procedural_object(3).metadata["family"] == family_of(3)


def test_an_unknown_family_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="Unknown family 'cat'; choose one of car, chair"):
        procedural_object(0, "cat")


def center_of(parts, color) -> np.ndarray:
    """Mean position of the vertices that have a colour."""
    mesh = join(parts)
    same = (mesh.visual.vertex_colors[:, :3] == np.round(255 * np.array(color))).all(1)
    return mesh.vertices[same].mean(0)


def test_fronts_face_minus_y():
    parts = car(np.random.default_rng(1))
    assert center_of(parts, tx.YELLOW)[1] < -0.5, "headlights in front"
    assert center_of(parts, tx.RED)[1] > 0.5, "tail lights behind"
    front, back = (
        render_mesh(procedural_object(1, "face"), orbit_cameras([az], [5.0], 64))[0]
        for az in (270.0, 90.0)
    )
    white = [
        ((rgba[0, ..., :3].min(-1) > 0.7) & (rgba[0, ..., 3] > 0.5))[15:40].sum()
        for rgba in (front, back)
    ]
    assert white[0] > 5 and white[1] == 0, "the whites of the eyes are seen from the front only"


def test_mug_has_its_handle_at_plus_x_and_is_hollow():
    mesh = join(mug(np.random.default_rng(2)))
    assert mesh.vertices[:, 0].max() > 1.15 * mesh.vertices[:, 1].max()
    column = np.linalg.norm(mesh.vertices[:, :2] - mesh.vertices[:, :2].mean(0), axis=1) < 0.1
    assert not ((mesh.vertices[column, 2]) > 0.9 * mesh.bounds[1, 2]).any()


def test_families_vary():
    heights = [np.ptp(join(lamp(np.random.default_rng(seed))).vertices[:, 0]) for seed in range(6)]
    assert np.ptp(heights) > 0.1


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "mesh, volume",
    [
        (box((1, 2, 3)), 6),
        (ball((0.5, 1, 2), 4), 4 / 3 * np.pi),
        (superellipsoid((0.5, 1, 2), 1.0, 96), 4 / 3 * np.pi),
        (cylinder(0.5, 2), np.pi / 2),
        (cylinder(1, 3, 0), np.pi),
        (torus(1, 0.2), 2 * np.pi**2 * 0.04),
        (prism([(0, 0), (1, 0), (0, 1)], 4), 2),
        (loft([(-1, 0, 1, -1, 1), (1, 0, 1, -1, 1)], 1.0, 96), 2 * np.pi),
        (lathe([(1, 0), (1, 1), (0.5, 1), (0.5, 0.5)], 128), np.pi * (1 - 0.125)),
    ],
    ids=[
        "box",
        "ball",
        "superellipsoid",
        "cylinder",
        "cone",
        "torus",
        "prism",
        "loft",
        "hollow lathe",
    ],
)
def test_volumes_match_the_closed_forms_and_triangles_look_outward(mesh, volume):
    assert mesh.volume == pytest.approx(volume, rel=0.04)


def test_a_superellipsoid_of_little_roundness_is_a_box():
    assert superellipsoid((1, 1, 1), 0.02).volume == pytest.approx(8, rel=0.05)


def test_place_lays_turns_and_moves():
    rod = place(cylinder(0.1, 2), at=(5, 0, 0), along="x")
    assert np.ptp(rod.vertices, axis=0).argmax() == 0 and rod.centroid == pytest.approx(
        [5, 0, 0], abs=1e-9
    )
    assert (
        np.ptp(place(cylinder(0.1, 2), turn=(0, 0, 90), along="x").vertices, axis=0).argmax() == 1
    )


def test_mirrored_keeps_triangles_outward():
    right, left = mirrored(place(ball(0.2), (1, 0, 0)))
    assert left.centroid == pytest.approx([-1, 0, 0], abs=1e-9) and left.volume == pytest.approx(
        right.volume
    )


def test_texture_cuts_triangles_and_a_plain_colour_does_not():
    plain, textured = (
        paint(box((1, 1, 1)), tx.RED),
        paint(box((1, 1, 1)), tx.checkers(tx.RED, tx.WHITE, 0.2)),
    )
    assert len(plain.faces) == 12
    assert textured.edges_unique_length.max() <= TEXTURE_EDGE
    assert textured.area == pytest.approx(6)


def test_roughening_and_twisting_move_the_surface_as_far_as_asked():
    moved = np.linalg.norm(roughened(ball(1.0), 0.1, 0.4, seed=1).vertices, axis=1) - 1
    assert 0.02 < np.abs(moved).max() < 0.25
    top = twisted(box((0.2, 0.2, 2)), 90).vertices[:, 2]
    assert np.ptp(top) == pytest.approx(2)
    assert twisted(cylinder(0.5, 1), 60).volume == pytest.approx(cylinder(0.5, 1).volume, rel=0.05)


def test_a_new_part_touches_an_old_one():
    rng, old = np.random.default_rng(0), paint(ball(0.5), tx.RED)
    assert touching_point(rng, []) == pytest.approx([0, 0, 0])
    assert np.linalg.norm(touching_point(rng, [old])) == pytest.approx(0.45, abs=0.01)


# ---------------------------------------------------------------- textures


def test_checkers_alternate():
    texture = tx.checkers(tx.WHITE, tx.BLACK, 0.5)
    colors = texture(np.array([[0.25, 0.25, 0.25], [0.75, 0.25, 0.25], [0.75, 0.75, 0.25]]))
    assert colors[0] == pytest.approx(tx.WHITE) and colors[1] == pytest.approx(tx.BLACK)
    assert colors[2] == pytest.approx(tx.WHITE)


def test_stripes_take_their_share():
    is_white = tx.stripes(tx.WHITE, tx.BLACK, 0.1, (1, 2, 3), share=0.3)(POINTS)[:, 0] > 0.5
    assert is_white.mean() == pytest.approx(0.3, abs=0.04)


def test_gradient_ends_and_middle():
    red = tx.gradient((0, 0, 0), (1, 0, 0), (0, 0, 2), -1, 1)(
        np.array([[0, 0, -5.0], [0, 0, 0], [0, 0, 1]])
    )[:, 0]
    assert red == pytest.approx([0, 0.5, 1])


def test_textures_nest():
    inner = tx.checkers(tx.RED, tx.YELLOW, 0.3)
    outer = tx.where(tx.within(z=(0, 9)), inner, tx.BLACK)(POINTS)
    above = POINTS[:, 2] >= 0
    assert np.array_equal(outer[above], inner(POINTS)[above])
    assert (outer[~above] == tx.BLACK).all()


def test_patches_use_every_paint():
    colors = tx.patches([tx.RED, tx.YELLOW, tx.GREY], 0.3, seed=1)(POINTS)
    assert len(np.unique(colors, axis=0)) == 3


def test_noise_is_smooth_centred_and_repeatable():
    values = tx.fractal_noise(POINTS * 3, seed=4)
    assert np.array_equal(values, tx.fractal_noise(POINTS * 3, seed=4))
    assert np.abs(values).max() <= 1 and abs(values.mean()) < 0.1 and values.std() > 0.1
    assert np.abs(tx.fractal_noise(POINTS * 3 + 1e-4, seed=4) - values).max() < 0.01


def test_random_paints_give_colours_and_variety():
    rng = np.random.default_rng(0)
    means = []
    for _ in range(60):
        colors = tx.apply(tx.random_paint(rng), POINTS)
        assert colors.shape == POINTS.shape and colors.min() >= 0 and colors.max() <= 1
        means.append(colors.mean(0))
    assert np.std(means, axis=0).min() > 0.12
