"""SV3D_p's U-Net: diffusers' class, with one camera angle per frame.

SVD (`UNetSpatioTemporalConditionModel`) adds one embedding (fps, motion, noise) to all
frames of a clip. SV3D_p adds, per frame, [sin256(cond_aug), sin512(polar),
sin512(azimuth)] through the same two-layer MLP (docs/method.md). Only that changes, so
the parameters keep diffusers' names, and a saved model opens in diffusers' own class.
`TokenAttention` and `FrameConv` are shortcuts with the same results that save time,
`TemporalBlock` saves memory (docs/performance.md).
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, join_heads, split_heads
from .config import Config

# diffusers' names of its blocks, with attention and without
DOWN = "CrossAttnDownBlockSpatioTemporal"
DOWN_PLAIN = "DownBlockSpatioTemporal"
UP = "CrossAttnUpBlockSpatioTemporal"
UP_PLAIN = "UpBlockSpatioTemporal"


class TokenAttention:
    """diffusers' attention, shorter where the context is one token.

    The softmax over one key is 1, so the answer is the token's value. With gradients
    the queries and keys are computed all the same, or the optimiser would not know
    their LoRA.
    """

    def __call__(
        self,
        attn: Any,  # diffusers' Attention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,  # diffusers passes it on; SVD has none
        **kwargs,
    ) -> Tensor:
        """[B, T, C], context [B, S, D] (None: itself) -> [B, T, C]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if context.shape[1] == 1 and not torch.is_grad_enabled():
            answer = attn.to_v(context).expand(-1, hidden_states.shape[1], -1)
        else:
            parts = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
            answer = join_heads(attend(*(split_heads(t, attn.heads) for t in parts)))
        return attn.to_out[0](answer)


