"""Measure a checkpoint on a dataset folder: the numbers as JSON, a table, and a contact sheet beside it.

    python -m gsv3d_lib evaluate --weights data/checkpoints/tiny --objects ../shared/objects/gso \
        --train ../shared/objects/train --out data/results/tiny-gso.json

Protocol. Input: view 12 (the front). Targets: all other views, at the preset's resolution, on white, no alignment. PSNR is
the mean over views of -10 log10 MSE over the whole frame. The decoder alone gets the 16 true ring views, encoded by the
VAE, and is scored on the 8 free views that it never saw. Chamfer distance: see `metrics.chamfer_distance`. LPIPS is measured
where --lpips gives its weights (`evaluation/lpips.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..cameras import orbit_cameras
from ..data.dataset import FRONT, RING, Scene, ViewTensors, load_views
from ..data.examples import relative_azimuths, ring_frames
from ..export.mesh import NoSurface, fuse_mesh
from ..gaussians import Gaussians
from ..pipeline import Generation, GSV3DPipeline
from ..rendering import Rendering, render
from ..system.command import (
    check_writable,
    exit_code,
    guidance,
    input_path,
    output_path,
    positive,
    sampler_steps,
    seed,
)
from ..system.errors import UserError
from ..system.files import UNREADABLE, Field, Table, read_npz
from ..system.paths import ROOT, atomic_path, check_readable, has_repository, reason
from ..vae import encode_scaled
from .baselines import AverageObject, flat_card
from .consistency import detail, ghosting, reprojection_error, split_agreement, view_depths
from .lpips import LPIPS, load_lpips
from .metrics import (
    GRID_RESOLUTION,
    NUM_POINTS,
    chamfer_distance,
    depth_l1,
    f_score,
    occupancy_grid,
    psnr,
    ssim,
    surface_points,
    volume_iou,
)

if TYPE_CHECKING:
    import trimesh


def relative_cameras(scene: Scene, start: int, chosen: Tensor):
    """Cameras of views `chosen` in the world of the result, where view `start` stands at azimuth 0."""
    return orbit_cameras(relative_azimuths(scene, start, chosen), scene.elevations[chosen], scene.rgb.shape[1])


def other_views(scene: Scene) -> Tensor:
    """Indices of all views but the input."""
    return torch.tensor([k for k in range(len(scene.rgb)) if k != FRONT])


def free_views(scene: Scene) -> Tensor:
    """Indices of the views that are not on the ring."""
    return torch.arange(RING, len(scene.rgb))


def image_scores(
    gaussians: Gaussians, scene: Scene, start: int, chosen: Tensor, lpips: LPIPS | None = None
) -> dict[str, float]:
    """PSNR, SSIM, LPIPS if given, and depth L1 of renderings against the true views `chosen`."""
    with torch.no_grad():
        return picture_scores(render(gaussians, relative_cameras(scene, start, chosen)), scene, chosen, lpips)


def picture_scores(seen: Rendering, scene: Scene, chosen: Tensor, lpips: LPIPS | None = None) -> dict[str, float]:
    """`image_scores` of what is rendered already."""
    rgb, depth, alpha = seen
    depth = torch.where(alpha > 0.5, depth, 0)
    return color_scores(rgb, scene.rgb[chosen], lpips) | {"depth_l1": depth_l1(depth, scene.depth[chosen])}


def color_scores(pictures: Tensor, truth: Tensor, lpips: LPIPS | None) -> dict[str, float]:
    """Means over the views [V, S, S, 3]."""
    scores = {"psnr": psnr(pictures, truth), "ssim": ssim(pictures, truth)}
    return scores if lpips is None else scores | {"lpips": float(lpips(pictures, truth).mean())}


# What <id>.geometry.npz must hold. Objects fit the unit ball; float16 rounds a little beyond.
GEOMETRY: Table = {
    "points": Field(("P", 3), "f", -1.01, 1.01),
    "occupancy": Field((GRID_RESOLUTION**3 // 8,), "u1", needed=False),
    "occupancy_resolution": Field((), "i u", GRID_RESOLUTION, GRID_RESOLUTION, needed=False),
}


@dataclass(frozen=True)
class Truth:
    """The true shape of an object, in the world of the dataset: points [4096, 3] and occupancy bool [64, 64, 64] or None."""

    points: np.ndarray
    occupancy: np.ndarray | None


def load_truth(folder: Path, id: str) -> Truth | None:
    """`<id>.geometry.npz` of a dataset folder; None where there is none. Raises UserError where it is damaged, or holds
    points that are not finite or not in the unit ball, too few of them, or another grid."""
    path = Path(folder) / f"{id}.geometry.npz"
    if not os.path.lexists(path):
        return None
    check_readable(path)
    try:
        arrays = read_npz(path, GEOMETRY)
        points = arrays["points"].astype("f4")
        if len(points) < NUM_POINTS:
            raise UserError(f"it holds {len(points)} points, fewer than {NUM_POINTS}")
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}); without the file its object gets no mesh scores."
        ) from error
    chosen = np.random.default_rng(0).choice(len(points), NUM_POINTS, replace=False)
    bits = arrays.get("occupancy")
    grid = None if bits is None else np.unpackbits(bits).reshape((GRID_RESOLUTION,) * 3).astype(bool)
    return Truth(points[chosen], grid)


def mesh_scores(gaussians: Gaussians, truth: Truth | None, azimuth: float = 0.0) -> dict[str, float]:
    """Chamfer distance, F-score and volume IoU of the fused mesh; NaN, 0 and 0 where the Gaussians have no surface.

    azimuth: degrees by which the result is turned to stand in the world of the truth: that of its input view.
    """
    if truth is None:
        return {}
    try:
        mesh = fuse_mesh(gaussians, resolution=64, num_views=24, size=64, colors=False)
    except NoSurface:
        return {"chamfer": float("nan"), "f_score": 0.0} | ({} if truth.occupancy is None else {"iou": 0.0})
    mesh.vertices = mesh.vertices @ _turn(azimuth).T
    return shape_scores(surface_points(mesh), mesh, truth)


def shape_scores(points: np.ndarray, mesh: trimesh.Trimesh | None, truth: Truth) -> dict[str, float]:
    """Points [N, 3], and the closed mesh they lie on if there is one, against the truth, both in its world."""
    scores = {"chamfer": chamfer_distance(points, truth.points), "f_score": f_score(points, truth.points)}
    if mesh is not None and truth.occupancy is not None:
        scores["iou"] = volume_iou(occupancy_grid(mesh), truth.occupancy)
    return scores


@torch.no_grad()
def evaluate_decoder(
    pipe: GSV3DPipeline, scene: Scene, num_frames: int = RING, lpips: LPIPS | None = None
) -> dict[str, float]:
    """The decoder on N true views, scored on the views that are not on the ring."""
    frames, free = ring_frames(FRONT, num_frames), free_views(scene)
    latents = encode_scaled(pipe.vae, scene.rgb[frames])
    gaussians = pipe.gaussians_from(latents, relative_cameras(scene, FRONT, frames), scene.rgb[FRONT]).to("cpu")
    seen = render(gaussians, relative_cameras(scene, FRONT, free))
    return picture_scores(seen, scene, free, lpips) | failure_scores(gaussians, seen, scene)


@torch.no_grad()
def evaluate_vae(pipe: GSV3DPipeline, scene: Scene) -> dict[str, float]:
    """The VAE that everything is seen through, on the true ring views."""
    ring = scene.rgb[ring_frames(FRONT, RING)]
    return {"vae_psnr": psnr(pipe.views_from(encode_scaled(pipe.vae, ring)).cpu(), ring)}


def generate(pipe: GSV3DPipeline, scene: Scene, seed: int, **options) -> Generation:
    """One image -> 3D from the front view, its elevation and mask given; the Gaussians on the CPU, where all is measured."""
    given = {"elevation": float(scene.elevations[FRONT]), "mask": scene.alpha[FRONT]}
    made = pipe.generate(scene.rgb[FRONT], seed=seed, progress=False, **given, **options)
    return replace(made, gaussians=made.gaussians.to("cpu"))


@torch.no_grad()
def evaluate_generation(
    pipe: GSV3DPipeline, scene: Scene, truth: Truth | None, made: Generation, lpips: LPIPS | None = None
) -> dict[str, float]:
    """A generated object on all other views; by its mesh; whether its own views agree; ghosting and lost texture."""
    others, free = other_views(scene), free_views(scene)
    seen = render(made.gaussians, relative_cameras(scene, FRONT, torch.arange(len(scene.rgb))))
    scores = picture_scores(_chosen(seen, others), scene, others, lpips)
    scores |= mesh_scores(made.gaussians, truth, float(scene.azimuths[FRONT]))
    scores |= view_scores(pipe, made) | failure_scores(made.gaussians, _chosen(seen, free), scene)
    return scores | {"front_psnr": psnr(seen.rgb[FRONT], scene.rgb[FRONT])}


def _chosen(seen: Rendering, views: Tensor) -> Rendering:
    return Rendering(*(image[views] for image in seen))


def view_scores(pipe: GSV3DPipeline, made: Generation) -> dict[str, float]:
    """What needs no truth: reprojection error between neighbouring views, and odd against even views."""

    def decode(latents, cameras):
        return pipe.gaussians_from(latents, cameras, made.image).to("cpu")

    depth, alpha = view_depths(made.gaussians, made.cameras)
    scores = {"reprojection": reprojection_error(depth, alpha, made.cameras)}
    return scores | split_agreement(decode, made.latents, made.cameras)


def failure_scores(gaussians: Gaussians, seen: Rendering, scene: Scene) -> dict[str, float]:
    """Ghosting and lost texture, on the free views, which `seen` shows."""
    free = free_views(scene)
    return {
        "ghosting": ghosting(gaussians, relative_cameras(scene, FRONT, free), scene.alpha[free]),
        "detail": detail(seen.rgb.clamp(0, 1), scene.rgb[free], scene.alpha[free]),
    }


def evaluate_baselines(
    scene: Scene, truth: Truth | None, average: AverageObject | None, lpips: LPIPS | None = None
) -> dict[str, dict[str, float]]:
    """The flat card and the average training object, on the views that `evaluate_generation` uses."""
    others, azimuth = other_views(scene), float(scene.azimuths[FRONT])
    card = flat_card(scene.rgb[FRONT], scene.alpha[FRONT], relative_cameras(scene, FRONT, torch.tensor([FRONT])))
    results = {"card": image_scores(card, scene, FRONT, others, lpips)}
    if truth is not None:  # a card has no volume, so it has no IoU
        points = card.means.numpy()[:: math.ceil(len(card) / NUM_POINTS) or 1] @ _turn(azimuth).T
        results["card"] |= shape_scores(points, None, truth)
    if average is not None:
        pictures = average.nearest_views(scene.azimuths[others])
        results["average"] = color_scores(pictures, scene.rgb[others], lpips)
        if truth is not None:
            results["average"] |= shape_scores(average.points, average.mesh, truth)
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
    lpips: LPIPS | None = None,
    **options,
) -> tuple[list[dict], list[Tensor]]:
    """All measurements, one row per object: {"id", "decoder", "card", "average"} and "generated", "generated_without_lora",
    "generated_without_projection"; and one strip of pictures per object (`strip`)."""
    if views.rgb.shape[1] == RING:
        raise UserError(f"{folder} cannot be measured on: its objects have no views beside the {RING} of the ring.")
    for id in views.ids:  # a damaged truth is said now, not minutes later
        load_truth(folder, id)
    average = None if training_views is None else AverageObject.of(training_views)
    rows, strips = [], []
    for index, id in enumerate(tqdm(views.ids, desc="evaluating", mininterval=5)):
        scene, truth = views.scene(index), load_truth(folder, id)
        row = {"id": id, "decoder": evaluate_decoder(pipe, scene, lpips=lpips) | evaluate_vae(pipe, scene)}
        made = generate(pipe, scene, seed, **options)
        strips.append(strip(made.gaussians, scene))
        versions = {"generated": made}
        if lora:
            versions["generated_without_lora"] = generate(pipe, scene, seed, lora_scale=0.0, **options)
        decoded = pipe.gaussians_from(made.latents, made.cameras, made.image).to("cpu")
        versions["generated_without_projection"] = replace(made, gaussians=decoded)
        row |= {name: evaluate_generation(pipe, scene, truth, made, lpips) for name, made in versions.items()}
        rows.append(row | evaluate_baselines(scene, truth, average, lpips))
    return rows, strips


SHEET_ANGLES = (45, 90, 180)  # degrees from the input view


def strip(gaussians: Gaussians, scene: Scene) -> Tensor:
    """One row of the contact sheet [S, 10 S, 3]: the input, then truth, result and error at three ring views."""
    chosen = torch.tensor([(FRONT + angle * RING // 360) % RING for angle in SHEET_ANGLES])
    truth, result = scene.rgb[chosen], render(gaussians, relative_cameras(scene, FRONT, chosen)).rgb.clamp(0, 1)
    error = 1 - (result - truth).abs()
    return torch.cat([scene.rgb[FRONT], *truth, *result, *error], dim=1)


def save_sheet(strips: list[Tensor], path: Path) -> None:
    """The contact sheet as a PNG, at most 14 objects spread evenly over the list."""
    chosen = np.unique(np.linspace(0, len(strips) - 1, 14).round().astype(int))
    pixels = (torch.cat([strips[k] for k in chosen]) * 255).round().to(torch.uint8).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def averages(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Mean over the objects that have a number, for every number of every method; NaN where none has."""
    columns: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for method, scores in row.items():
            if method != "id":
                for name, value in scores.items():
                    columns.setdefault(method, {}).setdefault(name, []).append(value)
    return {m: {name: round(finite_mean(values), 4) for name, values in table.items()} for m, table in columns.items()}


