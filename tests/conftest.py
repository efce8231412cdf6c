"""The tests run on the detector that ships with the app, so that nothing depends on the Hub."""

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests" / "support")]
os.environ.setdefault("MODEL_ID", str(ROOT / "examples" / "shapes-rtdetr"))
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="cache-of-tests-")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-of-tests-")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # where nothing listens, and refuses at once, as without a network
for folder in ("GRADIO_TEMP_DIR", "HF_HOME"):
    atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """All files of the server under test, as `running_app` makes them."""
    return tmp_path_factory.mktemp("cache")


@contextlib.contextmanager
def running_app(folder: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """The address and the process id of the app, running as `python app.py` does, with settings in its environment.

    Gradio's cache is in the subfolder `gradio`, temporary files are in `tmp`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "tmp").mkdir()
    folders = {"GRADIO_TEMP_DIR": str(folder / "gradio"), "TMPDIR": str(folder / "tmp")}
    env = {**os.environ, **folders, "GRADIO_SERVER_PORT": str(port), **settings}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.25)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def server_process(cache) -> Iterator[tuple[str, int]]:
    """The address and the process id of the app."""
    with running_app(cache) as address:
        yield address


@pytest.fixture(scope="session")
def server(server_process) -> str:
    """The address of the app."""
    return server_process[0]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium where there is one, else the one that Playwright has installed."""
    flags = (
        "--no-sandbox --disable-gpu --autoplay-policy=no-user-gesture-required --disable-background-networking "
        "--disable-component-update --disable-sync --use-fake-device-for-media-stream "
        "--use-fake-ui-for-media-stream"
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags.split())
        yield chromium
        chromium.close()


@contextlib.contextmanager
def open_page(browser: Browser, url: str) -> Iterator[Page]:
    """The app in a fresh tab, loaded. No script may fail in it. All tabs share the browser's cache."""
    context = browser.contexts[0] if browser.contexts else browser.new_context()
    tab = context.new_page()
    tab.set_viewport_size({"width": 1280, "height": 900})
    errors = []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.goto(url)
    tab.get_by_label("Confidence threshold").first.wait_for()
    yield tab
    tab.close()
    # Gradio's player does not catch the error of a video that is replaced just when it begins to play.
    assert not [error.stack for error in errors if error.name != "AbortError"]


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    with open_page(browser, server) as tab:
        yield tab


@pytest.fixture
def new_threads() -> Callable[[], set[threading.Thread]]:
    """A function that returns the threads that have become busy during the test and still are."""
    from streams import busy_threads  # loads the app

    before = busy_threads()
    return lambda: busy_threads() - before
