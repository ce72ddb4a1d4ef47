"""Where does the time of the chain go? Training steps and generation, piece by piece.

    python benchmarks/chain.py [--sections steps generation comparisons] [--rounds 3]

Everything runs in one process on one thread, interleaved, so that other load on the
machine hits all alike; reported is the minimum CPU time over the rounds. Only shares
and ratios mean anything on another machine. Three sections:

    steps        the pieces of one step of the diffusion stage, of stage 1 and stage 2
    generation   the pieces of one image -> Gaussians, and the whole against its matrix
                 products timed alone
    comparisons  the same work done in two ways, each a ratio
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gsv3d_lib.attention import attending_with
from gsv3d_lib.cameras import batch_cameras, orbit_cameras
from gsv3d_lib.config import Config
from gsv3d_lib.data.dataset import COLUMN_NAMES, ObjectViews, ViewTensors, resize_views
from gsv3d_lib.data.examples import Orbits, load_orbits
from gsv3d_lib.data.make_dataset import dataset_angles
from gsv3d_lib.data.procedural.objects import procedural_object
from gsv3d_lib.data.raycast import render_mesh
from gsv3d_lib.decoder import deviation
from gsv3d_lib.diffusion import diffusion_draws, guided_v, predict_v
from gsv3d_lib.encoders import image_features, orbit_condition
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.lora import add_lora, load_lora, merged_lora
from gsv3d_lib.pipeline import GSV3DPipeline
from gsv3d_lib.rendering import render
from gsv3d_lib.stages import STAGES, build_stage, schedule_of
from gsv3d_lib.system.paths import atomic_path
from gsv3d_lib.system.provenance import commit, hardware
from gsv3d_lib.training import Stage, draw_batch, update_average
from gsv3d_lib.unet import FrameConv
from gsv3d_lib.vae import encode
from gsv3d_lib.weights.checkpoint import load_config, load_model

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "data" / "checkpoints" / "tiny"
OBJECTS = (5002, 5008)  # seeds of a face and a chair that nothing was trained on
CEILING = 2.0  # --check fails where generation takes more than this many times its matrix products
SECTIONS = ("steps", "generation", "comparisons")


def make_orbits(config: Config, vae) -> Orbits:
    """Two procedural objects, rendered here and encoded."""
    parts = []
    for seed in OBJECTS:
        azimuths, elevations = dataset_angles(seed)
        cameras = orbit_cameras(azimuths, elevations, config.image_size)
        rgba, depth = render_mesh(procedural_object(seed), cameras, 1)
        pixels = (rgba * 255).round().astype("u1")
        views = ObjectViews(str(seed), pixels, depth, cameras, azimuths, elevations)
        parts.append(resize_views(views, config.image_size))
    columns = {name: torch.stack(column) for name, column in zip(COLUMN_NAMES, zip(*parts))}
    return load_orbits(ViewTensors([str(seed) for seed in OBJECTS], **columns), vae, progress=False)


# ---------------------------------------------------------------- measuring


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
        """Within the block forward passes of modules are added under their names."""
        entered: list[float] = []
        handles = []
        for name, module in modules.items():
            if module is None:
                continue

            def leave(*_, name=name):
                spent = time.process_time() - entered.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

            def enter(*_):
                entered.append(time.process_time())

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rest_of(self, whole: str, parts: tuple[str, ...], rest: str) -> None:
        """Rename what `whole` took beyond its parts."""
        known = sum(self.seconds.get(part, 0.0) for part in parts)
        self.seconds[rest] = self.seconds.pop(whole) - known


class Cut:
    """Tensors that go on as new leaves.

    So the backward passes behind and before them can be timed apart.
    """

    def __init__(self, tensors: list[Tensor]):
        self.outputs = tensors
        self.leaves = [t.detach().requires_grad_() for t in tensors]

    def backward(self) -> None:
        """Hand on the gradients that have arrived at the leaves."""
        pairs = [(t, leaf.grad) for t, leaf in zip(self.outputs, self.leaves)]
        torch.autograd.backward(*zip(*(pair for pair in pairs if pair[1] is not None)))


def minimum(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds, the least of all rounds for each name."""
    return {name: 1e3 * min(r[name] for r in rounds) for name in rounds[0]}


