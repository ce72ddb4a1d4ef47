"""Train the stages of one preset, in order, from the command line or from a notebook.

    python -m gsv3d_lib train --preset tiny --data data/cache/procedural --out runs/tiny [--stages vae dino ...]

Every stage resumes where it was stopped, if the same command goes on: a checkpoint of other settings or data is refused,
unless `--force-resume` is given. Only the number of steps may be larger than before. A stage is skipped once its weights lie
in OUT/weights. The weights are in the layout of
diffusers and transformers (`save_pretrained`), so that `GSV3DPipeline.from_pretrained(OUT/weights)` opens them.
`--init FOLDER` starts the named stages from another checkpoint's weights and takes over what they do not train:

    python -m gsv3d_lib train --init data/checkpoints/tiny --stages diffusion stage2 --data data/cache/mine --out runs/mine

`--shards FOLDER` instead of `--data` reads from disk what `cluster/shards.py` computed once, with that checkpoint's encoders.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .cluster.shards import ShardViews, open_shards
from .config import Config, parse_setting, preset, schedule_field
from .data.dataset import ViewTensors, load_views
from .data.examples import ring_frames
from .system.command import check_writable, exit_code, input_path, output_path, positive
from .system.errors import MissingFile, UserError
from .system.paths import atomic_path, check_readable, place_whole, reason, remove_leftovers
from .training import PRECISIONS, read_metrics, train

STAGES = ("vae", "dino", "diffusion", "stage1", "stage2")


def train_vae(config: Config, views: ViewTensors, run: Path, init: Path | None = None, **options) -> list[dict]:
    """The autoencoder, rescaled at the end so that 0.18215 z has unit variance."""
    from .stages import VAEStage
    from .vae import build_vae, calibrate

    torch.manual_seed(config.seed)
    vae = initial("vae", build_vae, config, init)
    history = train(VAEStage(vae, views, config), config.vae_schedule, run / "vae", seed=config.seed, **options)
    some = views.rgb[:: max(1, len(views) // 64), :16:4].flatten(0, 1).float() / 255
    calibrate(vae, some.to(vae.device))
    save_model(vae, run, "vae", config, steps_of("vae", config, init))
    return history


def train_dino(config: Config, views: ViewTensors, run: Path, init: Path | None = None, **options) -> list[dict]:
    """The DINO encoder by self-distillation; the teacher, which averages the students, is what is kept."""
    from .encoders import build_dino
    from .stages import DINOStage

    torch.manual_seed(config.seed)
    stage = DINOStage(initial("dino", build_dino, config, init), views, config)
    history = train(stage, config.dino_schedule, run / "dino", seed=config.seed, **options)
    save_model(stage.teacher[0], run, "dino", config, steps_of("dino", config, init))
    return history


def train_diffusion(config: Config, views: ViewTensors, run: Path, init: Path | None = None, **options) -> list[dict]:
    """The multi-view U-Net and, where no pretrained one is given, the CLIP tower."""
    from .encoders import build_clip
    from .stages import DiffusionStage
    from .unet import build_unet

    torch.manual_seed(config.seed)
    unet = initial("unet", build_unet, config, init)
    clip = initial("clip", build_clip, config, init)
    stage = DiffusionStage(recomputed(unet, config), clip, orbits_for(config, views, run), config)
    history = train(stage, config.diffusion_schedule, run / "diffusion", seed=config.seed, **options)
    trained = steps_of("diffusion", config, init)
    save_model(stage.unet, run, "unet", config, trained)
    save_model(stage.clip, run, "clip", config, trained)
    return history


def train_stage1(config: Config, views: ViewTensors, run: Path, init: Path | None = None, **options) -> list[dict]:
    """Stage 1: the Gaussian Splatting Decoder on ground-truth latents."""
    from .decoder import build_decoder
    from .stages import DecoderStage

    torch.manual_seed(config.seed)
    dino = load_dino(config, run / "weights")
    decoder = initial("decoder", build_decoder, config, init)
    stage = DecoderStage(recomputed(decoder, config), dino, orbits_for(config, views, run, dino), config)
    history = train(stage, config.stage1, run / "stage1", seed=config.seed, **options)
    save_model(stage.decoder, run, "decoder", config, steps_of("stage1", config, init))
    return history


def train_stage2(config: Config, views: ViewTensors, run: Path, init: Path | None = None, **options) -> list[dict]:
    """Stage 2: geometric distillation into a LoRA, always a new one: `init` has only given the models below it."""
    from .distillation import DistillationStage
    from .lora import add_lora, save_lora

    weights = run / "weights"
    unet = recomputed(add_lora(load_model(weights, "unet"), config.lora_rank, config.seed), config)
    clip, dino = load_model(weights, "clip"), load_dino(config, weights)
    decoder = recomputed(load_model(weights, "decoder"), config)
    stage = DistillationStage(unet, clip, decoder, dino, orbits_for(config, views, run, dino), config)
    history = train(stage, config.stage2, run / "stage2", seed=config.seed, **options)
    write_weights(run, "lora", config, lambda folder: save_lora(unet, folder), steps_of("stage2", config))
    return history


def initial(name: str, build: Callable[[Config], torch.nn.Module], config: Config, init: Path | None):
    """What a stage starts from: a new model, or that of the checkpoint `init`.

    A decoder may be of half the picture's side, and a U-Net have a layer less. Raises ValueError where the sizes are not
    those of `config` otherwise.
    """
    if init is None:
        return build(config)
    model = load_model(init, name)
    if name == "decoder" and config.decoder_patch == 2 * model.config.patch:
        from .decoder import doubled

        model = doubled(model)
    if name == "unet" and config.unet_layers == model.config.layers_per_block + 1:
        from .unet import deepened

        model = deepened(model)
    with torch.device("meta"):
        wanted = traits(build(config))
    for key, value in traits(model).items():
        if wanted.get(key) != value:
            raise UserError(
                f"The {name} in {init} is not of this configuration ({key} is {value}, not {wanted.get(key)}); train "
                "without --init, or without the settings that changed it."
            )
    return model


def traits(model) -> dict[str, list]:
    """What two models must share so that one's weights mean the same in the other: shapes, and what no shape shows."""
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    settings = ("heads", "num_attention_heads", "scale_range", "resnet_eps")
    hidden = {key: getattr(model.config, key, None) for key in settings}
    return shapes | {key: list(value) if isinstance(value, tuple) else value for key, value in hidden.items()}


