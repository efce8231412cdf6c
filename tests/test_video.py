"""Video files of every kind: each frame at its time, the sound in step, damage and absurd headers survived."""

import math
import os
import re
import struct
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from videos import (
    Kind,
    Output,
    assert_colours,
    beep_onsets,
    ffmpeg,
    numbered_picture,
    play,
    read_chunks,
    read_number,
    write_chunks,
)

import video

F = Fraction
ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "cases"
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
# What cameras, recorders and television make, see also `CASES`.
INTERLACED = ("-flags", "+ildct+ilme", "-vf")


def hdr(transfer: str) -> tuple[object, ...]:
    """HEVC with paper white at 203 cd/m², as BT.2408 recommends."""
    convert = f"zscale=npl=203:tin=bt709:pin=bt709:min=gbr:rin=pc:t={transfer}:p=bt2020:m=2020_ncl:r=tv"
    tags = f"log-level=0:colorprim=bt2020:colormatrix=bt2020nc:transfer={transfer}"
    return "-vf", f"format=gbrp,{convert},format=yuv420p10le", "-c:v", "libx265", "-x265-params", tags


KINDS += [
    Kind("dvd", "mpg", rate=F(25), video=("-c:v", "mpeg2video", "-q:v", 3, *INTERLACED, "setfield=tff"),
         audio=("-c:a", "mp2")),
    Kind("television", "ts", rate=F(30000, 1001), audio=("-c:a", "mp2"),
         video=("-c:v", "mpeg2video", "-q:v", 3, "-bf", 2, *INTERLACED, "setfield=bff")),
    Kind("interlaced_prores", "mov", frames=30, audio=NO_AUDIO,
         video=("-c:v", "prores_ks", *INTERLACED, "setfield=tff")),
    Kind("interlaced_ffv1", "mkv", frames=30, audio=NO_AUDIO, video=("-c:v", "ffv1", *INTERLACED, "setfield=bff")),
    Kind("interlaced_h264", "ts", rate=F(25), video=(*X264, "-x264-params", "fake-interlaced=1:bff=1")),
    Kind("dv_tape", "dv", rate=F(25), frames=15, size=(720, 576), output_size=(384, 288),
         video=("-c:v", "dvvideo", "-pix_fmt", "yuv420p", "-aspect", "4:3"), audio=("-ar", 48000, "-ac", 2)),
    Kind("h264_b_frames_avi", "avi", video=(*X264, "-bf", 3, "-g", 12), audio=("-c:a", "pcm_s16le")),
    Kind("h264_open_gop_avi", "avi", video=(*X264, "-bf", 2, "-g", 12, "-x264-params", "open-gop=1"), audio=NO_AUDIO),
    Kind("mpeg4_b_frames_avi", "avi", video=("-c:v", "mpeg4", "-bf", 2, "-g", 12, "-q:v", 3), audio=NO_AUDIO),
    Kind("raw_h264_b_frames", "h264", rate=F(25), audio=NO_AUDIO, video=(*X264, "-bf", 2, "-g", 12)),
    Kind("raw_hevc", "hevc", rate=F(25), audio=NO_AUDIO,
         video=("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "log-level=0:keyint=20")),
    # The clock of a transport stream has 33 bits: it starts anew after 95443.7 seconds.
    Kind("clock_wraps", "ts", video=(*X264, "-g", 15), muxer=("-output_ts_offset", 95_441.5)),
    Kind("clock_wraps_before_picture", "ts", audio=("-c:a", "aac"), beep_shift=-0.5,
         after=("-itsoffset", 0.5, "-i", "IN", "-i", "IN", *BOTH, "-output_ts_offset", 95_440.5)),
    Kind("untagged_hd", size=(1280, 720), frames=20, video=(*X264, "-preset", "ultrafast", "-vf",
         "scale=out_color_matrix=bt709")),
    Kind("hlg", "mov", frames=20, audio=NO_AUDIO, video=hdr("arib-std-b67"), colour_tolerance=35),
    Kind("pq", "mkv", frames=20, audio=NO_AUDIO, video=hdr("smpte2084"), colour_tolerance=35),
]  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}


class Case(NamedTuple):
    """A file in `cases/`, which were made after public bug reports."""

    numbers: Sequence[int] | None  # of its pictures, at its own rate; None if they cannot be read
    beeps: Sequence[float] | None = None  # in seconds; None without sound


DROPPED = [n - (n % 10 - 2) * (n % 10 in (3, 4)) for n in range(60)]
CASES = {
    "avi_dropped_frames.avi": Case(DROPPED),
    "avi_no_index.avi": Case(range(60)),
    "edit_midgop.mp4": Case([*range(45, 106), 105, 107], [0.5, 1.5]),
    "epoch_timestamps.mp4": Case([0, *range(20), *range(21, 95)], [0, 1, 2, 3]),
    "fake_interlaced.mp4": Case(range(95)),
    "flv_jump.flv": Case(range(95), [0, 1, 2, 3]),
    "hlg_bt2020.mov": Case(range(20)),
    "interlaced_mbaff.mp4": Case([0, *range(3, 60, 2)]),
    "iphone_apac.mov": Case(range(60), [0, 1]),
    "last_chunk_one_frame.mp4": Case(range(122), [0, 1, 2, 3, 4]),
    "late_stream.ts": Case(None),
    "mirrored.mp4": Case(range(30), [0]),
    "mjpeg_pixfmt_change.avi": Case(range(60)),
    "sei_rotation.ts": Case(None),
    "thumbnails_first.mov": Case(range(120)),
    "ts_restart.ts": Case(range(120), [0, 1, 2, 3]),
    "unknown_first_track.mov": Case(range(60)),
    "untagged_hd_colour.mp4": Case(None),
    "zero_durations.mp4": Case(range(60)),
}


@pytest.fixture(scope="module")
def file_of(tmp_path_factory) -> Callable[[str], Path]:
    """A function that returns the file of a kind, which is made only once, or of a case."""

    @cache
    def path(name: str) -> Path:
        return FOLDER / name if name in CASES else BY_NAME[name].make(tmp_path_factory.mktemp("kind"))

    return path


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
def test_every_frame_is_shown_at_its_time_with_its_sound(name, file_of):
    kind, path = BY_NAME[name], file_of(name)
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


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_once_played_wrong_plays_right(name, file_of):
    path, case = file_of(name), CASES[name]
    output = play(path, F(1), 1)
    start = len(output.pictures) * 2 // 3
    rest = play(path, F(1), 1, start)
    assert len(rest.pictures) == len(output.pictures) - start
    assert {picture.shape for picture in output.pictures + rest.pictures} == {output.pictures[0].shape}
    if case.numbers:
        assert numbers(output) == list(case.numbers)
        assert numbers(rest) == numbers(output)[start:]
    tolerance = 0.04  # of AAC's frames and of the container's milliseconds
    if case.beeps:
        assert beep_onsets(output.audio, 48_000) == pytest.approx(case.beeps, abs=tolerance)
        assert beep_onsets(rest.audio, 48_000) == pytest.approx(
            beep_onsets(sound_from(output, start), 48_000), abs=0.005
        )
    else:
        assert not len(output.audio)
    info = video.read_video_info(path)
    is_missing = info.expected_seconds > info.duration_seconds + 0.05
    assert is_missing == (name == "flv_jump.flv")


@pytest.mark.parametrize("name", ["zero_durations.mp4", "ts_restart.ts", "flv_jump.flv", "h264_b_frames_avi"])
def test_every_frame_has_its_own_number_for_the_detections(name, file_of):
    info = video.read_video_info(file_of(name))
    for start in (0, len(info.pts_seconds) // 2):
        frames = list(video.sample_frames(info, info.fps, F(1), start))
        assert [frame.source_index for frame in frames] == list(range(start, len(info.pts_seconds)))
        assert [read_number(frame.image) for frame in frames] == [frame.source_index for frame in frames]


@pytest.mark.parametrize("name", [*BY_NAME, *CASES])
def test_the_two_readers_agree(name, file_of, monkeypatch):
    """Each alone, from the start and from mid-video. Where OpenCV is not right, PyAV is the only one."""
    info = video.read_video_info(file_of(name))
    readings = {}
    for reader, other in (("opencv", "_pyav_frames"), ("pyav", "_opencv_frames")):
        with monkeypatch.context() as patch:
            patch.setattr(video, other, lambda *_: iter(()))
            if reader == "pyav" or info.is_for_opencv:
                readings[reader] = list(video.sample_frames(info, info.fps, F(1, 2)))
    start = len(readings["pyav"]) * 2 // 3
    readings["pyav from the middle"] = list(video.sample_frames(info, info.fps, F(1, 2), start))
    wanted = readings.pop("pyav")
    assert len(readings["pyav from the middle"]) == len(wanted) - start
    by_number = {frame.source_index: frame for frame in wanted}
    for reader, frames in readings.items():
        assert len(frames) > 0.6 * len(wanted) - start or name == "late_stream.ts", f"{reader} gives up"
        for frame in frames:
            same = by_number[frame.source_index]
            assert (frame.pts_seconds, frame.source_size) == (same.pts_seconds, same.source_size), reader
            difference = np.abs(frame.image.astype(int) - same.image).mean()
            assert difference < 2, f"{reader}, frame {frame.source_index}: {difference:.1f} levels"


def ffmpeg_reading(path: Path, size: tuple[int, int], filters: str) -> list[np.ndarray]:
    """The pictures of the main video track, RGB, as the `ffmpeg` command shows them, without any code of ours."""
    command = ["ffmpeg", "-v", "error", "-nostdin", "-i", path, "-an", "-vf",
               f"setpts=PTS-STARTPTS,{filters}scale={size[0]}:{size[1]}:flags=area", "-fps_mode", "passthrough",
               "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]  # fmt: skip
    data = subprocess.run(command, capture_output=True, check=False).stdout
    return list(np.frombuffer(data, np.uint8).reshape(-1, size[1], size[0], 3))


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """In decibels, of slightly blurred pictures."""
    blurred, other = (cv2.GaussianBlur(image, (5, 5), 1.2).astype(float) for image in (picture, other))
    return 20 * np.log10(255 / max(1e-3, np.sqrt(((blurred - other) ** 2).mean())))


FFMPEG_IS_WRONG = {
    "zero_durations.mp4",  # all frames are one
    "flv_jump.flv",  # the first frame for an hour
    "sei_rotation.ts",  # the orientation is lost after the key frame
    "late_stream.ts",  # as before
    "mjpeg_pixfmt_change.avi",  # a frame is lost at each change
    "unknown_first_track.mov",  # the track is chosen that cannot be decoded
}
TO_SDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p,"
)


@pytest.mark.parametrize("name", sorted({*BY_NAME, *CASES} - FFMPEG_IS_WRONG))
def test_the_ffmpeg_command_shows_the_same(name, file_of):
    """Five moments, the length and the loudness of the sound."""
    path = file_of(name)
    info = video.read_video_info(path)
    output = play(path, F(1, 2), 1)
    height, width = output.pictures[0].shape[:2]
    filters = f"fps={info.fps}," + (TO_SDR if name in ("hlg", "pq", "hlg_bt2020.mov") else "")
    shown = ffmpeg_reading(path, (width, height), filters)
    assert len(output.pictures) == pytest.approx(len(shown), abs=2)
    for place in (0, 0.2, 0.45, 0.7, 0.95):
        index = int(place * len(output.pictures))
        # FFmpeg may round a time in the middle between two frames to the other one.
        near = shown[max(0, index - 1) : index + 2]
        assert max(psnr(output.pictures[index], picture) for picture in near) > 20, f"at {place:.0%}"
    if info.audio_channels:
        layout = video.AUDIO_LAYOUTS[info.audio_channels]
        command = ["ffmpeg", "-v", "error", "-nostdin", "-i", path, "-map", "0:a:0", "-f", "s16le",
                   "-ar", "48000", "-ch_layout", layout, "-"]  # fmt: skip
        heard = np.frombuffer(subprocess.run(command, capture_output=True, check=False).stdout, "<i2")
        loudness = [
            np.sqrt(np.square(part[abs(part) > 3000]).mean()) for part in (output.audio.astype(float), heard * 1.0)
        ]
        assert loudness[0] == pytest.approx(loudness[1], rel=0.15)


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


# ------------------------------------------------------------------------------------------ what cameras really record


def concatenated(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def cut(path: Path, whole: Path, first: int, last: int, *options: object) -> Path:
    """The frames from `first` to `last` of a video at 30 frames per second, with their sound, as a new recording."""
    ffmpeg("-i", whole, "-vf", f"trim=start_frame={first}:end_frame={last},setpts=PTS-STARTPTS", "-af",
           f"atrim={first / 30}:{last / 30},asetpts=PTS-STARTPTS", *X264, "-g", 20, "-c:a", "aac", *options,
           path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Path:
    """Numbers and beeps without loss, for `cut`."""
    lossless = Kind("master", "mkv", frames=240, video=("-c:v", "ffv1"), audio=("-c:a", "pcm_s16le"))
    return lossless.make(tmp_path_factory.mktemp("master"))


def assert_plays_as_one(path: Path, frames: int) -> None:
    output = play(path, F(1), 1)
    assert numbers(output) == list(range(frames))
    beeps = [*range(math.ceil(frames / 30))]
    assert beep_onsets(output.audio, 48_000) == pytest.approx(beeps, abs=0.04)
    start = frames * 2 // 3
    rest = play(path, F(1), 1, start)
    assert numbers(rest) == list(range(start, frames))
    expected = beep_onsets(sound_from(output, start), 48_000)
    assert beep_onsets(rest.audio, 48_000) == pytest.approx(expected, abs=0.005)
    info = video.read_video_info(path)
    assert info.expected_seconds == pytest.approx(info.duration_seconds, abs=0.05), "nothing is missing"


@pytest.mark.parametrize("offsets", [(1000, 3, 50_000), (0, 0, 0), (10, 95_442, 40), (5, 300, 600)], ids=str)
@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_recordings_that_were_joined_with_cat_play_as_one(suffix, offsets, master, tmp_path):
    codec = ("-c:v", "mpeg2video", "-q:v", 3, "-c:a", "mp2") if suffix == "mpg" else ()
    parts = [
        cut(tmp_path / f"{first}.{suffix}", master, first, last, *codec, "-output_ts_offset", offset)
        for first, last, offset in zip((0, 90, 150), (90, 150, 240), offsets, strict=True)
    ]
    assert_plays_as_one(concatenated(tmp_path / f"joined.{suffix}", *parts), 240)


@pytest.mark.parametrize("audio", [True, False], ids=["sound", "silent"])
@pytest.mark.parametrize(("after", "jump"), [(0, 3600), (1.5, 600), (2.5, 20)], ids=str)
def test_a_live_recording_whose_clock_jumps_has_no_hour_of_stills(after, jump, audio, tmp_path):
    kind = Kind("steady", "flv", frames=95, audio=("-c:a", "libmp3lame", "-ar", 44100) if audio else NO_AUDIO)
    path = tmp_path / "jumps.flv"
    with av.open(str(kind.make(tmp_path))) as source, av.open(str(path), "w") as target:
        tracks = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                shift = round(jump / packet.time_base) if packet.dts * packet.time_base > after else 0
                packet.dts, packet.pts = packet.dts + shift, packet.pts + shift
                packet.stream = tracks[packet.stream.index]
                target.mux(packet)
    output = play(path, F(1), 1)
    shown = numbers(output)
    assert sorted({*shown}) == list(range(95)) and len(shown) <= 96
    assert numbers(play(path, F(1), 1, 70)) == shown[70:]
    assert beep_onsets(output.audio, 48_000) == pytest.approx([0, 1, 2, 3] if audio else [], abs=0.06)
    lost_seconds = video.read_video_info(path).expected_seconds - output.seconds
    assert lost_seconds == pytest.approx(jump, abs=0.2), "a warning says that something is missing"


def test_a_still_that_is_shown_for_minutes_is_no_jump(tmp_path):
    path = Kind("slides", "mkv", times=[0, 0.04, 0.08, 200], last_seconds=1, audio=NO_AUDIO).make(tmp_path)
    assert video.read_video_info(path).duration_seconds == pytest.approx(200, abs=1)


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_a_video_that_becomes_interlaced_in_the_middle_has_no_old_or_black_picture(suffix, master, tmp_path):
    codec = ("-c:v", "mpeg2video", "-q:v", 3) if suffix == "mpg" else ()
    flags = ("-flags", "+ildct+ilme", "-top", 1) if suffix == "mpg" else ("-x264-params", "fake-interlaced=1:tff=1")
    at = "-output_ts_offset"
    first = cut(tmp_path / f"first.{suffix}", master, 0, 50, *codec, "-an", at, 10)
    second = cut(tmp_path / f"second.{suffix}", master, 50, 120, *codec, *flags, "-an", at, 10 + 50 / 30)
    path = concatenated(tmp_path / f"both.{suffix}", first, second)
    assert numbers(play(path, F(1), 1))[:100] == list(range(100))
    assert numbers(play(path))[:50] == list(range(0, 100, 2))


def test_combs_of_a_moving_edge_are_gone(tmp_path):
    """A bar moves by 8 pixels from field to field; both fields of a frame show it at different places."""
    path = tmp_path / "bar.ts"
    ffmpeg("-f", "lavfi", "-i", "color=black:s=320x240:r=50:d=1", "-f", "lavfi", "-i", "color=white:s=40x240:r=50:d=1",
           "-filter_complex", "overlay=x=8*n:shortest=1,tinterlace=interleave_top,fieldorder=tff", "-c:v", "libx264",
           "-pix_fmt", "yuv420p", "-x264-params", "tff=1", path)  # fmt: skip
    info = video.read_video_info(path)
    for frame in video.sample_frames(info, info.fps, F(1)):
        lines = frame.image[100:140, :, 1].astype(int)
        assert np.abs(np.diff(lines, axis=0)).mean() < 2, "neighbouring lines show the same moment"


# What the display matrix says (a, b, c and d of x' = ax + cy, y' = bx + dy), and the same the other way by ffmpeg.
MIRRORS = {
    "as it is": ((1, 0, 0, 1), "null"),
    "left for right": ((-1, 0, 0, 1), "hflip"),
    "upside down": ((1, 0, 0, -1), "vflip"),
    "turned by 180": ((-1, 0, 0, -1), "hflip,vflip"),
    "turned by 90": ((0, 1, -1, 0), "transpose=cclock"),
    "turned by 270": ((0, -1, 1, 0), "transpose=clock"),
    "transposed": ((0, 1, 1, 0), "transpose=cclock_flip"),
    "transposed the other way": ((0, -1, -1, 0), "transpose=clock_flip"),
}


@pytest.mark.parametrize("disabled", ["_pyav_frames", "_opencv_frames"])
@pytest.mark.parametrize("name", MIRRORS)
def test_each_of_the_eight_orientations_stands_upright_with_either_reader(name, disabled, tmp_path, monkeypatch):
    (a, b, c, d), undo = MIRRORS[name]
    path, stored = tmp_path / "sideways.mp4", tmp_path / "stored.mp4"
    ffmpeg("-i", Kind("plain", frames=10).make(tmp_path), "-vf", undo, *X264, stored)
    matrix = struct.pack(">9i", *(65_536 * n for n in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    data = stored.read_bytes()
    place = data.index(b"tkhd") + 4 + 40
    path.write_bytes(data[:place] + matrix + data[place + 36 :])
    monkeypatch.setattr(video, disabled, lambda *_: iter(()))
    output = play(path)
    assert {picture.shape for picture in output.pictures} == {(48, 80, 3)}
    assert numbers(output) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "parts", [[(2, 48_000), (6, 48_000), (2, 48_000)], [(2, 48_000), (1, 32_000), (2, 44_100)]], ids=str
)
@pytest.mark.parametrize("start", [0, 60])
def test_sound_that_changes_its_channels_or_its_rate_goes_on(parts, start, master, tmp_path):
    pieces = []
    for number, (channels, rate) in enumerate(parts):
        first, layout = number * 60, {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        pan = f"|pan={layout}|" + "|".join(f"c{channel}=c0" for channel in range(channels))
        options = ("-c:a", "ac3", "-ar", rate, "-output_ts_offset", 10 + first / 30)
        whole = tmp_path / f"{number}.mkv"
        ffmpeg(
            "-i", master, "-c:v", "copy", "-c:a", "pcm_s16le", "-af", f"aresample{pan}".replace("|pan", ",pan"), whole
        )
        pieces.append(cut(tmp_path / f"{number}.ts", whole, first, first + 60, *options))
    output = play(concatenated(tmp_path / "television.ts", *pieces), F(1), 1, start)
    assert numbers(output) == list(range(start, 180))
    heard = beep_onsets(output.audio, 48_000)
    assert heard == pytest.approx(range(6 - start // 30), abs=0.04)


def test_sound_that_cannot_be_decoded_in_the_middle_is_silent_there_and_goes_on(tmp_path):
    path = Kind("damaged", "ts", frames=240).make(tmp_path)
    with av.open(str(path)) as container:
        places = [
            packet.pos for packet in container.demux(audio=0) if packet.pos and 2.5 < packet.pts / 90_000 - 1.4 < 4.5
        ]
    data = bytearray(path.read_bytes())
    data[places[0] + 20 : places[-1]] = bytes(places[-1] - places[0] - 20)
    path.write_bytes(data)
    heard = beep_onsets(play(path).audio, 48_000)
    assert heard == pytest.approx([0, 1, 2, 5, 6, 7], abs=0.05)


def test_of_two_television_programmes_each_has_its_own_sound(tmp_path):
    path = tmp_path / "programmes.ts"
    parts = [Kind(name, "ts", frames=60, audio=("-c:a", "mp2")).make(tmp_path) for name in ("first", "second")]
    surround = ("-f", "lavfi", "-i", "anullsrc=r=48000:cl=5.1:d=2")
    ffmpeg("-i", parts[0], "-i", parts[1], *surround, "-map", "0:v", "-map", "0:a", "-map", "1:v", "-map", 2,
           "-c", "copy", "-c:a:1", "ac3", "-program", "st=0:st=1", "-program", "st=2:st=3", path)  # fmt: skip
    output = play(path)
    assert numbers(output) == list(range(0, 60, 2))
    assert beep_onsets(output.audio, 48_000) == pytest.approx([0, 1], abs=0.04)


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_video_track_is_shown_and_of_two_the_larger_one(default, tmp_path):
    main, path = Kind("main", frames=60).make(tmp_path), tmp_path / "tracks.mov"
    other = ("-f", "lavfi", "-i", f"color=red:s={'640x480' if default else '64x48'}:r=1:d=2")
    ffmpeg("-i", main, *other, "-map", 1, "-map", "0:v", "-map", "0:a", "-c", "copy", "-c:v:0", "mjpeg",
           "-disposition:v:0", 0 if default else "default", "-disposition:v:1", "default", path)  # fmt: skip
    assert numbers(play(path)) == list(range(0, 60, 2))
    assert numbers(play(path, start=20)) == list(range(40, 60, 2))


def test_more_packets_of_sound_than_opencv_waits_for_lose_no_frame(tmp_path):
    audio = ("-c:a", "libopus", "-frame_duration", 2.5)
    path = Kind("many", "mkv", times=[0, 10.5, 21], last_seconds=8, audio=audio).make(tmp_path)
    output = play(path, F(1), 1)
    assert numbers(output) == [0, 1, 2]
    assert beep_onsets(output.audio, 48_000) == pytest.approx(range(29), abs=0.04)


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_bright_skies_of_high_dynamic_range_keep_their_detail(transfer, tmp_path):
    """Steps of brightness from a quarter of paper white to five times as much, brighter than an ordinary screen."""
    steps = np.linspace(0.4, 0.7 if transfer == "smpte2084" else 1, 16)
    picture = np.repeat(np.repeat((steps * 65_535).astype("<u2")[None, :], 64, 0), 16, 1)
    path = tmp_path / "sky.mov"
    tags = f"log-level=0:lossless=1:colorprim=bt2020:colormatrix=bt2020nc:transfer={transfer}"
    ffmpeg("-f", "rawvideo", "-pix_fmt", "gray16le", "-s", "256x64", "-r", 10, "-i", "-", "-c:v", "libx265", "-pix_fmt",
           "yuv420p10le", "-x265-params", tags, path, stdin=picture.tobytes() * 4)  # fmt: skip
    info = video.read_video_info(path)
    for start in (0, 2):
        frame = next(video.sample_frames(info, info.fps, F(1), start))
        shown = frame.image[32, 8::16].astype(int).mean(axis=1)
        assert (np.diff(shown) > 1).all(), f"each step is brighter than the one before: {shown.tolist()}"
        assert shown[0] < 150 and shown[-1] > 245


@pytest.mark.parametrize(
    ("size", "tag", "matrix"),
    [((1280, 720), None, "bt709"), ((720, 1280), None, "bt709"), ((854, 480), None, "bt601"),
     ((1280, 720), "smpte170m", "bt601"), ((854, 480), "bt709", "bt709")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pixels", ["tv", "pc"])
def test_a_file_without_a_colour_tag_has_the_colours_that_players_assume(size, tag, matrix, pixels, tmp_path):
    path, picture = tmp_path / "colour.mp4", np.full((size[1], size[0], 3), (200, 80, 40), np.uint8)
    tags = ("-colorspace", tag) if tag else ()
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", 10, "-i", "-", "-vf",
           f"scale=out_color_matrix={matrix}:out_range={pixels}", *X264, "-preset", "ultrafast", *tags, "-color_range",
           pixels, path, stdin=picture.tobytes() * 2)  # fmt: skip
    with av.open(str(path)) as container:
        assert (container.streams.video[0].codec_context.colorspace == 2) == (tag is None)
    for picture in play(path, F(1), 1).pictures:
        np.testing.assert_allclose(picture.mean(axis=(0, 1)), (200, 80, 40), atol=6)


def bits(*fields: tuple[int, int]) -> str:
    return "".join(f"{value:0{width}b}" for value, width in fields)


def ue(*values: int) -> str:
    """Exp-Golomb codes of H.264."""
    return "".join("0" * (len(f"{value + 1:b}") - 1) + f"{value + 1:b}" for value in values)


def nal(header: int, payload: bytes) -> bytes:
    """A unit of a byte stream, with its emulation prevention."""
    return b"\0\0\0\1" + bytes([header]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", payload)


def from_bits(text: str) -> bytes:
    text += "1" + "0" * (-(len(text) + 1) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def field_coded_h264(frames: int, width: int = 64, height: int = 64) -> bytes:
    """H.264 in which each field is a picture of its own (PAFF), as AVCHD camcorders code it; no encoder at hand does.

    All macroblocks are uncompressed (I_PCM). `height` is a multiple of 32.
    """
    timing = bits((1, 1), (1001, 32), (60_000, 32), (1, 1))  # 29.97 frames of two fields a second
    sps = bits((77, 8), (0, 8), (40, 8)) + ue(0, 0, 2, 2) + "0" + ue(width // 16 - 1, height // 32 - 1)
    sps += "0" + "0" + "1" + "0" + "1" + "0000" + timing + "0" + "0" + "0" + "0"
    pps = ue(0, 0) + "0" + "0" + ue(0, 0, 0) + "0" + "00" + "1" * 3 + "1" + "0" + "0"
    data = nal(0x67, from_bits(sps)) + nal(0x68, from_bits(pps))
    for number in range(frames):
        luma = numbered_picture(number, width, height).mean(axis=-1).astype(np.uint8)
        for bottom in (0, 1):
            lines = luma[bottom::2]
            is_idr = number == 0 and not bottom
            header = ue(0, 7, 0) + bits((number % 16, 4), (1, 1), (bottom, 1))
            header += ue(0) if is_idr else ""
            header += "00" if is_idr else "0"
            header += "1" + ue(1)  # slice_qp_delta 0; no deblocking
            text, payload = header, b""
            for top in range(0, height // 2, 16):
                for left in range(0, width, 16):
                    text += ue(25)
                    text += "0" * (-len(text) % 8)
                    payload += int("1" + text, 2).to_bytes(len(text) // 8 + 1, "big")[1:]
                    payload += lines[top : top + 16, left : left + 16].tobytes() + bytes([128]) * 128
                    text = ""
            data += nal(0x65 if is_idr else 0x61, payload + b"\x80")
    return data


@pytest.mark.parametrize("suffix", ["ts", "mp4", "mkv"])
def test_two_fields_with_a_packet_each_are_one_frame(suffix, tmp_path):
    raw, path = tmp_path / "fields.h264", tmp_path / f"avchd.{suffix}"
    raw.write_bytes(field_coded_h264(31))
    ffmpeg("-r", "60000/1001", "-i", raw, "-c", "copy", path)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 62, "the file is what the test is about"
    info = video.read_video_info(path)
    assert (info.fps, len(info.pts_seconds)) == (F(30000, 1001), 31)
    frames = list(video.sample_frames(info, info.fps, F(1)))
    assert [frame.source_index for frame in frames] == [read_number(frame.image) for frame in frames] == [*range(31)]


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


def make_heic(path: Path) -> None:
    path.write_bytes((FOLDER / "photo.heic").read_bytes())


def make_avif(path: Path) -> None:
    path.write_bytes((FOLDER / "photo.avif").read_bytes())


def make_animated_avif(path: Path) -> None:
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
    pictures[0].save(path, "avif", save_all=True, append_images=pictures[1:])


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
    (make_heic, "This file is incomplete or not a video."),
    (make_avif, "This file is incomplete or not a video."),
    (make_animated_avif, "This file is incomplete or not a video."),
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


@pytest.mark.usefixtures("no_cached_files")
def test_a_few_fast_frames_do_not_make_millions_of_frames_of_a_still(tmp_path, monkeypatch):
    """A file of 2 KB: 480 frames a second for four hours would take a day."""
    times = [*(n * 0.002 for n in range(8)), 3 * 3600 + 59 * 60 + 50]
    path = Kind("bomb", "mkv", times=times, last_seconds=1, audio=NO_AUDIO).make(tmp_path)
    info = video.read_video_info(path)
    assert info.duration_seconds * info.fps < 500_000
    video._read_packets.cache_clear()
    monkeypatch.setattr(video, "MAX_FRAMES", 100_000)
    assert_refused(path, "This video has more than 100,000 frames.")


@pytest.mark.parametrize(("rate", "frames"), [(240, 6), (120, 20), (60, 4)])
def test_a_short_recording_keeps_its_high_rate(rate, frames, tmp_path):
    path = Kind("short", rate=F(rate), frames=frames, audio=NO_AUDIO).make(tmp_path)
    assert video.read_video_info(path).fps == rate


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "upload.mp4"
    Kind("short", frames=10).make(tmp_path).rename(path)
    os.utime(path, (0, 0))
    assert video.read_video_info(path) is video.read_video_info(path)
    Kind("long", frames=40).make(tmp_path).rename(path)
    assert len(play(path).pictures) == 20


# ------------------------------------------------------------------------------------------------------------ chunks


def test_a_chunk_is_finished_by_its_block_and_removed_by_an_error(tmp_path):
    picture = np.zeros((48, 80, 3), np.uint8)
    with video.ChunkWriter(str(tmp_path), (80, 48), F(30), 0) as writer:
        writer.write(picture)
    assert len(read_chunks([writer.path]).pictures) == 1
    with pytest.raises(KeyError), video.ChunkWriter(str(tmp_path), (80, 48), F(30), 0) as failed:
        failed.write(picture)
        raise KeyError
    assert list(tmp_path.iterdir()) == [Path(writer.path)]


def test_a_chunk_that_cannot_be_finished_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(video.ChunkWriter, "close", lambda self: os.close(-1))  # as on a full disk
    with pytest.raises(OSError), video.ChunkWriter(str(tmp_path), (80, 48), F(30), 0) as writer:
        writer.write(np.zeros((48, 80, 3), np.uint8))
    assert not list(tmp_path.iterdir())


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
