"""The checkers' tools: one sentence for whatever a learner may hand in."""

import pytest
import torch

from gsv3d_lib.exercises import Wrong, ask, checker, expect_close, expect_shape


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


def test_a_stub_is_not_wrong(capsys):
    def halve(x):
        """To be written."""

    assert not check_halve(halve)
    assert "halve: not written yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("halve", "message"),
    [
        (lambda x: 2 * x, r"Divide by two. \(largest error 6\)"),
        (lambda x: x[:1] / 2, r"should have shape \(2,\); got \(1,\)"),
        (lambda x: [1.0, 2.0], r"should be a tensor of shape \(2,\); got \[1.0, 2.0\]"),
        (lambda x: x / 0 - x / 0, "inf or nan"),
        (lambda x: x.no_such_method(), r"\(tensor \[2\]\) stops with AttributeError"),
    ],
)
def test_a_wrong_answer_is_one_sentence(halve, message):
    with pytest.raises(Wrong, match=message) as caught:
        check_halve(halve)
    assert caught.value._render_traceback_() == [f"✗ {caught.value}"]
