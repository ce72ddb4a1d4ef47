"""The prepared script for ten minutes on a GPU: its quick parts, without a GPU."""

import sys

import pack
import pytest
import ten_minutes
import torch
from pack import read_pack, write_pack
from resident import ResidentOrbits
from tiny_world import SCALE, ball_views, object_views, one_sentence, random_orbits, tiny_config
from torch import nn

from gsv3d_lib.attention import attend
from gsv3d_lib.config import Schedule
from gsv3d_lib.data.dataset import load_views, write_index, write_object
from gsv3d_lib.encoders import build_clip
from gsv3d_lib.pretraining import DiffusionStage, rolled
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.system.errors import MissingFile, UserError
from gsv3d_lib.training import Stage
from gsv3d_lib.unet import build_unet
from gsv3d_lib.vae import build_vae, encode
from gsv3d_lib.weights.checkpoint import load_config, load_model, save_model, trained_steps

CONFIG = tiny_config(lambda_pixel=0.5)


# ---------------------------------------------------------------- packs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three objects of 128 px, as a dataset folder stores them."""
    folder = tmp_path_factory.mktemp("dataset")
    views = [object_views(f"ball{k}", 40.0 * k, 128) for k in range(3)]
    for one in views:
        write_object(folder, one)
    write_index(folder, [{"id": one.id} for one in views])
    return folder


@pytest.mark.parametrize(("bits", "processes"), [(8, 1), (16, 2)])
def test_a_pack_holds_what_the_folder_does(dataset, tmp_path, bits, processes):
    facts = write_pack([dataset], tmp_path / "p", megabytes=1, bits=bits)
    assert facts["quality"] is None and facts["bytes"] == (tmp_path / "p").stat().st_size < 1e6
    views, true = (
        read_pack(tmp_path / "p", 64, processes),
        load_views([dataset], 64, progress=False),
    )
    assert views.ids == true.ids
    for name in ("rgb", "alpha", "azimuths", "elevations"):
        assert torch.equal(getattr(views, name), getattr(true, name)), name
    assert torch.equal(views.depth > 0, true.depth > 0)
    span = true.depth.max() - true.depth[true.depth > 0].min()
    assert (views.depth - true.depth).abs().max() <= 0.51 * span / (2**bits - 2)


def test_a_small_pack_is_encoded_again_and_may_hold_the_ring_alone(dataset, tmp_path):
    whole = write_pack([dataset], tmp_path / "whole", megabytes=1)
    small = write_pack([dataset], tmp_path / "small", megabytes=0.9 * whole["bytes"] / 1e6)
    assert small["bytes"] <= 0.9 * whole["bytes"] and small["quality"] in pack.QUALITIES
    ring = write_pack([dataset], tmp_path / "ring", megabytes=1, ring=True)
    assert ring["views"] == 16
    views, true = read_pack(tmp_path / "ring", 128), load_views([dataset], 128, progress=False)
    difference = views.rgb.float() - true.rgb[:, :16].float()
    assert difference.square().mean().sqrt() < 4 and not views.depth.any()
    assert len(read_pack(tmp_path / "ring", 64, limit=2)) == 2


def test_packs_that_cannot_be_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="do not fit") as error:
        write_pack([dataset], tmp_path / "p", megabytes=0.001)
    one_sentence(error)
    with pytest.raises(MissingFile, match="no pack at"):
        read_pack(tmp_path / "p", 64)
    write_pack([dataset], tmp_path / "p", megabytes=1)
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-500])
    with pytest.raises(UserError, match="cannot be read"):
        read_pack(tmp_path / "p", 64)


# ---------------------------------------------------------------- orbits on the device


@pytest.fixture(scope="module")
def both():
    """The library's orbits of two objects in three variants, and the resident's."""
    views = ball_views()
    orbits = random_orbits(views, copies=3)
    resident = ResidentOrbits(views, orbits.variants, SCALE, "cpu")
    resident.latents = orbits.latents
    return orbits, resident


def assert_same(batch, examples) -> None:
    for name, value in batch.items():
        expected = torch.stack([example[name] for example in examples])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("frames", [2, 16])
