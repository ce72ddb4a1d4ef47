"""Where does the time of the chain go? The training steps and generation on one CPU
thread, piece by piece.

    python benchmarks/chain.py [--sections steps generation comparisons] [--rounds 3] [--json FILE] [--markdown FILE]

Everything runs in one process on one thread, interleaved, so that other load on the
machine hits all alike; reported is the minimum CPU time over the rounds. Only shares
and ratios mean anything on another machine. Three sections:

    steps        the pieces of one step of the diffusion stage, of stage 1 and of stage 2
    generation   the pieces of one image -> Gaussians, and the whole against its matrix products timed alone
    comparisons  the same work done in two ways, each a ratio
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gsv3d_lib.cameras import batch_cameras
from gsv3d_lib.config import Config
from gsv3d_lib.data.dataset import COLUMN_NAMES, ObjectViews, ViewTensors, resize_views
from gsv3d_lib.data.examples import Orbits, load_orbits
from gsv3d_lib.decoder import plane_sweep
from gsv3d_lib.diffusion import Condition, diffusion_draws, guided_v, predict_v
from gsv3d_lib.distillation import DistillationStage
from gsv3d_lib.encoders import image_features, orbit_condition
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.lora import add_lora, load_lora, merged_lora
from gsv3d_lib.pipeline import GSV3DPipeline
from gsv3d_lib.pretraining import DiffusionStage
from gsv3d_lib.rendering import render
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.training import Stage, draw_batch, update_average
from gsv3d_lib.unet import FrameConv
from gsv3d_lib.vae import encode
from gsv3d_lib.weights.checkpoint import load_model

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "data" / "checkpoints" / "tiny"
OBJECTS = (5002, 5008)  # seeds of a face and a chair that nothing was trained on
CEILING = 2.0  # --check fails where generation takes more than this many times its matrix products
SECTIONS = ("steps", "generation", "comparisons")


def make_orbits(config: Config, vae) -> Orbits:
    """Two procedural objects, rendered here and encoded."""
    from gsv3d_lib.cameras import orbit_cameras
    from gsv3d_lib.data.make_dataset import dataset_angles
    from gsv3d_lib.data.procedural.objects import procedural_object
    from gsv3d_lib.data.raycast import render_mesh

    parts = []
    for seed in OBJECTS:
        azimuths, elevations = dataset_angles(seed)
        cameras = orbit_cameras(azimuths, elevations, config.image_size)
        rgba, depth = render_mesh(procedural_object(seed), cameras, 1)
        views = ObjectViews(
            str(seed), (rgba * 255).round().astype("u1"), depth, cameras, azimuths, elevations
        )
        parts.append(resize_views(views, config.image_size))
    columns = {name: torch.stack(column) for name, column in zip(COLUMN_NAMES, zip(*parts))}
    return load_orbits(ViewTensors([str(seed) for seed in OBJECTS], **columns), vae, progress=False)


# ----------------------------------------------------------------------------------------------------- measuring


class Watch:
    """CPU seconds by name: `with watch("decoder"): ...` adds to them."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

    @contextmanager
    def modules(self, **modules: nn.Module | None) -> Iterator[None]:
        """Within the block every forward pass of the modules is added under their
        names.
        """
        entered: list[float] = []
        handles = []
        for name, module in modules.items():
            if module is None:
                continue

            def leave(*_, name=name):
                self.seconds[name] = (
                    self.seconds.get(name, 0.0) + time.process_time() - entered.pop()
                )

            handles.append(
                module.register_forward_pre_hook(lambda *_: entered.append(time.process_time()))
            )
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rest_of(self, whole: str, parts: tuple[str, ...], rest: str) -> None:
        """Rename what `whole` took beyond its parts."""
        self.seconds[rest] = self.seconds.pop(whole) - sum(
            self.seconds.get(part, 0.0) for part in parts
        )


class Cut:
    """Tensors that go on as new leaves, so that the backward passes behind and before
    them can be timed apart.
    """

    def __init__(self, tensors: list[Tensor]):
        self.outputs = tensors
        self.leaves = [t.detach().requires_grad_() for t in tensors]

    def backward(self) -> None:
        """Hand on the gradients that have arrived at the leaves."""
        arrived = [
            (t, leaf.grad) for t, leaf in zip(self.outputs, self.leaves) if leaf.grad is not None
        ]
        torch.autograd.backward(*zip(*arrived))


