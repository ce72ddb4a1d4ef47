"""The numba kernels behind `rendering/rasterizer.py`, which explains the plan.

Nothing here knows about PyTorch. How to read them:
    Every kernel is called as kernel(part, parts, ...) by `parts` threads at once, and
        does its share of the work.
    `v_x` means dL/dx. A `splat` is one Gaussian seen by one view; a `pair` is a splat
        in the list of one tile.
    `real` is the scalar type of the arrays: float32, or float64 in gradient tests.
        Python's literals are float64 and would double the width of every SIMD register,
        so the inner loops convert their constants.

Arrays:
    splats [V, G] of the fields below: 64 bytes in float32, exactly one cache line
    boxes [V, G]: which tiles a splat may touch, and where its pairs begin
    tile_starts [V * tiles + 1]: tile t of all views owns the pairs tile_starts[t] to
        tile_starts[t + 1] - 1, near to far
    pair_splats, pair_rows [pairs]: the Gaussian of a pair, and its row in `gradients`
    gradients [pairs, 10]: a row for each pair, so no two threads add to one number
"""

import math
import os
import stat
import tempfile
from collections import namedtuple
from pathlib import Path

import numba
import numpy as np
from numba import njit

from .constants import (
    ALPHA_MAX,
    ALPHA_MIN,
    EPS2D,
    FAR_PLANE,
    FRUSTUM_MARGIN,
    NEAR_PLANE,
    TRANSMITTANCE_MIN,
)

TILE = 16  # pixels; one thread blends a tile
BLOCK = 4  # pixels; the LANES pixels of a 4 x 4 block are blended in lockstep
LANES = BLOCK * BLOCK
BLOCKS_ACROSS = TILE // BLOCK
BLOCKS = BLOCKS_ACROSS * BLOCKS_ACROSS
BATCH = 32  # splats fetched together: their cache misses overlap

# sigma(p) = (qxx dx + qxy dy) dx + qyy dy^2 with (dx, dy) = p - (x, y), and alpha(p) =
# opacity exp(-sigma(p)), which is at least ALPHA_MIN exactly where sigma <= cutoff:
# within +- extent pixels. `pad` fills the cache line.
SPLAT_FIELDS = (
    "x y qxx qxy qyy opacity cutoff red green blue depth extent_x extent_y pad0 pad1 pad2".split()
)
# Tile columns x0 to x1, rows y0 to y1 (ends excluded), and the row of the first pair.
BOX = np.dtype([(name, np.int32) for name in ("x0", "x1", "y0", "y1", "first_pair")])
# Columns of `gradients`, summed over pixels; S is dL/dsigma, S_DX is dL/dsigma dx, ...
S, S_DX, S_DY, S_DXDX, S_DXDY, S_DYDY, V_RED, V_GREEN, V_BLUE, V_DEPTH = range(10)
NUM_GRADIENTS = 10

# Coefficients of `exp_negative`.
E0 = 1.0
E1 = -0.999999832940429 / 8
E2 = 0.49999556138498963 / 8**2
E3 = -0.16662667204795964 / 8**3
E4 = 0.04149823434851184 / 8**4
E5 = -0.007967462665790364 / 8**5
E6 = 0.0009832469146167661 / 8**6


def keeps_kernels() -> bool:
    """Whether numba finds a folder for compiled code; else `cache=True` is an error."""
    try:
        njit(cache=True)(keeps_kernels)  # decides where, compiles nothing
    except RuntimeError:
        return False
    return True


def private_folder() -> Path | None:
    """A folder for compiled code in the system's temporary one, of this user alone.

    numba unpickles what it finds in its folder, so one that another user made or may
    write to is not taken: then None.
    """
    if not hasattr(os, "getuid"):  # Windows: its temporary folder is the user's own
        return Path(tempfile.gettempdir()) / "gsv3d-numba"
    folder = Path(tempfile.gettempdir()) / f"gsv3d-numba-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if own else None


def choose_cache() -> bool:
    """Where compiled kernels are kept; False where there is no place at all.

    As numba does it, that is beside this file, else in the user's cache. For a
    read-only installation and a user without a home it is a temporary folder.
    """
    if not keeps_kernels() and (folder := private_folder()) is not None:
        numba.config.CACHE_DIR = str(folder)
    return keeps_kernels()


CACHE = choose_cache()

