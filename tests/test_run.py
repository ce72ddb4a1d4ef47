"""The runner checks before it starts, keeps what it has when a cell fails, and writes
down what it did.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest
import refresh
import yaml
from command_world import call
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from tiny_world import object_views

from gsv3d_lib import train
from gsv3d_lib.cluster import job, launch
from gsv3d_lib.config import parse_setting, preset
from gsv3d_lib.course import demo, parameters, run
from gsv3d_lib.course import notebook as runner
from gsv3d_lib.course.notebook import keep_stopped, run_notebook
from gsv3d_lib.data.dataset import write_index, write_object
from gsv3d_lib.stages import schedule_of
from gsv3d_lib.system.paths import ROOT


@pytest.fixture
def notebook(tmp_path):
    """A notebook with parameters of every type, which fails where `divisor` is 0."""
    parameters = new_code_cell(
        'steps = 3  # of training\nlr = 0.1\nname = "a"\nfast = True\ndivisor = 1',
        metadata={"tags": ["parameters"]},
    )
    header = new_markdown_cell("| Time | <!-- measured -->old<!-- /measured --> |")
    cells = [header, parameters, new_code_cell("print(steps * lr)"), new_code_cell("1 / divisor")]
    path = tmp_path / "03_small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_parameters_are_read_without_running(notebook):
    assert parameters.declared_parameters(notebook) == dict(
        steps=3, lr=0.1, name="a", fast=True, divisor=1
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"stepz": 1},
            "There is no parameter 'stepz'; the notebook has steps, lr, name, fast, divisor.",
        ),
        ({"steps": 2.5}, r"steps is a int; got 2.5 \(float\)."),
        ({"steps": True}, r"steps is a int; got True \(bool\)."),
        ({"lr": "1e-3"}, "Write 1.0e-3, not 1e-3"),
        ({"lr": True}, r"lr is a float; got True \(bool\)."),
        ({"fast": 1}, r"fast is a bool; got 1 \(int\)."),
    ],
)
def test_wrong_parameters_are_named_before_anything_runs(
    notebook, tmp_path, monkeypatch, capsys, given, message
):
    monkeypatch.setattr(run, "find_notebooks", lambda _: [notebook])
    (tmp_path / "given.yaml").write_text(yaml.dump(given))
    options = ["03", "--params", str(tmp_path / "given.yaml"), "--out", str(tmp_path / "out")]
    assert call("run", options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_whole_number_may_stand_for_a_float(notebook):
    assert parameters.check_parameters({"lr": 1}, parameters.declared_parameters(notebook)) == {
        "lr": 1
    }


def test_lists_are_checked_item_by_item():
    declared = {"stages": ["vae"], "data": []}
    assert parameters.check_parameters({"stages": ["dino", "stage1"], "data": [1]}, declared)
    with pytest.raises(ValueError, match="stages is a list of str; it holds 2"):
        parameters.check_parameters({"stages": ["vae", 2]}, declared)


def test_a_run_is_recorded(notebook, tmp_path):
    cells = nbformat.read(notebook, as_version=4)
    cells.cells.append(
        new_code_cell(
            "from gsv3d_lib.course.notebook import record\nrecord(third=1 / 3, of={'steps': steps})"
        )
    )
    nbformat.write(cells, notebook)
    run_notebook(notebook, {"steps": 5}, tmp_path / "out")
    executed = nbformat.read(tmp_path / "out" / notebook.name, as_version=4)
    assert "0.5" in "".join(
        o.get("text", "") for c in executed.cells if c.cell_type == "code" for o in c.outputs
    )
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (
        record["state"] == "finished"
        and record["parameters"] == {"steps": 5}
        and record["seconds"] > 0
    )
    assert record["metrics"] == {"third": 0.333333, "of": {"steps": 5}}
    assert re.fullmatch(r"[0-9a-f]{7,}", record["commit"]) and isinstance(
        record["changed_since_commit"], list
    )
    assert record["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "diffusers", "numba"} <= set(record["environment"]["packages"])
    assert record["environment"]["gpus"] == [] or record["environment"]["cuda"]
    assert 0.02 < record["peak_gb"] < 8


SLOW = """
import sys
from pathlib import Path
from gsv3d_lib.__main__ import main
from gsv3d_lib.course import run
run.find_notebooks = lambda _: [Path(sys.argv[1])]
sys.exit(main(["run", "03", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("signal_", "state"), [(signal.SIGKILL, "running"), (signal.SIGTERM, "stopped by Terminated")]
)
def test_a_killed_run_keeps_what_it_had(notebook, tmp_path, signal_, state):
    """Killed in its third cell: the second's output is on disk, and the next run moves
    the stopped one aside.
    """
    cells = nbformat.read(notebook, as_version=4)
    cells.cells[
        3
    ].source = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))"
    cells.cells.append(new_code_cell("import time\ntime.sleep(300)"))
    nbformat.write(cells, notebook)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, notebook, out],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert within(240, lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()), (
        "the cell never ran"
    )
    time.sleep(1)
    process.send_signal(signal_)
    message = process.communicate(timeout=120)[1].decode()
    assert process.returncode == (130 if signal_ == signal.SIGTERM else -signal_)
    assert ("Run the same to resume" in message) == (signal_ == signal.SIGTERM)
    kernel = int((tmp_path / "pid").read_text())
    assert within(60, lambda: not alive(kernel)), "the kernel outlived its run"

    executed = nbformat.read(out / notebook.name, as_version=4)
    assert "0.3" in "".join(
        o.get("text", "") for c in executed.cells if c.cell_type == "code" for o in c.outputs
    )
    record = json.loads((out / "run.json").read_text())
    assert record["state"] == state and record["parameters"] == {}
    keep_stopped(notebook, out)
    assert [path.name for path in out.glob("*.ipynb")] == ["03_small.stopped.ipynb"]


