"""Video files of every kind: each frame at its time, the sound in step, damage and absurd headers survived."""

import math
import os
import struct
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from videos import Kind, Output, assert_colours, beep_onsets, ffmpeg, play, read_chunks, read_number, write_chunks

import video

F = Fraction
ROOT = Path(__file__).parents[1]
X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
YUV444 = ("-c:v", "libx264", "-pix_fmt", "yuv444p")
NO_AUDIO = ()
BOTH = ("-map", "0:v", "-map", "1:a", "-c", "copy")  # video of input 0, sound of input 1
# A screen recording: bursts at 30 fps, stills of 0.4 s and of 2.5 s.
BURSTS = np.cumsum([0] + [1 / 30] * 20 + [0.4] + [1 / 30] * 20 + [2.5] + [1 / 30] * 20).round(3).tolist()
# A phone in changing light: the rate falls from 30 to 24 and 15 fps.
PHONE = np.cumsum([0] + [1 / 30] * 30 + [1 / 24] * 24 + [1 / 15] * 20).round(3).tolist()

KINDS = [
    Kind("h264_30fps"),
    Kind("h264_29.97fps", rate=F(30000, 1001), frames=140),
    Kind("h264_12.5fps", rate=F(25, 2), frames=50),
    Kind("h264_59.94fps_mkv", "mkv", rate=F(60000, 1001), frames=150, audio=("-c:a", "libopus")),
    Kind("h264_b_frames_open_gop", video=(*X264, "-bf", 3, "-g", 12, "-x264-params", "open-gop=1")),
    Kind("h264_no_sound", audio=NO_AUDIO),
    Kind("h264_444", video=YUV444),
    Kind("hevc_10_bit", video=("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=0")),
    Kind("av1_mp4", video=("-c:v", "libsvtav1", "-preset", 10, "-pix_fmt", "yuv420p")),
    Kind("av1_webm", "webm", video=("-c:v", "libaom-av1", "-cpu-used", 8), audio=("-c:a", "libopus")),
    Kind("vp8_webm", "webm", video=("-c:v", "libvpx", "-auto-alt-ref", 1), audio=("-c:a", "libvorbis")),
    Kind("vp9_webm", "webm", video=("-c:v", "libvpx-vp9", "-cpu-used", 8), audio=("-c:a", "libopus")),
    # As a browser's recorder writes it: no duration, no index, a nominal rate of 1000 fps.
    Kind(
        "browser_recording",
        "webm",
        video=("-c:v", "libvpx", "-deadline", "realtime", "-r", 1000, "-fps_mode", "passthrough"),
        audio=("-c:a", "libopus"),
        times=PHONE,
        muxer=("-live", 1),
    ),
    Kind("screen_recording_gaps", times=BURSTS),
    Kind("phone_variable_rate_mkv", "mkv", times=PHONE),
    Kind("last_frame_held", times=[0, 1 / 25, 2 / 25, 3 / 25, 2], audio_seconds=3),
    Kind("mpeg4_avi_mp3", "avi", video=("-c:v", "mpeg4", "-bf", 2, "-q:v", 3), audio=("-c:a", "libmp3lame")),
    Kind("mjpeg_avi_pcm", "avi", video=("-c:v", "mjpeg", "-q:v", 3), audio=("-c:a", "pcm_s16le")),
    Kind("prores_mov", "mov", video=("-c:v", "prores_ks"), audio=("-c:a", "pcm_s24le")),
    Kind("mpeg2_program_stream", "mpg", rate=F(25), video=("-c:v", "mpeg2video", "-q:v", 3), audio=("-c:a", "mp2")),
    Kind("transport_stream", "ts", muxer=("-output_ts_offset", 4321.5)),
    Kind("flv", "flv", audio=("-c:a", "libmp3lame", "-ar", 44100)),
    Kind("wmv", "wmv", video=("-c:v", "wmv2", "-q:v", 3), audio=("-c:a", "wmav2"), first_beep=1),
    Kind("ogg_theora", "ogv", video=("-c:v", "libtheora", "-q:v", 8), audio=("-c:a", "libvorbis")),
    Kind("raw_h264", "h264", rate=F(25), audio=NO_AUDIO, video=(*X264, "-bf", 0)),
    Kind("gif", "gif", rate=F(10), frames=31, audio=NO_AUDIO, video=("-pix_fmt", "rgb8"), colour_tolerance=40),
    Kind("fragmented_mp4", muxer=("-movflags", "frag_keyframe+empty_moov")),
    Kind("slow_motion_240fps", rate=F(240), frames=600),
    Kind("time_lapse_1fps", rate=F(1), frames=7, video=(*X264, "-tune", "stillimage")),
    Kind("one_frame", frames=1),
    Kind("tenth_of_a_second", frames=3),
    Kind("first_timestamp_not_zero", "mkv", muxer=("-output_ts_offset", 7.25)),
    Kind("sound_starts_later", after=("-i", "IN", "-itsoffset", 0.7, "-i", "IN", *BOTH), beep_shift=0.7),
    Kind("sound_starts_earlier", "mkv", after=("-itsoffset", 0.6, "-i", "IN", "-i", "IN", *BOTH), beep_shift=-0.6),
    Kind("sound_shorter", audio_seconds=1.6),
    Kind("sound_longer", audio_seconds=6),
    Kind("sound_8khz_mono", "mkv", audio=("-c:a", "pcm_mulaw", "-ar", 8000)),
    Kind("sound_5.1", audio=("-c:a", "ac3", "-ar", 44100), audio_filter="pan=5.1|c0=c0|c1=c0|c2=c0|c3=c0|c4=c0|c5=c0"),
    Kind("tiny_16x16", size=(16, 16), colour_tolerance=30),
    Kind("odd_size", size=(271, 135), video=YUV444, output_size=(136, 68)),
    Kind("large_8k", size=(7680, 4320), frames=3, video=(*X264, "-preset", "ultrafast"), output_size=(3840, 2160)),
    Kind("wide_pixels", video=(*X264, "-aspect", "16:9"), size=(120, 96), output_size=(86, 48)),
    Kind("tall_pixels", video=(*X264, "-aspect", "4:3"), size=(192, 96), output_size=(64, 48)),
]  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}


