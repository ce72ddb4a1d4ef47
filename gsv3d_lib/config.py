"""One configuration, three presets: `tiny` (CPU, minutes), `small` (one GPU), `paper`
(SV3D_p at 576 px).

The same classes run at every scale; only these numbers differ. Values tagged [paper],
[code] or [ours] follow the sources named in docs/method.md: the paper, public SVD /
SV3D configurations, or this project's own choice.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real

from .system.errors import UserError

NAMES = ("tiny", "small", "paper")
RING_VIEWS = 16  # of `dataset.RING`: what training orbits are made of
VAE_LEVELS = 4  # 8 = 2^3 pixels to a latent
DIFFUSERS_GROUPS = 32  # of the normalisation layers that diffusers builds


@dataclass(frozen=True)
class Numbers:
    """What values a field takes: numbers from `low` to `high`, whole ones or any; of a
    tuple, every entry.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False  # `low` itself is too low

    def __contains__(self, value) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        # NaN is in no range
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        return f"{kind} {'above' if self.above else 'from'} {self.low:g} {'up ' * self.above}to {self.high:g}"


class Choice(tuple):
    """What values a field takes: one of these."""

    def __contains__(self, value) -> bool:
        return any(type(value) is type(one) and value == one for one in self)  # 1 is not True

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self))


class Text:
    """What values a field takes: any text of one line."""

    def __contains__(self, value) -> bool:
        return isinstance(value, str) and value != "" and value.isprintable()

    def __str__(self) -> str:
        return "a text of one line"


def counts(low: int, high: int) -> Numbers:
    return Numbers(low, high, whole=True)


LAYERS, WIDTH, HEADS, SIDE, WEIGHT = (
    counts(1, 128),
    counts(1, 16384),
    counts(1, 256),
    counts(8, 4096),
    Numbers(0, 1e6),
)
SWITCH = Choice((True, False))

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

VALUES = (
    dict.fromkeys(
        ("vae_layers", "clip_layers", "unet_layers", "dino_layers", "decoder_layers"), LAYERS
    )
    | dict.fromkeys(("vae_channels", "unet_channels"), counts(32, 16384))
    | dict.fromkeys(("clip_width", "clip_mlp", "clip_dim", "dino_width", "decoder_width"), WIDTH)
    | dict.fromkeys(("clip_heads", "unet_heads", "dino_heads", "decoder_heads"), HEADS)
    | dict.fromkeys(("image_size", "clip_size", "dino_size"), SIDE)
    | dict.fromkeys(
        ("vae_anchor", "lambda_rgb", "lambda_depth", "lambda_pixel", "lambda_3d"), WEIGHT
    )
    | dict.fromkeys(
        ("lambda_alpha", "lambda_alpha_stage2", "lambda_ssim", "lambda_lpips", "lambda_solid"),
        WEIGHT,
    )
    | dict.fromkeys(("unet_attention", "checkpointing"), SWITCH)
    | dict.fromkeys(("cond_dropout", "roll_frames"), Numbers(0, 1))
    | dict.fromkeys(("num_frames", "target_views"), counts(1, 1024))
    | dict.fromkeys(("clip_patch", "dino_patch"), counts(1, 4096))
    | dict(
        name=Choice(NAMES),
        vae_norm_groups=WIDTH,
        vae_clip=counts(1, RING_VIEWS),
        decoder_patch=counts(1, 512),
        decoder_upsample=counts(1, 64),
        decoder_planes=counts(0, 256),
        decoder_refiner=counts(8, 4096),
        dino=Choice(("dinov2", "none")),
        clip_resize=Choice(("antialias", "blur")),
        resnet_eps=Numbers(0, 1),
        latent_scale=Numbers(0, 100, above=True),
        cond_aug=Numbers(0, 100),
        log_sigma_mean=Numbers(-10, 10),
        log_sigma_std=Numbers(0, 10),
        sigma_min=Numbers(0, 1e5, above=True),
        sigma_max=Numbers(0, 1e5, above=True),
        sampling_steps=counts(1, 1000),
        guidance=Numbers(0, 100),
        object_radius=Numbers(0, 3, above=True),  # the cameras stand 3.5 away: `cameras.DISTANCE`
        scale_range=Numbers(0, 1, above=True),
        copies=counts(1, 64),
        view_counts=counts(1, RING_VIEWS),
        sigma_weighting=Choice(("none", "snr")),
        lpips_weights=Text(),
        lora_rank=counts(1, 1024),
        seed=counts(0, 10**8),  # `training.example_generator` multiplies it
    )
)


