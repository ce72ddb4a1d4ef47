"""A scene made of 3D Gaussians: the container, its covariances, and the PLY files that splat viewers open.

Everything is *activated*: scales are standard deviations in world units, opacities and colours lie in [0, 1]. Networks
that predict logits apply their activations before they build a `Gaussians`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import MissingFile, UserError
from .paths import atomic_path

# Axes of a PLY file -> rotation from the world (z up) to the file, as matrix rows and as a quaternion of any length.
AXES = {
    "z-up": (((1, 0, 0), (0, 1, 0), (0, 0, 1)), (1, 0, 0, 0)),
    "y-up": (((1, 0, 0), (0, 0, 1), (0, -1, 0)), (1, -1, 0, 0)),
    "y-down": (((1, 0, 0), (0, 0, -1), (0, 1, 0)), (1, 1, 0, 0)),
}
SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / sqrt(4 pi)
MAX_LOG = 110.0  # exp(-110) is 0 in float32, so opacities 0 and 1 and scale 0 become finite numbers that decode exactly
PLY_COLUMNS = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4", "float": "<f4",
    "int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4", "uint32": "<u4", "float32": "<f4",
    "double": "<f8", "float64": "<f8",
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


def multiply_quaternions(a: Tensor, b: Tensor) -> Tensor:
    """The rotation b followed by a, both [..., 4] (w, x, y, z)."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a.unbind(-1), b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


