"""On a slow device every n-th frame is analysed: how n is chosen, what is drawn, what is reported, what is kept."""

import contextlib
import json
import re
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapes
from checkpoints import renamed_checkpoint
from streams import all_end, analysis_of, count_passes, run, stream
from videos import Kind, read_chunks, read_number

import app
from tracking import Detections
from video import ChunkWriter

EXAMPLE = str(app.EXAMPLES / "bouncing-shapes.mp4")
KEEP_UP, EVERY = app.KEEP_UP, app.EVERY_FRAME


@pytest.fixture
def video(tmp_path):
    """A video that no other test has seen: 75 output frames at 15 frames a second, in three chunks."""
    return str(Kind("slow", frames=150, audio=()).make(tmp_path))


@pytest.fixture
def slow_device(monkeypatch):
    """A model that takes 0.18 s for a frame, as far as the app knows."""
    monkeypatch.setattr(app.DETECTOR, "seconds_per_frame", 0.18)


def keep_up(video, conf_threshold=0.3):
    return run(video, conf_threshold, analysed=KEEP_UP)


@pytest.mark.parametrize(
    ("seconds_per_frame", "rate", "step"),
    [(0, 30, 1), (0.005, 30, 1), (0.06, 30, 2), (0.18, 30, 5), (5, 30, 7), (5, 25, 6), (5, 60, 15), (5, 2, 1)],
)
def test_as_many_frames_are_analysed_as_keep_up_but_two_a_second_at_least(
    seconds_per_frame, rate, step, tmp_path, monkeypatch
):
    monkeypatch.setattr(app.DETECTOR, "seconds_per_frame", seconds_per_frame)
    path = str(Kind("rate", rate=rate, frames=6, audio=()).make(tmp_path))
    assert app.step_to_keep_up(path, app.Options()) == step
    assert step * 2 <= max(2, rate / 2)


def test_visitors_share_the_model(video, tmp_path, monkeypatch, slow_device):
    monkeypatch.setattr(app.DETECTOR, "seconds_per_frame", 0.035)
    assert app.step_to_keep_up(video, app.Options()) == 1
    with app.new_run("a"), app.new_run("b"), app.new_run("c"):
        assert app.step_to_keep_up(video, app.Options()) == 3


def test_each_model_has_its_own_detections_labels_and_step(tmp_path, monkeypatch):
    other = app.Detector(renamed_checkpoint(tmp_path / "renamed"), "renamed")
    monkeypatch.setitem(app.DETECTORS, "renamed", other)
    monkeypatch.setattr(other, "seconds_per_frame", 0.18)
    monkeypatch.setattr(app.DETECTOR, "seconds_per_frame", 0)
    passes, passes_of_other = count_passes(monkeypatch), count_passes(monkeypatch, other)
    example = shutil.copy(EXAMPLE, tmp_path)
    for _ in range(2):  # going back costs nothing
        report = keep_up(example)
        report_of_other = run(example, analysed=KEEP_UP, model="renamed", classes=["ring", "star"], save_to=tmp_path)
        assert (sum(passes), sum(passes_of_other)) == (len(report.cached), len(report_of_other.cached))
    assert (report.step, report_of_other.step) == (1, 5)
    assert {"circle", "star"} < set(report.results.detections()["label"])
    assert set(report_of_other.results.detections()["label"]) == {"ring", "star"}
    saved = json.loads(Path(report_of_other.saved["json"]).read_text())
    assert saved["model"] == "renamed"


def test_an_analysed_frame_is_known_after_the_end_of_each_chunk(video, slow_device, monkeypatch):
    passes = count_passes(monkeypatch)
    report = keep_up(video)
    assert report.step == 5
    assert sorted(report.cached) == [0, *range(8, 150, 10)]
    assert sum(passes) == 16
    assert report.output_frames == 75


