"""The shop window: the website, its workflow, cards for the Hub, small pictures.

The site is built and walked only where the extra [docs] is installed; otherwise these
tests are skipped and say so.
"""

import json
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser_world as world
import card
import pytest
import thumbnails
import yaml
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from gsv3d_lib.data.dataset import write_index
from gsv3d_lib.weights import sv3d

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("small", "tiny")
ELSEWHERE = re.compile(r"""(?:src|data-src|poster)=["'](?:https?:)?//|@import|url\(["']?https?:""")


# ---------------------------------------------------------------- what needs no extra


def test_every_wing_of_the_map_has_a_page_in_the_api():
    listed = re.findall(r"^\| `([\w/]+)\.py`", (ROOT / "docs/map.md").read_text(), re.M)
    wings = {name.split("/")[0] if "/" in name else "chain" for name in listed}
    assert wings == {path.stem for path in (ROOT / "docs/api").glob("*.rst")}
    toctree = (ROOT / "docs/api.md").read_text()
    assert wings == set(re.findall(r"^api/(\w+)$", toctree, re.M))


def test_every_document_is_on_the_site():
    index = (ROOT / "docs/index.md").read_text() + (ROOT / "docs/cards.md").read_text()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(re.findall(r"^([\w./-]+)$", index, re.M))


def test_the_workflow_builds_and_publishes_what_make_docs_makes():
    workflow = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}  # YAML reads "on"
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    steps = [step.get("run") or step["uses"] for step in build["steps"]]
    assert "make docs" in steps
    (artifact,) = [s for s in build["steps"] if "upload-pages-artifact" in s.get("uses", "")]
    recipe = (ROOT / "Makefile").read_text().split("\ndocs:")[1].split("\n\n")[0]
    assert artifact["with"]["path"] in recipe and " -W " in recipe
    assert publish["needs"] == "build" and "pull_request" in publish["if"]
    for job in (build, publish):
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)


@pytest.mark.parametrize("kind", KINDS)
def test_model_cards_carry_what_was_measured(kind):
    text = (ROOT / f"data/checkpoints/{kind}/README.md").read_text()
    data = ModelCard(text).data
    assert data.license == "mit" and data.pipeline_tag == "image-to-3d"
    measured = json.loads((ROOT / f"data/results/{kind}-gso.json").read_text())["mean"]["generated"]
    stated = {result.metric_type: result.metric_value for result in data.eval_results}
    assert stated == {name: round(measured[name], 3) for name in stated} and "psnr" in stated


def test_a_dataset_gets_a_card(tmp_path, capsys):
    from tiny_world import object_views

    from gsv3d_lib.data.dataset import write_object

    views = object_views("chair", 0.0)
    write_object(tmp_path, views)
    write_index(tmp_path, [{"id": views.id, "licence": "CC-BY-4.0", "creator": "Somebody"}])
    assert card.main([str(tmp_path), "--name", "Chairs"]) == 0
    text = (tmp_path / "README.md").read_text()
    data = DatasetCard(text).data
    assert data.license == "cc-by-4.0" and data.size_categories == ["n<1K"]
    assert "1 objects" in text and "Somebody (1)" in text
    assert card.main([str(tmp_path)]) == 2 and "is there already" in capsys.readouterr().err


def test_a_name_of_the_hub_is_fetched_only_when_told(tmp_path, monkeypatch):
    from gsv3d_lib.pipeline import GSV3DPipeline

    asked = []
    monkeypatch.setattr(sv3d, "fetch_checkpoint", lambda name: asked.append(name) or tmp_path)
    with pytest.raises(FileNotFoundError):
        GSV3DPipeline.from_pretrained("nobody/nothing")
    assert asked == []
    with pytest.raises(FileNotFoundError):  # the folder that was fetched is empty
        GSV3DPipeline.from_pretrained("nobody/nothing", download=True)
    assert asked == ["nobody/nothing"]


