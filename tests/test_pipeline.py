"""The whole chain on models of a few thousand weights: train every stage, save, open,
generate, measure.
"""

import dataclasses
import json
import math
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from command_world import call
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_world import (
    BALLS,
    SIZE,
    ball_pictures,
    ball_views,
    object_views,
    one_sentence,
    tiny_config,
    turned,
)

from gsv3d_lib import __main__ as command
from gsv3d_lib import stages, train
from gsv3d_lib.backprojection import back_project
from gsv3d_lib.cameras import orbit_cameras, sv3d_azimuths
from gsv3d_lib.config import Schedule, preset
from gsv3d_lib.data.dataset import COLUMN_NAMES, FRONT, ViewTensors, write_index, write_object
from gsv3d_lib.data.examples import relative_cameras
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.diffusion import sample
from gsv3d_lib.evaluation import evaluate as ev
from gsv3d_lib.evaluation import protocol, report
from gsv3d_lib.evaluation.baselines import AverageObject, flat_card
from gsv3d_lib.evaluation.lpips import LPIPS
from gsv3d_lib.evaluation.metrics import psnr
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.images import prepare_condition
from gsv3d_lib.lora import set_lora_scale
from gsv3d_lib.pipeline import Generation, GSV3DPipeline, settings_for
from gsv3d_lib.rendering import render
from gsv3d_lib.system.errors import UserError
from gsv3d_lib.vae import encode, encode_scaled
from gsv3d_lib.weights import checkpoint
from gsv3d_lib.weights.checkpoint import load_config