def take_over(init: Path, run: Path, stages: list[str], config: Config) -> None:
    """Copy into OUT/weights the models of the checkpoint `init` that `stages` do not train and OUT does not have yet.

    How many steps they were trained goes into OUT's gsv3d.json, beside `config`.

    Raises FileNotFoundError where `init` is no checkpoint, ValueError where its weights are damaged.
    """
    if not (init / "gsv3d.json").is_file():
        raise MissingFile(f"--init {init} is no GSV3D checkpoint: gsv3d.json is missing. Try data/checkpoints/tiny.")
    trained = {PRODUCTS[stage] for stage in stages} | ({"unet"} if "diffusion" in stages else set()) | {"lora"}
    folders = (path for path in init.iterdir() if path.is_dir() and not path.name.startswith("."))
    record = trained_steps(init)
    for source in sorted(path for path in folders if path.name not in trained):
        if not (run / "weights" / source.name).exists():
            if source.name in model_classes():
                load_model(init, source.name)  # damaged weights are named now, not hours later
            place_whole(run / "weights" / source.name, partial(shutil.copytree, source))
            taken = {stage: steps for stage, steps in record.items() if PRODUCTS.get(stage) == source.name}
            save_config(config, run / "weights", taken)


def take_over_once(init: Path, run: Path, stages: list[str], config: Config) -> None:
    """`take_over` by the first process, while the others of the run wait."""
    from accelerate import PartialState

    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.is_main_process:
        take_over(init, run, stages, config)
    processes.wait_for_everyone()


def recomputed(model, config: Config):
    """The model, with gradient checkpointing where the configuration asks for it."""
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    return model


def load_dino(config: Config, weights: Path):
    """The DINO encoder of a checkpoint folder; None for a configuration without one."""
    return None if config.dino == "none" else load_model(weights, "dino")


def orbits_for(config: Config, views: ViewTensors, run: Path, dino=None):
    """Orbits of all objects and their variants, encoded once by this run's VAE; from shards with the features of `dino`."""
    from .data.examples import load_orbits

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_model(run / "weights", "vae").to(device)
    if isinstance(views, ShardViews):
        return views.orbits(vae, dino, config.seed)
    return load_orbits(views, vae, config.copies, cache=run / f"latents-{config.copies}.safetensors", seed=config.seed)


