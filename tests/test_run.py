"""The runner checks before it starts, keeps what it has when a cell fails, and writes down what it did."""

import json

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from gsv3d_lib import refresh, run
from gsv3d_lib.config import parse_setting

ROOT = run.ROOT


@pytest.fixture
def notebook(tmp_path):
    """A notebook with parameters of every type, which fails where `divisor` is 0."""
    parameters = new_code_cell(
        'steps = 3  # of training\nlr = 0.1\nname = "a"\nfast = True\ndivisor = 1', metadata={"tags": ["parameters"]}
    )
    header = new_markdown_cell("| Time | <!-- measured -->old<!-- /measured --> |")
    cells = [header, parameters, new_code_cell("print(steps * lr)"), new_code_cell("1 / divisor")]
    path = tmp_path / "02_small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_parameters_are_read_without_running(notebook):
    assert run.declared_parameters(notebook) == dict(steps=3, lr=0.1, name="a", fast=True, divisor=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 1}, "There is no parameter 'stepz'; the notebook has steps, lr, name, fast, divisor."),
        ({"steps": 2.5}, r"steps is a int; got 2.5 \(float\)."),
        ({"steps": True}, r"steps is a int; got True \(bool\)."),
        ({"lr": "1e-3"}, "Write 1.0e-3, not 1e-3"),
        ({"lr": True}, r"lr is a float; got True \(bool\)."),
        ({"fast": 1}, r"fast is a bool; got 1 \(int\)."),
    ],
)
def test_wrong_parameters_are_named_before_anything_runs(notebook, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run.run_notebook(notebook, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_number_may_stand_for_a_float(notebook):
    assert run.check_parameters({"lr": 1}, run.declared_parameters(notebook)) == {"lr": 1}


def test_a_run_is_recorded(notebook, tmp_path):
    run.run_notebook(notebook, {"steps": 5}, tmp_path / "out")
    executed = nbformat.read(tmp_path / "out" / notebook.name, as_version=4)
    assert "0.5" in "".join(o.get("text", "") for c in executed.cells if c.cell_type == "code" for o in c.outputs)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["state"] == "finished" and record["parameters"] == {"steps": 5} and record["seconds"] > 0


def test_a_failing_cell_is_one_sentence_and_the_rest_is_kept(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "find_notebooks", lambda _: [notebook])
    assert run.main(["02", "--set", "divisor=0", "--out", str(tmp_path / "out")]) == 1
    assert "stopped: division by zero" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / notebook.name).is_file()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "stopped by PapermillExecutionError"


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2", "it holds a list"), ("a: [", "is not YAML"), ("", "it holds a NoneType")],
)
def test_a_broken_parameter_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run.read_parameters(path)
    with pytest.raises(FileNotFoundError, match="There is no parameter file"):
        run.read_parameters(tmp_path / "none.yaml")


def test_settings_are_literals_or_text():
    assert parse_setting("steps=200") == ("steps", 200)
    assert parse_setting("name=data/a.png") == ("name", "data/a.png")
    assert parse_setting("fast=False") == ("fast", False)
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_setting("steps")


@pytest.mark.parametrize("path", sorted(run.PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_parameter_file_fits_its_notebook(path):
    (notebook,) = refresh.find_notebooks([path.stem[:2]])
    values = run.read_parameters(path)
    assert values and run.check_parameters(values, run.declared_parameters(notebook)) == yaml.safe_load(
        path.read_text()
    )


def test_a_real_notebook_runs_from_a_parameter_file(tmp_path):
    """02, the quickest that trains: other steps than its default, through papermill."""
    parameters = tmp_path / "fit.yaml"
    parameters.write_text("steps: 320\nseed: 0\n")
    assert run.main(["02", "--params", str(parameters), "--out", str(tmp_path / "out")]) == 0
    executed = nbformat.read(tmp_path / "out" / "02_gaussian_splatting.ipynb", as_version=4)
    (injected,) = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "steps = 320" in injected.source
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "finished"


# ---------------------------------------------------------------- refresh


def test_refresh_runs_measures_and_tidies(notebook, tmp_path):
    sentence = refresh.refresh(notebook, tmp_path / "out")
    written = nbformat.read(tmp_path / "out" / notebook.name, as_version=4)
    assert f"<!-- measured -->{sentence}<!-- /measured -->" in written.cells[0].source
    code = [cell for cell in written.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3] and len(written.cells) == 4
    assert all("execution" not in cell.metadata for cell in code) and "widgets" not in written.metadata
    seconds, gigabytes = (float(part.split()[0]) for part in sentence.split(", "))
    assert 0 <= seconds < 60 and 0 < gigabytes < 2


def test_refresh_leaves_a_failing_notebook_as_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "03_bad.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(refresh, "NOTEBOOKS", tmp_path)
    assert refresh.main(["03", "--out", str(tmp_path)]) == 1
    assert path.read_bytes() == before and "03_bad failed" in capsys.readouterr().err


def test_refresh_writes_the_row_of_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "| [a](notebooks/02_x.ipynb) | <!-- measured -->?<!-- /measured --> |\n| [b](notebooks/03_y.ipynb) |\n"
    )
    refresh.update_readme("02_x", "3 s", readme)
    assert "| <!-- measured -->3 s<!-- /measured --> |\n| [b]" in readme.read_text()


def test_refresh_drops_widgets_that_need_a_kernel():
    cell = new_code_cell(
        "w", outputs=[nbformat.v4.new_output("display_data", {refresh.WIDGET: {}, "text/plain": "VBox()"})]
    )
    kept = nbformat.v4.new_output("display_data", {"text/plain": "1"})
    cell.outputs.append(kept)
    assert refresh.tidy(new_notebook(cells=[cell])).cells[0].outputs == [kept]
    with pytest.raises(FileNotFoundError, match="No notebook begins with '99'"):
        refresh.find_notebooks(["99"])


def test_training_takes_fields_of_the_preset(tmp_path, monkeypatch):
    """`--set lambda_pixel=0.0` reaches the configuration; a wrong name is one sentence."""
    from gsv3d_lib import train

    seen = []
    monkeypatch.setattr(train, "load_views", lambda *_, **__: None)
    monkeypatch.setitem(train.RECIPES, "vae", lambda config, *_, **__: seen.append(config))
    train.main(
        ["--out", str(tmp_path), "--stages", "vae", "--steps", "7", "--set", "lambda_pixel=0.0", "--set", "dino=none"]
    )
    assert (seen[0].lambda_pixel, seen[0].dino, seen[0].vae_schedule.steps) == (0.0, "none", 7)
    with pytest.raises(ValueError, match="no field 'lambda_pixl'"):
        train.main(["--out", str(tmp_path), "--set", "lambda_pixl=0.0"])
