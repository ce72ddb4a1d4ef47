"""SV3D's weights: both layouts written at a tiny size and read back, all names and
shapes at full size, damaged files, what is (not) downloaded, and one sampling run
beside diffusers' own Stable Video Diffusion pipeline.

Stability's layout is stated here a second time, as the constructors of
`generative-models` make it, and by a list of names: nothing in this file asks the
converter what the original looks like.
"""

import json
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from command_world import call
from diffusers import AutoencoderKL, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from safetensors.torch import load_file, save_file
from tiny_world import ball_views, randn, shake, tiny_config
from torch import nn
from transformers import CLIPImageProcessor

from gsv3d_lib import diffusion
from gsv3d_lib.cameras import sv3d_azimuths
from gsv3d_lib.config import VALUES, preset
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.diffusion import build_scheduler, sample
from gsv3d_lib.encoders import (
    RESIZES,
    antialiased,
    blurred,
    build_clip,
    build_dino,
    clip_token,
    condition_from,
)
from gsv3d_lib.lora import add_lora, save_lora
from gsv3d_lib.pipeline import GSV3DPipeline
from gsv3d_lib.unet import SV3DUNet, build_unet
from gsv3d_lib.vae import build_vae, decode_scaled, encode
from gsv3d_lib.weights import sv3d
from gsv3d_lib.weights.checkpoint import load_model, save_config, save_model
from gsv3d_lib.weights.sv3d import FOLDERS, SINGLE, SVD, convert, downloads, fetch, load_backbone

# three levels, the last without attention, and shortcuts in the VAE: every kind of name
# that SV3D has
CONFIG = tiny_config(
    unet_channels=(32, 32, 64),
    unet_attention=(True, True, False),
    unet_heads=(1, 1, 2),
    vae_channels=(32, 64, 64, 64),
    vae_layers=2,  # with one, diffusers' decoder has a smaller middle than Stability's
    vae_norm_groups=32,
    clip_layers=2,
    clip_resize="blur",
    resnet_eps=1e-5,
    sampling_steps=2,
)
UNET, FIRST, SECOND = (
    "model.diffusion_model.",
    "first_stage_model.",
    "conditioner.embedders.1.encoder.",
)
CLIP = "conditioner.embedders.0.open_clip.model.visual."
PARTS = ("unet", "vae", "clip")

# ---------------------------------------------------- Stability's layout, name -> shape


