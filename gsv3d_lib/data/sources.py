"""Where objects to render come from: lists of jobs for `make_dataset`.

    a folder of meshes         python -m gsv3d_lib make_dataset --meshes FOLDER ...
    Google Scanned Objects     python -m gsv3d_lib make_dataset --scans FOLDER ...
    Objaverse                  python -m gsv3d_lib sources --uids uids.txt --catalogue objaverse.json [...], then
                               python -m gsv3d_lib make_dataset --objaverse objaverse.json ...

Only the third can touch the network, only through the package `objaverse` (`pip install
-e ".[data]"`), and only when told: --annotations fetches who made each object and under
which licence, --download the chosen meshes, after their licences and their size have
been printed. `make_dataset` renders what is there and records licence, author and
address of every object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..system.command import check_writable, command_parser, exit_code, input_path, positive, whole
from ..system.errors import MissingFile, UserError
from ..system.files import UNREADABLE, read_json, read_plain
from ..system.paths import atomic_path, plain_id, reason, resolve
from .meshfiles import MESH_SUFFIXES, read_scene
from .procedural.objects import family_of, procedural_object
from .raycast import load_mesh, normalized

if TYPE_CHECKING:
    import trimesh

SCAN_MESH = Path("meshes", "model.obj")
SCAN_TEXTURES = Path("materials", "textures")
MAX_LIST = 1 << 28  # bytes of a list of ids
MAX_COUNT = 1_000_000  # procedural objects of one command
# objects that are downloaded together; what a failure leaves unrecorded is found again
# by the next run
BLOCK = 1000
LICENCES = {  # Sketchfab's names, which Objaverse's annotations use
    "cc0": "CC0",
    "by": "CC-BY-4.0",
    "by-sa": "CC-BY-SA-4.0",
    "by-nd": "CC-BY-ND-4.0",
    "by-nc": "CC-BY-NC-4.0",
    "by-nc-sa": "CC-BY-NC-SA-4.0",
    "by-nc-nd": "CC-BY-NC-ND-4.0",
}


@dataclass
class Job:
    """One object to render: a mesh file, or a procedural object where `path` is None.

    Its id becomes a file name, so whatever it was made of, it is a `plain_id`.
    """

    id: str
    path: Path | None = None
    up: str | None = None  # of a mesh file, see `load_mesh`
    seed: int = 0  # of a procedural object
    family: str | None = None
    facts: dict = field(default_factory=dict)  # of the index row: licence, author, ...

    def __post_init__(self) -> None:
        self.id = plain_id(self.id)

    def load(self) -> trimesh.Trimesh | trimesh.Scene:
        """The mesh, z up, inside the unit ball. Raises ValueError or FileNotFoundError."""
        return (
            load_mesh(self.path, self.up)
            if self.path
            else procedural_object(self.seed, self.family)
        )


class ScanJob(Job):
    """A Google Scanned Object, whose material names a texture that lies in another
    folder.
    """

    def load(self) -> trimesh.Scene:
        return load_scan(self.path.parent.parent)


def procedural_jobs(count: int, first_seed: int = 0, family: str | None = None) -> list[Job]:
    """Jobs for the seeds first_seed .. first_seed + count - 1."""
    if not 0 <= first_seed < 2**63 or count > MAX_COUNT:
        raise UserError(
            f"Seeds are 0 or more, and at most {MAX_COUNT:,} objects are made at once; got {count:,} from {first_seed}."
        )
    seeds = range(first_seed, first_seed + count)
    return [
        Job(f"procedural_{seed:06d}_{family or family_of(seed)}", seed=seed, family=family)
        for seed in seeds
    ]


def mesh_jobs(folder: str | Path, up: str | None = None) -> list[Job]:
    """A job per mesh file below `folder`; the id is the path, without the meaningless
    last part of `x/model.obj`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFile(f"There is no folder {folder} to read meshes from.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    if not paths:
        raise MissingFile(f"{folder} holds no mesh file ({', '.join(MESH_SUFFIXES)}).")
    jobs: dict[str, Job] = {}
    for path in paths:
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts
        id = plain_id("_".join(parts))
        while id in jobs:
            id = f"{id}_{path.suffix[1:]}"
        jobs[id] = Job(id, path, up)
    return list(jobs.values())


def read_ids(path: str | Path) -> list[str]:
    """The ids of a text file, one a line; empty lines and what follows # do not count."""
    if not Path(path).is_file():
        raise MissingFile(f"There is no list of ids at {path}; write one id a line into it.")
    try:
        text = read_plain(path, MAX_LIST).decode("utf-8-sig")
    except UNREADABLE as error:
        raise UserError(
            f"{path} is no list of ids ({reason(error)}); write one id a line into a text file."
        ) from error
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    ids = list(dict.fromkeys(line for line in lines if line))
    if not ids:
        raise UserError(f"{path} holds no id; write one a line into it.")
    return ids


# ---------------------------------------------------------------- Google Scanned Objects


def scan_jobs(folder: str | Path, ids: Iterable[str] | None = None) -> list[Job]:
    """Jobs for Google Scanned Objects (Downs et al. 2022, CC-BY-4.0) as they unpack:
    `<name>/meshes/model.obj`.

    ids: only these names. Raises FileNotFoundError where there are none, or one of
        `ids` is missing.
    """
    folder = Path(folder)
    names = sorted(path.parent.parent.name for path in folder.glob(f"*/{SCAN_MESH}"))
    if not names:
        raise MissingFile(
            f"{folder} holds no Google Scanned Object (NAME/{SCAN_MESH}); unpack each download into a folder of its own."
        )
    missing = sorted(set(ids or ()) - set(names))
    if missing:
        raise MissingFile(
            f"{folder} lacks {len(missing)} of the listed scans, for example {missing[0]}."
        )
    facts = {"source": "Google Scanned Objects", "licence": "CC-BY-4.0"}
    chosen = names if ids is None else sorted(set(ids))
    return [ScanJob(name, folder / name / SCAN_MESH, "z", facts=facts) for name in chosen]


def load_scan(folder: str | Path) -> trimesh.Scene:
    """The mesh of one scan with its texture, z up, inside the unit ball.

    The material names the picture alone, which lies beside the mesh or in
    materials/textures. Raises ValueError where it is in neither, or the mesh cannot be
    read.
    """
    folder = Path(folder)
    return normalized(read_scene(folder / SCAN_MESH, folder / SCAN_TEXTURES))


# ---------------------------------------------------------------- Objaverse


def fetch_annotations(uids: list[str] | None) -> dict[str, dict]:
    """uid -> licence, author, name, address and bytes of Objaverse 1.0 objects (all of
    them for None); uses the network.

    Raises ValueError where the package is missing, the network fails, or Objaverse does
    not know a uid.
    """
    objaverse = _objaverse()
    try:
        known = set(objaverse.load_uids())
        unknown = [uid for uid in uids or () if uid not in known]
        if unknown:
            raise UserError(
                f"Objaverse knows no object {unknown[0]} ({len(unknown)} unknown in all); correct the list."
            )
        annotations = objaverse.load_annotations(uids)
    except OSError as error:
        raise UserError(
            f"Objaverse's annotations cannot be fetched ({error}); run the command again."
        ) from error
    return {uid: _catalogue_row(annotations[uid]) for uid in sorted(annotations)}


def _catalogue_row(annotation: dict) -> dict:
    code = annotation.get("license") or "unknown"
    return {
        "licence": LICENCES.get(code, code),
        "author": (annotation.get("user") or {}).get("displayName") or "unknown",
        "name": annotation.get("name") or "",
        "address": annotation.get("viewerUrl") or "",
        "bytes": ((annotation.get("archives") or {}).get("glb") or {}).get("size") or 0,
    }


def choose(
    catalogue: dict[str, dict],
    licences: list[str] | None = None,
    uids: list[str] | None = None,
    limit: int | None = None,
) -> dict[str, dict]:
    """The objects of a catalogue with one of some licences ("CC0", "by", ...), among
    some uids, at most `limit`, by uid.

    Raises ValueError for a licence that does not exist, a uid that the catalogue lacks,
    and where nothing is left.
    """
    lacking = [uid for uid in uids or () if uid not in catalogue]
    if lacking:
        raise UserError(
            f"The catalogue lacks {len(lacking)} of the listed objects, such as {lacking[0]}; delete it and make it again."
        )
    wanted = {LICENCES.get(name.lower(), name) for name in licences or LICENCES}
    unknown = wanted - set(LICENCES.values())
    if unknown:
        raise UserError(
            f"{sorted(unknown)[0]!r} is no licence of Objaverse; they are {', '.join(LICENCES)}."
        )
    among = set(catalogue if uids is None else uids)
    found = [
        uid
        for uid in sorted(catalogue)
        if uid in among and (not licences or catalogue[uid]["licence"] in wanted)
    ]
    if not found:
        raise UserError(
            f"None of the {len(catalogue)} objects of the catalogue fits the licences and ids; allow more."
        )
    return {uid: catalogue[uid] for uid in found[:limit]}


def describe(catalogue: dict[str, dict]) -> str:
    """Licences, counts and sizes of a catalogue as a table, with what is on this
    machine already.
    """
    counts, sizes = Counter(), Counter()
    for row in catalogue.values():
        counts[row["licence"]] += 1
        sizes[row["licence"]] += row["bytes"]
    lines = [f"{'licence':20}{'objects':>9}{'GB':>10}"]
    lines += [f"{name:20}{counts[name]:9,}{sizes[name] / 1e9:10.3f}" for name in sorted(counts)]
    here = sum(Path(row.get("path", "")).is_file() for row in catalogue.values())
    return "\n".join(
        [
            *lines,
            f"{'all':20}{counts.total():9,}{sizes.total() / 1e9:10.3f}",
            f"downloaded: {here:,}",
        ]
    )


def download(path: str | Path, uids: Iterable[str], processes: int = 1) -> dict[str, dict]:
    """Fetch the meshes of some objects of the catalogue at `path`, and note in it where
    they lie -> their rows.

    What was fetched before is not fetched again. Raises ValueError when the network
    fails.
    """
    objaverse, catalogue, uids = _objaverse(), read_catalogue(path), list(uids)
    missing = [uid for uid in uids if not Path(catalogue[uid].get("path", "")).is_file()]
    try:
        for first in range(0, len(missing), BLOCK):
            places = objaverse.load_objects(
                missing[first : first + BLOCK], download_processes=processes
            )
            for uid, place in places.items():
                catalogue[uid]["path"] = str(place)
    except OSError as error:
        raise UserError(
            f"The download stopped ({error}); give the command again to go on."
        ) from error
    finally:
        write_catalogue(path, catalogue)
    return {uid: catalogue[uid] for uid in uids}


def objaverse_jobs(
    path: str | Path, licences: list[str] | None = None, uids: list[str] | None = None
) -> list[Job]:
    """Jobs for the downloaded objects of a catalogue file. Raises ValueError where none
    is on this machine.
    """
    chosen = choose(read_catalogue(path), licences, uids)
    here = {uid: row for uid, row in chosen.items() if Path(row.get("path", "")).is_file()}
    if not here:
        raise UserError(
            f"No object of {path} is on this machine; fetch them with `python -m gsv3d_lib sources`."
        )
    names = ("licence", "author", "name", "address")
    facts = {
        uid: {"source": "Objaverse"} | {name: row[name] for name in names}
        for uid, row in here.items()
    }
    return [Job(uid, Path(row["path"]), "y", facts=facts[uid]) for uid, row in here.items()]


def read_catalogue(path: str | Path) -> dict[str, dict]:
    """A catalogue file. Raises FileNotFoundError or ValueError with what to do."""
    if not Path(path).is_file():
        raise MissingFile(
            f"There is no catalogue at {path}; make it with `python -m gsv3d_lib sources --catalogue {path} --annotations`."
        )
    try:
        catalogue = read_json(path)
        if not isinstance(catalogue, dict):
            raise UserError("it holds no names")
        for uid, row in catalogue.items():
            _check_row(uid, row)
    except UNREADABLE as error:
        raise UserError(
            f"{path} is no catalogue ({reason(error)}); delete it and make it again."
        ) from error
    return catalogue


def _check_row(uid: str, row) -> None:
    texts = ("licence", "author", "name", "address")
    if not isinstance(row, dict) or not isinstance(row.get("licence"), str):
        raise UserError(f"the row {uid[:100]!r} states no licence")
    if not all(isinstance(row.get(name, 0), str | None) for name in texts):
        raise UserError(f"the row {uid[:100]!r} does not state {', '.join(texts)}")
    size = row.get("bytes")
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < math.inf:
        raise UserError(f"the row {uid[:100]!r} states no size in bytes")
    if not isinstance(row.get("path", ""), str):
        raise UserError(f"the row {uid[:100]!r} has a path that is no text")


def write_catalogue(path: str | Path, catalogue: dict[str, dict]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(catalogue, indent=1))


def _objaverse():
    try:
        import objaverse
    except ImportError as error:
        raise UserError(
            'Objaverse needs a package that is not installed: pip install -e ".[data]".'
        ) from error
    return objaverse


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = command_parser("sources", __doc__)
    parser.add_argument(
        "--catalogue",
        type=input_path,
        required=True,
        metavar="JSON",
        help="who made what, under which licence",
    )
    parser.add_argument(
        "--uids",
        type=input_path,
        metavar="FILE",
        help="only these objects, one uid a line (default: all)",
    )
    parser.add_argument(
        "--licences", nargs="+", metavar="NAME", help=f"only these, of {', '.join(LICENCES)}"
    )
    parser.add_argument("--limit", type=positive, help="at most so many objects, the first by uid")
    parser.add_argument(
        "--annotations", action="store_true", help="fetch licences and sizes, make the catalogue"
    )
    parser.add_argument("--download", action="store_true", help="fetch the chosen meshes")
    parser.add_argument(
        "--workers", type=whole(1, 1000), default=1, help="downloads at a time (default 1)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(options: argparse.Namespace) -> None:
    if options.annotations or options.download:
        check_writable(Path(options.catalogue))
    uids = read_ids(resolve(options.uids)) if options.uids else None
    if options.annotations and not Path(options.catalogue).is_file():
        write_catalogue(options.catalogue, fetch_annotations(uids))
    catalogue = choose(read_catalogue(options.catalogue), options.licences, uids, options.limit)
    print(describe(catalogue))
    if options.download:
        print(describe(download(options.catalogue, catalogue, options.workers)))
    else:
        print("Nothing was downloaded; --download fetches these meshes.")


if __name__ == "__main__":
    sys.exit(main())