def minimum(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds, the least of all rounds for each name."""
    return {name: 1e3 * min(r[name] for r in rounds) for name in rounds[0]}


def least(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Minimum CPU milliseconds of each action; they take turns, and the first turn
    warms up.
    """
    seconds = dict.fromkeys(actions, math.inf)
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = time.process_time()
            action()
            seconds[name] = min(seconds[name], time.process_time() - start) if turn else math.inf
    return {name: 1e3 * value for name, value in seconds.items()}


# -------------------------------------------------------------------------------------------------- training steps


def timed_step(
    stage: Stage, optimizer, average: dict[str, Tensor], batch: int, ema: float
) -> Watch:
    """One step as `training.train` makes it. The graph is cut behind U-Net and decoder,
    which changes no gradient.
    """
    watch, cuts = Watch(), {}

    def cut_v(module, args, v: Tensor) -> Tensor:
        cuts["unet"] = Cut([v])
        return cuts["unet"].leaves[0]

    def cut_scenes(module, args, scenes: list[Gaussians]) -> list[Gaussians]:
        cuts["decoder"] = Cut([t for scene in scenes for t in scene.tensors()])
        leaves = iter(cuts["decoder"].leaves)
        return [Gaussians(*(next(leaves) for _ in scene.tensors())) for scene in scenes]

    models = {name: getattr(stage, name, None) for name in ("clip", "dino", "unet", "decoder")}
    optimizer.zero_grad(set_to_none=True)
    with watch("draw"):
        examples = draw_batch(stage, 0, 0, batch)
    # the watch's hooks come first: cutting is not a model's time
    with watch.modules(**models), ExitStack() as hooks:
        for name, cut in (("unet", cut_v), ("decoder", cut_scenes)):
            if models[name] is not None:
                hooks.callback(models[name].register_forward_hook(cut).remove)
        with watch("forward"):
            loss, _ = stage(examples)
    watch.rest_of("forward", tuple(models), "loss")
    with watch("loss backward"):
        loss.backward()
    for name in reversed(cuts):
        with watch(f"{name} backward"):
            cuts[name].backward()
    with watch("optimiser"):
        torch.nn.utils.clip_grad_norm_([p for p in stage.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        update_average(average, stage.training_state(), ema, 0)
    return watch


def make_stages(
    orbits: Orbits, config: Config, weights: Path = WEIGHTS
) -> dict[str, tuple[Stage, int, float]]:
    """The three stages with the shipped weights, each with its batch and the decay of
    its average.
    """

    def model(name: str, trained: bool = True) -> nn.Module:
        return load_model(weights, name).requires_grad_(trained)

    config = config.replace(view_counts=(config.num_frames,))
    unet = add_lora(model("unet"), config.lora_rank)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                # at its start a LoRA is zero, and so would be half of its gradients
                p.normal_(std=1e-3)
    stages = {
        "diffusion": (
            DiffusionStage(model("unet"), model("clip"), orbits, config),
            config.diffusion_schedule,
        ),
        "stage1": (DecoderStage(model("decoder"), model("dino"), orbits, config), config.stage1),
        "stage2": (
            DistillationStage(unet, model("clip"), model("decoder"), model("dino"), orbits, config),
            config.stage2,
        ),
    }
    return {
        name: (stage, schedule.batch, schedule.ema) for name, (stage, schedule) in stages.items()
    }


def measure_steps(orbits: Orbits, config: Config, rounds: int) -> dict:
    """{stage: {"batch": B, "cpu_ms": {piece: milliseconds}}}"""
    stages, taken = make_stages(orbits, config), {}
    state = {}
    for name, (stage, _, ema) in stages.items():
        parameters = [p for p in stage.parameters() if p.requires_grad]
        average = (
            {key: p.detach().clone() for key, p in stage.training_state().items()} if ema else {}
        )
        # every round: the same weights
        state[name] = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99)), average
    for turn in range(rounds + 1):
        for name, (stage, batch, ema) in stages.items():
            seconds = timed_step(stage, *state[name], batch, ema).seconds
            taken.setdefault(name, []).extend([seconds] if turn else [])
    return {
        name: {"batch": batch, "cpu_ms": minimum(taken[name])}
        for name, (_, batch, _) in stages.items()
    }


# -------------------------------------------------------------------------------------------------------- products

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}  # and every kind of fused attention


