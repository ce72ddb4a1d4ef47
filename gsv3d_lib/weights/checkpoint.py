"""A checkpoint folder: one folder a model, and `gsv3d.json` beside them.

vae/  clip/  dino/  unet/  decoder/    config.json and safetensors of each
lora/                                  the adapter of stage 2, in diffusers' format
gsv3d.json                             the configuration, and the steps of each stage

The layout of the models is diffusers' and transformers'.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import Config, preset
from ..lora import save_lora
from ..system.errors import MissingFile, UserError
from ..system.files import explained
from ..system.paths import atomic_path, check_readable, find, from_repository, place_whole, reason

if TYPE_CHECKING:
    from transformers import Dinov2Model

COPY = "copy it again from a whole checkpoint"


def builders() -> dict[str, Callable[..., nn.Module]]:
    """What makes a new model of each kind."""
    from ..decoder import build_decoder
    from ..encoders import build_clip, build_dino
    from ..unet import build_unet
    from ..vae import build_vae

    models: dict[str, Callable[..., nn.Module]] = {"vae": build_vae, "clip": build_clip}
    return models | {"dino": build_dino, "unet": build_unet, "decoder": build_decoder}


def model_classes() -> dict[str, type]:
    """The class behind each folder of a checkpoint."""
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPVisionModelWithProjection, Dinov2Model
    from transformers.utils import logging as transformers_logging

    from ..decoder import GaussianDecoder
    from ..unet import SV3DUNet
    from ..vae import GroupedVAE

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a bar per file of a few megabytes hides what matters
    models = {"vae": GroupedVAE, "clip": CLIPVisionModelWithProjection, "dino": Dinov2Model}
    return models | {"unet": SV3DUNet, "decoder": GaussianDecoder}


# ---------------------------------------------------------------- reading


def load_model(folder: str | Path, name: str) -> Any:
    """Open one model of a checkpoint folder, in float32.

    Raises MissingFile or UserError, with what to do, where it is missing or damaged.
    """
    path = Path(folder) / name
    if not (path / "config.json").is_file():
        raise MissingFile(
            f"There are no {name} weights in {folder}; train them with `python -m gsv3d_lib train "
            "--stages ...` or point to a folder that has them, such as data/checkpoints/tiny."
        )
    check_readable(*(file for file in path.iterdir() if file.is_file()))
    # `use_safetensors`: nothing unpickles
    options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)
    try:
        model, differences = model_classes()[name].from_pretrained(path, **options)
        if absent := sorted(differences["missing_keys"]):
            raise UserError(f"{len(absent)} tensors such as {absent[0]} are missing")
    except Exception as error:  # each library raises its own kinds, some of many lines
        raise UserError(
            f"The {name} weights in {folder} cannot be read ({reason(error)}); "
            "copy them again or train them anew."
        ) from error
    if hasattr(model, "register_to_config"):  # diffusers notes the path, and would save it
        model.register_to_config(_name_or_path=name)
    return model.float().eval()


def load_dino(config: Config, weights: Path) -> Dinov2Model | None:
    """The DINO encoder of a checkpoint folder; None for a configuration without one."""
    return None if config.dino == "none" else load_model(weights, "dino")


def load_config(folder: str | Path) -> Config:
    """The configuration stored in a checkpoint folder (`gsv3d.json`).

    Raises MissingFile or UserError where there is none or it is damaged.
    """
    path = find(folder) / "gsv3d.json"
    if not path.is_file():
        advice = " The shipped one is data/checkpoints/tiny; `make train-tiny` makes your own."
        advice = from_repository(folder) or advice
        raise MissingFile(f"{folder} is no GSV3D checkpoint: gsv3d.json is missing.{advice}")
    with explained(f"{path} cannot be read", COPY, path):
        stored = dict(json.loads(path.read_text()))
        base = preset(stored["name"])
        fields = {f.name: f for f in dataclasses.fields(Config)}
        values = {n: _typed(getattr(base, n), value) for n, value in stored.items() if n in fields}
        return dataclasses.replace(base, **values)


def _typed(like, value):
    """JSON lists and dicts as tuples and `Schedule`s of the configuration."""
    if dataclasses.is_dataclass(like):
        return type(like)(**value)
    return tuple(value) if isinstance(like, tuple) else value


def trained_steps(folder: Path) -> dict[str, int]:
    """{stage: steps} that a checkpoint folder states; {} where it states none."""
    path = Path(folder) / "gsv3d.json"
    if not path.is_file():
        return {}
    with explained(f"{path} cannot be read", COPY, path):
        record = dict(dict(json.loads(path.read_text())).get("trained", {}))
        return {stage: int(steps) for stage, steps in record.items()}


# ---------------------------------------------------------------- writing


def save_model(
    model: nn.Module, folder: Path, name: str, config: Config, trained: dict[str, int] | None = None
) -> None:
    """One model to FOLDER/NAME, in full or not at all, and the configuration beside it.

    trained: {stage: steps} that made it. Of several processes only the first writes,
        and the others wait until it has.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        place_whole(Path(folder) / name, writer(name, model))
        save_config(config, folder, trained)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def writer(name: str, model: Any) -> Callable[[Path], None]:
    """What writes a model into an empty folder; "lora" is that of the U-Net."""
    if name == "lora":
        return lambda folder: save_lora(model, folder)
    return lambda folder: model.save_pretrained(folder, safe_serialization=True)


def save_config(config: Config, folder: Path, trained: dict[str, int] | None = None) -> None:
    """Write `gsv3d.json`: the configuration, and the steps of each stage in "trained".

    Steps of before are kept. The schedules are those of the last command, whatever the
    other stages were trained with.
    """
    record = trained_steps(folder) | (trained or {})
    with atomic_path(Path(folder) / "gsv3d.json") as path:
        path.write_text(json.dumps(dataclasses.asdict(config) | {"trained": record}, indent=1))
