"""Orbits for training: a condition view, N views around it with their latents, and target views to render.

Everything is expressed relative to the condition view: it stands at azimuth 0 and is the last of the N (SV3D's order), so
the world of the Gaussians is turned such that the input image was taken from azimuth 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .cameras import Cameras, orbit_cameras
from .dataset import RING, Scene, ViewTensors, read_cache
from .paths import atomic_path
from .vae import encode

PALETTES = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2), (0, 2, 1), (2, 1, 0))


@dataclass(frozen=True)
class Variant:
    """One object as it is, mirrored, or with permuted colour channels: cheap extra objects."""

    index: int
    mirror: bool = False
    palette: tuple[int, int, int] = PALETTES[0]


def make_variants(objects: int, copies: int = 1, seed: int = 0) -> list[Variant]:
    """The `objects` themselves and `copies - 1` altered versions of each: every second one mirrored, all recoloured."""
    generator = torch.Generator().manual_seed(seed)
    variants = [Variant(i) for i in range(objects)]
    for copy in range(1, copies):
        palettes = torch.randint(len(PALETTES), (objects,), generator=generator).tolist()
        variants += [Variant(i, mirror=copy % 2 == 1, palette=PALETTES[p]) for i, p in enumerate(palettes)]
    return variants


class Orbits:
    """Variants of the objects in `views`, with the unscaled VAE latents of their rings [M, 16, 4, h, w]."""

    def __init__(self, views: ViewTensors, variants: list[Variant], latents: Tensor, latent_scale: float):
        if latents.shape[:3] != (len(variants), RING, 4):
            raise ValueError(f"latents are [{len(variants)}, {RING}, 4, h, w]; got {tuple(latents.shape)}.")
        self.views, self.variants, self.latents, self.latent_scale = views, variants, latents, latent_scale
        self._last: tuple[int, Scene] | None = None  # one example asks for its scene several times

    def __len__(self) -> int:
        return len(self.variants)

    def scene(self, item: int) -> Scene:
        """The views of variant `item`."""
        if self._last is None or self._last[0] != item:
            variant = self.variants[item]
            self._last = item, self.views.scene(variant.index, variant.mirror, variant.palette)
        return self._last[1]

    def orbit(self, item: int, start: int, num_frames: int) -> dict[str, Tensor]:
        """The orbit of N frames whose condition view is ring view `start`.

        latents [N, 4, h, w] scaled; image [S, S, 3] and image_latent [4, h, w] unscaled, of the condition view;
        azimuth, elevation [N] degrees relative to it.
        """
        frames, scene = ring_frames(start, num_frames), self.scene(item)
        return {
            "latents": self.latent_scale * self.latents[item][frames],
            "image": scene.rgb[start],
            "image_latent": self.latents[item][start],
            "azimuth": relative_azimuths(scene, start, frames),
            "elevation": scene.elevations[frames],
        }

    def targets(self, item: int, start: int, chosen: Tensor) -> dict[str, Tensor]:
        """Views `chosen` [Q] (ring or free) with their true rgb, depth, alpha and angles relative to the condition view."""
        scene = self.scene(item)
        return {
            "target_rgb": scene.rgb[chosen],
            "target_depth": scene.depth[chosen],
            "target_alpha": scene.alpha[chosen],
            "target_azimuth": relative_azimuths(scene, start, chosen),
            "target_elevation": scene.elevations[chosen],
        }


def relative_azimuths(scene: Scene, start: int, chosen: Tensor) -> Tensor:
    """Azimuths [Q] in degrees of views `chosen`, in the world where view `start` stands at 0."""
    return (scene.azimuths[chosen] - scene.azimuths[start]) % 360


def ring_frames(start: int, num_frames: int) -> Tensor:
    """Ring indices [N] of an orbit in SV3D's order: evenly spaced, `start` last. N must divide 16."""
    if RING % num_frames:
        raise ValueError(f"An orbit on a ring of {RING} views has 1, 2, 4, 8 or 16 frames, not {num_frames}.")
    return (start + torch.arange(1, num_frames + 1) * (RING // num_frames)) % RING


def batch_cameras(azimuth: Tensor, elevation: Tensor, size: int) -> list[Cameras]:
    """Angles [B, V] in degrees -> B batches of V cameras, on the angles' device."""
    cameras = (orbit_cameras(a, e, size) for a, e in zip(azimuth.cpu(), elevation.cpu()))
    return [c.to(azimuth.device) for c in cameras]


def radians(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """SV3D's polar = 90 - elevation and azimuth, [B, N] in radians."""
    return torch.deg2rad(90 - batch["elevation"]), torch.deg2rad(batch["azimuth"])


@torch.no_grad()
def encode_rings(views: ViewTensors, variants: list[Variant], vae, progress: bool = True) -> Tensor:
    """Unscaled latents of every variant's ring [M, 16, 4, h, w]."""
    rings = []
    for variant in tqdm(variants, desc="encoding", disable=not progress, mininterval=5):
        rgb = views.scene(variant.index, variant.mirror, variant.palette).rgb[:RING]
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
    """`Orbits` of all objects; latents are kept in the file `cache`, if given, and made again when it does not fit."""
    variants = make_variants(len(views), copies, seed)
    fingerprint = latent_fingerprint(views, variants, vae)
    if cache is not None:
        stored = read_cache(cache)
        if torch.equal(stored.get("fingerprint", torch.empty(0)), fingerprint):
            return Orbits(views, variants, stored["latents"], vae.config.scaling_factor)
    latents = encode_rings(views, variants, vae, progress)
    if cache is not None:
        with atomic_path(cache) as path:
            save_file({"latents": latents, "fingerprint": fingerprint}, path)
    return Orbits(views, variants, latents, vae.config.scaling_factor)


def latent_fingerprint(views: ViewTensors, variants: list[Variant], vae) -> Tensor:
    """A few numbers that change when the objects, their variants or the encoder change."""
    weights = sum(p.detach().double().abs().sum().cpu() for p in vae.encoder.parameters())
    pixels = views.rgb[:, ::8, ::8, ::8].double().sum()
    return torch.tensor([len(variants), views.rgb.shape[-2], float(weights), float(pixels)], dtype=torch.float64)
