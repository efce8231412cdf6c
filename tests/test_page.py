"""The page in a real browser. Screenshots of its states are kept in `tests/output/`."""

import base64
import io
import json
import math
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from videos import Kind, assert_colours, ffmpeg

import app
from draw_boxes import label_color
from video import read_video_info

EXAMPLE = app.EXAMPLES / "bouncing-shapes.mp4"
OUTPUT = Path(__file__).parent / "output"
# The streamed video is the only one that plays from a blob.
PLAYER = """() => {
    const video = [...document.querySelectorAll("video")].find(v => v.currentSrc.startsWith("blob:"));
    return video && {
        time: video.currentTime, duration: video.duration, ended: video.ended, src: video.currentSrc,
        width: video.videoWidth, height: video.videoHeight, audio: video.webkitAudioDecodedByteCount,
    };
}"""
PICTURE = """() => {
    const video = [...document.querySelectorAll("video")].find(v => v.currentSrc.startsWith("blob:"));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    return canvas.toDataURL("image/png");
}"""


def screenshot(page, name):
    OUTPUT.mkdir(exist_ok=True)
    page.screenshot(path=OUTPUT / f"{name}.png", full_page=True)


def wait_for(page, condition, seconds=60):
    """The player's state once `condition` holds for it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = page.evaluate(PLAYER)
        if state and condition(state):
            return state
        page.wait_for_timeout(100)
    raise AssertionError(f"the player did not get there: {state}")


def picture_of(page):
    """What the player shows, uint8 (H, W, 3) RGB."""
    data = page.evaluate(PICTURE).split(",")[1]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def upload(page, path):
    page.locator("input[type=file]").first.set_input_files(path)


def count_label_colours(picture):
    """How many of the shapes' label colours cover enough pixels for a box."""
    count = 0
    for label in app.DETECTOR.id2label.values():
        color = label_color(label)
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        count += (np.abs(picture.astype(int) - rgb).max(axis=2) < 40).sum() > 60
    return count


def clear(page):
    """Close what lies over the source, such as Gradio's own error, and then the source."""
    buttons = page.locator("#source").get_by_label("Clear")
    while buttons.count():
        buttons.first.click()
        page.wait_for_timeout(300)


def test_an_uploaded_video_streams_back_with_boxes_and_sound_to_its_last_frame(page):
    screenshot(page, "empty")
    info = read_video_info(EXAMPLE)
    upload(page, EXAMPLE)
    early = wait_for(page, lambda state: state["time"] > 0.5)
    screenshot(page, "streaming")
    boxes = count_label_colours(picture_of(page))
    assert boxes >= 1, "no box is drawn in the player's picture"
    done = wait_for(page, lambda state: state["ended"])
    screenshot(page, "done")
    assert done["time"] > early["time"]
    assert done["duration"] == pytest.approx(info.duration_seconds, abs=0.15)
    assert (done["width"], done["height"]) == (320, 180)
    assert done["audio"] > 10_000


def test_a_click_on_an_example_starts_the_stream(page):
    page.locator("button.gallery-item, .gallery button, table tr.tr-body").first.click()
    assert wait_for(page, lambda state: state["time"] > 0.3)


def test_a_finished_webcam_recording_starts_the_stream(page):
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.get_by_label("start recording").click()
    page.wait_for_timeout(2500)
    page.locator("#source").get_by_text("Stop").click()
    state = wait_for(page, lambda state: state["ended"])
    assert state["duration"] > 0.5


def test_a_file_that_is_not_a_video_gets_a_sentence_and_the_page_can_be_used_on(page, tmp_path):
    broken = tmp_path / "notes.mp4"
    broken.write_text("this is not a video")
    upload(page, broken)
    expect(page.get_by_text("incomplete or not a video").first).to_be_visible(timeout=20_000)
    screenshot(page, "error")
    assert "Traceback" not in page.content()
    clear(page)
    upload(page, EXAMPLE)
    wait_for(page, lambda state: state["time"] > 0.3)


def test_a_damaged_file_plays_as_far_as_it_goes_and_a_warning_says_so(page, tmp_path):
    whole = Kind("damaged", frames=240, size=(320, 180), muxer=("-movflags", "+faststart")).make(tmp_path)
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    upload(page, path)
    expect(page.get_by_text("This video is damaged").first).to_be_visible(timeout=30_000)
    screenshot(page, "damaged")
    assert 2 < wait_for(page, lambda state: state["ended"])["duration"] < 8


