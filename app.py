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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import copy
from fractions import Fraction
from functools import lru_cache
from inspect import unwrap
from pathlib import Path
from typing import NamedTuple, TypeVar

import spaces  # isort: skip  # before torch: on ZeroGPU it emulates CUDA outside the GPU function

import gradio as gr
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

from draw_boxes import draw_bounding_boxes, label_color, load_font
from video import CPU_COUNT, AudioReader, ChunkWriter, Frame, VideoError, join_chunks, read_video_info, sample_frames

T = TypeVar("T")
log = logging.getLogger("rt-detr-stream")

# ------------------------------------------------------------------------------------------------------- settings

DEFAULT_MODEL_ID = "PekingU/rtdetr_r50vd"
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
CACHED_VIDEOS = 16  # whose detections are kept in memory, at some hundred bytes per frame

ON_ZEROGPU = spaces.config.Config.zero_gpu  # `spaces` has no public name for it
GPU_SECONDS = 60  # of a ZeroGPU per call, at most: requests beyond a visitor's quota are refused
GPU_RESERVE_SECONDS = 4  # of GPU_SECONDS, to finish the last chunk
VISITORS_AT_ONCE = 32 if ON_ZEROGPU else 4  # concurrent runs; others wait in a queue
MAX_QUEUE = 100  # runs, including those that wait
SETTLE_SECONDS = 0.15  # each step of a dragged slider starts a run, which first waits for a next step this long
HEARTBEAT_SECONDS = 0.25  # at least this often, the page hears from a run, and a run notices Stop
MAX_UPLOAD = "2gb"

# ---------------------------------------------------------------------------------------------------------- model


