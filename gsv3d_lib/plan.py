"""Memory and time of a training step before anything is trained: counted on the meta device, where tensors have no data.

    python -m gsv3d_lib.plan --scale paper --stage stage2 --gpus 4 --frames 16 --rank 16

The real models run forward and backward without numbers; what autograd would keep for the backward pass is counted tensor by
tensor, and matrix products by torch's own FLOP counter. So the plan follows the code, not a formula. Two things are assumed:
how fast the device computes (`--tflops`), and that half precision halves every activation (norms under autocast stay in
float32, so expect somewhat more). The rasteriser's own buffers, small beside the networks', are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config, preset, schedule_field

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Part:
    """One network in a training step, for one example (an orbit of N views)."""

    name: str
    parameters: int
    trained: int  # of those, the ones that the optimiser moves
    activations: int  # bytes kept for the backward pass, float32
    checkpointed: int  # the same with gradient checkpointing: inputs of all blocks and one block's inside
    forward: int  # floating point operations
    backward: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One stage on one kind of machine. Memory is per GPU, in bytes."""

    parts: tuple[Part, ...]
    weights: int
    gradients: int
    optimizer: int
    activations: int
    flops: int  # per optimiser step, all GPUs together
    seconds: float  # per optimiser step
    hours: float  # of the stage

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


class Ledger:
    """Counts what autograd keeps: every storage once, parameters not at all."""

    def __init__(self, parameters: Iterator[Tensor]):
        self.known = {p.untyped_storage()._cdata for p in parameters}
        self.tensors: dict[int, Tensor] = {}  # held, so that no storage is freed and its address used again

    def keep(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.known:
            self.tensors.setdefault(key, tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())


class _Attention(torch.autograd.Function):
    """Attention as the fused kernels do it: the score matrix is computed in passing and never kept."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.transpose(-1, -2)) @ v
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, _, _ = ctx.saved_tensors
        scores = q @ k.transpose(-1, -2)  # computed again, as the kernels do
        grad_scores = grad @ v.transpose(-1, -2)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, scores.transpose(-1, -2) @ grad


@contextmanager
def fused_attention():
    """The meta device has only the unfused attention, whose score matrices no GPU would hold."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: _Attention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def count(name: str, model: nn.Module, forward: Callable[[], Tensor], blocks: list[nn.Module]) -> Part:
    """Run `forward` of a model once, and its backward -> what it costs. `blocks` are the units of checkpointing."""
    from torch.utils.flop_counter import FlopCounterMode

    ledger, inside, entering = Ledger(model.parameters()), [0], [0]

    def enter(module, args, kwargs):
        entering.append(ledger.bytes)
        given = [*args, *kwargs.values()]
        inside_inputs.extend(a for a in given if isinstance(a, Tensor))

    def leave(module, *_):
        inside.append(ledger.bytes - entering.pop())

    inside_inputs: list[Tensor] = []
    handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(leave) for b in blocks]
    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda t: t):
        with FlopCounterMode(display=False) as counter:
            result = forward()
        forward_flops = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            result.sum().backward()
        backward_flops = counter.get_total_flops()
    for handle in handles:
        handle.remove()
    inputs = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in inside_inputs}
    outside = ledger.bytes - sum(inside)
    return Part(
        name,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        ledger.bytes,
        min(ledger.bytes, sum(inputs.values()) + max(inside) + max(0, outside)),
        forward_flops,
        backward_flops,
    )


@cache
def unet_part(config: Config, lora: bool) -> Part:
    """The U-Net on one orbit; with `lora` only that is trained."""
    from .lora import add_lora
    from .unet import build_unet

    frames, size = config.num_frames, config.latent_size
    with torch.device("meta"):
        unet = build_unet(config).to("meta")
        unet = add_lora(unet, config.lora_rank, config.seed) if lora else unet
        given = torch.zeros(1, frames, 8, size, size), torch.zeros(1), torch.zeros(1, 1, config.clip_dim)
        angles = torch.zeros(1, frames), torch.zeros(1, frames)
        levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        blocks = [b for level in levels for b in [*level.resnets, *getattr(level, "attentions", [])]]
        return count("U-Net with LoRA" if lora else "U-Net", unet, lambda: unet(*given, *angles), blocks)


