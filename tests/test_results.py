"""Detections are cached, counted and saved: no frame goes through the model twice, and the files say what is where."""

import csv
import json
import pickle
import shutil
import time
import zipfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import cv2
import gradio as gr
import numpy as np
import pandas as pd
import pytest
import shapes
from streams import all_end, analysis_of, count_passes, run, stream
from videos import Kind, read_chunks

import app
from draw_boxes import label_color
from results import CLASS_BAR_STEPS, FrameDetections, Results
from tracking import PICTURE_BYTES, Detections, Picture

EXAMPLE = app.EXAMPLES / "bouncing-shapes.mp4"
RISING = app.EXAMPLES / "rising-shapes.mp4"


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
    endings = ["-boxes.mp4", ".csv", ".json", "-objects.csv", "-objects.zip", "-mot.zip"]
    assert names == [f"bouncing-shapes{ending}" for ending in endings]


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


def test_the_table_and_the_timeline_tell_the_same_story_as_the_truth(report):
    table = {row[0]: row[1:] for row in app.show_results(report)[app.table].to_numpy().tolist()}
    truth = {}
    for frame in range(0, int(report.info.duration_seconds * report.info.fps), 2):
        for label in shapes.example_truth(EXAMPLE.stem, frame)[1]:
            truth.setdefault(app.DETECTOR.id2label[int(label)], []).append(frame)
    assert set(truth) <= set(table)
    for name in truth:
        objects, most, first, last = table[name]
        assert objects >= most >= 1
        assert 0 <= first <= last <= report.info.duration_seconds
        bars = [spans for label, _, spans in report.results.timeline() if label == name]
        assert len(bars) == objects
        assert min(bars)[0][0] == pytest.approx(first, abs=0.051)


# --------------------------------------------------------------------------------------------- each object by itself


def objects_of(folder, **options):
    """The JSON file's objects with their pictures (JPEG), and the whole file, after a run of the rising shapes."""
    folder.mkdir()
    saved = run(RISING, 0.3, save_to=folder, **options).saved
    content = json.loads(Path(saved["json"]).read_text())
    with zipfile.ZipFile(saved["pictures"]) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files.pop("objects.csv") == Path(saved["objects"]).read_bytes()
    objects = [(found, files.pop(f"{found['label']}-{found['track']}.jpg")) for found in content["objects"]]
    assert not files, "no picture of anything else"
    return objects, content


