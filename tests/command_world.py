"""The commands that documents and notebooks give, and what each of them takes."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path

from gsv3d_lib.__main__ import COMMANDS
from gsv3d_lib.__main__ import main as door

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "gsv3d_lib"


def call(name: str, arguments: list[str]) -> int:
    """The exit status of `python -m gsv3d_lib NAME ARGUMENTS`."""
    return door([name, *arguments])


def module_file(name: str) -> Path:
    """The file of a module of the library: "data.dataset" -> gsv3d_lib/data/dataset.py;
    of a package its __init__.py.
    """
    path = LIBRARY.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def commands_in(text: str) -> list[tuple[str, str]]:
    """Every command in a text, with the rest of its line: ("train", " train --preset
    tiny") for `python -m gsv3d_lib train --preset tiny`, "" as the name where an image
    or nothing follows, and ("tools/X.py", ...) for a file that Python runs.
    """
    joined = text.replace("\\\n", " ")
    found = []
    for rest in re.findall(r"-m gsv3d_lib\b([^`\n]*)", joined):
        assert not rest.startswith("."), (
            f"a command is `python -m gsv3d_lib COMMAND`, not gsv3d_lib{rest}"
        )
        name = re.match(r" ([a-z]\w*)(?=\s|$)", rest)
        found.append((name[1] if name else "", rest))
    return found + re.findall(r"python ([\w/]+\.py)([^`\n]*)", joined)


def command_file(name: str) -> Path:
    """The file behind a command of `commands_in`."""
    if name.endswith(".py"):
        return ROOT / name
    assert not name or name in COMMANDS, f"there is no command {name}"
    return module_file(COMMANDS.get(name, "__main__"))


@cache
def options_of(name: str) -> frozenset[str]:
    """The options that a command of the library, or a tool, declares to its parser."""
    path = command_file(name)
    if path.parent.name in ("benchmarks", "tests"):  # whose parsers are their own affair
        return frozenset(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))
    module = (
        path.stem if path.parent.name == "tools" else f"gsv3d_lib.{COMMANDS.get(name, '__main__')}"
    )
    return frozenset(import_module(module).build_parser()._option_string_actions)


def check_commands(text: str) -> None:
    """Every command of a text is there and takes the options that it gives."""
    for name, rest in commands_in(text):
        assert command_file(name).is_file(), name
        given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest.split(" #")[0]))
        assert given <= options_of(name), (
            f"{name or 'gsv3d_lib'} has no {', '.join(given - options_of(name))}"
        )
