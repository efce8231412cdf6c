"""The generator: batches, chunks, drawn boxes, and how it ends."""

import itertools
import os
import tempfile
import threading
import time
from contextlib import closing
from fractions import Fraction

import gradio as gr
import numpy as np
import pytest
import shapes
from streams import all_end, analysis_of, count_passes, stream
from videos import Kind, read_chunks, read_number

import app
from draw_boxes import label_color

EXAMPLE = app.EXAMPLES / "bouncing-shapes.mp4"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """4.1 s at 30 fps: two whole chunks and a short one."""
    return str(Kind("numbered", frames=123).make(tmp_path_factory.mktemp("videos")))


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(app.DETECTOR, "batch_frames", 12)


# ------------------------------------------------------------------------------------------------ chunks and batches


def test_chunks_are_two_seconds_long_and_the_last_one_is_shorter(numbered, tmp_path):
    updates = list(stream(numbered, 1.0, folder=str(tmp_path)))
    chunks = [read_chunks([update.chunk]) for update in updates]
    assert [len(chunk.pictures) for chunk in chunks] == [30, 30, 2]
    assert [len(chunk.audio) for chunk in chunks] == [96_000, 96_000, 6_400]
    shown = [read_number(picture) for chunk in chunks for picture in chunk.pictures]
    assert shown == [frame.source_index for update in updates for frame in update.frames] == list(range(0, 123, 2))
    assert [(update.output_frames, update.is_end) for update in updates] == [(30, False), (60, False), (62, True)]


def test_at_full_size_every_frame_is_shown(numbered, tmp_path):
    updates = stream(numbered, 1.0, resolution="Full", folder=str(tmp_path))
    pictures = read_chunks([update.chunk for update in updates]).pictures
    assert pictures[0].shape == (96, 160, 3)
    assert [read_number(picture) for picture in pictures] == list(range(123))


def test_a_stream_that_begins_in_mid_video_equals_the_rest_of_a_whole_one(tmp_path):
    whole = list(stream(str(EXAMPLE), 0.3, folder=str(tmp_path)))
    after = whole[0]._replace(output_frames=100)
    rest = list(stream(str(EXAMPLE), 0.3, after=after, folder=str(tmp_path)))
    assert [update.output_frames for update in rest] == [update.output_frames for update in whole][3:], "same borders"
    expected = [frame for update in whole for frame in update.frames][100:]
    found = [frame for update in rest for frame in update.frames]
    assert [frame.source_index for frame in found] == [frame.source_index for frame in expected]
    for one, other in zip(found, expected, strict=True):
        sure = [app.select_detections(frame.detections, 0.5, app.Options()) for frame in (one, other)]
        np.testing.assert_allclose(*(found.xyxy for found in sure), atol=0.001)
        np.testing.assert_allclose(*(found.confidence for found in sure), atol=0.001)
        np.testing.assert_array_equal(*(found.class_id for found in sure))


def test_small_batches_make_the_same_chunks(numbered, small_batches, tmp_path, monkeypatch):
    passes = count_passes(monkeypatch)
    updates = list(stream(numbered, 1.0, folder=str(tmp_path)))
    assert len(passes) > 6
    assert [len(update.frames) for update in updates] == [30, 30, 2]
    assert [update.output_frames for update in updates] == [30, 60, 62]
    assert [update.is_end for update in updates] == [False, False, True]


def batches_of(video, batch_frames, start=0):
    info = app.read_video_info(video)
    frames = app.sample_frames(info, info.fps / 2, Fraction(1, 2), start)
    return list(app.read_batches(frames, start, step=1, chunk_frames=30, batch_frames=batch_frames))


def test_a_chunk_is_one_batch_unless_the_detector_takes_fewer_frames(numbered):
    batches = batches_of(numbered, 60)
    assert [len(batch.frames) for batch in batches] == [30, 30, 2]
    assert [len(batch.frames) for batch in batches_of(numbered, 60, start=40)] == [20, 2], (
        "chunks end at the same frames"
    )
    batches = batches_of(numbered, 12)
    assert [len(batch.frames) for batch in batches] == [12, 12, 6, 12, 12, 6, 2]
    assert [batch.is_end for batch in batches] == [False] * 6 + [True]


def test_batches_of_large_frames_are_small(numbered, monkeypatch):
    monkeypatch.setattr(app, "BATCH_BYTES", 10 * 80 * 48 * 3)
    assert max(len(batch.frames) for batch in batches_of(numbered, 60)) <= 11
    monkeypatch.setattr(app, "BATCH_BYTES", 1)
    assert {len(batch.frames) for batch in batches_of(numbered, 60)} == {1}