def model_classes() -> dict:
    """The class behind each folder of a checkpoint."""
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPVisionModelWithProjection, Dinov2Model
    from transformers.utils import logging as transformers_logging

    from .decoder import GaussianDecoder
    from .unet import SV3DUNet
    from .vae import GroupedVAE

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a bar per file of a few megabytes hides what matters
    return {
        "vae": GroupedVAE,
        "clip": CLIPVisionModelWithProjection,
        "dino": Dinov2Model,
        "unet": SV3DUNet,
        "decoder": GaussianDecoder,
    }


def save_model(model, run: Path, name: str, config: Config, trained: dict[str, int] | None = None) -> None:
    """Write one model to OUT/weights/NAME and the configuration beside it, see `write_weights`."""
    write_weights(run, name, config, lambda folder: model.save_pretrained(folder, safe_serialization=True), trained)


def write_weights(
    run: Path, name: str, config: Config, write: Callable[[Path], None], trained: dict[str, int] | None = None
) -> None:
    """OUT/weights/NAME by `write(folder)`, in full or not at all, and the configuration beside it.

    trained: {stage: steps} that made it.
    Of several processes only the first writes, and the others wait until it has.
    """
    folder = Path(run) / "weights"
    if int(os.environ.get("RANK", 0)) == 0:
        place_whole(folder / name, write)
        save_config(config, folder, trained)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def save_config(config: Config, folder: Path, trained: dict[str, int] | None = None) -> None:
    """Write `gsv3d.json`: the configuration, and under "trained" the steps of each stage, those of before kept.

    The schedules in it are those of the last command, whatever the other stages were trained with.
    """
    record = trained_steps(folder) | (trained or {})
    with atomic_path(Path(folder) / "gsv3d.json") as path:
        path.write_text(json.dumps(dataclasses.asdict(config) | {"trained": record}, indent=1))


def trained_steps(folder: Path) -> dict[str, int]:
    """{stage: steps} that a checkpoint folder states; {} where it states none. Raises UserError where it is damaged."""
    path = Path(folder) / "gsv3d.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text()).get("trained", {})
        return {stage: int(steps) for stage, steps in record.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); copy it again from a whole checkpoint.") from error


def steps_of(stage: str, config: Config, init: Path | None = None) -> dict[str, int]:
    """{stage: steps} after a stage's schedule, with those of the checkpoint `init` that it began with, where it says."""
    before = trained_steps(init).get(stage, 0) if init is not None else 0
    return {stage: before + getattr(config, schedule_field(stage)).steps}


def load_model(folder: str | Path, name: str):
    """Open one model of a checkpoint folder, in float32.

    Raises FileNotFoundError or ValueError, with what to do, where it is missing or damaged.
    """
    path = Path(folder) / name
    if not (path / "config.json").is_file():
        raise MissingFile(
            f"There are no {name} weights in {folder}; train them with `python -m gsv3d_lib train --stages ...` "
            "or point to a folder that has them, such as data/checkpoints/tiny."
        )
    check_readable(*(file for file in path.iterdir() if file.is_file()))
    options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)  # nothing unpickles
    try:
        opened = model_classes()[name].from_pretrained(path, **options)
        model, differences = opened[0].float().eval(), opened[1]
        if absent := sorted(differences["missing_keys"]):
            raise UserError(f"{len(absent)} tensors such as {absent[0]} are missing")
    except Exception as error:  # safetensors, diffusers and transformers each raise their own kinds, some of many lines
        raise UserError(
            f"The {name} weights in {folder} cannot be read ({reason(error)}); copy them again or train them anew."
        ) from error
    if hasattr(model, "register_to_config"):  # diffusers notes the path, which the next `save_pretrained` would pass on
        model.register_to_config(_name_or_path=name)
    return model


