"""Reads video files at their exact times, and writes the mp4 chunks that are streamed.

It is independent of the model and the page. Uploads are untrusted: only known containers and local files are opened.
"""

import contextlib
import ctypes
import itertools
import math
import os
import re
import subprocess
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

MAX_PIXELS = 8192 * 4320  # per frame
MAX_SIDE = 16384  # pixels; the encoder's limit
MAX_HOURS = 4
MAX_FRAMES = 1_000_000  # in the file, and in the output
MAX_FPS = 480  # a higher rate, claimed or measured, is a broken clock
MAX_FPS_OF_FEW_FRAMES = 30  # fewer than for half a second, and in less than half of the video
MAX_FIRST_PACKETS = 300  # in which to look for a frame; a recording may begin long before a key frame
MAX_LIVE_GAP_SECONDS = 10  # without any packet; a longer one is a jump of a live recording's clock, as in ffmpeg
MAX_BACKWARD_SECONDS = 0.5  # in a track; more is a jump in every file
MAX_PIXEL_ASPECT = 4  # a more extreme shape of pixels is a broken header
NO_TIME = -(2**63)
UNTAGGED, PQ, HLG = 2, 16, 18  # FFmpeg's numbers: an unknown matrix of YUV, and the transfer functions of HDR
HDR_WHITE = 203  # cd/m², of paper in BT.2408
HDR_KNEE = 0.5  # of white; brighter light is compressed
BT2020_TO_BT709 = np.array([[1.1187, -0.1006, -0.0182], [-0.0083, 1.1329, -0.1246], [-0.0728, -0.5876, 1.6605]])  # BGR
AUDIO_RATE = 48_000  # samples per second in the chunks
AUDIO_LAYOUTS = ("", "mono", "stereo")  # of the chunks, by the number of channels
AUDIO_JUMP_SECONDS = 0.015  # a timestamp this far from the running sample count is a real gap: one lost packet
AUDIO_PREROLL_SECONDS = 1  # decoded and dropped after a seek, until a codec has all that it predicts from

# An upload may be a playlist: without these limits, it could read other files or open connections.
CONTAINERS = (
    "3dostr,amv,apng,asf,av1,avi,dv,f4v,flv,gif,h263,h264,hevc,ivf,m4v,matroska,webm,mjpeg,mov,mp4,mpeg,"
    "mpegts,mpegtsraw,mpegvideo,mxf,nsv,nut,obu,ogg,rm,swf,vc1,vc1test,vvc,wtv,yuv4mpegpipe"
)
DEMUXER_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
_open = partial(av.open, options=DEMUXER_OPTIONS, metadata_errors="replace")
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "|".join(map(";".join, DEMUXER_OPTIONS.items()))
FFMPEG_MAX_ALLOCATION = 128 << 20  # bytes at once; a header of a few bytes may claim an absurd number of frames
if Path("/proc/self/maps").exists():  # Linux; PyAV and OpenCV each bring their own libavutil
    for library in set(re.findall(r"\S*libavutil\S*", Path("/proc/self/maps").read_text())):
        ctypes.CDLL(library).av_max_alloc(ctypes.c_size_t(FFMPEG_MAX_ALLOCATION))


CPU_COUNT = min(cv2.getNumberOfCPUs(), 16)  # OpenCV knows the process's affinity and its container's quota
# OpenCV and x264 take half of the cores each, so that decoding, detecting and encoding do not compete for them.
HELPER_THREADS = max(1, CPU_COUNT // 2)
cv2.setNumThreads(HELPER_THREADS)
# A process that is forked (by ZeroGPU) during a thread's first OpenCV call would never get a lock of OpenCV's.
OPEN_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=OPEN_LOCK.acquire, after_in_parent=OPEN_LOCK.release, after_in_child=OPEN_LOCK.release)


class VideoError(ValueError):
    """The file cannot be processed. The message is a sentence for the person who chose it."""


