"""The three rasterisers: closed forms, agreement with each other and with gsplat,
gradients, and awkward inputs.
"""

import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from gsv3d_lib.cameras import Cameras, orbit_cameras, ray_grid
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.rendering import kernels as rasterizer_kernels
from gsv3d_lib.rendering import rasterizer, render

NAMES = ("means", "quats", "scales", "opacities", "colors")
CPU_BACKENDS = ("numba", "torch")


def random_scene(count: int = 100, seed: int = 0, dtype=torch.float32) -> Gaussians:
    """Overlapping ellipsoids of all opacities, some of them far outside the views."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Gaussians(
        means=(uniform(count, 3) - 0.5) * 2.0,
        quats=uniform(count, 4) - 0.5,
        scales=torch.exp(uniform(count, 3) * 2.5 - 4),
        opacities=uniform(count),
        colors=uniform(count, 3),
    ).to(dtype)


def views(width: int = 37, height: int = 21, dtype=torch.float32) -> Cameras:
    """Three cameras whose images are no multiple of a tile and whose principal point is
    off the centre.
    """
    cameras = orbit_cameras(
        [10.0, 130.0, 250.0], [0.0, 20.0, -10.0], width, distance=2.5, fov_deg=45
    )
    Ks = cameras.Ks + torch.tensor([[0, 0, 1.5], [0, 0, height / 2 - width / 2], [0, 0, 0]])
    return Cameras(cameras.viewmats.to(dtype), Ks.to(dtype), width, height)


def front_camera(size: int = 33, distance: float = 3.0) -> Cameras:
    return orbit_cameras([0.0], 0.0, size, distance=distance)


def one_gaussian(
    x: float = 0.0, scale: float = 0.05, opacity: float = 0.8, color=(0.2, 0.5, 0.9)
) -> Gaussians:
    return Gaussians(
        means=torch.tensor([[x, 0.0, 0.0]]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        scales=torch.full((1, 3), scale),
        opacities=torch.tensor([opacity]),
        colors=torch.tensor([color]),
    )


def loss_weights(rendering) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in rendering]


def gradients(
    scene: Gaussians, cameras: Cameras, backend: str, background=(1.0, 1.0, 1.0)
) -> list[torch.Tensor]:
    """Of a fixed random combination of rgb, depth and alpha."""
    leaves = Gaussians(*(t.clone().requires_grad_() for t in scene.tensors()))
    rendering = render(leaves, cameras, background, backend)
    torch.autograd.backward(list(rendering), loss_weights(rendering))
    return [t.grad for t in leaves.tensors()]


# ------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_gaussian_is_the_gaussian_it_should_be(backend):
    """On the optical axis: variance (f s / z)^2 + 0.3 pixels^2, cut off at alpha = 1 /
    255.
    """
    camera = front_camera()
    rgb, depth, alpha = render(one_gaussian(), camera, (0.0, 0.0, 0.0), backend)
    offset = torch.arange(33) - 16.0  # 33 pixels: the axis goes through the centre of pixel 16
    variance = (camera.Ks[0, 0, 0] * 0.05 / 3) ** 2 + 0.3
    expected = 0.8 * torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * variance))
    expected = torch.where(expected >= 1 / 255, expected, 0)
    assert torch.allclose(alpha[0, ..., 0], expected, atol=1e-6)
    assert torch.allclose(rgb[0], expected[..., None] * torch.tensor([0.2, 0.5, 0.9]), atol=1e-6)
    assert torch.allclose(depth[0, ..., 0], torch.where(expected > 0, 3.0, 0.0), atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_nearer_of_two_is_blended_first(backend, order):
    near, far = (
        one_gaussian(0.5, opacity=0.6),
        one_gaussian(-0.5, opacity=0.5, color=(1.0, 0.0, 0.0)),
    )
    rgb, depth, alpha = render(
        Gaussians.concatenate([near, far]).select(order), front_camera(), (0, 1, 0), backend
    )
    weights = torch.tensor([0.6, 0.4 * 0.5])
    expected = 0.6 * near.colors[0] + 0.2 * far.colors[0] + 0.2 * torch.tensor([0.0, 1, 0])
    assert torch.allclose(rgb[0, 16, 16], expected, atol=1e-5)
    assert torch.allclose(alpha[0, 16, 16, 0], weights.sum(), atol=1e-5)
    assert torch.allclose(
        depth[0, 16, 16, 0], (weights * torch.tensor([2.5, 3.5])).sum() / 0.8, atol=1e-5
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opaque_layers_end_a_pixel(backend):
    """alpha is at most 0.999; after it, a second layer would leave 1e-6 of the light,
    so it is not drawn.
    """
    layers = [
        one_gaussian(x, 0.2, 1.0, color) for x, color in ((0.5, (1.0, 0, 0)), (0.0, (0, 1.0, 0)))
    ]
    rgb, depth, alpha = render(Gaussians.concatenate(layers), front_camera(), (0, 0, 0), backend)
    assert torch.allclose(rgb[0, 16, 16], torch.tensor([0.999, 0, 0]), atol=1e-6)
    assert torch.allclose(alpha[0, 16, 16, 0], torch.tensor(0.999)) and torch.allclose(
        depth[0, 16, 16], torch.tensor(2.5)
    )


def test_depth_of_a_ball_of_small_opaque_gaussians():
    """Flat splats that tile a sphere: expected depth against ray-sphere intersection,
    away from the rim.
    """
    count, radius = 20_000, 0.8
    k = torch.arange(count) + 0.5
    # a Fibonacci lattice
    polar, azimuth = torch.acos(1 - 2 * k / count), math.pi * (1 + 5**0.5) * k
    normals = torch.stack(
        [polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()], -1
    )
    # turns z to normal
    quats = torch.stack([1 + normals[:, 2], -normals[:, 1], normals[:, 0], torch.zeros(count)], -1)
    scales = torch.tensor([0.012, 0.012, 0.001]).expand(count, 3)
    ball = Gaussians(
        radius * normals, quats, scales, torch.full((count,), 0.95), torch.ones(count, 3)
    )
    cameras = orbit_cameras([0.0, 90.0], 20.0, 96)
    _, depth, alpha = render(ball, cameras)

    origins, directions = ray_grid(cameras, 96, 96)
    along = -(origins * directions).sum(-1)
    inside = radius**2 - (origins**2).sum(-1) + along**2
    length = along - inside.clamp(min=0).sqrt()
    truth = length * (directions * cameras.c2w()[:, None, None, :3, 2]).sum(-1)
    interior = inside > 0.3
    error = (depth[..., 0] - truth)[interior]
    assert interior.float().mean() > 0.2 and alpha[..., 0][interior].min() > 0.99
    assert error.abs().mean() < 0.006 and error.abs().max() < 0.02  # of a distance of 2.7
    assert (alpha[..., 0][inside < -0.1] == 0).all() and (depth[alpha == 0] == 0).all()


def test_the_kernels_exponential_is_accurate():
    s = np.linspace(0, math.log(255), 100_001)
    k = rasterizer_kernels
    root = sum(e * s**i for i, e in enumerate((k.E0, k.E1, k.E2, k.E3, k.E4, k.E5, k.E6)))
    assert np.abs(root**8 * np.exp(s) - 1).max() < 2e-8


# ---------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(("dtype", "image_error", "gradient_error"), [
    (torch.float32, 1e-4, 1e-3), (torch.float64, 1e-6, 1e-6)
])  # fmt: skip
def test_numba_agrees_with_plain_torch(dtype, image_error, gradient_error):
    scene, cameras, background = (
        random_scene(dtype=dtype),
        views(dtype=dtype),
        torch.rand(3, 3, dtype=dtype),
    )
    ours, reference = (render(scene, cameras, background, backend) for backend in CPU_BACKENDS)
    for name, a, b in zip(("rgb", "depth", "alpha"), ours, reference):
        assert a.dtype == dtype and a.shape == (3, 21, 37, 3 if name == "rgb" else 1)
        assert (a - b).abs().max() < image_error, name
    assert 0.2 < ours.alpha.mean() < 0.9 and ours.alpha.max() > 0.99
    pairs = zip(
        NAMES, *(gradients(scene, cameras, backend, background) for backend in CPU_BACKENDS)
    )
    for name, a, b in pairs:
        assert (a - b).norm() / b.norm() < gradient_error, name


def test_torch_backend_agrees_with_gsplats_own_torch_code():
    """Ties the conventions down: quaternion order, eps2d, clamps, depth, expected
    depth.
    """
    pytest.importorskip("gsplat")
    path = Path(__file__).parents[1] / "benchmarks" / "rasterizer.py"
    spec = importlib.util.spec_from_file_location("rasterizer_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    scene, cameras = random_scene(dtype=torch.float64), views(dtype=torch.float64)
    for a, b in zip(
        render(scene, cameras, backend="torch"), benchmark.render_gsplat_reference(scene, cameras)
    ):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat's kernels need a CUDA device")
def test_gsplat_kernels_agree_with_numba():
    scene, cameras = random_scene(), views()
    on_gpu = render(scene.to("cuda"), cameras)
    for a, b in zip(on_gpu, render(scene, cameras)):
        assert (a.cpu() - b).abs().mean() < 1e-5
    leaves = Gaussians(*(t.to("cuda").requires_grad_() for t in scene.tensors()))
    rendering = render(leaves, cameras)
    torch.autograd.backward(list(rendering), [w.cuda() for w in loss_weights(on_gpu)])
    for t, b in zip(leaves.tensors(), gradients(scene, cameras, "numba")):
        assert (t.grad.cpu() - b).norm() / b.norm() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    scene, cameras = (
        random_scene(40, seed=3, dtype=torch.float64),
        views(19, 18, dtype=torch.float64),
    )
    gradient = dict(zip(NAMES, gradients(scene, cameras, "numba")))[name]
    generator = torch.Generator().manual_seed(7)

    def loss(step: torch.Tensor) -> float:
        tensors = [t + step if n == name else t for n, t in zip(NAMES, scene.tensors())]
        rendering = render(Gaussians(*tensors), cameras)
        return sum(float((w * t).sum()) for w, t in zip(loss_weights(rendering), rendering))

    for _ in range(3):
        step = 1e-6 * torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        difference = (loss(step) - loss(-step)) / 2
        assert difference == pytest.approx(float((gradient * step).sum()), rel=1e-5, abs=1e-10)


# -------------------------------------------------------------- threads and determinism


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    scene, cameras = random_scene(300), views(70, 50)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(rasterizer, "num_threads", lambda n=threads: n)
        results.append([*render(scene, cameras), *gradients(scene, cameras, "numba")])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_two_python_threads_may_render_at_once():
    scenes, cameras = [random_scene(seed=seed) for seed in range(4)], views()
    alone = [render(scene, cameras).rgb for scene in scenes]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda scene: render(scene, cameras).rgb, scenes * 3))
    assert all(torch.equal(a, b) for a, b in zip(alone * 3, together))


def test_a_view_does_not_depend_on_the_others():
    scene, cameras = random_scene(), views()
    together = render(scene, cameras).rgb
    assert all(torch.equal(render(scene, cameras[v]).rgb[0], together[v]) for v in range(3))


# ----------------------------------------------------------------------- awkward inputs


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "case", ["empty", "behind", "on the camera plane", "transparent", "off the image"]
)
def test_nothing_to_see(case, backend):
    scene = random_scene(20)
    if case == "empty":
        scene = scene.select(slice(0, 0))
    elif case == "behind":
        scene.means[:, 0] += 10
    elif case == "on the camera plane":
        scene.means[:, 0] = 3.0
    elif case == "transparent":
        scene.opacities.zero_()
    else:
        scene.means[:, 1] += 50
    camera = front_camera(20)
    rgb, depth, alpha = render(scene, camera, (0.1, 0.2, 0.3), backend)
    assert torch.equal(rgb, torch.tensor([0.1, 0.2, 0.3]).expand(1, 20, 20, 3))
    assert not depth.any() and not alpha.any()
    assert all(not g.any() and g.isfinite().all() for g in gradients(scene, camera, backend))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (16, 16), (17, 1), (5, 33)])
def test_any_image_size(width, height):
    scene, cameras = random_scene(), views(width, height)
    ours, reference = (render(scene, cameras, backend=backend) for backend in CPU_BACKENDS)
    assert ours.rgb.shape == (3, height, width, 3)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(ours, reference))
    for name, a, b in zip(NAMES, *(gradients(scene, cameras, backend) for backend in CPU_BACKENDS)):
        assert (a - b).norm() <= 1e-3 * b.norm(), name


@pytest.mark.parametrize("length", [0.0, 1e-15])
def test_quaternions_of_no_length_are_drawn_alike(length):
    """`normalize` divides by 1e-12 at least, so a zero quaternion is no rotation;
    .splat files may hold one.
    """
    scene, cameras = random_scene(20), views(24, 24)
    scene.quats[::2] *= length
    ours, reference = (render(scene, cameras, backend=backend) for backend in CPU_BACKENDS)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(ours, reference))
    assert all(g.isfinite().all() for g in gradients(scene, cameras, "numba"))


def test_huge_and_tiny_gaussians_beside_the_camera():
    """The linearised projection is far from valid here; it must still be finite and the
    same on both backends.
    """
    scene = random_scene(30, dtype=torch.float64)
    # 56 degrees off the axis: slopes are clamped
    scene.means[:10] = torch.tensor([2.3, 0.3, 0.1], dtype=torch.float64)
    scene.scales[:5], scene.scales[5:10] = 1.0, 1e-7
    camera = front_camera(24, 2.5).to(torch.float64)
    ours, reference = (render(scene, camera, backend=backend) for backend in CPU_BACKENDS)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(ours, reference))
    for name, a, b in zip(NAMES, *(gradients(scene, camera, backend) for backend in CPU_BACKENDS)):
        assert a.isfinite().all() and (a - b).norm() <= 1e-6 * b.norm(), name


def test_background_forms():
    scene, cameras = random_scene(), views()
    tuple_form = render(scene, cameras, (0.2, 0.4, 0.6)).rgb
    assert torch.equal(tuple_form, render(scene, cameras, torch.tensor([0.2, 0.4, 0.6])).rgb)
    assert torch.equal(tuple_form, render(scene, cameras, torch.tensor([[0.2, 0.4, 0.6]] * 3)).rgb)
    alpha = render(scene, cameras).alpha
    black = render(scene, cameras, (0.0, 0.0, 0.0)).rgb
    assert torch.allclose(render(scene, cameras).rgb, black + 1 - alpha, atol=1e-6)
    with pytest.raises(ValueError, match=r"\[3\] or \[3, 3\]; got \[2, 3\]"):
        render(scene, cameras, torch.ones(2, 3))


def test_unsupported_requests_are_refused():
    scene, cameras = random_scene(), views()
    with pytest.raises(ValueError, match="no gradients for cameras"):
        render(scene, Cameras(cameras.viewmats.clone().requires_grad_(), cameras.Ks, 37, 21))
    with pytest.raises(
        ValueError, match="backend must be one of auto, gsplat, numba, torch; got 'opengl'"
    ):
        render(scene, cameras, backend="opengl")
    with pytest.raises(ValueError, match="'gsplat' renders CUDA tensors"):
        render(scene, cameras, backend="gsplat")
    with pytest.raises(ValueError, match="float32 or float64; got torch.bfloat16"):
        render(scene.to(torch.bfloat16), cameras)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_reported_by_name(name):
    scene = random_scene()
    getattr(scene, name)[3] = float("nan")
    with pytest.raises(ValueError, match=f"{name} contains NaN"):
        render(scene, views())


def test_outputs_may_be_changed_in_place_only_with_autograds_knowledge():
    """The backward pass reads the rendered sums; autograd notices when somebody has
    overwritten them.
    """
    scene, cameras = random_scene(), views()
    leaves = [t.clone().requires_grad_() for t in scene.tensors()]
    sums, alpha = rasterizer.rasterize(
        *leaves, cameras.viewmats, cameras.Ks, cameras.width, cameras.height
    )
    sums.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (sums.sum() + alpha.sum()).backward()
