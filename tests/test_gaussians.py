"""The container, its covariances, and PLY files that come back as they were written."""

import math

import numpy as np
import pytest
import torch
import trimesh

from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.gaussians import Gaussians
from gsv3d_lib.ply import PLY_COLUMNS, read_ply_table
from gsv3d_lib.rendering import render
from gsv3d_lib.rotations import multiply_quaternions, rotation_matrices

NAMES = ("means", "quats", "scales", "opacities", "colors")


def random_scene(count: int = 200, seed: int = 0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=torch.rand(count, 3, generator=generator) - 0.5,
        quats=torch.randn(count, 4, generator=generator),
        scales=torch.exp(torch.rand(count, 3, generator=generator) * 6 - 6),  # 0.0025 to 1
        opacities=torch.rand(count, generator=generator),
        colors=torch.rand(count, 3, generator=generator),
    )


def same(a: Gaussians, b: Gaussians) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def write_table(path, columns: dict, dtype: str = "float", header: str = "") -> None:
    """A PLY as another program would write it."""
    codes = {"float": "<f4", "double": "<f8"}
    table = np.empty(len(next(iter(columns.values()))), [(name, codes[dtype]) for name in columns])
    for name, values in columns.items():
        table[name] = values
    properties = "".join(f"property {dtype} {name}\n" for name in columns)
    text = f"ply\nformat binary_little_endian 1.0\n{header}element vertex {len(table)}\n"
    text += f"{properties}end_header\n"
    path.write_bytes(text.encode() + table.tobytes())


def test_rotation_matrices_are_rotations_whatever_the_length_of_the_quaternion():
    quats = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrices = rotation_matrices(quats)
    assert torch.allclose(
        matrices @ matrices.mT, torch.eye(3, dtype=torch.float64).expand(50, 3, 3), atol=1e-12
    )
    assert torch.allclose(torch.linalg.det(matrices), torch.ones(50, dtype=torch.float64))
    assert torch.allclose(rotation_matrices(-3 * quats), matrices)
    quarter_turn_about_z = rotation_matrices(
        torch.tensor([math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)])
    )
    assert torch.allclose(
        quarter_turn_about_z @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6
    )


def test_quaternion_product_is_the_product_of_rotations():
    a, b = torch.randn(2, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = rotation_matrices(a) @ rotation_matrices(b)
    assert torch.allclose(rotation_matrices(multiply_quaternions(a, b)), expected, atol=1e-12)


def test_covariances_have_the_scales_as_axes():
    scene = random_scene(30).to(torch.float64)
    eigenvalues = torch.linalg.eigvalsh(scene.covariances())
    assert torch.allclose(eigenvalues, scene.scales.sort(-1).values ** 2)
    turned = Gaussians(
        torch.zeros(1, 3),
        torch.tensor([[1.0, 0, 0, 1]]),
        torch.tensor([[3.0, 2, 1]]),
        torch.ones(1),
        torch.ones(1, 3),
    )
    assert torch.allclose(turned.covariances()[0], torch.diag(torch.tensor([4.0, 9, 1])), atol=1e-6)


def test_select_prune_and_concatenate():
    scene = random_scene(10)
    scene.opacities[:4] = torch.tensor([0.0, 0.001, 0.5, 1.0])
    assert (
        len(scene) == 10 and len(scene.select([1, 2])) == 2 and len(scene.select(slice(0, 3))) == 3
    )
    assert torch.equal(
        scene.select(scene.opacities > 0.4).means, scene.means[scene.opacities > 0.4]
    )
    assert (scene.prune().opacities >= 1 / 255).all() and len(scene.prune(0.9)) == (
        scene.opacities >= 0.9
    ).sum()
    both = Gaussians.concatenate([scene, scene.select([0])])
    assert len(both) == 11 and torch.equal(both.quats[10], scene.quats[0])
    with pytest.raises(ValueError, match="at least one scene"):
        Gaussians.concatenate([])


def test_to_and_detach():
    scene = random_scene(5)
    scene.means.requires_grad_()
    assert (
        scene.to(torch.float64).means.dtype == torch.float64
        and scene.to(torch.float64).means.requires_grad
    )
    assert not scene.detach().means.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_and_dtypes_are_named(name):
    tensors = dict(zip(NAMES, random_scene(4).tensors(), strict=True))
    with pytest.raises(ValueError, match="must have shape"):
        Gaussians(**(tensors | {name: torch.zeros(4, 7)}))
    if name != "means":
        with pytest.raises(ValueError, match="one dtype and device.*float64"):
            Gaussians(**(tensors | {name: tensors[name].double()}))


# ---------------------------------------------------------------------------------- PLY


@pytest.mark.parametrize("axes", ["z-up", "y-up", "y-down"])
def test_ply_round_trip_is_close_once_and_exact_afterwards(tmp_path, axes):
    scene = random_scene(5000)
    scene.save_ply(tmp_path / "first.ply", axes)
    first = Gaussians.load_ply(tmp_path / "first.ply")
    for name, a, b in zip(NAMES, scene.tensors(), first.tensors(), strict=True):
        assert (a - b).abs().max() <= 1e-6, name
    assert torch.equal(scene.means, first.means) and torch.equal(scene.quats, first.quats)
    first.save_ply(tmp_path / "second.ply", axes)
    second = Gaussians.load_ply(tmp_path / "second.ply")
    assert same(first, second)
    second.save_ply(tmp_path / "third.ply", axes)
    assert (tmp_path / "third.ply").read_bytes() == (tmp_path / "second.ply").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "first.ply",
        "second.ply",
        "third.ply",
    ]  # nothing half-written


