"""Photographs with known cameras -> an object of a dataset.

Warps are exact, axes come back, wrong inputs are named.
"""

import json
import math
from pathlib import Path

import numpy as np
import photos
import pytest
import torch
from PIL import Image
from tiny_world import BALLS, SIZE, ball_pictures, ball_views, moved, one_sentence, tiny_config

from gsv3d_lib import stages
from gsv3d_lib.cameras import Cameras, intrinsics, look_at, opencv_to_opengl, orbit_cameras
from gsv3d_lib.config import Schedule
from gsv3d_lib.data.dataset import ViewTensors, load_views, read_object, resize_views

# of the world that the photographs' cameras are given in
SHIFT, SCALE = torch.tensor([3.0, -2.0, 1.0]), 2.7
WIDTH, HEIGHT = 120, 96
K = torch.tensor([[110.0, 0, 63.0], [0, 112.0, 46.0], [0, 0, 1]])
Z_UP = torch.eye(3, dtype=torch.float64)
TRUE_WORLD = photos.World(SHIFT.double(), SCALE, Z_UP)


def handheld(count: int, distance=(3.4, 3.6), seed: int = 0) -> Cameras:
    """Cameras around SHIFT that stand, look and roll a little at random."""
    rng = np.random.default_rng(seed)
    azimuths = torch.from_numpy(np.arange(count) * 360 / count + rng.uniform(-4, 4, count))
    elevations = torch.from_numpy(rng.uniform(5, 25, count))
    distances = torch.from_numpy(rng.uniform(*distance, count))
    positions = (
        orbit_cameras(azimuths, elevations, 8, distance=1.0).positions().double()
        * distances[:, None]
    )
    level = look_at(positions + torch.from_numpy(rng.normal(0, 0.05, (count, 3))))[:, :3, :3]
    roll = torch.from_numpy(rng.uniform(-0.1, 0.1, count))
    turn = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    turn[:, 0, 0], turn[:, 0, 1], turn[:, 1, 0], turn[:, 1, 1] = (
        roll.cos(),
        -roll.sin(),
        roll.sin(),
        roll.cos(),
    )
    viewmats = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    viewmats[:, :3, :3] = turn @ level
    viewmats[:, :3, 3:] = -turn @ level @ (SCALE * positions + SHIFT)[..., None]
    return Cameras(viewmats.float(), K.repeat(count, 1, 1), WIDTH, HEIGHT)


