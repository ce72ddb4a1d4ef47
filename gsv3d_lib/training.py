"""The training loop that every stage shares: exact resume, atomic safetensors
checkpoints, JSON-lines metrics.

A stage is an `nn.Module` with two methods (see `stages.py` and `distillation.py`):

    example(generator, shared, place) -> dict of tensors   one training example; ALL randomness comes from the generators
    forward(batch) -> (loss, metrics)                      the mean loss over a batch of stacked examples

The generator of an example is seeded by (seed, step, index in the global batch), and
its place is the number of examples before it. So a run that was killed at step k and
resumed draws what the uninterrupted run draws, and two processes draw what one process
would.

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

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import VALUES, Schedule
from .data.examples import digest
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

PRECISIONS = ("auto", "fp32", "bf16")
BETAS = (0.9, 0.99)  # of AdamW
CLIP_NORM = 1.0  # gradients longer than this are shortened to it


class Stage(nn.Module):
    """Base of all stages: what the loop needs to know beyond `example` and `forward`."""

    # patterns of the names of what a run takes from `config`, beside its schedule
    FIELDS: tuple[str, ...] = ()

    def example(
        self, generator: torch.Generator, shared: torch.Generator, place: int
    ) -> dict[str, Tensor]:
        """One training example; `shared` gives the draws that all examples of a step
        have in common.

        place: how many examples all steps and processes drew before this one, for data
            that comes in an order.
        """
        raise NotImplementedError

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: here every trainable parameter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def identity(self) -> dict[str, object]:
        """What makes a run of this stage this run, by name: configuration, data, frozen
        models. JSON values.
        """
        config, data = (
            getattr(self, "config", None),
            getattr(self, "orbits", getattr(self, "views", None)),
        )
        fields = vars(config).items() if self.FIELDS else ()
        matters = [
            pair for pair in fields if any(fnmatch(pair[0], pattern) for pattern in self.FIELDS)
        ]
        facts = {name: value for name, value in matters if not isinstance(value, Schedule)}
        own = self.training_state()
        frozen = {n: p for n, p in self.named_parameters() if not p.requires_grad and n not in own}
        facts |= {"data": data.fingerprint()} if data is not None else {}
        facts |= {"frozen models": digest(frozen)[:12]} if frozen else {}
        return facts

    def products(self) -> dict[str, nn.Module]:
        """The trained models by the name of their folder in a checkpoint; asked for
        once, after the last step.
        """
        raise NotImplementedError

    def after_step(self, step: int, steps: int) -> None:
        """Called after every optimiser step, for example to move a teacher towards its
        student.
        """


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes of the run; the tensor itself where there
    is one.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def example_generator(seed: int, step: int, index: int) -> torch.Generator:
    """The random numbers of one training example, a pure function of its place in the
    run.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + index)


