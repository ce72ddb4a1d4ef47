"""The planner against what really happens at a size that fits here."""

import dataclasses

import pytest
import torch
from tiny_world import kept_bytes, randn, tiny_config

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.config import preset
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.plan import decoder_part, main, parts_of, plan, unet_part
from gsv3d_lib.unet import build_unet


def test_planned_activations_are_those_of_a_real_unet():
    config = preset("tiny", num_frames=8)
    unet, frames, size = build_unet(config), 8, config.latent_size
    given = randn(1, frames, 8, size, size), torch.zeros(1), randn(1, 1, config.clip_dim)
    real = kept_bytes(unet, lambda: unet(*given, torch.ones(1, frames), torch.ones(1, frames)))
    assert unet_part(config, lora=False).activations == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("frozen", [True, False])
def test_planned_activations_are_those_of_a_real_decoder(frozen):
    config = preset("tiny", num_frames=8)
    decoder = build_decoder(config).requires_grad_(not frozen)
    cameras = orbit_cameras(torch.arange(8) * 45.0, torch.zeros(8), config.image_size)
    latents = randn(1, 8, 4, 8, 8).requires_grad_(frozen)
    real = kept_bytes(decoder, lambda: decoder.output_maps(latents, [cameras], randn(1, 65, config.dino_width))[0])
    assert decoder_part(config, frozen).activations == pytest.approx(real, rel=0.15)


def test_parameters_of_the_paper_preset():
    unet, decoder = parts_of(preset("paper"), "stage2")
    assert (unet.parameters - unet.trained, unet.trained) == (1_525_278_442, 6_639_616)
    assert decoder.trained == 0 and decoder.parameters == 113_557_772


def test_flops_of_a_linear_part_are_counted_by_hand():
    """Without attention layers the decoder is matrix products: doubling the views doubles them."""
    config = tiny_config(decoder_layers=0, decoder_planes=0)
    with pytest.raises(ValueError):
        parts_of(config, "vae")
    one, two = (decoder_part(config.replace(num_frames=n, decoder_layers=1), False) for n in (4, 8))
    assert 2 * one.forward < two.forward < 4 * one.forward  # linear layers double, attention quadruples


def test_memory_and_time_follow_their_causes():
    config = tiny_config()
    base = plan(config, "stage2", half=False)
    assert plan(config, "stage2", half=True).activations == base.activations // 2
    assert plan(config, "stage2", half=False, micro_batch=3).activations == 3 * base.activations
    assert plan(config, "stage2", gpus=4).seconds == pytest.approx(base.seconds / 4)
    lighter = plan(config, "stage2", half=False, checkpointing=True)
    assert lighter.activations < base.activations and lighter.flops > base.flops
    assert plan(config.replace(lambda_3d=0.0), "stage2").parts == base.parts[:1]
    whole = plan(config, "diffusion")
    assert whole.optimizer == 8 * whole.parts[0].parameters and base.optimizer == 8 * base.parts[0].trained
    longer = config.replace(stage2=dataclasses.replace(config.stage2, steps=2 * config.stage2.steps))
    assert plan(longer, "stage2").hours == pytest.approx(2 * base.hours)


def test_the_command_prints_what_fits(capsys):
    main("--scale tiny --stage stage1 --gpus 1 --frames 4 --float32".split())
    report = capsys.readouterr().out
    assert "24 GB: fits" in report and "per step" in report
    with pytest.raises(SystemExit):
        main(["--scale", "huge"])
    assert "There is no preset 'huge'" in capsys.readouterr().err
