"""A world small enough for unit tests: balls seen by exact ray casting, and models of a
few thousand weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsv3d_lib.cameras import Cameras, orbit_cameras, ray_grid
from gsv3d_lib.cluster.plan import Ledger
from gsv3d_lib.config import Config, Schedule, preset
from gsv3d_lib.data.dataset import ObjectViews, ViewTensors
from gsv3d_lib.data.examples import Orbits, make_variants

SIZE = 32
SCALE = 0.18215
# (centre, radius, colour); no plane of symmetry, so that a mirrored or turned view is
# another picture
BALLS = (
    ((0.0, 0.0, 0.1), 0.45, (0.9, 0.2, 0.1)),
    ((0.5, 0.25, -0.2), 0.3, (0.1, 0.7, 0.2)),
    ((-0.3, 0.5, 0.4), 0.25, (0.2, 0.3, 0.9)),
)


def ball_pictures(cameras: Cameras, balls=BALLS) -> tuple[Tensor, Tensor, Tensor]:
    """Exact rgb [V, H, W, 3] on white, alpha and z-depth [V, H, W, 1] of coloured
    balls.
    """
    origins, directions = ray_grid(cameras, cameras.height, cameras.width)
    nearest = torch.full(origins.shape[:-1], torch.inf)
    rgb = torch.ones(*origins.shape)
    for centre, radius, color in balls:
        to_centre = torch.tensor(centre) - origins
        along = (to_centre * directions).sum(-1)
        inside = radius**2 - (to_centre**2).sum(-1) + along**2
        distance = torch.where(inside > 0, along - inside.clamp(min=0).sqrt(), torch.inf)
        rgb = torch.where((distance < nearest)[..., None], torch.tensor(color), rgb)
        nearest = torch.minimum(nearest, distance)
    alpha = torch.isfinite(nearest)[..., None].float()
    forward = cameras.c2w()[:, None, None, :3, 2]
    depth = nearest[..., None] * (directions * forward).sum(-1, keepdim=True)
    return rgb, alpha, torch.where(alpha > 0, depth, 0)


def moved(balls, move):
    """The balls with every centre passed through `move`."""
    return tuple((move(*centre), radius, color) for centre, radius, color in balls)


def turned(balls, degrees: float):
    """The balls turned about the z axis."""
    c, s = (
        torch.deg2rad(torch.tensor(degrees)).cos().item(),
        torch.deg2rad(torch.tensor(degrees)).sin().item(),
    )
    return moved(balls, lambda x, y, z: (c * x - s * y, s * x + c * y, z))


def dataset_angles() -> tuple[Tensor, Tensor]:
    """24 views as every dataset folder has them: a ring at elevation 15, then 8 free
    ones.
    """
    free = torch.arange(8)
    azimuths = torch.cat([torch.arange(16) * 22.5, (free * 47.0 + 5) % 360])
    return azimuths, torch.cat([torch.full((16,), 15.0), free * 6.0 - 8])


def object_views(id: str = "balls", turn: float = 0.0, size: int = 2 * SIZE) -> ObjectViews:
    """One ball scene as a dataset folder stores it."""
    azimuths, elevations = dataset_angles()
    cameras = orbit_cameras(azimuths, elevations, size)
    rgb, alpha, depth = ball_pictures(cameras, turned(BALLS, turn))
    rgba = (torch.cat([rgb * alpha, alpha], -1) * 255).round().to(torch.uint8).numpy()
    return ObjectViews(
        id, rgba, depth[..., 0].numpy(), cameras, azimuths.numpy(), elevations.numpy()
    )


def ball_views(objects: int = 2, size: int = SIZE) -> ViewTensors:
    """`objects` ball scenes, each turned by another angle, as training sees them."""
    azimuths, elevations = dataset_angles()
    cameras = orbit_cameras(azimuths, elevations, size)
    parts = [ball_pictures(cameras, turned(BALLS, 40.0 * k)) for k in range(objects)]
    rgb, alpha, depth = (torch.stack(column) for column in zip(*parts, strict=True))
    columns = ((rgb * 255).round().to(torch.uint8), (alpha * 255).to(torch.uint8), depth)
    angles = (t.expand(objects, -1).contiguous() for t in (azimuths, elevations))
    return ViewTensors([f"balls_{k}" for k in range(objects)], *columns, *angles)


def tiny_config(**changes) -> Config:
    """The `tiny` preset at the smallest sizes that its classes allow, its noise that of
    SV3D.
    """
    schedule = Schedule(steps=4, batch=2, lr=1e-3, warmup=0)
    smallest = dict(
        image_size=SIZE,
        num_frames=4,
        vae_channels=(32, 32, 32, 32),
        vae_clip=2,
        clip_size=SIZE,
        clip_patch=16,
        clip_width=32,
        clip_layers=1,
        clip_heads=2,
        clip_mlp=32,
        clip_dim=32,
        unet_channels=(32, 64),
        unet_heads=(1, 2),
        dino_size=SIZE,
        dino_patch=16,
        dino_width=32,
        dino_layers=1,
        dino_heads=2,
        decoder_width=32,
        decoder_layers=2,
        decoder_heads=2,
        decoder_upsample=2,
        decoder_planes=4,
        cond_dropout=0.1,
        log_sigma_mean=0.7,
        log_sigma_std=1.6,
        sigma_min=0.002,
        sigma_max=700.0,
        sampling_steps=3,
        copies=1,
        view_counts=(2, 4),
        target_views=2,
        lora_rank=2,
    )
    stages = ("vae_schedule", "dino_schedule", "diffusion_schedule", "stage1", "stage2")
    return preset("tiny", **(smallest | {name: schedule for name in stages} | changes))


def random_orbits(views: ViewTensors, copies: int = 1, seed: int = 0) -> Orbits:
    """Orbits with random latents of unit variance (after scaling), which need no
    trained VAE.
    """
    variants = make_variants(len(views), copies, seed)
    shape = (len(variants), 16, 4, views.rgb.shape[-2] // 8, views.rgb.shape[-2] // 8)
    return Orbits(views, variants, randn(*shape, seed=seed) / SCALE, SCALE)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(model, seed: int = 0, size: float = 0.05):
    """Move every parameter a little, so that layers which start at zero take part.
    Returns the model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def kept_bytes(model, forward) -> int:
    """What autograd really keeps in a forward pass on the CPU, parameters left out."""
    ledger = Ledger(model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda t: t):
        result = forward()
    assert result.requires_grad
    return ledger.bytes


def descend(stage, batch: dict[str, Tensor], optimizer, steps: int = 6) -> list[float]:
    """The losses of a few optimiser steps on one batch."""
    losses = []
    for _ in range(steps):
        loss, _ = stage(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def one_sentence(error) -> str:
    """What a caught error says, which is short and on one line."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    return text
