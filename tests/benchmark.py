"""How fast the app is against the loop of Gradio's guide "Streaming Object Detection from Video".

    python tests/benchmark.py                                   # the shipped model, rendered streets, 5 minutes
    python tests/benchmark.py --model r18                       # does a full-size model keep up on a CPU? 6 minutes
    python tests/benchmark.py --model r50 --rounds 1            # the same with R50's size, 5 minutes
    python tests/benchmark.py --model r50 --outside             # without its forward pass, also on a CPU
    python tests/benchmark.py --video street.mp4 --device cuda  # any video, on a GPU
    python tests/benchmark.py --memory                          # does memory grow with the video?
    python tests/benchmark.py --visitors                        # 1, 4 and 16 visitors at once, 9 minutes

Both sides show the same video with the same weights, in turns, each turn in a process of its own: a loop that
shares its process with another inherits its warm caches, its threads and its memory. A turn begins with a
warm-up on a tiny video, and then plays the video three times:

1. as the page does, where Gradio converts each chunk before it asks for the next: total, first chunk, CPU, memory;
2. without Gradio: what is missing in the total is the part of the conversion that no other work hides;
3. without Gradio, and with a constant answer instead of the forward pass: everything but the forward pass.

The app analyses every frame and draws tracks. On a CPU, `--model r18` and `--model r50` instead compare the guide, the
app with every frame, and the app with as many frames as keep up: only the first of these three plays, and only of a
480x270 street. The guide and the app with every frame are far slower than real time, so they play only its beginning.
"""

import argparse
import asyncio
import itertools
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForObjectDetection, RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil
from transformers import RTDetrResNetConfig as ResNetConfig
from transformers.models.rt_detr.modeling_rt_detr import RTDetrObjectDetectionOutput as Output
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parents[1]
SHIPPED_MODEL = ROOT / "examples" / "shapes-rtdetr"
CONF_THRESHOLD = 0.3
CONSTANT_BOXES = 8  # in each frame of the constant answer
SIZES = ((480, 270), (1920, 1080))
BEGINNING_SECONDS = 4  # of a video, for sides that are far slower than real time; the guide needs at least two
GRAIN = 6  # gray levels, as of a telephone in daylight
AUDIO_RATE = 48_000
disable_progress_bar()

# ---------------------------------------------------------------------------------------- the guide's loop


