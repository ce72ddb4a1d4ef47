"""The website: `make docs` turns notebooks, docs and docstrings into static pages.

The repository itself is the source folder, so that links between notebooks and docs are
the ones that GitHub follows. Notebooks are shown as committed; nothing is executed but
the gallery, which is made by the shipped weights. No page loads anything from another
host: MathJax and plotly.js travel inside Python packages and are copied.
"""

import inspect
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

import gsv3d_lib

ROOT = Path(__file__).resolve().parents[1]

project = "GSV3D"
author = "The GSV3D course"
release = version = gsv3d_lib.__version__
project_copyright = "MIT licence"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/[0-9][0-9]_*.ipynb",
    "notebooks/solutions/*.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "data/README.md",
    "data/checkpoints/*/README.md",
    "tools/README.md",
]
exclude_patterns = ["docs/_static/**", "docs/examples/**", "**/.ipynb_checkpoints"]

# ---------------------------------------------------------------- pages

html_theme = "furo"
html_title = "GSV3D, to learn from"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_js_files = ["figures.js"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"

# --------------------------------------------------------- notebooks and Markdown

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "html_image", "attrs_inline"]
myst_heading_anchors = 4
# GitHub shows the documents first: there a heading may skip a level, and a magic of
# IPython is no Python.
suppress_warnings = ["myst.header", "misc.highlighting_failure", "mystnb.unknown_mime_type"]

# MathJax 2 and its fonts, as Jupyter packs them.
MATHJAX = Path(find_spec("jupyter_server_mathjax").origin).parent / "static"
MATHJAX_PARTS = ["MathJax.js", "config", "extensions", "fonts", "jax"]
myst_update_mathjax = False
mathjax_path = "mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full"
# MathJax asks for fonts that are not packed, and for about:blank, which is no font.
NO_FONT = {"font-family": "none", "src": "local('-')"}
mathjax2_config = {
    "jax": ["input/TeX", "output/HTML-CSS"],
    "HTML-CSS": {
        "availableFonts": [],
        "webFont": "STIX-Web",
        "imageFont": None,
        "styles": {"@font-face": NO_FONT},
    },
    "NativeMML": {"styles": {f"@font-face /*{k}*/": NO_FONT for k in range(1, 9)}},
    "messageStyle": "none",
    "showMathMenu": False,
}


def with_own_environment(app, doctree, docname):
    """Sphinx puts a matrix and its equation into `split`, where \\tag is an error."""
    for node in doctree.findall(nodes.math_block):
        text = f"\\begin{{equation*}}{node.astext().strip()}\\end{{equation*}}"
        if not node.get("no-wrap"):
            node.children = [nodes.Text(text)]
            node["no-wrap"] = True


# ---------------------------------------------------------------- the reference

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
autodoc_mock_imports = ["bpy", "mathutils", "objaverse", "rembg"]
python_use_unqualified_type_names = True
add_module_names = False
viewcode_line_numbers = True


def without_builtins(app, what, name, obj, skip, options):
    """A clock of Python's own in a class has no source here."""
    return True if inspect.isbuiltin(getattr(obj, "__func__", obj)) else None


def modules_of_wing(app, docname, source):
    """A page of docs/api gets the modules that docs/map.md lists for its wing."""
    folder, _, wing = docname.rpartition("/")
    if folder != "docs/api":
        return
    listed = re.findall(r"^\| `([\w/]+)\.py`", (ROOT / "docs/map.md").read_text(), re.M)
    chosen = [name for name in listed if name.rpartition("/")[0].split("/")[0] == wing]
    chosen = [name for name in listed if "/" not in name] if wing == "chain" else chosen
    for name in chosen:
        module = name.removesuffix("/__init__").replace("/", ".")
        title = f"``{module}``"
        source[0] += f"\n{title}\n{'-' * len(title)}\n\n.. automodule:: gsv3d_lib.{module}\n"


