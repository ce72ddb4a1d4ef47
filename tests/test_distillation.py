"""Stage 2: the 3D loss reaches the LoRA through the frozen decoder, and nothing else
moves.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_world import ball_views, descend, randn, random_orbits, shake, tiny_config

from gsv3d_lib.config import preset
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.distillation import DistillationStage, sigma_weight
from gsv3d_lib.encoders import build_clip, build_dino
from gsv3d_lib.lora import (
    IDLE,
    LORA_FILE,
    add_lora,
    load_lora,
    lora_parameters,
    save_lora,
    set_lora_scale,
)
from gsv3d_lib.pretraining import DiffusionStage
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.training import draw_batch
from gsv3d_lib.unet import SV3DUNet, build_unet

CONFIG = tiny_config(lambda_alpha_stage2=0.5, lambda_pixel=0.0, view_counts=(4,), num_frames=4)


def base_unet() -> SV3DUNet:
    torch.manual_seed(0)
    return shake(build_unet(CONFIG), size=0.02).eval()


def unet_inputs() -> tuple:
    azimuth = torch.arange(4.0)[None]
    return (
        randn(1, 4, 8, 4, 4),
        torch.zeros(1),
        randn(1, 1, CONFIG.clip_dim, seed=1),
        azimuth + 1,
        azimuth,
    )


def train_lora_a_little(unet: SV3DUNet, size: float = 0.1) -> SV3DUNet:
    """Move the LoRA away from the identity, as training would."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in lora_parameters(unet).values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return unet


@pytest.fixture(scope="module")
def parts():
    """CLIP, decoder and DINO with random weights, and orbits of two ball scenes."""
    torch.manual_seed(1)
    decoder = shake(build_decoder(CONFIG), size=0.05).eval()
    return (
        build_clip(CONFIG).eval(),
        decoder,
        build_dino(CONFIG).eval(),
        random_orbits(ball_views()),
    )


def build_stage(parts, unet=None, **changes) -> DistillationStage:
    clip, decoder, dino, orbits = parts
    unet = unet or add_lora(base_unet(), CONFIG.lora_rank)
    return DistillationStage(unet, clip, decoder, dino, orbits, CONFIG.replace(**changes))


def kept_batch(stage, sigma=(0.4, 1.5), step: int = 0) -> dict:
    """A batch of moderate noise whose condition is not dropped."""
    return draw_batch(stage, 0, step, 2) | {"sigma": torch.tensor(sigma), "keep": torch.ones(2)}


def gradients(stage, batch) -> dict[str, torch.Tensor]:
    stage.zero_grad(set_to_none=True)
    loss, _ = stage(batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in lora_parameters(stage.unet).items()}


# ---------------------------------------------------------------- LoRA


@torch.no_grad()
def test_a_fresh_lora_is_the_base():
    unet, inputs = base_unet(), unet_inputs()
    before = unet(*inputs)
    assert torch.allclose(add_lora(unet, 3)(*inputs), before, atol=1e-6)
    lora = lora_parameters(unet)
    assert all((p == 0).all() == ("lora_B" in name) for name, p in lora.items())
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(lora)


def test_a_quarter_of_the_lora_cannot_change_any_result():
    unet = train_lora_a_little(add_lora(base_unet(), 3))
    idle = {
        name: p for name, p in lora_parameters(unet).items() if any(layer in name for layer in IDLE)
    }
    assert 4 * len(idle) == len(lora_parameters(unet))
    with torch.no_grad():
        before = unet(*unet_inputs())
        for p in idle.values():
            p.normal_()
        assert torch.allclose(unet(*unet_inputs()), before, atol=1e-6)
    with torch.enable_grad():
        # where queries and keys are computed
        assert torch.allclose(unet(*unet_inputs()), before, atol=1e-5)


