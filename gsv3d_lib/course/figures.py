"""Plain tensors -> figures, for notebooks and documents.

Every function returns a figure that shows once, as the last line of a cell. One small
palette, safe for colour-blind readers (Okabe and Ito). Depth is viridis, near is
bright, and what is not there is white.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..system.errors import MissingFile, UserError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

    from ..cameras import Cameras
    from ..gaussians import Gaussians

BLUE, ORANGE, GREEN, PINK, SKY = PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
INK, GREY, FAINT = "#222222", "#777777", "#DDDDDD"
WIDTH = 9.0  # inches, the width of a notebook's text

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.dpi": 100,
}


def styled() -> ModuleType:
    """matplotlib.pyplot, in this module's style from now on.

    It looks up sizes when titles and legends are made, which may be long after.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def finished(figure: Figure) -> Figure:
    """Takes the figure out of pyplot's hands, else a notebook would show it twice."""
    styled().close(figure)
    return figure


def panels(rows: int = 1, columns: int = 1, width: float = WIDTH, height: float = 2.6, **options):
    """Empty axes in this module's style -> (figure, one axis or an array of them).

    Return the figure and it shows once.
    width: of the whole figure; height: of one row; both in inches.
    options: of `matplotlib.pyplot.subplots`.
    """
    options = {"figsize": (width, height * rows), "layout": "constrained"} | options
    figure, axes = styled().subplots(rows, columns, **options)
    return finished(figure), axes


def _clear(axis) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)


# ---------------------------------------------------------------- images


def image_grid(
    images: Tensor | Sequence[Tensor],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    row_titles: Sequence[str] | None = None,
    width: float = WIDTH,
) -> Figure:
    """Images in [0, 1], row by row: [N, H, W, 3 | 1], or a list of any sizes.

    titles: above the images, one each; as many as columns label the columns only.
    row_titles: to the left of the rows.
    """
    shown = [_to_array(image) for image in images]
    if not shown:
        raise UserError("An image grid needs at least one image, got none.")
    columns = min(columns or 8, len(shown))
    rows = -(-len(shown) // columns)
    title_rows = 0 if titles is None else rows if len(titles) > columns else 1
    tallest = max(image.shape[0] / image.shape[1] for image in shown)
    height = width / columns * tallest + 0.25 * title_rows / rows
    figure, axes = panels(rows, columns, width, height, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.03, wspace=0.01, hspace=0.01)
    for axis in axes.flat:
        _clear(axis)
    for axis, image in zip(axes.flat, shown, strict=False):  # the last row may be short
        image = image.squeeze(-1) if image.shape[-1] == 1 else image
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    for axis, title in zip(axes.flat, titles or (), strict=False):
        axis.set_title(title)
    for axis, title in zip(axes[:, 0], row_titles or (), strict=False):
        axis.set_ylabel(title)
    return figure


def _to_array(image: Tensor) -> np.ndarray:
    """[H, W, 3 | 1] -> numpy in [0, 1]."""
    image = torch.as_tensor(image).detach().cpu().float()
    if image.dim() != 3 or image.shape[-1] not in (1, 3):
        shape = tuple(image.shape)
        raise UserError(f"An image to show must be [H, W, 3] or [H, W, 1], got {shape}.")
    return image.clamp(0, 1).numpy()


def show_views(
    rgb: Tensor, depth: Tensor, alpha: Tensor, max_views: int = 8, width: float = WIDTH
) -> Figure:
    """Rows of colour, depth and alpha, of `max_views` views spread over those given.

    rgb: [V, H, W, 3] in [0, 1].
    depth: z-depth [V, H, W, 1], 0 = nothing.
    alpha: [V, H, W, 1] in [0, 1].
    """
    count = min(max_views, len(rgb))
    chosen = torch.linspace(0, len(rgb) - 1, count).round().long()
    near, far = depth_range(depth)
    pictures = [*rgb[chosen], *color_depth(depth[chosen], near, far), *(1 - alpha[chosen])]
    titles = [f"view {i}" for i in chosen.tolist()]
    depth_title = f"depth\n{near:.2f} … {far:.2f}\nnear = bright"
    return image_grid(pictures, titles, count, ["colour", depth_title, "alpha\ndark = 1"], width)


def depth_range(depth: Tensor) -> tuple[float, float]:
    """Smallest and largest depth of what is there; (0, 1) where nothing is."""
    there = depth[depth > 0]
    return (float(there.min()), float(there.max())) if len(there) else (0.0, 1.0)


def color_depth(depth: Tensor, near: float | None = None, far: float | None = None) -> Tensor:
    """z-depth [..., H, W, 1] -> colours [..., H, W, 3]: bright near, white nothing (0).

    near, far: the ends of the scale in world units; by default those of this depth.
        Give them to compare pictures.
    """
    from matplotlib import colormaps

    if depth.shape[-1] != 1:
        raise UserError(f"Depth to colour must be [..., H, W, 1], got {tuple(depth.shape)}.")
    low, high = depth_range(depth)
    near = low if near is None else near
    far = high if far is None else far
    depth = depth.detach().cpu()[..., 0]
    nearness = 1 - (depth - near) / max(far - near, 1e-6)
    colors = torch.from_numpy(colormaps["viridis"](nearness.clamp(0, 1).numpy())[..., :3]).float()
    return torch.where(depth[..., None] > 0, colors, 1.0)


# ---------------------------------------------------------------- training curves


def plot_metrics(
    runs: str | Path | list[dict] | dict[str, str | Path | list[dict]],
    keys: Sequence[str] | None = None,
    smoothing: float = 0.03,
    width: float = WIDTH,
) -> Figure:
    """Training curves, one panel per quantity: a smoothed line over the values.

    runs: a metrics.jsonl (one {"step": ..., "loss": ...} a line), its rows, or several
        as {name: file or rows}, which share the panels.
    keys: which quantities; by default all that are there.
    smoothing: width (standard deviation) of the window that averages, as a fraction of
        the curve; 0 draws the values alone.
    """
    if not isinstance(runs, dict):
        runs = {"": runs}
    tables = {name: _read_rows(rows) for name, rows in runs.items()}
    keys = list(keys or _numeric_keys(tables))
    if not keys:
        raise UserError("There are no curves to draw: no row has a number but step and time.")
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = panels(rows, columns, width * columns / 3, 2.3, squeeze=False)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, keys, strict=False):
        _plot_key(axis, tables, key, smoothing)
    if len(tables) > 1:
        axes[0, 0].legend(handlelength=1.2)
    return figure