def test_resident_orbits_are_those_of_the_library(both, frames):
    orbits, resident = both
    items, starts = torch.arange(6), torch.tensor([0, 3, 15, 7, 12, 1])
    pairs = list(zip(items.tolist(), starts.tolist()))
    found = resident.orbit(items, starts, frames)
    assert_same(found, [orbits.orbit(*pair, frames) for pair in pairs])
    shifts = torch.tensor([0, 1, 1, 0, 1, 0])
    found = resident.orbit(items, starts, frames, shifts)
    expected = [rolled(orbits.orbit(*pair, frames), int(s)) for pair, s in zip(pairs, shifts)]
    assert_same(found, expected)
    chosen = torch.tensor(
        [[0, 23, 5], [17, 2, 9], [1, 1, 20], [4, 8, 12], [23, 22, 21], [16, 0, 3]]
    )
    found = resident.targets(items, starts, chosen)
    assert_same(found, [orbits.targets(*pair, some) for pair, some in zip(pairs, chosen)])
    stage = DecoderStage(nn.Identity(), None, orbits, CONFIG)
    found = resident.own_pixels(items, starts, frames, CONFIG)
    assert_same(found, [stage._own_pixels(*pair, frames) for pair in pairs])


def test_latents_are_encoded_as_the_library_does(both):
    orbits, _ = both
    vae = build_vae(CONFIG).eval()
    resident = ResidentOrbits(orbits.views, orbits.variants, SCALE, "cpu")
    resident.encode(vae, chunk=4)
    with torch.no_grad():
        expected = encode(vae, orbits.scene(3).rgb[:16])
    torch.testing.assert_close(resident.latents[3], expected, rtol=1e-4, atol=1e-4)


def test_batches_have_what_the_stages_draw_and_repeat(both):
    orbits, resident = both
    config = CONFIG.replace(roll_frames=0.5)

    def seeded():
        return torch.Generator().manual_seed(3)

    batch = resident.diffusion_batch(seeded(), 64, config)
    stage = DiffusionStage(nn.Identity(), nn.Identity(), orbits, config)
    example = stage.example(seeded(), seeded(), 0)
    assert {name: (64, *value.shape) for name, value in example.items()} == {
        n: tuple(v.shape) for n, v in batch.items()
    }
    again = resident.diffusion_batch(seeded(), 64, config)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert 0 < batch["keep"].mean() < 1 and batch["sigma"].log().std() == pytest.approx(
        1.6, abs=0.5
    )
    moved = (batch["azimuth"][:, -1] != 0).float().mean()
    assert 0.2 < moved < 0.8  # half of them, those by 0 frames aside

    batch = resident.decoder_batch(seeded(), 5, 4, config)
    stage = DecoderStage(nn.Identity(), None, orbits, config.replace(view_counts=(4,)))
    example = stage.example(seeded(), seeded(), 0)
    assert {name: (5, *value.shape) for name, value in example.items()} == {
        n: tuple(v.shape) for n, v in batch.items()
    }


# ---------------------------------------------------------------- what comes back


