"""Figures show the numbers they were given, once, in a small file."""

import json

import numpy as np
import plotly.io
import pytest
import torch

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.course import figures
from gsv3d_lib.gaussians import Gaussians


def pixels(figure) -> np.ndarray:
    """The drawn figure, uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def flat(*color, size=8) -> torch.Tensor:
    return torch.tensor(color).expand(size, size, len(color))


# ---------------------------------------------------------------- images


def test_grid_shows_every_image_in_reading_order():
    red, green, blue, grey = flat(1.0, 0, 0), flat(0, 1.0, 0), flat(0, 0, 1.0), flat(0.5)
    drawn = pixels(
        figures.image_grid([red, green, blue, grey], ["a", "b", "c", "d"], columns=2)
    ).astype(int)
    height, width = drawn.shape[:2]
    corners = [drawn[int(y * height), int(x * width)] for y in (0.3, 0.7) for x in (0.3, 0.7)]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)]
    assert np.abs(np.array(corners) - expected).max() <= 2


def test_grid_labels_and_short_last_row():
    figure = figures.image_grid(
        torch.rand(5, 6, 9, 3), columns=3, titles=["x", "y", "z"], row_titles=["one", "two"]
    )
    assert [axis.get_title() for axis in figure.axes] == ["x", "y", "z", "", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == ["one", "", "", "two", "", ""]
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 1, 1, 0]


def test_figures_are_shown_once():
    import matplotlib.pyplot as plt

    figures.image_grid([flat(0.2, 0.3, 0.4)])
    figures.plot_metrics([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}])
    assert plt.get_fignums() == []


def test_images_are_checked():
    with pytest.raises(ValueError, match="at least one image"):
        figures.image_grid([])
    with pytest.raises(ValueError, match=r"\[H, W, 3\] or \[H, W, 1\], got \(3, 8, 8\)"):
        figures.image_grid(torch.zeros(2, 3, 8, 8))


def test_views_are_spread_and_labelled():
    rgb, depth, alpha = (
        torch.rand(16, 8, 8, 3),
        torch.full((16, 8, 8, 1), 3.0),
        torch.ones(16, 8, 8, 1),
    )
    figure = figures.show_views(rgb, depth, alpha, max_views=4)
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "view 0",
        "view 5",
        "view 10",
        "view 15",
    ]
    assert len(figure.axes) == 12
    shown = np.asarray(figure.axes[1].images[0].get_array())
    assert np.allclose(shown, rgb[5].numpy())


def test_depth_is_bright_when_near_and_white_where_nothing_is():
    depth = torch.tensor([[0.0, 2.5, 3.0, 4.5]])[..., None]
    colors = figures.color_depth(depth)
    luminance = colors @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert colors.shape == (1, 4, 3) and (colors[0, 0] == 1).all()
    assert luminance[0, 1] > luminance[0, 2] > luminance[0, 3]
    shared = figures.color_depth(depth[:, 2:3], near=2.5, far=4.5)
    # the same depth, the same colour, on a shared scale
    assert torch.equal(shared[0, 0], colors[0, 2])
    assert (figures.color_depth(torch.zeros(2, 2, 1)) == 1).all()
    with pytest.raises(ValueError, match=r"\[..., H, W, 1\], got \(4, 4\)"):
        figures.color_depth(torch.zeros(4, 4))


# ---------------------------------------------------------------- curves


def rows(count=100, scale=1.0):
    return [
        {"step": 10 * i, "time": 5.0 * i, "loss": scale * 0.9**i, "note": "text"}
        for i in range(count)
    ]


def test_curves_from_a_file_hold_its_numbers(tmp_path):
    table = rows() + [
        {"step": 1000, "psnr": 20.0},
        {"step": 1010, "psnr": float("nan"), "loss": None},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in table) + "\n")
    figure = figures.plot_metrics(path)
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == ["loss", "psnr"]
    recorded, smoothed = figure.axes[0].lines
    assert np.allclose(recorded.get_ydata(), [row["loss"] for row in rows()])
    assert np.allclose(recorded.get_xdata(), [row["step"] for row in rows()])
    assert figure.axes[0].get_yscale() == "log" and len(smoothed.get_xdata()) == 100
    assert figure.axes[1].lines[0].get_ydata().tolist() == [20.0]


def test_runs_share_panels_and_smoothing_keeps_a_line():
    straight = [{"step": i, "loss": 5.0 + i} for i in range(200)]
    figure = figures.plot_metrics({"a": straight, "b": rows()}, keys=["loss"])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    smoothed = figure.axes[0].lines[1].get_ydata()
    assert np.allclose(smoothed[30:-30], np.arange(200)[30:-30] + 5.0, atol=1e-6)  # no lag
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert colors == {figures.BLUE, figures.ORANGE}


def test_curves_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        figures.plot_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="no curves"):
        figures.plot_metrics([{"step": 1, "time": 2.0}])


# ---------------------------------------------------------------- 3D


def scene(count: int) -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    means, colors = (
        torch.rand(count, 3, generator=generator) - 0.5,
        torch.rand(count, 3, generator=generator),
    )
    return Gaussians(
        means, torch.ones(count, 4), torch.full((count, 3), 0.01), torch.full((count,), 0.5), colors
    )


def test_plotly_figure_is_small_and_holds_gaussians():
    figure = figures.plotly_gaussians(
        scene(20_000), orbit_cameras(torch.arange(0, 360, 22.5), 15.0, 64)
    )
    assert len(plotly.io.to_json(figure)) < 300_000
    dots = figure.data[0]
    assert len(dots.x) == 3000 and len(set(zip(dots.x, dots.y, dots.z, strict=True))) == 3000
    few = figures.plotly_gaussians(scene(50)).data[0]
    assert np.allclose(np.stack([few.x, few.y, few.z], -1), scene(50).means)
    red, green, blue = (scene(50).colors[7] * 255).round().int().tolist()
    assert few.marker.color[7] == f"rgb({red},{green},{blue})"


def test_thinning_repeats_prefers_the_visible_and_skips_the_invisible():
    gaussians = scene(4000)
    gaussians.opacities[:1000] = 0.0
    gaussians.opacities[1000:2000] = 0.02
    picks = [figures.plotly_gaussians(gaussians, max_points=500).data[0] for _ in range(2)]
    assert (picks[0].x == picks[1].x).all()
    shown = {tuple(p) for p in np.stack([picks[0].x, picks[0].y, picks[0].z], -1).tolist()}
    groups = [
        sum(tuple(p) in shown for p in gaussians.means[part].tolist())
        for part in (slice(1000), slice(1000, 2000))
    ]
    assert groups[0] == 0 and groups[1] < 50


def test_pyramids_stand_where_the_cameras_are_and_span_the_image():
    cameras = orbit_cameras([0.0, 130.0], [10.0, -20.0], 64)
    lines = figures.plotly_gaussians(scene(5), cameras).data[1]
    points = torch.tensor(np.stack([lines.x, lines.y, lines.z], -1)).reshape(2, 12, 3).float()
    assert torch.isnan(points[:, -1]).all()  # the pen is lifted between cameras
    assert torch.allclose(points[:, 0], cameras.positions(), atol=1e-6)
    local = (
        torch.einsum("vij,vpj->vpi", cameras.viewmats[:, :3, :3], points[:, :-1])
        + cameras.viewmats[:, None, :3, 3]
    )
    uv = torch.einsum("vij,vpj->vpi", cameras.Ks, local)[:, [1, 2, 4, 5]]
    uv = (uv[..., :2] / uv[..., 2:]).round()
    assert uv.tolist() == [[[0, 0], [64, 0], [64, 64], [0, 64]]] * 2


def test_plotly_without_gaussians():
    assert len(figures.plotly_gaussians(scene(0)).data[0].x) == 0