@pytest.mark.parametrize("record", ["", "[1]", '{"state": "running"}', "{", None])
def test_a_damaged_record_is_one_of_a_stopped_run(tmp_path, record):
    out = tmp_path / "out"
    out.mkdir()
    (out / "03_small.ipynb").write_text("{")  # written by half
    if record is not None:
        (out / "run.json").write_text(record)
    assert (
        runner.collected_metrics(out / "03_small.ipynb")
        == {}
        == runner.collected_metrics(out / "none.ipynb")
    )
    runner.keep_stopped(tmp_path / "03_small.ipynb", out)
    assert (out / "03_small.stopped.ipynb").is_file() and not (out / "03_small.ipynb").exists()


def within(seconds: float, happened) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(happened())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not defunct(pid)


def defunct(pid: int) -> bool:
    """A process that has ended and whose parent, gone too, has not asked for it."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout
    return not state or state.startswith("Z")


def test_a_failing_cell_is_one_sentence_and_the_rest_is_kept(
    notebook, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "find_notebooks", lambda _: [notebook])
    assert call("run", ["03", "--set", "divisor=0", "--out", str(tmp_path / "out")]) == 1
    assert "stopped: division by zero" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / notebook.name).is_file()
    assert (
        json.loads((tmp_path / "out" / "run.json").read_text())["state"]
        == "stopped by PapermillExecutionError"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2", "it holds a list"), ("a: [", "is not YAML"), ("", "it holds a NoneType")],
)
def test_a_broken_parameter_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parameters.read_parameters(path)
    with pytest.raises(FileNotFoundError, match="There is no parameter file"):
        parameters.read_parameters(tmp_path / "none.yaml")


def test_settings_are_literals_or_text():
    assert parse_setting("steps=200") == ("steps", 200)
    assert parse_setting("name=data/a.png") == ("name", "data/a.png")
    assert parse_setting("fast=False") == ("fast", False)
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_setting("steps")


@pytest.mark.parametrize(
    "path", sorted(parameters.PARAMS.glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_parameter_file_fits_its_notebook(path):
    (notebook,) = parameters.find_notebooks([path.stem[:2]])
    values = parameters.read_parameters(path)
    declared = parameters.declared_parameters(notebook)
    assert values and parameters.check_parameters(values, declared) == yaml.safe_load(
        path.read_text()
    )


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("number", ["01", "04", "06", "07", "11"])
def test_every_training_notebook_has_three_scales(number, scale):
    (notebook,) = parameters.find_notebooks([number])
    given = parameters.read_parameters(parameters.PARAMS / f"{number}_{scale}.yaml")
    values = parameters.declared_parameters(notebook) | given
    assert values["scale"] == scale
    processes = values.get("full_processes", values.get("gpus"))
    assert processes == 4 or scale != "paper"
    command = job.train_command(scale, values["full_stages"], values["full_data"], processes)
    options = train.build_parser().parse_args(command[command.index("train") + 1 :])
    config = preset(options.preset)
    assert all(schedule_of(config, s).batch % options.gpus == 0 for s in options.stages)
    if scale == "paper" and "stage1" in options.stages:
        assert (config.stage1.steps, config.stage1.batch, config.stage1.lr) == (80_000, 128, 1e-5)
    if scale == "paper" and "stage2" in options.stages:
        assert (config.stage2.steps, config.stage2.batch, config.stage2.lr) == (40_000, 32, 1e-5)


@pytest.mark.parametrize("number", ["01", "04", "06", "07", "11"])
def test_parameter_sets_in_the_prose_exist(number):
    (notebook,) = parameters.find_notebooks([number])
    prose = "\n".join(
        c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "markdown"
    )
    named = set(re.findall(r"make full NB=(\d\d) PARAMS=(\w+)", prose))
    named |= set(re.findall(r"gsv3d_lib run (\d\d) --params (\w+)", prose))
    assert named and all((parameters.PARAMS / f"{nb}_{name}.yaml").is_file() for nb, name in named)


# ----------------------------------------------------------- the training of a notebook


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "papre"}, "There is no preset 'papre'"),
        ({"full_stages": ["vea"]}, "The stages are vae, dino, diffusion, stage1, stage2; got vea"),
        (
            {"full_stages": ["vae"], "full_processes": 3},
            "The batch of vae, 8, cannot be shared equally by 3",
        ),
        (
            {"full_stages": ["stage2"], "full_steps": 7},
            "stage2 needs vae, dino, diffusion, stage1: add them",
        ),
        (
            {"full_data": ["data/cache/nowhere"]},
            "There is no dataset in data/cache/nowhere; make it with",
        ),
    ],
)
def test_a_training_that_would_fail_is_refused_before_the_notebook_runs(changes, message):
    (notebook,) = parameters.find_notebooks(["06"])
    everything = parameters.declared_parameters(notebook) | {"full_run": True} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.check_training(everything)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A dataset of two objects, and a folder that trainings write to."""
    data = tmp_path / "data"
    data.mkdir()
    for k in range(2):
        write_object(data, object_views(f"ball{k}", turn=40.0 * k))
    write_index(data, [{"id": f"ball{k}"} for k in range(2)])
    for module in (job, launch):
        monkeypatch.setattr(module, "run_folder", lambda scale, steps=0: tmp_path / "runs")
    return data, tmp_path / "runs"