def affine(name: str, *shape: int) -> dict:
    """Weight of the given shape and bias of a layer."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def res_block(name: str, before: int, after: int, emb: int, kernel: tuple) -> dict:
    """`ResBlock`; emb = 0 leaves out the time embedding, as in the autoencoder."""
    shapes = affine(f"{name}.in_layers.0", before) | affine(
        f"{name}.in_layers.2", after, before, *kernel
    )
    shapes |= affine(f"{name}.emb_layers.1", after, emb) if emb else {}
    shapes |= affine(f"{name}.out_layers.0", after) | affine(
        f"{name}.out_layers.3", after, after, *kernel
    )
    return shapes | (
        affine(f"{name}.skip_connection", after, before, 1, 1) if before != after else {}
    )


def video_block(name: str, before: int, after: int, emb: int) -> dict:
    shapes = res_block(name, before, after, emb, (3, 3)) | res_block(
        f"{name}.time_stack", after, after, emb, (3, 1, 1)
    )
    return shapes | {f"{name}.time_mixer.mix_factor": (1,)}


def attention(name: str, width: int, context: int) -> dict:
    shapes = {f"{name}.to_q.weight": (width, width)}
    shapes |= {f"{name}.to_{letter}.weight": (width, context) for letter in "kv"}
    return shapes | affine(f"{name}.to_out.0", width, width)


def feed_forward(name: str, width: int) -> dict:
    return affine(f"{name}.net.0.proj", 8 * width, width) | affine(
        f"{name}.net.2", width, 4 * width
    )


def transformer(name: str, width: int, context: int) -> dict:
    """`SpatialVideoTransformer` of depth 1 with linear projections."""
    shapes = affine(f"{name}.norm", width) | affine(f"{name}.proj_in", width, width)
    for block in (f"{name}.transformer_blocks.0", f"{name}.time_stack.0"):
        shapes |= attention(f"{block}.attn1", width, width) | attention(
            f"{block}.attn2", width, context
        )
        shapes |= feed_forward(f"{block}.ff", width)
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= affine(f"{block}.{norm}", width)
    shapes |= affine(f"{name}.time_stack.0.norm_in", width) | feed_forward(
        f"{name}.time_stack.0.ff_in", width
    )
    shapes |= affine(f"{name}.time_pos_embed.0", 4 * width, width)
    shapes |= affine(f"{name}.time_pos_embed.2", width, 4 * width)
    return (
        shapes | {f"{name}.time_mixer.mix_factor": (1,)} | affine(f"{name}.proj_out", width, width)
    )


def video_unet(config, added: int = 1280) -> dict:
    """`VideoUNet`: blocks counted through all levels, down with a stack of widths, up
    by taking from it.
    """
    channels, context = config.unet_channels, config.clip_dim
    width, emb = channels[0], 4 * channels[0]
    shapes = affine("time_embed.0", emb, width) | affine("time_embed.2", emb, emb)
    shapes |= affine("label_emb.0.0", emb, added) | affine("label_emb.0.2", emb, emb)
    shapes |= affine("input_blocks.0.0", width, 8, 3, 3)
    stack, count, now = [width], 1, width
    for level, target in enumerate(channels):
        for _ in range(config.unet_layers):
            shapes |= video_block(f"input_blocks.{count}.0", now, target, emb)
            if config.unet_attention[level]:
                shapes |= transformer(f"input_blocks.{count}.1", target, context)
            now, count = target, count + 1
            stack.append(now)
        if level < len(channels) - 1:
            shapes |= affine(f"input_blocks.{count}.0.op", now, now, 3, 3)
            stack.append(now)
            count += 1
    shapes |= video_block("middle_block.0", now, now, emb) | transformer(
        "middle_block.1", now, context
    )
    shapes |= video_block("middle_block.2", now, now, emb)
    count = 0
    for level, target in reversed(list(enumerate(channels))):
        for layer in range(config.unet_layers + 1):
            shapes |= video_block(f"output_blocks.{count}.0", now + stack.pop(), target, emb)
            now = target
            if config.unet_attention[level]:
                shapes |= transformer(f"output_blocks.{count}.1", now, context)
            if level and layer == config.unet_layers:
                slot = 2 if config.unet_attention[level] else 1
                shapes |= affine(f"output_blocks.{count}.{slot}.conv", now, now, 3, 3)
            count += 1
    return shapes | affine("out.0", now) | affine("out.2", 4, width, 3, 3)


def vae_block(name: str, before: int, after: int, video: bool) -> dict:
    shapes = affine(f"{name}.norm1", before) | affine(f"{name}.conv1", after, before, 3, 3)
    shapes |= affine(f"{name}.norm2", after) | affine(f"{name}.conv2", after, after, 3, 3)
    shapes |= affine(f"{name}.nin_shortcut", after, before, 1, 1) if before != after else {}
    extra = res_block(f"{name}.time_stack", after, after, 0, (3, 1, 1)) | {
        f"{name}.mix_factor": (1,)
    }
    return shapes | (extra if video else {})


def vae_middle(name: str, width: int, video: bool) -> dict:
    shapes = vae_block(f"{name}.block_1", width, width, video) | vae_block(
        f"{name}.block_2", width, width, video
    )
    for letter in ("q", "k", "v", "proj_out"):
        shapes |= affine(f"{name}.attn_1.{letter}", width, width, 1, 1)
    return shapes | affine(f"{name}.attn_1.norm", width)


def vae_encoder(config) -> dict:
    channels, now = config.vae_channels, config.vae_channels[0]
    shapes = affine("encoder.conv_in", now, 3, 3, 3)
    for level, target in enumerate(channels):
        for layer in range(config.vae_layers):
            shapes |= vae_block(f"encoder.down.{level}.block.{layer}", now, target, False)
            now = target
        if level < len(channels) - 1:
            shapes |= affine(f"encoder.down.{level}.downsample.conv", now, now, 3, 3)
    shapes |= vae_middle("encoder.mid", now, False)
    return shapes | affine("encoder.norm_out", now) | affine("encoder.conv_out", 8, now, 3, 3)


def vae_decoder(config, video: bool) -> dict:
    """`Decoder`, or with `video` `VideoDecoder`; up.0 is the level of the image."""
    channels, now = config.vae_channels, config.vae_channels[-1]
    shapes = affine("decoder.conv_in", now, 4, 3, 3) | vae_middle("decoder.mid", now, video)
    for level, target in reversed(list(enumerate(channels))):
        for layer in range(config.vae_layers + 1):
            shapes |= vae_block(f"decoder.up.{level}.block.{layer}", now, target, video)
            now = target
        if level:
            shapes |= affine(f"decoder.up.{level}.upsample.conv", now, now, 3, 3)
    shapes |= affine("decoder.norm_out", now) | affine("decoder.conv_out", 3, now, 3, 3)
    return shapes | (affine("decoder.conv_out.time_mix_conv", 3, 3, 3, 1, 1) if video else {})


def whole_vae(config) -> dict:
    """`AutoencoderKLModeOnly`, which encodes the condition image."""
    quant = affine("quant_conv", 8, 8, 1, 1) | affine("post_quant_conv", 4, 4, 1, 1)
    return vae_encoder(config) | vae_decoder(config, False) | quant


def vision_tower(config) -> dict:
    width, tokens = config.clip_width, (config.clip_size // config.clip_patch) ** 2 + 1
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "proj": (width, config.clip_dim),
    }
    shapes |= {"conv1.weight": (width, 3, config.clip_patch, config.clip_patch)}
    shapes |= affine("ln_pre", width) | affine("ln_post", width)
    for layer in range(config.clip_layers):
        name = f"transformer.resblocks.{layer}"
        shapes |= affine(f"{name}.ln_1", width) | affine(f"{name}.ln_2", width)
        shapes |= {
            f"{name}.attn.in_proj_weight": (3 * width, width),
            f"{name}.attn.in_proj_bias": (3 * width,),
        }
        shapes |= affine(f"{name}.attn.out_proj", width, width)
        shapes |= affine(f"{name}.mlp.c_fc", config.clip_mlp, width) | affine(
            f"{name}.mlp.c_proj", width, config.clip_mlp
        )
    return shapes


def under(prefix: str, shapes: dict) -> dict:
    return {prefix + name: shape for name, shape in shapes.items()}


def original(config, video: bool) -> dict:
    """All of a single file: its decoder is over time, or for single images."""
    shapes = under(UNET, video_unet(config)) | under(FIRST, vae_decoder(config, video))
    return shapes | under(SECOND, whole_vae(config)) | under(CLIP, vision_tower(config))


def numel(shapes: dict) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


# ---------------------------------------------------------------- full size


# written down from the names in svd_xt.safetensors and in diffusers' SVD, as public
# converters list them
NAMES = {
    "unet": {
        "time_embed.0.weight": "time_embedding.linear_1.weight",
        "label_emb.0.0.weight": "add_embedding.linear_1.weight",
        "label_emb.0.2.bias": "add_embedding.linear_2.bias",
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.1.0.in_layers.0.weight": (
            "down_blocks.0.resnets.0.spatial_res_block.norm1.weight"
        ),
        "input_blocks.1.0.in_layers.2.weight": (
            "down_blocks.0.resnets.0.spatial_res_block.conv1.weight"
        ),
        "input_blocks.1.0.time_stack.emb_layers.1.bias": (
            "down_blocks.0.resnets.0.temporal_res_block.time_emb_proj.bias"
        ),
        "input_blocks.2.0.out_layers.0.bias": (
            "down_blocks.0.resnets.1.spatial_res_block.norm2.bias"
        ),
        "input_blocks.2.0.time_stack.out_layers.3.weight": (
            "down_blocks.0.resnets.1.temporal_res_block.conv2.weight"
        ),
        "input_blocks.2.0.time_mixer.mix_factor": "down_blocks.0.resnets.1.time_mixer.mix_factor",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.weight": (
            "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight"
        ),
        "input_blocks.5.1.proj_in.weight": "down_blocks.1.attentions.1.proj_in.weight",
        "input_blocks.7.1.time_mixer.mix_factor": (
            "down_blocks.2.attentions.0.time_mixer.mix_factor"
        ),
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "input_blocks.8.1.time_stack.0.ff_in.net.0.proj.weight": (
            "down_blocks.2.attentions.1.temporal_transformer_blocks.0.ff_in.net.0.proj.weight"
        ),
        "input_blocks.11.0.emb_layers.1.weight": (
            "down_blocks.3.resnets.1.spatial_res_block.time_emb_proj.weight"
        ),
        "middle_block.0.in_layers.2.bias": "mid_block.resnets.0.spatial_res_block.conv1.bias",
        "middle_block.1.time_pos_embed.2.weight": (
            "mid_block.attentions.0.time_pos_embed.linear_2.weight"
        ),
        "middle_block.1.time_stack.0.norm_in.weight": (
            "mid_block.attentions.0.temporal_transformer_blocks.0.norm_in.weight"
        ),
        "middle_block.2.time_stack.in_layers.0.weight": (
            "mid_block.resnets.1.temporal_res_block.norm1.weight"
        ),
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.3.0.in_layers.0.weight": (
            "up_blocks.1.resnets.0.spatial_res_block.norm1.weight"
        ),
        "output_blocks.5.1.norm.weight": "up_blocks.1.attentions.2.norm.weight",
        "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
        "output_blocks.11.1.time_stack.0.attn1.to_out.0.bias": (
            "up_blocks.3.attentions.2.temporal_transformer_blocks.0.attn1.to_out.0.bias"
        ),
        "output_blocks.11.1.transformer_blocks.0.ff.net.2.weight": (
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2.weight"
        ),
        "out.0.weight": "conv_norm_out.weight",
        "out.2.bias": "conv_out.bias",
    },
    "vae": {
        f"{SECOND}encoder.down.1.block.0.nin_shortcut.weight": (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"
        ),
        f"{SECOND}encoder.down.2.downsample.conv.bias": (
            "encoder.down_blocks.2.downsamplers.0.conv.bias"
        ),
        f"{SECOND}encoder.mid.block_2.norm1.weight": "encoder.mid_block.resnets.1.norm1.weight",
        f"{SECOND}encoder.mid.attn_1.proj_out.weight": (
            "encoder.mid_block.attentions.0.to_out.0.weight"
        ),
        f"{SECOND}encoder.norm_out.bias": "encoder.conv_norm_out.bias",
        f"{SECOND}quant_conv.weight": "quant_conv.weight",
        f"{FIRST}decoder.conv_in.weight": "decoder.conv_in.weight",
        f"{FIRST}decoder.mid.block_1.time_stack.in_layers.2.weight": (
            "decoder.mid_block.resnets.0.temporal_res_block.conv1.weight"
        ),
        f"{FIRST}decoder.mid.attn_1.norm.weight": (
            "decoder.mid_block.attentions.0.group_norm.weight"
        ),
        f"{FIRST}decoder.up.3.block.0.conv1.weight": (
            "decoder.up_blocks.0.resnets.0.spatial_res_block.conv1.weight"
        ),
        f"{FIRST}decoder.up.0.block.2.mix_factor": (
            "decoder.up_blocks.3.resnets.2.time_mixer.mix_factor"
        ),
        f"{FIRST}decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
        f"{FIRST}decoder.conv_out.weight": "decoder.conv_out.weight",
        f"{FIRST}decoder.conv_out.time_mix_conv.weight": "decoder.time_conv_out.weight",
    },
    "clip": {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "transformer.resblocks.31.ln_2.weight": "vision_model.encoder.layers.31.layer_norm2.weight",
        "transformer.resblocks.7.mlp.c_proj.weight": "vision_model.encoder.layers.7.mlp.fc2.weight",
        "transformer.resblocks.0.attn.in_proj_bias": (
            "vision_model.encoder.layers.0.self_attn.k_proj.bias"
        ),
        "transformer.resblocks.0.attn.out_proj.weight": (
            "vision_model.encoder.layers.0.self_attn.out_proj.weight"
        ),
        "ln_post.weight": "vision_model.post_layernorm.weight",
        "proj": "visual_projection.weight",
    },
}


@pytest.mark.parametrize("part", PARTS)
def test_at_full_size_names_and_shapes_are_stabilitys(part):
    config = preset("paper")
    stored = original(config, video=True)
    pieces = sv3d.ORIGINAL[part](list(stored), config)
    prefix = {"unet": UNET, "vae": "", "clip": CLIP}[part]
    assert len(NAMES[part]) >= 10
    for theirs, ours in NAMES[part].items():
        assert pieces[ours][0] == prefix + theirs
    wanted = {name: t.shape for name, t in sv3d.empty(part, config).state_dict().items()}
    found = {n: how(torch.empty(stored[s], device="meta")).shape for n, (s, how) in pieces.items()}
    assert found == wanted


def test_the_u_net_has_sv3d_ps_parameters_and_the_file_its_size():
    """9.37 GB are published for sv3d_p.safetensors, which the decoder for single images
    explains and SVD's does not; the same sum, with SVD's decoder and the encoder beside
    it, gives the 9.56 GB of svd_xt.safetensors.
    """
    config = preset("paper")
    assert numel(video_unet(config)) == 1_525_278_442
    # what is left of OpenCLIP's text tower
    text = 49408 * 1024 + 77 * 1024 + 1024 * 1024 + 2 * 1024 + 1
    plain, video = (4e-9 * (numel(original(config, video)) + text) for video in (False, True))
    svd = video + 4e-9 * (
        numel(vae_encoder(config)) + numel(video_unet(config, 768)) - numel(video_unet(config))
    )
    assert (round(plain, 2), round(video, 2), round(svd, 2)) == (9.37, 9.43, 9.56)


# ---------------------------------------------------------- both layouts at a tiny size


@pytest.fixture(scope="module")
def models() -> dict:
    torch.manual_seed(0)
    built = {
        "unet": build_unet(CONFIG),
        "vae": build_vae(CONFIG),
        "clip": build_clip(CONFIG),
        "dino": build_dino(CONFIG),
    }
    return {name: shake(model).eval() for name, model in built.items()}


def write_original(
    path: Path, models: dict, video: bool = True, drop: tuple = (), **changes
) -> Path:
    """Our models under Stability's names; what only their file has is random."""
    shapes = original(CONFIG, video)
    tensors = {name: randn(*shape) for name, shape in shapes.items()}
    for part in PARTS:
        state, pieces = models[part].state_dict(), sv3d.ORIGINAL[part](list(shapes), CONFIG)
        stored = {}
        for ours, (theirs, _) in pieces.items():
            stored.setdefault(theirs, []).append(state.get(ours, torch.zeros(0)))
        for theirs, values in stored.items():
            if theirs.endswith("visual.proj"):
                values = [values[0].t()]
            # q, k, v; linear to 1x1
            tensors[theirs] = torch.cat(values).reshape(shapes[theirs]).contiguous()
    tensors = {n: t for n, t in tensors.items() if not n.startswith(drop)} | changes
    save_file(tensors, path)
    return path


