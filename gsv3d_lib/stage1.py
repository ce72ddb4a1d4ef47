"""Stage 1: the Gaussian Splatting Decoder learns from latents of true views
(docs/method.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import batch_cameras
from .config import Config
from .data.dataset import RING
from .data.examples import Orbits, draw, ring_frames
from .encoders import condition_features
from .losses import LOSS_FIELDS, pixel_loss, target_loss
from .training import Stage


class DecoderStage(Stage):
    """Stage 1: the decoder alone, on ground-truth latents, scored on rendered input and
    novel views.
    """

    FIELDS = (
        "image_size",
        "decoder_*",
        "dino*",
        "object_radius",
        "scale_range",
        "copies",
        "view_counts",
        "target_views",
    )
    FIELDS += (*LOSS_FIELDS, "lambda_pixel")

    def __init__(self, decoder, dino, orbits: Orbits, config: Config):
        super().__init__()
        self.decoder, self.orbits, self.config = decoder, orbits, config
        self.dino = dino.requires_grad_(False) if dino is not None else None

    def example(self, generator, shared, place):
        config = self.config
        frames = config.view_counts[int(draw(shared, len(config.view_counts)))]
        item, start = self.orbits.item(generator, place), int(draw(generator, RING))
        chosen = torch.randperm(self.orbits.views.rgb.shape[1], generator=generator)[
            : config.target_views
        ]
        orbit = self.orbits.orbit(item, start, frames) | self.orbits.targets(item, start, chosen)
        return orbit | (self._own_pixels(item, start, frames) if config.lambda_pixel else {})

    def _own_pixels(self, item: int, start: int, frames: int) -> dict[str, Tensor]:
        """The truth at the decoder's output pixels of the input views, for
        `pixel_loss`.
        """
        scene, ring = self.orbits.scene(item), ring_frames(start, frames)
        outputs = (
            self.orbits.latents.shape[-1]
            // self.config.decoder_patch
            * self.config.decoder_upsample
        )
        block = scene.rgb.shape[1] // outputs
        pooled = [avg_pool(t[ring], block) for t in (scene.rgb, scene.alpha)]
        return {
            "own_rgb": pooled[0],
            "own_alpha": pooled[1],
            "own_depth": scene.depth[ring][:, ::block, ::block],
        }

    def forward(self, batch):
        size = self.config.image_size
        cameras = batch_cameras(batch["azimuth"], batch["elevation"], size)
        scenes = self.decoder(batch["latents"], cameras, condition_features(self.dino, batch))
        loss, metrics = target_loss(scenes, batch, self.config)
        if self.config.lambda_pixel:
            own = zip(scenes, cameras, batch["own_rgb"], batch["own_depth"], batch["own_alpha"])
            pixel = torch.stack([pixel_loss(*parts) for parts in own]).mean()
            loss, metrics = (
                loss + self.config.lambda_pixel * pixel,
                metrics | {"pixel": pixel.detach()},
            )
        return loss, metrics

    def products(self):
        return {"decoder": self.decoder}


def avg_pool(images: Tensor, block: int) -> Tensor:
    """Mean over blocks: [N, H, W, C] -> [N, H / block, W / block, C]."""
    return F.avg_pool2d(images.movedim(-1, 1), block).movedim(1, -1)
