"""Train the stages of one preset, in order, from the command line or a notebook.

    python -m gsv3d_lib train --preset tiny --data data/cache/procedural --out runs/tiny

The same command resumes each stage where it was stopped. A checkpoint of other settings
or data is refused, unless `--force-resume` is given; only the number of steps may be
larger than before. `--minutes 40` trains each stage for so long, however fast the
machine is; the learning rate follows the time. A stage is skipped once its weights lie
in OUT/weights. They are in the layout of diffusers and transformers, and
`GSV3DPipeline.from_pretrained(OUT/weights)` opens them. `--init FOLDER` starts the
named stages from another checkpoint's weights and takes over what they do not train:

    python -m gsv3d_lib train --init data/checkpoints/tiny --stages diffusion stage2 \\
        --data data/cache/mine --out runs/mine

`--shards FOLDER` instead of `--data` reads from disk what `cluster/shards.py` computed
once, with that checkpoint's encoders.
"""

import argparse
import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from .cluster.shards import open_shards
from .config import MOST_STEPS, Config, parse_setting, preset
from .data.dataset import ViewTensors, load_views
from .data.examples import ring_frames
from .lora import load_lora
from .stages import STAGES, is_trained, orbits_for, run_stage, take_over, with_steps
from .system import command
from .system.command import check_writable, input_path, output_path
from .system.errors import MissingFile, UserError
from .system.paths import atomic_path, place_whole, remove_leftovers
from .training import PRECISIONS
from .weights.checkpoint import load_model, model_classes, writer
from .weights.run_folder import read_metrics


def build_parser() -> argparse.ArgumentParser:
    parser = command.command_parser("train", __doc__, "--preset", "--gpus", "--limit")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    data = [input_path("data/cache/procedural")]
    source.add_argument("--data", nargs="+", type=input_path, default=data, help="dataset folders")
    shards = "what `python -m gsv3d_lib shards` wrote, instead of --data"
    source.add_argument("--shards", type=input_path, metavar="FOLDER", help=shards)
    add("--out", type=output_path, default="runs/tiny", help="checkpoints, curves and weights")
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    add("--steps", type=command.positive, help="the number of steps of the named stages")
    minutes = "of training for each named stage, in all; with --steps whatever ends first"
    add("--minutes", type=command.number(0.01, 1e6), default=0.0, help=minutes)
    setting = "one field of the preset, such as stage1.lr=1e-4"
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=setting)
    seed = "of weights, examples and noise (default: the preset's)"
    add("--seed", type=command.training_seed, help=seed)
    init = "a checkpoint whose weights the stages start from"
    add("--init", type=input_path, metavar="FOLDER", help=init)
    precision = "auto: bf16 on a GPU, fp32 on a CPU"
    add("--precision", default="auto", choices=PRECISIONS, help=precision)
    force = "go on from checkpoints of other settings or data, which is refused otherwise"
    add("--force-resume", action="store_true", help=force)
    prepare = "only read the data and encode it into OUT, once for all processes"
    add("--prepare", action="store_true", help=prepare)
    export = "only copy the finished weights, in half precision, to this folder"
    add("--export", type=output_path, help=export)
    return parser


def run(args: argparse.Namespace) -> None:
    check_writable((args.export or args.out / "weights") / "gsv3d.json")
    if args.export is not None:
        return export_weights(args.out, args.export)
    config = preset(args.preset, **dict(parse_setting(text) for text in args.set))
    if args.seed is not None:
        config = config.replace(seed=args.seed)
    if {"diffusion", "stage2"} & set(args.stages):
        ring_frames(0, config.num_frames)  # refuses what a ring does not have; samplers may
    remove_leftovers(args.out)
    if torch.cuda.is_available():  # else every process would encode on the first GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if args.init is not None:
        take_over_once(args.init, args.out, args.stages, config)
    views = views_for(args, config)
    if args.prepare:
        if (args.out / "weights" / "vae").is_dir():  # else this training begins with the VAE
            orbits_for(config, views, args.out)
        return
    for name in args.stages:
        if is_trained(name, args.out / "weights"):
            there = " and ".join(str(args.out / "weights" / part) for part in STAGES[name].trains)
            again = f"delete it, {args.out / name}, and what was trained on it"
            print(f"{name}: {there} exists; to train again {again}.")
            continue
        steps = args.steps or (MOST_STEPS if args.minutes else None)
        same = ("init", "minutes", "precision", "force_resume")
        options = {option: getattr(args, option) for option in same}
        planned = with_steps(config, name, steps)
        run_stage(name, planned, views, args.out, processes=args.gpus, **options)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo may abort a process that does not


def views_for(args: argparse.Namespace, config: Config) -> ViewTensors:
    """The data that is named. UserError where shards come of another encoder."""
    if args.shards is None:
        return load_views(args.data, config.image_size, limit=args.limit, cache=args.out)
    if args.limit is not None:
        raise UserError("--limit counts the objects of --data; shards are read whole.")
    views = open_shards(args.shards, config.image_size)
    todo = [stage for stage in args.stages if not is_trained(stage, args.out / "weights")]
    made = [name for name in ("vae", "dino") if name in todo and views.files.index[name]]
    if made and set(todo) - {"vae", "dino"}:
        raise UserError(
            f"{args.shards} holds what an earlier {made[0]} made, which one trained here will not "
            f"fit: train {' and '.join(made)} first, make the shards with it, then train the "
            "other stages."
        )
    return views


def take_over_once(init: Path, run: Path, stages: list[str], config: Config) -> None:
    """`take_over` by the first process, while the others of the run wait."""
    from accelerate import PartialState

    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.is_main_process:
        take_over(init, run, stages, config)
    processes.wait_for_everyone()


def export_weights(run: Path, folder: Path) -> None:
    """Copy OUT/weights to `folder` in half precision, with the training curves."""
    weights = Path(run) / "weights"
    folder = Path(folder)
    if not (weights / "gsv3d.json").is_file():
        raise MissingFile(
            f"There are no finished weights in {weights}: --out names the run that --export copies."
        )
    folders = (path.name for path in weights.iterdir() if path.is_dir())
    for name in sorted(name for name in folders if not name.startswith(".")):
        if name == "lora":
            model = load_lora(load_model(weights, "unet"), weights / name)
        elif name in model_classes():
            model = load_model(weights, name)
        else:  # what `--init` took over, such as the elevation estimate
            place_whole(folder / name, partial(shutil.copytree, weights / name))
            continue
        place_whole(folder / name, writer(name, model.half()))
    if not (weights / "lora").is_dir():  # one of an earlier export is of another U-Net
        shutil.rmtree(folder / "lora", ignore_errors=True)
    shutil.copyfile(weights / "gsv3d.json", folder / "gsv3d.json")
    with atomic_path(folder / "curves.json") as path:
        path.write_text(json.dumps({stage: read_metrics(Path(run) / stage) for stage in STAGES}))
