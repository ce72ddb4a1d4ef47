"""From any picture of one object to the condition image that the model expects.

`load_image` decodes it, `cut_out` finds the object, and `prepare_condition`
centres and scales it and puts it on white in a square.
"""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from .data.cutout import VISIBLE_ALPHA, box_of, cut_out
from .system.errors import Doubt, MissingFile, UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # PIL knows 40 more, each with its faults
MAX_PIXELS = 100_000_000  # 400 MB once decoded: more is a "decompression bomb"
MAX_BYTES = 4 * MAX_PIXELS  # of the file: the largest picture that we take, not compressed
MAX_SIDE = 2048  # larger pictures are shrunk to this while loading; conditions are at most 576 px
# Longer side of the object / side of the frame: the median in the front views of the
# 578 shared training objects (alpha > 127; quartiles 0.73 and 0.91). A ball of radius 1
# would touch the frame, but most objects reach radius 1 in one direction only.
DEFAULT_FILL = 0.82

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_EIGHT_OF_SIXTEEN = np.round(np.arange(65536) / 257).astype(np.uint8)
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC's colour spaces in PIL's words
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError)
_BROKEN += (OverflowError, struct.error, zlib.error)  # what PIL's readers raise for damaged files

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor


def load_image(source: ImageSource) -> Image.Image:
    """Decode a picture of any size and mode into RGBA (straight alpha, sRGB), upright.

    source: a path; the bytes of a file; a PIL image; an array or tensor [H, W] or [H,
        W, 1 | 3 | 4] of uint8, uint16, or float in [0, 1].
    No side is longer than MAX_SIDE. 16-bit grey is scaled, not clipped. EXIF rotation
    and colour profiles are applied. Of an animation the first frame that shows
    something is taken. Raises MissingFile, or UserError for what is not a usable
    picture.
    """
    if isinstance(source, Image.Image):
        return _to_rgba(source, name_of(source))
    if isinstance(source, np.ndarray | Tensor):
        return _to_rgba(_image_from_array(_as_array(source)), name_of(source))
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), len(source), name_of(source))
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            "An image is given as a path, the bytes of a file, a PIL image, an array or a tensor; "
            f"got {type(source).__name__}."
        )
    path = Path(source)
    if not path.is_file():
        raise MissingFile(f"There is no image file at '{path}': check the path.")
    with path.open("rb") as file:
        return _decode(file, path.stat().st_size, name_of(source))


def name_of(source: ImageSource) -> str:
    """What sentences call a picture."""
    if isinstance(source, str | os.PathLike):
        return f"'{Path(source)}'"
    if isinstance(source, bytes):
        return "the given bytes"
    return "the given PIL image" if isinstance(source, Image.Image) else "the given array"


def _decode(file: BinaryIO, size: int, name: str) -> Image.Image:  # size in bytes
    if size == 0:
        raise UserError(f"The image {name} is an empty file: copy or download it again.")
    if size > MAX_BYTES:
        limit = f"{MAX_BYTES // 1_000_000} million bytes"
        raise UserError(f"The image {name} is too large (more than {limit}): shrink it first.")
    try:
        with warnings.catch_warnings():
            # we state our own limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a JPEG then decodes at 1/2, 1/4 or 1/8 size
    except Image.DecompressionBombError:
        raise UserError(_too_large(name, "far")) from None
    except UnidentifiedImageError:
        raise UserError(
            f"The file {name} is not an image this program can read: "
            "save it as PNG, JPEG, WebP or BMP."
        ) from None
    except _BROKEN as error:
        raise UserError(_broken(name, error)) from None
    return _to_rgba(image, name)


def _to_rgba(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) == 0:
        size = f"{image.width} x {image.height}"
        raise UserError(f"The image {name} has size {size}: give one with pixels in it.")
    if image.width * image.height > MAX_PIXELS:
        raise UserError(_too_large(name, f"{image.width} x {image.height} ="))
    start = image.tell()
    try:
        # reads all pixels, so that a cut-off file shows
        frame = ImageOps.exif_transpose(_shown_frame(image, name))
        rgba = _eight_bit(frame)
        rgba.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)  # premultiplies by alpha itself
        return _in_srgb(rgba, frame, name)
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(_broken(name, error)) from None
    finally:
        if image.tell() != start:
            image.seek(start)  # a PIL image is the caller's, who may go on with it


