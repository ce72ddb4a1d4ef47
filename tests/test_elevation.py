"""The elevation of a picture.

What the estimator sees, that it learns what can be learned, and how it is asked for.
"""

import argparse
import math

import fit_elevation
import pytest
import torch
from tiny_world import SIZE, ball_pictures, one_sentence, randn

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.data import elevation as el
from gsv3d_lib.data.dataset import COLUMN_NAMES, ViewTensors
from gsv3d_lib.data.make_dataset import RANDOM_ELEVATIONS
from gsv3d_lib.pipeline import GSV3DPipeline
from gsv3d_lib.system.command import degrees


def stripes(angle: float, size: int = 64) -> torch.Tensor:
    """A square of stripes on white [1, S, S, 3].

    They run in direction `angle` (degrees, image x to the right, y down).
    """
    y, x = torch.meshgrid(
        torch.arange(size) - size / 2, torch.arange(size) - size / 2, indexing="ij"
    )
    across = -math.sin(math.radians(angle)) * x + math.cos(math.radians(angle)) * y
    wave = 0.5 + 0.4 * torch.sin(across)
    return torch.where((x.abs() < 20) & (y.abs() < 20), wave, 1.0)[None, ..., None].expand(
        -1, -1, -1, 3
    )


def poles(objects: int) -> ViewTensors:
    """Discs that lie on the ground.

    Their outline is an ellipse that opens with the elevation.
    """
    generator = torch.Generator().manual_seed(0)
    elevations = torch.rand(objects, 24, generator=generator) * 50 - 10
    azimuths = torch.rand(objects, 24, generator=generator) * 360
    rows = []
    for e, a in zip(elevations, azimuths, strict=True):
        disc = [
            ((0.7 * math.cos(t), 0.7 * math.sin(t), 0.0), 0.1, (0.2, 0.3, 0.4))
            for t in torch.arange(0, 6.28, 0.25)
        ]
        rows.append(ball_pictures(orbit_cameras(a, e, SIZE), disc)[:2])
    rgb, alpha = (torch.stack(column) for column in zip(*rows, strict=True))
    ids = [str(k) for k in range(objects)]
    depth = torch.zeros(*alpha.shape)
    return ViewTensors(ids, (rgb * 255).byte(), (alpha * 255).byte(), depth, azimuths, elevations)


def test_the_direction_of_edges_is_what_is_measured():
    # edges run along, gradients across
    for angle, expected in ((0.0, 90), (30.0, 120), (90.0, 0), (160.0, 70)):
        histogram = (
            el.edge_histograms(stripes(angle))
            .reshape(el.BINS, el.CELLS, el.CELLS)[:, 3:5, 3:5]
            .sum((1, 2))
        )
        centre = (histogram.argmax() / el.BINS - 0.5) * 180  # of the bin, as a direction
        assert abs((centre - expected + 90) % 180 - 90) <= 180 / el.BINS
    dark = el.edge_histograms(1 - stripes(30.0))
    assert torch.allclose(dark, el.edge_histograms(stripes(30.0)), atol=1e-4)


def test_place_size_and_brightness_of_edges_do_not_matter():
    picture = torch.ones(1, 96, 96, 3)
    picture[:, 40:80, 10:40] = 0.9 * stripes(25.0)[:, 12:52, 17:47]
    moved, larger = picture.roll((-20, 30), (1, 2)), torch.ones(1, 192, 192, 3)
    larger[:, :96, 96:] = picture
    a, b, c = (el.framed(p) for p in (picture, moved, larger))
    assert torch.allclose(a, b, atol=1e-5) and (a - c).abs().mean() < 0.01
    rows = torch.nonzero((a[0] < 0.95).any(-1).any(1)).flatten()
    assert abs(len(rows) / el.SIZE - el.DEFAULT_FILL) < 0.04
    # nothing to frame
    assert torch.equal(el.framed(torch.ones(1, 64, 64, 3)), torch.ones(1, 64, 64, 3))


