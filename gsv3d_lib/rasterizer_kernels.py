"""The numba kernels behind `rasterizer.py`, which explains the plan. Nothing here knows about PyTorch.

How to read a kernel
    `view`, `splat`, `tile` are indices. A `splat` is one Gaussian seen by one view. `real` is the scalar type of the
    arrays (float32, or float64 in gradient tests): Python literals are float64 and would double the width of every SIMD
    register, so the inner loops convert their constants once.
Layouts
    splats  [V, G] of SPLAT fields, 64 bytes in float32, exactly one cache line
    boxes   [V, G] of BOX fields: which tiles a splat touches, and where its gradients go
    tile_starts [V * tiles + 1], splat_ids [pairs]: the splats of tile t, near to far, are
        splat_ids[tile_starts[t] : tile_starts[t + 1]]
    gradients [pairs, 10]: one row per (splat, tile), so that no two threads ever add to the same number
"""

import math
from collections import namedtuple

import numpy as np
from numba import njit

from .reference import (
    ALPHA_MAX,
    ALPHA_MIN,
    EPS2D,
    FAR_PLANE,
    FRUSTUM_MARGIN,
    NEAR_PLANE,
    TRANSMITTANCE_MIN,
)

TILE = 16  # pixels; a tile is blended by one thread
BLOCK = 4  # pixels; a 4 x 4 block is LANES pixels that are blended in lockstep
LANES = BLOCK * BLOCK
BLOCKS = (TILE // BLOCK) ** 2
BATCH = 32  # splats fetched together: their cache misses overlap

# sigma(p) = (qxx dx + qxy dy) dx + qyy dy^2; alpha >= ALPHA_MIN exactly where sigma <= cutoff, inside +- extent pixels.
SPLAT_FIELDS = ("x y qxx qxy qyy opacity cutoff red green blue depth extent_x extent_y pad0 pad1 pad2").split()
# tile columns [x0, x1), rows [y0, y1); first_pair counts the (splat, tile) pairs of the view before this splat.
BOX = np.dtype([(name, np.int32) for name in ("x0", "x1", "y0", "y1", "first_pair")])
# Columns of `gradients`: with s = dL/dsigma at one pixel, the sums over pixels of
# s, s dx, s dy, s dx^2, s dx dy, s dy^2 and of the weight times dL/d(red, green, blue, depth).
NUM_GRADIENTS = 10

# exp(-s) = p(s)^8 with p(s) = E0 + E1 s + ... + E6 s^6 the minimax fit of exp(-s / 8) on [0, ln 255], to 2e-8 in all.
# Blended pixels have no larger s, so the kernels need no library call, which LLVM could not vectorise.
E0 = 1.0
E1 = -0.999999832940429 / 8
E2 = 0.49999556138498963 / 8**2
E3 = -0.16662667204795964 / 8**3
E4 = 0.04149823434851184 / 8**4
E5 = -0.007967462665790364 / 8**5
E6 = 0.0009832469146167661 / 8**6

# `arcp`, `reassoc` and `contract` allow 1/x, vector sums and fused multiply-add. Never `nnan`/`ninf` where user data
# enters: a NaN must fail the comparisons that keep it out of the image, not become undefined behaviour.
SAFE_MATH = {"contract", "arcp", "nsz"}
FAST_MATH = {"contract", "arcp", "nsz", "reassoc", "nnan"}
SAFE = dict(fastmath=SAFE_MATH, error_model="numpy", cache=True, nogil=True)
FAST = dict(fastmath=FAST_MATH, error_model="numpy", cache=True, nogil=True)


def splat_dtype(real) -> np.dtype:
    """The record of one projected Gaussian, all fields of the scalar type `real`."""
    return np.dtype([(name, real) for name in SPLAT_FIELDS])


# ---------------------------------------------------------------------------------------------- projection

# The rows of the rotation W, the translation, and the intrinsics in pixels.
Camera = namedtuple("Camera", "right down forward translation fx fy cx cy")


@njit(**SAFE)
def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(**SAFE)
def rotation_columns(w, x, y, z):
    """Columns of the rotation matrix of a unit quaternion."""
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )


