"""SV3D_p's U-Net: diffusers' `UNetSpatioTemporalConditionModel`, with one camera angle
per frame.

SVD adds one embedding (fps, motion, noise) to all frames of a clip. SV3D_p adds, per
frame, [sin256(cond_aug), sin512(polar), sin512(azimuth)] through the same two-layer MLP
(docs/method.md). Only that changes, so the parameters keep diffusers' names and a saved
model opens in diffusers' own class. Two shortcuts with the same results,
`TokenAttention` and `FrameConv`, save time, and `TemporalBlock` saves memory
(docs/performance.md).
"""

from __future__ import annotations

import re

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
DOWN, DOWN_PLAIN = "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"
UP, UP_PLAIN = "CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"


class TokenAttention:
    """The attention of diffusers' transformer blocks, shorter where the context is one
    token.

    The softmax over one key is 1, so the answer is the token's value. With gradients
    the queries and keys are computed all the same, or their LoRA would be unknown to
    the optimiser.
    """

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask=None,
        **kwargs,
    ) -> Tensor:
        """hidden_states [B, T, C], encoder_hidden_states [B, S, D] or None for
        self-attention -> [B, T, C].
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if context.shape[1] == 1 and not torch.is_grad_enabled():
            answer = attn.to_v(context).expand(-1, hidden_states.shape[1], -1)
        else:
            parts = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
            answer = join_heads(attend(*(split_heads(t, attn.heads) for t in parts)))
        return attn.to_out[0](answer)


class FrameConv(nn.Module):
    """A (3, 1, 1) convolution of [B, C, N, h, w] over the frames, as a (3, 1) one of
    [B, C, N, h w].

    For the former torch falls back to slow code on one CPU thread. It takes over the
    parameters of `conv`.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias  # [O, C, 3, 1, 1], [O]

    def forward(self, x: Tensor) -> Tensor:
        flat = F.conv2d(x.flatten(3), self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return flat.unflatten(3, x.shape[3:])


class TemporalBlock(TemporalBasicTransformerBlock):
    """diffusers' attention over frames, which its checkpointing passes over: here it is
    recomputed like the rest.
    """

    gradient_checkpointing = False  # `enable_gradient_checkpointing()` sets it

    def forward(self, *args, **kwargs) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


class SV3DUNet(UNetSpatioTemporalConditionModel, PeftAdapterMixin):
    """The multi-view denoiser F(c_in z, c_noise; condition) whose output is v.

    The settings are diffusers', and one more. resnet_eps: of the normalisations in the
    residual blocks. Stability's code has 1e-5 in all of them; diffusers' class has 1e-6
    in all blocks but those of the middle and of levels without attention on the way
    down. 0 keeps diffusers'.
    """

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
        projection_class_embeddings_input_dim: int = 1280,
        layers_per_block: int = 2,
        cross_attention_dim: int = 1024,
        transformer_layers_per_block: int = 1,
        num_attention_heads: tuple[int, ...] = (5, 10, 20, 20),
        num_frames: int = 21,
        resnet_eps: float = 0.0,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            addition_time_embed_dim=addition_time_embed_dim,
            projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            num_attention_heads=num_attention_heads,
            num_frames=num_frames,
        )
        self.set_attn_processor(TokenAttention())
        for module in self.modules():
            if resnet_eps and isinstance(module, ResnetBlock2D | TemporalResnetBlock):
                module.norm1.eps = resnet_eps
                module.norm2.eps = resnet_eps
            if isinstance(module, TemporalResnetBlock):
                module.conv1, module.conv2 = FrameConv(module.conv1), FrameConv(module.conv2)
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
        """Predict v for noisy orbits.

        sample:   [B, N, 8, h, w], c_in * z (4 channels) and the unscaled condition latent (4 channels)
        timestep: [B], c_noise = ln(sigma) / 4
        token:    [B, 1, D], the CLIP embedding of the condition image, zeros for the null condition
        polar, azimuth: [B, N] radians; the condition view is the last frame, at azimuth
            0
        Returns v [B, N, 4, h, w].
        """
        self._check(sample, token, polar, azimuth)
        batch, frames = sample.shape[:2]
        # [B * N, E]
        emb = self._embed(timestep.expand(batch), polar, azimuth, cond_aug, sample.dtype)
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
            count = len(block.resnets)
            residuals, skips = tuple(skips[-count:]), skips[:-count]
            hidden = block(
                hidden, res_hidden_states_tuple=residuals, **shared, **_attend(block, context)
            )
        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return hidden.unflatten(0, (batch, frames))

    def grown_to(self, config: Config) -> SV3DUNet:
        """This U-Net, or one with one layer more per level that begins as it
        (`deepened`).
        """
        return deepened(self) if config.unet_layers == self.config.layers_per_block + 1 else self

    def _embed(
        self, timestep: Tensor, polar: Tensor, azimuth: Tensor, cond_aug: float, dtype
    ) -> Tensor:
        """Time embedding plus the per-frame camera embedding, [B * N, E]."""
        frames = polar.shape[1]
        time = self.time_embedding(self.time_proj(timestep).to(dtype)).repeat_interleave(
            frames, dim=0
        )
        return time + self.add_embedding(
            angle_features(polar, azimuth, cond_aug).flatten(0, 1).to(dtype)
        )

    def _check(self, sample: Tensor, token: Tensor, polar: Tensor, azimuth: Tensor) -> None:
        batch, frames = sample.shape[:2]
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if sample.ndim != 5 or sample.shape[2] != self.config.in_channels:
            raise ValueError(
                f"sample is [B, N, {self.config.in_channels}, h, w]; got {tuple(sample.shape)}."
            )
        if sample.shape[3] % factor or sample.shape[4] % factor:
            raise ValueError(
                f"The latent height and width must be multiples of {factor}; got {tuple(sample.shape)}."
            )
        if polar.shape != (batch, frames) or azimuth.shape != (batch, frames):
            raise ValueError(
                f"polar and azimuth are [{batch}, {frames}] like sample; got {tuple(polar.shape)}, {tuple(azimuth.shape)}."
            )
        if token.shape != (batch, 1, self.config.cross_attention_dim):
            raise ValueError(
                f"token is [{batch}, 1, {self.config.cross_attention_dim}]; got {tuple(token.shape)}."
            )


