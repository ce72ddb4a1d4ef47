"""The paper's claims as experiments: train each arm with several seeds, then compare.

    python tools/run_experiments.py distillation --data FOLDER ... \
        --objects ../shared/objects/gso --out data/results/distillation.json

Every (arm, seed) is one run. Runs are resumable; finished ones are found under --work
and in the results file itself, and not repeated. A run from other weights, on other
data or of another length is another run. The results file is written again after each;
`gsv3d_lib/evaluation/experiments.py` reads it.
All arms of a seed see the same examples, the same noise and the same sampler seed, so
their differences are paired twice: by seed and by object.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from gsv3d_lib.config import Config
from gsv3d_lib.data.dataset import FRONT, Scene, ViewTensors, load_views
from gsv3d_lib.data.examples import Orbits, load_orbits, relative_cameras, ring_frames
from gsv3d_lib.evaluation.experiments import compare, table
from gsv3d_lib.evaluation.protocol import (
    Judge,
    Truth,
    free_views,
    generate,
    image_scores,
    load_truth,
    mesh_scores,
)
from gsv3d_lib.evaluation.report import save_json
from gsv3d_lib.pipeline import GSV3DPipeline
from gsv3d_lib.stages import build_stage, initial, starting_models
from gsv3d_lib.system import command
from gsv3d_lib.system.command import check_writable, exit_code, input_path, output_path
from gsv3d_lib.system.errors import UserError
from gsv3d_lib.system.files import explained
from gsv3d_lib.system.provenance import commit, hardware
from gsv3d_lib.training import train
from gsv3d_lib.vae import encode_scaled
from gsv3d_lib.weights.checkpoint import load_config, load_dino, load_model, model_classes

Rows = list[dict[str, float]]  # the scores of a run, one row per object


@dataclass(frozen=True)
class Arm:
    """One setting of an experiment: what it changes in the configuration."""

    name: str
    label: str
    changes: dict = field(default_factory=dict)
    trained: bool = True
    warm: bool = False  # start from the shipped weights where the others start from scratch


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared with one of them, the reference."""

    question: str
    reference: str
    arms: tuple[Arm, ...]
    run: Callable  # trains and scores one arm with one seed
    defaults: dict  # steps, batch and so on, unless the command says otherwise

    def arm(self, name: str) -> Arm:
        for arm in self.arms:
            if arm.name == name:
                return arm
        known = ", ".join(arm.name for arm in self.arms)
        raise UserError(f"There is no arm {name!r}; choose from {known}.")


@dataclass
class World:
    """What all runs of one command share."""

    weights: Path
    config: Config
    orbits: Orbits  # to train on
    views: ViewTensors  # of the objects to score
    objects: Path
    work: Path
    sampler: dict  # steps and guidance
    fingerprint: str  # of the weights
    start: str  # eight digits that change with weights, data, objects and sampler
    # the shipped decoder's scores by its number of true views, once made
    true_rows: dict[int, Rows] = field(default_factory=dict)


# ---------------------------------------------------------------- what one run does


def run_distillation(world: World, config: Config, arm: Arm, folder: Path) -> tuple[Rows, dict]:
    """Stage 2 from the shipped weights, then image -> 3D of every object."""
    models = starting_models("stage2", config, world.weights, None)
    cost = {}
    if arm.trained:
        stage = build_stage("stage2", config, models, world.orbits)
        cost = timed_training(stage, config.stage2, folder, config.seed)
    models["unet"].requires_grad_(False)
    pipe = GSV3DPipeline(config, vae=load_model(world.weights, "vae"), **models)
    frames = config.num_frames
    if frames not in world.true_rows:  # the decoder is frozen: all arms share its own scores
        world.true_rows[frames] = score_decoder(world, pipe, frames)
    made = score_generations(world, pipe, config.seed)
    return [true | row for true, row in zip(world.true_rows[frames], made, strict=True)], cost


def run_decoder(world: World, config: Config, arm: Arm, folder: Path) -> tuple[Rows, dict]:
    """Stage 1 from scratch on the shipped VAE's latents, then true views -> 3D."""
    torch.manual_seed(config.seed)
    models = starting_models("stage1", config, world.weights, None)
    stage = build_stage("stage1", config, models, world.orbits)
    cost = timed_training(stage, config.stage1, folder, config.seed)
    decoder = stage.decoder.requires_grad_(False).eval()
    pipe = decoder_alone(config, load_model(world.weights, "vae"), decoder, models["dino"])
    return score_decoder(world, pipe, config.num_frames), cost


