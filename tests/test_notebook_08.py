"""Notebook 08: its derivations equal the library, its checkers find typical errors, and
its protocol card is the code's.
"""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from notebook_world import accepts, definitions, rejects

from gsv3d_lib import backprojection, cameras
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.config import preset
from gsv3d_lib.course.exercises import evaluation as exercises
from gsv3d_lib.data import dataset, make_dataset
from gsv3d_lib.data.raycast import render_mesh
from gsv3d_lib.evaluation import baselines, consistency, experiments, metrics, protocol
from gsv3d_lib.export import mesh
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.weights.checkpoint import load_config

ROOT = Path(__file__).resolve().parents[1]
CARD = json.loads((ROOT / "data" / "results" / "protocol.json").read_text())
TABLE = json.loads((ROOT / "data" / "results" / "tiny-gso.json").read_text())


@pytest.fixture(scope="module")
def notebook() -> dict:
    return definitions("08")


def random_images(*shape, seed=0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_gaussians(count=40, seed=0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=0.5 * torch.randn(count, 3, generator=generator).clamp(-1, 1),
        quats=torch.randn(count, 4, generator=generator),
        scales=torch.full((count, 3), 0.1),
        opacities=torch.full((count,), 0.6),
        colors=torch.rand(count, 3, generator=generator),
    )


# ---------------------------------------------------------------- derivations


def test_image_metrics_equal_the_library(notebook):
    a, b = random_images(3, 24, 24, 3), random_images(3, 24, 24, 3, seed=1)
    assert notebook["psnr_by_hand"](a, b).item() == pytest.approx(metrics.psnr(a, b), abs=1e-5)
    assert notebook["ssim_map"](a[0], b[0]).mean().item() == pytest.approx(
        metrics.ssim(a[0], b[0]), abs=1e-5
    )
    depths = [x[..., 0] * (x[..., 1] > 0.3) for x in (a, b)]
    assert notebook["depth_l1_by_hand"](*depths).item() == pytest.approx(
        metrics.depth_l1(*depths), abs=1e-5
    )


def test_shape_metrics_equal_the_library(notebook):
    a, b = notebook["sphere"](500, 0.9, seed=1), notebook["sphere"](300, 1.0, seed=2)
    there, back = notebook["nearest_distances"](a, b), notebook["nearest_distances"](b, a)
    assert (there.mean() + back.mean()).item() / 2 == pytest.approx(
        metrics.chamfer_distance(a, b), abs=1e-5
    )
    for threshold in (0.05, 0.12, 0.2):
        by_hand = notebook["f_score_by_hand"](a, b, threshold)
        assert by_hand == pytest.approx(metrics.f_score(a, b, threshold), abs=1e-5)
    boxes = notebook["box_grid"](-0.1, 32), notebook["box_grid"](0.2, 32)
    assert notebook["iou_by_hand"](*boxes) == pytest.approx(metrics.volume_iou(*boxes))


def test_fusion_equals_the_library(notebook):
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.7)
    around = mesh.sphere_cameras(6, 48)
    depth = render_mesh(ball, around, 1)[1]
    library = mesh.fuse(depth, (depth > 0).astype("f4"), around, 24)
    line = torch.linspace(-mesh.EXTENT, mesh.EXTENT, 24)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1).reshape(-1, 3)
    step = (line[1] - line[0]).item()
    by_hand = notebook["fuse"](
        points, torch.from_numpy(depth), around, mesh.TRUNCATION * step
    ).reshape(24, 24, 24)
    difference = (by_hand - torch.from_numpy(library)).abs()
    # a point whose image falls on the border of two pixels may round either way
    assert (difference < 1e-5).float().mean() > 0.998


def test_visible_surface_leaves_out_what_is_inside(notebook):
    ball, kernel = (trimesh.creation.icosphere(subdivisions=3, radius=r) for r in (0.9, 0.4))
    points = notebook["visible_surface"](trimesh.util.concatenate([ball, kernel]), 1000)
    assert points.shape == (1000, 3)
    assert np.linalg.norm(points, axis=1).min() > 0.85


