"""benchmarks/chain.py measures what it says.

And the shortcuts that it compares change no result.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_distillation import base_unet, train_lora_a_little, unet_inputs
from tiny_world import ball_views, randn, random_orbits, shake, tiny_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.decoder import build_decoder, deviation
from gsv3d_lib.diffusion import Condition, guided_v, predict_v
from gsv3d_lib.distillation import DistillationStage
from gsv3d_lib.encoders import build_clip, build_dino
from gsv3d_lib.lora import add_lora, lora_parameters, merged_lora, set_lora_scale, twin_of
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.training import draw_batch
from gsv3d_lib.unet import FrameConv

ROOT = Path(__file__).parents[1]
CONFIG = tiny_config(lambda_alpha=0.5, lambda_pixel=0.5, view_counts=(4,))


@pytest.fixture(scope="module")
def chain():
    spec = importlib.util.spec_from_file_location("chain", ROOT / "benchmarks" / "chain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chain"] = module  # its named tuples look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["chain"]


def lora_unet():
    return train_lora_a_little(add_lora(base_unet(), 3))


# ---------------------------------------------------------------- the clocks


def test_a_watch_adds_up_and_leaves_the_rest(chain):
    watch, layer = chain.Watch(), nn.Linear(64, 64)
    with watch.modules(layer=layer, absent=None), watch("all"):
        layer(torch.zeros(4, 64))
        layer(torch.zeros(4, 64))
        sum(range(200_000))
    whole, inside = watch.seconds["all"], watch.seconds["layer"]
    assert 0 < inside < whole and set(watch.seconds) == {"layer", "all"}
    watch.rest_of("all", ("layer",), "rest")
    assert watch.seconds == {"layer": inside, "rest": whole - inside}
    layer(torch.zeros(4, 64))
    assert watch.seconds["layer"] == inside  # the hooks are gone


def test_the_least_of_some_rounds_is_taken_without_the_first(chain):
    calls = []
    table = chain.least({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and all(0 <= value < 50 for value in table.values())
    assert chain.minimum([{"x": 2.0, "y": 1.0}, {"x": 1.0, "y": 3.0}]) == {"x": 1000.0, "y": 1000.0}


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_step_in_pieces_has_the_gradients_of_the_whole(chain, name):
    torch.manual_seed(0)
    decoder, dino, orbits = (
        shake(build_decoder(CONFIG)).eval(),
        build_dino(CONFIG).eval(),
        random_orbits(ball_views()),
    )
    if name == "stage1":
        stage, models = DecoderStage(decoder, dino, orbits, CONFIG), {"decoder"}
    else:
        stage = DistillationStage(
            lora_unet(), build_clip(CONFIG).eval(), decoder, dino, orbits, CONFIG
        )
        models = {"decoder", "unet", "clip"}
    trained = {key: p for key, p in stage.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in trained.items()}
    loss, _ = stage(draw_batch(stage, 0, 0, 2))
    loss.backward()
    nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
    whole = {key: p.grad.clone() for key, p in trained.items()}

    watch = chain.timed_step(stage, torch.optim.AdamW(list(trained.values()), lr=0.0), {}, 2, 0.0)
    assert set(watch.seconds) - {"draw", "dino", "loss", "loss backward", "optimiser"} == models | {
        f"{model} backward" for model in models - {"clip"}
    }
    assert all(seconds >= 0 for seconds in watch.seconds.values())
    for key, p in trained.items():
        assert torch.allclose(p.grad, whole[key], atol=1e-5), key
        assert torch.equal(p, before[key])  # every round measures the same weights
    assert not any(module._forward_hooks for module in stage.modules())


# ---------------------------------------------------------------- the products


def test_layouts_are_rebuilt_with_their_strides(chain):
    for tensor in (randn(3, 5).T, randn(4).expand(6, 4), randn(2, 3, 4)[:, 1:], randn(())):
        layout = chain.frozen(tensor)
        again = layout.tensor()
        assert (again.shape, again.stride(), again.dtype) == (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        assert chain.frozen(again) == layout


@torch.no_grad()
def test_the_replay_makes_the_same_products_and_nothing_else(chain):
    """Recorded again, the replay is the record.

    And it has all floating point operations that torch counts.
    """
    unet, inputs = lora_unet(), unet_inputs()
    with chain.Products() as record:
        unet(*inputs)
    replay = chain.replayed(record.calls)
    with chain.Products() as again:
        replay()
    assert again.calls == record.calls and 100 > len(set(record.calls)) > 10
    with FlopCounterMode(display=False) as counted:
        unet(*inputs)
    with FlopCounterMode(display=False) as replayed:
        replay()
    assert counted.get_total_flops() == replayed.get_total_flops() > 1e6


# ---------------------------------------------------------------- what is compared


@torch.no_grad()
def test_the_u_net_without_its_shortcuts_is_the_same_network(chain):
    unet, inputs = base_unet(), unet_inputs()
    fast, names = unet(*inputs), list(unet.state_dict())
    assert any(isinstance(m, FrameConv) for m in unet.modules())
    plain = chain.without_token_attention(chain.without_frame_conv(unet))
    assert not any(isinstance(m, FrameConv) for m in plain.modules())
    assert list(plain.state_dict()) == names and not any(p.is_meta for p in plain.parameters())
    with chain.Products() as record:
        slow = plain(*inputs)
    assert torch.allclose(fast, slow, atol=1e-5) and fast.abs().max() > 0.01
    kernels = {
        call.args[1].shape[2:] for call in record.calls if "convolution" in call.function.name()
    }
    assert (3, 1, 1) in kernels


def test_shortcuts_keep_every_gradient(chain):
    """With gradients, queries and keys stay in the graph.

    So the optimiser knows each LoRA matrix.
    """
    gradients = []
    for prepare in (
        lambda unet: unet,
        lambda unet: chain.without_token_attention(chain.without_frame_conv(unet)),
    ):
        unet = prepare(lora_unet())
        unet(*unet_inputs()).square().sum().backward()
        gradients.append({name: p.grad for name, p in lora_parameters(unet).items()})
    fast, slow = gradients
    assert all(torch.allclose(fast[name], slow[name], rtol=1e-4, atol=1e-5) for name in slow)


@torch.no_grad()
def test_guidance_in_one_batch_is_guidance_in_two(chain):
    unet, (sample, _, token, polar, azimuth) = base_unet(), unet_inputs()
    condition, weight = (
        Condition(token, sample[:, 0, 4:], polar, azimuth),
        torch.linspace(0, 2, 4)[:, None, None, None],
    )
    given, passes = (sample[:, :, :4], torch.tensor([2.0]), condition, weight), []
    unet.conv_in.register_forward_hook(lambda module, args, result: passes.append(len(result)))
    one, two = guided_v(unet, *given), guided_v(chain.TwoPasses(unet), *given)
    assert passes == [8, 4, 4]
    assert torch.allclose(one, two, atol=1e-5) and one.abs().max() > 1e-3
    # weight 0
    assert torch.allclose(
        one[:, 0], predict_v(unet, *given[:2], condition.dropped())[:, 0], atol=1e-5
    )


@torch.no_grad()
def test_a_u_net_in_two_passes_keeps_its_lora_apart(chain):
    """So a pipeline without shortcuts is a pipeline with another U-Net."""
    wrapped = chain.TwoPasses(lora_unet())
    assert merged_lora(wrapped) is wrapped and wrapped.device.type == "cpu"


def test_explicit_attention_is_attention(chain):
    q, k, v = (randn(2, 3, 5, 8, seed=s) for s in range(3))
    assert torch.allclose(
        chain.explicit_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5
    )


# ---------------------------------------------------------------- in the library


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_merged_lora_gives_the_same_and_leaves_the_u_net_alone(scale):
    unet, inputs = lora_unet(), unet_inputs()
    trained, state = unet(*inputs), {name: t.clone() for name, t in unet.state_dict().items()}
    merged, plain = merged_lora(unet, scale), merged_lora(unet)
    assert torch.equal(unet(*inputs), trained)
    assert torch.allclose(plain(*inputs), trained, atol=1e-5)
    changed = [name for name, t in merged.state_dict().items() if not torch.equal(t, state[name])]
    assert len(changed) == (0 if scale == 0 else len(lora_parameters(unet)) // 2)
    assert all(torch.equal(t, state[name]) for name, t in unet.state_dict().items())
    set_lora_scale(unet, scale)
    assert torch.allclose(merged(*inputs), unet(*inputs), atol=1e-5)
    # the scale that is set is the default
    assert torch.equal(merged_lora(unet)(*inputs), merged(*inputs))


@torch.no_grad()
def test_a_merged_lora_shares_the_memory_of_all_other_weights():
    unet = lora_unet()
    there, merged = dict(unet.named_parameters()), dict(merged_lora(unet).named_parameters())
    assert list(there) == list(merged)
    own = [name for name in merged if merged[name].data_ptr() != there[name].data_ptr()]
    assert len(own) == len(lora_parameters(unet)) // 2 and all(
        name.endswith("base_layer.weight") for name in own
    )


def test_what_is_set_in_a_twin_stays_there():
    unet = lora_unet()
    twin = twin_of(unet.eval())
    set_lora_scale(twin, 0.0)
    twin.train()
    twin.conv_in.weight = nn.Parameter(torch.zeros_like(twin.conv_in.weight))
    twin.down_blocks.append(nn.Identity())
    twin.register_forward_hook(lambda *_: 1 / 0)
    again = lora_unet()
    with torch.no_grad():
        assert torch.equal(unet(*unet_inputs()), again(*unet_inputs()))
    assert not any(module.training for module in unet.modules())
    assert len(unet.down_blocks) == len(again.down_blocks)


@torch.no_grad()
def test_adapters_that_are_switched_off_or_merged_for_good_stay_so():
    unet, inputs, base = lora_unet(), unet_inputs(), base_unet()
    unet.disable_lora()
    assert torch.allclose(merged_lora(unet)(*inputs), base(*inputs), atol=1e-6)
    assert not any(
        layer.merged for layer in merged_lora(unet).modules() if hasattr(layer, "merged")
    )
    unet.enable_lora()
    unet.fuse_lora()
    assert torch.equal(merged_lora(unet)(*inputs), unet(*inputs))
    with pytest.raises(
        ValueError, match="part of the U-Net's weights and has no scale.*unfuse_lora"
    ):
        merged_lora(unet, 0.5)


def test_merging_without_a_lora_does_nothing():
    layer = nn.Linear(2, 2)
    assert merged_lora(layer) is layer


def test_the_deviation_is_torch_s_with_its_gradient():
    values = randn(5, 7, 3) * torch.logspace(-3, 1, 3)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    deviation(ours).sum().backward()
    theirs.std(0, correction=0).sum().backward()
    assert torch.allclose(deviation(values), values.std(0, correction=0), atol=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5) and ours.grad.abs().max() > 0.1


@pytest.mark.parametrize("value", [0.0, 0.3, -3.7])
def test_the_deviation_of_equal_values_has_no_slope(value):
    values = torch.full((16, 5), value, requires_grad=True)
    spread = deviation(values)
    spread.sum().backward()
    assert spread.max() <= 1e-6 and torch.equal(values.grad, torch.zeros_like(values))


def test_autocast_leaves_the_decoder_s_geometry_alone():
    """In bfloat16 only the transformer may lose digits.

    Rays stay exact, maps and gradients stay float32.
    """
    torch.manual_seed(0)
    decoder = shake(build_decoder(CONFIG.replace(dino="none"))).eval()
    latents, cameras = (
        randn(1, 4, 4, 4, 4).requires_grad_(),
        orbit_cameras(torch.arange(4) * 90.0, torch.zeros(4), 32),
    )
    exact = decoder.output_maps(latents, [cameras])
    with torch.autocast("cpu", torch.bfloat16):
        rough = decoder.output_maps(latents, [cameras])
    assert all(t.dtype == torch.float32 for t in rough)
    assert torch.equal(rough[1], exact[1]) and torch.equal(rough[2], exact[2])
    difference = (rough[0] - exact[0]).abs().max()
    assert 1e-5 < difference < 0.1
    rough[0].sum().backward()
    assert torch.isfinite(latents.grad).all() and latents.grad.abs().max() > 0


# ---------------------------------------------------------------- the committed numbers


def test_the_report_is_the_committed_measurement(chain):
    """The committed file has all sections, and its ratios are quotients."""
    report = json.loads((ROOT / "data/results/performance.json").read_text())
    assert set(chain.tables(report)) == {"steps", "generation", "products", "comparisons"}
    generation, cpu_ms = report["generation"], report["generation"]["cpu_ms"]
    assert generation["ratio to products"] == pytest.approx(
        cpu_ms["generation"] / cpu_ms["its products"]
    )
    assert (
        generation["ratio to products"] < chain.CEILING and generation["largest difference"] < 1e-3
    )
    for row in report["comparisons"]:
        assert row["ratio"] == pytest.approx(row["without"] / row["with"])


def test_wrong_options_are_refused(chain, capsys):
    with pytest.raises(SystemExit):
        chain.main(["--rounds", "0"])
    assert "--rounds is at least 1; got 0." in capsys.readouterr().err
