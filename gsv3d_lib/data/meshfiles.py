"""Mesh files as others made them: checked before trimesh reads them, and after.

trimesh goes on where it can: without a texture that it cannot decode, without a
material that is not there, without the triangles of a vertex that is no number. A data
set would get an object that is grey, or has holes. So `read_scene` refuses what would
be drawn other than the file says, in one sentence, and what would take more memory than
the bounds below.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from collections.abc import Callable
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

# Extensions of glTF that a file may require: those that change nothing of what is drawn
# here, and those that trimesh knows. All KHR_materials_... belong to the first kind.
NOT_FINITE = re.compile(r"^vt? (?:.*[ \t])?[+-]?(?:nan|inf|infinity)(?:[ \t].*)?$", re.M | re.I)
EXTENSIONS = {"EXT_texture_webp", "KHR_lights_punctual", "KHR_mesh_quantization"}
FLOAT = 5126
COMPONENTS = {5120: "i1", 5121: "u1", 5122: "i2", 5123: "u2", 5125: "u4", FLOAT: "f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
POINTS_AND_LINES, TRIANGLES = (0, 1, 2, 3), (4, 5)  # modes of glTF's primitives; 6, fans, are rare


def read_scene(path: Path, *places: Path) -> trimesh.Scene:
    """A mesh file as trimesh reads it, with the pictures and materials that it names.

    Those lie where it says (not farther away than a folder beside its own), else beside
    it or in `places`. Raises UserError where one is nowhere or no picture (mesh readers
    would go on in grey), and where the mesh cannot be read, or not as it was meant.
    """
    import trimesh

    companions = companions_of(path, places)
    suffix = path.suffix.lower()
    try:
        data = read_plain(path, MAX_FILE)
        CHECKS.get(suffix, _nothing)(data, companions)
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=suffix[1:], resolver=companions, process=False
        )
        _keep_vertex_colors(scene)
        check_scene(scene)
    except NotThere as error:
        raise UserError(
            f"{path.name} names {error}, which is not there or cannot be read; without it, all would be grey."
        ) from error
    except Exception as error:  # each reader raises its own kinds
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"Cannot read {path.name} as a mesh ({kind}{error}).") from error
    return scene


# ---------------------------------------------------------------- the files that a mesh names


class NotThere(MissingFile):
    """A file that a mesh names and that is nowhere, or of no use."""


def companions_of(path: Path, places: tuple[Path, ...]):
    """What trimesh asks for the files that a mesh names; it gets those that were
    checked.
    """
    from trimesh.resolvers import FilePathResolver

    class Companions(FilePathResolver):
        def __init__(self) -> None:
            super().__init__(str(path))
            self.checked: dict[str, bytes] = {}

        def get(self, name: str) -> bytes:
            if name not in self.checked:
                raise MissingFile(name)
            return self.checked[name]

        def plain(self, name: str) -> bytes:
            """A file as it is. Raises NotThere."""
            return self._find(name, lambda data: None)

        def picture(self, name: str) -> bytes:
            """A picture that can be decoded. Raises NotThere."""
            return self._find(name, check_picture)

        def _find(self, name: str, check: Callable[[bytes], None]) -> bytes:
            for candidate in _candidates(path, name, places):
                try:
                    data = read_plain(candidate, MAX_FILE)
                    check(data)
                except UNREADABLE:
                    continue
                self.checked[name] = data
                return data
            raise NotThere(name[:200])

    return Companions()


def _candidates(path: Path, name: str, places: tuple[Path, ...]) -> list[Path]:
    """Where a file may lie that the mesh at `path` names."""
    plain = unquote(name.strip().replace("\\", "/"))  # Windows' paths; glTF's, which are addresses
    found = []
    for stated in (name.strip(), plain):
        try:
            found.append(named_file(path.parent, stated))
        # it leads out of the folder: its name alone is looked for beside the mesh
        except UserError:
            continue
    return found + [place / Path(plain).name for place in (path.parent, *places)]


def check_picture(data: bytes, texels: int = MAX_TEXELS, modes: tuple[str, ...] = MODES) -> None:
    """Raises UserError, or another error of `UNREADABLE`, where a texture cannot be
    decoded.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURES)
    except Image.DecompressionBombError as error:
        raise UserError(f"a texture has more than {texels:,} pixels") from error
    except UnidentifiedImageError as error:
        raise UserError(f"it is no picture of a kind known here: {', '.join(PICTURES)}") from error
    with picture:
        if picture.width * picture.height > texels:
            raise UserError(
                f"a texture has {picture.width} x {picture.height} pixels, above {texels:,}"
            )
        if picture.mode not in modes:
            raise UserError(
                f"a texture's pixels are of mode {picture.mode}, and only {', '.join(modes)} are known here"
            )
        picture.load()


