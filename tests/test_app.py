"""The app in a browser: a file that is no picture, then one, its mask, the object."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import browser_world as world
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "notebooks/app.ipynb"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app as `make app` serves it -> its address."""
    pytest.importorskip("voila", reason='pip install -e ".[app]" to test the app')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--template=gsv3d", "--Voila.ip=127.0.0.1", "--no-browser", f"--port={port}"]
    log = tmp_path_factory.mktemp("app") / "log"
    own = {"JUPYTER_PATH": str(ROOT / "notebooks/app"), "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "voila", str(APP), *options],
            cwd=ROOT,
            env=os.environ | own,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/static/", server, log)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(address: str, server: subprocess.Popen, log: Path, patience: float = 120) -> None:
    started = time.monotonic()
    while time.monotonic() - started < patience and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"voila did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def browser():
    with world.headless_browser() as instance:
        yield instance


def test_the_app_is_a_notebook_without_outputs_and_listens_to_nobody_else():
    notebook = nbformat.read(APP, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    recipe = (ROOT / "Makefile").read_text().split("\napp:")[1].split("\n\n")[0]
    assert "--Voila.ip=127.0.0.1" in recipe


def test_a_bad_file_then_a_picture_becomes_an_object(address, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1000, "height": 1400})
    page.set_default_timeout(240_000)
    elsewhere = []
    page.on("request", lambda r: elsewhere.append(r.url) if "//127.0.0.1" not in r.url else None)
    page.goto(address)
    (tmp_path / "bad.png").write_text("no picture")
    files = page.locator("input[type=file]")
    files.wait_for(state="attached")
    files.set_input_files(tmp_path / "bad.png")
    page.get_by_role("alert").wait_for()
    assert "bad.png is not an image" in page.get_by_role("alert").inner_text()

    files.set_input_files(ROOT / "data/images/mug.png")
    canvas = page.locator(".gsv3d-drop canvas")
    canvas.wait_for()
    page.get_by_text("Painting corrects the mask.").wait_for()
    page.get_by_label("models").select_option(label="tiny, 64 px")
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    box = canvas.bounding_box()
    page.get_by_label("remove").check()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.85 * box["width"], box["y"] + 0.6 * box["height"], steps=5)
    page.mouse.up()
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    page.get_by_role("button", name="Make the object").click()
    page.get_by_text("Step 1 of").wait_for()
    world.expect_splats(page.locator("iframe[srcdoc]").first, patience=240)
    with page.expect_download() as download:
        page.locator('a[download="object.ply"]').click()
    assert download.value.path().read_bytes().startswith(b"ply")
    local = [url for url in elsewhere if url.startswith("http")]
    assert local == []
    page.close()


def test_the_app_opens_in_jupyterlab_as_well(browser, tmp_path):
    with world.jupyterlab(tmp_path) as address:
        (tmp_path / "notebooks/app.ipynb").write_bytes(APP.read_bytes())
        with world.open_notebook(browser, address, "app.ipynb") as page:
            world.run_all(page)
            page.get_by_role("button", name="Choose a picture").wait_for()
