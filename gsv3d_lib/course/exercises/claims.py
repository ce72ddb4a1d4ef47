"""Notebook 10: an interval for a ratio, one over seeds and objects, pairs that stay
pairs, and a judge with few false alarms. Solutions first, then checkers.
"""

from __future__ import annotations

import numpy as np

from . import ask, checker, expect, expect_close

SEEDS, OBJECTS = 3, 40  # of a simulated experiment
TRAINING, NOISE = 0.3, 0.5  # deviations between trainings, and of each number; objects have 1
FALSE_ALARMS, FOUND = 0.05, 0.8  # shares that the judge has to reach
NOTHING, EFFECTS = 4000, 1000  # simulated experiments without and with a difference


def ratio_interval(
    ours: np.ndarray, theirs: np.ndarray, draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """One number per object twice [O] -> 95 % bootstrap interval of mean(ours) /
    mean(theirs), objects kept paired.
    """
    chosen = np.random.default_rng(seed).integers(len(ours), size=(draws, len(ours)))
    low, high = np.quantile(ours[chosen].mean(axis=1) / theirs[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def two_way_interval(
    differences: np.ndarray, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Differences [S, O] of S seeds and O objects -> 95 % bootstrap interval of their
    mean, seeds and objects both drawn anew.
    """
    rng = np.random.default_rng(seed)
    seeds, objects = differences.shape
    rows = rng.integers(seeds, size=(draws, seeds, 1))
    columns = rng.integers(objects, size=(draws, 1, objects))
    low, high = np.quantile(differences[rows, columns].mean(axis=(1, 2)), [0.025, 0.975])
    return float(low), float(high)


def paired_differences(ours: dict[str, float], theirs: dict[str, float]) -> np.ndarray:
    """Scores by object -> ours minus theirs [O], over the objects that both have, in
    the order of ours.
    """
    return np.array([ours[name] - theirs[name] for name in ours if name in theirs])


def judge(differences: np.ndarray) -> int:
    """Differences [S, O] -> 1 (more), -1 (less) or 0 (not shown): the mean against 2.6
    standard errors, those over objects and those over trainings added.
    """
    over_objects = differences.mean(axis=0).var(ddof=1) / differences.shape[1]
    over_seeds = differences.mean(axis=1).var(ddof=1) / differences.shape[0]
    mean = differences.mean()
    shown = abs(mean) > 2.6 * np.sqrt(over_objects + over_seeds)
    return int(np.sign(mean)) * int(shown)


@checker
def check_ratio_interval(solution) -> None:
    """(ours [O], theirs [O], draws, seed) -> (low, high)."""
    rng = np.random.default_rng(0)
    theirs = rng.uniform(1.0, 3.0, 40)
    low, high = pair(ask(solution, 0.5 * theirs, theirs))
    expect(low <= high, "The first number should be the lower end.")
    half = "Ours is exactly half of theirs on every object"
    expect(
        abs((low + high) / 2 - 0.5) < 0.2,
        f"{half}, so the ratio is 0.5; yours lies around {(low + high) / 2:.2g}. Divide the mean "
        "of ours by the mean of theirs.",
    )
    expect(
        high - low < 1e-6,
        f"{half}, so the ratio cannot move, and yours does. Resample both means with the same "
        "objects: separate draws, or one mean that stays, break the pairs.",
    )
    expect_close(low, 0.5, "Ours is half of theirs on every object: the ratio is 0.5.")
    theirs = np.exp(rng.normal(size=40))
    ours = 0.3 * theirs + rng.uniform(0.0, 1.0, 40)
    low, high = pair(ask(solution, ours, theirs))
    right_low, right_high = ratio_interval(ours, theirs)
    expect(high - low > 1e-6, "The interval has no width: draw the objects with replacement.")
    ratios = ours / theirs
    expect(
        not np.allclose([low, high], np.quantile(ratios, [0.025, 0.975])),
        "These are quantiles of the objects' own ratios: draw objects anew, and take means.",
    )
    expect(
        right_low - 0.2 < (low + high) / 2 < right_high + 0.2,
        "That is the mean of the ratios per object, or has a median in it; divide the mean of "
        "ours by the mean of theirs.",
    )
    width, right_width = high - low, right_high - right_low
    expect(
        width > 0.91 * right_width,
        "The interval is too narrow: take the 2.5 % and 97.5 % quantiles.",
    )
    expect(
        width < 1.12 * right_width,
        "The interval is too wide: take the 2.5 % and 97.5 % quantiles, all objects drawn.",
    )
    expect_close(
        [low, high], [right_low, right_high], "The ends are elsewhere.", tolerance=0.04 * right_high
    )


@checker
def check_two_way_interval(solution) -> None:
    """(differences [S, O], draws, seed) -> (low, high)."""
    rng = np.random.default_rng(0)
    trainings = np.array([[-1.0], [0.0], [1.0]]) + np.zeros((1, OBJECTS))
    low, high = pair(ask(solution, trainings))
    expect(low <= high, "The first number should be the lower end.")
    expect(
        high - low > 0.5,
        "Three trainings at -1, 0 and 1, equal on all objects: your interval does not see that "
        "trainings differ. Draw the seeds anew too.",
    )
    objects = rng.normal(size=(1, OBJECTS)) + np.zeros((SEEDS, 1))
    low, high = pair(ask(solution, objects))
    right = two_way_interval(objects)
    expect(
        high - low > 0.8 * (right[1] - right[0]),
        "Three equal trainings are no more than one: your interval is too narrow. Draw objects "
        "as whole columns, not every number by itself.",
    )
    mixed = simulated(0.5, rng)
    right = two_way_interval(mixed)
    expect_close(
        pair(ask(solution, mixed)), right, "The ends are elsewhere.", 0.15 * (right[1] - right[0])
    )


@checker
def check_paired_differences(solution) -> None:
    """(ours by object, theirs by object) -> differences [O]."""
    ours = {"cup": 1.0, "car": 5.0, "hat": 9.0}
    theirs = {"hat": 8.0, "cup": 0.0, "car": 4.0}
    answer = ask(solution, ours, theirs)
    expect(isinstance(answer, np.ndarray), "Return a NumPy array.")
    expect(answer.shape == (3,), f"Three objects have three differences; got {answer.shape}.")
    expect(
        np.allclose(answer, 1.0),
        "Ours is 1 above theirs on every object, whatever the order of the files; "
        f"yours says {np.round(answer, 1).tolist()}.",
    )
    answer = np.asarray(ask(solution, {**ours, "dog": 3.0}, {**theirs, "fox": 7.0}), dtype=float)
    expect(answer.shape == (3,), "Only objects that both have make a pair.")
    answer = ask(
        solution, {"hat": 9.0, "cup": 1.0, "car": 5.0}, {"cup": 0.0, "car": 3.0, "hat": 6.0}
    )
    expect(
        np.allclose(answer, [3.0, 1.0, 2.0]),
        "The differences stand in the order of ours: not sorted, and not in the order of theirs.",
    )


@checker
def check_judge(solution) -> None:
    """(differences [S, O]) -> 1, -1 or 0, tried on simulated experiments."""
    rng = np.random.default_rng(0)
    tables = [simulated(0.5, rng) for _ in range(100)]
    words = [ask(solution, table) for table in tables]
    expect(set(words) <= {-1, 0, 1}, "Return 1, -1 or 0.")
    scaled = [ask(solution, 10 * table) for table in tables]
    expect(
        # a judge that draws numbers may change a few verdicts
        np.mean(np.not_equal(words, scaled)) <= 0.1,
        "All differences ten times as large get other verdicts: compare the mean with its "
        "standard error, not with a fixed number.",
    )
    alarms = 1 - share(solution, 0, NOTHING, rng)
    found, lost = (share(solution, sign, EFFECTS, rng) for sign in (1, -1))
    measured = f"False alarms {alarms:.1%}, found {found:.0%}"
    expect(
        alarms <= FALSE_ALARMS + two_errors(FALSE_ALARMS, NOTHING),
        f"{measured}: at most {FALSE_ALARMS:.0%} false alarms are allowed. Other trainings move "
        "the mean and other objects do; the standard error needs both. Three trainings know "
        "their part badly, so take more standard errors than 1.96.",
    )
    least = FOUND - two_errors(FOUND, EFFECTS)
    expect(found >= least, f"{measured}: {FOUND:.0%} of the real differences are to be found.")
    expect(lost >= least, f"{measured}, but only {lost:.0%} of those below zero.")


def share(solution, effect: int, count: int, rng: np.random.Generator) -> float:
    """How often the judge says `effect`, which is true: 1, -1 or 0."""
    words = [ask(solution, simulated(effect, rng)) for _ in range(count)]
    return np.mean([word == effect for word in words])


def two_errors(share: float, count: int) -> float:
    """Two standard errors of a share that was measured in `count` experiments."""
    return 2 * np.sqrt(share * (1 - share) / count)


def simulated(effect: float, rng: np.random.Generator) -> np.ndarray:
    """An experiment [S, O]: the effect, what a training adds to all of its objects,
    what an object adds in all trainings, and noise.
    """
    training = rng.normal(0, TRAINING, (SEEDS, 1))
    objects = rng.normal(0, 1, (1, OBJECTS))
    return effect + training + objects + rng.normal(0, NOISE, (SEEDS, OBJECTS))


def pair(answer) -> tuple[float, float]:
    """Two numbers."""
    answer = np.asarray(answer, dtype=float)
    expect(answer.shape == (2,), f"Return the pair (low, high); got shape {answer.shape}.")
    return float(answer[0]), float(answer[1])
