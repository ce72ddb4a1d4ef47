"""SV3D's published weights: Stability's single file, or a folder as of diffusers.

    python -m gsv3d_lib sv3d stabilityai/sv3d      # says what it needs, fetches nothing
    python -m gsv3d_lib sv3d stabilityai/sv3d --download --out runs/paper

The second command makes the weights for stages 1 and 2. In Python:

    GSV3DPipeline.from_sv3d("sv3d_p.safetensors", checkpoint="runs/paper/weights")

A model is built without memory, every stored tensor is assigned to one of its tensors
by name, names and shapes are compared, and only then is anything read. docs/weights.md
has files, sizes and licences.
"""

import argparse
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import Config, preset
from ..decoder import build_decoder
from ..lora import load_lora
from ..system.command import check_writable, command_parser, output_path
from ..system.errors import MissingFile, UserError
from ..system.files import explained
from ..system.paths import reason
from .checkpoint import builders, load_model, save_model
from .sv3d_names import ORIGINAL, Pieces, diffusers_pieces

SVD = "stabilityai/stable-video-diffusion-img2vid-xt"  # VAE, CLIP, scheduler if absent
DINO = "facebook/dinov2-base"
SINGLE = "sv3d_p.safetensors"  # Stability's file
# our models and settings, and where a folder in the layout of diffusers has them
FOLDERS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "clip": "image_encoder/model.safetensors",
    "scheduler": "scheduler/scheduler_config.json",
    "feature_extractor": "feature_extractor/preprocessor_config.json",
}
DINO_FILES = ("config.json", "model.safetensors")
AGAIN = "fetch or copy it again"
Place = str | Path  # a file or folder here, or a name on the Hub

# ---------------------------------------------------------- what would be downloaded


@dataclass(frozen=True)
class Download:
    """One file of the Hugging Face Hub; None where this project does not know."""

    repo: str
    file: str
    size: int | None  # bytes
    licence: str
    gated: bool | None
    cached: bool

    def __str__(self) -> str:
        size = "size unknown" if self.size is None else f"{self.size / 1e9:.2f} GB"
        gate = {True: "gated", False: "not gated", None: "gating unknown"}[self.gated]
        here = ", here already" if self.cached else ""
        return f"{self.repo}/{self.file}: {size}, {gate}, {self.licence}{here}"


# licence, gated, bytes of files, as the models' pages stated them for docs/weights.md
SIZES = (6_100_000_000, 335_000_000, 2_530_000_000, 594, 1000)
DIFFUSERS_BYTES = dict(zip(FOLDERS.values(), SIZES))
SVD_BYTES = {FOLDERS["vae"]: 391_000_000, FOLDERS["clip"]: 2_530_000_000}
SVD_BYTES |= {FOLDERS["scheduler"]: 533}
KNOWN = {
    "stabilityai/sv3d": ("Stability AI Community License", True, {SINGLE: 9_370_000_000}),
    "chenguolin/sv3d-diffusers": ("sv3d-nc-community", False, DIFFUSERS_BYTES),
    SVD: ("stable-video-diffusion-community", False, SVD_BYTES),
    DINO: ("apache-2.0", False, {"config.json": 548, "model.safetensors": 346_000_000}),
}


def downloads(source: Place, svd: Place = SVD, dino: Place = DINO) -> list[Download]:
    """Every file of the Hub that `load_backbone` would ask for. Fetches nothing."""
    wanted = []
    if is_hub(source):
        files = [SINGLE] if str(source) == "stabilityai/sv3d" else list(FOLDERS.values())
        wanted += [(str(source), file) for file in files]
    elif is_hub(svd):
        wanted += [(str(svd), FOLDERS[part]) for part in ("vae", "clip") if not holds(source, part)]
    if is_hub(dino):
        wanted += [(str(dino), file) for file in DINO_FILES]
    return [describe(repo, file) for repo, file in wanted]


def describe(repo: str, file: str) -> Download:
    licence, gated, sizes = KNOWN.get(repo, ("licence unknown", None, {}))
    try:
        fetch(repo, file, download=False)
        cached = True
    except MissingFile:
        cached = False
    return Download(repo, file, sizes.get(file), licence, gated, cached)


def holds(source: Place, part: str) -> bool:
    """Whether a local file or folder has the VAE or CLIP itself."""
    single = single_file(source, download=False)
    if single is None:
        return bool(find(source, part, download=False))
    return bool(ORIGINAL[part](list(Weights(single).shapes), preset("paper")))


