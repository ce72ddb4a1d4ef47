"""The two seams, `rendering_with` and `attending_with`: they hold within a block, in
one thread, and then no more.
"""

import threading

import pytest
import torch
from tiny_world import randn

from gsv3d_lib.attention import attend, attending_with
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rendering import render, rendering_with

CAMERAS = orbit_cameras([0.0, 90.0], 0.0, 16)
TENSORS = [randn(1, 2, 3, 4, seed=seed) for seed in range(3)]


def attended() -> torch.Tensor:
    return attend(*TENSORS)


def rendered() -> torch.Tensor:
    means = torch.zeros(1, 3)
    one = Gaussians(means, torch.eye(4)[:1], torch.full((1, 3), 0.2), torch.full((1,), 0.9), means)
    return render(one, CAMERAS).rgb


def number(value: float):
    """An attention that says `value` everywhere."""
    return lambda q, k, v: torch.full_like(q, value)


def gray(value: float):
    """A rasteriser that covers every picture with one gray."""

    def rasterize(means, quats, scales, opacities, colors, viewmats, Ks, width, height):
        size = len(viewmats), height, width
        return torch.full((*size, 4), value), torch.ones(*size, 1)

    return rasterize


SEAMS = [(attending_with, number, attended), (rendering_with, gray, rendered)]


@pytest.mark.parametrize(("seam", "make", "result"), SEAMS)
def test_a_block_has_its_own_and_leaves_what_was_before(seam, make, result):
    before = result()
    with seam(make(0.25)):
        assert (result() == 0.25).all()
        with seam(make(0.75)):
            assert (result() == 0.75).all()
        assert (result() == 0.25).all()
    assert torch.equal(result(), before) and not (before == 0.25).all()


@pytest.mark.parametrize(("seam", "make", "result"), SEAMS)
def test_an_exception_leaves_what_was_before(seam, make, result):
    before = result()
    with pytest.raises(KeyError), seam(make(0.25)):
        try:
            with seam(make(0.75)):
                raise KeyError
        finally:
            assert (result() == 0.25).all()
    assert torch.equal(result(), before)


@pytest.mark.parametrize(("seam", "make", "result"), SEAMS)
def test_other_threads_do_not_see_it(seam, make, result):
    before, seen = result(), []

    def other():
        seen.append(result())
        with seam(make(0.75)):
            seen.append(result())

    with seam(make(0.25)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (result() == 0.25).all()
    assert torch.equal(seen[0], before) and (seen[1] == 0.75).all()