def test_a_file_read_back_renders_the_same_picture(tmp_path):
    scene, cameras = random_scene(100), orbit_cameras([20.0, 200.0], 10.0, 24)
    scene.scales.mul_(0.2)
    scene.save_ply(tmp_path / "a.ply")
    once = Gaussians.load_ply(tmp_path / "a.ply")
    once.save_ply(tmp_path / "b.ply")
    picture, again = render(once, cameras), render(Gaussians.load_ply(tmp_path / "b.ply"), cameras)
    assert all(torch.equal(a, b) for a, b in zip(picture, again, strict=True))
    assert (render(scene, cameras).rgb - picture.rgb).abs().max() < 1e-5


def test_extreme_opacities_scales_and_colours_survive(tmp_path):
    scene = random_scene(6)
    scene.opacities[:] = torch.tensor([0.0, 1.0, 1 - 2**-24, 1e-30, 0.5, 1 / 255])
    scene.scales[0] = torch.tensor([0.0, 1e-20, 1e3])
    scene.colors[:2] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    scene.save_ply(tmp_path / "a.ply")
    table, _ = read_ply_table(tmp_path / "a.ply")
    assert all(np.isfinite(table[name]).all() for name in PLY_COLUMNS)
    back = Gaussians.load_ply(tmp_path / "a.ply")
    assert torch.equal(back.opacities[:2], torch.tensor([0.0, 1.0]))
    assert torch.allclose(back.opacities, scene.opacities, rtol=1e-5, atol=0)
    assert torch.allclose(back.scales, scene.scales, rtol=1e-5, atol=0) and back.scales[0, 0] == 0
    assert torch.equal(back.colors[:2], scene.colors[:2])


def test_layout_is_that_of_3d_gaussian_splatting(tmp_path):
    scene = random_scene(7)
    scene.save_ply(tmp_path / "a.ply", axes="z-up")
    table, axes = read_ply_table(tmp_path / "a.ply")
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2".split()
    names += ["rot_0", "rot_1", "rot_2", "rot_3"]
    assert list(table.dtype.names) == names and table.dtype.itemsize == 68 and axes == "z-up"
    assert all(kind == "<f4" for _, kind in table.dtype.descr)
    assert np.allclose(table["f_dc_1"], (scene.colors[:, 1] - 0.5) / 0.28209479, atol=1e-5)
    assert np.allclose(table["opacity"], torch.logit(scene.opacities), atol=1e-4)
    assert np.allclose(table["scale_2"], scene.scales[:, 2].log(), atol=1e-6)
    assert np.array_equal(table["rot_0"], scene.quats[:, 0])
    independent = trimesh.load(tmp_path / "a.ply", process=False)
    assert np.array_equal(np.asarray(independent.vertices, np.float32), scene.means.numpy())