def check_values(record, values: dict) -> None:
    """Raises UserError for the first field of `record` that holds what the table
    `values` does not allow.

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


def shown(value) -> str:
    """A value in a sentence, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Schedule:
    """How one stage is trained. The learning rate warms up linearly, then follows a
    half cosine to a tenth.
    """

    steps: int
    batch: int  # examples per optimiser step, over all processes together
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.0  # decay of the averaged weights that are saved for use; 0 = none
    # examples on a device at once, gradients are accumulated; 0 = all of its share
    micro_batch: int = 0

    def __post_init__(self):
        check_values(self, SCHEDULE_VALUES)


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
    # weight that ties three latent channels to the picture's thumbnail; see `VAEStage`
    vae_anchor: float
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
    # channels per doubling of a convolutional upsampler; () = linear [ours]
    decoder_refiner: tuple[int, ...] = ()
    # "none" removes the cross-attention's image features (the paper's ablation)
    dino: str = "dinov2"
    clip_resize: str = "antialias"  # how pictures are made smaller for CLIP; see `encoders.RESIZES`
    resnet_eps: float = 0.0  # in the U-Net's residual blocks; 0 = diffusers' [code: 1e-5]
    latent_scale: float = 0.18215  # SD's latent scaling factor [code]
    cond_aug: float = 1e-5  # noise on the condition image [code]
    cond_dropout: float = 0.1  # joint dropout of CLIP token and concatenated latent [ours]
    # share of orbits that begin at another frame, so that azimuths must be heeded
    # [ours]
    roll_frames: float = 0.0
    log_sigma_mean: float = 0.7  # ln sigma ~ N(0.7, 1.6^2), one sigma per clip [code]
    log_sigma_std: float = 1.6
    sigma_min: float = 0.002  # sampler [code]
    sigma_max: float = 700.0
    sampling_steps: int = 25  # 50 in SV3D's demo; 25 is usable [code]
    guidance: float = 2.5  # triangular: 1 -> guidance -> 1 over the frames [code]
    object_radius: float = 1.0  # the object fits this ball
    # Gaussian scales, fraction of the object's extent [code]
    scale_range: tuple[float, float] = (5e-4, 2e-2)
    # ---- losses [paper: RGB + depth, L_2D + lambda_3D L_3D; weights ours]
    copies: int = 1  # variants of each object: mirrored, recoloured; latents are cached for all
    # N of each step is drawn from these, the same for the whole batch
    view_counts: tuple[int, ...] = (16,)
    target_views: int = 4  # views rendered per object and step, input and novel
    lambda_rgb: float = 1.0
    lambda_depth: float = 0.5
    lambda_alpha: float = 0.0  # of stage 1; not in the paper; on in `tiny`
    # each Gaussian against its own pixel's colour, depth, alpha; not in the paper
    lambda_pixel: float = 0.0
    lambda_ssim: float = 0.0  # structure of the renderings; not in the paper
    lambda_lpips: float = 0.0  # needs lpips_weights; not in the paper
    lambda_solid: float = 0.0  # surfaces instead of fog; not in the paper
    # of others, made by tools/convert_lpips.py
    lpips_weights: str = "data/cache/lpips/alex.safetensors"
    lambda_3d: float = 1.0
    # alpha in stage 2's L_3D; not in the paper, and it does harm: notebook 10
    lambda_alpha_stage2: float = 0.0
    sigma_weighting: str = "none"  # w(sigma) of L_3D: "none", or "snr" = 1 / (1 + sigma^2)
    lora_rank: int = 16
    # recompute blocks in the backward pass: a third more time, a fraction of the memory
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        check_values(self, VALUES)
        levels = len(self.unet_channels)
        self._need(
            self.image_size % 8 == 0, "image_size is a multiple of 8, the side of a latent's block"
        )
        self._need(
            self.latent_size % 2 ** (levels - 1) == 0,
            f"image_size / 8 is a multiple of {2 ** (levels - 1)}, so that it can be halved between {levels} U-Net levels",
        )
        self._need(
            len(self.unet_attention) == len(self.unet_heads) == levels,
            "unet_channels, unet_attention and unet_heads have an entry for each level",
        )
        self._need(
            len(self.vae_channels) == VAE_LEVELS,
            f"vae_channels has {VAE_LEVELS} entries: 8 pixels to a latent",
        )
        for name in ("vae_channels", "unet_channels"):
            self._divides(DIFFUSERS_GROUPS, name, "the groups in which diffusers normalises")
        self._divides(self.vae_norm_groups, "vae_channels", "vae_norm_groups")
        heads = zip(self.unet_heads, self.unet_channels, strict=True)
        self._need(
            all(width % number == 0 for number, width in heads),
            "each entry of unet_channels is a multiple of that of unet_heads",
        )
        for part in ("clip", "dino", "decoder"):
            self._divides(getattr(self, f"{part}_heads"), f"{part}_width", f"{part}_heads")
        for part in ("clip", "dino"):
            self._divides(getattr(self, f"{part}_patch"), f"{part}_size", f"{part}_patch")
        self._need(
            self.latent_size % self.decoder_patch == 0,
            "image_size / 8 is a multiple of decoder_patch",
        )
        self._need(
            self.lambda_pixel == 0 or 8 * self.decoder_patch % self.decoder_upsample == 0,
            "with lambda_pixel a Gaussian has whole pixels: 8 decoder_patch is a multiple of decoder_upsample",
        )
        self._need(
            not self.decoder_refiner or 2 ** len(self.decoder_refiner) == self.decoder_upsample,
            "decoder_refiner has one entry for each doubling of decoder_upsample",
        )
        self._divides(8, "decoder_refiner", "the groups in which it normalises")
        self._need(
            self.lambda_lpips == 0 or self.image_size >= 32,
            "with lambda_lpips image_size is 32 or more, which leaves its net a pixel in the last layer",
        )
        self._need(
            all(RING_VIEWS % count == 0 for count in self.view_counts),
            f"view_counts are 1, 2, 4, 8 or 16 of the {RING_VIEWS} views of a ring",
        )
        self._need(self.sigma_min < self.sigma_max, "sigma_min is below sigma_max")
        self._need(
            len(self.scale_range) == 2 and self.scale_range[0] <= self.scale_range[-1],
            "scale_range is the smallest and the largest scale",
        )

    def _need(self, holds: bool, rule: str) -> None:
        """Raises UserError where a rule between fields does not hold, with the values
        of those that it names.
        """
        if not holds:
            named = [
                f.name
                for f in dataclasses.fields(self)
                if f.name in rule.replace(",", " ").replace(":", " ").split()
            ]
            raise UserError(
                f"{rule}; got {', '.join(f'{n} = {shown(getattr(self, n))}' for n in named)}."
            )

    def _divides(self, number: int, name: str, what: str) -> None:
        """Raises UserError where a field, or an entry of it, is no multiple of
        `number`, which is `what`.
        """
        value = getattr(self, name)
        entries = value if isinstance(value, tuple) else (value,)
        if any(entry % number for entry in entries):
            raise UserError(f"{name} takes multiples of {number}, {what}; got {shown(value)}.")

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
                raise UserError(
                    f"Config.{field} is no schedule, so there is no {field}.{next(iter(numbers))}."
                )
            whole[field] = checked_replace(whole.get(field, getattr(self, field)), numbers)
        return checked_replace(self, whole)


