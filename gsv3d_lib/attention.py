"""Scaled dot-product attention, and where mixed precision must leave it alone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: the one door to attention in U-Net and decoder.

    Queries [B, heads, T, d], keys and values [B, heads, S, d] -> [B, heads, T, d].
    """
    if torch.compiler.is_compiling():  # a look at `_attention` would cut its graph in two
        return F.scaled_dot_product_attention(q, k, v)
    return _attention.get()(q, k, v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own attention; on a CPU in float32."""
    # On a CPU bfloat16's backward pass is ten times slower than float32's.
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v)
    with full_precision(q.device):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


_attention: ContextVar[Callable] = ContextVar("attention", default=fused_attention)


@contextmanager
def attending_with(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the block `attend` is this function: another implementation."""
    token = _attention.set(function)
    try:
        yield
    finally:
        _attention.reset(token)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, T, d] -> [B, T, heads * d]"""
    return x.transpose(1, 2).flatten(2)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off: with bfloat16's three digits a ray would miss its pixel."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
