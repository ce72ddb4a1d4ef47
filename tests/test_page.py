"""The page that shows objects: complete, small, offline, and true to render()."""

import gzip
import io
import json
import re

import browser_world as world
import numpy as np
import pytest
import torch
from command_world import call
from PIL import Image

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.export import gallery, save_viewer_page
from gsv3d_lib.export.page import Item, pack, save_page
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rendering import render
from gsv3d_lib.system.errors import UserError


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


def unpacked(data: bytes, numbers: dict) -> list[np.ndarray]:
    """What the page reads: means, scales, colours with opacities, quaternions."""
    planes = np.frombuffer(gzip.decompress(data), np.uint8).reshape(23, -1).T
    codes = planes[:, :9].reshape(-1, 3, 3).astype(float) @ [1, 256, 65536]
    means = np.array(numbers["low"]) + np.array(numbers["step"]) * codes
    scales = np.ascontiguousarray(planes[:, 9:15]).view("<f2")
    return [means, scales, planes[:, 15:19] / 255, planes[:, 19:].astype(float) - 128]


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("far", [1, 1000])
def test_packing_keeps_what_can_be_seen(far):
    gaussians = scene()
    gaussians.means[0] *= far  # one stray Gaussian must not cost the others their places
    data, numbers = pack(gaussians)
    means, scales, rgba, quats = unpacked(data, numbers)
    assert numbers["count"] == len(gaussians) and len(data) <= 23 * len(gaussians) + 64
    assert np.abs(means - gaussians.means.numpy()).max() < 1e-6 * max(1, far / 10)
    assert np.abs(scales / gaussians.scales.numpy() - 1).max() < 1e-3
    assert np.abs(rgba[:, :3] - gaussians.colors.numpy()).max() < 0.003
    unit = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    assert (
        np.abs((unit * torch.nn.functional.normalize(gaussians.quats, dim=1).numpy()).sum(1)).min()
        > 0.999
    )


def test_packing_takes_no_gaussians_one_and_huge_ones():
    assert pack(scene(0))[1]["count"] == 0
    (mean, *_), one = unpacked(*pack(scene(1))), scene(1)
    assert np.allclose(mean, one.means, atol=1e-6)
    huge = Gaussians(one.means, one.quats, one.scales * 1e9, one.opacities, one.colors)
    assert np.isfinite(unpacked(*pack(huge))[1].astype(float)).all()


def test_page_is_complete_and_loads_nothing(tmp_path):
    gaussians = scene()
    save_viewer_page(gaussians, tmp_path / "page.html", title="A <b>bold</b> bus", azimuth=30)
    page = (tmp_path / "page.html").read_text()
    assert "<title>A &lt;b&gt;bold&lt;/b&gt; bus</title>" in page and "__" not in re.sub(
        r"[\w+/=]{100,}", "", page
    )
    assert not re.search(r'https?://|src=|href=(?!"data:)|import |fetch\(', page)
    assert len(page) < 30_000 + 32 * len(gaussians)


def test_names_are_text_whatever_they_hold(tmp_path):
    name = "__SPLATS__ __VIEW__ \\1 \udcff 椅子 </script>"
    save_viewer_page(scene(5), tmp_path / "page.html", title=name)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>__SPLATS__ __VIEW__ \\1 ? 椅子 &lt;/script&gt;</title>" in page
    assert page.count("</script>") == 3  # of the items, the splats and the program
    (item,) = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])
    assert item["name"].startswith("__SPLATS__") and item["name"].endswith("</script>")


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one object"):
        save_page([], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the command


def test_gallery_of_files_and_folders(tmp_path, capsys):
    (tmp_path / "runs/mug").mkdir(parents=True)
    scene(30).save_ply(tmp_path / "runs/mug/object.ply")
    scene(40).save_ply(tmp_path / "mine.ply")
    wanted = [str(tmp_path / "runs"), str(tmp_path / "mine.ply"), "--out", str(tmp_path / "a.html")]
    assert call("gallery", wanted) == 0
    page = (tmp_path / "a.html").read_text()
    items = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])
    assert [item["name"] for item in items] == ["mug", "mine"]
    assert [item["views"]["count"] for item in items] == [gallery.VIEWS] * 2
    assert "2 objects in" in capsys.readouterr().out
    assert call("gallery", wanted) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "There is no"),
        (lambda path: path.mkdir(), "neither a PLY nor a picture"),
        (lambda path: path.write_text("{}"), "needs --objects"),
    ],
)
def test_what_a_gallery_cannot_show_is_said(tmp_path, capsys, make, said):
    make(tmp_path / "thing.json")
    assert call("gallery", [str(tmp_path / "thing.json"), "--out", str(tmp_path / "a.html")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "a.html").exists()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    with world.headless_browser() as instance:
        yield instance


@pytest.fixture
def viewer(chromium, tmp_path):
    """The viewer at 96 x 96 pixels, opened from file://, with every error and request
    recorded.
    """
    save_viewer_page(scene(), tmp_path / "page.html", azimuth=300, elevation=20)
    page = chromium.new_page(viewport={"width": 96, "height": 96})
    page.problems, page.requests = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "console",
        lambda message: page.problems.append(message.text) if message.type == "error" else None,
    )
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
    # 0.4 degrees a pixel
    assert np.abs(settled(viewer) - expected(300 + 10, 20 + 4)).mean() < 0.004
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