def draw_batch(
    stage: Stage, seed: int, step: int, batch: int, rank: int = 0, world: int = 1
) -> dict[str, Tensor]:
    """Process `rank`'s share of the global batch of this step: examples rank, rank +
    world, ..., stacked.
    """
    shared = batch  # its index is that of no example
    examples = [
        stage.example(
            example_generator(seed, step, index),
            example_generator(seed, step, shared),
            place=step * batch + index,
        )
        for index in range(rank, batch, world)
    ]
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def learning_rate(step: int, schedule: Schedule, spent: float = 0.0) -> float:
    """Linear warm-up, then a half cosine from lr to lr / 10.

    A function of the step alone, so resuming is exact; where the time is limited,
    `spent` is the fraction of it that is gone, and the cosine follows what is further.
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

    def fraction(self, accelerator) -> float:
        """How much of the limit is spent, 0 without one; the same in all processes of a
        run.
        """
        if not self.limit:
            return 0.0
        spent = torch.tensor([self.seconds / self.limit], device=accelerator.device)
        return float(accelerator.gather(spent).max())


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
    """Train `stage` for `schedule.steps` steps, resuming from the last checkpoint in
    `run_dir` if there is one.

    Raises UserError where that checkpoint is of another run, see `check_identity`, and
    where another process trains in `run_dir`. After Ctrl-C and SIGTERM there is a
    checkpoint of the last step, and KeyboardInterrupt or SystemExit (143) is raised.

    stop_at: leave after this step with a checkpoint (the schedule stays that of the
        full run).
    minutes: of training in all, earlier runs in this folder included; 0 is without
        limit. The learning rate follows the share of them that is spent, and the run
        ends with them, or after `schedule.steps` where those are done before.
    precision: of matrix products, "fp32" or "bf16"; "auto" is bf16 on a GPU. Weights
        and sums stay in float32.
    force_resume: go on from a checkpoint of another run all the same, as far as its
        tensors fit.
    processes: how many processes were asked for; a ValueError is raised if accelerate
        sees another number.
    Returns the metrics, one dict per logged step, which are also appended to
    `run_dir`/metrics.jsonl. The averaged weights (if `schedule.ema`) are in the stage
    when the function returns.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    use_cuda = torch.cuda.is_available()
    # DINO's mask token, the VAE's middle attention
    idle = DistributedDataParallelKwargs(find_unused_parameters=True)
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
            f"`torchrun --standalone --nproc_per_node {processes} -m gsv3d_lib train --gpus {processes} ...`."
        )
    if schedule.batch % processes:
        raise UserError(
            f"A batch of {schedule.batch} cannot be shared equally by {processes} processes."
        )
    if mixed == "bf16" and not use_cuda and accelerator.is_main_process and is_slow_in_bf16():
        print(
            "This CPU has no instructions for bfloat16, in which it trains tens of times slower: take fp32.",
            flush=True,
        )
    if not (math.isfinite(minutes) and minutes >= 0):
        raise UserError(f"The minutes of a training are a number of 0 or more; got {minutes}.")
    with only_training(Path(run_dir), accelerator.is_main_process), Signals() as signals:
        run = Run(stage, schedule, Path(run_dir), accelerator, seed, minutes, force_resume)
        last = min(schedule.steps, stop_at or schedule.steps)
        stopped = run.go(last, signals, checkpoint_minutes, log_every, progress)
        run.finish(stopped or signals.of_any_process(accelerator))
    return run.history