def _shown_frame(image: Image.Image, name: str) -> Image.Image:
    """Of an animation the first frame that shows something: some begin blank."""
    start = image.tell()
    frames = min(
        getattr(image, "n_frames", 1) - start, max(1, MAX_PIXELS // (image.width * image.height))
    )
    if frames < 2:
        return image
    for number in range(start, start + frames):
        image.seek(number)
        if _shows_something(image.convert("RGBA")):
            if number > start:
                taken = f"frame {number + 1} was taken, the first that shows something"
                _say(f"Of the animation {name} {taken}.")
            return image
    image.seek(start)
    return image


def _shows_something(frame: Image.Image) -> bool:
    """Whether some of it is visible, and not all of it the same."""
    rgba = np.asarray(frame)
    low, high = np.percentile(rgba.reshape(-1, 4), [0, 100], axis=0)
    return bool(high[3] > 64 and (high - low).max() > 64)


def _in_srgb(rgba: Image.Image, image: Image.Image, name: str) -> Image.Image:
    """RGBA of an image -> the same in sRGB, from the image's colour profile if any."""
    data = image.info.get("icc_profile")
    if not data:
        return rgba
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = _PROFILE_MODES[profile.profile.xcolor_space.strip()]  # pyright: ignore
        described = profile.profile.profile_description or ""  # pyright: ignore
        if "sRGB" in described:
            return rgba
        source = rgba.convert(mode)
        if mode == "CMYK":  # the four inks are in the picture only
            source = image.resize(rgba.size, Image.Resampling.BOX)
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(source, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, *_BROKEN):
        _say(f"The colour profile of {name} cannot be used; it was ignored: colours may be off.")
        return rgba
    converted = cast(Image.Image, converted)  # None only with inPlace
    converted.putalpha(rgba.getchannel("A"))
    return converted


def _say(doubt: str) -> None:
    # From this one place, so that Python says each sentence once, not at every reading.
    warnings.warn(doubt, Doubt, stacklevel=1)


def _too_large(name: str, size: str) -> str:
    size = f"{size} more than {MAX_PIXELS // 1_000_000} million pixels"
    return f"The image {name} is too large ({size}): shrink it below that first."


def _broken(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"The image {name} is broken or cut off ({reason}): copy, download or save it again."


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGBA, another image."""
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bit(image)
    if image.mode == "F":
        return _image_from_array(np.asarray(image)).convert("RGBA")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    # also honours a palette's transparency and a transparent key colour
    return image.convert("RGBA")


def _from_sixteen_bit(image: Image.Image) -> Image.Image:
    # PIL's own convert("L") clips at 255: a 16-bit picture would come out almost white
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"Integer pixels must lie in 0..65535, got {values.min()}..{values.max()}.")
    grey = Image.fromarray(_EIGHT_OF_SIXTEEN[values.astype(np.uint16)])
    key = image.info.get("transparency")  # the value that is transparent, if any
    opaque = (values != key) if isinstance(key, int) else np.ones_like(values, bool)
    alpha = Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))
    return Image.merge("RGBA", [grey, grey, grey, alpha])


def _as_array(source: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return source
    source = source.detach().cpu()
    return (source.float() if source.is_floating_point() else source).numpy()


def _image_from_array(array: np.ndarray) -> Image.Image:
    """[H, W] or [H, W, 1 | 3 | 4], uint8, uint16 or float in [0, 1] -> PIL image."""
    shape = tuple(array.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[-1] not in (1, 3, 4)):
        raise UserError(f"An image array must be [H, W] or [H, W, 1, 3 or 4], got shape {shape}.")
    if 0 in shape:
        raise UserError(f"The image array has no pixels, got shape {shape}.")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise UserError(_too_large("array", f"{shape[1]} x {shape[0]} ="))
    if len(shape) == 3 and shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(_array_to_bytes(array)))


def _array_to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return _EIGHT_OF_SIXTEEN[array]
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # neither holds for NaN
            found = f"{array.min()} to {array.max()}"
            raise UserError(f"A float image must be finite and in [0, 1], got {found}.")
        return np.round(array.astype(np.float32) * 255).astype(np.uint8)
    raise UserError(f"An image array must be uint8, uint16 or float in [0, 1], got {array.dtype}.")


def prepare_condition(
    source: ImageSource, size: int, fill: float | None = DEFAULT_FILL, background: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Picture -> (rgb [S, S, 3] on white, alpha [S, S, 1]), float32, S = size.

    fill: the longer side of the object's box as a share of the frame; the box is
        centred. The default is that of the training renders. Take 0.9 with SV3D's own
        weights, as their code does. None keeps the picture's framing (padded to a
        square), for renders.
    background: how the object is found, and warnings (`Doubt`), see `cut_out`.
    Raises UserError when there is no object to show.
    """
    if not 1 <= size <= MAX_SIDE or (fill is not None and not 0.05 <= fill <= 1):
        raise UserError(
            f"The size must be 1 to {MAX_SIDE} and fill in [0.05, 1] (or None); "
            f"got size {size}, fill {fill}."
        )
    image = cut_out(load_image(source), background, name_of(source))
    rgba = np.asarray(image).astype(np.float32) / 255
    # premultiplied: invisible colours must not bleed in when averaged
    rgba[..., :3] *= rgba[..., 3:]
    visible = rgba[..., 3] > VISIBLE_ALPHA
    if not visible.any():
        raise UserError(
            "No object found: nothing of the picture was left; "
            "give one with a transparent background."
        )
    if fill is not None:
        rgba = rgba[box_of(visible)]
    square = _fit_in_square(rgba, size, 1.0 if fill is None else fill)
    alpha = square[..., 3:]
    rgb = torch.from_numpy(square[..., :3] + (1 - alpha)).clamp(0, 1)
    return rgb, torch.from_numpy(alpha.copy())


def _fit_in_square(rgba: np.ndarray, size: int, fill: float) -> np.ndarray:
    """Premultiplied [h, w, 4] -> [size, size, 4], longer side = fill * size."""
    scale = fill * size / max(rgba.shape[:2])
    # Whole margins on both sides keep the centre exact, to less than a pixel of aspect.
    top, left = (min(round((size - scale * side) / 2), (size - 1) // 2) for side in rgba.shape[:2])
    square = np.zeros((size, size, 4), dtype=np.float32)
    square[top : size - top, left : size - left] = _resize(rgba, size - 2 * top, size - 2 * left)
    return square


def _resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, C] -> [height, width, C]: means over areas; bilinear to enlarge."""
    shrinks = height <= array.shape[0] and width <= array.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(array, -1, 0)]
    return np.stack([np.asarray(p.resize((width, height), method)) for p in planes], axis=-1)