class VideoInfo(NamedTuple):
    """A video track as its packets and first frames describe it. Times are in seconds from its first frame."""

    path: str
    track: int  # of the video in the file
    audio_track: int | None
    audio_channels: int  # 0 without sound, 1 or 2
    fps: Fraction  # exact, such as 30000/1001
    frame_seconds: float  # 1 / fps
    pts_seconds: np.ndarray  # of each frame, float64, sorted
    start_seconds: float  # time of the first frame on the file's own clock
    duration_seconds: float
    expected_seconds: float  # the duration if nothing is missing: longer if the file is cut off or lost a part
    pixel_aspect: Fraction  # width of a coded pixel, before rotation, divided by its height
    # Where the frames' times come from.
    has_jumps: bool  # within the file, the clock begins anew
    is_counted: bool  # only the order of the frames is known
    delay: int  # of the decoder: how many packets it takes before it returns a frame
    first_seconds: float  # time of the first frame that can be decoded
    key_seconds: np.ndarray  # times of the packets at which decoding can begin, float64, sorted
    # How the frames become upright pictures for an ordinary screen.
    is_for_opencv: bool
    size: tuple[int, int]  # width and height in pixels as coded, before rotation
    orientation: tuple[bool, int, int]  # are the axes swapped? then the directions of rows and columns, 1 or -1
    matrix: str | None  # of YUV, where the file does not name the right one
    transfer: int  # FFmpeg's number of the transfer function, such as `PQ`


def read_video_info(path: str | os.PathLike) -> VideoInfo:
    """Reads the timestamps of a video's packets and decodes its first frame.

    The result is cached until the file changes. Raises `VideoError` if it is not a video or exceeds a limit.
    """
    if not os.path.exists(path):
        raise VideoError("This file no longer exists. Please upload it again.")
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        raise VideoError("This file is empty.")
    try:
        return _read_packets(os.fspath(path), os.path.getmtime(path))
    except av.FFmpegError as error:
        raise VideoError("This file is incomplete or not a video.") from error


@lru_cache(maxsize=8)
def _read_packets(path: str, modified: float) -> VideoInfo:
    with _open(path) as container:
        stream, audio = _choose_tracks(container)
        pixel_aspect = _pixel_aspect(stream)
        repair, packets, frames, delay = ClockRepair(container), array("q"), [], 0
        stream.thread_type = "NONE"  # several threads would need more packets for the first frame
        for packet in _demux(container, stream, audio):
            repair.apply(packet)
            if packet.stream.index != stream.index or not packet.size:
                continue
            is_enough = frames and (len(frames) > 8 or not frames[0].interlaced_frame)
            if len(packets) < 4 * MAX_FIRST_PACKETS and not is_enough:
                delay = delay if frames else len(packets) // 4
                frames += _decode_packet(packet)
            if not packet.is_discard:
                numbers = packet.pts, packet.dts, packet.duration, packet.is_keyframe
                packets.extend(NO_TIME if number is None else number for number in numbers)
            if len(packets) > 4 * MAX_FRAMES:
                raise VideoError(f"This video has more than {MAX_FRAMES:,} frames.")
        if not packets:
            raise VideoError("The video track of this file is empty.")
        ticks, unit, key_ticks, held_ticks, is_counted = _timestamps(container, stream, np.reshape(packets, (-1, 4)))
        header_rate = stream.average_rate if unit == stream.time_base else 1 / unit
        if not is_counted and frames and frames[0].interlaced_frame:
            ticks, packet_ticks = _without_second_fields(ticks, [f.pts for f in frames if f.pts is not None]), ticks
            header_rate = header_rate if len(ticks) == len(packet_ticks) else None  # it is that of the packets
        fps = _frame_rate(ticks, unit, header_rate)
        start_seconds, end_seconds = float(int(ticks[0]) * unit), float(int(ticks[-1]) * unit)
        duration_seconds = end_seconds - start_seconds + float(max(held_ticks * unit, 1 / fps))
        if duration_seconds > MAX_HOURS * 3600:
            raise VideoError(f"This video is longer than {MAX_HOURS} hours.")
        if duration_seconds * fps > MAX_FRAMES + 1:  # in the output, which repeats a frame that is shown for longer
            raise VideoError(f"This video has more than {MAX_FRAMES:,} frames.")
        header_seconds = 0.98 * (_header_end(stream) - max(0.0, start_seconds)) - 0.5  # headers are not exact
        is_timed = bool(frames) and frames[0].pts is not None and not is_counted
        is_for_opencv, orientation, matrix = _look(container, stream, frames, is_timed and not repair.has_jumps)
        return VideoInfo(
            path=path,
            track=stream.index,
            audio_track=audio.index if audio else None,
            audio_channels=min(max(1, audio.channels), 2) if audio else 0,
            fps=fps,
            frame_seconds=float(1 / fps),
            pts_seconds=(ticks - ticks[0]) * float(unit),
            start_seconds=start_seconds,
            duration_seconds=duration_seconds,
            # After a jump, the header's times mean nothing.
            expected_seconds=max(duration_seconds + repair.lost_seconds, 0.0 if repair.has_jumps else header_seconds),
            pixel_aspect=pixel_aspect,
            has_jumps=repair.has_jumps,
            is_counted=is_counted,
            delay=delay,
            first_seconds=float(frames[0].pts * unit) - start_seconds if is_timed else 0.0,
            key_seconds=(np.append(ticks[0], key_ticks) - ticks[0]) * float(unit),
            is_for_opencv=is_for_opencv,
            size=(frames[0].width, frames[0].height) if frames else (stream.width, stream.height),
            orientation=orientation,
            matrix=matrix,
            transfer=stream.codec_context.color_trc,
        )


