"""Training data on disk: the same numbers as in memory, written once, read in part, and
damage is named.
"""

import copy
import io
import json
import math
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
from command_world import call
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_world import object_views, one_sentence, tiny_config

from gsv3d_lib import stages as table
from gsv3d_lib import train as command_line
from gsv3d_lib.cluster import launch, shards
from gsv3d_lib.config import Schedule
from gsv3d_lib.data.dataset import list_objects, load_views, write_index, write_object
from gsv3d_lib.data.examples import (
    Orbits,
    ShuffledOrder,
    latent_fingerprint,
    load_orbits,
    make_variants,
)
from gsv3d_lib.decoder import build_decoder
from gsv3d_lib.distillation import DistillationStage
from gsv3d_lib.encoders import build_clip, build_dino, image_features
from gsv3d_lib.lora import add_lora
from gsv3d_lib.pretraining import DiffusionStage, DINOStage, VAEStage
from gsv3d_lib.stage1 import DecoderStage
from gsv3d_lib.training import draw_batch, train
from gsv3d_lib.unet import build_unet
from gsv3d_lib.vae import build_vae, calibrate
from gsv3d_lib.weights import checkpoint

CONFIG = tiny_config(lambda_alpha=0.5, lambda_pixel=0.5)
OBJECTS, COPIES = 5, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of five objects, its models, and what `load_orbits` makes of them in
    memory.
    """
    folder = tmp_path_factory.mktemp("dataset")
    for k in range(OBJECTS):
        write_object(folder, object_views(f"balls_{k}", 40.0 * k))
    write_index(folder, [{"id": f"balls_{k}"} for k in range(OBJECTS)])
    torch.manual_seed(0)
    vae, dino = build_vae(CONFIG).eval(), build_dino(CONFIG).eval()
    views = load_views([folder], CONFIG.image_size, progress=False)
    return SimpleNamespace(
        folder=folder,
        vae=vae,
        dino=dino,
        views=views,
        orbits=load_orbits(views, vae, COPIES, seed=3, progress=False),
    )


def write(data, out, **options):
    options = dict(copies=COPIES, seed=3, shard_size=2, progress=False) | options
    return shards.write_shards([data.folder], data.vae, out, CONFIG.image_size, **options)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Shards of all five objects, with features."""
    out = tmp_path_factory.mktemp("shards")
    assert write(data, out, dino=data.dino) is not None
    return out


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the shards, to break."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def in_memory(data, order: ShuffledOrder) -> Orbits:
    """The orbits in memory, seen in the order of those on disk."""
    orbits = copy.copy(data.orbits)
    orbits.order = order
    return orbits


def stage_on(kind, orbits: Orbits, data):
    torch.manual_seed(1)
    if kind is VAEStage or kind is DINOStage:
        return kind(data.vae if kind is VAEStage else data.dino, orbits.views, CONFIG)
    if kind is DiffusionStage:
        return kind(build_unet(CONFIG), build_clip(CONFIG), orbits, CONFIG)
    decoder = build_decoder(CONFIG)
    if kind is DecoderStage:
        return kind(decoder, data.dino, orbits, CONFIG)
    return kind(
        add_lora(build_unet(CONFIG), 2), build_clip(CONFIG), decoder, data.dino, orbits, CONFIG
    )


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "kind", [VAEStage, DINOStage, DiffusionStage, DecoderStage, DistillationStage]
)
def test_a_batch_from_shards_is_the_batch_from_memory(kind, data, folder):
    orbits = shards.open_shards(folder).orbits(data.vae)
    memory, disk = (stage_on(kind, one, data) for one in (in_memory(data, orbits.order), orbits))
    for step in range(3):
        expected, batch = draw_batch(memory, 0, step, 4), draw_batch(disk, 0, step, 4)
        assert list(batch) == list(expected)
        for name in expected:
            assert torch.equal(batch[name], expected[name]), name


