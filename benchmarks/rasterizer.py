"""How fast is the CPU rasteriser? `render()` against two references in PyTorch.

    python benchmarks/rasterizer.py [--workloads A B C] [--rounds 5] [--json FILE]

The references are gsplat's own and ours. Everything runs in one process on one thread,
interleaved, so that other load on the machine hits all alike; reported is the minimum
CPU time over the rounds. Forward is one picture with depth and alpha of each view;
forward + backward adds the gradients of all five Gaussian parameters. Only ratios mean
anything on another machine.

gsplat's reference (`gsplat.cuda._torch_impl`) needs CUDA for two steps and the package
nerfacc for a third; this file replaces these with PyTorch on the CPU: `list_tiles` for
its tile intersection, `list_pixels` for its rasterize_to_indices_in_range,
`nerfacc_on_cpu` for nerfacc.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import types
import warnings
from pathlib import Path

import torch
from torch import Tensor

from gsv3d_lib.cameras import Cameras, orbit_cameras
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rendering import Rendering, render
from gsv3d_lib.rendering.plain import ALPHA_MAX, ALPHA_MIN, TILE, TRANSMITTANCE_MIN

# Name: (image size, Gaussians, views). Ours in PyTorch is left out of C, where autograd
# would remember too many GB.
WORKLOADS = {"A": (64, 4_096, 8), "B": (128, 16_384, 8), "C": (256, 65_536, 4)}
REFERENCE_WORKLOADS = ("A", "B")
# --check fails below these ratios to gsplat's reference
FLOORS = {"forward": 35, "forward + backward": 15}


def make_scene(name: str, seed: int = 0) -> tuple[Gaussians, Cameras]:
    """A ball full of small Gaussians, seen from an orbit.

    Each is a fraction of a pixel to a few pixels wide.
    """
    size, count, views = WORKLOADS[name]
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    gaussians = Gaussians(
        means=directions * uniform(count, 1) ** (1 / 3),
        quats=torch.randn(count, 4, generator=generator),
        scales=uniform(count, 3, low=math.log(0.005), high=math.log(0.03)).exp(),
        opacities=uniform(count, low=0.1, high=0.9),
        colors=uniform(count, 3),
    )
    azimuths = torch.arange(views) * 360 / views
    elevations = 15 * torch.sin(azimuths)
    return gaussians, orbit_cameras(azimuths, elevations, size, distance=2.6, fov_deg=48.9)


# ---------------------------------------------------------------- gsplat's reference


@torch.no_grad()
def list_tiles(
    means2d: Tensor, radii: Tensor, depths: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """Ids of all V x G splats (view * G + Gaussian), and where tiles start.

    They are sorted by view, tile and depth.
    """
    num_tiles = torch.tensor([math.ceil(width / TILE), math.ceil(height / TILE)])
    first = ((means2d - radii) / TILE).floor().long().clamp(min=0).minimum(num_tiles)
    last = ((means2d + radii) / TILE).ceil().long().clamp(min=0).minimum(num_tiles)
    spans = ((last - first) * (radii > 0).all(-1, keepdim=True)).flatten(0, 1)
    counts = spans.prod(-1)
    ids = torch.repeat_interleave(counts)
    nth = torch.arange(len(ids)) - (counts.cumsum(0) - counts)[ids]
    x = first.flatten(0, 1)[ids, 0] + nth % spans[ids, 0]
    y = first.flatten(0, 1)[ids, 1] + nth // spans[ids, 0]
    tiles = (ids // means2d.shape[1] * num_tiles[1] + y) * num_tiles[0] + x
    order = depths.flatten()[ids].argsort(stable=True)
    order = order[tiles[order].argsort(stable=True)]
    lengths = torch.bincount(tiles, minlength=len(means2d) * int(num_tiles.prod()))
    return ids[order], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


@torch.no_grad()
def list_pixels(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    width: int,
    height: int,
    ids: Tensor,
    tile_starts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(Gaussian, pixel, view) of all that is blended.

    Pixel by pixel, and front to back.
    """
    views, count = opacities.shape
    across, down = math.ceil(width / TILE), math.ceil(height / TILE)
    means2d, conics, opacities = means2d.flatten(0, 1), conics.flatten(0, 1), opacities.flatten()
    side = torch.arange(TILE)
    y, x = (grid.flatten() for grid in torch.meshgrid(side, side, indexing="ij"))
    found = []
    for tile, (start, end) in enumerate(zip(tile_starts, tile_starts[1:], strict=False)):
        if start == end:
            continue
        view, row, column = tile // (across * down), tile // across % down, tile % across
        splats, rows, columns = ids[start:end], row * TILE + y, column * TILE + x
        dx = columns[:, None] + 0.5 - means2d[splats, 0]
        dy = rows[:, None] + 0.5 - means2d[splats, 1]
        a, b, c = conics[splats].unbind(-1)
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacities[splats] * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
        inside = (rows < height) & (columns < width)
        blended = (alpha >= ALPHA_MIN) & (sigma >= 0) & inside[:, None]
        blended &= torch.cumprod(1 - alpha * blended, 1) > TRANSMITTANCE_MIN
        pixel, splat = blended.nonzero(as_tuple=True)
        places = (rows * width + columns)[pixel]
        found.append((splats[splat] % count, places, torch.full_like(pixel, view)))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def nerfacc_on_cpu() -> types.ModuleType:
    """The two functions of nerfacc that gsplat's `accumulate` calls.

    Samples arrive ray by ray.
    """

    def render_weight_from_alpha(
        alphas: Tensor, ray_indices: Tensor, n_rays: int
    ) -> tuple[Tensor, Tensor]:
        log_after = torch.log1p(-alphas.double()).cumsum(0)  # float64: it runs through all rays
        log_before = torch.cat([log_after.new_zeros(1), log_after[:-1]])
        first = ray_indices.new_ones(1, dtype=torch.bool)
        starts = torch.cat([first, ray_indices[1:] != ray_indices[:-1]])
        ray = starts.cumsum(0) - 1
        transmittance = torch.exp(log_before - log_before[starts][ray]).to(alphas)
        return alphas * transmittance, transmittance

    def accumulate_along_rays(
        weights: Tensor, values: Tensor | None, ray_indices: Tensor, n_rays: int
    ) -> Tensor:
        values = weights[:, None] if values is None else weights[:, None] * values
        return values.new_zeros(n_rays, values.shape[1]).index_add(0, ray_indices, values)

    module = types.ModuleType("nerfacc")
    module.render_weight_from_alpha = render_weight_from_alpha
    module.accumulate_along_rays = accumulate_along_rays
    return module