def _pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width by height of a pixel. Raises a `VideoError` if the frames are too large."""
    width, height, aspect = stream.width, stream.height, stream.sample_aspect_ratio
    if not aspect or not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        aspect = Fraction(1)
    shown_width = round(width * aspect)
    if max(width, shown_width) * height > MAX_PIXELS or max(width, shown_width, height) > MAX_SIDE:
        raise VideoError(f"The frames of this video are too large: {shown_width}x{height} pixels.")
    return aspect


def _header_end(stream: av.VideoStream) -> float:
    """When the video ends, in seconds, or in some containers how long it is, as the header says; 0 if it does not."""
    with contextlib.suppress(KeyError, ValueError):  # Matroska has it as a tag: 00:00:07.300
        hours, minutes, seconds = map(float, stream.metadata["DURATION"].split(":"))
        return hours * 3600 + minutes * 60 + seconds
    return float((stream.duration or 0) * stream.time_base)


def _choose_tracks(container: InputContainer) -> tuple[av.VideoStream, av.AudioStream | None]:
    """The video that players show, and the sound that belongs to it."""
    videos = [s for s in container.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic]
    if not videos:
        raise VideoError("This file has no video track.")
    if any(video.time_base == 1 and video.duration is None for video in videos):
        raise VideoError("This file is incomplete or not a video.")  # a photo, HEIC or AVIF: each tile is a track
    # Some cameras put small thumbnails first.
    video = max(videos, key=lambda s: (Disposition.default in s.disposition, s.width * s.height))
    audio = container.streams.best("audio", related=video)  # of the same television programme
    if audio and not audio.codec_context:  # iPhones record spatial sound, which FFmpeg cannot decode, beside AAC
        playable = [s for s in container.streams.audio if s.codec_context]
        audio = max(playable, key=lambda s: Disposition.default in s.disposition, default=None)
    return video, audio


def _demux(container: InputContainer, *streams: av.stream.Stream | None) -> Iterator[av.Packet]:
    """All packets of these tracks that can be read."""
    # PyAV 18.1 raises an IndexError at the end of a file in which another track has appeared late.
    with contextlib.suppress(av.FFmpegError, IndexError):
        yield from container.demux(*filter(None, streams))


def _decode_packet(packet: av.Packet) -> list[av.frame.Frame]:
    """The frames that a packet completes; none if it is damaged."""
    with contextlib.suppress(av.FFmpegError, ValueError):
        return packet.decode()
    return []


class ClockRepair:
    """Lets the timestamps of a file go on where its clock jumps.

    It does where recordings were joined with `cat`, as dash cams and camcorders do, and in a live recording that begins
    with times of its own before those of the stream. Files of other kinds may have long gaps, in which a picture stays.
    """

    def __init__(self, container: InputContainer):
        self.lost_seconds = 0.0
        self._is_live = container.format.name in ("flv", "mpeg", "mpegts")
        self._is_joinable = container.format.name != "flv"
        # Of each part between two jumps: what is added to its times, and the last of them before that.
        self._shifts, self._latest = [0.0], [math.inf]
        self._tracks: dict[int, tuple[int, float, float]] = {}  # part, last time, and the end with the shift

    @property
    def has_jumps(self) -> bool:
        return len(self._shifts) > 1

    def apply(self, packet: av.Packet) -> None:
        """Corrects the times of a packet. Those of video and sound must all come, in the order of the file."""
        tick, unit, track = packet.pts if packet.dts is None else packet.dts, packet.time_base, packet.stream.index
        if tick is None:
            return
        if self._is_live and packet.pts is not None and abs(packet.pts - tick) * unit > MAX_LIVE_GAP_SECONDS:
            packet.pts = tick + (
                packet.duration or 0
            )  # FFmpeg gives a recording's last frame the time of the next recording
        seconds = float(tick * unit)
        part, last, end = self._tracks.get(track, (0, seconds, None))
        is_ahead = self._is_live and seconds > self._latest[part] + MAX_LIVE_GAP_SECONDS
        if is_ahead or seconds < last - MAX_BACKWARD_SECONDS:
            # The other track may have jumped before.
            if part == len(self._shifts) - 1 or abs(seconds - self._latest[-1]) > MAX_LIVE_GAP_SECONDS:
                if packet.stream.type == "audio" or end is None:
                    end = max(end for _, _, end in self._tracks.values())
                if is_ahead and not self._is_joinable:
                    self.lost_seconds += seconds - self._latest[part]
                self._shifts.append(end - seconds)
                self._latest.append(seconds)
            part = len(self._shifts) - 1
        shift = round(self._shifts[part] / unit)
        step = packet.duration * unit if packet.duration else max(0, seconds - last)
        self._tracks[track] = part, seconds, seconds + float(shift * unit + step)
        self._latest[part] = seconds if self._latest[part] == math.inf else max(seconds, self._latest[part])
        packet.dts = packet.dts if packet.dts is None else packet.dts + shift
        packet.pts = packet.pts if packet.pts is None else packet.pts + shift


def _timestamps(
    container: InputContainer, stream: av.VideoStream, packets: np.ndarray
) -> tuple[np.ndarray, Fraction, np.ndarray, int, bool]:
    """All timestamps (int64, sorted, unique), their unit in seconds, those of key frames, for how many units the last
    frame is held, and whether the frames must be counted, since their own timestamps are wrong.

    Args:
        packets: int64 (packets, 4): `pts`, `dts` and duration, maybe `NO_TIME`, and whether it is a key frame.
    """
    pts, dts, durations, is_key = packets.T
    ticks = np.where(pts == NO_TIME, dts, pts)
    has_time = ticks != NO_TIME
    if len(np.unique(ticks[has_time])) < len(ticks) / 2:  # all are 0, or it is a bare stream without a container
        numbers = np.arange(len(ticks))
        return numbers, 1 / (stream.guessed_rate or Fraction(25)), numbers[is_key > 0], 1, True
    # AVI has no presentation times. FFmpeg makes them up from the others, in the wrong order if there are B-frames.
    is_counted = stream.codec_context.has_b_frames and (container.format.name == "avi" or (pts == dts).all())
    ticks = dts if is_counted else ticks
    # With B-frames, a packet's duration runs to the next one in decoding order. Only the very last one's is real.
    held_ticks = max(0, int(durations[-1])) if ticks[-1] == ticks.max() else 0
    return (
        np.unique(ticks[has_time]),
        stream.time_base,
        np.unique(ticks[has_time & (is_key > 0)]),
        held_ticks,
        is_counted,
    )


def _without_second_fields(ticks: np.ndarray, first_ticks: Sequence[int]) -> np.ndarray:
    """Those of a video's sorted timestamps that are of frames, not of a second field with a packet of its own (PAFF).

    `first_ticks` are the timestamps of some decoded frames.
    """
    step, kept = 0.75 * min(np.diff(np.unique(first_ticks)), default=0), [ticks[0]]
    for tick in ticks:
        if tick > kept[-1] + step:
            kept.append(tick)
    return np.array(kept)


def _frame_rate(ticks: np.ndarray, unit: Fraction, header_rate: Fraction | None) -> Fraction:
    """Frames per second of sorted, unique timestamps. The header's rate counts only if they agree with it: it is exact
    (30000/1001), but may be absurd (90000 in browser recordings) or thinned by long gaps (screen recordings)."""
    rate, steps = header_rate or Fraction(25), np.diff(ticks)
    median = np.median(steps) if len(steps) else 0
    usual_steps = steps[abs(steps - median) < median / 2]
    if len(usual_steps):
        measured = 1 / (Fraction(float(usual_steps.mean())) * unit)
        # A handful of frames that follow each other fast, within hours of stills, would make millions of frames.
        if len(usual_steps) < measured / 2 and usual_steps.sum() < (ticks[-1] - ticks[0]) / 2:
            measured = min(measured, Fraction(MAX_FPS_OF_FEW_FRAMES))
        rate = header_rate if header_rate and abs(header_rate / measured - 1) < 0.1 else measured
    # Containers round 29.97 in their own ways; 30000/1001 is meant.
    for exact in (Fraction(round(rate)), Fraction(round(rate * 1001 / 1000) * 1000, 1001)):
        if exact and abs(rate / exact - 1) < 1e-4:
            rate = exact
    return min(max(rate, Fraction(1, 1001)).limit_denominator(1001), Fraction(MAX_FPS))


def _look(
    container: InputContainer, stream: av.VideoStream, frames: Sequence[av.VideoFrame], has_own_times: bool
) -> tuple[bool, tuple[bool, int, int], str | None]:
    """The reader, orientation and matrix of all frames, by the first one: in H.264, only key frames may have one."""
    codec, orientation, matrix = stream.codec_context, (False, 1, 1), None
    side_data = frames[0].side_data.get("DISPLAYMATRIX") if frames else None
    if side_data:
        a, b, _, c, d, *_ = np.frombuffer(bytes(side_data), "<i4").tolist()  # x' = ax + cy, y' = bx + dy
        is_swapped = abs(b) > abs(a)
        rows, columns = (b, c) if is_swapped else (d, a)
        orientation = is_swapped, -1 if rows < 0 else 1, -1 if columns < 0 else 1
    if codec.colorspace == UNTAGGED and stream.height >= 720 and "yuv" in (codec.pix_fmt or ""):
        matrix = "ITU709"  # players assume it from 720 lines on, and BT.601 below
    # OpenCV reads ordinary files, since it is faster. PyAV reads a file from the first frame on if OpenCV 5.0
    needs_pyav = (
        not frames  # gives up sooner
        or codec.name == "libdav1d"  # cannot decode AV1
        or not has_own_times  # does not know the repaired times
        or len(container.streams.video) > 1  # takes another track
        or frames[0].interlaced_frame  # returns an empty picture
        or codec.color_trc in (PQ, HLG)  # turns highlights into white
        or matrix is not None  # assumes BT.601
        or codec.pix_fmt == "bgr24"  # writes beyond its memory if the last row comes first, as in Windows' AVI files
    )
    return not needs_pyav, orientation, matrix


class Frame(NamedTuple):
    """A frame of the output: `image` is uint8 (height, width, 3) BGR at the output's size."""

    image: np.ndarray
    source_size: tuple[int, int]  # width and height in the source, in pixels, upright
    source_index: int  # number of the frame in the source, from 0
    pts_seconds: float  # from the first frame of the source, never before the last one's


