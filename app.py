"""Streaming object detection on video with RT-DETR.

Read from top to bottom, this file follows the data: settings, model, reading, detecting, encoding, the
`@spaces.GPU` generator, the page. Drawing is in `draw_boxes.py`.
"""

from __future__ import annotations

import bisect
import contextlib
import contextvars
import csv
import ctypes
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import queue
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import spaces  # isort: skip  # must come before torch: on ZeroGPU it emulates CUDA outside the GPU function

import av
import cv2
import gradio as gr
import huggingface_hub
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

from draw_boxes import draw_bounding_boxes, label_color, load_font

T = TypeVar("T")
log = logging.getLogger("rt-detr-stream")

# ----------------------------------------------------------------------------------------------- settings

DEFAULT_MODEL_ID = "PekingU/rtdetr_r50vd"
EXAMPLES = Path(__file__).parent / "examples"
SHIPPED_MODEL = EXAMPLES / "shapes-rtdetr"

# How much of the source is shown: the scale of width and height, and one frame of how many.
RESOLUTIONS = {"Half (fast)": (Fraction(1, 2), 2), "Full": (Fraction(1), 1)}
HALF = next(iter(RESOLUTIONS))
CHUNK_SECONDS = 2  # of output, in each mp4 that is streamed

# A chunk is one forward pass, but in parts where it has many frames or large ones: as many frames for each of the
# workers as it is fastest with. On a CPU a large model takes R50's 1.1 s a frame alone, and 1.5 s in fours.
WORKERS = {"cpu": 2, "mps": 1, "cuda": 2}  # one prepares its frames while the GPU is with the other's
WORKER_FRAMES = {"cpu": 8, "mps": 16, "cuda": 30}
LARGE_MODEL = 10_000_000  # parameters
BATCH_BYTES = 128 << 20  # of decoded frames
CPU_THREADS = torch.get_num_threads()
HELPER_THREADS = max(1, CPU_THREADS // 2)  # for OpenCV and x264 each, so that the stages do not fight over the cores
cv2.setNumThreads(HELPER_THREADS)
# What most of the model calculates in; by default float16 on CUDA, bfloat16 where the CPU has instructions for it.
PRECISION = os.environ.get("PRECISION", "")

ON_ZEROGPU = spaces.config.Config.zero_gpu
VISITORS_AT_ONCE = 32 if ON_ZEROGPU else 4  # streams; who comes later waits and sees the place in the queue
GPU_SECONDS = 60  # of a ZeroGPU for one call, at most: asking for more than a visitor's quota is refused
GPU_RESERVE_SECONDS = 4  # of them, to end the last chunk in
SETTLE_SECONDS = 0.15  # without another change of the settings, before a run begins
HEARTBEAT_SECONDS = 0.5  # at least this often the page hears from a run, and a run from the page

MAX_UPLOAD = "2gb"
MAX_PIXELS = 8192 * 4320  # of a frame
MAX_SIDE = 16384  # pixels; the encoder takes no more
MAX_HOURS = 4  # of video
MAX_FRAMES = 1_000_000
MAX_SOURCE_FPS = 480  # what a file claims or measures above this is a broken clock
AUDIO_RATE = 48_000  # samples per second of the sound in the chunks, stereo
AUDIO_JUMP_SECONDS = 0.02  # a timestamp this far off the running count of samples is a real gap

# Only these containers are opened, and only with the `file` protocol: a playlist inside an upload could
# otherwise make the server read other files or open connections.
CONTAINERS = (
    "3dostr,amv,apng,asf,av1,avi,dv,f4v,flv,gif,h263,h264,hevc,ivf,m4v,matroska,webm,mjpeg,mov,mp4,mpeg,"
    "mpegts,mpegtsraw,mpegvideo,mxf,nsv,nut,obu,ogg,rm,swf,vc1,vc1test,vvc,wtv,yuv4mpegpipe"
)
DEMUXER_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
FFMPEG_MAX_ALLOCATION = 128 << 20  # bytes at once: a header of a few bytes may claim frames without end
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"format_whitelist;{CONTAINERS}|protocol_whitelist;file"

# -------------------------------------------------------------------------------------------------- model


# What the model answers for one frame: every query, best first, whatever its score. float32 (queries, 6), each
# row a box (xyxy, relative to the frame: 0 to 1), its score and its label's number.
Found = np.ndarray


class Detector:
    """An RT-DETR checkpoint on the best device there is.

    `source` is a model id on the Hub or a local folder. Raises OSError when it cannot be loaded, ValueError
    when it is something else than an RT-DETR detector.
    """

    def __init__(self, source: str, local_files_only: bool = False):
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        if config.model_type not in ("rt_detr", "rt_detr_v2"):
            raise ValueError(f"it is a '{config.model_type}' model, not an RT-DETR detector")
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=local_files_only, backend="pil")
        model = AutoModelForObjectDetection.from_pretrained(
            source, local_files_only=local_files_only, dtype=torch.float32
        )
        self.source = source
        self.device = torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
        self.dtype = getattr(torch, PRECISION) if PRECISION else fastest_dtype(self.device)
        # Tells this checkpoint on this device from any other, so that no answer is taken for another's. Worked
        # out before the weights move: ZeroGPU has no CUDA to calculate with at start-up.
        weights = [parameter.double().sum().item() for parameter in model.parameters()]
        self.fingerprint = f"{config.to_json_string()}{processor}{self.device}{self.dtype}{weights}"
        if self.dtype != torch.bfloat16:  # it has too few digits for the folded weights
            fold_batch_norms(model)
        for module in model.modules():
            if isinstance(module, torch.nn.ReLU):
                module.inplace = True  # saves memory, and a pass over it
        self.model = model.eval().to(memory_format=torch.channels_last).to(self.device)
        if self.dtype != torch.float32:
            # Most of the work, but not the decoder: it chooses between queries that are nearly alike.
            autocast = torch.autocast(self.device.type, self.dtype)
            for part in (model.model.backbone, model.model.encoder):
                part.forward = autocast(part.forward)
            for projection in (*model.model.encoder_input_proj, *model.model.decoder_input_proj):
                projection.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
        workers, worker_frames = WORKERS[self.device.type], WORKER_FRAMES[self.device.type]
        if self.device.type == "cpu":
            if model.num_parameters() > LARGE_MODEL:
                workers, worker_frames = CPU_THREADS, 1
            # Cores that share frames wait for each other at each layer; those with frames of their own do not.
            torch.set_num_threads(max(1, CPU_THREADS // workers))
        self.batch_frames = workers * worker_frames
        self._workers = ThreadPoolExecutor(workers, initializer=give_way)  # for all visitors, a batch each in turn
        self.id2label: dict[int, str] = config.id2label
        self.input_size = (processor.size["height"], processor.size["width"])
        self.rescale_factor = processor.rescale_factor if processor.do_rescale else 1.0
        self.normalize = (processor.image_mean, processor.image_std) if processor.do_normalize else None

    def __call__(self, frames: list[np.ndarray]) -> list[Found]:
        """Detect objects on `frames`, uint8 (H, W, 3) BGR of one size."""
        # In a forked process PyTorch sets up its threads anew at their first use, which must not be in two at once.
        torch.set_num_threads(torch.get_num_threads())
        size = math.ceil(len(frames) / self._workers._max_workers)
        parts = [frames[start : start + size] for start in range(0, len(frames), size)]
        return list(itertools.chain(*self._workers.map(self._detect, parts)))

    def _detect(self, frames: list[np.ndarray]) -> list[Found]:
        """In one forward pass if memory allows it."""
        try:
            return self._forward_pass(frames)
        except torch.OutOfMemoryError:
            if len(frames) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(frames) // 2
        return self._detect(frames[:half]) + self._detect(frames[half:])

    @torch.inference_mode()
    def _forward_pass(self, frames: list[np.ndarray]) -> list[Found]:
        pixels = self._preprocess(frames)
        outputs = self.model(pixel_values=pixels)
        # The official `post_process_object_detection` with threshold 0, but with one transfer a batch.
        scores = outputs.logits.float().sigmoid()
        queries, classes = scores.shape[1:]
        scores, index = scores.flatten(1).topk(queries)
        centers, sizes = outputs.pred_boxes.float().split(2, dim=-1)
        boxes = torch.cat((centers - sizes / 2, centers + sizes / 2), dim=-1)
        boxes = boxes.gather(1, (index // classes).unsqueeze(-1).expand(-1, -1, 4))
        labels = index % classes
        return list(torch.cat((boxes, scores.unsqueeze(-1), labels.unsqueeze(-1)), dim=-1).cpu().numpy())

    def _preprocess(self, frames: list[np.ndarray]) -> torch.Tensor:
        """Resize and rescale as the official processor does: BGR uint8 HWC in, RGB float32 NCHW on the device out.

        On uint8 the antialiased bilinear resize gives PIL's very bytes, but exists only on the CPU.
        """
        rgb = np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in frames])
        batch = torch.from_numpy(rgb).permute(0, 3, 1, 2)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True).float()
        batch = F.interpolate(batch, self.input_size, mode="bilinear", antialias=True)
        batch = batch.to(self.device).float().mul_(self.rescale_factor)
        if self.normalize:
            mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in self.normalize)
            batch = (batch - mean) / std
        return batch


