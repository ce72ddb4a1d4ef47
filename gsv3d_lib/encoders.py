"""The two image encoders, both transformers' own classes at every scale.

CLIP's one token tells the U-Net what the object is. DINO's patch features tell the
decoder what the input image shows where.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import sv3d_angles
from .config import Config
from .diffusion import Condition
from .vae import encode, to_network

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    from .data.examples import Example
    from .vae import GroupedVAE

# the published normalisation constants of the two models
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DINO_MEAN = (0.485, 0.456, 0.406)
DINO_STD = (0.229, 0.224, 0.225)


def build_clip(config: Config) -> CLIPVisionModelWithProjection:
    """A freshly initialised `CLIPVisionModelWithProjection`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.clip_width,
            intermediate_size=config.clip_mlp,
            num_hidden_layers=config.clip_layers,
            num_attention_heads=config.clip_heads,
            image_size=config.clip_size,
            patch_size=config.clip_patch,
            projection_dim=config.clip_dim,
            hidden_act="gelu",
        )
    )


def build_dino(config: Config) -> Dinov2Model:
    """A freshly initialised `Dinov2Model`."""
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(
            hidden_size=config.dino_width,
            num_hidden_layers=config.dino_layers,
            num_attention_heads=config.dino_heads,
            image_size=config.dino_size,
            patch_size=config.dino_patch,
        )
    )


def antialiased(x: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, size, size] by torch's bicubic filter.

    It widens where pictures shrink.
    """
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def blurred(x: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, size, size] as Stability's code does for CLIP.

    That is kornia's `resize` with antialias=True: where a side shrinks by a factor f >
    1, a Gaussian blur of sigma (f - 1) / 2 pixels, cut off at about 2 sigma; then cubic
    interpolation with aligned corners.
    """
    for axis in (-1, -2):
        x = blurred_along(x, axis, (x.shape[axis] / size - 1) / 2)
    return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=True)


def blurred_along(x: Tensor, axis: int, sigma: float) -> Tensor:
    """A Gaussian blur of [B, C, H, W] along one axis, mirrored at the borders."""
    if sigma <= 0:
        return x
    radius = max(int(4 * sigma), 3) // 2
    taps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = (-(taps**2) / (2 * sigma**2)).exp()
    rows = x.movedim(axis, -1)
    padded = F.pad(rows.flatten(0, -2)[:, None], (radius, radius), mode="reflect")
    smooth = F.conv1d(padded, (kernel / kernel.sum())[None, None])
    return smooth.reshape(rows.shape).movedim(-1, axis)


RESIZES = {"antialias": antialiased, "blur": blurred}  # `Config.clip_resize`


def normalised(images: Tensor, size: int, mean: tuple, std: tuple, resize=antialiased) -> Tensor:
    """Images [B, H, W, 3] in [0, 1] -> [B, 3, size, size], normalised per channel."""
    x = to_network(images) / 2 + 0.5
    if x.shape[-2:] != (size, size):
        x = resize(x, size)
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def clip_token(
    clip: CLIPVisionModelWithProjection, images: Tensor, resize: str = "antialias"
) -> Tensor:
    """Images [B, H, W, 3] -> token [B, 1, D]; resize: `Config.clip_resize`."""
    size = cast(int, clip.config.image_size)
    pixels = normalised(images, size, CLIP_MEAN, CLIP_STD, RESIZES[resize])
    return clip(pixel_values=pixels).image_embeds[:, None]


def dino_features(dino: Dinov2Model, images: Tensor) -> Tensor:
    """Images [B, H, W, 3] -> F_DINO [B, 1 + patches, D]: class token, patches."""
    pixels = normalised(images, cast(int, dino.config.image_size), DINO_MEAN, DINO_STD)
    return dino(pixel_values=pixels).last_hidden_state


@torch.no_grad()
def image_features(dino: Dinov2Model | None, images: Tensor) -> Tensor | None:
    """`dino_features` without gradients; None for a decoder built without DINO."""
    return None if dino is None else dino_features(dino, images)


def condition_from(
    images: Tensor,
    polar: Tensor,
    azimuth: Tensor,
    vae: GroupedVAE,
    clip: CLIPVisionModelWithProjection,
    config: Config,
) -> Condition:
    """`Condition` of images [B, H, W, 3]; polar and azimuth [B, N] in radians."""
    with torch.no_grad():
        latent = encode(vae, images)
    token = clip_token(clip, images, config.clip_resize)
    return Condition(token, latent, polar, azimuth, config.cond_aug)


def orbit_condition(
    batch: Example, clip: CLIPVisionModelWithProjection, config: Config
) -> Condition:
    """The `Condition` of a batch of orbits, with the dropout that guidance needs."""
    token = clip_token(clip, batch["image"], config.clip_resize)
    polar, azimuth = sv3d_angles(batch["azimuth"], batch["elevation"])
    condition = Condition(token, batch["image_latent"], polar, azimuth, config.cond_aug)
    return condition.dropped(batch["keep"])


def condition_features(dino: Dinov2Model | None, batch: Example) -> Tensor | None:
    """DINO's features [B, T, D] of the condition views.

    Shards bring them along; else they are computed here.
    """
    if "features" in batch:
        return batch["features"]
    return image_features(dino, batch["image"])
