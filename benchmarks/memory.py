"""Is the plan right? Peak memory, measured, beside what `cluster.plan` says.

    python benchmarks/memory.py [--scales tiny small] [--json FILE]

    python benchmarks/memory.py [--presets tiny small] [--json data/results/memory.json]

Of training steps and of an inference. The file also gets the plan of stage 2 at paper
scale, which nothing here can measure.

Each case runs in a child process forked from this one, on one CPU thread and in
float32, with random weights and data. Measured are the tensors that stay (weights,
AdamW's averages) and, by the operating system's count, how far resident memory rises
above its level before the second step (or image). A process also holds some 50 MB that
no GPU would: code that oneDNN compiles, Python's objects; they are there before the
second step and given apart (`fixed_mb`). malloc gives every larger buffer back at once
(M_MMAP_THRESHOLD), or its leftovers would be counted. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from gsv3d_lib.cluster.plan import plan, plan_inference, shapes, stage_on_meta, without_data
from gsv3d_lib.config import Config, preset
from gsv3d_lib.stages import schedule_of
from gsv3d_lib.system.paths import atomic_path
from gsv3d_lib.system.provenance import commit, hardware
from gsv3d_lib.training import update_average

MB = 1e6
FRAMES = (4, 8, 16)
SIZES = (64, 128)
RANKS = (4, 16, 64)
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def cases(scale: str) -> list[dict]:
    """What is measured: at `tiny` N, pixels and rank one by one; at `small` a few.

    Checkpointing is on and off everywhere.
    """
    if scale == "tiny":
        grid = [(n, size, 16) for n, size in product(FRAMES, SIZES)]
        grid += [(16, 64, rank) for rank in RANKS if rank != 16]
    else:
        grid = [(n, 128, 16) for n in (4, 16)]
    work = [*product(("stage1", "stage2"), (False, True)), ("inference", False)]
    names = ("scale", "work", "frames", "size", "rank", "checkpointing")
    return [
        dict(zip(names, (scale, work, n, size, rank, checkpointing)))
        for (work, checkpointing), (n, size, rank) in product(work, grid)
        if work != "stage1" or rank == 16  # it has no LoRA
    ]


def config_of(case: dict) -> Config:
    changes = {"num_frames": case["frames"], "image_size": case["size"], "lora_rank": case["rank"]}
    return preset(case["scale"], checkpointing=case["checkpointing"], **changes)


def batch_of(case: dict) -> int:
    """Orbits in a step: those of the preset at `tiny`, else one.

    At `small` the preset's batch is for a GPU; an inference has one image.
    """
    if case["work"] == "inference" or case["scale"] != "tiny":
        return 1
    return schedule_of(config_of(case), case["work"]).batch


def with_numbers(model: torch.nn.Module) -> torch.nn.Module:
    """A model from the meta device with small random weights."""
    without_data(model)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape))
        else:
            buffer.zero_()
    return model


def training(case: dict) -> tuple[Callable[[], None], Callable[[], int]]:
    """Functions that make one step, and that count the bytes of what stays.

    The step is that of `training.train`.
    """
    config, batch = config_of(case), batch_of(case)
    stage = with_numbers(stage_on_meta(config, case["work"]))
    schedule = schedule_of(config, case["work"])
    parameters = [p for p in stage.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    state = stage.training_state() if schedule.ema else {}
    average = {name: p.detach().clone() for name, p in state.items()}
    wanted = shapes(config, case["work"])

    def step() -> None:
        examples = {name: torch.rand(batch, *shape) for name, shape in wanted.items()}
        angles = torch.arange(config.num_frames) * 360.0 / config.num_frames
        examples["azimuth"] = angles.repeat(batch, 1)
        examples["elevation"] = torch.full((batch, config.num_frames), 15.0)
        loss, _ = stage(examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_average(average, stage.training_state(), schedule.ema, 0)
        optimizer.zero_grad(set_to_none=True)

    def staying() -> int:
        moments = [t for slots in optimizer.state.values() for t in slots.values()]
        return sum(t.nbytes for t in [*stage.parameters(), *moments, *average.values()])

    return step, staying


def inference(case: dict) -> tuple[Callable[[], object], Callable[[], int]]:
    """Functions that turn one image into Gaussians, and that count the weights."""
    from gsv3d_lib.cluster.plan import NETWORKS, models_on_meta
    from gsv3d_lib.lora import add_lora
    from gsv3d_lib.pipeline import GSV3DPipeline

    config = config_of(case)
    models = models_on_meta(config, *NETWORKS)
    with torch.device("meta"):
        add_lora(models["unet"], config.lora_rank)
    filled = {name: with_numbers(model).eval() for name, model in models.items()}
    pipe = GSV3DPipeline(config, **filled)
    image = torch.rand(config.image_size, config.image_size, 3)
    weights = sum(p.nbytes for model in models.values() for p in model.parameters())
    return lambda: pipe.generate(image, steps=2, guidance=1.5, progress=False), lambda: weights


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: now (VmRSS), or at most since `forget_peak` (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured(case: dict) -> dict[str, float]:
    """Megabytes at the peak of the second step, and those beside tensors."""
    before = resident()
    work, staying = (inference if case["work"] == "inference" else training)(case)
    work()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    level = resident()
    work()
    peak = staying() + resident("VmHWM") - level
    return {
        "measured_mb": round(peak / MB, 1),
        "fixed_mb": round((level - before - staying()) / MB, 1),
    }


def in_a_child(function, *args):
    """`function(*args)`, something for JSON, computed in a forked process.

    Raises RuntimeError where that fails.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(function(*args)).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1] or not answer:
        raise RuntimeError(f"The process that measured {args} failed.")
    return json.loads(answer)