def give_way() -> None:
    """Lower the priority of this thread: what is finished goes to the viewer before more is begun."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(10)


@torch.no_grad()
def fold_batch_norms(model: torch.nn.Module) -> None:
    """Calculate each batch normalisation into the convolution before it, which saves a pass over its output."""
    for module in model.modules():
        for (_, conv), (name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, torch.nn.Conv2d) and hasattr(norm, "running_mean"):
                eps = getattr(norm, "eps", 1e-5)  # RT-DETR's frozen ones have no attribute for it
                statistics = (norm.running_mean, norm.running_var, eps, norm.weight, norm.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                setattr(module, name, torch.nn.Identity())


def fastest_dtype(device: torch.device) -> torch.dtype:
    """What `device` calculates fastest in, of what finds the same objects."""
    if device.type == "cuda":
        return torch.float16
    cpu_info = Path("/proc/cpuinfo")
    has_bfloat16 = device.type == "cpu" and cpu_info.exists() and "avx512_bf16" in cpu_info.read_text()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_detector() -> tuple[Detector, str]:
    """The detector that `MODEL_ID` names or the default one, and a note for the page, mostly empty.

    Without `MODEL_ID`, and with the default neither in the local cache nor to be had from the Hub, it is the
    shapes detector that ships with the app. A `MODEL_ID` that cannot be loaded ends the program.
    """
    wanted = os.environ.get("MODEL_ID", "").strip()
    source = wanted or DEFAULT_MODEL_ID
    try:
        try:
            return Detector(source, local_files_only=True), ""
        except OSError:
            if Path(source).exists():
                raise
            # One quick request first: without a network `from_pretrained` would retry noisily for 23 s.
            url = huggingface_hub.hf_hub_url(source, "config.json")
            huggingface_hub.get_hf_file_metadata(url, timeout=3)
            return Detector(source), ""
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if wanted:
            sys.exit(f"The model '{wanted}' in MODEL_ID cannot be used: {reason}")
        detector = Detector(str(SHIPPED_MODEL), local_files_only=True)
        names = ", ".join(detector.id2label.values())
        note = (
            f"**{DEFAULT_MODEL_ID}** could not be loaded (no network, and not in the local cache), so the "
            f"small detector that ships with this app runs instead. It finds only rendered shapes: {names}. "
            f"For the other one, start the app once with a network, or set `MODEL_ID` to a local folder."
        )
        log.warning("%s (%s)", note.replace("**", "").replace("`", ""), reason)
        return detector, note


def limit_ffmpeg_memory() -> None:
    """Limit what the FFmpeg libraries inside PyAV and OpenCV may allocate at once; possible on Linux only."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for library in {line.split(maxsplit=5)[5] for line in lines if "libavutil" in line}:
        ctypes.CDLL(library).av_max_alloc(ctypes.c_size_t(FFMPEG_MAX_ALLOCATION))


limit_ffmpeg_memory()
if sys.platform == "linux":  # or each thread of a run could leave the memory of a batch in an arena of its own
    M_ARENA_MAX = -8  # of GNU's C library, which PyTorch for Linux needs
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)

if missing := [tool for tool in ("ffmpeg", "ffprobe") if not shutil.which(tool)]:
    sys.exit(f"This app needs {' and '.join(missing)}, which cannot be found: please install ffmpeg.")

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
transformers.utils.logging.disable_progress_bar()
DETECTOR, MODEL_NOTE = load_detector()

# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video track, once its packets have been read (none is decoded).

    Times are in seconds and count from the first frame. `fps` is the source's own rate, exact.
    """

    path: str
    resolution: str  # a key of RESOLUTIONS
    fps: Fraction
    pts_seconds: np.ndarray  # of every packet, sorted
    start_seconds: float  # of the first frame, on the file's own clock
    stream_start_seconds: float  # what the header says of it
    duration_seconds: float
    promised_seconds: float  # the duration that the header gives, or 0
    width: int  # of the coded picture, before rotation
    height: int
    sample_aspect_ratio: Fraction  # width of a coded pixel by its height
    has_audio: bool

    @property
    def scale(self) -> Fraction:
        return RESOLUTIONS[self.resolution][0]

    @property
    def output_fps(self) -> Fraction:
        return self.fps / RESOLUTIONS[self.resolution][1]

    @property
    def chunk_frames(self) -> int:
        """Output frames in a chunk: two seconds of them, but at least one."""
        return max(1, round(CHUNK_SECONDS * self.output_fps))


def open_container(path: str) -> av.container.InputContainer:
    return av.open(path, options=DEMUXER_OPTIONS, metadata_errors="replace")


def find_video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video track that is not a cover picture, as OpenCV chooses it."""
    cover = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if s.codec_context and not s.disposition & cover), None)


