"""What tests need of a notebook: its functions without running it, and checkers put to
the test.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def read_notebook(number: str) -> nbformat.NotebookNode:
    """The notebook whose name begins with `number`, such as "03"."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    return nbformat.read(path, as_version=4)


def definitions(number: str) -> dict:
    """Every function and class that the notebook's cells define, with its imports and
    parameters; nothing else is run.
    """
    kept = []
    for cell in read_notebook(number).cells:
        if cell.cell_type != "code":
            continue
        everything = "parameters" in cell.metadata.get("tags", [])
        lines = [
            line if not line.lstrip().startswith(("%", "!")) else ""
            for line in cell.source.splitlines()
        ]
        for node in ast.parse("\n".join(lines)).body:
            if everything or isinstance(
                node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
            ):
                kept.append(node)
    namespace: dict = {"__name__": f"notebook_{number}"}
    exec(compile(ast.Module(kept, []), f"notebook {number}", "exec"), namespace)
    return namespace


def accepts(checker, solution) -> bool:
    """The checker says that the solution is right."""
    return bool(checker(solution))


def rejects(checker, solution, match: str) -> bool:
    """The checker says what is wrong, in a sentence that holds `match`."""
    verdict = checker(solution)
    assert not verdict, "the checker took it for right"
    assert re.search(match, verdict.sentence), verdict.sentence
    assert verdict.sentence.startswith("✗ ") and "\n" not in verdict.sentence
    return True
