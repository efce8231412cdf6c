"""Streaming object detection on video with RT-DETR.

Read from top to bottom, this file follows the data: settings, model, the `@spaces.GPU` generator, results, runs, page.
Files and frames are in `video.py`, drawing is in `draw_boxes.py`.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import copy
from fractions import Fraction
from functools import lru_cache, reduce
from inspect import unwrap
from operator import or_
from pathlib import Path
from typing import NamedTuple, TypeVar

import spaces  # isort: skip  # before torch: on ZeroGPU it emulates CUDA outside the GPU function

import cv2
import gradio as gr
import numpy as np
import pandas as pd
import supervision as sv
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from scipy.optimize import linear_sum_assignment
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from torch.nn.utils.fusion import fuse_conv_bn_weights
from trackers import CBIoUTracker
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

from draw_boxes import draw_bounding_boxes, label_color, load_font
from video import CPU_COUNT, AudioReader, ChunkWriter, Frame, VideoError, join_chunks, read_video_info, sample_frames

T = TypeVar("T")
log = logging.getLogger("rt-detr-stream")

# ------------------------------------------------------------------------------------------------------- settings

DEFAULT_MODEL_ID = "PekingU/rtdetr_r50vd"
DEFAULT_CPU_MODEL_ID = "PekingU/rtdetr_r18vd_coco_o365"  # COCO AP 49.0 instead of 53.1, for half of the arithmetic
EXAMPLES = Path(__file__).parent / "examples"
SHIPPED_MODEL = EXAMPLES / "shapes-rtdetr"


class Resolution(NamedTuple):
    scale: Fraction  # width and height of the output relative to the source
    step: int  # source frames per output frame


RESOLUTIONS = {"Half (fast)": Resolution(Fraction(1, 2), 2), "Full": Resolution(Fraction(1), 1)}
HALF = next(iter(RESOLUTIONS))
CHUNK_SECONDS = 2  # of output, in each mp4 that is streamed
MIN_SCORE = 0.05  # detections below this are neither cached, drawn nor reported

# Pixels of model input per forward pass. A GPU takes a whole chunk at R50's 640x640. On a CPU, each core takes a pass
# of its own, so that cores do not wait for each other at each layer: one frame of 640x640, or eight of 256x256.
PASS_PIXELS = {"cuda": 60 * 640 * 640, "mps": 16 * 640 * 640, "cpu": 8 * 256 * 256}
BATCH_BYTES = 128 << 20  # of decoded frames per batch
ANALYSED = ("As many as keep up", "Every frame")
KEEP_UP_SHARE = 0.8  # of real time for the model; the rest is for reading, drawing and encoding
MOST_GAP_SECONDS = 0.5  # between analysed frames

# Mean difference between thumbnails of consecutive frames (0 to 255), and its ratio to the previous difference. In a
# film at 25 and 12.5 frames per second, cuts changed 43 to 81. Its fastest motion changed up to 31, but the previous
# frame had changed as much. These limits found all 5 and 10 cuts and nothing else; a ratio of 2 missed 2 of 10.
CUT_CHANGE, CUT_FACTOR = 25, 1.5

# Found on 83 rendered scenes, seeds 100 to 111, 12 and 15 frames per second, score threshold 0.30: objects kept their
# number in 95.3 % of their sightings, and 490 were counted where 483 exist. With the library's own thresholds: 91.0 %
# and 555; ByteTrack 88.8 % and 585, OC-SORT 82.2 % and 653. Weaker boxes, from 0.1 or 0.2, gained 0.1 % at most.
LOST_SECONDS = 1.2  # an object keeps its number for so long while it is not seen; 0.8 s: 94.1 %, 1.5 s: 95.3 %
NEW_SECONDS = 0.25  # a new object gets its number after this long; 0.1 s: 94.4 %, and 28 % more numbers
BELIEVED_SECONDS = 1.0  # an object counts after being seen this long; 0.6 s: 510 objects, 0.3 s: 541
TRACKER = {
    "track_activation_threshold": 0.0,  # any detection that is drawn may start a track
    "high_conf_det_threshold": 0.0,
    "minimum_iou_threshold_first_assoc": 0.01,  # 0.05: 94.7 %, 0.2: 93.0 %
    "buffer_ratio_first": 0.8,  # boxes are enlarged by this share of their size; 0.6: 95.6 %, 1.0: 94.5 %
    "instant_first_frame_activation": False,
}
MOST_DIFFERENT = 2.5  # upper limit for two detections to match; 2.0 to 3.5 change interpolated frames by less than 1 %
TRAIL_SECONDS = 1.5

CACHED_VIDEOS = 16  # whose detections are kept in memory, at some hundred bytes per frame

ON_ZEROGPU = spaces.config.Config.zero_gpu  # `spaces` has no public name for it
GPU_SECONDS = 60  # of a ZeroGPU per call, at most: a request that exceeds the visitor's quota is refused
GPU_RESERVE_SECONDS = 4  # of GPU_SECONDS, to finish the last chunk
VISITORS_AT_ONCE = 32 if ON_ZEROGPU else 4  # concurrent runs; others wait in a queue
MAX_QUEUE = 100  # runs, including those that wait
SETTLE_SECONDS = 0.15  # debounce: each step of a dragged slider starts a run, which waits this long for another
HEARTBEAT_SECONDS = 0.25  # longest interval between status updates, and between checks for Stop
MAX_UPLOAD = "2gb"

# ---------------------------------------------------------------------------------------------------------- model


HAS_CUDA, HAS_MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "mps" if HAS_MPS else "cpu")


class Detector:
    """An RT-DETR checkpoint on `DEVICE`.

    Args:
        folder: A local folder in the format of `save_pretrained`.
        name: What the page calls it.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not an RT-DETR detector, or has a setting that is not supported.
    """

    def __init__(self, folder: str | Path, name: str):
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in ("rt_detr", "rt_detr_v2"):
            raise ValueError(f"it is a '{config.model_type}' model, not an RT-DETR detector")
        self.name, self.id2label = name, config.id2label
        self.processor = processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        if not (processor.do_resize and processor.size.height) or processor.resample != 2 or processor.do_pad:
            raise ValueError(
                "its preprocessor_config.json must have do_resize, size.height and size.width, resample 2 (bilinear), "
                "and no do_pad"
            )
        self.input_size = (processor.size.height, processor.size.width)
        model = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
        self.model = model.to(DEVICE)
        self.autocast = torch.autocast("cuda", torch.float16, enabled=HAS_CUDA)
        self.passes_at_once = CPU_COUNT if DEVICE.type == "cpu" else 1
        self.batch_frames = self.passes_at_once * max(1, PASS_PIXELS[DEVICE.type] // math.prod(self.input_size))
        self._lock = threading.Lock()  # visitors take turns: two passes at once take twice the memory
        self.seconds_per_frame = 0.0  # negligible on CUDA, so not measured there
        if DEVICE.type == "cpu":
            optimize_for_cpu(model)
        if not HAS_CUDA:
            frames = [np.zeros((*self.input_size, 3), np.uint8)] * self.batch_frames
            for _ in range(2):  # the first pass is slower
                began = time.monotonic()
                self(frames)
                self.seconds_per_frame = (time.monotonic() - began) / len(frames)

    def __call__(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """Detects objects on frames of one size, uint8 (height, width, 3) BGR; in halves if memory is short.

        Returns one float32 (N, 6) array per frame, best detection first: box (xyxy, relative to the frame, 0 to 1),
        score, and label number.
        """
        try:
            size = math.ceil(len(frames) / self.passes_at_once)
            parts = [frames[start : start + size] for start in range(0, len(frames), size)]
            with self._lock, ThreadPoolExecutor(len(parts)) as pool:
                return list(itertools.chain.from_iterable(pool.map(self._forward_pass, parts)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(frames) == 1:
                raise
        half = len(frames) // 2
        return self(frames[:half]) + self(frames[half:])

    @torch.inference_mode()
    def _forward_pass(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        pixels = self._preprocess(frames)
        with self.autocast:
            outputs = self.model(pixel_values=pixels)
        outputs.logits, outputs.pred_boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()
        results = self.processor.post_process_object_detection(outputs, threshold=MIN_SCORE)
        return [
            torch.cat((r["boxes"], r["scores"][:, None], r["labels"][:, None].float()), dim=1).numpy() for r in results
        ]

    def _preprocess(self, frames: list[np.ndarray]) -> torch.Tensor:
        """Resizes and rescales as the official processor does: BGR uint8 NHWC in, RGB float32 NCHW out.

        On uint8, the antialiased bilinear resize gives the same bytes as PIL, at less than half the time.
        """
        batch = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        if DEVICE.type == "cuda":  # where the uint8 resize does not exist
            batch = batch.to(DEVICE).float()
        batch = F.interpolate(batch, self.input_size, mode="bilinear", antialias=True).flip(1).to(DEVICE).float()
        if self.processor.do_rescale:
            batch = batch * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = self.processor.image_mean, self.processor.image_std
            mean, std = (torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (mean, std))
            batch = (batch - mean) / std
        return batch


@torch.no_grad()
def optimize_for_cpu(model: torch.nn.Module) -> None:
    """Channels last and activations in place; then bfloat16 before the decoder, or else batch norms folded.

    R18 on two cores of an AMD EPYC: 380 ms per frame as it is, 219 ms optimized, 141 ms in bfloat16. The decoder stays
    in float32, because it chooses between queries that are nearly alike: in bfloat16, 2 % of the detections changed.
    """
    torch.set_num_threads(1)  # per pass
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = True
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists() and "avx512_bf16" in cpu_info.read_text():
        for part in (model.model.backbone, model.model.encoder):
            part.forward = torch.autocast("cpu", torch.bfloat16)(part.forward)
        for projection in (*model.model.encoder_input_proj, *model.model.decoder_input_proj):
            projection.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
        return
    for module in model.modules():
        for (_, conv), (name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, torch.nn.Conv2d) and hasattr(norm, "running_mean"):
                eps = getattr(norm, "eps", 1e-5)  # RT-DETR's frozen batch norms have no attribute for it
                statistics = (norm.running_mean, norm.running_var, eps, norm.weight, norm.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                setattr(module, name, torch.nn.Identity())


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's RuntimeErrors for it differ by device; all mention memory."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


def load_detector() -> tuple[Detector, str]:
    """Returns the detector that `MODEL_ID` names, or the default one, and a note for the page, usually empty.

    Without `MODEL_ID`, if the Hub is unreachable and the default checkpoint is not cached, this is the detector that
    ships with the app. Any other problem ends the program: it must not look like a missing network.
    """
    model_id = os.environ.get("MODEL_ID", "").strip()
    source = model_id or (DEFAULT_CPU_MODEL_ID if DEVICE.type == "cpu" else DEFAULT_MODEL_ID)
    try:
        if os.path.isdir(source):
            return Detector(source, Path(source).name), ""
        return Detector(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]), source), ""
    except LocalEntryNotFoundError:
        if model_id:
            sys.exit(f"The model '{source}' in MODEL_ID is unavailable: no network, and not in the local cache.")
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"The model '{source}' cannot be used: {reason}")
    detector = Detector(SHIPPED_MODEL, SHIPPED_MODEL.name)
    note = (
        f"Note for the operator: **{source}** is unavailable (no network, and not in the local cache). The small "
        f"detector that ships with the app runs instead. It only knows {', '.join(detector.id2label.values())}. Start "
        "the app once with a network, or set `MODEL_ID` to a local folder."
    )
    log.warning(note.replace("**", "").replace("`", ""))
    return detector, note


if sys.platform == "linux":
    # Each run has threads of its own, and each thread may leave memory behind in an arena of its own: 110 MB after 50
    # runs. With two arenas for all, it is reused.
    M_ARENA_MAX = -8  # of GNU's C library
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)

if missing := [tool for tool in ("ffmpeg", "ffprobe") if not shutil.which(tool)]:
    sys.exit(f"This app requires {' and '.join(missing)}, which cannot be found. Please install ffmpeg.")

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
transformers.utils.logging.disable_progress_bar()
DETECTOR, MODEL_NOTE = load_detector()

# ------------------------------------------------------------------------------------------------------ generator


class FrameDetections(NamedTuple):
    """What the model found on one frame."""

    source_index: int  # number of the frame in the source, from 0
    pts_seconds: float
    source_size: tuple[int, int]  # width and height in pixels, upright
    detections: np.ndarray  # as `Detector` returns them, whatever the threshold
    objects: np.ndarray  # those that are drawn, (N, 7): the same columns and the object's number, 0 if none


class StreamUpdate(NamedTuple):
    """What `stream_object_detection` yields."""

    chunk: str  # path of an mp4 file (H.264, FLAC), which the caller removes
    frames: list[FrameDetections]  # analysed since the last update
    output_frames: int  # how many the output has, counted from the beginning of the video
    gpu_seconds: float  # since the call began
    is_end: bool  # of the video
    tracker: ObjectTracker  # pass it to the next call


class Batch(NamedTuple):
    """Consecutive frames of the output that are detected together. `detect_batches` adds what has a default."""

    frames: list[Frame]
    start: int  # output index of the first one
    is_end: bool  # of the video
    detections: Sequence[np.ndarray] = ()  # on each frame
    analysed: Sequence[bool] = ()  # whether the model ran on the frame
    cuts: Sequence[bool] = ()  # whether a new shot begins with the frame
    is_cached: bool = False  # whether no frame needed the model
    previous: Frame | None = None  # the last frame of the batch before


@spaces.GPU(duration=lambda *_, budget_seconds=GPU_SECONDS, **__: budget_seconds)
def stream_object_detection(
    video: str,
    conf_threshold: float,
    classes: Sequence[str] = (),
    resolution: str = HALF,
    tracks: bool = True,
    *,
    step: int = 1,
    start: int = 0,
    tracker: ObjectTracker | None = None,
    cached: dict[int, np.ndarray] | None = None,
    folder: str | None = None,
    join_seconds: float = 0,
    budget_seconds: float = GPU_SECONDS if ON_ZEROGPU else math.inf,
) -> Iterator[StreamUpdate]:
    """Detects objects on a video and draws them, chunk by chunk.

    Args:
        video: Path of a video file.
        conf_threshold: Detections with a score above this, 0 to 1, are drawn.
        classes: Names of the classes to draw, from the checkpoint's `id2label`; empty for all.
        resolution: A key of `RESOLUTIONS`.
        tracks: Draw the objects' numbers and trails.
        step: One in this many output frames is analysed; boxes on the others are interpolated.
        start: The output frame to begin with.
        tracker: Of the call that ended at `start`.
        cached: Detections by source index. These frames skip the model; new detections are added.
        folder: Where to write the chunks; by default the system's temporary folder.
        join_seconds: Cached frames up to this second of the video come as one long chunk.
        budget_seconds: The stream ends shortly before this time limit; with 0, at the first frame not in `cached`.

    Yields:
        One `StreamUpdate` per chunk of two seconds; the last one is shorter.

    Raises:
        gr.Error: If the file is not a video that can be decoded.
    """
    began, cached = time.monotonic(), {} if cached is None else cached
    writer, index, found = None, start, []
    try:
        info = read_video_info(video)
        scale, fps = RESOLUTIONS[resolution].scale, info.fps / RESOLUTIONS[resolution].step
        chunk_frames = max(1, round(CHUNK_SECONDS * fps))
        tracker = tracker or ObjectTracker(fps)
        audio = AudioReader(info, start / fps) if info.has_audio else None
        deadline = began + budget_seconds - GPU_RESERVE_SECONDS

        def write_sound() -> None:
            if audio and len(samples := audio.read_until(index / fps)):
                writer.write_audio(samples)

        def finish_chunk(is_end: bool) -> StreamUpdate:
            nonlocal writer, found
            write_sound()
            update = StreamUpdate(writer.close(), found, index, time.monotonic() - began, is_end, tracker)
            writer, found = None, []
            return update

        batches = prefetch(read_batches(sample_frames(info, fps, scale, start), chunk_frames, start, step))
        with contextlib.closing(prefetch(detect_batches(batches, cached, step, deadline))) as detected:
            load_font()  # while the first frames are being read and detected
            for batch in detected:
                selected = [select(detections, conf_threshold, classes) for detections in batch.detections]
                objects = tracker.update(selected, batch.cuts)
                found += draw_batch(batch, objects, tracker, tracks)
                for index, frame in enumerate(batch.frames, batch.start + 1):
                    writer = writer or ChunkWriter(folder, frame.image.shape[1::-1], fps, bool(audio))
                    writer.write(frame.image)
                    is_end = batch.is_end and index == batch.start + len(batch.frames)
                    is_joined = batch.is_cached and index / fps <= join_seconds
                    if is_end or (index % chunk_frames == 0 and not is_joined):
                        yield finish_chunk(is_end)
                if writer:
                    write_sound()  # batch by batch, because a joined chunk may be long
        if writer:  # the budget is used up in mid-chunk
            yield finish_chunk(is_end=False)
    except Exception as error:
        if ON_ZEROGPU or isinstance(error, VideoError):  # from a ZeroGPU's worker, only a `gr.Error` arrives whole
            raise user_facing_error(error) from error
        raise
    finally:
        if writer:
            writer.discard()


def read_batches(frames: Iterable[Frame], chunk_frames: int, start: int, step: int) -> Iterator[Batch]:
    """The frames of each chunk in one batch, or in several if they are many or large.

    If not every frame is analysed (`step` > 1), a batch ends with an analysed one after the end of the chunk: only then
    the chunk is complete. No core stays idle for lack of a frame.
    """
    batch: list[Frame] = []
    is_full = False
    for index, frame in enumerate(frames, start):
        if is_full:
            yield Batch(batch, index - len(batch), is_end=False)
            batch = []
        batch.append(frame)
        last_before = index - len(batch)
        passes = index // step - last_before // step
        if step == 1:
            is_full = passes >= DETECTOR.batch_frames or (index + 1) % chunk_frames == 0
        else:
            has_chunk = index // chunk_frames > max(0, last_before) // chunk_frames
            is_full = passes >= DETECTOR.batch_frames or (has_chunk and passes % DETECTOR.passes_at_once == 0)
            is_full = is_full and index % step == 0
        is_full = is_full or len(batch) * frame.image.nbytes > BATCH_BYTES
    yield Batch(batch, index + 1 - len(batch), is_end=True)


def detect_batches(
    batches: Iterator[Batch], cached: dict[int, np.ndarray], step: int, deadline: float
) -> Iterator[Batch]:
    """The same batches with the detections on their frames. The model's are also added to `cached`.

    Ends at the first batch that needs the model after `deadline` (`time.monotonic`).
    """
    find_cut, before, previous = CutFinder(), None, None
    with contextlib.closing(batches):
        for batch in batches:
            due = [*batch.frames[-batch.start % step :: step], batch.frames[-1]]
            due += batch.frames[:1] if before is None else []
            new = {frame.source_index: frame.image for frame in due if frame.source_index not in cached}
            if new and time.monotonic() > deadline:
                return
            if new:
                cached.update(zip(new, DETECTOR([*new.values()]), strict=True))
            cuts = [find_cut(frame.image) for frame in batch.frames]
            known = [cached.get(frame.source_index) for frame in batch.frames]
            detections, analysed = fill_gaps([before, *known], cuts), [found is not None for found in known]
            yield Batch(*batch[:3], detections, analysed, cuts, is_cached=not new, previous=previous)
            before, previous = detections[-1], batch.frames[-1]


def select(detections: np.ndarray, conf_threshold: float, classes: Sequence[str]) -> np.ndarray:
    """The detections above the threshold and, unless `classes` is empty, in one of them."""
    selected = detections[detections[:, 4] > conf_threshold]
    if classes:
        numbers = [number for number, label in DETECTOR.id2label.items() if label in classes]
        selected = selected[np.isin(selected[:, 5], numbers)]
    return selected


def draw_batch(
    batch: Batch, objects: Sequence[np.ndarray], tracker: ObjectTracker, tracks: bool
) -> list[FrameDetections]:
    """Draws the objects of each frame, (N, 7), and returns what is to be reported of the analysed ones."""
    found, previous = [], batch.previous
    for index, frame in enumerate(batch.frames):
        if frame is not previous:  # it comes again if the source shows it for longer
            trails = tracker.trails(objects[index], batch.start + index)
            draw(frame.image, objects[index], trails if tracks else None)
            if batch.analysed[index]:
                place = (frame.source_index, frame.pts_seconds, frame.source_size)
                found.append(FrameDetections(*place, batch.detections[index], objects[index]))
        previous = frame
    return found


def draw(image: np.ndarray, objects: np.ndarray, trails: Sequence[np.ndarray] | None) -> None:
    """Draws objects, (N, 7), into an image, uint8 (height, width, 3) BGR; with numbers if there are trails."""
    height, width = image.shape[:2]
    labels = [DETECTOR.id2label[int(number)] for number in objects[:, 5]]
    numbers = None if trails is None else objects[:, 6].astype(int)
    trails = trails and [trail * (width, height) for trail in trails]
    draw_bounding_boxes(image, objects[:, :4] * (width, height, width, height), objects[:, 4], labels, numbers, trails)


END = object()


def lower_thread_priority() -> None:
    """Delivering finished chunks takes priority over preparing new ones: the first one arrives 20 % sooner."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(10)