def demux(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    """The packets of one track, as far as they can be read."""
    with contextlib.suppress(av.FFmpegError):
        yield from container.demux(stream)


TOO_MUCH = "Too much for this app"


def read_video_info(path: str, resolution: str = HALF) -> VideoInfo:
    """Read a video's clock. Raises `gr.Error`, with a sentence for the page, if it is not a video."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        raise gr.Error("This file is empty.", title="Not a video")
    return read_packets(path, resolution, os.path.getmtime(path))


@lru_cache(maxsize=8)  # a move of the slider must not wait until an hour of video has been read again
def read_packets(path: str, resolution: str, modified: float) -> VideoInfo:
    """`read_video_info` for a file that was `modified` then."""
    try:
        container = open_container(path)
    except (av.FFmpegError, ValueError, OSError) as error:
        log.info("cannot open %s: %s", path, error)
        raise gr.Error(
            "This file cannot be opened as a video. It may be another kind of file, or cut off before its index.",
            title="Not a video",
        ) from error
    with container:
        stream = find_video_stream(container)
        if stream is None:
            raise gr.Error("This file has no video track.", title="Not a video")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise gr.Error(f"The pictures of this video are too large: {width}x{height} pixels.", title=TOO_MUCH)
        packets = []
        for packet in demux(container, stream):
            tick = packet.dts if packet.pts is None else packet.pts
            if packet.size and not packet.is_discard:
                packets.append((tick, packet.duration or 0))
            if len(packets) > MAX_FRAMES:
                raise gr.Error(f"This video has more than {MAX_FRAMES:,} frames.", title=TOO_MUCH)
        if not packets:
            raise gr.Error("The video track of this file is empty.", title="Not a video")
        time_base = stream.time_base or Fraction(1, 1000)
        if all(tick is None for tick, _ in packets):  # a bare stream without a container: only its rate is known
            time_base = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
            packets = [(number, 1) for number in range(len(packets))]
        pts = np.unique(np.array([tick for tick, _ in packets if tick is not None], np.int64))
        fps = frame_rate(pts, time_base, stream.average_rate)
        # With B-frames a packet lasts until the next one in decoding order, which is not how long its picture
        # is shown. Only of the very last one it is.
        last_tick, last_duration = packets[-1]
        held = last_duration * time_base if last_tick == pts[-1] else 0
        start = int(pts[0])
        duration = (int(pts[-1]) - start) * time_base + max(held, 1 / fps)
        if duration > MAX_HOURS * 3600:
            raise gr.Error(f"This video is longer than {MAX_HOURS} hours.", title=TOO_MUCH)
        return VideoInfo(
            path=path,
            resolution=resolution,
            fps=fps,
            pts_seconds=(pts - start) * float(time_base),
            start_seconds=float(start * time_base),
            stream_start_seconds=float((stream.start_time or 0) * time_base),
            duration_seconds=float(duration),
            promised_seconds=promised_seconds(stream, float(start * time_base)),
            width=width,
            height=height,
            sample_aspect_ratio=stream.sample_aspect_ratio or Fraction(1),
            has_audio=container.streams.best("audio") is not None,
        )


def promised_seconds(stream: av.VideoStream, start_seconds: float) -> float:
    """The duration of a track by the file's header, or 0; Matroska has it as a tag, such as 00:00:07.300."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    hours, minutes, seconds = map(float, tag.groups()) if tag else (0.0, 0.0, 0.0)
    return max(0.0, hours * 3600 + minutes * 60 + seconds - start_seconds)


def frame_rate(pts: np.ndarray, time_base: Fraction, average_rate: Fraction | None) -> Fraction:
    """Frames per second of sorted, unique timestamps.

    The header's average is exact (30000/1001) but may be absurd (1000 or 90000 in browser recordings) or
    thinned by long gaps (screen recordings), so it counts only if the timestamps agree with it.
    """
    steps = np.diff(pts)
    median = np.median(steps) if len(steps) else 0
    usual = steps[(steps > 0.5 * median) & (steps < 1.5 * median)]
    rate = 1 / (Fraction(float(usual.mean())) * time_base) if len(usual) else average_rate or Fraction(25)
    if average_rate and abs(average_rate / rate - 1) < 0.1:
        rate = average_rate
    # Containers round 29.97 and the like in their own ways; what is meant is 30000/1001.
    for exact in (Fraction(round(rate)), Fraction(round(rate * 1001 / 1000) * 1000, 1001)):
        if exact and abs(rate / exact - 1) < 1e-4:
            rate = exact
    return min(max(rate, Fraction(1, 1001)).limit_denominator(1001), Fraction(MAX_SOURCE_FPS))


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame to be detected: `image` uint8 (H, W, 3) BGR, already at the output's size."""

    image: np.ndarray
    source_size: tuple[int, int]  # width and height in the source, upright
    slot: int  # the output frame that shows it first
    index: int  # in the source, from 0
    pts_seconds: float  # in the source, from its first frame


class Place(NamedTuple):
    """Where reading begins: with output frame `slot`, which shows the source's frame `index`."""

    slot: int = 0
    index: int = 0
    pts_seconds: float = 0.0
    size: tuple[int, int] | None = None  # of the output, where it is known already


FIRST = Place()


GrabbedFrame = tuple[float, Callable[[], np.ndarray]]  # its time in seconds, and how to get its BGR image


def opencv_frames(video: VideoInfo) -> Iterator[GrabbedFrame]:
    """Every frame that OpenCV decodes. An image must be asked for before the next frame is."""
    capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG)
    image = None

    def retrieve() -> np.ndarray:
        nonlocal image  # the memory of the last one is used again
        image = capture.retrieve(image)[1]
        return image

    try:
        while capture.grab():
            # OpenCV counts from the header's start, which need not be the first frame's.
            pts_seconds = video.stream_start_seconds + capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield pts_seconds - video.start_seconds, retrieve
    finally:
        capture.release()


def pyav_frames(video: VideoInfo, seek_seconds: float | None = None) -> Iterator[GrabbedFrame]:
    """The same with PyAV: it decodes AV1, goes on after packets that OpenCV gives up on, and can begin anywhere."""
    with open_container(video.path) as container:
        stream = find_video_stream(container)
        stream.thread_type = "AUTO"
        if seek_seconds is not None:
            container.seek(round((video.start_seconds + seek_seconds) / stream.time_base), stream=stream)
        for packet in demux(container, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:

                def retrieve(frame: av.VideoFrame = frame) -> np.ndarray:
                    image = frame.to_ndarray(format="bgr24")
                    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))

                yield (math.nan if frame.time is None else frame.time - video.start_seconds), retrieve


def frames_from(video: VideoInfo, seconds: float) -> Iterator[GrabbedFrame]:
    """Frames from `seconds` or a little before, where the file can be searched, else from the first."""
    frames = pyav_frames(video, seconds)
    with contextlib.suppress(av.FFmpegError, TypeError):  # a bare stream has no time base
        first = next(frames, None)
        if first and first[0] <= seconds + 1e-3:
            return itertools.chain([first], frames)
    return pyav_frames(video)


READERS = (opencv_frames, pyav_frames)


def read_frames(video: VideoInfo, start_seconds: float = 0.0) -> Iterator[GrabbedFrame]:
    """Every frame that can be decoded, with rising times: OpenCV's, then what only PyAV can read.

    A frame without a timestamp of its own, or with one that goes back, follows a frame's time after the last.
    """
    interval = float(1 / video.fps)
    last = -math.inf
    readers = (partial(frames_from, seconds=start_seconds),) if start_seconds else READERS
    for reader in readers:
        resume_after = last
        for pts_seconds, retrieve in reader(video):
            if pts_seconds <= resume_after + interval / 4:
                continue
            if not pts_seconds > last:
                pts_seconds = max(last, -interval) + interval
            last = pts_seconds
            if pts_seconds > start_seconds - interval / 4 or not start_seconds:
                yield pts_seconds, retrieve
        if last > video.pts_seconds[-1] - interval / 2:
            break


def sample_frames(video: VideoInfo, start: Place = FIRST) -> Iterator[Frame]:
    """The output's frames: output frame i is what the source shows at `i / output_fps` seconds.

    A frame that the source shows for longer comes again, as the same object. At a constant rate this is every
    second frame. Frames that are not needed are not converted.
    """
    # Half a source frame, so that rounded timestamps (WebM has whole milliseconds) do not pick a neighbour.
    tolerance = float(1 / (2 * video.fps))
    slot, shown, last, size = start.slot, None, 0.0, start.size

    for index, (pts_seconds, retrieve) in enumerate(read_frames(video, start.pts_seconds), start.index):
        while shown and float(slot / video.output_fps) + tolerance < pts_seconds:
            yield shown
            slot += 1
        last = pts_seconds
        following = video.pts_seconds[bisect.bisect_right(video.pts_seconds, pts_seconds + 1e-4) :]
        if len(following) and following[0] <= float(slot / video.output_fps) + tolerance:
            continue  # another frame will have replaced it by then
        image = retrieve()
        size = size or output_size(image, video)  # of the first frame, for all: some recordings change theirs
        resized = cv2.resize(image, size)  # bilinear: at half the size it is the mean of four pixels
        shown = Frame(resized, image.shape[1::-1], slot, index, max(0.0, pts_seconds))

    if shown is None:
        raise gr.Error("No frame of this video can be decoded.", title="Not a video")
    end = video.duration_seconds
    if last < video.pts_seconds[-1] - 3 * tolerance:
        end = last + 2 * tolerance
    # A quarter of a frame less: a duration that is rounded up must not add a frame.
    while slot < max(1, math.ceil(end * video.output_fps - 0.25)):
        yield shown
        slot += 1
    if end < max(video.duration_seconds - tolerance, 0.98 * video.promised_seconds - 0.5):
        gr.Warning(f"This video is damaged: it could be read up to second {end:.1f}.")


