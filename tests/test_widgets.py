"""Explorers without a browser: values move, pictures change, errors are shown."""

import base64
import io
import json
import re

import ipywidgets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from gsv3d_lib.course.frames import frames_page, png
from gsv3d_lib.course.widgets import explorer, splat_viewer
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
    box = explorer(lambda n, kind: gray(0.5), n=(1, 16, 4), kind=["a", "b"])
    slider, choice = box.children[:2]
    assert isinstance(slider, ipywidgets.IntSlider) and slider.value == 4
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


def book_of(draw, **controls) -> dict:
    page = frames_page(draw, 100, controls)
    return json.loads(re.search(r"const book = (.*);\n", page).group(1))


def test_frames_hold_every_combination_where_they_are_few():
    asked = []
    book = book_of(
        lambda n, kind: asked.append((n, kind)) or gray(n / 9), n=(0, 9, 4), kind=["a", "b"]
    )
    assert book["grid"] and len(book["frames"]) == 20 == len(set(asked))
    assert book["start"] == [4, 0] and book["controls"][1]["stops"] == ["a", "b"]
    data = base64.b64decode(book["frames"]["9,1"].split(",")[1])
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 255, 255)


def test_frames_move_one_control_at_a_time_where_they_are_many():
    lengths = dict(a=(0.0, 1.0, 0.33), b=(0, 360, 45), c=(0, 3, 1))
    book = book_of(lambda a, b, c: gray(a), **lengths)
    start = book["start"]
    assert not book["grid"] and len(book["frames"]) == 1 + 11 + 11 + 3
    said = [control["stops"][at] for control, at in zip(book["controls"], start)]
    assert said == ["0.33", "45", "1"]
    for key in book["frames"]:
        moved = sum(int(at) != home for at, home in zip(key.split(","), start))
        assert moved <= 1


def test_without_a_kernel_the_page_of_frames_stays():
    bundle = explorer(gray, level=(0.0, 1.0, 0.5))._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "srcdoc" in bundle["text/html"] and "data:image/webp" in bundle["text/html"]


def test_the_splat_viewer_is_a_page_in_a_frame():
    page = splat_viewer(scene()).data
    assert (
        page.startswith("<div><iframe srcdoc=")
        and "&lt;canvas" in page
        and "http" not in page.split("srcdoc")[0]
    )