def _attend(block, context: Tensor) -> dict:
    """Blocks with cross-attention take the CLIP token, the others must not see the
    argument.
    """
    return (
        {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
    )


def angle_features(polar: Tensor, azimuth: Tensor, cond_aug: float) -> Tensor:
    """[sin256(cond_aug), sin512(polar), sin512(azimuth)] per frame: [B, N] radians ->
    [B, N, 1280].
    """

    def sinusoid(values: Tensor, width: int) -> Tensor:  # [cos, sin], max period 10000, as SV3D
        flat = get_timestep_embedding(
            values.flatten(), width, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return flat.unflatten(0, values.shape)

    noise = torch.full_like(polar, cond_aug)
    return torch.cat([sinusoid(noise, 256), sinusoid(polar, 512), sinusoid(azimuth, 512)], dim=-1)


@torch.no_grad()
def deepened(unet: SV3DUNet) -> SV3DUNet:
    """The U-Net with one more layer (residual block and attention) at every level,
    which begins as the old one.

    A new layer adds zero at first. On the way up it stands second, where the skip
    connection of the layer before the new one on the way down arrives, so that every
    old layer still reads what it has always read.
    """
    layers = unet.config.layers_per_block
    new = SV3DUNet.from_config({**unet.config, "layers_per_block": layers + 1})

    def moved(name: str) -> str:  # layers 1, 2, ... of the way up become 2, 3, ...
        return re.sub(
            r"(up_blocks\.\d+\.(?:resnets|attentions)\.)([1-9])",
            lambda m: m[1] + str(int(m[2]) + 1),
            name,
        )

    new.load_state_dict(
        {moved(name): value for name, value in unet.state_dict().items()}, strict=False
    )
    for blocks, place in ((new.down_blocks, layers), (new.up_blocks, 1)):
        for block in blocks:
            _silence(block.resnets[place])
            for attention in (
                block.attentions[place : place + 1] if hasattr(block, "attentions") else ()
            ):
                attention.proj_out.weight.zero_(), attention.proj_out.bias.zero_()
    return new


def _silence(resnet: SpatioTemporalResBlock) -> None:
    """Let a residual block hand its input through, without the channels of a skip
    connection.
    """
    for part in (resnet.spatial_res_block, resnet.temporal_res_block):
        part.conv2.weight.zero_(), part.conv2.bias.zero_()
    shortcut = resnet.spatial_res_block.conv_shortcut
    # [out, hidden + skip, 1, 1], and the hidden channels are as many as out
    if shortcut is not None:
        nn.init.dirac_(shortcut.weight), shortcut.bias.zero_()


def build_unet(config: Config) -> SV3DUNet:
    """A freshly initialised U-Net."""
    down = [DOWN if attends else DOWN_PLAIN for attends in config.unet_attention]
    up = [UP if attends else UP_PLAIN for attends in config.unet_attention[::-1]]
    return SV3DUNet(
        sample_size=config.latent_size,
        in_channels=8,
        out_channels=4,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers,
        num_attention_heads=config.unet_heads,
        cross_attention_dim=config.clip_dim,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=256 + 512 + 512,
        num_frames=config.num_frames,
        resnet_eps=config.resnet_eps,
    )