class Detector:
    """An RT-DETR checkpoint on the best available device.

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
        has_mps = torch.backends.mps.is_available()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
        model = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
        self.model = model.to(self.device)
        self.autocast = torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda")
        self._passes_at_once = 1
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            self._passes_at_once = CPU_COUNT
            optimize_for_cpu(model)
        self.batch_frames = self._passes_at_once * max(1, PASS_PIXELS[self.device.type] // math.prod(self.input_size))
        self._lock = threading.Lock()  # visitors take turns: two passes at once take twice the memory

    def __call__(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """Detects objects on frames of one size, uint8 (height, width, 3) BGR; in halves if memory is short.

        Returns one float32 (N, 6) array per frame, best detection first: box (xyxy, relative to the frame, 0 to 1),
        score, and label number.
        """
        try:
            size = math.ceil(len(frames) / self._passes_at_once)
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
        if self.device.type == "cuda":  # where the uint8 resize does not exist
            batch = batch.to(self.device).float()
        batch = F.interpolate(batch, self.input_size, mode="bilinear", antialias=True).flip(1).to(self.device).float()
        if self.processor.do_rescale:
            batch = batch * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = self.processor.image_mean, self.processor.image_std
            mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (mean, std))
            batch = (batch - mean) / std
        return batch


@torch.no_grad()
def optimize_for_cpu(model: torch.nn.Module) -> None:
    """Channels last, activations in place, batch norms folded: on two cores, an R18 takes 219 instead of 380 ms."""
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = True
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
    source = model_id or DEFAULT_MODEL_ID
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
        f"For whoever runs this app: **{source}** is unavailable (no network, and not in the local cache). The small "
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
    """What the model found on one frame, whatever the threshold."""

    source_index: int  # number of the frame in the source, from 0
    pts_seconds: float
    source_size: tuple[int, int]  # width and height in pixels, upright
    detections: np.ndarray  # as `Detector` returns them


class StreamUpdate(NamedTuple):
    """What `stream_object_detection` yields."""

    chunk: str  # path of an mp4 file (H.264, FLAC), which the caller removes
    frames: list[FrameDetections]  # those that begin in this chunk
    output_frames: int  # how many the output has, counted from the beginning of the video
    gpu_seconds: float  # since the call began
    is_end: bool  # of the video


class Batch(NamedTuple):
    """Consecutive frames of the output in one chunk, which are detected together."""

    frames: list[Frame]
    ends_chunk: bool
    is_end: bool  # of the video
    is_cached: bool = False  # none of its frames needed the model


@spaces.GPU(duration=lambda *_, budget_seconds=GPU_SECONDS, **__: budget_seconds)
def stream_object_detection(
    video: str,
    conf_threshold: float,
    classes: Sequence[str] = (),
    resolution: str = HALF,
    *,
    start: int = 0,
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
        start: The output frame to begin with.
        cached: Detections by source index. These frames skip the model; new detections are added.
        folder: Where to write the chunks; by default the system's temporary folder.
        join_seconds: Cached frames up to this second of the video come as one long chunk.
        budget_seconds: The stream ends shortly before this time is over; with 0, at the first frame not in `cached`.

    Yields:
        One `StreamUpdate` per chunk of two seconds; the last one is shorter.

    Raises:
        gr.Error: If the file is not a video that can be decoded.
    """
    began, cached = time.monotonic(), {} if cached is None else cached
    writer, shown, index, found = None, None, start, []
    try:
        info = read_video_info(video)
        scale, fps = RESOLUTIONS[resolution].scale, info.fps / RESOLUTIONS[resolution].step
        chunk_frames = max(1, round(CHUNK_SECONDS * fps))
        audio = AudioReader(info, start / fps) if info.has_audio else None
        batches = prefetch(read_batches(sample_frames(info, fps, scale, start), chunk_frames, start))
        deadline = began + budget_seconds - GPU_RESERVE_SECONDS
        with contextlib.closing(prefetch(detect_batches(batches, cached, deadline))) as detected:
            load_font()  # while the first frames are being read and detected
            for batch in detected:
                for frame in batch.frames:
                    if frame is not shown:  # it comes again if the source shows it for longer
                        shown, detections = frame, cached[frame.source_index]
                        draw(frame.image, select(detections, conf_threshold, classes))
                        place = (frame.source_index, frame.pts_seconds, frame.source_size)
                        found.append(FrameDetections(*place, detections))
                    writer = writer or ChunkWriter(folder, frame.image.shape[1::-1], fps, bool(audio))
                    writer.write(frame.image)
                index += len(batch.frames)
                if audio and batch.frames:
                    writer.write_audio(audio.read_until(index / fps))
                is_joined = batch.is_cached and not batch.is_end and index / fps <= join_seconds
                if batch.ends_chunk and writer and not is_joined:
                    chunk, writer = writer.close(), None
                    yield StreamUpdate(chunk, found, index, time.monotonic() - began, batch.is_end)
                    found = []
    except Exception as error:
        if ON_ZEROGPU or isinstance(error, VideoError):  # from a ZeroGPU's worker, only a `gr.Error` arrives whole
            raise user_facing_error(error) from error
        raise
    finally:
        if writer:
            writer.discard()


def read_batches(frames: Iterable[Frame], chunk_frames: int, start: int = 0) -> Iterator[Batch]:
    """The frames of each chunk in one batch, or in several if they are many or large."""
    batch: list[Frame] = []
    for index, frame in enumerate(frames, start):
        ends_chunk = index % chunk_frames == 0
        is_full = len(batch) == DETECTOR.batch_frames or len(batch) * frame.image.nbytes > BATCH_BYTES
        if batch and (ends_chunk or is_full):
            yield Batch(batch, ends_chunk, is_end=False)
            batch = []
        batch.append(frame)
    yield Batch(batch, ends_chunk=True, is_end=True)


