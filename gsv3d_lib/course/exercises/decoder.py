"""Checkers of notebook 06: pixel shuffle, the depth head's target, DINO's loss, a
moving average, and depth from pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...cameras import orbit_cameras, ray_grid
from ...decoder import ray_distance
from . import ask, checker, expect, expect_close, expect_not, expect_shape, same
from .multiview import painted_ball

# ---------------------------------------------------------------- exercise 1


class Watch(TorchFunctionMode):
    """Notes whether torch's own pixel shuffle is called within the block."""

    used = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.used |= function is F.pixel_shuffle
        return function(*args, **(kwargs or {}))


@checker
def check_shuffle(solution) -> None:
    """x [B, C r^2, h, w], r -> [B, C, h r, w r]."""
    for channels, r, height, width in ((3, 2, 2, 3), (2, 4, 3, 2)):
        x = torch.arange(2.0 * channels * r * r * height * width).reshape(
            2, channels * r * r, height, width
        )
        with Watch() as watch:
            answer = ask(solution, x, r)
        expect(not watch.used, "That is torch's own pixel shuffle; move the axes yourself.")
        expect_shape(answer, (2, channels, height * r, width * r))
        for hint, order in SHUFFLES.items():
            expect(not same(answer, _shuffled(x, r, order)), hint)
        grouped = x.unflatten(1, (r, r, channels)).permute(0, 3, 4, 1, 5, 2).reshape(answer.shape)
        hint = "The channels are grouped the wrong way: c is the slowest index of the input's "
        hint += "channels; i and j follow."
        expect(not same(answer, grouped), hint)
        expect_close(
            answer, F.pixel_shuffle(x, r), "out[c, h r + i, w r + j] = in[c r^2 + i r + j, h, w]."
        )


# typical mistakes, as orders of the axes B, c, i, j, h, w
SHUFFLES = {
    "You reshaped without moving axes: i must stand next to h, and j next to w, before axes are "
    "joined.": "bcijhw",
    "The roles of i and j are swapped: channel c r^2 + i r + j goes to row i, column j of the "
    "cell.": "bchjwi",
    "Row h r + i: the position in the grid is the slow index, i the fast one; you joined them as "
    "i h.": "bcihjw",
}


