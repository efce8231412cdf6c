"""The page in a real browser. Screenshots of its states are kept in `tests/output/`."""

import base64
import io
import json
import math
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import shapes
from axe_playwright_python.sync_playwright import Axe
from checkpoints import renamed_checkpoint
from conftest import open_page, running_app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect
from videos import Kind, assert_colours, beep_onsets, ffmpeg

import app
from draw_boxes import label_color
from video import read_video_info

EXAMPLE = app.EXAMPLES / "bouncing-shapes.mp4"
OUTPUT = Path(__file__).parent / "output"
SIZES = {"laptop": (1400, 900), "desktop": (1920, 1080), "phone": (390, 844)}
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


def choose_example(page, name):
    page.get_by_role("button", name=f"{name}.mp4").click()


def open_tab(page, name):
    """Objects, Timeline or Files."""
    page.get_by_role("tab", name=name).click()


def open_more_settings(page):
    if not page.get_by_text("Size and frame rate").is_visible():
        page.get_by_role("button", name="More settings").click()


def wait_until_done(page):
    expect(page.locator("#status")).to_contain_text("Done", timeout=90_000)


def seek(page, seconds):
    page.evaluate("seconds => document.querySelector('#processed video').currentTime = seconds", seconds)


def play_the_end(page):
    """The player's state after its last second, to save the time that the others take."""
    wait_until_done(page)
    wait_for(page, lambda state: state["time"] > 0.1)
    seek(page, page.evaluate(PLAYER)["duration"] - 1)
    return wait_for(page, lambda state: state["ended"])


def table_rows(page):
    """Class to the numbers beside it: objects, most at once, first and last second."""
    open_tab(page, "Objects")
    rows = page.locator("#table [role=row]").all()
    cells = [row.locator("[role=gridcell]").all_inner_texts() for row in rows]
    return {name.strip(): [float(number) for number in numbers] for name, *numbers in filter(None, cells)}


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


def test_a_finished_webcam_recording_starts_the_stream(page):
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.get_by_label("start recording").click()
    page.wait_for_timeout(2500)
    page.locator("#source").get_by_text("Stop").click()
    state = wait_for(page, lambda state: state["ended"])
    assert state["duration"] > 0.5


def test_a_file_that_is_not_a_video_gets_one_sentence_and_the_page_can_be_used_on(page, tmp_path):
    broken = tmp_path / "notes.mp4"
    broken.write_text("this is not a video")
    upload(page, broken)
    expect(page.locator("#status .md")).to_have_text("This file is incomplete or not a video.", timeout=20_000)
    page.wait_for_timeout(1500)
    screenshot(page, "error")
    colour, sign = page.locator("#status blockquote").evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e, '::before').content]"
    )
    assert colour != page.locator("body").evaluate("e => getComputedStyle(e).color")
    assert sign == '"⚠"'
    assert "Traceback" not in page.content()
    assert "NaN" not in page.locator("body").inner_text()
    expect(page.get_by_text("incomplete or not a video")).to_have_count(1)
    expect(page.locator(".toast-body")).to_have_count(0)
    badges = [
        badge.evaluate("e => e.checkVisibility({opacityProperty: true})") for badge in page.locator(".error").all()
    ]
    assert not any(badges)
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
    assert 2 < play_the_end(page)["duration"] < 8


def test_the_players_duration_is_the_sources(page, tmp_path):
    path = Kind("ntsc", "mkv", rate=30000 / 1001, frames=160, audio=("-c:a", "libopus")).make(tmp_path)
    upload(page, path)
    state = play_the_end(page)
    assert state["duration"] == pytest.approx(160 * 1001 / 30000, abs=0.1)
    assert state["audio"] > 10_000


def test_a_video_without_sound_plays_without_sound(page, tmp_path):
    path = Kind("silent", frames=70, audio=()).make(tmp_path)
    upload(page, path)
    assert play_the_end(page)["audio"] == 0


def test_the_page_names_the_model_that_is_loaded(page):
    expect(page.get_by_text("Model: shapes-rtdetr")).to_be_visible()