@njit(**SAFE)
def scaled(a, s):
    return (a[0] * s, a[1] * s, a[2] * s)


@njit(**SAFE)
def half_axes(quats, scales, g):
    """Half axes of ellipsoid g in the world (columns of R S), columns of R, unit quaternion, 1 / |quat|."""
    w, x, y, z = quats[g, 0], quats[g, 1], quats[g, 2], quats[g, 3]
    inverse_norm = 1 / math.sqrt(w * w + x * x + y * y + z * z)
    unit = (w * inverse_norm, x * inverse_norm, y * inverse_norm, z * inverse_norm)
    columns = rotation_columns(unit[0], unit[1], unit[2], unit[3])
    axes = (scaled(columns[0], scales[g, 0]), scaled(columns[1], scales[g, 1]), scaled(columns[2], scales[g, 2]))
    return axes, columns, unit, inverse_norm


@njit(**SAFE)
def vector(rows, i):
    """Row i of a [N, 3] array as a tuple: slices of arrays count references, which costs more than the projection."""
    return (rows[i, 0], rows[i, 1], rows[i, 2])


@njit(**SAFE)
def view_camera(viewmats, Ks, v):
    """View v as a Camera."""
    right = (viewmats[v, 0, 0], viewmats[v, 0, 1], viewmats[v, 0, 2])
    down = (viewmats[v, 1, 0], viewmats[v, 1, 1], viewmats[v, 1, 2])
    forward = (viewmats[v, 2, 0], viewmats[v, 2, 1], viewmats[v, 2, 2])
    translation = (viewmats[v, 0, 3], viewmats[v, 1, 3], viewmats[v, 2, 3])
    return Camera(right, down, forward, translation, Ks[v, 0, 0], Ks[v, 1, 1], Ks[v, 0, 2], Ks[v, 1, 2])


@njit(**SAFE)
def to_camera(mean, camera):
    """World point -> camera point (x, y, z)."""
    t = camera.translation
    return dot(camera.right, mean) + t[0], dot(camera.down, mean) + t[1], dot(camera.forward, mean) + t[2]


@njit(**SAFE)
def clamped_slope(slope, focal, centre, size):
    """x / z limited to a margin around the image: far outside, the linearisation would explode."""
    margin = FRUSTUM_MARGIN * size
    return min(max(slope, (-margin - centre) / focal), (size + margin - centre) / focal)


@njit(**SAFE)
def combine(u, a, v, b):
    """u a + v b for 3-vectors a and b."""
    return (u * a[0] + v * b[0], u * a[1] + v * b[1], u * a[2] + v * b[2])


@njit(**SAFE)
def jacobian_rows(camera, slope_x, slope_y, inverse_z):
    """Rows of J W: how a small step in the world moves the pixel, [2, 3]."""
    fx, fy = camera.fx * inverse_z, camera.fy * inverse_z
    row_x = combine(fx, camera.right, -fx * slope_x, camera.forward)
    row_y = combine(fy, camera.down, -fy * slope_y, camera.forward)
    return row_x, row_y


@njit(**SAFE)
def project_axes(row, axes):
    return (dot(row, axes[0]), dot(row, axes[1]), dot(row, axes[2]))


@njit(**SAFE)
def tile_range(low, high, size):
    """First and one-past-last tile between two pixel coordinates that overlap the image."""
    first = max(0, int(math.floor(low))) // TILE
    last = min(size - 1, int(math.floor(high))) // TILE
    return first, last + 1