def guide_stream(video: str, folder: str, model: torch.nn.Module, processor: RTDetrImageProcessorPil) -> Iterator[str]:
    """The guide's algorithm in our own words, with its truncated rates and what it throws away at the end."""
    capture = cv2.VideoCapture(video)
    fps = int(capture.get(cv2.CAP_PROP_FPS)) // 2
    batch: list[np.ndarray] = []
    for number in itertools.count():
        is_read, frame = capture.read()
        if not is_read:
            return
        frame = cv2.resize(frame, None, fx=0.5, fy=0.5)
        if number % 2 == 0:
            batch.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        if len(batch) < 2 * fps:
            continue
        height, width = frame.shape[:2]
        inputs = processor(images=batch, return_tensors="pt").to(model.device)
        with torch.no_grad():
            outputs = model(**inputs)
        results = processor.post_process_object_detection(
            outputs, target_sizes=[(height, width)] * len(batch), threshold=CONF_THRESHOLD
        )
        path = os.path.join(folder, f"{number}.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
        for picture, result in zip(batch, results, strict=True):
            drawn = guide_draw(Image.fromarray(picture), result, model.config.id2label)
            writer.write(cv2.cvtColor(np.asarray(drawn), cv2.COLOR_RGB2BGR))
        writer.release()
        batch = []
        yield path


def guide_draw(picture: Image.Image, result: dict[str, torch.Tensor], id2label: dict[int, str]) -> Image.Image:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for score, label, box in zip(result["scores"], result["labels"], result["boxes"], strict=True):
        left, top, right, bottom = box.tolist()
        draw.rectangle((left, top, right, bottom), outline=(230, 70, 70), width=3)
        text = f"{id2label[label.item()]}: {score:.2f}"
        _, text_top, text_width, text_bottom = draw.textbbox((0, 0), text, font=font)
        text_height = text_bottom - text_top + 4
        draw.rectangle((left, top - text_height, left + text_width, top), fill=(230, 70, 70))
        draw.text((left, top - text_height), text, fill="white", font=font)
    return picture


# ---------------------------------------------------------------------------------------- one side's turn


class Job(NamedTuple):
    """What one process measures."""

    side: str  # "guide" or "app"
    video: str
    warm_up: str = ""  # another video; without one, only the memory is measured
    resolution: str = "Half (fast)"  # one of the app's; the guide knows no other
    asks_model: bool = True  # or only the constant answer is measured
    keeps_up: bool = False  # the app analyses as many frames as keep up with real time, instead of every one


class Side:
    """The guide's loop or the app, loaded."""

    def __init__(self, job: Job):
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        os.environ["GRADIO_TEMP_DIR"] = self.folder.name
        self.step = 1  # output frames per analysed frame
        if job.side == "app":
            sys.path.insert(0, str(ROOT))
            import app  # loads its model, so not in the guide's processes
            from runs import Prefetcher

            app.prefer_bundled_ffmpeg()
            self.model = app.DETECTOR.model

            def stream(video: str, folder: str) -> Iterator[str]:
                """As the page does it: in a thread, one chunk ahead."""
                options = app.Options(resolution=job.resolution)
                if job.keeps_up:
                    self.step = app.step_to_keep_up(video, options)
                plan = app.Plan(step=self.step, folder=folder)
                updates = app.stream_object_detection(video, CONF_THRESHOLD, options, plan=plan)
                for update in Prefetcher(updates):
                    yield update.chunk

            self.stream = stream
            precision = "float16" if self.model.device.type == "cuda" else "float32 or bfloat16"
        else:
            source = os.environ["MODEL_ID"]
            processor = RTDetrImageProcessorPil.from_pretrained(source)
            self.model = AutoModelForObjectDetection.from_pretrained(source, dtype=torch.float32).eval()
            self.model = self.model.to("cuda" if torch.cuda.is_available() else "cpu")
            self.stream = lambda video, folder: guide_stream(video, folder, self.model, processor)
            precision = "float32"
        self.name = f"{precision} on {self.model.device}"
        self.player = gr.Video(streaming=True)
        self.forward_seconds = 0.0

    def time_forward_passes(self) -> None:
        """From now on; on a GPU the loop then waits for each of them to end."""
        running, started, lock = 0, 0.0, threading.Lock()  # several may run at once

        def clock(change: int) -> None:
            nonlocal running, started
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            with lock:
                now = time.perf_counter()
                if running:
                    self.forward_seconds += now - started
                running, started = running + change, now

        self.model.register_forward_pre_hook(lambda *_: clock(+1))
        self.model.register_forward_hook(lambda *_: clock(-1))

    def play(self, video: str, with_gradio: bool = False) -> dict[str, float]:
        """Play a video, and return the seconds that things took and the number of its output frames."""
        folder = tempfile.mkdtemp(dir=self.folder.name)
        chunks: list[str] = []
        self.forward_seconds, conversion, first_chunk = 0.0, 0.0, math.nan
        loop = asyncio.new_event_loop()
        started, cpu_started = time.perf_counter(), sum(os.times()[:4])
        for chunk in self.stream(video, folder):
            if with_gradio:
                asked = time.perf_counter()
                loop.run_until_complete(self.player.stream_output(chunk, "processed", not chunks))
                conversion += time.perf_counter() - asked
            if not chunks:
                first_chunk = time.perf_counter() - started
            chunks.append(chunk)
        total, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu_started
        self.player.end_stream_output("processed")
        loop.close()
        times = {"total": total, "cpu": cpu, "forward": self.forward_seconds, "conversion": conversion}
        return times | {"first_chunk": first_chunk, "frames": sum(map(count_frames, chunks))}

    def answer_constantly(self) -> None:
        """Replace the forward pass by one that takes no time and finds the same things in every frame."""
        config = self.model.config
        scores = torch.full((1, config.num_queries, config.num_labels), 0.01)
        boxes = torch.full((1, config.num_queries, 4), 0.1)  # center x, center y, width, height
        for i in range(CONSTANT_BOXES):
            scores[0, i, i % config.num_labels] = 0.9 - 0.05 * i
            boxes[0, i] = torch.tensor([0.12 + 0.11 * i, 0.3 + 0.05 * i, 0.1, 0.25])
        like = next(self.model.parameters())
        logits, boxes = torch.logit(scores).to(like), boxes.to(like)

        def forward(pixel_values: torch.Tensor, **_: object) -> Output:
            count = len(pixel_values)
            return Output(logits=logits.repeat(count, 1, 1), pred_boxes=boxes.repeat(count, 1, 1))

        self.model.forward = forward


def count_frames(video: str) -> int:
    with av.open(video) as container:
        return container.streams.video[0].frames


def measure(job: Job) -> dict[str, float | str]:
    """One turn of one side, in milliseconds per output frame where no unit is named."""
    side = Side(job)
    idle_mb = memory_mb("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak, which loading a model may have set
    if not job.asks_model:
        side.answer_constantly()
    if not job.warm_up:
        side.play(job.video)
        return {"memory_mb": memory_mb("VmHWM") - idle_mb}
    side.play(job.warm_up, with_gradio=True)
    if not job.asks_model:
        outside = side.play(job.video)
        return {"outside": 1000 * outside["total"] / outside["frames"], "model": side.name}
    if job.side == "guide":
        side.time_forward_passes()  # it waits for them anyway
    page = side.play(job.video, with_gradio=True)
    peak_mb = memory_mb("VmHWM")
    if job.side == "guide":
        alone = page | {"total": page["total"] - page["conversion"]}  # it waits for them, too
    else:
        side.time_forward_passes()
        alone = side.play(job.video)
    side.answer_constantly()
    times = {
        "outside": side.play(job.video)["total"],
        "forward": alone["forward"],
        "conversion": page["conversion"],
        "not_hidden": max(0.0, page["total"] - alone["total"]),
        "total": page["total"],
        "cpu": page["cpu"],
    }
    frames = page["frames"] or math.nan  # the guide shows nothing of a video under two seconds
    return {name: 1000 * seconds / frames for name, seconds in times.items()} | {
        "first_chunk_seconds": page["first_chunk"],
        "memory_mb": peak_mb - idle_mb,
        "fps": frames / page["total"],
        "model": side.name,
    }


def measure_pace(job: Job) -> dict[str, float]:
    """One turn of one side, as the page plays the video."""
    side = Side(job)
    side.play(job.warm_up, with_gradio=True)
    page = side.play(job.video, with_gradio=True)
    with av.open(job.video) as container:
        video_seconds = float(container.streams.video[0].frames / container.streams.video[0].average_rate)
    return {
        "video_seconds": video_seconds,
        "step": side.step,
        "times_real_time": video_seconds / page["total"],
        "first_chunk_seconds": page["first_chunk"],
    }


def run_in_its_own_process(job: Job, turn: Callable[[Job], dict] = measure) -> dict[str, float | str]:
    # Spawned, not forked: a fork would inherit the memory, and torch's threads would not survive it.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(turn, job).result()


def memory_mb(field: str, process: int | str = "self") -> float:
    """What Linux says of a process: `VmRSS` is its memory now, `VmHWM` the most that there was of it."""
    status = Path(f"/proc/{process}/status")
    return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1]) / 1000 if status.exists() else math.nan


