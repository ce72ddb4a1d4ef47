"""From Stability's names of SV3D's tensors to those of diffusers and transformers.

This library's models have the latter. Each function gives, for the names in a file, our
name -> (stored name, how to make our tensor of the stored one).
"""

import re
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..config import Config

# our name -> stored name, and how to make ours of it
Pieces = dict[str, tuple[str, Callable[[Tensor], Tensor]]]

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "nin_shortcut": "conv_shortcut",  # the VAE's word for it
    "mix_factor": "time_mixer.mix_factor",  # the VAE's; the U-Net has the whole name
}
TRANSFORMER = {
    "time_stack": "temporal_transformer_blocks",
    "time_pos_embed.0": "time_pos_embed.linear_1",
    "time_pos_embed.2": "time_pos_embed.linear_2",
}
VAE_ENDS = {"norm_out": "conv_norm_out", "conv_out.time_mix_conv": "time_conv_out"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}
VAE_ATTENTION |= {"proj_out": "to_out.0"}
CLIP_ENDS = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",  # spelt so in transformers
    "ln_post": "vision_model.post_layernorm",
}
CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
CONDITIONER_CLIP = r"conditioner\.embedders\.\d+\.open_clip\.model\.visual\."
CONDITIONER_VAE = r"conditioner\.embedders\.\d+\.encoder\."


def rewrite(name: str, table: dict[str, str]) -> str:
    """`name` with its leading words replaced by the table's first entry that fits."""
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def unet_name(name: str, layers: int) -> str:
    """diffusers' name of one tensor of Stability's `VideoUNet`.

    `layers` is the number of residual blocks per level. input_blocks count conv_in,
    then per level `layers` blocks and a downsampler; output_blocks `layers + 1` blocks
    a level. Inside a block 0 is the residual block (or the downsampler), 1 the
    transformer, and the last may be the upsampler.
    """
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(?:(\d+)\.)?(\d)\.(.+)", name)
    if match is None or name.startswith("input_blocks.0."):
        return rewrite(name, UNET_ENDS)
    half, block, slot, tail = match[1], int(match[2] or 0), int(match[3]), match[4]
    if half == "middle_block":
        place, index = "mid_block", slot // 2
    else:
        level, index = divmod(block - (half == "input_blocks"), layers + 1)
        place = f"{'down' if half == 'input_blocks' else 'up'}_blocks.{level}"
    sampler, _, rest = tail.partition(".")
    if sampler in ("op", "conv"):
        return f"{place}.{'down' if sampler == 'op' else 'up'}samplers.0.conv.{rest}"
    if slot == 1:
        return f"{place}.attentions.{index}.{rewrite(tail, TRANSFORMER)}"
    return f"{place}.resnets.{index}.{spatio_temporal(tail)}"


def spatio_temporal(tail: str) -> str:
    """A tensor of a residual block with a temporal twin."""
    if tail.startswith("time_stack."):
        return "temporal_res_block." + rewrite(tail.removeprefix("time_stack."), RESNET)
    mixer = tail.startswith(("mix_factor", "time_mixer"))
    return ("" if mixer else "spatial_res_block.") + rewrite(tail, RESNET)


def vae_name(name: str, levels: int) -> str:
    """diffusers' name of one tensor of Stability's autoencoder.

    Its decoder counts levels from the image, diffusers' from the latent.
    """
    half, _, rest = name.partition(".")
    resnet = spatio_temporal if half == "decoder" else partial(rewrite, table=RESNET)
    if match := re.fullmatch(r"(down|up)\.(\d+)\.block\.(\d+)\.(.+)", rest):
        level = vae_level(match[1], match[2], levels)
        return f"{half}.{level}.resnets.{match[3]}.{resnet(match[4])}"
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(?:down|up)sample\.(.+)", rest):
        return f"{half}.{vae_level(match[1], match[2], levels)}.{match[1]}samplers.0.{match[3]}"
    if match := re.fullmatch(r"mid\.block_([12])\.(.+)", rest):
        return f"{half}.mid_block.resnets.{int(match[1]) - 1}.{resnet(match[2])}"
    if rest.startswith("mid.attn_1."):
        part = rewrite(rest.removeprefix("mid.attn_1."), VAE_ATTENTION)
        return f"{half}.mid_block.attentions.0.{part}"
    return f"{half}.{rewrite(rest, VAE_ENDS)}"