def test_only_what_the_model_found_is_reported(slow_device, tmp_path):
    report = keep_up(shutil.copy(EXAMPLE, tmp_path))
    assert set(report.results.detections()["frame"]) <= set(report.cached)
    assert len(report.cached) < 30
    assert f"analysing every {report.step}th frame" in app.describe(report, "Done")


def test_a_filled_frame_is_not_taken_for_an_analysed_one_if_another_run_analyses_it_meanwhile(
    video, tmp_path, monkeypatch
):
    cached, draw = {}, app.draw

    def draw_while_another_run_adds(*args):
        cached.update({index: Detections.empty() for index in range(150) if index not in cached})
        draw(*args)

    monkeypatch.setattr(app, "draw", draw_while_another_run_adds)
    update = next(stream(video, 0.3, step=5, cached=cached, folder=str(tmp_path)))
    first_batch = [frame.source_index for frame in update.frames][:4]
    assert first_batch == [0, 8, 18, 28]


def test_from_keep_up_to_every_frame_only_the_rest_is_analysed_and_nothing_on_the_way_back(
    video, slow_device, monkeypatch
):
    passes = count_passes(monkeypatch)
    keep_up(video)
    assert sum(passes) == 16
    keep_up(video, conf_threshold=0.6)
    assert sum(passes) == 16, "another threshold needs no pass"
    run(video, analysed=EVERY)
    assert sum(passes) == 75
    keep_up(video)
    assert sum(passes) == 75


def test_a_run_decides_by_the_load_at_its_start_and_uses_what_is_cached(video, monkeypatch):
    monkeypatch.setattr(app.DETECTOR, "seconds_per_frame", 0.07)
    passes = count_passes(monkeypatch)
    with app.new_run("a"), app.new_run("b"), app.new_run("c"):
        busy = keep_up(video)
    assert busy.step == 6
    assert sorted(busy.cached) == [0, *range(10, 150, 12), 148]
    resumed = run(video, analysed=KEEP_UP, join_seconds=0.1)
    assert resumed.step == 6
    assert sum(passes) == len(busy.cached), "within the video, what is cached comes at once"
    alone = keep_up(video)
    assert alone.step == 2
    assert sum(passes) == len(alone.cached) == 39
    with app.new_run("a"), app.new_run("b"), app.new_run("c"):
        again = keep_up(video)
    assert sum(passes) == 39
    assert again.results.frame_count == 39, "a busy run shows all that is cached"


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_a_video_that_is_shorter_than_a_step_is_shown_whole(frames, tmp_path):
    path = str(Kind("short", frames=frames, audio=()).make(tmp_path))
    updates = list(stream(path, 1.0, step=7, folder=str(tmp_path)))
    shown = [read_number(picture) for picture in read_chunks([update.chunk for update in updates]).pictures]
    assert shown == list(range(0, frames, 2))
    assert updates[-1].is_end


@pytest.mark.parametrize("step", [2, 4, 7])
def test_every_frame_of_a_variable_rate_is_shown_in_its_time(step, tmp_path):
    times = [0, 0.04, 0.08, 0.5, 0.54, 0.58, 1.9, 1.94, 2.5, 2.54, 2.58, 2.62]
    path = str(Kind("variable", times=times, audio=()).make(tmp_path))
    chunks = [[update.chunk for update in stream(path, 1.0, step=n, folder=str(tmp_path))] for n in (1, step)]
    every, some = ([read_number(picture) for picture in read_chunks(paths).pictures] for paths in chunks)
    assert some == every


@pytest.fixture
def drawn(monkeypatch):
    """A list that gets the objects of each drawn frame."""
    objects, draw = [], app.draw
    monkeypatch.setattr(app, "draw", lambda image, found, *how: objects.append(found) or draw(image, found, *how))
    return objects


