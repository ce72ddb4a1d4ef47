"""What an evaluation says: averages, tables, and a contact sheet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import FRONT, RING, Scene
from ..data.examples import relative_cameras
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
    """One row of the contact sheet [S, 10 S, 3]: the input, then truth, result and
    error at three ring views.
    """
    chosen = torch.tensor([(FRONT + angle * RING // 360) % RING for angle in SHEET_ANGLES])
    truth, result = (
        scene.rgb[chosen],
        render(gaussians, relative_cameras(scene, FRONT, chosen)).rgb.clamp(0, 1),
    )
    error = 1 - (result - truth).abs()
    return torch.cat([scene.rgb[FRONT], *truth, *result, *error], dim=1)


def save_sheet(strips: list[Tensor], path: Path) -> None:
    """The contact sheet as a PNG, at most 14 objects spread evenly over the list."""
    chosen = np.unique(np.linspace(0, len(strips) - 1, 14).round().astype(int))
    pixels = (torch.cat([strips[k] for k in chosen]) * 255).round().to(torch.uint8).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def averages(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Mean over the objects that have a number, for every number of every method; NaN
    where none has.
    """
    columns: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for method, scores in row.items():
            if method != "id":
                for name, value in scores.items():
                    columns.setdefault(method, {}).setdefault(name, []).append(value)
    return {
        m: {name: round(finite_mean(values), 4) for name, values in table.items()}
        for m, table in columns.items()
    }


def finite_mean(values) -> float:
    """Mean of the numbers that are finite; NaN where none is."""
    there = np.asarray(values, dtype=float)
    there = there[np.isfinite(there)]
    return float(there.mean()) if there.size else float("nan")


def without_nan(value):
    """The same nested lists and dicts with null for what is not a number, which JSON
    has no word for.
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(means: dict[str, dict[str, float]]) -> str:
    """The averages as a Markdown table."""
    perceptual = {name for scores in means.values() for name in scores if name.startswith("lpips")}
    columns = ["psnr", "ssim", *sorted(perceptual), "depth_l1", "chamfer", "f_score", "iou"]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, scores in means.items():
        cells = [
            f"{scores[c]:.3f}" if scores.get(c) is not None and np.isfinite(scores[c]) else "-"
            for c in columns
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(*records: Path) -> str:
    """Markdown: the means of results files, best first as given, and what the paper
    reports in a row of its own.
    """
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