# Where user data enters, no `nnan` or `ninf`: a NaN has to fail the comparisons that
# keep it out of the image.
COMMON = dict(error_model="numpy", cache=CACHE, nogil=True)
SAFE = COMMON | {"fastmath": {"contract", "arcp", "nsz"}}
FAST = COMMON | {"fastmath": {"contract", "arcp", "nsz", "reassoc", "nnan"}}


def splat_dtype(real) -> np.dtype:
    """The record of one splat, all fields of the scalar type `real`."""
    return np.dtype([(name, real) for name in SPLAT_FIELDS])


# ---------------------------------------------------------------- projection
# 3-vectors are tuples: a slice of an array counts references, which costs more than the
# arithmetic.

# right, down, forward: the rows of the world-to-camera rotation; fx, fy, cx, cy in
# pixels.
Camera = namedtuple("Camera", "right down forward translation fx fy cx cy")


@njit(**SAFE)
def vector(rows, i):
    return rows[i, 0], rows[i, 1], rows[i, 2]


@njit(**SAFE)
def get_camera(viewmats, Ks, v):
    right = viewmats[v, 0, 0], viewmats[v, 0, 1], viewmats[v, 0, 2]
    down = viewmats[v, 1, 0], viewmats[v, 1, 1], viewmats[v, 1, 2]
    forward = viewmats[v, 2, 0], viewmats[v, 2, 1], viewmats[v, 2, 2]
    translation = viewmats[v, 0, 3], viewmats[v, 1, 3], viewmats[v, 2, 3]
    fx, fy, cx, cy = Ks[v, 0, 0], Ks[v, 1, 1], Ks[v, 0, 2], Ks[v, 1, 2]
    return Camera(right, down, forward, translation, fx, fy, cx, cy)


@njit(**SAFE)
def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(**SAFE)
def scaled(a, s):
    return a[0] * s, a[1] * s, a[2] * s


@njit(**SAFE)
def plus(a, u, b):
    """a + u b for 3-vectors a and b."""
    return a[0] + u * b[0], a[1] + u * b[1], a[2] + u * b[2]


@njit(**SAFE)
def rotation_columns(w, x, y, z):
    """Columns of the rotation matrix of a unit quaternion."""
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )


@njit(**SAFE)
def half_axes(quats, scales, g):
    """Half axes of ellipsoid g in the world (columns of R S), columns of R, and more.

    Those are the unit quaternion and 1 / |quaternion|. Lengths below 1e-12 count as
    1e-12, as in `torch.nn.functional.normalize`.
    """
    w, x, y, z = quats[g, 0], quats[g, 1], quats[g, 2], quats[g, 3]
    inverse_norm = 1 / max(math.sqrt(w * w + x * x + y * y + z * z), 1e-12)
    w, x, y, z = w * inverse_norm, x * inverse_norm, y * inverse_norm, z * inverse_norm
    a, b, c = rotation_columns(w, x, y, z)
    axes = scaled(a, scales[g, 0]), scaled(b, scales[g, 1]), scaled(c, scales[g, 2])
    return axes, (a, b, c), (w, x, y, z), inverse_norm


@njit(**SAFE)
def to_camera(mean, camera):
    """World point -> camera point (x, y, z)."""
    x, y, z = camera.translation
    return dot(camera.right, mean) + x, dot(camera.down, mean) + y, dot(camera.forward, mean) + z


@njit(**SAFE)
def clamped_slope(a, z, focal, centre, size):
    """a / z limited to a margin around the image, and its derivative by a.

    Beyond the margin the linearisation would explode.
    """
    slope, margin = a / z, FRUSTUM_MARGIN * size
    clamped = min(max(slope, (-margin - centre) / focal), (size + margin - centre) / focal)
    return clamped, 1 / z if clamped == slope else 0.0


@njit(**SAFE)
def linearise(x, y, z, camera, width, height):
    """How a small step in the world moves the pixel in x and y, at a camera point.

    Also returns the slopes x / z and y / z in it, and their derivatives by x and y.
    """
    fx, fy = camera.fx / z, camera.fy / z
    slope_x, by_x = clamped_slope(x, z, camera.fx, camera.cx, width)
    slope_y, by_y = clamped_slope(y, z, camera.fy, camera.cy, height)
    row_x = plus(scaled(camera.right, fx), -fx * slope_x, camera.forward)
    row_y = plus(scaled(camera.down, fy), -fy * slope_y, camera.forward)
    return row_x, row_y, slope_x, slope_y, by_x, by_y