def test_colours_are_right_in_the_player_and_in_the_download(page, tmp_path):
    """At a height of 2 mod 4, where the colours were once below their shapes."""
    path = Kind("colours", frames=70, size=(320, 180)).make(tmp_path)
    page.get_by_label("number input for Confidence threshold").fill("1")
    upload(page, path)
    assert play_the_end(page)["height"] == 90
    assert_colours(picture_of(page))
    with av.open(download(page).path()) as container:
        for frame in container.decode(video=0):
            assert_colours(frame.to_ndarray(format="rgb24"))


def test_the_timeline_has_a_bar_for_each_object_in_its_colour(page):
    choose_example(page, "rising-shapes")
    wait_until_done(page)
    expected = [
        (f"{label} {number}", label_color(label))
        for label, (objects, *_) in sorted(table_rows(page).items())
        for number in range(1, int(objects) + 1)
    ]
    assert len(expected) == 8
    open_tab(page, "Timeline")
    expect(page.locator("#timeline li")).to_have_count(8)
    rgb = "li => [li.innerText, getComputedStyle(li.querySelector('.bars div')).backgroundColor.match(/\\d+/g)]"
    bars = [li.evaluate(rgb) for li in page.locator("#timeline li").all()]
    assert [(name.strip(), f"#{bytes(map(int, color)).hex()}") for name, color in bars] == expected


def test_a_video_without_detections_has_empty_results_and_the_status_says_what_to_do(page, tmp_path):
    page.get_by_label("number input for Confidence threshold").fill("1")
    upload(page, Kind("nothing", frames=30).make(tmp_path))
    wait_until_done(page)
    expect(page.locator("#status")).to_contain_text("Nothing above 1. Try a lower threshold.")
    assert not table_rows(page)
    open_tab(page, "Timeline")
    expect(page.locator("#timeline li")).to_have_count(0)


def test_a_bad_number_in_the_threshold_box_is_mended_and_covers_nothing(page):
    box = page.get_by_label("number input for Confidence threshold")
    box.fill("0.45")
    upload(page, EXAMPLE)
    wait_for(page, lambda state: state["time"] > 0.3)
    for typed, becomes in (("", "0.45"), ("7", "1"), ("-3", "0")):
        box.fill(typed)
        page.wait_for_timeout(700)
        assert page.evaluate(PLAYER), "the video goes on"
        changed = playlist_changes(page)
        box.press("Tab")
        expect(box).to_have_value(becomes)
        if typed:
            changed()
        wait_until_done(page)
        expect(page.locator(".error, .toast-body")).to_have_count(0)
        assert detections_of(page)["threshold"] == float(becomes)


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


def test_every_way_to_move_the_slider_redraws_the_video(page):
    upload(page, EXAMPLE)
    slider = page.get_by_label("range slider for Confidence threshold")

    def drag():
        box = slider.bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2, steps=8)
        page.mouse.up()

    for move in (
        drag,
        lambda: slider.press("ArrowRight"),
        lambda: page.get_by_label("number input for Confidence threshold").fill("0.95"),
        lambda: page.get_by_label("Reset to default value").click(),
    ):
        wait_until_done(page)
        changed = playlist_changes(page)
        move()
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
    wait_until_done(page)
    assert detections_of(page)["threshold"] == pytest.approx(0.8)


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
    expect(page.get_by_text("Waiting for more…")).not_to_be_visible()


def download(page, suffix="mp4"):
    """The result file with that suffix, once the run has ended."""
    open_tab(page, "Files")
    link = page.locator(f"#files a[href$='{suffix}']").first
    link.wait_for(timeout=60_000)
    with page.expect_download() as saved:
        link.click()
    return saved.value


def detections_of(page):
    """What the JSON file holds."""
    return json.loads(Path(download(page, "json").path()).read_text())


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
    endings = ["-boxes.mp4", ".csv", ".json", "-objects.csv", "-objects.zip", "-mot.zip"]
    for ending in endings:
        assert download(page, f"shapes{ending}").suggested_filename == f"bouncing-shapes{ending}"
        expect(page.locator(f"#files a[href$='shapes{ending}']")).to_be_in_viewport()
    footer = page.locator("footer")
    expect(footer).to_contain_text("Use via API")
    expect(footer).not_to_contain_text("Runs")  # old runs would break the page
    expect(footer).not_to_contain_text("Settings")  # they offer a screen recorder


