"""LoRA on the U-Net's attention: W -> W + (alpha / r) B A with A [r, in], B [out, r], B = 0 at the start (peft).

Rank and targets are not stated in the paper; r = 16 on to_q, to_k, to_v, to_out.0 of spatial and temporal attention is this
project's choice: 256 layers and 414,976 r parameters at paper scale. A quarter of the layers, to_q and to_k of the
cross-attentions, cannot learn: these attend to one token, and a softmax over one key is 1 whatever the query. Their gradient
is rounding; they are there because the choice is "all attention layers", as tools for LoRA make it.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from .system.errors import MissingFile, UserError
from .system.paths import atomic_path, check_readable, reason

IDLE = (".attn2.to_q.", ".attn2.to_k.")  # in the names of layers that cannot change any result
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(unet, rank: int, seed: int = 0):
    """Freeze `unet` and add trainable LoRA layers in place, starting as the identity. Returns `unet`."""
    import torch
    from peft import LoraConfig

    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=list(TARGETS))
        unet.add_adapter(config)
    return unet


def lora_parameters(unet) -> dict:
    """The trainable LoRA tensors by name."""
    return {name: p for name, p in unet.named_parameters() if "lora_" in name}


def save_lora(unet, folder: str | Path) -> None:
    """Write the adapter in diffusers' format (`pytorch_lora_weights.safetensors`), readable by its loaders.

    diffusers' own `save_lora_adapter` writes sets, and several entries of metadata, in an order that changes from process
    to process. Here the same adapter gives the same bytes.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    adapter = unet.peft_config["default"].to_dict()
    facts = {name: sorted(value) if isinstance(value, set) else value for name, value in adapter.items()}
    tensors = get_peft_model_state_dict(unet, adapter_name="default")
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(facts, indent=2, sort_keys=True)}
    with atomic_path(Path(folder) / LORA_FILE) as path:
        save_file(tensors, path, metadata)


def load_lora(unet, folder: str | Path):
    """Add the adapter stored in `folder` to `unet`.

    Raises FileNotFoundError or ValueError, with what to do, where it is missing, damaged, or made for another U-Net.
    """
    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise MissingFile(f"No LoRA at {path}; train one with `make train-tiny` or pass lora=False (--no-lora).")
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            stored = len(file.keys())
        unet.load_lora_adapter(str(folder), prefix=None, weight_name=path.name, adapter_name="default")
        if stored != len(lora_parameters(unet)):
            raise UserError(f"it has {stored} tensors, this U-Net's LoRA {len(lora_parameters(unet))}")
    except Exception as error:  # safetensors, peft and torch each raise their own kinds, some of many lines
        raise UserError(
            f"The LoRA at {path} cannot be read or does not fit ({reason(error)}); copy or train it again."
        ) from error
    return unet


def set_lora_scale(unet, scale: float) -> None:
    """0 switches the adapter off (the base U-Net), 1 is the trained one; values between interpolate."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.set_scale(name, scale)


@contextmanager
def merged_lora(unet):
    """Within the block W + scale (alpha / r) B A is one matrix at every layer: the same results for less work, without
    gradients for the LoRA. Afterwards the weights are, bit for bit, those of before. Nothing happens without a LoRA.
    """
    if not lora_parameters(unet):
        yield unet
        return
    from peft.tuners.lora import LoraLayer

    layers = [module for module in unet.modules() if isinstance(module, LoraLayer) and not module.merged]
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # puts a new tensor in place; `kept` holds the old ones
        yield unet
    finally:
        for layer, weight in zip(layers, kept):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()