def test_every_scene_and_latent_is_the_one_in_memory(data, folder):
    orbits = shards.open_shards(folder).orbits(data.vae)
    assert len(orbits) == OBJECTS * COPIES and orbits.views.ids == data.views.ids
    assert orbits.variants == data.orbits.variants and any(v.mirror for v in orbits.variants)
    for item in range(len(orbits)):
        expected, scene = data.orbits.scene(item), orbits.scene(item)
        for name in ("rgb", "alpha", "depth"):
            assert torch.equal(getattr(scene, name)[:], getattr(expected, name)), name
        assert torch.equal(scene.cameras.viewmats, expected.cameras.viewmats)
        assert torch.equal(orbits.latents[item][:], data.orbits.latents[item])
    mask = torch.arange(24) % 5 == 0
    assert torch.equal(orbits.views.rgb[::2, 3:5], data.views.rgb[::2, 3:5])
    assert torch.equal(orbits.views.depth[1][mask], data.views.depth[1][mask])
    assert torch.equal(orbits.views.alpha[2, -1], data.views.alpha[2, -1])
    assert torch.equal(orbits.views.subset([4, 0]).rgb, data.views.rgb[[4, 0]])


@pytest.mark.parametrize("kind", [DecoderStage, DistillationStage])
def test_stored_features_stand_for_running_dino(kind, data, folder, monkeypatch):
    views, losses = shards.open_shards(folder, CONFIG.image_size), []
    for dino in (None, data.dino):  # without and with those that were stored
        stage = stage_on(kind, views.orbits(data.vae, dino), data)
        batch = draw_batch(stage, 0, 1, 3)
        assert ("features" in batch) == (dino is not None)
        if dino is not None:
            assert torch.allclose(
                batch["features"], image_features(dino, batch["image"]), atol=1e-5
            )
            monkeypatch.setattr(stage.dino, "forward", None)  # would fail if it were run
        losses.append(stage(batch)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.manual_seed(9)
    with pytest.raises(ValueError, match="another DINO's"):
        views.orbits(data.vae, build_dino(CONFIG))


def test_training_from_shards_is_training_from_memory(data, folder, tmp_path):
    schedule = Schedule(steps=2, batch=2, lr=1e-3, warmup=0)
    curves = []
    disk = shards.open_shards(folder).orbits()
    for name, orbits in (("memory", in_memory(data, disk.order)), ("disk", disk)):
        stage = stage_on(DecoderStage, orbits, data)
        rows = train(stage, schedule, tmp_path / name, log_every=1, progress=False)
        curves.append([row["loss"] for row in rows])
    assert curves[0] == curves[1] and len(curves[0]) == 2


@pytest.mark.parametrize("values", [3, 65_535])
def test_depth_is_stored_without_loss(values):
    generator = torch.Generator().manual_seed(0)
    depth = torch.randint(values, (300, 300), generator=generator) / 7
    blob = shards.pack_depth(depth)
    assert torch.equal(
        shards.unpack_depth(torch.tensor(list(blob), dtype=torch.uint8))[..., 0], depth
    )
    assert values > 3 or len(blob) < 0.2 * depth.nbytes


def test_only_what_is_asked_for_is_read(folder, monkeypatch):
    decoded = []
    unpack = shards.unpack_picture
    monkeypatch.setattr(shards, "unpack_picture", lambda blob: decoded.append(1) or unpack(blob))
    orbits = shards.open_shards(folder).orbits()
    orbits.orbit(3, 5, 4)
    assert len(decoded) == 1  # the condition image, of 24
    orbits.targets(3, 5, torch.tensor([5, 17, 20]))
    assert len(decoded) == 3  # view 5 was there


# ---------------------------------------------------------------- writing


def test_a_stopped_writing_goes_on_and_finished_shards_stay(data, tmp_path, monkeypatch):
    encoded, encode = [], shards.encode_object
    fail_at = 3

    def counting(folder, id, *rest):
        if len(encoded) == fail_at:
            raise KeyboardInterrupt
        encoded.append(id)
        return encode(folder, id, *rest)

    monkeypatch.setattr(shards, "encode_object", counting)
    with pytest.raises(KeyboardInterrupt):
        write(data, tmp_path)
    with pytest.raises(
        FileNotFoundError, match="no finished shards.*run `python -m gsv3d_lib shards` again"
    ):
        shards.open_shards(tmp_path)
    fail_at = None
    index = write(data, tmp_path)
    assert encoded == ["balls_0", "balls_1", "balls_2", "balls_2", "balls_3", "balls_4"]
    assert index["objects"] == OBJECTS and [len(shard["ids"]) for shard in index["shards"]] == [
        2,
        2,
        1,
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"0000{k}.safetensors" for k in range(3)),
        "index.json",
    ]
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.safetensors"))]
    (tmp_path / "00001.safetensors").write_bytes(b"cut off")
    write(data, tmp_path)
    again = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.safetensors"))]
    assert again[0] == stamps[0] and again[2] == stamps[2] and again[1] != stamps[1]
    assert shards.check_shards(tmp_path) == []


