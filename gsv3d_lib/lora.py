"""LoRA on the U-Net's attention: W -> W + (alpha / r) B A (peft).

A is [r, in], B is [out, r] and 0 at the start. The paper states neither rank nor
targets. Ours: r = 16 on to_q, to_k, to_v, to_out.0 of spatial and temporal attention,
which is 256 layers and 414,976 r parameters at paper scale. A quarter of these layers
cannot learn, to_q and to_k of the cross-attentions: they attend to one token, and a
softmax over one key is 1 whatever the query. Their gradient is rounding. They are there
because the choice is "all attention layers", as tools for LoRA make it.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .system.errors import MissingFile, UserError
from .system.files import explained
from .system.paths import atomic_path

if TYPE_CHECKING:
    from .unet import SV3DUNet

Module = TypeVar("Module", bound=nn.Module)

IDLE = (".attn2.to_q.", ".attn2.to_k.")  # in the names of layers that cannot change any result
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(unet: SV3DUNet, rank: int, seed: int = 0) -> SV3DUNet:
    """Freeze `unet` and add LoRA layers in place, at first the identity. Returns it."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    return unet


def lora_parameters(unet: SV3DUNet) -> dict:
    """The trainable LoRA tensors by name."""
    return {name: p for name, p in unet.named_parameters() if "lora_" in name}


def save_lora(unet: SV3DUNet, folder: str | Path) -> None:
    """Write the adapter in diffusers' format, readable by its loaders.

    diffusers' own `save_lora_adapter` writes sets and metadata in an order that changes
    from process to process. Here the same adapter gives the same bytes.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    adapter = unet.peft_config["default"].to_dict()
    facts = {n: sorted(v) if isinstance(v, set) else v for n, v in adapter.items()}
    tensors = get_peft_model_state_dict(unet, adapter_name="default")
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(facts, indent=2, sort_keys=True)}
    with atomic_path(Path(folder) / LORA_FILE) as path:
        save_file(tensors, path, metadata)


def load_lora(unet: SV3DUNet, folder: str | Path) -> SV3DUNet:
    """Add the adapter stored in `folder` to `unet`, and return it.

    Raises MissingFile or UserError where it is missing, damaged, or of another U-Net.
    """
    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise MissingFile(
            f"No LoRA at {path}; train one with `make train-tiny` or pass lora=False (--no-lora)."
        )
    fault = f"The LoRA at {path} cannot be read or does not fit"
    with explained(fault, "copy or train it again", path):
        with safe_open(path, "pt") as file:
            stored = len(file.keys())
        options: dict[str, Any] = dict(prefix=None, weight_name=path.name, adapter_name="default")
        unet.load_lora_adapter(str(folder), **options)
        expected = len(lora_parameters(unet))
        if stored != expected:
            raise UserError(f"it has {stored} tensors, this U-Net's LoRA {expected}")
    return unet


def set_lora_scale(unet: SV3DUNet, scale: float) -> None:
    """0 is the base U-Net, 1 the trained one; values between interpolate."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.set_scale(name, scale)


def merged_lora(unet: SV3DUNet, scale: float | None = None) -> SV3DUNet:
    """A U-Net with the same answers for less work: one matrix at every layer.

    That is W + scale (alpha / r) B A, without gradients for the LoRA. `unet` is not
    touched, so any number of these may be at work at once. Without a LoRA it is `unet`
    itself.
    scale: as of `set_lora_scale`, for the returned U-Net alone; None takes what is set.
    Raises UserError for a scale where the LoRA was merged for good (`fuse_lora`).
    """
    if not lora_parameters(unet):
        return unet
    from peft.tuners.lora import LoraLayer

    merged = twin_of(unet)
    layers = [module for module in merged.modules() if isinstance(module, LoraLayer)]
    if scale is not None:
        if any(layer.merged for layer in layers):
            raise UserError(
                "The LoRA is part of the U-Net's weights and has no scale: "
                "call `unfuse_lora()` first."
            )
        set_lora_scale(merged, scale)
    for layer in layers:
        if not layer.merged and not layer.disable_adapters:
            layer.merge(safe_merge=True)  # puts a new tensor in the place of the twin's own
    return merged


def twin_of(module: Module) -> Module:
    """The module again, on the memory of its weights.

    What is set, switched or put in place in the twin stays there. Its modules,
    parameters, lists and dictionaries are its own; the tensors' memory and all else are
    shared. Unlike `torch.func.functional_call`, which swaps the module's parameters for
    a while, this is safe with several threads.
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