class Run:
    """A training under way: what `train` sets up, the steps, and what they leave on the
    disk.
    """

    def __init__(
        self,
        stage: Stage,
        schedule: Schedule,
        folder: Path,
        accelerator,
        seed: int,
        minutes: float,
        force: bool,
    ):
        """Puts the stage on the device and restores the newest checkpoint of the
        folder.
        """
        self.stage, self.schedule, self.folder = stage.to(accelerator.device), schedule, folder
        self.accelerator, self.seed = accelerator, seed
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.lr, betas=BETAS, weight_decay=schedule.weight_decay
        )
        self.wrapped, self.optimizer = accelerator.prepare(stage, optimizer)
        self.average = {}
        if schedule.ema:
            self.average = {name: p.detach().clone() for name, p in stage.training_state().items()}
        self.identity = run_identity(stage, schedule, seed, accelerator.mixed_precision)
        first = accelerator.is_main_process
        self.start = load_checkpoint(
            folder, stage, self.optimizer, self.average, self.identity, force, first
        )
        starts = accelerator.gather(torch.tensor([self.start], device=accelerator.device)).tolist()
        check_same_start(starts, folder)
        self.done = self.start
        self.watch = Stopwatch(trained_seconds(folder, self.start), minutes)
        self.history = read_metrics(folder, before=self.start)
        if first:
            write_metrics(folder, self.history)

    def go(
        self, last: int, signals: Signals, checkpoint_minutes: float, log_every: int, progress: bool
    ) -> int:
        """Steps until `last`, until the time is up or until a signal comes, which is
        returned (0 for none).
        """
        first, values = self.accelerator.is_main_process, {}
        total = None if self.watch.limit else last
        bar = tqdm(
            range(self.start, last),
            initial=self.start,
            total=total,
            desc=self.folder.name,
            disable=not (progress and first),
            mininterval=5,
        )
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
        """One optimiser step; returns the loss, the length of the gradient, and the
        stage's metrics.
        """
        device, schedule = self.accelerator.device, self.schedule
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        batch = draw_batch(self.stage, self.seed, step, schedule.batch, *ranks)
        batch = {key: value.to(device) for key, value in batch.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule, spent)
        self.optimizer.zero_grad(set_to_none=True)
        values = self.gradients(micro_batches(batch, schedule.micro_batch), step)
        norm = self.accelerator.clip_grad_norm_(self.parameters, CLIP_NORM)
        # a step with it would ruin the weights, and the next checkpoint with them
        check_finite(norm, "gradient", step)
        self.optimizer.step()
        self.stage.after_step(step, expected_steps(step, schedule.steps, spent))
        update_average(self.average, self.stage.training_state(), schedule.ema, step)
        return {"loss": values.pop("loss"), "grad_norm": norm, **values}

    def gradients(
        self, parts: list[tuple[float, dict[str, Tensor]]], step: int
    ) -> dict[str, Tensor]:
        """Add up the gradients of a batch in parts; returns the means of loss and
        metrics.
        """
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
        names, device = list(values), self.accelerator.device
        stacked = torch.stack([torch.as_tensor(values[n], device=device).float() for n in names])
        means = self.accelerator.reduce(stacked.detach(), "mean").tolist()
        self.history.append(
            {"step": step, "time": round(time.time(), 1), **dict(zip(names, means))}
        )
        if self.accelerator.is_main_process:
            append_metrics(self.folder, self.history[-1])
        return " ".join(f"{n} {v:.4g}" for n, v in zip(names, means))

    def save(self) -> None:
        seconds = self.watch.seconds
        save_checkpoint(
            self.folder, self.done, self.stage, self.optimizer, self.average, self.identity, seconds
        )

    def end_of_time(self, values: dict[str, Tensor]) -> None:
        """Log the last step, which nobody knew to be the last; say so where there was
        none.
        """
        if self.done > self.start and self.history[-1]["step"] != self.done - 1:
            self.log(self.done - 1, values)
        if self.done == self.start and self.accelerator.is_main_process:
            limit = f"{self.watch.limit / 60:g} minutes"
            tqdm.write(f"{self.folder} has trained for {limit} already; ask for more to go on.")

    def finish(self, stopped: int) -> None:
        """A checkpoint of the last step; then leave where a signal came, else put the
        averages into the stage.
        """
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
        raise UserError(
            f"The {what} of step {step} is {value.item()}; lower the learning rate and resume."
        )


def expected_steps(step: int, steps: int, spent: float) -> int:
    """How many steps a run will have: `steps`, or what the spent share of its time
    suggests.
    """
    return min(steps, max(step + 1, round(step / spent))) if spent else steps


def check_same_start(starts: list[int], run_dir: Path) -> None:
    """Raises ValueError where the processes resume from different steps, which a folder
    that is not shared leads to.
    """
    if len(set(starts)) > 1:
        raise UserError(
            f"The processes found different checkpoints in {run_dir} (steps {', '.join(map(str, starts))}); the run folder "
            "must lie on a file system that all machines share."
        )


def micro_batches(batch: dict[str, Tensor], size: int = 0) -> list[tuple[float, dict[str, Tensor]]]:
    """A batch in parts of at most `size` examples, each with its share of the whole; 0
    leaves it in one part.

    Losses are means over examples, so gradients of share * loss add up to those of the
    whole batch.
    """
    total = len(next(iter(batch.values())))
    size = size or total
    parts = [
        {key: value[i : i + size] for key, value in batch.items()} for i in range(0, total, size)
    ]
    return [(len(next(iter(part.values()))) / total, part) for part in parts]


@torch.no_grad()
def update_average(
    average: dict[str, Tensor], state: dict[str, Tensor], decay: float, step: int
) -> None:
    """Exponential moving average with a warm-up, so that early averages do not remember
    the random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    if average:
        torch._foreach_lerp_(
            list(average.values()), [state[name].detach() for name in average], 1 - decay
        )


def is_slow_in_bf16() -> bool:
    """Whether this CPU has to imitate bfloat16: measured 60 times slower than float32
    with AVX2 alone.
    """
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not fast
