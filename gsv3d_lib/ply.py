"""PLY files of Gaussian splats, which viewers open: bytes on disk <-> arrays.

A file stores float32: position, a zero normal, (colour - 0.5) / SH_C0, the logit of the
opacity, the log of the scales, and the quaternion. Of neighbouring float32 numbers the
one that decodes nearest to the original is taken. So one round trip changes a value by
at most 1e-6, and every further one changes nothing. Opacities 0 and 1 have the logits
-110 and 110, which decode to exactly 0 and 1. A comment in the header says which way is
up.
"""

import re
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .system.errors import MissingFile, UserError
from .system.paths import atomic_path

SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / sqrt(4 pi)
MAX_LOG = 110.0  # exp(-110) is 0 in float32: opacities 0 and 1 and scale 0 decode exactly
PLY_COLUMNS = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity".split()
PLY_COLUMNS += "scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
BYTE_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}
MAX_HEADER = 1 << 20  # bytes; headers of splats take 2 kB


def write_splats(path: str | Path, table: np.ndarray, axes: str) -> None:
    """Write a binary PLY of `encode`d splats [G, 17]; its header states the axes."""
    header = ["ply", "format binary_little_endian 1.0", f"comment axes {axes}"]
    header += [f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in PLY_COLUMNS] + ["end_header", ""]
    with atomic_path(path) as temporary:
        temporary.write_bytes("\n".join(header).encode() + table.tobytes())


def read_splats(path: Path) -> tuple[np.ndarray, str]:
    """The splats of a PLY as a structured array [G], and its stated axes.

    Raises MissingFile, or UserError where it is no complete PLY of splats.
    """
    if not path.is_file():
        raise MissingFile(f"There is no PLY file at {path}: check the path.")
    table, axes = read_ply_table(path)
    names = table.dtype.names or ()
    if "packed_position" in names:
        raise UserError(
            f"{path} is a compressed PLY: unpack it, for example with PlayCanvas's splat-transform "
            f"(`splat-transform {path.name} unpacked.ply`) or SuperSplat, which exports it as .ply."
        )
    for name in PLY_COLUMNS:
        if name not in names and name not in ("nx", "ny", "nz"):
            lack = f"it has no property {name}"
            raise UserError(f"{path} is a PLY, but not one of Gaussian splats: {lack}.")
    warn_of_activated(table, path)
    return table, axes


class PlyElement(NamedTuple):
    """A table of a PLY file: its name, its number of rows, its columns in order.

    columns: name -> numpy type of a number, or two of a list (its length, its items).
    """

    name: str
    count: int
    columns: dict[str, str | tuple[str, str]]

    def record(self) -> np.dtype:
        """One row. ValueError for lists: their length is known row by row only."""
        if any(isinstance(kind, tuple) for kind in self.columns.values()):
            raise ValueError(f"{self.name} holds lists")
        return np.dtype(list(self.columns.items()))


def read_ply_table(path: Path) -> tuple[np.ndarray, str]:
    """The vertices of a binary PLY, bit for bit, and the axes that its header states.

    Takes no more memory than the file has bytes. UserError for what is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        lines, start = _read_header(file, path)
        order = _byte_order(lines, path)
        try:
            elements = _parse_elements(lines, order)
            before, vertices = _find_vertices(elements)
            record = vertices.record()
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"{path} has a header that is not that of a table of numbers ({error})."
            ) from error
        for element in before:
            start = _skip(file, element, start, size)
        wanted = vertices.count * record.itemsize
        there = max(size - start, 0)
        if there < wanted:
            raise UserError(
                f"{path} is cut off: its {vertices.count} splats take {wanted} bytes; got {there}."
            )
        file.seek(start)
        return np.fromfile(file, record, vertices.count), _stated_axes(lines)


def _read_header(file: BinaryIO, path: Path) -> tuple[list[list[str]], int]:
    """The words of each line from "ply" to "end_header", and where the data begins."""
    data = file.read(MAX_HEADER)
    first = re.match(rb"ply[ \t]*(\r\n|\n|\r)", data)
    if not first:
        raise UserError(f"{path} is not a PLY file: it does not begin with the line ply.")
    # A lone \r ends lines only where it ends the first: the data may begin with \n.
    line_end = rb"\r" if first[1] == b"\r" else rb"\r?\n"
    last = re.search(rb"[\r\n]end_header[ \t]*" + line_end, data)
    if not last:
        raise UserError(f"{path} is not a PLY file, or it is cut off inside its header.")
    text = data[first.end() : last.start()].decode("ascii", "replace")
    return [line.split() for line in text.splitlines()], last.end()


def _byte_order(lines: list[list[str]], path: Path) -> str:
    """numpy's sign for it."""
    formats = [words for words in lines if words[:1] == ["format"]]
    if len(formats) == 1 and len(formats[0]) == 3 and formats[0][1] in BYTE_ORDERS:
        return BYTE_ORDERS[formats[0][1]]
    stated = " ".join(formats[0][1:]) if formats else "missing"
    raise UserError(
        f"{path} is not a binary PLY, its format is {stated}: export it again as a binary one."
    )


def _stated_axes(lines: list[list[str]]) -> str:
    """Of the line "comment axes y-down", as `save_ply` writes it."""
    for words in lines:
        if words[:2] == ["comment", "axes"] and re.fullmatch(
            "[xyz]-(up|down)", " ".join(words[2:])
        ):
            return words[2]
    return "z-up"


