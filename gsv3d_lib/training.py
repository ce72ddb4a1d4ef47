"""The training loop that every stage shares: exact resume, atomic checkpoints, metrics.

A stage is an `nn.Module` with two methods (`pretraining.py`, `stage1.py`,
`distillation.py`):

    example(generator, shared, place)   one training example, all its randomness
                                        from the generators
    forward(batch) -> (loss, metrics)   the mean loss over a batch of examples

The generator of an example is seeded by (seed, step, index in the global batch), and
its place is the number of examples before it. So a run that was killed and resumed
draws what the uninterrupted run draws, and two processes draw what one would.

Checkpoints and metrics are those of `weights/run_folder.py`. One training at a time
works in a run folder; Ctrl-C and SIGTERM end it after the step, with a checkpoint
(`system/process.py`).
"""

from __future__ import annotations

import math
import platform
import time
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import VALUES, Config, Schedule
from .data.examples import Example, digest
from .system.arguments import shown
from .system.errors import UserError
from .system.process import Signals, leave, only_training
from .weights.run_folder import (
    append_metrics,
    load_checkpoint,
    read_metrics,
    run_identity,
    save_checkpoint,
    trained_seconds,
    write_metrics,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = ("auto", "fp32", "bf16")
BETAS = (0.9, 0.99)  # of AdamW
CLIP_NORM = 1.0  # gradients longer than this are shortened to it


class Stage(nn.Module):
    """Base of all stages: what the loop needs beyond `example` and `forward`."""

    # what a run takes from `config` beside its schedule, as patterns of names
    FIELDS: tuple[str, ...] = ()
    config: Config

    def example(self, generator: torch.Generator, shared: torch.Generator, place: int) -> Example:
        """One training example; `shared` draws what a step's examples have in common.

        place: how many examples all steps and processes drew before this one.
        """
        raise NotImplementedError

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: here every trainable parameter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def identity(self) -> dict[str, object]:
        """What makes a run this run: configuration, data, frozen models, as JSON."""
        data = getattr(self, "orbits", getattr(self, "views", None))
        fields = vars(self.config) if self.FIELDS else {}
        facts = {
            name: value
            for name, value in fields.items()
            if any(fnmatch(name, pattern) for pattern in self.FIELDS)
            and not isinstance(value, Schedule)
        }
        if data is not None:
            facts["data"] = data.fingerprint()
        own = self.training_state()
        others = [(n, p) for n, p in self.named_parameters() if not p.requires_grad]
        frozen: dict[str, Tensor] = {n: p for n, p in others if n not in own}
        if frozen:
            facts["frozen models"] = digest(frozen)[:12]
        return facts

    def products(self) -> dict[str, nn.Module]:
        """The trained models by folder of a checkpoint; asked for once, at the end."""
        raise NotImplementedError

    def after_step(self, step: int, steps: int) -> None:
        """Called after every optimiser step, for example to move a teacher."""


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes of the run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def example_generator(seed: int, step: int, index: int) -> torch.Generator:
    """The random numbers of one training example, by its place in the run alone.

    No two examples share a seed: an index is at most 65,535, so the factor 65,537 keeps
    the steps apart, and 1,000,003 the runs of a million steps. For seeds up to 10^8 the
    sum is below 2^63, which is what torch takes (`config.VALUES` holds these limits).
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + index)


def draw_batch(
    stage: Stage, seed: int, step: int, batch: int, rank: int = 0, world: int = 1
) -> dict[str, Tensor]:
    """Process `rank`'s share of a step's batch: examples rank, rank + world, ..."""
    examples: list[Any] = []
    for index in range(rank, batch, world):
        own = example_generator(seed, step, index)
        shared = example_generator(seed, step, batch)  # `batch` is the index of no example
        examples.append(stage.example(own, shared, place=step * batch + index))
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def learning_rate(step: int, schedule: Schedule, spent: float = 0.0) -> float:
    """Linear warm-up, then a half cosine from lr to lr / 10.

    A function of the step alone, so resuming is exact. Where the time is limited,
    `spent` is the fraction that is gone, and the cosine follows whichever is further.
    """
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    progress = min(1.0, max(progress, spent))
    return schedule.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class Stopwatch:
    """Seconds that a run has trained, those before it was resumed included.

    minutes: when the run ends; 0 is without limit.
    """

    now = staticmethod(time.monotonic)  # tests have a clock of their own

    def __init__(self, before: float = 0.0, minutes: float = 0.0):
        self.limit = 60 * minutes
        self.start = self.now() - before

    @property
    def seconds(self) -> float:
        return self.now() - self.start

    def fraction(self, accelerator: Accelerator) -> float:
        """Share of the limit that is spent, equal in all processes; 0 without one."""
        if not self.limit:
            return 0.0
        spent = torch.tensor([self.seconds / self.limit], device=accelerator.device)
        return float(cast(Tensor, accelerator.gather(spent)).max())


def train(
    stage: Stage,
    schedule: Schedule,
    run_dir: str | Path,
    *,
    seed: int = 0,
    stop_at: int | None = None,
    minutes: float = 0.0,
    checkpoint_minutes: float = 3.0,
    log_every: int = 20,
    progress: bool = True,
    processes: int = 1,
    precision: str = "auto",
    force_resume: bool = False,
) -> list[dict]:
    """Train `stage`, resuming from the last checkpoint in `run_dir` if there is one.

    stop_at: leave after this step with a checkpoint; the schedule stays the full run's.
    minutes: of training in all, earlier runs in this folder included; 0 is without
        limit. The learning rate follows the share of them that is spent, and the run
        ends with them, or after `schedule.steps` if those are done before.
    precision: of matrix products, "fp32" or "bf16"; "auto" is bf16 on a GPU. Weights
        and sums stay in float32.
    processes: how many were asked for; accelerate must see as many.
    force_resume: go on from a checkpoint of another run, as far as its tensors fit.
    Returns the metrics, one dict per logged step, which are also in metrics.jsonl. The
    averaged weights (if `schedule.ema`) are then in the stage. Raises UserError where
    the checkpoint is of another run (`run_folder.check_identity`) or another process
    trains in `run_dir`. After Ctrl-C and SIGTERM there is a checkpoint of the last
    step, and KeyboardInterrupt or SystemExit (143) is raised.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    use_cuda = torch.cuda.is_available()
    # DINO's mask token and the VAE's middle attention never get a gradient
    idle = DistributedDataParallelKwargs(find_unused_parameters=True)
    if precision not in PRECISIONS:
        raise UserError(f"The precision is one of {', '.join(PRECISIONS)}; got {precision!r}.")
    if seed not in VALUES["seed"]:
        raise UserError(f"The seed takes {VALUES['seed']}; got {shown(seed)}.")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and use_cuda) else "no"
    AcceleratorState._reset_state()  # a notebook's next training may take another one
    accelerator = Accelerator(cpu=not use_cuda, mixed_precision=mixed, kwargs_handlers=[idle])
    if accelerator.num_processes != processes:
        command = f"torchrun --standalone --nproc_per_node {processes} -m gsv3d_lib train"
        raise UserError(
            f"{processes} processes were asked for, but {accelerator.num_processes} are running; "
            f"start them with `{command} --gpus {processes} ...`."
        )
    if schedule.batch % processes:
        shared = f"cannot be shared equally by {processes} processes"
        raise UserError(f"A batch of {schedule.batch} {shared}.")
    if mixed == "bf16" and not use_cuda and accelerator.is_main_process and is_slow_in_bf16():
        slow = "This CPU has no instructions for bfloat16: it is tens of times slower; take fp32."
        print(slow, flush=True)
    if not (math.isfinite(minutes) and minutes >= 0):
        raise UserError(f"The minutes of a training are a number of 0 or more; got {minutes}.")
    with only_training(Path(run_dir), accelerator.is_main_process), Signals() as signals:
        run = Run(stage, schedule, Path(run_dir), accelerator, seed, minutes, force_resume)
        last = min(schedule.steps, stop_at or schedule.steps)
        stopped = run.go(last, signals, checkpoint_minutes, log_every, progress)
        run.finish(stopped or signals.of_any_process(accelerator))
    return run.history


