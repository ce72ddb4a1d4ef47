"""evaluate, experiments and train: bad input is one sentence on stderr and exit status
2, never a traceback.
"""

import json
import re
import shutil

import numpy as np
import pytest
import run_experiments
from command_world import call
from tiny_world import object_views, tiny_config

from gsv3d_lib import train
from gsv3d_lib.config import preset
from gsv3d_lib.data.dataset import write_index, write_object
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.encoders import build_clip, build_dino
from gsv3d_lib.unet import build_unet
from gsv3d_lib.vae import build_vae
from gsv3d_lib.weights.checkpoint import save_model

CONFIG = tiny_config()
BUILDERS = {
    "vae": build_vae,
    "clip": build_clip,
    "dino": build_dino,
    "unet": build_unet,
    "decoder": build_decoder,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good and bad folders: weights without a LoRA, damaged ones, two objects without
    geometry, a damaged one, nothing.
    """
    folder = tmp_path_factory.mktemp("place")
    for name, build in BUILDERS.items():
        save_model(build(CONFIG), folder / "weights", name, CONFIG)
    shutil.copytree(folder / "weights", folder / "damaged")
    for file in (folder / "damaged").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    for id, turn in (("one", 0.0), ("two", 60.0)):
        write_object(folder / "objects", object_views(id, turn))
    write_index(folder / "objects", [{"id": "one"}, {"id": "two"}])
    shutil.copytree(folder / "objects", folder / "broken")
    (folder / "broken/one.npz").write_bytes(b"no arrays")
    shutil.copytree(folder / "objects", folder / "shapeless")
    np.savez(folder / "shapeless/one.geometry.npz", points=np.zeros((10, 3)))
    (folder / "empty").mkdir()
    (folder / "file").write_text("{}")
    (folder / "picture.png").touch()
    # no cost
    (folder / "halved").write_text(
        json.dumps({"arms": {"rank_4": {"scores": {"0": {"psnr": [1.0]}}}}})
    )
    return folder


def run(command: str, place, capsys, *arguments: str) -> tuple[int, str]:
    """The exit status and the last line on stderr; names of `place` stand for their
    paths.
    """
    paths = [
        str(place / a) if (place / a).exists() or "/" in a or a == "missing" else a
        for a in arguments
    ]
    try:
        if command == "experiments":
            status = run_experiments.main(paths)
        else:
            status = call(command, paths)
    except SystemExit as ended:  # argparse's own
        status = ended.code
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "%|" not in line and "it/s" not in line
    ]
    return status, lines[-1] if lines else ""


GOOD = {
    "evaluate": {"--weights": "weights", "--objects": "objects", "--out": "out/e.json"},
    "experiments": {
        "--weights": "weights",
        "--data": "objects",
        "--objects": "objects",
        "--out": "out/x.json",
    }
    | {"--work": "out/work", "--arms": "rank_4", "--steps": "1"},
    "train": {"--data": "objects", "--out": "out/run", "--stages": "vae", "--steps": "1"},
}


@pytest.mark.parametrize(
    ("command", "changes", "sentence"),
    [
        ("evaluate", {"--weights": "missing"}, "is no GSV3D checkpoint: gsv3d.json is missing"),
        ("evaluate", {"--weights": "empty"}, "is no GSV3D checkpoint: gsv3d.json is missing"),
        ("evaluate", {"--weights": "damaged"}, "weights in .* cannot be read"),
        ("evaluate", {}, r"No LoRA at .*\(--no-lora\)"),
        ("evaluate", {"--no-lora": None, "--objects": "missing"}, "No dataset at"),
        ("evaluate", {"--no-lora": None, "--objects": "empty"}, "No dataset at"),
        (
            "evaluate",
            {"--no-lora": None, "--objects": "broken"},
            "Object 'one' in .* cannot be read",
        ),
        (
            "evaluate",
            {"--no-lora": None, "--objects": "shapeless", "--steps": "1"},
            "one.geometry.npz cannot be read",
        ),
        ("evaluate", {"--no-lora": None, "--train": "empty"}, "No dataset at"),
        ("evaluate", {"--limit": "0"}, "--limit: must be 1 or more, got 0"),
        ("evaluate", {"--limit": "-3"}, "--limit: must be 1 or more, got -3"),
        ("evaluate", {"--out": "empty"}, "cannot be written: it is a folder"),
        ("evaluate", {"--out": "file/e.json"}, "file is no folder that you may write to"),
        ("evaluate", {"--out": "out/e.md"}, "the pictures go beside it"),
        ("experiments", {"--weights": "empty"}, "is no GSV3D checkpoint"),
        ("experiments", {"--weights": "damaged"}, "The vae weights in .* cannot be read"),
        ("experiments", {"--data": "empty"}, "No dataset at"),
        ("experiments", {"--objects": "missing"}, "No dataset at"),
        ("experiments", {"--limit": "0"}, "--limit: must be 1 or more, got 0"),
        (
            "experiments",
            {"--arms": "rank_5"},
            "no arm 'rank_5'; choose from rank_4, rank_16, rank_64",
        ),
        ("experiments", {"--ids": "nobody"}, "objects has no object nobody"),
        ("experiments", {"--out": "file"}, "file is no results file of experiments"),
        ("experiments", {"--out": "halved"}, "halved is no results file of experiments"),
        ("experiments", {"--seeds": "-1"}, "--seeds: must be 0 or more, got -1"),
        (
            "experiments",
            {"--guidance": "nan"},
            "--guidance: must be a number from 0 to 100, got 'nan'",
        ),
        ("evaluate", {"--seed": str(2**64)}, "--seed: must be .* or less"),
        ("experiments", {"--work": "file/work"}, "file is no folder that you may write to"),
        ("train", {"--data": "empty"}, "No dataset at"),
        ("train", {"--data": "broken"}, "Object 'one' in .* cannot be read"),
        ("train", {"--limit": "-1"}, "--limit: must be 1 or more, got -1"),
        ("train", {"--init": "empty"}, "is no GSV3D checkpoint"),
        ("train", {"--stages": "stage2", "--init": "damaged"}, "weights in .* cannot be read"),
        ("train", {"--stages": "stage1"}, "There are no dino weights"),
        ("train", {"--preset": "big"}, "There is no preset 'big'"),
        ("train", {"--set": "steps"}, "--set takes NAME=VALUE"),
        (
            "train",
            {"--preset": "small", "--set": f"seed={2**64}"},
            "seed takes whole numbers from 0 to",
        ),
        (
            "train",
            {"--preset": "small", "--set": "stage1.lr=1e999"},
            "lr takes numbers from 0 to 10; got inf",
        ),
        (
            "train",
            {"--preset": "small", "--set": "vae_schedule.batch=100000000000"},
            "batch takes whole numbers from 1 to",
        ),
        (
            "train",
            {"--preset": "small", "--set": "num_frames=100000000"},
            "num_frames takes whole numbers from 1 to",
        ),
        ("evaluate", {"--out": "."}, "it is a folder; name a file in it"),
        ("evaluate", {"--out": "./picture.json"}, "picture.png is there already"),
        ("evaluate", {"--out": "/dev/null"}, "it is no ordinary file"),
        ("train", {"--out": "file"}, "file is no folder that you may write to"),
        ("train", {"--export": "out/shipped"}, "There are no finished weights"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    command, changes, sentence, place, capsys, monkeypatch
):
    monkeypatch.setattr(
        train,
        "preset",
        lambda name, **changes: CONFIG if name == "tiny" else preset(name, **changes),
    )
    options = GOOD[command] | changes
    words = [word for pair in options.items() for word in pair if word is not None]
    status, said = run(
        command, place, capsys, *(["rank"] if command == "experiments" else []), *words
    )
    assert status == 2
    assert re.search(sentence, said), said
    shutil.rmtree(place / "out", ignore_errors=True)


def test_an_experiment_that_does_not_exist(place, capsys):
    status, said = run(
        "experiments", place, capsys, "nothing", "--objects", "objects", "--out", "out/x.json"
    )
    assert status == 2 and "invalid choice: 'nothing'" in said and "distillation" in said


def test_evaluate_goes_on_without_geometry_and_with_few_objects(place, capsys):
    words = [word for pair in GOOD["evaluate"].items() for word in pair]
    more = ("--no-lora", "--train", "objects", "--limit", "3", "--steps", "1", "--guidance", "1")
    assert run("evaluate", place, capsys, *words, *more)[0] == 0
    record = json.loads((place / "out/e.json").read_text())
    assert (
        record["objects"] == 2
        and "psnr" in record["mean"]["generated"]
        and "chamfer" not in record["mean"]["generated"]
    )
    assert "| generated |" in (place / "out/e.md").read_text() and (place / "out/e.png").is_file()
    assert record["command"].startswith("python -m gsv3d_lib evaluate --weights")
    shutil.rmtree(place / "out")
