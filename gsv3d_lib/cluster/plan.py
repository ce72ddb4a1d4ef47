"""Memory and time of a stage before anything is trained, and of an inference: rehearsed
with tensors that have no data.

    python -m gsv3d_lib plan --scale paper --stage stage2 --gpus 4 --frames 16 --rank 16

`rehearse` runs one real training step, the code of `stages.py` and `distillation.py`
itself, with torch's fake tensors: shapes, types and lifetimes are true, numbers are not
there. Every buffer that comes and goes is counted, and every matrix product. So the
plan follows the code, not a formula. Assumed are how fast the device computes
(`--tflops`), and that a GPU's autocast does what a CPU's does (a GPU keeps norms in
float32, so expect somewhat more). The rasteriser cannot run without numbers; a stand-in
has its outputs and, roughly, its buffers. benchmarks/memory.py holds the plan against
measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attention import attending_with
from ..cameras import Cameras
from ..config import PRESETS, Config, preset
from ..lora import add_lora
from ..rendering import rendering_with
from ..stages import STAGES, build_stage, schedule_of
from ..system.command import command_parser, exit_code, number, whole
from ..system.errors import UserError
from ..training import Stage
from ..weights.checkpoint import builders

GB = 1e9
CARDS = (24, 48, 80)  # GB of common GPUs
USABLE = 0.92  # of a card; the rest is taken by CUDA itself and by gaps between buffers
PLANNED = ("diffusion", "stage1", "stage2")
NETWORKS = ("vae", "clip", "unet", "dino", "decoder")
SPLAT_BYTES = (
    # that `rendering/rasterizer.py` keeps of one Gaussian in one view: splat 64, box
    # 20, place in a list 8; rounded
    96
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One network in a training step or an inference."""

    name: str
    parameters: int
    trained: int  # of those, the ones that the optimiser moves
    kept: int  # bytes that stay for the backward pass of one example
    forward: int  # floating point operations of one example


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What one step on one example takes, or one inference. Bytes, parameters and their
    gradients left out.
    """

    parts: tuple[Part, ...]
    peak: int  # of all that is alive at once
    copies: int  # of it, bfloat16 copies of weights, which a larger batch does not multiply
    flops: int  # forward, backward, and what checkpointing computes again


@dataclasses.dataclass(frozen=True)
class Plan:
    """One stage on one kind of machine. Memory is per GPU, in bytes."""

    parts: tuple[Part, ...]
    weights: int  # of all networks in the step, and their bfloat16 copies where there are some
    gradients: int
    optimizer: int  # AdamW's two averages
    average: int  # of the weights, where the schedule asks for one
    activations: int
    micro_batch: int
    # gradients are there when activations peak: kept between micro-batches, or blocks
    # recomputed
    together: bool
    flops: int  # per optimiser step, all GPUs together
    seconds: float  # per optimiser step
    hours: float  # of the stage

    @property
    def memory(self) -> int:
        pair = self.gradients, self.activations
        return (
            self.weights
            + self.optimizer
            + self.average
            + (sum(pair) if self.together else max(pair))
        )


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
    """Within the block every new buffer is counted until it is freed, and the
    operations of every matrix product.
    """

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
        copies = (
            function is torch.ops.aten._to_copy.default
            and args[0].untyped_storage()._cdata in self.parameters
        )
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage(), copies)
        return result

    def add(self, storage, copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
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
            self.peak, self.copies_at_peak = self.live, self.copies


@cache
def flop_formulas() -> dict:
    """torch's own, and those of its fused attention on a CPU, which it does not count."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

    aten = torch.ops.aten
    fused = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    return flop_registry | dict(zip(fused, (sdpa_flop, sdpa_backward_flop)))


# ---------------------------------------------------------------- the rehearsal


class _Splats(torch.autograd.Function):
    """A rasteriser without numbers: five tensors [G, ...] -> sums [V, H, W, 4] and
    alpha [V, H, W, 1].
    """

    @staticmethod
    def forward(ctx, views: int, width: int, height: int, *gaussians: Tensor):
        image, alpha = (
            gaussians[0].new_empty(views, height, width, channels) for channels in (4, 1)
        )
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

    The rasteriser cannot run without numbers and has a stand-in. Attention is torch's
    own, because ours on a CPU is slower, larger and more exact than what a GPU does.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def rasterize(*given):
        return _Splats.apply(len(given[5]), given[7], given[8], *given[:5])

    with (
        torch.enable_grad(),
        FakeTensorMode(),
        rendering_with(rasterize),
        attending_with(F.scaled_dot_product_attention),
    ):
        yield


