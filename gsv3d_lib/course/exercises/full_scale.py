"""Notebook 11: gradient accumulation, starts of a job, noise of several processes, and
a plan for one GPU. Solutions first, then checkers.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from ...system.paths import resolve
from . import ask, checker, expect, expect_close

ORBITS, FLOPS = 32, 1e14  # of a step of stage 2, and a second of the GPU in the build
USED = 0.9  # share of the hours that a plan has to use


def starts_needed(steps: int, seconds: float, limit: float, every: int, load: float) -> int:
    """Starts of a job of `limit` hours, `load` of them lost, with a checkpoint `every`
    so many steps; 0 if it never ends.
    """
    possible = int((limit - load) * 3600 / seconds)
    kept = possible // every * every
    starts = 1
    while steps > possible:
        if kept <= 0:
            return 0
        steps -= kept
        starts += 1
    return starts


def draw_noise(seed: int, step: int, rank: int, world: int, batch: int) -> list[Tensor]:
    """The noise of a process's examples: it depends on an example's index in the global
    batch.
    """
    noise = []
    for index in range(rank, batch, world):
        generator = torch.Generator().manual_seed(hash((seed, step, index)) % 2**31)
        noise.append(torch.randn(4, generator=generator))
    return noise


def plan_training(rows: list[dict], card_gb: float, hours: float) -> dict:
    """Rows of data/results/memory.json -> the one with most views that fits, the
    fastest of those, with the orbits that fit at once and the steps for the hours.
    """

    def needed(row: dict) -> float:
        return row["weights"] + row["trained"] + row["activations"]

    fitting = [row for row in rows if needed(row) <= card_gb * 1e9]
    views = max(row["frames"] for row in fitting)
    row = min((r for r in fitting if r["frames"] == views), key=lambda r: r["flops"])
    room = card_gb * 1e9 - row["weights"] - row["trained"]
    orbits = min(ORBITS, int(room / row["activations"]))
    return {"row": row, "orbits": orbits, "steps": int(3600 * hours * FLOPS / row["flops"])}


@checker
def check_accumulate(accumulate: Callable) -> None:
    """accumulate(loss_of, weight, batch, size): fills weight.grad as the mean loss of
    the whole batch would.
    """
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    truth = x.pow(2).mean()  # d/dw of mean((w x)^2) / 2 at w = 1
    largest = []
    done = []  # losses whose gradient was taken
    waiting = []  # losses whose gradient was not, at each new one

    def loss_of(weight, part):
        waiting.append(len(largest) - len(done))
        largest.append(len(part))
        loss = (weight * part).pow(2).mean() / 2
        loss.register_hook(lambda gradient: done.append(gradient))
        return loss

    hints = {
        5: "In one part this is the plain gradient of the mean loss.",
        1: "Each part was counted as if it were the whole batch: weigh each loss by its share.",
        2: "Parts of different size weigh differently: the share is len(part) / len(batch).",
    }
    for size, hint in hints.items():
        weight = torch.ones((), requires_grad=True)
        for seen in (largest, done, waiting):
            seen.clear()
        answer = ask(accumulate, loss_of, weight, x, size)
        filled = (
            isinstance(answer, Tensor)
            and weight.grad is not None
            and torch.equal(answer, weight.grad)
        )
        expect(filled, "Return weight.grad when it is filled.")
        expect(
            max(largest) <= size, f"A part held {max(largest)} examples where {size} was the limit."
        )
        expect(
            sum(largest) == 5,
            f"The parts hold {sum(largest)} of 5 examples: the last part may be smaller.",
        )
        expect(
            max(waiting) == 0,
            "One backward for all parts keeps all of them in memory: call it after each part.",
        )
        last = x.split(size)[-1]
        alone = [last.pow(2).mean(), last.pow(2).sum() / 5]
        expect(
            size == 5 or all(not torch.isclose(weight.grad, value) for value in alone),
            "Only the last part is left: gradients add up by themselves, so do not empty "
            "weight.grad between the parts.",
        )
        expect_close(weight.grad, truth, hint)


@checker
def check_starts_needed(solution) -> None:
    """(steps, seconds, limit, every, load) -> starts."""
    whole = ask(solution, 100, 36.0, 10.0, 10, 0.0)
    expect(whole == 1, f"1,000 steps fit into the first start: 1, not {whole}.")
    lost = ask(solution, 1000, 36.0, 2.5, 100, 0.0)
    expect(
        lost != 4, "250 steps are made, but only those up to the last checkpoint, 200, are kept."
    )
    expect(lost == 5, f"Five starts: 200 kept in each of four, 200 left for the last; not {lost}.")
    load = ask(solution, 400, 36.0, 2.0, 50, 0.5)
    expect(load == 3, f"Half an hour of loading leaves 150 steps: 150, 150, 100 are 3, not {load}.")
    last = ask(solution, 250, 36.0, 1.3, 100, 0.0)
    expect(
        last == 3, f"The last start need not end at a checkpoint: 100, 100, 50 are 3, not {last}."
    )
    rest = ask(solution, 250, 36.0, 1.5, 100, 0.0)
    expect(rest == 2, f"A start has time for 150 steps, 100 are kept: 100, 150 are 2, not {rest}.")
    down = ask(solution, 380, 36.0, 1.8, 100, 0.0)
    expect(down == 3, f"Of 180 steps 100 are kept, not 200: 100, 100, 180 are 3, not {down}.")
    short = ask(solution, 60, 36.0, 0.8, 100, 0.0)
    expect(short == 1, f"60 steps end in the first start, without a checkpoint: 1, not {short}.")
    never = ask(solution, 1000, 36.0, 0.5, 100, 0.0)
    expect(never == 0, f"50 steps a start never reach the checkpoint at 100: 0, not {never}.")


@checker
def check_draw_noise(solution) -> None:
    """(seed, step, rank, world, batch) -> noise of the process's examples."""
    alone = ask(solution, 0, 3, 0, 1, 4)
    two = [ask(solution, 0, 3, rank, 2, 4) for rank in (0, 1)]
    expect(
        len(alone) == 4 and all(len(part) == 2 for part in two),
        "One process takes all four examples, each of two takes two.",
    )
    expect(
        not torch.equal(torch.stack(two[0]), torch.stack(two[1])),
        "Both processes draw the same noise: two GPUs learn from one batch. The index in the "
        "global batch must decide.",
    )
    expect(
        torch.equal(torch.stack(alone[0::2]), torch.stack(two[0]))
        and torch.equal(torch.stack(alone[1::2]), torch.stack(two[1])),
        "The two processes together do not draw what one would draw.",
    )
    other = ask(solution, 0, 4, 0, 1, 4)
    expect(
        not torch.equal(torch.stack(alone), torch.stack(other)),
        "Step 3 and step 4 draw the same noise.",
    )
    another = ask(solution, 1, 3, 0, 1, 4)
    expect(
        not torch.equal(torch.stack(alone), torch.stack(another)),
        "Seed 0 and seed 1 draw the same noise.",
    )
    drawn = torch.stack([*alone, *other, *another])
    expect(
        len(drawn.unique(dim=0)) == len(drawn),
        "Some examples share their noise: a sum of seed, step and index is the same number for "
        "several of them. Mix the three, as `hash` does.",
    )


