"""Memory and time of a stage before anything is trained, and of an inference.

    python -m gsv3d_lib plan --preset paper --stage stage2 --gpus 4 --rank 16

`rehearse` runs one real training step, the code of `stages.py` and `distillation.py`
itself, with torch's fake tensors: shapes, types and lifetimes are true, numbers are not
there. Every buffer that comes and goes is counted, and every matrix product. So the
plan follows the code, not a formula.

Two things are assumed: how fast the device computes (`--tflops`), and that a GPU's
autocast does what a CPU's does (a GPU keeps norms in float32, so expect somewhat more).
The rasteriser cannot run without numbers; a stand-in has its outputs and, roughly, its
buffers. benchmarks/memory.py holds the plan against measurements.
"""

import argparse
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attention import attending_with
from ..cameras import Cameras
from ..config import Config, preset
from ..lora import add_lora
from ..rendering import rendering_with
from ..stages import STAGES, build_stage, schedule_of
from ..system.command import command_parser, number, whole
from ..system.errors import UserError
from ..training import Stage
from ..weights.checkpoint import builders

GB = 1e9
CARDS = (24, 48, 80)  # GB of common GPUs
USABLE = 0.92  # of a card; the rest is taken by CUDA itself and by gaps between buffers
PLANNED = ("diffusion", "stage1", "stage2")
NETWORKS = ("vae", "clip", "unet", "dino", "decoder")
# the CPU rasteriser's of one Gaussian in one view: splat 64, box 20, list 8; rounded
SPLAT_BYTES = 96


@dataclass(frozen=True)
class Part:
    """One network in a training step or an inference."""

    name: str
    parameters: int
    trained: int  # of those, the ones that the optimiser moves
    kept: int  # bytes that stay for the backward pass of one example
    forward: int  # floating point operations of one example


@dataclass(frozen=True)
class Rehearsal:
    """What one step on one example takes, or one inference; in bytes.

    Parameters and their gradients are not in it.
    """

    parts: tuple[Part, ...]
    peak: int  # of all that is alive at once
    copies: int  # of it, bfloat16 copies of weights, which a larger batch does not multiply
    flops: int  # forward, backward, and what checkpointing computes again


@dataclass(frozen=True)
class Plan:
    """One stage on one kind of machine. Memory is per GPU, in bytes."""

    parts: tuple[Part, ...]
    weights: int  # of all networks in the step, and their bfloat16 copies where there are some
    gradients: int
    optimizer: int  # AdamW's two averages
    average: int  # of the weights, where the schedule asks for one
    activations: int
    micro_batch: int
    together: bool  # whether gradients are alive when activations peak
    flops: int  # per optimiser step, all GPUs together
    seconds: float  # per optimiser step
    hours: float  # of the stage

    @property
    def memory(self) -> int:
        moving = (self.gradients, self.activations)
        peak = sum(moving) if self.together else max(moving)
        return self.weights + self.optimizer + self.average + peak


# ---------------------------------------------------------------- counting


class Ledger:
    """Counts what autograd keeps: every storage once, parameters not at all."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.known = {p.untyped_storage()._cdata for p in parameters}
        # held, so that no storage is freed and its address used again
        self.tensors: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.known:
            self.tensors.setdefault(key, tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())


class Meter(TorchDispatchMode):
    """Counts new buffers until they are freed, and operations of matrix products."""

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.known = set(self.parameters)
        self.live = self.copies = self.peak = self.copies_at_peak = self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        formula = flop_formulas().get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        converts = function is torch.ops.aten._to_copy.default
        copies = converts and args[0].untyped_storage()._cdata in self.parameters
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage(), copies)
        return result

    def add(self, storage, copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.change(size, copy)
            weakref.finalize(storage, self.forget, key, size, copy)

    def forget(self, key: int, size: int, copy: bool) -> None:
        self.known.discard(key)
        self.change(-size, copy)

    def change(self, size: int, copy: bool) -> None:
        self.live += size
        self.copies += size * copy
        if self.live > self.peak:
            self.peak = self.live
            self.copies_at_peak = self.copies


@cache
def flop_formulas() -> dict:
    """torch's own, and those of its attention on a CPU, which it does not count."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

    aten = torch.ops.aten
    return flop_registry | {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }


@contextmanager
def watched(
    models: dict[str, nn.Module], meter: Meter, kept: dict, forward: dict
) -> Iterator[None]:
    """Adds up, by name, what each model's forward pass leaves behind and computes."""
    entered, handles = [], []

    def enter(*_) -> None:
        entered.append((meter.live, meter.flops))

    for name, model in models.items():

        def leave(*_, name=name) -> None:
            live, flops = entered.pop()
            kept[name] = kept.get(name, 0) + meter.live - live
            forward[name] = forward.get(name, 0) + meter.flops - flops

        handles.append(model.register_forward_pre_hook(enter))
        handles.append(model.register_forward_hook(leave))
    yield
    for handle in handles:
        handle.remove()


