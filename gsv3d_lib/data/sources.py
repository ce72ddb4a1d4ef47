"""Where objects to render come from: lists of jobs for `make_dataset`.

Objects made by rules, folders of meshes, Google Scanned Objects, and Objaverse. Nothing
here touches the network: the meshes of Objaverse are fetched by
`tools/fetch_objaverse.py`, which writes a catalogue of licence, author and address of
every object. `make_dataset` renders what is there, and records all of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..system.errors import MissingFile, UserError
from ..system.files import explained, read_json, read_plain
from ..system.paths import plain_id
from .meshfiles import MESH_SUFFIXES, read_scene
from .procedural.objects import family_of, procedural_object
from .raycast import load_mesh, normalized

if TYPE_CHECKING:
    import trimesh

SCAN_MESH = Path("meshes", "model.obj")
SCAN_TEXTURES = Path("materials", "textures")
MAX_LIST = 1 << 28  # bytes of a list of ids
MAX_COUNT = 1_000_000  # procedural objects of one command
LICENCES = {  # Sketchfab's names, which Objaverse's annotations use
    "cc0": "CC0",
    "by": "CC-BY-4.0",
    "by-sa": "CC-BY-SA-4.0",
    "by-nd": "CC-BY-ND-4.0",
    "by-nc": "CC-BY-NC-4.0",
    "by-nc-sa": "CC-BY-NC-SA-4.0",
    "by-nc-nd": "CC-BY-NC-ND-4.0",
}
FACTS = ("licence", "author", "name", "address")  # of an object of Objaverse


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
        """The mesh, z up, inside the unit ball."""
        if self.path:
            return load_mesh(self.path, self.up)
        return procedural_object(self.seed, self.family)


class ScanJob(Job):
    """A Google Scanned Object: its material names a texture in another folder."""

    def load(self) -> trimesh.Scene:
        return load_scan(self.path.parent.parent)


def procedural_jobs(count: int, first_seed: int = 0, family: str | None = None) -> list[Job]:
    """Jobs for the seeds first_seed .. first_seed + count - 1."""
    if not 0 <= first_seed < 2**63 or count > MAX_COUNT:
        raise UserError(
            f"Seeds are 0 or more, and at most {MAX_COUNT:,} objects are made at once; "
            f"got {count:,} from {first_seed}."
        )
    return [
        Job(f"procedural_{seed:06d}_{family or family_of(seed)}", seed=seed, family=family)
        for seed in range(first_seed, first_seed + count)
    ]


def mesh_jobs(folder: str | Path, up: str | None = None) -> list[Job]:
    """A job per mesh file below `folder`.

    The id is the path, without the meaningless last part of `x/model.obj`.
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
        while id in jobs:  # thing.obj beside thing.ply
            id = f"{id}_{path.suffix[1:]}"
        jobs[id] = Job(id, path, up)
    return list(jobs.values())


def read_ids(path: str | Path) -> list[str]:
    """The ids of a text file, one a line; what follows # does not count."""
    if not Path(path).is_file():
        raise MissingFile(f"There is no list of ids at {path}; write one id a line into it.")
    with explained(f"{path} is no list of ids", "write one id a line into a text file"):
        text = read_plain(path, MAX_LIST).decode("utf-8-sig")
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    ids = list(dict.fromkeys(line for line in lines if line))
    if not ids:
        raise UserError(f"{path} holds no id; write one a line into it.")
    return ids


# ---------------------------------------------------------------- scans


def scan_jobs(folder: str | Path, ids: Iterable[str] | None = None) -> list[Job]:
    """Jobs for Google Scanned Objects as they unpack: `<name>/meshes/model.obj`.

    They are by Downs et al. 2022, under CC-BY-4.0.
    ids: only these names.
    """
    folder = Path(folder)
    names = sorted(path.parent.parent.name for path in folder.glob(f"*/{SCAN_MESH}"))
    if not names:
        raise MissingFile(
            f"{folder} holds no Google Scanned Object (NAME/{SCAN_MESH}); "
            "unpack each download into a folder of its own."
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

    The material names the picture without a folder; it lies beside the mesh or in
    materials/textures.
    """
    folder = Path(folder)
    return normalized(read_scene(folder / SCAN_MESH, folder / SCAN_TEXTURES))


# ---------------------------------------------------------------- Objaverse


def choose(
    catalogue: dict[str, dict], licences: list[str] | None = None, uids: list[str] | None = None
) -> dict[str, dict]:
    """The objects of a catalogue with some licences ("CC0", "by"), among some uids."""
    lacking = [uid for uid in uids or () if uid not in catalogue]
    if lacking:
        raise UserError(
            f"The catalogue lacks {len(lacking)} of the listed objects, such as {lacking[0]}; "
            "delete it and make it again."
        )
    wanted = {LICENCES.get(name.lower(), name) for name in licences or LICENCES}
    unknown = wanted - set(LICENCES.values())
    if unknown:
        raise UserError(
            f"{sorted(unknown)[0]!r} is no licence of Objaverse; they are {', '.join(LICENCES)}."
        )
    among = sorted(catalogue if uids is None else set(uids))
    found = [uid for uid in among if not licences or catalogue[uid]["licence"] in wanted]
    if not found:
        raise UserError(
            f"None of the {len(catalogue)} objects of the catalogue fits the licences and ids; "
            "allow more."
        )
    return {uid: catalogue[uid] for uid in found}


def downloaded(catalogue: dict[str, dict]) -> list[str]:
    """The uids whose meshes are here."""
    return [uid for uid, row in catalogue.items() if Path(row.get("path", "")).is_file()]


def objaverse_jobs(
    path: str | Path, licences: list[str] | None = None, uids: list[str] | None = None
) -> list[Job]:
    """Jobs for the downloaded objects of a catalogue file."""
    chosen = choose(read_catalogue(path), licences, uids)
    here = downloaded(chosen)
    if not here:
        raise UserError(
            f"No object of {path} is on this machine; "
            "fetch them with `python tools/fetch_objaverse.py`."
        )
    jobs = []
    for uid in here:
        facts = {"source": "Objaverse"} | {name: chosen[uid][name] for name in FACTS}
        jobs.append(Job(uid, Path(chosen[uid]["path"]), "y", facts=facts))
    return jobs


def read_catalogue(path: str | Path) -> dict[str, dict]:
    """A catalogue file."""
    if not Path(path).is_file():
        raise MissingFile(
            f"There is no catalogue at {path}; make it with "
            f"`python tools/fetch_objaverse.py --catalogue {path} --annotations`."
        )
    with explained(f"{path} is no catalogue", "delete it and make it again"):
        catalogue = read_json(path)
        if not isinstance(catalogue, dict):
            raise UserError("it holds no names")
        for uid, row in catalogue.items():
            _check_row(uid, row)
        return catalogue


def _check_row(uid: str, row) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("licence"), str):
        raise UserError(f"the row {uid[:100]!r} states no licence")
    if not all(isinstance(row.get(name, 0), str | None) for name in FACTS):
        raise UserError(f"the row {uid[:100]!r} does not state {', '.join(FACTS)}")
    size = row.get("bytes")
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < math.inf:
        raise UserError(f"the row {uid[:100]!r} states no size in bytes")
    if not isinstance(row.get("path", ""), str):
        raise UserError(f"the row {uid[:100]!r} has a path that is no text")