def test_lora_sits_on_every_projection_of_every_attention():
    unet = add_lora(base_unet(), 3)
    hosts = {name.split(".lora_")[0] for name in lora_parameters(unet)}
    attentions = [name for name, m in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert hosts == {
        f"{a}.{target}" for a in attentions for target in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert any("temporal" in host for host in hosts) and any(
        "temporal" not in host for host in hosts
    )
    ranks = {p.shape[0] for name, p in lora_parameters(unet).items() if "lora_A" in name}
    assert ranks == {3}


def test_the_seed_of_a_lora_is_its_own():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (add_lora(base_unet(), 2, seed) for seed in (1, 1, 2))
    base_unet()
    values = [
        torch.cat([p.flatten() for p in lora_parameters(unet).values()]) for unet in (a, b, c)
    ]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    torch.set_rng_state(state)
    unet, state = base_unet(), torch.get_rng_state()
    add_lora(unet, 2)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are not touched


@torch.no_grad()
def test_scale_0_is_the_base_and_1_the_trained_one():
    inputs, before = unet_inputs(), base_unet()(*unet_inputs())
    unet = train_lora_a_little(add_lora(base_unet(), 2))
    trained = unet(*inputs)
    assert (trained - before).abs().max() > 1e-3
    set_lora_scale(unet, 0.0)
    assert torch.allclose(unet(*inputs), before, atol=1e-6)
    set_lora_scale(unet, 0.5)
    assert (unet(*inputs) - before).abs().max() < (trained - before).abs().max()
    set_lora_scale(unet, 1.0)
    assert torch.equal(unet(*inputs), trained)


@torch.no_grad()
def test_a_saved_lora_is_the_same_lora(tmp_path):
    unet = train_lora_a_little(add_lora(base_unet(), 2))
    save_lora(unet, tmp_path)
    again = load_lora(base_unet(), tmp_path)
    assert torch.allclose(again(*unet_inputs()), unet(*unet_inputs()), atol=1e-6)
    # what was loaded can be saved, as the export of weights does
    save_lora(again, tmp_path / "second")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    assert len(stored) == len(lora_parameters(unet))
    # diffusers' names, without an adapter's
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    host = unet.get_submodule(attention)
    assert torch.equal(
        stored[f"{attention}.to_q.lora_B.weight"], host.to_q.lora_B["default"].weight
    )


@torch.no_grad()
def test_the_lora_is_a_plain_low_rank_update(tmp_path):
    """W + B A (alpha = r), added by hand to diffusers' own U-Net, predicts what ours
    does: nothing hides in it.
    """
    unet = train_lora_a_little(add_lora(base_unet(), 2))
    save_lora(unet, tmp_path / "lora")
    base_unet().save_pretrained(tmp_path / "unet")
    merged = base_unet()
    theirs = UNetSpatioTemporalConditionModel.from_pretrained(
        tmp_path / "unet", local_files_only=True
    )
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        for name in (n for n in file.keys() if "lora_A" in n):
            low_rank = file.get_tensor(name.replace("lora_A", "lora_B")) @ file.get_tensor(name)
            theirs.get_parameter(name.replace("lora_A.", "")).add_(low_rank)
    merged.load_state_dict(theirs.state_dict())
    assert torch.allclose(merged(*unet_inputs()), unet(*unet_inputs()), atol=1e-5)


def test_a_missing_or_truncated_lora_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="lora=False") as error:
        load_lora(base_unet(), tmp_path)
    assert "\n" not in str(error.value)
    save_lora(add_lora(base_unet(), 2), tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    whole = load_file(path)
    save_file(dict(list(whole.items())[1:]), path)
    with pytest.raises(
        ValueError, match=f"it has {len(whole) - 1} tensors, this U-Net's LoRA {len(whole)}"
    ):
        load_lora(base_unet(), tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_lora(base_unet(), tmp_path)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------- geometric distillation


def test_gradients_reach_the_lora_and_nothing_else(parts):
    stage = build_stage(parts)
    loss, metrics = stage(kept_batch(stage))
    loss.backward()
    size = {name: p.grad.abs().max() for name, p in stage.named_parameters() if "lora_B" in name}
    largest = max(size.values())
    for name, p in stage.named_parameters():
        if "lora_B" in name and any(layer in name for layer in IDLE):
            # attention to one token: no query or key can matter
            assert size[name] < 1e-5 * largest, name
        elif "lora_B" in name:
            assert size[name] > 1e-4 * largest, name
        elif "lora_A" in name:
            assert p.grad is not None  # zero in the first step, because B is
        else:
            assert p.grad is None and not p.requires_grad, name
    assert {"loss_2d", "loss_3d", "psnr", "depth_l1", "alpha_mse"} == set(metrics)
    assert set(stage.training_state()) == {f"unet.{name}" for name in lora_parameters(stage.unet)}


def test_stage_1_s_alpha_term_is_not_stage_2_s(parts):
    """Notebook 08 found that it does harm there: it needs a field of its own."""
    batch = kept_batch(build_stage(parts))
    with torch.no_grad():
        (plain, scores), (same, _), (with_alpha, _) = (
            build_stage(parts, **changes)(batch)
            for changes in (
                {"lambda_alpha_stage2": 0.0},
                {"lambda_alpha_stage2": 0.0, "lambda_alpha": 7.0},
                {"lambda_alpha_stage2": 2.0},
            )
        )
    assert plain == same and with_alpha - plain == pytest.approx(
        2 * float(scores["alpha_mse"]), rel=1e-3
    )
    assert all(preset(name).lambda_alpha_stage2 == 0 for name in ("tiny", "small", "paper"))


LORA_BYTES = """
import hashlib, sys, torch
from pathlib import Path
sys.path[:0] = {paths!r}
from test_distillation import CONFIG, add_lora, base_unet, load_lora, save_lora
folder = Path(sys.argv[1])
save_lora(add_lora(base_unet(), 2), folder / "first")
save_lora(load_lora(base_unet(), folder / "first"), folder / "again")
"""


def test_a_lora_has_the_same_bytes_in_every_process(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    for seed in ("1", "2"):  # of the order in which Python goes through sets
        command = [sys.executable, "-c", LORA_BYTES.format(paths=paths), tmp_path / seed]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    for name in ("first", "again"):
        one, other = ((tmp_path / seed / name / LORA_FILE).read_bytes() for seed in ("1", "2"))
        assert one == other


def test_the_3d_loss_alone_reaches_every_lora_b(parts):
    """Without L_2D: the path renderer -> Gaussians -> frozen decoder -> z_hat -> LoRA
    is whole.
    """
    stage = build_stage(parts)
    batch = kept_batch(stage)
    with torch.no_grad():
        loss_2d, _ = build_stage(parts, lambda_3d=0.0)(batch)
    loss, metrics = stage(batch)
    assert loss.detach() == pytest.approx(float(loss_2d + metrics["loss_3d"]), rel=1e-5)
    z_hat = randn(2, 4, 4, 4, 4, seed=3).requires_grad_()
    loss_3d, _ = stage.loss_3d(z_hat, batch)
    (gradient,) = torch.autograd.grad(loss_3d, z_hat)
    # every view of every object
    assert torch.isfinite(gradient).all() and (gradient.abs().amax((2, 3, 4)) > 0).all()


def test_no_weight_moves_but_the_lora(parts):
    stage = build_stage(parts)
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-3)
    loss, _ = stage(kept_batch(stage))
    loss.backward()
    optimizer.step()
    moved = {name for name, p in stage.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {name for name in before if "lora_B" in name} <= moved


def test_distillation_lowers_its_loss(parts):
    stage = build_stage(parts)
    optimizer = torch.optim.AdamW(lora_parameters(stage.unet).values(), lr=5e-3)
    losses = descend(stage, kept_batch(stage), optimizer)
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_without_noise_the_3d_loss_is_that_of_stage_1(parts):
    """sigma -> 0: z_hat is z0, so the same latents give the same Gaussians and the same
    loss.
    """
    _, decoder, dino, orbits = parts
    stage = build_stage(parts)
    batch = kept_batch(stage, sigma=(1e-5, 1e-5))
    _, metrics = stage(batch)
    stage1_loss, stage1_metrics = DecoderStage(decoder, dino, orbits, CONFIG)(batch)
    assert metrics["loss_3d"] == pytest.approx(stage1_loss.item(), rel=1e-3)
    assert metrics["psnr"] == pytest.approx(stage1_metrics["psnr"].item(), rel=1e-3)
    _, noisy = stage(batch | {"sigma": torch.tensor([20.0, 20.0])})
    assert abs(noisy["loss_3d"] - stage1_loss) > 1e-2 * stage1_loss  # and with noise it is not


def test_lambda_0_is_plain_lora_fine_tuning(parts):
    clip, _, _, orbits = parts
    unet = train_lora_a_little(add_lora(base_unet(), CONFIG.lora_rank), 0.02)
    distilling = build_stage(parts, unet, lambda_3d=0.0)
    fine_tuning = DiffusionStage(unet, clip, orbits, CONFIG)
    batch = kept_batch(distilling)
    ours, plain = gradients(distilling, batch), gradients(fine_tuning, batch)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    # and it learns from the same draws
    for name, value in draw_batch(fine_tuning, 0, 5, 2).items():
        assert value.shape == draw_batch(distilling, 0, 5, 2)[name].shape


def test_the_gradient_is_linear_in_lambda(parts):
    unet = train_lora_a_little(add_lora(base_unet(), CONFIG.lora_rank), 0.02)
    batch = kept_batch(build_stage(parts, unet))
    at = {
        value: gradients(build_stage(parts, unet, lambda_3d=value), batch)
        for value in (0.0, 1.0, 3.0)
    }
    share = torch.cat([(at[1.0][name] - at[0.0][name]).flatten() for name in at[0.0]])
    threefold = torch.cat([(at[3.0][name] - at[0.0][name]).flatten() for name in at[0.0]])
    assert share.norm() > 0 and torch.allclose(
        threefold, 3 * share, atol=1e-3 * float(threefold.abs().max())
    )


def test_sigma_weighting(parts):
    sigma = torch.tensor([0.0, 1.0, 3.0])
    assert torch.equal(sigma_weight(sigma, "none"), torch.ones(3))
    assert torch.allclose(sigma_weight(sigma, "snr"), torch.tensor([1.0, 0.5, 0.1]))
    with pytest.raises(ValueError, match='"none" or "snr"; got \'min\''):
        sigma_weight(sigma, "min")
    z_hat, stage = randn(2, 4, 4, 4, 4), build_stage(parts)
    batch = kept_batch(stage, sigma=(1.0, 1.0))
    with torch.no_grad():
        plain, _ = stage.loss_3d(z_hat, batch)
        weighted, _ = build_stage(parts, stage.unet, sigma_weighting="snr").loss_3d(z_hat, batch)
        one_sided, _ = build_stage(parts, stage.unet, sigma_weighting="snr").loss_3d(
            z_hat, batch | {"sigma": torch.tensor([0.0, 1e4])}
        )
        first, _ = stage.loss_3d(z_hat[:1], {name: value[:1] for name, value in batch.items()})
    assert weighted == pytest.approx(plain.item() / 2, rel=1e-5)
    assert one_sided == pytest.approx(first.item() / 2, rel=1e-4)  # each object by its own sigma