def test_depth_spread_equals_the_library(notebook):
    gaussians, views = random_gaussians(), orbit_cameras(torch.tensor([0.0, 70.0]), 15.0, 32)
    spread, alpha = notebook["depth_spread"](gaussians, views)
    for view in range(2):
        library = mesh.front_and_spread(gaussians, views[view])[1][0, ..., 0]
        assert torch.allclose(spread[view], library, atol=1e-5)
    assert alpha.shape == (2, 32, 32)


def test_ghosting_knows_a_solid_from_a_double(notebook):
    views = orbit_cameras(torch.tensor([0.0]), 0.0, 32)
    line = torch.linspace(-0.5, 0.5, 24)
    y, z = (t.reshape(-1) for t in torch.meshgrid(line, line, indexing="ij"))

    def sheet(x: float, opacity: float) -> Gaussians:
        count = len(y)
        means = torch.stack([torch.full_like(y, x), y, z], dim=-1)
        quats = torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
        return Gaussians(
            means, quats, torch.full((count, 3), 0.03), torch.full((count,), opacity), means * 0
        )

    mask = torch.zeros(1, 32, 32, 1)
    mask[:, 13:19, 13:19] = 1
    one, near, far = sheet(0.0, 0.99), sheet(0.4, 0.3), sheet(-0.4, 0.99)
    both = Gaussians(*(torch.cat([getattr(s, f) for s in (near, far)]) for f in vars(near)))
    assert notebook["ghosting"](one, views, mask) == 0
    assert notebook["ghosting"](both, views, mask) == 1
    assert notebook["ghosting"](sheet(0.0, 0.1), views, mask) > 0.9  # background shines through


def test_bootstrap_interval_equals_the_library(notebook):
    values = np.random.default_rng(0).normal(1.0, 2.0, 60)
    assert notebook["bootstrap_interval"](values) == metrics.bootstrap_interval(values)


@pytest.mark.parametrize(
    ("seeds", "low", "high", "end"),
    [
        ([], None, None, "no seed in common with the reference: no verdict"),
        ([0.2], 0.1, 0.3, "one seed: no verdict"),
        ([0.2, 0.1], 0.1, 0.3, "2 of 2 seeds better: better, by two seeds only"),
        ([0.3, -0.1], 0.05, 0.2, "1 of 2 seeds better: no difference shown, by two seeds only"),
        ([0.2, 0.1, 0.3], 0.1, 0.3, "3 of 3 seeds better: better"),
        ([0.4, 0.3, -0.1], 0.1, 0.3, "2 of 3 seeds better: no difference shown"),
        ([0.2, 0.1, 0.3], -0.1, 0.3, "3 of 3 seeds better: no difference shown"),
        ([-0.2, -0.1, -0.3], -0.3, -0.1, "0 of 3 seeds better: worse"),
    ],
)
def test_an_arm_is_judged_by_two_seeds_or_more_that_agree(notebook, seeds, low, high, end):
    def results(sign):
        ends = (None, None) if low is None else sorted((sign * low, sign * high))
        difference = {
            "mean": sign * np.mean(seeds) if seeds else None,
            "low": ends[0],
            "high": ends[1],
        }
        return {"differences": {"x": {"psnr": difference | {"seeds": [sign * s for s in seeds]}}}}

    for sign, better in ((1, "higher"), (-1, "lower")):
        assert notebook["verdict"](results(sign), "x", "psnr", better).endswith(end)


def test_the_readmes_claims_are_judged_as_the_notebook_does(notebook):
    words = {"yes": ": better", "no": ": worse", "not shown": ": no difference shown"}
    for _, name, arm, metric, sign in experiments.CLAIMS:
        results = json.loads((ROOT / "data" / "results" / f"{name}.json").read_text())
        word = words[experiments.holds(results["differences"][arm][metric], sign)]
        assert notebook["verdict"](
            results, arm, metric, "higher" if sign > 0 else "lower"
        ).endswith(word)


def test_ghosting_and_detail_equal_the_library(notebook):
    gaussians, views = random_gaussians(), orbit_cameras(torch.tensor([0.0, 70.0]), 15.0, 32)
    mask = torch.zeros(2, 32, 32, 1)
    mask[:, 8:24, 8:24] = 1
    expected = consistency.ghosting(gaussians, views, mask)
    assert (
        notebook["ghosting"](gaussians, views, mask) == pytest.approx(expected)
        and 0 < expected <= 1
    )
    made, truth = random_images(2, 32, 32, 3), random_images(2, 32, 32, 3, seed=1)
    assert notebook["detail"](made, truth, mask) == pytest.approx(
        consistency.detail(made, truth, mask)
    )