# ------------------------------------------------------------------------------------------------ every kind of file


def assert_each_picture_is_at_its_time(output: Output, times: list[float], source_fps: Fraction) -> None:
    """Output frame i is the one that the source shows at that moment, give or take half a source frame."""
    tolerance = float(1 / (2 * source_fps)) + 0.002
    for i, picture in enumerate(output.pictures):
        moment = float(i / output.fps)
        earliest = max(0, bisect_right(times, moment - tolerance) - 1)
        latest = max(0, bisect_right(times, moment + tolerance) - 1)
        number = read_number(picture)
        assert earliest <= number <= latest, f"frame {number} at {moment:.3f} s instead of {earliest} to {latest}"


def assert_each_beep_is_at_its_time(output: Output, kind: Kind) -> None:
    assert len(output.audio) == pytest.approx(output.seconds * 48_000, abs=2)
    end = min(output.seconds, min(kind.audio_seconds or kind.seconds, kind.seconds) + kind.beep_shift)
    expected = [second + kind.beep_shift for second in range(30)]
    expected = [beep for beep in expected if kind.first_beep <= beep < end - 0.02]
    heard = [beep for beep in beep_onsets(output.audio, 48_000) if beep > kind.first_beep - 0.5]
    assert heard == pytest.approx(expected, abs=min(float(1 / output.fps), 0.04))


def numbers(output: Output) -> list[int]:
    return [read_number(picture) for picture in output.pictures]


def sound_from(output: Output, start: int) -> np.ndarray:
    """The sound from the output frame `start` on."""
    return output.audio[round(start / output.fps * 48_000) :]