@njit(**SAFE)
def project_axes(row, axes):
    return dot(row, axes[0]), dot(row, axes[1]), dot(row, axes[2])


@njit(**SAFE)
def tile_range(low, high, size):
    """First and one-past-last tile of the image between two pixel coordinates."""
    return max(0, int(math.floor(low))) // TILE, min(size - 1, int(math.floor(high))) // TILE + 1


@njit(**SAFE)
def project_one(mean, axes, opacity, color, camera, width, height, splat, box):
    """Fill one splat and its box; the box stays empty when nothing can be seen."""
    box.x0, box.x1, box.y0, box.y1 = 0, 0, 0, 0
    x, y, z = to_camera(mean, camera)
    # Every test is written so that a NaN answers "not visible".
    if not (opacity >= ALPHA_MIN and z > NEAR_PLANE and z < FAR_PLANE):
        return
    row_x, row_y, _, _, _, _ = linearise(x, y, z, camera, width, height)
    u, v = project_axes(row_x, axes), project_axes(row_y, axes)
    # J W R S S^T R^T W^T J^T is the sum of outer products of the projected half axes.
    cov_xx, cov_xy, cov_yy = dot(u, u) + EPS2D, dot(u, v), dot(v, v) + EPS2D
    determinant = cov_xx * cov_yy - cov_xy * cov_xy
    cutoff = math.log(opacity / ALPHA_MIN)
    extent_x, extent_y = math.sqrt(2 * cutoff * cov_xx), math.sqrt(2 * cutoff * cov_yy)
    pixel_x, pixel_y = camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy
    inside_x = pixel_x + extent_x > 0 and pixel_x - extent_x < width
    inside_y = pixel_y + extent_y > 0 and pixel_y - extent_y < height
    if not (determinant > 0 and inside_x and inside_y):
        return
    splat.x, splat.y, splat.depth = pixel_x, pixel_y, z
    splat.qxx = 0.5 * cov_yy / determinant
    splat.qxy = -cov_xy / determinant
    splat.qyy = 0.5 * cov_xx / determinant
    splat.opacity, splat.cutoff = opacity, cutoff
    splat.extent_x, splat.extent_y = extent_x, extent_y
    splat.red, splat.green, splat.blue = color
    box.x0, box.x1 = tile_range(pixel_x - extent_x, pixel_x + extent_x, width)
    box.y0, box.y1 = tile_range(pixel_y - extent_y, pixel_y + extent_y, height)


