"""The generator: batches, chunks, what is drawn, and how it ends."""

import os
import re
import threading
import time
from pathlib import Path

import av
import cv2
import gradio as gr
import numpy as np
import pytest
import shapes
from videos import Kind, ffmpeg, play, read_chunks, read_number

import app
from draw_boxes import label_color

EXAMPLE = app.EXAMPLES / "bouncing-shapes.mp4"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """4.1 s at 30 fps: two whole chunks and a short one."""
    return Kind("numbered", frames=123).make(tmp_path_factory.mktemp("videos"))


def test_chunks_are_two_seconds_and_the_rest_comes_too(numbered):
    updates = list(app.stream_object_detection(str(numbered), 1.0))
    lengths = [len(read_chunks([update[0]]).pictures) for update in updates]
    assert lengths == [30, 30, 2]


def test_every_second_frame_is_shown(numbered):
    output = play(numbered)
    assert [read_number(picture) for picture in output.pictures] == list(range(0, 123, 2))


def test_one_chunk_is_one_batch_unless_it_is_too_large(numbered, monkeypatch):
    video = app.read_video_info(str(numbered))
    monkeypatch.setattr(app.DETECTOR, "batch_frames", 60)
    assert [len(batch) for batch in app.read_batches(video)] == [30, 30, 2]
    monkeypatch.setattr(app.DETECTOR, "batch_frames", 12)
    assert [len(batch) for batch in app.read_batches(video)] == [12, 12, 6, 12, 12, 6, 2]


def test_a_frame_that_is_shown_for_longer_is_detected_once(tmp_path, monkeypatch):
    path = Kind("held", times=[0, 0.04, 0.08, 0.12, 0.16, 3, 3.04, 3.08, 3.12]).make(tmp_path)
    passes = count_passes(monkeypatch)
    video = app.read_video_info(str(path))
    shown = [frame for batch in app.detect_batches(video, app.read_batches(video)) for frame in batch]
    assert len(shown) > sum(passes)
    assert sum(passes) == len({frame.index for frame, _ in shown})