def write_folder(folder: Path, models: dict) -> Path:
    models["unet"].save_pretrained(folder / "unet")
    models["vae"].save_pretrained(folder / "vae")
    models["clip"].save_pretrained(folder / "image_encoder")
    build_scheduler(CONFIG).save_pretrained(folder / "scheduler")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    return folder


@pytest.fixture(scope="module")
def single(models, tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("single") / SINGLE, models)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), models)


@pytest.fixture(scope="module")
def dino(models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dino")
    models["dino"].save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty cache, and no way out of this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def run_models(models: dict) -> list[torch.Tensor]:
    """What each network says to fixed inputs."""
    images = ball_views(1).rgb[0, :2].float() / 255
    latents = randn(2, 3, 8, 4, 4)
    angles = torch.linspace(0.1, 3, 6).reshape(2, 3)
    token = models["clip"](
        pixel_values=randn(2, 3, CONFIG.clip_size, CONFIG.clip_size)
    ).image_embeds[:, None]
    encoded = encode(models["vae"], images)
    return [
        models["unet"](latents, torch.tensor([0.3, -0.2]), token, angles, 2 * angles),
        encoded,
        decode_scaled(models["vae"], 0.18215 * encoded, chunk=2),
        token,
        models["dino"](
            pixel_values=randn(1, 3, CONFIG.dino_size, CONFIG.dino_size)
        ).last_hidden_state,
    ]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["single", "folder"])