def run_overfit(world: World, config: Config, arm: Arm, folder: Path) -> tuple[Rows, dict]:
    """Stage 1 on a single object, for each object anew.

    It shows what the decoder can represent, learning aside.
    """
    dino, vae = load_dino(config, world.weights), load_model(world.weights, "vae")
    rows, costs = [], {}
    for index, id in enumerate(world.views.ids):
        torch.manual_seed(config.seed)
        decoder = initial("decoder", config, world.weights if arm.warm else None)
        orbits = load_orbits(world.views.subset([index]), vae, progress=False)
        stage = build_stage("stage1", config, {"decoder": decoder, "dino": dino}, orbits)
        costs[id] = timed_training(stage, config.stage1, folder / id, config.seed)
        pipe = decoder_alone(config, vae, decoder.requires_grad_(False).eval(), dino)
        truth = load_truth(world.objects, id)
        rows.append(score_inputs(pipe, world.views.scene(index), config.view_counts[0], truth))
    return rows, costs


def decoder_alone(config: Config, vae, decoder, dino) -> GSV3DPipeline:
    """A pipeline that can only decode latents of true views."""
    return GSV3DPipeline(config, vae=vae, clip=None, unet=None, decoder=decoder, dino=dino)


@torch.no_grad()
def score_inputs(
    pipe: GSV3DPipeline, scene: Scene, num_frames: int, truth: Truth | None
) -> dict[str, float]:
    """A decoder on N true ring views: its mesh, those same views, and the free ones."""
    frames = ring_frames(FRONT, num_frames)
    cameras = relative_cameras(scene, FRONT, frames)
    latents = encode_scaled(pipe.vae, scene.rgb[frames])
    gaussians = pipe.gaussians_from(latents, cameras, scene.rgb[FRONT])
    scores = image_scores(gaussians, scene, FRONT, frames)
    scores |= mesh_scores(gaussians, truth, float(scene.azimuths[FRONT]))
    free = image_scores(gaussians, scene, FRONT, free_views(scene))
    return scores | {f"free_{name}": value for name, value in free.items()}


def timed_training(stage, schedule, folder: Path, seed: int) -> dict:
    """Train to the end -> what it cost, which a resumed run finds in `folder`."""
    started, first = time.process_time(), len(list(folder.glob("checkpoint-*")))
    history = train(stage, schedule, folder, seed=seed)
    stage.cpu()  # where everything is measured
    stored = folder / "cost.json"
    if not first:  # a resumed run would only know its own part
        seconds = (time.process_time() - started) / schedule.steps
        save_json(stored, {"cpu_seconds_per_step": round(seconds, 3)})
    cost = read_json(stored) if stored.is_file() else {}
    losses = {k: round(v, 4) for k, v in history[-1].items() if k not in ("time", "step")}
    return cost | {"last": losses}


def score_decoder(world: World, pipe: GSV3DPipeline, num_frames: int) -> Rows:
    """The decoder's own scores on N true views, called true_..., one row per object."""
    rows = []
    for index in range(len(world.views.ids)):
        scores = Judge().decoder(pipe, world.views.scene(index), num_frames)
        rows.append({f"true_{name}": value for name, value in scores.items()})
    return rows


def score_generations(world: World, pipe: GSV3DPipeline, seed: int) -> Rows:
    """Image -> 3D of every object: its scores and what it cost, one row per object."""
    rows = []
    for index, id in enumerate(tqdm(world.views.ids, desc="scoring", mininterval=10)):
        scene, truth = world.views.scene(index), load_truth(world.objects, id)
        started = time.process_time()
        # the models themselves are compared
        made = generate(pipe, scene, seed, back_projection=False, **world.sampler)
        seconds = time.process_time() - started
        rows.append({"cpu_seconds": seconds} | Judge().generation(pipe, scene, truth, made))
    return rows


# ---------------------------------------------------------------- the experiments

NONE = Arm("none", "no LoRA", trained=False)
L_2D_ALONE = Arm("lambda_0", "λ = 0, the LoRA on L_2D alone", {"lambda_3d": 0.0})
# ours; stage 2 goes without by default, because of what this experiment found
ALPHA = {"lambda_alpha_stage2": 0.5}
# where L_3D at the LoRA is as loud as L_2D
LOUD = {"lambda_3d": 10.0}
PICTURE = {"lambda_pixel": 0.0, "lambda_depth": 0.05, "lambda_alpha": 0.1}
PICTURE |= {"view_counts": (8,), "target_views": 8}
STAGE2 = {"stage": "stage2", "steps": 120, "batch": 2}  # one for all: common arms are one run