class Layout(NamedTuple):
    """What a product's time depends on of a tensor; stride 0 is an expanded dimension."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Random numbers in this layout."""
        room = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        return torch.randn(room).to(self.dtype).as_strided(self.shape, self.stride)


class Product(NamedTuple):
    """One call of a matrix product, convolution or attention, with layouts in the place
    of tensors.
    """

    function: torch._ops.OpOverload
    args: tuple
    kwargs: tuple[tuple[str, object], ...]


class Products(TorchDispatchMode):
    """Within the block every product is written down, in order."""

    def __init__(self):
        super().__init__()
        self.calls: list[Product] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in PRODUCTS or name.startswith("_scaled_dot_product"):
            named = tuple((key, frozen(value)) for key, value in (kwargs or {}).items())
            self.calls.append(Product(function, tuple(frozen(a) for a in args), named))
        return function(*args, **(kwargs or {}))


def frozen(value):
    """An argument as something to compare and to remember."""
    if isinstance(value, Tensor):
        return Layout(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def replayed(calls: list[Product]) -> Callable[[], None]:
    """A function that makes the calls again, in order and nothing else, on random
    tensors of the same layouts.
    """
    ready = {}
    for call in set(calls):
        args = [a.tensor() if isinstance(a, Layout) else a for a in call.args]
        kwargs = {key: a.tensor() if isinstance(a, Layout) else a for key, a in call.kwargs}
        ready[call] = call.function, args, kwargs
    sequence = [ready[call] for call in calls]

    @torch.no_grad()
    def replay() -> None:
        for function, args, kwargs in sequence:
            function(*args, **kwargs)

    return replay


# ------------------------------------------------------------------------------------------------------ generation


def without_frame_conv(unet):
    """The U-Net with diffusers' own three-dimensional convolutions over frames. In
    place.
    """
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FrameConv):
                (out, channels), padding = child.weight.shape[:2], (1, 0, 0)
                conv = nn.Conv3d(channels, out, (3, 1, 1), padding=padding, device="meta")
                conv.weight, conv.bias = child.weight, child.bias
                setattr(module, name, conv)
    return unet


def without_token_attention(unet):
    """The U-Net with queries and keys in its attention to the one token. In place."""
    unet.set_attn_processor(AttnProcessor2_0())
    return unet


def std_of_views(values: Tensor) -> Tensor:
    """`decoder.deviation` by torch's own reduction."""
    return values.std(0, correction=0)


def guided_by_two(
    unet, noisy: Tensor, sigma: Tensor, condition: Condition, weight: Tensor
) -> Tensor:
    """`diffusion.guided_v` in two passes, one with the condition and one without."""
    v, null = (predict_v(unet, noisy, sigma, c) for c in (condition, condition.dropped()))
    return null + weight * (v - null)


def lora_apart(unet, scale: float | None = None):
    """In place of `lora.merged_lora`: the U-Net with its LoRA beside the weights."""
    return unet


@contextmanager
def plain_code() -> Iterator[None]:
    """Within the block: the LoRA apart, two passes for guidance, and torch's `std` in
    the plane sweep.
    """
    ways = {
        "pipeline.merged_lora": lora_apart,
        "diffusion.guided_v": guided_by_two,
        "decoder.deviation": std_of_views,
    }
    with ExitStack() as stack:
        for name, way in ways.items():
            stack.enter_context(patch(f"gsv3d_lib.{name}", way))
        yield