CONFIG = tiny_config(
    vae_schedule=Schedule(steps=1, batch=1, lr=1e-3, warmup=0),
    dino_schedule=Schedule(steps=1, batch=1, lr=1e-3, warmup=0),
    diffusion_schedule=Schedule(steps=1, batch=1, lr=1e-3, warmup=0, ema=0.9),
    stage1=Schedule(steps=1, batch=1, lr=1e-3, warmup=0),
    # long strides: the LoRA shall make a difference
    stage2=Schedule(steps=2, batch=1, lr=5e-2, warmup=0),
)
SIDE = SIZE // 8 * CONFIG.decoder_upsample  # Gaussians a view, squared
QUICK = dict(steps=2, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as `train.py` makes it: all five stages, one or two steps each."""
    folder = tmp_path_factory.mktemp("run")
    for stage in stages.STAGES:
        history = stages.run_stage(stage, CONFIG, ball_views(), folder, progress=False)
        assert history[-1]["step"] == len(history) - 1 and math.isfinite(history[-1]["loss"])
    return folder


@pytest.fixture(scope="module")
def weights(run):
    return run / "weights"


@pytest.fixture(scope="module")
def pipe(weights) -> GSV3DPipeline:
    return GSV3DPipeline.from_pretrained(weights, device="cpu")


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """The balls from the front [S, S, 3]."""
    return ball_views(1).scene(0).rgb[FRONT]


# ----------------------------------------------------------- starting from a checkpoint


def test_init_takes_over_what_is_not_trained_and_starts_from_the_rest(weights, tmp_path):
    stages.take_over(weights, tmp_path, ["diffusion"], CONFIG)
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {
        "vae",
        "dino",
        "decoder",
        "gsv3d.json",
    }
    still = CONFIG.replace(diffusion_schedule=Schedule(steps=1, batch=1, lr=0.0, warmup=0))
    stages.run_stage("diffusion", still, ball_views(), tmp_path, init=weights, progress=False)
    before, after = (
        checkpoint.load_model(folder, "unet").state_dict()
        for folder in (weights, tmp_path / "weights")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    done = {
        name: stages.schedule_of(CONFIG, name).steps
        for name in ("vae", "dino", "diffusion", "stage1")
    }
    assert checkpoint.trained_steps(tmp_path / "weights") == done | {
        "diffusion": done["diffusion"] + 1
    }


def test_init_from_half_the_side_doubles_the_decoder(weights, tmp_path):
    config = CONFIG.replace(
        image_size=2 * SIZE, decoder_patch=2, decoder_upsample=2 * CONFIG.decoder_upsample
    )
    config = config.replace(stage1=Schedule(steps=1, batch=1, lr=0.0, warmup=0))
    stages.take_over(weights, tmp_path, ["stage1"], config)
    stages.run_stage(
        "stage1", config, ball_views(1, 2 * SIZE), tmp_path, init=weights, progress=False
    )
    trained, fresh = checkpoint.load_model(weights, "decoder"), build_decoder(config).state_dict()
    started = checkpoint.load_model(tmp_path / "weights", "decoder").state_dict()
    assert {k: v.shape for k, v in started.items()} == {k: v.shape for k, v in fresh.items()}
    assert torch.equal(started["blocks.0.mlp.0.weight"], trained.blocks[0].mlp[0].weight)


def test_init_with_one_layer_more_deepens_the_unet(weights):
    config = CONFIG.replace(unet_layers=CONFIG.unet_layers + 1)
    started = stages.initial("unet", config, weights)
    trained = checkpoint.load_model(weights, "unet").state_dict()
    assert started.config.layers_per_block == config.unet_layers
    kept = "mid_block.resnets.0.spatial_res_block.conv1.weight"
    assert torch.equal(started.state_dict()[kept], trained[kept])
    with pytest.raises(ValueError, match="The unet in .* is not of this configuration"):
        stages.initial("unet", CONFIG.replace(unet_layers=CONFIG.unet_layers + 2), weights)


def test_init_names_damaged_weights_before_it_copies_them(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "init")
    (tmp_path / "init/vae/diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="The vae weights in .* cannot be read") as error:
        stages.take_over(tmp_path / "init", tmp_path / "run", ["stage2"], CONFIG)
    one_sentence(error)
    assert not (tmp_path / "run/weights/vae").exists()


def test_init_of_another_size_is_one_sentence(weights):
    for name, changes in (
        ("decoder", {"decoder_width": 2 * CONFIG.decoder_width}),
        ("decoder", {"scale_range": (1e-3, 1e-1)}),  # the same shapes, another meaning
        ("unet", {"unet_heads": tuple(2 * heads for heads in CONFIG.unet_heads)}),
    ):
        with pytest.raises(
            ValueError, match=f"The {name} in .* is not of this configuration"
        ) as error:
            stages.initial(name, CONFIG.replace(**changes), weights)
        one_sentence(error)


def test_init_needs_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GSV3D checkpoint") as error:
        stages.take_over(tmp_path, tmp_path / "run", ["stage2"], CONFIG)
    one_sentence(error)


# ---------------------------------------------------------------- the checkpoint folder


def test_every_stage_leaves_its_product(run, weights):
    assert {p.name for p in weights.iterdir()} == {
        "vae",
        "dino",
        "unet",
        "clip",
        "decoder",
        "lora",
        "gsv3d.json",
    }
    assert all(stages.is_trained(stage, weights) for stage in stages.STAGES)
    assert all((run / stage / "metrics.jsonl").is_file() for stage in stages.STAGES)
    formats = {p.suffix for p in run.rglob("*") if p.is_file()}
    assert formats == {".json", ".jsonl", ".safetensors", ".lock"}  # nothing pickled
    steps = {stage: stages.schedule_of(CONFIG, stage).steps for stage in stages.STAGES}
    assert checkpoint.trained_steps(weights) == steps  # of all stages, not of the last alone


def test_every_file_follows_the_umask(run, weights):
    probe = weights / "probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    assert {path.stat().st_mode for path in run.rglob("*.safetensors")} == {mode}


class Payload:
    """What a pickle does when it is opened: here it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_opened(weights, tmp_path):
    for name in ("unet", "dino"):
        shutil.copytree(weights / name, tmp_path / name)
        (file,) = (tmp_path / name).glob("*.safetensors")
        pickled = {"model.safetensors": "pytorch_model.bin"}.get(
            file.name, file.with_suffix(".bin").name
        )
        torch.save({"weight": Payload(tmp_path / "opened")}, tmp_path / name / pickled)
        file.unlink()
        with pytest.raises(ValueError, match=f"The {name} weights in .* cannot be read") as error:
            checkpoint.load_model(tmp_path, name)
        one_sentence(error)
    assert not (tmp_path / "opened").exists()


def test_the_shipped_vae_has_latents_of_unit_variance(pipe):
    images = ball_views().rgb[:, :16:4].flatten(0, 1).float() / 255
    assert torch.allclose(encode_scaled(pipe.vae, images).std((0, 2, 3)), torch.ones(4), atol=1e-2)


def test_the_configuration_survives_its_file(weights, tmp_path):
    assert load_config(weights) == CONFIG
    for name in ("tiny", "small", "paper"):
        checkpoint.save_config(preset(name), tmp_path)
        assert load_config(tmp_path) == preset(name)


def test_finished_stages_are_not_trained_again(run, tmp_path, monkeypatch, capsys):
    write_object(tmp_path / "data", object_views("balls", size=SIZE))
    write_index(tmp_path / "data", [{"id": "balls"}])
    monkeypatch.setattr(train, "preset", lambda name: CONFIG)
    before = {path: path.stat().st_mtime_ns for path in (run / "weights").rglob("*")}
    call(
        "train",
        ["--data", str(tmp_path / "data"), "--out", str(run), "--stages", "vae", "diffusion"],
    )
    assert capsys.readouterr().out.count("to train again delete it") == 2
    assert before == {path: path.stat().st_mtime_ns for path in (run / "weights").rglob("*")}
    for path in run.glob("views-*"):
        path.unlink()


def test_steps_override_one_stage():
    changed = stages.with_steps(CONFIG, "vae", 9)
    assert changed.vae_schedule == dataclasses.replace(CONFIG.vae_schedule, steps=9)
    assert stages.with_steps(CONFIG, "stage2", 5).stage2.steps == 5
    assert stages.with_steps(CONFIG, "dino", None) == CONFIG


def test_exported_weights_are_half_the_size_and_nearly_the_same(
    run, weights, pipe, picture, tmp_path
):
    call("train", ["--out", str(run), "--export", str(tmp_path)])
    sizes = [sum(f.stat().st_size for f in p.rglob("*.safetensors")) for p in (weights, tmp_path)]
    assert 0.48 < sizes[1] / sizes[0] < 0.6
    shipped = GSV3DPipeline.from_pretrained(tmp_path, device="cpu")
    models = [getattr(shipped, name) for name in ("vae", "clip", "unet", "decoder", "dino")]
    # the LoRA's too
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    ours, theirs = pipe(picture, **QUICK), shipped(picture, **QUICK)
    assert (ours.means - theirs.means).abs().max() < 0.02 and (
        ours.colors - theirs.colors
    ).abs().max() < 0.02
    assert set(json.loads((tmp_path / "curves.json").read_text())) == set(stages.STAGES)
    # nor any path of a machine
    assert all(str(run) not in path.read_text() for path in tmp_path.rglob("*.json"))


def test_an_export_keeps_what_the_run_took_over(tmp_path):
    estimator = tmp_path / "run/weights/elevation/elevation.safetensors"
    estimator.parent.mkdir(parents=True)
    estimator.write_bytes(b"as it was")
    checkpoint.save_config(CONFIG, tmp_path / "run/weights")
    call("train", ["--out", str(tmp_path / "run"), "--export", str(tmp_path / "shipped")])
    assert (tmp_path / "shipped/elevation/elevation.safetensors").read_bytes() == b"as it was"


def test_an_export_does_not_keep_the_lora_of_another_run(tmp_path):
    checkpoint.save_config(CONFIG, tmp_path / "run/weights")
    (tmp_path / "shipped/lora").mkdir(parents=True)
    call("train", ["--out", str(tmp_path / "run"), "--export", str(tmp_path / "shipped")])
    assert not (tmp_path / "shipped/lora").exists()


# ---------------------------------------------------------------- image -> Gaussians


def test_generation_keeps_every_intermediate(pipe, picture):
    result = pipe.generate(picture, elevation=7.0, **QUICK)
    frames = CONFIG.num_frames
    assert torch.equal(result.image, picture)
    assert result.latents.shape == (frames, 4, SIZE // 8, SIZE // 8)
    assert len(result.gaussians) == frames * SIDE**2
    assert all(torch.isfinite(t).all() and not t.requires_grad for t in result.gaussians.tensors())
    # the input was seen from azimuth 0, the last camera
    expected = orbit_cameras(sv3d_azimuths(frames), 7.0, SIZE)
    assert torch.equal(result.cameras.viewmats, expected.viewmats)
    assert pipe.views_from(result.latents).shape == (frames, SIZE, SIZE, 3)


def test_a_seed_is_a_result(pipe, picture):
    torch.manual_seed(1)
    first = pipe(picture, seed=3, **QUICK)
    torch.manual_seed(2)  # nothing else random takes part
    again, other = pipe(picture, seed=3, **QUICK), pipe(picture, seed=4, **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))
    assert not torch.allclose(first.means, other.means)


def test_the_chain_is_its_parts(pipe, picture):
    """sample -> decode, called by hand, is what `generate` does."""
    result = pipe.generate(picture, elevation=20.0, seed=5, steps=2, guidance=1.7, progress=False)
    condition = pipe.condition(picture, 20.0, CONFIG.num_frames)
    assert (
        torch.allclose(condition.polar, torch.tensor(math.radians(70.0)))
        and condition.azimuth[0, -1] == 0
    )
    assert torch.allclose(condition.latent, encode(pipe.vae, picture[None]))
    latents = sample(
        pipe.unet,
        condition,
        CONFIG,
        generator=torch.Generator().manual_seed(5),
        steps=2,
        guidance=1.7,
        progress=False,
    )
    assert torch.allclose(latents[0], result.latents, atol=1e-5)
    scene = pipe.gaussians_from(result.latents, result.cameras, picture)
    assert torch.allclose(scene.means, result.gaussians.means, atol=1e-5)
    painted = back_project(scene, result.cameras[-1], picture)
    assert torch.allclose(painted.colors, result.gaussians.colors, atol=1e-4)


def test_back_projection_uses_the_mask_of_the_picture(pipe, tmp_path):
    Image.fromarray(object_views().rgba[FRONT], "RGBA").save(tmp_path / "balls.png")
    rgb, mask = prepare_condition(tmp_path / "balls.png", SIZE)
    file, tensors = pipe(tmp_path / "balls.png", **QUICK), pipe(rgb, mask=mask, **QUICK)
    without, plain = pipe(rgb, **QUICK), pipe(rgb, back_projection=False, **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(file.tensors(), tensors.tensors(), strict=True))
    assert (file.opacities == 0).any() and not (without.opacities == 0).any()
    own = without.select(slice(len(plain)))  # behind them are those of the pixels
    assert torch.equal(own.means, plain.means) and not torch.equal(own.colors, plain.colors)


def test_the_number_of_frames_is_free(pipe, picture):
    assert len(pipe(picture, num_frames=2, **QUICK)) == 2 * SIDE**2


def test_files_pictures_and_arrays_come_in(pipe, tmp_path):
    rgba = object_views().rgba[FRONT]
    Image.fromarray(rgba, "RGBA").save(tmp_path / "balls.png")
    results = [
        pipe.generate(x, **QUICK)
        for x in (tmp_path / "balls.png", Image.fromarray(rgba, "RGBA"), rgba)
    ]
    assert results[0].image.shape == (SIZE, SIZE, 3)
    for other in results[1:]:
        assert torch.equal(other.image, results[0].image)
        assert torch.equal(other.gaussians.means, results[0].gaussians.means)


def test_the_lora_can_be_left_out_or_scaled(weights, picture):
    pipe = GSV3DPipeline.from_pretrained(weights, device="cpu")
    plain = GSV3DPipeline.from_pretrained(weights, lora=False, device="cpu")
    with_lora, base = (p.generate(picture, **QUICK).latents for p in (pipe, plain))
    off = pipe.generate(picture, lora_scale=0.0, **QUICK).latents
    on = pipe.generate(picture, lora_scale=1.0, **QUICK).latents
    assert torch.allclose(off, base, atol=1e-5) and torch.allclose(on, with_lora, atol=1e-5)
    assert (with_lora - base).abs().max() > 1e-3
    assert not any("lora" in name for name, _ in plain.unet.named_parameters())


def weights_of(pipe: GSV3DPipeline) -> dict[str, torch.Tensor]:
    """Every tensor of every model, copied."""
    models = {"vae": pipe.vae, "clip": pipe.clip, "unet": pipe.unet, "decoder": pipe.decoder}
    models["dino"] = pipe.dino
    return {
        f"{name}.{key}": tensor.clone()
        for name, model in models.items()
        for key, tensor in model.state_dict().items()
    }


def same(one: Generation, other: Generation) -> bool:
    """Whether two results agree bit for bit."""
    pairs = zip(one.gaussians.tensors(), other.gaussians.tensors(), strict=True)
    return torch.equal(one.latents, other.latents) and all(torch.equal(a, b) for a, b in pairs)


# what differs between two calls: a call must see nothing of the other's
CALLS = (
    dict(seed=1, lora_scale=0.0, steps=3, num_frames=4),
    dict(seed=2, guidance=2.0, steps=3, num_frames=2, elevation=3.0),
    dict(seed=2, lora_scale=0.5, steps=3, back_projection=False),
)


@pytest.mark.parametrize("other", CALLS[1:])
def test_two_calls_at_once_give_what_each_gives_alone(weights, picture, other):
    pipe = GSV3DPipeline.from_pretrained(weights, device="cpu")
    before, calls = weights_of(pipe), (CALLS[0], other)
    alone = [pipe.generate(picture, progress=False, **options) for options in calls]
    abreast = threading.Barrier(2, timeout=300)

    def call(options: dict) -> Generation:
        return pipe.generate(picture, progress=False, callback=lambda *_: abreast.wait(), **options)

    with ThreadPoolExecutor(2) as threads:  # both are inside of the sampler at every step
        together = list(threads.map(call, calls))
    assert all(same(*pair) for pair in zip(alone, together, strict=True))
    assert not same(*alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(pipe).items())
    assert same(pipe.generate(picture, progress=False, **other), alone[1])


def test_a_call_inside_a_callback_is_a_call_like_any_other(weights, picture):
    pipe = GSV3DPipeline.from_pretrained(weights, device="cpu")
    before, inner = weights_of(pipe), []
    alone = [pipe.generate(picture, progress=False, **options) for options in CALLS]

    def nested(*_) -> None:
        inner.append(pipe.generate(picture, progress=False, **CALLS[2]))

    outer = pipe.generate(picture, progress=False, callback=nested, **CALLS[0])
    assert same(outer, alone[0]) and len(inner) == 3
    assert all(same(made, alone[2]) for made in inner) and not same(alone[0], alone[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(pipe).items())


def test_an_error_in_a_callback_leaves_the_pipeline_as_it_was(weights, picture):
    pipe = GSV3DPipeline.from_pretrained(weights, device="cpu")
    before, alone = weights_of(pipe), pipe.generate(picture, **QUICK)
    with pytest.raises(ZeroDivisionError):
        pipe.generate(picture, lora_scale=0.0, callback=lambda *_: 1 / 0, **QUICK)
    assert torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(pipe).items())
    assert same(pipe.generate(picture, **QUICK), alone)


def test_the_scale_that_a_user_sets_stays(weights, picture):
    pipe = GSV3DPipeline.from_pretrained(weights, device="cpu")
    given = {scale: pipe.generate(picture, lora_scale=scale, **QUICK) for scale in (0.0, 0.5, 1.0)}
    assert same(pipe.generate(picture, **QUICK), given[1.0])
    set_lora_scale(pipe.unet, 0.5)
    assert same(pipe.generate(picture, **QUICK), given[0.5])
    assert all(
        same(pipe.generate(picture, lora_scale=s, **QUICK), made) for s, made in given.items()
    )
    assert same(pipe.generate(picture, **QUICK), given[0.5]) and not same(given[0.5], given[1.0])


def test_a_checkpoint_without_dino_needs_none(weights, picture, tmp_path):
    shutil.copytree(weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights/dino")
    config = CONFIG.replace(dino="none")
    checkpoint.save_model(build_decoder(config), tmp_path / "weights", "decoder", config)
    pipe = GSV3DPipeline.from_pretrained(tmp_path / "weights", device="cpu")
    assert pipe.dino is None and len(pipe(picture, **QUICK)) == CONFIG.num_frames * SIDE**2


# ----------------------------------------------------------- what a person may do wrong


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="gsv3d.json is missing.*data/checkpoints/tiny"
    ) as error:
        GSV3DPipeline.from_pretrained(tmp_path / "nowhere")
    one_sentence(error)
    for text in ('{"name": "ti', "[]", '{"name": "huge"}'):
        (tmp_path / "gsv3d.json").write_text(text)
        with pytest.raises(ValueError, match="gsv3d.json cannot be read") as error:
            GSV3DPipeline.from_pretrained(tmp_path)
        one_sentence(error)


@pytest.mark.parametrize("name", ["vae", "clip", "unet", "decoder", "dino", "lora"])
def test_missing_and_truncated_weights_are_one_sentence(weights, tmp_path, name):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    (file,) = (folder / name).glob("*.safetensors")
    # a tensor is missing
    save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}.*cannot be read.*tensors") as error:
        GSV3DPipeline.from_pretrained(folder)
    one_sentence(error)
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ValueError, match=f"{name}.*cannot be read") as error:
        GSV3DPipeline.from_pretrained(folder)
    assert str(folder) in one_sentence(error)
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name) as error:
        GSV3DPipeline.from_pretrained(folder)
    one_sentence(error)
    shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match=name) as error:
        GSV3DPipeline.from_pretrained(folder)
    one_sentence(error)


