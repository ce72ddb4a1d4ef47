"""The training loop that every stage shares: exact resume, atomic safetensors checkpoints, JSON-lines metrics.

A stage is an `nn.Module` with two methods (see `stages.py` and `distillation.py`):

    example(generator, shared, place) -> dict of tensors   one training example; ALL randomness comes from the generators
    forward(batch) -> (loss, metrics)                      the mean loss over a batch of stacked examples

The generator of an example is seeded by (seed, step, index in the global batch), and its place is the number of examples
before it. So a run that was killed at step k and resumed draws what the uninterrupted run draws, and two processes draw
what one process would.

A checkpoint states what made it, its `run_identity`. A run that would go on from it with anything else is refused; only
the number of steps may grow, and then the learning rate follows the new schedule from there on. One training at a time
works in a run folder. Ctrl-C and SIGTERM end it after the step, with a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .config import VALUES, Schedule, shown
from .data.examples import digest
from .system.errors import UserError
from .system.paths import atomic_path, check_readable, reason, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PRECISIONS = ("auto", "fp32", "bf16")
CLIP_NORM = 1.0  # gradients longer than this are shortened to it
RUN_FORMAT = 1  # of what a checkpoint states about its run


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
            save_checkpoint(run_dir, done, stage, optimizer, average, identity)
            saved = time.monotonic()
    if accelerator.is_main_process and done > start:
        save_checkpoint(run_dir, done, stage, optimizer, average, identity)
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


# ---------------------------------------------------------------- one training at a time, and how it is stopped


@contextmanager
def only_training(run_dir: Path, first: bool) -> Iterator[None]:
    """While the block runs no other process trains in `run_dir`. Raises UserError where one does.

    The system gives the lock back when its process ends, however it ends. first: of several processes of one training,
    only the first takes it. Windows, and file systems without locks, go without.
    """
    if not first:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "training.lock", "a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"Another training works in {run_dir} ({file.read(200).strip() or 'just started'}): wait until it ends, "
                "or name another folder."
            ) from None
        except OSError:  # ENOLCK, ENOSYS, ...: a network file system that cannot
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        remove_leftovers(run_dir, alone=fcntl is not None)
        yield


class Signals:
    """Ctrl-C and SIGTERM while the block runs: noted, and answered between two steps, where all weights are whole.

    Only the main thread may listen; in another, and where a signal is ignored on purpose (nohup), nothing changes. A
    second Ctrl-C does not wait. Afterwards the handlers are those of before.
    """

    def __init__(self):
        self.noted, self.before = 0, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        if number == self.noted == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or number

    def of_any_process(self, accelerator) -> int:
        """The signal that a process of this training has got, 0 for none: all of them leave after the same step."""
        if accelerator.num_processes == 1:
            return self.noted
        return int(accelerator.gather(torch.tensor([self.noted], device=accelerator.device)).max())


def leave(number: int, run_dir: Path, step: int, first: bool) -> None:
    """End a training that a signal stopped: KeyboardInterrupt for Ctrl-C, SystemExit with 128 + 15 for SIGTERM."""
    kept = f"{run_dir} holds its {step} steps" if step else "it had done no step"
    sentence = f"the training was stopped; {kept}, and the same command goes on from there."
    if number == signal.SIGINT:
        raise KeyboardInterrupt(sentence)
    if first:
        print(f"gsv3d: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


# ---------------------------------------------------------------- what made a checkpoint


def run_identity(stage: Stage, schedule: Schedule, seed: int, mixed_precision: str) -> dict[str, object]:
    """What a run is made of, by name, as JSON has it. Not: micro batches and processes, which change no result."""
    facts = {"steps": schedule.steps, "batch": schedule.batch, "lr": schedule.lr, "warmup": schedule.warmup}
    facts |= {"weight_decay": schedule.weight_decay, "ema": schedule.ema, "seed": seed}
    facts |= {"precision": "bf16" if mixed_precision == "bf16" else "fp32"}
    return json.loads(json.dumps({"format": RUN_FORMAT} | facts | stage.identity()))


def check_identity(stored: dict, identity: dict, step: int, path: Path, force: bool, first: bool) -> None:
    """Raises UserError, with every difference by name, where a checkpoint is of another run than the one that begins.

    The number of steps may be larger than planned before. A checkpoint beyond it is refused whatever `force` says, and so
    is one of a later version. One that states nothing, of an earlier version, is taken as far as its tensors fit.
    """
    steps = identity["steps"]
    if step > steps:
        raise UserError(f"{path} holds step {step}, beyond the {steps} steps asked for: ask for {step} or more.")
    if not stored:
        if first:
            tqdm.write(f"{path} is of an earlier version and does not state its settings; they are not compared.")
        return
    if stored["format"] > RUN_FORMAT:
        raise UserError(f"{path} was written by a later version of this program: go on with that one.")
    unlike = {name: (old, identity[name]) for name, old in stored.items() if identity.get(name, old) != old}
    if stored["steps"] < steps:
        del unlike["steps"]
        if first:
            tqdm.write(f"{path} was planned with {stored['steps']} steps; the learning rate now follows {steps}.")
    if not unlike:
        return
    listed = [f"{name} {shown(old)} -> {shown(new)}" for name, (old, new) in unlike.items()]
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    differences = f"{', '.join(listed[:6])}{more}"
    if not force:
        raise UserError(
            f"{path} is of another run: {differences}. Give its settings, another folder, or --force-resume "
            "(force_resume=True) to go on all the same."
        )
    if first:
        tqdm.write(f"Going on from {path} all the same: {differences}.")


# ---------------------------------------------------------------- checkpoints: one safetensors file each


def save_checkpoint(
    run_dir: Path, step: int, stage: Stage, optimizer, average: dict[str, Tensor], identity: dict
) -> None:
    """Write `run_dir`/checkpoint-STEP in full, then make it visible by one rename; keep the last two."""
    tensors = {f"state.{name}": value for name, value in stage.training_state().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    statement = {"step": str(step), "tensors": str(len(tensors)), "run": json.dumps(identity)}
    path = run_dir / f"checkpoint-{step:07d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=statement)
    for old in list_checkpoints(run_dir)[:-2]:
        old.unlink()


def list_checkpoints(run_dir: Path) -> list[Path]:
    return sorted(Path(run_dir).glob("checkpoint-*.safetensors"))


def load_checkpoint(
    run_dir: Path,
    stage: Stage,
    optimizer=None,
    average: dict[str, Tensor] | None = None,
    identity: dict | None = None,
    force: bool = False,
    first: bool = True,
) -> int:
    """Restore the newest readable checkpoint of `run_dir`; returns the step to go on from, 0 if there is none.

    A damaged file (a full disk, a copy that broke off) is passed over for the one before it, with one line that says so;
    its name then ends in .damaged.
    identity: of the run that begins, which the file's must be, see `check_identity`.
    Raises UserError where none can be read, and where the file is of another run or another model.
    """
    paths = list_checkpoints(run_dir)
    for path in reversed(paths):
        check_readable(path)
        try:
            tensors, step, stored = read_checkpoint(path)
        except Exception as error:  # safetensors raises its own type for a damaged header
            tqdm.write(f"{path} cannot be read ({reason(error)}); trying the checkpoint before it.")
            continue
        if identity is not None:
            check_identity(stored, identity, step, path, force, first)
        restore(tensors, "state.", stage.training_state(), path)
        restore(tensors, "average.", average or {}, path)
        if optimizer is not None:
            restore_optimizer(tensors, optimizer, path)
        for later in paths[paths.index(path) + 1 :] if first else ():  # else they would count as the last two
            later.rename(later.with_suffix(".damaged"))
        return step
    if paths:
        raise UserError(
            f"No checkpoint in {run_dir} can be read: delete them to train from the start, or copy them again."
        )
    return 0


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int, dict]:
    """Tensors, step and `run_identity` ({} where it states none) of a checkpoint. Raises ValueError for nonsense."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a handle is no dict
        metadata = file.metadata()
    step, stored = int(metadata["step"]), json.loads(metadata.get("run", "{}"))
    if path.stem != f"checkpoint-{step:07d}" or step < 1:
        raise UserError(f"it says that it holds step {step}")
    if int(metadata.get("tensors", len(tensors))) != len(tensors):
        raise UserError(f"it holds {len(tensors)} tensors, not {metadata['tensors']}")
    if stored and not all(isinstance(stored.get(name), int) for name in ("format", "steps")):
        raise UserError("what it states of its run is no such statement")
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise UserError(f"{bad[0]} holds numbers that are not finite")
    return tensors, step, stored


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


def restore_optimizer(tensors: dict[str, Tensor], optimizer, path: Path) -> None:
    """AdamW's averages of every parameter that has had a gradient. Raises UserError where they do not fit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if found := re.fullmatch(r"optimizer\.(\d+)\.(\w+)", name):
            state.setdefault(int(found[1]), {})[found[2]] = value
    for index, slots in state.items():
        shapes = {slot: value.shape for slot, value in slots.items()}
        shape = parameters[index].shape if index < len(parameters) else None
        if shapes != {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}:
            raise UserError(
                f"{path} does not fit this model: its optimizer state {index} is another parameter's. Use the configuration "
                "it was trained with, or another run folder."
            )
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
