"""Which pixels of a picture are the object; and a sentence where that is doubtful.

There are two ways. `_by_own_alpha` takes the picture's alpha channel, if it can be a
mask: a mask has an outside, and what it leaves is no picture of its own. Otherwise
`_by_colour` finds a plain background: it has the colour of the border, hangs together
with it, and surrounds the object. The object is the largest piece with what belongs to
it; specks do not count. Where the background is not plain, the object is the largest
thing in colours that the border hardly has (`_unlike_border`).
"""

import importlib.util
import warnings

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from ..system.errors import Doubt, UserError

VISIBLE_ALPHA = 0.1  # fainter pixels (halos, compression noise) do not count
MAX_NOISE = 0.06  # of a plain backdrop: the median distance of its colours from their fit
MIN_CONTRAST = 0.06  # of the RGB cube's side: above JPEG noise
COLOUR_BINS = 24  # along each side of the RGB cube
RARE = 1e-3  # a colour that fewer of the border's pixels have

_NOT_PLAIN = (
    "The picture's background is not plain, so the object cannot be cut out by colour: "
    "give a PNG with a transparent background, or pip install 'rembg[cpu]'."
)
_ONE_COLOUR = "No object found: the picture is one plain colour; give one that shows the object."
# Doubts. Each goes on from "In <picture> ".
_BY_COLOUR = (
    "the background is not transparent and was removed by colour, which takes shadows for the "
    "object and works best on plain backgrounds; look at the result, or give a transparent PNG, "
    "or pip install 'rembg[cpu]'."
)
_TRIMMED = "the transparency only trims the picture; the object was cut out of the rest, by colour."
_WHOLE = (
    "what is not transparent may be a picture with a background of its own; "
    "all of it was taken for the object."
)
_SHADOW = "a soft, dark and half transparent rim was taken for a shadow and left out."
_APART = "something stands apart from the object and was left out; crop to what you want."
_FRAME = "bars or a frame of one colour were taken off, and the object was looked for inside."
_REACHES = (
    "the object seems to reach the border; "
    "of the two sides, the one around the other was taken for the background."
)
_CLUTTER = "the background is not plain; what is unlike the border was taken for the object."
_SMALL = "the object is very small: crop to it for more detail."


def cut_out(image: Image.Image, method: str = "auto", name: str = "the picture") -> Image.Image:
    """RGBA picture -> RGBA picture whose alpha marks the object.

    method: "auto" takes the picture's own alpha, if it can be a mask; else rembg, if
        installed; else "plain", which goes by the colours of the border: right for
        product shots, often right for a table before a wall, wrong where the object
        has the colours of what is around it. "rembg" and "plain" are taken
        whatever the others would do.
    name: of the picture, in the warnings (`Doubt`) that say what was taken for the
        object where that is doubtful.
    Raises UserError where no object can be told from the background.
    """
    if method not in ("auto", "rembg", "plain"):
        raise UserError(f"Background removal is 'auto', 'rembg' or 'plain', got {method!r}.")
    if method == "rembg" and not _has_rembg():
        raise UserError(
            "rembg is not installed: pip install 'rembg[cpu]', or let the background be 'plain'."
        )
    rgba = np.asarray(image).astype(np.float32) / 255
    if rgba[..., 3].max() < VISIBLE_ALPHA:
        raise UserError(
            "No object found: the picture is fully transparent; give one that shows the object."
        )
    cut, doubts = _by_own_alpha(rgba) if method == "auto" else (None, [])
    if cut is None and (method == "rembg" or (method == "auto" and _has_rembg())):
        import rembg  # optional; it downloads its network when first used  # pyright: ignore

        return rembg.remove(image)
    if cut is None:
        cut, doubts = _by_colour(_opaque(rgba))
        doubts = [_BY_COLOUR, *doubts]
    # All come from this one line, so that Python says each sentence once.
    for doubt in doubts:
        warnings.warn(f"In {name} {doubt}", Doubt, stacklevel=1)
    if cut is rgba:
        return image
    return Image.fromarray(np.round(cut.clip(0, 1) * 255).astype(np.uint8), "RGBA")