def test_stored_numbers_are_read_bit_for_bit(tmp_path):
    generator = np.random.default_rng(0)
    columns = {name: generator.normal(size=50).astype(np.float32) for name in PLY_COLUMNS}
    write_table(tmp_path / "a.ply", columns)
    table, _ = read_ply_table(tmp_path / "a.ply")
    assert all(
        np.array_equal(table[name].view(np.uint32), columns[name].view(np.uint32))
        for name in PLY_COLUMNS
    )


def test_other_programs_files_load(tmp_path):
    """Other order, doubles, no normals, higher spherical harmonics, comments, further
    elements.
    """
    generator = np.random.default_rng(0)
    names = [name for name in reversed(PLY_COLUMNS) if name[0] != "n"] + [
        f"f_rest_{i}" for i in range(45)
    ]
    columns = {name: generator.normal(size=5) for name in names}
    write_table(
        tmp_path / "a.ply", columns, "double", header="comment made elsewhere\nobj_info none\n"
    )
    data = (tmp_path / "a.ply").read_bytes()
    more = b"element camera 1\nproperty list uchar int ids\nend_header\n"
    (tmp_path / "a.ply").write_bytes(data.replace(b"end_header\n", more) + b"\x00")
    scene = Gaussians.load_ply(tmp_path / "a.ply")
    assert np.allclose(scene.means[:, 1], columns["y"]) and np.allclose(
        scene.quats[:, 3], columns["rot_3"]
    )
    assert np.allclose(scene.scales[:, 0], np.exp(columns["scale_0"]))
    assert np.allclose(scene.opacities, 1 / (1 + np.exp(-columns["opacity"])))


def splat_columns(count: int = 5) -> dict:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=count) for name in PLY_COLUMNS if name[0] != "n"}


def ply(
    columns: dict, order: str = "<", ends: str = "\n", before: str = "", data: bytes = b""
) -> bytes:
    """A PLY of float32 numbers in a byte order, with line ends, and with another
    element before the vertices.
    """
    table = np.stack(list(columns.values()), -1).astype(f"{order}f4")
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    lines = f"ply\nformat {name} 1.0\ncomment end_header\n{before}element vertex {len(table)}\n"
    lines += "".join(f"property float {column}\n" for column in columns) + "end_header\n"
    return lines.replace("\n", ends).encode() + data + table.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_byte_orders_line_ends_and_elements_before_the_vertices(tmp_path, order, ends):
    columns = splat_columns()
    # bytes that look like a line's end
    columns["x"][0] = np.frombuffer(b"\n\n\n\n", f"{order}f4")[0]
    faces = "element camera 2\nproperty double a\nproperty uchar b\n"
    faces += "element face 3\nproperty uchar flags\n"
    faces += "property list uchar int corners\nproperty list int short more\n"
    data, integer, short = b"\0" * 18, f"{order}i4", f"{order}i2"
    for corners, more in (([0, 1, 2], []), ([], [5]), ([1, 2, 3, 4], [6, 7])):
        data += b"\7" + bytes([len(corners)]) + np.array(corners, integer).tobytes()
        data += np.array(len(more), integer).tobytes() + np.array(more, short).tobytes()
    for before, body in (("", b""), (faces, data)):
        (tmp_path / "a.ply").write_bytes(ply(columns, order, ends, before, body))
        scene = Gaussians.load_ply(tmp_path / "a.ply")
        assert np.array_equal(scene.means.numpy()[:, 0], columns["x"].astype(np.float32))
        assert np.allclose(scene.scales.numpy()[:, 2], np.exp(columns["scale_2"]))


def test_lists_before_the_vertices_end_with_the_file(tmp_path):
    """Neither a length that is never there nor a negative one keeps the reader busy."""
    before = "element face 1000000000000\nproperty list char char corners\n"
    for body in (b"", b"\xff" * 1000, b"\x7f" * 1000):
        (tmp_path / "a.ply").write_bytes(ply(splat_columns(), before=before, data=body))
        with pytest.raises(ValueError, match="is cut off"):
            Gaussians.load_ply(tmp_path / "a.ply")