def test_clearing_the_source_ends_the_run_and_empties_the_page(page, long_video):
    upload(page, long_video)
    wait_for(page, lambda state: state["time"] > 0.3)
    clear(page)
    expect(page.locator("#status")).to_have_text(app.WELCOME, timeout=10_000)
    page.wait_for_timeout(1500)
    expect(page.locator("#status")).to_have_text(app.WELCOME)
    expect(page.get_by_role("button", name="Run again")).to_be_disabled()
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
    wait_until_done(page)
    changed = playlist_changes(page)
    choose_star(page)
    changed()
    wait_until_done(page)
    assert list(table_rows(page)) == ["star"]


def test_after_a_change_the_viewer_is_where_they_were(page):
    """With the table still there, nothing jumping, and the whole video to go back to and to download."""
    seconds = read_video_info(EXAMPLE).duration_seconds
    upload(page, EXAMPLE)
    wait_until_done(page)
    download(page)
    for change in (set_threshold, choose_star):
        seek(page, 4)
        page.wait_for_timeout(300)
        before, started, heights, rows = page.evaluate(PLAYER), time.monotonic(), set(), set()
        change(page)
        expect(page.get_by_text("Updating…")).to_be_visible(timeout=1000)
        if change is set_threshold:
            screenshot(page, "updating")
        open_tab(page, "Objects")
        old = [before["time"]]

        def is_there(state, before=before, old=old, heights=heights, rows=rows):
            if state["src"] == before["src"]:
                old.append(state["time"])
            heights.add(page.evaluate("document.documentElement.scrollHeight"))
            rows.add(page.locator("#table [role=gridcell]").count() > 0)
            return state["src"] != before["src"] and state["time"] > before["time"] - 0.2

        after = wait_for(page, is_there)
        passed = time.monotonic() - started
        expect(page.get_by_text("Updating…")).to_be_hidden()
        assert after["time"] < before["time"] + passed, "nothing is skipped"
        # On a slow machine, the new stream may not reach so far: then it begins at the place of the change.
        assert after["time"] > old[-1] - 0.3 or passed > 1.5, "nothing is repeated"
        assert passed < 6, "what is known comes at once"
        assert rows == {True}, "the table stays until the new one arrives"
        assert len(heights) == 1, "nothing shrinks and grows"
        wait_until_done(page)
        seek(page, 1)
        wait_for(page, lambda state: 1.2 < state["time"] < 4)
        assert count_label_colours(picture_of(page)) >= 1
    seek(page, 6)
    assert wait_for(page, lambda state: state["ended"])["duration"] == pytest.approx(seconds, abs=0.15)
    assert download_and_count(page)[0] == math.ceil(len(read_video_info(EXAMPLE).pts_seconds) / 2)
    found = detections_of(page)
    assert (found["threshold"], found["classes"]) == (0.7, ["star"])


def set_threshold(page):
    page.get_by_label("number input for Confidence threshold").fill("0.7")


def choose_star(page):
    page.get_by_label("Classes").click()
    page.get_by_role("option", name="star").click()
    page.keyboard.press("Escape")


def choose_full(page):
    open_more_settings(page)
    page.get_by_role("radio", name="Full quality").click()


def test_full_gives_every_frame_at_full_size(page):
    upload(page, EXAMPLE)
    wait_until_done(page)
    seek(page, 4)
    half = wait_for(page, lambda state: state["time"] > 4.1)
    choose_full(page)
    full = wait_for(page, lambda state: state["src"] != half["src"] and state["time"] > 0.3)
    assert (full["width"], full["height"]) == (2 * half["width"], 2 * half["height"])
    assert full["time"] > half["time"] - 0.2, "at the same place, without the beginning"


# --------------------------------------------------------------------------------------------- where things are


