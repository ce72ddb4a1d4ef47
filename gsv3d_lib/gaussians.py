"""A scene made of 3D Gaussians: the container, its covariances, and the PLY files that splat viewers open.

Everything is *activated*: scales are standard deviations in world units, opacities and colours lie in [0, 1]. Networks
that predict logits apply their activations before they build a `Gaussians`.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# PLY axes -> rotation (world z-up -> file), rows are the file's axes. Ours is z-up; most splat viewers expect y-down.
AXES = {
    "z-up": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "y-up": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "y-down": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
}
_AXES_QUATS = {"z-up": (1, 0, 0, 0), "y-up": (1, -1, 0, 0), "y-down": (1, 1, 0, 0)}  # same rotations, any length

_SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / sqrt(4 pi)
_MAX_LOG = 110.0  # exp(-110) is 0 in float32, so opacities 0 and 1 and scale 0 survive as finite numbers
_PLY_COLUMNS = (
    "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
)
_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4", "float": "<f4",
    "double": "<f8", "int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4", "uint32": "<u4",
    "float32": "<f4", "float64": "<f8",
}  # fmt: skip


def rotation_matrices(quats: Tensor) -> Tensor:
    """Quaternions [..., 4] (w, x, y, z; any non-zero length) to rotation matrices [..., 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@dataclass
class Gaussians:
    """One scene of G Gaussians.

    means: [G, 3] centres, world units.
    quats: [G, 4] rotations as w, x, y, z; any non-zero length.
    scales: [G, 3] standard deviations along the rotated axes, world units, > 0.
    opacities: [G] in [0, 1].
    colors: [G, 3] RGB in [0, 1].

    Raises ValueError when a shape, dtype or device does not fit the others.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor

    def __post_init__(self):
        count = self.means.shape[0] if self.means.dim() else "G"
        expected = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "colors": (3,)}
        for name, tail in expected.items():
            value = getattr(self, name)
            if tuple(value.shape) != (count, *tail):
                raise ValueError(f"Gaussians.{name} must have shape {[count, *tail]}, but has {list(value.shape)}.")
            if (value.dtype, value.device) != (self.means.dtype, self.means.device):
                raise ValueError(
                    f"Gaussians.{name} is {value.dtype} on {value.device}, but means is {self.means.dtype} on "
                    f"{self.means.device}: move all five to one dtype and device."
                )

    def __len__(self) -> int:
        return self.means.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(means, quats, scales, opacities, colors)."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, *args, **kwargs) -> "Gaussians":
        """The same scene on another device or in another dtype; arguments as for `Tensor.to`."""
        return Gaussians(*(t.to(*args, **kwargs) for t in self.tensors()))

    def detach(self) -> "Gaussians":
        """The same numbers, cut from the autograd graph."""
        return Gaussians(*(t.detach() for t in self.tensors()))

    def select(self, index: Tensor | slice | list) -> "Gaussians":
        """Some of the Gaussians, by boolean mask [G], integer index or slice."""
        return Gaussians(*(t[index] for t in self.tensors()))

    def prune(self, min_opacity: float = 1 / 255) -> "Gaussians":
        """Drop Gaussians fainter than `min_opacity`; the default drops only those that the renderer never draws."""
        return self.select(self.opacities >= min_opacity)

    @staticmethod
    def concatenate(scenes: list["Gaussians"]) -> "Gaussians":
        """One scene with the Gaussians of all; at least one scene."""
        if not scenes:
            raise ValueError("Gaussians.concatenate needs at least one scene, but the list is empty.")
        return Gaussians(*(torch.cat(parts) for parts in zip(*(scene.tensors() for scene in scenes))))

    def covariances(self) -> Tensor:
        """Sigma = R S S^T R^T, [G, 3, 3] in world units squared (3D Gaussian Splatting, eq. 6)."""
        half_axes = rotation_matrices(self.quats) * self.scales[:, None, :]
        return half_axes @ half_axes.mT

    def save_ply(self, path: str | Path, axes: str = "z-up") -> None:
        """Write a binary PLY in the layout of 3D Gaussian Splatting, degree 0; see `save_ply` of this module."""
        save_ply(self, path, axes)

    @staticmethod
    def load_ply(path: str | Path, axes: str | None = None) -> "Gaussians":
        """Read a PLY; see `load_ply` of this module."""
        return load_ply(path, axes)


def save_ply(gaussians: Gaussians, path: str | Path, axes: str = "z-up") -> None:
    """Write a binary PLY in the layout of 3D Gaussian Splatting (spherical harmonics of degree 0).

    Stored as float32: position, normal (zero), (colour - 0.5) / C0, logit of the opacity, log of the scales, quaternion.
    Of neighbouring float32 numbers the one that decodes nearest to the original is stored, so one round trip changes
    values by at most 1e-6 and every further one not at all. Opacities 0 and 1 are stored as logits -110 and 110, which
    decode to exactly 0 and 1.

    axes: "z-up" (ours), "y-up", or "y-down" (what SuperSplat and most web viewers expect). It is noted in the header,
    and `load_ply` undoes it.
    """
    table = _encode(_rotated(gaussians, _check_axes(axes), inverse=False))
    header = ["ply", "format binary_little_endian 1.0", f"comment axes {axes}", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in _PLY_COLUMNS] + ["end_header", ""]
    path = Path(path)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    temporary.write_bytes("\n".join(header).encode() + table.tobytes())
    os.replace(temporary, path)


def load_ply(path: str | Path, axes: str | None = None) -> Gaussians:
    """Read a 3D Gaussian Splatting PLY, ours or another program's, into float32 CPU tensors.

    axes: of the file; by default what its header says, and "z-up" where it says nothing. Colour that depends on the
    direction (f_rest_*) is dropped. Raises FileNotFoundError, or ValueError when it is not a complete splat PLY.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no PLY file at {path}: check the path.")
    table, stated_axes = read_ply_table(path)
    missing = [name for name in _PLY_COLUMNS if name not in table.dtype.names and not name.startswith("n")]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}: it is a PLY, but not one of Gaussian splats.")
    return _rotated(_decode(table), _check_axes(axes or stated_axes), inverse=True)


