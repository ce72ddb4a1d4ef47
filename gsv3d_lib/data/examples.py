"""Training examples: a condition view, N views around it, and views to render.

Everything is expressed relative to the condition view. It stands at azimuth 0 and is
the last of the N (SV3D's order). So the world of the Gaussians is turned such that the
input image was taken from azimuth 0.
"""

import hashlib
import json
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..cameras import Cameras, orbit_cameras
from ..system.errors import UserError
from ..system.files import Field, Table
from ..system.paths import atomic_path, remove_leftovers
from ..vae import encode
from .dataset import FRONT, RING, Scene, ViewTensors, read_cache

# What the file of `load_orbits` holds, for M variants.
LATENTS: Table = {
    "latents": Field(("M", RING, 4, "h", "w"), "f4"),
    "fingerprint": Field((32,), "u1"),
}
PALETTES = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2), (0, 2, 1), (2, 1, 0))


class Example(TypedDict, total=False):
    """One training example; a batch has the same names and one more axis in front.

    The condition view is the last of the N views and stands at azimuth 0. Q target
    views are rendered and compared; colours are in [0, 1] on white.
    """

    # an orbit (`Orbits.orbit`)
    latents: Tensor  # [N, 4, h, w], scaled by 0.18215
    image: Tensor  # [S, S, 3], the condition view
    image_latent: Tensor  # [4, h, w], its latent, NOT scaled
    azimuth: Tensor  # [N] degrees
    elevation: Tensor  # [N] degrees
    features: Tensor  # [T, D], DINO's of the condition view, where shards hold them
    # the random numbers of diffusion (`diffusion.diffusion_draws`)
    noise: Tensor  # [N, 4, h, w]
    sigma: Tensor  # []
    keep: Tensor  # [], 0 where the condition is dropped
    seed: Tensor  # [], of the latents that the U-Net makes; 0 where they are the true ones
    # what is rendered (`Orbits.targets`)
    target_rgb: Tensor  # [Q, S, S, 3]
    target_depth: Tensor  # [Q, S, S, 1], z-depth, 0 = nothing
    target_alpha: Tensor  # [Q, S, S, 1]
    target_azimuth: Tensor  # [Q] degrees
    target_elevation: Tensor  # [Q] degrees
    # the truth at the decoder's own pixels (`losses.pixel_loss`)
    own_rgb: Tensor  # [N, H, W, 3]
    own_depth: Tensor  # [N, H, W, 1]
    own_alpha: Tensor  # [N, H, W, 1]


