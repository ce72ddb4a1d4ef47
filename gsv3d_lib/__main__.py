"""One image -> a 3D object, from the command line; and the door to all other commands.

    python -m gsv3d_lib my.png --out runs/my

writes object.ply, object.glb, turntable.mp4, turntable.gif and viewer.html into the
folder, or, where it holds such files already, into runs/my-2, runs/my-3, ...: nothing
is overwritten.

    python -m gsv3d_lib COMMAND ...        each explains itself with --help

    demo          notebook 00 on one image
    run           a notebook with other parameters
    train         the stages of one preset, in order
    make_dataset  objects to train on: procedural ones, or your meshes
    shards        training data that streams from disk
    plan          memory and time of a training before it starts
    evaluate      a checkpoint measured on a dataset
    gallery       one page for many objects, two side by side
    sv3d          SV3D's published weights, converted
    doctor        what this machine has, and what falls back
"""

import argparse
import sys
import time
from importlib import import_module

from .system import command
from .system.command import check_writable, exit_code, input_path, output_path
from .system.paths import BEST, folder_name

COMMANDS = {  # the module of each, with a `build_parser` and a `run`
    "demo": "course.demo",
    "run": "course.run",
    "train": "train",
    "make_dataset": "data.make_dataset",
    "shards": "cluster.shards",
    "plan": "cluster.plan",
    "evaluate": "evaluation.evaluate",
    "gallery": "export.gallery",
    "sv3d": "weights.sv3d",
    "doctor": "system.doctor",
}


SAMPLING = ("--elevation", "--steps", "--guidance", "--seed", "--no-lora", "--no-back-projection")


def build_parser() -> argparse.ArgumentParser:
    parser = command.command_parser("", __doc__, "--weights", *SAMPLING, weights=BEST)
    add = parser.add_argument
    add("image", type=input_path, help="PNG, JPEG, WebP or BMP; its alpha channel is the mask")
    add("--out", type=output_path, help="folder (default: runs/object/ and the image's name)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        module = import_module(f"gsv3d_lib.{COMMANDS[given[0]]}")
        return exit_code(module.run, module.build_parser(), given[1:])
    return exit_code(run, build_parser(), given)


def run(args: argparse.Namespace) -> None:
    from .export import FILES, save_object
    from .images import prepare_condition
    from .pipeline import GSV3DPipeline, settings_for
    from .weights.checkpoint import load_config

    out = args.out or output_path("runs/object") / folder_name(args.image)
    check_writable(out / "object.ply")
    config = load_config(args.weights)
    options = {name: getattr(args, name) for name in ("elevation", "steps", "guidance", "seed")}
    settings_for(config, **options)  # bad options and a bad image fail before models load
    rgb, mask = prepare_condition(args.image, config.image_size)
    pipe = GSV3DPipeline.from_pretrained(args.weights, lora=not args.no_lora)
    started = time.perf_counter()
    result = pipe.generate(rgb, mask=mask, back_projection=not args.no_back_projection, **options)
    seconds = time.perf_counter() - started
    count = f"{len(result.gaussians):,} Gaussians"
    print(f"image at {result.elevation:.0f} degrees -> {count} in {seconds:.1f} s")
    with command.results_folder(out, FILES.values()) as folder:
        for kind, path in save_object(
            result.gaussians, folder, result.image, result.elevation
        ).items():
            print(f"{kind:>7}  {path}")


if __name__ == "__main__":
    sys.exit(main())
