"""Back-projection against its definition, and what must keep its colour."""

from dataclasses import replace

import pytest
import torch
from tiny_world import one_sentence, randn

from gsv3d_lib.backprojection import COVER_SCALE, HOLE, SOLID, back_project, carve, cover, paint
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rendering import render

SIZE = 32
CAMERA = orbit_cameras([0.0], 0.0, SIZE)  # on the +x side, so a larger x is nearer
BLUE = torch.tensor([0.0, 0.0, 1.0])


def balls(*places, size: float = 0.15, opacity: float = 0.98) -> Gaussians:
    """Red balls at `places`."""
    count = len(places)
    return Gaussians(
        torch.tensor(places),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.full((count, 3), size),
        torch.full((count,), opacity),
        torch.tensor([[1.0, 0, 0]]).repeat(count, 1),
    )


def behind_a_wall(layers: int) -> Gaussians:
    """A small ball, one out of sight, and large ones in front of the first."""
    small = balls([-0.5, 0.0, 0.0], [0.0, 0.0, 5.0], size=0.05)
    wall = balls(*layers * [[0.5, 0.0, 0.0]], size=0.4, opacity=0.8)
    return Gaussians.concatenate([small, wall])


def random_scene(count: int = 12) -> Gaussians:
    scene = balls(*(0.4 * randn(count, 3)).tolist(), size=0.1, opacity=0.6)
    return replace(scene, colors=randn(count, 3, seed=1).sigmoid())


def test_colours_are_the_means_of_the_image_over_the_footprints():
    """The weights by the book: one rendering per Gaussian, in which it alone is white;
    alpha counts as less of a pixel.
    """
    scene, color, mask = (
        random_scene(),
        randn(SIZE, SIZE, 3, seed=2).sigmoid(),
        randn(SIZE, SIZE, 1, seed=3).sigmoid(),
    )
    painted = paint(scene, CAMERA, mask * color + 1 - mask, mask)
    for g in range(len(scene)):
        alone = replace(scene, colors=torch.zeros(len(scene), 3))
        alone.colors[g] = 1
        # [H, W, 3], one in three channels
        weight = render(alone, CAMERA, background=(0, 0, 0), backend="torch").rgb[0]
        assert weight[..., 0].sum() > 0.01
        mean = (weight * mask * color).sum((0, 1)) / (weight * mask).sum((0, 1))
        assert torch.allclose(painted.colors[g], mean, atol=1e-4)


def test_only_the_visible_side_is_painted_and_nothing_else_changes():
    # hidden behind the others, outside the picture, a wall in front
    scene = behind_a_wall(8)
    painted = back_project(scene, CAMERA, BLUE.expand(SIZE, SIZE, 3)).select(slice(len(scene)))
    assert torch.equal(painted.colors[:2], scene.colors[:2])
    assert torch.allclose(painted.colors[2:5], BLUE, atol=1e-5)
    for name in ("means", "quats", "scales", "opacities"):
        assert torch.equal(getattr(painted, name), getattr(scene, name))


def test_what_shines_through_is_painted():
    """Half-transparent, the ball behind is a part of every picture of the front."""
    scene, blue = behind_a_wall(1), BLUE.expand(SIZE, SIZE, 3)
    painted = paint(scene, CAMERA, blue, torch.ones(SIZE, SIZE, 1))
    assert torch.allclose(painted.colors[0], BLUE, atol=1e-5)