def test_another_encoder_writes_anew_and_is_told_apart(data, broken):
    torch.manual_seed(5)
    other = build_vae(CONFIG).eval()
    with pytest.raises(ValueError, match="made by another VAE"):
        shards.open_shards(broken).orbits(other)
    shards.write_shards([data.folder], other, broken, CONFIG.image_size, progress=False)
    orbits = shards.open_shards(broken).orbits(other, data.dino)
    assert len(orbits) == OBJECTS and orbits.features is None
    with pytest.raises(ValueError, match="of 32 px, not of 64 px"):
        shards.open_shards(broken, 64)


def test_latents_are_known_by_all_that_makes_them(data):
    """What `calibrate` rescales lies behind the encoder, and mirrored or recoloured
    variants depend on a seed.
    """

    def mark(vae, seed=3) -> bytes:
        return bytes(
            latent_fingerprint(data.views, make_variants(OBJECTS, COPIES, seed), vae).tolist()
        )

    calibrated = copy.deepcopy(data.vae)
    calibrate(calibrated, data.views.rgb[:, 0].float() / 255)
    marks = [mark(data.vae), mark(calibrated), mark(data.vae, 4)]
    assert len(set(marks)) == 3 and mark(copy.deepcopy(data.vae)) == marks[0]
    assert shards.vae_fingerprint(calibrated) != shards.vae_fingerprint(data.vae)


def test_two_processes_share_the_writing(data, tmp_path, folder):
    assert write(data, tmp_path, dino=data.dino, share=(1, 2)) is None
    assert [p.name for p in tmp_path.iterdir()] == ["00001.safetensors"]
    assert write(data, tmp_path, dino=data.dino, share=(0, 2))["objects"] == OBJECTS
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="0 <= K < N"):
        write(data, tmp_path, share=(2, 2))


def test_objects_with_other_numbers_of_views_are_refused(data, tmp_path):
    few = object_views("few")
    few.rgba, few.depth, few.cameras = few.rgba[:20], few.depth[:20], few.cameras[:20]
    few.azimuths, few.elevations = few.azimuths[:20], few.elevations[:20]
    write_object(tmp_path / "few", few)
    write_index(tmp_path / "few", [{"id": "few"}])
    for size in (1, 64):  # in shards of their own, and in one
        with pytest.raises(ValueError, match="equally many views.*24.*20"):
            shards.write_shards(
                [tmp_path / "few", data.folder],
                data.vae,
                tmp_path / f"{size}",
                32,
                shard_size=size,
                progress=False,
            )


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "keep", [None, 0, 100, 0.6], ids=["missing", "empty", "header", "truncated"]
)
def test_a_shard_that_is_not_whole_is_named_on_opening(broken, keep):
    path = broken / "00001.safetensors"
    data = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(
        ValueError, match="00001.safetensors (is missing|has [0-9]+ bytes instead of)"
    ) as error:
        shards.open_shards(broken)
    one_sentence(error)


@pytest.mark.parametrize("name", ["rgba.0", "depth.0", "latents"])
def test_bytes_that_changed_are_found(broken, name):
    path = broken / "00001.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little")
    places = json.loads(path.read_bytes()[8 : 8 + header])
    first, end = places[f"0.{name}"]["data_offsets"]
    data = bytearray(path.read_bytes())
    data[8 + header + first : 8 + header + min(end, first + 40)] = b"\xff" * min(end - first, 40)
    path.write_bytes(data)
    (problem,) = shards.check_shards(broken)
    assert "00001.safetensors is damaged (its bytes are not those that were written)" in problem
    orbits = shards.open_shards(broken).orbits()  # of the same length
    if name != "latents":  # which have no redundancy of their own
        with pytest.raises(
            ValueError, match="Shard .*00001.safetensors is damaged.*delete it and run"
        ) as error:
            orbits.scene(2).rgb[0], orbits.scene(2).depth[0]
        one_sentence(error)


def test_a_shard_with_a_broken_header_is_named_on_reading(broken):
    path = broken / "00000.safetensors"
    path.write_bytes(b"\x01" * path.stat().st_size)
    with pytest.raises(ValueError, match="00000.safetensors is damaged") as error:
        shards.open_shards(broken).orbits().orbit(0, 0, 4)
    one_sentence(error)