def prefetch(items: Generator[T], heartbeat_seconds: float | None = None) -> Generator[T | None]:
    """Yields the same items, computing the next one in a thread while the caller uses the current one.

    Closing does not wait for the item in progress; `items` is closed after it.

    Args:
        heartbeat_seconds: After this long without an item, None is yielded.
    """
    executor, context = ThreadPoolExecutor(1, initializer=lower_thread_priority), contextvars.copy_context()
    first = executor.submit(context.run, next, items, END)  # now, not when the first one is asked for

    def results() -> Generator[T | None]:
        step = first
        try:
            while True:
                if not wait([step], heartbeat_seconds).done:
                    yield None
                elif (item := step.result()) is END:
                    return
                else:
                    step = executor.submit(context.run, next, items, END)
                    yield item
        finally:
            executor.submit(items.close)
            executor.shutdown(wait=False)

    return results()


def in_thread(work: Callable[..., T], *args: object) -> Generator[T | None]:
    """Yields None at least every `HEARTBEAT_SECONDS` until `work` is done, and then its result.

    Gradio can close a generator only between its steps, so that none should take long.
    """
    return prefetch((work(*args) for _ in range(1)), HEARTBEAT_SECONDS)


# --------------------------------------------------------------------------------------------------------- tracks


class CutFinder:
    """Finds cuts: changes of the picture that are large and sudden. A fast pan is only large."""

    def __init__(self):
        self._thumbnail, self._change = None, 0.0

    def __call__(self, image: np.ndarray) -> bool:
        """Whether a shot begins with this frame, uint8 (height, width, 3), after the one of the last call."""
        thumbnail = cv2.resize(image, (32, 18), interpolation=cv2.INTER_NEAREST)  # 0.01 ms, also from 1080p
        change = 0.0 if self._thumbnail is None else float(cv2.absdiff(thumbnail, self._thumbnail).mean())
        is_cut = change > max(CUT_CHANGE, CUT_FACTOR * self._change)
        self._thumbnail, self._change = thumbnail, change
        return is_cut


