"""Is the CUDA path right, how much memory does it take, how fast is it, and what limits it? Prints one table.

    python tests/on_gpu.py                # needs a GPU, the packages of requirements.txt, and no network
    python tests/on_gpu.py --device cpu   # tries the script itself, with a few frames only

R18, R50 and R101 stand for models of these sizes with random weights, on which speed and memory do not depend. They
find nothing, so their dense class scores are compared; the shipped detector's detections are compared one by one.
The judge is the official processing: `RTDetrImageProcessorPil` and the model in float32 on the CPU.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
parser.add_argument("--rounds", type=int, default=5, help="of the whole app beside the guide's loop (default 5)")
OPTIONS = parser.parse_args()
IS_TRIAL = OPTIONS.device == "cpu"
if IS_TRIAL:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["MODEL_ID"] = str(ROOT / "examples" / "shapes-rtdetr")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import benchmark  # noqa: E402
import cv2  # noqa: E402
import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402
import shapes  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForObjectDetection, RTDetrImageProcessorPil  # noqa: E402

import app  # noqa: E402
from draw_boxes import draw_bounding_boxes  # noqa: E402
from video import ChunkWriter, read_video_info, sample_frames  # noqa: E402

CHUNK = 2 if IS_TRIAL else 60  # frames: two seconds at 30 per second
REPEATS = 1 if IS_TRIAL else 7
SECONDS = 2 if IS_TRIAL else 12  # of the 1080p video
synchronize = torch.cuda.synchronize if app.HAS_CUDA else lambda: None


def row(name: str, value: str) -> None:
    print(f"| {name} | {value} |", flush=True)


def median_ms(work: Callable[[], object]) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of values around their mean: the root mean square of the difference over that of the truth."""
    return ((ours - theirs).norm() / (theirs - theirs.mean()).norm()).item()


def noise_frames(count: int, width: int, height: int) -> list[np.ndarray]:
    """Pictures with detail at every scale: uint8 (height, width, 3) BGR."""
    rng = np.random.default_rng(1)
    frames = []
    for _ in range(count):
        layers = [cv2.resize(rng.normal(0, 35, (cells, 2 * cells, 3)), (width, height)) for cells in (2, 8, 32, 128)]
        frames.append((128 + sum(layers)).clip(0, 255).astype(np.uint8))
    return frames


# ------------------------------------------------------------------------------------------------------ correctness


def check_resize(detector: app.Detector) -> None:
    for width, height in ((960, 540), (480, 270), (202, 360)):
        frames = noise_frames(2, width, height)
        official = RTDetrImageProcessorPil(size=dict(zip(("height", "width"), detector.input_size, strict=True)))
        theirs = official(images=[frame[:, :, ::-1] for frame in frames], return_tensors="pt")["pixel_values"]
        difference = (detector._preprocess(frames).cpu() - theirs).abs() * 255
        row(
            f"resize of {width}x{height} against the official processing: mean, maximum",
            f"{difference.mean():.2f}, {difference.max():.2f} grey levels",
        )


def check_parity(name: str, folder: str, detector: app.Detector) -> None:
    """Dense class scores before the choice of queries, and which queries are chosen; from the same pixels."""
    frames = noise_frames(2, 960, 540)
    pixels = detector._preprocess(frames)
    reference = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = reference(pixel_values=pixels.cpu().float())
        ours = detector.model(pixel_values=pixels)
    ours_class, theirs_class = ours.enc_outputs_class.float().cpu(), theirs.enc_outputs_class
    count = reference.config.num_queries
    chosen, wanted = (c.max(-1).values.topk(count, dim=1).indices for c in (ours_class, theirs_class))
    same = statistics.mean(len(np.intersect1d(a, b)) / count for a, b in zip(chosen, wanted, strict=True))
    row(
        f"{name}: relative error of the class scores, queries in common, logits finite",
        f"{relative_error(ours_class, theirs_class):.4f}, {same:.1%}, {bool(ours.logits.isfinite().all())}",
    )


def check_detections(detector: app.Detector) -> None:
    """The shipped detector: how many detections have their like (box, label, score) in the other precision."""
    folder = app.SHIPPED_MODEL
    processor = RTDetrImageProcessorPil.from_pretrained(folder)
    model = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    like = total = 0
    for name in shapes.EXAMPLES:
        for index in range(0, shapes.EXAMPLES[name].frame_count, 100 if IS_TRIAL else 10):
            frame = shapes.example_frame(name, index)
            theirs = shapes.detect(model, processor, frame, threshold=0.3)
            height, width = frame.shape[:2]
            boxes, scores, labels = found_by(detector, np.ascontiguousarray(frame[:, :, ::-1]))
            for box, score, label in zip(theirs["boxes"], theirs["scores"], theirs["labels"], strict=True):
                is_like = (shapes.overlap(box, boxes * (width, height, width, height)) >= 0.9) & (labels == label)
                like += bool((is_like & (np.abs(scores - score) <= 0.05)).any())
                total += 1
    row("shipped detector: detections with their like (IoU 0.9, score within 0.05)", f"{like} of {total}")