def test_loaded_networks_say_what_the_written_ones_said(layout, request, models, dino):
    source = request.getfixturevalue(layout)
    config, loaded = load_backbone(source, CONFIG, dino=dino)
    for ours, theirs in zip(run_models(loaded), run_models(models), strict=True):
        assert ours.std() > 1e-3 and torch.equal(ours, theirs)
    assert (config.sigma_min, config.sigma_max) == (0.002, 700.0)
    assert all(
        p.dtype == torch.float32 and p.device.type == "cpu"
        for m in loaded.values()
        for p in m.parameters()
    )


@torch.no_grad()
def test_half_precision_shards_and_a_folder_around_the_single_file_are_read(
    folder, single, models, dino, tmp_path
):
    halved = {n: t.half() for n, t in load_file(folder / FOLDERS["unet"]).items()}
    names = sorted(halved)
    for kind, files in {
        "fp16": {"diffusion_pytorch_model.fp16.safetensors": names},
        "shards": {
            f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2]
            for i in range(2)
        },
    }.items():
        (tmp_path / kind / "unet").mkdir(parents=True)
        for file, part in files.items():
            save_file({n: halved[n] for n in part}, tmp_path / kind / "unet" / file)
        _, loaded = load_backbone(tmp_path / kind, CONFIG, svd=folder, dino=dino)
        state = models["unet"].state_dict()
        assert all(
            torch.equal(t, state[n].half().float()) for n, t in loaded["unet"].state_dict().items()
        )
    _, loaded = load_backbone(single.parent, CONFIG, dino=dino)
    assert torch.equal(loaded["unet"].conv_in.weight, models["unet"].conv_in.weight)


