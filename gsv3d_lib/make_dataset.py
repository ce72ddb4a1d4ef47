"""Make a dataset folder of multi-view renderings, in the layout of `dataset.py`.

    python -m gsv3d_lib.make_dataset --procedural 200 --seed 0 --out data/cache/procedural
    python -m gsv3d_lib.make_dataset --meshes FOLDER --out data/cache/meshes

Each object gets 24 views: 16 on a ring at elevation 15 degrees, 8 at random with elevation in [-10, 40] degrees.
A run that was stopped goes on where it was when the same command is given again. A mesh that cannot be read or rendered
is reported in one line and left out.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .cameras import orbit_cameras
from .dataset import RING, RING_ELEVATION, ObjectViews, list_objects, write_index, write_object
from .objects import FAMILIES, family_of, procedural_object
from .raycast import MESH_SUFFIXES, load_mesh, render_mesh

RANDOM_VIEWS = 8
RANDOM_ELEVATIONS = (-10.0, 40.0)  # degrees
INDEX_EVERY = 20  # objects between two writings of the index: what a stopped run may lose


@dataclass
class Job:
    """One object to render: a mesh file, or a procedural object where `path` is None."""

    id: str
    path: Path | None = None
    up: str | None = None  # of a mesh file, see `load_mesh`
    seed: int = 0  # of a procedural object
    family: str | None = None


def procedural_jobs(count: int, first_seed: int = 0, family: str | None = None) -> list[Job]:
    """Jobs for the seeds first_seed .. first_seed + count - 1."""
    seeds = range(first_seed, first_seed + count)
    return [Job(f"procedural_{seed:06d}_{family or family_of(seed)}", seed=seed, family=family) for seed in seeds]


def mesh_jobs(folder: str | Path, up: str | None = None) -> list[Job]:
    """A job per mesh file below `folder`; the id is the path, without the meaningless last part of `x/model.obj`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to read meshes from.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no mesh file ({', '.join(MESH_SUFFIXES)}).")
    jobs: dict[str, Job] = {}
    for path in paths:
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts
        id = re.sub(r"[^\w-]+", "_", "_".join(parts))
        id = f"{id}_{path.suffix[1:]}" if id in jobs else id
        jobs[id] = Job(id, path, up)
    return list(jobs.values())


def dataset_angles(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Azimuths and elevations [24] in degrees: the ring, then random views drawn from `seed`."""
    rng = np.random.default_rng(seed)
    azimuths = np.concatenate([np.arange(RING) * 360 / RING, rng.uniform(0, 360, RANDOM_VIEWS)])
    elevations = np.concatenate([np.full(RING, RING_ELEVATION), rng.uniform(*RANDOM_ELEVATIONS, RANDOM_VIEWS)])
    return azimuths.astype(np.float32), elevations.astype(np.float32)


def render_object(job: Job, size: int = 128, supersample: int = 2) -> tuple[ObjectViews, dict]:
    """Render the views of a job -> (views, its row of the index). Raises ValueError where nothing is visible."""
    mesh = load_mesh(job.path, job.up) if job.path else procedural_object(job.seed, job.family)
    azimuths, elevations = dataset_angles(zlib.crc32(job.id.encode()))
    cameras = orbit_cameras(azimuths, elevations, size)
    rgba, depth = render_mesh(mesh, cameras, supersample)
    if not depth.any(axis=(1, 2)).all():
        raise ValueError("it is invisible in some view.")
    views = ObjectViews(job.id, np.round(rgba * 255).astype(np.uint8), depth, cameras, azimuths, elevations)
    if job.path:
        row = {"id": job.id, "source": "mesh", "file": job.path.name}
    else:
        row = {"id": job.id, "source": "procedural", "seed": job.seed, "family": mesh.metadata["family"]}
    return views, row | {"coverage": round(float(rgba[..., 3].mean()), 4)}


def run_job(job: Job, out: Path, size: int, supersample: int) -> dict | str:
    """Render and write one object -> its row, or one line that says why it was left out."""
    torch.set_num_threads(1)  # the work is in embree and numpy; idle torch threads only take turns with it
    try:
        views, row = render_object(job, size, supersample)
    except (ValueError, OSError, LookupError, MemoryError) as error:  # a broken file must not end a long run
        return f"skipped {job.id}: {' '.join(str(error).split()) or type(error).__name__}"
    write_object(out, views)
    return row


def make_dataset(
    jobs: list[Job],
    out: str | Path,
    size: int = 128,
    supersample: int = 2,
    workers: int = 1,
    progress: bool = True,
) -> list[dict]:
    """Render the jobs that `out` does not hold yet and write its index -> all rows of the index, sorted by id."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = {row["id"]: row for row in existing_rows(out)}
    missing = [job for job in jobs if job.id not in rows]
    work = partial(run_job, out=out, size=size, supersample=supersample)
    bar = tqdm(_run_all(work, missing, workers), total=len(missing), unit="object", disable=not progress)
    for number, result in enumerate(bar, start=1):
        if isinstance(result, str):
            tqdm.write(result)
        else:
            rows[result["id"]] = result
        if number % INDEX_EVERY == 0:
            write_index(out, _sorted(rows))
    write_index(out, _sorted(rows))
    return _sorted(rows)


def existing_rows(folder: Path) -> list[dict]:
    """The rows of a folder's index whose two files are there; none where there is no index yet."""
    rows = list_objects(folder) if (folder / "index.json").is_file() else []
    return [row for row in rows if all((folder / f"{row['id']}{suffix}").is_file() for suffix in (".webp", ".npz"))]


def _run_all(work: partial, jobs: list[Job], workers: int) -> Iterator[dict | str]:
    if workers <= 1:
        threads = torch.get_num_threads()
        try:
            yield from map(work, jobs)
        finally:
            torch.set_num_threads(threads)  # `run_job` takes one; what follows in this process wants all of them
        return
    # spawn: a forked copy of a process that has started torch's threads may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, jobs)


def _sorted(rows: dict[str, dict]) -> list[dict]:
    return [rows[id] for id in sorted(rows)]


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gsv3d_lib.make_dataset", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--procedural", type=int, metavar="COUNT", help="make this many procedural objects")
    source.add_argument("--meshes", metavar="FOLDER", help="render every mesh file below a folder")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the dataset folder; it may exist already")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first procedural object (default 0)")
    parser.add_argument("--family", choices=list(FAMILIES), help="only this family (default: all, mixed)")
    parser.add_argument("--up", choices=["y", "z"], help="up axis in the mesh files (default: y for glTF, else z)")
    parser.add_argument("--size", type=int, default=128, help="pixels per side (default 128)")
    parser.add_argument("--supersample", type=int, default=2, help="rays per pixel and axis (default 2)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args(arguments)
    try:
        if options.meshes:
            jobs = mesh_jobs(options.meshes, options.up)
        else:
            jobs = procedural_jobs(options.procedural, options.seed, options.family)
    except FileNotFoundError as error:
        parser.error(str(error))
    rows = make_dataset(jobs, options.out, options.size, options.supersample, options.workers)
    print(f"{options.out} now holds {len(rows)} objects.")


if __name__ == "__main__":
    main()