@njit(**SAFE)
def project_gaussians(
    part, parts, means, quats, scales, opacities, colors, viewmats, Ks, width, height, splats, boxes
):
    """Fill splats and boxes [V, G] from the Gaussians [G] and cameras [V]."""
    for g in range(len(means) * part // parts, len(means) * (part + 1) // parts):
        mean, color = vector(means, g), vector(colors, g)
        axes, _, _, _ = half_axes(quats, scales, g)
        for view in range(len(viewmats)):
            camera = get_camera(viewmats, Ks, view)
            splat, box = splats[view, g], boxes[view, g]
            project_one(mean, axes, opacities[g], color, camera, width, height, splat, box)


# ---------------------------------------------------------------- lists of pairs


@njit(**SAFE)
def number_pairs(part, parts, boxes, num_pairs):
    """Number each view's pairs in the order of the Gaussians; count them [V]."""
    for view in range(part, len(boxes), parts):
        count = 0
        for g in range(boxes.shape[1]):
            box = boxes[view, g]
            box.first_pair = count
            count += (box.x1 - box.x0) * (box.y1 - box.y0)
        num_pairs[view] = count


@njit(**SAFE)
def radix_argsort(keys, ids, count):
    """Sort the first `count` ids by their uint32 keys, stably, 11 bits at a time."""
    next_keys, next_ids = np.empty_like(keys), np.empty_like(ids)
    for shift in (0, 11, 22):
        starts = np.zeros(2049, np.int64)
        for i in range(count):
            starts[((keys[i] >> shift) & 2047) + 1] += 1
        for digit in range(2048):
            starts[digit + 1] += starts[digit]
        for i in range(count):
            digit = (keys[i] >> shift) & 2047
            next_keys[starts[digit]], next_ids[starts[digit]] = keys[i], ids[i]
            starts[digit] += 1
        keys, next_keys, ids, next_ids = next_keys, keys, next_ids, ids
    return ids[:count]


@njit(**SAFE)
def near_to_far(boxes, depth_keys, view):
    """Ids of the visible splats of a view, near to far."""
    keys, ids = np.empty(boxes.shape[1], np.uint32), np.empty(boxes.shape[1], np.int32)
    count = 0
    for g in range(boxes.shape[1]):
        if boxes[view, g].x1 > boxes[view, g].x0 and boxes[view, g].y1 > boxes[view, g].y0:
            keys[count], ids[count] = depth_keys[view, g], g
            count += 1
    return radix_argsort(keys, ids, count)


@njit(**SAFE)
def list_pairs(
    part, parts, depth_keys, boxes, view_starts, tiles_x, tiles_y,
    tile_starts, pair_splats, pair_rows,
):  # fmt: skip
    """Fill each tile's list; splats arrive near to far, so no list needs sorting."""
    for view in range(part, len(boxes), parts):
        # first the lengths of the lists, then where to write next
        cursors = np.zeros(tiles_x * tiles_y, np.int64)
        for g in range(boxes.shape[1]):
            box = boxes[view, g]
            for y in range(box.y0, box.y1):
                for x in range(box.x0, box.x1):
                    cursors[y * tiles_x + x] += 1
        end = view_starts[view]
        for tile in range(tiles_x * tiles_y):
            start, end = end, end + cursors[tile]
            cursors[tile], tile_starts[view * tiles_x * tiles_y + tile] = start, start
        for g in near_to_far(boxes, depth_keys, view):
            box = boxes[view, g]
            row = view_starts[view] + box.first_pair
            for y in range(box.y0, box.y1):
                for x in range(box.x0, box.x1):
                    pair = cursors[y * tiles_x + x]
                    cursors[y * tiles_x + x] += 1
                    pair_splats[pair], pair_rows[pair] = g, row
                    row += 1


# ---------------------------------------------------------------- blending
# The state of a block is ONE contiguous row, several times LANES numbers at constant
# offsets: only then does LLVM turn the loops over LANES into single AVX instructions.
# For the same reason decisions are selects instead of branches, and a count is a float.
# TRANSMITTANCE < 0: the pixel is finished. RED to ALPHA: sums; backward dL/d(sums).
# TO_COME: backward, what the splats not yet passed contribute to L.
TRANSMITTANCE, PIXEL_X, PIXEL_Y, SIGMA = (k * LANES for k in range(4))
RED, GREEN, BLUE, DEPTH, ALPHA, TO_COME, STATE = (k * LANES for k in range(4, 11))


@njit(**FAST)
def start_blocks(blocks, left, top, width, height):
    """A tile's pixel centres, transmittance 1; outside of the image all is finished."""
    real = blocks.dtype.type
    for b in range(BLOCKS):
        for i in range(LANES):
            x = left + b % BLOCKS_ACROSS * BLOCK + i % BLOCK
            y = top + b // BLOCKS_ACROSS * BLOCK + i // BLOCK
            blocks[b, PIXEL_X + i], blocks[b, PIXEL_Y + i] = real(x + 0.5), real(y + 0.5)
            blocks[b, TRANSMITTANCE + i] = real(1) if x < width and y < height else real(-1)


@njit(**FAST)
def find_live(blocks, live):
    """Mark the blocks that have unfinished pixels; returns whether there are any."""
    any_live = False
    for b in range(BLOCKS):
        live[b] = False
        for i in range(LANES):
            live[b] |= blocks[b, TRANSMITTANCE + i] > 0
        any_live |= live[b]
    return any_live


@njit(inline="always", **FAST)
def block_range(low, high, origin):
    """First and one-past-last block of a tile between two pixel coordinates."""
    return max(0, int(low) - origin) // BLOCK, min(TILE - 1, int(high) - origin) // BLOCK + 1


@njit(inline="always", **FAST)
def evaluate_sigma(block, splat):
    """sigma at the pixels of a block; returns how many live ones the splat reaches."""
    real = block.dtype.type
    x, y, qxx, qxy, qyy, cutoff = splat.x, splat.y, splat.qxx, splat.qxy, splat.qyy, splat.cutoff
    reached = real(0)
    for i in range(LANES):
        dx, dy = block[PIXEL_X + i] - x, block[PIXEL_Y + i] - y
        sigma = (qxx * dx + qxy * dy) * dx + qyy * dy * dy
        block[SIGMA + i] = sigma
        reached += real(1) if (sigma <= cutoff) & (block[TRANSMITTANCE + i] > real(0)) else real(0)
    return reached


@njit(inline="always", **FAST)
def touched_blocks(blocks, live, splat, left, top, touched):
    """List the live blocks of a tile that a splat reaches; returns their number.

    Their sigma is left in them. Finding them first and blending them afterwards keeps
    unpredictable branches out of the expensive part.
    """
    x0, x1 = block_range(splat.x - splat.extent_x, splat.x + splat.extent_x, left)
    y0, y1 = block_range(splat.y - splat.extent_y, splat.y + splat.extent_y, top)
    count = 0
    for block_y in range(y0, y1):
        for block_x in range(x0, x1):
            b = block_y * BLOCKS_ACROSS + block_x
            touched[count] = b  # overwritten by the next one unless it counts
            count += live[b] and evaluate_sigma(blocks[b], splat) > 0
    return count


@njit(inline="always", **FAST)
def exp_negative(s, real):
    """exp(-s) = p(s)^8, p the minimax fit of exp(-s / 8) on [0, ln 255].

    Its relative error is 2e-8. No blended pixel has a larger s, and LLVM could not
    vectorise a call to a library.
    """
    p = real(E5) + s * real(E6)
    p = real(E3) + s * (real(E4) + s * p)
    p = real(E1) + s * (real(E2) + s * p)
    p = real(E0) + s * p
    p *= p
    p *= p
    return p * p


@njit(inline="always", **FAST)
def blend_block(block, splat):
    """Blend one splat into the sums of a block."""
    real = block.dtype.type
    zero, one, t_min, alpha_max = real(0), real(1), real(TRANSMITTANCE_MIN), real(ALPHA_MAX)
    opacity, cutoff, depth = splat.opacity, splat.cutoff, splat.depth
    red, green, blue = splat.red, splat.green, splat.blue
    for i in range(LANES):
        s, before = block[SIGMA + i], block[TRANSMITTANCE + i]
        alpha = min(opacity * exp_negative(s, real), alpha_max)
        hit = (s <= cutoff) & (before > zero)
        after = before - before * alpha
        weight = alpha * before if hit & (after > t_min) else zero
        block[RED + i] += weight * red
        block[GREEN + i] += weight * green
        block[BLUE + i] += weight * blue
        block[DEPTH + i] += weight * depth
        block[ALPHA + i] += weight
        block[TRANSMITTANCE + i] = (after if after > t_min else -one) if hit else before


@njit(inline="always", **FAST)
def blend_block_backward(block, splat, sums):
    """Pass one splat again, front to back; add its gradients to sums [10 * LANES].

    With f = dL/d(sums) . (r, g, b, z, 1) of this splat and F what the splats behind it
    contribute to L, dL/dalpha = T f - F / (1 - alpha): brightening this splat dims
    everything behind it.
    """
    real = block.dtype.type
    zero, one, t_min, alpha_max = real(0), real(1), real(TRANSMITTANCE_MIN), real(ALPHA_MAX)
    x, y, opacity, cutoff, depth = splat.x, splat.y, splat.opacity, splat.cutoff, splat.depth
    red, green, blue = splat.red, splat.green, splat.blue
    for i in range(LANES):
        s, before = block[SIGMA + i], block[TRANSMITTANCE + i]
        unclamped = opacity * exp_negative(s, real)
        alpha = min(unclamped, alpha_max)
        hit = (s <= cutoff) & (before > zero)
        after = before - before * alpha
        blended = hit & (after > t_min)
        weight = alpha * before if blended else zero
        v_red, v_green, v_blue = block[RED + i], block[GREEN + i], block[BLUE + i]
        v_depth = block[DEPTH + i]
        f = v_red * red + v_green * green + v_blue * blue + v_depth * depth + block[ALPHA + i]
        to_come = block[TO_COME + i] - weight * f
        v_alpha = before * f - to_come / (one - alpha)
        v_sigma = -alpha * v_alpha if blended & (unclamped <= alpha_max) else zero
        dx, dy = block[PIXEL_X + i] - x, block[PIXEL_Y + i] - y
        v_dx, v_dy = v_sigma * dx, v_sigma * dy
        sums[S * LANES + i] += v_sigma
        sums[S_DX * LANES + i] += v_dx
        sums[S_DY * LANES + i] += v_dy
        sums[S_DXDX * LANES + i] += v_dx * dx
        sums[S_DXDY * LANES + i] += v_dx * dy
        sums[S_DYDY * LANES + i] += v_dy * dy
        sums[V_RED * LANES + i] += weight * v_red
        sums[V_GREEN * LANES + i] += weight * v_green
        sums[V_BLUE * LANES + i] += weight * v_blue
        sums[V_DEPTH * LANES + i] += weight * v_depth
        block[TO_COME + i] = to_come
        block[TRANSMITTANCE + i] = (after if after > t_min else -one) if hit else before


@njit(**FAST)
def move_lane_sums(sums, out, row):
    """out[row] = sums added up over LANES; sums = 0.

    Ten totals in one loop: LLVM adds ten short loops up serially.
    """
    real = sums.dtype.type
    s = s_dx = s_dy = s_dxdx = s_dxdy = s_dydy = v_red = v_green = v_blue = v_depth = real(0)
    for i in range(LANES):
        s += sums[S * LANES + i]
        s_dx += sums[S_DX * LANES + i]
        s_dy += sums[S_DY * LANES + i]
        s_dxdx += sums[S_DXDX * LANES + i]
        s_dxdy += sums[S_DXDY * LANES + i]
        s_dydy += sums[S_DYDY * LANES + i]
        v_red += sums[V_RED * LANES + i]
        v_green += sums[V_GREEN * LANES + i]
        v_blue += sums[V_BLUE * LANES + i]
        v_depth += sums[V_DEPTH * LANES + i]
    sums[:] = real(0)
    out[row, S], out[row, S_DX], out[row, S_DY] = s, s_dx, s_dy
    out[row, S_DXDX], out[row, S_DXDY], out[row, S_DYDY] = s_dxdx, s_dxdy, s_dydy
    out[row, V_RED], out[row, V_GREEN], out[row, V_BLUE] = v_red, v_green, v_blue
    out[row, V_DEPTH] = v_depth


@njit(**FAST)
def store_block(block, image, alpha, view):
    """Write the sums of a block to the pixels of it that lie in the image."""
    for i in range(LANES):
        x, y = int(block[PIXEL_X + i]), int(block[PIXEL_Y + i])
        if y < image.shape[1] and x < image.shape[2]:
            image[view, y, x, 0], image[view, y, x, 1] = block[RED + i], block[GREEN + i]
            image[view, y, x, 2], image[view, y, x, 3] = block[BLUE + i], block[DEPTH + i]
            # the sum of the weights: 1 - T would lose digits where alpha is small
            alpha[view, y, x, 0] = block[ALPHA + i]


@njit(**FAST)
def load_block(block, image, alpha, v_image, v_alpha, view):
    """Read the gradients of a block's pixels; all splats make dL/d(sums) . sums."""
    for i in range(LANES):
        x, y = int(block[PIXEL_X + i]), int(block[PIXEL_Y + i])
        if y < image.shape[1] and x < image.shape[2]:
            block[RED + i], block[GREEN + i] = v_image[view, y, x, 0], v_image[view, y, x, 1]
            block[BLUE + i], block[DEPTH + i] = v_image[view, y, x, 2], v_image[view, y, x, 3]
            block[ALPHA + i] = v_alpha[view, y, x, 0]
            to_come = v_alpha[view, y, x, 0] * alpha[view, y, x, 0]
            for k in range(4):
                to_come += v_image[view, y, x, k] * image[view, y, x, k]
            block[TO_COME + i] = to_come


@njit(**FAST)
def blend_tiles(part, parts, splats, tiles_x, tiles_y, tile_starts, pair_splats, image, alpha):
    """Fill image [V, H, W, 4], sums of w (r, g, b, z), and alpha [V, H, W, 1], of w."""
    blocks, live = np.zeros((BLOCKS, STATE), image.dtype), np.empty(BLOCKS, np.bool_)
    touched = np.empty(BLOCKS + 1, np.int64)
    # how numba makes an array of records; a list is never longer than [G]
    batch = np.empty_like(splats[0, :BATCH])
    for tile in range(part, len(tile_starts) - 1, parts):
        view, left = tile // (tiles_x * tiles_y), tile % tiles_x * TILE
        top = tile // tiles_x % tiles_y * TILE
        blocks[:] = 0
        start_blocks(blocks, left, top, image.shape[2], image.shape[1])
        pair, end = tile_starts[tile], tile_starts[tile + 1]
        while pair < end and find_live(blocks, live):
            count = min(BATCH, end - pair)
            for k in range(count):
                batch[k] = splats[view, pair_splats[pair + k]]
            pair += count
            for k in range(count):
                for t in range(touched_blocks(blocks, live, batch[k], left, top, touched)):
                    blend_block(blocks[touched[t]], batch[k])
        for b in range(BLOCKS):
            store_block(blocks[b], image, alpha, view)


@njit(**FAST)
def blend_tiles_backward(
    part, parts, splats, tiles_x, tiles_y, tile_starts, pair_splats, pair_rows,
    image, alpha, v_image, v_alpha, gradients,
):  # fmt: skip
    """dL/d(image), dL/d(alpha) -> gradients [pairs, 10] of the blended pairs."""
    blocks, live = np.zeros((BLOCKS, STATE), image.dtype), np.empty(BLOCKS, np.bool_)
    touched, batch = np.empty(BLOCKS + 1, np.int64), np.empty_like(splats[0, :BATCH])
    sums = np.zeros(NUM_GRADIENTS * LANES, image.dtype)
    for tile in range(part, len(tile_starts) - 1, parts):
        view, left = tile // (tiles_x * tiles_y), tile % tiles_x * TILE
        top = tile // tiles_x % tiles_y * TILE
        start_blocks(blocks, left, top, image.shape[2], image.shape[1])
        for b in range(BLOCKS):
            load_block(blocks[b], image, alpha, v_image, v_alpha, view)
        pair, end = tile_starts[tile], tile_starts[tile + 1]
        while pair < end and find_live(blocks, live):
            count = min(BATCH, end - pair)
            for k in range(count):
                batch[k] = splats[view, pair_splats[pair + k]]
            for k in range(count):
                num_touched = touched_blocks(blocks, live, batch[k], left, top, touched)
                for t in range(num_touched):
                    blend_block_backward(blocks[touched[t]], batch[k], sums)
                if num_touched > 0:
                    move_lane_sums(sums, gradients, pair_rows[pair + k])
            pair += count


# ---------------------------------------------------------------- projection, backward


@njit(**SAFE)
def covariance_gradient(splat, total):
    """dL/d(qxx, qxy, qyy) -> dL/d(cov_xx, cov_xy, cov_yy).

    It is -X V X, with X the inverse covariance and V = dL/dX.
    """
    a, b, c = 2 * splat.qxx, splat.qxy, 2 * splat.qyy
    p, q, r = 0.5 * total[S_DXDX], 0.5 * total[S_DXDY], 0.5 * total[S_DYDY]
    xx, xy, yx, yy = a * p + b * q, a * q + b * r, b * p + c * q, b * q + c * r
    return -(xx * a + xy * b), -(xx * b + xy * c), -(yx * b + yy * c)


@njit(**SAFE)
def axis_gradient(v_axis, u, v, v_xx, v_xy, v_yy, row_x, row_y):
    """Back through one half axis's share (u, v): dL/du, dL/dv, v_axis with it added."""
    v_u, v_v = 2 * (v_xx * u + v_xy * v), 2 * (v_xy * u + v_yy * v)
    return v_u, v_v, plus(plus(v_axis, v_u, row_x), v_v, row_y)


@njit(**SAFE)
def project_one_backward(mean, axes, camera, width, height, splat, total, v_mean, v_axes):
    """Back through `project_one`: v_mean and v_axes with this view's share added."""
    x, y, z = to_camera(mean, camera)
    row_x, row_y, slope_x, slope_y, by_x, by_y = linearise(x, y, z, camera, width, height)
    u, v = project_axes(row_x, axes), project_axes(row_y, axes)
    v_xx, v_xy, v_yy = covariance_gradient(splat, total)
    v_u0, v_v0, v_axis0 = axis_gradient(v_axes[0], u[0], v[0], v_xx, v_xy, v_yy, row_x, row_y)
    v_u1, v_v1, v_axis1 = axis_gradient(v_axes[1], u[1], v[1], v_xx, v_xy, v_yy, row_x, row_y)
    v_u2, v_v2, v_axis2 = axis_gradient(v_axes[2], u[2], v[2], v_xx, v_xy, v_yy, row_x, row_y)
    v_row_x = plus(plus(scaled(axes[0], v_u0), v_u1, axes[1]), v_u2, axes[2])
    v_row_y = plus(plus(scaled(axes[0], v_v0), v_v1, axes[1]), v_v2, axes[2])

    # Through the pixel position, the z of the depth image, and the factor f / z of the
    # rows ...
    fx, fy = camera.fx / z, camera.fy / z
    v_x = -fx * (2 * splat.qxx * total[S_DX] + splat.qxy * total[S_DY])
    v_y = -fy * (splat.qxy * total[S_DX] + 2 * splat.qyy * total[S_DY])
    v_z = total[V_DEPTH] - (v_x * x + v_y * y + dot(v_row_x, row_x) + dot(v_row_y, row_y)) / z
    # ... and through the slopes in the rows.
    v_x_slope = -fx * dot(v_row_x, camera.forward) * by_x
    v_y_slope = -fy * dot(v_row_y, camera.forward) * by_y
    v_x += v_x_slope
    v_y += v_y_slope
    v_z -= v_x_slope * slope_x + v_y_slope * slope_y
    v_mean = plus(plus(plus(v_mean, v_x, camera.right), v_y, camera.down), v_z, camera.forward)
    return v_mean, (v_axis0, v_axis1, v_axis2)


@njit(**SAFE)
def quaternion_gradient(unit, inverse_norm, v_columns, v_quats, g):
    """dL/dR, as columns -> v_quats[g], through the normalisation of the quaternion."""
    w, x, y, z = unit
    (r00, r10, r20), (r01, r11, r21), (r02, r12, r22) = v_columns
    v_w = 2 * (x * (r21 - r12) + y * (r02 - r20) + z * (r10 - r01))
    v_x = 2 * (w * (r21 - r12) + y * (r01 + r10) + z * (r02 + r20) - 2 * x * (r11 + r22))
    v_y = 2 * (w * (r02 - r20) + x * (r01 + r10) + z * (r12 + r21) - 2 * y * (r00 + r22))
    v_z = 2 * (w * (r10 - r01) + x * (r02 + r20) + y * (r12 + r21) - 2 * z * (r00 + r11))
    along = w * v_w + x * v_x + y * v_y + z * v_z  # a longer quaternion is the same rotation
    v_quats[g, 0] = (v_w - along * w) * inverse_norm
    v_quats[g, 1] = (v_x - along * x) * inverse_norm
    v_quats[g, 2] = (v_y - along * y) * inverse_norm
    v_quats[g, 3] = (v_z - along * z) * inverse_norm


@njit(**SAFE)
def project_gaussians_backward(
    part, parts, means, quats, scales, viewmats, Ks, width, height, splats, boxes, view_starts,
    gradients, v_means, v_quats, v_scales, v_opacities, v_colors,
):  # fmt: skip
    """Add up each Gaussian's rows of `gradients`; carry them to its parameters."""
    zero, total = (0.0, 0.0, 0.0), np.empty(NUM_GRADIENTS, np.float64)
    for g in range(len(means) * part // parts, len(means) * (part + 1) // parts):
        axes, columns, unit, inverse_norm = half_axes(quats, scales, g)
        mean, v_mean, v_axes = vector(means, g), zero, (zero, zero, zero)
        for view in range(len(viewmats)):
            box, splat = boxes[view, g], splats[view, g]
            num_pairs = (box.x1 - box.x0) * (box.y1 - box.y0)
            if num_pairs == 0:
                continue
            total[:] = 0
            row = view_starts[view] + box.first_pair
            for pair in range(row, row + num_pairs):
                for k in range(NUM_GRADIENTS):
                    total[k] += gradients[pair, k]
            v_opacities[g] -= total[S] / splat.opacity
            for k in range(3):
                v_colors[g, k] += total[V_RED + k]
            camera = get_camera(viewmats, Ks, view)
            v_mean, v_axes = project_one_backward(
                mean, axes, camera, width, height, splat, total, v_mean, v_axes
            )
        for k in range(3):
            v_means[g, k], v_scales[g, k] = v_mean[k], dot(v_axes[k], columns[k])
        v_a, v_b, v_c = v_axes
        v_columns = scaled(v_a, scales[g, 0]), scaled(v_b, scales[g, 1]), scaled(v_c, scales[g, 2])
        quaternion_gradient(unit, inverse_norm, v_columns, v_quats, g)
