"""What the command lines share: an error that a user can mend is one sentence, not a traceback."""

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