def docstring_as_rst(app, what, name, obj, options, lines):
    """Docstrings here are plain text: names in `backquotes`, `name: what it is` for
    arguments, and indented lines as they stand.
    """
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = "\n\n".join(map(paragraph_as_rst, paragraphs)).split("\n") + [""]


def paragraph_as_rst(text):
    rows = text.split("\n")
    if text.strip() and all(row.startswith("    ") for row in rows):
        return "::\n\n" + text
    argument = re.compile(r"^[a-z_*][\w*]*(, [a-z_*][\w*]*)*( \[[^:]*)?: ")
    items, lead = [], []
    for row in rows:
        row = row.strip()
        if argument.match(row):
            items.append(row)
        elif items:
            items[-1] += " " + row
        else:
            lead.append(row)
    listed = "\n".join("- " + escaped(item) for item in items)
    return "\n\n".join(filter(None, [escaped(" ".join(lead)), listed]))


def escaped(text):
    """What reStructuredText would read as markup stands for itself, but for code."""
    parts = re.split(r"`([^`]+)`", text)
    plain = [re.sub(r"([\\*_|`:.+-])", r"\\\1", part) for part in parts[::2]]
    code = [f"\\ ``{part.strip()}``\\ " for part in parts[1::2]] + [""]
    return "".join(a + b for a, b in zip(plain, code))


# ---------------------------------------------------------------- interactive figures

PLOTLY = "application/vnd.plotly.v1+json"


def interactive_figures(app, docname, source):
    """A stored plotly figure becomes an element that figures.js draws when seen."""
    if not docname.startswith("notebooks/") or not source[0].lstrip().startswith("{"):
        return
    notebook = json.loads(source[0])
    outputs = (o for cell in notebook["cells"] for o in cell.get("outputs", []))
    for data in (o["data"] for o in outputs if PLOTLY in o.get("data", {})):
        figure = json.dumps(data.pop(PLOTLY)).replace("<", "\\u003c")
        data["text/html"] = (
            '<div class="plotly-figure" role="img" aria-label="Interactive figure">'
            f'<script type="application/json">{figure}</script></div>'
        )
    source[0] = json.dumps(notebook)


# ------------------------------------------------------- what is copied and made


def finish(app, error):
    if error is not None or app.builder.name != "html":
        return
    out, static = Path(app.outdir), Path(app.outdir) / "_static"
    for part in MATHJAX_PARTS:
        copy(MATHJAX / part, static / "mathjax" / part)
    copy(MATHJAX / "LICENSE", static / "mathjax" / "LICENSE")
    plotly = Path(find_spec("plotly").origin).parent / "package_data" / "plotly.min.js"
    copy(plotly, static / "plotly.min.js")
    (out / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>GSV3D</title>'
        '<meta http-equiv="refresh" content="0; url=docs/index.html">'
        '<a href="docs/index.html">GSV3D, to learn from</a>'
    )
    (out / ".nojekyll").touch()  # GitHub would leave out folders that begin with _
    if not (out / "gallery.html").exists():
        make_gallery(out / "gallery.html")


def make_gallery(path):
    """The bundled pictures, each made by both shipped checkpoints."""
    from gsv3d_lib.__main__ import main

    names = ["mug", "chair", "car", "face", "house"]
    pictures = [str(ROOT / f"data/images/{name}.png") for name in names]
    weights = [str(ROOT / f"data/checkpoints/{name}") for name in ("small", "tiny")]
    if main(["gallery", *pictures, "--weights", *weights, "--out", str(path)]):
        raise RuntimeError("the gallery could not be made")


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("a11y", "localization")
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
    else:
        shutil.copyfile(source, target)


def setup(app):
    app.connect("autodoc-process-docstring", docstring_as_rst)
    app.connect("autodoc-skip-member", without_builtins)
    app.connect("source-read", modules_of_wing)
    app.connect("source-read", interactive_figures)
    app.connect("doctree-resolved", with_own_environment)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