def _read_rows(source: str | Path | list[dict]) -> list[dict]:
    if isinstance(source, list):
        return source
    if not Path(source).is_file():
        raise MissingFile(f"There is no metrics file at '{source}': train first.")
    from ..weights.run_folder import read_rows

    return read_rows(Path(source))


def _numeric_keys(tables: dict[str, list[dict]]) -> list[str]:
    names = {}  # in the order of the rows
    for row in (row for table in tables.values() for row in table):
        names |= {name: None for name, value in row.items() if isinstance(value, int | float)}
    return [name for name in names if name not in ("step", "time")]


def _plot_key(axis, tables: dict[str, list[dict]], key: str, smoothing: float) -> None:
    lowest, highest = np.inf, -np.inf
    for (name, rows), color in zip(tables.items(), PALETTE * len(tables), strict=False):
        steps, values = _finite_points(rows, key)
        if len(steps) == 0:
            continue
        few = len(steps) < 20  # then every value matters and a mean would hide it
        line = values if few or smoothing == 0 else _smoothed(values, smoothing)
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        axis.plot(steps, line, color=color, label=name or None, marker="." if few else None)
        lowest = min(lowest, values.min())
        highest = max(highest, values.max())
    if lowest > 0 and highest > 20 * lowest:
        axis.set_yscale("log")
    axis.set(title=key, xlabel="step")


def _finite_points(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _smoothed(values: np.ndarray, smoothing: float) -> np.ndarray:
    """A centred Gaussian mean, which does not lag behind a falling loss."""
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(values, smoothing * len(values), mode="nearest")


# ---------------------------------------------------------------- splatting


def plot_ellipsoids(
    gaussians: Gaussians,
    camera: Cameras,
    titles: Sequence[str] | None = None,
    footprints: bool = True,
) -> Figure:
    """Each Gaussian on its own: its surface in space, and its alpha in the picture.

    The surface is one standard deviation from the centre, seen from the camera's
    direction. The ellipses in the picture are at 1, 2 and 3.33 standard deviations.
    camera: one, looking at the origin.
    titles: one per Gaussian.
    footprints: False draws the surfaces alone.
    """
    count = len(gaussians)
    rows = 1 if count == 1 or not footprints else 2
    columns = 1 + footprints if count == 1 else count
    x, y, z = camera.positions()[0].tolist()
    elevation = np.degrees(np.arctan2(z, np.hypot(x, y)))
    view = {"elev": elevation, "azim": np.degrees(np.arctan2(y, x))}
    figure = finished(styled().figure(figsize=(2.3 * columns, 2.3 * rows)))
    for i in range(count):
        space = figure.add_subplot(rows, columns, i + 1, projection="3d")
        _draw_ellipsoid(space, gaussians.select([i]).detach(), view)
        space.set_title(titles[i] if titles else "one standard deviation", pad=-2)
        if footprints:
            place = 2 if count == 1 else count + i + 1
            picture = figure.add_subplot(rows, columns, place)
            _draw_footprint(picture, gaussians.select([i]).detach(), camera)
    figure.subplots_adjust(0.03, 0.19 / rows, 0.97, 1 - 0.13 / rows, 0.2, 0.22)
    return figure


def _draw_ellipsoid(axis, gaussian: Gaussians, view: dict[str, float]) -> None:
    from ..rotations import rotation_matrices

    polar, turn = np.meshgrid(np.linspace(0, np.pi, 13), np.linspace(0, 2 * np.pi, 25))
    ball = np.stack([np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn), np.cos(polar)], -1)
    half_axes = (rotation_matrices(gaussian.quats) * gaussian.scales[:, None, :])[0].numpy()
    points = ball @ half_axes.T + gaussian.means[0].numpy()
    color = gaussian.colors[0].clamp(0, 1).numpy()
    axis.plot_surface(*np.moveaxis(points, -1, 0), color=color, rcount=25, ccount=13, linewidth=0)
    limits = dict.fromkeys(("xlim", "ylim", "zlim"), (-1, 1))
    axis.set(**limits, xticks=[-1, 0], yticks=[0, 1], zticks=[-1, 0, 1])
    for name in "xyz":
        getattr(axis, f"set_{name}label")(name, labelpad=-10)
    axis.tick_params(pad=-4, labelsize=7)
    axis.set_box_aspect((1, 1, 1), zoom=1.1)
    axis.view_init(**view)


