"""Files that leave the project must open elsewhere and show what render() shows."""

import errno
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.data.raycast import load_mesh, normalized, render_mesh
from gsv3d_lib.export import (
    FILES,
    SPLAT_BYTES,
    pack_splats,
    save_object,
    save_splat,
    save_turntable,
    save_viewer_page,
    turntable_frames,
)
from gsv3d_lib.export.mesh import fuse_mesh, save_mesh
from gsv3d_lib.gaussians import Gaussians, turn_axes
from gsv3d_lib.rendering import render


def scene(count: int = 600, seed: int = 0) -> Gaussians:
    """Long, flat, overlapping, half-transparent Gaussians of every colour, without any
    symmetry.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    means = (uniform(count, 3) - 0.5) * torch.tensor([1.2, 0.8, 1.0]) + torch.tensor(
        [0.1, -0.1, 0.05]
    )
    return Gaussians(
        means,
        uniform(count, 4) - 0.5,
        0.01 + 0.06 * uniform(count, 3),
        uniform(count),
        uniform(count, 3),
    )


# ---------------------------------------------------------------- turntables


def test_turntable_frames_are_the_rendered_orbit():
    frames = turntable_frames(scene(), 32, 10, elevation=20)
    assert frames.shape == (10, 32, 32, 3) and frames.dtype == np.uint8
    expected = render(scene(), orbit_cameras([324.0], 20.0, 32)).rgb[0]
    assert np.abs(frames[9] / 255 - expected.numpy()).max() <= 0.51 / 255


def test_turntable_files_hold_the_frames(tmp_path):
    import imageio_ffmpeg

    mp4, gif = tmp_path / "out" / "turn.mp4", tmp_path / "out" / "turn.gif"
    save_turntable(scene(), mp4, gif, size=64, num_frames=6, fps=12)
    truth = turntable_frames(scene(), 64, 6).astype(float)

    reader = imageio_ffmpeg.read_frames(str(mp4))
    facts = next(reader)
    video = [np.frombuffer(frame, np.uint8).reshape(64, 64, 3) for frame in reader]
    assert facts["codec"] == "h264" and facts["fps"] == 12 and len(video) == 6
    assert np.abs(np.stack(video) - truth).mean() < 6

    animation = Image.open(gif)
    assert (
        animation.n_frames == 6
        and animation.info["loop"] == 0
        and animation.info["duration"] in (80, 83)
    )
    animation.seek(4)
    frame = np.asarray(animation.convert("RGB"))
    assert np.abs(frame - truth[4]).mean() < 6
    assert (frame[0, 0] == 255).all()  # the background stays white
    assert sorted(p.name for p in mp4.parent.iterdir()) == ["turn.gif", "turn.mp4"]


def test_a_video_that_ffmpeg_did_not_finish_replaces_nothing(tmp_path, monkeypatch):
    """ffmpeg may be killed, or the disk full, without an error that reaches Python."""
    import imageio_ffmpeg

    path = tmp_path / "turn.mp4"
    save_turntable(scene(), path, size=64, num_frames=6)
    good, write_frames = path.read_bytes(), imageio_ffmpeg.write_frames

    def cut_off(target, *args, **options):
        writer = write_frames(target, *args, **options)
        writer.send(None)
        try:
            while True:
                writer.send((yield))
        finally:
            writer.close()
            with open(target, "r+b") as file:
                file.truncate(200)

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", cut_off)
    with pytest.raises(ValueError, match="not written: .*turn.mp4: ffmpeg wrote 0 of the 6 frames"):
        save_turntable(scene(), path, size=64, num_frames=6)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["turn.mp4"]


def test_turntable_arguments(tmp_path):
    with pytest.raises(ValueError, match="give mp4_path, gif_path, or both"):
        save_turntable(scene())
    with pytest.raises(ValueError, match="even size.*got 33 pixels"):
        save_turntable(scene(), tmp_path / "a.mp4", size=33)


# ---------------------------------------------------------------- .splat


def unpack(data: bytes):
    records = np.frombuffer(data, np.uint8).reshape(-1, SPLAT_BYTES)
    floats = records[:, :24].copy().view("<f4")
    return floats[:, :3], floats[:, 3:], records[:, 24:28] / 255, (records[:, 28:] - 128.0) / 128


def load_splat(path) -> Gaussians:
    means, scales, rgba, quats = (
        torch.tensor(part, dtype=torch.float32) for part in unpack(path.read_bytes())
    )
    return turn_axes(
        Gaussians(means, quats, scales, rgba[:, 3], rgba[:, :3]), "y-down", to_file=False
    )


def test_packed_splats_hold_the_gaussians():
    gaussians = scene()
    means, scales, rgba, quats = unpack(pack_splats(gaussians))
    assert (means == gaussians.means.numpy()).all() and (scales == gaussians.scales.numpy()).all()
    assert np.abs(rgba[:, :3] - gaussians.colors.numpy()).max() <= 0.5001 / 255
    assert np.abs(rgba[:, 3] - gaussians.opacities.numpy()).max() <= 0.5001 / 255
    unit = torch.nn.functional.normalize(gaussians.quats, dim=-1).numpy()
    assert np.abs(quats - unit).max() <= 1 / 128
    assert pack_splats(gaussians.select(slice(0, 0))) == b""


def test_splat_file_is_turned_to_y_down_and_sorted(tmp_path):
    gaussians = scene()
    save_splat(gaussians, tmp_path / "a.splat")
    means, scales, rgba, quats = unpack((tmp_path / "a.splat").read_bytes())
    visibility = rgba[:, 3] * scales.prod(axis=1)
    assert (np.diff(visibility) <= 1e-6).all()
    order = (gaussians.opacities * gaussians.scales.prod(-1)).argsort(descending=True)
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # our z becomes -y
    assert np.allclose(means, gaussians.means[order] @ turn.T)
    stored = Gaussians(
        *(
            torch.tensor(a.astype(np.float32))
            for a in (means, quats, scales, rgba[:, 3], rgba[:, :3])
        )
    )
    expected = turn @ gaussians.covariances()[order] @ turn.T
    assert (stored.covariances() - expected).abs().max() < 2e-4


def psnr(a, b) -> float:
    return float(-10 * torch.log10((a - b).pow(2).mean()))


@pytest.mark.parametrize("kind", ["splat", "z-up", "y-up", "y-down"])
def test_files_of_splats_render_as_they_were(tmp_path, kind):
    gaussians, path = scene(), tmp_path / "object"
    if kind == "splat":
        save_splat(gaussians, path)
        back = load_splat(path)
    else:
        gaussians.save_ply(path, axes=kind)
        back = Gaussians.load_ply(path)
    cameras = orbit_cameras([20.0, 140.0, 260.0], [10.0, -20.0, 50.0], 64)
    quality = psnr(render(back, cameras).rgb, render(gaussians, cameras).rgb)
    assert quality > (35 if kind == "splat" else 90)  # bytes for colours and rotations; float32
    other = render(back, orbit_cameras([110.0, 230.0, 350.0], [10.0, -20.0, 50.0], 64)).rgb
    assert psnr(other, render(gaussians, cameras).rgb) < 25  # a quarter turn would be seen


def test_a_glb_is_read_back_and_looks_the_same(tmp_path):
    """Through `load_mesh`, as a mesh of one's own: turned from y up to z up, its linear
    colours made sRGB again.
    """
    means = torch.nn.functional.normalize(
        torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    colors = (means.sign() + 1) / 2 * 0.8 + 0.1  # another colour in every octant
    quats, scales = torch.tensor([1.0, 0, 0, 0]).expand(3000, 4), torch.full((3000, 3), 0.03)
    means = means * torch.tensor([0.7, 0.45, 0.3])
    fused = fuse_mesh(
        Gaussians(means, quats, scales, torch.full((3000,), 0.95), colors),
        48,
        num_views=16,
        size=64,
    )
    save_mesh(fused, tmp_path / "object.glb")
    cameras = orbit_cameras([0.0, 100.0, 215.0], [0.0, 30.0, -20.0], 48)
    back, expected = load_mesh(tmp_path / "object.glb"), normalized(fused)
    (rgba, depth), (true_rgba, true_depth) = (
        render_mesh(mesh, cameras, supersample=1) for mesh in (back, expected)
    )
    assert (depth > 0).sum() > 500 and np.abs(depth - true_depth).max() < 1e-4
    assert np.abs(rgba - true_rgba).max() < 1e-4
    assert np.ptp(rgba[rgba[..., 3] == 1], axis=0)[:3].min() > 0.5  # not white


def test_what_an_object_leaves_out_changes_no_pixel(small, tmp_path):
    """Opacities below 1 / 255 are never drawn, on any backend."""
    gaussians = scene()
    gaussians.opacities[:] = torch.linspace(0, 2 / 255, 600)
    gaussians.opacities[::7] = 0.8
    kept, cameras = gaussians.prune(), orbit_cameras([20.0, 140.0, 260.0], [10.0, -20.0, 50.0], 64)
    assert len(kept) == (gaussians.opacities >= 1 / 255).sum() < 0.6 * len(gaussians)
    for backend, rounding in (("numba", 0), ("torch", 1e-6)):  # torch adds up in another order
        pictures = [render(g, cameras, backend=backend) for g in (gaussians, kept)]
        assert all((a - b).abs().max() <= rounding for a, b in zip(*pictures, strict=True))
    paths = save_object(gaussians, tmp_path)
    back = Gaussians.load_ply(paths["splats"])
    assert torch.equal(back.means, kept.means) and torch.equal(back.quats, kept.quats)
    header = paths["splats"].read_bytes()[:100]
    assert b"comment axes y-down" in header  # upright in viewers


# ---------------------------------------------------------------- everything at once


def shell(count: int = 400) -> Gaussians:
    """A closed surface, quick to mesh."""
    means = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    means = torch.nn.functional.normalize(means, dim=-1) * 0.6
    quats, scales = torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1), torch.full((count, 3), 0.08)
    return Gaussians(means, quats, scales, torch.full((count,), 0.95), torch.full((count, 3), 0.4))


@pytest.fixture
def small(monkeypatch):
    """Videos and meshes of `save_object` that are quick to make."""
    frames, fuse = (
        partial(turntable_frames, size=32, num_frames=4),
        partial(fuse_mesh, resolution=32, num_views=8, size=32),
    )
    monkeypatch.setattr("gsv3d_lib.export.turntable_frames", frames)
    monkeypatch.setattr("gsv3d_lib.export.mesh.fuse_mesh", fuse)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ALL = sorted(FILES.values())


def no_ffmpeg(tmp_path, monkeypatch):
    import imageio_ffmpeg._io

    def get():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg._io, "get_ffmpeg_exe", get)
    return "turntable.mp4", "No ffmpeg exe could be found.*pip install imageio-ffmpeg"


def another_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    return "turntable.mp4", "No such file"


def a_program_that_is_no_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    return "turntable.mp4", "needs ffmpeg|0 of the 4 frames"


def a_folder_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "out" / "object.glb").mkdir(parents=True)
    return "object.glb", "the file is a folder where a file belongs"


def a_full_disk(tmp_path, monkeypatch):
    from pathlib import Path

    write = Path.write_bytes

    def fill(path, data):
        if ".gif" in path.name:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill)
    return "turntable.gif", "the disk is full: the file could not be written"


@pytest.mark.parametrize(
    "fault",
    [no_ffmpeg, another_ffmpeg, a_program_that_is_no_ffmpeg, a_folder_in_its_place, a_full_disk],
)
def test_what_one_export_lacks_does_not_cost_the_others(fault, small, tmp_path, monkeypatch):
    missing, sentence = fault(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"^not written: .*{missing}: .*({sentence})") as raised:
        save_object(shell(), tmp_path / "out")
    written = [name for name in ALL if name != missing]
    assert [
        name for name in names(tmp_path / "out") if (tmp_path / "out" / name).is_file()
    ] == written
    assert str(raised.value).count("\n") == 0
    assert all(
        str(tmp_path / "out" / name) in str(raised.value).split("Written: ")[1] for name in written
    )


def test_what_fails_for_the_same_reason_is_said_once(small, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError) as raised:
        save_object(shell(), tmp_path / "out")
    assert str(raised.value).count("is a file where a folder belongs") == 1
    assert all(name in str(raised.value) for name in ALL) and str(raised.value).endswith(
        "Written: nothing."
    )


def test_an_object_that_cannot_be_meshed_still_leaves_splats_and_pictures(small, tmp_path):
    faint = shell(5)
    faint.opacities[:] = 0.1
    with pytest.raises(ValueError, match="^not written: .*object.glb: No view shows a surface"):
        save_object(faint, tmp_path)
    assert names(tmp_path) == [name for name in ALL if name != "object.glb"]


def test_a_bug_keeps_its_traceback(small, tmp_path, monkeypatch):
    monkeypatch.setattr("gsv3d_lib.export.mesh.fuse_mesh", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_object(shell(2), tmp_path)


def test_odd_places(tmp_path, monkeypatch):
    """Relative, with a colon, which ffmpeg takes for a protocol, a dash, a percent
    sign, and as long as may be.
    """
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "-a:b %d 'ü' {x}"
    save_turntable(
        shell(9), f"{folder.name}/a:b.mp4", f"{folder.name}/-{'g' * 250}.gif", size=16, num_frames=2
    )
    assert names(folder) == [f"-{'g' * 250}.gif", "a:b.mp4"]


def test_broken_gaussians_are_not_written(tmp_path):
    gaussians = scene(10)
    gaussians.scales[3, 1] = torch.nan
    faint = scene(10)
    faint.opacities[3] = torch.nan  # neither below 1 / 255 nor above
    for save in (save_splat, save_viewer_page, Gaussians.save_ply, save_object):
        with pytest.raises(
            ValueError, match="scales of the Gaussians to save hold NaN or infinite"
        ):
            save(gaussians, tmp_path / "file")
        with pytest.raises(
            ValueError, match="opacities of the Gaussians to save hold NaN or infinite"
        ):
            save(faint, tmp_path / "file")
    assert not list(tmp_path.iterdir())
