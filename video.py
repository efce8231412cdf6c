"""Reads video files at their exact times, and writes the mp4 chunks that are streamed.

Everything about files is here: the clock of a video, its frames, its sound, and the encoder. This module knows
nothing of models or pages. Uploads are untrusted: only known containers are opened, and only local files.
"""

import bisect
import contextlib
import ctypes
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

MAX_PIXELS = 8192 * 4320  # per frame
MAX_SIDE = 16384  # pixels; the encoder's limit
MAX_HOURS = 4
MAX_FRAMES = 1_000_000
MAX_FPS = 480  # a higher rate, claimed or measured, is a broken clock
MAX_PIXEL_ASPECT = 4  # a more extreme shape of pixels is a broken header
AUDIO_RATE = 48_000  # samples per second in the chunks, which are stereo
AUDIO_JUMP_SECONDS = 0.02  # a timestamp this far from the running sample count is a real gap
AUDIO_PREROLL_SECONDS = 1  # decoded and dropped after a seek, until a codec has all that it predicts from

# An upload may be a playlist: without these limits, it could read other files or open connections.
CONTAINERS = (
    "3dostr,amv,apng,asf,av1,avi,dv,f4v,flv,gif,h263,h264,hevc,ivf,m4v,matroska,webm,mjpeg,mov,mp4,mpeg,"
    "mpegts,mpegtsraw,mpegvideo,mxf,nsv,nut,obu,ogg,rm,swf,vc1,vc1test,vvc,wtv,yuv4mpegpipe"
)
DEMUXER_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"format_whitelist;{CONTAINERS}|protocol_whitelist;file"
FFMPEG_MAX_ALLOCATION = 128 << 20  # bytes at once; a header of a few bytes may claim an absurd number of frames


def _cpu_count(most: int = 16) -> int:
    """The cores that this process may use, by its affinity and its container's quota, up to `most`."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, math.ceil(quota / period))
    return max(1, min(count, most))


CPU_COUNT = _cpu_count()
# OpenCV and x264 take half of the cores each, so that decoding, detecting and encoding do not fight over them.
HELPER_THREADS = max(1, CPU_COUNT // 2)
cv2.setNumThreads(HELPER_THREADS)


if Path("/proc/self/maps").exists():  # caps what the FFmpeg libraries inside PyAV and OpenCV allocate; Linux only
    for library in set(re.findall(r"\S*libavutil\S*", Path("/proc/self/maps").read_text())):
        ctypes.CDLL(library).av_max_alloc(ctypes.c_size_t(FFMPEG_MAX_ALLOCATION))


class VideoError(ValueError):
    """The file cannot be processed. The message is a sentence for the person who chose it."""


# ---------------------------------------------------------------------------------------------- the file's clock


@dataclass(frozen=True)
class VideoInfo:
    """A video track as its packets describe it; no frame has been decoded.

    Times are in seconds from the first frame. `fps` is the exact rate of the source, such as 30000/1001.
    """

    path: str
    fps: Fraction
    pts_seconds: np.ndarray  # of each packet, float64, sorted
    start_seconds: float  # time of the first frame on the file's own clock
    header_start_seconds: float  # the same according to the header
    duration_seconds: float
    header_duration_seconds: float  # 0 if the header has none
    width: int  # of the coded picture, in pixels, before rotation
    height: int
    pixel_aspect: Fraction  # width of a coded pixel divided by its height
    has_audio: bool

    @property
    def frame_seconds(self) -> float:
        return float(1 / self.fps)

    @property
    def expected_seconds(self) -> float:
        """The duration if nothing is missing: a file that was cut off has a longer one in its header."""
        return max(self.duration_seconds, 0.98 * self.header_duration_seconds - 0.5)


def read_video_info(path: str | os.PathLike) -> VideoInfo:
    """Reads the timestamps of a video's packets, without decoding them.

    The result is cached until the file changes: an hour of video takes seconds to read.

    Raises:
        VideoError: If the file is not a video, or exceeds a limit.
    """
    path = os.fspath(path)
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        raise VideoError("This file is empty.")
    return _read_packets(path, os.path.getmtime(path))


@lru_cache(maxsize=8)
def _read_packets(path: str, modified: float) -> VideoInfo:
    try:
        container = _open(path)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise VideoError("This file is incomplete or not a video.") from error
    with container:
        stream = _video_stream(container)
        if stream is None:
            raise VideoError("This file has no video track.")
        width, height, pixel_aspect = _coded_size(stream)
        time_base, ticks, held_ticks = _timestamps(container, stream)
        fps = _frame_rate(ticks, time_base, stream.average_rate)
        start_tick = int(ticks[0])
        start_seconds = float(start_tick * time_base)
        duration_seconds = float((int(ticks[-1]) - start_tick) * time_base + max(held_ticks * time_base, 1 / fps))
        if duration_seconds > MAX_HOURS * 3600:
            raise VideoError(f"This video is longer than {MAX_HOURS} hours.")
        return VideoInfo(
            path=path,
            fps=fps,
            pts_seconds=(ticks - start_tick) * float(time_base),
            start_seconds=start_seconds,
            header_start_seconds=float((stream.start_time or 0) * time_base),
            duration_seconds=duration_seconds,
            header_duration_seconds=_header_duration_seconds(stream, start_seconds),
            width=width,
            height=height,
            pixel_aspect=pixel_aspect,
            has_audio=container.streams.best("audio") is not None,
        )


def _open(path: str) -> av.container.InputContainer:
    return av.open(path, options=DEMUXER_OPTIONS, metadata_errors="replace")


def _video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video track that is not a cover picture, which is also OpenCV's choice."""
    cover = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if s.codec_context and not s.disposition & cover), None)


