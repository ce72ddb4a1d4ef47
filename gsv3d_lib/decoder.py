"""The Gaussian Splatting Decoder: N multi-view latents -> 3D Gaussians.

    latents + Plücker rays -> tokens
    -> L x (self-attention over all views, cross-attention to DINO, MLP)
    -> linear + pixel shuffle -> heads -> one Gaussian per output pixel

Views are told apart by their cameras alone, so N may change at run time. Two options
are not in the paper, and off in its preset: `planes` > 0 adds a plane sweep to the
tokens (`plane_sweep`), a prior that makes short trainings work; `refiner_channels`
upsamples by convolutions (`Refiner`). Sizes and sources: docs/method.md.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .attention import attend, full_precision, join_heads, split_heads
from .cameras import Cameras, pluecker_rays, ray_grid
from .config import Config
from .gaussians import Gaussians

# channels of the output map
DEPTH = slice(0, 1)
RGB = slice(1, 4)
OPACITY = slice(4, 5)
SCALE = slice(5, 8)
QUATERNION = slice(8, 12)
OUTPUTS = 12
SWEEP = ("mean", "deviation", "smallest", "largest")  # of each channel, by `plane_sweep`
HIDDEN = 32  # channels between pixel shuffle and heads


class Attention(nn.Module):
    """Multi-head attention of queries [B, T, C] over a context [B, S, D]."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(context_width or width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), k, v))
        return self.to_out(join_heads(attend(q, k, v)))


