"""One image -> 3D Gaussians: the trained chain behind one object.

    pipe = GSV3DPipeline.from_pretrained("data/checkpoints/tiny")
    gaussians = pipe("mug.png")

The world of the result is z up, and turned so that the input was seen from azimuth 0
(from the +x side).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .backprojection import back_project
from .cameras import Cameras, orbit_cameras, sv3d_azimuths
from .config import Config
from .data.elevation import Elevation, load_elevation
from .diffusion import Condition, sample, sampler_settings
from .encoders import condition_from, image_features
from .gaussians import Gaussians
from .images import VISIBLE_ALPHA, ImageSource, prepare_condition
from .lora import load_lora, merged_lora
from .system.arguments import real, whole
from .system.errors import UserError
from .system.paths import find
from .vae import decode_scaled
from .weights.checkpoint import load_config, load_model

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    from .decoder import GaussianDecoder
    from .unet import SV3DUNet
    from .vae import GroupedVAE


MAX_FRAMES = 360  # views of an orbit, one a degree
MAX_LORA_SCALE = 10.0
MAX_SEED = 2**64 - 1  # torch's generators take 64 bits


@dataclass
class Generation:
    """One object with every intermediate of the chain."""

    image: Tensor  # [S, S, 3] in [0, 1] on white, the condition R
    elevation: float  # degrees, of its camera, as given or estimated
    latents: Tensor  # [N, 4, h, w], scaled
    cameras: Cameras  # the N views of the orbit
    gaussians: Gaussians  # the decoder's, N equal shares; then those of `cover`
    decoded: int  # how many the decoder made


@dataclass(frozen=True)
class Settings:
    """The numbers of one call of `GSV3DPipeline.generate`, checked."""

    elevation: float | None
    num_frames: int
    steps: int
    guidance: float
    lora_scale: float | None
    seed: int


def settings_for(
    config: Config,
    *,
    elevation: float | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    lora_scale: float | None = None,
    seed: int = 0,
) -> Settings:
    """What is given, checked, and the configuration's numbers for what is not.

    Raises UserError, one sentence, for a number that cannot be used. It needs no
    weights, so a command can ask before it opens any.
    """
    steps, guidance = sampler_settings(config, steps, guidance)
    if elevation is not None:
        elevation = real("elevation", elevation, -90.0, 90.0, ends=False)
    if lora_scale is not None:
        lora_scale = real("lora_scale", lora_scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
    frames = config.num_frames if num_frames is None else num_frames
    frames = whole("num_frames", frames, 1, MAX_FRAMES)
    seed = whole("seed", seed, 0, MAX_SEED)
    return Settings(elevation, frames, steps, guidance, lora_scale, seed)


class GSV3DPipeline:
    """The models of one checkpoint; use `pipe(image)` or `pipe.generate(image)`."""

    def __init__(
        self,
        config: Config,
        vae: GroupedVAE,
        clip: CLIPVisionModelWithProjection,
        unet: SV3DUNet,
        decoder: GaussianDecoder,
        dino: Dinov2Model | None = None,
        estimator: Elevation | None = None,
    ):
        self.config = config
        self.vae = vae
        self.clip = clip
        self.unet = unet
        self.decoder = decoder
        self.dino = dino
        self.estimator = estimator

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        lora: bool = True,
        device: str | None = None,
        download: bool = False,
    ) -> GSV3DPipeline:
        """Open a checkpoint folder; `lora` switches its distillation on.

        download: take what is no folder here for a name on the Hugging Face Hub, and
        fetch it. Nothing is fetched otherwise.
        Raises MissingFile or UserError where the folder or one of its models is
        missing.
        """
        name, folder = str(folder), find(folder)
        if download and not folder.exists():
            from .weights.sv3d import fetch_checkpoint

            folder = fetch_checkpoint(name)
        config = load_config(folder)
        names = ["vae", "clip", "unet", "decoder"] + ([] if config.dino == "none" else ["dino"])
        models = {name: load_model(folder, name) for name in names}
        models = {name: settled(model, device) for name, model in models.items()}
        if lora:
            load_lora(models["unet"], Path(folder) / "lora")
        return cls(config, **models, estimator=load_elevation(folder))

    @classmethod
    def from_sv3d(
        cls,
        source: str | Path,
        *,
        checkpoint: str | Path | None = None,
        config: Config | None = None,
        device: str | None = None,
        **options,
    ) -> GSV3DPipeline:
        """SV3D's published weights with the decoder and LoRA of a GSV3D checkpoint.

        source: `sv3d_p.safetensors`, a folder in diffusers' layout, or a Hub name
            (docs/weights.md); nothing is fetched without download=True.
        checkpoint: without one the decoder is freshly initialised, with a warning.
        config: default, the checkpoint's or the preset `paper`.
        options: lora, svd, dino, download of `sv3d.load_sv3d`.
        """
        from .weights.sv3d import load_sv3d

        if config is None and checkpoint is not None:
            config = load_config(checkpoint)
        config, models = load_sv3d(source, config, checkpoint=checkpoint, **options)
        models = {name: model and settled(model, device) for name, model in models.items()}
        return cls(config, **models)

    def __call__(self, image: ImageSource, **options) -> Gaussians:
        """The object in `image` as Gaussians; options of `generate`."""
        return self.generate(image, **options).gaussians

    @torch.no_grad()
    def generate(
        self,
        image: ImageSource,
        *,
        mask: Tensor | None = None,
        elevation: float | None = 15.0,
        num_frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        lora_scale: float | None = None,
        back_projection: bool = True,
        seed: int = 0,
        progress: bool = True,
        callback: Callable[[int, Tensor, Tensor], object] | None = None,
    ) -> Generation:
        """Run the chain and keep its intermediates.

        A call depends on its arguments alone and leaves the pipeline as it was. So
        several may run at once, in threads or inside a callback.

        image: a path, PIL image or array; or the condition image, see
            `condition_image`.
        mask: the alpha [S, S, 1] of a condition image; a picture brings its own.
        elevation: degrees, of the camera that took the input; None estimates it.
        num_frames: N, views of the orbit.
        steps, guidance: of the sampler; defaults from the configuration.
        lora_scale: 0 = without the distillation; None = as set in the U-Net.
        back_projection: the input's own outline and colours (`backprojection.py`).
        callback(i, z, z_hat): sees every step of the sampler, batches [1, N, 4, h, w].
        Raises UserError, before any model runs, for numbers that cannot be used.
        """
        asked = settings_for(
            self.config,
            elevation=elevation,
            num_frames=num_frames,
            steps=steps,
            guidance=guidance,
            lora_scale=lora_scale,
            seed=seed,
        )
        rgb, mask = self.condition_image(image, mask)
        elevation = self.elevation_of(rgb) if asked.elevation is None else asked.elevation
        azimuths = sv3d_azimuths(asked.num_frames)
        cameras = orbit_cameras(azimuths, elevation, self.config.image_size)
        latents = sample(
            merged_lora(self.unet, asked.lora_scale),
            self.condition(rgb, elevation, asked.num_frames),
            self.config,
            generator=torch.Generator().manual_seed(asked.seed),
            steps=asked.steps,
            guidance=asked.guidance,
            progress=progress,
            callback=callback,
        )[0]
        gaussians = self.gaussians_from(latents, cameras, rgb).check_finite("the object")
        decoded = len(gaussians)
        if back_projection:  # from the last view of the orbit, which is the input's
            gaussians = back_project(gaussians, cameras[-1], rgb, mask)
        return Generation(rgb, elevation, latents, cameras, gaussians, decoded)

    def condition_image(
        self, image: ImageSource, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """R [S, S, 3] in [0, 1] on white, and its alpha [S, S, 1].

        A picture goes through `prepare_condition`. A tensor is taken for R itself, with
        `mask` for its alpha where that is known.
        """
        size = self.config.image_size
        if not isinstance(image, Tensor) and mask is None:
            return prepare_condition(image, size)
        is_mask = is_picture(mask, size, 1) and bool((mask >= VISIBLE_ALPHA).any())
        if mask is not None and not (is_mask and isinstance(image, Tensor)):
            raise UserError(
                f"A mask, float [{size}, {size}, 1] in [0, 1] and not empty, goes with a condition "
                "image, both from `prepare_condition`. A picture's own mask is its alpha channel."
            )
        if not (is_picture(image, size, 3) and image.is_floating_point()):
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else image
            raise UserError(
                f"A tensor is taken for the condition image, float [{size}, {size}, 3] in [0, 1] "
                f"on white; got {found}. Give other pictures as a path, a PIL image or an array."
            )
        return image.float(), None if mask is None else mask.float()

    def elevation_of(self, rgb: Tensor) -> float:
        """Estimated elevation in degrees of the camera behind R [S, S, 3]."""
        if self.estimator is None:
            raise UserError(
                "This checkpoint cannot estimate elevations: give one in degrees, or fit an "
                "estimator with `python tools/fit_elevation.py`."
            )
        return float(self.estimator(rgb[None])[0])

    def condition(self, rgb: Tensor, elevation: float, frames: int) -> Condition:
        """SV3D's condition of R [S, S, 3] for a static orbit of `frames` views."""
        device = self.unet.device
        polar = torch.full((1, frames), 90.0 - elevation).deg2rad().to(device)
        azimuth = sv3d_azimuths(frames)[None].deg2rad().to(device)
        image = rgb[None].to(device)
        return condition_from(image, polar, azimuth, self.vae, self.clip, self.config)

    @torch.no_grad()
    def gaussians_from(self, latents: Tensor, cameras: Cameras, rgb: Tensor) -> Gaussians:
        """The decoder alone: latents [N, 4, h, w], cameras, R [S, S, 3]."""
        device = latents.device
        features = image_features(self.dino, rgb[None].to(device))
        return self.decoder(latents[None], [cameras.to(device)], features)[0]

    @torch.no_grad()
    def views_from(self, latents: Tensor) -> Tensor:
        """The VAE's multi-view images [N, S, S, 3] of latents [N, 4, h, w]."""
        return decode_scaled(self.vae, latents, chunk=self.config.vae_clip)


def settled(model: Any, device: str | None) -> Any:
    """The model without gradients on a device, by default a GPU if there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.requires_grad_(False).to(device)


def is_picture(values: object, size: int, channels: int) -> TypeGuard[Tensor]:
    """Whether it is a tensor [size, size, channels] of numbers in [0, 1]."""
    if not isinstance(values, Tensor) or values.shape != (size, size, channels):
        return False
    return bool(((values >= 0) & (values <= 1)).all())