@torch.no_grad()
def test_vae_and_clip_come_from_svd_where_a_source_lacks_them(folder, models, dino, tmp_path):
    bare = write_original(tmp_path / "unet_only.safetensors", models, drop=(FIRST, "conditioner."))
    _, loaded = load_backbone(bare, CONFIG, svd=folder, dino=dino)
    for ours, theirs in zip(run_models(loaded), run_models(models), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_decoder_without_time_becomes_one_that_leaves_frames_alone(models, dino, tmp_path):
    """Stability's file has `Decoder`, chenguolin/sv3d-diffusers has `AutoencoderKL`: no
    layers over time in either.
    """
    torch.manual_seed(3)
    levels = len(CONFIG.vae_channels)
    plain = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=CONFIG.vae_channels,
        layers_per_block=CONFIG.vae_layers,
    ).eval()
    shake(plain)
    plain.post_quant_conv.bias.copy_(torch.tensor([3.0, -2.0, 5.0, 1.0]))
    write_folder(tmp_path, models)
    for file in (tmp_path / "vae").iterdir():
        file.unlink()
    plain.save_pretrained(tmp_path / "vae")
    config, loaded = load_backbone(tmp_path, CONFIG, dino=dino)
    images = ball_views(1).rgb[0, :3].float() / 255
    latents = encode(loaded["vae"], images)
    assert torch.equal(latents, encode(plain, images))
    exact, without = plain.decode(latents).sample, plain.decoder(latents)
    assert (without - exact).abs().max() > 0.1  # the convolution before the decoder matters
    seen = loaded["vae"].decode(latents, num_frames=3).sample
    assert torch.allclose(seen, exact, atol=1e-5)  # at the borders too
    assert torch.allclose(
        seen[1:2], loaded["vae"].decode(latents[1:2], num_frames=1).sample, atol=1e-5
    )

    save_model(loaded["vae"], tmp_path / "weights", "vae", config)
    again = load_model(tmp_path / "weights", "vae")
    assert torch.equal(again.decode(latents, num_frames=3).sample, seen)


@torch.no_grad()
def test_a_single_file_with_a_plain_decoder_uses_the_first_stage(models, dino, tmp_path):
    path = write_original(tmp_path / SINGLE, models, video=False)
    _, loaded = load_backbone(path, CONFIG, dino=dino)
    ours, theirs = loaded["vae"].decoder.state_dict(), models["vae"].decoder.state_dict()
    assert all(
        torch.equal(ours[n], theirs[n]) for n in ours if "temporal" not in n and "time_" not in n
    )
    latents = randn(3, 4, 4, 4)
    seen = loaded["vae"].decode(latents, num_frames=3).sample
    alone = [loaded["vae"].decode(latent[None], num_frames=1).sample for latent in latents]
    assert torch.allclose(seen, torch.cat(alone), atol=1e-5)


@torch.no_grad()
def test_a_second_convolution_that_is_not_whole_is_refused(models, dino, tmp_path):
    write_folder(tmp_path, models)
    extra = {"post_quant_conv.weight": randn(4, 4, 1, 1)}
    save_file(load_file(tmp_path / FOLDERS["vae"]) | extra, tmp_path / FOLDERS["vae"])
    refuse(tmp_path, "post_quant_conv.bias is missing", dino=dino)


# ------------------------------------------ where Stability's code and diffusers differ


def eps_of(model, kind: str) -> set[float]:
    """The eps of the normalisations in modules whose name contains `kind`."""
    norms = (nn.GroupNorm, nn.LayerNorm)
    return {m.eps for name, m in model.named_modules() if isinstance(m, norms) and kind in name}


def test_normalisations_have_the_eps_of_stabilitys_code(models, tmp_path):
    """`normalization` there is 1e-5, in residual blocks of the U-Net and before its
    last layer; `Normalize` is 1e-6, before transformers and in the VAE; the VAE's
    blocks over time have the former.
    """
    unet, vae = (sv3d.empty(part, preset("paper")) for part in ("unet", "vae"))
    assert eps_of(unet, ".resnets.") == {1e-5} and unet.conv_norm_out.eps == 1e-5
    assert {m.norm.eps for m in unet.modules() if hasattr(m, "temporal_transformer_blocks")} == {
        1e-6
    }
    assert eps_of(unet, "transformer_blocks") == {1e-5}
    assert eps_of(vae, "temporal_res_block") == {1e-5}
    assert eps_of(vae, "spatial_res_block") | eps_of(vae, "encoder") | eps_of(vae, "norm_out") == {
        1e-6
    }

    models["unet"].save_pretrained(tmp_path)  # and a saved model keeps it
    again = SV3DUNet.from_pretrained(tmp_path, local_files_only=True)
    assert eps_of(again, ".resnets.") == {1e-5}
    assert eps_of(build_unet(CONFIG.replace(resnet_eps=0.0)), ".resnets.") == {1e-5, 1e-6}