def output_size(image: np.ndarray, video: VideoInfo) -> tuple[int, int]:
    """Width and height for square pixels, rounded to even numbers, as H.264's 4:2:0 needs them."""
    height, width = image.shape[:2]
    if width == video.width:
        width *= video.sample_aspect_ratio
    else:  # the image has been turned by 90 degrees, and its pixels with it
        height *= video.sample_aspect_ratio
    return tuple(max(2, 2 * round(side * video.scale / 2)) for side in (width, height))


def read_batches(video: VideoInfo, start: Place = FIRST) -> Iterator[list[Frame]]:
    """The frames of each chunk in one batch, or in several where they are many or large."""
    batch: list[Frame] = []
    for count, frame in enumerate(sample_frames(video, start), start.slot + 1):
        batch.append(frame)
        full = len(batch) == DETECTOR.batch_frames or len(batch) * frame.image.nbytes > BATCH_BYTES
        if full or count % video.chunk_frames == 0:
            yield batch
            batch = []
    if batch:
        yield batch


def read_audio(video: VideoInfo) -> Iterator[np.ndarray]:
    """The default sound track as blocks of int16 (samples, 2) at `AUDIO_RATE`, from the first frame on.

    Samples stand where their timestamps put them: gaps are filled with silence, overlaps are cut.
    """
    with open_container(video.path) as container:
        stream = container.streams.best("audio")
        resampler = av.AudioResampler(format="s16", layout="stereo", rate=AUDIO_RATE)
        position = 0  # of the next sample
        for packet in demux(container, stream):
            try:
                frames = [new for frame in packet.decode() for new in resampler.resample(frame)]
            except (av.FFmpegError, ValueError):  # a damaged packet: its place stays silent
                continue
            for frame in frames:
                samples = frame.to_ndarray().reshape(-1, 2)
                offset = 0
                if frame.time is not None:
                    offset = round((frame.time - video.start_seconds) * AUDIO_RATE) - position
                if offset < 0 and (position == 0 or -offset > AUDIO_JUMP_SECONDS * AUDIO_RATE):
                    samples = samples[-offset:]
                while offset > AUDIO_JUMP_SECONDS * AUDIO_RATE or (offset > 0 and position == 0):
                    silence = np.zeros((min(offset, AUDIO_RATE), 2), np.int16)  # a long gap second by second
                    position, offset = position + len(silence), offset - len(silence)
                    yield silence
                position += len(samples)
                yield samples


class AudioReader:
    """Hands out the sound track piece by piece; silence where the track has ended or cannot be read."""

    def __init__(self, video: VideoInfo):
        self._blocks = read_audio(video)
        self._rest = np.zeros((0, 2), np.int16)
        self._taken = 0

    def skip_until(self, seconds: Fraction) -> None:
        while self._taken < round(seconds * AUDIO_RATE):  # second by second, whatever the length
            self.take_until(min(seconds, Fraction(self._taken, AUDIO_RATE) + 1))

    def take_until(self, seconds: Fraction) -> np.ndarray:
        """The samples from where the last call ended up to `seconds`, int16 (samples, 2)."""
        count = round(seconds * AUDIO_RATE) - self._taken
        blocks, missing = [self._rest], count - len(self._rest)
        while missing > 0:
            block = next(self._blocks, None)
            if block is None:
                block = np.zeros((missing, 2), np.int16)
            blocks.append(block)
            missing -= len(block)
        samples = np.concatenate(blocks)
        self._rest = samples[count:]
        self._taken += count
        return samples[:count]


# ---------------------------------------------------------------------------------------------- detecting


class DetectionStore:
    """What was found on each frame of a video, kept on disk, so that no frame goes through the model twice.

    One SQLite file for each video, checkpoint and resolution: it can be read and written by several processes
    at once (ZeroGPU forks one for each call), and a process that is killed leaves it whole. It lies in
    Gradio's cache folder and is removed with the uploads.
    """

    ALL = 2**31 - 1  # output frames: the video is known to its end

    def __init__(self, video: VideoInfo):
        file = os.stat(video.path)
        key = (video.path, file.st_size, file.st_mtime_ns, video.resolution, DETECTOR.fingerprint)
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        self.path = os.path.join(cache_folder(), f"detections-{name}.sqlite")
        self._database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        # No waiting for the disk: these are answers that can be worked out again.
        self._database.execute("PRAGMA synchronous = OFF")
        columns = "slot INTEGER PRIMARY KEY, number INTEGER, pts REAL, width INTEGER, height INTEGER, found BLOB"
        self._database.execute(f"CREATE TABLE IF NOT EXISTS frames ({columns})")

    def close(self) -> None:
        self._database.close()

    def load(self, slots: Iterable[int]) -> dict[int, Found]:
        """What is known of the frames that these output frames are the first to show."""
        slots = ",".join(map(str, slots))
        rows = self._database.execute(f"SELECT slot, found FROM frames WHERE slot IN ({slots})").fetchall()
        return {slot: np.frombuffer(found, np.float32).reshape(-1, 6) for slot, found in rows}

    def save(self, frames: Sequence[Frame], found: Sequence[Found], known: int) -> None:
        """Keep what was found on `frames`; with them the first `known` output frames are known."""
        rows = [
            (frame.slot, frame.index, frame.pts_seconds, *frame.image.shape[1::-1], rows.tobytes())
            for frame, rows in zip(frames, found, strict=True)
        ]
        if not rows and known <= self.known:
            return
        with self._database as database:
            # IMMEDIATE waits for another process; a transaction that reads before it writes would fail instead.
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR REPLACE INTO frames VALUES (?, ?, ?, ?, ?, ?)", rows)
            database.execute(f"PRAGMA user_version = {max(known, self.known)}")

    @property
    def known(self) -> int:
        """How many output frames are known from the first one on; `ALL` when none is missing."""
        return self._database.execute("PRAGMA user_version").fetchone()[0]

    def place(self, slot: int) -> Place:
        """Where to go on reading for output frame `slot`, which may be the first one that is not known."""
        query = "SELECT number, pts, width, height FROM frames WHERE slot <= ? ORDER BY slot DESC LIMIT 1"
        row = slot and self._database.execute(query, (slot,)).fetchone()
        return Place(slot, row[0], row[1], row[2:]) if row else FIRST


def cache_folder() -> str:
    folder = get_upload_folder()
    os.makedirs(folder, exist_ok=True)
    return folder


DetectedFrame = tuple[Frame, Found]


def detect_batches(
    video: VideoInfo, batches: Iterable[list[Frame]], start: int = 0, deadline: float = math.inf
) -> Iterator[list[DetectedFrame]]:
    """Each batch with what the model finds in it, or has found before.

    `deadline` is a time of `time.monotonic`, after which the model is not asked any more.
    """
    slots = start
    with contextlib.closing(DetectionStore(video)) as store:
        for batch in batches:
            frames = {frame.slot: frame for frame in batch}  # a frame that is shown for longer comes once
            known = store.load(frames)
            found: list[Found] = []
            if new := [frame for slot, frame in frames.items() if slot not in known]:
                if time.monotonic() > deadline:
                    return
                found = DETECTOR([frame.image for frame in new])
                known |= zip((frame.slot for frame in new), found, strict=True)
            slots += len(batch)
            store.save(new, found, slots)
            yield [(frame, known[frame.slot]) for frame in batch]
        store.save([], [], store.ALL)


