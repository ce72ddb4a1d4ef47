"""Experiments: arms differ in what they say, finished runs are kept, and differences
are paired by seed and object.
"""

import json
import math
import shutil

import numpy as np
import pytest
import run_experiments as ex
import torch
from test_pipeline import write_geometry
from tiny_world import ball_views, object_views, tiny_config

from gsv3d_lib import stages
from gsv3d_lib.config import Schedule, preset
from gsv3d_lib.data.dataset import write_index, write_object
from gsv3d_lib.evaluation.experiments import holds
from gsv3d_lib.evaluation.metrics import bootstrap_interval

# Two steps must move what four digits show, hence the learning rate.
CONFIG = tiny_config(lambda_pixel=0.0, stage2=Schedule(steps=2, batch=2, lr=0.3, warmup=0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint and a dataset of two objects, one with its true shape."""
    folder = tmp_path_factory.mktemp("place")
    for stage in ("vae", "dino", "diffusion", "stage1"):
        stages.run_stage(stage, CONFIG, ball_views(), folder, progress=False)
    for id, turn in (("balls", 0.0), ("others", 60.0)):
        write_object(folder / "objects", object_views(id, turn))
    write_index(folder / "objects", [{"id": "balls"}, {"id": "others"}])
    write_geometry(folder / "objects", "balls")
    return folder


def run(place, work, name, *more) -> int:
    """The exit status of a short run of one experiment, whose record goes to
    work/NAME.json.
    """
    objects = str(place / "objects")
    paths = [
        "--weights",
        str(place / "weights"),
        "--data",
        objects,
        "--objects",
        objects,
        "--work",
        str(work / "work"),
    ]
    out = ["--out", str(work / f"{name}.json")]
    return ex.main([name, *paths, *out, "--steps", "2", "--sampling-steps", "1", *more])


def command(place, work, name, *more) -> dict:
    assert run(place, work, name, *more) == 0
    return json.loads((work / f"{name}.json").read_text())


# ---------------------------------------------------------------- the arms


def test_every_arm_is_a_valid_configuration_and_differs_from_the_others():
    for name, experiment in ex.EXPERIMENTS.items():
        assert experiment.reference in {arm.name for arm in experiment.arms}
        configs = [
            ex.configure(preset("tiny"), experiment, arm, 1, 7, 2) for arm in experiment.arms
        ]
        keys = {
            (config, arm.trained, arm.warm)
            for config, arm in zip(configs, experiment.arms, strict=True)
        }
        assert len(keys) == len(experiment.arms), name
        assert all(
            c.seed == 1 and getattr(c, experiment.defaults["stage"]).steps == 7 for c in configs
        )
    with pytest.raises(ValueError, match="There is no arm 'nothing'; choose from dino, no_dino"):
        ex.EXPERIMENTS["dino"].arm("nothing")


def test_the_sweep_is_the_one_that_was_asked_for():
    weights = {
        a.changes["lambda_3d"]
        for a in ex.EXPERIMENTS["distillation"].arms
        if "lambda_3d" in a.changes
    }
    assert weights | {preset("tiny").lambda_3d} >= {0.0, 0.1, 0.3, 1.0, 3.0}
    assert {a.changes.get("num_frames", 16) for a in ex.EXPERIMENTS["frames"].arms} == {2, 4, 8, 16}
    assert {a.changes.get("lora_rank", 16) for a in ex.EXPERIMENTS["rank"].arms} == {4, 16, 64}


def test_common_arms_of_two_experiments_are_one_run():
    distillation, frames, dino = (ex.EXPERIMENTS[k] for k in ("distillation", "frames", "dino"))
    default = ex.run_name(distillation, distillation.arm("rgbd"), 0, (120, 2), "start")
    assert default == ex.run_name(frames, frames.arm("n_16"), 0, (120, 2), "start")
    others = [
        ex.run_name(distillation, distillation.arm("rgbd"), 0, (60, 2), "start"),
        ex.run_name(distillation, distillation.arm("rgbd"), 1, (120, 2), "start"),
        ex.run_name(distillation, distillation.arm("rgbd"), 0, (120, 2), "other"),
        ex.run_name(distillation, distillation.arm("lambda_1"), 0, (120, 2), "start"),
        ex.run_name(distillation, distillation.arm("lambda_3"), 0, (120, 2), "start"),
        ex.run_name(dino, dino.arm("dino"), 0, (120, 2), "start"),
    ]
    assert len({default, *others}) == 7


# ---------------------------------------------------------------- runs


def test_distillation_runs_are_scored_paired_and_not_repeated(place, tmp_path, capsys, monkeypatch):
    arms = ("--arms", "none", "lambda_0", "lambda_3")
    record = command(place, tmp_path, "distillation", *arms, "--seeds", "0", "1")
    assert record["ids"] == ["balls", "others"] and list(record["arms"]) == list(arms[1:])
    for arm in record["arms"].values():
        assert list(arm["scores"]) == ["0", "1"]
        scores = arm["scores"]["0"]
        assert {
            "psnr",
            "ssim",
            "chamfer",
            "f_score",
            "reprojection",
            "split_psnr",
            "ghosting",
        } <= set(scores)
        assert all(len(column) == 2 for column in scores.values())
        assert scores["chamfer"][1] is None  # no true shape was given for the second object
    base, tuned = (np.array(record["arms"][k]["scores"]["0"]["psnr"]) for k in ("none", "lambda_3"))
    assert (base != tuned).any()
    assert (
        record["arms"]["none"]["scores"]["0"]["true_psnr"]
        == record["arms"]["lambda_3"]["scores"]["0"]["true_psnr"]
    )
    assert record["differences"].keys() == {"none", "lambda_3"}
    assert "| λ = 3 | 2 |" in capsys.readouterr().out
    assert not list((tmp_path / "work").rglob("checkpoint-*"))

    monkeypatch.setattr(ex, "timed_training", lambda *_: pytest.fail("a finished run was repeated"))
    assert (
        command(place, tmp_path, "distillation", *arms, "--seeds", "0", "1")["arms"]
        == record["arms"]
    )


def test_the_frozen_decoder_is_scored_once_for_all_arms(place, tmp_path, monkeypatch):
    frames, scored = [], ex.score_decoder
    monkeypatch.setattr(ex, "score_decoder", lambda *args: frames.append(args[2]) or scored(*args))
    record = command(place, tmp_path, "frames", "--arms", "n_2", "n_4", "--seeds", "0", "1")
    assert frames == [2, 4]
    true = {
        name: [scores["true_psnr"] for scores in arm["scores"].values()]
        for name, arm in record["arms"].items()
    }
    assert true["n_2"][0] == true["n_2"][1] != true["n_4"][0]


def test_a_run_that_was_killed_while_scoring_is_not_trained_again(place, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(
            ex, "score_generations", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert run(place, tmp_path, "rank", "--arms", "rank_4", "--seeds", "0") == 130
    killed = command(place, tmp_path, "rank", "--arms", "rank_4", "--seeds", "0")
    whole = command(place, tmp_path / "whole", "rank", "--arms", "rank_4", "--seeds", "0")
    scores = [record["arms"]["rank_4"]["scores"]["0"] for record in (killed, whole)]
    for metric in scores[0].keys() - {"cpu_seconds"}:
        assert scores[0][metric] == scores[1][metric], metric
    assert killed["arms"]["rank_4"]["cost"]["0"]["cpu_seconds_per_step"] > 0


def test_decoders_are_trained_from_scratch_with_and_without_dino(place, tmp_path):
    record = command(place, tmp_path, "dino", "--seeds", "3")
    with_dino, without = (record["arms"][name]["scores"]["3"] for name in ("dino", "no_dino"))
    assert set(with_dino) == set(without) and "true_psnr" in with_dino and "psnr" not in with_dino
    assert with_dino["true_psnr"] != without["true_psnr"]


def test_overfitting_lowers_the_loss_on_the_one_object(place, tmp_path):
    record = command(
        place,
        tmp_path,
        "overfit",
        "--ids",
        "balls",
        "--seeds",
        "0",
        "--steps",
        "30",
        "--arms",
        "scratch",
    )
    first = command(
        place,
        tmp_path,
        "overfit",
        "--ids",
        "balls",
        "--seeds",
        "0",
        "--steps",
        "1",
        "--arms",
        "scratch",
    )
    last, start = (r["arms"]["scratch"]["scores"]["0"]["psnr"][0] for r in (record, first))
    assert record["ids"] == ["balls"] and last > start


def test_finished_runs_are_found_in_the_results_file(place, tmp_path, monkeypatch, capsys):
    """Without --work, by their fingerprint; those of other weights, steps or objects
    are left out and said to be.
    """
    first = command(place, tmp_path, "rank", "--arms", "rank_4", "--seeds", "0")
    shutil.rmtree(tmp_path / "work")
    second = command(place, tmp_path, "rank", "--arms", "rank_4", "rank_16", "--seeds", "1")
    assert {name: list(arm["scores"]) for name, arm in second["arms"].items()} == {
        "rank_4": ["0", "1"],
        "rank_16": ["1"],
    }
    assert second["arms"]["rank_4"]["cost"]["0"] == first["arms"]["rank_4"]["cost"]["0"]
    shutil.rmtree(tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(ex, "timed_training", lambda *_: pytest.fail("a finished run was repeated"))
        again = command(place, tmp_path, "rank", "--arms", "rank_4", "--seeds", "0", "1")
    assert again["arms"] == second["arms"] and again["fingerprint"] == second["fingerprint"]
    assert "left out" not in capsys.readouterr().out

    others = command(place, tmp_path, "rank", "--arms", "rank_4", "--seeds", "0", "--ids", "balls")
    assert others["ids"] == ["balls"] and list(others["arms"]["rank_4"]["scores"]) == ["0"]
    assert "3 of 3 runs are of other weights, data or steps" in capsys.readouterr().out
    del others["fingerprint"], others["arms"]["rank_4"]["runs"]  # as files were written before
    (tmp_path / "rank.json").write_text(json.dumps(others))
    command(place, tmp_path, "rank", "--arms", "rank_4", "--seeds", "0", "--ids", "balls")
    assert (
        "1 of 1 runs are of other weights, data or steps, or do not say of which"
        in capsys.readouterr().out
    )


def test_the_fingerprint_is_of_what_arms_start_from(place, tmp_path):
    shutil.copytree(place / "weights", tmp_path / "copy")
    (tmp_path / "copy/lora").mkdir()
    (tmp_path / "copy/lora/pytorch_lora_weights.safetensors").write_bytes(
        b"arms do not start from it"
    )
    same = ex.weights_fingerprint(place / "weights")
    assert ex.weights_fingerprint(tmp_path / "copy") == same
    (file,) = (tmp_path / "copy/unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert ex.weights_fingerprint(tmp_path / "copy") != same


# ---------------------------------------------------------------- differences


def arm(*seeds: list[float]) -> dict:
    return {"label": "x", "scores": {str(k): {"psnr": row} for k, row in enumerate(seeds)}}


def test_differences_are_paired_by_seed_and_object():
    reference, better = arm([10.0, 20, 30], [11, 21, 31]), arm([11.0, 21, 31], [13, 23, 33])
    found = ex.compare(better, reference, "psnr")
    assert found["seeds"] == [1, 2] and found["mean"] == pytest.approx(1.5)
    # every object gained the same
    assert found["low"] == pytest.approx(1.5) and found["high"] == pytest.approx(1.5)
    # only the seed that both have
    assert ex.compare(arm([11.0, 21, 31]), reference, "psnr")["seeds"] == [1]


def test_an_object_without_a_number_is_left_out():
    reference, other = arm([10.0, None, 30]), arm([12.0, 5.0, 32])
    found = ex.compare(other, reference, "psnr")
    assert found["mean"] == 2 and (found["low"], found["high"]) == (2, 2)
    assert math.isnan(ex.compare(arm(), reference, "psnr")["mean"])


def test_the_interval_is_the_bootstrap_over_objects():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 40)), rng.normal(size=(2, 40))
    found = ex.compare(arm(*first.tolist()), arm(*second.tolist()), "psnr")
    assert (found["low"], found["high"]) == bootstrap_interval((first - second).mean(axis=0))


def test_a_world_scores_only_the_objects_that_were_named(place):
    views = ball_views(3)
    chosen = views.subset([2, 0])
    assert chosen.ids == ["balls_2", "balls_0"] and torch.equal(chosen.rgb[0], views.rgb[2])


@pytest.mark.parametrize(
    ("interval", "seeds", "word"),
    [
        ((0.1, 0.3), (0.1, 0.2, 0.3), "yes"),
        ((-0.3, -0.1), (-0.1, -0.2, -0.3), "no"),
        ((-0.1, 0.3), (0.1, 0.2, 0.3), "not shown"),  # the objects are too few
        ((0.1, 0.3), (-0.1, 0.3, 0.4), "not shown"),  # the seeds disagree
        ((-0.1, 0.1), (-0.1, -0.2, -0.1), "not shown"),
    ],
)
def test_a_claim_holds_where_the_interval_and_every_seed_say_so(interval, seeds, word):
    difference = {"low": interval[0], "high": interval[1], "seeds": seeds}
    opposite = {"low": -interval[1], "high": -interval[0], "seeds": [-s for s in seeds]}
    assert holds(difference, 1) == holds(opposite, -1) == word