def planned(case: dict) -> int:
    config = config_of(case)
    if case["work"] == "inference":
        return plan_inference(config).memory
    # a step of one micro-batch
    batch = batch_of(case)
    schedule = replace(schedule_of(config, case["work"]), batch=batch)
    config = config.replace(**{case["work"]: schedule})
    return plan(config, case["work"], micro_batch=batch, half=False).memory


def row(case: dict) -> dict:
    """A case with its megabytes."""
    said = {"batch": batch_of(case), "planned_mb": round(planned(case) / MB, 1)}
    return case | said | in_a_child(measured, case)


def error(row: dict) -> float:
    """How far the plan is off, as a share of what was measured."""
    return row["planned_mb"] / row["measured_mb"] - 1


HEADS = ("scale", "work", "N", "pixels", "rank", "batch", "checkpointing")
HEADS += ("measured MB", "planned MB", "error")


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = [HEADS]
    for r in rows:
        kind = [r[name] for name in ("scale", "work", "frames", "size", "rank", "batch")]
        kind.append("on" if r["checkpointing"] else "off")
        numbers = f"{r['measured_mb']:.0f}", f"{r['planned_mb']:.0f}", f"{error(r):+.0%}"
        lines.append([*map(str, kind), *numbers])
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(HEADS), *rest])


def paper() -> list[dict]:
    """What only a plan can say here: stage 2 at full size, one orbit, in bytes."""
    rows = []
    for frames, checkpointing, half in product(FRAMES, (False, True), (False, True)):
        config = preset("paper", num_frames=frames, checkpointing=checkpointing)
        p = plan(config, "stage2", half=half)
        row = {"frames": frames, "checkpointing": checkpointing, "half": half}
        row |= {"weights": p.weights, "trained": p.gradients + p.optimizer}
        rows.append(row | {"activations": p.activations, "flops": p.flops})
    return rows


def prepare() -> None:
    """What every child inherits.

    One thread, a malloc that gives back, and the libraries, loaded and warmed up.
    """
    torch.set_num_threads(1)
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)
    torch.manual_seed(0)
    first = dict(scale="tiny", frames=4, size=64, rank=4, checkpointing=True)
    training(first | {"work": "stage2"})[0](), inference(first | {"work": "inference"})[0]()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--presets", nargs="+", choices=("tiny", "small"), default=["tiny", "small"]
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    prepare()
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "command": " ".join(["python benchmarks/memory.py", *given]),
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "rows": [],
        "paper": paper(),
    }
    for case in (case for scale in args.presets for case in cases(scale)):
        report["rows"].append(row(case))
        print(markdown(report["rows"][-1:]).split("\n")[-1], flush=True)
        if args.json:
            with atomic_path(args.json) as path:
                path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