@pytest.mark.parametrize("size", SIZES)
def test_source_examples_player_and_results_come_in_the_order_of_use(page, size):
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})

    def box(selector):
        return page.locator(selector).first.bounding_box()

    def top(selector):
        return box(selector)["y"]

    source, examples = box("#source"), box(".gallery")
    assert 0 < examples["y"] - (source["y"] + source["height"]) < 60, "the examples are directly under the source"
    assert examples["y"] + examples["height"] < min(top("#settings"), height)
    assert "More settings" in page.locator("#settings").inner_text()
    expect(page.get_by_text("Size and frame rate")).not_to_be_visible()
    if size == "phone":
        order = ["#source", ".gallery", "#processed", "#progress", "#status", "#results", "#settings"]
        assert order == sorted(order, key=top)
    else:
        assert top("#processed") == source["y"]
        assert box("#processed")["x"] > source["x"] + source["width"]
    choose_example(page, "bouncing-shapes")
    wait_for(page, lambda state: state["time"] > 0.3)
    player = box("#processed")
    assert player["y"] >= 0
    assert player["y"] + player["height"] <= height, "the player is in view"
    assert len(table_rows(page)) >= 4
    screenshot(page, f"order-{size}")
    wide = """[...document.querySelectorAll("#table th .text, #table [role=gridcell]")]
        .map(e => [e.scrollWidth, e.clientWidth])"""
    assert all(needed <= given for needed, given in page.evaluate(wide)), "no word of the table is cut"
    assert box("#table")["x"] + box("#table")["width"] <= width
    assert (
        page.evaluate("document.querySelector('#table .virtual-table-viewport').scrollWidth") <= box("#table")["width"]
    )
    page.evaluate("document.body.classList.add('dark')")
    screenshot(page, f"dark-{size}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


PLACES = """selectors => selectors.map(selector => {
    const {top, height} = document.querySelector(selector).getBoundingClientRect();
    return [selector, Math.round(top + scrollY), Math.round(height)];
})"""


@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_nothing_moves_from_an_upload_to_its_results(page, size, tmp_path):
    """Also while nothing is found, as in the first four seconds of this video."""
    late = tmp_path / "late.mp4"
    nothing = ("-f", "lavfi", "-i", "color=gray:size=320x180:rate=15:duration=4")
    ffmpeg(*nothing, "-i", EXAMPLE, "-filter_complex", "[1:v]scale=320:180,fps=15[b];[0:v][b]concat", late)
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(500)
    selectors = [
        "#source",
        ".gallery",
        "#settings",
        "#processed",
        "#progress",
        "#status",
        "#results",
        "#stop",
        "footer",
    ]
    in_the_tab = ["#gallery"]  # above the table, which keeps its place as well
    places = [page.evaluate(PLACES, selectors + in_the_tab)]
    upload(page, late)
    deadline = time.monotonic() + 60
    while "Done" not in page.locator("#status").inner_text() and time.monotonic() < deadline:
        places.append(page.evaluate(PLACES, selectors + in_the_tab))
        page.wait_for_timeout(50)
    for name in ("Timeline", "Files", "Objects"):
        open_tab(page, name)
        page.wait_for_timeout(300)
        places.append(page.evaluate(PLACES, selectors))
    assert len(table_rows(page)) >= 4
    moved = {tuple(place) for row in places for place in row}
    assert len(moved) == len(selectors + in_the_tab), sorted(moved)
    if size == "laptop":
        assert page.evaluate("document.documentElement.scrollHeight") <= height, "all of it fits on the screen"


def test_the_player_has_the_shape_of_its_video(page, tmp_path):
    below = page.locator("#status").bounding_box()["y"]
    for size in ((320, 180), (240, 180), (180, 320)):
        clear(page)
        upload(page, Kind("shape", frames=40, size=size).make(tmp_path))
        wait_for(page, lambda state, size=size: state["time"] > 0.2 and state["width"] == size[0] // 2)
        box = page.locator("#processed video").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(size[0] / size[1], rel=0.02)
        assert page.locator("#status").bounding_box()["y"] == pytest.approx(below, abs=1)


def test_on_a_phone_a_tapped_row_brings_the_player_into_view(page):
    width, height = SIZES["phone"]
    page.set_viewport_size({"width": width, "height": height})
    choose_example(page, "bouncing-shapes")
    wait_until_done(page)
    open_tab(page, "Objects")
    row = page.locator("#table [role=row]", has_text="star")
    page.evaluate("scrollTo(0, document.querySelector('#table').getBoundingClientRect().top + scrollY - 10)")
    assert page.locator("#processed").bounding_box()["y"] < 0
    row.click()
    page.wait_for_timeout(1500)
    player = page.locator("#processed").bounding_box()
    assert player["y"] >= 0
    assert player["y"] + player["height"] <= height


def test_another_source_ends_the_old_picture_at_once(page):
    choose_example(page, "bouncing-shapes")
    old = wait_for(page, lambda state: state["time"] > 0.3)["src"]
    choose_example(page, "circling-shapes")
    page.wait_for_timeout(1000)
    deadline = time.monotonic() + 20
    while not (state := page.evaluate(PLAYER)) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert state["src"] != old
    assert wait_for(page, lambda state: state["time"] > 0.3)["src"] != old


def test_the_bar_and_the_buttons_follow_the_run(page, long_video):
    start, stop = page.get_by_role("button", name="Run again"), page.get_by_role("button", name="Stop")
    bar, hint = page.locator("#progress progress"), page.get_by_text("Waiting for more…")
    expect(start).to_be_disabled()
    expect(stop).to_be_disabled()
    choose_full(page)
    upload(page, long_video)
    state = wait_for(page, lambda state: state["time"] > 0.3)
    expect(start).to_be_disabled()
    expect(stop).to_be_enabled()
    expect(hint).not_to_be_visible()
    early = bar.evaluate("bar => bar.value")
    seek(page, state["duration"] + 60)
    expect(hint).to_be_visible(timeout=5_000)
    screenshot(page, "waiting")
    page.wait_for_function("early => document.querySelector('#progress progress').value > early + 3", arg=early)
    assert bar.evaluate("bar => bar.max") == pytest.approx(read_video_info(long_video).duration_seconds, abs=0.1)
    stop.click()
    expect(start).to_be_enabled(timeout=10_000)
    expect(stop).to_be_disabled()
    expect(hint).not_to_be_visible()


def test_clicks_on_a_picture_the_table_the_bar_and_the_timeline_move_the_player_there(page):
    choose_example(page, "rising-shapes")
    play_the_end(page)
    page.wait_for_timeout(500)
    first = table_rows(page)["cross"][2]
    assert first > 1
    page.get_by_role("columnheader", name="Objects").hover()
    expect(page.get_by_title("Counted once seen for a second")).to_be_visible()
    page.locator("#table [role=row]", has_text="cross").hover()
    expect(page.get_by_title(f"Jump to 0:0{int(first)}")).to_be_visible()
    page.locator("#table [role=row]", has_text="cross").click()
    assert first <= wait_for(page, lambda state: not state["ended"])["time"] < first + 2
    objects = {f"{found['label']} {found['track']}": found for found in detections_of(page)["objects"]}
    open_tab(page, "Objects")
    for name, press in (("square 1", "click"), ("circle 1", "Enter")):
        best, picture = objects[name]["best_seconds"], page.get_by_role("button", name=f"{name} · 0:0")
        assert picture.locator("img").evaluate("img => img.complete && img.naturalWidth") > 20
        seek(page, 5.5)
        picture.click() if press == "click" else picture.press(press)
        assert best - 0.05 <= page.evaluate(PLAYER)["time"] < best + 0.5
    open_tab(page, "Timeline")
    for ruler, second in (("#progress progress", 4.5), ("#timeline .bars", 3.3)):
        page.locator(ruler).first.scroll_into_view_if_needed()
        box = page.locator(ruler).first.bounding_box()
        page.mouse.click(box["x"] + box["width"] * second / 6, box["y"] + box["height"] / 2)
        assert second - 0.2 <= page.evaluate(PLAYER)["time"] < second + 1
        expect(page.get_by_title(f"Jump to 0:0{int(second)}")).to_be_visible()
    playhead = "parseFloat(getComputedStyle(document.querySelector('#progress .bar'), '::after').left)"
    assert page.evaluate(playhead) >= page.locator("#progress progress").bounding_box()["width"] * 0.4


def test_a_click_beyond_the_analysed_part_says_so_and_moves_nothing(page, long_video):
    choose_full(page)
    upload(page, long_video)
    before = wait_for(page, lambda state: state["time"] > 0.3)
    box = page.locator("#progress progress").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.95, box["y"] + box["height"] / 2)
    expect(page.get_by_text("Not analysed yet")).to_be_visible()
    after = page.evaluate(PLAYER)
    assert after["time"] < before["time"] + 4
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    expect(page.get_by_text("Not analysed yet")).not_to_be_visible()


def test_the_keyboards_place_is_seen_and_the_examples_have_names(page):
    page.get_by_label("number input for Confidence threshold").focus()
    slider = page.get_by_label("range slider for Confidence threshold")
    for _ in range(4):
        page.keyboard.press("Tab")
        if slider.evaluate("slider => slider === document.activeElement"):
            break
    style, width = slider.evaluate(
        "e => [getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)]"
    )
    assert style != "none"
    assert width >= 2
    for name in shapes.EXAMPLES:
        expect(page.get_by_role("button", name=f"{name}.mp4")).to_be_visible()


def test_axe_finds_nothing_wrong_with_the_page_in_light_and_dark(page, tmp_path):
    """Apart from what Gradio's own empty components lack: names that their role may have."""
    page.set_viewport_size({"width": 1400, "height": 900})
    open_more_settings(page)

    def check(state):
        for _ in ("light", "dark"):
            page.wait_for_timeout(500)  # until colours have faded
            report = Axe().run(page, options={"rules": {"aria-prohibited-attr": {"enabled": False}}}).response
            assert len(report["passes"]) > 30
            assert [(rule["id"], node["target"]) for rule in report["violations"] for node in rule["nodes"]] == [], (
                state
            )
            page.evaluate("document.body.classList.toggle('dark')")

    check("empty")
    broken = tmp_path / "notes.mp4"
    broken.write_text("this is not a video")
    upload(page, broken)
    page.locator("#status blockquote").wait_for(timeout=20_000)
    check("an error")
    clear(page)
    upload(page, EXAMPLE)
    wait_until_done(page)
    for name in ("Objects", "Timeline", "Files"):
        open_tab(page, name)
        check(name)


# ---------------------------------------------------------------------------------------------------- the objects


def test_tracks_are_drawn_and_can_be_switched_off_with_the_same_detections(page):
    upload(page, EXAMPLE)
    pictures, found = [], []
    for is_on in (True, False):
        if not is_on:
            changed = playlist_changes(page)
            open_more_settings(page)
            page.get_by_role("checkbox", name="Tracks").uncheck()
            changed()
        wait_until_done(page)
        found.append(detections_of(page)["detections"])
        with av.open(download(page).path()) as container:
            pictures.append([frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)])
    assert len(pictures[0]) == len(pictures[1])
    changed_pixels = [(np.abs(a - b).max(axis=2) > 60).sum() for a, b in zip(*pictures, strict=True)]
    assert min(changed_pixels[15:]) > 100
    untracked = [[{**row, "track": None} for row in rows] for rows in found]
    assert untracked[0] == untracked[1]


