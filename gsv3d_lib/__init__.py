"""GSV3D: one image in, 3D Gaussians out (arXiv 2503.06136), built to be read.

    from gsv3d_lib import GSV3DPipeline, render

    pipe = GSV3DPipeline.from_pretrained("data/checkpoints/tiny")
    gaussians = pipe("mug.png")

The names below are imported when first used: `import gsv3d_lib` itself takes no time and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cameras import Cameras
    from .config import preset
    from .gaussians import Gaussians
    from .pipeline import GSV3DPipeline
    from .rendering import render

__version__ = "0.1.0"
__all__ = ["Cameras", "GSV3DPipeline", "Gaussians", "preset", "render"]

_HOMES = {
    "Cameras": "cameras",
    "GSV3DPipeline": "pipeline",
    "Gaussians": "gaussians",
    "preset": "config",
    "render": "rendering",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"gsv3d_lib has no {name!r}; it offers {', '.join(__all__)}, and its modules.")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
