"""The training loop that every stage shares: exact resume, atomic safetensors checkpoints, JSON-lines metrics.

A stage is an `nn.Module` with two methods (see `stages.py` and `distillation.py`):

    example(generator, shared, place) -> dict of tensors   one training example; ALL randomness comes from the generators
    forward(batch) -> (loss, metrics)                      the mean loss over a batch of stacked examples

The generator of an example is seeded by (seed, step, index in the global batch), and its place is the number of examples
before it. So a run that was killed at step k and resumed draws what the uninterrupted run draws, and two processes draw
what one process would.

Checkpoints and metrics are those of `weights/run_folder.py`. One training at a time works in a run folder; Ctrl-C and
SIGTERM end it after the step, with a checkpoint (`system/process.py`).
"""

from __future__ import annotations

import math
import platform
import time
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import VALUES, Schedule, shown
from .data.examples import digest
from .system.errors import UserError
from .system.process import Signals, leave, only_training
from .weights.run_folder import (
    append_metrics,
    checkpoints_after,
    load_checkpoint,
    read_metrics,
    run_identity,
    save_checkpoint,
    write_metrics,
)

PRECISIONS = ("auto", "fp32", "bf16")
CLIP_NORM = 1.0  # gradients longer than this are shortened to it


class Stage(nn.Module):
    """Base of all stages: what the loop needs to know beyond `example` and `forward`."""

    FIELDS: tuple[str, ...] = ()  # patterns of the names of what a run takes from `config`, beside its schedule

    def example(self, generator: torch.Generator, shared: torch.Generator, place: int) -> dict[str, Tensor]:
        """One training example; `shared` gives the draws that all examples of a step have in common.

        place: how many examples all steps and processes drew before this one, for data that comes in an order.
        """
        raise NotImplementedError

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: here every trainable parameter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def identity(self) -> dict[str, object]:
        """What makes a run of this stage this run, by name: configuration, data, frozen models. JSON values."""
        config, data = getattr(self, "config", None), getattr(self, "orbits", getattr(self, "views", None))
        fields = vars(config).items() if self.FIELDS else ()
        matters = [pair for pair in fields if any(fnmatch(pair[0], pattern) for pattern in self.FIELDS)]
        facts = {name: value for name, value in matters if not isinstance(value, Schedule)}
        own = self.training_state()
        frozen = {n: p for n, p in self.named_parameters() if not p.requires_grad and n not in own}
        facts |= {"data": data.fingerprint()} if data is not None else {}
        facts |= {"frozen models": digest(frozen)[:12]} if frozen else {}
        return facts

    def products(self) -> dict[str, nn.Module]:
        """The trained models by the name of their folder in a checkpoint; asked for once, after the last step."""
        raise NotImplementedError

    def after_step(self, step: int, steps: int) -> None:
        """Called after every optimiser step, for example to move a teacher towards its student."""


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes of the run; the tensor itself where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def example_generator(seed: int, step: int, index: int) -> torch.Generator:
    """The random numbers of one training example, a pure function of its place in the run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + index)


def draw_batch(stage: Stage, seed: int, step: int, batch: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Process `rank`'s share of the global batch of this step: examples rank, rank + world, ..., stacked."""
    shared = batch  # its index is that of no example
    examples = [
        stage.example(
            example_generator(seed, step, index), example_generator(seed, step, shared), place=step * batch + index
        )
        for index in range(rank, batch, world)
    ]
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then a half cosine from lr to lr / 10. A function of the step alone, so resuming is exact."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    stage: Stage,
    schedule: Schedule,
    run_dir: str | Path,
    *,
    seed: int = 0,
    stop_at: int | None = None,
    checkpoint_minutes: float = 3.0,
    log_every: int = 20,
    progress: bool = True,
    processes: int = 1,
    precision: str = "auto",
    force_resume: bool = False,
) -> list[dict]:
    """Train `stage` for `schedule.steps` steps, resuming from the last checkpoint in `run_dir` if there is one.

    Raises UserError where that checkpoint is of another run, see `check_identity`, and where another process trains in
    `run_dir`. After Ctrl-C and SIGTERM there is a checkpoint of the last step, and KeyboardInterrupt or SystemExit (143)
    is raised.

    stop_at: leave after this step with a checkpoint (the schedule stays that of the full run).
    precision: of matrix products, "fp32" or "bf16"; "auto" is bf16 on a GPU. Weights and sums stay in float32.
    force_resume: go on from a checkpoint of another run all the same, as far as its tensors fit.
    processes: how many processes were asked for; a ValueError is raised if accelerate sees another number.
    Returns the metrics, one dict per logged step, which are also appended to `run_dir`/metrics.jsonl.
    The averaged weights (if `schedule.ema`) are in the stage when the function returns.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    use_cuda = torch.cuda.is_available()
    idle = DistributedDataParallelKwargs(find_unused_parameters=True)  # DINO's mask token, the VAE's middle attention
    if precision not in PRECISIONS:
        raise UserError(f"The precision is one of {', '.join(PRECISIONS)}; got {precision!r}.")
    if seed not in VALUES["seed"]:
        raise UserError(f"The seed takes {VALUES['seed']}; got {shown(seed)}.")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and use_cuda) else "no"
    AcceleratorState._reset_state()  # a notebook's next training may take another precision
    accelerator = Accelerator(cpu=not use_cuda, mixed_precision=mixed, kwargs_handlers=[idle])
    if accelerator.num_processes != processes:
        raise UserError(
            f"{processes} processes were asked for, but {accelerator.num_processes} are running; start them with "
            f"`torchrun --standalone --nproc_per_node {processes} -m gsv3d_lib train --processes {processes} ...`."
        )
    if schedule.batch % processes:
        raise UserError(f"A batch of {schedule.batch} cannot be shared equally by {processes} processes.")
    if mixed == "bf16" and not use_cuda and accelerator.is_main_process and is_slow_in_bf16():
        print(
            "This CPU has no instructions for bfloat16, in which it trains tens of times slower: take fp32.", flush=True
        )
    with only_training(Path(run_dir), accelerator.is_main_process), Signals() as signals:
        options = (seed, stop_at, checkpoint_minutes, log_every, progress, force_resume)
        return _train(stage, schedule, Path(run_dir), accelerator, signals, *options)


def _train(
    stage: Stage,
    schedule: Schedule,
    run_dir: Path,
    accelerator,
    signals: Signals,
    seed: int,
    stop_at: int | None,
    checkpoint_minutes: float,
    log_every: int,
    progress: bool,
    force_resume: bool,
) -> list[dict]:
    """`train` once the machine is known to be ready for it."""
    stage.to(accelerator.device)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    wrapped, optimizer = accelerator.prepare(stage, optimizer)
    average = {name: p.detach().clone() for name, p in stage.training_state().items()} if schedule.ema else {}
    identity = run_identity(stage, schedule, seed, accelerator.mixed_precision)
    start = load_checkpoint(run_dir, stage, optimizer, average, identity, force_resume, accelerator.is_main_process)
    check_same_start(accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist(), run_dir)
    damaged = checkpoints_after(run_dir, start)
    history = read_metrics(run_dir, before=start)
    if accelerator.is_main_process:
        write_metrics(run_dir, history)

    last = min(schedule.steps, stop_at or schedule.steps)
    saved, done, stopped = time.monotonic(), start, 0
    quiet = not (progress and accelerator.is_main_process)
    bar = tqdm(range(start, last), initial=start, total=last, desc=run_dir.name, disable=quiet, mininterval=5)
    for step in bar:
        batch = draw_batch(stage, seed, step, schedule.batch, accelerator.process_index, accelerator.num_processes)
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        optimizer.zero_grad(set_to_none=True)
        values: dict[str, Tensor] = {}
        parts = micro_batches(batch, schedule.micro_batch)
        for number, (share, part) in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else accelerator.no_sync(wrapped):  # processes talk once a step
                loss, metrics = wrapped(part)
                if not torch.isfinite(loss):
                    raise UserError(f"The loss of step {step} is {loss.item()}; lower the learning rate and resume.")
                accelerator.backward(share * loss)
            for name, value in {"loss": loss, **metrics}.items():
                values[name] = values.get(name, 0) + share * value.detach()
        norm = accelerator.clip_grad_norm_(parameters, CLIP_NORM)
        if not torch.isfinite(norm):  # a step with it would ruin the weights, and the next checkpoint with them
            raise UserError(f"The gradient of step {step} is {float(norm)}; lower the learning rate and resume.")
        optimizer.step()
        stage.after_step(step, schedule.steps)
        update_average(average, stage.training_state(), schedule.ema, step)
        done = step + 1
        if step % log_every == 0 or step == last - 1:
            values = {"loss": values.pop("loss"), "grad_norm": norm, **values}
            names = list(values)
            stacked = torch.stack([torch.as_tensor(values[n], device=accelerator.device).float() for n in names])
            means = accelerator.reduce(stacked.detach(), "mean").tolist()
            history.append({"step": step, "time": round(time.time(), 1), **dict(zip(names, means))})
            bar.set_postfix_str(" ".join(f"{n} {v:.4g}" for n, v in zip(names, means)))
            if accelerator.is_main_process:
                append_metrics(run_dir, history[-1])
        stopped = signals.of_any_process(accelerator)
        if stopped:
            break
        if time.monotonic() - saved > 60 * checkpoint_minutes and accelerator.is_main_process:
            save_checkpoint(run_dir, done, stage, optimizer, average, identity, damaged)
            saved, damaged = time.monotonic(), []
    if accelerator.is_main_process and done > start:
        save_checkpoint(run_dir, done, stage, optimizer, average, identity, damaged)
    stopped = stopped or signals.of_any_process(accelerator)
    if stopped:
        leave(stopped, run_dir, done, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    with torch.no_grad():
        for name, p in stage.training_state().items():
            p.copy_(average.get(name, p))
    return history


def check_same_start(starts: list[int], run_dir: Path) -> None:
    """Raises ValueError where the processes resume from different steps, which a folder that is not shared leads to."""
    if len(set(starts)) > 1:
        raise UserError(
            f"The processes found different checkpoints in {run_dir} (steps {', '.join(map(str, starts))}); the run folder "
            "must lie on a file system that all machines share."
        )


def micro_batches(batch: dict[str, Tensor], size: int = 0) -> list[tuple[float, dict[str, Tensor]]]:
    """A batch in parts of at most `size` examples, each with its share of the whole; 0 leaves it in one part.

    Losses are means over examples, so gradients of share * loss add up to those of the whole batch.
    """
    total = len(next(iter(batch.values())))
    size = size or total
    parts = [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, total, size)]
    return [(len(next(iter(part.values()))) / total, part) for part in parts]


@torch.no_grad()
def update_average(average: dict[str, Tensor], state: dict[str, Tensor], decay: float, step: int) -> None:
    """Exponential moving average with a warm-up, so that early averages do not remember the random start."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, mean in average.items():
        mean.lerp_(state[name].detach(), 1 - decay)


def is_slow_in_bf16() -> bool:
    """Whether this CPU has to imitate bfloat16: measured 60 times slower than float32 with AVX2 alone."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not fast