class ObjectTracker:
    """Numbers the objects of a video, each class from 1.

    A number stays while its object is out of sight for up to `LOST_SECONDS`, and ends at a cut.

    Args:
        fps: Of the output.
    """

    def __init__(self, fps: Fraction):
        self._tracker = CBIoUTracker(
            frame_rate=float(fps),
            lost_track_buffer=round(30 * LOST_SECONDS),  # in frames of 1/30 s, at any rate
            minimum_consecutive_frames=max(2, round(NEW_SECONDS * fps)),
            **TRACKER,
        )
        self._trail_frames = round(TRAIL_SECONDS * fps)
        self._trails: dict[tuple[float, float], list[tuple]] = {}  # output index and centre, by label and number
        self._count: Counter[float] = Counter()  # objects of each label
        self._numbers: dict[int, int] = {}  # by the id of the library's track

    def update(self, frames: Sequence[np.ndarray], cuts: Sequence[bool]) -> list[np.ndarray]:
        """Appends object numbers to the detections on the next frames: (N, 6) in, (N, 7) out; 0 means no object.

        `cuts` tells for each frame whether a shot begins with it.
        """
        numbers = [self._number(*frame) for frame in zip(frames, cuts, strict=True)]
        for index in reversed(np.flatnonzero(~np.array(cuts[1:], bool))):
            look_back(frames[index], numbers[index], frames[index + 1], numbers[index + 1])
        return [np.column_stack(frame) for frame in zip(frames, numbers, strict=True)]

    def _number(self, detections: np.ndarray, is_cut: bool) -> np.ndarray:
        if is_cut:
            self._tracker.reset()
            self._numbers = {}
        numbers = np.zeros(len(detections), int)
        boxes = detections[:, :4] + detections[:, 5:] * (
            10.0,
            0,
            10,
            0,
        )  # offset by class, so that boxes of different classes never overlap
        order = {"index": np.arange(len(boxes))}  # the library reorders detections
        tracked = self._tracker.update(sv.Detections(boxes, confidence=detections[:, 4], data=order))
        for index, track in zip(tracked.data.get("index", ()), tracked.tracker_id, strict=True):
            if track >= 0:
                if track not in self._numbers:
                    self._count[detections[index, 5]] += 1
                    self._numbers[track] = self._count[detections[index, 5]]
                numbers[index] = self._numbers[track]
        alive = {track.tracker_id for track in self._tracker.tracks}
        self._numbers = {track: number for track, number in self._numbers.items() if track in alive}
        return numbers

    def trails(self, objects: np.ndarray, output_index: int) -> list[np.ndarray]:
        """Earlier centres of each object, (K, 2), oldest first, relative to the frame. Stores the current centres."""
        oldest = output_index - self._trail_frames
        self._trails = {key: trail for key, trail in self._trails.items() if trail[-1][0] >= oldest}
        trails = []
        for x1, y1, x2, y2, _, *key in objects.tolist():
            trail = [point for point in self._trails.get(tuple(key), ()) if point[0] >= oldest]
            trails.append(np.array(trail).reshape(-1, 3)[:, 1:])
            if key[1]:
                self._trails[tuple(key)] = [*trail, (output_index, (x1 + x2) / 2, (y1 + y2) / 2)]
        return trails


