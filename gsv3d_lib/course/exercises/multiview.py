"""Checkers of notebook 04: SV3D's orbit, an orbit begun elsewhere, the U-Net's input,
and views that do not belong to a ring.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...cameras import Cameras, orbit_cameras, ray_grid, sv3d_azimuths
from ...pretraining import rolled
from . import ask, checker, expect, expect_close, expect_not, expect_shape

_expect_not = partial(expect_not, rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------- exercise 1


def orbit_angles(num_frames: int, elevation_deg: float) -> Tensor:
    """The right answer from the library's parts: polar, azimuth [N, 2] in degrees."""
    azimuth = sv3d_azimuths(num_frames)
    return torch.stack([torch.full_like(azimuth, 90.0 - elevation_deg), azimuth], dim=-1)


@checker
def check_orbit(solution) -> None:
    """num_frames, elevation in degrees -> polar and azimuth [N, 2] in degrees, in
    SV3D's order.
    """
    for frames, elevation in ((4, 15.0), (16, 15.0), (21, -5.0)):
        truth = orbit_angles(frames, elevation)
        answer = ask(solution, frames, elevation)
        expect_shape(answer, (frames, 2), "polar and azimuth")
        answer = answer.detach().to(truth)
        mistakes = {
            "The columns are exchanged: polar comes first, azimuth second.": truth.flip(-1),
            "Those are radians; at every function's door stand degrees.": truth.deg2rad(),
        }
        _expect_not(answer, mistakes)
        _expect_polar(answer[:, 0], elevation)
        _expect_azimuths(answer[:, 1], truth[:, 1])


def _expect_polar(polar: Tensor, elevation: float) -> None:
    mistakes = {
        "That is the elevation. The polar angle begins straight above: 90 - elevation.": elevation,
        "The sign of the elevation is wrong: above the object it is below 90.": 90 + elevation,
    }
    _expect_not(polar, {hint: torch.full_like(polar, value) for hint, value in mistakes.items()})
    expect_close(
        polar,
        torch.full_like(polar, 90 - elevation),
        "polar should be 90 - elevation in every frame.",
    )


def _expect_azimuths(azimuth: Tensor, truth: Tensor) -> None:
    frames = len(truth)
    unwrapped = torch.linspace(0, 360, frames + 1)[1:]
    both_ends = torch.linspace(0, 360, frames)
    mistakes = {
        "The condition view is first; in SV3D it is the LAST frame: drop the 0, not the 360.": (
            torch.linspace(0, 360, frames + 1)[:-1]
        ),
        "The last azimuth is 360, whose sinusoids are not those of 0: take it modulo 360.": (
            unwrapped
        ),
        "N points from 0 to 360 hold one place twice: take N + 1 points, drop one.": both_ends,
        "N points from 0 to 360 have one place twice: take N + 1 points, drop the first.": both_ends
        % 360,
        "The orbit runs the other way: azimuths grow, 360 / N, 2 * 360 / N, ...": -truth % 360,
    }
    _expect_not(azimuth, mistakes)
    expect_close(
        azimuth,
        truth,
        "The azimuths should be 360 k / N for k = 1 ... N, modulo 360.",
        tolerance=1e-3,
    )


# ---------------------------------------------------------------- exercise 2


@checker
def check_roll(solution) -> None:
    """An orbit's dictionary and a number of frames -> the orbit begun elsewhere."""
    generator = torch.Generator().manual_seed(0)
    orbit = {
        "latents": torch.randn(8, 4, 2, 2, generator=generator),
        "azimuth": sv3d_azimuths(8),
        "elevation": torch.linspace(0, 20, 8),
        "image": torch.rand(4, 4, 3, generator=generator),
        "image_latent": torch.randn(4, 2, 2, generator=generator),
    }
    for frames in (1, 3):
        given = {name: value.clone() for name, value in orbit.items()}
        answer = ask(solution, given, frames)
        expect(isinstance(answer, dict), "Return a dictionary, with the orbit's names.")
        expect(set(answer) == set(orbit), f"The names should be {', '.join(orbit)}.")
        untouched = all(torch.equal(given[name], value) for name, value in orbit.items())
        expect(untouched, "You changed the orbit that was given; make a new one.")
        truth = rolled(orbit, frames)
        moved, azimuth = orbit["latents"].roll(-frames, 0), answer["azimuth"]
        expect_not(
            answer["latents"],
            {
                "The frames do not move.": orbit["latents"],
                "They move the other way: the last frames come first.": moved,
                "Without `dims`, torch.roll rolls all numbers in one row: roll along "
                "dimension 0.": orbit["latents"].roll(frames),
            },
        )
        stay = "The azimuths are as before; each frame takes its own along, none is counted anew."
        expect_not(azimuth, {stay: orbit["azimuth"]})
        for name in ("image", "image_latent"):
            hint = f"`{name}` is of the condition view and stays as it is."
            expect_close(answer[name], orbit[name], hint)
        for name in ("latents", "azimuth", "elevation"):
            expect_close(answer[name], truth[name], f"`{name}` should move by {frames} frames.")