def test_ridge_is_the_minimiser():
    features, truth = randn(50, 6), randn(50, seed=1)
    fitted = fit_elevation.fit_ridge(features, truth, 0.3)
    deviation = features.std(0) + 1e-3

    def objective(weights, bias):
        return (bias + (features - fitted.mean) @ weights - truth).pow(2).mean() + 0.3 * (
            deviation * weights
        ).pow(2).sum()

    weights, bias = fitted.weights.clone().requires_grad_(), fitted.bias.clone().requires_grad_()
    for gradient in torch.autograd.grad(objective(weights, bias), (weights, bias)):
        assert gradient.abs().max() < 1e-4


def test_what_can_be_learned_is_learned_and_kept(tmp_path):
    views = poles(18)
    estimator, scores = fit_elevation.fit(views)
    assert scores["error"] < 0.4 * scores["constant"]
    rgb = views.rgb[0].float() / 255
    # a mirror image has the same elevation
    assert torch.allclose(estimator(rgb), estimator(rgb.flip(2)), atol=0.01)
    answers = estimator(
        torch.cat([rgb, torch.rand(4, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))])
    )
    assert answers.min() >= -10 and answers.max() <= 40 and RANDOM_ELEVATIONS == (-10.0, 40.0)
    estimator.save(tmp_path)
    assert torch.equal(el.load_elevation(tmp_path)(rgb), estimator(rgb))
    assert el.estimator_path(tmp_path).stat().st_size < 10_000
    el.estimator_path(tmp_path).write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read") as error:
        el.load_elevation(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bias": torch.tensor(torch.nan)}, "bias holds values that are not finite"),
        ({"weights": torch.full((576,), torch.inf)}, "weights holds values that are not finite"),
        ({"weights": torch.zeros(5)}, r"weights has the shape \[5\], not \[576\]"),
        ({"mean": torch.zeros(576, dtype=torch.int64)}, "mean is of type i8, not f4"),
    ],
)
def test_an_estimator_with_wrong_numbers_is_one_sentence(tmp_path, change, sentence):
    el.Elevation(
        **{"weights": torch.zeros(576), "mean": torch.zeros(576), "bias": torch.tensor(9.0)}
        | change
    ).save(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be read .*{sentence}") as error:
        el.load_elevation(tmp_path)
    one_sentence(error)


def test_only_free_views_are_measured_on(monkeypatch, tmp_path, capsys):
    views = poles(2)
    # a ring view that shows nothing takes no free view with it
    views.alpha[0, fit_elevation.RING_VIEWS[0]] = 0
    assert [len(e) for _, e in fit_elevation.view_features(views)] == [10, 11]
    assert [len(e) for _, e in fit_elevation.view_features(views, ring=())] == [8, 8]
    (tmp_path / "gsv3d.json").write_text("{}")
    ring = ViewTensors(views.ids, *(getattr(views, name)[:, :16] for name in COLUMN_NAMES))
    monkeypatch.setattr(fit_elevation, "load_views", lambda *_: ring)
    assert fit_elevation.main(["--weights", str(tmp_path), "--data", "a", "--test", "rings"]) == 2
    assert "rings cannot be measured on" in capsys.readouterr().err


def test_the_pipeline_estimates_when_asked(monkeypatch):
    asked = []
    pipe = GSV3DPipeline(
        None,
        None,
        None,
        None,
        None,
        estimator=lambda images: asked.append(images) or torch.tensor([21.0]),
    )
    picture = torch.rand(8, 8, 3)
    assert pipe.elevation_of(picture) == 21.0 and torch.equal(asked[0][0], picture)
    with pytest.raises(ValueError, match="cannot estimate elevations") as error:
        GSV3DPipeline(None, None, None, None, None).elevation_of(picture)
    one_sentence(error)


def test_how_an_elevation_is_given(tmp_path):
    assert degrees("auto") is None and degrees("-7.5") == -7.5
    for text in ("up", "91", "nan"):
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            degrees(text)
    with pytest.raises(ValueError, match="no estimator") as error:
        el.estimate(torch.ones(8, 8, 3), tmp_path)
    one_sentence(error)
    assert fit_elevation.main(["--weights", str(tmp_path), "--data", str(tmp_path)]) == 2
