"""Files as others left them: read within bounds, and checked before they are believed.

A table says what a file of arrays must hold: per name a `Field` with shape, types and
range. Shapes and sizes are read from headers first, so that a small file which claims
to be a large one is refused before it takes memory. The errors are fragments such as
"az holds nan"; callers say which file it was, and what to do.
"""

import io
import json
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import MissingFile, UserError
from .paths import check_readable, reason

MAX_ARRAYS = 1 << 29  # bytes of the arrays of one .npz: 84 views of 576 px are a tenth of it
MAX_JSON = 1 << 29  # bytes: all of Objaverse's catalogue is half of it
HEADER = 10_000  # bytes of an array's header that are read; numpy's own bound
# raised by zipfile, numpy, PIL, torch, peft for files that are not what they are named
UNREADABLE = (
    *(OSError, LookupError, ValueError, TypeError, RuntimeError, EOFError, MemoryError),
    *(TokenError, zipfile.BadZipFile, zlib.error, SafetensorError),
)


@dataclass(frozen=True)
class Field:
    """What an array must be.

    shape: numbers, and names of numbers that must agree throughout the file.
    types: kinds of numpy ("f"), or kinds with bytes ("u2"), separated by spaces.
    low, high: the range of its values. Without one, anything finite.
    """

    shape: tuple[int | str, ...] = ()
    types: str = "f i u"
    low: float = -sys.float_info.max
    high: float = sys.float_info.max
    needed: bool = True


Table = dict[str, Field]


@contextmanager
def explained(fault: str, advice: str, *paths: Path) -> Iterator[None]:
    """What fails within, as reading a damaged file does, becomes a UserError.

    Its sentence is "FAULT (why); ADVICE."
    paths: files that are read. The OSError of one that may not be opened stays.
    """
    check_readable(*paths)
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{fault} ({reason(error)}); {advice}.") from error


# ---------------------------------------------------------------- pictures


def webp_facts(head: bytes) -> tuple[int, int, bool, bool]:
    """Width, height, has alpha, moves: of a WebP, by its first 30 bytes.

    PIL takes memory for the whole picture before it says how large that is.
    """
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        raise UserError("the sheet is no WebP picture")
    if head[12:16] == b"VP8X":
        sides = (1 + int.from_bytes(head[k : k + 3], "little") for k in (24, 27))
        return *sides, bool(head[20] & 0x10), bool(head[20] & 0x02)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bool(bits >> 28 & 1), False
    sides = (int.from_bytes(head[k : k + 2], "little") & 0x3FFF for k in (26, 28))
    return *sides, False, False


# ---------------------------------------------------------------- bytes and JSON


def read_plain(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; of no device or pipe."""
    path = Path(path)
    if not os.path.lexists(path):
        raise MissingFile(f"there is no file {path}")
    if not path.is_file():
        raise UserError(f"{path.name} is no file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path.name} is larger than {_size(limit)}")
    return data


def read_json(path: str | Path, limit: int = MAX_JSON):
    """What a JSON file holds."""
    return parse_json(read_plain(path, limit))


def parse_json(text: str | bytes):
    """What JSON text holds; its numbers may be NaN, as Python writes them."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError("its brackets are nested too deeply") from error


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


# ---------------------------------------------------------------- arrays


def read_npz(path: str | Path, table: Table, sizes: dict[str, int] | None = None) -> dict:
    """The arrays of an .npz that `table` names, read-only; others are not touched.

    sizes: numbers that names of shapes must have.
    Raises UserError where an array is missing, is not as the table says, or all are
    larger than `MAX_ARRAYS`.
    """
    path, sizes = Path(path), dict(sizes or {})
    if not path.is_file():
        raise MissingFile(f"{path.name} is {'no file' if os.path.lexists(path) else 'missing'}")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"it is no array file, or cut off: {path.name}") from error
    with archive:
        members = _members(archive, table, path.name)
        headers = {name: _read_header(archive, member) for name, member in members.items()}
        for name, (dtype, shape, _, _) in headers.items():
            check_shape(name, dtype.str[1:], shape, table[name], sizes)
        total = sum(dtype.itemsize * math.prod(shape) for dtype, shape, _, _ in headers.values())
        if total > MAX_ARRAYS:
            raise UserError(f"{path.name} holds {_size(total)}, more than {_size(MAX_ARRAYS)}")
        arrays = {name: _read_array(archive, members[name], *headers[name]) for name in headers}
    for name, array in arrays.items():
        check_values(name, array, table[name])
    return arrays


