"""A training as a job: its command, its folder, and all that can be known to fail
before it starts.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config import preset
from ..stages import STAGES, is_trained, schedule_of
from ..system.errors import MissingFile, UserError
from ..system.paths import base, find, resolve
from .shards import is_shards


def run_folder(scale: str, steps: int = 0) -> Path:
    """Where checkpoints, curves and weights go: runs/SCALE, and another one for trials."""
    return base() / "runs" / (f"{scale}-trial-{steps}" if steps else scale)


def train_command(
    scale: str, stages: list[str], data: list[str], processes: int = 1, steps: int = 0
) -> list[str]:
    """What follows `python` on the command line: `-m gsv3d_lib train ...`, through
    torchrun for several processes.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    trial = ["--steps", str(steps)] if steps else []
    source = ["--shards" if is_shards(find(data[0])) else "--data", *map(from_root, data)]
    options = [
        "--preset",
        scale,
        "--stages",
        *stages,
        *source,
        *trial,
        "--processes",
        str(processes),
    ]
    out = run_folder(scale, steps)
    out = out.relative_to(base()) if out.is_relative_to(base()) else out
    return [
        *(torchrun if processes > 1 else []),
        "-m",
        "gsv3d_lib",
        "train",
        *options,
        "--out",
        str(out),
    ]


def from_root(folder: str) -> str:
    """A folder to read from as the training finds it, which starts in the repository's
    root.
    """
    return folder if resolve(folder) == base() / folder else str(resolve(folder))


def shown(command: list[str]) -> str:
    """The command as one would type it."""
    return shlex.join(["python", *command]).replace("python -m torch.distributed.run", "torchrun")


def check_request(scale: str, stages: list[str], data: list[str], processes: int) -> None:
    """What is wrong in the request itself. Raises ValueError."""
    config = preset(scale)
    if not data:
        raise UserError("A training needs data: name dataset folders, or one folder of shards.")
    if processes < 1:
        raise UserError(f"A training needs one process or more; got {processes}.")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise UserError(f"The stages are {', '.join(STAGES)}; got {', '.join(unknown) or 'none'}.")
    if stages != sorted(stages, key=list(STAGES).index):
        raise UserError(
            f"Stages build on each other, so give them in this order: {', '.join(STAGES)}."
        )
    for stage in stages:
        batch = schedule_of(config, stage).batch
        if batch % processes:
            raise UserError(
                f"The batch of {stage}, {batch}, cannot be shared equally by {processes} processes."
            )


def check(scale: str, stages: list[str], data: list[str], processes: int, out: Path) -> None:
    """Everything that can be known to fail. Raises ValueError or FileNotFoundError with
    what to do.
    """
    check_request(scale, stages, data, processes)
    for stage in stages:
        missing = [
            need
            for need in STAGES[stage].needs
            if need not in stages and not is_trained(need, out / "weights")
        ]
        if missing:
            fetched = (
                f" (`python -m gsv3d_lib sv3d stabilityai/sv3d --download --out {out}`)"
                if scale == "paper"
                else ""
            )
            raise UserError(
                f"{stage} needs {', '.join(missing)}: add them to the stages, or put their weights into "
                f"{out / 'weights'}{fetched}."
            )
    for folder in data:
        if not (find(folder) / "index.json").is_file():
            raise MissingFile(
                f"There is no dataset in {folder}; make it with `python -m gsv3d_lib make_dataset --out {folder} ...`."
            )
        if len(data) > 1 and is_shards(find(folder)):
            raise UserError(
                f"{folder} holds shards, and a training reads one folder of those and nothing else."
            )
