"""Stage 2, geometric distillation: a LoRA on the U-Net learns from rendered 3D.

    sigma ~ logN(0.7, 1.6), n ~ N(0, 1)
    z_hat = D(z0 + sigma n; sigma)          one denoising step of the U-Net with LoRA
    G     = decoder(z_hat);  I, D = render(G)                   the decoder is frozen
    L     = L_2D + lambda_3D w(sigma) L_3D                        only the LoRA moves

The frozen parts run in grad mode: `requires_grad_(False)` stops their updates, while
`no_grad` would cut the path of the gradient to the LoRA. See docs/method.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cameras import batch_cameras
from .config import Config
from .data.dataset import RING
from .data.examples import Example, Orbits, draw
from .diffusion import diffusion_draws, diffusion_loss
from .encoders import condition_features, orbit_condition
from .losses import LOSS_FIELDS, target_loss
from .system.errors import UserError
from .training import Stage

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    from .decoder import GaussianDecoder
    from .unet import SV3DUNet


def sigma_weight(sigma: Tensor, kind: str) -> Tensor:
    """w(sigma) [B]: 1 for "none", as in the paper; 1 / (1 + sigma^2) for "snr" [ours].

    "snr" trusts z_hat less where there was more noise.
    """
    if kind not in ("none", "snr"):
        raise UserError(f'sigma_weighting is "none" or "snr"; got {kind!r}.')
    return torch.ones_like(sigma) if kind == "none" else 1 / (1 + sigma**2)


class DistillationStage(Stage):
    """Only the LoRA of `unet` (`lora.add_lora`) is trained; the rest is frozen."""

    FIELDS = ("image_size", "num_frames", "copies", "target_views", "lora_rank", "cond_*")
    FIELDS += ("log_sigma_*", "sigma_weighting", "lambda_3d", *LOSS_FIELDS)

    def __init__(
        self,
        unet: SV3DUNet,
        clip: CLIPVisionModelWithProjection,
        decoder: GaussianDecoder,
        dino: Dinov2Model | None,
        orbits: Orbits,
        config: Config,
    ):
        super().__init__()
        self.unet = unet
        self.clip = clip.requires_grad_(False)
        self.decoder = decoder.requires_grad_(False)
        self.dino = dino.requires_grad_(False) if dino is not None else None
        self.orbits = orbits
        # `lambda_alpha` is stage 1's; the terms of L_3D read this name in both stages
        self.config = config.replace(lambda_alpha=config.lambda_alpha_stage2)

    def example(self, generator: torch.Generator, shared: torch.Generator, place: int) -> Example:
        item = self.orbits.item(generator, place)
        start = int(draw(generator, RING))
        orbit = self.orbits.orbit(item, start, self.config.num_frames)
        views = torch.randperm(self.orbits.views.rgb.shape[1], generator=generator)
        targets = self.orbits.targets(item, start, views[: self.config.target_views])
        return orbit | diffusion_draws(orbit["latents"], generator, self.config) | targets

    def forward(self, batch: Example) -> tuple[Tensor, dict[str, Tensor]]:
        condition = orbit_condition(batch, self.clip, self.config)
        loss_2d, z_hat = diffusion_loss(
            self.unet, batch["latents"], batch["noise"], batch["sigma"], condition
        )
        metrics = {"loss_2d": loss_2d.detach()}
        if self.config.lambda_3d == 0:  # plain LoRA fine-tuning; the 3D branch would only cost time
            return loss_2d, metrics
        loss_3d, scores = self.loss_3d(z_hat, batch)
        metrics |= {"loss_3d": loss_3d.detach(), **scores}
        return loss_2d + self.config.lambda_3d * loss_3d, metrics

    def loss_3d(self, z_hat: Tensor, batch: Example) -> tuple[Tensor, dict[str, Tensor]]:
        """w(sigma) L_3D of the Gaussians from z_hat [B, N, 4, h, w], mean over B."""
        cameras = batch_cameras(batch["azimuth"], batch["elevation"], self.config.image_size)
        scenes = self.decoder(z_hat, cameras, condition_features(self.dino, batch))
        weight = sigma_weight(batch["sigma"], self.config.sigma_weighting)
        return target_loss(scenes, batch, self.config, weight)

    def products(self):
        """The LoRA, which lies in the U-Net that carries it."""
        return {"lora": self.unet}
