"""One configuration, three presets: `tiny` (CPU, minutes), `small` (one GPU), `paper` (SV3D_p at 576 px).

The same classes run at every scale; only these numbers differ. Values tagged [paper], [code] or [ours] follow
the sources named in docs/method.md: the paper, public SVD / SV3D configurations, or this project's own choice.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How one stage is trained. The learning rate warms up linearly, then follows a half cosine to a tenth."""

    steps: int
    batch: int  # examples per optimiser step, over all processes together
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.0  # decay of the averaged weights that are saved for use; 0 = none
    micro_batch: int = 0  # examples on a device at once, gradients are accumulated; 0 = all of its share

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or self.micro_batch < 0:
            raise UserError(
                f"A schedule has 1 step or more, a batch of 1 or more, and a micro_batch of 0 or more; got {self.steps}, "
                f"{self.batch}, {self.micro_batch}."
            )


@dataclass(frozen=True)
class Config:
    """Every number that defines the models and their training. See `preset`."""

    name: str
    # ---- data
    image_size: int  # pixels, square
    num_frames: int  # N, views per orbit [paper: 16]
    # ---- VAE: diffusers' AutoencoderKLTemporalDecoder, factor 8, 4 latent channels [code]
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_norm_groups: int  # 32 in diffusers; fewer where a level has few channels
    vae_anchor: float  # weight that ties three latent channels to the picture's thumbnail; see `VAEStage`
    vae_clip: int  # views that the temporal decoder sees together, in training and at inference
    # ---- CLIP vision tower: transformers' CLIPVisionModelWithProjection [code: ViT-H/14]
    clip_size: int  # pixels of its input
    clip_patch: int
    clip_width: int
    clip_layers: int
    clip_heads: int
    clip_mlp: int
    clip_dim: int  # of the one token that the U-Net attends to
    # ---- U-Net: diffusers' UNetSpatioTemporalConditionModel [code]
    unet_channels: tuple[int, ...]
    unet_attention: tuple[bool, ...]  # which levels attend
    unet_layers: int
    unet_heads: tuple[int, ...]
    # ---- DINO: transformers' Dinov2Model [paper: DINO; ours: DINOv2 base]
    dino_size: int  # pixels of its input
    dino_patch: int
    dino_width: int
    dino_layers: int
    dino_heads: int
    # ---- Gaussian Splatting Decoder [paper: ViT + upsampler + cross-attention; ours: sizes]
    decoder_patch: int  # latent pixels per token side
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    decoder_upsample: int  # Gaussians per token side
    decoder_planes: int  # depths of the plane sweep that tokens carry; 0 = none [ours]
    # ---- optimisation, one schedule per stage
    vae_schedule: Schedule
    dino_schedule: Schedule
    diffusion_schedule: Schedule
    stage1: Schedule
    stage2: Schedule
    # ---- fields with one value at every scale
    dino: str = "dinov2"  # "none" removes the cross-attention's image features (the paper's ablation)
    latent_scale: float = 0.18215  # SD's latent scaling factor [code]
    cond_aug: float = 1e-5  # noise on the condition image [code]
    cond_dropout: float = 0.1  # joint dropout of CLIP token and concatenated latent [ours]
    roll_frames: float = 0.0  # share of orbits that begin at another frame, so that azimuths must be heeded [ours]
    log_sigma_mean: float = 0.7  # ln sigma ~ N(0.7, 1.6^2), one sigma per clip [code]
    log_sigma_std: float = 1.6
    sigma_min: float = 0.002  # sampler [code]
    sigma_max: float = 700.0
    sampling_steps: int = 25  # 50 in SV3D's demo; 25 is usable [code]
    guidance: float = 2.5  # triangular: 1 -> guidance -> 1 over the frames [code]
    object_radius: float = 1.0  # the object fits this ball
    scale_range: tuple[float, float] = (5e-4, 2e-2)  # Gaussian scales, fraction of the object's extent [code]
    # ---- losses [paper: RGB + depth, L_2D + lambda_3D L_3D; weights ours]
    copies: int = 1  # variants of each object: mirrored, recoloured; latents are cached for all
    view_counts: tuple[int, ...] = (16,)  # N of each step is drawn from these, the same for the whole batch
    target_views: int = 4  # views rendered per object and step, input and novel
    lambda_rgb: float = 1.0
    lambda_depth: float = 0.5
    lambda_alpha: float = 0.0  # not in the paper; on in `tiny`
    lambda_pixel: float = 0.0  # each Gaussian against its own pixel's colour, depth, alpha; not in the paper
    lambda_3d: float = 1.0
    sigma_weighting: str = "none"  # w(sigma) of L_3D: "none", or "snr" = 1 / (1 + sigma^2)
    lora_rank: int = 16
    checkpointing: bool = False  # recompute blocks in the backward pass: a third more time, a fraction of the memory
    seed: int = 0

    def __post_init__(self):
        if self.image_size < 8 or self.image_size % 8:
            raise UserError(f"image_size is a multiple of 8, the side of a latent's block; got {self.image_size}.")
        for name in ("num_frames", "vae_clip", "copies", "sampling_steps", "target_views", "lora_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is 1 or more; got {getattr(self, name)}.")
        if self.dino not in ("dinov2", "none"):
            raise UserError(f'dino is "dinov2" or "none"; got {self.dino!r}.')

    @property
    def latent_size(self) -> int:
        return self.image_size // 8

    def replace(self, **changes) -> Config:
        """A copy with some fields changed; "stage1.lr" is one number of a schedule.

        Unknown names and wrong types get one clear sentence.
        """
        parts: dict[str, dict] = {}  # of schedules
        for name, value in changes.items():
            field, dot, number = name.partition(".")
            if dot:
                parts.setdefault(field, {})[number] = value
        whole = {name: value for name, value in changes.items() if "." not in name}
        for field, numbers in parts.items():
            if not isinstance(getattr(self, field, None), Schedule):
                raise UserError(f"Config.{field} is no schedule, so there is no {field}.{next(iter(numbers))}.")
            whole[field] = checked_replace(whole.get(field, getattr(self, field)), numbers)
        return checked_replace(self, whole)


