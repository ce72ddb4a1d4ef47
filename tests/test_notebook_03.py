"""Notebook 03: its derivations are the library's, and its checkers know right from
typically wrong.
"""

import math

import pytest
import torch
from notebook_world import accepts, definitions, rejects

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.course.exercises import splatting
from gsv3d_lib.course.figures import plot_ellipsoids, plot_rays
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rendering import plain as reference
from gsv3d_lib.rendering import render
from gsv3d_lib.rotations import rotation_matrices

SIZE = 32


@pytest.fixture(scope="module")
def notebook() -> dict:
    return definitions("03")


@pytest.fixture(scope="module")
def scene() -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    means, quats = uniform(60, 3) - 0.5, torch.randn(60, 4, generator=generator)
    return Gaussians(means, quats, 0.02 + 0.2 * uniform(60, 3), 0.9 * uniform(60), uniform(60, 3))


@pytest.fixture(scope="module")
def camera():
    return orbit_cameras([200.0], 10.0, SIZE)


@pytest.fixture(scope="module")
def splats(scene, camera):
    """Centres and covariances in the picture, by the library."""
    view = camera.viewmats[0], camera.Ks[0], SIZE, SIZE
    return reference.project(scene.means, scene.quats, scene.scales, *view)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- derivations


def test_rotation_and_covariance(notebook, scene):
    assert_close(notebook["rotation_matrix"](scene.quats), rotation_matrices(scene.quats))
    assert_close(notebook["covariance"](scene.quats, scene.scales), scene.covariances())


def test_axis_quaternion_turns_by_the_angle(notebook):
    turned = rotation_matrices(notebook["axis_quaternion"]((0, 0, 1), 90)) @ torch.tensor(
        [1.0, 0, 0]
    )
    assert_close(turned, torch.tensor([0.0, 1, 0]))


def test_projection(notebook, scene, camera, splats):
    ours = notebook["project_gaussians"](
        scene.means, scene.covariances(), camera.viewmats[0], camera.Ks[0]
    )
    assert_close(ours[0], splats[0])
    assert_close(ours[1], splats[1])


def test_points_are_projected_exactly(notebook, camera):
    """A tiny Gaussian, exactly projected, spreads like the linearised covariance."""
    torch.manual_seed(0)
    mean, sigma = torch.tensor([0.3, 0.2, 0.1]), torch.diag(torch.tensor([1e-4, 4e-4, 2e-4]))
    pixels = notebook["exact_pixels"](mean, sigma, camera.viewmats[0], camera.Ks[0], 20_000)
    _, linear = notebook["project_gaussians"](
        mean[None], sigma[None], camera.viewmats[0], camera.Ks[0], blur=0.0
    )
    assert (pixels.T.cov() - linear[0]).norm() < 0.05 * linear[0].norm()


def test_footprint_and_its_gradient(notebook, scene, splats):
    grid = torch.arange(SIZE).float()
    theirs = reference.splat_alphas(*splats, scene.opacities, grid, grid)
    assert_close(notebook["footprint"](*splats, scene.opacities, SIZE, SIZE), theirs)
    centre = torch.tensor([[14.0, 16.0]], requires_grad=True)
    shape = splats[1][:1].clone().requires_grad_()
    opacity = torch.tensor([0.8])
    alpha = reference.splat_alphas(centre, shape, opacity, grid[14:15], grid[15:16])[0, 0, 0]
    automatic = torch.autograd.grad(alpha, (centre, shape))
    pixel = torch.tensor([15.5, 14.5])
    by_hand = notebook["footprint_gradient"](
        alpha.detach(), centre[0].detach(), splats[1][0], pixel
    )
    assert automatic[0].abs().max() > 1e-4
    assert_close(by_hand[0], automatic[0][0])
    # the library reads one of the two equal entries off the diagonal
    assert_close(by_hand[1], (automatic[1][0] + automatic[1][0].T) / 2)


def test_gradient_of_shape(notebook, scene):
    """From a gradient for the covariance to scales and to a quaternion, unscaled."""
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight + weight.T
    for quat, scales in zip(2 * scene.quats[:5], scene.scales[:5]):
        q, s = quat.clone().requires_grad_(), scales.clone().requires_grad_()
        half_axes = rotation_matrices(q) * s
        automatic = torch.autograd.grad((half_axes @ half_axes.T * weight).sum(), (q, s))
        for ours, theirs in zip(notebook["shape_gradient"](weight, quat, scales), automatic):
            assert_close(ours, theirs, 1e-4)