def part(name: str, model: nn.Module, kept: dict, forward: dict) -> Part:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, needs in sizes if needs)
    total = sum(count for count, _ in sizes)
    return Part(name, total, trained, kept.get(name, 0), forward.get(name, 0))


# ---------------------------------------------------------------- tensors without data


class _Splats(torch.autograd.Function):
    """A rasteriser without numbers.

    Five tensors [G, ...] -> sums [V, H, W, 4] and alpha [V, H, W, 1].
    """

    @staticmethod
    def forward(ctx, views: int, width: int, height: int, *gaussians: Tensor):
        image = gaussians[0].new_empty(views, height, width, 4)
        alpha = gaussians[0].new_empty(views, height, width, 1)
        splats = image.new_empty(views, len(gaussians[0]), SPLAT_BYTES // 4)
        ctx.save_for_backward(*gaussians, image, alpha, splats)
        return image, alpha

    @staticmethod
    def backward(ctx, *gradients):
        *gaussians, _, _, splats = ctx.saved_tensors
        torch.empty_like(splats)  # the gradients of the splats
        return None, None, None, *map(torch.empty_like, gaussians)


@contextmanager
def imagined() -> Iterator[None]:
    """Within the block tensors have no data.

    The rasteriser has a stand-in. Attention is torch's own, because ours on a CPU is
    slower, larger and more exact than what a GPU does.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def rasterize(*given):
        return _Splats.apply(len(given[5]), given[7], given[8], *given[:5])

    attention = attending_with(F.scaled_dot_product_attention)
    with torch.enable_grad(), FakeTensorMode(), rendering_with(rasterize), attention:
        yield


def without_data(model: nn.Module) -> nn.Module:
    """A model on the meta device as one on the CPU without data, in place."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, device="cpu")
                module._parameters[name] = nn.Parameter(empty, p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return model


def models_on_meta(config: Config, *names: str) -> dict[str, nn.Module | None]:
    """Some of the five networks, unlearned; None for DINO where there is none."""
    with torch.device("meta"):
        models = {name: builders()[name](config).to("meta") for name in names}
    if config.dino == "none" and "dino" in names:
        models["dino"] = None
    return models


def stage_on_meta(config: Config, stage: str) -> Stage:
    """The stage on the meta device, without data; UserError where it is not planned."""
    if stage not in PLANNED:
        raise UserError(f"plan knows the stages {', '.join(PLANNED)}; got {stage!r}.")
    models = models_on_meta(config, *STAGES[stage].models)
    if "lora" in STAGES[stage].trains:
        with torch.device("meta"):
            add_lora(models["unet"], config.lora_rank, config.seed)
    return build_stage(stage, config, models, None)


def shapes(config: Config, stage: str) -> dict[str, tuple[int, ...]]:
    """What `example` of a stage draws, by name: the shapes of one example."""
    latent, frames, targets = config.latent_size, config.num_frames, config.target_views

    def pictures(name: str, count: int, side: int) -> dict[str, tuple[int, ...]]:
        channels = {"rgb": 3, "depth": 1, "alpha": 1}
        return {f"{name}_{key}": (count, side, side, c) for key, c in channels.items()}

    found = {
        "latents": (frames, 4, latent, latent),
        "image": (config.image_size, config.image_size, 3),
        "image_latent": (4, latent, latent),
        "azimuth": (frames,),
        "elevation": (frames,),
    }
    if stage != "stage1":
        found |= {"noise": found["latents"], "sigma": (), "keep": ()}
    if stage != "diffusion":
        found |= pictures("target", targets, config.image_size)
        found |= {"target_azimuth": (targets,), "target_elevation": (targets,)}
    if stage == "stage1" and config.lambda_pixel:
        side = latent * config.decoder_upsample // config.decoder_patch
        found |= pictures("own", frames, side)
    return found


# ---------------------------------------------------------------- the rehearsal


@cache
def rehearse(config: Config, stage: str, half: bool = False) -> Rehearsal:
    """One step of a stage on one example, forward and backward.

    half: under autocast to bfloat16, as `training.train` does on a GPU.
    The LPIPS net of a loss is not counted: its weights are numbers of a file.
    """
    learner = stage_on_meta(config.replace(lambda_lpips=0.0), stage)
    models = {name: model for name, model in learner.named_children() if name in NETWORKS}
    kept, forward = {}, {}
    with imagined():
        without_data(learner)
        batch = {name: torch.zeros(1, *shape) for name, shape in shapes(config, stage).items()}
        trained = [p for p in learner.parameters() if p.requires_grad]
        for p in trained:  # gradients stay from micro-batch to micro-batch
            p.grad = torch.zeros_like(p)
        meter = Meter([*learner.parameters(), *(p.grad for p in trained), *batch.values()])
        with meter, torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            with watched(models, meter, kept, forward):
                loss, _ = learner(batch)
            loss.backward()
    parts = tuple(part(name, model, kept, forward) for name, model in models.items())
    return Rehearsal(parts, meter.peak, meter.copies_at_peak, meter.flops)


@cache
def rehearse_inference(config: Config) -> Rehearsal:
    """Condition, one guided step of the sampler, decoder; in float32.

    The LoRA is merged meanwhile, so its layers' old weights are kept beside the new
    ones.
    """
    from ..diffusion import guided_v
    from ..pipeline import GSV3DPipeline

    models = models_on_meta(config, *NETWORKS)
    frames, size, latent = config.num_frames, config.image_size, config.latent_size
    unet, forward = models["unet"], {}
    with torch.device("meta"):
        add_lora(unet, config.lora_rank)
    weights = {name: p.numel() for name, p in unet.named_parameters()}
    merged = sum(n for name, n in weights.items() if name.endswith("base_layer.weight"))
    with imagined(), torch.no_grad():
        present = {name: without_data(model) for name, model in models.items() if model is not None}
        rgb = torch.zeros(size, size, 3)
        cameras = Cameras(torch.zeros(frames, 4, 4), torch.zeros(frames, 3, 3), size, size)
        z = torch.zeros(1, frames, 4, latent, latent)
        pipe = GSV3DPipeline(config, **models)
        meter = Meter([p for model in present.values() for p in model.parameters()])
        with meter, watched(present, meter, {}, forward):
            guided_v(unet, z, torch.zeros(1), pipe.condition(rgb, 15.0, frames), 1.5)
            pipe.gaussians_from(z[0], cameras, rgb)
            generation = meter.peak
            pipe.views_from(z[0])  # for the VAE's row; `pipe(image)` does without
    parts = tuple(part(name, model, {}, forward) for name, model in present.items())
    return Rehearsal(parts, 4 * merged + generation, 0, meter.flops)


# ---------------------------------------------------------------- plans


def plan(
    config: Config,
    stage: str = "stage2",
    gpus: int = 1,
    micro_batch: int = 1,
    half: bool = True,
    checkpointing: bool | None = None,
    tflops: float = 100.0,
) -> Plan:
    """Memory per GPU, and time, of one stage.

    micro_batch: orbits that are on a GPU at once; the rest of the batch follows by
        gradient accumulation.
    half: autocast to bfloat16; weights, gradients and AdamW's two averages stay in
        float32.
    checkpointing: None takes the configuration's.
    tflops: what one GPU sustains on these models, an assumption (an A100 peaks at 312
        in bfloat16).
    """
    if checkpointing is not None:
        config = config.replace(checkpointing=checkpointing)
    step = rehearse(config, stage, half)
    schedule = schedule_of(config, stage)
    flops = schedule.batch * step.flops
    seconds = flops / (gpus * tflops * 1e12)
    trained = sum(part.trained for part in step.parts)
    return Plan(
        step.parts,
        weights=4 * sum(part.parameters for part in step.parts) + step.copies,
        gradients=4 * trained,
        optimizer=8 * trained,
        average=4 * trained if schedule.ema else 0,
        activations=micro_batch * (step.peak - step.copies),
        micro_batch=micro_batch,
        # they are kept between micro-batches, and while blocks are computed again
        together=config.checkpointing or micro_batch * gpus < schedule.batch,
        flops=flops,
        seconds=seconds,
        hours=seconds * schedule.steps / 3600,
    )


def plan_inference(config: Config, tflops: float = 100.0) -> Plan:
    """One image to Gaussians with all `sampling_steps`, in float32."""
    once = rehearse_inference(config)
    (step,) = (p.forward for p in once.parts if p.name == "unet")
    flops = once.flops + (config.sampling_steps - 1) * step
    seconds = flops / (tflops * 1e12)
    weights = 4 * sum(p.parameters for p in once.parts)
    return Plan(once.parts, weights, 0, 0, 0, once.peak, 1, False, flops, seconds, seconds / 3600)


@dataclass(frozen=True)
class Advice:
    """How a stage fits a card: N, checkpointing, and the plan; None where none fits."""

    gigabytes: int
    frames: int
    checkpointing: bool
    plan: Plan | None


def advise(config: Config, stage: str, gigabytes: int, gpus: int = 1, **options) -> Advice:
    """The quickest setting that fits a card.

    Without checkpointing, else with it, else with half the views, and so on.
    options: `half` and `tflops` of `plan`.
    """
    share = max(1, schedule_of(config, stage).batch // gpus)
    frames = config.num_frames
    while frames >= 1:
        for checkpointing in (False, True):
            asked = config.replace(num_frames=frames, checkpointing=checkpointing)
            one = plan(asked, stage, gpus, **options)
            rest = one.weights + one.gradients + one.optimizer + one.average
            room = int((USABLE * gigabytes * GB - rest) // one.activations)
            if room >= 1:
                best = plan(asked, stage, gpus, min(room, share), **options)
                return Advice(gigabytes, frames, checkpointing, best)
        frames //= 2
    return Advice(gigabytes, 0, True, None)


# ---------------------------------------------------------------- the report


def report(plan: Plan) -> str:
    """The plan as a table."""
    names = f"{'network':10}{'parameters':>16}{'trained':>14}"
    lines = [f"{names}{'loaded GB':>11}{'kept GB':>9}{'forward TFLOP':>15}"]
    for p in plan.parts:
        numbers = f"{4 * p.parameters / GB:11.2f}{p.kept / GB:9.2f}{p.forward / 1e12:15.2f}"
        lines.append(f"{p.name:10}{p.parameters:16,}{p.trained:14,}{numbers}")
    sizes = {
        "weights": plan.weights,
        "AdamW": plan.optimizer,
        "average": plan.average,
        "gradients": plan.gradients,
        "activations": plan.activations,
    }
    memory = ", ".join(f"{name} {size / GB:.1f}" for name, size in sizes.items())
    step = f"{plan.flops / 1e12:,.1f} TFLOP, {plan.seconds:.2f} s"
    return "\n".join(
        [
            *lines,
            "(kept for the backward pass and computed: for one orbit)\n",
            f"per GPU, {plan.micro_batch} at once: {memory}: {plan.memory / GB:.1f} GB",
            f"per step: {step}; the whole stage {plan.hours:,.1f} h",
        ]
    )


def report_cards(config: Config, stage: str, gpus: int = 1, **options) -> str:
    """What to switch on for cards of 24, 48 and 80 GB."""
    lines = [f"{'card':8}{'N':>4}{'checkpointing':>15}{'orbits at once':>16}{'GB':>8}{'hours':>9}"]
    for card in CARDS:
        advice = advise(config, stage, card, gpus, **options)
        best = advice.plan
        if best is None:
            lines.append(f"{card:2} GB: does not fit")
            continue
        switch = "on" if advice.checkpointing else "off"
        numbers = f"{best.micro_batch:16}{best.memory / GB:8.1f}{best.hours:9,.0f}"
        lines.append(f"{f'{card} GB':8}{advice.frames:4}{switch:>15}{numbers}")
    return "\n".join(lines)


def remarks(config: Config, step: Plan) -> str:
    """What the table leaves out: the VAE, and a lever that is not in this code."""
    vae = sum(p.numel() for p in models_on_meta(config, "vae")["vae"].parameters())
    saved = 0.75 * step.optimizer / GB
    return (
        f"VAE: {vae:,} parameters, {4 * vae / GB:.2f} GB; not loaded in a step, "
        "because latents are encoded before.\n"
        f"Not in this code: 8-bit Adam would save {saved:.2f} GB."
    )


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", __doc__, "--preset", "--gpus", preset="paper", gpus=4)
    add = parser.add_argument
    add("--stage", default="stage2", choices=[*PLANNED, "inference"])
    add("--frames", type=whole(1, 1000), help="N, views per orbit")
    add("--rank", type=whole(1, 10_000), help="of the LoRA")
    add("--micro-batch", type=whole(1, 100_000), help="orbits on a GPU (default: the preset's)")
    switch = argparse.BooleanOptionalAction
    add("--checkpointing", action=switch, help="recompute blocks (default: the preset's)")
    add("--float32", action="store_true", help="no autocast to bfloat16")
    add("--tflops", type=number(1e-3, 1e6), default=100.0, help="of one GPU (an assumption)")
    return parser


def run(args: argparse.Namespace) -> None:
    changes = {"num_frames": args.frames, "lora_rank": args.rank}
    changes |= {"checkpointing": args.checkpointing}
    given = {name: value for name, value in changes.items() if value is not None}
    config = preset(args.preset, **given)
    if args.stage == "inference":
        return print(report(plan_inference(config, args.tflops)))
    schedule = schedule_of(config, args.stage)
    micro_batch = args.micro_batch or schedule.micro_batch or max(1, schedule.batch // args.gpus)
    options = dict(gpus=args.gpus, half=not args.float32, tflops=args.tflops)
    step = plan(config, args.stage, micro_batch=micro_batch, **options)
    cards = report_cards(config, args.stage, **options)
    print(report(step), cards, remarks(config, step), sep="\n\n")