def measure_generation(orbits: Orbits, rounds: int, steps: int) -> dict:
    """The pieces of `pipe.generate`, the whole against its products, and the same
    without the shortcuts.
    """
    image, options = (
        orbits.scene(0).rgb[12],
        dict(steps=steps, progress=False, back_projection=False),
    )
    pipe, plain = (GSV3DPipeline.from_pretrained(WEIGHTS, device="cpu") for _ in range(2))
    without_token_attention(without_frame_conv(plain.unet))
    models = dict(
        vae=pipe.vae.encoder, clip=pipe.clip, unet=pipe.unet, dino=pipe.dino, decoder=pipe.decoder
    )
    pieces: list[dict[str, float]] = []

    def generate():
        watch = Watch()
        with watch.modules(**models), watch("all"):
            result = pipe.generate(image, **options)
        watch.rest_of("all", tuple(models), "rest")
        pieces.append(watch.seconds)
        return result.gaussians

    def generate_plainly():
        with plain_code():
            return plain.generate(image, **options).gaussians

    with Products() as now:
        ours = generate()
    with Products() as before:
        theirs = generate_plainly()
    pieces.clear()  # recorded ones are slow
    actions = {
        "generation": generate,
        "its products": replayed(now.calls),
        "generation, plain": generate_plainly,
        "its products, plain": replayed(before.calls),
    }
    cpu_ms = least(actions, rounds)
    return {
        "steps": steps,
        "cpu_ms": cpu_ms,
        "pieces_cpu_ms": minimum(pieces[1:]),  # the first turn warms up
        "products": {
            "calls": len(now.calls),
            "kinds": len(set(now.calls)),
            "calls, plain": len(before.calls),
        },
        "ratio to products": cpu_ms["generation"] / cpu_ms["its products"],
        "ratio to products, plain": cpu_ms["generation, plain"] / cpu_ms["its products, plain"],
        "plain / now": cpu_ms["generation, plain"] / cpu_ms["generation"],
        "largest difference": max(
            float((a - b).abs().max()) for a, b in zip(ours.tensors(), theirs.tensors())
        ),
    }


# ----------------------------------------------------------------------------------------------------- comparisons


class Comparison(NamedTuple):
    """The same work with and without an idea. used: what the code does on a CPU."""

    work: str
    idea: str
    used: str
    without: Callable[[], object]
    with_it: Callable[[], object]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention with its score matrix written out."""
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def lora_unet():
    """The U-Net with the shipped LoRA."""
    return load_lora(load_model(WEIGHTS, "unet").requires_grad_(False), WEIGHTS / "lora")


def channels_last(unet):
    """A copy whose two-dimensional convolutions keep channels last."""
    unet = copy.deepcopy(unet)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return unet


def recomputing(model):
    """A copy with gradient checkpointing."""
    model = copy.deepcopy(model)
    model.train()
    model.enable_gradient_checkpointing()
    return model


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


class Workbench:
    """One orbit with its condition, and four pieces of work on it. Guided or not, the
    U-Net gets two orbits at once.
    """

    def __init__(self, orbits: Orbits, config: Config):
        orbit = orbits.orbit(0, 12, config.num_frames)
        draws = diffusion_draws(orbit["latents"], torch.Generator().manual_seed(0), config)
        batch = {
            key: value[None] for key, value in (orbit | draws | {"keep": torch.ones(())}).items()
        }
        clip, dino, decoder = (load_model(WEIGHTS, name) for name in ("clip", "dino", "decoder"))
        self.latents, self.sigma = batch["latents"], torch.tensor([2.0])
        self.noisy = self.latents + 2.0 * batch["noise"]
        self.cameras = batch_cameras(batch["azimuth"], batch["elevation"], config.image_size)
        self.four = batch_cameras(
            batch["azimuth"][:, ::4], batch["elevation"][:, ::4], config.image_size
        )[0]
        self.pictures = orbits.scene(0).rgb[: config.num_frames]
        with torch.no_grad():
            self.condition = orbit_condition(batch, clip, config)
            self.features = image_features(dino, batch["image"])
            self.scene = decoder(self.latents, self.cameras, self.features)[0]

    @torch.no_grad()
    def sample(self, unet, ask=guided_v, context=nullcontext) -> Tensor:
        """What a step of the sampler asks of the U-Net."""
        with context():
            return ask(unet, self.noisy, self.sigma, self.condition, 1.5)

    def train(self, unet, context=nullcontext, vae=None) -> None:
        """The U-Net there and back, after encoding the views of two orbits if there is
        a `vae`.
        """
        if vae is not None:
            with torch.no_grad():
                encode(vae, torch.cat([self.pictures, self.pictures]))
        unet.zero_grad(set_to_none=True)
        with context():
            v = predict_v(
                unet,
                self.noisy.repeat(2, 1, 1, 1, 1),
                self.sigma.repeat(2),
                self.condition.with_null(),
            )
        v.float().square().mean().backward()

    def decode(self, decoder, context=nullcontext) -> None:
        """The decoder there and back, to its weights and its latents."""
        decoder.zero_grad(set_to_none=True)
        latents = self.latents.clone().requires_grad_()
        with context():
            maps = decoder.output_maps(latents, self.cameras, self.features)[0]
        maps.float().square().mean().backward()

    def sweep(self, decoder, context=nullcontext) -> None:
        """The decoder's plane sweep alone, there and back to its latents."""
        latents = self.latents[0].clone().requires_grad_()
        with context():
            plane_sweep(
                latents, self.cameras[0], tuple(latents.shape[-2:]), decoder.config
            ).square().mean().backward()

    def render(self, groups: list) -> None:
        """The Gaussians rendered from each group of cameras, and back."""
        leaves = Gaussians(*(t.clone().requires_grad_() for t in self.scene.tensors()))
        sum(render(leaves, views).rgb.square().sum() for views in groups).backward()


