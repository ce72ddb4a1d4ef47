"""Notebook 08: its derivations equal the library, its checkers find typical errors, and
its protocol card is the code's.
"""

import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import run_experiments
import torch
import trimesh
from notebook_world import accepts, definitions, rejects

from gsv3d_lib import backprojection, cameras
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.config import preset
from gsv3d_lib.course.exercises import evaluation as exercises
from gsv3d_lib.data import dataset, make_dataset
from gsv3d_lib.data.raycast import render_mesh
from gsv3d_lib.evaluation import consistency, metrics, protocol
from gsv3d_lib.evaluation.lpips import LPIPS
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


def test_lpips_equals_the_library(notebook):
    net = LPIPS("alex").requires_grad_(False)
    net.weights = torch.nn.ParameterList(torch.rand_like(w) for w in net.weights)
    a, b = random_images(2, 40, 40, 3), random_images(2, 40, 40, 3, seed=1)
    by_hand = notebook["lpips_by_hand"](net.features(a), net.features(b), list(net.weights))
    assert torch.allclose(by_hand, net(a, b), atol=1e-5)


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
    around = mesh.surrounding_cameras(6, 48)
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


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize("name", ["object_psnr", "chamfer_loss", "eight_cameras"])
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
        (lambda a, b: max(x.mean() for x in both_ways(a, b)), "the larger of both ways"),
        (lambda a, b: torch.cdist(a, b).mean(), "mean of all distances"),
        (lambda a, b: torch.cat(both_ways(a, b)).mean(), "one mean over both sets"),
        (lambda a, b: chamfer_by_root(a, b, 0), "the gradient is inf or nan"),
    ],
)
def test_chamfer_loss_rejects(wrong, hint):
    assert rejects(exercises.check_chamfer_loss, wrong, hint)


def chamfer_by_root(a, b, inside):
    distances = (((a[:, None] - b[None]) ** 2).sum(-1) + inside).sqrt()
    return (distances.min(1).values.mean() + distances.min(0).values.mean()) / 2


def test_chamfer_loss_accepts_a_root_with_a_tiny_number_inside():
    assert accepts(exercises.check_chamfer_loss, lambda a, b: chamfer_by_root(a, b, 1e-12))


def reads(pixel):
    def depth_seen(points, depth, camera):
        local = points @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]
        u, v, z = (local @ camera.Ks[0].T).unbind(-1)
        column, row = pixel(u / z).long(), pixel(v / z).long()
        inside = (row >= 0) & (row < 16) & (column >= 0) & (column < 16)
        return torch.where(inside, depth[row.clamp(0, 15), column.clamp(0, 15)], 0)

    return depth_seen


def test_the_seeded_bug_is_told_and_its_repair_accepted(notebook, capsys):
    check = exercises.check_depth_seen
    assert not check(notebook["depth_seen"])
    assert "half a pixel further on" in capsys.readouterr().out
    assert accepts(check, exercises.depth_seen)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (reads(torch.round), "half a pixel further on"),
        (reads(torch.clone), "take the floor first"),
        (lambda p, d, c: exercises.depth_seen(p, d.T, c), "Rows and columns are swapped"),
        (lambda p, d, c: exercises.depth_seen(p, d, c).clamp(min=1), "its depth is 0"),
    ],
)
def test_depth_seen_rejects(wrong, hint):
    assert rejects(exercises.check_depth_seen, wrong, hint)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda: [(45.0 * k, 15.0) for k in range(8)], "No camera looks from below"),
        (lambda: [(45.0 * k, 80.0 if k % 2 else -15.0) for k in range(8)][:7], "you took 7"),
        (lambda: [(0.0, 40.0 - 10 * k) for k in range(8)], "is seen by no camera"),
        (lambda: [(math.radians(a), e) for a, e in exercises.eight_cameras()], "not in radians"),
        (lambda: [(45.0 * k, 90.0) for k in range(8)], "within -85 and 85"),
    ],
)
def test_eight_cameras_rejects(wrong, hint):
    assert rejects(exercises.check_eight_cameras, wrong, hint)


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
    assert TABLE["lpips"] == CARD["lpips"]["nets"] and {"lpips", "lpips_vgg"} <= measured
    stated = CARD["back_projection"]
    assert stated["shows_px"] == backprojection.SHOWS
    cover = {"solid": backprojection.SOLID, "facing": backprojection.FACING}
    cover |= {"hole": backprojection.HOLE}
    cover |= {"scale_px": backprojection.COVER_SCALE, "opacity": backprojection.COVER_OPACITY}
    assert stated["cover"] == cover
    assert (stated["background_alpha"], stated["margin_px"]) == (backprojection.VISIBLE_ALPHA, 1)
    assert CARD["reprojection"]["occluded"] == consistency.OCCLUDED
    assert CARD["reprojection"]["alpha_threshold"] == mesh.SURFACE_ALPHA
    assert (CARD["ghosting"]["depth_spread"], CARD["ghosting"]["opaque"]) == (
        mesh.MIXED_DEPTH,
        consistency.OPAQUE,
    )


def test_card_states_how_experiments_are_run():
    stated, parser = CARD["experiments"], run_experiments.build_parser()
    assert parser.get_default("seeds") == stated["seeds"]
    assert parser.get_default("sampling_steps") == stated["sampler"]["steps"]
    for path in sorted((ROOT / "data" / "results").glob("*.json")):
        record = json.loads(path.read_text())
        if "differences" in record and "sampler" in record:
            asked = re.search(r"--sampling-steps (\d+)", record["command"])
            steps = int(asked[1]) if asked else stated["sampler"]["steps"]
            assert record["sampler"] == stated["sampler"] | {"steps": steps}, path.name


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
    grid = CARD["volume_iou"]["grid"]
    mesh = CARD["mesh"]
    camera = CARD["camera"]
    for phrase in (
        f"{len(CARD['objects'])} Google Scanned Objects",
        f"view {CARD['input_view']}, the front",
        f"{CARD['resolution_px']} x {CARD['resolution_px']} pixels",
        f"{CARD['chamfer']['points']:,} points",
        f"distance {CARD['f_score']['threshold']}",
        f"{grid} x {grid} x {grid} cells",
        f"fused from {mesh['views']} rendered depth maps of {mesh['size_px']} pixels",
        f"{CARD['sampler']['steps']} steps, guidance {CARD['sampler']['guidance']}",
        f"field of view {camera['field_of_view_deg']} degrees, distance {camera['distance']}",
        *CARD["not_measured"],
    ):
        assert phrase in text, phrase