def _has_rembg() -> bool:
    # rembg without onnxruntime ends the interpreter on import, so look for both first
    return all(importlib.util.find_spec(name) is not None for name in ("rembg", "onnxruntime"))


# ---------------------------------------------------------- by the picture's own alpha


def _by_own_alpha(rgba: np.ndarray) -> tuple[np.ndarray | None, list[str]]:
    """[H, W, 4] -> (the same without specks and haze, doubts); None if no mask.

    Where the inside of a mask is a rectangle, or another shape that pictures are
    cropped to, with both mirror symmetries, it may be a picture and no object. That is
    doubtful if there is an object on a plain backdrop in it.
    """
    alpha = rgba[..., 3]
    if np.ptp(alpha) < 0.25:
        return None, []
    visible, doubts = _visible(rgba)
    if (~visible).sum() <= 1e-4 * visible.size:
        return None, []
    visible, apart = _with_its_pieces(visible, share=0.01)
    doubts += apart
    box = box_of(visible)
    inside = visible[box]
    mirrored = max((inside != inside[::-1]).mean(), (inside != inside[:, ::-1]).mean()) < 0.01
    rectangle = inside.mean() > 0.95
    cut_by_frame = bool(_border_values(visible).any())
    if mirrored and (rectangle or cut_by_frame):
        try:
            content, said = _by_colour(_opaque(rgba * visible[..., None])[box])
        except UserError:
            content = None
        if content is not None and rectangle and cut_by_frame:
            cut = np.zeros_like(rgba)
            cut[box] = content
            return cut, [_TRIMMED, *said]
        if content is not None or (rectangle and cut_by_frame):
            doubts.append(_WHOLE)
    near = ndimage.binary_dilation(visible, np.ones((5, 5)))  # with the faint rim of its edge
    if not (alpha > 0)[~near].any():
        return rgba, doubts
    return np.where(near[..., None], rgba, 0), doubts


