"""Files that leave the project must open elsewhere and show what render() shows."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.export import (
    SPLAT_BYTES,
    load_splat,
    pack_splats,
    pruning_cost,
    save_splat,
    save_turntable,
    save_viewer_page,
    turntable_frames,
)
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.mesh import fuse_mesh, save_mesh
from gsv3d_lib.raycast import load_mesh, normalized, render_mesh
from gsv3d_lib.rendering import render

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()


def scene(count: int = 600, seed: int = 0) -> Gaussians:
    """Long, flat, overlapping, half-transparent Gaussians of every colour, without any symmetry."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    means = (uniform(count, 3) - 0.5) * torch.tensor([1.2, 0.8, 1.0]) + torch.tensor([0.1, -0.1, 0.05])
    return Gaussians(means, uniform(count, 4) - 0.5, 0.01 + 0.06 * uniform(count, 3), uniform(count), uniform(count, 3))


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
    assert animation.n_frames == 6 and animation.info["loop"] == 0 and animation.info["duration"] in (80, 83)
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
    with pytest.raises(OSError, match="ffmpeg wrote 0 of the 6 frames of .*turn.mp4"):
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
    stored = Gaussians(*(torch.tensor(a.astype(np.float32)) for a in (means, quats, scales, rgba[:, 3], rgba[:, :3])))
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


def test_splat_files_that_are_none_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .splat file at"):
        load_splat(tmp_path / "none.splat")
    (tmp_path / "cut.splat").write_bytes(pack_splats(scene(3))[:-5])
    with pytest.raises(ValueError, match="91 bytes are no multiple of 32"):
        load_splat(tmp_path / "cut.splat")
    (tmp_path / "other.splat").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_splat(tmp_path / "other.splat")
    (tmp_path / "empty.splat").write_bytes(b"")
    assert len(load_splat(tmp_path / "empty.splat")) == 0