EXPERIMENTS = {
    "overfit": Experiment(
        "Can the decoder represent one object: 30 dB on its input views, Chamfer distance 0.03?",
        "scratch",
        (
            Arm("scratch", "from scratch", PICTURE),
            Arm("warm", "from the shipped decoder", PICTURE, warm=True),
        ),
        run_overfit,
        {"stage": "stage1", "steps": 2000, "batch": 1, "lr": 1e-3},
    ),
    "distillation": Experiment(
        "Does geometric distillation lower the Chamfer distance, and what does it cost in texture?",
        "lambda_0",
        (
            NONE,
            L_2D_ALONE,
            Arm("lambda_0.1", "λ = 0.1", {"lambda_3d": 0.1} | ALPHA),
            Arm("lambda_0.3", "λ = 0.3", {"lambda_3d": 0.3} | ALPHA),
            Arm("lambda_1", "λ = 1: RGB, depth and alpha", ALPHA),
            Arm("lambda_3", "λ = 3", {"lambda_3d": 3.0} | ALPHA),
            Arm("rgbd", "λ = 1, RGB and depth"),
            Arm("rgb", "λ = 1, RGB only", {"lambda_depth": 0.0}),
            Arm("depth", "λ = 1, depth only", {"lambda_rgb": 0.0}),
            Arm("snr", "λ = 1, w = 1 / (1 + σ²)", {"sigma_weighting": "snr"} | ALPHA),
        ),
        run_distillation,
        STAGE2,
    ),
    "distillation_heard": Experiment(
        "Does it, where the gradient of L_3D at the LoRA is as loud as that of L_2D, "
        "and surfaces stay solid?",
        "lambda_0",
        (
            NONE,
            L_2D_ALONE,
            Arm("lambda_10", "λ = 10", LOUD),
            Arm("lambda_10_solid", "λ = 10, solid surfaces", LOUD | {"lambda_solid": 0.02}),
            Arm("lambda_1", "λ = 1", {"lambda_3d": 1.0}),
            Arm("lambda_100", "λ = 100", {"lambda_3d": 100.0}),
            Arm("lambda_1000", "λ = 1000", {"lambda_3d": 1000.0}),
            Arm("rgb", "λ = 10, RGB only", LOUD | {"lambda_depth": 0.0}),
            Arm("depth", "λ = 10, depth only", LOUD | {"lambda_rgb": 0.0}),
            Arm("snr", "λ = 10, w = 1 / (1 + σ²)", LOUD | {"sigma_weighting": "snr"}),
        ),
        run_distillation,
        {"stage": "stage2", "steps": 1000, "batch": 2, "lr": 2e-4},
    ),
    "frames": Experiment(
        "Is N = 16 better than fewer views, for the decoder on true views and for the whole chain?",
        "n_16",
        (
            *(Arm(f"n_{count}", f"N = {count}", {"num_frames": count}) for count in (2, 4, 8)),
            Arm("n_16", "N = 16"),
        ),
        run_distillation,
        STAGE2,
    ),
    "rank": Experiment(
        "How much does the rank of the LoRA matter?",
        "rank_16",
        (
            Arm("rank_4", "r = 4", {"lora_rank": 4}),
            Arm("rank_16", "r = 16"),
            Arm("rank_64", "r = 64", {"lora_rank": 64}),
        ),
        run_distillation,
        STAGE2,
    ),
    "dino": Experiment(
        "Does the decoder need DINO features of the input image?",
        "dino",
        (Arm("dino", "with DINO"), Arm("no_dino", "without", {"dino": "none"})),
        run_decoder,
        {"stage": "stage1", "steps": 500, "batch": 2},
    ),
}


# ---------------------------------------------------------------- one run and its file


def configure(
    base: Config, experiment: Experiment, arm: Arm, seed: int, steps: int, batch: int
) -> Config:
    """The checkpoint's configuration with an arm's changes, a seed and a schedule."""
    stage = experiment.defaults["stage"]
    schedule = getattr(base, stage)
    lr = experiment.defaults.get("lr", schedule.lr)
    schedule = dataclasses.replace(schedule, steps=steps, batch=batch, lr=lr, warmup=min(20, steps))
    return base.replace(**arm.changes, **{stage: schedule}, seed=seed)