@pytest.mark.parametrize("name", shapes.EXAMPLES)
def test_the_table_counts_the_objects_that_are_in_the_example(page, name):
    example = shapes.EXAMPLES[name]
    frames = [shapes.example_truth(name, index)[1] for index in range(example.frame_count)]
    together = [Counter(shapes.LABELS[label] for label in labels) for labels in frames]
    choose_example(page, name)
    wait_until_done(page)
    page.wait_for_timeout(300)
    rows = table_rows(page)
    assert {label: objects for label, (objects, *_) in rows.items()} == Counter(actor.kind for actor in example.actors)
    for label, (_, most, first, last) in rows.items():
        seconds = [float(index / example.fps) for index, counts in enumerate(together) if counts[label]]
        assert most == max(counts[label] for counts in together)
        assert (first, last) == pytest.approx((seconds[0], seconds[-1]), abs=0.4)


def test_a_line_is_drawn_with_the_mouse_another_one_with_a_finger_and_both_count(page):
    upload(page, EXAMPLE)
    page.get_by_role("button", name="Counting lines").click()
    picture, hint = page.locator("#lines img"), page.locator("#hint")
    touch = page.context.new_cdp_session(page)

    def click(x, y):
        box = picture.bounding_box()
        picture.click(position={"x": x * box["width"], "y": y * box["height"]})  # waits until the page keeps still

    def tap(x, y):
        picture.scroll_into_view_if_needed()
        box = picture.bounding_box()
        place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [place]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    expect(hint).to_contain_text("Click where line A begins.")
    wait_until_done(page)
    seek(page, 3)
    page.evaluate("document.querySelector('#processed video').pause()")
    click(0.5, 0.02)
    expect(hint).to_contain_text("Click where line A ends.")
    changed = playlist_changes(page)
    click(0.5, 0.98)
    expect(hint).to_contain_text("Click where line B begins.")
    assert changed()["time"] > 2.9, "the viewer keeps their place"
    tap(0.02, 0.5)
    expect(hint).to_contain_text("Click where line B ends.")
    changed = playlist_changes(page)
    tap(0.98, 0.5)
    expect(hint).to_contain_text("Click where line C begins.")
    changed()
    wait_until_done(page)
    screenshot(page, "lines")
    found = detections_of(page)
    np.testing.assert_allclose(found["lines"], [[0.5, 0.02, 0.5, 0.98], [0.02, 0.5, 0.98, 0.5]], atol=0.01)
    expected = Counter((crossing["line"], crossing["class"], crossing["direction"]) for crossing in found["crossings"])
    open_tab(page, "Lines")
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#crossings tbody tr").all()]
    counts = {
        (line, label, way): int(n) for line, label, *ns, _ in rows for way, n in zip(("in", "out"), ns, strict=True)
    }
    assert +Counter(counts) == expected
    assert {line for line, *_ in expected} == {"A", "B"}
    seconds = float(rows[-1][-1])
    page.locator("#crossings tbody tr").last.click()
    page.wait_for_timeout(200)
    assert page.evaluate(PLAYER)["time"] == pytest.approx(seconds, abs=0.6)
    choose_example(page, "circling-shapes")
    expect(hint).to_contain_text("Click where line A begins.")
    expect(page.locator("#crossings")).to_contain_text("Draw a line")


