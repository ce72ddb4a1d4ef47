"""One image -> 3D Gaussians: the trained chain behind one object.

    pipe = GSV3DPipeline.from_pretrained("data/checkpoints/tiny")
    gaussians = pipe("mug.png")

The world of the result is z up and turned so that the input was seen from azimuth 0
(from the +x side).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .backprojection import back_project
from .cameras import Cameras, orbit_cameras, sv3d_azimuths
from .config import Config
from .data.elevation import Elevation, load_elevation
from .diffusion import Condition, sample, sampler_settings
from .encoders import condition_from, image_features
from .gaussians import Gaussians
from .images import VISIBLE_ALPHA, prepare_condition
from .lora import load_lora, merged_lora
from .system.arguments import real, whole
from .system.errors import UserError
from .system.paths import find
from .vae import decode_scaled
from .weights.checkpoint import load_config, load_model


@dataclass
class Generation:
    """One object with every intermediate of the chain.

    image [S, S, 3] in [0, 1] on white, the condition R; elevation: degrees, of its
    camera, as given or estimated; latents [N, 4, h, w] scaled; cameras: the N views of
    the orbit; gaussians: the object.
    """

    image: Tensor
    elevation: float
    latents: Tensor
    cameras: Cameras
    gaussians: Gaussians


MAX_FRAMES = 360  # views of an orbit, one a degree
MAX_LORA_SCALE = 10.0
MAX_SEED = 2**64 - 1  # torch's generators take 64 bits


@dataclass(frozen=True)
class Settings:
    """The numbers of one call of `GSV3DPipeline.generate`, checked; see `settings_for`."""

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
    """What is given, and the configuration's numbers for what is not.

    Raises UserError, one sentence, for a number that cannot be used. It needs no
    weights, so a command can ask before it opens any.
    """
    steps, guidance = sampler_settings(config, steps, guidance)
    frames = config.num_frames if num_frames is None else num_frames
    if elevation is not None:
        elevation = real("elevation", elevation, -90.0, 90.0, ends=False)
    if lora_scale is not None:
        lora_scale = real("lora_scale", lora_scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
    return Settings(
        elevation=elevation,
        num_frames=whole("num_frames", frames, 1, MAX_FRAMES),
        steps=steps,
        guidance=guidance,
        lora_scale=lora_scale,
        seed=whole("seed", seed, 0, MAX_SEED),
    )


class GSV3DPipeline:
    """The models of one checkpoint and the two ways to use them: `pipe(image)` and
    `pipe.generate(image)`.
    """

    def __init__(
        self,
        config: Config,
        vae,
        clip,
        unet,
        decoder,
        dino=None,
        estimator: Elevation | None = None,
    ):
        self.config, self.estimator = config, estimator
        self.vae, self.clip, self.unet, self.decoder, self.dino = vae, clip, unet, decoder, dino

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        lora: bool = True,
        device: str | None = None,
        download: bool = False,
    ) -> GSV3DPipeline:
        """Open a checkpoint folder as `train.py` writes it; with `lora`, its geometric
        distillation is switched on.

        download: take what is no folder here for a name on the Hugging Face Hub, and
        fetch it. Nothing is fetched otherwise.
        Raises FileNotFoundError with what to do when the folder or one of its models is
        missing.
        """
        name, folder = str(folder), find(folder)
        if download and not folder.exists():
            from .weights.sv3d import fetch_checkpoint

            folder = fetch_checkpoint(name)
        config = load_config(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        names = ["vae", "clip", "unet", "decoder"] + ([] if config.dino == "none" else ["dino"])
        models = {name: load_model(folder, name).requires_grad_(False).to(device) for name in names}
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
        """SV3D's published weights (docs/weights.md) with the decoder and LoRA of a
        GSV3D checkpoint folder.

        source: `sv3d_p.safetensors`, a folder in diffusers' layout, or a Hub name;
            nothing is fetched without download=True.
        checkpoint: without one the decoder is freshly initialised, with a warning.
        config: default, the checkpoint's or the preset `paper`.  options: lora, svd, dino, download of `sv3d.load_sv3d`.
        Raises FileNotFoundError or ValueError with what to do.
        """
        from .weights.sv3d import load_sv3d

        if config is None and checkpoint is not None:
            config = load_config(checkpoint)
        config, models = load_sv3d(source, config, checkpoint=checkpoint, **options)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        for name, model in models.items():
            models[name] = model if model is None else model.requires_grad_(False).to(device)
        return cls(config, **models)

    def __call__(self, image, **options) -> Gaussians:
        """The object in `image` (a path, PIL image or array) as Gaussians; see
        `generate` for the options.
        """
        return self.generate(image, **options).gaussians

    @torch.no_grad()
    def generate(
        self,
        image,
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
        callback=None,
    ) -> Generation:
        """Run the chain and keep its intermediates.

        A call depends on its arguments alone and leaves the pipeline as it was: several
        may run at once, in threads or inside a callback.

        image: a path, PIL image or array; or the condition image itself, see
            `condition_image`.
        mask: the alpha [S, S, 1] of a condition image; a picture brings its own.
        elevation: degrees, of the camera that took the input; None estimates it, where
            the checkpoint has an estimator.
        num_frames: N, views of the orbit.
        steps, guidance: of the sampler; defaults from the configuration.
        lora_scale: 0 = without the distillation; None = as set in the U-Net, 1 unless
            changed.
        back_projection: the input's own outline and colours where its camera sees the
            object, see `backprojection.py`.
        callback(i, z, z_hat): sees every step of the sampler, batches of one orbit [1,
        N, 4, h, w].
        Raises UserError, before any model runs, for numbers that cannot be used
        (`settings_for`).
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
        if back_projection:
            # the last view of an orbit is the input's
            gaussians = back_project(gaussians, cameras[-1], rgb, mask)
        return Generation(rgb, elevation, latents, cameras, gaussians)

    def condition_image(self, image, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """R [S, S, 3] in [0, 1] on white and its alpha [S, S, 1]: a picture through
        `prepare_condition`; a tensor is taken for R itself, with `mask` for its alpha,
        where that is known.
        """
        size = self.config.image_size
        if not isinstance(image, Tensor) and mask is None:
            return prepare_condition(image, size)
        if mask is not None and not (
            isinstance(image, Tensor)
            and isinstance(mask, Tensor)
            and mask.shape == (size, size, 1)
            and ((mask >= 0) & (mask <= 1)).all()
            and (mask >= VISIBLE_ALPHA).any()
        ):
            raise UserError(
                f"A mask, float [{size}, {size}, 1] in [0, 1] and not empty, goes with a condition image, both from "
                "`prepare_condition`. A picture's own mask is its alpha channel."
            )
        if (
            image.shape != (size, size, 3)
            or not image.is_floating_point()
            or not ((image >= 0) & (image <= 1)).all()
        ):
            raise UserError(
                f"A tensor is taken for the condition image, float [{size}, {size}, 3] in [0, 1] on white; got "
                f"{image.dtype} {list(image.shape)}. Give other pictures as a path, a PIL image or an array."
            )
        return image.float(), None if mask is None else mask.float()

    def elevation_of(self, rgb: Tensor) -> float:
        """Estimated elevation in degrees of the camera that took the condition image
        [S, S, 3], see `data/elevation.py`.
        """
        if self.estimator is None:
            raise UserError(
                "This checkpoint cannot estimate elevations: give one in degrees, or fit an estimator with "
                "`python -m gsv3d_lib elevation`."
            )
        return float(self.estimator(rgb[None])[0])

    def condition(self, rgb: Tensor, elevation: float, frames: int) -> Condition:
        """SV3D's condition of one image [S, S, 3] for a static orbit of `frames` views
        at `elevation` degrees.
        """
        device = self.unet.device
        polar = torch.full((1, frames), 90.0 - elevation).deg2rad().to(device)
        azimuth = sv3d_azimuths(frames)[None].deg2rad().to(device)
        return condition_from(
            rgb[None].to(device), polar, azimuth, self.vae, self.clip, self.config
        )

    @torch.no_grad()
    def gaussians_from(self, latents: Tensor, cameras: Cameras, rgb: Tensor) -> Gaussians:
        """The decoder alone: latents [N, 4, h, w] scaled, their cameras, and the
        condition image [S, S, 3].
        """
        device = latents.device
        features = image_features(self.dino, rgb[None].to(device))
        return self.decoder(latents[None], [cameras.to(device)], features)[0]

    @torch.no_grad()
    def views_from(self, latents: Tensor) -> Tensor:
        """The VAE's own multi-view images [N, S, S, 3] of latents [N, 4, h, w], scaled."""
        return decode_scaled(self.vae, latents, chunk=self.config.vae_clip)
