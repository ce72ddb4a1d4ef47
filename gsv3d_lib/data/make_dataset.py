"""Make a dataset folder of multi-view renderings, in the layout of `data/dataset.py`.

    python -m gsv3d_lib make_dataset --procedural 200 --out data/cache/procedural
    python -m gsv3d_lib make_dataset --meshes FOLDER --out data/cache/meshes

Each object gets 24 views (`--views`). 16 of them are a ring at elevation 15 degrees;
with `--ring -5 30` the elevation is drawn per object from that range (the paper's). The
others are random, with elevations in [-10, 40] degrees. A run that was stopped goes on
where it was when the same command is given again. A mesh that cannot be read or
rendered, or that kills the process which tries, is left out and noted in
`skipped.jsonl` beside the index; it is tried again only with `--retry`. Other sources
of meshes are in `data/sources.py`.
"""

import argparse
import json
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..cameras import orbit_cameras
from ..system import command
from ..system.command import input_path, whole
from ..system.errors import UserError
from ..system.files import explained, parse_json, read_plain
from ..system.paths import atomic_path, check_id, remove_leftovers, resolve
from .dataset import (
    RANDOM_ELEVATIONS,
    RING,
    RING_ELEVATION,
    ObjectViews,
    check_once,
    check_size,
    list_objects,
    object_files,
    write_index,
    write_object,
)
from .procedural.objects import FAMILIES
from .raycast import render_mesh
from .sources import Job, mesh_jobs, objaverse_jobs, procedural_jobs, read_ids, scan_jobs

LEVEL = (RING_ELEVATION, RING_ELEVATION)  # range of the ring's elevation: all objects alike
RANDOM_VIEWS = 8
INDEX_EVERY = 20  # objects between two writings of the index: what a killed run may lose
SKIPPED = "skipped.jsonl"
MAX_SKIPPED = 1 << 28  # bytes of that file
MAX_WORKERS = 4 * (os.cpu_count() or 1)  # more only take turns
KILLED = "it killed the process that rendered it (no memory, or a mesh reader's crash)."
MAX_FINE = 4096  # rays a side of a view: their colours take 1 GB


# ---------------------------------------------------------------- one object