def test_a_compressed_file_is_named_with_what_unpacks_it(tmp_path):
    header = "ply\nformat binary_little_endian 1.0\nelement chunk 1\n"
    header += "".join(f"property float {name}\n" for name in ("min_x", "max_x"))
    header += "element vertex 2\n" + "".join(
        f"property uint packed_{name}\n" for name in ("position", "rotation", "scale", "color")
    )
    (tmp_path / "a.compressed.ply").write_bytes(f"{header}end_header\n".encode() + b"\0" * 40)
    with pytest.raises(
        ValueError, match="is a compressed PLY: unpack it, .*`splat-transform a.compressed.ply"
    ):
        Gaussians.load_ply(tmp_path / "a.compressed.ply")


def test_a_splat_file_by_a_wrong_name_is_no_ply(tmp_path):
    (tmp_path / "a.ply").write_bytes(np.random.default_rng(0).bytes(32 * 5))
    with pytest.raises(ValueError, match="is not a PLY file"):
        Gaussians.load_ply(tmp_path / "a.ply")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": np.inf}, "means .* hold NaN or infinite"),
        ({"x": 1e30, "y": -1e38}, None),
        ({"opacity": -np.inf}, "opacities .* hold NaN or infinite"),
        ({"opacity": 5.0}, None),
        ({"opacity": -1e30}, None),
        ({"scale_1": 1e3}, "scales .* hold NaN or infinite"),  # e^1000
        ({"scale_1": -1e3}, None),
        ({"f_dc_1": np.nan}, "colors .* hold NaN or infinite"),
        ({"rot_0": 0, "rot_1": 0, "rot_2": 0, "rot_3": 0}, "quats .* length 0"),
    ],
)
def test_numbers_of_files(tmp_path, changes, sentence):
    columns = splat_columns()
    for name, value in changes.items():
        columns[name][2] = value
    (tmp_path / "a.ply").write_bytes(ply(columns))
    if sentence is None:
        assert len(Gaussians.load_ply(tmp_path / "a.ply").check("file")) == 5
        return
    with pytest.raises(ValueError, match=sentence):
        Gaussians.load_ply(tmp_path / "a.ply")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("scales", -0.1, "scales of the Gaussians to save hold negative numbers"),
        ("opacities", 5.0, r"opacities of the Gaussians to save do not all lie in \[0, 1\]"),
        ("opacities", -0.01, r"do not all lie in \[0, 1\]"),
        ("quats", 0.0, "quaternions of length 0"),
        ("means", 1e300, "means of the Gaussians to save hold NaN or infinite"),  # in float32
    ],
)
def test_numbers_that_describe_no_gaussians_are_not_written(tmp_path, name, value, sentence):
    scene = random_scene(5).to(torch.float64)
    getattr(scene, name)[2] = value
    with pytest.raises(ValueError, match=sentence):
        scene.save_ply(tmp_path / "a.ply")
    assert not list(tmp_path.iterdir())


def test_a_file_that_seems_to_store_activated_values_is_told(tmp_path, recwarn):
    columns = splat_columns()
    (tmp_path / "a.ply").write_bytes(ply(columns))
    Gaussians.load_ply(tmp_path / "a.ply")
    assert not recwarn.list
    columns |= {name: np.exp(columns[name]) for name in columns if name.startswith("scale")}
    columns["opacity"] = 1 / (1 + np.exp(-columns["opacity"]))
    (tmp_path / "a.ply").write_bytes(ply(columns))
    with pytest.warns(UserWarning, match="seems to store scales and opacities themselves"):
        Gaussians.load_ply(tmp_path / "a.ply")


def test_comments_that_only_begin_like_ours(tmp_path):
    data = ply(splat_columns()).replace(
        b"comment end_header", b"comment axes are in metres\ncomment axes metres"
    )
    (tmp_path / "a.ply").write_bytes(data)
    assert read_ply_table(tmp_path / "a.ply")[1] == "z-up"