def test_a_broken_index_is_one_sentence(broken):
    (broken / "index.json").write_text('{"format": 1, "shards": [{}]}')
    with pytest.raises(ValueError, match="index.json cannot be read as shards") as error:
        shards.open_shards(broken)
    one_sentence(error)
    (broken / "index.json").write_text('{"format": 9, "shards": []}')
    with pytest.raises(ValueError, match="format is not 2"):
        shards.open_shards(broken)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"views": 8}, "its number of views 8"),
        ({"size": "32"}, "its numbers are no whole numbers"),
        ({"copies": 0}, "its numbers are no whole numbers"),
        ({"latent_scale": float("nan")}, "its latent_scale is nan"),
        ({"latents": 5}, "cannot be read as shards"),
        ({"objects": 6}, "it names 5 objects of 6"),
        ({"file": "../00000.safetensors"}, "its file 0 is called '../00000.safetensors'"),
        ({"file": 5}, "its file 0 is called '5'"),
        ({"ids": ["balls_0", "balls_0"]}, "the id 'balls_0' is there twice"),
        ({"ids": ["balls_0", "../x"]}, "'../x' is no id"),
        ({"ids": 5}, "cannot be read as shards"),
    ],
)
def test_an_index_with_wrong_numbers_is_one_sentence(broken, change, sentence):
    index = json.loads((broken / "index.json").read_text())
    (index["shards"][0] if set(change) & {"file", "ids"} else index).update(change)
    (broken / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=f"index.json cannot be read as shards.*{sentence}|{sentence}"
    ) as error:
        shards.open_shards(broken)
    one_sentence(error)


def as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def png(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (size, size), (1, 2, 3, 4)).save(buffer, "PNG")
    return buffer.getvalue()