def checked_replace(record, changes: dict):
    """`dataclasses.replace` that refuses unknown names and values of another type in one sentence (ValueError)."""
    kind, names = type(record).__name__, [f.name for f in dataclasses.fields(record)]
    for name, value in changes.items():
        if name not in names:
            raise UserError(f"{kind} has no field {name!r}; it has: {', '.join(names)}.")
        old = getattr(record, name)
        number = isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool)
        if type(value) is not type(old) and not number:
            raise UserError(f"{kind}.{name} is a {type(old).__name__}; got {value!r} ({type(value).__name__}).")
    return dataclasses.replace(record, **changes)


TINY = Config(
    name="tiny",
    image_size=64,
    num_frames=16,
    vae_channels=(32, 64, 64, 64),
    vae_layers=1,
    vae_norm_groups=4,
    vae_anchor=1.0,
    vae_clip=1,
    clip_size=64,
    clip_patch=8,
    clip_width=128,
    clip_layers=4,
    clip_heads=4,
    clip_mlp=256,
    clip_dim=128,
    unet_channels=(64, 128),
    unet_attention=(True, True),
    unet_layers=1,
    unet_heads=(2, 4),
    dino_size=64,
    dino_patch=8,
    dino_width=128,
    dino_layers=4,
    dino_heads=4,
    decoder_patch=1,
    decoder_width=192,
    decoder_layers=6,
    decoder_heads=6,
    decoder_upsample=4,
    decoder_planes=16,
    vae_schedule=Schedule(steps=800, batch=8, lr=1.5e-3, ema=0.99, weight_decay=0.0),
    dino_schedule=Schedule(steps=600, batch=32, lr=5e-4),
    diffusion_schedule=Schedule(steps=3300, batch=6, lr=5e-4, ema=0.995),
    stage1=Schedule(steps=6000, batch=2, lr=5e-4, ema=0.998),
    stage2=Schedule(steps=300, batch=2, lr=5e-4, warmup=20),
    scale_range=(5e-3, 5e-2),  # 32 x 32 Gaussians a view lie further apart than in `paper`
    sampling_steps=4,  # on unseen procedural objects better than 6 and 25; notebooks show 25
    guidance=1.5,  # 1 and 1.5 score the same on unseen procedural objects
    copies=2,
    roll_frames=0.5,
    view_counts=(4, 8, 16),
    sigma_max=80.0,  # 50 times the deviation of a latent is noise enough; above, short trainings have seen nothing
    lambda_alpha=0.5,
    lambda_pixel=0.5,
)