def _demux(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    """The packets of one track, as far as they can be read."""
    with contextlib.suppress(av.FFmpegError):
        yield from container.demux(stream)


def _coded_size(stream: av.VideoStream) -> tuple[int, int, Fraction]:
    """Width and height in pixels, and the width of a pixel divided by its height."""
    width, height = stream.codec_context.width, stream.codec_context.height
    pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / MAX_PIXEL_ASPECT <= pixel_aspect <= MAX_PIXEL_ASPECT:
        pixel_aspect = Fraction(1)
    shown_width = round(width * pixel_aspect)
    if max(width, shown_width) * height > MAX_PIXELS or max(width, shown_width, height) > MAX_SIDE:
        raise VideoError(f"The frames of this video are too large: {shown_width}x{height} pixels.")
    return width, height, pixel_aspect


def _timestamps(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[Fraction, np.ndarray, int]:
    """The time base, all timestamps in its units (int64, sorted, unique), and how long the last frame is held."""
    packets = []
    for packet in _demux(container, stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.dts if packet.pts is None else packet.pts, packet.duration or 0))
        if len(packets) > MAX_FRAMES:
            raise VideoError(f"This video has more than {MAX_FRAMES:,} frames.")
    if not packets:
        raise VideoError("The video track of this file is empty.")
    time_base = stream.time_base or Fraction(1, 1000)
    if all(tick is None for tick, _ in packets):  # a bare stream without a container has only a rate
        time_base = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
        packets = [(number, 1) for number in range(len(packets))]
    ticks = np.unique(np.array([tick for tick, _ in packets if tick is not None], np.int64))
    # With B-frames, a packet's duration runs to the next one in decoding order. Only that of the very last packet
    # says how long its frame is shown.
    last_tick, last_duration = packets[-1]
    return time_base, ticks, last_duration if last_tick == ticks[-1] else 0


def _header_duration_seconds(stream: av.VideoStream, start_seconds: float) -> float:
    """The duration of a track in the file's header, or 0. Matroska has it as a tag, such as 00:00:07.300."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    hours, minutes, seconds = map(float, tag.groups()) if tag else (0.0, 0.0, 0.0)
    return max(0.0, hours * 3600 + minutes * 60 + seconds - start_seconds)


def _frame_rate(ticks: np.ndarray, time_base: Fraction, average_rate: Fraction | None) -> Fraction:
    """Frames per second of sorted, unique timestamps.

    The header's average rate is exact (30000/1001), but may be absurd (1000 or 90000 in browser recordings) or
    thinned by long gaps (screen recordings). It counts only if the timestamps agree with it.
    """
    steps = np.diff(ticks)
    median = np.median(steps) if len(steps) else 0
    usual = steps[(steps > 0.5 * median) & (steps < 1.5 * median)]
    rate = 1 / (Fraction(float(usual.mean())) * time_base) if len(usual) else average_rate or Fraction(25)
    if average_rate and abs(average_rate / rate - 1) < 0.1:
        rate = average_rate
    # Containers round 29.97 in their own ways; 30000/1001 is meant.
    for exact in (Fraction(round(rate)), Fraction(round(rate * 1001 / 1000) * 1000, 1001)):
        if exact and abs(rate / exact - 1) < 1e-4:
            rate = exact
    return min(max(rate, Fraction(1, 1001)).limit_denominator(1001), Fraction(MAX_FPS))


# --------------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of the output: `image` is uint8 (height, width, 3) BGR at the output's size."""

    image: np.ndarray
    source_size: tuple[int, int]  # width and height in the source, in pixels, upright
    source_index: int  # number of the frame in the source, from 0
    pts_seconds: float  # in the source


GrabbedFrame = tuple[float, Callable[[], np.ndarray]]  # its time in seconds, and how to get its BGR image


def sample_frames(video: VideoInfo, output_fps: Fraction, scale: Fraction, start: int = 0) -> Iterator[Frame]:
    """Yields the frames of the output: frame i is the one that the source shows at `i / output_fps` seconds.

    A frame that the source shows for longer comes again, as the same object. Frames that are not needed are
    decoded, but not converted. Ends early where the rest of the file cannot be decoded.

    Args:
        output_fps: Frames per second of the output.
        scale: Width and height of the output relative to the source.
        start: The output frame to begin with.

    Raises:
        VideoError: If no frame can be decoded.
    """
    # Half a source frame, so that rounded timestamps (WebM has whole milliseconds) do not pick a neighbour.
    tolerance = video.frame_seconds / 2
    index, shown, last_seconds = start, None, 0.0
    first_source_index, size = 0, None
    if start:
        first_source_index = bisect.bisect_right(video.pts_seconds, float(start / output_fps) + tolerance) - 1
        size = next(sample_frames(video, output_fps, scale)).image.shape[1::-1]
    grabbed = _grab_frames(video, float(video.pts_seconds[first_source_index]))
    for source_index, (pts_seconds, retrieve) in enumerate(grabbed, first_source_index):
        while shown and float(index / output_fps) + tolerance < pts_seconds:
            yield shown
            index += 1
        last_seconds = pts_seconds
        following = video.pts_seconds[bisect.bisect_right(video.pts_seconds, pts_seconds + 1e-4) :]
        if len(following) and following[0] <= float(index / output_fps) + tolerance:
            continue  # another frame will have replaced it by then
        image = retrieve()
        size = size or _output_size(image, video, scale)  # some recordings change theirs: the first one is kept
        resized = cv2.resize(image, size)  # bilinear: at half the size, the mean of four pixels
        shown = Frame(resized, image.shape[1::-1], source_index, max(0.0, pts_seconds))
    if shown is None:
        raise VideoError("No frame of this video can be decoded.")
    end_seconds = video.duration_seconds
    if last_seconds < video.pts_seconds[-1] - 3 * tolerance:
        end_seconds = last_seconds + 2 * tolerance
    # A quarter of a frame less: a duration that is rounded up must not add a frame.
    while index < max(1, math.ceil(end_seconds * output_fps - 0.25)):
        yield shown
        index += 1


def _grab_frames(video: VideoInfo, start_seconds: float) -> Iterator[GrabbedFrame]:
    """Every frame that can be decoded, with rising times: OpenCV's, then those that only PyAV can decode.

    OpenCV cannot decode AV1, gives up on damaged packets, and cannot begin in mid-video; PyAV takes over there.
    A frame whose timestamp is not later than the last one's comes one frame interval after it.
    """
    interval = video.frame_seconds
    last_seconds = start_seconds - interval / 2 if start_seconds else -math.inf
    for read in (_pyav_frames,) if start_seconds else (_opencv_frames, _pyav_frames):
        resume_after = last_seconds
        for pts_seconds, retrieve in read(video, max(0.0, resume_after)):
            if pts_seconds <= resume_after + interval / 4:
                continue
            if pts_seconds <= last_seconds:
                pts_seconds = last_seconds + interval
            last_seconds = pts_seconds
            yield pts_seconds, retrieve
        if last_seconds > video.pts_seconds[-1] - interval / 2:
            return


def _opencv_frames(video: VideoInfo, _: float = 0.0) -> Iterator[GrabbedFrame]:
    """Every frame that OpenCV decodes. An image must be retrieved before the next frame is grabbed."""
    capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG)
    image = None
    # OpenCV 5.0 writes beyond its memory if uncompressed BGR video has its last row first, as in Windows' AVI files.
    if capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT) == int.from_bytes(b"BGR\x18", "little"):
        return

    def retrieve() -> np.ndarray:
        nonlocal image  # its memory is used again
        image = capture.retrieve(image)[1]
        return image

    try:
        while capture.grab():
            # OpenCV counts from the header's start, which may differ from the time of the first frame.
            seconds = video.header_start_seconds + capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield seconds - video.start_seconds, retrieve
    finally:
        capture.release()


