"""Cameras, orbits and rays: the one place that states this project's conventions.

World    right-handed, z up; the object is centred and fits the unit ball.
Camera   OpenCV axes: x right, y down, z forward.
         `viewmats` map world to camera: x_cam = R x_world + t.
Pixels   the centre of pixel (row i, column j) is (u, v) = (j + 0.5, i + 0.5);
         K is in pixels.
Angles   degrees, in every function. At azimuth a, elevation e and distance r the
         camera stands at r (cos e cos a, cos e sin a, sin e), looks at the origin,
         and has +z up in its image. SV3D's polar angle is 90 - elevation.
Depth    z-depth: the camera-space z of the surface, not the length of the ray.

With the defaults (field of view 33.8 degrees as in SV3D's training renders, distance
3.509) a ball of radius 1 just fills the frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .system.errors import UserError

FOV_DEG = 33.8
DISTANCE = 3.509
AZIMUTH_SIGN = 1.0  # + is counter-clockwise seen from above, as in SV3D's own videos


@dataclass
class Cameras:
    """A batch of V pinhole cameras that share one image size.

    viewmats: [V, 4, 4] world-to-camera, OpenCV axes.
    Ks: [V, 3, 3] intrinsics in pixels.
    """

    viewmats: Tensor
    Ks: Tensor
    width: int
    height: int

    def __post_init__(self):
        views = self.viewmats.shape[0] if self.viewmats.ndim == 3 else None
        if views is None or self.viewmats.shape != (views, 4, 4) or self.Ks.shape != (views, 3, 3):
            raise ValueError(
                "Cameras need viewmats [V, 4, 4] and Ks [V, 3, 3]; "
                f"got {tuple(self.viewmats.shape)} and {tuple(self.Ks.shape)}."
            )

    def __len__(self) -> int:
        return self.viewmats.shape[0]

    def __getitem__(self, index) -> Cameras:
        """Always a batch; `index` is an int, a slice, a list or a tensor."""
        index = torch.as_tensor(index).reshape(-1) if isinstance(index, int | Tensor) else index
        return Cameras(self.viewmats[index], self.Ks[index], self.width, self.height)

    def to(self, *args, **kwargs) -> Cameras:
        return Cameras(
            self.viewmats.to(*args, **kwargs), self.Ks.to(*args, **kwargs), self.width, self.height
        )

    def c2w(self) -> Tensor:
        """Camera-to-world matrices [V, 4, 4]."""
        return invert_rigid(self.viewmats)

    def positions(self) -> Tensor:
        """Camera centres in the world [V, 3]."""
        return self.c2w()[:, :3, 3]

    def resized(self, width: int, height: int) -> Cameras:
        """The same cameras at another resolution; centres at +0.5 need no offset."""
        scale = self.Ks.new_tensor([width / self.width, height / self.height, 1.0])
        return Cameras(self.viewmats, self.Ks * scale[:, None], width, height)


def invert_rigid(matrix: Tensor) -> Tensor:
    """Inverse of rigid transforms [..., 4, 4], exactly: (R, t) -> (R^T, -R^T t)."""
    inverse = torch.zeros_like(matrix)
    rotation = matrix[..., :3, :3].mT
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3:] = -rotation @ matrix[..., :3, 3:]
    inverse[..., 3, 3] = 1.0
    return inverse


def intrinsics(size: int, fov_deg: float = FOV_DEG) -> Tensor:
    """K [3, 3] of a square image: f = size / (2 tan(fov / 2)), centred."""
    focal = size / (2 * math.tan(math.radians(fov_deg) / 2))
    rows = [[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float32)


def look_at(positions: Tensor) -> Tensor:
    """World-to-camera matrices [V, 4, 4] of cameras at `positions` [V, 3].

    They look at the origin with +z up. Raises UserError for a position straight above
    or below it, where up has no meaning.
    """
    sideways = positions[:, :2].norm(dim=-1) / positions.norm(dim=-1)
    if not (sideways > 1e-6).all():
        raise UserError(
            "A camera straight above or below the object has no defined up; "
            "keep |elevation| < 90 degrees."
        )
    return _facing_origin(positions)


def _facing_origin(positions: Tensor) -> Tensor:
    """`look_at` without its check."""
    forward = -torch.nn.functional.normalize(positions, dim=-1)
    up = positions.new_tensor([0.0, 0.0, 1.0]).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], dim=-2)  # rows: camera axes in the world
    viewmats = torch.zeros(len(positions), 4, 4, dtype=positions.dtype)
    viewmats[:, :3, :3] = rotation
    viewmats[:, :3, 3:] = -rotation @ positions[..., None]
    viewmats[:, 3, 3] = 1.0
    return viewmats


def orbit_cameras(
    azimuths_deg, elevations_deg, size: int, distance: float = DISTANCE, fov_deg: float = FOV_DEG
) -> Cameras:
    """Cameras on a sphere around the origin; square images of `size` pixels.

    azimuths_deg: [V].  elevations_deg: [V] or one number.
    Raises UserError for elevations that are not between -90 and 90 degrees.
    """
    azimuths = torch.as_tensor(azimuths_deg, dtype=torch.float64).reshape(-1)
    elevations = torch.as_tensor(elevations_deg, dtype=torch.float64).expand_as(azimuths)
    if not (elevations.abs() < 90).all():
        raise UserError(
            f"Elevations lie between -90 and 90 degrees, both excluded; got {elevations_deg}."
        )
    return sphere_cameras(azimuths, elevations, size, distance, fov_deg)


def sphere_cameras(
    azimuths: Tensor, elevations: Tensor, size: int,
    distance: float = DISTANCE, fov_deg: float = FOV_DEG,
) -> Cameras:  # fmt: skip
    """`orbit_cameras` of angles [V] in degrees that are already checked.

    It never looks at the numbers, so `cluster/plan.py` can call it on tensors without
    any.
    """
    azimuth = torch.deg2rad(AZIMUTH_SIGN * azimuths.double())
    elevation = torch.deg2rad(elevations.double())
    horizontal = elevation.cos()
    directions = [horizontal * azimuth.cos(), horizontal * azimuth.sin(), elevation.sin()]
    viewmats = _facing_origin(distance * torch.stack(directions, dim=-1)).float()
    return Cameras(viewmats, intrinsics(size, fov_deg).repeat(len(viewmats), 1, 1), size, size)


def batch_cameras(azimuth: Tensor, elevation: Tensor, size: int) -> list[Cameras]:
    """Angles [B, V] in degrees -> B batches of V cameras, on the angles' device."""
    pairs = zip(azimuth.cpu(), elevation.cpu())
    return [sphere_cameras(a, e, size).to(azimuth.device) for a, e in pairs]