def test_tiles_miss_no_splat(notebook, scene, splats):
    lists = notebook["tile_lists"](*splats, SIZE)
    alphas = notebook["footprint"](*splats, scene.opacities, SIZE, SIZE)
    for k, row in enumerate(lists):
        tile = alphas[16 * (k // 2) :, 16 * (k % 2) :][:16, :16]
        assert (tile > 0).sum() == (tile[..., row] > 0).sum()
    assert len(lists) == 4 and sum(len(row) for row in lists) < 4 * len(scene)


def test_densifying_prunes_clones_and_splits(notebook):
    torch.manual_seed(0)
    raw = {name: value.detach() for name, value in notebook["random_start"](10).items()}
    raw["opacity_logits"][:2] = -9.0  # transparent
    raw["log_scales"][5:] = math.log(0.2)  # large
    pull = torch.tensor([9.0, 9, 0, 8, 0, 0, 7, 0, 0, 0])  # the strongest are pruned
    new = notebook["densified"](raw, pull, 10)
    assert len(new["means"]) == 10 and all(value.requires_grad for value in new.values())
    assert_close(new["means"][8], raw["means"][3])  # small: a clone in the same place
    assert_close(new["log_scales"][8], raw["log_scales"][3])
    assert (new["means"][9] - raw["means"][6]).norm() > 0.01  # large: split
    for half in (4, 9):
        assert_close(new["log_scales"][half].exp(), raw["log_scales"][6].exp() / 1.6)


def test_compositing(notebook):
    alphas, colors = torch.linspace(0.1, 0.6, 24).reshape(2, 3, 4), torch.rand(4, 3)
    assert_close(notebook["transmittance"](alphas)[..., 0], torch.ones(2, 3))
    assert_close(notebook["blend"](alphas, colors), reference.composite(alphas, colors))


def test_gradient_of_compositing(notebook):
    alphas, colors = (
        torch.linspace(0.1, 0.6, 5, dtype=torch.float64),
        torch.rand(5, 3, dtype=torch.float64),
    )
    white = torch.ones(3, dtype=torch.float64)

    def pixel(alphas, colors):
        return reference.composite(alphas, colors) + (1 - alphas).prod() * white

    by_alpha, by_color = notebook["blend_gradient"](alphas, colors, white)
    alpha_jacobian, color_jacobian = torch.autograd.functional.jacobian(pixel, (alphas, colors))
    assert_close(by_alpha, alpha_jacobian.T)
    assert_close(by_color, color_jacobian[0, :, 0])


def test_renderer(notebook, scene, camera):
    ours = notebook["render_view"](scene, camera)
    sums, alpha = reference.rasterize(*scene.tensors(), camera.viewmats, camera.Ks, SIZE, SIZE)
    assert_close(ours, torch.cat([sums, alpha], -1)[0])
    assert_close(notebook["on_white"](ours), render(scene, camera).rgb[0])


def test_fit_starts_from_a_valid_scene(notebook):
    raw = notebook["random_start"](50)
    start = notebook["activated"](raw)
    assert all(value.requires_grad for value in raw.values())
    assert (start.means.norm(dim=-1) <= 0.8 + 1e-6).all() and (start.scales > 0).all()
    assert ((start.opacities > 0) & (start.opacities < 1)).all()


def test_only_the_splat_has_a_slope(notebook):
    front = orbit_cameras([270.0], 0.0, 16)
    assert_close(notebook["box_picture"](0.2, front), notebook["box_picture"](0.2001, front))
    x = torch.tensor(0.2, requires_grad=True)
    goal = notebook["splat_picture"](torch.tensor(0.0), front)
    (slope,) = torch.autograd.grad((notebook["splat_picture"](x, front) - goal).pow(2).mean(), x)
    assert slope > 0


def test_figures_that_move(notebook):
    """What the sliders call, at the ends of their ranges."""
    assert len(notebook["draw_gaussian"](0.005, 0.6, 0.2, -90, 90).axes) == 2
    assert len(notebook["draw_ray"](6.3).axes) == 2


def test_figures_of_splatting(scene, camera):
    assert len(plot_ellipsoids(scene.select(slice(3)), camera).axes) == 6
    assert (
        len(plot_ellipsoids(scene.select(slice(3)), camera, ["a", "b", "c"], footprints=False).axes)
        == 3
    )
    depths, alphas = torch.tensor([[3.0, 4.0], [4.0, 3.0]]), torch.full((2, 2), 0.5)
    figure = plot_rays(depths, alphas, torch.eye(3)[:2], ["one", "two"])
    near_red, near_green = (axis.images[0].get_array()[0, 0].tolist() for axis in figure.axes[1::2])
    assert near_red == pytest.approx([0.75, 0.5, 0.25]) and near_green == pytest.approx(
        [0.5, 0.75, 0.25]
    )


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize("name", ["splat_extent", "expected_depth", "depth_gradient", "thin_out"])
def test_stub_is_not_written_yet(notebook, capsys, name):
    assert not getattr(splatting, f"check_{name}")(notebook[name])
    assert "not written yet" in capsys.readouterr().out


def test_right_answers_are_accepted(notebook):
    assert accepts(splatting.check_splat_extent, splatting.extents)
    assert accepts(splatting.check_expected_depth, splatting.depth_of)

    def by_the_hint(alphas, depths):
        before = notebook["transmittance"](alphas)
        weights = alphas * before
        depth = (weights * depths).sum() / weights.sum()
        shares = weights * (depths - depth)
        behind = shares.sum() - shares.cumsum(0)
        return (before * (depths - depth) - behind / (1 - alphas)) / weights.sum()

    assert accepts(splatting.check_depth_gradient, by_the_hint)


def test_checker_of_extent_explains():
    def of(cutoff, size):
        """An extent sqrt(2 cutoff) * size, from what a learner makes of opacities and
        covariances.
        """
        return lambda covariances, opacities: (
            (2 * cutoff(opacities)).sqrt()[:, None] * size(covariances)
        )

    logarithm = lambda opacities: torch.log(255 * opacities).clamp(min=0)  # noqa: E731
    sigmas = lambda covariances: covariances.diagonal(dim1=-2, dim2=-1).sqrt()  # noqa: E731
    check = splatting.check_splat_extent
    assert accepts(check, of(logarithm, sigmas))
    assert rejects(check, of(logarithm, lambda c: sigmas(c) ** 2), "take the root")
    assert rejects(check, of(logarithm, lambda c: sigmas(c).flip(-1)), "exchanged")
    assert rejects(check, of(lambda o: 4.5 + 0 * o, sigmas), "3 standard deviations")
    assert rejects(check, of(lambda o: 3.33**2 / 2 + 0 * o, sigmas), "3.33 is rounded")
    assert rejects(check, of(lambda o: logarithm(o) / 2, sigmas), "forgot the 2")
    assert rejects(check, of(lambda o: math.log(255) + 0 * o, sigmas), "ignores the opacity")
    assert rejects(check, of(logarithm, lambda c: torch.linalg.eigvalsh(c).sqrt()), "eigenvalues")
    assert rejects(check, of(lambda o: torch.log(255 * o), sigmas), "negative logarithm")


def test_checker_of_depth_explains(notebook):
    before = notebook["transmittance"]

    def mean(weights, divisor):
        """sum weights z / divisor, from functions of the alphas; 0 where the divisor
        is.
        """

        def depth(alphas, depths):
            below = divisor(alphas).sum(-1)
            return torch.where(
                below > 0, (weights(alphas) * depths).sum(-1) / torch.where(below > 0, below, 1), 0
            )

        return depth

    right, plain = lambda a: a * before(a), lambda a: a  # noqa: E731
    late = lambda a: a * torch.cumprod(1 - a, -1)  # noqa: E731
    check = splatting.check_expected_depth
    assert accepts(check, mean(right, right))
    assert rejects(check, mean(right, plain), "divides by the sum of the weights")
    assert rejects(check, mean(plain, plain), "forgot the transmittance")
    assert rejects(check, mean(late, late), "off by one")
    backward = lambda a, z: mean(right, right)(a.flip(-1), z.flip(-1))  # noqa: E731
    assert rejects(check, backward, "from far to near")
    assert rejects(check, lambda a, z: (right(a) * z).sum(-1), "did not divide")
    assert rejects(check, lambda a, z: (right(a) * z).sum(-1) / right(a).sum(-1), "0 by 0")
    assert rejects(check, lambda a, z: (right(a) * z).sum() / right(a).sum(), "shape")

    def hidden(alphas, depths):
        """Right in value; the gradient is 0 / 0."""
        below = right(alphas).sum(-1)
        return torch.where(below > 0, (right(alphas) * depths).sum(-1) / below, 0)

    assert rejects(check, hidden, "Values right, gradient nan")
    assert rejects(check, lambda a, z: mean(right, right)(a.detach(), z), "no gradient")


def test_checker_of_depth_gradient_explains(notebook):
    def solution(center=True, divide=True, own=False, one_minus=True, behind=True, sign=1):
        """The right gradient with single steps left out."""

        def gradient(alphas, depths):
            before = notebook["transmittance"](alphas)
            weights = alphas * before
            total = weights.sum()
            features = depths - (weights * depths).sum() / total if center else depths
            shares = weights * features
            hidden = (shares.sum() - shares.cumsum(0) + own * shares) * behind
            result = before * features - hidden / (1 - alphas if one_minus else 1)
            return sign * result / (total if divide else 1)

        return gradient

    check = splatting.check_depth_gradient
    assert accepts(check, solution())
    assert rejects(check, solution(sign=-1), "sign is reversed")
    assert rejects(check, solution(center=False), "quotient rule has a second term")
    assert rejects(check, solution(center=False, divide=False), "sum w z alone")
    assert rejects(check, solution(divide=False), "ends with a division")
    assert rejects(check, solution(one_minus=False), "forgot 1 / ")
    assert rejects(check, solution(own=True), "begins at i \\+ 1")
    assert rejects(check, solution(behind=False), "own term")
    assert rejects(check, splatting.depth_gradient_of, "autograd's answer")

    def switched_on(alphas, depths):
        with torch.enable_grad():
            return splatting.depth_gradient_of(alphas, depths)

    def jacobian(alphas, depths):
        return torch.autograd.functional.jacobian(lambda a: splatting.depth_of(a, depths), alphas)

    assert rejects(check, switched_on, "autograd's answer")
    assert rejects(check, jacobian, "autograd's answer")


# ------------------------------------------------------ the bug and the build


def test_the_seeded_bug_is_told_and_found(notebook, capsys):
    check = splatting.check_near_to_far
    assert not check(notebook["near_to_far"])
    assert "is the nearest; yours begins with" in capsys.readouterr().out

    def depths(means, viewmat):
        return means @ viewmat[2, :3] + viewmat[2, 3]

    assert accepts(check, lambda means, viewmat: depths(means, viewmat).argsort())
    far_first = lambda means, viewmat: depths(means, viewmat).argsort(descending=True)  # noqa: E731
    assert rejects(check, far_first, "farthest comes first")
    assert rejects(check, lambda means, v: means[:, 2].argsort(), "is the nearest")
    assert rejects(check, lambda means, v: means.norm(dim=-1).argsort(), "nearest")
    assert rejects(check, depths, "is the nearest|returned")

    def by_distance(means, viewmat):
        return (means @ viewmat[:3, :3].T + viewmat[:3, 3]).norm(dim=-1).argsort()

    assert rejects(check, by_distance, "Sort by z-depth|is the nearest")


def test_thin_out_checker():
    check = splatting.check_thin_out

    def seen(scene, cameras):
        colors = scene.colors.clone().requires_grad_()
        whole = Gaussians(scene.means, scene.quats, scene.scales, scene.opacities, colors)
        render(whole, cameras).rgb.sum().backward()
        return scene.select(colors.grad.sum(-1).topk(int(0.4 * len(scene))).indices)

    def opaque(scene, cameras):
        return scene.select(scene.opacities.topk(1200).indices)

    def far_and_opaque(scene, cameras):
        return scene.select((scene.means.norm(dim=-1) * scene.opacities).topk(1200).indices)

    def too_few(scene, cameras):
        opaque = scene.select(
            ((scene.scales[:, 0] > 0.04) & (scene.opacities < 0.97)).nonzero()[:, 0]
        )
        return opaque.select(slice(900))

    assert accepts(check, seen)
    assert rejects(check, far_and_opaque, "outside of all pictures")
    assert rejects(check, too_few, "You may keep 40 %")
    assert rejects(check, opaque, "lie hidden inside")
    assert rejects(check, lambda scene, cameras: scene.select(slice(1200)), "reach 40")
    assert rejects(check, lambda scene, cameras: scene, "100 % are kept")
    assert rejects(check, lambda scene, cameras: scene.means, "Return Gaussians")