def test_a_training_is_planned_and_not_started(folders, capsys):
    data, out = folders
    assert launch.launch("tiny", ["vae", "stage1"], [str(data)], gpus=2) == {}
    text = capsys.readouterr().out
    assert re.search(r"stage1 +6,000 x 2 .*\d", text) and "not counted" in text
    launcher = "torchrun --standalone --nproc_per_node 2 -m gsv3d_lib train"
    assert f"{launcher} --preset tiny --stages vae stage1 --data {data}" in text
    assert "Not started: set full_run = True" in text and not out.exists()


def test_a_training_runs_and_its_last_numbers_come_back(folders, capsys):
    data, out = folders
    trained = launch.launch("tiny", ["vae"], [str(data)], steps=1, start=True)
    assert set(trained) == {"vae"} and trained["vae"]["step"] == 0 and trained["vae"]["loss"] > 0
    assert (out / "weights" / "vae" / "config.json").is_file()
    assert "vae: 100%" in capsys.readouterr().out  # its lines were printed


def test_a_failing_training_is_one_sentence(capsys):
    with pytest.raises(RuntimeError, match=r"ended with code 3 \(no space\)"):
        launch.watch(["-c", "import sys; print('begun'); print('no space'); sys.exit(3)"])
    assert capsys.readouterr().out == "begun\nno space\n"


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, which a shell switches off in what it starts in
    the background.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_training_is_ended(tmp_path, interruptible):
    pid = str(tmp_path / "pid")
    code = f"import os, time; open({pid!r}, 'w').write(str(os.getpid())); time.sleep(300)"

    def interrupt():
        if within(60, lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch.watch(["-c", code])
    assert not alive(int((tmp_path / "pid").read_text()))


def test_of_a_progress_bar_a_line_a_minute_and_the_last_are_shown():
    bar = [f"vae:  {k}%|#   | {k}/100" for k in range(100)]
    assert list(launch.thinned(["reading", "", *bar, "done"])) == [
        "reading",
        bar[0],
        bar[-1],
        "done",
    ]
    assert list(launch.thinned(bar)) == [bar[0], bar[-1]]


def test_make_full_runs_a_parameter_set():
    shown = subprocess.run(
        ["make", "-n", "full", "NB=07", "PARAMS=paper"], cwd=ROOT, capture_output=True, text=True
    )
    assert "-m gsv3d_lib run 07 --params paper" in shown.stdout
    empty = subprocess.run(["make", "-n", "full"], cwd=ROOT, capture_output=True, text=True)
    assert empty.returncode and "say which notebook" in empty.stderr


def test_a_real_notebook_runs_from_a_parameter_file(tmp_path):
    """02, the quickest that trains: other steps than its default, through papermill."""
    parameters = tmp_path / "fit.yaml"
    parameters.write_text("steps: 320\nseed: 0\n")
    assert call("run", ["03", "--params", str(parameters), "--out", str(tmp_path / "out")]) == 0
    executed = nbformat.read(tmp_path / "out" / "03_gaussian_splatting.ipynb", as_version=4)
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
    assert (
        all("execution" not in cell.metadata for cell in code) and "widgets" not in written.metadata
    )
    seconds, gigabytes = (float(part.split()[0]) for part in sentence.split(", "))
    assert 0 <= seconds < 60 and 0 < gigabytes < 2


def test_refresh_leaves_a_failing_notebook_as_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "03_bad.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path)
    assert refresh.main(["03", "--out", str(tmp_path)]) == 1
    assert path.read_bytes() == before and "03_bad failed" in capsys.readouterr().err


def test_refresh_writes_the_row_of_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "| [a](notebooks/02_x.ipynb) | <!-- measured -->?<!-- /measured --> |\n"
        "| [b](notebooks/03_y.ipynb) |\n"
    )
    refresh.update_readme("02_x", "3 s", readme)
    assert "| <!-- measured -->3 s<!-- /measured --> |\n| [b]" in readme.read_text()