def look_back(detections: np.ndarray, numbers: np.ndarray, later: np.ndarray, later_numbers: np.ndarray) -> None:
    """Copies a new object's number back to the frame before the one that assigned it."""
    cost = differences(detections, later)
    for index in np.flatnonzero(numbers == 0):
        taken = numbers[detections[:, 5] == detections[index, 5]]
        is_new = (later_numbers > 0) & ~np.isin(later_numbers, taken) & (cost[index] < 1)
        if is_new.any():
            numbers[index] = later_numbers[np.where(is_new, cost[index], np.inf).argmin()]


# ------------------------------------------------------------------------------------------------- skipped frames


def fill_gaps(detections: list[np.ndarray | None], cuts: Sequence[bool]) -> list[np.ndarray]:
    """Detections on all frames but the first, with interpolated ones on frames that have None.

    Args:
        detections: (N, 6) on each frame, where it is analysed. The last one is.
        cuts: For each frame but the first, whether a shot begins with it. Nothing moves across a cut.
    """
    filled, analysed = [], [index for index, found in enumerate(detections) if found is not None]
    if analysed[0]:  # the video's first frame has none before it
        filled.append(detections[analysed[0]])
    for first, last in itertools.pairwise(analysed):
        before, after = detections[first], detections[last]
        shots = first + 1 + np.flatnonzero(cuts[first:last])  # where they begin
        for index in range(first + 1, last):
            if not len(shots):
                filled.append(interpolate(before, after, (index - first) / (last - first)))
            else:
                filled.append(before if index < shots[0] else after if index >= shots[-1] else before[:0])
        filled.append(after)
    return filled


def interpolate(before: np.ndarray, after: np.ndarray, fraction: float) -> np.ndarray:
    """Detections at a moment between two frames with detections (N, 6) and (M, 6); float32 (K, 6), best first.

    Matched boxes move linearly. Unmatched boxes stay in place: the earlier ones fade out before the middle of the gap,
    the later ones fade in after it. A low-scoring flicker therefore disappears quickly.
    """
    cost = differences(before, after)
    rows, columns = linear_sum_assignment(np.minimum(cost, 2 * MOST_DIFFERENT))
    is_pair = cost[rows, columns] < MOST_DIFFERENT
    rows, columns = rows[is_pair], columns[is_pair]
    moved = (1 - fraction) * before[rows] + fraction * after[columns]
    alone = np.delete(before, rows, axis=0) if fraction < 0.5 else np.delete(after, columns, axis=0)
    faded = alone * (1, 1, 1, 1, abs(1 - 2 * fraction), 1)
    filled = np.concatenate((moved, faded)).astype(np.float32)
    return filled[np.argsort(-filled[:, 4], kind="stable")]


