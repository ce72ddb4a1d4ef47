"""The loop: a killed run goes on as if nothing had happened; every stage takes steps
that help.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_world import (
    SCALE,
    ball_views,
    descend,
    one_sentence,
    randn,
    random_orbits,
    shake,
    tiny_config,
)
from torch import nn

from gsv3d_lib import training
from gsv3d_lib.cameras import orbit_cameras, ray_grid
from gsv3d_lib.config import Schedule, preset
from gsv3d_lib.data.examples import load_orbits
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.diffusion import sample
from gsv3d_lib.encoders import build_clip, build_dino, orbit_condition
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.losses import foreground_l1, pixel_loss, rendering_loss
from gsv3d_lib.pretraining import DiffusionStage, DINOStage, VAEStage, rolled
from gsv3d_lib.rendering import render
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.system.errors import UserError
from gsv3d_lib.training import (
    Stage,
    Stopwatch,
    draw_batch,
    expected_steps,
    learning_rate,
    train,
    update_average,
)
from gsv3d_lib.unet import build_unet
from gsv3d_lib.vae import build_vae, encode
from gsv3d_lib.weights.run_folder import (
    list_checkpoints,
    read_metrics,
    run_identity,
    trained_seconds,
)

CONFIG = tiny_config(lambda_alpha=0.5, lambda_pixel=0.5)
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for processes of their own
STEPS = 8
LINE = Schedule(steps=STEPS, batch=3, lr=0.05, warmup=2, ema=0.9)


class LineStage(Stage):
    """Fits y = 2 x - 1 from noisy points: the smallest stage with random examples,
    shared draws and a metric.
    """

    def __init__(self, width: int = 4, die_at: int | None = None):
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
        self.die_at = die_at

    def example(self, generator, shared, place):
        x, slope = (
            torch.randn(5, 1, generator=generator),
            2 + 0.1 * torch.randn((), generator=shared),
        )
        return {"x": x, "y": slope * x - 1, "slope": slope}

    def forward(self, batch):
        loss = (self.net(batch["x"]) - batch["y"]).pow(2).mean()
        return loss, {"slope": batch["slope"].mean()}

    def after_step(self, step, steps):
        if step == self.die_at:
            raise KeyboardInterrupt


def run(stage: Stage, folder: Path, schedule: Schedule = LINE, **options) -> list[dict]:
    return train(stage, schedule, folder, log_every=1, progress=False, **options)


def curve(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[LineStage, list[dict], Path]:
    """The uninterrupted run: stage, metrics, folder."""
    folder, stage = tmp_path_factory.mktemp("whole"), LineStage()
    return stage, run(stage, folder), folder


# ---------------------------------------------------------------- exact resume


@pytest.mark.parametrize("kill", [0, 3, STEPS - 1])
def test_a_killed_run_goes_on_exactly(whole, tmp_path, kill):
    """Killed in the middle of step `kill`, with a checkpoint after every step."""
    stage, history, _ = whole
    with pytest.raises(KeyboardInterrupt):
        run(LineStage(die_at=kill), tmp_path, checkpoint_minutes=0)
    resumed = LineStage()
    rows = run(resumed, tmp_path)
    assert curve(rows) == curve(history) == curve(read_metrics(tmp_path))
    assert_same_weights(resumed, stage)


def test_stopping_early_keeps_the_schedule_of_the_full_run(whole, tmp_path):
    stage, history, _ = whole
    first = run(LineStage(), tmp_path, stop_at=5)
    assert [row["step"] for row in first] == list(range(5))
    resumed = LineStage()
    assert curve(run(resumed, tmp_path)) == curve(history)
    assert_same_weights(resumed, stage)


KILLED = """
import os, signal, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_training import LINE, LineStage, train

class Doomed(LineStage):
    def after_step(self, step, steps):
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