class Line(Stage):
    """w -> 3, with batches of no meaning."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return (self.w - 3).pow(2).mean(), {}


def test_the_loop_follows_the_clock(monkeypatch):
    now = [0.0]

    def tick() -> float:
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr(ten_minutes.time, "monotonic", tick)
    clock, saves = ten_minutes.Clock(1000), []
    monkeypatch.undo()
    monkeypatch.setattr(ten_minutes.Clock, "spent", property(lambda self: tick()))
    learner = ten_minutes.Learner(
        Line(), Schedule(steps=9_999_999, batch=1, lr=0.1, warmup=2, ema=0.5), "cpu"
    )
    learner.until(
        200, clock, lambda: min(1.0, now[0] / 200), dict, lambda: saves.append(now[0]), every=10
    )
    assert 150 < learner.done < 400 and now[0] == pytest.approx(200, abs=2)
    assert len(saves) == 3 and learner.stage.w.item() == pytest.approx(3, abs=0.1)
    # a tenth at the end
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.01, rel=0.05)
    assert [row["step"] for row in learner.rows[:3]] == [1, 10, 20]


def test_what_comes_back_is_put_together(tmp_path):
    torch.manual_seed(0)
    unet, clip = build_unet(CONFIG), build_clip(CONFIG)
    base = tmp_path / "base"
    save_model(build_vae(CONFIG), base, "vae", CONFIG.replace(unet_layers=2), {"vae": 7})
    stage = DiffusionStage(unet, clip, None, CONFIG)
    record = {
        "config": ten_minutes.dataclasses.asdict(CONFIG),
        "trained": {"diffusion": 9},
        "models": ["unet", "clip"],
    }
    state = {name: value.detach().half() for name, value in stage.training_state().items()}
    out = tmp_path / "out"
    ten_minutes.write_pieces(state, record, out, limit=3_000_000)
    assert len(list(out.iterdir())) > 1 and all(
        path.stat().st_size < 3_000_000 for path in out.iterdir()
    )
    command = ["collect", str(out), "--into", str(tmp_path / "run"), "--base", str(base)]
    assert ten_minutes.main(command) == 0
    weights = tmp_path / "run" / "weights"
    for name, model in (("unet", unet), ("clip", clip)):
        opened = load_model(weights, name)
        for key, value in model.state_dict().items():
            assert torch.allclose(opened.state_dict()[key], value, atol=1e-3), key
    assert trained_steps(weights) == {"vae": 7, "diffusion": 9}
    assert load_config(weights).unet_layers == CONFIG.unet_layers and (weights / "vae").is_dir()
    next(out.iterdir()).unlink()
    assert ten_minutes.main(command) == 2


def test_pieces_of_before_go(tmp_path):
    record = {"models": []}
    ten_minutes.write_pieces(
        {f"t{k}": torch.zeros(100_000) for k in range(6)}, record, tmp_path, limit=1_000_000
    )
    ten_minutes.write_pieces({"t": torch.ones(3)}, record, tmp_path)
    tensors, found = ten_minutes.read_pieces(tmp_path)
    assert list(tensors) == ["t"] and found == {"models": [], "pieces": 1}
    with pytest.raises(ValueError, match="does not fit"):
        ten_minutes.write_pieces({"t": torch.zeros(10**6)}, record, tmp_path, limit=1_000_000)


def test_our_rasterisers_agree_in_the_report_of_parity():
    report = ten_minutes.parity("cpu", gaussians=60, views=1, size=32)
    assert report["numba"]["image"] < 1e-4
    errors = report["numba"]["gradients, relative"]
    assert errors and all(0 < error < 1e-2 for error in errors.values())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_step_at_full_size_runs_small_with_and_without_a_rasteriser(stage, monkeypatch):
    monkeypatch.setattr(ten_minutes, "preset", lambda name: CONFIG)
    found = ten_minutes.full_step(stage, "cpu", False, "tiny")
    assert found["orbits"] == 1 and found["seconds"] > 0
    inputs = [torch.rand(5, n, requires_grad=True) for n in (3, 4, 3)] + [
        torch.rand(5, requires_grad=True)
    ]
    colors = torch.rand(5, 3, requires_grad=True)
    image, alpha = ten_minutes.no_rendering(*inputs, colors, torch.eye(4)[None], None, 6, 4)
    assert image.shape == (1, 4, 6, 4) and alpha.shape == (1, 4, 6, 1)
    (image.sum() + alpha.sum()).backward()
    assert all(leaf.grad is not None for leaf in (*inputs, colors))


def test_compiled_attention_is_one_graph():
    """`attend` looks at a context variable.

    That would cut the U-Net's graph at every layer.
    """
    q = torch.randn(1, 2, 5, 4)
    compiled = torch.compile(lambda t: attend(t, t, t) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), attend(q, q, q) + 1)


def test_a_compiler_that_takes_too_long_is_stopped(tmp_path):
    unet = nn.Linear(2, 2)
    compiled = ten_minutes.Compiled(
        unet, [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, -1.0
    )
    compiled.use(64)
    assert compiled.process.wait(10) != 0 and not compiled.on
    (tmp_path / "ready-64").touch()
    compiled.use(64)
    assert compiled.on and unet._compiled_call_impl is not None
    compiled.use(128)
    assert not compiled.on and unet._compiled_call_impl is None