@pytest.mark.parametrize("name", BY_NAME)
def test_every_frame_is_shown_at_its_time_with_its_sound(name, tmp_path):
    kind = BY_NAME[name]
    path = kind.make(tmp_path)
    output = play(path)
    frame_seconds = float(1 / output.fps)
    if kind.times is None:
        assert (output.fps, len(output.pictures)) == (kind.rate / 2, math.ceil(kind.frames / 2))
    assert output.seconds == pytest.approx(kind.seconds, abs=frame_seconds)
    assert video.read_video_info(path).expected_seconds < output.seconds + 1.5 * frame_seconds, "nothing is missing"
    assert_each_picture_is_at_its_time(output, kind.shown_at, kind.rate)
    width, height = kind.output_size or (kind.size[0] // 2, kind.size[1] // 2)
    assert {picture.shape for picture in output.pictures} == {(height, width, 3)}
    for picture in (output.pictures[0], output.pictures[-1]):
        assert_colours(picture, kind.colour_tolerance)
    if kind.audio:
        assert_each_beep_is_at_its_time(output, kind)
    else:
        assert not len(output.audio)

    # A run on a ZeroGPU continues where the last one ended.
    start = len(output.pictures) * 2 // 3
    rest, uncut_sound = play(path, start=start), sound_from(output, start)
    assert numbers(rest) == numbers(output)[start:]
    assert len(rest.audio) == len(uncut_sound)
    assert beep_onsets(rest.audio, 48_000) == pytest.approx(beep_onsets(uncut_sound, 48_000), abs=0.005)


@pytest.mark.parametrize("name", ["h264_b_frames_open_gop", "transport_stream", "screen_recording_gaps"])
def test_a_run_can_begin_at_any_frame(name, tmp_path):
    path = BY_NAME[name].make(tmp_path)
    info = video.read_video_info(path)
    frames = list(video.sample_frames(info, info.fps / 2, F(1, 2)))
    for start in range(1, len(frames)):
        first = next(video.sample_frames(info, info.fps / 2, F(1, 2), start))
        np.testing.assert_array_equal(first.image, frames[start].image)
        assert first.source_index == frames[start].source_index
        assert first.pts_seconds == pytest.approx(frames[start].pts_seconds, abs=0.001)


def test_after_a_seek_lossless_sound_has_exactly_the_same_samples(tmp_path):
    kind = BY_NAME["prores_mov"]
    path = kind.make(tmp_path)
    output = play(path)
    for start in (1, 7, 16, 29, 30, 40):
        np.testing.assert_array_equal(play(path, start=start).audio, sound_from(output, start))


def test_a_frame_that_is_shown_for_longer_comes_again_with_an_image_of_its_own(tmp_path):
    path = Kind("held", times=[0, 0.04, 0.08, 0.12, 0.16, 1, 1.04, 1.08, 1.12]).make(tmp_path)
    info = video.read_video_info(path)
    frames = list(video.sample_frames(info, info.fps / 2, F(1, 2)))
    assert len(frames) > 12
    assert len({frame.source_index for frame in frames}) < 7
    first, again = [frame for frame in frames if frame.source_index == 4][:2]
    assert (first.image == again.image).all()
    first.image[:] = 0
    assert again.image.any()


def test_of_several_sound_tracks_the_default_one_is_heard(tmp_path):
    silent = Kind("silent", audio=NO_AUDIO).make(tmp_path)
    path = tmp_path / "tracks.mkv"
    ffmpeg("-i", silent, "-f", "lavfi", "-i", "anullsrc=r=48000", "-f", "lavfi", "-i", "sine=f=500", "-map", 0,
           "-map", 1, "-map", 2, "-c:v", "copy", "-c:a", "libopus", "-shortest", "-disposition:a:0", 0,
           "-disposition:a:1", "default", path)  # fmt: skip
    assert np.abs(play(path).audio.astype(int)).mean() > 500


@pytest.mark.parametrize(("layout", "heard"), [("mono", [True]), ("stereo", [True, False]), ("5.1", [True, False])])
def test_mono_stays_mono_and_left_stays_left(layout, heard, tmp_path):
    path = tmp_path / "left.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=160x96:r=30:d=3", "-f", "lavfi", "-i", "sine=f=500:r=48000:d=3",
           "-af", f"pan={layout}|c0=c0", "-c:a", "flac", path)  # fmt: skip
    assert (np.abs(play(path).audio.astype(int)).mean(axis=0) > 100).tolist() == heard


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


