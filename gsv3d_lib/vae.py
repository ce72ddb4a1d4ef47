"""The KL-f8 autoencoder of SVD and SV3D: images [0, 1] <-> latents of 4 channels at an eighth of the size.

The network is diffusers' `AutoencoderKLTemporalDecoder` at every scale. Two conventions of SV3D live here (paper.md,
section 4): latents that are *diffused* are multiplied by 0.18215, the latent that is *concatenated as a condition* is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Config


def build_vae(config: Config):
    """A freshly initialised `AutoencoderKLTemporalDecoder`."""
    from diffusers import AutoencoderKLTemporalDecoder

    levels = len(config.vae_channels)
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * levels,
        block_out_channels=config.vae_channels,
        layers_per_block=config.vae_layers,
        latent_channels=4,
        sample_size=config.image_size,
        scaling_factor=config.latent_scale,
    )


def to_network(images: Tensor) -> Tensor:
    """Images [..., H, W, 3] in [0, 1] -> [M, 3, H, W] in [-1, 1], what diffusers' networks expect."""
    if images.ndim < 4 or images.shape[-1] != 3:
        raise ValueError(f"Images are [..., H, W, 3] in [0, 1]; got shape {tuple(images.shape)}.")
    return images.flatten(0, -4).permute(0, 3, 1, 2) * 2 - 1


def to_images(network: Tensor) -> Tensor:
    """[M, 3, H, W] in [-1, 1] -> images [M, H, W, 3], clamped to [0, 1]."""
    return (network / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def encode(vae, images: Tensor) -> Tensor:
    """Unscaled latents, the mode of q(z | x): images [..., H, W, 3] -> [..., 4, H/8, W/8]."""
    mode = vae.encode(to_network(images)).latent_dist.mode()
    return mode.unflatten(0, images.shape[:-3])


def encode_scaled(vae, images: Tensor) -> Tensor:
    """Latents for diffusion: 0.18215 times `encode`, about unit variance."""
    return vae.config.scaling_factor * encode(vae, images)


def decode_scaled(vae, latents: Tensor, chunk: int = 16) -> Tensor:
    """Diffusion latents of one orbit [N, 4, h, w] -> images [N, 8h, 8w, 3] in [0, 1].

    chunk: views decoded together; the temporal decoder shares information only inside a chunk.
    """
    if latents.ndim != 4 or latents.shape[1] != 4:
        raise ValueError(f"Latents of an orbit are [N, 4, h, w]; got shape {tuple(latents.shape)}.")
    parts = (latents / vae.config.scaling_factor).split(chunk)
    return torch.cat([to_images(vae.decode(part, num_frames=len(part)).sample) for part in parts])


@torch.no_grad()
def calibrate(vae, images: Tensor) -> Tensor:
    """Rescale the latent channels in place so that 0.18215 z has unit variance on `images` [M, H, W, 3].

    The factor is folded into the last layer of the encoder and its inverse into the first of the decoder, so the
    reconstruction does not change and 0.18215 stays the constant at every scale. Returns the old deviations [4].
    """
    deviation = encode_scaled(vae, images).std(dim=(0, 2, 3))
    mean_rows, logvar_rows = vae.quant_conv.weight[:4], slice(4, 8)
    mean_rows /= deviation[:, None, None, None]
    vae.quant_conv.bias[:4] /= deviation
    vae.quant_conv.bias[logvar_rows] -= 2 * deviation.log()
    vae.decoder.conv_in.weight *= deviation[None, :, None, None]
    return deviation
