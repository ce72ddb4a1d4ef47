"""What training data costs: CPU seconds and bytes per view and object, measured, and
what that makes of 100,000 objects.

    python benchmarks/data_cost.py --meshes ../shared/objects/meshes --json data/results/data-cost.json

Per scale, some meshes and as many procedural objects are rendered and packed as
`make_dataset` and `shards` do it. Time is CPU time of this process and its children, so
other load on the machine hardly counts, on one thread, so seconds are core seconds. The
VAE has random weights of the preset's sizes: its speed does not depend on them. Where
16 views at once would need too much memory (`paper`), one is encoded and counted 16
times.
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
from gsv3d_lib.data.dataset import RING, read_object, resize_views
from gsv3d_lib.data.make_dataset import make_dataset
from gsv3d_lib.data.sources import Job, mesh_jobs, procedural_jobs
from gsv3d_lib.system.paths import atomic_path
from gsv3d_lib.system.provenance import commit, hardware
from gsv3d_lib.vae import build_vae, encode

# pixels of the dataset; a multiple of the preset's
RENDERED = {"tiny": 128, "small": 128, "paper": 576}
TARGET = 100_000  # objects [paper: 1e5, with 84 views each]


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    return sum(os.times()[:4])


def measure(scale: str, jobs: list[Job], views: int, encoded: int) -> dict:
    """Render, pack and encode `jobs` -> CPU seconds and bytes, per view and per object.
    encoded: views given to the VAE.
    """
    config, size = preset(scale), RENDERED[scale]
    with tempfile.TemporaryDirectory() as folder:
        start = cpu_seconds()
        rows = make_dataset(jobs, folder, size=size, views=views, progress=False)
        rendering = cpu_seconds() - start
        stored = sum(
            path.stat().st_size
            for path in Path(folder).iterdir()
            if path.suffix in (".webp", ".npz")
        )
        start, packed = cpu_seconds(), 0
        for row in rows:
            rgb, alpha, depth, _, _ = resize_views(
                read_object(folder, row["id"]), config.image_size
            )
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


def report(scales: dict[str, dict]) -> str:
    """The measurements as a Markdown table."""
    rows = [
        ("pixels rendered, trained", lambda m: f"{m['rendered_px']}, {m['trained_px']}"),
        ("rendering, views per second and core", lambda m: f"{m['views_per_second_and_core']:.1f}"),
        ("packing, core-seconds per object", lambda m: f"{m['pack_cpu_s_per_object']:.2f}"),
        (
            "latents of one ring, core-seconds per object",
            lambda m: f"{m['latents_cpu_s_per_object']:.2f}",
        ),
        ("dataset folder, MB per object", lambda m: f"{m['dataset_bytes_per_object'] / 1e6:.2f}"),
        ("shards, MB per object", lambda m: f"{m['shard_bytes_per_object'] / 1e6:.2f}"),
        (
            "DINO features if stored, MB per object",
            lambda m: f"{m['feature_bytes_per_object'] / 1e6:.2f}",
        ),
        (
            f"**{TARGET:,} objects**: rendering, core-hours",
            lambda m: f"{m['target']['render_core_hours']:,.0f}",
        ),
        ("packing, core-hours", lambda m: f"{m['target']['pack_core_hours']:,.0f}"),
        ("latents, core-hours", lambda m: f"{m['target']['latents_core_hours']:,.0f}"),
        ("dataset folder, TB", lambda m: f"{m['target']['dataset_tb']:.2f}"),
        ("shards, TB", lambda m: f"{m['target']['shards_tb']:.2f}"),
        ("DINO features if stored, TB", lambda m: f"{m['target']['features_tb']:.2f}"),
    ]
    views = next(iter(scales.values()))["views_per_object"]
    heads = [f"`{name}`" for name in scales]
    lines = [f"| {views} views per object | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(show(m) for m in scales.values())} |" for name, show in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--meshes", metavar="FOLDER", help="render meshes of this folder too")
    parser.add_argument("--up", choices=["y", "z"], help="as for make_dataset")
    parser.add_argument("--objects", type=int, default=4, help="of each kind and scale (default 4)")
    parser.add_argument(
        "--views", type=int, default=84, help="per object (default 84, the paper's)"
    )
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
    command = shlex.join(
        ["python", *(sys.argv if arguments is None else ["benchmarks/data_cost.py", *arguments])]
    )
    record = {
        "command": command,
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