def test_failure_numbers_have_their_closed_forms(notebook):
    views = random_images(2, 16, 16, 3)
    ones = torch.ones(2, 16, 16, 1)
    assert notebook["detail"](views, views, ones) == pytest.approx(1)
    assert notebook["detail"](0.5 * views, views, ones) == pytest.approx(0.5)
    assert notebook["front_back_similarity"](views[0], views[0].flip(-2)) == math.inf
    camera = orbit_cameras(torch.tensor([0.0]), 15.0, 32)
    card = baselines.flat_card(random_images(32, 32, 3), torch.ones(32, 32, 1), camera)
    moved = notebook["corrugated"](card, camera, 0.3)

    def project(g: Gaussians) -> torch.Tensor:
        local = g.means @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]
        return torch.cat([local[:, :2] / local[:, 2:], g.scales / local[:, 2:]], dim=1)

    # same place and size in the picture
    assert torch.allclose(project(moved), project(card), atol=1e-5)
    assert (moved.means - card.means).norm(dim=1).mean() > 0.2


def test_a_two_faced_ring_repeats_its_front(notebook):
    ring = random_images(16, 8, 8, 3)
    made = notebook["two_faced"](ring)
    front = [(protocol.FRONT + step) % 16 for step in range(-4, 5)]
    assert torch.equal(made[front], ring[front])
    assert (
        notebook["front_back_similarity"](made[protocol.FRONT], made[(protocol.FRONT + 8) % 16])
        == math.inf
    )


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize("name", ["object_psnr", "chamfer_loss", "ratio_interval"])
def test_stubs_are_not_written_and_solutions_are_right(notebook, name, capsys):
    check = getattr(exercises, f"check_{name}")
    assert not check(notebook[name])
    assert "not written yet" in capsys.readouterr().out
    assert accepts(check, getattr(exercises, name))


def inside_error(predicted, truth, mask):
    return ((predicted - truth) ** 2 * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda p, t, m: (-10 * inside_error(p, t, m).log()).mean(), "natural logarithm"),
        (lambda p, t, m: (-20 * inside_error(p, t, m).log10()).mean(), "factor is 10"),
        (lambda p, t, m: (10 * inside_error(p, t, m).log10()).mean(), "sign"),
        (
            lambda p, t, m: (-10 * (((p - t) ** 2 * m).mean((1, 2, 3))).log10()).mean(),
            "inside the mask only",
        ),
        (lambda p, t, m: (-10 * (3 * inside_error(p, t, m)).log10()).mean(), "three channels"),
        (lambda p, t, m: -10 * inside_error(p, t, m).mean().log10(), "dB per view first"),
    ],
)
def test_object_psnr_rejects(wrong, hint):
    assert rejects(exercises.check_object_psnr, wrong, hint)


def both_ways(a, b):
    distances = torch.cdist(a, b)
    return distances.min(1).values, distances.min(0).values


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda a, b: both_ways(a, b)[0].mean(), "add the way back"),
        (lambda a, b: both_ways(a, b)[1].mean(), "add the other direction"),
        (lambda a, b: sum(x.square().mean() for x in both_ways(a, b)) / 2, "squared distances"),
        (lambda a, b: sum(x.square().mean() for x in both_ways(a, b)), "squared distances.*halve"),
        (lambda a, b: sum(x.mean() for x in both_ways(a, b)), "half of their sum"),
        (lambda a, b: sum(x.sum() for x in both_ways(a, b)) / 2, "mean over the points"),
        (lambda a, b: exercises.chamfer_loss(a, b).detach(), "no gradient"),
    ],
)
def test_chamfer_loss_rejects(wrong, hint):
    assert rejects(exercises.check_chamfer_loss, wrong, hint)


