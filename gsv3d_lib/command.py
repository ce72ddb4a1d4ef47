"""What the command lines share: an error that a user can mend is one sentence, and how an elevation is given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def exit_code(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command: 0, or 1 with the sentence on stderr where it raises ValueError or FileNotFoundError."""
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"gsv3d: {error}", file=sys.stderr)
        return 1
    return 0


ELEVATION_HELP = "of the camera that took the image (default 15); auto estimates it"


def degrees(text: str) -> float | None:
    """The option --elevation: a number, or None for "auto"."""
    if text == "auto":
        return None
    value = float(text)  # argparse turns a ValueError into its own sentence
    if not -90 < value < 90:
        raise argparse.ArgumentTypeError(f"must be auto or between -90 and 90 degrees, got {text}")
    return value