def test_a_picture_tensor_must_be_an_image(pipe, picture):
    for wrong in (
        picture.movedim(-1, 0),
        picture[:, :-1],
        (255 * picture).to(torch.uint8),
        picture * 255,
    ):
        with pytest.raises(ValueError, match="A tensor is taken for the condition image") as error:
            pipe(wrong, **QUICK)
        one_sentence(error)


def test_a_mask_goes_with_a_condition_image(pipe, picture):
    whole, rgba = torch.ones(SIZE, SIZE, 1), object_views().rgba[FRONT]
    wrong = (whole[..., 0], whole.numpy(), 255 * whole, 0 * whole, whole * math.nan)
    for image, mask in ((rgba, whole), *((picture, mask) for mask in wrong)):
        with pytest.raises(ValueError, match="A mask, .* goes with a condition image") as error:
            pipe(image, mask=mask, **QUICK)
        one_sentence(error)


BAD_NUMBERS = {
    "seed": (-1, 2**64, 10**5000, 1.5, "3", None, True, math.nan),
    "steps": (0, -1, 1001, 10**9, 2.5, math.nan, "4"),
    "num_frames": (0, -3, 361, 10**6, 2.0, math.inf),
    "guidance": (math.nan, math.inf, -0.1, 1e9, "2"),
    "elevation": (math.nan, math.inf, -math.inf, 90, -90.0, 10**400, "15"),
    "lora_scale": (math.nan, math.inf, -math.inf, 1e9, "1"),
}