def test_each_object_has_a_picture_in_its_colour_from_a_moment_when_it_was_whole(tmp_path):
    example = shapes.EXAMPLES[RISING.stem]
    size, actors = (example.width, example.height), list(example.actors)
    for found, jpeg in objects_of(tmp_path / "saved")[0]:
        seconds, box = found["best_seconds"], np.array(found["best_box"])
        outlines = [actor.outline(seconds) for actor in actors]
        boxes = np.array([[*corners.min(axis=0), *corners.max(axis=0)] for corners in outlines])
        best = shapes.overlap(box, boxes).argmax()
        assert shapes.overlap(box, boxes)[best] > 0.8
        assert (outlines[best] >= 0).all() and (outlines[best] <= size).all(), "it is whole"
        actor = actors.pop(best)
        assert found["label"] == actor.kind
        assert len(jpeg) <= PICTURE_BYTES
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        height, width = picture.shape[:2]
        assert (width, height) == pytest.approx(1.2 * (box[2:] - box[:2]) / 2, abs=4), "with a margin, at half size"
        middle = picture[height // 2 - 2 : height // 2 + 3, width // 2 - 2 : width // 2 + 3].mean(axis=(0, 1))
        assert middle == pytest.approx(actor.colour, abs=25)
        outline = np.array([int(label_color(actor.kind)[i : i + 2], 16) for i in (1, 3, 5)])
        assert not (np.abs(picture.astype(int) - outline).max(axis=2) < 30).any(), "nothing was drawn yet"
    assert not actors, "each shape has a picture"


def test_objects_csv_has_the_same_rows_as_the_json_and_agrees_with_the_detections(saved):
    content = json.loads(Path(saved["json"]).read_text())
    detections = {(d["time_seconds"], d["label"], d["track"]): d for d in content["detections"]}
    with open(saved["objects"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["objects"]) == 5
    for row, found in zip(rows, content["objects"], strict=True):
        box = found.pop("best_box")
        assert [float(row.pop(side)) for side in ("x1", "y1", "x2", "y2")] == box
        assert row == {key: str(value) for key, value in found.items()}
        best = detections[found["best_seconds"], found["label"], found["track"]]
        assert (best["score"], best["box"]) == (found["best_score"], box)
        times = [time for time, *key in detections if key == [found["label"], found["track"]]]
        assert (found["first_seconds"], found["last_seconds"]) == (min(times), max(times))
        assert 1 <= found["seen_seconds"] <= found["last_seconds"] - found["first_seconds"]


def test_a_cached_run_has_the_same_pictures_without_the_model(tmp_path, monkeypatch):
    first = objects_of(tmp_path / "first")
    passes = count_passes(monkeypatch)
    assert objects_of(tmp_path / "second") == first
    assert not passes


def test_pictures_are_of_analysed_frames(tmp_path, monkeypatch):
    """Between them, boxes are interpolated."""
    monkeypatch.setattr(app, "step_to_keep_up", lambda *_: 4)
    objects, content = objects_of(tmp_path / "saved", analysed=app.KEEP_UP)
    assert content["step"] == 4
    assert len(objects) == 8
    for found, _ in objects:
        assert round(found["best_seconds"] * content["video"]["fps"]) in content["analysed_frames"]


def test_the_mot_zip_has_the_same_tracks_and_shows_them_on_skipped_frames(saved):
    """Also read with datumaro 1.13, as CVAT does."""
    with zipfile.ZipFile(saved["mot"]) as archive, archive.open("gt/gt.txt") as file:
        lines = np.loadtxt(file, delimiter=",")
        labels = archive.read("gt/labels.txt").decode().split("\n")
    assert labels == list(app.DETECTOR.id2label.values())
    assert (lines[:, [6, 8]] == 1).all()
    numbers, frames = {}, {}
    for found in json.loads(Path(saved["json"]).read_text())["detections"]:
        if found["track"]:
            left, top, right, bottom = found["box"]
            expected = (found["frame"] + 1, left, top, right - left, bottom - top, labels.index(found["label"]) + 1)
            (line,) = lines[(np.abs(lines[:, [0, 2, 3, 4, 5, 7]] - expected) < 0.01).all(axis=1)]
            numbers.setdefault((found["label"], found["track"]), set()).add(line[1])
            frames.setdefault(line[1], []).append(line[0])
    assert sorted(numbers.values(), key=min) == [{number} for number in range(1, len(numbers) + 1)], (
        "one number for each object"
    )
    for number, seen in frames.items():
        assert len(seen) < (lines[:, 1] == number).sum(), "every second frame was skipped"
        gaps = np.diff(lines[lines[:, 1] == number, 0])
        assert sorted(gaps[gaps > 1]) == sorted(gap for gap in np.diff(seen) if gap > 0.5 * 30)


def test_a_threshold_of_0_costs_little_memory_per_frame(video):
    report = run(video, 0.0)
    assert sum(rows.nbytes for rows in report.results._rows.values()) < 2000 * 41
    assert len(pickle.dumps(report.cached)) < 2000 * 41


def test_a_frame_that_two_gpu_calls_show_is_reported_once(video, tmp_path):
    report = analysis_of(video, 0.0)
    update = next(stream(video, 0.0, folder=str(tmp_path)))
    report.add(update)
    once = len(report.results.detections())
    report.add(update._replace(frames=update.frames[-1:], pictures=[]))
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


@pytest.mark.parametrize("seconds", [1.2, 24, 600])
def test_objects_and_counts_are_those_of_all_rows_together(seconds):
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
    times = rows.groupby(["label", "track"])["time_seconds"].agg(["min", "max"])
    counted = [(seen.label, seen.number, seen.first_ms, seen.last_ms) for seen in results.counted_objects()]
    assert counted == [(*key, round(1000 * first), round(1000 * last)) for key, first, last in times.itertuples()]
    bars = results.timeline()
    if len(counted) <= 30:
        spans = [(f"{label} {number}", [(first / 1000, last / 1000)]) for label, number, first, last in counted]
        assert [(name, found) for _, name, found in bars] == spans
    else:
        assert [bar.label for bar in bars] == ["circle", "cross", "star"]
    step = 1000 * seconds / CLASS_BAR_STEPS
    for label, _, spans in bars if len(counted) > 30 else ():
        shown, expected = np.zeros((2, CLASS_BAR_STEPS))
        for first, last in spans:
            shown[round(1000 * first / step) : round(1000 * last / step)] = 1
        for name, _, first, last in counted:
            if name == label:
                expected[int(first / step) : int(last / step) + 1] = 1
        assert (shown == expected).all()


def test_a_frame_that_comes_again_may_bring_a_number_and_a_picture():
    box = np.array([[0.1, 0.1, 0.3, 0.5]], np.float32)
    new, numbered = (Detections(box, np.array([0.9]), np.array([0]), np.array([number])) for number in (0, 1))
    results = results_of([FrameDetections(2, 1.0, (640, 360), new, new)], 24)
    results.add([FrameDetections(2, 1.0, (640, 360), numbered, numbered)], [Picture(0, 1, 2, "star.jpg")])
    assert results.detections()["track"].tolist() == [1]


def test_at_most_200_pictures_are_shown_and_a_label_is_not_taken_for_html(tmp_path):
    (tmp_path / "picture.jpg").write_bytes(b"")
    results = results_of([], 24)
    results._id2label = {0: "<i>${star}</i>"}
    class_id, tracker_id = np.zeros(250, int), np.arange(1, 251)
    boxes = Detections(np.ones((250, 4)), np.ones(250), class_id, tracker_id)
    results.info.pts_seconds = np.arange(5) / 2
    for index in range(5):
        results.add([FrameDetections(index, index / 2, (640, 360), boxes, boxes)])
    results.add([], [Picture(0, number, 4, str(tmp_path / "picture.jpg")) for number in tracker_id.tolist()])
    pictures = app.object_pictures(results)
    assert pictures.count("<button") == 200
    assert "200 of 250 objects" in pictures
    for text in (pictures, app.object_bars(results)):
        assert "&lt;i&gt;${star}&lt;/i&gt;" in text
        assert "<i>" not in text


def test_after_two_hours_a_chunk_costs_what_the_first_ones_cost():
    results, frames, seconds = results_of([], 7200), list(many_frames(90_000, 1)), []
    for start in range(0, len(frames), 25):
        began = time.process_time()
        results.add(frames[start : start + 25])
        results.objects_per_class()
        results.counted_objects(app.MAX_PICTURES)
        results.timeline()
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