class Block(nn.Module):
    """Self-attention over all views -> cross-attention to DINO -> MLP, pre-norm."""

    def __init__(self, width: int, heads: int, context_width: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.cross = None
        if context_width is not None:
            self.norm2 = nn.LayerNorm(width)
            self.cross = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width, width)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed)
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class GaussianDecoder(ModelMixin, ConfigMixin):
    """Latents [B, N, 4, h, w] and N cameras per object -> B `Gaussians`.

    Each has N (h up / patch) (w up / patch) splats.
    """

    config: Any  # what __init__ was called with, by name (diffusers' FrozenDict)
    _supports_gradient_checkpointing = True  # `enable_gradient_checkpointing()` of diffusers

    @register_to_config
    def __init__(
        self,
        width: int = 192,
        layers: int = 6,
        heads: int = 6,
        patch: int = 1,
        upsample: int = 4,
        context_width: int | None = 128,
        object_radius: float = 1.0,
        scale_range: tuple[float, float] = (5e-4, 2e-2),
        planes: int = 0,
        refiner_channels: tuple[int, ...] = (),
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.sweep = mlp(planes * 4 * len(SWEEP), width, width) if planes else None
        self.embed = nn.Conv2d(4 + 6, width, patch, stride=patch)
        self.context_norm = nn.LayerNorm(context_width) if context_width is not None else None
        self.blocks = nn.ModuleList(Block(width, heads, context_width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        if refiner_channels:
            self.refiner = Refiner(width, refiner_channels)
        else:
            cells = nn.Linear(width, HIDDEN * upsample**2)
            self.upsampler = nn.Sequential(cells, nn.Unflatten(-1, (HIDDEN, -1)))
        features = refiner_channels[-1] if refiner_channels else HIDDEN
        self.to_maps = nn.Conv2d(features, OUTPUTS, 3, padding=1)
        self._start_as_faint_plane()

    @torch.no_grad()
    def _start_as_faint_plane(self) -> None:
        """Zero depth, scale and opacity heads.

        So it begins with faint Gaussians at the camera's distance: a plane through the
        object.
        """
        weight = self.to_maps.weight
        bias = cast(Tensor, self.to_maps.bias)
        for channels in (DEPTH, OPACITY, SCALE):
            weight[channels].zero_()
            bias[channels].zero_()
        bias[QUATERNION].copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))

    def forward(
        self, latents: Tensor, cameras: list[Cameras], features: Tensor | None = None
    ) -> list[Gaussians]:
        """Decode B objects.

        latents: [B, N, 4, h, w], scaled by 0.18215.  cameras: B batches of N.
        features: F_DINO [B, T, context_width]; not used by a decoder built without
            DINO.
        """
        maps, origins, directions = self.output_maps(latents, cameras, features)
        return [self.to_gaussians(*parts) for parts in zip(maps, origins, directions)]

    def output_maps(self, latents: Tensor, cameras: list[Cameras], features: Tensor | None = None):
        """Raw heads [B, N, H, W, 12] and their rays.

        The rays are origins and unit directions, [B, N, H, W, 3] each.
        """
        self._check(latents, cameras, features)
        batch, frames, _, height, width = latents.shape
        with full_precision(latents.device):
            rays = torch.stack([pluecker_rays(c, height, width) for c in cameras])
        x = torch.cat([latents, rays.movedim(-1, 2).to(latents)], dim=2)  # [B, N, 10, h, w]
        x = self.embed(x.flatten(0, 1))  # [B * N, C, h', w']
        rows, columns = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # [B * N, h' w', C]
        tokens = tokens.unflatten(0, (batch, frames)).flatten(1, 2)  # [B, N h' w', C]
        if self.sweep is not None:
            grid = rows, columns
            with full_precision(latents.device):
                swept = [plane_sweep(*p, grid, self.config) for p in zip(latents, cameras)]
            tokens = tokens + self.sweep(torch.stack(swept))
        context = None if self.context_norm is None else self.context_norm(features)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, context)  # pyright: ignore
            else:
                tokens = block(tokens, context)
        x = self._upsampled(self.norm(tokens), latents.flatten(0, 1), rows, columns)
        with full_precision(latents.device):
            x = x.to(self.to_maps.weight.dtype)
            maps = self.to_maps(F.silu(x))  # [B * N, 12, H, W]
            maps = maps.unflatten(0, (batch, frames)).movedim(2, -1)
            grids = [ray_grid(c, *maps.shape[2:4]) for c in cameras]
        return maps, *(torch.stack(parts).to(maps) for parts in zip(*grids))

    def _upsampled(self, tokens: Tensor, latents: Tensor, rows: int, columns: int) -> Tensor:
        """[B, N h' w', C], latents [B * N, 4, h, w] -> [B * N, F, H, W]."""
        if self.config.refiner_channels:
            grid = tokens.reshape(len(latents), rows, columns, -1).movedim(-1, 1)
            return self.refiner(grid, latents)
        cells = self.upsampler(tokens).flatten(2)
        grid = cells.reshape(len(latents), rows, columns, -1).movedim(-1, 1)
        return F.pixel_shuffle(grid, self.config.upsample)

    def to_gaussians(self, maps: Tensor, origins: Tensor, directions: Tensor) -> Gaussians:
        """Activations of one scene: maps [N, H, W, 12], rays [N, H, W, 3]."""
        distance = ray_distance(maps[..., DEPTH], origins, self.config.object_radius)
        low, high = (math.log(2 * self.config.object_radius * s) for s in self.config.scale_range)
        return Gaussians(
            means=(origins + distance * directions).reshape(-1, 3),
            quats=F.normalize(maps[..., QUATERNION], dim=-1).reshape(-1, 4),
            scales=(low + (high - low) * maps[..., SCALE].sigmoid()).exp().reshape(-1, 3),
            opacities=(maps[..., OPACITY] - 2).sigmoid().reshape(-1),
            colors=maps[..., RGB].sigmoid().reshape(-1, 3),
        )

    @torch.no_grad()
    def grown_to(self, config: Config) -> GaussianDecoder:
        """This decoder if it fits `config`, else a larger one with its weights.

        Pictures may have twice the side (`doubled`). A new refiner may take the place
        of the linear upsampler; a decoder that already has one stays as large as it is.
        """
        if self.config.refiner_channels:
            return self
        grown = doubled(self) if config.decoder_patch == 2 * self.config.patch else self
        if not config.decoder_refiner:
            return grown
        new = grown.altered(
            upsample=config.decoder_upsample, refiner_channels=config.decoder_refiner
        )
        kept = grown.state_dict().items()
        kept = {n: t for n, t in kept if not n.startswith(("upsampler", "to_maps"))}
        new.load_state_dict(kept, strict=False)
        return new

    def altered(self, **settings) -> GaussianDecoder:
        """A new decoder, like this one but for some settings."""
        return cast(GaussianDecoder, GaussianDecoder.from_config({**self.config, **settings}))

    def _check(self, latents: Tensor, cameras: list[Cameras], features: Tensor | None) -> None:
        if latents.ndim != 5 or latents.shape[2] != 4:
            raise ValueError(f"latents are [B, N, 4, h, w]; got {tuple(latents.shape)}.")
        if len(cameras) != len(latents) or any(len(c) != latents.shape[1] for c in cameras):
            raise ValueError(
                f"{len(latents)} objects of {latents.shape[1]} views need as many cameras; "
                f"got {[len(c) for c in cameras]}."
            )
        width = self.config.context_width
        got = None if features is None else tuple(features.shape)
        if width is not None and (got is None or (got[0], got[-1]) != (len(latents), width)):
            raise ValueError(
                f"This decoder needs DINO features [{len(latents)}, T, {width}]; got {got}."
            )


