"""What the command lines share: how they end, where they may write, and how options are
given.

Every `main` is `exit_code(run, parser, arguments)`. Its statuses: 0; 1 where the
command found something bad (a failing notebook, a damaged shard); 2 with one sentence
on stderr for what the user can mend (argparse's own for options, `UserError`) and for
what the machine did (a full disk, no permission, no memory); 130 after Ctrl-C; 141
where the reader of its output went away (`| head`). Any other exception is a bug of
ours and keeps its traceback.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import Doubt, UserError, machine_fault
from .paths import find, output, own_folder

READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended


def command_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m gsv3d_lib NAME`; `text` is its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m gsv3d_lib {name}".rstrip(),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_code(
    run: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: list[str] | None = None,
) -> int:
    """Read the options, run the command with them and return the exit status: the
    module's text lists them.
    """
    tolerate_consoles()
    try:
        try:
            with plain_doubts():
                return run(parser.parse_args(arguments)) or 0
        finally:
            flush()  # here, where a full disk or a reader that went away still becomes a status
    except UserError as error:
        return fault(str(error))
    except KeyboardInterrupt as error:
        fault(str(error) or "stopped by you; what was finished is kept.")
        return 130
    except BrokenPipeError:
        if not reader_gone():  # of another program's input: ffmpeg died
            raise
        drop_output()
        return READER_GONE
    except Exception as error:
        sentence = machine_fault(error)
        if sentence is None:
            raise
        drop_output()
        return fault(sentence)


@contextmanager
def plain_doubts() -> Iterator[None]:
    """A `Doubt` is printed like an error, as one sentence without the line of code that
    gave it.
    """
    usual = warnings.formatwarning

    def sentence(message, category, *place):
        return (
            f"gsv3d: {message}\n"
            if issubclass(category, Doubt)
            else usual(message, category, *place)
        )

    warnings.formatwarning = sentence
    try:
        yield
    finally:
        warnings.formatwarning = usual


def fault(sentence: str) -> int:
    """Say on stderr why a command ends; returns the status of that."""
    print(f"gsv3d: {sentence}", file=sys.stderr)
    return 2


def tolerate_consoles() -> None:
    """A console that is not UTF-8 must not end a command at its first umlaut."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def reader_gone() -> bool:
    """Whether nobody reads stdout or stderr any more; True where the system cannot say."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        try:
            poll.register(stream.fileno(), 0)
        except (AttributeError, OSError, ValueError):  # none at all, none of the system's, closed
            continue
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def drop_output() -> None:
    """What is still unwritten goes nowhere, else Python complains about it when it
    ends.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except AttributeError:  # started without this stream
            continue


def check_writable(path: Path) -> None:
    """Raises UserError where a file at `path` could not be written: before hours of
    work, not after them.
    """
    place = path.absolute().parent
    while not os.path.lexists(place):
        place = place.parent
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder; name a file in it.")
    if path.exists() and not path.is_file():  # to replace /dev/null would harm every program
        raise UserError(f"{path} cannot be written: it is no ordinary file; name another place.")
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"{path} cannot be written: {place} is no folder that you may write to.")


@contextmanager
def results_folder(wanted: Path, names: Iterable[str]) -> Iterator[Path]:
    """`paths.own_folder`, and a line where it is not the one that was asked for."""
    with own_folder(wanted, names) as folder:
        if folder != wanted.absolute():
            print(f"{wanted} holds another run's results, which stay; these go to {folder}.")
        yield folder


# ---------------------------------------------------------------- types of options


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text[:40]!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, got {text[:40]}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be {high} or less, got {text[:40]}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """The type of an option that is a finite number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # NaN is in no range
            raise argparse.ArgumentTypeError(
                f"must be a number from {low:g} to {high:g}, got {text[:40]!r}"
            )
        return value

    return read


MANY = 10**9  # more steps, objects or pixels than any machine has time for
positive = whole(1, MANY)  # counts something
pixels = whole(8, 4096)  # the side of a picture
sampler_steps = whole(1, 1000)
seed = whole(0, 2**63 - 1)
training_seed = whole(0, 10**8)  # `training.example_generator` multiplies it
batch = whole(1, 65_535)  # it leaves so much room
guidance = number(0.0, 100.0)

ELEVATION_HELP = "of the camera that took the image (default 15); auto estimates it"


def degrees(text: str) -> float | None:
    """The option --elevation: a number, or None for "auto"."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -90 < value < 90:
        raise argparse.ArgumentTypeError(
            f"must be auto or between -90 and 90 degrees, got {text[:40]}"
        )
    return value


def input_path(text: str | Path) -> Path:
    """What a command reads, by the rule that `paths` states."""
    return find(named(text))


def output_path(text: str | Path) -> Path:
    """What a command writes, by the same rule."""
    return output(named(text))


def named(text: str | Path) -> str | Path:
    if not str(text):
        raise argparse.ArgumentTypeError("must name a file or folder, got ''")
    return text
