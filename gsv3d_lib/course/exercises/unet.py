"""Checkers of notebook 05: attention to neighbouring views, the moving average, the
regrouping for attention over the views, and a training loop.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ask, checker, expect, expect_close, expect_not, expect_shape, same

# ---------------------------------------------------------------- exercise 1


def ring_steps(views: int) -> Tensor:
    """Steps between every two views of a closed ring, [N, N]."""
    gap = (torch.arange(views)[:, None] - torch.arange(views)).abs()
    return torch.minimum(gap, views - gap)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def neighbours(q: Tensor, k: Tensor, v: Tensor, reach: int) -> Tensor:
    """The right answer: attention over the views at most `reach` steps away."""
    return _masked(q, k, v, ring_steps(q.shape[1]) <= reach)


@checker
def check_neighbours(solution) -> None:
    """q, k, v [M, N, d] and reach -> attention over neighbouring views [M, N, d]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 16, generator=generator)
    gap = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    for reach in (1, 2):
        answer = ask(solution, q, k, v, reach)
        expect_shape(answer, v.shape)
        seen = ring_steps(8) <= reach
        scores = q @ k.mT / 4
        weights = scores.softmax(-1)
        ahead = (torch.arange(8) - torch.arange(8)[:, None]) % 8
        both = "A view has neighbours on both sides; yours looks to one side."
        mistakes = {
            both: _masked(q, k, v, ahead <= reach),
            f"{both} ": _masked(q, k, v, ahead.mT <= reach),
            "The mask is inverted: True means that a view is seen.": _masked(q, k, v, ~seen),
            "A score of 0 is still seen: what may not be seen gets -inf.": (
                (scores * seen).softmax(-1) @ v
            ),
            "The softmax runs over the wrong axis: the weights of one query add up to 1.": (
                scores.masked_fill(~seen, -torch.inf).softmax(-2) @ v
            ),
            "The ring is open: view 0 and the last view are neighbours.": _masked(
                q, k, v, gap <= reach
            ),
            "Every view sees everybody: mask the scores.": _masked(q, k, v, seen | True),
            "A view should see itself, too.": _masked(q, k, v, seen & (gap > 0)),
            "You masked behind the softmax: the weights no longer add up to 1.": (weights * seen)
            @ v,
            "The scores are not divided by sqrt(d).": _masked(4 * q, k, v, seen),
            "One step too few: views exactly `reach` steps away are seen, too.": _masked(
                q, k, v, ring_steps(8) < reach
            ),
        }
        expect_not(answer, mistakes)
        expect_close(answer, neighbours(q, k, v, reach), "The masked softmax, times v.")
    alone = ask(solution, q, k, v, 0)
    expect_close(alone, v, "With reach 0 each view gets its own value.")


# ---------------------------------------------------------------- exercise 2


def average_of(weights: Tensor, decay: float, first: int = 0) -> Tensor:
    """The right answer: `training.update_average` after every step."""
    mean = weights[0]
    for k, row in enumerate(weights[1:], start=first):
        keep = min(decay, (1 + k) / (10 + k))
        mean = keep * mean + (1 - keep) * row
    return mean


@checker
def check_average(solution) -> None:
    """weights [K + 1, P], decay -> the average after K steps [P]."""
    weights = torch.randn(31, 5, generator=torch.Generator().manual_seed(0))
    # after 30 steps the start is forgotten, after 2 it is not
    for decay, rows in ((0.7, weights), (0.9, weights), (0.9, weights[:3])):
        given = rows.clone()
        answer = ask(solution, given, decay)
        expect_shape(answer, (5,))
        expect(
            torch.equal(given, rows),
            "You changed the weights that were given: begin with a clone of row 0.",
        )
        truth = average_of(rows, decay)
        mistakes = _average_mistakes(rows, decay)
        tight = dict(rtol=1e-5, atol=1e-5)
        apart = {hint: x for hint, x in mistakes.items() if not same(x, truth, **tight)}
        expect_not(answer, apart, **tight)
        expect_close(answer, truth, "d times the average plus 1 - d times the row.", 1e-5)


def _average_mistakes(rows: Tensor, decay: float) -> dict[str, Tensor]:
    constant, swapped = rows[0], rows[0]
    for k, row in enumerate(rows[1:]):
        keep = min(decay, (1 + k) / (10 + k))
        constant = decay * constant + (1 - decay) * row
        swapped = (1 - keep) * swapped + keep * row
    from_zeros = torch.cat([0 * rows[:1], rows[1:]])
    return {
        "Those are the last weights; nothing is averaged.": rows[-1],
        "That is the plain mean; the moving average weighs late steps more.": rows.mean(0),
        "The roles are exchanged: the average keeps the share d, the new weights get 1 - d.": (
            swapped
        ),
        "The first step has number 0, so its decay is 1/10.": average_of(rows, decay, 1),
        "The decay grows without a bound: d is its largest value.": average_of(rows, 1.0),
        "The average begins as row 0, not as zeros.": average_of(from_zeros, decay),
        "The decay is constant: it begins at 1/10 and grows up to d.": constant,
    }