def test_every_frame_can_be_asked_for_and_is_known_where_all_were_analysed(page):
    open_more_settings(page)
    expect(page.get_by_role("radio", name="Skip frames to keep up")).to_be_checked()
    choose_example(page, "bouncing-shapes")
    wait_until_done(page)
    before = detections_of(page)
    changed = playlist_changes(page)
    page.get_by_role("radio", name="Every frame").click()
    changed()
    wait_until_done(page)
    expect(page.locator("#status")).not_to_contain_text("analysing every")
    expect(page.locator(".toast-body")).to_have_count(0)
    after = detections_of(page)
    assert {row["frame"] for row in after["detections"]} >= {row["frame"] for row in before["detections"]}


@pytest.fixture(scope="module")
def slow_page(browser, tmp_path_factory):
    """The app with a detector that cannot keep up without a GPU: ours, with 25 times the pixels."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(app.SHIPPED_MODEL, folder / "slow")
    settings = folder / "slow" / "preprocessor_config.json"
    content = json.loads(settings.read_text()) | {"size": {"height": 1280, "width": 1280}}
    settings.write_text(json.dumps(content))
    with running_app(folder, MODEL_ID=str(folder / "slow")) as (url, _), open_page(browser, url) as tab:
        yield tab


def test_while_a_slow_model_makes_the_first_chunk_the_first_frame_is_shown_as_a_picture(slow_page, tmp_path):
    empty = slow_page.locator("#processed").bounding_box()
    upload(slow_page, Kind("slow", frames=90, size=(320, 180)).make(tmp_path))
    picture = slow_page.get_by_alt_text("First frame")
    expect(picture).to_be_visible(timeout=30_000)
    screenshot(slow_page, "first-frame")
    assert re.search(r"First chunk: [1-9] of \d frames, \d+ s left", slow_page.locator("#status").inner_text())
    assert picture.bounding_box() == pytest.approx(empty, abs=2), "where the player is, and nothing has moved"
    wait_for(slow_page, lambda state: state["time"] > 0.3)
    assert slow_page.locator("#processed").bounding_box() == pytest.approx(empty, abs=2)
    expect(picture).to_be_hidden()
    wait_for(slow_page, lambda state: state["ended"])
    expect(slow_page.locator("#status")).to_contain_text(
        re.compile(r"Done: 3.0 s of video .* analysing every \dth frame")
    )


def sound_of(path):
    """int16 (samples, channels) at 48 kHz."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=48_000)
    with av.open(str(path)) as container:
        parts = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def test_a_last_chunk_of_one_frame_plays_to_its_end_with_its_sound(page, tmp_path):
    """The beep at second 4 is in it."""
    segments, stream = [], tmp_path / "stream.ts"
    page.on("response", lambda response: response.url.endswith(".ts") and segments.append(response))
    upload(page, Path(__file__).parent / "cases" / "last_chunk_one_frame.mp4")
    state = wait_for(page, lambda state: state["ended"])
    assert state["duration"] == pytest.approx(4.07, abs=0.15)
    stream.write_bytes(b"".join(segment.body() for segment in segments))
    for path in (stream, download(page).path()):
        assert beep_onsets(sound_of(path), 48_000) == pytest.approx([0, 1, 2, 3, 4], abs=0.06)


