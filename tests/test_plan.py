"""The planner against what really happens at a size that fits here."""

import dataclasses
import sys

import pytest
import torch
from command_world import call
from tiny_world import ball_views, randn, random_orbits, tiny_config

from gsv3d_lib.cluster.plan import (
    Ledger,
    Meter,
    advise,
    plan,
    plan_inference,
    rehearse,
    shapes,
    stage_on_meta,
)
from gsv3d_lib.config import preset
from gsv3d_lib.pretraining import DiffusionStage
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.training import draw_batch

# ---------------------------------------------------------------- the meter


def test_the_meter_counts_what_lives():
    weight = randn(100, 50)
    with Meter([weight]) as meter:
        a = weight @ randn(50, 100)  # 5,000 numbers for the other factor, 10,000 for the product
        assert (
            meter.live == 4 * 10_000
            and meter.peak == 4 * 15_000
            and meter.flops == 2 * 100 * 50 * 100
        )
        b = a.T.flatten()[:10]  # a copy of the product, of which a view lives
        del a
        assert meter.live == 4 * 10_000 and weight.T.shape == (50, 100)
    assert meter.peak == 4 * 20_000 and len(b) == 10


def test_copies_of_weights_are_told_apart():
    weight = randn(64, 64)
    with Meter([weight]) as meter, torch.autocast("cpu", torch.bfloat16):
        kept = weight.to(torch.bfloat16)
    assert meter.copies == meter.copies_at_peak == kept.nbytes


# ---------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize("stage", ["diffusion", "stage1"])
def test_a_rehearsal_keeps_what_the_real_step_keeps(stage):
    """The real stage on real data: the same buffers at the peak, most of which autograd
    puts aside.
    """
    from gsv3d_lib.decoder import build_decoder
    from gsv3d_lib.encoders import build_clip, build_dino
    from gsv3d_lib.unet import build_unet

    config, orbits = tiny_config(view_counts=(4,), lambda_pixel=0.5), random_orbits(ball_views())
    if stage == "diffusion":
        real = DiffusionStage(build_unet(config), build_clip(config), orbits, config)
    else:
        real = DecoderStage(build_decoder(config), build_dino(config), orbits, config)
    batch = draw_batch(real, 0, 0, 1)
    assert {name: tuple(t.shape[1:]) for name, t in batch.items()} == shapes(config, stage)
    for p in real.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    gradients = [p.grad for p in real.parameters() if p.requires_grad]
    step, given = rehearse(config, stage), [*real.parameters(), *gradients, *batch.values()]
    ledger = Ledger(given)
    with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda t: t):
        real(batch)
    assert 0.7 * step.peak < ledger.bytes < step.peak
    with Meter(given) as meter:
        real(batch)[0].backward()
    assert step.peak == pytest.approx(meter.peak, rel=0.15)


def test_parameters_of_the_paper_preset():
    stage = stage_on_meta(preset("paper"), "stage2")
    unet, clip, decoder, dino = (
        [p.numel() for p in getattr(stage, name).parameters()]
        for name in ("unet", "clip", "decoder", "dino")
    )
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    assert (sum(unet) - trained, trained) == (1_525_278_442, 6_639_616)
    assert (sum(clip), sum(decoder), sum(dino)) == (632_076_800, 113_557_772, 86_580_480)
    with pytest.raises(
        ValueError, match="plan knows the stages diffusion, stage1, stage2; got 'vae'"
    ):
        stage_on_meta(preset("tiny"), "vae")


def test_flops_follow_the_views():
    """Linear layers double with the views, attention quadruples."""
    one, two = (rehearse(tiny_config(num_frames=n), "stage1").flops for n in (4, 8))
    assert 2 * one < two < 4 * one


def test_memory_and_time_follow_their_causes():
    config = tiny_config()
    base = plan(config, "stage2", half=False)
    assert plan(config, "stage2", half=True).activations < base.activations
    assert (
        plan(config, "stage2", half=True).weights
        > base.weights
        == 4 * sum(p.parameters for p in base.parts)
    )
    assert plan(config, "stage2", half=False, micro_batch=3).activations == 3 * base.activations
    assert plan(config, "stage2", gpus=4).seconds == pytest.approx(base.seconds / 4)
    lighter = plan(config, "stage2", half=False, checkpointing=True)
    assert lighter.activations < base.activations and lighter.flops > base.flops
    assert plan(config.replace(lambda_3d=0.0), "stage2", half=False).activations < base.activations
    once, parts = (plan(config, "stage2", micro_batch=m) for m in (2, 1))  # the batch is 2
    assert parts.together and not once.together
    assert once.memory == parts.memory + parts.activations - parts.gradients
    trained = sum(part.trained for part in base.parts)
    assert (base.gradients, base.optimizer, base.average) == (4 * trained, 8 * trained, 0)
    averaged = config.replace(stage2=dataclasses.replace(config.stage2, ema=0.9))
    assert plan(averaged, "stage2", half=False).average == 4 * trained
    longer = config.replace(
        stage2=dataclasses.replace(config.stage2, steps=2 * config.stage2.steps)
    )
    assert plan(longer, "stage2").hours == pytest.approx(2 * base.hours)


def test_an_inference_is_smaller_than_a_training_and_knows_all_networks():
    config = tiny_config()
    whole = plan_inference(config)
    assert [part.name for part in whole.parts] == ["vae", "clip", "unet", "dino", "decoder"]
    assert (
        whole.gradients
        == whole.optimizer
        == 0
        < whole.activations
        < plan(config, "stage2", half=False).activations
    )
    assert plan_inference(config.replace(dino="none")).weights < whole.weights


# ---------------------------------------------------------------- the command


def test_the_advice_fits_the_card_with_as_little_as_possible():
    config = tiny_config(num_frames=8)
    one = plan(config, "stage2", half=False, checkpointing=False)
    for size, expected in (
        (80, (8, False)),
        (1.05 * one.memory / 0.92e9, (8, False)),
        (0.8 * one.memory / 0.92e9, (8, True)),
    ):
        advice = advise(config, "stage2", size, half=False)
        assert (
            advice.frames,
            advice.checkpointing,
        ) == expected and advice.plan.memory < 0.92e9 * size
    small = advise(config, "stage2", 0.4 * one.memory / 0.92e9, half=False)
    assert small.plan is None or small.frames < 8
    assert advise(config, "stage2", 0, half=False).plan is None


def test_the_command_prints_what_fits(capsys):
    call("plan", "--preset tiny --stage stage1 --gpus 1 --frames 4 --float32".split())
    report = capsys.readouterr().out
    for words in (
        "24 GB      4            off",
        "per step",
        "dino",
        "VAE: 1,364,058 parameters",
        "8-bit Adam would save",
    ):
        assert words in report
    for wrong, sentence in (
        ("--preset huge", "There is no preset 'huge'"),
        ("--gpus 0", "--gpus: must be 1 or more, got 0"),
        ("--frames 0", "--frames: must be 1 or more, got 0"),
        ("--tflops 0", "--tflops: must be a number from 0.001"),
    ):
        with pytest.raises(SystemExit, match="2"):  # some are argparse's own, which ends by itself
            sys.exit(call("plan", wrong.split()))
        assert sentence in capsys.readouterr().err
