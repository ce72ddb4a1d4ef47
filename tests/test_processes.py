"""Several processes, as torchrun starts them on a cluster: the curve of one, and a
clean stop when one of them dies.

The stage is the real one, geometric distillation (U-Net with LoRA, frozen decoder,
rasteriser) at the smallest sizes that its classes allow. gloo on the CPU stands for
NCCL on GPUs, which no test here could run.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny_world import ball_views, random_orbits, shake, tiny_config
from torch.distributed.run import get_args_parser

from gsv3d_lib.config import Schedule, preset
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.distillation import DistillationStage
from gsv3d_lib.encoders import build_clip, build_dino
from gsv3d_lib.lora import add_lora
from gsv3d_lib.pretraining import DINOStage
from gsv3d_lib.stages import schedule_of
from gsv3d_lib.train import build_parser
from gsv3d_lib.training import check_same_start, mean_over_processes, train
from gsv3d_lib.unet import build_unet
from gsv3d_lib.weights.run_folder import list_checkpoints, read_metrics

CONFIG = tiny_config(lambda_alpha_stage2=0.5)
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
SCHEDULE = Schedule(steps=5, batch=2, lr=1e-3, warmup=2, ema=0.9)
DEATH = 3  # the step after which a worker is killed
PROCESSES = 2
# seconds for all of it on a busy machine; a run that hangs is stopped then and the test
# fails
PATIENCE = 400
STOP = 60  # seconds from the death of a worker to the end of the run


def distillation_stage() -> DistillationStage:
    torch.manual_seed(0)
    unet = shake(
        add_lora(shake(build_unet(CONFIG)), CONFIG.lora_rank)
    )  # B = 0 would leave half of the LoRA without gradient
    models = unet, build_clip(CONFIG), shake(build_decoder(CONFIG)), build_dino(CONFIG)
    return DistillationStage(*models, random_orbits(ball_views()), CONFIG)


def dino_stage() -> DINOStage:
    torch.manual_seed(0)
    return DINOStage(build_dino(CONFIG), ball_views(), CONFIG)


def run(stage, folder: Path, processes: int = 1) -> list[dict]:
    return train(
        stage,
        SCHEDULE,
        folder,
        log_every=1,
        progress=False,
        checkpoint_minutes=0,
        processes=processes,
    )


def work(folder: Path) -> None:
    """What one of the processes does: this file is the script that torchrun runs."""
    torch.set_num_threads(1)
    run(dino_stage(), folder / "dino", PROCESSES)
    run(distillation_stage(), folder / "whole", PROCESSES)
    doomed = distillation_stage()
    doomed.after_step = lambda step, steps: die() if step == DEATH else None
    run(doomed, folder / "killed", PROCESSES)


def die() -> None:
    """SIGKILL for the second process only, as when the machine runs out of memory."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def torchrun(folder: Path) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    return subprocess.run(
        [sys.executable, *command, __file__, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def curve(rows: list[dict]) -> list[tuple[float, ...]]:
    return [tuple(value for name, value in row.items() if name != "time") for row in rows]


def assert_same_curve(rows: list[dict], truth: list[dict], tolerance: float = 1e-5) -> None:
    assert len(rows) == len(truth) == SCHEDULE.steps
    for row, expected in zip(rows, truth, strict=True):
        assert row["step"] == expected["step"]
        for name in set(row) - {"time", "step"}:
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), (
                row["step"],
                name,
            )


