"""What every notebook of the course promises a reader, checked without running it.
nbval runs them.
"""

import ast
import re
from pathlib import Path
from pkgutil import resolve_name

import nbformat
import pytest
from command_world import check_commands
from refresh import MEASURED, WIDGET

from gsv3d_lib.config import parse_setting
from gsv3d_lib.course.parameters import check_parameters, declared_parameters

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
# 00 shows, the others teach
COURSE = [path for path in NOTEBOOKS if not path.name.startswith("00")]
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
teaching = pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list:
    return [
        c
        for c in nbformat.read(path, as_version=4).cells
        if c.cell_type == kind and c.source.strip()
    ]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


def tagged(path: Path, tag: str) -> list:
    return [cell for cell in cells(path, "code") if tag in cell.metadata.get("tags", [])]


def test_the_course_is_complete():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n:02d}" for n in range(13)]


# ---------------------------------------------------------------- as committed


@every
def test_executed_in_order_small_and_clean(path):
    assert path.stat().st_size < 2_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata, "GitHub refuses notebooks that carry widget state"
    code = cells(path, "code")
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), (
        "run it in order on a fresh kernel"
    )
    outputs = [out for cell in code for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    assert not [out for out in outputs if WIDGET in out.get("data", {})], "run `make notebooks`"
    printed = "".join(out.get("text", "") for out in outputs)
    assert "Warning" not in printed and "Traceback" not in printed


@every
def test_one_cell_of_literal_parameters(path):
    """papermill needs exactly one cell with the tag `parameters`, made of literals, one
    per line, each explained.
    """
    (cell,) = tagged(path, "parameters")
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        ast.literal_eval(statement.value)
    unexplained = [
        line for line in cell.source.splitlines() if "#" not in line and not line.startswith("seed")
    ]
    assert unexplained == []


@every
def test_a_notebook_has_its_parts_in_order(path):
    text = prose(path)
    assert re.match(rf"# {path.name[:2]} · \w", text)
    headings = re.findall(r"^## (.+)$", text, re.M)
    wanted = ["Before you start", "The result first", "Quick check", "Recap"]
    if path in COURSE:
        wanted[2:3] = ["Equations and where they live", "Quick check", "Exercises", "Full run"]
    places = [
        next((i for i, h in enumerate(headings) if h.endswith(w) or h.startswith(w)), None)
        for w in wanted
    ]
    assert None not in places, f"{wanted} in {headings}"
    assert places == sorted(places), headings
    assert "**Different from the paper" in text
    assert len(re.findall(r"<details><summary>", text)) == len(re.findall(r"</details>", text)) >= 3


@every
def test_time_and_memory_are_measured_and_within_bounds(path):
    """The numbers of the last refresh, the same in the notebook and in the README's
    table.
    """
    (stated,) = MEASURED.findall(prose(path))
    seconds, gigabytes = map(float, re.search(r">(\d+) s, ([\d.]+) GB", stated).groups())
    assert seconds <= 450 and gigabytes <= 8  # on a busy machine; a quiet one takes half
    (row,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if f"](notebooks/{path.name})" in line
    ]
    assert stated in row


@every
def test_code_is_short_enough_to_read(path):
    """A cell that does not define a function or a figure is a few lines; none is a
    page.
    """
    for cell in cells(path, "code"):
        lines = [
            line
            for line in cell.source.splitlines()
            if line.strip() and not line.strip().startswith("#")
        ]
        assert len(lines) <= 45, cell.source[:200]


@every
def test_some_outputs_are_compared_by_nbval(path):
    checked = tagged(path, "nbval-check-output")
    assert checked
    # A progress bar holds times and speeds: no two runs write the same one.
    noisy = [c.id for c in checked if any(o.get("name") == "stderr" for o in c.outputs)]
    assert not noisy


@every
def test_links_and_named_notebooks_exist(path):
    text = prose(path)
    local = [
        t.split("#")[0]
        for t in re.findall(r"\]\(([^)\s]+)\)", text)
        if not t.startswith(("http", "#"))
    ]
    assert [t for t in local if not (path.parent / t).exists()] == []
    stems = {p.stem for p in NOTEBOOKS}
    assert [name for name in re.findall(r"`(\d\d_[a-z]\w+)`", text) if name not in stems] == []


# ---------------------------------------------------------------- as a course


@teaching
def test_every_equation_names_the_function_that_implements_it(path):
    text = prose(path)
    number = str(int(path.name[:2]))
    tags = re.findall(r"\\tag\{([\d.]+)\}", text)
    assert len(tags) >= 3 and len(set(tags)) == len(tags)
    assert all(tag.startswith(f"{number}.") for tag in tags)
    table = text[text.index("## Equations and where they live") :]
    rows = dict(re.findall(r"^\| \((\d+\.\d+)\) \|.*\| `([\w.]+)`[^|]*\|$", table, re.M))
    assert set(rows) == set(tags), f"tags {sorted(tags)}, rows {sorted(rows)}"
    for name in rows.values():
        resolve_name(f"gsv3d_lib.{name}")


@teaching
def test_exercises_predict_break_and_build(path):
    """Each is rated, has a stub and a checker, and a solution that is not in sight."""
    text = prose(path)
    titles = re.findall(r"^### ((?:Exercise \d|Find the bug|Build) · .+)$", text, re.M)
    kinds = [title.split(" · ")[0] for title in titles]
    assert kinds.count("Find the bug") == kinds.count("Build") == 1
    assert 3 <= len(titles) <= 6 and re.search(r"^### Predict · ", text, re.M)
    ratings = re.findall(r"^Difficulty: [●○]{3} · about \d+ minutes", text, re.M)
    assert len(ratings) == len(titles)
    checked = [c for c in cells(path, "code") if re.search(r"^\w+\.check_\w+\(", c.source, re.M)]
    assert len(checked) == len(titles)
    said = []
    for cell in checked:
        body = ast.parse(cell.source).body
        stub = next(node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        assert len(ast.get_docstring(stub) or "") > 60
        said.append("".join(out.get("text", "") for out in cell.outputs))
    assert sum("not written yet" in text for text in said) == len(titles) - 1
    assert sum(text.startswith("✗ ") for text in said) == 1  # the bug
    solutions = path.parent / "solutions" / f"{path.stem}.md"
    solved = re.findall(r"^## (.+)$", solutions.read_text(encoding="utf-8"), re.M)
    assert [title for title in titles if title not in solved] == []
    assert f"solutions/{path.stem}.md" in text and "<summary>Solution" not in text
    assert (ROOT / "tests" / f"test_notebook_{path.name[:2]}.py").is_file()


@teaching
def test_an_interactive_figure_follows_a_static_one(path):
    kinds = [
        "interactive" if "interactive" in cell.metadata.get("tags", []) else "static"
        for cell in cells(path, "code")
        if "interactive" in cell.metadata.get("tags", [])
        or any("image/png" in o.get("data", {}) for o in cell.outputs)
    ]
    shows_tables_only = path.name.startswith("10")
    assert ("interactive" in kinds or shows_tables_only) and kinds[0] == "static"


@teaching
def test_the_last_code_cell_accepts_or_refuses_the_result(path):
    assert any("assert " in cell.source for cell in cells(path, "code")[-2:])


@teaching
def test_a_picture_follows_nearly_every_idea(path):
    pictures = [
        c for c in cells(path, "code") if any("image/png" in o.get("data", {}) for o in c.outputs)
    ]
    assert len(pictures) >= 4 or path.name.startswith("11")


@every
def test_commands_in_the_prose_are_ones_that_work(path):
    """`papermill notebooks/X.ipynb ... -p NAME VALUE` and `python -m gsv3d_lib COMMAND
    --OPTION` name what exists.
    """
    text = prose(path).replace("\\\n", " ")
    for stem, options in re.findall(r"papermill notebooks/(\w+)\.ipynb([^\n]*)", text):
        declared = declared_parameters(ROOT / "notebooks" / f"{stem}.ipynb")
        values = dict(re.findall(r"-p (\w+) (\S+)", options.split("#")[0]))
        check_parameters(
            {name: parse_setting(f"{name}={value}")[1] for name, value in values.items()}, declared
        )
    check_commands(text)