# --------------------------------------------------------------------------------------------- failures of Gradio


@pytest.fixture
def ffmpeg_that_fails(tmp_path):
    """An ffmpeg for the server, and a file: as long as that exists, it fails."""
    ffmpeg, failing = tmp_path / "ffmpeg-of-the-server", tmp_path / "failing"
    ffmpeg.write_text(f'#!/bin/sh\ntest -e {failing} && exit 1\nexec {shutil.which("ffmpeg")} "$@"\n')
    ffmpeg.chmod(0o755)
    return ffmpeg, failing


def test_after_a_failed_conversion_there_is_a_sentence_and_the_video_can_be_run_again(
    browser, ffmpeg_that_fails, tmp_path
):
    ffmpeg, failing = ffmpeg_that_fails
    video = Kind("again", frames=60).make(tmp_path)
    with running_app(tmp_path, IMAGEIO_FFMPEG_EXE=str(ffmpeg)) as (url, _), open_page(browser, url) as page:
        start, stop = page.get_by_role("button", name="Run again"), page.get_by_role("button", name="Stop")
        failing.touch()
        upload(page, video)
        expect(page.locator("#status")).to_have_text(re.compile("could not prepare the stream. Press “Run again”"))
        expect(start).to_be_enabled()
        expect(stop).to_be_disabled()
        failing.unlink()
        start.click()
        wait_until_done(page)