def vae_level(way: str, level: str, levels: int) -> str:
    return f"{way}_blocks.{int(level) if way == 'down' else levels - 1 - int(level)}"


def same(tensor: Tensor) -> Tensor:
    return tensor


def as_linear(tensor: Tensor) -> Tensor:
    """A 1x1 convolution [C, D, 1, 1] as the weight of a linear layer; biases stay."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


def third(tensor: Tensor, index: int) -> Tensor:
    """Query, key or value of a projection that holds all three, [3 C, ...]."""
    return tensor.tensor_split(3)[index]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t() if tensor.ndim == 2 else tensor


def original_unet(names: list[str], config: Config) -> Pieces:
    prefix = "model.diffusion_model."
    ours = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    return {unet_name(inner, config.unet_layers): (n, same) for n, inner in ours.items()}


def original_vae(names: list[str], config: Config) -> Pieces:
    """Encoder and quant_conv of the conditioner, decoder of the first stage.

    So Stability's code uses them. Each comes from the other place where a file has it
    only there.
    """
    conditioner = prefixes(names, CONDITIONER_VAE)
    first = ["first_stage_model."]
    halves = {
        ("encoder", "quant_conv"): conditioner + first,
        ("decoder", "post_quant_conv"): first + conditioner,
    }
    pieces = {}
    for parts, places in halves.items():
        holding = (p for p in places if any(n.startswith(f"{p}{parts[0]}.") for n in names))
        place = next(holding, "")
        for name in (n for n in names if place and n.startswith(place)):
            inner = name.removeprefix(place)
            if inner.split(".")[0] in parts:
                how = as_linear if ".attn_1." in inner else same
                pieces[vae_name(inner, len(config.vae_channels))] = (name, how)
    return pieces


def original_clip(names: list[str], config: Config) -> Pieces:
    """OpenCLIP's vision tower as transformers' `CLIPVisionModelWithProjection`."""
    pieces = {}
    for prefix in prefixes(names, CONDITIONER_CLIP):
        for name in (n for n in names if n.startswith(prefix)):
            inner = name.removeprefix(prefix)
            if inner == "proj":  # x @ proj there, a linear layer here
                pieces["visual_projection.weight"] = (name, transposed)
                continue
            match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", inner)
            if match is None:
                pieces[rewrite(inner, CLIP_ENDS)] = (name, same)
                continue
            layer = f"vision_model.encoder.layers.{match[1]}"
            kind = match[2].removeprefix("attn.in_proj_")  # weight or bias
            if kind == match[2]:
                pieces[f"{layer}.{rewrite(kind, CLIP_LAYER)}"] = (name, same)
                continue
            for index, letter in enumerate("qkv"):
                how = partial(third, index=index)
                pieces[f"{layer}.self_attn.{letter}_proj.{kind}"] = (name, how)
    return pieces


ORIGINAL = {"unet": original_unet, "vae": original_vae, "clip": original_clip}


def prefixes(names: list[str], pattern: str) -> list[str]:
    return sorted({match[0] for name in names if (match := re.match(pattern, name))})


def diffusers_pieces(part: str, names: list[str]) -> Pieces:
    """The names as stored; for a decoder without time those of its spatial half.

    `AutoencoderKL` has such a decoder.
    """
    if part != "vae":  # old transformers stored a count, position_ids
        return {n: (n, same) for n in names if not n.endswith("position_ids")}
    spatial = r"(?!spatial_res_block|temporal_res_block|time_mixer)"
    plain = re.compile(rf"(decoder\.\w+\.(?:\d+\.)?resnets\.\d+\.){spatial}")
    return {plain.sub(r"\1spatial_res_block.", n): (n, same) for n in names}