@pytest.mark.parametrize("name", list(BAD_NUMBERS))
def test_numbers_that_cannot_be_used_are_one_sentence_before_anything_runs(pipe, picture, name):
    for value in BAD_NUMBERS[name]:
        wanted = r"a (whole )?number( (from|between) .*)?|\d+ or (more|less)"
        with pytest.raises(UserError, match=f"^{name} must be ({wanted}), got ") as error:
            pipe(None, **{name: value})  # no image: it is not even looked at
        one_sentence(error)


def test_numbers_at_their_ends_are_used():
    good = {
        "seed": (0, 2**64 - 1, np.int64(3), torch.tensor(4)),
        "steps": (1, 1000, np.int32(5)),
        "num_frames": (1, 360),
        "guidance": (0, 1, 2.5, np.float32(1.5)),
        "elevation": (None, 0, -89.9, np.float64(89.9), torch.tensor(5.0)),
        "lora_scale": (None, -1, 0, 0.5),
    }
    for name, values in good.items():
        for value in values:
            found = getattr(settings_for(CONFIG, **{name: value}), name)
            assert found == value and type(found) in (int, float, type(None))
    assert torch.Generator().manual_seed(settings_for(CONFIG, seed=2**64 - 1).seed)
    left = settings_for(CONFIG)
    given = (CONFIG.num_frames, CONFIG.sampling_steps, CONFIG.guidance)
    assert (left.num_frames, left.steps, left.guidance) == given


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", str(2**64)), ("--guidance", "nan"), ("--steps", "5000")]
)
def test_the_command_refuses_numbers_before_it_opens_weights(
    weights, tmp_path, capsys, option, value
):
    shutil.copytree(weights, tmp_path / "weights")
    for file in (tmp_path / "weights").rglob("*.safetensors"):
        file.unlink()
    words = ["no image", "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "weights")]
    with pytest.raises(SystemExit, match="2"):  # argparse's own, which ends by itself
        command.main([*words, option, value])
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"python -m gsv3d_lib: error: argument {option}: must be .*, got .*{value[:40]}.*", said
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- baselines


@pytest.fixture(scope="module")
def scene():
    """One object at 64 px, seen from 24 sides."""
    return ball_views(1, size=64).scene(0)


def test_a_flat_card_is_the_picture_from_the_front(scene):
    camera = relative_cameras(scene, FRONT, torch.tensor([FRONT]))
    card = flat_card(scene.rgb[FRONT], scene.alpha[FRONT], camera)
    rgb, depth, alpha = render(card, camera)
    assert psnr(rgb, scene.rgb[[FRONT]]) > 22
    inside = (alpha[0] > 0.99) & (scene.alpha[FRONT] > 0)
    assert (rgb[0] - scene.rgb[FRONT]).abs().mean(-1, keepdim=True)[inside].median() < 0.01
    assert len(card) == int((scene.alpha[FRONT] >= 0.5).sum())
    forward = camera.viewmats[0, 2, :3]
    # a plane through the centre, facing the camera
    assert (card.means @ forward).abs().max() < 1e-4
    side = orbit_cameras([90.0], 0.0, 64)
    assert render(card, side).alpha.mean() < 0.25 * alpha.mean()  # a card from the side is a line


def test_a_flat_card_is_measured_by_as_many_points_as_the_protocol_allows(monkeypatch):
    large = ball_views(1, size=128).scene(0)
    # a card of 6,400 Gaussians
    half = (torch.arange(128)[:, None, None] < 50).expand_as(large.alpha)
    large = dataclasses.replace(large, alpha=half.float())
    monkeypatch.setattr(protocol, "shape_scores", lambda points, *_: {"points": len(points)})
    truth = protocol.Truth(np.zeros((protocol.NUM_POINTS, 3), "f4"), None)
    assert (
        protocol.NUM_POINTS / 2
        < protocol.Judge().baselines(large, truth)["card"]["points"]
        <= protocol.NUM_POINTS
    )


def test_the_average_object_is_the_mean_of_each_ring_view():
    views = ball_views(2)
    average = AverageObject.of(views)
    assert average.rgb.shape == (16, SIZE, SIZE, 3)
    assert torch.allclose(
        average.rgb, (views.scene(0).rgb[:16] + views.scene(1).rgb[:16]) / 2, atol=1e-6
    )
    depth, hit = views.depth[:, :16], views.depth[:, :16] > 0
    both, one = hit.all(0), hit.any(0) & ~hit.all(0)
    assert torch.allclose(average.depth[both], depth.mean(0)[both])
    # where one object is, its own depth
    assert torch.allclose(average.depth[one], depth.sum(0)[one])
    seen = average.nearest_views(torch.tensor([0.0, 22.0, 180.0, 359.0]))
    assert all(torch.equal(a, average.rgb[k]) for a, k in zip(seen, (0, 1, 8, 0), strict=True))


def test_the_mesh_of_the_average_of_one_object_is_that_object():
    mesh = AverageObject.of(ball_views(1, size=64)).mesh
    gaps = [
        np.abs(np.linalg.norm(mesh.vertices - centre, axis=1) - radius)
        for centre, radius, _ in BALLS
    ]
    assert np.median(np.min(gaps, axis=0)) < 0.03


# ---------------------------------------------------------------- evaluation


def test_targets_are_seen_in_the_world_of_the_input_view(scene):
    chosen = torch.tensor([FRONT, 3, 19, 22])
    cameras = relative_cameras(scene, FRONT, chosen)
    front = orbit_cameras([0.0], scene.elevations[FRONT], 64)
    assert torch.allclose(cameras[0].viewmats, front.viewmats, atol=1e-5)
    rgb, _, depth = ball_pictures(cameras, turned(BALLS, -float(scene.azimuths[FRONT])))
    assert ((rgb - scene.rgb[chosen]).abs().amax(-1) < 0.01).float().mean() > 0.998
    assert ((depth - scene.depth[chosen]).abs() < 1e-3).float().mean() > 0.998


def write_geometry(folder, id: str, balls=BALLS) -> np.ndarray:
    """`<id>.geometry.npz` with points on the balls, as ../shared/objects/gso has it."""
    rng, parts = np.random.default_rng(0), []
    for centre, radius, _ in balls:
        d = rng.normal(size=(5000, 3))
        parts.append(np.array(centre) + radius * d / np.linalg.norm(d, axis=1, keepdims=True))
    points = np.concatenate(parts).astype("f2")
    np.savez(folder / f"{id}.geometry.npz", points=points, occupancy=np.packbits(ball_grid(balls)))
    return points


def ball_grid(balls=BALLS) -> np.ndarray:
    """The cells of a 64^3 grid whose centres are inside a ball."""
    line = (np.arange(64) + 0.5) / 32 - 1
    centres = np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1)
    return np.any(
        [np.linalg.norm(centres - centre, axis=-1) < radius for centre, radius, _ in balls], axis=0
    )