def least(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Minimum CPU milliseconds of each action.

    They take turns, and the first turn warms up.
    """
    seconds = dict.fromkeys(actions, math.inf)
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = time.process_time()
            action()
            seconds[name] = min(seconds[name], time.process_time() - start) if turn else math.inf
    return {name: 1e3 * value for name, value in seconds.items()}


# ---------------------------------------------------------------- training steps


def timed_step(
    stage: Stage, optimizer, average: dict[str, Tensor], batch: int, ema: float
) -> Watch:
    """One step as `training.train` makes it.

    The graph is cut behind U-Net and decoder, which changes no gradient.
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
    """The stages with shipped weights; each with batch and decay of its average."""
    config = config.replace(view_counts=(config.num_frames,))
    stages = {}
    for name in ("diffusion", "stage1", "stage2"):
        models = {m: load_model(weights, m).requires_grad_(True) for m in STAGES[name].models}
        if "lora" in STAGES[name].trains:
            start_lora(models["unet"], config.lora_rank)
        schedule = schedule_of(config, name)
        stages[name] = build_stage(name, config, models, orbits), schedule.batch, schedule.ema
    return stages


@torch.no_grad()
def start_lora(unet, rank: int) -> None:
    """Add a LoRA that has begun to learn: a new one is zero, and half its gradients."""
    add_lora(unet, rank)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.normal_(std=1e-3)


def measure_steps(orbits: Orbits, config: Config, rounds: int) -> dict:
    """{stage: {"batch": B, "cpu_ms": {piece: milliseconds}}}"""
    stages, taken, state = make_stages(orbits, config), {}, {}
    for name, (stage, _, ema) in stages.items():
        parameters = [p for p in stage.parameters() if p.requires_grad]
        copies = {key: p.detach().clone() for key, p in stage.training_state().items()}
        # no learning: every round has the same weights
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99))
        state[name] = optimizer, copies if ema else {}
    for turn in range(rounds + 1):
        for name, (stage, batch, ema) in stages.items():
            seconds = timed_step(stage, *state[name], batch, ema).seconds
            taken.setdefault(name, []).extend([seconds] if turn else [])
    return {
        name: {"batch": batch, "cpu_ms": minimum(taken[name])}
        for name, (_, batch, _) in stages.items()
    }


# ---------------------------------------------------------------- products

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}  # and every kind of fused attention


class Layout(NamedTuple):
    """What a product's time depends on of a tensor; stride 0: an expanded axis."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Random numbers in this layout."""
        room = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        return torch.randn(room).to(self.dtype).as_strided(self.shape, self.stride)


class Product(NamedTuple):
    """One call of a product, convolution or attention; layouts stand for tensors."""

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
    """A function that makes the calls again, in order and nothing else.

    It does so on random tensors of the same layouts.
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


# ---------------------------------------------------------------- generation


def without_frame_conv(unet):
    """The U-Net with diffusers' 3-D convolutions over frames, in place."""
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FrameConv):
                (out, channels), padding = child.weight.shape[:2], (1, 0, 0)
                conv = nn.Conv3d(channels, out, (3, 1, 1), padding=padding, device="meta")
                conv.weight, conv.bias = child.weight, child.bias
                setattr(module, name, conv)
    return unet


def without_token_attention(unet):
    """The U-Net with queries and keys in its attention to the one token, in place."""
    unet.set_attn_processor(AttnProcessor2_0())
    return unet


def std_of_views(values: Tensor) -> Tensor:
    """`decoder.deviation` by torch's own reduction."""
    return values.std(0, correction=0)


