"""Streaming object detection on video with RT-DETR.

Read from top to bottom, this file follows the data: settings, model, the `@spaces.GPU` generator, results, runs, page.
Files and frames are in `video.py`, the queue and background threads in `runs.py`, drawing is in `draw_boxes.py`.

- A frame gets its time in `video._read_packets`; `video.sample_frames` chooses by it.
- `select_detections` filters the boxes by threshold and class.
- `stream_object_detection` yields the chunks. On ZeroGPU, `stream_across_calls` calls it several times. `follow` turns
  each chunk into new values for the page's components, such as `player`, and `stream_to_page` sends them.
"""

from __future__ import annotations

import base64
import contextlib
import errno
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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from inspect import unwrap
from pathlib import Path
from typing import NamedTuple

import spaces  # isort: skip  # before torch: on ZeroGPU it emulates CUDA outside the GPU function

import cv2
import gradio as gr
import imageio_ffmpeg
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

from draw_boxes import draw_bounding_boxes, label_color
from runs import BusyError, Prefetcher, Run, RunQueue
from tracking import CutFinder, Detections, ObjectTracker, fill_gaps
from video import CPU_COUNT, AudioReader, ChunkWriter, Frame, VideoError, join_chunks, read_video_info, sample_frames

log = logging.getLogger("rt-detr-stream")

# ------------------------------------------------------------------------------------------------------- settings

DEFAULT_MODEL_ID = "PekingU/rtdetr_r50vd"
DEFAULT_CPU_MODEL_ID = "PekingU/rtdetr_r18vd_coco_o365"  # COCO AP 49.0 instead of 53.1, for half of the arithmetic
EXAMPLES = Path(__file__).parent / "examples"
SHIPPED_MODEL = EXAMPLES / "shapes-rtdetr"

RESOLUTIONS = {"Half (fast)": 2, "Full": 1}  # divisors of the source's width, height and frame rate
HALF = next(iter(RESOLUTIONS))
CHUNK_SECONDS = 2  # of output, in each mp4 that is streamed
MIN_SCORE = 0.05  # detections below this are neither cached, drawn nor reported

# Pixels of model input per forward pass. A GPU takes a whole chunk at R50's 640x640. On a CPU, each core takes a pass
# of its own, so that cores do not wait for each other at each layer: one frame of 640x640, or eight of 256x256.
PASS_PIXELS = {"cuda": 60 * 640 * 640, "mps": 16 * 640 * 640, "cpu": 8 * 256 * 256}
BATCH_BYTES = 128 << 20  # of decoded frames per batch
KEEP_UP, EVERY_FRAME = "As many as keep up", "Every frame"
KEEP_UP_SHARE = 0.6  # of real time for the model; the rest is for reading, drawing, encoding, and possibly the browser
MAX_GAP_SECONDS = 0.5  # between analysed frames

BELIEVED_SECONDS = 1.0  # how long an object must be seen to count

CACHED_VIDEOS = 16  # whose detections stay in memory, about a kilobyte per frame

ON_ZEROGPU = spaces.config.Config.zero_gpu  # `spaces` has no public name for it
GPU_SECONDS = 60  # of a ZeroGPU per call, at most: a request that exceeds the visitor's quota is refused
GPU_RESERVE_SECONDS = 4  # of GPU_SECONDS, to finish the last chunk
GPU_SECONDS_PER_FRAME = 0.02  # of output, until it is measured
CONCURRENT_RUNS = 32 if ON_ZEROGPU else 4  # others wait in a queue
MAX_RUNS = 100  # including those that wait
SETTLE_SECONDS = 0.1  # debounce: each step of a dragged slider starts a run, which waits this long for another
HEARTBEAT_SECONDS = 0.25  # longest interval between status updates, and between checks for Stop
PICTURE_AFTER_SECONDS = 1  # the first frame is shown as a picture if the first chunk takes longer
MAX_UPLOAD = "2gb"

# ---------------------------------------------------------------------------------------------------------- model


HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "mps" if torch.backends.mps.is_available() else "cpu")


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
        self.half_dtype = half_dtype()
        self._optimize()
        self.passes_at_once = CPU_COUNT if DEVICE.type == "cpu" else 1
        self.batch_frames = self.passes_at_once * max(1, PASS_PIXELS[DEVICE.type] // math.prod(self.input_size))
        self._lock = threading.Lock()  # visitors take turns: two passes at once take twice the memory
        self.seconds_per_frame = 0.0  # negligible on CUDA, so not measured there
        if not HAS_CUDA:
            frames = [np.zeros((*self.input_size, 3), np.uint8)] * self.batch_frames
            for _ in range(2):  # the first pass is slower
                began = time.monotonic()
                self(frames)
                self.seconds_per_frame = (time.monotonic() - began) / len(frames)

    def __call__(self, frames: list[np.ndarray]) -> list[Detections]:
        """The detections on each of these frames, best first; in halves if memory is short.

        Args:
            frames: Of one size, uint8 (height, width, 3) BGR.
        """
        try:
            size = math.ceil(len(frames) / self.passes_at_once)
            parts = [frames[start : start + size] for start in range(0, len(frames), size)]
            with self._lock:
                if len(parts) == 1:  # in this thread: cuDNN caches its plans per thread; R50's take 110 ms on an H200
                    return self._forward_pass(frames)
                with ThreadPoolExecutor(len(parts)) as pool:
                    return list(itertools.chain.from_iterable(pool.map(self._forward_pass, parts)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(frames) == 1:
                raise
        half = len(frames) // 2
        return self(frames[:half]) + self(frames[half:])

    @torch.inference_mode()
    def _forward_pass(self, frames: list[np.ndarray]) -> list[Detections]:
        pixels = self._preprocess(frames)
        outputs = self.model(pixel_values=pixels)
        if self.half_dtype == torch.float16 and not outputs.logits.isfinite().all():
            log.warning("%s exceeds the range of float16. It runs in float32 from now on.", self.name)
            self.half_dtype = None
            outputs = self.model(pixel_values=pixels)
        results = self.processor.post_process_object_detection(outputs, threshold=MIN_SCORE)
        return [Detections(*(r[key].cpu().numpy() for key in ("boxes", "scores", "labels"))) for r in results]

    def _preprocess(self, frames: list[np.ndarray]) -> torch.Tensor:
        """Resizes and rescales as the official processor does: BGR uint8 NHWC in, RGB float32 NCHW out.

        On uint8, the antialiased bilinear resize gives the same bytes as PIL, at less than half the time.
        """
        batch = [torch.from_numpy(frame) for frame in frames]
        if DEVICE.type == "cuda":  # where the uint8 resize does not exist
            batch = [frame.to(DEVICE).float() for frame in batch]
        batch = torch.stack(batch).permute(0, 3, 1, 2)
        batch = F.interpolate(batch, self.input_size, mode="bilinear", antialias=True).flip(1).to(DEVICE).float()
        if self.processor.do_rescale:
            batch = batch * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = self.processor.image_mean, self.processor.image_std
            mean, std = (torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (mean, std))
            batch = (batch - mean) / std
        return batch

    @torch.no_grad()
    def _optimize(self) -> None:
        """Uses channels last and in-place activations, folds the batch norms, and halves the precision of the backbone
        and the encoder.

        The decoder stays in float32: it chooses between queries that are nearly alike (in bfloat16, 2 % of the
        detections changed), and its values can exceed the range of float16.
        """
        if DEVICE.type == "cpu":
            torch.set_num_threads(1)  # per pass
        self.model.to(memory_format=torch.channels_last)
        for module in self.model.modules():
            if isinstance(module, torch.nn.ReLU):
                module.inplace = True
        if self.half_dtype != torch.bfloat16:
            fold_batch_norms(self.model)
        if self.half_dtype:
            model = self.model.model
            for part in (model.backbone, model.encoder):
                part.forward = self._in_half_precision(part.forward)
            for projection in (*model.encoder_input_proj, *model.decoder_input_proj):
                projection.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))

    def _in_half_precision(self, forward: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            with torch.autocast(DEVICE.type, self.half_dtype, enabled=self.half_dtype is not None):
                return forward(*args, **kwargs)

        return wrapper


def half_dtype() -> torch.dtype | None:
    """float16 on CUDA, bfloat16 on CPUs that have instructions for it."""
    if DEVICE.type == "cuda":
        return torch.float16
    cpu_info = Path("/proc/cpuinfo")
    is_fast = DEVICE.type == "cpu" and cpu_info.exists() and "avx512_bf16" in cpu_info.read_text()
    return torch.bfloat16 if is_fast else None


def fold_batch_norms(model: torch.nn.Module) -> None:
    """Merges each batch norm into the convolution before it."""
    for module in model.modules():
        for (_, conv), (name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, torch.nn.Conv2d) and hasattr(norm, "running_mean"):
                eps = getattr(norm, "eps", 1e-5)  # RT-DETR's frozen batch norms have no attribute for it
                statistics = (norm.running_mean, norm.running_var, eps, norm.weight, norm.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                setattr(module, name, torch.nn.Identity())


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch raises RuntimeErrors that mention memory, whatever the device. OpenCV and the system have their own."""
    if isinstance(error, OSError):  # its message may have a file's name
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, cv2.error)) and "memory" in str(error))


def load_detector() -> tuple[Detector, str]:
    """Returns the detector that `MODEL_ID` names, or the default one, and a note for the page, usually empty.

    Without `MODEL_ID`, if the Hub is unreachable and the default checkpoint is not cached, this is the detector that
    ships with the app. Any other problem ends the program: it must not be mistaken for a missing network.
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


if missing := [tool for tool in ("ffmpeg", "ffprobe") if not shutil.which(tool)]:
    sys.exit(f"This app requires {' and '.join(missing)}, which cannot be found. Please install ffmpeg.")

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
transformers.utils.logging.disable_progress_bar()
DETECTOR, MODEL_NOTE = load_detector()

# ------------------------------------------------------------------------------------------------------ generator


class FrameDetections(NamedTuple):
    """What the model found on one frame."""

    source_index: int  # number of the frame in the source, from 0
    pts_seconds: float  # from the first frame of the source
    source_size: tuple[int, int]  # width and height in pixels, upright
    detections: Detections  # as `Detector` returns them, whatever the threshold
    drawn: Detections  # those above the threshold and in the chosen classes, with the numbers of their objects


class StreamUpdate(NamedTuple):
    """What `stream_object_detection` yields."""

    chunk: str  # path of an mp4 file (H.264, FLAC), which the caller removes
    frames: list[FrameDetections]  # analysed since the last update
    output_frames: int  # how many the output has, counted from the beginning of the video
    is_end: bool  # of the video
    elapsed_seconds: float  # since the call began
    tracker: ObjectTracker


class Batch(NamedTuple):
    """Consecutive frames of the output that are detected together: a chunk, or a part of one."""

    frames: list[Frame]
    is_end: bool  # of the video
    detections: Sequence[Detections] = ()  # on each frame; this and the rest is added by `detect_batches`
    analysed: Sequence[bool] = ()  # whether the model found them, not interpolated, and not on a frame shown again
    cuts: Sequence[bool] = ()  # whether a new shot begins with the frame
    is_cached: bool = False  # whether no frame needed the model


@spaces.GPU(duration=lambda *_, budget_seconds=GPU_SECONDS, **__: budget_seconds)
def stream_object_detection(
    video: str,
    conf_threshold: float,
    classes: Sequence[str] = (),
    resolution: str = HALF,
    tracks: bool = True,
    *,
    step: int = 1,
    after: StreamUpdate | None = None,
    cached: dict[int, Detections] | None = None,
    folder: str | None = None,
    join_seconds: float = 0,
    budget_seconds: float = GPU_SECONDS if ON_ZEROGPU else math.inf,
) -> Iterator[StreamUpdate]:
    """Detects objects on a video and draws them. Yields a `StreamUpdate` per chunk of about two seconds.

    Args:
        video: Path of a video file.
        conf_threshold: Detections with a score above this, 0 to 1, are drawn.
        classes: Names of the classes to draw, from the checkpoint's `id2label`; empty for all.
        resolution: A key of `RESOLUTIONS`.
        tracks: Draw the objects' numbers and trails.
        step: One in this many output frames is analysed; boxes on the others are interpolated.
        after: The last update of an earlier call, which this one resumes.
        cached: Detections by source index. These frames skip the model; new detections are added.
        folder: Where to write the chunks; by default the system's temporary folder.
        join_seconds: Cached frames up to this second of the video come as one long chunk.
        budget_seconds: The stream ends shortly before this time limit; with 0, at the first frame not in `cached`.

    Raises:
        gr.Error: If the file is not a video that can be decoded, or something else fails.
    """
    began, cached = time.monotonic(), {} if cached is None else cached
    try:
        info = read_video_info(video)
        scale, fps = Fraction(1, RESOLUTIONS[resolution]), info.fps / RESOLUTIONS[resolution]
        chunk_frames = step * max(1, round(CHUNK_SECONDS * fps / step))
        end, tracker = (after.output_frames, after.tracker) if after else (0, ObjectTracker(fps))
        audio = AudioReader(info, end / fps) if info.audio_channels else None
        batches = Prefetcher(read_batches(sample_frames(info, fps, scale, end), end, step, chunk_frames))
        detected = Prefetcher(detect_batches(batches, cached, step, began + budget_seconds - GPU_RESERVE_SECONDS))
        with contextlib.closing(detected):
            for first in detected:
                found = []
                with ChunkWriter(folder, first.frames[0].image.shape[1::-1], fps, info.audio_channels) as writer:
                    for batch in itertools.chain([first], detected):
                        found += draw_batch(batch, conf_threshold, classes, tracker, tracks)
                        for frame in batch.frames:
                            writer.write(frame.image)
                        end += len(batch.frames)
                        if audio:
                            writer.write_audio(audio.read_until(end / fps))
                        is_joined = batch.is_cached and end / fps <= join_seconds
                        if batch.is_end or (end % chunk_frames == 0 and not is_joined):
                            break
                yield StreamUpdate(writer.path, found, end, batch.is_end, time.monotonic() - began, tracker)
    except Exception as error:
        raise user_facing_error(error) from error  # from a ZeroGPU's worker, no other error arrives whole


def read_batches(frames: Iterable[Frame], start: int, step: int, chunk_frames: int) -> Iterator[Batch]:
    """The frames of each chunk in one batch, or in several if they are many or large.

    A batch ends with an analysed frame, the last of `step` frames, so that boxes on all others can be interpolated.
    """
    batch: list[Frame] = []
    for (end, frame), following in itertools.pairwise(itertools.chain(enumerate(frames, start + 1), [None])):
        batch.append(frame)
        is_large = len(batch) >= step * DETECTOR.batch_frames or len(batch) * frame.image.nbytes > BATCH_BYTES
        if following is None or end % chunk_frames == 0 or (end % step == 0 and is_large):
            yield Batch(batch, is_end=following is None)
            batch = []


def detect_batches(
    batches: Iterator[Batch], cached: dict[int, Detections], step: int, deadline: float
) -> Iterator[Batch]:
    """The same batches with the detections on their frames. The model's are also added to `cached`.

    Ends at the first batch that needs the model after `deadline` (`time.monotonic`).
    """
    find_cut, before, last_index = CutFinder(), None, -1
    with contextlib.closing(batches):
        for batch in batches:
            to_analyse = [*batch.frames[step - 1 :: step], batch.frames[-1]]
            to_analyse += batch.frames[:1] if before is None else []
            new = {frame.source_index: frame.image for frame in to_analyse if frame.source_index not in cached}
            if new and time.monotonic() > deadline:
                return
            if new:
                cached.update(zip(new, DETECTOR([*new.values()]), strict=True))
            cuts = [find_cut(frame.image) for frame in batch.frames]
            found = [cached.get(frame.source_index) for frame in batch.frames]
            detections = fill_gaps([found[0] if before is None else before, *found], cuts)
            is_new = np.diff([last_index, *(frame.source_index for frame in batch.frames)]) > 0
            analysed = is_new & [boxes is not None for boxes in found]
            yield batch._replace(detections=detections, analysed=analysed, cuts=cuts, is_cached=not new)
            before, last_index = detections[-1], batch.frames[-1].source_index


def select_detections(detections: Detections, conf_threshold: float, classes: Sequence[str]) -> Detections:
    """The detections above the threshold and, unless `classes` is empty, in one of them."""
    is_selected = detections.confidence > conf_threshold
    if classes:
        class_ids = [class_id for class_id, label in DETECTOR.id2label.items() if label in classes]
        is_selected &= np.isin(detections.class_id, class_ids)
    return detections[is_selected]


def draw_batch(
    batch: Batch, conf_threshold: float, classes: Sequence[str], tracker: ObjectTracker, tracks: bool
) -> list[FrameDetections]:
    """Draws the selected detections into the frames. Returns those of the analysed frames."""
    selected = [select_detections(detections, conf_threshold, classes) for detections in batch.detections]
    tracked = tracker.update(selected, batch.cuts)
    found = []
    frames = zip(batch.frames, batch.detections, batch.analysed, tracked, strict=True)
    for frame, detections, is_analysed, drawn in frames:
        draw(frame.image, drawn, tracker.trails(drawn) if tracks else None)
        if is_analysed:
            found.append(FrameDetections(frame.source_index, frame.pts_seconds, frame.source_size, detections, drawn))
    return found


def draw(image: np.ndarray, detections: Detections, trails: Sequence[np.ndarray] | None) -> None:
    """Draws detections into an image, uint8 (height, width, 3) BGR; with the objects' numbers if there are trails."""
    height, width = image.shape[:2]
    boxes = detections.xyxy * (width, height, width, height)
    labels = [DETECTOR.id2label[class_id] for class_id in detections.class_id]
    numbers = None if trails is None else detections.tracker_id
    trails = trails and [trail * (width, height) for trail in trails]
    draw_bounding_boxes(image, boxes, detections.confidence, labels, numbers, trails)


# -------------------------------------------------------------------------------------------------------- results


@lru_cache(maxsize=CACHED_VIDEOS)
def cached_detections(video: str, modified: float, resolution: str) -> dict[int, Detections]:
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
    fps = read_video_info(video).fps / RESOLUTIONS[resolution]
    runs = max(1, min(len(RUNS), CONCURRENT_RUNS))
    needed = math.ceil(DETECTOR.seconds_per_frame * runs * fps / KEEP_UP_SHARE)
    return max(1, min(needed, int(MAX_GAP_SECONDS * fps)))


TABLE_HEADERS = ["Class", "Objects", "Most at once", "First (s)", "Last (s)"]
BOX_COLUMNS = ["x1", "y1", "x2", "y2"]
COLUMNS = ["time_seconds", "frame", "label", "track", "score", *BOX_COLUMNS]


class Report:
    """The settings of a run and what it has found so far, for the page and for the files in `folder`."""

    def __init__(
        self,
        video: str,
        conf_threshold: float,
        classes: Sequence[str],
        resolution: str,
        analysed: str = KEEP_UP,
        tracks: bool = True,
    ):
        self.info, self.conf_threshold, self.classes = read_video_info(video), conf_threshold, list(classes or ())
        self.resolution, self.fps, self.tracks = resolution, self.info.fps / RESOLUTIONS[resolution], tracks
        file = (video, os.path.getmtime(video), resolution)
        self.cached, self.step = cached_detections(*file), step_to_keep_up(*file) if analysed == KEEP_UP else 1
        self.chunks: list[str] = []
        self.folder, self.waits_for_gpu = "", False
        self.output_frames, self.is_end = 0, False
        self._started, self._source_size, self._picture = time.monotonic(), (None, None), ""
        # A float32 (N, 9) array per frame, by source index: `COLUMNS`, with the label's number.
        self._rows: dict[int, np.ndarray] = {}

    def add(self, update: StreamUpdate) -> None:
        self.chunks.append(update.chunk)
        self.output_frames, self.is_end = update.output_frames, update.is_end
        for index, seconds, self._source_size, _, drawn in update.frames:
            time_and_frame = np.broadcast_to((seconds, index), (len(drawn), 2))
            boxes = np.clip(drawn.xyxy, 0, 1) * (self._source_size * 2)
            columns = (time_and_frame, drawn.class_id, drawn.tracker_id, drawn.confidence, boxes)
            self._rows[index] = np.column_stack(columns).astype(np.float32)

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
            found = sum(map(len, self._rows.values()))
            status = f"{ended}: {self.seconds:.1f} s of video in {elapsed:.1f} s"
            status += f", {found:,} detections on {len(self._rows):,} frames"
            if self._rows and not found:
                status += f" · Nothing above {self.conf_threshold:g}. Try a lower threshold."
        elif self.waits_for_gpu:
            status = f"Waiting for a GPU… · {self.seconds:.1f} of {total:.1f} s"
        elif self.seconds:
            status = f"{self.seconds:.1f} of {total:.1f} s · {(total - self.seconds) / speed:.0f} s left"
        else:
            steps = max(1, round(min(CHUNK_SECONDS, total) * self.fps / self.step))
            end, needed = steps * self.step * RESOLUTIONS[self.resolution], steps + (self.step > 1)
            done = min(sum(index < end for index in list(self.cached)), needed)
            status = f"First chunk: {done} of {needed} frames"
            if done:
                status += f", {elapsed / done * (needed - done):.0f} s left"
        if self.step > 1:
            suffix = "th" if self.step % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(self.step % 10, "th")
            status += f" · analysing every {self.step}{suffix} frame"
        return f"{status} · {speed:.1f}× real time · {DETECTOR.name} on {DEVICE.type}"

    def progress(self) -> str:
        """A bar over the whole video, with the analysed part filled.

        Until the stream plays, the first frame is shown above it; the page hides it then.
        """
        if 0 in self.cached and not self.chunks and time.monotonic() - self._started > PICTURE_AFTER_SECONDS:
            self._picture = self._picture or self.first_frame()
        picture = self._picture if len(self.chunks) < 2 else ""
        bar = f'<progress value="{self.seconds:.1f}" max="{self.info.duration_seconds:.1f}"></progress>'
        return f'{picture}{bar}<span class="hint">{"" if self.is_end else "Waiting for more…"}</span>'

    def first_frame(self) -> str:
        """The first frame with its boxes, as an HTML image."""
        frame = next(sample_frames(self.info, self.fps, Fraction(1, RESOLUTIONS[self.resolution])))
        selected = select_detections(self.cached[frame.source_index], self.conf_threshold, self.classes)
        draw(frame.image, selected, None)
        jpeg = base64.b64encode(cv2.imencode(".jpg", frame.image)[1]).decode()
        return f'<img alt="First frame" style="height: {PLAYER_HEIGHT}" src="data:image/jpeg;base64,{jpeg}">'

    def detections(self) -> pd.DataFrame:
        """A row per detection, with the columns of the CSV file; boxes in pixels of the source."""
        table = pd.DataFrame(np.concatenate([np.zeros((0, len(COLUMNS))), *self._rows.values()]), columns=COLUMNS)
        table = table.astype({"frame": int, "track": "Int64"}).replace({"track": {0: pd.NA}})
        table["label"] = table["label"].map(DETECTOR.id2label).astype(object)
        return table.round({"time_seconds": 3, "score": 4} | dict.fromkeys(BOX_COLUMNS, 1))

    def believed(self) -> pd.DataFrame:
        """The detections of objects that were seen long enough. One that flickers up in a frame does not count."""
        found = self.detections().dropna(subset="track")
        objects = [found["label"], found["track"]]
        seconds = found.groupby(objects)["time_seconds"].diff().clip(upper=MAX_GAP_SECONDS)
        enough = min(BELIEVED_SECONDS, self.info.duration_seconds / 2)  # a short video can have objects
        return found[seconds.groupby(objects).transform("sum") >= enough]

    def results(self) -> Iterator[dict[gr.Component, object]]:
        """New values for the page's table and plot."""
        found, duration_seconds = self.believed(), self.info.duration_seconds
        found = found.assign(count=found.groupby(["frame", "label"])["track"].transform("size"))
        classes = found.groupby("label")
        seconds = classes["time_seconds"]
        rows = pd.concat([classes["track"].nunique(), classes["count"].max(), seconds.min(), seconds.max()], axis=1)
        rows = rows.round(1).reset_index().set_axis(TABLE_HEADERS, axis=1)
        yield {table: rows.sort_values(["Objects", "Class"], ascending=[False, True])}
        seconds_per_point = max(1, math.ceil(duration_seconds / 200))
        found["second"] = found["time_seconds"] // seconds_per_point * seconds_per_point
        points = range(0, int(self.seconds - 1 / self.fps) + 1, seconds_per_point)
        counts = found.pivot_table("count", "second", "label", "max").reindex(points).fillna(0).astype(int)
        counts = counts.rename_axis("second").reset_index().melt("second", var_name="class", value_name="count")
        yield {
            plot: gr.update(
                value=counts,
                x_lim=[0, duration_seconds],  # fixed, so that the axis keeps still
                y_lim=[0, max([5, *counts["count"]])],  # below 5, the axis would have ticks at halves
                visible=len(counts) > 0 or "hidden",
            )
        }
        # `gr.LinePlot` rebuilds its scales and legend only when a property changes, not with new rows, and with the
        # rows of the update before: without this second update, a class that appears later would stay invisible.
        yield {plot: gr.update(color_map={label: label_color(label) for label in rows["Class"]})}

    def save(self) -> list[str]:
        """Writes the annotated video, and the detections as CSV and JSON, which README.md describes. Returns paths."""
        base, found = os.path.join(self.folder, Path(self.info.path).stem), self.detections()
        paths = [f"{base}-boxes.mp4", f"{base}.csv", f"{base}.json"]
        join_chunks(self.chunks, paths[0])
        found.to_csv(paths[1], index=False)
        (width, height), duration = self._source_size, round(self.info.duration_seconds, 3)
        found["box"] = found[BOX_COLUMNS].to_numpy().tolist()
        content = {
            "model": DETECTOR.name,
            "threshold": self.conf_threshold,
            "classes": self.classes,
            "analysed_seconds": round(self.seconds, 3),
            "video": {"width": width, "height": height, "fps": float(self.info.fps), "duration_seconds": duration},
            "detections": json.loads(found.drop(columns=BOX_COLUMNS).to_json(orient="records")),
        }
        Path(paths[2]).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return paths


# ----------------------------------------------------------------------------------------------------------- runs


RUNS = RunQueue(CONCURRENT_RUNS, MAX_RUNS)


def new_run(session: object) -> Run:
    """As `RunQueue.new_run`, with a sentence for the visitor if the queue is full."""
    try:
        return RUNS.new_run(session)
    except BusyError:
        message = "Too many people are using this app. Try again in a few minutes."
        raise gr.Error(message, title="Busy") from None


def stop_run(request: gr.Request) -> None:
    RUNS.stop(request.session_hash)


def follow(run: Run, *settings: object, join_seconds: float = 0) -> Iterator[dict[gr.Component, object]]:
    """A run from the queue to its end, as new values for the page: status, chunks, results so far, and then files.

    Args:
        settings: As `Report` takes them.
        join_seconds: As `stream_object_detection` takes it.

    Raises:
        gr.Error: At the end, if something failed.
    """
    try:
        while not run.is_stopped and (position := RUNS.position(run)) > 0:
            yield {status: f"Waiting in the queue: position {position}."}
            time.sleep(HEARTBEAT_SECONDS)
        yield {status: "Reading the video…"}
        report, failure = Report(*settings), None
        with contextlib.closing(prefetch_chunks(report, join_seconds)) as updates:
            try:
                while not (run.is_stopped or report.is_end):
                    if update := next(updates):
                        report.add(update)
                        yield {player: update.chunk}
                        yield from report.results()
                    yield {status: report.status(), progress: report.progress()}
            except Exception as error:
                failure = user_facing_error(error)
            ended = "Ended early" if failure else "Stopped" if run.is_stopped else "Done"
            yield {status: report.status(ended), progress: report.progress(), **buttons(running=False)}
            report.warn_if_damaged()
            if report.chunks:
                yield {files: report.save()}
            else:  # the table and the plot may be those of the run before
                yield from report.results()
        if failure:
            if report.chunks:
                failure.message += (
                    f" The first {report.seconds:.0f} seconds are complete. Press “Run again” to resume from there."
                )
            raise failure
    except Exception as error:
        error = user_facing_error(error)
        error.visible = error.print_exception = False  # the status line and the log have it
        yield {status: error.message, **buttons(running=False)}
        raise error from None


def prefetch_chunks(report: Report, join_seconds: float = 0) -> Prefetcher[StreamUpdate]:
    """Streams a video to its end, one chunk ahead. When it is closed, its chunks are removed with `report.folder`."""
    folder = tempfile.TemporaryDirectory(prefix="chunks-")
    report.folder = folder.name
    # Delivering chunks takes priority over preparing more: the first one arrives 20 % sooner.
    return Prefetcher(
        stream_across_calls(report, join_seconds),
        niceness=10,
        heartbeat_seconds=HEARTBEAT_SECONDS,
        clean_up=folder.cleanup,
    )


def stream_across_calls(report: Report, join_seconds: float) -> Generator[StreamUpdate]:
    """On ZeroGPU, cached frames without a GPU, and the rest in as many calls as needed; elsewhere, a single call."""
    update, seconds_per_frame = None, GPU_SECONDS_PER_FRAME
    for with_gpu in itertools.cycle((False, True) if ON_ZEROGPU else (True,)):
        start, budget_seconds = update.output_frames if update else 0, math.inf if with_gpu else 0
        if with_gpu and ON_ZEROGPU:
            frames = round(report.info.duration_seconds * report.fps) - start
            budget_seconds, report.waits_for_gpu = gpu_budget_seconds(frames, seconds_per_frame), True
        stream = stream_object_detection if with_gpu else unwrap(stream_object_detection)
        updates = stream(
            report.info.path, report.conf_threshold, report.classes, report.resolution, report.tracks,
            step=report.step, after=update, folder=report.folder, join_seconds=join_seconds,
            cached=dict(report.cached) if ON_ZEROGPU else report.cached,  # a copy: it is pickled while others add to it
            budget_seconds=budget_seconds,
        )  # fmt: skip
        with contextlib.closing(updates):
            for update in updates:
                report.waits_for_gpu = False
                report.cached.update((frame.source_index, frame.detections) for frame in update.frames)
                yield update
        if update and update.is_end:
            return
        if with_gpu:
            if not update or update.output_frames == start:
                raise gr.Error("The GPU was not fast enough for a single frame.", title="No result")
            seconds_per_frame = update.elapsed_seconds / (update.output_frames - start)


def gpu_budget_seconds(frames: int, seconds_per_frame: float) -> int:
    """How long to request a ZeroGPU: 1.5 times the expected time, plus a reserve for the start and the last chunk."""
    return math.ceil(min(GPU_SECONDS, 2 * GPU_RESERVE_SECONDS + 1.5 * frames * seconds_per_frame))


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

# Handlers yield new values for components of the page, which are defined below.


def buttons(running: bool) -> dict:
    return {start_button: gr.update(interactive=not running), stop_button: gr.update(interactive=running)}


def cleared() -> dict:
    return {player: gr.update(value=None), table: None, plot: gr.update(visible="hidden"), progress: ""}


def stream_to_page(
    video: str | None,
    conf_threshold: float,
    classes: list[str],
    resolution: str,
    analysed: str,
    tracks: bool,
    playhead_seconds: float,
    request: gr.Request,
) -> Iterator[dict]:
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
        first = {files: None, **buttons(running=video is not None), **(cleared() if playhead_seconds < 0 else {})}
        updates = [{status: WELCOME}]
        if video is not None:
            settings = (video, conf_threshold, classes, resolution, analysed, tracks)
            updates = follow(run, *settings, join_seconds=playhead_seconds)
        for values in itertools.chain([first], updates):
            run.is_sending = True  # before the check: the next run, which does it the other way round, waits for this
            if run.is_replaced:
                break
            yield values
            run.is_sending = False
    # When a run ends, Gradio sends its last output again, perhaps after the next run's first one, so it must change
    # nothing. If a run yielded nothing at all, Gradio would empty all components.
    yield {status: gr.skip()}


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
    with new_run(object()) as run:
        for values in follow(run, video, conf_threshold, classes, resolution, analysed, tracks):
            if files in values:
                annotated, _, detections = values[files]
                yield annotated, json.loads(Path(detections).read_text(encoding="utf-8"))
            else:
                yield None, None  # so that Gradio notices a client that has left


WEBCAM = gr.WebcamOptions(constraints={"video": {"width": {"ideal": 1280}, "height": {"ideal": 720}}})
PLAYER_HEIGHT = "clamp(220px, 32vw, 480px)"  # reserved from the start, so that nothing jumps
WELCOME = "Upload a video, record one, or click an example."
STREET_VIDEO = "https://github.com/intel-iot-devkit/sample-videos/raw/master/person-bicycle-car-detection.mp4"
HEAD = """
<script>
const player = () => document.querySelector("#processed video");
const seek = (seconds) => { if (player()) player().currentTime = seconds; };

// A new stream begins at 0:00, and Gradio has no property for the playhead. After a change of the settings, the
// playhead is sent with them, and the new stream goes on there.
let resumePoint = null;  // the previous stream: its URL and position in seconds
const startOver = (inputs) => {
    resumePoint = null;
    document.body.classList.remove("playing");
    document.querySelector("#processed").scrollIntoView({behavior: "smooth", block: "nearest"});
    return [...inputs.slice(0, -1), -1];
};
const resume = (inputs) => {
    const video = player();
    if (!resumePoint && video && !video.ended) resumePoint = {src: video.currentSrc, seconds: video.currentTime};
    return [...inputs.slice(0, -1), resumePoint?.seconds ?? 0];
};
const restorePosition = ({target: video, type}) => {
    if (!resumePoint || video !== player() || video.currentSrc === resumePoint.src) return;
    const {seconds} = resumePoint;
    if (video.seekable.length && video.seekable.end(0) > seconds) seek(seconds);
    else if (type !== "ended") return;
    resumePoint = null;
};
for (const type of ["canplay", "progress", "ended"]) document.addEventListener(type, restorePosition, true);

// Gradio's player does not say that it has caught up with the stream. For an upload that the browser cannot play (but
// this app may), it shows "Video not playable" and a duration of NaN.
for (const type of ["waiting", "playing", "error", "loadedmetadata"]) document.addEventListener(type, (event) => {
    if (event.target === player()) {
        document.body.classList.toggle("stalled", type === "waiting");
        if (type === "playing") document.body.classList.add("playing");
    }
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
#progress { height: 60px; overflow: visible; }
#progress img { position: absolute; left: 0; bottom: calc(100% + var(--layout-gap)); width: 100%; object-fit: contain;
    pointer-events: none; }
.playing #progress img { display: none; }
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


with gr.Blocks(title="Streaming video object detection", delete_cache=(3600, 86400)) as demo:
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
                    f"No video at hand? Try this [street scene]({STREET_VIDEO})."
                )
            gr.Examples(sorted(map(str, EXAMPLES.glob("*.mp4"))), inputs=source)
            with gr.Column(elem_id="settings"):
                threshold = gr.Slider(
                    0, 1, 0.30, step=0.05, label="Confidence threshold",
                    info=f"Scores below {MIN_SCORE} are discarded.", elem_id="threshold",
                )  # fmt: skip
                classes = gr.Dropdown(
                    list(DETECTOR.id2label.values()), multiselect=True, label="Classes",
                    info="Leave empty to show everything.",
                )  # fmt: skip
                names = ("Faster (half size, every 2nd frame)", "Full quality")
                choices = list(zip(names, RESOLUTIONS, strict=True))
                resolution = gr.Radio(choices, value=HALF, label="Size and frame rate")
                analysed = gr.Radio([KEEP_UP, EVERY_FRAME], value=KEEP_UP, label="Frames analysed")
                tracks = gr.Checkbox(True, label="Tracks", info="Show object numbers and trails.")
        with gr.Column():
            player = gr.Video(
                label="Detections", streaming=True, autoplay=True, buttons=[], height=PLAYER_HEIGHT, elem_id="processed"
            )
            progress = gr.HTML(elem_id="progress")
            status = gr.Markdown(WELCOME, elem_id="status")
            with gr.Row():
                start_button = gr.Button("Run again", interactive=False)
                stop_button = gr.Button("Stop", interactive=False)
            with gr.Column(elem_id="results"):
                table = gr.Dataframe(
                    headers=TABLE_HEADERS, column_widths=["25%", "22%", "21%", "16%", "16%"], label="Objects found",
                    interactive=False, elem_id="table",
                )  # fmt: skip
                plot = gr.LinePlot(
                    pd.DataFrame(columns=["second", "class", "count"]), x="second", y="count", color="class",
                    x_title="Seconds", y_title="Most at once", y_axis_format="d", height=240, visible="hidden",
                    elem_id="plot",
                )  # fmt: skip
                files = gr.File(
                    label="Results (available when the run ends)", file_count="multiple", interactive=False,
                    height=190, elem_id="files",
                )  # fmt: skip

    settings = [source, threshold, classes, resolution, analysed, tracks]
    stream = {
        "fn": stream_to_page,
        "inputs": [*settings, gr.Number(0, visible=False, label="Playhead (s)")],
        "outputs": [player, status, table, plot, files, progress, start_button, stop_button],
        "trigger_mode": "multiple",  # a new run replaces the one before
        "concurrency_limit": None,  # runs have a queue of their own
        "show_progress": "hidden",
    }
    new_source = [source.change, start_button.click]
    gr.on(new_source, **stream, js="(...inputs) => startOver(inputs)", api_name="stream_object_detection")
    changes = [setting.change for setting in settings[1:]]
    gr.on(changes, **stream, js="(...inputs) => resume(inputs)", api_visibility="private")
    stop_button.click(stop_run, queue=False, show_progress="hidden", api_visibility="private")
    results = [gr.Video(visible=False), gr.JSON(visible=False)]
    gr.Button(visible=False).click(detect_video, settings, results, concurrency_limit=None, api_name="detect_video")


def prefer_bundled_ffmpeg() -> None:
    """Puts the ffmpeg of `imageio-ffmpeg` into the PATH, under that name.

    Gradio runs ffmpeg twice per chunk. Before version 7, it sleeps while it muxes sound and video: 1.2 s for 28 s
    of video instead of 0.03 s. Debian 12 has version 5.1, Ubuntu 24.04 has 6.1.
    """
    binary = Path(imageio_ffmpeg.get_ffmpeg_exe())
    if binary.is_absolute():  # else there is none for this platform
        with contextlib.suppress(OSError):  # it is there already, or the folder is read-only
            binary.with_name("ffmpeg").symlink_to(binary.name)
        os.environ["PATH"] = f"{binary.parent}{os.pathsep}{os.environ['PATH']}"


if __name__ == "__main__":
    prefer_bundled_ffmpeg()
    # Gradio's screen recorder hands any upload to ffmpeg, which would follow a playlist in it.
    blocked = Route("/gradio_api/process_recording", lambda _: PlainTextResponse("Not found", 404), methods=["POST"])
    demo.launch(
        css=CSS, head=HEAD, max_file_size=MAX_UPLOAD, app_kwargs={"routes": [blocked]}, max_threads=40 + MAX_RUNS
    )