def test_what_stands_on_the_background_is_carved_away():
    left, right, behind_it, outside = (
        [0.0, -0.5, 0.0],
        [0.0, 0.5, 0.0],
        [-0.5, 0.5, 0.0],
        [0.0, 0.0, 5.0],
    )
    scene = balls(left, right, behind_it, outside)
    mask = torch.zeros(SIZE, SIZE, 1)
    mask[:, SIZE // 2 :] = 1
    faint = 0.15 * mask  # glass
    assert torch.equal(carve(scene, CAMERA, faint).opacities, carve(scene, CAMERA, mask).opacities)
    assert torch.equal(
        carve(scene, CAMERA, mask).opacities, scene.opacities * torch.tensor([0.0, 1, 1, 0])
    )
    image = 1 - mask * (1 - BLUE)  # a blue half
    both = back_project(scene, CAMERA, image, mask).select(slice(4))
    assert torch.equal(both.opacities, carve(scene, CAMERA, mask).opacities)
    assert torch.allclose(both.colors[1], BLUE, atol=1e-5)  # its rim on white took no white


def checkered(size: int) -> torch.Tensor:
    """[size, size, 3], fields of 5 pixels, black and white: finer than any ball."""
    places = torch.arange(size) // 5
    return ((places[:, None] + places) % 2).float()[..., None].expand(-1, -1, 3)


def test_every_pixel_of_a_solid_front_gets_a_gaussian_of_its_own():
    """They lie on the rendered surface; none where that is thin or off the mask."""
    scene, image = balls(*5 * [[0.0, 0.0, 0.0]], size=0.3), checkered(SIZE)
    mask = torch.zeros(SIZE, SIZE, 1)
    mask[:, SIZE // 2 :] = 1
    covered = cover(scene, CAMERA, image, mask, holes=False)
    layer = covered.select(slice(5, None))
    seen = render(scene, CAMERA)
    assert 20 < len(layer) <= (seen.alpha[0] * mask >= SOLID).sum()
    local = layer.means @ CAMERA.viewmats[0, :3, :3].T + CAMERA.viewmats[0, :3, 3]
    u, v, _ = (local @ CAMERA.Ks[0].T / local[:, 2:]).unbind(-1)
    column, row = u.floor().long(), v.floor().long()
    assert (column >= SIZE // 2).all()
    assert torch.allclose(torch.stack([u - column, v - row]), torch.tensor(0.5), atol=1e-3)
    assert torch.allclose(local[:, 2:], seen.depth[0, row, column], atol=1e-5)
    assert torch.equal(layer.colors, image[row, column])
    pixel = local[:, 2] / CAMERA.Ks[0, 0, 0]
    assert torch.allclose(layer.scales, COVER_SCALE * pixel[:, None].expand(-1, 3))
    assert torch.equal(covered.select(slice(5)).means, scene.means)


def test_a_cover_shows_what_paint_cannot():
    scene, image = balls(*5 * [[0.0, 0.0, 0.0]], size=0.3), checkered(SIZE)
    everywhere = torch.ones(SIZE, SIZE, 1)
    painted = paint(scene, CAMERA, image, everywhere)
    solid = render(scene, CAMERA).alpha[0, ..., 0] >= 0.9
    errors = [
        (render(x, CAMERA).rgb[0] - image)[solid].pow(2).mean()
        for x in (painted, cover(painted, CAMERA, image, everywhere, holes=False))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_a_hole_in_the_front_is_closed_at_the_depth_of_its_rim():
    scene, image = balls(*5 * [[0.0, 0.0, 0.0]], size=0.3), checkered(SIZE)
    seen = render(scene, CAMERA)
    solid = seen.alpha[0, ..., 0] >= SOLID
    mask = torch.zeros(SIZE, SIZE, 1)
    mask[SIZE // 4 : 3 * SIZE // 4, SIZE // 4 : 3 * SIZE // 4] = 1  # wider than the ball
    closed = back_project(scene, CAMERA, image, mask)
    after = render(closed, CAMERA)
    missing = mask[..., 0].bool() & (seen.alpha[0, ..., 0] <= HOLE)
    assert missing.any()
    assert (after.alpha[0, ..., 0][missing] > 0.7).all()
    near, far = seen.depth[0, ..., 0][solid].aminmax()
    depth = after.depth[0, ..., 0][missing]
    assert near - 1e-3 <= depth.min() and depth.max() <= far + 1e-3
    # without a mask nobody knows where the object is
    assert (render(back_project(scene, CAMERA, image), CAMERA).alpha[0, 0, 0] == 0).all()


def test_an_empty_scene_is_not_covered():
    scene = balls([0.0, 0.0, 0.0], opacity=0.0)
    covered = cover(scene, CAMERA, checkered(SIZE), torch.ones(SIZE, SIZE, 1))
    assert len(covered) == 1


def test_a_nan_is_named_before_anything_is_drawn():
    scene = random_scene()
    scene.means[3, 0] = torch.nan
    with pytest.raises(ValueError, match="means of the object hold NaN"):
        back_project(scene, CAMERA, torch.ones(SIZE, SIZE, 3), torch.ones(SIZE, SIZE, 1))


def test_the_front_comes_nearer_to_the_image_also_without_gradients():
    scene = balls(*(0.3 * randn(400, 3)).tolist(), size=0.05)
    ramp = torch.linspace(0, 1, SIZE).expand(SIZE, SIZE)
    # on white
    image = render(scene, CAMERA).alpha[0] * (torch.stack([ramp, 1 - ramp, ramp.T], -1) - 1) + 1
    with torch.no_grad():
        painted = back_project(scene, CAMERA, image)
    with torch.inference_mode():
        copies = Gaussians(*(part + 0 for part in scene.tensors()))
        again = back_project(copies, orbit_cameras([0.0], 0.0, SIZE), image + 0)
    assert torch.equal(again.colors, painted.colors)
    before, after = ((render(x, CAMERA).rgb[0] - image).pow(2).mean() for x in (scene, painted))
    assert after < 0.5 * before and not painted.colors.requires_grad


@pytest.mark.parametrize("views, side, channels", [(2, SIZE, 1), (1, 8, 1), (1, SIZE, 3)])
def test_other_shapes_are_refused(views, side, channels):
    cameras = orbit_cameras([90.0 * k for k in range(views)], 0.0, SIZE)
    with pytest.raises(ValueError, match="takes one camera, its image") as error:
        back_project(
            random_scene(), cameras, torch.zeros(side, side, 3), torch.zeros(side, side, channels)
        )
    one_sentence(error)