def draw(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    """Integers in [0, high)."""
    return torch.randint(high, shape, generator=generator)


# ---------------------------------------------------------------- which examples


@dataclass(frozen=True)
class Variant:
    """One object as it is, or mirrored, or recoloured: cheap extra objects."""

    index: int
    mirror: bool = False
    palette: tuple[int, int, int] = PALETTES[0]


def make_variants(objects: int, copies: int = 1, seed: int = 0) -> list[Variant]:
    """The objects themselves and `copies - 1` altered versions of each.

    All versions are recoloured, and every second one is mirrored.
    """
    generator = torch.Generator().manual_seed(seed)
    variants = [Variant(i) for i in range(objects)]
    for copy in range(1, copies):
        palettes = draw(generator, len(PALETTES), objects).tolist()
        variants += [Variant(i, copy % 2 == 1, PALETTES[p]) for i, p in enumerate(palettes)]
    return variants


class ShuffledOrder:
    """Every item once per epoch, in an order that seed and epoch alone decide.

    groups: the items of each file they are read from. The files are shuffled, and the
        items of `window` neighbouring files among themselves: far-apart examples share
        a batch, while only `window` files are read at random at a time.
    """

    def __init__(self, groups: list[list[int]], seed: int = 0, window: int = 8):
        self.groups = groups
        self.seed = seed
        self.window = window
        self.epoch = lru_cache(1)(self._epoch)

    def item(self, place: int) -> int:
        """The item at a place of the training, counted through all steps and epochs."""
        epoch, rest = divmod(place, sum(map(len, self.groups)))
        return self.epoch(epoch)[rest]

    def _epoch(self, epoch: int) -> list[int]:
        # far apart, so that no epoch of one seed is an epoch of the next seed
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        files = _shuffled(self.groups, generator)
        order: list[int] = []
        for first in range(0, len(files), self.window):
            pool = [item for items in files[first : first + self.window] for item in items]
            order += _shuffled(pool, generator)
        return order


def _shuffled(items: list, generator: torch.Generator) -> list:
    return [items[k] for k in torch.randperm(len(items), generator=generator).tolist()]


# ---------------------------------------------------------------- what they hold


class Orbits:
    """Variants of the objects in `views`, with the latents of their rings.

    latents: of the VAE, unscaled [M, 16, 4, h, w].
    order: of the items in a training; without one, they are drawn at random.
    features: DINO's of every ring view [M, 16, T, D]; if given, every orbit has those
        of its condition view.
    encoder: `vae_fingerprint` of what made the latents, where that is known.
    """

    def __init__(
        self,
        views: ViewTensors,
        variants: list[Variant],
        latents: Tensor,
        latent_scale: float,
        order: ShuffledOrder | None = None,
        features: Tensor | None = None,
        encoder: str = "",
    ):
        if latents.shape[:3] != (len(variants), RING, 4):
            raise ValueError(
                f"latents are [{len(variants)}, {RING}, 4, h, w]; got {tuple(latents.shape)}."
            )
        self.views = views
        self.variants = variants
        self.latents = latents
        self.latent_scale = latent_scale
        self.order = order
        self.features = features
        self.encoder = encoder
        self._last: tuple[int, Scene] | None = None  # one example asks for its scene several times

    def __len__(self) -> int:
        return len(self.variants)

    def fingerprint(self) -> str:
        """Changes with the objects, their variants, order or what encoded them."""
        made_by = self.encoder or digest({"latents": self.latents[:, ::8]})
        variants = [astuple(v) for v in self.variants]
        parts = [self.views.fingerprint(), variants, self.order is None, made_by]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def item(self, generator: torch.Generator, place: int) -> int:
        """The item at a place of a training, see `training.draw_batch`."""
        # drawn in either case: what follows has the same random numbers with an order
        drawn = int(draw(generator, len(self)))
        return drawn if self.order is None else self.order.item(place)

    def scene(self, item: int) -> Scene:
        """The views of variant `item`."""
        if self._last is None or self._last[0] != item:
            self._last = item, self.views.scene(*astuple(self.variants[item]))
        return self._last[1]

    def orbit(self, item: int, start: int, num_frames: int) -> Example:
        """The orbit of N frames whose condition view is ring view `start`."""
        frames, scene = ring_frames(start, num_frames), self.scene(item)
        orbit: Example = {
            "latents": self.latent_scale * self.latents[item][frames],
            "image": scene.rgb[start],
            "image_latent": self.latents[item][start],
            "azimuth": relative_azimuths(scene, start, frames),
            "elevation": scene.elevations[frames],
        }
        if self.features is not None:
            orbit["features"] = self.features[item][start]
        return orbit

    def targets(self, item: int, start: int, chosen: Tensor) -> Example:
        """Views `chosen` [Q], ring or free, as the truth of what is rendered."""
        scene = self.scene(item)
        return {
            "target_rgb": scene.rgb[chosen],
            "target_depth": scene.depth[chosen],
            "target_alpha": scene.alpha[chosen],
            "target_azimuth": relative_azimuths(scene, start, chosen),
            "target_elevation": scene.elevations[chosen],
        }


def relative_azimuths(scene: Scene, start: int, chosen: Tensor) -> Tensor:
    """Azimuths [Q] in degrees of views `chosen`, where view `start` stands at 0."""
    return (scene.azimuths[chosen] - scene.azimuths[start]) % 360


def relative_cameras(scene: Scene, start: int, chosen: Tensor) -> Cameras:
    """Cameras of views `chosen` in the result's world: view `start` has azimuth 0."""
    azimuths = relative_azimuths(scene, start, chosen)
    return orbit_cameras(azimuths, scene.elevations[chosen], scene.rgb.shape[1])


def views_from_front(*angles: int) -> Tensor:
    """Indices of the ring views at these degrees from the front view."""
    return torch.tensor([(FRONT + angle * RING // 360) % RING for angle in angles])


def ring_frames(start: int, num_frames: int) -> Tensor:
    """Ring indices [N] of an orbit in SV3D's order: evenly spaced, `start` last."""
    if RING % num_frames:
        raise UserError(
            f"An orbit on a ring of {RING} views has 1, 2, 4, 8 or 16 frames, not {num_frames}."
        )
    return (start + torch.arange(1, num_frames + 1) * (RING // num_frames)) % RING


# ---------------------------------------------------------------- latents in a file


@torch.no_grad()
def encode_rings(views: ViewTensors, variants: list[Variant], vae, progress: bool = True) -> Tensor:
    """Unscaled latents of every variant's ring [M, 16, 4, h, w]."""
    rings = []
    for variant in tqdm(variants, desc="encoding", disable=not progress, mininterval=5):
        rgb = views.scene(*astuple(variant)).rgb[:RING]
        rings.append(encode(vae, rgb.to(vae.device)).cpu().contiguous())
    return torch.stack(rings)


def load_orbits(
    views: ViewTensors,
    vae,
    copies: int = 1,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Orbits:
    """`Orbits` of all objects.

    cache: a file that keeps the latents; they are made again when it does not fit.
    """
    variants = make_variants(len(views), copies, seed)
    fingerprint = latent_fingerprint(views, variants, vae)
    stored = {} if cache is None else read_cache(cache, LATENTS, {"M": len(variants)})
    if stored and torch.equal(stored["fingerprint"], fingerprint):
        latents = stored["latents"]
    else:
        latents = encode_rings(views, variants, vae, progress)
        if cache is not None:
            remove_leftovers(Path(cache).parent, Path(cache).name)
            with atomic_path(cache) as path:
                save_file({"latents": latents, "fingerprint": fingerprint}, path)
    return Orbits(views, variants, latents, vae.config.scaling_factor, encoder=vae_fingerprint(vae))


def latent_fingerprint(views: ViewTensors, variants: list[Variant], vae) -> Tensor:
    """32 bytes that change with the objects, their variants or what encodes them."""
    size, ring = views.rgb.shape[-2], views.rgb[:, :RING]
    parts = [size, [astuple(v) for v in variants], digest({"rgb": ring}), vae_fingerprint(vae)]
    return torch.tensor(list(hashlib.sha256(json.dumps(parts).encode()).digest())).to(torch.uint8)


def vae_fingerprint(vae) -> str:
    """SHA-256 of what makes latents.

    That is the encoder and the layer behind it, which `vae.calibrate` rescales.
    """
    weights = {}
    for name in ("encoder", "quant_conv"):
        layer = getattr(vae, name).state_dict()
        weights |= {f"{name}.{key}": tensor for key, tensor in layer.items()}
    return digest(weights)


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
