"""Streaming object detection on video with RT-DETR.

From top to bottom, this file follows the data: settings, the `@spaces.GPU` generator, the model, runs, the page.

| Room | What is in it |
|---|---|
| `video.py` | files, frames and their times, sound, chunks |
| `tracking.py` | detections over time: cuts, objects' numbers and pictures, crossed lines, boxes on skipped frames |
| `draw_boxes.py` | boxes, tags, trails and lines on a picture |
| `results.py` | what a run has found: objects, tables, files |
| `runs.py` | who runs when: the queue, and threads that stay one step ahead |
| `assets/` | the page's script and style |

From a click to a frame, it is six steps: a handler of the page, `show_run`, `stream_calls` (several on ZeroGPU),
`stream_object_detection`, `detect_batches`, `read_batches`.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import html
import http.client
import itertools
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from inspect import unwrap
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import spaces  # isort: skip  # before torch: on ZeroGPU it emulates CUDA outside the GPU function

import cv2
import gradio as gr
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from gradio import blocks, processing_utils, queueing
from gradio.route_utils import MediaStream
from gradio.state_holder import SessionState
from gradio.utils import get_upload_folder
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    BaseImageProcessor,
    PreTrainedConfig,
    RTDetrImageProcessorPil,
)

from draw_boxes import LINE_COLORS, draw_bounding_boxes, draw_line_counts, draw_lines, label_color
from results import TABLE_HEADERS, FrameDetections, Results
from runs import BusyError, Prefetcher, Run, RunQueue
from tracking import Crossing, CutFinder, Detections, LineCounter, ObjectTracker, Picture, fill_gaps
from video import (
    CPU_COUNT,
    AudioReader,
    ChunkWriter,
    Frame,
    VideoError,
    VideoInfo,
    join_chunks,
    read_video_info,
    sample_frames,
)

log = logging.getLogger("rt-detr-stream")

# ------------------------------------------------------------------------------------------------------- settings

DEFAULT_MODEL_ID = "PekingU/rtdetr_r50vd"
DEFAULT_CPU_MODEL_ID = "PekingU/rtdetr_r18vd_coco_o365"  # COCO AP 49.0 instead of 53.1, for half of the arithmetic
MAX_UPLOAD = "2gb"
CHUNK_SECONDS = 2  # of output, in each mp4 that is streamed
MIN_SCORE = 0.05  # detections below this are neither cached, drawn nor reported
RESOLUTIONS = {"Half (fast)": 2, "Full": 1}  # divisors of the source's width, height and frame rate
HALF = next(iter(RESOLUTIONS))
KEEP_UP, EVERY_FRAME = "As many as keep up", "Every frame"
MAX_GAP_SECONDS = 0.5  # between analysed frames

ON_ZEROGPU = spaces.config.Config.zero_gpu  # `spaces` has no public name for it
GPU_SECONDS = 60  # of a ZeroGPU per call, at most: a request that exceeds the visitor's quota is refused
GPU_RESERVE_SECONDS = 4  # of GPU_SECONDS, to finish the last chunk
CONCURRENT_RUNS = 32 if ON_ZEROGPU else 4  # others wait in a queue
MAX_RUNS = 100  # including those that wait
KEPT_SECONDS = 3600  # uploads and results, after their last use
MIN_FREE_DISK = 0.05  # of the disk, but at most `MIN_FREE_BYTES`; below, a new run is refused
MIN_FREE_BYTES = 1 << 30

# ------------------------------------------------------------------------------------------------------ generator


@dataclass(frozen=True)
class Options:
    """What a viewer chooses besides the video and the confidence threshold: a component and an argument per field."""

    classes: Sequence[str] = ()  # names of the classes to draw, from the checkpoint's `id2label`; empty for all
    resolution: str = HALF  # a key of `RESOLUTIONS`
    analysed: str = KEEP_UP  # or EVERY_FRAME
    tracks: bool = True  # draw the objects' numbers and trails
    video_output: bool = True  # else nothing is drawn and encoded; for programs only
    model: str = field(default_factory=lambda: DETECTOR.name)  # a key of `DETECTORS`
    lines: Sequence[Sequence[float]] = ()  # whose crossings are counted: x1, y1, x2, y2, relative to the frame, 0 to 1


@dataclass(frozen=True)
class Plan:
    """How the server splits the work of a run."""

    step: int = 1  # one in this many output frames is analysed; boxes on the others are interpolated
    after: StreamUpdate | None = None  # the last update of an earlier call, which this one resumes
    # By source index. These frames skip the model; new detections are added.
    cached: dict[int, Detections] = field(default_factory=dict)
    folder: str | None = None  # for the chunks; by default the system's temporary folder
    join_seconds: float = 0  # cached frames up to this second of the video come as one long chunk
    # The stream ends shortly before this time limit; with 0, at the first frame that is not cached.
    budget_seconds: float = GPU_SECONDS if ON_ZEROGPU else math.inf
    info: VideoInfo | None = None  # of the video, if it has been read
    granted: float | None = None  # when the time limit began (`time.monotonic`, alike in all processes); None for now

    def __getstate__(self) -> dict[str, object]:
        """`spaces` 0.51 pickles this right after a GPU was granted: before it forks a worker and initializes CUDA."""
        return vars(self) | {"granted": time.monotonic()}


class StreamUpdate(NamedTuple):
    """What `stream_object_detection` yields."""

    chunk: str  # path of an mp4 file (H.264, FLAC), which the caller removes; empty without `video_output`
    frames: list[FrameDetections]  # analysed since the last update
    pictures: list[Picture]  # of objects that are seen better than before; the caller removes these files, too
    crossings: list[Crossing]  # of the lines
    output_frames: int  # how many the output has, counted from the beginning of the video
    is_end: bool  # of the video
    elapsed_seconds: float  # since the call began
    tracker: ObjectTracker
    counter: LineCounter


def gpu_duration(
    _video: str, _conf_threshold: float, _options: Options | None = None, plan: Plan | None = None
) -> float:
    return (plan or Plan()).budget_seconds


@spaces.GPU(duration=gpu_duration)
def stream_object_detection(
    video: str, conf_threshold: float, options: Options | None = None, *, plan: Plan | None = None
) -> Iterator[StreamUpdate]:
    """Detects objects on a video and draws them. Yields a `StreamUpdate` per chunk of about two seconds.

    Args:
        video: Path of a video file.
        conf_threshold: Detections with a score above this, 0 to 1, are drawn.
        options: The viewer's other choices.
        plan: How the work is split.

    Raises:
        gr.Error: If the file is not a video that can be decoded, or something else fails.
    """
    began = time.monotonic()
    options, plan = options or Options(), plan or Plan()
    detector = DETECTORS[options.model]
    try:
        info = plan.info or read_video_info(video)
        divisor = RESOLUTIONS[options.resolution]
        fps = info.fps / divisor
        chunk_frames = plan.step * max(1, round(CHUNK_SECONDS * fps / plan.step))
        end, tracker, counter = 0, ObjectTracker(fps), LineCounter(options.lines, fps)
        if plan.after:
            end, tracker, counter = plan.after.output_frames, plan.after.tracker, plan.after.counter
        frames = sample_frames(info, fps, Fraction(1, divisor), end)
        audio = AudioReader(info, end / fps) if info.audio_channels and options.video_output else None
        batches = Prefetcher(read_batches(frames, end, plan.step, chunk_frames, detector.batch_frames))
        deadline = (plan.granted or began) + plan.budget_seconds - GPU_RESERVE_SECONDS
        detected = Prefetcher(detect_batches(detector, batches, plan.cached, plan.step, deadline))
        with contextlib.closing(detected):
            for first in detected:
                found, crossings = [], []
                size = first.frames[0].image.shape[1::-1]
                chunk = ChunkWriter(plan.folder, size, fps, info.audio_channels) if options.video_output else None
                with chunk or contextlib.nullcontext():
                    for batch in itertools.chain([first], detected):
                        batch_found, batch_crossings = draw_batch(batch, conf_threshold, options, tracker, counter)
                        found += batch_found
                        crossings += batch_crossings
                        for frame in batch.frames if chunk else ():
                            chunk.write(frame.image)
                        end += len(batch.frames)
                        if audio:
                            chunk.write_audio(audio.read_until(end / fps))
                        # The viewer goes on meanwhile, and while Gradio converts the chunk, which takes as long again.
                        viewer_seconds = plan.join_seconds + 2 * (time.monotonic() - began)
                        is_joined = plan.join_seconds and batch.is_cached and end / fps <= viewer_seconds
                        if batch.is_end or (end % chunk_frames == 0 and not is_joined):
                            break
                path, elapsed = chunk.path if chunk else "", time.monotonic() - began
                pictures = tracker.take_pictures(plan.folder)
                yield StreamUpdate(path, found, pictures, crossings, end, batch.is_end, elapsed, tracker, counter)
    except Exception as error:
        raise user_facing_error(error) from error  # from a ZeroGPU's worker, no other error arrives whole


class Batch(NamedTuple):
    """Consecutive frames of the output that are detected together: a chunk, or a part of one."""

    frames: list[Frame]
    is_end: bool  # of the video
    detections: Sequence[Detections] = ()  # on each frame; this and the rest is added by `detect_batches`
    is_analysed: Sequence[bool] = ()  # whether the model found them, not interpolated, and not on a frame shown again
    cuts: Sequence[bool] = ()  # whether a new shot begins with the frame
    is_cached: bool = False  # whether no frame needed the model


BATCH_BYTES = 128 << 20  # of decoded frames per batch


def read_batches(
    frames: Iterable[Frame], start: int, step: int, chunk_frames: int, batch_frames: int
) -> Iterator[Batch]:
    """The frames of each chunk in one batch, or in several if they are large, or more than `batch_frames` are analysed.

    A batch ends with an analysed frame, the last of `step` frames, so that boxes on all others can be interpolated.
    """
    batch: list[Frame] = []
    for (end, frame), following in itertools.pairwise(itertools.chain(enumerate(frames, start + 1), [None])):
        batch.append(frame)
        is_large = len(batch) >= step * batch_frames or len(batch) * frame.image.nbytes > BATCH_BYTES
        if following is None or end % chunk_frames == 0 or (end % step == 0 and is_large):
            yield Batch(batch, is_end=following is None)
            batch = []


def detect_batches(
    detector: Detector, batches: Iterator[Batch], cached: dict[int, Detections], step: int, deadline: float
) -> Iterator[Batch]:
    """The same batches with the detections on their frames. The model's are also added to `cached`.

    Ends at the first batch that needs the model after `deadline` (`time.monotonic`).
    """
    find_cut = CutFinder()
    before: Detections | None = None  # on the last frame of the batch before
    last_index = -1
    with contextlib.closing(batches):
        for batch in batches:
            wanted = [*batch.frames[step - 1 :: step], batch.frames[-1]]
            if before is None:
                wanted.append(batch.frames[0])
            missing = {frame.source_index: frame.image for frame in wanted if frame.source_index not in cached}
            if missing and time.monotonic() > deadline:
                return
            if missing:
                cached.update(zip(missing, detector([*missing.values()]), strict=True))
            cuts = [find_cut(frame.image) for frame in batch.frames]
            known = [cached.get(frame.source_index) for frame in batch.frames]
            detections = fill_gaps([known[0] if before is None else before, *known], cuts)
            is_first_showing = np.diff([last_index, *(frame.source_index for frame in batch.frames)]) > 0
            is_analysed = is_first_showing & [detections is not None for detections in known]
            yield batch._replace(detections=detections, is_analysed=is_analysed, cuts=cuts, is_cached=not missing)
            before, last_index = detections[-1], batch.frames[-1].source_index


def draw_batch(
    batch: Batch, conf_threshold: float, options: Options, tracker: ObjectTracker, counter: LineCounter
) -> tuple[list[FrameDetections], list[Crossing]]:
    """Draws the selected detections and the lines into the frames.

    Returns the detections on the analysed frames, and who has crossed a line.
    """
    selected = [select_detections(detections, conf_threshold, options) for detections in batch.detections]
    tracked = tracker.update(selected, batch.cuts)
    frames = list(zip(batch.frames, batch.detections, tracked, tracker.track_ids, strict=True))
    analysed = list(itertools.compress(frames, batch.is_analysed))
    tracker.look((frame.source_index, frame.image, drawn) for frame, _, drawn, _ in analysed)
    crossings = []
    for frame, _, drawn, track_ids in frames:
        height, width = frame.image.shape[:2]
        crossings += counter.update(drawn, track_ids, frame.source_index, width / height)
        if options.video_output:
            lines = np.reshape(options.lines, (-1, 4)) * (width, height, width, height)
            draw_lines(frame.image, lines, counter.is_lit)
            draw(frame.image, drawn, options, tracker.next_trails(drawn) if options.tracks else ())
            draw_line_counts(frame.image, lines, counter.counts)
    found = [
        FrameDetections(frame.source_index, frame.pts_seconds, frame.source_size, detections, drawn)
        for frame, detections, drawn, _ in analysed
    ]
    return found, crossings


def select_detections(detections: Detections, conf_threshold: float, options: Options) -> Detections:
    """The detections above the threshold and, unless none are chosen, in one of the classes."""
    is_selected = detections.confidence > conf_threshold
    if options.classes:
        id2label = DETECTORS[options.model].id2label
        class_ids = [class_id for class_id, label in id2label.items() if label in options.classes]
        is_selected &= np.isin(detections.class_id, class_ids)
    return detections[is_selected]


def draw(image: np.ndarray, detections: Detections, options: Options, trails: Sequence[np.ndarray] = ()) -> None:
    """Draws detections into an image, uint8 (height, width, 3) BGR, with the objects' numbers and trails if chosen."""
    height, width = image.shape[:2]
    boxes = detections.xyxy * (width, height, width, height)
    labels = [DETECTORS[options.model].id2label[class_id] for class_id in detections.class_id]
    numbers = detections.tracker_id if options.tracks else None
    pixel_trails = [trail * (width, height) for trail in trails] if options.tracks else None
    draw_bounding_boxes(image, boxes, detections.confidence, labels, numbers, pixel_trails)