def found_by(detector: app.Detector, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (relative), scores and labels."""
    found = detector([frame])[0]
    return found.xyxy, found.confidence, found.class_id


def check_out_of_memory(detector: app.Detector) -> None:
    """A limit that a chunk exceeds: it comes in halves, with the same detections."""
    frames = noise_frames(CHUNK, 960, 540)
    passes = []
    hook = detector.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: passes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    expected = detector(frames)
    if app.HAS_CUDA:
        total = torch.cuda.get_device_properties(0).total_memory
        needed = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    passes.clear()
    try:
        found = detector(frames)
    finally:
        hook.remove()
        if app.HAS_CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
    row(
        f"with 0.6 of the memory that {CHUNK} frames need: passes, frames answered",
        f"{passes}, {len(found)} of {len(expected)}",
    )


# ----------------------------------------------------------------------------------------------- memory and speed


def measure_model(name: str, detector: app.Detector) -> None:
    frames = noise_frames(CHUNK, 960, 540)
    if app.HAS_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    whole = median_ms(lambda: detector(frames))
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if app.HAS_CUDA else "-"
    pixels = detector._preprocess(frames)

    @torch.inference_mode()
    def forward() -> None:
        detector.model(pixel_values=pixels)

    alone = median_ms(forward)
    row(
        f"{name}, {CHUNK} frames of 960x540: frames per second (forward pass alone), peak memory",
        f"{1000 * CHUNK / whole:.0f} ({1000 * CHUNK / alone:.0f}), {memory}",
    )


def measure_stages(video: str, detector: app.Detector) -> None:
    """Each stage alone, in milliseconds per output frame: the slowest one limits the app."""
    info = read_video_info(video)
    fps = info.fps / 2
    read = []
    began = time.perf_counter()
    for frame in sample_frames(info, fps, Fraction(1, 2)):
        read.append(frame.image)
    stages = {"decoding, scaling": 1000 * (time.perf_counter() - began) / len(read)}
    part = read[:CHUNK]
    stages["model"] = median_ms(lambda: detector(part)) / len(part)
    boxes = np.array([[0.12 + 0.1 * i, 0.3, 0.2 + 0.1 * i, 0.5] for i in range(8)]) * (960, 540, 960, 540)
    numbers = np.arange(1, 9)

    def draw() -> None:
        for image in part:
            draw_bounding_boxes(image, boxes, np.full(8, 0.5), ["car"] * 8, numbers, [boxes[:, :2]] * 8)

    stages["drawing"] = median_ms(draw) / len(part)
    with tempfile.TemporaryDirectory() as folder:

        def encode() -> str:
            with ChunkWriter(folder, part[0].shape[1::-1], fps, 0) as writer:
                for image in part:
                    writer.write(image)
            return writer.path

        stages["encoding"] = median_ms(encode) / len(part)
        chunk, player, loop = encode(), gr.Video(streaming=True), asyncio.new_event_loop()
        convert = lambda: loop.run_until_complete(player.stream_output(chunk, "p", True))  # noqa: E731
        stages["Gradio's conversion"] = median_ms(convert) / len(part)
        loop.close()
    for name, value in stages.items():
        row(f"1080p, {name} alone, per output frame", f"{value:.2f} ms")


@torch.inference_mode()
def normalize(source: str) -> None:
    """Sets the statistics of each batch norm to those of its input, as training does. Else, features fade to zero."""

    def measure(norm: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    model = AutoModelForObjectDetection.from_pretrained(source, dtype=torch.float32).eval()
    hooks = [part.register_forward_pre_hook(measure) for part in model.modules() if hasattr(part, "running_mean")]
    model(**RTDetrImageProcessorPil()(images=noise_frames(2, 960, 540), return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    model.save_pretrained(source)


def detectors(folder: Path) -> Iterator[tuple[str, str, app.Detector]]:
    """Name, folder and detector of each full size, one at a time."""
    for name in ("r18", "r50", "r101"):
        source = benchmark.model_source(name, folder)
        normalize(source)
        yield name.upper(), source, app.Detector(source, name)


def main() -> None:
    driver = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
        if app.HAS_CUDA
        else "no GPU"
    )
    print(f"| {driver}, torch {torch.__version__}, {os.cpu_count()} cores | |\n|---|--:|", flush=True)
    check_resize(app.DETECTOR)
    check_detections(app.DETECTOR)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, source, detector in detectors(folder):
            check_parity(name, source, detector)
            measure_model(name, detector)
            if name == "R50":
                check_out_of_memory(detector)
                video = benchmark.render_street(folder / "street.mp4", 1920, 1080, SECONDS)
                measure_stages(video, detector)
            del detector
            if app.HAS_CUDA:
                torch.cuda.empty_cache()
        os.environ["MODEL_ID"] = str(app.SHIPPED_MODEL if IS_TRIAL else folder / "r50")
        warm_up = benchmark.render_street(folder / "warm-up.mp4", 160, 96, seconds=2, fps=4)
        print(*benchmark.compare(video, warm_up, 1 if IS_TRIAL else OPTIONS.rounds, True), sep="\n", flush=True)


if __name__ == "__main__":
    main()
