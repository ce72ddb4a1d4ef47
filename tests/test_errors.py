"""One sentence for what a user can mend, a traceback for a bug of ours."""

import errno

import numpy as np
import pytest

from gsv3d_lib.system.command import exit_code
from gsv3d_lib.system.errors import MissingFile, UserError


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize("error", [UserError("mend this"), MissingFile("mend this")])
def test_what_a_user_can_mend_is_one_sentence(error, capsys):
    assert exit_code(raising(error), None) == 2
    assert capsys.readouterr().err == "gsv3d: mend this\n"


def test_user_errors_are_the_errors_that_python_programs_expect():
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingFile, ValueError) and issubclass(MissingFile, FileNotFoundError)


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="broadcast"):
        exit_code(lambda args: np.ones(2) + np.ones(3), None)
    with pytest.raises(FileNotFoundError):
        exit_code(raising(FileNotFoundError(errno.ENOENT, "No such file", "ours.bin")), None)


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
    assert exit_code(raising(OSError(number, "no", "runs/x.ply")), None) == 2
    said = capsys.readouterr().err
    assert word in said and "runs/x.ply" in said and said.count("\n") == 1


def test_control_c_has_its_own_status(capsys):
    assert exit_code(raising(KeyboardInterrupt()), None) == 130
    assert "stopped" in capsys.readouterr().err