# ---------------------------------------------------------------- many objects


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A page of two objects with Gaussians, and a third of pictures alone."""
    path = tmp_path_factory.mktemp("page") / "many.html"
    red = torch.full((8, 8, 3), 0.5) * torch.tensor([2.0, 0, 0])
    blue = np.tile(np.array([0, 0, 255], np.uint8), (4, 8, 8, 1))
    items = [Item("first", scene(), red), Item("second", scene(200, 1)), Item("truth", views=blue)]
    save_page(items, path)
    return path


@pytest.fixture
def gallery_page(chromium, many):
    page = chromium.new_page(viewport={"width": 500, "height": 600})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(many.as_uri())
    yield page
    assert page.problems == []
    page.close()


def pixels_of(page, number: int) -> np.ndarray:
    """What the canvas of a pane holds [H, W, 3] in [0, 1]."""
    settled(page)
    box = page.locator("canvas").nth(number).bounding_box()
    picture = page.screenshot(clip=box)
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) / 255


def test_modes_show_what_render_measures(gallery_page):
    page = gallery_page
    page.evaluate("element('note').remove(), element('angles').style.visibility = 'hidden'")
    page.evaluate("document.querySelectorAll('.choice').forEach(choice => choice.remove())")
    box = page.locator("canvas").first.bounding_box()
    height, width = round(box["height"]), round(box["width"])
    page.evaluate("side => { element('stage').style.flex = `0 0 ${side}px`; }", min(height, width))
    side = min(height, width)
    page.set_viewport_size({"width": side, "height": 600})
    seen = render(scene(), orbit_cameras([40.0], 25.0, side))
    page.evaluate("location.hash = 'azimuth=40&elevation=25&mode=opacity'")
    settled(page)
    alpha = pixels_of(page, 0)[..., 0]
    assert np.abs(alpha - seen.alpha[0, ..., 0].numpy()).mean() < 0.01
    page.evaluate("location.hash = 'mode=depth'")
    settled(page)
    depth = pixels_of(page, 0)[..., 0]
    solid = seen.alpha[0, ..., 0].numpy() > 0.98
    distance = page.evaluate("[START.distance, START.reach]")
    near = 0.5 + 0.5 * (distance[0] - seen.depth[0, ..., 0].numpy()) / distance[1]
    assert solid.sum() > 500 and np.abs(depth - near)[solid].mean() < 0.02


def test_two_objects_turn_together_and_links_open_them(gallery_page, many):
    page = gallery_page
    page.get_by_role("button", name="Compare two objects").click()
    before = [pixels_of(page, k) for k in (0, 1)]
    assert np.abs(before[0] - before[1]).mean() > 0.01
    page.locator("canvas").nth(1).press("ArrowLeft")
    after = [pixels_of(page, k) for k in (0, 1)]
    assert all(np.abs(a - b).mean() > 0.002 for a, b in zip(before, after))
    page.goto("about:blank")
    page.goto(many.as_uri() + "#left=second&right=first")
    page.wait_for_timeout(300)
    chosen = page.evaluate("panes.map(pane => pane.item.name)")
    assert chosen == ["second", "first"]


def test_cards_choose_and_pictures_stand_in_for_splats(gallery_page):
    page = gallery_page
    page.get_by_role("navigation", name="Objects").get_by_text("truth").click()
    middle = pixels_of(page, 0)[100:-100, 100:-100].mean((0, 1))
    assert np.abs(middle - [0, 0, 1]).max() < 0.05


def test_the_input_lies_over_its_source_view(gallery_page):
    page = gallery_page
    page.get_by_label("Input laid over the source view").fill("1")
    middle = pixels_of(page, 0)[100:-100, 100:-100].mean((0, 1))
    assert np.abs(middle - [1, 0, 0]).max() < 0.05
    page.locator("canvas").first.press("ArrowLeft")  # from elsewhere it would lie wrong
    assert np.abs(pixels_of(page, 0)[100:-100, 100:-100].mean((0, 1)) - [1, 0, 0]).max() > 0.05


def test_keys_do_what_buttons_do(gallery_page):
    page = gallery_page
    page.locator("canvas").first.focus()
    for key, of, expected in [
        ("3", "state.mode", "normals"),
        ("1", "state.mode", "colour"),
        ("b", "state.dark", True),
        ("c", "state.compare", True),
        (" ", "state.turning", True),
        ("s", "state.turning", False),
    ]:
        page.keyboard.press(key)
        assert page.evaluate(of) == expected, key
    assert pixels_of(page, 0)[60, 10].max() < 0.2  # the ground is dark


def test_every_control_has_a_name_and_a_size_for_fingers(gallery_page):
    page = gallery_page
    page.set_viewport_size({"width": 320, "height": 560})
    for control in page.locator("button, select, input, canvas").all():
        if control.is_visible():
            name = control.evaluate(
                "e => e.ariaLabel || e.innerText || e.closest('label')?.innerText"
            )
            box = control.bounding_box()
            assert name and box["x"] >= 0
    right = page.locator("#tools").bounding_box()
    assert right["x"] + right["width"] <= 320
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_without_webgl_the_pictures_turn(chromium, many):
    page = chromium.new_page(viewport={"width": 300, "height": 400})
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(many.as_uri())
    page.get_by_role("navigation", name="Objects").get_by_text("truth").click()
    page.wait_for_timeout(200)
    assert "Pictures only" in page.get_by_role("alert").first.inner_text()
    assert page.locator(".still").first.is_visible()
    page.close()