@pytest.mark.parametrize("side", [225, 256, 576, 1000])
def test_clips_pictures_are_made_smaller_as_stabilitys_code_does(side):
    """diffusers' own pipeline has the same function, written after kornia's."""
    pictures = randn(2, 3, side, side, seed=side).sigmoid()
    expected = _resize_with_antialiasing(pictures, (224, 224))
    assert torch.allclose(blurred(pictures, 224), expected, atol=1e-5)
    assert (antialiased(pictures, 224) - expected).abs().max() > 0.05


def test_a_picture_that_grows_is_not_blurred():
    """Aligned corners: the outermost pixels stay where they are, and a constant stays
    constant.
    """
    picture = randn(1, 3, 9, 9)
    larger = blurred(picture, 17)
    assert torch.allclose(larger[..., ::2, ::2], picture, atol=1e-5)
    assert torch.allclose(
        blurred(torch.full((1, 3, 40, 40), 0.3), 16), torch.tensor(0.3), atol=1e-6
    )


def test_the_configuration_chooses_how_clip_sees(models):
    assert preset("paper").clip_resize == "blur" and all(
        name in VALUES["clip_resize"] for name in RESIZES
    )
    assert {preset(name).clip_resize for name in ("tiny", "small")} == {"antialias"}
    images, angles = randn(1, 64, 64, 3).sigmoid(), torch.zeros(1, 2)
    seen = [
        condition_from(images, angles, angles, models["vae"], models["clip"], config).token
        for config in (CONFIG, CONFIG.replace(clip_resize="antialias"))
    ]
    assert torch.equal(seen[0], clip_token(models["clip"], images, "blur"))
    assert torch.equal(seen[1], clip_token(models["clip"], images)) and not torch.equal(*seen)
    with pytest.raises(ValueError, match="clip_resize takes"):
        CONFIG.replace(clip_resize="crop")


# ----------------------------------------------- the pipeline and the checkpoint folder


def test_without_a_checkpoint_the_decoder_is_fresh_and_says_so(single, dino):
    with pytest.warns(UserWarning, match="freshly initialised.*stage 1") as record:
        pipe = GSV3DPipeline.from_sv3d(single, config=CONFIG, dino=dino, device="cpu")
    assert Path(record[0].filename) == Path(__file__)  # the warning points at the caller
    result = pipe.generate(torch.rand(32, 32, 3), progress=False)
    assert result.latents.shape == (4, 4, 4, 4) and torch.isfinite(result.gaussians.means).all()
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_with_a_checkpoint_decoder_and_lora_are_its_own(single, dino, models, tmp_path):
    torch.manual_seed(4)
    decoder = shake(build_decoder(CONFIG))
    decoder.save_pretrained(tmp_path / "decoder")
    save_config(CONFIG, tmp_path)
    twin = build_unet(CONFIG)
    twin.load_state_dict(models["unet"].state_dict())
    save_lora(shake(add_lora(twin, CONFIG.lora_rank)), tmp_path / "lora")
    image = torch.rand(32, 32, 3)
    pipe = GSV3DPipeline.from_sv3d(single, checkpoint=tmp_path, dino=dino, device="cpu")
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.decoder.parameters(), decoder.parameters(), strict=True)
    )
    with_lora = pipe.generate(image, progress=False)
    without = pipe.generate(image, progress=False, lora_scale=0.0)
    plain = GSV3DPipeline.from_sv3d(
        single, checkpoint=tmp_path, dino=dino, lora=False, device="cpu"
    )
    assert torch.allclose(plain.generate(image, progress=False).latents, without.latents, atol=1e-4)
    assert (with_lora.latents - without.latents).abs().max() > 1e-2


def test_converted_weights_open_as_a_checkpoint_for_training(single, dino, models, tmp_path):
    convert(single, tmp_path, CONFIG, dino=dino)
    for name, model in models.items():
        ours = load_model(tmp_path / "weights", name).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "weights" / "gsv3d.json").read_text())["sigma_max"] == 700.0


# ------------------------------------------------------- beside diffusers' own pipeline


class TimeIds(nn.Module):
    """SVD's U-Net behind our call: fps, motion bucket and noise of the clip where SV3D
    has angles of its frames.
    """

    def __init__(self, unet, ids):
        super().__init__()
        self.unet, self.ids = unet, ids

    def forward(self, sample, timestep, token, polar, azimuth, cond_aug):
        return self.unet(
            sample, timestep, token, added_time_ids=self.ids.expand(len(sample), -1)
        ).sample


