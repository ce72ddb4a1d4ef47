"""A training as a job: its command, its folder, and what would make it fail."""

import shlex
from pathlib import Path

from ..config import preset
from ..stages import STAGES, is_trained, schedule_of
from ..system.errors import MissingFile, UserError
from ..system.paths import base, find, resolve
from .shards import is_shards


def run_folder(scale: str, steps: int = 0) -> Path:
    """Where checkpoints, curves and weights go: runs/SCALE, and another for trials."""
    return base() / "runs" / (f"{scale}-trial-{steps}" if steps else scale)


def train_command(
    scale: str, stages: list[str], data: list[str], gpus: int = 1, steps: int = 0
) -> list[str]:
    """What follows `python` on the command line; through torchrun for several GPUs."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    out = run_folder(scale, steps)
    if out.is_relative_to(base()):
        out = out.relative_to(base())
    command = [*(torchrun if gpus > 1 else []), "-m", "gsv3d_lib", "train"]
    command += ["--preset", scale, "--stages", *stages]
    command += ["--shards" if is_shards(find(data[0])) else "--data", *map(from_root, data)]
    command += ["--steps", str(steps)] if steps else []
    return [*command, "--gpus", str(gpus), "--out", str(out)]


def from_root(folder: str) -> str:
    """A folder to read from as the training finds it, which starts in the root."""
    return folder if resolve(folder) == base() / folder else str(resolve(folder))


def typed(command: list[str]) -> str:
    """The command as one would type it."""
    return shlex.join(["python", *command]).replace("python -m torch.distributed.run", "torchrun")


def check_request(scale: str, stages: list[str], data: list[str], gpus: int) -> None:
    """Raises UserError for what is wrong in the request itself."""
    config = preset(scale)
    if not data:
        raise UserError("A training needs data: name dataset folders, or one folder of shards.")
    if gpus < 1:
        raise UserError(f"A training needs one GPU (or CPU) or more; got {gpus}.")
    unknown = [stage for stage in stages if stage not in STAGES]
    order = ", ".join(STAGES)
    if unknown or not stages:
        raise UserError(f"The stages are {order}; got {', '.join(unknown) or 'none'}.")
    if stages != sorted(stages, key=list(STAGES).index):
        raise UserError(f"Stages build on each other, so give them in this order: {order}.")
    for stage in stages:
        batch = schedule_of(config, stage).batch
        if batch % gpus:
            raise UserError(
                f"The batch of {stage}, {batch}, cannot be shared equally by {gpus} processes."
            )


def check(scale: str, stages: list[str], data: list[str], gpus: int, out: Path) -> None:
    """Raises UserError for everything that can be known to fail, with what to do."""
    check_request(scale, stages, data, gpus)
    weights = out / "weights"
    for stage in stages:
        needs = [need for need in STAGES[stage].needs if need not in stages]
        missing = ", ".join(need for need in needs if not is_trained(need, weights))
        if missing:
            fetch = f"python -m gsv3d_lib sv3d stabilityai/sv3d --download --out {out}"
            fetched = f" (`{fetch}`)" if scale == "paper" else ""
            raise UserError(
                f"{stage} needs {missing}: add them to the stages, "
                f"or put their weights into {weights}{fetched}."
            )
    for folder in data:
        if not (find(folder) / "index.json").is_file():
            advice = f"make it with `python -m gsv3d_lib make_dataset --out {folder} ...`"
            raise MissingFile(f"There is no dataset in {folder}; {advice}.")
        if len(data) > 1 and is_shards(find(folder)):
            raise UserError(
                f"{folder} holds shards; a training reads one folder of those and nothing else."
            )