class FrameDetections(NamedTuple):
    """What is drawn on a frame: `boxes` xyxy in pixels of the source, best first."""

    pts_seconds: float
    frame: int
    labels: list[str]
    scores: list[float]
    boxes: list[list[float]]


def draw_detections(frame: Frame, found: Found, conf_threshold: float, classes: Sequence[str]) -> FrameDetections:
    """Draw into the frame's own image what the model is sure enough of and the viewer wants to see."""
    found = found[found[:, 4] > conf_threshold]
    if classes:
        numbers = [number for number, name in DETECTOR.id2label.items() if name in classes]
        found = found[np.isin(found[:, 5], numbers)]
    boxes, scores = found[:, :4], found[:, 4]
    labels = [DETECTOR.id2label[int(number)] for number in found[:, 5]]
    height, width = frame.image.shape[:2]
    draw_bounding_boxes(frame.image, boxes * (width, height, width, height), scores, labels)
    in_source = np.clip(boxes, 0, 1) * (frame.source_size * 2)
    return FrameDetections(
        frame.pts_seconds, frame.index, labels, scores.round(4).tolist(), in_source.round(1).tolist()
    )


# ----------------------------------------------------------------------------------------------- encoding


class ChunkWriter:
    """An mp4 file with H.264 video and, where there is sound, FLAC.

    Gradio then only remuxes the pictures. Sound in a lossless codec keeps exactly the samples that it is
    given, so that chunks join without a gap; AAC would add its priming samples to each.
    """

    def __init__(self, path: str, size: tuple[int, int], fps: Fraction, has_audio: bool):
        self.path, self._frames, self._samples, self._time_base = path, 0, 0, 1 / fps
        self._container = av.open(path, "w", format="mp4")
        # One key frame, at the start, is enough for a chunk. CRF 23 is x264's own default quality.
        options = {"preset": "superfast", "coder": "vlc", "crf": "23", "g": "100000", "bf": "0"}
        self._video = self._container.add_stream("libx264", rate=fps, options=options)
        self._video.codec_context.thread_count = HELPER_THREADS
        self._video.width, self._video.height = size
        self._video.pix_fmt = "yuv420p"
        self._video.time_base = self._video.codec_context.time_base = self._time_base
        # Whatever the source had, OpenCV's frames are plain RGB, and its YUV is BT.601 in limited range: say so.
        context = self._video.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 5, 1, 1
        self._audio = None
        if has_audio:
            self._audio = self._container.add_stream("flac", rate=AUDIO_RATE, layout="stereo", format="s16")

    def write(self, image: np.ndarray) -> None:
        """Add a frame, uint8 (H, W, 3) BGR."""
        # Not `from_numpy_buffer`: PyAV 18.1 misreads its colour planes unless the height is a multiple of four.
        frame = av.VideoFrame.from_ndarray(cv2.cvtColor(image, cv2.COLOR_BGR2YUV_I420), format="yuv420p")
        frame.pts, frame.time_base = self._frames, self._time_base
        self._frames += 1
        self._mux_video(frame)

    def write_audio(self, samples: np.ndarray) -> None:
        """Add sound, int16 (samples, 2)."""
        sound = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="stereo")
        sound.rate, sound.pts = AUDIO_RATE, self._samples
        self._samples += len(samples)
        self._container.mux(self._audio.encode(sound))

    def close(self) -> None:
        self._mux_video(None)
        if self._audio:
            self._container.mux(self._audio.encode(None))
        self._container.close()

    def _mux_video(self, frame: av.VideoFrame | None) -> None:
        for packet in self._video.encode(frame):
            packet.duration = 1  # or the muxer would not know how long the last frame lasts
            self._container.mux(packet)


class StreamUpdate(NamedTuple):
    """What `stream_object_detection` yields."""

    chunk: str | None  # path of an mp4 file
    detections: list[FrameDetections]  # of the frames that were drawn since the last update
    seconds: float  # of the output that have been drawn so far
    source_size: tuple[int, int]  # width and height, upright


def write_chunks(
    video: VideoInfo,
    batches: Iterable[list[DetectedFrame]],
    conf_threshold: float,
    classes: Sequence[str],
    folder: str,
    start: int = 0,
) -> Iterator[StreamUpdate]:
    """Draw on the frames, from output frame `start` on, and write them as mp4 chunks of two seconds into `folder`."""
    writer, drawn, count = None, None, start
    audio = AudioReader(video) if video.has_audio else None
    if audio:
        audio.skip_until(start / video.output_fps)
    load_font()  # now, while the first frames are being read

    def finish() -> str:
        writer.close()
        return writer.path

    try:
        for batch in batches:
            detections = []
            for frame, found in batch:
                if frame is not drawn:
                    detections.append(draw_detections(frame, found, conf_threshold, classes))
                    drawn = frame
                if writer is None:
                    path = os.path.join(folder, f"{uuid.uuid4().hex}.mp4")
                    writer = ChunkWriter(path, frame.image.shape[1::-1], video.output_fps, video.has_audio)
                writer.write(frame.image)
            count += len(batch)
            if audio:
                writer.write_audio(audio.take_until(count / video.output_fps))
            chunk = None
            if count % video.chunk_frames == 0:
                chunk, writer = finish(), None
            yield StreamUpdate(chunk, detections, float(count / video.output_fps), frame.source_size)
        if writer:
            chunk, writer = finish(), None
            yield StreamUpdate(chunk, [], float(count / video.output_fps), frame.source_size)
    finally:
        if writer:
            writer.close()
            Path(writer.path).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- streaming


class Pipeline:
    """Stages that run at the same time, each in a thread of its own and one result ahead of the next.

    Leaving the `with` block ends every thread after the step at hand, for which it waits a moment. An error in a
    stage comes out of the next one, and so reaches the caller.
    """

    def __init__(self):
        self._closed = False
        self._stages: list[tuple[threading.Thread, threading.Semaphore]] = []

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for _, wanted in self._stages:
            wanted.release()
        for thread, _ in self._stages:
            thread.join(timeout=0.3)  # not longer: Gradio closes a run in its event loop

    def stage(self, items: Generator[T], gives_way: bool = False, heartbeat: bool = False) -> Iterator[T | None]:
        """Run `items` in the background; with a heartbeat, None comes while there is no result."""
        results, wanted = queue.SimpleQueue(), threading.Semaphore()

        def run() -> None:
            if gives_way:
                give_way()
            with contextlib.closing(items):
                try:
                    while wanted.acquire() and not self._closed:
                        results.put((next(items), None))
                except BaseException as end:  # whatever it is: the next stage must not wait for ever
                    if not self._closed:  # or its traceback would keep the frames of a run that nobody takes up
                        results.put((None, end))
                results.put((None, CancelledError()))

        def take() -> Iterator[T | None]:
            while True:
                try:
                    item, end = results.get(timeout=HEARTBEAT_SECONDS if heartbeat else None)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(end, StopIteration):
                    return
                if end or self._closed:
                    raise end or CancelledError
                wanted.release()
                yield item

        # In the caller's context, so that `gr.Warning` finds the page that it belongs to.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(run,), daemon=True)
        self._stages.append((thread, wanted))
        thread.start()
        return take()


