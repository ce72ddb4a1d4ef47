"""One sentence for what a user can mend, a traceback for a bug of ours."""

import argparse
import errno
import os
import re
import subprocess
import sys
import warnings
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from gsv3d_lib import __main__ as door
from gsv3d_lib.system import command
from gsv3d_lib.system.command import exit_code
from gsv3d_lib.system.errors import Doubt, MissingFile, UserError


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize("error", [UserError("mend this"), MissingFile("mend this")])
def test_what_a_user_can_mend_is_one_sentence(error, capsys):
    assert exit_code(raising(error), ArgumentParser(), []) == 2
    assert capsys.readouterr().err == "gsv3d: mend this\n"


def test_a_doubt_is_one_sentence_too_and_ends_nothing(capsys):
    def run(args):
        warnings.showwarning("in mug.png a frame was taken off.", Doubt, "images.py", 1)
        warnings.showwarning("another", UserWarning, "other.py", 2)

    usual, shown = warnings.formatwarning, warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = lambda *said: sys.stderr.write(warnings.formatwarning(*said))
        assert exit_code(run, ArgumentParser(), []) == 0
    err = capsys.readouterr().err
    assert err.startswith(
        "gsv3d: in mug.png a frame was taken off.\nother.py:2: UserWarning: another"
    )
    assert warnings.formatwarning is usual and warnings.showwarning is shown


def test_user_errors_are_the_errors_that_python_programs_expect():
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingFile, ValueError) and issubclass(MissingFile, FileNotFoundError)


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="broadcast"):
        exit_code(lambda args: np.ones(2) + np.ones(3), ArgumentParser(), [])
    with pytest.raises(FileNotFoundError):
        exit_code(
            raising(FileNotFoundError(errno.ENOENT, "No such file", "ours.bin")),
            ArgumentParser(),
            [],
        )


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "full"),
        (errno.EACCES, "permissions"),
        (errno.EISDIR, "folder where a file"),
        (errno.ENOTDIR, "file where a folder"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EROFS, "read-only"),
    ],
)
def test_what_the_machine_does_is_one_sentence(number, word, capsys):
    assert exit_code(raising(OSError(number, "no", "runs/x.ply")), ArgumentParser(), []) == 2
    said = capsys.readouterr().err
    assert word in said and "runs/x.ply" in said and said.count("\n") == 1


def test_control_c_has_its_own_status(capsys):
    assert exit_code(raising(KeyboardInterrupt()), ArgumentParser(), []) == 130
    assert "stopped" in capsys.readouterr().err


def test_what_the_machine_does_is_told_by_other_libraries_too(capsys):
    # safetensors
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert exit_code(raising(RuntimeError(said)), ArgumentParser(), []) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert exit_code(raising(MemoryError()), ArgumentParser(), []) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_a_command_says_how_it_ended(capsys):
    assert exit_code(lambda _: None, ArgumentParser(), []) == 0
    assert exit_code(lambda _: 1, ArgumentParser(), []) == 1
    assert exit_code(raising(KeyboardInterrupt("kept in runs/x")), ArgumentParser(), []) == 130
    assert "kept in runs/x" in capsys.readouterr().err


# ---------------------------------------------------------------- consoles

TALKS = """
import argparse, sys
from gsv3d_lib.system.command import exit_code
def run(args):
    for k in range(100_000 if args.long else 1):
        print("\\u03bb, Pl\\u00fccker, 360\\u00b0", k)
parser = argparse.ArgumentParser(description="\\u03bb")
parser.add_argument("--long", action="store_true")
sys.exit(exit_code(run, parser))
"""


def talk(tail: str, shell: str = "", **environment) -> subprocess.CompletedProcess:
    """The command above in a shell, whose `tail` says what becomes of its output."""
    line = f'{shell} "$PYTHON" -c "$TALKS" {tail}'
    environment = {**os.environ, "PYTHON": sys.executable, "TALKS": TALKS, **environment}
    return subprocess.run(
        ["bash", "-c", line], env=environment, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
@pytest.mark.parametrize("option", ["", "--help"])
def test_a_console_that_is_not_utf8_is_no_error(environment, option):
    done = talk(option, **environment)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.parametrize(
    "tail", ["--long | head -1; exit ${PIPESTATUS[0]}", "| true; exit ${PIPESTATUS[0]}"]
)
def test_a_reader_that_goes_away_is_quiet(tail):
    done = talk(tail)
    assert done.stderr == "" and done.returncode in (0, command.READER_GONE)
    assert done.returncode == command.READER_GONE or "--long" not in tail


def test_output_that_cannot_be_written_is_one_sentence():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    done = talk("> /dev/full")
    assert (
        done.returncode == 2 and "the disk is full" in done.stderr and done.stderr.count("\n") == 1
    )


def test_output_that_is_closed_is_no_error():
    assert talk(">&-").returncode == 0


def test_a_pipe_of_another_program_that_breaks_is_no_quiet_end():
    with pytest.raises(BrokenPipeError):
        exit_code(raising(BrokenPipeError(errno.EPIPE, "ffmpeg")), ArgumentParser(), [])


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (command.positive, ["1", "12"], ["0", "-1", "1.5", "nan", "", "9" * 30, "9" * 5000, "two"]),
        (command.pixels, ["8", "576"], ["7", "100000"]),
        (command.sampler_steps, ["1", "50"], ["0", "1000000000"]),
        (command.seed, ["0", str(2**63 - 1)], ["-1", str(2**64), "1e3"]),
        (command.guidance, ["0", "2.5"], ["nan", "inf", "-1", "1e400", "x", ""]),
        (command.degrees, ["auto", "-89.9", "15"], ["nan", "inf", "90", "-90", "up"]),
    ],
)
def test_options_take_what_they_mean(kind, good, bad):
    for text in good:
        kind(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="must be") as raised:
            kind(text)
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["", *door.COMMANDS])
def test_every_command_has_options_and_refuses_others(name, capsys):
    words = [name] if name else []
    with pytest.raises(SystemExit) as ended:
        door.main([*words, "--help"])
    assert ended.value.code == 0 and re.match(r"usage: .*-h", capsys.readouterr().out)
    with pytest.raises(SystemExit) as ended:
        door.main([*words, "--nonsense"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search("unrecognized arguments|required", said)


def test_no_command_is_left_out():
    """Every module with a parser stands behind the door, which says so."""
    library = Path(door.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in library.rglob("*.py")}
    parsers = {path for path, source in sources.items() if "\ndef build_parser(" in source}
    homes = {library / f"{home.replace('.', '/')}.py" for home in door.COMMANDS.values()}
    assert parsers == homes | {Path(door.__file__)}
    assert all("\ndef run(" in sources[path] for path in homes)
    assert re.findall(r"^    (\w+) {2,}", door.__doc__, re.M) == list(door.COMMANDS)


@pytest.mark.parametrize("name", ["__main__", *door.COMMANDS.values()])
def test_one_word_means_one_thing_in_all_commands(name):
    """No second word for what docs/conventions.md names; each is explained."""
    parser = import_module(f"gsv3d_lib.{name}").build_parser()
    options = parser._option_string_actions
    assert not {"--scale", "--processes", "--threads", "--checkpoint"} & set(options)
    for word in command.COMMON.keys() & options.keys():
        assert options[word].help, word


def test_the_words_of_all_commands_are_stated():
    stated = (Path(door.__file__).parents[1] / "docs/conventions.md").read_text()
    assert all(f"`{word}`" in stated for word in command.COMMON)