def sampling_comparisons(bench: Workbench) -> Iterator[Comparison]:
    work, sample = "U-Net, one guided step", bench.sample
    base, apart = load_model(WEIGHTS, "unet"), lora_unet()
    lora = merged_lora(apart)
    full = without_token_attention(copy.deepcopy(base))
    slow = without_frame_conv(copy.deepcopy(base))
    token, frame = "attention to one token without queries and keys", "frame convolution in 2-D"
    yield Comparison(work, "LoRA merged", "yes", lambda: sample(apart), lambda: sample(lora))
    yield Comparison(work, token, "yes", lambda: sample(full), lambda: sample(base))
    yield Comparison(work, frame, "yes", lambda: sample(slow), lambda: sample(base))
    last = channels_last(base)
    yield Comparison(work, "channels last", "no", lambda: sample(base), lambda: sample(last))
    yield Comparison(
        work, "bf16 autocast", "no", lambda: sample(base), lambda: sample(base, context=bf16)
    )
    together = "condition and null condition in one batch"
    yield Comparison(
        work, together, "yes", lambda: sample(base, guided_by_two), lambda: sample(base)
    )


def training_comparisons(bench: Workbench) -> Iterator[Comparison]:
    work, train = "U-Net, 2 orbits, forward and backward", bench.train
    unet, vae = load_model(WEIGHTS, "unet"), load_model(WEIGHTS, "vae")
    slow, again = without_frame_conv(copy.deepcopy(unet)), recomputing(unet)
    yield Comparison(
        work, "frame convolution in 2-D", "yes", lambda: train(slow), lambda: train(unet)
    )
    yield Comparison(
        work, "latents from a cache", "yes", lambda: train(unet, vae=vae), lambda: train(unet)
    )
    yield Comparison(work, "bf16 autocast", "no", lambda: train(unet), lambda: train(unet, bf16))
    yield Comparison(
        work, "gradient checkpointing", "no", lambda: train(unet), lambda: train(again)
    )


def decoder_comparisons(bench: Workbench) -> Iterator[Comparison]:
    work, decode = "decoder, 1 orbit, forward and backward", bench.decode
    decoder = load_model(WEIGHTS, "decoder")
    again, explicit = (
        recomputing(decoder),
        partial(patch.object, F, "scaled_dot_product_attention", explicit_attention),
    )
    spread, idea = (
        partial(patch, "gsv3d_lib.decoder.deviation", std_of_views),
        "deviation by elementwise passes",
    )
    yield Comparison(
        work, "fused attention", "yes", lambda: decode(decoder, explicit), lambda: decode(decoder)
    )
    sweep = bench.sweep
    yield Comparison(
        "its plane sweep", idea, "yes", lambda: sweep(decoder, spread), lambda: sweep(decoder)
    )
    yield Comparison(
        work, "bf16 autocast", "no", lambda: decode(decoder), lambda: decode(decoder, bf16)
    )
    yield Comparison(
        work, "gradient checkpointing", "no", lambda: decode(decoder), lambda: decode(again)
    )


def rendering_comparisons(bench: Workbench) -> Iterator[Comparison]:
    work, four = "rendering 4 views, forward and backward", bench.four
    singly = [four[k : k + 1] for k in range(4)]
    yield Comparison(
        work, "one call", "yes", lambda: bench.render(singly), lambda: bench.render([four])
    )


