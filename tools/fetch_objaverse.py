"""Fetch objects of Objaverse 1.0, by licence, for `make_dataset --objaverse`.

    python tools/fetch_objaverse.py --catalogue C.json --uids uids.txt --annotations
    python tools/fetch_objaverse.py --catalogue C.json --licences cc0 by --download

The network is touched only through the package `objaverse` (`pip install -e
".[data]"`), and only when told. `--annotations` fetches who made each object, and under
which licence. `--download` fetches the chosen meshes, after their licences and their
size have been printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from gsv3d_lib.data import sources
from gsv3d_lib.system.command import check_writable, exit_code, input_path, positive, whole
from gsv3d_lib.system.errors import UserError
from gsv3d_lib.system.paths import atomic_path, resolve

# Objects that are downloaded together. What a failure leaves unrecorded is found again
# by the next run.
BLOCK = 1000


def fetch_annotations(uids: list[str] | None) -> dict[str, dict]:
    """A catalogue of Objaverse 1.0: uid -> licence, author, name, address and bytes.

    It uses the network. uids: None means all objects.
    """
    objaverse = _client()
    try:
        known = set(objaverse.load_uids())
        unknown = [uid for uid in uids or () if uid not in known]
        if unknown:
            raise UserError(
                f"Objaverse knows no object {unknown[0]} ({len(unknown)} unknown in all); "
                "correct the list."
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
        "licence": sources.LICENCES.get(code, code),
        "author": (annotation.get("user") or {}).get("displayName") or "unknown",
        "name": annotation.get("name") or "",
        "address": annotation.get("viewerUrl") or "",
        "bytes": ((annotation.get("archives") or {}).get("glb") or {}).get("size") or 0,
    }


def download(path: str | Path, uids: Iterable[str], processes: int = 1) -> dict[str, dict]:
    """Fetch the meshes of some objects of the catalogue at `path` -> their rows.

    The catalogue notes where they lie; what was fetched before is not fetched again.
    """
    objaverse, catalogue, uids = _client(), sources.read_catalogue(path), list(uids)
    here = set(sources.downloaded(catalogue))
    missing = [uid for uid in uids if uid not in here]
    try:
        for first in range(0, len(missing), BLOCK):
            block = missing[first : first + BLOCK]
            places = objaverse.load_objects(block, download_processes=processes)
            for uid, place in places.items():
                catalogue[uid]["path"] = str(place)
    except OSError as error:
        raise UserError(
            f"The download stopped ({error}); give the command again to go on."
        ) from error
    finally:
        write_catalogue(path, catalogue)
    return {uid: catalogue[uid] for uid in uids}


def describe(catalogue: dict[str, dict]) -> str:
    """A table of licences, counts and sizes, and how many are on this machine."""
    groups: dict[str, list[int]] = {}
    for row in catalogue.values():
        groups.setdefault(row["licence"], []).append(row["bytes"])
    sizes = [(name, groups[name]) for name in sorted(groups)]
    sizes.append(("all", [size for group in groups.values() for size in group]))
    lines = [f"{'licence':20}{'objects':>9}{'GB':>10}"]
    lines += [f"{name:20}{len(group):9,}{sum(group) / 1e9:10.3f}" for name, group in sizes]
    return "\n".join([*lines, f"downloaded: {len(sources.downloaded(catalogue)):,}"])


def write_catalogue(path: str | Path, catalogue: dict[str, dict]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(catalogue, indent=1))


def _client():
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
    parser = argparse.ArgumentParser(
        prog="python tools/fetch_objaverse.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    catalogue = dict(type=input_path, required=True, metavar="JSON")
    add("--catalogue", **catalogue, help="who made what, under which licence")
    uids = dict(type=input_path, metavar="FILE")
    add("--uids", **uids, help="only these objects, one uid a line (default: all)")
    licences = f"only these, of {', '.join(sources.LICENCES)}"
    add("--licences", nargs="+", metavar="NAME", help=licences)
    add("--limit", type=positive, help="at most so many objects, the first by uid")
    add("--annotations", action="store_true", help="fetch licences and sizes: the catalogue")
    add("--download", action="store_true", help="fetch the chosen meshes")
    add("--processes", type=whole(1, 1000), default=1, help="downloads at a time (default 1)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(options: argparse.Namespace) -> None:
    if options.annotations or options.download:
        check_writable(Path(options.catalogue))
    uids = sources.read_ids(resolve(options.uids)) if options.uids else None
    if options.annotations and not Path(options.catalogue).is_file():
        write_catalogue(options.catalogue, fetch_annotations(uids))
    everything = sources.read_catalogue(options.catalogue)
    chosen = sources.choose(everything, options.licences, uids)
    catalogue = dict(list(chosen.items())[: options.limit])
    print(describe(catalogue))
    if options.download:
        print(describe(download(options.catalogue, catalogue, options.processes)))
    else:
        print("Nothing was downloaded; --download fetches these meshes.")


if __name__ == "__main__":
    sys.exit(main())
