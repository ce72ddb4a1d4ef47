"""One HTML file that shows objects in any browser with WebGL 2, alone or side by side.

It loads nothing, so it works offline, from file:// and inside a notebook's frame. The
page itself is in `web`; here its numbers are packed.
"""

import base64
import gzip
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..cameras import DISTANCE, FOV_DEG
from ..gaussians import Gaussians
from ..system.errors import UserError
from ..system.paths import atomic_path


@dataclass
class Item:
    """One object of a page.

    image [S, S, 3] in [0, 1]: the condition image, seen from azimuth 0 at `elevation`
    degrees.  views: uint8 [K, S, S, 3], pictures at azimuths 360 k / K; they stand in
    for Gaussians that are not there, or not yet.  caption: a line of text.
    """

    name: str
    gaussians: Gaussians | None = None
    image: Tensor | None = None
    views: np.ndarray | None = None
    elevation: float = 15.0
    caption: str = ""


def save_viewer_page(
    gaussians: Gaussians,
    html_path: str | Path,
    title: str = "GSV3D",
    azimuth: float = 0.0,
    elevation: float = 15.0,
    image: Tensor | None = None,
) -> None:
    """One object to turn, by mouse, finger or keys.

    azimuth, elevation: of the first view, degrees; page.html#azimuth=90 opens another.
    image: its condition image [S, S, 3], for the source view.
    """
    save_page([Item(title, gaussians, image, elevation=elevation)], html_path, title, azimuth)


def save_page(
    items: Sequence[Item], html_path: str | Path, title: str = "GSV3D", azimuth: float = 0.0
) -> None:
    """Many objects: cards to choose from, and two side by side under one camera.

    26 bytes per Gaussian plus 25 kB; Gaussians that are never drawn are left out.
    """
    page = page_of(items, title, azimuth)
    with atomic_path(html_path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a file's name need not be text


def page_of(items: Sequence[Item], title: str = "GSV3D", azimuth: float = 0.0) -> str:
    """The page of `save_page` as text."""
    if not items:
        raise UserError("A page needs at least one object to show.")
    described, scripts, reach = [], [], 1.0
    for number, item in enumerate(items):
        shown = {"name": item.name, "elevation": item.elevation, "caption": item.caption}
        if item.image is not None:
            picture = (item.image.detach().cpu().clamp(0, 1) * 255).round().byte().numpy()
            shown["input"] = webp_address(picture)
        if item.views is not None:
            shown["views"] = {
                "count": len(item.views),
                "source": webp_address(np.concatenate(list(item.views), axis=1)),
            }
        if item.gaussians is not None:
            drawn = item.gaussians.check("the Gaussians to save").prune()
            reach = max(reach, _radius(drawn))
            packed, shown["splats"] = pack(drawn)
            shown["splats"]["id"] = f"splats-{number}"
            text = base64.b64encode(packed).decode()
            scripts.append(f'<script id="splats-{number}" type="text/plain">{text}</script>\n')
        described.append(shown)
    view = {"azimuth": azimuth, "elevation": items[0].elevation, "fov": FOV_DEG}
    view |= {"distance": DISTANCE * reach, "reach": reach}
    values = {
        "TITLE": html.escape(title),
        "ITEMS": json.dumps(described).replace("<", "\\u003c"),
        "SPLATS": "".join(scripts),
        "VIEW": json.dumps(view),
        "STYLE": _asset("page.css"),
        "RENDERER": _asset("renderer.js"),
        "PAGE": _asset("page.js"),
    }
    return re.sub(r"__([A-Z]+)__", lambda match: values[match[1]], _asset("page.html"))


def pack(gaussians: Gaussians) -> tuple[bytes, dict]:
    """Gaussians for the page: gzip of 23 planes of bytes, and the numbers to read them.

    Means as 24 bits in their bounding box, scales as float16, RGBA as bytes, and a
    component q of the unit quaternion (w, x, y, z) as the byte 128 q + 128. Planes,
    because equal places of numbers compress better together.
    """
    tensors = (t.detach().cpu().double().numpy() for t in gaussians.tensors())
    means, quats, scales, opacities, colors = tensors
    low = means.min(axis=0, initial=np.inf) if len(means) else np.zeros(3)
    span = means.max(axis=0) - low if len(means) else np.zeros(3)
    step = np.maximum(span, 1e-30) / (2**24 - 1)
    codes = np.round((means - low) / step).astype("<u4")
    unit = quats / np.maximum(np.linalg.norm(quats, axis=-1, keepdims=True), 1e-12)
    planes = [
        codes[..., None].view(np.uint8)[..., :3].reshape(-1, 9),
        np.minimum(scales, 65504).astype("<f2").view(np.uint8).reshape(-1, 6),
        np.round(255 * np.column_stack([colors, opacities]).clip(0, 1)).astype(np.uint8),
        np.round(128 * unit + 128).clip(0, 255).astype(np.uint8),
    ]
    data = np.concatenate(planes, axis=1).T.tobytes()
    numbers = {"count": len(means), "low": low.tolist(), "step": step.tolist()}
    return gzip.compress(data, 9, mtime=0), numbers


def _radius(gaussians: Gaussians) -> float:
    """Around the origin, of all but the outermost few; at most 1 for our objects."""
    distances = gaussians.means.detach().float().norm(dim=-1).cpu().numpy()
    return float(np.quantile(distances, 0.98)) if len(distances) else 0.0


def webp_address(pixels: np.ndarray, quality: int = 85) -> str:
    """uint8 [H, W, 3] -> an address that holds the picture."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("web", name).read_text(encoding="utf-8")