def sample_frames(video: VideoInfo, output_fps: Fraction, scale: Fraction, start: int = 0) -> Iterator[Frame]:
    """Yields the frames of the output: frame i is the one that the source shows at `i / output_fps` seconds.

    Each has its own image, even if the source shows it for longer. Frames that are not needed are decoded, but not
    converted. Ends early where the rest cannot be decoded; raises `VideoError` if no frame can be.

    Args:
        output_fps: Frames per second of the output.
        scale: Width and height of the output relative to the source.
        start: The output frame to begin with.
    """
    pts_seconds = video.pts_seconds
    tolerance = video.frame_seconds / 2  # rounded timestamps (WebM has whole milliseconds) must not pick a neighbour
    end = max(1, math.ceil((video.duration_seconds - tolerance) * output_fps))
    # The number of the source's frame for each of the output's.
    wanted = ((pts_seconds - tolerance) * float(output_fps)).searchsorted(np.arange(start, end), "right") - 1
    is_wanted = np.zeros(len(pts_seconds), bool)
    is_wanted[wanted] = True
    width, height = video.size
    sides = (width * video.pixel_aspect * scale, height * scale)
    size = [max(2, 2 * round(side / 2)) for side in sides]  # even, as H.264's 4:2:0 needs them
    index, shown = start, None
    for number, image in _read_frames(video, int(wanted[0]), is_wanted):
        while shown and index < end and wanted[index - start] < number:
            yield shown._replace(image=_finish(shown.image, size, video))
            index += 1
        if image is not None:
            height, width = image.shape[:2]
            source_size = (height, width) if video.orientation[0] else (width, height)
            shown = Frame(image, source_size, number, float(pts_seconds[number]))
    if shown is None:
        raise VideoError("No frame of this video can be decoded.")
    if pts_seconds[number] < pts_seconds[-1] - 1.5 * video.frame_seconds:  # the rest is missing
        end = max(1, math.ceil((pts_seconds[number] + tolerance) * output_fps))
    for _ in range(index, end):
        yield shown._replace(image=_finish(shown.image, size, video))