def _pyav_frames(video: VideoInfo, start_seconds: float) -> Iterator[GrabbedFrame]:
    """The frames that PyAV decodes, from `start_seconds` or some time before."""
    for seconds, frame in _decode(video, "video", start_seconds):

        def retrieve(frame: av.VideoFrame = frame) -> np.ndarray:
            image = frame.to_ndarray(format="bgr24")
            return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))

        yield seconds, retrieve


def _decode(video: VideoInfo, kind: str, start_seconds: float) -> Iterator[tuple[float, av.frame.Frame]]:
    """Times in seconds and frames of the "video" or "audio" track; damaged packets are left out.

    Begins at `start_seconds` or some time before it; with the first frame if the file is not seekable.
    """
    frames = _decode_after_seek(video, kind, start_seconds)
    first = next(frames, None)
    if start_seconds and not (first and first[0] <= start_seconds + 1e-3):
        first, frames = None, _decode_after_seek(video, kind, 0.0)
    if first:
        yield first
    yield from frames


def _decode_after_seek(video: VideoInfo, kind: str, seconds: float) -> Iterator[tuple[float, av.frame.Frame]]:
    with _open(video.path) as container:
        stream = _video_stream(container) if kind == "video" else container.streams.best("audio")
        if kind == "video":
            stream.thread_type, stream.codec_context.thread_count = "AUTO", CPU_COUNT
        if seconds:
            with contextlib.suppress(av.FFmpegError, TypeError):  # a bare stream has no time base
                container.seek(round((video.start_seconds + seconds) / stream.time_base), stream=stream)
        unknown = math.nan if seconds else 0.0  # in a bare stream, frames can only be counted
        for packet in _demux(container, stream):
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError):
                continue
            for frame in frames:
                yield (unknown if frame.time is None else frame.time - video.start_seconds), frame
                unknown += video.frame_seconds


