"""What leaves the project: turntable videos, a stand-alone viewer page, .splat files (PLY is in `gaussians`), pruned."""

import base64
import html
import json
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .cameras import DISTANCE, FOV_DEG, orbit_cameras
from .errors import MissingFile, UserError
from .gaussians import Gaussians
from .paths import atomic_path
from .rendering import render

SPLAT_BYTES = 32


# ---------------------------------------------------------------- turntables


def save_turntable(
    gaussians: Gaussians,
    mp4_path: str | Path | None = None,
    gif_path: str | Path | None = None,
    size: int = 256,
    num_frames: int = 48,
    elevation: float = 15.0,
    fps: int = 24,
) -> None:
    """One turn around the object on white, as an H.264 video and / or a GIF that repeats for ever.

    size: pixels a side, even (H.264 halves the colour's resolution).  elevation: degrees.  The first frame looks
    from azimuth 0, which is the condition view, and azimuth grows. Raises ValueError for an odd size or no path.
    """
    if mp4_path is None and gif_path is None:
        raise UserError("A turntable needs a path to write to: give mp4_path, gif_path, or both.")
    if size < 2 or size % 2 or num_frames < 1:
        raise UserError(
            f"A turntable needs an even size and at least one frame, got {size} pixels, {num_frames} frames."
        )
    frames = turntable_frames(gaussians, size, num_frames, elevation)
    if mp4_path is not None:
        _write_mp4(frames, Path(mp4_path), fps)
    if gif_path is not None:
        _write_gif(frames, Path(gif_path), fps)


def turntable_frames(gaussians: Gaussians, size: int, num_frames: int, elevation: float = 15.0) -> np.ndarray:
    """uint8 [num_frames, size, size, 3], azimuths 360 k / num_frames."""
    azimuths = torch.arange(num_frames) * (360 / num_frames)
    cameras = orbit_cameras(azimuths, elevation, size)
    with torch.no_grad():
        views = [render(gaussians, cameras[i : i + 8]).rgb.cpu() for i in range(0, num_frames, 8)]  # 8: bounds memory
    return (torch.cat(views).clamp(0, 1) * 255).round().byte().numpy()


def _write_mp4(frames: np.ndarray, path: Path, fps: int) -> None:
    import imageio_ffmpeg

    height, width = frames.shape[1:3]
    with atomic_path(path) as temporary:  # its name does not end in .mp4, so the container is named explicitly
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            quality=8,
            macro_block_size=2,
            output_params=["-f", "mp4", "-movflags", "+faststart"],
        )
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        try:
            written, _ = imageio_ffmpeg.count_frames_and_secs(temporary)
        except RuntimeError:  # what ffmpeg cannot read it has not written
            written = 0
        if written != len(frames):
            raise OSError(f"ffmpeg wrote {written} of the {len(frames)} frames of {path}: is the disk full?")


