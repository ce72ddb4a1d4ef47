"""Measure a checkpoint on a dataset folder: the numbers as JSON, a table, and a contact
sheet beside it.

    python -m gsv3d_lib evaluate --weights data/checkpoints/tiny --objects ../shared/objects/gso \
        --train ../shared/objects/train --out data/results/tiny-gso.json

The protocol is that of `evaluation/protocol.py`. LPIPS is measured where --lpips gives
weights (`evaluation/lpips.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import FRONT, RING, ViewTensors, load_views
from ..data.examples import relative_cameras
from ..pipeline import GSV3DPipeline
from ..rendering import render
from ..system.command import (
    check_writable,
    command_parser,
    exit_code,
    guidance,
    input_path,
    output_path,
    positive,
    sampler_steps,
    seed,
)
from ..system.errors import UserError
from ..system.paths import atomic_path
from ..system.provenance import commit, hardware
from .baselines import AverageObject
from .lpips import load_lpips
from .protocol import Judge, evaluate_vae, generate, load_truth, recognised, side_views
from .report import averages, save_sheet, strip, table, without_nan


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

    A row has "id", "decoder", "card", "average", and "generated" with and without LoRA and
    back-projection.  options: of the sampler.
    """
    if views.rgb.shape[1] == RING:
        raise UserError(
            f"{folder} cannot be measured on: its objects have no views beside the {RING} of the ring."
        )
    for id in views.ids:  # a damaged truth is said now, not minutes later
        load_truth(folder, id)
    rows, strips, made_sides, true_sides = [], [], [], []
    for index, id in enumerate(tqdm(views.ids, desc="evaluating", mininterval=5)):
        scene = views.scene(index)
        truth = load_truth(folder, id)
        made = generate(pipe, scene, seed, **options)
        strips.append(strip(made.gaussians, scene))
        sides = side_views(scene)
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
    """The options of the command line."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("--weights", type=input_path, default="data/checkpoints/tiny")
    parser.add_argument(
        "--objects", type=input_path, required=True, help="dataset folder to measure on"
    )
    parser.add_argument(
        "--train", type=input_path, help="training folder, for the average-object baseline"
    )
    parser.add_argument(
        "--out", type=output_path, required=True, help="JSON file to write; .md and .png beside it"
    )
    parser.add_argument("--limit", type=positive, help="only the first objects")
    parser.add_argument("--steps", type=sampler_steps, help="of the sampler")
    parser.add_argument("--guidance", type=guidance)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--no-lora", action="store_true")
    parser.add_argument(
        "--lpips",
        type=input_path,
        nargs="+",
        default=[],
        help="files of tools/convert_lpips.py: measure LPIPS with these nets too",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    given = sys.argv[1:] if arguments is None else arguments
    parser.set_defaults(command="python -m gsv3d_lib evaluate " + " ".join(given))
    return exit_code(run, parser, arguments)


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)  # first: a folder has no suffix to change
    beside = args.out.with_suffix(".md"), args.out.with_suffix(".png")
    if args.out in beside:
        raise UserError(
            f"--out names the JSON file; the table and the pictures go beside it, so {args.out} is taken."
        )
    for path in beside:
        check_writable(path)
        # no earlier run's: that would have written its JSON first
        if path.exists() and not args.out.exists():
            raise UserError(
                f"{path} is there already and goes beside --out {args.out}: choose another --out, or move it."
            )
    nets = [load_lpips(path) for path in args.lpips]
    names = ["lpips" if net.net == "alex" else f"lpips_{net.net}" for net in nets]
    if len(set(names)) < len(names):
        raise UserError(
            f"--lpips takes one file for each kind of net; got {', '.join(net.net for net in nets)}."
        )
    pipe = GSV3DPipeline.from_pretrained(args.weights, lora=not args.no_lora)
    views = load_views([args.objects], pipe.config.image_size, limit=args.limit)
    training = None if args.train is None else load_views([args.train], pipe.config.image_size)
    started = time.time()
    average = None if training is None else AverageObject.of(training)
    judge = Judge(dict(zip(names, nets)), average)
    options = {"steps": args.steps, "guidance": args.guidance}
    rows, strips = evaluate(
        pipe, views, args.objects, judge, args.seed, not args.no_lora, **options
    )
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
    with atomic_path(args.out) as path:
        path.write_text(json.dumps(without_nan(record), indent=1, allow_nan=False))
    save_sheet(strips, args.out.with_suffix(".png"))
    text = table(means)
    with atomic_path(args.out.with_suffix(".md")) as path:
        path.write_text(f"`{record['command']}`\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
