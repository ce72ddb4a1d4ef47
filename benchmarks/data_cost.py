"""What training data costs: CPU seconds and bytes per view and object, measured.

    python benchmarks/data_cost.py --meshes ../shared/objects/meshes \\
        --json data/results/data-cost.json

Per scale, some meshes and as many procedural objects are rendered and packed as
`make_dataset` and `shards` do it; the table adds what that makes of 100,000 objects.
Time is CPU time of this process and its children, so other load on the machine hardly
counts, on one thread, so seconds are core seconds. The VAE has random weights of the
preset's sizes: its speed does not depend on them. Where 16 views at once would need too
much memory (`paper`), one is encoded and counted 16 times.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from gsv3d_lib.cluster.shards import pack_depth, pack_picture
from gsv3d_lib.config import preset
from gsv3d_lib.data.dataset import RING, object_files, read_object, resize_views
from gsv3d_lib.data.make_dataset import make_dataset
from gsv3d_lib.data.sources import Job, mesh_jobs, procedural_jobs
from gsv3d_lib.system.paths import atomic_path
from gsv3d_lib.system.provenance import commit, hardware
from gsv3d_lib.vae import build_vae, encode

# Pixels of the dataset; a multiple of the preset's.
RENDERED = {"tiny": 128, "small": 128, "paper": 576}
TARGET = 100_000  # objects [paper: 1e5, with 84 views each]


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    return sum(os.times()[:4])


def measure(scale: str, jobs: list[Job], views: int, encoded: int) -> dict:
    """Render, pack and encode `jobs` -> CPU seconds and bytes, per view and object.

    encoded: views given to the VAE.
    """
    config, size = preset(scale), RENDERED[scale]
    with tempfile.TemporaryDirectory() as folder:
        start = cpu_seconds()
        rows = make_dataset(jobs, folder, size=size, views=views, progress=False)
        rendering = cpu_seconds() - start
        stored = sum(p.stat().st_size for row in rows for p in object_files(folder, row["id"]))
        start, packed = cpu_seconds(), 0
        for row in rows:
            seen = read_object(folder, row["id"])
            rgb, alpha, depth, _, _ = resize_views(seen, config.image_size)
            packed += sum(len(pack_picture(*pair)) for pair in zip(rgb, alpha))
            packed += sum(len(pack_depth(image[..., 0])) for image in depth)
        packing = cpu_seconds() - start
    vae = build_vae(config).eval()
    start = cpu_seconds()
    with torch.no_grad():
        encode(vae, rgb[:encoded].float() / 255)
    encoding = (cpu_seconds() - start) * RING / encoded
    tokens = (config.dino_size // config.dino_patch) ** 2 + 1
    return {
        "objects": len(rows),
        "views_per_object": views,
        "rendered_px": size,
        "trained_px": config.image_size,
        "render_cpu_s_per_view": rendering / len(rows) / views,
        "views_per_second_and_core": len(rows) * views / rendering,
        "pack_cpu_s_per_object": packing / len(rows),
        "latents_cpu_s_per_object": encoding,
        "latents_views_encoded": encoded,
        "dataset_bytes_per_object": stored / len(rows),
        "shard_bytes_per_object": packed / len(rows) + RING * 4 * config.latent_size**2 * 4,
        "latent_bytes_per_object": RING * 4 * config.latent_size**2 * 4,
        "feature_bytes_per_object": RING * tokens * config.dino_width * 4,
    }


def extrapolated(one: dict, objects: int = TARGET) -> dict:
    """Core-hours and terabytes of `objects` such objects."""
    hours, terabytes = objects / 3600, objects / 1e12
    return {
        "objects": objects,
        "views": objects * one["views_per_object"],
        "render_core_hours": hours * one["render_cpu_s_per_view"] * one["views_per_object"],
        "pack_core_hours": hours * one["pack_cpu_s_per_object"],
        "latents_core_hours": hours * one["latents_cpu_s_per_object"],
        "dataset_tb": terabytes * one["dataset_bytes_per_object"],
        "shards_tb": terabytes * one["shard_bytes_per_object"],
        "features_tb": terabytes * one["feature_bytes_per_object"],
    }


ROWS = {  # of the table: a number's name in the measurements, and how it is written
    "rendering, views per second and core": ("views_per_second_and_core", "{:.1f}"),
    "packing, core-seconds per object": ("pack_cpu_s_per_object", "{:.2f}"),
    "latents of one ring, core-seconds per object": ("latents_cpu_s_per_object", "{:.2f}"),
    "dataset folder, MB per object": ("dataset_bytes_per_object", "{:.2f}"),
    "shards, MB per object": ("shard_bytes_per_object", "{:.2f}"),
    "DINO features if stored, MB per object": ("feature_bytes_per_object", "{:.2f}"),
}
TARGET_ROWS = {
    f"**{TARGET:,} objects**: rendering, core-hours": ("render_core_hours", "{:,.0f}"),
    "packing, core-hours": ("pack_core_hours", "{:,.0f}"),
    "latents, core-hours": ("latents_core_hours", "{:,.0f}"),
    "dataset folder, TB": ("dataset_tb", "{:.2f}"),
    "shards, TB": ("shards_tb", "{:.2f}"),
    "DINO features if stored, TB": ("features_tb", "{:.2f}"),
}


def report(scales: dict[str, dict]) -> str:
    """The measurements as a Markdown table."""
    found = list(scales.values())
    lines = [
        [f"{found[0]['views_per_object']} views per object", *(f"`{name}`" for name in scales)],
        ["pixels rendered, trained", *(f"{m['rendered_px']}, {m['trained_px']}" for m in found)],
    ]
    for title, (name, form) in ROWS.items():
        unit = 1e6 if "bytes" in name else 1
        lines.append([title, *(form.format(m[name] / unit) for m in found)])
    for title, (name, form) in TARGET_ROWS.items():
        lines.append([title, *(form.format(m["target"][name]) for m in found)])
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--meshes", metavar="FOLDER", help="render meshes of this folder too")
    parser.add_argument("--up", choices=["y", "z"], help="as for make_dataset")
    parser.add_argument("--objects", type=int, default=4, help="of each kind and scale (default 4)")
    views = "per object (default 84, the paper's)"
    parser.add_argument("--views", type=int, default=84, help=views)
    parser.add_argument("--presets", nargs="+", default=["tiny", "paper"], choices=list(RENDERED))
    parser.add_argument("--json", type=Path, help="write the measurements here")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    jobs = procedural_jobs(args.objects, 40_000)
    if args.meshes:
        jobs += mesh_jobs(args.meshes, args.up)[: args.objects]
    scales = {
        name: measure(name, jobs, args.views, 1 if name == "paper" else RING)
        for name in args.presets
    }
    scales = {name: one | {"target": extrapolated(one)} for name, one in scales.items()}
    given = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": shlex.join(["python", "benchmarks/data_cost.py", *given]),
        "commit": commit(),
        "hardware": hardware(),
        "ids": [job.id for job in jobs],
    }
    print(report(scales))
    if args.json:
        with atomic_path(args.json) as path:
            path.write_text(json.dumps(record | {"scales": scales}, indent=1) + "\n")


if __name__ == "__main__":
    main()