def _write_gif(frames: np.ndarray, path: Path, fps: int) -> None:
    # One palette for all frames, or colours would flicker. No dithering: it adds noise that moves and triples the file.
    montage = Image.fromarray(np.concatenate(list(frames[:: max(1, len(frames) // 8)])))
    palette = montage.quantize(255, method=Image.Quantize.MEDIANCUT)
    images = [_with_palette(frame, palette) for frame in frames]
    duration = max(20, round(1000 / fps))  # milliseconds; browsers slow down anything shorter
    with atomic_path(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)


def _with_palette(frame: np.ndarray, palette: Image.Image) -> Image.Image:
    """uint8 [H, W, 3] -> palette image; the background gets an entry of its own, or its white would turn grey."""
    indices = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
    indices[(frame == 255).all(axis=-1)] = 255
    image = Image.fromarray(indices, "P")
    image.putpalette([*palette.getpalette(), *[255] * 768][: 255 * 3] + [255, 255, 255])
    return image


# ---------------------------------------------------------------- the viewer page and .splat


def save_viewer_page(
    gaussians: Gaussians,
    html_path: str | Path,
    title: str = "GSV3D",
    azimuth: float = 0.0,
    elevation: float = 15.0,
) -> None:
    """One HTML file that shows the Gaussians in any browser with WebGL 2: drag, wheel, touch, arrow keys.

    It loads nothing, so it works offline and from file://. 43 bytes per Gaussian plus 13 kB; Gaussians that the
    renderer never draws are left out. azimuth, elevation: of the first view, degrees; page.html#azimuth=90 opens
    another.
    """
    splats = base64.b64encode(pack_splats(gaussians.prune())).decode()
    view = {"azimuth": azimuth, "elevation": elevation, "distance": DISTANCE, "fov": FOV_DEG}
    page = resources.files(__package__).joinpath("viewer.html").read_text(encoding="utf-8")
    for name, value in {"TITLE": html.escape(title), "VIEW": json.dumps(view), "SPLATS": splats}.items():
        page = page.replace(f"__{name}__", value)
    with atomic_path(html_path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def save_splat(gaussians: Gaussians, path: str | Path) -> None:
    """Write a .splat file (32 bytes per Gaussian) as web viewers read it: y down, the most visible ones first."""
    x, y, z = gaussians.means.unbind(-1)
    w, i, j, k = gaussians.quats.unbind(-1)
    turned = Gaussians(
        torch.stack([x, -z, y], dim=-1),  # a quarter turn about x: quaternion (1, 1, 0, 0) / sqrt 2 from the left
        torch.stack([w - i, w + i, j - k, j + k], dim=-1),
        *gaussians.tensors()[2:],
    )
    visibility = gaussians.opacities * gaussians.scales.prod(dim=-1)
    with atomic_path(path) as temporary:
        temporary.write_bytes(pack_splats(turned.select(visibility.argsort(descending=True))))


def load_splat(path: str | Path) -> Gaussians:
    """Read a .splat file (y down, as `save_splat` and web tools write it) into our z-up world, float32 on the CPU.

    Colours and opacities come back to 1 / 510, unit quaternions to 1 / 128 per component, the rest exactly. Raises
    FileNotFoundError, or ValueError where the file is cut off or holds numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"There is no .splat file at {path}: check the path.")
    data = path.read_bytes()
    if len(data) % SPLAT_BYTES:
        raise UserError(f"{path} is cut off, or no .splat file: {len(data)} bytes are no multiple of {SPLAT_BYTES}.")
    records = np.frombuffer(data, np.uint8).reshape(-1, SPLAT_BYTES)
    floats = torch.from_numpy(records[:, :24].copy().view("<f4").astype(np.float32))
    rgba, quats = torch.from_numpy(records[:, 24:28] / np.float32(255)), torch.from_numpy(records[:, 28:] / 128.0 - 1)
    x, y, z = floats[:, :3].unbind(-1)
    w, i, j, k = quats.float().unbind(-1)
    return Gaussians(
        torch.stack([x, z, -y], dim=-1),  # the quarter turn of `save_splat`, back
        torch.stack([w + i, i - w, j + k, k - j], dim=-1),
        floats[:, 3:],
        rgba[:, 3],
        rgba[:, :3],
    ).check_finite(str(path))


def pruning_cost(
    gaussians: Gaussians, min_opacity: float, size: int = 128, num_views: int = 8, elevation: float = 15.0
) -> tuple[float, float]:
    """What `gaussians.prune(min_opacity)` saves and costs: (share of the Gaussians that stay, PSNR in dB of `num_views`
    renderings against those of all of them). The PSNR is infinite where no pixel changes."""
    pruned = gaussians.prune(min_opacity)
    cameras = orbit_cameras(torch.arange(num_views) * (360 / num_views), elevation, size)
    with torch.no_grad():
        error = (render(pruned, cameras).rgb - render(gaussians, cameras).rgb).pow(2).mean()
    return len(pruned) / max(1, len(gaussians)), float(-10 * torch.log10(error))


def pack_splats(gaussians: Gaussians) -> bytes:
    """32 bytes per Gaussian, little endian: mean and scale as 3 + 3 float32, RGBA and quaternion as 4 + 4 bytes.

    A byte holds a colour or opacity c as 255 c, and a component q of the unit quaternion (w, x, y, z) as
    128 q + 128. Raises ValueError for numbers that are not finite.
    """
    tensors = gaussians.check_finite("the Gaussians to save").tensors()
    means, quats, scales, opacities, colors = (t.detach().cpu().float().numpy() for t in tensors)
    unit = quats / np.maximum(np.linalg.norm(quats, axis=-1, keepdims=True), 1e-12)
    rgba = np.round(255 * np.column_stack([colors, opacities]).clip(0, 1)).astype(np.uint8)
    rotation = np.round(128 * unit + 128).clip(0, 255).astype(np.uint8)
    return np.hstack(
        [means.astype("<f4").view(np.uint8), scales.astype("<f4").view(np.uint8), rgba, rotation]
    ).tobytes()


# ---------------------------------------------------------------- everything at once


def save_object(gaussians: Gaussians, folder: str | Path) -> dict[str, Path]:
    """Write every file a person may want of a generated object; returns the paths by kind.

    object.ply has y down, as splat viewers expect. object.glb is turned such that the side the input saw, +x here, faces
    a glTF viewer (+z there).
    """
    from .mesh import fuse_mesh, save_mesh

    folder = Path(folder)
    names = {"splats": "object.ply", "mesh": "object.glb", "video": "turntable.mp4", "gif": "turntable.gif"}
    paths = {kind: folder / name for kind, name in names.items()} | {"page": folder / "viewer.html"}
    folder.mkdir(parents=True, exist_ok=True)
    gaussians.save_ply(paths["splats"], axes="y-down")
    save_turntable(gaussians, paths["video"], paths["gif"])
    save_viewer_page(gaussians, paths["page"])
    mesh = fuse_mesh(gaussians)
    x, y, z = mesh.vertices.T
    mesh.vertices = np.column_stack([y, -x, z])  # a quarter turn: `save_mesh` takes -y for the front
    save_mesh(mesh, paths["mesh"])
    return paths