def finite_mean(values) -> float:
    """Mean of the numbers that are finite; NaN where none is."""
    there = np.asarray(values, dtype=float)
    there = there[np.isfinite(there)]
    return float(there.mean()) if there.size else float("nan")


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
    """Of the checkout that runs; "unknown" in an installed package, or without git."""
    if not has_repository():
        return "unknown"
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def table(means: dict[str, dict[str, float]]) -> str:
    """The averages as a Markdown table."""
    columns = ["psnr", "ssim", "lpips", "depth_l1", "chamfer", "f_score", "iou"]
    if not any("lpips" in scores for scores in means.values()):
        columns.remove("lpips")
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, scores in means.items():
        cells = [f"{scores[c]:.3f}" if scores.get(c) is not None and np.isfinite(scores[c]) else "-" for c in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


REPORTED = {"psnr": "20.390", "ssim": "0.884", "chamfer": "0.100", "iou": "0.721"}  # by the authors, table 1
METHODS = {
    "generated": "ours",
    "generated_without_lora": "ours without LoRA",
    "generated_without_projection": "ours without back-projection",
    "card": "the input as a flat card",
    "average": "the average training object",
    "decoder": "*the decoder alone, on 16 true views; 8 unseen ones*",
}


def comparison(*records: Path) -> str:
    """Markdown: the means of results files, best first as given, and what the paper reports in a row of its own."""
    names = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "depth_l1": "depth L1"}
    names |= {"chamfer": "CD", "f_score": "F-score", "iou": "volume IoU"}
    lines = [f"| | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for path in records:
        record = json.loads(Path(path).read_text())
        for method, label in METHODS.items():
            if scores := record["mean"].get(method):
                cells = [f"{scores[k]:.3f}" if scores.get(k) is not None else "-" for k in names]
                lines.append(f"| {label}, {record['pixels']} px | {' | '.join(cells)} |")
    lines.append(f"| reported by the authors | {' | '.join(REPORTED.get(k, '-') for k in names)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=input_path, default="data/checkpoints/tiny")
    parser.add_argument("--objects", type=input_path, required=True, help="dataset folder to measure on")
    parser.add_argument("--train", type=input_path, help="training folder, for the average-object baseline")
    parser.add_argument("--out", type=output_path, required=True, help="JSON file to write; .md and .png beside it")
    parser.add_argument("--limit", type=positive, help="only the first objects")
    parser.add_argument("--steps", type=sampler_steps, help="of the sampler")
    parser.add_argument("--guidance", type=guidance)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--no-lora", action="store_true")
    parser.add_argument(
        "--lpips", type=input_path, help="file of `python -m gsv3d_lib lpips`: measure LPIPS with it too"
    )
    parser.set_defaults(command="python -m gsv3d_lib evaluate " + " ".join(arguments or sys.argv[1:]))
    return exit_code(run, parser, arguments)


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)  # first: a folder has no suffix to change
    beside = args.out.with_suffix(".md"), args.out.with_suffix(".png")
    if args.out in beside:
        raise UserError(f"--out names the JSON file; the table and the pictures go beside it, so {args.out} is taken.")
    for path in beside:
        check_writable(path)
        if path.exists() and not args.out.exists():  # no earlier run's: that would have written its JSON first
            raise UserError(
                f"{path} is there already and goes beside --out {args.out}: choose another --out, or move it."
            )
    lpips = None if args.lpips is None else load_lpips(args.lpips)
    pipe = GSV3DPipeline.from_pretrained(args.weights, lora=not args.no_lora)
    views = load_views([args.objects], pipe.config.image_size, limit=args.limit)
    training = None if args.train is None else load_views([args.train], pipe.config.image_size)
    started = time.time()
    options = {"steps": args.steps, "guidance": args.guidance}
    rows, strips = evaluate(pipe, views, args.objects, training, args.seed, not args.no_lora, lpips, **options)
    means = averages(rows)
    record = {
        "command": args.command,
        "commit": commit(),
        "hardware": hardware(),
        "seconds": round(time.time() - started),
        "seed": args.seed,
        "objects": len(rows),
        "pixels": pipe.config.image_size,
        "lpips": None if lpips is None else lpips.origin,
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
