"""JupyterLab in a headless browser, used as a person would: open, Run All, move a
slider, turn a figure.

Every helper that acts raises an AssertionError that says what did not happen.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest

from gsv3d_lib.system.doctor import BROWSERS

FLAGS = (
    "--disable-gpu --enable-unsafe-swiftshader --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
# a figure that needs a CDN stays blank
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}',
    # every cell is in the page
    "notebook-extension/tracker": '{"windowingMode": "none", "scrollPastEnd": false}',
    "docmanager-extension/plugin": '{"autosave": false}',
}
PLOTLY = "application/vnd.plotly.v1+json"
PARTS_OF_A_SCREENSHOT = 12_000  # pixels; Chromium draws at most 16,384

# JupyterLab that ends, and its kernels with it, when the tests that started it were
# killed.
SERVER = """
import os, signal, threading, time
from jupyterlab.labapp import main
def follow(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=follow, args=[os.getppid()], daemon=True).start()
main()
"""

# The open notebook's panel, its kernel, and what its cells say. A cell that waits or
# runs has no execution count.
STATE = """name => {
  const panel = window.jupyterapp?.shell.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
  if (panel?.context?.path !== name || !panel.content.widgets || !kernel) return null;
  const cells = panel.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.getSource().trim());
  const failed = [];
  for (const cell of cells) {
    if ((cell.model.getMetadata('tags') ?? []).includes('raises-exception')) continue;
    for (let i = 0; i < cell.model.outputs.length; i++) {
      const output = cell.model.outputs.get(i), error = output.type === 'error' ? output.toJSON() : null;
      if (error) failed.push(`${cell.model.sharedModel.getSource()}\n${error.ename}: ${error.evalue}`);
    }
  }
  return {ready: panel.sessionContext.isReady, connection: kernel.connectionStatus, status: kernel.status, failed,
          dialog: document.querySelector('.jp-Dialog')?.innerText ?? '',
          cells: cells.length, run: cells.filter(c => c.model.executionCount !== null).length};
}"""

# Notes when the picture of an explorer changes, from the first key or pointer movement
# on.
WATCH = """explorer => {
  const picture = explorer.querySelector('img.gsv3d-picture'), watch = {start: null, frames: []};
  for (const kind of ['keydown', 'pointermove', 'mousemove'])
    window.addEventListener(kind, event => { watch.start ??= event.timeStamp; }, {capture: true});
  watch.observer = new MutationObserver(() => { if (watch.start !== null) watch.frames.push(performance.now()); });
  watch.observer.observe(picture, {attributes: true, attributeFilter: ['src']});
  window.gsv3dWatch?.observer.disconnect();
  window.gsv3dWatch = watch;
}"""

PICTURE = """async explorer => {
  const bytes = await (await fetch(explorer.querySelector('img.gsv3d-picture').src)).arrayBuffer();
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(hash, byte => byte.toString(16)).join(' ');
}"""


# ---------------------------------------------------------------- the server


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """JupyterLab on `folder/notebooks`, with all its own files elsewhere in `folder` ->
    its address. Offline.
    """
    for name, text in SETTINGS.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "notebooks").mkdir(exist_ok=True)
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
    }
    own |= {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(folder / path) for name, path in own.items()}
    # a kernel's; the browser and other tests want the other cores
    environment["OMP_NUM_THREADS"] = "1"
    # conftest's would keep kernels from showing matplotlib's figures
    environment.pop("MPLBACKEND", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"""--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0
        --IdentityProvider.token= --LabApp.expose_app_in_browser=True --LabApp.extension_manager=readonly
        --ServerApp.root_dir={folder / "notebooks"}""".split()
    log = folder / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *options],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _until_it_answers(server, address, log)
        yield address
    finally:
        server.terminate()  # it shuts its kernels down
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _until_it_answers(
    server: subprocess.Popen, address: str, log: Path, patience: float = 120
) -> None:
    started = time.monotonic()
    while time.monotonic() - started < patience and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@contextmanager
def headless_browser() -> Iterator:
    """A headless browser that reaches nothing but this machine; skips the tests where
    there is none.
    """
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright to test the notebooks in a browser"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(
            "no Chrome or Chromium here: apt-get install chromium to test the notebooks in a browser"
        )
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=path, args=[*FLAGS, OFFLINE]) as instance:
            yield instance


# ---------------------------------------------------------------- notebooks


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of code cells."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=list(map(nbformat.v4.new_code_cell, cells)), metadata=kernel
        ),
        path,
    )


def copy_notebook(notebook: nbformat.NotebookNode, path: Path, elsewhere: Path) -> None:
    """The notebook as `path`, without outputs, so that what is seen later was made
    here; what it would write to the repository's runs/ and data/cache/ goes below
    `elsewhere`.
    """
    notebook = deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(
                r"""(["'])(runs|data/cache)/""", rf"\g<1>{elsewhere.as_posix()}/\g<2>/", cell.source
            )
    nbformat.write(notebook, path)


def figures_of(notebook: nbformat.NotebookNode) -> Iterator[tuple[int, str]]:
    """(number of the code cell, CSS selector of what it should show) of every figure
    that the notebook came with.
    """
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        for data in (output.get("data", {}) for output in cell.outputs):
            if PLOTLY in data:
                yield number, ".js-plotly-plot"
            elif "image/png" in data:
                yield number, "img"
            elif "Explorer with frames" in data.get("text/html", ""):
                yield number, ".gsv3d-explorer"  # live here; the frames are for readers
            elif "<iframe" in data.get("text/html", ""):
                yield number, "iframe"


@contextmanager
def open_notebook(browser, address: str, name: str, patience: float = 300) -> Iterator:
    """A browser page with the notebook `name` and its connected, idle kernel; ends with
    the kernel shut down.
    """
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    try:
        page.set_default_timeout(60_000)
        page.goto(
            f"{address}/lab/workspaces/{Path(name).stem}/tree/{name}", timeout=1000 * patience
        )
        _wait(
            page,
            "s => s?.ready && s.connection === 'connected' && s.status === 'idle'",
            name,
            patience,
        )
        page.notebook = name
        yield page
    finally:
        page.evaluate("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()")
        page.close()


def _wait(page, condition: str, name: str, patience: float) -> dict:
    """Polls the notebook's STATE until it fulfils the JavaScript `condition` -> that
    state.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        state = page.evaluate(STATE, name)
        if page.evaluate(condition, state):
            return state
        page.wait_for_timeout(250)
    raise AssertionError(f"{name} after {patience:.0f} s: {state or 'not open'}")


def run_all(page, patience: float = 600) -> float:
    """Menu Run > Run All Cells -> seconds until every code cell has run. Raises where a
    cell shows an error.
    """
    started = time.perf_counter()
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    over = "s => s.failed.length || s.dialog || s.status === 'dead' || s.run === s.cells && s.status === 'idle'"
    state = _wait(page, over, page.notebook, patience)
    if state["failed"]:
        raise AssertionError(f"{page.notebook} shows an error:\n" + "\n\n".join(state["failed"]))
    if state["run"] < state["cells"]:
        raise AssertionError(f"{page.notebook} did not run to its end: {state}")
    return time.perf_counter() - started


def save_screenshot(page, path: Path) -> None:
    """The whole notebook as `path`, or, where it is too long for one, as several
    pictures `path`-2 and so on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    panel, old = page.locator(".jp-NotebookPanel .jp-WindowedPanel-outer"), page.viewport_size
    # menu, tabs, toolbar, status bar
    frame = old["height"] - panel.evaluate("panel => panel.clientHeight")
    height = panel.evaluate("panel => panel.scrollHeight")
    seen = min(height, PARTS_OF_A_SCREENSHOT)
    page.set_viewport_size({"width": old["width"], "height": seen + frame})
    for part, top in enumerate(range(0, height, seen)):
        panel.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
        page.wait_for_timeout(1000)  # figures follow the new size
        page.screenshot(
            path=path if part == 0 else path.with_stem(f"{path.stem}-{part + 1}"), timeout=120_000
        )
    page.set_viewport_size(old)


# ------------------------------------------------------------ what a person does in one


def move_slider_and_expect_change(explorer, patience: float = 10) -> float:
    """Press a key on the explorer's first slider -> seconds from the key to the new
    picture.

    Raises where the picture stays as it was, and where the explorer shows the error of
    its callback.
    """
    handle = explorer.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    before = explorer.evaluate(PICTURE)
    low, high, now = (
        float(handle.get_attribute(f"aria-value{which}")) for which in ("min", "max", "now")
    )
    explorer.evaluate(WATCH)
    handle.focus()
    handle.press("PageUp" if now < (low + high) / 2 else "PageDown")  # five steps
    seconds = _answer(explorer, patience)
    if explorer.evaluate(PICTURE) == before:
        raise AssertionError("the picture was redrawn but looks as before")
    return seconds


def _answer(explorer, patience: float) -> float:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        expect_no_message(explorer)
        start, frames = explorer.evaluate(
            "() => [window.gsv3dWatch.start, window.gsv3dWatch.frames]"
        )
        if frames:
            return (frames[0] - start) / 1000
        explorer.page.wait_for_timeout(20)
    raise AssertionError(f"the picture did not change within {patience:.0f} s of the slider's move")


def expect_no_message(explorer) -> None:
    """Raises where the explorer shows that its callback failed."""
    message = " ".join(explorer.locator(".widget-html-content pre").all_inner_texts())
    if message:
        raise AssertionError(f"the explorer shows: {message}")


def drag_slider(explorer, seconds: float = 2.0) -> float:
    """Drag the first slider to and fro without a pause -> pictures per second."""
    handle = explorer.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    mouse, box, track = (
        explorer.page.mouse,
        handle.bounding_box(),
        explorer.locator(".noUi-base").first.bounding_box(),
    )
    y = box["y"] + box["height"] / 2
    mouse.move(box["x"] + box["width"] / 2, y)
    mouse.down()
    explorer.evaluate(WATCH)
    started, step = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        step += 1
        phase = abs((step / 30 + 0.5) % 2 - 1)
        mouse.move(track["x"] + phase * track["width"], y)
        explorer.page.wait_for_timeout(15)
    mouse.up()
    expect_no_message(explorer)
    frames = explorer.evaluate("() => window.gsv3dWatch.frames")
    if len(frames) < 2:
        raise AssertionError(f"{len(frames)} pictures in {seconds:.0f} s of dragging")
    return (len(frames) - 1) * 1000 / (frames[-1] - frames[0])


def rotate_and_expect_change(figure, patience: float = 10) -> None:
    """Drag across a plotly 3D figure; raises where its camera stays as it was."""
    figure.scroll_into_view_if_needed()
    camera = "figure => JSON.stringify(figure._fullLayout?.scene?._scene?.getCamera().eye ?? null)"
    until = time.monotonic() + patience
    while (before := figure.evaluate(camera)) == "null":
        if time.monotonic() > until:
            raise AssertionError("the figure has no 3D scene")
        figure.page.wait_for_timeout(100)
    box, mouse = figure.bounding_box(), figure.page.mouse
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse.move(x, y)
    mouse.down()
    mouse.move(x + 80, y + 20, steps=4)
    mouse.up()
    until = time.monotonic() + patience
    while figure.evaluate(camera) == before:
        if time.monotonic() > until:
            raise AssertionError(f"dragging did not turn the figure; its camera stays at {before}")
        figure.page.wait_for_timeout(100)


def figures_in_3d(page) -> list:
    """The plotly figures of the page that have a 3D scene."""
    return (
        page.locator(".js-plotly-plot")
        .filter(has=page.locator(".gl-container canvas, .gl-container #scene"))
        .all()
    )


def expect_splats(iframe, patience: float = 10) -> None:
    """Raises where the canvas of a splat viewer stays white."""
    iframe.scroll_into_view_if_needed()
    frame = iframe.element_handle().content_frame()
    canvas = frame.wait_for_selector("canvas")
    drawn = """canvas => {
      const copy = document.createElement('canvas').getContext('2d');
      if (!(copy.canvas.width = canvas.width) || !(copy.canvas.height = canvas.height)) return 0;
      copy.drawImage(canvas, 0, 0);
      const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
      return pixels.filter((value, i) => i % 4 < 3 && value < 250).length / pixels.length;
    }"""
    until = time.monotonic() + patience
    while canvas.evaluate(drawn) < 0.002:
        if time.monotonic() > until:
            raise AssertionError("the splat viewer's canvas is white")
        iframe.page.wait_for_timeout(200)
