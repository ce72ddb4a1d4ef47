"""The manner of all commands: how they end, where they write, what options mean.

A command is `exit_code(run, parser, arguments)`. Its statuses: 0; 1 where the
command found something bad (a failing notebook, a damaged shard); 2 with one sentence
on stderr for what the user can mend (argparse's own for options, `UserError`) and for
what the machine did (a full disk, no permission, no memory); 130 after Ctrl-C; 141
where the reader of its output went away (`| head`). Any other exception is a bug of
ours and keeps its traceback.
"""

import argparse
import io
import os
import select
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import arguments
from .errors import Doubt, UserError, machine_fault
from .paths import TINY, find, output, own_folder

READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended


def exit_code(
    run: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    given: list[str] | None = None,
) -> int:
    """Read the options, run the command, return its exit status (listed above).

    `run` finds the whole command line in `args.command`, for the records of results.
    """
    tolerate_consoles()
    given = sys.argv[1:] if given is None else given
    try:
        try:
            args = parser.parse_args(given)
            args.command = f"{parser.prog} {shlex.join(given)}"
            with plain_doubts():
                return run(args) or 0
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
    """A `Doubt` is printed as one sentence, without the line of code that gave it."""
    usual = warnings.formatwarning

    def sentence(message, category, *place):
        if issubclass(category, Doubt):
            return f"gsv3d: {message}\n"
        return usual(message, category, *place)

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
    """Whether nobody reads stdout or stderr any more; True where nobody can say."""
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
    """Send what is unwritten nowhere, else Python complains about it at its end."""
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
    """Raises UserError where `path` could not be written: before hours of work."""
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


# ---------------------------------------------------------------- options


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `low` to `high`."""

    def read(text: str) -> int:
        with option_errors():
            return arguments.whole("", number_in(text, int), low, high)

    return read


def number(low: float, high: float, ends: bool = True) -> Callable[[str], float]:
    """The type of an option that is a finite number in a range, `ends` included."""

    def read(text: str) -> float:
        with option_errors():
            return arguments.real("", number_in(text, float), low, high, ends)

    return read


def number_in(text: str, kind: type) -> float | str:
    """The number that a text spells, or the text itself, which the check then names."""
    try:
        value = kind(text)
    except ValueError:
        return text
    return value if value == value else text  # NaN


@contextmanager
def option_errors() -> Iterator[None]:
    """argparse puts the option's name before the sentence of an ArgumentTypeError."""
    try:
        yield
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def degrees(text: str) -> float | None:
    """The option --elevation: a number, or None for "auto"."""
    if text == "auto":
        return None
    try:
        return number(-90, 90, ends=False)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


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


MANY = 10**9  # more steps, objects or pixels than any machine has time for
positive = whole(1, MANY)  # counts something
pixels = whole(8, 4096)  # the side of a picture
sampler_steps = whole(1, 1000)
seed = whole(0, 2**63 - 1)
training_seed = whole(0, 10**8)  # `training.example_generator` multiplies it
batch = whole(1, 65_535)  # it leaves so much room
guidance = number(0.0, 100.0)

# Options that several commands take: one name, one meaning, one type.
FOLDER = {"type": input_path, "metavar": "FOLDER"}
DEFAULT = "(default: %(default)s)"
COMMON = {
    "--weights": {**FOLDER, "default": TINY, "help": f"checkpoint folder {DEFAULT}"},
    "--data": {**FOLDER, "nargs": "+", "help": "dataset folders to read"},
    "--objects": {**FOLDER, "required": True, "help": "dataset folder to measure on"},
    "--limit": {"type": positive, "help": "only the first objects"},
    "--preset": {"default": "tiny", "help": f"tiny, small or paper {DEFAULT}"},
    "--gpus": {"type": whole(1, 100_000), "default": 1, "help": f"one process on each {DEFAULT}"},
    "--workers": {"type": whole(1, 1000), "default": 1, "help": f"processes on the CPU {DEFAULT}"},
    "--steps": {"type": sampler_steps, "help": "of the sampler"},
    "--guidance": {"type": guidance, "help": "peak of the triangular guidance; 1 = none"},
    "--seed": {"type": seed, "default": 0, "help": f"of all random numbers {DEFAULT}"},
    "--elevation": {
        "type": degrees,
        "default": 15.0,
        "metavar": "DEGREES",
        "help": "of the camera that took the image (default: 15); auto estimates it",
    },
    "--no-lora": {"action": "store_true", "help": "without the geometric distillation"},
    "--no-back-projection": {
        "action": "store_true",
        "help": "without the input's own outline and colours where its camera sees the object",
    },
}


def command_parser(
    name: str, text: str | None, *common: str, **defaults
) -> argparse.ArgumentParser:
    """The parser of `python -m gsv3d_lib NAME`.

    text: its module's docstring.
    common: those of the `COMMON` options that it takes; defaults: its own for them.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m gsv3d_lib {name}".rstrip(),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option in common:
        parser.add_argument(option, **COMMON[option])
    parser.set_defaults(**defaults)
    return parser