def differences(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Dissimilarity of detections (N, 6) and (M, 6), as (N, M): centre distance in box sizes, plus the absolute log
    ratios of widths and heights. Infinite between classes."""
    sizes, other_sizes = (np.maximum(found[:, 2:4] - found[:, :2], 1e-6) for found in (some, others))
    ways = (some[:, :2] + some[:, 2:4])[:, None] / 2 - (others[:, :2] + others[:, 2:4]) / 2
    ways = np.linalg.norm(ways / ((sizes[:, None] + other_sizes) / 2), axis=2)
    growth = np.abs(np.log(sizes[:, None] / other_sizes)).sum(axis=2)
    return np.where(some[:, None, 5] == others[:, 5], ways + growth, np.inf)


# -------------------------------------------------------------------------------------------------------- results


@lru_cache(maxsize=CACHED_VIDEOS)
def cached_detections(video: str, modified: float, resolution: str) -> dict[int, np.ndarray]:
    """The detections of all runs of a file at a resolution, by source index. Runs add to it.

    Args:
        modified: When the file was modified: after a change, it is another video.
    """
    return {}


@lru_cache(maxsize=CACHED_VIDEOS)
def step_to_keep_up(video: str, modified: float, resolution: str) -> int:
    """The smallest step between analysed output frames that keeps up with real time.

    Decided once per video, so that later runs find the same frames in the cache. The runs in progress share the model.
    """
    fps = read_video_info(video).fps / RESOLUTIONS[resolution].step
    runs = max(1, min(len(QUEUE), VISITORS_AT_ONCE))
    needed = math.ceil(DETECTOR.seconds_per_frame * runs * fps / KEEP_UP_SHARE)
    return max(1, min(needed, int(MOST_GAP_SECONDS * fps)))


class GpuPace:
    """How many seconds of a ZeroGPU a run requests, from what the calls before it took."""

    def __init__(self):
        self._frames, self._seconds = 300.0, 6.0  # a first guess of 20 ms per output frame

    def learn(self, frames: int, seconds: float) -> None:
        """A call took `seconds`, measured where the GPU is, for `frames` output frames."""
        # Each call counts by its length, and the past fades, so that one short, slow clip changes little.
        self._frames, self._seconds = 0.9 * self._frames + frames, 0.9 * self._seconds + seconds

    def budget_seconds(self, frames: int) -> int:
        """For `frames` output frames: a fixed part for the start and the end, and half as much again per frame."""
        return math.ceil(min(GPU_SECONDS, 2 * GPU_RESERVE_SECONDS + 1.5 * frames * self._seconds / self._frames))


GPU_PACE = GpuPace()
TABLE_HEADERS = ["Class", "Objects", "Most at once", "First (s)", "Last (s)"]
COLUMNS = ["time_seconds", "frame", "label", "track", "score", "x1", "y1", "x2", "y2"]


class Seen(NamedTuple):
    """When and for how long an object has been seen so far."""

    seconds: float  # how long it was seen
    first: float  # second of the video
    last: float


class Report:
    """What a run has found so far, for the page's status, table and plot, and for the files in `folder`."""

    def __init__(
        self,
        video: str,
        conf_threshold: float,
        classes: Sequence[str],
        resolution: str,
        analysed: str = ANALYSED[0],
        tracks: bool = True,
    ):
        self.info, self.conf_threshold, self.classes = read_video_info(video), conf_threshold, list(classes or ())
        self.resolution, self.fps, self.tracks = resolution, self.info.fps / RESOLUTIONS[resolution].step, tracks
        file = (video, os.path.getmtime(video), resolution)
        self.cached, self.step = cached_detections(*file), step_to_keep_up(*file) if analysed == ANALYSED[0] else 1
        self.chunks: list[str] = []
        self.folder, self.failure = "", None
        self.output_frames, self.is_end, self.waits_for_gpu = 0, False, False
        self._started, self._frames, self._source_size = time.monotonic(), 0, (None, None)
        self._rows: list[np.ndarray] = []  # a float32 (N, 9) array per frame: `COLUMNS`, with the label's number
        self._seen: dict[tuple[float, float], Seen] = {}  # by label and number
        # For each point of the plot: which objects were together on a frame.
        self._together: dict[int, set[frozenset]] = {}
        self._seconds_per_point = max(1, math.ceil(self.info.duration_seconds / 200))
        # One flickering frame must not count as an object, but a short video can have objects.
        self._believed_seconds = min(BELIEVED_SECONDS, self.info.duration_seconds / 2)

    def add(self, update: StreamUpdate) -> None:
        self.output_frames, self.is_end = update.output_frames, update.is_end
        self._frames += len(update.frames)
        self.chunks.append(update.chunk)
        for index, seconds, self._source_size, _, objects in update.frames:
            when = np.broadcast_to((seconds, index), (len(objects), 2))
            boxes = np.clip(objects[:, :4], 0, 1) * (self._source_size * 2)
            self._rows.append(np.column_stack((when, objects[:, [5, 6, 4]], boxes)).astype(np.float32))
            keys = frozenset((label, number) for label, number in objects[:, 5:].tolist() if number)
            point = int(seconds) // self._seconds_per_point * self._seconds_per_point
            self._together.setdefault(point, set()).add(keys)
            for key in keys:
                total, first, last = self._seen.get(key, (0.0, seconds, seconds))
                self._seen[key] = Seen(total + min(seconds - last, MOST_GAP_SECONDS), first, seconds)

    @property
    def seconds(self) -> float:
        """How far the video has been analysed."""
        return min(float(self.output_frames / self.fps), self.info.duration_seconds)

    def warn_if_damaged(self) -> None:
        if self.is_end and self.info.expected_seconds - self.seconds > 1.5 / self.fps:
            gr.Warning(f"This video is damaged. Only the first {self.seconds:.1f} seconds could be read.")

    def status(self, ended: str = "") -> str:
        """One line for the page."""
        elapsed, total = time.monotonic() - self._started, self.info.duration_seconds
        speed = self.seconds / elapsed if elapsed else 0.0
        if ended:
            progress = f"{ended}: {self.seconds:.1f} s of video in {elapsed:.1f} s"
            found = sum(map(len, self._rows))
            progress += f", {found:,} detections on {self._frames:,} frames"
            if not found:
                progress += f" · Nothing above {self.conf_threshold:g}. Try a lower threshold."
        elif self.waits_for_gpu:
            progress = f"Waiting for a GPU… · {self.seconds:.1f} of {total:.1f} s"
        elif not self.seconds:
            seconds = min(CHUNK_SECONDS, total)
            needed = math.ceil(seconds * self.fps / self.step) + (self.step > 1)
            done = min(len(self.cached), needed)
            progress = f"First chunk: {done} of {needed} frames"
            if done:
                progress += f", {elapsed / done * (needed - done):.0f} s left"
        else:
            progress = f"{self.seconds:.1f} of {total:.1f} s · {(total - self.seconds) / speed:.0f} s left"
        if self.step > 1:
            progress += f" · analysing every {self.step}{ {2: 'nd', 3: 'rd'}.get(self.step, 'th') } frame"
        return f"{progress} · {speed:.1f}× real time · {DETECTOR.name} on {DEVICE.type}"

    def _believed(self) -> set[tuple[float, float]]:
        """Label and number of each object that was seen long enough."""
        return {key for key, seen in self._seen.items() if seen.seconds >= self._believed_seconds}

    def counts(self) -> pd.DataFrame:
        """The most objects at once, believed ones only: a row per point of the plot, a column per label number."""
        believed = self._believed()
        counts = {
            point: Counter() | reduce(or_, (Counter(label for label, _ in keys & believed) for keys in together))
            for point, together in self._together.items()
        }
        return pd.DataFrame.from_dict(counts, orient="index").fillna(0).astype(int)

    def table(self, counts: pd.DataFrame) -> pd.DataFrame:
        """A row per class: how many objects, the most at once, and when the first and the last one were seen."""
        seen = [(key[0], *self._seen[key]) for key in self._believed()]
        rows = (
            pd.DataFrame(seen, columns=["label", *Seen._fields])
            .groupby("label")
            .agg(objects=("label", "size"), first=("first", "min"), last=("last", "max"))
        )
        rows.insert(1, "most", counts.max())
        rows = rows.rename(index=DETECTOR.id2label).rename_axis("class").reset_index().round(1)
        return rows.sort_values(["objects", "class"], ascending=[False, True]).set_axis(TABLE_HEADERS, axis=1)

    def plot(self, counts: pd.DataFrame) -> dict:
        """An update of the page's plot: the most objects of each class at once, over time."""
        points = range(0, int(self.seconds - 1 / self.fps) + 1, self._seconds_per_point)
        counts = counts.rename(columns=DETECTOR.id2label).reindex(points, fill_value=0)
        rows = counts.rename_axis("second").reset_index().melt("second", var_name="class", value_name="count")
        return gr.update(
            value=rows,
            x_lim=[0, self.info.duration_seconds],  # fixed, so that the axis keeps still
            y_lim=[0, max([5, *rows["count"]])],  # below 5, the axis would have ticks at halves
            visible=len(counts.columns) > 0 or "hidden",
        )

    def plot_colors(self) -> dict:
        """A second update of the plot, with the colours of all classes so far.

        `gr.LinePlot` rebuilds its scales and legend only when a property changes, not with new rows, and with the rows
        of the update before: otherwise, a class that appears later would stay invisible.
        """
        labels = sorted({DETECTOR.id2label[label] for label, _ in self._believed()})
        return gr.update(color_map={label: label_color(label) for label in labels})

    def results(self) -> dict[str, object]:
        """Values for the page's components."""
        counts = self.counts()
        return {"table": self.table(counts), "plot": self.plot(counts), "progress": self.progress()}

    def progress(self) -> str:
        """A bar over the whole video, with the analysed part filled."""
        bar = f'<progress value="{self.seconds:.1f}" max="{self.info.duration_seconds:.1f}"></progress>'
        return f'{bar}<span class="hint">{"" if self.is_end else "Waiting for more…"}</span>'

    def detections(self) -> pd.DataFrame:
        """A row per detection, with the columns of the CSV file; boxes in pixels of the source."""
        table = pd.DataFrame(np.concatenate([np.zeros((0, 9)), *self._rows]), columns=COLUMNS).astype({"frame": int})
        table["label"] = table["label"].map(DETECTOR.id2label).astype(object)
        table["track"] = table["track"].astype("Int64").replace(0, pd.NA)
        return table.round({"time_seconds": 3, "score": 4, "x1": 1, "y1": 1, "x2": 1, "y2": 1})

    def save(self) -> list[str]:
        """Writes the annotated video, and the detections as CSV and JSON. Returns their paths."""
        base, detections = os.path.join(self.folder, Path(self.info.path).stem), self.detections()
        paths = [f"{base}-boxes.mp4", f"{base}.csv", f"{base}.json"]
        join_chunks(self.chunks, paths[0])
        detections.to_csv(paths[1], index=False)
        content = json.dumps(self.as_dict(detections), ensure_ascii=False)
        Path(paths[2]).write_text(content, encoding="utf-8")
        return paths

    def as_dict(self, detections: pd.DataFrame) -> dict:
        """The content of the JSON file, which README.md describes."""
        boxes = detections[COLUMNS[5:]].to_numpy().tolist()
        others = detections[COLUMNS[:5]].astype(object).where(detections[COLUMNS[:5]].notna(), None)
        (width, height), duration = self._source_size, round(self.info.duration_seconds, 3)
        return {
            "model": DETECTOR.name,
            "threshold": self.conf_threshold,
            "classes": self.classes,
            "analysed_seconds": round(self.seconds, 3),
            "video": {"width": width, "height": height, "fps": float(self.info.fps), "duration_seconds": duration},
            "detections": [row | {"box": box} for row, box in zip(others.to_dict("records"), boxes, strict=True)],
        }


# ----------------------------------------------------------------------------------------------------------- runs


class Run:
    """A session's run, from queueing to its end."""

    def __init__(self, session: str):
        self.session, self.is_stopped, self.has_ended = session, False, threading.Event()

    @property
    def is_replaced(self) -> bool:
        return RUNS.get(self.session) is not self


RUNS: dict[str, Run] = {}  # the current run of each session
QUEUE: list[Run] = []  # all runs in the order of their arrival; the first `VISITORS_AT_ONCE` are in progress
RUNS_LOCK = threading.Lock()


@contextlib.contextmanager
def new_run(session: str) -> Iterator[Run]:
    """Makes a run that takes the place of the session's run, if any, once that one has sent its last output."""
    run = Run(session)
    with RUNS_LOCK:
        if len(QUEUE) >= MAX_QUEUE:
            raise gr.Error("Too many people are using this app. Try again in a few minutes.", title="Busy")
        previous, RUNS[session] = RUNS.get(session), run
        QUEUE.append(run)
    try:
        if previous:
            previous.is_stopped = True
            previous.has_ended.wait(timeout=2)
        yield run
    finally:
        run.has_ended.set()
        with RUNS_LOCK:
            QUEUE.remove(run)
            if not run.is_replaced:
                del RUNS[session]


def stop_run(request: gr.Request) -> None:
    """Ends the session's run. Everything that it has streamed stays."""
    if run := RUNS.get(request.session_hash):
        run.is_stopped = True


# Updates of the page's components
CLEARED = {"processed": gr.update(value=None), "table": None, "plot": gr.update(visible="hidden"), "progress": ""}
RUNNING = {"start": gr.update(interactive=False), "stop": gr.update(interactive=True), "files": None}
IDLE = {"start": gr.update(interactive=True), "stop": gr.update(interactive=False)}


def follow(run: Run, *settings: object, join_seconds: float = 0) -> Iterator[dict[str, object]]:
    """A run from the queue to its end, as new values for the page: status, chunks, results so far, and then files.

    Args:
        settings: As `Report` takes them.
        join_seconds: As `stream_object_detection` takes it.

    Raises:
        gr.Error: At the end, if something failed.
    """
    try:
        while not run.is_stopped and (position := QUEUE.index(run) - VISITORS_AT_ONCE + 1) > 0:
            yield {"status": f"Waiting in the queue: position {position}."}
            time.sleep(HEARTBEAT_SECONDS)
        for report in in_thread(Report, *settings):
            yield {"status": report.status() if report else "Reading the video…"}
        with contextlib.closing(prefetch(stream_into(report, join_seconds), HEARTBEAT_SECONDS)) as updates:
            while not (run.is_stopped or report.is_end or report.failure):
                update = next(updates)
                if update:
                    report.add(update)
                    yield {"processed": update.chunk, **report.results()}
                    yield {"plot": report.plot_colors()}
                yield {"status": report.status(), "progress": report.progress()}
            ended = "Ended early" if report.failure else "Stopped" if run.is_stopped else "Done"
            yield {"status": report.status(ended), **report.results(), **IDLE}
            report.warn_if_damaged()
            for files in in_thread(report.save) if report.chunks else ():
                yield {"files": files} if files else {}
        if report.failure:
            if report.chunks:
                report.failure.message += (
                    f" The first {report.seconds:.0f} seconds are complete. Run again resumes from there."
                )
            raise report.failure
    except Exception as error:
        error = user_facing_error(error)
        error.visible = error.print_exception = False  # the status line and the log have it
        yield {"status": error.message, **IDLE}
        raise error from None


def stream_into(report: Report, join_seconds: float = 0) -> Generator[StreamUpdate | None]:
    """Streams a video to its end. An error becomes the report's failure.

    Then it yields None: `report.folder` has the chunks until this generator is closed.
    """
    with tempfile.TemporaryDirectory(prefix="chunks-") as report.folder:
        try:
            yield from stream_in_calls(report, join_seconds)
        except Exception as error:
            report.failure = user_facing_error(error)
        while True:
            yield None


def stream_in_calls(report: Report, join_seconds: float) -> Generator[StreamUpdate]:
    """On ZeroGPU, cached frames without a GPU, and the rest in as many calls as needed; elsewhere, a single call."""
    info, start, is_end, with_gpu, update = report.info, 0, False, not ON_ZEROGPU, None
    while not is_end:
        budget_seconds = math.inf if with_gpu else 0
        if with_gpu and ON_ZEROGPU:
            budget_seconds = GPU_PACE.budget_seconds(round(info.duration_seconds * report.fps) - start)
        stream = stream_object_detection if with_gpu else unwrap(stream_object_detection)
        report.waits_for_gpu, first = with_gpu and ON_ZEROGPU, None
        updates = stream(
            info.path, report.conf_threshold, report.classes, report.resolution, report.tracks, step=report.step,
            start=start, tracker=update and update.tracker,
            cached=dict(report.cached) if ON_ZEROGPU else report.cached,  # a copy: it is pickled while others add to it
            folder=report.folder, join_seconds=join_seconds, budget_seconds=budget_seconds,
        )  # fmt: skip
        with contextlib.closing(updates):
            for update in updates:
                report.waits_for_gpu, first = False, first or update
                report.cached.update((frame.source_index, frame.detections) for frame in update.frames)
                start, is_end = update.output_frames, update.is_end
                yield update
        if with_gpu and not first:
            raise gr.Error("The GPU was not fast enough for a single frame.", title="No result")
        if with_gpu:  # the first update contains the start of the GPU
            GPU_PACE.learn(update.output_frames - first.output_frames, update.gpu_seconds - first.gpu_seconds)
        with_gpu = not with_gpu or not ON_ZEROGPU


def user_facing_error(error: Exception) -> gr.Error:
    """What to tell a visitor; the log has the rest."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, VideoError):
        return gr.Error(str(error), title="Cannot read this video")
    log.error("a run failed", exc_info=error)
    if is_out_of_memory(error):
        return gr.Error("The server is out of memory. Try again in a minute.", title="Out of memory")
    if isinstance(error, (OSError, subprocess.CalledProcessError)):
        return gr.Error("The server could not store the result. Its disk may be full.", title="Disk full")
    return gr.Error("Something went wrong on the server; its log has the details.", title="Error")


# ----------------------------------------------------------------------------------------------------------- page

OUTPUTS = ("processed", "status", "table", "plot", "files", "progress", "start", "stop")


def page_update(**values: object) -> tuple:
    """A value for each component in `OUTPUTS`; those that are not named stay as they are."""
    return tuple(copy(values.get(name, gr.skip())) for name in OUTPUTS)  # copies, because Gradio empties updates


def stream_to_page(
    video: str | None,
    conf_threshold: float,
    classes: list[str],
    resolution: str,
    analysed: str,
    tracks: bool,
    playhead_seconds: float,
    request: gr.Request,
) -> Iterator[tuple]:
    """Detect objects on a video and watch them: the annotated video as an HLS stream, chunk by chunk.

    Args:
        video: A video file.
        conf_threshold: Detections with a score above this, 0 to 1, are drawn.
        classes: Names of the classes to draw; empty for all.
        resolution: "Half (fast)" (half the size, every second frame) or "Full".
        analysed: "As many as keep up" with real time, or "Every frame".
        tracks: Draw the objects' numbers and trails.
        playhead_seconds: Where the viewer is in the same video: cached frames up to there come at once. Negative for
            another video.
    """
    with new_run(request.session_hash) as run:
        time.sleep(SETTLE_SECONDS)
        if run.is_replaced:
            yield page_update()  # without any output, Gradio would empty all components
            return
        if video is None:
            yield page_update(status=WELCOME, **CLEARED, **IDLE, files=None)
            return
        yield page_update(**RUNNING, **(CLEARED if playhead_seconds < 0 else {}))
        settings = (video, conf_threshold, classes, resolution, analysed, tracks)
        for values in follow(run, *settings, join_seconds=playhead_seconds):
            if run.is_replaced:
                break
            yield page_update(**values)
    # When a run ends, Gradio sends its last output again, perhaps after the first one of its successor.
    yield page_update()


def detect_video(
    video: str, conf_threshold: float, classes: list[str], resolution: str, analysed: str, tracks: bool
) -> Iterator[tuple[str, dict] | tuple[None, None]]:
    """Detect objects on a whole video, for programs.

    Args:
        video: A video file.
        conf_threshold: Detections with a score above this, 0 to 1, are drawn and returned.
        classes: Names of the classes to find; empty for all.
        resolution: "Half (fast)" (half the size, every second frame) or "Full".
        analysed: "As many as keep up" with real time, or "Every frame".
        tracks: Draw the objects' numbers and trails.

    Returns:
        The annotated video as one mp4 file with sound, and the detections, as README.md describes them.
    """
    with new_run(uuid.uuid4().hex) as run:
        for values in follow(run, video, conf_threshold, classes, resolution, analysed, tracks):
            if files := values.get("files"):
                annotated, _, detections = files
                yield annotated, json.loads(Path(detections).read_text(encoding="utf-8"))
            else:
                yield None, None  # so that Gradio notices a client that has left


class BlockScreenRecordingRoute:
    """ASGI middleware. Gradio's screen recorder hands any upload to ffmpeg, which would follow a playlist in it."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        blocked = scope["type"] == "http" and "/process_recording" in scope["path"]
        await (PlainTextResponse("Not found", 404) if blocked else self.app)(scope, receive, send)


WEBCAM = gr.WebcamOptions(constraints={"video": {"width": {"ideal": 1280}, "height": {"ideal": 720}}})
WELCOME = "Upload a video, record one, or click an example."
STREET_VIDEO = "https://github.com/intel-iot-devkit/sample-videos/raw/master/person-bicycle-car-detection.mp4"
HEAD = """
<script>
const player = () => document.querySelector("#processed video");
const seek = (seconds) => { if (player()) player().currentTime = seconds; };

// A new stream begins at 0:00, and Gradio has no property for the playhead. After a change of the settings, the
// playhead is sent with them, and the new stream goes on there.
let left = null;  // the previous stream: its URL and position in seconds
const startOver = (inputs) => {
    left = null;
    document.querySelector("#processed").scrollIntoView({behavior: "smooth", block: "nearest"});
    return [...inputs.slice(0, -1), -1];
};
const resume = (inputs) => {
    const video = player();
    if (!left && video && !video.ended) left = {src: video.currentSrc, seconds: video.currentTime};
    return [...inputs.slice(0, -1), left?.seconds ?? 0];
};
const restorePosition = ({target: video, type}) => {
    if (!left || video !== player() || video.currentSrc === left.src) return;
    if (video.seekable.length && video.seekable.end(0) > left.seconds) seek(left.seconds);
    else if (type !== "ended") return;
    left = null;
};
for (const type of ["canplay", "progress", "ended"]) document.addEventListener(type, restorePosition, true);

// Gradio's player does not say that it has caught up with the stream. For an upload that the browser cannot play (but
// this app may), it shows "Video not playable" and a duration of NaN.
for (const type of ["waiting", "playing", "error", "loadedmetadata"]) document.addEventListener(type, (event) => {
    if (event.target === player()) document.body.classList.toggle("stalled", type === "waiting");
    else if (event.target.closest?.("#source")) {
        document.body.classList.toggle("unplayable", type === "error");
        if (type === "error") event.stopImmediatePropagation();
    }
}, true);

// Gradio's example buttons have no names, and are made at any time after the page has loaded.
new MutationObserver(() => document.querySelectorAll(".gallery-item:not([aria-label]) video[src]").forEach((video) =>
    video.closest(".gallery-item").setAttribute("aria-label", video.src.split("/").pop()))
).observe(document, {childList: true, subtree: true});

// The select events of a table and a plot go through the server, and a plot's is for regions only.
document.addEventListener("click", ({target, clientX}) => {
    const cells = target.closest("#table [role=row]")?.querySelectorAll("[role=gridcell]");
    const bar = document.querySelector("#progress progress");
    const ruler = target === bar ? bar : target.closest("#plot") && document.querySelector("#plot .root .background");
    if (cells?.length) seek(parseFloat(cells[cells.length - 2].innerText));
    if (!ruler) return;
    const {left, width} = ruler.getBoundingClientRect();
    seek(Math.min(1, Math.max(0, (clientX - left) / width)) * bar.max);
});

// Gradio's slider reports each keystroke in its number box, even an empty box or a number out of range, which it then
// refuses with an error over the player. Here, such a value never leaves the box. When the box loses the focus, the
// number is clamped, and an empty box gets its last good one back.
let lastGood;
for (const type of ["focusin", "input", "focusout"]) document.addEventListener(type, (event) => {
    const box = event.target;
    if (!box.matches?.("#threshold input[type=number]")) return;
    if (box.value && +box.value >= +box.min && +box.value <= +box.max) lastGood = box.value;
    else if (type === "input") event.stopImmediatePropagation();
    else if (type === "focusout") {
        box.value = box.value ? Math.min(box.max, Math.max(box.min, box.value)) : lastGood;
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }
}, true);
</script>
"""
CSS = """
#source video { max-height: clamp(180px, 28vw, 430px); object-fit: contain; }
.unplayable #source .controls, #files .label-clear-button { display: none; }
#threshold input[type=range]:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 4px; }
#progress { height: 60px; }
#progress progress { width: 100%; height: 8px; appearance: none; border: none; border-radius: 4px; cursor: pointer; }
#progress progress, ::-webkit-progress-bar { background: var(--neutral-300); border-radius: 4px; }
#progress ::-webkit-progress-value { background: var(--color-accent); border-radius: 4px; }
#progress ::-moz-progress-bar { background: var(--color-accent); border-radius: 4px; }
body:not(.stalled) #progress .hint { visibility: hidden; }
[data-testid=status-tracker].hide { display: none; }
#table [role=row], #plot svg { cursor: pointer; }
#files { height: 264px; }
#table .cell-menu-button { display: none; }
#table .cell-wrap { padding-inline: 4px; }
#table .header-cell .text { white-space: normal; overflow: visible; font-family: var(--font); }
@media (max-width: 700px) {  /* one column: source, player, status, settings, results */
    #columns { flex-direction: column; }
    #columns > .column { display: contents; }
    #settings { order: 1; }
    #results { order: 2; }
}
"""


def build_page() -> gr.Blocks:
    with gr.Blocks(title="Streaming video object detection", delete_cache=(3600, 86400)) as page:
        intro = "Upload a video and watch RT-DETR find the objects in it."
        gr.Markdown(f"# Streaming video object detection\n{intro} <small>Model: {DETECTOR.name}</small>")
        if MODEL_NOTE:
            gr.Markdown(MODEL_NOTE)
        with gr.Row(elem_id="columns"):
            with gr.Column():
                # With `include_audio=False`, Gradio would hand each upload, unchecked, to ffmpeg.
                source = gr.Video(label="Video source", include_audio=True, webcam_options=WEBCAM, elem_id="source")
                if "person" in DETECTOR.id2label.values():
                    gr.Markdown(
                        f"The model knows people, vehicles, animals and things, but not the shapes in these examples. "
                        f"No video at hand? Try this [street]({STREET_VIDEO})."
                    )
                gr.Examples(sorted(map(str, EXAMPLES.glob("*.mp4"))), inputs=source)
                with gr.Column(elem_id="settings"):
                    conf_threshold = gr.Slider(
                        0, 1, value=0.30, step=0.05, label="Confidence threshold", elem_id="threshold",
                        info=f"Nothing below {MIN_SCORE} is kept.",
                    )  # fmt: skip
                    classes = gr.Dropdown(
                        list(DETECTOR.id2label.values()), multiselect=True, label="Classes",
                        info="Leave empty to show everything.",
                    )  # fmt: skip
                    names = ("Faster (half size, every 2nd frame)", "Full quality")
                    choices = list(zip(names, RESOLUTIONS, strict=True))
                    resolution = gr.Radio(choices, value=HALF, label="Size and frame rate")
                    analysed = gr.Radio(ANALYSED, value=ANALYSED[0], label="Frames analysed")
                    tracks = gr.Checkbox(True, label="Tracks", info="Show object numbers and trails.")
            with gr.Column():
                height = "clamp(220px, 32vw, 480px)"  # reserved from the start, so that nothing jumps
                processed = gr.Video(
                    label="Detections", streaming=True, autoplay=True, buttons=[], height=height, elem_id="processed"
                )
                progress = gr.HTML(elem_id="progress")
                status = gr.Markdown(WELCOME, elem_id="status")
                with gr.Row():
                    start, stop = gr.Button("Run again", interactive=False), gr.Button("Stop", interactive=False)
                with gr.Column(elem_id="results"):
                    widths = ["25%", "22%", "21%", "16%", "16%"]
                    table = gr.Dataframe(
                        headers=TABLE_HEADERS, column_widths=widths, label="Objects found", interactive=False,
                        elem_id="table",
                    )  # fmt: skip
                    plot = gr.LinePlot(
                        pd.DataFrame(columns=["second", "class", "count"]),
                        x="second", y="count", color="class", x_title="Seconds", y_title="Most at once",
                        y_axis_format="d", height=240, visible="hidden", elem_id="plot",
                    )  # fmt: skip
                    files = gr.File(
                        label="Results (available when the run ends)",
                        file_count="multiple",
                        interactive=False,
                        height=190,
                        elem_id="files",
                    )

        settings = [source, conf_threshold, classes, resolution, analysed, tracks]
        playhead_seconds = gr.Number(0, visible=False, label="Playhead (s)")
        stream = {
            "fn": stream_to_page,
            "inputs": [*settings, playhead_seconds],
            "outputs": [processed, status, table, plot, files, progress, start, stop],
            "trigger_mode": "multiple",  # a new run replaces the one before
            "concurrency_limit": None,  # runs have a queue of their own
            "show_progress": "hidden",
        }
        gr.on(
            [source.change, start.click], **stream, js="(...inputs) => startOver(inputs)",
            api_name="stream_object_detection",
        )  # fmt: skip
        changes = [setting.change for setting in settings[1:]]
        gr.on(changes, **stream, js="(...inputs) => resume(inputs)", api_visibility="private")
        stop.click(stop_run, queue=False, show_progress="hidden", api_visibility="private")
        outputs = [gr.Video(visible=False), gr.JSON(visible=False)]
        gr.Button(visible=False).click(detect_video, settings, outputs, concurrency_limit=None, api_name="detect_video")
    return page


demo = build_page()

if __name__ == "__main__":
    middleware = [Middleware(BlockScreenRecordingRoute)]
    demo.launch(
        css=CSS, head=HEAD, max_file_size=MAX_UPLOAD, app_kwargs={"middleware": middleware}, max_threads=40 + MAX_QUEUE
    )
