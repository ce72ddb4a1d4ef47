"""The table of the five stages: what each trains, what it needs, how it is built.

    vae -> diffusion -> stage2       dino -> stage1 -> stage2       vae -> stage1

`run_stage` trains one of them in a run folder. The loop is `training.train`; what a
stage draws and minimises is in `pretraining.py`, `stage1.py` and `distillation.py`.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .cluster.shards import ShardViews
from .config import Config, Schedule
from .data.dataset import ViewTensors
from .data.examples import Orbits, load_orbits
from .distillation import DistillationStage
from .lora import add_lora
from .pretraining import DiffusionStage, DINOStage, VAEStage
from .stage1 import DecoderStage
from .system.errors import MissingFile, UserError
from .system.paths import place_whole
from .training import Stage, train
from .weights.checkpoint import (
    builders,
    load_dino,
    load_model,
    model_classes,
    save_config,
    save_model,
    trained_steps,
)


@dataclass(frozen=True)
class StageSpec:
    """One row of the table."""

    make: type[Stage]  # called with the models, the data and the configuration
    models: tuple[str, ...]  # in the order in which `make` takes them
    trains: tuple[str, ...]  # the folders of a checkpoint that it makes
    schedule: str  # the field of `Config` that says how long and how fast
    needs: tuple[str, ...] = ()  # the stages whose weights it reads
    # models that some configurations add, by the name under which `make` takes them
    extras: Callable[[Config], tuple[str, ...]] = lambda config: ()


UNET = ("unet", "clip")  # the U-Net, and the CLIP tower that learns along with it
BELOW = ("vae", "dino", "diffusion", "stage1")  # what stage 2 stands on
STAGES = {
    "vae": StageSpec(VAEStage, ("vae",), ("vae",), "vae_schedule"),
    "dino": StageSpec(DINOStage, ("dino",), ("dino",), "dino_schedule"),
    "diffusion": StageSpec(DiffusionStage, UNET, UNET, "diffusion_schedule", ("vae",)),
    "stage1": StageSpec(
        DecoderStage,
        ("decoder", "dino"),
        ("decoder",),
        "stage1",
        ("vae", "dino"),
        extras=lambda config: UNET if config.sampled_share else (),
    ),
    "stage2": StageSpec(DistillationStage, (*UNET, "decoder", "dino"), ("lora",), "stage2", BELOW),
}


def schedule_of(config: Config, stage: str) -> Schedule:
    """How a stage is trained."""
    return getattr(config, STAGES[stage].schedule)


def with_steps(config: Config, stage: str, steps: int | None) -> Config:
    """The configuration with another number of steps for one stage."""
    if steps is None:
        return config
    schedule = dataclasses.replace(schedule_of(config, stage), steps=steps)
    return config.replace(**{STAGES[stage].schedule: schedule})


def is_trained(stage: str, weights: Path) -> bool:
    """Whether all that a stage makes lies in a checkpoint folder."""
    return all((weights / name).is_dir() for name in STAGES[stage].trains)


def build_stage(
    name: str,
    config: Config,
    models: Mapping[str, nn.Module | None],
    data: ViewTensors | Orbits | None,
) -> Stage:
    """A stage from its models and data; `checkpointing` is switched on if asked."""
    for part in ("unet", "decoder"):
        if config.checkpointing and part in models:
            cast(Any, models[part]).enable_gradient_checkpointing()
    spec = STAGES[name]
    extras = {part: models[part] for part in spec.extras(config)}
    return spec.make(*(models[part] for part in spec.models), data, config, **extras)


def run_stage(
    name: str, config: Config, views: ViewTensors, run: Path, init: Path | None = None, **options
) -> list[dict]:
    """Train one stage in the folder `run`, with its weights in run/weights.

    init: a checkpoint folder to start from.  options: of `training.train`.
    Returns the metrics.
    """
    spec = STAGES[name]
    weights = Path(run) / "weights"
    torch.manual_seed(config.seed)
    models = starting_models(name, config, weights, init)
    data = orbits_for(config, views, run, models.get("dino")) if "vae" in spec.needs else views
    stage = build_stage(name, config, models, data)
    history = train(stage, schedule_of(config, name), Path(run) / name, seed=config.seed, **options)
    begun = trained_steps(init).get(name, 0) if init is not None else 0
    done = history[-1]["step"] + 1 if history else 0  # the last step is always logged
    steps = {name: begun + done}
    for product, model in stage.products().items():
        save_model(model, weights, product, config, steps)
    return history


def starting_models(
    name: str, config: Config, weights: Path, init: Path | None
) -> dict[str, nn.Module | None]:
    """A stage's models: what it trains is new or from `init`, the rest as trained.

    A LoRA is always new: `init` has only given the models below it.
    """
    spec = STAGES[name]
    models = {}
    for part in (*spec.models, *spec.extras(config)):
        if part in spec.trains:
            models[part] = initial(part, config, init)
        elif part == "dino":
            models[part] = load_dino(config, weights)
        else:
            models[part] = load_model(weights, part)
    if "lora" in spec.trains:
        add_lora(models["unet"], config.lora_rank, config.seed)
    return models


def initial(name: str, config: Config, init: Path | None) -> nn.Module:
    """What a stage starts from: a new model, or that of the checkpoint `init`.

    A model with a method `grown_to` may be smaller than asked for. Otherwise UserError
    where the sizes are not those of `config`.
    """
    build = builders()[name]
    if init is None:
        return build(config)
    model = load_model(init, name)
    if hasattr(model, "grown_to"):
        model = model.grown_to(config)
    with torch.device("meta"):
        wanted = traits(build(config))
    for key, value in traits(model).items():
        if wanted.get(key) != value:
            raise UserError(
                f"The {name} in {init} is not of this configuration ({key} is {value}, "
                f"not {wanted.get(key)}); train without --init or the settings that changed it."
            )
    return model


def traits(model: nn.Module) -> dict[str, object]:
    """What two models with the same weights share: shapes, and what none shows."""
    shapes: dict[str, object] = {k: list(v.shape) for k, v in model.state_dict().items()}
    unseen = ("heads", "num_attention_heads", "scale_range", "resnet_eps")
    hidden = {key: getattr(model.config, key, None) for key in unseen}
    return shapes | {key: list(v) if isinstance(v, tuple) else v for key, v in hidden.items()}


def orbits_for(
    config: Config, views: ViewTensors, run: Path, dino: nn.Module | None = None
) -> Orbits:
    """Orbits of all objects and their variants, encoded by this run's VAE.

    From shards they come with the features of `dino`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_model(Path(run) / "weights", "vae").to(device)
    if isinstance(views, ShardViews):
        return views.orbits(vae, dino, config.seed)
    cache = Path(run) / f"latents-{config.copies}.safetensors"
    return load_orbits(views, vae, config.copies, cache=cache, seed=config.seed)


def take_over(init: Path, run: Path, stages: Sequence[str], config: Config) -> None:
    """Copy into run/weights the models of `init` that `stages` do not train.

    Those that are there already stay; gsv3d.json states how long each was trained.
    Raises MissingFile where `init` is no checkpoint, UserError where its weights are
    damaged.
    """
    if not (init / "gsv3d.json").is_file():
        raise MissingFile(
            f"--init {init} is no GSV3D checkpoint: gsv3d.json is missing. "
            "Try data/checkpoints/tiny."
        )
    trained = {name for stage in stages for name in STAGES[stage].trains} | {"lora"}
    folders = (path for path in init.iterdir() if path.is_dir() and not path.name.startswith("."))
    record = trained_steps(init)
    for source in sorted(path for path in folders if path.name not in trained):
        if (run / "weights" / source.name).exists():
            continue
        if source.name in model_classes():
            load_model(init, source.name)  # damaged weights are named now, not hours later
        place_whole(run / "weights" / source.name, partial(shutil.copytree, source))
        taken = {s: n for s, n in record.items() if s in STAGES and source.name in STAGES[s].trains}
        save_config(config, run / "weights", taken)