@checker
def check_plan_training(solution) -> None:
    """(rows, card in GB, hours) -> {"row", "orbits", "steps"}."""
    rows = json.loads(resolve("data/results/memory.json").read_text())["paper"]
    for card, hours in ((16, 24.0), (24, 100.0), (48, 12.0), (80, 400.0)):
        answer = ask(solution, rows, card, hours)
        expect(
            isinstance(answer, dict) and set(answer) == {"row", "orbits", "steps"},
            'Return a dict with "row", "orbits" and "steps".',
        )
        row, orbits, best = answer["row"], answer["orbits"], plan_training(rows, card, hours)
        expect(row in rows, "The row is not one of those given.")
        expect(1 <= orbits <= ORBITS, f"Between 1 and {ORBITS} orbits are on the device at once.")
        bytes_needed = row["weights"] + row["trained"] + orbits * row["activations"]
        expect(
            bytes_needed <= card * 1e9, f"{bytes_needed / 1e9:.1f} GB do not fit into {card} GB."
        )
        more = orbits < ORBITS and bytes_needed + row["activations"] <= card * 1e9
        views = best["row"]["frames"]
        expect(
            row["frames"] == views,
            f"A card of {card} GB can take N = {views}; you take N = {row['frames']}.",
        )
        expect(
            row["flops"] == best["row"]["flops"],
            f"Another row with N = {views} fits into {card} GB and needs fewer operations.",
        )
        expect(not more, f"More than {orbits} orbits fit into {card} GB at once.")
        used = answer["steps"] * row["flops"] / FLOPS / 3600 / hours
        expect(
            used <= 1,
            f"{answer['steps']:,} steps take {used * hours:.2f} hours, and {hours:g} are given. "
            "Round down.",
        )
        expect(used >= USED, f"The plan uses only {used:.0%} of the hours.")