def _output_size(image: np.ndarray, video: VideoInfo, scale: Fraction) -> tuple[int, int]:
    """Width and height with square pixels, rounded to even numbers as H.264's 4:2:0 needs them."""
    height, width = image.shape[:2]
    if width == video.width:
        width *= video.pixel_aspect
    else:  # the image has been rotated by 90 degrees, and its pixels with it
        height *= video.pixel_aspect
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (width, height))


# ---------------------------------------------------------------------------------------------------------- sound


class AudioReader:
    """Reads the default sound track piece by piece; silence where it has ended or cannot be decoded."""

    def __init__(self, video: VideoInfo, start_seconds: Fraction = Fraction(0)):
        self._blocks = _audio_blocks(video, start_seconds)
        self._rest = np.zeros((0, 2), np.int16)
        self._position = round(start_seconds * AUDIO_RATE)  # of the next sample

    def read_until(self, seconds: Fraction) -> np.ndarray:
        """Returns the samples between the last call's end and `seconds`: int16 (samples, 2) at `AUDIO_RATE`."""
        count = round(seconds * AUDIO_RATE) - self._position
        blocks, missing = [self._rest], count - len(self._rest)
        while missing > 0:
            block = next(self._blocks, None)
            if block is None:
                block = np.zeros((missing, 2), np.int16)
            blocks.append(block)
            missing -= len(block)
        samples = np.concatenate(blocks)
        self._rest = samples[count:]
        self._position += count
        return samples[:count]