class TwoPasses(nn.Module):
    """A U-Net that takes the two halves of a guided batch one after the other.

    The network is no submodule, so `lora.merged_lora` finds no LoRA here to merge.
    """

    def __init__(self, unet):
        super().__init__()
        self.hidden = [unet]

    @property
    def device(self) -> torch.device:
        return self.hidden[0].device

    def forward(self, *inputs: Tensor | float) -> Tensor:
        halves = zip(*(i.chunk(2) if isinstance(i, Tensor) else (i, i) for i in inputs))
        return torch.cat([self.hidden[0](*half) for half in halves])


def measure_generation(orbits: Orbits, rounds: int, steps: int) -> dict:
    """The pieces of `pipe.generate`, and the whole against its products.

    Both also without the shortcuts: the LoRA apart, two passes for guidance, diffusers'
    convolutions over frames, and queries and keys for the one token.
    """
    image = orbits.scene(0).rgb[12]
    options = dict(steps=steps, progress=False, back_projection=False)
    pipe, plain = (GSV3DPipeline.from_pretrained(WEIGHTS, device="cpu") for _ in range(2))
    plain.unet = TwoPasses(without_token_attention(without_frame_conv(plain.unet)))
    models = {name: getattr(pipe, name) for name in ("clip", "unet", "dino", "decoder")}
    models = {"vae": pipe.vae.encoder} | models
    pieces: list[dict[str, float]] = []

    def generate():
        watch = Watch()
        with watch.modules(**models), watch("all"):
            result = pipe.generate(image, **options)
        watch.rest_of("all", tuple(models), "rest")
        pieces.append(watch.seconds)
        return result.gaussians

    def generate_plainly():
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
    differences = [a - b for a, b in zip(ours.tensors(), theirs.tensors())]
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
        "largest difference": max(float(d.abs().max()) for d in differences),
    }


# ---------------------------------------------------------------- comparisons


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
    """One orbit with its condition, and the pieces of work on it.

    Guided or not, the U-Net gets two orbits at once.
    """

    def __init__(self, orbits: Orbits, config: Config):
        orbit = orbits.orbit(0, 12, config.num_frames)
        draws = diffusion_draws(orbit["latents"], torch.Generator().manual_seed(0), config)
        parts = orbit | draws | {"keep": torch.ones(())}
        batch = {key: value[None] for key, value in parts.items()}
        clip, dino, decoder = (load_model(WEIGHTS, name) for name in ("clip", "dino", "decoder"))
        self.latents, self.sigma = batch["latents"], torch.tensor([2.0])
        self.noisy = self.latents + 2.0 * batch["noise"]
        self.cameras = batch_cameras(batch["azimuth"], batch["elevation"], config.image_size)
        self.four = self.cameras[0][::4]
        frames, channels, height, width = self.latents[0].shape
        self.seen = torch.randn(frames, channels, height * width, decoder.config.planes)
        self.pictures = orbits.scene(0).rgb[: config.num_frames]
        with torch.no_grad():
            self.condition = orbit_condition(batch, clip, config)
            self.features = image_features(dino, batch["image"])
            self.scene = decoder(self.latents, self.cameras, self.features)[0]

    @torch.no_grad()
    def sample(self, unet, context=nullcontext) -> Tensor:
        """What a step of the sampler asks of the U-Net."""
        with context():
            return guided_v(unet, self.noisy, self.sigma, self.condition, 1.5)

    def train(self, unet, context=nullcontext, vae=None) -> None:
        """The U-Net there and back; with a `vae`, first the views of two orbits."""
        if vae is not None:
            with torch.no_grad():
                encode(vae, torch.cat([self.pictures, self.pictures]))
        unet.zero_grad(set_to_none=True)
        noisy, sigma = self.noisy.repeat(2, 1, 1, 1, 1), self.sigma.repeat(2)
        with context():
            v = predict_v(unet, noisy, sigma, self.condition.with_null())
        v.float().square().mean().backward()

    def decode(self, decoder, context=nullcontext) -> None:
        """The decoder there and back, to its weights and its latents."""
        decoder.zero_grad(set_to_none=True)
        latents = self.latents.clone().requires_grad_()
        with context():
            maps = decoder.output_maps(latents, self.cameras, self.features)[0]
        maps.float().square().mean().backward()

    def spread(self, function) -> None:
        """A deviation over the views, as in the plane sweep, there and back."""
        seen = self.seen.clone().requires_grad_()
        function(seen).square().mean().backward()

    def render(self, groups: list) -> None:
        """The Gaussians rendered from each group of cameras, and back."""
        leaves = Gaussians(*(t.clone().requires_grad_() for t in self.scene.tensors()))
        sum(render(leaves, views).rgb.square().sum() for views in groups).backward()