SMALL = torch.zeros(8, 8, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rgba.0", as_bytes(png(32))),
        ("rgba.0", as_bytes(shards.pack_picture(SMALL[..., :3], SMALL[..., 3:]))),
        ("depth.0", as_bytes(shards.pack_depth(torch.zeros(8, 8)))),
        ("depth.0", as_bytes(shards.pack_depth(torch.full((32, 32), math.nan)))),
        ("depth.0", as_bytes(zlib.compress(bytes(100_000_000)))),
        ("azimuths", torch.full((24,), math.nan)),
        ("azimuths", torch.zeros(5)),
        ("latents", torch.full((COPIES, 16, 4, 4, 4), math.nan)),
        ("latents", torch.zeros(COPIES, 16, 4, 2, 2)),
    ],
)
def test_a_shard_with_wrong_numbers_is_damaged(broken, name, value):
    path = broken / "00000.safetensors"
    save_file(load_file(path) | {f"0.{name}": value}, path)
    index = json.loads((broken / "index.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    (broken / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="Shard .*00000.safetensors is damaged.*delete it and run"
    ) as error:
        orbits = shards.open_shards(broken).orbits()
        orbits.scene(0).rgb[0], orbits.scene(0).depth[0], orbits.orbit(0, 0, 4)
    one_sentence(error)


# ---------------------------------------------------------------- order


GROUPS = [list(range(k, k + 10)) for k in range(0, 100, 10)]


def test_an_epoch_is_every_item_once_and_touches_few_shards_at_a_time():
    order = ShuffledOrder(GROUPS, seed=4, window=2)
    first, second = ([order.item(p) for p in range(e * 100, e * 100 + 100)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    for start in range(0, 100, 20):
        assert len({item // 10 for item in first[start : start + 20]}) == 2
    assert ShuffledOrder(GROUPS, seed=4, window=2).item(137) == second[37]  # asked for out of order
    assert ShuffledOrder(GROUPS, seed=5, window=2).epoch(0) != first


def test_processes_share_each_batch_and_an_epoch_sees_every_item_once(data, folder, monkeypatch):
    orbits = shards.open_shards(folder).orbits(seed=2)
    stage, seen, read = stage_on(DecoderStage, orbits, data), [], orbits.orbit
    monkeypatch.setattr(orbits, "orbit", lambda item, *rest: seen.append(item) or read(item, *rest))

    def items(step: int, rank: int = 0, world: int = 1) -> list[int]:
        seen.clear()
        draw_batch(stage, 6, step, 2, rank, world)
        return list(seen)

    alone = [items(step) for step in range(5)]
    assert sorted(sum(alone, [])) == list(range(10))
    assert [items(step, 0, 2) + items(step, 1, 2) for step in range(5)] == alone


def test_training_from_shards_resumes_exactly(data, folder, tmp_path):
    schedule = Schedule(steps=4, batch=2, lr=1e-3, warmup=0)

    def run(name, stop_at=None):
        stage = stage_on(DecoderStage, shards.open_shards(folder).orbits(dino=data.dino), data)
        rows = train(
            stage, schedule, tmp_path / name, seed=6, log_every=1, progress=False, stop_at=stop_at
        )
        return [row["loss"] for row in rows]

    whole = run("whole")
    run("parts", stop_at=2)
    assert run("parts") == whole


# ---------------------------------------------------------------- command line


def test_the_command_writes_checks_and_explains(data, tmp_path, capsys):
    weights = tmp_path / "weights"
    data.vae.save_pretrained(weights / "vae")
    data.dino.save_pretrained(weights / "dino")
    checkpoint.save_config(CONFIG, weights)
    out = str(tmp_path / "out")
    words = ["--weights", str(weights), "--data", str(data.folder), "--out", out, "--features"]
    call("shards", words)
    assert "5 objects, 1 shards" in capsys.readouterr().out
    assert shards.open_shards(out).orbits(data.vae, data.dino).orbit(0, 0, 4)["features"].ndim == 2
    assert call("shards", ["--out", out, "--check"]) == 0
    assert "is as it was written" in capsys.readouterr().out
    for wrong, sentence in (
        (["--share", "1-2"], "--share takes K/N"),
        (["--share", "2/2"], "0 <= K < N"),
        (["--data", str(tmp_path / "none")], "No dataset at"),
        (["--weights", str(tmp_path / "none")], "is no GSV3D checkpoint"),
        (["--copies", "-1"], "must be 1 or more"),
        (["--out", str(weights / "gsv3d.json")], "gsv3d.json is no folder"),
        (["--out", str(data.folder)], "shards need a folder of their own"),
        (["--data", out], "holds shards, which `train --shards` reads"),
        (["--out", str(data.folder), "--check"], "is a dataset folder, which `train --data` reads"),
    ):
        with pytest.raises(SystemExit, match="2"):  # one is argparse's own, which ends by itself
            sys.exit(
                call(
                    "shards",
                    ["--weights", str(weights), "--data", str(data.folder), "--out", out, *wrong],
                )
            )
        assert sentence in capsys.readouterr().err
    assert len(list_objects(data.folder)) == 5


def test_train_reads_shards(data, folder, tmp_path, monkeypatch):
    """All stages from the command line; encoders that would not fit what is stored are
    refused before anything starts.
    """
    monkeypatch.setattr(command_line, "preset", lambda *_, **__: CONFIG)
    out = tmp_path / "run"

    def command(*stages: str, more=()) -> None:
        arguments = [
            "--shards",
            str(folder),
            "--out",
            str(out),
            "--steps",
            "1",
            *more,
            "--stages",
            *stages,
        ]
        command_line.run(command_line.build_parser().parse_args(arguments))

    with pytest.raises(ValueError, match="an earlier vae made.*train vae and dino first"):
        command(*table.STAGES)
    with pytest.raises(ValueError, match="--limit counts the objects of --data"):
        command("vae", more=["--limit", "1"])
    command("vae", "dino")  # from the pictures
    with pytest.raises(ValueError, match="made by another VAE"):
        command("diffusion")
    checkpoint.save_model(data.vae, out / "weights", "vae", CONFIG)
    checkpoint.save_model(data.dino, out / "weights", "dino", CONFIG)
    command(*table.STAGES)
    assert all(table.is_trained(stage, out / "weights") for stage in table.STAGES)
    assert not list(out.glob("*.safetensors"))  # nothing was read into memory and kept


def test_a_notebook_trains_from_shards_by_naming_their_folder(folder, data, tmp_path):
    assert "--shards" in launch.train_command("tiny", ["vae"], [str(folder)])
    assert "--data" in launch.train_command("tiny", ["vae"], [str(data.folder)])
    with pytest.raises(ValueError, match="one folder of those and nothing else"):
        launch.check("tiny", ["vae"], [str(data.folder), str(folder)], 1, tmp_path)