def last_centre(run_dir: Path) -> torch.Tensor:
    with safe_open(list_checkpoints(run_dir)[-1], "pt") as file:
        return file.get_tensor("state.center")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folder, outcome and end of: DINO and stage 2 on two processes, then stage 2 with
    a worker that is killed.
    """
    folder = tmp_path_factory.mktemp("processes")
    return folder, torchrun(folder), time.time()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    """The curve of stage 2 on one process, at the same global batch."""
    return run(distillation_stage(), tmp_path_factory.mktemp("alone"))


def test_two_processes_distil_what_one_would(broken, alone):
    folder, done, _ = broken
    rows = read_metrics(folder / "whole")
    assert rows, done.stderr[-2000:]
    assert {"loss", "loss_2d", "loss_3d", "grad_norm"} <= set(rows[0])
    assert_same_curve(rows, alone)
    assert len({row["loss"] for row in rows}) == SCHEDULE.steps  # the curve moves


def test_the_centre_of_dino_is_that_of_the_whole_batch(broken, tmp_path):
    """Its running mean is taken over all processes; a mean of one's own examples would
    give other targets.
    """
    folder, done, _ = broken
    assert_same_curve(read_metrics(folder / "dino"), run(dino_stage(), tmp_path))
    together, alone = (last_centre(run_dir) for run_dir in (folder / "dino", tmp_path))
    assert torch.allclose(together, alone, atol=1e-6) and alone.abs().max() > 1e-3


def test_a_killed_worker_stops_the_run_cleanly(broken):
    folder, done, end = broken
    assert done.returncode != 0 and end - read_metrics(folder / "killed")[-1]["time"] < STOP
    assert "SIGKILL" in done.stderr or "-9" in done.stderr, done.stderr[-2000:]
    newest = list_checkpoints(folder / "killed")[-1]
    with safe_open(newest, "pt") as file:  # whole: every tensor can be read
        assert int(file.metadata()["step"]) in (DEATH, DEATH + 1)
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())


def test_a_run_with_a_killed_worker_resumes_to_the_same_curve(broken, alone):
    """Here on one process, which also says that their number may change: a smaller
    queue, a machine that is gone.
    """
    folder, _, _ = broken
    assert len(read_metrics(folder / "killed")) < SCHEDULE.steps
    run(distillation_stage(), folder / "killed")
    assert_same_curve(read_metrics(folder / "killed"), alone)


def test_processes_that_resume_from_different_steps_are_refused():
    check_same_start([40, 40], Path("runs/x"))
    with pytest.raises(
        ValueError, match=r"steps 40, 20\); the run folder must lie on a file system that all"
    ):
        check_same_start([40, 20], Path("runs/x"))


def test_the_mean_over_one_process_is_the_tensor():
    value = torch.randn(3)
    assert mean_over_processes(value) is value


# ---------------------------------------------------------------- examples for clusters


EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def shims(folder: Path, **outputs: str) -> dict[str, str]:
    """An environment where some commands only print: {args} is one argument a line."""
    for name, output in outputs.items():
        script = 'printf "%s\\n" COMMAND "$@"' if output == "{args}" else f'printf "{output}"'
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def started(printed: str) -> list[list[str]]:
    """The commands that the shims were given, as lists of arguments."""
    return [text.split("\n")[:-1] for text in printed.split("COMMAND\n")[1:]]


def check_torchrun(arguments: list[str], nodes: int, gpus: int):
    """Both real parsers take the command, and what it would train exists -> the
    torchrun options.
    """
    options = get_args_parser().parse_args(arguments)
    command, *words = options.training_script_args
    assert options.module and (options.training_script, command) == ("gsv3d_lib", "train")
    training = build_parser().parse_args(words)
    assert (int(options.nnodes), int(options.nproc_per_node)) == (nodes, gpus)
    assert training.gpus == nodes * gpus
    config = preset(training.preset)
    assert all(schedule_of(config, stage).batch % training.gpus == 0 for stage in training.stages)
    return options


def test_the_slurm_example_starts_a_training_that_parses(tmp_path):
    script = EXAMPLES / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    wanted = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(), re.M))
    nodes, gpus = int(wanted["nodes"]), int(wanted["gpus-per-node"])
    assert wanted["ntasks-per-node"] == "1"  # one torchrun a node, which starts the rest
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    environment = shims(tmp_path, srun="{args}", scontrol="node7\\nnode8\\n")
    environment |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_PER_NODE": f"a100:{gpus}"}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    prepare, train_all = started(done.stdout)
    assert build_parser().parse_args(prepare[prepare.index("gsv3d_lib") + 2 :]).prepare
    options = check_torchrun(train_all[train_all.index("torchrun") + 1 :], nodes, gpus)
    assert (options.rdzv_endpoint, options.rdzv_id, options.max_restarts) == (
        "node7:29500",
        "42",
        3,
    )


def test_the_kubernetes_example_starts_a_training_that_parses(tmp_path):
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    nodes, gpus = int(environment["NODES"]), int(environment["GPUS"])
    assert spec["completions"] == spec["parallelism"] == nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    environment |= shims(tmp_path, torchrun="{args}") | {"JOB_COMPLETION_INDEX": "1"}
    command = [*container["command"], *container["args"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (arguments,) = started(done.stdout)
    options = check_torchrun(arguments, nodes, gpus)
    host = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert (options.rdzv_endpoint, options.node_rank) == (f"{host}:29500", 1)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
