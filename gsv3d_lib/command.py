"""What the command lines share: an error that a user can mend is one sentence, and how some options are given."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from .errors import Doubt, UserError, machine_fault


def exit_code(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command and return its exit status.

    0; argparse's 2 with one sentence on stderr for what the user can mend (`UserError`) and for what the machine did
    (a full disk, no permission); 130 after Ctrl-C. Any other exception is a bug of ours and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 must not end a command at its first umlaut
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    usual = warnings.formatwarning
    warnings.formatwarning = lambda what, kind, *rest: (
        f"gsv3d: {what}\n" if issubclass(kind, Doubt) else usual(what, kind, *rest)
    )
    try:
        run(args)
    except UserError as error:
        print(f"gsv3d: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngsv3d: stopped by you; what was finished is kept.", file=sys.stderr)
        return 130
    except OSError as error:
        sentence = machine_fault(error)
        if sentence is None:
            raise
        print(f"gsv3d: {sentence}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = usual
    return 0


def check_writable(path: Path) -> None:
    """Raises ValueError where a file at `path` could not be written: before hours of work, not after them."""
    place = path.absolute().parent
    while not os.path.lexists(place):
        place = place.parent
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder; name a file in it.")
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"{path} cannot be written: {place} is no folder that you may write to.")


def positive(text: str) -> int:
    """An option that counts something."""
    value = int(text)  # argparse turns a ValueError into its own sentence
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


ELEVATION_HELP = "of the camera that took the image (default 15); auto estimates it"


def degrees(text: str) -> float | None:
    """The option --elevation: a number, or None for "auto"."""
    if text == "auto":
        return None
    value = float(text)
    if not -90 < value < 90:
        raise argparse.ArgumentTypeError(f"must be auto or between -90 and 90 degrees, got {text}")
    return value
