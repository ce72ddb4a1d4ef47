"""Orbits that live on the device: examples are drawn there, hundreds at once.

`ResidentOrbits` holds all pictures as bytes and all latents, and gives for many items
and start views together what `data.examples.Orbits` gives for one
(tests/test_ten_minutes.py compares the two). All randomness comes from one generator on
the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gsv3d_lib.config import Config
from gsv3d_lib.data.dataset import RING, ViewTensors
from gsv3d_lib.data.examples import Example, Variant
from gsv3d_lib.vae import encode


class ResidentOrbits:
    """Variants of objects on `device`; `encode` must come before `orbit`."""

    def __init__(self, views: ViewTensors, variants: list[Variant], latent_scale: float, device):
        self.rgb, self.alpha = views.rgb.to(device), views.alpha.to(device)
        flat = views.depth.stride(0) == 0  # a pack without depth
        self.depth = views.depth[:1].to(device) if flat else views.depth.to(device)
        self.has_depth = not flat
        self.latent_scale = latent_scale
        self.device = device
        places = zip(*(views.places(v.index, v.mirror) for v in variants))
        self.order, self.azimuths, self.elevations = (torch.stack(p).to(device) for p in places)
        self.index = torch.tensor([v.index for v in variants], device=device)
        self.mirror = torch.tensor([v.mirror for v in variants], device=device)
        self.palette = torch.tensor([v.palette for v in variants], device=device)
        self.latents: Tensor | None = None  # [M, 16, 4, h, w], not scaled

    def __len__(self) -> int:
        return len(self.index)

    # ------------------------------------------------------------ what is stored

    def seen(self, stored: Tensor, items: Tensor, views: Tensor) -> Tensor:
        """Views [B, K] of items [B] from stored [O, V, S, S, C].

        They are mirrored where the variant is.
        """
        source = self.order[items].gather(1, views)
        found = stored[self.index[items][:, None], source]
        return torch.where(self.mirror[items].reshape(-1, 1, 1, 1, 1), found.flip(-2), found)

    def pictures(self, items: Tensor, views: Tensor) -> Tensor:
        """[B, K, S, S, 3] in [0, 1]."""
        found = self.seen(self.rgb, items, views)
        channels = self.palette[items][:, None, None, None].expand(found.shape)
        return found.gather(-1, channels).float() / 255

    def covered(self, items: Tensor, views: Tensor) -> Tensor:
        """Alpha [B, K, S, S, 1] in [0, 1]."""
        return self.seen(self.alpha, items, views).float() / 255

    def deep(self, items: Tensor, views: Tensor) -> Tensor:
        """Depth [B, K, S, S, 1]. Raises ValueError where none was packed."""
        if not self.has_depth:
            raise ValueError("These views were packed without depth.")
        return self.seen(self.depth, items, views)

    @torch.no_grad()
    def encode(self, vae, chunk: int = 64) -> None:
        """Latents of all rings, `chunk` rings at a time."""
        parts = []
        for items in torch.arange(len(self), device=self.device).split(chunk):
            ring = torch.arange(RING, device=self.device).expand(len(items), RING)
            parts.append(encode(vae, self.pictures(items, ring)))
        self.latents = torch.cat(parts)

    # ------------------------------------------------------------ examples

    def orbit(
        self, items: Tensor, starts: Tensor, num_frames: int, shifts: Tensor | None = None
    ) -> Example:
        """`Orbits.orbit` of items [B] with condition views starts [B].

        The frames of orbit b are then `pretraining.rolled` by shifts[b].
        """
        places = torch.arange(num_frames, device=self.device).expand(len(items), -1)
        if shifts is not None:
            places = (places - shifts[:, None]) % num_frames
        frames = (starts[:, None] + (places + 1) * (RING // num_frames)) % RING
        return {
            "latents": self.latent_scale * self.latents[items[:, None], frames],
            "image": self.pictures(items, starts[:, None])[:, 0],
            "image_latent": self.latents[items, starts],
            "azimuth": self.relative_azimuths(items, starts, frames),
            "elevation": self.elevations[items].gather(1, frames),
        }

    def relative_azimuths(self, items: Tensor, starts: Tensor, views: Tensor) -> Tensor:
        azimuths = self.azimuths[items]
        return (azimuths.gather(1, views) - azimuths.gather(1, starts[:, None])) % 360

    def targets(self, items: Tensor, starts: Tensor, chosen: Tensor) -> Example:
        """`Orbits.targets` of views chosen [B, Q]."""
        return {
            "target_rgb": self.pictures(items, chosen),
            "target_depth": self.deep(items, chosen),
            "target_alpha": self.covered(items, chosen),
            "target_azimuth": self.relative_azimuths(items, starts, chosen),
            "target_elevation": self.elevations[items].gather(1, chosen),
        }

    def own_pixels(self, items: Tensor, starts: Tensor, frames: int, config: Config) -> Example:
        """The truth at the decoder's output pixels, as `DecoderStage` draws it."""
        places = torch.arange(1, frames + 1, device=self.device) * (RING // frames)
        ring = (starts[:, None] + places) % RING
        outputs = self.latents.shape[-1] // config.decoder_patch * config.decoder_upsample
        block = self.rgb.shape[2] // outputs
        return {
            "own_rgb": pooled(self.pictures(items, ring), block),
            "own_alpha": pooled(self.covered(items, ring), block),
            "own_depth": self.deep(items, ring)[:, :, ::block, ::block],
        }

    # ------------------------------------------------------------ draws

    def draw(self, generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Items and start views [B]."""
        items = torch.randint(len(self), (batch,), generator=generator, device=self.device)
        starts = torch.randint(RING, (batch,), generator=generator, device=self.device)
        return items, starts

    def diffusion_batch(self, generator: torch.Generator, batch: int, config: Config) -> Example:
        """What `DiffusionStage.example` draws, B times."""
        items, starts = self.draw(generator, batch)
        options = {"generator": generator, "device": self.device}
        frames = config.num_frames
        shifts = torch.randint(frames, (batch,), **options)
        shifts = shifts * (torch.rand(batch, **options) < config.roll_frames)
        orbit = self.orbit(items, starts, frames, shifts)
        spread = config.log_sigma_std * torch.randn(batch, **options)
        draws = {
            "noise": torch.randn(orbit["latents"].shape, **options),
            "sigma": (config.log_sigma_mean + spread).exp(),
            "keep": (torch.rand(batch, **options) >= config.cond_dropout).float(),
        }
        return orbit | draws

    def decoder_batch(
        self, generator: torch.Generator, batch: int, frames: int, config: Config
    ) -> Example:
        """What `DecoderStage.example` draws, B times, for orbits of so many frames."""
        items, starts = self.draw(generator, batch)
        views = torch.rand(batch, self.rgb.shape[1], generator=generator, device=self.device)
        chosen = views.argsort(1)[:, : config.target_views]
        drawn = self.orbit(items, starts, frames) | self.targets(items, starts, chosen)
        if config.lambda_pixel:
            drawn |= self.own_pixels(items, starts, frames, config)
        return drawn


def pooled(images: Tensor, block: int) -> Tensor:
    """Means over blocks: [B, N, H, W, C] -> [B, N, H / block, W / block, C]."""
    flat = images.flatten(0, 1).movedim(-1, 1)
    return F.avg_pool2d(flat, block).movedim(1, -1).unflatten(0, images.shape[:2])