def test_the_picture_of_the_readme_is_one_row_per_input(tmp_path):
    refresh.draw_hero(
        tmp_path / "hero.png", ROOT / "data/checkpoints/tiny", names=("mug",), size=32
    )
    width, height = Image.open(tmp_path / "hero.png").size
    assert width == 1000 and 7 < width / height < 9  # the input and eight sides, with their titles


def test_the_demo_gives_notebook_00_what_it_knows(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        demo,
        "execute",
        lambda path, parameters, out: asked.update(parameters | {"path": path}) or 0,
    )
    words = ["--image", "data/images/mug.png", "--elevation", "auto", "--out", str(tmp_path)]
    assert call("demo", words) == 0
    declared = parameters.declared_parameters(asked.pop("path"))
    parameters.check_parameters(asked, declared)  # raises for a name it does not have
    assert (ROOT / asked["weights"] / "gsv3d.json").is_file() and -10 <= asked["elevation"] <= 40


def test_refresh_drops_widgets_that_need_a_kernel():
    cell = new_code_cell(
        "w",
        outputs=[
            nbformat.v4.new_output("display_data", {refresh.WIDGET: {}, "text/plain": "VBox()"}),
            nbformat.v4.new_output("display_data", {refresh.WIDGET: {}, "text/html": "frames"}),
        ],
    )
    kept = nbformat.v4.new_output("display_data", {"text/plain": "1"})
    cell.outputs.append(kept)
    left = refresh.tidy(new_notebook(cells=[cell])).cells[0].outputs
    assert [out.data for out in left] == [{"text/html": "frames"}, kept.data]
    with pytest.raises(FileNotFoundError, match="No notebook begins with '99'"):
        parameters.find_notebooks(["99"])


def test_training_takes_fields_of_the_preset(tmp_path, monkeypatch, capsys):
    """`--set lambda_pixel=0.0` reaches the configuration; a wrong one is told."""
    seen = []
    monkeypatch.setattr(train, "load_views", lambda *_, **__: None)
    monkeypatch.setattr(train, "run_stage", lambda name, config, *_, **__: seen.append(config))
    call(
        "train",
        [
            "--out",
            str(tmp_path),
            "--stages",
            "vae",
            "--steps",
            "7",
            "--set",
            "lambda_pixel=0.0",
            "--set",
            "dino=none",
        ],
    )
    assert (seen[0].lambda_pixel, seen[0].dino, seen[0].vae_schedule.steps) == (0.0, "none", 7)
    assert call("train", ["--out", str(tmp_path), "--set", "lambda_pixl=0.0"]) == 2
    assert "no field 'lambda_pixl'" in capsys.readouterr().err