class FrameConv(nn.Module):
    """A (3, 1, 1) convolution of [B, C, N, h, w] over frames, as a (3, 1) one.

    For the former torch falls back to slow code on one CPU thread. It takes over the
    parameters of `conv`.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.weight = conv.weight  # [O, C, 3, 1, 1]
        self.bias = conv.bias  # [O]

    def forward(self, x: Tensor) -> Tensor:
        flat = F.conv2d(x.flatten(3), self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return flat.unflatten(3, x.shape[3:])


class TemporalBlock(TemporalBasicTransformerBlock):
    """diffusers' attention over frames, recomputed in the backward pass if asked.

    diffusers' own checkpointing passes over it.
    """

    gradient_checkpointing = False  # `enable_gradient_checkpointing()` sets it

    def forward(self, *args, **kwargs) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


class SV3DUNet(UNetSpatioTemporalConditionModel, PeftAdapterMixin):
    """The multi-view denoiser F(c_in z, c_noise; condition) whose output is v.

    The settings are diffusers', and one more, resnet_eps: of the normalisations in the
    residual blocks. Stability's code has 1e-5 in all of them. diffusers' class has 1e-6
    but for the middle and for levels without attention on the way down; 0 keeps that.
    """

    config: Any  # what __init__ was called with, by name (diffusers' FrozenDict)

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 8,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = (DOWN, DOWN, DOWN, DOWN_PLAIN),
        up_block_types: tuple[str, ...] = (UP_PLAIN, UP, UP, UP),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 256 + 512 + 512,  # `angle_features`
        layers_per_block: int = 2,
        cross_attention_dim: int = 1024,
        transformer_layers_per_block: int = 1,
        num_attention_heads: tuple[int, ...] = (5, 10, 20, 20),
        num_frames: int = 21,
        resnet_eps: float = 0.0,
    ):
        own = ("self", "resnet_eps", "__class__", "own")  # the rest is diffusers'
        super().__init__(**{k: v for k, v in locals().items() if k not in own})
        self.set_attn_processor(cast(Any, TokenAttention()))
        for module in self.modules():
            if resnet_eps and isinstance(module, ResnetBlock2D | TemporalResnetBlock):
                module.norm1.eps = resnet_eps
                module.norm2.eps = resnet_eps
            if isinstance(module, TemporalResnetBlock):
                for name in ("conv1", "conv2"):
                    setattr(module, name, FrameConv(getattr(module, name)))
            elif isinstance(module, TemporalBasicTransformerBlock):
                module.__class__ = TemporalBlock  # the same parameters, another forward

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        token: Tensor,
        polar: Tensor,
        azimuth: Tensor,
        cond_aug: float = 1e-5,
    ) -> Tensor:
        """Predict v [B, N, 4, h, w] for noisy orbits.

        sample: [B, N, 8, h, w], c_in * z and the unscaled condition latent, 4 channels
            each
        timestep: [B], c_noise = ln(sigma) / 4
        token: [B, 1, D], the CLIP embedding of the condition image; zeros = no
            condition
        polar, azimuth: [B, N] radians; the condition view is the last frame, at azimuth
            0
        """
        self._check(sample, token, polar, azimuth)
        batch, frames = sample.shape[:2]
        noise = self.time_embedding(self.time_proj(timestep.expand(batch)).to(sample.dtype))
        angles = angle_features(polar, azimuth, cond_aug).flatten(0, 1).to(sample.dtype)
        emb = noise.repeat_interleave(frames, dim=0) + self.add_embedding(angles)  # [B * N, E]
        context = token.repeat_interleave(frames, dim=0)  # [B * N, 1, D]
        image_only = sample.new_zeros(batch, frames)  # every frame takes part in temporal mixing
        shared = dict(temb=emb, image_only_indicator=image_only)

        hidden = self.conv_in(sample.flatten(0, 1))
        skips = [hidden]
        for block in self.down_blocks:
            hidden, residuals = block(hidden, **shared, **_attend(block, context))
            skips.extend(residuals)
        hidden = self.mid_block(hidden, encoder_hidden_states=context, **shared)
        for block in self.up_blocks:
            count = len(cast(nn.ModuleList, block.resnets))
            given = shared | {"res_hidden_states_tuple": tuple(skips[-count:])}
            skips = skips[:-count]
            hidden = block(hidden, **given, **_attend(block, context))
        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return hidden.unflatten(0, (batch, frames))

    def grown_to(self, config: Config) -> SV3DUNet:
        """This U-Net, or for one layer more per level its `deepened` one."""
        return deepened(self) if config.unet_layers == self.config.layers_per_block + 1 else self

    def _check(self, sample: Tensor, token: Tensor, polar: Tensor, azimuth: Tensor) -> None:
        batch, frames = sample.shape[:2]
        channels, width = self.config.in_channels, self.config.cross_attention_dim
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        got = tuple(sample.shape)
        if sample.ndim != 5 or sample.shape[2] != channels:
            raise ValueError(f"sample is [B, N, {channels}, h, w]; got {got}.")
        if sample.shape[3] % factor or sample.shape[4] % factor:
            raise ValueError(f"Latent height and width are multiples of {factor}; got {got}.")
        if not polar.shape == azimuth.shape == (batch, frames):
            angles = f"{tuple(polar.shape)}, {tuple(azimuth.shape)}"
            raise ValueError(f"polar and azimuth are [{batch}, {frames}]; got {angles}.")
        if token.shape != (batch, 1, width):
            raise ValueError(f"token is [{batch}, 1, {width}]; got {tuple(token.shape)}.")


def _attend(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    """Blocks with cross-attention take the CLIP token; others refuse the argument."""
    attends = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": context} if attends else {}


def angle_features(polar: Tensor, azimuth: Tensor, cond_aug: float) -> Tensor:
    """[B, N] radians -> the per-frame features [B, N, 1280].

    They are [sin256(cond_aug), sin512(polar), sin512(azimuth)].
    """

    def sinusoid(values: Tensor, width: int) -> Tensor:  # max period 10000, as SV3D
        order: dict[str, Any] = dict(flip_sin_to_cos=True, downscale_freq_shift=0)  # [cos, sin]
        flat = get_timestep_embedding(values.flatten(), width, **order)
        return flat.unflatten(0, values.shape)

    noise = torch.full_like(polar, cond_aug)
    return torch.cat([sinusoid(noise, 256), sinusoid(polar, 512), sinusoid(azimuth, 512)], dim=-1)


@torch.no_grad()
def deepened(unet: SV3DUNet) -> SV3DUNet:
    """The U-Net with one more layer at every level, which begins as the old one.

    A layer is a residual block and attention; a new one adds zero at first. On the way
    up it stands second: there arrives the skip connection of the layer before the new
    one on the way down. So every old layer still reads what it has always read.
    """
    layers = unet.config.layers_per_block
    new = cast(SV3DUNet, SV3DUNet.from_config({**unet.config, "layers_per_block": layers + 1}))
    layer = re.compile(r"(up_blocks\.\d+\.(?:resnets|attentions)\.)([1-9])")

    def moved(name: str) -> str:  # layers 1, 2, ... of the way up become 2, 3, ...
        return layer.sub(lambda m: m[1] + str(int(m[2]) + 1), name)

    state = {moved(name): value for name, value in unet.state_dict().items()}
    new.load_state_dict(state, strict=False)
    for blocks, place in ((new.down_blocks, layers), (new.up_blocks, 1)):
        for block in cast(Any, blocks):
            _silence(block.resnets[place])
            if hasattr(block, "attentions"):
                _zero(block.attentions[place].proj_out)
    return new


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _silence(resnet: SpatioTemporalResBlock) -> None:
    """Let a residual block pass its input on, without the channels of a skip."""
    _zero(resnet.spatial_res_block.conv2)
    _zero(resnet.temporal_res_block.conv2)
    shortcut = resnet.spatial_res_block.conv_shortcut
    if shortcut is not None:
        _zero(shortcut)
        nn.init.dirac_(shortcut.weight)  # [out, hidden + skip, 1, 1], and hidden = out


def build_unet(config: Config) -> SV3DUNet:
    """A freshly initialised U-Net."""
    attention = config.unet_attention
    return SV3DUNet(
        sample_size=config.latent_size,
        down_block_types=tuple(DOWN if attends else DOWN_PLAIN for attends in attention),
        up_block_types=tuple(UP if attends else UP_PLAIN for attends in attention[::-1]),
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers,
        num_attention_heads=config.unet_heads,
        cross_attention_dim=config.clip_dim,
        num_frames=config.num_frames,
        resnet_eps=config.resnet_eps,
    )
