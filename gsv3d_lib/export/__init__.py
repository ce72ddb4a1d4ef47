"""What leaves the project: turntables, .splat files, or all at once.

PLY is in `ply`, meshes are in `mesh`, the viewer is in `page`.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..cameras import orbit_cameras
from ..gaussians import Gaussians, turn_axes
from ..rendering import render
from ..system.errors import UserError, machine_fault
from ..system.paths import atomic_path, reason
from .page import Item, save_page
from .page import save_viewer_page as save_viewer_page

SPLAT_BYTES = 32
FPS = 24  # of a turntable
# What `save_object` writes.
FILES = {
    "splats": "object.ply",
    "mesh": "object.glb",
    "video": "turntable.mp4",
    "gif": "turntable.gif",
    "page": "viewer.html",
}


# ---------------------------------------------------------------- turntables


def save_turntable(
    gaussians: Gaussians,
    mp4_path: str | Path | None = None,
    gif_path: str | Path | None = None,
    size: int = 256,
    num_frames: int = 48,
    elevation: float = 15.0,
    fps: int = FPS,
) -> None:
    """One turn around the object on white, as an H.264 video, an endless GIF, or both.

    The first frame looks from azimuth 0, which is the condition view, and azimuth
    grows. A file that cannot be written is said after the other was.
    size: pixels a side, even (H.264 halves the colour's resolution).
    elevation: degrees.
    """
    if mp4_path is None and gif_path is None:
        raise UserError("A turntable needs a path to write to: give mp4_path, gif_path, or both.")
    if size < 2 or size % 2 or num_frames < 1:
        given = f"{size} pixels, {num_frames} frames"
        raise UserError(f"A turntable needs an even size and at least one frame, got {given}.")
    frames = turntable_frames(gaussians, size, num_frames, elevation)
    writers = {}
    if mp4_path is not None:
        writers[Path(mp4_path)] = partial(_write_mp4, frames, fps=fps)
    if gif_path is not None:
        writers[Path(gif_path)] = partial(_write_gif, frames, fps=fps)
    write_all(writers)


def turntable_frames(
    gaussians: Gaussians, size: int = 256, num_frames: int = 48, elevation: float = 15.0
) -> np.ndarray:
    """uint8 [num_frames, size, size, 3], azimuths 360 k / num_frames."""
    azimuths = torch.arange(num_frames) * (360 / num_frames)
    cameras = orbit_cameras(azimuths, elevation, size)
    with torch.no_grad():
        # 8: bounds memory
        views = [render(gaussians, cameras[i : i + 8]).rgb.cpu() for i in range(0, num_frames, 8)]
    return (torch.cat(views).clamp(0, 1) * 255).round().byte().numpy()


def _write_mp4(frames: np.ndarray, path: Path, fps: int) -> None:
    with atomic_path(path) as temporary:
        try:
            written = _encode_mp4(frames, temporary.absolute(), fps)
        except (ImportError, OSError, RuntimeError) as error:  # no ffmpeg, or one that gave up
            advice = "`pip install imageio-ffmpeg` brings one, IMAGEIO_FFMPEG_EXE names another"
            failed = f"{path} needs ffmpeg, which failed ({reason(error)})"
            raise UserError(f"{failed}: {advice}; or the disk is full.") from error
        if written != len(frames):
            part = f"{written} of the {len(frames)} frames"
            raise UserError(f"ffmpeg wrote {part} of {path}: is the disk full?")


def _encode_mp4(frames: np.ndarray, path: Path, fps: int) -> int:
    """Returns how many frames were written: a full disk is no error to ffmpeg.

    path: absolute, or ffmpeg would take the a of "a:b" for a protocol.
    """
    import imageio_ffmpeg

    height, width = frames.shape[1:3]
    # the format, because a name that ends in .tmp says nothing
    how = {"quality": 8, "macro_block_size": 2}
    how["output_params"] = ["-f", "mp4", "-movflags", "+faststart"]
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, **how)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    try:
        return imageio_ffmpeg.count_frames_and_secs(path)[0]
    except RuntimeError:  # what ffmpeg cannot read it has not written
        return 0


def _write_gif(frames: np.ndarray, path: Path, fps: int) -> None:
    # One palette for all frames, or colours would flicker. No dithering: it adds noise
    # that moves and triples the file.
    montage = Image.fromarray(np.concatenate(list(frames[:: max(1, len(frames) // 8)])))
    palette = montage.quantize(255, method=Image.Quantize.MEDIANCUT)
    images = [_with_palette(frame, palette) for frame in frames]
    duration = max(20, round(1000 / fps))  # milliseconds; browsers slow down anything shorter
    data = io.BytesIO()
    moving = {"save_all": True, "append_images": images[1:], "duration": duration, "loop": 0}
    images[0].save(data, format="GIF", **moving)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.getvalue())


def _with_palette(frame: np.ndarray, palette: Image.Image) -> Image.Image:
    """uint8 [H, W, 3] -> palette image; white gets an entry, or it would turn grey."""
    indices = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
    indices[(frame == 255).all(axis=-1)] = 255
    image = Image.fromarray(indices, "P")
    image.putpalette([*palette.getpalette(), *[255] * 768][: 255 * 3] + [255, 255, 255])
    return image


# ---------------------------------------------------------------- .splat


def save_splat(gaussians: Gaussians, path: str | Path) -> None:
    """Write a .splat file as web viewers read it: y down, the most visible first."""
    turned = turn_axes(gaussians, "y-down", to_file=True)
    visibility = gaussians.opacities * gaussians.scales.prod(dim=-1)
    with atomic_path(path) as temporary:
        temporary.write_bytes(pack_splats(turned.select(visibility.argsort(descending=True))))


def pack_splats(gaussians: Gaussians) -> bytes:
    """32 bytes per Gaussian, little endian.

    Mean and scale as 3 + 3 float32, RGBA and quaternion as 4 + 4 bytes. A byte holds a
    colour or opacity c as 255 c, and a component q of the unit quaternion (w, x, y, z)
    as 128 q + 128.
    """
    tensors = gaussians.check("the Gaussians to save").tensors()
    means, quats, scales, opacities, colors = (t.detach().cpu().float().numpy() for t in tensors)
    unit = quats / np.maximum(np.linalg.norm(quats, axis=-1, keepdims=True), 1e-12)
    rgba = np.round(255 * np.column_stack([colors, opacities]).clip(0, 1)).astype(np.uint8)
    rotation = np.round(128 * unit + 128).clip(0, 255).astype(np.uint8)
    floats = np.hstack([means, scales]).astype("<f4").view(np.uint8)
    return np.hstack([floats, rgba, rotation]).tobytes()


# ---------------------------------------------------------------- everything at once


def write_all(writers: dict[Path, Callable[[Path], None]]) -> None:
    """Call every writer with its path, whatever happens to the others.

    Raises UserError at the end, in one sentence, for those that the user or the machine
    kept from writing; a bug of ours stops at once.
    """
    faults: dict[str, list[str]] = {}  # why -> what was not written
    written = []
    for path, write in writers.items():
        try:
            write(path)
            written.append(str(path))
        except (UserError, OSError) as error:
            said = str(error) if isinstance(error, UserError) else machine_fault(error)
            if said is None:
                raise
            faults.setdefault(said.rstrip(".").replace(str(path), "the file"), []).append(str(path))
    if faults:
        said = "; ".join(f"not written: {', '.join(paths)}: {why}" for why, paths in faults.items())
        raise UserError(f"{said}. Written: {', '.join(written) or 'nothing'}.")


def save_object(
    gaussians: Gaussians,
    folder: str | Path,
    image: torch.Tensor | None = None,
    elevation: float = 15.0,
) -> dict[str, Path]:
    """Write every file a person may want of an object -> the paths by kind.

    Gaussians that no picture shows are left out. object.glb is turned such that the
    side the input saw, +x here, faces a glTF viewer (+z there). image, elevation: of
    the input, which the viewer offers as its source view. Raises as `write_all` does,
    and before it for numbers that describe no Gaussians.
    """
    gaussians = gaussians.check("the Gaussians to save").prune()
    paths = {kind: Path(folder) / name for kind, name in FILES.items()}
    frames = turntable_frames(gaussians)
    writers = {
        "splats": gaussians.save_ply,
        "mesh": partial(_save_front_mesh, gaussians),
        "video": partial(_write_mp4, frames, fps=FPS),
        "gif": partial(_write_gif, frames, fps=FPS),
        "page": partial(save_page, [Item("object", gaussians, image, frames[:1], elevation)]),
    }
    write_all({paths[kind]: write for kind, write in writers.items()})
    return paths


def _save_front_mesh(gaussians: Gaussians, path: Path) -> None:
    from .mesh import fuse_mesh, save_mesh

    mesh = fuse_mesh(gaussians)
    x, y, z = mesh.vertices.T
    # a quarter turn: `save_mesh` takes -y for the front
    mesh.vertices = np.column_stack([y, -x, z])
    save_mesh(mesh, path)
