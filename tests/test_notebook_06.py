"""Notebook 06: derivations equal the library; its checkers tell right from wrong."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from notebook_world import accepts, definitions, rejects

from gsv3d_lib.cameras import orbit_cameras, pluecker_rays, ray_grid, sv3d_azimuths
from gsv3d_lib.config import Schedule, preset
from gsv3d_lib.course.exercises import decoder as checks
from gsv3d_lib.decoder import Block, GaussianDecoder, build_decoder, plane_sweep, ray_distance
from gsv3d_lib.encoders import build_dino, dino_features
from gsv3d_lib.pretraining import DINOStage
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.training import train

CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def notebook():
    return definitions("06")


@pytest.fixture(scope="module")
def cameras():
    return orbit_cameras(sv3d_azimuths(4), 15.0, 64)


def test_embedding_is_the_decoders_convolution(notebook, cameras):
    decoder = build_decoder(preset("tiny"))
    latents, rays = torch.randn(4, 4, 8, 8), pluecker_rays(cameras, 8, 8)
    tokens = notebook["embed"](latents, rays, decoder.embed.weight, decoder.embed.bias)
    convolved = decoder.embed(torch.cat([latents, rays.movedim(-1, 1)], dim=1))
    assert torch.allclose(tokens, convolved.movedim(1, -1).flatten(0, 2), **CLOSE)


def test_attention_is_torchs_and_the_block_the_decoders(notebook):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    result, weights = notebook["attend"](q, k, v)
    assert torch.allclose(result, F.scaled_dot_product_attention(q, k, v), **CLOSE)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 7), **CLOSE)
    block, x, context = Block(48, 3, 20), torch.randn(2, 10, 48), torch.randn(2, 5, 20)
    by_hand, among_views, to_image = notebook["block_by_hand"](block, x, context)
    assert torch.allclose(by_hand, block(x, context), **CLOSE)
    assert among_views.shape == (2, 3, 10, 10) and to_image.shape == (2, 3, 10, 5)


def test_shuffle_is_torchs(notebook):
    x = torch.randn(12, 3, 5)
    assert torch.equal(notebook["shuffle"](x, 2), F.pixel_shuffle(x, 2))


def test_activations_are_the_decoders(notebook, cameras):
    decoder = GaussianDecoder(width=24, layers=1, heads=1, context_width=None, object_radius=1.3)
    origins, directions = ray_grid(cameras, 6, 5)
    maps = 2 * torch.randn(4, 6, 5, 12)
    by_hand = notebook["activate"](maps, origins, directions, 1.3, decoder.config.scale_range)
    expected = decoder.to_gaussians(maps, origins, directions)
    for name in ("means", "quats", "scales", "opacities", "colors"):
        assert torch.allclose(getattr(by_hand, name), getattr(expected, name), **CLOSE), name


def test_projection_inverts_the_rays(notebook, cameras):
    origins, directions = ray_grid(cameras, 8, 8)
    t = ray_distance(torch.randn(4, 8, 8, 1), origins, 1.0)
    pixels, z = notebook["project"](origins + t * directions, cameras)
    columns = (torch.arange(8) + 0.5) * 8
    assert torch.allclose(pixels[..., 0], columns.expand(4, 8, 8), atol=1e-3)
    assert torch.allclose(pixels[..., 1], columns[:, None].expand(4, 8, 8), atol=1e-3)
    assert (z < t[..., 0]).all()


def test_sweep_along_one_ray_is_the_librarys(notebook, cameras):
    config, latents = build_decoder(preset("tiny")).config, torch.randn(4, 4, 8, 8)
    swept = plane_sweep(latents, cameras, (8, 8), config).unflatten(0, (4, 8, 8))
    origins, directions = ray_grid(cameras, 8, 8)
    planes = torch.linspace(-1, 1, config.planes)
    seen = notebook["latents_along"](
        origins[2, 3, 5], directions[2, 3, 5], planes, latents, cameras
    )
    assert torch.allclose(notebook["statistics"](seen).T.flatten(), swept[2, 3, 5], atol=1e-4)


def test_dino_targets_are_the_stages(notebook):
    torch.manual_seed(0)
    config = preset("tiny", dino_layers=1)
    # views are for drawing examples only
    stage = DINOStage(build_dino(config), None, config).eval()
    stage.center.normal_(std=0.1)
    crops = torch.rand(3, 2, 64, 64, 3)
    loss, metrics = stage({"crops": crops})
    backbone, head = stage.teacher
    teacher = torch.stack([head(dino_features(backbone, crops[:, a])) for a in (0, 1)])
    targets = notebook["dino_targets"](teacher[0], stage.center, stage.TEACHER_TEMPERATURE)
    assert torch.allclose(notebook["entropy"](targets).mean(), metrics["target_entropy"], atol=1e-4)
    assert not targets.requires_grad
    student = torch.stack([stage.head(dino_features(stage.dino, crops[:, a])) for a in (0, 1)])
    assert torch.allclose(checks.dino_loss_of(student, teacher, stage.center), loss, **CLOSE)


def test_principal_colors_fill_the_range(notebook):
    colors = notebook["principal_colors"](torch.randn(64, 20))
    assert colors.shape == (64, 3)
    assert torch.allclose(colors.amin(0), torch.zeros(3)) and torch.allclose(
        colors.amax(0), torch.ones(3)
    )


def test_epipolar_lines_pass_through_the_projected_points(notebook, cameras):
    origins, directions = ray_grid(cameras, 8, 8)
    crossed, pixels = notebook["line_tokens"](origins[0, 3, 5], directions[0, 3, 5], cameras)
    assert crossed[0].sum() == 1 and crossed[0, 3, 5]  # its own ray is one point
    assert (crossed[1:].sum((1, 2)) >= 4).all()
    first, last = pixels[:, :1], pixels[:, -1:]
    along, away = last - first, pixels - first  # points of a line in space lie on a line
    off = along[..., 0] * away[..., 1] - along[..., 1] * away[..., 0]
    assert off[1:].abs().max() < 1e-2


class OneObject:
    """An orbit and targets of noise."""

    def __len__(self):
        return 1

    def item(self, generator, place):
        return int(torch.randint(1, (), generator=generator))

    def orbit(self, item, start, frames):
        return {
            "latents": torch.full((frames, 4, 8, 8), 0.1 * start),
            "azimuth": sv3d_azimuths(frames),
            "elevation": torch.full((frames,), 15.0),
            "image": torch.full((64, 64, 3), 0.5),
        }

    def targets(self, item, start, chosen):
        depth = 3 + 0.01 * chosen.float()[:, None, None, None].expand(-1, 64, 64, 1)
        return {
            "target_rgb": torch.full((len(chosen), 64, 64, 3), 0.3),
            "target_depth": depth,
            "target_alpha": torch.ones(len(chosen), 64, 64, 1),
            "target_azimuth": 20.0 * chosen,
            "target_elevation": torch.full((len(chosen),), 15.0),
        }

    class views:
        rgb = torch.zeros(1, 20, 1, 1, 3)


def test_the_loop_of_stage_1_is_the_library_s(notebook, tmp_path):
    torch.manual_seed(0)
    config = preset("tiny", decoder_layers=1, lambda_pixel=0.0, view_counts=(4,))
    notebook["config"], notebook["alone"] = config, OneObject()
    notebook["dino"] = build_dino(config).requires_grad_(False).eval()
    start = build_decoder(config)
    by_hand, theirs = copy.deepcopy(start), copy.deepcopy(start)
    rows = notebook["fit"](by_hand, steps=2, lr=1e-3)
    stage = DecoderStage(theirs, notebook["dino"], OneObject(), config)
    stage.identity = dict  # no data to name
    schedule = Schedule(steps=2, batch=1, lr=1e-3, warmup=2, ema=0.9)
    history = train(stage, schedule, tmp_path / "run", log_every=1, progress=False)
    for name in ("loss", "psnr", "depth_l1"):
        assert [r[name] for r in rows] == pytest.approx([r[name] for r in history], rel=1e-4)
    moved = [(a - b).abs().max() for a, b in zip(by_hand.parameters(), start.parameters())]
    apart = [(a - b).abs().max() for a, b in zip(by_hand.parameters(), theirs.parameters())]
    assert max(apart) < 0.02 * max(moved)


# ---------------------------------------------------------------- checkers


@pytest.mark.parametrize(
    "stub, checker",
    [
        ("pixel_shuffle", "check_shuffle"),
        ("depth_logits", "check_depth_logits"),
        ("dino_loss", "check_dino_loss"),
        ("stereo", "check_stereo"),
    ],
)
def test_stub_is_not_written_yet(notebook, stub, checker, capsys):
    assert not getattr(checks, checker)(notebook[stub])
    assert "not written yet" in capsys.readouterr().out


def shuffle_by_axes(order):
    def pixel_shuffle(x, r):
        axes = x.unflatten(1, (-1, r, r)).permute(order)
        return axes.reshape(len(x), x.shape[1] // r**2, x.shape[2] * r, x.shape[3] * r)

    return pixel_shuffle


def test_shuffle_checker():
    assert rejects(checks.check_shuffle, F.pixel_shuffle, "torch's own")
    assert rejects(checks.check_shuffle, lambda x, r: torch.nn.PixelShuffle(r)(x), "torch's own")
    assert accepts(checks.check_shuffle, shuffle_by_axes((0, 1, 4, 2, 5, 3)))
    assert rejects(checks.check_shuffle, shuffle_by_axes((0, 1, 2, 3, 4, 5)), "without moving axes")
    assert rejects(checks.check_shuffle, shuffle_by_axes((0, 1, 4, 3, 5, 2)), "i and j are swapped")
    assert rejects(checks.check_shuffle, shuffle_by_axes((0, 1, 2, 4, 3, 5)), "slow index")
    assert rejects(
        checks.check_shuffle,
        lambda x, r: shuffle_by_axes((0, 1, 4, 2, 5, 3))(_regrouped(x, r), r),
        "grouped the wrong way",
    )
    assert rejects(checks.check_shuffle, lambda x, r: x, "should have shape")


def _regrouped(x, r):
    return x.unflatten(1, (r * r, -1)).transpose(1, 2).flatten(1, 2)


def depth_solution(
    distance=lambda z, cos: z / cos, last=torch.logit, scale=lambda offset, radius: offset / radius
):
    def depth_logits(depth, origins, directions, forward, radius):
        t = distance(depth, (directions * forward).sum(-1, keepdim=True))
        return last((scale(t - origins.norm(dim=-1, keepdim=True), radius) + 1) / 2)

    return depth_logits


def test_depth_checker():
    check = checks.check_depth_logits
    assert accepts(check, depth_solution())
    assert accepts(check, checks.depth_logits_for)
    assert rejects(check, depth_solution(distance=lambda z, cos: z), "z-depth for the distance")
    assert rejects(
        check, depth_solution(distance=lambda z, cos: z * cos), "multiplied by the cosine"
    )
    clamped = depth_solution(last=lambda u: u.logit().clamp(-3, 3))
    assert rejects(check, clamped, "no clamp")
    assert rejects(check, depth_solution(last=lambda u: u), "sigmoid of the logit")
    assert rejects(check, depth_solution(last=lambda u: 2 * u - 1), r"2 sigmoid\(x\) - 1")
    assert rejects(
        check, depth_solution(scale=lambda offset, radius: offset), "units of the object's radius"
    )


def dino_solution(tau_s=0.1, tau_t=0.05, sign=-1.0, other=True, keep_gradient=False, factor=0.5):
    def dino_loss(student, teacher, center):
        targets = ((teacher + sign * center) / tau_t).softmax(-1)
        targets = targets if keep_gradient else targets.detach()
        return factor * sum(
            F.cross_entropy(student[a] / tau_s, targets[1 - a if other else a]) for a in (0, 1)
        )

    return dino_loss


def test_dino_checker():
    check = checks.check_dino_loss
    assert accepts(check, dino_solution())
    assert accepts(check, checks.dino_loss_of)
    assert rejects(check, dino_solution(sign=0.0), "centre is missing")
    assert rejects(check, dino_solution(sign=1.0), "centre is added")
    assert rejects(check, dino_solution(other=False), "compared with itself")
    assert rejects(check, dino_solution(tau_s=0.05, tau_t=0.1), "temperatures are swapped")
    assert rejects(check, dino_solution(tau_t=1.0), "not sharpened")
    assert rejects(check, dino_solution(factor=1.0), "sum of both directions")
    assert rejects(check, dino_solution(keep_gradient=True), "gradient for the teacher")
    assert rejects(check, dino_solution(tau_s=1.0), "student lacks its temperature")
    assert rejects(check, dino_solution(factor=1.5), "summed over the B pairs")
    assert rejects(check, dino_solution(factor=0.1), "mean over the K numbers")
    right = dino_solution()
    late = lambda s, t, center: right(s, t, 0.05 * center)  # noqa: E731
    assert rejects(check, late, "centre comes before the temperature")
    both = lambda s, t, center: right(s - center, t, center)  # noqa: E731
    assert rejects(check, both, "only the teacher is centred")

    def one_way(a):
        return lambda s, t, center: right(s[[a, a]], t[[1 - a, 1 - a]], center)

    assert rejects(check, one_way(0), "one direction of the two")
    assert rejects(check, one_way(1), "one direction of the two")


def test_the_cost_of_attention_as_the_notebook_counts_it():
    """16 x 36 x 36 tokens at paper scale, whose weights fill 430 million numbers per
    head.
    """
    config = preset("paper")
    tokens = config.num_frames * (config.latent_size // config.decoder_patch) ** 2
    assert tokens == 20_736 and math.isclose(tokens**2, 4.3e8, rel_tol=1e-2)


def test_average_checker(notebook):
    check = checks.check_average

    def averaging(start=torch.clone, share=lambda decay: 1 - decay, lerp=torch.Tensor.lerp_):
        def average_of_training(net, batches, decay):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            average = [start(p.detach()) for p in net.parameters()]
            for x, y in batches:
                optimizer.zero_grad()
                (net(x) - y).pow(2).mean().backward()
                optimizer.step()
                pairs = zip(average, net.parameters())
                average = [lerp(mean, p.detach(), share(decay)) for mean, p in pairs]
            return average

        return average_of_training

    assert accepts(check, averaging())
    assert rejects(check, notebook["average_of_training"], "nothing old is kept")
    assert rejects(check, averaging(share=lambda decay: decay), "keeps 1 - decay")
    assert rejects(check, averaging(start=torch.zeros_like), "begins as zeros")
    shared = averaging(start=lambda p: p, lerp=torch.lerp)
    assert rejects(check, shared, "still the parameter itself")
    assert rejects(check, averaging(share=lambda decay: 0.5), "keeps the share")
    assert rejects(check, lambda net, batches, decay: [net.weight], "One tensor per parameter")


def swept(near=(1, 15), cosine=True, half=0.0):
    def stereo(rgb, cameras, view):
        size = rgb.shape[1]
        origins, directions = (t[0] for t in ray_grid(cameras[view], size, size))
        offsets, away = torch.linspace(-1, 1, 61), origins.norm(dim=-1)
        points = origins + (away + offsets[:, None, None])[..., None] * directions
        cost = 0
        for k in [(view + step) % 16 for step in near]:
            local = points.reshape(-1, 3) @ cameras.viewmats[k, :3, :3].T
            uv = (local + cameras.viewmats[k, :3, 3]) @ cameras.Ks[k].T
            grid = 2 * (uv[:, :2] / uv[:, 2:] + half) / size - 1
            picture = rgb[k].movedim(-1, 0)[None]
            colors = F.grid_sample(picture, grid[None, None], align_corners=False)
            colors = colors[0, :, 0].T.reshape(*points.shape)
            cost = cost + (colors - rgb[view]).abs().sum(-1)
        depth = away + offsets[cost.argmin(0)]
        return depth * (directions @ cameras.viewmats[view, 2, :3]) if cosine else depth

    return stereo


def test_stereo_checker():
    check = checks.check_stereo
    assert accepts(check, swept())
    assert rejects(check, swept(near=range(1, 16)), "which views can see")
    assert rejects(check, swept(cosine=False), "times the cosine")
    assert rejects(check, lambda rgb, cameras, view: torch.full((32, 32), 3.5), "0.06 is wanted")
    assert rejects(check, swept(half=3.0), "0.06 is wanted")