def photographed(folder: Path, cameras: Cameras) -> Path:
    """The balls as a folder of PNGs with transforms.json.

    They are moved and enlarged into the world of the cameras.
    """
    balls = moved(
        BALLS,
        lambda *centre: tuple(SCALE * c + s for c, s in zip(centre, SHIFT.tolist(), strict=True)),
    )
    balls = tuple((centre, SCALE * radius, color) for centre, radius, color in balls)
    rgb, alpha, _ = ball_pictures(cameras.resized(4 * WIDTH, 4 * HEIGHT), balls)
    fine = (
        torch.cat([rgb * alpha, alpha], -1)
        .unflatten(1, (HEIGHT, 4))
        .unflatten(3, (WIDTH, 4))
        .mean((2, 4))
    )
    fine[..., :3] /= fine[..., 3:].clamp(min=1e-6)
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for k, (picture, c2w) in enumerate(zip(fine, opencv_to_opengl(cameras.c2w()), strict=True)):
        Image.fromarray((picture * 255).round().byte().numpy()).save(folder / f"{k:03}.png")
        frames.append({"file_path": f"./{k:03}", "transform_matrix": c2w.tolist()})
    lens = dict(fl_x=110.0, fl_y=112.0, cx=63.0, cy=46.0, w=WIDTH, h=HEIGHT, k1=0.0)
    (folder / "transforms.json").write_text(json.dumps(lens | {"frames": frames}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twenty photographs."""
    return photographed(tmp_path_factory.mktemp("things") / "balls", handheld(20))


@pytest.fixture(scope="module")
def read(folder) -> list[photos.Photo]:
    pictures, left_out = photos.read_photos(folder)
    assert len(pictures) == 20 and left_out == []
    return pictures


# ---------------------------------------------------------------- reading


def test_poses_and_lenses_come_back(read):
    cameras = handheld(20)
    assert torch.allclose(torch.stack([p.c2w for p in read]).float(), cameras.c2w(), atol=1e-5)
    for photo in read:  # the crop moves the principal point and nothing else
        assert torch.allclose(photo.K[[0, 1], [0, 1]].float(), K[[0, 1], [0, 1]])
        left, top = (K[:2, 2] - photo.K[:2, 2]).tolist()
        assert left == round(left) and top == round(top) and photo.rgba.shape[0] < HEIGHT


@pytest.mark.parametrize(
    ("lens", "focal"),
    [
        ({"camera_angle_x": math.radians(60)}, 50 / math.tan(math.radians(30))),
        ({"fl_x": 80.0}, 80.0),
        # given for pictures of twice the size
        ({"fl_x": 160.0, "cx": 100.0, "w": 200, "h": 160}, 80.0),
    ],
)
def test_both_ways_to_state_a_lens(lens, focal):
    K = photos.frame_intrinsics({"file_path": "a.png"} | lens, 100, 80)
    expected = torch.tensor([[focal, 0, 50], [0, focal, 40], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(K, expected)


def test_a_mask_beside_the_photograph_is_used(folder, tmp_path, read):
    scene = json.loads((folder / "transforms.json").read_text())
    rgba = np.asarray(Image.open(folder / "003.png"))
    Image.fromarray(rgba[..., :3]).save(tmp_path / "3.png")
    Image.fromarray(rgba[..., 3]).save(tmp_path / "mask.png")
    scene["frames"] = [scene["frames"][3] | {"file_path": "3.png", "mask_path": "mask.png"}]
    (tmp_path / "transforms.json").write_text(json.dumps(scene))
    (photo,), _ = photos.read_photos(tmp_path)
    assert np.array_equal(photo.rgba, read[3].rgba)


def test_a_mask_path_of_null_is_none(folder, read):
    scene = json.loads((folder / "transforms.json").read_text())
    scene["frames"] = [scene["frames"][3] | {"mask_path": None}]
    (folder / "changed.json").write_text(json.dumps(scene))
    (photo,), _ = photos.read_photos(folder / "changed.json")
    assert np.array_equal(photo.rgba, read[3].rgba)


def test_a_focal_length_in_pixels_of_a_picture_that_was_shrunk_needs_their_number():
    with pytest.raises(ValueError, match="with w and h for which size") as error:
        photos.frame_intrinsics({"file_path": "a.png", "fl_x": 3000.0}, 2048, 1536)
    one_sentence(error)
    K = photos.frame_intrinsics(
        {"file_path": "a.png", "fl_x": 3000.0, "w": 4096, "h": 3072}, 2048, 1536
    )
    assert K[0, 0] == 1500
    assert (
        photos.frame_intrinsics({"file_path": "a.png", "camera_angle_x": 1.0}, 2048, 1536)[0, 2]
        == 1024
    )


def test_photographs_that_cut_the_object_or_show_none_are_left_out(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGBA", (WIDTH, HEIGHT)).save(tmp_path / "002.png")
    cut = np.array(Image.open(tmp_path / "005.png"))
    cut[:, : WIDTH // 2] = (9, 9, 9, 255)
    Image.fromarray(cut).save(tmp_path / "005.png")
    pictures, left_out = photos.read_photos(tmp_path)
    assert (
        len(pictures) == 18
        and "002: No object found" in left_out[0]
        and "cuts the object off" in left_out[1]
    )


# ---------------------------------------------------------------- geometry


def test_a_warp_is_what_the_turned_and_zoomed_camera_sees(read):
    """Exactly, up to the blur of sampling a photograph.

    From the true place, with the true centre and radius.
    """
    size = 64
    for photo in read[:3]:
        (place,) = TRUE_WORLD.positions([photo])
        lens = photos.standard_intrinsics(float(place.norm()), size)
        viewmat = look_at(place[None])
        direct = Cameras(viewmat.float(), lens[None].float(), size, size)
        rgb, alpha, _ = ball_pictures(direct)
        warped = torch.from_numpy(photos.warp(photo, viewmat[0, :3, :3], lens, size)).float() / 255
        inside = (alpha[0, ..., 0] > 0) & (warped[..., 3] > 0.99)
        assert (warped[..., 3] - alpha[0, ..., 0]).abs().mean() < 0.02
        assert (warped[..., :3] - rgb[0])[inside].abs().mean() < 0.03


def test_a_warp_into_itself_is_the_photograph(read):
    photo = read[0]
    square = np.zeros((80, 80, 4), np.uint8)
    height, width = photo.rgba.shape[:2]
    square[5 : 5 + height, 9 : 9 + width] = photo.rgba
    K = photo.K.clone()
    K[:2, 2] += torch.tensor([9.0, 5.0])
    same = photos.warp(photo, photo.c2w[:3, :3].T, K, 80, samples=1)
    visible = square[..., 3] > 0
    assert np.abs(same.astype(int) - square)[visible].max() <= 1 and not same[~visible][:, 3].any()


def test_the_ball_looks_equally_large_from_everywhere():
    assert photos.displacement(3.509) == 0 and torch.allclose(
        photos.standard_intrinsics(3.509, 64).float(), intrinsics(64)
    )
    outline = [
        photos.standard_intrinsics(d, 64)[0, 0] / math.sqrt(d * d - 1) for d in (2.0, 3.509, 9.0)
    ]
    assert max(outline) - min(outline) < 1e-9
    errors = [photos.displacement(d) for d in (3.4, 3.0, 2.5, 2.0)]
    assert errors == sorted(errors) and errors[0] < 0.005 and errors[-1] > 0.03


def test_centre_and_radius_from_silhouettes(read):
    world = photos.find_world(read, Z_UP)
    low = [min(c[a] - r for c, r, _ in BALLS) for a in range(3)]
    high = [max(c[a] + r for c, r, _ in BALLS) for a in range(3)]
    middle = (torch.tensor(low) + torch.tensor(high)) / 2
    radius = max(float((torch.tensor(c) - middle).norm()) + r for c, r, _ in BALLS)
    assert ((world.center - SHIFT) / SCALE - middle).norm() < 0.08
    assert abs(world.radius / SCALE - radius) < 0.08


def test_lines_meet_and_level_cameras_know_up():
    origins = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    directions = torch.nn.functional.normalize(target - origins, dim=-1)
    assert torch.allclose(photos.nearest_point(origins, directions), target)
    turn = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ).Q
    turn = turn * torch.linalg.det(turn)
    level = orbit_cameras([0.0, 50.0, 130.0], [10.0, 30.0, -5.0], 8).c2w().double()
    level[:, :3, :3] = turn @ level[:, :3, :3]
    made = [photos.Photo("", np.zeros((1, 1, 4), np.uint8), K, c2w) for c2w in level]
    assert torch.allclose(
        photos.upright(made) @ turn[:, 2], torch.tensor([0.0, 0, 1]).double(), atol=1e-6
    )


def test_the_ring_takes_what_lies_nearest_and_the_rest_is_free():
    azimuths = np.concatenate([np.arange(16) * 22.5 + 3, np.arange(30) * 12.0])
    elevations = np.concatenate([np.full(16, 12.0), np.full(15, 12.5), np.full(15, 80.0)])
    chosen = photos.ring_and_free(azimuths, elevations, 24)
    gaps = np.abs((azimuths[chosen[:16]] - np.arange(16) * 22.5 + 180) % 360 - 180)
    assert len(set(chosen)) == 24 and gaps.max() <= 6 and elevations[chosen[:16]].max() < 20
    few = photos.ring_and_free(azimuths[:18], elevations[:18], 24)
    # all are used before any is repeated
    assert len(set(few[:16])) == 16 and set(few) == set(range(18))
    assert np.bincount(few).max() == 2
    # though it was taken from high above
    assert photos.ring_and_free(azimuths, elevations, 24, front=38)[12] == 38


# ---------------------------------------------------------------- an object


def test_the_object_is_that_which_the_standard_cameras_see(folder, tmp_path):
    """The whole path against rendering directly.

    Distances are within 3 % of the standard one, so perspective hardly differs.
    """
    out = tmp_path / "mine"
    given = ["--center", *map(str, SHIFT.tolist()), "--radius", str(SCALE)]
    assert photos.main([str(folder), "--out", str(out), "--size", "64", *given]) == 0
    views = read_object(out, "balls")
    positions = (handheld(20).positions() - SHIFT) / SCALE
    angles = torch.rad2deg(torch.atan2(positions[:, 1], positions[:, 0])) % 360
    off = (torch.from_numpy(views.azimuths)[:, None] - angles + 180).remainder(360) - 180
    assert off.abs().amin(1).max() < 1e-3  # the true azimuths, not those of a regular ring
    rgb, alpha, _ = ball_pictures(
        orbit_cameras(torch.from_numpy(views.azimuths), torch.from_numpy(views.elevations), 64)
    )
    made = torch.from_numpy(views.rgba).float() / 255
    assert (made[..., 3:] - alpha).abs().mean() < 0.02
    assert ((made[..., :3] - rgb).abs() * (alpha * made[..., 3:] > 0.99)).mean() < 0.02
    assert not views.depth.any()


def test_a_mirrored_irregular_ring_is_the_mirrored_object(read):
    pictures, _ = photos.object_from(read, "balls", size=SIZE, world=TRUE_WORLD)
    columns = (t[None] for t in resize_views(pictures, SIZE))
    mirrored = ViewTensors(["balls"], *columns).scene(0, mirror=True)
    rgb, _, _ = ball_pictures(mirrored.cameras, moved(BALLS, lambda x, y, z: (x, -y, z)))
    gaps = (mirrored.azimuths[:16] - torch.arange(16) * 22.5 + 180) % 360 - 180
    assert gaps.abs().max() < 15 and (mirrored.rgb - rgb).abs().mean() < 0.04


def test_objects_share_a_dataset_and_the_front_can_be_named(folder, tmp_path):
    for id in ("one", "a two"):
        assert (
            photos.main(
                [
                    str(folder),
                    "--out",
                    str(tmp_path),
                    "--id",
                    id,
                    "--size",
                    "32",
                    "--front",
                    "007.png",
                ]
            )
            == 0
        )
    views = load_views([tmp_path], SIZE, progress=False)
    assert views.ids == ["a_two", "one"] and views.azimuths[0, 12] == 270
    assert photos.main([str(folder), "--out", str(tmp_path), "--id", "three", "--size", "64"]) == 2


def test_training_on_photographs(folder, tmp_path):
    """End to end: photographs -> dataset -> stage 2.

    The loss is finite and the LoRA has moved, though no depth is known.
    """
    assert photos.main([str(folder), "--out", str(tmp_path / "mine"), "--size", str(SIZE)]) == 0
    views = load_views([tmp_path / "mine"], SIZE, progress=False)
    once = Schedule(steps=1, batch=1, lr=1e-3, warmup=0)
    config = tiny_config(
        **{
            name: once for name in ("vae_schedule", "dino_schedule", "diffusion_schedule", "stage1")
        },
        stage2=Schedule(steps=3, batch=1, lr=1e-2, warmup=0),
        copies=2,
    )
    for stage in stages.STAGES:
        history = stages.run_stage(
            stage, config, views, tmp_path / "run", progress=False, log_every=1
        )
        assert all(math.isfinite(value) for row in history for value in row.values())
    from safetensors.torch import load_file

    (file,) = (tmp_path / "run/weights/lora").glob("*.safetensors")
    assert max(float(t.abs().max()) for name, t in load_file(file).items() if "lora_B" in name) > 0


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0.02}, "distortion.*undistort"),
        ({"camera_model": "OPENCV_FISHEYE"}, "distortion"),
        ({"fl_x": None}, "has no lens"),
        ({"fl_x": -3.0}, "impossible lens"),
        ({"w": 300}, "120 x 96 pixels"),
        ({"frames": 3}, "no transforms.json"),
        ({"frames": [{"file_path": "./000"}]}, "no transform_matrix"),
        (
            {"frames": [{"file_path": "./000", "transform_matrix": (2 * np.eye(4)).tolist()}]},
            "no camera pose",
        ),
        (
            {"frames": [{"file_path": "./gone", "transform_matrix": np.eye(4).tolist()}]},
            "no image file",
        ),
        (
            {
                "frames": [
                    {
                        "file_path": "./000",
                        "transform_matrix": [[*row[:3], math.nan] for row in np.eye(4)],
                    }
                ]
            },
            "no camera pose",
        ),
        ({"frames": [{}]}, "file_path"),
        ({"w": math.nan, "h": math.nan}, "impossible lens"),
        ({"camera_model": ["OPENCV"]}, "distortion"),
        (
            {"frames": [{"file_path": "../../000"}]},
            "which is no file in its folder or one beside it",
        ),
        (
            {"frames": [{"file_path": "/etc/passwd"}]},
            "which is no file in its folder or one beside it",
        ),
        ({"frames": [{"file_path": "0\0"}]}, "which is no file in its folder or one beside it"),
    ],
)
def test_unusable_cameras_are_one_sentence(folder, change, message):
    scene = json.loads((folder / "transforms.json").read_text()) | change
    (folder / "changed.json").write_text(json.dumps(scene))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        photos.read_photos(folder / "changed.json")
    one_sentence(error)


def test_a_mask_lies_in_the_folder_too(folder, tmp_path):
    scene = json.loads((folder / "transforms.json").read_text())
    for mask in ("/etc/hostname", "../../mask.png", 5):
        scene["frames"][3]["mask_path"] = mask
        (folder / "changed.json").write_text(json.dumps(scene))
        with pytest.raises(
            ValueError, match="which is no file in its folder or one beside it"
        ) as error:
            photos.read_photos(folder / "changed.json")
        one_sentence(error)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--views", "1000000000"], "must be 1000 or less"),
        (["--size", "1000000"], "must be 4096 or less"),
        (["--center", "nan", "0", "0", "--radius", "1"], "must be a number from"),
    ],
)
def test_options_that_no_object_can_have_are_said_first(
    folder, tmp_path, capsys, options, sentence
):
    with pytest.raises(SystemExit, match="2"):  # argparse's own, which ends by itself
        photos.main([str(folder), "--out", str(tmp_path), *options])
    assert sentence in capsys.readouterr().err
    for text in ("-5", "0"):
        with pytest.raises(SystemExit, match="2"):
            photos.main([str(folder), "--out", str(tmp_path), "--size", text])


def test_too_few_photographs_or_only_one_side(folder, read, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="transforms.json") as error:
        photos.read_photos(tmp_path)
    one_sentence(error)
    with pytest.raises(ValueError, match="takes 16 photographs; 15") as error:
        photos.object_from(read[:15], "x", world=TRUE_WORLD)
    one_sentence(error)
    with pytest.raises(ValueError, match="do not go around") as error:
        photos.ring_and_free(np.linspace(0, 150, 40), np.zeros(40), 24)
    one_sentence(error)
    with pytest.raises(ValueError, match="inside the object") as error:
        photos.object_from(read, "x", world=photos.World(SHIFT.double(), 4 * SCALE, Z_UP))
    one_sentence(error)
    assert photos.main([str(folder), "--out", str(tmp_path), "--radius", "1"]) == 2
    assert "together" in capsys.readouterr().err
    centred = [str(folder), "--out", str(tmp_path), "--center", "0", "0", "0", "--radius"]
    assert photos.main([*centred, "0"]) == 2
    assert "above 0; got 0" in capsys.readouterr().err
    assert photos.main([*centred, "-1"]) == 2
    assert "above 0; got -1" in capsys.readouterr().err
    assert photos.main([str(folder), "--out", str(folder / "000.png")]) == 2
    assert "000.png is no folder that you may write to" in capsys.readouterr().err


def test_repeated_views_are_counted(read):
    pictures, row = photos.object_from(read, "x", size=16, world=TRUE_WORLD)
    assert row["repeated"] == 4 and row["photographs"] == 20 and len(pictures.rgba) == 24
    assert "perspective off by up to" in photos.summary(pictures, row)
    assert len(ball_views(1).azimuths[0]) == 24  # what it stacks with
