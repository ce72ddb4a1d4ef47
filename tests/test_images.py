"""Any picture in, one square white-backed condition out; what cannot be used is refused
in one sentence.
"""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from scipy import ndimage
from tiny_world import one_sentence

from gsv3d_lib import images
from gsv3d_lib.data import cutout
from gsv3d_lib.images import cut_out, load_image, prepare_condition
from gsv3d_lib.system.errors import Doubt, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*removed by colour")


def disc(size: int = 64, colour=(200, 40, 30), radius: float = 0.3, at=(0.5, 0.5)) -> Image.Image:
    """An opaque disc on nothing; radius and position in units of the frame."""
    y, x = np.mgrid[:size, :size] + 0.5
    inside = (x - at[0] * size) ** 2 + (y - at[1] * size) ** 2 <= (radius * size) ** 2
    return Image.fromarray(
        np.dstack([np.full((size, size, 3), colour), inside * 255]).astype(np.uint8), "RGBA"
    )


def on_colour(image: Image.Image, colour) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (200, 90)])
def test_formats_and_sizes(kind, size, tmp_path):
    path = tmp_path / "picture.bin"  # the content decides, not the name
    path.write_bytes(encoded(Image.new("RGB", size, (90, 140, 30)), kind, quality=95))
    image = load_image(path)
    assert image.mode == "RGBA" and image.size == size
    assert np.abs(np.asarray(image).astype(int) - (90, 140, 30, 255)).max() <= 3


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"]
)
def test_modes_keep_the_picture(mode):
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    if mode == "PA":
        image = ramp.convert("P").convert("PA")
    else:
        image = ramp.convert("RGB").convert(mode) if mode != "LA" else ramp.convert("LA")
    pixels = np.asarray(load_image(image)).astype(int)
    assert pixels.shape == (32, 32, 4) and (pixels[..., 3] == 255).all()
    if mode not in ("1", "P", "LAB"):  # those three are coarse by nature
        assert np.abs(pixels[..., :3] - np.asarray(ramp)[..., None]).max() <= 4


def test_transparency_in_every_form():
    picture = disc()
    alpha = np.asarray(picture)[..., 3]
    key_colour = Image.fromarray(
        np.where(alpha[..., None] > 0, 200, 7).repeat(3, -1).astype(np.uint8)
    )
    sources = [
        encoded(picture, "PNG"),
        encoded(picture, "WEBP", lossless=True),
        encoded(picture.convert("LA"), "PNG"),
        encoded(picture.quantize(16), "PNG"),
        encoded(key_colour, "PNG", transparency=(7, 7, 7)),
        encoded(key_colour.convert("L"), "PNG", transparency=7),
    ]
    for source in sources:
        assert ((np.asarray(load_image(source))[..., 3] > 127) == (alpha > 127)).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for source in (
        encoded(Image.fromarray(values), "PNG"),
        values,
        Image.fromarray(values.astype(np.int32)),
    ):
        grey = np.asarray(load_image(source))[..., 0].astype(int)
        assert (grey == np.round(values / 257)).all()
        assert grey.min() == 0 and grey.max() == 255 and len(np.unique(grey)) == 256


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 40, 5))  # a red top edge, stored ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... with the note "turn me 90 degrees clockwise"
    upright = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (20, 40)
    right = np.asarray(upright)[:, -3:, :3].mean((0, 1))
    assert right[0] > 200 and right[1] < 80


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_arrays(dtype, shape):
    top = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    array = np.full(shape, top, dtype=dtype)
    array[:4] = 0
    pixels = np.asarray(load_image(array))
    assert (pixels[:4, :, :3] == 0).all() and (pixels[4:, :, :3] == 255).all()
    assert (
        np.asarray(load_image(torch.from_numpy(array.astype(np.float32) / top))) == pixels
    ).all()