train(Doomed(), LINE, sys.argv[1], log_every=1, progress=False, checkpoint_minutes=0)
"""


def test_sigkill_leaves_a_folder_to_go_on_from(whole, tmp_path):
    """A process that really dies, with nothing flushed or closed."""
    stage, history, _ = whole
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(paths=PATHS), run_dir], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in list_checkpoints(run_dir)] == [
        f"checkpoint-{k:07d}.safetensors" for k in (3, 4)
    ]
    resumed = LineStage()
    rows = run(resumed, run_dir)
    for before, after in zip(curve(history), curve(rows), strict=True):
        assert before == pytest.approx(after, rel=1e-6)
    for x, y in zip(stage.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-5)


def test_a_finished_run_does_nothing_more(whole, tmp_path):
    stage, history, folder = whole
    again = LineStage()
    assert curve(run(again, folder)) == curve(history)
    assert_same_weights(again, stage)


def test_a_stage_with_teacher_and_centre_resumes_exactly(tmp_path):
    """DINO keeps state beyond its trainable weights: a teacher that averages, and a
    centre that drifts.
    """
    views, schedule = ball_views(), replace(CONFIG.dino_schedule, steps=4, ema=0.5)

    def fresh():
        torch.manual_seed(0)
        return DINOStage(build_dino(CONFIG), views, CONFIG)

    whole, killed, resumed = fresh(), fresh(), fresh()
    history = run(whole, tmp_path / "whole", schedule)
    run(killed, tmp_path / "killed", schedule, stop_at=2)
    assert curve(run(resumed, tmp_path / "killed", schedule)) == curve(history)
    assert_same_weights(resumed, whole)


# ---------------------------------------------------------------- the same run, or none


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"precision": "bf16"}, "precision 'fp32' -> 'bf16'"),
        ({"batch": 4, "lr": 0.1}, "batch 3 -> 4, lr 0.05 -> 0.1"),
        ({"ema": 0.0}, "ema 0.9 -> 0.0"),
        ({"warmup": 3, "weight_decay": 0.0}, "warmup 2 -> 3, weight_decay 0.01 -> 0.0"),
        ({"steps": 6}, "steps 8 -> 6"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, change, sentence, capsys):
    run(LineStage(), tmp_path, stop_at=5)
    schedule = replace(
        LINE, **{name: value for name, value in change.items() if hasattr(LINE, name)}
    )
    options = {name: value for name, value in change.items() if not hasattr(LINE, name)}
    with pytest.raises(UserError, match=f"another run: {sentence}\\. .*--force-resume") as error:
        run(LineStage(), tmp_path, schedule, **options)
    one_sentence(error)
    run(LineStage(), tmp_path, schedule, **options, force_resume=True)
    assert f"all the same: {sentence}." in capsys.readouterr().out
    assert read_metrics(tmp_path)[-1]["step"] == schedule.steps - 1


def test_more_steps_than_planned_are_another_schedule_of_the_same_run(tmp_path, capsys):
    run(LineStage(), tmp_path)
    rows = run(LineStage(), tmp_path, replace(LINE, steps=12))
    assert [row["step"] for row in rows] == list(range(12))
    assert "planned with 8 steps; the learning rate now follows 12" in capsys.readouterr().out


@pytest.mark.parametrize("force", [False, True])
def test_a_checkpoint_beyond_the_steps_is_refused(whole, force):
    with pytest.raises(
        UserError, match="holds step 8, beyond the 5 steps asked for: ask for 8 or more"
    ):
        run(LineStage(), whole[2], replace(LINE, steps=5), force_resume=force)


def identity(stage: Stage) -> dict:
    return run_identity(stage, LINE, 0, "no")


def sampled_decoder_stage(share: float) -> DecoderStage:
    config = CONFIG.replace(sampled_share=share, view_counts=(4,))
    torch.manual_seed(0)
    parts = build_decoder(config), build_dino(config), random_orbits(ball_views()), config
    return DecoderStage(*parts, unet=shake(build_unet(config)), clip=build_clip(config))


def test_a_share_of_the_decoders_orbits_is_the_unets_own():
    """They are what `sample` makes of the example's condition; the others stay true."""
    stage = sampled_decoder_stage(0.5)
    batch = draw_batch(stage, 0, 0, 16)
    seeds = batch["seed"]
    assert 3 <= (seeds > 0).sum() <= 13 and len(set(seeds.tolist())) > 3
    seen = []
    stage.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    loss, _ = stage(batch)
    loss.backward()
    kept = (seen[0] == batch["latents"]).flatten(1).all(1)
    assert torch.equal(kept, seeds == 0)
    b = int(seeds.argmax())
    one = {name: part[b : b + 1] for name, part in batch.items()} | {"keep": torch.ones(1)}
    condition = orbit_condition(one, stage.clip, stage.config)
    noise = torch.Generator().manual_seed(int(seeds[b]))
    options = {"generator": noise, "guidance": 1.0, "progress": False}
    assert torch.equal(seen[0][b], sample(stage.unet, condition, stage.config, **options)[0])
    assert all(p.grad is None for part in (stage.unet, stage.clip) for p in part.parameters())


def test_short_orbits_are_never_sampled_and_without_a_share_nothing_changes():
    stage = sampled_decoder_stage(1.0)
    assert (draw_batch(stage, 0, 0, 4)["seed"] > 0).all()
    stage.config = stage.config.replace(view_counts=(2,))  # the U-Net makes whole orbits
    assert (draw_batch(stage, 0, 0, 4)["seed"] == 0).all()
    assert "seed" not in draw_batch(decoder_stage(), 0, 0, 1)