def checked_replace(record, changes: dict):
    """`dataclasses.replace` that refuses unknown names and values of another type in
    one sentence (ValueError).
    """
    kind, names = type(record).__name__, {f.name: f.type for f in dataclasses.fields(record)}
    for name, value in changes.items():
        if name not in names:
            raise UserError(f"{kind} has no field {shown(name)}; it has: {', '.join(names)}.")
        old = getattr(record, name)
        number = names[name] == "float" and type(value) in (int, float)
        if type(value) is not type(old) and not number:
            raise UserError(
                f"{kind}.{name} is a {type(old).__name__}; got {shown(value)} ({type(value).__name__})."
            )
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
    # 50 times the deviation of a latent is noise enough; above, short trainings have
    # seen nothing
    sigma_max=80.0,
    lambda_alpha=0.5,
    lambda_pixel=0.5,
)

# tiny's networks on four times the pixels, which `train --init` can start from tiny's
# weights
SMALL = TINY.replace(
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
    # SV3D's decoder has no layers over time [code], so more at once is only more memory
    vae_clip=1,
    clip_size=224,
    clip_patch=14,
    clip_width=1280,
    clip_layers=32,
    clip_heads=16,
    clip_mlp=5120,
    clip_dim=1024,
    clip_resize="blur",  # [code]
    resnet_eps=1e-5,  # [code]
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
    # SVD's VAE, SV3D's U-Net and DINOv2 come trained; these are for who starts without
    # them [ours]
    vae_schedule=Schedule(steps=20000, batch=16, lr=4e-4, ema=0.999, weight_decay=0.0),
    dino_schedule=Schedule(steps=10000, batch=128, lr=5e-4),
    diffusion_schedule=Schedule(steps=40000, batch=16, lr=2e-4, ema=0.9995),
    # 8 and 2 orbits at once, with checkpointing, fit 80 GB (`python -m gsv3d_lib plan`)
    # [calc]
    checkpointing=True,
    stage1=Schedule(steps=80000, batch=128, lr=1e-5, warmup=1000, micro_batch=8),  # [paper]
    stage2=Schedule(steps=40000, batch=32, lr=1e-5, warmup=1000, micro_batch=2),  # [paper]
)

PRESETS = {"tiny": TINY, "small": SMALL, "paper": PAPER}


def preset(name: str = "tiny", **changes) -> Config:
    """The configuration called `name`, with some fields changed. Raises ValueError for
    a name that does not exist.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name].replace(**changes)


def parse_setting(text: str) -> tuple[str, object]:
    """ "steps=200" -> ("steps", 200); what is no literal is text. Raises UserError
    without a name and "=".
    """
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise UserError(f"--set takes NAME=VALUE; got {shown(text)}.")
    try:
        return name, ast.literal_eval(value)
    # the last three of odd nested brackets
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value