def check_shiny(data: bytes) -> None:
    """`check_picture` of what trimesh computes with, in 64 bits, and takes indices of
    palettes for colours.
    """
    check_picture(data, MAX_TEXELS // 4, ("L", "LA", "RGB", "RGBA"))


# ---------------------------------------------------------------- before trimesh


def _nothing(data: bytes, companions) -> None:
    """STL: trimesh compares its length with what it claims, and it names nothing."""


def check_obj(data: bytes, companions) -> None:
    """Materials that are not there, or say nothing; indices and colours that trimesh
    misreads.
    """
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


def _check_color(color, count: int, name: str) -> None:
    """Raises UserError unless a colour is `count` numbers from 0 to 1."""
    if not isinstance(color, list) or len(color) != count:
        raise UserError(f"{name} is not {count} numbers")
    if not all(isinstance(value, int | float) and 0 <= value <= 1 + ROUNDING for value in color):
        raise UserError(f"{name} is {color}, not from 0 to 1")


def check_ply(data: bytes, companions) -> None:
    """Textures that are not there, and colours under names that trimesh does not know."""
    header = data[: data.find(b"end_header")].decode(errors="replace")
    for name in re.findall(r"texturefile[ \t]+(.*?)[ \t\r]*$", header, re.M | re.I):
        companions.picture(name)
    if re.search(r"^property .*_red[ \t]*$", header, re.M):
        raise UserError("its colours have other names than red, green and blue")


def check_off(data: bytes, companions) -> None:
    """Colours, which trimesh leaves out."""
    lines = [line.split("#")[0].split() for line in data.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    numbers = lines[1:] if lines and lines[0][0].upper().endswith("OFF") else lines
    if lines and lines[0][0].upper() == "COFF":
        raise UserError("it has colours, which are not read from OFF: save it as PLY")
    vertices = int(numbers[0][0])
    for line in numbers[1 + vertices : 2 + vertices]:
        if len(line) > 1 + int(line[0]):
            raise UserError("its faces have colours, which are not read from OFF: save it as PLY")


def check_glb(data: bytes, companions) -> None:
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
    blobs = [chunk for kind, chunk in chunks if kind == b"BIN\0"]
    GlTF(_strict_json(chunks[0][1]), companions, blobs).check()


def check_gltf(data: bytes, companions) -> None:
    """A glTF whose buffers are files of their own."""
    GlTF(_strict_json(data), companions, []).check()


def _strict_json(text: bytes) -> dict:
    def refuse(name: str):
        raise UserError(f"it holds {name}, which is no number")

    tree = json.loads(text, parse_constant=refuse)
    if not isinstance(tree, dict):
        raise UserError("its JSON is no glTF")
    return tree


class GlTF:
    """The tree of a glTF file, to be checked before trimesh believes it."""

    def __init__(self, tree: dict, companions, blobs: list[bytes]) -> None:
        self.tree, self.companions, self.blobs = tree, companions, blobs
        self.known_images: set[tuple[int, Callable]] = set()  # those that were decoded already

    def check(self) -> None:
        """Raises UserError, or what reading of a malformed tree raises."""
        required = set(self.tree.get("extensionsRequired", ()))
        required = {name for name in required if not name.startswith("KHR_materials_")}
        if unknown := sorted(required - EXTENSIONS):
            raise UserError(f"it requires the extension {unknown[0][:60]}, which is not known here")
        self.buffers = [self._buffer(each) for each in self.tree.get("buffers", ())]
        self._check_sizes()
        self._check_nodes()
        for mesh in self.tree.get("meshes", ()):
            for primitive in mesh["primitives"]:
                self._check_primitive(primitive)
        for material in self.tree.get("materials", ()):
            self._check_material(material)

    def _buffer(self, buffer: dict) -> bytes:
        if "uri" not in buffer:
            return self.blobs[0]
        return self._linked(buffer["uri"], self.companions.plain)

    def _linked(self, uri: str, find: Callable[[str], bytes]) -> bytes:
        """What an address stands for: the data that it holds itself, or a file beside
        the mesh.
        """
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
            accessor = self.tree["accessors"][_whole(number)]
            if "bufferView" not in accessor or "sparse" in accessor:
                raise UserError(f"its {name} are sparse or packed, which is not known here")
            scaled = accessor["componentType"] != FLOAT and accessor.get("normalized", False)
            if (name == "POSITION" and scaled) or (
                name == "TEXCOORD_0" and accessor["componentType"] != FLOAT
            ):
                raise UserError(
                    f"its {name} are whole numbers to be scaled, which is not known here"
                )
            if name == "COLOR_0" and accessor["componentType"] == FLOAT:
                if not np.isfinite(self._floats(accessor)).all():
                    raise UserError("its COLOR_0 holds values that are not finite")

    def _floats(self, accessor: dict) -> np.ndarray:
        """The values of an accessor of floats [count, width]."""
        view = self.tree["bufferViews"][accessor["bufferView"]]
        item, start = (
            _item_size(accessor),
            view.get("byteOffset", 0) + accessor.get("byteOffset", 0),
        )
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
            if "bufferView" in image:
                view = self.tree["bufferViews"][_whole(image["bufferView"])]
                start = view.get("byteOffset", 0)
                data = self.buffers[view["buffer"]][start : start + view["byteLength"]]
            else:
                data = self._linked(image["uri"], self.companions.picture)
            check(data)
        except NotThere:
            raise
        except UNREADABLE as error:
            raise UserError(f"its {name} cannot be decoded: {error}") from error
        if image.get("mimeType") == "image/ktx2":  # trimesh believes this, whatever the data are
            raise UserError(f"its {name} is said to be KTX2, which is not known here")
        self.known_images.add((source, check))


ATTRIBUTES = ("POSITION", "TEXCOORD_0", "COLOR_0")


def _whole(number) -> int:
    """Raises UserError unless a number of a glTF is a whole one, 0 or more."""
    if type(number) is not int or number < 0:
        raise UserError(f"it gives {str(number)[:40]} where a whole number belongs")
    return number


def _item_size(accessor: dict) -> int:
    return WIDTHS[accessor["type"]] * np.dtype(COMPONENTS[accessor["componentType"]]).itemsize


CHECKS = {
    ".obj": check_obj,
    ".ply": check_ply,
    ".off": check_off,
    ".glb": check_glb,
    ".gltf": check_gltf,
}


# ---------------------------------------------------------------- after trimesh


def _keep_vertex_colors(scene: trimesh.Scene) -> None:
    """Where a glTF has a material and vertex colours, its specification multiplies
    them, and they are linear.

    trimesh hangs such colours on the material, where the first copy of the mesh loses
    them. In place.
    """
    for part in scene.geometry.values():
        colors = getattr(getattr(part, "visual", None), "vertex_attributes", {}).get("color")
        if colors is not None:
            part.vertex_attributes[BESIDE_MATERIAL] = srgb(np.asarray(colors))


def check_scene(scene: trimesh.Scene) -> None:
    """Raises UserError where what was read cannot be drawn as it was meant, or is too
    much.
    """
    import trimesh

    parts = {k: part for k, part in scene.geometry.items() if isinstance(part, trimesh.Trimesh)}
    for part in parts.values():
        check_part(part)
    placed = [scene.graph[node][1] for node in scene.graph.nodes_geometry]
    triangles = sum(len(parts[name].faces) for name in placed if name in parts)
    if len(placed) > MAX_NODES or triangles > MAX_TRIANGLES:
        raise UserError(
            f"it has {len(placed):,} parts with {triangles:,} triangles, above {MAX_NODES:,} and {MAX_TRIANGLES:,}"
        )


def check_part(part: trimesh.Trimesh) -> None:
    """Raises UserError where a triangle has a corner, or a corner a place, that is
    none.
    """
    faces, count = part.faces, len(part.vertices)
    if not len(faces):
        return
    if part.vertices.shape[1:] != (3,):
        raise UserError("a vertex has not three coordinates")
    if faces.min() < 0 or faces.max() >= count:
        raise UserError(f"a triangle names vertex {faces.max()} of {count}")
    if not np.isfinite(part.vertices[faces]).all():
        raise UserError("a vertex has coordinates that are not finite")
    raw = part.metadata.pop("_ply_raw", {}).get("vertex", {}).get("data")
    for name in ("red", "green", "blue"):
        column = _column(raw, name)
        if column is not None and not np.isfinite(column).all():
            raise UserError("a vertex has a colour that is not finite")
    if part.visual.kind != "texture":
        return
    uv, image = part.visual.uv, texture_of(part.visual.material)
    if image is not None and uv is None:
        raise UserError("it has a texture, and no coordinates that say where it lies")
    if image is not None and (len(uv) != count or not (np.abs(uv[faces]) < MAX_UV).all()):
        raise UserError("its texture coordinates are not finite, too large, or not one a vertex")


def _column(raw, name: str):
    if raw is None or name not in (raw if isinstance(raw, dict) else raw.dtype.names or ()):
        return None
    return np.asarray(raw[name], float)


def texture_of(material) -> Image.Image | None:
    """The picture that colours a trimesh material, if one does."""
    if hasattr(material, "baseColorTexture"):
        return material.baseColorTexture
    return getattr(material, "image", None)


def unit_rgb(colors: np.ndarray) -> np.ndarray:
    """Integer (0..255, or 0..65535 of uint16) or float (0..1) colours [..., 3 or 4] ->
    float32 [..., 3] in 0..1.
    """
    whole = np.issubdtype(colors.dtype, np.integer)
    scale = (65535 if colors.dtype == np.uint16 else 255) if whole else 1
    return np.asarray(colors[..., :3], np.float32) / scale


def srgb(colors: np.ndarray) -> np.ndarray:
    """As `unit_rgb`, of colours that are linear."""
    linear = unit_rgb(colors)
    curved = 1.055 * linear ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curved).astype(np.float32)