def _visible(rgba: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """[H, W, 4] -> (bool [H, W], more than haze and no soft shadow; doubts)."""
    alpha = rgba[..., 3]
    level = VISIBLE_ALPHA
    haze = _border_values(alpha)[_border_values(alpha) < 0.5]
    if (alpha == 0).mean() < 0.05 and haze.size:  # nowhere clean: the border says how thick it is
        level = max(level, float(np.percentile(haze, 99)) + 0.04)
    clear = alpha <= level
    # A drop shadow is black and fades in small steps; dark glass ends in a large one.
    step = ndimage.maximum_filter(alpha, 3) - ndimage.minimum_filter(alpha, 3)
    soft = (alpha < 0.6) & (rgba[..., :3].max(-1) < 0.25) & (step < 0.1)
    labels, count = _label(clear | soft)
    outside = np.zeros(count + 1, bool)
    outside[labels[clear]] = True
    outside[0] = False
    shadow = outside[labels] & ~clear
    if shadow.sum() < 0.02 * (~clear).sum():
        return ~clear, []
    return ~(clear | shadow), [_SHADOW]


def _opaque(rgba: np.ndarray) -> np.ndarray:
    """[H, W, 4] -> rgb [H, W, 3]; transparent pixels take the nearest colour."""
    clear = rgba[..., 3] < min(0.5, 0.5 * rgba[..., 3].max())
    if not clear.any():
        return rgba[..., :3]
    nearest = ndimage.distance_transform_edt(clear, return_distances=False, return_indices=True)
    rows, columns = np.asarray(nearest)
    return rgba[rows, columns, :3]


def _label(mask: np.ndarray, corners: bool = False) -> tuple[np.ndarray, int]:
    """bool [H, W] -> (the number of each pixel's piece, 0 = none; how many pieces).

    corners: pixels that touch at a corner hang together.
    """
    labels, count = ndimage.label(mask, np.ones((3, 3)) if corners else None)  # pyright: ignore
    return labels, count


def _with_its_pieces(mask: np.ndarray, share: float) -> tuple[np.ndarray, list[str]]:
    """bool [H, W] -> (its largest piece and what belongs to that; doubts).

    A piece belongs to it that is near, or has at least `share` of its size.
    """
    labels, _ = _label(mask, corners=True)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = sizes.max()
    solid = (sizes > 0.1 * share * largest)[labels]  # the rest is specks
    reach = 2 * round(0.05 * np.sqrt(largest)) + 1
    groups, _ = _label(ndimage.maximum_filter(solid, reach), corners=True)
    groups = np.where(solid, groups, 0)
    sizes = np.bincount(groups.ravel())
    sizes[0] = 0
    kept = sizes >= share * sizes.max()
    apart = sizes[~kept].max(initial=0) > 0.002 * sizes.max()
    return kept[groups], [_APART] if apart else []


# ------------------------------------------------ by the colour of a plain background


def _by_colour(rgb: np.ndarray, framed: bool = False) -> tuple[np.ndarray, list[str]]:
    """[H, W, 3] -> (rgba [H, W, 4], doubts); uniform bars and frames are taken off."""
    inner = _inside_frame(rgb)
    if rgb[inner].shape != rgb.shape:
        try:
            found, doubts = _by_colour(rgb[inner], framed=True)
        except UserError:
            return _on_backdrop(rgb)  # it is no picture in a frame, but a box on a backdrop
        cut = np.zeros((*rgb.shape[:2], 4), np.float32)
        cut[inner] = found
        return cut, [_FRAME, *(doubt for doubt in doubts if doubt != _FRAME)]
    return _on_backdrop(rgb, framed)


def _inside_frame(rgb: np.ndarray) -> tuple[slice, slice]:
    """[H, W, 3] -> rows and columns within uniform bars with straight ends."""
    turned = rgb.swapaxes(0, 1)
    sides = [rgb, rgb[::-1], turned, turned[::-1]]  # each has its bar on top
    depths = [_bar_depth(side) for side in sides]
    for _ in sides:  # a side without a bar can make the others' lines longer
        rows = slice(depths[0], len(rgb) - depths[1])
        columns = slice(depths[2], len(turned) - depths[3])
        across = [columns, columns, rows, rows]
        starts = [_start_below(*bar) for bar in zip(sides, depths, across)]
        depths = [depth if start else 0 for depth, start in zip(depths, starts)]
    rows = slice(starts[0], len(rgb) - starts[1])
    columns = slice(starts[2], len(turned) - starts[3])
    is_picture = min(rgb[rows, columns].shape[:2]) >= 8
    return (rows, columns) if is_picture else (slice(None), slice(None))


def _bar_depth(rgb: np.ndarray) -> int:
    """How many rows from the top have, throughout, the colour of the first."""
    some = rgb[:, :: max(1, rgb.shape[1] // 300)]
    far = _distance(some, np.median(rgb[0], axis=0)) > MIN_CONTRAST
    rows = np.flatnonzero(far.mean(-1) > 0.05)
    return int(rows[0]) if len(rows) else 0


def _start_below(rgb: np.ndarray, depth: int, across: slice) -> int:
    """The row below a bar of about this depth; 0 where no jump is all along it."""
    jpeg = 10  # rows in which a jump may echo
    inside = rgb[min(depth + jpeg, len(rgb) - 1), across]
    jump = _distance(rgb[max(depth - 2, 0), across], inside)
    if depth == 0 or jump.size == 0 or (jump > MIN_CONTRAST).mean() < 0.95:
        return 0
    rows = rgb[depth : depth + jpeg + 1, across]
    arrived = (_distance(rows, inside) < 0.5 * jump).mean(-1) > 0.5
    return depth + int(arrived.argmax())


def _on_backdrop(rgb: np.ndarray, framed: bool = False) -> tuple[np.ndarray, list[str]]:
    """[H, W, 3] -> (rgba [H, W, 4], doubts).

    The border shows one plain colour; or two, of which one is the object's. Of two, the
    background is the one whose convex hull holds more of the other: that is doubtful.
    """
    choices = []
    doubts = []
    for backdrop, tolerance in _backdrops(rgb):
        distance = _distance(rgb, backdrop)
        background = _background_regions(distance / tolerance)
        choices.append((backdrop, distance, background))
    shares = [float(_border_values(background).mean()) for *_, background in choices]
    two_plain = len(shares) == 2 and sum(shares) > 0.85
    if not framed and (not shares or shares[0] < 0.6):  # within a frame it may be a print
        thing = _unlike_border(rgb, [background for *_, background in choices])
        if thing.any():
            behind = _opaque(np.dstack([rgb, ~ndimage.binary_dilation(thing, iterations=2)]))
            return _matted(rgb, thing, behind, _distance(rgb, behind)), [_CLUTTER]
    if not shares or (shares[0] < 0.5 and not two_plain):
        raise UserError(_NOT_PLAIN)
    if two_plain:
        choices.sort(key=lambda choice: _surrounds(choice[2]), reverse=True)
    if two_plain or shares[0] < 0.7:
        doubts.append(_REACHES)
    backdrop, distance, background = choices[0]
    mask = ~background
    if not mask.any():
        raise UserError(_ONE_COLOUR)
    mask, apart = _with_its_pieces(mask, share=0.1)
    if mask.sum() < max(4, 1e-5 * mask.size):
        raise UserError(_ONE_COLOUR)
    if mask.sum() < 1e-3 * mask.size:
        doubts.append(_SMALL)
    return _matted(rgb, mask, backdrop, distance), doubts + apart


def _matted(
    rgb: np.ndarray, mask: np.ndarray, backdrop: np.ndarray, distance: np.ndarray
) -> np.ndarray:
    """The object of a mask, bool [H, W] -> rgba [H, W, 4], its edge unmixed."""
    cut = np.zeros((*mask.shape, 4), np.float32)
    box = box_of(mask)
    alpha = _soften_edge(mask[box], distance[box])[..., None]
    tint = (1 - alpha) * backdrop[box]  # of the backdrop, in the edge
    colours = (rgb[box] - tint) / np.maximum(alpha, 1e-3)
    cut[box] = np.concatenate([colours, alpha], axis=-1).clip(0, 1)
    return cut


def _unlike_border(rgb: np.ndarray, grounds: list[np.ndarray]) -> np.ndarray:
    """[H, W, 3] -> the largest thing in colours that the border hardly has, [H, W].

    The border shows what is behind, plain or not: a table and a wall, other things.
    What reaches it is cut by the frame, and not what was photographed. Nor is what lies
    on one plain ground (bool [H, W] each): a logo on a box that fills the picture.
    """
    every = max(1, max(rgb.shape) // 512)
    plain = [ground[::every, ::every] for ground in grounds]
    bins = tuple(np.moveaxis((rgb[::every, ::every] * (COLOUR_BINS - 1e-3)).astype(int), -1, 0))
    border = tuple(_border_values(channel) for channel in bins)
    counts = np.zeros((COLOUR_BINS,) * 3)
    np.add.at(counts, border, 1 / len(border[0]))
    rare = ndimage.gaussian_filter(counts, 0.7, mode="constant")[bins] < RARE
    rare &= ~np.any(plain, axis=0)
    reach = max(1, round(0.006 * min(rare.shape)))  # specks and the grain of wood are thinner
    rare = ndimage.binary_closing(rare, iterations=reach) | rare
    labels, count = _label(ndimage.binary_opening(rare, iterations=reach))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[np.append(_border_values(labels), 0)] = 0
    if sizes.max() < 0.01 * rare.size:
        return np.zeros(rgb.shape[:2], bool)
    # with what is thin about it, such as legs
    thing = ndimage.binary_dilation(labels == sizes.argmax(), iterations=reach, mask=rare)
    rim = ndimage.binary_dilation(thing, iterations=2) & ~thing
    if any(ground[rim].mean() > 0.9 for ground in plain):
        return np.zeros(rgb.shape[:2], bool)
    holes, count = _label(~thing)
    sizes = np.bincount(holes.ravel(), minlength=count + 1)
    thing |= (sizes < 0.03 * thing.sum())[holes]  # parts in the border's colours; not a handle's
    return thing.repeat(every, 0).repeat(every, 1)[: rgb.shape[0], : rgb.shape[1]]


def _surrounds(ground: np.ndarray) -> float:
    """bool [H, W] -> share of the other pixels within the ground's convex hull."""
    every = max(1, max(ground.shape) // 64)
    ground = ground[::every, ::every]
    inside = np.argwhere(ground)
    other = np.argwhere(~ground)
    try:
        planes = ConvexHull(inside).equations
    except (QhullError, ValueError):  # a line, or nothing
        return 0.0
    return float((other @ planes[:, :2].T + planes[:, 2] < 1e-6).all(-1).mean())


def _border_values(array: np.ndarray) -> np.ndarray:
    """[H, W, ...] -> [P, ...], the outermost pixels."""
    return np.concatenate([array[0], array[-1], array[1:-1, 0], array[1:-1, -1]])


def _backdrops(rgb: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """[H, W, 3] -> up to two (backdrop [H, W, 3], colour distance that still fits).

    A backdrop shades as a polynomial of second degree in x and y. It grows from a
    stretch of the border over all of the border that fits. The first explains the most
    of the border, the second the most of the rest.
    """
    basis = _basis(*rgb.shape[:2])
    sparse = slice(None, None, max(1, sum(rgb.shape[:2]) // 250))
    border = _border_values(basis)[sparse]
    colours = _border_values(rgb)[sparse]
    free = np.ones(len(border), bool)
    found = []
    for _ in range(2):
        stretches = np.array_split(np.arange(len(border)), min(24, len(border)))
        grown = [_grown(border, colours, free, s) for s in stretches if free[s].mean() > 0.5]
        grown = [one for one in grown if one is not None and one[0].mean() > 0.03]
        if not grown:
            break
        fits, coefficients, tolerance = max(grown, key=lambda one: one[0].sum())
        free &= ~fits
        found.append((basis @ coefficients, tolerance))
    return found


def _basis(height: int, width: int) -> np.ndarray:
    """[H, W, 6]: the monomials of second degree in x and y, which go from -1 to 1."""
    sides = (np.linspace(-1, 1, size).astype(np.float32) for size in (height, width))
    y, x = np.meshgrid(*sides, indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1)


def _fit(basis: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Least squares, [P, 6] and [P, 3] -> [6, 3]; a penalty keeps the unseen flat."""
    penalty = 1e-3 * len(basis) * np.diag([0, 1, 1, 1, 1, 1])
    return np.linalg.solve(basis.T @ basis + penalty, basis.T @ colours).astype(np.float32)


def _grown(
    basis: np.ndarray, colours: np.ndarray, free: np.ndarray, stretch: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """A backdrop from one stretch (indices) of the border's free pixels (bool [P]).

    -> (which of them fit, bool [P]; coefficients [6, 3]; tolerance). None: not plain.
    """
    fit = np.zeros((6, 3), np.float32)
    fit[0] = np.median(colours[stretch][free[stretch]], axis=0)
    distance = _distance(colours, basis @ fit)
    noise = float(np.median(distance[stretch]))
    for _ in range(6):
        tolerance = max(MIN_CONTRAST, 4 * noise)
        fits = free & (distance < tolerance)
        if noise > MAX_NOISE or not fits.any():
            return None
        fit = _fit(basis[fits], colours[fits])
        distance = _distance(colours, basis @ fit)
        noise = float(np.median(distance[fits]))
    return free & (distance < tolerance), fit, tolerance


def _distance(rgb: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Euclidean, [..., 3] and [..., 3] -> [...]."""
    return np.sqrt(sum((rgb[..., c] - other[..., c]) ** 2 for c in range(3)))


def _background_regions(distance: np.ndarray) -> np.ndarray:
    """Distance to the backdrop [H, W] -> bool [H, W], the background.

    It reaches the border, or is a clear hole (a mug's handle).
    """
    labels, count = _label(distance < 1)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sums = np.bincount(labels.ravel(), weights=distance.ravel(), minlength=count + 1)
    mean = sums / np.maximum(sizes, 1)
    # an enclosed region counts only if it matches the backdrop closely
    reached = (mean < 0.3) & (sizes > 4)
    reached[_border_values(labels)] = True
    reached[0] = False  # label 0: what does not have the background's colour
    return reached[labels]


def _soften_edge(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """bool [H, W] -> alpha [H, W]: edge pixels mix object and backdrop by colour."""
    edge = mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=1)
    share = distance / np.maximum(ndimage.maximum_filter(distance, 5), 1e-6)
    return np.where(edge, share, mask).astype(np.float32)


def box_of(mask: np.ndarray) -> tuple[slice, slice]:
    """bool [H, W], not empty -> the rows and columns of what is in it."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
