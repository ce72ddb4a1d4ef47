"""The door for arrays of others: what a table does not allow is refused, before it
takes memory.
"""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gsv3d_lib.system.errors import MissingFile, UserError
from gsv3d_lib.system.files import (
    UNREADABLE,
    Field,
    check_values,
    read_json,
    read_npz,
    read_plain,
    read_tensors,
    webp_facts,
)
from gsv3d_lib.system.paths import WRITER, check_id, named_file, plain_id, remove_leftovers

TABLE = {
    "grid": Field(("N", 4), "u2", 0, 9),
    "scale": Field((), low=0),
    "names": Field(("N",), needed=False),
}
GOOD = {"grid": np.full((3, 4), 7, "u2"), "scale": np.float32(2)}


def refusal(path, **sizes) -> str:
    with pytest.raises(UNREADABLE) as error:
        read_npz(path, TABLE, sizes)
    return str(error.value)


def header(shape, descr="<u2", version=1) -> bytes:
    """The beginning of an array file that claims this shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
    )


def archive(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_that_fit_are_read(tmp_path, save):
    # as other machines write it
    order = np.asfortranarray(np.arange(12, dtype=">u2").reshape(3, 4) % 10)
    save(tmp_path / "a.npz", grid=order, scale=3, names=np.arange(3.0), other=np.array(["text"]))
    arrays = read_npz(tmp_path / "a.npz", TABLE, {"N": 3})
    assert (
        set(arrays) == set(TABLE)
        and arrays["grid"].tolist() == order.tolist()
        and arrays["scale"] == 3
    )
    save(tmp_path / "a.npz", **GOOD)
    assert set(read_npz(tmp_path / "a.npz", TABLE)) == {"grid", "scale"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"grid": np.zeros((3, 4), "f4")}, "grid is of type f4, not u2"),
        ({"grid": np.zeros((3, 4), "u1")}, "grid is of type u1"),
        ({"grid": np.zeros((3, 4), bool)}, "grid is of type b1"),
        ({"grid": np.zeros((3, 5), "u2")}, r"grid has the shape \[3, 5\], not \[3, 4\]"),
        ({"grid": np.zeros(12, "u2")}, r"grid has the shape \[12\]"),
        ({"grid": np.full((3, 4), 10, "u2")}, "grid holds 10, outside of 0 to 9"),
        ({"grid": np.array([["a"] * 4] * 3)}, "grid is of type U1"),
        ({"scale": np.float32(np.nan)}, "scale holds values that are not finite"),
        ({"scale": np.inf}, "scale holds values that are not finite"),
        ({"scale": -1}, "scale holds -1, outside of 0 to"),
        ({"scale": np.ones(2)}, "scale has the shape"),
        ({"scale": np.complex64(1)}, "scale is of type c8"),
        ({"names": np.zeros(4)}, r"names has the shape \[4\], not \[3\]"),
        ({"names": np.array([0, np.nan, 1])}, "names holds values that are not finite"),
    ],
)
def test_what_the_table_does_not_allow_is_refused(tmp_path, change, sentence):
    np.savez(tmp_path / "a.npz", **GOOD | change)
    with pytest.raises(UserError, match=sentence):
        read_npz(tmp_path / "a.npz", TABLE)


def test_missing_arrays_wrong_sizes_and_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", scale=1)
    assert refusal(tmp_path / "a.npz") == "a.npz lacks grid"
    np.savez(tmp_path / "a.npz", **GOOD)
    assert "[3, 4], not [5, 4]" in refusal(tmp_path / "a.npz", N=5)
    np.savez(tmp_path / "a.npz", **GOOD | {"scale": np.array(None)})
    assert "scale" in refusal(tmp_path / "a.npz")


def test_what_claims_to_be_large_is_refused_before_it_takes_memory(tmp_path):
    bomb = header((10**8, 4)) + bytes(10**6)
    archive(tmp_path / "lie.npz", grid=bomb, scale=header((), "<f4") + bytes(4))
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(tmp_path / "true.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("scale.npy", header((), "<f4") + bytes(4))
        with file.open("grid.npy", "w", force_zip64=True) as member:
            member.write(header((600 << 17, 4)))
            for _ in range(600):
                member.write(zeros)
    assert (tmp_path / "true.npz").stat().st_size < 5e6
    tracemalloc.start()
    assert "not as long as its header says" in refusal(tmp_path / "lie.npz")
    assert "629 MB, more than 537 MB" in refusal(tmp_path / "true.npz")
    assert "[78643200, 4], not [3, 4]" in refusal(tmp_path / "true.npz", N=3)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "grid",
    [
        header((-3, 4)) + bytes(24),
        header((3, 4)) + bytes(30),
        header((3, 4))[:20],
        header("(" * 3000) + bytes(24),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{" * 50,
        b"\x93NUMPY\x03\x00" + header((3, 4))[8:] + bytes(24),
        b"",
    ],
)
def test_headers_that_lie_are_refused(tmp_path, grid):
    archive(tmp_path / "a.npz", grid=grid, scale=header((), "<f4") + bytes(4))
    assert "\n" not in refusal(tmp_path / "a.npz").split("\n")[0]


def test_members_that_are_there_twice_or_damaged_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD)
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "a") as file,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        file.writestr("grid.npy", b"")
    assert refusal(tmp_path / "a.npz") == "a.npz holds grid 2 times"
    np.savez(tmp_path / "b.npz", **GOOD)
    data = bytearray((tmp_path / "b.npz").read_bytes())
    data[data.index(GOOD["grid"].tobytes())] ^= 8
    (tmp_path / "b.npz").write_bytes(data)
    assert "CRC" in refusal(tmp_path / "b.npz")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "device", "loop", "."):
        with pytest.raises(UNREADABLE):
            read_plain(tmp_path / name, 100)
        with pytest.raises(MissingFile, match="no file"):
            read_npz(tmp_path / name, TABLE)
    with pytest.raises(MissingFile, match="there is no file"):
        read_plain(tmp_path / "none", 100)
    (tmp_path / "long").write_bytes(bytes(101))
    with pytest.raises(UserError, match="long is larger than"):
        read_plain(tmp_path / "long", 100)


def test_json_that_is_nested_too_deeply_is_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_tensors_are_checked_as_arrays_are(tmp_path):
    table = {"x": Field(("N", 2), "f4 f2"), "y": Field(("N",), "u1")}
    x, y = torch.ones(3, 2), torch.ones(3, dtype=torch.uint8)
    save_file({"x": x.half(), "y": y}, tmp_path / "a.safetensors")
    assert torch.equal(read_tensors(tmp_path / "a.safetensors", table)["x"], x.half())
    for change, sentence in [
        ({"x": x * torch.nan}, "not finite"),
        ({"x": x.bfloat16()}, "type bf2"),
        ({"y": y[:2].clone()}, r"\[2\], not \[3\]"),
        ({"y": y.bool()}, "type bool"),
    ]:
        save_file({"x": x, "y": y} | change, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=sentence):
            read_tensors(tmp_path / "a.safetensors", table)
    save_file({"x": x}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="lacks y"):
        read_tensors(tmp_path / "a.safetensors", table)


def test_an_empty_array_has_no_values_to_refuse():
    check_values("x", np.zeros((0, 3)), Field(("N", 3)))


@pytest.mark.parametrize(
    ("mode", "options", "alpha", "moves"),
    [
        ("RGBA", {}, True, False),
        ("RGBA", {"lossless": True}, True, False),
        ("RGB", {}, False, False),
        ("RGB", {"lossless": True}, False, False),
        (
            "RGBA",
            {"save_all": True, "append_images": [Image.new("RGBA", (60, 40), (9, 9, 9, 99))]},
            True,
            True,
        ),
    ],
)
def test_a_webp_says_what_it_is_before_it_is_decoded(mode, options, alpha, moves):
    buffer = io.BytesIO()
    Image.new(mode, (60, 40), (1, 2, 3, 100)[: len(mode)]).save(buffer, "WEBP", **options)
    assert webp_facts(buffer.getvalue()[:30]) == (60, 40, alpha, moves)
    with pytest.raises(UserError, match="no WebP"):
        webp_facts(b"\x89PNG" + bytes(30))


# ---------------------------------------------------------------- names


def test_ids_are_file_names_and_nothing_else():
    for name in ("a", "stühlchen_2", "x-1"):
        check_id(name)
    for name in ("../a", "/a", "a/b", "", ".", "a.b", "a\n", "a\0", 5, None, "a" * 300, "\ud800"):
        with pytest.raises(UserError, match="is no id"):
            check_id(name)
    for name in ("../../escape", "/etc/passwd", "", "a b.c", "ä" * 300):
        check_id(plain_id(name))
    assert plain_id("a b.c") == "a_b_c"


def test_named_files_lie_in_the_folder_or_beside_it(tmp_path):
    folder = tmp_path / "a" / "b"
    assert named_file(folder, "x/y.png") == folder / "x/y.png"
    assert named_file(folder, "../c/y.png") == tmp_path / "a/c/y.png"
    assert named_file(folder, str(folder / "y.png")) == folder / "y.png"
    for name in ("../../y.png", "/etc/passwd", "x/../../../y.png", "a\0"):
        with pytest.raises(UserError, match="leads out of"):
            named_file(folder, name)


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    dead = 2**22 + 1  # above what Linux gives
    names = [f".a.webp.{WRITER}-{dead}.tmp", f".a.webp.{WRITER}-{os.getppid()}.tmp"]
    names += [".mine.tmp", f".b.npz.{WRITER}-{dead}.tmp"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "a.webp")
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:3])