@njit(**SAFE)
def project_one(mean, axes, opacity, color, camera, width, height, splat, box):
    """Project one Gaussian into one view; leaves the box empty when nothing of it can be seen."""
    box.x0, box.x1, box.y0, box.y1 = 0, 0, 0, 0
    x, y, z = to_camera(mean, camera)
    # Written so that a NaN anywhere answers False.
    if not (opacity >= ALPHA_MIN and z > NEAR_PLANE and z < FAR_PLANE):
        return
    inverse_z = 1 / z
    slope_x = clamped_slope(x * inverse_z, camera.fx, camera.cx, width)
    slope_y = clamped_slope(y * inverse_z, camera.fy, camera.cy, height)
    row_x, row_y = jacobian_rows(camera, slope_x, slope_y, inverse_z)
    u, v = project_axes(row_x, axes), project_axes(row_y, axes)
    # The 2D covariance is the sum of the outer products of the three projected half axes.
    cov_xx, cov_xy, cov_yy = dot(u, u) + EPS2D, dot(u, v), dot(v, v) + EPS2D
    determinant = cov_xx * cov_yy - cov_xy * cov_xy
    cutoff = math.log(opacity / ALPHA_MIN)
    extent_x, extent_y = math.sqrt(2 * cutoff * cov_xx), math.sqrt(2 * cutoff * cov_yy)
    pixel_x = camera.fx * x * inverse_z + camera.cx
    pixel_y = camera.fy * y * inverse_z + camera.cy
    inside_x = pixel_x + extent_x > 0 and pixel_x - extent_x < width
    inside_y = pixel_y + extent_y > 0 and pixel_y - extent_y < height
    if not (determinant > 0 and inside_x and inside_y):
        return
    splat.x, splat.y = pixel_x, pixel_y
    splat.qxx, splat.qxy, splat.qyy = 0.5 * cov_yy / determinant, -cov_xy / determinant, 0.5 * cov_xx / determinant
    splat.opacity, splat.cutoff, splat.depth = opacity, cutoff, z
    splat.red, splat.green, splat.blue = color[0], color[1], color[2]
    splat.extent_x, splat.extent_y = extent_x, extent_y
    box.x0, box.x1 = tile_range(pixel_x - extent_x, pixel_x + extent_x, width)
    box.y0, box.y1 = tile_range(pixel_y - extent_y, pixel_y + extent_y, height)


@njit(**SAFE)
def project_gaussians(first, step, means, quats, scales, opacities, colors, viewmats, Ks, width, height, splats, boxes):
    """Fill splats and boxes [V, G] from the Gaussians [G] and cameras [V]."""
    for g in range(first, len(means), step):
        mean, color = vector(means, g), vector(colors, g)
        axes, _, _, _ = half_axes(quats, scales, g)
        for view in range(len(viewmats)):
            camera = view_camera(viewmats, Ks, view)
            project_one(mean, axes, opacities[g], color, camera, width, height, splats[view, g], boxes[view, g])


# ------------------------------------------------------------------------------------------- sorting into tiles


@njit(**SAFE)
def radix_argsort(keys, ids, count):
    """Sort the first `count` ids by their uint32 keys, stably, 11 bits at a time."""
    other_keys, other_ids = np.empty_like(keys), np.empty_like(ids)
    for shift in (0, 11, 22):
        starts = np.zeros(2049, np.int64)
        for i in range(count):
            starts[((keys[i] >> shift) & 2047) + 1] += 1
        for digit in range(2048):
            starts[digit + 1] += starts[digit]
        for i in range(count):
            digit = (keys[i] >> shift) & 2047
            other_keys[starts[digit]], other_ids[starts[digit]] = keys[i], ids[i]
            starts[digit] += 1
        keys, other_keys, ids, other_ids = other_keys, keys, other_ids, ids
    return ids


@njit(**SAFE)
def sort_by_depth(first, step, splats, boxes, tiles_x, order, num_visible, tile_counts):
    """Per view: visible splats near to far, numbers of their (splat, tile) pairs, and the length of each tile's list."""
    num_views, num_gaussians = boxes.shape
    for view in range(first, num_views, step):
        depths, ids = np.empty(num_gaussians, np.float32), np.empty(num_gaussians, np.int32)
        count, pairs = 0, 0
        for g in range(num_gaussians):
            box = boxes[view, g]
            if box.x1 > box.x0 and box.y1 > box.y0:
                depths[count], ids[count] = splats[view, g].depth, g
                count += 1
                box.first_pair = pairs
                pairs += (box.x1 - box.x0) * (box.y1 - box.y0)
                for y in range(box.y0, box.y1):
                    for x in range(box.x0, box.x1):
                        tile_counts[view, y * tiles_x + x] += 1
        # The bits of positive floats sort like the floats.
        order[view, :count] = radix_argsort(depths.view(np.uint32), ids, count)[:count]
        num_visible[view] = count


