"""Whatever ffmpeg can decode plays right: every frame at its time, the sound in step with it."""

from bisect import bisect_right
from fractions import Fraction

import numpy as np
import pytest
from videos import Kind, assert_colours, beep_onsets, play, read_number

import app

F = Fraction
X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
NO_AUDIO = ()
BOTH = ("-map", "0:v", "-map", "1:a", "-c", "copy")  # the picture of the first input, the sound of the second
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
    Kind("h264_444", video=("-c:v", "libx264", "-pix_fmt", "yuv444p")),
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
    Kind("odd_size", size=(271, 135), video=("-c:v", "libx264", "-pix_fmt", "yuv444p"), output_size=(136, 68)),
    Kind("large_8k", size=(7680, 4320), frames=3, video=(*X264, "-preset", "ultrafast"), output_size=(3840, 2160)),
    Kind("wide_pixels", video=(*X264, "-aspect", "16:9"), size=(120, 96), output_size=(86, 48)),
    Kind("tall_pixels", video=(*X264, "-aspect", "4:3"), size=(192, 96), output_size=(64, 48)),
]  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}


def assert_each_picture_is_at_its_time(output, times, source_fps):
    """Output frame i has to be what the source shows at that moment, give or take half a source frame."""
    tolerance = float(1 / (2 * source_fps)) + 0.002
    for i, picture in enumerate(output.pictures):
        moment = float(i / output.fps)
        earliest = max(0, bisect_right(times, moment - tolerance) - 1)
        latest = max(0, bisect_right(times, moment + tolerance) - 1)
        number = read_number(picture)
        assert earliest <= number <= latest, f"frame {number} at {moment:.3f} s instead of {earliest} to {latest}"


@pytest.mark.parametrize("name", BY_NAME)
def test_every_frame_is_shown_at_its_time_with_its_sound(name, tmp_path, monkeypatch):
    monkeypatch.setattr(app.gr, "Warning", lambda message: pytest.fail(message))  # none of them is damaged
    kind = BY_NAME[name]
    path = kind.make(tmp_path)
    output = play(path)
    if kind.times is None:
        assert output.fps == kind.rate / 2
    frame_seconds = float(1 / output.fps)
    assert output.seconds == pytest.approx(kind.seconds, abs=frame_seconds)
    assert_each_picture_is_at_its_time(output, kind.shown_at, kind.rate)
    width, height = kind.output_size or (kind.size[0] // 2, kind.size[1] // 2)
    assert output.pictures[0].shape == (height, width, 3)
    for picture in (output.pictures[0], output.pictures[-1]):
        assert_colours(picture, kind.colour_tolerance)

    # A run on a ZeroGPU goes on where the last one was ended: from there all has to be the same.
    start = len(output.pictures) * 2 // 3
    rest = play(path, start=start)
    assert [read_number(p) for p in rest.pictures] == [read_number(p) for p in output.pictures[start:]]
    np.testing.assert_array_equal(rest.audio, output.audio[round(start / output.fps * 48_000) :])

    if not kind.audio:
        assert not len(output.audio)
        return
    assert len(output.audio) == pytest.approx(output.seconds * 48_000, abs=2)
    sound_seconds = min(kind.audio_seconds or kind.seconds, kind.seconds)
    expected = [beep + kind.beep_shift for beep in range(30)]
    expected = [
        beep
        for beep in expected
        if kind.first_beep <= beep < min(output.seconds, sound_seconds + kind.beep_shift) - 0.02
    ]
    heard = [beep for beep in beep_onsets(output.audio, 48_000) if beep > kind.first_beep - 0.5]
    assert heard == pytest.approx(expected, abs=min(frame_seconds, 0.04))


@pytest.mark.parametrize("resolution", app.RESOLUTIONS)
@pytest.mark.parametrize(
    "size",
    [(960, 540), (480, 270), (320, 180), (200, 92), (128, 76), (1170, 2532), (271, 135), (90, 66), (34, 350), (600, 34),
     (16, 16), (24, 20)],
    ids=str,
)  # fmt: skip
def test_every_size_keeps_its_colours_to_the_last_row_and_column(size, resolution, tmp_path):
    path = Kind("size", frames=2, size=size, video=("-c:v", "libx264", "-pix_fmt", "yuv444p"), audio=()).make(tmp_path)
    for picture in play(path, resolution=resolution).pictures:
        assert_colours(picture, 16 if min(picture.shape[:2]) > 16 else 40)