def _draw_footprint(axis, gaussian: Gaussians, camera: Cameras) -> None:
    from ..rendering.plain import project, splat_alphas

    width, height = camera.width, camera.height
    shape = (gaussian.means, gaussian.quats, gaussian.scales)
    centre, covariance = project(*shape, camera.viewmats[0], camera.Ks[0], width, height)
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    alpha = splat_alphas(centre, covariance, gaussian.opacities, rows, columns)[..., 0]
    axis.imshow(alpha.numpy(), cmap="Blues", vmin=0, vmax=1, extent=(0, width, height, 0))
    for deviations in (1, 2, 3.33):
        ring = centre[0] + deviations * ellipse_points(covariance[0])
        axis.plot(*ring.T.numpy(), color=ORANGE, linewidth=0.9)
    title = f"alpha, up to {alpha.max():.2f}"
    axis.set(xlim=(0, width), ylim=(height, 0), xlabel="u (pixels)", title=title)
    axis.grid(False)


def ellipse_points(covariance: Tensor, count: int = 73) -> Tensor:
    """The ellipse of one standard deviation of a [2, 2] covariance: [count, 2]."""
    turn = torch.linspace(0, 2 * np.pi, count).to(covariance)
    return torch.stack([turn.cos(), turn.sin()], -1) @ torch.linalg.cholesky(covariance).mT


def plot_rays(
    depths: Tensor, alphas: Tensor, colors: Tensor, titles: Sequence[str] | None = None
) -> Figure:
    """What a pixel sees along its ray, and on the right its blended colour over white.

    Per Gaussian its alpha (outline) and weight (filled); then the light that is left,
    and the expected depth.
    depths: [R, K] z-depths of R rays, in any order.
    alphas: [R, K]. colors: [K, 3]. titles: one per ray.
    """
    count = len(depths)
    ends = (float(depths.min()) - 0.25, float(depths.max()) + 0.25)
    height = 1.75 + 0.35 / count
    figure, axes = panels(count, 2, 0.75 * WIDTH, height, width_ratios=[7, 1], squeeze=False)
    for r, (ray, swatch) in enumerate(axes):
        order = depths[r].argsort()
        pixel = _draw_ray(ray, depths[r][order], alphas[r][order], colors[order], ends)
        ray.set_title(titles[r] if titles else "")
        ray.set_xlabel("depth z along the ray" if r == count - 1 else "")
        swatch.imshow(pixel.reshape(1, 1, 3).numpy())
        swatch.set_title("pixel")
        _clear(swatch)
    return figure


def _draw_ray(axis, z: Tensor, alpha: Tensor, rgb: Tensor, ends: tuple[float, float]) -> Tensor:
    """One ray, its Gaussians in order -> the colour [3] of the pixel."""
    from ..rendering.plain import composite

    left = torch.cat([torch.ones(1), torch.cumprod(1 - alpha, 0)])
    weights = alpha * left[:-1]
    depth = float((weights * z).sum() / weights.sum())
    bars = {"edgecolor": GREY, "linewidth": 0.9, "label": "alpha"}
    axis.bar(z.numpy(), alpha.numpy(), 0.05, color="none", **bars)
    axis.bar(z.numpy(), weights.numpy(), 0.05, color=rgb.clamp(0, 1).numpy(), label="weight")
    edges = [ends[0], *z.tolist(), ends[1]]
    light = {"color": INK, "linewidth": 1, "label": "light left, T"}
    axis.stairs(left.numpy(), edges, baseline=None, **light)
    label = f"expected depth {depth:.2f}"
    axis.axvline(depth, color=INK, linestyle=":", linewidth=1.2, label=label)
    axis.set(xlim=ends, ylim=(0, 1.08), axisbelow=True)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return (composite(alpha, rgb) + (1 - float(weights.sum()))).clamp(0, 1)