def detect_batches(batches: Iterator[Batch], cached: dict[int, np.ndarray], deadline: float) -> Iterator[Batch]:
    """The same batches, once `cached` has the detections of all their frames.

    Ends with an empty batch where the model would be needed after `deadline`, a time of `time.monotonic`.
    """
    with contextlib.closing(batches):
        for batch in batches:
            new = {frame.source_index: frame.image for frame in batch.frames if frame.source_index not in cached}
            if new and time.monotonic() > deadline:
                yield Batch([], ends_chunk=True, is_end=False)
                return
            if new:
                cached.update(zip(new, DETECTOR([*new.values()]), strict=True))
            yield batch._replace(is_cached=not new)


def select(detections: np.ndarray, conf_threshold: float, classes: Sequence[str]) -> np.ndarray:
    """The detections that are drawn and reported: sure enough, and of one of `classes`, if there are any."""
    selected = detections[detections[:, 4] > conf_threshold]
    if classes:
        numbers = [number for number, label in DETECTOR.id2label.items() if label in classes]
        selected = selected[np.isin(selected[:, 5], numbers)]
    return selected


def draw(image: np.ndarray, detections: np.ndarray) -> None:
    """Draws detections into an image, uint8 (height, width, 3) BGR."""
    height, width = image.shape[:2]
    labels = [DETECTOR.id2label[int(number)] for number in detections[:, 5]]
    draw_bounding_boxes(image, detections[:, :4] * (width, height, width, height), detections[:, 4], labels)


END = object()


def lower_thread_priority() -> None:
    """Chunks that are finished go to the viewer before more is begun: the first one comes a fifth sooner."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(10)


def prefetch(items: Generator[T], heartbeat_seconds: float | None = None) -> Generator[T | None]:
    """The same items, but the next one is made in a thread while the last one is being used.

    Closing it does not wait for the step at hand; `items` is closed after that step.

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


# -------------------------------------------------------------------------------------------------------- results


@lru_cache(maxsize=CACHED_VIDEOS)
def cached_detections(video: str, modified: float, resolution: str) -> dict[int, np.ndarray]:
    """The detections of all runs of a file at a resolution, by source index. Runs add to it.

    Args:
        modified: When the file was modified: after a change, it is another video.
    """
    return {}


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
TABLE_HEADERS = ["Class", "Most at once", "First (s)", "Last (s)"]
COLUMNS = ["time_seconds", "frame", "label", "score", "x1", "y1", "x2", "y2"]


