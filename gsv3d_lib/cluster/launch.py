"""A whole training from a notebook: planned, started if asked for, watched to its end.

The notebooks' section "Full run" is one call of `launch`. It starts `gsv3d_lib.train`
in processes of its own, because a notebook's kernel can neither become several
processes nor be killed and resumed as a job can.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable

import torch
from tqdm import tqdm

from ..config import Config, preset
from ..stages import schedule_of
from ..system.paths import base
from ..weights.run_folder import read_metrics
from .job import check, check_request, run_folder, train_command, typed
from .plan import GB, PLANNED, plan

BAR_SECONDS = 60.0  # a progress bar that is redrawn all the time becomes a line a minute


def launch(
    scale: str,
    stages: list[str],
    data: list[str],
    gpus: int = 1,
    steps: int = 0,
    start: bool = False,
) -> dict[str, dict]:
    """Print the plan and the command of a training; with `start`, run it.

    data: dataset folders, or one folder of shards.
    gpus: processes of the training, one a device.
    steps: of each stage; 0 is the preset's schedule. Another number is a trial, in a
        folder of its own.
    Returns the last metrics of every stage. Raises UserError for what could not be
    trained, before anything starts; RuntimeError where the training ends with an error.
    """
    check_request(scale, stages, data, gpus)
    command = train_command(scale, stages, data, gpus, steps)
    print(report(preset(scale), stages, gpus))
    print("\n" + typed(command))
    if not start:
        print("Not started: set full_run = True, or give the runner a parameter set.")
        return {}
    out = run_folder(scale, steps)
    check(scale, stages, data, gpus, out)
    watch(command)
    curves = {stage: read_metrics(out / stage) for stage in stages}
    return {stage: rows[-1] for stage, rows in curves.items() if rows}


def report(config: Config, stages: list[str], gpus: int = 1) -> str:
    """A table of every stage: steps, memory in both precisions, and arithmetic."""
    numbers = f"{'GB bf16':>9}{'float32':>9}{'TFLOP/step':>12}{'PFLOP in all':>14}"
    lines = [f"{'stage':10}{'steps x batch':>16}{numbers}"]
    for stage in tqdm(stages, desc="planning", leave=False, mininterval=5):
        schedule = schedule_of(config, stage)
        line = f"{stage:10}{f'{schedule.steps:,} x {schedule.batch}':>16}"
        if stage not in PLANNED:
            lines.append(line + "   (not counted by plan.py)")
            continue
        micro = schedule.micro_batch or max(1, schedule.batch // gpus)
        with torch.enable_grad():  # a notebook may have switched it off
            halves = tqdm((True, False), desc=stage, leave=False)
            half, whole = (plan(config, stage, gpus, micro, half=half) for half in halves)
        total = half.flops * schedule.steps / 1e15
        memory = f"{half.memory / GB:9.1f}{whole.memory / GB:9.1f}"
        lines.append(f"{line}{memory}{half.flops / 1e12:12.3g}{total:14.3g}")
    speed = "a device that sustains 100 TFLOP/s does 360 PFLOP in an hour"
    return "\n".join([*lines, f"(GB per process, of {gpus}; {speed})"])


def watch(command: list[str]) -> None:
    """Run `python COMMAND` in the root and print its lines; RuntimeError if it fails.

    When this process is interrupted the training is told to end; it resumes from its
    checkpoints when started again.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=base(),
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    last = ""
    try:
        for last in thinned(line.rstrip() for line in process.stdout):
            print(last, flush=True)
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                said, _ = process.communicate(timeout=60)
                print(*thinned(line.rstrip() for line in said.splitlines()), sep="\n", flush=True)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        ended = f"The training ended with code {process.returncode} ({last[:200]})"
        raise RuntimeError(f"{ended}; once that is mended the same call resumes it.")


def thinned(lines: Iterable[str]) -> Iterable[str]:
    """Lines without empty ones, and of progress bars one a minute and the last."""
    printed_at, waiting = 0.0, None
    for line in filter(None, lines):
        is_bar = "%|" in line
        if is_bar and time.monotonic() - printed_at < BAR_SECONDS:
            waiting = line
            continue
        if is_bar:
            printed_at = time.monotonic()
        elif waiting is not None:
            yield waiting
        waiting = None
        yield line
    if waiting is not None:
        yield waiting
