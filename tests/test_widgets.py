"""Explorers without a browser: values move, pictures change, errors are shown."""

import io

import ipywidgets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from gsv3d_lib.course.widgets import explorer, orbit_explorer, orbit_frame, png, splat_viewer
from gsv3d_lib.gaussians import Gaussians


def picture_of(box) -> ipywidgets.Image:
    return next(child for child in box.children if isinstance(child, ipywidgets.Image))


def gray(level: float):
    return torch.full((4, 6, 3), level)


def scene(count: int = 50) -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    means = 0.3 * torch.randn(count, 3, generator=generator)
    quats = torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
    return Gaussians(
        means, quats, torch.full((count, 3), 0.05), torch.full((count,), 0.9), torch.rand(count, 3)
    )


def test_moving_a_slider_redraws():
    box = explorer(gray, level=(0.0, 1.0, 0.5))
    before = picture_of(box).value
    box.children[0].value = 1.0
    after = Image.open(io.BytesIO(picture_of(box).value))
    assert (
        before != picture_of(box).value
        and after.size == (6, 4)
        and after.getpixel((0, 0)) == (255, 255, 255)
    )


def test_controls_follow_their_specification():
    box = explorer(lambda n, kind: gray(0.5), play="n", n=(1, 16, 4), kind=["a", "b"])
    button, slider, choice = box.children[:3]
    assert (
        isinstance(button, ipywidgets.Play)
        and isinstance(slider, ipywidgets.IntSlider)
        and slider.value == 4
    )
    assert choice.options == ("a", "b")
    with pytest.raises(ValueError, match=r"n should be \(low, high, start\)"):
        explorer(gray, n=3)


def test_an_error_in_drawing_is_shown_and_goes_away():
    def draw(level: float):
        if level > 0.9:
            raise ValueError("too <bright>")
        return gray(level)

    box = explorer(draw, level=(0.0, 1.0, 0.5))
    before, message = picture_of(box).value, box.children[-1]
    box.children[0].value = 1.0
    assert "ValueError: too &lt;bright&gt;" in message.value and picture_of(box).value == before
    box.children[0].value = 0.2
    assert message.value == "" and picture_of(box).value != before


def test_pictures_may_be_figures_or_tensors_and_nothing_else():
    assert png(Figure(figsize=(1, 1)))[:4] == png(gray(0.2))[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"got \(3, 4, 6\)"):
        png(torch.zeros(3, 4, 6))
    with pytest.raises(ValueError, match="got int"):
        png(3)


def test_the_orbit_is_rendered_from_where_one_looks():
    gaussians = scene()
    frames = [orbit_frame(gaussians, azimuth, 10, size=32) for azimuth in (0, 360, 90)]
    assert frames[0].shape == (32, 32, 3)
    assert torch.allclose(frames[0], frames[1], atol=1e-4) and not torch.allclose(
        frames[0], frames[2], atol=1e-2
    )
    box = orbit_explorer(gaussians, size=32)
    before = picture_of(box).value
    box.children[1].value = 90
    assert picture_of(box).value != before


def test_the_splat_viewer_is_a_page_in_a_frame():
    page = splat_viewer(scene()).data
    assert (
        page.startswith("<div><iframe srcdoc=")
        and "&lt;canvas" in page
        and "http" not in page.split("srcdoc")[0]
    )