def export_weights(run: Path, folder: Path) -> None:
    """Copy OUT/weights to `folder`, models in half precision, with the training curves: what this project ships."""
    from .lora import load_lora, save_lora

    weights, folder = Path(run) / "weights", Path(folder)
    if not (weights / "gsv3d.json").is_file():
        raise MissingFile(f"There are no finished weights in {weights}: --out names the run that --export copies.")
    for name in sorted(path.name for path in weights.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if name in model_classes():
            place_whole(
                folder / name, partial(load_model(weights, name).half().save_pretrained, safe_serialization=True)
            )
        elif name == "lora":
            place_whole(
                folder / name, partial(save_lora, load_lora(load_model(weights, "unet"), weights / name).half())
            )
        else:  # what `--init` took over, such as the elevation estimate
            place_whole(folder / name, partial(shutil.copytree, weights / name))
    if not (weights / "lora").is_dir():  # one from an earlier export would be that of another U-Net
        shutil.rmtree(folder / "lora", ignore_errors=True)
    shutil.copyfile(weights / "gsv3d.json", folder / "gsv3d.json")
    with atomic_path(folder / "curves.json") as path:
        path.write_text(json.dumps({stage: read_metrics(Path(run) / stage) for stage in STAGES}))


RECIPES = dict(vae=train_vae, dino=train_dino, diffusion=train_diffusion, stage1=train_stage1, stage2=train_stage2)
PRODUCTS = dict(vae="vae", dino="dino", diffusion="clip", stage1="decoder", stage2="lora")


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", nargs="+", type=input_path, default=[input_path("data/cache/procedural")], help="dataset folders"
    )
    source.add_argument(
        "--shards", type=input_path, metavar="FOLDER", help="what `python -m gsv3d_lib shards` wrote, instead of --data"
    )
    parser.add_argument("--out", type=output_path, default="runs/tiny", help="checkpoints, curves and weights")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--steps", type=positive, help="override the number of steps of the named stages")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one field of the preset, such as stage1.lr=1e-4",
    )
    parser.add_argument(
        "--init", type=input_path, metavar="FOLDER", help="a checkpoint whose weights the stages start from"
    )
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--limit", type=positive, help="use only the first objects")
    parser.add_argument("--processes", type=positive, default=1, help="how many torchrun was asked for; it must agree")
    parser.add_argument(
        "--force-resume",
        action="store_true",
        help="go on from checkpoints of other settings or data, which is refused otherwise",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only read the data and encode it into OUT, once for all processes"
    )
    parser.add_argument(
        "--export", type=output_path, help="only copy the finished weights, in half precision, to this folder"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    check_writable((args.export or args.out / "weights") / "gsv3d.json")
    if args.export is not None:
        return export_weights(args.out, args.export)
    config = preset(args.preset, **dict(parse_setting(text) for text in args.set))
    if {"diffusion", "stage2"} & set(args.stages):
        ring_frames(0, config.num_frames)  # a sampler may take any number of views, a training only what a ring has
    remove_leftovers(args.out)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # else every process would encode on the first GPU
    if args.init is not None:
        take_over_once(args.init, args.out, args.stages, config)
    views = views_for(args, config)
    if args.prepare:
        if (args.out / "weights" / "vae").is_dir():  # else this training begins with the VAE
            orbits_for(config, views, args.out)
        return
    for name in args.stages:
        if (args.out / "weights" / PRODUCTS[name]).is_dir():
            made = args.out / "weights" / PRODUCTS[name]
            print(f"{name}: {made} exists; to train again delete it, {args.out / name}, and what was trained on it.")
            continue
        config_of_stage = with_steps(config, name, args.steps)
        options = dict(init=args.init, processes=args.processes, precision=args.precision)
        options |= dict(force_resume=args.force_resume)
        RECIPES[name](config_of_stage, views, args.out, **options)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo sometimes aborts a process that leaves without


def views_for(args: argparse.Namespace, config: Config) -> ViewTensors:
    """The data that the command line names. Raises ValueError where a stage to come would find shards of another encoder."""
    if args.shards is None:
        return load_views(args.data, config.image_size, limit=args.limit, cache=args.out)
    if args.limit is not None:
        raise UserError("--limit counts the objects of --data; shards are read whole.")
    views = open_shards(args.shards, config.image_size)
    todo = [stage for stage in args.stages if not (args.out / "weights" / PRODUCTS[stage]).is_dir()]
    made = [name for name in ("vae", "dino") if name in todo and views.files.index[name]]
    if made and set(todo) - {"vae", "dino"}:
        raise UserError(
            f"{args.shards} holds what an earlier {made[0]} made, which one trained here will not fit: train "
            f"{' and '.join(made)} first, make the shards with it, then train the other stages."
        )
    return views


def with_steps(config: Config, stage: str, steps: int | None) -> Config:
    """The configuration with another number of steps for one stage."""
    field = schedule_field(stage)
    schedule = getattr(config, field)
    return config if steps is None else config.replace(**{field: dataclasses.replace(schedule, steps=steps)})


if __name__ == "__main__":
    sys.exit(main())
