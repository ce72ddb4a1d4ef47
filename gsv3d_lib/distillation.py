"""Stage 2, geometric distillation: a LoRA on the diffusion U-Net learns from 3D
(docs/method.md).

    sigma ~ logN(0.7, 1.6), n ~ N(0, 1)
    z_hat = D(z0 + sigma n; sigma)                  one denoising step of the U-Net with LoRA
    G     = decoder(z_hat),  I, D = render(G)       the decoder is frozen, but gradients pass through it
    L     = L_2D + lambda_3D w(sigma) L_3D          only the LoRA moves

The frozen parts run in grad mode: `requires_grad_(False)` stops updates, `no_grad`
would cut the path to the LoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cameras import batch_cameras
from .config import Config
from .data.dataset import RING
from .data.examples import Orbits, draw
from .diffusion import diffusion_draws, diffusion_loss
from .encoders import condition_features, orbit_condition
from .losses import LOSS_FIELDS, target_loss
from .system.errors import UserError
from .training import Stage


def sigma_weight(sigma: Tensor, kind: str) -> Tensor:
    """w(sigma) [B]: 1 in the literal variant ("none"), 1 / (1 + sigma^2) for "snr",
    which trusts z_hat less in noise.
    """
    if kind not in ("none", "snr"):
        raise UserError(f'sigma_weighting is "none" or "snr"; got {kind!r}.')
    return torch.ones_like(sigma) if kind == "none" else 1 / (1 + sigma**2)


class DistillationStage(Stage):
    """Only the LoRA of `unet` (see `lora.add_lora`) is trained; CLIP, DINO and the
    decoder are frozen.
    """

    FIELDS = (
        "image_size",
        "num_frames",
        "lora_rank",
        "cond_*",
        "log_sigma_*",
        "sigma_weighting",
        "copies",
        "target_views",
    )
    FIELDS += (*LOSS_FIELDS, "lambda_3d")

    def __init__(self, unet, clip, decoder, dino, orbits: Orbits, config: Config):
        super().__init__()
        self.unet, self.orbits = unet, orbits
        # `lambda_alpha` is stage 1's
        self.config = config.replace(lambda_alpha=config.lambda_alpha_stage2)
        self.clip, self.decoder = clip.requires_grad_(False), decoder.requires_grad_(False)
        self.dino = dino.requires_grad_(False) if dino is not None else None

    def example(self, generator, shared, place):
        item, start = self.orbits.item(generator, place), int(draw(generator, RING))
        orbit = self.orbits.orbit(item, start, self.config.num_frames)
        chosen = torch.randperm(self.orbits.views.rgb.shape[1], generator=generator)[
            : self.config.target_views
        ]
        draws = diffusion_draws(orbit["latents"], generator, self.config)
        return orbit | draws | self.orbits.targets(item, start, chosen)

    def forward(self, batch):
        condition = orbit_condition(batch, self.clip, self.config)
        loss_2d, z_hat = diffusion_loss(
            self.unet, batch["latents"], batch["noise"], batch["sigma"], condition
        )
        metrics = {"loss_2d": loss_2d.detach()}
        if self.config.lambda_3d == 0:  # plain LoRA fine-tuning; the 3D branch would only cost time
            return loss_2d, metrics
        loss_3d, scores = self.loss_3d(z_hat, batch)
        return loss_2d + self.config.lambda_3d * loss_3d, metrics | {
            "loss_3d": loss_3d.detach(),
            **scores,
        }

    def loss_3d(self, z_hat: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """w(sigma) L_3D of the Gaussians decoded from z_hat [B, N, 4, h, w], averaged
        over the batch.
        """
        cameras = batch_cameras(batch["azimuth"], batch["elevation"], self.config.image_size)
        scenes = self.decoder(z_hat, cameras, condition_features(self.dino, batch))
        weight = sigma_weight(batch["sigma"], self.config.sigma_weighting)
        return target_loss(scenes, batch, self.config, weight)

    def products(self):
        """The LoRA, which lies in the U-Net that carries it."""
        return {"lora": self.unet}
