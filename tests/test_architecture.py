"""The house: few rooms, imports that run downward only, and a map that is true."""

import ast
import re
from functools import cache
from pathlib import Path

import gsv3d_lib

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "gsv3d_lib"
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    """gsv3d_lib/data/dataset.py -> gsv3d_lib.data.dataset; a package has its folder's
    name.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def runtime_nodes(node: ast.AST):
    """Every node that Python executes, late imports inside functions included."""
    for child in ast.iter_child_nodes(node):
        if not for_type_checkers(child):
            yield child
            yield from runtime_nodes(child)


@cache
def imports_of(name: str) -> frozenset[str]:
    """The modules of the library that a module imports, wherever in it."""
    path, found = NAMES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in runtime_nodes(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package.split(".")[: len(package.split(".")) - node.level + 1]
        origin = ".".join([*base, *filter(None, [node.module])])
        for alias in node.names:
            inner = f"{origin}.{alias.name}"
            found.add(inner if inner in NAMES else origin)
    return frozenset(found - {name})


def floor(name: str, above: tuple[str, ...] = ()) -> int:
    """1 for a module that imports no other; else one more than the highest that it
    imports.
    """
    assert name not in above, "a circle of imports: " + " -> ".join((*above, name))
    return 1 + max((floor(other, (*above, name)) for other in imports_of(name)), default=0)


def test_imports_run_downward_only_on_at_most_ten_floors():
    floors = {name: floor(name) for name in NAMES}
    assert max(floors.values()) <= 10, {n: f for n, f in floors.items() if f > 10}


def test_no_folder_is_crowded():
    for folder in {path.parent for path in MODULES}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= (25 if folder == LIBRARY else 15), folder


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_library_does_not_grow():
    """Lines of the library, the exercises apart. The goal is 13,500; the bound comes
    down wherever it can.
    """
    counted = [path for path in MODULES if "exercises" not in path.parts]
    assert sum(map(lines_of, counted)) <= 16_790
    assert sum(map(lines_of, LIBRARY.glob("*.py"))) <= 5_000


def test_the_maps_name_every_module_once():
    """docs/map.md and the package's docstring hold a line for each module, no other."""
    expected = {str(path.relative_to(LIBRARY)) for path in MODULES}
    expected -= {name for name in expected if "exercises/" in name or name.endswith("__init__.py")}
    expected -= {"__main__.py"}
    expected |= {"rendering/__init__.py", "export/__init__.py"}
    table = (ROOT / "docs/map.md").read_text()
    assert sorted(re.findall(r"^\| `([\w/]+\.py)`", table, re.M)) == sorted(expected)
    assert "(docs/map.md)" in (ROOT / "README.md").read_text()
    listed = re.findall(r"^    ([\w/]+\.py) ", gsv3d_lib.__doc__, re.M)
    assert sorted(listed) == sorted(expected)