def dataset_angles(
    seed: int, views: int = RING + RANDOM_VIEWS, ring: tuple[float, float] = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Azimuths and elevations [views] in degrees: the ring, then random views.

    ring: the range from which the ring's one elevation is drawn.
    """
    check_size(views, 1)
    if not -90 < ring[0] <= ring[1] < 90:
        raise UserError(
            "The ring's elevation is drawn from LOW to HIGH degrees "
            f"between -90 and 90; got {ring}."
        )
    rng = np.random.default_rng(seed)
    azimuths = np.arange(views) * 360 / RING
    elevations = np.zeros(views)
    azimuths[RING:] = rng.uniform(0, 360, views - RING)
    elevations[RING:] = rng.uniform(*RANDOM_ELEVATIONS, views - RING)
    elevations[:RING] = rng.uniform(*ring)  # drawn last: the free views do not depend on the range
    return azimuths.astype(np.float32), elevations.astype(np.float32)


def render_object(
    job: Job,
    size: int = 128,
    supersample: int = 2,
    views: int = RING + RANDOM_VIEWS,
    ring: tuple[float, float] = LEVEL,
) -> tuple[ObjectViews, dict]:
    """Render the views of a job -> (views, its row of the index)."""
    mesh = job.load()
    # the seed is the id's: an object has the same views in whatever order it is made
    azimuths, elevations = dataset_angles(zlib.crc32(job.id.encode()), views, ring)
    cameras = orbit_cameras(azimuths, elevations, size)
    rgba, depth = render_mesh(mesh, cameras, supersample)
    if not depth.any(axis=(1, 2)).all():
        raise UserError("it is invisible in some view.")
    pixels = np.round(rgba * 255).astype(np.uint8)
    row = {"id": job.id, "source": "mesh" if job.path else "procedural"}
    if job.path:
        row |= {"file": job.path.name} | job.facts
    else:
        row |= {"seed": job.seed, "family": mesh.metadata["family"]}
    coverage = round(float(rgba[..., 3].mean()), 4)
    row |= {"views": views, "size": size, "coverage": coverage}
    return ObjectViews(job.id, pixels, depth, cameras, azimuths, elevations), row


def run_job(job: Job, out: Path, **settings) -> dict | str:
    """Render and write one object -> its row, or why it was left out."""
    # the work is in embree and numpy; idle torch threads only take turns with it
    torch.set_num_threads(1)
    try:
        pictures, row = render_object(job, **settings)
    # a broken file must not end a long run
    except (ValueError, OSError, LookupError, MemoryError) as error:
        return " ".join(str(error).split())[:500] or type(error).__name__
    write_object(out, pictures)
    return row


# ---------------------------------------------------------------- the folder


def make_dataset(
    jobs: list[Job],
    out: str | Path,
    size: int = 128,
    supersample: int = 2,
    workers: int = 1,
    progress: bool = True,
    views: int = RING + RANDOM_VIEWS,
    ring: tuple[float, float] = LEVEL,
    retry: bool = True,
) -> list[dict]:
    """Render the jobs that `out` does not hold yet -> all rows of its index, by id.

    views: per object, 16 of them on the ring.
    ring: range of the ring's elevation, degrees.
    retry: try also what an earlier run noted in `skipped.jsonl`.
    Raises UserError for views, rings and sizes that no object can have, for two jobs of
    one id, and where `out` holds objects with another number of views or pixels.
    """
    # what fits no object is said before the first, and not noted for each
    check_size(views, size)
    dataset_angles(0, views, ring)
    if size * supersample > MAX_FINE:
        raise UserError(
            f"{supersample} rays a side of a pixel of {size} px are {size * supersample}, "
            f"above {MAX_FINE}."
        )
    try:
        check_once(job.id for job in jobs)
    except UserError as error:
        raise UserError(f"Two objects would get one name: {error}; rename one of them.") from error
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    rows = {row["id"]: row for row in existing_rows(out)}
    check_alike(out, rows.values(), views, size)
    reasons = {row["id"]: row["reason"] for row in skipped_rows(out)}
    missing = [job for job in jobs if job.id not in rows and (retry or job.id not in reasons)]
    settings = dict(size=size, supersample=supersample, views=views, ring=ring)
    results = _run_all(partial(run_job, out=out, **settings), missing, workers)
    bar = tqdm(results, total=len(missing), unit="object", disable=not progress)
    unwritten = 0
    try:
        for job, result in zip(missing, bar):
            if isinstance(result, str):
                tqdm.write(f"skipped {job.id}: {result}")
                reasons[job.id] = result
            else:
                rows[job.id] = result
                reasons.pop(job.id, None)
            unwritten += 1
            if unwritten >= max(INDEX_EVERY, len(rows) // 100):
                _write_lists(out, rows, reasons)
                unwritten = 0
    finally:
        _write_lists(out, rows, reasons)
    return [rows[id] for id in sorted(rows)]


def skipped_rows(folder: Path) -> list[dict]:
    """What earlier runs left out: id and reason."""
    path = Path(folder) / SKIPPED
    if not os.path.lexists(path):
        return []
    with explained(f"{path} cannot be read", "delete it"):
        rows = [parse_json(line) for line in read_plain(path, MAX_SKIPPED).splitlines()]
        for row in rows:
            check_id(row["id"])
            if not isinstance(row["reason"], str):
                raise UserError("a reason is no text")
        return rows


def _write_lists(out: Path, rows: dict[str, dict], reasons: dict[str, str]) -> None:
    write_index(out, [rows[id] for id in sorted(rows)])
    if not reasons:
        (out / SKIPPED).unlink(missing_ok=True)
        return
    with atomic_path(out / SKIPPED) as path, open(path, "w") as file:
        for id in sorted(reasons):
            file.write(json.dumps({"id": id, "reason": reasons[id]}) + "\n")


def check_alike(out: Path, rows: Iterable[dict], views: int, size: int) -> None:
    """Raises UserError unless the objects of a dataset are alike: training stacks them.

    Rows of older datasets state nothing and are let through.
    """
    for row in rows:
        have = row.get("views", views), row.get("size", size)
        if have != (views, size):
            raise UserError(
                f"{out} holds objects of {have[0]} views of {have[1]} px, "
                f"not {views} of {size} px; give another --out."
            )


def existing_rows(folder: Path) -> list[dict]:
    """The rows of a folder's index whose two files are there; none without an index."""
    rows = list_objects(folder) if (folder / "index.json").is_file() else []
    return [row for row in rows if all(path.is_file() for path in object_files(folder, row["id"]))]


# ---------------------------------------------------------------- processes


def _run_all(work: partial, jobs: list[Job], workers: int) -> Iterator[dict | str]:
    """`work(job)` of all, in order; a job that kills its process is a sentence."""
    if workers <= 1:
        threads = torch.get_num_threads()
        try:
            yield from map(work, jobs)
        finally:
            # `run_job` takes one; what follows in this process wants all of them
            torch.set_num_threads(threads)
        return
    done = 0
    while done < len(jobs):
        try:
            for result in _in_processes(work, jobs[done:], workers):
                yield result
                done += 1
        # one of those that were running; each of them gets a process of its own
        except BrokenProcessPool:
            for job in jobs[done : done + 2 * workers]:
                try:
                    result = next(_in_processes(work, [job], 1))
                except BrokenProcessPool:
                    result = KILLED
                yield result
                done += 1


def _in_processes(work: partial, jobs: list[Job], workers: int) -> Iterator[dict | str]:
    # spawn: a forked copy of a process that has started torch's threads may hang
    others = set(active_children())
    count = min(workers, len(jobs), MAX_WORKERS)
    with ProcessPoolExecutor(count, get_context("spawn"), end_with_parent) as pool:
        try:
            for future in [pool.submit(work, job) for job in jobs]:
                yield future.result()
        # Ctrl-C, or a caller that wants no more: nobody waits for what they are at
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise


def end_with_parent() -> None:
    """In a worker: end when the process that started it has ended, however it did.

    Ctrl-C reaches all of them; it is left to the parent.
    """

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = command.command_parser("make_dataset", __doc__, "--seed", "--workers")
    source = parser.add_mutually_exclusive_group(required=True)
    folder = dict(type=input_path, metavar="FOLDER")
    count = dict(type=command.positive, metavar="COUNT")
    source.add_argument("--procedural", **count, help="make this many procedural objects")
    source.add_argument("--meshes", **folder, help="every mesh file below a folder")
    source.add_argument("--scans", **folder, help="Google Scanned Objects, NAME/meshes/model.obj")
    catalogue = dict(type=input_path, metavar="JSON")
    source.add_argument("--objaverse", **catalogue, help="the downloaded objects of a catalogue")
    add = parser.add_argument
    out = dict(type=command.output_path, required=True, metavar="FOLDER")
    add("--out", **out, help="the dataset folder; it may exist already")
    add("--family", choices=list(FAMILIES), help="only this family (default: all, mixed)")
    ids = dict(type=input_path, metavar="FILE")
    add("--ids", **ids, help="of --scans and --objaverse: only these, one id a line")
    licences = dict(nargs="+", metavar="NAME")
    add("--licences", **licences, help="of --objaverse: only these, for example cc0 by")
    add("--up", choices=["y", "z"], help="up axis of meshes (default: y for glTF, else z)")
    add("--size", type=command.pixels, default=128, help="pixels per side (default 128)")
    views = dict(type=whole(RING, 1000), default=RING + RANDOM_VIEWS)
    add("--views", **views, help="per object, 16 of them on the ring")
    ring = dict(nargs=2, type=command.number(-90, 90), default=LEVEL, metavar=("LOW", "HIGH"))
    add("--ring", **ring, help="range of the ring's elevation (default 15 15; paper: -5 30)")
    add("--supersample", type=whole(1, 16), default=2, help="rays per pixel and axis (default 2)")
    add("--retry", action="store_true", help="try again what an earlier run left out")
    return parser


def run(options: argparse.Namespace) -> None:
    names = ("size", "supersample", "workers", "views", "retry")
    settings = {name: getattr(options, name) for name in names}
    command.check_writable(Path(options.out) / "index.json")
    rows = make_dataset(jobs_of(options), options.out, ring=tuple(options.ring), **settings)
    left_out = len(skipped_rows(Path(options.out)))
    note = f" {left_out} were left out; {SKIPPED} says why." if left_out else ""
    print(f"{options.out} now holds {len(rows)} objects.{note}")


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The jobs that a command line names."""
    lists = options.scans or options.objaverse
    if (options.ids and not lists) or (options.licences and not options.objaverse):
        raise UserError(
            "--ids chooses among --scans or --objaverse, and --licences among --objaverse, only."
        )
    ids = read_ids(resolve(options.ids)) if options.ids else None
    if options.scans:
        return scan_jobs(resolve(options.scans), ids)
    if options.objaverse:
        return objaverse_jobs(resolve(options.objaverse), options.licences, ids)
    if options.meshes:
        return mesh_jobs(resolve(options.meshes), options.up)
    return procedural_jobs(options.procedural, options.seed, options.family)
