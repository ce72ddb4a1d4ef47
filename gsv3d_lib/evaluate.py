"""Measure a checkpoint on a dataset folder and write the numbers as JSON.

    python -m gsv3d_lib.evaluate --weights data/checkpoints/tiny --objects ../shared/objects/gso \
        --train ../shared/objects/train --out data/results/tiny-gso.json

Protocol. Input: view 12 (the front). Targets: all other views, at the preset's resolution, on white, no alignment. PSNR is
the mean over views of -10 log10 MSE over the whole frame. The decoder alone gets the 16 true ring views, encoded by the
VAE, and is scored on the 8 free views that it never saw. Chamfer distance: see `metrics.chamfer_distance`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .baselines import AverageObject, flat_card
from .cameras import orbit_cameras
from .dataset import RING, Scene, ViewTensors, load_views
from .gaussians import Gaussians
from .mesh import fuse_mesh
from .metrics import chamfer_distance, depth_l1, psnr, ssim, surface_points
from .orbits import ring_frames
from .paths import atomic_path
from .pipeline import GSV3DPipeline
from .rendering import render
from .vae import encode_scaled

FRONT = 12  # the input view


def relative_cameras(scene: Scene, start: int, chosen: Tensor):
    """Cameras of views `chosen` in the world of the result, where view `start` stands at azimuth 0."""
    azimuths = (scene.azimuths[chosen] - scene.azimuths[start]) % 360
    return orbit_cameras(azimuths, scene.elevations[chosen], scene.rgb.shape[1])


def other_views(scene: Scene) -> Tensor:
    """Indices of all views but the input."""
    return torch.tensor([k for k in range(len(scene.rgb)) if k != FRONT])


def image_scores(gaussians: Gaussians, scene: Scene, start: int, chosen: Tensor) -> dict[str, float]:
    """PSNR, SSIM and depth L1 of renderings against the true views `chosen`."""
    with torch.no_grad():
        rgb, depth, alpha = render(gaussians, relative_cameras(scene, start, chosen))
    depth = torch.where(alpha > 0.5, depth, 0)
    return {
        "psnr": psnr(rgb, scene.rgb[chosen]),
        "ssim": ssim(rgb, scene.rgb[chosen]),
        "depth_l1": depth_l1(depth, scene.depth[chosen]),
    }


def true_points(folder: Path, id: str, azimuth: float) -> np.ndarray | None:
    """4,096 points of the true surface, turned so that the view at `azimuth` degrees stands at azimuth 0."""
    path = Path(folder) / f"{id}.geometry.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        points = arrays["points"].astype("f4")
    chosen = np.random.default_rng(0).choice(len(points), 4096, replace=False)
    return points[chosen] @ _turn(-azimuth).T


def mesh_chamfer(gaussians: Gaussians, truth: np.ndarray | None) -> dict[str, float]:
    """Chamfer distance of the fused mesh; NaN where the Gaussians have no surface."""
    if truth is None:
        return {}
    try:
        points = surface_points(fuse_mesh(gaussians, resolution=64, num_views=24, size=64))
    except ValueError:
        return {"chamfer": float("nan")}
    return {"chamfer": chamfer_distance(points, truth)}


@torch.no_grad()
def evaluate_decoder(pipe: GSV3DPipeline, scene: Scene) -> dict[str, float]:
    """The decoder on 16 true views, scored on the views that are not on the ring; and the VAE that it sees through."""
    frames = ring_frames(FRONT, RING)
    latents = encode_scaled(pipe.vae, scene.rgb[frames])
    gaussians = pipe.gaussians_from(latents, relative_cameras(scene, FRONT, frames), scene.rgb[FRONT])
    scores = image_scores(gaussians, scene, FRONT, torch.arange(RING, len(scene.rgb)))
    return scores | {"vae_psnr": psnr(pipe.views_from(latents), scene.rgb[frames])}


def evaluate_generation(pipe: GSV3DPipeline, scene: Scene, truth, seed: int, **options) -> dict[str, float]:
    """One image -> 3D from the front, scored on all other views."""
    elevation = float(scene.elevations[FRONT])
    gaussians = pipe.generate(scene.rgb[FRONT], elevation=elevation, seed=seed, progress=False, **options).gaussians
    scores = image_scores(gaussians, scene, FRONT, other_views(scene)) | mesh_chamfer(gaussians, truth)
    front = image_scores(gaussians, scene, FRONT, torch.tensor([FRONT]))
    return scores | {"front_psnr": front["psnr"]}


def evaluate_baselines(scene: Scene, truth, average: AverageObject | None) -> dict[str, dict[str, float]]:
    """The flat card and the average training object, on the views that `evaluate_generation` uses."""
    others = other_views(scene)
    camera = relative_cameras(scene, FRONT, torch.tensor([FRONT]))
    card = flat_card(scene.rgb[FRONT], scene.alpha[FRONT], camera)
    results = {"card": image_scores(card, scene, FRONT, others)}
    if truth is not None:
        results["card"]["chamfer"] = chamfer_distance(card.means.numpy()[:: max(1, len(card) // 4096)], truth)
    if average is not None:
        pictures = average.nearest_views(scene.azimuths[others])
        results["average"] = {"psnr": psnr(pictures, scene.rgb[others]), "ssim": ssim(pictures, scene.rgb[others])}
        if truth is not None:
            turned = average.points @ _turn(-float(scene.azimuths[FRONT])).T
            results["average"]["chamfer"] = chamfer_distance(turned, truth)
    return results


def _turn(degrees: float) -> np.ndarray:
    """Rotation about z [3, 3]."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], "f4")