def _finish(image: np.ndarray, size: Sequence[int], video: VideoInfo) -> np.ndarray:
    """A coded picture as a new uint8 BGR image: of a size (width and height before rotation), upright."""
    image = cv2.resize(image, size)  # bilinear: at half size, the mean of four pixels
    if image.dtype == np.uint16:
        light, values = _hdr_tables(video.transfer)
        image = cv2.transform(light[image], BT2020_TO_BT709)
        image = values[(image.clip(0, 1) * 65535).astype(np.uint16)]
    is_swapped, rows, columns = video.orientation
    return np.ascontiguousarray((image.swapaxes(0, 1) if is_swapped else image)[::rows, ::columns])


@lru_cache
def _hdr_tables(transfer: int) -> tuple[np.ndarray, np.ndarray]:
    """Two tables: the light, float32 from 0 to 1, of a 16-bit HDR value, and the 8-bit value of 16-bit light.

    The formulas are BT.2100's. Light up to half of paper white stays as it is. What is brighter is compressed, so that
    skies and lamps keep their detail: Reinhard's curve, which makes the brightest light white.
    """
    value = np.linspace(0, 1, 2**16)
    if transfer == PQ:
        root = value ** (32 / 2523)
        light = 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305)
    else:
        scene = np.where(value < 0.5, value**2 / 3, (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = 1000 * scene**1.2
    light /= HDR_WHITE
    excess = np.maximum(light - HDR_KNEE, 0) / (1 - HDR_KNEE)
    light = np.minimum(light, HDR_KNEE) + (1 - HDR_KNEE) * excess * (1 + excess / excess[-1] ** 2) / (1 + excess)
    return light.astype(np.float32), (255 * value ** (1 / 2.4)).round().astype(np.uint8)  # a screen's gamma, BT.1886


def _read_frames(video: VideoInfo, start: int, is_wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
    """The numbers of the frames, rising, from `start` on, and their BGR images as coded, or None for the unwanted ones.

    The images are uint8, for HDR uint16, and are overwritten after the next but one. Where OpenCV gives up (at damaged
    packets, at the first frame that is interlaced), PyAV goes on.
    """
    last = start - 1
    for read in (_opencv_frames, _pyav_frames) if video.is_for_opencv and start == 0 else (_pyav_frames,):
        for number, image in read(video, last + 1, is_wanted):
            if number > last:
                last = number
                yield number, image
        if last == len(is_wanted) - 1:
            return


def _opencv_frames(video: VideoInfo, _start: int, is_wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
    """The frames that OpenCV decodes, from the first one on."""
    with OPEN_LOCK:
        capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG)
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
    zero, image, spare = None, None, None
    while capture.grab():
        # OpenCV counts from the start of the track, or of another one if that is negative.
        seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        zero = seconds - video.first_seconds if zero is None else zero
        number = _number_at(video, seconds - zero)
        if is_wanted[number]:
            _, spare = capture.retrieve(spare)  # into the same memory
            some = slice(None, None, max(1, len(spare) // 16))  # rows are enough, and fast
            if image is not None and np.array_equal(image[some], spare[some]):
                return  # of a frame that is flagged as interlaced, OpenCV 5.0 returns the picture before
            image, spare = spare, image
        yield number, image if is_wanted[number] else None


def _pyav_frames(video: VideoInfo, start: int, is_wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
    """The frames that PyAV decodes, from `start` or some frames before it."""
    convert = VideoReformatter().reformat
    pixels = {"format": "bgr48le" if video.transfer in (PQ, HLG) else "bgr24", "src_colorspace": video.matrix}
    for seconds, frame in _deinterlaced(_decode(video, "video", float(video.pts_seconds[start]))):
        number, image = _number_at(video, seconds), None
        if is_wanted[number]:
            with contextlib.suppress(av.FFmpegError):  # a damaged header may name colours that do not exist
                image = convert(frame, **pixels).to_ndarray()
        yield number, image


def _number_at(video: VideoInfo, seconds: float) -> int:
    """The number of the frame that is shown at this time."""
    return max(0, int(video.pts_seconds.searchsorted(seconds + 1e-4, "right")) - 1)


def _time_of(video: VideoInfo, number: int) -> float:
    """The time of a frame in seconds."""
    return float(video.pts_seconds[min(max(0, number), len(video.pts_seconds) - 1)])


def _deinterlaced(frames: Iterator[tuple[float, av.VideoFrame]]) -> Iterator[tuple[float, av.VideoFrame]]:
    """The same frames with their times. Where they are flagged as interlaced, all their lines are of one moment."""
    for _, alike in itertools.groupby(frames, lambda item: (item[1].width, item[1].height, item[1].format.name)):
        graph = None
        for seconds, frame in alike:
            frame.opaque = seconds
            if frame.interlaced_frame and not graph:
                graph = av.filter.Graph()
                source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
                source += f":colorspace={frame.colorspace}:range={frame.color_range}"
                filters = ("buffer", source), ("bwdif", "mode=send_frame:deint=interlaced"), ("buffersink", None)
                graph.link_nodes(*itertools.starmap(graph.add, filters)).configure()
            yield from _filter(graph, frame) if graph else [(seconds, frame)]
        if graph:
            yield from _filter(graph, None)


def _filter(graph: av.filter.Graph, frame: av.VideoFrame | None) -> Iterator[tuple[float, av.VideoFrame]]:
    """Puts a frame, or the end, into a filter, and yields those that come out."""
    graph.vpush(frame)
    with contextlib.suppress(BlockingIOError, EOFError):  # it waits for the next frame; it has ended
        while True:
            done = graph.vpull()
            yield done.opaque, done


def _decode(video: VideoInfo, kind: str, start_seconds: float) -> Iterator[tuple[float, av.frame.Frame]]:
    """Times in seconds and frames of the "video" or "audio" track, from `start_seconds` or some time before."""
    seconds, has_begun = -video.frame_seconds, not start_seconds
    with _open(video.path) as container:
        stream = container.streams[video.track if kind == "video" else video.audio_track]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", CPU_COUNT
        packets = _packets(video, container, stream, start_seconds)
        for frame in itertools.chain.from_iterable(map(_decode_packet, packets)):
            time = None if frame.time is None else frame.time - video.start_seconds
            if kind == "video" and video.is_counted and frame.dts is not None:
                time = _time_of(video, frame.dts - video.delay)  # a decoder returns the frame whose turn it is
            if not has_begun and (time is None or time > start_seconds + 1e-3):
                break  # the seek went too far, or to an unknown place
            has_begun = True
            seconds = seconds + video.frame_seconds if time is None else time
            yield seconds, frame
    if not has_begun:  # not seekable: from the first frame
        yield from _decode(video, kind, 0.0)


def _packets(
    video: VideoInfo, container: InputContainer, stream: av.stream.Stream, start_seconds: float
) -> Iterator[av.Packet]:
    """A track's packets with repaired times, from those on that the frames after `start_seconds` need."""
    repair, numbers = ClockRepair(container), itertools.count()
    is_counted = video.is_counted and stream.type == "video"
    has_begun = not start_seconds
    if start_seconds and not video.has_jumps and not is_counted:
        has_begun = True
        with contextlib.suppress(av.FFmpegError):
            container.seek(round((video.start_seconds + start_seconds) / stream.time_base), stream=stream)
    elif stream.type == "video":  # a second earlier, since a key frame may come before others that are shown before it
        start_seconds = video.key_seconds[max(0, video.key_seconds.searchsorted(start_seconds - 1) - 1)]
    tracks = (video.track, video.audio_track) if video.has_jumps else (stream.index,)
    for packet in _demux(container, *(container.streams[track] for track in tracks if track is not None)):
        if video.has_jumps:
            repair.apply(packet)
        if packet.stream.index != stream.index:
            continue
        seconds = -math.inf
        if is_counted and packet.size and not packet.is_discard:
            packet.pts, packet.dts = None, next(numbers)
            seconds = _time_of(video, packet.dts)
        elif packet.pts is not None:
            seconds = float(packet.pts * packet.time_base) - video.start_seconds
        has_begun = has_begun or seconds > start_seconds - 1e-3
        if has_begun:
            yield packet


class AudioReader:
    """Reads the chosen sound track piece by piece; silence where it has gaps, has ended or cannot be decoded."""

    def __init__(self, video: VideoInfo, start_seconds: Fraction = Fraction(0)):
        self._position = round(start_seconds * AUDIO_RATE)  # of the next sample
        self._blocks = _audio_blocks(video, float(start_seconds))
        self._channels = video.audio_channels
        self._block = 0, np.zeros((0, self._channels), np.int16)  # the last one that was decoded

    def read_until(self, seconds: Fraction) -> np.ndarray:
        """Returns the samples between the last call's end and `seconds`: int16 (samples, channels) at `AUDIO_RATE`."""
        start, self._position = self._position, round(seconds * AUDIO_RATE)
        sound = np.zeros((self._position - start, self._channels), np.int16)
        for block in itertools.chain([self._block], self._blocks):
            position, samples = self._block = block
            first, last = max(start, position), min(self._position, position + len(samples))
            if first < last:
                sound[first - start : last - start] = samples[first - position : last - position]
            if position + len(samples) > self._position:
                break  # the rest of this block is for the next call
        return sound


def _audio_blocks(video: VideoInfo, start_seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """Positions and samples, int16 (samples, channels), of blocks of sound, from `start_seconds` or some time before.
    A block is at the place of its timestamp, or right after the last one if the difference is only rounding.
    """
    resampler, source = None, None
    position, rounding = round(start_seconds * AUDIO_RATE), 0
    for _, frame in _decode(video, "audio", max(0.0, start_seconds - AUDIO_PREROLL_SECONDS)):
        if source != (frame.format.name, frame.layout.name, frame.sample_rate):  # television goes from 2.0 to 5.1
            source = frame.format.name, frame.layout.name, frame.sample_rate
            resampler = av.AudioResampler(format="s16", layout=AUDIO_LAYOUTS[video.audio_channels], rate=AUDIO_RATE)
        with contextlib.suppress(av.FFmpegError, ValueError):  # damaged sound
            for part in resampler.resample(frame):
                if part.time is not None:
                    timed = round((part.time - video.start_seconds) * AUDIO_RATE)
                    position = timed if abs(timed - position) > rounding else position
                yield position, part.to_ndarray().reshape(-1, video.audio_channels)
                position, rounding = position + part.samples, AUDIO_JUMP_SECONDS * AUDIO_RATE


class ChunkWriter(contextlib.AbstractContextManager):
    """Writes an mp4 file with H.264 video and, if there is sound, FLAC, in `folder` or the temporary folder.

    Leaving the `with` block finishes the file `path` or, after an error, removes it. `size` is width and height in
    pixels, even numbers. Gradio then only remuxes the video. A lossless sound codec keeps exactly the given samples, so
    chunks join without a gap; AAC would add its priming samples to each.
    """

    def __init__(self, folder: str | None, size: tuple[int, int], fps: Fraction, audio_channels: int):
        handle, self.path = tempfile.mkstemp(".mp4", "chunk-", folder)
        os.close(handle)
        self._samples = 0
        self._container = container = av.open(self.path, "w", format="mp4")
        # 25 to 45 % faster than `superfast` at equal quality, for files 10 % larger, 67 % if the video is mostly noise.
        # OpenCV converts BGR to BT.601 in limited range, whatever the source had.
        options = {"preset": "ultrafast", "crf": "24", "threads": str(HELPER_THREADS)}
        options |= {"colorspace": "bt470bg", "color_range": "tv", "color_primaries": "bt709", "color_trc": "bt709"}
        self._video = container.add_stream("libx264", fps, options, width=size[0], height=size[1], pix_fmt="yuv420p")
        layout = AUDIO_LAYOUTS[audio_channels]
        self._audio = container.add_stream("flac", AUDIO_RATE, layout=layout, format="s16") if layout else None

    def write(self, image: np.ndarray) -> None:
        """Adds a frame, uint8 (height, width, 3) BGR."""
        # Not `from_numpy_buffer`: PyAV 18.1 misreads its colour planes unless the height is a multiple of four.
        frame = av.VideoFrame.from_ndarray(cv2.cvtColor(image, cv2.COLOR_BGR2YUV_I420), format="yuv420p")
        frame.duration = 1  # in frames
        self._container.mux(self._video.encode(frame))

    def write_audio(self, samples: np.ndarray) -> None:
        """Adds sound, int16 (samples, channels) at `AUDIO_RATE`."""
        sound = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=self._audio.layout)
        sound.rate, sound.pts = AUDIO_RATE, self._samples
        self._samples += len(samples)
        self._container.mux(self._audio.encode(sound))

    def close(self) -> str:
        """Finishes the file and returns its path."""
        for stream in self._container.streams:
            self._container.mux(stream.encode(None))
        self._container.close()
        return self.path

    def __exit__(self, error_type: type | None, *_: object) -> None:
        is_complete = False
        try:
            if not error_type:
                self.close()
                is_complete = True
        finally:
            if not is_complete:
                with contextlib.suppress(OSError):  # the encoders keep what they have: PyAV 18.1 crashes on a full disk
                    self._container.close()
                os.remove(self.path)


def join_chunks(chunks: Sequence[str], path: str, audio_codec: str = "aac") -> None:
    """Joins mp4 chunks of one folder into one file. The video stays as it is, and with "copy", the sound."""
    # Relative names, because the format has its own rules for quotes and spaces in a path.
    listing = "".join(f"file file:{Path(chunk).name}\n" for chunk in chunks)
    args = "-v error -y -f concat -safe 0 -protocol_whitelist file,pipe -i pipe: -c:v copy -movflags faststart"
    command = ["ffmpeg", *args.split(), "-c:a", audio_codec, os.path.abspath(path)]
    subprocess.run(command, cwd=Path(chunks[0]).parent, input=listing.encode(), check=True)