def measure_comparisons(orbits: Orbits, config: Config, rounds: int) -> list[dict]:
    """Each comparison with its CPU milliseconds and ratio = without / with: above 1 the
    idea pays. Twice the rounds.
    """
    rows, bench = [], Workbench(orbits, config)
    kinds = sampling_comparisons, training_comparisons, decoder_comparisons, rendering_comparisons
    for work, idea, used, without, with_it in chain.from_iterable(kind(bench) for kind in kinds):
        # short, and the differences are small
        cpu_ms = least({"without": without, "with": with_it}, 2 * rounds)
        rows.append(
            {
                "work": work,
                "idea": idea,
                "used": used,
                **cpu_ms,
                "ratio": cpu_ms["without"] / cpu_ms["with"],
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------- report

NAMES = {
    "draw": "drawing the batch",
    "loss": "rendering and losses",
    "loss backward": "the same, backward",
    "unet": "U-Net forward",
    "unet backward": "U-Net backward",
    "decoder": "decoder forward",
    "decoder backward": "decoder backward",
    "clip": "CLIP",
    "dino": "DINO",
    "vae": "VAE encoder",
    "rest": "sampler, LoRA merging, the rest",
}


def markdown(report: dict) -> str:
    """The tables of docs/performance.md."""
    lines = []
    if steps := report.get("steps"):
        pieces = list(dict.fromkeys(piece for stage in steps.values() for piece in stage["cpu_ms"]))
        lines += [
            "| CPU ms a step | "
            + " | ".join(f"{n}, batch {s['batch']}" for n, s in steps.items())
            + " |"
        ]
        lines += ["|---|" + "---|" * len(steps)]
        for piece in [*pieces, "sum"]:
            cells = []
            for stage in steps.values():
                total = sum(stage["cpu_ms"].values())
                value = total if piece == "sum" else stage["cpu_ms"].get(piece)
                cells.append("" if value is None else f"{value:.0f} ({value / total:.0%})")
            lines.append(f"| {NAMES.get(piece, piece)} | " + " | ".join(cells) + " |")
        lines.append("")
    if generation := report.get("generation"):
        pieces = generation["pieces_cpu_ms"]
        lines += [
            f"| generation, {generation['steps']} guided steps | CPU ms | share |",
            "|---|---|---|",
        ]
        for piece, value in pieces.items():
            name = (
                "decoder"
                if piece == "decoder"
                else NAMES.get(piece, piece).removesuffix(" forward")
            )
            lines.append(f"| {name} | {value:.0f} | {value / sum(pieces.values()):.1%} |")
        lines += ["", "| | now | without the shortcuts |", "|---|---|---|"]
        cpu_ms = generation["cpu_ms"]
        for name in ("generation", "its products"):
            lines.append(
                f"| {name}, CPU ms | {cpu_ms[name]:.0f} | {cpu_ms[name + ', plain']:.0f} |"
            )
        ratios = [f"{generation[k]:.2f}" for k in ("ratio to products", "ratio to products, plain")]
        lines += ["| ratio | " + " | ".join(ratios) + " |", ""]
    if rows := report.get("comparisons"):
        lines += [
            "| work | idea | in the code | CPU ms without | with | ratio |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            lines.append(
                f"| {row['work']} | {row['idea']} | {row['used']} | {row['without']:.0f} | {row['with']:.0f} "
                f"| {row['ratio']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler (default 25)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument(
        "--check", action="store_true", help=f"fail where generation takes {CEILING} x its products"
    )
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds is at least 1; got {args.rounds}.")
    from gsv3d_lib.system.provenance import commit, hardware
    from gsv3d_lib.weights.checkpoint import load_config

    torch.set_num_threads(1)
    config = load_config(WEIGHTS)
    orbits = make_orbits(config, load_model(WEIGHTS, "vae"))
    report = {
        "command": " ".join(
            ["python benchmarks/chain.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "commit": commit(),
        "hardware": hardware(),
        "threads": 1,
        "torch": torch.__version__,
        "rounds": args.rounds,
    }
    work = {
        "steps": lambda: measure_steps(orbits, config, args.rounds),
        "generation": lambda: measure_generation(orbits, args.rounds, args.steps),
        "comparisons": lambda: measure_comparisons(orbits, config, args.rounds),
    }
    for section in args.sections:
        report[section] = work[section]()
    print(markdown(report))
    for path, text in (
        (args.json, json.dumps(report, indent=1) + "\n"),
        (args.markdown, markdown(report)),
    ):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    ratio = report.get("generation", {}).get("ratio to products", 0.0)
    return int(args.check and ratio > CEILING)


if __name__ == "__main__":
    sys.exit(main())