def test_the_identity_names_configuration_data_and_frozen_models():
    views, orbits, config = ball_views(), random_orbits(ball_views()), CONFIG
    vae, decoder, dino = build_vae(config), build_decoder(config), build_dino(config)

    def differs(one: Stage, other: Stage) -> set[str]:
        a, b = identity(one), identity(other)
        assert a.keys() == b.keys()
        return {name for name in a if a[name] != b[name]}

    plain = VAEStage(vae, views, config)
    assert differs(plain, VAEStage(vae, ball_views(), config)) == set()
    assert differs(plain, VAEStage(vae, ball_views(1), config)) == {"data"}
    assert differs(plain, VAEStage(vae, views, config.replace(vae_anchor=0.5, lambda_rgb=2.0))) == {
        "vae_anchor"
    }
    plain = DecoderStage(decoder, dino, orbits, config)
    assert differs(plain, DecoderStage(decoder, shake(build_dino(config)), orbits, config)) == {
        "frozen models"
    }
    assert differs(
        plain, DecoderStage(decoder, dino, orbits, config.replace(lambda_alpha=0.1, vae_anchor=0.5))
    ) == {"lambda_alpha"}
    other = random_orbits(ball_views(), seed=1)
    assert differs(plain, DecoderStage(decoder, dino, other, config)) == {"data"}


def tampered(folder: Path, change) -> Path:
    """The newest checkpoint of a run with its tensors and metadata changed in place by
    `change(tensors, metadata)`.
    """
    path = list_checkpoints(folder)[-1]
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


NONSENSE = {
    "numbers that are not finite": lambda t, m: t["state.net.0.weight"].fill_(torch.nan),
    "says that it holds step -7": lambda t, m: m.update(step="-7"),
    "says that it holds step 6": lambda t, m: m.update(step="6"),
    "no such statement": lambda t, m: m.update(run='{"format": 1}'),
    "tensors, not": lambda t, m: t.pop("optimizer.0.exp_avg"),
}


@pytest.mark.parametrize("said", NONSENSE)
def test_a_checkpoint_that_holds_nonsense_is_passed_over(whole, tmp_path, said, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(LineStage(die_at=5), tmp_path, checkpoint_minutes=0)
    damaged = tampered(tmp_path, NONSENSE[said])
    resumed = LineStage()
    assert curve(run(resumed, tmp_path)) == curve(whole[1])
    assert_same_weights(resumed, whole[0])
    assert (
        said in capsys.readouterr().out
        and not damaged.exists()
        and damaged.with_suffix(".damaged").is_file()
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"checkpoint-000000{k}.safetensors" for k in (4, 8)
    ]


def test_where_no_checkpoint_can_be_read_nothing_begins_again(tmp_path):
    run(LineStage(), tmp_path, stop_at=3)
    before = tampered(tmp_path, NONSENSE["says that it holds step -7"]).read_bytes()
    with pytest.raises(
        UserError, match="No checkpoint in .* can be read: delete them to train from the start"
    ) as error:
        run(LineStage(), tmp_path)
    one_sentence(error)
    assert list_checkpoints(tmp_path)[0].read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(whole, tmp_path, capsys):
    run(LineStage(), tmp_path, stop_at=3)
    tampered(tmp_path, lambda t, m: (m.pop("run"), m.pop("tensors")))
    assert curve(run(LineStage(), tmp_path)) == curve(whole[1])
    assert "does not state its settings" in capsys.readouterr().out


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    run(LineStage(), tmp_path, stop_at=3)
    tampered(tmp_path, lambda t, m: m.update(run=m["run"].replace('"format": 1', '"format": 2')))
    with pytest.raises(UserError, match="later version"):
        run(LineStage(), tmp_path, force_resume=True)


def test_an_optimizer_state_of_another_parameter_is_refused(tmp_path):
    run(LineStage(), tmp_path, stop_at=3)
    tampered(tmp_path, lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(7)}))
    with pytest.raises(UserError, match="optimizer state 0 is another parameter's") as error:
        run(LineStage(), tmp_path)
    one_sentence(error)


@pytest.mark.parametrize("seed", [-1, 10**12, 0.5])
def test_a_seed_that_the_generators_cannot_take_is_refused(tmp_path, seed):
    with pytest.raises(UserError, match="The seed takes whole numbers"):
        run(LineStage(), tmp_path, seed=seed)


# -------------------------------------- one training in a folder, and how it is stopped


