"""LoRA on the U-Net's attention: W -> W + (alpha / r) B A with A [r, in], B [out, r], B
= 0 at the start (peft).

Rank and targets are not stated in the paper; r = 16 on to_q, to_k, to_v, to_out.0 of
spatial and temporal attention is this project's choice: 256 layers and 414,976 r
parameters at paper scale. A quarter of the layers, to_q and to_k of the
cross-attentions, cannot learn: these attend to one token, and a softmax over one key is
1 whatever the query. Their gradient is rounding; they are there because the choice is
"all attention layers", as tools for LoRA make it.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .system.errors import MissingFile, UserError
from .system.paths import atomic_path, check_readable, reason

IDLE = (".attn2.to_q.", ".attn2.to_k.")  # in the names of layers that cannot change any result
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
# by safetensors, peft and torch
REFUSED = (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(unet, rank: int, seed: int = 0):
    """Freeze `unet` and add trainable LoRA layers in place, starting as the identity.
    Returns `unet`.
    """
    from peft import LoraConfig

    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=list(TARGETS)
        )
        unet.add_adapter(config)
    return unet


def lora_parameters(unet) -> dict:
    """The trainable LoRA tensors by name."""
    return {name: p for name, p in unet.named_parameters() if "lora_" in name}


def save_lora(unet, folder: str | Path) -> None:
    """Write the adapter in diffusers' format (`pytorch_lora_weights.safetensors`),
    readable by its loaders.

    diffusers' own `save_lora_adapter` writes sets, and several entries of metadata, in
    an order that changes from process to process. Here the same adapter gives the same
    bytes.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    adapter = unet.peft_config["default"].to_dict()
    facts = {
        name: sorted(value) if isinstance(value, set) else value for name, value in adapter.items()
    }
    tensors = get_peft_model_state_dict(unet, adapter_name="default")
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(facts, indent=2, sort_keys=True)}
    with atomic_path(Path(folder) / LORA_FILE) as path:
        save_file(tensors, path, metadata)


def load_lora(unet, folder: str | Path):
    """Add the adapter stored in `folder` to `unet`.

    Raises FileNotFoundError or ValueError, with what to do, where it is missing,
    damaged, or made for another U-Net.
    """
    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise MissingFile(
            f"No LoRA at {path}; train one with `make train-tiny` or pass lora=False (--no-lora)."
        )
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            stored = len(file.keys())
        unet.load_lora_adapter(
            str(folder), prefix=None, weight_name=path.name, adapter_name="default"
        )
    except REFUSED as error:
        raise misfit(path, reason(error)) from error
    if stored != len(lora_parameters(unet)):
        raise misfit(
            path, f"it has {stored} tensors, this U-Net's LoRA {len(lora_parameters(unet))}"
        )
    return unet


def misfit(path: Path, why: str) -> UserError:
    return UserError(
        f"The LoRA at {path} cannot be read or does not fit ({why}); copy or train it again."
    )


def set_lora_scale(unet, scale: float) -> None:
    """0 switches the adapter off (the base U-Net), 1 is the trained one; values between
    interpolate.
    """
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.set_scale(name, scale)


def merged_lora(unet, scale: float | None = None):
    """A U-Net with the same answers for less work: W + scale (alpha / r) B A is one
    matrix at every layer. No gradients for the LoRA.

    `unet` itself is not touched, so any number of these may be at work at once.
    scale: as of `set_lora_scale`, for the returned U-Net alone; None takes what is set.
    Without a LoRA it is `unet` itself. Raises ValueError for a scale where the weights
    of `unet` have been merged for good (`fuse_lora`).
    """
    if not lora_parameters(unet):
        return unet
    from peft.tuners.lora import LoraLayer

    merged = twin_of(unet)
    layers = [module for module in merged.modules() if isinstance(module, LoraLayer)]
    if scale is not None:
        if any(layer.merged for layer in layers):
            raise UserError(
                "The LoRA is part of the U-Net's weights and has no scale: call `unfuse_lora()` first."
            )
        set_lora_scale(merged, scale)
    for layer in layers:
        if not layer.merged and not layer.disable_adapters:
            layer.merge(safe_merge=True)  # puts a new tensor in the place of the twin's own
    return merged


def twin_of(module: nn.Module) -> nn.Module:
    """The module again, on the memory of its weights: what is set, switched or put in
    place in the twin stays there.

    Every module, parameter, list and dictionary of the twin is its own; the tensors'
    memory and all else are shared. Unlike `torch.func.functional_call`, which swaps the
    parameters of the module for a while, this is safe with several threads.
    """
    twin = copy.copy(module)
    own = vars(twin)
    for name, value in own.items():
        if type(value) in (dict, OrderedDict, list, set):  # frozen ones are not copied
            own[name] = value.copy()
    for name, parameter in twin._parameters.items():
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(parameter.data, parameter.requires_grad)
    for name, child in twin._modules.items():
        if child is not None:
            twin._modules[name] = twin_of(child)
    return twin