def test_the_players_duration_is_the_sources(page, tmp_path):
    path = Kind("ntsc", "mkv", rate=30000 / 1001, frames=160, audio=("-c:a", "libopus")).make(tmp_path)
    upload(page, path)
    state = wait_for(page, lambda state: state["ended"])
    assert state["duration"] == pytest.approx(160 * 1001 / 30000, abs=0.1)
    assert state["audio"] > 10_000


def test_a_video_without_sound_plays_without_sound(page, tmp_path):
    path = Kind("silent", frames=70, audio=()).make(tmp_path)
    upload(page, path)
    state = wait_for(page, lambda state: state["ended"])
    assert state["audio"] == 0


def test_the_page_names_the_model_that_is_loaded(page):
    expect(page.get_by_text("Model: shapes-rtdetr")).to_be_visible()


def test_colours_are_right_in_the_player_and_in_the_download(page, tmp_path):
    """At a height of 2 mod 4, where the colours were once below their shapes."""
    path = Kind("colours", frames=70, size=(320, 180)).make(tmp_path)
    page.get_by_label("number input for Confidence threshold").fill("1")
    upload(page, path)
    assert wait_for(page, lambda state: state["ended"])["height"] == 90
    assert_colours(picture_of(page))
    with av.open(download(page).path()) as container:
        for frame in container.decode(video=0):
            assert_colours(frame.to_ndarray(format="rgb24"))


def test_the_plot_draws_every_class_of_the_table(page):
    """Also those that first appear after its first update: a star, and later a circle."""
    upload(page, app.EXAMPLES / "rising-shapes.mp4")
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)
    page.wait_for_timeout(1000)
    table = page.locator("#table").inner_text()
    classes = [name for name in app.DETECTOR.id2label.values() if name in table]
    lines = page.locator("#plot svg .mark-line.role-mark path[stroke]")
    colours = {line.get_attribute("stroke") for line in lines.all()}
    assert colours == {label_color(name) for name in classes}
    assert len(colours) >= 4
    ticks = page.locator("#plot svg .role-axis-label").last.locator("text").all_text_contents()
    assert ticks == [str(number) for number in range(len(ticks))], "whole numbers, each once"


def test_a_video_without_detections_has_no_plot(page, tmp_path):
    page.get_by_label("number input for Confidence threshold").fill("1")
    upload(page, Kind("nothing", frames=30).make(tmp_path))
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
    expect(page.locator("#plot")).not_to_be_visible()


@pytest.mark.parametrize(("typed", "becomes"), [("", "0.45"), ("7", "1"), ("-3", "0")])
def test_a_bad_number_in_the_threshold_box_is_mended_and_covers_nothing(page, typed, becomes):
    box = page.get_by_label("number input for Confidence threshold")
    box.fill("0.45")
    upload(page, EXAMPLE)
    wait_for(page, lambda state: state["time"] > 0.3)
    box.fill(typed)
    page.wait_for_timeout(700)
    assert page.evaluate(PLAYER), "the video goes on"
    changed = playlist_changes(page)
    box.press("Tab")
    expect(box).to_have_value(becomes)
    if typed:
        changed()
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)
    expect(page.locator(".error, .toast-body")).to_have_count(0)
    assert json.loads(Path(download(page, "json").path()).read_text())["threshold"] == float(becomes)


# ------------------------------------------------------------------------------- the slider, classes, Stop


@pytest.fixture
def long_video(tmp_path):
    """Half a minute, so that things can be done while it streams."""
    path = tmp_path / "long.mp4"
    ffmpeg("-stream_loop", 4, "-i", EXAMPLE, "-c", "copy", path)
    return path


def playlist_changes(page, seconds=30):
    """Wait until the player has another source than it has now."""
    before = page.evaluate(PLAYER)["src"]
    return lambda: wait_for(page, lambda state: state["src"] != before and state["time"] > 0.2, seconds)


@pytest.mark.parametrize("how", ["drag", "arrow key", "number", "reset"])
def test_every_way_to_move_the_slider_redraws_the_video(page, how):
    upload(page, EXAMPLE)
    wait_for(page, lambda state: state["ended"])
    if how == "reset":
        page.get_by_label("number input for Confidence threshold").fill("0.9")
        page.wait_for_timeout(1500)
    changed = playlist_changes(page)
    slider = page.get_by_label("range slider for Confidence threshold")
    if how == "drag":
        box = slider.bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2, steps=8)
        page.mouse.up()
    elif how == "arrow key":
        slider.focus()
        slider.press("ArrowRight")
    elif how == "number":
        page.get_by_label("number input for Confidence threshold").fill("0.95")
    else:
        page.get_by_label("Reset to default value").click()
    changed()