@njit(**SAFE)
def fill_tiles(first, step, boxes, order, num_visible, tiles_x, tile_starts, splat_ids):
    """Write each tile's list. Splats arrive near to far, so the lists need no further sorting."""
    num_views, num_tiles = len(boxes), (len(tile_starts) - 1) // len(boxes)
    for view in range(first, num_views, step):
        cursors = tile_starts[view * num_tiles : (view + 1) * num_tiles].copy()
        for i in range(num_visible[view]):
            g = order[view, i]
            box = boxes[view, g]
            for y in range(box.y0, box.y1):
                for x in range(box.x0, box.x1):
                    tile = y * tiles_x + x
                    splat_ids[cursors[tile]] = g
                    cursors[tile] += 1


# ------------------------------------------------------------------------------------------------- blending
# The state of a block is ONE contiguous row of rows of LANES numbers, addressed with constant offsets: only then does
# LLVM turn the loops over LANES into single AVX instructions. For the same reason decisions are selects, not branches,
# and counters are floats.
TRANSMITTANCE, PIXEL_X, PIXEL_Y, SIGMA = 0 * LANES, 1 * LANES, 2 * LANES, 3 * LANES
# TRANSMITTANCE is negative once the pixel is finished.
RED, GREEN, BLUE, DEPTH, ALPHA = 4 * LANES, 5 * LANES, 6 * LANES, 7 * LANES, 8 * LANES  # forward: sums so far
FORWARD_ROW = 9 * LANES
# backward: dL/d(sums), and what the splats still to come contribute to L
TO_COME = 9 * LANES
BACKWARD_ROW = 10 * LANES


@njit(**FAST)
def aligned_zeros(rows, columns, like):
    """Zeros [rows, columns] that start on a 64-byte boundary: otherwise AVX-512 accesses straddle two cache lines."""
    memory = np.zeros(rows * columns + 16, like.dtype)
    skip = (-memory.ctypes.data % 64) // memory.itemsize
    return memory[skip : skip + rows * columns]


@njit(inline="always", **FAST)
def block_range(low, high, origin):
    """First and one-past-last block of the tile between two pixel coordinates (int() is wrong only where clipped)."""
    return max(0, int(low) - origin) // BLOCK, min(TILE - 1, int(high) - origin) // BLOCK + 1


@njit(inline="always", **FAST)
def evaluate_sigma(block, splat):
    """sigma at the pixels of a block; returns how many unfinished pixels the splat reaches."""
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
def blend_block(block, splat):
    """Add one splat to the sums of a block."""
    real = block.dtype.type
    zero, one, t_min, alpha_max = real(0), real(1), real(TRANSMITTANCE_MIN), real(ALPHA_MAX)
    e0, e1, e2, e3, e4, e5, e6 = real(E0), real(E1), real(E2), real(E3), real(E4), real(E5), real(E6)
    opacity, cutoff, depth = splat.opacity, splat.cutoff, splat.depth
    red, green, blue = splat.red, splat.green, splat.blue
    for i in range(LANES):
        sigma, before = block[SIGMA + i], block[TRANSMITTANCE + i]
        root = e0 + sigma * (e1 + sigma * (e2 + sigma * (e3 + sigma * (e4 + sigma * (e5 + sigma * e6)))))
        root *= root
        root *= root
        alpha = min(opacity * root * root, alpha_max)
        hit = (sigma <= cutoff) & (before > zero)
        after = before - before * alpha
        weight = alpha * before if hit & (after > t_min) else zero
        block[RED + i] += weight * red
        block[GREEN + i] += weight * green
        block[BLUE + i] += weight * blue
        block[DEPTH + i] += weight * depth
        block[ALPHA + i] += weight
        after = (after if after > t_min else -one) if hit else before
        block[TRANSMITTANCE + i] = after