def test_pictures_of_documents_are_small():
    pictures = [path for path in (ROOT / "docs/images").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in pictures) < 400_000
    for path in (ROOT / "docs/images/course").glob("*.webp"):
        assert Image.open(path).size == thumbnails.SIZE
    shown = set(re.findall(r"docs/images/course/(\d\d).webp", (ROOT / "README.md").read_text()))
    assert shown == {path.stem for path in (ROOT / "docs/images/course").glob("*.webp")}


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built website; a warning of Sphinx fails it."""
    for extra in ("sphinx", "myst_nb", "furo", "sphinx_copybutton", "jupyter_server_mathjax"):
        pytest.importorskip(extra, reason='pip install -e ".[docs]" to test the website')
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-c", "docs", "-d", str(out / "doctrees"), ".", str(out / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "html"


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.links |= {named[key] for key in ("href", "src") if named.get(key)}
        self.ids |= {named[key] for key in ("id", "name") if named.get(key)}


def pages_of(site):
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


def test_links_of_the_site_lead_somewhere(site):
    broken = []
    parsed = {path: Links(path.read_text()) for path in pages_of(site)}
    for path, page in parsed.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:") or not parts.path:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            if not target.exists():
                broken.append((path.name, link))
            elif target in parsed and parts.fragment and parts.fragment not in parsed[target].ids:
                broken.append((path.name, link))
    assert broken == []


def test_the_site_loads_nothing_from_another_host(site):
    assert [path for path in pages_of(site) if ELSEWHERE.search(path.read_text())] == []


@pytest.fixture(scope="module")
def browser():
    with world.headless_browser() as instance:
        yield instance


@pytest.fixture(scope="module")
def address(site):
    """The site as a server gives it: search shows no excerpts from file://."""
    handler = partial(QuietHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture
def page(browser, address):
    """A page whose errors and requests to elsewhere fail the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("response", lambda r: problems.append(r.url) if r.status >= 400 else None)
    foreign = f"https?://(?!{address.split('//')[1]})"
    page.on("request", lambda r: problems.append(r.url) if re.match(foreign, r.url) else None)
    yield page
    assert problems == []
    page.close()


def test_a_walk_through_the_site(page, address):
    page.goto(f"{address}/index.html")
    page.wait_for_url("**/docs/index.html")
    page.get_by_role("link", name="notebook 00").click()
    page.wait_for_url("**/notebooks/00_*.html")
    figure = page.locator(".plotly-figure").first
    figure.scroll_into_view_if_needed()
    figure.locator("canvas, svg.main-svg").first.wait_for(state="attached", timeout=120_000)
    world.expect_splats(page.locator("iframe[srcdoc]").first, patience=60)
    page.locator(".sidebar-search").first.fill("back-projection")
    page.locator(".sidebar-search").first.press("Enter")
    page.wait_for_url("**/search.html*")
    page.locator("#search-results li").first.wait_for(timeout=60_000)


SETTLED = """() => window.MathJax?.Hub?.queue.pending === 0
  && !document.querySelector(".MathJax_Processing")"""


@pytest.mark.parametrize("number", ["02", "03", "07", "08"])
def test_equations_are_drawn(page, site, address, number):
    """Matrices under a number, and fonts of every alphabet."""
    path = next((site / "notebooks").glob(f"{number}_*.html"))
    page.goto(f"{address}/notebooks/{path.name}")
    page.wait_for_function(SETTLED, timeout=120_000)
    assert page.locator(".MathJax .math").count() > 20
    assert page.locator(".merror, .noError").all_inner_texts() == []


def test_the_gallery_of_the_site(page, address):
    page.goto(f"{address}/docs/gallery.html")
    frame = page.frame_locator("iframe.viewer")
    frame.get_by_role("button", name="Compare two objects").click(timeout=60_000)
    frame.get_by_label("Input laid over the source view").fill("0.5")  # a slider
    assert frame.locator(".card").count() == 10


def test_the_site_fits_a_phone_and_the_dark(browser, address):
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    for name in ("docs/index.html", "docs/results.html", "README.html", "docs/gallery.html"):
        page.goto(f"{address}/{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 361, name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", ground)[:3])) < 80, name
        for code in page.locator(".highlight").all()[:1]:
            ground = code.evaluate("e => getComputedStyle(e).backgroundColor")
            assert max(map(int, re.findall(r"\d+", ground)[:3])) < 120, name
    page.close()