SMALL = TINY.replace(  # tiny's networks on four times the pixels, which `train --init` can start from tiny's weights
    name="small",
    image_size=128,
    decoder_patch=2,
    decoder_upsample=8,  # 64 x 64 Gaussians a view
    sampling_steps=3,  # on unseen procedural objects better than 2, 4, 6 and 8
    vae_schedule=Schedule(steps=3000, batch=16, lr=1e-3, ema=0.999, weight_decay=0.0),
    dino_schedule=Schedule(steps=3000, batch=64, lr=5e-4),
    diffusion_schedule=Schedule(steps=20000, batch=16, lr=4e-4, ema=0.9995),
    stage1=Schedule(steps=10000, batch=8, lr=4e-4, ema=0.999),
    stage2=Schedule(steps=1000, batch=8, lr=2e-4),
)

PAPER = TINY.replace(
    name="paper",
    image_size=576,
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    vae_norm_groups=32,
    vae_anchor=0.0,
    vae_clip=16,
    clip_size=224,
    clip_patch=14,
    clip_width=1280,
    clip_layers=32,
    clip_heads=16,
    clip_mlp=5120,
    clip_dim=1024,
    unet_channels=(320, 640, 1280, 1280),
    unet_attention=(True, True, True, False),
    unet_heads=(5, 10, 20, 20),
    unet_layers=2,
    dino_size=518,
    dino_patch=14,
    dino_width=768,
    dino_layers=12,
    dino_heads=12,
    decoder_patch=2,
    decoder_width=768,
    decoder_layers=12,
    decoder_heads=12,
    decoder_upsample=2,
    decoder_planes=0,
    scale_range=(5e-4, 2e-2),
    sampling_steps=50,
    sigma_max=700.0,
    guidance=2.5,
    copies=1,
    roll_frames=0.0,
    view_counts=(16,),
    lambda_alpha=0.0,
    lambda_pixel=0.0,
    # SVD's VAE, SV3D's U-Net and DINOv2 come trained; these are for who starts without them [ours];
    # one clip of 16 views keeps 155 GB in a step of the VAE [calc], so that stage needs a smaller vae_clip
    vae_schedule=Schedule(steps=20000, batch=16, lr=4e-4, ema=0.999, weight_decay=0.0),
    dino_schedule=Schedule(steps=10000, batch=128, lr=5e-4),
    diffusion_schedule=Schedule(steps=40000, batch=16, lr=2e-4, ema=0.9995),
    # 8 and 2 orbits at once, with checkpointing, fit 80 GB (`python -m gsv3d_lib.plan`) [calc]
    checkpointing=True,
    stage1=Schedule(steps=80000, batch=128, lr=1e-5, warmup=1000, micro_batch=8),  # [paper]
    stage2=Schedule(steps=40000, batch=32, lr=1e-5, warmup=1000, micro_batch=2),  # [paper]
)

PRESETS = {"tiny": TINY, "small": SMALL, "paper": PAPER}


def preset(name: str = "tiny", **changes) -> Config:
    """The configuration called `name`, with some fields changed. Raises ValueError for a name that does not exist."""
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name].replace(**changes)


def schedule_field(stage: str) -> str:
    """The field of `Config` that holds a stage's `Schedule`."""
    return stage if stage in ("stage1", "stage2") else f"{stage}_schedule"


def parse_setting(text: str) -> tuple[str, object]:
    """ "steps=200" -> ("steps", 200); what is no literal is text. Raises ValueError without "="."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set takes NAME=VALUE; got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