def test_a_glb_is_read_back_and_looks_the_same(tmp_path):
    """Through `load_mesh`, as a mesh of one's own: turned from y up to z up, its linear colours made sRGB again."""
    means = torch.nn.functional.normalize(torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    colors = (means.sign() + 1) / 2 * 0.8 + 0.1  # another colour in every octant
    quats, scales = torch.tensor([1.0, 0, 0, 0]).expand(3000, 4), torch.full((3000, 3), 0.03)
    means = means * torch.tensor([0.7, 0.45, 0.3])
    fused = fuse_mesh(Gaussians(means, quats, scales, torch.full((3000,), 0.95), colors), 48, num_views=16, size=64)
    save_mesh(fused, tmp_path / "object.glb")
    cameras = orbit_cameras([0.0, 100.0, 215.0], [0.0, 30.0, -20.0], 48)
    back, expected = load_mesh(tmp_path / "object.glb"), normalized(fused)
    (rgba, depth), (true_rgba, true_depth) = (render_mesh(mesh, cameras, supersample=1) for mesh in (back, expected))
    assert (depth > 0).sum() > 500 and np.abs(depth - true_depth).max() < 1e-4
    assert np.abs(rgba - true_rgba).max() < 0.04  # eight bits of linear light are coarse in the dark
    assert np.ptp(rgba[rgba[..., 3] == 1], axis=0)[:3].min() > 0.5  # not white


def test_pruning_states_what_it_costs():
    gaussians = scene()
    assert pruning_cost(gaussians, 0.0) == (1.0, float("inf"))
    costs = [pruning_cost(gaussians, threshold, size=64, num_views=3) for threshold in (1 / 255, 0.05, 0.3)]
    assert costs[0][1] > 90  # fainter ones are never drawn
    assert costs[0][0] > costs[1][0] > costs[2][0] and costs[0][1] > costs[1][1] > costs[2][1]
    assert costs[2][0] == pytest.approx(float((gaussians.opacities >= 0.3).float().mean()))
    assert pruning_cost(gaussians, 2.0)[0] == 0


def test_broken_gaussians_are_not_written(tmp_path):
    gaussians = scene(10)
    gaussians.scales[3, 1] = torch.nan
    for save in (save_splat, save_viewer_page, Gaussians.save_ply):
        with pytest.raises(ValueError, match="scales of the Gaussians to save hold NaN or infinite"):
            save(gaussians, tmp_path / "file")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the viewer page


def test_page_is_complete_and_loads_nothing(tmp_path):
    gaussians = scene()
    save_viewer_page(gaussians, tmp_path / "page.html", title="A <b>bold</b> bus", azimuth=30)
    page = (tmp_path / "page.html").read_text()
    assert "<title>A &lt;b&gt;bold&lt;/b&gt; bus</title>" in page and "__" not in re.sub(r"[\w+/=]{100,}", "", page)
    assert not re.search(r"https?://|src=|href=|import |fetch\(", page)
    stored = base64.b64decode(re.search(r'type="text/plain">([^<]*)<', page)[1])
    assert stored == pack_splats(gaussians.prune())
    assert len(page) < 20_000 + 43 * len(gaussians)


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium to test the viewer page in a real browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the viewer page")
    with playwright.sync_playwright() as context:
        with context.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as instance:
            yield instance


@pytest.fixture
def viewer(chromium, tmp_path):
    """The viewer at 96 x 96 pixels, opened from file://, with every error and request recorded."""
    save_viewer_page(scene(), tmp_path / "page.html", azimuth=300, elevation=20)
    page = chromium.new_page(viewport={"width": 96, "height": 96})
    page.problems, page.requests = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate("document.getElementById('note').remove()")
    yield page
    page.close()


def settled(page) -> np.ndarray:
    """A screenshot [H, W, 3] in [0, 1] after the pending frame has been drawn."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")) / 255


def expected(azimuth, elevation, size=96) -> np.ndarray:
    return render(scene(), orbit_cameras([float(azimuth)], float(elevation), size)).rgb[0].numpy()


def test_page_draws_what_render_draws(viewer):
    views = [(300, 20), (45, -35), (170, 70)]
    for azimuth, elevation in views:
        viewer.evaluate(f"location.hash = 'azimuth={azimuth}&elevation={elevation}'")
        error = np.abs(settled(viewer) - expected(azimuth, elevation))
        assert error.mean() < 0.004 and error.max() < 0.12  # 8-bit blending and quaternions
    assert viewer.problems == [] and [url[:5] for url in viewer.requests] == ["file:"]


def test_dragging_turns_and_the_wheel_zooms(viewer):
    first = settled(viewer)
    assert np.abs(first - expected(300, 20)).mean() < 0.004
    viewer.mouse.move(48, 48)
    viewer.mouse.down()
    viewer.mouse.move(48 - 25, 48 + 10)
    viewer.mouse.up()
    assert np.abs(settled(viewer) - expected(300 + 10, 20 + 4)).mean() < 0.004  # 0.4 degrees a pixel
    viewer.mouse.wheel(0, -300)
    closer = settled(viewer)
    assert (closer < 0.99).any(-1).mean() > (first < 0.99).any(-1).mean() * 1.2
    viewer.mouse.dblclick(48, 48)
    assert np.abs(settled(viewer) - first).max() < 0.02


def test_fingers_turn_and_pinch(chromium, tmp_path):
    save_viewer_page(scene(), tmp_path / "page.html", azimuth=0, elevation=0)
    page = chromium.new_page(viewport={"width": 96, "height": 96}, has_touch=True)
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate("document.getElementById('note').remove()")
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (60, 48))
    touch("touchMove", (35, 48))
    touch("touchEnd")
    turned = settled(page)
    assert np.abs(turned - expected(10, 0)).mean() < 0.004
    touch("touchStart", (40, 48), (56, 48))
    touch("touchMove", (20, 48), (76, 48))
    touch("touchEnd")
    assert (settled(page) < 0.99).any(-1).mean() > (turned < 0.99).any(-1).mean() * 1.2
    page.close()


def test_a_page_without_gaussians_is_white(chromium, tmp_path):
    save_viewer_page(scene().select(slice(0, 0)), tmp_path / "empty.html")
    page = chromium.new_page(viewport={"width": 32, "height": 32})
    page.goto((tmp_path / "empty.html").as_uri())
    assert (settled(page) == 1).all()
    page.close()