def test_boxes_glide_between_analysed_frames(drawn, tmp_path):
    for _ in stream(EXAMPLE, 0.5, step=6, folder=str(tmp_path)):
        pass
    (square,) = (number for number, label in app.DETECTOR.id2label.items() if label == "square")
    lefts = [frame.xyxy[(frame.class_id == square) & (frame.tracker_id == 1)][0, 0] for frame in drawn[5:12]]
    moves = np.diff(lefts)
    assert np.abs(moves).min() > 0.0005
    np.testing.assert_allclose(moves, moves[0], atol=0.0005)


def test_no_box_crosses_a_cut(drawn, tmp_path):
    """The first half shows the upper part of a scene, the second half another one."""
    writer = ChunkWriter(str(tmp_path), (320, 180), 30, audio_channels=0)
    for name in ("bouncing-shapes", "circling-shapes"):
        for index in range(50):
            image = np.ascontiguousarray(shapes.example_frame(name, index)[:, :, ::-1])
            writer.write(cv2.resize(image, (320, 180)))
    for _ in stream(writer.close(), 0.5, resolution="Full", step=7, folder=str(tmp_path)):
        pass
    before, after = (
        {
            (label, number)
            for frame in part
            for label, number in zip(frame.class_id, frame.tracker_id, strict=True)
            if number
        }
        for part in (drawn[:50], drawn[50:])
    )
    assert before and after
    assert not before & after
    assert all(len(frame) for frame in drawn[44:56]), "there are boxes up to the cut and from it on"


def test_stop_in_mid_chunk_answers_at_once_and_keeps_the_chunks_before(video, slow_device, monkeypatch, new_threads):
    forward = app.DETECTOR.model.forward

    def slow(**inputs):
        time.sleep(0.3)
        return forward(**inputs)

    monkeypatch.setattr(app.DETECTOR.model, "forward", slow)
    monkeypatch.setattr(app.DETECTOR, "batch_frames", 2)
    with (
        app.new_run("a visitor") as current,
        contextlib.closing(app.show_run(current, video, 0.3, app.Options())) as values,
    ):
        for value in values:
            if app.player in value:
                current.is_stopped, stopped_at = True, time.monotonic()
            if "Stopped" in value.get(app.status, ""):
                assert time.monotonic() - stopped_at < 0.5
                assert value[app.status].startswith("Stopped: 2.0 s of video")
                break
        assert any(app.files in value for value in values)
    assert all_end(new_threads)  # the pass at hand


def test_the_status_counts_the_frames_of_the_first_chunk(video, slow_device):
    report = analysis_of(video, 0.3, analysed=KEEP_UP)
    assert app.describe(report).startswith("First chunk: 0 of 7 frames")
    report.cached.update({index: Detections.empty() for index in (0, 8, 18)})
    assert app.describe(report).startswith("First chunk: 3 of 7 frames, 0 s left")
    report.cached.update({index: Detections.empty() for index in range(28, 150, 10)})
    assert app.describe(analysis_of(video, 0.3)).startswith("First chunk: 7 of 30 frames")


def test_the_status_counts_a_first_chunk_of_a_little_more_than_two_seconds(video, monkeypatch):
    monkeypatch.setattr(app.DETECTOR, "seconds_per_frame", 0.15)
    report = analysis_of(video, 0.3, analysed=KEEP_UP)
    report.cached.update({index: Detections.empty() for index in (0, *range(6, 62 + 1, 8))})
    assert report.step == 4
    assert app.describe(report).startswith("First chunk: 9 of 9 frames")


def test_the_time_left_counts_down_at_the_pace_since_the_first_chunk(video, monkeypatch):
    now = 100.0
    monkeypatch.setattr(app.time, "monotonic", lambda: now)
    report, lines = analysis_of(video), []
    for end, took in ((30, 6.0), (60, 2.0), (75, 1.0)):
        now += took / 2
        lines.append(app.describe(report))
        now += took / 2
        report.add(app.StreamUpdate("", [], [], [], end, False, 0.0, None, None))
        lines.append(app.describe(report))
    left = [int(found[1]) for line in lines if (found := re.search(r"of 5.0 s · (\d+) s left", line))]
    assert left == [9, 8, 1, 0, 0]
