"""Notebook 11: its bytes are the planner's, its checkers know right from wrong."""

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


# ---------------------------------------------------------------- exercise 1


def memory(parameters, trained, activations, micro_batch, half):
    return 4 * parameters + 12 * trained + micro_batch * activations / (2 if half else 1)


def test_memory_of_a_training():
    check = full_scale.check_training_memory
    assert accepts(check, memory)
    assert not check(definitions("11")["training_memory"])
    assert rejects(check, lambda p, t, a, m, h: 8 * p + m * a, "16 in all")
    assert rejects(check, lambda p, t, a, m, h: 16 * p + m * a, "Only what is trained")
    assert rejects(check, lambda p, t, a, m, h: 4 * p + 12 * t + a, "multiply by the micro-batch")
    assert rejects(
        check,
        lambda p, t, a, m, h: memory(p, t, a, m, False) / (1 + h),
        "halves the activations only",
    )


# ---------------------------------------------------------------- exercise 2


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

    assert rejects(check, forgot_the_share, "weigh each loss by its share")
    assert rejects(check, equal_shares, "Parts of different size weigh differently")
    assert rejects(check, all_at_once, "A part held 5 examples where 1 was the limit")
    assert rejects(check, drops_the_rest, "hold 4 of 5 examples")


# ---------------------------------------------------------------- exercise 3


class Recorder(Stage):
    """Remembers nothing and draws a number that only its generator decides."""

    def example(self, generator, shared, place):
        return {"x": torch.rand((), generator=generator)}


def test_sharing_a_batch():
    check = full_scale.check_share_of_batch
    assert accepts(check, lambda rank, world, batch: list(range(rank, batch, world)))
    assert not check(definitions("11")["share_of_batch"])
    assert rejects(check, lambda r, w, n: list(range(n)), "once each")
    assert rejects(
        check,
        lambda r, w, n: list(range(r * n // w, (r + 1) * n // w)),
        "deals the examples out like cards",
    )
    assert rejects(check, lambda r, w, n: range(r, n, w), "Return a list")
    whole = draw_batch(Recorder(), 0, 0, 6)["x"]
    assert torch.equal(draw_batch(Recorder(), 0, 0, 6, rank=1, world=2)["x"], whole[[1, 3, 5]])
