"""What the repository promises outside its code: installation, documents, notebooks,
and what must not be in it.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from command_world import call, check_commands, module_file, options_of
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import gsv3d_lib
from gsv3d_lib import __main__ as door
from gsv3d_lib.system import doctor

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIBRARY = ROOT / "gsv3d_lib"
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if "__pycache__" not in path.parts)
TOOLS = sorted((ROOT / "tools").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted(
    p for p in (ROOT / "data").rglob("*.md") if "cache" not in p.relative_to(ROOT).parts
)
NOT_PINNED = {"rembg"}  # downloads its network when used, so no test ran with it


def repository_files() -> list[Path]:
    """Tracked files and those that would be added; skips outside a git checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout, so there is no list of tracked files")
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def text_of(path: Path) -> str:
    """The file as text; empty for binary files."""
    data = path.read_bytes()
    return "" if b"\0" in data[:4096] else data.decode("utf-8", "replace")


@cache
def names_of(module: Path) -> set[str]:
    """What a module defines at its top level, and `Class.method` for its classes; of a
    package its modules too.
    """
    names = set()
    if module.name == "__init__.py":
        below = (
            path.relative_to(module.parent).with_suffix("") for path in module.parent.rglob("*.py")
        )
        names |= {".".join(path.parts).removesuffix(".__init__") for path in below}
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{item.name}"
                for item in node.body
                if isinstance(item, ast.FunctionDef)
            }
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        names |= {
            name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
        }
    return names


# ---------------------------------------------------------------- installation


def requirements() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def pins() -> dict[str, Version]:
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    parsed = [Requirement(line) for line in lines if line]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) and not pin.url for pin in parsed), (
        "exact versions only"
    )
    return {pin.name: Version(str(pin.specifier)[2:]) for pin in parsed}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_supported_pythons_are_admitted(python):
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])


def test_torch_is_a_range_that_gpu_machines_fit():
    torch = next(r for r in requirements() if r.name == "torch")
    assert all(Version(v) in torch.specifier for v in ("2.8.0", "2.9.1", "2.13.0", "2.15.0"))
    assert Version("2.7.1") not in torch.specifier


def test_every_dependency_has_a_lower_end_and_only_gsplat_an_upper_one():
    """gsplat 1.6 changes the largest alpha of a splat, which the other renderers would
    have to follow.
    """
    for requirement in requirements():
        ends = sorted(s.operator for s in requirement.specifier)
        assert ends == (["<", ">="] if requirement.name == "gsplat" else [">="]), requirement
    gsplat = next(r for r in requirements() if r.name == "gsplat")
    assert all(Version(v) in gsplat.specifier for v in ("1.5.0", "1.5.3"))
    assert Version("1.6.0") not in gsplat.specifier


def test_every_dependency_is_pinned_within_its_range():
    pinned, wanted = pins(), {r.name: r for r in requirements() if r.name not in NOT_PINNED}
    assert set(pinned) == set(wanted)
    outside = [
        f"{name} {version}"
        for name, version in pinned.items()
        if version not in wanted[name].specifier
    ]
    assert not outside


def test_environment_yml_is_thin_and_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    python, pip, from_pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge"]
    assert (pip, from_pip) == ("pip", {"pip": ["-e .[dev]"]})
    name, specifier = python.split()
    assert name == "python" and SpecifierSet(specifier) == SpecifierSet(PROJECT["requires-python"])