class SignallingStage(LineStage):
    """Sends its own process a signal in the middle of a step."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def after_step(self, step, steps):
        if step == 4:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(whole, tmp_path, number, capsys):
    # a shell's background jobs ignore Ctrl-C, on purpose
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        run(SignallingStage(number), tmp_path)
    sentence = str(stopped.value) if number == signal.SIGINT else capsys.readouterr().err
    assert "holds its 5 steps, and the same command goes on" in sentence
    assert number == signal.SIGINT or stopped.value.code == 143
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0000005.safetensors"]
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert curve(run(LineStage(), tmp_path)) == curve(whole[1])


def test_a_training_in_another_thread_leaves_signals_alone(whole, tmp_path):
    before, rows = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: rows.extend(run(LineStage(), tmp_path)))
    thread.start()
    thread.join()
    assert curve(rows) == curve(whole[1]) and signal.getsignal(signal.SIGTERM) is before


HOLD = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from gsv3d_lib.training import only_training

with only_training(Path(sys.argv[1]), first=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_in_the_folder_is_refused_until_the_first_is_dead(whole, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", HOLD.format(paths=PATHS), run_dir]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=f"Another training works in .* \\(process {other.pid} on "
        ) as error:
            run(LineStage(), run_dir)
        one_sentence(error)
        other.kill()
    left = run_dir / ".checkpoint-0000009.safetensors.0badcafe-1.tmp"  # of a node that is gone
    left.write_bytes(b"a full-sized file")
    assert curve(run(LineStage(), run_dir)) == curve(whole[1])
    assert not left.exists()


def test_imitated_bfloat16_is_said(tmp_path, monkeypatch, capsys):
    from gsv3d_lib import training

    for slow, precision, said in (
        (True, "bf16", True),
        (False, "bf16", False),
        (True, "fp32", False),
    ):
        monkeypatch.setattr(training, "is_slow_in_bf16", lambda slow=slow: slow)
        run(LineStage(), tmp_path / f"{slow}{precision}", precision=precision, stop_at=1)
        assert ("has no instructions for bfloat16" in capsys.readouterr().out) == said


# -------------------------------------------------------------- checkpoints and metrics


def test_a_truncated_checkpoint_is_passed_over(whole, tmp_path, capsys):
    stage, history, _ = whole
    with pytest.raises(KeyboardInterrupt):
        run(LineStage(die_at=5), tmp_path, checkpoint_minutes=0)
    newest, before = list_checkpoints(tmp_path)[::-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / ".checkpoint-0000009.safetensors.1.tmp").write_bytes(
        b"left behind by a dying process"
    )
    resumed = LineStage()
    assert curve(run(resumed, tmp_path)) == curve(history)
    assert_same_weights(resumed, stage)
    assert f"{newest} cannot be read" in capsys.readouterr().out


def test_checkpoints_are_whole_and_two(whole):
    _, _, folder = whole
    assert not list(folder.glob(".*"))  # nothing temporary stays
    (path,) = list_checkpoints(folder)
    with safe_open(path, "pt") as file:
        names, step = set(file.keys()), file.metadata()["step"]
    assert step == str(STEPS)
    assert {
        "state.net.0.weight",
        "average.net.0.weight",
        "optimizer.0.exp_avg",
        "optimizer.3.step",
    } <= names


def test_a_failing_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    from gsv3d_lib.weights import run_folder

    run(LineStage(), tmp_path, stop_at=3)
    whole_write = run_folder.save_file

    def full_disk(tensors, path, **options):
        whole_write(tensors, path, **options)
        os.truncate(path, 50)
        raise OSError("no space left on device")

    monkeypatch.setattr(run_folder, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        run(LineStage(), tmp_path, stop_at=5)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == [
        "checkpoint-0000003.safetensors"
    ]


def test_another_model_is_refused_in_one_sentence(whole):
    _, _, folder = whole
    with pytest.raises(
        ValueError, match=r"net.0.weight should be \(6, 1\), the file has shape \(4, 1\)"
    ) as error:
        run(LineStage(width=6), folder)
    assert "\n" not in str(error.value) and "another run folder" in str(error.value)
    deeper = LineStage()
    deeper.net.append(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no such tensor"):
        run(deeper, folder)


def test_metrics_are_json_lines(whole, tmp_path):
    _, history, folder = whole
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert {"step", "time", "loss", "grad_norm", "slope"} == set(history[0])
    # a kill in the middle of a line
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 8, "lo']))
    assert read_metrics(tmp_path) == history
    assert read_metrics(tmp_path, before=3) == history[:3]
    assert read_metrics(tmp_path / "nowhere") == []


def test_logging_less_often_changes_nothing_else(whole, tmp_path):
    stage, history, _ = whole
    quiet = LineStage()
    rows = train(quiet, LINE, tmp_path, log_every=3, progress=False)
    assert [row["step"] for row in rows] == [0, 3, 6, 7]
    assert curve(rows) == [row for row in curve(history) if row["step"] in (0, 3, 6, 7)]
    assert_same_weights(quiet, stage)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Exploding(LineStage):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            return loss / 0, metrics

    with pytest.raises(ValueError, match="loss of step 0 is inf; lower the learning rate"):
        run(Exploding(), tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path):
    class Steep(LineStage):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            return loss + (loss - loss).sqrt(), metrics  # a finite value, an infinite slope

    stage = Steep()
    with pytest.raises(ValueError, match="gradient of step 0 is nan; lower the learning rate"):
        run(stage, tmp_path)
    assert all(p.isfinite().all() for p in stage.parameters())


@pytest.mark.parametrize(("scale", "clipped"), [(1e3, True), (1e-3, False)])
def test_gradients_longer_than_1_are_shortened_to_1(tmp_path, scale, clipped):
    class Scaled(LineStage):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            return scale * loss, metrics

    stage = Scaled()
    (row,) = run(stage, tmp_path, stop_at=1)
    # as the optimiser saw them
    norm = torch.cat([p.grad.flatten() for p in stage.parameters()]).norm()
    assert (row["grad_norm"] > 1) == clipped
    assert norm == pytest.approx(1.0 if clipped else row["grad_norm"], rel=1e-3)


def test_the_number_of_processes_is_checked(tmp_path):
    with pytest.raises(
        ValueError, match="2 processes were asked for, but 1 are running; start them with"
    ):
        run(LineStage(), tmp_path, processes=2)


# ---------------------------------------------------------------- a budget of time


class Ticks:
    """A clock on which every look at it, one a step, is `minutes` later than the one
    before.
    """

    def __init__(self, minutes: float):
        self.seconds, self.tick = 0.0, 60 * minutes

    def __call__(self) -> float:
        self.seconds += self.tick
        return self.seconds


LONG = replace(LINE, steps=1000)


def timed(monkeypatch, folder, minutes: float, tick: float = 1.0, schedule=LONG, **options):
    """A run of LineStage of so many minutes, where a step takes `tick` of them."""
    monkeypatch.setattr(Stopwatch, "now", staticmethod(Ticks(tick)))
    stage = LineStage()
    return stage, run(stage, folder, schedule, minutes=minutes, **options)


def test_a_run_ends_with_its_minutes(tmp_path, monkeypatch):
    rates, passed = [], []
    of_schedule = training.learning_rate

    def noted(step, schedule, spent):
        passed.append(spent)
        rates.append(of_schedule(step, schedule, spent))
        return rates[-1]

    monkeypatch.setattr(training, "learning_rate", noted)
    stage, rows = timed(monkeypatch, tmp_path, minutes=11)
    assert [row["step"] for row in rows] == list(range(10))
    assert passed == pytest.approx([k / 11 for k in range(1, 11)])
    assert rates[:2] == pytest.approx([LONG.lr / 2, LONG.lr])  # the warm-up counts steps
    assert rates[2:] == pytest.approx(
        [LONG.lr * (0.55 + 0.45 * math.cos(math.pi * k / 11)) for k in range(3, 11)]
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0000010.safetensors"]
    # the look that found the time up, and that of the checkpoint
    assert trained_seconds(tmp_path, 10) == 60 * 12


def test_the_last_step_of_a_timed_run_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(Stopwatch, "now", staticmethod(Ticks(1.0)))
    rows = train(LineStage(), LONG, tmp_path, log_every=4, progress=False, minutes=8)
    assert [row["step"] for row in rows] == [0, 4, 6]


def test_a_resumed_run_has_the_rest_of_its_minutes(tmp_path, monkeypatch, capsys):
    timed(monkeypatch, tmp_path, minutes=20, stop_at=6)
    # six steps, and the look at the clock for the checkpoint
    assert trained_seconds(tmp_path, 6) == 60 * 7
    _, rows = timed(monkeypatch, tmp_path, minutes=20)
    assert [row["step"] for row in rows] == list(range(6 + 12))  # 7 + 12 < 20 <= 7 + 13
    _, rows = timed(monkeypatch, tmp_path, minutes=20)
    assert (
        len(rows) == 18
        and "has trained for 20 minutes already; ask for more to go on" in capsys.readouterr().out
    )
    _, rows = timed(monkeypatch, tmp_path, minutes=30)
    assert len(rows) > 18


def test_steps_may_end_a_timed_run_earlier(whole, tmp_path, monkeypatch):
    """And with all the time in the world it is the run without a limit, bit for bit."""
    stage, rows = timed(monkeypatch, tmp_path, minutes=1e5, tick=1e-9, schedule=LINE)
    assert curve(rows) == curve(whole[1])
    assert_same_weights(stage, whole[0])


def test_a_teacher_hears_how_many_steps_the_time_will_allow():
    assert expected_steps(5, 800, 0.0) == 800
    assert expected_steps(50, 9_999_999, 0.25) == 200
    assert expected_steps(50, 120, 0.25) == 120
    assert expected_steps(0, 9_999_999, 0.9) == 1


@pytest.mark.parametrize("minutes", [-1.0, math.nan, math.inf])
def test_minutes_that_are_none_are_refused(tmp_path, minutes):
    with pytest.raises(UserError, match="minutes of a training are a number of 0 or more"):
        run(LineStage(), tmp_path, minutes=minutes)


def test_a_checkpoint_that_says_nonsense_of_its_time_has_had_none(tmp_path):
    run(LineStage(), tmp_path, stop_at=3)
    for text, seconds in (("-5", 0.0), ("nan", 0.0), ("soon", 0.0), ("1e99", 1e9), ("12.5", 12.5)):
        tampered(tmp_path, lambda tensors, facts, text=text: facts.update(seconds=text))
        assert trained_seconds(tmp_path, 3) == seconds
    assert trained_seconds(tmp_path, 4) == 0.0


# ----------------------------------------------------------- schedule, average, batches


def test_learning_rate_warms_up_and_cools_down():
    schedule = Schedule(steps=110, batch=1, lr=1.0, warmup=10)
    rates = [learning_rate(step, schedule) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert (
        rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    )
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(500, schedule) == pytest.approx(0.1)
    assert learning_rate(0, replace(schedule, warmup=0)) == 1.0


def test_the_average_forgets_its_start():
    average = {"w": torch.zeros(1)}
    update_average(average, {"w": torch.ones(1)}, 0.99, step=0)
    assert average["w"] == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    update_average(average, {"w": torch.full((1,), 2.0)}, 0.99, step=10**6)
    assert average["w"] == pytest.approx(0.99 * 0.9 + 0.01 * 2)


def test_the_average_is_what_a_run_leaves(tmp_path):
    averaged, plain = LineStage(), LineStage()
    run(averaged, tmp_path / "a")
    run(plain, tmp_path / "b", replace(LINE, ema=0.0))
    with safe_open(list_checkpoints(tmp_path / "a")[0], "pt") as file:
        for name, p in averaged.named_parameters():
            assert torch.equal(p, file.get_tensor(f"average.{name}"))
            assert torch.equal(
                dict(plain.named_parameters())[name], file.get_tensor(f"state.{name}")
            )


@pytest.mark.parametrize("batch", [4, 5])
def test_two_processes_draw_what_one_would(batch):
    stage = LineStage()
    alone = draw_batch(stage, seed=3, step=17, batch=batch)
    ranks = [draw_batch(stage, 3, 17, batch, rank, world=2) for rank in (0, 1)]
    for name, values in alone.items():
        for rank in (0, 1):
            assert torch.equal(ranks[rank][name], values[rank::2])
    assert (
        len(set(alone["slope"].tolist())) == 1 and len(set(alone["x"][:, 0, 0].tolist())) == batch
    )


PAIR = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_training import LINE, TWO_STEPS, LineStage, replace, train, vae_stage

line = sys.argv[1] + "/line"
train(LineStage(), replace(LINE, batch=4), line, log_every=1, progress=False, processes=2)
torch.manual_seed(0)
train(vae_stage(), TWO_STEPS, sys.argv[1] + "/vae", log_every=1, progress=False, processes=2)
"""
TWO_STEPS = Schedule(steps=2, batch=2, lr=1e-3, warmup=0)