def is_hub(source: Place) -> bool:
    """Whether `source` reads as OWNER/NAME of the Hub and is nothing local."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not Path(source).exists()


class Absent(MissingFile):
    """A repository that can be reached does not have the file."""


def fetch(repo: str, file: str, download: bool) -> Path:
    """A file of the Hub: from the local cache or, only with `download`, the network."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    try:
        return Path(hub.hf_hub_download(repo, file, local_files_only=not download))
    except errors.GatedRepoError:
        login = "log in with `hf auth login`, and try again"
        problem = f"{repo} is gated: accept its licence at {page}, {login}."
    except errors.RepositoryNotFoundError:
        problem = f"There is no {repo} on the Hub that you may see: "
        problem += "check the name, and log in with `hf auth login`."
    except errors.LocalEntryNotFoundError:
        fetching = f"pass download=True (--download) to fetch it from {page}"
        advice = "the Hub could not be reached; go online" if download else fetching
        problem = f"{file} of {repo} is not on this machine, nor is a folder of that name: "
        problem += f"{advice}, or give the path of a copy."
    except errors.EntryNotFoundError:
        raise Absent(
            f"{repo} has no {file}; name a repository in diffusers' layout, or {SINGLE} as a file."
        ) from None
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        problem = f"{file} of {repo} could not be fetched ({reason(error)}); "
        problem += "try again, or give the path of a copy."
    raise MissingFile(problem)


def fetch_checkpoint(repo: str) -> Path:
    """Somebody's checkpoint folder on the Hub, from the network or the cache."""
    import huggingface_hub as hub

    fetch(repo, "gsv3d.json", download=True)  # it says in one sentence what is wrong
    return Path(hub.snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))


# ---------------------------------------------------------------- files


class Weights:
    """The tensors of one or more safetensors files: shapes at once, values if asked.

    Raises UserError where a file is damaged.
    """

    def __init__(self, *files: Path):
        from safetensors import safe_open

        self.name = str(files[0])
        self.handles, self.shapes = {}, {}
        for file in files:
            with explained(f"{file} is damaged or no safetensors file", AGAIN, file):
                handle = safe_open(file, framework="pt")
            for key in handle.keys():
                self.handles[key] = handle
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        return self.handles[key].get_tensor(key)

    def blank(self, key: str) -> Tensor:  # of the stored shape, without values
        return torch.empty(self.shapes[key], device="meta")


def find(source: Place, part: str, download: bool) -> list[Path]:
    """The files of one entry of FOLDERS in `source`; empty where it lacks it.

    Locally, half precision or several files per model will do too.
    """
    file = FOLDERS[part]
    if is_hub(source):
        try:
            return [fetch(str(source), file, download)]
        except Absent:
            return []
    path = Path(source) / file
    if path.is_file():
        return [path]
    parts = path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")
    return sorted(parts) or sorted(path.parent.glob(f"{path.stem}.fp16{path.suffix}"))


def single_file(source: Place, download: bool) -> Path | None:
    """Stability's file if `source` is one, names it, or is its folder; else None."""
    if is_hub(source):
        return fetch(str(source), SINGLE, download) if str(source) == "stabilityai/sv3d" else None
    path = Path(source)
    if not path.exists():
        example = "a Hub name such as stabilityai/sv3d"
        raise MissingFile(f"There is no file or folder {source}; give one, or {example}.")
    if path.is_dir():
        return path / SINGLE if (path / SINGLE).is_file() else None
    return path


# ---------------------------------------------------------------- filling a model


