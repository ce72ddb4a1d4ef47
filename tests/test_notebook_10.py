"""Notebook 10: its interval and verdict equal the library, its checkers find typical
errors.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from notebook_world import accepts, definitions, rejects
from scipy.stats import t as student

from gsv3d_lib.course.exercises import claims as exercises
from gsv3d_lib.evaluation import experiments, metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def notebook() -> dict:
    return definitions("10")


# ---------------------------------------------------------------- derivations


def test_bootstrap_interval_equals_the_library(notebook):
    values = np.random.default_rng(0).normal(1.0, 2.0, 60)
    assert notebook["bootstrap_interval"](values) == metrics.bootstrap_interval(values)


@pytest.mark.parametrize(
    ("seeds", "low", "high", "end"),
    [
        ([], None, None, "no seed in common with the reference: no verdict"),
        ([0.2], 0.1, 0.3, "one seed: no verdict"),
        ([0.2, 0.1], 0.1, 0.3, "2 of 2 seeds better: better, by two seeds only"),
        ([0.3, -0.1], 0.05, 0.2, "1 of 2 seeds better: no difference shown, by two seeds only"),
        ([0.2, 0.1, 0.3], 0.1, 0.3, "3 of 3 seeds better: better"),
        ([0.4, 0.3, -0.1], 0.1, 0.3, "2 of 3 seeds better: no difference shown"),
        ([0.2, 0.1, 0.3], -0.1, 0.3, "3 of 3 seeds better: no difference shown"),
        ([-0.2, -0.1, -0.3], -0.3, -0.1, "0 of 3 seeds better: worse"),
    ],
)
def test_an_arm_is_judged_by_two_seeds_or_more_that_agree(notebook, seeds, low, high, end):
    def results(sign):
        ends = (None, None) if low is None else sorted((sign * low, sign * high))
        difference = {
            "mean": sign * np.mean(seeds) if seeds else None,
            "low": ends[0],
            "high": ends[1],
        }
        return {"differences": {"x": {"psnr": difference | {"seeds": [sign * s for s in seeds]}}}}

    for sign, better in ((1, "higher"), (-1, "lower")):
        assert notebook["verdict"](results(sign), "x", "psnr", better).endswith(end)


def test_the_readmes_claims_are_judged_as_the_notebook_does(notebook):
    words = {"yes": ": better", "no": ": worse", "not shown": ": no difference shown"}
    for _, name, arm, metric, sign in experiments.CLAIMS:
        results = json.loads((ROOT / "data" / "results" / f"{name}.json").read_text())
        word = words[experiments.holds(results["differences"][arm][metric], sign)]
        assert notebook["verdict"](
            results, arm, metric, "higher" if sign > 0 else "lower"
        ).endswith(word)


def test_the_largest_strength_is_found_by_name(notebook):
    results = {"differences": dict.fromkeys(("none", "lambda_0.3", "lambda_10", "lambda_10_solid"))}
    assert notebook["strengths"](results) == {0.3: "lambda_0.3", 10.0: "lambda_10"}


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize("name", ["ratio_interval", "two_way_interval", "judge"])
def test_stubs_are_not_written_and_solutions_are_right(notebook, name, capsys):
    check = getattr(exercises, f"check_{name}")
    assert not check(notebook[name])
    assert "not written yet" in capsys.readouterr().out
    assert accepts(check, getattr(exercises, name))


def resampled(
    ours, theirs, draws=4000, replace=True, paired=True, quantiles=(0.025, 0.975), of_means=True
):
    rng, count = np.random.default_rng(1), len(ours)

    def indices():
        return (
            rng.integers(count, size=(draws, count))
            if replace
            else rng.random((draws, count)).argsort(axis=1)
        )

    i = indices()
    j = i if paired else indices()
    ratios = ours[i].mean(1) / theirs[j].mean(1) if of_means else (ours[i] / theirs[j]).mean(1)
    return tuple(np.quantile(ratios, quantiles))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"paired": False}, "break the pairs"),
        ({"replace": False}, "with replacement"),
        ({"quantiles": (0.05, 0.95)}, "too narrow"),
        ({"quantiles": (0.005, 0.995)}, "too wide"),
        ({"of_means": False}, "mean of the ratios"),
    ],
)
def test_ratio_interval_rejects(options, hint):
    assert rejects(exercises.check_ratio_interval, lambda a, b: resampled(a, b, **options), hint)


def quantiles_of(function):
    """An interval from resampled objects, by another function than a ratio of means."""

    def interval(ours, theirs):
        i = np.random.default_rng(1).integers(len(ours), size=(4000, len(ours)))
        return tuple(np.quantile(function(ours[i], theirs[i]), [0.025, 0.975]))

    return interval


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (quantiles_of(lambda a, b: a.mean(1) - b.mean(1)), "the ratio is 0.5; yours lies around"),
        (quantiles_of(lambda a, b: b.mean(1) / a.mean(1)), "the ratio is 0.5; yours lies around"),
        (quantiles_of(lambda a, b: a.mean(1) / b.mean()), "one mean that stays"),
        (quantiles_of(lambda a, b: np.median(a, 1) / np.median(b, 1)), "a median"),
        (lambda a, b: tuple(np.quantile(a / b, [0.025, 0.975])), "objects' own ratios"),
    ],
)
def test_ratio_interval_rejects_other_numbers(wrong, hint):
    assert rejects(exercises.check_ratio_interval, wrong, hint)


def test_ratio_interval_accepts_another_generator():
    assert accepts(exercises.check_ratio_interval, resampled)


def two_way(table, seeds=True, objects=True, whole=True):
    rng = np.random.default_rng(1)
    count, width = table.shape
    draws = 2000
    rows = rng.integers(count, size=(draws, count, 1)) if seeds else np.arange(count)[:, None]
    shape = (draws, 1, width) if whole else (draws, count, width)
    columns = rng.integers(width, size=shape) if objects else np.arange(width)
    return tuple(np.quantile(table[rows, columns].mean(axis=(-2, -1)), [0.025, 0.975]))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda d: two_way(d, seeds=False), "does not see that trainings differ"),
        (lambda d: two_way(d, whole=False), "as whole columns"),
        (lambda d: two_way(d)[::-1], "lower end"),
        (lambda d: tuple(1.5 * np.array(two_way(d))), "elsewhere"),
    ],
)
def test_two_way_interval_rejects(wrong, hint):
    assert rejects(exercises.check_two_way_interval, wrong, hint)


def test_the_seeded_bug_is_told_and_its_repair_accepted(notebook, capsys):
    check = exercises.check_paired_differences
    assert not check(notebook["paired_differences"])
    assert "whatever the order of the files" in capsys.readouterr().out
    assert accepts(check, exercises.paired_differences)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (
            lambda a, b: np.array(list(a.values())) - np.array(list(b.values())),
            "whatever the order",
        ),
        (
            lambda a, b: np.array([x - y for x in a.values() for y in b.values()]),
            "three differences",
        ),
        (lambda a, b: np.array([a[k] - b.get(k, 0) for k in a]), "Only objects that both have"),
        (lambda a, b: np.array([a[k] - b[k] for k in sorted({*a} & {*b})]), "the order of ours"),
        (lambda a, b: np.array([a[k] - b[k] for k in b if k in a]), "the order of ours"),
        (lambda a, b: [a[k] - b[k] for k in a if k in b], "NumPy array"),
    ],
)
def test_paired_differences_rejects(wrong, hint):
    assert rejects(exercises.check_paired_differences, wrong, hint)


def by_errors(differences, errors):
    """The mean against so many standard errors."""
    parts = [differences.mean(axis=axis) for axis in (0, 1)]
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    return int(np.sign(differences.mean())) * int(abs(differences.mean()) > errors * error)


def t_test(means):
    error = means.std(ddof=1) / np.sqrt(len(means))
    return int(np.sign(means.mean())) * int(abs(means.mean()) > student.ppf(0.975, 2) * error)


def welch(differences):
    """The degrees of freedom by Satterthwaite: 5 % false alarms, nearly exactly."""
    parts = [differences.mean(axis=axis) for axis in (0, 1)]
    squares = np.array([part.var(ddof=1) / len(part) for part in parts])
    freedom = squares.sum() ** 2 / sum(squares**2 / [len(part) - 1 for part in parts])
    return by_errors(differences, student.ppf(0.975, freedom))


@pytest.mark.parametrize(
    "right", [welch, *(partial(by_errors, errors=errors) for errors in (2.3, 2.4, 2.6, 3.0))]
)
def test_judge_accepts_what_keeps_the_rates(right):
    assert accepts(exercises.check_judge, right)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda d: np.sign(d.mean()), "false alarms are allowed"),
        (lambda d: by_errors(d, 1.96), "more standard errors than 1.96"),
        (lambda d: by_errors(d, 4.0), "real differences are to be found"),
        (lambda d: np.sign(d.mean()) * (abs(d.mean()) > 0.5), "not with a fixed number"),
        (lambda d: t_test(d.mean(axis=1)), "other objects do"),
        (lambda d: int(metrics.bootstrap_interval(d.mean(0), 200)[0] > 0), "false alarms"),
        (lambda d: 0, "real differences are to be found"),
        (lambda d: max(exercises.judge(d), 0), "of those below zero"),
        (lambda d: d.mean(), "Return 1, -1 or 0"),
    ],
)
def test_judge_rejects(wrong, hint):
    assert rejects(exercises.check_judge, wrong, hint)