@njit(inline="always", **FAST)
def blend_block_backward(block, splat, sums):
    """Front to back again: add dL/d(splat) to sums [NUM_GRADIENTS * LANES].

    With f = dL/d(sums) . (r, g, b, z, 1) of this splat and F = what the splats behind it contribute to L,
    dL/dalpha = T f - F / (1 - alpha): brightening this splat dims everything behind it.
    """
    real = block.dtype.type
    zero, one, t_min, alpha_max = real(0), real(1), real(TRANSMITTANCE_MIN), real(ALPHA_MAX)
    e0, e1, e2, e3, e4, e5, e6 = real(E0), real(E1), real(E2), real(E3), real(E4), real(E5), real(E6)
    x, y, opacity, cutoff, depth = splat.x, splat.y, splat.opacity, splat.cutoff, splat.depth
    red, green, blue = splat.red, splat.green, splat.blue
    for i in range(LANES):
        sigma, before = block[SIGMA + i], block[TRANSMITTANCE + i]
        root = e0 + sigma * (e1 + sigma * (e2 + sigma * (e3 + sigma * (e4 + sigma * (e5 + sigma * e6)))))
        root *= root
        root *= root
        unclamped = opacity * root * root
        alpha = min(unclamped, alpha_max)
        hit = (sigma <= cutoff) & (before > zero)
        after = before - before * alpha
        blended = hit & (after > t_min)
        weight = alpha * before if blended else zero
        v_red, v_green, v_blue = block[RED + i], block[GREEN + i], block[BLUE + i]
        v_depth = block[DEPTH + i]
        f = v_red * red + v_green * green + v_blue * blue + v_depth * depth + block[ALPHA + i]
        to_come = block[TO_COME + i] - weight * f
        block[TO_COME + i] = to_come
        v_alpha = before * f - to_come / (one - alpha)
        v_sigma = -alpha * v_alpha if blended & (unclamped <= alpha_max) else zero
        dx, dy = block[PIXEL_X + i] - x, block[PIXEL_Y + i] - y
        v_dx, v_dy = v_sigma * dx, v_sigma * dy
        sums[0 * LANES + i] += v_sigma
        sums[1 * LANES + i] += v_dx
        sums[2 * LANES + i] += v_dy
        sums[3 * LANES + i] += v_dx * dx
        sums[4 * LANES + i] += v_dx * dy
        sums[5 * LANES + i] += v_dy * dy
        sums[6 * LANES + i] += weight * v_red
        sums[7 * LANES + i] += weight * v_green
        sums[8 * LANES + i] += weight * v_blue
        sums[9 * LANES + i] += weight * v_depth
        after = (after if after > t_min else -one) if hit else before
        block[TRANSMITTANCE + i] = after