def run_pipeline(
    video: VideoInfo,
    conf_threshold: float,
    classes: Sequence[str],
    folder: str,
    start: int = 0,
    deadline: float = math.inf,
) -> Generator[StreamUpdate | None]:
    """Read, detect, and draw with encoding, at the same time; the chunks are written into `folder`.

    It begins with output frame `start` and ends where the model would have to be asked after `deadline`.
    """
    with contextlib.closing(DetectionStore(video)) as store:
        place = store.place(start)
    with Pipeline() as pipeline:
        batches = pipeline.stage(read_batches(video, place), gives_way=True)
        detected = pipeline.stage(detect_batches(video, batches, place.slot, deadline))
        yield from pipeline.stage(
            write_chunks(video, detected, conf_threshold, classes, folder, place.slot), heartbeat=True
        )


class GpuPace:
    """How many seconds of a GPU a video takes, learnt from those before it."""

    def __init__(self):
        self._factor = 1.0  # measured seconds by those of the first guess

    @staticmethod
    def _guess(video: VideoInfo, seconds: float) -> float:
        """For the model 4 ms for each frame of the output, and 5 ms for each megapixel that is decoded."""
        megapixels = video.width * video.height / 1e6
        return seconds * float(0.004 * video.output_fps + 0.005 * megapixels * video.fps)

    def learn(self, video: VideoInfo, seconds: float, took: float) -> None:
        """`seconds` of `video` took `took` seconds."""
        if guess := self._guess(video, seconds):
            self._factor = (self._factor + took / guess) / 2

    def estimate(self, video: VideoInfo, start: int) -> int:
        """What to ask for from output frame `start` on, in whole seconds: half as much again as it should take."""
        left = max(0.0, video.duration_seconds - float(start / video.output_fps))
        needed = 1.5 * self._factor * self._guess(video, left)
        return math.ceil(min(GPU_SECONDS, 2 * GPU_RESERVE_SECONDS + needed))


GPU_PACE = GpuPace()


def gpu_seconds(
    video: str | VideoInfo,
    conf_threshold: float,
    classes: Sequence[str] = (),
    resolution: str = HALF,
    start: int = 0,
    budget: float | None = None,
    **_: object,
) -> float:
    """How many seconds of a GPU `stream_object_detection` asks for when it is called like this."""
    if budget is None:
        video = video if isinstance(video, VideoInfo) else read_video_info(video, resolution)
        budget = GPU_PACE.estimate(video, start)
    return budget


def only_chunks(updates: Iterable[StreamUpdate | None]) -> Iterator[StreamUpdate]:
    """The same updates, joined so that each has a chunk."""
    detections: list[FrameDetections] = []
    for update in filter(None, updates):
        detections += update.detections
        if update.chunk:
            yield update._replace(detections=detections)
            detections = []


@spaces.GPU(duration=gpu_seconds)
def stream_object_detection(
    video: str | VideoInfo,
    conf_threshold: float,
    classes: Sequence[str] = (),
    resolution: str = HALF,
    heartbeat: bool = False,
    start: int = 0,
    budget: float | None = None,
    folder: str | None = None,
) -> Iterator[StreamUpdate | None]:
    """Detect objects on a video and draw them, chunk by chunk.

    Args:
        video: Path of a video file, or what `read_video_info` says of it.
        conf_threshold: Objects with a score above this, 0 to 1, are drawn.
        classes: Names of the classes to draw, from the checkpoint's `id2label`; none means all.
        resolution: A key of `RESOLUTIONS`, for a path.
        heartbeat: Yield something at least every half second: updates whose chunk is not finished, or None.
        start: Number of the output's frame to begin with. All before it must have been streamed once.
        budget: Seconds after which the GPU is taken away. Shortly before, the stream ends with what is done; what
            was found is kept. On ZeroGPU the default is what was asked for, elsewhere there is no limit.
        folder: Where to write the chunks, by default into a new folder in Gradio's cache.

    Yields:
        `StreamUpdate`s. Their first item is the path of an mp4 file (H.264, sound as FLAC) of two seconds, the
        last one shorter, and the caller's to remove.

    Raises:
        gr.Error: If the file is not a video that can be decoded.
    """
    began = time.monotonic()
    video = video if isinstance(video, VideoInfo) else read_video_info(video, resolution)
    if budget is None:
        budget = gpu_seconds(video, conf_threshold, start=start) if ON_ZEROGPU else math.inf
    own_folder = None if folder else tempfile.mkdtemp(prefix="chunks-", dir=cache_folder())
    deadline = began + budget - GPU_RESERVE_SECONDS
    updates = run_pipeline(video, conf_threshold, classes, folder or own_folder, start, deadline)
    handed_out: set[str] = set()
    try:
        with contextlib.closing(updates):
            for update in updates if heartbeat else only_chunks(updates):
                if update and update.chunk:
                    handed_out.add(update.chunk)
                yield update
    finally:
        if own_folder:
            for path in Path(own_folder).iterdir():
                if str(path) not in handed_out:
                    path.unlink()
            with contextlib.suppress(OSError):
                os.rmdir(own_folder)  # if the caller has taken all chunks away


# ------------------------------------------------------------------------------------------------ results