@dataclass(eq=False)
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
        count = self.means.shape[0] if self.means.ndim else "G"
        tails = {"means": [3], "quats": [4], "scales": [3], "opacities": [], "colors": [3]}
        for name, tail in tails.items():
            tensor = getattr(self, name)
            if list(tensor.shape) != [count, *tail]:
                raise ValueError(f"Gaussians.{name} must have shape {[count, *tail]}; got {list(tensor.shape)}.")
            if (tensor.dtype, tensor.device) != (self.means.dtype, self.means.device):
                raise ValueError(
                    f"All tensors of Gaussians share one dtype and device; got means {self.means.dtype} on "
                    f"{self.means.device} and {name} {tensor.dtype} on {tensor.device}."
                )

    def __len__(self) -> int:
        return self.means.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(means, quats, scales, opacities, colors)."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, *args, **kwargs) -> Gaussians:
        """The same scene on another device or in another dtype; arguments as for `Tensor.to`."""
        return Gaussians(*(t.to(*args, **kwargs) for t in self.tensors()))

    def detach(self) -> Gaussians:
        """The same numbers, cut from the autograd graph."""
        return Gaussians(*(t.detach() for t in self.tensors()))

    def select(self, index: Tensor | slice | list) -> Gaussians:
        """Some of the Gaussians, by boolean mask [G], integer index or slice."""
        return Gaussians(*(t[index] for t in self.tensors()))

    def prune(self, min_opacity: float = 1 / 255) -> Gaussians:
        """Without the Gaussians fainter than `min_opacity`; by default those too faint to be drawn at all."""
        return self.select(self.opacities >= min_opacity)

    def check_finite(self, origin: str) -> Gaussians:
        """These Gaussians. Raises ValueError, which names their `origin`, for numbers that are NaN or infinite."""
        for field, tensor in zip(fields(self), self.tensors()):
            if not torch.isfinite(tensor).all():
                raise UserError(f"The {field.name} of {origin} hold NaN or infinite numbers: look for what made them.")
        return self

    @staticmethod
    def concatenate(scenes: list[Gaussians]) -> Gaussians:
        """One scene with the Gaussians of all of them; at least one."""
        if not scenes:
            raise UserError("Gaussians.concatenate needs at least one scene; got an empty list.")
        columns = zip(*(scene.tensors() for scene in scenes), strict=True)
        return Gaussians(*(torch.cat(parts) for parts in columns))

    def covariances(self) -> Tensor:
        """Sigma = R S S^T R^T, [G, 3, 3] in world units squared (3D Gaussian Splatting, eq. 6)."""
        half_axes = rotation_matrices(self.quats) * self.scales[:, None, :]
        return half_axes @ half_axes.mT

    def save_ply(self, path: str | Path, axes: str = "z-up") -> None:
        """Write a binary PLY in the layout of 3D Gaussian Splatting, with spherical harmonics of degree 0.

        It stores float32: position, a zero normal, (colour - 0.5) / SH_C0, the logit of the opacity, the log of the
        scales, and the quaternion. Of neighbouring float32 numbers the one that decodes nearest to the original is
        taken: one round trip changes a value by at most 1e-6, every further one changes nothing. Opacities 0 and 1
        have the logits -110 and 110, which decode to exactly 0 and 1.

        axes: "z-up" (ours), "y-up", or "y-down", which SuperSplat and most web viewers expect. The header states it,
        so `load_ply` brings the scene back to z up. Raises ValueError, and writes nothing, for numbers that are not finite.
        """
        table = _encode(_rotate(self.check_finite("the Gaussians to save"), axes, to_file=True))
        header = ["ply", "format binary_little_endian 1.0", f"comment axes {axes}", f"element vertex {len(table)}"]
        header += [f"property float {name}" for name in PLY_COLUMNS] + ["end_header", ""]
        with atomic_path(path) as temporary:
            temporary.write_bytes("\n".join(header).encode() + table.tobytes())

    @staticmethod
    def load_ply(path: str | Path, axes: str | None = None) -> Gaussians:
        """Read a 3D Gaussian Splatting PLY, ours or another program's, into float32 CPU tensors.

        axes: of the file; by default what its header states, else "z-up". Colour that depends on the direction
        (f_rest_*) is dropped. Raises FileNotFoundError, or ValueError when it is no complete PLY of splats.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFile(f"There is no PLY file at {path}: check the path.")
        table, stated_axes = read_ply_table(path)
        for name in PLY_COLUMNS:
            if name not in table.dtype.names and name not in ("nx", "ny", "nz"):
                raise UserError(f"{path} is a PLY, but not one of Gaussian splats: it has no property {name}.")
        return _rotate(_decode(table).check_finite(str(path)), axes or stated_axes, to_file=False)


def read_ply_table(path: Path) -> tuple[np.ndarray, str]:
    """The vertices of a binary PLY as a structured array, bit for bit, and the axes that its header states."""
    data = path.read_bytes()
    head, end, body = data.partition(b"end_header\n")
    if not data.startswith(b"ply") or not end:
        raise UserError(f"{path} is not a PLY file, or it is cut off inside its header.")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()[1:]]
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise UserError(f"{path} is not a binary little-endian PLY: export it again in that format.")
    try:
        count, dtype, axes = _parse_header(lines)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a header that is not that of a table of numbers ({error}).") from error
    if len(body) < count * dtype.itemsize:
        raise UserError(f"{path} is cut off: its {count} splats take {count * dtype.itemsize} bytes; got {len(body)}.")
    return np.frombuffer(body, dtype, count), axes


def _parse_header(lines: list[list[str]]) -> tuple[int, np.dtype, str]:
    """Number of vertices, their record, and the axes; the vertices come first, and what follows them is not read."""
    axes = next((words[2] for words in lines if words[:2] == ["comment", "axes"]), "z-up")
    elements = [i for i, words in enumerate(lines) if words[:1] == ["element"]]
    first, after = elements[0], (elements + [len(lines)])[1]
    if lines[first][1] != "vertex":
        raise UserError("its first element is not vertex")
    properties = [words for words in lines[first:after] if words[:1] == ["property"]]
    return int(lines[first][2]), np.dtype([(words[2], PLY_TYPES[words[1]]) for words in properties]), axes


def _rotate(gaussians: Gaussians, axes: str, to_file: bool) -> Gaussians:
    """From our axes to those of a file, or back."""
    if axes not in AXES:
        raise UserError(f"axes must be one of {', '.join(AXES)}; got {axes!r}.")
    if axes == "z-up":
        return gaussians  # leaves every bit as it is
    matrix, quat = (torch.tensor(values).to(gaussians.means) for values in AXES[axes])
    if not to_file:
        matrix, quat = matrix.T, quat * quat.new_tensor([1, -1, -1, -1])
    quats = multiply_quaternions(torch.nn.functional.normalize(quat, dim=0), gaussians.quats)
    return Gaussians(gaussians.means @ matrix.T, quats, *gaussians.tensors()[2:])


# ----------------------------------------------------------------------------- stored numbers <-> activated values
# Computed in float64, so that the one rounding to float32 at the end decides.


def _color(stored: np.ndarray) -> np.ndarray:
    return np.maximum(0.5 + SH_C0 * stored, 0)  # clamped as splat viewers do, so that black stays exactly 0


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
    """float32 numbers near encode(values): of three neighbours the one whose decoded float32 is nearest to `values`."""
    centre = encode(values.astype(np.float64)).astype(np.float32)
    neighbours = np.stack([centre, np.nextafter(centre, np.float32(-np.inf)), np.nextafter(centre, np.float32(np.inf))])
    decoded = decode(neighbours.astype(np.float64)).astype(np.float32).astype(np.float64)
    nearest = np.abs(decoded - values).argmin(0)  # the centre, if several are
    return np.take_along_axis(neighbours, nearest[None], 0)[0]


def _encode(gaussians: Gaussians) -> np.ndarray:
    """Activated values -> what a file stores, float32 [G, 17] in the order of PLY_COLUMNS."""
    tensors = gaussians.to("cpu", torch.float32).detach().tensors()
    means, quats, scales, opacities, colors = (t.numpy() for t in tensors)
    dc = _store(colors, _color_inverse, _color)
    logits = _store(opacities[:, None], _logit, _sigmoid)
    log_scales = _store(scales, _log, np.exp)
    return np.concatenate([means, np.zeros_like(means), dc, logits, log_scales, quats], 1).astype("<f4")


def _decode(table: np.ndarray) -> Gaussians:
    """The inverse of `_encode`, from a structured array [G]."""

    def columns(*names: str) -> np.ndarray:
        return np.stack([table[name] for name in names], -1).astype(np.float64)

    means, quats = columns("x", "y", "z"), columns("rot_0", "rot_1", "rot_2", "rot_3")
    scales = np.exp(columns("scale_0", "scale_1", "scale_2"))
    opacities, colors = _sigmoid(columns("opacity"))[:, 0], _color(columns("f_dc_0", "f_dc_1", "f_dc_2"))
    arrays = means, quats, scales, opacities, colors
    return Gaussians(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))
