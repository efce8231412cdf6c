"""What was found is kept: no frame goes through the model twice, and the files say where each thing was."""

import contextlib
import csv
import json
import os
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
import shapes
from gradio.route_utils import delete_files_created_by_app
from test_streaming import count_passes
from videos import Kind, play

import app

EXAMPLE = app.EXAMPLES / "bouncing-shapes.mp4"


@pytest.fixture
def video(tmp_path):
    """A video that no other test has seen: 41 output frames in two chunks."""
    return str(Kind("fresh", frames=82, audio=()).make(tmp_path))


def run(video, *settings):
    return list(app.stream_object_detection(video, *settings))


def test_a_frame_goes_through_the_model_once_whatever_the_threshold_and_the_classes(video, monkeypatch):
    passes = count_passes(monkeypatch)
    run(video, 0.3)
    assert sum(passes) == 41
    for settings in ((0.3,), (0.0,), (0.75,), (0.0, ["star"]), (0.2, ["circle", "cross"])):
        run(video, *settings)
    assert sum(passes) == 41


def test_half_and_full_are_different_pictures_and_are_each_detected_once(video, monkeypatch):
    passes = count_passes(monkeypatch)
    for resolution in ("Half (fast)", "Full", "Half (fast)", "Full"):
        assert run(video, 0.3, (), resolution)
    assert sum(passes) == 41 + 82


def test_a_restart_in_mid_stream_costs_only_the_rest(video, monkeypatch):
    passes = count_passes(monkeypatch)
    updates = app.stream_object_detection(video, 0.3)
    next(updates)
    updates.close()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(timeout=2)
    run(video, 0.6)
    assert sum(passes) == 41


def test_what_is_kept_waits_for_another_process_that_writes(video):
    with contextlib.closing(app.DetectionStore(app.read_video_info(video))) as store:
        other = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        threading.Timer(0.3, other.close).start()
        store.save([], [], 5)
        assert store.known == 5
        store.save([], [], 3)
        assert store.known == 5


def test_another_process_knows_what_this_one_has_found(video, monkeypatch):
    script = f"import app; print(len(list(app.stream_object_detection({video!r}, 0.3))))"
    done = subprocess.run([sys.executable, "-c", script], cwd=app.EXAMPLES.parent, capture_output=True, text=True)
    assert done.stdout.strip().endswith("2"), done.stderr
    passes = count_passes(monkeypatch)
    run(video, 0.3)
    assert not passes


def test_when_every_frame_is_known_no_gpu_is_asked_for(video, monkeypatch):
    def ask_for_a_gpu(*_, **__):
        raise AssertionError("a GPU was asked for")

    run(video, 0.3)
    monkeypatch.setattr(app, "stream_object_detection", ask_for_a_gpu)
    info = app.read_video_info(video)
    assert [update.chunk for update in app.updates_of(info, 0.5, ()) if update and update.chunk]


def test_a_second_look_draws_the_same_pictures(video):
    first, second = play(video, 0.2), play(video, 0.2)
    for before, after in zip(first.pictures, second.pictures, strict=True):
        np.testing.assert_array_equal(before, after)


def test_only_the_chosen_classes_are_drawn(video):
    drawn = {
        label for update in run(video, 0.0, ["star", "cross"]) for frame in update.detections for label in frame.labels
    }
    assert drawn
    assert drawn <= {"star", "cross"}


@pytest.fixture(scope="module")
def report():
    info = app.read_video_info(str(EXAMPLE))
    report = app.Report(info, 0.5, [])
    for update in app.stream_object_detection(str(EXAMPLE), 0.5):
        report.add(update)
    return report


def test_the_csv_says_where_the_rendered_shapes_are(report, tmp_path):
    """In pixels of the uploaded video, at the source's frame and second."""
    csv_path, _ = report.save()
    with open(csv_path, newline="") as file:
        rows = list(csv.DictReader(file))
    hits = 0
    for row in rows:
        frame = int(row["frame"])
        assert frame % 2 == 0
        assert float(row["time_seconds"]) == pytest.approx(frame / float(report.video.fps), abs=0.002)
        box = np.array([float(row[side]) for side in ("x1", "y1", "x2", "y2")])
        boxes, labels = shapes.example_truth(EXAMPLE.stem, frame)
        names = np.array([app.DETECTOR.id2label[int(label)] for label in labels])
        hits += ((names == row["label"]) & (shapes.overlap(box, boxes) > 0.5)).any()
    assert len(rows) > 200
    assert hits / len(rows) > 0.85


def test_the_json_carries_what_a_program_needs(report, tmp_path):
    _, json_path = report.save()
    with open(json_path) as file:
        content = json.load(file)
    assert content["model"] == "shapes-rtdetr"
    assert content["threshold"] == 0.5
    info = report.video
    assert content["video"]["fps"] == float(info.fps)
    assert content["video"]["duration_seconds"] == pytest.approx(info.duration_seconds, abs=0.001)
    width, height = content["video"]["width"], content["video"]["height"]
    for found in content["detections"]:
        assert 0.5 < found["score"] <= 1
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height


def test_the_table_and_the_plot_tell_the_same_story_as_the_truth(report):
    table = {row[0]: row[1:] for row in report.table()}
    truth = {}
    for frame in range(0, int(report.video.duration_seconds * report.video.fps), 2):
        for label in shapes.example_truth(EXAMPLE.stem, frame)[1]:
            truth.setdefault(app.DETECTOR.id2label[int(label)], []).append(frame)
    assert set(truth) <= set(table)
    counts = report.counts()
    for name in truth:
        most, first, last = table[name]
        assert 0 <= first <= last <= report.video.duration_seconds
        assert counts[counts["class"] == name]["count"].max() == most


def test_what_is_kept_goes_when_gradio_cleans_its_cache(video):
    info = app.read_video_info(video)
    for _ in app.updates_of(info, 0.5, ()):
        pass
    path = app.DetectionStore(info).path
    assert os.path.exists(path)
    delete_files_created_by_app(app.demo, None)
    assert not os.path.exists(path)


def test_chunks_are_removed_when_they_have_been_taken_and_when_the_viewer_goes(video):
    before = set(os.listdir(app.cache_folder()))
    info = app.read_video_info(video)
    for _ in app.updates_of(info, 0.5, ()):
        pass
    updates = app.updates_of(info, 0.6, ())
    next(update for update in updates if update and update.chunk)
    updates.close()
    assert {name for name in set(os.listdir(app.cache_folder())) - before if name.startswith("chunks-")} == set()