@pytest.mark.parametrize(
    ("axes", "up"), [("z-up", (0, 0, 1)), ("y-up", (0, 1, 0)), ("y-down", (0, -1, 0))]
)
def test_axes_of_the_file(tmp_path, axes, up):
    scene = random_scene(20)
    scene.means[0], scene.scales[0] = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.1, 0.1, 0.5])
    scene.quats[0] = torch.tensor([1.0, 0, 0, 0])
    scene.save_ply(tmp_path / "a.ply", axes=axes)
    back = Gaussians.load_ply(tmp_path / "a.ply")
    assert torch.allclose(back.means, scene.means, atol=1e-6)
    assert torch.allclose(back.covariances(), scene.covariances(), atol=1e-5)
    in_file = Gaussians.load_ply(tmp_path / "a.ply", axes="z-up")
    assert torch.allclose(in_file.means[0], torch.tensor(up, dtype=torch.float32), atol=1e-6)
    long_axis = torch.linalg.eigh(in_file.covariances()[0]).eigenvectors[:, -1]
    assert torch.allclose((long_axis * torch.tensor(up)).sum().abs(), torch.tensor(1.0), atol=1e-5)


def test_an_empty_scene_can_be_stored(tmp_path):
    random_scene(3).select(slice(0, 0)).save_ply(tmp_path / "a.ply")
    assert len(Gaussians.load_ply(tmp_path / "a.ply")) == 0


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_finite_are_neither_written_nor_read(tmp_path, name):
    path, scene = tmp_path / "a.ply", random_scene(5)
    scene.save_ply(path)
    good = path.read_bytes()
    assert b"comment axes y-down" in good  # a plain call opens upright in viewers
    getattr(scene, name)[2] = float("nan")
    with pytest.raises(
        ValueError, match=f"The {name} of the Gaussians to save hold NaN or infinite"
    ):
        scene.save_ply(path)
    assert path.read_bytes() == good
    column = {"means": 0, "colors": 6, "opacities": 9, "scales": 10, "quats": 13}[name]
    table = np.frombuffer(good[-5 * 68 :], "<f4").reshape(5, 17).copy()
    table[3, column] = np.nan
    path.write_bytes(good[: -5 * 68] + table.tobytes())
    with pytest.raises(ValueError, match=f"The {name} of .*a.ply hold NaN or infinite"):
        Gaussians.load_ply(path)


def test_broken_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "a.ply"
    with pytest.raises(FileNotFoundError, match="no PLY file at"):
        Gaussians.load_ply(path)
    random_scene(5).save_ply(path)
    good = path.read_bytes()
    cases = {
        "cut off: its 5 splats take 340 bytes; got 339": good[:-1],
        "cut off inside its header": good[:60],
        "not a PLY file": b"PK\x03\x04" + good,
        "not a PLY file: it does not begin": b"",
        "does not begin with the line": b"plyx" + good[3:],
        "cut off inside": b"ply\n" + b"comment\n" * 10,
        "not a binary PLY, its format is ascii 1.0": good.replace(
            b"binary_little_endian", b"ascii"
        ),
        "its format is missing": good.replace(b"format", b"comment"),
        "no property opacity": good.replace(b"float opacity", b"float opacitx"),
        "that of a table of numbers .vertex holds lists": good.replace(
            b"float x", b"list uchar float x"
        ),
        "no element vertex": good.replace(b"element vertex", b"element face"),
        "'five' is no number": good.replace(b"vertex 5", b"vertex five"),
        "'-1' is no number": good.replace(b"vertex 5", b"vertex -1"),
        "its 1000000000000 splats take 68000000000000 bytes": good.replace(
            b"vertex 5", b"vertex 1000000000000"
        ),
        "that of a table": good.replace(b"vertex 5", b"vertex " + b"9" * 5000),
        "two properties x": good.replace(b"float y", b"float x"),
        "'half'": good.replace(b"float y", b"half y"),
        "table of numbers": good.replace(b"element vertex 5\n", b""),
        "cut off: its 5 splats": good.replace(
            b"element v", b"element f 99999999999\nproperty int x\nelement v"
        ),
        "cut off: its 5 splat": good.replace(
            b"element v", b"element f 99999999999\nproperty list char char x\nelement v"
        ),
        "axes must be one of z-up, y-up, y-down": good.replace(b"axes y-down", b"axes x-up"),
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            Gaussians.load_ply(path)
    with pytest.raises(ValueError, match="axes must be one of"):
        random_scene(5).save_ply(path, axes="up")