class Run:
    """A training under way: its set-up, its steps, and what they leave on disk."""

    def __init__(
        self,
        stage: Stage,
        schedule: Schedule,
        folder: Path,
        accelerator: Accelerator,
        seed: int,
        minutes: float,
        force: bool,
    ):
        """Puts the stage on the device and restores the folder's newest checkpoint."""
        self.stage = stage.to(accelerator.device)
        self.schedule = schedule
        self.folder = folder
        self.accelerator = accelerator
        self.seed = seed
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        decay = schedule.weight_decay
        optimizer = torch.optim.AdamW(self.parameters, schedule.lr, BETAS, weight_decay=decay)
        self.wrapped, self.optimizer = accelerator.prepare(stage, optimizer)
        averaged = stage.training_state() if schedule.ema else {}
        self.average = {name: p.detach().clone() for name, p in averaged.items()}
        self.identity = run_identity(stage, schedule, seed, accelerator.mixed_precision)
        first = accelerator.is_main_process
        self.start = load_checkpoint(
            folder, stage, self.optimizer, self.average, self.identity, force, first
        )
        starts = accelerator.gather(torch.tensor([self.start], device=accelerator.device))
        check_same_start(cast(Tensor, starts).tolist(), folder)
        self.done = self.start
        self.watch = Stopwatch(trained_seconds(folder, self.start), minutes)
        self.history = read_metrics(folder, before=self.start)
        if first:
            write_metrics(folder, self.history)

    def go(
        self, last: int, signals: Signals, checkpoint_minutes: float, log_every: int, progress: bool
    ) -> int:
        """Steps until `last`, the end of the time, or a signal; returns it, or 0."""
        first = self.accelerator.is_main_process
        steps = range(self.start, last)
        total = None if self.watch.limit else last  # nobody knows how many fit in the time
        look = {"desc": self.folder.name, "disable": not (progress and first), "mininterval": 5}
        bar = tqdm(steps, initial=self.start, total=total, **look)
        values: dict[str, Tensor] = {}
        saved = time.monotonic()
        for step in bar:
            spent = self.watch.fraction(self.accelerator)
            if spent >= 1:
                self.end_of_time(values)
                break
            values = self.step(step, spent)
            self.done = step + 1
            if step % log_every == 0 or step == last - 1:
                bar.set_postfix_str(self.log(step, values))
            if stopped := signals.of_any_process(self.accelerator):
                return stopped
            if time.monotonic() - saved > 60 * checkpoint_minutes and first:
                self.save()
                saved = time.monotonic()
        return 0

    def step(self, step: int, spent: float) -> dict[str, Tensor]:
        """One optimiser step; returns loss, gradient's length and stage's metrics."""
        schedule = self.schedule
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        batch = draw_batch(self.stage, self.seed, step, schedule.batch, *ranks)
        batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule, spent)
        self.optimizer.zero_grad(set_to_none=True)
        values = self.gradients(micro_batches(batch, schedule.micro_batch), step)
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(self.parameters, CLIP_NORM))
        check_finite(norm, "gradient", step)  # before it ruins the weights and a checkpoint
        self.optimizer.step()
        self.stage.after_step(step, expected_steps(step, schedule.steps, spent))
        update_average(self.average, self.stage.training_state(), schedule.ema, step)
        return {"loss": values.pop("loss"), "grad_norm": norm, **values}

    def gradients(
        self, parts: list[tuple[float, dict[str, Tensor]]], step: int
    ) -> dict[str, Tensor]:
        """Add up the gradients of a batch in parts; returns mean loss and metrics."""
        values: dict[str, Tensor] = {}
        for number, (share, part) in enumerate(parts, start=1):
            is_last = number == len(parts)  # processes talk once a step
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                loss, metrics = self.wrapped(part)
                check_finite(loss, "loss", step)
                self.accelerator.backward(share * loss)
            for name, value in {"loss": loss, **metrics}.items():
                values[name] = values.get(name, 0) + share * value.detach()
        return values

    def log(self, step: int, values: dict[str, Tensor]) -> str:
        """Add a row to the metrics: means over all processes. Returns it in short."""
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(v, device=device).float() for v in values.values()])
        means = cast(Tensor, self.accelerator.reduce(stacked.detach(), "mean"))
        named = dict(zip(values, means.tolist()))
        self.history.append({"step": step, "time": round(time.time(), 1), **named})
        if self.accelerator.is_main_process:
            append_metrics(self.folder, self.history[-1])
        return " ".join(f"{name} {value:.4g}" for name, value in named.items())

    def save(self) -> None:
        state = self.stage, self.optimizer, self.average, self.identity
        save_checkpoint(self.folder, self.done, *state, self.watch.seconds)

    def end_of_time(self, values: dict[str, Tensor]) -> None:
        """Log the last step, which nobody knew to be the last; or say there is none."""
        if self.done > self.start and self.history[-1]["step"] != self.done - 1:
            self.log(self.done - 1, values)
        if self.done == self.start and self.accelerator.is_main_process:
            limit = f"{self.watch.limit / 60:g} minutes"
            tqdm.write(f"{self.folder} has trained for {limit} already; ask for more to go on.")

    def finish(self, stopped: int) -> None:
        """A last checkpoint; then leave after a signal, else put averages in place."""
        if self.accelerator.is_main_process and self.done > self.start:
            self.save()
        if stopped:
            leave(stopped, self.folder, self.done, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        with torch.no_grad():
            for name, p in self.stage.training_state().items():
                p.copy_(self.average.get(name, p))


def check_finite(value: Tensor, what: str, step: int) -> None:
    """Raises UserError where a loss or a gradient is no number."""
    if not torch.isfinite(value):
        found = f"The {what} of step {step} is {value.item()}"
        raise UserError(f"{found}; lower the learning rate and resume.")


def expected_steps(step: int, steps: int, spent: float) -> int:
    """How many steps a run will have: `steps`, or what its spent time suggests."""
    return min(steps, max(step + 1, round(step / spent))) if spent else steps


def check_same_start(starts: list[int], run_dir: Path) -> None:
    """Raises UserError where processes resume from different steps."""
    if len(set(starts)) > 1:
        raise UserError(
            f"The processes found different checkpoints in {run_dir} (steps "
            f"{', '.join(map(str, starts))}); the run folder must lie on a file system that all "
            "machines share."
        )


def micro_batches(batch: dict[str, Tensor], size: int = 0) -> list[tuple[float, dict[str, Tensor]]]:
    """A batch in parts of at most `size` examples, each with its share; 0 = one part.

    Losses are means over examples, so the gradients of share * loss add up to the
    batch's.
    """
    total = len(next(iter(batch.values())))
    size = size or total
    parts = []
    for start in range(0, total, size):
        part = {key: value[start : start + size] for key, value in batch.items()}
        parts.append((min(size, total - start) / total, part))
    return parts


@torch.no_grad()
def update_average(
    average: dict[str, Tensor], state: dict[str, Tensor], decay: float, step: int
) -> None:
    """Exponential moving average with a warm-up.

    So early averages do not remember the random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    if average:  # all tensors in one call: thousands of small ones take a while on a GPU
        targets = [state[name].detach() for name in average]
        torch._foreach_lerp_(list(average.values()), targets, 1 - decay)  # pyright: ignore


def is_slow_in_bf16() -> bool:
    """Whether this CPU imitates bfloat16: measured 60 times slower with AVX2 alone."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not fast