def test_one_model_is_no_choice(page):
    expect(page.get_by_label("Confidence threshold").first).to_be_visible()
    expect(page.get_by_text("Model", exact=True)).to_have_count(0)


def test_a_choice_of_models_changes_classes_and_results_and_back(browser, tmp_path):
    models = f"{app.SHIPPED_MODEL},{renamed_checkpoint(tmp_path / 'renamed')}"
    (tmp_path / "server").mkdir()
    with running_app(tmp_path / "server", MODEL_ID=models) as (url, _), open_page(browser, url) as page:
        expect(page.locator("#intro")).to_contain_text(f"Models: {app.DETECTOR.name}, renamed on cpu")
        choose_example(page, "bouncing-shapes")
        wait_until_done(page)
        page.get_by_label("Classes").click()
        for label in ("circle", "star"):  # the list stays open, but moves when the choice takes another line
            page.get_by_role("option", name=label).click()
            wait_until_done(page)
        page.keyboard.press("Escape")
        expect(page.locator("#table [role=row]")).to_have_count(3)
        wait_until_done(page)
        renamed = ["ring", "box", "wedge", "star", "plus"]
        for model, labels in (("renamed", renamed), (app.DETECTOR.name, shapes.LABELS)):
            page.get_by_label(model).click()
            expect(page.locator("#table [role=row]")).to_have_count(2)  # the star is the only class that both know
            wait_until_done(page)
            assert list(table_rows(page)) == ["star"]
            page.get_by_label("Classes").click()
            names = [option.inner_text().removeprefix("✓").strip() for option in page.get_by_role("option").all()]
            assert names == list(labels)
            page.keyboard.press("Escape")
            screenshot(page, f"model-{model}")
        client, video = Client(url, verbose=False), handle_file(EXAMPLE)
        _, found = client.predict(video, classes="ring", model="renamed", api_name="/detect_video")
        assert (found["model"], {detection["label"] for detection in found["detections"]}) == ("renamed", {"ring"})
        with pytest.raises(AppError, match=r"classes cannot be .*Known: ring, box"):
            client.predict(video, classes="circle", model="renamed", api_name="/detect_video")