class Report:
    """What has been found so far, as the page's table, plot and files show it."""

    def __init__(self, video: VideoInfo, conf_threshold: float, classes: Sequence[str]):
        self.video, self.conf_threshold, self.classes = video, conf_threshold, list(classes)
        self.frames: list[FrameDetections] = []
        self.source_size: tuple[int, int] | None = None
        self.seconds = 0.0
        self.started = time.monotonic()
        self._rows: dict[str, list] = {}  # of the table, by label
        self._counts: dict[int, Counter] = {}  # most at once by label, for each stretch of the plot

    def add(self, update: StreamUpdate) -> None:
        self.frames += update.detections
        self.seconds, self.source_size = update.seconds, update.source_size
        stretch = max(1, math.ceil(self.video.duration_seconds / 200))  # seconds
        for frame in update.detections:
            most = self._counts.setdefault(int(frame.pts_seconds) // stretch * stretch, Counter())
            second = round(frame.pts_seconds, 1)
            for label, count in Counter(frame.labels).items():
                row = self._rows.setdefault(label, [label, 0, second, second])
                row[1], row[3] = max(row[1], count), second
                most[label] = max(most[label], count)

    def status(self, ended: str = "") -> str:
        """One line for the page."""
        elapsed = time.monotonic() - self.started
        total = self.video.duration_seconds
        model = f"{model_name()} on {DETECTOR.device.type}"
        speed = self.seconds / elapsed if elapsed else 0.0
        if ended:
            objects = sum(len(frame.labels) for frame in self.frames)
            return (
                f"{ended}: {self.seconds:.1f} s of video in {elapsed:.1f} s ({speed:.1f}× real time), "
                f"{objects:,} detections on {len(self.frames):,} frames · {model}"
            )
        if not self.seconds:
            return f"Analysing the first frames… {elapsed:.0f} s · {model}"
        left = max(0.0, total - self.seconds) / speed
        return (
            f"{self.seconds:.1f} of {total:.1f} s ({min(1, self.seconds / total):.0%}) · "
            f"{speed:.1f}× real time · {left:.0f} s left · {model}"
        )

    def table(self) -> list[list]:
        """A row for each class: how many at most at one moment, the first and the last second seen."""
        return sorted(self._rows.values(), key=lambda row: (-row[1], row[0]))

    def counts(self) -> pd.DataFrame:
        """How many of each class there are at most in each second, or in more for long videos."""
        rows = [(second, label, most[label]) for second, most in self._counts.items() for label in sorted(self._rows)]
        return pd.DataFrame(rows, columns=["second", "class", "count"])

    def plot(self) -> dict:
        """An update of the page's plot.

        `gr.LinePlot` draws its scales and legend anew only when one of its properties changes, not with new rows: a
        class that is missing in `color_map` stays invisible. Fixed limits keep the axes still.
        """
        counts = self.counts()
        if counts.empty:
            return gr.update(visible=False)
        top = max(5, counts["count"].max())  # with fewer, the axis would have ticks at halves
        return gr.update(
            value=counts,
            color_map={label: label_color(label) for label in sorted(self._rows)},
            x_lim=[0, self.video.duration_seconds],
            y_lim=[0, int(top)],
            visible=True,
        )

    def as_dict(self) -> dict:
        """What the JSON file holds; README.md describes it."""
        width, height = self.source_size or (None, None)
        return {
            "model": model_name(),
            "threshold": self.conf_threshold,
            "classes": self.classes,
            "analysed_seconds": round(self.seconds, 3),
            "video": {
                "width": width,
                "height": height,
                "fps": float(self.video.fps),
                "duration_seconds": round(self.video.duration_seconds, 3),
            },
            "detections": [
                {
                    "time_seconds": round(frame.pts_seconds, 3),
                    "frame": frame.frame,
                    "label": label,
                    "score": score,
                    "box": box,
                }
                for frame in self.frames
                for label, score, box in zip(frame.labels, frame.scores, frame.boxes, strict=True)
            ],
        }

    def save(self) -> list[str]:
        """Write the detections as CSV and JSON, and return the paths."""
        content = self.as_dict()
        csv_path, json_path = (new_result("detections", kind) for kind in ("csv", "json"))
        with open(csv_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["time_seconds", "frame", "label", "score", "x1", "y1", "x2", "y2"])
            for found in content["detections"]:
                writer.writerow([*list(found.values())[:4], *found["box"]])
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
        return [csv_path, json_path]


def model_name() -> str:
    """The model's id on the Hub, or the name of its folder."""
    return Path(DETECTOR.source).name if os.path.exists(DETECTOR.source) else DETECTOR.source


def new_result(name: str, kind: str) -> str:
    """A path for a file that a visitor may fetch; Gradio removes it with the uploads."""
    path = os.path.join(cache_folder(), f"{name}-{uuid.uuid4().hex[:12]}.{kind}")
    demo.upload_file_set.add(path)
    return path


def join_chunks(chunks: Sequence[str], path: str) -> None:
    """Join mp4 chunks into one file: the pictures as they are, the sound as AAC, which every player knows."""
    listing = f"{path}.txt"
    with open(listing, "w", encoding="utf-8") as file:
        file.writelines(f"file '{chunk}'\n" for chunk in chunks)
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-f", "concat", "-safe", "0", "-i", listing]
    subprocess.run([*command, "-c:v", "copy", "-c:a", "aac", "-movflags", "+faststart", path], check=True)
    os.remove(listing)


# --------------------------------------------------------------------------------------------------- page


class Run:
    """A stream that a visitor watches: asked to stop by setting one event, and gone when the other is set."""

    def __init__(self):
        self.stopped, self.gone = threading.Event(), threading.Event()
        self.is_replaced = False  # by one with other settings: nobody wants to see how it ended

    def stop(self, is_replaced: bool = False) -> None:
        self.is_replaced |= is_replaced
        self.stopped.set()
        self.gone.wait(timeout=10)


RUNS: dict[str, Run] = {}  # a cache of what is alive: each session's one run


@contextlib.contextmanager
def only_run_of(session: str) -> Iterator[Run]:
    """A run that has taken the place of the session's last one."""
    run = Run()
    previous, RUNS[session] = RUNS.get(session), run
    try:
        if previous:
            previous.stop(is_replaced=True)
        yield run
    finally:
        run.gone.set()
        if RUNS.get(session) is run:
            del RUNS[session]


def stop_run(request: gr.Request) -> None:
    """End the stream that the visitor watches. What has been streamed stays."""
    if run := RUNS.get(request.session_hash):
        run.stop()


def replace_run(request: gr.Request) -> None:
    """End the stream that the visitor watches, to make way for another one."""
    if run := RUNS.get(request.session_hash):
        run.stop(is_replaced=True)


def hand_out(updates: Generator[StreamUpdate | None]) -> Iterator[StreamUpdate | None]:
    """The same updates; a chunk is there until the next step."""
    with contextlib.closing(updates):
        for update in updates:
            yield update
            if update and update.chunk:
                Path(update.chunk).unlink(missing_ok=True)


def known_frames(video: VideoInfo) -> int:
    """How many frames of the output need no model, from the first one on; `DetectionStore.ALL` if none does."""
    with contextlib.closing(DetectionStore(video)) as store:
        demo.upload_file_set.add(store.path)  # so that it is removed when Gradio removes uploads
        return store.known


def updates_of(video: VideoInfo, conf_threshold: float, classes: Sequence[str]) -> Iterator[StreamUpdate | None]:
    """The stream with a heartbeat. A chunk is there until the next step.

    What is known already is streamed without a GPU, all of it or, where GPUs are rationed, the beginning.
    """
    known, seconds = known_frames(video), 0.0
    with tempfile.TemporaryDirectory(prefix="chunks-", dir=cache_folder(), ignore_cleanup_errors=True) as folder:
        if known == DetectionStore.ALL or (known and ON_ZEROGPU):
            for update in hand_out(run_pipeline(video, conf_threshold, classes, folder, deadline=-math.inf)):
                seconds = update.seconds if update else seconds
                yield update
        if known == DetectionStore.ALL:
            return

        start, start_seconds = round(seconds * video.output_fps), seconds
        budget = GPU_PACE.estimate(video, start) if ON_ZEROGPU else None
        updates = stream_object_detection(
            video, conf_threshold, classes, heartbeat=True, start=start, budget=budget, folder=folder
        )
        began = None
        for update in hand_out(updates):
            began = began or time.monotonic()  # a GPU may have been waited for until now
            seconds = update.seconds if update else seconds
            yield update
        if began:
            GPU_PACE.learn(video, seconds - start_seconds, time.monotonic() - began)
        if known_frames(video) < DetectionStore.ALL:
            gr.Warning(
                f"The GPU's time for one run is used up: this is the video up to second {seconds:.0f}. "
                "What was found is kept. Press Start, and the run goes on from there."
            )


def sentence_for(error: Exception) -> gr.Error:
    """What to tell a visitor; the log has the rest."""
    if isinstance(error, gr.Error):
        return error
    log.error("a run failed", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        return gr.Error("The GPU is out of memory. Try again in a minute.", title="No memory left")
    if isinstance(error, (OSError, sqlite3.Error, subprocess.CalledProcessError)):
        return gr.Error("The server could not store the result. Its disk may be full.", title="No room left")
    return gr.Error("Something went wrong on the server. Its log says what.", title="Error")


def forget_partial_downloads(session: str) -> None:
    """Gradio joins a stream's chunks at the first download and keeps that file, even if more chunks come later."""
    for streams in demo.pending_streams.get(session, {}).values():
        for stream in streams.values():
            stream.combined_file = None


def stream_to_page(
    video: str | None, conf_threshold: float, classes: list[str], resolution: str, request: gr.Request
) -> Iterator[tuple]:
    """Detect objects on a video and watch them: the annotated video as an HLS stream, chunk by chunk.

    Args:
        video: A video file.
        conf_threshold: Objects with a score above this, 0 to 1, are drawn.
        classes: Names of the classes to draw; none means all.
        resolution: "Half (fast)" (half the size, every second frame) or "Full".
    """
    with only_run_of(request.session_hash) as run:
        # A slider that is dragged asks for a run at each step: only the one that it rests on is begun.
        if run.stopped.wait(SETTLE_SECONDS):
            return
        if video is None:
            yield gr.update(value=None), WELCOME, None, NO_PLOT, gr.update(value=None, visible=False)
            return
        report, failure = None, None
        try:
            info = read_video_info(video, resolution)
            report = Report(info, conf_threshold, classes)
            yield gr.skip(), report.status(), None, NO_PLOT, gr.update(value=None, visible=False)
            with contextlib.closing(updates_of(info, conf_threshold, classes)) as updates:
                for update in updates:
                    if run.stopped.is_set():
                        break
                    if update:
                        report.add(update)
                    if update and update.chunk:
                        yield update.chunk, report.status(), report.table(), report.plot(), gr.skip()
                    else:
                        yield gr.skip(), report.status(), gr.skip(), gr.skip(), gr.skip()
        except Exception as error:
            failure = sentence_for(error)
        if run.is_replaced:
            yield (gr.skip(),) * 5  # Gradio sends the last output again when a run ends: not over its successor's
            return
        files = gr.skip()
        if report and report.frames:  # what has been found stays, also when something has failed since
            try:
                files = gr.update(value=report.save(), visible=True)
            except OSError as error:
                failure = failure or sentence_for(error)
        if failure:
            yield gr.skip(), failure.message, gr.skip(), gr.skip(), files
            raise failure
        forget_partial_downloads(request.session_hash)
        is_whole = known_frames(info) == DetectionStore.ALL
        ended = "Stopped" if run.stopped.is_set() else "Done" if is_whole else "Paused"
        yield gr.skip(), report.status(ended), report.table(), report.plot(), files


def detect_video(
    video: str,
    conf_threshold: float,
    classes: list[str],
    resolution: str,
    progress=gr.Progress(),  # noqa: B008
) -> Iterator[tuple[str, dict] | tuple[None, None]]:
    """Detect objects on a whole video, for programs.

    Args:
        video: A video file.
        conf_threshold: Objects with a score above this, 0 to 1, are drawn and returned.
        classes: Names of the classes to find; none means all.
        resolution: "Half (fast)" (half the size, every second frame) or "Full".

    Returns:
        The annotated video as one mp4 file with sound, and the detections, as README.md describes them.
    """
    try:
        info = read_video_info(video, resolution)
        report = Report(info, conf_threshold, classes)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            chunks = []
            for update in updates_of(info, conf_threshold, classes):
                if update:
                    report.add(update)
                    if update.chunk:
                        chunks.append(shutil.move(update.chunk, folder))
                progress(min(1.0, report.seconds / info.duration_seconds), desc=report.status())
                yield None, None  # so that a program that has gone is noticed
            path = new_result("annotated", "mp4")
            join_chunks(chunks, path)
        yield path, report.as_dict()
    except Exception as error:
        raise sentence_for(error) from error


class WithoutScreenRecorder:
    """ASGI middleware. Gradio's screen recorder hands any upload to ffmpeg, which follows a playlist to other files."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        hidden = scope["type"] == "http" and "/process_recording" in scope["path"]
        await (PlainTextResponse("Not found", 404) if hidden else self.app)(scope, receive, send)


WEBCAM = gr.WebcamOptions(constraints={"video": {"width": {"ideal": 1280}, "height": {"ideal": 720}}})
WELCOME = "Upload a video, record one, or click on an example."
NO_PLOT = gr.update(visible=False)
# Gradio's slider reports every keystroke in its number box, also an empty box or a number out of range, which it then
# refuses with an error over the player. Here such a value never leaves the box; when the box loses the focus, it is
# clamped, and an empty box gets its last good value back.
HEAD = """
<script>
const isNumberBox = (box) => box.matches?.("#threshold input[type=number]");
const isGood = (box) => box.value !== "" && +box.value >= +box.min && +box.value <= +box.max;
document.addEventListener("focusin", ({target: box}) => {
    if (isNumberBox(box) && isGood(box)) box.lastGood = box.value;
});
document.addEventListener("input", (event) => {
    const box = event.target;
    if (!isNumberBox(box)) return;
    if (isGood(box)) box.lastGood = box.value;
    else event.stopImmediatePropagation();
}, true);
document.addEventListener("focusout", ({target: box}) => {
    if (!isNumberBox(box) || isGood(box)) return;
    box.value = box.value === "" ? box.lastGood : Math.min(box.max, Math.max(box.min, box.value));
    box.dispatchEvent(new Event("input", {bubbles: true}));
}, true);
</script>
"""
CSS = """
#source video { max-height: clamp(180px, 28vw, 430px); object-fit: contain; }
"""


def build_page() -> gr.Blocks:
    name = model_name()
    link = name if os.path.exists(DETECTOR.source) else f"[{name}](https://huggingface.co/{name})"
    with gr.Blocks(title="Video object detection with RT-DETR", delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# Video object detection with {link}\nUpload a video and watch what RT-DETR finds on it.")
        if MODEL_NOTE:
            gr.Markdown(MODEL_NOTE)
        with gr.Row():
            with gr.Column():
                # With `include_audio=False` Gradio would give each upload, unchecked, to ffmpeg.
                source = gr.Video(label="Video source", include_audio=True, webcam_options=WEBCAM, elem_id="source")
                conf_threshold = gr.Slider(
                    0, 1, value=0.30, step=0.05, label="Confidence threshold", elem_id="threshold"
                )
                classes = gr.Dropdown(
                    list(DETECTOR.id2label.values()), multiselect=True, label="Classes", info="None means all."
                )
                resolution = gr.Radio(list(RESOLUTIONS), value=HALF, label="Size and frame rate")
            with gr.Column():
                processed = gr.Video(
                    label="Processed video",
                    streaming=True,
                    autoplay=True,
                    height="clamp(220px, 32vw, 480px)",  # from the start, so that nothing jumps
                    elem_id="processed",
                )
                status = gr.Markdown(WELCOME, elem_id="status")
                with gr.Row():
                    start = gr.Button("Start")
                    stop = gr.Button("Stop")
                table = gr.Dataframe(
                    headers=["Class", "Most at once", "First (s)", "Last (s)"],
                    label="What was seen",
                    interactive=False,
                    elem_id="table",
                )
                plot = gr.LinePlot(
                    x="second",
                    y="count",
                    color="class",
                    y_axis_format="d",
                    elem_id="plot",
                    visible=False,
                    show_label=False,
                    x_title="Seconds",
                    y_title="Most at once",
                    height=240,
                )
                files = gr.File(
                    label="Detections as CSV and JSON", file_count="multiple", visible=False, elem_id="files"
                )
        gr.Examples(sorted(map(str, EXAMPLES.glob("*.mp4"))), inputs=source)

        settings = [source, conf_threshold, classes, resolution]
        # The old stream is ended first, outside the queue, and the new one starts with the latest settings.
        gr.on(
            [source.change, conf_threshold.change, classes.change, resolution.change, start.click],
            replace_run,
            queue=False,
            show_progress="hidden",
            trigger_mode="multiple",
            api_visibility="private",
        ).then(
            stream_to_page,
            settings,
            [processed, status, table, plot, files],
            trigger_mode="multiple",
            concurrency_limit=VISITORS_AT_ONCE,
            concurrency_id="detector",
            show_progress_on=[processed],
            api_name="stream_object_detection",
        )
        stop.click(stop_run, queue=False, show_progress="hidden", api_visibility="private")
        gr.Button(visible=False).click(
            detect_video,
            settings,
            [gr.Video(visible=False), gr.JSON(visible=False)],
            concurrency_limit=VISITORS_AT_ONCE,
            concurrency_id="detector",
            api_name="detect_video",
        )
    return page


demo = build_page()
gc.freeze()  # what the imports have made, millions of objects, is not searched for garbage while a stream runs

if __name__ == "__main__":
    middleware = [Middleware(WithoutScreenRecorder)]
    demo.launch(css=CSS, head=HEAD, max_file_size=MAX_UPLOAD, app_kwargs={"middleware": middleware})