class Report:
    """What a run has found so far, for the page's status, table and plot, and for the files in `folder`."""

    def __init__(self, video: str, conf_threshold: float, classes: Sequence[str], resolution: str):
        self.info, self.conf_threshold, self.classes = read_video_info(video), conf_threshold, list(classes or ())
        self.resolution, self.fps = resolution, self.info.fps / RESOLUTIONS[resolution].step
        self.chunks: list[str] = []
        self.folder, self.failure = "", None
        self.cached = cached_detections(video, os.path.getmtime(video), resolution)
        self.output_frames, self.is_end, self.waits_for_gpu = 0, False, False
        self._started, self._frames, self._source_size = time.monotonic(), 0, (None, None)
        self._rows: list[np.ndarray] = []  # a float32 (N, 8) array per frame: `COLUMNS`, with the label's number
        # For each class and point of the plot: the most at once, and when it was seen first and last.
        self._points: dict[tuple[int, str], tuple[int, float, float]] = {}
        self._seconds_per_point = max(1, math.ceil(self.info.duration_seconds / 200))

    def add(self, update: StreamUpdate) -> None:
        self.output_frames, self.is_end = update.output_frames, update.is_end
        self._frames += len(update.frames)
        self.chunks += [update.chunk] if update.chunk else []
        for index, seconds, self._source_size, detections in update.frames:
            detections = select(detections, self.conf_threshold, self.classes)
            boxes, scores, numbers = detections[:, :4], detections[:, 4], detections[:, 5]
            when = np.broadcast_to((seconds, index), (len(detections), 2))
            boxes = np.clip(boxes, 0, 1) * (self._source_size * 2)
            self._rows.append(np.column_stack((when, numbers, scores, boxes)).astype(np.float32))
            point = int(seconds) // self._seconds_per_point * self._seconds_per_point
            for number, count in zip(*np.unique(numbers, return_counts=True), strict=True):
                key = (point, DETECTOR.id2label[int(number)])
                most, first, _ = self._points.get(key, (0, seconds, seconds))
                self._points[key] = (max(most, int(count)), first, seconds)

    @property
    def seconds(self) -> float:
        """How far the video has been analysed."""
        return min(float(self.output_frames / self.fps), self.info.duration_seconds)

    def warn_if_damaged(self) -> None:
        if self.is_end and self.info.expected_seconds - self.seconds > 1.5 / self.fps:
            gr.Warning(f"This video is damaged. It could be read up to second {self.seconds:.1f}.")

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
            progress = f"Analysing the first frames… {elapsed:.0f} s"
        else:
            progress = f"{self.seconds:.1f} of {total:.1f} s · {(total - self.seconds) / speed:.0f} s left"
        return f"{progress} · {speed:.1f}× real time · {DETECTOR.name} on {DETECTOR.device.type}"

    def table(self) -> pd.DataFrame:
        """A row per class: the most at once, and the first and last second in which it was seen."""
        points = pd.DataFrame(
            [(label, *values) for (_, label), values in self._points.items()],
            columns=["class", "most", "first", "last"],
        )
        rows = points.groupby("class", as_index=False).agg({"most": "max", "first": "min", "last": "max"})
        return rows.sort_values(["most", "class"], ascending=[False, True]).round(1).set_axis(TABLE_HEADERS, axis=1)

    def plot(self) -> dict:
        """An update of the page's plot: the most at once of each class, over time.

        `gr.LinePlot` rebuilds its scales and legend only when a property changes, not with new rows: a class that
        is not in `color_map` stays invisible. Fixed limits keep the axes still.
        """
        labels = sorted({label for _, label in self._points})
        seconds = range(0, int(self.seconds - 1 / self.fps) + 1, self._seconds_per_point)
        counts = pd.DataFrame(
            [(second, label, self._points.get((second, label), (0,))[0]) for second in seconds for label in labels],
            columns=["second", "class", "count"],
        )
        return gr.update(
            value=counts,
            color_map={label: label_color(label) for label in labels},
            x_lim=[0, self.info.duration_seconds],
            y_lim=[0, max([5, *counts["count"]])],  # below 5, the axis would have ticks at halves
            visible=bool(labels),
        )

    def results(self) -> dict[str, object]:
        """Values for the page's components."""
        return {"table": self.table(), "plot": self.plot(), "progress": self.progress()}

    def progress(self) -> str:
        """A bar over the whole video, with the analysed part filled."""
        bar = f'<progress value="{self.seconds:.1f}" max="{self.info.duration_seconds:.1f}"></progress>'
        return f'{bar}<span class="hint">{"" if self.is_end else "Waiting for more…"}</span>'

    def detections(self) -> pd.DataFrame:
        """A row per detection, with the columns of the CSV file; boxes in pixels of the source."""
        table = pd.DataFrame(np.concatenate([np.zeros((0, 8)), *self._rows]), columns=COLUMNS).astype({"frame": int})
        table["label"] = table["label"].map(DETECTOR.id2label).astype(object)
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
        boxes = detections[COLUMNS[4:]].to_numpy().tolist()
        (width, height), duration = self._source_size, round(self.info.duration_seconds, 3)
        return {
            "model": DETECTOR.name,
            "threshold": self.conf_threshold,
            "classes": self.classes,
            "analysed_seconds": round(self.seconds, 3),
            "video": {"width": width, "height": height, "fps": float(self.info.fps), "duration_seconds": duration},
            "detections": [
                row | {"box": box} for row, box in zip(detections[COLUMNS[:4]].to_dict("records"), boxes, strict=True)
            ],
        }


# ----------------------------------------------------------------------------------------------------------- runs


