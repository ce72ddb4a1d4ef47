"""The KL-f8 autoencoder of SVD and SV3D: images in [0, 1] <-> latents.

Latents have 4 channels at an eighth of the size. The network is diffusers'
`AutoencoderKLTemporalDecoder` at every scale. Two conventions of SV3D live here
(docs/method.md): latents that are *diffused* are multiplied by 0.18215; the latent that
is *concatenated as a condition* is not.
"""

from typing import Any, cast

import torch
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .config import Config


class GroupedVAE(AutoencoderKLTemporalDecoder):
    """diffusers' `AutoencoderKLTemporalDecoder` with two more settings.

    norm_groups: of the normalisation. diffusers fixes 32, which suits SVD's 128 to 512
        channels. With `tiny`'s 32 channels each would be its own group: that erases the
        strength of a channel, and with it colour.
    post_quant: a 1x1 convolution of the latents before the decoder, as `AutoencoderKL`
        has.
    """

    config: Any  # what __init__ was called with, by name (diffusers' FrozenDict)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        force_upcast: bool = True,
        norm_groups: int = 32,
        post_quant: bool = False,
    ):
        own = ("self", "norm_groups", "post_quant", "__class__", "own")
        super().__init__(**{k: v for k, v in locals().items() if k not in own})
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = norm_groups
        conv = nn.Conv2d(latent_channels, latent_channels, 1) if post_quant else nn.Identity()
        self.post_quant_conv = conv

    def decode(self, z: Tensor, num_frames: int, return_dict: bool = True) -> Any:
        """[B * N, 4, h, w] -> diffusers' output with `.sample` in [-1, 1]."""
        return super().decode(self.post_quant_conv(z), num_frames, return_dict)


def build_vae(config: Config, post_quant: bool = False) -> GroupedVAE:
    """A freshly initialised autoencoder."""
    vae = GroupedVAE(
        down_block_types=("DownEncoderBlock2D",) * len(config.vae_channels),
        block_out_channels=config.vae_channels,
        layers_per_block=config.vae_layers,
        sample_size=config.image_size,
        scaling_factor=config.latent_scale,
        norm_groups=config.vae_norm_groups,
        post_quant=post_quant,
    )
    start_linear(vae)
    return vae


@torch.no_grad()
def start_linear(vae: GroupedVAE) -> None:
    """Zero the last layer of every residual branch: training starts linear.

    So it starts as a plain linear codec, nearly without sampling noise (deviation
    0.05). Measured on 64 px objects: as good after 1,000 images as after 3,500
    otherwise.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock

    for module in vae.modules():
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            last = module.conv2
        elif isinstance(module, Attention):
            last = module.get_submodule("to_out.0")
        else:
            continue
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    _, bias = vae.quant_conv.parameters()
    bias[4:] = -6.0  # ln of the variance: a deviation of 0.05


def to_network(images: Tensor) -> Tensor:
    """Images [..., H, W, 3] in [0, 1] -> [M, 3, H, W] in [-1, 1], for diffusers."""
    if images.ndim < 4 or images.shape[-1] != 3:
        raise ValueError(f"Images are [..., H, W, 3] in [0, 1]; got shape {tuple(images.shape)}.")
    return images.flatten(0, -4).permute(0, 3, 1, 2) * 2 - 1


def to_images(network: Tensor) -> Tensor:
    """[M, 3, H, W] in [-1, 1] -> images [M, H, W, 3], clamped to [0, 1]."""
    return (network / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def encode(vae: GroupedVAE, images: Tensor) -> Tensor:
    """Unscaled latents, the mode of q(z | x): [..., H, W, 3] -> [..., 4, H/8, W/8]."""
    posterior = cast(Any, vae.encode(to_network(images).to(vae.device))).latent_dist
    return posterior.mode().unflatten(0, images.shape[:-3])


def encode_scaled(vae: GroupedVAE, images: Tensor) -> Tensor:
    """Latents for diffusion: 0.18215 times `encode`, about unit variance."""
    return vae.config.scaling_factor * encode(vae, images)


def decode_scaled(vae: GroupedVAE, latents: Tensor, chunk: int = 1) -> Tensor:
    """Diffusion latents of one orbit [N, 4, h, w] -> images [N, 8h, 8w, 3] in [0, 1].

    chunk: views decoded together; layers over time see only those.
    """
    if latents.ndim != 4 or latents.shape[1] != 4:
        raise ValueError(f"Latents of an orbit are [N, 4, h, w]; got shape {tuple(latents.shape)}.")
    parts = (latents / vae.config.scaling_factor).split(chunk)
    return torch.cat([to_images(vae.decode(part, num_frames=len(part)).sample) for part in parts])


@torch.no_grad()
def calibrate(vae: GroupedVAE, images: Tensor) -> Tensor:
    """Rescale the latent channels in place: 0.18215 z gets unit variance on `images`.

    The factor is folded into the last layer of the encoder and its inverse into the
    first of the decoder, so the reconstruction does not change and 0.18215 stays the
    constant at every scale. images [M, H, W, 3]; returns the old deviations [4].
    """
    deviation = encode_scaled(vae, images).std(dim=(0, 2, 3))
    # Rows 0 to 3 of `quant_conv` make the mean, rows 4 to 7 ln of the variance. A slice
    # of a parameter is a view of its memory: `/=` and `-=` on it change the layer.
    weight, bias = vae.quant_conv.parameters()
    weight[:4] /= deviation[:, None, None, None]
    bias[:4] /= deviation
    bias[4:8] -= 2 * deviation.log()
    vae.decoder.conv_in.weight *= deviation[None, :, None, None]
    return deviation
