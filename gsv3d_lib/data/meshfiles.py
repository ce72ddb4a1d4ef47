"""Mesh files as others made them: checked before trimesh reads them, and after.

trimesh goes on where it can: without a texture that it cannot decode, without a
material that is not there, without the triangles of a vertex that is no number. A
dataset would get an object that is grey, or has holes. So `read_scene` refuses what
would be drawn other than the file says, in one sentence. It also refuses what would
take more memory than the bounds below.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..system.errors import MissingFile, UserError
from ..system.files import UNREADABLE, read_plain
from ..system.paths import named_file

if TYPE_CHECKING:
    import trimesh

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TGA", "TIFF")  # what PIL may open as a texture
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of 8 bits
BESIDE_MATERIAL = "color"  # vertex attribute [V, 3]: colours that multiply those of the material

MAX_FILE = 1 << 29  # bytes of a mesh file, and of each file that it names
MAX_TEXELS = 1 << 26  # pixels of a texture: 8192 x 8192
MAX_TRIANGLES = 20_000_000  # of a scene, every copy counted
MAX_NODES = 10_000  # of a glTF's tree, and parts of a scene
BOM = "\ufeff"  # that Windows' editors put before a text
ROUNDING = 1e-3  # of colours, above 1
MAX_UV = 1e5  # texture coordinates beyond repeat the texture more often than float32 can tell
NOT_FINITE = re.compile(r"^vt? (?:.*[ \t])?[+-]?(?:nan|inf|infinity)(?:[ \t].*)?$", re.M | re.I)

# Extensions of glTF that a file may require: those that trimesh knows. The many
# KHR_materials_... may be required too: they change nothing of what is drawn here.
EXTENSIONS = {"EXT_texture_webp", "KHR_lights_punctual", "KHR_mesh_quantization"}
FLOAT = 5126
COMPONENTS = {5120: "i1", 5121: "u1", 5122: "i2", 5123: "u2", 5125: "u4", FLOAT: "f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
ATTRIBUTES = ("POSITION", "TEXCOORD_0", "COLOR_0")  # those that are drawn
POINTS_AND_LINES = (0, 1, 2, 3)  # modes of glTF's primitives
TRIANGLES = (4, 5)  # single ones and strips; 6, fans, are rare


def read_scene(path: Path, *places: Path) -> trimesh.Scene:
    """A mesh file as trimesh reads it, with the pictures and materials that it names.

    Those lie where it says (not farther away than a folder beside its own), else beside
    it or in `places`. Raises UserError where one is nowhere or no picture, and where
    the mesh cannot be read, or not as it was meant.
    """
    import trimesh

    companions = Companions(path, places)
    suffix = path.suffix.lower()
    try:
        data = read_plain(path, MAX_FILE)
        if suffix in CHECKS:
            CHECKS[suffix](data, companions)
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=suffix[1:], resolver=companions, process=False
        )
        _keep_vertex_colors(scene)
        check_scene(scene)
    except NotThere as error:
        raise UserError(
            f"{path.name} names {error}, which is not there or cannot be read; "
            "without it, all would be grey."
        ) from error
    except Exception as error:  # each reader raises its own kinds
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"Cannot read {path.name} as a mesh ({kind}{error}).") from error
    return scene


# ---------------------------------------------------------------- files that it names


class NotThere(MissingFile):
    """A file that a mesh names and that is nowhere, or of no use."""


class Companions:
    """The files that a mesh names; trimesh gets those that were checked before."""

    def __init__(self, path: Path, places: tuple[Path, ...]) -> None:
        self.path = path
        self.places = places
        self.checked: dict[str, bytes] = {}

    def get(self, name: str) -> bytes:
        """What trimesh asks of its "resolver"."""
        if name not in self.checked:
            raise MissingFile(name)
        return self.checked[name]

    __getitem__ = get

    def plain(self, name: str) -> bytes:
        """A file as it is. Raises NotThere."""
        return self._find(name, lambda data: None)

    def picture(self, name: str) -> bytes:
        """A picture that can be decoded. Raises NotThere."""
        return self._find(name, check_picture)

    def _find(self, name: str, check: Callable[[bytes], None]) -> bytes:
        for candidate in self._candidates(name):
            try:
                data = read_plain(candidate, MAX_FILE)
                check(data)
            except UNREADABLE:
                continue
            self.checked[name] = data
            return data
        raise NotThere(name[:200])

    def _candidates(self, name: str) -> list[Path]:
        """Where a file of this name may lie."""
        plain = unquote(name.strip().replace("\\", "/"))  # Windows' paths; glTF's addresses
        found = []
        for stated in (name.strip(), plain):
            try:
                found.append(named_file(self.path.parent, stated))
            except UserError:  # out of the folder: only its last part is looked for
                continue
        return found + [place / Path(plain).name for place in (self.path.parent, *self.places)]


def check_picture(data: bytes, texels: int = MAX_TEXELS, modes: tuple[str, ...] = MODES) -> None:
    """Raises one of `UNREADABLE` where a texture cannot be decoded."""
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURES)
    except Image.DecompressionBombError as error:
        raise UserError(f"a texture has more than {texels:,} pixels") from error
    except UnidentifiedImageError as error:
        raise UserError(f"it is no picture of a kind known here: {', '.join(PICTURES)}") from error
    with picture:
        width, height = picture.size
        if width * height > texels:
            raise UserError(f"a texture has {width} x {height} pixels, above {texels:,}")
        if picture.mode not in modes:
            raise UserError(
                f"a texture's pixels are of mode {picture.mode}, "
                f"and only {', '.join(modes)} are known here"
            )
        picture.load()


# Of pictures that trimesh computes with: in 64 bits, and with indices of palettes as if
# they were colours.
check_shiny = partial(check_picture, texels=MAX_TEXELS // 4, modes=("L", "LA", "RGB", "RGBA"))


def _check_color(color, count: int, name: str) -> None:
    """Raises UserError unless a colour is `count` numbers from 0 to 1."""
    if not isinstance(color, list) or len(color) != count:
        raise UserError(f"{name} is not {count} numbers")
    if not all(isinstance(value, int | float) and 0 <= value <= 1 + ROUNDING for value in color):
        raise UserError(f"{name} is {color}, not from 0 to 1")


# ---------------------------------------------------------------- OBJ, PLY, OFF


def check_obj(data: bytes, companions: Companions) -> None:
    """Materials that are not there, or say nothing; numbers that trimesh misreads."""
    from trimesh.exchange.obj import parse_mtl
    from trimesh.util import decode_text

    text = decode_text(data).lstrip(BOM).replace("\r\n", "\n").replace("\\\n", "")
    if odd := re.search(NOT_FINITE, text):
        raise UserError(f"it holds {odd.group()[:60]!r}")
    if re.search(r"^f(?:.*[ \t/])?0(?:[ \t/]|$)", text, re.M):
        raise UserError("a face has the index 0, and OBJ counts from 1")
    relative = re.search(r"^f .*-\d", text, re.M)
    if relative and re.search(r"^vt? ", text[relative.start() :], re.M):
        raise UserError("its faces count backwards from vertices amid the file")
    used = set(re.findall(r"^usemtl[ \t]+(.*?)[ \t]*$", text, re.M))
    library = re.search(r"^mtllib[ \t]+(.*?)[ \t]*$", text, re.M)
    known = {}
    if library:
        words = decode_text(companions.plain(library.group(1))).lstrip(BOM)
        companions.checked[library.group(1)] = words.encode()  # trimesh takes the mark for a letter
        for picture in re.findall(r"^[ \t]*map_kd[ \t]+(.*?)[ \t\r]*$", words, re.M | re.I):
            companions.picture(picture)
        known = parse_mtl(words, companions)
    for name in used:
        if name not in known:
            raise UserError(f"no material file of it describes the material {name[:100]!r}")
        if "image" not in known[name]:
            _check_color(known[name].get("diffuse"), 3, f"Kd of the material {name[:100]!r}")


def check_ply(data: bytes, companions: Companions) -> None:
    """Textures that are not there, and colours under names that trimesh ignores."""
    header = data[: data.find(b"end_header")].decode(errors="replace")
    for name in re.findall(r"texturefile[ \t]+(.*?)[ \t\r]*$", header, re.M | re.I):
        companions.picture(name)
    if re.search(r"^property .*_red[ \t]*$", header, re.M):
        raise UserError("its colours have other names than red, green and blue")


def check_off(data: bytes, companions: Companions) -> None:
    """Colours, which trimesh leaves out."""
    lines = [line.split("#")[0].split() for line in data.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    if lines and lines[0][0].upper() == "COFF":
        raise UserError("it has colours, which are not read from OFF: save it as PLY")
    numbers = lines[1:] if lines and lines[0][0].upper().endswith("OFF") else lines
    first_face = 1 + int(numbers[0][0])
    for line in numbers[first_face : first_face + 1]:
        if len(line) > 1 + int(line[0]):
            raise UserError("its faces have colours, which are not read from OFF: save it as PLY")


# ---------------------------------------------------------------- glTF


def check_glb(data: bytes, companions: Companions) -> None:
    """The chunks of a binary glTF, and what they hold."""
    magic, version, length = struct.unpack_from("<4sII", data.ljust(12, b"\0"))
    if magic != b"glTF" or version != 2:
        raise UserError("it is no glTF 2.0")
    if length > len(data):
        raise UserError(f"it says that it has {length} bytes, and has {len(data)}: it is cut off")
    chunks, place = [], 12
    while place + 8 <= length:
        size, kind = struct.unpack_from("<I4s", data, place)
        if place + 8 + size > length:
            raise UserError(f"a chunk of {size} bytes is longer than the file")
        chunks.append((kind, data[place + 8 : place + 8 + size]))
        place += 8 + size
    if not chunks or chunks[0][0] != b"JSON":
        raise UserError("its first chunk is no JSON")
    check_gltf(chunks[0][1], companions, [chunk for kind, chunk in chunks if kind == b"BIN\0"])


def check_gltf(data: bytes, companions: Companions, blobs: list[bytes] | None = None) -> None:
    """The tree of a glTF; its buffers are files of their own, or `blobs`."""

    def refuse(name: str):
        raise UserError(f"it holds {name}, which is no number")

    tree = json.loads(data, parse_constant=refuse)
    if not isinstance(tree, dict):
        raise UserError("its JSON is no glTF")
    GlTF(tree, companions, blobs or []).check()


class GlTF:
    """The tree of a glTF file, to be checked before trimesh believes it."""

    def __init__(self, tree: dict, companions: Companions, blobs: list[bytes]) -> None:
        self.tree = tree
        self.companions = companions
        self.blobs = blobs
        self.known_images: set[tuple[int, Callable]] = set()  # decoded once, however often used

    def check(self) -> None:
        """Raises UserError, or what reading of a malformed tree raises."""
        required = set(self.tree.get("extensionsRequired", ()))
        required = {name for name in required if not name.startswith("KHR_materials_")}
        if unknown := sorted(required - EXTENSIONS):
            raise UserError(f"it requires the extension {unknown[0][:60]}, which is not known here")
        self.buffers = [
            self._linked(buffer["uri"], self.companions.plain) if "uri" in buffer else self.blobs[0]
            for buffer in self.tree.get("buffers", ())
        ]
        self._check_sizes()
        self._check_nodes()
        for mesh in self.tree.get("meshes", ()):
            for primitive in mesh["primitives"]:
                self._check_primitive(primitive)
        for material in self.tree.get("materials", ()):
            self._check_material(material)

    def _linked(self, uri: str, find: Callable[[str], bytes]) -> bytes:
        """What an address stands for: data that it holds itself, or a file."""
        if "base64," in uri:  # as trimesh tells them apart
            return base64.b64decode(uri[uri.index("base64,") + 7 :])
        return find(uri)

    def _check_sizes(self) -> None:
        """All that is declared, before any of it is made."""
        views = [self._view_size(view) for view in self.tree.get("bufferViews", ())]
        accessors = [self._accessor_size(each, views) for each in self.tree.get("accessors", ())]
        for what, total in (("views", sum(views)), ("arrays", sum(accessors))):
            if total > 2 * MAX_FILE:
                raise UserError(f"its {what} claim {total:,} bytes, above {2 * MAX_FILE:,}")

    def _view_size(self, view: dict) -> int:
        start, size = _whole(view.get("byteOffset", 0)), _whole(view["byteLength"])
        if start + size > len(self.buffers[_whole(view["buffer"])]):
            raise UserError("a view is longer than its buffer: the file is cut off")
        return size

    def _accessor_size(self, accessor: dict, views: list[int]) -> int:
        item = _item_size(accessor)
        count, start = _whole(accessor["count"]), _whole(accessor.get("byteOffset", 0))
        if "bufferView" in accessor:
            view = _whole(accessor["bufferView"])
            stride = _whole(self.tree["bufferViews"][view].get("byteStride", item)) or item
            if count and start + (count - 1) * stride + item > views[view]:
                raise UserError(f"an array of {count:,} items is longer than its data")
        return count * item

    def _check_nodes(self) -> None:
        """A tree, and one that ends."""
        nodes = self.tree.get("nodes", ())
        if len(nodes) > MAX_NODES:
            raise UserError(f"it has {len(nodes):,} nodes, above {MAX_NODES:,}")
        scenes = self.tree.get("scenes", ())
        roots = scenes[self.tree.get("scene", 0)].get("nodes", []) if scenes else []
        placed = roots + [child for node in nodes for child in node.get("children", ())]
        if len(set(placed)) < len(placed):
            raise UserError("its nodes are no tree: one has two parents")

    def _check_primitive(self, primitive: dict) -> None:
        mode = primitive.get("mode", TRIANGLES[0])
        if mode in POINTS_AND_LINES:
            return
        if mode not in TRIANGLES:
            raise UserError(
                f"it draws in mode {mode}, and only triangles and their strips are known"
            )
        drawn = {n: k for n, k in primitive["attributes"].items() if n in ATTRIBUTES}
        drawn |= {"indices": primitive["indices"]} if "indices" in primitive else {}
        for name, number in drawn.items():
            self._check_array(name, self.tree["accessors"][_whole(number)])

    def _check_array(self, name: str, accessor: dict) -> None:
        if "bufferView" not in accessor or "sparse" in accessor:
            raise UserError(f"its {name} are sparse or packed, which is not known here")
        floats = accessor["componentType"] == FLOAT
        scaled = not floats and accessor.get("normalized", False)
        if (name == "POSITION" and scaled) or (name == "TEXCOORD_0" and not floats):
            raise UserError(f"its {name} are whole numbers to be scaled, which is not known here")
        if name == "COLOR_0" and floats and not np.isfinite(self._floats(accessor)).all():
            raise UserError("its COLOR_0 holds values that are not finite")

    def _floats(self, accessor: dict) -> np.ndarray:
        """The values of an accessor of floats [count, width]."""
        view = self.tree["bufferViews"][accessor["bufferView"]]
        item = _item_size(accessor)
        start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        stride = view.get("byteStride", 0) or item
        shape = (accessor["count"], item // 4)
        return np.ndarray(shape, "<f4", self.buffers[view["buffer"]], start, (stride, 4))

    def _check_material(self, material: dict) -> None:
        """Colours and textures of it must be what they say they are."""
        shiny = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness", {})
        plain = material.get("pbrMetallicRoughness", {})
        for where, factor in ((plain, "baseColorFactor"), (shiny, "diffuseFactor")):
            if factor in where:
                _check_color(where[factor], 4, factor)
        if "baseColorTexture" in plain:
            self._check_texture(plain["baseColorTexture"], "baseColorTexture", check_picture)
        for name in {"diffuseTexture", "specularGlossinessTexture"} & set(shiny):
            self._check_texture(shiny[name], name, check_shiny)

    def _check_texture(self, reference: dict, name: str, check: Callable[[bytes], None]) -> None:
        if reference.get("texCoord", 0) != 0:
            raise UserError(
                f"its {name} lies on a second set of coordinates, which is not known here"
            )
        texture = self.tree["textures"][_whole(reference["index"])]
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        source = webp.get("source", texture.get("source"))
        if source is None:
            raise UserError(f"its {name} is of a kind that is not known here, such as KTX2")
        if (_whole(source), check) in self.known_images:
            return
        image = self.tree["images"][source]
        try:
            check(self._image(image))
        except NotThere:
            raise
        except UNREADABLE as error:
            raise UserError(f"its {name} cannot be decoded: {error}") from error
        if image.get("mimeType") == "image/ktx2":  # trimesh believes this, whatever the data are
            raise UserError(f"its {name} is said to be KTX2, which is not known here")
        self.known_images.add((source, check))

    def _image(self, image: dict) -> bytes:
        if "bufferView" not in image:
            return self._linked(image["uri"], self.companions.picture)
        view = self.tree["bufferViews"][_whole(image["bufferView"])]
        start = view.get("byteOffset", 0)
        return self.buffers[view["buffer"]][start : start + view["byteLength"]]


def _whole(number) -> int:
    """Raises UserError unless a number of a glTF is a whole one, 0 or more."""
    if type(number) is not int or number < 0:
        raise UserError(f"it gives {str(number)[:40]} where a whole number belongs")
    return number


def _item_size(accessor: dict) -> int:
    return WIDTHS[accessor["type"]] * np.dtype(COMPONENTS[accessor["componentType"]]).itemsize


# STL needs none: trimesh compares its length with what it claims, and it names no file.
CHECKS = {
    ".obj": check_obj,
    ".ply": check_ply,
    ".off": check_off,
    ".glb": check_glb,
    ".gltf": check_gltf,
}


# ---------------------------------------------------------------- after trimesh


def _keep_vertex_colors(scene: trimesh.Scene) -> None:
    """Keep the vertex colours that a glTF has beside a material, in place.

    glTF multiplies both, and these are linear. trimesh hangs them on the material,
    where the first copy of the mesh loses them.
    """
    for part in scene.geometry.values():
        colors = getattr(getattr(part, "visual", None), "vertex_attributes", {}).get("color")
        if colors is not None:
            part.vertex_attributes[BESIDE_MATERIAL] = srgb(np.asarray(colors))


def check_scene(scene: trimesh.Scene) -> None:
    """Raises UserError where what was read cannot be drawn as meant, or is too much."""
    import trimesh

    parts = {k: part for k, part in scene.geometry.items() if isinstance(part, trimesh.Trimesh)}
    for part in parts.values():
        if len(part.faces):
            check_part(part)
    placed = [scene.graph[node][1] for node in scene.graph.nodes_geometry]
    triangles = sum(len(parts[name].faces) for name in placed if name in parts)
    if len(placed) > MAX_NODES or triangles > MAX_TRIANGLES:
        raise UserError(
            f"it has {len(placed):,} parts with {triangles:,} triangles, "
            f"above {MAX_NODES:,} and {MAX_TRIANGLES:,}"
        )


def check_part(part: trimesh.Trimesh) -> None:
    """Raises UserError where a triangle names no vertex, or a vertex no place."""
    faces, count = part.faces, len(part.vertices)
    if part.vertices.shape[1:] != (3,):
        raise UserError("a vertex has not three coordinates")
    if faces.min() < 0 or faces.max() >= count:
        raise UserError(f"a triangle names vertex {faces.max()} of {count}")
    if not np.isfinite(part.vertices[faces]).all():
        raise UserError("a vertex has coordinates that are not finite")
    # what trimesh keeps of a PLY: a dict of columns, or an array with names
    raw = part.metadata.pop("_ply_raw", {}).get("vertex", {}).get("data", {})
    names = raw if isinstance(raw, dict) else raw.dtype.names or ()
    for name in {"red", "green", "blue"} & set(names):
        if not np.isfinite(np.asarray(raw[name], float)).all():
            raise UserError("a vertex has a colour that is not finite")
    if part.visual.kind != "texture" or texture_of(part.visual.material) is None:
        return
    uv = part.visual.uv
    if uv is None:
        raise UserError("it has a texture, and no coordinates that say where it lies")
    if len(uv) != count or not (np.abs(uv[faces]) < MAX_UV).all():
        raise UserError("its texture coordinates are not finite, too large, or not one a vertex")


# ---------------------------------------------------------------- colours


def texture_of(material) -> Image.Image | None:
    """The picture that colours a trimesh material, if one does."""
    if hasattr(material, "baseColorTexture"):
        return material.baseColorTexture
    return getattr(material, "image", None)


def unit_rgb(colors: np.ndarray) -> np.ndarray:
    """Colours [..., 3 or 4] -> float32 [..., 3] in 0..1.

    Whole numbers are 0..255, of uint16 0..65535; floats are 0..1 already.
    """
    whole = np.issubdtype(colors.dtype, np.integer)
    scale = (65535 if colors.dtype == np.uint16 else 255) if whole else 1
    return np.asarray(colors[..., :3], np.float32) / scale


def srgb(colors: np.ndarray) -> np.ndarray:
    """As `unit_rgb`, of colours that are linear."""
    linear = unit_rgb(colors)
    curved = 1.055 * linear ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curved).astype(np.float32)