def _shuffled(x: Tensor, r: int, order: str) -> Tensor:
    """x [B, C r^2, h, w] with its axes b, c, i, j, h, w in another order.

    They are then joined to [B, C, h r, w r].
    """
    axes = x.unflatten(1, (-1, r, r)).permute(*("bcijhw".index(axis) for axis in order))
    return axes.reshape(len(x), x.shape[1] // r**2, x.shape[2] * r, x.shape[3] * r)


# ---------------------------------------------------------------- exercise 2


def depth_logits_for(
    depth: Tensor, origins: Tensor, directions: Tensor, forward: Tensor, radius: float
) -> Tensor:
    """The inverse of `decoder.ray_distance`: z-depth [H, W, 1] -> logits [H, W, 1]."""
    distance = depth / (directions * forward).sum(-1, keepdim=True)
    return _logit((distance - origins.norm(dim=-1, keepdim=True)) / radius)


def _logit(offset: Tensor) -> Tensor:
    """x with 2 sigmoid(x) - 1 = offset."""
    return torch.logit((offset + 1) / 2)


@checker
def check_depth_logits(solution) -> None:
    """z-depth [H, W, 1], rays, camera's forward [3], radius -> logits [H, W, 1]."""
    for azimuth, radius, distance in ((30.0, 1.0, 3.5), (200.0, 1.5, 4.0)):
        camera = orbit_cameras([azimuth], 15.0, 64, distance=distance)
        origins, directions = (t[0] for t in ray_grid(camera, 4, 6))
        forward = camera.viewmats[0, 2, :3]
        depth = distance + torch.linspace(-0.5, 0.3, 24).reshape(4, 6, 1)
        answer = ask(solution, depth, origins, directions, forward, radius)
        expect_shape(answer, depth.shape)
        cosine, away = (
            (directions * forward).sum(-1, keepdim=True),
            origins.norm(dim=-1, keepdim=True),
        )
        offset = (depth / cosine - away) / radius
        mistakes = {
            "You took z-depth for the distance along the ray: divide by the cosine of ray and "
            "axis.": _logit((depth - away) / radius),
            "You multiplied by the cosine; z = t cos, so the distance is t = z / cos.": _logit(
                (depth * cosine - away) / radius
            ),
            "That is u, the sigmoid of the logit: invert the sigmoid, too.": (offset + 1) / 2,
            "That is 2 sigmoid(x) - 1: add 1, halve it, and invert the sigmoid.": offset,
        }
        if radius != 1:
            mistakes["The offset counts in units of the object's radius: divide by it."] = _logit(
                offset * radius
            )
        expect_not(answer, mistakes)
        placed = ray_distance(answer, origins, radius)
        expect(
            torch.isfinite(answer).all(),
            "The answer holds inf or nan; is u = (offset + 1) / 2 inside (0, 1)?",
        )
        hint = (
            "Put through `ray_distance`, your logits should place the means at the given z-depth."
        )
        expect_close(placed * cosine, depth, hint, tolerance=2e-4)
        edge = cosine * (away + radius * torch.linspace(-0.98, 0.98, 24).reshape(4, 6, 1))
        answer = ask(solution, edge, origins, directions, forward, radius)
        expect_shape(answer, edge.shape)
        hint = "Right inside the ball, wrong near its edge, where logits are large: no clamp."
        expect_close(ray_distance(answer, origins, radius) * cosine, edge, hint, tolerance=2e-4)


# ---------------------------------------------------------------- exercise 3

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05


def dino_loss_of(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """What `stages.DINOStage.forward` minimises, on given logits [2, B, K]."""
    targets = ((teacher.detach() - center) / TEACHER_TEMPERATURE).softmax(-1)
    return (
        sum(F.cross_entropy(student[a] / STUDENT_TEMPERATURE, targets[1 - a]) for a in (0, 1)) / 2
    )


def _cross(
    student: Tensor, targets: Tensor, temperature: float = STUDENT_TEMPERATURE, other: bool = True
) -> Tensor:
    return (
        sum(
            F.cross_entropy(student[a] / temperature, targets[1 - a if other else a])
            for a in (0, 1)
        )
        / 2
    )


@checker
def check_dino_loss(solution) -> None:
    """student, teacher logits [2, B, K], center [K] -> the loss, a scalar."""
    generator = torch.Generator().manual_seed(0)
    student = torch.rand(2, 3, 5, generator=generator).mul(2).sub(1).requires_grad_()
    teacher = torch.rand(2, 3, 5, generator=generator).mul(2).sub(1).requires_grad_()
    center = torch.rand(5, generator=generator) - 0.5
    answer = ask(solution, student, teacher, center)
    expect_shape(answer, (), "the loss")
    raw, centred = teacher.detach(), teacher.detach() - center
    sharp = (centred / TEACHER_TEMPERATURE).softmax(-1)
    expect_not(
        answer,
        {
            "Each crop is compared with itself: the student of one crop predicts the teacher of "
            "the *other*.": _cross(student, sharp, other=False),
            "The centre is missing: subtract it from the teacher's logits before the "
            "softmax.": _cross(student, (raw / TEACHER_TEMPERATURE).softmax(-1)),
            "The centre is added; subtract it.": _cross(
                student, ((raw + center) / TEACHER_TEMPERATURE).softmax(-1)
            ),
            "The temperatures are swapped: the teacher has the lower one, 0.05, and is the "
            "sharper.": _cross(
                student, (centred / STUDENT_TEMPERATURE).softmax(-1), TEACHER_TEMPERATURE
            ),
            "The targets are not sharpened: divide the centred logits by 0.05 before the "
            "softmax.": _cross(student, centred.softmax(-1)),
            "That is the sum of both directions; take their mean.": 2 * _cross(student, sharp),
            "The student lacks its temperature: divide its logits by 0.1.": _cross(
                student, sharp, 1.0
            ),
            "You summed over the B pairs; take their mean.": 3 * _cross(student, sharp),
            "You took the mean over the K numbers; sum over them, and average over the "
            "pairs.": _cross(student, sharp) / 5,
            "The centre comes before the temperature: (teacher - center) / 0.05.": _cross(
                student, (raw / TEACHER_TEMPERATURE - center).softmax(-1)
            ),
            "You centred the student, too; only the teacher is centred.": _cross(
                student - center, sharp
            ),
        },
    )
    one_way = [F.cross_entropy(student[a] / STUDENT_TEMPERATURE, sharp[1 - a]) for a in (0, 1)]
    hint = "That is one direction of the two; take the mean of both."
    expect(not any(same(answer, loss) for loss in one_way), hint)
    expect_close(
        answer,
        dino_loss_of(student, teacher, center),
        "The mean over both directions of -sum p log q.",
    )
    slopes = torch.autograd.grad(answer, (student, teacher), allow_unused=True)
    expect(
        slopes[0] is not None and slopes[0].abs().sum() > 0,
        "The loss has no gradient for the student; keep it.",
    )
    still = slopes[1] is None or slopes[1].abs().max() == 0
    expect(
        still,
        "The loss has a gradient for the teacher: take the targets under torch.no_grad() or "
        "detach them.",
    )


# ---------------------------------------------------------------- find the bug


def averaged(start: Tensor, rows: Tensor, keep: float) -> Tensor:
    """The moving average of rows [K, P] that begins as `start` [P]."""
    for row in rows:
        start = start.lerp(row, 1 - keep)
    return start


def average_mistakes(path: Tensor, decay: float) -> dict[str, Tensor]:
    """Typical wrong averages of weights [K + 1, P], row 0 before training."""
    first, rows = path[0], path[1:]
    return {
        "The average begins as zeros; begin with a copy of the first weights.": averaged(
            0 * first, rows, decay
        ),
        "Your average keeps 1 - decay of itself and takes decay of the weights.": averaged(
            first, rows, 1 - decay
        ),
        "The start is still the parameter itself, which the first step moves: clone it.": averaged(
            rows[0], rows, decay
        ),
        "You average before the step; take the weights after it.": averaged(
            first, path[:-1], decay
        ),
    }


@checker
def check_average(solution) -> None:
    """net, pairs of inputs and targets, decay -> the average of each of its tensors."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 8, 3, generator=generator) for _ in range(12)]
    net = nn.Linear(3, 3)
    with torch.no_grad():
        net.weight.copy_(torch.eye(3)), net.bias.fill_(1.0)
    copy = nn.Linear(3, 3)
    copy.load_state_dict(net.state_dict())
    path = [_flat(copy.parameters())]
    for x, y in batches:
        slopes = torch.autograd.grad((copy(x) - y).pow(2).mean(), list(copy.parameters()))
        with torch.no_grad():
            for p, slope in zip(copy.parameters(), slopes, strict=True):
                p.sub_(0.1 * slope)
        path.append(_flat(copy.parameters()))
    answer = ask(solution, net, batches, 0.9)
    expect(len(answer) == 2, f"One tensor per parameter is 2 here; got {len(answer)}.")
    last = all(same(mean, p) for mean, p in zip(answer, copy.parameters(), strict=True))
    expect(
        not last,
        "The average equals the last weights in every number: nothing old is kept. What does "
        "`detach()` share with the parameter?",
    )
    for mean, p in zip(answer, copy.parameters(), strict=True):
        expect_shape(mean, p.shape, "an average")
    mean, path = _flat(answer), torch.stack(path)
    expect_not(mean, average_mistakes(path, 0.9))
    truth = averaged(path[0], path[1:], 0.9)
    expect_close(mean, truth, "The average keeps the share `decay` at every step.")


def _flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# ---------------------------------------------------------------- build

WANTED = 0.06  # mean error of the depth, in world units


@checker
def check_stereo(solution) -> None:
    """rgb [16, H, W, 3], 16 cameras on a ring, a view -> its z-depth [H, W]."""
    cameras, errors = orbit_cameras(torch.arange(16) * 22.5, 15.0, 32), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        waves = 3 * torch.randn(3, 3, generator=generator)
        rgb, depth = painted_ball(cameras, waves, 6 * torch.rand(3, generator=generator))
        for view in (0, 5):
            answer = ask(solution, rgb.clone(), cameras, view)
            expect_shape(answer, (32, 32), "the z-depth")
            there = depth[view] > 0
            expect(torch.isfinite(answer[there]).all(), "The depth holds inf or nan.")
            along = depth[view] / _cosines(cameras[view])
            hint = (
                "That is the distance along the ray; z-depth is it times the cosine with the axis."
            )
            near = (answer - along)[there].abs().mean() < 0.5 * (along - depth[view])[there].mean()
            expect(not near, hint)
            errors.append((answer - depth[view])[there].abs().mean())
    error = torch.stack(errors).mean().item()
    expect(
        error <= WANTED,
        f"The mean error is {error:.3f}, and {WANTED} is wanted: which views can see the point?",
    )


def _cosines(camera) -> Tensor:
    """Between the pixels' rays and the viewing axis, [H, W]."""
    _, directions = ray_grid(camera, camera.height, camera.width)
    return directions[0] @ camera.viewmats[0, 2, :3]
