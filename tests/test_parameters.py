"""Parameters of notebooks: no value that a notebook cannot use gets through, no file
costs more than a moment.
"""

import resource
import time

import pytest
from command_world import call

from gsv3d_lib.course import parameters
from gsv3d_lib.course.parameters import (
    RULES,
    check_parameters,
    declared_parameters,
    read_parameters,
)
from gsv3d_lib.system.errors import MissingFile, UserError

NUMBERS = [path.name[:2] for path in parameters.find_notebooks([])]


def declared(number: str) -> dict:
    (notebook,) = parameters.find_notebooks([number])
    return declared_parameters(notebook)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_parameter_of_a_notebook_has_a_rule_or_another_check(number):
    """Numbers and lists have a rule; text is a path, or the scale and stages that
    `check_training` sees.
    """
    elsewhere = {
        "weights",
        "small_weights",
        "folder",
        "image_path",
        *parameters.PLACES,
        "scale",
        "full_run",
        "full_stages",
        "full_data",
    }
    values = declared(number)
    assert [name for name in values if name not in RULES and name not in elsewhere] == []
    assert check_parameters({}, values) == {}  # the defaults are in their ranges


@pytest.mark.parametrize(
    ("number", "given", "message"),
    [
        ("00", {"steps": -5}, "steps is from 1 to .*; got -5"),
        ("00", {"steps": 0}, "steps is from 1"),
        ("00", {"seed": -1}, "seed is from 0"),
        ("00", {"elevation": 90.0}, "elevation is above -90 and below 90; got 90.0"),
        ("00", {"guidance": float("nan")}, "guidance is a number; got nan"),
        ("00", {"guidance": float("inf")}, "guidance is a number; got inf"),
        ("00", {"steps": 10**5000}, "got a number of thousands of digits"),
        ("01", {"chosen": 6}, "chosen is from 0 to num_objects - 1 = 3; got 6"),
        ("01", {"num_objects": 2, "chosen": 2}, "chosen is from 0 to num_objects - 1 = 1; got 2"),
        ("03", {"size": 10**9}, "size is from 8 to 1024"),
        ("04", {"hero": 4}, "hero is an index into object_seeds, 0 to 3; got 4"),
        ("04", {"object_seeds": []}, "object_seeds is a list of seeds"),
        ("04", {"front": 16}, "front is from 0 to 15"),
        ("06", {"overfit_lr": 0.0}, "overfit_lr is above 0 and below 1"),
        ("07", {"num_frames": 5}, "num_frames is one of 4, 8, 16; got 5"),
        ("11", {"gpus": 0}, "gpus is from 1"),
    ],
)
def test_values_that_a_notebook_cannot_use_are_named(number, given, message):
    with pytest.raises(UserError, match=message):
        check_parameters(given, declared(number))


def test_indices_may_be_zero():
    assert check_parameters({"hero": 0, "overfit": 0, "front": 0}, declared("04"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["07", "--set", "scale=huge"], "There is no preset 'huge'"),
        (["07", "--set", "steps=-5"], "steps is from 1"),
        (["07", "--set", "weights=data/checkpoints/none"], "is no GSV3D checkpoint"),
        (["07", "--set", "full_stages=['vea']"], "The stages are"),
        (
            ["07", "--set", "full_run=True", "--set", "full_data=['nowhere']"],
            "There is no dataset in nowhere",
        ),
        (["11", "--set", "scale=tiny"], "cannot be shared equally by 4 processes"),
        (["00", "--set", "image_path=none.png"], "There is no picture 'none.png'"),
        (["00", "--set", "out_dir=pyproject.toml"], "is no folder that you may write to"),
        (["00", "--set", "steps=" + "[" * 5000], "steps is a int"),
        (["00", "--set", "=5"], "--set takes NAME=VALUE"),
        (["00", "--set", "steps={[]: 1}"], "steps is a int"),
        (["", "--set", "steps=1"], "No notebook begins with ''"),
    ],
)
def test_check_finds_what_a_run_would(words, message, capsys):
    assert call("run", [*words, "--check"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_check_writes_nothing(tmp_path, capsys):
    assert call("run", ["00", "--check", "--set", "steps=3", "--out", str(tmp_path / "out")]) == 0
    assert "1 parameters fit" in capsys.readouterr().out and not list(tmp_path.iterdir())


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm")
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BOMB.encode(), "alias"),
        (b"a: &a [*a]", "alias"),
        (b"a: 1\na: 2", "gives a 2 times"),
        (b"a: [[[[1]]]]", "nested more than"),
        (b"a: " + b"[" * 60_000, "nested more than"),
        (b"{" * 60_000, "nested more than"),
        (b"x" * 70_000, "larger than 64 kB"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not YAML"),
        (b"\xff\xfe\0", "is not YAML"),
        (b"a: 1\n---\nb: 2", "is not YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "is not YAML"),
        (b"a: 2001-99-99", "is not YAML"),
        (b"a: " + b"9" * 60_000, "is not YAML"),
        (b"just words", "it holds a str"),
        (b"1: 2", "should hold lines"),
        (b"\xef\xbb\xbf", "it holds a NoneType"),
    ],
)
def test_a_bad_parameter_file_is_refused_at_once(tmp_path, data, message):
    path = tmp_path / "p.yaml"
    path.write_bytes(data)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as raised:
        read_parameters(path)
    assert len(str(raised.value)) < 500
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_parameter_file_may_have_a_byte_order_mark_and_umlauts(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes("\ufeff# Plücker\nname: Müll\n".encode())
    assert read_parameters(path) == {"name": "Müll"}


@pytest.mark.parametrize("place", ["none", "."])
def test_a_parameter_file_that_is_not_there(tmp_path, place):
    with pytest.raises(MissingFile, match="There is no parameter file"):
        read_parameters(tmp_path / place)