def test_ten_fast_moves_end_with_the_last_value_and_one_run(page, long_video):
    upload(page, long_video)
    wait_for(page, lambda state: state["time"] > 0.3)
    slider = page.get_by_label("range slider for Confidence threshold")
    slider.focus()
    for _ in range(10):
        slider.press("ArrowRight")
        page.wait_for_timeout(200)
    expect(page.get_by_label("number input for Confidence threshold")).to_have_value("0.8")
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)
    assert json.loads(Path(download(page, "json").path()).read_text())["threshold"] == pytest.approx(0.8)


def test_stop_ends_the_run_and_what_was_streamed_can_be_downloaded(page, long_video):
    upload(page, long_video)
    wait_for(page, lambda state: state["time"] > 0.3)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped", timeout=3_000)
    state = wait_for(page, lambda state: state["ended"])
    screenshot(page, "stopped")
    assert 1.5 < state["duration"] < 25
    frames, samples = download_and_count(page)
    assert frames / 15 == pytest.approx(state["duration"], abs=0.15)
    assert samples / 48_000 == pytest.approx(state["duration"], abs=0.15)


def download(page, suffix="mp4"):
    """The result file with that suffix, once the run has ended."""
    link = page.locator(f"#files a[href$='.{suffix}']").first
    link.wait_for(timeout=60_000)
    with page.expect_download() as saved:
        link.click()
    return saved.value


def download_and_count(page):
    """Frames and samples in the annotated video."""
    path = download(page).path()
    with av.open(path) as container:
        frames = sum(1 for _ in container.decode(video=0))
    with av.open(path) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    return frames, samples


def test_the_results_are_whole_and_named_after_the_source(page):
    upload(page, EXAMPLE)
    frames, samples = download_and_count(page)
    info = read_video_info(EXAMPLE)
    assert frames == math.ceil(len(info.pts_seconds) / 2)
    assert samples / 48_000 == pytest.approx(info.duration_seconds, abs=0.1)
    names = [download(page, suffix).suggested_filename for suffix in ("mp4", "csv", "json")]
    assert names == ["bouncing-shapes-boxes.mp4", "bouncing-shapes.csv", "bouncing-shapes.json"]


def test_clearing_the_source_ends_the_run_and_empties_the_page(page, long_video):
    upload(page, long_video)
    wait_for(page, lambda state: state["time"] > 0.3)
    clear(page)
    expect(page.locator("#status")).to_have_text(app.WELCOME, timeout=10_000)
    page.wait_for_timeout(1500)
    expect(page.locator("#status")).to_have_text(app.WELCOME)
    assert page.evaluate(PLAYER) is None


def test_another_upload_takes_the_place_of_the_run_that_is_going_on(page, long_video, tmp_path):
    upload(page, long_video)
    wait_for(page, lambda state: state["time"] > 0.3)
    changed = playlist_changes(page)
    clear(page)
    upload(page, Kind("other", frames=70, size=(320, 320)).make(tmp_path))
    state = changed()
    assert (state["width"], state["height"]) == (160, 160)


def test_choosing_classes_redraws_with_only_these(page):
    upload(page, EXAMPLE)
    wait_for(page, lambda state: state["ended"])
    changed = playlist_changes(page)
    page.get_by_label("Classes").click()
    page.get_by_role("option", name="star").click()
    page.keyboard.press("Escape")
    changed()
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
    assert "circle" not in page.locator("#table").inner_text()


def test_full_gives_every_frame_at_full_size(page):
    upload(page, EXAMPLE)
    half = wait_for(page, lambda state: state["ended"])
    changed = playlist_changes(page)
    page.get_by_role("radio", name="Full quality").click()
    full = changed()
    assert (full["width"], full["height"]) == (2 * half["width"], 2 * half["height"])


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("phone", 390, "light"), ("dark", 1280, "dark"), ("wide", 1920, "light")]
)
def test_the_page_fits_phones_and_wide_screens_in_light_and_dark(browser, server, name, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(server + ("?__theme=dark" if scheme == "dark" else ""))
    page.get_by_label("Confidence threshold").first.wait_for()
    upload(page, EXAMPLE)
    wait_for(page, lambda state: state["ended"])
    page.wait_for_timeout(500)
    screenshot(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
