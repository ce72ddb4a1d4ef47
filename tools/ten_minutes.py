"""Ten minutes on one GPU: a prepared script that makes the most of them.

    python tools/ten_minutes.py --rehearse       all that needs no GPU, small
    python tools/ten_minutes.py predict ...      at home: what `plan` says
    python tools/ten_minutes.py unet ...         first call: the U-Net; gsplat compiles
    python tools/ten_minutes.py decoder ...      second call: parity, full size, stage 1
    python tools/ten_minutes.py collect ...      what came back -> weights that open

The packs are made by tools/pack.py. How a person with a lent machine goes on, command
by command, stands in tools/README.md. The stages, their losses and their models are the
library's own (`DiffusionStage`, `DecoderStage`, `DistillationStage`); only the loop
around them is another one: everything stays on the device, and the learning rate
follows the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pack
import torch
from resident import ResidentOrbits
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gsv3d_lib.cluster.plan import plan, rehearse, shapes
from gsv3d_lib.config import Config, Schedule, preset
from gsv3d_lib.data.examples import make_variants
from gsv3d_lib.lora import add_lora
from gsv3d_lib.pretraining import DiffusionStage
from gsv3d_lib.rendering import rendering_with
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.stages import STAGES, build_stage, initial, schedule_of, take_over
from gsv3d_lib.system.command import (
    exit_code,
    input_path,
    number,
    output_path,
    positive,
    training_seed,
    whole,
)
from gsv3d_lib.system.errors import MissingFile, UserError
from gsv3d_lib.system.paths import atomic_path
from gsv3d_lib.training import BETAS, CLIP_NORM, Stage, learning_rate, update_average
from gsv3d_lib.weights.checkpoint import builders, load_config, load_dino, load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
PIECE = 15_000_000  # bytes of a file that comes back: 16 MiB are allowed
BASE = "data/checkpoints/small"
PREDICTIONS = "data/cache/pack/predictions.json"
DENSE_BF16 = 989e12  # FLOP/s of an H100 and H200, by the datasheet
MEMORY_SHARE = 0.4  # of the card for the U-Net's batch; a second process compiles beside it
# Seconds of the two calls. Training gets what the others leave of --seconds.
TIMES = {
    "unet": {"read": 20, "encode": 15, "probe": 10, "train": None, "save": 15},
    "decoder": {
        "read": 20,
        "encode": 15,
        "paper": 60,
        "gsplat": 120,
        "parity": 15,
        "train": None,
        "save": 15,
    },
}


class Clock:
    """Seconds since the script began, how many there are, and what each step took."""

    def __init__(self, seconds: float):
        self.begin = time.monotonic()
        self.seconds = seconds
        self.taken: dict[str, float] = {}

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begin

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def step(self, name: str, action, *args, **options):
        """Do a step; note and print how long it took."""
        start = self.spent
        result = action(*args, **options)
        self.taken[name] = round(self.spent - start, 2)
        print(f"[{self.spent:6.1f} s] {name}: {self.taken[name]} s", flush=True)
        return result


# ---------------------------------------------------------------- (a) the machine


def environment() -> dict:
    """Card, versions, and the rate of a large bfloat16 product.

    Shares are stated against that rate.
    """
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    if not torch.cuda.is_available():
        return facts | {"device": "cpu"}
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: a @ b, "cuda", repeats=10)
    memory = torch.cuda.get_device_properties(0).total_memory
    facts |= {"device": torch.cuda.get_device_name(0), "memory_gb": memory / 1e9}
    return facts | {"matmul_tflops": 2 * 8192**3 / seconds / 1e12}


def timed(action, device: str, repeats: int = 3) -> float:
    """Seconds of an action, the least of some, after one that warms up."""
    best, synchronize = float("inf"), torch.cuda.synchronize if device == "cuda" else lambda: None
    for turn in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        best = min(best, time.perf_counter() - start) if turn else best
    return best


# ---------------------------------------------------------------- (b) gsplat


def compile_gsplat(folder: Path) -> subprocess.Popen | None:
    """Begin to compile gsplat's kernels in the background.

    None, with a sentence, without nvcc.
    """
    if shutil.which("nvcc") is None or not torch.cuda.is_available():
        print("gsplat is not compiled: that takes nvcc and a CUDA device.")
        return None
    major, minor = torch.cuda.get_device_capability()
    extra = {"TORCH_EXTENSIONS_DIR": str(folder), "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    extra |= {"VERBOSE": "1", "MAX_JOBS": str(max(1, (os.cpu_count() or 2) - 4))}
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from gsplat.cuda._backend import _C; assert _C is not None"]
    env = os.environ | extra
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def library_of_gsplat(folder: Path) -> Path:
    return folder / "gsplat_cuda" / "gsplat_cuda.so"


def gsplat_ready(process: subprocess.Popen | None, folder: Path, seconds: float = 0.0) -> bool:
    """Whether the kernels can be used, after waiting at most so long.

    Then they are loaded.
    """
    if process is not None:
        try:
            process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
    library = library_of_gsplat(folder)
    if not torch.cuda.is_available() or not library.is_file():
        return False
    from torch.utils.cpp_extension import _import_module_from_library

    try:  # gsplat asks for a compiled `gsplat.csrc` first
        module = _import_module_from_library("gsplat_cuda", str(library.parent), True)
        sys.modules.setdefault("gsplat.csrc", module)
        from gsplat.cuda._backend import _C
    except Exception as error:
        print(f"gsplat's kernels were compiled but do not open: {error}")
        return False
    return _C is not None


def tail(path: Path, lines: int = 30) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:] if path.is_file() else []


# ---------------------------------------------------------------- (c) the loop


class Learner:
    """One stage on the device, and the averages of its weights.

    It steps without a look at the numbers, which would wait for the device.
    """

    def __init__(self, stage: Stage, schedule: Schedule, device: str):
        self.stage = stage.to(device).train()
        self.schedule = schedule
        self.device = device
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=schedule.lr,
            betas=BETAS,
            weight_decay=schedule.weight_decay,
            fused=device == "cuda",
        )
        self.average = {name: p.detach().clone() for name, p in stage.training_state().items()}
        self.done = 0
        self.rows: list[dict] = []

    def step(self, batch: dict[str, Tensor], spent: float) -> Tensor:
        """One optimiser step; returns the loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.schedule, spent)
        self.optimizer.zero_grad(set_to_none=True)
        with half_precision(self.device):
            loss, metrics = self.stage(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        update_average(self.average, self.stage.training_state(), self.schedule.ema, self.done)
        self.done += 1
        return loss.detach()

    def until(
        self, end: float, clock: Clock, fraction, draw, each_minute, changed=None, every: int = 50
    ) -> None:
        """Steps until the clock shows `end`, one at least.

        fraction(): the share of the training's time that is spent.
        draw(): a batch.
        each_minute(): saves.
        changed(): called now and then, for what gets ready meanwhile.
        Raises UserError where the loss is no number.
        """
        saved, mark, first = clock.spent, clock.spent, self.done
        while clock.spent < end or self.done == first:
            loss = self.step(draw(), fraction())
            if self.done % every == 0 or self.done == first + 1:
                value = loss.item()  # waits for the device, so the clock is true here
                if value != value:
                    raise UserError(f"The loss of step {self.done} is {value}.")
                pace = (clock.spent - mark) / max(1, (self.done - 1) % every + 1)
                row = {"step": self.done, "seconds": round(clock.spent, 2)}
                self.rows.append(row | {"loss": value, "pace": pace})
                said = f"loss {value:.4f}, {pace:.4f} s a step"
                print(f"[{clock.spent:6.1f} s] step {self.done}: {said}", flush=True)
                mark = clock.spent
                if changed is not None:
                    changed()
            if clock.spent - saved > 60:
                each_minute()
                saved = clock.spent

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name, in half precision on the CPU."""
        return {name: value.half().cpu().contiguous() for name, value in self.average.items()}


def half_precision(device: str):
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def fitting_batch(learner: Learner, draw, asked: int, share: float = MEMORY_SHARE) -> int:
    """The largest batch up to `asked` that takes at most this share of the card.

    Two small steps tell what one example takes.
    """
    if learner.device != "cuda":
        return asked
    peaks, sizes = [], (8, 24)
    for size in sizes:
        torch.cuda.reset_peak_memory_stats()
        with half_precision("cuda"):
            loss, _ = learner.stage(draw(size))
        loss.backward()
        learner.optimizer.zero_grad(set_to_none=True)
        peaks.append(torch.cuda.max_memory_allocated())
    each = max(1, (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]))
    room = share * torch.cuda.get_device_properties(0).total_memory - peaks[0]
    return max(8, min(asked, sizes[0] + int(room / each) // 8 * 8))


class Compiled:
    """`torch.compile` of the U-Net without waiting for it.

    Another process compiles the same step into inductor's cache while this one trains
    without. When it is done, this one takes the compiled code from there. Where it
    fails or takes too long, training goes on as it was.
    """

    def __init__(self, unet: nn.Module, command: list[str], folder: Path, seconds: float):
        self.unet = unet
        self.folder = folder
        self.on = False
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        with open(folder / "log.txt", "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.end = time.monotonic() + seconds

    def use(self, size: int) -> None:
        """Switch the compiled code for pictures of this size on or off."""
        if self.process.poll() is None and time.monotonic() > self.end:
            self.process.kill()
        ready = (self.folder / f"ready-{size}").is_file()
        if ready and not self.on:
            self.unet.compile(mode="default", dynamic=False)
            print(f"the U-Net is compiled from here on, at {size} px", flush=True)
        elif not ready and self.on:
            self.unet._compiled_call_impl = None
        self.on = ready

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()


def diffusion_stage(config: Config, base: Path, fresh: bool) -> DiffusionStage:
    """U-Net and CLIP tower from the weights in `base`, or new; without data."""
    torch.manual_seed(config.seed)
    models = {name: initial(name, config, None if fresh else base) for name in ("unet", "clip")}
    return DiffusionStage(models["unet"], models["clip"], None, config)


def compile_ahead(options: argparse.Namespace) -> None:
    """The process behind `Compiled`: one step at every size, on random numbers."""
    stage = diffusion_stage(unet_config(options), options.base, options.fresh).cuda().train()
    torch.set_float32_matmul_precision("high")
    stage.unet.compile(mode="default", dynamic=False)
    for size, batch in zip(options.sizes, options.batches):
        config = stage.config.replace(image_size=size)
        drawn = random_batch(config, "diffusion", batch, "cuda")
        with half_precision("cuda"):
            loss, _ = stage(drawn)
        loss.backward()
        torch.cuda.synchronize()
        stage.zero_grad(set_to_none=True)
        del loss, drawn
        torch.cuda.empty_cache()
        (options.folder / f"ready-{size}").touch()


def random_batch(config: Config, stage: str, batch: int, device: str) -> dict[str, Tensor]:
    """Numbers of no meaning in the shapes of a batch."""
    wanted = shapes(config, stage)
    drawn = {name: torch.rand(batch, *wanted[name], device=device) for name in wanted}
    for name in ("azimuth", "target_azimuth"):
        if name in drawn:
            drawn[name] *= 360
    return drawn


def unet_config(options: argparse.Namespace) -> Config:
    """The base's configuration with the U-Net's channels and the largest size."""
    config = load_config(options.base).replace(image_size=max(options.sizes), seed=options.seed)
    heads = tuple(max(1, width // 32) for width in options.channels)
    if tuple(options.channels) != config.unet_channels:
        config = config.replace(unet_channels=tuple(options.channels), unet_heads=heads)
    given = dict(steps=9_999_999, batch=options.batch, lr=options.lr, ema=options.ema)
    schedule = dataclasses.replace(config.diffusion_schedule, **given)
    return config.replace(diffusion_schedule=schedule, copies=options.copies)


def on_device(views, config: Config, vae, device: str, clock: Clock) -> ResidentOrbits:
    variants = make_variants(len(views), config.copies, config.seed)
    orbits = ResidentOrbits(views, variants, config.latent_scale, device)
    clock.step(f"encode {views.rgb.shape[2]} px", orbits.encode, vae, 64 if device == "cuda" else 8)
    return orbits


def cores() -> int:
    return min(16, os.cpu_count() or 1)


def train_unet(options: argparse.Namespace) -> dict:
    """The first call.

    Everything is read before the GPU is used: processes are forked to decode.
    """
    clock, device = Clock(options.seconds), "cuda" if torch.cuda.is_available() else "cpu"
    config, results = unet_config(options), {"plan": TIMES["unet"]}
    views = {
        s: clock.step(f"read {s} px", pack.read_pack, options.pack, s, cores(), options.limit)
        for s in options.sizes
    }
    results["environment"] = clock.step("environment", environment)
    gsplat = compile_gsplat(options.work / "gsplat")
    vae = load_model(options.base, "vae").to(device).requires_grad_(False)
    orbits = {s: on_device(views.pop(s), config, vae, device, clock) for s in options.sizes}
    stage = diffusion_stage(config, options.base, options.fresh)
    learner = Learner(stage, config.diffusion_schedule, device)
    generator = torch.Generator(device).manual_seed(options.seed)

    def draw(size: int, batch: int):
        return orbits[size].diffusion_batch(generator, batch, config)

    batches = {
        s: fitting_batch(learner, lambda n, s=s: draw(s, n), options.batch) for s in options.sizes
    }
    results["batches"] = batches
    print(f"orbits: {len(orbits[options.sizes[0]])}, batches {batches}", flush=True)
    compiled = None
    if device == "cuda" and not options.no_compile:
        compiled = Compiled(
            learner.stage.unet, compile_command(options, batches), options.work / "compiled", 200
        )

    def save():
        record = {"config": dataclasses.asdict(config), "models": ["unet", "clip"]}
        record |= {"trained": {"diffusion": learner.done}}
        write_pieces(learner.averaged(), record, options.out)

    start, end = clock.spent, options.seconds - TIMES["unet"]["save"]
    for place, size in enumerate(options.sizes):
        share = options.share if place == 0 and len(options.sizes) > 1 else 1.0
        change = (lambda s=size: compiled.use(s)) if compiled else None
        if change:
            change()
        learner.until(
            clock.spent + share * (end - clock.spent),
            clock,
            lambda: min(1.0, (clock.spent - start) / max(1e-6, end - start)),
            lambda s=size: draw(s, batches[s]),
            save,
            change,
            options.every,
        )
        results[f"peak share {size} px"] = share_of_peak(
            learner, options.predictions, size, batches[size]
        )
    clock.step("save", save)
    if compiled:
        compiled.stop()
        results["compile log"] = tail(options.work / "compiled" / "log.txt")
    results |= {"steps": learner.done, "curve": learner.rows}
    library = library_of_gsplat(options.work / "gsplat")
    log = tail(options.work / "gsplat" / "log.txt")
    results["gsplat"] = {"compiled": library.is_file(), "log": log}
    if gsplat is not None and gsplat.poll() is None and clock.left > 0:
        gsplat_ready(gsplat, options.work / "gsplat", clock.left)
    if library.is_file() and library.stat().st_size < PIECE:
        (options.out / library.name).write_bytes(library.read_bytes())
    return results | {"seconds": clock.taken}


def compile_command(options: argparse.Namespace, batches: dict[int, int]) -> list[str]:
    command = [sys.executable, __file__, "compile", "--folder", str(options.work / "compiled")]
    command += ["--base", str(options.base), "--seed", str(options.seed)]
    command += ["--batches", *map(str, batches.values())]
    command += ["--sizes", *map(str, options.sizes), "--channels", *map(str, options.channels)]
    return [*command, *(["--fresh"] if options.fresh else [])]


def share_of_peak(learner: Learner, predictions: Path, size: int, batch: int) -> float | None:
    """Share of the card's bfloat16 peak.

    By the operations that `plan` counts and the last pace.
    """
    found = read_json(predictions).get(f"diffusion {size}")
    if learner.device != "cuda" or not found or len(learner.rows) < 2:
        return None
    return batch * found["flops"] / learner.rows[-1]["pace"] / DENSE_BF16


# ---------------------------------------------------------------- (d) parity


def parity(device: str, gaussians: int = 2000, views: int = 2, size: int = 64) -> dict:
    """Largest differences between gsplat's kernels and `rendering/plain.py`.

    Of images and gradients; and the times.
    """
    from gsv3d_lib.cameras import orbit_cameras
    from gsv3d_lib.gaussians import Gaussians
    from gsv3d_lib.rendering import render

    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(gaussians, 14, generator=generator)
    parts = {
        "means": 0.4 * numbers[:, :3],
        "quats": nn.functional.normalize(numbers[:, 3:7], dim=-1),
        "scales": (0.5 * numbers[:, 7:10] - 3.5).exp(),
        "opacities": numbers[:, 10].sigmoid(),
        "colors": numbers[:, 11:].sigmoid(),
    }
    cameras = orbit_cameras(torch.arange(views) * 80.0, 15.0, size)
    weights = torch.randn(views, size, size, 4, generator=generator)

    def pictures(backend: str, where: str):
        leaves = [value.clone().to(where).requires_grad_() for value in parts.values()]
        seen = render(Gaussians(*leaves), cameras.to(where), backend=backend)
        total = torch.cat([seen.rgb, seen.alpha], -1)
        (total * weights.to(where)).sum().backward()
        return total.detach().cpu(), [leaf.grad.cpu() for leaf in leaves]

    ways = {"torch": device} | ({"gsplat": device} if device == "cuda" else {}) | {"numba": "cpu"}
    made, times = {}, {}
    for backend, where in ways.items():
        try:
            made[backend] = pictures(backend, where)
            times[backend] = timed(
                lambda b=backend, w=where: pictures(b, w), where, 3 if backend != "torch" else 1
            )
        except ImportError as error:
            print(f"{backend} is not measured: {error}")
    image, gradients = made["torch"]
    report = {"gaussians": gaussians, "seconds, forward and backward": times}
    for backend in made.keys() - {"torch"}:
        pairs = zip(parts, made[backend][1], gradients)
        errors = {n: float((a - b).norm() / b.norm()) for n, a, b in pairs}
        report[backend] = {
            "image": float((made[backend][0] - image).abs().max()),
            "gradients, relative": errors,
        }
    return report


# ---------------------------------------------------------------- (e) stage 1


def train_decoder(options: argparse.Namespace) -> dict:
    """The second call: steps at full size while gsplat compiles, parity, stage 1."""
    clock, device = Clock(options.seconds), "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(options.base).replace(seed=options.seed, copies=options.copies)
    changes = {"lambda_lpips": options.lpips, "lambda_ssim": options.ssim}
    config = config.replace(**changes, lpips_weights=str(options.lpips_weights))
    given = dict(steps=9_999_999, batch=options.batch, lr=options.lr, ema=options.ema)
    config = config.replace(stage1=dataclasses.replace(config.stage1, **given))
    results, size = {"plan": TIMES["decoder"]}, config.image_size
    views = clock.step(
        f"read {size} px", pack.read_pack, options.pack, size, cores(), options.limit
    )
    results["environment"] = clock.step("environment", environment)
    folder = options.work / "gsplat"
    brought = options.gsplat is not None and options.gsplat.is_file()
    if brought:
        library_of_gsplat(folder).parent.mkdir(parents=True, exist_ok=True)
        library_of_gsplat(folder).write_bytes(options.gsplat.read_bytes())
    compiling = None if library_of_gsplat(folder).is_file() else compile_gsplat(folder)
    vae = load_model(options.base, "vae").to(device).requires_grad_(False)
    orbits = on_device(views, config, vae, device, clock)
    ready = gsplat_ready(compiling, folder)
    results["paper"] = paper_steps(clock, device, options.predictions, ready, options.paper)
    if not ready:
        ready = clock.step(
            "wait for gsplat", gsplat_ready, compiling, folder, TIMES["decoder"]["gsplat"]
        )
    results["gsplat"] = {"ready": ready, "log": tail(folder / "log.txt")}
    results["parity"] = (
        attempted(lambda: clock.step("parity", parity, device))
        if ready or device == "cpu"
        else None
    )
    decoder, dino = initial("decoder", config, options.base), load_dino(config, options.base)
    learner = Learner(DecoderStage(decoder, dino, None, config), config.stage1, device)
    # plain PyTorch keeps every meeting of a pixel and a splat
    batch = options.batch if ready or device == "cpu" else 1
    generator, host = (
        torch.Generator(device).manual_seed(options.seed),
        torch.Generator().manual_seed(options.seed),
    )

    def draw():
        frames = config.view_counts[int(torch.randint(len(config.view_counts), (), generator=host))]
        return orbits.decoder_batch(generator, batch, frames, config)

    def save():
        record = {"config": dataclasses.asdict(config), "models": ["decoder"]}
        record |= {"trained": {"stage1": learner.done}}
        write_pieces(learner.averaged(), record, options.out)

    start, end = clock.spent, options.seconds - TIMES["decoder"]["save"]
    with nullcontext() if ready or device == "cpu" else plain_rendering():
        learner.until(
            end,
            clock,
            lambda: min(1.0, (clock.spent - start) / max(1e-6, end - start)),
            draw,
            save,
            every=options.every,
        )
    clock.step("save", save)
    return results | {"steps": learner.done, "curve": learner.rows, "seconds": clock.taken}


def plain_rendering():
    """Without gsplat a GPU renders by plain PyTorch, slowly."""
    from gsv3d_lib.rendering.plain import rasterize

    print("gsplat is not ready: stage 1 renders by plain PyTorch, which is slow.")
    return rendering_with(rasterize)


def attempted(action):
    """What an action returns, or the first line of why not.

    One measurement must not end the others.
    """
    try:
        return action()
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"left out: {line}")
        return {"failed": line}


# ---------------------------------------------------------------- (f) full size


def paper_steps(clock: Clock, device: str, predictions: Path, gsplat: bool, scale: str) -> dict:
    """One step of stage 1 and 2 with random weights, beside what `plan` predicts."""
    found = {}
    if device == "cuda" or scale != "paper":
        for stage in ("stage2", "stage1"):
            found[stage] = attempted(
                lambda s=stage: clock.step(f"{scale} {s}", full_step, s, device, gsplat, scale)
            )
            found[stage]["predicted"] = read_json(predictions).get(f"{scale} {stage}")
            flops = (found[stage]["predicted"] or {}).get("flops")
            if flops and "seconds" in found[stage]:
                rate = flops * found[stage]["orbits"] / found[stage]["seconds"]
                found[stage] |= {"tflops": rate / 1e12, "share of peak": rate / DENSE_BF16}
            torch.cuda.empty_cache()
    else:
        print("The steps at full size are left out: they take a GPU.")
    return found


def full_step(stage_name: str, device: str, gsplat: bool, scale: str = "paper") -> dict:
    """Seconds and peak memory of one micro-batch, and of the optimiser's step.

    A micro-batch goes forward and backward.
    """
    config = preset(scale)
    orbits = max(1, schedule_of(config, stage_name).micro_batch)
    spec = STAGES[stage_name]
    with torch.device(device):
        models = {name: builders()[name](config) for name in spec.models}
        if "lora" in spec.trains:
            add_lora(models["unet"], config.lora_rank)
    stage = build_stage(stage_name, config, models, None).to(device).train()
    batch = random_batch(config, stage_name, orbits, device)
    batch |= {"target_depth": 3 + batch["target_depth"]}
    parameters = [p for p in stage.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=BETAS, fused=device == "cuda")

    def once():
        with half_precision(device):
            loss, _ = stage(batch)
        loss.backward()

    with nullcontext() if gsplat or device == "cpu" else rendering_with(no_rendering):
        once()
        optimizer.step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        repeats = 2 if device == "cuda" else 1
        seconds = timed(once, device, repeats)
        update = timed(optimizer.step, device, repeats)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    rendered = "gsplat" if gsplat else "nothing: a stand-in takes the rasteriser's place"
    report = {"orbits": orbits, "seconds": seconds, "optimiser": update, "peak_gb": peak}
    return report | {"rendered by": rendered}


def no_rendering(means, quats, scales, opacities, colors, viewmats, Ks, width: int, height: int):
    """A picture of one colour in next to no time.

    It has gradients for all five tensors.
    """
    mixed = torch.stack([t.float().mean() for t in (means, quats, scales, opacities)]).sum()
    sums = torch.cat([colors.float().mean(0), mixed[None]]).expand(len(viewmats), height, width, 4)
    return sums, opacities.float().mean().expand(len(viewmats), height, width, 1)


def predict(options: argparse.Namespace) -> None:
    """What `plan` says of the steps that will be measured.

    It takes a minute without a GPU.
    """
    found = {}
    for stage in ("stage1", "stage2"):
        config = preset(options.paper)
        said = plan(config, stage, micro_batch=max(1, schedule_of(config, stage).micro_batch))
        step = rehearse(config, stage, True)
        found[f"{options.paper} {stage}"] = {"flops": step.flops, "memory_gb": said.memory / 1e9}
    config = unet_config(options)
    for size in options.sizes:
        found[f"diffusion {size}"] = {
            "flops": rehearse(config.replace(image_size=size), "diffusion", True).flops
        }
    write_json(options.out, found)
    print(json.dumps(found, indent=1))


# ---------------------------------------------------------------- (g) what comes back


def write_json(path: Path, value) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_json(path: Path | None) -> dict:
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def write_pieces(
    tensors: dict[str, Tensor], record: dict, folder: Path, limit: int = PIECE
) -> None:
    """Tensors in files of at most `limit` bytes, with `record` in each.

    Those of before are replaced together. Raises ValueError for a tensor that is larger
    than a file may be.
    """
    pieces, room = [], 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit - 200_000:
            raise ValueError(
                f"{name} has {tensor.nbytes} bytes and does not fit a file of {limit}."
            )
        if tensor.nbytes > room:
            pieces.append({})
            room = limit - 200_000  # for names and the record
        pieces[-1][name] = tensor
        room -= tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record | {"pieces": len(pieces)})
    names = [folder / f"weights-{k}.safetensors" for k in range(len(pieces))]
    for path, piece in zip(names, pieces):
        save_file(piece, path.with_suffix(".new"), {"record": text})
    for path in names:
        os.replace(path.with_suffix(".new"), path)
    for path in set(folder.glob("weights-*.safetensors")) - set(names):
        path.unlink()


def read_pieces(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """The inverse of `write_pieces`.

    Raises UserError where the files are not of one moment.
    """
    paths = sorted(folder.glob("weights-*.safetensors"))
    if not paths:
        raise MissingFile(f"There are no weights-*.safetensors in {folder}.")
    tensors, records = {}, []
    for path in paths:
        with safe_open(path, "pt") as file:
            records.append(json.loads(file.metadata()["record"]))
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    if any(record != records[0] for record in records) or len(paths) != records[0]["pieces"]:
        raise UserError(
            f"The pieces in {folder} are not those of one checkpoint: fetch all of them again."
        )
    return tensors, records[0]


def collect(options: argparse.Namespace) -> None:
    """What came back -> INTO/weights, with the models of --base that were not trained.

    `python -m gsv3d_lib train --out INTO --export FOLDER` then makes a folder in half
    precision.
    """
    tensors, record = read_pieces(options.folder)
    weights, names = options.into / "weights", record["models"]
    known = load_config(weights if (weights / "gsv3d.json").is_file() else options.base)
    fields = {
        n: tuple(v) if isinstance(v, list) else v
        for n, v in record["config"].items()
        if not isinstance(v, dict)
    }
    prefixes = ("image_size", *(f"{name}_" for name in names))
    config = known.replace(**{n: v for n, v in fields.items() if n.startswith(prefixes)})
    take_over(options.base, options.into, list(record["trained"]), config)
    for name in names:
        model = builders()[name](config)
        own = {n: t for n, t in tensors.items() if n.startswith(f"{name}.")}
        model.load_state_dict({n.removeprefix(f"{name}."): t for n, t in own.items()})
        save_model(model, weights, name, config, record["trained"])
    print(f"{', '.join(names)} after {record['trained']} steps are in {weights}.")


# ---------------------------------------------------------------- command line


def rehearsal(options: argparse.Namespace) -> None:
    """Every step that needs no GPU, at a hundredth of the size."""
    import tempfile

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_world import object_views

    from gsv3d_lib.data.dataset import write_index, write_object

    with tempfile.TemporaryDirectory() as place:
        place, seconds = Path(place), options.seconds
        data, packs = place / "data", place / "packs"
        views = [object_views(f"ball{k}", 40.0 * k, 128) for k in range(2)]
        for one in views:
            write_object(data, one)
        write_index(data, [{"id": one.id} for one in views])
        for name, extra in (("unet", ["--ring"]), ("stage1", ["--depth-bits", "8"])):
            given = [str(data), "--out", str(packs / name), "--megabytes", "1", *extra]
            assert pack.main(given) == 0
        common = ["--batch", "1", "--copies", "2", "--every", "1", "--work", str(place / "work")]
        one = ["--sizes", "64", "--seconds", str(seconds + 20), "--pack", str(packs / "unet")]
        said = str(packs / "said.json")
        assert main(["predict", "--paper", "tiny", "--sizes", "64", "--out", said]) == 0
        common += ["--predictions", said]
        assert main(["unet", *one, *common, "--out", str(place / "one")]) == 0
        two = ["--pack", str(packs / "stage1"), "--seconds", str(seconds + 40)]
        two += ["--base", "data/checkpoints/tiny", "--paper", "tiny"]
        assert main(["decoder", *two, *common, "--out", str(place / "two")]) == 0
        for folder in ("one", "two"):
            base = ["--base", BASE if folder == "one" else "data/checkpoints/tiny"]
            into = str(place / f"run-{folder}")
            assert main(["collect", str(place / folder), "--into", into, *base]) == 0
        results = {k: read_json(place / k / "results.json") for k in ("one", "two")}
        for name, result in results.items():
            print(f"{name}: {result['steps']} steps, seconds {result['seconds']}")
            print(f"parity: {result.get('parity')}")
    print(
        "Left out, for want of CUDA: bfloat16, fused AdamW, torch.compile, the memory probe, "
        "gsplat's kernels."
    )


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rehearse_ = commands.add_parser("rehearse", help="all that needs no GPU, small")
    rehearse_.add_argument("--seconds", type=number(0, 600), default=10.0, help="of each training")
    rehearse_.set_defaults(action=rehearsal)
    unet = commands.add_parser("unet", help="the first call")
    compile_ = commands.add_parser("compile", help="used by `unet` itself")
    guess = commands.add_parser("predict", help="what plan says, to carry along")
    decoder = commands.add_parser("decoder", help="the second call")
    back = commands.add_parser("collect", help="what came back -> weights")
    for one in (unet, compile_, guess, decoder, back):
        given = dict(type=input_path, default=input_path(BASE))
        one.add_argument("--base", **given, help="weights to start from")
    for one in (unet, compile_, guess, decoder):
        one.add_argument("--seed", type=training_seed, default=0)
    for one in (unet, compile_, guess):
        _add_network_options(one)
    _add_call_options(unet, "unet", seconds=420, batch=256, lr=6e-4)
    _add_call_options(decoder, "stage1", seconds=230, batch=16, lr=4e-4)

    share = dict(type=number(0.01, 1), default=0.35)
    unet.add_argument("--share", **share, help="of the time for the first size")
    unet.add_argument("--no-compile", action="store_true")
    unet.set_defaults(action=train_unet)
    compile_.add_argument("--folder", type=output_path, required=True)
    compile_.add_argument("--batches", nargs="+", type=positive, required=True)
    compile_.set_defaults(action=compile_ahead)
    guess.add_argument("--out", type=output_path, default=output_path(PREDICTIONS))
    guess.add_argument("--paper", default="paper")
    guess.set_defaults(action=predict)
    add, weight = decoder.add_argument, dict(type=number(0, 100), default=0.0)
    add("--gsplat", type=input_path, help="a gsplat_cuda.so that came back from the first call")
    add("--lpips", **weight, help="weight of LPIPS in the loss")
    add("--ssim", **weight, help="weight of 1 - SSIM in the loss")
    add("--lpips-weights", type=input_path, default="data/cache/lpips/alex.safetensors")
    add("--paper", default="paper", help="preset of the full-size steps")
    decoder.set_defaults(action=train_decoder)
    back.add_argument("folder", type=input_path)
    back.add_argument("--into", type=output_path, default=output_path("runs/gpu"))
    back.set_defaults(action=collect)
    return parser


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    """What says which U-Net it is, for the call and what goes before it."""
    parser.add_argument("--channels", nargs="+", type=positive, default=[64, 128])
    sizes = dict(nargs="+", type=whole(16, 1024), default=[64, 128])
    parser.add_argument("--sizes", **sizes, help="pixels, in order")
    parser.add_argument("--fresh", action="store_true", help="needed for other channels")
    parser.set_defaults(batch=256, lr=6e-4, ema=0.999, copies=4)


def _add_call_options(parser, name: str, seconds: float, batch: int, lr: float) -> None:
    """What both calls on the GPU take."""
    add, packed = parser.add_argument, input_path(f"data/cache/pack/{name}.safetensors")
    add("--seconds", type=number(1, 3600), default=seconds, help="of the whole call")
    add("--pack", type=input_path, default=packed)
    out = output_path(os.environ.get("OUT", "runs/ten_minutes"))
    add("--out", type=output_path, default=out)
    add("--work", type=output_path, default=output_path("/tmp/ten_minutes"))
    add("--predictions", type=input_path, default=input_path(PREDICTIONS))
    add("--batch", type=positive, default=batch, help="orbits, at most")
    add("--lr", type=number(0, 1), default=lr)
    add("--ema", type=number(0, 0.999999), default=0.999)
    add("--copies", type=whole(1, 64), default=4, help="variants of each object")
    add("--limit", type=positive, help="only the first objects")
    add("--every", type=positive, default=50, help="steps between two rows of the log")


def run(options: argparse.Namespace) -> None:
    results = options.action(options)
    if results is not None:
        write_json(options.out / "results.json", results)
        shown = {name: value for name, value in results.items() if name != "curve"}
        print(json.dumps(shown, indent=1))


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    given = ["rehearse" if word == "--rehearse" else word for word in given]
    return exit_code(run, build_parser(), given)


if __name__ == "__main__":
    sys.exit(main())
