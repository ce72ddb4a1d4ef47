"""A page of frames drawn beforehand: an explorer for readers without a kernel."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

DPI = 80
STOPS = 12  # values of one slider
MOST_FRAMES = 64  # beyond this the page moves one control at a time
PAGE = Path(__file__).parent / "web" / "frames.html"


def frames_page(draw: Callable, width: int, controls: dict) -> str:
    """The page of `widgets.explorer(draw, width, **controls)`, as HTML.

    All combinations are stored where they are few (`MOST_FRAMES`). Otherwise one
    control moves at a time, and the others go back to their start.
    """
    stops = {name: _stops(spec) for name, spec in controls.items()}
    start = [
        values.index(spec[2]) if isinstance(spec, tuple) else 0
        for values, spec in zip(stops.values(), controls.values())
    ]
    every = [range(len(values)) for values in stops.values()]
    grid = math.prod(map(len, every)) <= MOST_FRAMES
    alone = ((*start[:k], at, *start[k + 1 :]) for k, places in enumerate(every) for at in places)
    places = itertools.product(*every) if grid else dict.fromkeys(alone)
    frames = {}
    for place in places:
        chosen = {name: values[at] for (name, values), at in zip(stops.items(), place)}
        frames[",".join(map(str, place))] = _webp(draw(**chosen))
    said = [
        {"name": name.replace("_", " "), "stops": [_text(value) for value in values]}
        for name, values in stops.items()
    ]
    book = dict(controls=said, start=start, grid=grid, frames=frames, width=width)
    return PAGE.read_text(encoding="utf-8").replace("__BOOK__", json.dumps(book))


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


def _stops(spec: list | tuple) -> list:
    """A choice's values, or some of a slider's, its start among them."""
    if isinstance(spec, list):
        return spec
    low, high, start = spec
    whole = all(isinstance(number, int) for number in spec)
    count = min(STOPS, high - low + 1) if whole else STOPS
    values = [low + (high - low) * k / max(count - 1, 1) for k in range(count)]
    values = [round(value) for value in values] if whole else values
    nearest = min(range(count), key=lambda k: math.fabs(values[k] - start))
    values[nearest] = start
    return values


def _text(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _webp(image: Figure | Tensor) -> str:
    """A frame as a WebP picture in text."""
    from ..export.page import webp_address

    pixels = Image.open(io.BytesIO(png(image))).convert("RGB")
    return webp_address(np.asarray(pixels), quality=70)
