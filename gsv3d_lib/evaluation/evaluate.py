"""Measure a checkpoint on a dataset folder: JSON, with a table and a picture beside it.

    python -m gsv3d_lib evaluate --weights data/checkpoints/tiny --objects FOLDER \
        --train TRAINING_FOLDER --out results.json

The protocol is that of `evaluation/protocol.py`. LPIPS is measured where --lpips gives
weights (`evaluation/lpips.py`).
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import FRONT, RING, ViewTensors, load_views
from ..data.examples import relative_cameras, views_from_front
from ..pipeline import GSV3DPipeline
from ..rendering import render
from ..system.command import check_writable, command_parser, input_path, output_path
from ..system.errors import UserError
from ..system.paths import atomic_path
from ..system.provenance import commit, hardware
from .baselines import AverageObject
from .lpips import load_lpips
from .protocol import Judge, evaluate_vae, generate, load_truth, recognised
from .report import averages, save_json, save_sheet, strip, table


def evaluate(
    pipe: GSV3DPipeline,
    views: ViewTensors,
    folder: Path,
    judge: Judge,
    seed: int = 0,
    lora: bool = True,
    **options,
) -> tuple[list[dict], list[Tensor]]:
    """All measurements, one row per object, and one strip of pictures per object.

    A row has "id", "decoder", "card", "average", and "generated" with and without LoRA
    and back-projection.
    options: of the sampler.
    """
    if views.rgb.shape[1] == RING:
        lack = f"its objects have no views beside the {RING} of the ring"
        raise UserError(f"{folder} cannot be measured on: {lack}.")
    for id in views.ids:  # a damaged truth is said now, not minutes later
        load_truth(folder, id)
    rows, strips, made_sides, true_sides = [], [], [], []
    for index, id in enumerate(tqdm(views.ids, desc="evaluating", mininterval=5)):
        scene = views.scene(index)
        truth = load_truth(folder, id)
        made = generate(pipe, scene, seed, **options)
        strips.append(strip(made.gaussians, scene))
        sides = views_from_front(90, 270)
        seen = render(made.gaussians, relative_cameras(scene, FRONT, sides))
        made_sides.append(seen.rgb.clamp(0, 1))
        true_sides.append(scene.rgb[sides])
        versions = {"generated": made}
        if lora:
            untouched = generate(pipe, scene, seed, lora_scale=0.0, **options)
            versions["generated_without_lora"] = untouched
        decoded = pipe.gaussians_from(made.latents, made.cameras, made.image).to("cpu")
        versions["generated_without_projection"] = replace(made, gaussians=decoded)
        row = {"id": id, "decoder": judge.decoder(pipe, scene) | evaluate_vae(pipe, scene)}
        for name, version in versions.items():
            row[name] = judge.generation(pipe, scene, truth, version)
        rows.append(row | judge.baselines(scene, truth))
    for net in list(judge.lpips.values())[:1]:
        shares = recognised(torch.stack(made_sides), torch.stack(true_sides), net)
        for row, share in zip(rows, shares):
            row["generated"]["recognised"] = share
    return rows, strips


def build_parser() -> argparse.ArgumentParser:
    common = ("--weights", "--objects", "--limit", "--steps", "--guidance", "--seed", "--no-lora")
    parser = command_parser("evaluate", __doc__, *common)
    add = parser.add_argument
    add("--train", type=input_path, help="training folder, for the average-object baseline")
    add("--out", type=output_path, required=True, help="JSON file; .md and .png go beside it")
    made = "measure LPIPS with these files of tools/convert_lpips.py"
    add("--lpips", type=input_path, nargs="+", default=[], help=made)
    return parser


def check_out(out: Path) -> None:
    """Raises UserError where --out or what goes beside it cannot be written."""
    check_writable(out)  # first: a folder has no suffix to change
    for path in (out.with_suffix(".md"), out.with_suffix(".png")):
        if path == out:
            beside = "the table and the pictures go beside it"
            raise UserError(f"--out names the JSON file; {beside}, so {out} is taken.")
        check_writable(path)
        # no earlier run's: that would have written its JSON first
        if path.exists() and not out.exists():
            there = f"{path} is there already and goes beside --out {out}"
            raise UserError(f"{there}: choose another --out, or move it.")


def run(args: argparse.Namespace) -> None:
    check_out(args.out)
    nets = [load_lpips(path) for path in args.lpips]
    names = ["lpips" if net.net == "alex" else f"lpips_{net.net}" for net in nets]
    if len(set(names)) < len(names):
        given = ", ".join(net.net for net in nets)
        raise UserError(f"--lpips takes one file for each kind of net; got {given}.")
    pipe = GSV3DPipeline.from_pretrained(args.weights, lora=not args.no_lora)
    views = load_views([args.objects], pipe.config.image_size, limit=args.limit)
    training = None if args.train is None else load_views([args.train], pipe.config.image_size)
    started = time.time()
    average = None if training is None else AverageObject.of(training)
    judge = Judge(dict(zip(names, nets)), average)
    options = {"seed": args.seed, "lora": not args.no_lora}
    options |= {"steps": args.steps, "guidance": args.guidance}
    rows, strips = evaluate(pipe, views, args.objects, judge, **options)
    means = averages(rows)
    record = {
        "command": args.command,
        "commit": commit(),
        "hardware": hardware(),
        "seconds": round(time.time() - started),
        "seed": args.seed,
        "objects": len(rows),
        "pixels": pipe.config.image_size,
        "lpips": [net.origin for net in nets],
        "mean": means,
        "rows": rows,
    }
    save_json(args.out, record, indent=1)
    save_sheet(strips, args.out.with_suffix(".png"))
    text = table(means)
    with atomic_path(args.out.with_suffix(".md")) as path:
        path.write_text(f"`{args.command}`\n\n{text}\n", encoding="utf-8")
    print(text)