@njit(inline="always", **FAST)
def touched_blocks(blocks, live, splat, left, top, touched):
    """List the unfinished blocks of a tile that a splat reaches (and leave its sigma in them); returns their number."""
    x0, x1 = block_range(splat.x - splat.extent_x, splat.x + splat.extent_x, left)
    y0, y1 = block_range(splat.y - splat.extent_y, splat.y + splat.extent_y, top)
    count = 0
    for block_y in range(y0, y1):
        for block_x in range(x0, x1):
            b = block_y * (TILE // BLOCK) + block_x
            touched[count] = b  # overwritten by the next one unless it counts
            count += live[b] and evaluate_sigma(blocks[b], splat) > 0
    return count


@njit(**FAST)
def start_blocks(blocks, left, top, width, height):
    """Pixel coordinates and transmittance 1 for a tile's pixels (finished from the start outside the image)."""
    real = blocks.dtype.type
    for b in range(BLOCKS):
        for i in range(LANES):
            x = left + b % (TILE // BLOCK) * BLOCK + i % BLOCK
            y = top + b // (TILE // BLOCK) * BLOCK + i // BLOCK
            blocks[b, PIXEL_X + i], blocks[b, PIXEL_Y + i] = real(x + 0.5), real(y + 0.5)
            blocks[b, TRANSMITTANCE + i] = real(1) if x < width and y < height else real(-1)


@njit(**FAST)
def find_live(blocks, live):
    """Mark the blocks that have unfinished pixels; returns their number."""
    count = 0
    for b in range(BLOCKS):
        live[b] = 0
        for i in range(LANES):
            live[b] |= blocks[b, TRANSMITTANCE + i] > 0
        count += live[b]
    return count


@njit(**FAST)
def reduce_lanes(sums, out, row):
    """out[k] = the sum over LANES of row k of sums, by halving: LLVM adds a plain loop up one number at a time."""
    for k in range(NUM_GRADIENTS):
        total = sums[k * LANES]
        for i in range(1, LANES):
            total += sums[k * LANES + i]
        out[row, k] = total


@njit(**FAST)
def blend_tiles(first, step, splats, tile_starts, splat_ids, tiles_x, tiles_y, image, alpha):
    """Fill image [V, H, W, 4] (weighted sums of r, g, b, z) and alpha [V, H, W, 1] (sum of weights)."""
    _, height, width, _ = image.shape
    blocks = aligned_zeros(BLOCKS, FORWARD_ROW, image).reshape(BLOCKS, FORWARD_ROW)
    live, touched = np.zeros(BLOCKS, np.uint8), np.empty(BLOCKS + 1, np.int64)
    batch = np.empty_like(splats[0, :BATCH])
    for job in range(first, len(tile_starts) - 1, step):
        view, tile = job // (tiles_x * tiles_y), job % (tiles_x * tiles_y)
        left, top = tile % tiles_x * TILE, tile // tiles_x * TILE
        blocks[:] = 0
        start_blocks(blocks, left, top, width, height)
        start, end = tile_starts[job], tile_starts[job + 1]
        while start < end and find_live(blocks, live) > 0:
            count = min(BATCH, end - start)
            for k in range(count):
                batch[k] = splats[view, splat_ids[start + k]]
            start += count
            for k in range(count):
                for t in range(touched_blocks(blocks, live, batch[k], left, top, touched)):
                    blend_block(blocks[touched[t]], batch[k])
        for b in range(BLOCKS):
            for i in range(LANES):
                x, y = int(blocks[b, PIXEL_X + i]), int(blocks[b, PIXEL_Y + i])
                if x < width and y < height:
                    image[view, y, x, 0], image[view, y, x, 1] = blocks[b, RED + i], blocks[b, GREEN + i]
                    image[view, y, x, 2], image[view, y, x, 3] = blocks[b, BLUE + i], blocks[b, DEPTH + i]
                    # The sum of weights, not 1 - T, which loses digits where alpha is small.
                    alpha[view, y, x, 0] = blocks[b, ALPHA + i]


@njit(**FAST)
def blend_tiles_backward(
    first, step, splats, boxes, tile_starts, splat_ids, tiles_x, tiles_y, image, alpha, v_image, v_alpha, gradients
):
    """dL/d(image, alpha) -> gradients [pairs, 10], one row per (splat, tile)."""
    _, height, width, _ = image.shape
    real = image.dtype.type
    blocks = aligned_zeros(BLOCKS, BACKWARD_ROW, image).reshape(BLOCKS, BACKWARD_ROW)
    sums = aligned_zeros(1, NUM_GRADIENTS * LANES, image)
    live, touched = np.zeros(BLOCKS, np.uint8), np.empty(BLOCKS + 1, np.int64)
    batch, rows = np.empty_like(splats[0, :BATCH]), np.empty(BATCH, np.int64)
    for job in range(first, len(tile_starts) - 1, step):
        view, tile = job // (tiles_x * tiles_y), job % (tiles_x * tiles_y)
        tile_x, tile_y = tile % tiles_x, tile // tiles_x
        left, top = tile_x * TILE, tile_y * TILE
        start_blocks(blocks, left, top, width, height)
        for b in range(BLOCKS):
            for i in range(LANES):
                x, y = int(blocks[b, PIXEL_X + i]), int(blocks[b, PIXEL_Y + i])
                if x < width and y < height:
                    to_come = v_alpha[view, y, x, 0] * alpha[view, y, x, 0]
                    for k in range(4):
                        blocks[b, RED + k * LANES + i] = v_image[view, y, x, k]
                        to_come += v_image[view, y, x, k] * image[view, y, x, k]
                    blocks[b, ALPHA + i] = v_alpha[view, y, x, 0]
                    blocks[b, TO_COME + i] = to_come
        view_pairs = tile_starts[view * tiles_x * tiles_y]
        start, end = tile_starts[job], tile_starts[job + 1]
        while start < end and find_live(blocks, live) > 0:
            count = min(BATCH, end - start)
            for k in range(count):
                g = splat_ids[start + k]
                batch[k] = splats[view, g]
                box = boxes[view, g]
                rows[k] = view_pairs + box.first_pair + (tile_y - box.y0) * (box.x1 - box.x0) + tile_x - box.x0
            start += count
            for k in range(count):
                num_touched = touched_blocks(blocks, live, batch[k], left, top, touched)
                if num_touched > 0:
                    sums[:] = real(0)
                    for t in range(num_touched):
                        blend_block_backward(blocks[touched[t]], batch[k], sums)
                    reduce_lanes(sums, gradients, rows[k])


# ---------------------------------------------------------------------------------------- projection, backward


@njit(**SAFE)
def quaternion_gradient(unit, inverse_norm, v_columns, out, g):
    """dL/dR (as columns) -> dL/dquat, through the normalisation of the quaternion."""
    w, x, y, z = unit
    (r00, r10, r20), (r01, r11, r21), (r02, r12, r22) = v_columns
    v_w = 2 * (x * (r21 - r12) + y * (r02 - r20) + z * (r10 - r01))
    v_x = 2 * (w * (r21 - r12) + y * (r01 + r10) + z * (r02 + r20) - 2 * x * (r11 + r22))
    v_y = 2 * (w * (r02 - r20) + x * (r01 + r10) + z * (r12 + r21) - 2 * y * (r00 + r22))
    v_z = 2 * (w * (r10 - r01) + x * (r02 + r20) + y * (r12 + r21) - 2 * z * (r00 + r11))
    along = w * v_w + x * v_x + y * v_y + z * v_z  # a longer quaternion is the same rotation
    out[g, 0] = (v_w - along * w) * inverse_norm
    out[g, 1] = (v_x - along * x) * inverse_norm
    out[g, 2] = (v_y - along * y) * inverse_norm
    out[g, 3] = (v_z - along * z) * inverse_norm


@njit(**SAFE)
def covariance_gradient(splat, total):
    """dL/d(qxx, qxy, qyy) -> dL/d(cov_xx, cov_xy, cov_yy), as the matrix -X V X with X the inverse covariance."""
    a, b, c = 2 * splat.qxx, splat.qxy, 2 * splat.qyy
    p, q, r = 0.5 * total[3], 0.5 * total[4], 0.5 * total[5]  # dL/dX, q off the diagonal
    xx, xy, yx, yy = a * p + b * q, a * q + b * r, b * p + c * q, b * q + c * r
    return -(xx * a + xy * b), -(xx * b + xy * c), -(yx * b + yy * c)


@njit(**SAFE)
def add_combination(accumulator, u, row_x, v, row_y):
    """accumulator + u row_x + v row_y, all 3-vectors."""
    return (
        accumulator[0] + u * row_x[0] + v * row_y[0],
        accumulator[1] + u * row_x[1] + v * row_y[1],
        accumulator[2] + u * row_x[2] + v * row_y[2],
    )


@njit(**SAFE)
def project_one_backward(mean, axes, camera, width, height, splat, total, v_axes, v_mean):
    """Back through `project_one`: returns v_axes and v_mean with this view's share added."""
    x, y, z = to_camera(mean, camera)
    inverse_z = 1 / z
    slope_x = clamped_slope(x * inverse_z, camera.fx, camera.cx, width)
    slope_y = clamped_slope(y * inverse_z, camera.fy, camera.cy, height)
    row_x, row_y = jacobian_rows(camera, slope_x, slope_y, inverse_z)
    u, v = project_axes(row_x, axes), project_axes(row_y, axes)
    v_xx, v_xy, v_yy = covariance_gradient(splat, total)
    v_u = (2 * (v_xx * u[0] + v_xy * v[0]), 2 * (v_xx * u[1] + v_xy * v[1]), 2 * (v_xx * u[2] + v_xy * v[2]))
    v_v = (2 * (v_xy * u[0] + v_yy * v[0]), 2 * (v_xy * u[1] + v_yy * v[1]), 2 * (v_xy * u[2] + v_yy * v[2]))
    v_axes = (
        add_combination(v_axes[0], v_u[0], row_x, v_v[0], row_y),
        add_combination(v_axes[1], v_u[1], row_x, v_v[1], row_y),
        add_combination(v_axes[2], v_u[2], row_x, v_v[2], row_y),
    )
    zero = (0.0, 0.0, 0.0)
    v_row_x = add_combination(add_combination(zero, v_u[0], axes[0], v_u[1], axes[1]), v_u[2], axes[2], 0.0, zero)
    v_row_y = add_combination(add_combination(zero, v_v[0], axes[0], v_v[1], axes[1]), v_v[2], axes[2], 0.0, zero)

    fx, fy = camera.fx * inverse_z, camera.fy * inverse_z
    v_pixel_x = -(2 * splat.qxx * total[1] + splat.qxy * total[2])
    v_pixel_y = -(splat.qxy * total[1] + 2 * splat.qyy * total[2])
    v_x, v_y = fx * v_pixel_x, fy * v_pixel_y
    v_z = total[9] - (dot(v_row_x, row_x) + dot(v_row_y, row_y) + v_x * x + v_y * y) * inverse_z
    # d slope = (dx - slope dz) / z, unless it is clamped
    if slope_x == x * inverse_z:
        v_slope_x = -fx * dot(v_row_x, camera.forward)
        v_x += v_slope_x * inverse_z
        v_z -= v_slope_x * slope_x * inverse_z
    if slope_y == y * inverse_z:
        v_slope_y = -fy * dot(v_row_y, camera.forward)
        v_y += v_slope_y * inverse_z
        v_z -= v_slope_y * slope_y * inverse_z
    v_mean = add_combination(v_mean, v_x, camera.right, v_y, camera.down)
    return v_axes, add_combination(v_mean, v_z, camera.forward, 0.0, camera.forward)


@njit(**SAFE)
def project_gaussians_backward(
    first, step, means, quats, scales, viewmats, Ks, width, height, splats, boxes, view_pairs, gradients,
    v_means, v_quats, v_scales, v_opacities, v_colors,
):  # fmt: skip
    """Add up each Gaussian's rows of `gradients` over views and tiles, and carry them back to its parameters [G]."""
    total = np.empty(NUM_GRADIENTS, np.float64)
    zero = (0.0, 0.0, 0.0)
    for g in range(first, len(means), step):
        axes, columns, unit, inverse_norm = half_axes(quats, scales, g)
        mean, v_mean, v_axes = vector(means, g), zero, (zero, zero, zero)
        for view in range(len(viewmats)):
            box, splat = boxes[view, g], splats[view, g]
            num_tiles = (box.x1 - box.x0) * (box.y1 - box.y0)
            if num_tiles == 0:
                continue
            total[:] = 0
            pair = view_pairs[view] + box.first_pair
            for row in range(pair, pair + num_tiles):
                for k in range(NUM_GRADIENTS):
                    total[k] += gradients[row, k]
            v_opacities[g] -= total[0] / splat.opacity
            for k in range(3):
                v_colors[g, k] += total[6 + k]
            camera = view_camera(viewmats, Ks, view)
            v_axes, v_mean = project_one_backward(mean, axes, camera, width, height, splat, total, v_axes, v_mean)
        for k in range(3):
            v_means[g, k] = v_mean[k]
            v_scales[g, k] = dot(v_axes[k], columns[k])
        v_columns = (
            scaled(v_axes[0], scales[g, 0]), scaled(v_axes[1], scales[g, 1]), scaled(v_axes[2], scales[g, 2])
        )  # fmt: skip
        quaternion_gradient(unit, inverse_norm, v_columns, v_quats, g)