def sampling_comparisons(bench: Workbench) -> Iterator[Comparison]:
    work, sample = "U-Net, one guided step", bench.sample
    base, apart = load_model(WEIGHTS, "unet"), lora_unet()
    merged = merged_lora(apart)
    full = without_token_attention(copy.deepcopy(base))
    slow = without_frame_conv(copy.deepcopy(base))
    last, twice = channels_last(base), TwoPasses(base)

    def compare(idea: str, used: str, without, with_it, **options) -> Comparison:
        return Comparison(
            work, idea, used, partial(sample, without), partial(sample, with_it, **options)
        )

    yield compare("LoRA merged", "yes", apart, merged)
    yield compare("attention to one token without queries and keys", "yes", full, base)
    yield compare("frame convolution in 2-D", "yes", slow, base)
    yield compare("channels last", "no", base, last)
    yield compare("bf16 autocast", "no", base, base, context=bf16)
    yield compare("condition and null condition in one batch", "yes", twice, base)


def training_comparisons(bench: Workbench) -> Iterator[Comparison]:
    compare = partial(Comparison, "U-Net, 2 orbits, forward and backward")
    unet, vae = load_model(WEIGHTS, "unet"), load_model(WEIGHTS, "vae")
    slow, again = without_frame_conv(copy.deepcopy(unet)), recomputing(unet)
    train = partial(bench.train, unet)
    yield compare("frame convolution in 2-D", "yes", partial(bench.train, slow), train)
    yield compare("latents from a cache", "yes", partial(bench.train, unet, vae=vae), train)
    yield compare("bf16 autocast", "no", train, partial(bench.train, unet, bf16))
    yield compare("gradient checkpointing", "no", train, partial(bench.train, again))


def decoder_comparisons(bench: Workbench) -> Iterator[Comparison]:
    compare = partial(Comparison, "decoder, 1 orbit, forward and backward")
    decoder = load_model(WEIGHTS, "decoder")
    decode, again = partial(bench.decode, decoder), recomputing(decoder)
    explicit = partial(attending_with, explicit_attention)
    yield compare("fused attention", "yes", partial(bench.decode, decoder, explicit), decode)
    yield compare("bf16 autocast", "no", decode, partial(bench.decode, decoder, bf16))
    yield compare("gradient checkpointing", "no", decode, partial(bench.decode, again))
    ways = partial(bench.spread, std_of_views), partial(bench.spread, deviation)
    yield Comparison("the sweep's deviation over views", "elementwise passes", "yes", *ways)


def rendering_comparisons(bench: Workbench) -> Iterator[Comparison]:
    work, four = "rendering 4 views, forward and backward", bench.four
    singly = [four[k : k + 1] for k in range(4)]
    yield Comparison(
        work, "one call", "yes", partial(bench.render, singly), partial(bench.render, [four])
    )


