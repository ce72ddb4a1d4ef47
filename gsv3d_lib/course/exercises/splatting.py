"""Checkers of notebook 03: how far a splat reaches, expected depth and its gradient,
the order of compositing, and a scene without what nobody sees.
"""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from torch import Tensor

from ...cameras import Cameras, orbit_cameras
from ...gaussians import Gaussians
from ...rendering import render
from ...rendering.plain import ALPHA_MIN, composite
from . import Wrong, ask, checker, expect, expect_close, expect_not, expect_shape

_expect_not = partial(expect_not, atol=1e-3)


# ---------------------------------------------------------------- exercise 1


def extents(covariances: Tensor, opacities: Tensor) -> Tensor:
    """What `rasterizer_kernels.project_one` computes for one splat, for all of them."""
    cutoff = torch.log(opacities / ALPHA_MIN).clamp(min=0)
    return (2 * cutoff[:, None] * covariances.diagonal(dim1=-2, dim2=-1)).sqrt()


@checker
def check_splat_extent(solution) -> None:
    """covariances [G, 2, 2] in pixels^2, opacities [G] -> half width and half height
    [G, 2] of the visible box.
    """
    upright, opaque, farthest = (
        torch.tensor([[[4.0, 0.0], [0.0, 9.0]]]),
        torch.ones(1),
        math.sqrt(2 * math.log(255)),
    )
    sigmas = torch.tensor([[2.0, 3.0]])
    truth = extents(upright, opaque)
    answer = ask(solution, upright, opaque)
    expect_shape(answer, (1, 2), "the half width and half height")
    mistakes = {
        "Width and height are exchanged: Sigma_xx, entry [0, 0], gives the width.": truth.flip(-1),
        (
            "You used the variances, in pixels^2, where standard deviations belong: take the root."
        ): farthest * sigmas**2,
        "You cut at 3 standard deviations; alpha is still above 1/255 there. Solve for its edge.": 3
        * sigmas,
        (
            "The exponent is -d^2 / (2 Sigma_xx): you forgot the 2, so "
            "alpha is above 1/255 at your edge."
        ): (math.sqrt(math.log(255)) * sigmas),
        "That is the whole width; asked for is the half, from the centre to the edge.": 2 * truth,
    }
    _expect_not(answer, mistakes)
    rounded = "3.33 is rounded and belongs to opacity 1: solve for the edge with the opacity."
    expect_not(answer, {rounded: 3.33 * sigmas}, rtol=1e-5, atol=1e-5)
    expect_close(
        answer, truth, "At the edge of the box, opacity * exp(-d^2 / (2 Sigma_xx)) should be 1/255."
    )

    faint = torch.tensor([0.1])
    answer = ask(solution, upright, faint)
    _expect_not(
        answer, {"Your extent ignores the opacity: a faint splat falls below 1/255 earlier.": truth}
    )
    expect_close(
        answer,
        extents(upright, faint),
        "Right for opacity 1, wrong for 0.1: the logarithm is of 255 * opacity.",
    )

    turned = torch.tensor([[[6.5, 2.5], [2.5, 6.5]]])  # the same ellipse, turned by 45 degrees
    answer = ask(solution, turned, opaque)
    own_axes = (
        "You used the eigenvalues, the ellipse's own axes; a box "
        "along the image's axes needs Sigma_xx and Sigma_yy."
    )
    _expect_not(answer, {own_axes: truth, f"{own_axes} ": truth.flip(-1)})
    expect_close(
        answer,
        extents(turned, opaque),
        "The box of a turned ellipse follows from Sigma_xx and Sigma_yy alone.",
    )

    answer = ask(solution, upright, torch.tensor([0.5 * ALPHA_MIN]))
    invisible = "A splat that is fainter than 1/255 everywhere has extent 0"
    expect(
        torch.isfinite(answer).all(),
        f"{invisible}; the root of a negative logarithm is not a number.",
    )
    expect_close(answer, torch.zeros(1, 2), f"{invisible}.")


# ---------------------------------------------------------------- exercise 2


def depth_of(alphas: Tensor, depths: Tensor) -> Tensor:
    """Expected depth through the library's `composite`: alphas and depths [..., K],
    near to far -> [...].
    """
    features = torch.stack([depths, torch.ones_like(depths)], -1)
    sums = composite(alphas[..., None, :], features)[..., 0, :]
    return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1].clamp(min=1e-12), 0)