def test_the_truth_is_read_as_it_was_written(tmp_path):
    write_geometry(tmp_path, "balls")
    truth = protocol.load_truth(tmp_path, "balls")
    assert truth.points.shape == (4096, 3)
    assert np.array_equal(truth.points, protocol.load_truth(tmp_path, "balls").points)
    gaps = [
        np.abs(np.linalg.norm(truth.points - centre, axis=1) - radius)
        for centre, radius, _ in BALLS
    ]
    assert np.min(gaps, axis=0).max() < 2e-3  # half precision
    assert np.array_equal(truth.occupancy, ball_grid())
    assert protocol.load_truth(tmp_path, "other") is None and protocol.mesh_scores(None, None) == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"points": np.full((5000, 3), np.nan, "f2")}, "points holds values that are not finite"),
        ({"points": np.full((5000, 3), 40, "f4")}, "points holds 40, outside of -1.01 to 1.01"),
        ({"points": np.zeros((4095, 3), "f2")}, "it holds 4095 points, fewer than 4096"),
        ({"points": np.zeros((5000, 2), "f2")}, r"points has the shape \[5000, 2\]"),
        ({"occupancy": np.zeros(100, "u1")}, r"occupancy has the shape \[100\], not \[32768\]"),
        ({"occupancy": np.zeros((64, 64, 64), bool)}, "occupancy has the shape"),
        ({"occupancy_resolution": 32}, "occupancy_resolution holds 32"),
    ],
)
def test_a_truth_with_wrong_numbers_is_one_sentence(tmp_path, change, sentence):
    write_geometry(tmp_path, "balls")
    with np.load(tmp_path / "balls.geometry.npz") as arrays:
        arrays = dict(arrays) | change
    np.savez(tmp_path / "balls.geometry.npz", **arrays)
    with pytest.raises(
        ValueError, match=f"balls.geometry.npz cannot be read .*{sentence}"
    ) as error:
        ev.load_truth(tmp_path, "balls")
    one_sentence(error)