# ------------------------------------------------------------------------------------------------- shapes and colours


@pytest.mark.parametrize(("scale", "step"), [(F(1, 2), 2), (F(1), 1)], ids=["half", "full"])
@pytest.mark.parametrize(
    "size",
    [(960, 540), (480, 270), (320, 180), (200, 92), (128, 76), (1170, 2532), (271, 135), (90, 66), (34, 350), (600, 34),
     (16, 16), (24, 20)],
    ids=str,
)  # fmt: skip
def test_every_size_keeps_its_colours_to_the_last_row_and_column(size, scale, step, tmp_path):
    path = Kind("size", frames=2, size=size, video=YUV444, audio=NO_AUDIO).make(tmp_path)
    for picture in play(path, scale, step).pictures:
        assert_colours(picture, 16 if min(picture.shape[:2]) > 16 else 40)


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
def test_colours_are_kept_and_tagged_as_bt601(name, options, tmp_path):
    color = (200, 80, 40)
    matrix = "bt601" if name == "bt601" else "bt709"
    scale = f"scale=out_color_matrix={matrix}:out_range={'full' if name == 'full' else 'tv'}"
    path = tmp_path / "colour.mp4"
    picture = np.full((64, 96, 3), color, np.uint8)
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x64", "-r", 10, "-i", "-", "-vf", scale, *options, path,
           stdin=picture.tobytes() * 10)  # fmt: skip
    (chunk,) = write_chunks(path, tmp_path)
    with av.open(chunk) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (5, 1)
        np.testing.assert_allclose(frame.to_ndarray(format="rgb24")[16, 24], color, atol=6)


def test_high_dynamic_range_does_not_fail(tmp_path):
    hdr = "log-level=0:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    options = ("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", hdr)
    assert len(play(Kind("hdr", frames=10, video=options).make(tmp_path)).pictures) == 5