def evaluate(
    pipe: GSV3DPipeline,
    views: ViewTensors,
    folder: Path,
    training_views: ViewTensors | None,
    seed: int = 0,
    lora: bool = True,
    **options,
) -> list[dict]:
    """All measurements, one row per object: {"id", "decoder", "generated", "generated_without_lora", "card", "average"}."""
    average = None if training_views is None else AverageObject.of(training_views)
    rows = []
    for index, id in enumerate(tqdm(views.ids, desc="evaluating", mininterval=5)):
        scene = views.scene(index)
        truth = true_points(folder, id, float(scene.azimuths[FRONT]))
        row = {"id": id, "decoder": evaluate_decoder(pipe, scene)}
        for name, scale in (("generated", 1.0), ("generated_without_lora", 0.0))[: 2 if lora else 1]:
            row[name] = evaluate_generation(pipe, scene, truth, seed, lora_scale=scale, **options)
        rows.append(row | evaluate_baselines(scene, truth, average))
    return rows


def averages(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Mean over the objects that have a number, for every number of every method; NaN where none has."""
    columns: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for method, scores in row.items():
            if method != "id":
                for name, value in scores.items():
                    columns.setdefault(method, {}).setdefault(name, []).append(value)
    return {m: {name: round(_mean(values), 4) for name, values in table.items()} for m, table in columns.items()}


def _mean(values: list[float]) -> float:
    there = [value for value in values if np.isfinite(value)]
    return float(np.mean(there)) if there else float("nan")


def without_nan(value):
    """The same nested lists and dicts with null for what is not a number, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def hardware() -> str:
    """What ran this, without names of machines."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__.split('+')[0]}"


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except OSError:
        return "unknown"


def table(means: dict[str, dict[str, float]]) -> str:
    """The averages as a Markdown table."""
    columns = ["psnr", "ssim", "depth_l1", "chamfer"]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, scores in means.items():
        cells = [f"{scores[c]:.3f}" if scores.get(c) is not None and np.isfinite(scores[c]) else "-" for c in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("data/checkpoints/tiny"))
    parser.add_argument("--objects", type=Path, required=True, help="dataset folder to measure on")
    parser.add_argument("--train", type=Path, help="training folder, for the average-object baseline")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-lora", action="store_true")
    args = parser.parse_args(arguments)
    pipe = GSV3DPipeline.from_pretrained(args.weights, lora=not args.no_lora)
    views = load_views([args.objects], pipe.config.image_size, limit=args.limit)
    training = None if args.train is None else load_views([args.train], pipe.config.image_size)
    started = time.time()
    rows = evaluate(
        pipe, views, args.objects, training, args.seed, not args.no_lora, steps=args.steps, guidance=args.guidance
    )
    means = averages(rows)
    record = {
        "command": "python -m gsv3d_lib.evaluate " + " ".join(arguments or sys.argv[1:]),
        "commit": commit(),
        "hardware": hardware(),
        "seconds": round(time.time() - started),
        "seed": args.seed,
        "objects": len(rows),
        "mean": means,
        "rows": rows,
    }
    with atomic_path(args.out) as path:
        path.write_text(json.dumps(without_nan(record), indent=1, allow_nan=False))
    print(table(means))


if __name__ == "__main__":
    main()
