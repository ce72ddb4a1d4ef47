"""The three stages before the paper's: VAE, DINO, and the multi-view diffusion itself.

The paper takes these models pretrained (SVD's VAE, DINO, SV3D's U-Net). Without their
weights they are trained here, by the same loop as everything else (`training.train`).
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .data.dataset import RING, ViewTensors
from .data.examples import PALETTES, Example, Orbits, draw
from .diffusion import diffusion_draws, diffusion_loss
from .encoders import dino_features, orbit_condition
from .training import Stage, mean_over_processes
from .vae import calibrate, to_network

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    from .unet import SV3DUNet
    from .vae import GroupedVAE


class VAEStage(Stage):
    """Reconstruction of clips of views: L1 + MSE, a very small KL, and an anchor.

    The anchor asks the first three latent channels to be the picture's thumbnail: 1 - x
    averaged over 8 x 8 pixels, so that white is 0. At 64 px the best *linear* code of 8
    x 8 pixels in four numbers spends all four on luminance, and a short training stays
    in that grey solution for thousands of steps; with the anchor there is colour after
    a hundred. The latents also vary smoothly over an object, so U-Net and decoder learn
    faster.
    """

    KL_WEIGHT = 1e-6
    FIELDS = ("image_size", "vae_*", "latent_scale")

    def __init__(self, vae: GroupedVAE, views: ViewTensors, config: Config):
        super().__init__()
        self.vae = vae
        self.views = views
        self.config = config

    def example(self, generator, shared, place):
        index = int(draw(generator, len(self.views)))
        clip = self.config.vae_clip
        frames = (draw(generator, RING, 1) + torch.arange(clip)) % RING
        palette = PALETTES[int(draw(generator, len(PALETTES)))]  # so that colours generalise
        rgb = self.views.rgb[index][frames].float()[..., list(palette)] / 255
        size = rgb.shape[-2] // 8
        return {"rgb": rgb, "noise": torch.randn(clip, 4, size, size, generator=generator)}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_network(batch["rgb"])  # [B * T, 3, H, W]
        posterior = cast(Any, self.vae.encode(images)).latent_dist
        latents = posterior.mean + posterior.std * batch["noise"].flatten(0, 1)
        decoded = self.vae.decode(latents, num_frames=self.config.vae_clip).sample
        error = decoded - images
        mse = error.pow(2).mean()
        kl = posterior.kl().mean()
        thumbnail = F.avg_pool2d(1 - images, 8)
        anchor = F.mse_loss(posterior.mean[:, :3], thumbnail)
        loss = mse + error.abs().mean() + self.KL_WEIGHT * kl + self.config.vae_anchor * anchor
        psnr = -10 * torch.log10(mse.detach() / 4)  # images span 2, from -1 to 1
        return loss, {"psnr": psnr, "kl": kl.detach(), "anchor": anchor.detach()}

    def products(self):
        """The autoencoder, rescaled so that 0.18215 z has unit variance."""
        objects = self.views.rgb[:: max(1, len(self.views) // 64)]
        pictures = objects[:, :RING:4].flatten(0, 1).float() / 255
        calibrate(self.vae, pictures.to(self.vae.device))
        return {"vae": self.vae}


class DINOStage(Stage):
    """Self-distillation with no labels (DINO, Caron et al. 2021).

    The two crops are two *views of one object*. The student, given one, predicts what
    the teacher (an average of past students) says of the other. Centring and a low
    teacher temperature keep the answer from collapsing to one constant.
    """

    FIELDS = ("image_size", "dino*")
    PROTOTYPES = 1024
    STUDENT_TEMPERATURE = 0.1
    TEACHER_TEMPERATURE = 0.05
    center: Tensor

    def __init__(self, dino: Dinov2Model, views: ViewTensors, config: Config):
        super().__init__()
        self.dino = dino
        self.views = views
        self.config = config
        self.head = DINOHead(config.dino_width, self.PROTOTYPES)
        self.teacher = copy.deepcopy(nn.ModuleList([dino, self.head])).requires_grad_(False)
        self.register_buffer("center", torch.zeros(self.PROTOTYPES))

    def training_state(self):
        teacher = {f"teacher.{name}": p for name, p in self.teacher.named_parameters()}
        return super().training_state() | teacher | {"center": self.center}

    def example(self, generator, shared, place):
        index = int(draw(generator, len(self.views)))
        pair = draw(generator, len(self.views.azimuths[index]), 2)
        views = [self.views.rgb[index, k].float() / 255 for k in pair.tolist()]
        return {"crops": torch.stack([random_crop(view, generator) for view in views])}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        crops = batch["crops"].transpose(0, 1)  # [2, B, S, S, 3]
        student = [self.head(dino_features(self.dino, x)) / self.STUDENT_TEMPERATURE for x in crops]
        with torch.no_grad():
            backbone, head = cast(Any, self.teacher)
            logits = [head(dino_features(backbone, x)) for x in crops]
            targets = [((t - self.center) / self.TEACHER_TEMPERATURE).softmax(-1) for t in logits]
            if self.training:
                mean = mean_over_processes(torch.cat(logits).float().mean(0))
                self.center.lerp_(mean, 0.1)
        first, second = (F.cross_entropy(student[a], targets[1 - a]) for a in (0, 1))
        entropy = torch.distributions.Categorical(probs=targets[0]).entropy().mean()
        return (first + second) / 2, {"target_entropy": entropy}

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        momentum = 1 - 0.01 * (1 + math.cos(math.pi * step / steps)) / 2
        students = [*self.dino.parameters(), *self.head.parameters()]
        for teacher, student in zip(self.teacher.parameters(), students):
            teacher.lerp_(student.detach(), 1 - momentum)

    def products(self):
        """The teacher, which averages the students."""
        return {"dino": self.teacher[0]}


class DINOHead(nn.Module):
    """Class token and mean patch -> logits over prototypes. [B, T, C] -> [B, K]"""

    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * width, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Linear(64, prototypes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mlp(torch.cat([features[:, 0], features[:, 1:].mean(1)], dim=-1))
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.prototypes.weight, dim=-1))


def random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """A square of 60-100 % of the side, resized, mirrored, dimmed. [S, S, 3]"""
    size = image.shape[0]
    side = int(size * (0.6 + 0.4 * torch.rand((), generator=generator)))
    top, left = draw(generator, size - side + 1, 2).tolist()
    crop = image[top : top + side, left : left + side].movedim(-1, 0)[None]
    crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)[0].movedim(0, -1)
    mirror, brightness = torch.rand(2, generator=generator).tolist()
    return (crop.flip(1) if mirror < 0.5 else crop) * (0.8 + 0.4 * brightness)


class DiffusionStage(Stage):
    """Multi-view latent diffusion: L_2D on whole orbits.

    A CLIP tower without pretrained weights learns along with it.
    """

    FIELDS = ("image_size", "num_frames", "copies", "unet_*", "clip_*", "cond_*", "log_sigma_*")
    FIELDS += ("roll_frames",)

    def __init__(
        self, unet: SV3DUNet, clip: CLIPVisionModelWithProjection, orbits: Orbits, config: Config
    ):
        super().__init__()
        self.unet = unet
        self.clip = clip
        self.orbits = orbits
        self.config = config

    def example(self, generator: torch.Generator, shared: torch.Generator, place: int) -> Example:
        item = self.orbits.item(generator, place)
        start = int(draw(generator, RING))
        orbit = self.orbits.orbit(item, start, self.config.num_frames)
        if torch.rand((), generator=generator) < self.config.roll_frames:
            orbit = rolled(orbit, int(draw(generator, self.config.num_frames)))
        return orbit | diffusion_draws(orbit["latents"], generator, self.config)

    def forward(self, batch: Example) -> tuple[Tensor, dict[str, Tensor]]:
        condition = orbit_condition(batch, self.clip, self.config)
        draws = batch["latents"], batch["noise"], batch["sigma"]
        loss, _ = diffusion_loss(self.unet, *draws, condition)
        return loss, {}

    def products(self):
        return {"unet": self.unet, "clip": self.clip}


def rolled(orbit: Example, frames: int) -> Example:
    """The same orbit begun elsewhere: frames and their angles move on by `frames`.

    In SV3D's order frame number and azimuth say the same, so a network may learn
    either; in a rolled orbit only the azimuth is right.
    """
    moved: Example = {
        "latents": orbit["latents"].roll(frames, 0),
        "azimuth": orbit["azimuth"].roll(frames, 0),
        "elevation": orbit["elevation"].roll(frames, 0),
    }
    return orbit | moved