@pytest.mark.parametrize("disabled", ["_pyav_frames", "_opencv_frames"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize(
    ("size", "pixel_aspect", "output_size"),
    [((96, 160), 1, {90: (48, 80), 180: (48, 80), 270: (48, 80)}),
     ((96, 96), 2, {90: (48, 96), 180: (96, 48), 270: (48, 96)})],
    ids=["square pixels", "wide pixels"],
)  # fmt: skip
def test_a_video_that_was_filmed_sideways_stands_upright_with_either_reader(
    size, pixel_aspect, output_size, degrees, disabled, tmp_path, monkeypatch
):
    """The stored picture is turned, and the metadata say how to turn it back."""
    plain = Kind("plain", frames=10, size=size).make(tmp_path)
    turn = {90: "transpose=2", 180: "hflip,vflip", 270: "transpose=1"}[degrees]
    stored, path = tmp_path / "stored.mp4", tmp_path / "sideways.mp4"
    ffmpeg("-i", plain, "-vf", f"{turn},setsar={pixel_aspect}", "-c:v", "libx264", stored)
    with av.open(str(stored)) as source, av.open(str(path), "w") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        track.set_display_rotation(360 - degrees)  # counter-clockwise
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = track
                target.mux(packet)
    monkeypatch.setattr(video, disabled, lambda *_: iter(()))
    output = play(path)
    assert output.pictures[0].shape == (*output_size[degrees][::-1], 3)
    assert numbers(output) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("start", [0, 4])
def test_raw_video_with_its_last_row_first_stands_upright(start, tmp_path):
    """Windows writes BGR like this. OpenCV 5.0 corrupts the memory of the process when it converts such a frame."""
    raw = ("-c:v", "rawvideo", "-pix_fmt", "bgr24", "-vf", "vflip")
    path = Kind("raw", "avi", frames=20, video=raw, audio=NO_AUDIO).make(tmp_path)
    data = bytearray(path.read_bytes())
    height = data.find(b"strf") + 8 + 8
    assert struct.unpack_from("<i", data, height) == (-96,), "ffmpeg writes the first row first"
    struct.pack_into("<i", data, height, 96)
    path.write_bytes(data)
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:  # a crash must not end the tests
        output = executor.submit(play, path, start=start).result()
    assert numbers(output) == list(range(2 * start, 20, 2))
    for picture in output.pictures:
        assert_colours(picture)


@pytest.mark.parametrize(
    ("size", "pixel_aspect", "output_size"),
    [
        ((1280, 720), "4000", (640, 360)),
        ((320, 240), "4000", (160, 120)),
        ((320, 240), "1/4000", (160, 120)),
        ((320, 240), "3", (480, 120)),
        ((320, 240), "1/3", (54, 120)),
    ],
)
def test_only_pixels_of_an_absurd_shape_count_as_square(size, pixel_aspect, output_size, tmp_path):
    options = ("-c:v", "ffv1", "-vf", f"setsar={pixel_aspect}:max=4000")
    path = Kind("shape", "mkv", frames=4, size=size, video=options, audio=NO_AUDIO).make(tmp_path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == F(pixel_aspect), "the file says so"
    output = play(path)
    assert output.pictures[0].shape == (*output_size[::-1], 3)
    assert numbers(output) == [0, 2]


@pytest.mark.parametrize(("suffix", "codec"), [("ts", ("libx264",)), ("webm", ("libvpx", "-b:v", "2M"))])
def test_a_recording_that_changes_its_size_keeps_the_first_one(suffix, codec, tmp_path):
    """As browsers do when they share a window whose size changes."""
    parts = []
    for name, size, offset in (("small", (160, 96), 0), ("large", (320, 192), 1)):
        options = ("-c:v", *codec, "-pix_fmt", "yuv420p")
        part = Kind(name, suffix, frames=30, size=size, audio=NO_AUDIO, video=options)
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
    whole, second_half = play(path), play(path, start=20)
    assert {picture.shape for picture in whole.pictures + second_half.pictures} == {(48, 80, 3)}
    assert numbers(whole) == [*range(0, 30, 2)] * 2
    assert numbers(second_half) == numbers(whole)[20:]


# ----------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_cut_off_file_plays_as_far_as_it_goes_but_is_expected_to_be_longer(suffix, tmp_path):
    index_first = ("-movflags", "+faststart") if suffix == "mp4" else ()
    path = Kind("cut", suffix, frames=300, video=(*X264, "-g", 30), audio=NO_AUDIO, muxer=index_first).make(tmp_path)
    os.truncate(path, path.stat().st_size * 6 // 10)
    output = play(path)
    assert 4 < output.seconds < 8
    assert numbers(output)[:40] == list(range(0, 80, 2))
    assert video.read_video_info(path).expected_seconds == pytest.approx(10, abs=0.8)


def test_a_file_that_is_damaged_in_the_middle_plays_to_its_end(tmp_path):
    path = Kind("damaged", "ts", frames=300, video=(*X264, "-g", 30)).make(tmp_path)
    data = bytearray(path.read_bytes())
    span = slice(len(data) * 45 // 100, len(data) // 2)
    data[span] = np.random.default_rng(1).bytes(span.stop - span.start)
    path.write_bytes(data)
    output = play(path)
    assert output.seconds == pytest.approx(10, abs=0.1)
    assert read_number(output.pictures[-1]) == 298


@pytest.mark.parametrize("start", [0, 120])
def test_frames_after_a_damaged_part_keep_their_numbers(start, tmp_path):
    path = Kind("damaged", frames=300, video=(*X264, "-g", 30, "-bf", 0), audio=NO_AUDIO).make(tmp_path)
    data = bytearray(path.read_bytes())
    span = slice(len(data) * 45 // 100, len(data) // 2)
    data[span] = np.random.default_rng(1).bytes(span.stop - span.start)
    path.write_bytes(data)
    info = video.read_video_info(path)
    last = list(video.sample_frames(info, info.fps / 2, F(1, 2), start))[-5:]
    assert [frame.source_index for frame in last] == [read_number(frame.image) for frame in last]


def test_a_video_whose_sound_cannot_be_decoded_plays_silently(tmp_path):
    path = Kind("unknown", "mkv").make(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_XYZ"))
    output = play(path)
    assert numbers(output) == list(range(0, 95, 2))
    assert not output.audio.any()


def make_text(path: Path) -> None:
    path.write_text("this is not a video\n" * 50)


def make_empty(path: Path) -> None:
    path.touch()


def make_folder(path: Path) -> None:
    path.mkdir()


def make_nothing(path: Path) -> None:
    pass


def make_picture(path: Path, suffix: str) -> None:
    cv2.imwrite(str(path.with_suffix(suffix)), np.zeros((64, 64, 3), np.uint8))
    path.with_suffix(suffix).rename(path)


def make_png(path: Path) -> None:
    make_picture(path, ".png")


def make_jpeg(path: Path) -> None:
    make_picture(path, ".jpg")


def make_sound_only(path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", path)


def make_sound_with_cover(path: Path) -> None:
    cover = path.with_suffix(".png")
    make_png(cover)
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-i", cover, "-map", 0, "-map", 1, "-c:v", "png",
           "-disposition:v:0", "attached_pic", "-f", "ipod", path)  # fmt: skip


def make_cut_before_its_index(path: Path) -> None:
    whole = Kind("whole").make(path.parent).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def make_undecodable(path: Path) -> None:
    """The packets have timestamps, but no picture."""
    whole = Kind("whole", "avi", frames=20, video=("-c:v", "mjpeg"), audio=NO_AUDIO).make(path.parent)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        for number in range(20):
            packet = av.Packet(bytes(100))
            packet.stream, packet.pts, packet.dts, packet.time_base = track, number, number, F(1, 30)
            target.mux(packet)


def make_playlist(path: Path) -> None:
    example = ROOT / "examples" / "bouncing-shapes.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{example}\n#EXT-X-ENDLIST\n")


NOT_VIDEOS = [
    (make_text, "This file is incomplete or not a video."),
    (make_empty, "This file is empty."),
    (make_folder, "This file is empty."),
    (make_nothing, "This file no longer exists. Please upload it again."),
    (make_png, "This file is incomplete or not a video."),
    (make_jpeg, "This file is incomplete or not a video."),
    (make_sound_only, "This file has no video track."),
    (make_sound_with_cover, "This file has no video track."),
    (make_cut_before_its_index, "This file is incomplete or not a video."),
    (make_undecodable, "No frame of this video can be decoded."),
    (make_playlist, "This file is incomplete or not a video."),
]


def assert_refused(path: Path, sentence: str) -> None:
    """Also the second time, when the file might be cached."""
    for _ in range(2):
        with pytest.raises(video.VideoError) as error:
            play(path)
        assert str(error.value) == sentence


@pytest.mark.parametrize(("make", "sentence"), NOT_VIDEOS)
def test_an_unusable_file_is_refused_with_a_sentence(make: Callable[[Path], None], sentence, tmp_path):
    path = tmp_path / "upload.mp4"
    make(path)
    assert_refused(path, sentence)


@pytest.fixture
def no_cached_files() -> Iterator[None]:
    """The limits apply when a file is read for the first time."""
    video._read_packets.cache_clear()
    yield
    video._read_packets.cache_clear()


@pytest.mark.usefixtures("no_cached_files")
@pytest.mark.parametrize(
    ("limit", "just_enough", "too_low", "sentence"),
    [
        ("MAX_PIXELS", 160 * 96, 160 * 96 - 1, "The frames of this video are too large: 160x96 pixels."),
        ("MAX_SIDE", 160, 159, "The frames of this video are too large: 160x96 pixels."),
        ("MAX_HOURS", 3 / 3600, 2 / 3600, f"This video is longer than {2 / 3600} hours."),
        ("MAX_FRAMES", 75, 74, "This video has more than 74 frames."),
    ],
)
def test_a_video_beyond_a_limit_is_refused_with_a_sentence(
    limit, just_enough, too_low, sentence, tmp_path, monkeypatch
):
    path = Kind("limited", rate=F(25), frames=75, audio=NO_AUDIO).make(tmp_path)
    monkeypatch.setattr(video, limit, just_enough)
    assert len(play(path).pictures) == 38
    video._read_packets.cache_clear()
    monkeypatch.setattr(video, limit, too_low)
    assert_refused(path, sentence)


@pytest.mark.usefixtures("no_cached_files")
def test_wide_pixels_count_towards_the_largest_frame(tmp_path, monkeypatch):
    path = Kind("wide", size=(120, 96), video=(*X264, "-vf", "setsar=2"), audio=NO_AUDIO).make(tmp_path)
    monkeypatch.setattr(video, "MAX_PIXELS", 240 * 96 - 1)
    assert_refused(path, "The frames of this video are too large: 240x96 pixels.")


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "upload.mp4"
    Kind("short", frames=10).make(tmp_path).rename(path)
    os.utime(path, (0, 0))
    assert video.read_video_info(path) is video.read_video_info(path)
    Kind("long", frames=40).make(tmp_path).rename(path)
    assert len(play(path).pictures) == 20


# ----------------------------------------------------------------------------------------------------- joined chunks


@pytest.mark.parametrize(
    "name",
    ["plain", "it's one", "'", 'a "quoted" one', "back\\slash", "a:b", "#1?x=%20%03d", "-y", "видео 🎯", "x; ls"],
)
def test_chunks_are_joined_in_a_folder_with_any_name(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    path = Kind("source", frames=143).make(tmp_path)
    chunks = write_chunks(path, folder)
    assert len(chunks) == 3
    joined = folder / f"{name}-boxes.mp4"
    video.join_chunks(chunks, str(joined))
    assert sorted(folder.iterdir()) == sorted([joined, *map(Path, chunks)]), "nothing else is left in the folder"
    separate, together = read_chunks(chunks), read_chunks([joined])
    np.testing.assert_array_equal(together.pictures, separate.pictures)
    assert together.fps == separate.fps and together.seconds == pytest.approx(separate.seconds, abs=0.001)


def test_joined_chunks_have_their_sound_as_aac_at_its_time(tmp_path):
    chunks = write_chunks(Kind("source", frames=240).make(tmp_path), tmp_path)
    video.join_chunks(chunks, str(tmp_path / "joined.mp4"))
    with av.open(str(tmp_path / "joined.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
    assert_each_beep_is_at_its_time(play(tmp_path / "joined.mp4", F(1), 1), Kind("joined", frames=240))


# -------------------------------------------------------------------------------------------------------- the module


def test_the_module_needs_neither_a_page_nor_a_model():
    code = "import sys, video; print({'app', 'gradio', 'pandas', 'spaces', 'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


FORKS = """
import os, signal, sys, threading
import video

info, is_over = video.read_video_info(sys.argv[1]), threading.Event()

def open_again_and_again():
    while not is_over.is_set():
        next(video.sample_frames(info, info.fps, 1))

threads = [threading.Thread(target=open_again_and_again) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(10):
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends a child that hangs
        next(video.sample_frames(info, info.fps, 1))
        os._exit(0)
    print(os.waitpid(child, 0)[1])
is_over.set()
"""


def test_a_forked_process_can_open_videos_also_if_others_are_being_opened(tmp_path):
    """As on ZeroGPU with several visitors. OpenCV's own lock would stay locked in the child."""
    path = Kind("forked", frames=10, audio=()).make(tmp_path)
    command = [sys.executable, "-c", FORKS, path]
    result = subprocess.run(command, cwd=Path(video.__file__).parent, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["0"] * 10, result.stderr
