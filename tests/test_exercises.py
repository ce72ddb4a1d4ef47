"""The checkers' tools: one sentence for whatever a learner may hand in."""

from functools import partial

import pytest
import torch
from notebook_world import rejects

from gsv3d_lib.course.exercises import ask, checker, expect_close, expect_shape
from gsv3d_lib.course.exercises.full_scale import check_accumulate


@checker
def check_halve(halve):
    result = ask(halve, torch.tensor([2.0, 4.0]))
    expect_shape(result, (2,))
    expect_close(result, [1.0, 2.0], "Divide by two.")


def test_a_right_answer_is_told(capsys):
    def halve(x):
        return x / 2

    assert check_halve(halve)
    assert capsys.readouterr().out == "✓ halve: right.\n"


@pytest.mark.parametrize("nothing", [None, ...])
def test_a_stub_is_not_wrong(nothing, capsys):
    def halve(x):
        return nothing

    assert not check_halve(halve)
    said = capsys.readouterr().out
    assert "halve: not written yet" in said and "add the `return`" in said


@pytest.mark.parametrize(
    ("halve", "message"),
    [
        (lambda x: 2 * x, r"Divide by two. \(largest error 6\)"),
        (lambda x: x[:1] / 2, r"should have shape \(2,\); got \(1,\)"),
        (lambda x: [1.0, 2.0], r"should be a tensor of shape \(2,\); got \[1.0, 2.0\]"),
        (lambda x: x / 0 - x / 0, "inf or nan"),
        (lambda x: x.no_such_method(), r"\(tensor \[2\]\) stops with AttributeError"),
        (
            partial(lambda x: x.no_such_method()),
            r"your function\(tensor \[2\]\) stops with AttributeError",
        ),
    ],
)
def test_a_wrong_answer_is_one_sentence(halve, message):
    assert rejects(check_halve, halve, message)


@checker
def check_double(double):
    expect_close(ask(double, 2.0), 4.0, "Multiply by two.")


@pytest.mark.parametrize("answer", ["four", {}, [torch.zeros(2), 4]])
def test_an_answer_of_another_kind_is_one_sentence(answer):
    assert rejects(check_double, lambda x: answer, "returned what cannot be compared")


@pytest.mark.parametrize("answer", [1.5, torch.tensor(1.5)])
def test_a_loss_is_no_gradient(answer):
    hint = "Return weight.grad when it is filled"
    assert rejects(check_accumulate, lambda loss_of, weight, batch, size: answer, hint)