@checker
def check_expected_depth(solution) -> None:
    """alphas [..., K] and depths [..., K], near to far -> expected depth [...]; 0 where
    nothing is.
    """
    alphas, depths = torch.tensor([0.4, 0.5, 0.8]), torch.tensor([2.0, 3.0, 5.0])
    answer = ask(solution, alphas, depths)
    expect_shape(answer, (), "the depth of one ray")
    weights, late = alphas * torch.tensor([1.0, 0.6, 0.3]), alphas * torch.tensor([0.6, 0.3, 0.06])
    off_by_one = (
        "The cumulative product is off by one: T_i holds the Gaussians in front of i, not i itself."
    )
    mistakes = {
        "You divided by the sum of alphas; expected depth divides by the sum of the weights.": (
            (weights * depths).sum() / alphas.sum()
        ),
        (
            "You forgot the transmittance: alpha says how opaque a "
            "Gaussian is, not how much of it is seen."
        ): ((alphas * depths).sum() / alphas.sum()),
        "You did not divide by the sum of the weights: half-covered pixels come out too near.": (
            weights * depths
        ).sum(),
        off_by_one: (late * depths).sum() / late.sum(),
        f"{off_by_one} And the division by the sum of the weights is missing.": (
            late * depths
        ).sum(),
        (
            "That is the plain mean of the depths; nearer and more opaque Gaussians count more."
        ): depths.mean(),
        "You composited from far to near; the first Gaussian is the nearest.": depth_of(
            alphas.flip(0), depths.flip(0)
        ),
    }
    _expect_not(answer, mistakes)
    expect_close(
        answer, depth_of(alphas, depths), "Expected depth is sum w z / sum w with w = alpha T."
    )

    alphas = torch.linspace(0.05, 0.9, 24).reshape(2, 3, 4)
    depths = 3 + torch.arange(24.0).reshape(2, 3, 4) / 10
    answer = ask(solution, alphas, depths)
    expect_shape(answer, (2, 3), "the depths of 2 x 3 rays")
    expect_close(
        answer,
        depth_of(alphas, depths),
        "Right for one ray, wrong for several: work along the last axis only.",
    )

    answer = ask(solution, torch.zeros(2, 3), torch.ones(2, 3))
    expect(
        torch.isfinite(answer).all(),
        "Where nothing covers the pixel you divided 0 by 0; the depth is 0 there.",
    )
    expect_close(answer, torch.zeros(2), "Where nothing covers the pixel the depth is 0.")

    alphas = torch.tensor([[0.0, 0.0], [0.5, 0.5]], requires_grad=True)
    answer = ask(solution, alphas, torch.tensor([2.0, 3.0]).expand(2, 2))
    gradient = torch.autograd.grad(answer.sum(), alphas)[0] if answer.requires_grad else None
    expect(gradient is not None, "Your depth has no gradient for the alphas.")
    expect(
        torch.isfinite(gradient).all(),
        "Values right, gradient nan: the division by 0 is hidden by torch.where but still "
        "differentiated. Replace the divisor before you divide.",
    )


# ---------------------------------------------------------------- exercise 3


def depth_gradient_of(alphas: Tensor, depths: Tensor) -> Tensor:
    """Autograd through `depth_of`: alphas [K] and depths [K] -> dD/dalpha [K]."""
    alphas = alphas.detach().clone().requires_grad_()
    return torch.autograd.grad(depth_of(alphas, depths), alphas)[0]


