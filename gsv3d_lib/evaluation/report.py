"""What an evaluation says: averages, tables, and a contact sheet."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import FRONT, Scene
from ..data.examples import relative_cameras, views_from_front
from ..gaussians import Gaussians
from ..rendering import render
from ..system.paths import atomic_path

SHEET_ANGLES = (45, 90, 180)  # degrees from the input view
# by the authors, table 1
REPORTED = {"psnr": "20.390", "ssim": "0.884", "chamfer": "0.100", "iou": "0.721"}
METHODS = {
    "generated": "ours",
    "generated_without_lora": "ours without LoRA",
    "generated_without_projection": "ours without back-projection",
    "card": "the input as a flat card",
    "average": "the average training object",
    "decoder": "*the decoder alone, on 16 true views; 8 unseen ones*",
}


def strip(gaussians: Gaussians, scene: Scene) -> Tensor:
    """One row of the contact sheet [S, 10 S, 3].

    The input; then truth, result and error at three ring views.
    """
    chosen = views_from_front(*SHEET_ANGLES)
    truth = scene.rgb[chosen]
    result = render(gaussians, relative_cameras(scene, FRONT, chosen)).rgb.clamp(0, 1)
    error = 1 - (result - truth).abs()
    return torch.cat([scene.rgb[FRONT], *truth, *result, *error], dim=1)


def save_sheet(strips: list[Tensor], path: Path) -> None:
    """The contact sheet as a PNG, at most 14 objects spread evenly over the list."""
    chosen = np.unique(np.linspace(0, len(strips) - 1, 14).round().astype(int))
    pixels = (torch.cat([strips[k] for k in chosen]) * 255).round().to(torch.uint8).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def averages(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Means over the objects that have a number, per method; NaN where none has."""
    columns: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for method, scores in row.items():
            if method != "id":
                for name, value in scores.items():
                    columns.setdefault(method, {}).setdefault(name, []).append(value)
    return {
        method: {name: round(finite_mean(values), 4) for name, values in scores.items()}
        for method, scores in columns.items()
    }


def finite_mean(values) -> float:
    """Mean of the numbers that are finite; NaN where none is."""
    values = np.asarray(values, dtype=float)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def save_json(path: Path, value, **layout) -> None:
    """Write JSON, with null for what is not a number: JSON has no word for NaN."""
    text = json.dumps(without_nan(value), allow_nan=False, **layout)
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def without_nan(value):
    """The same nested lists and dicts with None for what is not a number."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(means: dict[str, dict[str, float]]) -> str:
    """The averages as a Markdown table."""
    nets = {name for scores in means.values() for name in scores if name.startswith("lpips")}
    columns = ["psnr", "ssim", *sorted(nets), "depth_l1", "chamfer", "f_score", "iou"]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {method} | {cells(scores, columns)} |" for method, scores in means.items()]
    return "\n".join(lines)


def cells(scores: dict[str, float | None], columns) -> str:
    """One row of a Markdown table; a dash where there is no number."""
    there = {name: value for name, value in scores.items() if value is not None}
    finite = {name: f"{value:.3f}" for name, value in there.items() if np.isfinite(value)}
    return " | ".join(finite.get(name, "-") for name in columns)


def comparison(*records: Path) -> str:
    """Markdown: the means of results files, and a row of the paper's numbers."""
    names = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "lpips_vgg": "LPIPS (VGG16)"}
    names |= {"depth_l1": "depth L1", "chamfer": "CD", "f_score": "F-score", "iou": "volume IoU"}
    names["recognised"] = "recognised"
    lines = [f"| | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for path in records:
        record = json.loads(Path(path).read_text())
        for method, label in METHODS.items():
            if scores := record["mean"].get(method):
                lines.append(f"| {label}, {record['pixels']} px | {cells(scores, names)} |")
    lines.append(f"| reported by the authors | {' | '.join(REPORTED.get(k, '-') for k in names)} |")
    return "\n".join(lines)