@cache
def decoder_part(config: Config, frozen: bool) -> Part:
    """The Gaussian Splatting Decoder on one orbit; where it is frozen its activations are needed all the same."""
    from .cameras import orbit_cameras
    from .decoder import build_decoder

    frames, size = config.num_frames, config.latent_size
    cameras = orbit_cameras(torch.arange(frames) * 360.0 / frames, torch.zeros(frames), config.image_size).to("meta")
    tokens = (config.dino_size // config.dino_patch) ** 2 + 1
    with torch.device("meta"):
        decoder = build_decoder(config).to("meta").requires_grad_(not frozen)
        latents = torch.zeros(1, frames, 4, size, size, requires_grad=frozen)
        features = None if config.dino == "none" else torch.zeros(1, tokens, config.dino_width)
        name = "decoder, frozen" if frozen else "decoder"
        return count(name, decoder, lambda: decoder.output_maps(latents, [cameras], features)[0], list(decoder.blocks))


def parts_of(config: Config, stage: str) -> tuple[Part, ...]:
    """The networks that a stage differentiates through. Raises ValueError for a stage that is not planned."""
    if stage == "diffusion":
        return (unet_part(config, lora=False),)
    if stage == "stage1":
        return (decoder_part(config, frozen=False),)
    if stage == "stage2":
        with_3d = () if config.lambda_3d == 0 else (decoder_part(config, frozen=True),)
        return (unet_part(config, lora=True), *with_3d)
    raise ValueError(f"plan knows the stages diffusion, stage1 and stage2; got {stage!r}.")


def plan(
    config: Config,
    stage: str = "stage2",
    gpus: int = 1,
    micro_batch: int = 1,
    half: bool = True,
    checkpointing: bool = False,
    tflops: float = 100.0,
) -> Plan:
    """Memory per GPU, and time, of one stage.

    micro_batch: orbits that are on a GPU at once; the rest of the batch follows by gradient accumulation.
    half: activations in bfloat16; weights, gradients and AdamW's two averages stay in float32.
    tflops: what one GPU sustains on these models, an assumption (an A100 peaks at 312 in bfloat16).
    """
    parts = parts_of(config, stage)
    schedule = getattr(config, schedule_field(stage))
    kept = sum(part.checkpointed if checkpointing else part.activations for part in parts)
    again = sum(part.forward for part in parts) if checkpointing else 0
    flops = schedule.batch * (sum(part.forward + part.backward for part in parts) + again)
    seconds = flops / (gpus * tflops * 1e12)
    trained = sum(part.trained for part in parts)
    return Plan(
        parts,
        weights=4 * sum(part.parameters for part in parts),
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=micro_batch * kept // (2 if half else 1),
        flops=flops,
        seconds=seconds,
        hours=seconds * schedule.steps / 3600,
    )


def report(plan: Plan) -> str:
    """The plan as a table."""
    lines = [f"{'network':18}{'parameters':>16}{'trained':>14}{'kept GB':>9}{'ckpt GB':>9}{'fwd TF':>8}{'bwd TF':>8}"]
    for p in plan.parts:
        numbers = f"{p.activations / GB:9.2f}{p.checkpointed / GB:9.2f}{p.forward / 1e12:8.2f}{p.backward / 1e12:8.2f}"
        lines.append(f"{p.name:18}{p.parameters:16,}{p.trained:14,}{numbers}")
    lines += [
        "(per orbit, float32, without and with gradient checkpointing)",
        "",
        f"per GPU: weights {plan.weights / GB:.1f} + gradients {plan.gradients / GB:.1f} + optimiser "
        f"{plan.optimizer / GB:.1f} + activations {plan.activations / GB:.1f} = {plan.memory / GB:.1f} GB",
        f"per step: {plan.flops / 1e12:,.1f} TFLOP, {plan.seconds:.2f} s; the whole stage {plan.hours:,.1f} h",
    ]
    for size in (24, 48, 80):
        lines.append(f"  {size} GB: {'fits' if plan.memory < 0.92 * size * GB else 'does not fit'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gsv3d_lib.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", default="paper", help="tiny, small or paper")
    parser.add_argument("--stage", default="stage2", choices=["diffusion", "stage1", "stage2"])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--frames", type=int, help="N, views per orbit")
    parser.add_argument("--rank", type=int, help="of the LoRA")
    parser.add_argument("--micro-batch", type=int, default=1, help="orbits on a GPU at once")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--float32", action="store_true", help="activations in float32 instead of bfloat16")
    parser.add_argument("--tflops", type=float, default=100.0, help="sustained by one GPU (an assumption)")
    args = parser.parse_args(arguments)
    changes = {"num_frames": args.frames, "lora_rank": args.rank}
    try:
        config = preset(args.scale, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        parser.error(str(error))
    options = dict(gpus=args.gpus, micro_batch=args.micro_batch, half=not args.float32, tflops=args.tflops)
    print(report(plan(config, args.stage, checkpointing=args.checkpointing, **options)))


if __name__ == "__main__":
    main()
