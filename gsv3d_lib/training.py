"""The training loop that every stage shares: exact resume, atomic safetensors checkpoints, JSON-lines metrics.

A stage is an `nn.Module` with two methods (see `stages.py` and `distillation.py`):

    example(generator, shared, place) -> dict of tensors   one training example; ALL randomness comes from the generators
    forward(batch) -> (loss, metrics)                      the mean loss over a batch of stacked examples

The generator of an example is seeded by (seed, step, index in the global batch), and its place is the number of examples
before it. So a run that was killed at step k and resumed draws what the uninterrupted run draws, and two processes draw
what one process would.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .config import Schedule
from .errors import UserError
from .paths import atomic_path

PRECISIONS = ("auto", "fp32", "bf16")


class Stage(nn.Module):
    """Base of all stages: what the loop needs to know beyond `example` and `forward`."""

    def example(self, generator: torch.Generator, shared: torch.Generator, place: int) -> dict[str, Tensor]:
        """One training example; `shared` gives the draws that all examples of a step have in common.

        place: how many examples all steps and processes drew before this one, for data that comes in an order.
        """
        raise NotImplementedError

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: here every trainable parameter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

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
) -> list[dict]:
    """Train `stage` for `schedule.steps` steps, resuming from the last checkpoint in `run_dir` if there is one.

    stop_at: leave after this step with a checkpoint (the schedule stays that of the full run).
    precision: of matrix products, "fp32" or "bf16"; "auto" is bf16 on a GPU. Weights and sums stay in float32.
    processes: how many processes were asked for; a ValueError is raised if accelerate sees another number.
    Returns the metrics, one dict per logged step, which are also appended to `run_dir`/metrics.jsonl.
    The averaged weights (if `schedule.ema`) are in the stage when the function returns.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    use_cuda = torch.cuda.is_available()
    idle = DistributedDataParallelKwargs(find_unused_parameters=True)  # DINO's mask token, the VAE's middle attention
    if precision not in PRECISIONS:
        raise UserError(f"The precision is one of {', '.join(PRECISIONS)}; got {precision!r}.")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and use_cuda) else "no"
    accelerator = Accelerator(cpu=not use_cuda, mixed_precision=mixed, kwargs_handlers=[idle])
    if accelerator.num_processes != processes:
        raise UserError(
            f"{processes} processes were asked for, but {accelerator.num_processes} are running; start them with "
            f"`torchrun --standalone --nproc_per_node {processes} -m gsv3d_lib.train --processes {processes} ...`."
        )
    if schedule.batch % processes:
        raise UserError(f"A batch of {schedule.batch} cannot be shared equally by {processes} processes.")
    run_dir = Path(run_dir)
    stage.to(accelerator.device)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    wrapped, optimizer = accelerator.prepare(stage, optimizer)
    average = {name: p.detach().clone() for name, p in stage.training_state().items()} if schedule.ema else {}
    start = load_checkpoint(run_dir, stage, optimizer, average)
    check_same_start(accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist(), run_dir)
    history = read_metrics(run_dir, before=start)
    if accelerator.is_main_process:
        write_metrics(run_dir, history)

    last = min(schedule.steps, stop_at or schedule.steps)
    saved = time.monotonic()
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
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):  # a step with it would ruin the weights, and the next checkpoint with them
            raise UserError(f"The gradient of step {step} is {float(norm)}; lower the learning rate and resume.")
        optimizer.step()
        stage.after_step(step, schedule.steps)
        update_average(average, stage.training_state(), schedule.ema, step)
        if step % log_every == 0 or step == last - 1:
            values = {"loss": values.pop("loss"), "grad_norm": norm, **values}
            names = list(values)
            stacked = torch.stack([torch.as_tensor(values[n], device=accelerator.device).float() for n in names])
            means = accelerator.reduce(stacked.detach(), "mean").tolist()
            history.append({"step": step, "time": round(time.time(), 1), **dict(zip(names, means))})
            bar.set_postfix_str(" ".join(f"{n} {v:.4g}" for n, v in zip(names, means)))
            if accelerator.is_main_process:
                append_metrics(run_dir, history[-1])
        if time.monotonic() - saved > 60 * checkpoint_minutes and accelerator.is_main_process:
            save_checkpoint(run_dir, step + 1, stage, optimizer, average)
            saved = time.monotonic()
    if accelerator.is_main_process and last > start:
        save_checkpoint(run_dir, last, stage, optimizer, average)
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


# ---------------------------------------------------------------- checkpoints: one safetensors file and one JSON each


def save_checkpoint(run_dir: Path, step: int, stage: Stage, optimizer, average: dict[str, Tensor]) -> None:
    """Write `run_dir`/checkpoint-STEP in full, then make it visible by one rename; keep the last two."""
    tensors = {f"state.{name}": value for name, value in stage.training_state().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f"checkpoint-{step:07d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})
    for old in list_checkpoints(run_dir)[:-2]:
        old.unlink()


def list_checkpoints(run_dir: Path) -> list[Path]:
    return sorted(Path(run_dir).glob("checkpoint-*.safetensors"))


def load_checkpoint(run_dir: Path, stage: Stage, optimizer=None, average: dict[str, Tensor] | None = None) -> int:
    """Restore the newest readable checkpoint of `run_dir`; returns the step to go on from, 0 if there is none.

    A truncated file (a full disk, a copy that broke off) is passed over for the one before it, with one line that says so.
    """
    for path in reversed(list_checkpoints(run_dir)):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                step = int(file.metadata()["step"])
        except Exception as error:  # safetensors raises its own type for a damaged header
            tqdm.write(f"{path} cannot be read ({error}); trying the checkpoint before it.")
            continue
        restore(tensors, "state.", stage.training_state(), path)
        restore(tensors, "average.", average or {}, path)
        if optimizer is not None:
            restore_optimizer(tensors, optimizer)
        return step
    return 0


@torch.no_grad()
def restore(tensors: dict[str, Tensor], prefix: str, targets: dict[str, Tensor], path: Path) -> None:
    """Copy tensors[prefix + name] into targets[name], with one clear sentence when they do not fit."""
    for name, target in targets.items():
        value = tensors.get(prefix + name)
        if value is None or value.shape != target.shape:
            have = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
            raise UserError(
                f"{path} does not fit this model: {name} should be {tuple(target.shape)}, the file has {have}. "
                "Use the configuration it was trained with, or another run folder."
            )
        target.copy_(value)


def restore_optimizer(tensors: dict[str, Tensor], optimizer) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---------------------------------------------------------------- metrics


def read_metrics(run_dir: Path, before: int | None = None) -> list[dict]:
    """The logged rows of a run, in order; with `before`, only those of earlier steps."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    return [row for row in rows if before is None or row["step"] < before]


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be half written
    return rows


def write_metrics(run_dir: Path, rows: list[dict]) -> None:
    with atomic_path(Path(run_dir) / "metrics.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def append_metrics(run_dir: Path, row: dict) -> None:
    with open(Path(run_dir) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