def test_two_processes_train_what_one_would(tmp_path):
    """torchrun with gloo. The VAE has parameters that its loss never touches, which a
    plain DDP refuses.

    gloo's teardown sometimes aborts after the work is done, so the files are judged and
    not the return code.
    """
    (tmp_path / "pair.py").write_text(PAIR.format(paths=PATHS))
    command = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    done = subprocess.run(
        [sys.executable, *command, tmp_path / "pair.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
    )
    torch.manual_seed(0)
    alone = vae_stage()
    even = replace(LINE, batch=4)
    expected = {
        "line": run(LineStage(), tmp_path / "a", even),
        "vae": run(alone, tmp_path / "b", TWO_STEPS),
    }
    for name, history in expected.items():
        rows = read_metrics(tmp_path / name)
        assert len(rows) == len(history), done.stderr
        for row, truth in zip(curve(rows), curve(history), strict=True):
            assert row == pytest.approx(truth, rel=1e-3)


def test_batches_differ_by_step_and_seed():
    stage = LineStage()
    draws = [
        draw_batch(stage, seed, step, 2)["x"] for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_train_what_the_whole_batch_would(tmp_path, micro_batch):
    """Gradient accumulation, also where the batch does not divide: 4 in parts of 3 is 3
    + 1.
    """
    histories = [
        run(LineStage(), tmp_path / str(m), replace(LINE, batch=4, micro_batch=m))
        for m in (0, micro_batch)
    ]
    for whole, parts in zip(*map(curve, histories), strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="A batch of 4 cannot be shared equally by 3 processes"):
        run(LineStage(), tmp_path, replace(LINE, batch=4), processes=3)


# ------------------------------------------------------------- the stages of the method


def vae_stage():
    return VAEStage(build_vae(CONFIG), ball_views(), CONFIG)


def dino_stage():
    return DINOStage(build_dino(CONFIG), ball_views(), CONFIG)


def diffusion_stage():
    return DiffusionStage(
        build_unet(CONFIG), build_clip(CONFIG), random_orbits(ball_views()), CONFIG
    )


def decoder_stage():
    return DecoderStage(
        build_decoder(CONFIG), build_dino(CONFIG), random_orbits(ball_views()), CONFIG
    )


def decoder_stage_without_dino():
    config = CONFIG.replace(dino="none", lambda_pixel=0.0)
    return DecoderStage(build_decoder(config), None, random_orbits(ball_views()), config)


STAGES = [vae_stage, dino_stage, diffusion_stage, decoder_stage, decoder_stage_without_dino]


@pytest.mark.parametrize("build", STAGES)
def test_every_stage_trains(build, tmp_path):
    """Two steps of the loop are finite and move the weights; on one fixed batch a few
    steps lower the loss.
    """
    torch.manual_seed(0)
    stage = build()
    before = [p.detach().clone() for p in stage.parameters() if p.requires_grad]
    rows = run(stage, tmp_path, TWO_STEPS)
    values = torch.tensor([list(row.values()) for row in rows])
    assert (
        len(rows) == 2
        and torch.isfinite(values).all()
        and all(row["grad_norm"] > 0 for row in rows)
    )
    after = [p for p in stage.parameters() if p.requires_grad]
    assert all(
        not torch.equal(a, b) for a, b in zip(before, after, strict=True) if b.grad is not None
    )

    stage.eval()  # DINO's centre stands still, so that the targets of one batch do
    batch = draw_batch(stage, seed=0, step=100, batch=2)
    losses = descend(stage, batch, torch.optim.AdamW(after, lr=1e-3))
    assert losses[-1] < losses[0]


def test_the_vae_anchor_is_the_thumbnail_of_the_picture():
    """A codec that reconstructs perfectly and stores 1 - x, averaged over 8 x 8 pixels,
    costs nothing but its KL.
    """
    codec, posterior = (
        SimpleNamespace(),
        SimpleNamespace(std=torch.zeros(1), kl=lambda: torch.zeros(4)),
    )
    stage = VAEStage(codec, ball_views(), CONFIG)
    batch = draw_batch(stage, 0, 0, 2)
    images = batch["rgb"].flatten(0, 1).movedim(-1, 1) * 2 - 1
    codec.encode = lambda x: SimpleNamespace(latent_dist=posterior)
    codec.decode = lambda z, num_frames: SimpleNamespace(sample=images)
    thumbnail = torch.nn.functional.avg_pool2d(1 - images, 8)
    posterior.mean = torch.cat([thumbnail, randn(4, 1, 4, 4)], 1)
    assert stage(batch)[0] == pytest.approx(0, abs=1e-6)
    posterior.mean = posterior.mean + 0.5
    assert stage(batch)[0] == pytest.approx(CONFIG.vae_anchor * 0.25, abs=1e-5)


def test_conditions_are_dropped_where_the_batch_says():
    stage, seen = diffusion_stage(), []
    batch = draw_batch(stage, 0, 0, 2) | {"keep": torch.tensor([1.0, 0.0])}
    condition = orbit_condition(batch, stage.clip, CONFIG)
    stage.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    stage(batch)
    sample, _, token, polar, azimuth, _ = seen[0]
    assert torch.equal(sample[0, 2, 4:], batch["image_latent"][0]) and (token[0] != 0).any()
    assert (sample[1, :, 4:] == 0).all() and (token[1] == 0).all()
    assert torch.equal(token, condition.token) and torch.equal(
        azimuth, torch.deg2rad(batch["azimuth"])
    )
    assert torch.allclose(polar, torch.deg2rad(90 - batch["elevation"]))


def test_frozen_encoders_stay_frozen():
    stage = decoder_stage()
    assert not any(name.startswith("dino.") for name in stage.training_state())
    loss, _ = stage(draw_batch(stage, 0, 0, 2))
    loss.backward()
    assert all(p.grad is None for p in stage.dino.parameters())


def test_the_number_of_views_is_the_batch_s_own():
    """N is drawn once per step, from the generator that all examples share."""
    stage = decoder_stage()
    counts = [draw_batch(stage, 0, step, 3)["latents"].shape[1] for step in range(12)]
    assert set(counts) == set(CONFIG.view_counts)


def test_the_dino_teacher_follows_slowly():
    torch.manual_seed(0)
    stage = dino_stage()
    shake(stage.dino, size=1.0)
    teacher, student = (
        stage.teacher[0].layernorm.weight.clone(),
        stage.dino.layernorm.weight.clone(),
    )
    stage.after_step(0, 100)  # momentum 0.99 at the start
    assert torch.allclose(stage.teacher[0].layernorm.weight, teacher.lerp(student, 0.01))
    now = stage.teacher[0].layernorm.weight.clone()
    stage.after_step(100, 100)  # and 1 at the end
    assert torch.equal(stage.teacher[0].layernorm.weight, now)


# ---------------------------------------------------------------- cached latents


def test_cached_latents_are_used_only_where_they_fit(tmp_path):
    torch.manual_seed(0)
    views, vae, cache = ball_views(), build_vae(CONFIG).eval(), tmp_path / "latents.safetensors"
    first = load_orbits(views, vae, 2, cache)
    assert (
        len(first) == 4 and first.latents.shape == (4, 16, 4, 4, 4) and first.latent_scale == SCALE
    )
    with torch.no_grad():
        assert torch.allclose(first.latents[3], encode(vae, first.scene(3).rgb[:16]), atol=1e-5)
    stamp = cache.stat().st_mtime_ns
    assert torch.equal(load_orbits(views, vae, 2, cache).latents, first.latents)
    assert cache.stat().st_mtime_ns == stamp
    cache.write_bytes(cache.read_bytes()[:500])  # damaged: made again
    assert torch.equal(load_orbits(views, vae, 2, cache).latents, first.latents)
    shake(vae)  # another encoder: made again
    assert not torch.allclose(load_orbits(views, vae, 2, cache).latents, first.latents)


# ----------------------------------------------------------- what the decoder minimises


@pytest.fixture(scope="module")
def splats():
    colors, opacities = randn(40, 3, seed=2).sigmoid(), torch.full((40,), 0.9)
    return Gaussians(
        randn(40, 3) * 0.3, randn(40, 4, seed=1), torch.full((40, 3), 0.15), opacities, colors
    )


def test_rendering_loss_of_the_truth_is_zero_and_its_terms_add_up(splats):
    cameras = orbit_cameras([10.0, 200.0], [0.0, 20.0], 24)
    rgb, depth, alpha = render(splats, cameras)
    loss, metrics = rendering_loss(splats, cameras, rgb, depth, alpha, CONFIG)
    assert loss == 0 and metrics["depth_l1"] == 0
    config = CONFIG.replace(lambda_depth=0.7, lambda_alpha=0.3)
    nearer = torch.where(depth > 0, depth - 0.25, 0)
    loss, metrics = rendering_loss(splats, cameras, rgb + 0.1, nearer, alpha, config)
    assert metrics["depth_l1"] == pytest.approx(0.25, abs=1e-5)
    assert loss == pytest.approx(0.01 + 0.7 * 0.25, abs=1e-5) and metrics["psnr"] == pytest.approx(
        20, abs=1e-3
    )
    loss, _ = rendering_loss(splats, cameras, rgb, depth, 1 - alpha, config.replace(lambda_depth=0))
    assert loss == pytest.approx(float(0.3 * (2 * alpha - 1).pow(2).mean()), rel=1e-4)
    with pytest.raises(ValueError, match=r"\(2, 24, 24\).*\(1, 24, 24, 3\)"):
        rendering_loss(splats, cameras, rgb[:1], depth, alpha, config)


def test_depth_counts_only_where_the_object_is():
    depth, target = torch.zeros(1, 2, 2, 1), torch.tensor([3.0, 9, 0, 3]).reshape(1, 2, 2, 1)
    alpha = torch.tensor([1.0, 0.4, 1, 0.9]).reshape(1, 2, 2, 1)
    assert foreground_l1(depth, target, alpha) == 3  # half-covered and unknown pixels are left out
    assert foreground_l1(depth, target, torch.zeros_like(alpha)) == 0


def test_pixel_loss_is_zero_for_gaussians_on_their_pixels():
    cameras, side = orbit_cameras([0.0, 90.0], 10.0, 8), 4
    origins, directions = ray_grid(cameras, side, side)
    forward = cameras.c2w()[:, None, None, :3, 2]
    depth = (3.4 * directions * forward).sum(-1, keepdim=True)
    rgb, alpha = randn(2, side, side, 3).sigmoid(), torch.ones(2, side, side, 1)
    alpha[:, 0] = 0
    count = 2 * side * side
    scene = Gaussians(
        (origins + 3.4 * directions).reshape(-1, 3),
        torch.tensor([1.0, 0, 0, 0]).expand(count, 4),
        torch.full((count, 3), 0.1),
        alpha.reshape(-1),
        rgb.reshape(-1, 3),
    )
    assert pixel_loss(scene, cameras, rgb, depth, alpha) == pytest.approx(0, abs=1e-5)
    shifted = replace(scene, colors=scene.colors + 0.2, opacities=torch.ones(count))
    expected = 0.04 + 0.25  # colour on the object, opacity 1 on the quarter that is empty
    assert pixel_loss(shifted, cameras, rgb, depth - 0.5, alpha) == pytest.approx(
        expected + 0.5, abs=1e-4
    )
    with pytest.raises(ValueError, match="32 Gaussians do not sit on 2 x 3 x 4 pixels"):
        pixel_loss(scene, cameras, rgb[:, :3], depth, alpha)


def test_a_rolled_orbit_keeps_each_frame_with_its_angles():
    orbit = {
        "latents": torch.arange(4.0),
        "azimuth": 90 * torch.arange(1.0, 5) % 360,
        "elevation": torch.arange(4.0),
    }
    moved = rolled(orbit | {"image": torch.ones(3)}, 1)
    assert moved["azimuth"].tolist() == [0, 90, 180, 270] and moved["latents"].tolist() == [
        3,
        0,
        1,
        2,
    ]
    assert moved["elevation"].tolist() == [3, 0, 1, 2] and moved["image"].tolist() == [1, 1, 1]


def test_one_number_of_a_schedule_can_be_set():
    config = preset("tiny", **{"stage1.lr": 1e-4, "stage1.batch": 8, "lambda_3d": 2})
    assert (
        config.stage1 == replace(preset("tiny").stage1, lr=1e-4, batch=8) and config.lambda_3d == 2
    )
    with pytest.raises(ValueError, match="Schedule has no field 'rate'"):
        preset("tiny", **{"stage1.rate": 1e-4})
    with pytest.raises(ValueError, match="no schedule"):
        preset("tiny", **{"seed.lr": 1e-4})
    with pytest.raises(ValueError, match="Schedule.batch is a int"):
        preset("tiny", **{"stage1.batch": 0.5})