@torch.no_grad()
def test_sampling_equals_diffusers_stable_video_diffusion(models, monkeypatch):
    """The whole of `StableVideoDiffusionPipeline` against our condition,
    preconditioning, guidance and Euler steps.
    """
    frames, seed, fps, bucket, noise = 4, 11, 7, 127, 0.02
    torch.manual_seed(5)
    unet = shake(
        UNetSpatioTemporalConditionModel(
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            num_attention_heads=(1, 2),
            cross_attention_dim=CONFIG.clip_dim,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
        )
    ).eval()
    scheduler = build_scheduler(CONFIG)
    image = ball_views(1).rgb[0, :1].float() / 255  # [1, 32, 32, 3]
    start = torch.randn(1, frames, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    theirs = StableVideoDiffusionPipeline(
        models["vae"], models["clip"], unet, scheduler, CLIPImageProcessor()
    )
    theirs.set_progress_bar_config(disable=True)
    expected, ours = [start * CONFIG.sigma_max], []
    theirs(
        image.permute(0, 3, 1, 2),
        height=32,
        width=32,
        num_frames=frames,
        num_inference_steps=4,
        max_guidance_scale=3.0,
        fps=fps,
        motion_bucket_id=bucket,
        noise_aug_strength=noise,
        latents=start,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, values: expected.append(values["latents"]) or {},
    )

    drawn = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[float(fps - 1), float(bucket), noise]])
    config = CONFIG.replace(cond_aug=noise)
    angles = torch.zeros(1, frames), sv3d_azimuths(frames)[None].deg2rad()
    condition = condition_from(image, *angles, models["vae"], models["clip"], config)
    noisy = image + noise / 2 * drawn.permute(0, 2, 3, 1)  # SVD's images span [-1, 1], these [0, 1]
    condition = replace(condition, latent=encode(models["vae"], noisy))
    # SVD's shape
    monkeypatch.setattr(
        diffusion, "triangular_guidance", lambda n, peak: torch.linspace(1, peak, n)
    )
    sample(
        TimeIds(unet, ids),
        condition,
        config,
        generator=torch.Generator().manual_seed(seed),
        steps=4,
        guidance=3.0,
        progress=False,
        callback=lambda i, z, z_hat: ours.append(z),
    )
    assert len(ours) == 4 and expected[-1].std() > 0.1
    for before, theirs_now, ours_now in zip(expected, expected[1:], ours, strict=False):
        assert (
            ours_now - theirs_now
        ).abs().max() <= 1e-5 * before.abs().max()  # a step leaves the rounding of its input
    assert (ours[-1] - expected[-1]).abs().max() <= 1e-5 * expected[-1].abs().max()


# ------------------------------------------------------------ damaged and foreign files


def refuse(source, message: str, error=ValueError, **options) -> None:
    """The message fits and is one line."""
    with pytest.raises(error, match=message) as caught:
        load_backbone(source, CONFIG, **options)
    assert "\n" not in str(caught.value)


def test_damaged_files_get_one_sentence(single, folder, models, dino, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:-1000])
    refuse(cut, "cut.safetensors is damaged.*copy it again")
    cut.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse(cut, "damaged or no safetensors file")
    missing = write_original(
        tmp_path / "missing.safetensors", models, drop=(f"{UNET}middle_block.1.norm.",)
    )
    refuse(missing, "mid_block.attentions.0.norm.weight is missing .and 1 more")
    wrong = {f"{UNET}out.2.weight": randn(3, 32, 3, 3)}
    refuse(
        write_original(tmp_path / "wrong.safetensors", models, **wrong),
        r"conv_out.weight is \(3, .*not \(4, 32, 3, 3",
    )
    extra = {f"{UNET}adapter.weight": randn(2)}
    refuse(
        write_original(tmp_path / "extra.safetensors", models, **extra), "adapter.weight is unknown"
    )
    broken = write_folder(tmp_path / "broken", models)
    (broken / FOLDERS["scheduler"]).write_text("{")
    refuse(broken, "scheduler_config.json cannot be read", dino=dino)


def test_missing_folders_get_one_sentence(models, single, dino, tmp_path):
    refuse(tmp_path / "nowhere", "no file or folder", FileNotFoundError)
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, f"neither unet/.* nor {SINGLE}", FileNotFoundError)
    partial_copy = write_folder(tmp_path / "partial", models)
    (partial_copy / FOLDERS["clip"]).unlink()
    refuse(
        partial_copy,
        "no image_encoder/.*not on this machine.*download=True.*svd=",
        FileNotFoundError,
        dino=dino,
    )
    refuse(partial_copy, "Neither .* has image_encoder", FileNotFoundError, svd=empty, dino=dino)
    refuse(single, "empty has no config.json", FileNotFoundError, dino=empty)
    refuse("no/such-repository", "not on this machine, nor is a folder", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="no decoder weights"):
        sv3d.load_sv3d(single, CONFIG, checkpoint=empty, dino=dino)


def test_other_models_are_named(single, folder, models, dino, tmp_path):
    tensors = load_file(single)
    image = {
        n: t
        for n, t in tensors.items()
        if "time_stack" not in n and "time_mixer" not in n and "label" not in n
    }
    for name, changed, message in (
        ("sd", image, "an image model such as Stable Diffusion"),
        ("svd", tensors | {f"{UNET}label_emb.0.0.weight": randn(128, 768)}, "it is SVD"),
        (
            "sv3d_u",
            tensors | {f"{UNET}label_emb.0.0.weight": randn(128, 256)},
            "SV3D_u, which takes no camera angles",
        ),
        (
            "clip",
            {n: t for n, t in tensors.items() if n.startswith(CLIP)},
            "no checkpoint of generative-models",
        ),
    ):
        save_file(changed, tmp_path / f"{name}.safetensors")
        refuse(tmp_path / f"{name}.safetensors", message)
    with pytest.raises(
        ValueError, match=r"sizes of 'paper'.*conv_in.weight is \(32, 8, 3, 3\), not \(320"
    ):
        load_backbone(single)
    other = write_folder(tmp_path / "eps", models)
    settings = json.loads((other / FOLDERS["scheduler"]).read_text()) | {
        "prediction_type": "epsilon"
    }
    (other / FOLDERS["scheduler"]).write_text(json.dumps(settings))
    refuse(other, "prediction_type = epsilon; SV3D has v_prediction", dino=dino)
    small = tmp_path / "small"
    build_dino(CONFIG.replace(dino_width=16)).save_pretrained(small)
    refuse(single, "no DINOv2 of width 32", dino=small)