def measure_comparisons(orbits: Orbits, config: Config, rounds: int) -> list[dict]:
    """Each comparison with its CPU milliseconds and ratio = without / with.

    Above 1 the idea pays. Twice the rounds: they are short, and differences small.
    """
    rows, bench = [], Workbench(orbits, config)
    kinds = sampling_comparisons, training_comparisons, decoder_comparisons, rendering_comparisons
    for work, idea, used, without, with_it in chain.from_iterable(kind(bench) for kind in kinds):
        cpu_ms = least({"without": without, "with": with_it}, 2 * rounds)
        ratio = cpu_ms["without"] / cpu_ms["with"]
        rows.append({"work": work, "idea": idea, "used": used, **cpu_ms, "ratio": ratio})
    return rows


# ---------------------------------------------------------------- report

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
    """All tables of a report."""
    return "\n\n".join(tables(report).values())


def tables(report: dict) -> dict[str, str]:
    """The tables of docs/performance.md by name, of the sections that were run."""
    found = {}
    if "steps" in report:
        found["steps"] = table(*step_rows(report["steps"]))
    if generation := report.get("generation"):
        heads = f"generation, {generation['steps']} guided steps", "CPU ms", "share"
        found["generation"] = table(heads, piece_rows(generation["pieces_cpu_ms"]))
        found["products"] = table(("", "now", "without the shortcuts"), product_rows(generation))
    if "comparisons" in report:
        heads = "work", "idea", "in the code", "CPU ms without", "with", "ratio"
        found["comparisons"] = table(heads, [comparison_row(r) for r in report["comparisons"]])
    return found


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    head, *lines = (f"| {' | '.join(line)} |" for line in (heads, *rows))
    return "\n".join([head, "|" + "---|" * len(heads), *lines])


def step_rows(steps: dict) -> tuple[list[str], list[list[str]]]:
    heads = ["CPU ms a step", *(f"{name}, batch {s['batch']}" for name, s in steps.items())]
    rows = []
    for piece in dict.fromkeys(piece for stage in steps.values() for piece in stage["cpu_ms"]):
        rows.append([NAMES.get(piece, piece)])
        for stage in steps.values():
            value, total = stage["cpu_ms"].get(piece), sum(stage["cpu_ms"].values())
            rows[-1].append("" if value is None else f"{value:.0f} ({value / total:.0%})")
    sums = [sum(stage["cpu_ms"].values()) for stage in steps.values()]
    return heads, [*rows, ["sum", *(f"{total:.0f} (100%)" for total in sums)]]


def piece_rows(pieces: dict[str, float]) -> Iterator[list[str]]:
    for piece, value in pieces.items():
        name = NAMES.get(piece, piece).removesuffix(" forward")
        yield [name, f"{value:.0f}", f"{value / sum(pieces.values()):.1%}"]


def product_rows(generation: dict) -> Iterator[list[str]]:
    cpu_ms = generation["cpu_ms"]
    for name in ("generation", "its products"):
        yield [f"{name}, CPU ms", *(f"{cpu_ms[name + way]:.0f}" for way in ("", ", plain"))]
    yield ["ratio", *(f"{generation['ratio to products' + way]:.2f}" for way in ("", ", plain"))]


def comparison_row(row: dict) -> list[str]:
    numbers = [f"{row['without']:.0f}", f"{row['with']:.0f}", f"{row['ratio']:.2f}"]
    return [row["work"], row["idea"], row["used"], *numbers]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler (default 25)")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--check", action="store_true", help=f"fail where generation takes {CEILING} x its products"
    )
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds is at least 1; got {args.rounds}.")
    torch.set_num_threads(1)
    config = load_config(WEIGHTS)
    orbits = make_orbits(config, load_model(WEIGHTS, "vae"))
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "command": " ".join(["python benchmarks/chain.py", *given]),
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
    if args.json:
        with atomic_path(args.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
    ratio = report.get("generation", {}).get("ratio to products", 0.0)
    return int(args.check and ratio > CEILING)


if __name__ == "__main__":
    sys.exit(main())