def without_data(model: nn.Module) -> nn.Module:
    """The parameters and buffers of a model on the meta device as tensors of the CPU
    without data, in place.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, device="cpu"), p.requires_grad
                )
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
    """The stage on the meta device, without data to draw from.

    Raises UserError for a stage that is not planned.
    """
    if stage not in PLANNED:
        raise UserError(f"plan knows the stages {', '.join(PLANNED)}; got {stage!r}.")
    spec = STAGES[stage]
    models = models_on_meta(config, *spec.models)
    if "lora" in spec.trains:
        with torch.device("meta"):
            add_lora(models["unet"], config.lora_rank, config.seed)
    return build_stage(stage, config, models, None)


def shapes(config: Config, stage: str) -> dict[str, tuple[int, ...]]:
    """What `example` of a stage draws, by name: the shapes of one example."""
    size, latent, frames, targets = (
        config.image_size,
        config.latent_size,
        config.num_frames,
        config.target_views,
    )
    found = {
        "latents": (frames, 4, latent, latent),
        "image": (size, size, 3),
        "image_latent": (4, latent, latent),
    }
    found |= {"azimuth": (frames,), "elevation": (frames,)}
    if stage != "stage1":
        found |= {"noise": found["latents"], "sigma": (), "keep": ()}
    if stage != "diffusion":
        found |= {
            f"target_{name}": (targets, size, size, n)
            for name, n in (("rgb", 3), ("depth", 1), ("alpha", 1))
        }
        found |= {"target_azimuth": (targets,), "target_elevation": (targets,)}
    if stage == "stage1" and config.lambda_pixel:
        side = latent * config.decoder_upsample // config.decoder_patch
        found |= {
            f"own_{name}": (frames, side, side, n)
            for name, n in (("rgb", 3), ("depth", 1), ("alpha", 1))
        }
    return found


@contextmanager
def watched(
    models: dict[str, nn.Module], meter: Meter, kept: dict, forward: dict
) -> Iterator[None]:
    """Within the block, what each model's forward pass leaves behind and computes is
    added up under its name.
    """
    entered, handles = [], []
    for name, model in models.items():

        def leave(*_, name=name):
            live, flops = entered.pop()
            kept[name] = kept.get(name, 0) + meter.live - live
            forward[name] = forward.get(name, 0) + meter.flops - flops

        handles.append(
            model.register_forward_pre_hook(lambda *_: entered.append((meter.live, meter.flops)))
        )
        handles.append(model.register_forward_hook(leave))
    yield
    for handle in handles:
        handle.remove()


def part(name: str, model: nn.Module, kept: dict, forward: dict) -> Part:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, needs in sizes if needs)
    return Part(name, sum(n for n, _ in sizes), trained, kept.get(name, 0), forward.get(name, 0))


@cache
def rehearse(config: Config, stage: str, half: bool = False) -> Rehearsal:
    """One step of a stage on one example, forward and backward, with the checkpointing
    of the configuration.

    half: under autocast to bfloat16, as `training.train` does on a GPU. The LPIPS net
        of a loss is not counted: its weights are numbers of a file.
    """
    learner = stage_on_meta(config.replace(lambda_lpips=0.0), stage)
    models = {name: model for name, model in learner.named_children() if name in NETWORKS}
    kept, forward = {}, {}
    with imagined():
        without_data(learner)
        batch = {name: torch.zeros(1, *shape) for name, shape in shapes(config, stage).items()}
        for p in learner.parameters():
            # they stay from micro-batch to micro-batch
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        gradients = [p.grad for p in learner.parameters() if p.requires_grad]
        meter = Meter([*learner.parameters(), *gradients, *batch.values()])
        with meter, torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            with watched(models, meter, kept, forward):
                loss, _ = learner(batch)
            loss.backward()
    parts = tuple(part(name, model, kept, forward) for name, model in models.items())
    return Rehearsal(parts, meter.peak, meter.copies_at_peak, meter.flops)


@cache
def rehearse_inference(config: Config) -> Rehearsal:
    """One image to Gaussians: condition, one guided step of the sampler, decoder; in
    float32.

    The LoRA is merged meanwhile, so its layers' old weights are kept beside the new
    ones.
    """
    from ..diffusion import guided_v
    from ..lora import add_lora
    from ..pipeline import GSV3DPipeline

    models, frames, size = models_on_meta(config, *NETWORKS), config.num_frames, config.image_size
    unet, kept, forward = models["unet"], {}, {}
    with torch.device("meta"):
        add_lora(unet, config.lora_rank)
    merged = sum(
        p.numel() for name, p in unet.named_parameters() if name.endswith("base_layer.weight")
    )
    with imagined(), torch.no_grad():
        for model in models.values():
            model is None or without_data(model)
        rgb = torch.zeros(size, size, 3)
        cameras = Cameras(torch.zeros(frames, 4, 4), torch.zeros(frames, 3, 3), size, size)
        z = torch.zeros(1, frames, 4, config.latent_size, config.latent_size)
        pipe = GSV3DPipeline(config, **models)
        present = {name: model for name, model in models.items() if model is not None}
        meter = Meter([p for model in present.values() for p in model.parameters()])
        with meter, watched(present, meter, kept, forward):
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
    step, schedule = rehearse(config, stage, half), schedule_of(config, stage)
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
        together=config.checkpointing or micro_batch * gpus < schedule.batch,
        flops=flops,
        seconds=seconds,
        hours=seconds * schedule.steps / 3600,
    )


def plan_inference(config: Config, tflops: float = 100.0) -> Plan:
    """One image to Gaussians with all `sampling_steps`, in float32, as `GSV3DPipeline`
    does it.
    """
    once = rehearse_inference(config)
    forward = {p.name: p.forward for p in once.parts}
    flops = once.flops + (config.sampling_steps - 1) * forward["unet"]
    seconds = flops / (tflops * 1e12)
    weights = 4 * sum(p.parameters for p in once.parts)
    return Plan(once.parts, weights, 0, 0, 0, once.peak, 1, False, flops, seconds, seconds / 3600)


@dataclasses.dataclass(frozen=True)
class Advice:
    """How a stage fits a card: orbits at once (0 where nothing fits), checkpointing, N,
    and the plan of that.
    """

    gigabytes: int
    frames: int
    checkpointing: bool
    plan: Plan | None


def advise(
    config: Config,
    stage: str,
    gigabytes: int,
    gpus: int = 1,
    half: bool = True,
    tflops: float = 100.0,
) -> Advice:
    """The quickest setting that fits a card: without checkpointing, else with it, else
    with half the views, and so on.
    """
    share = max(1, schedule_of(config, stage).batch // gpus)
    frames = config.num_frames
    while frames >= 1:
        for checkpointing in (False, True):
            asked = config.replace(num_frames=frames, checkpointing=checkpointing)
            one = plan(asked, stage, gpus, 1, half, None, tflops)
            rest = one.weights + one.gradients + one.optimizer + one.average
            room = int((USABLE * gigabytes * GB - rest) // one.activations)
            if room >= 1:
                best = plan(asked, stage, gpus, min(room, share), half, None, tflops)
                return Advice(gigabytes, frames, checkpointing, best)
        frames //= 2
    return Advice(gigabytes, 0, True, None)


# ---------------------------------------------------------------- the report


def report(plan: Plan) -> str:
    """The plan as a table."""
    lines = [
        f"{'network':10}{'parameters':>16}{'trained':>14}{'loaded GB':>11}{'kept GB':>9}{'forward TFLOP':>15}"
    ]
    for p in plan.parts:
        numbers = f"{4 * p.parameters / GB:11.2f}{p.kept / GB:9.2f}{p.forward / 1e12:15.2f}"
        lines.append(f"{p.name:10}{p.parameters:16,}{p.trained:14,}{numbers}")
    lines += [
        "(kept for the backward pass and computed: for one orbit)",
        "",
        f"per GPU, {plan.micro_batch} at once: weights {plan.weights / GB:.1f}, AdamW {plan.optimizer / GB:.1f}, average "
        f"{plan.average / GB:.1f}, gradients {plan.gradients / GB:.1f}, activations {plan.activations / GB:.1f}: "
        f"{plan.memory / GB:.1f} GB",
        f"per step: {plan.flops / 1e12:,.1f} TFLOP, {plan.seconds:.2f} s; the whole stage {plan.hours:,.1f} h",
    ]
    return "\n".join(lines)


def report_cards(
    config: Config, stage: str, gpus: int = 1, half: bool = True, tflops: float = 100.0
) -> str:
    """What to switch on for cards of 24, 48 and 80 GB."""
    lines = [f"{'card':8}{'N':>4}{'checkpointing':>15}{'orbits at once':>16}{'GB':>8}{'hours':>9}"]
    for card in CARDS:
        a = advise(config, stage, card, gpus, half, tflops)
        if a.plan is None:
            lines.append(f"{card:2} GB: does not fit")
            continue
        switch = "on" if a.checkpointing else "off"
        numbers = f"{a.plan.micro_batch:16}{a.plan.memory / GB:8.1f}{a.plan.hours:9,.0f}"
        lines.append(f"{f'{card} GB':8}{a.frames:4}{switch:>15}{numbers}")
    return "\n".join(lines)


def remarks(config: Config, stage: str, step: Plan) -> str:
    """What the table does not say: the VAE, and levers of other projects that are not
    in this code.
    """
    from ..vae import build_vae

    with torch.device("meta"):
        vae = sum(p.numel() for p in build_vae(config).parameters())
    pixels = config.target_views * config.image_size**2
    splats = (
        config.target_views * config.num_frames * (config.latent_size // config.decoder_patch) ** 2
    )
    buffers = SPLAT_BYTES * splats * config.decoder_upsample**2 + 4 * 5 * pixels
    drawn = (
        ""
        if stage == "diffusion"
        else f"deferred rendering at most {buffers / GB:.2f} GB per orbit, "
    )
    return (
        f"VAE: {vae:,} parameters, {4 * vae / GB:.2f} GB; latents are encoded and cached before the stage starts, so it is "
        "not\nloaded in a step, and a tiny VAE would save nothing here. For pictures it decodes views in chunks of "
        f"{config.vae_clip} (`vae_clip`).\n"
        f"Not in this code: 8-bit Adam would save {0.75 * step.optimizer / GB:.2f} GB, {drawn}tiny VAE: 0."
    )


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("--scale", default="paper", choices=PRESETS)
    parser.add_argument("--stage", default="stage2", choices=[*PLANNED, "inference"])
    parser.add_argument("--gpus", type=whole(1, 100_000), default=4)
    parser.add_argument("--frames", type=whole(1, 1000), help="N, views per orbit")
    parser.add_argument("--rank", type=whole(1, 10_000), help="of the LoRA")
    parser.add_argument(
        "--micro-batch",
        type=whole(1, 100_000),
        help="orbits on a GPU at once (default: the preset's)",
    )
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute blocks (default: the preset's)",
    )
    parser.add_argument("--float32", action="store_true", help="no autocast to bfloat16")
    parser.add_argument(
        "--tflops",
        type=number(1e-3, 1e6),
        default=100.0,
        help="sustained by one GPU (an assumption)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    changes = {
        "num_frames": args.frames,
        "lora_rank": args.rank,
        "checkpointing": args.checkpointing,
    }
    config = preset(
        args.scale, **{name: value for name, value in changes.items() if value is not None}
    )
    if args.stage == "inference":
        return print(report(plan_inference(config, args.tflops)))
    schedule = schedule_of(config, args.stage)
    micro_batch = args.micro_batch or schedule.micro_batch or max(1, schedule.batch // args.gpus)
    options = dict(gpus=args.gpus, half=not args.float32, tflops=args.tflops)
    step = plan(config, args.stage, micro_batch=micro_batch, **options)
    print(
        report(step),
        report_cards(config, args.stage, **options),
        remarks(config, args.stage, step),
        sep="\n\n",
    )


if __name__ == "__main__":
    sys.exit(main())
