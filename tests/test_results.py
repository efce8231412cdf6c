"""Detections are cached, counted and saved: no frame goes through the model twice, and the files say what is where."""

import csv
import json
import pickle
import shutil
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pandas as pd
import pytest
import shapes
from streams import all_end, analysis_of, count_passes, run, stream
from videos import Kind, read_chunks

import app
from results import FrameDetections, Results
from tracking import Detections

EXAMPLE = app.EXAMPLES / "bouncing-shapes.mp4"


@pytest.fixture
def video(tmp_path):
    """A video that no other test has seen: 41 output frames in two chunks."""
    return str(Kind("fresh", frames=82, audio=()).make(tmp_path))


def test_a_frame_goes_through_the_model_once_whatever_the_threshold_and_the_classes(video, monkeypatch):
    passes = count_passes(monkeypatch)
    run(video, 0.3)
    assert sum(passes) == 41
    for settings in ((0.3,), (0.0,), (0.75,), (0.0, ["star"]), (0.2, ["circle", "cross"])):
        run(video, settings[0], classes=settings[1:] and settings[1])
    assert sum(passes) == 41


def test_half_and_full_are_different_pictures_and_are_each_detected_once(video, monkeypatch):
    passes = count_passes(monkeypatch)
    for resolution in ("Half (fast)", "Full", "Half (fast)", "Full"):
        assert run(video, resolution=resolution).is_end
    assert sum(passes) == 41 + 82


def test_a_file_that_changes_is_detected_again(video, tmp_path, monkeypatch):
    run(video)
    passes = count_passes(monkeypatch)
    shutil.copy(Kind("other", frames=60, audio=()).make(tmp_path), video)
    run(video)
    assert sum(passes) == 30


def test_a_restart_in_mid_stream_costs_only_the_rest(video, monkeypatch, new_threads):
    passes = count_passes(monkeypatch)
    report = analysis_of(video, 0.3)
    updates = report.stream()
    while not report.add(next(updates)):
        pass
    updates.close()
    assert all_end(new_threads)
    run(video, 0.6)
    assert sum(passes) == 41


def test_a_second_run_draws_the_same_pictures(video, tmp_path):
    def pictures(resolution):
        chunks = []
        for update in stream(video, 0.2, resolution=resolution, cached=cached, folder=tmp_path):
            chunks.append(update.chunk)
        return read_chunks(chunks).pictures

    for resolution in app.RESOLUTIONS:
        cached = {}
        np.testing.assert_array_equal(pictures(resolution), pictures(resolution))


def test_nothing_below_the_lowest_score_is_kept(video):
    detections = Detections.merge(run(video).cached.values())
    assert len(detections)
    assert detections.confidence.min() >= app.MIN_SCORE
    shown = run(video, 0.0).results.detections()
    assert len(shown) == len(detections)


def test_only_the_chosen_classes_are_reported():
    assert set(run(str(EXAMPLE), 0.3, classes=["star", "cross"]).results.detections()["label"]) == {"star", "cross"}