def test_what_cannot_be_measured_on_is_said_before_anything_is_measured(tmp_path):
    views = ball_views(1)
    ring = ViewTensors(views.ids, *(getattr(views, name)[:, :16] for name in COLUMN_NAMES))
    with pytest.raises(ValueError, match="no views beside the 16 of the ring"):
        ev.evaluate(None, ring, tmp_path, None)
    (tmp_path / f"{views.ids[0]}.geometry.npz").write_bytes(b"half")
    with pytest.raises(ValueError, match="geometry.npz cannot be read"):
        ev.evaluate(None, views, tmp_path, None)


def test_a_result_is_turned_into_the_world_of_the_truth(tmp_path):
    """Opaque Gaussians on the true surface, seen from azimuth 270: turned by it they
    fit, and not otherwise.
    """
    points = write_geometry(tmp_path, "balls").astype("f4") @ protocol.turn_about_z(-270.0).T
    truth, count = protocol.load_truth(tmp_path, "balls"), len(points)
    means, quats = torch.from_numpy(points), torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
    surface = Gaussians(
        means, quats, torch.full((count, 3), 0.015), torch.full((count,), 0.95), means.abs()
    )
    there, elsewhere = (
        protocol.mesh_scores(surface, truth, 270.0),
        protocol.mesh_scores(surface, truth, 0.0),
    )
    # no view from below fuses the mesh, so under the balls it is a little too large
    assert there["chamfer"] < 0.05 and there["f_score"] > 0.8 and there["iou"] > 0.75
    assert elsewhere["chamfer"] > 0.1 and elsewhere["f_score"] < 0.6 and elsewhere["iou"] < 0.6