def resampled(
    ours, theirs, draws=4000, replace=True, paired=True, quantiles=(0.025, 0.975), of_means=True
):
    rng, count = np.random.default_rng(1), len(ours)

    def indices():
        return (
            rng.integers(count, size=(draws, count))
            if replace
            else rng.random((draws, count)).argsort(axis=1)
        )

    i = indices()
    j = i if paired else indices()
    ratios = ours[i].mean(1) / theirs[j].mean(1) if of_means else (ours[i] / theirs[j]).mean(1)
    return tuple(np.quantile(ratios, quantiles))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"paired": False}, "breaks the pairs"),
        ({"replace": False}, "with replacement"),
        ({"quantiles": (0.05, 0.95)}, "too narrow"),
        ({"quantiles": (0.005, 0.995)}, "too wide"),
        ({"of_means": False}, "mean of the ratios"),
    ],
)
def test_ratio_interval_rejects(options, hint):
    assert rejects(exercises.check_ratio_interval, lambda a, b: resampled(a, b, **options), hint)


def test_ratio_interval_accepts_another_generator():
    assert accepts(exercises.check_ratio_interval, resampled)


# ---------------------------------------------------------------- the protocol card


def test_card_names_the_objects_of_the_table():
    assert (
        CARD["objects"] == [row["id"] for row in TABLE["rows"]]
        and TABLE["objects"] == len(CARD["objects"]) == 41
    )
    assert CARD["sampler"]["seed"] == TABLE["seed"]


def test_card_views_are_those_of_the_code():
    azimuths, elevations = make_dataset.dataset_angles(0)
    scene = type("Scene", (), {"rgb": torch.zeros(len(azimuths), 4, 4, 3)})
    assert CARD["input_view"] == protocol.FRONT
    assert CARD["target_views"] == protocol.other_views(scene).tolist()
    assert CARD["decoder_input_views"] == list(range(dataset.RING))
    assert CARD["decoder_target_views"] == list(range(dataset.RING, len(azimuths)))
    camera = CARD["input_camera"]
    assert (
        camera["azimuth_deg"] == azimuths[protocol.FRONT]
        and camera["elevation_deg"] == elevations[protocol.FRONT]
    )
    assert CARD["ring"] == {
        "views": dataset.RING,
        "step_deg": azimuths[1],
        "elevation_deg": make_dataset.RING_ELEVATION,
    }
    free = {
        "views": make_dataset.RANDOM_VIEWS,
        "elevation_deg": list(make_dataset.RANDOM_ELEVATIONS),
    }
    assert CARD["free_views"] == free
    assert CARD["camera"] == {"field_of_view_deg": cameras.FOV_DEG, "distance": cameras.DISTANCE}


def test_card_scales_and_sampler_are_the_presets():
    for config in (preset("tiny"), load_config(ROOT / "data" / "checkpoints" / "tiny")):
        assert CARD["resolution_px"] == config.image_size and config.object_radius == 1
        assert (
            CARD["sampler"]["steps"] == config.sampling_steps
            and CARD["sampler"]["guidance"] == config.guidance
        )


def test_card_formulas_are_the_metrics():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert (
        CARD["chamfer"]["points"] == metrics.NUM_POINTS == default(metrics.surface_points, "count")
    )
    assert CARD["chamfer"]["mesh_seed"] == default(metrics.surface_points, "seed")
    assert (
        CARD["f_score"]["threshold"]
        == metrics.F_SCORE_THRESHOLD
        == default(metrics.f_score, "threshold")
    )
    assert (
        CARD["volume_iou"]["grid"]
        == metrics.GRID_RESOLUTION
        == default(metrics.occupancy_grid, "resolution")
    )
    assert CARD["depth_l1"]["missing"] == default(metrics.depth_l1, "missing")
    fusion = CARD["mesh"]
    assert (fusion["extent"], fusion["truncation_voxels"]) == (mesh.EXTENT, mesh.TRUNCATION)
    assert fusion["background_weight"] == mesh.BACKGROUND_WEIGHT
    measured = set(TABLE["rows"][0]["generated"])
    assert {
        "chamfer",
        "f_score",
        "iou",
        "reprojection",
        "split_psnr",
        "ghosting",
        "detail",
    } <= measured
    assert not measured & {"fid", "kid", "clip_iqa"}
    weights = {key: CARD["lpips"][key] for key in ("net", "sha256")}
    assert TABLE.get("lpips") == (weights if "lpips" in measured else None)
    stated = CARD["back_projection"]
    assert (stated["behind"], stated["shows_px"]) == (backprojection.BEHIND, backprojection.SHOWS)
    assert (stated["background_alpha"], stated["margin_px"]) == (backprojection.VISIBLE_ALPHA, 1)
    assert CARD["reprojection"]["occluded"] == consistency.OCCLUDED
    assert CARD["reprojection"]["alpha_threshold"] == mesh.SURFACE_ALPHA
    assert (CARD["ghosting"]["depth_spread"], CARD["ghosting"]["opaque"]) == (
        mesh.MIXED_DEPTH,
        consistency.OPAQUE,
    )