# ---------------------------------------------------------------------------------------- videos and models


def render_street(path: Path, width: int, height: int, seconds: float, fps: int = 30) -> str:
    """A camera pans along a street with traffic; grain, and the sound of it. The same for the same arguments."""
    rng = np.random.default_rng(0)
    pan = width // 4
    street = np.linspace(190, 80, height)[:, None, None].repeat(width + pan, 1).repeat(3, 2)
    for cells in (4, 16, 64, 256):  # from clouds to gravel
        noise = cv2.resize(rng.normal(0, 22, (cells, 2 * cells)), street.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        street += noise[..., None]
    for left in range(0, width + pan, width // 10):  # houses with windows
        top = int(height * rng.uniform(0.1, 0.4))
        street[top : height * 3 // 5, left : left + width // 11] += rng.normal(0, 35, 3)
        for y, x in itertools.product(range(top, height // 2, height // 16), range(1, 4)):
            street[y : y + height // 32, left + x * width // 50 :][:, : width // 90] -= 60
    street = street.clip(0, 255).astype(np.uint8)
    grain = [rng.normal(0, GRAIN, (height, width, 3)).astype(np.int16) for _ in range(4)]
    traffic = []  # texture, top, where it starts, pixels a frame
    for lane in range(12):
        size = int(width * rng.uniform(0.05, 0.15)), int(height * rng.uniform(0.06, 0.14))
        car = cv2.resize(rng.integers(30, 255, (6, 9, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC)
        speed = width * rng.uniform(0.003, 0.012) * (-1) ** lane
        traffic.append((car, int(height * rng.uniform(0.5, 0.85)), rng.uniform(0, width), speed))

    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "22"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=AUDIO_RATE, layout="mono")
        for number in range(round(seconds * fps)):
            if number % fps == 0:
                hum = 4000 * np.sin(np.arange(AUDIO_RATE) / 70) + rng.normal(0, 800, AUDIO_RATE)
                sound = av.AudioFrame.from_ndarray(hum.astype(np.int16)[None], format="s16", layout="mono")
                sound.rate, sound.pts = AUDIO_RATE, number // fps * AUDIO_RATE
                container.mux(audio.encode(sound))
            shift = int(pan * number / (seconds * fps))
            frame = street[:, shift : shift + width].copy()
            for car, top, start, speed in traffic:
                left = int(start + speed * number) % (width - car.shape[1])
                frame[top : top + car.shape[0], left : left + car.shape[1]] = car
            frame = cv2.add(frame, grain[number % len(grain)], dtype=cv2.CV_8U)
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return str(path)


def remux(video: str, path: Path, *options: object, loops: int = 1) -> str:
    """A copy of a video, `loops` times in a row; `options` are ffmpeg's, for the output."""
    command = ["ffmpeg", "-v", "error", "-stream_loop", loops - 1, "-i", video, "-c", "copy", *options, path]
    subprocess.run([str(part) for part in command], check=True)
    return str(path)


def model_source(name: str, folder: Path) -> str:
    """What to put into MODEL_ID for `--model`."""
    if name not in ("r18", "r50", "r101"):
        return str(SHIPPED_MODEL) if name == "shapes" else name
    # As PekingU/rtdetr_r50vd, which has the classes' own defaults, as .._r18vd or as .._r101vd.
    # What the weights are makes no difference to the time.
    config = RTDetrConfig(num_labels=80)
    if name == "r101":
        config.backbone_config.depths = [3, 4, 23, 3]
        config.encoder_hidden_dim, config.encoder_ffn_dim = 384, 2048
        config.decoder_in_channels = [384] * 3
    if name == "r18":
        stages = {
            "hidden_sizes": [64, 128, 256, 512],
            "depths": [2] * 4,
            "out_features": ["stage2", "stage3", "stage4"],
        }
        config.backbone_config = ResNetConfig(layer_type="basic", **stages)
        config.encoder_in_channels, config.hidden_expansion, config.decoder_layers = [128, 256, 512], 0.5, 3
    RTDetrForObjectDetection(config).save_pretrained(folder / name)
    RTDetrImageProcessorPil().save_pretrained(folder / name)
    return str(folder / name)


# ------------------------------------------------------------------------------------------------ the tables

ROWS = {  # what `measure` returns: its name in the table, and how it is written
    "outside": ("outside the forward pass, per output frame", "{:.1f} ms"),
    "forward": ("in the forward pass, per output frame", "{:.1f} ms"),
    "conversion": ("Gradio's conversion of the chunks, per output frame", "{:.1f} ms"),
    "not_hidden": ("… of it not hidden behind other work", "{:.1f} ms"),
    "total": ("total, per output frame", "{:.1f} ms"),
    "cpu": ("CPU time with ffmpeg's, per output frame", "{:.1f} ms"),
    "first_chunk_seconds": ("first chunk after", "{:.2f} s"),
    "memory_mb": ("peak memory above the idle process", "{:.0f} MB"),
    "fps": ("output frames per second", "{:.1f}"),
}
PACE_ROWS = {  # the same for `measure_pace`
    "video_seconds": ("played", "{:.0f} s"),
    "step": ("output frames per analysed frame", "{:.0f}"),
    "times_real_time": ("times real time", "{:.2f}"),
    "first_chunk_seconds": ROWS["first_chunk_seconds"],
}


def describe(video: str) -> str:
    with av.open(video) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate)
        return f"{stream.width}x{stream.height}, {stream.frames} frames at {rate:.4g} per second"


def compare(video: str, warm_up: str, rounds: int, asks_model: bool) -> list[str]:
    """The lines of one video's table: medians of the rounds, and the median of their ratios."""
    turns: dict[str, list[dict]] = {"guide": [], "app": []}
    for number in range(rounds):
        # Whoever comes second in one round comes first in the next.
        for side in sorted(turns, reverse=number % 2 == 0):
            turns[side].append(run_in_its_own_process(Job(side, video, warm_up, asks_model=asks_model)))
    lines = ["", f"| {describe(video)} | guide | app | app / guide |", "|---|--:|--:|--:|"]
    for key, (name, form) in ROWS.items():
        if key not in turns["app"][0]:
            continue
        guide, app = ([turn[key] for turn in turns[side]] for side in ("guide", "app"))
        ratio = statistics.median(b / a if a else math.nan for a, b in zip(guide, app, strict=True))
        values = " | ".join(form.format(statistics.median(rounds)) for rounds in (guide, app))
        lines.append(f"| {name} | {values} | {ratio:.2f} |")
    models = ", ".join(f"{side} {turns[side][0]['model']}" for side in turns)
    return [*lines, "", f"Model: {Path(os.environ['MODEL_ID']).name}; {models}; rounds: {rounds}."]


def compare_pace(video: str, beginning: str, warm_up: str, rounds: int) -> list[str]:
    """The lines of a video's table, with the medians of the rounds. `beginning` is its part for the slow sides."""
    jobs = {
        "guide": Job("guide", beginning, warm_up),
        "app, every frame": Job("app", beginning, warm_up),
        "app, as many as keep up": Job("app", video, warm_up, keeps_up=True),
    }
    turns = [[run_in_its_own_process(job, measure_pace) for job in jobs.values()] for _ in range(rounds)]
    lines = ["", f"| {describe(video)} | {' | '.join(jobs)} |", "|---|--:|--:|--:|"]
    for key, (name, form) in PACE_ROWS.items():
        medians = [statistics.median(turn[key] for turn in column) for column in zip(*turns, strict=True)]
        lines.append(f"| {name} | {' | '.join(map(form.format, medians))} |")
    return [*lines, "", f"Model: {Path(os.environ['MODEL_ID']).name}; rounds: {rounds}."]


def compare_memory(folder: Path, asks_model: bool) -> list[str]:
    """The app's peaks: for a short video and a long one, and for 4K."""
    clip = render_street(folder / "clip.mp4", 480, 270, 10)
    large = render_street(folder / "4k.mp4", 3840, 2160, 6)
    jobs = {
        "480x270, one minute": Job("app", remux(clip, folder / "1.mp4", loops=6)),
        "480x270, ten minutes": Job("app", remux(clip, folder / "10.mp4", loops=60)),
        "3840x2160, six seconds": Job("app", large),
        "3840x2160, six seconds, in full size": Job("app", large, resolution="Full"),
    }
    lines = ["", "| the app's peak memory above the idle process | |", "|---|--:|"]
    for name, job in jobs.items():
        peak = run_in_its_own_process(job._replace(asks_model=asks_model))["memory_mb"]
        lines.append(f"| {name} | {peak:.0f} MB |")
    return lines


VISITORS = (1, 4, 16)
VISIT_SECONDS = 30  # of the video that they watch
MOVES = ((5, 0.4), (15, 0.5))  # of the slider: the second of the video, the threshold
VISITOR_ROWS = {  # the same for `measure_visitors`
    "first": ("first chunk after, median and maximum", "{:.1f}, {:.1f} s"),
    "back": ("after a move, back at the same place after", "{:.1f}, {:.1f} s"),
    "halted": ("the video stands still for", "{:.1f}, {:.1f} s"),
    "end": ("at its end after", "{:.0f}, {:.0f} s"),
    "memory_mb": ("memory of the process at most, and a minute later, above before", "{:.0f}, {:.0f} MB"),
}


def measure_visitors(count: int, video: str, folder: Path) -> dict[str, list[float]]:
    """What each of some visitors sees who come at once, and what the server keeps of them."""
    from conftest import running_app
    from visitors import Viewer, upload

    with running_app(folder) as (server, pid), ThreadPoolExecutor(count) as pool:
        path = upload(server, Path(video))
        before, most = memory_mb("VmRSS", pid), 0.0
        viewers = [Viewer(server, path) for _ in range(count)]
        visits = [pool.submit(viewer.watch, MOVES) for viewer in viewers]
        while not all(visit.done() for visit in visits):
            most = max(most, memory_mb("VmRSS", pid))
            time.sleep(0.5)
        for viewer in viewers:
            viewer.leave()
        time.sleep(60)
        seen = [visit.result() for visit in visits]
        columns = {
            key: list(itertools.chain(*([row[key]] if key != "back" else row[key] for row in seen))) for key in seen[0]
        }
        return columns | {"memory_mb": [most - before, memory_mb("VmRSS", pid) - before]}


def compare_visitors(folder: Path) -> list[str]:
    """The table of several numbers of visitors, each with a server of its own."""
    clip = render_street(folder / "clip.mp4", 480, 270, 10)
    video = remux(clip, folder / "visit.mp4", loops=VISIT_SECONDS // 10)
    columns = []
    for count in VISITORS:
        (folder / str(count)).mkdir()
        columns.append(measure_visitors(count, video, folder / str(count)))
    lines = ["", f"| {describe(video)} | {' | '.join(map(str, VISITORS))} |", f"|---|{'--:|' * len(VISITORS)}"]
    for key, (name, form) in VISITOR_ROWS.items():
        pairs = [c[key] if key == "memory_mb" else (statistics.median(c[key]), max(c[key])) for c in columns]
        lines.append(f"| {name} | {' | '.join(form.format(*pair) for pair in pairs)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", action="append", help="a video file; without it, streets are rendered")
    parser.add_argument(
        "--model", default="shapes", help="shapes (default), r18, r50, r101, a folder, or an id on the Hub"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU, if there is one")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--seconds", type=float, help="at most this much of each video (default 8; r18, r50: 20)")
    parser.add_argument("--outside", action="store_true", help="a constant answer instead of the forward pass")
    parser.add_argument("--memory", action="store_true", help="compare the app's peak memory instead")
    parser.add_argument("--visitors", action="store_true", help="what visitors see who come at once, instead")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        folder = Path(folder)
        os.environ["MODEL_ID"] = model_source(options.model, folder)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        cpu = torch.backends.cpu.get_cpu_capability()
        print(f"{os.cpu_count()} cores ({cpu}), {gpu}, torch {torch.__version__}", flush=True)
        if options.memory:
            print(*compare_memory(folder, not options.outside), sep="\n")
            return
        if options.visitors:
            print(*compare_visitors(folder), sep="\n")
            return
        warm_up = render_street(folder / "warm-up.mp4", 160, 96, seconds=2, fps=4)
        measures_pace = options.model in ("r18", "r50") and not options.outside and not torch.cuda.is_available()
        seconds, sizes = options.seconds or (20 if measures_pace else 8), SIZES[:1] if measures_pace else SIZES
        if options.video:
            names = [(video, folder / f"{i}-{Path(video).name}") for i, video in enumerate(options.video)]
            videos = [remux(video, path, "-t", seconds) for video, path in names]
        else:
            videos = [render_street(folder / f"street-{w}x{h}.mp4", w, h, seconds) for w, h in sizes]
        for video in videos:
            if measures_pace:
                beginning = remux(video, folder / f"beginning-of-{Path(video).name}", "-t", BEGINNING_SECONDS)
                lines = compare_pace(video, beginning, warm_up, options.rounds)
            else:
                lines = compare(video, warm_up, options.rounds, not options.outside)
            print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