def _members(archive: zipfile.ZipFile, table: Table, file: str) -> dict[str, zipfile.ZipInfo]:
    found = {}
    for name, field in table.items():
        entries = [entry for entry in archive.infolist() if entry.filename == f"{name}.npy"]
        if len(entries) > 1:
            raise UserError(f"{file} holds {name} {len(entries)} times")
        if not entries and field.needed:
            raise UserError(f"{file} lacks {name}")
        if entries:
            found[name] = entries[0]
    return found


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple:
    """dtype, shape, whether it is in Fortran's order, and where its numbers begin."""
    with archive.open(member) as file:
        head = io.BytesIO(file.read(HEADER))
    npy = np.lib.format
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(head)
    if version not in readers:
        raise UserError(f"{member.filename} is of an unknown version")
    shape, fortran, dtype = readers[version](head)
    if any(side < 0 for side in shape):
        raise UserError(f"{member.filename} claims the shape {shape}")
    if head.tell() + dtype.itemsize * math.prod(shape) != member.file_size:
        raise UserError(f"{member.filename} is not as long as its header says")
    return dtype, shape, fortran, head.tell()


def _read_array(archive, member, dtype, shape, fortran: bool, start: int) -> np.ndarray:
    with archive.open(member) as file:
        data = file.read(member.file_size + 1)  # to the end, where the checksum is compared
    if len(data) != member.file_size:
        raise UserError(f"{member.filename} is not as long as the archive says")
    array = np.frombuffer(data, dtype, offset=start)
    return array.reshape(shape, order="F" if fortran else "C")


def read_tensors(path: str | Path, table: Table, sizes: dict[str, int] | None = None) -> dict:
    """`read_npz` for a safetensors file.

    Sizes need no bound: tensors are mapped, and no longer than the file.
    """
    path, sizes = Path(path), dict(sizes or {})
    if not path.is_file():
        raise MissingFile(f"{path.name} is {'no file' if os.path.lexists(path) else 'missing'}")
    with safe_open(path, "pt") as file:
        names = [name for name, field in table.items() if field.needed or name in file.keys()]
        if lacking := sorted(set(names) - set(file.keys())):
            raise UserError(f"{path.name} lacks {lacking[0]}")
        for name in names:
            part = file.get_slice(name)
            check_shape(name, _short(part.get_dtype()), part.get_shape(), table[name], sizes)
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        check_values(name, tensor, table[name])
    return tensors


def _short(dtype: str) -> str:
    """The name of a type in safetensors -> numpy's: "F32" -> "f4"."""
    letters = dtype.rstrip("0123456789")
    bits = dtype.removeprefix(letters)
    return f"{letters.lower()}{int(bits) // 8}" if bits else letters.lower()


def check_shape(
    name: str, dtype: str, shape: Iterable[int], field: Field, sizes: dict[str, int] | None = None
) -> None:
    """Raises UserError where type or shape differ; notes new names in `sizes`."""
    shape = tuple(shape)
    sizes = {} if sizes is None else sizes
    fits = len(shape) == len(field.shape) and all(
        side == (sizes.setdefault(wanted, side) if isinstance(wanted, str) else wanted)
        for side, wanted in zip(shape, field.shape)
    )
    if not fits:
        wanted = ", ".join(str(sizes.get(side, side)) for side in field.shape)
        raise UserError(f"{name} has the shape {list(shape)}, not [{wanted}]")
    if not {dtype, dtype[:1]} & set(field.types.split()):
        raise UserError(f"{name} is of type {dtype}, not {field.types.replace(' ', ', ')}")


def check_values(name: str, array: np.ndarray | Tensor, field: Field) -> None:
    """Raises UserError where a value is not finite or outside of the field's range."""
    if 0 in array.shape:
        return
    low, high = float(array.min()), float(array.max())  # NaN where one is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} holds values that are not finite")
    if low < field.low or high > field.high:
        outside = low if low < field.low else high
        raise UserError(f"{name} holds {outside:g}, outside of {field.low:g} to {field.high:g}")