class Refiner(nn.Module):
    """An upsampler of convolutions that doubles the grid of tokens once per level.

    A token holds what attention found out about 16 x 16 pixels or so. Fine detail is in
    the latents themselves, so each level sees them again beside its own features.
    Tokens [M, C, h', w'], latents [M, 4, h, w] -> [M, channels[-1], 2^L h', 2^L w'].
    """

    def __init__(self, width: int, channels: tuple[int, ...]):
        super().__init__()
        inputs = [width, *channels[:-1]]
        self.doubles = nn.ModuleList(nn.Conv2d(i, 4 * c, 1) for i, c in zip(inputs, channels))
        self.blocks = nn.ModuleList(RefinerBlock(c + 4, c) for c in channels)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        for double, block in zip(self.doubles, self.blocks):
            x = F.pixel_shuffle(double(x), 2)
            beside = F.interpolate(latents.to(x), size=x.shape[-2:], mode="nearest")
            x = block(torch.cat([x, beside], dim=1))
        return x


class RefinerBlock(nn.Module):
    """Two convolutions; the second adds nothing at first.

    [M, inputs, H, W] -> [M, C, H, W]
    """

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.inner = nn.Conv2d(inputs, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.outer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + self.outer(F.silu(self.norm(x)))


def plane_sweep(latents: Tensor, cameras: Cameras, grid: tuple[int, int], config: Any) -> Tensor:
    """What the N views say about points along each token's ray [ours].

    Attention is slow to find this geometry by itself. Each ray of the h' x w' grid
    carries `planes` points through the object's ball. A point is projected into all
    views, the latents are read there, and four numbers over the views are kept: mean,
    deviation, smallest and largest. On a surface the views agree. Off the object at
    least one of them sees background (the visual hull). No parameters; differentiable
    in the latents. latents [N, 4, h, w] -> [N h' w', planes * 16]
    """
    origins, directions = (t.reshape(-1, 1, 3) for t in ray_grid(cameras, *grid))
    depths = torch.linspace(-1, 1, config.planes, device=origins.device)[:, None]
    depths = origins.norm(dim=-1, keepdim=True) + depths * config.object_radius
    points = origins + depths * directions  # [T, planes, 3]
    rotations = cameras.viewmats[:, :3, :3]
    shifts = cameras.viewmats[:, :3, 3]
    local = torch.einsum("vij,tpj->vtpi", rotations, points) + shifts[:, None, None]
    pixels = torch.einsum("vij,vtpj->vtpi", cameras.Ks, local / local[..., 2:])[..., :2]
    size = pixels.new_tensor([cameras.width, cameras.height])
    places = (2 * pixels / size - 1).to(latents)  # the picture spans -1 to 1
    read = F.grid_sample(latents, places, align_corners=False)  # [N, 4, T, planes]
    statistics = torch.cat([read.mean(0), deviation(read), read.amin(0), read.amax(0)])
    return statistics.permute(1, 2, 0).flatten(1)  # from [16, T, planes]


def deviation(values: Tensor) -> Tensor:
    """`values.std(0, correction=0)`, [N, ...] -> [...], much faster on a CPU.

    Where all values agree the gradient is 0, as that of `std`: the clamp keeps the
    root's infinite slope away. What lies below 1e-6 is only the rounding of the mean.
    """
    variance = (values - values.mean(0)).square().mean(0)
    return variance.clamp(min=1e-12).sqrt()


def ray_distance(logits: Tensor, origins: Tensor, radius: float) -> Tensor:
    """Depth head [..., 1] -> camera distance + (2 sigmoid - 1) * object radius."""
    return origins.norm(dim=-1, keepdim=True) + (2 * logits.sigmoid() - 1) * radius


@torch.no_grad()
def doubled(decoder: GaussianDecoder) -> GaussianDecoder:
    """The decoder for pictures of twice the side, at first with the same answers.

    It has as many tokens, each of 2 x 2 times the latents and the Gaussians. The first
    layer averages the new latents of what was one, and each old cell of the last layer
    is repeated 2 x 2 times. A step costs attention what it did: the tokens are as many.
    """
    side = decoder.config.upsample
    new = decoder.altered(patch=2 * decoder.config.patch, upsample=2 * side)
    state = decoder.state_dict()
    first = state["embed.weight"]
    state["embed.weight"] = first.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4
    for name in ("upsampler.0.weight", "upsampler.0.bias"):
        cells = state[name].unflatten(0, (HIDDEN, side, side))
        state[name] = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(0, 2)
    new.load_state_dict(state)
    return new


def build_decoder(config: Config) -> GaussianDecoder:
    """A freshly initialised decoder; without cross-attention for dino = "none"."""
    return GaussianDecoder(
        width=config.decoder_width,
        layers=config.decoder_layers,
        heads=config.decoder_heads,
        patch=config.decoder_patch,
        upsample=config.decoder_upsample,
        context_width=None if config.dino == "none" else config.dino_width,
        object_radius=config.object_radius,
        scale_range=config.scale_range,
        planes=config.decoder_planes,
        refiner_channels=config.decoder_refiner,
    )
