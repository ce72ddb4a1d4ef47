"""Stage 1: the Gaussian Splatting Decoder learns from latents of true views."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import batch_cameras
from .config import Config
from .data.dataset import RING
from .data.examples import Example, Orbits, draw, ring_frames
from .encoders import condition_features
from .losses import LOSS_FIELDS, pixel_loss, target_loss
from .training import Stage

if TYPE_CHECKING:
    from transformers import Dinov2Model

    from .decoder import GaussianDecoder


class DecoderStage(Stage):
    """The decoder alone, on true latents, scored on input and novel views."""

    FIELDS = ("image_size", "decoder_*", "dino*", "object_radius", "scale_range", "copies")
    FIELDS += ("view_counts", "target_views", "lambda_pixel", *LOSS_FIELDS)

    def __init__(
        self, decoder: GaussianDecoder, dino: Dinov2Model | None, orbits: Orbits, config: Config
    ):
        super().__init__()
        self.decoder = decoder
        self.dino = dino.requires_grad_(False) if dino is not None else None
        self.orbits = orbits
        self.config = config

    def example(self, generator: torch.Generator, shared: torch.Generator, place: int) -> Example:
        config = self.config
        frames = config.view_counts[int(draw(shared, len(config.view_counts)))]
        item = self.orbits.item(generator, place)
        start = int(draw(generator, RING))
        views = torch.randperm(self.orbits.views.rgb.shape[1], generator=generator)
        orbit = self.orbits.orbit(item, start, frames)
        orbit |= self.orbits.targets(item, start, views[: config.target_views])
        return orbit | self._own_pixels(item, start, frames) if config.lambda_pixel else orbit

    def _own_pixels(self, item: int, start: int, frames: int) -> Example:
        """The truth at the decoder's own output pixels, for `pixel_loss`."""
        scene = self.orbits.scene(item)
        ring = ring_frames(start, frames)
        tokens = self.orbits.latents.shape[-1] // self.config.decoder_patch
        block = scene.rgb.shape[1] // (tokens * self.config.decoder_upsample)
        return {
            "own_rgb": avg_pool(scene.rgb[ring], block),
            "own_alpha": avg_pool(scene.alpha[ring], block),
            "own_depth": scene.depth[ring][
                :, ::block, ::block
            ],  # a mean across an edge is no depth
        }

    def forward(self, batch: Example) -> tuple[Tensor, dict[str, Tensor]]:
        cameras = batch_cameras(batch["azimuth"], batch["elevation"], self.config.image_size)
        scenes = self.decoder(batch["latents"], cameras, condition_features(self.dino, batch))
        loss, metrics = target_loss(scenes, batch, self.config)
        if self.config.lambda_pixel:
            own = zip(scenes, cameras, batch["own_rgb"], batch["own_depth"], batch["own_alpha"])
            pixel = torch.stack([pixel_loss(*parts) for parts in own]).mean()
            loss = loss + self.config.lambda_pixel * pixel
            metrics["pixel"] = pixel.detach()
        return loss, metrics

    def products(self):
        return {"decoder": self.decoder}


def avg_pool(images: Tensor, block: int) -> Tensor:
    """Mean over blocks: [N, H, W, C] -> [N, H / block, W / block, C]."""
    return F.avg_pool2d(images.movedim(-1, 1), block).movedim(1, -1)