def test_every_import_is_a_declared_dependency():
    """Of the library, its tests and its notebooks: nothing works only because something
    else installed it.
    """
    distributions = {
        "PIL": "pillow",
        "skimage": "scikit-image",
        "yaml": "pyyaml",
        "imageio_ffmpeg": "imageio-ffmpeg",
    }
    # each of these distributions requires the package
    distributions |= {
        "playwright": "pytest-playwright",
        "IPython": "ipykernel",
        "jupyter_client": "ipykernel",
        "traitlets": "ipywidgets",
    }
    declared = {r.name.lower().replace("-", "_") for r in requirements()}
    own = {"gsv3d_lib"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    own |= {path.stem for path in TOOLS}
    folders = ("gsv3d_lib", "tests", "benchmarks", "tools")
    for path in [
        *(path for folder in folders for path in (ROOT / folder).rglob("*.py")),
        *NOTEBOOKS,
    ]:
        for name in imported_packages(path) - set(sys.stdlib_module_names) - own - {"torchvision"}:
            distribution = distributions.get(name, name).lower().replace("-", "_")
            assert distribution in declared, (
                f"{path.name} imports {name}, which pyproject.toml does not name"
            )


def source_of(path: Path) -> str:
    """Python source of a module, or of all code cells of a notebook without their
    magics.
    """
    if path.suffix == ".py":
        return path.read_text()
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


@cache
def imported_packages(path: Path) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(source_of(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return frozenset(names)


def test_nothing_installs_or_imports_torchvision():
    """It has no build that fits the tested torch, and a wrong one breaks transformers
    and diffusers.
    """
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"):
        stated = "\n".join(line.split("#")[0] for line in (ROOT / name).read_text().splitlines())
        assert "torchvision" not in stated, name
    for path in [*MODULES, *TOOLS, *NOTEBOOKS]:
        if path.name != "doctor.py":  # which tells whether an installed one fits
            assert "torchvision" not in imported_packages(path), path.name


def test_package_data_is_declared():
    """Every file of the package that is not Python travels with it."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["*"]
    others = [
        p
        for p in LIBRARY.rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    ]
    assert all(any(path.match(pattern) for pattern in patterns) for path in others), others


def test_import_is_light_and_public_names_resolve():
    code = """if True:
        import gsv3d_lib, sys
        print('numpy' in sys.modules, 'torch' in sys.modules, gsv3d_lib.preset('tiny').name)
    """
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert answer.split() == ["False", "False", "tiny"]
    for name in gsv3d_lib.__all__:
        assert name in names_of(module_file(gsv3d_lib._HOMES[name]))
    with pytest.raises(AttributeError, match="offers Cameras"):
        _ = gsv3d_lib.no_such_name


# ---------------------------------------------------------------- doctor


def test_doctor_finds_nothing_broken_here(capsys, monkeypatch):
    # a GPU without a compiler would be a finding
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call("doctor", []) == 0
    report = capsys.readouterr().out
    assert report.startswith("ok    Python 3.") and report.endswith(
        "Everything that GSV3D needs is here.\n"
    )
    assert (
        "render()" in report
        and "data/checkpoints/tiny" in report
        and "data/checkpoints/small" in report
    )


def test_doctor_says_how_to_fix_a_package():
    lines = ("no-such-package>=1", "torch>=2", "torch>=999")
    missing, fine, too_new = (Requirement(line) for line in lines)
    assert [f.mark for f in doctor.package_findings([fine])] == [doctor.GOOD]
    for wanted in (missing, too_new):
        (finding,) = doctor.package_findings([fine, wanted])
        assert finding.mark == doctor.BROKEN
        assert f"run `pip install -U '{wanted}'`" in finding.sentence


@pytest.mark.parametrize(
    ("cuda", "nvcc", "compiled", "mark", "word"),
    [
        (False, False, False, doctor.FALLBACK, "numba"),
        (True, False, False, doctor.BROKEN, "nvcc"),
        (True, True, False, doctor.GOOD, "when first used"),
        (True, False, True, doctor.GOOD, "compiled already"),
    ],
)
def test_doctor_tells_which_rasteriser_will_run(cuda, nvcc, compiled, mark, word):
    finding = doctor.gsplat_finding(cuda, nvcc, compiled)
    assert finding.mark == mark and word in finding.sentence


def test_doctor_names_the_missing_parts_of_a_checkpoint(tmp_path):
    assert "make train-tiny" in doctor.checkpoint_finding(tmp_path).sentence
    (tmp_path / "gsv3d.json").write_text("{}")
    for part in ("vae", "clip", "dino", "unet", "decoder"):
        (tmp_path / part).mkdir()
    assert "lacks lora;" in doctor.checkpoint_finding(tmp_path).sentence
    (tmp_path / "lora").mkdir()
    assert doctor.checkpoint_finding(tmp_path).mark == doctor.GOOD


# ---------------------------------------------------------------- documents


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def test_make_help_lists_every_target():
    help_text = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[1] for line in help_text.splitlines()} == make_targets()


def test_ci_runs_make_lint_and_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and {"make lint", "make test"} <= set(
        script.read_text().splitlines()
    )
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [t.split("#")[0] for t in targets if not t.startswith(("http://", "https://", "#"))]
    assert [t for t in local if not (document.parent / t).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_targets_of_make_exist(document):
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.M)) <= make_targets()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_their_options_exist(document):
    """`python -m gsv3d_lib X --option` and `python tools/X.py --option` are ones that X
    declares.
    """
    check_commands(document.read_text())


def test_every_command_has_a_parser_and_a_place_in_the_help():
    text = door.build_parser().format_help()
    for name in door.COMMANDS:
        assert re.search(rf"^    {name} ", text, re.M), name
        assert "--help" in options_of(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_that_documents_name_exists(document):
    """`data/dataset.py` is a module, named with its folder, and `cameras.orbit_cameras`
    is defined in cameras.py.
    """
    own = [path for path in MODULES if "exercises" not in path.parts]
    modules = {
        path.parent.name if path.name == "__init__.py" else path.stem: path
        for path in [*TOOLS, *own]
    }
    assert len(modules) == len(TOOLS) + len(own), (
        "two modules of one name: documents could mean either"
    )
    text = document.read_text()
    files = [
        name
        for name in re.findall(r"`([\w/]+\.py)\b[^`]*`", text)
        if not re.search(r"TOPIC|NN", name)
    ]
    assert [
        name for name in files if not ((LIBRARY / name).is_file() or (ROOT / name).is_file())
    ] == []
    for module, name in re.findall(r"`(\w+)\.([A-Za-z_][\w.]*)`", text):
        if module in modules and name not in ("py", "md", "png", "json", "html"):  # file names
            assert name in names_of(modules[module]), f"{document.name}: {module}.{name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# --------------------------------------------------------------- what must not be there

FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.])/(?:work|root|farm|home/\w+|Users/\w+)/",
    "a package registry's address": r"(?i)https?://[\w.-]*(?:pypi|pythonhosted|npmjs|registry)[\w.-]*",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\bgh[opsu]_[A-Za-z0-9]{30,}",
    "a cloud key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_tracked_files_do_not_hold(what):
    pattern = re.compile(FORBIDDEN[what])
    hits = [
        (path.relative_to(ROOT), m[0])
        for path in repository_files()
        if (m := pattern.search(text_of(path)))
    ]
    assert hits == []


def test_tracked_files_are_small_and_free_of_pickles():
    files = repository_files()
    weights = [f for f in files if "checkpoints" in f.parts]
    assert sum(f.stat().st_size for f in weights) <= 70_000_000
    assert [f for f in set(files) - set(weights) if f.stat().st_size > 5_000_000] == []
    assert [f for f in files if f.suffix in (".pt", ".pth", ".pkl", ".pickle", ".ckpt")] == []