def empty(part: str, config: Config, **options) -> nn.Module:
    """The model of one part without memory yet; options of `vae.build_vae`."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return builders()[part](config, **options)


def fill(part: str, weights: Weights, pieces: Pieces, config: Config) -> nn.Module:
    """The model of one part with its stored tensors, in float32.

    Raises UserError where a tensor is missing, unknown, or of another shape.
    """
    before_decoder = any(name.startswith("post_quant_conv.") for name in pieces)
    model = empty(part, config, **({"post_quant": True} if before_decoder else {}))
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(how(weights.blank(s)).shape) for name, (s, how) in pieces.items()}
    still = timeless(wanted) if part == "vae" and not timeless(found) else {}
    compare(part, weights.name, wanted, found | still, config)
    state = {name: torch.zeros(shape) for name, shape in still.items()}
    for name in state:  # a layer over time that changes nothing: 0, or the identity
        if name.endswith("time_conv_out.weight"):
            nn.init.dirac_(state[name])
    for ours, (stored, how) in pieces.items():
        state[ours] = how(weights.read(stored)).to(torch.float32, copy=True).contiguous()
    model.load_state_dict(state, assign=True)
    return model.eval()


def timeless(shapes: dict) -> dict:
    """Those entries that a decoder without layers over time does not have."""
    over_time = re.compile(r"temporal_res_block|time_mixer|time_conv_out")
    return {name: shape for name, shape in shapes.items() if over_time.search(name)}


def compare(part: str, file: str, wanted: dict, found: dict, config: Config) -> None:
    """UserError with the first difference of names or shapes."""
    both = [n for n in wanted if n in found]
    problems = [f"{n} is {found[n]}, not {wanted[n]}" for n in both if found[n] != wanted[n]]
    problems += [f"{n} is missing" for n in wanted if n not in found]
    problems += [f"{n} is unknown" for n in found if n not in wanted]
    if not problems:
        return
    more = f" (and {len(problems) - 1} more differences)" if problems[1:] else ""
    why = (unet_kind(found) if part == "unet" else None) or problems[0] + more
    raise UserError(
        f"{file} does not hold the {part} of SV3D_p in the sizes of {config.name!r}: {why}; "
        f"use {SINGLE} of stabilityai/sv3d or a folder like chenguolin/sv3d-diffusers."
    )


def unet_kind(found: dict) -> str | None:
    """What a U-Net that is not SV3D_p's is, where its tensors tell."""
    if not found:
        return "it has no model.diffusion_model tensors: it is no checkpoint of generative-models"
    if not any("temporal" in name for name in found):
        return "it has no layers over time, so it is an image model such as Stable Diffusion"
    width = found.get("add_embedding.linear_1.weight", (0, 0))[1]
    kinds = {768: "SVD, which knows no cameras", 256: "SV3D_u, which takes no camera angles"}
    return f"by its {width} added features it is {kinds[width]}" if width in kinds else None


# ---------------------------------------------------------------- all together


def load_backbone(
    source: Place,
    config: Config | None = None,
    *,
    svd: Place = SVD,
    dino: Place = DINO,
    download: bool = False,
) -> tuple[Config, dict]:
    """SV3D's own models: the configuration, and vae, clip, unet, dino in float32.

    source: Stability's `sv3d_p.safetensors`, a folder in diffusers' layout, or the name
        of either on the Hub.
    config: by default the preset `paper`.
    svd: folder or Hub name for VAE, CLIP and scheduler that `source` lacks; dino: for
        DINOv2.
    """
    config = config or preset("paper")
    single = single_file(source, download)
    stored = Weights(single) if single else None
    places = source, stored, config, svd, download
    parts = ("unet", "vae", "clip")
    models: dict[str, Any] = {part: load_part(part, *places) for part in parts}
    if single is None:
        config = with_settings(source, svd, config, download)
    models["dino"] = load_dino(dino, config, download)
    return config, models


def load_part(
    part: str, source: Place, single: Weights | None, config: Config, svd: Place, download: bool
) -> nn.Module:
    """One model, from `source` or, VAE and CLIP where it lacks them, from `svd`."""
    if single is not None:
        pieces = ORIGINAL[part](list(single.shapes), config)
        if pieces or part == "unet":
            return fill(part, single, pieces, config)
    files = find(source, part, download) if single is None else []
    if not files and part == "unet":
        raise MissingFile(
            f"{source} has neither {FOLDERS[part]} nor {SINGLE}; name a whole copy of SV3D_p."
        )
    if not files:
        try:
            files = find(svd, part, download)
        except MissingFile as error:
            raise MissingFile(f"{source} has no {FOLDERS[part]}, and {error} (svd=...)") from error
    if not files:
        raise MissingFile(
            f"Neither {source} nor {svd} has {FOLDERS[part]}; give svd=... a folder that has it."
        )
    weights = Weights(*files)
    return fill(part, weights, diffusers_pieces(part, list(weights.shapes)), config)


def with_settings(source: Place, svd: Place, config: Config, download: bool) -> Config:
    """The source's noise levels; UserError where its settings are not SV3D's."""
    from ..encoders import CLIP_MEAN, CLIP_STD

    scheduler = read_settings(find(source, "scheduler", download))
    if not scheduler and not is_hub(svd):
        scheduler = read_settings(find(svd, "scheduler", download))
    pixels = read_settings(find(source, "feature_extractor", download))
    expected = {
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
        "image_mean": [*CLIP_MEAN],
        "image_std": [*CLIP_STD],
    }
    settings = pixels | scheduler
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise UserError(
                f"{source} has {name} = {settings[name]}; SV3D has {value}: this is another model."
            )
    ends = ("sigma_min", "sigma_max")
    return config.replace(**{end: float(scheduler[end]) for end in ends if scheduler.get(end)})