def count_passes(monkeypatch):
    """A list that gets the number of frames of each forward pass."""
    passes = []
    forward = app.DETECTOR.model.forward

    def counting(*args, **kwargs):
        passes.append(len(kwargs["pixel_values"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(app.DETECTOR.model, "forward", counting)
    return passes


def test_boxes_are_drawn_where_the_rendered_shapes_are():
    """In the decoded chunks: the outline has the label's colour on each side of the shape's true box."""
    decoded, frames = [], []
    for update in app.stream_object_detection(str(EXAMPLE), 0.5):
        frames += update.detections
        with av.open(update.chunk) as container:
            decoded += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    outlined = at_a_shape = total = 0
    for picture, frame in zip(decoded[::5], frames[::5], strict=True):
        shapes_there = shapes.example_truth(EXAMPLE.stem, frame.frame)[0]
        for box, label in zip(np.array(frame.boxes), frame.labels, strict=True):
            total += 1
            outlined += outline_is_near(picture, box / 2, label_color(label))
            at_a_shape += bool((np.abs(shapes_there - box).max(axis=1) < 25).any())
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


def test_a_higher_threshold_draws_less():
    def boxes_drawn(threshold):
        video = app.read_video_info(str(EXAMPLE))
        batch = next(app.detect_batches(video, app.read_batches(video)))
        return sum(int((found[:, 4] > threshold).sum()) for _, found in batch)

    assert boxes_drawn(0.0) > boxes_drawn(0.3) > boxes_drawn(0.95)


def threads_end(before, seconds=3):
    deadline = time.monotonic() + seconds
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    return threading.active_count() <= before


def test_closing_the_generator_ends_its_threads_and_removes_what_is_half_done(numbered):
    before = threading.active_count()
    updates = app.stream_object_detection(str(numbered), 1.0)
    chunk = next(updates).chunk
    assert threading.active_count() > before
    updates.close()
    assert threads_end(before)
    # One chunk may have been finished ahead of the one that was taken.
    assert len(os.listdir(os.path.dirname(chunk))) <= 2


def test_an_error_in_a_stage_reaches_the_caller_and_ends_all_threads(tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("the device is gone")

    path = Kind("failing", frames=40).make(tmp_path)
    before = threading.active_count()
    monkeypatch.setattr(app.DETECTOR.model, "forward", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(app.stream_object_detection(str(path), 1.0))
    assert threads_end(before)


def test_nothing_is_written_to_the_working_directory(numbered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(app.stream_object_detection(str(numbered), 1.0))
    assert not os.listdir(tmp_path)


def make_text(path):
    path.write_text("this is not a video\n" * 50)


def make_empty(path):
    path.touch()


def make_png(path):
    cv2.imwrite(str(path.with_suffix(".png")), np.zeros((64, 64, 3), np.uint8))
    path.with_suffix(".png").rename(path)


def make_jpeg(path):
    cv2.imwrite(str(path.with_suffix(".jpg")), np.zeros((64, 64, 3), np.uint8))
    path.with_suffix(".jpg").rename(path)


def make_sound_only(path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", path)


def make_sound_with_cover(path):
    cover = path.with_suffix(".png")
    cv2.imwrite(str(cover), np.zeros((64, 64, 3), np.uint8))
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-i", cover, "-map", 0, "-map", 1, "-c:v", "png",
           "-disposition:v:0", "attached_pic", "-f", "ipod", path)  # fmt: skip


def make_cut_before_its_index(path):
    whole = Kind("whole").make(path.parent).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def make_playlist(path):
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{EXAMPLE}\n#EXT-X-ENDLIST\n")


def make_concat(path):
    path.write_text(f"ffconcat version 1.0\nfile {EXAMPLE}\n")


@pytest.mark.parametrize(
    "make",
    [make_text, make_empty, make_png, make_jpeg, make_sound_only, make_sound_with_cover,
     make_cut_before_its_index, make_playlist, make_concat],
)  # fmt: skip
def test_what_is_not_a_video_gets_a_sentence(make, tmp_path):
    path = tmp_path / "upload.mp4"
    make(path)
    with pytest.raises(gr.Error) as error:
        list(app.stream_object_detection(str(path), 0.3))
    assert error.value.message.endswith(".")
    assert str(tmp_path) not in error.value.message


def damage(path: Path, start: float, stop: float) -> None:
    """Overwrite a part of a file, given as shares of its length, with noise."""
    data = bytearray(path.read_bytes())
    span = slice(int(len(data) * start), int(len(data) * stop))
    data[span] = np.random.default_rng(1).bytes(span.stop - span.start)
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_cut_off_file_plays_as_far_as_it_goes_and_a_warning_says_so(suffix, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", lambda message, *a, **k: warnings.append(message))
    video = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", 30)
    index_first = ("-movflags", "+faststart") if suffix == "mp4" else ()
    path = Kind("cut", suffix, frames=300, video=video, audio=(), muxer=index_first).make(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    output = play(path)
    assert 4 < output.seconds < 8
    assert [read_number(p) for p in output.pictures[:40]] == list(range(0, 80, 2))
    assert len(warnings) == 1
    said = float(re.search(r"up to second (\d+\.\d)", warnings[0])[1])
    assert said == pytest.approx(output.seconds, abs=0.1)


def test_a_file_that_is_damaged_in_the_middle_plays_to_its_end(tmp_path):
    kind = Kind("damaged", "ts", frames=300, video=("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", 30))
    path = kind.make(tmp_path)
    damage(path, 0.45, 0.5)
    output = play(path)
    assert output.seconds == pytest.approx(10, abs=0.1)
    assert read_number(output.pictures[-1]) == 298


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_video_that_was_filmed_sideways_stands_upright(degrees, tmp_path, monkeypatch):
    """The stored picture is turned, and the metadata say how to turn it back."""
    plain = Kind("plain", frames=10, size=(96, 160)).make(tmp_path)
    turn = {90: "transpose=2,", 180: "hflip,vflip,", 270: "transpose=1,"}[degrees]
    stored, path = tmp_path / "stored.mp4", tmp_path / "sideways.mp4"
    ffmpeg("-i", plain, "-vf", f"{turn}null", "-c:v", "libx264", stored)
    with av.open(str(stored)) as source, av.open(str(path), "w") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        track.set_display_rotation(360 - degrees)  # counter-clockwise
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = track
                target.mux(packet)
    for readers in ((app.opencv_frames,), (app.pyav_frames,)):
        monkeypatch.setattr(app, "READERS", readers)
        output = play(path)
        assert output.pictures[0].shape == (80, 48, 3)
        assert [read_number(picture) for picture in output.pictures] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bt709", ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-colorspace", "bt709", "-color_range", "tv"]),
        ("bt601", ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-colorspace", "smpte170m", "-color_range", "tv"]),
        ("full", ["-c:v", "libx264", "-pix_fmt", "yuvj420p", "-colorspace", "bt709", "-color_range", "pc"]),
        ("10 bit", ["-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-colorspace", "bt709", "-color_range", "tv",
                    "-x265-params", "log-level=0:colormatrix=bt709"]),
    ],
)  # fmt: skip
def test_colours_are_kept_and_said_to_be_bt601(name, options, tmp_path):
    color = (200, 80, 40)
    matrix = "bt601" if name == "bt601" else "bt709"
    scale = f"scale=out_color_matrix={matrix}:out_range={'full' if name == 'full' else 'tv'}"
    path = tmp_path / "colour.mp4"
    picture = np.full((64, 96, 3), color, np.uint8)
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x64", "-r", 10, "-i", "-", "-vf", scale, *options, path,
           stdin=picture.tobytes() * 10)  # fmt: skip
    update = next(app.stream_object_detection(str(path), 1.0))
    with av.open(update.chunk) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (5, 1)
        np.testing.assert_allclose(frame.to_ndarray(format="rgb24")[16, 24], color, atol=6)


@pytest.mark.parametrize(("suffix", "codec"), [("ts", ("libx264",)), ("webm", ("libvpx", "-b:v", "2M"))])
def test_a_recording_that_changes_its_size_keeps_the_first_one(suffix, codec, tmp_path):
    """As browsers do when they share a window whose size changes."""
    parts = []
    for name, size, offset in (("small", (160, 96), 0), ("large", (320, 192), 1)):
        part = Kind(name, suffix, frames=30, size=size, audio=(), video=("-c:v", *codec, "-pix_fmt", "yuv420p"))
        parts.append((part.make(tmp_path), offset))
    path = tmp_path / f"both.{suffix}"
    with av.open(str(path), "w") as target:
        track = None
        for part, offset in parts:
            with av.open(str(part)) as source:
                stream = source.streams.video[0]
                track = track or target.add_stream_from_template(stream)
                shift = round(offset / stream.time_base) - (stream.start_time or 0)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.dts, packet.pts = packet.dts + shift, packet.pts + shift
                        packet.stream = track
                        target.mux(packet)
    output = play(path)
    assert {picture.shape for picture in output.pictures} == {(48, 80, 3)}
    assert [read_number(picture) for picture in output.pictures] == [*range(0, 30, 2)] * 2


def test_high_dynamic_range_does_not_fail(tmp_path):
    path = Kind(
        "hdr", frames=10,
        video=("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params",
               "log-level=0:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"),
    ).make(tmp_path)  # fmt: skip
    output = play(path)
    assert len(output.pictures) == 5


def test_of_several_sound_tracks_the_default_one_is_heard(tmp_path):
    video = Kind("video", audio=()).make(tmp_path)
    path = tmp_path / "tracks.mkv"
    ffmpeg("-i", video, "-f", "lavfi", "-i", "anullsrc=r=48000", "-f", "lavfi", "-i", "sine=f=500", "-map", 0,
           "-map", 1, "-map", 2, "-c:v", "copy", "-c:a", "libopus", "-shortest", "-disposition:a:0", 0,
           "-disposition:a:1", "default", path)  # fmt: skip
    output = play(path)
    assert np.abs(output.audio.astype(int)).mean() > 500


def test_a_steady_tone_has_no_gap_or_click_at_chunk_borders(tmp_path):
    path = tmp_path / "tone.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=160x96:r=30000/1001:d=7", "-f", "lavfi", "-i",
           "sine=f=440:r=48000:d=7", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "flac", "-strict", -2,
           path)  # fmt: skip
    audio = play(path).audio[:, 0].astype(float)
    # A sine of w radians a sample obeys x[n+1] = 2 cos(w) x[n] - x[n-1]; a click or a gap does not.
    steady = audio[1000 : 6 * 48_000]
    w = 2 * np.pi * 440 / 48_000
    assert np.abs(steady[2:] - 2 * np.cos(w) * steady[1:-1] + steady[:-2]).max() < 5
