"""A scene made of 3D Gaussians: five tensors, their covariances, and PLY files.

Everything is *activated*: scales are standard deviations in world units, opacities and
colours lie in [0, 1]. Networks that predict logits apply their activations before they
build a `Gaussians`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from .ply import decode, encode, read_splats, write_splats
from .rotations import rotation_matrices
from .system.errors import UserError

# Axes of a PLY file -> rows of the rotation from the world (z up) to the file.
AXES = {
    "z-up": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "y-up": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "y-down": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
}


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
                raise ValueError(
                    f"Gaussians.{name} must have shape {[count, *tail]}; got {list(tensor.shape)}."
                )
            if (tensor.dtype, tensor.device) != (self.means.dtype, self.means.device):
                found = f"means {self.means.dtype} on {self.means.device}"
                raise ValueError(
                    "All tensors of Gaussians share one dtype and device; "
                    f"got {found} and {name} {tensor.dtype} on {tensor.device}."
                )

    def __len__(self) -> int:
        return self.means.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(means, quats, scales, opacities, colors)."""
        return self.means, self.quats, self.scales, self.opacities, self.colors

    def to(self, *args, **kwargs) -> Gaussians:
        """On another device or in another dtype; arguments as for `Tensor.to`."""
        return Gaussians(*(t.to(*args, **kwargs) for t in self.tensors()))

    def detach(self) -> Gaussians:
        """The same numbers, cut from the autograd graph."""
        return Gaussians(*(t.detach() for t in self.tensors()))

    def select(self, index: Tensor | slice | list) -> Gaussians:
        """Some of the Gaussians, by boolean mask [G], integer index or slice."""
        return Gaussians(*(t[index] for t in self.tensors()))

    def prune(self, min_opacity: float = 1 / 255) -> Gaussians:
        """Without those fainter than `min_opacity`; by default those never drawn."""
        return self.select(self.opacities >= min_opacity)

    def check_finite(self, origin: str) -> Gaussians:
        """These Gaussians. UserError, naming their `origin`, for NaN and infinity."""
        for field, tensor in zip(fields(self), self.tensors()):
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"The {field.name} of {origin} hold NaN or infinite numbers: "
                    "look for what made them."
                )
        return self

    def check(self, origin: str) -> Gaussians:
        """These Gaussians. UserError, naming their `origin`, for senseless numbers.

        Those are numbers that are not finite, scales below 0, opacities outside of
        [0, 1], and quaternions of length 0.
        """
        self.check_finite(origin)
        if (self.scales < 0).any():
            raise UserError(f"The scales of {origin} hold negative numbers: are they logarithms?")
        if ((self.opacities < 0) | (self.opacities > 1)).any():
            raise UserError(f"The opacities of {origin} do not all lie in [0, 1]: are they logits?")
        if not self.quats.any(-1).all():
            raise UserError(f"The quats of {origin} hold quaternions of length 0.")
        return self

    @staticmethod
    def concatenate(scenes: list[Gaussians]) -> Gaussians:
        """One scene with the Gaussians of all of them; at least one."""
        if not scenes:
            raise UserError("Gaussians.concatenate needs at least one scene; got an empty list.")
        columns = zip(*(scene.tensors() for scene in scenes), strict=True)
        return Gaussians(*(torch.cat(parts) for parts in columns))

    def covariances(self) -> Tensor:
        """Sigma = R S S^T R^T [G, 3, 3], world units squared (3DGS, eq. 6)."""
        half_axes = rotation_matrices(self.quats) * self.scales[:, None, :]
        return half_axes @ half_axes.mT

    def save_ply(self, path: str | Path, axes: str = "y-down") -> None:
        """Write a binary PLY in the layout of 3D Gaussian Splatting (`ply.py`).

        axes: "y-down", which SuperSplat and most viewers expect; "y-up"; or "z-up", our
            own. The header states it, so that `load_ply` brings the scene back to z up.
        Raises UserError, and writes nothing, for numbers that describe no Gaussians.
        """
        stored = self.to("cpu", torch.float32).detach().check("the Gaussians to save")
        turned = turn_axes(stored, axes, to_file=True)
        write_splats(path, encode(*(t.numpy() for t in turned.tensors())), axes)

    @staticmethod
    def load_ply(path: str | Path, axes: str | None = None) -> Gaussians:
        """Read a binary 3D Gaussian Splatting PLY, ours or another's, as float32.

        axes: of the file; by default what its header states, else "z-up": as it stands.
        Colour that depends on the direction (f_rest_*) is dropped. Raises MissingFile,
        or UserError when it is no complete PLY of splats. A file cannot say that its
        scales are logarithms and its opacities logits; a warning says where they do not
        look like that.
        """
        table, stated_axes = read_splats(Path(path))
        stored = Gaussians(*(torch.from_numpy(array) for array in decode(table)))
        return turn_axes(stored.check(str(path)), axes or stated_axes, to_file=False)


def turn_axes(gaussians: Gaussians, axes: str, to_file: bool) -> Gaussians:
    """From our axes to those of a file, or back: numbers change places and signs only.

    An ellipsoid's own axes are named anew with the world's. So its rotation becomes
    T R T^-1, whose quaternion is (w, T v), and not T R, which would round.
    """
    if axes not in AXES:
        raise UserError(f"axes must be one of {', '.join(AXES)}; got {axes!r}.")
    turn = torch.tensor(AXES[axes]).to(gaussians.means)
    turn = turn if to_file else turn.T
    means, quats, scales, opacities, colors = gaussians.tensors()
    quats = torch.cat([quats[:, :1], quats[:, 1:] @ turn.T], dim=-1)
    return Gaussians(means @ turn.T, quats, scales @ turn.T.abs(), opacities, colors)
