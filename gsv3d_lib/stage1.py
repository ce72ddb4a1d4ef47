"""Stage 1: the Gaussian Splatting Decoder learns from latents of true views.

In use the latents are the U-Net's, smoother and less consistent than true ones. With
`sampled_share` the decoder meets such orbits in its training already [ours].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import batch_cameras
from .config import Config
from .data.dataset import RING
from .data.examples import Example, Orbits, draw, ring_frames
from .diffusion import sample
from .encoders import condition_features, orbit_condition
from .losses import LOSS_FIELDS, pixel_loss, target_loss
from .training import Stage

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    from .decoder import GaussianDecoder
    from .unet import SV3DUNet


class DecoderStage(Stage):
    """The decoder alone, on given latents, scored on input and novel views.

    unet, clip: what makes the share `sampled_share` of the orbits; without them all
        latents are those of the true views.
    """

    FIELDS = ("image_size", "decoder_*", "dino*", "object_radius", "scale_range", "copies")
    FIELDS += ("view_counts", "target_views", "lambda_pixel", *LOSS_FIELDS)
    FIELDS += ("sampled_share", "sampling_steps")

    def __init__(
        self,
        decoder: GaussianDecoder,
        dino: Dinov2Model | None,
        orbits: Orbits,
        config: Config,
        unet: SV3DUNet | None = None,
        clip: CLIPVisionModelWithProjection | None = None,
    ):
        super().__init__()
        self.decoder = decoder
        self.dino = dino.requires_grad_(False) if dino is not None else None
        self.unet = unet.requires_grad_(False) if unet is not None else None
        self.clip = clip.requires_grad_(False) if clip is not None else None
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
        if self.unet is not None:  # whole orbits only: the U-Net knows no others
            sampled = torch.rand((), generator=generator) < config.sampled_share
            seed = 1 + draw(generator, 2**31)
            orbit["seed"] = seed * (sampled and frames == config.num_frames)
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
        latents = batch["latents"] if self.unet is None else self._some_sampled(batch)
        scenes = self.decoder(latents, cameras, condition_features(self.dino, batch))
        loss, metrics = target_loss(scenes, batch, self.config)
        if self.config.lambda_pixel:
            own = zip(scenes, cameras, batch["own_rgb"], batch["own_depth"], batch["own_alpha"])
            pixel = torch.stack([pixel_loss(*parts) for parts in own]).mean()
            loss = loss + self.config.lambda_pixel * pixel
            metrics["pixel"] = pixel.detach()
        return loss, metrics

    def _some_sampled(self, batch: Example) -> Tensor:
        """The latents, with the U-Net's own where there is a seed; no guidance."""
        unet, clip = cast("SV3DUNet", self.unet), cast("CLIPVisionModelWithProjection", self.clip)
        latents = batch["latents"].clone()
        for b in batch["seed"].nonzero()[:, 0].tolist():
            parts = ("image", "image_latent", "azimuth", "elevation")
            one = cast("Example", {name: batch[name][b : b + 1] for name in parts})
            one["keep"] = torch.ones_like(one["azimuth"][:, 0])
            condition = orbit_condition(one, clip, self.config)
            generator = torch.Generator().manual_seed(int(batch["seed"][b]))
            options = {"generator": generator, "guidance": 1.0, "progress": False}
            latents[b] = sample(unet, condition, self.config, **options)[0]
        return latents

    def products(self):
        return {"decoder": self.decoder}


def avg_pool(images: Tensor, block: int) -> Tensor:
    """Mean over blocks: [N, H, W, C] -> [N, H / block, W / block, C]."""
    return F.avg_pool2d(images.movedim(-1, 1), block).movedim(1, -1)