def sv3d_angles(azimuth: Tensor, elevation: Tensor) -> tuple[Tensor, Tensor]:
    """SV3D's polar angle (90 degrees - elevation) and azimuth: degrees -> radians."""
    return torch.deg2rad(90 - elevation), torch.deg2rad(azimuth)


def sv3d_azimuths(num_frames: int) -> Tensor:
    """SV3D's static orbit [N] in degrees: even, the condition view LAST, at 0."""
    return torch.linspace(0, 360, num_frames + 1)[1:] % 360


def ray_grid(cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rays through the pixel centres of an H x W grid laid over each image.

    Returns origins and unit directions [V, H, W, 3] in the world. H and W need not be
    the image's own size: latents and tokens use this function too. Their centres are at
    (i + 0.5) / H; several public relatives are off by half a pixel here.
    """
    grid = cameras.resized(width, height)
    rows, columns = (torch.arange(n).to(grid.Ks) + 0.5 for n in (height, width))
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    fx, fy, cx, cy = (grid.Ks[:, a, b, None, None] for a, b in ((0, 0), (1, 1), (0, 2), (1, 2)))
    x = (u - cx) / fx
    y = (v - cy) / fy
    local = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    c2w = grid.c2w()
    directions = torch.einsum("vij,vhwj->vhwi", c2w[:, :3, :3], local)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    return c2w[:, None, None, :3, 3].expand_as(directions), directions


def read_at(points: Tensor, picture: Tensor, camera: Cameras) -> tuple[Tensor, Tensor]:
    """World points [P, 3] -> depth [P] in one camera, and value [P] of their pixel.

    picture: [H, W, 1]; a point outside of it gets 0.
    """
    local = points @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]
    u, v = ((local @ camera.Ks[0].T) / local[:, 2:])[:, :2].unbind(-1)
    inside = (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    rows = v.clamp(0, camera.height - 1).long()
    columns = u.clamp(0, camera.width - 1).long()
    return local[:, 2], picture[rows, columns, 0] * inside


def pluecker_rays(cameras: Cameras, height: int, width: int) -> Tensor:
    """Plücker coordinates cat(o x d, d) [V, H, W, 6] of `ray_grid`.

    They describe a ray as a line, whatever its origin on it.
    """
    origins, directions = ray_grid(cameras, height, width)
    return torch.cat([torch.linalg.cross(origins, directions), directions], dim=-1)


# ------------------------------------------------- converters, tested as round trips

_FLIP_YZ = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


def opencv_to_opengl(c2w: Tensor) -> Tensor:
    """Camera-to-world [..., 4, 4], OpenCV axes -> OpenGL's (y up, z backward)."""
    return c2w @ _FLIP_YZ.to(c2w)


def opengl_to_opencv(c2w: Tensor) -> Tensor:
    """The inverse of `opencv_to_opengl`; the flip of two axes is its own inverse."""
    return c2w @ _FLIP_YZ.to(c2w)


def to_blender(cameras: Cameras) -> Tensor:
    """Blender's `matrix_world` [V, 4, 4]: OpenGL camera axes, and z up like ours."""
    return opencv_to_opengl(cameras.c2w())


def from_blender(matrix_world: Tensor, Ks: Tensor, width: int, height: int) -> Cameras:
    """Cameras from Blender's `matrix_world` [V, 4, 4] and K [V, 3, 3] in pixels."""
    return from_c2w(opengl_to_opencv(matrix_world), Ks, width, height)


def from_c2w(c2w: Tensor, Ks: Tensor, width: int, height: int) -> Cameras:
    """Cameras from OpenCV camera-to-world matrices [V, 4, 4], as datasets have."""
    return Cameras(invert_rigid(c2w), Ks, width, height)


def to_opengl_view(cameras: Cameras) -> Tensor:
    """OpenGL view matrices [V, 4, 4] in a y-up world, as WebGL viewers expect.

    Our world is z up: (x, y, z) becomes (x, z, -y).
    """
    return _FLIP_YZ.to(cameras.viewmats) @ cameras.viewmats @ Y_UP_TO_Z_UP.to(cameras.viewmats)


def from_opengl_view(view: Tensor, Ks: Tensor, width: int, height: int) -> Cameras:
    """The inverse of `to_opengl_view`."""
    return Cameras(_FLIP_YZ.to(view) @ view @ Y_UP_TO_Z_UP.T.to(view), Ks, width, height)


# maps a y-up world (glTF, OpenGL viewers) into our z-up world: (x, y, z) -> (x, -z, y)
Y_UP_TO_Z_UP = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]])