def test_large_pictures_are_shrunk_while_loading(monkeypatch):
    monkeypatch.setattr(images, "MAX_SIDE", 100)
    for kind in ("PNG", "JPEG"):
        image = load_image(encoded(on_colour(disc(500), "white"), kind))
        assert max(image.size) == 100
        assert np.abs(np.asarray(image)[50, 50, :3].astype(int) - (200, 40, 30)).max() < 6


# ---------------------------------------------------------------- refusals


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="check the path") as error:
            load_image(path)
        one_sentence(error)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_cut_off_files(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut.img"
    for length in range(0, len(data) - 40, max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="empty file|not an image|broken or cut off") as error:
            load_image(path)
        assert "cut.img" in one_sentence(error)


def test_flipped_bytes_never_escape_as_something_else():
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        data = encoded(disc(48).convert("RGB"), kind)
        for _ in range(30):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                broken[place] = rng.integers(0, 256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert load_image(bytes(broken)).mode == "RGBA"
                except ValueError:
                    pass


def test_not_an_image():
    with pytest.raises(ValueError, match="not an image.*PNG, JPEG, WebP or BMP") as error:
        load_image(b"GIF89 is what I claim, but I am a letter")
    one_sentence(error)


def test_decompression_bombs_are_refused_before_decoding():
    # 20000 x 20000 and 11000 x 10000 pixels of one colour are small files; the size is
    # known from the header alone.
    for width, height in ((20000, 20000), (11000, 10000)):
        header = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
        header[16:24] = struct.pack(">II", width, height)
        header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
        with pytest.raises(ValueError, match="too large.*100 million pixels") as error:
            load_image(bytes(header))
        one_sentence(error)


def test_the_limit_holds_for_pil_images_too(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="40 x 30"):
        load_image(Image.new("L", (40, 30)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 2), np.uint8), r"\[H, W, 1, 3 or 4\], got shape \(4, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "got shape"),
        (np.full((4, 4, 3), 200.0), r"in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan, np.float32), "finite"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(ValueError, match=message) as error:
        load_image(array)
    one_sentence(error)


def test_zero_sized_image():
    with pytest.raises(ValueError, match="0 x 5"):
        load_image(Image.new("RGB", (0, 5)))


# ---------------------------------------------------------------- finding the object


def test_own_alpha_is_used_untouched_and_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cut_out(disc()).tobytes() == disc().tobytes()


@pytest.mark.parametrize("backdrop", ["white", (120, 130, 140), (20, 60, 30)])
def test_plain_background_is_cut_out_with_a_warning(backdrop):
    picture = encoded(on_colour(disc(128), backdrop), "JPEG", quality=90)
    with pytest.warns(UserWarning, match="removed by colour"):
        alpha = np.asarray(cut_out(load_image(picture), "plain"))[..., 3] > 127
    truth = np.asarray(disc(128))[..., 3] > 127
    assert (alpha & truth).sum() / (alpha | truth).sum() > 0.93


@pytest.mark.filterwarnings("ignore:.*removed by colour")
def test_shaded_backdrop_second_object_and_hole():
    shade = np.linspace(120, 220, 128)[:, None, None] * np.ones((1, 128, 3))
    backdrop = Image.fromarray(shade.astype(np.uint8)).convert("RGBA")
    ring = np.asarray(disc(128)).copy()
    ring[np.asarray(disc(128, radius=0.15))[..., 3] > 0, 3] = 0
    small = disc(128, radius=0.05, at=(0.9, 0.9))
    picture = Image.alpha_composite(Image.alpha_composite(backdrop, Image.fromarray(ring)), small)
    alpha = np.asarray(cut_out(picture, "plain"))[..., 3] > 127
    truth = ring[..., 3] > 127
    assert (alpha & truth).sum() / (alpha | truth).sum() > 0.95


@pytest.mark.filterwarnings("ignore:.*removed by colour")
def test_nothing_to_find():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    cases = [
        (np.full((32, 32, 3), 255, np.uint8), "No object found: the picture is one plain colour"),
        (np.zeros((32, 32, 4), np.uint8), "fully transparent"),
        (noise, "background is not plain.*transparent background"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            prepare_condition(source, 32, background="auto" if source.shape[-1] == 4 else "plain")
        one_sentence(error)
    with pytest.raises(ValueError, match="'auto', 'rembg' or 'plain', got 'magic'"):
        cut_out(disc(), "magic")


@pytest.mark.skipif(cutout._has_rembg(), reason="rembg is installed")
def test_rembg_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="rembg is not installed: pip install 'rembg"):
        cut_out(Image.new("RGBA", (8, 8)), "rembg")


# --------------------------------------------------- a mask, or none, or a doubtful one


def photo(size: int = 128, backdrop=(226, 224, 220), **where) -> Image.Image:
    """A disc on a plain ground, as RGBA without transparency."""
    return on_colour(disc(size, **where), backdrop).convert("RGBA")


def overlap(picture, truth: Image.Image) -> float:
    """IoU of the framed silhouettes, so that the box counts as well."""
    masks = [prepare_condition(source, 64)[1] > 0.5 for source in (picture, truth)]
    return float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())


def with_alpha(picture: Image.Image, alpha) -> Image.Image:
    return Image.fromarray(
        np.dstack([np.asarray(picture)[..., :3], np.asarray(alpha)]).astype(np.uint8), "RGBA"
    )


def rounded(size: int, radius: float) -> np.ndarray:
    """Alpha of a picture with rounded corners."""
    y, x = np.abs(np.mgrid[:size, :size] + 0.5 - size / 2)
    reach = np.hypot(np.maximum(x - size / 2 + radius, 0), np.maximum(y - size / 2 + radius, 0))
    return 255 * (reach <= radius)


def opaque_but(*places) -> np.ndarray:
    alpha = np.full((128, 128), 255)
    for place in places:
        alpha[place] = 0
    return alpha


NO_MASKS = {
    "rounded corners": (rounded(128, 12), "only trims"),
    "rounder corners": (rounded(128, 28), "only trims"),
    "a strip": (opaque_but(np.s_[:, :9]), "only trims"),
    "bars": (opaque_but(np.s_[:20], np.s_[-20:]), "only trims"),
    "one pixel": (opaque_but(np.s_[70, 3]), "by colour"),
    "uniform 240": (np.full((128, 128), 240), "by colour"),
    "uniform 100": (np.full((128, 128), 100), "by colour"),
    "noise at the top": (np.random.default_rng(0).integers(235, 256, (128, 128)), "by colour"),
}


@pytest.mark.parametrize("kind", NO_MASKS)
def test_alpha_that_is_no_mask_does_not_make_the_picture_the_object(kind):
    alpha, said = NO_MASKS[kind]
    with pytest.warns(Doubt, match=said):
        assert overlap(with_alpha(photo(), alpha), disc(128)) > 0.93


def test_what_a_mask_leaves_is_the_object_even_where_it_looks_like_a_picture():
    # a round plate with a disc painted on it, or a cropped photograph
    circle = with_alpha(photo(), rounded(128, 64))
    with pytest.warns(Doubt, match="all of it was taken"):
        assert overlap(circle, with_alpha(photo(), rounded(128, 64))) == 1
    box = np.asarray(photo()).copy()
    box[:, :8, 3] = box[:, -8:, 3] = box[:8, :, 3] = box[-8:, :, 3] = 0
    with pytest.warns(Doubt, match="all of it was taken"):
        assert cut_out(Image.fromarray(box)).tobytes() == box.tobytes()


def untouched(picture: Image.Image) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cut_out(picture).tobytes() == picture.tobytes()


def test_boxes_glass_hairs_pieces_and_cut_objects_keep_their_alpha_in_silence():
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    )
    margin = opaque_but(np.s_[:4], np.s_[-4:], np.s_[:, :4], np.s_[:, -4:])
    assert untouched(with_alpha(noise, margin))  # a printed box that fills its picture
    assert untouched(with_alpha(disc(128), np.asarray(disc(128))[..., 3] * 0.3))  # glass
    # smoked glass
    assert untouched(with_alpha(disc(128, (9, 9, 9)), np.asarray(disc(128))[..., 3] * 0.5))
    hair = np.asarray(disc(128))[..., 3].copy()
    hair[4:40, 64] = 255
    assert untouched(with_alpha(noise, hair))
    pieces = (
        np.asarray(disc(128, radius=0.2, at=(0.3, 0.3)))[..., 3]
        + np.asarray(disc(128, radius=0.06, at=(0.8, 0.8)))[..., 3]
    )
    assert untouched(with_alpha(noise, pieces))
    assert untouched(disc(128, radius=0.5, at=(0.5, 0.9)))  # cut by the frame


def test_specks_haze_and_drop_shadows_do_not_move_the_box():
    rng = np.random.default_rng(0)
    own = np.asarray(disc(128))[..., 3]
    dots = own.copy()
    dots[rng.integers(0, 128, 30), rng.integers(0, 128, 30)] = 255
    stray = own.copy()
    stray[2, 2] = 255
    veils = [
        np.full(own.shape, 30),
        rng.integers(1, 11, own.shape),
        rng.integers(10, 61, own.shape),
    ]
    for alpha in (stray, dots, *(np.maximum(own, veil) for veil in veils)):
        assert overlap(with_alpha(disc(128), alpha), disc(128)) > 0.9
    shadow = ndimage.gaussian_filter(np.roll(own, (9, 6), (0, 1)).astype(float), 5) * 0.45
    dark = np.where(own[..., None] > 0, np.asarray(disc(128))[..., :3], 0)
    with pytest.warns(Doubt, match="shadow"):
        assert overlap(with_alpha(dark, np.maximum(own, shadow)), disc(128)) > 0.9


FRAMES = {  # left, top, right, bottom
    "letterbox": ("black", (0, 30, 0, 30)),
    "uneven pillars": ((120, 90, 30), (12, 0, 40, 0)),
    "one bar": ("white", (0, 0, 0, 25)),
    "all round": ("black", (25, 25, 25, 25)),
    "a line": ((30, 20, 10), (1, 1, 1, 1)),
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_bars_and_frames_are_taken_off(kind, format):
    colour, (left, top, right, bottom) = FRAMES[kind]
    place = (128 + left + right, 128 + top + bottom)
    framed, truth = Image.new("RGB", place, colour), Image.new("RGBA", place)
    framed.paste(photo().convert("RGB"), (left, top))
    truth.paste(disc(128), (left, top))
    with pytest.warns(Doubt, match="bars or a frame"):
        assert overlap(encoded(framed, format, quality=92), truth) > 0.9


def test_a_frame_within_a_frame_and_a_box_that_only_looks_like_one():
    framed = ImageOps.expand(ImageOps.expand(photo().convert("RGB"), 4, "black"), 20, "white")
    with pytest.warns(Doubt, match="bars or a frame"):
        assert overlap(framed, ImageOps.expand(disc(128), 24)) > 0.93
    box = Image.new("RGBA", (128, 128))
    box.paste((150, 40, 30, 255), (30, 40, 100, 90))
    with pytest.warns(Doubt) as said:
        assert overlap(on_colour(box, "white"), box) > 0.93
    assert not any("frame" in str(one.message) for one in said)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("radius", [0.55, 0.62, 0.7])
def test_an_object_over_more_than_half_of_the_border_is_not_inverted(turn, radius):
    y = np.linspace(1.1, 0.6, 128)[:, None, None]
    truth = disc(128, radius=radius, at=(0.5, 0.75))
    shaded = Image.fromarray((np.asarray(truth)[..., :3] * y).astype(np.uint8))
    truth = with_alpha(shaded, np.asarray(truth)[..., 3]).rotate(turn)
    with pytest.warns(Doubt, match="reach the border"):
        assert overlap(on_colour(truth, (230, 230, 228)), truth) > 0.95


def before(wall: np.ndarray, thing: Image.Image) -> Image.Image:
    """A thing on a grained table before a wall [128, 128, 3]; the frame cuts others."""
    grain = np.random.default_rng(0).normal(0, 6, (128, 16, 1)).repeat(8, 1)
    scene = wall.astype(float)
    scene[70:] = (np.array([140, 100, 70]) + grain)[70:]
    picture = Image.fromarray(scene.clip(0, 255).astype(np.uint8)).convert("RGBA")
    for other in (
        disc(128, (30, 120, 60), 0.12, at=(0.0, 0.5)),
        disc(128, (220, 190, 30), 0.1, at=(1.0, 0.55)),
        thing,
    ):
        picture = Image.alpha_composite(picture, other)
    return picture.convert("RGB")


WALLS = {
    "plain": np.full((128, 128, 3), (150, 190, 200)),
    "stripes": np.array([(60, 90, 200), (200, 220, 120), (120, 60, 140), (230, 230, 210)])[
        np.arange(128) // 8 % 4
    ][None].repeat(128, 0),
}


@pytest.mark.parametrize("colour", [(200, 40, 30), (240, 240, 245), (40, 40, 90)])
@pytest.mark.parametrize("wall", WALLS)
def test_a_thing_on_a_table_before_a_wall_is_cut_out(wall, colour):
    thing = disc(128, colour, radius=0.22, at=(0.48, 0.55))
    picture = before(WALLS[wall], thing)
    with pytest.warns(Doubt, match="the background is not plain"):
        assert overlap(picture, thing) > 0.93
    large = picture.resize((1024, 1024), Image.Resampling.BICUBIC)
    with pytest.warns(Doubt, match="the background is not plain"):
        assert overlap(large, thing.resize((1024, 1024))) > 0.87  # blurred edges


@pytest.mark.parametrize("corner", [(20, 30, 108, 128), (4, 10, 124, 128)])
def test_a_logo_on_a_box_that_reaches_the_border_is_not_the_object(corner):
    box = Image.new("RGBA", (128, 128))
    box.paste((150, 40, 30, 255), corner)
    logo = disc(128, (250, 220, 60), radius=0.12, at=(0.5, 0.6))
    picture = Image.alpha_composite(Image.new("RGBA", (128, 128), (225, 228, 230)), box)
    assert overlap(Image.alpha_composite(picture, logo).convert("RGB"), box) > 0.85


def test_small_and_thin_objects_are_found():
    small = disc(1500, radius=0.014)
    with pytest.warns(Doubt, match="very small"):
        assert overlap(encoded(on_colour(small, (240, 240, 240)), "PNG"), small) > 0.9
    rod = Image.new("RGBA", (400, 400))
    rod.paste((60, 40, 120, 255), (199, 30, 201, 370))
    assert overlap(on_colour(rod, "white"), rod) > 0.9


def test_vignettes_dust_and_two_pieces():
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    ground = (220 * (1 - 0.2 * (x**2 + y**2)))[..., None].repeat(3, -1)
    pair = Image.alpha_composite(
        disc(128, radius=0.16, at=(0.25, 0.5)), disc(128, radius=0.14, at=(0.75, 0.5))
    )
    rows, columns = np.random.default_rng(0).integers(0, 128, (2, 20))
    ground[rows, columns] = 60
    backdrop = Image.fromarray(ground.astype(np.uint8)).convert("RGBA")
    assert overlap(Image.alpha_composite(backdrop, pair).convert("RGB"), pair) > 0.93


# ------------------------------------------------------- animations and colour profiles


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_that_shows_something(kind):
    blank, later = Image.new("RGBA", (64, 64)), disc(colour=(30, 60, 200))
    frames = [blank, disc(), later]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.warns(Doubt, match="frame 2 was taken"):
            pixel = load_image(source).getpixel((32, 32))
        assert np.abs(np.array(pixel) - (200, 40, 30, 255)).max() < 12
    assert source.tell() == 0  # the caller's picture stands where it stood


def test_an_animation_of_nothing_is_refused():
    data = encoded(
        Image.new("RGBA", (9, 9)),
        "PNG",
        save_all=True,
        append_images=[Image.new("RGBA", (9, 9), (1, 1, 1, 1))],
    )
    with pytest.raises(UserError, match="fully transparent"):
        prepare_condition(data, 32)


def swapped_profile() -> bytes:
    """sRGB's profile with red and green exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    names = data.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    return names.replace(b"s\0R\0G\0B", b"o\0d\0d\0 ").replace(b"sRGB", b"odd ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colour_profiles_are_converted_to_srgb(kind):
    picture = Image.new("RGB", (16, 16), (200, 40, 30))
    red, green, blue, alpha = load_image(
        encoded(picture, kind, icc_profile=swapped_profile())
    ).getpixel((8, 8))
    assert abs(red - 40) < 6 and abs(green - 200) < 6 and abs(blue - 30) < 6 and alpha == 255
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load_image(encoded(picture, "PNG", icc_profile=plain)).getpixel((8, 8)) == (
        200,
        40,
        30,
        255,
    )


def test_a_profile_keeps_transparency_and_a_bad_one_is_said():
    source = load_image(encoded(disc(), "PNG", icc_profile=swapped_profile()))
    assert np.array_equal(np.asarray(source)[..., 3], np.asarray(disc())[..., 3])
    for data in (b"junk" * 50, swapped_profile()[:200]):
        with pytest.warns(Doubt, match="colour profile.*ignored"):
            assert load_image(encoded(disc(), "PNG", icc_profile=data)).getpixel((32, 32)) == (
                200,
                40,
                30,
                255,
            )


# ---------------------------------------------------------------- bounds


def test_files_and_sizes_beyond_the_bounds_are_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.write(encoded(disc(), "PNG")[:60])
        file.truncate(20_000_000_000)  # takes no room on the disk
    with pytest.raises(UserError, match="too large.*400 million bytes") as error:
        load_image(path)
    one_sentence(error)
    with pytest.raises(UserError, match="1 to 2048"):
        prepare_condition(disc(), 100_000)


def test_only_the_named_formats_are_opened():
    for kind in ("PPM", "TGA", "ICO", "PCX"):
        with pytest.raises(UserError, match="not an image this program can read"):
            load_image(encoded(disc().convert("RGB"), kind))


@pytest.mark.parametrize("source", [None, [[1, 2]], 7, io.BytesIO(b"x"), bytearray(b"x")])
def test_what_is_no_picture_at_all(source):
    with pytest.raises(UserError, match="An image is given as a path") as error:
        load_image(source)
    one_sentence(error)


def test_tensors_with_gradients_and_of_half_precision():
    array = np.asarray(on_colour(disc(), "white")).astype(np.float32) / 255
    for tensor in (torch.from_numpy(array).requires_grad_(), torch.from_numpy(array).bfloat16()):
        assert np.abs(np.asarray(load_image(tensor))[..., :3] / 255 - array).max() < 0.006


def test_tiny_pictures_warn_of_nothing_but_doubt():
    for shape in ((1, 1, 3), (1, 1, 4), (2, 2, 4), (1, 9, 3), (7, 7, 3)):
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", Doubt)
            try:
                prepare_condition(array, 16)
            except UserError:
                pass


# ---------------------------------------------------------------- framing


@pytest.mark.parametrize("size", [32, 33, 128, 576])
@pytest.mark.parametrize("fill", [0.3, images.DEFAULT_FILL, 1.0])
def test_object_is_centred_and_fills_the_stated_fraction(size, fill):
    source = disc(300, radius=0.1, at=(0.2, 0.85))
    rgb, alpha = prepare_condition(source, size, fill=fill)
    assert rgb.shape == (size, size, 3) and alpha.shape == (size, size, 1)
    assert rgb.dtype == alpha.dtype == torch.float32 and 0 <= rgb.min() and rgb.max() <= 1
    rows = torch.nonzero(alpha[..., 0].amax(1) > 0).flatten()
    columns = torch.nonzero(alpha[..., 0].amax(0) > 0).flatten()
    for line in (rows, columns):
        assert line[0] + line[-1] == size - 1  # centred to the pixel
        assert abs(len(line) - fill * size) <= 1


def test_colours_and_white_composite_are_exact():
    rgba = np.zeros((20, 20, 4), np.float32)
    rgba[5:15, 5:15] = (0.2, 0.4, 0.6, 1.0)
    rgba[5:15, 5:10, 3] = 0.6
    rgb, alpha = prepare_condition(rgba, 10, fill=1.0)  # 10 px object into 10 px frame: a copy
    assert torch.allclose(rgb[:, 5:], torch.tensor([0.2, 0.4, 0.6]), atol=1e-6)
    assert torch.allclose(rgb[:, :5], 0.6 * torch.tensor([0.2, 0.4, 0.6]) + 0.4, atol=1e-6)
    assert torch.allclose(alpha[:, :5], torch.tensor(0.6), atol=1e-6)


def test_invisible_colours_do_not_bleed_and_averages_are_by_area():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 1] = 255  # invisible green everywhere ...
    rgba[::2, ::2] = (255, 0, 0, 255)  # ... and every fourth pixel opaque red
    rgba[-1, -1] = (255, 0, 0, 255)
    rgb, alpha = prepare_condition(rgba, 4, fill=1.0)
    assert torch.allclose(alpha[:3, :3], torch.tensor(0.25))
    # a quarter red on white: no green tint
    assert torch.allclose(rgb[0, 0], torch.tensor([1.0, 0.75, 0.75]))


def test_framing_can_be_kept():
    source = disc(64, radius=0.2, at=(0.3, 0.5)).crop((0, 0, 64, 32))
    _, alpha = prepare_condition(source, 64, fill=None)
    assert torch.equal(
        alpha[16:48, :, 0], torch.from_numpy(np.asarray(source)[..., 3] / 255.0).float()
    )
    assert alpha[:16].max() == 0


@pytest.mark.parametrize(("size", "fill"), [(0, 0.8), (64, 0.0), (64, 1.5)])
def test_size_and_fill_are_checked(size, fill):
    with pytest.raises(ValueError, match="fill in"):
        prepare_condition(disc(), size, fill=fill)


def test_extreme_aspect_ratios():
    for shape in ((1, 500), (500, 1), (2, 1)):
        array = np.full((*shape, 4), 128, np.uint8)
        array.reshape(-1, 4)[: -(-array[..., 0].size // 10)] = 0  # an end of it is transparent
        rgb, alpha = prepare_condition(array, 32)
        assert alpha.max() > 0.4 and torch.isfinite(rgb).all()


def test_a_training_render_comes_back_as_it_was(shared_objects):
    sheet = Image.open(min((shared_objects / "train").glob("*.webp")))
    view = sheet.crop((0, 256, 128, 384))
    rgb, alpha = prepare_condition(view, 128, fill=None)
    straight = torch.from_numpy(np.asarray(view).astype(np.float32) / 255)
    expected = straight[..., :3] * straight[..., 3:] + 1 - straight[..., 3:]
    assert torch.allclose(rgb, expected, atol=1e-6) and torch.allclose(
        alpha, straight[..., 3:], atol=1e-6
    )