def read_settings(files: list[Path]) -> dict:
    """A JSON file of settings, {} if there is none. UserError where it is damaged."""
    if not files:
        return {}
    with explained(f"{files[0]} cannot be read", AGAIN, files[0]):
        return dict(json.loads(files[0].read_text()))


def load_dino(dino: Place, config: Config, download: bool) -> nn.Module | None:
    """DINOv2 from a folder or the Hub; None for a configuration without it."""
    if config.dino == "none":
        return None
    if is_hub(dino):
        folder = [fetch(str(dino), file, download) for file in DINO_FILES][0].parent
    else:
        folder = Path(dino)
        if missing := [file for file in DINO_FILES if not (folder / file).is_file()]:
            raise MissingFile(
                f"{dino} has no {missing[0]}; give dino=... a copy of {DINO}, or that name itself."
            )
    from transformers import Dinov2Model

    files = [folder / file for file in DINO_FILES]
    with explained(f"DINOv2 in {folder} cannot be read", "copy it again", *files):
        options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)
        model, report = cast(Any, Dinov2Model).from_pretrained(folder, **options)
    if report["missing_keys"] or model.config.hidden_size != config.dino_width:
        built_for = f"{config.name!r} is built for {DINO}"
        raise UserError(f"{folder} is no DINOv2 of width {config.dino_width}; {built_for}.")
    return model.float().eval()


def load_sv3d(
    source: Place,
    config: Config | None = None,
    *,
    checkpoint: str | Path | None = None,
    lora: bool = True,
    svd: Place = SVD,
    dino: Place = DINO,
    download: bool = False,
) -> tuple[Config, dict]:
    """`load_backbone`, and the Gaussian decoder and LoRA of a GSV3D checkpoint folder.

    Without `checkpoint` the decoder is freshly initialised, with a warning: the views
    are SV3D's, the Gaussians mean nothing. A `dino` folder of it goes before `dino`.
    """
    folder = Path(checkpoint) if checkpoint is not None else None
    if folder is not None and (folder / "dino").is_dir():
        dino = folder / "dino"
    decoder = load_model(folder, "decoder") if folder else None  # before the gigabytes
    config, models = load_backbone(source, config, svd=svd, dino=dino, download=download)
    if folder is not None and lora and (folder / "lora").is_dir():
        load_lora(models["unet"], folder / "lora")
    if decoder is None:
        warnings.warn(
            "The Gaussian decoder is freshly initialised: SV3D's views are real, the Gaussians "
            "mean nothing until stage 1 has been trained (docs/weights.md); give checkpoint=... "
            "a folder with a trained decoder.",
            stacklevel=3,
        )
        decoder = build_decoder(config).eval()
    return config, models | {"decoder": decoder}


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("sv3d", __doc__)
    add = parser.add_argument
    source = f"{SINGLE}, a folder in diffusers' layout, or the name of either on the Hub"
    add("source", help=source)
    add("--svd", default=SVD, help="VAE, CLIP and scheduler where the source lacks them")
    add("--dino", default=DINO)
    download = "fetch what is missing; without it nothing is fetched"
    add("--download", action="store_true", help=download)
    out = "convert into OUT/weights, where training at scale `paper` finds it"
    add("--out", type=output_path, help=out)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_writable(args.out / "weights" / "gsv3d.json")  # before gigabytes are fetched
    files = downloads(args.source, args.svd, args.dino)
    for file in files:
        print(file)
    missing = [file for file in files if not file.cached]
    total = sum(file.size or 0 for file in missing) / 1e9
    known = f"{len(missing)} files to download, {total:.2f} GB as far as known."
    print(known if missing else "Nothing to download.")
    if missing and not args.download:
        advice = "for gated files accept the licence and `hf auth login`"
        return print(f"Nothing was fetched; add --download, and {advice}.")
    for file in missing:
        fetch(file.repo, file.file, download=True)
    if args.out is not None:
        convert(args.source, args.out, svd=args.svd, dino=args.dino, download=args.download)
        print(f"vae, clip, unet and dino of SV3D are in {args.out / 'weights'}.")


def convert(source: Place, run: Path, config: Config | None = None, **options) -> None:
    """SV3D's models into RUN/weights, for stages 1 and 2; see `load_backbone`."""
    config, models = load_backbone(source, config, **options)
    for name, model in models.items():
        if model is not None:
            save_model(model, Path(run) / "weights", name, config)