def run_once(
    world: World, experiment: Experiment, arm: Arm, seed: int, size: tuple[int, int]
) -> None:
    """One (arm, seed): leaves `scores.json` in its folder, or finds it there."""
    folder = world.work / run_name(experiment, arm, seed, size, world.start)
    if (folder / "scores.json").is_file():
        return
    print(f"{arm.label}, seed {seed}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    config = configure(world.config, experiment, arm, seed, *size)
    rows, cost = experiment.run(world, config, arm, folder)
    save_json(folder / "scores.json", {"cost": cost, "rows": rows})
    for checkpoint in folder.rglob("checkpoint-*"):  # the scores are what is kept
        checkpoint.unlink()


def run_name(experiment: Experiment, arm: Arm, seed: int, size: tuple[int, int], start: str) -> str:
    """Says what is run, so that experiments share common arms.

    Such as `distillation-120x2-lambda_3d=0.1-seed0-1f0c77ab`.
    """
    if not arm.trained:
        return f"untrained-seed{seed}-{start}"
    kind = experiment.run.__name__.removeprefix("run_")
    changes = "-".join(f"{k}={v}" for k, v in arm.changes.items()).replace(" ", "") or "default"
    return f"{kind}-{size[0]}x{size[1]}-{changes}{'-warm' * arm.warm}-seed{seed}-{start}"


def weights_fingerprint(folder: Path) -> str:
    """Sixteen digits that change with what arms start from.

    These are a checkpoint's configuration and models, not its LoRA.
    """
    files = [f for name in model_classes() for f in (folder / name).glob("*.safetensors")]
    total = hashlib.sha256()
    for path in sorted([folder / "gsv3d.json", *files]):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def read_json(path: Path) -> dict:
    """A file that an earlier run left in --work; UserError where it is damaged."""
    with explained(f"{path} is damaged", "delete its folder, and the run is made again", path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the results file


def collect(world: World, experiment: Experiment, seeds: list[int], size: tuple[int, int]) -> dict:
    """Every finished run, by arm and seed.

    {"ids", "arms": {arm: {"label", "runs", "cost", "scores": {seed: {metric: [O]}}}}}
    """
    arms: dict[str, dict] = {}
    for arm, seed in itertools.product(experiment.arms, seeds):
        name = run_name(experiment, arm, seed, size, world.start)
        path = world.work / name / "scores.json"
        if not path.is_file():
            continue
        stored = read_json(path)
        metrics = dict.fromkeys(metric for row in stored["rows"] for metric in row)
        columns = {k: [rounded(row.get(k), 4) for row in stored["rows"]] for k in metrics}
        blank = {"label": arm.label, "runs": {}, "cost": {}, "scores": {}}
        entry = arms.setdefault(arm.name, blank)
        entry["runs"][str(seed)] = name
        entry["cost"][str(seed)] = stored["cost"]
        entry["scores"][str(seed)] = columns
    return {"ids": world.views.ids, "arms": arms}


def restore_runs(
    out: Path, world: World, experiment: Experiment, size: tuple[int, int]
) -> set[int]:
    """Put the runs of a results file that fit this command into --work -> their seeds.

    Says how many do not fit.
    """
    runs = stored_runs(out) if out.is_file() else []
    arms, seeds = {arm.name: arm for arm in experiment.arms}, []
    for name, seed, run, columns, cost in runs:
        if name in arms and run == run_name(experiment, arms[name], seed, size, world.start):
            seeds.append(seed)
            scores = world.work / run / "scores.json"
            if not scores.is_file():
                rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
                save_json(scores, {"cost": cost, "rows": rows})
    if len(seeds) < len(runs):
        left = f"{len(runs) - len(seeds)} of {len(runs)} runs are of other weights, data or steps"
        print(f"{out}: {left}, or do not say of which; they are left out.")
    return set(seeds)


def stored_runs(out: Path) -> list[tuple[str, int, str | None, dict[str, list], dict]]:
    """Every run of a results file: arm, seed, name of the run, scores by metric, cost.

    Older files have no names of runs. Raises UserError for another file.
    """
    runs = []
    try:
        for name, entry in json.loads(out.read_text(encoding="utf-8"))["arms"].items():
            for seed, columns in entry["scores"].items():
                run = entry.get("runs", {}).get(seed)
                runs.append((name, int(seed), run, dict(columns), dict(entry["cost"][seed])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sentence = f"{out} is no results file of experiments; choose another --out."
        raise UserError(sentence) from error
    return runs


def write_results(experiment: Experiment, results: dict, out: Path, settings: dict) -> dict:
    """Write the results file: settings, scores, and differences to the reference."""
    reference = results["arms"].get(experiment.reference)
    differences = {}
    for name, arm in results["arms"].items():
        if reference is not None and arm is not reference:
            metrics = next(iter(arm["scores"].values()))
            found = {metric: compare(arm, reference, metric) for metric in metrics}
            differences[name] = rounded(found, 5)
    record = {"question": experiment.question, "reference": experiment.reference, **settings}
    record |= {"commit": commit(), "hardware": hardware(), "objects": len(results["ids"])}
    record |= results | {"differences": differences}
    save_json(out, record, separators=(",", ":"))
    return record


def rounded(value, digits: int):
    """Numbers in nested dicts and lists, rounded; None stays."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return None if value is None else round(value, digits)


# ---------------------------------------------------------------- the command


def open_world(args: argparse.Namespace) -> World:
    """Weights, orbits and objects of a command; latents and views stay in --work."""
    config = load_config(args.weights)
    training = load_views(args.data, config.image_size, limit=args.limit, cache=args.work)
    vae = load_model(args.weights, "vae")
    latents = args.work / "latents.safetensors"
    orbits = load_orbits(training, vae, config.copies, cache=latents, seed=config.seed)
    views = load_views([args.objects], config.image_size)
    unknown = set(args.ids or []) - set(views.ids)
    if unknown:
        raise UserError(f"{args.objects} has no object {', '.join(sorted(unknown))}.")
    views = views.subset([views.ids.index(id) for id in args.ids or views.ids])
    sampler = {"steps": args.sampling_steps, "guidance": args.guidance}
    fingerprint = weights_fingerprint(args.weights)
    seen = [v.fingerprint() for v in (training, views)]
    # fields of a later version change what an arm is
    start = json.dumps([fingerprint, seen, sampler, dataclasses.asdict(config)])
    start = hashlib.sha256(start.encode()).hexdigest()[:8]
    shared = (args.objects, args.work, sampler, fingerprint, start)
    return World(args.weights, config, orbits, views, *shared)


def build_parser() -> argparse.ArgumentParser:
    common = ("--weights", "--data", "--objects", "--limit", "--guidance")
    own = {"data": [input_path("data/cache/procedural")], "guidance": 1.0}
    parser = command.command_parser("", __doc__, *common, **own)
    parser.prog = "python tools/run_experiments.py"
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--out", type=output_path, required=True, help="JSON file; its finished runs are kept")
    add("--work", type=output_path, default="runs/experiments", help="runs and checkpoints")
    add("--arms", nargs="+", help="only these")
    add("--ids", nargs="+", help="score only these objects")
    add("--seeds", nargs="+", type=command.training_seed, default=[0, 1, 2], help="one run each")
    add("--steps", type=command.positive, help="of every arm's training")
    add("--batch", type=command.batch, help="of every arm's training")
    add("--sampling-steps", type=command.sampler_steps, default=10)
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    experiment = EXPERIMENTS[args.experiment]
    size = (args.steps or experiment.defaults["steps"], args.batch or experiment.defaults["batch"])
    arms = [experiment.arm(name) for name in args.arms or [arm.name for arm in experiment.arms]]
    for path in (args.out, args.work / "latents.safetensors"):
        check_writable(path)
    world = open_world(args)
    seeds = sorted({*args.seeds, *restore_runs(args.out, world, experiment, size)})
    settings = {"command": args.command, "weights": str(args.weights)}
    settings |= {"fingerprint": world.fingerprint, "steps": size[0], "batch": size[1]}
    settings["sampler"] = world.sampler
    # all arms of one seed first: what is there is balanced
    for seed, arm in itertools.product(args.seeds, arms):
        run_once(world, experiment, arm, seed, size)
        results = collect(world, experiment, seeds, size)
        record = write_results(experiment, results, args.out, settings)
    scored = next(iter(next(iter(record["arms"].values()))["scores"].values()))
    metrics = [m for m in ("psnr", "ssim", "chamfer", "true_psnr") if m in scored]
    print(table(record, experiment.reference, metrics))


if __name__ == "__main__":
    sys.exit(main())
