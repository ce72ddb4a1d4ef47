"""The folder of one training run: its checkpoints, what made them, and its metrics.

    checkpoint-0000400.safetensors   weights, averages, optimiser; the last two are kept
    metrics.jsonl                    one row per logged step
    training.lock                    held by the process that trains here

A checkpoint states what made it, its `run_identity`. A run that would go on from it
with anything else is refused. Only the number of steps may grow; the learning rate then
follows the new schedule from there on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from ..config import Schedule
from ..system.arguments import shown
from ..system.errors import UserError
from ..system.paths import atomic_path, check_readable, reason

if TYPE_CHECKING:
    from ..training import Stage

LONGEST = 1e9  # seconds, thirty years
RUN_FORMAT = 1  # of what a checkpoint states about its run


def run_identity(
    stage: Stage, schedule: Schedule, seed: int, mixed_precision: str
) -> dict[str, object]:
    """What a run is made of, by name, as JSON: all that can change its result."""
    facts: dict[str, object] = {"format": RUN_FORMAT}
    for name in ("steps", "batch", "lr", "warmup", "weight_decay", "ema"):
        facts[name] = getattr(schedule, name)
    facts["seed"] = seed
    facts["precision"] = "bf16" if mixed_precision == "bf16" else "fp32"
    return json.loads(json.dumps(facts | stage.identity()))


def check_identity(
    stored: dict, identity: dict, step: int, path: Path, force: bool, first: bool
) -> None:
    """UserError, with every difference by name, for a checkpoint of another run.

    The number of steps may be larger than planned before. A checkpoint beyond it is
    refused whatever `force` says, and so is one of a later version. One that states
    nothing, of an earlier version, is taken as far as its tensors fit.
    """
    say = tqdm.write if first else lambda text: None  # one process speaks for all
    steps = identity["steps"]
    if step > steps:
        raise UserError(
            f"{path} holds step {step}, beyond the {steps} steps asked for: ask for {step} or more."
        )
    if not stored:
        return say(f"{path}, of an earlier version, does not state its settings: none is compared.")
    if stored["format"] > RUN_FORMAT:
        raise UserError(f"{path} is of a later version of this program: go on with that one.")
    if stored["steps"] < steps:
        planned = f"was planned with {stored['steps']} steps"
        say(f"{path} {planned}; the learning rate now follows {steps}.")
        stored = stored | {"steps": steps}
    listed = [
        f"{name} {shown(old)} -> {shown(identity[name])}"
        for name, old in stored.items()
        if identity.get(name, old) != old
    ]
    if not listed:
        return
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    differences = f"{', '.join(listed[:6])}{more}"
    if not force:
        raise UserError(
            f"{path} is of another run: {differences}. Give its settings, another folder, or "
            "--force-resume (force_resume=True) to go on all the same."
        )
    say(f"Going on from {path} all the same: {differences}.")


def save_checkpoint(
    run_dir: Path,
    step: int,
    stage: Stage,
    optimizer: Optimizer,
    average: dict[str, Tensor],
    identity: dict,
    seconds: float = 0.0,
) -> None:
    """Write `run_dir`/checkpoint-STEP in full or not at all; keep the last two.

    seconds: of training that the run has had.
    """
    tensors = {f"state.{name}": value for name, value in stage.training_state().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    statement = {"step": str(step), "tensors": str(len(tensors)), "seconds": f"{seconds:.3f}"}
    statement["run"] = json.dumps(identity)
    run_dir.mkdir(parents=True, exist_ok=True)
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
    optimizer: Optimizer | None = None,
    average: dict[str, Tensor] | None = None,
    identity: dict | None = None,
    force: bool = False,
    first: bool = True,
) -> int:
    """Restore the newest readable checkpoint; returns the step to go on from, or 0.

    A damaged file (a full disk, a copy that broke off) is passed over for the one
    before it, with one line that says so; its name then ends in .damaged.
    identity: of the run that begins, which the file's must be, see `check_identity`.
    Raises UserError where none can be read, or the file is of another run or model.
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
        for later in paths[paths.index(path) + 1 :] if first else ():
            # with their old names they would count as the last two
            later.rename(later.with_suffix(".damaged"))
        return step
    if paths:
        raise UserError(
            f"No checkpoint in {run_dir} can be read: "
            "delete them to train from the start, or copy them again."
        )
    return 0


def trained_seconds(run_dir: Path, step: int) -> float:
    """Seconds of training behind a step's checkpoint; 0 where it does not say."""
    path = Path(run_dir) / f"checkpoint-{step:07d}.safetensors"
    if not path.is_file():
        return 0.0
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("seconds", "0")
    try:
        return min(max(0.0, float(text)), LONGEST)  # NaN becomes 0
    except ValueError:
        return 0.0


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int, dict]:
    """Tensors, step and `run_identity` (or {}); an error for what is nonsense."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    step, stored = int(metadata["step"]), json.loads(metadata.get("run", "{}"))
    if path.stem != f"checkpoint-{step:07d}" or step < 1:
        raise UserError(f"it says that it holds step {step}")
    if int(metadata.get("tensors", len(tensors))) != len(tensors):
        raise UserError(f"it holds {len(tensors)} tensors, not {metadata['tensors']}")
    if stored and not all(isinstance(stored.get(name), int) for name in ("format", "steps")):
        raise UserError("what it states of its run is no such statement")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds numbers that are not finite")
    return tensors, step, stored


@torch.no_grad()
def restore(
    tensors: dict[str, Tensor], prefix: str, targets: dict[str, Tensor], path: Path
) -> None:
    """Copy tensors[prefix + name] into targets[name]; UserError if they do not fit."""
    for name, target in targets.items():
        value = tensors.get(prefix + name)
        if value is None or value.shape != target.shape:
            have = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
            raise misfit(path, f"{name} should be {tuple(target.shape)}, the file has {have}")
        target.copy_(value)


def misfit(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} does not fit this model: {why}. "
        "Use the configuration it was trained with, or another run folder."
    )


def restore_optimizer(tensors: dict[str, Tensor], optimizer: Optimizer, path: Path) -> None:
    """AdamW's averages of every parameter that has had a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if found := re.fullmatch(r"optimizer\.(\d+)\.(\w+)", name):
            state.setdefault(int(found[1]), {})[found[2]] = value
    for index, slots in state.items():
        shapes = {slot: value.shape for slot, value in slots.items()}
        shape = parameters[index].shape if index < len(parameters) else None
        if shapes != {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}:
            raise misfit(path, f"its optimizer state {index} is another parameter's")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_metrics(run_dir: Path, before: int | None = None) -> list[dict]:
    """The logged rows of a run, in order; with `before` only earlier steps."""
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