# ---------------------------------------------------------------- 3D


def plotly_gaussians(
    gaussians: Gaussians, cameras: Cameras | None = None, max_points: int = 3000, height: int = 480
) -> go.Figure:
    """Interactive 3D view: a dot for every Gaussian, a pyramid for every camera.

    At most `max_points` are drawn, at random, opaque and large ones more often, and
    enlarged to cover for the missing: with 3,000 the figure adds about 150 kB to a
    notebook. Dots are opaque, as plotly does not sort transparent ones. It shows where
    Gaussians are, and `save_viewer_page` how they look.
    """
    import plotly.graph_objects as go

    traces = [_dots(_thinned(gaussians, max_points), len(gaussians))]
    axis = {"showbackground": False, "gridcolor": FAINT, "zeroline": False}
    axis |= {"color": GREY, "nticks": 5}
    if cameras is None:
        axis["range"] = [-1, 1]
    else:
        traces.append(_frusta(cameras))
    scene = {"xaxis": axis, "yaxis": axis, "zaxis": axis}
    eye = {"x": 1.35, "y": -1.35, "z": 0.6}
    scene["camera"] = {"eye": eye, "center": {"x": 0, "y": 0, "z": -0.1}}
    scene["aspectmode"] = "data" if cameras is not None else "cube"
    look = {"template": "none", "margin": {"l": 0, "r": 0, "t": 0, "b": 0}, "showlegend": False}
    return go.Figure(traces).update_layout(scene=scene, height=height, **look)


def _thinned(gaussians: Gaussians, max_points: int) -> Gaussians:
    gaussians = gaussians.detach().to("cpu", torch.float32)
    weight = gaussians.opacities * gaussians.scales.amax(-1)
    visible = torch.nonzero(weight > 0)[:, 0]
    if len(visible) > max_points:
        generator = torch.Generator().manual_seed(0)
        # Gumbel's trick: the largest log weights plus noise are a draw without
        # replacement, of any number of items.
        uniform = torch.rand(len(visible), generator=generator).clamp(1e-12, 1 - 1e-7)
        noise = -torch.log(-torch.log(uniform))
        visible = visible[(weight[visible].log() + noise).topk(max_points).indices]
    return gaussians.select(visible)


def _dots(gaussians: Gaussians, total: int):
    import plotly.graph_objects as go

    x, y, z = gaussians.means.numpy().T
    pixels = 160  # roughly, per world unit in a figure of 480 pixels
    enlarged = (total / max(1, len(gaussians))) ** 0.5
    sizes = 2 * pixels * enlarged * gaussians.scales.topk(2, dim=-1).values.mean(-1)
    colors = (gaussians.colors.clamp(0, 1) * 255).round().int().tolist()
    marker = {
        "opacity": 1,  # plotly makes markers of unequal size transparent unless told so
        "size": sizes.clamp(2, 14).round(decimals=1).numpy(),
        "color": [f"rgb({red},{green},{blue})" for red, green, blue in colors],
        "line": {"width": 0},
    }
    name = f"{len(gaussians)} of {total} Gaussians"
    return go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, name=name, hoverinfo="name")


def _frusta(cameras: Cameras, length: float = 0.35):
    """One line through all pyramids: the eye, and the image's corners `length` away."""
    import plotly.graph_objects as go

    focal = cameras.Ks[:, 0, 0].cpu()
    x, y = length * 0.5 * cameras.width / focal, length * 0.5 * cameras.height / focal
    z = torch.full_like(x, length)
    eye = torch.zeros(len(cameras), 3)
    corners = [
        torch.stack([sx * x, sy * y, z], -1) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    local = torch.stack([eye, *corners], dim=1)  # [V, 5, 3], corners from the upper left
    pose = cameras.c2w().cpu()
    points = torch.einsum("vij,vpj->vpi", pose[:, :3, :3], local) + pose[:, None, :3, 3]
    # every edge once; the sides from the eye twice; then the pen is lifted
    path = points[:, [0, 1, 2, 0, 3, 4, 0, 1, 4, 3, 2]]
    gap = torch.full((len(cameras), 1, 3), torch.nan)
    x, y, z = torch.cat([path, gap], dim=1).reshape(-1, 3).numpy().T
    line = {"color": BLUE, "width": 2}
    return go.Scatter3d(x=x, y=y, z=z, mode="lines", line=line, name="cameras", hoverinfo="name")