def test_what_has_no_surface_scores_nothing(tmp_path):
    write_geometry(tmp_path, "balls")
    speck = Gaussians(
        torch.zeros(1, 3),
        torch.eye(4)[:1],
        torch.full((1, 3), 1e-3),
        torch.full((1,), 0.1),
        torch.ones(1, 3),
    )
    scores = protocol.mesh_scores(speck, protocol.load_truth(tmp_path, "balls"))
    assert math.isnan(scores["chamfer"]) and scores["f_score"] == scores["iou"] == 0


def test_a_strip_shows_input_truth_result_and_error(scene):
    camera = relative_cameras(scene, FRONT, torch.tensor([FRONT]))
    card = flat_card(scene.rgb[FRONT], scene.alpha[FRONT], camera)
    row = report.strip(card, scene).unfold(1, 64, 64).permute(1, 0, 3, 2)  # [10, 64, 64, 3]
    assert torch.equal(row[0], scene.rgb[FRONT]) and torch.equal(
        row[3], scene.rgb[(FRONT + 8) % 16]
    )
    assert torch.allclose(row[7:], 1 - (row[1:4] - row[4:7]).abs(), atol=1e-6)


def test_image_scores_of_an_empty_scene_are_those_of_white(scene):
    one = torch.ones(1)
    speck = Gaussians(
        torch.full((1, 3), 9.0), torch.eye(4)[:1], torch.full((1, 3), 1e-3), one, torch.ones(1, 3)
    )
    scores = protocol.image_scores(speck, scene, FRONT, torch.tensor([0, 5]))
    assert scores["psnr"] == pytest.approx(
        psnr(torch.ones(2, 64, 64, 3), scene.rgb[[0, 5]]), abs=1e-3
    )
    assert scores["depth_l1"] == pytest.approx(1.0)  # nothing there costs the object's radius


def test_averages_leave_nan_out_and_make_a_table():
    rows = [
        {"id": "a", "decoder": {"psnr": 20.0, "chamfer": 0.1}, "card": {"psnr": 10.0}},
        {"id": "b", "decoder": {"psnr": 22.0, "chamfer": math.nan}, "card": {"psnr": 11.0}},
    ]
    means = report.averages(rows)
    assert means == {"decoder": {"psnr": 21.0, "chamfer": 0.1}, "card": {"psnr": 10.5}}
    lines = report.table(means).split("\n")
    assert (
        lines[0] == "| method | psnr | ssim | depth_l1 | chamfer | f_score | iou |"
        and lines[1] == "|---" * 7 + "|"
    )
    assert lines[2:] == [
        "| decoder | 21.000 | - | - | 0.100 | - | - |",
        "| card | 10.500 | - | - | - | - | - |",
    ]