# ---------------------------------------------------------------- what is downloaded


class Hub(BaseHTTPRequestHandler):
    """The answers of the Hub that matter here: a file, a gated repository, and 404."""

    files = {"/open/model/resolve/main/config.json": b"{}"}
    asked: list[str] = []

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        data = self.files.get(self.path)
        code = 200 if data is not None else 403 if "gated/" in self.path else 404
        errors = {
            403: "GatedRepo",
            404: "EntryNotFound" if self.path.startswith("/open/") else "RepoNotFound",
        }
        self.send_response(code)
        self.send_header("Content-Length", str(len(data or b"")))
        if code == 200:
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", "a" * 40)
        else:
            self.send_header("X-Error-Code", errors[code])
        self.end_headers()
        if body:
            self.wfile.write(data or b"")

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub as installed, talking to a server in this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    ask = partial(
        huggingface_hub.hf_hub_download, endpoint=address, cache_dir=tmp_path / "cache", token=False
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    yield Hub
    server.shutdown()
    server.server_close()


def test_nothing_is_fetched_unless_asked(hub, capsys):
    for _ in range(2):
        with pytest.raises(
            FileNotFoundError,
            match="config.json of open/model is not on this machine.*download=True",
        ):
            fetch("open/model", "config.json", download=False)
    with pytest.raises(FileNotFoundError, match="stabilityai/sv3d is not on this machine"):
        GSV3DPipeline.from_sv3d("stabilityai/sv3d")
    assert call("sv3d", ["stabilityai/sv3d"]) == 0
    assert "Nothing was fetched; add --download" in capsys.readouterr().out
    assert hub.asked == []
    assert fetch("open/model", "config.json", download=True).read_bytes() == b"{}"
    assert hub.asked
    assert fetch("open/model", "config.json", download=False).read_bytes() == b"{}"


def test_gated_and_missing_repositories_say_what_to_do(hub, capsys):
    for repo, file, message in (
        (
            "gated/model",
            "a.safetensors",
            "gated/model is gated: accept its licence at https.*hf auth login",
        ),
        (
            "closed/model",
            "a.safetensors",
            "no closed/model on the Hub that you may see.*hf auth login",
        ),
        ("open/model", "a.safetensors", "open/model has no a.safetensors"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            fetch(repo, file, download=True)
        assert "\n" not in str(caught.value)
    assert sv3d.find("open/model", "vae", download=True) == []  # so that SVD's will be asked for
    assert call("sv3d", ["gated/model", "--download"]) == 2
    assert capsys.readouterr().err.startswith("gsv3d: gated/model is gated")


def test_offline_a_download_fails_in_one_sentence():
    with pytest.raises(FileNotFoundError, match="could not be reached; go online") as caught:
        fetch("stabilityai/sv3d", SINGLE, download=True)
    assert "\n" not in str(caught.value)


def test_the_plan_has_files_sizes_licences_and_gates(models, folder, dino, tmp_path, capsys):
    plan = {(d.repo, d.file): d for d in downloads("stabilityai/sv3d")}
    original_file = plan["stabilityai/sv3d", SINGLE]
    assert (
        original_file.gated
        and original_file.size == 9_370_000_000
        and "Community" in original_file.licence
    )
    assert [d.licence for (repo, _), d in plan.items() if repo == sv3d.DINO] == ["apache-2.0"] * 2
    converted = downloads("chenguolin/sv3d-diffusers")
    assert [d.file for d in converted[:5]] == list(FOLDERS.values()) and not any(
        d.gated or d.cached for d in converted
    )
    assert downloads("some/fine-tune")[0].size is None
    assert str(downloads("some/fine-tune")[0]).endswith(
        "size unknown, gating unknown, licence unknown"
    )
    assert downloads(folder, dino=dino) == []
    bare = write_original(tmp_path / "bare.safetensors", models, drop=(FIRST, "conditioner."))
    assert [(d.repo, d.file) for d in downloads(bare, dino=dino)] == [
        (SVD, FOLDERS["vae"]),
        (SVD, FOLDERS["clip"]),
    ]
    assert call("sv3d", ["stabilityai/sv3d"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"stabilityai/sv3d/{SINGLE}: 9.37 GB, gated, Stability AI Community License"
    assert lines[-2] == "3 files to download, 9.72 GB as far as known."


def test_sizes_that_are_stated_are_those_of_the_models():
    """Published sizes against parameters times four bytes: a file in the table cannot
    be another model's.
    """
    config = preset("paper")
    converted, svd = (sv3d.KNOWN[repo][2] for repo in ("chenguolin/sv3d-diffusers", SVD))
    temporal = vae_encoder(config) | vae_decoder(config, True) | affine("quant_conv", 8, 8, 1, 1)
    for size, shapes in (
        (converted[FOLDERS["unet"]], video_unet(config)),
        (converted[FOLDERS["clip"]], vision_tower(config)),
        (converted[FOLDERS["vae"]], whole_vae(config)),  # AutoencoderKL, without layers over time
        (svd[FOLDERS["vae"]], temporal),
        (svd[FOLDERS["clip"]], vision_tower(config)),
    ):
        assert size == pytest.approx(4 * numel(shapes), rel=3e-3)