def test_a_frame_that_is_shown_for_longer_is_detected_and_reported_once(tmp_path, monkeypatch):
    """Also if it is shown across batches and chunks."""
    path = Kind("held", times=[0, 0.04, 0.08, 0.12, 0.16, 3, 3.04, 3.08, 3.12], audio=()).make(tmp_path)
    monkeypatch.setattr(app.DETECTOR, "batch_frames", 12)
    passes = count_passes(monkeypatch)
    updates = list(stream(str(path), 1.0, folder=str(tmp_path)))
    reported = [frame.source_index for update in updates for frame in update.frames]
    assert updates[-1].output_frames == len(read_chunks([update.chunk for update in updates]).pictures) == 40
    assert sum(passes) == len(reported) == len(set(reported)) < 10


def test_a_cut_off_file_streams_as_far_as_it_goes(tmp_path):
    options = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", 30)
    path = Kind("cut", frames=300, video=options, audio=(), muxer=("-movflags", "+faststart")).make(tmp_path)
    os.truncate(path, path.stat().st_size * 6 // 10)
    report = analysis_of(str(path), 1.0)
    for update in stream(str(path), 1.0, folder=str(tmp_path)):
        assert not report.is_damaged, "before the end, a short output is normal"
        report.add(update)
    assert report.is_damaged
    assert 4 < report.seconds < 8


# ------------------------------------------------------------------------------------------------------- drawn boxes


def test_boxes_are_drawn_where_the_rendered_shapes_are(tmp_path):
    """In the decoded chunks: the outline has the label's colour on each side of the shape's true box."""
    updates = list(stream(str(EXAMPLE), 0.5, folder=str(tmp_path)))
    pictures = read_chunks([update.chunk for update in updates]).pictures
    frames = [frame for update in updates for frame in update.frames]
    outlined = at_a_shape = total = 0
    for picture, frame in zip(pictures[::5], frames[::5], strict=True):
        true_boxes = shapes.example_truth(EXAMPLE.stem, frame.source_index)[0]
        found = app.select_detections(frame.detections, 0.5, app.Options())
        for box, number in zip(found.xyxy * (frame.source_size * 2), found.class_id, strict=True):
            total += 1
            outlined += outline_is_near(picture, box / 2, label_color(app.DETECTOR.id2label[number]))
            at_a_shape += bool((np.abs(true_boxes - box).max(axis=1) < 25).any())
    assert total > 30
    assert outlined / total > 0.8, f"{outlined} of {total} detections have their outline in the picture"
    assert at_a_shape / total > 0.8, f"{at_a_shape} of {total} boxes are at a rendered shape"


def outline_is_near(picture, box, color, tolerance=3):
    """Whether a line of about this colour runs along two or more sides of `box`; others may be covered."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    # H.264 keeps colour at half resolution, so that thin lines fade.
    near = np.abs(picture.astype(int) - rgb).max(axis=2) < 90
    left, top, right, bottom = (round(float(v)) for v in box)
    sides = []
    for y in (top, bottom):
        rows = near[max(0, y - tolerance) : y + tolerance + 1, max(0, left) : right]
        sides.append(rows.any(axis=0).mean() if rows.size else 0)
    for x in (left, right):
        columns = near[max(0, top) : bottom, max(0, x - tolerance) : x + tolerance + 1]
        sides.append(columns.any(axis=1).mean() if columns.size else 0)
    return sum(side > 0.6 for side in sides) >= 2


def first_chunk(folder, conf_threshold, classes=()):
    """The first two seconds of the example: decoded pictures (N, H, W, 3), and the model's detections."""
    updates = stream(str(EXAMPLE), conf_threshold, classes=classes, tracks=False, folder=str(folder))
    with closing(updates):
        update = next(updates)
    return np.array(read_chunks([update.chunk]).pictures).astype(int), [f.detections for f in update.frames]


def test_a_higher_threshold_draws_less(tmp_path):
    bare, detections = first_chunk(tmp_path, 1.0)
    scores = np.concatenate([found.confidence for found in detections])
    thresholds = [0, *np.quantile(scores, [0.5, 0.8, 0.95])]
    changed = [(np.abs(first_chunk(tmp_path, t)[0] - bare).max(axis=3) > 60).mean() for t in thresholds]
    assert all(more > 1.1 * less for more, less in itertools.pairwise(changed)), changed
    assert changed[-1] > 0


def test_only_boxes_of_the_chosen_classes_are_drawn(tmp_path):
    def is_drawn_elsewhere(classes):
        """Whether any pixel has changed away from the boxes of the label and their captions."""
        changed = np.abs(first_chunk(tmp_path, 0.5, classes)[0] - bare).max(axis=3) > 60
        assert changed.any()
        for picture, frame in zip(changed, detections, strict=True):
            height, width = picture.shape
            for x1, y1, x2, y2 in app.select_detections(frame, 0.5, chosen).xyxy * (width, height, width, height):
                picture[max(0, int(y1) - 30) : int(y2) + 30, max(0, int(x1) - 10) : int(x2) + 80] = False
        return changed.any()

    bare, detections = first_chunk(tmp_path, 1.0)
    label = app.DETECTOR.id2label[detections[0].class_id[0]]
    chosen = app.Options(classes=[label])
    assert not is_drawn_elsewhere([label])
    assert is_drawn_elsewhere([])


# ---------------------------------------------------------------------------------------------------------- its ends


@pytest.mark.parametrize("updates_taken", [1, 2])
def test_closing_ends_all_threads_and_leaves_only_the_yielded_chunks(
    updates_taken, numbered, small_batches, tmp_path, monkeypatch, new_threads
):
    """By default, chunks are in the system's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    updates = stream(numbered, 1.0)
    chunks = [update.chunk for update in itertools.islice(updates, updates_taken)]
    assert new_threads()
    updates.close()
    assert {str(path) for path in tmp_path.iterdir()} == set(chunks)
    assert len(chunks) == updates_taken
    assert all_end(new_threads)
    assert {str(path) for path in tmp_path.iterdir()} == set(chunks)


def test_an_unfinished_chunk_is_removed_when_the_stream_fails(numbered, small_batches, tmp_path, monkeypatch):
    written, write = itertools.count(1), app.ChunkWriter.write

    def fail_in_the_second_chunk(writer, image):
        if next(written) == 40:
            assert len(os.listdir(tmp_path)) == 2
            raise OSError(28, "No space left on device")
        write(writer, image)

    monkeypatch.setattr(app.ChunkWriter, "write", fail_in_the_second_chunk)
    updates = stream(numbered, 1.0, folder=str(tmp_path))
    chunk = next(updates).chunk
    with pytest.raises(gr.Error, match="could not store the result"):
        next(updates)
    assert os.listdir(tmp_path) == [os.path.basename(chunk)]


def test_an_error_in_a_stage_reaches_the_caller_and_leaves_no_thread_or_file(
    numbered, small_batches, tmp_path, monkeypatch, new_threads
):
    passes, forward = itertools.count(1), app.DETECTOR.model.forward

    def fail_in_the_third_pass(**inputs):
        if next(passes) == 3:
            raise RuntimeError("the device is gone")
        return forward(**inputs)

    monkeypatch.setattr(app.DETECTOR.model, "forward", fail_in_the_third_pass)
    with pytest.raises(gr.Error, match="Something went wrong"):
        list(stream(numbered, 1.0, folder=str(tmp_path)))
    assert all_end(new_threads)
    assert not os.listdir(tmp_path)


def test_an_encoder_that_fails_leaves_no_thread_or_file(numbered, tmp_path, monkeypatch, new_threads):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(app.ChunkWriter, "write_audio", fail)
    with pytest.raises(gr.Error, match="could not store the result"):
        list(stream(numbered, 1.0, folder=str(tmp_path)))
    assert all_end(new_threads)
    assert not os.listdir(tmp_path)


def test_nothing_is_written_to_the_working_directory(numbered, tmp_path, monkeypatch):
    working, chunks = tmp_path / "working", tmp_path / "chunks"
    working.mkdir()
    chunks.mkdir()
    monkeypatch.chdir(working)
    assert len(list(stream(numbered, 1.0, folder=str(chunks)))) == len(os.listdir(chunks)) == 3
    assert not os.listdir(working)


@pytest.mark.parametrize("content", [b"", b"this is not a video\n" * 50], ids=["empty", "text"])
def test_an_unusable_file_is_an_error_of_gradio_with_a_sentence(content, tmp_path):
    path = tmp_path / "upload.mp4"
    path.write_bytes(content)
    with pytest.raises(gr.Error) as error:
        list(stream(str(path), 0.3, folder=str(tmp_path)))
    assert error.value.message.endswith(".")
    assert str(tmp_path) not in error.value.message
    assert os.listdir(tmp_path) == ["upload.mp4"]


def test_closing_the_stream_does_not_wait_for_a_pass(numbered, small_batches, tmp_path, monkeypatch, new_threads):
    began, forward = threading.Semaphore(0), app.DETECTOR.model.forward

    def slow(**inputs):
        began.release()
        time.sleep(1)
        return forward(**inputs)

    monkeypatch.setattr(app.DETECTOR.model, "forward", slow)
    updates = stream(numbered, 1.0, folder=str(tmp_path))
    next(updates)
    for _ in range(4):
        began.acquire(timeout=5)
    closed_at = time.monotonic()
    updates.close()
    assert time.monotonic() - closed_at < 0.5
    assert all_end(new_threads)