def test_two_lpips_nets_are_two_columns(scene):
    nets = {
        "lpips": LPIPS("alex").requires_grad_(False),
        "lpips_vgg": LPIPS("vgg").requires_grad_(False),
    }
    for number, net in enumerate(nets.values(), start=1):
        for weight in net.weights:
            weight.fill_(number)
    judge, pictures, truth = protocol.Judge(nets), scene.rgb[:2], scene.rgb[2:4]
    scores = judge.colors(pictures, truth)
    assert set(scores) == {"psnr", "ssim", "lpips", "lpips_vgg"}
    assert all(
        scores[name] == pytest.approx(float(net(pictures, truth).mean()))
        for name, net in nets.items()
    )
    lines = report.table({"card": scores, "decoder": {"psnr": 20.0, "lpips_vgg": 0.25}}).split("\n")
    assert (
        lines[0]
        == "| method | psnr | ssim | lpips | lpips_vgg | depth_l1 | chamfer | f_score | iou |"
    )
    assert lines[3] == "| decoder | 20.000 | - | - | 0.250 | - | - | - | - |"
    assert "lpips |" not in report.table({"decoder": {"lpips_vgg": 0.25}})


def test_two_files_of_one_lpips_net_are_refused(weights, tmp_path, capsys):
    """They would be one column."""
    path = tmp_path / "lpips.safetensors"
    save_file(LPIPS("alex").state_dict(), path, metadata={"lpips": "alex"})
    arguments = [
        "--weights",
        str(weights),
        "--objects",
        str(tmp_path),
        "--out",
        str(tmp_path / "scores.json"),
    ]
    assert call("evaluate", [*arguments, "--lpips", str(path), str(path)]) == 2
    assert "one file for each kind of net; got alex, alex" in capsys.readouterr().err
    assert not (tmp_path / "scores.json").exists()


# the faint Gaussians of untrained models have no surface
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_the_evaluation_command_writes_what_it_prints(weights, tmp_path, capsys):
    for folder, id in (("gso", "balls"), ("train", "others")):
        write_object(tmp_path / folder, object_views(id, 0.0 if id == "balls" else 60.0, size=SIZE))
        write_index(tmp_path / folder, [{"id": id}])
    write_geometry(tmp_path / "gso", "balls")
    out, lpips = tmp_path / "results" / "tiny.json", tmp_path / "lpips.safetensors"
    save_file(LPIPS("alex").state_dict(), lpips, metadata={"lpips": "alex"})
    arguments = [
        "--weights",
        str(weights),
        "--objects",
        str(tmp_path / "gso"),
        "--train",
        str(tmp_path / "train"),
        "--lpips",
        str(lpips),
    ]
    call("evaluate", [*arguments, "--out", str(out), "--steps", "1", "--guidance", "1"])
    record = json.loads(out.read_text())
    assert record["objects"] == 1 and record["rows"][0]["id"] == "balls"
    ablations = {"generated_without_lora", "generated_without_projection"}
    assert set(record["mean"]) == {"decoder", "generated", "card", "average"} | ablations
    assert record["lpips"][0]["net"] == "alex" and "lpips" in record["mean"]["decoder"]
    truthful = {
        "psnr",
        "ssim",
        "lpips",
        "depth_l1",
        "chamfer",
        "f_score",
        "iou",
        "front_psnr",
        "ghosting",
        "detail",
    }
    truthful |= {"reprojection", "split_psnr", "split_depth"}
    assert truthful | {"recognised"} == set(record["mean"]["generated"])
    assert {"psnr", "ssim", "lpips", "chamfer", "f_score", "iou"} == set(record["mean"]["average"])
    assert {"psnr", "ssim", "lpips", "depth_l1", "chamfer", "f_score"} == set(
        record["mean"]["card"]
    )  # it has no volume
    assert 0 < record["mean"]["card"]["chamfer"] < 1 and 5 < record["mean"]["card"]["psnr"] < 40
    assert record["mean"]["generated"] != record["mean"]["generated_without_lora"]
    assert report.table(record["mean"]) in capsys.readouterr().out
    assert report.table(record["mean"]) in out.with_suffix(".md").read_text()
    assert Image.open(out.with_suffix(".png")).size == (10 * SIZE, SIZE)
    assert record["command"].endswith("--steps 1 --guidance 1")


def test_the_decoder_is_scored_on_views_that_it_did_not_get(pipe, monkeypatch):
    scene, seen = ball_views(1).scene(0), {}

    def spy(judge, pictures, scene, chosen):
        seen["chosen"] = chosen.tolist()
        return {}

    monkeypatch.setattr(protocol.Judge, "pictures", spy)
    assert set(protocol.Judge().decoder(pipe, scene)) == {"ghosting", "detail"} and seen[
        "chosen"
    ] == list(range(16, 24))
    assert math.isfinite(protocol.evaluate_vae(pipe, scene)["vae_psnr"])