def _audio_blocks(video: VideoInfo, start_seconds: Fraction) -> Iterator[np.ndarray]:
    """The sound from `start_seconds` on in blocks, int16 (samples, 2).

    Samples are placed by their timestamps: gaps are filled with silence, overlaps are cut.
    """
    resampler = av.AudioResampler(format="s16", layout="stereo", rate=AUDIO_RATE)
    start = round(start_seconds * AUDIO_RATE)
    position, jump, is_first = start, AUDIO_JUMP_SECONDS * AUDIO_RATE, True
    for _, frame in _decode(video, "audio", max(0.0, float(start_seconds) - AUDIO_PREROLL_SECONDS)):
        try:
            resampled = resampler.resample(frame)
        except (av.FFmpegError, ValueError):
            continue
        for part in resampled:
            samples, offset = part.to_ndarray().reshape(-1, 2), 0
            if part.time is not None:
                offset = round((part.time - video.start_seconds) * AUDIO_RATE) - position
            if offset < 0 and (is_first or -offset > jump):
                samples = samples[-offset:]
            while offset > jump or (offset > 0 and is_first):
                silence = np.zeros((min(offset, AUDIO_RATE), 2), np.int16)  # a long gap second by second
                position, offset = position + len(silence), offset - len(silence)
                yield silence
            if len(samples):
                is_first = False
            position += len(samples)
            yield samples


# --------------------------------------------------------------------------------------------------------- chunks


class ChunkWriter:
    """Writes an mp4 file with H.264 video and, if there is sound, FLAC.

    Gradio then only remuxes the video. A lossless sound codec keeps exactly the given samples, so chunks join
    without a gap; AAC would add its priming samples to each.

    Args:
        folder: Where to make the file; None for the system's temporary folder.
        size: Width and height in pixels, even numbers.
    """

    def __init__(self, folder: str | None, size: tuple[int, int], fps: Fraction, has_audio: bool):
        handle, self.path = tempfile.mkstemp(".mp4", "chunk-", folder)
        os.close(handle)
        self._frames, self._samples, self._time_base = 0, 0, 1 / fps
        self._container = av.open(self.path, "w", format="mp4")
        # One key frame, at the start, is enough for a chunk. CRF 23 is x264's default quality.
        options = {"preset": "superfast", "coder": "vlc", "crf": "23", "g": "100000", "bf": "0"}
        self._video = self._container.add_stream("libx264", rate=fps, options=options)
        self._video.width, self._video.height = size
        self._video.pix_fmt = "yuv420p"
        context = self._video.codec_context
        context.thread_count = HELPER_THREADS
        self._video.time_base = context.time_base = self._time_base
        # OpenCV converts BGR to BT.601 in limited range, whatever the source had.
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU601
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._audio = None
        if has_audio:
            self._audio = self._container.add_stream("flac", rate=AUDIO_RATE, layout="stereo", format="s16")

    def write(self, image: np.ndarray) -> None:
        """Adds a frame, uint8 (height, width, 3) BGR."""
        # Not `from_numpy_buffer`: PyAV 18.1 misreads its colour planes unless the height is a multiple of four.
        frame = av.VideoFrame.from_ndarray(cv2.cvtColor(image, cv2.COLOR_BGR2YUV_I420), format="yuv420p")
        frame.pts, frame.time_base = self._frames, self._time_base
        self._frames += 1
        self._mux_video(frame)

    def write_audio(self, samples: np.ndarray) -> None:
        """Adds sound, int16 (samples, 2) at `AUDIO_RATE`."""
        sound = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="stereo")
        sound.rate, sound.pts = AUDIO_RATE, self._samples
        self._samples += len(samples)
        self._container.mux(self._audio.encode(sound))

    def close(self) -> str:
        """Finishes the file and returns its path."""
        self._mux_video(None)
        if self._audio:
            self._container.mux(self._audio.encode(None))
        self._container.close()
        return self.path

    def discard(self) -> None:
        """Removes the unfinished file."""
        with contextlib.suppress(OSError):  # without flushing the encoders: on a full disk, that crashes PyAV 18.1
            self._container.close()
        os.remove(self.path)

    def _mux_video(self, frame: av.VideoFrame | None) -> None:
        for packet in self._video.encode(frame):
            packet.duration = 1  # otherwise the muxer does not know how long the last frame is shown
            self._container.mux(packet)


def join_chunks(chunks: Sequence[str], path: str) -> None:
    """Joins mp4 chunks of one folder into one file: the video as it is, the sound as AAC, which every player knows."""
    listing = Path(chunks[0]).with_suffix(".txt")
    # Relative names, because the format has its own rules for quotes and spaces in a path.
    listing.write_text("".join(f"file {Path(chunk).name}\n" for chunk in chunks))
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-f", "concat", "-safe", "0", "-i", listing.name]
    command += ["-c:v", "copy", "-c:a", "aac", "-movflags", "+faststart", os.path.abspath(path)]
    subprocess.run(command, cwd=listing.parent, check=True)
    listing.unlink()
