"""Interactive figures for the notebooks: controls around a function that draws.

They need a running kernel. The drawing function takes plain values and gives a picture,
so it can be looked at and tested without any widget. Where it fails, its message is
shown under the picture.
"""

import html
import io
from collections.abc import Callable

import ipywidgets
import numpy as np
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..cameras import orbit_cameras
from ..gaussians import Gaussians
from ..rendering import render

DPI = 80


def explorer(
    draw: Callable, play: str | None = None, width: int = 480, **controls
) -> ipywidgets.VBox:
    """A picture that is redrawn as controls move.

    draw: takes the controls' values by name and returns a matplotlib figure or an image
        tensor [H, W, 3] in [0, 1].
    controls: name=(low, high, start) for a slider, whole numbers where all three are
        int; name=[...] for a choice.
    play: the name of a whole-number control that a play button moves through its range,
        over and over.
    width: of the picture on screen, in pixels.
    """
    inputs = {name: _control(name, spec) for name, spec in controls.items()}
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width=f"{width}px"))
    picture.add_class("gsv3d-picture")
    message = ipywidgets.HTML()

    def redraw(_=None) -> None:
        try:
            picture.value = png(draw(**{name: control.value for name, control in inputs.items()}))
            message.value = ""
        except Exception as error:  # a callback's own go to a log that nobody opens
            said = html.escape(f"{type(error).__name__}: {error}")
            message.value = f"<pre style='color:#b00'>{said}</pre>"

    for control in inputs.values():
        control.observe(redraw, "value")
    redraw()
    buttons = [] if play is None else [_play_button(inputs[play])]
    box = ipywidgets.VBox([*buttons, *inputs.values(), picture, message])
    return box.add_class("gsv3d-explorer")


def orbit_explorer(gaussians: Gaussians, size: int = 128, width: int = 384) -> ipywidgets.VBox:
    """Turn the object: our rasteriser renders every frame while you drag.

    size: of the rendered picture; width: of it on screen. Both in pixels.
    """

    def draw(azimuth: int, elevation: int) -> Tensor:
        return orbit_frame(gaussians, azimuth, elevation, size)

    ranges = {"azimuth": (0, 355, 30), "elevation": (-30, 60, 15)}
    return explorer(draw, play="azimuth", width=width, **ranges)


@torch.no_grad()
def orbit_frame(gaussians: Gaussians, azimuth: float, elevation: float, size: int = 128) -> Tensor:
    """The object from one direction (degrees): [size, size, 3] in [0, 1], on white."""
    camera = orbit_cameras(torch.tensor([float(azimuth)]), torch.tensor([float(elevation)]), size)
    return render(gaussians, camera).rgb[0].clamp(0, 1)


def splat_viewer(gaussians: Gaussians | dict[str, Gaussians], height: int = 420) -> HTML:
    """The page of `export.save_viewer_page` inside the notebook; it lives without a
    kernel. Several objects by their names get the page's comparer.
    """
    from ..export.page import Item, page_of

    named = gaussians if isinstance(gaussians, dict) else {"object": gaussians}
    page = html.escape(page_of([Item(*pair) for pair in named.items()]))
    return HTML(
        f'<div><iframe srcdoc="{page}" width="100%" height="{height}" style="border:0"'
        ' title="3D viewer"></iframe></div>'
    )


def png(image: Figure | Tensor) -> bytes:
    """A matplotlib figure or an image [H, W, 3] in [0, 1] as PNG; else ValueError."""
    buffer = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(buffer, format="png", dpi=DPI)
    elif isinstance(image, Tensor) and image.ndim == 3 and image.shape[-1] == 3:
        pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    else:
        what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        wanted = "a matplotlib figure or an image tensor [H, W, 3]"
        raise ValueError(f"draw() should return {wanted}; got {what}.")
    return buffer.getvalue()


def _control(name: str, spec) -> ipywidgets.Widget:
    """(low, high, start) -> a slider; a list -> a choice."""
    label = dict(description=name.replace("_", " "), style={"description_width": "initial"})
    if isinstance(spec, list):
        return ipywidgets.Dropdown(options=spec, value=spec[0], **label)
    if not (isinstance(spec, tuple) and len(spec) == 3):
        raise ValueError(f"{name} should be (low, high, start) or a list of choices; got {spec!r}.")
    low, high, start = spec
    whole = all(isinstance(number, int) for number in spec)
    step = (5 if high - low > 90 else 1) if whole else (high - low) / 100
    slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    limits = dict(min=low, max=high, step=step, layout=ipywidgets.Layout(width="420px"))
    return slider(start, **limits, **label)


def _play_button(slider: ipywidgets.IntSlider) -> ipywidgets.Play:
    """Runs through the slider's range, ten steps a second.

    The browser asks for a frame only when the last one came.
    """
    limits = dict(value=slider.value, min=slider.min, max=slider.max, step=slider.step)
    button = ipywidgets.Play(interval=100, repeat=True, **limits)
    ipywidgets.jslink((button, "value"), (slider, "value"))
    return button