def _parse_elements(lines: list[list[str]], order: str) -> list[PlyElement]:
    elements: list[PlyElement] = []
    for words in lines:
        if words[:1] == ["element"]:
            _, name, count = words
            if not re.fullmatch("[0-9]+", count):
                raise ValueError(f"{count!r} is no number of {name}")
            elements.append(PlyElement(name, int(count), {}))
        elif words[:1] == ["property"]:
            columns = elements[-1].columns
            name = words[-1]
            if name in columns:
                raise ValueError(f"two properties {name}")
            columns[name] = _column_type(words[1:-1], order)
    return elements


def _column_type(words: list[str], order: str) -> str | tuple[str, str]:
    """["float"] or ["list", "uchar", "int"] -> as `PlyElement.columns` holds it."""
    kinds = [order + PLY_TYPES[word] for word in words if word != "list"]
    if len(kinds) == len(words) == 1:
        return kinds[0]
    if len(kinds) == 2 and words[0] == "list" and kinds[0][1] in "iu":
        return kinds[0], kinds[1]
    raise ValueError(f"{' '.join(words)!r} is no type")


def _find_vertices(elements: list[PlyElement]) -> tuple[list[PlyElement], PlyElement]:
    """The elements before the vertices, and the vertices. What follows is not read."""
    for position, element in enumerate(elements):
        if element.name == "vertex" and element.columns:
            return elements[:position], element
    raise ValueError("no element vertex with properties")


def _skip(file: BinaryIO, element: PlyElement, start: int, size: int) -> int:
    """Where an element that begins at `start` ends; > `size` if it is cut off."""
    kinds = element.columns.values()
    if not any(isinstance(kind, tuple) for kind in kinds):
        return start + element.count * element.record().itemsize
    for _ in range(element.count):
        for kind in kinds:
            if isinstance(kind, str):
                start += np.dtype(kind).itemsize
                continue
            length, item = (np.dtype(part) for part in kind)
            file.seek(start)
            stated = file.read(length.itemsize)
            if len(stated) < length.itemsize:
                return size + 1
            start += length.itemsize + max(int(np.frombuffer(stated, length)[0]), 0) * item.itemsize
    return start


def warn_of_activated(table: np.ndarray, path: Path) -> None:
    """Warn of many splats with all logs of scales > 0 and all logits in [0, 1].

    They are most likely neither logs nor logits.
    """
    scales = np.stack([table[f"scale_{k}"] for k in range(3)])
    opacities = table["opacity"]
    if len(table) >= 2 and (scales > 0).all() and ((opacities >= 0) & (opacities <= 1)).all():
        warnings.warn(
            f"{path} seems to store scales and opacities themselves, not their logarithms and "
            "logits: if the object looks like fog, export it again.",
            stacklevel=3,
        )


# ------------------------------------------------------ stored and activated numbers
# Computed in float64, so that the one rounding to float32 at the end decides.


def _color(stored: np.ndarray) -> np.ndarray:
    # clamped as splat viewers do, so that black stays exactly 0
    return np.maximum(0.5 + SH_C0 * stored, 0)


def _sigmoid(stored: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-stored))


def _color_inverse(color: np.ndarray) -> np.ndarray:
    return (color - 0.5) / SH_C0


def _logit(opacity: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.clip(np.log(opacity) - np.log1p(-opacity), -MAX_LOG, MAX_LOG)


def _log(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(scale), -MAX_LOG)


def _store(values: np.ndarray, encode, decode) -> np.ndarray:
    """float32 near encode(values): of three neighbours the one that decodes nearest."""
    centre = encode(values.astype(np.float64)).astype(np.float32)
    below, above = (np.nextafter(centre, np.float32(end)) for end in (-np.inf, np.inf))
    neighbours = np.stack([centre, below, above])
    decoded = decode(neighbours.astype(np.float64)).astype(np.float32).astype(np.float64)
    nearest = np.abs(decoded - values).argmin(0)  # the centre, if several are
    return np.take_along_axis(neighbours, nearest[None], 0)[0]


def encode(
    means: np.ndarray, quats: np.ndarray, scales: np.ndarray,
    opacities: np.ndarray, colors: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Activated values [G, ...] -> float32 [G, 17] in the order of PLY_COLUMNS."""
    dc = _store(colors, _color_inverse, _color)
    logits = _store(opacities[:, None], _logit, _sigmoid)
    log_scales = _store(scales, _log, np.exp)
    columns = [means, np.zeros_like(means), dc, logits, log_scales, quats]
    return np.concatenate(columns, 1).astype("<f4")


def decode(table: np.ndarray) -> tuple[np.ndarray, ...]:
    """The inverse of `encode`, from a structured array [G]: five arrays of float32."""

    def columns(*names: str) -> np.ndarray:  # no infinity decodes to a number
        stored = np.stack([table[name] for name in names], -1).astype(np.float64)
        return np.where(np.isfinite(stored), stored, np.nan)

    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for NaN
        means = columns("x", "y", "z")
        quats = columns("rot_0", "rot_1", "rot_2", "rot_3")
        scales = np.exp(columns("scale_0", "scale_1", "scale_2"))
        opacities = _sigmoid(columns("opacity"))[:, 0]
        colors = _color(columns("f_dc_0", "f_dc_1", "f_dc_2"))
        return tuple(a.astype(np.float32) for a in (means, quats, scales, opacities, colors))