class Run:
    """A run of a session, from its arrival until it has ended."""

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
CLEARED = {"processed": gr.update(value=None), "table": None, "plot": gr.update(visible=False), "progress": ""}
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
            yield {"status": f"Waiting for other visitors: position {position} in the queue."}
            time.sleep(HEARTBEAT_SECONDS)
        report = Report(*settings)
        yield {"status": report.status(), "progress": report.progress()}
        with contextlib.closing(prefetch(stream_into(report, join_seconds), HEARTBEAT_SECONDS)) as updates:
            while not (run.is_stopped or report.is_end or report.failure):
                update = next(updates)
                if update:
                    report.add(update)
                    yield {"processed": update.chunk, **report.results()}
                yield {"status": report.status(), "progress": report.progress()}
            ended = "Ended early" if report.failure else "Stopped" if run.is_stopped else "Done"
            yield {"status": report.status(ended), **report.results(), **IDLE}
            report.warn_if_damaged()
            if report.chunks:
                yield {"files": report.save()}
        if report.failure:
            if report.chunks:
                report.failure.message += (
                    f" It is complete up to second {report.seconds:.0f}; Run again continues there."
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
    info, start, is_end, with_gpu = report.info, 0, False, not ON_ZEROGPU
    while not is_end:
        budget_seconds = math.inf if with_gpu else 0
        if with_gpu and ON_ZEROGPU:
            budget_seconds = GPU_PACE.budget_seconds(round(info.duration_seconds * report.fps) - start)
        stream = stream_object_detection if with_gpu else unwrap(stream_object_detection)
        report.waits_for_gpu, first, update = with_gpu and ON_ZEROGPU, None, None
        updates = stream(
            info.path, report.conf_threshold, report.classes, report.resolution, start=start,
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
    playhead_seconds: float,
    request: gr.Request,
) -> Iterator[tuple]:
    """Detect objects on a video and watch them: the annotated video as an HLS stream, chunk by chunk.

    Args:
        video: A video file.
        conf_threshold: Detections with a score above this, 0 to 1, are drawn.
        classes: Names of the classes to draw; empty for all.
        resolution: "Half (fast)" (half the size, every second frame) or "Full".
        playhead_seconds: Where the viewer is in the same video: cached frames up to there come at once. Negative for
            another video.
    """
    with new_run(request.session_hash) as run:
        time.sleep(SETTLE_SECONDS)
        if run.is_replaced:
            return
        if video is None:
            yield page_update(status=WELCOME, **CLEARED, **IDLE, files=None)
            return
        yield page_update(**RUNNING, **(CLEARED if playhead_seconds < 0 else {}))
        for values in follow(run, video, conf_threshold, classes, resolution, join_seconds=playhead_seconds):
            if run.is_replaced:
                break
            yield page_update(**values)
    # When a run ends, Gradio sends its last output again, perhaps after the first one of its successor.
    yield page_update()


def detect_video(
    video: str, conf_threshold: float, classes: list[str], resolution: str
) -> Iterator[tuple[str, dict] | tuple[None, None]]:
    """Detect objects on a whole video, for programs.

    Args:
        video: A video file.
        conf_threshold: Detections with a score above this, 0 to 1, are drawn and returned.
        classes: Names of the classes to find; empty for all.
        resolution: "Half (fast)" (half the size, every second frame) or "Full".

    Returns:
        The annotated video as one mp4 file with sound, and the detections, as README.md describes them.
    """
    with new_run(uuid.uuid4().hex) as run:
        for values in follow(run, video, conf_threshold, classes, resolution):
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
let left = null;  // the stream that was left: its address, and the second
const startOver = (inputs) => {
    left = null;
    document.querySelector("#processed").scrollIntoView({behavior: "smooth", block: "nearest"});
    return [...inputs.slice(0, 4), -1];
};
const goOn = (inputs) => {
    const video = player();
    if (!left && video && !video.ended) left = {src: video.currentSrc, seconds: video.currentTime};
    return [...inputs.slice(0, 4), left?.seconds ?? 0];
};
const returnToPlace = ({target: video, type}) => {
    if (!left || video !== player() || video.currentSrc === left.src) return;
    if (video.seekable.length && video.seekable.end(0) > left.seconds) seek(left.seconds);
    else if (type !== "ended") return;
    left = null;
};
for (const type of ["canplay", "progress", "ended"]) document.addEventListener(type, returnToPlace, true);

// Gradio's player does not say that it has caught up with the stream. Of an upload that the browser cannot play, it
// says "Video not playable", which this app perhaps can, and shows controls with a duration of NaN.
for (const type of ["waiting", "playing", "error", "loadedmetadata"]) document.addEventListener(type, (event) => {
    if (event.target === player()) document.body.classList.toggle("stalled", type === "waiting");
    else if (event.target.closest?.("#source")) {
        document.body.classList.toggle("unplayable", type === "error");
        if (type === "error") event.stopImmediatePropagation();
    }
}, true);

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
NAME_EXAMPLES = """() => document.querySelectorAll(".gallery-item").forEach((button) =>
    button.setAttribute("aria-label", button.querySelector("video").src.split("/").pop()))"""
CSS = """
#source video { max-height: clamp(180px, 28vw, 430px); object-fit: contain; }
.unplayable #source .controls, #files .label-clear-button { display: none; }
#threshold input[type=range]:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 4px; }
#progress { min-height: 48px; }
#progress progress { width: 100%; height: 8px; appearance: none; border: none; border-radius: 4px; cursor: pointer; }
#progress progress, ::-webkit-progress-bar { background: var(--neutral-300); border-radius: 4px; }
#progress ::-webkit-progress-value { background: var(--color-accent); border-radius: 4px; }
#progress ::-moz-progress-bar { background: var(--color-accent); border-radius: 4px; }
#progress .hint { visibility: hidden; }
.stalled #progress .hint { visibility: visible; }
#table [role=row], #plot svg { cursor: pointer; }
@media (max-width: 700px) {  /* one column: source, player, status, settings, results */
    #columns { flex-direction: column; }
    #columns > .column { display: contents; }
    #settings { order: 1; }
    #results { order: 2; }
}
"""


def build_page() -> gr.Blocks:
    with gr.Blocks(title="Streaming video object detection", delete_cache=(3600, 86400)) as page:
        intro = "Upload a video and watch what RT-DETR finds in it."
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
                    widths = ["31%", "27%", "21%", "21%"]
                    table = gr.Dataframe(
                        headers=TABLE_HEADERS, column_widths=widths, label="Objects found", interactive=False,
                        elem_id="table",
                    )  # fmt: skip
                    plot = gr.LinePlot(
                        x="second", y="count", color="class", x_title="Seconds", y_title="Most at once",
                        y_axis_format="d", height=240, visible=False, elem_id="plot",
                    )  # fmt: skip
                    files = gr.File(
                        label="Results, ready when the run has ended",
                        file_count="multiple",
                        interactive=False,
                        height=190,
                        elem_id="files",
                    )

        settings = [source, conf_threshold, classes, resolution]
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
        changes = [conf_threshold.change, classes.change, resolution.change]
        gr.on(changes, **stream, js="(...inputs) => goOn(inputs)", api_visibility="private")
        stop.click(stop_run, queue=False, show_progress="hidden", api_visibility="private")
        page.load(None, js=NAME_EXAMPLES)
        outputs = [gr.Video(visible=False), gr.JSON(visible=False)]
        gr.Button(visible=False).click(detect_video, settings, outputs, concurrency_limit=None, api_name="detect_video")
    return page


demo = build_page()

if __name__ == "__main__":
    middleware = [Middleware(BlockScreenRecordingRoute)]
    demo.launch(
        css=CSS, head=HEAD, max_file_size=MAX_UPLOAD, app_kwargs={"middleware": middleware}, max_threads=40 + MAX_QUEUE
    )
