"""The page in WebKit, which Safari and every browser on an iPhone use. It lets a video with sound start only muted."""

import os
import shutil
import subprocess
import time

import pytest

import app

webdriver = pytest.importorskip("selenium.webdriver")
Keys = webdriver.Keys
pytestmark = pytest.mark.skipif(
    not (shutil.which("WebKitWebDriver") and shutil.which("Xvfb")), reason="Debian's WebKitGTK is not installed"
)
OUTPUT = app.EXAMPLES.parent / "tests" / "output"
STATE = """
    const video = document.querySelector("#processed video"), button = document.querySelector("#sound");
    return video && {src: video.currentSrc, time: video.currentTime, duration: video.duration, muted: video.muted,
        paused: video.paused, ended: video.ended, offered: button.checkVisibility()};
"""


@pytest.fixture
def webkit(server):
    """WebKitGTK with the app in it."""
    reader, writer = os.pipe()
    screen = ["-screen", "0", "1400x1000x24", "-nolisten", "tcp"]
    display = subprocess.Popen(["Xvfb", "-displayfd", str(writer), *screen], pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader) as numbers:
        number = numbers.readline().strip()
    options = webdriver.WebKitGTKOptions()
    # Its sandbox needs namespaces, which containers and root do not have.
    env = {**os.environ, "DISPLAY": f":{number}", "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"}
    service = webdriver.WebKitGTKService(shutil.which("WebKitWebDriver"), env=env)
    try:
        driver = webdriver.WebKitGTK(options=options, service=service)
        try:
            driver.set_window_size(1400, 1000)
            driver.get(server)
            wait_for(driver, "return document.querySelector('#source input[type=file]') !== null", bool)
            yield driver
        finally:
            driver.quit()
    finally:
        display.terminate()
        display.wait(10)


def wait_for(driver, script, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = driver.execute_script(script)
        if value and condition(value):
            return value
        time.sleep(0.1)
    driver.save_screenshot(str(OUTPUT / "webkit-failed.png"))
    raise AssertionError(f"the page did not get there: {value}")


def test_a_video_starts_muted_and_after_one_key_it_plays_with_sound_to_its_end(webkit):
    OUTPUT.mkdir(exist_ok=True)
    path = app.EXAMPLES / "bouncing-shapes.mp4"
    webkit.find_element("css selector", "#source input[type=file]").send_keys(str(path))
    state = wait_for(webkit, STATE, lambda state: state["time"] > 0.3)
    webkit.save_screenshot(str(OUTPUT / "webkit-muted.png"))
    assert state["muted"] and state["offered"]
    webkit.find_element("id", "sound").send_keys(Keys.ENTER)
    state = wait_for(webkit, STATE, lambda state: not state["muted"] and not state["offered"], seconds=5)
    wait_for(webkit, STATE, lambda now: now["time"] > state["time"] + 1 and not now["paused"])
    webkit.save_screenshot(str(OUTPUT / "webkit-sound.png"))
    webkit.execute_script("document.querySelector('#processed video').currentTime = 3")
    before = wait_for(webkit, STATE, lambda state: state["time"] > 3.3)
    webkit.find_element("css selector", "#threshold input[type=range]").send_keys(Keys.ARROW_RIGHT)
    after = wait_for(webkit, STATE, lambda now: now["src"] != before["src"] and now["time"] > before["time"] - 0.3)
    assert after["time"] < before["time"] + 8
    wait_for(webkit, "return document.querySelector('#status').innerText", lambda status: "Done" in status)
    webkit.execute_script(
        "const video = document.querySelector('#processed video'); video.currentTime = video.duration - 1"
    )
    last = wait_for(webkit, STATE, lambda state: state["ended"])
    assert last["duration"] == pytest.approx(app.read_video_info(path).duration_seconds, abs=0.2)
    widths = "return [...document.querySelectorAll('.gallery-item')].map(item => item.offsetWidth)"
    assert all(20 < width < 200 for width in webkit.execute_script(widths)), "examples beside each other"
