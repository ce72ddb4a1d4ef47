"""Objects on disk and in memory.

What is written is read, what is broken is named, mirrors stay consistent.
"""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_world import (
    BALLS,
    SIZE,
    ball_pictures,
    ball_views,
    moved,
    object_views,
    one_sentence,
    turned,
)

from gsv3d_lib.cameras import batch_cameras
from gsv3d_lib.data import dataset
from gsv3d_lib.data.dataset import (
    ObjectViews,
    atomic_path,
    decode_depth,
    encode_depth,
    join_sheet,
    list_objects,
    load_views,
    read_object,
    resize_views,
    split_sheet,
    write_index,
    write_object,
)
from gsv3d_lib.data.examples import Orbits, make_variants, ring_frames
from gsv3d_lib.system.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of two objects. Tests that break something copy it first."""
    folder = tmp_path_factory.mktemp("dataset")
    for id, turn in (("second", 40.0), ("first", 0.0)):
        write_object(folder, object_views(id, turn))
    write_index(folder, [{"id": "second"}, {"id": "first", "family": "balls"}])
    return folder


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy of the dataset, to break."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# ---------------------------------------------------------------- files


def test_an_object_reads_back_as_written(folder):
    written, read = object_views("first"), read_object(folder, "first")
    assert read.id == "first" and read.rgba.dtype == np.uint8 and read.depth.dtype == np.float32
    assert np.array_equal(read.rgba[..., 3], written.rgba[..., 3])  # alpha is stored without loss
    inside = written.rgba[..., 3] > 0
    error = np.abs(read.rgba[..., :3].astype(int) - written.rgba[..., :3].astype(int))[inside]
    assert error.mean() < 8  # WebP at quality 85, of 64 px views with hard edges
    span = np.ptp(written.depth[written.depth > 0])
    assert np.array_equal(read.depth > 0, written.depth > 0)
    assert np.abs(read.depth - written.depth).max() <= span / 8191 + 1e-6
    assert torch.allclose(read.cameras.viewmats, written.cameras.viewmats, atol=1e-5)
    assert torch.equal(read.cameras.Ks, written.cameras.Ks)
    assert (read.cameras.width, read.cameras.height) == (64, 64)
    assert np.array_equal(read.azimuths, written.azimuths)
    assert np.array_equal(read.elevations, written.elevations)


def test_the_index_is_sorted_and_keeps_its_columns(folder):
    assert list_objects(folder) == [{"id": "first", "family": "balls"}, {"id": "second"}]


@pytest.mark.parametrize(("low", "high"), [(2.5, 4.5), (0.1, 90.0), (3.0, 3.0 + 1e-4)])
def test_the_depth_codec_keeps_its_error_bound(low, high):
    generator = np.random.default_rng(0)
    depth = generator.uniform(low, high, (4, 50, 50)).astype("f4")
    depth[0, :10] = 0
    depth[1, 0, :2] = low, high
    codes, minimum, span = encode_depth(depth)
    back = decode_depth(codes, minimum, span)
    assert codes.dtype == np.uint16 and np.array_equal(back == 0, depth == 0)
    rounding = 4 * np.spacing(np.float32(high))
    assert np.abs(back - depth).max() <= span / 8191 + rounding


def test_the_depth_codec_survives_flat_and_empty_views():
    flat = np.full((1, 4, 4), 3.5, "f4")
    assert np.abs(decode_depth(*encode_depth(flat)) - 3.5).max() < 1e-5
    assert (decode_depth(*encode_depth(np.zeros((1, 4, 4), "f4"))) == 0).all()


def test_sheets_fold_and_unfold():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 4), dtype=np.uint8)
    sheet = join_sheet(rgba)
    assert sheet.shape == (2 * 4, 6 * 4, 4)
    assert np.array_equal(sheet[4:, 4:8], rgba[7])  # view 7: second row, second column
    assert np.array_equal(split_sheet(sheet, 8, 4, 4), rgba)
    with pytest.raises(ValueError, match=r"\(8, 24\)"):
        split_sheet(sheet, 8, 4, 5)


@pytest.mark.parametrize("suffix", [".npz", ".webp"])
@pytest.mark.parametrize(
    "keep", [None, 0, 40, 0.6], ids=["missing", "empty", "header", "truncated"]
)
def test_a_broken_object_is_one_sentence(broken, suffix, keep):
    path = broken / f"first{suffix}"
    data = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match="'first'.*render it again") as error:
        read_object(broken, "first")
    one_sentence(error)


def test_junk_in_place_of_arrays_is_not_to_be_unpickled(broken):
    (broken / "first.npz").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="it is no array file.*render it again") as error:
        read_object(broken, "first")
    assert "pickle" not in str(error.value)


def test_arrays_without_cameras_are_one_sentence(broken):
    with np.load(broken / "first.npz") as arrays:
        kept = {name: arrays[name] for name in arrays if name != "c2w"}
    np.savez_compressed(broken / "first.npz", **kept)
    with pytest.raises(ValueError, match="c2w") as error:
        read_object(broken, "first")
    one_sentence(error)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("K", (2, 2)), ("c2w", (3, 4)), ("c2w", (5, 4, 4)), ("az", (5,)), ("depth", (SIZE, SIZE))],
)
def test_arrays_of_other_shapes_are_one_sentence(broken, name, shape):
    with np.load(broken / "first.npz") as arrays:
        changed = dict(arrays) | {name: np.ones(shape, np.float32)}
    np.savez_compressed(broken / "first.npz", **changed)
    with pytest.raises(ValueError, match="'first'.*render it again") as error:
        read_object(broken, "first")
    one_sentence(error)


def test_a_damaged_header_is_one_sentence(broken):
    header = b"{'descr': ('<f4'\n"
    with zipfile.ZipFile(broken / "first.npz", "w") as file:
        file.writestr(
            "depth.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        )
    with pytest.raises(ValueError, match="'first'.*render it again") as error:
        read_object(broken, "first")
    one_sentence(error)


def changed(folder: Path, **change) -> None:
    """Put other arrays into the npz of `first`; functions get the old ones."""
    with np.load(folder / "first.npz") as arrays:
        arrays = dict(arrays)
    arrays |= {
        name: value(arrays[name]) if callable(value) else value for name, value in change.items()
    }
    np.savez_compressed(folder / "first.npz", **arrays)


def spoiled(array: np.ndarray, value=np.nan) -> np.ndarray:
    """The array with another first number."""
    array = array.copy()
    array[(0,) * array.ndim] = value
    return array


def diagonal(*entries) -> np.ndarray:
    return np.diag(np.float32(entries))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"depth": lambda d: d.astype("f4")}, "depth is of type f4, not u2"),
        (
            {"depth": lambda d: np.where(d > 0, 4097, 0).astype("u2")},
            "depth holds 4097, outside of 0 to 4096",
        ),
        ({"depth": lambda d: d[:, :32]}, r"depth has the shape \[24, 32, 64\], not \[24, 64, 64\]"),
        ({"depth_min": np.nan}, "depth_min holds values that are not finite"),
        ({"depth_range": np.inf}, "depth_range holds values that are not finite"),
        ({"depth_range": -1.0}, "depth_range holds -1"),
        ({"az": spoiled}, "az holds values that are not finite"),
        ({"el": lambda el: spoiled(el, 95)}, "el holds 95, outside of -90 to 90"),
        ({"K": spoiled}, "K holds values that are not finite"),
        (
            {"K": lambda K: K * 2},
            "K is not the lens of this project for 64 px, 105.3 px of focal length",
        ),
        ({"c2w": spoiled}, "c2w holds values that are not finite"),
        ({"c2w": lambda c: c @ diagonal(-1, 1, 1, 1)}, "c2w of view 0 does not only turn and move"),
        ({"c2w": lambda c: c @ diagonal(2, 2, 2, 1)}, "c2w of view 0 does not only turn and move"),
        (
            {"c2w": lambda c: c @ diagonal(1, -1, -1, 1)},
            "c2w of view 0 is not the camera at azimuth 0 and elevation 15",
        ),
        ({"c2w": lambda c: c[::-1]}, "c2w of view .* is not the camera at azimuth"),
        ({"c2w": lambda c: np.linalg.inv(c)}, "c2w of view .* is not the camera at azimuth"),
        (
            {"az": lambda az: (az + 90) % 360},
            "its first 16 views are no ring: view 0 stands at azimuth 90, 90 degrees",
        ),
        ({"az": lambda az: az + 20}, "c2w of view .* is not the camera at azimuth"),
        ({"el": np.deg2rad}, "c2w of view .* is not the camera"),
    ],
)
def test_arrays_with_wrong_numbers_are_one_sentence(broken, change, sentence):
    changed(broken, **change)
    with pytest.raises(
        UserError, match=f"Object 'first' in .* cannot be read .*{sentence}"
    ) as error:
        read_object(broken, "first")
    one_sentence(error)


def test_other_types_of_the_same_numbers_read_the_same(folder, broken):
    same = {"depth": np.asfortranarray, "depth_min": np.float64, "az": lambda az: az - 360}
    changed(broken, c2w=lambda c: c.astype("f8"), el=lambda el: el.astype(">f8"), **same)
    before, after = read_object(folder, "first"), read_object(broken, "first")
    assert np.array_equal(before.depth, after.depth) and np.array_equal(
        before.elevations, after.elevations
    )
    assert torch.equal(before.cameras.viewmats, after.cameras.viewmats)
    assert np.array_equal(before.azimuths, after.azimuths % 360)


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        (range(8), "it has 8 views, fewer than the 16 of a ring"),
        (
            [0] * 16 + list(range(16, 24)),
            "no ring: view 8 stands at azimuth 0, 180 degrees from 180",
        ),
        ([*range(15, -1, -1), *range(16, 24)], "no ring"),
    ],
)
def test_views_that_are_no_ring_are_one_sentence(broken, order, sentence):
    views, order = object_views("first"), list(order)
    parts = {
        name: getattr(views, name)[order]
        for name in ("rgba", "depth", "cameras", "azimuths", "elevations")
    }
    write_object(broken, ObjectViews("first", **parts))
    with pytest.raises(UserError, match=sentence) as error:
        load_views([broken], SIZE, progress=False)
    one_sentence(error)


def saved_as(mode: str = "RGBA", size: tuple[int, int] = (384, 256), **options):
    def save(path: Path) -> None:
        Image.open(path).convert("RGBA").convert(mode).resize(size).save(
            path, **{"format": "WEBP"} | options
        )

    return save


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (saved_as("RGB"), "the sheet has no alpha channel"),
        (saved_as(format="PNG"), "the sheet is no WebP picture"),
        (saved_as("RGB", format="JPEG"), "the sheet is no WebP picture"),
        (saved_as(size=(192, 128)), r"depth has the shape \[24, 64, 64\], not \[24, 32, 32\]"),
        (saved_as(size=(384, 192)), "the sheet is 384 x 192, not 384 x 256"),
        (
            saved_as(save_all=True, append_images=[Image.new("RGBA", (384, 256), (9, 9, 9, 99))]),
            "the sheet moves",
        ),
        (lambda path: path.unlink() or os.mkfifo(path), "first.webp is no file"),
        (lambda path: path.unlink() or path.symlink_to("/dev/zero"), "first.webp is no file"),
    ],
)
def test_a_sheet_of_another_kind_is_one_sentence(broken, change, sentence):
    change(broken / "first.webp")
    with pytest.raises(UserError, match=sentence) as error:
        read_object(broken, "first")
    one_sentence(error)


def test_a_sheet_that_claims_to_be_huge_is_not_decoded(broken, monkeypatch):
    data = bytearray((broken / "first.webp").read_bytes())
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xfe\x3f\x00" * 2  # 16383 x 16383
    (broken / "first.webp").write_bytes(data)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="cannot be read"):
        read_object(broken, "first")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ('[{"id": "first"}, {"id": "first"}]', "the id 'first' is there twice"),
        ('[{"id": "../first"}]', "'../first' is no id"),
        ('[{"id": 5}]', "'5' is no id"),
        ('[{"name": "first"}]', "'None' is no id"),
        ('["first"]', "it is no list of rows"),
        ("null", "it is no list of rows"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_is_none_is_one_sentence(broken, rows, sentence):
    (broken / "index.json").write_text(rows)
    with pytest.raises(UserError, match=f"index.json cannot be read .*{sentence}") as error:
        list_objects(broken)
    one_sentence(error)


def test_an_object_has_one_place(folder, broken):
    with pytest.raises(
        UserError, match="do not fit together: the id 'first' is there twice"
    ) as error:
        load_views([folder, broken], SIZE, progress=False)
    one_sentence(error)
    assert load_views([folder, broken], SIZE, limit=2, progress=False).ids == ["first", "second"]


def test_nothing_is_written_outside_of_the_folder(tmp_path):
    with pytest.raises(UserError, match="is no id"):
        write_object(tmp_path / "data", object_views("../escape"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_broken_index_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="make_dataset") as error:
        list_objects(tmp_path)
    one_sentence(error)
    (tmp_path / "index.json").write_text('[{"id": "a"}, {"i')
    with pytest.raises(ValueError, match="index.json") as error:
        list_objects(tmp_path)
    one_sentence(error)
    write_index(tmp_path, [])
    with pytest.raises(ValueError, match="no objects"):
        load_views([tmp_path], SIZE, progress=False)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


# ---------------------------------------------------------------- tensors


def test_views_are_averaged_on_white():
    white_edge = np.zeros((1, 4, 4, 4), np.uint8)
    white_edge[0, :2, 0] = (100, 0, 50, 255)  # half of the first block is opaque
    depth = np.arange(16, dtype="f4").reshape(1, 4, 4) + 1
    views = ObjectViews("a", white_edge, depth, None, np.zeros(1, "f4"), np.zeros(1, "f4"))
    rgb, alpha, small, _, _ = resize_views(views, 2)
    assert rgb[0, 0, 0].tolist() == [178, 128, 152]  # (100, 0, 50) and white, half each
    assert alpha[0, ..., 0].tolist() == [[128, 0], [0, 0]] and (rgb[0, 1] == 255).all()
    assert set(small.flatten().tolist()) <= set(depth.flatten().tolist())  # picked, never averaged
    with pytest.raises(ValueError, match="not to 3 px"):
        resize_views(views, 3)


def test_loading_and_the_cache(folder, tmp_path, monkeypatch):
    first = load_views([folder], SIZE, cache=tmp_path, progress=False)
    assert first.ids == ["first", "second"] and first.rgb.shape == (2, 24, SIZE, SIZE, 3)
    assert first.rgb.dtype == torch.uint8 and first.depth.shape == (2, 24, SIZE, SIZE, 1)
    monkeypatch.setattr(dataset, "read_object", lambda *_: pytest.fail("the cache was not used"))
    again = load_views([folder], SIZE, cache=tmp_path, progress=False)
    for name in dataset.COLUMN_NAMES:
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_the_cache_is_not_used_for_other_objects_or_sizes(folder, tmp_path):
    load_views([folder], SIZE, cache=tmp_path, progress=False)
    (first,) = tmp_path.glob("views-*.safetensors")
    fewer = load_views([folder], SIZE, limit=1, cache=tmp_path, progress=False)
    smaller = load_views([folder], SIZE // 2, cache=tmp_path, progress=False)
    assert fewer.ids == ["first"] and len(fewer.rgb) == 1 and smaller.rgb.shape[2] == SIZE // 2
    kept = list(tmp_path.glob("views-*.safetensors"))  # the last of each size
    assert len(kept) == 2 and first not in kept


def test_the_cache_is_not_used_for_an_object_made_anew(tmp_path):
    for colour in (0.2, 0.8):
        views = object_views("balls", size=SIZE)
        views.rgba[..., :3] = int(255 * colour)
        write_object(tmp_path / "data", views)
        write_index(tmp_path / "data", [{"id": "balls"}])
        loaded = load_views([tmp_path / "data"], SIZE, cache=tmp_path, progress=False)
        inside = loaded.rgb[loaded.alpha[..., 0] == 255].float().mean() / 255
        assert abs(float(inside) - colour) < 0.02


def test_the_cache_is_not_used_where_only_the_arrays_changed(broken, tmp_path):
    views = load_views([broken], SIZE, cache=tmp_path / "cache", progress=False)
    changed(broken, depth_min=lambda low: low + 1)
    again = load_views([broken], SIZE, cache=tmp_path / "cache", progress=False)
    moved = torch.where(views.depth > 0, views.depth + 1, 0)
    assert torch.allclose(again.depth[0], moved[0], atol=1e-5) and torch.equal(
        again.depth[1], views.depth[1]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rgb": torch.zeros(1)},
        {"alpha": None},
        {"depth": torch.full((2, 24, 32, 32, 1), torch.nan)},
    ],
)
def test_a_cache_of_other_tensors_is_made_again(folder, tmp_path, change):
    first = load_views([folder], SIZE, cache=tmp_path, progress=False)
    (cache,) = tmp_path.glob("views-*.safetensors")
    tensors = {
        name: value for name, value in (load_file(cache) | change).items() if value is not None
    }
    save_file(tensors, cache)
    again = load_views([folder], SIZE, cache=tmp_path, progress=False)
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.depth, again.depth)


def test_a_damaged_cache_is_made_again(folder, tmp_path):
    first = load_views([folder], SIZE, cache=tmp_path, progress=False)
    (cache,) = tmp_path.glob("views-*.safetensors")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:1000])
    again = load_views([folder], SIZE, cache=tmp_path, progress=False)
    assert torch.equal(first.rgb, again.rgb) and cache.read_bytes() == whole


# ---------------------------------------------------------------- geometry


def assert_shows(scene_rgb, scene_depth, cameras, balls):
    """The pictures are what `cameras` see of `balls`, but for pixels on outlines."""
    rgb, _, depth = ball_pictures(cameras, balls)
    assert ((scene_rgb - rgb).abs().amax(-1) < 0.01).float().mean() > 0.998
    assert ((scene_depth - depth).abs() < 1e-3).float().mean() > 0.998


def test_a_scene_is_what_its_cameras_see():
    views = ball_views(1)
    scene = views.scene(0)
    assert_shows(scene.rgb, scene.depth, scene.cameras, BALLS)
    assert torch.equal(scene.alpha > 0, scene.depth > 0)


def test_a_mirrored_scene_is_the_mirrored_object():
    scene = ball_views(1).scene(0, mirror=True)
    assert torch.allclose(scene.azimuths[:16], torch.arange(16) * 22.5)  # still a ring in order
    mirrored = moved(BALLS, lambda x, y, z: (x, -y, z))
    assert_shows(scene.rgb, scene.depth, scene.cameras, mirrored)
    with pytest.raises(AssertionError):  # and the check can fail
        assert_shows(scene.rgb, scene.depth, scene.cameras, BALLS)


def test_a_palette_permutes_the_colours():
    views = ball_views(1)
    assert torch.equal(views.scene(0, palette=(2, 0, 1)).rgb, views.scene(0).rgb[..., [2, 0, 1]])


# ---------------------------------------------------------------- orbits


def test_ring_frames_are_sv3d_order():
    assert ring_frames(12, 4).tolist() == [0, 4, 8, 12]
    assert ring_frames(3, 16).tolist() == [*range(4, 16), 0, 1, 2, 3]
    for frames in (1, 2, 4, 8, 16):
        assert (
            ring_frames(5, frames)[-1] == 5 and len(set(ring_frames(5, frames).tolist())) == frames
        )
    with pytest.raises(ValueError, match="not 5"):
        ring_frames(0, 5)


@pytest.mark.parametrize("item", [0, 1], ids=["as it is", "mirrored and recoloured"])
@pytest.mark.parametrize("start", [0, 13])
def test_an_orbit_lives_in_the_world_of_its_condition_view(item, start):
    """Turn the object so that the condition view stands at azimuth 0.

    The relative cameras see exactly that.
    """
    views, latents = ball_views(1), torch.randn(2, 16, 4, 4, 4)
    orbits = Orbits(views, make_variants(1, 2, seed=3), latents, 0.18215)
    variant = orbits.variants[item]
    assert variant.mirror == (item == 1)
    balls = moved(BALLS, lambda x, y, z: (x, -y, z)) if variant.mirror else BALLS
    balls = tuple(
        (c, r, tuple(color[k] for k in variant.palette))
        for c, r, color in turned(balls, -22.5 * start)
    )

    orbit = orbits.orbit(item, start, 8)
    assert orbit["azimuth"][-1] == 0 and torch.equal(orbit["image"], orbits.scene(item).rgb[start])
    # the condition is not scaled
    assert torch.equal(orbit["latents"][-1], 0.18215 * orbit["image_latent"])
    cameras = batch_cameras(orbit["azimuth"][None], orbit["elevation"][None], SIZE)[0]
    scene, frames = orbits.scene(item), ring_frames(start, 8)
    assert_shows(scene.rgb[frames], scene.depth[frames], cameras, balls)

    targets = orbits.targets(item, start, torch.tensor([start, 17, 22]))
    cameras = batch_cameras(
        targets["target_azimuth"][None], targets["target_elevation"][None], SIZE
    )[0]
    assert targets["target_azimuth"][0] == 0
    assert_shows(targets["target_rgb"], targets["target_depth"], cameras, balls)


def test_variants_keep_every_object_and_add_altered_ones():
    variants = make_variants(3, 3, seed=0)
    assert [v.index for v in variants] == [0, 1, 2] * 3
    assert [v.mirror for v in variants] == [False] * 3 + [True] * 3 + [False] * 3
    assert variants == make_variants(3, 3, seed=0) and variants != make_variants(3, 3, seed=1)
    with pytest.raises(ValueError, match=r"\[3, 16, 4, h, w\]"):
        Orbits(ball_views(3), variants[:3], torch.zeros(2, 16, 4, 4, 4), 1.0)


def test_a_shared_scan_reads(shared_objects):
    scans = shared_objects / "gso"
    row = list_objects(scans)[0]
    views = read_object(scans, row["id"])
    assert views.rgba.shape == (24, 128, 128, 4) and views.depth.shape == (24, 128, 128)
    assert views.azimuths[:16] == pytest.approx(np.arange(16) * 22.5)
    hit = views.depth > 0
    assert 2.4 < views.depth[hit].min() and views.depth[hit].max() < 4.6
    assert (views.rgba[..., 3][hit] > 0).mean() > 0.99
    assert json.loads((scans / "index.json").read_text())


def test_objects_of_other_numbers_of_views_are_one_sentence(broken):
    whole = object_views("third")
    fewer = {
        name: getattr(whole, name)[:20]
        for name in ("rgba", "depth", "cameras", "azimuths", "elevations")
    }
    write_object(broken, ObjectViews("third", **fewer))
    write_index(broken, [{"id": "first"}, {"id": "third"}])
    with pytest.raises(ValueError, match="third in .* has 20 views") as error:
        load_views([broken], SIZE, progress=False)
    one_sentence(error)


def test_a_folder_that_is_named_twice_counts_twice(tmp_path):
    write_object(tmp_path, object_views("one"))
    write_index(tmp_path, [{"id": "one"}])
    assert [id for _, id in dataset.list_all([tmp_path, tmp_path])] == ["one", "one"]
    assert len(load_views([tmp_path, tmp_path], SIZE, progress=False)) == 2
