"""One configuration, three presets: `tiny` (CPU, minutes), `small` (a GPU), `paper`.

The same classes run at every scale; only these numbers differ. The tags [paper], [code]
and [ours] name the source of a value: the paper, public configurations of SVD and SV3D,
or this project's own choice (docs/method.md).
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real

from .system.arguments import shown
from .system.errors import UserError

NAMES = ("tiny", "small", "paper")
RING_VIEWS = 16  # of `dataset.RING`: what training orbits are made of
VAE_LEVELS = 4  # 8 = 2^3 pixels to a latent
DIFFUSERS_GROUPS = 32  # of the normalisation layers that diffusers builds


@dataclass(frozen=True)
class Numbers:
    """What a field, or every entry of a tuple, may be: numbers from `low` to `high`."""

    low: float
    high: float
    whole: bool = False
    above: bool = False  # `low` itself is too low

    def __contains__(self, value) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        in_range = self.low <= float(value) <= self.high  # NaN is in no range
        return in_range and not (self.above and value == self.low)

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        start = f"above {self.low:g} up" if self.above else f"from {self.low:g}"
        return f"{kind} {start} to {self.high:g}"


class Choice(tuple):
    """What a field may be: one of these."""

    def __contains__(self, value) -> bool:
        return any(type(value) is type(one) and value == one for one in self)  # 1 is not True

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self))


class Text:
    """What a field may be: any text of one line."""

    def __contains__(self, value) -> bool:
        return isinstance(value, str) and value != "" and value.isprintable()

    def __str__(self) -> str:
        return "a text of one line"


def counts(low: int, high: int) -> Numbers:
    return Numbers(low, high, whole=True)


def each(names: str, allowed) -> dict:
    """The same for several fields."""
    return dict.fromkeys(names.split(), allowed)


WIDTH = counts(1, 16384)
MOST_STEPS = 9_999_999  # seven digits in the names of checkpoints
SCHEDULE_VALUES = dict(
    steps=counts(1, MOST_STEPS),
    batch=counts(1, 65_535),  # `training.example_generator` leaves so much room
    lr=Numbers(0, 10),
    warmup=counts(0, MOST_STEPS),
    weight_decay=Numbers(0, 10),
    ema=Numbers(0, 0.999999),
    micro_batch=counts(0, 65_535),
)
LOSS_WEIGHTS = "lambda_rgb lambda_depth lambda_alpha lambda_alpha_stage2 lambda_pixel lambda_3d"
LOSS_WEIGHTS += " lambda_ssim lambda_lpips lambda_solid vae_anchor"
VALUES = {
    **each("vae_layers clip_layers unet_layers dino_layers decoder_layers", counts(1, 128)),
    **each("vae_channels unet_channels", counts(32, 16384)),
    **each("clip_width clip_mlp clip_dim dino_width decoder_width vae_norm_groups", WIDTH),
    **each("clip_heads unet_heads dino_heads decoder_heads", counts(1, 256)),
    **each("image_size clip_size dino_size", counts(8, 4096)),
    **each(LOSS_WEIGHTS, Numbers(0, 1e6)),
    **each("unet_attention checkpointing", Choice((True, False))),
    **each("cond_dropout roll_frames sampled_share", Numbers(0, 1)),
    **each("num_frames target_views", counts(1, 1024)),
    **each("clip_patch dino_patch", counts(1, 4096)),
    **each("vae_clip view_counts", counts(1, RING_VIEWS)),
    **each("sigma_min sigma_max", Numbers(0, 1e5, above=True)),
    "name": Choice(NAMES),
    "decoder_patch": counts(1, 512),
    "decoder_upsample": counts(1, 64),
    "decoder_planes": counts(0, 256),
    "decoder_refiner": counts(8, 4096),
    "dino": Choice(("dinov2", "none")),
    "clip_resize": Choice(("antialias", "blur")),
    "resnet_eps": Numbers(0, 1),
    "latent_scale": Numbers(0, 100, above=True),
    "cond_aug": Numbers(0, 100),
    "log_sigma_mean": Numbers(-10, 10),
    "log_sigma_std": Numbers(0, 10),
    "sampling_steps": counts(1, 1000),
    "guidance": Numbers(0, 100),
    "object_radius": Numbers(0, 3, above=True),  # the cameras stand 3.5 away
    "scale_range": Numbers(0, 1, above=True),
    "copies": counts(1, 64),
    "sigma_weighting": Choice(("none", "snr")),
    "lpips_weights": Text(),
    "lora_rank": counts(1, 1024),
    "seed": counts(0, 10**8),  # `training.example_generator` multiplies it
}


def check_values(record, values: dict) -> None:
    """Raises UserError for the first field that `values` does not allow.

    A tuple may be empty where that is the field's default.
    """
    fields = dataclasses.fields(record)
    tuples = {field.name for field in fields if field.type.startswith("tuple")}
    may_be_empty = {field.name for field in fields if field.default == ()}
    for name, allowed in values.items():
        value = getattr(record, name)
        entries = value if name in tuples and isinstance(value, tuple) else (value,)
        missing = not entries and name not in may_be_empty
        if missing or not all(entry in allowed for entry in entries):
            raise UserError(f"{type(record).__name__}.{name} takes {allowed}; got {shown(value)}.")


@dataclass(frozen=True)
class Schedule:
    """How one stage is trained: a linear warm-up, then a half cosine to lr / 10."""

    steps: int
    batch: int  # examples per optimiser step, over all processes together
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.0  # decay of the averaged weights that are saved for use; 0 = none
    micro_batch: int = 0  # examples on a device at once (accumulated); 0 = its whole share

    def __post_init__(self):
        check_values(self, SCHEDULE_VALUES)


@dataclass(frozen=True)
class Config:
    """Every number that defines the models and their training. See `preset`."""

    name: str
    # ---- data
    image_size: int  # pixels, square
    num_frames: int  # N, views per orbit [paper: 16]
    # ---- VAE: diffusers' AutoencoderKLTemporalDecoder, factor 8, 4 channels [code]
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_norm_groups: int  # 32 in diffusers; fewer where a level has few channels
    # weight that ties three latent channels to the picture's thumbnail; see `VAEStage`
    vae_anchor: float
    vae_clip: int  # views that the temporal decoder sees together, in training and at inference
    # ---- CLIP: transformers' CLIPVisionModelWithProjection [code: ViT-H/14]
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
    # ---- decoder [paper: ViT + upsampler + cross-attention; ours: sizes]
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
    decoder_refiner: tuple[int, ...] = ()  # channels per doubling; () = linear upsampler [ours]
    dino: str = "dinov2"  # "none" removes the image features (the paper's ablation)
    clip_resize: str = "antialias"  # how pictures are made smaller for CLIP; see `encoders.RESIZES`
    resnet_eps: float = 0.0  # in the U-Net's residual blocks; 0 = diffusers' [code: 1e-5]
    latent_scale: float = 0.18215  # SD's latent scaling factor [code]
    cond_aug: float = 1e-5  # noise on the condition image [code]
    cond_dropout: float = 0.1  # joint dropout of CLIP token and concatenated latent [ours]
    roll_frames: float = 0.0  # share of orbits that begin at another frame: `rolled` [ours]
    log_sigma_mean: float = 0.7  # ln sigma ~ N(0.7, 1.6^2), one sigma per clip [code]
    log_sigma_std: float = 1.6
    sigma_min: float = 0.002  # sampler [code]
    sigma_max: float = 700.0
    sampling_steps: int = 25  # 50 in SV3D's demo; 25 is usable [code]
    guidance: float = 2.5  # triangular: 1 -> guidance -> 1 over the frames [code]
    object_radius: float = 1.0  # the object fits this ball
    scale_range: tuple[float, float] = (5e-4, 2e-2)  # of Gaussians / object's extent [code]
    # ---- losses [paper: RGB + depth, L_2D + lambda_3D L_3D; weights ours]
    copies: int = 1  # variants of each object: mirrored, recoloured; latents are cached for all
    view_counts: tuple[int, ...] = (16,)  # stage 1 draws N of each step from these
    sampled_share: float = 0.0  # of stage 1's orbits, made by the U-Net, as in use [ours]
    target_views: int = 4  # views rendered per object and step, input and novel
    lambda_rgb: float = 1.0
    lambda_depth: float = 0.5
    lambda_alpha: float = 0.0  # of stage 1; not in the paper; on in `tiny`
    lambda_pixel: float = 0.0  # each Gaussian against its own pixel; not in the paper
    lambda_ssim: float = 0.0  # structure of the renderings; not in the paper
    lambda_lpips: float = 0.0  # needs lpips_weights; not in the paper
    lambda_solid: float = 0.0  # surfaces instead of fog; not in the paper
    # made by tools/convert_lpips.py of others' weights
    lpips_weights: str = "data/cache/lpips/alex.safetensors"
    lambda_3d: float = 1.0
    lambda_alpha_stage2: float = 0.0  # not in the paper, and it does harm: notebook 10
    sigma_weighting: str = "none"  # w(sigma) of L_3D: "none", or "snr" = 1 / (1 + sigma^2)
    lora_rank: int = 16
    # recompute blocks in the backward pass: a third more time, a fraction of the memory
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        check_values(self, VALUES)
        for rule, holds in self._rules().items():
            words = rule.replace(",", " ").replace(":", " ").split()
            named = [f.name for f in dataclasses.fields(self) if f.name in words]
            if not holds:
                values = ", ".join(f"{name} = {shown(getattr(self, name))}" for name in named)
                raise UserError(f"{rule}; got {values}.")
        for names, number, what in self._divisors():
            for name in names.split():
                value = getattr(self, name)
                entries = value if isinstance(value, tuple) else (value,)
                if any(entry % number for entry in entries):
                    raise UserError(
                        f"{name} takes multiples of {number}, {what}; got {shown(value)}."
                    )

    def _rules(self) -> dict[str, bool]:
        """What must hold between fields -> whether it does. A rule names its fields."""
        levels = len(self.unet_channels)
        halvings = 2 ** (levels - 1)
        heads = zip(self.unet_heads, self.unet_channels)
        doublings = 2 ** len(self.decoder_refiner)
        return {
            "image_size is a multiple of 8, the side of a latent's block": self.image_size % 8 == 0,
            f"image_size / 8 is a multiple of {halvings}, so that it can be halved between "
            f"{levels} U-Net levels": self.latent_size % halvings == 0,
            "unet_channels, unet_attention and unet_heads have an entry for each level": (
                len(self.unet_attention) == len(self.unet_heads) == levels
            ),
            f"vae_channels has {VAE_LEVELS} entries: 8 pixels to a latent": (
                len(self.vae_channels) == VAE_LEVELS
            ),
            "each entry of unet_channels is a multiple of that of unet_heads": (
                all(width % number == 0 for number, width in heads)
            ),
            "image_size / 8 is a multiple of decoder_patch": (
                self.latent_size % self.decoder_patch == 0
            ),
            "with lambda_pixel a Gaussian has whole pixels: 8 decoder_patch is a multiple of "
            "decoder_upsample": (
                self.lambda_pixel == 0 or 8 * self.decoder_patch % self.decoder_upsample == 0
            ),
            "decoder_refiner has one entry for each doubling of decoder_upsample": (
                doublings in (1, self.decoder_upsample)
            ),
            "with lambda_lpips image_size is 32 or more, which leaves its net a pixel in the "
            "last layer": self.lambda_lpips == 0 or self.image_size >= 32,
            f"view_counts are 1, 2, 4, 8 or 16 of the {RING_VIEWS} views of a ring": (
                all(RING_VIEWS % count == 0 for count in self.view_counts)
            ),
            "sigma_min is below sigma_max": self.sigma_min < self.sigma_max,
            "scale_range is the smallest and the largest scale": (
                len(self.scale_range) == 2 and self.scale_range[0] <= self.scale_range[-1]
            ),
        }

    def _divisors(self) -> Iterator[tuple[str, int, str]]:
        """(fields, the number that must divide each of their entries, what it is)."""
        diffusers = "the groups in which diffusers normalises"
        yield "vae_channels unet_channels", DIFFUSERS_GROUPS, diffusers
        yield "vae_channels", self.vae_norm_groups, "vae_norm_groups"
        for part in ("clip", "dino", "decoder"):
            yield f"{part}_width", getattr(self, f"{part}_heads"), f"{part}_heads"
        for part in ("clip", "dino"):
            yield f"{part}_size", getattr(self, f"{part}_patch"), f"{part}_patch"
        yield "decoder_refiner", 8, "the groups in which it normalises"

    @property
    def latent_size(self) -> int:
        return self.image_size // 8

    def replace(self, **changes) -> Config:
        """A copy with some fields changed; "stage1.lr" is one number of a schedule.

        Unknown names and wrong types get one clear sentence.
        """
        whole = {name: value for name, value in changes.items() if "." not in name}
        for name in (name for name in changes if "." in name):
            field, _, number = name.partition(".")
            schedule = whole.get(field, getattr(self, field, None))
            if not isinstance(schedule, Schedule):
                raise UserError(f"Config.{field} is no schedule, so there is no {name}.")
            whole[field] = checked_replace(schedule, {number: changes[name]})
        return checked_replace(self, whole)


def checked_replace(record, changes: dict):
    """`dataclasses.replace` that refuses unknown names and other types."""
    kind = type(record).__name__
    names = {f.name: f.type for f in dataclasses.fields(record)}
    for name, value in changes.items():
        if name not in names:
            raise UserError(f"{kind} has no field {shown(name)}; it has: {', '.join(names)}.")
        old = getattr(record, name)
        number = names[name] == "float" and type(value) in (int, float)
        if type(value) is not type(old) and not number:
            got = f"{shown(value)} ({type(value).__name__})"
            raise UserError(f"{kind}.{name} is a {type(old).__name__}; got {got}.")
    return dataclasses.replace(record, **changes)


# One line for each model. Comments stand above the line that they explain.
TINY = Config(
    name="tiny", image_size=64, num_frames=16, copies=2,
    vae_channels=(32, 64, 64, 64), vae_layers=1, vae_norm_groups=4, vae_anchor=1.0, vae_clip=1,
    clip_size=64, clip_patch=8, clip_width=128, clip_layers=4, clip_heads=4, clip_mlp=256,
    clip_dim=128,
    unet_channels=(64, 128), unet_attention=(True, True), unet_layers=1, unet_heads=(2, 4),
    dino_size=64, dino_patch=8, dino_width=128, dino_layers=4, dino_heads=4,
    decoder_patch=1, decoder_width=192, decoder_layers=6, decoder_heads=6, decoder_upsample=4,
    decoder_planes=16,
    vae_schedule=Schedule(steps=800, batch=8, lr=1.5e-3, ema=0.99, weight_decay=0.0),
    dino_schedule=Schedule(steps=600, batch=32, lr=5e-4),
    diffusion_schedule=Schedule(steps=3300, batch=6, lr=5e-4, ema=0.995),
    stage1=Schedule(steps=6000, batch=2, lr=5e-4, ema=0.998),
    stage2=Schedule(steps=300, batch=2, lr=5e-4, warmup=20),
    # 32 x 32 Gaussians a view lie further apart than in `paper`
    scale_range=(5e-3, 5e-2),
    # on unseen procedural objects 4 steps are better than 6 and 25; notebooks show 25
    sampling_steps=4,
    # 1 and 1.5 score the same on unseen procedural objects
    guidance=1.5,
    roll_frames=0.5, view_counts=(4, 8, 16), lambda_alpha=0.5, lambda_pixel=0.5,
    # 50 times the deviation of a latent is noise enough; a short training sees no more
    sigma_max=80.0,
)  # fmt: skip

# tiny's networks on four times the pixels: `train --init` can start from tiny's weights
SMALL = TINY.replace(
    name="small", image_size=128,
    # 64 x 64 Gaussians a view
    decoder_patch=2, decoder_upsample=8, decoder_refiner=(96, 64, 32),
    # on unseen procedural objects 3 steps are better than 2, 4, 6 and 8
    sampling_steps=3,
    vae_schedule=Schedule(steps=3000, batch=16, lr=1e-3, ema=0.999, weight_decay=0.0),
    dino_schedule=Schedule(steps=3000, batch=64, lr=5e-4),
    diffusion_schedule=Schedule(steps=20000, batch=16, lr=4e-4, ema=0.9995),
    stage1=Schedule(steps=10000, batch=8, lr=4e-4, ema=0.999),
    stage2=Schedule(steps=1000, batch=8, lr=2e-4),
)  # fmt: skip

PAPER = TINY.replace(
    name="paper", image_size=576, copies=1,
    # SV3D's decoder has no layers over time [code], so a longer clip only takes memory
    vae_channels=(128, 256, 512, 512), vae_layers=2, vae_norm_groups=32, vae_anchor=0.0, vae_clip=1,
    clip_size=224, clip_patch=14, clip_width=1280, clip_layers=32, clip_heads=16, clip_mlp=5120,
    # [code]
    clip_dim=1024, clip_resize="blur", resnet_eps=1e-5,
    unet_channels=(320, 640, 1280, 1280), unet_attention=(True, True, True, False),
    unet_layers=2, unet_heads=(5, 10, 20, 20),
    dino_size=518, dino_patch=14, dino_width=768, dino_layers=12, dino_heads=12,
    decoder_patch=2, decoder_width=768, decoder_layers=12, decoder_heads=12, decoder_upsample=2,
    decoder_planes=0, scale_range=(5e-4, 2e-2),
    sampling_steps=50, sigma_max=700.0, guidance=2.5,
    roll_frames=0.0, view_counts=(16,), lambda_alpha=0.0, lambda_pixel=0.0,
    # SVD's VAE, SV3D's U-Net and DINOv2 come trained; else these are for you [ours]
    vae_schedule=Schedule(steps=20000, batch=16, lr=4e-4, ema=0.999, weight_decay=0.0),
    dino_schedule=Schedule(steps=10000, batch=128, lr=5e-4),
    diffusion_schedule=Schedule(steps=40000, batch=16, lr=2e-4, ema=0.9995),
    # 8 and 2 orbits at once, with checkpointing, fit 80 GB (`gsv3d_lib plan`) [calc]
    checkpointing=True,
    # [paper]
    stage1=Schedule(steps=80000, batch=128, lr=1e-5, warmup=1000, micro_batch=8),
    stage2=Schedule(steps=40000, batch=32, lr=1e-5, warmup=1000, micro_batch=2),
)  # fmt: skip

PRESETS = {"tiny": TINY, "small": SMALL, "paper": PAPER}


def preset(name: str = "tiny", **changes) -> Config:
    """The configuration called `name`, with some fields changed (`replace`)."""
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name].replace(**changes)


def parse_setting(text: str) -> tuple[str, object]:
    """Of "steps=200" ("steps", 200); what is no literal is text."""
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise UserError(f"--set takes NAME=VALUE; got {shown(text)}.")
    try:
        return name, ast.literal_eval(value)
    # what no literal raises; the last three are of odd nested brackets
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value
