"""Checkers of notebook 11: memory of a training, accumulation, shares of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ask, checker, expect, expect_close


@checker
def check_training_memory(training_memory: Callable) -> None:
    """Bytes, equation (11.1).

    training_memory(parameters, trained, activations, micro_batch, half)
    """
    plain = ask(training_memory, 1000, 1000, 0, 1, False)
    hint = "Without activations, fully trained: 4 bytes of weight, 4 of gradient and 8 of "
    hint += "AdamW's averages, 16 in all."
    expect_close(plain, 16_000, hint)
    lora = ask(training_memory, 1000, 10, 0, 1, False)
    expect_close(lora, 4_120, "Only what is trained has gradients and averages: 4 P + 12 T bytes.")
    two = ask(training_memory, 0, 0, 500, 2, False)
    expect_close(
        two,
        1000,
        "Every example on the device keeps its own activations: multiply by the micro-batch.",
    )
    half = ask(training_memory, 1000, 10, 500, 2, True)
    expect_close(
        half, 4_620, "bfloat16 halves the activations only; weights and averages stay in float32."
    )


@checker
def check_accumulate(accumulate: Callable) -> None:
    """Fills weight.grad as the mean loss of the whole batch would.

    accumulate(loss_of, weight, batch, size)
    """
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    truth = x.pow(2).mean()  # d/dw of mean((w x)^2) / 2 at w = 1
    largest = []

    def loss_of(weight, part):
        largest.append(len(part))
        return (weight * part).pow(2).mean() / 2

    hints = {
        5: "In one part this is the plain gradient of the mean loss.",
        1: "Each part was counted as if it were the whole batch: weigh each loss by its share, "
        "len(part) / len(batch).",
        2: "Parts of different size weigh differently: the share is len(part) / len(batch).",
    }
    for size, hint in hints.items():
        weight = torch.ones((), requires_grad=True)
        largest.clear()
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
        expect_close(weight.grad, truth, hint)


@checker
def check_share_of_batch(share_of_batch: Callable) -> None:
    """share_of_batch(rank, world, batch) -> example indices, equation (11.4)."""
    shares = [ask(share_of_batch, rank, 2, 6) for rank in (0, 1)]
    expect(all(isinstance(s, list) for s in shares), "Return a list of whole numbers.")
    together = sorted(shares[0] + shares[1])
    expect(
        together == list(range(6)),
        f"Two processes should cover examples 0..5 once each; they cover {together}.",
    )
    expect(
        shares[0] == [0, 2, 4],
        f"Process 0 of 2 takes every second example, [0, 2, 4]; yours takes {shares[0]}. Blocks "
        "would work too, but the library deals the examples out like cards.",
    )
    expect(ask(share_of_batch, 2, 4, 8) == [2, 6], "Process 2 of 4 takes examples 2 and 6 of 8.")
