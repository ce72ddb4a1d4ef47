"""Interactive figures for the notebooks: controls around a function that draws.

The drawing function takes plain values and gives a picture, so it can be looked at and
tested without any widget. With a kernel every value can be reached. A stored notebook
and the website keep a page of frames that were drawn beforehand.
"""

import html
import io
import warnings
from collections.abc import Callable

import ipywidgets
from IPython.display import HTML
from PIL import Image

from ..gaussians import Gaussians
from .frames import frames_page, png

ROW = 34  # pixels of height of one control in the page of frames


class Explorer(ipywidgets.VBox):
    """Live controls where a kernel runs; where none does, a page of frames."""

    page: Callable[[], str]
    height: int  # of the page, in pixels

    def _repr_mimebundle_(self, **kwargs) -> dict:
        bundle = super()._repr_mimebundle_(**kwargs)
        try:
            page = self.page()
        except Exception as error:  # the live explorer goes on, and says it at that value
            warnings.warn(f"No frames are stored: {type(error).__name__}: {error}", stacklevel=2)
            return bundle
        title = "Explorer with frames drawn beforehand"
        return bundle | {"text/html": framed(page, self.height, title)}


def explorer(draw: Callable, /, width: int = 480, **controls) -> Explorer:
    """A picture that is redrawn as controls move.

    draw: takes the controls' values by name and returns a matplotlib figure or an image
        tensor [H, W, 3] in [0, 1].
    controls: name=(low, high, start) for a slider, whole numbers where all three are
        int; name=[...] for a choice.
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
    box = Explorer([*inputs.values(), picture, message])
    box.page = lambda: frames_page(draw, width, controls)
    wide, high = Image.open(io.BytesIO(picture.value)).size if picture.value else (1, 1)
    box.height = width * high // wide + ROW * (len(controls) + 2)
    return box.add_class("gsv3d-explorer")


def splat_viewer(gaussians: Gaussians | dict[str, Gaussians], height: int = 420) -> HTML:
    """The page of `export.save_viewer_page` inside the notebook; it lives without a
    kernel. Several objects by their names get the page's comparer.
    """
    from ..export.page import Item, page_of

    named = gaussians if isinstance(gaussians, dict) else {"object": gaussians}
    page = page_of([Item(*pair) for pair in named.items()])
    return HTML(framed(page, height, "3D viewer"))


def framed(page: str, height: int, title: str) -> str:
    """A page of its own inside another, as HTML."""
    return (
        f'<div><iframe srcdoc="{html.escape(page)}" width="100%" height="{height}"'
        f' style="border:0" title="{title}"></iframe></div>'
    )


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