@pytest.fixture(scope="module")
def report():
    return run(str(EXAMPLE), 0.5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The paths of the video, the CSV and the JSON file of a run."""
    return run(str(EXAMPLE), 0.5, save_to=tmp_path_factory.mktemp("saved")).saved


def test_the_files_are_named_after_the_source(saved):
    names = [path.rsplit("/", 1)[1] for path in saved.values()]
    assert names == ["bouncing-shapes-boxes.mp4", "bouncing-shapes.csv", "bouncing-shapes.json"]


def test_the_csv_says_where_the_rendered_shapes_are(report, saved):
    """In pixels of the uploaded video, at the source's frame and second."""
    with open(saved["csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    hits = 0
    for row in rows:
        frame = int(row["frame"])
        assert frame % 2 == 0
        assert float(row["time_seconds"]) == pytest.approx(frame / float(report.info.fps), abs=0.002)
        box = np.array([float(row[side]) for side in ("x1", "y1", "x2", "y2")])
        boxes, labels = shapes.example_truth(EXAMPLE.stem, frame)
        names = np.array([app.DETECTOR.id2label[int(label)] for label in labels])
        hits += ((names == row["label"]) & (shapes.overlap(box, boxes) > 0.5)).any()
    assert len(rows) > 200
    assert hits / len(rows) > 0.85


def test_the_json_carries_what_a_program_needs(report, saved):
    with open(saved["json"]) as file:
        content = json.load(file)
    assert content["model"] == "shapes-rtdetr"
    assert content["threshold"] == 0.5
    info = report.info
    assert content["video"]["fps"] == float(info.fps)
    assert content["video"]["duration_seconds"] == pytest.approx(info.duration_seconds, abs=0.001)
    width, height = content["video"]["width"], content["video"]["height"]
    for found in content["detections"]:
        assert 0.5 < found["score"] <= 1
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height


def test_the_json_says_how_the_detections_were_made(saved):
    content = json.loads(Path(saved["json"]).read_text())
    settings = {"classes": [], "resolution": "Half (fast)", "analysed": "Every frame", "tracks": True}
    assert content | settings | {"format_version": 1, "step": 1, "video_output": True} == content
    assert content["video"]["name"] == "bouncing-shapes.mp4"


def test_the_json_tells_frames_without_detections_from_skipped_ones(video, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "step_to_keep_up", lambda *_: 4)
    path = run(video, 0.99, save_to=tmp_path, analysed=app.KEEP_UP).saved["json"]
    content = json.loads(Path(path).read_text())
    assert content["detections"] == []
    assert content["step"] == 4
    assert content["analysed_frames"] == [0, *range(6, 82, 8), 80], "of every second frame, each fourth, and both ends"
    assert content["analysed_frame_count"] == 12


def test_the_table_and_the_plot_tell_the_same_story_as_the_truth(report):
    results = {component: value for values in app.show_results(report) for component, value in values.items()}
    table = {row[0]: row[1:] for row in results[app.table].to_numpy().tolist()}
    truth = {}
    for frame in range(0, int(report.info.duration_seconds * report.info.fps), 2):
        for label in shapes.example_truth(EXAMPLE.stem, frame)[1]:
            truth.setdefault(app.DETECTOR.id2label[int(label)], []).append(frame)
    assert set(truth) <= set(table)
    counts = next(values[app.plot]["value"] for values in app.show_results(report) if app.plot in values)
    for name in truth:
        objects, most, first, last = table[name]
        assert objects >= most >= 1
        assert 0 <= first <= last <= report.info.duration_seconds
        assert counts[counts["class"] == name]["count"].max() == most


def test_a_threshold_of_0_costs_little_memory_per_frame(video):
    report = run(video, 0.0)
    assert sum(rows.nbytes for rows in report.results._rows.values()) < 2000 * 41
    assert len(pickle.dumps(report.cached)) < 2000 * 41


def test_a_frame_that_two_gpu_calls_show_is_reported_once(video, tmp_path):
    report = analysis_of(video, 0.0)
    update = next(stream(video, 0.0, folder=str(tmp_path)))
    report.add(update)
    once = len(report.results.detections())
    report.add(update._replace(frames=update.frames[-1:]))
    assert len(report.results.detections()) == once > 0


def test_a_run_that_was_stopped_before_its_first_frame_does_not_advise_a_lower_threshold(video):
    assert "Try a lower threshold" not in app.describe(analysis_of(video, 0.95), "Stopped")


def test_analysed_seconds_never_exceed_the_duration(tmp_path):
    path = Kind("odd", frames=83, audio=()).make(tmp_path)
    content = json.loads(Path(run(str(path), save_to=tmp_path).saved["json"]).read_text())
    assert content["analysed_seconds"] <= content["video"]["duration_seconds"]


def test_a_failure_comes_after_everything_that_was_found(video, monkeypatch):
    report, calls = analysis_of(video, 0.3), []

    def failing(frames):
        calls.extend(frames)
        if len(calls) > 30:
            raise RuntimeError("the device is gone")
        return detect(frames)

    detect = app.DETECTOR._forward_pass
    monkeypatch.setattr(app.DETECTOR, "_forward_pass", failing)
    with closing(report.stream()) as updates, pytest.raises(gr.Error, match="Something went wrong"):
        while True:
            report.add(next(updates))
    assert report.output_frames == 30, "the first chunk"


# --------------------------------------------------------------------------------------------- objects, as they come


def many_frames(count, numbers, seed=0):
    """Analysed frames at 12.5 per second, with objects of three classes that flicker and are replaced by others."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        seen = [(c, n + index // 40 * numbers) for c in range(3) for n in range(1, numbers + 1) if rng.random() < 0.6]
        class_id, tracker_id = np.array([*seen, (0, 0)]).T  # and one detection that is no object
        boxes = Detections(rng.random((len(class_id), 4)), rng.random(len(class_id)), class_id, tracker_id)
        yield FrameDetections(2 * index, index / 12.5, (640, 360), boxes, boxes)


def results_of(frames, seconds):
    pts_seconds = np.zeros(1 + max([frame.source_index for frame in frames], default=0))
    for frame in frames:
        pts_seconds[frame.source_index] = frame.pts_seconds
    info = SimpleNamespace(duration_seconds=seconds, pts_seconds=pts_seconds)
    results = Results(info, {0: "star", 1: "circle", 2: "cross"})
    results.add(frames)
    return results


@pytest.mark.parametrize(("seconds", "seconds_per_point"), [(1.2, 1), (24, 1), (600, 3)])
def test_objects_and_counts_are_those_of_all_rows_together(seconds, seconds_per_point):
    frames = list(many_frames(round(min(24, seconds) * 12.5), 3))
    results = results_of(frames + frames[-1:], seconds)  # two GPU calls may show the same frame
    rows = results.detections().dropna(subset="track")
    objects = [rows["label"], rows["track"]]
    seen = rows.groupby(objects)["time_seconds"].diff().clip(upper=0.5).groupby(objects).transform("sum")
    rows = rows[seen >= min(1, seconds / 2) - 1e-6]
    rows["at_once"] = rows.groupby(["frame", "label"])["track"].transform("size")
    table = results.objects_per_class().set_index("Class")
    assert len(table) == 3
    for label, alike in rows.groupby("label"):
        times = alike["time_seconds"]
        expected = [alike["track"].nunique(), alike["at_once"].max(), times.min(), times.max()]
        assert table.loc[label].tolist() == pytest.approx(expected, abs=0.051)
    counts = results.counts_over_time(23)
    assert counts["second"].unique().tolist() == list(range(0, 24, seconds_per_point))
    most = rows.groupby([rows["time_seconds"] // seconds_per_point * seconds_per_point, "label"])["at_once"].max()
    for _, second, label, count in counts.itertuples():
        assert count == most.get((second, label), 0)


def test_after_two_hours_a_chunk_costs_what_the_first_ones_cost():
    results, frames, seconds = results_of([], 7200), list(many_frames(90_000, 1)), []
    for start in range(0, len(frames), 25):
        began = time.process_time()
        results.add(frames[start : start + 25])
        results.objects_per_class()
        results.counts_over_time(start / 12.5)
        seconds.append(time.process_time() - began)
    assert np.median(seconds[-100:]) < 3 * np.median(seconds[:100])


# Lines


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """A run with two lines, without tracks."""
    lines = [[0.5, 0, 0.5, 1], [0, 0.5, 1, 0.5]]
    return run(str(EXAMPLE), 0.5, save_to=tmp_path_factory.mktemp("crossed"), lines=lines, tracks=False)


def test_the_crossings_are_those_of_the_rendered_shapes(crossed):
    """By the centre of the bottom edge of each true box: it changes sides when it is clear of the line again."""
    table, count = crossed.results.crossings(), len(crossed.info.pts_seconds)
    (width, height), expected = crossed.results.source_size, []
    for label in shapes.LABELS:
        found = [shapes.example_truth(EXAMPLE.stem, frame) for frame in range(count)]
        boxes = np.array([boxes[labels == shapes.LABELS.index(label)][0] for boxes, labels in found])
        x, y = boxes[:, [0, 2]].mean(axis=1) - width / 2, boxes[:, 3] - height / 2
        sizes = boxes[:, 2:] - boxes[:, :2]
        for line, side, margin in (("A", -x, sizes[:, 0]), ("B", y, sizes[:, 1])):
            sides = np.sign([side[0], *side[abs(side) > 0.2 * margin]])
            changes = sides[1:][np.diff(sides) != 0]
            expected += [(line, "in" if change > 0 else "out", label) for change in changes]
    assert len(expected) > 15
    assert sorted(expected) == sorted(zip(table["line"], table["direction"], table["class"], strict=True))
    assert (table["second"] == (table["frame"] / float(crossed.info.fps)).round(3)).all()
    assert set(table["number"]) == {1}


def test_the_files_have_the_lines_and_the_crossings(crossed, saved):
    table, content = pd.read_csv(crossed.saved["crossings"]), json.loads(Path(crossed.saved["json"]).read_text())
    assert Path(crossed.saved["crossings"]).name == "bouncing-shapes-crossings.csv"
    assert list(table.columns) == ["second", "frame", "line", "direction", "class", "number"]
    assert table.to_dict("records") == content["crossings"] == crossed.results.crossings().to_dict("records")
    assert content["lines"] == [[0.5, 0, 0.5, 1], [0, 0.5, 1, 0.5]]
    without = json.loads(Path(saved["json"]).read_text())
    assert (without["lines"], without["crossings"]) == ([], [])


def test_each_line_and_class_has_its_counts_and_the_second_of_its_first_crossing(crossed):
    table, found = crossed.results.crossings_per_line(), crossed.results.crossings()
    assert list(table.columns) == ["Line", "Class", "In", "Out", "First (s)"]
    assert table[["In", "Out"]].to_numpy().sum() == len(found)
    for line, label, into, out, first in table.itertuples(index=False):
        own = found[(found["line"] == line) & (found["class"] == label)]
        assert (into, out) == ((own["direction"] == "in").sum(), (own["direction"] == "out").sum())
        assert first == pytest.approx(own["second"].min(), abs=0.05)


def test_cached_frames_give_the_same_crossings_without_the_model(crossed, monkeypatch):
    passes = count_passes(monkeypatch)
    again = run(str(EXAMPLE), 0.5, lines=crossed.options.lines)
    assert not passes
    pd.testing.assert_frame_equal(again.results.crossings(), crossed.results.crossings())