# ---------------------------------------------------------------------------------------------------------- model

EXAMPLES = Path(__file__).parent / "examples"
SHIPPED_MODEL = EXAMPLES / "shapes-rtdetr"

# Pixels of model input per forward pass. A GPU takes a whole chunk at R50's 640x640. On a CPU, each core takes a pass
# of its own, so that cores do not wait for each other at each layer: one frame of 640x640, or eight of 256x256.
PASS_PIXELS = {"cuda": 60 * 640 * 640, "mps": 16 * 640 * 640, "cpu": 8 * 256 * 256}

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "mps" if torch.backends.mps.is_available() else "cpu")


FAMILIES = {"rt_detr": "RT-DETR", "rt_detr_v2": "RT-DETRv2", "d_fine": "D-FINE", "deimv2": "DEIMv2"}  # by `model_type`


class Detector:
    """A checkpoint of RT-DETR's family on `DEVICE`.

    Args:
        folder: A local folder in the format of `save_pretrained`.
        name: What the page calls it.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is of another family, or has a setting that is not supported.
    """

    _turn = threading.Lock()  # visitors and models take turns: two passes at once take twice the memory

    def __init__(self, folder: str | Path, name: str):
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in FAMILIES:
            raise ValueError(f"it is a '{config.model_type}' model. Known are {', '.join(FAMILIES.values())}")
        self.processor = processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        check_settings(config, processor)
        self.name, self.family = name, FAMILIES[config.model_type]
        self.id2label = dict(enumerate(distinct(config.id2label[class_id] for class_id in sorted(config.id2label))))
        self.input_size = (processor.size.height, processor.size.width)
        self.half_dtype = half_dtype()
        model, loading = AutoModelForObjectDetection.from_pretrained(
            folder, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
        if loading["mismatched_keys"]:
            raise ValueError("its weights do not fit its config.json. Does id2label name all classes?")
        self.model = model.eval()
        self._optimize()
        self.model.to(DEVICE)  # after all arithmetic: on ZeroGPU, this only marks the weights for the workers
        self.passes_at_once = CPU_COUNT if DEVICE.type == "cpu" else 1
        self.batch_frames = self.passes_at_once * max(1, PASS_PIXELS[DEVICE.type] // math.prod(self.input_size))
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
            with self._turn:
                if len(parts) == 1:  # in this thread: cuDNN caches its plans per thread; R50's take 110 ms on an H200
                    return self._forward_pass(frames)
                with ThreadPoolExecutor(len(parts)) as pool:
                    return list(itertools.chain.from_iterable(pool.map(self._forward_pass, parts)))
        except (RuntimeError, MemoryError) as error:
            if is_cuda_lost():
                log.critical("CUDA is lost in this process, which ends now.", exc_info=error)
                os._exit(1)  # from this thread, nothing else ends a server
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
            # DEIMv2's `conv_encoder` is the backbone with `encoder_input_proj`.
            backbone = model.conv_encoder if self.family == "DEIMv2" else model.backbone
            for part in (backbone, model.encoder):
                part.forward = self._in_half_precision(part.forward)
            for projection in (*getattr(model, "encoder_input_proj", ()), *model.decoder_input_proj):
                projection.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))

    def _in_half_precision(self, forward: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            with torch.autocast(DEVICE.type, self.half_dtype, enabled=self.half_dtype is not None):
                return forward(*args, **kwargs)

        return wrapper


def check_settings(config: PreTrainedConfig, processor: BaseImageProcessor) -> None:
    """Raises a ValueError with the name of a setting that is wrong, or cannot be honoured exactly."""
    is_known = isinstance(processor, RTDetrImageProcessorPil) and processor.do_resize and processor.size.height
    if not is_known or processor.resample != 2 or processor.do_pad:
        raise ValueError(
            "its preprocessor_config.json must have image_processor_type RTDetrImageProcessor, do_resize, size.height "
            "and size.width, resample 2 (bilinear), and no do_pad"
        )
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise ValueError(f"id2label in its config.json must have the keys 0 to {config.num_labels - 1}, one per class")
    if config.anchor_image_size not in (None, size := [processor.size.height, processor.size.width]):
        raise ValueError(f"anchor_image_size in its config.json must be null or {size}, as in preprocessor_config.json")
    if not config.use_focal_loss:
        raise ValueError("use_focal_loss in its config.json must be true: its scores would be wrong")


def distinct(names: Iterable[str]) -> list[str]:
    """The same names, with a number for one that was there before: star, cross, star (2)."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return result


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
    """PyTorch only has an error of its own for CUDA; OpenCV and the system have theirs."""
    if isinstance(error, OSError):  # its message may have a file's name
        return error.errno == errno.ENOMEM
    if isinstance(error, (RuntimeError, cv2.error)):  # but not "an illegal memory access"
        return bool(re.search("out of memory|allocate memory|insufficient memory|alloc_failed", str(error), re.I))
    return isinstance(error, MemoryError)


def is_cuda_lost() -> bool:
    """Whether all use of CUDA fails from now on in this process, as after an illegal memory access."""
    try:
        if HAS_CUDA:
            torch.cuda.synchronize()
    except RuntimeError as error:
        return not is_out_of_memory(error)
    return False


def load_detectors() -> tuple[dict[str, Detector], str]:
    """Returns the detectors that `MODEL_ID` names, or the default one, by name, and a note for the page, usually empty.

    Without `MODEL_ID`, if the Hub is unreachable and the default checkpoint is not cached, this is the detector that
    ships with the app. Any other problem ends the program: it must not be mistaken for a missing network.
    """
    model_ids = [model_id.strip() for model_id in os.environ.get("MODEL_ID", "").split(",") if model_id.strip()]
    sources = model_ids or [DEFAULT_CPU_MODEL_ID if DEVICE.type == "cpu" else DEFAULT_MODEL_ID]
    names = distinct(Path(source).name if os.path.isdir(source) else source for source in sources)
    detectors = {}
    for source, name in zip(sources, names, strict=True):
        try:
            folder = source
            if not os.path.isdir(source):
                folder = snapshot_download(source, allow_patterns=["*.json", "*.safetensors"])
            detectors[name] = Detector(folder, name)
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, HfHubHTTPError):  # there is a network: 429 or 5xx
                reason = str(error.__cause__).strip().splitlines()[0]
                sys.exit(f"The model '{source}' cannot be downloaded, and is not in the local cache: {reason}")
            if model_ids:
                sys.exit(f"The model '{source}' in MODEL_ID is unavailable: no network, and not in the local cache.")
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            sys.exit(f"The model '{source}' cannot be used: {reason}")
    if detectors:
        return detectors, ""
    detector = Detector(SHIPPED_MODEL, SHIPPED_MODEL.name)
    note = (
        f"Note for the operator: **{sources[0]}** is unavailable (no network, and not in the local cache). The small "
        f"detector that ships with the app runs instead. It only knows {', '.join(detector.id2label.values())}. Start "
        "the app once with a network, or set `MODEL_ID` to a local folder."
    )
    log.warning(note.replace("**", "").replace("`", ""))
    return {detector.name: detector}, note


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


if missing := [tool for tool in ("ffmpeg", "ffprobe") if not shutil.which(tool)]:
    sys.exit(f"This app requires {' and '.join(missing)}, which cannot be found. Please install ffmpeg.")

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
transformers.utils.logging.disable_progress_bar()
DETECTORS, MODEL_NOTE = load_detectors()
DETECTOR = next(iter(DETECTORS.values()))  # the default

# ----------------------------------------------------------------------------------------------------------- runs

KEEP_UP_SHARE = 0.6  # of real time for the model; the rest is for reading, drawing, encoding, and possibly the browser
CACHED_VIDEOS = 16  # whose detections stay in memory, a few hundred bytes per frame
GPU_SECONDS_PER_FRAME = 0.02  # of output, until it is measured
HEARTBEAT_SECONDS = 0.25  # longest interval between status updates, and between checks for Stop

RUNS = RunQueue(CONCURRENT_RUNS, MAX_RUNS)


def new_run(session: object) -> Run:
    """As `RunQueue.new_run`, with a sentence for the visitor if the queue or the disk is full."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    if disk.free < min(MIN_FREE_DISK * disk.total, MIN_FREE_BYTES):
        raise gr.Error("The disk of the server is almost full. Try again in an hour.", title="Busy")
    try:
        return RUNS.new_run(session)
    except BusyError:
        message = "Too many people are using this app. Try again in a few minutes."
        raise gr.Error(message, title="Busy") from None


@dataclass
class CachedVideo:
    """What stays of the runs of a file with a model, at a resolution."""

    detections: dict[int, Detections] = field(default_factory=dict)  # by source index; runs add to it
    step: int | None = None  # of the last run that kept up


@lru_cache(maxsize=CACHED_VIDEOS)
def cached_video(video: str, size: int, resolution: str, model: str) -> CachedVideo:
    """The entry of a file of that size. Gradio names uploads by their content: a repeated one is the same video."""
    return CachedVideo()


def step_to_keep_up(video: str, options: Options) -> int:
    """The smallest step between analysed output frames that keeps up with real time.

    The runs in progress share the device.
    """
    fps = read_video_info(video).fps / RESOLUTIONS[options.resolution]
    runs = max(1, min(len(RUNS), CONCURRENT_RUNS))
    needed = math.ceil(DETECTORS[options.model].seconds_per_frame * runs * fps / KEEP_UP_SHARE)
    return max(1, min(needed, int(MAX_GAP_SECONDS * fps)))


class Analysis:
    """A run of a video: its settings, and how far it has come. Only the thread that calls `add` changes it.

    A run for a viewer who is at `join_seconds` of the video needs the frames before at once, so it takes those that are
    cached, with their step. Another run decides on its step anew: the app may be busier than before, or less busy.

    Raises:
        VideoError: If the file is not a video.
    """

    def __init__(self, video: str, conf_threshold: float, options: Options, join_seconds: float = 0):
        self.join_seconds = join_seconds
        self.info, self.conf_threshold, self.options = read_video_info(video), conf_threshold, options
        self.fps = self.info.fps / RESOLUTIONS[options.resolution]
        cached = cached_video(video, os.path.getsize(video), options.resolution, options.model)
        self.cached, self.step = cached.detections, 1
        if options.analysed == KEEP_UP:
            if not (join_seconds and cached.step):
                cached.step = step_to_keep_up(video, options)
            self.step = cached.step
        self.results = Results(self.info, DETECTORS[options.model].id2label)
        self.folder = ""  # of the chunks and the files, while they exist
        self.chunks: list[str] = []
        self.shown = 0  # how many of the chunks the page has
        self.output_frames, self.is_end = 0, False
        self.waits_for_gpu = False
        self._began = time.monotonic()
        self._arrivals: list[tuple[float, float]] = []  # of chunks: the seconds of video, and how long they took

    def stream(self) -> Prefetcher[StreamUpdate | str]:
        """The chunks to the end of the video, one ahead. When this is closed, they are removed with `folder`."""
        folder = tempfile.TemporaryDirectory(prefix="chunks-")
        self.folder = folder.name

        def clean_up() -> None:
            folder.cleanup()
            give_memory_back()

        # Delivering chunks takes priority over preparing more: the first one arrives 20 % sooner.
        return Prefetcher(stream_calls(self), niceness=10, heartbeat_seconds=HEARTBEAT_SECONDS, clean_up=clean_up)

    def add(self, update: StreamUpdate | str | None) -> bool:
        """Takes what `stream` has yielded. Returns whether it was a chunk."""
        if update is None:  # a heartbeat
            return False
        self.waits_for_gpu = update is WAITS_FOR_GPU
        if self.waits_for_gpu:
            return False
        self.chunks.append(update.chunk)
        with contextlib.suppress(OSError):  # a sign of use: Gradio deletes files by the time of their status (ctime)
            os.chmod(self.info.path, os.stat(self.info.path).st_mode)
        self.results.add(update.frames, update.pictures)
        self.results.add_crossings(update.crossings)
        self.output_frames, self.is_end = update.output_frames, update.is_end
        self._arrivals.append((self.seconds, self.elapsed_seconds))
        return True

    @property
    def seconds(self) -> float:
        """How far the video has been analysed."""
        return min(float(self.output_frames / self.fps), self.info.duration_seconds)

    @property
    def elapsed_seconds(self) -> float:
        """How long this has taken."""
        return time.monotonic() - self._began

    @property
    def seconds_left(self) -> float:
        """How long the rest will take, at the pace since the first chunk, which has waited for all to start."""
        (seconds, elapsed), start = self._arrivals[-1], self._arrivals[0] if len(self._arrivals) > 1 else (0, 0)
        pace = (elapsed - start[1]) / (seconds - start[0])
        return max(0.0, (self.info.duration_seconds - seconds) * pace - (self.elapsed_seconds - elapsed))

    @property
    def is_damaged(self) -> bool:
        """Whether the file ends before its end."""
        return self.is_end and self.info.expected_seconds - self.seconds > 1.5 / self.fps

    def next_part(self) -> str:
        """The chunks that the page does not have, as one file."""
        chunks, self.shown = self.chunks[self.shown :], len(self.chunks)
        if len(chunks) == 1:
            return chunks[0]
        path = os.path.join(self.folder, "part.mp4")
        join_chunks(chunks, path, audio_codec="copy")
        return path

    def first_chunk_progress(self) -> tuple[int, int]:
        """How many frames of the first chunk are analysed, and how many need to be."""
        steps = max(1, round(min(CHUNK_SECONDS, self.info.duration_seconds) * self.fps / self.step))
        end, needed = steps * self.step * RESOLUTIONS[self.options.resolution], steps + (self.step > 1)
        return min(sum(index < end for index in list(self.cached)), needed), needed

    @cached_property
    def first_frame_jpeg(self) -> bytes:
        """The first frame with its boxes. Its detections must be cached."""
        frame = next(sample_frames(self.info, self.fps, Fraction(1, RESOLUTIONS[self.options.resolution])))
        detections = self.cached[frame.source_index]
        selected = select_detections(detections, self.conf_threshold, self.options)
        draw(frame.image, selected, replace(self.options, tracks=False))
        return cv2.imencode(".jpg", frame.image)[1].tobytes()

    def save(self) -> dict[str, str]:
        """Writes the files to download, which README.md describes. Returns their paths by kind."""
        base = os.path.join(self.folder, Path(self.info.path).stem)
        saved = {"video": f"{base}-boxes.mp4"} if self.options.video_output else {}
        if saved:
            join_chunks(self.chunks, saved["video"])
        settings = {"threshold": self.conf_threshold, **asdict(self.options)}
        settings |= {"step": self.step, "analysed_seconds": round(self.seconds, 3)}
        return saved | self.results.save(base, settings)


def give_memory_back() -> None:
    """Returns unused memory to the system. glibc keeps it: 570 MB after four runs at once, 108 MB with this."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


WAITS_FOR_GPU = "waits for a GPU"


def stream_calls(analysis: Analysis) -> Generator[StreamUpdate | str]:
    """On ZeroGPU, cached frames without a GPU, and the rest in as many calls as needed; elsewhere, a single call.

    Yields `WAITS_FOR_GPU` before each request for a GPU.
    """
    update, seconds_per_frame = None, GPU_SECONDS_PER_FRAME
    for with_gpu in itertools.cycle((False, True) if ON_ZEROGPU else (True,)):
        start = update.output_frames if update else 0
        plan = Plan(
            step=analysis.step,
            after=update,
            cached=analysis.cached,
            folder=analysis.folder,
            join_seconds=analysis.join_seconds,
            budget_seconds=math.inf if with_gpu else 0,
        )
        if with_gpu and ON_ZEROGPU:
            frames = round(analysis.info.duration_seconds * analysis.fps) - start
            plan = replace(plan, budget_seconds=gpu_budget_seconds(frames, seconds_per_frame))
            yield WAITS_FOR_GPU
        if ON_ZEROGPU:  # a copy of the rest: it is pickled while others add to the cache
            first = analysis.info.pts_seconds.searchsorted(float(start / analysis.fps)) - 2
            rest = {index: found for index, found in list(analysis.cached.items()) if index >= first}
            plan = replace(plan, cached=rest, info=analysis.info)
        updates = call_gpu(analysis, plan, seconds_per_frame) if with_gpu else call(analysis, plan, on_gpu=False)
        with contextlib.closing(updates):
            for update in updates:
                # On ZeroGPU, the worker could only add to its copy.
                analysis.cached.update((frame.source_index, frame.detections) for frame in update.frames)
                yield update
        if update and update.is_end:
            return
        if with_gpu:
            if not update or update.output_frames == start:
                raise gr.Error("The GPU was not fast enough for a single frame.", title="No result")
            seconds_per_frame = update.elapsed_seconds / (update.output_frames - start)


def call(analysis: Analysis, plan: Plan, on_gpu: bool = True) -> Iterator[StreamUpdate]:
    stream = stream_object_detection if on_gpu else unwrap(stream_object_detection)
    return stream(analysis.info.path, analysis.conf_threshold, analysis.options, plan=plan)


def call_gpu(analysis: Analysis, plan: Plan, seconds_per_frame: float) -> Iterator[StreamUpdate]:
    """A call that, if the visitor's quota is too short for it, requests what is left of that, if a chunk fits in."""
    try:
        yield from call(analysis, plan)
    except gr.Error as error:  # the sentence is that of `spaces` 0.51
        left = re.search(r"requested vs\. (\d+)s left", error.message)
        if not left or int(left[1]) < gpu_budget_seconds(round(CHUNK_SECONDS * analysis.fps), seconds_per_frame):
            raise
        yield from call(analysis, replace(plan, budget_seconds=int(left[1])))


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


# ------------------------------------------------------------------------------------------------------ strangers

# What Gradio 6.31 leaves open to strangers, closed: some of it here, the rest by `guard`.
BLOCKED = [
    "/gradio_api/process_recording",  # hands any upload to ffmpeg, which would follow a playlist in it
    "/gradio_api/file=http{link:path}",  # fetches any page for anybody
    "/gradio_api/file/http{link:path}",
    "/gradio_api/stream/{session}/{run}/{component}/playlist-file",  # joins a whole stream into a file that stays
]
ROUTES = [Route(path, lambda _: PlainTextResponse("Not found", 404), methods=["GET", "POST"]) for path in BLOCKED]


async def refuse_link(_url: str, cache_dir: str) -> str:
    raise gr.Error("Links are not accepted. Please upload the file.", title="No links", print_exception=False)


# Any input may be a link, even a slider's. Gradio would download it before the queue, into memory, without a limit.
processing_utils.async_ssrf_protected_download = refuse_link

UNREAD_SECONDS = 60

_send_message = queueing.Queue.send_message


def send_while_somebody_reads(queue: queueing.Queue, event: queueing.Event, message: object) -> None:
    """Ends all runs of a session that has not read its oldest message for `UNREAD_SECONDS`.

    Gradio only notices a client that breaks off reading, not one that never begins or that stays connected.
    """
    session = event.session_hash
    _send_message(queue, event, message)
    messages = queue.pending_messages_per_session.get(session)
    oldest = messages._queue[0] if messages and messages.qsize() else None
    if oldest is None:
        return
    if getattr(messages, "oldest", None) is not oldest:
        messages.oldest, messages.oldest_since = oldest, time.monotonic()
    elif time.monotonic() - messages.oldest_since > UNREAD_SECONDS:
        for other in [event for job in queue.active_jobs for event in job or ()]:
            if other.session_hash == session:
                other.alive = False
        queue.pending_messages_per_session.pop(session, None)
        queue.pending_event_ids_session.pop(session, None)


queueing.Queue.send_message = send_while_somebody_reads


class Segment(dict):
    """A segment of a stream whose "data" is read from the "file" when it is served."""

    def __missing__(self, key: str) -> bytes:
        return Path(self["file"]).read_bytes()


class StreamOnDisk(MediaStream):
    """Gradio keeps all segments in memory: 2.2 GB for an hour at 5 Mbit/s."""

    def __init__(self, desired_output_format: str | None = None):
        super().__init__(desired_output_format)
        os.makedirs(get_upload_folder(), exist_ok=True)
        self.folder = tempfile.mkdtemp(prefix="stream-", dir=get_upload_folder())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    async def add_segment(self, data: dict | None) -> None:
        await super().add_segment(data)
        if data:
            segment = Segment(self.segments[-1], file=f"{self.folder}/{len(self.segments)}")
            Path(segment["file"]).write_bytes(segment.pop("data"))
            self.segments[-1] = segment


blocks.MediaStream = StreamOnDisk


class StreamsOfSession(dict):
    """The streams of a session, by run: a new one replaces those before, of which Gradio would keep all."""

    def setdefault(self, run: str, streams: dict) -> dict:
        if run not in self:
            self.clear()
        return super().setdefault(run, streams)


class Streams(dict):
    """The streams of all sessions.

    Gradio frees those of a session at the end of its heartbeat, and those of a program that has none never. Here, they
    go when they have ended and another session begins to stream.
    """

    def __init__(self, heartbeats: Counter[str]):
        super().__init__()
        self._heartbeats = heartbeats

    def __missing__(self, session: str) -> StreamsOfSession:
        for other, runs in list(self.items()):
            has_ended = all(stream.ended for streams in runs.values() for stream in streams.values())
            if has_ended and not self._heartbeats[other]:
                del self[other]
        self[session] = StreamsOfSession()
        return self[session]


class HeartbeatCounter:
    """Middleware that counts the connections to `/heartbeat` by session."""

    def __init__(self, app: ASGIApp, heartbeats: Counter[str]):
        self._app, self._heartbeats = app, heartbeats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, is_heartbeat, session = scope.get("path", "").partition("/gradio_api/heartbeat/")
        if not is_heartbeat:
            return await self._app(scope, receive, send)
        self._heartbeats[session] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._heartbeats.subtract([session])
            self._heartbeats += Counter()  # without those at 0


# Gradio keeps the last output of each component in each of 10,000 sessions, such as a program's JSON, only for links
# to a page with its values, which nothing here makes. `state_session_capacity` limits the sessions.
SessionState._update_value_in_config = lambda *_: None


def guard(demo: gr.Blocks) -> dict[str, object]:
    """Installs the guards that belong to one app. Returns arguments of FastAPI for `launch(app_kwargs=…)`."""
    heartbeats: Counter[str] = Counter()
    demo.pending_streams = Streams(heartbeats)
    return {"routes": ROUTES, "middleware": [Middleware(HeartbeatCounter, heartbeats=heartbeats)]}


# ----------------------------------------------------------------------------------------------------------- page

SETTLE_SECONDS = 0.1  # debounce: each step of a dragged slider starts a run, which waits this long for another
SKETCH_SIDE = 960  # pixels, of the picture on which lines are drawn
SHORTEST_LINE = 0.02  # of the frame: a double click does not draw
NO_VIDEO = "Choose a video first."
NO_CROSSINGS = "Draw a line under “Counting lines”. Who crosses it is counted here."
PICTURE_AFTER_SECONDS = 1  # the first frame is shown as a picture if the first chunk takes longer
MAX_PICTURES = 200  # of objects, on the page
TICK_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # between the times below the timeline
NO_PICTURES = "<p>A picture of each object appears here once it was seen for a second. Click on it to seek.</p>"
WELCOME = "Upload a video, record one, or click an example."

# Handlers get the fields of `Options` by name, and yield new values for components of the page, defined below.


def start(video: str | None, conf_threshold: float, request: gr.Request, **options: object) -> Iterator[dict]:
    """Another video, or the same one from its beginning, on an empty page."""
    yield from replace_run(request, empty_page(video, options["lines"]), video, conf_threshold, options)


def empty_page(video: str | None, lines: dict[str, list]) -> Iterator[dict]:
    empty = {player: gr.update(value=None), gallery: NO_PICTURES, table: None, timeline: "", line_table: NO_CROSSINGS}
    yield empty | {progress: ""}
    yield show_first_frame(video, lines)


def redraw(
    video: str | None, conf_threshold: float, playhead_seconds: float, request: gr.Request, **options: object
) -> Iterator[dict]:
    """Other settings for the same video. What is shown stays until there is something new.

    `playhead_seconds` is the viewer's position: cached frames up to there come at once.
    """
    yield from replace_run(request, iter(()), video, conf_threshold, options, playhead_seconds)


def replace_run(
    request: gr.Request,
    before: Iterator[dict],
    video: str | None,
    conf_threshold: float,
    options: dict,
    join_seconds: float = 0,
) -> Iterator[dict]:
    """Ends the session's run and shows `before` and then another one. Nothing of the old one reaches the page after."""
    options = Options(**options | {"lines": options["lines"].get(video, ())})
    with new_run(request.session_hash) as run:
        time.sleep(SETTLE_SECONDS)
        first = {files: None, **buttons(running=video is not None), **next(before, {})}
        nothing = {status: WELCOME, start_button: gr.update(interactive=False)}
        shown = [nothing] if video is None else show_run(run, video, conf_threshold, options, join_seconds)
        for values in itertools.chain([first], before, shown):
            run.is_sending = True  # before the check: the next run, which does it the other way round, waits for this
            if run.is_replaced:
                break
            yield values
            run.is_sending = False
    # When a run ends, Gradio sends its last output again, perhaps after the next run's first one, so it must change
    # nothing. If a run yielded nothing at all, Gradio would empty all components.
    yield {status: gr.skip()}


def show_run(run: Run, video: str, conf_threshold: float, options: Options, join_seconds: float = 0) -> Iterator[dict]:
    """A run from the queue to its end: status, chunks, results so far, and then files.

    Raises:
        gr.Error: At the end, if something failed.
    """
    try:
        while not run.is_stopped and (position := RUNS.position(run)) > 0:
            yield {status: f"Waiting in the queue: position {position}."}
            time.sleep(HEARTBEAT_SECONDS)
        yield {status: "Reading the video…"}
        analysis, failure = Analysis(video, conf_threshold, options, join_seconds), None
        with contextlib.closing(analysis.stream()) as updates:
            try:
                while not (run.is_stopped or analysis.is_end):
                    if analysis.add(next(updates)):
                        if analysis.seconds >= join_seconds:
                            yield {player: analysis.next_part()}
                        yield show_results(analysis)
                    yield {status: describe(analysis), progress: progress_bar(analysis)}
            except Exception as error:
                failure = user_facing_error(error)
            if analysis.shown < len(analysis.chunks):  # it ended before the viewer's place
                yield {player: analysis.next_part()}
            ended = "Ended early" if failure else "Stopped" if run.is_stopped else "Done"
            bar = progress_bar(analysis) if analysis.chunks else ""
            yield {status: describe(analysis, ended), progress: bar, **buttons(running=False)}
            if analysis.is_damaged:
                gr.Warning(f"This video is damaged. Only the first {analysis.seconds:.1f} seconds could be read.")
            if analysis.chunks:
                yield {files: list(analysis.save().values())}
            else:  # the results on the page may be those of the run before
                yield show_results(analysis)
        if failure and analysis.chunks:
            complete = f"The first {analysis.seconds:.0f} seconds are complete."
            failure.message += f" {complete} Press “Run again” to resume from there."
        if failure:
            raise failure
    except Exception as error:
        error = user_facing_error(error)
        error.visible = error.print_exception = False  # the status line and the log have it
        yield {status: f"> {error.message}", **buttons(running=False)}  # page.css gives quotations a warning sign
        raise error from None


def stop(request: gr.Request) -> None:
    RUNS.stop(request.session_hash)


def offer_classes(model: str, chosen: list[str]) -> dict:
    """The classes of a model. Those that it knows stay chosen."""
    labels = [*DETECTORS[model].id2label.values()]
    return gr.update(choices=labels, value=[label for label in chosen if label in labels])


def allow_another_run(was_running: bool) -> dict:
    """After a failure. Where Gradio failed, for example at the conversion of a chunk, the run could not say so."""
    line = "The server could not prepare the stream. Press “Run again” to resume."
    return {status: line if was_running else gr.skip(), **buttons(running=False)}


def buttons(running: bool) -> dict:
    can_start, can_stop = gr.update(interactive=not running), gr.update(interactive=running)
    return {start_button: can_start, stop_button: can_stop, is_running: running}


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe(analysis: Analysis, ended: str = "") -> str:
    """The status, one line."""
    seconds, elapsed = analysis.seconds, analysis.elapsed_seconds
    total, speed = analysis.info.duration_seconds, seconds / elapsed if elapsed else 0.0
    if ended:
        found, frames = analysis.results.detection_count, analysis.results.frame_count
        line = f"{ended}: {seconds:.1f} s of video in {elapsed:.1f} s, "
        line += f"{count(found, 'detection')} on {count(frames, 'frame')}"
        if frames and not found:
            line += f" · Nothing above {analysis.conf_threshold:g}. Try a lower threshold."
    elif analysis.waits_for_gpu:
        line = f"Waiting for a GPU… · {seconds:.1f} of {total:.1f} s"
    elif not analysis.chunks and analysis.join_seconds:
        line = f"Updating the first {analysis.join_seconds:.0f} s… {elapsed:.0f} s"
    elif seconds:
        line = f"{seconds:.1f} of {total:.1f} s · {analysis.seconds_left:.0f} s left"
    else:
        done, needed = analysis.first_chunk_progress()
        line = f"First chunk: {done} of {needed} frames"
        if done:
            line += f", {elapsed / done * (needed - done):.0f} s left"
    if (step := analysis.step) > 1:
        suffix = "th" if step % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(step % 10, "th")
        line += f" · analysing every {step}{suffix} frame"
    return f"{line} · {speed:.1f}× real time" if seconds else line


def progress_bar(analysis: Analysis) -> str:
    """HTML: a bar over the whole video, with the analysed part filled, and until the stream plays, the first frame.

    `page.css` places both, and `page.js` hides the frame when the player starts.
    """
    picture = ""
    is_slow = analysis.elapsed_seconds > PICTURE_AFTER_SECONDS
    if 0 in analysis.cached and is_slow and len(analysis.chunks) < 2:
        jpeg = base64.b64encode(analysis.first_frame_jpeg).decode()
        picture = f'<img alt="First frame" src="data:image/jpeg;base64,{jpeg}">'
    bar = f'<progress value="{analysis.seconds:.1f}" max="{analysis.info.duration_seconds:.1f}"></progress>'
    bar = f'<div class="bar">{bar}</div>'
    waiting = "" if analysis.is_end else "Waiting for more…"
    hints = {"waiting": waiting, "beyond": "Not analysed yet.", "updating": "Updating…"}  # `page.css` hides them
    return picture + bar + "".join(f'<span class="{name}">{text}</span>' for name, text in hints.items())


def show_results(analysis: Analysis) -> dict:
    results, crossings = analysis.results, analysis.results.crossings_per_line()
    return {
        gallery: object_pictures(results),
        table: results.objects_per_class(),
        line_table: crossings.to_html(index=False, border=0) if len(crossings) else NO_CROSSINGS,
        timeline: object_bars(results),
    }


def object_pictures(results: Results) -> str:
    """HTML: a button with the best picture of each object. `page.js` seeks its `data-seconds`.

    Not with a template of `gr.HTML`: Gradio 6.31 evaluates the result, with the names of classes in it, as JavaScript.
    """
    items = []
    for seen in results.counted_objects(MAX_PICTURES):
        times = f"{clock(seen.first_ms / 1000)}–{clock(seen.last_ms / 1000)}"
        items.append(
            f'<li><button data-seconds="{seen.best_row[0]:.3f}"><img src="{served(seen.picture)}" alt="">'
            f"<span>{html.escape(seen.label)} {seen.number} · {times}</span></button></li>"
        )
    if results.object_count > MAX_PICTURES:
        items.append(f"<li>{MAX_PICTURES} of {results.object_count} objects. Choose classes to see others.</li>")
    return f"<ul>{''.join(items)}</ul>" if items else NO_PICTURES


@lru_cache(maxsize=10_000)
def served(path: str) -> str:
    """The address of a copy that Gradio serves, and deletes later. The path names no other file before that."""
    return f"gradio_api/file={quote(gallery.move_resource_to_block_cache(path))}"


def object_bars(results: Results) -> str:
    """HTML: when each object was there. `page.js` seeks a place on the ruler, which is as wide as the bars."""
    total, rows = results.info.duration_seconds, []
    for label, name, spans in results.timeline():
        name, color = html.escape(name), label_color(label)
        shares = [(start / total, (end - start) / total) for start, end in spans]
        bars = "".join(
            f'<div style="left: {left:.2%}; width: {width:.2%}; background: {color}"></div>' for left, width in shares
        )
        times = ", ".join(f"{clock(start)}–{clock(end)}" for start, end in spans)
        rows.append(f'<li aria-label="{name}: {times}"><span>{name}</span><div class="bars">{bars}</div></li>')
    tick_seconds = next(step for step in TICK_SECONDS if total / step < 8)
    ticks = "".join(
        f'<span style="left: {tick / total:.2%}">{clock(tick)}</span>'
        for tick in range(0, math.ceil(0.97 * total), tick_seconds)
    )
    rows = f'<ul>{"".join(rows)}</ul><div class="ruler">{ticks}</div>'
    return f'<section tabindex="0" aria-label="Timeline">{rows}</section>'


def clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"


def show_first_frame(video: str | None, lines: dict[str, list]) -> dict:
    """Something to draw lines on, with those that the video has."""
    try:
        return sketch(read_first_frame(video), lines.get(video, [])) if video else {picture: None, hint: NO_VIDEO}
    except VideoError as error:
        return {picture: None, hint: str(error)}


def read_first_frame(video: str) -> np.ndarray:
    info = read_video_info(video)
    scale = Fraction(SKETCH_SIDE, max(SKETCH_SIDE, *info.size))
    return next(sample_frames(info, info.fps, scale)).image


def sketch(image: np.ndarray, lines: list[list[float]], begun: list[float] | None = None) -> dict:
    """The picture with the lines, and what to do next. `begun` is the first point of another line."""
    height, width = image.shape[:2]
    pixels = np.reshape([*lines, begun * 2] if begun else lines, (-1, 4)) * (width, height, width, height)
    draw_lines(image, pixels, [False] * len(pixels))
    draw_line_counts(image, pixels[: len(lines)])
    text = "All four lines are drawn."
    if len(lines) < len(LINE_COLORS):
        text = f"Click where line {[*LINE_COLORS][len(lines)]} {'ends' if begun else 'begins'}."
    if lines:
        text += " Arrows point “in”; draw from the other end for the other direction."
    return {picture: image[:, :, ::-1], hint: text, begun_line: begun}


def add_point(video: str, lines: dict[str, list], begun: list[float] | None, event: gr.SelectData) -> dict:
    """A click on the first frame: a line begins or ends there."""
    try:
        image, drawn = read_first_frame(video), lines.get(video, [])
    except VideoError as error:  # the file may be gone by now
        raise user_facing_error(error) from error
    height, width = image.shape[:2]
    point = [event.index[0] / width, event.index[1] / height]
    if len(drawn) == len(LINE_COLORS):
        return sketch(image, drawn)
    if not begun or math.dist(begun, point) < SHORTEST_LINE:
        return sketch(image, drawn, point)
    drawn = [*drawn, begun + point]
    return sketch(image, drawn) | {all_lines: lines | {video: drawn}}


def clear_lines(video: str | None, lines: dict[str, list]) -> dict:
    lines = lines | {video: []}
    return show_first_frame(video, lines) | {all_lines: lines, begun_line: None}


def detect_video(
    video: dict, conf_threshold: float, classes: list[str], resolution: str, analysed: str, tracks: bool,
    video_output: bool, model: str, lines: list[list[float]],
) -> Iterator[tuple[str | None, dict]]:  # fmt: skip
    """Detect objects on a whole video, for programs.

    Args:
        video: A video file, uploaded. In Python and JavaScript, `handle_file(path)` does that.
        conf_threshold: A number from 0 to 1. Detections with a score above it are drawn and returned.
        classes: A list with the names of the classes to find, or one name. Empty for all.
        resolution: "Half (fast)" (half the size, every second frame) or "Full".
        analysed: "As many as keep up" (with real time) or "Every frame".
        tracks: Whether to draw the objects' numbers and trails, true or false.
        video_output: Whether to make the annotated video, true or false. Without it, the detections come sooner.
        model: The name of a model that the server has.
        lines: A list of up to four lines that count, each two different points [x1, y1, x2, y2], 0 to 1 in the frame.

    Returns:
        The annotated video as one mp4 file with sound, and the detections, as README.md describes them.
    """
    given = {"model": model} | locals()  # in this order: the classes depend on the model
    options = {name: check_argument(name, value, model) for name, value in given.items()}
    path, conf_threshold = options.pop("video"), options.pop("conf_threshold")
    with new_run(object()) as run:
        for values in show_run(run, path, conf_threshold, Options(**options)):
            if files in values:
                saved = {Path(path).suffix: path for path in values[files]}
                yield saved.get(".mp4"), json.loads(Path(saved[".json"]).read_text(encoding="utf-8"))
            elif status in values:  # often, so that Gradio notices a client that has left
                yield None, {"status": values[status]}


ARGUMENTS = gr.utils.get_function_description(detect_video)[1]  # what the docstring says, by name


def check_argument(name: str, value: object, model: str) -> object:
    """The value of an argument of `detect_video`, or an error with a sentence for the program.

    In Gradio 6.31, the components' own checks pass some wrong values, and fail on others without a sentence.
    """
    component = arguments[name]
    choices = [choice for _, choice in getattr(component, "choices", ())]
    if name == "classes":
        choices = [*DETECTORS[model].id2label.values()]
    if isinstance(component, gr.Video):
        with contextlib.suppress(ValueError):  # as Gradio does: else the path may be that of any file
            return gr.FileData.model_validate(value, context={"validate_meta": True}).path
        is_valid = False
    elif isinstance(component, gr.Dropdown):
        value = [] if value is None else [value] if isinstance(value, str) else value
        is_valid = isinstance(value, list) and all(label in choices for label in value)
    elif isinstance(component, gr.Slider):
        is_valid = type(value) in (int, float) and component.minimum <= value <= component.maximum
    elif isinstance(component, gr.JSON):
        is_valid = isinstance(value, list) and len(value) <= len(LINE_COLORS) and all(map(is_line, value))
    else:
        is_valid = value in choices if choices else isinstance(value, bool)
    if is_valid:
        return value
    message = f"{name} cannot be {json.dumps(value, ensure_ascii=False)[:100]}. Expected: {ARGUMENTS[name]}"
    if choices:
        message += f" Known: {', '.join(choices)}."
    raise gr.Error(message, title="Wrong argument", print_exception=False)


def is_line(value: object) -> bool:
    """Whether it is a list of two different points: x1, y1, x2, y2, from 0 to 1."""
    is_list = isinstance(value, list) and len(value) == 4 and all(type(side) in (int, float) for side in value)
    return is_list and all(0 <= side <= 1 for side in value) and value[:2] != value[2:]


WEBCAM = gr.WebcamOptions(mirror=False, constraints={"video": {"width": {"ideal": 1280}, "height": {"ideal": 720}}})
ASSETS = Path(__file__).parent / "assets"
STREET_VIDEOS = "https://github.com/intel-iot-devkit/sample-videos/raw/master"  # under CC BY 4.0
STREET_EXAMPLES = ["person-bicycle-car-detection.mp4", "one-by-one-person-detection.mp4", "car-detection.mp4"]
MAX_EXAMPLE_BYTES, MAX_EXAMPLE_SECONDS = 20 << 20, 15  # for each


def example_videos() -> list[str]:
    """Paths of videos with things that the model knows: shapes, which are here, or streets, which are fetched once."""
    labels = {*DETECTOR.id2label.values()}
    if "person" in labels:
        with ThreadPoolExecutor() as pool:
            return [path for path in pool.map(fetch_example, STREET_EXAMPLES) if path]
    return sorted(map(str, EXAMPLES.glob("*.mp4"))) if "star" in labels else []


def fetch_example(name: str) -> str | None:
    """The path of a video in the cache. If it cannot be fetched in time, there is none."""
    path, end = Path(HF_HOME, "street-examples", name), time.monotonic() + MAX_EXAMPLE_SECONDS
    if not path.exists():
        try:
            content = bytearray()
            with urllib.request.urlopen(f"{STREET_VIDEOS}/{name}", timeout=MAX_EXAMPLE_SECONDS) as answer:
                while piece := answer.read1():
                    content += piece
                    if len(content) > MAX_EXAMPLE_BYTES or time.monotonic() > end:
                        return None
                if answer.length:  # the connection broke off
                    return None
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path = path.with_suffix(".part")
            partial_path.write_bytes(content)
            partial_path.rename(path)
        except (OSError, http.client.HTTPException):
            return None
    return str(path)


with gr.Blocks(title="Streaming video object detection", delete_cache=(KEPT_SECONDS // 6, KEPT_SECONDS)) as demo:
    families = " and ".join(dict.fromkeys(detector.family for detector in DETECTORS.values()))
    models = f"Model{'s' if len(DETECTORS) > 1 else ''}: {', '.join(DETECTORS)} on {DEVICE.type}"
    intro = f"Upload a video and watch {families} find the objects in it. <small>{models}</small>"
    gr.Markdown(f"# Streaming video object detection\n{intro}", elem_id="intro")
    if MODEL_NOTE:
        gr.Markdown(MODEL_NOTE)
    with gr.Row(elem_id="columns"):
        with gr.Column(scale=4):
            # With `include_audio=False`, Gradio would hand each upload, unchecked, to ffmpeg.
            source = gr.Video(label="Video source", include_audio=True, webcam_options=WEBCAM, elem_id="source")
            if examples := example_videos():
                gr.Examples(examples, inputs=source)
            with gr.Accordion("Counting lines", open=False, elem_id="lines") as lines_accordion:
                hint = gr.Markdown(NO_VIDEO, elem_id="hint")
                picture = gr.Image(label="First frame", buttons=[], interactive=False, format="jpeg")
                clear_button = gr.Button("Clear", size="sm")
            with gr.Column(elem_id="settings"):
                model = gr.Radio([*DETECTORS], value=DETECTOR.name, label="Model", visible=len(DETECTORS) > 1)
                threshold = gr.Slider(
                    0, 1, 0.30, step=0.05, label="Confidence threshold",
                    info="How sure the model must be of an object, from 0 to 1.", elem_id="threshold",
                )  # fmt: skip
                classes = gr.Dropdown(
                    list(DETECTOR.id2label.values()), multiselect=True, label="Classes",
                    info="Leave empty to show everything.",
                )  # fmt: skip
                with gr.Accordion("More settings", open=False):
                    names = ("Faster (half size, every 2nd frame)", "Full quality")
                    choices = list(zip(names, RESOLUTIONS, strict=True))
                    resolution = gr.Radio(choices, value=HALF, label="Size and frame rate")
                    choices = [("Skip frames to keep up", KEEP_UP), ("Every frame", EVERY_FRAME)]
                    analysed = gr.Radio(choices, value=KEEP_UP, label="Frames analysed")
                    tracks = gr.Checkbox(True, label="Tracks", info="Show object numbers and trails.")
        with gr.Column(scale=5):
            with gr.Column(elem_id="screen"):
                player = gr.Video(label="Detections", streaming=True, autoplay=True, buttons=[], elem_id="processed")
                progress = gr.HTML(elem_id="progress")
                sound_button = gr.Button("Turn the sound on", variant="primary", size="lg", elem_id="sound")
            status = gr.Markdown(WELCOME, elem_id="status")
            with gr.Row():
                start_button = gr.Button("Run again", interactive=False, size="md", min_width=100)
                stop_button = gr.Button("Stop", interactive=False, size="md", min_width=100, elem_id="stop")
            with gr.Tabs(elem_id="results"):
                with gr.Tab("Objects", render_children=True):
                    gallery = gr.HTML(NO_PICTURES, elem_id="gallery", apply_default_css=False)
                    table = gr.Dataframe(
                        headers=TABLE_HEADERS, column_widths=["25%", "22%", "21%", "16%", "16%"], show_label=False,
                        buttons=[], interactive=False, elem_id="table",
                    )  # fmt: skip
                with gr.Tab("Lines", render_children=True):
                    # Gradio 6.31 shows a `gr.Dataframe` that was filled before its tab was opened without its rows.
                    line_table = gr.HTML(NO_CROSSINGS, elem_id="crossings")
                with gr.Tab("Timeline", render_children=True):
                    timeline = gr.HTML(elem_id="timeline", apply_default_css=False)
                with gr.Tab("Files", render_children=True):
                    files = gr.File(
                        label="Available when the run ends", file_count="multiple", interactive=False, elem_id="files"
                    )

    options = {"classes": classes, "resolution": resolution, "analysed": analysed, "tracks": tracks}
    is_running = gr.State(False)
    all_lines, begun_line = gr.State({}), gr.State()  # the lines that count, by video; the first point of another one
    drawn = [picture, hint, begun_line, all_lines]
    shown = [player, status, gallery, table, line_table, timeline, files, progress]
    shown += [start_button, stop_button, is_running, *drawn]
    # A new run replaces the one before, and runs have a queue of their own.
    settings = options | {"model": model, "lines": all_lines}
    run = {"outputs": shown, "inputs_kwargs": settings, "trigger_mode": "multiple", "concurrency_limit": None}
    run |= {"show_progress": "hidden"}
    new_source = [source.change, start_button.click]
    api = {"api_name": "stream_object_detection", "api_visibility": "undocumented"}  # a stream is of no use to programs
    started = gr.on(new_source, start, [source, threshold], js="startOver", **api, **run)
    changes = [setting.change for setting in (threshold, *options.values(), all_lines)]
    playhead = gr.Number(0, visible=False)
    again = {"fn": redraw, "inputs": [source, threshold, playhead], "js": "resume", "api_visibility": "private", **run}
    redrawn = gr.on(changes, **again)
    switched = model.change(
        offer_classes, [model, classes], classes, queue=False, show_progress="hidden", api_visibility="private"
    ).then(**again)  # after the classes: Gradio refuses any that the model does not know
    for event in (started, redrawn, switched):
        event.failure(
            allow_another_run, is_running, [status, start_button, stop_button, is_running],
            queue=False, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    quick = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": CONCURRENT_RUNS}
    # Gradio 6.31 does not make what is in a closed accordion, and may lose a value that arrives while it opens.
    lines_accordion.expand(show_first_frame, [source, all_lines], drawn, **quick)
    picture.select(add_point, [source, all_lines, begun_line], drawn, **quick)
    clear_button.click(clear_lines, [source, all_lines], drawn, **quick)
    demo.unload(stop)  # with this, Gradio 6.31 notices the end of a session, and frees what belongs to it
    sound_button.click(None, js="turnSoundOn", api_visibility="private")
    stop_button.click(stop, queue=False, show_progress="hidden", api_visibility="private")
    # Programs have the page's settings, with the same defaults. `detect_video` checks them, not Gradio.
    uploaded = gr.Video(label="Video", visible=False)
    with_video = gr.Checkbox(True, label="Annotated video", visible=False)
    labels = dict.fromkeys(label for detector in DETECTORS.values() for label in detector.id2label.values())
    of_any_model = gr.Dropdown([*labels], multiselect=True, label="Classes", visible=False)
    lines = gr.JSON([], label="Lines", visible=False)
    numbers = {"type": "array", "items": {"type": "number"}}
    lines.api_info = lambda: {"type": "array", "items": numbers}  # Gradio 6.31 has no valid schema for JSON
    arguments = {"video": uploaded, "conf_threshold": threshold, **options, "video_output": with_video, "model": model}
    arguments |= {"classes": of_any_model, "lines": lines}
    for name, component in arguments.items():  # what the page about the API says of it
        api_info = component.api_info() | {"additional_description": ARGUMENTS[name]}
        component.api_info = partial(dict, api_info)
    uploaded.data_model = None
    results = [gr.Video(label="Annotated video", visible=False), gr.JSON(label="Result", visible=False)]
    gr.Button(visible=False).click(
        detect_video, [], results, inputs_kwargs=arguments, api_name="detect_video", preprocess=False,
        concurrency_limit=None,
    )  # fmt: skip


if __name__ == "__main__":
    prefer_bundled_ffmpeg()
    demo.launch(
        css_paths=ASSETS / "page.css",
        head=f"<script>{(ASSETS / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=["api", "gradio"],  # the settings offer the screen recorder
        run_history=False,  # "Load run" would put objects into the buttons and upload the files for ever
        max_file_size=MAX_UPLOAD,
        mcp_server=find_spec("mcp") is not None,  # with `gradio[mcp]`, `detect_video` is a tool for assistants
        state_session_capacity=2 * MAX_RUNS,
        app_kwargs=guard(demo),
        max_threads=40 + MAX_RUNS,
    )
