"""Notebook 11: its bytes are the planner's, its checkers know right from wrong."""

import math

import pytest
import torch
from notebook_world import accepts, definitions, rejects
from torch import nn

from gsv3d_lib.cluster.plan import Ledger
from gsv3d_lib.course.exercises import full_scale
from gsv3d_lib.training import Stage, draw_batch, micro_batches


def test_bytes_by_hand_are_the_ledgers():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), torch.randn(7, 3)
    ledger = Ledger(model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda t: t):
        result = model(x)
    assert (
        definitions("11")["kept_bytes"](model, x)
        == ledger.bytes
        == 4 * (x.numel() + result.numel())
    )


# ---------------------------------------------------------------- exercises


def by_library(loss_of, weight, batch, size):
    for share, part in micro_batches({"x": batch}, size):
        (share * loss_of(weight, part["x"])).backward()
    return weight.grad


def test_gradient_accumulation():
    check = full_scale.check_accumulate
    assert accepts(check, by_library)
    assert not check(definitions("11")["accumulate"])

    def forgot_the_share(loss_of, weight, batch, size):
        for part in batch.split(size):
            loss_of(weight, part).backward()
        return weight.grad

    def equal_shares(loss_of, weight, batch, size):
        parts = batch.split(size)
        for part in parts:
            (loss_of(weight, part) / len(parts)).backward()
        return weight.grad

    def all_at_once(loss_of, weight, batch, size):
        loss_of(weight, batch).backward()
        return weight.grad

    def drops_the_rest(loss_of, weight, batch, size):
        for part in batch[: len(batch) // size * size].split(size):
            (loss_of(weight, part) * size / len(batch)).backward()
        return weight.grad

    def one_backward(loss_of, weight, batch, size):
        losses = [loss_of(weight, part) * len(part) for part in batch.split(size)]
        (sum(losses) / len(batch)).backward()
        return weight.grad

    def empties(share):
        def accumulate(loss_of, weight, batch, size):
            for part in batch.split(size):
                weight.grad = None
                (loss_of(weight, part) * (len(part) / len(batch) if share else 1)).backward()
            return weight.grad

        return accumulate

    assert rejects(check, one_backward, "One backward for all parts keeps all of them")
    assert rejects(check, empties(True), "Only the last part is left")
    assert rejects(check, empties(False), "Only the last part is left")
    assert rejects(check, forgot_the_share, "weigh each loss by its share")
    assert rejects(check, equal_shares, "Parts of different size weigh differently")
    assert rejects(check, all_at_once, "A part held 5 examples where 1 was the limit")
    assert rejects(check, drops_the_rest, "hold 4 of 5 examples")


def test_gradients_that_are_added_by_hand_are_right():
    def by_hand(loss_of, weight, batch, size):
        weight.grad = torch.zeros_like(weight)
        for part in batch.split(size):
            (gradient,) = torch.autograd.grad(loss_of(weight, part), weight)
            weight.grad += gradient * len(part) / len(batch)
        return weight.grad

    assert accepts(full_scale.check_accumulate, by_hand)


def draws(index_of):
    def noise(seed, step, rank, world, batch):
        parts = []
        for local, index in enumerate(range(rank, batch, world)):
            generator = torch.Generator().manual_seed(index_of(seed, step, rank, local, index))
            parts.append(torch.randn(4, generator=generator))
        return parts

    return noise


@pytest.mark.parametrize("name", ["starts_needed", "plan_training"])
def test_stubs_are_not_written_and_solutions_are_right(name):
    check = getattr(full_scale, f"check_{name}")
    assert not check(definitions("11")[name])
    assert accepts(check, getattr(full_scale, name))


def by_kept(kept_of, rounded=None, short=1):
    """Starts by the steps that a start keeps; `rounded` counts the last so too."""

    def starts(steps, seconds, limit, every, load):
        possible = int((limit - load) * 3600 / seconds)
        kept = kept_of(possible, every)
        if steps <= possible:
            return 1 if kept else short
        if kept <= 0:
            return 0
        if rounded:
            return rounded(steps / kept)
        return 1 + math.ceil((steps - possible) / kept)

    return starts


def test_starts_by_a_formula_are_right():
    formula = by_kept(lambda possible, every: possible // every * every)
    assert accepts(full_scale.check_starts_needed, formula)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda n, t, h, c, w: math.ceil(n * t / 3600 / h), "only those up to the last"),
        (lambda n, t, h, c, w: full_scale.starts_needed(n, t, h, c, 0), "hour of loading"),
        (lambda n, t, h, c, w: full_scale.starts_needed(n, t, h, c, w) or 99, "never reach"),
        (by_kept(lambda possible, every: possible // every * every, math.ceil), "100, 150 are 2"),
        (by_kept(lambda possible, every: round(possible / every) * every), "100, 100, 180 are 3"),
        (by_kept(lambda possible, every: possible // every * every, short=0), "first start, with"),
        (lambda n, t, h, c, w: 0, "fit into the first start"),
    ],
)
def test_starts_needed_rejects(wrong, hint):
    assert rejects(full_scale.check_starts_needed, wrong, hint)


def test_the_seeded_bug_is_told_and_its_repair_accepted(capsys):
    check = full_scale.check_draw_noise
    assert not check(definitions("11")["draw_noise"])
    assert "Both processes draw the same noise" in capsys.readouterr().out
    assert accepts(check, full_scale.draw_noise)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (draws(lambda seed, step, rank, local, _: 10 * step + local), "draw the same noise"),
        (draws(lambda seed, step, rank, local, _: 99 * rank + 9 * step + local), "what one would"),
        (draws(lambda seed, step, rank, local, index: index), "Step 3 and step 4"),
        (draws(lambda seed, step, rank, local, index: 10 * step + index), "Seed 0 and seed 1"),
        (draws(lambda seed, step, rank, local, index: seed + step + index), "share their noise"),
    ],
)
def test_draw_noise_rejects(wrong, hint):
    assert rejects(full_scale.check_draw_noise, wrong, hint)


def changed(**changes):
    def plan(rows, card, hours):
        best = full_scale.plan_training(rows, card, hours)
        return best | {name: change(best, rows) for name, change in changes.items()}

    return plan


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (changed(orbits=lambda best, rows: 32), "do not fit"),
        (changed(row=lambda best, rows: rows[2], orbits=lambda *_: 1), "can take N = "),
        (changed(steps=lambda best, rows: best["steps"] // 2), "uses only 50 %|uses only 50%"),
        (changed(steps=lambda best, rows: 2 * best["steps"]), "hours, and 24 are given"),
        (changed(steps=lambda best, rows: best["steps"] + 1), "Round down"),
        (changed(orbits=lambda best, rows: 1), "orbits fit into"),
        (lambda rows, card, hours: rows[0], "Return a dict"),
    ],
)
def test_plan_training_rejects(wrong, hint):
    assert rejects(full_scale.check_plan_training, wrong, hint)


def test_the_library_draws_as_the_exercise_says():
    whole = draw_batch(Recorder(), 0, 0, 6)["x"]
    assert torch.equal(draw_batch(Recorder(), 0, 0, 6, rank=1, world=2)["x"], whole[[1, 3, 5]])


class Recorder(Stage):
    """Remembers nothing and draws a number that only its generator decides."""

    def example(self, generator, shared, place):
        return {"x": torch.rand((), generator=generator)}