# ---------------------------------------------------------------- find the bug


@checker
def check_group_by_place(solution) -> None:
    """Pictures [B N, T, C], N -> [B T, N, C]."""
    for batch, views, places in ((1, 4, 3), (2, 3, 4), (3, 2, 2)):
        x = torch.arange(float(batch * views * places * 2)).reshape(batch * views, places, 2)
        answer = ask(solution, x, views)
        half_mended = x.unflatten(0, (batch, views)).permute(1, 2, 0, 3).flatten(0, 1)
        hint = "Orbits and views have changed places: the order of the axes has to follow."
        expect(not isinstance(answer, Tensor) or not same(answer, half_mended), hint)
        expect_shape(answer, (batch * places, views, 2))
        truth = x.unflatten(0, (batch, views)).transpose(1, 2).flatten(0, 1)
        mixed = x.unflatten(0, (views, batch)).permute(1, 2, 0, 3).flatten(0, 1)
        hint = (
            f"With {batch} orbits of {views} views, one group holds views of several orbits. "
            "The pictures come orbit after orbit."
        )
        mistakes = {hint: mixed} if batch > 1 else {}
        mistakes["The places are mixed, not the views."] = x.reshape(truth.shape)
        expect_not(answer, mistakes)
        expect_close(answer, truth, "Group b T + t holds the N views of place t of orbit b.")


# ---------------------------------------------------------------- build

GOAL = 0.45  # what the loss has to reach
POINTS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def plane_batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A diffusion of four points in the plane: inputs [count, 3] and v [count, 2]."""
    generator = torch.Generator().manual_seed(seed)
    clean = POINTS[torch.randint(4, (count,), generator=generator)]
    sigma = (0.5 * torch.randn(count, 1, generator=generator) - 0.7).exp()
    noise = torch.randn(count, 2, generator=generator)
    root = (sigma**2 + 1).sqrt()
    x = torch.cat([(clean + sigma * noise) / root, sigma.log() / 4], dim=1)
    return x, (noise - sigma * clean) / root


def plane_floor(count: int = 4096) -> float:
    """The loss of the best possible answer, the mean of v over the four points."""
    x, v = plane_batch(count, seed=-1)
    sigma = (4 * x[:, 2:]).exp()
    root = (sigma**2 + 1).sqrt()
    gaps = (x[:, None, :2] * root[:, None] - POINTS) / sigma[:, None]  # noise, were it that point
    chance = (-0.5 * gaps.pow(2).sum(-1)).softmax(-1)[..., None]
    best = (chance * (gaps - sigma[:, None] * POINTS) / root[:, None]).sum(1)
    return (best - v).pow(2).mean().item()


def plane_net() -> nn.Module:
    """The network that the checker hands out, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )


def plane_loss(net: nn.Module) -> float:
    """Loss on 4,096 fixed draws."""
    x, v = plane_batch(4096, seed=-1)
    with torch.no_grad():
        return (net(x) - v).pow(2).mean().item()


@checker
def check_training(solution) -> None:
    """net, draw(step), steps -> the trained network."""
    net, drawn = plane_net(), []
    before, start = plane_loss(net), copy.deepcopy(net.state_dict())

    def draw(step: int) -> tuple[Tensor, Tensor]:
        drawn.append(step)
        return plane_batch(64, seed=1_000_003 * int(step))

    trained = ask(solution, net, draw, 400)
    expect(isinstance(trained, nn.Module), "Return the network.")
    expect(len(drawn) <= 400, f"You drew {len(drawn)} batches; there are 400.")
    still = all(torch.equal(start[name], p) for name, p in trained.state_dict().items())
    expect(not still, "The weights have not moved: zero_grad, backward, step, in this order.")
    loss = plane_loss(trained)
    expect(
        loss <= GOAL or len(set(drawn)) > 1,
        "You drew one and the same batch every time: give `draw` the number of the step.",
    )
    expect(
        math.isfinite(loss) and loss < before,
        f"The loss rose from {before:.3f} to {loss:.3f}: are old gradients set to zero each step, "
        "and is the rate small enough?",
    )
    expect(
        loss <= GOAL,
        f"It reaches {loss:.3f}, and {GOAL} is wanted: try a larger rate at the start, let it "
        "fall, and average the weights.",
    )
