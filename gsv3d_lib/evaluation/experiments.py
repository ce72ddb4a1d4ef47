"""What the results files of experiments say: differences, intervals, verdicts.

`tools/run_experiments.py` trains every arm of an experiment with several seeds and
writes such a file. All arms of a seed saw the same examples, the same noise and the
same sampler seed, so their differences are paired twice: by seed and by object.
"""

import json
import math
from pathlib import Path

import numpy as np

from .metrics import bootstrap_interval
from .report import finite_mean


def values(arm: dict, metric: str, seeds: list[str] | None = None) -> np.ndarray:
    """One metric of a collected arm as [S, O], NaN where there is no number."""
    rows = []
    for seed, scores in arm["scores"].items():
        if seeds is None or seed in seeds:
            objects = len(next(iter(scores.values())))
            rows.append(scores.get(metric, [None] * objects))
    return np.array(rows, dtype=float)


def compare(arm: dict, reference: dict, metric: str) -> dict:
    """Arm minus reference, over the seeds that both have.

    "mean", "low", "high": of each object's mean over seeds, the mean over objects and
    its 95 % interval (paired bootstrap over objects). "seeds": the mean difference of
    each seed, which shows how much another training moves it.
    """
    seeds = [s for s in arm["scores"] if s in reference["scores"]]
    if not seeds:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "seeds": []}
    difference = values(arm, metric, seeds) - values(reference, metric, seeds)  # [S, O]
    per_object = difference.mean(axis=0)
    low, high = bootstrap_interval(per_object)
    by_seed = [finite_mean(row) for row in difference]
    return {"mean": finite_mean(per_object), "low": low, "high": high, "seeds": by_seed}


def table(results: dict, reference: str, metrics: list[str]) -> str:
    """Markdown: the reference's means, and every other arm's differences to them.

    Differences are over common seeds; means of arms with other seeds would not compare.
    """
    lines = ["| arm | seeds | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for name, arm in results["arms"].items():
        cells = [f"{finite_mean(values(arm, metric)):.3f}" for metric in metrics]
        if name != reference and reference in results["arms"]:
            found = [compare(arm, results["arms"][reference], metric) for metric in metrics]
            cells = ["{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**one) for one in found]
        lines.append(f"| {arm['label']} | {len(arm['scores'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# what is expected; experiment, arm, number; and the sign of arm minus reference then
CLAIMS = (
    ("distillation lowers the Chamfer distance", "distillation_long", "rgbd", "chamfer", -1),
    ("its price is texture (detail, 1 = the truth's)", "distillation_long", "rgbd", "detail", -1),
    ("it makes the views agree (reprojection)", "distillation_long", "rgbd", "reprojection", -1),
    ("louder, it lowers the Chamfer distance", "distillation_heard", "lambda_10", "chamfer", -1),
    ("louder, it raises the volume IoU", "distillation_heard", "lambda_10", "iou", 1),
    ("louder, it raises the F-score", "distillation_heard", "lambda_10", "f_score", 1),
    ("few views ghost (share of pixels)", "frames", "n_4", "ghosting", 1),
    ("N = 16 is best (PSNR)", "frames", "n_8", "psnr", -1),
    ("DINO helps (PSNR, true views)", "dino", "no_dino", "true_psnr", -1),
    ("DINO helps (depth L1, true views)", "dino", "no_dino", "true_depth_l1", 1),
)


def claims(folder: str | Path) -> str:
    """Markdown: each claim beside the difference in the results files of `folder`."""
    head = "| expected | compared | difference | 95 % interval | seeds | holds here |"
    lines = [head, "|---" * 6 + "|"]
    for claim, name, arm, metric, sign in CLAIMS:
        results = json.loads((Path(folder) / f"{name}.json").read_text())
        labels = [results["arms"][k]["label"] for k in (arm, results["reference"])]
        d = results["differences"][arm][metric]
        interval = f"[{d['low']:+.4f}, {d['high']:+.4f}]"
        cells = [claim, " minus ".join(labels), f"{d['mean']:+.4f}", interval]
        lines.append("| " + " | ".join([*cells, str(len(d["seeds"])), holds(d, sign)]) + " |")
    return "\n".join(lines)


def holds(difference: dict, sign: int) -> str:
    """Whether a difference has the expected sign.

    "yes" or "no" where its interval and every seed say so, else "not shown".
    """
    numbers = (difference["low"], difference["high"], *difference["seeds"])
    if all(sign * number > 0 for number in numbers):
        return "yes"
    return "no" if all(sign * number < 0 for number in numbers) else "not shown"