@checker
def check_depth_gradient(solution) -> None:
    """alphas [K], depths [K], near to far -> dD/dalpha [K] of the expected depth D."""
    alphas, depths = torch.tensor([[0.4, 0.5, 0.8], [2.0, 3.0, 5.0]], dtype=torch.float64)
    answer = _ask_without_autograd(solution, alphas, depths)
    expect_shape(answer, (3,), "the gradient")
    # autograd.functional takes what has no gradient for a constant
    _expect_not(answer, {NO_AUTOGRAD: torch.zeros(3)} | _gradient_mistakes(alphas, depths))
    expect_close(
        answer,
        depth_gradient_of(alphas, depths),
        "Autograd through the library's compositing disagrees.",
    )

    draw = partial(torch.rand, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alphas, depths = 0.05 + 0.8 * draw(), 3 + draw().sort().values
    answer = _ask_without_autograd(solution, alphas, depths)
    expect_close(answer, depth_gradient_of(alphas, depths), "Right for 3 Gaussians, wrong for 7.")
    answer = _ask_without_autograd(solution, alphas, torch.full_like(depths, 3.0))
    expect_close(
        answer,
        torch.zeros(7),
        "Where all depths are equal, no alpha can change the expected depth.",
    )


NO_AUTOGRAD = "That is autograd's answer: derive the gradient, and write it out."


def _ask_without_autograd(solution, *arguments) -> Tensor:
    try:
        # not no_grad: a learner's enable_grad would undo it
        with torch.inference_mode():
            return ask(solution, *arguments)
    except Wrong as error:
        if "does not require grad" not in str(error):
            raise
        raise Wrong(NO_AUTOGRAD) from error


def _gradient_mistakes(alphas: Tensor, depths: Tensor) -> dict[str, Tensor]:
    before = torch.cat([torch.ones_like(alphas[:1]), torch.cumprod(1 - alphas, 0)[:-1]])
    weights = alphas * before
    total, depth = weights.sum(), (weights * depths).sum() / weights.sum()

    def sum_gradient(features: Tensor) -> Tensor:  # of sum w f, equation (3.12)
        from_i_on = (weights * features).flip(0).cumsum(0).flip(0)
        return before * features - (from_i_on - weights * features) / (1 - alphas)

    direct, from_i_on = (
        before * (depths - depth),
        (weights * (depths - depth)).flip(0).cumsum(0).flip(0),
    )
    behind = from_i_on - weights * (depths - depth)
    return {
        (
            "The sign is reversed: a near Gaussian that grows more opaque "
            "pulls the depth down, towards itself."
        ): (-depth_gradient_of(alphas, depths)),
        (
            "You differentiated sum w z alone; D is a quotient, and sum w depends on alpha too."
        ): sum_gradient(depths),
        (
            "You treated sum w as a constant; it depends on alpha too, so "
            "the quotient rule has a second term."
        ): (sum_gradient(depths) / total),
        "The quotient rule ends with a division: by sum w.": sum_gradient(depths)
        - depth * sum_gradient(depths**0),
        (
            "You forgot 1 / (1 - alpha_i): the weights behind i hold that "
            "factor, and the derivative takes it away."
        ): ((direct - behind) / total),
        "The sum of what lies behind begins at i + 1; yours counts Gaussian i itself.": (
            (direct - from_i_on / (1 - alphas)) / total
        ),
        "You kept only Gaussian i's own term; it also dims everything behind it.": direct / total,
    }


# ------------------------------------------------------ the bug


@checker
def check_near_to_far(solution) -> None:
    """means [G, 3], viewmat [4, 4] -> indices [G] by z-depth, nearest first."""
    means = 0.5 * torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    for azimuth, elevation in ((0.0, 0.0), (40.0, 30.0), (200.0, -20.0)):
        viewmat = orbit_cameras([azimuth], [elevation], 32).viewmats[0]
        z = means @ viewmat[2, :3] + viewmat[2, 3]
        answer = ask(solution, means, viewmat)
        expect_shape(answer, (6,), "the order")
        expect(
            not torch.equal(answer, z.argsort(descending=True)),
            "The farthest comes first; compositing goes from front to back.",
        )
        expect(
            torch.equal(answer, z.argsort()),
            f"From azimuth {azimuth:.0f}, elevation {elevation:.0f} Gaussian {int(z.argmin())} is "
            f"the nearest; yours begins with {int(answer[0])}.",
        )
    camera = orbit_cameras([40.0], [30.0], 32)
    local = torch.tensor([[1.5, 0.0, 3.0], [0.0, 0.0, 3.2]])
    means = (local - camera.viewmats[0, :3, 3]) @ camera.viewmats[0, :3, :3]
    answer = ask(solution, means, camera.viewmats[0])
    expect(
        answer.tolist() == [0, 1],
        "Sort by z-depth: your order is that of the distance from the camera's centre.",
    )


# ------------------------------------------------------ build

SHARE, GOAL = 0.4, 40.0  # of the Gaussians, and dB


@cache
def crowded_scene() -> tuple[Gaussians, Cameras]:
    """3,000 Gaussians and 8 cameras: an opaque shell, opaque ones inside of it or
    outside of all pictures, and faint ones all around.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(3000, 3, generator=generator), dim=-1)
    radius = torch.cat([torch.full((1000,), 0.6), 0.35 * torch.rand(1000, generator=generator)])
    radius = torch.cat([radius, 0.65 + 0.3 * torch.rand(1000, generator=generator)])
    opacity = torch.tensor([0.95, 0.99, 0.005]).repeat_interleave(1000)
    scales = torch.tensor([0.06, 0.06, 0.03]).repeat_interleave(1000)
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(3000, 1)
    colors = torch.rand(3000, 3, generator=generator)
    order = torch.randperm(3000, generator=generator)
    means = direction * radius[:, None]
    means[1700:2000, 2] = -2.0  # far below what the cameras show
    scene = Gaussians(means, quats, scales[:, None].repeat(1, 3), opacity, colors)
    return scene.select(order), orbit_cameras(torch.arange(8) * 45.0, 20.0, 64)


@checker
def check_thin_out(solution) -> None:
    """scene, cameras -> at most SHARE of its Gaussians, nearly the same pictures."""
    scene, cameras = crowded_scene()
    answer = ask(solution, scene, cameras)
    expect(isinstance(answer, Gaussians), "Return Gaussians; `scene.select(indices)` makes them.")
    kept = len(answer) / len(scene)
    expect(kept <= SHARE, f"{100 * kept:.0f} % are kept; at most {100 * SHARE:.0f} % are allowed.")
    with torch.no_grad():
        error = (render(answer, cameras).rgb - render(scene, cameras).rgb).square().mean().item()
    reached = -10 * math.log10(max(error, 1e-12))
    hidden = (answer.means.norm(dim=-1) < 0.4).float().mean().item()
    unseen = (answer.means[:, 2] < -1.5).float().mean().item()
    told = f" {100 * hidden:.0f} % of yours lie hidden inside." if hidden > 0.2 else ""
    told += f" {100 * unseen:.0f} % are outside of all pictures." if unseen > 0.2 else ""
    told += f" You may keep {100 * SHARE:.0f} %." if kept < SHARE - 0.01 else ""
    expect(reached >= GOAL, f"{reached:.1f} dB; reach {GOAL:.0f}.{told}")
    print(f"{reached:.1f} dB with {100 * kept:.0f} %; the goal was {GOAL:.0f} dB.")