def render_gsplat_reference(gaussians: Gaussians, cameras: Cameras) -> Rendering:
    """`render()` by gsplat's torch functions, white background."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gsplat.cuda import _torch_impl as gsplat_torch
    sys.modules.setdefault("nerfacc", nerfacc_on_cpu())
    size = cameras.width, cameras.height
    covariances, _ = gsplat_torch._quat_scale_to_covar_preci(
        gaussians.quats, gaussians.scales, True, False
    )
    radii, means2d, depths, conics, _ = gsplat_torch._fully_fused_projection(
        gaussians.means, covariances, cameras.viewmats, cameras.Ks, *size
    )
    opacities = gaussians.opacities.expand(len(cameras), -1)
    ids, tile_starts = list_tiles(means2d, radii, depths, *size)
    indices = list_pixels(means2d, conics, opacities, *size, ids, tile_starts.tolist())
    features = torch.cat([gaussians.colors.expand(len(cameras), -1, -1), depths[..., None]], -1)
    sums, alpha = gsplat_torch.accumulate(means2d, conics, opacities, features, *indices, *size)
    return Rendering(sums[..., :3] + 1 - alpha, sums[..., 3:] / alpha.clamp(min=1e-10), alpha)


# ---------------------------------------------------------------- measuring

RENDERERS = {
    "gsplat reference": render_gsplat_reference,
    "our reference": lambda gaussians, cameras: render(gaussians, cameras, backend="torch"),
    "render()": render,
}


def forward(renderer, gaussians: Gaussians, cameras: Cameras) -> Rendering:
    with torch.no_grad():
        return renderer(gaussians, cameras)


def forward_backward(renderer, gaussians: Gaussians, cameras: Cameras) -> list[Tensor]:
    """Gradients of a fixed random combination of all outputs."""
    leaves = Gaussians(*(t.clone().requires_grad_() for t in gaussians.tensors()))
    generator = torch.Generator().manual_seed(1)
    outputs = list(renderer(leaves, cameras))
    weights = [torch.randn(output.shape, generator=generator) for output in outputs]
    torch.autograd.backward(outputs, weights)
    return [t.grad for t in leaves.tensors()]


PASSES = {"forward": forward, "forward + backward": forward_backward}


def measure(name: str, rounds: int) -> dict:
    """Minimum CPU milliseconds of every renderer and pass on one workload.

    And how far the results disagree.
    """
    gaussians, cameras = make_scene(name)
    slow = () if name in REFERENCE_WORKLOADS else ("our reference",)
    renderers = {k: f for k, f in RENDERERS.items() if k not in slow}
    seconds = {(renderer, step): math.inf for renderer in renderers for step in PASSES}
    results = {}
    for turn in range(rounds + 1):  # the first one warms up
        for (renderer, step), best in seconds.items():
            start = time.process_time()
            results[renderer, step] = PASSES[step](renderers[renderer], gaussians, cameras)
            elapsed = time.process_time() - start
            seconds[renderer, step] = min(best, elapsed) if turn else best
    table = {
        renderer: {step: 1e3 * seconds[renderer, step] for step in PASSES} for renderer in renderers
    }
    return {"cpu_ms": table, "ratio": _ratios(table), "disagreement": _disagreement(results)}


def _ratios(table: dict) -> dict:
    """How many times faster render() is than each of the others."""
    return {
        renderer: {step: times[step] / table["render()"][step] for step in PASSES}
        for renderer, times in table.items()
        if renderer != "render()"
    }


def _disagreement(results: dict) -> dict:
    """render() against gsplat's reference.

    Of the picture the mean absolute difference, of the gradients the relative one.
    """
    ours, theirs = results["render()", "forward"], results["gsplat reference", "forward"]
    both = (results[name, "forward + backward"] for name in ("render()", "gsplat reference"))
    pairs = zip(*both, strict=True)
    gradients = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return {"rgb": float((ours.rgb - theirs.rgb).abs().mean()), "gradients": max(gradients)}


def print_table(report: dict) -> None:
    heads = f"{'forward ms':>12}{'ratio':>8}{'fwd + bwd ms':>14}{'ratio':>8}"
    print(f"{'workload':10}{'renderer':20}{heads}")
    for name, result in report.items():
        for renderer, times in result["cpu_ms"].items():
            row = f"{name:10}{renderer:20}"
            for step, width in zip(PASSES, (12, 14), strict=True):
                ratio = result["ratio"].get(renderer, {}).get(step)
                row += f"{times[step]:{width}.1f}" + (f"{ratio:7.1f}x" if ratio else " " * 8)
            print(row)
        off = result["disagreement"]
        print(f"{'':10}off gsplat's: rgb {off['rgb']:.1e}, gradients {off['gradients']:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    floors = f"fail when A or B falls below {FLOORS}"
    parser.add_argument("--check", action="store_true", help=floors)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {name: measure(name, args.rounds) for name in args.workloads}
    print_table(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    slow = [
        name
        for name in set(report) & {"A", "B"}
        for step, floor in FLOORS.items()
        if report[name]["ratio"]["gsplat reference"][step] < floor
    ]
    return int(args.check and bool(slow))


if __name__ == "__main__":
    sys.exit(main())
