"""benchmarks/memory.py measures what it says, and the planner agrees."""

import ctypes
import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_peak_of_a_child_is_that_of_its_largest_moment(memory):
    def rise() -> int:
        # else the heap of earlier tests may hold the 100 MB already
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        memory.forget_peak()
        level = memory.resident()
        torch.ones(25_000_000), torch.ones(1000)  # 100 MB that come and go
        return memory.resident("VmHWM") - level

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory is read from /proc, which only Linux has")
    assert memory.in_a_child(rise) == pytest.approx(1e8, rel=0.05)
    with pytest.raises(RuntimeError, match="The process that measured .* failed"):
        memory.in_a_child(lambda: 1 / 0)


def test_the_work_that_is_measured_is_the_library_s(memory):
    case = dict(scale="tiny", work="stage2", frames=4, size=64, rank=2, checkpointing=True)
    step, staying = memory.training(case)
    step()
    config = memory.config_of(case)
    assert (config.num_frames, config.lora_rank, config.checkpointing, memory.batch_of(case)) == (
        4,
        2,
        True,
        2,
    )
    lora = 372_736 * 2 // 16  # the LoRA's parameters, each with AdamW's two averages
    assert staying() > 4 * (8_623_891 + 3 * lora) and len(memory.cases("tiny")) == 36


def test_every_committed_plan_is_within_15_percent(memory):
    report = json.loads((ROOT / "data/results/memory.json").read_text())
    kinds = {(row["scale"], row["work"], row["checkpointing"]) for row in report["rows"]}
    assert {scale for scale, *_ in kinds} == {"tiny", "small"} and len(kinds) == 10
    assert max(abs(memory.error(row)) for row in report["rows"]) < 0.15
    row = next(
        r for r in report["rows"] if (r["work"], r["frames"], r["size"]) == ("stage1", 4, 64)
    )
    case = {
        name: row[name] for name in ("scale", "work", "frames", "size", "rank", "checkpointing")
    }
    # the file is this planner's
    assert memory.planned(case) / 1e6 == pytest.approx(row["planned_mb"], rel=0.02)