# ---------------------------------------------------------------- find the bug


@checker
def check_input(solution) -> None:
    """noisy [N, 4, h, w], image latent [4, h, w], sigma -> the sample [N, 8, h, w]."""
    generator = torch.Generator().manual_seed(0)
    image = 5 * torch.randn(4, 2, 2, generator=generator)
    for sigma in (8.0, 0.1):
        noisy = (sigma**2 + 1) ** 0.5 * torch.randn(3, 4, 2, 2, generator=generator)
        answer = ask(solution, noisy, image, sigma)
        expect_shape(answer, (3, 8, 2, 2), "the sample")
        scaled, expected = noisy / (sigma**2 + 1) ** 0.5, image.expand(3, -1, -1, -1)
        expect_not(answer, {"The image comes last.": torch.cat([expected, scaled], 1)})
        expect_close(answer[:, :4], scaled, "The noisy latents are multiplied by c_in.")
        again = "The orbit's latents are scaled already: 0.18215 is not applied again."
        expect_not(answer[:, 4:], {again: 0.18215 * expected})
        faint = (answer[:, 4:].norm() / expected.norm()).item()
        expect(
            abs(faint - 1) < 0.01,
            f"At sigma {sigma:g} the picture's latent has {faint:.2f} times its strength. "
            "It holds no noise, so c_in has no business there.",
        )
        expect_close(answer[:, 4:], expected, "The picture's latent comes as it is.")


# ---------------------------------------------------------------- build

RINGS, WANTED = 20, 36  # rings of two strangers each, and how many have to be found


def painted_ball(cameras: Cameras, waves: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """A ball with a random smooth colouring: rgb [V, H, W, 3] and z-depth [V, H, W]."""
    origins, directions = ray_grid(cameras, cameras.height, cameras.width)
    middle = -(origins * directions).sum(-1)
    gap = 0.8**2 - (origins.square().sum(-1) - middle**2)
    points = origins + (middle - gap.clamp(min=0).sqrt())[..., None] * directions
    forward = cameras.viewmats[:, 2]
    z = torch.einsum("vhwi,vi->vhw", points, forward[:, :3]) + forward[:, 3, None, None]
    there = gap > 0
    rgb = 0.5 + 0.5 * (points @ waves + shift).sin()
    return torch.where(there[..., None], rgb, 1.0), torch.where(there, z, 0.0)


def ring_with_strangers(seed: int) -> tuple[Tensor, Tensor, Cameras, set[int]]:
    """rgb, depth, cameras of a ring of 16 views, and the two that do not belong."""
    generator = torch.Generator().manual_seed(seed)
    cameras = orbit_cameras(torch.arange(16) * 22.5, 15.0, 24)
    waves, shift = (
        # so fine that neighbours differ as much as strangers, pixel by pixel
        9 * torch.randn(2, 3, 3, generator=generator),
        torch.rand(2, 3, generator=generator),
    )
    rgb, depth = painted_ball(cameras, waves[0], 6 * shift[0])
    other, _ = painted_ball(cameras, waves[1], 6 * shift[1])
    first, step = (int(torch.randint(high, (), generator=generator)) for high in (16, 11))
    odd = [first, (first + 3 + step) % 16]
    rgb[odd] = other[odd]
    return rgb, depth, cameras, set(odd)


@checker
def check_strangers(solution) -> None:
    """rgb, depth, cameras of 16 views -> the numbers of two views."""
    found = 0
    for seed in range(RINGS):
        rgb, depth, cameras, odd = ring_with_strangers(seed)
        answer = ask(solution, rgb.clone(), depth.clone(), cameras)
        named = {int(k) for k in answer}
        expect(len(named) == 2, f"Name two different views; got {sorted(named)}.")
        expect(named <= set(range(16)), f"The views are 0 to 15; got {sorted(named)}.")
        found += len(named & odd)
    expect(
        found >= WANTED,
        f"You found {found} of {2 * RINGS} strangers, and {WANTED} are wanted: a stranger "
        "disagrees with both of its neighbours.",
    )
