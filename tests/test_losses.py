"""The named terms of L_3D: closed forms, gradients by differences, and that a weight of
0 costs nothing.
"""

import math

import pytest
import torch
from safetensors.torch import save_file
from tiny_world import one_sentence, randn, tiny_config

from gsv3d_lib import losses
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.evaluation.lpips import LPIPS
from gsv3d_lib.evaluation.metrics import ssim
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.losses import (
    LOSS_FIELDS,
    TERMS,
    Seen,
    Truth,
    rendering_loss,
    shift,
    solid,
    structural_similarity,
)
from gsv3d_lib.stages import STAGES
from gsv3d_lib.system.errors import MissingFile

SIZE = 32


def pictures(count: int = 2, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def seen_and_true(rgb=None, true_rgb=None, alpha=None, **changes) -> tuple[Seen, Truth]:
    """What the terms take, of pictures and alpha alone."""
    rgb = pictures() if rgb is None else rgb
    alpha = torch.ones(*rgb.shape[:3], 1) if alpha is None else alpha
    truth = Truth(rgb.detach() if true_rgb is None else true_rgb, alpha.detach(), alpha.detach())
    return Seen(rgb, alpha, alpha, None, tiny_config(**changes)), truth


def splats() -> Gaussians:
    """Eight Gaussians near the centre, with gradients."""
    tensors = (
        0.3 * randn(8, 3),
        randn(8, 4, seed=1),
        torch.full((8, 3), 0.2),
        torch.full((8,), 0.7),
        pictures(1, 8)[0, 0],
    )
    return Gaussians(*(t.clone().requires_grad_() for t in tensors))


# ---------------------------------------------------------------- SSIM


def test_ssim_away_from_the_border_is_that_of_the_evaluation():
    """Pictures in the middle of black ones, where SSIM is 1: the border, which the
    metric leaves out, costs nothing.
    """
    a, b = pictures(6, 11), (pictures(6, 11) + 0.3 * pictures(6, 11, seed=1)).clamp(0, 1)
    for x, y in zip(a, b, strict=True):
        wide = [torch.nn.functional.pad(t, (0, 0, 40, 40, 40, 40)) for t in (x, y)]
        loss, metric = structural_similarity(wide[0][None], wide[1][None]).item(), ssim(*wide)
        assert (loss - 1) * 91**2 == pytest.approx(
            (metric - 1) * 81**2, rel=1e-3
        )  # the metric's window reaches 5 pixels


def test_ssim_of_equal_and_of_flat_pictures():
    a = pictures()
    assert structural_similarity(a, a).item() == pytest.approx(1, abs=1e-6)
    flat = torch.full((1, 80, 80, 3), 0.3), torch.full((1, 80, 80, 3), 0.7)
    expected = (2 * 0.21 + 1e-4) / (0.09 + 0.49 + 1e-4)  # no variance: luminance alone
    assert ssim(*flat) == pytest.approx(expected, abs=1e-5)
    # but for its border
    assert structural_similarity(*flat).item() == pytest.approx(expected, abs=0.1)


def test_the_gradient_of_ssim_is_that_of_differences():
    a, b = pictures(1, 12).double().requires_grad_(), pictures(1, 12, seed=1).double()
    assert torch.autograd.gradcheck(lambda x: structural_similarity(x, b), a, fast_mode=True)


def test_ssim_is_exact_in_mixed_precision():
    """A variance is a small difference of large moments, of which bfloat16 would leave
    nothing.
    """
    a, b = (0.5 + 0.02 * pictures(seed=seed) for seed in (0, 1))
    seen, true = seen_and_true(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = TERMS["ssim"](seen, true)
    assert mixed == pytest.approx(1 - structural_similarity(a, b).item(), abs=1e-6)


# ---------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of random weights; those of the layers are positive, as the published
    ones.
    """
    torch.manual_seed(0)
    net = LPIPS("alex")
    for weight in net.weights:
        torch.nn.init.uniform_(weight)
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(net.state_dict(), path, metadata={"lpips": "alex"})
    return str(path)


def test_lpips_is_0_for_equal_pictures_and_has_a_gradient(weights):
    equal = seen_and_true(lpips_weights=weights)
    assert TERMS["lpips"](*equal).item() == 0
    rgb = pictures(1).requires_grad_()
    value = TERMS["lpips"](*seen_and_true(rgb, pictures(1, seed=1), lpips_weights=weights))
    value.backward()
    assert value > 0 and torch.isfinite(rgb.grad).all() and (rgb.grad != 0).float().mean() > 0.9
    step = 1e-2 * rgb.grad / rgb.grad.norm()
    closer = seen_and_true((rgb - step).detach(), pictures(1, seed=1), lpips_weights=weights)
    assert TERMS["lpips"](*closer) < value


def test_four_pictures_are_moved_by_four_offsets_and_nothing_is_lost():
    images = pictures(4)
    moved = shift(images)
    size = images.shape[1]
    assert moved.shape == (4, size + 3, size + 3, 3)
    found = set()
    for image, larger in zip(images, moved):
        places = [
            (i, j)
            for i in range(4)
            for j in range(4)
            if torch.equal(larger[i : i + size, j : j + size], image)
        ]
        assert len(places) == 1
        found |= set(places)
    assert len(found) == 4 and {i for i, _ in found} == {j for _, j in found} == {0, 1, 2, 3}


def test_lpips_without_its_weights_is_one_sentence(tmp_path):
    given = seen_and_true(lpips_weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(MissingFile, match="No LPIPS weights at") as error:
        TERMS["lpips"](*given)
    one_sentence(error)


# ---------------------------------------------------------------- solid


@pytest.mark.parametrize(
    ("covered", "entropy"), [(0.0, 0.0), (1.0, 0.0), (0.5, math.log(2)), (0.25, 0.562335)]
)
def test_solid_is_the_entropy_of_what_is_covered(covered, entropy):
    alpha = torch.full((2, SIZE, SIZE, 1), covered, requires_grad=True)
    value = solid(*seen_and_true(alpha=alpha))
    value.backward()
    assert value.item() == pytest.approx(entropy, abs=2e-3) and torch.isfinite(alpha.grad).all()


# ---------------------------------------------------------------- their sum


def targets():
    return (
        orbit_cameras([0.0, 90.0], 0.0, SIZE),
        pictures(),
        torch.ones(2, SIZE, SIZE, 1),
        torch.ones(2, SIZE, SIZE, 1),
    )


def test_a_term_without_weight_is_not_computed(monkeypatch):
    def never(seen, true):
        raise AssertionError("computed")

    monkeypatch.setitem(losses.TERMS, "solid", never)
    config = tiny_config(lambda_alpha=0.5)
    loss, log = rendering_loss(splats(), *targets(), config)
    assert torch.isfinite(loss) and set(log) == {"psnr", "depth_l1", "alpha_mse"}
    with pytest.raises(AssertionError, match="computed"):
        rendering_loss(splats(), *targets(), config.replace(lambda_solid=1e-3))


def test_the_loss_is_the_weighted_sum_of_its_terms(weights):
    lambdas = {"rgb": 1.0, "depth": 0.5, "alpha": 0.25, "ssim": 0.2, "lpips": 0.1, "solid": 0.05}
    assert lambdas.keys() == TERMS.keys()
    config = tiny_config(
        **{f"lambda_{name}": value for name, value in lambdas.items()}, lpips_weights=weights
    )
    scene = splats()
    loss, log = rendering_loss(scene, *targets(), config)
    terms = {"rgb": 10 ** (-log["psnr"] / 10), "depth": log["depth_l1"], "alpha": log["alpha_mse"]}
    terms |= {name: log[name] for name in ("ssim", "lpips", "solid")}
    expected = sum(lambdas[name] * value.item() for name, value in terms.items())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.any() for t in scene.tensors())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_run_is_known_by_all_of_its_terms(stage):
    """Else a training would go on from a checkpoint of another loss."""
    assert set(LOSS_FIELDS) == {*(f"lambda_{name}" for name in TERMS), "lpips_weights"}
    assert set(LOSS_FIELDS) <= set(STAGES[stage].make.FIELDS)


def test_no_weights_at_all_make_a_loss_of_0():
    none = tiny_config(**{f"lambda_{name}": 0.0 for name in TERMS})
    loss, _ = rendering_loss(splats(), *targets(), none)
    assert loss.item() == 0