def test_card_states_how_experiments_are_run():
    stated, parser = CARD["experiments"], experiments.build_parser()
    assert parser.get_default("seeds") == stated["seeds"]
    assert parser.get_default("sampling_steps") == stated["sampler"]["steps"]
    for path in sorted((ROOT / "data" / "results").glob("*.json")):
        record = json.loads(path.read_text())
        if "differences" in record and "sampler" in record:
            assert record["sampler"] == stated["sampler"], path.name


def test_card_mesh_is_the_one_that_is_evaluated(monkeypatch):
    asked = {}

    def fuse(gaussians, **options):
        asked.update(options)
        raise mesh.NoSurface("no surface")

    monkeypatch.setattr(protocol, "fuse_mesh", fuse)
    scores = protocol.mesh_scores(
        random_gaussians(), protocol.Truth(np.zeros((1, 3)), np.zeros((64, 64, 64), bool))
    )
    assert math.isnan(scores["chamfer"])  # null in the file
    assert "iou" not in protocol.mesh_scores(
        random_gaussians(), protocol.Truth(np.zeros((1, 3)), None)
    )  # unknown solid
    assert (
        scores["f_score"] == CARD["f_score"]["no_surface"]
        and scores["iou"] == CARD["volume_iou"]["no_surface"]
    )
    assert asked == {
        "resolution": CARD["mesh"]["grid"],
        "num_views": CARD["mesh"]["views"],
        "size": CARD["mesh"]["size_px"],
        "colors": False,  # no score looks at them
    }


def test_a_pixel_below_half_alpha_counts_as_missing(monkeypatch):
    """The card's alpha threshold, and its white background."""
    faint = CARD["depth_l1"]["alpha_threshold"]
    shape = (1, 16, 16)
    for alpha, expected in ((faint, CARD["depth_l1"]["missing"]), (faint + 0.01, 0.5)):
        answer = torch.ones(*shape, 3), torch.full((*shape, 1), 3.0), torch.full((*shape, 1), alpha)
        monkeypatch.setattr(protocol, "render", lambda *_, answer=answer: answer)
        scene = dataset.Scene(
            torch.ones(*shape, 3),
            torch.ones(*shape, 1),
            torch.full((*shape, 1), 3.5),
            orbit_cameras(torch.zeros(1), 0.0, 16),
            torch.zeros(1),
            torch.zeros(1),
        )
        scores = protocol.image_scores(random_gaussians(), scene, 0, torch.tensor([0]))
        assert scores["depth_l1"] == pytest.approx(expected)
    assert CARD["background"] == [1.0, 1.0, 1.0] and CARD["alignment"] == "none"


def test_card_in_prose_states_the_same_numbers():
    text = " ".join((ROOT / "docs" / "protocol.md").read_text().split())
    for phrase in (
        f"{len(CARD['objects'])} Google Scanned Objects",
        f"view {CARD['input_view']}, the front",
        f"{CARD['resolution_px']} x {CARD['resolution_px']} pixels",
        f"{CARD['chamfer']['points']:,} points",
        f"distance {CARD['f_score']['threshold']}",
        f"{CARD['volume_iou']['grid']} x {CARD['volume_iou']['grid']} x {CARD['volume_iou']['grid']} cells",
        f"fused from {CARD['mesh']['views']} rendered depth maps of {CARD['mesh']['size_px']} pixels",
        f"{CARD['sampler']['steps']} steps, guidance {CARD['sampler']['guidance']}",
        f"field of view {CARD['camera']['field_of_view_deg']} degrees, distance {CARD['camera']['distance']}",
        *CARD["not_measured"],
    ):
        assert phrase in text, phrase