def read_ply_table(path: Path) -> tuple[np.ndarray, str]:
    """The raw vertex table of a binary PLY as a structured array, and the axes its header states."""
    data = path.read_bytes()
    head, marker, body = data.partition(b"end_header\n")
    lines = head.decode("ascii", "replace").split("\n")
    if not marker or lines[0].strip() != "ply":
        raise ValueError(f"{path} is not a complete PLY file: its header is missing or cut off.")
    count, columns, axes = 0, [], "z-up"
    for words in (line.split() for line in lines[1:] if line.strip()):
        if words[0] == "format" and words[1:2] != ["binary_little_endian"]:
            raise ValueError(f"{path} is not a binary little-endian PLY: export it again in that format.")
        elif words[0] == "element" and words[1:2] == ["vertex"]:
            count = int(words[2])
        elif words[0] == "element":
            break  # vertices come first, what follows is not needed
        elif words[0] == "property" and words[1] in _PLY_TYPES:
            columns.append((words[2], _PLY_TYPES[words[1]]))
        elif words[:2] == ["comment", "axes"]:
            axes = words[2]
    dtype = np.dtype(columns)
    if len(body) < count * dtype.itemsize:
        raise ValueError(f"{path} is cut off: {count} vertices need {count * dtype.itemsize} bytes, it has {len(body)}.")
    return np.frombuffer(body, dtype, count), axes


def _check_axes(axes: str) -> str:
    if axes not in AXES:
        raise ValueError(f"axes must be one of {', '.join(AXES)}, but is {axes!r}.")
    return axes


def _rotated(gaussians: Gaussians, axes: str, inverse: bool) -> Gaussians:
    if axes == "z-up":
        return gaussians
    rotation = torch.tensor(AXES[axes]).to(gaussians.means)
    w, x, y, z = _AXES_QUATS[axes]
    means = gaussians.means @ (rotation if inverse else rotation.T)
    a = torch.tensor([w, -x, -y, -z] if inverse else [w, x, y, z])
    return Gaussians(means, _multiply(a.to(means), gaussians.quats), *gaussians.tensors()[2:])


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Quaternion product: first rotate by b [G, 4], then by a [4]."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


# The three curves between stored and activated values, in float64 so that only the final rounding is float32.


def _color(stored):
    return 0.5 + _SH_C0 * stored


def _color_inverse(color):
    return (color - 0.5) / _SH_C0


def _sigmoid(stored):
    return 1 / (1 + np.exp(-stored))


def _logit(opacity):
    with np.errstate(divide="ignore"):
        return np.clip(np.log(opacity) - np.log1p(-opacity), -_MAX_LOG, _MAX_LOG)


def _log(scale):
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(scale), -_MAX_LOG)


def _nearest_stored(values: np.ndarray, encode, decode) -> np.ndarray:
    """The float32 numbers near encode(values) whose decode, rounded to float32, comes nearest to `values`."""
    centre = encode(values.astype(np.float64)).astype(np.float32)
    candidates = np.stack([centre, np.nextafter(centre, np.float32(-np.inf)), np.nextafter(centre, np.float32(np.inf))])
    decoded = decode(candidates.astype(np.float64)).astype(np.float32).astype(np.float64)
    best = np.abs(decoded - values).argmin(0)  # ties go to the centre
    return np.take_along_axis(candidates, best[None], 0)[0]


def _encode(gaussians: Gaussians) -> np.ndarray:
    """Activated values -> the table [G, 17] that a file stores, float32."""
    means, quats, scales, opacities, colors = (
        t.detach().to("cpu", torch.float32).numpy() for t in gaussians.tensors()
    )
    dc = _nearest_stored(colors, _color_inverse, _color)
    logits = _nearest_stored(opacities[:, None], _logit, _sigmoid)
    log_scales = _nearest_stored(scales, _log, np.exp)
    return np.concatenate([means, np.zeros_like(means), dc, logits, log_scales, quats], 1).astype("<f4")


def _decode(table: np.ndarray) -> Gaussians:
    def columns(names: str) -> np.ndarray:
        return np.stack([table[name] for name in names.split()], -1).astype(np.float64)

    arrays = (
        columns("x y z"),
        columns("rot_0 rot_1 rot_2 rot_3"),
        np.exp(columns("scale_0 scale_1 scale_2")),
        _sigmoid(columns("opacity"))[:, 0],
        _color(columns("f_dc_0 f_dc_1 f_dc_2")),
    )
    return Gaussians(*(torch.from_numpy(a.astype(np.float32)) for a in arrays))
